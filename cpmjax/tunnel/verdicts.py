"""What a study found, criterion by criterion, beside what it was measured against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cpmjax.run.table import aligned


@dataclass(frozen=True)
class Verdict:
    subject: str  # what was judged
    criterion: str
    measured: str
    bar: str
    passed: bool


def describe(found: Sequence[Verdict]) -> str:
    """A table, and a last line that says whether all passed."""
    rows = [("subject", "criterion", "measured", "bar", "verdict")]
    rows += [(v.subject, v.criterion, v.measured, v.bar, "pass" if v.passed else "FAIL") for v in found]
    failed = [f"{v.subject}: {v.criterion} ({v.measured}, bar {v.bar})" for v in found if not v.passed]
    last = f"verdict: FAIL: {'; '.join(failed)}" if failed else f"verdict: pass, {len(found)} of {len(found)} criteria"
    return f"{aligned(rows)}\n\n{last}"
