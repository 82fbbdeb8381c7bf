"""What a set says of where its weights came from, kept beside it by the writer."""

from __future__ import annotations

import json
import logging

from noether_init_core.errors import CheckpointCorruptError
from noether_init_core.sets.checkpoint_set import CheckpointSet
from noether_init_core.sets.manifest import MAX_PROVENANCE_BYTES, PROVENANCE_NAME, digest_of
from noether_init_core.sets.provenance import History, histories

__all__ = ["load_histories", "read_histories"]

logger = logging.getLogger(__name__)


def load_histories(found: CheckpointSet) -> dict[str, History]:
    """Path of a single model -> name -> where its values came from; nothing where the set keeps no record.

    Raises ``CheckpointCorruptError`` for a record that is gone, damaged, or none.
    """
    expected = None if found.manifest is None else found.manifest.provenance
    if expected is None:
        return {}
    path = found.folder / PROVENANCE_NAME
    try:
        content = found.storage.read_bytes(path, MAX_PROVENANCE_BYTES)
        if digest_of(content) != expected:
            raise ValueError("its digest is not the one in the manifest")
        return histories(json.loads(content))
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise CheckpointCorruptError(
            f"{path} tells nothing of where the weights came from: {error}", path=path
        ) from error


def read_histories(found: CheckpointSet) -> dict[str, History]:
    """The same; a record that cannot be read is logged, and no reason not to load: weights are verified themselves."""
    try:
        return load_histories(found)
    except CheckpointCorruptError as error:
        logger.warning("%s", error)
        return {}
