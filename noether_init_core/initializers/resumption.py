"""ResumptionPaths: the folder that callbacks resume from, showing the set that is resumed as ``latest``."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import attrs

from noether_init_core.errors import StateMismatchError
from noether_init_core.paths import PathProvider
from noether_init_core.sets.checkpoint_set import CheckpointSet
from noether_init_core.sets.file_names import CheckpointFileName, parse

__all__ = ["ResumptionPaths", "check_resumption", "resume_callbacks"]


@attrs.frozen
class ResumptionPaths(PathProvider):
    """The path provider that ``resume_from_checkpoint`` of a callback is given.

    Noether's EMA callback reads the tag ``latest``, whatever tag is resumed. So ``checkpoint_path`` is a temporary
    folder of links to the files of the run, in which ``latest`` names the files of the set that is resumed. It exists
    inside the ``with`` block only.
    """

    view: Path | None = attrs.field(default=None, kw_only=True)

    @property
    def checkpoint_path(self) -> Path:
        """The folder of links."""
        return super().checkpoint_path if self.view is None else self.view

    @classmethod
    @contextmanager
    def showing(cls, paths: PathProvider, selected: CheckpointSet | None, logger: logging.Logger) -> Iterator[Self]:
        """The provider for one set; ``selected`` None shows the folder as it is."""
        plain = cls(paths.output_root, paths.run_id, paths.stage_name, debug=paths.debug)
        if selected is None:
            yield plain
            return
        with tempfile.TemporaryDirectory(prefix="noether-init-") as folder:
            _link_files(Path(folder), paths.checkpoint_path, selected, logger)
            yield attrs.evolve(plain, view=Path(folder))


def resume_callbacks(
    callbacks: Iterable[Any], model: Any, paths: PathProvider, selected: CheckpointSet | None, logger: logging.Logger
) -> None:
    """Let every callback that can (``resume_from_checkpoint``) resume from files; without one, nothing is made."""
    resuming = _resuming(callbacks)
    if resuming:
        with ResumptionPaths.showing(paths, selected, logger) as shown:
            for resume in resuming:
                resume(resumption_paths=shown, model=model)


def check_resumption(callbacks: Iterable[Any]) -> None:
    """Find out whether callbacks that resume from files could be shown them. Raises ``StateMismatchError``."""
    if not _resuming(callbacks):
        return
    try:
        with tempfile.TemporaryDirectory(prefix="noether-init-") as folder:
            os.symlink(folder, Path(folder) / "link")
    except OSError as error:
        raise StateMismatchError(
            "callbacks with resume_from_checkpoint are shown their files in a temporary folder of links, and none can "
            f"be made: {error}. Nothing was changed. Next: TMPDIR=... with a folder that can be written"
        ) from error


def _resuming(callbacks: Iterable[Any]) -> list[Callable[..., Any]]:
    found = (getattr(callback, "resume_from_checkpoint", None) for callback in callbacks)
    return [resume for resume in found if callable(resume)]


def _link_files(view: Path, folder: Path, selected: CheckpointSet, logger: logging.Logger) -> None:
    links: dict[str, Path] = {}
    latest: set[tuple[str, str | None]] = set()
    if folder.is_dir():
        for entry in sorted(os.listdir(folder)):
            name = parse(entry)
            if name is not None:
                links[entry] = folder / entry
                if name.tag == "latest" and name.part == "model" and name.info is not None:
                    latest.add((name.model, name.info))
    for file in selected.files:
        links[str(CheckpointFileName(file.model, file.info, "latest", file.part))] = file.path
        latest.discard((file.model, file.info))
    for model, info in sorted(latest):
        logger.warning("%s has no %s of %s; callbacks find that of latest instead", selected.name, info, model)
    for link, target in links.items():
        os.symlink(target.resolve(), view / link)
