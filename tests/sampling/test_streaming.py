"""Text in pieces against the decoding of the whole."""

from __future__ import annotations

import functools
import random
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from cpmjax.data.tokenizer import Tokenizer
from cpmjax.run.errors import UserError
from cpmjax.sampling.streaming import TextStream

TINY = Path(__file__).parents[1] / "golden/minicpm-tiny-history/tokenizer.model"
REAL = Path(__file__).parents[2].parent / "shared/data/tokenizers"
STARTS = ("plain", "prefix_space")
EMOJI_AND_CJK = [*range(0x4E00, 0xA000), *range(0x1F000, 0x1FB00), *range(0x20000, 0x20400)]


@functools.cache
def tokenizer(text_start, added=False, file=TINY) -> Tokenizer:
    if not file.exists():
        pytest.skip(f"needs {file}")
    size = Tokenizer.load(file).vocabulary
    texts = {"<|im_end|>": size, "<|im_start|>": size + 1} if added else {}
    return Tokenizer(file.read_bytes(), text_start, added_tokens=texts)


@functools.cache
def byte_ids() -> list[int]:
    pieces = sentencepiece.SentencePieceProcessor(model_proto=TINY.read_bytes())
    return [pieces.piece_to_id(f"<0x{byte:02X}>") for byte in range(256)]


def streamed(tokenizer, prompt, ids, sizes, stop=()) -> str:
    stream, pieces, at = TextStream(tokenizer, prompt, stop), [], 0
    while at < len(ids):
        size = next(sizes)
        pieces.append(stream.push(ids[at : at + size]))
        at += size
    pieces.append(stream.finish())
    assert "".join(pieces) == stream.text
    return stream.text


def continuation(tokenizer, prompt, ids) -> str:
    return tokenizer.decode([*prompt, *ids])[len(tokenizer.decode(prompt)) :]


def random_sizes(generator):
    while True:
        yield generator.randrange(5)


def agrees_on_random_ids(tokenizer, cases):
    """Prompts and continuations of any ids at all: control tokens, unknown, beyond the vocabulary, half characters."""
    generator = random.Random(0)
    often = [*tokenizer.encode(" the a  b"), *range(tokenizer.vocabulary - 2, tokenizer.vocabulary + 2)]
    sizes = random_sizes(generator)
    for _ in range(cases):
        row = [generator.randrange(tokenizer.vocabulary) for _ in range(generator.randrange(16))]
        for at in range(0, len(row), 3):
            row[at] = generator.choice(often)
        prompt, ids = row[: (cut := generator.randrange(6))], row[cut:]
        assert streamed(tokenizer, prompt, ids, sizes) == continuation(tokenizer, prompt, ids), (prompt, ids)


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("text_start", STARTS)
def test_any_ids_give_the_text_of_the_whole(text_start, added):
    agrees_on_random_ids(tokenizer(text_start, added), 10_000)


@pytest.mark.slow
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("text_start", STARTS)
def test_any_ids_give_the_text_of_the_whole_100_000_times(text_start, added):
    agrees_on_random_ids(tokenizer(text_start, added), 100_000)


@pytest.mark.parametrize("text_start", STARTS)
@pytest.mark.parametrize("name", ["minicpm-1b.model", "minicpm-2b.model"])
def test_any_ids_of_the_released_tokenizers(name, text_start):
    agrees_on_random_ids(tokenizer(text_start, True, REAL / name), 3_000)


def random_bytes(generator) -> bytes:
    """Characters of 1 to 4 bytes, cut, spoiled and mixed with bytes that are none."""
    characters = generator.choices("a \n é你�👩\u2581\u200d🙂\0", k=generator.randrange(6))
    raw = bytearray("".join(characters).encode())
    for _ in range(generator.randrange(4)):
        at = generator.randrange(len(raw) + 1)
        raw[at : at + generator.randrange(2)] = generator.choice(
            [b"", b"\xe4", b"\xed\xa0", b"\xf0\x9f", b"\x80", b"\xff"]
        )
    return bytes(raw)


def agrees_on_random_bytes(own, cases):
    """Each a string of byte pieces after another that is the prompt."""
    generator = random.Random(1)
    sizes = random_sizes(generator)
    for _ in range(cases):
        prompt, ids = ([byte_ids()[byte] for byte in random_bytes(generator)] for _ in range(2))
        if generator.randrange(4):
            prompt = [own.bos]
        assert streamed(own, prompt, ids, sizes) == continuation(own, prompt, ids), (prompt, ids)


@pytest.mark.parametrize("text_start", STARTS)
def test_random_byte_strings_give_the_text_of_the_whole(text_start):
    agrees_on_random_bytes(tokenizer(text_start), 10_000)


@pytest.mark.slow
@pytest.mark.parametrize("text_start", STARTS)
def test_random_byte_strings_give_the_text_of_the_whole_100_000_times(text_start):
    agrees_on_random_bytes(tokenizer(text_start), 100_000)


def test_every_emoji_and_cjk_character_comes_with_its_last_byte():
    stream = TextStream(tokenizer("plain"), [1])
    for codepoint in EMOJI_AND_CJK:
        *first, last = chr(codepoint).encode()
        assert all(stream.push([byte_ids()[byte]]) == "" for byte in first)
        assert stream.push([byte_ids()[last]]) == chr(codepoint)
    assert stream.finish() == ""


@pytest.mark.slow
def test_every_character_of_unicode_comes_back_from_two_parts():
    stream = TextStream(tokenizer("plain"), [1])
    characters = [*map(chr, range(0xD800)), *map(chr, range(0xE000, 0x110000))]
    last: list[int] = []
    for character in characters:
        ids = [byte_ids()[byte] for byte in character.encode()]
        cut = (len(ids) + 1) // 2
        stream.push([*last, *ids[:cut]])
        last = ids[cut:]
    stream.push(last)
    assert stream.text == "".join(characters)


@pytest.mark.parametrize("text_start", STARTS)
def test_a_text_comes_back_and_certain_text_at_once(text_start):
    own = tokenizer(text_start)
    for text in ("", "  a", "hello world\n", "多言語 🙂👩‍👩‍👧 <s>", " \ufffd!"):
        ids = own.encode(text)
        assert streamed(own, [own.bos], ids, iter(lambda: 1, 0)) == own.decode(ids) == text
    stream = TextStream(own, [own.bos])
    assert "".join(stream.push([token]) for token in own.encode("hello world")) == "hello world"
    assert stream.finish() == ""


def test_a_long_stream_takes_time_for_the_new_tokens_alone():
    own = tokenizer("prefix_space")
    ids = own.encode("hello 你好 ") * 10_000
    stream = TextStream(own, [own.bos], ["never"])
    for token in np.asarray(ids, np.int32):
        stream.push([token])
    assert stream.text + stream.finish() == own.decode(ids)


def leftmost(text, stop) -> int:
    return min((at for each in stop if (at := text.find(each)) >= 0), default=len(text))


def test_stop_strings_end_the_text_where_the_leftmost_begins():
    generator, own = random.Random(2), tokenizer("plain")
    sizes = random_sizes(generator)
    for _ in range(10_000):
        text = "".join(generator.choices("aab你", k=generator.randrange(14)))
        stop = ["".join(generator.choices("aab你", k=generator.randint(1, 5))) for _ in range(generator.randrange(4))]
        ids = [byte_ids()[byte] for byte in text.encode()] if generator.randrange(2) else own.encode(text)
        assert streamed(own, [], ids, sizes, stop) == text[: leftmost(text, stop)], (text, stop)
        stream = TextStream(own, [], stop)
        stream.push(ids)
        stream.finish()
        assert stream.stopped == (leftmost(text, stop) < len(text))
        assert stream.push(own.encode("more")) == "" or not stream.stopped


def test_nothing_is_held_back_that_no_stop_string_begins_with():
    generator, own = random.Random(3), tokenizer("plain")
    for _ in range(2_000):
        text = "".join(generator.choices("aab", k=12))
        stop = ["".join(generator.choices("aab", k=generator.randint(1, 6))) for _ in range(3)]
        stream = TextStream(own, [], stop)
        for at, character in enumerate(text, start=1):
            stream.push([byte_ids()[ord(character)]])
            if stream.stopped:
                break
            held = text[len(stream.text) : at]
            assert any(each.startswith(held) and each != held for each in stop)
            assert text.startswith(stream.text)


@pytest.mark.parametrize(
    "stop, text, expected",
    [
        (["aab"], "aaab", "a"),
        (["<AI>", "<用户>"], "hi<A<用户><AI>", "hi<A"),
        (["<用户>"], "hi<用", "hi<用"),  # a beginning that nothing follows
        (["abcd", "bc"], "xabce", "xa"),  # the one that began first came to nothing
        (["abcd", "bc"], "xabcd", "x"),
        (["\n\n", "\n"], "a\n\nb", "a"),
        (["\ufffd"], "ab", "ab"),
    ],
)
def test_stop_strings_character_by_character(stop, text, expected):
    own = tokenizer("plain")
    ids = [byte_ids()[byte] for byte in text.encode()]
    assert streamed(own, [own.bos], ids, iter(lambda: 1, 0), stop) == expected


def test_a_stop_string_may_be_an_added_token_and_is_not_looked_for_in_the_prompt():
    own = tokenizer("prefix_space", True)
    prompt = [own.bos, *own.encode("a<|im_end|>b<|im_")]
    ids = own.encode("end|> yes<|im_end|>no")
    stream = TextStream(own, prompt, ["<|im_end|>"])
    assert stream.push(ids) == " end|> yes" and stream.stopped
    assert stream.push(own.encode("x")) == stream.finish() == ""


@pytest.mark.parametrize("stop", ["abc", [""], ["a", ""], [3]])
def test_stop_strings_that_are_none_are_refused(stop):
    with pytest.raises(UserError, match=r"^stop = .*; expected a list of strings"):
        TextStream(tokenizer("plain"), [], stop)
