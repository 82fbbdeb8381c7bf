"""``noether-init validate CONFIG``: what a config asks for, and everything that is wrong with it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import typer

from noether_init_core.cli.options import Config
from noether_init_core.cli.output import AsJson, show_json, show_text
from noether_init_core.errors import ConfigError
from noether_init_core.observers.loading import describe_observer

if TYPE_CHECKING:
    from noether_init_core.stack.config_files import LoadedConfig


@attrs.frozen
class _Finding:
    """One line: what a key asks for, or what is wrong with it."""

    place: str
    line: int | None
    message: str
    is_problem: bool = False
    kind: str | None = None


def run(
    config: Config,
    as_json: AsJson = False,
) -> None:
    """Check every entry of a config file against its kind, and what stands around them. Reads no checkpoint.

    Exit code 0: it is a config. 1: something is wrong with it; each line names file, line and key.
    """
    from noether_init_core.stack.config_files import examine_config_file

    loaded, around = examine_config_file(config)
    found = [_wrong("", error) for error in around] + list(_findings(loaded))
    found.sort(key=lambda one: one.line or 0)
    problems = [one for one in found if one.is_problem]
    if as_json:
        show_json("validate", _as_data(config, loaded, found))
    else:
        for one in found:
            show_text(f"{'x' if one.is_problem else 'ok'} {one.message}")
        typer.echo(f"initializers: {len(loaded.entries)}, problems: {len(problems)}")
    if problems:
        raise typer.Exit(1)


def _findings(loaded: LoadedConfig) -> list[_Finding]:
    from noether_init_core.stack.config_files import examine_entry

    found = []
    for entry in filter(None, [*loaded.entries, loaded.resume]):
        validated, wrong = examine_entry(entry)
        found += [_wrong(entry.key_path, error) for error in wrong]
        if validated is not None and entry is loaded.resume:
            which = "good set" if getattr(validated, "on_invalid", "") == "previous" else "set"
            said = f"auto_resume: the newest {which} of this run comes before the list"
            found.append(_Finding(entry.key_path, entry.line, said))
        elif validated is not None:
            part = f" for {'.'.join(entry.submodel)}" if entry.submodel else ""
            hooks = f", {', '.join(sorted(entry.hooks))} only" if entry.hooks is not None else ""
            said = f"{entry.key_path}: {validated.kind}{part}{hooks}"
            found.append(_Finding(entry.key_path, entry.line, said, kind=validated.kind))
    for number, name in enumerate(loaded.observers):
        place, line = f"observers.{number}", loaded.document.line(("observers", number))
        try:
            found.append(_Finding(place, line, f"{place}: {name} ({describe_observer(name).source})"))
        except ConfigError as error:
            found.append(_wrong(place, loaded.document.error(str(error), ("observers", number))))
    return found


def _wrong(place: str, error: ConfigError) -> _Finding:
    return _Finding(getattr(error, "key_path", "") or place, getattr(error, "line", None), str(error), True)


def _as_data(config: Path, loaded: LoadedConfig, found: list[_Finding]) -> dict[str, Any]:
    return {
        "config": str(config),
        "is_config": not any(one.is_problem for one in found),
        "auto_resume": loaded.resume is not None,
        "initializers": [
            {"key": one.place, "line": one.line, "kind": one.kind} for one in found if one.kind is not None
        ],
        "observers": list(loaded.observers),
        "problems": [{"key": one.place, "line": one.line, "message": one.message} for one in found if one.is_problem],
    }
