"""Imports go one way: cli, tasks, envs, policies, train, flow and its like, solvers and so on."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fmft_fast"
LAYERS = (
    {"cli", "__main__", "analyze", "commands", "demo", "report", "info", "rollouts", "studies"},
    {"tasks"},
    {"envs"},
    {"policies"},
    {"train"},
    {"flow", "fields", "analysis", "data", "workers"},
    {"solvers"},
    {"fusion"},
    {"ops"},
    {"kernels", "_cpu", "_cuda"},
)
SHARED = {"errors", "version"}
# The one arrow back: a kernel file implements what ops declares, and imports nothing else of it.
DECLARED = {
    f"fmft_fast.ops.{name}"
    for name in ("accepted", "contract", "layout", "network", "precision", "trajectory")
}
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def modules():
    """Give (part, dotted module name, file) of every source file."""
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        yield parts[0], ".".join(("fmft_fast", *parts)), file
    for file in sorted((ROOT / "kernels" / "triton").rglob("*.py")):
        yield "kernels", f"fmft_fast.kernels.{file.stem}", file


def imported(module, file):
    """Give (line, part, dotted name) for every import of the package, also inside functions."""
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    package = package.removesuffix(".__init__")
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1]
            start = ".".join(base) if node.level else ""
            path = ".".join(part for part in (start, node.module) if part)
            # `from fmft_fast import cli` names a part; elsewhere the module itself does.
            names = [f"{path}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            top, _, rest = name.partition(".")
            if top == "fmft_fast":
                yield node.lineno, rest.partition(".")[0], name


@pytest.mark.parametrize("part", sorted(RANK))
def test_each_part_imports_only_what_lies_to_its_right(part):
    wrong = [
        f"{file.relative_to(ROOT)}:{line} imports {target or 'the whole package'}"
        for own, module, file in modules()
        if own == part
        for line, target, name in imported(module, file)
        if target not in SHARED and not allowed(own, target)
        if not (own == "kernels" and name.rpartition(".")[0] in DECLARED)
    ]
    assert not wrong, "; ".join(wrong)


def allowed(own, target):
    """Whether a part may import another: itself, its own command layer, or a later layer."""
    if own == target or (RANK[own] == 0 and RANK.get(target) == 0):
        return True
    return target in RANK and RANK[target] > RANK[own]


def test_every_source_file_belongs_to_a_layer():
    parts = {part for part, _, _ in modules()} - {"__init__"}
    assert parts <= set(RANK) | SHARED


def test_shared_modules_import_nothing_of_the_package():
    for part, module, file in modules():
        if part in SHARED:
            assert not list(imported(module, file))


def test_an_arrow_against_the_order_would_be_seen(tmp_path):
    file = tmp_path / "probe.py"
    file.write_text(
        "from fmft_fast.train import fit\nfrom ..tasks import base\nfrom .. import cli\n"
        "def f():\n    import fmft_fast.ops.backend\n    import os\n"
    )
    found = list(imported("fmft_fast.solvers.probe", file))
    assert [row[:2] for row in found] == [(1, "train"), (2, "tasks"), (3, "cli"), (5, "ops")]
    assert [allowed("solvers", row[1]) for row in found] == [False, False, False, True]
