"""One search, any number of workers: processes on one or several machines that share an Optuna storage.

    trial n    number n of the Optuna study, from 0 to the number asked for less one; its state RUNNING until it ended
    claim      an attribute of a trial: which worker has it, since when; a released trial has none
    outcomes   an attribute of a trial: what `cpmjax.tunnel.trials` keeps of each training run
    .workers/  in the directory: a file for each worker, locked as long as it lives

Whoever is free takes the first trial whose worker is gone, else the next number. What a trial samples depends on the
search's seed, its number and the trials that ended before, so that a search of one worker that was killed and goes on
finds what it would have found. A trial gives the same result whoever trains it: that two train one, because a claim
crossed or a slow machine was believed dead, costs time and nothing else; the first to end counts.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import re
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cpmjax.run.errors import UserError

_PATIENCE = (
    60.0,
    10.0,
)  # seconds, and multiples of the longest trial, before a worker that cannot be seen counts as dead
_FIRST_PATIENCE = 3600.0  # seconds, before any trial has ended


@dataclass(frozen=True)
class Taken:
    """A trial that this worker is to train."""

    number: int
    values: dict[str, float]


@dataclass(frozen=True)
class Ended:
    """A trial with outcomes; not `whole` if a failure keeps it waiting for another try."""

    number: int
    worker: int  # from 1, in the order in which the workers appear in the search
    values: dict[str, float]
    outcomes: list[dict[str, Any]]
    whole: bool


class Workers:
    """The search in its storage, as one of its workers sees it."""

    def __init__(
        self,
        directory: Path,
        url: str | None,
        name: str,
        space: Mapping[str, tuple[float, float]],
        first: Mapping[str, float],
        count: int,
        seed: int,
    ) -> None:
        """The search called `name` over `space`, log-uniform, whose trial 0 has the values `first`; begun if it is not
        there. `url` None is a file in the directory, which machines with a shared disk may share.

        Raises UserError without Optuna, or for a storage that cannot be opened.
        """
        self._optuna = optuna()
        self._space, self._count, self._where = space, count, without_password(url or "search.log")
        self._failed_here: set[int] = set()
        self._lives = directory / ".workers"
        self._lives.mkdir(parents=True, exist_ok=True)
        self._study = _open(directory, url, name, _sampler(seed, first))
        self._me = uuid.uuid4().hex[:12]
        self._life = open(self._lives / self._me, "ab")  # noqa: SIM115 - held as long as this worker lives
        fcntl.flock(self._life, fcntl.LOCK_EX)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: object, error: object, _: object) -> None:
        """From now on the others take over what this worker has claimed. Raises UserError if the database was lost."""
        self._life.close()
        if isinstance(error, self._optuna.exceptions.StorageInternalError):
            raise UserError(f"--storage = {self._where}: {_line(error)}; the same command goes on") from error

    def take(self) -> Taken | None:
        """A trial for this worker, or None if every one of them ended or has a worker."""
        while True:
            trials = self._trials()
            free = [trial for trial in trials if self._is_free(trial, trials)]
            if free:
                trial = self._handle(free[0])
                with contextlib.suppress(self._optuna.exceptions.UpdateFinishedTrialError):
                    trial.set_user_attr("claim", self._claim())
                if not self._is_mine(trial.number):  # another worker claimed it, or ended it, a moment later
                    continue
            elif len(trials) < self._count:
                running = self._optuna.trial.TrialState.RUNNING
                self._study.add_trial(
                    self._optuna.trial.create_trial(state=running, user_attrs={"claim": self._claim()})
                )
                trial = next(self._handle(each) for each in self._study.get_trials(False) if self._has_mine(each))
                if trial.number >= self._count:  # others were faster: it waits for a search of more trials
                    trial.set_user_attr("claim", None)
                    continue
            else:
                return None
            values = {name: trial.suggest_float(name, *bounds, log=True) for name, bounds in self._space.items()}
            return Taken(trial.number, values)

    def give(self, number: int, loss: float | None, outcomes: list[dict[str, Any]]) -> None:
        """Ends a trial of this worker. A loss that is not finite counts as worse than any other; None is a failure,
        after which the trial waits for another worker or another day."""
        state = self._optuna.trial.TrialState
        trial = self._handle(self._study.get_trials(False)[number])
        with contextlib.suppress(self._optuna.exceptions.UpdateFinishedTrialError):  # another worker ended it as well
            trial.set_user_attr("outcomes", {"worker": self._me, "outcomes": outcomes})
            if loss is None:
                self._failed_here.add(number)
                trial.set_user_attr("claim", None)
            elif math.isfinite(loss):
                self._study.tell(number, loss, skip_if_finished=True)
            else:
                self._study.tell(number, state=state.PRUNED, skip_if_finished=True)

    def ended(self) -> list[Ended]:
        """Every trial that has outcomes, in their order."""
        found = [trial for trial in self._trials() if "outcomes" in trial.user_attrs]
        workers = [*dict.fromkeys(trial.user_attrs["outcomes"]["worker"] for trial in found)]
        return [
            Ended(
                trial.number,
                1 + workers.index(trial.user_attrs["outcomes"]["worker"]),
                {name: trial.params[name] for name in self._space},
                trial.user_attrs["outcomes"]["outcomes"],
                trial.state.is_finished(),
            )
            for trial in found
        ]

    def finished(self) -> int:
        """How many trials have ended."""
        return sum(trial.state.is_finished() for trial in self._trials())

    def over(self) -> bool:
        """Whether every trial has ended, or failed in the hands of this worker."""
        done = [trial.state.is_finished() or trial.number in self._failed_here for trial in self._trials()]
        return len(done) == self._count and all(done)

    def _trials(self) -> list[Any]:
        return self._study.get_trials(deepcopy=False)[: self._count]

    def _handle(self, trial: Any) -> Any:
        """What a frozen trial is changed through."""
        return self._optuna.trial.Trial(self._study, trial._trial_id)

    def _claim(self) -> dict[str, Any]:
        return {"worker": self._me, "time": time.time()}

    def _has_mine(self, trial: Any) -> bool:
        claim = trial.user_attrs.get("claim")
        return not trial.state.is_finished() and claim is not None and claim["worker"] == self._me

    def _is_mine(self, number: int) -> bool:
        return self._has_mine(self._study.get_trials(deepcopy=False)[number])

    def _is_free(self, trial: Any, trials: list[Any]) -> bool:
        if trial.state.is_finished() or trial.number in self._failed_here:
            return False
        claim = trial.user_attrs.get("claim")
        return claim is None or not self._lives_on(claim, trials)

    def _lives_on(self, claim: dict[str, Any], trials: list[Any]) -> bool:
        """Whether the worker of a claim is still there: by its lock, or, if its directory is another one, by the time
        that its trial takes."""
        try:
            with open(self._lives / claim["worker"], "rb") as life:
                fcntl.flock(life, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return False
        except BlockingIOError:
            return True
        except FileNotFoundError:
            took = [
                sum(outcome["seconds"] for outcome in trial.user_attrs["outcomes"]["outcomes"])
                for trial in trials
                if trial.state.is_finished()
            ]
            patience = _PATIENCE[0] + _PATIENCE[1] * max(took) if took else _FIRST_PATIENCE
            return time.time() - claim["time"] < patience


def optuna() -> Any:
    """The package, quiet. Raises UserError where it is not installed."""
    try:
        import optuna
    except ImportError as error:
        raise UserError("the search needs Optuna: pip install 'cpmjax[search]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def without_password(url: str) -> str:
    """The URL of a storage as it may be shown and kept."""
    return re.sub(r"(://[^:/@]*):[^@]*@", r"\1:***@", url)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def _open(directory: Path, url: str | None, name: str, sampler: Any) -> Any:
    """The Optuna study. Raises UserError, one line, for a storage that cannot be opened."""
    package = optuna()
    try:
        if url is None:
            backend = package.storages.journal.JournalFileBackend(str(directory / "search.log"))
            storage = package.storages.JournalStorage(backend)
        else:
            storage = package.storages.RDBStorage(url)
        return package.create_study(storage=storage, sampler=sampler, study_name=name, load_if_exists=True)
    except Exception as error:  # whatever a database and its driver may say
        where = f"{directory / 'search.log'}" if url is None else f"--storage = {without_password(url)}"
        raise UserError(
            f"{where}: {_line(error)}; expected a search that was begun here, or nothing, or the URL of a database "
            "such as sqlite:///FILE or postgresql://HOST/NAME, with its driver installed"
        ) from error


def _sampler(seed: int, first: Mapping[str, float]) -> Any:
    """Tree-structured Parzen estimator, all parameters together, that keeps away from what others are training."""
    package = optuna()
    base: Any = package.samplers.BaseSampler

    class ByNumber(base):
        """What is drawn for a trial depends on its number, not on who asks nor on what was drawn before."""

        def _tpe(self, trial: Any, *place: int) -> Any:
            (state,) = np.random.SeedSequence((seed, trial.number, *place)).generate_state(1)
            return package.samplers.TPESampler(seed=int(state), multivariate=True, constant_liar=True)

        def infer_relative_search_space(self, study: Any, trial: Any) -> Any:
            return {} if trial.number == 0 else self._tpe(trial).infer_relative_search_space(study, trial)

        def sample_relative(self, study: Any, trial: Any, search_space: Any) -> Any:
            return self._tpe(trial).sample_relative(study, trial, search_space)

        def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: Any) -> Any:
            if trial.number == 0:
                return first[param_name]
            tpe = self._tpe(trial, 1 + [*first].index(param_name))
            return tpe.sample_independent(study, trial, param_name, param_distribution)

    return ByNumber()
