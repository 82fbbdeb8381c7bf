"""Configs of OmegaConf and jsonargparse, by these libraries themselves; the package depends on neither."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pydantic
import pytest
from support.pages import ROOT, blocks_of

from noether_init_core import AnyInitializer, ConfigError, InitializerStack, PathProvider, kinds

PATHS = PathProvider("runs", "finetune")
FILE = """
initializers:
- kind: previous_run
  run_id: "2026_02_19"
- kind: file
  path: a.pt
  transforms:
  - drop: a.*
"""
EXPECTED = [
    {"kind": "previous_run", "run_id": "2026_02_19"},
    {"kind": "file", "path": Path("a.pt"), "transforms": [{"drop": ["a.*"]}]},
]


class Training(pydantic.BaseModel):
    """Somebody's pydantic config."""

    initializers: list[AnyInitializer] = []


class Experiment:
    """Somebody's class, whose arguments become options."""

    def __init__(
        self,
        lr: float = 0.1,
        initializers: Sequence[AnyInitializer] = (),
        teacher: AnyInitializer | None = None,
    ) -> None:
        self.initializers, self.teacher = initializers, teacher


def _dumped(stack: InitializerStack) -> list[dict[str, Any]]:
    return [one.config.model_dump(exclude_defaults=True) for one in stack.initializers]


@pytest.fixture
def omegaconf() -> Any:
    """``OmegaConf``, where the environment has it."""
    return pytest.importorskip("omegaconf", reason="make env installs omegaconf").OmegaConf


@pytest.fixture
def jsonargparse() -> Any:
    """``jsonargparse``, where the environment has it."""
    return pytest.importorskip("jsonargparse", reason="make env installs jsonargparse")


def test_interpolations_of_omegaconf_are_resolved_wherever_a_config_is_taken(omegaconf: Any) -> None:
    """A whole config, its list, one entry, and a field of a pydantic config; values of keys outside the list, too."""
    config = omegaconf.create(
        {"run": "pretrain", "initializers": [{"kind": "previous_run", "run_id": "${run}", "transforms": "${rules}"}]}
    )
    config.rules = [{"drop": ["${run}.*"]}]
    expected = [{"kind": "previous_run", "run_id": "pretrain", "transforms": [{"drop": ["pretrain.*"]}]}]
    given = (config.initializers, {"initializers": config.initializers}, omegaconf.masked_copy(config, "initializers"))
    for one in given[:2]:
        assert _dumped(InitializerStack.from_config(one, path_provider=PATHS)) == expected
    assert (
        kinds.create(config.initializers[0], path_provider=PATHS).config.model_dump(exclude_defaults=True)
        == expected[0]
    )
    for values in ({"initializers": config.initializers}, omegaconf.create({"initializers": expected})):
        (validated,) = Training.model_validate(values).initializers
        assert validated.model_dump(exclude_defaults=True) == expected[0]


def test_a_missing_value_of_omegaconf_names_its_key_in_the_whole_config(omegaconf: Any) -> None:
    """``???`` and an interpolation that leads nowhere; the argument for Hydra is that of the whole config."""
    config = omegaconf.create({"training": {"initializers": [{"kind": "previous_run", "run_id": "???"}]}})
    part = config.training.initializers
    words = "run_id: is ???, so that its value is missing. Next: set it, in Hydra by the argument "
    words += "training.initializers.0.run_id=..."
    with pytest.raises(ConfigError) as caught:
        InitializerStack.from_config(part, path_provider=PATHS)
    assert str(caught.value) == f"initializers.0.{words}"
    with pytest.raises(ConfigError) as caught:
        kinds.create(part[0], path_provider=PATHS)
    assert str(caught.value) == words
    with pytest.raises(pydantic.ValidationError) as refused:
        Training(initializers=part)
    (error,) = refused.value.errors()
    assert (error["loc"], error["msg"]) == (
        ("initializers", 0, "run_id"),
        f"Value error, {words.removeprefix('run_id: ')}",
    )
    part[0].run_id = "${nowhere}"
    with pytest.raises(
        ConfigError, match=r"^initializers\.0\.run_id: cannot be read: InterpolationKeyError: .*'nowhere'"
    ):
        InitializerStack.from_config(part, path_provider=PATHS)


def test_a_whole_config_of_omegaconf_may_have_all_keys_of_ours(omegaconf: Any) -> None:
    """The constructor of a stack, which takes initializers, says what builds one of a config."""
    config = omegaconf.create({"auto_resume": False, "initializers": [{"kind": "file", "path": "a.pt"}]})
    assert _dumped(InitializerStack.from_config(config)) == [{"kind": "file", "path": Path("a.pt")}]
    with pytest.raises(ConfigError, match=r"not a DictConfig\. Next: InitializerStack\.from_config\(config\)"):
        InitializerStack(config)


def test_an_integer_of_omegaconfs_yaml_is_refused(omegaconf: Any, tmp_path: Path) -> None:
    """Its loader turns 2026_02_19 into 20260219, too."""
    (tmp_path / "config.yaml").write_text("initializers: [{kind: previous_run, run_id: 2026_02_19}]")
    with pytest.raises(ConfigError, match=r"initializers\.0\.run_id: run_id 20260219 is an integer"):
        InitializerStack.from_config(omegaconf.load(tmp_path / "config.yaml"), path_provider=PATHS)


def _parser(jsonargparse: Any) -> Any:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_argument("--initializers", type=list[AnyInitializer], default=[])
    parser.add_argument("--teacher", type=AnyInitializer)
    return parser


@pytest.mark.parametrize(
    "arguments",
    [
        ["--config=init.yaml"],
        [
            '--initializers=[{"kind": "previous_run", "run_id": "2026_02_19"}]',
            "--initializers+={kind: file, path: a.pt, transforms: [{drop: a.*}]}",
        ],
        [
            "--initializers+={kind: previous_run}",
            "--initializers.run_id=2026_02_19",
            "--initializers+={kind: file}",
            "--initializers.path=a.pt",
            "--initializers.transforms=[{drop: a.*}]",
        ],
    ],
    ids=["file", "json", "keys"],
)
def test_jsonargparse_reads_a_list_of_initializers(
    jsonargparse: Any, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a file and from the command line; every key of the kind is kept, and the dump reads back."""
    monkeypatch.chdir(tmp_path)
    Path("init.yaml").write_text(FILE)
    parser = _parser(jsonargparse)
    parsed = parser.parse_args(arguments)
    assert _dumped(InitializerStack.from_config(parsed.initializers, path_provider=PATHS)) == EXPECTED
    again = parser.parse_string(parser.dump(parsed))
    assert again.initializers == parsed.initializers
    assert _dumped(InitializerStack.from_config(again.initializers, path_provider=PATHS)) == EXPECTED


def test_jsonargparse_reads_one_initializer_key_by_key(jsonargparse: Any) -> None:
    """A text on the command line stays a text, without quotes."""
    parser = _parser(jsonargparse)
    parsed = parser.parse_args(
        ["--teacher.kind=previous_run", "--teacher.run_id=2026_02_19", "--teacher.verify=header"]
    )
    assert parsed.teacher == {"kind": "previous_run", "run_id": "2026_02_19", "verify": "header"}
    assert kinds.create(parsed.teacher, path_provider=PATHS).config.kind == "previous_run"
    whole = parser.parse_args(["--teacher={kind: file, path: a.pt}"])
    assert _dumped(InitializerStack.from_config([whole.teacher])) == [{"kind": "file", "path": Path("a.pt")}]
    assert parser.parse_args([]).teacher is None


def test_jsonargparse_makes_an_instance_of_a_class_with_initializers(jsonargparse: Any) -> None:
    """The arguments are those of its constructor; a pydantic model gets validated configs."""
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Experiment, "experiment")
    parser.add_class_arguments(Training, "training")
    parsed = parser.parse_args(
        [
            "--experiment.initializers=[{kind: file, path: a.pt}]",
            "--experiment.teacher.kind=file",
            "--experiment.teacher.path=b.pt",
            "--training.initializers=[{kind: file, path: c.pt}]",
        ]
    )
    made = parser.instantiate(parsed)
    stack = InitializerStack.from_config([*made.experiment.initializers, made.experiment.teacher])
    assert [config["path"] for config in _dumped(stack)] == [Path("a.pt"), Path("b.pt")]
    (validated,) = made.training.initializers
    assert validated.model_dump(exclude_defaults=True) == {"kind": "file", "path": Path("c.pt")}


@pytest.mark.parametrize("library", ["omegaconf", "jsonargparse"])
def test_the_example_of_the_page_runs(library: str) -> None:
    """It builds the stack of one initializer."""
    pytest.importorskip(library, reason=f"make env installs {library}")
    page = (ROOT / "docs" / "use" / "config-files.md").read_text()
    (block,) = [one for one in blocks_of(page) if f"from {library} import" in one.text]
    names: dict[str, Any] = {"InitializerStack": InitializerStack, "paths": PATHS}
    exec(block.text, names)
    run_id = {"omegaconf": "pretrain", "jsonargparse": "2026_02_19"}[library]
    assert _dumped(names["stack"]) == [{"kind": "previous_run", "run_id": run_id}]


def test_neither_library_is_imported_by_the_package() -> None:
    """Not for configs of plain Python, and not with the field type."""
    code = (
        "import sys; from noether_init_core import AnyInitializer, InitializerStack; "
        "InitializerStack.from_config([{'kind': 'file', 'path': 'a.pt'}]); "
        "print(sorted({'omegaconf', 'hydra', 'jsonargparse', 'PyInstaller'} & set(sys.modules)))"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert finished.stdout == "[]\n"
