"""What a kind that reads files is asked, answers, and can be told: single models, queries, sources, configs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import attrs
import pydantic

from noether_init_core.applying.weights import OnNonfinite
from noether_init_core.config.base import KindConfig
from noether_init_core.config.transforms import TransformConfig
from noether_init_core.files.verification import Digests
from noether_init_core.models import Leaf, leaf_models
from noether_init_core.surgery.patterns import parse_glob
from noether_init_core.surgery.planner import Policies

Part = Literal["model", "optim", "trainer"]


@attrs.frozen(eq=False)
class LocateQuery:
    """What ``SourceInitializer.locate`` is asked for.

    Attributes:
        model_name: The name in the files; for a submodel the path of names, such as ``autoenc.encoder``.
        path: The path of names of the single model in the model that is initialized.
        part: ``model`` for weights, ``optim`` for optimizer state, ``trainer`` for the trainer's state.
        model: The single model; None where it is not known yet.
    """

    model_name: str
    path: str = ""
    part: Part = "model"
    model: Any = None


@attrs.frozen
class Source:
    """Where weights or state lie.

    Attributes:
        location: The file.
        digests: The digest of the whole file, as ``xxh3_128:...`` or ``sha256:...``, or all that is known of it; with
            ``verify: full`` the bytes are compared with them on the handle that they are read from.
        entry: Which tree of the file; None for the state dict.
        origin: Where it came from, for people and reports: run_id, stage_name, tag, iteration.
    """

    location: Path = attrs.field(converter=Path)
    digests: Digests | str | None = attrs.field(default=None, repr=lambda found: repr(found)[:80])
    entry: str | None = None
    origin: Mapping[str, str] = attrs.Factory(dict)

    @property
    def digest(self) -> str | None:
        """The digest of the whole file, where it is known."""
        return self.digests.file if isinstance(self.digests, Digests) else self.digests

    def describe(self) -> str:
        """The origin in words."""
        if not self.origin:
            return str(self.location)
        run = "/".join(self.origin[key] for key in ("run_id", "stage_name") if key in self.origin)
        tag, iteration = self.origin.get("tag"), self.origin.get("iteration")
        words = [run, f"@ {tag}" if tag else "", f"= {iteration}" if iteration and iteration != tag else ""]
        return " ".join(word for word in words if word)


def modules_of(model: Any) -> tuple[int, ...]:
    """Ids of the modules of the single models; a composite may make views of them anew whenever it is asked."""
    return tuple(id(getattr(leaf, "module", leaf)) for _path, leaf in leaf_models(model))


def signature(leaves: Sequence[Leaf]) -> tuple[Any, ...]:
    """What a plan depends on, on the side of the models: which modules and tensors they have, and of what form."""
    modules = tuple(id(module) for leaf in leaves for module in getattr(leaf.model, "modules", tuple)())
    return modules + tuple(
        (leaf.path, name, id(tensor), tensor.shape, tensor.dtype, tensor.device)
        for leaf in leaves
        for named in (leaf.model.named_parameters, leaf.model.named_buffers)
        for name, tensor in named(remove_duplicate=False)
    )


def _checked_glob(value: str) -> str:
    parse_glob(value)
    return value


def _for_all(value: Any) -> Any:
    """A number alone is meant for all parameters."""
    return value if isinstance(value, Mapping) else {"**": value}


Glob = Annotated[str, pydantic.AfterValidator(_checked_glob)]
Share = Annotated[float, pydantic.Field(ge=0, le=1)]


class SourceInitializerConfig(KindConfig):
    """What every kind that reads weights from a file can be told."""

    verify: Literal["full", "header", "none"] = pydantic.Field(
        default="full",
        description="full: every byte against its checksum; header: the structure only; none: nothing, nor are values "
        "looked at unless on_nonfinite is given.",
    )
    on_nonfinite: Literal["error", "warn", "ignore"] | None = pydantic.Field(
        default=None,
        description="What NaN, or infinities in a parameter, lead to; when null an error, with verify: none nothing.",
    )
    cast: Literal["same_kind", "none", "any"] = pydantic.Field(
        default="same_kind", description="Which dtypes may be converted: float to float, none, or any."
    )
    transforms: list[TransformConfig] = pydantic.Field(
        default=[], description="Rules that say which keys of the file become which keys of the model."
    )
    source_root: str | None = pydantic.Field(
        default=None, description="Prefix in the file that rules are relative to; keys outside it are left."
    )
    target_root: str | None = pydantic.Field(
        default=None, description="Prefix in the model that rules are relative to; keys outside it keep their value."
    )
    on_missing: Literal["error", "keep", "reset"] = pydantic.Field(
        default="error",
        description="What a key of the model leads to that the file has not: an error, its present value, or a fresh "
        "value by its module's reset_parameters.",
    )
    on_unexpected: Literal["error", "ignore"] = pydantic.Field(
        default="error", description="What a key of the file leads to that the model has not."
    )
    on_mismatch: Literal["error", "keep", "slice", "pad"] = pydantic.Field(
        default="error",
        description="What different shapes lead to: an error, the model's own value, the leading part of the file's "
        "tensor, or the file's tensor in the leading part of the model's.",
    )
    on_unmatched_rule: Literal["error", "warn"] | None = pydantic.Field(
        default=None, description="What a rule that matches nothing leads to: an error; for Noether's fields a warning."
    )
    min_coverage: Annotated[
        dict[Glob, Share], pydantic.BeforeValidator(_for_all, json_schema_input_type=Share | dict[Glob, Share])
    ] = pydantic.Field(
        default={},
        description="Least share of the parameters that must come from checkpoints, from 0 to 1; or globs -> shares.",
    )
    submodel: str | None = pydantic.Field(
        default=None, description="Initialize this submodel of a composite only, such as encoder or encoder.stem."
    )

    @property
    def policies(self) -> Policies:
        """What is done where file and model do not fit."""
        return Policies(self.on_missing, self.on_unexpected, self.on_mismatch, self.cast, dict(self.min_coverage))

    @property
    def nonfinite(self) -> OnNonfinite:
        """What NaN and infinities lead to; with ``verify: none`` values are looked at only if the config says so."""
        return self.on_nonfinite or ("ignore" if self.verify == "none" else "error")


class OptimizerStateConfig(SourceInitializerConfig):
    """The config of kinds that can bring optimizer state besides weights; ``locate`` is then asked for ``optim``."""

    load_optim: bool = pydantic.Field(default=False, description="Whether the state of the optimizer is loaded too.")
    param_groups: dict[str, Literal["checkpoint", "config"]] = pydantic.Field(
        default={},
        description="Field of the optimizer's groups (lr, weight_decay; * for all others) -> whose value stays: that "
        "of the checkpoint (the default), or of the optimizer as it is configured now.",
    )
    on_missing_state: Literal["error", "fresh"] = pydantic.Field(
        default="error",
        description="What a parameter leads to whose weights are loaded and that has no optimizer state in the file.",
    )
    on_unexpected_state: Literal["error", "ignore"] | None = pydantic.Field(
        default=None,
        description="What optimizer state leads to of a parameter that is not there: an error; when null a warning "
        "where weights were renamed or left out.",
    )

    @pydantic.model_validator(mode="after")
    def _check_optimizer_fields(self) -> Self:
        about_state: dict[str, Any] = {"param_groups": {}, "on_missing_state": "error", "on_unexpected_state": None}
        given = [name for name, default in about_state.items() if getattr(self, name) != default]
        if given and not self.load_optim:
            raise ValueError(f"{given[0]} is about optimizer state, which is not loaded. Add: load_optim: true")
        return self
