"""A URI where a path is meant: as a path it would be a folder of this machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from support.command import run_command

from noether_init_core import (
    ConfigError,
    InitializerStack,
    PathProvider,
    Source,
    compare_checkpoints,
    kinds,
    lineage_of,
    open_checkpoint,
)

ASKS: dict[str, Callable[[str], object]] = {
    "root": lambda uri: PathProvider(uri, "run"),
    "root as a Path": lambda uri: PathProvider(Path(uri), "run"),
    "other root": lambda uri: PathProvider("runs", "run").with_run("other", output_root=uri),
    "generated": PathProvider.generate,
    "output_path": lambda uri: InitializerStack.from_config(
        [{"kind": "previous_run", "run_id": "run", "output_path": uri}], path_provider=PathProvider("runs", "run")
    ),
    "file": lambda uri: kinds.create({"kind": "file", "path": uri}),
    "source": Source,
    "open": open_checkpoint,
    "compare": lambda uri: compare_checkpoints(uri, uri),
    "lineage": lineage_of,
}


@pytest.mark.parametrize("uri", ["s3://bucket/runs", "gs://bucket/runs", "hf://owner/name", "https://host/model.pt"])
@pytest.mark.parametrize("ask", ASKS)
def test_a_uri_is_refused(ask: str, uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is created, and the message names the URI and what to do."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ConfigError, ValueError), match=r"is a URI of \w+; .* Next: mount the store, or copy the run"):
        ASKS[ask](uri)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ask", ASKS)
def test_a_file_uri_is_refused_with_its_path(ask: str) -> None:
    """The path is what to write instead."""
    with pytest.raises((ConfigError, ValueError), match=r"is a URI; only paths are read. Next: /data/runs"):
        ASKS[ask]("file:///data/runs")


@pytest.mark.parametrize("path", ["C:/runs", "a/s3://b", "weird:name", "ab:c/d", "."])
def test_a_path_is_taken_as_it_is(path: str) -> None:
    """A drive letter, and colons elsewhere, make no URI."""
    assert PathProvider(path, "run").output_root == Path(path)


@pytest.mark.parametrize("command", ["inspect", "verify", "lineage"])
def test_commands_refuse_a_uri(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With exit code 1, as for a path where nothing is."""
    done = run_command(monkeypatch, capsys, command, "s3://bucket/runs")
    assert done.code == 1
    assert "'s3://bucket/runs' is a URI of s3" in done.err
