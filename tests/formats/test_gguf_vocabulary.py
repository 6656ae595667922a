from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from formats.llama_cpp import LlamaCpp
from gguf import GGMLQuantizationType as GgmlType
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from cpmjax.data.tokenizer import Tokenizer
from cpmjax.formats.gguf_files import open_gguf, write_gguf
from cpmjax.formats.gguf_vocabulary import sentencepiece_from_metadata, vocabulary_metadata
from cpmjax.run.errors import UserError

SHARED = Path(__file__).parents[2].parent / "shared"
TINY = SHARED / "golden/tokenizer-tiny/tokenizer.model"
VECTORS = SHARED / "golden/tokenizer-vectors/vectors.json"
GOLDEN = SHARED / "golden/minicpm-tiny-gguf"
REAL = {
    "minicpm-2b-122753": SHARED / "data/tokenizers/minicpm-2b.model",
    "minicpm-1b-73440": SHARED / "data/tokenizers/minicpm-1b.model",
}
MODELS = {"tiny": TINY, **REAL}
STARTS = ("plain", "prefix_space")
FILE = Path("a.gguf")

pytestmark = pytest.mark.skipif(not TINY.exists(), reason=f"needs {TINY}")


def model_of(name: str) -> bytes:
    if not MODELS[name].exists():
        pytest.skip(f"needs {MODELS[name]}")
    return MODELS[name].read_bytes()


def metadata_of(name: str, text_start: str = "plain", more_rows: int = 0, **changes) -> dict:
    model = model_of(name)
    rows = len(ModelProto.FromString(model).pieces) + more_rows
    return vocabulary_metadata(model, rows, {}, text_start == "prefix_space", None) | changes


@functools.cache
def both(name: str, text_start: str) -> tuple[Tokenizer, Tokenizer]:
    """The tokenizer, and what comes back of it."""
    rebuilt, added, start, _ = sentencepiece_from_metadata(metadata_of(name, text_start, more_rows=7), FILE)
    assert (start, added) == (text_start, {})
    return Tokenizer(model_of(name), text_start), Tokenizer(rebuilt, start)


def vectors(name: str) -> list[dict]:
    if not VECTORS.exists():
        pytest.skip(f"needs {VECTORS}")
    return json.loads(VECTORS.read_text())[name]


def write_tiny_model(path: Path, vocabulary: dict) -> None:
    """A MiniCPM of one layer that has next to no weights."""
    rows, width = len(vocabulary["tokenizer.ggml.tokens"]), 32
    vectors = {"output_norm": (width,), "blk.0.attn_norm": (width,), "blk.0.ffn_norm": (width,)}
    matrices = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    shapes = {"token_embd": (rows, width), **vectors} | {f"blk.0.{name}": (width, width) for name in matrices}
    model = {
        "general.architecture": "minicpm",
        "minicpm.context_length": 512,
        "minicpm.embedding_length": width,
        "minicpm.block_count": 1,
        "minicpm.feed_forward_length": width,
        "minicpm.attention.head_count": 1,
        "minicpm.attention.layer_norm_rms_epsilon": 1e-5,
    }
    infos = {f"{name}.weight": (shape, GgmlType.F32) for name, shape in shapes.items()}
    write_gguf(path, model | vocabulary, infos, (np.full(shape, 0.01, np.float32) for shape in shapes.values()))


@pytest.mark.parametrize("text_start", STARTS)
@pytest.mark.parametrize("name", MODELS)
def test_what_comes_back_encodes_and_decodes_as_the_original(name, text_start):
    original, rebuilt = both(name, text_start)
    assert (rebuilt.vocabulary, rebuilt.bos, rebuilt.eos) == (original.vocabulary, original.bos, original.eos)
    proto = ModelProto.FromString(original.model)
    cut_out = [piece.piece for piece in proto.pieces if piece.type == ModelProto.SentencePiece.USER_DEFINED]
    texts = [case["text"] for case in vectors("minicpm-2b-122753")] + ["".join(cut_out), "字".join(cut_out)]
    for text in texts:
        ids = original.encode(text)
        assert rebuilt.encode(text) == ids and rebuilt.decode(ids) == original.decode(ids)


def test_what_comes_back_describes_itself_as_the_original():
    """As other programs read it that make a tokenizer of the file."""
    original, rebuilt = (ModelProto.FromString(tokenizer.model) for tokenizer in both("tiny", "plain"))
    for field in ("name", "precompiled_charsmap", "add_dummy_prefix", "remove_extra_whitespaces", "escape_whitespaces"):
        assert getattr(rebuilt.normalizer_spec, field) == getattr(original.normalizer_spec, field)
    special = [f"{name}_{field}" for name in ("unk", "bos", "eos") for field in ("id", "piece")]
    for field in ("model_type", "vocab_size", "byte_fallback", "pad_id", *special):
        assert getattr(rebuilt.trainer_spec, field) == getattr(original.trainer_spec, field)
    pieces = [[(piece.piece, piece.score, piece.type) for piece in proto.pieces] for proto in (original, rebuilt)]
    assert pieces[0] == pieces[1]


def test_begin_and_end_of_text_are_found_by_their_ids():
    metadata = metadata_of("tiny", **{"tokenizer.ggml.bos_token_id": 300, "tokenizer.ggml.eos_token_id": 6})
    metadata["tokenizer.ggml.tokens"][300] = "<begin>"
    model, added, *_ = sentencepiece_from_metadata(metadata, FILE)
    assert (Tokenizer(model).bos, Tokenizer(model).eos) == (300, 6)
    trainer = ModelProto.FromString(model).trainer_spec
    assert (trainer.unk_id, trainer.bos_id, trainer.eos_id) == (0, 300, 6)
    assert added == {"<s>": 1, "</s>": 2}
    assert not {1, 2, 6, 300} & set(Tokenizer(model).encode("<begin><s></s><AI>"))


@pytest.mark.parametrize("text_start", STARTS)
@pytest.mark.parametrize("name", MODELS)
def test_any_text_is_encoded_alike(name, text_start):
    original, rebuilt = both(name, text_start)
    pieces = [piece.piece.replace("\u2581", " ") for piece in ModelProto.FromString(original.model).pieces]
    words = st.one_of(st.sampled_from(pieces), st.sampled_from(pieces[:1200]), st.text(st.characters(codec="utf-8")))

    @settings(deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(words).map("".join))
    def check(text):
        assert rebuilt.encode(text) == original.encode(text)

    check()


@pytest.mark.parametrize(("text_start", "column"), [("plain", "sentencepiece"), ("prefix_space", "hf_fast")])
@pytest.mark.parametrize("name", REAL)
def test_llama_cpp_gives_the_published_ids(tmp_path, name, text_start, column):
    write_tiny_model(tmp_path / "a.gguf", metadata_of(name, text_start, more_rows=7))
    llama = LlamaCpp(tmp_path / "a.gguf")
    for case in vectors(name):
        text, begin = case["text"], [1] * (column == "hf_fast")
        if "<s>" not in text or column != "hf_fast":  # of which the Hugging Face tokenizer makes a control token
            assert [*begin, *llama.tokenize(text)] == case[column], text


@pytest.mark.parametrize("text_start", STARTS)
def test_llama_cpp_encodes_any_text_as_the_tokenizer(tmp_path, text_start):
    write_tiny_model(tmp_path / "a.gguf", metadata_of("tiny", text_start, more_rows=9))
    llama, tokenizer = LlamaCpp(tmp_path / "a.gguf"), Tokenizer(model_of("tiny"), text_start)
    words = st.one_of(st.sampled_from(["<用户>", "<AI>", "<s>", "[PAD504]", "\n", " ", "  a"]), st.text(max_size=9))

    @settings(deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(words, max_size=8).map("".join))
    def check(text):
        assert llama.tokenize(text) == tokenizer.encode(text)

    check()


def test_added_tokens_are_control_tokens_and_come_back(tmp_path):
    added = {"<|im_start|>": 505, "<|im_end|>": 504}
    template = "{{ messages }}"
    written = vocabulary_metadata(model_of("tiny"), 510, added, True, template)
    write_tiny_model(tmp_path / "a.gguf", written)
    read = open_gguf(tmp_path / "a.gguf").metadata
    assert read["tokenizer.ggml.tokens"][503:] == [
        "[PAD503]",
        "<|im_end|>",
        "<|im_start|>",
        *(f"[PAD{row}]" for row in range(506, 510)),
    ]
    assert read["tokenizer.ggml.token_type"][500:].tolist() == [1, 1, 1, 5, 3, 3, 5, 5, 5, 5]
    model, back, start, chat = sentencepiece_from_metadata(read, FILE)
    assert (back, start, chat) == (added, "prefix_space", template)
    assert Tokenizer(model).vocabulary == 503
    # Where text may hold control tokens, llama.cpp finds these.
    assert LlamaCpp(tmp_path / "a.gguf").tokenize("<|im_start|><|im_end|>", control=True) == [505, 504]


def test_types_and_special_tokens_are_those_of_the_model():
    plain, prefixed = metadata_of("tiny"), metadata_of("tiny", "prefix_space")
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model_of("tiny"))
    assert plain["tokenizer.ggml.tokens"] == [pieces.id_to_piece(token) for token in range(503)]
    assert plain["tokenizer.ggml.scores"].tolist() == [pieces.get_score(token) for token in range(503)]
    assert plain["tokenizer.ggml.token_type"].tolist() == [2, 3, 3] + [4] * 8 + [6] * 256 + [1] * 236
    assert prefixed["tokenizer.ggml.token_type"].tolist() == [2, 3, 3] + [1] * 8 + [6] * 256 + [1] * 236
    assert plain["tokenizer.ggml.scores"].dtype == np.float32 and plain["tokenizer.ggml.token_type"].dtype == np.int32
    special = [plain[f"tokenizer.ggml.{name}_token_id"] for name in ("unknown", "bos", "eos")]
    assert special == [pieces.unk_id(), pieces.bos_id(), pieces.eos_id()]


@pytest.mark.parametrize("file", ["model-f16.gguf", "model-q4_k_m.gguf"])
def test_the_vocabulary_that_llama_cpp_wrote_is_read(file):
    """It has no id for the unknown token, which is a control token in it, and no word about the space in front."""
    if not GOLDEN.exists():
        pytest.skip(f"needs {GOLDEN}")
    model, added, start, chat = sentencepiece_from_metadata(open_gguf(GOLDEN / file).metadata, GOLDEN / file)
    assert (added, start) == ({}, "prefix_space") and "<用户>" in chat
    rebuilt, llama = Tokenizer(model, start), LlamaCpp(GOLDEN / file)
    for text in (case["text"] for case in json.loads(TINY.with_name("vectors.json").read_text())):
        assert rebuilt.encode(text) == llama.tokenize(text) == Tokenizer(model_of("tiny"), start).encode(text)


WRONG = {
    "tokenizer.ggml.model": ["gpt2", None, 3],
    "tokenizer.ggml.tokens": [None, ["a"], "abc", np.arange(503)],
    "tokenizer.ggml.scores": [None, np.zeros(502, np.float32), np.zeros(503), ["1"] * 503],
    "tokenizer.ggml.token_type": [
        None,
        np.ones(504, np.int32),
        np.ones(503, np.float32),
        np.full(503, 7, np.int32),
        np.zeros(503, np.int32),
    ],
    "tokenizer.ggml.bos_token_id": [None, 503, -1, True, "<s>"],
    "tokenizer.ggml.eos_token_id": [None, 2**32 - 1, 2.0, 0],
    "tokenizer.ggml.unknown_token_id": [503, "<unk>"],
    "tokenizer.ggml.add_space_prefix": [1, "true"],
    "tokenizer.chat_template": [3, ["a", "b"]],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in WRONG.items() for value in values])
def test_vocabularies_that_are_not_whole_are_refused(key, value):
    metadata = metadata_of("tiny") | {key: value}
    if value is None:
        del metadata[key]
    with pytest.raises(UserError) as error:
        sentencepiece_from_metadata(metadata, FILE)
    message = str(error.value)
    # A list that is too short is seen at the first array that is longer.
    name = (
        "tokenizer.ggml.scores" if isinstance(value, list) and value == ["a"] else key.removeprefix("tokenizer.ggml.")
    )
    assert message.startswith("a.gguf: ") and name in message and "expected" in message and "\n" not in message


@pytest.mark.parametrize("token", [3, 4, 20, 300])
@pytest.mark.parametrize("text", ["", "<s>", "h", "\0", "a\0b", "<0x41>", "\n\n", "x" * 10_000])
@pytest.mark.parametrize("type_", [1, 2, 3, 4, 5, 6])
def test_any_token_anywhere_is_refused_or_encodes(token, text, type_):
    metadata = metadata_of("tiny")
    metadata["tokenizer.ggml.tokens"][token] = text
    metadata["tokenizer.ggml.token_type"][token] = type_
    try:
        model, *_ = sentencepiece_from_metadata(metadata, FILE)
    except UserError as error:
        assert "\n" not in str(error) and str(error).startswith("a.gguf: tokenizer.ggml.")
    else:
        tokenizer = Tokenizer(model)
        assert tokenizer.decode(tokenizer.encode("hello <s> world\n")) is not None


def test_scores_that_are_no_numbers_are_refused():
    metadata = metadata_of("tiny")
    metadata["tokenizer.ggml.scores"][300] = np.nan
    with pytest.raises(UserError, match="scores holds nan"):
        sentencepiece_from_metadata(metadata, FILE)


def test_models_that_gguf_cannot_describe_are_refused():
    with pytest.raises(UserError, match="503 tokens for 502 rows"):
        vocabulary_metadata(model_of("tiny"), 502, {}, False, None)
    with pytest.raises(UserError, match="506 tokens for 503 rows"):
        vocabulary_metadata(model_of("tiny"), 503, {"<a>": 505}, False, None)
    for spec, field, value in (
        ("normalizer_spec", "add_dummy_prefix", True),
        ("normalizer_spec", "remove_extra_whitespaces", True),
        ("normalizer_spec", "precompiled_charsmap", b"x"),
        ("trainer_spec", "model_type", 1),
        ("trainer_spec", "byte_fallback", False),
    ):
        proto = ModelProto.FromString(model_of("tiny"))
        setattr(getattr(proto, spec), field, value)
        with pytest.raises(UserError, match="expected BPE with byte fallback"):
            vocabulary_metadata(proto.SerializeToString(), 503, {}, False, None)
