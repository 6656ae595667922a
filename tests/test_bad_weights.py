"""Weights made to harm, or to break: the command says one line, allocates nothing large and leaves nothing behind."""

from __future__ import annotations

import json
import os
import pickle
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import jobs
import numpy as np
import pytest
import torch_by_hand
from formats.conversions import GOLDEN, HISTORY, KEYS, command, copy_history, left_in, refused

from cpmjax.formats.safetensors_files import write_safetensors
from cpmjax.formats.tensors import TensorInfo
from cpmjax.formats.torch_files import open_torch

WHOLE = (HISTORY / "pytorch_model.300000").read_bytes()
SAFETENSORS = (GOLDEN / "minicpm-tiny-gqa" / "model.safetensors").read_bytes()


class Harmful:
    """Unpickled by Python itself, it makes a file called `executed` where it is."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch executed",)


def safetensors(header: object, data: bytes = b"", size: int | None = None) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + data


def gguf(tensors: int, pairs: int = 0, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, pairs) + rest


def entry(shape: list[int], start: int, end: int) -> dict:
    return {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}


def torch_zip(value: bytes) -> Callable[[Path], bytes]:
    return lambda folder: torch_by_hand.write(folder, value).read_bytes()


# What is wrong: (content, or what makes it in a scratch folder; what the message says).
TORCH: dict[str, tuple[bytes | Callable[[Path], bytes], str]] = {
    "empty": (b"", "an empty file; expected weights"),
    "Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "a Git LFS pointer"),
    "web page": (b"<!doctype html><html>not found</html>", "begins with b'<!doctyp'; expected weights"),
    "truncated": (WHOLE[:500_000], "a damaged or incomplete zip file"),
    "end alone": (WHOLE[500_000:], "begins with"),
    "call": (pickle.dumps(Harmful()), "holds posix.system"),
    "call of an old protocol": (pickle.dumps(Harmful(), 2), "holds posix.system"),
    "call inside the zip file": (torch_zip(pickle.dumps({"w": Harmful()})), "holds posix.system"),
    "names that lead out": (torch_zip(torch_by_hand.state(torch_by_hand.tensor(torch_by_hand.storage(
        key=torch_by_hand.text("../../0"))))), "a storage with a damaged description"),
    "2^60 elements": (torch_zip(torch_by_hand.state(torch_by_hand.tensor(torch_by_hand.storage(
        elements=torch_by_hand.integer(2**60))))), "has 16 bytes; expected 4611686018427387904"),
}  # fmt: skip
SAFE: dict[str, tuple[bytes, str]] = {
    "truncated": (SAFETENSORS[:500_000], "expected"),
    "header longer than the file": (safetensors({}, size=2**40), "with a header of 1099511627776; expected"),
    "header of 2^64 - 1": (struct.pack("<Q", 2**64 - 1) + b"{}", "expected a safetensors file"),
    "no JSON": (struct.pack("<Q", 9) + b"{nothing}", "expected a safetensors file"),
    "deep JSON": (struct.pack("<Q", 200_000) + b'{"a":' * 40_000, "expected a safetensors file"),
    "overlapping": (safetensors({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, b"0" * 12), "expected"),
    "gap": (safetensors({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, b"0" * 12), "expected"),
    "beyond the end": (safetensors({"a": entry([2**40], 0, 2**42)}, b"0" * 12), "expected"),
    "shape of 2^60": (safetensors({"a": entry([2**60], 0, 12)}, b"0" * 12), "expected"),
    "no tensors": (safetensors({}), "lacks"),
    "other tensors": (safetensors({"../a": entry([3], 0, 12)}, b"0" * 12), "has ../a; expected the 20 tensors"),
}
GGUF: dict[str, tuple[bytes, str]] = {
    "truncated": (gguf(1)[:12], "expected"),
    "2^60 tensors": (gguf(2**60), "expected"),
    "2^60 pairs": (gguf(0, 2**60), "expected"),
    "key of 2^60 bytes": (gguf(0, 1, struct.pack("<Q", 2**60) + b"general"), "expected"),
    "array of 2^60": (gguf(0, 1, struct.pack("<Q1sIIQ", 1, b"k", 9, 4, 2**60)), "expected"),
    "no metadata": (gguf(0), "expected"),
}
CASES = [
    *(("pytorch_model.bin", *case) for case in TORCH.items()),
    *(("model.safetensors", *case) for case in SAFE.items()),
    *(("model.gguf", *case) for case in GGUF.items()),
]


def place(folder: Path, name: str, content: bytes | Callable[[Path], bytes]) -> Path:
    """The path of a model that is one such file; its config and tokenizer are sound."""
    copy_history(folder)
    data = content if isinstance(content, bytes) else content(folder)
    (folder / "pytorch_model.bin").unlink(missing_ok=True)
    (folder / name).write_bytes(data)
    return folder / name if name.endswith("gguf") else folder


@pytest.mark.parametrize("to", ["hf", "llama", "gguf", "run"])
@pytest.mark.parametrize("name, fault, case", CASES, ids=[f"{name}-{fault}" for name, fault, _ in CASES])
def test_one_line_and_nothing_at_the_target(name, fault, case, to, tmp_path, monkeypatch):
    content, said = case
    source = place(tmp_path / "source", name, content)
    (tmp_path / "targets").mkdir()
    monkeypatch.chdir(tmp_path / "targets")
    tracemalloc.start()
    try:
        message = refused(source, "model", f"--to={to}")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert message.startswith(f"{tmp_path / 'source' / name}: ") and said in message and "expected" in message
    assert len(message) < 700 and message.isprintable()
    assert peak < 2e7
    assert left_in(tmp_path) == ["source", "targets"] and left_in(tmp_path / "targets") == []


def test_a_series_goes_on_without_them(tmp_path, monkeypatch):
    source = copy_history(tmp_path / "source", step300000="pytorch_model.300000", step390000="pytorch_model.390000")
    (tmp_path / "scratch").mkdir()
    names = {}
    for step, (content, said) in enumerate(TORCH.values(), 1):
        data = content if isinstance(content, bytes) else content(tmp_path / "scratch")
        names[step] = f"pytorch_model.{step}", said
        (source / names[step][0]).write_bytes(data)
    (source / "pytorch_model.340000").symlink_to("nowhere")
    names[340_000] = "pytorch_model.340000", "No such file or directory"
    monkeypatch.chdir(tmp_path / "scratch")
    steps = ",".join(map(str, [*names, 300_000, 350_000, 390_000]))
    code, stderr = command(source, tmp_path / "run", "--to=run", f"--steps={steps}", *KEYS)
    assert code == 1 and "Traceback" not in stderr
    lines = stderr.splitlines()
    for step, (name, said) in names.items():
        [line] = [line for line in lines if line.startswith(f"step {step}: ")]
        assert line.startswith(f"step {step}: NOT imported: {source / name}: ") and said in line
    assert f"step 350000: NOT imported: {source}: holds no weights of step 350000; expected" in stderr
    assert lines[-1] == "not converted, for the reasons above: " + ", ".join(
        [*(name for name, _ in names.values()), "step 350000"]
    )
    assert jobs.steps_of(tmp_path / "run") == [300_000, 390_000]
    assert not [*tmp_path.rglob("executed")]


def test_the_harmful_pickle_would_do_harm(tmp_path, monkeypatch):
    """Or the tests above would show nothing."""
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(Harmful()))
    assert left_in(tmp_path) == ["executed"]


@pytest.mark.parametrize(
    "key, value, said",
    [
        ("hidden_size", 2**62, "hidden_size = "),
        ("hidden_size", -144, "hidden_size = -144"),
        ("hidden_size", "144", "hidden_size = '144'; expected a whole number"),
        ("num_hidden_layers", 10**9, "tensors; expected those of a MiniCPM of 1000000000 layers"),
        ("vocab_size", 2**30, "embed_tokens.weight is 503 x 144; expected 1073741824 x 144"),
        ("rms_norm_eps", float("nan"), "rms_norm_eps = nan; expected a number"),
        ("hidden_act", "gelu", "hidden_act = 'gelu' is not supported; expected silu"),
        ("scale_emb", None, "lacks scale_emb"),
        ("model_type", "qwen2", "model_type = 'qwen2'; expected minicpm or llama"),
    ],
)
def test_a_config_that_lies(key, value, said, tmp_path):
    source = copy_history(tmp_path / "source", step300000="pytorch_model.bin")
    config = json.loads((source / "config.json").read_text()) | {key: value}
    (source / "config.json").write_text(json.dumps(config))
    for to in ("hf", "run"):
        message = refused(source, tmp_path / "model", f"--to={to}")
        assert message.startswith(f"{source}/") and said in message
        assert len(message) < 700
    assert left_in(tmp_path) == ["source"]


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b'{"a":' * 50_000, b" " * (2**20 + 1)])
def test_a_config_that_is_none(content, tmp_path):
    source = copy_history(tmp_path / "source", step300000="pytorch_model.bin")
    (source / "config.json").write_bytes(content)
    message = refused(source, tmp_path / "model", "--to=hf")
    assert message.startswith(f"{source}/config.json: ") and "expected a JSON object" in message
    assert left_in(tmp_path) == ["source"]


def test_numbers_that_are_none(tmp_path):
    """Integers where weights should be."""
    source = copy_history(tmp_path / "source")
    tensors = open_torch(HISTORY / "pytorch_model.300000")
    arrays = {name: tensors.read(name) for name in tensors} | {"model.norm.weight": np.zeros(144, np.int64)}
    infos = {name: TensorInfo(array.shape, array.dtype, "") for name, array in arrays.items()}
    write_safetensors(source / "model.safetensors", infos, arrays.values())
    assert refused(source, tmp_path / "model", "--to=hf") == (
        f"{source}/model.safetensors: model.norm.weight holds I64; expected float32, float16 or bfloat16"
    )
