"""Checkpoints of a run: orbax, asynchronous, complete or absent.

`checkpoints/STEP/` holds one item each for `parameters`, `optimizer` (plain nested dicts of arrays) and `position`
(JSON), in some runs also for `average` (a tree like that of parameters), and metadata: step, tokens, stage, learning
rate. Orbax writes a step into a folder of another name and renames it when everything is on disk, so a kill leaves a
step whole or not there; on an object store a file that is written last says so (`cpmjax.checkpoint.object_stores`).
"""

from __future__ import annotations

import contextlib
import os
from typing import Any, Literal

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import serialization
from orbax.checkpoint import checkpoint_managers as policies

from cpmjax.checkpoint import failures, object_stores, streaming
from cpmjax.model.parameters import Tree, flat, path_name, specs
from cpmjax.model.weights import Weights
from cpmjax.run.config import CheckpointConfig, ModelConfig
from cpmjax.run.errors import UserError

Item = Literal["parameters", "average"]


def refuse_used(rules: CheckpointConfig) -> None:
    """Raises UserError if the folder that a new run is to have for its checkpoints is not empty."""
    if rules.folder is None:
        return
    folder = _absolute(rules.folder)
    object_stores.prepare(folder)
    with object_stores.answering(folder):
        found = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if found:
        raise UserError(f"checkpoint.folder = {folder}: holds {found[0]} already; expected a folder of this run alone")


class Checkpoints:
    """The checkpoints of one run directory; `rules` is given by the job that writes them."""

    def __init__(self, directory: str | os.PathLike[str], rules: CheckpointConfig | None = None):
        self.directory = _absolute(directory)
        writes = rules is not None
        object_stores.prepare(self.directory)
        if not writes and not self.directory.is_dir():
            raise UserError(f"{self.directory.parent} has no checkpoints: expected a folder {self.directory}")
        if writes:
            failures.leave_to_the_caller()
        with failures.quiet(), object_stores.answering(self.directory):
            options = ocp.CheckpointManagerOptions(
                create=writes,
                read_only=not writes,
                cleanup_tmp_directories=writes,
                preservation_policy=_preservation(rules) if rules is not None else None,
                # Where a folder cannot be made, threads that wait for it would keep the process for five minutes.
                async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
                **object_stores.options(self.directory),
            )
            self._manager = ocp.CheckpointManager(self.directory, options=options, handler_registry=_handlers())
        self._place = failures.Place(self.directory) if writes else None

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, ascending."""
        return sorted(self._manager.all_steps())

    def newest(self) -> str:
        """The newest complete checkpoint in words: its folder, or "none"."""
        steps = self.steps()
        return str(self.directory / str(steps[-1])) if steps else "none"

    def save(
        self,
        step: int,
        parameters: Tree,
        optimizer: Any,
        position: dict[str, int],
        metadata: dict[str, Any],
        average: Tree | None = None,
    ) -> None:
        """Begins to write a checkpoint and returns once the arrays are copied; a failed earlier save raises here."""
        trees = {"parameters": parameters} | ({} if average is None else {"average": average})
        with failures.quiet(), self._saving():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    **{
                        item: ocp.args.PyTreeSave(tree, save_args=jax.tree_util.tree_map_with_path(_by_layer, tree))
                        for item, tree in trees.items()
                    },
                    optimizer=ocp.args.PyTreeSave(serialization.to_state_dict(optimizer)),
                    position=ocp.args.JsonSave(position),
                ),
                custom_metadata=metadata,
                force=True,
            )

    def save_weights(self, step: int, weights: Weights, metadata: dict[str, Any]) -> None:
        """Writes a checkpoint of parameters alone, reading them slice by slice; returns when it is complete."""
        with failures.quiet(), self._saving():
            self._manager.save(
                step,
                args=ocp.args.Composite(parameters=ocp.args.PyTreeSave(streaming.streamed(weights))),
                custom_metadata=metadata,
                force=True,
            )
            self._manager.wait_until_finished()

    def delete(self, step: int) -> None:
        with failures.quiet():
            self._manager.delete(step)

    def weights(self, step: int, config: ModelConfig, item: Item = "parameters") -> Weights:
        """The parameters of a model of this shape, or their average, read slice by slice.

        Raises UserError if the checkpoint holds other parameters, or no average.
        """
        self._check_average(step, item)
        stored = flat(self._item_metadata(step, item))
        folder = self._folder(step) / item
        wanted = {path: spec.shape for path, spec in flat(specs(config)).items()}
        found = {path: tuple(leaf.shape) for path, leaf in stored.items()}
        if found != wanted:
            wrong = sorted(path for path in found.keys() | wanted.keys() if found.get(path) != wanted.get(path))[0]
            raise UserError(f"{folder}: {wrong} is {found.get(wrong)}; the model of the run has {wanted.get(wrong)}")
        return streaming.stored_weights(folder, config, {path: np.dtype(leaf.dtype) for path, leaf in stored.items()})

    def parameters(self, step: int, abstract: Tree | None = None, item: Item = "parameters") -> Tree:
        """Parameters, or their average, placed as the abstract tree says (any mesh), or on the default device.

        Raises UserError if the checkpoint has no average.
        """
        self._check_average(step, item)
        if abstract is None:
            return self._restore_as_stored(step, item)
        return self._restore(step, item, ocp.args.StandardRestore(abstract))

    def optimizer_tree(self, step: int) -> Tree | None:
        """The optimizer's state as it is stored, nested dicts on the default device; None if none was saved."""
        return self._restore_as_stored(step, "optimizer") if self.has_optimizer(step) else None

    def optimizer(self, step: int, abstract: Any) -> Any | None:
        """The optimizer's state with the structure and placement of `abstract`; None if none was saved."""
        if not self.has_optimizer(step):
            return None
        abstract_dict = serialization.to_state_dict(abstract)
        restored = self._restore(step, "optimizer", ocp.args.StandardRestore(abstract_dict))
        return serialization.from_state_dict(abstract, restored)

    def has_optimizer(self, step: int) -> bool:
        return self._has(step, "optimizer")

    def has_average(self, step: int) -> bool:
        return self._has(step, "average")

    def _check_average(self, step: int, item: Item) -> None:
        if item == "average" and not self.has_average(step):
            raise UserError(
                f"{self._folder(step)} has no average: expected one of a run with training.ema, "
                "or with optimizer.type=schedule_free"
            )

    def position(self, step: int) -> dict[str, int] | None:
        """{"sequences": rows consumed, "skipped": steps skipped}, and "averaged", the updates in an average of
        `training.ema`; None for a checkpoint that brought none along."""
        if not self._has(step, "position"):
            return None
        return self._restore(step, "position", ocp.args.JsonRestore())

    def metadata(self, step: int) -> dict[str, Any]:
        """step, tokens, stage, learning_rate."""
        with failures.quiet(), failures.restoring(self._folder(step)):
            return dict(self._manager.metadata(step).custom_metadata or {})

    def wait(self) -> None:
        """Returns when everything begun is on disk."""
        with failures.quiet(), self._saving():
            self._manager.wait_until_finished()

    def close(self) -> None:
        with contextlib.ExitStack() as stack:
            stack.enter_context(failures.quiet())
            if self._place is not None:
                stack.callback(self._place.close)
                stack.enter_context(self._saving())
            self._manager.close()

    def _folder(self, step: int) -> epath.Path:
        if step not in self._manager.all_steps():
            have = ", ".join(map(str, self.steps())) or "none"
            raise UserError(f"{self.directory.parent} has no checkpoint of step {step}: expected one of {have}")
        return self.directory / str(step)

    def _has(self, step: int, item: str) -> bool:
        with object_stores.answering(self.directory):
            return (self._folder(step) / item).is_dir()

    def _item_metadata(self, step: int, item: str) -> Tree:
        folder = self._folder(step) / item
        with failures.quiet(), failures.restoring(folder), ocp.StandardCheckpointer() as checkpointer:
            stored = checkpointer.metadata(folder).item_metadata
            if stored is None:
                raise FileNotFoundError("its metadata cannot be read")
            return stored.tree

    def _restore_as_stored(self, step: int, item: str) -> Tree:
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        stored = self._item_metadata(step, item)
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), stored)
        return self._restore(step, item, ocp.args.StandardRestore(abstract))

    def _restore(self, step: int, item: str, arguments: Any) -> Any:
        with failures.quiet(), failures.restoring(self._folder(step) / item):
            return self._manager.restore(step, args=ocp.args.Composite(**{item: arguments}))[item]

    def _saving(self) -> contextlib.AbstractContextManager[None]:
        assert self._place is not None, "opened without rules: to be read"
        return failures.saving(self._place, lambda: self._manager.all_steps(read=True))


def _absolute(folder: str | os.PathLike[str]) -> epath.Path:
    return epath.Path(folder if object_stores.is_url(folder) else os.path.abspath(folder))


def _handlers() -> Any:
    """What writes and reads each kind of item."""
    # Numbers that are learnt hardly shrink, and zstd takes longer than the disk.
    written, plain = ocp.PyTreeCheckpointHandler(use_compression=False), ocp.JsonCheckpointHandler()
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    registry.add(None, ocp.args.PyTreeSave, written)
    registry.add(None, ocp.args.StandardRestore, ocp.StandardCheckpointHandler())
    registry.add(None, ocp.args.JsonSave, plain)
    registry.add(None, ocp.args.JsonRestore, plain)
    registry.add("parameters", ocp.args.PyTreeSave, streaming.item_handler())
    return registry


def _by_layer(path: tuple[Any, ...], array: jax.Array) -> ocp.SaveArgs:
    """Cuts what is stacked over layers between them on disk: one layer reads alone."""
    if not path_name(path).startswith("layers/"):
        return ocp.SaveArgs()
    return ocp.SaveArgs(chunk_byte_size=max(1, array.nbytes // array.shape[0]), shard_axes=(0,))


def _preservation(rules: CheckpointConfig) -> Any:
    policy = policies.preservation_policy
    if rules.keep_last is None:
        return policy.PreserveAll()
    kept: list[Any] = [policy.LatestN(rules.keep_last), policy.CustomSteps(list(rules.steps))]
    if rules.keep_every is not None:
        kept.append(policy.EveryNSteps(rules.keep_every))
    return policy.AnyPreservationPolicy(kept)
