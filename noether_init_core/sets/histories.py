"""What a set says of where its weights came from, kept beside it by the writer."""

from __future__ import annotations

import json
import logging

import xxhash

from noether_init_core.files.storage.disk import LOCAL, Storage
from noether_init_core.sets.checkpoint_set import CheckpointSet
from noether_init_core.sets.manifest import MAX_PROVENANCE_BYTES, PROVENANCE_NAME
from noether_init_core.sets.provenance import History, histories

__all__ = ["read_histories"]

logger = logging.getLogger(__name__)


def read_histories(found: CheckpointSet, storage: Storage = LOCAL) -> dict[str, History]:
    """Path of a single model -> name -> where its values came from; nothing where the set keeps no record.

    A record that is damaged or gone is no reason not to load: weights are verified by themselves. The log says it.
    """
    expected = None if found.manifest is None else found.manifest.provenance
    if expected is None:
        return {}
    path = found.folder / PROVENANCE_NAME
    try:
        content = storage.read_bytes(path, MAX_PROVENANCE_BYTES)
        if f"xxh3_128:{xxhash.xxh3_128_hexdigest(content)}" != expected:
            raise ValueError("its digest is not the one in the manifest")
        return histories(json.loads(content))
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        logger.warning("%s tells nothing of where the weights came from: %s", path, error)
        return {}
