"""sentencepiece as MiniCPM uses it: byte-fallback BPE, split digits, identity normaliser, no dummy prefix."""

from __future__ import annotations

import hashlib
import heapq
import io
import json
import re
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import sentencepiece

from cpmjax.run.directory import write_atomically
from cpmjax.run.errors import UserError

TextStart = Literal["plain", "prefix_space"]

_STRETCH = 10_000  # a document is sampled in stretches of this size, so that one long file is sampled evenly
_SPACE = "\u2581"  # what sentencepiece writes for a space


def train(documents: Iterable[str], vocabulary: int, sample_bytes: int) -> bytes:
    """Trains a tokenizer on an even share of the documents and returns its .model file.

    The same documents give the same bytes, in whatever order they come. Raises UserError where the text cannot fill
    the vocabulary, or the vocabulary cannot hold the characters of the text.
    """
    sample = _sample(documents, sample_bytes)
    if not sample:
        raise UserError("tokenizer: no text to train on; expected at least one document")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            # "\n" is a piece of its own and a line therefore a sentence: nothing longer could become a piece.
            sentence_iterator=(line for text in sample for line in text.split("\n") if line),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocabulary,
            # What the text can give is then in the model itself.
            hard_vocab_limit=False,
            byte_fallback=True,
            split_digits=True,
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            normalization_rule_name="identity",
            allow_whitespace_only_pieces=True,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            user_defined_symbols=["\n", "\t"],
            # Longer lines would be left out in silence; a character has at most 4 bytes.
            max_sentence_length=4 * _STRETCH,
            num_threads=1,
            minloglevel=3,
        )
    except RuntimeError as error:
        needed = re.search(r"\d+ vs\.? (\d+)", str(error))
        expected = f"at least {needed[1]}" if needed else "more text, or another size"
        raise UserError(
            f"model.vocabulary = {vocabulary}: the tokenizer cannot hold the bytes and characters of the text; "
            f"expected {expected}"
        ) from error
    possible = Tokenizer(model.getvalue()).vocabulary
    if possible < vocabulary:
        read = sum(len(text.encode()) for text in sample)
        raise UserError(
            f"model.vocabulary = {vocabulary}: too large for a tokenizer trained on {read} bytes of text; "
            f"expected at most {possible}, or more text"
        )
    return model.getvalue()


def _sample(documents: Iterable[str], limit: int) -> list[str]:
    """The stretches of text with the smallest hashes, as many as fit into `limit` bytes (but at least one)."""
    kept: list[tuple[int, str]] = []  # a heap with the largest hash on top
    size, bound = 0, 2**64  # bytes kept; everything from this hash on is out, whatever room there is later
    for document in documents:
        for start in range(0, len(document), _STRETCH):
            text = document[start : start + _STRETCH]
            raw = text.encode()
            size += len(raw)
            heapq.heappush(kept, (-int.from_bytes(hashlib.sha256(raw).digest()[:8], "big"), text))
            while len(kept) > 1 and (size > limit or -kept[0][0] >= bound):
                largest, out = heapq.heappop(kept)
                bound = min(bound, -largest)
                size -= len(out.encode())
    return [text for _, text in sorted(kept)]


def is_unicode(text: str) -> bool:
    """Whether it is text at all: JSON can spell half of a surrogate pair, and Python holds it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class Tokenizer:
    """A sentencepiece model and how text starts in it.

    `text_start="plain"` encodes as sentencepiece does. `"prefix_space"` encodes as the fast Hugging Face tokenizer of
    MiniCPM does: a space goes before the text, and user-defined pieces of several characters are ordinary ones that
    only merges build. Text never becomes a control token of the model: "<s>" in it is three characters.

    `added_tokens` are texts with ids after the last piece, as MiniCPM-2B-128k has seven. They are cut out of a text
    before all else, the leftmost and there the longest first, whoever wrote them. Each stretch between them is then a
    text of its own: with "prefix_space" a space goes before every one that is not empty.

    `byte_values` are the bytes by token, of the pieces that stand for one byte each.

    decode(encode(text)) == text, except that U+2581, which stands for a space in the pieces, returns as a space.
    """

    def __init__(
        self,
        model: bytes,
        text_start: TextStart = "plain",
        chat_template: str | None = None,
        source: str | Path = "tokenizer",
        added_tokens: Mapping[str, int] = {},
    ) -> None:
        """`model` is a .model file; raises UserError naming `source` if it is not.

        The ids of `added_tokens` go on where the pieces end, without a gap, in any order; raises UserError for others,
        and for a text that is a piece already.
        """
        self.model = model
        self.text_start = text_start
        self.chat_template = chat_template
        self._pieces = _processor(model, source)
        # A name that no piece has gives <unk>, which is no byte.
        tokens = {self._pieces.piece_to_id(f"<0x{byte:02X}>"): byte for byte in range(256)}
        self.byte_values = {token: byte for token, byte in tokens.items() if self._pieces.is_byte(token)}
        self._encoder = self._pieces
        if text_start == "prefix_space":
            self._encoder = _processor(_without_user_defined(model), source)
        self.added_tokens = _in_order(added_tokens, self._pieces, source)
        self._added_texts = {token: text for text, token in self.added_tokens.items()}
        longest_first = sorted(self.added_tokens, key=len, reverse=True)
        self._added = re.compile(f"({'|'.join(map(re.escape, longest_first))})") if longest_first else None
        self.vocabulary: int = self._pieces.vocab_size() + len(self.added_tokens)
        self.bos: int = self._pieces.bos_id()
        self.eos: int = self._pieces.eos_id()
        if self.bos < 0 or self.eos < 0:
            raise UserError(f"{source}: the model has no begin or no end of text; expected <s> and </s> in it")

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Reads a .model file, or the tokenizer.model of a folder, and the tokenizer.json beside it if there is one."""
        path = Path(path).expanduser()
        file = path / "tokenizer.model" if path.is_dir() else path
        try:
            model = file.read_bytes()
        except OSError as error:
            raise UserError(f"{file}: {error.strerror}; expected a sentencepiece model") from error
        settings = file.with_name("tokenizer.json")
        return cls(model, **(_read_settings(settings) if settings.exists() else {}), source=file)

    def save(self, folder: str | Path) -> None:
        """Writes tokenizer.model and tokenizer.json; each is complete or absent at any moment."""
        write_atomically(Path(folder) / "tokenizer.json", json.dumps(self.settings, indent=2) + "\n")
        write_atomically(Path(folder) / "tokenizer.model", self.model)

    @property
    def settings(self) -> dict[str, Any]:
        return {"text_start": self.text_start, "added_tokens": self.added_tokens, "chat_template": self.chat_template}

    @property
    def fingerprint(self) -> str:
        """64 hexadecimal digits; equal where every text gets the same ids."""
        added = f" {json.dumps(self.added_tokens)}" if self.added_tokens else ""
        return hashlib.sha256(f"{self.text_start}{added}\n".encode() + self.model).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without begin and end of text. Raises UserError if it is not `is_unicode`."""
        if not is_unicode(text):
            raise UserError(f"text = {reprlib.repr(text)}; expected text, all of it Unicode")
        return self._encode([text])[0]

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        """int32 ids of each text between begin and end of text. One core works; threads can call it side by side."""
        return [np.array([self.bos, *ids, self.eos], np.int32) for ids in self._encode(texts)]

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        rows = [self._added.split(text) if self._added else [text] for text in texts]  # stretch, added, stretch, ...
        stretches = [self._start(stretch) for row in rows for stretch in row[::2]]
        encoded = iter(self._encoder.encode(stretches, num_threads=1))
        result = []
        for row in rows:
            ids = list(next(encoded))
            for added in row[1::2]:
                ids.append(self.added_tokens[added])
                ids.extend(next(encoded))
            result.append(ids)
        return result

    def decode(self, ids: Iterable[int]) -> str:
        """Text of some ids; control tokens say nothing, bytes that are no UTF-8 become U+FFFD.

        With "prefix_space" the ids are taken for a whole text: one space at the start of each stretch is dropped.
        Ids beyond the vocabulary, of which a model may have rows, say nothing either.
        """
        known = [int(token) for token in ids if token < self.vocabulary]
        return "".join(
            "".join(self._added_texts[token] for token in group) if added else self._decode_stretch([*group])
            for added, group in groupby(known, self._added_texts.__contains__)
        )

    def decode_pieces(self, ids: list[int]) -> str:
        """Text of ids below those of the added tokens, as in the middle of a text: a space at the start stays."""
        return self._pieces.decode(ids)

    def _decode_stretch(self, ids: list[int]) -> str:
        text = self.decode_pieces(ids)
        return text.removeprefix(" ") if self.text_start == "prefix_space" else text

    def byte_lengths(self) -> np.ndarray:
        """int32 [vocabulary]: how many UTF-8 bytes of text each token stands for; 0 for control tokens and <unk>.

        They add up to the bytes of an encoded text (and 1 for each space in front with "prefix_space").
        """
        return np.array([self._byte_length(token) for token in range(self.vocabulary)], np.int32)

    def _byte_length(self, token: int) -> int:
        pieces = self._pieces
        if token in self._added_texts:
            return len(self._added_texts[token].encode())
        if pieces.is_control(token) or pieces.is_unknown(token):
            return 0
        return 1 if token in self.byte_values else len(pieces.id_to_piece(token).replace(_SPACE, " ").encode())

    def _start(self, text: str) -> str:
        return " " + text if text and self.text_start == "prefix_space" else text


def _processor(model: bytes, source: str | Path) -> sentencepiece.SentencePieceProcessor:
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(model)
        processor.id_to_piece(list(range(processor.vocab_size())))  # that all of them are text
    except (RuntimeError, UnicodeDecodeError) as error:
        raise UserError(f"{source}: not a sentencepiece model; expected a .model file written by one") from error
    return processor


def _in_order(
    added: Mapping[str, int], pieces: sentencepiece.SentencePieceProcessor, source: str | Path
) -> dict[str, int]:
    """The added tokens by id. Raises UserError where an id does not follow its predecessor, or a text is a piece."""
    for text, token in added.items():
        if type(token) is not int or not text:
            raise UserError(f"{source} with added token {_item(text, token)}; expected some text and a whole number")
    ordered = dict(sorted(added.items(), key=lambda item: item[1]))
    for expected, (text, token) in enumerate(ordered.items(), start=pieces.vocab_size()):
        name = f"{source} with added token {_item(text, token)}"
        if token != expected:
            raise UserError(f"{name}; expected ids from {pieces.vocab_size()}, where the pieces end, without a gap")
        if pieces.id_to_piece(piece := pieces.piece_to_id(text)) == text:
            raise UserError(f"{name}; expected a text that is no piece, and it is piece {piece}")
    return ordered


def _item(text: str, token: object) -> str:
    return f"{reprlib.repr(text)}: {reprlib.repr(token)}"


def _without_user_defined(model: bytes) -> bytes:
    """The same pieces and ids; user-defined pieces are no longer cut out of the text before merging begins."""
    from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

    proto = ModelProto.FromString(model)
    for piece in proto.pieces:
        if piece.type == ModelProto.SentencePiece.USER_DEFINED:
            piece.type = ModelProto.SentencePiece.NORMAL
    return proto.SerializeToString()


def _read_settings(file: Path) -> dict[str, Any]:
    expected = f"expected text_start ({' or '.join(get_args(TextStart))}), added_tokens and chat_template"
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read as JSON ({error}); {expected}") from error
    if not isinstance(settings, dict) or settings.keys() != {"text_start", "added_tokens", "chat_template"}:
        raise UserError(f"{file}: not the settings of a cpmjax tokenizer; {expected}")
    if settings["text_start"] not in get_args(TextStart):
        raise UserError(f"{file}: text_start = {settings['text_start']!r}; {expected}")
    if not isinstance(settings["added_tokens"], dict):
        raise UserError(f"{file}: added_tokens = {reprlib.repr(settings['added_tokens'])}; expected ids by text")
    return settings
