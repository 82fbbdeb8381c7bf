"""Dependencies point one way, at module level and inside functions alike."""

from __future__ import annotations

import ast
from pathlib import Path

import noether_init_core

ROOT = Path(noether_init_core.__file__).parent
PACKAGE = "noether_init_core"

# Layer -> the modules in it, by prefix. A module may import from layers below its own, and within its own as long as
# no cycle comes of it. The longest prefix counts.
LAYERS = {
    "errors": 0,
    "stopwatch": 0,
    "iteration": 1,
    "paths": 1,
    "hooks": 1,
    "offers": 1,
    "protocols": 1,
    "binding": 2,
    "config.base": 2,
    "checkpoints": 3,
    "probing": 3,
    "artifacts": 3,
    "comparing": 4,
    "looking": 4,
    "surgery": 3,
    "training": 4,
    "provenance": 4,
    "authors": 5,
    "lineage": 5,
    "initializers": 5,
    "contract": 6,
    "tracing": 6,
    "kinds": 7,
    "config.json_schema": 7,
    "config.yaml_text": 7,
    "config.noether_resolved": 7,
    "config.any_initializer": 8,
    "config.files": 8,
    "config.wording": 8,
    "hook_caller": 8,
    "observers": 8,
    "stack": 9,
    "builtin": 9,
    "render": 10,
    "pages": 11,
    "testing": 10,
    "scaffold": 10,
    "cli": 12,
    "__main__": 13,
}
# Roots of packages hold a docstring only; the front is lazy and above everything.
EXEMPT = {"", "config"}


def _modules() -> dict[str, Path]:
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = _modules()


def _layer(module: str) -> int:
    parts = module.split(".")
    for end in range(len(parts), 0, -1):
        prefix = ".".join(parts[:end])
        if prefix in LAYERS:
            return LAYERS[prefix]
    raise AssertionError(f"{module} is in no layer; add it to LAYERS where it belongs")


def _imports(module: str, *, only_at_import_time: bool = False) -> set[str]:
    """Modules of the package that ``module`` imports anywhere; types alone do not count."""
    tree = ast.parse(MODULES[module].read_text())
    skipped: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            skipped.update(inner for statement in node.body for inner in ast.walk(statement))
        if only_at_import_time and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            skipped.update(ast.walk(node))
    found: set[str] = set()
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        for name in names:
            inside = name.removeprefix(PACKAGE).removeprefix(".")
            if name.split(".")[0] == PACKAGE and inside in MODULES and inside not in ("", module):
                found.add(inside)
    return found


def test_every_module_is_in_a_layer() -> None:
    """A new module says where it stands before anything depends on it."""
    assert len(MODULES) > 20
    for module in MODULES.keys() - EXEMPT:
        assert _layer(module) >= 0


def test_no_module_imports_from_a_layer_above_its_own() -> None:
    """cli, render -> builtin -> initializers -> surgery, checkpoints -> iteration, paths, errors."""
    upward = [
        f"{module} imports {imported}"
        for module in sorted(MODULES.keys() - EXEMPT)
        for imported in sorted(_imports(module) - EXEMPT)
        if _layer(imported) > _layer(module)
    ]
    assert upward == []


def test_neighbours_of_a_layer_that_must_not_know_each_other_do_not() -> None:
    """checkpoints knows nothing of surgery; nobody but entry points imports builtin."""
    for module in sorted(MODULES):
        imported = _imports(module)
        if module.startswith("checkpoints"):
            assert not {one for one in imported if one.startswith("surgery")}, module
        if not module.startswith("builtin"):
            assert not {one for one in imported if one.startswith("builtin.") or one == "builtin"}, module
        if module != "" and not module.startswith(("__main__", "cli", "pages", "render")):
            assert not {one for one in imported if one.startswith(("cli", "pages", "render"))}, module
        if module.startswith("render"):
            assert not {one for one in imported if one.startswith("pages")}, module


def test_the_front_imports_nothing_by_itself() -> None:
    """Importing the package imports no module of it."""
    assert _imports("", only_at_import_time=True) == set()


def test_there_are_no_import_cycles() -> None:
    """Neither at import time nor through imports inside functions."""
    graph = {module: _imports(module) for module in MODULES if module != ""}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail[trail.index(module) :], module))
        if module not in done:
            for imported in sorted(graph[module]):
                visit(imported, (*trail, module))
            done.add(module)

    for module in sorted(graph):
        visit(module, ())
    assert done == set(graph)


def test_entry_points_are_the_only_mention_of_the_built_ins() -> None:
    """The core has no list of kinds: no source file outside builtin names a built-in's class."""
    names = ("PreviousRunInitializer", "ResumeInitializer", "FileInitializer")
    for module, path in MODULES.items():
        if module.startswith("builtin"):
            continue
        tree = ast.parse(path.read_text())
        used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        assert not used & set(names), module
