"""The reference page, the page of hooks and the build of the site are held to the code."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from support.pages import ROOT, pages

import noether_init_core
from noether_init_core.kinds.hookspec import HOOK_NAMES, HookSpecs


def first_line(name: str) -> str | None:
    """The first sentence or line of a public name's own docstring; None for plain values."""
    value = getattr(noether_init_core, name)
    is_documented = inspect.isclass(value) or inspect.isfunction(value) or inspect.ismodule(value)
    return inspect.getdoc(value).splitlines()[0] if is_documented else None


def test_the_reference_has_every_public_name_and_no_other() -> None:
    """One row for each name of ``__all__``, with the first line of its docstring."""
    page = (ROOT / "docs" / "reference.md").read_text()
    found = re.findall(r"^\| `(\w+)` \| (.*) \|$", page, re.MULTILINE)
    rows = dict(found)
    assert sorted(name for name, _shown in found) == sorted(noether_init_core.__all__)
    for name, shown in rows.items():
        line = first_line(name)
        assert line is None or shown.replace("`", "") == line.replace("`", ""), name


def test_no_file_has_marks_of_an_unfinished_merge() -> None:
    """They hide in tables and texts that no program reads."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    files = [ROOT / name for name in tracked] or list(ROOT.glob("docs/**/*.md"))
    marks = re.compile(rb"^(<{7}|>{7}) ", re.MULTILINE)
    assert [str(path) for path in files if path.is_file() and marks.search(path.read_bytes())] == []


@pytest.mark.parametrize("hook", HOOK_NAMES)
def test_the_page_of_hooks_has_every_hook_with_its_arguments(hook: str) -> None:
    """The heading of a hook is its signature."""
    arguments = list(inspect.signature(getattr(HookSpecs, hook)).parameters)[1:]
    page = (ROOT / "docs" / "write" / "hooks.md").read_text()
    assert f"### `{hook}({', '.join(arguments)})`\n" in page


def test_the_page_of_dependencies_has_every_one() -> None:
    """Each requirement of the package has its row, and no row is about another."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = {re.split(r"[<>=!~ \[]", requirement)[0] for requirement in project["dependencies"]}
    page = (ROOT / "docs" / "maintain" / "dependencies.md").read_text()
    table = page.split("## Of the installed package")[1].split("\n##")[0].split("\n\n")[1]
    assert {line.split("|")[1].strip() for line in table.splitlines()[2:]} == required


def test_what_the_readme_points_to_exists() -> None:
    """Pictures and files that the README names are in the tree."""
    readme = (ROOT / "README.md").read_text()
    named = set(re.findall(r"\]\(([^):]+)\)", readme)) | set(re.findall(r"`((?:docs|examples)/[^`]*)`", readme))
    assert named
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", pages(), ids=lambda path: str(path.relative_to(ROOT)))
def test_pages_name_no_path_of_a_machine(page: Path) -> None:
    """No page knows where it was written."""
    assert not re.search(r"/(work|root|home|tmp)/", page.read_text())


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    """Every reference resolves and every page is reachable."""
    pytest.importorskip("sphinx")
    pytest.importorskip("furo")
    pytest.importorskip("myst_parser")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "docs", str(tmp_path / "site")]
    built = subprocess.run(
        [*command, "-d", str(tmp_path / "doctrees")], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stderr
    assert (tmp_path / "site" / "noether-differences.html").exists()
