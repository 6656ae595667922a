"""The text of an optimised HLO module -> computations of instructions."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

from cpmjax.run.errors import UserError

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_SHAPE = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\](\{[^{}]*\})?")
_ELSEWHERE = re.compile(r"S\([1-9]\d*\)")  # a memory space that is not the device's main one


@dataclass(frozen=True)
class Instruction:
    name: str
    result: str  # its type as written
    opcode: str
    operands: str
    attributes: str

    @property
    def arguments(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.operands)

    @property
    def target(self) -> str:
        """Of a custom call."""
        found = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return found[1] if found else self.name

    def called(self, *keys: str) -> list[str]:
        """Computations named by attributes such as body=%x or branch_computations={%x, %y}."""
        found = re.findall(rf"\b(?:{'|'.join(keys)})=(\{{[^}}]*\}}|%[\w.\-]+)", self.attributes)
        return [name for group in found for name in re.findall(r"%([\w.\-]+)", group)]


@dataclass
class Computation:
    instructions: dict[str, Instruction] = field(default_factory=dict)
    root: str = ""


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """-> all computations of a module by name, and the name of its entry."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = computations[header[2]] = Computation()
            entry = header[2] if header[1] else entry
        elif current is not None and (match := _INSTRUCTION.match(line)):
            root, name, result, opcode, rest = match.groups()
            end = _closing(rest)
            current.instructions[name] = Instruction(name, result, opcode, rest[:end], rest[end:])
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


def shapes(result: str) -> list[tuple[str, tuple[int, ...]]]:
    """A type, or a tuple of types -> (element type, sizes) of each."""
    return [(kind, numbers(sizes)) for kind, sizes, _ in _SHAPE.findall(result)]


def bytes_in_memory(result: str) -> float:
    """Of a type, or of all of a tuple: what of it lies in the main memory of the device, not in one on the chip."""
    return sum(
        size_in_bytes(kind, numbers(sizes))
        for kind, sizes, layout in _SHAPE.findall(result)
        if not _ELSEWHERE.search(layout)
    )


def numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", text)))


def size_in_bytes(kind: str, sizes: tuple[int, ...]) -> float:
    bits = re.search(r"\d+", kind)  # pred has none and takes a byte
    return math.prod(sizes) * (int(bits[0]) if bits else 8) / 8
