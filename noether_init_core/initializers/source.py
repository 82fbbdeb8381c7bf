"""SourceInitializer: weights from a file that the kind locates; all else is inherited."""

from __future__ import annotations

import abc
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import attrs
import pydantic

from noether_init_core.applying.agreement import check_across, check_casts, check_loading_code
from noether_init_core.applying.fresh_memory import device_for, has_weak_references, left_without_memory, on_meta
from noether_init_core.applying.module_versions import check_versions
from noether_init_core.applying.targets import ModelTargets, loaded_by_code, model_targets
from noether_init_core.applying.weights import OnNonfinite, apply_rows, check_values
from noether_init_core.config.base import KindConfig
from noether_init_core.config.transforms import TransformConfig, rule_of
from noether_init_core.errors import CheckpointNotFoundError, ConfigError, PartlyInitializedError, PlanError
from noether_init_core.files.checkpoint import Checkpoint
from noether_init_core.files.digests import Digests
from noether_init_core.files.opening import open_checkpoint
from noether_init_core.initializers.base import InitializerBase
from noether_init_core.protocols import check_model
from noether_init_core.sets.provenance import History
from noether_init_core.stopwatch import Stopwatch
from noether_init_core.suggest.suggest import suggest
from noether_init_core.suggest.suggestion import Suggestion
from noether_init_core.surgery.name_rules import NameRules, NoetherSurgery
from noether_init_core.surgery.patterns import parse_glob
from noether_init_core.surgery.plan import LoadPlan, PlanPart, TensorSpec
from noether_init_core.surgery.planner import Policies, plan_load
from noether_init_core.surgery.problems import KEEP_MODEL_HINT
from noether_init_core.surgery.transforms import Transforms

__all__ = ["Leaf", "Part", "Source", "SourceInitializer", "SourceInitializerConfig", "submodel_of"]

Part = Literal["model", "optim", "trainer"]


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


@attrs.frozen
class Source:
    """A file with weights or state.

    Attributes:
        path: The file.
        digest: Digest of the whole file, as ``xxh3_128:...`` or ``sha256:...``; with ``verify: full`` it is checked on
            the handle that is read from.
        committed: What a manifest says of the file; compared instead of ``digest``, and faster.
        origin: Where it came from, for people and reports: run, stage, tag, iteration.
    """

    path: Path = attrs.field(converter=Path)
    digest: str | None = None
    committed: Digests | None = attrs.field(default=None, kw_only=True, repr=False)
    origin: Mapping[str, str] = attrs.Factory(dict)

    def describe(self) -> str:
        """The origin in words."""
        if not self.origin:
            return str(self.path)
        run = "/".join(self.origin[key] for key in ("run_id", "stage_name") if key in self.origin)
        tag, iteration = self.origin.get("tag"), self.origin.get("iteration")
        words = [run, f"@ {tag}" if tag else "", f"= {iteration}" if iteration and iteration != tag else ""]
        return " ".join(word for word in words if word)


@attrs.frozen(eq=False)
class Leaf:
    """A single model, the path of names that leads to it, and the names that its files may have, best first."""

    path: str
    file_names: tuple[str, ...]
    model: Any


@attrs.define(eq=False)
class _Opened:
    source: Source
    reader: Checkpoint


@attrs.frozen(eq=False)
class _Prepared:
    plan: LoadPlan
    leaves: tuple[Leaf, ...]
    targets: Mapping[str, ModelTargets]


class SourceInitializer(InitializerBase):
    """Initialize weights from files that ``locate`` names.

    A subclass implements ``locate`` and gets the rest: screening, plan, verification, application in place, composites.
    Files are opened once and kept open from ``check`` to the end of ``init_weights``, so that what was verified is
    what is loaded. All submodels are planned and verified before the first one is changed.
    """

    config_class: ClassVar[type[KindConfig]] = SourceInitializerConfig
    config: SourceInitializerConfig

    #: Whether what ``locate`` finds is for one single model; a composite then needs ``submodel``, else it is refused.
    one_model: ClassVar[bool] = False
    #: The config line that keeps entries of the model, shown beside missing ones; empty where the kind has none.
    fresh_hint: ClassVar[str] = ""

    def __init__(self, config: KindConfig, *, path_provider: Any = None) -> None:
        super().__init__(config, path_provider=path_provider)
        self._opened: dict[tuple[str, Part], _Opened] = {}
        self._checked_values: set[tuple[str, int]] = set()
        self.last_plan: LoadPlan | None = None
        #: Ids of the tensors that the plan made last will write.
        self.will_write: frozenset[int] = frozenset()
        #: Path of a model -> the file that its weights came from, after ``init_weights``.
        self.last_sources: dict[str, Source] = {}
        #: Where a key of the config stands, for messages; the stack says it where there is a file.
        self.said_at: Callable[..., str] = _dotted
        #: Ids of tensors that initializers before this one will have loaded; the stack says it.
        self.loaded_before: frozenset[int] = frozenset()
        #: What was restored besides weights, in words for the report.
        self.restored: list[str] = []
        self._planned: tuple[Any, LoadPlan] | None = None
        # what was checked last, and for which tensors; while these are the same, it holds
        self._ready: tuple[tuple[Any, ...], _Prepared] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """What goes to another process: neither open files nor what was found out so far."""
        return {**self.__dict__, **self.at_first()}

    def at_first(self) -> dict[str, Any]:
        """The attributes that a use fills, as they were before the first one; a subclass adds its own."""
        return {
            "_opened": {},
            "_checked_values": set(),
            "last_plan": None,
            "will_write": frozenset(),
            "last_sources": {},
            "said_at": _dotted,
            "loaded_before": frozenset(),
            "restored": [],
            "_planned": None,
            "_ready": None,
            "stopwatch": Stopwatch(),
        }

    @abc.abstractmethod
    def locate(self, model_name: str, part: Part) -> Source | None:
        """The file that holds ``part`` of the model called ``model_name``; None where there is none.

        Args:
            model_name: Name in the files; for a submodel the path of names, such as ``autoenc.encoder``.
            part: ``model`` for weights, ``optim`` for optimizer state, ``trainer`` for the trainer's state.
        """

    @property
    def rules(self) -> NameRules:
        """Surgery on names: ``transforms`` of the config."""
        config = self.config
        if not (config.transforms or config.source_root or config.target_root):
            return NoetherSurgery()
        return Transforms(
            [rule_of(rule, self.said_at("transforms", number)) for number, rule in enumerate(config.transforms)],
            source_root=config.source_root or "",
            target_root=config.target_root or "",
            warns=config.on_unmatched_rule == "warn",
        )

    @property
    def policies(self) -> Policies:
        """What is done where file and model do not fit."""
        config = self.config
        return Policies(
            config.on_missing, config.on_unexpected, config.on_mismatch, config.cast, dict(config.min_coverage)
        )

    def plan_weights(self, model: Any) -> LoadPlan:
        """What ``init_weights(model)`` will do. Only headers are read; ``model`` may be on the meta device.

        Raises errors of ``locate`` and of the reader; problems of the plan itself are in the plan.
        """
        return self._prepare(model).plan

    def suggest_rules(self, model: Any) -> dict[str, Suggestion]:
        """Path of a single model -> transforms for it and its file, from names and shapes; nothing is applied.

        Only headers are read; ``model`` may be on the meta device. Raises errors of ``locate`` and of the reader.
        """
        return {
            part.model: suggest(
                part.sources, part.targets, model=part.model, policies=self.policies, hidden=part.hidden
            )
            for part in self._parts(model)[0]
        }

    def check(self, model: Any, trainer: Any = None, callbacks: list[Any] | None = None) -> None:
        """Plan the weights, verify every byte that will be read, and look at the values. Changes nothing."""
        self._check_weights(model)

    def init_weights(self, model: Any) -> None:
        """Write the weights in place, after everything about them has been checked.

        A problem that can be known beforehand leaves the model as it was. Should a disk fail between check and read,
        ``PartlyInitializedError`` names the models that were written.
        """
        state = _tensors_of(model, self.leaves(model))
        prepared = self._ready[1] if self._ready and self._ready[0] == state else self._check_weights(model)
        done: list[str] = []
        by_code = frozenset(
            identity
            for path, targets in prepared.targets.items()
            for identity in loaded_by_code(prepared.plan.rows_of(path), targets)
        )
        for leaf in prepared.leaves:
            rows = prepared.plan.rows_of(leaf.path)
            try:
                written = apply_rows(
                    rows,
                    self._opened[leaf.path, "model"].reader,
                    prepared.targets[leaf.path],
                    by_code=by_code,
                    device=device_for(leaf.model),
                    may_map=self.config.verify == "none",
                    stopwatch=self.stopwatch,
                )
            except Exception as error:
                raise PartlyInitializedError(
                    f"{self.config.kind}: writing the weights of {leaf.path} failed after verification: {error}. "
                    f"Written before: {', '.join(done) or 'none'}. Build the model anew before trying again",
                    done=done,
                    failed=leaf.path,
                    pending=[other.path for other in prepared.leaves if other.path not in (*done, leaf.path)],
                ) from error
            done.append(leaf.path)
            self.logger.info(
                "%s: %d tensors of %s from %s",
                self.config.kind,
                len(written),
                leaf.path,
                self._opened[leaf.path, "model"].source.path,
            )
        self.last_plan = prepared.plan
        for leaf in prepared.leaves:
            self.last_sources[leaf.path] = self._opened[leaf.path, "model"].source
            self._close(leaf.path, "model")

    def init_optimizer(self, model: Any) -> None:
        """Nothing: this kind brings weights only, unless a subclass says otherwise."""

    def close_files(self) -> None:
        """Close every file and forget what was read from it. What was selected stays selected."""
        for opened in self._opened.values():
            opened.reader.close()
        self._opened.clear()
        self._planned = self._ready = None
        self._checked_values.clear()

    def release(self) -> None:
        """Close every file, and forget what was restored: a later initialization has a report of its own."""
        self.close_files()
        # ids of tensors that may be gone by now
        self.loaded_before = self.will_write = frozenset()
        self.restored.clear()
        self.stopwatch.reset()

    @property
    def continues(self) -> bool:
        """Whether weights come from the very run that is started, which goes on."""
        return False

    def history_of(self, model: str) -> History:
        """Where the values of the weights of a single model came from before, by their names in the file."""
        return {}

    # What follows is shared by the kinds of this package.

    def leaves(self, model: Any) -> tuple[Leaf, ...]:
        """The single models below ``model`` that this initializer is for, in declared order.

        Raises ``ConfigError`` if ``submodel`` names none, or ``model`` is no model.
        """
        check_model(model)
        name, below = str(model.name), self.config.submodel or ""
        path = f"{name}.{below}" if below else name
        chosen = submodel_of(model, tuple(below.split(".")) if below else ())
        found = tuple(_walk(chosen, path, self.file_root(name, below), ()))
        if not found:
            raise ConfigError(f"{path} has no submodel that is a model")
        if self.one_model and len(found) > 1:
            names = ", ".join(leaf.path.removeprefix(f"{name}.") for leaf in found)
            raise ConfigError(
                f"{self.config.kind} brings the weights of one model, and {path} has several: {names}. "
                "Add: submodel: ..."
            )
        # a fallback name that two models would claim tells nothing
        claims = Counter(other for leaf in found for other in leaf.file_names)
        return tuple(
            attrs.evolve(leaf, file_names=(leaf.file_names[0], *(n for n in leaf.file_names[1:] if claims[n] == 1)))
            for leaf in found
        )

    def file_root(self, name: str, below: str) -> str:
        """The name in the files of the submodel ``below`` (empty: the whole) of the model called ``name``."""
        return f"{name}.{below}" if below else name

    def before_locating(self, leaves: Sequence[Leaf]) -> None:
        """Called with all models before the first ``locate`` for one of them."""

    def opened(self, leaf: Leaf, part: Part) -> Checkpoint | None:
        """The reader of ``part`` of ``leaf``, opened at the first call; None where there is no such file."""
        key = (leaf.path, part)
        if key not in self._opened:
            names = leaf.file_names
            with self.stopwatch.phase("find"):
                source = next((found for name in names if (found := self.locate(name, part)) is not None), None)
            if source is None:
                return None
            self._opened[key] = _Opened(
                source,
                open_checkpoint(source.path, digests=source.committed or source.digest, stopwatch=self.stopwatch),
            )
        return self._opened[key].reader

    def planned(self, model: Any) -> LoadPlan:
        """The plan of the weights; the one that was checked or carried out last, where there is one for this model."""
        if self._planned is None or self._planned[0] is not model:
            self._planned = (model, self._prepare(model).plan)
        return self._planned[1]

    def source_of(self, leaf: Leaf, part: Part) -> Source | None:
        """The source behind ``opened``."""
        found = self._opened.get((leaf.path, part))
        return None if found is None else found.source

    def _parts(self, model: Any) -> tuple[tuple[PlanPart, ...], tuple[Leaf, ...], dict[str, ModelTargets]]:
        """The single models with what their files have, and what they have themselves."""
        with self.stopwatch.phase("find"):
            leaves = self.leaves(model)
            self.before_locating(leaves)
        parts = []
        targets = {}
        for leaf in leaves:
            reader = self.opened(leaf, "model")
            if reader is None:
                raise CheckpointNotFoundError(
                    f"{self.config.kind}: there are no weights for {leaf.path}", asked=leaf.path
                )
            source = self._opened[leaf.path, "model"].source
            targets[leaf.path] = found = model_targets(leaf.model)
            sources: dict[str, TensorSpec] = {**reader.tensors(), **dict.fromkeys(reader.extra_state, _EXTRA)}
            # modules may keep their extra state in a tensor
            sources.update((name, _EXTRA) for name in found.extra_state if name in sources)
            before = frozenset(name for name, tensor in found.tensors.items() if id(tensor) in self.loaded_before)
            parts.append(
                PlanPart(
                    leaf.path,
                    source.describe(),
                    (source.path.name,),
                    sources,
                    found.specs,
                    found.hidden,
                    before,
                    frozenset(found.resettable),
                )
            )
        self.after_opening(leaves)
        return tuple(parts), leaves, targets

    def _prepare(self, model: Any) -> _Prepared:
        parts, leaves, targets = self._parts(model)
        hint = self.fresh_hint
        if not hint or self.config.transforms:
            hint = KEEP_MODEL_HINT if self.config.transforms else f"{KEEP_MODEL_HINT} (under transforms:)"
        plan = plan_load(self.config.kind, parts, self.rules, policies=self.policies, fresh_hint=hint)
        self.will_write = frozenset(
            id(targets[row.model].tensors[row.target])
            for row in plan.rows
            if row.writes and row.target is not None and row.target in targets[row.model].tensors
        )
        return _Prepared(plan, leaves, targets)

    def after_opening(self, leaves: Sequence[Leaf]) -> None:
        """Called when the weights of all models are open, before they are planned."""

    def _check_weights(self, model: Any) -> _Prepared:
        prepared = self._prepare(model)
        is_new = self._planned is None or self._planned[0] is not model
        self._planned = (model, prepared.plan)
        prepared.plan.raise_for_problems()
        check_loading_code(prepared.plan, prepared.targets)
        for warning in prepared.plan.warnings if is_new else ():
            self.logger.warning("%s: %s: %s", self.config.kind, warning.model, warning.message)
        for leaf in prepared.leaves:
            rows = prepared.plan.rows_of(leaf.path)
            self._check_memory(leaf, prepared)
            opened = self._opened[leaf.path, "model"]
            reader = opened.reader
            check_versions(leaf.path, rows, reader.versions, prepared.targets[leaf.path])
            on_nonfinite = self.on_nonfinite
            if self.config.verify == "full":
                reader.verify(
                    look=[source for row in rows if row.writes and row.dtype != "object" for source in row.sources]
                    if on_nonfinite != "ignore"
                    else ()
                )
            if (leaf.path, id(reader)) not in self._checked_values:
                with self.stopwatch.phase("verify"):
                    for finding in check_values(prepared.plan, leaf.path, reader, on_nonfinite):
                        self.logger.warning("%s: %s: %s", self.config.kind, leaf.path, finding.message)
                    check_casts(prepared.plan, leaf.path, reader)
                self._checked_values.add((leaf.path, id(reader)))
        with self.stopwatch.phase("verify"):
            readers = {leaf.path: self._opened[leaf.path, "model"].reader for leaf in prepared.leaves}
            check_across(prepared.plan, readers)
        self._ready = _tensors_of(model, prepared.leaves), prepared
        return prepared

    @property
    def on_nonfinite(self) -> OnNonfinite:
        """The policy for NaN and infinities; ``verify: none`` looks at no values, unless the config says it."""
        return self.config.on_nonfinite or ("ignore" if self.config.verify == "none" else "error")

    def _check_memory(self, leaf: Leaf, prepared: _Prepared) -> None:
        """A model on the meta device gets memory, but only for what the file has."""
        targets = prepared.targets[leaf.path]
        without = left_without_memory(leaf.model, prepared.plan.rows_of(leaf.path), targets)
        if without:
            listed = ", ".join(without[:5]) + (f" and {len(without) - 5} more" if without[5:] else "")
            raise PlanError(
                f"{leaf.path} is on the meta device, and {listed} would stay there: the file does not have them, or "
                "they are kept. Next: module.to_empty(device='cpu'), then fill these, or build the module on the CPU",
                plan=prepared.plan,
                problems=[f"{key} is on the meta device" for key in without],
            )
        held = [name for name, tensor in on_meta(targets).items() if has_weak_references(tensor)]
        if held:
            raise PlanError(
                f"{leaf.path} is on the meta device, and {held[0]} cannot be given memory: something holds a weak "
                "reference to it. Next: module.to_empty(device='cpu')",
                plan=prepared.plan,
                problems=[f"{key} is held by a weak reference" for key in held],
            )

    def _close(self, path: str, part: Part) -> None:
        self._ready = None
        opened = self._opened.pop((path, part), None)
        if opened is not None:
            self._checked_values.discard((path, id(opened.reader)))
            opened.reader.close()


def _dotted(*path: str | int) -> str:
    return ".".join(map(str, path))


@attrs.frozen
class _ExtraState:
    shape: tuple[int, ...] = ()
    dtype: str = "object"
    nbytes: int = 0


_EXTRA = _ExtraState()


def _tensors_of(model: Any, leaves: Iterable[Leaf]) -> tuple[Any, ...]:
    """What a plan depends on, on the side of the model: which tensors it has, and what they look like."""
    found: list[Any] = [id(model)]
    for leaf in leaves:
        for named in (leaf.model.named_parameters, leaf.model.named_buffers):
            for name, tensor in named(remove_duplicate=False):
                found.append((leaf.path, name, id(tensor), tensor.shape, tensor.dtype, tensor.device))
    return tuple(found)


def submodel_of(model: Any, names: Sequence[str]) -> Any:
    """The submodel that ``names`` lead to; ``model`` itself for none. Raises ``ConfigError`` with what exists."""
    chosen, path = model, str(model.name)
    for name in names:
        submodels = getattr(chosen, "submodels", None) or {}
        if submodels.get(name) is None:
            there = ", ".join(other for other, submodel in submodels.items() if submodel is not None)
            raise ConfigError(f"{path} has no submodel {name!r}; it has {there or 'none'}")
        chosen, path = submodels[name], f"{path}.{name}"
    return chosen


def _walk(model: Any, path: str, file_name: str, others: tuple[str, ...]) -> Iterator[Leaf]:
    """``others``: names that Noether's writer gives to nested submodels (only the inner composite's own name)."""
    submodels = getattr(model, "submodels", None)
    if isinstance(submodels, Mapping):
        for name, submodel in submodels.items():
            if submodel is not None:
                own = f"{model.name}.{name}"
                yield from _walk(submodel, f"{path}.{name}", f"{file_name}.{name}", (own,))
    else:
        yield Leaf(path, tuple(dict.fromkeys((file_name, *others))), model)
