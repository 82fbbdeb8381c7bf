"""What every command prints, in a folder made for it: the transcripts that the documentation shows and a test compares.

``python -m support.transcripts docs/transcripts`` writes them again.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import noether_init_core

__all__ = ["TRANSCRIPTS", "transcripts"]

#: Name of a transcript -> command lines, typed one after the other in the same folder.
TRANSCRIPTS: Mapping[str, tuple[str, ...]] = {
    "start": ("ninit",),
    "help": ("ninit --help",),
    "help-look": tuple(f"ninit {name} --help" for name in ("kinds", "inspect", "diff", "lineage")),
    "help-decide": tuple(f"ninit {name} --help" for name in ("example", "schema", "validate", "suggest", "plan")),
    "help-do": tuple(f"ninit {name} --help" for name in ("verify", "apply")),
    "help-publish": tuple(f"ninit {name} --help" for name in ("new", "check")),
    "kinds": ("ninit kinds", "ninit kinds --observers"),
    "inspect": (
        "ninit inspect runs",
        "ninit inspect runs/pretrain",
        "ninit inspect runs/pretrain/checkpoints/sets/00000002_E2_U8_S64",
        "ninit inspect runs/pretrain/checkpoints/vit_cp=latest_model.th",
    ),
    "diff": (
        "ninit diff runs/pretrain@E1_U4_S32 runs/pretrain",
        "ninit diff runs/pretrain runs/finetune",
    ),
    "lineage": ("ninit lineage runs/finetune", "ninit lineage runs"),
    "example": ("ninit example previous_run first",),
    "schema": ("ninit schema file",),
    "validate": ("ninit validate init.yaml", "ninit validate wrong.yaml"),
    "suggest": ("ninit suggest plain.yaml --model models:build --runs runs",),
    "plan": ("ninit plan init.yaml --model models:build --runs runs --html plan.html",),
    "plan-problem": ("ninit plan larger.yaml --model models:larger --runs runs",),
    "verify": ("ninit verify runs/pretrain",),
    "apply": ("ninit apply init.yaml --model models:build --runs runs --out start.safetensors",),
    "new": ("ninit new demo --author Ada",),
    "check": ("ninit check previous_run",),
    "mistakes": (
        "ninit plna",
        "ninit plan",
        "ninit plan init.yaml",
        "ninit plan init.yaml --model models:biuld --runs runs",
        "ninit inspect rums",
    ),
}

_FILES = {
    "models.py": """
import torch
from noether_init_core import bind


class Layer(torch.nn.Module):
    def __init__(self, names, width=32):
        super().__init__()
        for name, factor in names.items():
            self.add_module(name, torch.nn.Linear(width, factor * width))
        self.norm1, self.norm2 = torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)


class Network(torch.nn.Module):
    def __init__(self, layers, names, classes, positions=197):
        super().__init__()
        self.pos_embed = torch.nn.Parameter(torch.zeros(1, positions, 32))
        self.add_module(layers, torch.nn.ModuleList(Layer(names) for _ in range(4)))
        self.head = torch.nn.Linear(32, classes)


def pretrained():
    return bind(Network("h", {"c_attn": 3, "c_proj": 1}, 10), name="vit")


def build():
    return bind(Network("blocks", {"q": 1, "k": 1, "v": 1, "proj": 1}, 4), name="vit")


def larger():
    return bind(Network("h", {"c_attn": 3, "c_proj": 1}, 4, positions=257), name="vit")
""",
    "init.yaml": """initializers:
  - kind: previous_run
    run_id: pretrain
    transforms:
      - {from: h.<i>.norm<n>., to: blocks.<i>.norm<n>.}
      - {from: h.<i>.c_proj., to: blocks.<i>.proj.}
      - from: h.<i>.c_attn.<leaf>
        to: [blocks.<i>.q.<leaf>, blocks.<i>.k.<leaf>, blocks.<i>.v.<leaf>]
        do: [split: 0]
      - keep_model: head.
""",
    "plain.yaml": "initializers:\n  - kind: previous_run\n    run_id: pretrain\n",
    "larger.yaml": "initializers:\n  - kind: previous_run\n    run_id: pretrain\n    transforms: [from: pos_embed]\n",
    "wrong.yaml": "initializers:\n  - kind: previous-run\n    run_id: pretrain\n  - kind: file\n    pth: weights.th\n",
}

_PACKAGE = Path(noether_init_core.__file__).parent

# What is different each time.
_VARYING = (
    (re.compile(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d(?::\d\d(?:\.\d+)?)?(?:Z|[+-]\d\d:\d\d)?"), "2026-01-31 12:00"),
    (re.compile(r"\b\d+(?:\.\d+)? ms\b"), "12 ms"),
    (re.compile(r"\b\d+\.\d+ s\b"), "0.1 s"),
    (re.compile(r"\b[0-9a-f]{32,64}\b"), "0123456789abcdef"),
)
_ENVIRONMENT = {"COLUMNS": "100", "LINES": "50", "NO_COLOR": "1", "TERM": "dumb", "HOME": "/home/ada"}


def make_world(folder: Path) -> None:
    """A folder as somebody has it who trains: models, configs, runs. The same bytes each time."""
    for name, text in _FILES.items():
        (folder / name).write_text(text.lstrip("\n"))
    sys.path.insert(0, str(folder))
    import torch

    from noether_init_core import CheckpointWriter, InitializerStack, PathProvider, TrainingIteration

    models = __import__("models")
    torch.manual_seed(0)
    paths = PathProvider(folder / "runs", "pretrain")
    old = models.pretrained()
    with torch.no_grad():
        old.module.pos_embed.normal_(std=0.02)
    for epoch in (1, 2):
        CheckpointWriter(paths, flat_names=True).save(old, TrainingIteration(epoch, 4 * epoch, 32 * epoch))
        with torch.no_grad():
            for parameter in old.parameters():
                parameter.add_(0.001 * torch.randn_like(parameter))
    tuned = PathProvider(folder / "runs", "finetune")
    model = models.build()
    stack = InitializerStack.from_file(folder / "init.yaml", path_provider=tuned)
    report = stack.initialize(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    CheckpointWriter(tuned, report=report, flat_names=True).save(model, TrainingIteration(1, 4, 32))


def transcripts(names: Mapping[str, tuple[str, ...]] = TRANSCRIPTS) -> Iterator[tuple[str, str]]:
    """Name and text of each. Every command is a process of its own, forked from one that has imported torch."""
    import torch  # noqa: F401 - once for all of them

    with tempfile.TemporaryDirectory() as folder:
        world = Path(folder) / "work"
        world.mkdir()
        _apart(lambda: make_world(world), world)
        for name, lines in names.items():
            shown = []
            for line in lines:
                printed, code = _typed(line, world)
                end = f"(exit {code})\n" if code else ""
                shown.append(f"$ {line}\n{printed}{end}")
            yield name, _steady("\n".join(shown), world)


def _typed(line: str, world: Path) -> tuple[str, int]:
    from noether_init_core import cli

    def run() -> None:
        sys.argv = shlex.split(line)
        cli.main()

    return _apart(run, world)


def _apart(call: object, world: Path) -> tuple[str, int]:
    """Output and exit code of a call in a fork, in the folder, without terminal."""
    assert callable(call)
    with tempfile.TemporaryFile("w+") as output:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.chdir(world)
                os.environ.update(_ENVIRONMENT)
                for number in (1, 2):
                    os.dup2(output.fileno(), number)
                sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
                call()
                code = 0
            except SystemExit as ended:
                code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        _pid, status = os.waitpid(child, 0)
        output.seek(0)
        return output.read(), os.waitstatus_to_exitcode(status)


def _steady(text: str, world: Path) -> str:
    text = text.replace(f"{world}/", "").replace(str(world), "~/work").replace(f"{_PACKAGE.parent}/", "")
    for pattern, instead in _VARYING:
        text = pattern.sub(instead, text)
    return "".join(f"{line.rstrip()}\n" for line in text.splitlines())


if __name__ == "__main__":
    target = Path(sys.argv[1])
    for old in target.glob("*.txt"):
        old.unlink()
    for name, text in transcripts():
        (target / f"{name}.txt").write_text(text)
