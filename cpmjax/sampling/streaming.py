"""Ids -> text as it comes: what could still change is held back, incomplete UTF-8 and beginnings of stop strings."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from itertools import groupby

from cpmjax.data.tokenizer import Tokenizer
from cpmjax.run.errors import UserError

# sentencepiece writes one U+FFFD for each byte that is no UTF-8, Python by itself one for several.
_EACH_BYTE = "cpmjax.each_byte"
codecs.register_error(_EACH_BYTE, lambda error: ("\ufffd", error.start + 1))  # type: ignore[attr-defined]


class TextStream:
    """The text that tokens add to a prompt, up to the first stop string, in pieces.

    Without stop strings the pieces together are `tokenizer.decode([*prompt_ids, *ids])` from where
    `tokenizer.decode(prompt_ids)` ends. With them they are that text up to where the leftmost of all stop strings in
    it begins. Neither depends on how the ids are divided among the calls. A call takes time for its own ids alone.

    `prompt_ids` are needed because a tokenizer may treat the start of a text unlike its middle; without a prompt they
    are empty. Raises UserError for a stop string that is empty.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], stop: Sequence[str] = ()) -> None:
        if isinstance(stop, str) or not all(isinstance(text, str) and text for text in stop):
            raise UserError(f"stop = {stop!r}; expected a list of strings, none of them empty")
        self._decoder = _Decoder(tokenizer)
        self._decoder.push(prompt_ids)
        # decode makes a character of each byte that ends the prompt unfinished; as many are no part of what follows.
        self._skip = self._decoder.pending
        self._stop = tuple(stop)
        self._held = ""
        self._certain: list[str] = []
        self.stopped = False  # whether a stop string was found; all later text is dropped

    @property
    def text(self) -> str:
        """All that was returned so far."""
        return "".join(self._certain)

    def push(self, ids: Sequence[int]) -> str:
        """Takes further tokens and returns the text that is certain now."""
        return "" if self.stopped else self._take(self._decoder.push(ids))

    def finish(self) -> str:
        """Returns what was held back; no tokens come after it."""
        return "" if self.stopped else self._take(self._decoder.finish(), last=True)

    def _take(self, new: str, last: bool = False) -> str:
        text = self._held + new[self._skip :]
        self._skip = max(0, self._skip - len(new))
        stop = min((at for each in self._stop if (at := text.find(each)) >= 0), default=len(text))
        unsure = len(text) if last else self._unfinished(text)
        # A stop string that may have begun further left comes before one that is complete.
        self.stopped = stop < len(text) and stop <= unsure
        certain = text[: min(stop, unsure)]
        self._held = "" if self.stopped or last else text[unsure:]
        self._certain.append(certain)
        return certain

    def _unfinished(self, text: str) -> int:
        """Where the end of the text begins that may be the beginning of a stop string."""
        longest = max(map(len, self._stop), default=0)
        for at in range(max(0, len(text) - longest + 1), len(text)):
            if any(len(text) - at < len(each) and each.startswith(text[at:]) for each in self._stop):
                return at
        return len(text)


class _Decoder:
    """`Tokenizer.decode`, bit by bit: what it returns together is what decode gives for all ids."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._bytes = tokenizer.byte_values
        self._added = {token: text for text, token in tokenizer.added_tokens.items()}
        self._vocabulary = tokenizer.vocabulary
        self._drops_space = tokenizer.text_start == "prefix_space"
        self._at_start = True  # of a text, or of a stretch after an added token
        self._utf8 = codecs.getincrementaldecoder("utf-8")(_EACH_BYTE)

    @property
    def pending(self) -> int:
        """How many bytes wait for the rest of their character."""
        return len(self._utf8.getstate()[0])

    def push(self, ids: Iterable[int]) -> str:
        known = (int(token) for token in ids if token < self._vocabulary)
        return "".join(self._group(kind, list(group)) for kind, group in groupby(known, self._kind))

    def finish(self) -> str:
        return self._stretch(self._utf8.decode(b"", final=True))

    def _kind(self, token: int) -> str:
        return "added" if token in self._added else "byte" if token in self._bytes else "piece"

    def _group(self, kind: str, ids: list[int]) -> str:
        if kind == "byte":
            return self._stretch(self._utf8.decode(bytes(self._bytes[token] for token in ids)))
        # Bytes on both sides of another token never make a character, even where that token says nothing.
        before = self.finish()
        if kind == "piece":
            return before + self._stretch(self._tokenizer.decode_pieces(ids))
        self._at_start = True
        return before + "".join(self._added[token] for token in ids)

    def _stretch(self, text: str) -> str:
        if self._at_start and text:
            self._at_start = False
            return text.removeprefix(" ") if self._drops_space else text
        return text
