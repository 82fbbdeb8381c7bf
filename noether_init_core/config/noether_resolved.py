"""Noether's resolved config (``hp_resolved.yaml``): which of its parts ask for an initializer, in Noether's order.

Noether applies ``initializers`` of submodels, then those of the model, weights and optimizer only; then the
initializer of the trainer with all hooks, which a root ``resume_run_id`` replaces.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from noether_init_core.config.document import Document, Entry, KeyPath

__all__ = ["is_resolved", "resolved_entries"]

MODEL_HOOKS = frozenset({"init_weights", "init_optimizer"})
_MARKS = ("model", "trainer", "resume_run_id")
# Keys that only hold submodels and are no names of any.
_STRUCTURAL = frozenset({"submodels", "models"})
_DEFAULT_KIND = "noether.core.initializers.PreviousRunInitializer"
# Field of resume -> where the resolved config has it. The tag stays as it is written: resume understands every form.
_RESUME: Mapping[str, KeyPath] = {
    "run_id": ("resume_run_id",),
    "stage_name": ("resume_stage_name",),
    "checkpoint_tag": ("resume_checkpoint",),
    "model_name": ("model", "name"),
}


def is_resolved(value: Mapping[str, Any]) -> bool:
    """Whether ``value`` is a config of Noether rather than one of ours."""
    return "initializers" not in value and any(mark in value for mark in _MARKS)


def resolved_entries(document: Document) -> Iterator[Entry]:
    """The initializers in the order in which Noether applies them. Raises ``ConfigError`` with the place."""
    root = document.value
    model, trainer = (
        {} if root.get(key) is None else _mapping(root[key], (key,), document) for key in ("model", "trainer")
    )
    yield from _of_model(model, ("model",), (), document)
    if root.get("resume_run_id") is not None:
        # Noether puts this one in the place of trainer.initializer, and writes both into the resolved config.
        said = {key: (model if len(place) > 1 else root).get(str(place[-1])) for key, place in _RESUME.items()}
        config = {"kind": "resume"} | {key: value for key, value in said.items() if value is not None}
        yield Entry(config, place=_RESUME["run_id"], places=_RESUME, document=document)
    elif trainer.get("initializer") is not None:
        place: KeyPath = ("trainer", "initializer")
        # Noether leaves out of the file what was not set, and this is the kind of a config that says none.
        config = {"kind": _DEFAULT_KIND, **_mapping(trainer["initializer"], place, document)}
        yield Entry(config, place=place, document=document)


def _of_model(model: Mapping[str, Any], place: KeyPath, names: tuple[str, ...], document: Document) -> Iterator[Entry]:
    for key, value in model.items():
        if key != "initializers":
            yield from _of_part(value, (*place, key), names if key in _STRUCTURAL else (*names, key), document)
    items = model.get("initializers")
    place = (*place, "initializers")
    if items is not None and not isinstance(items, list):
        raise document.error("must be a list of mappings, each with a kind", place)
    for number, item in enumerate(items or ()):
        here = (*place, number)
        yield Entry(_mapping(item, here, document), names or None, MODEL_HOOKS, here, document=document)


def _of_part(value: Any, place: KeyPath, names: tuple[str, ...], document: Document) -> Iterator[Entry]:
    if isinstance(value, Mapping):
        yield from _of_model(value, place, names, document)
    elif isinstance(value, list):
        for number, item in enumerate(value):
            if isinstance(item, Mapping):
                name = item.get("name")
                inner = (*names, str(number if name is None else name))
                yield from _of_model(item, (*place, number), inner, document)


def _mapping(value: Any, place: KeyPath, document: Document) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise document.error("must be a mapping", place)
    return value
