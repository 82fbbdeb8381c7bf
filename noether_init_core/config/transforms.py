"""How configs write transforms: the rules of key surgery, validated, and turned into those of ``surgery``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, Self

import pydantic
from pydantic_core import CoreSchema

from noether_init_core.files.tensor_info import ITEMSIZES
from noether_init_core.surgery.patterns import NamePattern, parse_glob, parse_pattern, parse_regex
from noether_init_core.surgery.steps import (
    Cast,
    Concat,
    Interpolate,
    Pad,
    Reshape,
    Slice,
    Split,
    Stack,
    Step,
    Transpose,
    Unstack,
)
from noether_init_core.surgery.transforms import Drop, KeepModel, Move, Only, Rule

__all__ = ["StepConfig", "TransformConfig", "rule_of"]


class _Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


def _check(parse: Callable[[str], object]) -> pydantic.AfterValidator:
    def check(value: str) -> str:
        parse(value)
        return value

    return pydantic.AfterValidator(check)


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _dtype(value: str) -> str:
    name = value.removeprefix("torch.")
    if name not in ITEMSIZES or name.startswith("bits"):
        raise ValueError(f"{value!r} is no dtype; for example float32, bfloat16")
    return name


Pattern = Annotated[str, _check(parse_pattern)]
#: One name may be written without a list; the JSON schema knows it, too.
_OneOrMore = pydantic.BeforeValidator(_listed, json_schema_input_type=str | list[str])
Patterns = Annotated[list[Pattern], _OneOrMore, pydantic.Field(min_length=1)]
Globs = Annotated[list[Annotated[str, _check(parse_glob)]], _OneOrMore, pydantic.Field(min_length=1)]
Count = Annotated[int, pydantic.Field(ge=0)]
Positive = Annotated[int, pydantic.Field(ge=1)]
Grid = tuple[Positive, Positive]


_EXAMPLES = {
    "split": "split: 0",
    "concat": "concat: 0",
    "stack": "stack: 0",
    "unstack": "unstack: 0",
    "reshape": "reshape: [8, -1]",
    "slice": "slice: {dim: 0, stop: 4}",
    "pad": "pad: {size: 8}",
    "interpolate": "interpolate: {grid: [14, 14], to_grid: [16, 16]}",
    "cast": "cast: float32",
}


class SplitConfig(_Strict):
    """``split`` into given sizes."""

    dim: int = pydantic.Field(default=0, description="The dimension that is cut.")
    sizes: list[Positive] = pydantic.Field(min_length=1, description="The size of each part, in order.")


class SliceConfig(_Strict):
    """``slice``: from ``start`` to before ``stop``."""

    dim: int = pydantic.Field(default=0, description="The dimension that is cut.")
    start: Count = pydantic.Field(default=0, description="The first index that is taken, from 0.")
    stop: Positive | None = pydantic.Field(default=None, description="The first index that is not; null: to the end.")


class PadConfig(_Strict):
    """``pad`` at the end, to ``size``; without ``value`` the model's own elements stay there."""

    size: Positive = pydantic.Field(description="The size afterwards.")
    dim: int = pydantic.Field(default=0, description="The dimension that grows.")
    value: pydantic.FiniteFloat | None = pydantic.Field(
        default=None, description="What stands at the end; null: the model's own elements."
    )


class InterpolateConfig(_Strict):
    """``interpolate`` a position embedding from ``grid`` to ``to_grid`` (rows, columns)."""

    grid: Grid = pydantic.Field(description="Rows and columns in the file.")
    to_grid: Grid = pydantic.Field(description="Rows and columns in the model.")
    prefix_tokens: Count = pydantic.Field(default=0, description="Leading entries that belong to no place in the grid.")
    mode: Literal["bicubic", "bilinear"] = pydantic.Field(default="bicubic", description="How values in between come.")


def _said(field: dict[str, Any]) -> dict[str, Any]:
    """The schema of a step that is written: null means that it is not."""
    kept = {key: value for key, value in field.items() if key != "default"}
    return {**kept, "anyOf": [one for one in field["anyOf"] if one != {"type": "null"}]}


class StepConfig(_Strict):
    """One step of ``do``: a mapping with one key, or the text ``transpose``."""

    transpose: Literal[True] | None = pydantic.Field(default=None, description="Exchange the two dimensions.")
    split: int | SplitConfig | None = pydantic.Field(
        default=None, description="Cut along this dimension into equal parts, one for each name in to; or given sizes."
    )
    concat: int | None = pydantic.Field(default=None, description="Put together along this dimension.")
    stack: int | None = pydantic.Field(default=None, description="Put together along a new dimension, this one.")
    unstack: int | None = pydantic.Field(default=None, description="Take apart along this dimension, which goes.")
    reshape: Annotated[list[Annotated[int, pydantic.Field(ge=-1)]], pydantic.Field(min_length=1)] | None = (
        pydantic.Field(default=None, description="The shape afterwards; -1 once, for what is left.")
    )
    slice: SliceConfig | None = pydantic.Field(default=None, description="A part along one dimension.")
    pad: PadConfig | None = pydantic.Field(default=None, description="Make one dimension longer.")
    interpolate: InterpolateConfig | None = pydantic.Field(
        default=None, description="A position embedding for another grid."
    )
    cast: Annotated[str, pydantic.AfterValidator(_dtype)] | None = pydantic.Field(
        default=None, description="The dtype afterwards, such as float32."
    )

    @pydantic.model_validator(mode="before")
    @classmethod
    def _prepare(cls, value: Any) -> Any:
        if isinstance(value, str):
            if value != "transpose":
                known = ", ".join(cls.model_fields)
                raise ValueError(f"{str(value)!r} is no step; write transpose, or {{split: 0}} and the like: {known}")
            return {"transpose": True}
        if isinstance(value, Mapping) and len(value) != 1:
            raise ValueError(f"one step has one key, this has {len(value)}; begin each step with a dash of its own")
        if isinstance(value, Mapping) and "transpose" in value:
            raise ValueError("transpose takes no arguments; write: do: [transpose]")
        for name, said in value.items() if isinstance(value, Mapping) else ():
            if said is None or isinstance(said, bool):
                raise ValueError(f"{name} has no value; for example {_EXAMPLES.get(str(name), 'split: 0')}")
        return value

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: pydantic.GetJsonSchemaHandler
    ) -> dict[str, Any]:
        """As a config writes it: ``transpose``, or a mapping with one key."""
        schema = handler.resolve_ref_schema(handler(core_schema))
        properties = {name: _said(field) for name, field in schema["properties"].items() if name != "transpose"}
        mapping = {**schema, "properties": properties, "minProperties": 1, "maxProperties": 1}
        described = mapping.pop("description", "")
        return {"anyOf": [{"const": "transpose"}, mapping], "description": described}

    @pydantic.model_serializer(mode="wrap")
    def _dumped(self, serialize: pydantic.SerializerFunctionWrapHandler) -> Any:
        """As a config writes it: the one key that was said."""
        if self.transpose:
            return "transpose"
        return {key: value for key, value in serialize(self).items() if value is not None}

    def step(self) -> Step:
        """The step as ``surgery`` has it."""
        if self.split is not None:
            return Split(self.split) if isinstance(self.split, int) else Split(self.split.dim, tuple(self.split.sizes))
        if self.concat is not None:
            return Concat(self.concat)
        if self.stack is not None:
            return Stack(self.stack)
        if self.unstack is not None:
            return Unstack(self.unstack)
        if self.reshape is not None:
            return Reshape(tuple(self.reshape))
        if self.slice is not None:
            return Slice(self.slice.dim, self.slice.start, self.slice.stop)
        if self.pad is not None:
            return Pad(self.pad.size, self.pad.dim, self.pad.value)
        if self.interpolate is not None:
            given = self.interpolate
            return Interpolate(given.grid, given.to_grid, given.prefix_tokens, given.mode)
        if self.cast is not None:
            return Cast(self.cast)
        if self.transpose:
            return Transpose()
        raise ValueError("a step that says nothing")


#: What a rule is; it has exactly one of them.
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
    to: Patterns | None = pydantic.Field(default=None, description="Names in the model; the same name when null.")
    do: list[StepConfig] = pydantic.Field(default=[], description="Steps on the way, in order.")
    optional: bool = pydantic.Field(default=False, description="Whether the rule may match nothing.")
    drop: Globs | None = pydantic.Field(default=None, description="Names of the file to ignore.")
    keep_model: Globs | None = pydantic.Field(
        default=None, description="Names of the model that keep their present value."
    )
    only: Globs | None = pydantic.Field(default=None, description="The names of the file that are considered at all.")

    @pydantic.model_validator(mode="after")
    def _check_rule(self) -> Self:
        said = [
            name
            for name, value in (
                ("from", self.from_),
                ("from_regex", self.from_regex),
                ("drop", self.drop),
                ("keep_model", self.keep_model),
                ("only", self.only),
            )
            if value is not None
        ]
        if len(said) != 1:
            has = " and ".join(said) or "none"
            raise ValueError(f"a rule has exactly one of {', '.join(_RULES)}; this has {has}")
        if said[0] not in ("from", "from_regex"):
            surplus = [name for name in ("do", "optional", "to") if getattr(self, name)]
            if surplus:
                raise ValueError(f"{surplus[0]} belongs to a rule with from; {said[0]} takes none")
            return self
        sources, targets = self._patterns()
        captures = sources[0].captures
        for pattern in (*sources[1:], *(targets if self.to is not None else ())):
            unknown, lost = sorted(pattern.captures - captures), sorted(captures - pattern.captures)
            if unknown:
                shown = ", ".join(f"<{name}>" for name in sorted(captures)) or "none"
                raise ValueError(
                    f"{pattern.text!r} has <{unknown[0]}>, which {sources[0].text!r} does not capture: {shown}"
                )
            if lost:
                raise ValueError(f"{pattern.text!r} lacks <{lost[0]}>, so several names would become one")
            if pattern.below != sources[0].below:
                raise ValueError(
                    f"{sources[0].text!r} and {pattern.text!r}: a trailing dot stands on both or on neither"
                )
        names = [step for config in self.do for step in config.model_fields_set]
        if len(sources) > 1 and not {"concat", "stack"} & set(names):
            raise ValueError("several names in from need concat or stack in do")
        if len(targets) > 1 and not {"split", "unstack"} & set(names):
            raise ValueError("several names in to need split or unstack in do")
        cuts = sorted({"split", "unstack"} & set(names))
        if len(targets) == 1 and cuts and not {"concat", "stack"} & set(names):
            raise ValueError(f"{cuts[0]} needs several names in to")
        if sources[0].below and (len(sources) > 1 or len(targets) > 1):
            raise ValueError(
                "a trailing dot stands for many names; several from or to need whole names, such as <leaf>"
            )
        return self

    def _patterns(self) -> tuple[tuple[NamePattern, ...], tuple[NamePattern, ...]]:
        if self.from_regex is not None:
            sources: tuple[NamePattern, ...] = (parse_regex(self.from_regex),)
        else:
            sources = tuple(parse_pattern(text) for text in self.from_ or ())
        targets = sources[:1] if self.to is None else tuple(parse_pattern(text) for text in self.to)
        return sources, targets


def rule_of(config: TransformConfig, label: str) -> Rule:
    """The rule as ``surgery`` has it; ``label`` says where it stands."""
    if config.drop is not None:
        return Drop(tuple(map(parse_glob, config.drop)), f"{label} (drop {', '.join(config.drop)})")
    if config.keep_model is not None:
        return KeepModel(
            tuple(map(parse_glob, config.keep_model)), f"{label} (keep_model {', '.join(config.keep_model)})"
        )
    if config.only is not None:
        return Only(tuple(map(parse_glob, config.only)), f"{label} (only {', '.join(config.only)})")
    sources, targets = config._patterns()
    shown = ", ".join(pattern.text for pattern in sources)
    if config.to is not None:
        shown += f" -> {', '.join(config.to)}"
    return Move(sources, targets, tuple(step.step() for step in config.do), config.optional, f"{label} ({shown})")
