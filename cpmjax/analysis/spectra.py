"""Singular values of weights: ranks, the directions that matter and how they turn, and what each head reads and writes.

Matrices are stored [input, output]. They are worked on in float64 on the host, in blocks of rows: a Gram matrix squares
the condition, and in float32 would lose every singular value below 3e-4 of the largest. In float64 those above 1e-5 of
the largest keep five digits, and what rounding alone would make is 0.

I input, O output, R the smaller of both, K directions or head width, D width, H heads, G key-value heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from cpmjax.run.config import ModelConfig

_BLOCK = 2**24  # numbers that are held in float64 at one time, beside the Gram matrix


@dataclass(frozen=True)
class Spectrum:
    """`input_IK` and `output_OK` are orthonormal bases of the leading singular directions of a matrix: those that it
    reads, and those that it writes."""

    values_R: np.ndarray  # descending
    input_IK: np.ndarray
    output_OK: np.ndarray


def spectrum(matrix_IO: np.ndarray, directions: int = 0, minus_IO: np.ndarray | None = None) -> Spectrum:
    """The singular values of a matrix, and a number of its leading directions, by the smaller Gram matrix; of the
    difference to another matrix, where that is given.

    About 3 s on a CPU core for 2304 x 5760, 7 s with directions.
    """
    wide = matrix_IO.shape[0] < matrix_IO.shape[1]
    tall_MR = matrix_IO.T if wide else matrix_IO
    minus_MR = minus_IO.T if wide and minus_IO is not None else minus_IO
    size, height = tall_MR.shape[1], max(1, _BLOCK // tall_MR.shape[1])

    def blocks() -> Iterator[np.ndarray]:
        for start in range(0, len(tall_MR), height):
            block = tall_MR[start : start + height].astype(np.float64)
            yield block if minus_MR is None else block - minus_MR[start : start + height]

    gram_RR = np.zeros((size, size))
    for block in blocks():
        gram_RR += block.T @ block
    if not directions:
        return Spectrum(_roots(np.linalg.eigvalsh(gram_RR)), np.zeros((0, 0)), np.zeros((0, 0)))
    squares_R, vectors_RR = np.linalg.eigh(gram_RR)
    short_RK = vectors_RR[:, ::-1][:, :directions]
    long_MK, _ = np.linalg.qr(np.concatenate([block @ short_RK for block in blocks()]))
    return Spectrum(_roots(squares_R), *((short_RK, long_MK) if wide else (long_MK, short_RK)))


def _roots(squares_R: np.ndarray) -> np.ndarray:
    """Ascending eigenvalues of a Gram matrix -> descending singular values; what is within its rounding is 0."""
    noise = len(squares_R) * np.finfo(np.float64).eps * squares_R[-1]
    return np.sqrt(np.where(squares_R > noise, squares_R, 0))[::-1]


def stable_rank(values_R: np.ndarray) -> np.ndarray:
    """||W||_F^2 / ||W||_2^2, over the last axis: between 1 and the rank; nan of a matrix of zeros."""
    with np.errstate(invalid="ignore"):
        return (values_R**2).sum(-1) / values_R.max(-1) ** 2


def effective_rank(values_R: np.ndarray) -> np.ndarray:
    """exp of the entropy of sigma / sum(sigma), over the last axis (Roy and Vetterli 2007): n of a multiple of the
    identity, 1 of rank one; nan of a matrix of zeros."""
    with np.errstate(invalid="ignore", divide="ignore"):
        shares = values_R / values_R.sum(-1, keepdims=True)
        return np.exp(-np.where(shares == 0, 0, shares * np.log(shares)).sum(-1))


def mup_norm(norm: float, inputs: int, outputs: int) -> float:
    """A spectral norm beside sqrt(outputs / inputs), where it stays as a model gets wider (Yang et al. 2310.17813)."""
    return norm / (outputs / inputs) ** 0.5


def principal_angles(one_NK: np.ndarray, other_NK: np.ndarray) -> np.ndarray:
    """The angles between two subspaces with orthonormal bases, in radians from 0 to pi / 2, ascending [K].

    From cosines and sines (Bjoerck and Golub 1973): a cosine alone knows no angle below 1e-8.
    """
    common_KK = one_NK.T @ other_NK
    cosines = np.linalg.svdvals(common_KK)
    sines = np.linalg.svdvals(other_NK - one_NK @ common_KK)[::-1]
    return np.arctan2(sines, cosines)


def overlap(one_NK: np.ndarray, other_NK: np.ndarray) -> float:
    """The mean squared cosine of the principal angles: 1 of equal subspaces, about K / N of two that are random."""
    return float(((one_NK.T @ other_NK) ** 2).sum() / one_NK.shape[1])


def product_values(first_IK: np.ndarray, second_KO: np.ndarray) -> np.ndarray:
    """Singular values of first @ second, descending [..., K], without making it: K is narrow. Axes before are heads."""
    first_KK, second_KK = np.linalg.qr(first_IK).R, np.linalg.qr(second_KO.swapaxes(-1, -2)).R
    return np.linalg.svdvals(first_KK @ second_KK.swapaxes(-1, -2))


def circuits(config: ModelConfig, layer: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """{"qk": [H, K], "ov": [H, K]}: the singular values of what each head does to the normalised residual stream.

    `layer` holds attention_norm, query, key, value and output of one layer; the gain of the norm belongs to the
    matrices that read through it. qk gives attention scores before the softmax, scaled by 1 / sqrt(K), between tokens
    at one place: the rotation that position adds between query and key is left out. ov is what a head adds where it
    looks, before the scale of the residual branch.
    """
    gain_D1 = np.asarray(layer["attention_norm"], np.float64)[:, None]

    def of_each_head(name: str) -> np.ndarray:
        matrix_DGK = (gain_D1 * np.asarray(layer[name], np.float64)).reshape(config.width, -1, config.head)
        return np.repeat(matrix_DGK.transpose(1, 0, 2), config.heads // matrix_DGK.shape[1], axis=0)

    query_HDK, key_HDK, value_HDK = map(of_each_head, ("query", "key", "value"))
    output_HKD = np.asarray(layer["output"], np.float64).reshape(config.heads, config.head, config.width)
    return {
        "qk": product_values(query_HDK, key_HDK.swapaxes(-1, -2)) / config.head**0.5,
        "ov": product_values(value_HDK, output_HKD),
    }
