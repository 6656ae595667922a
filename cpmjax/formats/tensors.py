"""What every reader of weights gives: names with shapes and types, and each tensor when it is asked for.

Files are mapped, never read whole: what a tensor costs before it is copied is no memory of ours.
"""

from __future__ import annotations

import abc
import mmap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cpmjax.run.errors import UserError

_POINTER = b"version https://git-lfs.github.com/spec/"


@dataclass(frozen=True)
class TensorInfo:
    shape: tuple[int, ...]
    dtype: np.dtype  # of what `read` gives: float32, float16, bfloat16 of ml_dtypes, an integer type
    stored: str  # the type as the file's format spells it: BF16, torch.bfloat16, Q4_K


class Tensors(Mapping[str, TensorInfo], abc.ABC):
    """Named tensors of one file or several. Opening checks all that the file says of itself."""

    def __init__(self, path: Path, infos: dict[str, TensorInfo]) -> None:
        self.path = path
        self._infos = infos

    @abc.abstractmethod
    def read(self, name: str) -> np.ndarray:
        """The tensor, read-only; where the file holds it as it is, a view of the mapped file. KeyError if unknown."""

    def __getitem__(self, name: str) -> TensorInfo:
        return self._infos[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def __len__(self) -> int:
        return len(self._infos)


class Shards(Tensors):
    """The tensors of several files as one."""

    def __init__(self, path: Path, files: Iterable[Tensors]) -> None:
        """`path` names the whole in errors. Raises UserError if two files hold the same name."""
        self._homes: dict[str, Tensors] = {}
        for file in files:
            for name in file:
                if name in self._homes:
                    raise UserError(f"{file.path}: holds {name}, which {self._homes[name].path} holds too")
                self._homes[name] = file
        super().__init__(path, {name: home[name] for name, home in self._homes.items()})

    def read(self, name: str) -> np.ndarray:
        return self._homes[name].read(name)


def map_file(path: Path, expected: str) -> np.ndarray:
    """The bytes of a file, uint8 [size], read-only and mapped.

    Raises UserError, saying what was `expected`, for a file that is missing or empty, and for the text that Git LFS
    leaves in the place of a file it has not fetched.
    """
    try:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            if size == 0:
                raise UserError(f"{path}: an empty file; expected {expected}")
            mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
        mapped.madvise(mmap.MADV_SEQUENTIAL)  # from one end to the other: the disk may read ahead
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; expected {expected}") from error
    if mapped[: len(_POINTER)] == _POINTER:
        raise UserError(f"{path}: a Git LFS pointer, not the file it stands for; expected {expected} (git lfs pull)")
    return np.frombuffer(mapped, np.uint8)
