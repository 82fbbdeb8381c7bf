"""What a message advises is done here, in the situation that prints it, and leads on; no file is written over."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.advice import digests, executes, pasted, typed
from support.command import Invoke, console

from noether_init_core import CheckpointWriter, InitializerStack, PathProvider, TrainerState, bind, kinds
from noether_init_core.errors import ConfigError, InitError, KindImportError, UnknownKindError

TRAIN = "import torch\n\n\ndef build():\n    return torch.nn.Linear(3, 2)\n\n\nLINEAR = torch.nn.Linear\n"


@pytest.fixture
def invoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Invoke]:
    """The console script in a folder with a model, runs, files and configs."""
    with console(tmp_path, monkeypatch, capsys, leads_train=TRAIN) as call:
        Path("init.yaml").write_text("initializers:\n  - {kind: file, path: w.pt}\n")
        Path("resume.yaml").write_text("auto_resume: true\ninitializers: []\n")
        Path("notes.txt").write_text("notes\n")
        module = torch.nn.Linear(3, 2)
        torch.save(module.state_dict(), "w.pt")
        for paths in (PathProvider("runs", "finetune"), PathProvider("runs", "staged", "train")):
            CheckpointWriter(paths).save(bind(module, "model"), trainer=TrainerState(seed=0))
        yield call


PLAN = "plan init.yaml --model leads_train:build"
#: What is typed -> what is advised; the advised line is typed next, or the option is added to what was typed.
COMMANDS = {
    "--json kinds": "ninit kinds --help",
    "plna": "ninit plan --help",
    "frobnicate": "ninit --help",
    "plan init.yaml": PLAN.replace("plan", "ninit plan", 1),
    "check": "ninit kinds",
    "schema": "ninit schema --all",
    "inspect rums": "ninit inspect runs",
    "inspect nothing-alike-here": "ninit inspect .",
    "inspect init.yaml": "ninit validate init.yaml",
    "verify ''": "ninit verify .",
    "lineage w.pt": "ninit lineage runs/finetune",
    "inspect runs/finetune@E9_U9_S9": "ninit inspect runs/finetune",
    "verify runs/finetune@latest": "ninit inspect runs/finetune",
    "lineage runs/finetune@latest": "ninit inspect runs/finetune",
    "diff runs/finetune runs/finetune/checkpoints": None,
    "validate inti.yaml": "ninit validate init.yaml",
    "validate w.pt": "ninit inspect w.pt",
    "example file": "ninit example file example",
    f"{PLAN} --html runs": "--html runs/plan.html",
    f"{PLAN} --html plan.txt": "--html plan.html",
    f"{PLAN} --json plan.txt": "--json plan.json",
    f"{PLAN} --html runs/finetune/checkpoints/plan.html": "--html plan.html",
    "plan init.yaml --model leads_train.py:build": "--model leads_train:build",
    "plan init.yaml --model leads_train:biuld": "--model leads_train:build",
    "plan init.yaml --model leads_train": "--model leads_train:build",
    "plan resume.yaml --model leads_train:build --runs runs --run-id staged": "--stage-name train",
}


@executes("cli/__init__.py", "ninit {} --help")
@executes("cli/usage.py", "Next: ninit {} --help", "Next: ninit --help", "Next: {}", "Next: ninit kinds")
@executes("cli/kinds.py", "ninit schema --all", "ninit example {} {}")
@executes("cli/output.py", "ninit inspect {}", "ninit validate {}", "Next: {} {}")
@executes("cli/contents.py", "ninit verify .")
@executes("cli/relations.py", "ninit lineage RUN_FOLDER")
@executes("cli/options.py", "--stage-name {}", "--model {}{}", "--model {}:{}", "Next: --model {}")
@executes("config/document.py", "ninit validate {}", "Next: {}")
@pytest.mark.parametrize("line", [line for line, advised in COMMANDS.items() if advised])
def test_the_advised_command_leads_on(invoke: Invoke, line: str) -> None:
    """It ends well, or names another problem, and every file is as it was."""
    following = COMMANDS[line]
    assert following is not None
    if line == "example file":
        assert invoke("example", "file", "--json").code in (0, 1)
    if line.startswith("inspect nothing"):
        Path("runs").rename("checkpoints_of_runs")
        Path("checkpoints_of_runs/finetune/checkpoints").rename("checkpoints")
    refused = invoke(*shlex.split(line))
    assert refused.code in (0, 1, 2)
    said = (refused.out + refused.err).replace("RUN_FOLDER", "runs/finetune")
    assert f"Next: {following}" in said, said
    before = digests(Path())
    words = shlex.split(following.removeprefix("ninit "))
    if following.startswith("--"):
        kept = shlex.split(line)
        if words[0] in kept:
            at = kept.index(words[0])
            del kept[at : at + 2]
        words = [*kept, *words]
    done = invoke(*words)
    assert done.code == 0 or refused.err not in done.err, done.out + done.err
    assert before.items() <= digests(Path()).items()


@executes("cli/output.py", "mkdir -p {}")
@executes("saving/file_writing.py", "mkdir -p {}", "Next: {}")
def test_a_folder_that_is_lacking_can_be_made(invoke: Invoke) -> None:
    """For a page, and for a file of weights; a suffix that is unknown becomes one that is known."""
    for arguments in (
        (*shlex.split(PLAN), "--json", "a b/plan.json"),
        ("apply", "init.yaml", "--model", "leads_train:build", "--out", "c d/start.safetensors"),
    ):
        refused = invoke(*arguments)
        assert refused.code in (1, 2)
        command = re.search(r"Next: (mkdir -p .*?)$", " ".join(refused.err.replace("│", " ").split()).rstrip("╯╰─ "))
        assert command is not None
        typed(command[1])
        assert invoke(*arguments).code == 0
    refused = invoke("apply", "init.yaml", "--model", "leads_train:build", "--out", "start.bin2")
    assert "Next: start.safetensors" in refused.err
    assert invoke("apply", "init.yaml", "--model", "leads_train:build", "--out", "start.safetensors").code == 0


@executes("cli/config.py", "another --out")
@executes("saving/file_writing.py", "choose another name, or use --force", "Next: another folder")
@executes("cli/output.py", "another name")
@executes("scaffold/package.py", "another name, or --into another folder")
def test_a_file_that_exists_stays_until_another_is_named(invoke: Invoke) -> None:
    """The file that is read, one of another program, one among checkpoints, and a package."""
    apply = ("apply", "init.yaml", "--model", "leads_train:build", "--out")
    Path("start.pt.report.json").write_text("{}")
    Path("plan.html").write_text("mine")
    Path("demo").mkdir()
    before = digests(Path())
    refused = {
        (*apply, "w.pt"): (*apply, "other.pt"),
        (*apply, "w.pt", "--force"): (*apply, "another.pt"),
        (*apply, "start.pt"): (*apply, "begin.pt"),
        (*apply, "runs/finetune/checkpoints/a.pt"): (*apply, "a.pt"),
        (*shlex.split(PLAN), "--html", "plan.html"): (*shlex.split(PLAN), "--html", "page.html"),
        ("new", "demo"): ("new", "demo2"),
    }
    for first, second in refused.items():
        result = invoke(*first)
        assert result.code in (1, 2), first
        assert "Next: " in " ".join(result.err.split())
        assert invoke(*second).code == 0, second
    assert before.items() <= digests(Path()).items()


@executes("links.py", "ls -l {}")
@pytest.mark.parametrize("name", ["w.pt", "run", "init.yaml", "folder/w.pt"])
@pytest.mark.parametrize("command", ["inspect", "verify", "diff", "lineage", "validate", "plan"])
def test_a_dangling_link_is_named(invoke: Invoke, name: str, command: str) -> None:
    """Not as a file that does not exist; itself is not offered as a near name."""
    link = Path("links", name.partition("/")[0])
    link.parent.mkdir()
    link.symlink_to("/nowhere/else")
    path = str(Path("links", name))
    if command == "plan":
        Path("init.yaml").write_text(f"initializers:\n  - {{kind: file, path: {path}}}\n")
    more = {"diff": ("w.pt",), "plan": ("--model", "leads_train:build")}.get(command, ())
    refused = invoke(command, "init.yaml" if command == "plan" else path, *more)
    assert refused.code in (1, 2)
    assert "is a link to /nowhere/else, which does not exist. Next: ls -l " in refused.err
    assert "Near" not in refused.err
    assert "/nowhere/else" in typed(refused.err.partition("Next: ")[2].partition(",")[0]).stdout


@pytest.fixture
def old_run() -> PathProvider:
    """A run as Noether wrote it before 2026-02-19: the info of an average behind the tag."""
    paths = PathProvider("runs", "old")
    folder = paths.checkpoint_path
    folder.mkdir(parents=True)
    for tag in ("latest", "E1_U4_S32"):
        content = {"training_iteration": {"epoch": 1, "update": 4, "sample": 32}, "checkpoint_tag": tag}
        for info, value in (("", 1.0), ("_ema=0.9", 2.0)):
            state = {"weight": torch.full((2, 3), value), "bias": torch.full((2,), value)}
            torch.save({"state_dict": state, **content}, folder / f"model_cp={tag}{info}_model.th")
    return paths


def loaded(fields: str) -> float:
    Path("run.yaml").write_text(f"initializers:\n  - {{kind: previous_run, {fields}}}\n")
    return started()


def started() -> float:
    module = torch.nn.Linear(3, 2)
    InitializerStack.from_file("run.yaml", path_provider=PathProvider("runs", "new")).initialize(bind(module, "model"))
    return float(module.bias[0].item())


@executes("sets/refusals.py", "Next: {}")
@pytest.mark.parametrize(
    ("old", "fields", "expected"),
    [
        (True, "run_id: old, model_info: ema=0.9", "{checkpoint_tag: latest_ema=0.9, model_info: null}"),
        (
            True,
            "run_id: old, model_info: ema=0.9, checkpoint_tag: E1_U4_S32",
            "{checkpoint_tag: E1_U4_S32_ema=0.9, model_info: null}",
        ),
        (False, "run_id: now, checkpoint_tag: latest_ema=0.9", "{checkpoint_tag: latest, model_info: ema=0.9}"),
        (False, "run_id: now, checkpoint_tag: ema=0.9", "{checkpoint_tag: latest, model_info: ema=0.9}"),
        (False, "run_id: now, checkpoint_tag: E0_ema=0.9", "{checkpoint_tag: E0, model_info: ema=0.9}"),
    ],
)
def test_averages_are_found_in_both_forms_of_noether(
    invoke: Invoke, old_run: PathProvider, old: bool, fields: str, expected: str
) -> None:
    """The info of an average stands behind the tag, or is a field of its own; the advised fields load the average."""
    average = {name: torch.full_like(value, 2.0) for name, value in torch.load("w.pt", weights_only=True).items()}
    module = torch.nn.Linear(3, 2)
    CheckpointWriter(PathProvider("runs", "now")).save(
        bind(module, "model"), trainer=TrainerState(seed=0), averages={"ema=0.9": average}
    )
    with pytest.raises(InitError) as refused:
        loaded(fields)
    assert f"Next: {expected}" in str(refused.value)
    pasted(Path("run.yaml"), expected, "initializers.0")
    document = yaml.safe_load(Path("run.yaml").read_text())
    entry = {key: value for key, value in document["initializers"][0].items() if value not in (None, "null")}
    Path("run.yaml").write_text(yaml.safe_dump({"initializers": [entry]}))
    assert started() == 2.0


@pytest.mark.parametrize(
    ("asked", "expected"),
    [("decoder", "net.decoder"), ("encoder", "net.encoder"), ("head", "net.head"), ("net", "net.decoder")],
)
def test_the_part_of_that_name_is_advised(invoke: Invoke, asked: str, expected: str) -> None:
    """Of a composite: the submodel whose name was given, not the one that is similar or first."""
    from noether_init_core import compose

    parts = {name: bind(torch.nn.Linear(3, 2), name) for name in ("encoder", "decoder", "head")}
    CheckpointWriter(PathProvider("runs", "parts")).save(compose("net", parts), trainer=TrainerState(seed=0))
    with pytest.raises(InitError) as refused:
        loaded(f"run_id: parts, model_name: {asked}")
    assert f"Next: model_name: {expected}" in str(refused.value)
    pasted(Path("run.yaml"), f"model_name: {expected}", "initializers.0")
    assert isinstance(started(), float)


@pytest.mark.parametrize("command", ["check", "schema", "example"])
def test_an_observer_is_not_a_kind_that_is_unknown(invoke: Invoke, command: str) -> None:
    """What to write is said, and it works; the other way round, too."""
    refused = invoke(command, "timing")
    assert refused.code == 1
    line = refused.err.partition("write ")[2].partition(" in the config")[0]
    Path("init.yaml").write_text(f"initializers:\n  - {{kind: file, path: w.pt}}\n{line}\n")
    assert invoke("validate", "init.yaml").code == 0
    Path("init.yaml").write_text("initializers: []\nobservers: [file]\n")
    shown = invoke("validate", "init.yaml").out
    assert "file is a kind: write initializers: [{kind: file}] in the config" in shown


def plugin(root: Path, version: str, points: str, more: str = "", folder: str = "") -> Path:
    """The metadata of a distribution acme-init and its module."""
    root.mkdir(parents=True, exist_ok=True)
    info = root / (folder or f"acme_init-{version}.dist-info")
    info.mkdir()
    name = "PKG-INFO" if folder.endswith("egg-info") else "METADATA"
    (info / name).write_text(f"Metadata-Version: 2.1\nName: acme-init\nVersion: {version}\n{more}")
    (info / "entry_points.txt").write_text(f"[noether_init.initializers]\n{points}")
    return info


@executes("kinds/hints.py", "remove or rename {}")
@pytest.mark.parametrize("folder", ["acme_init.egg-info", "acme_init-0.1.dist-info"])
def test_metadata_that_was_passed_over_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str) -> None:
    """Of two versions on the path, or a stale egg-info in the clone: the first counts, and the other has the kind."""
    stale = plugin(tmp_path / "clone", "0.1", "acme_old = acme_init:Kind\n", folder=folder)
    newer = plugin(tmp_path / "site", "0.2", "acme_new = acme_init:Kind\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.syspath_prepend(str(tmp_path / "clone"))
    kinds.clear_cache()
    try:
        with pytest.raises(UnknownKindError) as refused:
            kinds.describe("acme_new")
        said = str(refused.value)
        assert f"acme-init 0.2 ({newer}) provides it, and was passed over: acme-init 0.1 ({stale})" in said
        Path(said.partition("rename ")[2].partition(", or start")[0]).rename(tmp_path / "removed")
        assert kinds.describe("acme_new").version == "0.2"
    finally:
        kinds.clear_cache()


@executes("kinds/hints.py", 'pip install "{}[{}]"')
@pytest.mark.parametrize(
    ("points", "more", "expected"),
    [
        ("acme_gpu = acme_init:Kind [gpu]\n", "", "gpu"),
        ("acme_gpu = acme_init:Kind\n", 'Requires-Dist: absent-library>=2; extra == "cuda"\n', "cuda"),
        ("acme_gpu = acme_init:Kind\n", 'Requires-Dist: other-name; extra == "fast"\n', "fast"),
    ],
)
def test_an_extra_that_is_lacking_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, points: str, more: str, expected: str
) -> None:
    """By the entry point, or by what the extra requires; where the package is there, the kind is imported."""
    plugin(tmp_path / "site", "0.2", points, more)
    (tmp_path / "site" / "acme_init.py").write_text("import absent_library\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    kinds.clear_cache()
    try:
        with pytest.raises(KindImportError) as refused:
            kinds.load("acme_gpu")
        assert str(refused.value).endswith(f'Next: pip install "acme-init[{expected}]"')
        # as pip would: no network in tests
        (tmp_path / "site" / "absent_library.py").write_text("")
        (tmp_path / "site" / "acme_init.py").write_text("import absent_library\n\n\nclass Kind:\n    pass\n")
        importlib.invalidate_caches()
        assert kinds.load("acme_gpu")[0].name == "acme_gpu"
    finally:
        kinds.clear_cache()
        for name in ("acme_init", "absent_library"):
            sys.modules.pop(name, None)


def test_a_kind_installed_meanwhile_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As while a notebook runs: an unknown kind is searched for again."""
    (tmp_path / "site").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    kinds.clear_cache()
    try:
        with pytest.raises(UnknownKindError):
            kinds.describe("acme_late")
        plugin(tmp_path / "site", "0.3", "acme_late = acme_init:Kind\n")
        assert kinds.describe("acme_late").version == "0.3"
    finally:
        kinds.clear_cache()


@executes("uris.py", "Next: {}")
@pytest.mark.parametrize("form", ["file://{}", "file://localhost{}", "file:{}", "FILE://{}"])
@pytest.mark.parametrize("name", ["w.pt", "a b.pt"])
def test_a_file_uri_is_told_as_the_path_that_it_means(invoke: Invoke, form: str, name: str) -> None:
    """With and without a host, whatever its characters are written as."""
    path = Path(name).resolve()
    path.write_bytes(Path("w.pt").read_bytes())
    for asked in (form.format(str(path).replace(" ", "%20")), str(Path(form.format(path)))):
        refused = invoke("inspect", asked)
        assert refused.code == 1
        assert refused.err.endswith(f"Next: {path}\n")
        assert invoke("inspect", refused.err.strip().partition("Next: ")[2]).code == 0


def test_a_file_of_another_machine_is_no_path_here(invoke: Invoke) -> None:
    """Its host is named."""
    assert "Next: copy it from server\n" in invoke("inspect", "file://server/data/w.pt").err


@executes("uris.py", "mount the store")
@pytest.mark.parametrize(
    "line",
    [
        "validate s3://bucket/init.yaml",
        "plan s3://bucket/init.yaml --model leads_train:build",
        f"{PLAN} --runs s3://bucket/runs",
        f"{PLAN} --html s3://bucket/plan.html",
        "apply init.yaml --model leads_train:build --out gs://bucket/a.pt",
        "example file s3://bucket/example",
        "new demo --into s3://bucket",
        "diff w.pt s3://bucket/w.pt",
        "lineage runs/finetune --root s3://bucket",
    ],
)
def test_a_uri_is_told_as_one_by_every_command(invoke: Invoke, line: str) -> None:
    """Not as a path that does not exist, and no folder is made of it."""
    refused = invoke(*shlex.split(line))
    assert refused.code in (1, 2)
    assert "://bucket" in refused.err
    assert "is a URI of " in refused.err
    assert "Next: mount the store, or copy the run, and give that folder" in refused.err
    assert not any(name.endswith(":") for name in os.listdir())


@executes("stack/config_files.py", "Next: {}", "initializers: [], for", "auto_resume: true", "Next: {}.")
@executes("stack/config_files.py", "ninit schema {}", "[{{}, ...}]", "remove one of the two")
@pytest.mark.parametrize(
    ("text", "advised", "mended"),
    [
        ("initializers: [file]\n", "kind: file", "initializers: [{kind: file, path: w.pt}]\n"),
        ("observers: []\n", "initializers: []", "observers: []\ninitializers: []\n"),
        ("initializers: []\non_invalid: previous\n", "auto_resume: true", "initializers: []\nauto_resume: true\n"),
        ("kind: file\npath: w.pt\n", "initializers: [{kind: file, ...}]", "initializers: [{kind: file, path: w.pt}]\n"),
        ("initializers: []\nverify: full\n", "initializers: [{kind: ..., verify: ...}]", "initializers: []\n"),
        (
            "initializers: [{kind: file, pth: w}]\n",
            "ninit schema file",
            "initializers: [{kind: file, path: w.pt}]\n",
        ),
        (
            "auto_resume: {on_invalid: previous}\non_invalid: previous\n",
            "remove one of the two",
            "auto_resume: {on_invalid: previous}\n",
        ),
    ],
)
def test_a_wrong_config_is_told_its_right_form(invoke: Invoke, text: str, advised: str, mended: str) -> None:
    """The advised keys in place of the wrong ones are valid; an advised command shows the keys."""
    Path("wrong.yaml").write_text(text)
    refused = invoke("validate", "wrong.yaml")
    assert refused.code == 1
    assert f"Next: {advised}" in refused.out or f"or add {advised}" in refused.out, refused.out
    if advised.startswith("ninit"):
        assert '"path"' in invoke(*advised.split()[1:]).out
    Path("wrong.yaml").write_text(mended)
    assert invoke("validate", "wrong.yaml").code == 0


def test_an_example_writes_an_empty_value_of_the_type(invoke: Invoke, tmp_path: Path) -> None:
    """Each line that is a comment may be taken in: a dict that is made anew each time is no null."""
    import pydantic

    from noether_init_core.config.base import KindConfig
    from noether_init_core.initializers.base import InitializerBase
    from noether_init_core.scaffold.package import example_of

    class Config(KindConfig):
        table: dict[str, int] = pydantic.Field(default_factory=dict, description="a # b:\n\x1b[2J c")
        names: list[str] = pydantic.Field(default_factory=list)
        place: str | None = None
        share: float = 0.5

    class Kind(InitializerBase):
        config_class = Config

        def init_weights(self, model: Any) -> None:
            return None

        def init_optimizer(self, model: Any) -> None:
            return None

    kinds.register("exemplary", Kind)
    try:
        text = example_of("exemplary", Config.model_json_schema())[0]["init.yaml"]
        assert all(line.isprintable() for line in text.splitlines())
        lines = [re.sub(r"^    # (?=\w+:)", "    ", line) for line in text.splitlines()]
        Path("example.yaml").write_text("\n".join(lines).replace("auto_resume: true\n", "") + "\n")
        document = yaml.safe_load(Path("example.yaml").read_text())
        entry = document["initializers"][0]
        assert (entry["table"], entry["names"], entry["place"], entry["share"]) == ({}, [], None, 0.5)
        assert invoke("validate", "example.yaml").code == 0
    finally:
        kinds.unregister("exemplary")


@executes("cli/usage.py", "ninit example previous_run", "remove all but one", "--json FILE, or --json -")
@executes("config/document.py", "ninit example previous_run")
def test_in_an_empty_folder_the_example_is_written(invoke: Invoke, tmp_path: Path, monkeypatch: Any) -> None:
    """From a command without its config, and one whose config is not there."""
    for number, arguments in enumerate((("validate",), ("validate", "init.yaml"))):
        folder = tmp_path / f"empty{number}"
        folder.mkdir()
        monkeypatch.chdir(folder)
        refused = invoke(*arguments)
        assert refused.code == 2
        assert "Next: ninit example previous_run" in refused.err
        assert invoke("example", "previous_run").code == 0
        assert invoke("validate", "init.yaml").code == 0
    monkeypatch.chdir(tmp_path)
    assert invoke(*shlex.split(PLAN), "--json").code == 2
    assert invoke(*shlex.split(PLAN), "--json", "-").code == 0
    assert invoke(*shlex.split(PLAN), "--model", "leads_train:build").code == 2
    assert invoke(*shlex.split(PLAN)).code == 0


@executes("cli/options.py", "write a function without arguments", "--real", "--app-dir FOLDER", "return compose(")
def test_a_model_that_cannot_be_built_is_built_as_advised(invoke: Invoke) -> None:
    """A class with arguments, values on the meta device, a module elsewhere, and several models."""
    plan = ("plan", "init.yaml", "--model")
    refused = invoke(*plan, "leads_train:LINEAR")
    assert "Next: write a function without arguments that calls it" in " ".join(refused.err.replace("│", " ").split())
    assert invoke(*plan, "leads_train:build").code == 0
    Path("leads_values.py").write_text(
        "import torch\n\n\ndef build():\n    one = torch.nn.Linear(3, 2)\n    one.bias.sum().item()\n    return one\n"
    )
    refused = invoke(*plan, "leads_values:build")
    assert "Next: --real" in refused.err
    assert invoke(*plan, "leads_values:build", "--real").code == 0
    Path("elsewhere").mkdir()
    Path("elsewhere/leads_far.py").write_text(TRAIN)
    assert "Next: --app-dir FOLDER" in invoke(*plan, "leads_far:build").err
    assert invoke(*plan, "leads_far:build", "--app-dir", "elsewhere").code == 0
    Path("leads_two.py").write_text("import torch\n\n\ndef build():\n    return [torch.nn.Linear(3, 2)]\n")
    refused = invoke(*plan, "leads_two:build")
    said = " ".join(refused.err.replace("│", " ").split())
    assert 'return compose("name", {"first": bind(...), ...})' in said
    Path("leads_both.py").write_text(
        "import torch\nfrom noether_init_core import bind, compose\n\n\ndef build():\n"
        '    return compose("name", {"first": bind(torch.nn.Linear(3, 2), "first")})\n'
    )
    Path("init.yaml").write_text("initializers:\n  - {kind: file, path: w.pt, submodel: first}\n")
    assert invoke(*plan, "leads_both:build").code == 0
    for name in ("leads_values", "leads_far", "leads_two", "leads_both"):
        sys.modules.pop(name, None)


@executes("cli/options.py", "--runs FOLDER --run-id ID", "Next: --run-id ID", "--runs FOLDER, with")
@executes("sets/refusals.py", "set output_path{} to the folder")
def test_options_for_runs_are_added_as_advised(invoke: Invoke) -> None:
    """The root, the id, and a root that was misspelt."""
    plan = ("plan", "resume.yaml", "--model", "leads_train:build")
    assert "Next: --runs FOLDER --run-id ID" in invoke(*plan).err
    assert invoke(*plan, "--runs", "runs", "--run-id", "finetune").code == 0
    Path("run.yaml").write_text("initializers:\n  - {kind: previous_run, run_id: finetune}\n")
    plan = ("plan", "run.yaml", "--model", "leads_train:build")
    refused = invoke(*plan, "--runs", "rnus")
    assert (
        "Next: set output_path (in initializers.0, run.yaml:2) to the folder of the runs, or use --runs FOLDER"
        in refused.err
    )
    assert invoke(*plan, "--runs", "runs").code == 0
    pasted(Path("run.yaml"), "output_path: runs", "initializers.0")
    assert invoke(*plan).code == 0
    Path("run.yaml").write_text("initializers:\n  - {kind: resume}\n")
    refused = invoke(*plan, "--runs", "runs")
    assert "Next: --run-id ID" in refused.err
    assert invoke(*plan, "--runs", "runs", "--run-id", "finetune").code == 0


def test_distributions_have_their_metadata() -> None:
    """The tests above make distributions; the real ones stay what they are."""
    assert importlib.metadata.version("noether-init-core")
    with pytest.raises(ConfigError):
        kinds.validate({"kind": "acme_new"})
