"""``AnyInitializer``, the type of a config field for every registered kind."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import pydantic
from pydantic_core import CoreSchema, InitErrorDetails, ValidationError, core_schema

from noether_init_core import kinds
from noether_init_core.config.base import KindConfig, kind_schema
from noether_init_core.config.plain import Place, plain
from noether_init_core.errors import ConfigError, KindError

# True while the JSON schema of the kinds is being built: the config of a kind may itself have such a field.
_inside_schema: ContextVar[bool] = ContextVar("_inside_schema", default=False)


class _OpenKind:
    """Replaces the schema of ``KindConfig`` by one that looks kinds up at validation time, not at import time."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: pydantic.GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.with_info_plain_validator_function(
            _validate,
            # The fields of the kind's own config class are written, not only those of KindConfig.
            serialization=core_schema.wrap_serializer_function_ser_schema(
                lambda value, serialize: serialize(value), schema=core_schema.any_schema()
            ),
        )

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: pydantic.GetJsonSchemaHandler) -> dict[str, Any]:
        configs = _config_classes()
        if not configs or _inside_schema.get():
            kind = {"enum": list(configs)} if configs else {"type": "string"}
            return {"type": "object", "properties": {"kind": kind}, "required": ["kind"]}
        token = _inside_schema.set(True)
        try:
            return {"oneOf": [_kind_schema(name, config_class, handler) for name, config_class in configs.items()]}
        finally:
            _inside_schema.reset(token)


if TYPE_CHECKING:
    AnyInitializer: TypeAlias = Annotated[KindConfig, _OpenKind]
else:
    # jsonargparse takes the type apart without pydantic: from KindConfig it would make a parser for kind alone. As a
    # dict it keeps every key, also of --init.kind and of dumps. Not dict[str, Any], whose texts it reads as YAML again.
    AnyInitializer = Annotated[dict, _OpenKind]
"""The config of any registered kind, for a field of your own config: ``initializers: list[AnyInitializer] = []``.

A mapping is validated by the config class of its ``kind``, and only that kind's plugin is imported; an instance of
``KindConfig`` passes as it is. Errors keep their place in the whole config. What was dumped validates to the same
config again. The JSON schema is built from the kinds that are installed when it is asked for, which imports them.

jsonargparse and LightningCLI hand over mappings that are not validated yet; ``InitializerStack.from_config`` takes
them.
"""


def _validate(value: Any, info: core_schema.ValidationInfo) -> KindConfig:
    if isinstance(value, KindConfig):
        return value
    try:
        config = plain(value, error=lambda message, place: _refusal(ConfigError(message), place, None))
        return kinds.validate(config if isinstance(config, Mapping) else value, context=info.context)
    except ConfigError as error:
        raise _refusal(error, ("kind",) if isinstance(value, Mapping) else (), value) from error


def _refusal(error: ConfigError, place: Place, value: Any) -> ValidationError:
    details = InitErrorDetails(type="value_error", loc=place, input=value, ctx={"error": error})
    return ValidationError.from_exception_data("AnyInitializer", [details])


def _config_classes() -> dict[str, type[KindConfig]]:
    """Name -> config class of every kind that can be used; a broken plugin is left out."""
    classes = {}
    for name in sorted({info.name for info in kinds.installed() if info.blocked_by is None}):
        try:
            classes[name] = kinds.resolve(name).config_class
        except KindError:
            continue
    return classes


def _kind_schema(name: str, config_class: type[KindConfig], handler: pydantic.GetJsonSchemaHandler) -> dict[str, Any]:
    try:
        schema = handler.resolve_ref_schema(handler(config_class.__pydantic_core_schema__))
    except pydantic.errors.PydanticInvalidForJsonSchema:  # a field for Python only, such as a callable
        schema = {"type": "object", "properties": {"kind": {"type": "string"}}}
    return {**kind_schema(name, schema), "title": name}
