"""The errors of noether-init.

::

    InitError
    |-- ConfigError (ValueError)                  the config is wrong
    |   |-- ConfigFileError                       ... at a line of a file
    |   |-- InvalidNameError                      a run id, stage, tag or model name that is no name
    |   `-- KindError                             a kind cannot be used
    |       |-- UnknownKindError (LookupError)
    |       |-- KindConflictError
    |       |-- KindBlockedError (PermissionError)
    |       |-- KindImportError (ImportError)
    |       `-- KindContractError (TypeError)
    |-- CheckpointError                           something on disk is wrong
    |   |-- CheckpointNotFoundError (FileNotFoundError)
    |   |   `-- IncompleteSetError                the set exists, a part of it does not
    |   |-- AmbiguousCheckpointError              several sets could be meant
    |   |-- TornSetError                          files of different iterations or runs
    |   |-- CheckpointFormatError (ValueError)    the reader refuses the file
    |   |   `-- UnsafeGlobalError                 ... for the globals that it names
    |   |-- CheckpointCorruptError                bytes differ from what was written
    |   |   `-- NoGoodSetError                    ... in every set that could be walked back to
    |   `-- CheckpointWriteError (OSError)
    |-- PlanError (ValueError)                    the plan has problems; nothing was changed
    |-- StateMismatchError (ValueError)           optimizer, trainer or callback state does not fit
    |-- ProbeMismatchError (ValueError)           the model computes something else than when it was saved
    |-- StartConflictError (ValueError)           two initializers start at other than zero, or the start has changed
    `-- PartlyInitializedError (RuntimeError)     user code failed after the first change

Every message says what was asked, what exists, and what to do next. The same data is on the exception, so that
nobody has to parse text. Kind errors are ``ValueError`` so that pydantic keeps their place in a config.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from noether_init_core.messages import one_line, printable


def type_of(value: object) -> str:
    """The type of ``value`` as messages name it, with its article: ``an OrderedDict``, ``a Linear``."""
    name = type(value).__name__
    return f"an {name}" if name.lstrip("_")[:1].lower() in ("a", "e", "i", "o") else f"a {name}"


class InitError(Exception):
    """Root of every error that noether-init raises on purpose.

    ``names`` are those in the message that somebody else chose: line breaks in them do not end a line of it.
    """

    def __init__(self, message: str, *names: str) -> None:
        for name in names:
            if "\n" in name:
                message = message.replace(name, one_line(name))
        # names out of a hostile file must not reach a terminal as commands to it
        message = printable(message)
        super().__init__(message)
        self.message = message

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[Any, ...]:
        # the constructors of children take keywords, which the one of BaseException does not keep
        return _unpickled, (type(self), self.args, self.__dict__)

    def add(self, text: str) -> None:
        """Add to the message what a caller knows besides; class and data stay."""
        self.message += text
        self.args = (self.message,)


def _unpickled(kind: type[InitError], arguments: tuple[Any, ...], data: dict[str, Any]) -> InitError:
    keywords = inspect.signature(kind).parameters.keys() & data.keys() - {"message"}
    error = kind("", **{name: data[name] for name in keywords})
    error.__dict__.update(data)
    error.args = arguments
    return error


class ConfigError(InitError, ValueError):
    """A config that cannot be used."""


class ConfigFileError(ConfigError):
    """A config file that cannot be used; ``path``, ``line`` (from 1) and ``key_path`` say where."""

    def __init__(self, message: str, *, path: Path, line: int | None = None, key_path: str = "") -> None:
        place = f"{path.name}:{line}" if line is not None else path.name
        message = f"{place} {key_path}: {message}" if key_path else f"{place}: {message}"
        super().__init__(message, path.name, *key_path.split("."))
        self.path = path
        self.line = line
        self.key_path = key_path


class InvalidNameError(ConfigError):
    """``value`` cannot be used as ``what`` (a run id, stage name, tag, model name or model info)."""

    def __init__(self, message: str, *, what: str, value: str) -> None:
        super().__init__(message, value)
        self.what = what
        self.value = value


class KindError(ConfigError):
    """The kind named ``kind`` cannot be used.

    ``config_file``, ``line`` and ``key_path`` say where a config file asks for it.
    """

    def __init__(self, message: str, *, kind: str) -> None:
        super().__init__(message, kind)
        self.kind = kind
        self.config_file: Path | None = None
        self.line: int | None = None
        self.key_path = ""

    def found_at(self, located: ConfigError) -> Self:
        """This error with the place and the message of ``located``; its class and its cause stay."""
        self.message = located.message
        self.args = (located.message,)
        if isinstance(located, ConfigFileError):
            self.config_file, self.line, self.key_path = located.path, located.line, located.key_path
        return self


class UnknownKindError(KindError, LookupError):
    """No installed distribution offers the kind; ``candidates`` are near names."""

    def __init__(self, message: str, *, kind: str, candidates: Sequence[str] = ()) -> None:
        super().__init__(message, kind=kind)
        self.candidates = tuple(candidates)


class KindConflictError(KindError):
    """Several distributions offer the kind; ``offers`` are their descriptions. None of them was imported."""

    def __init__(self, message: str, *, kind: str, offers: Sequence[str] = ()) -> None:
        super().__init__(message, kind=kind)
        self.offers = tuple(offers)


class KindBlockedError(KindError, PermissionError):
    """The distribution that offers the kind is not allowed by ``NOETHER_INIT_ALLOW`` or ``NOETHER_INIT_DENY``."""

    def __init__(self, message: str, *, kind: str, distribution: str) -> None:
        super().__init__(message, kind=kind)
        self.distribution = distribution


class KindImportError(KindError, ImportError):
    """The plugin raised while it was imported; its own exception is the ``__cause__``."""


class KindContractError(KindError, TypeError):
    """The object behind the entry point breaks the contract of initializers; ``findings`` say how."""

    def __init__(self, message: str, *, kind: str, findings: Sequence[str] = ()) -> None:
        super().__init__(message, kind=kind)
        self.findings = tuple(findings)


class CheckpointError(InitError):
    """Something is wrong with files; ``path`` is the file or folder, where there is one."""

    def __init__(self, message: str, *, path: Path | None = None, names: Sequence[str] = ()) -> None:
        super().__init__(message, *(path.parts if path is not None else ()), *names)
        self.path = path


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """Nothing matches ``asked``; ``candidates`` exist."""

    def __init__(
        self, message: str, *, path: Path | None = None, asked: str = "", candidates: Sequence[str] = ()
    ) -> None:
        super().__init__(message, path=path, names=(asked, *candidates))
        self.asked = asked
        self.candidates = tuple(candidates)


class IncompleteSetError(CheckpointNotFoundError):
    """The set exists but lacks ``missing`` parts; ``candidates`` are tags that have them."""

    def __init__(
        self,
        message: str,
        *,
        path: Path | None = None,
        asked: str = "",
        missing: Sequence[str] = (),
        candidates: Sequence[str] = (),
    ) -> None:
        super().__init__(message, path=path, asked=asked, candidates=candidates)
        self.missing = tuple(missing)


class AmbiguousCheckpointError(CheckpointError):
    """Several checkpoints could be meant (``candidates``) and none may be picked automatically."""

    def __init__(self, message: str, *, path: Path | None = None, candidates: Sequence[str] = ()) -> None:
        super().__init__(message, path=path)
        self.candidates = tuple(candidates)


class TornSetError(CheckpointError):
    """Files that should belong together come from different iterations or runs; ``found``: file -> what it says."""

    def __init__(self, message: str, *, path: Path | None = None, found: dict[str, str] | None = None) -> None:
        super().__init__(message, path=path)
        self.found = dict(found or {})


class CheckpointFormatError(CheckpointError, ValueError):
    """The reader refuses the file: not a checkpoint, an unsafe construct, or sizes that do not add up."""


class UnsafeGlobalError(CheckpointFormatError):
    """The file refers to ``names`` that are not allowed. Nothing of them was imported or called."""

    def __init__(self, message: str, *, path: Path | None = None, names: Sequence[str] = ()) -> None:
        super().__init__(message, path=path)
        self.names = tuple(names)


class CheckpointCorruptError(CheckpointError):
    """The bytes under ``key`` differ from those that were written (checksum or digest)."""

    def __init__(self, message: str, *, path: Path | None = None, key: str = "") -> None:
        super().__init__(message, path=path, names=(key,))
        self.key = key


class NoGoodSetError(CheckpointCorruptError):
    """Every set that could be resumed from is broken. ``tried``: set -> what is wrong with it, newest first."""

    def __init__(self, message: str, *, path: Path | None = None, tried: dict[str, str] | None = None) -> None:
        super().__init__(message, path=path)
        self.tried = dict(tried or {})


class CheckpointWriteError(CheckpointError, OSError):
    """A set could not be written; the sets that were committed before are untouched."""


class PlanError(InitError, ValueError):
    """The plan has ``problems``. Nothing was changed. ``plan`` is the whole plan."""

    def __init__(self, message: str, *, plan: Any = None, problems: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.plan = plan
        self.problems = tuple(problems)


class StateMismatchError(InitError, ValueError):
    """State of an optimizer, trainer or callback does not fit; ``problems`` list every place."""

    def __init__(self, message: str, *, problems: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.problems = tuple(problems)


class ProbeMismatchError(InitError, ValueError):
    """With the weights of a set the model computes something else on its probe than when the set was saved.

    ``path`` is the folder of the set, ``output`` the place of the worst output in what the model returns, ``expected``
    and ``found`` what is known of it then and now (shape, dtype, norm, digest; None where it is not there), and
    ``difference`` the norm of the difference in parts of the norm, None where that makes no sense.
    """

    def __init__(
        self,
        message: str,
        *,
        path: Path | None = None,
        output: str = "",
        expected: Any = None,
        found: Any = None,
        difference: float | None = None,
    ) -> None:
        super().__init__(message)
        self.path = path
        self.output = output
        self.expected = expected
        self.found = found
        self.difference = difference


class StartConflictError(InitError, ValueError):
    """More than one initializer starts at other than iteration zero, or not where the stack said that it would.

    ``starts``: initializer -> iteration; ``told`` and ``now`` -> iteration.
    """

    def __init__(self, message: str, *, starts: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.starts = dict(starts or {})


class PartlyInitializedError(InitError, RuntimeError):
    """User code, a kind without ``check`` or a device failed after the first change.

    States of the trainer and of callbacks have been put back. ``done``, ``failed`` and ``pending`` name the steps.
    """

    def __init__(
        self, message: str, *, done: Sequence[str] = (), failed: str = "", pending: Sequence[str] = ()
    ) -> None:
        super().__init__(message)
        self.done = tuple(done)
        self.failed = failed
        self.pending = tuple(pending)
