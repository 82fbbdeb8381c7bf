"""A third party, for real: built wheels in a clean environment, where nothing of this checkout is importable."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tarfile
import textwrap
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.advice import executes, saw
from support.wheels import ROOT, Environment, build_wheel, run_process

PLUGINS = sorted(project.parent for project in ROOT.glob("plugins/*/pyproject.toml"))
RANDOM = "noether-init-random"

CONSTANT = '''
"""A kind of a stranger: fills every parameter with one number."""

import torch
from pydantic import Field

from noether_init_core import InitializerBase, KindConfig


class ConstantConfig(KindConfig):
    value: float = Field(description="The number.")


class ConstantInitializer(InitializerBase):
    config_class = ConstantConfig
    contract = 1

    def init_weights(self, model):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(self.config.value)

    def init_optimizer(self, model):
        pass
'''


def _foreign_wheel(folder: Path, name: str, source: str, *, kind: str, target: str) -> Path:
    """Build the wheel of a distribution with one module and one kind."""
    module = name.replace("-", "_")
    project = folder / name
    (project / module).mkdir(parents=True)
    (project / module / "__init__.py").write_text(source)
    (project / "pyproject.toml").write_text(
        textwrap.dedent(f"""
            [build-system]
            requires = ["hatchling"]
            build-backend = "hatchling.build"
            [project]
            name = "{name}"
            version = "2.1"
            dependencies = ["noether-init-core>=0.1"]
            [project.entry-points."noether_init.initializers"]
            {kind} = "{module}:{target}"
        """)
    )
    run_process(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, where=project)
    (wheel,) = folder.glob(f"{module}-*.whl")
    return wheel


@pytest.fixture
def constant(environment: Environment, built: Path, tmp_path: Path) -> Iterator[Environment]:
    """The environment with the stranger's wheel in it."""
    wheel = _foreign_wheel(tmp_path, "acme-constant", CONSTANT, kind="constant", target="ConstantInitializer")
    environment.pip("install", "--no-index", "--find-links", built, wheel)
    yield environment
    environment.pip("uninstall", "--yes", "acme-constant")


def _members(archive: Path) -> set[str]:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return set(wheel.namelist())
    with tarfile.open(archive) as sdist:
        return {name.partition("/")[2] for name in sdist.getnames()}


def test_the_wheel_and_the_sdist_hold_the_package_and_nothing_of_the_repository(built: Path) -> None:
    """No tests, plugins, examples or docs; every module, py.typed and the template of new packages are there."""
    (wheel,) = built.glob("noether_init_core-*.whl")
    (sdist,) = built.glob("noether_init_core-*.tar.gz")
    files = [path for path in (ROOT / "noether_init_core").rglob("*") if path.is_file() and path.suffix != ".pyc"]
    sources = {str(path.relative_to(ROOT)) for path in files}
    template = "noether_init_core/scaffold/template/common"
    assert {"noether_init_core/py.typed", f"{template}/.gitignore.jinja"} <= sources
    for archive in (wheel, sdist):
        assert sources <= _members(archive)
    assert {name.split("/")[0].partition("-")[0] for name in _members(wheel)} == {"noether_init_core"}
    roots = {name.split("/")[0] for name in _members(sdist)}
    allowed = {"noether_init_core", "README.md", "LICENSE", "CHANGELOG.md", "pyproject.toml", "PKG-INFO", ".gitignore"}
    assert {"noether_init_core", "LICENSE", "pyproject.toml"} <= roots <= allowed


def test_the_wheel_registers_what_the_project_file_says(environment: Environment, tmp_path: Path) -> None:
    """The installed kinds are those of pyproject.toml, found without importing a plugin, torch or pydantic."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    output = environment.run(
        """
        import json, sys
        from noether_init_core import kinds
        found = {info.name: info.target for info in kinds.installed()}
        heavy = [name for name in sys.modules if name in ("torch", "pydantic") or ".builtin" in name]
        import noether_init_core
        print(json.dumps([found, heavy, noether_init_core.__file__, noether_init_core.__version__]))
        """,
        where=tmp_path,
    )
    found, heavy, file, version = json.loads(output)
    assert found == project["entry-points"]["noether_init.initializers"]
    assert heavy == []
    assert Path(file).is_relative_to(environment.site_packages)
    assert version == project["version"]


def test_pyinstaller_finds_the_hook_by_an_entry_point_of_the_wheel(environment: Environment, tmp_path: Path) -> None:
    """It names the folder with the hook, whose result is of the environment that freezes."""
    output = environment.run(
        """
        import json, runpy, sys
        from importlib.metadata import entry_points
        from pathlib import Path
        points = entry_points(group="pyinstaller40", name="hook-dirs")
        (point,) = [one for one in points if one.module.startswith("noether_init_core.")]
        (folder,) = point.load()()
        hook = runpy.run_path(str(Path(folder) / "hook-noether_init_core.py"))
        metadata = [target for source, target in hook["datas"] if target.endswith(".dist-info")]
        heavy = [name for name in sys.modules if name in ("torch", "pydantic")]
        print(json.dumps([metadata, "noether_init_core.builtin.file" in hook["hiddenimports"], heavy]))
        """,
        where=tmp_path,
    )
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert json.loads(output) == [[f"noether_init_core-{version}.dist-info"], True, []]


def test_a_strangers_kind_is_selected_in_a_file_and_runs(constant: Environment, tmp_path: Path) -> None:
    """Its own distribution, kind and config class; the model holds the number of the YAML file."""
    (tmp_path / "init.yaml").write_text("initializers:\n- kind: constant\n  value: 2.5\n")
    output = constant.run(
        """
        import json, sys, torch
        from noether_init_core import InitializerStack, bind, kinds
        before = "acme_constant" in sys.modules
        model = torch.nn.Linear(3, 2)
        listed = kinds.describe("constant").source
        seen = "acme_constant" in sys.modules
        report = InitializerStack.from_file("init.yaml").initialize(bind(model, name="mlp"))
        print(json.dumps([before, seen, listed, model.weight.tolist(), model.bias.tolist(), report.start.is_zero]))
        """,
        where=tmp_path,
    )
    assert json.loads(output) == [False, False, "acme-constant 2.1", [[2.5] * 3] * 2, [2.5] * 2, True]
    checked = constant.command("validate", "init.yaml", where=tmp_path)
    assert (checked.returncode, checked.stderr) == (0, "")
    assert "initializers.0: constant" in checked.stdout
    (tmp_path / "init.yaml").write_text("initializers:\n- kind: constant\n  valeu: 2.5\n")
    checked = constant.command("validate", "init.yaml", where=tmp_path)
    assert checked.returncode == 1
    assert "init.yaml:3 initializers.0.valeu: unknown key. Near: value." in checked.stdout
    assert "init.yaml:2 initializers.0.value: is missing: The number." in checked.stdout


def test_after_uninstalling_it_the_error_names_what_is_missing(
    environment: Environment, constant: Environment, tmp_path: Path
) -> None:
    """File, line, key, kind, what there is, and the next command."""
    constant.pip("uninstall", "--yes", "acme-constant")
    (tmp_path / "init.yaml").write_text("initializers:\n- kind: constant\n  value: 2.5\n")
    output = environment.run(
        """
        from noether_init_core import InitializerStack, UnknownKindError
        try:
            InitializerStack.from_file("init.yaml")
        except UnknownKindError as error:
            assert error.kind == "constant"
            print(error)
        """,
        where=tmp_path,
    )
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert output == (
        'init.yaml:2 initializers.0.kind: no kind "constant". '
        f"Installed: file, previous_run, resume (noether-init-core {version}). Next: ninit kinds\n"
    )
    checked = environment.command("validate", "init.yaml", where=tmp_path)
    assert (checked.returncode, checked.stderr) == (1, "")
    assert output.strip() in checked.stdout


@pytest.mark.parametrize("plugin", PLUGINS, ids=lambda path: path.name)
def test_a_plugin_of_this_repository_is_a_wheel_like_any_strangers(
    plugin: Path, environment: Environment, built: Path, tmp_path: Path
) -> None:
    """Its package and nothing else; its kinds are those of its project file, and they resolve."""
    project = tomllib.loads((plugin / "pyproject.toml").read_text())["project"]
    points = project.get("entry-points", {}).get("noether_init.initializers", {})
    wheel = build_wheel(plugin, tmp_path)
    files = [path for path in (plugin / "src").rglob("*") if path.is_file() and path.suffix != ".pyc"]
    sources = {str(path.relative_to(plugin / "src")) for path in files}
    package = project["name"].replace("-", "_")
    members = _members(wheel)
    assert sources | {f"{package}/py.typed"} <= members
    assert {name.split("/")[0] for name in members} == {package, f"{package}-{project['version']}.dist-info"}
    assert any(name.endswith("/licenses/LICENSE") for name in members)
    environment.pip("install", "--no-index", "--find-links", built, wheel)
    try:
        output = environment.run(
            f"""
            import json
            from noether_init_core import kinds
            found = {{one.name: one.target for one in kinds.installed() if one.distribution == {project["name"]!r}}}
            print(json.dumps([found, [kinds.resolve(name).__module__ for name in found]]))
            """,
            where=tmp_path,
        )
    finally:
        environment.pip("uninstall", "--yes", project["name"])
    found, modules = json.loads(output)
    assert found == points
    assert {module.partition(".")[0] for module in modules} == ({package} if points else set())


def test_the_kind_random_comes_and_goes_with_its_wheel(environment: Environment, built: Path, tmp_path: Path) -> None:
    """Installed, it starts a run from a file; uninstalled, the error says what to install."""
    (tmp_path / "init.yaml").write_text(
        "initializers:\n- kind: random\n  rules:\n  - {match: '**', init: constant_, val: 2.5}\n"
    )
    environment.pip("install", "--no-index", "--find-links", built, build_wheel(ROOT / "plugins" / RANDOM, tmp_path))
    checked = environment.command("validate", "init.yaml", where=tmp_path)
    try:
        output = environment.run(
            """
            import torch
            from noether_init_core import InitializerStack, bind
            model = torch.nn.Linear(2, 1)
            print(InitializerStack.from_file("init.yaml").initialize(bind(model, name="mlp")))
            print(model.weight.tolist(), model.bias.tolist())
            """,
            where=tmp_path,
        )
    finally:
        environment.pip("uninstall", "--yes", RANDOM)
    assert (checked.returncode, checked.stderr) == (0, "")
    assert output.splitlines() == ["start E0_U0_S0", "random: no files (2 drawn with seed 0)", "[[2.5, 2.5]] [2.5]"]
    checked = environment.command("validate", "init.yaml", where=tmp_path)
    assert checked.returncode == 1
    assert (
        f'init.yaml:2 initializers.0.kind: no kind "random". random comes with {RANDOM}, which is not installed'
        in checked.stdout
    )


def test_two_wheels_that_claim_a_kind_and_one_that_raises_do_no_harm(
    constant: Environment, built: Path, tmp_path: Path
) -> None:
    """The conflict names both and imports neither; every other kind works in the same process."""
    names = ("claim-one", "claim-two", "raising-init")
    sources = [f"open({str(tmp_path / name)!r}, 'w').close()\n{CONSTANT}" for name in names[:2]]
    sources.append("def connect():\n    raise RuntimeError('no licence')\nconnect()\n")
    for name, source, kind in zip(names, sources, ("claimed", "claimed", "raising"), strict=True):
        wheel = _foreign_wheel(tmp_path, name, source, kind=kind, target="ConstantInitializer")
        (tmp_path / name).rename(tmp_path / f"{name}-project")
        constant.pip("install", "--no-index", "--find-links", built, wheel)
    try:
        output = constant.run(
            """
            import json, traceback
            from noether_init_core import KindConflictError, KindImportError, kinds
            kinds.installed()
            try:
                kinds.create({"kind": "claimed", "value": 1})
            except KindConflictError as error:
                conflict = [str(error), list(error.offers)]
            try:
                kinds.create({"kind": "raising"})
            except KindImportError as error:
                raised = [str(error), "in connect" in "".join(traceback.format_exception(error))]
            works = [kinds.create({"kind": "constant", "value": 1}).config.value]
            works += [kinds.resolve(name).__name__ for name in ("file", "previous_run", "resume")]
            print(json.dumps([conflict, raised, works]))
            """,
            where=tmp_path,
        )
    finally:
        constant.pip("uninstall", "--yes", *names)
    (message, offers), (raised, shows_traceback), works = json.loads(output)
    assert offers == [
        "claim-one 2.1 -> claim_one:ConstantInitializer",
        "claim-two 2.1 -> claim_two:ConstantInitializer",
    ]
    assert all(offer in message for offer in offers)
    assert not (tmp_path / "claim-one").exists()
    assert not (tmp_path / "claim-two").exists()
    assert "raising-init 2.1" in raised
    assert "RuntimeError: no licence" in raised
    assert shows_traceback
    assert works == [1.0, "FileInitializer", "PreviousRunInitializer", "ResumeInitializer"]


@executes("cli/kinds.py", "Next: python -m pip install --force-reinstall --no-deps noether-init-core")
def test_without_its_entry_points_the_core_knows_no_kind(environment: Environment, built: Path, tmp_path: Path) -> None:
    """Nothing but the metadata makes previous_run a kind; the advised command writes it again."""
    (points,) = environment.site_packages.glob("noether_init_core-*.dist-info/entry_points.txt")
    original = points.read_text()
    points.write_text(original[: original.index("[noether_init.initializers]")])
    try:
        output = environment.run(
            """
            from noether_init_core import UnknownKindError, kinds
            try:
                kinds.create({"kind": "previous_run", "run_id": "x"})
            except UnknownKindError as error:
                print(error)
            """,
            where=tmp_path,
        )
        listed = saw(environment.typed("ninit kinds", where=tmp_path))
        environment.typed(listed.partition("Next: ")[2], where=tmp_path, PIP_FIND_LINKS=str(built))
        assert points.read_text() == original
        assert re.search(r"ok +previous_run +noether-init-core", environment.typed("ninit kinds", where=tmp_path))
    finally:
        points.write_text(original)
    assert output == 'no kind "previous_run". No kind is installed. Next: ninit kinds\n'
    assert listed == "no kind is installed. Next: python -m pip install --force-reinstall --no-deps noether-init-core\n"


NOETHER = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "emmiai-noether"
version = "2026.4.0"
[project.scripts]
noether-init = "scaffold:main"
noether-train = "scaffold:main"
[tool.hatch.build.targets.wheel]
only-include = ["scaffold.py"]
"""


def test_the_command_and_that_of_noether_live_side_by_side(
    environment: Environment, built: Path, tmp_path: Path
) -> None:
    """Installed and removed in each order: Noether's scaffold is called ``noether-init``, and takes no file of ours."""
    (tmp_path / "pyproject.toml").write_text(NOETHER)
    (tmp_path / "scaffold.py").write_text("def main():\n    print('scaffold')\n")
    noether = build_wheel(tmp_path, tmp_path)
    folder = environment.folder / "bin"

    def working() -> list[str]:
        said = {"noether-init": "scaffold", "ninit": "previous_run", "noether-init-core": "previous_run"}
        there = [name for name in said if (folder / name).exists()]
        for name in there:
            done = subprocess.run(
                [folder / name, "kinds"], cwd=tmp_path, capture_output=True, text=True, env={"PATH": ""}, check=True
            )
            assert said[name] in done.stdout, done
        return there

    ours = ["ninit", "noether-init-core"]
    assert working() == ours
    environment.pip("install", "--no-index", noether)
    assert working() == ["noether-init", *ours]
    environment.pip("uninstall", "--yes", "noether-init-core")
    try:
        assert working() == ["noether-init"]
    finally:
        environment.pip("install", "--no-index", "--find-links", built, "noether-init-core")
    assert working() == ["noether-init", *ours]
    environment.pip("uninstall", "--yes", "emmiai-noether")
    assert working() == ours
