"""From the command line to a configuration, and from the end of a job to an exit code.

    python -m cpmjax.train [EXPERIMENT.yaml] [--section.key=value ...]

Later layers win: defaults, the parent's config.yaml of a branch, the model preset, the YAML file, the command line.
Mappings are merged key by key, except that another `type` replaces a section whole. Each layer is checked against the
dataclasses as it is laid on, so an error can name where the value came from; draccus then builds the dataclasses.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import errno
import inspect
import io
import json
import os
import re
import reprlib
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

import draccus
import yaml

from cpmjax.run import libtpu
from cpmjax.run.config import Config, validate
from cpmjax.run.errors import UserError
from cpmjax.run.identity import encode, fingerprint
from cpmjax.run.schedule import WSD
from cpmjax.run.yaml_text import Dumper, KeyTwice, Loader

Tree = dict[str, Any]

_COMMAND_LINE = "command line"
_SCALARS = {
    bool: ((bool,), "true or false"),
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    str: ((str,), "text (in quotes where it looks like a number)"),
}


# YAML files.


def read_yaml(path: Path) -> Tree:
    """The mapping that a YAML file holds. Raises UserError with file and line for anything else."""
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; expected a YAML file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8; expected a YAML file") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{path}, line {line}: {error.problem}; expected YAML") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}; expected YAML") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected a mapping of sections, got {_show(tree)}")
    return tree


def dump(config: Config) -> str:
    """config.yaml: the resolved configuration, which `load` reads back equal; its fingerprint is the first line."""
    text = yaml.dump(encode(config), Dumper=Dumper, sort_keys=False, allow_unicode=True)
    return f"# fingerprint: {fingerprint(config)}\n{text}"


# The command line.


def _arguments(argv: Sequence[str]) -> tuple[list[str], Tree]:
    """Splits argv into file names and the tree of what --section.key=value sets."""
    files: list[str] = []
    tree: Tree = {}
    arguments = iter(argv)
    for argument in arguments:
        if not argument.startswith("-"):
            files.append(argument)
            continue
        key, equals, text = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or not all(key.split(".")):
            raise UserError(f"{_COMMAND_LINE}: unknown flag {argument}; expected --section.key=value or --help")
        if not equals:
            text = next(arguments, "")
        if not text or (not equals and text.startswith("--")):
            raise UserError(f"{_COMMAND_LINE}: --{key} has no value; expected --{key}=VALUE")
        value = _value(key, text)
        for part in reversed(key.split(".")):
            value = {part: value}
        tree = _merge(tree, value)
    return files, tree


def _value(key: str, text: str) -> Any:
    try:
        return yaml.load(text, Loader)
    except KeyTwice as error:
        raise UserError(f"{_COMMAND_LINE}: --{key}={text}: {error.problem}; expected each key once") from error
    except yaml.YAMLError:
        return text  # `*.md` is no YAML, but a good glob


def _merge(base: Tree, new: Tree) -> Tree:
    merged = dict(base)
    for key, value in new.items():
        old = base.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            another_type = "type" in old and value.get("type", old["type"]) != old["type"]
            merged[key] = value if another_type else _merge(old, value)
        else:
            merged[key] = value
    return merged


def _given(tree: Tree, section: str, key: str) -> Any:
    keys = tree.get(section)
    return keys.get(key) if isinstance(keys, dict) else None


class Parser(argparse.ArgumentParser):
    """The flags of a job that takes some beside the keys of an experiment; a bad one is a UserError."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)

    @classmethod
    def documented(cls, prog: str, docstring: str | None) -> Parser:
        """A parser whose help is the docstring of its job: what it is, a paragraph `usage: ...`, and the rest."""
        about, _, usage = (docstring or "").partition("usage: ")
        usage, _, notes = usage.partition("\n\n")
        formatter = argparse.RawDescriptionHelpFormatter
        return cls(prog=prog, usage=usage, description=f"{about}\n{notes}", formatter_class=formatter)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{_COMMAND_LINE}: {message}; expected what {self.prog} --help says")


def step_list(text: str) -> list[int] | Literal["all"]:
    """The value of --steps: different numbers with commas between them, or "all"."""
    if text == "all":
        return "all"
    try:
        steps = [int(step) for step in text.split(",")]
    except ValueError:
        steps = []
    if not steps or len(set(steps)) < len(steps):
        raise argparse.ArgumentTypeError(f"expected different numbers with commas between them, or all, got {text!r}")
    return steps


# Checks of a tree against the dataclasses.


def _show(value: Any) -> str:
    """A value on one line, of bounded length; null, true and false as YAML spells them."""
    return json.dumps(value) if value is None or isinstance(value, bool) else reprlib.repr(value)


def _nearest(name: object, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    return f" (nearest: {near[0]})" if near else ""


def _one_of(name: object, names: Sequence[str]) -> str:
    return f"one of {', '.join(names)}{_nearest(name, names)}"


def _is_choice(kind: Any) -> bool:
    """Whether `type` chooses among subclasses of this dataclass (draccus registers them on their base)."""
    return isinstance(kind, type) and draccus.ChoiceRegistry in kind.__bases__


def _hints(kind: Any) -> dict[str, Any]:
    """The annotation of each field of a dataclass."""
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _check(kind: Any, value: Any, key: str, source: str, also: str = "") -> None:
    """Raises UserError unless `value`, read from YAML, fits the annotation `kind`."""

    def refuse(expected: str) -> NoReturn:
        raise UserError(f"{source}: {key} = {_show(value)}: expected {expected}{also}")

    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        (inner,) = (argument for argument in arguments if argument is not types.NoneType)
        if value is not None:
            _check(inner, value, key, source, " or null")
    elif dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            refuse("a mapping of keys")
        _check_section(kind, value, key, source)
    elif origin is dict:
        if not isinstance(value, dict):
            refuse("a mapping of names")
        for name, item in value.items():
            _check(str, name, f"{key}: the name {name}", source)
            _check(arguments[1], item, f"{key}.{name}", source)
    elif origin is tuple:
        each = arguments[1] is Ellipsis
        if not isinstance(value, list) or not (each or len(value) == len(arguments)):
            refuse("a list, as in [a, b]" if each else f"a list of {len(arguments)}")
        for index, item in enumerate(value):
            _check(arguments[0 if each else index], item, f"{key}[{index}]", source)
    elif origin is Literal:
        if value not in arguments:
            refuse(_one_of(value, arguments))
    elif type(value) not in _SCALARS[kind][0]:
        refuse(_SCALARS[kind][1])


def _check_section(kind: Any, value: Tree, key: str, source: str) -> None:
    known: dict[str, Any] = {}
    if _is_choice(kind):
        choices = kind.get_known_choices()
        name = value.get("type")
        if not isinstance(name, str) or name not in choices:
            expected = _one_of(name, list(choices))
            raise UserError(f"{source}: {key}.type = {_show(name)}: expected {expected}")
        kind, known = choices[name], {"type": str}
    known |= _hints(kind)
    for name, item in value.items():
        path = f"{key}.{name}" if key else str(name)
        if name not in known:
            allowed = _one_of(name, list(known))
            raise UserError(f"{source}: {path}: no such key; expected {allowed}")
        _check(known[name], item, path, source)


# Layers to a configuration.


def _resolve(layers: Sequence[tuple[Tree, str]]) -> Config:
    tree = encode(Config())
    for layer, source in layers:
        tree = _merge(tree, layer)
        _check(Config, tree, "", source)
    config = draccus.decode(Config, tree)
    validate(config)
    return config


def decode(tree: Tree, source: str) -> Config:
    """The configuration in the tree of a config.yaml. `source` names the file in errors."""
    return _resolve([(tree, source)])


def override(tree: Tree, source: str, keys: Sequence[str]) -> Config:
    """The configuration in a tree, `source` in errors, with what --section.key=value of a command line replaces."""
    files, overrides = _arguments(keys)
    if files:
        raise UserError(f"{_COMMAND_LINE}: unexpected {files[0]}; expected --section.key=value")
    return _resolve([(tree, source), (overrides, _COMMAND_LINE)])


def load(argv: Sequence[str], presets: Mapping[str, Mapping[str, Any]], usage: str) -> Config:
    """The configuration that a command line asks for.

    `presets` holds model keys by name. `--help` prints `usage` and all keys and exits. Raises UserError, one line.
    """
    if "--help" in argv or "-h" in argv:
        print("\n".join([usage.strip(), "", "Keys with their defaults:", *_describe(Config, "")]))
        raise SystemExit(0)
    files, overrides = _arguments(argv)
    if len(files) > 1:
        raise UserError(f"{_COMMAND_LINE}: expected at most one experiment, got {', '.join(files)}")
    experiment = read_yaml(Path(files[0])) if files else {}
    user = _merge(experiment, overrides)

    layers = [(experiment, files[0] if files else _COMMAND_LINE), (overrides, _COMMAND_LINE)]
    preset = _given(user, "model", "preset")
    if isinstance(preset, str):
        if preset not in presets:
            raise UserError(f"model.preset = {_show(preset)}: expected {_one_of(preset, list(presets))}")
        layers.insert(0, ({"model": dict(presets[preset])}, f"model preset {preset}"))

    parent_directory = _given(user, "branch", "run")
    if not isinstance(parent_directory, str):
        return _with_corpora(_resolve(layers))
    parent, source = _read_parent(Path(parent_directory).expanduser())
    return _branch(_with_corpora(_resolve([(parent, source), *layers])), user)


def _with_corpora(config: Config) -> Config:
    if not config.data.corpora:
        raise UserError("data.corpora = {}: expected at least one corpus")
    return config


def _read_parent(directory: Path) -> tuple[Tree, str]:
    path = directory / "config.yaml"
    if not path.is_file():
        raise UserError(f"branch.run = {str(directory)!r}: expected a run directory, but there is no {path}")
    tree = read_yaml(path)
    tree.pop("branch", None)
    if isinstance(tree.get("run"), dict):
        tree["run"] = {k: v for k, v in tree["run"].items() if k not in ("directory", "accept_changes")}
    if isinstance(tree.get("log"), dict):  # its steps are the parent's
        tree["log"] = {k: v for k, v in tree["log"].items() if k != "profile_steps"}
    return tree, str(path)


def _branch(config: Config, user: Tree) -> Config:
    """Starts the decay right after the branch point, unless the user chose the length of the stable stage."""
    run, step = config.branch.run, config.branch.step
    if run is None or step is None:
        raise UserError(f"branch.step = null: expected the step of {run} to start from")
    directory = _given(user, "run", "directory")
    if directory is None or Path(directory).expanduser().resolve() == Path(run).expanduser().resolve():
        raise UserError(f"run.directory = {_show(directory)}: expected a directory of its own for a branch of {run}")
    if not isinstance(config.schedule, WSD) or _given(user, "schedule", "stable") is not None:
        return config
    return config.branched(config.schedule, step)


# Help.


def _describe(kind: Any, prefix: str) -> Iterator[str]:
    """A line for each key: how it is set, with its default, and its comment in the source."""
    hints = _hints(kind)
    for field in dataclasses.fields(kind):
        key, hint = prefix + field.name, hints[field.name]
        default: Any = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        registry = typing.get_args(hint)[1] if typing.get_origin(hint) is dict else hint
        if _is_choice(registry):
            key, chosen = (key, default.get_choice_name(type(default))) if registry is hint else (f"{key}.NAME", "...")
            choices = registry.get_known_choices()
            yield f"{f'  --{key}.type={chosen}':<44}  # {' | '.join(choices)}"
            for name, choice in choices.items():
                yield from (f"  {line}" for line in [f"with type {name}:", *_describe(choice, f"{key}.")])
        elif dataclasses.is_dataclass(hint):
            yield from _describe(hint, f"{key}.")
        else:
            remark = "; ".join([_type_name(hint), *_comment(kind, field.name)])
            yield f"{f'  --{key}={json.dumps(default)}':<44}  # {remark}"


def _comment(kind: type, name: str) -> list[str]:
    sources = (inspect.getsource(base) for base in kind.__mro__ if dataclasses.is_dataclass(base))
    return [text for source in sources for text in re.findall(rf"^    {name}: .*  # (.*)$", source, re.MULTILINE)][:1]


def _type_name(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return " | ".join(arguments)
    if origin in (typing.Union, types.UnionType):
        return " | ".join("null" if argument is types.NoneType else _type_name(argument) for argument in arguments)
    return getattr(hint, "__name__", str(hint)) if origin is None else str(hint)


# The end of a job.


def main(job: Callable[[list[str]], int | None]) -> NoReturn:
    """Runs `job` on the command line and exits: with its own code, 2 after a UserError or a failing disk, 130 after ^C.

    Only errors that nobody foresaw show a traceback.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr does: a terminal of ASCII ends no job
    libtpu.keep_quiet()
    try:
        sys.exit(job(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        message = _explain(error)
        if message is None:
            raise
        print("error:", " ".join(message.splitlines()), file=sys.stderr)
        sys.exit(2)


def _explain(error: Exception) -> str | None:
    """One line for an error that is the user's or the machine's, None for a bug."""
    if isinstance(error, UserError):
        return str(error)
    cause: BaseException | None = error
    while cause is not None:
        full = isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT)
        # Libraries in C++ report a full disk as text.
        if full or os.strerror(errno.ENOSPC) in str(cause):
            file = getattr(cause, "filename", None) or f"what was being written ({cause})"
            return f"no space left on the disk that holds {file}: make room, then run the same command again"
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return None
