"""What pydantic says about the config of a kind, in words that name the next step."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from noether_init_core import kinds
from noether_init_core.errors import KindError
from noether_init_core.messages import near

__all__ = ["explain"]

_OURS = "noether-init-core"


def explain(kind: str, problem: str, message: str, path: Sequence[str | int], value: Any) -> str:
    """The message for what is wrong with ``value`` at ``path`` in a config of ``kind``.

    ``problem`` and ``message`` are pydantic's. A message that a nested config has explained already stays as it is.
    """
    fields = kinds.resolve(kind).config_class.model_fields if len(path) == 1 else {}
    if (problem, message) == ("extra_forbidden", "Extra inputs are not permitted"):
        known = fields or (_rule_keys() if path and path[0] == "transforms" else ())
        similar = near(str(path[-1]), known, 1) if path else []
        hint = "".join(f" Near: {one}." for one in similar)
        owners = _owners(str(path[0]), kind) if fields else []
        if owners:
            hint += f" {path[0]} belongs to {' and to '.join(owners)}."
        elif fields and not similar:
            hint = f" {kind} has: {', '.join(fields)}."
        return f"unknown key.{hint} Next: noether-init schema {kind}"
    if (problem, message) == ("missing", "Field required"):
        description = fields[str(path[0])].description if path and path[0] in fields else None
        return f"is missing{': ' + description if description else ''}"
    if (problem, message) == ("list_type", "Input should be a valid list") and isinstance(value, str | int | float):
        return f"{message}: [{value}]"
    return message.removeprefix("Value error, ").removeprefix("Assertion failed, ")


def _owners(key: str, kind: str) -> list[str]:
    """Where a key can be written that ``kind`` has not: other kinds of this distribution, and ``auto_resume``.

    Other distributions are not imported for a hint.
    """
    names = {info.name for info in kinds.installed() if info.distribution == _OURS and info.blocked_by is None}
    # Noether's names for the same kinds hold dots
    found = sorted(name for name in names - {kind} if "." not in name and key in _fields(name))
    if key == "on_invalid":
        return [*(f"the kind {name}" for name in found), "the top of a config file, beside auto_resume"]
    return [f"the kind{'s' if found[1:] else ''} {', '.join(found)}"] if found else []


def _rule_keys() -> list[str]:
    """Keys of rules and steps of ``transforms``."""
    from noether_init_core.config.transforms import TransformConfig
    from noether_init_core.surgery.steps import STEPS

    return [*(field.alias or name for name, field in TransformConfig.model_fields.items()), *STEPS]


def _fields(kind: str) -> Collection[str]:
    try:
        return kinds.resolve(kind).config_class.model_fields
    except KindError:  # advice only
        return ()
