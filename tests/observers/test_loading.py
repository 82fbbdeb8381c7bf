"""Observers by name: found like kinds, loaded only when a config says so."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from support.foreign import ForeignPackages
from typer.testing import CliRunner

from noether_init_core import ConfigError, InitializerBase, InitializerStack, KindConfig, bind, kinds
from noether_init_core.cli import app
from noether_init_core.kinds.lookup import OBSERVERS, load_observer

WATCH = """
from noether_init_core import hookimpl

SEEN = []

class Watch:
    @hookimpl(wrapper=True)
    def init_weights(self, model, initializer):
        SEEN.append(initializer.config.kind)
        return (yield)

READY = Watch()
"""


class _Nothing(InitializerBase):
    """Initializes nothing."""

    contract = 1

    def init_weights(self, model: object) -> None:
        """Nothing."""

    def init_optimizer(self, model: object) -> None:
        """Nothing."""


def install(foreign: ForeignPackages, distribution: str, offers: dict[str, str], modules: dict[str, str]) -> None:
    """A distribution that offers observers."""
    info = foreign.install(distribution, modules=modules)
    lines = [f"{name} = {target}" for name, target in offers.items()]
    (info / "entry_points.txt").write_text("\n".join([f"[{OBSERVERS.name}]", *lines, ""]))
    kinds.clear_cache()


@pytest.mark.parametrize("target", ["Watch", "READY"])
def test_an_observer_is_switched_on_by_name_and_not_by_being_installed(target: str, foreign: ForeignPackages) -> None:
    """A class is called, an object is taken; a stack that does not name it has not imported it."""
    install(foreign, "acme-watch", {"acme": f"acme_watch:{target}"}, {"acme_watch": WATCH})
    kinds.register("nothing", _Nothing)
    try:
        model = bind(torch.nn.Linear(2, 2), "net")
        InitializerStack.from_config([{"kind": "nothing"}]).initialize(model)
        assert "acme_watch" not in sys.modules
        InitializerStack.from_config({"initializers": [{"kind": "nothing"}], "observers": ["acme"]}).initialize(model)
        assert sys.modules["acme_watch"].SEEN == ["nothing"]
    finally:
        kinds.unregister("nothing")


def test_observers_are_listed_without_being_imported(foreign: ForeignPackages) -> None:
    """Name, distribution, version and target, as for kinds."""
    install(foreign, "acme-watch", {"acme": "no_such_module:Watch"}, {})
    (info,) = [info for info in OBSERVERS.all() if info.name == "acme"]
    assert (info.source, info.target, info.blocked_by) == ("acme-watch 1.0", "no_such_module:Watch", None)
    shown = CliRunner().invoke(app, ["kinds", "--observers"]).stdout
    assert "acme-watch 1.0" in shown
    assert "timing" in shown
    assert "previous_run" not in shown


def test_an_unknown_observer_names_near_ones_and_the_next_command() -> None:
    """Word for word, and the same when nothing is near."""
    version = kinds.describe("file").version
    with pytest.raises(ConfigError) as caught:
        load_observer("timings")
    assert str(caught.value) == (
        f'no observer "timings". Near: timing (noether-init-core {version}). Next: ninit kinds --observers'
    )
    with pytest.raises(ConfigError, match=r'no observer "os.system". Installed: .*timing'):
        load_observer("os.system")


def test_a_conflict_names_both_and_imports_neither(foreign: ForeignPackages, monkeypatch: pytest.MonkeyPatch) -> None:
    """Denying one of the two settles it."""
    for name in ("one", "two"):
        install(foreign, f"{name}-watch", {"claimed": f"claimed_{name}:Watch"}, {f"claimed_{name}": WATCH})
    with pytest.raises(ConfigError, match=r"one-watch 1\.0 -> .*two-watch 1\.0|two-watch 1\.0 -> .*one-watch 1\.0"):
        OBSERVERS.choose("claimed")
    assert not {"claimed_one", "claimed_two"} & set(sys.modules)
    monkeypatch.setenv("NOETHER_INIT_DENY", "one-watch")
    assert type(load_observer("claimed")).__module__ == "claimed_two"


def test_a_shut_out_distribution_observes_nothing(
    foreign: ForeignPackages, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The lists are about distributions, whatever they offer; the module does not run."""
    mark = tmp_path / "imported"
    install(foreign, "acme-watch", {"acme": "acme_shut:W"}, {"acme_shut": f"open({str(mark)!r}, 'w').close()\n"})
    monkeypatch.setenv("NOETHER_INIT_ALLOW", "noether-init-core")
    with pytest.raises(ConfigError, match=r"acme-watch 1\.0, which is not listed in NOETHER_INIT_ALLOW"):
        load_observer("acme")
    assert not mark.exists()


@pytest.mark.parametrize("source", ["raise RuntimeError('no licence')\n", "import sys\nsys.exit(3)\n", ""])
def test_an_observer_that_cannot_be_loaded_is_an_error_with_its_cause(source: str, foreign: ForeignPackages) -> None:
    """Its own exception is chained."""
    install(foreign, "acme-watch", {"acme": "acme_raises:Watch"}, {"acme_raises": source})
    with pytest.raises(
        ConfigError, match=r'observer "acme" \(acme-watch 1\.0\): importing acme_raises:Watch raised'
    ) as caught:
        load_observer("acme")
    assert isinstance(caught.value.__cause__, RuntimeError | SystemExit | AttributeError)


def test_validate_looks_at_the_names_of_observers(tmp_path: Path) -> None:
    """A misspelt observer is found before a training starts."""
    (tmp_path / "init.yaml").write_text("initializers:\n- {kind: resume}\nobservers: [timing, prob]\n")
    done = CliRunner().invoke(app, ["validate", str(tmp_path / "init.yaml")])
    assert done.exit_code == 1
    assert "ok observers.0: timing (noether-init-core" in done.stdout
    assert 'x init.yaml:3 observers.1: no observer "prob". Near: probe' in done.stdout


def test_config_of_an_observer_is_no_kind() -> None:
    """The two groups do not mix: a kind is no observer."""
    assert issubclass(_Nothing.config_class, KindConfig)
    with pytest.raises(ConfigError, match="no observer"):
        load_observer("resume")
