"""The layers of the package: who may import whom, what files may be called, and what an import may start."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "cpmjax"
# From the ground up: a file imports from its own folder and from folders before it. Jobs stand on top of them all.
LAYERS = (
    "run",
    "parallel",
    "model",
    "data",
    "checkpoint",
    "formats",
    "training",
    "sampling",
    "analysis",
    "tunnel",
    "studies",
    "jobs",
)
FILES = sorted(PACKAGE.rglob("*.py"))
MODULES = {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in FILES}


def imports(file: Path) -> set[str]:
    """Every name that a file imports, as `package.module` or `package.module.name`, wherever the import stands."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def own_imports(module: str) -> set[str]:
    """The modules of the package that a module imports."""
    found = set()
    for name in imports(MODULES[module]):
        while name not in MODULES and "." in name:
            name = name.rpartition(".")[0]
        if name in MODULES:
            found.add(name)
    return found


def layer(module: str) -> str:
    parts = module.split(".")
    return "jobs" if MODULES[module].parent == PACKAGE else parts[1]


def test_every_folder_is_a_layer():
    assert {layer(module) for module in MODULES} <= set(LAYERS)


# __init__ names the homes of what it exports for type checkers alone; at run time it imports nothing of ours.
@pytest.mark.parametrize("module", sorted(MODULES.keys() - {"cpmjax"}))
def test_imports_come_from_the_same_folder_or_from_below(module):
    height = LAYERS.index(layer(module))
    above = [name for name in own_imports(module) if LAYERS.index(layer(name)) > height]
    assert not above, f"{module} imports from above itself: {above}"
    other_jobs = {name for name in own_imports(module) if layer(name) == layer(module) == "jobs"}
    assert not other_jobs, f"{module} imports another job: {other_jobs}"


def test_no_cycles():
    graph = {module: own_imports(module) for module in MODULES.keys() - {"cpmjax"}}
    assert sum(map(len, graph.values())) > len(graph)  # that imports are seen at all
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_no_file_has_the_name_of_a_folder_beside_it_or_of_a_public_function():
    import cpmjax

    for file in FILES:
        assert not file.with_suffix("").is_dir(), f"{file} and a folder of that name"
    assert not {file.stem for file in PACKAGE.glob("*.py")} & set(cpmjax.__all__)


def test_no_file_is_too_long():
    lengths = {str(file): len(file.read_text().splitlines()) for file in FILES}
    assert {name: length for name, length in lengths.items() if length > 420} == {}


def test_torch_and_transformers_are_not_imported():
    for file in FILES:
        roots = {name.partition(".")[0] for name in imports(file)}
        assert not roots & {"torch", "transformers"}, file


def run_python(code: str, *arguments: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.smoke
def test_importing_every_module_starts_no_backend():
    code = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
from jax._src import xla_bridge
assert not xla_bridge._backends, xla_bridge._backends
import jax
jax.devices()
assert xla_bridge._backends  # or the line above would show nothing
"""
    run_python(code, *sorted(MODULES))


def test_importing_the_package_alone_is_cheap():
    run_python("import sys, cpmjax; assert 'jax' not in sys.modules and 'orbax' not in sys.modules")
