"""Bytes that an instruction of a compiled program reads from the memory of its device and writes to it.

Each operand is read once and each result written once, as XLA's own analysis counts; what is fused in between is not.
Of an array that is sliced, only the slice moves, and of one that is updated in place, only the update.
"""

from __future__ import annotations

from cpmjax.parallel.hlo import Computation, Instruction, bytes_in_memory

# They move nothing, or what they move is counted where it happens.
_FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "conditional",
    "call",
    "after-all",
    "partition-id",
    "replica-id",
    "iota",
    "optimization-barrier",
    "opt-barrier",
    "domain",
}
_SLICES = ("dynamic-slice", "slice", "gather")
_SAME_ARRAY = ("bitcast", "copy", "convert", "reshape")


def moved(each: Instruction, within: Computation, computations: dict[str, Computation]) -> float:
    """Bytes of one run of an instruction that stands in no fusion."""
    opcode = each.opcode.removesuffix("-start")
    if opcode in _FREE or each.opcode.endswith("-done"):
        return 0.0
    if each.opcode == "fusion":
        inside = computations[each.called("calls")[0]]
        read = sum(
            _read(inside, number, bytes_in_memory(within.instructions[name].result))
            for number, name in enumerate(each.arguments)
        )
        return read + _written(inside.root, inside, bytes_in_memory(each.result))
    if opcode in _SLICES:
        return 2 * bytes_in_memory(each.result)
    if opcode == "dynamic-update-slice":
        return 2 * bytes_in_memory(within.instructions[each.arguments[1]].result)
    operands = sum(bytes_in_memory(within.instructions[name].result) for name in each.arguments)
    return operands + (operands if each.opcode != opcode else bytes_in_memory(each.result))


def _read(inside: Computation, number: int, whole: float) -> float:
    """Of the operand of a fusion that is its parameter of this number, of so many bytes."""
    name = next(
        name
        for name, each in inside.instructions.items()
        if each.opcode == "parameter" and each.operands == str(number)
    )
    return _used(name, inside, whole)


def _used(name: str, inside: Computation, whole: float) -> float:
    total = 0.0
    for each in inside.instructions.values():
        if name not in each.arguments:
            continue
        if each.opcode in _SLICES and each.arguments[0] == name:
            total += bytes_in_memory(each.result)
        elif each.opcode == "dynamic-update-slice" and each.arguments[0] == name:
            total += 0.0  # it is updated where it lies
        elif each.opcode in _SAME_ARRAY:
            total += _used(each.name, inside, whole)
        else:
            return whole
    return min(total, whole)


def _written(name: str, inside: Computation, whole: float) -> float:
    """Of the result of a fusion, or of one of a tuple of them."""
    each = inside.instructions[name]
    if each.opcode == "tuple":
        return sum(_written(part, inside, bytes_in_memory(inside.instructions[part].result)) for part in each.arguments)
    if each.opcode in _SAME_ARRAY:
        return _written(each.arguments[0], inside, whole)
    if each.opcode == "dynamic-update-slice":
        return min(whole, bytes_in_memory(inside.instructions[each.arguments[1]].result))
    return whole
