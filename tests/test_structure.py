"""Imports go down the floors, never in a circle, and stand at the top; no file reads sys.modules.

The files are parsed, never imported.
"""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("mmkernels", "models", "benchmarks", "tests")
# The folders of the ops. `integrations` stands above them.
OPS = sorted(path.parent.name for path in ROOT.glob("mmkernels/*/api.py"))
# A module that begins with the first may import none that begins with one of the others. The checks of a real GPU run
# the cases of the tests, so benchmarks may import `tests.<op>.cases`.
LAYERS = {
    "mmkernels": ("models", "benchmarks", "tests"),
    "models": ("benchmarks", "tests"),
    "benchmarks": ("tests",),
    "models.data": (
        "models.common.training",
        *(f"models.{path.parent.name}" for path in ROOT.glob("models/*/model.py")),
    ),
    "mmkernels._tiles": tuple(f"mmkernels.{op}" for op in OPS),
}
# All that a model's file may import, beside the standard library: who knows torch can read it alone.
KNOWN_TO_A_MODEL = ("torch", "mmkernels", "models.common.layers")
# The functions that import a module of this repository themselves, each for a reason.
LATE_IMPORTS = {
    # transformers is one of several peers, and optional: the others are measured without it.
    "benchmarks.beam_search.peers.gpt2_loops",
    # tests.compiling skips the file where Triton is not installed, and must be imported before Triton's kernels are.
    "tests.divided_attention.test_compile.test_forms_follow_the_launchers",
    "tests.divided_attention.test_compile.test_packed_tiles_fit_together",
}

SOURCES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
}
TREES = {module: ast.parse(path.read_text()) for module, path in SOURCES.items()}


def is_within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def names_imported(module: str, within: ast.AST | None = None) -> set[str]:
    """Every dotted name that an import statement asks for: in the module, at its top or inside a function, or
    `within` one of its nodes alone."""
    names = set()
    for node in ast.walk(within or TREES[module]):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: a relative import; name the package"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def edges(module: str) -> set[str]:
    """The modules of this repository that a module imports: `from a import b` gives a.b, or a if b is no module.

    Python runs a package's __init__.py before its modules, but no edge stands for that: each __init__.py that offers
    what its modules define would otherwise count as a circle.
    """
    found = set()
    for name in names_imported(module):
        candidates = (name, name.rpartition(".")[0])
        found |= {next((candidate for candidate in candidates if candidate in SOURCES), module)}
    return found - {module}


def circles() -> list[list[str]]:
    """The strongly connected components of more than one module (Tarjan 1972)."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(module: str) -> None:
        order[module] = low[module] = len(order)
        stack.append(module)
        for other in edges(module):
            if other not in order:
                visit(other)
            if other in stack:
                low[module] = min(low[module], low[other])
        if low[module] == order[module]:
            component = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(component) > 1:
                found.append(sorted(component))

    for module in SOURCES:
        if module not in order:
            visit(module)
    return found


def test_no_circles():
    assert not circles()


@pytest.mark.parametrize("package", LAYERS)
def test_layers(package):
    above = {
        f"{module} imports {name}"
        for module in SOURCES
        if is_within(module, package)
        for name in names_imported(module)
        if any(is_within(name, forbidden) for forbidden in LAYERS[package])
        if not (package == "benchmarks" and name.endswith(".cases"))
    }
    assert not above


def test_a_model_is_readable_alone():
    models = [module for module in SOURCES if module.startswith("models.") and module.endswith(".model")]
    assert models
    foreign = {
        f"{module} imports {name}"
        for module in models
        for name in names_imported(module)
        if name.partition(".")[0] not in sys.stdlib_module_names
        if not any(is_within(name, known) for known in KNOWN_TO_A_MODEL)
    }
    assert not foreign


def test_imports_of_this_repository_stand_at_the_top():
    late = {
        f"{module}.{node.name}"
        for module, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
        if any(name.partition(".")[0] in PACKAGES for name in names_imported(module, node))
    }
    assert late == LATE_IMPORTS


def test_no_file_reads_sys_modules():
    """A test that runs code in a process of its own may: there it is a string."""
    readers = {
        f"{module}:{node.lineno}"
        for module, tree in TREES.items()
        for node in ast.walk(tree)
        if (isinstance(node, ast.Attribute) and node.attr == "modules" and ast.unparse(node.value) == "sys")
        or (isinstance(node, ast.ImportFrom) and node.module == "sys" and "modules" in [a.name for a in node.names])
    }
    assert not readers


def test_the_search_for_circles_finds_one(monkeypatch):
    """A circle through a function's import, and one that a package closes."""
    sources = {"a.b": "import a.c", "a.c": "def f():\n    from a import b", "a.d": "from a.b import x"}
    monkeypatch.setattr(f"{__name__}.SOURCES", dict.fromkeys(["a", *sources]))
    monkeypatch.setattr(f"{__name__}.TREES", {"a": ast.parse(""), **{m: ast.parse(s) for m, s in sources.items()}})
    assert circles() == [["a.b", "a.c"]]
