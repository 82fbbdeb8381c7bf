"""Discovery where installations are untidy, and where several threads, ranks or imports ask at once."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import pytest
from support.foreign import INITIALIZER, ForeignPackages

from noether_init_core import kinds
from noether_init_core.errors import KindBlockedError, KindConflictError, KindImportError
from noether_init_core.kinds import lookup


def _many(foreign: ForeignPackages, count: int) -> None:
    for number in range(count):
        foreign.install(
            f"many-{number}",
            offers={f"many_{number}": f"many_module_{number}:ConstantInitializer"},
            modules={f"many_module_{number}": INITIALIZER},
        )


@pytest.mark.needs_torch
def test_of_300_distributions_exactly_the_chosen_plugin_is_imported(foreign: ForeignPackages) -> None:
    """All of them are installed and can be imported; one is."""
    _many(foreign, 300)
    before = set(sys.modules)
    assert len([info for info in kinds.installed() if info.name.startswith("many_")]) == 300
    assert kinds.resolve("many_150").__module__ == "many_module_150"
    imported = {name for name in set(sys.modules) - before if name.startswith("many_module_")}
    assert imported == {"many_module_150"}


@pytest.mark.needs_torch
def test_a_scan_reads_entry_points_once_and_no_other_metadata(
    foreign: ForeignPackages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names and versions stand in the names of the metadata folders."""
    _many(foreign, 20)
    reads: list[str] = []
    read_text = importlib.metadata.PathDistribution.read_text

    def counted(self: Any, name: str) -> str | None:
        reads.append(name)
        return read_text(self, name)

    monkeypatch.setattr(importlib.metadata.PathDistribution, "read_text", counted)
    kinds.clear_cache()
    kinds.resolve("many_7")
    kinds.resolve("many_7")
    total = len(list(importlib.metadata.distributions()))
    assert 20 <= reads.count("entry_points.txt") <= total
    assert reads.count("METADATA") == 0


def test_editable_installs_count_once(foreign: ForeignPackages, tmp_path: Path) -> None:
    """A develop install leaves an egg-info by the source and a dist-info in site-packages: one kind, no conflict."""
    source = tmp_path / "checkout"
    (source / "acme_edit.egg-info").mkdir(parents=True)
    (source / "acme_edit.egg-info" / "PKG-INFO").write_text(
        "Metadata-Version: 2.1\nName: acme-edit\nVersion: 1.1.dev0\n"
    )
    (source / "acme_edit.egg-info" / "entry_points.txt").write_text(f"[{kinds.GROUP}]\nacme = acme_editable:K\n")
    foreign.install("acme-edit", offers={"acme": "acme_editable:K"}, version="1.0")
    (foreign.folder / "site" / "__editable__.acme_edit.pth").write_text(f"{source}\n")
    sys.path.append(str(source))
    try:
        kinds.clear_cache()
        assert [info.version for info in kinds.installed() if info.name == "acme"] == ["1.0"]
        assert kinds.describe("acme").distribution == "acme-edit"
    finally:
        sys.path.remove(str(source))


@pytest.mark.needs_torch
def test_a_distribution_that_goes_by_the_name_of_another_is_known_by_its_folder(
    foreign: ForeignPackages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its metadata say the name of an allowed one; the folder that the installer made says its own."""
    names = ["evil-init", "noether-init-core-evil", "evil"]
    for number, name in enumerate(names[:2]):
        info = foreign.install(name, offers={f"evil_{number}": "evil_module:K"})
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: noether-init-core\nVersion: 9\n")
    egg = foreign.folder / "site" / "evil-1.0-py3.11.egg" / "EGG-INFO"
    egg.mkdir(parents=True)
    (egg / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: noether-init-core\nVersion: 9\n")
    (egg / "entry_points.txt").write_text(f"[{kinds.GROUP}]\nevil_2 = evil_module:K\n")
    monkeypatch.syspath_prepend(egg.parent)
    monkeypatch.setenv("NOETHER_INIT_ALLOW", "noether-init-core")
    kinds.clear_cache()
    for number, name in enumerate(names):
        with pytest.raises(KindBlockedError, match=f"is provided by {name} 1.0, which is not listed in") as caught:
            kinds.resolve(f"evil_{number}")
        assert caught.value.distribution == name
    assert kinds.resolve("file").__name__ == "FileInitializer"


def test_an_entry_that_is_no_folder_and_a_folder_that_is_gone_do_no_harm(
    foreign: ForeignPackages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The import path has such entries everywhere: zip files, folders that were removed, empty texts."""
    foreign.install("fine-init", offers={"fine": "x:Y"})
    (tmp_path / "no.zip").write_bytes(b"not a zip file")
    for entry in (str(tmp_path / "no.zip"), str(tmp_path / "gone"), ""):
        monkeypatch.syspath_prepend(entry)
    kinds.clear_cache()
    assert kinds.describe("fine").distribution == "fine-init"


@pytest.mark.needs_torch
def test_two_distributions_may_share_a_namespace_package(foreign: ForeignPackages) -> None:
    """Two distributions own parts of one package without an ``__init__``; only the part that is meant is imported."""
    for name in ("one", "two"):
        foreign.install(f"acme-{name}", offers={f"acme_{name}": f"acme_space.{name}:ConstantInitializer"}, site=name)
        package = foreign.folder / name / "acme_space"
        package.mkdir()
        (package / f"{name}.py").write_text(INITIALIZER)
    kinds.clear_cache()
    assert kinds.resolve("acme_one").__module__ == "acme_space.one"
    assert "acme_space.two" not in sys.modules
    assert kinds.resolve("acme_two").__module__ == "acme_space.two"


def test_a_file_named_like_the_core_in_a_strangers_folder_is_not_the_core(foreign: ForeignPackages) -> None:
    """A target inside of this package leads to this package, or nowhere; never to a stranger's file."""
    foreign.install("shadow-init", offers={"shadow": "noether_init_core.builtin.shadow:K"})
    package = foreign.folder / "site" / "noether_init_core" / "builtin"
    package.mkdir(parents=True)
    (package / "shadow.py").write_text(INITIALIZER)
    kinds.clear_cache()
    with pytest.raises(KindImportError, match=r"No module named 'noether_init_core\.builtin\.shadow'"):
        kinds.resolve("shadow")


def test_an_entry_point_twice_in_one_distribution_is_a_conflict_only_if_it_differs(foreign: ForeignPackages) -> None:
    """The same line twice says the same; two targets for one name cannot both be meant."""
    info = foreign.install("twice-init")
    (info / "entry_points.txt").write_text(
        f"[{kinds.GROUP}]\nsame = x:Y\nsame = x:Y\nother = x:Y\nother = x:Z\n[elsewhere]\nsame = q:R\n"
    )
    kinds.clear_cache()
    assert kinds.describe("same").target == "x:Y"
    with pytest.raises(KindConflictError):
        kinds.describe("other")


@pytest.mark.needs_torch
def test_a_plugin_may_use_kinds_while_it_is_imported(foreign: ForeignPackages) -> None:
    """Listing, resolving another kind, and asking for itself: no lock is held while a plugin runs."""
    asking = (
        "from noether_init_core import kinds\n"
        "LISTED = [info.name for info in kinds.installed()]\n"
        "FILE = kinds.resolve('file')\n"
        f"{INITIALIZER}"
    )
    foreign.install(
        "asking-init", offers={"asking": "asking_kind:ConstantInitializer"}, modules={"asking_kind": asking}
    )
    assert kinds.resolve("asking").__name__ == "ConstantInitializer"
    assert "asking" in sys.modules["asking_kind"].LISTED
    assert sys.modules["asking_kind"].FILE.__name__ == "FileInitializer"


@pytest.mark.needs_torch
def test_threads_that_ask_at_once_share_one_scan(foreign: ForeignPackages, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen threads, one scan, sixteen times the same class."""
    _many(foreign, 30)
    scans: list[str] = []
    scan = lookup._scan

    def counted(group: str, unreadable: list[Exception]) -> object:
        scans.append(group)
        return scan(group, unreadable)

    monkeypatch.setattr(lookup, "_scan", counted)
    kinds.clear_cache()
    barrier = threading.Barrier(16)
    found: list[type] = []

    def ask() -> None:
        barrier.wait()
        found.append(kinds.resolve("many_3"))

    threads = [threading.Thread(target=ask) for _number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert scans == [kinds.GROUP]
    assert len(found) == 16
    assert len(set(found)) == 1


def test_a_handler_of_the_log_may_ask_for_kinds(foreign: ForeignPackages) -> None:
    """It is called for a distribution that is left out, in the middle of the first use."""
    info = foreign.install("broken-init", offers={"broken": "x:Y"})
    (info / "entry_points.txt").write_bytes(b"[noether_init.initializers]\nq = \xff:Y\n")
    asked: list[int] = []

    class Asking(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            asked.append(len(kinds.installed()))

    handler = Asking()
    logging.getLogger("noether_init_core.kinds.lookup").addHandler(handler)
    try:
        kinds.clear_cache()
        thread = threading.Thread(target=kinds.installed, daemon=True)
        thread.start()
        thread.join(30)
        assert not thread.is_alive()
    finally:
        logging.getLogger("noether_init_core.kinds.lookup").removeHandler(handler)
    assert len(asked) == 1


def test_a_folder_of_metadata_that_is_not_escaped_hides_no_other(foreign: ForeignPackages) -> None:
    """Two distributions whose folders begin alike; and an old-style egg-info."""
    foreign.install("acme-alpha", offers={"alpha": "x:A"}).rename(foreign.folder / "site" / "acme-alpha-1.0.dist-info")
    foreign.install("acme-beta", offers={"beta": "x:B"}).rename(foreign.folder / "site" / "acme-beta-1.0.dist-info")
    egg = foreign.folder / "site" / "acme-gamma.egg-info"
    egg.mkdir()
    (egg / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: acme-gamma\nVersion: 1\n")
    (egg / "entry_points.txt").write_text(f"[{kinds.GROUP}]\ngamma = x:C\n")
    kinds.clear_cache()
    found = {name: kinds.describe(name).distribution for name in ("alpha", "beta", "gamma")}
    assert found == {"alpha": "acme-alpha", "beta": "acme-beta", "gamma": "acme-gamma"}


def test_what_an_interrupted_uninstall_left_behind_hides_nobody(foreign: ForeignPackages) -> None:
    """A folder without metadata earlier on the path; and a pipe in the place of a file does not block."""
    foreign.install("acme-init", offers={"acme": "x:A"}, site="behind")
    (foreign.folder / "front" / "acme_init-0.9.dist-info").mkdir(parents=True)
    pipe = foreign.install("pipe-init", site="front")
    (pipe / "entry_points.txt").unlink()
    os.mkfifo(pipe / "entry_points.txt")
    kinds.clear_cache()
    assert kinds.describe("acme").version == "1.0"


def test_what_is_meant_for_a_shell_holds_no_command_of_a_stranger(foreign: ForeignPackages) -> None:
    """The target of an entry point is a stranger's text."""
    foreign.install("evil-init", offers={"evil": 'os";touch PWNED;":x'})
    with pytest.raises(KindImportError, match=r"Next: ninit check evil\Z"):
        kinds.resolve("evil")


@pytest.mark.needs_torch
def test_every_rank_of_a_torchrun_resolves_the_same_class(foreign: ForeignPackages, tmp_path: Path) -> None:
    """The real launcher starts two processes; each finds the stranger's kind by itself and initializes its model."""
    foreign.install("acme-init", offers={"acme": "acme_ranks:ConstantInitializer"}, modules={"acme_ranks": INITIALIZER})
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent(
            """
            import os, pathlib, torch
            import torch.distributed as dist
            from noether_init_core import InitializerStack, bind, kinds
            dist.init_process_group("gloo")
            model = torch.nn.Linear(2, 2)
            InitializerStack.from_config([{"kind": "acme", "value": 2.0}]).initialize(bind(model, "net"))
            gathered = [None, None]
            dist.all_gather_object(gathered, [kinds.resolve("acme").__module__, model.weight.tolist()])
            assert gathered[0] == gathered[1] == ["acme_ranks", [[2.0, 2.0], [2.0, 2.0]]], gathered
            pathlib.Path(f"rank{os.environ['RANK']}").touch()
            dist.destroy_process_group()
            """
        )
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = {"PYTHONPATH": str(foreign.folder / "site"), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.glob("rank*")) == ["rank0", "rank1"]
