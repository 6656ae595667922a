"""The same texts in every format, written by the formats' own libraries, are the same documents; damage has a name."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from array_record.python.array_record_module import ArrayRecordWriter

from cpmjax.data.corpora import documents
from cpmjax.data.tokenizer import Tokenizer, train
from cpmjax.data.tokens import build_or_open
from cpmjax.run.errors import UserError
from cpmjax.run.sources import ArrayRecords, CorpusConfig, Jsonl, Parquet, TextFolder

# Digits of a hash do not compress away, so that a file cut in half ends among the documents.
TEXTS = [f"{n}: " + "zwei — 2, 三\n" * (n % 4) + f"{abs(hash((n, n))):x}" for n in range(3000)]


def lines(texts: list[str] = TEXTS) -> bytes:
    return "".join(json.dumps({"id": n, "text": text}) + "\n" for n, text in enumerate(texts)).encode()


def write_text(folder: Path) -> CorpusConfig:
    for n, text in enumerate(TEXTS):
        (folder / f"{n:05}.txt").write_bytes(text.encode())
    return TextFolder(str(folder))


def write_jsonl(folder: Path) -> CorpusConfig:
    (folder / "x.jsonl").write_bytes(lines())
    return Jsonl(str(folder))


def write_gzip(folder: Path) -> CorpusConfig:
    (folder / "x.jsonl.gz").write_bytes(gzip.compress(lines()))
    return Jsonl(str(folder))


def write_zstandard(folder: Path) -> CorpusConfig:
    """Several frames, the cut between two of them within a line, and one that holds no data."""
    raw = lines()
    parts = [zstandard.compress(raw[start : start + 100_001]) for start in range(0, len(raw), 100_001)]
    skippable = b"\x50\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"12345"
    (folder / "x.jsonl.zst").write_bytes(skippable.join(parts) + zstandard.compress(b""))
    return Jsonl(str(folder))


def write_parquet(folder: Path, kind: pa.DataType = pa.string()) -> CorpusConfig:
    column = pa.array([text.encode() for text in TEXTS]) if "binary" in str(kind) else pa.array(TEXTS)
    table = pa.table({"id": list(range(len(TEXTS))), "text": column.cast(kind)})
    pq.write_table(table, folder / "x.parquet", row_group_size=700)
    return Parquet(str(folder))


def write_array_records(folder: Path) -> CorpusConfig:
    writer = ArrayRecordWriter(str(folder / "x-train.array_record-00000-of-00001"), "group_size:7")
    for text in TEXTS:
        writer.write(text.encode())
    writer.close()
    return ArrayRecords(str(folder))


def write_array_records_of_json(folder: Path) -> CorpusConfig:
    writer = ArrayRecordWriter(str(folder / "x.array_record"), "group_size:1")
    for line in lines().splitlines():
        writer.write(line)
    writer.close()
    return ArrayRecords(str(folder), "text")


FORMATS = {
    write: write.__name__.removeprefix("write_")
    for write in (
        write_text,
        write_jsonl,
        write_gzip,
        write_zstandard,
        write_parquet,
        write_array_records,
        write_array_records_of_json,
    )
}


def store(corpus: CorpusConfig, tokenizer: Tokenizer, cache: Path) -> dict[str, bytes]:
    build_or_open("it", corpus, tokenizer, held_out=0.0, on_bad="refuse", cache=cache, progress=lambda _: None)
    return {file.name: file.read_bytes() for file in cache.glob("tokens/*/*") if file.name != "store.json"}


def refusal(corpus: CorpusConfig) -> str:
    with pytest.raises(UserError) as error:
        list(documents(corpus))
    message = str(error.value)
    assert "\n" not in message and "expected" in message
    return message


def read_skipping(corpus: CorpusConfig) -> tuple[list[str], dict[str, int]]:
    skipped: Counter[str] = Counter()
    return [document.text for document in documents(corpus, "skip", skipped)], skipped


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(train(TEXTS[:100], 290, 10**6))


@pytest.fixture(scope="module")
def tokens(tokenizer, tmp_path_factory) -> dict[str, bytes]:
    """The store of the plain text files."""
    folder = tmp_path_factory.mktemp("plain")
    (folder / "texts").mkdir()
    return store(write_text(folder / "texts"), tokenizer, folder / "cache")


@pytest.mark.parametrize("write", FORMATS, ids=FORMATS.values())
def test_every_format_gives_the_same_documents_and_the_same_store(write, tokenizer, tokens, tmp_path):
    (tmp_path / "corpus").mkdir()
    corpus = write(tmp_path / "corpus")
    found = list(documents(corpus))
    assert [document.text for document in found] == TEXTS
    if write is not write_text:
        (file,) = (tmp_path / "corpus").iterdir()
        assert [document.name for document in found] == [f"{file.name}:{n}" for n in range(1, len(TEXTS) + 1)]
    assert store(corpus, tokenizer, tmp_path / "cache") == tokens


@pytest.mark.parametrize(
    "kind", [pa.large_string(), pa.string_view(), pa.binary(), pa.dictionary(pa.int32(), pa.string())], ids=str
)
def test_parquet_has_several_kinds_of_strings(tmp_path, kind):
    assert [document.text for document in documents(write_parquet(tmp_path, kind))] == TEXTS


@pytest.mark.parametrize("write", [write_gzip, write_zstandard])
def test_a_file_that_is_cut_short_is_refused_or_read_up_to_the_cut(tmp_path, write):
    corpus = write(tmp_path)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    kind = write.__name__.removeprefix("write_")
    for size in (len(whole) - 1, len(whole) // 2, 3):
        file.write_bytes(whole[:size])
        texts, skipped = [], {f"truncated {kind}": 1}
        if size > 3:
            texts, skipped = read_skipping(corpus)
        assert skipped == {f"truncated {kind}": 1}
        assert texts == TEXTS[: len(texts)] and (size == 3 or len(texts) > 500)
        message = refusal(corpus)
        assert message.startswith(f"{file}, line {len(texts) + 1}: the {kind} data stops")
    file.write_bytes(b"this was never packed")
    assert refusal(corpus).startswith(f"{file}, line 1: ")


def test_a_parquet_file_that_is_no_whole_one(tmp_path):
    corpus = write_parquet(tmp_path)
    file = tmp_path / "x.parquet"
    whole = file.read_bytes()
    for content in (whole[:-7], whole[: len(whole) // 2], b"PAR1", b"", b"text\n"):
        file.write_bytes(content)
        assert refusal(corpus).startswith(f"{file}: ")
    # Damage within: the rows before it are there, and what comes after is not taken for text.
    damaged = bytearray(whole)
    position = pq.ParquetFile(pa.BufferReader(whole)).metadata.row_group(2).column(1).data_page_offset
    damaged[position : position + 400] = bytes(400)
    file.write_bytes(damaged)
    texts, skipped = read_skipping(corpus)
    assert (texts, skipped) == (TEXTS[:1400], {"damaged parquet": 1})
    assert refusal(corpus).startswith(f"{file}, row 1401: ")


def test_columns_and_rows_without_text(tmp_path):
    file = tmp_path / "x.parquet"
    pq.write_table(pa.table({"content": ["a"], "n": [1]}), file)
    assert refusal(Parquet(str(file))).startswith(f"{file}: no 'text', the nearest key is 'content'")
    assert refusal(Parquet(str(file), "n")).startswith(f"{file}: its 'n' is a column of int64")
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), file)
    assert refusal(Parquet(str(file))).startswith(f"{file}: empty")
    pq.write_table(pa.table({"text": pa.array([b"good", None, b"\xff", b" "], pa.binary())}), file)
    assert refusal(Parquet(str(file))).startswith(f"{file}, row 2: its 'text' is null")
    assert read_skipping(Parquet(str(file))) == (["good"], {"field not a string": 1, "not UTF-8": 1, "empty": 1})


def test_an_array_record_that_is_damaged(tmp_path):
    corpus = write_array_records_of_json(tmp_path)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:65536], b"", b"text\n"):
        file.write_bytes(content)
        assert refusal(corpus).startswith(f"{file}: ")
    damaged = bytearray(whole)
    damaged[len(whole) // 2 : len(whole) // 2 + 100] = bytes(100)
    file.write_bytes(damaged)
    texts, skipped = read_skipping(corpus)
    assert texts == TEXTS[: len(texts)] and 0 < len(texts) < len(TEXTS) and skipped == {"damaged array record": 1}
    assert refusal(corpus).startswith(f"{file}, after record {len(texts)}: ")
    file.write_bytes(whole)
    assert "record 1: no 'txt', the nearest key is 'text'" in refusal(ArrayRecords(str(file), "txt"))


@pytest.mark.parametrize(("package", "write"), [("pyarrow", write_parquet), ("zstandard", write_zstandard)])
def test_a_package_that_is_not_installed_is_named(tmp_path, monkeypatch, package, write):
    corpus = write(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, package, None)
    assert f"expected {package} installed (pip install 'cpmjax[corpora]')" in refusal(corpus)
