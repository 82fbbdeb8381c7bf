"""What every kind must do, by the conformance kit of noether-init-core."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from store import Store

from noether_init_core import CheckpointError, CheckpointNotFoundError
from noether_init_core.testing import Case, InitializerConformance, Wrong, closed
from noether_init_signed_store import SignatureError


class TestSignedStore(InitializerConformance):
    """The kind fetches each file from a server that runs in the test."""

    kind = "signed_store"
    distribution = "noether-init-signed-store"
    composites = closed("one file holds one model")
    nested = closed("one file holds one model")

    @pytest.fixture
    def make_config(self, store: Store) -> Callable[[Case], dict[str, Any]]:
        """Publish the file of the case under a name of its own, since a name means one file for ever."""
        names = iter(range(1000))

        def make(case: Case) -> dict[str, Any]:
            name = f"weights-{next(names)}.pt"
            store.put(case.source.file, name)
            config = store.config(name)
            del config["kind"]
            return config

        return make

    @pytest.fixture
    def wrong_configs(self, store: Store, tmp_path: Path) -> list[Wrong]:
        """A name that is not there, a key that signed nothing, a server that is none."""
        torch.save({}, tmp_path / "any.pt")
        store.put(tmp_path / "any.pt", "any.pt")
        config = store.config("any.pt")
        del config["kind"]
        return [
            Wrong("no such file", {**config, "name": "none.pt"}, CheckpointNotFoundError, "none.pt"),
            Wrong("another key", {**config, "public_key": "A" * 43 + "="}, SignatureError, "not signed by"),
            Wrong("no server", {**config, "url": "http://127.0.0.1:9"}, CheckpointError, "cannot be fetched"),
        ]
