"""The kit on kinds that are right in every way, each with what it cannot do."""

import pytest

from noether_init_core import CheckpointError, CheckpointNotFoundError
from noether_init_core.testing import InitializerConformance, Wrong, closed, open_


class OfFolder(InitializerConformance):
    distribution = "acme-good"
    __test__ = False

    @pytest.fixture
    def make_config(self):
        return lambda case: {"folder": str(case.source.file.parent)}

    @pytest.fixture
    def wrong_configs(self, tmp_path, broken_runs):
        broken = [Wrong(what, {"folder": str(run.file.parent)}, CheckpointError) for what, run in broken_runs.items()]
        return [Wrong("an empty folder", {"folder": str(tmp_path)}, CheckpointNotFoundError), *broken]


class TestFolder(OfFolder):
    kind = "folder"


class TestPlain(OfFolder):
    kind = "plain"
    plans = closed("it has code of its own")
    meta_device = closed("it writes in place")


class TestStated(OfFolder):
    kind = "stated"
    meta_device = closed("it writes in place")


class TestFloat32(OfFolder):
    kind = "float32"
    plans = closed("it has code of its own")
    meta_device = closed("it writes in place")
    half_precision = closed("its format has no bfloat16")


class TestWrapping(OfFolder):
    kind = "wrapping"
    composites = nested = closed("one file holds one model")


class TestOfRun(OfFolder):
    kind = "of_run"
    needs_path_provider = True

    @pytest.fixture
    def make_config(self):
        return lambda case: {"beside": "../files"}

    @pytest.fixture
    def wrong_configs(self):
        return [Wrong("no such folder", {"beside": "nowhere"}, CheckpointNotFoundError)]


class TestNoise(InitializerConformance):
    kind = "noise"
    distribution = "acme-good"
    draws = open_()
    plans = closed("there is no file")
    compares_models = closed("parameters of any shape can be drawn")
    can_be_wrong = closed("there is nothing to choose")
    ranks = closed("ranks have different generators; DistributedDataParallel sends the values of rank 0")
    meta_device = closed("it draws in place")
    buffers = closed("it draws parameters")
    precise = closed("torch.nn.init has no complex numbers")

    @pytest.fixture
    def make_config(self):
        return lambda case: {}
