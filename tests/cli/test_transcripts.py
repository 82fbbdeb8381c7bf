"""The transcripts in the documentation are what the commands print."""

from __future__ import annotations

import re

import pytest
import typer.main
from support.pages import ROOT
from support.transcripts import TRANSCRIPTS, transcripts

from noether_init_core import cli

FOLDER = ROOT / "docs" / "transcripts"


@pytest.fixture(scope="module")
def printed() -> dict[str, str]:
    """Every transcript, made now."""
    return dict(transcripts())


@pytest.mark.parametrize("name", TRANSCRIPTS)
def test_a_command_prints_what_the_documentation_shows(name: str, printed: dict[str, str]) -> None:
    """Where the change is meant: make transcripts, and look at the difference."""
    assert printed[name] == (FOLDER / f"{name}.txt").read_text()


def test_no_transcript_is_left_over() -> None:
    """Each file is made by a command line that is listed."""
    assert {path.stem for path in FOLDER.iterdir()} == set(TRANSCRIPTS)


def test_every_command_and_its_help_has_a_transcript() -> None:
    """A new command is shown, too."""
    commands = set(typer.main.get_command(cli.app).commands)  # type: ignore[attr-defined]
    typed = {line.split()[1] for lines in TRANSCRIPTS.values() for line in lines if len(line.split()) > 1}
    assert commands <= typed
    helped = {line.split()[1] for lines in TRANSCRIPTS.values() for line in lines if line.endswith("--help")}
    assert commands <= helped


def test_the_page_of_the_command_line_shows_all_of_them() -> None:
    """Each one is included once."""
    page = (ROOT / "docs" / "use" / "command-line.md").read_text()
    included = re.findall(r"\{literalinclude\} \.\./transcripts/([\w-]+)\.txt", page)
    assert sorted(included) == sorted(TRANSCRIPTS)


def test_no_line_is_wider_than_the_terminal(printed: dict[str, str]) -> None:
    """Tables, trees and panels; messages of errors are one line, so that they can be searched for."""
    wide = [
        line
        for name, text in printed.items()
        for line in text.splitlines()
        if len(line) > 100 and not line.startswith(("x ", "$ ", "  -", "#")) and name not in ("schema", "mistakes")
    ]
    assert wide == []
