"""Built wheels, and clean virtual environments where nothing of this checkout is importable."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import textwrap
import venv
from pathlib import Path

import attrs

__all__ = ["ROOT", "Environment", "build_core", "build_wheel", "clean_environment", "run_process"]

ROOT = Path(__file__).resolve().parents[2]


@attrs.frozen
class Environment:
    """A virtual environment with the core's wheel; dependencies are those of the running one, without our own."""

    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def site_packages(self) -> Path:
        (found,) = (self.folder / "lib").glob("python*/site-packages")
        return found

    @property
    def variables(self) -> dict[str, str]:
        """The environment variables of a shell; pip asks no index, and builds with what is there."""
        return {
            "PATH": f"{self.python.parent}{os.pathsep}{os.defpath}",
            "COLUMNS": "120",
            "TERM": "dumb",
            "LANG": "C.UTF-8",
            "OMP_NUM_THREADS": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "PIP_NO_INDEX": "1",
            "PIP_NO_BUILD_ISOLATION": "0",  # that is how pip wants it to be said
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        }

    def typed(self, line: str, *, where: Path, code: int = 0, **variables: str) -> str:
        """Type a line in a shell; return what it printed on either stream."""
        done = subprocess.run(
            ["bash", "-c", line],
            cwd=where,
            env={**self.variables, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == code, f"{line}\n{done.stdout}"
        return done.stdout

    def run(self, program: str, *, where: Path, code: int = 0) -> str:
        """Run a program that sees neither this checkout nor the variables of the tests; return what it printed."""
        command = [str(self.python), "-I", "-c", textwrap.dedent(program)]
        done = subprocess.run(command, cwd=where, capture_output=True, text=True, env={"PATH": ""}, check=False)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout

    def command(self, *arguments: str, where: Path) -> subprocess.CompletedProcess[str]:
        """Run the installed console script."""
        command = [str(self.folder / "bin" / "ninit"), *arguments]
        return subprocess.run(command, cwd=where, capture_output=True, text=True, env={"PATH": ""}, check=False)

    def pip(self, *arguments: str | Path) -> None:
        """Run the pip of the running environment on this one, without a network."""
        run_process(sys.executable, "-m", "pip", "--python", self.python, "--quiet", *arguments)


def run_process(*command: str | Path, where: Path | None = None) -> None:
    """Run a command that must succeed."""
    done = subprocess.run(command, cwd=where, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def build_core(folder: Path) -> Path:
    """Write the sdist of the core into ``folder``, and the wheel that is built from it."""
    run_process(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT)
    return folder


def clean_environment(folder: Path, built: Path) -> Environment:
    """A new environment below ``folder``, with the core installed from the wheel in ``built``."""
    # Torch alone is a gigabyte, so everything but our own distributions is borrowed. The editable install of this
    # checkout and its metadata stay outside: they would hide what the wheel lacks.
    borrowed = folder / "borrowed"
    borrowed.mkdir()
    for item in Path(sysconfig.get_path("purelib")).iterdir():
        if "noether" not in item.name and not item.name.endswith(".pth"):
            (borrowed / item.name).symlink_to(item)
    venv.create(folder / "venv", with_pip=False, symlinks=True)
    clean = Environment(folder / "venv")
    (clean.site_packages / "borrowed.pth").write_text(f"{borrowed}\n")
    clean.pip("install", "--no-index", "--find-links", built, "noether-init-core")
    return clean


def build_wheel(project: Path, folder: Path) -> Path:
    """Write the wheel of the package in ``project`` into ``folder``, without a network; the project stays clean."""
    before = set(folder.glob("*.whl"))
    run_process(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, where=project)
    (built,) = set(folder.glob("*.whl")) - before
    return built
