"""How the modules depend on each other: no import cycles, nothing imports a script, private names stay private."""

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = [path for folder in (".", "tools") for path in sorted((ROOT / folder).glob("*.py"))]
TREES = {".".join(path.relative_to(ROOT).with_suffix("").parts): ast.parse(path.read_text()) for path in FILES}
SCRIPTS = {"train_teacher", "train_student", "train_ema_baseline", "probe", "physics"}


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


def test_there_are_no_import_cycles():
    assert IMPORTS["training"] >= {"cli", "data", "flops", "model", "video"}  # `import x` and `from x import y`
    graphlib.TopologicalSorter(IMPORTS).prepare()  # raises CycleError, which names the cycle


@pytest.mark.parametrize("module", ["model", "masking"])
def test_the_method_imports_nothing_of_ours(module):
    assert IMPORTS[module] == set()


@pytest.mark.parametrize("module", ["data", "video", "synthetic"])
def test_data_does_not_import_the_networks(module):
    assert not IMPORTS[module] & {"model", "training"}


def test_only_bench_imports_a_script():
    assert TREES.keys() >= SCRIPTS
    assert {module for module, imports in IMPORTS.items() if imports & SCRIPTS} <= {"bench"}


def test_private_names_are_used_in_their_own_file_only():
    for module, tree in TREES.items():
        names = imported_names(tree)
        ours = {local for local, name in names.items() if name in TREES}
        foreign = {name for name in names.values() if our_module(name) and name.rpartition(".")[2].startswith("_")}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ours and node.attr.startswith("_"):
                foreign.add(ast.unparse(node))
        assert not foreign, module
