"""The counts of ``tools/house.py``, on small packages whose numbers are known."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture(scope="module")
def house() -> ModuleType:
    """The tool as a module; it lies outside the package."""
    spec = importlib.util.spec_from_file_location("house", Path(__file__).parents[1] / "tools" / "house.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_code_lines_are_those_with_code(house: ModuleType) -> None:
    """Docstrings, comments and blank lines are left out; each line of a long expression counts."""
    assert house.code_lines('"""Doc\nstring."""\n\n# why\nVALUE = (\n    1\n)\n\n\ndef f():\n    """Doc."""\n') == 4


def test_circles_include_imports_for_types_and_inside_functions(house: ModuleType, tmp_path: Path) -> None:
    """An import under ``TYPE_CHECKING`` and one inside a function make a circle; a module beside it is in none."""
    package = tmp_path / house.PACKAGE
    package.mkdir()
    for name, text in {
        "__init__": "",
        "one": f"from {house.PACKAGE}.two import twice\n",
        "two": f"def twice():\n    from {house.PACKAGE} import three\n    return three.VALUE\n",
        "three": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n"
        f"    from {house.PACKAGE}.two import twice\nVALUE = 1\n",
    }.items():
        (package / f"{name}.py").write_text(text)
    assert house.circles(tmp_path) == [["noether_init_core.three", "noether_init_core.two"]]


def test_a_walk_counts_files_changes_and_depth(house: ModuleType, tmp_path: Path) -> None:
    """Two calls into another file and back are four changes of file."""
    package = tmp_path / house.PACKAGE
    package.mkdir()
    for name, text in {
        "inner": "def leaf():\n    return 1\n\n\ndef through():\n    return leaf()\n",
        "outer": "def ask(through):\n    return through() + through()\n",
    }.items():
        (package / f"{name}.py").write_text(text)
    spaces: dict[str, dict[str, Any]] = {}
    for name in ("inner", "outer"):
        path = package / f"{name}.py"
        spaces[name] = {}
        exec(compile(path.read_text(), str(path), "exec"), spaces[name])
    before = sys.getprofile()
    try:
        with house.Walk(tmp_path) as walk:
            spaces["outer"]["ask"](spaces["inner"]["through"])
    finally:
        sys.setprofile(before)
    assert {Path(file).name for file in walk.files} == {"inner.py", "outer.py"}
    assert (walk.changes, walk.depth) == (4, 3)


def test_looks_are_heads_opened_and_folders_listed(house: ModuleType, tmp_path: Path) -> None:
    """A head that is opened twice is two opened and one different; other files and folders do not count."""
    head = tmp_path / "set" / "manifest.json"
    head.parent.mkdir()
    head.write_text("{}")
    with house.Looks(tmp_path) as looks:
        head.read_text()
        head.read_text()
        (tmp_path / "other.json").write_text("{}")
        assert [path.name for path in tmp_path.joinpath("set").iterdir()] == ["manifest.json"]
        sorted(Path(__file__).parent.iterdir())
    assert looks.heads == [str(head), str(head)]
    assert looks.listings == [str(head.parent)]
