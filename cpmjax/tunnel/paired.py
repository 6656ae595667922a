"""How sure a difference is that was measured with a few seeds, each on the same rows for both sides."""

from __future__ import annotations

import math

import numpy as np
from scipy.special import stdtrit

from cpmjax.analysis.rows import Interval


def t_interval(values: np.ndarray) -> Interval:
    """The mean over seeds and its 95 % interval by Student's t: right if seeds differ as a normal distribution does.

    One seed has no interval: its ends are NaN.
    """
    mean, count = float(np.mean(values)), len(values)
    if count < 2 or not np.isfinite(values).all():
        return Interval(mean, math.nan, math.nan)
    half = float(stdtrit(count - 1, 0.975) * np.std(values, ddof=1) / math.sqrt(count))
    return Interval(mean, mean - half, mean + half)


def signed(interval: Interval) -> str:
    between = "no interval" if math.isnan(interval.low) else f"{interval.low:+.4f} to {interval.high:+.4f}"
    return f"{interval.value:+.4f} ({between})"
