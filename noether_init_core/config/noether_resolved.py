"""Noether's resolved config (``hp_resolved.yaml``): which of its parts ask for an initializer, in Noether's order.

Noether applies ``initializers`` of submodels, then those of the model, weights and optimizer only; then the
initializer of the trainer with all hooks, which a root ``resume_run_id`` replaces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import attrs

from noether_init_core.config.yaml_text import KeyPath

__all__ = ["ResolvedEntry", "is_resolved", "resolved_entries"]

MODEL_HOOKS = frozenset({"init_weights", "init_optimizer"})
_MARKS = ("model", "trainer", "resume_run_id")
# Keys that only hold submodels and are no names of any.
_STRUCTURAL = frozenset({"submodels", "models"})

_DEFAULT_KIND = "noether.core.initializers.PreviousRunInitializer"

_Refuse = Callable[[str, KeyPath], Exception]


@attrs.frozen(eq=False)
class ResolvedEntry:
    """One initializer; the fields are those of ``config.files.Entry``."""

    config: Mapping[str, Any]
    submodel: tuple[str, ...] | None
    hooks: frozenset[str] | None
    place: KeyPath
    places: Mapping[str, KeyPath] = attrs.field(factory=dict)


def is_resolved(document: Mapping[str, Any]) -> bool:
    """Whether ``document`` is a config of Noether rather than one of ours."""
    return "initializers" not in document and any(mark in document for mark in _MARKS)


def resolved_entries(document: Mapping[str, Any], refuse: _Refuse) -> Iterator[ResolvedEntry]:
    """The initializers in the order in which Noether applies them; ``refuse(message, place)`` makes an error."""
    model = _mapping(document.get("model"), ("model",), refuse)
    trainer = _mapping(document.get("trainer"), ("trainer",), refuse)
    yield from _of_model(model, ("model",), (), refuse)
    run_id = document.get("resume_run_id")
    if run_id is not None:
        # Noether puts this one in the place of trainer.initializer, and writes both into the resolved config.
        yield _resume(document, model)
    elif trainer.get("initializer") is not None:
        place: KeyPath = ("trainer", "initializer")
        # Noether leaves out of the file what was not set, and this is the kind of a config that says none.
        config = {"kind": _DEFAULT_KIND, **_mapping(trainer["initializer"], place, refuse)}
        yield ResolvedEntry(config, None, None, place)


def _of_model(
    model: Mapping[str, Any], place: KeyPath, names: tuple[str, ...], refuse: _Refuse
) -> Iterator[ResolvedEntry]:
    for key, value in model.items():
        if key != "initializers":
            yield from _of_part(value, (*place, key), names if key in _STRUCTURAL else (*names, key), refuse)
    items = model.get("initializers")
    if items is None:
        return
    place = (*place, "initializers")
    if not isinstance(items, list):
        raise refuse("must be a list of mappings, each with a kind", place)
    for number, item in enumerate(items):
        here = (*place, number)
        yield ResolvedEntry(_mapping(item, here, refuse, optional=False), names or None, MODEL_HOOKS, here)


def _of_part(value: Any, place: KeyPath, names: tuple[str, ...], refuse: _Refuse) -> Iterator[ResolvedEntry]:
    if isinstance(value, Mapping):
        yield from _of_model(value, place, names, refuse)
    elif isinstance(value, list):
        for number, item in enumerate(value):
            if isinstance(item, Mapping):
                name = item.get("name")
                yield from _of_model(item, (*place, number), (*names, str(number if name is None else name)), refuse)


def _resume(document: Mapping[str, Any], model: Mapping[str, Any]) -> ResolvedEntry:
    sources: dict[str, KeyPath] = {
        "run_id": ("resume_run_id",),
        "stage_name": ("resume_stage_name",),
        "checkpoint_tag": ("resume_checkpoint",),
        "model_name": ("model", "name"),
    }
    values = {
        "run_id": document.get("resume_run_id"),
        "stage_name": document.get("resume_stage_name"),
        # As it is written: resume understands E10, E10_U100_S200, latest, best.<metric> and any other tag.
        "checkpoint_tag": document.get("resume_checkpoint"),
        "model_name": model.get("name"),
    }
    config = {"kind": "resume"} | {key: value for key, value in values.items() if value is not None}
    return ResolvedEntry(config, None, None, ("resume_run_id",), sources)


def _mapping(value: Any, place: KeyPath, refuse: _Refuse, *, optional: bool = True) -> Mapping[str, Any]:
    if value is None and optional:
        return {}
    if not isinstance(value, Mapping):
        raise refuse("must be a mapping", place)
    return value
