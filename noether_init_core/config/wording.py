"""What pydantic says about the config of a kind, in words that name the next step."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from noether_init_core import kinds

__all__ = ["explain"]


def explain(kind: str, problem: str, message: str, path: Sequence[str | int], value: Any) -> str:
    """The message for what is wrong with ``value`` at ``path`` in a config of ``kind``.

    ``problem`` and ``message`` are pydantic's. A message that a nested config has explained already stays as it is.
    """
    fields = kinds.resolve(kind).config_class.model_fields if len(path) == 1 else {}
    if (problem, message) == ("extra_forbidden", "Extra inputs are not permitted"):
        near = difflib.get_close_matches(str(path[-1]), fields, n=1) if path else []
        hint = f" Near: {near[0]}." if near else ""
        has = f" {kind} has: {', '.join(fields)}." if fields else ""
        return f"unknown key.{hint}{has} Next: noether-init schema {kind}"
    if (problem, message) == ("missing", "Field required"):
        description = fields[str(path[0])].description if path and path[0] in fields else None
        return f"is missing{': ' + description if description else ''}"
    if (problem, message) == ("list_type", "Input should be a valid list") and isinstance(value, str | int | float):
        return f"{message}: [{value}]"
    return message.removeprefix("Value error, ").removeprefix("Assertion failed, ")
