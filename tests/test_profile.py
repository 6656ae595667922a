"""A trace of some steps of a real job, and where that job's time went."""

from __future__ import annotations

import re

import jobs
import pytest
from jax.profiler import ProfileData

STEPS = 8
KINDS = {"steps", "start-up", "waiting for data", "evaluation", "saving", "profiling"}


@pytest.mark.slow
def test_a_job_traces_its_steps_and_says_where_its_time_went(tmp_path_factory):
    folder = jobs.shared_folder(tmp_path_factory)
    experiment = jobs.experiment(
        folder, "profiled", schedule={"type": "wsd", "warmup": 1, "stable": 5, "decay": 2}, checkpoint={"every": 3}
    )
    said = jobs.train(experiment, "--log.profile_steps=3:5")  # 3 is saved, 5 is evaluated
    run = folder / "profiled"

    (trace,) = (run / "profile").rglob("*.xplane.pb")
    events = [
        event for plane in ProfileData.from_file(str(trace)).planes for line in plane.lines for event in line.events
    ]
    steps = [dict(event.stats)["step_num"] for event in events if event.name == "train"]
    assert sorted(steps) == [3, 4, 5]

    records = jobs.records(run, clock=True)
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    assert all(0 < record["goodput"] < 1 for record in records)
    assert [record["step"] for record in records if "heldout_loss" in record] == [5, STEPS]
    share, total, parts = re.findall(r"^goodput ([\d.]+)% of ([\d.]+) s: (.*)$", said, re.MULTILINE)[0]
    seconds = {kind: float(part) for kind, part in re.findall(r"([a-z -]+) ([\d.]+) s(?:, |$)", parts)}
    assert seconds.keys() == KINDS and 0 < float(share) < 100
    assert all(part >= 0 for part in seconds.values()) and seconds["start-up"] > 0
    assert sum(seconds.values()) == pytest.approx(float(total), abs=0.05 * (len(KINDS) + 1))  # each is rounded
