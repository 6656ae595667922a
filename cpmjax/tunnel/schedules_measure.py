"""What is measured of a schedule: its losses, and those of the merges of a trunk's weights (Kaddour 2209.14981; WSM,
2507.17634), which are summed up as it trains."""

from __future__ import annotations

from collections.abc import Iterable

import jax
import jax.numpy as jnp

from cpmjax.analysis import merging
from cpmjax.model.parameters import Tree
from cpmjax.run.errors import UserError
from cpmjax.run.schedule import WSD
from cpmjax.run.table import Row
from cpmjax.tunnel.schedules import decaying
from cpmjax.tunnel.trials import Trial
from cpmjax.tunnel.workbench import Moment, Workbench

MERGED = (0.1, 0.2)  # of S: windows of the merges
_INTERVALS = 8  # between the weights of a tenth of S that are merged


def measure(workbench: Workbench, trial: Trial) -> list[Row]:
    """A row for each evaluation of the experiment, in a decay twice as often: step, training loss, held-out loss and
    bits per byte. The trunk at the experiment's own peak has a row for each merge of its last weights as well."""
    config, schedule = trial.config, trial.config.schedule
    if not workbench.text(config).held_out:
        raise UserError("data.held_out = 0: expected a share of held-out text, trials are judged by it")
    every = config.evaluation.every
    evaluated = {
        step
        for step in range(trial.after + 1, schedule.total + 1)
        if step == schedule.total or step % (max(1, every // 2) if schedule.stage(step) == "decay" else every) == 0
    }
    merges = _merges(schedule) if trial.labels["run"] == "constant" and isinstance(schedule, WSD) else {}
    sums: dict[str, Tree] = {}

    def evaluate(moment: Moment, parameters: Tree) -> Row:
        found = moment.program.evaluate(parameters, moment.scales.multipliers)
        return {"step": moment.step} | {key: found[key] for key in ("heldout_loss", "heldout_bits_per_byte")}

    def observe(moment: Moment) -> Iterable[Row]:
        for name, coefficients in merges.items():
            if share := coefficients.get(moment.step):
                part = jax.tree.map(lambda leaf, share=share: share * leaf, moment.parameters)
                sums[name] = jax.tree.map(jnp.add, sums[name], part) if name in sums else part
        if moment.step in evaluated:
            found = evaluate(moment, moment.parameters)
            yield {"step": moment.step, "loss": moment.loss} | found
        if moment.step == schedule.total:
            for name, merge in sums.items():
                yield {"method": name, "run": name, "after": moment.step} | evaluate(moment, merge)

    merged = {step for coefficients in merges.values() for step in coefficients}
    return workbench.train(trial, evaluated | merged, observe)


def _merges(schedule: WSD) -> dict[str, dict[int, float]]:
    """{method: {step: coefficient}} over the last weights of a trunk: their mean, and what imitates the decay."""
    total = schedule.total
    spacing = max(1, round(total / 10 / _INTERVALS))
    found = {}
    for share in MERGED:
        length = round(share * total)
        steps = [*range(total - length, total, spacing), total]
        found[f"lawa {100 * share:g}%"] = merging.lawa(steps, len(steps))
        found[f"wsm {100 * share:g}%"] = merging.wsm(steps, decaying(schedule, total, length))
    return found
