"""The coordinate check: does any activation, or its change in training, grow or shrink with the size of the model?

Under muP every entry of every activation, and its change in a step, has a size that does not depend on the width
(Yang & Hu 2011.14522; Yang et al. 2203.03466, appendix D.1). A few training steps at several widths show it: mean |h|
and mean |h - h_0| on held-out rows, h_0 from before the first step, and their slopes in log2 over log2 of the width.
Branches are looked at before they are added, because the norms hide what happens behind them; the embedding and the
logits, because branches do not see those.

Logits are read out of random weights at first: theirs, and what a small update makes of them, are sums of m-fold many
random terms, which shrink as m ** -1/2 (2203.03466, appendix D.1), and rates and steps decide how long that outweighs
what is learned. So their slope may be anything from -1/2 to 0. Whether they learn as fast at every width, the loss
tells: to first order its change is the product of gradient and update, a mean in which those terms cancel, and which
under muP does not depend on the width at any rate.

The spectral form says the same of the weights (Yang, Simon & Bernstein
2310.17813): the operator norm of a change, in units of sqrt(fan out / fan in), does not depend on the width.

N layers, B rows, L queries, S keys, H heads, G key-value heads, R heads per key-value head, K head width, V vocabulary.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cpmjax.data.batches import held_out_batches
from cpmjax.model.mup import Multipliers
from cpmjax.model.parameters import Tree, flat, specs
from cpmjax.model.transformer import MiniCPM
from cpmjax.run.config import ComputeConfig, Config, ModelConfig
from cpmjax.run.errors import UserError
from cpmjax.run.schedule import Constant
from cpmjax.run.table import Row, aligned
from cpmjax.training.step import Batch
from cpmjax.tunnel.faults import FAULTS, table_of
from cpmjax.tunnel.sizes import Axis
from cpmjax.tunnel.trials import Trial
from cpmjax.tunnel.verdicts import Verdict
from cpmjax.tunnel.workbench import Moment, Workbench

STEPS = (0, 1, 3, 10)  # moments looked at
JUDGED = (3, 10)  # before that, logits pass through a transient of their initial values under a correct muP
BAR = 0.20  # the most that the slope of a coordinate may be away from what is expected of it
SPECTRAL_BAR = 1 / 3  # of an operator norm: within a factor of 2 over 8 times the width
QUANTITIES = (
    "embedding", "attention", "attention logits", "feed-forward", "residual stream", "final hidden", "logits", "loss"
)  # fmt: skip
LAYERED = ("attention", "attention logits", "feed-forward")  # of these there is one in each layer
_PROBED_ROWS = 4
_POWER_ITERATIONS = 100


def make_trials(config: Config, axes: Sequence[Axis], names: Sequence[str], seeds: int) -> list[Trial]:
    """Ten steps at the peak rate for each parametrisation, size and seed."""
    trials = []
    for name in names:
        for axis in axes:
            if axis.name == "layers" and name in FAULTS:
                continue  # the faults are in the width
            for value in axis.values:
                model = axis.model(config.model, value, name)
                for seed in range(seeds):
                    labels = {"parametrisation": name, "axis": axis.name, axis.name: value, "seed": seed}
                    schedule = Constant(warmup=0, length=STEPS[-1])
                    experiment = replace(config, run=replace(config.run, seed=seed), model=model, schedule=schedule)
                    trials.append(Trial(labels, experiment, table_of(name)))
    return trials


def measure(workbench: Workbench, trial: Trial) -> list[Row]:
    """A row for each moment and quantity: `size` of it, and of its `change` since before the first step."""
    config = trial.config
    probe = _probe(config, workbench)
    first: dict[str, Any] = {}

    def observe(moment: Moment) -> Iterable[Row]:
        model, compute = moment.program.config.model, config.compute
        values = coordinates(model, compute, moment.parameters, moment.scales.multipliers, probe)
        if moment.step == 0:
            first["values"] = values
            first["matrices"] = jax.tree.map(jnp.copy, _matrices(model, moment.parameters))
        sizes = _sizes(values, first["values"])
        norms = operator_norms(_matrices(model, moment.parameters), first["matrices"])
        for name, pair in jax.device_get({**sizes, **norms}).items():
            layers = zip(*map(np.atleast_1d, pair), strict=True)
            for layer, (size, change) in enumerate(layers):
                quantity = f"{name} {layer}" if name in LAYERED else name
                numbers = {"size": float(f"{size:.6g}"), "change": float(f"{change:.6g}")}  # float32 holds no more
                yield {"step": moment.step, "quantity": quantity} | numbers

    return workbench.train(trial, STEPS, observe)


def _probe(config: Config, workbench: Workbench) -> Batch:
    """Held-out rows of the first corpus of the stable mixture, the same for every trial."""
    held_out = workbench.text(config).held_out
    if not held_out:
        raise UserError("data.held_out = 0: expected a share of held-out text, the coordinate check looks at it")
    return next(held_out_batches(held_out[next(iter(config.data.stable))], _PROBED_ROWS, _PROBED_ROWS))


# What is measured.


@partial(jax.jit, static_argnames=("model", "compute"))
def coordinates(
    model: ModelConfig, compute: ComputeConfig, parameters: Tree, multipliers: Multipliers, batch: Batch
) -> dict[str, jax.Array]:
    """The quantities of the check; those of a layer are [N, ...], the loss is a scalar. Attention logits that nobody
    sees are 0."""
    taps = ("embedding", "query", "key", "attention", "feed_forward", "residual", "final", "logits")
    arguments = (batch["tokens"], batch["positions"], batch["segments"])
    _, tapped = MiniCPM(model, parameters, compute, multipliers)(*arguments, taps=taps)
    layers, rows, length, heads, width = tapped["query"].shape
    query_NBLGRK = tapped["query"].reshape(layers, rows, length, model.kv, heads // model.kv, width)
    scores_NBGRLS = jnp.einsum("nblgrk,nbsgk->nbgrls", query_NBLGRK, tapped["key"]) / math.sqrt(width)
    same_document = batch["segments"][:, :, None] == batch["segments"][:, None, :]
    visible_BLS = same_document & jnp.tril(jnp.ones((length, length), bool))
    return {
        "embedding": tapped["embedding"],
        "attention": tapped["attention"],
        "feed-forward": tapped["feed_forward"],
        "attention logits": jnp.where(visible_BLS[:, None, None], scores_NBGRLS, 0.0),
        "residual stream": tapped["residual"][-1],
        "final hidden": tapped["final"],
        "logits": tapped["logits"],
        "loss": jnp.average(
            optax.softmax_cross_entropy_with_integer_labels(tapped["logits"], batch["targets"]),
            weights=batch["weights"],
        ),
    }


@jax.jit
def _sizes(values: dict[str, jax.Array], first: dict[str, jax.Array]) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Mean |h| and mean |h - h_0|, for each layer where there are layers."""

    def mean(name: str, x: jax.Array) -> jax.Array:
        return jnp.mean(jnp.abs(x), axis=tuple(range(1 if name in LAYERED else 0, x.ndim)))

    return {name: (mean(name, value), mean(name, value - first[name])) for name, value in values.items()}


def _matrices(model: ModelConfig, parameters: Tree) -> dict[str, jax.Array]:
    roles = flat(specs(model))
    return {name: leaf for name, leaf in flat(parameters).items() if roles[name].role == "matrix"}


@jax.jit
def operator_norms(
    matrices: dict[str, jax.Array], first: dict[str, jax.Array]
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Largest singular values of weights [N, in, out] and of their changes, over sqrt(out / in); mean over layers.

    By power iteration, which comes within a per cent from below (LAPACK inside a compiled program can hang on a CPU).
    """

    def norm(x_NIO: jax.Array) -> jax.Array:
        fan_in, fan_out = x_NIO.shape[-2:]

        def iterate(_, v_NO: jax.Array) -> jax.Array:
            v_NO = jnp.einsum("nio,ni->no", x_NIO, jnp.einsum("nio,no->ni", x_NIO, v_NO))
            return v_NO / jnp.maximum(jnp.linalg.norm(v_NO, axis=-1, keepdims=True), 1e-30)

        start_NO = jax.random.normal(jax.random.key(0), (x_NIO.shape[0], fan_out))
        v_NO = jax.lax.fori_loop(0, _POWER_ITERATIONS, iterate, start_NO)
        largest_N = jnp.linalg.norm(jnp.einsum("nio,no->ni", x_NIO, v_NO), axis=-1)
        return jnp.mean(largest_N) * math.sqrt(fan_in / fan_out)

    return {
        f"spectral {name.removeprefix('layers/')}": (norm(matrix), norm(matrix - first[name]))
        for name, matrix in matrices.items()
    }


# What it says.


@dataclass(frozen=True)
class Slope:
    """The power with which a quantity grows: of its log2 in log2 of the size of the model, mean over seeds.

    NaN where a trial did not finish. `error` is the standard error over the seeds, NaN with only one.
    """

    parametrisation: str
    axis: str
    quantity: str
    kind: str  # size or change
    step: int
    value: float
    error: float

    @property
    def spectral(self) -> bool:
        return self.quantity.startswith("spectral")

    @property
    def bar(self) -> float:
        return SPECTRAL_BAR if self.spectral else BAR

    @property
    def judged(self) -> bool:
        """Whether the verdict goes by it. In depth that is what leaves the stack: no rule for Adam keeps every branch
        flat, and operator norms shrink where rates do."""
        return self.step in JUDGED and (self.axis == "width" or self.quantity in ("final hidden", "logits"))

    @property
    def least(self) -> float:
        """The lowest slope that is expected; the highest is 0."""
        return -0.5 if self.quantity == "logits" and self.axis == "width" else 0.0

    @property
    def beyond(self) -> float:
        """How far it is from what is expected."""
        return abs(self.value - min(max(self.value, self.least), 0.0))

    @property
    def within(self) -> bool:
        return self.beyond <= self.bar

    def __str__(self) -> str:
        error = "" if math.isnan(self.error) else f" ± {self.error:.2f}"
        expected = f" (expected: {self.least:g} to 0)" if self.least else ""
        return f"{self.kind} of {self.quantity} at step {self.step}: slope {self.value:+.2f}{error}{expected}"


def slopes(rows: Sequence[Row]) -> list[Slope]:
    """From the table of the trials. Over layers, the layers of a quantity are taken together."""
    layers: dict[tuple[str, str, str, str, int], dict[tuple[int, int], list[float]]] = {}
    incomplete = {(row["parametrisation"], row["axis"]) for row in rows if row["status"] != "finished"}
    for row in rows:
        if "quantity" not in row:
            continue
        quantity = base_name(row["quantity"]) if row["axis"] == "layers" else row["quantity"]
        for kind in ("size", "change") if row["step"] else ("size",):
            key = (row["parametrisation"], row["axis"], quantity, kind, row["step"])
            place = (row[row["axis"]], row["seed"])
            layers.setdefault(key, {}).setdefault(place, []).append(row[kind])
    found = []
    for key, places in layers.items():
        by_size: dict[int, list[float]] = defaultdict(list)
        for (size, _), values in places.items():
            by_size[size].append(float(np.mean(values)))
        value, error = (math.nan, math.nan) if key[:2] in incomplete else _fit(by_size)
        found.append(Slope(*key, value, error))
    return found


def _fit(by_size: dict[int, list[float]]) -> tuple[float, float]:
    """(slope, its standard error over seeds) of values by size, one a seed."""
    values = np.array(list(by_size.values()))
    if len(values) < 2 or not (np.isfinite(values).all() and (values > 0).all()):
        return math.nan, math.nan
    of_seeds = np.polyfit(np.log2(list(by_size)), np.log2(values), 1)[0]
    error = of_seeds.std(ddof=1) / math.sqrt(len(of_seeds)) if len(of_seeds) > 1 else math.nan
    return float(of_seeds.mean()), float(error)


def _place(quantity: str) -> tuple[int, str]:
    """Sorts quantities as the forward pass meets them, operator norms behind."""
    name = base_name(quantity)
    return (QUANTITIES.index(name) if name in QUANTITIES else len(QUANTITIES)), quantity


def base_name(quantity: str) -> str:
    """A quantity without the number of its layer."""
    return quantity.rstrip("0123456789").rstrip()


def verdicts(found: Sequence[Slope], name: str, axes: Iterable[str]) -> list[Verdict]:
    """What the slopes say of a parametrisation: the steepest that counts, in each form of the check along `axes`."""
    forms = {
        "coordinates over width": ("width", BAR, lambda slope: not slope.spectral),
        "operator norms over width": ("width", SPECTRAL_BAR, lambda slope: slope.spectral),
        "final hidden, logits over layers": ("layers", BAR, lambda slope: True),
    }
    judged = [slope for slope in found if slope.parametrisation == name and slope.judged]
    return [
        _verdict(name, form, [slope for slope in judged if slope.axis == axis and belongs(slope)], bar)
        for form, (axis, bar, belongs) in forms.items()
        if axis in axes
    ]


def _verdict(name: str, form: str, slopes: list[Slope], bar: float) -> Verdict:
    steepest = _steepest(slopes)
    if steepest is None:
        return Verdict(name, form, "no trial came to a step that counts", f"<= {bar:.2f}", False)
    return Verdict(name, form, str(steepest), f"<= {bar:.2f}", steepest.within)


def control_verdict(found: Sequence[Slope], name: str) -> Verdict:
    """Whether the check sees a planted fault: in at least one quantity, beyond the bar of that fault."""
    steepest = _steepest([s for s in found if s.parametrisation == name and s.judged and not s.spectral])
    bar = FAULTS[name].bar
    # A fault with which trials diverge is seen as well; their slopes are NaN.
    caught = steepest is None or not steepest.beyond <= bar
    return Verdict(f"fault {name}", "is caught", str(steepest or "every trial diverged"), f"> {bar:.2f}", caught)


def _steepest(slopes: Iterable[Slope]) -> Slope | None:
    return max(slopes, key=lambda slope: math.inf if math.isnan(slope.value) else slope.beyond, default=None)


def describe(found: Sequence[Slope], name: str, axis: str) -> str:
    """The table of slopes of a parametrisation in one form; a star marks what is beyond the bar of the verdict."""
    mine = {(s.quantity, s.kind, s.step): s for s in found if (s.parametrisation, s.axis) == (name, axis)}
    rows = [("slope over " + axis, *(f"{kind} {step}" for kind in ("size", "change") for step in STEPS))]
    for quantity in sorted({quantity for quantity, _, _ in mine}, key=_place):
        cells = []
        for kind in ("size", "change"):
            for step in STEPS:
                slope = mine.get((quantity, kind, step))
                star = "*" if slope is not None and slope.judged and not slope.within else ""
                cells.append("" if slope is None else f"{slope.value:+.2f}{star}")
        rows.append((quantity, *cells))
    return f"{name}\n{aligned(rows)}"
