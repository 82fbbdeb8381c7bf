"""The files of ``noether-init example``: a loop that runs, and a config for one kind, as text."""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Mapping
from typing import Any

_PLAN = "noether-init plan init.yaml --model train:build --runs runs --run-id {run} --html plan.html"
_AGAIN = "train; press Ctrl-C or kill it, and type it again: it goes on"
_TRAIN = "python train.py --run-id {run}{more}"

#: Kind -> (the run that it starts from, the run that it starts, options of the first one).
BUILT_IN: Mapping[str, tuple[str, str, str]] = {
    "previous_run": ("pretrain", "finetune", " --classes 10"),
    "resume": ("first", "fork", ""),
    "file": ("first", "second", ""),
}


def example_of(
    kind: str, schema: Mapping[str, Any] | None = None
) -> tuple[dict[str, str], tuple[tuple[str, str], ...]]:
    """A loop and configs for one kind: name -> text of the files, and the commands to type, each with what it does.

    Args:
        kind: The kind, as a config names it.
        schema: The JSON schema of its config, for kinds that are not in ``BUILT_IN``: what is required is left open.
    """
    folder = importlib.resources.files("noether_init_core.scaffold") / "loop"

    def text(name: str) -> str:
        return (folder / name).read_text(encoding="utf-8")

    loop = {"train.py": text("train.py.txt")}
    if kind not in BUILT_IN:
        return {**loop, "init.yaml": _skeleton(kind, schema or {})}, (
            ("noether-init validate init.yaml", "names what is still to be filled in"),
            (_PLAN.format(run="first"), "what it will do, as a page to look at"),
            (_TRAIN.format(run="first", more=""), _AGAIN),
        )
    earlier, later, options = BUILT_IN[kind]
    return {**loop, "scratch.yaml": text("scratch.yaml"), "init.yaml": text(f"{kind}.yaml")}, (
        (_TRAIN.format(run=earlier, more=f" --config scratch.yaml{options}"), "the run to start from, once"),
        (_PLAN.format(run=later), "what init.yaml will do, as a page to look at"),
        (_TRAIN.format(run=later, more=" --epochs 100"), _AGAIN),
        ("noether-init inspect runs", "what was saved"),
    )


def _skeleton(kind: str, schema: Mapping[str, Any]) -> str:
    """A config with every required key, to be filled in, and the others as comments."""
    lines = [
        "# Once this run has sets of its own, it goes on from those.",
        "auto_resume: true",
        "initializers:",
        f"  - kind: {kind}",
    ]
    required = set(schema.get("required", ()))
    fields = {name: field for name, field in schema.get("properties", {}).items() if name != "kind"}
    for name in sorted(fields, key=lambda name: name not in required):
        described = " ".join(str(fields[name].get("description", "")).split())
        if name in required:
            lines.append(f"    {name}:  # required{': ' if described else ''}{described}")
        else:
            default = json.dumps(fields[name].get("default"))
            lines.append(f"    # {name}: {default}{'  # ' if described else ''}{described}")
    return "\n".join(lines) + "\n"
