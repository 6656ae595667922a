from __future__ import annotations

import functools
import gzip
import json
import os
import random
from pathlib import Path

import pytest

from cpmjax.data.tokenizer import Tokenizer, train
from cpmjax.formats.tokenizer_files import read_tokenizer, write_tokenizer
from cpmjax.run.errors import UserError

SHARED = Path(__file__).parents[2].parent / "shared"
VECTORS = SHARED / "golden/tokenizer-vectors/vectors.json"
MODELS = {
    "tiny": "golden/tokenizer-tiny/tokenizer.model",
    "minicpm-1b-73440": "data/tokenizers/minicpm-1b.model",
    "minicpm-2b-122753": "data/tokenizers/minicpm-2b.model",
}
CONFIG = {"add_bos_token": True, "bos_token": "<s>", "legacy": True, "tokenizer_class": "LlamaTokenizer"}
FLAGS = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
LISTED = {str(token): {"content": text, **FLAGS} for token, text in enumerate(["<unk>", "<s>", "</s>"])}
TEMPLATE = "{% for message in messages %}<用户>{{ message['content'] }}<AI>{% endfor %}"
CHAT = "<|im_start|>user\nhi  <|im_end|>\n<|im_start|> assistant\n"


def shared(name: str) -> Path:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"needs {path}")
    return path


@functools.cache
def model() -> bytes:
    return train(["hello world, 你好 <用户>hi<AI> again and again\n"] * 9, 320, 10**6)


def folder(path: Path, **files: object) -> Path:
    """A released folder: `tokenizer_config={...}` becomes tokenizer_config.json."""
    path.mkdir(exist_ok=True)
    (path / "tokenizer.model").write_bytes(model())
    for name, content in files.items():
        (path / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as error:
        read_tokenizer(path)
    assert "\n" not in str(error.value) and "expected" in str(error.value) and len(str(error.value)) < 600
    return str(error.value)


def random_texts(count: int) -> list[str]:
    generator = random.Random(0)
    parts = [
        "<|im_start|>",
        "<|im_end|>",
        "<|im_",
        " ",
        "  ",
        "\n",
        "\t",
        "a",
        "hello",
        "<",
        "|",
        "...",
        "。。。",
        "-->",
    ]
    parts += ["</h2>", "你好", "\u2581", "é", "👩‍👩", "<用户>", "<AI>", "1", "\0"]
    return ["".join(generator.choices(parts, k=generator.randint(1, 12))) for _ in range(count)]


def test_a_released_folder(tmp_path):
    start = 320
    added = {"<|im_end|>": start, "<|im_start|>": start + 1}
    decoder = LISTED | {str(token): {"content": text, **FLAGS} for text, token in added.items()}
    config = CONFIG | {"added_tokens_decoder": decoder, "chat_template": TEMPLATE}
    tokenizer = read_tokenizer(folder(tmp_path, tokenizer_config=config))
    assert tokenizer.settings == {"text_start": "prefix_space", "added_tokens": added, "chat_template": TEMPLATE}
    assert (tokenizer.model, tokenizer.vocabulary) == (model(), 322)
    # <s> is in the list as well, and still text never becomes it.
    assert tokenizer.bos not in tokenizer.encode("<s>") and tokenizer.encode("<|im_start|>") == [321]
    # The same from the two other places, alone and together.
    only = folder(tmp_path / "a", tokenizer_config=CONFIG, added_tokens=added)
    fast = {"added_tokens": [{"id": int(token), **entry} for token, entry in decoder.items()]}
    others = folder(tmp_path / "b", tokenizer=fast)
    every = folder(tmp_path / "c", tokenizer_config=config, added_tokens=added, tokenizer=fast)
    assert {read_tokenizer(path).fingerprint for path in (only, others, every)} == {tokenizer.fingerprint}


def test_a_folder_with_nothing_but_the_model(tmp_path):
    settings = {"text_start": "prefix_space", "added_tokens": {}, "chat_template": None}
    assert read_tokenizer(folder(tmp_path)).settings == settings


def test_where_text_starts(tmp_path):
    for value, expected in ((None, "prefix_space"), (True, "prefix_space"), (False, "plain")):
        path = folder(tmp_path, tokenizer_config=CONFIG | {"add_prefix_space": value})
        assert read_tokenizer(path).text_start == expected
        assert read_tokenizer(path, "plain").text_start == "plain"
        assert read_tokenizer(path, "prefix_space").text_start == "prefix_space"


def test_the_chat_template(tmp_path):
    templates = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": TEMPLATE}]
    path = folder(tmp_path, tokenizer_config=CONFIG | {"chat_template": templates})
    assert read_tokenizer(path).chat_template == TEMPLATE
    (path / "chat_template.jinja").write_text("{{ 1 // 0 }}你")
    assert read_tokenizer(path).chat_template == "{{ 1 // 0 }}你"
    (path / "chat_template.jinja").write_bytes(b"\xff")
    assert "chat_template.jinja" in refusal(path)


def test_the_pieces_that_plain_cuts_out_may_be_listed(tmp_path):
    config = CONFIG | {"added_tokens_decoder": LISTED | {"3": {"content": "\n", **FLAGS, "normalized": True}}}
    path = folder(tmp_path, tokenizer_config=config | {"add_prefix_space": False})
    assert read_tokenizer(path).added_tokens == {}
    # With a space in front of each stretch the ids of the text after it would be others.
    assert "has normalized" in refusal(folder(tmp_path, tokenizer_config=config))
    config["added_tokens_decoder"]["3"]["normalized"] = False
    assert "tokenizer.model with added token '\\n': 3" in refusal(folder(tmp_path, tokenizer_config=config))


def test_files_that_disagree(tmp_path):
    config = CONFIG | {"added_tokens_decoder": {"320": {"content": "<a>", **FLAGS}}}
    for added, token in (({"<a>": 321}, "'<a>': 320"), ({"<b>": 320}, "'<a>': 320")):
        message = refusal(folder(tmp_path, tokenizer_config=config, added_tokens=added))
        assert "added_tokens.json" in message and f"{token} of {tmp_path / 'tokenizer_config.json'}" in message


DEEP = "[" * 100_000


@pytest.mark.parametrize(
    "file, content",
    [
        *[("tokenizer_config", text) for text in ("", "{", "[]", "1", "\xff", DEEP, '{"a": "\\ud800"}')],
        ("tokenizer_config", {"chat_template": 3}),
        ("tokenizer_config", {"chat_template": []}),
        ("tokenizer_config", {"chat_template": [1, {"name": "tool_use", "template": "x"}]}),
        ("tokenizer_config", {"add_prefix_space": "no"}),
        ("tokenizer_config", {"chat_template": [{"name": "default", "template": {}}]}),
        ("tokenizer_config", {"add_prefix_space": 0}),
        ("tokenizer_config", {"added_tokens_decoder": []}),
        ("tokenizer_config", {"added_tokens_decoder": {"320": "<a>"}}),
        ("tokenizer_config", {"added_tokens_decoder": {"320": {"content": 1}}}),
        ("tokenizer_config", {"added_tokens_decoder": {"-1": {"content": "<a>"}}}),
        ("tokenizer_config", {"added_tokens_decoder": {"9" * 5000: {"content": "<a>"}}}),
        ("tokenizer_config", {"added_tokens_decoder": {"320": {"content": "<a>", "lstrip": True}}}),
        ("tokenizer", {"added_tokens": {}}),
        ("tokenizer", {"added_tokens": [1]}),
        ("tokenizer", {"added_tokens": [{"content": "<a>"}]}),
        ("added_tokens", {"<a>": 320.0}),
        ("added_tokens", {"<a>": True}),
    ],
)
def test_broken_files_are_refused_by_name(tmp_path, file, content):
    assert str(tmp_path / f"{file}.json") in refusal(folder(tmp_path, **{file: content}))


@pytest.mark.parametrize("added", [{"<a>": 10**12}, {"<a>": -1}, {"<a>": 1}, {"": 320}, {"x" * 10**6: 321}])
def test_ids_that_do_not_follow_the_pieces_are_refused(tmp_path, added):
    assert str(tmp_path / "tokenizer.model") in refusal(folder(tmp_path, added_tokens=added))


def test_models_that_are_none_are_refused(tmp_path):
    path = folder(tmp_path, tokenizer={"added_tokens": []})
    file = path / "tokenizer.model"
    generator = random.Random(0)
    for cut in (1, 100, len(model()) - 5):
        file.write_bytes(model()[:cut])
        assert str(file) in refusal(path)
    for _ in range(100):  # other bytes may be a model by chance
        content = bytearray(model())
        content[generator.randrange(len(content))] = generator.randrange(256)
        file.write_bytes(content)
        try:
            tokenizer = read_tokenizer(path)
            assert len(tokenizer.byte_lengths()) == tokenizer.vocabulary > 0
        except UserError as error:
            assert str(file) in str(error)
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
    assert "Git LFS" in refusal(path)
    file.write_bytes(b"")
    os.truncate(file, 2**25 + 1)
    assert str(2**25 + 1) in refusal(path)
    file.unlink()
    assert str(file) in refusal(path) and "tokenizer.json is not enough" in refusal(path)


@pytest.mark.parametrize("text_start", ["plain", "prefix_space"])
@pytest.mark.parametrize("added", [{}, {"<|im_end|>": 320, "<|im_start|>": 321}])
def test_what_is_written_is_read_again(tmp_path, text_start, added):
    tokenizer = Tokenizer(model(), text_start, TEMPLATE if added else None, added_tokens=added)
    write_tokenizer(tmp_path, tokenizer)
    names = {"tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
    assert {path.name for path in tmp_path.iterdir()} == names | ({"added_tokens.json"} if added else set())
    again = read_tokenizer(tmp_path)
    assert (again.settings, again.fingerprint) == (tokenizer.settings, tokenizer.fingerprint)


def test_a_model_that_changes_the_text_is_not_written(tmp_path):
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    changed = ModelProto.FromString(model())
    changed.normalizer_spec.add_dummy_prefix = True
    with pytest.raises(UserError, match="text left as it is"):
        write_tokenizer(tmp_path, Tokenizer(changed.SerializeToString()))
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("text_start", ["plain", "prefix_space"])
@pytest.mark.parametrize("name", MODELS)
def test_transformers_gives_the_same_ids(tmp_path, name, text_start):
    transformers = pytest.importorskip("transformers")
    released, vectors = shared(MODELS[name]).read_bytes(), json.loads(shared(str(VECTORS)).read_text())
    texts = [case["text"] for case in vectors["minicpm-2b-122753" if name == "tiny" else name]]
    assert len(texts) == 40
    # Text that holds a control token is one there and never here.
    texts = [text for text in texts if "<s>" not in text] + [CHAT, *random_texts(300)]
    pieces = Tokenizer(released).vocabulary
    for added in ({}, {"<|im_end|>": pieces, "<|im_start|>": pieces + 1, "<|im_": pieces + 2}):
        tokenizer = Tokenizer(released, text_start, TEMPLATE, added_tokens=added)
        path = tmp_path / str(len(added))
        path.mkdir()
        write_tokenizer(path, tokenizer)
        theirs = transformers.AutoTokenizer.from_pretrained(path)
        for text in texts:
            ids = tokenizer.encode(text)
            assert theirs(text).input_ids == [1, *ids]
            # With "prefix_space" theirs leaves the spaces after added tokens in the text.
            if text_start == "plain" or not added:
                assert theirs.decode(ids) == tokenizer.decode(ids)
        assert (len(theirs), theirs.bos_token_id, theirs.eos_token_id) == (tokenizer.vocabulary, 1, 2)
        messages = [{"role": "user", "content": "hi"}]
        assert theirs.apply_chat_template(messages, tokenize=False) == "<用户>hi<AI>"


@pytest.mark.parametrize("text_start", ["plain", "prefix_space"])
def test_transformers_gives_the_same_ids_on_long_text(tmp_path, text_start):
    transformers = pytest.importorskip("transformers")
    tokenizer = Tokenizer(shared(MODELS["minicpm-1b-73440"]).read_bytes(), text_start)
    write_tokenizer(tmp_path, tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for name in ("en_peps", "zh_d2l", "math_stacks_tex"):
        with gzip.open(shared(f"data/corpus/{name}.valid.jsonl.gz"), "rt") as file:
            texts = [json.loads(line)["text"][:2000] for line, _ in zip(file, range(20), strict=False)]
        for text in texts:
            assert theirs(text).input_ids == [1, *tokenizer.encode(text)]
