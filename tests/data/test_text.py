from __future__ import annotations

import dataclasses

import pytest

from cpmjax.data import text, tokenizer
from cpmjax.run.config import Config, DataConfig, ModelConfig, RunConfig
from cpmjax.run.errors import UserError
from cpmjax.run.sources import TextFolder


def test_no_tokenizer_is_kept_of_a_corpus_that_changes_while_it_is_trained(tmp_path, monkeypatch):
    folder = tmp_path / "texts"
    folder.mkdir()
    for n in range(40):
        (folder / f"{n}.txt").write_text(" ".join(f"word{k}" for k in range(n, n + 30)))
    config = dataclasses.replace(
        Config(),
        run=RunConfig(cache=str(tmp_path / "cache")),
        model=ModelConfig(vocabulary=290),
        data=DataConfig(corpora={"words": TextFolder(str(folder))}, stable={"words": 1.0}),
    )
    train = tokenizer.train

    def change_and_train(*arguments):
        (folder / "0.txt").write_text("another text")
        return train(*arguments)

    monkeypatch.setattr(tokenizer, "train", change_and_train)
    with pytest.raises(UserError, match=r"^corpus words: changed while it was read; expected files that nobody writes"):
        text.make_tokenizer(config, print)
    assert not list((tmp_path / "cache").rglob("*.model"))
    assert text.make_tokenizer(config, print).vocabulary == 290  # as the file now stays as it is
