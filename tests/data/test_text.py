from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import pytest

from cpmjax.data import text, tokenizer
from cpmjax.data.files import below
from cpmjax.data.mixture import Mixture, Segment
from cpmjax.run.batch_sizes import BatchSizes
from cpmjax.run.config import Config, DataConfig, ModelConfig, RunConfig
from cpmjax.run.errors import UserError
from cpmjax.run.identity import fingerprint
from cpmjax.run.schedule import WSD
from cpmjax.run.sources import TextFolder


def test_a_corpus_of_which_each_row_is_read_once(config):
    once = dataclasses.replace(config.data.corpora["others"], on_end="end")
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, corpora=config.data.corpora | {"others": once})
    )
    stores = text.open_stores(config, text.make_tokenizer(config, print), print)
    order = [Segment(40, config.data.stable), Segment(None, config.data.decay)]
    mixture = text.make_mixture(config, stores, order, 5000)
    found = text.Text(config, stores, mixture)
    read = [mixture.locate(position) for position in range(5000)]
    assert sorted(index for name, index in read if name == "others") == list(range(found.rows["others"].rows))
    assert "1.00 epochs by then" in found.describe(0, [("stable", 40), ("decay", 5000)]).splitlines()[-1]
    alone = [Segment(None, {"others": 1.0})]
    with pytest.raises(UserError, match=rf"at row {found.rows['others'].rows} of 5,000 each of others has been read"):
        text.make_mixture(config, stores, alone, 5000)


@pytest.fixture
def config(tmp_path) -> Config:
    """Two corpora, the second one for the decay alone."""
    for name, documents in (("words", 200), ("others", 60)):
        (tmp_path / name).mkdir()
        for n in range(documents):
            (tmp_path / name / f"{n}.txt").write_text(" ".join(f"{name}{k}" for k in range(n, n + 30)))
    return dataclasses.replace(
        Config(),
        run=RunConfig(cache=str(tmp_path / "cache")),
        model=ModelConfig(vocabulary=280),
        data=DataConfig(
            corpora={name: TextFolder(str(tmp_path / name)) for name in ("words", "others")},
            stable={"words": 2.0},
            decay={"words": 3.0, "others": 1.0},
            sequence_length=64,
        ),
    )


def test_shares_and_epochs_are_those_of_the_rows_that_are_read(config):
    stores = text.open_stores(config, text.make_tokenizer(config, print), print)
    mixture = Mixture([Segment(300, config.data.stable), Segment(None, config.data.decay)], seed=1)
    found = text.Text(config, stores, mixture)
    description = found.describe(50, [("stable", 300), ("decay", 1000)])
    begin, read = 50, Counter(mixture.locate(position)[0] for position in range(50))
    for (stage, end), line in zip((("stable", 300), ("decay", 1000)), description.splitlines()[-2:], strict=True):
        here = Counter(mixture.locate(position)[0] for position in range(begin, end))
        read += here
        shares = [
            f"{here[name] / (end - begin):.1%} {name}, {read[name] / found.rows[name].rows:.2f} epochs by then"
            for name in sorted(here)
        ]
        assert line == f"rows {begin:,} to {end:,} ({stage}): " + "; ".join(shares)
        begin = end
    assert f"read {read['words'] / found.rows['words'].rows:.2f} times by the end" in description


def test_a_resumed_run_says_of_which_corpus_the_text_has_changed(config):
    made = text.make_tokenizer(config, print)
    begun = {name: store.key for name, store in text.open_stores(config, made, print).items()}
    said: list[str] = []
    text.open_stores(config, made, said.append, begun)
    assert said == []
    (file, *_) = Path(config.data.corpora["words"].path).iterdir()
    file.write_text(file.read_text() + " and more")
    text.open_stores(config, made, said.append, begun)
    assert said[-1] == "corpus words: its text, or where it lies, is not what the run began with"


def test_a_corpus_of_weight_0_is_evaluated_and_nothing_else(config):
    weights = {"stable": config.data.stable | {"others": 0.0}, "decay": {"words": 3.0, "others": 0.0}}
    zero = dataclasses.replace(config, data=dataclasses.replace(config.data, **weights))
    made = text.make_tokenizer(zero, print)
    assert made.model == text.make_tokenizer(config, print).model
    stores = text.open_stores(zero, made, print)
    order = text.segments(WSD(warmup=2, stable=8, decay=10), zero.data, BatchSizes(4))
    assert order == [Segment(40, {"words": 2.0}), Segment(None, {"words": 3.0})]
    found = text.Text(zero, stores, text.make_mixture(zero, stores, order, 80))
    assert {found.mixture.locate(position)[0] for position in range(80)} == {"words"}
    assert set(found.held_out) == {"words", "others"}


def test_a_corpus_that_no_stage_names_is_said_not_to_be_read(config):
    for decay, said in (({"words": 1.0}, ["others"]), (config.data.decay, []), ({}, ["others"])):
        asked = dataclasses.replace(config, data=dataclasses.replace(config.data, decay=decay))
        stores = text.open_stores(asked, text.make_tokenizer(asked, print), print)
        found = text.Text(asked, stores, Mixture([Segment(None, asked.data.stable)], seed=1))
        lines = found.describe(0, [("stable", 40)]).splitlines()
        assert [line for line in lines if "not read" in line] == [
            f"corpus {name}: not read, neither data.stable nor data.decay names it" for name in said
        ]


def test_relative_paths_start_in_the_folder(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def stores(folder, path):
        corpora = {name: TextFolder(path.format(name)) for name in config.data.corpora}
        asked = dataclasses.replace(config, data=dataclasses.replace(config.data, corpora=corpora, folder=folder))
        opened = text.open_stores(asked, text.make_tokenizer(asked, print), print)
        return {name: store.summary["corpus"] for name, store in opened.items()}, fingerprint(asked)

    absolute, _ = stores("", str(tmp_path / "{}"))
    assert stores(str(tmp_path), "{}")[0] == stores("not here", str(tmp_path / "{}"))[0] == absolute
    relative, one = stores("", "{}")
    assert relative["words"] == repr(TextFolder("words"))  # the folders of stores that are there keep their names
    assert one == stores(f"../{tmp_path.name}/", "{}")[1]  # where text lies is no part of what a run is
    assert below("gs://bucket/texts/", "a.txt") == "gs://bucket/texts/a.txt"
    assert {path: below("texts", path) for path in ("/a", "~/a", "s3://a/b")} == {
        path: path for path in ("/a", "~/a", "s3://a/b")
    }


def test_no_tokenizer_is_kept_of_a_corpus_that_changes_while_it_is_trained(config, tmp_path, monkeypatch):
    train = tokenizer.train

    def change_and_train(*arguments):
        (tmp_path / "words" / "0.txt").write_text("another text")
        return train(*arguments)

    monkeypatch.setattr(tokenizer, "train", change_and_train)
    with pytest.raises(UserError, match=r"^corpus words: changed while it was read; expected files that nobody writes"):
        text.make_tokenizer(config, print)
    assert not list((tmp_path / "cache").rglob("*.model"))
    assert text.make_tokenizer(config, print).vocabulary == 280  # as the file now stays as it is
