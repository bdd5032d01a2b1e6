"""How the modules depend on each other: no import cycles, nothing imports a script, private names stay private."""

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = [path for folder in (".", "tools") for path in sorted((ROOT / folder).glob("*.py"))]
TREES = {".".join(path.relative_to(ROOT).with_suffix("").parts): ast.parse(path.read_text()) for path in FILES}


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


def test_imports():
    assert IMPORTS["training"] >= {"cli", "data", "flops", "model", "video"}  # `import x` and `from x import y`
    graphlib.TopologicalSorter(IMPORTS).prepare()  # raises CycleError, which names the cycle
    assert not IMPORTS["model"] | IMPORTS["masking"]
    assert not (IMPORTS["data"] | IMPORTS["video"] | IMPORTS["synthetic"]) & {"model", "training"}
    scripts = {"train_teacher", "train_student", "train_ema_baseline", "probe", "physics"}
    assert {module for module, imports in IMPORTS.items() if imports & scripts} <= {"bench"}


@pytest.mark.parametrize("module", TREES)
def test_private_names_are_used_in_their_own_file_only(module):
    names = imported_names(TREES[module])
    ours = {local for local, name in names.items() if name in TREES}
    foreign = {name for name in names.values() if our_module(name) and name.rpartition(".")[2].startswith("_")}
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and ast.unparse(node.value) in ours:
            foreign.add(ast.unparse(node))
    assert not foreign
