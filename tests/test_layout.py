"""How the modules depend on each other: no import cycles, nothing imports a script, private names stay private."""

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = [path for folder in (".", "tools", "bench") for path in sorted((ROOT / folder).glob("*.py"))]
TREES = {".".join(path.relative_to(ROOT).with_suffix("").parts): ast.parse(path.read_text()) for path in FILES}
SCRIPTS = {"train_teacher", "train_student", "train_ema_baseline", "probe", "physics"}
# bench/loader.py measures the time of each stage of reading a video, so it wraps the functions of these stages.
ALLOWED_PRIVATE_NAMES = {"bench.loader": {"video._packets", "video._frames", "video._to_rgb"}}

# ---------------------------------------------------------------------------------------------------------------------
# imports


def imported_names(tree):
    """{local name: what it is, as "module" or "module.name"} of all imports, including those inside functions."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname or alias.name: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not understood here"
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def our_module(name):
    """The module of ours that "module" or "module.name" belongs to; None if it is not ours."""
    return next((module for module in (name, name.rpartition(".")[0]) if module in TREES), None)


IMPORTS = {
    module: {our_module(name) for name in imported_names(tree).values()} - {None} for module, tree in TREES.items()
}


def indirect_imports(module):
    """The modules of ours that a module imports, directly or through other modules."""
    found, new = set(), {module}
    while new:
        new = set().union(*(IMPORTS[name] for name in new)) - found
        found |= new
    return found


def test_the_import_graph_is_complete():
    assert {"model", "training", "tools.prepare", "bench.step"} <= TREES.keys()
    assert IMPORTS["data"] >= {"cli", "synthetic", "video"}  # `from x import y` and `import x`
    assert "bench.step" in IMPORTS["bench.sweep"] and "tools.convert" in IMPORTS["bench.step"]
    assert indirect_imports("training") >= {"data", "cli", "model", "video"}


def test_there_are_no_import_cycles():
    graphlib.TopologicalSorter(IMPORTS).prepare()  # raises CycleError, which names the cycle


@pytest.mark.parametrize("module", ["model", "masking"])
def test_the_method_imports_nothing_of_ours(module):
    assert IMPORTS[module] == set()


@pytest.mark.parametrize("module", ["tools.prepare", "tools.transcode", "tools.convert"])
def test_data_tools_do_not_import_training(module):
    assert not indirect_imports(module) & {"training"}


@pytest.mark.parametrize("module", [module for module in TREES if not module.startswith("bench.")])
def test_nothing_imports_a_script(module):
    assert TREES.keys() >= SCRIPTS
    assert not IMPORTS[module] & SCRIPTS


# ---------------------------------------------------------------------------------------------------------------------
# private names


def is_private(name):
    return name.startswith("_") and not name.startswith("__") and name != "_"


def private_definitions(tree):
    """The private names that a file defines: functions, classes, methods, variables and attributes."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
    return {name for name in names if is_private(name)}


PRIVATE = {module: private_definitions(tree) for module, tree in TREES.items()}


def foreign_private_names(module):
    """The private names of other modules that a module uses: imports, attributes, and strings as for `getattr`."""
    names = imported_names(TREES[module])
    found = {name for name in names.values() if our_module(name) and is_private(name.rpartition(".")[2])}
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Attribute):
            name = node.attr
            owner = names.get(ast.unparse(node.value))  # a module of ours, if the attribute is one of a module
            if owner in TREES and is_private(name):
                found.add(f"{owner}.{name}")
                continue
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            name = node.value
        else:
            continue
        if name not in PRIVATE[module]:
            found |= {f"{other}.{name}" for other in TREES if name in PRIVATE[other]}
    return found


@pytest.mark.parametrize("module", TREES)
def test_private_names_are_used_in_their_own_file_only(module):
    assert foreign_private_names(module) == ALLOWED_PRIVATE_NAMES.get(module, set())
