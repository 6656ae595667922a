"""Where metrics go: metrics.jsonl, TensorBoard, wandb, and a progress bar or plain lines."""

from __future__ import annotations

import importlib
import math
import sys
import time
from typing import Any

from tqdm import tqdm

from cpmjax.run.config import Config
from cpmjax.run.directory import Lines, RunDirectory
from cpmjax.run.errors import UserError
from cpmjax.run.identity import encode

_SECONDS_BETWEEN_LINES = 10.0  # in a log that is no terminal
_SHOWN_CHARACTERS = 80  # of a sample


class Log:
    """Records of a run from the step after `start` on; what an interrupted run wrote after `start` is dropped."""

    def __init__(self, directory: RunDirectory, config: Config, start: int, total: int):
        self._lines = Lines(directory.metrics_file)
        self._lines.keep_until(start)
        self._samples = Lines(directory.samples_file)
        self._samples.keep_until(start)
        self._start, self._total = start, total
        self._begin = self._last_line = time.monotonic()
        self._tensorboard = None
        if config.log.tensorboard:
            from tensorboardX import SummaryWriter  # it imports torch where that is installed: seconds

            self._tensorboard = SummaryWriter(str(directory.path / "tensorboard"), purge_step=start + 1)
        self._wandb = _wandb_run(directory, config) if config.log.wandb is not None else None
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(initial=start, total=total, unit="step", dynamic_ncols=True, smoothing=0.05)

    def say(self, text: str) -> None:
        """Text for a person, above the bar."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)

    def write(self, record: dict[str, Any]) -> None:
        """One line of metrics.jsonl, and the same numbers wherever else they go."""
        self._lines.append(record)
        step = record["step"]
        numbers = {key: value for key, value in record.items() if isinstance(value, (int, float)) and key != "step"}
        if self._tensorboard is not None:
            for key, value in numbers.items():
                self._tensorboard.add_scalar(key, value, step)
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)
        if self._bar is not None:
            self._bar.set_postfix_str(f"{record['stage']} loss {record['loss']:.3f}", refresh=False)
            self._bar.update(step - self._bar.n)
        silent = self._bar is not None or time.monotonic() - self._last_line < _SECONDS_BETWEEN_LINES
        if "heldout_loss" in record or not silent:
            self._last_line = time.monotonic()
            held_out = f"  held-out {record['heldout_loss']:.4f}" if "heldout_loss" in record else ""
            self.say(
                f"step {step}/{self._total} {record['stage']:6}  loss {record['loss']:.4f}{held_out}  "
                f"lr {record['learning_rate']:.3g}  {record['tokens_per_second']:,.0f} tokens/s  ETA {self._eta(step)}"
            )

    def write_samples(self, samples: list[dict[str, Any]]) -> None:
        """Each to samples.jsonl; the beginning of the first one is shown."""
        for sample in samples:
            self._samples.append(sample)
        for sample in samples[:1]:
            self.say(f"  {sample['prompt']!r} goes on {sample['text'][:_SHOWN_CHARACTERS]!r}")

    def sync(self) -> None:
        """Returns when every line is on disk: what is saved next may count on it."""
        self._lines.sync()
        self._samples.sync()

    def close(self) -> None:
        for sink in (self._lines, self._samples, self._tensorboard, self._bar):
            if sink is not None:
                sink.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _eta(self, step: int) -> str:
        pace = (time.monotonic() - self._begin) / max(1, step - self._start)
        minutes, seconds = divmod(math.ceil(pace * (self._total - step)), 60)
        return f"{minutes}:{seconds:02d}"


class NoLog(Log):
    """That of a process which leaves it to another one."""

    def __init__(self) -> None:
        pass

    def say(self, text: str) -> None:
        pass

    def write(self, record: dict[str, Any]) -> None:
        pass

    def write_samples(self, samples: list[dict[str, Any]]) -> None:
        pass

    def sync(self) -> None:
        pass

    def close(self) -> None:
        pass


def _wandb_run(directory: RunDirectory, config: Config) -> Any:
    try:
        wandb = importlib.import_module("wandb")
    except ImportError as error:
        raise UserError(f"log.wandb = {config.log.wandb!r}: expected wandb installed (pip install wandb)") from error
    name = directory.path.resolve().name
    return wandb.init(project=config.log.wandb, name=name, id=name, resume="allow", config=encode(config))
