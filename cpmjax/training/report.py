"""What a person finds of a run: its curves, and a last screen that says where everything is and what to try next."""

from __future__ import annotations

from cpmjax.run.directory import Lines, RunDirectory
from cpmjax.run.plots import draw
from cpmjax.training.timeline import Timeline


def draw_curves(directory: RunDirectory, timeline: Timeline) -> None:
    """Draws plots/*.png anew; a branch shows its parent up to the branch point."""
    parent = timeline.origin.parent
    before = Lines.read(parent.metrics_file) if parent is not None and parent.metrics_file.is_file() else []
    before = [record for record in before if record["step"] <= timeline.origin.step]
    draw(Lines.read(directory.metrics_file), timeline.schedule.stages(), directory.path, before)


def last_screen(directory: RunDirectory, timeline: Timeline, saved: list[int]) -> str:
    """The end of a run in words; `saved` are the steps of its checkpoints."""
    lines = [""]
    evaluations = [record for record in Lines.read(directory.metrics_file) if "heldout_loss" in record]
    if evaluations:
        end = evaluations[-1]
        lines.append(
            f"held-out loss {end['heldout_loss']:.4f} nats per token, {end['heldout_bits_per_byte']:.4f} bits per byte"
        )
        if "average/heldout_loss" in end:
            lines[-1] += f"; {end['average/heldout_loss']:.4f} with averaged parameters"
        before_decay = [record for record in evaluations if record["stage"] == "stable"]
        if before_decay and end["stage"] == "decay":
            lines[-1] += (
                f"; {before_decay[-1]['heldout_loss']:.4f} before the decay, at step {before_decay[-1]['step']}"
            )
    for sample in Lines.read(directory.samples_file)[-1:]:
        lines += ["", f"it continues {sample['prompt']!r} with", sample["prompt"] + sample["text"], ""]
    places = {
        "loss curve": directory.plots / "loss.png",
        "metrics": directory.metrics_file,
        "samples": directory.samples_file,
        "checkpoints": f"{directory.checkpoints}: {len(saved)}, steps {saved[0]} to {saved[-1]}" if saved else "none",
        "TensorBoard": f"tensorboard --logdir {directory.path}",
    }
    lines += [f"{what:<12} {place}" for what, place in places.items()]
    stable = [step for step in saved if timeline.stage(step) == "stable"]
    if stable:
        middle = stable[len(stable) // 2]
        lines += [
            "",
            "Try next a decay from the middle of the stable stage; it costs its own steps only:",
            f"  python -m cpmjax.train --branch.run={directory.path} --branch.step={middle} "
            f"--run.directory={directory.path}-decay-{middle}",
        ]
    return "\n".join(lines)
