"""What is finished stays finished: the ledger of a study under repetition, extension, divergence and failure."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from cpmjax.model.mup import PARAMETRISATIONS
from cpmjax.run.config import Config
from cpmjax.run.errors import UserError
from cpmjax.run.table import read_csv
from cpmjax.tunnel.faults import FAULTS
from cpmjax.tunnel.trials import Diverged, Trial, Trials

TABLE = PARAMETRISATIONS["minicpm"]


def trial(rate: float, seed: int = 0, **labels) -> Trial:
    config = Config()
    config = replace(
        config,
        run=replace(config.run, seed=seed),
        optimizer=replace(config.optimizer, learning_rate=rate),
    )
    return Trial({"learning_rate": rate, "seed": seed} | labels, config, TABLE)


def run(folder, trials, measure, recipe="text"):
    study = Trials(folder, trials, recipe)
    with study.lock():
        study.run(measure)
    return study


class Measure:
    """Two rows a trial; remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[float] = []

    def __call__(self, trial: Trial) -> list[dict]:
        rate = trial.config.optimizer.learning_rate
        self.asked.append(rate)
        return [{"step": step, "loss": rate * step} for step in (1, 2)]


def test_a_table_has_a_line_for_each_row(tmp_path):
    study = run(tmp_path, [trial(0.1), trial(0.2)], Measure())
    rows = read_csv(study.table_file)
    assert [(row["learning_rate"], row["step"], row["loss"]) for row in rows] == [
        (0.1, 1, 0.1),
        (0.1, 2, 0.2),
        (0.2, 1, 0.2),
        (0.2, 2, 0.4),
    ]
    assert {row["status"] for row in rows} == {"finished"}


def test_nothing_is_done_twice_and_more_is_added(tmp_path):
    measure = Measure()
    run(tmp_path, [trial(0.1), trial(0.2)], measure)
    study = run(tmp_path, [trial(0.1), trial(0.2), trial(0.4), trial(0.1, seed=1)], measure)
    assert measure.asked == [0.1, 0.2, 0.4, 0.1]
    assert len(study.rows()) == 8
    smaller = run(tmp_path, [trial(0.4)], measure)
    assert measure.asked == [0.1, 0.2, 0.4, 0.1]
    assert [row["learning_rate"] for row in read_csv(smaller.table_file)] == [0.4, 0.4]


def test_what_ended_elsewhere_is_recorded_and_not_run(tmp_path):
    """Once, a failure as well; one that has ended by the next time takes its place."""

    def left(status, *rows):
        return {"labels": {}, "status": status, "message": "", "seconds": 1.0, "rows": list(rows)}

    trials, measure = [trial(0.1, worker=1), trial(0.2, worker=2), trial(0.4)], Measure()
    for second in (left("failed"), left("finished", {"step": 2, "loss": 9.0})):
        study = Trials(tmp_path, trials, "text")
        with study.lock():
            study.record([(trials[0], left("finished", {"step": 2, "loss": 7.0})), (trials[1], second)])
            assert [row["status"] for row in read_csv(study.table_file)[:2]] == ["finished", second["status"]]
            study.run(measure)
        assert measure.asked == [0.4]
    assert [(row.get("worker"), row["status"], row["loss"]) for row in read_csv(study.table_file)] == [
        (1, "finished", 7.0),
        (2, "finished", 9.0),
        (None, "finished", 0.4),
        (None, "finished", 0.8),
    ]
    assert len((tmp_path / "trials.jsonl").read_text().splitlines()) == 4


def test_what_a_result_depends_on_is_its_identity(tmp_path):
    first = trial(0.1)
    others = [
        trial(0.1, seed=1),
        trial(0.2),
        replace(first, table=FAULTS["slow_embedding"].table),
        replace(first, config=replace(first.config, model=replace(first.config.model, scale_emb=1.0))),
    ]
    names = {each.identity("text") for each in [first, *others]} | {first.identity("other text")}
    assert len(names) == 6
    elsewhere = replace(first, config=replace(first.config, run=replace(first.config.run, directory="elsewhere")))
    assert elsewhere.identity("text") == replace(first, labels={}).identity("text") == first.identity("text")
    measure = Measure()
    run(tmp_path, [first], measure)
    run(tmp_path, [first], measure, recipe="other text")
    assert len(measure.asked) == 2


def test_one_run_under_two_labels_is_trained_once(tmp_path):
    """The smallest width at the base depth is also the smallest depth."""
    measure = Measure()
    study = run(tmp_path, [trial(0.1, axis="width"), trial(0.1, axis="layers")], measure)
    assert measure.asked == [0.1]
    assert [row["axis"] for row in study.rows()] == ["width", "width", "layers", "layers"]


def test_a_trial_that_diverges_is_a_row_and_is_not_repeated(tmp_path):
    asked = []

    def measure(trial):
        asked.append(trial)
        raise Diverged("loss not finite by step 7", [{"step": 1, "loss": 2.0}])

    for _ in range(2):
        study = run(tmp_path, [trial(0.1)], measure)
    assert len(asked) == 1
    (row,) = read_csv(study.table_file)
    assert (row["status"], row["message"], row["loss"]) == ("diverged", "loss not finite by step 7", 2.0)


def test_a_trial_that_fails_is_a_row_and_is_tried_again(tmp_path):
    measure = Measure()

    def failing(trial):
        if trial.config.optimizer.learning_rate == 0.1:
            raise MemoryError("no room\nfor it")
        return measure(trial)

    study = run(tmp_path, [trial(0.1), trial(0.2)], failing)
    failed, *finished = read_csv(study.table_file)
    assert (failed["status"], failed["message"]) == ("failed", "MemoryError: no room for it")
    assert len(finished) == 2
    study = run(tmp_path, [trial(0.1), trial(0.2)], measure)
    assert measure.asked == [0.2, 0.1]
    assert [row["status"] for row in study.rows()] == ["finished"] * 4


def test_a_mistake_of_the_user_ends_the_study(tmp_path):
    def measure(trial):
        raise UserError("data.held_out = 0")

    with pytest.raises(UserError, match="held_out"):
        run(tmp_path, [trial(0.1)], measure)
    assert (tmp_path / "trials.jsonl").read_text() == ""


def test_a_line_that_a_kill_cut_short_is_done_again(tmp_path):
    measure = Measure()
    run(tmp_path, [trial(0.1), trial(0.2)], measure)
    ledger = tmp_path / "trials.jsonl"
    ledger.write_bytes(ledger.read_bytes()[:-20])
    study = run(tmp_path, [trial(0.1), trial(0.2)], measure)
    assert measure.asked == [0.1, 0.2, 0.2]
    assert [json.loads(line)["labels"]["learning_rate"] for line in ledger.read_text().splitlines()] == [0.1, 0.2]
    assert len(study.rows()) == 4


def test_a_study_is_alone_in_its_directory_and_not_in_a_run(tmp_path):
    study = Trials(tmp_path, [], "text")
    with study.lock(), pytest.raises(UserError, match="another process is writing this study"), study.lock():
        pass
    (tmp_path / "config.yaml").write_text("# fingerprint: 0\n")
    with pytest.raises(UserError, match="is a run; expected a directory of its own"), study.lock():
        pass


def test_progress_says_what_is_done_and_how_long_it_takes(tmp_path, capsys):
    run(tmp_path, [trial(0.1, parametrisation="minicpm"), trial(0.2, parametrisation="minicpm")], Measure())
    assert "trial 1/2: learning_rate 0.1 seed 0 minicpm; ETA ?" in capsys.readouterr().err
    run(tmp_path, [trial(0.1), trial(0.2), trial(0.3)], Measure())
    said = capsys.readouterr().err
    assert "2 of 3 trials had ended before" in said and "trial 3/3: learning_rate 0.3" in said


def test_the_cost_grows_with_steps_and_size():
    short = trial(0.1)
    longer = replace(short, config=replace(short.config, schedule=replace(short.config.schedule, stable=9000)))
    wider = replace(short, config=replace(short.config, model=replace(short.config.model, width=1024)))
    assert longer.cost > 5 * short.cost and wider.cost > 10 * short.cost
