from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cpmjax.data import tokens
from cpmjax.data.corpora import held_out
from cpmjax.data.tokenizer import Tokenizer, train
from cpmjax.data.tokens import build_or_open
from cpmjax.run.errors import UserError
from cpmjax.run.sources import TextFolder

# Builds a store in small chunks in a process of its own, which dies by SIGKILL at the given progress line.
BUILDER = """
import os, signal, sys
from pathlib import Path
from cpmjax.data import tokens
from cpmjax.data.tokenizer import Tokenizer
from cpmjax.run.sources import TextFolder

folder, cache, die_at = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
tokens._CHUNK_CHARACTERS = 500
lines = []

def progress(line):
    lines.append(line)
    print(line, flush=True)
    if len(lines) == die_at:
        os.kill(os.getpid(), signal.SIGKILL)

tokens.build_or_open("books", TextFolder(str(folder / "texts")), Tokenizer.load(folder), held_out=0.2,
                     on_bad="refuse", cache=cache, progress=progress)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "texts").mkdir()
    rng = np.random.default_rng(0)
    for n in range(60):
        words = rng.choice(["alpha", "beta", "gamma", "delta", "12", "\n", "é"], 40)
        (folder / "texts" / f"{n:02}.txt").write_text(f"{n} " + " ".join(words))
    texts = [file.read_text() for file in (folder / "texts").iterdir()]
    Tokenizer(train(texts, 290, 10**6)).save(folder)
    return folder


def build(folder, cache, *, scheme="", share=0.2, on_bad="refuse", text_start="plain", progress=lambda line: None):
    tokenizer = Tokenizer(Tokenizer.load(folder).model, text_start)
    corpus = TextFolder(f"{scheme}{folder / 'texts'}")
    return build_or_open("books", corpus, tokenizer, held_out=share, on_bad=on_bad, cache=cache, progress=progress)


def content(cache: Path) -> dict[str, bytes]:
    return {str(file.relative_to(cache)): file.read_bytes() for file in sorted(cache.glob("tokens/*/*"))}


def start_builder(folder, cache, die_at=0) -> subprocess.Popen:
    command = [sys.executable, "-c", BUILDER, str(folder), str(cache), str(die_at)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def test_a_store_holds_every_document_in_its_split(folder, tmp_path):
    store, tokenizer = build(folder, tmp_path), Tokenizer.load(folder)
    files = sorted((folder / "texts").iterdir())
    for split, kept in ((store.train, False), (store.held_out, True)):
        texts = [file.read_text() for file in files if held_out(file.name, 0.2) is kept]
        assert len(texts) > 3
        assert split.tokens.dtype == np.uint16
        bounds = zip(split.offsets[:-1], split.offsets[1:], strict=True)
        rows = [split.tokens[start:stop].tolist() for start, stop in bounds]
        assert rows == [[1, *tokenizer.encode(text), 2] for text in texts]
        counts = {"documents": len(texts), "tokens": sum(map(len, rows)), "bytes": sum(len(t.encode()) for t in texts)}
        assert store.summary["held_out" if kept else "train"] == counts
    assert store.summary["skipped"] == {}


def test_a_large_vocabulary_takes_four_bytes_a_token(folder, tmp_path, monkeypatch):
    small = np.array(build(folder, tmp_path / "small").train.tokens)
    monkeypatch.setattr("cpmjax.data.tokens._dtype", lambda vocabulary: "<u4")
    large = build(folder, tmp_path / "large").train.tokens
    assert large.dtype == np.uint32
    assert np.array_equal(large, small)


def test_a_store_is_built_once_for_the_same_content_and_settings(folder, tmp_path):
    lines: list[str] = []
    build(folder, tmp_path, progress=lines.append)
    assert lines and all("books" in line for line in lines)
    before = len(lines)
    build(folder, tmp_path, progress=lines.append)
    assert len(lines) == before
    build(folder, tmp_path, share=0.3, progress=lines.append)
    build(folder, tmp_path, text_start="prefix_space", progress=lines.append)
    assert len(lines) == 3 * before
    assert len(list((tmp_path / "tokens").glob("books-" + "[0-9a-f]" * 16))) == 3


@pytest.mark.parametrize("damage", ["shorter", "longer", "missing", "offsets", "summary"])
def test_a_damaged_store_is_built_again(folder, tmp_path, damage):
    build(folder, tmp_path)
    whole = content(tmp_path)
    (store,) = (tmp_path / "tokens").glob("books-*")
    tokens, offsets, summary = store / "train.tokens", store / "train.offsets.npy", store / "store.json"
    match damage:
        case "shorter":
            tokens.write_bytes(tokens.read_bytes()[:-2])
        case "longer":
            tokens.write_bytes(tokens.read_bytes() + b"\0\0")
        case "missing":
            tokens.unlink()
        case "offsets":
            offsets.write_bytes(offsets.read_bytes()[:-8])
        case "summary":
            summary.write_bytes(summary.read_bytes()[:-20])
    build(folder, tmp_path)
    assert content(tmp_path) == whole


def test_a_build_that_was_killed_leaves_nothing_and_repeats_byte_for_byte(folder, tmp_path):
    build(folder, tmp_path / "clean")
    killed = start_builder(folder, tmp_path / "killed", die_at=5)
    killed.communicate(timeout=60)
    assert killed.returncode == -signal.SIGKILL
    (leftover,) = (tmp_path / "killed" / "tokens").glob("books-*")
    assert leftover.suffix == ".building"
    build(folder, tmp_path / "killed")
    assert content(tmp_path / "killed") == content(tmp_path / "clean")
    assert not leftover.exists()


def test_processes_that_build_at_the_same_time_share_one_store(folder, tmp_path):
    build(folder, tmp_path / "clean")
    builders = [start_builder(folder, tmp_path / "shared") for _ in range(3)]
    lines = [builder.communicate(timeout=60)[0].splitlines() for builder in builders]
    assert [builder.returncode for builder in builders] == [0, 0, 0]
    assert sum(any("tokens" in line for line in output) for output in lines) == 1
    assert content(tmp_path / "shared") == content(tmp_path / "clean")


def test_skipped_documents_are_counted_in_the_store(folder, tmp_path):
    texts = folder.parent / "with_bad" / "texts"
    texts.mkdir(parents=True)
    Tokenizer.load(folder).save(texts.parent)
    (texts / "good.txt").write_text("alpha beta")
    (texts / "bad.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"bad\.txt"):
        build(texts.parent, tmp_path)
    assert content(tmp_path) == {}
    assert build(texts.parent, tmp_path, on_bad="skip").summary["skipped"] == {"not UTF-8": 1}
    assert len(build(texts.parent, tmp_path, on_bad="skip", share=0.0).held_out.tokens) == 0


@pytest.fixture
def lively(folder, tmp_path) -> Path:
    """A corpus of its own, which a test changes."""
    shutil.copytree(folder, tmp_path / "lively")
    return tmp_path / "lively"


def test_a_store_is_the_same_wherever_the_files_lie(folder, tmp_path):
    build(folder, tmp_path / "local")
    build(folder, tmp_path / "stored", scheme="file://")
    local, stored = (sorted(content(tmp_path / kind).items()) for kind in ("local", "stored"))
    for (one, here), (other, there) in zip(local, stored, strict=True):
        assert Path(one).name == Path(other).name
        assert here == there or (Path(one).name == "store.json" and here == there.replace(b"file://", b""))


@pytest.mark.parametrize("scheme", ["", "file://"])
@pytest.mark.parametrize("moment", ["before the first chunk", "after it"])
def test_no_store_comes_of_a_corpus_that_changes_while_it_is_built(lively, tmp_path, monkeypatch, moment, scheme):
    monkeypatch.setattr("cpmjax.data.tokens._CHUNK_CHARACTERS", 500)
    before = build(lively, tmp_path / "cache", scheme=scheme, share=0.5)
    kept = content(tmp_path / "cache")

    def change(_: object = None) -> None:
        (lively / "texts" / "59.txt").write_text("alpha alpha")

    if moment == "after it":
        progress = change
    else:
        keyed = tokens.content_key
        progress = print
        monkeypatch.setattr(tokens, "content_key", lambda *corpus: (keyed(*corpus), change())[0])
    with pytest.raises(UserError, match=r"^corpus books: changed while it was read; expected files that nobody"):
        build(lively, tmp_path / "cache", scheme=scheme, progress=progress)
    assert content(tmp_path / "cache") == kept
    assert [path.name for path in (tmp_path / "cache" / "tokens").glob("books-*")] == [before.key]
    monkeypatch.undo()
    assert build(lively, tmp_path / "cache", scheme=scheme).held_out.tokens.size


def test_a_full_disk_is_one_line_and_leaves_nothing(folder, tmp_path, monkeypatch):
    build(folder, tmp_path, share=0.5)
    before = content(tmp_path)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="No space left") as error:
        build(folder, tmp_path)
    assert "\n" not in str(error.value)
    assert content(tmp_path) == before
    assert json.loads(next(iter(tmp_path.glob("tokens/*/store.json"))).read_text())
