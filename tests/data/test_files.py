"""Corpora on stores that fsspec reads: the same documents under the same names, and one line for a store that fails."""

from __future__ import annotations

import dataclasses
import gzip
import io
import itertools
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import jobs
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from cpmjax.data.corpora import content_key, documents
from cpmjax.data.text import make_tokenizer, open_stores
from cpmjax.run.config import Config, DataConfig, ModelConfig, RunConfig
from cpmjax.run.errors import Unreachable, UserError
from cpmjax.run.sources import ArrayRecords, CorpusConfig, Jsonl, Parquet, TextFolder

TEXTS = [f"document {n} — 三" for n in range(50)]


def jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def parquet(texts: list[str]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({"text": texts}), file, row_group_size=7)
    return file.getvalue()


CONTENT = {
    "b.txt": b"second",
    "a/z.txt": b"first",
    "a-b/c.txt": b"before a folder, as - sorts before /",
    "x.jsonl": jsonl(TEXTS),
    "sub/y.jsonl.gz": gzip.compress(jsonl(TEXTS)),
    "x.parquet": parquet(TEXTS),
    "notes.md": b"not asked for",
}
KINDS = (TextFolder, Jsonl, Parquet)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in CONTENT.items():
        file = tmp_path / "corpus" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return tmp_path / "corpus"


@pytest.fixture
def memory() -> Iterator[str]:
    store = fsspec.filesystem("memory")
    for name, content in CONTENT.items():
        store.pipe(f"/corpus/{name}", content)
    yield "memory://corpus"
    store.rm("/", recursive=True)


@contextmanager
def serving(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """The folder by HTTP: (its address, the methods of the requests so far)."""
    requests: list[str] = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            requests.append(self.command)

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder))) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}", requests
        http.shutdown()


@pytest.fixture
def server(folder: Path) -> Iterator[tuple[str, list[str]]]:
    with serving(folder) as served:
        yield served


def refusal(corpus: CorpusConfig) -> str:
    """The message of what no `bad_documents: skip` lets pass."""
    with pytest.raises(UserError) as error:
        list(documents(corpus, "skip"))
    message = str(error.value)
    assert "\n" not in message and "expected" in message
    return message


@pytest.mark.parametrize("kind", KINDS)
def test_documents_are_the_same_wherever_they_lie(folder, memory, server, kind):
    local = list(documents(kind(str(folder))))
    assert len(local) == {TextFolder: 3, Jsonl: 100, Parquet: 50}[kind]
    assert list(documents(kind(memory))) == local
    assert list(documents(kind(f"{memory}/"))) == local
    assert list(documents(kind(f"file://{folder}"))) == local
    for name in ("b.txt",) if kind is TextFolder else ("x.jsonl",) if kind is Jsonl else ("x.parquet",):
        one = list(documents(kind(str(folder / name))))
        for url in (memory, f"file://{folder}", server[0]):
            assert list(documents(kind(f"{url}/{name}"))) == one


def test_a_query_is_no_part_of_the_name(folder, server):
    local = list(documents(Jsonl(str(folder / "sub" / "y.jsonl.gz"))))
    assert len(local) == 50
    assert list(documents(Jsonl(f"{server[0]}/sub/y.jsonl.gz?download=true&signature=a/b.txt"))) == local


def test_the_key_of_stored_files_changes_with_their_version_and_reads_no_text(folder, server):
    address, requests = server
    corpus = Jsonl(f"{address}/x.jsonl")
    key = content_key(corpus)
    assert content_key(corpus) == key
    assert "HEAD" in requests and "GET" not in requests
    assert content_key(corpus, "skip") != key

    corpus = TextFolder(f"file://{folder}")
    keys = [content_key(corpus)]
    (folder / "b.txt").write_bytes(b"secon2")
    keys.append(content_key(corpus))
    (folder / "b.txt").rename(folder / "c.txt")
    keys.append(content_key(corpus))
    assert len({*keys, content_key(TextFolder(f"file://{folder}", "?.txt"))}) == 4


def test_the_key_of_a_store_without_versions_is_that_of_the_text(memory):
    corpus = TextFolder(memory)
    key = content_key(corpus)
    store = fsspec.filesystem("memory")
    store.pipe("/corpus/b.txt", b"secon2")  # of the same size
    assert content_key(corpus) != key
    store.pipe("/corpus/b.txt", b"second")
    assert content_key(corpus) == key


def test_a_run_goes_on_without_its_store_and_a_new_one_does_not_begin(tmp_path):
    texts = [file.read_text() for file in sorted(jobs.write_corpus(tmp_path / "words", 1).iterdir())]
    (tmp_path / "words" / "x.jsonl").write_bytes(jsonl(texts))
    config = dataclasses.replace(
        Config(), run=RunConfig(cache=str(tmp_path / "cache")), model=ModelConfig(vocabulary=320)
    )
    said: list[str] = []
    with serving(tmp_path / "words") as (address, _):
        corpora = {"texts": Jsonl(f"{address}/x.jsonl")}
        config = dataclasses.replace(config, data=DataConfig(corpora=corpora, stable={"texts": 1.0}))
        tokenizer = make_tokenizer(config, print)
        (store,) = open_stores(config, tokenizer, print).values()
    (again,) = open_stores(config, tokenizer, said.append, {"texts": store.key}).values()
    assert (again.key, again.summary) == (store.key, store.summary)
    (line,) = said
    assert line.startswith(f"corpus texts: {address}/x.jsonl: ")
    assert line.endswith("expected a store that answers; going on with the tokens that the run began with")

    def refused(begun: dict[str, str]) -> None:
        with pytest.raises(Unreachable, match=r"expected a store that answers$"):
            open_stores(config, tokenizer, print, begun)

    refused({})
    refused({"texts": "texts-0123456789abcdef"})
    (tmp_path / "cache" / "tokens" / store.key / "train.tokens").write_bytes(b"cut short")
    refused({"texts": store.key})


@pytest.mark.slow
def test_the_same_command_goes_on_without_its_store(tmp_path):
    texts = [file.read_text() for file in sorted(jobs.write_corpus(tmp_path / "words", 1).iterdir())]
    (tmp_path / "words" / "x.jsonl").write_bytes(jsonl(texts))
    with serving(tmp_path / "words") as (address, _):
        data = {"corpora": {"texts": {"type": "jsonl", "path": f"{address}/x.jsonl"}}}
        data |= {"stable": {"texts": 1.0}, "decay": {}}
        schedule = {"warmup": 1, "stable": 1, "decay": 1}
        experiment = jobs.experiment(tmp_path, "run", data=data, schedule=schedule)
        jobs.train(experiment)
    longer = (experiment, "--schedule.decay=2", "--run.accept_changes=[schedule,data]")
    refused = jobs.refusal(*longer[:2], f"--run.directory={tmp_path / 'new'}")
    assert refused.startswith(f"{address}/x.jsonl: ") and not (tmp_path / "new" / "config.yaml").exists()
    assert "; going on with the tokens that the run began with\n" in jobs.train(*longer)
    assert [record["step"] for record in jobs.records(tmp_path / "run")] == [1, 2, 3, 4]
    # Other documents are held out of other tokens.
    for _ in range(2):
        assert jobs.refusal(*longer, "--data.held_out=0.2").startswith(f"{address}/x.jsonl: ")


def test_stores_that_are_not_there(memory):
    assert refusal(Jsonl(f"{memory}/nowhere")).startswith(f"{memory}/nowhere: no such file or folder")
    assert refusal(TextFolder(memory, "*.rst")).startswith(f"{memory}: no file matches *.rst")
    assert refusal(Jsonl("nosuch://x")).startswith("nosuch://x: ")
    for kind in KINDS:
        with pytest.raises(Unreachable, match=r"^http://127\.0\.0\.1:1/x\.jsonl: .*expected a store that answers"):
            list(documents(kind("http://127.0.0.1:1/x.jsonl"), "skip"))
    assert refusal(ArrayRecords(memory)).startswith(f"{memory}: expected a path of this machine")


@pytest.mark.parametrize(("url", "package"), [("gs://bucket/x", "gcsfs"), ("s3://bucket/x", "s3fs")])
def test_the_package_of_a_store_is_named(monkeypatch, url, package):
    monkeypatch.setitem(__import__("sys").modules, package, None)
    message = refusal(Jsonl(url))
    assert message.startswith(f"{url}: ") and package in message


@pytest.mark.parametrize("kind", KINDS)
def test_a_store_that_fails_within_a_file_is_no_bad_document(memory, monkeypatch, kind):
    """Skipping the rest of what a network did not bring would make a corpus that nobody has named."""
    opened = MemoryFileSystem.open

    class Failing(io.BytesIO):
        left = 1

        def read(self, *size: int) -> bytes:
            self.left -= 1
            if self.left < 0:
                raise TimeoutError("no answer\nwithin a second")
            return super().read(*size)

    def fail(self, path, *arguments, **options):
        return Failing(opened(self, path, *arguments, **options).read())

    monkeypatch.setattr("cpmjax.data.files._BUFFER", 64)
    monkeypatch.setattr(MemoryFileSystem, "open", fail)
    assert "TimeoutError: no answer within a second; expected a store that answers" in refusal(kind(memory))


@pytest.mark.parametrize("packed", [False, True])
def test_a_file_that_changes_while_it_is_read(tmp_path, packed):
    texts = [f"{n} {'text ' * 100}" for n in range(2000)]
    raw = gzip.compress(jsonl(texts), 0) if packed else jsonl(texts)
    file = tmp_path / ("x.jsonl.gz" if packed else "x.jsonl")
    file.write_bytes(raw[: len(raw) // 2])  # the other half is yet to come
    for url in (str(file), f"file://{file}"):
        found = documents(Jsonl(url), "skip")
        assert len(list(itertools.islice(found, 10))) == 10
        with open(file, "ab") as stream:
            stream.write(raw[len(raw) // 2 : -100])
        with pytest.raises(UserError, match=f"^{url}: changed while it was read; expected"):
            list(found)
        file.write_bytes(raw[: len(raw) // 2])
    file.write_bytes(raw)
    assert [document.text for document in documents(Jsonl(str(file)))] == texts


def test_a_file_that_goes_away_while_it_is_read(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_bytes(jsonl(TEXTS))
    found = documents(Jsonl(str(tmp_path)), "skip")
    next(found)
    file.unlink()
    with pytest.raises(UserError, match="changed while it was read"):
        list(found)
