"""Run the tests with files that real libraries write: ``python tools/real.py`` (``make test-real``).

The libraries get an environment of their own, ``.venv-real``, with the versions in ``constraints-real.txt``. Each is
installed by itself; for one that cannot be, the message of the installer is the reason of the skipped tests. On Linux
PyPI's torch is the CUDA build, so that the environment takes 6.5 GB; ``PIP_EXTRA_INDEX_URL`` may name an index with
CPU builds. Arguments go to pytest.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / ".venv-real"
CONSTRAINTS = ROOT / "constraints-real.txt"
#: Name of a distribution -> the module that tests import; in this order, because torch decides about the others.
LIBRARIES = {
    "torchvision": "torchvision",
    "safetensors": "safetensors",
    "transformers": "transformers",
    "accelerate": "accelerate",
    "peft": "peft",
    "diffusers": "diffusers",
    "lightning": "lightning",
    "timm": "timm",
    "mmengine": "mmengine",
    "neuraloperator": "neuralop",
    "ultralytics": "ultralytics",
}
#: What the tests themselves need.
TOOLS = ("editables", "hatchling", "hypothesis", "pytest")


def install(python: str) -> dict[str, str]:
    """Install everything; returns the module of each library that failed -> the last lines of the installer."""
    pip = [python, "-m", "pip", "install", "--quiet", "--constraint", str(CONSTRAINTS)]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    subprocess.run([*pip, *project["dependencies"], *TOOLS], check=True)
    subprocess.run([*pip, "--no-build-isolation", "--no-deps", "--editable", str(ROOT)], check=True)
    failed = {}
    for distribution, module in LIBRARIES.items():
        run = subprocess.run([*pip, distribution], capture_output=True, text=True, check=False)
        if run.returncode:
            lines = [line for line in run.stderr.splitlines() if line.startswith("ERROR")] or run.stderr.splitlines()
            failed[module] = " ".join(lines[-3:]) or f"pip ended with {run.returncode}"
            print(f"{distribution} was not installed: {failed[module]}", file=sys.stderr, flush=True)
    return failed


def main() -> int:
    python = str(FOLDER / ("Scripts" if os.name == "nt" else "bin") / "python")
    wanted = hashlib.sha256(CONSTRAINTS.read_bytes() + Path(__file__).read_bytes()).hexdigest()
    stamp = FOLDER / "installed"
    if not stamp.exists() or stamp.read_text("utf-8") != wanted:
        if not Path(python).exists():
            subprocess.run([sys.executable, "-m", "venv", str(FOLDER)], check=True)
        failed = install(python)
        (FOLDER / "not-installed.json").write_text(json.dumps(failed), "utf-8")
        stamp.write_text(wanted, "utf-8")
    tests = ["tests/real", "tests/files/test_reader_other_software.py"]
    # Warnings of the libraries are their own.
    command = [python, "-m", "pytest", "-rs", "-p", "no:cacheprovider", "-o", "filterwarnings=", *tests, *sys.argv[1:]]
    environment = {**os.environ, "NOETHER_INIT_REAL": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    offline = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "YOLO_OFFLINE": "true", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, cwd=ROOT, env={**environment, **offline}, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
