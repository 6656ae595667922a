"""Where documents come from: every kind of corpus, and the keys of each. `type` in the YAML chooses the kind.

A path is one of this machine, or a URL that fsspec reads: gs://, s3://, https://, ... (see `cpmjax.data.files`). A
relative one starts in `data.folder`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import draccus


@dataclass(frozen=True)
class CorpusConfig(draccus.ChoiceRegistry):
    """Where documents come from. `type` in the YAML chooses the kind.

    With `on_end: end` each row is read once, and the other corpora share the rows that it would have had from there on.
    The repr is part of a store's key, so it has only what says which documents there are.
    """

    on_end: Literal["repeat", "end"] = field(default="repeat", kw_only=True, repr=False)  # when all of it has been read

    @classmethod
    def default_choice_name(cls) -> str | None:
        return None


@CorpusConfig.register_subclass("standard_library")
@dataclass(frozen=True)
class StandardLibrary(CorpusConfig):
    """Source files of the Python that runs this, tests and the file of `language_reference` left out."""


@CorpusConfig.register_subclass("language_reference")
@dataclass(frozen=True)
class LanguageReference(CorpusConfig):
    """Prose of the Python language reference: each topic of `pydoc_data/topics.py` is a document."""


@CorpusConfig.register_subclass("text")
@dataclass(frozen=True)
class TextFolder(CorpusConfig):
    """A UTF-8 text file, or a folder of them (searched recursively); each file is a document."""

    path: str = ""
    glob: str = "*.txt"  # which files of a folder


@CorpusConfig.register_subclass("jsonl")
@dataclass(frozen=True)
class Jsonl(CorpusConfig):
    """A .jsonl, .jsonl.gz or .jsonl.zst file, or a folder of them; each line is a document."""

    path: str = ""
    field: str = "text"  # the key that holds the text


@CorpusConfig.register_subclass("chat")
@dataclass(frozen=True)
class Chat(CorpusConfig):
    """Like jsonl, but each line is a conversation: the text of it with MiniCPM's markers, <用户>question<AI>answer."""

    path: str = ""
    field: str = "messages"  # the key that holds [{"role": ..., "content": ...}, ...]


@CorpusConfig.register_subclass("parquet")
@dataclass(frozen=True)
class Parquet(CorpusConfig):
    """A .parquet file, or a folder of them; each row is a document."""

    path: str = ""
    field: str = "text"  # the column that holds the text


@CorpusConfig.register_subclass("array_record")
@dataclass(frozen=True)
class ArrayRecords(CorpusConfig):
    """A file of array records (NAME.array_record, also -00000-of-00010), or a folder of them; each is a document."""

    path: str = ""  # on this machine
    field: str | None = None  # null: a record is UTF-8 text; else JSON, and this is the key that holds the text


@CorpusConfig.register_subclass("huggingface")
@dataclass(frozen=True)
class HuggingFaceDataset(CorpusConfig):
    """What `datasets.load_dataset` reads: a dataset of the Hugging Face hub, or a folder; each row is a document."""

    name: str = ""  # OWNER/DATASET, or a folder
    config: str | None = None  # null: the only one, or the default
    split: str = "train"
    field: str = "text"  # the column that holds the text
    streaming: bool = False  # true: rows come as they are needed, and no copy stays on the disk; so it is of a folder
