"""How weights move from checkpoint to checkpoint: norms, updates, the way they go and how straight it is.

With W_t the weights at step t and d_t = W_t - W_s the update since the checkpoint before it: ||W_t||, its root mean
square, ||d_t||, max |d_t| (Figure 7 of the paper shows max d_t of single matrices, 500 steps apart), the path
sum ||d||, the displacement ||W_t - W_first||, the straightness displacement / path, cos(d_t, d_s). Norms are Frobenius
norms, of one slice (a layer of a parameter), or of many together: squares and products add up.

Arrays are taken as they are stored and summed in float64, a block of rows at a time. Weights in bfloat16 are rounded to
3 digits: an update of fewer is rounding. T checkpoints, V vocabulary, D width.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from cpmjax.checkpoint.series import Series
from cpmjax.run.table import Row

_BLOCK = 2**22  # numbers that are held in float64 at one time, of each array


def moves(
    now: np.ndarray,
    before: np.ndarray | None = None,
    earlier: np.ndarray | None = None,
    first: np.ndarray | None = None,
) -> Row:
    """Numbers of one slice at one checkpoint; `before`, `earlier` and `first` are the slice at the checkpoint before,
    at the one before that, and at the first of all, where there are such.

    size, norm; with `before` update and largest_update; with `earlier` turn, the product of the update and the one
    before it; with `first` displacement.
    """
    sums: dict[str, float] = defaultdict(float)
    largest, rows = 0.0, max(1, _BLOCK * len(now) // now.size)
    for start in range(0, len(now), rows):
        part = slice(start, start + rows)
        here = now[part].astype(np.float64)
        sums["norm"] += float(np.vdot(here, here))
        if before is not None:
            last = before[part].astype(np.float64)
            update = here - last
            sums["update"] += float(np.vdot(update, update))
            largest = max(largest, float(np.abs(update).max()))
            if earlier is not None:
                sums["turn"] += float(np.vdot(update, last - earlier[part]))
        if first is not None:
            here -= first[part]
            sums["displacement"] += float(np.vdot(here, here))
    found = {"size": now.size} | {name: value if name == "turn" else value**0.5 for name, value in sums.items()}
    return found if before is None else found | {"largest_update": largest}


@dataclass(frozen=True)
class Trajectory:
    """Of a set of slices together. [T] arrays; what needs one checkpoint before has nan first, the cosine twice."""

    steps: np.ndarray
    norm: np.ndarray
    rms: np.ndarray
    update: np.ndarray
    relative_update: np.ndarray  # beside the norm before it
    largest_update: np.ndarray
    path: np.ndarray
    displacement: np.ndarray
    straightness: np.ndarray  # in (0, 1]; 1: every update so far went the same way
    cosine: np.ndarray


def trajectories(rows: Iterable[Row], key: Callable[[Row], Hashable] = lambda row: "all") -> dict[Hashable, Trajectory]:
    """The rows of `moves`, each with its "step", put together by their keys, in the order in which keys appear."""
    groups: dict[Hashable, dict[int, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        groups[key(row)][row["step"]].append(row)
    return {name: _together(group) for name, group in groups.items()}


def _together(group: dict[int, list[Row]]) -> Trajectory:
    steps = sorted(group)

    def total(name: str, power: int = 1) -> np.ndarray:
        return np.array([sum(row.get(name, np.nan) ** power for row in group[step]) for step in steps], np.float64)

    norm, update, displacement = (total(name, 2) ** 0.5 for name in ("norm", "update", "displacement"))
    path = np.concatenate([[np.nan], np.cumsum(update[1:])])
    before = np.concatenate([[np.nan], update[:-1]])
    with np.errstate(invalid="ignore", divide="ignore"):  # of what did not move
        return Trajectory(
            steps=np.array(steps),
            norm=norm,
            rms=norm / total("size") ** 0.5,
            update=update,
            relative_update=update / np.concatenate([[np.nan], norm[:-1]]),
            largest_update=np.array(
                [max(row.get("largest_update", np.nan) for row in group[step]) for step in steps], np.float64
            ),
            path=path,
            displacement=displacement,
            straightness=displacement / path,
            cosine=total("turn") / (update * before),
        )


def summed_rates(series: Series, steps: Sequence[int]) -> np.ndarray | None:
    """The learning rates of all updates between two checkpoints, summed: [T], nan first. What moves as the rate alone
    says has a path in proportion to it. None where nobody knows the schedule, and there is no log."""
    logged = {record["step"]: record["learning_rate"] for record in series.log() if "learning_rate" in record}
    wanted = np.arange(steps[0] + 1, steps[-1] + 1)
    if all(step in logged for step in wanted.tolist()):
        rates = np.array([logged[step] for step in wanted.tolist()])
    elif series.stages():
        schedule = series.config.schedule.in_steps(series.config.batches)
        rates = series.config.optimizer.learning_rate * schedule.factor(wanted)
    else:
        return None
    sums = np.concatenate([[0.0], np.cumsum(rates)])[np.array(steps) - steps[0]]
    return np.array([np.nan, *(after - before for before, after in itertools.pairwise(sums))])


def frequency_groups(counts_V: np.ndarray, groups: int) -> np.ndarray:
    """[V]: 0 of tokens that never come, then 1 to `groups`, from rare to frequent, with as many tokens in each."""
    seen = np.flatnonzero(counts_V)
    ranked = seen[np.argsort(counts_V[seen], kind="stable")]
    found = np.zeros(len(counts_V), int)
    found[ranked] = 1 + np.arange(len(ranked)) * groups // max(1, len(ranked))
    return found


def embedding_norms(embedding_VD: np.ndarray, groups_V: np.ndarray) -> np.ndarray:
    """The mean norm of the embeddings of each group, 0 to the last one; nan of a group without tokens."""
    rows = max(1, _BLOCK // embedding_VD.shape[1])
    blocks = [embedding_VD[start : start + rows].astype(np.float64) for start in range(0, len(embedding_VD), rows)]
    norms_V = np.concatenate([np.linalg.norm(block, axis=1) for block in blocks])
    with np.errstate(invalid="ignore"):
        return np.bincount(groups_V, norms_V) / np.bincount(groups_V)
