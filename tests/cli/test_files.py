"""Files that commands write for people: nothing else is written over, and they are there as a whole or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import attrs
import pytest
import typer

from noether_init_core import InitReport, TrainingIteration
from noether_init_core.cli.output import check_target, write_html, write_text
from noether_init_core.errors import InitError

REPORT = InitReport(TrainingIteration(0, 0, 0))


@pytest.mark.parametrize("name", ["init.yaml", "plan", "-", ".html", "page.txt"])
def test_a_page_has_a_name_of_a_page(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever else is behind the option is a slip of the hand."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(typer.BadParameter, match=r"is not a \.html file\. Next: --html "):
        check_target(Path(name), "--html")


def test_what_was_not_written_by_the_option_is_kept(tmp_path: Path) -> None:
    """Pages of others, JSON of others, links, pipes."""
    (tmp_path / "theirs.html").write_text("<!doctype html><title>theirs</title>")
    (tmp_path / "package.json").write_text('{"name": "theirs"}')
    (tmp_path / "link.html").symlink_to(tmp_path / "elsewhere.html")
    os.mkfifo(tmp_path / "pipe.html")
    for option, name in (
        ("--html", "theirs.html"),
        ("--json", "package.json"),
        ("--html", "link.html"),
        ("--html", "pipe.html"),
    ):
        with pytest.raises(typer.BadParameter, match=r"and was not written by --(html|json); it was not replaced"):
            check_target(tmp_path / name, option)


def test_ours_is_replaced(tmp_path: Path) -> None:
    """Writing a page again is what people do."""
    write_html(tmp_path / "report.html", REPORT)
    first = (tmp_path / "report.html").read_text()
    check_target(tmp_path / "report.html", "--html")
    write_html(tmp_path / "report.html", attrs.evolve(REPORT, auto_resume="another"))
    assert first != (tmp_path / "report.html").read_text()
    check_target(Path("-"), "--json")


def test_nothing_is_written_among_checkpoints(tmp_path: Path) -> None:
    """A manifest is JSON, too."""
    folder = tmp_path / "run" / "checkpoints" / "sets" / "00000001_E1_U1_S1"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text('{"format": "noether-init-plan"}')
    for option, name in (("--json", "manifest.json"), ("--json", "new.json"), ("--html", "new.html")):
        with pytest.raises(typer.BadParameter, match="is in the checkpoint folder of a run"):
            check_target(folder / name, option)


def test_a_failed_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no file with a temporary name."""
    (tmp_path / "page.html").write_text("old")

    def full(_source: Path, _target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(InitError, match="No space left on device"):
        write_text(tmp_path / "page.html", "new")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("page.html", "old")]


def test_names_that_are_no_text_are_written_spelt_out(tmp_path: Path) -> None:
    """File names are bytes, and some are no UTF-8."""
    write_text(tmp_path / "page.html", "a \udcff b")
    assert (tmp_path / "page.html").read_text() == "a \\udcff b"


def test_without_the_distribution_of_pages_everything_else_works_and_html_names_the_extra(tmp_path: Path) -> None:
    """In a process that cannot import it: validate runs, and --html ends before any work, with nothing written."""
    (tmp_path / "init.yaml").write_text("initializers: []\n")
    blocked = "import sys; sys.modules['noether_init_pages'] = None; from noether_init_core.cli import main; main()"

    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-c", blocked, *arguments]
        return subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=False)

    validated = command("validate", "init.yaml")
    assert (validated.returncode, validated.stdout) == (0, "initializers: 0, problems: 0\n")
    for arguments in (("lineage", "."), ("diff", "a.pt", "b.pt"), ("plan", "init.yaml", "--model", "models:build")):
        refused = command(*arguments, "--html", "page.html")
        assert refused.returncode == 1
        assert refused.stderr == (
            "--html needs the distribution noether-init-pages, which is not installed. "
            'Next: pip install "noether-init-core[pages]"\n'
        )
    assert [path.name for path in tmp_path.iterdir()] == ["init.yaml"]
