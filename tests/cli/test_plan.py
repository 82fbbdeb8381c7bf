"""``ninit plan``: the model that it builds, what it prints and writes, its exit codes and messages."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from safetensors.torch import save_file
from support.command import Result, run_command
from support.foreign import INITIALIZER, ForeignPackages

from noether_init_core import CheckpointWriter, PathProvider, TrainingIteration, bind

MODELS = """
import torch
from noether_init_core import bind, compose

BUILT = []


def network(classes=4):
    print("building")
    made = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Linear(8, classes))
    BUILT.append(made[0].weight.device.type)
    return made


class Wide(torch.nn.Sequential):
    def __init__(self):
        super().__init__(torch.nn.Linear(6, 8), torch.nn.Linear(8, 10))

    @staticmethod
    def make():
        return Wide()


def named():
    return bind(network(), name="net")


def wide():
    return bind(Wide(), name="net")


def both():
    return compose("pair", {"left": bind(network(), name="left"), "right": bind(network(), name="right")})


def sized(classes, *rest, depth=2):
    return network(classes)


def reads_values():
    return helper()


def helper():
    return network() if torch.ones(3).sum().item() else None


def nothing():
    return None


ready = network()
number = 3
"""


Plan = Callable[..., Result]


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Plan]:
    """Call the console script's function as the shell would, in a folder with a module of models and a run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "plan_models.py").write_text(MODELS)
    for name in ("plan_models", "plan_broken", "plan_lacking", "plan_script"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    network = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Linear(8, 4))
    save_file(network.state_dict(), tmp_path / "w.safetensors")
    model = bind(network, name="net", optimizer=torch.optim.AdamW(network.parameters()))
    CheckpointWriter(PathProvider("runs", "pretrain")).save(model, TrainingIteration(1, 2, 3))
    write("file.yaml", "kind: file, path: w.safetensors")
    write("run.yaml", "kind: previous_run, run_id: pretrain, load_optim: false")
    write("resume.yaml", "kind: resume")

    def call(*arguments: Any) -> Result:
        return run_command(monkeypatch, capsys, "plan", *arguments)

    yield call
    for name in ("plan_models", "plan_broken", "plan_lacking", "plan_script"):
        sys.modules.pop(name, None)


def write(name: str, *entries: str) -> Path:
    path = Path(name)
    path.write_text("initializers:\n" + "".join(f"  - {{{entry}}}\n" for entry in entries))
    return path


def test_where_all_is_well_there_is_one_line_and_exit_code_0(plan: Plan) -> None:
    """What the user's code prints is not mixed into it."""
    result = plan("file.yaml", "--model", "plan_models:network")
    assert (result.code, result.out) == (
        0,
        "file  w.safetensors   4 of 4 keys loaded, 92 parameters, coverage 100 %\n",
    )
    assert result.err == "building\nbuilding\n"


def test_a_plan_with_problems_is_exit_code_1_and_shows_the_fix(plan: Plan) -> None:
    """The set is committed; a head of another size gets the line that keeps the model's own."""
    result = plan("run.yaml", "--model", "plan_models:wide", "--runs", "runs")
    assert (result.code, result.err) == (1, "building\n")
    assert result.out.splitlines() == [
        "previous_run  pretrain @ latest = E1_U2_S3   committed, digests present",
        " = load      0.*       2 keys  56",
        " x mismatch  1.weight   1 key  80  file [4,8]  model [10,8]",
        " x mismatch  1.bias     1 key  10  file [4]  model [10]",
        "   fix: patterns_to_instantiate: ['1.']  # in initializers.0, run.yaml:2",
        "coverage 38.4 %   1 problem   nothing was changed   (--all unfolds)",
    ]


def test_all_is_a_line_for_every_key(plan: Plan) -> None:
    """Also where all is well."""
    lines = plan("file.yaml", "--model", "plan_models:network", "--all").out.splitlines()
    assert [line.split()[:3] for line in lines[1:-1]] == [
        ["=", "load", name] for name in ("0.weight", "0.bias", "1.weight", "1.bias")
    ]


def test_sixty_columns_are_enough(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """No line is cut off or runs over."""
    monkeypatch.setenv("COLUMNS", "60")
    out = plan("run.yaml", "--model", "plan_models:wide", "--runs", "runs").out
    assert max(map(len, out.splitlines())) <= 60
    assert "model [10,8]" in out


def test_the_model_is_built_on_the_meta_device_unless_real(plan: Plan) -> None:
    """It needs no memory for a plan; code that looks at values asks for ``--real``."""
    assert plan("file.yaml", "--model", "plan_models:network").code == 0
    assert sys.modules["plan_models"].BUILT == ["cpu", "meta"]
    assert plan("file.yaml", "--model", "plan_models:network", "--real").code == 0
    assert sys.modules["plan_models"].BUILT == ["cpu", "meta", "cpu"]
    failed = plan("file.yaml", "--model", "plan_models:reads_values")
    assert (failed.code, failed.out) == (1, "")
    lines = failed.err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[1].endswith("in reads_values"), "frames of the command itself are left out"
    assert any(line.endswith("in helper") for line in lines)
    assert lines[-1].startswith("--model: plan_models:reads_values() failed: RuntimeError: ")
    assert lines[-1].endswith("It was built on the meta device, where tensors have no values. Next: --real")
    assert plan("file.yaml", "--model", "plan_models:reads_values", "--real").code == 0


@pytest.mark.parametrize("said", ["named", "ready", "Wide.make", "Wide"])
def test_modules_bound_models_and_classes_will_do(plan: Plan, said: str) -> None:
    """Also one that was built when its module was imported, and a dotted name."""
    result = plan("file.yaml", "--model", f"plan_models:{said}", "--json", "-")
    found = json.loads(result.out)
    assert found["origins"][0]["model"] == ("net" if said == "named" else "model")
    assert result.code == (1 if "Wide" in said else 0)


def test_a_plain_module_is_named_by_an_option(plan: Plan) -> None:
    """Names of files begin with it; a bound model's own name gives way to it."""
    assert "pretrain" in plan("run.yaml", "--model", "plan_models:network", "--runs", "runs", "--model-name", "net").out
    missing = plan("run.yaml", "--model", "plan_models:named", "--runs", "runs", "--model-name", "other")
    assert missing.code == 1
    assert "other" in missing.err


def test_a_composite_is_planned_part_by_part(plan: Plan) -> None:
    """Each with its model's path of names."""
    write(
        "file.yaml",
        "kind: file, path: w.safetensors, submodel: left",
        "kind: file, path: w.safetensors, submodel: right",
    )
    assert [line.split("   ")[0] for line in plan("file.yaml", "--model", "plan_models:both").out.splitlines()] == [
        "file  pair.left <- w.safetensors",
        "file  pair.right <- w.safetensors",
    ]


@pytest.mark.parametrize("where", ["-", "plan.json"])
def test_json_is_for_programs(plan: Plan, where: str) -> None:
    """On standard output nothing else is printed; to a file, the plan for people is printed beside it."""
    result = plan("run.yaml", "--model", "plan_models:wide", "--runs", "runs", "--json", where)
    data = json.loads(result.out if where == "-" else Path(where).read_text())
    schema = json.loads((Path(__file__).resolve().parents[2] / "docs" / "plan.schema.json").read_text())
    jsonschema.validate(data, schema, jsonschema.Draft202012Validator)
    assert (result.code, data["counts"]) == (1, {"load": 2, "mismatch": 2})
    assert ("coverage" in result.out.splitlines()[-1]) == (where != "-")


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("plan_models", "'plan_models' is not module:callable"),
        ("plan_models:", "'plan_models:' is not module:callable"),
        (":network", "':network' is not module:callable"),
        ("plan_modles:network", "module 'plan_modles' not found. Near: plan_models"),
        ("plan_models.deep:network", "module 'plan_models.deep' not found"),
        ("zzz:network", "module 'zzz' not found. Next: --app-dir FOLDER"),
        ("plan_models:netwrk", "'netwrk' not found in plan_models. Near: network"),
        ("plan_models:Wide.mak", "'mak' not found in plan_models.Wide. Near: make"),
        (
            "plan_models:sized",
            "plan_models:sized: missing a required argument: 'classes'. Next: write a function without",
        ),
        ("plan_models:nothing", "plan_models:nothing returned a NoneType, not a module, a bound model or a composite"),
        ("plan_models:number", "plan_models:number is an int, which cannot be called"),
    ],
)
def test_a_wrong_model_is_wrong_usage(plan: Plan, monkeypatch: pytest.MonkeyPatch, said: str, message: str) -> None:
    """Exit code 2, what is there instead, and no traceback."""
    monkeypatch.setenv("COLUMNS", "300")
    result = plan("file.yaml", "--model", said)
    assert (result.code, result.out) == (2, "")
    assert f"Invalid value for --model: {message}" in result.err
    assert "Traceback" not in result.err


@pytest.mark.parametrize(
    ("name", "source", "message"),
    [
        ("plan_broken", "def build(:\n", "importing plan_broken for --model plan_broken:build failed: SyntaxError: "),
        ("plan_lacking", "import absent_package\n", "failed: ModuleNotFoundError: No module named 'absent_package'"),
        ("plan_script", "import sys\nsys.exit('done')\n", "failed: SystemExit: done"),
    ],
)
def test_a_module_that_cannot_be_imported_shows_its_traceback(plan: Plan, name: str, source: str, message: str) -> None:
    """It is the user's code that is wrong, not what was typed: exit code 1."""
    Path(f"{name}.py").write_text(source)
    result = plan("file.yaml", "--model", f"{name}:build")
    assert (result.code, result.out) == (1, "")
    assert f"{name}.py" in result.err
    assert message in result.err.splitlines()[-1]


def test_the_module_is_sought_in_the_folder_that_is_named(plan: Plan, tmp_path: Path) -> None:
    """``--app-dir`` comes first on the import path."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "plan_models.py").rename(tmp_path / "elsewhere" / "plan_models.py")
    assert plan("file.yaml", "--model", "plan_models:network").code == 2
    assert plan("file.yaml", "--model", "plan_models:network", "--app-dir", "elsewhere").code == 0
    assert plan("file.yaml", "--model", "plan_models:network", "--app-dir", "absent").code == 2


def test_runs_are_told_by_options(plan: Plan) -> None:
    """Kinds that read from runs need the output root; those that continue one also its id."""
    arguments = ("resume.yaml", "--model", "plan_models:named")
    without = plan(*arguments)
    assert without.code == 1
    assert "Next: --runs FOLDER" in without.err.splitlines()[-1]
    new = plan(*arguments, "--runs", "runs")
    assert new.code == 1
    assert new.err.splitlines()[-1].endswith("is a placeholder, because --run-id was not given. Next: --run-id ID")
    assert plan(*arguments, "--runs", "runs", "--run-id", "pretrain").code == 0
    assert plan(*arguments, "--run-id", "pretrain").code == 2
    assert plan(*arguments, "--runs", "runs", "--run-id", "../x").code == 1


def test_nothing_is_changed_or_created(plan: Plan) -> None:
    """A plan reads headers."""
    before = sorted(Path().rglob("*"))
    assert plan("run.yaml", "--model", "plan_models:named", "--runs", "runs").code == 0
    assert [path for path in sorted(Path().rglob("*")) if "__pycache__" not in path.parts] == before


def test_errors_of_config_and_file_are_exit_code_1(plan: Plan) -> None:
    """Before the model is built, where that can be."""
    write("wrong.yaml", "kind: previous-run")
    wrong = plan("wrong.yaml", "--model", "plan_models:network")
    assert (wrong.code, wrong.out, "building" in wrong.err) == (1, "", False)
    assert 'no kind "previous-run"' in wrong.err
    write("absent.yaml", "kind: file, path: absent.safetensors")
    absent = plan("absent.yaml", "--model", "plan_models:network")
    assert (absent.code, "absent.safetensors" in absent.err) == (1, True)
    unwritable = plan("file.yaml", "--model", "plan_models:network", "--json", "absent/plan.json")
    assert (unwritable.code, "folder absent does not exist" in unwritable.err) == (2, True)
    assert plan("file.yaml").code == 2


def test_kinds_that_plan_nothing_are_named(plan: Plan, foreign: ForeignPackages) -> None:
    """A stranger's kind that writes weights by itself is not passed over in silence."""
    foreign.install("acme-init", offers={"constant": "plan_c:ConstantInitializer"}, modules={"plan_c": INITIALIZER})
    write("other.yaml", "kind: constant")
    result = plan("other.yaml", "--model", "plan_models:network")
    assert (result.code, result.out) == (0, "not planned: constant provides no plan\n")
    Path("none.yaml").write_text("initializers: []\n")
    result = plan("none.yaml", "--model", "plan_models:network")
    assert result.out == "nothing to plan: no initializer of the config loads weights\n"


def test_kinds_that_plan_nothing_are_asked_for_their_check(plan: Plan, foreign: ForeignPackages) -> None:
    """What a kind finds wrong beforehand is exit code 1, and code that needs values says how to get them."""
    refusing = "\n    def check(self, model, trainer=None, callbacks=None):\n        raise {error}\n"
    for name, error in (("refuses", "ConfigError('no such thing')"), ("breaks", "RuntimeError('meta tensor')")):
        source = "from noether_init_core.errors import ConfigError\n" + INITIALIZER + refusing.format(error=error)
        offers = {name: f"plan_{name}:ConstantInitializer"}
        foreign.install(f"acme-{name}", offers=offers, modules={f"plan_{name}": source})
        write(f"{name}.yaml", f"kind: {name}")
    refused = plan("refuses.yaml", "--model", "plan_models:network")
    assert (refused.code, refused.out) == (1, "x no such thing\n")
    broken = plan("breaks.yaml", "--model", "plan_models:network")
    assert broken.code == 1
    how = "Its traceback: NOETHER_INIT_TRACEBACK=1 before the command"
    assert broken.out == f"x breaks: RuntimeError: meta tensor. {how}\n"
    write("random.yaml", "kind: random, rules: [{match: '**', init: normal_}]")
    fine = plan("random.yaml", "--model", "plan_models:network")
    assert (fine.code, fine.out) == (0, "not planned: random provides no plan\n")


def test_help_ends_with_an_example(plan: Plan) -> None:
    """The last line can be copied."""
    lines = [line.strip() for line in plan("--help").out.splitlines() if line.strip()]
    assert lines[-1] == "Example: ninit plan init.yaml --model models:build"


def test_torch_is_imported_only_when_a_plan_is_made() -> None:
    """The other commands and the help of this one do without."""
    program = (
        "import sys\nfrom noether_init_core import cli\nsys.argv = ['ninit', 'plan', '--help']\n"
        "try:\n    cli.main()\nexcept SystemExit as ended:\n    assert not ended.code\n"
        "print([name for name in sys.modules if name in ('torch', 'numpy')])"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert output.splitlines()[-1] == "[]"
