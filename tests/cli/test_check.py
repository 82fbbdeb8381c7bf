"""``ninit check``: every finding with its fix, for a kind that is not run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.foreign import ForeignPackages
from typer.testing import CliRunner

from noether_init_core.cli import app
from noether_init_core.errors import KindConflictError, KindImportError, UnknownKindError

HEAD = "from noether_init_core import *\nfrom noether_init_core import InitializerBase, KindConfig\nimport pydantic\n"
GOOD = '''
from typing import ClassVar
import pydantic
from noether_init_core import InitializerBase, KindConfig

class Config(KindConfig):
    """The config."""
    value: float = pydantic.Field(default=0.0, description="The number.")

class K(InitializerBase):
    """A kind."""
    config_class: ClassVar[type[KindConfig]] = Config
    contract: ClassVar[int] = 1

    def check(self, model, trainer=None, callbacks=None): pass
    def init_weights(self, model): pass
    def init_optimizer(self, model): pass
'''


def install(foreign: ForeignPackages, name: str, source: str, *, complete: bool = True) -> None:
    """A distribution with one kind; ``complete`` metadata say what they require."""
    info = foreign.install(f"{name}-init", offers={name: f"{name}_check:K"}, modules={f"{name}_check": source})
    if complete:
        text = (info / "METADATA").read_text()
        more = "Requires-Python: >=3.11\nRequires-Dist: noether-init-core>=0.1\n"
        (info / "METADATA").write_text(text.replace("\n\n", f"\n{more}\n", 1))


def check(*arguments: str) -> tuple[int, str]:
    """Exit code and output."""
    done = CliRunner().invoke(app, ["check", *arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.stdout


def test_a_right_kind_has_no_finding(foreign: ForeignPackages) -> None:
    """Where it comes from, where its source is, and what to run next."""
    install(foreign, "right", GOOD)
    code, output = check("right")
    lines = output.splitlines()
    assert code == 0
    assert lines[0] == "right  right-init 1.0  right_check:K"
    assert lines[1].endswith("right_check.py")
    assert lines[2:] == [
        " = no problem found without running it",
        "problems: 0, advice: 0",
        "Next: python -m pytest, with noether_init_core.testing, which runs the kind",
    ]


def test_every_breach_of_the_contract_is_a_problem_with_a_fix(foreign: ForeignPackages) -> None:
    """All of them at once, and the exit code says it."""
    source = (
        f"{HEAD}class K(InitializerBase):\n    config_class = dict\n    contract = 0\n"
        "    def init_weights(self, module): pass\n    def init_optim(self, model): pass\n"
        "    async def init_trainer(self, trainer): pass\n    def check(self, model): pass\n"
        "    def __init__(self, config): pass\n"
    )
    install(foreign, "odd", source)
    code, output = check("odd", "--json")
    found = json.loads(output)
    assert code == 1
    assert (found["kind"], found["distribution"], found["version"]) == ("odd", "odd-init", "1.0")
    messages = [(one["severity"], one["message"].partition(",")[0].partition(":")[0]) for one in found["findings"]]
    assert messages == [
        ("problem", "contract is 0"),
        ("problem", "config_class is <class 'dict'>"),
        ("problem", "init_optimizer(model) is not implemented"),
        ("problem", "__init__ cannot be called with (config"),
        ("problem", "init_optim is not a hook and would never be called; did you mean init_optimizer?"),
        ("problem", "init_trainer is async"),
        ("problem", "init_weights takes module"),
        ("problem", "check cannot be called with (model"),
    ]
    assert all(one["fix"] for one in found["findings"])
    shown = check("odd")[1]
    assert " x init_weights takes module, which would never be filled; it may take: model, initializer\n" in shown
    assert "   fix: def init_weights(self, model): ...\n" in shown
    assert shown.endswith("problems: 8, advice: 0\n")


def test_what_will_trouble_later_is_advice(foreign: ForeignPackages) -> None:
    """The kind can be used, so the exit code is 0; each piece of advice has its fix."""
    source = (
        f"{HEAD}from typing import Callable\nclass Inner(pydantic.BaseModel):\n    depth: int = 1\n"
        "class Config(KindConfig):\n    inner: Inner = Inner()\n    call: Callable[[], int] | None = None\n"
        "class K(InitializerBase):\n    config_class = Config\n"
        "    def init_weights(self, model): pass\n    def init_optimizer(self, model): pass\n"
    )
    install(foreign, "later", source, complete=False)
    code, output = check("later", "--json")
    found = [one["message"] for one in json.loads(output)["findings"]]
    assert code == 0
    assert [message.partition(",")[0] for message in found] == [
        "later-init does not require noether-init-core",
        "later-init does not declare the versions of Python that it supports",
        "it does not declare the contract that it was written for",
        "it has no check",
        "the key inner has no description",
        "the key inner.depth has no description",
        "the key call has no description",
        "Inner",
        "its config has no JSON schema",
    ]
    assert {one["severity"] for one in json.loads(output)["findings"]} == {"advice"}


@pytest.mark.parametrize(("source", "what"), [("K = 3\n", "of type int"), ("class K: pass\n", "a class")])
def test_what_is_no_initializer_is_a_problem(source: str, what: str, foreign: ForeignPackages) -> None:
    """An entry point that leads to something else."""
    name = "number" if "3" in source else "stranger"
    install(foreign, name, source)
    code, output = check(name)
    assert code == 1
    assert f" x {name}_check:K is {what}, not a subclass of InitializerBase\n" in output


def test_nothing_of_the_kind_is_called(foreign: ForeignPackages, tmp_path: Path) -> None:
    """The class is looked at; its constructor and its hooks would leave a mark."""
    mark = tmp_path / "called"
    body = f"open({str(mark)!r}, 'w').close()"
    source = GOOD.replace("model): pass", f"model): {body}") + f"    def __init__(self, config, **rest): {body}\n"
    install(foreign, "quiet", source)
    assert check("quiet")[0] == 0
    assert not mark.exists()


def test_a_kind_that_cannot_be_found_or_imported_is_the_error_that_its_users_get(
    foreign: ForeignPackages, capfd: pytest.CaptureFixture[str]
) -> None:
    """The plugin's own traceback comes first: its author needs the line."""
    install(foreign, "raising", "def connect():\n    raise RuntimeError('no licence')\nconnect()\n")
    with pytest.raises(KindImportError):
        check("raising")
    with pytest.raises(UnknownKindError):
        check("no_such_kind_anywhere")
    foreign.install("other-init", offers={"raising": "x:Y"})
    with pytest.raises(KindConflictError):
        check("raising")


def test_the_command_shows_the_traceback_of_the_plugin(foreign: ForeignPackages) -> None:
    """As a user types it: exit code 1, the traceback, then the message with the next command."""
    install(foreign, "raising", "def connect():\n    raise RuntimeError('no licence')\nconnect()\n")
    done = subprocess.run(
        [sys.executable, "-c", "from noether_init_core.cli import main; main()", "check", "raising"],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(foreign.folder / "site"), "PATH": ""},
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert "in connect\n" in done.stderr
    assert done.stderr.splitlines()[-1].startswith(
        'kind "raising" (raising-init 1.0): importing raising_check:K raised'
    )
    assert done.stderr.endswith('Next: python -c "from raising_check import K"\n')


SOURCE_HEAD = (
    "from typing import Literal\nimport pydantic\nfrom pydantic import Field\n"
    "from noether_init_core import KindConfig, Source, SourceInitializer, SourceInitializerConfig\n"
)


@pytest.mark.parametrize(
    ("config", "body", "finding"),
    [
        ("SourceInitializerConfig", "    def locate(self): ...\n", "locate cannot be called with"),
        ("SourceInitializerConfig", "    def locate(self, query): yield\n", "locate is a generator"),
        ("KindConfig", "    def locate(self, query): ...\n", "config_class C is no SourceInitializerConfig"),
    ],
)
def test_what_locates_files_is_held_to_more(config: str, body: str, finding: str, foreign: ForeignPackages) -> None:
    """A kind that could not work is found before it is used."""
    head = f"{SOURCE_HEAD}class C({config}): pass\nclass K(SourceInitializer):\n"
    source = f"{head}    contract = 1\n    config_class = C\n{body}"
    install(foreign, "locating", source)
    code, output = check("locating")
    assert code == 1
    assert f" x {finding}" in output


@pytest.mark.parametrize(
    ("field", "is_fine"),
    [
        ("on_nonfinite: bool = Field(default=True, description='d')", False),
        ("on_missing: str = Field(default='x', description='d')", False),
        ("submodel: int = Field(default=1, description='d')", False),
        ("verify: Literal['full'] = 'full'", True),
        ("folder: str = Field(description='d')", True),
    ],
)
def test_a_key_of_the_core_keeps_its_meaning(field: str, is_fine: bool, foreign: ForeignPackages) -> None:
    """Another meaning would switch off what it protects, without a word; fewer choices are fine."""
    source = (
        f"{SOURCE_HEAD}class C(SourceInitializerConfig):\n    {field}\n"
        "class K(SourceInitializer):\n    contract = 1\n    config_class = C\n"
        "    def locate(self, query): ...\n"
    )
    install(foreign, "keyed", source)
    code, output = check("keyed")
    assert (code == 0) is is_fine
    assert ("is the core's, with other values" in output) is not is_fine


def test_a_class_for_a_newer_contract_is_a_problem(foreign: ForeignPackages) -> None:
    """With the command that helps, instead of a clean bill."""
    install(foreign, "newer", GOOD.replace("contract: ClassVar[int] = 1", "contract: ClassVar[int] = 99"))
    code, output = check("newer")
    assert code == 1
    assert "   fix: pip install --upgrade noether-init-core\n" in output


def test_json_is_written_for_a_kind_that_cannot_be_imported(
    foreign: ForeignPackages, capsys: pytest.CaptureFixture[str]
) -> None:
    """A program that asks gets its object, and the exit code of a failure."""
    foreign.install("dotted-init", offers={"dotted": "dotted_module.K"})
    done = CliRunner().invoke(app, ["check", "dotted", "--json"])
    assert isinstance(done.exception, KindImportError)
    (finding,) = json.loads(done.stdout)["findings"]
    assert finding["severity"] == "problem"
    assert "The entry point has no colon. Write: dotted = package.module:ClassName" in finding["message"]
