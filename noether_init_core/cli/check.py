"""``noether-init check KIND``: the static part of what makes a kind right, with the fix for each finding."""

from __future__ import annotations

import importlib.metadata
import inspect
import re
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import typer

from noether_init_core import kinds
from noether_init_core.cli.options import Kind
from noether_init_core.cli.output import AsJson, show, show_json
from noether_init_core.errors import KindImportError

if TYPE_CHECKING:
    from noether_init_core.kinds.contract import Finding

_CORE = "noether-init-core"


def run(
    kind: Kind,
    as_json: AsJson = False,
) -> None:
    """Look at an installed kind without running it: nothing of it is called, it is only imported.

    What is marked x breaks the contract: the kind cannot be used. What is marked ! will trouble users or the author.
    """
    import torch  # noqa: F401 - so that the import of the kind is timed without it

    from noether_init_core.initializers.base import InitializerBase
    from noether_init_core.kinds import contract

    began = time.perf_counter()
    info, loaded = _load(kind, as_json=as_json)
    seconds = time.perf_counter() - began
    advice, problems = [*_of_distribution(info)], []
    if not (isinstance(loaded, type) and issubclass(loaded, InitializerBase)):
        what = "a class" if isinstance(loaded, type) else f"of type {type(loaded).__qualname__}"
        finding = contract.Finding(
            f"{info.target} is {what}, and no subclass of InitializerBase",
            "let the entry point name the class: package.module:ClassName",
        )
        problems.append(finding)
    else:
        problems += [*filter(None, [contract.newer(loaded)]), *contract.examine(loaded)]
        advice += contract.advice(loaded) if not problems else ()
    found = [*(("problem", one) for one in problems), *(("advice", one) for one in advice)]
    if as_json:
        _show_json(info, found)
    else:
        _show(info, loaded, seconds, found)
    if problems:
        raise typer.Exit(1)


def _load(kind: str, *, as_json: bool) -> tuple[kinds.KindInfo, object]:
    """The plugin's own traceback is what its author needs."""
    try:
        return kinds.load(kind)
    except KindImportError as error:
        info = kinds.describe(kind)
        if ":" not in info.target:
            error.add(f"\nThe entry point has no colon. Write: {kind} = package.module:ClassName")
        if as_json:
            from noether_init_core.kinds.contract import Finding

            finding = Finding(error.message, "mend what was raised, or the entry point: package.module:ClassName")
            _show_json(info, [("problem", finding)])
        if error.__cause__ is not None:
            traceback.print_exception(error.__cause__, file=sys.stderr)
        raise


def _of_distribution(info: kinds.KindInfo) -> Iterator[Finding]:
    """What the metadata should say."""
    from noether_init_core.kinds.contract import Finding

    if info.distribution in (None, _CORE):
        return
    distribution = importlib.metadata.distribution(str(info.distribution))
    requirements = [re.split(r"[ ;\[<>=!~(]", line)[0] for line in distribution.requires or ()]
    if _CORE not in [name.lower().replace("_", "-") for name in requirements]:
        ours = importlib.metadata.version(_CORE).rsplit(".", 1)[0]
        yield Finding(
            f"{info.distribution} does not require {_CORE}, so that pip may leave it out, or keep one that is too old",
            f'dependencies = ["{_CORE}>={ours}"] in pyproject.toml',
        )
    if "Requires-Python" not in distribution.metadata:
        yield Finding(
            f"{info.distribution} does not say which versions of Python it runs on",
            'requires-python = ">=3.11" in pyproject.toml',
        )


def _show_json(info: kinds.KindInfo, found: Sequence[tuple[str, Finding]]) -> None:
    data = {
        "kind": info.name,
        "distribution": info.distribution,
        "version": info.version,
        "target": info.target,
        "findings": [{"severity": how, "message": one.message, "fix": one.fix} for how, one in found],
    }
    # "version" is that of the distribution
    show_json("check", data, version=None)


def _show(info: kinds.KindInfo, loaded: object, seconds: float, found: Sequence[tuple[str, Finding]]) -> None:
    show(f"{info.name}  {info.source}  {info.target}")
    try:
        file = inspect.getsourcefile(loaded)  # type: ignore[arg-type]  # anything may be behind an entry point
    except TypeError:
        file = None
    show(f"   imported in {seconds * 1000:.0f} ms, torch apart" + (f", from {file}" if file else ""))
    problems = sum(how == "problem" for how, _finding in found)
    for how, finding in found:
        show(f" {'x' if how == 'problem' else '!'} {finding.message}")
        show(f"   fix: {finding.fix}")
    if not found:
        show(" = nothing to mend that can be seen without running it")
    show(f"problems: {problems}, advice: {len(found) - problems}")
    if not problems:
        show("Next: the rest shows when it runs: python -m pytest, with noether_init_core.testing")
