"""How many bytes of text a token stands for: any tokenizers, side by side, on the held-out text of an experiment.

    python experiments/benchmarks/bytes_per_token.py EXPERIMENT.yaml [--section.key=value ...] --tokenizers PATH ...

EXPERIMENT.yaml may be the config.yaml of a run. A tokenizer is whatever `cpmjax.load_tokenizer` reads: a run, a Hugging
Face folder, a .gguf or a .model file. The documents are those that the experiment holds out, so a tokenizer that it
trained has not seen them; begin and end of text are not counted. One line of JSON a measurement.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator
from typing import Any

from measured import sample, say

from cpmjax import load_tokenizer
from cpmjax.data.corpora import documents, held_out, placed
from cpmjax.model.presets import PRESETS
from cpmjax.run import cli
from cpmjax.run.config import DataConfig


def held_out_texts(data: DataConfig) -> Iterator[tuple[str, list[str]]]:
    """The held-out texts of each corpus that has some."""
    for name, corpus in data.corpora.items():
        found = documents(placed(corpus, data.folder), data.bad_documents, Counter())
        texts = [document.text for document in found if held_out(document.name, data.held_out)]
        if texts:
            yield name, texts


def main(argv: list[str]) -> None:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizers", nargs="+", required=True)
    arguments, experiment = parser.parse_known_args(argv)
    data = cli.load(experiment, PRESETS, __doc__ or "").data
    tokenizers = {path: load_tokenizer(path) for path in arguments.tokenizers}
    for corpus, texts in held_out_texts(data):
        size = sum(len(text.encode()) for text in texts)
        samples: list[dict[str, Any]] = []
        for path, tokenizer in tokenizers.items():
            tokens = sum(len(ids) - 2 for ids in tokenizer.encode_documents(texts))
            name = f"{corpus} ({size:,} bytes): {path} ({tokenizer.vocabulary:,} pieces), bytes a token"
            samples.append(sample(name, "bytes", size / tokens))
        say(samples)


if __name__ == "__main__":
    cli.main(main)
