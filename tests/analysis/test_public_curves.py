"""The public curves: their schedules against the rates that their logs hold, and what is said of a copy of them."""

from __future__ import annotations

import numpy as np
import pytest

from cpmjax.analysis import public_curves
from cpmjax.analysis.decay_prediction import predict
from cpmjax.run.errors import UserError


@pytest.mark.parametrize(
    ("name", "updates", "step", "rate"),
    [
        ("constant_24000", 24_000, 23936, 3e-4),
        ("constant_72000", 72_000, 71936, 3e-4),
        ("cosine_24000", 24_000, 2288, 0.0002999771173709568),
        ("cosine_24000", 24_000, 23920, 3.000893868085248e-05),
        ("wsd_20000_24000", 24_000, 2304, 3e-4),
        ("wsd_20000_24000", 24_000, 23904, 3.170452527640976e-05),
        ("wsd_20000_24000", 24_000, 23936, 3.112585247454037e-05),
        ("wsdld_20000_24000", 24_000, 23904, 3.648e-05),
        ("wsdcon_3", 16_000, 2304, 3e-4),
        ("wsdcon_3", 16_000, 15936, 3e-5),
        ("wsdcon_18", 16_000, 8000, 1.8e-4),
    ],
)
def test_a_schedule_has_the_rates_of_its_log(name, updates, step, rate):
    found = public_curves.rates(name)
    assert len(found) == updates and found[step] == pytest.approx(rate, rel=1e-12)
    assert found[0] == 0 and found[2159] == 3e-4  # the warm-up


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A copy of one size whose losses are what its law says, 0.01 more in the last row of each log."""
    folder = tmp_path_factory.mktemp("public")
    (folder / "csv_25").mkdir()
    for name in (*public_curves.SEEN, *public_curves.NOT_SEEN):
        rates = public_curves.rates(name)
        steps = np.array([2304, 9000, len(rates) - 64, len(rates)])  # the last one is after the end
        losses = predict(public_curves.FITTED[25], rates, steps[:3] + 1).tolist()
        losses[-1] += 0.01
        rows = [f"{step},{rates[step]},{loss}" for step, loss in zip(steps[:3], losses, strict=True)]
        rows += [f"{steps[3]},0,9.9"]
        (folder / "csv_25" / f"{name}.csv").write_text("\n".join(["step,lr,loss", *rows]) + "\n")
    return folder


def test_a_copy_is_read_with_losses_after_their_updates(folder):
    curves = public_curves.read(folder, 25)
    assert len(curves) == 9
    for name, curve in curves.items():
        errors_T = predict(public_curves.FITTED[25], curve.rates_S, curve.steps_T, curve.warmup) - curve.losses_T
        assert errors_T == pytest.approx([0, 0, -0.01], abs=1e-9), name
        assert curve.steps_T[0] == 2305


def test_a_copy_that_is_not_whole(folder, tmp_path):
    with pytest.raises(UserError, match=r"csv_100/constant_24000\.csv: No such file or directory; expected a table of"):
        public_curves.read(folder, 100)
    (tmp_path / "csv_400").mkdir()
    (tmp_path / "csv_400" / "constant_24000.csv").write_text("step,lr\n2176,0.0003\n")
    with pytest.raises(UserError, match=r"constant_24000\.csv: KeyError: 'loss'; expected a table of the columns step"):
        public_curves.read(tmp_path, 400)
