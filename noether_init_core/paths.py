"""The folders of runs on disk, and the names that may become part of a path."""

from __future__ import annotations

import os
import re
from datetime import date
from pathlib import Path
from typing import Any, Self

import attrs

from noether_init_core.errors import ConfigError, InvalidNameError, type_of
from noether_init_core.uris import local_path

#: File systems allow 255 bytes for a name. A name of a file joins model, tag and part: ``mlp_cp=latest_model.th``.
MAX_NAME_BYTES = 200
#: Folder below the output root that holds the runs of debug mode.
DEBUG_FOLDER = "debug"
#: What no component of a path may hold, and the words for it in messages. Names come from configs and may be hostile;
#: refused on every platform, so that a run folder can be copied to Windows.
_REFUSED = (
    (re.compile(r"\A\Z"), "is empty"),
    (re.compile(r"[/\\]"), "holds a path separator"),
    (re.compile(r"\A\."), "starts with a dot"),
    (re.compile(r"\.\."), "holds '..'"),
    (re.compile(r"\A[A-Za-z]:"), "starts with a drive letter"),
    (re.compile(r"[\x00-\x1f\x7f]"), "holds a control character"),
    (re.compile(r"\A\s|\s\Z"), "starts or ends with white space"),
    (re.compile(r"[\ud800-\udfff]"), "is not valid Unicode"),
)


#: Types that YAML reads from a text without quotes, each with an example. A bool is an int, so it comes first.
_OF_YAML = (
    (bool, "a boolean", "on"),
    (int, "an integer", "2026_02_19"),
    (float, "a number", "0.90"),
    (date, "a date", "2026-02-19"),
)


def text_problem(value: object, what: str) -> str:
    """The message for a ``value`` of ``what`` that is not a text.

    The text cannot be restored: 20260219 may have been written 2026_02_19, and these may be two runs.
    """
    for cls, noun, example in _OF_YAML:
        if isinstance(value, cls):
            return (
                f"{what} {value} is {noun}, not a text. YAML reads {example} without quotes as {noun}. "
                f'Next: write the text in quotes, for example {what}: "{example}"'
            )
    return f'{what} must be a text, not {type_of(value)}. Next: {what}: "..."'


def check_name(value: object, what: str) -> str:
    """Return ``value`` if it can be one component of a path below the output root.

    Raises ``InvalidNameError`` for a value that is not a string, an empty name, or more than 200 bytes of UTF-8. Raises
    it also for a path separator, ``..``, a leading dot, a drive letter, a control character, surrounding white space.
    """
    if not isinstance(value, str):  # a config may hold anything
        raise InvalidNameError(text_problem(value, what), what=what, value=str(value))
    reason = _problem_of(value)
    if reason:
        shown = value if len(value) <= 60 else value[:57] + "..."
        raise InvalidNameError(
            f"{what} {shown!r} {reason}; it must be a single folder or file name", what=what, value=value
        )
    return value


def is_name(value: str) -> bool:
    """Whether ``check_name`` accepts ``value``."""
    return not _problem_of(value)


def _problem_of(name: str) -> str:
    reason = next((reason for pattern, reason in _REFUSED if pattern.search(name)), "")
    if not reason and len(name.encode()) > MAX_NAME_BYTES:
        return f"has {len(name.encode())} bytes, more than {MAX_NAME_BYTES}"
    return reason


def check_run_id(value: object) -> str:
    """Return ``value`` if it can be a run id; raises ``InvalidNameError`` as ``check_name`` does, and for ``debug``."""
    run_id = check_name(value, "run_id")
    if run_id == DEBUG_FOLDER:
        raise InvalidNameError(
            f"run_id {run_id!r} is the name of the folder that holds the runs of debug mode, which would be read as "
            "its stages. Next: choose another run_id, or set debug: true to use that folder",
            what="run_id",
            value=run_id,
        )
    return run_id


def name_of_run(run_id: str | None, stage_name: str | None) -> str:
    """Return run and stage as one name: ``pretrain``, ``pretrain/stage``."""
    return f"{run_id}/{stage_name}" if stage_name is not None else str(run_id)


def check_model_name(value: object, what: str = "model_name") -> str:
    """Return ``value`` if it can be the name of a model: a name without ``=``. Raises ``InvalidNameError``."""
    # In names of files, '=' separates fields: mlp_ema=0.9_cp=latest_model.th.
    name = check_name(value, what)
    if "=" in name:
        raise InvalidNameError(
            f"{what} {name!r} holds '=', which is allowed only in model_info, such as ema=0.9", what=what, value=name
        )
    return name


@attrs.frozen
class PathProvider:
    """The folders of one run: ``<output_root>/[debug/]<run_id>/[<stage_name>/]checkpoints``.

    The properties compute paths; they neither read the disk nor create folders.

    Args:
        output_root: Folder that holds all runs.
        run_id: Name of the run, one path component.
        stage_name: Name of the stage, one path component; None for a run without stages.
        debug: Whether the run lies in the folder ``debug`` below the output root.
        run_id_is_generated: Whether each start generates a new run id, as ``generate`` does. ``auto_resume`` refuses
            such a run, because it could never find its own checkpoints again.

    Raises ``InvalidNameError`` for a name that is not a single path component, ``ConfigError`` for a URI as root.
    """

    output_root: Path = attrs.field(converter=local_path)
    run_id: str
    stage_name: str | None = None
    debug: bool = attrs.field(default=False, kw_only=True)
    run_id_is_generated: bool = attrs.field(default=False, kw_only=True, eq=False)

    def __attrs_post_init__(self) -> None:
        check_run_id(self.run_id)
        if self.stage_name is not None:
            check_name(self.stage_name, "stage_name")

    @classmethod
    def generate(cls, output_root: Path | str, stage_name: str | None = None, *, debug: bool = False) -> Self:
        """Return a provider with a new run id: the date and ten random hexadecimal digits. For runs that never resume.

        Each call gives another run id. With several ranks, call it on one rank and broadcast the run id.
        """
        run_id = f"{date.today():%Y-%m-%d}_{os.urandom(5).hex()}"
        return cls(Path(output_root), run_id, stage_name, debug=debug, run_id_is_generated=True)

    @staticmethod
    def is_provider(value: object) -> bool:
        """Whether ``of`` takes ``value``: it has ``output_root``, ``run_id`` and ``stage_name``."""
        return all(hasattr(value, name) for name in ("output_root", "run_id", "stage_name"))

    @classmethod
    def of(cls, provider: Any) -> Self:
        """Convert any object with ``output_root``, ``run_id`` and ``stage_name``; a ``PathProvider`` is returned as is.

        Only these names and ``debug`` are read, because the path properties of Noether's provider create folders.

        Raises ``ConfigError`` if an attribute is missing, ``InvalidNameError`` for an invalid name.
        """
        if isinstance(provider, cls):
            return provider
        if not cls.is_provider(provider):
            raise ConfigError(
                f"path_provider must have output_root, run_id and stage_name; {type_of(provider)} does not. "
                "Next: PathProvider(output_root, run_id, stage_name)"
            )
        return cls(
            Path(provider.output_root),
            provider.run_id,
            provider.stage_name,
            debug=bool(getattr(provider, "debug", False)),
        )

    @property
    def run_output_path(self) -> Path:
        """The folder of this run and stage, which may not exist."""
        path = self.output_root / DEBUG_FOLDER / self.run_id if self.debug else self.output_root / self.run_id
        return path if self.stage_name is None else path / self.stage_name

    @property
    def checkpoint_path(self) -> Path:
        """The folder of the checkpoints of this run and stage, which may not exist."""
        return self.run_output_path / "checkpoints"

    def with_run(
        self, run_id: str | None = None, stage_name: str | None = None, *, output_root: Path | str | None = None
    ) -> Self:
        """Return a provider for another run. It reads the disk only in debug mode.

        Args:
            run_id: The other run; None keeps the run.
            stage_name: The stage of that run; None means no stage.
            output_root: The output root of that run; None keeps it.

        ``debug`` is kept, unless the run exists only outside the folder ``debug``.

        Raises ``InvalidNameError`` for an invalid name, ``CheckpointUnreachableError`` if the disk fails.
        """
        other = attrs.evolve(
            self,
            output_root=self.output_root if output_root is None else Path(output_root),
            run_id=self.run_id if run_id is None else run_id,
            stage_name=stage_name,
            run_id_is_generated=self.run_id_is_generated if run_id is None else False,
        )
        if other.debug and run_id is not None:
            from noether_init_core.files.storage.disk import LOCAL, reaching

            outside = attrs.evolve(other, debug=False)
            with reaching(other.run_output_path):
                if not LOCAL.is_folder(other.run_output_path) and LOCAL.is_folder(outside.run_output_path):
                    return outside
        return other
