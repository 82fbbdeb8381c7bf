"""The kit on the kind ``folder``, which is right in every way."""

import pytest

from noether_init_core import CheckpointError, CheckpointNotFoundError
from noether_init_core.testing import InitializerConformance, Wrong


class TestFolder(InitializerConformance):
    kind = "folder"
    distribution = "acme-good"

    @pytest.fixture
    def make_config(self):
        return lambda case: {"folder": str(case.source.file.parent)}

    @pytest.fixture
    def wrong_configs(self, tmp_path, broken_runs):
        broken = [Wrong(what, {"folder": str(run.file.parent)}, CheckpointError) for what, run in broken_runs.items()]
        return [Wrong("an empty folder", {"folder": str(tmp_path)}, CheckpointNotFoundError, "has no net.pt"), *broken]
