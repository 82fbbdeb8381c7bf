"""A URI where a path is meant: as a path it would be a folder of this machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.command import run_command

from noether_init_core import (
    ConfigError,
    InitializerStack,
    PathProvider,
    Source,
    bind,
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


#: What reads or names a location below the home folder.
HOMES: dict[str, Callable[[str], object]] = {
    "root": lambda text: PathProvider(text, "run").output_root,
    "output_path": lambda text: PathProvider("runs", "run").with_run("other", output_root=text).output_root,
    "source": lambda text: Source(text).location,
}


@pytest.mark.parametrize("ask", HOMES)
def test_a_tilde_is_the_home_folder(ask: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a config no shell replaces it, and checkpoints would go into a folder called ``~``."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert HOMES[ask]("~/runs") == tmp_path / "runs"
    assert HOMES[ask]("a/~") == Path("a/~")
    assert HOMES[ask]("~nobody-here/x") == Path("~nobody-here/x")


def test_weights_below_the_home_folder_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the kind ``file`` and by ``open_checkpoint``."""
    monkeypatch.setenv("HOME", str(tmp_path))
    torch.save({"weight": torch.ones(1, 1)}, tmp_path / "w.pt")
    with open_checkpoint("~/w.pt") as reader:
        assert reader.path == tmp_path / "w.pt"
    module = torch.nn.Linear(1, 1, bias=False)
    InitializerStack.from_config([{"kind": "file", "path": "~/w.pt"}]).initialize(bind(module, "net"))
    assert module.weight.item() == 1.0


@pytest.mark.parametrize("command", ["inspect", "verify", "lineage"])
def test_commands_refuse_a_uri(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With exit code 1, as for a path where nothing is."""
    done = run_command(monkeypatch, capsys, command, "s3://bucket/runs")
    assert done.code == 1
    assert "'s3://bucket/runs' is a URI of s3" in done.err
