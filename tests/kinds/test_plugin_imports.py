"""What the import of a plugin cannot change, and which file it was imported from."""

from __future__ import annotations

import decimal
import gc
import locale
import logging
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.foreign import INITIALIZER, ForeignPackages

from noether_init_core import InitializerStack, KindImportError, bind, kinds
from noether_init_core.testing.process_state import state_of_process
from noether_init_core.testing.snapshots import differences


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


#: torch leaves its parts untyped.
cudnn: Any = torch.backends.cudnn
#: What a plugin does at import -> how to see it, and the name in the warning.
SETTINGS: dict[str, tuple[Callable[[], object], str]] = {
    "import os; os.environ['CUDA_VISIBLE_DEVICES'] = '3'": (
        lambda: os.environ.get("CUDA_VISIBLE_DEVICES"),
        "variables of the environment",
    ),
    "import os; os.environ['NOETHER_INIT_ALLOW_GLOBALS'] = 'os.system'": (
        lambda: os.environ.get("NOETHER_INIT_ALLOW_GLOBALS"),
        "variables of the environment",
    ),
    "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)": (
        lambda: signal.getsignal(signal.SIGTERM),
        "handlers of signals",
    ),
    "import logging; logging.disable(logging.CRITICAL)": (
        lambda: logging.root.manager.disable,
        "the level below which logging is off",
    ),
    "import gc; gc.disable()": (gc.isenabled, "the garbage collector"),
    "import torch; torch.backends.cudnn.benchmark = True": (
        lambda: torch.backends.cudnn.benchmark,
        "cuDNN's settings",
    ),
    "import torch; torch.backends.cuda.matmul.allow_tf32 = True": (
        lambda: (torch.backends.cuda.matmul.allow_tf32, torch.get_float32_matmul_precision()),
        "torch's precision of float32",
    ),
    "import torch; torch.backends.cudnn.conv.fp32_precision = 'ieee'": (
        lambda: cudnn.conv.fp32_precision,
        "torch's precision of float32",
    ),
    "import torch; torch.set_autocast_enabled('cpu', True)": (lambda: torch.is_autocast_enabled("cpu"), "autocast"),
    "import torch; torch.autograd.set_detect_anomaly(True)": (torch.is_anomaly_enabled, "torch's anomaly mode"),
    "import torch; torch.set_num_threads(torch.get_num_threads() + 1)": (
        torch.get_num_threads,
        "torch's number of threads",
    ),
    "import numpy; numpy.seterr(all='ignore')": (np.geterr, "NumPy's handling of errors"),
    "import torch; torch.set_flush_denormal(True)": (
        lambda: float(torch.tensor([1e-310], dtype=torch.float64) / 2),
        "torch's treatment of tiny numbers",
    ),
    "import torch; torch.backends.cuda.enable_flash_sdp(False)": (
        torch.backends.cuda.flash_sdp_enabled,
        "torch's backends of attention",
    ),
    "import torch; torch.backends.mha.set_fastpath_enabled(False)": (
        torch.backends.mha.get_fastpath_enabled,
        "the fast path of attention modules",
    ),
    "import torch; torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False": (
        lambda: torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
        "cuBLAS's settings",
    ),
    # torch raises without CUDA, but has changed the setting by then
    "import contextlib, torch\nwith contextlib.suppress(RuntimeError):\n"
    "    torch.backends.cuda.preferred_linalg_library('cusolver')": (
        torch.backends.cuda.preferred_linalg_library,
        "torch's libraries for CUDA",
    ),
    "import os; os.umask(0o077)": (lambda: state_of_process()["umask"], "the mask of permissions for new files"),
    "import locale; locale.setlocale(locale.LC_ALL, 'C.UTF-8' if locale.setlocale(locale.LC_ALL) == 'C' else 'C')": (
        lambda: locale.setlocale(locale.LC_ALL),
        "the locale",
    ),
    "import sys; sys.setrecursionlimit(sys.getrecursionlimit() + 99)": (sys.getrecursionlimit, "the recursion limit"),
    "import warnings; warnings.simplefilter('ignore')": (lambda: list(warnings.filters), "filters of warnings"),
    "import warnings; warnings.resetwarnings()": (lambda: list(warnings.filters), "filters of warnings"),
    "import decimal; decimal.getcontext().prec = 3": (
        lambda: decimal.Decimal(1) / 7,
        "the context of decimal numbers",
    ),
    "import decimal; decimal.getcontext().traps[decimal.Inexact] = True": (
        lambda: decimal.Decimal(1) / 7,
        "the context of decimal numbers",
    ),
    "import socket; socket.setdefaulttimeout(1)": (socket.getdefaulttimeout, "the timeout of sockets"),
    "import multiprocessing; multiprocessing.set_start_method('spawn', force=True)": (
        lambda: multiprocessing.get_start_method(allow_none=True),
        "the start method of processes",
    ),
}


@pytest.mark.parametrize("code", SETTINGS)
@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
def test_a_setting_that_decides_what_is_computed_is_put_back_and_named(
    foreign: ForeignPackages, caplog: pytest.LogCaptureFixture, code: str
) -> None:
    """Each alone; also what a later import of this package would be told by an environment variable."""
    look, name = SETTINGS[code]
    before = look()
    foreign.install(
        "sets", offers={"sets": "sets_kind:ConstantInitializer"}, modules={"sets_kind": f"{code}\n{INITIALIZER}"}
    )
    kinds.resolve("sets")
    assert look() == before
    (said,) = [record.getMessage() for record in caplog.records]
    assert said == f'kind "sets" (sets 1.0) changed {name} while it was imported; put back'


def test_filters_for_the_own_dependencies_of_a_plugin_stay(
    foreign: ForeignPackages, caplog: pytest.LogCaptureFixture
) -> None:
    """Libraries silence single warnings of others at import; that decides nothing, and nothing is said about it."""
    code = "import warnings\nwarnings.filterwarnings('ignore', message='old name', category=FutureWarning)\n"
    code += "import decimal\ndecimal.Decimal(1) / 3\n"
    foreign.install("mild", offers={"mild": "mild_kind:ConstantInitializer"}, modules={"mild_kind": code + INITIALIZER})
    with warnings.catch_warnings():
        kinds.resolve("mild")
        warnings.warn("old name", FutureWarning, stacklevel=1)  # else an error, as all warnings in tests
    assert caplog.records == []


def test_an_import_where_backends_were_set_one_by_one_works(foreign: ForeignPackages) -> None:
    """Then torch refuses to say the precision of products in one word."""
    foreign.install("plain", offers={"plain": "plain_kind:ConstantInitializer"}, modules={"plain_kind": INITIALIZER})
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        with pytest.raises(RuntimeError):
            torch.get_float32_matmul_precision()
        assert kinds.resolve("plain").__name__ == "ConstantInitializer"
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = "none"


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


def assert_imported_beside(kind: str, module: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a copy of its module in the folder of the script, the copy is imported, and named."""
    beside = folder / "beside"
    beside.mkdir()
    (beside / f"{module}.py").write_text(INITIALIZER)
    monkeypatch.syspath_prepend(beside)
    kinds.resolve(kind)
    assert kinds.imported_from(kinds.describe(kind)) == str(beside / f"{module}.py")


def test_an_editable_distribution_owns_its_folder_and_no_other(
    foreign: ForeignPackages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its module lies elsewhere than its metadata; a copy beside the script is still another one."""
    info = foreign.install(
        "edited", offers={"edited": "edited_kind:ConstantInitializer"}, modules={"edited_kind": INITIALIZER}
    )
    source = tmp_path / "my clone" / "src"
    source.mkdir(parents=True)
    shutil.move(info.parent / "edited_kind.py", source / "edited_kind.py")
    (info / "direct_url.json").write_text(f'{{"url": "{source.parent.as_uri()}", "dir_info": {{"editable": true}}}}')
    monkeypatch.syspath_prepend(source)
    kinds.resolve("edited")
    assert kinds.imported_from(kinds.describe("edited")) is None
    sys.modules.pop("edited_kind")
    kinds.clear_cache()
    assert_imported_beside("edited", "edited_kind", tmp_path, monkeypatch)


def test_the_copy_beside_the_script_is_told_where_no_file_is_listed(
    foreign: ForeignPackages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some installers write no list; the file that lies beside the metadata is that of the distribution."""
    foreign.install("bare", offers={"bare": "bare_kind:ConstantInitializer"}, modules={"bare_kind": INITIALIZER})
    assert_imported_beside("bare", "bare_kind", tmp_path, monkeypatch)


def test_what_cannot_be_put_back_leaves_nothing_else_changed(
    foreign: ForeignPackages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A plugin that removes the working folder: generators and defaults are put back all the same."""
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    code = f"import os, torch\nos.chdir('/')\nos.rmdir({str(gone)!r})\ntorch.set_default_dtype(torch.float64)\n"
    foreign.install("rude", offers={"rude": "rude_kind:ConstantInitializer"}, modules={"rude_kind": code + INITIALIZER})
    before = torch.get_rng_state()
    kinds.resolve("rude")
    assert torch.get_default_dtype() == torch.float32
    assert torch.equal(torch.get_rng_state(), before)
    (said,) = [record.getMessage() for record in caplog.records]
    assert "the working folder, which cannot be put back (FileNotFoundError: " in said
    assert "torch's default dtype" in said


def test_a_distribution_whose_folder_has_another_spelling_is_used(foreign: ForeignPackages) -> None:
    """Some tools write ``my-plugin-1.0.dist-info``, which the standard library does not find by name."""
    info = foreign.install(
        "my-plugin", offers={"mine": "mine_kind:ConstantInitializer"}, modules={"mine_kind": INITIALIZER}
    )
    info.rename(info.with_name("my-plugin-1.0.dist-info"))
    kinds.clear_cache()
    assert kinds.resolve("mine").__name__ == "ConstantInitializer"
