"""The models of a wind tunnel: one experiment's model in other widths, depths, or released sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cpmjax.model.mup import PARAMETRISATIONS, Parametrisation
from cpmjax.model.presets import PRESETS
from cpmjax.run.config import ModelConfig
from cpmjax.run.errors import UserError
from cpmjax.tunnel.faults import table_of

_SHAPE = ("width", "layers", "heads", "kv_heads", "feed_forward", "dim_model_base")


@dataclass(frozen=True)
class Axis:
    """What grows from model to model, and how far: widths, numbers of layers, or names of presets."""

    name: str  # width, layers or preset
    values: tuple[int, ...] | tuple[str, ...]

    def model(self, base: ModelConfig, value: int | str, parametrisation: str) -> ModelConfig:
        """The base model at one value of the axis, in a parametrisation or with a planted fault.

        Raises UserError if there is no such model.
        """
        if isinstance(value, str):
            model = _of_preset(base, value)
        elif self.name == "layers":
            model = replace(base, layers=value)
        else:
            model = _at_width(base, value, table_of(parametrisation))
        # The configuration of a fault is that of the table in which it is planted.
        named = parametrisation if parametrisation in PARAMETRISATIONS else "minicpm"
        return replace(model, parametrisation=named)  # type: ignore[arg-type]


def make_axis(name: str, values: Sequence[int] | Sequence[str], flag: str) -> Axis:
    """Raises UserError, naming the flag, for fewer than two values, a value twice, or one that is not positive."""
    shown = ",".join(map(str, values))
    if len(values) < 2:
        raise UserError(f"{flag} = {shown}: expected at least two, a slope needs them")
    if len(set(values)) < len(values):
        raise UserError(f"{flag} = {shown}: expected each value once")
    for value in values:
        if isinstance(value, int) and value < 1:
            raise UserError(f"{flag} = {shown}: expected positive whole numbers, got {value}")
    return Axis(name, tuple(sorted(values)) if isinstance(values[0], int) else tuple(values))  # type: ignore[arg-type]


def _at_width(base: ModelConfig, width: int, table: Parametrisation) -> ModelConfig:
    """Heads keep their width and grow in number, as in MiniCPM (Table 8: 64 in every size), unless the table says
    otherwise; the feed-forward grows in proportion."""
    growth = width / base.width
    more_heads = growth**table.heads

    def grown(what: str, size: int, factor: float) -> int:
        if not (size * factor).is_integer():
            raise UserError(
                f"--widths: {width}: expected a width that divides into heads as {base.width} does: {size} {what} "
                f"there would be {size * factor:g}"
            )
        return int(size * factor)

    wider = replace(
        base,
        width=width,
        heads=grown("heads", base.heads, more_heads),
        kv_heads=base.kv_heads and grown("key-value heads", base.kv_heads, more_heads),
        head_width=base.head_width and grown("entries of a head", base.head_width, growth / more_heads),
        feed_forward=grown("feed-forward entries", base.feed_forward, growth),
    )
    for key, allowed in wider.problems():
        value = wider.head if key == "head_width" else getattr(wider, key)
        raise UserError(f"--widths: {width}: model.{key} would be {value}: expected {allowed}")
    return wider


def _of_preset(base: ModelConfig, name: str) -> ModelConfig:
    """The shape and the base width of a released or wind-tunnel size, with the vocabulary of the experiment."""
    if name not in PRESETS:
        raise UserError(f"--sizes: {name}: expected one of {', '.join(PRESETS)}")
    shape = {"kv_heads": None, "dim_model_base": ModelConfig.dim_model_base} | PRESETS[name]
    return replace(base, preset=name, head_width=None, **{key: shape[key] for key in _SHAPE})
