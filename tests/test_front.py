"""The public front: its names, how little importing it costs, and what type checkers see."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
import textwrap
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest

import noether_init_core
from noether_init_core.errors import type_of

FRONT = Path(noether_init_core.__file__)


def _run(program: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *options, "-c", program], capture_output=True, text=True, check=True)


def test_every_public_name_is_there_and_is_what_its_module_defines() -> None:
    """__all__ is complete, and each name comes from the module that the front says."""
    assert len(set(noether_init_core.__all__)) == len(noether_init_core.__all__)
    for name in noether_init_core.__all__:
        assert getattr(noether_init_core, name) is not None, name
    assert set(noether_init_core.__all__) <= set(dir(noether_init_core))
    assert noether_init_core.kinds.__name__ == "noether_init_core.kinds"
    assert noether_init_core.InitializerStack.__module__ == "noether_init_core.stack.stack"


def test_every_error_is_public() -> None:
    """Whoever catches one needs no private import."""
    from noether_init_core import InitError, errors

    public = {name for name, value in vars(errors).items() if inspect.isclass(value) and issubclass(value, InitError)}
    assert len(public) > 20
    assert public <= set(noether_init_core.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    """hasattr works, and a misspelt name does not turn into something else."""
    assert not hasattr(noether_init_core, "InitialiserStack")
    with pytest.raises(ImportError, match="cannot import name 'nothing_of_the_kind'"):
        exec("from noether_init_core import nothing_of_the_kind")


def test_importing_the_package_imports_neither_torch_nor_pydantic_nor_a_plugin() -> None:
    """Nothing at all of this package but the front, and nothing that is installed."""
    program = (
        "import sys, noether_init_core, json\n"
        "print(json.dumps([name for name, module in sys.modules.items()"
        " if 'site-packages' in (getattr(module, '__file__', None) or '') or name.startswith('noether_init_core')]))"
    )
    loaded = json.loads(_run(program).stdout)
    assert not {"torch", "pydantic", "pydantic_core", "numpy", "attrs", "pluggy"} & set(loaded)
    assert [name for name in loaded if name.startswith("noether_init_core")] == ["noether_init_core"]


def test_the_front_is_there_in_a_zip_archive(tmp_path: Path) -> None:
    """As in a zipapp: the names are data of the package."""
    package = Path(noether_init_core.__file__).parent
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for path in [*package.glob("*.py"), *package.glob("*.pyi")]:
            archive.write(path, f"noether_init_core/{path.name}")
    program = "import noether_init_core as front; print(front.__file__, front.PathProvider.__name__)"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "all.zip")}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout.split() == [str(tmp_path / "all.zip" / "noether_init_core" / "__init__.py"), "PathProvider"]


def test_importing_the_package_imports_few_modules_of_python() -> None:
    """Fewer than 50, all of the standard library; benchmarks/kinds.py measures how long that takes."""
    program = "import sys\nbefore = set(sys.modules)\nimport noether_init_core\nprint(len(set(sys.modules) - before))"
    assert int(_run(program).stdout) < 50


def test_modules_that_promise_it_import_neither_torch_nor_pydantic() -> None:
    """kinds, errors, paths, iteration, hooks and the command line stay light."""
    program = (
        "import sys, json\n"
        "import noether_init_core.kinds, noether_init_core.errors, noether_init_core.paths\n"
        "import noether_init_core.iteration, noether_init_core.kinds.hookspec, noether_init_core.cli\n"
        "print(json.dumps([name for name in ('torch', 'pydantic', 'numpy', 'yaml') if name in sys.modules]))"
    )
    assert json.loads(_run(program).stdout) == []


def test_a_misspelt_public_name_fails_mypy_and_a_right_one_passes(tmp_path: Path) -> None:
    """The lazy front hides nothing from type checkers, neither names nor their types."""
    good = """
        from pathlib import Path
        from noether_init_core import InitializerBase, PathProvider, TrainingIteration, kinds

        paths: PathProvider = PathProvider(Path("runs"), "run")
        start: TrainingIteration = TrainingIteration.zero()
        cls: type[InitializerBase] = kinds.resolve("file")
    """
    wrong = """
        import noether_init_core
        from noether_init_core import InitialiserStack

        noether_init_core.TrainingIteratoin
        noether_init_core.TrainingIteration.from_string(3)
    """
    (tmp_path / "good.py").write_text(textwrap.dedent(good))
    (tmp_path / "wrong.py").write_text(textwrap.dedent(wrong))
    # Leaving out torch saves most of the time; none of its types is looked at here.
    skipped = "".join(f"[mypy-{name}.*]\nfollow_imports = skip\n" for name in ("torch", "numpy", "rich", "typer"))
    (tmp_path / "mypy.ini").write_text(f"[mypy]\nstrict = true\nfollow_imports = silent\n{skipped}")

    def check(name: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "mypy", name]
        environment = {"MYPYPATH": str(FRONT.parents[1]), "PATH": ""}
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)

    right = check("good.py")
    assert right.returncode == 0, right.stdout + right.stderr
    caught = check("wrong.py")
    assert caught.returncode == 1, caught.stderr
    assert 'has no attribute "InitialiserStack"' in caught.stdout
    assert 'has no attribute "TrainingIteratoin"' in caught.stdout
    assert '"from_string" of "TrainingIteration" has incompatible type "int"' in caught.stdout


@pytest.mark.parametrize(("value", "shown"), [({}, "a dict"), (3, "an int"), (OrderedDict(), "an OrderedDict")])
def test_messages_name_a_type_with_its_article(value: object, shown: str) -> None:
    """Which one depends on the first letter."""
    assert type_of(value) == shown
