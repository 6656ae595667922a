"""Shows that a run survives being killed: at any moment, any number of times, to the last bit.

    python experiments/benchmarks/kill_test.py [--kills 20] [--seed 0]

A small run is made once without interruption. Then the same run is started again and again and ended with SIGKILL
after a random time: while it imports, trains its tokenizer, builds its token stores, compiles, trains, evaluates,
samples or saves. It is restarted until it is complete; then the next one begins, in an empty folder with an empty
cache. After each kill, what lies on the disk (lines of metrics and samples, every complete checkpoint with parameters
and moments) is compared with the uninterrupted run; a complete run must be equal in everything not from the clock.
About five minutes on 2 CPU cores. The exit code is 1 if anything was not equal.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

import jobs


def main(kills: int, seed: int, folder: Path) -> int:
    draw = random.Random(seed)
    experiment = jobs.experiment(
        folder,
        "uninterrupted",
        # Long enough for most kills to come after the first step.
        schedule={"warmup": 20, "stable": 180, "decay": 50},
        checkpoint={"every": 10},
        evaluation={"every": 10},
    )
    cold, warm = (_seconds(experiment, folder, name) for name in ("uninterrupted", "repeated"))
    expected = jobs.outcome(folder / "uninterrupted")
    equal = not jobs.unequal(jobs.outcome(folder / "repeated"), expected)
    print(
        f"uninterrupted: {cold:.1f} s, {warm:.1f} s with a full cache, {'equal' if equal else 'NOT EQUAL'}", flush=True
    )

    killed = completed = 0
    restarts = False  # whether the run at hand has been killed before
    while killed < kills or restarts:
        run = folder / f"killed-{completed}"
        process = jobs.start(experiment, f"--run.directory={run}", f"--run.cache={run}-cache")
        if killed < kills:
            after = draw.uniform(0, warm if restarts else cold)
            try:
                process.wait(after)
            except subprocess.TimeoutExpired:
                jobs.kill(process)
                killed, restarts = killed + 1, True
                wrong = jobs.unequal(jobs.outcome(run), expected, finished=False)
                steps = jobs.steps_of(run)
                print(
                    f"kill {killed:3} of run {completed} after {after:5.2f} s: {_doing(run)}, "
                    f"{jobs.lines_of(run)} lines, {len(steps)} checkpoints: {_verdict(wrong)}",
                    flush=True,
                )
                equal &= not wrong
                continue
        code, stderr = jobs.finish(process)
        wrong = jobs.unequal(jobs.outcome(run), expected) if code == 0 else [stderr]
        print(f"run {completed} complete: {_verdict(wrong)}", flush=True)
        equal &= not wrong
        completed, restarts = completed + 1, False
    print(f"{killed} kills, {completed} runs completed: {'all bit-equal' if equal else 'NOT EQUAL'}")
    return 0 if equal else 1


def _seconds(experiment: Path, folder: Path, name: str) -> float:
    began = time.monotonic()
    jobs.train(experiment, f"--run.directory={folder / name}")
    return time.monotonic() - began


def _doing(run: Path) -> str:
    """What the run was at when it was killed, from what it left."""
    if list((run.parent / f"{run.name}-cache" / "tokens").glob("*.building")):
        return "building a store"
    if not (run / "config.yaml").exists():
        return "before the run was created"
    if not (run / "metrics.jsonl").exists():
        return "before the first step"
    return "during a save" if list((run / "checkpoints").glob("*.orbax-checkpoint-tmp")) else "between saves"


def _verdict(wrong: list[str]) -> str:
    return "NOT EQUAL: " + ", ".join(wrong[:5]) if wrong else "equal"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        sys.exit(main(arguments.kills, arguments.seed, Path(temporary)))
