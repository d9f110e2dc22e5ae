"""The structure of the package: rooms, the direction of imports, and what stays private."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
import torch
from torch import nn

import peft_svf

ROOT = Path(peft_svf.__file__).parent
FILES = {
    path.relative_to(ROOT.parent).with_suffix("").as_posix().replace("/", "."): path for path in ROOT.rglob("*.py")
}
# Each room may import those above it in this list, never those beside or below it.
FLOORS = [
    {"utils"},
    {"spectral", "scoring", "reporting"},
    {"tuner"},
    {"library"},
    {"search", "routing", "training", "interop"},
    {"mixture"},
    {"evaluation", "serving"},
    {"playground"},
    {"cli"},
    {"peft_svf"},  # the root and `python -m peft_svf`
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
ALLOWED_BESIDE: set[tuple[str, str]] = set()


def room_of(module: str) -> str:
    parts = module.removesuffix(".__init__").split(".")
    return parts[1] if len(parts) > 1 and (ROOT / parts[1]).is_dir() else "peft_svf"


def imported(module: str) -> Iterator[str]:
    """Modules of ours that a file imports, wherever in the file: under `TYPE_CHECKING` and in functions, too."""
    package = module.split(".")[:-1]
    for node in ast.walk(ast.parse(FILES[module].read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            names = [origin, *(f"{origin}.{alias.name}" for alias in node.names)]
            if f"{origin}.__init__" in FILES and all(f"{origin}.{alias.name}" in known() for alias in node.names):
                names = names[1:]  # modules of a package, and nothing of its `__init__`
        for name in names:
            if name in FILES:
                yield name
            elif f"{name}.__init__" in FILES:
                yield f"{name}.__init__"


def known() -> set[str]:
    return {name.removesuffix(".__init__") for name in FILES}


GRAPH = {module: set(imported(module)) - {module} for module in FILES}


def test_the_graph_has_edges() -> None:
    assert "peft_svf.spectral.basis" in GRAPH["peft_svf.spectral.cache"]
    assert sum(map(len, GRAPH.values())) > 150


def test_every_room_has_a_floor() -> None:
    assert {room_of(module) for module in FILES} == set(FLOOR)


def test_no_import_cycles() -> None:
    try:
        list(TopologicalSorter(GRAPH).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_imports_point_downwards() -> None:
    upward = [
        f"{module} -> {other}"
        for module, others in GRAPH.items()
        for other in others
        if room_of(module) != room_of(other)
        and FLOOR[room_of(other)] >= FLOOR[room_of(module)]
        and (room_of(module), room_of(other)) not in ALLOWED_BESIDE
    ]
    assert upward == []


def test_one_top_level_package() -> None:
    folders = {path.parent.name for path in ROOT.parent.glob("*/__init__.py")}
    assert {name for name in folders if "svf" in name} == {"peft_svf"}


# ---------------------------------------------------------------------------------------------------- private names


def private_names(module: str) -> set[str]:
    """Private names that a file defines: functions, classes, variables, methods and attributes of `self`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(FILES[module].read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return {name for name in found if name.startswith("_") and not name.startswith("__")}


# Private names of torch and PEFT that we also use for attributes of our own.
THEIRS = {*dir(nn.Module()), *dir(torch.Tensor), "_adapters", "_active_adapter"}
DEFINED = {module: private_names(module) for module in FILES}


@pytest.mark.parametrize("module", sorted(FILES))
def test_no_private_name_of_another_file(module: str) -> None:
    elsewhere = set().union(*(names for other, names in DEFINED.items() if other != module)) - DEFINED[module] - THEIRS
    tree = ast.parse(FILES[module].read_text(encoding="utf-8"))
    used = [
        f"line {node.lineno}: {ast.unparse(node)}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in elsewhere and ast.unparse(node.value) not in ("self", "cls")
    ]
    used += [
        f"line {node.lineno}: {alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level
        for alias in node.names
        if alias.name.startswith("_") and not alias.name.startswith("__")
    ]
    assert used == []


# ---------------------------------------------------------------------------------------------------- the root


def test_the_root_has_all_names() -> None:
    for name in peft_svf.__all__:
        assert getattr(peft_svf, name) is not None
    assert {"AdaptiveMixture", "SVFConfig", "SearchConfig", "evaluate", "to_lora", "push_expert"} <= {*peft_svf.__all__}
    with pytest.raises(AttributeError, match="no attribute 'SVFConfg'"):
        peft_svf.SVFConfg  # noqa: B018


def test_importing_registers_the_method_and_nothing_else() -> None:
    program = """
import sys
import peft, torch
from torch.optim import optimizer
before, hooks = {*sys.modules}, len(optimizer._global_optimizer_post_hooks)
import peft_svf
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
assert "SVF" in PEFT_TYPE_TO_CONFIG_MAPPING
assert len(optimizer._global_optimizer_post_hooks) == hooks
rooms = {name.split(".")[1] for name in {*sys.modules} - before if name.startswith("peft_svf.")}
assert rooms <= {"utils", "spectral", "reporting", "tuner"}, rooms
for heavy in ("trl", "datasets", "matplotlib", "typer"):
    assert heavy not in {*sys.modules} - before, heavy
"""
    subprocess.run([sys.executable, "-c", program], check=True)
