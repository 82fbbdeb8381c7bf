"""The base pydantic models for configs of kinds, and the JSON schema of whole config files, for editors."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from typing import Annotated, Any

import attrs
import pydantic

from noether_init_core.errors import ConfigError
from noether_init_core.iteration import TrainingIteration
from noether_init_core.nested import mapped
from noether_init_core.paths import check_model_name, check_name, check_run_id, text_problem

_INTEGER = re.compile(r"[-+]?[0-9]+")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
_WORDS: dict[str, Any] = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}


class YamlText(str):
    """An unquoted scalar of a YAML file, exactly as written.

    Typed fields decide its value (``verify: off`` and ``run_id: 2026_02_19`` are texts). In a field of type Any the
    core schema of YAML 1.2 decides: see ``resolve``.
    """

    def resolve(self) -> Any:
        """The value by the core schema of YAML 1.2: true, false, an integer, a float, else the text."""
        if self in _WORDS:
            return _WORDS[self]
        if _INTEGER.fullmatch(self):
            return int(self)
        if _FLOAT.fullmatch(self):
            return float(self)
        return str(self)


def _types_in(annotation: Any) -> Iterator[Any]:
    yield annotation
    for argument in typing.get_args(annotation):
        yield from _types_in(argument)


def fields_of(value: Any) -> dict[str, Any] | None:
    """The fields of an instance of a dataclass, an attrs class or a pydantic model, with their values as they are.

    None for a ``KindConfig`` and for any other value. Fields that the constructor does not take are left out.
    """
    cls = type(value)
    if isinstance(value, KindConfig):
        return None
    if isinstance(value, pydantic.BaseModel):
        # those that were not set, too: the default of somebody's own class may name the run
        return {name: getattr(value, name) for name in cls.model_fields} | (value.model_extra or {})
    if dataclasses.is_dataclass(cls):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(cls) if field.init}
    if attrs.has(cls):
        return {field.name: getattr(value, field.name) for field in attrs.fields(cls) if field.init}
    return None


def _prepared(value: Any, annotation: Any) -> Any:
    """``value`` for a field: text of a YAML file for a field of type Any, instances in the place of a mapping."""
    types = tuple(_types_in(annotation))
    if any(one is Any for one in types):
        return mapped(value, lambda leaf: leaf.resolve() if isinstance(leaf, YamlText) else leaf)
    models = tuple(one for one in types if isinstance(one, type) and issubclass(one, pydantic.BaseModel))

    def as_mapping(leaf: Any) -> Any:
        fields = None if isinstance(leaf, models) else fields_of(leaf)
        return leaf if fields is None else mapped(fields, as_mapping)

    return mapped(value, as_mapping) if models else value


class KindConfig(pydantic.BaseModel):
    """The base of every config of an initializer: its kind. Unknown keys are errors; instances are frozen."""

    model_config = pydantic.ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), ser_json_inf_nan="constants"
    )

    #: Name of a registered kind; the config class of one kind gives it as the default.
    kind: str

    # A return type would replace the JSON schema of what is dumped.
    @pydantic.model_serializer(mode="wrap")
    def _dump(  # type: ignore[no-untyped-def]
        self, dump: pydantic.SerializerFunctionWrapHandler, info: pydantic.SerializationInfo
    ):
        # What was dumped must validate again, also without defaults; in a list of initializers that takes the kind.
        values = dump(self)
        is_asked = (info.include is None or "kind" in info.include) and "kind" not in (info.exclude or ())
        return {"kind": self.kind, **values} if is_asked else values

    @pydantic.model_validator(mode="before")
    @classmethod
    def _prepare(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        values = {str(key): value for key, value in values.items()}
        for name, field in cls.model_fields.items():
            if name in values:
                values[name] = _prepared(values[name], field.annotation)
        return values


def _named(what: str) -> pydantic.BeforeValidator:
    # before pydantic looks at the type, since the message for a number says more than pydantic's
    return pydantic.BeforeValidator(lambda value: check_name(value, what))


def _check_tag(value: Any) -> Any:
    """A tag is None, a text as in file names, or an iteration with one or all three counts."""
    if value is None:
        return None
    if isinstance(value, TrainingIteration):
        value = value.to_mapping()
    if isinstance(value, Mapping):
        values = {str(key): int(item) if _is_count(item) else item for key, item in value.items()}
        iteration = TrainingIteration.from_mapping(values)
        if not (iteration.is_minimally_specified or iteration.is_fully_specified):
            raise ConfigError(
                f"checkpoint_tag {dict(value)!r} has {len(values)} of epoch, update, sample; "
                "write one of them or all three"
            )
        return iteration.to_mapping()
    if isinstance(value, str):
        return check_name(str(value), "checkpoint_tag")
    if isinstance(value, date):
        raise ConfigError(text_problem(value, "checkpoint_tag"))
    raise ConfigError(
        f"checkpoint_tag must be a text or a mapping of epoch, update, sample, not {value!r}; "
        "for example E4 or {epoch: 4}"
    )


def _is_count(value: Any) -> bool:
    if isinstance(value, str):
        return _INTEGER.fullmatch(value) is not None
    return isinstance(value, float) and value.is_integer()


RunId = Annotated[str, pydantic.BeforeValidator(check_run_id)]
StageName = Annotated[str, _named("stage_name")]
ModelName = Annotated[str, pydantic.BeforeValidator(lambda value: check_model_name(value))]
ModelInfo = Annotated[str, _named("model_info")]
CheckpointTag = Annotated[str | dict[str, int] | None, pydantic.BeforeValidator(_check_tag)]


class InitializerConfig(KindConfig):
    """A config that names a run, with the fields of every initializer of Noether.

    ``kwargs`` are passed to the constructor of the initializer as keyword arguments. A class for another kind than
    ``previous_run``, the default of Noether, gives ``kind`` its own default.
    """

    kind: str = "previous_run"
    kwargs: dict[str, Any] | None = pydantic.Field(
        default=None, description="Additional keyword arguments for the constructor of the initializer."
    )
    run_id: RunId | None = pydantic.Field(default=None, description="The run to read from.")
    stage_name: StageName | None = pydantic.Field(default=None, description="The stage of the run, if it has stages.")
    model_name: ModelName | None = pydantic.Field(
        default=None, description="Name of the model in the files; null: the name of the model to initialize."
    )
    checkpoint_tag: CheckpointTag = pydantic.Field(
        default=None,
        description="latest (also when null), last, best, best.<metric>, E10_U100_S200, E10, or {epoch: 10}.",
    )
    model_info: ModelInfo | None = pydantic.Field(
        default=None, description="Variant of the weights in the file name, such as ema=0.9999."
    )


_DIALECT = "https://json-schema.org/draft/2020-12/schema"
#: Keys that ``auto_resume`` decides: it resumes this run from its newest set.
DECIDED = ("kind", "run_id", "stage_name", "checkpoint_tag", "output_path")


def kind_schema(kind: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of the config of a kind, from that of its class, which may serve several kinds."""
    named = {"const": kind, "description": "Name of a registered kind; ninit kinds lists them.", "type": "string"}
    properties = {**schema["properties"], "kind": named}
    required = ["kind", *(name for name in schema.get("required", ()) if name != "kind")]
    return {**schema, "properties": properties, "required": required}


def schema_of_files(schemas: Mapping[str, Mapping[str, Any]], observers: Sequence[str]) -> dict[str, Any]:
    """One schema for config files as ``InitializerStack.from_file`` reads them.

    Args:
        schemas: Kind -> the schema of its config class.
        observers: Names of installed observers.

    Noether's resolved configs have another form, and no schema. Numbers and booleans are allowed for texts: an editor
    reads ``run_id: 20260219`` as a number, the reader of the file as a text.
    """
    definitions = {kind: _placed(kind_schema(kind, schema), _pointer(kind)) for kind, schema in schemas.items()}
    entry = {
        "type": "object",
        "required": ["kind"],
        "properties": {
            "kind": {"enum": list(schemas), "description": "The kind of initializer; ninit kinds lists them."}
        },
        "allOf": [
            {
                "if": {"properties": {"kind": {"const": kind}}, "required": ["kind"]},
                "then": {"$ref": f"#/$defs/{_pointer(kind)}"},
            }
            for kind in schemas
        ],
    }
    auto_resume: dict[str, Any] = {
        "anyOf": [{"type": "boolean"}],
        "description": "If this run has a committed set, resume from its newest; else the list applies.",
    }
    if "resume" in definitions:
        resume = definitions["resume"]
        fields = {name: field for name, field in resume["properties"].items() if name not in DECIDED}
        auto_resume["anyOf"].append({"type": "object", "properties": fields, "additionalProperties": False})
    return {
        "$schema": _DIALECT,
        "title": "Config of noether-init-core",
        "type": "object",
        "additionalProperties": False,
        "anyOf": [{"required": ["initializers"]}, {"required": ["auto_resume"]}],
        "dependentRequired": {"on_invalid": ["auto_resume"]},
        "properties": {
            "initializers": {
                "type": "array",
                "items": entry,
                "description": "Carried out in this order; [] starts from scratch.",
            },
            "auto_resume": auto_resume,
            "on_invalid": {
                "enum": ["error", "previous"],
                "description": "What auto_resume does if the newest set is broken.",
            },
            "observers": {
                "type": "array",
                "items": {"enum": list(observers)},
                "description": "Observers to switch on; ninit kinds --observers lists them.",
            },
        },
        "$defs": definitions,
    }


def _placed(value: Any, pointer: str) -> Any:
    """A schema moved below ``$defs/pointer`` of another one; any scalar is allowed for a text, as in files.

    References to definitions of a kind lead to those of this kind: two kinds may use one name.
    """
    if isinstance(value, list):
        return [_placed(item, pointer) for item in value]
    if not isinstance(value, Mapping):
        return value
    found = {key: _placed(item, pointer) for key, item in value.items()}
    reference = value.get("$ref")
    if isinstance(reference, str) and reference.startswith("#/"):
        found["$ref"] = f"#/$defs/{pointer}{reference[1:]}"
    if value.get("type") == "string" and not {"const", "enum"} & value.keys():
        found["type"] = ["string", "number", "boolean"]
    return found


def _pointer(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")
