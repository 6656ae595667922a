"""The tokenizer inside a GGUF file, both ways: a sentencepiece BPE model and what is added to it.

Keys: docs/gguf.md of ggml. Types of tokens have the same numbers there as in sentencepiece. llama.cpp encodes with them
as sentencepiece does, with one difference that decides how user-defined pieces are written: where a text gets a space
in front, every stretch of text behind a user-defined piece gets one as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import sentencepiece
from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec  # type: ignore[attr-defined]

from cpmjax.data.tokenizer import TextStart
from cpmjax.formats.gguf_files import Value
from cpmjax.run.errors import UserError

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_NO_SCORE = -1000.0  # what llama.cpp's own converter gives to tokens that nothing merges into


def vocabulary_metadata(
    model: bytes, rows: int, added_tokens: Mapping[str, int], add_space_prefix: bool, chat_template: str | None
) -> dict[str, Value]:
    """The tokenizer keys of a GGUF file with `rows` rows of embedding, from a sentencepiece .model file.

    `added_tokens` become control tokens at their ids, rows without a piece the unused tokens "[PAD<row>]". With
    `add_space_prefix` llama.cpp encodes as the fast Hugging Face tokenizer of MiniCPM: user-defined pieces are normal
    ones, as in the files of llama.cpp's own converter. Without it, it encodes as sentencepiece.

    Raises UserError if the rows are too few, or if the model is none that GGUF can describe.
    """
    proto = ModelProto.FromString(model)
    normalizer = proto.normalizer_spec
    changes_text = normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces or normalizer.add_dummy_prefix
    if proto.trainer_spec.model_type != TrainerSpec.BPE or not proto.trainer_spec.byte_fallback or changes_text:
        raise UserError(
            "tokenizer: the sentencepiece model does not fit into a GGUF file; "
            "expected BPE with byte fallback, the identity normaliser and no dummy prefix"
        )
    needed = max([len(proto.pieces), *(token + 1 for token in added_tokens.values())])
    if rows < needed:
        raise UserError(f"tokenizer: {needed} tokens for {rows} rows of embedding; expected a row for each")

    tokens = [piece.piece for piece in proto.pieces]
    scores = [piece.score for piece in proto.pieces]
    types = [_NORMAL if add_space_prefix and piece.type == _USER_DEFINED else piece.type for piece in proto.pieces]
    for row in range(len(tokens), rows):
        tokens.append(f"[PAD{row}]")
        scores.append(_NO_SCORE)
        types.append(_UNUSED)
    for text, token in added_tokens.items():
        tokens[token], scores[token], types[token] = text, _NO_SCORE, _CONTROL

    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    metadata: dict[str, Value] = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": np.array(scores, np.float32),
        "tokenizer.ggml.token_type": np.array(types, np.int32),
        "tokenizer.ggml.bos_token_id": processor.bos_id(),
        "tokenizer.ggml.eos_token_id": processor.eos_id(),
        "tokenizer.ggml.unknown_token_id": processor.unk_id(),
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.add_space_prefix": add_space_prefix,
    }
    if chat_template is not None:
        metadata["tokenizer.chat_template"] = chat_template
    return metadata


def sentencepiece_from_metadata(
    metadata: Mapping[str, Value], path: Path
) -> tuple[bytes, dict[str, int], TextStart, str | None]:
    """A .model file, the tokens added to it with their ids, how text starts, and the chat template.

    Control tokens are the added ones, but for begin and end of text. The model ends behind the last token that text can
    become. Raises UserError, naming `path` and the key, for any other kind of vocabulary and for one that is broken.
    """
    if metadata.get("tokenizer.ggml.model") != "llama":
        raise _error(path, "tokenizer.ggml.model", metadata, '"llama", a sentencepiece vocabulary')
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list):
        raise _error(path, "tokenizer.ggml.tokens", metadata, "a list of strings")
    scores = _array(metadata, "tokenizer.ggml.scores", np.float32, len(tokens), path)
    types = _array(metadata, "tokenizer.ggml.token_type", np.int32, len(tokens), path).copy()
    if not np.isfinite(scores).all():
        raise UserError(
            f"{path}: tokenizer.ggml.scores holds {scores[~np.isfinite(scores)][0]}; expected finite numbers"
        )
    if strange := set(types.tolist()) - set(range(1, 7)):
        raise UserError(f"{path}: tokenizer.ggml.token_type holds {min(strange)}; expected 1 to 6")
    bos = _token(metadata, "tokenizer.ggml.bos_token_id", len(tokens), path)
    eos = _token(metadata, "tokenizer.ggml.eos_token_id", len(tokens), path)
    # llama.cpp's converter writes no id and the type of a control token for it; 0 is what llama.cpp then takes.
    unknown = _token(
        {"tokenizer.ggml.unknown_token_id": 0, **metadata}, "tokenizer.ggml.unknown_token_id", len(tokens), path
    )
    types[[bos, eos]] = _CONTROL
    types[unknown] = _UNKNOWN
    space = metadata.get("tokenizer.ggml.add_space_prefix", True)
    if not isinstance(space, bool):
        raise _error(path, "tokenizer.ggml.add_space_prefix", metadata, "true or false")
    template = metadata.get("tokenizer.chat_template")
    if not isinstance(template, str | None):
        raise _error(path, "tokenizer.chat_template", metadata, "a string")

    added = {tokens[token]: int(token) for token in np.flatnonzero(types == _CONTROL) if token not in (bos, eos)}
    encoded = np.isin(types, (_NORMAL, _UNKNOWN, _USER_DEFINED, _BYTE))
    end = 1 + max(bos, eos, int(np.flatnonzero(encoded)[-1]))
    model = _model(tokens[:end], scores[:end], types[:end], (unknown, bos, eos))
    _check(model, (unknown, bos, eos), path)
    return model, added, "prefix_space" if space else "plain", template


def _model(tokens: list[str], scores: np.ndarray, types: np.ndarray, special: tuple[int, int, int]) -> bytes:
    """A .model file; `special` are the ids of unknown, begin and end of text."""
    proto = ModelProto()
    for piece, score, type_ in zip(tokens, scores.tolist(), types.tolist(), strict=True):
        proto.pieces.add(piece=piece, score=score, type=type_)
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    trainer.model_type = TrainerSpec.BPE
    trainer.vocab_size = len(tokens)
    trainer.byte_fallback = True
    trainer.unk_id, trainer.bos_id, trainer.eos_id = special
    trainer.unk_piece, trainer.bos_piece, trainer.eos_piece = (tokens[token] for token in special)
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = False
    normalizer.remove_extra_whitespaces = False
    return proto.SerializeToString()


def _check(model: bytes, special: tuple[int, int, int], path: Path) -> None:
    """Raises UserError unless sentencepiece takes the model and finds the special tokens where the file says."""
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(model)
    except RuntimeError as error:
        raise UserError(
            f"{path}: tokenizer.ggml.tokens is no vocabulary that sentencepiece takes; "
            "expected tokens that differ and are not empty, and a token of type 6 for each of 256 bytes"
        ) from error
    if (processor.unk_id(), processor.bos_id(), processor.eos_id()) != special:
        raise UserError(
            f"{path}: tokenizer.ggml.bos_token_id, eos_token_id, unknown_token_id are {special[1]}, {special[2]}, "
            f"{special[0]}; expected begin and end of text to differ from the unknown token"
        )


def _array(metadata: Mapping[str, Value], key: str, dtype: type, length: int, path: Path) -> np.ndarray:
    value = metadata.get(key)
    if not isinstance(value, np.ndarray) or value.dtype != dtype or value.shape != (length,):
        raise _error(path, key, metadata, f"an array of {length} {dtype.__name__}")
    return value


def _token(metadata: Mapping[str, Value], key: str, length: int, path: Path) -> int:
    value = metadata.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < length:
        raise _error(path, key, metadata, f"the id of one of {length} tokens")
    return value


def _error(path: Path, key: str, metadata: Mapping[str, Value], expected: str) -> UserError:
    value = metadata.get(key)
    if isinstance(value, np.ndarray):
        found = f"an array of {len(value)} {value.dtype}"
    elif isinstance(value, list):
        found = f"a list of {len(value)} strings"
    else:
        found = "missing" if value is None else repr(value)[:60]
    return UserError(f"{path}: {key} is {found}; expected {expected}")
