"""Which modules may look at the disk, and how."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import noether_init_core

ROOT = Path(noether_init_core.__file__).parent

#: Functions and methods that look at the disk. Most take a failure for "it is not there"; ``disk.py`` has all of them
#: in a form that takes only ENOENT and ENOTDIR for it.
LOOKS = frozenset(
    {
        "exists", "lexists", "isdir", "isfile", "islink", "ismount", "is_file", "is_dir", "is_symlink", "is_mount",
        "samefile", "stat", "lstat", "scandir", "listdir", "iterdir", "glob", "iglob", "rglob", "walk", "access",
        "readlink", "realpath", "resolve", "getsize", "getmtime",
    }
)  # fmt: skip
#: What these names are methods of, in code that is not about the disk.
OTHERS = ("LOCAL", "storage", "self.storage", "snapshot.storage", "kinds", "leaf", "graph", "self", "re", "ast")

#: Module and function -> why it may look by itself.
ALLOWED = {
    ("files.storage.disk", "*"): "the one place",
    ("files.storage.artifact_cache", "_check_folder"): "only FileNotFoundError is absent, the rest is raised",
    ("files.storage.artifact_cache", "_refusal"): "only FileNotFoundError is absent, the rest is raised",
    ("files.storage.artifact_cache", "_brought_onto_disk"): "only FileNotFoundError is absent, the rest is raised",
    ("files.refusals", "new_name"): "a name for a command in a message; where the look fails, the command fails, too",
    ("files.opening", "_opened"): "words about a folder that was refused before",
    ("files.formats.others", "folder_kind"): "words about a folder that was refused before",
    (
        "links",
        "_is_absent",
    ): "only FileNotFoundError and NotADirectoryError are absent, the rest is left to other errors",
    ("links", "no_folder"): "near names in a message about a folder that was not found",
    ("links", "absence"): "words about a path that was not found; every other failure is skipped",
    ("diff.compare", "_stamp"): "every failure is raised",
    ("kinds.lookup", "_mode"): "only FileNotFoundError and NotADirectoryError are absent, the rest is raised",
    ("cli.usage", "configs_here"): "names for an example in a message",
    ("cli.usage", "_modules_here"): "names for an example in a message",
    ("cli.usage", "_runs"): "the overview without a command; it decides nothing",
    ("cli.usage", "_folders_in"): "the overview without a command; it decides nothing",
    ("cli.output", "_with_model"): "a config for an example in a message",
    ("cli.options", "_configs"): "words for a shell that completes a line",
    ("cli.kinds", "_naming_folders"): "advice in an error",
    ("scaffold.package", "_sources"): "files of this package, perhaps in a zip file",
    ("testing.damage", "*"): "folders that the kit itself has made",
    ("testing.plugin", "*"): "folders that the kit itself has made",
    ("testing.snapshots", "*"): "folders that the kit itself has made",
}


def _looks(path: Path) -> list[tuple[str, int, str]]:
    """Function, line and text of each look in a module."""
    found: list[tuple[str, int, str]] = []

    def visit(node: ast.AST, function: str) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            function = node.name
        is_look = isinstance(node, ast.Attribute) and node.attr in LOOKS
        if isinstance(node, ast.Attribute) and is_look and ast.unparse(node.value) not in OTHERS:
            found.append((function, node.lineno, ast.unparse(node)))
        for child in ast.iter_child_nodes(node):
            visit(child, function)

    visit(ast.parse(path.read_text()), "")
    return found


MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in sorted(ROOT.rglob("*.py"))}


@pytest.mark.parametrize("module", MODULES)
def test_a_module_looks_at_the_disk_only_where_a_failure_is_no_absence(module: str) -> None:
    """``os.path.exists`` and its like take a failing disk for a missing file, and then a set is passed over."""
    wrong = [
        f"{module}:{line} {text}"
        for function, line, text in _looks(MODULES[module])
        if (module, function) not in ALLOWED and (module, "*") not in ALLOWED
    ]
    assert not wrong, "use LOCAL of files/storage/disk.py, or add it to ALLOWED with the reason"


def test_every_exception_is_needed() -> None:
    """Else the list would allow looks that nobody has thought about."""
    there = {(module, function) for module, path in MODULES.items() for function, _line, _text in _looks(path)}
    there |= {(module, "*") for module, _function in there}
    assert set(ALLOWED) <= there
