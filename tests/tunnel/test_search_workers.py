"""Workers of one search: together they make every trial once, whoever is killed, wherever the storage is."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cpmjax.run.errors import UserError
from cpmjax.tunnel import search_workers
from cpmjax.tunnel.search_workers import Workers

ROOT = Path(__file__).parents[2]
SPACE = {"scale_depth": (0.3, 6.0), "scale_emb": (1.0, 50.0), "init_std": (0.01, 1.0), "learning_rate": (0.001, 0.1)}
OWN = {"scale_depth": 1.4, "scale_emb": 12.0, "init_std": 0.1, "learning_rate": 0.01}


@pytest.fixture(autouse=True)
def installed():
    pytest.importorskip("optuna", reason="needs Optuna, which searches")


def bowl(values):
    """Lowest at learning rate 0.02, which matters most, and at init_std 0.05."""
    return math.log2(values["learning_rate"] / 0.02) ** 2 + 0.1 * math.log2(values["init_std"] / 0.05) ** 2


def join(directory, count, url=None, seed=0):
    return Workers(directory, url, "search", SPACE, OWN, count, seed)


def work(worker, most=math.inf, loss=bowl):
    """Trains trials until there are none left for this worker, or it has trained `most`."""
    while most > 0 and (taken := worker.take()) is not None:
        worker.give(taken.number, loss(taken.values), [{"status": "finished", "seconds": 0.0}])
        most -= 1


def values_of(worker):
    return [ended.values for ended in worker.ended()]


def test_trial_0_is_the_experiment_and_the_sampler_goes_where_losses_are_low(tmp_path):
    with join(tmp_path, 60) as worker:
        work(worker)
        assert worker.over() and worker.take() is None and worker.finished() == 60
        ended = worker.ended()
    assert [each.number for each in ended] == list(range(60)) and all(each.whole for each in ended)
    assert ended[0].values == OWN
    for each in ended:
        assert all(low <= each.values[name] <= high for name, (low, high) in SPACE.items())
    losses = [bowl(each.values) for each in ended]
    best = min(ended, key=lambda each: bowl(each.values))
    assert abs(math.log2(best.values["learning_rate"] / 0.02)) < 0.5
    assert sum(losses[-30:]) < 0.5 * sum(losses[1:31])


def test_a_search_that_was_killed_finds_what_it_would_have_found(tmp_path):
    """Whenever it was: before its values were drawn, after some of them, before its loss was known."""
    with join(tmp_path / "whole", 24) as worker:
        work(worker)
        expected = values_of(worker)
    killed = tmp_path / "killed"
    for number, drawn in ((3, 0), (7, 2), (15, 4), (18, 4)):
        with join(killed, 24) as worker:
            work(worker, most=number - worker.finished())
            kill_after(worker, drawn)
            with pytest.raises(KeyboardInterrupt):
                worker.take()
            assert worker.finished() == number
    with join(killed, 24) as worker:
        work(worker)
        assert values_of(worker) == expected
        assert {ended.worker for ended in worker.ended()} == {1, 2, 3, 4, 5}
    with join(tmp_path / "other", 24, seed=1) as worker:
        work(worker)
        assert values_of(worker)[1:] != expected[1:]


def kill_after(worker, drawn):
    """The next trial of this worker ends in the middle: after it has drawn so many of its values."""
    make, left = worker._handle, [drawn]

    def handle(trial):
        made = make(trial)
        suggest = made.suggest_float

        def counted(*arguments, **keys):
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            value = suggest(*arguments, **keys)
            if drawn == len(SPACE) and not left[0]:
                raise KeyboardInterrupt
            return value

        made.suggest_float = counted
        return made

    worker._handle = handle


def test_more_trials_later_are_the_same_search(tmp_path):
    with join(tmp_path, 20) as worker:
        work(worker)
        expected = values_of(worker)
    with join(tmp_path / "short", 12) as worker:
        work(worker)
        assert values_of(worker) == expected[:12]
    with join(tmp_path / "short", 20) as worker:
        assert not worker.over()
        work(worker)
        assert values_of(worker) == expected
    with join(tmp_path / "short", 5) as worker:
        assert worker.over() and worker.take() is None and len(worker.ended()) == 5


def test_what_another_worker_trains_is_left_to_it_as_long_as_it_lives(tmp_path):
    first, second = join(tmp_path, 2), join(tmp_path, 2)
    with second:
        with first:
            assert first.take().number == 0
            assert second.take().number == 1
            second.give(1, 1.0, [{"status": "finished", "seconds": 0.0}])
            assert second.take() is None and not second.over()
        assert second.take().number == 0  # the first one is gone
        second.give(0, 1.0, [{"status": "finished", "seconds": 0.0}])
        assert second.over() and [ended.worker for ended in second.ended()] == [1, 1]


def test_two_that_want_the_last_number_make_no_more_than_was_asked_for(tmp_path):
    with join(tmp_path, 3) as first, join(tmp_path, 3) as second:
        work(first, most=2)
        add = second._study.add_trial

        def late(trial):
            assert first.take().number == 2
            add(trial)

        second._study.add_trial = late
        assert second.take() is None
        first.give(2, 1.0, [{"status": "finished", "seconds": 0.0}])
        assert first.over() and second.over() and len(first.ended()) == 3
    with join(tmp_path, 4) as later:
        assert later.take().number == 3


def test_two_that_train_one_trial_leave_one_result(tmp_path):
    with join(tmp_path, 1) as first:
        taken = first.take()
        first._life.close()
        with join(tmp_path, 1) as second:
            assert second.take() == taken
            second.give(0, 1.0, [{"status": "finished", "seconds": 2.0}])
            first.give(0, 1.0, [{"status": "finished", "seconds": 9.0}])
            assert [ended.outcomes[0]["seconds"] for ended in second.ended()] == [2.0]


def test_a_worker_without_a_disk_in_common_is_believed_dead_after_a_while(tmp_path, monkeypatch):
    url = f"sqlite:///{tmp_path / 'search.db'}"
    with join(tmp_path / "here", 3, url) as here, join(tmp_path / "there", 3, url) as there:
        assert there.take().number == 0 and here.take().number == 1
        here.give(1, 1.0, [{"status": "finished", "seconds": 100.0}])
        assert here.take().number == 2
        here.give(2, 1.0, [{"status": "finished", "seconds": 1.0}])
        for seconds, taken in ((900.0, False), (1100.0, True)):  # 60 and 10 times the longest, 1060
            monkeypatch.setattr(search_workers.time, "time", lambda now=time.time() + seconds: now)
            assert (here.take() is not None) is taken


def test_a_database_gives_what_the_file_gives(tmp_path):
    with join(tmp_path, 16) as worker:
        work(worker)
        expected = values_of(worker)
    with join(tmp_path, 16, f"sqlite:///{tmp_path / 'search.db'}") as worker:
        work(worker)
        assert values_of(worker) == expected


def test_a_trial_that_diverges_counts_as_worse_than_any_other(tmp_path):
    """The lower the loss the nearer to the cliff: what lies beyond it must not attract the sampler."""

    def cliff(values):
        return -math.log2(values["learning_rate"]) if values["learning_rate"] < 0.02 else math.inf

    with join(tmp_path, 60) as worker:
        work(worker, loss=cliff)
        ended = worker.ended()
    assert len(ended) == 60 and all(each.whole for each in ended)
    beyond = [each.values["learning_rate"] >= 0.02 for each in ended]
    assert any(beyond[:30]) and sum(beyond[30:]) < 10  # of the range they are a third


def test_a_trial_that_fails_waits_for_another_try_and_not_for_the_same_worker(tmp_path):
    failure = [{"status": "failed", "seconds": 0.0}]
    with join(tmp_path, 2) as worker:
        taken = worker.take()
        worker.give(taken.number, None, failure)
        work(worker)
        assert worker.over() and [ended.whole for ended in worker.ended()] == [False, True]
    with join(tmp_path, 2) as worker:
        assert not worker.over() and worker.take() == taken
        worker.give(0, 1.0, [{"status": "finished", "seconds": 0.0}])
        assert worker.over() and [ended.whole for ended in worker.ended()] == [True, True]


WORKER = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[4])
from test_search_workers import bowl, join
with join(Path(sys.argv[1]), int(sys.argv[2])) as worker:
    while not worker.over():
        taken = worker.take()
        if taken is None:
            time.sleep(0.01)
            continue
        print(taken.number, flush=True)
        time.sleep(float(sys.argv[3]))
        worker.give(taken.number, bowl(taken.values), [{"status": "finished", "seconds": 0.0}])
"""


def start(directory, count, seconds):
    code = [sys.executable, "-c", WORKER, str(directory), str(count), str(seconds), str(Path(__file__).parent)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(code, env=environment, stdout=subprocess.PIPE, text=True)


def test_processes_share_a_directory_and_one_of_them_is_killed(tmp_path):
    """One takes a trial and never ends it; two others make all the rest, and after its end that one as well."""
    hung = start(tmp_path, 40, 1000)
    assert hung.stdout.readline() == "0\n"
    others = [start(tmp_path, 40, 0.01) for _ in range(2)]
    with join(tmp_path, 40) as looking:
        while looking.finished() < 39:
            assert all(other.poll() is None for other in others)
            time.sleep(0.02)
        hung.kill()
        trained = [[int(line) for line in other.communicate(timeout=60)[0].split()] for other in others]
        assert all(other.returncode == 0 for other in others) and looking.over()
        ended = looking.ended()
    hung.communicate()
    assert sorted(itertools.chain(*trained)) == list(range(40))  # each one once
    assert [each.number for each in ended] == list(range(40)) and ended[0].values == OWN
    assert len({each.worker for each in ended}) == len([each for each in trained if each])


@pytest.mark.parametrize(
    "url, said",
    [
        ("nonsense", "--storage = nonsense: "),
        ("oracle9://somewhere/name", "--storage = oracle9://somewhere/name: "),
        ("postgresql://me:secret@127.0.0.1:1/name", "--storage = postgresql://me:***@127.0.0.1:1/name: "),
        ("sqlite:////no/such/folder/search.db", "--storage = sqlite:////no/such/folder/search.db: "),
    ],
)
def test_a_storage_that_cannot_be_opened_is_one_line(url, said, tmp_path):
    with pytest.raises(UserError) as caught:
        join(tmp_path, 1, url)
    assert str(caught.value).startswith(said) and "expected" in str(caught.value)
    assert "\n" not in str(caught.value) and "secret" not in str(caught.value)


def test_a_database_that_is_lost_on_the_way_is_one_line(tmp_path):
    file = tmp_path / "search.db"
    lost = pytest.raises(UserError, match=r"search\.db: .*; the same command goes on$")
    with lost, join(tmp_path, 5, f"sqlite:///{file}") as worker:
        work(worker, most=2)
        file.write_bytes(b"")
        work(worker)


def test_a_log_of_something_else_is_one_line(tmp_path):
    (tmp_path / "search.log").write_text("no journal\nat all\n")
    with pytest.raises(UserError, match=r"search\.log: "):
        join(tmp_path, 1)


def test_passwords_are_not_shown():
    assert (
        search_workers.without_password("postgresql://me:se:cr/et@host:5432/name")
        == "postgresql://me:***@host:5432/name"
    )
    assert search_workers.without_password("mysql+pymysql://me@host/name") == "mysql+pymysql://me@host/name"
    assert search_workers.without_password("sqlite:////tmp/search.db") == "sqlite:////tmp/search.db"
