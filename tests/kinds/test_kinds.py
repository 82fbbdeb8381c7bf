"""Kinds: the nine steps from a name to an initializer, on distributions laid out on disk."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import pydantic
import pytest
import torch
from support.foreign import INITIALIZER, ForeignPackages

from noether_init_core import kinds
from noether_init_core.config.base import InitializerConfig, KindConfig
from noether_init_core.errors import (
    ConfigError,
    KindBlockedError,
    KindConflictError,
    KindContractError,
    KindImportError,
    UnknownKindError,
)
from noether_init_core.initializers.base import InitializerBase
from noether_init_core.kinds.hookspec import CONTRACT_VERSION
from noether_init_core.paths import PathProvider

CORE = {
    "file",
    "previous_run",
    "resume",
    "noether.core.initializers.PreviousRunInitializer",
    "noether.core.initializers.ResumeInitializer",
}


class _Config(InitializerConfig):
    scale: float = 1.0


class _Kind(InitializerBase):
    config_class: ClassVar[type[KindConfig]] = _Config

    def __init__(self, config: KindConfig, *, path_provider: Any = None, depth: int = 0) -> None:
        super().__init__(config, path_provider=path_provider)
        self.depth = depth

    def init_weights(self, model: Any) -> None:
        """Nothing."""

    def init_optimizer(self, model: Any) -> None:
        """Nothing."""


def _writes_on_import(marker: Path) -> str:
    return f"open({str(marker)!r}, 'w').close()\n{INITIALIZER}"


def _define(body: str, *, bases: str = "InitializerBase") -> str:
    return (
        "from noether_init_core.config.base import KindConfig\n"
        "from noether_init_core.initializers.base import InitializerBase\n"
        f"class Kind({bases}):\n{body}"
    )


_GOOD_HOOKS = "    def init_weights(self, model): pass\n    def init_optimizer(self, model): pass\n"


def test_the_core_registers_its_own_kinds_through_the_group() -> None:
    """The built-ins are entry points of the core's distribution like anybody's."""
    own = {info.name: info for info in kinds.installed() if info.distribution == "noether-init-core"}
    assert set(own) == CORE
    assert own["file"].target == "noether_init_core.builtin.file:FileInitializer"
    assert own["file"].source == f"noether-init-core {own['file'].version}"


def test_a_strangers_kind_is_listed_without_being_imported(foreign: ForeignPackages) -> None:
    """Listing shows name, distribution, version and target; the module does not run."""
    marker = foreign.folder / "imported"
    foreign.install("acme-init", offers={"acme": "acme_kind:K"}, modules={"acme_kind": _writes_on_import(marker)})
    assert kinds.KindInfo("acme", "acme-init", "1.0", "acme_kind:K") in kinds.installed()
    assert kinds.describe("acme").distribution == "acme-init"
    assert not marker.exists()


def test_listing_kinds_imports_neither_torch_nor_pydantic_nor_a_plugin() -> None:
    """A fresh process that lists the kinds has none of them in sys.modules."""
    program = (
        "import sys, json\nfrom noether_init_core import kinds\n"
        "names = [info.name for info in kinds.installed()]\n"
        "found = [m for m in sys.modules if m.split('.')[0] in ('torch', 'pydantic', 'numpy')"
        " or m.startswith('noether_init_core.builtin')]\n"
        "print(json.dumps([names, found]))"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    names, found = json.loads(output)
    assert set(names) >= CORE
    assert found == []


def test_a_strangers_kind_is_created_with_its_own_config(foreign: ForeignPackages) -> None:
    """All nine steps: the config is validated by the stranger's class and the initializer works on a model."""
    foreign.install(
        "acme-init", offers={"constant": "acme_const:ConstantInitializer"}, modules={"acme_const": INITIALIZER}
    )
    initializer = kinds.create({"kind": "constant", "value": 3})
    model = torch.nn.Linear(2, 2)
    initializer.init_weights(model)
    assert torch.equal(model.weight, torch.full((2, 2), 3.0))
    assert type(initializer).__module__ == "acme_const"
    with pytest.raises(pydantic.ValidationError) as caught:
        kinds.create({"kind": "constant", "value": "x", "size": 1})
    assert {error["loc"] for error in caught.value.errors()} == {("value",), ("size",)}


def test_a_path_provider_and_kwargs_reach_the_constructor() -> None:
    """Step 9 calls cls(config, path_provider=..., **kwargs)."""
    kinds.register("registered", _Kind)
    try:
        paths = PathProvider("out", "run")
        initializer = kinds.create({"kind": "registered", "kwargs": {"depth": 4}}, path_provider=paths)
        assert isinstance(initializer, _Kind)
        assert (initializer.depth, initializer.path_provider, initializer.config.kind) == (4, paths, "registered")
        with pytest.raises(ConfigError, match="unexpected keyword argument 'depht'"):
            kinds.create({"kind": "registered", "kwargs": {"depht": 4}})
        with pytest.raises(ConfigError, match="kwargs of kind"):
            kinds.create({"kind": "registered", "kwargs": {"path_provider": None}})
    finally:
        kinds.unregister("registered")


def test_a_validated_config_is_taken_as_it_is() -> None:
    """An instance of the kind's config class is not validated again; one of another class is refused."""
    kinds.register("registered", _Kind)
    try:
        config = _Config(kind="registered", scale=2)
        assert kinds.create(config).config is config
        with pytest.raises(ConfigError, match="takes a _Config, not a KindConfig"):
            kinds.create(KindConfig(kind="registered"))
    finally:
        kinds.unregister("registered")


@pytest.mark.parametrize("config", [{}, {"kind": None}, {"kind": 3}])
def test_a_config_without_a_kind_is_told_what_there_is(config: dict[str, Any]) -> None:
    """A missing kind, null or a number is an error that lists the kinds."""
    with pytest.raises(ConfigError, match=r"Installed: .*previous_run.*Next: ninit kinds"):
        kinds.create(config)


def test_an_unknown_kind_names_near_ones_and_the_next_command() -> None:
    """The message of the likeliest mistake, word for word."""
    version = kinds.describe("previous_run").version
    with pytest.raises(UnknownKindError) as caught:
        kinds.resolve("previous-run")
    assert str(caught.value) == (
        f'no kind "previous-run". Near: previous_run (noether-init-core {version}). Next: ninit kinds'
    )
    assert (caught.value.kind, caught.value.candidates) == ("previous-run", ("previous_run",))
    assert isinstance(caught.value, LookupError)


def test_an_unknown_kind_without_near_names_lists_what_is_installed() -> None:
    """Nothing resembles it, so the message shows every plain kind with its distribution."""
    with pytest.raises(UnknownKindError, match=r"Installed: file, previous_run, resume \(noether-init-core .*\)"):
        kinds.resolve("zzzzzz")


@pytest.mark.usefixtures("isolated_kinds")
@pytest.mark.parametrize("kind", ["random", "Random", "randm"])
def test_a_kind_of_a_known_distribution_is_told_how_to_install_it(kind: str) -> None:
    """The hint comes from the core's own table."""
    with pytest.raises(
        UnknownKindError, match=r"random comes with noether-init-random.*Next: pip install noether-init-"
    ):
        kinds.resolve(kind)


@pytest.mark.parametrize("kind", ["os.system", "logging.os.system", "builtins.eval", "antigravity.x", "json.tool.main"])
def test_a_dotted_kind_is_never_an_import_path(kind: str) -> None:
    """The kind is unknown, nothing is imported, and the message shows the entry-point line that is missing."""
    before = set(sys.modules)
    with pytest.raises(UnknownKindError) as caught:
        kinds.create({"kind": kind})
    module, _, name = kind.rpartition(".")
    assert f'"{kind}" = "{module}:{name}"' in str(caught.value)
    imported = set(sys.modules) - before
    assert not {"antigravity", "json.tool"} & imported


@pytest.mark.parametrize("kind", ["", "a\nb", "x" * 100_000, "../../etc", "a b.c d", "\x00", "a:b"])
def test_any_text_as_a_kind_gives_one_short_line(kind: str) -> None:
    """However odd the text, the error is a single line of bounded length and suggests no install of it."""
    with pytest.raises(UnknownKindError) as caught:
        kinds.resolve(kind)
    message = str(caught.value)
    assert "\n" not in message
    assert "\x00" not in message
    assert len(message) < 1000
    assert "pip install" not in message


def test_two_distributions_that_claim_a_kind_are_named_and_neither_is_imported(foreign: ForeignPackages) -> None:
    """The conflict is found before any import: no marker file is written."""
    markers = [foreign.folder / "one", foreign.folder / "two"]
    foreign.install("one-init", offers={"claimed": "claim_one:K"}, modules={"claim_one": _writes_on_import(markers[0])})
    foreign.install(
        "two-init",
        version="2.5",
        offers={"claimed": "claim_two:K"},
        modules={"claim_two": _writes_on_import(markers[1])},
    )
    with pytest.raises(KindConflictError) as caught:
        kinds.create({"kind": "claimed"})
    assert sorted(caught.value.offers) == ["one-init 1.0 -> claim_one:K", "two-init 2.5 -> claim_two:K"]
    assert all(offer in str(caught.value) for offer in caught.value.offers)
    assert not any(marker.exists() for marker in markers)


def test_a_strangers_claim_on_a_kind_of_the_core_is_a_conflict(foreign: ForeignPackages) -> None:
    """Nobody can take over previous_run, and the core has no right of way."""
    foreign.install("evil-init", offers={"previous_run": "evil:K"})
    with pytest.raises(KindConflictError, match=r"noether-init-core .* and|evil-init 1.0 -> evil:K"):
        kinds.resolve("previous_run")
    assert kinds.describe("resume").distribution == "noether-init-core"


def test_a_conflict_with_the_core_never_advises_to_remove_the_core(foreign: ForeignPackages) -> None:
    """Whoever followed that would run the stranger's code instead."""
    foreign.install("acme-init", offers={"resume": "acme:K", "previous_run": "acme:K"})
    for kind in ("resume", "previous_run"):
        with pytest.raises(
            KindConflictError, match=r"Next: pip uninstall acme-init, or set NOETHER_INIT_DENY=acme-init"
        ):
            kinds.resolve(kind)


def test_denying_a_distribution_settles_a_conflict(foreign: ForeignPackages, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is shut out does not count as an offer."""
    for name in ("one", "two"):
        target = f"settle_{name}:ConstantInitializer"
        foreign.install(f"{name}-init", offers={"claimed": target}, modules={f"settle_{name}": INITIALIZER})
    monkeypatch.setenv("NOETHER_INIT_DENY", "unrelated, One_Init")
    assert kinds.resolve("claimed").__module__ == "settle_two"


def test_only_listed_distributions_count_when_an_allow_list_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """The core's own kinds follow the same rule as everybody's; an empty list allows nothing."""
    monkeypatch.setenv("NOETHER_INIT_ALLOW", "acme-init")
    with pytest.raises(KindBlockedError, match="NOETHER_INIT_ALLOW") as caught:
        kinds.resolve("previous_run")
    assert caught.value.distribution == "noether-init-core"
    assert {info.blocked_by for info in kinds.installed()} == {"NOETHER_INIT_ALLOW"}
    monkeypatch.setenv("NOETHER_INIT_ALLOW", "")
    with pytest.raises(KindBlockedError):
        kinds.describe("previous_run")
    monkeypatch.setenv("NOETHER_INIT_ALLOW", "Noether.Init_Core")
    assert kinds.describe("previous_run").blocked_by is None


def test_a_denied_distribution_is_not_imported(foreign: ForeignPackages, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names distribution and variable; the module does not run; near names leave it out."""
    marker = foreign.folder / "imported"
    foreign.install("acme-init", offers={"acme": "acme_denied:K"}, modules={"acme_denied": _writes_on_import(marker)})
    monkeypatch.setenv("NOETHER_INIT_DENY", "acme.init")
    with pytest.raises(KindBlockedError, match=r"acme-init 1\.0, which is listed in NOETHER_INIT_DENY"):
        kinds.create({"kind": "acme"})
    with pytest.raises(UnknownKindError) as caught:
        kinds.create({"kind": "acmee"})
    assert caught.value.candidates == ()
    assert not marker.exists()


def test_a_plugin_that_raises_on_import_keeps_its_traceback_and_hurts_no_other(foreign: ForeignPackages) -> None:
    """Its own exception is the cause, with the line that raised; the stranger's other kind works."""
    foreign.install(
        "broken-init",
        offers={"broken": "broken_kind:K", "fine": "fine_kind:ConstantInitializer", "leaves": "leaving_kind:K"},
        modules={
            "broken_kind": "def deep():\n    raise RuntimeError('no such driver')\ndeep()\n",
            "fine_kind": INITIALIZER,
            "leaving_kind": "import sys\nsys.exit(3)\n",
        },
    )
    with pytest.raises(
        KindImportError, match=r'kind "broken" \(broken-init 1.0\).*RuntimeError: no such driver'
    ) as caught:
        kinds.resolve("broken")
    cause = caught.value.__cause__
    assert isinstance(cause, RuntimeError)
    frames = []
    trace = cause.__traceback__
    while trace is not None:
        frames.append(trace.tb_frame.f_code.co_name)
        trace = trace.tb_next
    assert frames[-1] == "deep"
    with pytest.raises(KindImportError, match="SystemExit"):
        kinds.resolve("leaves")
    assert kinds.resolve("fine").__name__ == "ConstantInitializer"
    assert kinds.describe("previous_run").name == "previous_run"


def test_a_missing_module_or_attribute_is_an_import_error_of_that_kind(foreign: ForeignPackages) -> None:
    """A distribution whose entry point leads nowhere."""
    foreign.install("gone-init", offers={"gone": "no_such_module_here:K", "misspelt": "json:Kind"})
    with pytest.raises(KindImportError, match="No module named 'no_such_module_here'"):
        kinds.resolve("gone")
    with pytest.raises(KindImportError, match="AttributeError") as caught:
        kinds.resolve("misspelt")
    assert 'Next: python -c "from json import Kind"' in str(caught.value)


@pytest.mark.parametrize(
    ("target", "shown"),
    [("json:loads", "of type function"), ("json", "of type module"), ("json:JSONDecoder", "the class JSONDecoder")],
)
def test_an_object_that_is_no_initializer_class_is_refused(foreign: ForeignPackages, target: str, shown: str) -> None:
    """A function, a module and a foreign class are no kinds."""
    foreign.install("odd-init", offers={"odd": target})
    with pytest.raises(KindContractError, match=f"is {shown}, not a subclass of InitializerBase"):
        kinds.resolve("odd")


@pytest.mark.parametrize(
    ("body", "finding"),
    [
        (
            "    def init_weight(self, model): pass\n    def init_optimizer(self, model): pass\n",
            "did you mean init_weights",
        ),
        (_GOOD_HOOKS + "    def init_callback(self, callbacks): pass\n", "did you mean init_callbacks"),
        (_GOOD_HOOKS + "    def initialize_trainer(self, trainer): pass\n", "did you mean init_trainer"),
        (
            "    def init_weights(self, model): pass\n    def init_optim(self, model): pass\n",
            "did you mean init_optimizer",
        ),
        (_GOOD_HOOKS + "    def init_trainer(self, trainer): yield\n", "init_trainer is a generator"),
        (_GOOD_HOOKS + "    async def init_trainer(self, trainer): pass\n", "init_trainer is async"),
        (_GOOD_HOOKS + "    async def init_trainer(self, trainer): yield\n", "init_trainer is async"),
        (_GOOD_HOOKS + "    def init_trainer(self, *args): pass\n", r"takes \*args"),
        (_GOOD_HOOKS + "    def init_trainer(self, trainer, **rest): pass\n", r"takes \*\*rest"),
        (_GOOD_HOOKS + "    def init_trainer(self, model): pass\n", "takes model, which would never be filled"),
        (
            _GOOD_HOOKS + "    def init_callbacks(self, callbacks, model=None): pass\n",
            "model must be a plain",
        ),
        (_GOOD_HOOKS + "    def init_callbacks(self, *, callbacks): pass\n", r"takes \*, callbacks; callbacks must"),
        (_GOOD_HOOKS + "    def init_trainer(): pass\n", "init_trainer does not take self"),
        (_GOOD_HOOKS + "    @staticmethod\n    def init_trainer(trainer): pass\n", "init_trainer is a staticmethod"),
        (_GOOD_HOOKS + "    @classmethod\n    def init_trainer(cls, trainer): pass\n", "init_trainer is a classmethod"),
        (_GOOD_HOOKS + "    init_trainer = None\n", "init_trainer is a NoneType"),
        (_GOOD_HOOKS + "    def check(self, model): pass\n", "check cannot be called with"),
        (_GOOD_HOOKS + "    def check(self, model, trainer, callbacks): yield\n", "check is a generator"),
        (_GOOD_HOOKS + "    def __init__(self, config): pass\n", "__init__ cannot be called with"),
        (_GOOD_HOOKS + "    config_class = dict\n", "not a subclass of KindConfig"),
        (
            _GOOD_HOOKS + "    class config_class(KindConfig):\n        model_config = {'extra': 'ignore'}\n",
            "lets unknown",
        ),
        (_GOOD_HOOKS + "    contract = '1'\n", "contract is '1'"),
        (_GOOD_HOOKS + "    contract = 0\n", "contract is 0"),
    ],
)
def test_a_class_that_would_silently_not_work_is_refused(foreign: ForeignPackages, body: str, finding: str) -> None:
    """The static look finds the mistake before anything is called, and says which distribution made it."""
    foreign.install("odd-init", offers={"odd": "odd_kind:Kind"}, modules={"odd_kind": _define(body)})
    with pytest.raises(KindContractError, match=finding) as caught:
        kinds.create({"kind": "odd"})
    assert "odd-init 1.0" in str(caught.value)
    assert any(finding.replace("\\", "") in found for found in caught.value.findings)


@pytest.mark.parametrize(
    "body",
    [
        _GOOD_HOOKS,
        "    def init_weights(self): pass\n    def init_optimizer(self): pass\n",
        _GOOD_HOOKS + "    def init_weights_of_layer(self, layer): pass\n    def _init_weight(self, x): yield\n",
        _GOOD_HOOKS + "    def init_callbacks(self, callbacks, model, initializer): pass\n",
        # Beside the hook itself, a method of a similar name is a helper.
        _GOOD_HOOKS + "    def init_weight(self, module): pass\n",
        _GOOD_HOOKS + "    def __init__(self, config, path_provider=None, *, scale, **rest): pass\n",
        _GOOD_HOOKS + "    def check(self, *args, **kwargs): pass\n",
        f"    contract = {CONTRACT_VERSION}\n" + _GOOD_HOOKS,
    ],
)
def test_a_class_that_keeps_the_contract_passes(foreign: ForeignPackages, body: str) -> None:
    """Subsets of arguments, private methods and helpers are fine."""
    foreign.install("odd-init", offers={"odd": "odd_kind:Kind"}, modules={"odd_kind": _define(body)})
    assert kinds.resolve("odd").__name__ == "Kind"


def test_a_kind_for_a_newer_contract_asks_for_a_newer_core(foreign: ForeignPackages) -> None:
    """The message has both versions and the command."""
    body = f"    contract = {CONTRACT_VERSION + 1}\n" + _GOOD_HOOKS
    foreign.install("odd-init", offers={"odd": "odd_kind:Kind"}, modules={"odd_kind": _define(body)})
    with pytest.raises(KindContractError) as caught:
        kinds.resolve("odd")
    assert f"contract {CONTRACT_VERSION + 1}" in str(caught.value)
    assert str(caught.value).endswith("Next: pip install --upgrade noether-init-core")


def test_a_method_that_is_missing_is_named_for_its_author(foreign: ForeignPackages) -> None:
    """The author has the newest release already; an upgrade helps everybody else."""
    source = (
        "from noether_init_core import SourceInitializer, SourceInitializerConfig\n\n\n"
        "class Kind(SourceInitializer):\n    config_class = SourceInitializerConfig\n"
    )
    foreign.install("odd-init", offers={"odd": "odd_kind:Kind"}, modules={"odd_kind": source})
    with pytest.raises(KindContractError) as caught:
        kinds.resolve("odd")
    assert caught.value.findings == ("locate(query) is not implemented",)
    assert str(caught.value).endswith(
        "Next: ninit check odd; if the package is not yours: pip install --upgrade odd-init"
    )


def test_a_contract_that_is_inherited_does_not_count(foreign: ForeignPackages, monkeypatch: pytest.MonkeyPatch) -> None:
    """A later core whose base class says 2 does not make a class of contract 1 look newer."""
    monkeypatch.setattr(InitializerBase, "contract", CONTRACT_VERSION + 1)
    foreign.install("old-init", offers={"old": "old_kind:Kind"}, modules={"old_kind": _define(_GOOD_HOOKS)})
    assert kinds.resolve("old").__name__ == "Kind"


def test_broken_metadata_of_a_stranger_leaves_others_alone(
    foreign: ForeignPackages, caplog: pytest.LogCaptureFixture
) -> None:
    """Entry points that cannot be read are left out with a line in the log; a folder without metadata, silently."""
    foreign.install("fine-init", offers={"fine": "fine_kind:K"})
    undecodable = foreign.install("undecodable")
    (undecodable / "entry_points.txt").write_bytes(b"[noether_init.initializers]\na = \xff\xfe:Y\n")
    unread = foreign.install("unread-init", offers={"unread": "x:Y"}, version="3.0")
    (unread / "METADATA").write_bytes(b"Metadata-Version: 2.1\nName: \xff\xfe\n")
    unparsable = foreign.install("unparsable")
    (unparsable / "entry_points.txt").write_text(f"[{kinds.GROUP}]\nthis is no pair\n")
    nameless = foreign.install("nameless", offers={"b": "x:Y"})
    (nameless / "METADATA").unlink()
    foreign.install("value-init", offers={"odd_value": "(((", "": "x:Y"})
    kinds.clear_cache()
    with caplog.at_level(logging.WARNING):
        found = {info.name: info for info in kinds.installed()}
    assert set(found) - CORE >= {"fine", "odd_value", "unread"}
    assert found["unread"].source == "unread-init 3.0"
    assert not {"a", "b", "this is no pair"} & set(found)
    assert "metadata cannot be read" in caplog.text
    with pytest.raises(KindImportError):
        kinds.resolve("odd_value")


def test_a_distribution_found_twice_counts_once_and_the_first_on_the_path_wins(foreign: ForeignPackages) -> None:
    """Names are compared as PEP 503 says; the one in front is the one that is imported, even if it offers nothing."""
    foreign.install("acme-init", offers={"acme": "acme_old:K", "gone": "acme_old:G"}, version="1.0", site="behind")
    foreign.install("Acme.Init", offers={"acme": "acme_new:K"}, version="2.0", site="front")
    assert [(info.version, info.target) for info in kinds.installed() if info.name == "acme"] == [("2.0", "acme_new:K")]
    with pytest.raises(UnknownKindError):
        kinds.describe("gone")
    foreign.install("acme_init", version="3.0", site="foremost")
    with pytest.raises(UnknownKindError):
        kinds.describe("acme")


def test_the_scan_is_made_once_until_the_cache_is_cleared(foreign: ForeignPackages) -> None:
    """A distribution that appears later is listed after clear_cache; asked for by name, it is found at once."""
    foreign.install("first-init", offers={"first": "x:Y"})
    assert "first" in {info.name for info in kinds.installed()}
    info = foreign.folder / "site" / "second-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Name: second\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[{kinds.GROUP}]\nsecond = x:Y\n")
    assert "second" not in {info.name for info in kinds.installed()}
    kinds.clear_cache()
    assert "second" in {info.name for info in kinds.installed()}
    third = foreign.folder / "site" / "third-1.dist-info"
    info.rename(third)
    (third / "entry_points.txt").write_text(f"[{kinds.GROUP}]\nthird = x:Y\n")
    assert kinds.describe("third").distribution == "third"


def test_a_registered_kind_can_be_replaced_and_taken_back() -> None:
    """For notebooks: running a cell again replaces the class; unregister makes the name unknown."""

    class Other(_Kind):
        pass

    kinds.register("mine", _Kind)
    try:
        kinds.register("mine", Other)
        assert kinds.resolve("mine") is Other
        assert kinds.describe("mine").source == "registered in this process"
        kinds.clear_cache()
        assert kinds.resolve("mine") is Other
        Other.init_trainer = lambda self, *anything: None  # type: ignore[method-assign]  # as in a notebook
        with pytest.raises(KindContractError, match=r"takes \*anything"):
            kinds.register("mine", Other)
    finally:
        kinds.unregister("mine")
    with pytest.raises(UnknownKindError):
        kinds.resolve("mine")
    kinds.unregister("mine")


def test_register_checks_the_contract_and_takes_no_installed_name() -> None:
    """The mistake shows where it is made."""
    with pytest.raises(KindContractError, match="not a subclass"):
        kinds.register("mine", dict)  # type: ignore[arg-type]  # the mistake that is tested
    with pytest.raises(KindConflictError, match="registered in this process"):
        kinds.register("previous_run", _Kind)
    with pytest.raises(UnknownKindError):
        kinds.describe("mine")


def test_the_kinds_of_300_distributions_are_listed_without_importing_one(foreign: ForeignPackages) -> None:
    """Only those that offer a kind are looked into, and none is imported: the modules do not even exist."""
    for number in range(300):
        info = foreign.install(f"many-{number}", offers={f"many_{number}": "x:Y"} if number % 30 == 0 else None)
        with (info / "METADATA").open("a") as file:
            file.write("long description\n" * 1000)
    kinds.clear_cache()
    found = kinds.installed()
    assert len([info for info in found if info.name.startswith("many_")]) == 10


def test_every_environment_variable_is_read_at_each_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Setting a list after the first scan has effect: only the scan is cached."""
    assert kinds.describe("file").name == "file"
    monkeypatch.setitem(os.environ, "NOETHER_INIT_DENY", "noether-init-core")
    with pytest.raises(KindBlockedError):
        kinds.describe("file")
