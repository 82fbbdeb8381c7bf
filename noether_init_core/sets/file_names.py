"""The grammar of checkpoint file names, tags and queries: parsers and printers, pure text.

::

    {model}[_{info}]_cp={tag}_{model|optim|trainer}.th         info: key=value, no '_' in the key

The info starts at the last ``_`` before the first ``=``, so a model name may hold ``_`` but not ``=``. Noether itself
writes ambiguous names (an info ``ema``, or ``ema_factor=0.9``). Therefore ``CheckpointSet.file`` compares the complete
``stem``, model and info together.
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
#: Tags that always select the newest save; Noether rewrites their files in place.
FOLLOWING = ("latest", "last")

MAX_FILE_NAME_BYTES = 255
_MARK = "_cp="
_SUFFIX = re.compile(r"_(model|optim|trainer)\.th\Z")


@attrs.frozen
class CheckpointFileName:
    """The four fields of a file name; ``str()`` returns the name."""

    model: str
    info: str | None
    tag: str
    part: Part

    @property
    def stem(self) -> str:
        """Model and info in the form of a file name."""
        return stem_of(self.model, self.info)

    def checked(self) -> CheckpointFileName:
        """Return itself if it is a valid name to write: every component is a name, and parsing returns the same.

        Raises ``InvalidNameError``.
        """
        check_name(self.model, "model_name")
        check_tag(self.tag)
        if "=" in self.model:
            raise InvalidNameError(
                f"model_name {self.model!r} holds '=', which is allowed only in model_info: the names of its files "
                "would be ambiguous. Next: rename the model",
                what="model_name",
                value=self.model,
            )
        if self.info is not None:
            check_name(self.info, "model_info")
            key, equals, _ = self.info.partition("=")
            if not equals or not key or "_" in key:
                raise InvalidNameError(
                    f"model_info {self.info!r} must have the form key=value without '_' in the key, such as ema=0.999",
                    what="model_info",
                    value=self.info,
                )
        size = len(str(self).encode())
        if size > MAX_FILE_NAME_BYTES:
            raise InvalidNameError(
                f"the file name {str(self)[:60]}... has {size} bytes, more than {MAX_FILE_NAME_BYTES}. "
                "Next: shorten the name of the model or the tag",
                what="model_name",
                value=self.model,
            )
        return self

    def __str__(self) -> str:
        return f"{self.stem}{_MARK}{self.tag}_{self.part}.th"


def stem_of(model: str, info: str | None) -> str:
    """Return model and info in the form of a file name."""
    return model if info is None else f"{model}_{info}"


@functools.lru_cache(4096)  # every listing and every manifest repeats the same names
def parse(name: str) -> CheckpointFileName | None:
    """Parse a file name; None if it is not the name of a checkpoint. ``str(parse(name)) == name``."""
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


@functools.lru_cache(1024)  # every set repeats the same tags
def check_tag(tag: str) -> str:
    """Return ``tag`` if it can be part of a file name. Raises ``InvalidNameError``."""
    check_name(tag, "checkpoint_tag")
    if _MARK in tag:
        raise InvalidNameError(
            f"checkpoint_tag {tag!r} holds {_MARK!r}, which marks the tag in file names. Next: choose another tag",
            what="checkpoint_tag",
            value=tag,
        )
    return tag


def iteration_of_tag(tag: str) -> TrainingIteration | None:
    """Return the iteration in a tag such as ``E1_U7_S28`` or ``E1_U7_S28.early_exit``; None for any other tag."""
    iteration = TrainingIteration.in_text(tag.partition(".")[0])
    return iteration if iteration is not None and iteration.is_fully_specified else None


@attrs.frozen
class Query:
    """A parsed ``checkpoint_tag``: a literal tag, a full iteration, or a partial one that several may match.

    ``automatic``: a later save may change the selected set (``latest``, ``last``, ``E10``), so walking back is allowed.
    ``best`` and other tags select one set.
    """

    text: str
    iteration: TrainingIteration | None
    automatic: bool

    @classmethod
    def of(cls, tag: str | Mapping[str, Any] | TrainingIteration | None) -> Query:
        """Parse a ``checkpoint_tag``; None is ``latest``. Raises ``ConfigError``."""
        if tag is None:
            return cls("latest", None, automatic=True)
        if isinstance(tag, Mapping):
            tag = TrainingIteration.from_mapping(tag)
        if isinstance(tag, TrainingIteration):
            if not (tag.is_minimally_specified or tag.is_fully_specified):
                raise ConfigError(
                    f"checkpoint_tag {tag.to_mapping()} must have one of epoch, update, sample, or all three"
                )
            return cls(str(tag), tag, automatic=not tag.is_fully_specified)
        check_name(tag, "checkpoint_tag")
        iteration = TrainingIteration.in_text(tag)
        is_open = tag in FOLLOWING if iteration is None else not iteration.is_fully_specified
        return cls(tag, iteration, automatic=is_open)

    @property
    def is_minimal(self) -> bool:
        """Whether it is a partial iteration, which selects the newest match."""
        return self.iteration is not None and not self.iteration.is_fully_specified

    def can_select(self, iteration: TrainingIteration | None) -> bool:
        """Whether a set of ``iteration`` matches; always true for a literal tag, which does not depend on it."""
        return self.iteration is None or (iteration is not None and self.iteration.matches(iteration))
