"""The benchmark of checkpoints, on a state of kilobytes; how fast anything is, is not for a test to say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

_SCRIPT = """
import sys, pathlib, checkpoints, measured
checkpoints.config_of = lambda layers: checkpoints.ModelConfig(vocabulary=64, width=32, layers=layers, heads=4)
checkpoints.main(pathlib.Path(sys.argv[1]), rounds=2, layers=2)
"""


def test_every_round_measures_all_of_it(tmp_path: Path) -> None:
    benchmarks = Path(__file__).parents[2] / "experiments" / "benchmarks"
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(benchmarks)!r})\n{_SCRIPT}", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [each["name"] for each in found].count("restore onto another mesh") == 2
    assert all(each["sample"] > 0 for each in found) and found[0]["sample"] * 1e6 > 3 * 4 * 64 * 32
    assert {each["name"]: each["bar"] or each["floor"] for each in found if each["bar"] or each["floor"]} == {
        "blocking": 0.2,
        "save": 483,
        "restore": 736,
        "restore onto another mesh": 736,
    }
    assert list(tmp_path.iterdir()) == []
