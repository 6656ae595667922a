from __future__ import annotations

import functools
import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from cpmjax.data.corpora import documents
from cpmjax.data.tokenizer import Tokenizer, train
from cpmjax.run.errors import UserError
from cpmjax.run.sources import Jsonl, LanguageReference

SHARED = Path(__file__).parents[2].parent / "shared"
REAL = {"minicpm-2b-122753": "minicpm-2b.model", "minicpm-1b-73440": "minicpm-1b.model"}


def texts() -> list[str]:
    return [document.text for document in documents(LanguageReference())]


@functools.cache
def trained(text_start="plain") -> Tokenizer:
    return Tokenizer(train(texts(), 1000, 400_000), text_start)


def one_line(function, *args) -> str:
    with pytest.raises(UserError) as error:
        function(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


@settings(deadline=None)
@given(st.text())
def test_any_text_comes_back(text):
    for tokenizer in (trained(), trained("prefix_space")):
        assert tokenizer.decode(tokenizer.encode(text)) == text.replace("\u2581", " ")


@pytest.mark.parametrize("text", ["", " ", "  a", "a\0b", "\r\n\t\n", "<s></s><unk><0x0A>", "山 é 🙂", "1234.5"])
def test_awkward_text_comes_back(text):
    for tokenizer in (trained(), trained("prefix_space")):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not {0, tokenizer.bos, tokenizer.eos} & set(ids)


@pytest.mark.parametrize("text", ["\ud800", "a\udc80b", "\ude00\ud83d"])
def test_half_of_a_surrogate_pair_is_no_text(text):
    assert one_line(trained().encode, text) == f"text = {text!r}; expected text, all of it Unicode"


@settings(deadline=None)
@given(st.text())
def test_byte_lengths_add_up_to_the_bytes_of_the_text(text):
    size = len(text.replace("\u2581", " ").encode())
    plain, prefixed = trained(), trained("prefix_space")
    assert plain.byte_lengths()[plain.encode(text)].sum() == size
    assert prefixed.byte_lengths()[prefixed.encode(text)].sum() == size + bool(text)


def test_the_pieces_are_laid_out_as_minicpms():
    model = sentencepiece.SentencePieceProcessor(model_proto=trained().model)
    assert [model.id_to_piece(token) for token in range(5)] == ["<unk>", "<s>", "</s>", "\n", "\t"]
    assert model.pad_id() == -1
    assert trained().vocabulary == model.vocab_size() == 1000
    assert (trained().bos, trained().eos) == (1, 2)
    assert sum(map(model.is_byte, range(1000))) == 256
    assert trained().byte_values == {
        token: int(model.id_to_piece(token)[3:-1], 16) for token in range(1000) if model.is_byte(token)
    }
    assert [trained().byte_values[token] for token in trained().encode("é")[-2:]] == [*"é".encode()]
    pieces = [model.id_to_piece(token) for token in range(1000) if not model.is_byte(token)]
    assert not [piece for piece in pieces if len(piece) > 1 and any(character.isdigit() for character in piece)]
    assert [piece for piece in pieces if piece.strip("\u2581") == "" and len(piece) > 1]
    # Neither a space in front nor collapsed spaces.
    assert trained().encode("the") == model.encode("the") != trained().encode(" the")
    assert len(trained().decode(trained().encode("a    b"))) == 6


def test_training_does_not_depend_on_the_order_of_documents_and_says_nothing(capfd):
    corpus = [*texts(), *texts()[:20]]
    model = train(corpus, 1000, 100_000)
    for seed in range(4):
        shuffled = np.random.default_rng(seed).permutation(np.array(corpus, object))
        assert train(shuffled, 1000, 100_000) == model
    assert capfd.readouterr() == ("", "")


def test_the_sample_is_an_even_share_of_long_and_short_documents():
    def fill(letter: str, characters: int) -> str:
        return "".join(f"{letter}{n} " for n in range(characters))[:characters]

    # The sample has room for a tenth; both halves must be in it, whichever comes first.
    corpus = [fill("x", 2_000_000), *(fill("y", 10_000)[n:] for n in range(200))]
    model = sentencepiece.SentencePieceProcessor(model_proto=train(corpus, 276, 400_000))
    pieces = {model.id_to_piece(token) for token in range(276)}
    assert {"\u2581x", "\u2581y"} <= pieces


def test_vocabularies_that_do_not_fit_the_text_are_refused():
    text = ["hello world, hello words"] * 3
    message = one_line(train, text, 5000, 10**6)
    possible = int(message.split("at most ")[1].split(",")[0])
    assert Tokenizer(train(text, possible, 10**6)).vocabulary == possible
    assert "too large" in one_line(train, text, possible + 1, 10**6)
    needed = int(one_line(train, text, 100, 10**6).split("at least ")[1])
    assert Tokenizer(train(text, needed, 10**6)).vocabulary == needed
    for nothing in ([], [""]):
        assert "no text" in one_line(train, nothing, 300, 10**6)


def test_documents_are_encoded_between_begin_and_end():
    corpus = ["", "hello", "two\nlines"]
    for tokenizer in (trained(), trained("prefix_space")):
        rows = tokenizer.encode_documents(corpus)
        assert [row.tolist() for row in rows] == [[1, *tokenizer.encode(text), 2] for text in corpus]
        assert {row.dtype for row in rows} == {np.dtype(np.int32)}
        assert [tokenizer.decode(row) for row in rows] == corpus


def test_saving_and_loading_keep_everything(tmp_path):
    saved = Tokenizer(trained().model, "prefix_space", chat_template="{{ messages }}")
    saved.save(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["tokenizer.json", "tokenizer.model"]
    settings = {"text_start": "prefix_space", "added_tokens": {}, "chat_template": "{{ messages }}"}
    assert json.loads((tmp_path / "tokenizer.json").read_text()) == settings
    for path in (tmp_path, tmp_path / "tokenizer.model"):
        loaded = Tokenizer.load(path)
        assert (loaded.model, loaded.settings, loaded.fingerprint) == (saved.model, settings, saved.fingerprint)
    assert saved.fingerprint != trained().fingerprint
    # Caches of earlier runs are keyed by it.
    assert saved.fingerprint == hashlib.sha256(b"prefix_space\n" + saved.model).hexdigest()
    (tmp_path / "tokenizer.json").unlink()
    assert Tokenizer.load(tmp_path).text_start == "plain"


MARKS = {"<|im_start|>": 1001, "<|im_end|>": 1000, "<|im_start|>user": 1002}


@functools.cache
def marked(text_start="plain") -> Tokenizer:
    return Tokenizer(trained().model, text_start, added_tokens=MARKS)


@settings(deadline=None)
@given(st.lists(st.sampled_from([*MARKS, "<|im_", "user", " ", "  b", "\n", "é", "<s>"]), max_size=8).map("".join))
def test_added_tokens_are_cut_out_and_each_stretch_is_a_text_of_its_own(text):
    cut = re.split("(<[|]im_start[|]>user|<[|]im_start[|]>|<[|]im_end[|]>)", text)
    for text_start in ("plain", "prefix_space"):
        tokenizer, without = marked(text_start), trained(text_start)
        expected = [[MARKS[part]] if part in MARKS else without.encode(part) for part in cut]
        ids = tokenizer.encode(text)
        assert ids == [token for part in expected for token in part]
        assert tokenizer.decode(ids) == text
        spaces = sum(text_start == "prefix_space" and bool(stretch) for stretch in cut[::2])
        assert tokenizer.byte_lengths()[ids].sum() == len(text.encode()) + spaces
        assert [row.tolist() for row in tokenizer.encode_documents(["x", text])] == [
            [1, *without.encode("x"), 2],
            [1, *ids, 2],
        ]


def test_added_tokens_are_part_of_the_tokenizer(tmp_path):
    tokenizer = marked("prefix_space")
    assert tokenizer.vocabulary == len(tokenizer.byte_lengths()) == 1003
    assert list(tokenizer.added_tokens.values()) == [1000, 1001, 1002]
    tokenizer.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert (loaded.settings, loaded.fingerprint) == (tokenizer.settings, tokenizer.fingerprint)
    assert loaded.encode("<|im_end|>") == [1000]
    shuffled = Tokenizer(tokenizer.model, "prefix_space", added_tokens=dict(reversed(MARKS.items())))
    renamed = Tokenizer(tokenizer.model, "prefix_space", added_tokens={"<a>": 1000, "<b>": 1001, "<c>": 1002})
    assert shuffled.fingerprint == tokenizer.fingerprint
    assert len({item.fingerprint for item in (tokenizer, renamed, trained("prefix_space"), marked())}) == 4
    # A model may have more rows than there are tokens.
    assert tokenizer.decode([1000, 1003, 5000, 1001]) == "<|im_end|><|im_start|>"


@pytest.mark.parametrize(
    "added", [{"<a>": 1001}, {"<a>": 999}, {"<a>": 1000, "<b>": 1000}, {"<a>": 1000, "<b>": 10**12}]
)
def test_added_tokens_with_other_ids_than_the_next_are_refused(added):
    message = one_line(lambda: Tokenizer(trained().model, added_tokens=added, source="here.model"))
    assert "here.model" in message and f"{[*added][-1]!r}" in message and "expected ids from 1000" in message


@pytest.mark.parametrize("added", [{"<s>": 1000}, {"\n": 1000}, {"": 1000}, {"<a>": True}, {"<a>": 1000.0}])
def test_added_tokens_that_are_pieces_or_nothing_are_refused(added):
    assert "expected" in one_line(lambda: Tokenizer(trained().model, added_tokens=added))


def test_files_that_are_no_tokenizer_are_refused(tmp_path):
    file = tmp_path / "tokenizer.model"
    assert str(file) in one_line(Tokenizer.load, tmp_path)
    for content in (b"", b"hello", trained().model[:-5], json.dumps({"model": {}}).encode()):
        file.write_bytes(content)
        message = one_line(Tokenizer.load, file)
        assert str(file) in message and "expected" in message
    file.write_bytes(trained().model)
    good = {"text_start": "plain", "added_tokens": {}, "chat_template": None}
    for wrong in ({}, [], {"version": "1.0"}, good | {"text_start": "x"}, good | {"added_tokens": ["<a>"]}):
        (tmp_path / "tokenizer.json").write_text(json.dumps(wrong))
        assert "tokenizer.json" in one_line(Tokenizer.load, tmp_path)
    for added in ({"<a>": "1000"}, {"<a>": 1001}):
        (tmp_path / "tokenizer.json").write_text(json.dumps(good | {"added_tokens": added}))
        assert f"{file} with added token '<a>': " in one_line(Tokenizer.load, tmp_path)


@pytest.mark.parametrize("name", ["en_peps", "zh_d2l", "math_stacks_tex"])
def test_real_text_comes_back_and_its_bytes_add_up(name):
    file = SHARED / f"data/corpus/{name}.valid.jsonl.gz"
    if not file.exists():
        pytest.skip(f"needs {file}")
    corpus = [document.text for document in documents(Jsonl(str(file)))]
    for text, ids in zip(corpus, trained().encode_documents(corpus), strict=True):
        assert trained().decode(ids) == text
        assert trained().byte_lengths()[ids].sum() == len(text.encode())


@pytest.mark.parametrize("name", REAL)
def test_both_text_starts_give_the_published_ids(name):
    model, vectors = SHARED / "data/tokenizers" / REAL[name], SHARED / "golden/tokenizer-vectors/vectors.json"
    if not (model.exists() and vectors.exists()):
        pytest.skip(f"needs {model} and {vectors}")
    plain = Tokenizer.load(model)
    prefixed = Tokenizer(plain.model, "prefix_space")
    assert plain.vocabulary == int(name.split("-")[-1])
    cases = json.loads(vectors.read_text())[name]
    assert len(cases) == 40
    for case in cases:
        text = case["text"]
        assert plain.encode(text) == case["sentencepiece"]
        assert plain.decode(case["sentencepiece"]) == case["decode_sentencepiece"]
        assert prefixed.decode(case["hf_fast"]) == case["decode_hf_fast"]
        if "<s>" in text:  # both Hugging Face tokenizers make a control token of it, this one never does
            assert case["hf_fast"][:2] == case["hf_slow"][:2] == [1, 1]
            assert 1 not in prefixed.encode(text) and prefixed.decode(prefixed.encode(text)) == text
        else:  # apart from that the slow one is sentencepiece alone
            assert [1, *prefixed.encode(text)] == case["hf_fast"]
            assert [1, *plain.encode(text)] == case["hf_slow"]
    for marker, pieces in (("<用户>", 3), ("<AI>", 3)):
        assert len(plain.encode(marker)) == len(prefixed.encode(marker)) == pieces


def test_the_tiny_tokenizer_gives_its_golden_ids():
    folder = SHARED / "golden/tokenizer-tiny"
    if not folder.exists():
        pytest.skip(f"needs {folder}")
    tokenizer = Tokenizer.load(folder)
    for case in json.loads((folder / "vectors.json").read_text()):
        assert tokenizer.encode(case["text"]) == case["ids"]
        assert tokenizer.decode(case["ids"]) == case["decoded"]
