"""`study search`: are MiniCPM's constants the best ones? Any number of workers search, and the best are confirmed."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from cpmjax.run import flags
from cpmjax.run.config import Config
from cpmjax.run.identity import fingerprint
from cpmjax.run.table import Row, write_csv
from cpmjax.studies.common import EXPERIMENTS, conclude, say
from cpmjax.tunnel import figures, search, search_figures, transfer
from cpmjax.tunnel.search_importance import importances
from cpmjax.tunnel.search_workers import Taken, Workers, optuna, without_password
from cpmjax.tunnel.sizes import Axis
from cpmjax.tunnel.trials import Progress, Trial, Trials, outcome_of
from cpmjax.tunnel.workbench import Workbench

_RANGES = {
    "scale_depth": (0.3, 6.0),
    "scale_emb": (1.0, 50.0),
    "init_std": (0.01, 1.0),
    "learning_rate": (0.001, 0.1),
}
_SECONDS_BETWEEN_LOOKS = 0.5  # for the trials of other workers


def add_to(studies: Any) -> None:
    parser = studies.add_parser(
        "search",
        help="are MiniCPM's constants the best ones? start it as often as there are workers",
        description="Started again, on this machine or another one, it is one more worker of the same search.",
    )
    parser.add_argument("--trials", type=flags.positive, default=120, help="of all workers together (default: 120)")
    parser.add_argument("--seeds", type=flags.positive, default=1, help="that a trial averages over (default: 1)")
    for name, (low, high) in _RANGES.items():
        flag = f"--{name.replace('_', '-')}"
        help = f"lowest and highest, searched in octaves (default: {low:g},{high:g})"
        parser.add_argument(flag, type=_range, default=(low, high), metavar="LOW,HIGH", help=help)
    parser.add_argument("--best", type=flags.positive, default=5, help="how many train again (default: 5)")
    parser.add_argument("--fresh-seeds", type=_several, default=8, help="that they train again on (default: 8)")
    parser.add_argument("--size", help="a preset, as in tunnel-9m (default: the model of the experiment)")
    parser.add_argument(
        "--storage",
        metavar="URL",
        help="of a database, where the workers share no disk: sqlite:///FILE, postgresql://, mysql:// "
        "(default: search.log in the directory)",
    )
    parser.set_defaults(study=study, experiment=EXPERIMENTS / "tunnel" / "search.yaml", home="runs/search")


def study(arguments: argparse.Namespace, config: Config) -> int:
    """Are MiniCPM's constants the best ones?"""
    optuna()
    url, directory = arguments.storage, Path(config.run.directory).expanduser()
    arguments.storage = url and without_password(url)
    if arguments.size:
        axis = Axis("preset", (arguments.size,))
        config = replace(config, model=axis.model(config.model, arguments.size, config.model.parametrisation))
    space = {name: getattr(arguments, name) for name in search.PARAMETERS}
    first = search.own_values(config, space)
    with _in_turn(directory), Trials(directory, [], "").lock():
        pass  # it is no run, and no other study is at work there
    with Workbench(config, say) as workbench:
        recipe = f"{transfer.measure.__module__} {workbench.recipe}"
        parts = fingerprint(config), sorted(space.items()), arguments.seeds, recipe
        name = f"cpmjax search {hashlib.sha256(repr(parts).encode()).hexdigest()[:12]}"

        def measure(trial: Trial) -> list[Row]:
            return transfer.measure(workbench, trial)

        with Workers(directory, url, name, space, first, arguments.trials, config.run.seed) as workers:
            try:
                _work(workers, config, arguments, measure)
            finally:
                with _in_turn(directory):
                    trials = _recorded(workers, config, arguments, recipe)
        with _in_turn(directory):  # the first one trains the best again; the others find it done
            with trials.lock():
                trials.run(measure)
            return _conclude(trials, space, arguments, config)


def _work(
    workers: Workers, config: Config, arguments: argparse.Namespace, measure: Callable[[Trial], list[Row]]
) -> None:
    """Trains trials of the search until all have ended, in whosever hands."""
    ended = workers.finished()
    (like, *_) = search.to_train(config, Taken(0, search.own_values(config, {})), 1)
    with Progress(arguments.trials, [like] * (arguments.trials - ended)) as progress:
        while not workers.over():
            taken = workers.take()
            if taken is None:
                time.sleep(_SECONDS_BETWEEN_LOOKS)
            else:
                planned = search.to_train(config, taken, arguments.seeds)
                progress.begin(planned[0])
                outcomes = [outcome_of(trial, measure) for trial in planned]
                workers.give(taken.number, search.loss_of(outcomes), outcomes)
            now = workers.finished()
            for _ in range(now - ended):
                progress.end(like)
            ended = now


def _recorded(workers: Workers, config: Config, arguments: argparse.Namespace, recipe: str) -> Trials:
    """All trials, those of the search with what they left, whoever trained them. Writes the table."""
    ended = workers.ended()
    left = search.searched(config, ended)
    again = search.confirming(config, ended, arguments.best, arguments.seeds, arguments.fresh_seeds)
    trials = Trials(config.run.directory, [*(trial for trial, _ in left), *again], recipe)
    with trials.lock():
        trials.record(left)
    return trials


def _conclude(trials: Trials, space: search.Space, arguments: argparse.Namespace, config: Config) -> int:
    rows = trials.rows()
    found = search.findings(rows, space)
    importance = importances(space, found.values_TD, found.losses_T)
    write_csv(trials.directory / "importance.csv", [{"parameter": key, "importance": importance[key]} for key in space])
    for name, figure in search_figures.all_of(found, importance).items():
        figures.save(figure, trials.directory / f"{name}.png")
    print(search.describe(found, importance), end="\n\n")
    judged = search.verdicts(found, arguments.trials)
    return conclude("search", config, trials, arguments, judged)


@contextlib.contextmanager
def _in_turn(directory: Path) -> Iterator[None]:
    """One worker after the other."""
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / ".turn", "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _range(text: str) -> tuple[float, float]:
    try:
        low, high = map(float, flags.names(text))
    except ValueError:
        low, high = 0.0, 0.0
    if not 0 < low < high < float("inf"):
        raise argparse.ArgumentTypeError(f"expected two positive numbers, the lower one first, got {text!r}")
    return low, high


def _several(text: str) -> int:
    number = flags.positive(text)
    if number < 2:
        raise argparse.ArgumentTypeError(f"expected at least 2, an interval needs them, got {text!r}")
    return number
