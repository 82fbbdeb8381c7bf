"""The grammar of checkpoint file names and tags, and of what a config asks for: parsers and printers, pure text.

::

    {model}[_{info}]_cp={tag}_{model|optim|trainer}.th         info: key=value, no '_' in the key

The info starts at the last ``_`` before the first ``=``, so a model name may hold ``_`` but not ``=``. Noether itself
writes names that this cannot tell apart (an info ``ema``, or ``ema_factor=0.9``); hence ``CheckpointSet.file`` compares
the whole ``stem``, model and info together, when it is asked for a certain file.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any, Literal, get_args

import attrs

from noether_init_core.errors import ConfigError, InvalidNameError
from noether_init_core.iteration import TrainingIteration
from noether_init_core.paths import check_name, is_name

Part = Literal["model", "optim", "trainer"]
PARTS: tuple[Part, ...] = get_args(Part)
#: Parts as messages name them.
PART_NAMES = {"model": "weights", "optim": "optimizer state", "trainer": "trainer state"}
#: Tags that follow the run by themselves; Noether rewrites their files in place.
FOLLOWING = ("latest", "last")

MAX_FILE_NAME_BYTES = 255
_MARK = "_cp="
_SUFFIX = re.compile(r"_(model|optim|trainer)\.th\Z")


@attrs.frozen
class CheckpointFileName:
    """The four things that a file name says. ``str()`` prints the name."""

    model: str
    info: str | None
    tag: str
    part: Part

    @property
    def stem(self) -> str:
        """Model and info as they stand in the name."""
        return stem_of(self.model, self.info)

    def checked(self) -> CheckpointFileName:
        """Itself, if it can be written: every component is a name, and the printed name parses to the same.

        Raises ``InvalidNameError``.
        """
        check_name(self.model, "model_name")
        check_tag(self.tag)
        if "=" in self.model:
            raise InvalidNameError(
                f"model_name {self.model!r} holds '=', which only a model_info may hold: its files could not be told "
                "from those of another model. Rename the model",
                what="model_name",
                value=self.model,
            )
        if self.info is not None:
            check_name(self.info, "model_info")
            key, equals, _ = self.info.partition("=")
            if not equals or not key or "_" in key:
                raise InvalidNameError(
                    f"model_info {self.info!r} must be written key=value, without '_' in the key; such as ema=0.999",
                    what="model_info",
                    value=self.info,
                )
        size = len(str(self).encode())
        if size > MAX_FILE_NAME_BYTES:
            raise InvalidNameError(
                f"the file name {str(self)[:60]}... has {size} bytes, more than {MAX_FILE_NAME_BYTES}. "
                "Shorten the model's name or the tag",
                what="model_name",
                value=self.model,
            )
        return self

    def __str__(self) -> str:
        return f"{self.stem}{_MARK}{self.tag}_{self.part}.th"


def stem_of(model: str, info: str | None) -> str:
    """Model and info as they stand in a file name."""
    return model if info is None else f"{model}_{info}"


@functools.lru_cache(4096)  # the same names come with every listing and manifest
def parse(name: str) -> CheckpointFileName | None:
    """What the file name says; None if it is not the name of a checkpoint. ``str(parse(name)) == name``."""
    suffix = _SUFFIX.search(name)
    if suffix is None:
        return None
    stem, mark, tag = name[: suffix.start()].rpartition(_MARK)
    if not mark or not is_name(stem) or not is_name(tag):
        return None
    model, info = stem, None
    split = stem.rfind("_", 0, stem.index("=")) if "=" in stem else -1
    if split > 0:
        model, info = stem[:split], stem[split + 1 :]
    part = next(part for part in PARTS if part == suffix[1])
    return CheckpointFileName(model, info, tag, part)


@functools.lru_cache(1024)  # the same tags come with every set
def check_tag(tag: str) -> str:
    """Return ``tag`` if it can be written; raises ``InvalidNameError``."""
    check_name(tag, "checkpoint_tag")
    if _MARK in tag:
        raise InvalidNameError(
            f"checkpoint_tag {tag!r} holds {_MARK!r}, which separates the tag in file names. Choose another tag",
            what="checkpoint_tag",
            value=tag,
        )
    return tag


def iteration_of_tag(tag: str) -> TrainingIteration | None:
    """The iteration that a tag says: of ``E1_U7_S28`` and of ``E1_U7_S28.early_exit``; None for any other tag."""
    iteration = TrainingIteration.in_text(tag.partition(".")[0])
    return iteration if iteration is not None and iteration.is_fully_specified else None


@attrs.frozen
class Query:
    """What a tag asks for: a tag as it is written, an iteration, or any iteration that has some of its fields.

    ``automatic``: a newer set may be meant at any time, and walking back is allowed (``latest``, ``last``, ``E10``).
    ``best`` and other tags name one set.
    """

    text: str
    iteration: TrainingIteration | None
    automatic: bool

    @classmethod
    def of(cls, tag: str | Mapping[str, Any] | TrainingIteration | None) -> Query:
        """Parse a ``checkpoint_tag``; None means ``latest``. Raises ``ConfigError``."""
        if tag is None:
            return cls("latest", None, automatic=True)
        if isinstance(tag, Mapping):
            tag = TrainingIteration.from_mapping(tag)
        if isinstance(tag, TrainingIteration):
            if not (tag.is_minimally_specified or tag.is_fully_specified):
                raise ConfigError(
                    f"checkpoint_tag {tag.to_mapping()} must say one of epoch, update, sample, or all three"
                )
            return cls(str(tag), tag, automatic=not tag.is_fully_specified)
        check_name(tag, "checkpoint_tag")
        iteration = TrainingIteration.in_text(tag)
        is_open = tag in FOLLOWING if iteration is None else not iteration.is_fully_specified
        return cls(tag, iteration, automatic=is_open)

    @property
    def is_minimal(self) -> bool:
        """Whether it asks for the newest of all iterations that match."""
        return self.iteration is not None and not self.iteration.is_fully_specified

    def may_mean(self, iteration: TrainingIteration | None) -> bool:
        """Whether a set of ``iteration`` can be meant; what a text means, the iteration does not tell."""
        return self.iteration is None or (iteration is not None and self.iteration.matches(iteration))
