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
    "messages": 0,
    "nested": 0,
    "progress": 0,
    "settings": 0,
    "shown": 0,
    "stopwatch": 0,
    "memory": 0,
    "errors": 1,
    "iteration": 2,
    "uris": 2,
    "links": 1,
    "restore": 1,
    "paths": 3,
    "models": 3,
    "files": 3,
    "sets": 4,
    "surgery": 4,
    "training": 4,
    "probe": 4,
    "saving": 5,
    "applying": 5,
    "suggest": 5,
    "inspection": 5,
    "diff": 5,
    "lineage": 5,
    "config": 5,
    "initializers": 6,
    "kinds": 7,
    "observers": 8,
    "builtin": 8,
    "stack": 9,
    "render": 10,
    "testing": 10,
    "scaffold": 10,
    "__pyinstaller": 10,
    "cli": 12,
    "__main__": 13,
}
# Roots of packages hold a docstring only; the front is lazy and above everything.
EXEMPT = {""}


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
    """Modules of the package that ``module`` imports anywhere, under ``TYPE_CHECKING`` and inside functions too."""
    tree = ast.parse(MODULES[module].read_text())
    skipped: set[ast.AST] = set()
    for node in ast.walk(tree):
        if only_at_import_time and isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
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
            full = [f"{node.module}.{alias.name}" for alias in node.names]
            # a package that a module is taken from is not what is used
            inside_it = [name.removeprefix(f"{PACKAGE}.") in MODULES for name in full]
            names = full if all(inside_it) else [node.module or "", *full]
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
    """cli, render -> stack, builtin -> initializers -> applying -> surgery; initializers, saving -> sets -> files."""
    upward = [
        f"{module} imports {imported}"
        for module in sorted(MODULES.keys() - EXEMPT)
        for imported in sorted(_imports(module) - EXEMPT)
        if _layer(imported) > _layer(module)
    ]
    assert upward == []


def test_neighbours_of_a_layer_that_must_not_know_each_other_do_not() -> None:
    """A room knows only what its docstring allows, whatever its height."""
    forbidden = {
        "files": ("sets", "surgery", "applying", "saving", "models", "paths"),
        "sets": ("surgery", "applying", "saving", "models", "config"),
        "surgery": ("files", "sets", "saving", "applying", "config", "models"),
        "saving": ("surgery", "applying", "config", "kinds"),
        "inspection": ("diff", "lineage"),
        "render": ("cli",),
    }
    for module in sorted(MODULES):
        room = module.partition(".")[0]
        above = {one.partition(".")[0] for one in _imports(module)}
        assert not above & set(forbidden.get(room, ())), module
        if room != "builtin":
            assert "builtin" not in above, module
        if module != "" and room not in ("__main__", "cli", "render"):
            assert not above & {"cli", "render"}, module


def test_only_shown_values_name_a_module_above_their_own() -> None:
    """A module that is imported by a text is no way around the direction; ``shown`` finds ``render`` so."""
    upward = {
        (module, name)
        for module in MODULES.keys() - EXEMPT
        for node in ast.walk(ast.parse(MODULES[module].read_text()))
        if isinstance(node, ast.Constant) and str(node.value).startswith(f"{PACKAGE}.")
        for name in {str(node.value).removeprefix(f"{PACKAGE}.")} & (MODULES.keys() - EXEMPT)
        if _layer(name) > _layer(module)
    }
    assert upward == {("shown", "render.values")}


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
