"""Tokens per second of a tokenised store that is built, beside sentencepiece alone on the same text.

    python experiments/benchmarks/building.py [FOLDER] [--megabytes 50] [--tokenizer PATH] [--vocabulary 16384] \
        [--rounds 3]

The text is that of the .jsonl files of FOLDER (also .gz, .zst; bad lines are skipped). Without FOLDER it is the source
of Python's standard library, written to a .jsonl file with its lines in as many other orders as fill the megabytes.
Without PATH a tokenizer is trained on it.

A store is built from the files into an empty cache: key, reading, encoding, writing and all. sentencepiece encodes the
same documents, which lie in memory, into lists: `SentencePieceProcessor.encode` with its own threads, as many as cores,
and with one. They take turns in a round. A token is one of a document; begin and end of text, which only the store has,
do not count. One line of JSON a measurement.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sentencepiece
from measured import sample, say

from cpmjax.data.corpora import content_key, documents
from cpmjax.data.tokenizer import Tokenizer, train
from cpmjax.data.tokens import build_or_open
from cpmjax.run.sources import Jsonl, StandardLibrary

SAMPLE_BYTES = 10_000_000  # of the text on which a tokenizer is trained


def write_default_text(file: Path, size: int) -> None:
    """Writes documents of `size` bytes in all, the same ones on every machine of one Python version."""
    originals = [document.text for document in documents(StandardLibrary(), "skip")]
    order = random.Random(0)
    with file.open("w", encoding="utf-8") as out:
        while size > 0:
            for text in originals:
                size -= len(text.encode())
                out.write(json.dumps({"text": text}) + "\n")
                if size <= 0:
                    break
            originals = ["\n".join(order.sample(lines := text.split("\n"), len(lines))) for text in originals]


def measure_building(corpus: Jsonl, tokenizer: Tokenizer, rounds: int) -> Iterator[dict[str, Any]]:
    texts = [document.text for document in documents(corpus, "skip")]
    yield sample("text", "MB", sum(len(text.encode()) for text in texts) / 1e6)
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(tokenizer.model)
    for _ in range(rounds):
        began = time.perf_counter()
        tokens = sum(map(len, processor.encode(texts, num_threads=-1)))
        threads = tokens / (time.perf_counter() - began)

        began = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="cpmjax-bench-") as cache:
            store = build_or_open(
                "text", corpus, tokenizer, held_out=0.01, on_bad="skip", cache=Path(cache), progress=lambda _: None
            )
            built = tokens / (time.perf_counter() - began)
            splits = (store.summary["train"], store.summary["held_out"])
        if sum(split["tokens"] - 2 * split["documents"] for split in splits) != tokens:
            raise ValueError("the store has another number of tokens than sentencepiece")

        began = time.perf_counter()
        processor.encode(texts, num_threads=1)
        one = tokens / (time.perf_counter() - began)

        began = time.perf_counter()
        content_key(corpus, "skip")
        key = time.perf_counter() - began

        yield sample("a store is built", "tokens/s", built)
        yield sample("sentencepiece alone, its own threads", "tokens/s", threads)
        yield sample("sentencepiece alone, one thread", "tokens/s", one)
        yield sample("built / its own threads", "", built / threads)
        yield sample("built / one thread", "", built / one)
        yield sample("the key's share of the time", "%", 100 * key * built / tokens)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--megabytes", type=int, default=50)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--vocabulary", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="cpmjax-bench-") as name:
        corpus = Jsonl(str(options.folder or name))
        if options.folder is None:
            write_default_text(Path(name) / "text.jsonl", options.megabytes * 10**6)
        if options.tokenizer is not None:
            tokenizer = Tokenizer.load(options.tokenizer)
        else:
            texts = (document.text for document in documents(corpus, "skip"))
            tokenizer = Tokenizer(train(texts, options.vocabulary, SAMPLE_BYTES))
        say(measure_building(corpus, tokenizer, options.rounds))
