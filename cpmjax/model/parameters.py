"""What parameters a MiniCPM has: each declared once, with shape, role and logical axes.

Initial scale, learning rate and weight decay (`cpmjax.model.mup`), placement (`cpmjax.parallel.sharding`) and names in
other formats derive from this table. Matrices are stored [input, output]; those of a layer are stacked over layers.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any, Literal

import jax

from cpmjax.run.config import ModelConfig

Role = Literal["embedding", "head", "matrix", "norm"]
Tree = dict[str, Any]  # nested dicts with one kind of leaf: specs, arrays, shardings, numbers


@dataclass(frozen=True)
class ParamSpec:
    shape: tuple[int, ...]
    role: Role
    axes: tuple[str, ...]  # one logical axis a dimension


def specs(config: ModelConfig) -> Tree:
    """The nested dict of every parameter's `ParamSpec`; the parameters themselves have the same structure."""
    n, d, f, v = config.layers, config.width, config.feed_forward, config.vocabulary
    query_width, kv_width = config.heads * config.head, config.kv * config.head

    def norm() -> ParamSpec:
        return ParamSpec((n, d), "norm", ("layers", "width"))

    def matrix(inputs: int, outputs: int, *axes: str) -> ParamSpec:
        return ParamSpec((n, inputs, outputs), "matrix", ("layers", *axes))

    tree: Tree = {
        "embedding": ParamSpec((v, d), "embedding", ("vocabulary", "width")),
        "layers": {
            "attention_norm": norm(),
            "query": matrix(d, query_width, "width", "heads"),
            "key": matrix(d, kv_width, "width", "heads"),
            "value": matrix(d, kv_width, "width", "heads"),
            "output": matrix(query_width, d, "heads", "width"),
            "feed_forward_norm": norm(),
            "gate": matrix(d, f, "width", "feed_forward"),
            "up": matrix(d, f, "width", "feed_forward"),
            "down": matrix(f, d, "feed_forward", "width"),
        },
        "final_norm": ParamSpec((d,), "norm", ("width",)),
    }
    if not config.tied:
        tree["head"] = ParamSpec((d, v), "head", ("width", "vocabulary"))
    return tree


def path_name(path: tuple[Any, ...]) -> str:
    """A pytree path as "layers/query"."""
    return "/".join(str(key.key) for key in path)


def owner(path: tuple[Any, ...]) -> str:
    """Of a leaf in a tree that holds trees of parameters, like the state of an optimizer: "layers/query"; "" if none.

    Parameters are nested dicts, and what holds them is none.
    """
    keys = itertools.takewhile(lambda key: isinstance(key, jax.tree_util.DictKey), reversed(path))
    return path_name(tuple(reversed([*keys])))


def axes_of(spec: ParamSpec, shape: tuple[int, ...]) -> tuple[str | None, ...] | None:
    """Of what belongs to a parameter: the logical axes if it has its shape, or one entry for each of its rows (those
    along the last axis); None of any other."""
    if shape == spec.shape:
        return spec.axes
    return (*spec.axes[:-1], None) if shape == (*spec.shape[:-1], 1) else None


def flat(tree: Tree) -> dict[str, Any]:
    """{"layers/query": leaf, ...}"""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def count(config: ModelConfig, embeddings: bool = True) -> int:
    """Number of parameters; without embeddings and head it is the N of the paper (Table 2)."""
    leaves = jax.tree.leaves(specs(config))
    return sum(math.prod(spec.shape) for spec in leaves if embeddings or spec.role in ("matrix", "norm"))
