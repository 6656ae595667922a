"""Pickles read as data: plain containers, and the few calls that the reader has names for.

A pickle is a program for a stack machine. Python's own machine calls whatever the program names and sets any attribute;
this one knows the instructions that a state dict is made of, and a name means what the caller's table says it means.
Every instruction takes a bounded step: nothing is hashed but text, nothing is walked, no length is believed.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

_EXPECTED = "expected tensors and plain containers"


class PickleError(ValueError):
    """What is wrong with a pickle, or with what it holds: one line, without the file."""


def read_pickle(stream: BinaryIO, names: Mapping[str, Any], persistent: Callable[[Any], Any]) -> Any:
    """The value of the pickle that begins here; the stream then stands behind it.

    `names` gives each name that may occur ("collections.OrderedDict") its meaning. One that is called must be a
    function, and gets the tuple of its arguments; `persistent` gets a persistent id. Both check what they get and raise
    PickleError. The attributes of an object are dropped.

    Raises PickleError for a damaged pickle, an unknown name or an instruction that no state dict needs. The cost in
    memory is at most about 100 times the pickle: limit the stream.
    """
    machine = _Machine(names, persistent)
    try:
        for opcode, argument, _ in pickletools.genops(stream):
            machine.step(opcode.name, argument)
    except PickleError:
        raise
    except (ValueError, IndexError, KeyError) as error:
        # Of genops, of an empty stack, of an empty memo.
        raise PickleError(f"no pickle, or a damaged or incomplete one; {_EXPECTED}") from error
    return machine.pop()


class _Machine:
    def __init__(self, names: Mapping[str, Any], persistent: Callable[[Any], Any]) -> None:
        self.names = names
        self.persistent = persistent
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}  # not a list: an index costs nothing by being large

    def step(self, instruction: str, argument: Any) -> None:
        match instruction:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                if len(self.stack) != 1 or self.marks:
                    raise IndexError
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                self.stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[instruction])
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE" | "SHORT_BINUNICODE":
                self.stack.append(argument)
            case "EMPTY_TUPLE" | "EMPTY_LIST" | "EMPTY_DICT":
                self.stack.append({"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict}[instruction]())
            case "MARK":
                self.marks.append(len(self.stack))
            case "TUPLE":
                self.stack.append(tuple(self.pop_to_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                self.stack.append(tuple(reversed([self.pop() for _ in range(int(instruction[-1]))])))
            case "APPEND" | "APPENDS":
                items = [self.pop()] if instruction == "APPEND" else self.pop_to_mark()
                self.top(list).extend(items)
            case "SETITEM" | "SETITEMS":
                items = [self.pop(), self.pop()][::-1] if instruction == "SETITEM" else self.pop_to_mark()
                self.set_items(items)
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = self.top(object)
            case "MEMOIZE":
                self.memo[len(self.memo)] = self.top(object)
            case "BINGET" | "LONG_BINGET":
                self.stack.append(self.memo[argument])
            case "GLOBAL":
                self.stack.append(self.named(argument.replace(" ", ".")))
            case "STACK_GLOBAL":
                name, module = self.pop(), self.pop()
                if type(name) is not str or type(module) is not str:
                    raise PickleError(f"a name that is no text; {_EXPECTED}")
                self.stack.append(self.named(f"{module}.{name}"))
            case "REDUCE":
                arguments, function = self.pop(), self.pop()
                if not callable(function) or type(arguments) is not tuple:
                    raise PickleError(f"a call of what is no function; {_EXPECTED}")
                self.stack.append(function(arguments))
            case "BINPERSID":
                self.stack.append(self.persistent(self.pop()))
            case "BUILD":
                self.pop()
                self.top(dict)
            case _:
                raise PickleError(f"a pickle with {instruction}, which no state dict needs; {_EXPECTED}")

    def pop(self) -> Any:
        if self.marks and self.marks[-1] == len(self.stack):
            raise IndexError
        return self.stack.pop()

    def pop_to_mark(self) -> list[Any]:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def top(self, kind: type) -> Any:
        if not isinstance(self.stack[-1], kind):
            raise PickleError(f"items or attributes of what has none; {_EXPECTED}")
        return self.stack[-1]

    def set_items(self, items: list[Any]) -> None:
        for key, value in zip(items[::2], items[1::2], strict=True):
            # The hash of a tuple in tuples may take forever.
            if type(key) is not str:
                raise PickleError(f"a dict whose key is {type(key).__name__}; expected names of tensors")
            self.top(dict)[key] = value

    def named(self, name: str) -> Any:
        if name not in self.names:
            raise PickleError(f"holds {ascii(name)[1:-1][:80]}; {_EXPECTED}")
        return self.names[name]
