"""Which versions of modules go with the entries that modules with loading code of their own are given.

Such a module translates what an older version of it has saved, and tells it by the ``_metadata`` of the state dict.
With surgery on names, what the file says of a module follows the module's entries: they are in the form of the module
that saved them, wherever they go.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from noether_init_core.applying.targets import ModelTargets, OwnLoading
from noether_init_core.errors import PlanError
from noether_init_core.surgery.plan import PlanRow

__all__ = ["Versions", "check_versions", "metadata_below"]

Versions = Mapping[str, Mapping[str, Any]]


def metadata_below(own: OwnLoading, rows: Iterable[PlanRow], versions: Versions) -> dict[str, dict[str, Any]]:
    """The ``_metadata`` for the state dict of one module: path from that module on -> such as ``{"version": 2}``.

    A module whose entries all come from one module of the file has what the file says of that one. One of which nothing
    is loaded has its own version, since its entries are those that it has. Where the file says nothing of a module,
    nothing is said, as in torch.
    """
    found = {}
    for path, module, sources in _sources(own, rows):
        if sources is None:
            found[path] = {"version": getattr(module, "_version", None)}
            continue
        said = [versions[source] for source in sources if source in versions]
        if said and all(other == said[0] for other in said):
            found[path] = dict(said[0])
    return found


def check_versions(model: str, rows: Iterable[PlanRow], versions: Versions, targets: ModelTargets) -> None:
    """Raise ``PlanError`` for a module that gets entries of several modules of the file, of different versions.

    Its loading code can be told one version only, and would translate some of them wrongly.
    """
    rows = tuple(rows)
    for own in targets.own_loading:
        for path, module, sources in _sources(own, rows):
            said = {source: versions[source] for source in sources or () if source in versions}
            if all(other == next(iter(said.values())) for other in said.values()) or not _looks_at_versions(module):
                continue
            name = f"{own.prefix}{path}".removesuffix(".") or "the whole model"
            listed = ", ".join(f"{source or 'its root'} {dict(version)}" for source, version in said.items())
            message = (
                f"{name} has loading code of its own, and gets entries of modules of the file that are of different "
                f"versions: {listed}. It cannot translate both"
            )
            raise PlanError(
                f"{model}: {message}. Nothing was changed. Next: keep its own values there (keep_model), or load the "
                "file into the model that saved it and save that anew",
                problems=(message,),
            )


def _looks_at_versions(module: torch.nn.Module) -> bool:
    return bool(module._load_state_dict_pre_hooks) or (
        type(module)._load_from_state_dict is not torch.nn.Module._load_from_state_dict
    )


def _sources(own: OwnLoading, rows: Iterable[PlanRow]) -> Iterable[tuple[str, torch.nn.Module, tuple[str, ...] | None]]:
    """Each module: its path from ``own`` on, the module, and the modules of the file that its entries come from.

    None where no entry comes from the file, or it has none.
    """
    modules = dict(own.module.named_modules(remove_duplicate=False))
    same: dict[str, dict[str, None]] = {path: {} for path in modules}
    renamed: dict[str, dict[str, None]] = {path: {} for path in modules}
    for row in rows:
        if row.target is None or not row.writes or not row.target.startswith(own.prefix):
            continue
        segments = row.target.removeprefix(own.prefix).split(".")
        for above in range(len(segments)):
            path, below = ".".join(segments[:above]), segments[above:]
            if path not in modules:
                continue
            for source in row.sources:
                names = source.split(".")
                if len(names) >= len(below):
                    is_same = names[len(names) - len(below) :] == below
                    chosen = same if is_same else renamed
                    chosen[path][".".join(names[: len(names) - len(below)])] = None
    for path, module in modules.items():
        # an entry that was renamed inside the module tells less surely which module it was in
        yield path, module, tuple(same[path] or renamed[path]) or None
