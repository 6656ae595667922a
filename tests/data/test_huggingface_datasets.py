"""Hugging Face datasets, against a folder as the hub would hold it, without a network."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from datasets import Dataset

from cpmjax.data.corpora import content_key, documents
from cpmjax.run.errors import UserError
from cpmjax.run.sources import HuggingFaceDataset

TEXTS = {"train": [f"row {n} — 三" for n in range(2500)], "test": ["one", "two"]}


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch) -> Path:
    """Two configurations; that of texts has two splits, train in two files."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "dataset"
    for name, rows in (
        ("train-0", TEXTS["train"][:2000]),
        ("train-1", TEXTS["train"][2000:]),
        ("test-0", TEXTS["test"]),
    ):
        (folder / "texts").mkdir(parents=True, exist_ok=True)
        Dataset.from_dict({"id": list(range(len(rows))), "text": rows}).to_parquet(folder / "texts" / f"{name}.parquet")
    Dataset.from_dict({"content": ["a", "b"]}).to_parquet(folder / "other.parquet")
    (folder / "README.md").write_text(
        "---\nconfigs:\n"
        "- config_name: texts\n  data_files:\n"
        "  - {split: train, path: 'texts/train-*'}\n  - {split: test, path: 'texts/test-*'}\n"
        "- config_name: other\n  data_files: other.parquet\n---\n"
    )
    return folder


def refusal(corpus: HuggingFaceDataset) -> str:
    with pytest.raises(UserError) as error:
        list(documents(corpus))
    message = str(error.value)
    assert "\n" not in message and "expected" in message
    return message


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_are_documents_whether_streamed_or_not(dataset, streaming):
    for split, texts in TEXTS.items():
        found = list(documents(HuggingFaceDataset(str(dataset), "texts", split, streaming=streaming)))
        assert [(document.name, document.text) for document in found] == [
            (f"{split}:{n}", text) for n, text in enumerate(texts, 1)
        ]
    other = HuggingFaceDataset(str(dataset), "other", field="content", streaming=streaming)
    assert [document.text for document in documents(other)] == ["a", "b"]


def test_rows_of_the_hub_are_downloaded_unless_told_otherwise(dataset, monkeypatch):
    """The folder stands for the hub."""
    load, kinds = datasets.load_dataset, []

    def of_the_hub(name: str, *settings: str, **options: object) -> object:
        assert name == "owner/name"
        kinds.append(load(str(dataset), *settings, **options))
        return kinds[-1]

    monkeypatch.setattr(datasets, "load_dataset", of_the_hub)
    for streaming in (False, True):
        found = documents(HuggingFaceDataset("owner/name", "texts", streaming=streaming))
        assert [document.text for document in found] == TEXTS["train"]
    assert list(map(type, kinds)) == [Dataset, datasets.IterableDataset]


@pytest.mark.parametrize("streaming", [False, True])
def test_what_is_not_in_a_dataset(dataset, streaming):
    def corpus(*names: str, field: str = "text") -> HuggingFaceDataset:
        return HuggingFaceDataset(str(dataset), *names, field=field, streaming=streaming)

    assert "no 'txt', the nearest key is 'text'" in refusal(corpus("texts", field="txt"))
    assert "its 'id' is a int" in refusal(corpus("texts", field="id"))
    assert f"{dataset}, dev: " in refusal(corpus("texts", "dev")) and "train" in refusal(corpus("texts", "dev"))
    assert f"{dataset}, train: " in refusal(corpus("text"))
    (dataset / "texts" / "test-0.parquet").write_bytes(b"PAR1 and no more")
    assert f"{dataset}, test: " in refusal(corpus("texts", "test"))
    with pytest.raises(UserError):
        list(documents(corpus("texts", "test"), "skip"))


def test_the_key_changes_with_the_files_and_the_settings(dataset):
    corpus = HuggingFaceDataset(str(dataset), "texts")
    keys = [content_key(corpus)]
    assert content_key(corpus) == keys[0]
    keys += [content_key(HuggingFaceDataset(str(dataset), "texts", "test")), content_key(corpus, "skip")]
    file = dataset / "texts" / "train-1.parquet"
    Dataset.from_dict({"id": [0], "text": ["new"]}).to_parquet(file)
    os.utime(file, (2e9, 2e9))
    keys.append(content_key(corpus))
    assert len(set(keys)) == len(keys)
    assert [document.text for document in documents(corpus)] == [*TEXTS["train"][:2000], "new"]


def test_a_dataset_that_cannot_be_had(tmp_path):
    """In a process that `datasets` takes for one without a network."""
    code = (
        "from cpmjax.data.corpora import documents\nfrom cpmjax.run.errors import UserError\n"
        "from cpmjax.run.sources import HuggingFaceDataset\n"
        "try:\n    list(documents(HuggingFaceDataset('nobody/nothing')))\n"
        "except UserError as error:\n    print(error)\n"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert line.startswith("nobody/nothing, train: ") and "expected what datasets.load_dataset can read" in line
