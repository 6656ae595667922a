from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cpmjax.data import tokens
from cpmjax.data.corpora import held_out
from cpmjax.data.files import LocalFile
from cpmjax.data.tokenizer import Tokenizer, train
from cpmjax.data.tokens import build_or_open
from cpmjax.run.errors import Unreachable, UserError
from cpmjax.run.sources import TextFolder

# Builds a store in small chunks in a process of its own, which dies by SIGKILL at the given progress line.
BUILDER = """
import os, signal, sys
from pathlib import Path
from cpmjax.data import tokens
from cpmjax.data.tokenizer import Tokenizer
from cpmjax.run.sources import TextFolder

folder, cache, die_at = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
tokens._PART_CHARACTERS = 500
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


def documents_of(lines: list[str]) -> list[int]:
    """How many documents there are, by each progress line that says so."""
    return [int(found[1].replace(",", "")) for line in lines if (found := re.match(r"books: ([\d,]+) documents", line))]


def killed_at(folder: Path, cache: Path, line: int) -> tuple[Path, list[str]]:
    """What a build leaves that dies at this progress line, and its lines."""
    builder = start_builder(folder, cache, die_at=line)
    lines = builder.communicate(timeout=60)[0].splitlines()
    assert builder.returncode == -signal.SIGKILL
    assert not list(cache.glob("tokens/*/store.json"))
    (leftover,) = (cache / "tokens").glob("books-*")
    return leftover, lines


@pytest.fixture
def clean(folder, tmp_path) -> dict[str, bytes]:
    """The store of a build that nothing interrupts."""
    build(folder, tmp_path / "clean")
    return content(tmp_path / "clean")


@pytest.fixture
def encoded(monkeypatch) -> list[str]:
    """Every text that is encoded from now on, in small parts."""
    monkeypatch.setattr("cpmjax.data.tokens._PART_CHARACTERS", 500)
    texts: list[str] = []
    encode = Tokenizer.encode_documents
    monkeypatch.setattr(Tokenizer, "encode_documents", lambda self, new: (texts.extend(new), encode(self, new))[1])
    return texts


@pytest.mark.parametrize("cores", [1, 7])
def test_a_store_is_the_same_on_any_number_of_cores(folder, tmp_path, clean, encoded, monkeypatch, cores):
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    build(folder, tmp_path / "other")
    assert len(encoded) == 60
    assert content(tmp_path / "other") == clean


def test_a_build_that_is_killed_again_and_again_goes_on_where_it_was(folder, tmp_path, clean, encoded):
    cache = tmp_path / "killed"
    there = 0
    for at in (1, 4, 6):  # the first line of a build that goes on says that it does
        leftover, lines = killed_at(folder, cache, at)
        assert leftover.suffix == ".building"
        if there:
            assert lines[0] == f"books: a build was interrupted; goes on from document {there + 1}"
        counts = documents_of(lines)
        assert counts[0] > there
        there = counts[-1]
    lines: list[str] = []
    build(folder, cache, progress=lines.append)
    assert lines[0] == f"books: a build was interrupted; goes on from document {there + 1}"
    texts = [file.read_text() for file in sorted((folder / "texts").iterdir())]
    assert sorted(encoded) == sorted(texts[there:]) and 0 < len(encoded) < 40
    assert content(cache) == clean
    assert not leftover.exists()


@pytest.mark.parametrize("file", ["parts.jsonl", "train.ends", "store/train.tokens", "store/held_out.tokens"])
@pytest.mark.parametrize("damage", ["a bit", "cut short", "longer", "missing"])
def test_parts_that_are_damaged_are_made_again(folder, tmp_path, clean, encoded, file, damage):
    leftover, lines = killed_at(folder, tmp_path / "killed", 8)
    whole = (leftover / file).read_bytes()
    where = len(whole) // 2
    match damage:
        case "a bit":
            (leftover / file).write_bytes(whole[:where] + bytes([whole[where] ^ 1]) + whole[where + 1 :])
        case "cut short":
            (leftover / file).write_bytes(whole[:where])
        case "longer":  # what a kill leaves between the data of a part and its line
            (leftover / file).write_bytes(whole + b"7" * 11)
        case "missing":
            (leftover / file).unlink()
    build(folder, tmp_path / "killed")
    assert content(tmp_path / "killed") == clean
    kept, there = 60 - len(encoded), documents_of(lines)[-1]
    assert kept == there if damage == "longer" else kept < there
    assert kept > 0 or damage == "missing"


def test_parts_of_another_tokenizer_or_text_are_never_used(lively, tmp_path, encoded):
    leftover, _ = killed_at(lively, tmp_path / "killed", 8)
    build(lively, tmp_path / "killed", text_start="prefix_space")
    assert len(encoded) == 60
    first = lively / "texts" / "00.txt"
    before = first.read_text()
    first.write_text("another " + before)
    del encoded[:]
    store = build(lively, tmp_path / "killed")
    assert len(encoded) == 60 and store.key != leftover.stem
    # A build of something else has no say in what the first one can go on with.
    first.write_text(before)
    del encoded[:]
    assert build(lively, tmp_path / "killed").key == leftover.stem
    assert 0 < len(encoded) < 60


def test_parts_of_text_that_was_another_one_while_they_were_made_are_not_used(lively, tmp_path, clean, encoded):
    """The key was that of the old text when the build began, and it is again when the next one does."""
    changed = lively / "texts" / "30.txt"
    before = changed.read_text()

    def stop(line: str) -> None:
        if len(documents_of([line])) and documents_of([line])[0] < 10:
            changed.write_text("alpha " + before)
        elif documents_of([line])[0] > 40:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(lively, tmp_path / "killed", progress=stop)
    (leftover,) = (tmp_path / "killed" / "tokens").glob("books-*")
    assert "alpha " + before in encoded
    changed.write_text(before)
    del encoded[:]
    lines: list[str] = []
    build(lively, tmp_path / "killed", progress=lines.append)
    assert "goes on from document 4" in lines[0]
    assert before in encoded and 10 < len(encoded) < 40
    (store,) = (tmp_path / "killed" / "tokens").glob("books-*")
    assert store.name == leftover.stem
    assert [data for name, data in content(tmp_path / "killed").items() if "json" not in name] == [
        data for name, data in clean.items() if "json" not in name
    ]


def test_a_build_goes_on_once_its_store_answers_again(folder, tmp_path, clean, encoded, monkeypatch):
    opened = LocalFile.open
    with monkeypatch.context() as patched:

        def open_some(file: LocalFile):
            if file.name == "40.txt" and encoded:
                raise Unreachable("no answer")
            return opened(file)

        patched.setattr(LocalFile, "open", open_some)
        with pytest.raises(Unreachable):
            build(folder, tmp_path / "killed")
    del encoded[:]
    build(folder, tmp_path / "killed")
    assert 0 < len(encoded) < 60
    assert content(tmp_path / "killed") == clean


def test_what_nobody_goes_on_with_is_removed_a_week_later(folder, tmp_path):
    leftover, _ = killed_at(folder, tmp_path, 3)
    build(folder, tmp_path, share=0.3)
    assert leftover.exists()
    for path in (leftover, *leftover.iterdir()):
        os.utime(path, (0, 0))
    build(folder, tmp_path, share=0.4)
    assert not leftover.exists()


def test_a_kill_right_after_the_renaming_leaves_nothing_for_long(folder, tmp_path, encoded):
    leftover, _ = killed_at(folder, tmp_path, 8)
    shutil.copytree(leftover, tmp_path / "copy")
    build(folder, tmp_path)
    shutil.copytree(tmp_path / "copy", leftover)
    del encoded[:]
    build(folder, tmp_path)
    assert not encoded and not leftover.exists()


def test_builders_that_die_beside_others_leave_them_what_they_made(folder, tmp_path, clean):
    dying = [start_builder(folder, tmp_path / "shared", die_at=4) for _ in range(2)]
    for builder in dying:
        builder.communicate(timeout=60)
    living = [start_builder(folder, tmp_path / "shared") for _ in range(2)]
    lines = [builder.communicate(timeout=60)[0].splitlines() for builder in living]
    assert [builder.returncode for builder in dying + living] == [-signal.SIGKILL] * 2 + [0] * 2
    (said,) = [line for output in lines for line in output if "goes on" in line]
    assert int(said.rpartition(" ")[2]) >= 15  # of one builder at least
    assert content(tmp_path / "shared") == clean


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
    monkeypatch.setattr("cpmjax.data.tokens._PART_CHARACTERS", 500)
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
