"""From the data section of an experiment to tokenizer, tokenised corpora and the order in which rows are read."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from cpmjax.data import tokenizer as tokenizers
from cpmjax.data.batches import Batches, Rows
from cpmjax.data.corpora import check_unchanged, content_key, documents, held_out, placed
from cpmjax.data.mixture import Mixture, Segment, run_out
from cpmjax.data.tokenizer import Tokenizer
from cpmjax.data.tokens import Store, build_or_open
from cpmjax.run.batch_sizes import BatchSizes
from cpmjax.run.config import Config, DataConfig
from cpmjax.run.directory import write_atomically
from cpmjax.run.errors import UserError
from cpmjax.run.schedule import Schedule


class Text:
    """The text of a run: `batches` to train on, in the order of `mixture`, and `held_out` rows of each corpus."""

    def __init__(self, config: Config, stores: dict[str, Store], mixture: Mixture) -> None:
        length, seed = config.data.sequence_length, config.run.seed
        self.stores, self.mixture = stores, mixture
        self.unnamed = sorted(config.data.corpora.keys() - stores.keys())  # by either stage
        self.rows = {name: Rows(store.train, length, seed) for name, store in stores.items()}
        self._check_batch(config)
        self.batches = Batches(mixture, self.rows)
        self.held_out: dict[str, Rows] = {}
        if config.data.held_out:
            self.held_out = {name: Rows(store.held_out, length, None) for name, store in stores.items()}

    def _check_batch(self, config: Config) -> None:
        """Raises UserError if a batch would hold the same row of a corpus more than once."""
        sizes = [config.training.batch_size, *(rows for rows, _ in config.training.batch_warmup)]
        size, key = max(zip(sizes, ["batch_size", *["batch_warmup"] * len(sizes)], strict=False))
        for stage in ("stable", "decay"):
            weights = config.data.weights(stage)
            for name, weight in weights.items():
                share = math.ceil(size * weight / sum(weights.values()))
                rows = self.rows[name]
                if rows.rows < share:
                    raise UserError(
                        f"corpus {name}: {rows.rows} rows of {rows.length} tokens; expected at least the {share} that "
                        f"a batch takes of it: add text, or lower training.{key} = {size}"
                    )

    def describe(self, begin: int, stages: Sequence[tuple[str, int]]) -> str:
        """A line for each corpus and for each stage, given by its name and the position at which it ends.

        A corpus: its size, and how often it will have been read at the end; or that no stage names it. A stage: the
        share of its rows that each corpus gets (the first stage counts from `begin`), and the epochs of that corpus
        read by then.
        """
        read = self.mixture.counts(stages[-1][1])
        lines = []
        for name, store in self.stores.items():
            train, held_out = store.summary["train"], store.summary["held_out"]
            skipped = sum(store.summary["skipped"].values())
            lines.append(
                f"corpus {name}: {train['documents']:,} documents, {train['tokens']:,} tokens, "
                f"{train['bytes'] / max(1, train['tokens']):.2f} bytes a token; {held_out['documents']:,} documents "
                f"held out; read {read.get(name, 0) / self.rows[name].rows:.2f} times by the end"
                + (f"; {skipped} bad documents skipped" if skipped else "")
            )
        lines += [f"corpus {name}: not read, neither data.stable nor data.decay names it" for name in self.unnamed]
        before = self.mixture.counts(begin)
        for stage, end in stages:
            after = self.mixture.counts(end)
            shares = [
                f"{(after[name] - before[name]) / max(1, end - begin):.1%} {name}, "
                f"{after[name] / self.rows[name].rows:.2f} epochs by then"
                for name in after
                if after[name] > before[name]
            ]
            lines.append(f"rows {begin:,} to {end:,} ({stage}): {'; '.join(shares)}")
            begin, before = end, after
        return "\n".join(lines)


def make_tokenizer(config: Config, progress: Callable[[str], None]) -> Tokenizer:
    """The tokenizer of `data.tokenizer.path`, or one trained on the stable corpora without their held-out documents.

    A trained one is kept in the cache, keyed by the text and the settings. Raises UserError if its pieces and
    `model.vocabulary` do not agree.
    """
    data = config.data
    if data.tokenizer.path is not None:
        tokenizer = Tokenizer.load(Path(data.tokenizer.path).expanduser())
    else:
        contents = _contents(data)
        parts = (list(contents.values()), config.model.vocabulary, data.tokenizer.sample_bytes, data.held_out)
        key = hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
        file = Path(config.run.cache).expanduser() / "tokenizers" / f"{key}.model"
        if not file.is_file():
            progress(f"tokenizer: training {config.model.vocabulary:,} pieces")
            model = tokenizers.train(_training_text(data), config.model.vocabulary, data.tokenizer.sample_bytes)
            for name, content in _contents(data).items():
                check_unchanged(name, contents[name], content)
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, model)
        tokenizer = Tokenizer.load(file)
    if tokenizer.vocabulary != config.model.vocabulary:
        raise UserError(
            f"model.vocabulary = {config.model.vocabulary}: expected {tokenizer.vocabulary}, the pieces of "
            f"{data.tokenizer.path}"
        )
    return tokenizer


def _contents(data: DataConfig) -> dict[str, str]:
    """The key of each stable corpus."""
    return {
        name: content_key(placed(data.corpora[name], data.folder), data.bad_documents)
        for name in sorted(data.weights("stable"))
    }


def _training_text(data: DataConfig) -> Iterator[str]:
    for name in sorted(data.weights("stable")):
        for document in documents(placed(data.corpora[name], data.folder), data.bad_documents, Counter()):
            if not held_out(document.name, data.held_out):
                yield document.text


def open_stores(
    config: Config, tokenizer: Tokenizer, progress: Callable[[str], None], begun: Mapping[str, str] = {}
) -> dict[str, Store]:
    """The tokenised corpora that the two stages name, built where they are not in the cache yet.

    `begun` has the keys of those that a run began with, by corpus (see `build_or_open`); `progress` also says of which
    corpus it is another one now.
    """
    data = config.data
    stores = {
        name: build_or_open(
            name,
            placed(data.corpora[name], data.folder),
            tokenizer,
            held_out=data.held_out,
            on_bad=data.bad_documents,
            cache=Path(config.run.cache),
            progress=progress,
            begun=begun.get(name),
        )
        for name in sorted(data.stable.keys() | data.decay.keys())
    }
    for name, store in stores.items():
        if begun.get(name, store.key) != store.key:
            progress(f"corpus {name}: its text, or where it lies, is not what the run began with")
    return stores


def make_mixture(config: Config, stores: dict[str, Store], order: Sequence[Segment], end: int) -> Mixture:
    """The rows of a run of `end` rows in this order, each corpus of `on_end: end` no more than once.

    Raises UserError if nothing is left to read before the end.
    """
    length, seed = config.data.sequence_length, config.run.seed
    limits = {
        name: Rows(store.train, length, seed).rows
        for name, store in stores.items()
        if config.data.corpora[name].on_end == "end"
    }
    return Mixture(run_out(order, seed, limits, end), seed)


def segments(
    schedule: Schedule, data: DataConfig, batches: BatchSizes, first_step: int = 0, first_position: int = 0
) -> list[Segment]:
    """The mixture of every row: the decay's in the decay stages of the schedule (in steps), the stable one elsewhere.

    Neighbouring stages of equal mixture are one segment, so that a branch reads what its trunk read up to the branch
    point. A run that begins with another number of rows behind it than its steps say (`first_position` after
    `first_step`: a parent of another batch size, or none known) counts those rows as stable ones.
    """
    pieces: list[tuple[int, dict[str, float]]] = []
    if first_position != batches.rows(first_step):
        pieces.append((first_position, data.weights("stable")))
    else:
        first_step = 0
    for stage in schedule.stages():
        rows = batches.rows(max(stage.last, first_step)) - batches.rows(max(stage.first - 1, first_step))
        pieces.append((rows, data.weights(stage.name)))
    merged: list[tuple[int, dict[str, float]]] = []
    for rows, weights in pieces:
        if merged and merged[-1][1] == weights:
            merged[-1] = (merged[-1][0] + rows, weights)
        elif rows:
            merged.append((rows, weights))
    return [Segment(rows, weights) for rows, weights in merged[:-1]] + [Segment(None, merged[-1][1])]
