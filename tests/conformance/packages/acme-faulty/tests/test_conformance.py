"""The kit on every kind with a fault: the classes are named after the kinds."""

import importlib.metadata

import pytest

from noether_init_core import CheckpointError, kinds
from noether_init_core.testing import InitializerConformance, Wrong

#: What a config says besides the folder.
MORE = {"forgiving": {"options": {"depth": 2}}, "tells_the_token": {"token": "hush-hush"}}


class _Faulty:
    distribution = "acme-faulty"

    @pytest.fixture
    def make_config(self):
        return lambda case: {"folder": str(case.source.file.parent), **MORE.get(self.kind, {})}

    @pytest.fixture
    def wrong_configs(self, tmp_path, broken_runs):
        return [
            Wrong("an empty folder", {"folder": str(tmp_path)}, CheckpointError),
            Wrong("a truncated file", {"folder": str(broken_runs["truncated"].file.parent)}, CheckpointError),
        ]

    @pytest.fixture
    def secrets(self):
        return ["hush-hush"] if self.kind == "tells_the_token" else []


NAMES = [
    point.name for point in importlib.metadata.distribution("acme-faulty").entry_points if point.group == kinds.GROUP
]
for name in [*NAMES, "unregistered"]:
    globals()[f"Test_{name}"] = type(f"Test_{name}", (_Faulty, InitializerConformance), {"kind": name})
