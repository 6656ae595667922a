"""What one run of a compiled program costs each device: FLOPs of its products, and what it sends to other devices.

Both are read from the optimised HLO text of the program. XLA's own analysis counts the body of a loop once; here what
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

_CUBLAS = '"lhs_contracting_dimensions"'  # in the backend_config of its calls

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_SHAPE = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")


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
    collectives: tuple[Collective, ...]  # the one that sends most first
    opaque: tuple[str, ...]  # targets of custom calls whose insides are not known: not in `flops`

    def describe(self) -> str:
        """One line of FLOPs and, of a program that sends anything, one of collectives."""
        beside = f" (without custom calls: {', '.join(self.opaque)})" if self.opaque else ""
        lines = [f"products of the compiled step, each device: {self.flops:.4g} FLOPs{beside}"]
        if self.collectives:
            lines.append(f"sent by each device in a step: {', '.join(map(str, self.collectives))}")
        return "\n".join(lines)


def costs(compiled: Any, mesh: Mesh) -> Costs:
    """Costs of a `jax.stages.Compiled` on the devices of `mesh`. Raises UserError as `read` does."""
    return read(compiled.as_text(), dict(mesh.shape))


def describe(compiled: Any, mesh: Mesh) -> str:
    """The lines of `Costs.describe`, or one that says why there are none: a program runs without them."""
    try:
        return costs(compiled, mesh).describe()
    except UserError as error:
        return f"not known: {error}"


def read(text: str, mesh: dict[str, int]) -> Costs:
    """Costs of an optimised HLO module for a mesh {axis: size}, whose last axis runs fastest over the devices.

    Raises UserError for a loop that holds costs and does not say how often it turns, and for a form not known here.
    """
    computations, entry = _parse(text)
    total = _Reader(computations, mesh).computation(entry)
    collectives = [Collective(*key, *sums) for key, sums in total.collectives.items()]
    collectives.sort(key=lambda each: (-each.sent, each.kind, each.axes))
    return Costs(total.flops, tuple(collectives), tuple(sorted(total.opaque)))


# ---- text -> instructions --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Instruction:
    name: str
    result: str  # its type as written
    opcode: str
    operands: str
    attributes: str

    @property
    def arguments(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.operands)

    def called(self, *keys: str) -> list[str]:
        """Computations named by attributes such as body=%x or branch_computations={%x, %y}."""
        found = re.findall(rf"\b(?:{'|'.join(keys)})=(\{{[^}}]*\}}|%[\w.\-]+)", self.attributes)
        return [name for group in found for name in re.findall(r"%([\w.\-]+)", group)]


@dataclass
class _Computation:
    instructions: dict[str, _Instruction] = field(default_factory=dict)
    root: str = ""


def _parse(text: str) -> tuple[dict[str, _Computation], str]:
    """-> all computations of a module by name, and the name of its entry."""
    computations: dict[str, _Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            current = computations[header[2]] = _Computation()
            entry = header[2] if header[1] else entry
        elif current is not None and (match := _INSTRUCTION.match(line)):
            root, name, result, opcode, rest = match.groups()
            end = _closing(rest)
            current.instructions[name] = _Instruction(name, result, opcode, rest[:end], rest[end:])
            current.root = name if root else current.root
    if not entry:
        raise UserError("costs of a program: its text has no ENTRY computation; expected optimised HLO")
    return computations, entry


def _closing(text: str) -> int:
    """Where the parenthesis that was open before `text` is closed."""
    depth = 1
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return match.start()
    return len(text)


def _shapes(result: str) -> list[tuple[str, tuple[int, ...]]]:
    """A type, or a tuple of types -> (element type, sizes) of each."""
    return [(kind, _numbers(sizes)) for kind, sizes in _SHAPE.findall(result)]


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", text)))


def _bytes(kind: str, sizes: tuple[int, ...]) -> float:
    bits = re.search(r"\d+", kind)  # pred has none and takes a byte
    return math.prod(sizes) * (int(bits[0]) if bits else 8) / 8


# ---- instructions -> costs -------------------------------------------------------------------------------------------


_Key = tuple[str, tuple[str, ...]]  # kind and axes of a collective


@dataclass
class _Total:
    flops: int = 0
    collectives: dict[_Key, tuple[int, float]] = field(default_factory=dict)  # how many, bytes sent
    opaque: set[str] = field(default_factory=set)

    def add(self, other: _Total, times: int = 1) -> None:
        self.flops += times * other.flops
        for key, (count, sent) in other.collectives.items():
            before = self.collectives.get(key, (0, 0.0))
            self.collectives[key] = (before[0] + times * count, before[1] + times * sent)
        self.opaque |= other.opaque

    @property
    def size(self) -> tuple[int, float]:
        return self.flops, sum(sent for _, sent in self.collectives.values())


class _Reader:
    """Sums over computations; each is read once, however often it is called."""

    def __init__(self, computations: dict[str, _Computation], mesh: dict[str, int]):
        self._computations = computations
        self._mesh = mesh
        self._known: dict[str, _Total] = {}

    def computation(self, name: str) -> _Total:
        if name not in self._known:
            total = _Total()
            for each in self._computations[name].instructions.values():
                total.add(self._instruction(each, self._computations[name]))
            self._known[name] = total
        return self._known[name]

    def _instruction(self, each: _Instruction, within: _Computation) -> _Total:
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
            costs_something = once.flops or once.collectives
            total.add(once, _trip_count(each, within, self._computations) if costs_something else 0)
        elif each.opcode in ("fusion", "call", "async-start", "custom-call"):
            total.add(self._sum(each.called("calls", "to_apply", "called_computations")))
            if each.opcode == "custom-call" and not total.flops:
                target = re.search(r'custom_call_target="([^"]*)"', each.attributes)
                total.opaque.add(target[1] if target else each.name)
        return total

    def _sum(self, names: list[str]) -> _Total:
        total = _Total()
        for name in names:
            total.add(self.computation(name))
        return total

    def _collective(self, each: _Instruction, kind: str, within: _Computation) -> _Total:
        size = sum(_bytes(*shape) for name in each.arguments for shape in _shapes(within.instructions[name].result))
        if kind == "collective-permute":
            pairs = re.search(r"source_target_pairs=\{([\d,{}]*)\}", each.attributes)
            numbers = _numbers(pairs[1] if pairs else "")
            groups: Sequence[tuple[int, ...]] = [
                pair for pair in zip(numbers[::2], numbers[1::2], strict=True) if pair[0] != pair[1]
            ]
            axes = axes_between(groups, self._mesh)
        else:
            groups = replica_groups(each.attributes, math.prod(self._mesh.values()))
            axes = axes_of(groups, self._mesh)
        devices = max(map(len, groups), default=1)
        if devices == 1:  # sends nothing
            return _Total()
        return _Total(collectives={(kind, axes): (1, SENT[kind](devices, size))})


def _sizes(name: str, within: _Computation) -> tuple[int, ...]:
    return _shapes(within.instructions[name].result)[0][1]


def _dot_flops(each: _Instruction, within: _Computation) -> int:
    """2 for each number of the result and each index summed over; also cuBLAS's calls, which say it in their JSON."""
    summed = re.search(r'lhs_contracting_dim(?:s=\{|ensions":\[)([^}\]]*)', each.attributes)
    left = _sizes(each.arguments[0], within)
    contracted = math.prod(left[axis] for axis in _numbers(summed[1])) if summed else 1
    return 2 * math.prod(_shapes(each.result)[0][1]) * contracted


def _convolution_flops(each: _Instruction, within: _Computation) -> int:
    """2 for each multiplication with a number that is there, not with padding or the holes of a dilation: a TPU's
    compiler writes products with batch axes as convolutions over mostly such."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", each.attributes)
    if labels is None:
        raise UserError(f"costs of a program: the convolution {each.name} has no dim_labels")
    image, kernel = (dict(zip(labels[i + 1], _sizes(each.arguments[i], within), strict=True)) for i in range(2))
    result = dict(zip(labels[3], _shapes(each.result)[0][1], strict=True))
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


def _trip_count(loop: _Instruction, within: _Computation, computations: dict[str, _Computation]) -> int:
    """As the compiler noted it; or from a condition `element < constant`, a constant start and a constant step."""
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
    raise UserError(
        f"costs of a program: the loop {loop.name} does not say how often it turns; "
        "expected known_trip_count or a count from one constant to another"
    )


def _scalar(
    name: str, within: _Computation, computations: dict[str, _Computation], given: list[Any] | None = None
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
