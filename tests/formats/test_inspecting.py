"""--inspect: what a path is said to hold, against the fixtures' own facts and numpy."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
from formats.gguf_samples import write_minicpm
from golden_models import GOLDEN
from safetensors import safe_open

import cpmjax
from cpmjax.convert import main
from cpmjax.formats.inspecting import inspect
from cpmjax.run.errors import UserError


def line(text: str, label: str) -> str:
    (found,) = [each for each in text.splitlines() if each.startswith(label.ljust(11))]
    return found.removeprefix(label).strip()


def test_a_hugging_face_folder():
    said = inspect(GOLDEN / "minicpm-tiny-a")
    assert said.splitlines()[0].endswith("minicpm-tiny-a: a Hugging Face folder")
    model = line(said, "model")
    # 503 x 144 + 4 (2 x 144 + 4 x 144^2 + 3 x 144 x 360) + 144, by hand
    for fact in ("MiniCPM", "1,027,584 parameters in F32", "4 layers", "width 144", "6 heads of 24", "head tied"):
        assert fact in model
    assert "scale_emb 12, scale_depth 1.4, dim_model_base 36" in line(said, "muP")
    assert "rope_theta 10000" in line(said, "note") and "tie_word_embeddings true" in line(said, "note")
    assert line(said, "tokenizer") == "none"


def test_every_tensor_with_its_shape_type_and_norm():
    rows = [row.split("  ") for row in inspect(GOLDEN / "minicpm-tiny-a").split("\n\n")[1].splitlines()[1:]]
    found = {cells[0]: [cell.strip() for cell in cells[1:] if cell.strip()] for cells in rows}
    with safe_open(GOLDEN / "minicpm-tiny-a" / "model.safetensors", "numpy") as file:
        assert found.keys() == set(file.keys())
        for name, (shape, kind, norm) in found.items():
            tensor = file.get_tensor(name)
            assert (shape, kind) == (" x ".join(map(str, tensor.shape)), "F32")
            assert float(norm) == pytest.approx(np.linalg.norm(tensor.astype(np.float64)), rel=1e-5)


def test_a_series_and_the_run_it_becomes(tmp_path):
    series = GOLDEN / "minicpm-tiny-history"
    assert line(inspect(series), "steps") == "300000, 390000; what follows is step 300000"
    assert main([str(series), str(tmp_path / "run"), "--to", "run"]) == 0
    said = inspect(tmp_path / "run")
    assert line(said, "kind").startswith(f"import of {series.resolve()}")
    assert re.search(r"^390000 +unknown +imported +unknown$", said, re.MULTILINE)
    assert "550,080 parameters in bf16" in line(said, "model")
    assert "503 tokens" in line(said, "tokenizer") and "prefix_space" in line(said, "tokenizer")
    assert re.search(r"^layers/gate +2 x 144 x 360 +bfloat16 +[\d.]+$", said, re.MULTILINE)


def test_a_file_without_its_config_shows_its_tensors(tmp_path):
    shutil.copy(GOLDEN / "minicpm-tiny-history" / "pytorch_model.300000", tmp_path / "alone.bin")
    said = inspect(tmp_path / "alone.bin")
    assert said.splitlines()[0].endswith("alone.bin: a file of torch.save")
    assert "config.json" in line(said, "problem")
    assert "model.layers.1.mlp.up_proj.weight" in said


def test_a_config_that_lacks_its_scales(tmp_path):
    folder = shutil.copytree(GOLDEN / "minicpm-tiny-gqa", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    del config["scale_emb"]
    (folder / "config.json").write_text(json.dumps(config))
    assert "lacks scale_emb" in line(inspect(folder), "problem")


def test_a_number_that_is_none_is_seen(tmp_path):
    path = write_minicpm(tmp_path / "m.gguf", width=64, spoil={"blk.0.ffn_up.weight": np.nan})
    assert re.search(r"^blk.0.ffn_up.weight .* nan \(not finite\)$", inspect(path), re.MULTILINE)


@pytest.mark.parametrize(
    ("lost", "said"),
    [
        ((), []),
        (("logit_scale",), ["minicpm.logit_scale", "4 times too sharp"]),
        (("embedding_scale", "residual_scale"), ["minicpm.embedding_scale, minicpm.residual_scale"]),
    ],
)
def test_scale_keys_of_a_gguf_file(tmp_path, lost, said):
    """llama.cpp takes 256 / width for a missing logit_scale of width / 256: (512 / 256)^2 = 4 times too sharp."""
    text = inspect(write_minicpm(tmp_path / "m.gguf", width=512, lost=lost))
    notes = "\n".join(each for each in text.splitlines() if each.startswith("note"))
    assert all(fact in notes for fact in said) and bool(notes) == bool(said)
    assert "scale_emb 12, scale_depth 1.4, dim_model_base 256 (as released)" in line(text, "muP")


def test_what_was_filled_in_is_said_by_an_import_and_by_load(tmp_path, capsys):
    path = write_minicpm(tmp_path / "m.gguf", width=512, lost=("logit_scale",))
    assert main([str(path), str(tmp_path / "run"), "--to", "run"]) == 0
    assert "4 times too sharp" in capsys.readouterr().err
    with pytest.warns(UserWarning) as caught:
        model = cpmjax.load(path)
    assert any("4 times too sharp" in str(each.message) for each in caught)
    assert float(model.multipliers.logits) == 0.5


def test_a_file_without_scales_is_mended_by_converting_it_again(tmp_path):
    old, new = write_minicpm(tmp_path / "old.gguf", width=512, lost=("logit_scale",)), tmp_path / "new.gguf"
    assert main([str(old), str(new), "--to", "gguf"]) == 0
    assert "too sharp" not in inspect(new) and "minicpm.logit_scale = 2.0" in inspect(new)


def test_an_inverted_scale_is_seen(tmp_path):
    path = write_minicpm(tmp_path / "m.gguf", width=512, change={"minicpm.logit_scale": 0.5})
    text = inspect(path)
    assert "inverted" in text and "4 times too sharp" in text


def test_what_is_no_weights(tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text("# weights\n")
    with pytest.raises(UserError, match=r"README\.md: begins with"):
        main(["--inspect", str(readme)])
    assert main(["--inspect", str(GOLDEN / "minicpm-tiny-a")]) == 0
    assert "a Hugging Face folder" in capsys.readouterr().out
