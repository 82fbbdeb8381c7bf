"""What a message about a kind advises is done here, in the situation that prints it, and leads on."""

from __future__ import annotations

import functools
import importlib
import json
import os
import re
import shlex
import shutil
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.advice import REPOSITORY, digests, executes, typed
from support.command import run_command
from support.following import advised
from support.foreign import INITIALIZER, ForeignPackages
from torch._C._distributed_c10d import HashStore
from torch.testing._internal.two_tensor import TwoTensor

import noether_init_pages
from noether_init_core import InitializerStack, KindConfig, bind, kinds
from noether_init_core.builtin.file import FileInitializer, FileInitializerConfig
from noether_init_core.kinds import contract
from noether_init_core.kinds.hookspec import CONTRACT_VERSION
from noether_init_pages import html_page

CLASS = "ConstantInitializer"


def value_of(kind: str) -> float:
    """Start a model with the kind."""
    module = torch.nn.Linear(3, 2)
    InitializerStack.from_config([{"kind": kind, "value": 3.0}]).initialize(bind(module, "net"))
    return float(module.bias[0].item())


def uninstalled(folder: Path) -> None:
    """As pip uninstall leaves it."""
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    kinds.clear_cache()


@executes("kinds/lookup.py", "pip uninstall {}, or set {}={}")
@pytest.mark.parametrize("way", ["uninstall", "variable"])
@pytest.mark.parametrize("second", ["acme-init", "zeta-init"])
def test_a_conflict_is_settled_both_ways(
    foreign: ForeignPackages, monkeypatch: pytest.MonkeyPatch, way: str, second: str
) -> None:
    """Without one of the two distributions the kind of the other is used."""
    folders = {
        name: foreign.install(
            name,
            offers={"claimed": f"{name.replace('-', '_')}:{CLASS}"},
            modules={name.replace("-", "_"): INITIALIZER},
        )
        for name in ("first-init", second)
    }
    uninstall, _, variable = advised(lambda: value_of("claimed")).partition(", or set ")
    if way == "uninstall":
        uninstalled(folders[uninstall.removeprefix("pip uninstall ")])
    else:
        monkeypatch.setenv(*variable.split("="))
    assert value_of("claimed") == 3.0


@executes("kinds/lookup.py", "Next: {}")
@executes("cli/kinds.py", "Next: {}=DISTRIBUTION")
def test_lists_of_distributions_are_changed_as_advised(
    foreign: ForeignPackages, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that is denied, one that is not allowed, and a conflict that the table of kinds shows."""
    foreign.install("acme-init", offers={"acme": f"acme_init:{CLASS}"}, modules={"acme_init": INITIALIZER})
    monkeypatch.setenv("NOETHER_INIT_DENY", "other-init,acme-init")
    taken = re.fullmatch(r"take ([\w-]+) out of (\w+)", advised(lambda: value_of("acme")))
    assert taken is not None
    names = [name for name in os.environ[taken[2]].split(",") if name != taken[1]]
    monkeypatch.setenv(taken[2], ",".join(names))
    assert value_of("acme") == 3.0
    monkeypatch.setenv("NOETHER_INIT_ALLOW", "noether-init-core")
    added = re.fullmatch(r"add ([\w-]+) to (\w+)", advised(lambda: value_of("acme")))
    assert added is not None
    monkeypatch.setenv(added[2], f"{os.environ[added[2]]},{added[1]}")
    assert value_of("acme") == 3.0
    monkeypatch.delenv("NOETHER_INIT_ALLOW")
    foreign.install("zeta-init", offers={"acme": f"zeta_init:{CLASS}"}, modules={"zeta_init": INITIALIZER})
    shown = run_command(monkeypatch, capsys, "kinds").out
    variable = re.search(r"Next: (\w+)=DISTRIBUTION", shown)
    assert variable is not None, shown
    monkeypatch.setenv(variable[1], "zeta-init")
    assert value_of("acme") == 3.0


@executes("kinds/importing.py", "Next: {}")
@pytest.mark.parametrize(
    ("target", "command"), [(f"late_init:{CLASS}", "python"), (f"late_init:{CLASS}.more", "python")]
)
def test_an_import_that_failed_is_shown_by_the_command(foreign: ForeignPackages, target: str, command: str) -> None:
    """It ends as the import of the kind did; when the module is mended, both are well."""
    foreign.install("late-init", offers={"late": f"late_init:{CLASS}"}, modules={"late_init": "import absent_driver\n"})
    said = advised(lambda: value_of("late"))
    assert said.startswith(command)
    site = foreign.folder / "site"
    with pytest.raises(AssertionError, match="No module named 'absent_driver'"):
        typed(f"PYTHONPATH={shlex.quote(str(site))}:$PYTHONPATH {said}")
    (site / "late_init.py").write_text(INITIALIZER)
    importlib.invalidate_caches()
    typed(f"PYTHONPATH={shlex.quote(str(site))}:$PYTHONPATH {said}")
    assert value_of("late") == 3.0


@executes("kinds/importing.py", "start in another folder, or rename that file or folder")
@pytest.mark.parametrize("way", ["rename", "another folder"])
def test_a_module_that_hides_another_is_renamed(
    foreign: ForeignPackages,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    way: str,
) -> None:
    """Or another folder is the first one; then the installed module is the one that runs."""
    info = foreign.install("hid-init", offers={"hid": f"hid_init:{CLASS}"}, modules={"hid_init": INITIALIZER})
    (info / "RECORD").write_text("hid_init.py,,\n")
    beside = tmp_path / "beside"
    beside.mkdir()
    (beside / "hid_init.py").write_text(INITIALIZER.replace("self.config.value", "-1.0"))
    with monkeypatch.context() as first:
        first.syspath_prepend(beside)
        assert value_of("hid") == -1.0
    (message,) = [one.getMessage() for one in caplog.records if "hid-init" in one.getMessage()]
    named = re.search(r"was imported from (.+?), which is not .*Next: start in another folder, or rename that", message)
    assert named is not None
    if way == "rename":
        Path(named[1]).rename(beside / "mine.py")
        monkeypatch.syspath_prepend(beside)
    foreign.forget()
    importlib.invalidate_caches()
    assert value_of("hid") == 3.0


@executes("kinds/contract.py", "Next: {}")
@executes("cli/kinds.py", "fix: {}", "Next: python -m pytest, with noether_init_core.testing")
def test_a_class_that_breaks_the_contract_is_mended_by_its_fixes(
    foreign: ForeignPackages, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The advised command prints each fix; a newer release, as pip would bring it, is used then."""
    broken = INITIALIZER.replace("def init_weights(self, model)", "def init_weights(self, module)").replace(
        "model.parameters", "module.parameters"
    )
    foreign.install("odd-init", offers={"odd": f"odd_init:{CLASS}"}, modules={"odd_init": broken})
    check = advised(lambda: value_of("odd")).partition("; if the package is not yours: ")[0]
    assert check == "ninit check odd"
    shown = run_command(monkeypatch, capsys, *check.split()[1:])
    assert shown.code == 1
    fix = shown.out.partition("fix: ")[2].partition("\n")[0]
    signature = re.search(r"def (init_weights\(.*?\))", fix)
    assert signature is not None, shown.out
    mended = INITIALIZER.replace("init_weights(self, model)", signature[1])
    (foreign.folder / "site" / "odd_init.py").write_text(
        mended.replace(
            "ConstantInitializer(InitializerBase):", f"{CLASS}(InitializerBase):\n    contract = {CONTRACT_VERSION}"
        )
    )
    foreign.forget()
    importlib.invalidate_caches()
    assert value_of("odd") == 3.0
    shown = run_command(monkeypatch, capsys, *check.split()[1:])
    assert shown.code == 0
    assert "Next: python -m pytest, with noether_init_core.testing" in shown.out


@executes("kinds/contract.py", "pip install --upgrade noether-init-core")
@executes("kinds/lookup.py", "pip install --upgrade {}")
def test_a_newer_release_is_used_after_the_upgrade(foreign: ForeignPackages, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the plugin whose class is broken, and of the core; the files are put there as pip would do it."""
    version = CONTRACT_VERSION + 1
    newer = INITIALIZER.replace(f"{CLASS}(InitializerBase):", f"{CLASS}(InitializerBase):\n    contract = {version}")
    old = foreign.install("odd-init", offers={"odd": f"odd_init:{CLASS}"}, modules={"odd_init": f"{CLASS} = 3\n"})
    upgrade = advised(lambda: value_of("odd"), "if the package is not yours: ")
    uninstalled(old)
    foreign.forget()
    foreign.install(
        upgrade.removeprefix("pip install --upgrade "),
        version="2.0",
        offers={"odd": f"odd_init:{CLASS}"},
        modules={"odd_init": newer},
    )
    importlib.invalidate_caches()
    assert advised(lambda: value_of("odd")) == "pip install --upgrade noether-init-core"
    monkeypatch.setattr(contract, "CONTRACT_VERSION", version)
    assert value_of("odd") == 3.0


@executes("kinds/lookup.py", "Next: ninit schema {}", "(kind=...), or a default in the class")
def test_the_schema_shows_what_a_constructor_and_a_config_take(
    foreign: ForeignPackages, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """What it lists is taken; a class that inherits its kind gets one, from the call or as a default."""
    torch.save(torch.nn.Linear(3, 2).state_dict(), tmp_path / "w.pt")
    before = digests(tmp_path)

    class Other(KindConfig):
        kind: str = "file"

    class Mine(FileInitializerConfig):
        extra: int = 0

    class Said(Mine):
        kind: str = "file"

    mistaken: dict[str, Callable[[], Any]] = {
        "previous_run": lambda: kinds.create({**wanted["previous_run"], "kwargs": {"strict": True}}),
        "file": lambda: kinds.create(Other()),
    }
    wanted = {
        "previous_run": {"kind": "previous_run", "run_id": "a", "output_path": "runs"},
        "file": {"kind": "file", "path": "w.pt"},
    }
    for kind, call in mistaken.items():
        command = advised(call)
        assert command == f"ninit schema {kind}"
        fields = json.loads(run_command(monkeypatch, capsys, *command.split()[1:]).out)["properties"]
        assert wanted[kind].keys() <= fields.keys()
        assert kinds.create(wanted[kind]).config.kind == kind
    said = advised(lambda: kinds.create(Mine(path=tmp_path / "w.pt")))
    assert said == "Mine(kind=...), or a default in the class"
    for config in (Mine(kind="file", path=tmp_path / "w.pt"), Said(path=tmp_path / "w.pt")):
        assert isinstance(kinds.create(config), FileInitializer)
    assert digests(tmp_path) == before


@executes("kinds/lookup.py", "Next: ninit kinds")
@pytest.mark.parametrize("config", [{"path": "w.pt"}, {"kind": 3, "path": "w.pt"}, ["file"], None])
def test_the_table_of_kinds_names_one_that_can_be_given(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], config: Any
) -> None:
    """A config without a kind, with a number as one, and what is no config."""
    command = advised(lambda: kinds.validate(config))
    shown = run_command(monkeypatch, capsys, *shlex.split(command)[1:])
    assert shown.code == 0
    assert re.search(r"\bfile\b", shown.out)
    assert isinstance(kinds.validate({"kind": "file", "path": "w.pt"}), FileInitializerConfig)


@executes("initializers/base.py", "kinds.create({...}) for a mapping")
def test_a_mapping_makes_an_initializer_as_advised() -> None:
    """The class itself takes a config."""
    config = {"kind": "file", "path": "w.pt"}
    said = advised(lambda: FileInitializer(config))
    expression = said.removesuffix(" for a mapping").replace("{...}", "config")
    made = eval(expression, {"kinds": kinds, "config": config})
    assert isinstance(made, FileInitializer)


@executes(
    "noether_init_random/__init__.py", "module.to_empty(device='cpu'); for a lazy module, pass one batch through it"
)
@executes("noether_init_random/__init__.py", "parameter.data = parameter.data.clone()")
@pytest.mark.parametrize("case", ["meta", "lazy", "expanded"])
def test_random_values_are_drawn_after_the_advised_call(case: str) -> None:
    """Into memory, into a shape, into elements of their own."""
    with torch.device("meta" if case == "meta" else "cpu"):
        module = torch.nn.LazyLinear(2) if case == "lazy" else torch.nn.Linear(3, 2)
    if case == "expanded":
        module.weight.data = torch.zeros(1).expand(2, 3)
    config = {"kind": "random", "seed": 1, "rules": [{"match": "**.weight", "init": "xavier_uniform_"}]}
    stack = InitializerStack.from_config([config])
    said = advised(lambda: stack.initialize(bind(module, "net")))
    if case == "lazy":
        assert "for a lazy module, pass one batch through it" in said
        module(torch.ones(1, 3))
    else:
        call = re.match(r"module\.to_empty\(device='cpu'\)|parameter\.data = parameter\.data\.clone\(\)", said)
        assert call is not None, said
        exec(call[0], {"module": module, "parameter": module.weight})
    stack.initialize(bind(module, "net"))
    assert module.weight.std() > 0


@executes("noether_init_random/__init__.py", "Next: initialize the model before that step")
@pytest.mark.parametrize("step", ["fully_shard", "inference_mode", "quantize"])
def test_random_values_are_drawn_before_the_step_that_prevents_it(step: str) -> None:
    """The values are those of the seed, and the step works on them."""
    config = {"kind": "random", "seed": 1, "rules": [{"match": "**", "init": "ones_"}]}
    stack = InitializerStack.from_config([config])

    def changed(module: torch.nn.Module) -> Any:
        if step == "fully_shard":
            from torch.distributed.fsdp import fully_shard

            return fully_shard(module, mesh=torch.distributed.device_mesh.init_device_mesh("cpu", (1,)))
        if step == "quantize":
            module.register_parameter("weight", torch.nn.Parameter(TwoTensor(module.weight, module.weight)))
            return module
        with torch.inference_mode():
            for name, value in list(module.named_parameters()):
                module.register_parameter(name, torch.nn.Parameter(value.detach().clone()))
        return module

    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        said = advised(lambda: stack.initialize(bind(changed(torch.nn.Linear(3, 2)), "net")))
        assert said.startswith("initialize the model before that step")
        module = torch.nn.Linear(3, 2)
        stack.initialize(bind(module, "net"))
        found = changed(module)(torch.ones(1, 3))
        assert (found.a if step == "quantize" else found).tolist() == [[4.0, 4.0]]
    finally:
        torch.distributed.destroy_process_group()


@executes("noether_init_pages/__init__.py", "Next: {}", "pip install --upgrade noether-init-pages")
def test_data_of_another_version_are_shown_by_a_newer_release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose files are put there as pip would do it; data without a version are taken from the value again."""
    torch.save(torch.nn.Linear(3, 2).state_dict(), tmp_path / "w.pt")
    stack = InitializerStack.from_config([{"kind": "file", "path": str(tmp_path / "w.pt")}])
    plan = stack.plan(bind(torch.nn.Linear(3, 2), "net"))
    for version in (None, 0, "1"):
        said = advised(functools.partial(html_page, {**plan.to_dict(), "version": version}))
        assert said == "pass the value itself, or its to_dict()"
    assert html_page(plan) == html_page(plan.to_dict())
    newer = {**plan.to_dict(), "version": 2}
    command = advised(lambda: html_page(newer))
    name = command.removeprefix("pip install --upgrade ")
    project = REPOSITORY / "plugins" / name
    assert tomllib.loads((project / "pyproject.toml").read_text("utf-8"))["project"]["name"] == name
    assert Path(noether_init_pages.__file__).is_relative_to(project)
    folder = tmp_path / "noether_init_pages"
    shutil.copytree(Path(noether_init_pages.__file__).parent, folder)
    code = (folder / "__init__.py").read_text("utf-8")
    assert "\n_VERSION = 1\n" in code
    (folder / "__init__.py").write_text(code.replace("\n_VERSION = 1\n", "\n_VERSION = 2\n"), "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "noether_init_pages")
    upgraded = importlib.import_module("noether_init_pages")
    assert upgraded.html_page(newer).startswith("<!doctype html>")
    monkeypatch.delitem(sys.modules, "noether_init_pages")
