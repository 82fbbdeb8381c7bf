"""Configs of kinds that read files, and their transforms, which become rules of ``surgery``."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args, get_type_hints

import attrs
import pydantic
from pydantic_core import CoreSchema, core_schema

from noether_init_core.config.base import InitializerConfig, KindConfig
from noether_init_core.config.restore import OptimizerRestoreConfig
from noether_init_core.files.content import ITEMSIZES
from noether_init_core.messages import near, yaml_line
from noether_init_core.surgery.name_rules import Rule
from noether_init_core.surgery.patterns import NamePattern, parse_glob, parse_pattern, parse_regex
from noether_init_core.surgery.planner import Policies
from noether_init_core.surgery.steps import STEPS, Step, described, written
from noether_init_core.uris import local_path


class _Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, populate_by_name=True, allow_inf_nan=False)


def _check(parse: Callable[[str], object]) -> pydantic.AfterValidator:
    def check(value: str) -> str:
        parse(value)
        return value

    return pydantic.AfterValidator(check)


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _dtype(value: str) -> str:
    name = value.removeprefix("torch.")
    if name not in ITEMSIZES or name.startswith("bits"):
        raise ValueError(f"{value!r} is not a dtype; write for example float32 or bfloat16")
    return name


#: One name may be written without a list, also by the JSON schema.
_OneOrMore = pydantic.BeforeValidator(_as_list, json_schema_input_type=str | list[str])
Patterns = Annotated[list[Annotated[str, _check(parse_pattern)]], _OneOrMore, pydantic.Field(min_length=1)]
Glob = Annotated[str, _check(parse_glob)]
Globs = Annotated[list[Glob], _OneOrMore, pydantic.Field(min_length=1)]


def _model_of(step: type[Step]) -> type[pydantic.BaseModel]:
    """The pydantic model of the arguments of a step, from the annotations of its fields."""
    fields: dict[str, Any] = {}
    hints = get_type_hints(step, include_extras=True)
    for field in attrs.fields(step):
        annotation, *metadata = get_args(hints[field.name])
        description = next(one for one in metadata if isinstance(one, str))
        checks = [one for one in metadata if not isinstance(one, str)]
        checks += [pydantic.AfterValidator(_dtype)] if field.name == "dtype" else []
        for check in checks:
            annotation = Annotated[annotation, check]
        default = ... if field.default is attrs.NOTHING else field.default
        fields[field.name] = (annotation, pydantic.Field(default=default, description=description))
    return pydantic.create_model(f"{step.__name__}Config", __base__=_Strict, __doc__=_first_line(step), **fields)


def _first_line(of: type) -> str:
    return (of.__doc__ or "").partition("\n")[0]


def _form_of(step: type[Step]) -> Any:
    """The type of the value of a step in a config: its arguments, or the one that may be written without its name."""
    model = _model_of(step)
    if not step.short:
        return model
    alone = model.model_fields[step.short].rebuild_annotation()
    return alone if len(model.model_fields) == 1 else alone | model


def _prepared(value: Any) -> Any:
    if isinstance(value, str):
        if value != "transpose":
            similar = near(value, STEPS, 1)
            if similar:
                raise ValueError(f"{str(value)!r} is not a step; write for example {described(STEPS[similar[0]])}")
            raise ValueError(
                f"{str(value)!r} is not a step; write transpose, or a mapping such as {{split: 0}}: {', '.join(STEPS)}"
            )
        return {"transpose": True}
    if isinstance(value, Mapping) and len(value) != 1:
        raise ValueError(f"one step has one key, this has {len(value)}; begin each step with its own dash")
    if isinstance(value, Mapping) and "transpose" in value:
        raise ValueError("transpose takes no arguments; write: do: [transpose]")
    for name, argument in value.items() if isinstance(value, Mapping) else ():
        if argument is None or isinstance(argument, bool):
            raise ValueError(f"{name} has no value; for example {described(STEPS.get(str(name), STEPS['split']))}")
    return value


def _step_of(model: pydantic.BaseModel) -> Step:
    ((name, value),) = ((name, getattr(model, name)) for name in model.model_fields_set)
    step = type(STEPS[name])
    if isinstance(value, pydantic.BaseModel):
        return step(**{field: getattr(value, field) for field in type(value).model_fields})
    return step(**{step.short: value} if step.short else {})


class _StepSchema:
    """The form of a step in a config: a mapping with one key, or the text ``transpose``; derived from ``STEPS``."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: pydantic.GetCoreSchemaHandler) -> CoreSchema:
        fields: dict[str, Any] = {
            name: (
                Literal[True] if name == "transpose" else _form_of(type(step)),
                pydantic.Field(default=None, description=_first_line(type(step))),
            )
            for name, step in STEPS.items()
        }
        model = pydantic.create_model(
            "StepConfig", __base__=_Strict, __doc__="One step: a mapping with one key, or the text transpose.", **fields
        )
        return core_schema.no_info_after_validator_function(
            _step_of,
            core_schema.no_info_before_validator_function(_prepared, handler(model)),
            serialization=core_schema.plain_serializer_function_ser_schema(written),
        )

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: pydantic.GetJsonSchemaHandler) -> dict[str, Any]:
        mapping = {**handler.resolve_ref_schema(handler(schema)), "minProperties": 1, "maxProperties": 1}
        mapping["properties"] = {
            name: {key: value for key, value in field.items() if key != "default"}
            for name, field in mapping["properties"].items()
            if name != "transpose"
        }
        described = mapping.pop("description", "")
        return {"anyOf": [{"const": "transpose"}, mapping], "description": described}


#: Keys of which a rule has exactly one.
_RULES = ("from", "from_regex", "drop", "keep_model", "only")


class TransformConfig(_Strict):
    """One rule: a move (``from`` or ``from_regex``, with ``to``, ``do``), ``drop``, ``keep_model`` or ``only``."""

    model_config = pydantic.ConfigDict(
        json_schema_extra={
            "oneOf": [{"required": [name], "properties": {name: {"not": {"type": "null"}}}} for name in _RULES]
        }
    )

    from_: Patterns | None = pydantic.Field(
        default=None, alias="from", description="Names in the file: <x> captures within a segment, <x..> segments."
    )
    from_regex: Annotated[str, _check(parse_regex)] | None = pydantic.Field(
        default=None, description="A regular expression (RE2) for whole names in the file; (?P<x>..) captures."
    )
    to: Patterns | None = pydantic.Field(default=None, description="Names in the model; null: the same names.")
    do: list[Annotated[Step, _StepSchema]] = pydantic.Field(default=[], description="Steps on the tensors, in order.")
    optional: bool = pydantic.Field(default=False, description="Whether the rule may match nothing.")
    drop: Globs | None = pydantic.Field(default=None, description="Names of the file to ignore.")
    keep_model: Globs | None = pydantic.Field(
        default=None, description="Names of the model that keep their present value."
    )
    only: Globs | None = pydantic.Field(
        default=None, description="Names of the file to consider; all others are ignored."
    )

    @pydantic.model_validator(mode="before")
    @classmethod
    def _check_form(cls, value: Any) -> Any:
        if not isinstance(value, Mapping | TransformConfig):
            raise ValueError(no_rule(value))
        return value

    @pydantic.model_validator(mode="after")
    def _check_rule(self) -> Self:
        given = [name for name in _RULES if getattr(self, "from_" if name == "from" else name) is not None]
        if len(given) != 1:
            has = " and ".join(given) or "none"
            raise ValueError(f"a rule has exactly one of {', '.join(_RULES)}; this has {has}")
        if given[0] not in ("from", "from_regex"):
            surplus = [name for name in ("do", "optional", "to") if getattr(self, name)]
            if surplus:
                raise ValueError(f"{surplus[0]} is for a rule with from, not with {given[0]}")
            return self
        sources, targets = self._patterns()
        first = sources[0]
        for pattern in (*sources[1:], *targets):
            unknown, lost = sorted(pattern.captures - first.captures), sorted(first.captures - pattern.captures)
            if unknown:
                shown = ", ".join(f"<{name}>" for name in sorted(first.captures)) or "none"
                raise ValueError(f"{pattern.text!r} has <{unknown[0]}>, which {first.text!r} does not capture: {shown}")
            if lost:
                raise ValueError(f"{pattern.text!r} needs <{lost[0]}>, or several names would become one")
            if pattern.below != first.below:
                raise ValueError(f"{first.text!r} and {pattern.text!r}: both or neither need a trailing dot")
        names = {step.name for step in self.do}
        joins, cuts = {"concat", "stack"} & names, sorted({"split", "unstack"} & names)
        if len(sources) > 1 and not joins:
            raise ValueError("several names in from need concat or stack in do")
        if len(targets) > 1 and not cuts:
            raise ValueError("several names in to need split or unstack in do")
        if len(targets) == 1 and cuts and not joins:
            raise ValueError(f"{cuts[0]} needs several names in to")
        if first.below and (len(sources) > 1 or len(targets) > 1):
            raise ValueError("a trailing dot matches many names; several from or to need whole names, such as <leaf>")
        return self

    def _patterns(self) -> tuple[tuple[NamePattern, ...], tuple[NamePattern, ...]]:
        """The patterns for names in the file, and those for names in the model."""
        sources = tuple(map(parse_pattern, self.from_ or ())) or (parse_regex(self.from_regex or ""),)
        return sources, sources[:1] if self.to is None else tuple(map(parse_pattern, self.to))


def rule_keys() -> list[str]:
    """The keys of a rule, as configs write them."""
    return [field.alias or name for name, field in TransformConfig.model_fields.items()]


def no_rule(value: Any) -> str:
    """The message for a value that stands for a rule, or for all rules, and is not a mapping."""
    text = f"{yaml_line(value)} is not a rule, which is a mapping with one of {', '.join(_RULES)}"
    if not isinstance(value, str) or not value:
        return text
    return f"{text}. Next: - {yaml_line({'from': value, 'to': '...'})}, or - {yaml_line({'drop': value})}"


def rule_of(config: TransformConfig, label: str) -> Rule:
    """The rule for ``surgery``; ``label`` is its place, for messages."""
    for field in ("drop", "keep_model", "only"):
        globs = getattr(config, field)
        if globs is not None:
            return Rule(field, tuple(map(parse_glob, globs)), f"{label} ({field} {', '.join(globs)})")
    sources, targets = config._patterns()
    shown = ", ".join(pattern.text for pattern in sources)
    if config.to is not None:
        shown += f" -> {', '.join(config.to)}"
    return Rule("from", sources, f"{label} ({shown})", targets, tuple(config.do), config.optional)


def _local(value: Any) -> Any:
    return local_path(value) if isinstance(value, str | os.PathLike) else value


def _for_all(value: Any) -> Any:
    """A number alone is the share for all parameters."""
    return value if isinstance(value, Mapping) else {"**": value}


LocalPath = Annotated[Path, pydantic.BeforeValidator(_local)]
Share = Annotated[float, pydantic.Field(ge=0, le=1)]


class SourceInitializerConfig(KindConfig):
    """The fields that every kind that reads weights from a file has."""

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
    def nonfinite(self) -> Literal["error", "warn", "ignore"]:
        """What NaN and infinities lead to; with ``verify: none`` values are looked at only if the config says so."""
        return self.on_nonfinite or ("ignore" if self.verify == "none" else "error")


class OptimizerStateConfig(SourceInitializerConfig):
    """The config of kinds that can bring optimizer state besides weights; ``locate`` is then asked for ``optim``."""

    load_optim: bool = pydantic.Field(default=False, description="Whether the state of the optimizer is loaded too.")
    restore: OptimizerRestoreConfig = pydantic.Field(
        default=OptimizerRestoreConfig(), description="What is taken from the checkpoint, and what from the script."
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
        about_state: dict[str, Any] = {"on_missing_state": "error", "on_unexpected_state": None}
        given = [name for name, default in about_state.items() if getattr(self, name) != default]
        if self.restore.optimizer == "skip" and self.load_optim:
            if "load_optim" in self.model_fields_set:
                raise ValueError("load_optim: true, and restore: {optimizer: skip}. Next: leave one of them out")
            object.__setattr__(self, "load_optim", False)  # both say the same, also in a dump
        given += ["restore"] if self.restore.fields else []
        if given and not self.load_optim:
            others = " and ".join(given)
            raise ValueError(
                f"{others}: about optimizer state, which is not loaded. Next: load_optim: true, or remove {others}"
            )
        return self


class CheckpointInitializerConfig(InitializerConfig, OptimizerStateConfig):
    """The config of kinds that read from the checkpoints of a run."""

    load_optim: bool = pydantic.Field(description="Whether the state of the optimizer is loaded too.")
    pop_ckpt_kwargs_keys: list[str] | None = pydantic.Field(
        default=None, description="Keys to drop from the stored model_config when a model is rebuilt from it."
    )
    output_path: LocalPath | None = pydantic.Field(
        default=None, description="Output root of the source run; the current run's when null."
    )
