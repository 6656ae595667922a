"""The tokenizer files of a Hugging Face folder, both ways.

What is read: tokenizer.model, the added tokens of tokenizer_config.json, tokenizer.json and added_tokens.json, and the
chat template. A tokenizer.json is written because what transformers 5 makes of a .model alone does not give the ids of
the released one: it cuts every user-defined piece out of the text, and puts a space before each stretch between them.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError
from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

from cpmjax.data.tokenizer import TextStart, Tokenizer
from cpmjax.formats.json_files import read_json, write_json
from cpmjax.formats.tensors import map_file
from cpmjax.run.directory import write_atomically
from cpmjax.run.errors import UserError

_LARGEST = 2**25  # bytes of one file; the largest of MiniCPM-2B, its tokenizer.json, has 6 million
_SPACE = "\u2581"  # what sentencepiece writes for a space
_FLAGS = ("lstrip", "normalized", "rstrip", "single_word")  # what makes an added token match less, or more, than itself
_Piece = ModelProto.SentencePiece


def read_tokenizer(folder: Path, text_start: TextStart | None = None) -> Tokenizer:
    """The tokenizer of a folder, from its tokenizer.model; all other files may be absent.

    `text_start` is by default what transformers' AutoTokenizer gives: "prefix_space", as in all released folders, or
    "plain" where tokenizer_config.json has `"add_prefix_space": false`. (`legacy` and `tokenizer_class` choose between
    ways to put the space, not between the two starts.) Begin and end of text are always those of the .model.

    Raises UserError for a folder without tokenizer.model, files that are broken, larger than 32 MiB or at odds with
    each other, and added tokens that match in other ways than by their text alone.
    """
    file = folder / "tokenizer.model"
    model = _bytes(file, "a sentencepiece model, without which a tokenizer.json is not enough")
    config_file = folder / "tokenizer_config.json"
    config = _json(config_file)
    prefix = config.get("add_prefix_space")
    if not isinstance(prefix, bool | None):
        raise UserError(f"{config_file}: add_prefix_space = {reprlib.repr(prefix)}; expected true, false or null")
    if text_start is None:
        text_start = "plain" if prefix is False else "prefix_space"
    added = _added_tokens(folder, config, _not_added(_pieces(model, file), text_start))
    return Tokenizer(model, text_start, _chat_template(folder, config), source=file, added_tokens=added)


def write_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Writes the tokenizer into a folder that has none, so that transformers' AutoTokenizer gives the same ids.

    (It always makes control tokens of "<s>" and "</s>" in a text; a Tokenizer never does.) The files are
    tokenizer.model, tokenizer.json, tokenizer_config.json, special_tokens_map.json and, if there are added tokens,
    added_tokens.json. The class named is PreTrainedTokenizerFast, which takes tokenizer.json as it is; LlamaTokenizer
    of transformers 5 would put no space before a text that begins with one.

    Raises UserError if the model is not of MiniCPM's kind: BPE with byte fallback that changes nothing in a text.
    """
    model = ModelProto.FromString(tokenizer.model)
    normalizer, trainer = model.normalizer_spec, model.trainer_spec
    unknown = [token for token, piece in enumerate(model.pieces) if piece.type == _Piece.UNKNOWN]
    if (
        (trainer.model_type, trainer.byte_fallback, len(unknown)) != (trainer.BPE, True, 1)
        or normalizer.precompiled_charsmap
        or normalizer.add_dummy_prefix
        or normalizer.remove_extra_whitespaces
    ):
        raise UserError(
            f"{folder}: the tokenizer cannot be written; expected BPE with byte fallback, text left as it is"
        )
    names = {"bos_token": tokenizer.bos, "eos_token": tokenizer.eos, "unk_token": unknown[0]}
    special = {name: model.pieces[token].piece for name, token in names.items()}
    tokens = {token: model.pieces[token].piece for token in sorted(names.values())}
    tokens |= {token: text for text, token in tokenizer.added_tokens.items()}
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "add_prefix_space": tokenizer.text_start == "prefix_space",
        "added_tokens_decoder": {str(token): _entry(text) for token, text in tokens.items()},
        "clean_up_tokenization_spaces": False,
        "legacy": True,
        "spaces_between_special_tokens": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "use_default_system_prompt": False,
        **special,
    }
    if tokenizer.chat_template is not None:
        config["chat_template"] = tokenizer.chat_template
    fast = _fast(model.pieces, tokenizer.text_start, tokens, tokenizer.bos, unknown[0])
    if tokenizer.added_tokens:
        write_json(folder / "added_tokens.json", tokenizer.added_tokens)
    write_json(folder / "tokenizer.json", fast)
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "special_tokens_map.json", special)
    write_atomically(folder / "tokenizer.model", tokenizer.model)


def _bytes(file: Path, expected: str) -> bytes:
    mapped = map_file(file, expected)
    if mapped.size > _LARGEST:
        raise UserError(f"{file}: {mapped.size} bytes; expected {expected}, of at most {_LARGEST}")
    return mapped.tobytes()


def _json(file: Path) -> dict[str, Any]:
    """The object in a file, empty if there is no file."""
    return read_json(file, _LARGEST) if file.exists() else {}


def _pieces(model: bytes, file: Path) -> Any:
    try:
        return ModelProto.FromString(model).pieces
    except DecodeError as error:
        raise UserError(f"{file}: not a sentencepiece model; expected a .model file written by one") from error


def _not_added(pieces: Any, text_start: TextStart) -> dict[str, int]:
    """Pieces that folders list among their added tokens and that are none for a Tokenizer.

    These are control tokens, which no text becomes, and with "plain" the user-defined pieces, which it cuts out anyway.
    """
    types = {_Piece.UNKNOWN, _Piece.CONTROL} | ({_Piece.USER_DEFINED} if text_start == "plain" else set())
    return {piece.piece: token for token, piece in enumerate(pieces) if piece.type in types}


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    """The text of chat_template.jinja, or else of tokenizer_config.json; of several the one named "default"."""
    file = folder / "chat_template.jinja"
    if file.exists():
        try:
            return _bytes(file, "a chat template").decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{file}: not UTF-8 ({error}); expected a chat template") from error
    template = config.get("chat_template")
    if isinstance(template, list):
        named = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
        template = named[0].get("template") if named else template
    if not isinstance(template, str | None):
        raise UserError(
            f"{folder / 'tokenizer_config.json'}: chat_template = {reprlib.repr(template)}; "
            "expected a text, or a list with a name and a template in each and one of them named default"
        )
    return template


def _added_tokens(folder: Path, config: dict[str, Any], not_added: dict[str, int]) -> dict[str, int]:
    """{text: id} of all files, but for those `not_added`. Raises UserError where two differ about a text or an id."""
    ids: dict[str, int] = {}
    texts: dict[int, str] = {}
    homes: dict[int, Path] = {}
    for file, token, entry in _listed(folder, config):
        if not isinstance(entry, dict) or not isinstance(text := entry.get("content"), str):
            raise UserError(f"{file}: {reprlib.repr(entry)} among the added tokens; expected an object with content")
        if type(token) is not int:
            raise UserError(f"{file}: {_name(text, token)}; expected a whole number")
        if not_added.get(text) == token:
            continue
        for flag in _FLAGS:
            if entry.get(flag, False) is not False:
                raise UserError(f"{file}: {_name(text, token)} has {flag}; expected false")
        known = ids.setdefault(text, token), texts.setdefault(token, text)
        if known != (token, text):
            at, of = (known[0], text) if known[0] != token else (token, known[1])
            raise UserError(f"{file}: {_name(text, token)}; expected no other than {_name(of, at)} of {homes[at]}")
        homes.setdefault(token, file)
    return ids


def _listed(folder: Path, config: dict[str, Any]) -> Iterator[tuple[Path, Any, Any]]:
    """File, id and properties of each added token that a file lists."""
    file = folder / "tokenizer_config.json"
    for key, entry in _typed(file, config, "added_tokens_decoder", dict).items():
        if not (key.isascii() and key.isdecimal() and len(key) < 10):
            raise UserError(f"{file}: added_tokens_decoder has the key {reprlib.repr(key)}; expected ids")
        yield file, int(key), entry
    file = folder / "tokenizer.json"
    for entry in _typed(file, _json(file), "added_tokens", list):
        yield file, entry.get("id") if isinstance(entry, dict) else None, entry
    file = folder / "added_tokens.json"
    for text, token in _json(file).items():
        yield file, token, {"content": text}


def _typed(file: Path, value: dict[str, Any], key: str, kind: type) -> Any:
    found = value.get(key, kind())
    if not isinstance(found, kind):
        name = "an object" if kind is dict else "a list"
        raise UserError(f"{file}: {key} = {reprlib.repr(found)}; expected {name}")
    return found


def _name(text: str, token: object) -> str:
    return f"added token {reprlib.repr(text)}: {reprlib.repr(token)}"


def _entry(text: str) -> dict[str, Any]:
    return {"content": text, **dict.fromkeys(_FLAGS, False), "special": True}


def _fast(pieces: Any, text_start: TextStart, special: dict[int, str], bos: int, unknown: int) -> dict[str, Any]:
    """The tokenizer.json of the pieces, in the terms of the tokenizers library.

    Its merges are all ways to make a piece of two; first come those of the highest score. User-defined pieces are
    made by merges with "prefix_space", and cut out of the text, spaces already replaced, with "plain".
    """
    prefix = text_start == "prefix_space"
    added = [{"id": token, **_entry(text)} for token, text in special.items()]
    if not prefix:
        user_defined = [token for token, piece in enumerate(pieces) if piece.type == _Piece.USER_DEFINED]
        added += [
            {"id": token, **_entry(pieces[token].piece), "normalized": True, "special": False} for token in user_defined
        ]
    begin = pieces[bos].piece
    to_space = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    from_space = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    prepend = {"type": "Prepend", "prepend": _SPACE}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    sequence_a, sequence_b = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    begin_token = {"SpecialToken": {"id": begin, "type_id": 0}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": sorted(added, key=lambda entry: entry["id"]),
        "normalizer": {"type": "Sequence", "normalizers": [*([prepend] if prefix else []), to_space]},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [begin_token, sequence_a],
            "pair": [begin_token, sequence_a, begin_token, sequence_b],
            "special_tokens": {begin: {"id": begin, "ids": [bos], "tokens": [begin]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [from_space, {"type": "ByteFallback"}, {"type": "Fuse"}, *([strip] if prefix else [])],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": pieces[unknown].piece,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {piece.piece: token for token, piece in enumerate(pieces)},
            "merges": _merges(pieces, text_start),
        },
    }


def _merges(pieces: Any, text_start: TextStart) -> list[str]:
    merged = {_Piece.NORMAL} | ({_Piece.USER_DEFINED} if text_start == "prefix_space" else set())
    scores = {piece.piece: piece.score for piece in pieces if piece.type in merged}
    splits = [
        (-score, -at, text[:at], text[at:])
        for text, score in scores.items()
        for at in range(1, len(text))
        if text[:at] in scores and text[at:] in scores
    ]
    return [f"{left} {right}" for _, _, left, right in sorted(splits)]
