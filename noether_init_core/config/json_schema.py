"""The JSON schema of a whole config file, for editors: every installed kind, chosen by the key ``kind``. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_DIALECT = "https://json-schema.org/draft/2020-12/schema"
#: What ``auto_resume`` decides by itself: this very run, and its newest set.
DECIDED = ("kind", "run_id", "stage_name", "checkpoint_tag", "output_path")


def kind_schema(kind: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of the config of a kind; ``schema`` is that of its class, which may have several kinds."""
    properties = {**schema["properties"], "kind": {**schema["properties"]["kind"], "const": kind}}
    required = ["kind", *(name for name in schema.get("required", ()) if name != "kind")]
    return {**schema, "properties": properties, "required": required}


def schema_of_files(schemas: Mapping[str, Mapping[str, Any]], observers: Sequence[str]) -> dict[str, Any]:
    """One schema for config files as ``InitializerStack.from_file`` reads them.

    Args:
        schemas: Kind -> the schema of its config class.
        observers: Names of installed observers.

    Noether's own resolved configs have another form, and no schema here. Numbers and booleans pass for texts: what an
    editor takes ``run_id: 20260219`` for is a text to the file's reader.
    """
    definitions = {kind: _placed(kind_schema(kind, schema), _pointer(kind)) for kind, schema in schemas.items()}
    entry = {
        "type": "object",
        "required": ["kind"],
        "properties": {"kind": {"enum": list(schemas), "description": "What initializes; see: noether-init kinds."}},
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
        "title": "Config of noether-init",
        "type": "object",
        "additionalProperties": False,
        "anyOf": [{"required": ["initializers"]}, {"required": ["auto_resume"]}],
        "dependentRequired": {"on_invalid": ["auto_resume"]},
        "properties": {
            "initializers": {
                "type": "array",
                "items": entry,
                "description": "Carried out in this order; [] starts from nothing.",
            },
            "auto_resume": auto_resume,
            "on_invalid": {
                "enum": ["error", "previous"],
                "description": "What auto_resume does if the newest set is broken.",
            },
            "observers": {
                "type": "array",
                "items": {"enum": list(observers)},
                "description": "Installed observers to switch on; see: noether-init kinds --observers.",
            },
        },
        "$defs": definitions,
    }


def _placed(value: Any, pointer: str) -> Any:
    """A schema below ``$defs/pointer`` of another one, as files are written: any scalar passes for a free text.

    References to definitions of a kind lead into those of this kind: two kinds may use one name.
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
