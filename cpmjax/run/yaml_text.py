"""YAML as the files and flags of an experiment mean it, where PyYAML, which follows YAML 1.1, means something else."""

from __future__ import annotations

import re
from typing import Any

import yaml

_TAG = "tag:yaml.org,2002:"


class KeyTwice(yaml.MarkedYAMLError):
    """A mapping has a key twice; `problem` names it."""


class Loader(yaml.SafeLoader):
    """1e-3 is a number and 10:13 is text, not a number of base 60; a key that is there twice is an error."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise KeyTwice(problem=f"the key {key.value} is there twice", problem_mark=key.start_mark)
            seen.add(str(key.value))
        return node

    def resolve(self, kind: type[yaml.Node], value: str, implicit: Any) -> str:
        tag = super().resolve(kind, value, implicit)
        return f"{_TAG}str" if tag in (f"{_TAG}int", f"{_TAG}float") and ":" in value else tag


class Dumper(yaml.SafeDumper):
    """Writes what `Loader` reads back equal."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        # PyYAML would write next line, U+0085, as a line break, which reads back as a space.
        return self.represent_scalar(f"{_TAG}str", data, style='"' if "\x85" in data else None)


Dumper.add_representer(str, Dumper.represent_str)


_EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
Loader.add_implicit_resolver(f"{_TAG}float", _EXPONENT, list("-+.0123456789"))
Dumper.add_implicit_resolver(f"{_TAG}float", _EXPONENT, list("-+.0123456789"))
