"""auto_resume: whether a start resumes this run, decided from the sets that it has."""

from __future__ import annotations

from typing import Any

import attrs

from noether_init_core.errors import ConfigError
from noether_init_core.paths import PathProvider
from noether_init_core.sets.selection import newest_set
from noether_init_core.sets.snapshot import Snapshot
from noether_init_core.stack.config_files import Entry, validate_entry

__all__ = ["decided"]


def decided(path_provider: Any, entry: Entry) -> tuple[Entry | None, str]:
    """The entry that resumes this run from its newest set (that is good), or None, and the decision in words.

    What the config says of it is validated at the first start already, when there is nothing to resume.
    """
    if path_provider is None:
        raise ConfigError("auto_resume needs path_provider=PathProvider(output_root, run_id): it resumes this very run")
    paths = PathProvider.of(path_provider)
    if paths.run_id_is_generated:
        raise ConfigError(
            f"auto_resume: the run id {paths.run_id} was generated for this start, so that no later start could find "
            "its checkpoints. Give a fixed run_id"
        )
    config = validate_entry(entry)
    snapshot = Snapshot(paths)
    keywords = {**(getattr(config, "kwargs", None) or {}), "auto_resume": True}
    if getattr(config, "on_invalid", "error") == "previous" and snapshot.is_begun():
        # Which set is good is found out by reading it, when the start iteration is asked for.
        resumed = config.model_copy(update={"kwargs": keywords})
        return attrs.evolve(entry, config=resumed), "auto_resume: resumed from the newest good set"
    model = getattr(config, "model_name", None)
    # a name that no set has is an error of the resume, and no fresh start: it may be misspelt
    newest = newest_set(snapshot, model, asked_by="auto_resume")
    if newest is None and model is not None:
        newest = newest_set(snapshot, asked_by="auto_resume")
    if newest is None:
        return None, f"auto_resume: {paths.run_id} has no checkpoints, the initializers of the config apply"
    resumed = config.model_copy(update={"kwargs": keywords, "checkpoint_tag": newest.name})
    return attrs.evolve(entry, config=resumed), f"auto_resume: resumed from {newest.name}"
