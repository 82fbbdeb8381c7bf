"""Run the tests of the part that needs no torch on other Pythons: ``python tools/pythons.py`` (``make test-pythons``).

For each version that is installed here, on the path or by pyenv, an environment below ``build/`` gets the package and
all that it requires apart from torch; a version that is absent is skipped, and the output says so. Exits with 1 where a
test fails, and where an environment cannot be made.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VERSIONS = ("3.12", "3.13")
#: Files that import no torch; those of their tests that need it all the same are marked ``needs_torch``.
TESTS = (
    "tests/config/test_document.py",
    "tests/config/test_noether_resolved.py",
    "tests/kinds/test_kind_discovery.py",
    "tests/kinds/test_kind_messages.py",
    "tests/render/test_plan_schema.py",
    "tests/sets/test_file_names.py",
    "tests/sets/test_manifest.py",
    "tests/surgery/test_name_rules.py",
    "tests/surgery/test_plan.py",
    "tests/surgery/test_transforms.py",
    "tests/test_errors.py",
    "tests/test_layers.py",
)
#: What these tests, and the installation of a checkout, use of the requirements for development.
TOOLS = frozenset({"editables", "hatchling", "hypothesis", "jsonschema", "pytest"})


def interpreter(version: str) -> str | None:
    """A Python of that version; None where there is none. A shim of pyenv may name one that cannot be run."""
    pyenv = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser()
    found = [shutil.which(f"python{version}"), *map(str, sorted(pyenv.glob(f"versions/{version}.*/bin/python")))]
    for candidate in filter(None, found):
        run = subprocess.run([candidate, "-c", "import ensurepip"], capture_output=True, check=False)
        if run.returncode == 0:
            return candidate
    return None


def requirements() -> list[str]:
    """All that the package requires apart from torch, and the tools of the tests."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    named = {line: re.split(r"[^\w-]", line)[0] for line in project["optional-dependencies"]["dev"]}
    return [
        *(line for line in project["dependencies"] if not line.startswith("torch")),
        *(line for line, name in named.items() if name in TOOLS),
    ]


def tested(version: str, python: str) -> bool:
    """Make or update the environment, and run the tests there: whether all passed."""
    folder = ROOT / "build" / f"python-{version}"
    own = str(folder / "bin" / "python")
    install = [own, "-m", "pip", "install", "--quiet", "--constraint", str(ROOT / "constraints.txt")]
    commands = [
        [*install, *requirements()],
        [*install, "--no-build-isolation", "--no-deps", "--editable", str(ROOT)],
        [own, "-m", "pytest", "-q", "-m", "not needs_torch", "-p", "no:cacheprovider", *TESTS],
    ]
    if not Path(own).exists():
        commands.insert(0, [python, "-m", "venv", str(folder)])
    return all(subprocess.run(command, cwd=ROOT, check=False).returncode == 0 for command in commands)


def main() -> int:
    failed = []
    for version in VERSIONS:
        python = interpreter(version)
        if python is None:
            print(f"Python {version} was not found: its tests are skipped", flush=True)
            continue
        print(f"Python {version}: the tests that need no torch", flush=True)
        if not tested(version, python):
            failed.append(version)
    if failed:
        print(f"failed on Python {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
