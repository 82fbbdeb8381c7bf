"""The kit on every kind with a fault: the classes are named after the kinds."""

import importlib.metadata
import shutil

import pytest

from noether_init_core import InitError, kinds
from noether_init_core.testing import InitializerConformance, Wrong, closed, open_

#: What a config says besides the folder.
MORE = {"forgiving": {"options": {"depth": 2}}, "tells_the_token": {"token": "hush-hush"}}
#: Kinds whose files are copied beside the config.
COPIES = ("opens_besides", "writes_beside_the_config", "maps_the_file")
#: Kinds with code of their own in other modules, and kinds of the modules ``plain`` and ``process`` without.
OTHERS, SOURCES = ("looks_at_files_only", "hopes_for_the_file"), ("plans_by_doing", "inference_tensors")
#: What kinds with code of their own cannot do.
PLAIN = {
    "plans": closed("it has code of its own"),
    "meta_device": closed("it writes in place"),
}


class _Noise:
    """A kind that draws."""

    draws = open_()
    plans = compares_models = can_be_wrong = closed("it draws")
    meta_device = buffers = precise = closed("it draws parameters")

    @pytest.fixture
    def make_config(self):
        return lambda case: {}

    @pytest.fixture
    def wrong_configs(self):
        return ()


class _Faulty:
    distribution = "acme-faulty"

    @pytest.fixture
    def make_config(self):
        def make(case):
            if self.kind in COPIES:
                shutil.copytree(case.source.file.parent, case.folder, dirs_exist_ok=True)
            folder = case.folder if self.kind in COPIES else case.source.file.parent
            return {"folder": str(folder), **MORE.get(self.kind, {})}

        return make

    @pytest.fixture
    def wrong_configs(self, tmp_path, broken_runs):
        return [
            Wrong("an empty folder", {"folder": str(tmp_path)}, InitError),
            Wrong("a truncated file", {"folder": str(broken_runs["truncated"].file.parent)}, InitError),
        ]

    @pytest.fixture
    def secrets(self):
        return ["hush-hush"] if self.kind == "tells_the_token" else []


POINTS = [point for point in importlib.metadata.distribution("acme-faulty").entry_points if point.group == kinds.GROUP]
for name, target in [*((point.name, point.value) for point in POINTS), ("unregistered", "")]:
    bases, answers = [_Faulty, InitializerConformance], {"kind": name}
    if name == "seeds_by_hash":
        bases.insert(0, _Noise)
    elif (name not in SOURCES and target.startswith(("acme_faulty.plain:", "acme_faulty.process:"))) or name in OTHERS:
        answers |= PLAIN
    if name == "states_too_little":
        answers["plans"] = open_()
    if name == "wraps_secretly":
        answers["composites"] = answers["nested"] = closed("one file holds one model")
    globals()[f"Test_{name}"] = type(f"Test_{name}", tuple(bases), answers)
