"""What one run of a compiled program costs each device: FLOPs of its products, what it reads and writes in memory, and
what it sends to other devices.

All is read from the optimised HLO text of the program. XLA's own analysis counts the body of a loop once; here what
stands in a loop counts as often as the loop turns. Of a conditional the costliest branch counts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jax.sharding import Mesh

from cpmjax.parallel.device_groups import axes_between, axes_of, replica_groups
from cpmjax.parallel.hlo import Computation, Instruction, numbers, parse, shapes, size_in_bytes
from cpmjax.parallel.kernel_costs import kernel_flops
from cpmjax.parallel.traffic import moved
from cpmjax.run.errors import UserError

# Bytes that one of n devices sends, from the bytes it puts in: rings (Thakur, Rabenseifner & Gropp 2005, Optimization
# of Collective Communication Operations in MPICH), each part going around once, or twice to reduce and to spread it;
# all-to-all sends each of the others its part, a permutation everything to one.
SENT: dict[str, Callable[[int, float], float]] = {
    "all-reduce": lambda n, size: 2 * (n - 1) / n * size,
    "all-gather": lambda n, size: (n - 1) * size,
    "reduce-scatter": lambda n, size: (n - 1) / n * size,
    "all-to-all": lambda n, size: (n - 1) / n * size,
    "collective-permute": lambda n, size: size,
}
_UNKNOWN_COLLECTIVES = ("ragged-all-to-all", "collective-broadcast")

# Custom calls of a TPU's compiler that multiply nothing.
_WITHOUT_PRODUCTS = {
    "AllocateBuffer",
    "AssumeGatherIndicesInBound",
    "AsyncCollectiveDone",
    "AsyncCollectiveStart",
    "ConcatBitcast",
    "GatherScatterIndicesBitpacked",
}

_CUBLAS = '"lhs_contracting_dimensions"'  # in the backend_config of its calls


@dataclass(frozen=True)
class Collective:
    """All collectives of one kind over the same axes of the mesh, in one run of the program."""

    kind: str
    axes: tuple[str, ...]  # of the mesh; none where its groups are not those of any axes
    count: int
    sent: float  # bytes from one device, all of them together

    def __str__(self) -> str:
        return f"{' x '.join(self.axes) or 'other groups'} {self.kind} {self.sent / 2**20:,.3g} MiB in {self.count:,}"


@dataclass(frozen=True)
class Costs:
    """One run of a program on one device."""

    flops: int  # of matrix products and convolutions, 2 for each multiplication; what XLA computes twice counts twice
    moved: float  # bytes read from the device's memory and written to it (`cpmjax.parallel.traffic`)
    collectives: tuple[Collective, ...]  # the one that sends most first
    opaque: tuple[str, ...]  # targets of custom calls whose insides are not known: not in `flops`

    def describe(self) -> str:
        """One line of FLOPs and, of a program that sends anything, one of collectives."""
        beside = f" (without custom calls: {', '.join(self.opaque)})" if self.opaque else ""
        lines = [
            f"products of the compiled step, each device: {self.flops:.4g} FLOPs{beside}; "
            f"{self.moved / 2**30:,.3g} GiB read from memory and written to it"
        ]
        if self.collectives:
            lines.append(f"sent by each device in a step: {', '.join(map(str, self.collectives))}")
        return "\n".join(lines)


def costs(compiled: Any, mesh: Mesh, turns: int | None = None) -> Costs:
    """Costs of a `jax.stages.Compiled` on the devices of `mesh`; `turns` and errors as of `read`."""
    return read(compiled.as_text(), dict(mesh.shape), turns)


def describe(compiled: Any, mesh: Mesh) -> str:
    """The lines of `Costs.describe`, or one that says why there are none: a program runs without them."""
    try:
        return costs(compiled, mesh).describe()
    except UserError as error:
        return f"not known: {error}"


def read(text: str, mesh: dict[str, int], turns: int | None = None) -> Costs:
    """Costs of an optimised HLO module for a mesh {axis: size}, whose last axis runs fastest over the devices.

    `turns` is how often a loop turns that does not say it. Raises UserError for one that holds costs, if that is None,
    and for a form not known here.
    """
    computations, entry = parse(text)
    total = _Reader(computations, mesh, turns).computation(entry)
    collectives = [Collective(*key, *sums) for key, sums in total.collectives.items()]
    collectives.sort(key=lambda each: (-each.sent, each.kind, each.axes))
    return Costs(total.flops, total.moved, tuple(collectives), tuple(sorted(total.opaque)))


# ---- instructions -> costs -------------------------------------------------------------------------------------------


_Key = tuple[str, tuple[str, ...]]  # kind and axes of a collective


@dataclass
class _Total:
    flops: int = 0
    moved: float = 0.0  # bytes
    collectives: dict[_Key, tuple[int, float]] = field(default_factory=dict)  # how many, bytes sent
    opaque: set[str] = field(default_factory=set)

    def add(self, other: _Total, times: int = 1) -> None:
        self.flops += times * other.flops
        self.moved += times * other.moved
        for key, (count, sent) in other.collectives.items():
            before = self.collectives.get(key, (0, 0.0))
            self.collectives[key] = (before[0] + times * count, before[1] + times * sent)
        self.opaque |= other.opaque

    @property
    def size(self) -> tuple[int, float, float]:
        return self.flops, sum(sent for _, sent in self.collectives.values()), self.moved


class _Reader:
    """Sums over computations; each is read once, however often it is called."""

    def __init__(self, computations: dict[str, Computation], mesh: dict[str, int], turns: int | None):
        self._computations = computations
        self._mesh = mesh
        self._turns_unsaid = turns
        self._known: dict[str, _Total] = {}

    def computation(self, name: str) -> _Total:
        if name not in self._known:
            total, within = _Total(), self._computations[name]
            for each in within.instructions.values():
                total.add(self._instruction(each, within))
                total.moved += moved(each, within, self._computations)
            self._known[name] = total
        return self._known[name]

    def _instruction(self, each: Instruction, within: Computation) -> _Total:
        kind = each.opcode.removesuffix("-start")
        if kind in SENT:
            return self._collective(each, kind, within)
        if kind in _UNKNOWN_COLLECTIVES:
            raise UserError(f"costs of a program: {each.name} is a {kind}; known are {', '.join(SENT)}")
        if each.opcode == "dot" or _CUBLAS in each.attributes:
            return _Total(_dot_flops(each, within))
        if each.opcode == "convolution":
            return _Total(_convolution_flops(each, within))
        if each.opcode == "conditional":
            branches = each.called("branch_computations", "true_computation", "false_computation")
            return max(map(self.computation, branches), key=lambda total: total.size)
        total = _Total()
        if each.opcode == "while":
            once = self._sum(each.called("body", "condition"))
            total.add(once, self._turns(each, within, required=bool(once.flops or once.collectives)))
        elif each.opcode in ("fusion", "call", "async-start", "custom-call"):
            total.add(self._sum(each.called("calls", "to_apply", "called_computations")))
            if each.opcode != "call":  # what is fused reads and writes as one
                total.moved = 0.0
            if each.opcode == "custom-call" and not total.flops and each.target not in _WITHOUT_PRODUCTS:
                if (flops := kernel_flops(each, within)) is None:
                    total.opaque.add(each.target)
                else:
                    total.flops = flops
        return total

    def _turns(self, loop: Instruction, within: Computation, required: bool) -> int:
        """Once if it is not said and all it costs is memory traffic. Raises UserError if that is not all."""
        turns = _trip_count(loop, within, self._computations)
        turns = self._turns_unsaid if turns is None else turns
        if turns is None and required:
            raise UserError(
                f"costs of a program: the loop {loop.name} does not say how often it turns; "
                "expected known_trip_count or a count from one constant to another"
            )
        return 1 if turns is None else turns

    def _sum(self, names: list[str]) -> _Total:
        total = _Total()
        for name in names:
            total.add(self.computation(name))
        return total

    def _collective(self, each: Instruction, kind: str, within: Computation) -> _Total:
        # A TPU's compiler spreads one collective over a chain of fusions and names it in each: it counts once.
        if "chain_id=" in each.attributes and not any(
            other.target == "AsyncCollectiveStart" for other in within.instructions.values()
        ):
            return _Total()
        size = sum(
            size_in_bytes(*shape) for name in each.arguments for shape in shapes(within.instructions[name].result)
        )
        if kind == "collective-permute":
            pairs = re.search(r"source_target_pairs=\{([\d,{}]*)\}", each.attributes)
            ends = numbers(pairs[1] if pairs else "")
            groups: Sequence[tuple[int, ...]] = [
                pair for pair in zip(ends[::2], ends[1::2], strict=True) if pair[0] != pair[1]
            ]
            axes = axes_between(groups, self._mesh)
        else:
            groups = replica_groups(each.attributes, math.prod(self._mesh.values()))
            axes = axes_of(groups, self._mesh)
        devices = max(map(len, groups), default=1)
        if devices == 1:  # sends nothing
            return _Total()
        return _Total(collectives={(kind, axes): (1, SENT[kind](devices, size))})


def _sizes(name: str, within: Computation) -> tuple[int, ...]:
    return shapes(within.instructions[name].result)[0][1]


def _dot_flops(each: Instruction, within: Computation) -> int:
    """2 for each number of the result and each index summed over; also cuBLAS's calls, which say it in their JSON."""
    summed = re.search(r'lhs_contracting_dim(?:s=\{|ensions":\[)([^}\]]*)', each.attributes)
    left = _sizes(each.arguments[0], within)
    contracted = math.prod(left[axis] for axis in numbers(summed[1])) if summed else 1
    return 2 * math.prod(shapes(each.result)[0][1]) * contracted


def _convolution_flops(each: Instruction, within: Computation) -> int:
    """2 for each multiplication with a number that is there, not with padding or the holes of a dilation: a TPU's
    compiler writes products with batch axes as convolutions over mostly such."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", each.attributes)
    if labels is None:
        raise UserError(f"costs of a program: the convolution {each.name} has no dim_labels")
    image, kernel = (dict(zip(labels[i + 1], _sizes(each.arguments[i], within), strict=True)) for i in range(2))
    result = dict(zip(labels[3], shapes(each.result)[0][1], strict=True))
    window = dict(re.findall(r"(\w+)=([\dx_\-]+)", (re.findall(r"window=\{([^}]*)\}", each.attributes) or [""])[0]))
    met = 1
    for axis in sorted(set(labels[1]) - {"b", "f"}):  # spatial axes are numbered in the order of the window's sizes
        stride, spread, kernel_spread, pad = (
            int(window[key].split("x")[int(axis)].partition("_")[0]) if key in window else default
            for key, default in (("stride", 1), ("lhs_dilate", 1), ("rhs_dilate", 1), ("pad", 0))
        )
        places = np.arange(result[axis])[:, None] * stride - pad + np.arange(kernel[axis]) * kernel_spread
        there = (places >= 0) & (places <= (image[axis] - 1) * spread) & (places % spread == 0)
        met *= int(np.count_nonzero(there))
    groups = re.search(r"batch_group_count=(\d+)", each.attributes)
    batch = image["b"] // (int(groups[1]) if groups else 1)
    return 2 * met * batch * result["f"] * kernel["i"]


# ---- loops -----------------------------------------------------------------------------------------------------------


def _trip_count(loop: Instruction, within: Computation, computations: dict[str, Computation]) -> int | None:
    """As the compiler noted it; or from a condition `element < constant`, a constant start and a constant step;
    None if neither."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(known[1])
    condition, body = (computations[loop.called(key)[0]] for key in ("condition", "body"))
    start, turn = within.instructions[loop.arguments[0]], body.instructions[body.root]
    match _scalar(condition.root, condition, computations):
        case ("less", ("element", int(index)), int(limit)) if start.opcode == turn.opcode == "tuple":
            first = _scalar(start.arguments[index], within, computations)
            match _scalar(turn.arguments[index], body, computations):
                case ("add", ("element", int(same)), int(step)) | ("add", int(step), ("element", int(same))) if (
                    isinstance(first, int) and same == index and step > 0
                ):
                    return max(0, -((first - limit) // step))
    return None


def _scalar(
    name: str, within: Computation, computations: dict[str, Computation], given: list[Any] | None = None
) -> Any:
    """An integer as an expression: a constant; ("element", its index in what a loop carries); ("add", x, y); ("less",
    x, y); None for all else. `given` are the parameters of a fusion; without, the parameter is what a loop carries."""
    each = within.instructions[name]

    def parts() -> list[Any]:
        return [_scalar(part, within, computations, given) for part in each.arguments]

    match each.opcode:
        case "constant" if re.fullmatch(r"-?\d+", each.operands):
            return int(each.operands)
        case "parameter":
            return None if given is None else given[int(each.operands)]
        case "get-tuple-element" if within.instructions[each.arguments[0]].opcode == "parameter" and given is None:
            return "element", int(re.findall(r"index=(\d+)", each.attributes)[0])
        case "copy" | "bitcast":
            return parts()[0]
        case "fusion" | "call":
            inside = computations[each.called("calls", "to_apply")[0]]
            return _scalar(inside.root, inside, computations, parts())
        case "add":
            return "add", *parts()
        case "compare" if "direction=LT" in each.attributes:
            return "less", *parts()
    return None
