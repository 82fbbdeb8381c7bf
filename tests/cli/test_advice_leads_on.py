"""What commands, configs and the template of a package advise is done here, and leads on."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.advice import digests, executes, saw
from support.command import Invoke, Result, console
from support.following import advised

from noether_init_core import CheckpointWriter, InitializerStack, PathProvider, TrainerState, bind


@pytest.fixture
def invoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Invoke]:
    """The console script in an empty folder."""
    with console(tmp_path, monkeypatch, capsys) as call:
        yield call


def told(result: Result) -> str:
    """What an error says, in one line."""
    assert result.code in (1, 2), result.out
    return saw(" ".join(result.err.replace("│", " ").split()))


@executes("scaffold/package.py", "Next: {} {}", "Next: {}", "mkdir -p {}, or another --into")
@executes("scaffold/package.py", "--author 'Jane Doe' or --author 'Jane Doe <jane@example.org>', on one line")
@pytest.mark.parametrize(
    "arguments",
    [
        ("new", "MyKind"),
        ("new", "demo", "--kind", "My-Kind"),
        ("new", "demo", "--distribution", "Acme Init"),
        ("new", "resume"),
        ("new", "demo", "--kind", "resume"),
        ("new", "core"),
        ("new", "random"),
        ("new", "demo", "--distribution", "attrs"),
        ("new", "demo", "--author", "Doe, Jane"),
        ("new", "demo", "--into", "a folder/below"),
    ],
)
def test_a_package_that_is_refused_is_written_as_advised(invoke: Invoke, arguments: tuple[str, ...]) -> None:
    """With the other name, author or folder; the folder that exists is left alone."""
    said = told(invoke(*arguments)).rpartition("Next: ")[2].rstrip(" ╯╰─")
    first = re.split(r", or another| or --author", said)[0]
    words = shlex.split(first)
    if words[0] == "mkdir":
        Path(words[-1]).mkdir(parents=True)
        words = list(arguments)
    elif words[0] == "ninit":
        words = words[1:]
    elif words[0] in arguments:
        at = arguments.index(words[0])
        words = [*arguments[:at], *words, *arguments[at + 2 :]]
    else:
        words = [*arguments, *words]
    done = invoke(*words)
    assert done.code == 0, done.err
    assert list(Path().rglob("pyproject.toml"))


@executes("scaffold/package.py", "Next: --into another folder")
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs a folder that not even root can write to")
def test_a_package_is_written_into_another_folder(invoke: Invoke) -> None:
    """Where the first one takes no files."""
    said = told(invoke("new", "demo", "--into", "/proc"))
    assert "could not be written, and no file was left" in said
    option = re.search(r"Next: (--into) another folder", said)
    assert option is not None
    Path("mine").mkdir()
    assert invoke("new", "demo", option[1], "mine").code == 0
    assert Path("mine/demo/pyproject.toml").is_file()


@executes("cli/contents.py", "ninit inspect {}")
@executes("cli/config.py", "--out {}")
def test_runs_and_models_are_named_one_by_one(invoke: Invoke) -> None:
    """The first run of a folder; a file for each model."""
    for name in ("a b", "second"):
        CheckpointWriter(PathProvider("runs", name)).save(
            bind(torch.nn.Linear(3, 2), "net"), trainer=TrainerState(seed=0)
        )
    before = digests(Path())
    shown = invoke("inspect", "runs").out
    command = shown.rpartition("Next: ")[2].strip()
    assert invoke(*shlex.split(command)[1:]).code == 0
    torch.save(torch.nn.Linear(3, 2).state_dict(), "w.pt")
    Path("init.yaml").write_text(
        "initializers:\n  - {kind: file, path: w.pt, submodel: one}\n  - {kind: file, path: w.pt, submodel: two}\n"
    )
    Path("leads_pair.py").write_text(
        "import torch\nfrom noether_init_core import bind, compose\n\n\ndef build():\n"
        "    return compose('net', {n: bind(torch.nn.Linear(3, 2), n) for n in ('one', 'two')})\n"
    )
    apply = ("apply", "init.yaml", "--model", "leads_pair:build", "--out")
    option = told(invoke(*apply, "start.pt")).rpartition("Next: --out ")[2].rstrip(" ╯╰─")
    assert invoke(*apply, *shlex.split(option)).code == 0
    assert len(list(Path().glob("start-*.pt"))) == 2
    assert before.items() <= digests(Path()).items()
    sys.modules.pop("leads_pair", None)


@executes("config/document.py", "indent with spaces; YAML allows no tabs")
def test_tabs_are_replaced_by_spaces(invoke: Invoke) -> None:
    """As the message says."""
    Path("init.yaml").write_text("initializers:\n\t- {kind: file, path: w.pt}\n")
    assert "Next: indent with spaces; YAML allows no tabs" in told(invoke("validate", "init.yaml"))
    Path("init.yaml").write_text(Path("init.yaml").read_text().replace("\t", "  "))
    assert invoke("validate", "init.yaml").code == 0


@executes("config/plain.py", "set it, in Hydra by the argument {}=...", "correct {} in the config")
@pytest.mark.parametrize(("value", "mark"), [("???", "by the argument "), ("${absent}", "correct ")])
def test_a_value_of_hydra_that_is_lacking_is_set(value: str, mark: str) -> None:
    """By the argument that the message shows, as Hydra would; a wrong reference is corrected."""
    omegaconf = pytest.importorskip("omegaconf")
    config = omegaconf.OmegaConf.create({"initializers": [{"kind": "file", "path": value}]})
    key = advised(lambda: InitializerStack.from_config(config), mark).partition("=...")[0].partition(" in the")[0]
    omegaconf.OmegaConf.update(config, key, "w.pt")
    assert InitializerStack.from_config(config) is not None


@executes("cli/output.py", "Next: ninit plan {} --model {}{}", "Next: ninit, which lists runs and configs here")
@pytest.mark.parametrize("folder", ["", "code here/"])
def test_a_module_is_given_beside_a_config(invoke: Invoke, folder: str) -> None:
    """It is no checkpoint; with a config in the folder, the command that takes it is shown, and works."""
    path = Path(f"{folder}leads_module.py")
    path.parent.mkdir(exist_ok=True)
    path.write_text("import torch\n\n\ndef build():\n    return torch.nn.Linear(3, 2)\n")
    said = told(invoke("inspect", str(path)))
    assert "is a Python file, not a checkpoint" in said
    assert said.endswith("Next: ninit, which lists runs and configs here")
    assert invoke().code == 0
    torch.save(torch.nn.Linear(3, 2).state_dict(), "w.pt")
    Path("other.yaml").write_text("initializers: [{kind: file, path: w.pt}]\n")
    said = told(invoke("inspect", str(path)))
    result = invoke(*shlex.split(said.partition("Next: ninit ")[2]))
    assert result.code == 0, result
    assert "2 of 2 keys loaded" in result.out
    sys.modules.pop("leads_module", None)


@executes("suggest/rules.py", "write the rules by hand, such as")
@pytest.mark.parametrize("number", [0, 1])
def test_rules_that_suggest_shows_can_be_written(invoke: Invoke, number: int) -> None:
    """Below the file, one or the other: the plan takes it, and names what is left."""
    torch.save({"first": torch.ones(2, 3), "second": torch.ones(4)}, "w.pt")
    Path("leads_rules.py").write_text(
        "import torch\n\n\ndef build():\n    one = torch.nn.Module()\n"
        "    one.alpha = torch.nn.Parameter(torch.zeros(2, 2))\n"
        "    one.omega = torch.nn.Parameter(torch.zeros(2, 2))\n    return one\n"
    )
    Path("init.yaml").write_text("initializers:\n  - {kind: file, path: w.pt}\n")
    model = ("--model", "leads_rules:build")
    shown = invoke("suggest", "init.yaml", *model).out
    assert "Next: write the rules by hand, such as" in shown, shown
    lines = [line.lstrip("# ") for line in shown.partition("such as\n")[2].splitlines()]
    rules: list[Any] = [yaml.safe_load(line.removeprefix("- ")) for line in lines if line.startswith("- ")]
    # together they would contradict each other: an entry that is kept takes nothing from the file
    assert rules == [{"from": "first", "to": "alpha"}, {"keep_model": "alpha"}]
    assert "or, where the file has no such entry" in shown
    before = invoke("plan", "init.yaml", *model)
    entry = {"kind": "file", "path": "w.pt", "transforms": [rules[number]]}
    Path("init.yaml").write_text(yaml.safe_dump({"initializers": [entry]}))
    after = invoke("plan", "init.yaml", *model)
    assert before.code == after.code == 1
    assert "alpha" in before.out
    assert ("mismatch alpha" if number == 0 else "keep alpha") in " ".join(after.out.split())
    assert "missing omega" in " ".join(after.out.split())
    sys.modules.pop("leads_rules", None)


@executes("cli/output.py", 'pip install "noether-init-core[pages]"')
def test_pages_are_written_after_the_install(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    """The extra is one of the distribution, and brings the package that is searched for."""
    import importlib.metadata
    import importlib.util

    torch.save(torch.nn.Linear(3, 2).state_dict(), "w.pt")
    Path("init.yaml").write_text("initializers:\n  - {kind: file, path: w.pt}\n")
    Path("leads_page.py").write_text("import torch\n\n\ndef build():\n    return torch.nn.Linear(3, 2)\n")
    plan = ("plan", "init.yaml", "--model", "leads_page:build", "--html", "plan.html")
    find = importlib.util.find_spec
    with monkeypatch.context() as absent:
        absent.setattr(
            importlib.util, "find_spec", lambda name, *more: None if name == "noether_init_pages" else find(name)
        )
        named = re.search(r'pip install "([\w-]+)\[(\w+)\]"', told(invoke(*plan)))
    assert named is not None
    required = importlib.metadata.requires(named[1]) or []
    assert any(
        one.startswith("noether-init-pages") and f'extra == "{named[2]}"' in one.replace("'", '"') for one in required
    )
    assert invoke(*plan).code == 0
    sys.modules.pop("leads_page", None)
