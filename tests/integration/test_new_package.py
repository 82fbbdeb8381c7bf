"""What ``ninit new`` writes, installed beside the core's wheel in a clean environment, and used."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.advice import executes, saw
from support.wheels import Environment, build_wheel, run_process


@pytest.fixture(params=["source", "plain"])
def base(request: pytest.FixtureRequest) -> str:
    """Which example the package has."""
    assert isinstance(request.param, str)
    return request.param


@pytest.fixture
def demo(environment: Environment, base: str, tmp_path: Path) -> Iterator[Path]:
    """The folder of a new package, as the command wrote it, which is installed as well."""
    done = environment.command("new", "demo", "--base", base, where=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    # nothing may come from an index, so that what builds is the hatchling that is there
    environment.pip("install", "--no-index", "--no-build-isolation", "--no-deps", tmp_path / "demo")
    yield tmp_path / "demo"
    environment.pip("uninstall", "--yes", "noether-init-demo")


def test_its_tests_and_the_kit_pass_as_they_are(environment: Environment, demo: Path) -> None:
    """Every test passes, none is skipped or expected to fail, and warnings are errors."""
    done = subprocess.run(
        [environment.python, "-m", "pytest", "-p", "no:cacheprovider"],
        cwd=demo,
        env={"PATH": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.fullmatch(r"=+ (\d+) passed in .*", done.stdout.splitlines()[-1])
    assert found is not None, done.stdout
    assert int(found[1]) > 30
    assert "configfile: pyproject.toml" in done.stdout


def test_it_is_listed_and_told_apart(environment: Environment, demo: Path, tmp_path: Path) -> None:
    """Kind, distribution, version and target; a second package of that name is refused with them."""
    listed = environment.command("kinds", "--json", where=tmp_path)
    assert [one for one in json.loads(listed.stdout) if one["name"] == "demo"] == [
        {
            "name": "demo",
            "distribution": "noether-init-demo",
            "version": "0.1.0",
            "target": "noether_init_demo:DemoInitializer",
            "blocked_by": None,
            "conflict": False,
        }
    ]
    (tmp_path / "elsewhere").mkdir()
    again = environment.command("new", "demo", where=tmp_path / "elsewhere")
    assert again.returncode == 1
    assert "noether-init-demo 0.1.0 -> noether_init_demo:DemoInitializer" in again.stderr
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_look_at_it_finds_nothing_to_mend(environment: Environment, demo: Path, tmp_path: Path) -> None:
    """``ninit check`` has neither problems nor advice."""
    checked = environment.command("check", "demo", "--json", where=tmp_path)
    assert (checked.returncode, checked.stderr) == (0, "")
    assert json.loads(checked.stdout)["findings"] == []


def test_its_wheel_is_selected_by_kind_in_a_config_file(
    environment: Environment, base: str, demo: Path, tmp_path: Path
) -> None:
    """Built, installed in the place of the checkout's, chosen by name, and the right numbers are in the model."""
    run_process(environment.python, "-m", "hatchling", "build", "-d", tmp_path / "dist", where=demo)
    wheel, sdist = sorted((tmp_path / "dist").iterdir(), key=lambda path: path.suffix, reverse=True)
    assert (wheel.name, sdist.name) == ("noether_init_demo-0.1.0-py3-none-any.whl", "noether_init_demo-0.1.0.tar.gz")
    environment.pip("install", "--no-index", "--force-reinstall", "--no-deps", wheel)
    demo.rename(tmp_path / "away")
    config = {"source": "folder: weights", "plain": "value: 2.5"}[base]
    (tmp_path / "init.yaml").write_text(f"initializers:\n- kind: demo\n  {config}\n")
    output = environment.run(
        """
        import json, os, torch
        from noether_init_core import InitializerStack, bind, kinds
        os.mkdir("weights")
        torch.save({"weight": torch.full((2, 3), 2.5), "bias": torch.full((2,), 2.5)}, "weights/mlp.pt")
        model = torch.nn.Linear(3, 2)
        InitializerStack.from_file("init.yaml").initialize(bind(model, name="mlp"))
        print(json.dumps([kinds.describe("demo").source, model.weight.tolist(), model.bias.tolist()]))
        """,
        where=tmp_path,
    )
    assert json.loads(output) == ["noether-init-demo 0.1.0", [[2.5] * 3] * 2, [2.5] * 2]
    checked = environment.command("validate", "init.yaml", where=tmp_path)
    assert (checked.returncode, checked.stderr) == (0, "")


@executes("cli/kinds.py", "pip install '.[test]'", "Next: python -m pip install {}")
@pytest.mark.parametrize("way", ["as new says", "as check says"])
def test_it_is_installed_by_the_printed_commands(environment: Environment, tmp_path: Path, way: str) -> None:
    """Those that ``new`` prints, in their order; or the one of ``check``, where it is not installed yet."""
    printed = saw(environment.typed("ninit new demo", where=tmp_path))
    commands = re.findall(r"^  (\S.*)$", printed, re.MULTILINE)
    assert commands == [
        "cd demo",
        "python -m pip install '.[test]'",
        "python -m pytest",
        "ninit kinds",
        "ninit check demo",
    ]
    refused = saw(environment.typed("ninit check demo", where=tmp_path, code=1))
    before = {path: path.read_bytes() for path in (tmp_path / "demo").rglob("*") if path.is_file()}
    try:
        if way == "as check says":
            environment.typed(refused.rpartition("Next: ")[2], where=tmp_path)
            assert "problems: 0" in environment.typed("ninit check demo", where=tmp_path)
        else:
            # the tests of the new package run in another test
            kept = [one for one in commands if one != "python -m pytest"]
            assert "problems: 0, advice: 0" in environment.typed(" && ".join(kept), where=tmp_path)
    finally:
        environment.pip("uninstall", "--yes", "noether-init-demo")
    assert before.items() <= {path: path.read_bytes() for path in before}.items()


@executes("testing/config_checks.py", "pip install --force-reinstall --no-deps {}, or the folder of its project")
@pytest.mark.parametrize("base", ["plain"], indirect=True)
def test_metadata_of_another_version_is_written_again(environment: Environment, demo: Path, tmp_path: Path) -> None:
    """From a wheel, or from the folder of the project; the kit finds nothing wrong afterwards."""
    build_wheel(demo, tmp_path)
    (metadata,) = environment.site_packages.glob("noether_init_demo-*.dist-info/METADATA")
    original = metadata.read_text()
    check = "python -m pytest -p no:cacheprovider -q -k test_is_registered_by_its_distribution"
    for is_folder in (False, True):
        metadata.write_text(original.replace("\nVersion: 0.1.0\n", "\nVersion: 9.9\n"))
        failed = saw(environment.typed(check, where=demo, code=1))
        found = re.search(r"Next: (python -m pip .*?)(\S+), or the folder of its project$", failed, re.MULTILINE)
        assert found is not None, failed
        assert found[2] == "noether-init-demo"
        environment.typed(f"{found[1]}{'.' if is_folder else found[2]}", where=demo, PIP_FIND_LINKS=str(tmp_path))
        assert metadata.read_text() == original
        environment.typed(check, where=demo)
