"""The code blocks of the pages under ``docs/`` and of the READMEs, and a runner that treats them as a reader would."""

from __future__ import annotations

import contextlib
import importlib
import io
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs

from noether_init_core import kinds

__all__ = ["ROOT", "Block", "blocks_of", "matches", "pages", "run_page"]

ROOT = Path(__file__).resolve().parents[2]

_FENCE = re.compile(r"^(?P<fence>`{3,})(?P<info>[^\n`]*)\n(?P<body>.*?)^(?P=fence)[ \t]*$", re.MULTILINE | re.DOTALL)
_OPTION = re.compile(r":(?P<name>[a-z-]+):[ \t]*(?P<value>.*)\n")
_REASON = re.compile(r"<!-- no-run: (?P<reason>\S[^\n]*?) -->\s*\Z")


@attrs.frozen
class Block:
    """One fenced block: its language, its marks, the file that it is the content of, and its line in the page."""

    language: str
    marks: tuple[str, ...]
    caption: str | None
    reason: str | None
    text: str
    line: int


def pages() -> list[Path]:
    """The README, every page of the site and the README of every plugin, sorted."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted(ROOT.glob("plugins/*/README.md"))]


def blocks_of(source: str) -> list[Block]:
    """The fenced blocks of a page, in order; a ``code-block`` directive counts as one, with its caption."""
    found = []
    for match in _FENCE.finditer(source):
        words = match["info"].split()
        body, options = match["body"], {}
        if words[:1] == ["{code-block}"]:
            words = words[1:]
            while (option := _OPTION.match(body)) is not None:
                options[option["name"]] = option["value"].strip()
                body = body[option.end() :]
            body = body.removeprefix("\n")
        reason = _REASON.search(source[: match.start()])
        found.append(
            Block(
                words[0] if words else "",
                tuple(words[1:]),
                options.get("caption"),
                None if reason is None else reason["reason"],
                body,
                source.count("\n", 0, match.start()) + 1,
            )
        )
    return found


def matches(expected: str, printed: str) -> bool:
    """Whether ``printed`` is ``expected``, in which ``...`` stands for any text."""
    pattern = "".join(".*" if part == "..." else re.escape(part) for part in re.split(r"(\.\.\.)", expected.strip()))
    return re.fullmatch(pattern, printed.strip(), re.DOTALL) is not None


def run_page(source: str, name: str, folder: Path) -> Iterator[tuple[Block, str, Block | None]]:
    """Run a page in the working folder, one namespace for all its blocks.

    Yields each executed block, what it printed, and the block that shows the output, if there is one. A block with a
    caption is written to the file of that name; a ``pyproject.toml`` is then installed, with the entry points that it
    names, as ``pip install`` would have done.
    """
    namespace: dict[str, Any] = {"__name__": "__main__"}
    found = blocks_of(source)
    for number, block in enumerate(found):
        if block.caption is not None:
            path = folder / block.caption
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text)
            if path.name == "pyproject.toml":
                _install(path, folder)
        elif block.language == "python" and "no-run" not in block.marks:
            code = compile("\n" * block.line + block.text, name, "exec")
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(code, namespace)
            after = found[number + 1] if number + 1 < len(found) else None
            yield block, printed.getvalue(), after if after is not None and "output" in after.marks else None


def _install(path: Path, site: Path) -> None:
    project = tomllib.loads(path.read_text())["project"]
    info = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    lines = []
    for group, points in project.get("entry-points", {}).items():
        lines += [f"[{group}]", *(f"{name} = {target}" for name, target in points.items())]
    (info / "entry_points.txt").write_text("\n".join([*lines, ""]))
    sys.path.insert(0, str(path.parent))
    sys.path.insert(0, str(site))
    importlib.invalidate_caches()
    kinds.clear_cache()
