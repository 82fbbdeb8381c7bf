"""The errors of noether-init-core.

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
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import attrs

from noether_init_core.messages import one_line, printable

#: Attributes that hold names which somebody else chose: line breaks in them do not end a line of the message.
_FOREIGN = ("kind", "value", "path", "key_path", "asked", "candidates", "key")


def type_of(value: object) -> str:
    """The type of ``value`` as messages name it, with its article: ``an OrderedDict``, ``a Linear``."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    name = type(value).__name__
    return f"an {name}" if name.lstrip("_")[:1].lower() in ("a", "e", "i", "o") else f"a {name}"


def _tuple(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(names)


@attrs.define(slots=False, repr=False)
class InitError(Exception):
    """Root of every error that noether-init-core raises on purpose."""

    message: str

    def __attrs_post_init__(self) -> None:
        for attribute in _FOREIGN:
            found: Any = getattr(self, attribute, None) or ()
            for name in found.parts if isinstance(found, Path) else [found] if isinstance(found, str) else found:
                if "\n" in name:
                    self.message = self.message.replace(name, one_line(name))
        # names out of a hostile file must not reach a terminal as commands to it
        self.message = printable(self.message)

    def __str__(self) -> str:
        return self.message

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.message!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        # constructors of children may take keywords, which the one of BaseException does not keep
        return _unpickled, (type(self), self.args, self.__dict__)

    def add(self, text: str) -> None:
        """Add to the message what a caller knows besides; class and data stay."""
        self.message += text


def _unpickled(kind: type[InitError], arguments: tuple[Any, ...], data: dict[str, Any]) -> InitError:
    keywords = inspect.signature(kind).parameters.keys() & data.keys() - {"message"}
    error = kind("", **{name: data[name] for name in keywords})
    error.__dict__.update(data)
    error.args = arguments
    return error


class ConfigError(InitError, ValueError):
    """A config that cannot be used."""


@attrs.define(slots=False, repr=False)
class ConfigFileError(ConfigError):
    """A config file that cannot be used; ``path``, ``line`` (from 1) and ``key_path`` say where."""

    path: Path
    line: int | None = None
    key_path: str = ""

    def __attrs_post_init__(self) -> None:
        place = self.path.name if self.line is None else f"{self.path.name}:{self.line}"
        self.message = f"{place} {self.key_path}: {self.message}" if self.key_path else f"{place}: {self.message}"
        super().__attrs_post_init__()


@attrs.define(slots=False, repr=False)
class InvalidNameError(ConfigError):
    """``value`` cannot be used as ``what`` (a run id, stage name, tag, model name or model info)."""

    what: str
    value: str


@attrs.define(slots=False, repr=False)
class KindError(ConfigError):
    """The kind named ``kind`` cannot be used.

    ``config_file``, ``line`` and ``key_path`` say where a config file asks for it.
    """

    kind: str
    config_file: Path | None = attrs.field(default=None, init=False)
    line: int | None = attrs.field(default=None, init=False)
    key_path: str = attrs.field(default="", init=False)

    def found_at(self, located: ConfigError) -> Self:
        """This error with the place and the message of ``located``; its class and its cause stay."""
        self.message = located.message
        if isinstance(located, ConfigFileError):
            self.config_file, self.line, self.key_path = located.path, located.line, located.key_path
        return self


@attrs.define(slots=False, repr=False)
class UnknownKindError(KindError, LookupError):
    """No installed distribution offers the kind; ``candidates`` are near names."""

    candidates: tuple[str, ...] = attrs.field(default=(), converter=_tuple)


@attrs.define(slots=False, repr=False)
class KindConflictError(KindError):
    """Several distributions offer the kind; ``offers`` are their descriptions. None of them was imported."""

    offers: tuple[str, ...] = attrs.field(default=(), converter=_tuple)


@attrs.define(slots=False, repr=False)
class KindBlockedError(KindError, PermissionError):
    """The distribution that offers the kind is not allowed by ``NOETHER_INIT_ALLOW`` or ``NOETHER_INIT_DENY``."""

    distribution: str = ""


class KindImportError(KindError, ImportError):
    """The plugin raised while it was imported; its own exception is the ``__cause__``."""


@attrs.define(slots=False, repr=False)
class KindContractError(KindError, TypeError):
    """The object behind the entry point breaks the contract of initializers; ``findings`` say how."""

    findings: tuple[str, ...] = attrs.field(default=(), converter=_tuple)


@attrs.define(slots=False, repr=False)
class CheckpointError(InitError):
    """Something is wrong with files; ``path`` is the file or folder, where there is one."""

    path: Path | None = None


@attrs.define(slots=False, repr=False)
class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """Nothing matches ``asked``; ``candidates`` exist."""

    asked: str = ""
    candidates: tuple[str, ...] = attrs.field(default=(), converter=_tuple)


@attrs.define(slots=False, repr=False)
class IncompleteSetError(CheckpointNotFoundError):
    """The set exists but lacks ``missing`` parts; ``candidates`` are tags that have them."""

    missing: tuple[str, ...] = attrs.field(default=(), converter=_tuple)


@attrs.define(slots=False, repr=False)
class AmbiguousCheckpointError(CheckpointError):
    """Several checkpoints could be meant (``candidates``) and none may be picked automatically."""

    candidates: tuple[str, ...] = attrs.field(default=(), converter=_tuple)


@attrs.define(slots=False, repr=False)
class TornSetError(CheckpointError):
    """Files that should belong together come from different iterations or runs; ``found``: file -> what it says."""

    found: Mapping[str, str] = attrs.Factory(dict)


class CheckpointFormatError(CheckpointError, ValueError):
    """The reader refuses the file: not a checkpoint, an unsafe construct, or sizes that do not add up."""


@attrs.define(slots=False, repr=False)
class UnsafeGlobalError(CheckpointFormatError):
    """The file refers to ``names`` that are not allowed. Nothing of them was imported or called."""

    names: tuple[str, ...] = attrs.field(default=(), converter=_tuple)


@attrs.define(slots=False, repr=False)
class CheckpointCorruptError(CheckpointError):
    """The bytes under ``key`` differ from those that were written (checksum or digest)."""

    key: str = ""


@attrs.define(slots=False, repr=False)
class NoGoodSetError(CheckpointCorruptError):
    """Every set that could be resumed from is broken. ``tried``: set -> what is wrong with it, newest first."""

    tried: Mapping[str, str] = attrs.Factory(dict)


class CheckpointWriteError(CheckpointError, OSError):
    """A set could not be written; the sets that were committed before are untouched."""


@attrs.define(slots=False, repr=False)
class PlanError(InitError, ValueError):
    """The plan has ``problems``. Nothing was changed. ``plan`` is the whole plan."""

    plan: Any = None
    problems: tuple[str, ...] = attrs.field(default=(), converter=_tuple)


@attrs.define(slots=False, repr=False)
class StateMismatchError(InitError, ValueError):
    """State of an optimizer, trainer or callback does not fit; ``problems`` list every place."""

    problems: tuple[str, ...] = attrs.field(default=(), converter=_tuple)


@attrs.define(slots=False, repr=False)
class ProbeMismatchError(InitError, ValueError):
    """With the weights of a set the model computes something else on its probe than when the set was saved.

    ``path`` is the folder of the set, ``output`` the place of the worst output in what the model returns, ``expected``
    and ``found`` what is known of it then and now (shape, dtype, norm, digest; None where it is not there), and
    ``difference`` the norm of the difference in parts of the norm, None where that makes no sense.
    """

    path: Path | None = None
    output: str = ""
    expected: Any = None
    found: Any = None
    difference: float | None = None


@attrs.define(slots=False, repr=False)
class StartConflictError(InitError, ValueError):
    """More than one initializer starts at other than iteration zero, or not where the stack said that it would.

    ``starts``: initializer -> iteration; ``told`` and ``now`` -> iteration.
    """

    starts: Mapping[str, str] = attrs.Factory(dict)


@attrs.define(slots=False, repr=False)
class PartlyInitializedError(InitError, RuntimeError):
    """User code, a kind without ``check`` or a device failed after the first change.

    States of the trainer and of callbacks have been put back. ``done``, ``failed`` and ``pending`` name the steps.
    """

    done: tuple[str, ...] = attrs.field(default=(), converter=_tuple)
    failed: str = ""
    pending: tuple[str, ...] = attrs.field(default=(), converter=_tuple)
