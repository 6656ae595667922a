from __future__ import annotations

import gzip
import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpmjax.data.corpora import content_key, documents, held_out
from cpmjax.run.errors import UserError
from cpmjax.run.sources import Jsonl, LanguageReference, StandardLibrary, TextFolder


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def refusal(corpus) -> str:
    with pytest.raises(UserError) as error:
        list(documents(corpus))
    message = str(error.value)
    assert "\n" not in message
    assert "expected" in message
    return message


def test_the_standard_library_is_source_without_tests_and_tables():
    found = {document.name: document.text for document in documents(StandardLibrary())}
    assert list(found) == sorted(found)
    assert "class BaseEventLoop" in found["asyncio/base_events.py"]
    assert 5e6 < sum(map(len, found.values())) < 3e7
    for name, text in found.items():
        assert name.endswith(".py") and text.strip() and "\r" not in text
        assert not {"test", "tests", "idle_test", "site-packages", "encodings"} & set(name.split("/"))
    assert "pydoc_data/topics.py" not in found


def test_source_is_decoded_as_it_declares(tmp_path, monkeypatch):
    write(tmp_path / "latin.py", "# coding: latin-1\r\nname = 'é'\r\n".encode("latin-1"))
    write(tmp_path / "package" / "__init__.py", "")
    write(tmp_path / "test" / "left_out.py", "x")
    write(tmp_path / "package" / "notes.txt", "x")
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    (document,) = documents(StandardLibrary())
    assert (document.name, document.text) == ("latin.py", "# coding: latin-1\nname = 'é'\n")
    write(tmp_path / "broken.py", "# coding: no-such-codec\n")
    assert "broken.py" in refusal(StandardLibrary())


def test_each_topic_of_the_language_reference_is_a_document():
    found = {document.name: document.text for document in documents(LanguageReference())}
    assert found["topics/assert"].startswith('The "assert" statement')
    assert len(found) > 50


def test_text_files_are_read_in_the_order_of_their_names(tmp_path):
    write(tmp_path / "b.txt", "second\r\n")
    write(tmp_path / "a" / "z.txt", "\ufefffirst")
    write(tmp_path / "c.md", "third")
    found = [(document.name, document.text) for document in documents(TextFolder(str(tmp_path)))]
    assert found == [("a/z.txt", "first"), ("b.txt", "second\r\n")]
    for glob in ("*.md", "**/*.md"):
        assert [document.name for document in documents(TextFolder(str(tmp_path), glob))] == ["c.md"]
    assert [document.name for document in documents(TextFolder(str(tmp_path / "c.md")))] == ["c.md"]


def test_jsonl_is_read_plain_and_compressed(tmp_path):
    lines = "".join(json.dumps({"text": text, "n": 1}) + "\n" for text in ("one", "zwei — 2", "三"))
    write(tmp_path / "a.jsonl", lines)
    write(tmp_path / "sub" / "b.jsonl.gz", gzip.compress(lines.encode()))
    found = [(document.name, document.text) for document in documents(Jsonl(str(tmp_path)))]
    texts = ("one", "zwei — 2", "三")
    assert found == [(f"{file}:{n}", text) for file in ("a.jsonl", "sub/b.jsonl.gz") for n, text in enumerate(texts, 1)]


BAD_LINES = [
    (b'{"text": "ok"\n', "malformed JSON", "not JSON"),
    (b"\n", "malformed JSON", "not JSON"),
    (b"[" * 100_000 + b"\n", "malformed JSON", "not JSON"),
    (b'["text"]\n', "not an object", "a JSON list"),
    (b'{"texts": "x", "id": 3}\n', "missing field", "nearest key is 'texts'"),
    (b"{}\n", "missing field", "no key at all"),
    (b'{"text": 3}\n', "field not a string", "is a int"),
    (b'{"text": "  "}\n', "empty", "empty"),
    (b'{"text": "\xff"}\n', "not UTF-8", "byte 32: 0xff"),
    (b'{"text": "a\\ud800"}\n', "not Unicode", "lone surrogate at character 1"),
]


@pytest.mark.parametrize(("line", "reason", "message"), BAD_LINES)
def test_a_bad_line_is_refused_or_counted(tmp_path, line, reason, message):
    good = b'{"text": "good one."}\n'
    file = write(tmp_path / "x.jsonl", good + line + good)
    refused = refusal(Jsonl(str(file)))
    assert f"{file}, line 2" in refused and message in refused
    skipped: Counter[str] = Counter()
    names = [document.name for document in documents(Jsonl(str(file)), "skip", skipped)]
    assert names == ["x.jsonl:1", "x.jsonl:3"]
    assert skipped == {reason: 1}


def test_a_truncated_gzip_is_refused_or_read_up_to_the_cut(tmp_path):
    # Hexadecimal digits of a counter's hash do not compress away, so the cut falls among the lines.
    lines = [json.dumps({"text": f"{n} {hash((n, n)):x}"}).encode() + b"\n" for n in range(20_000)]
    whole = gzip.compress(b"".join(lines))
    file = write(tmp_path / "x.jsonl.gz", whole[: len(whole) // 2])
    assert "gzip data stops" in refusal(Jsonl(str(file)))
    skipped: Counter[str] = Counter()
    texts = [document.text for document in documents(Jsonl(str(file)), "skip", skipped)]
    assert skipped == {"truncated gzip": 1}
    assert 0 < len(texts) < len(lines)
    assert texts == [json.loads(line)["text"] for line in lines[: len(texts)]]
    write(file, b"this is no gzip at all")
    assert f"{file}, line 1" in refusal(Jsonl(str(file)))


@pytest.mark.parametrize(
    ("reason", "content", "message"),
    [("empty", b" \n", ": empty"), ("not UTF-8", b"caf\xe9", ", byte 3: 0xe9"), ("unreadable", None, ": No such file")],
)
def test_a_bad_text_file_is_refused_or_counted(tmp_path, reason, content, message):
    write(tmp_path / "good.txt", "good")
    file = tmp_path / "bad.txt"
    if content is None:
        file.symlink_to(tmp_path / "nowhere")
    else:
        write(file, content)
    assert f"{file}{message}" in refusal(TextFolder(str(tmp_path)))
    skipped: Counter[str] = Counter()
    assert [document.name for document in documents(TextFolder(str(tmp_path)), "skip", skipped)] == ["good.txt"]
    assert skipped == {reason: 1}


def test_nothing_to_read_is_refused_even_when_skipping(tmp_path):
    empty = write(tmp_path / "x" / "empty.txt", "").parent
    for corpus in (TextFolder(str(tmp_path / "none")), TextFolder(str(empty), "*.md"), TextFolder(str(empty))):
        with pytest.raises(UserError, match=str(tmp_path)):
            list(documents(corpus, "skip"))


def test_the_key_changes_with_every_document_name_and_setting(tmp_path):
    def key(files, **settings):
        folder = tmp_path / "corpus"
        for file in folder.glob("*"):
            file.unlink()
        for name, text in files.items():
            write(folder / name, text)
        return content_key(TextFolder(str(folder), **settings), "skip")

    base = {"a.txt": "one", "b.txt": "two"}
    assert key(base) == key(dict(reversed(base.items())))
    changed = [
        key(base),
        key({"a.txt": "one", "b.txt": "twO"}),
        key({"a.txt": "one", "c.txt": "two"}),
        key({"a.txt": "onetwo", "b.txt": " "}),
        key({"a.txt": "two", "b.txt": "one"}),
        key(base | {"c.txt": ""}),
        key(base, glob="?.txt"),
    ]
    assert len(set(changed)) == len(changed)


@settings(deadline=None)
@given(st.text(), st.floats(0, 1), st.floats(0, 1))
def test_more_held_out_keeps_what_was_held_out(name, one, other):
    low, high = sorted((one, other))
    assert held_out(name, low) <= held_out(name, high)
    assert not held_out(name, 0)
    assert held_out(name, 1)


def test_the_held_out_share_is_kept():
    share, names = 0.1, [f"document {n}" for n in range(20_000)]
    count = sum(held_out(name, share) for name in names)
    # Five standard deviations of a binomial.
    assert abs(count - share * len(names)) < 5 * (len(names) * share * (1 - share)) ** 0.5
