"""What the import of a plugin cannot change, and which file it was imported from."""

from __future__ import annotations

import logging
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from support.foreign import INITIALIZER, ForeignPackages

from noether_init_core import InitializerStack, KindImportError, bind, kinds
from noether_init_core.testing.snapshots import differences, state_of_process


@pytest.fixture
def foreign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ForeignPackages]:
    packages = ForeignPackages(tmp_path, monkeypatch)
    yield packages
    packages.forget()


SEEDS = (
    "import os, random\nimport numpy as np\nimport torch\n"
    "torch.manual_seed(0)\nnp.random.seed(0)\nrandom.seed(0)\n"
    "torch.set_default_dtype(torch.float64)\ntorch.set_default_device('meta')\ntorch.set_grad_enabled(False)\n"
    "torch.use_deterministic_algorithms(True)\ntorch.set_float32_matmul_precision('medium')\nos.chdir('/')\n"
    "print('welcome to loud')\n"
)


@pytest.mark.parametrize("fails", [False, True])
def test_an_import_changes_no_generator_and_no_default(
    foreign: ForeignPackages,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    fails: bool,
) -> None:
    """Two runs with different seeds draw different numbers, whatever a plugin does; the log names the plugin."""
    ending = "raise RuntimeError('after all that')\n" if fails else INITIALIZER
    foreign.install("loud", offers={"loud": "loud_kind:ConstantInitializer"}, modules={"loud_kind": SEEDS + ending})
    torch.manual_seed(7), np.random.seed(7), random.seed(7)
    expected = torch.rand(3), np.random.rand(3), random.random()
    torch.manual_seed(7), np.random.seed(7), random.seed(7)
    before = state_of_process()
    if fails:
        with pytest.raises(KindImportError, match="after all that"):
            kinds.resolve("loud")
    else:
        assert kinds.resolve("loud").__name__ == "ConstantInitializer"
    # torch and this package, when they are imported first, change other things, such as warning filters
    watched = ("torch's ", "NumPy's generator", "Python's generator", "working folder")
    assert [name for name in differences(before, state_of_process()) if name.startswith(watched)] == []
    assert torch.equal(torch.rand(3), expected[0])
    assert np.array_equal(np.random.rand(3), expected[1])
    assert random.random() == expected[2]
    printed = capsys.readouterr()
    assert (printed.out, "welcome to loud" in printed.err) == ("", True)
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(said) == 1
    assert 'kind "loud" (loud 1.0) changed' in said[0]
    for name in ("torch's generator", "the working folder", "torch's default dtype", "and 4 more"):
        assert name in said[0]


def test_a_quiet_plugin_leaves_no_warning(foreign: ForeignPackages, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing was put back, and its file is the one that was installed."""
    info = foreign.install(
        "quiet", offers={"quiet": "quiet_kind:ConstantInitializer"}, modules={"quiet_kind": INITIALIZER}
    )
    (info / "RECORD").write_text("quiet_kind.py,,\n")
    kinds.resolve("quiet")
    assert caplog.records == []
    assert kinds.imported_from(kinds.describe("quiet")) is None


@pytest.mark.parametrize("is_package", [False, True])
def test_a_module_that_hides_the_installed_one_is_named(
    foreign: ForeignPackages,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    is_package: bool,
) -> None:
    """A folder beside the script comes first: log and report say which file ran, not only what is installed."""
    info = foreign.install("bolt", offers={"bolt": "bolt_init:ConstantInitializer"}, modules={"bolt_init": INITIALIZER})
    (info / "RECORD").write_text("bolt_init.py,,\nbolt-1.0.dist-info/METADATA,,\n")
    beside = tmp_path / "beside"
    hiding = beside / "bolt_init" / "__init__.py" if is_package else beside / "bolt_init.py"
    hiding.parent.mkdir(parents=True)
    hiding.write_text(INITIALIZER)
    monkeypatch.syspath_prepend(beside)
    sys.modules.pop("bolt_init", None)
    model = bind(torch.nn.Linear(2, 2), "net")
    report = InitializerStack.from_config([{"kind": "bolt"}]).initialize(model)
    assert kinds.imported_from(kinds.describe("bolt")) == str(hiding)
    assert [one.distribution for one in report.initializers] == [f"bolt 1.0, imported from {hiding}"]
    assert [record.getMessage() for record in caplog.records if "bolt" in record.getMessage()] == [
        f'kind "bolt" (bolt 1.0) was imported from {hiding}, which is not a file of its distribution. '
        "Next: start in another folder, or rename that file or folder"
    ]


def test_a_distribution_that_lists_no_files_is_not_judged(foreign: ForeignPackages) -> None:
    """An editable install has its module elsewhere; that is no other copy."""
    foreign.install(
        "editable", offers={"edited": "edited_kind:ConstantInitializer"}, modules={"edited_kind": INITIALIZER}
    )
    kinds.resolve("edited")
    assert kinds.imported_from(kinds.describe("edited")) is None
    assert os.path.exists(str(sys.modules["edited_kind"].__file__))
