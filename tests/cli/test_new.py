"""``ninit new``: which names it takes, what it writes, and that it writes all of it or nothing."""

from __future__ import annotations

import ast
import json
import re
import shlex
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings, strategies as st
from support.command import Result, run_command
from support.foreign import ForeignPackages

from noether_init_core import ConfigError, InvalidNameError, KindConflictError
from noether_init_core.scaffold.package import MAX_LENGTH, Base, Names, check_free, names_of, render

ROOT = Path(__file__).resolve().parents[2]
WORD = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")


New = Callable[..., Result]


@pytest.fixture
def new(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> New:
    """Call ``ninit new`` as the shell would, in an empty folder."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.chdir(tmp_path)

    def call(*arguments: Any) -> Result:
        return run_command(monkeypatch, capsys, "new", *arguments)

    return call


def written(folder: Path) -> dict[str, str]:
    """Path below ``folder`` -> text, of every file; a folder without files counts as well."""
    return {
        path.relative_to(folder).as_posix(): path.read_text() if path.is_file() else ""
        for path in folder.rglob("*")
        if path.is_file() or not any(path.iterdir())
    }


def rendered(name: str = "demo", base: Base = Base.SOURCE, **more: Any) -> dict[str, str]:
    """The files of a package, without the command."""
    given_values: dict[str, Any] = {"author": None, "year": 2026, "core": "0.1.0", **more}
    return render(names_of(name), base, **given_values)


# Names


@pytest.mark.parametrize(
    ("name", "distribution", "package", "kind", "prefix"),
    [
        ("demo", "noether-init-demo", "noether_init_demo", "demo", "Demo"),
        ("my-demo", "noether-init-my-demo", "noether_init_my_demo", "my_demo", "MyDemo"),
        ("my_demo", "noether-init-my-demo", "noether_init_my_demo", "my_demo", "MyDemo"),
        ("noether-init-demo", "noether-init-demo", "noether_init_demo", "demo", "Demo"),
        ("noether_init_demo", "noether-init-demo", "noether_init_demo", "demo", "Demo"),
        ("json", "noether-init-json", "noether_init_json", "json", "Json"),
        ("gpt2-8b", "noether-init-gpt2-8b", "noether_init_gpt2_8b", "gpt2_8b", "Gpt28b"),
    ],
)
def test_all_names_come_from_one(name: str, distribution: str, package: str, kind: str, prefix: str) -> None:
    """The folder is called as it was asked for; the prefix of distributions is not doubled."""
    names = names_of(name)
    assert names == Names(name, distribution, package, kind)
    assert names.class_prefix == prefix


def test_kind_and_distribution_can_be_said() -> None:
    """Each by itself; the package follows the distribution."""
    assert names_of("demo", kind="other") == Names("demo", "noether-init-demo", "noether_init_demo", "other")
    assert names_of("demo", distribution="acme_weights") == Names("demo", "acme-weights", "acme_weights", "demo")


@pytest.mark.parametrize(
    ("arguments", "what", "problem", "following"),
    [
        ({"name": ""}, "name", "is not allowed", "ninit new demo"),
        ({"name": "Demo"}, "name", "is not allowed", "ninit new demo"),
        ({"name": "MyKind"}, "name", "is not allowed", "ninit new my-kind"),
        ({"name": ".."}, "name", "is not allowed", "ninit new demo"),
        ({"name": "../demo"}, "name", "is not allowed", "ninit new demo"),
        ({"name": "a.b"}, "name", "is not allowed", "ninit new a-b"),
        ({"name": "démo"}, "name", "is not allowed", "ninit new demo"),
        ({"name": "2nd"}, "name", "is not allowed", "ninit new nd"),
        ({"name": "a--b"}, "name", "single _ or - between", "ninit new a-b"),
        ({"name": "class"}, "name", "is a keyword of Python", "ninit new my-class"),
        ({"name": "x" * 101}, "name", "at most 100 characters", f"ninit new {'x' * 40}"),
        ({"name": "x" * 90}, "distribution", "at most 100 characters", f"--distribution noether-init-{'x' * 27}"),
        ({"name": "core"}, "distribution", "is the name of the core", "--distribution noether-init-my-core"),
        ({"name": "source"}, "kind", "would name a class SourceInitializer", "--kind my_source"),
        ({"name": "kind"}, "kind", "would name a class KindConfig", "--kind my_kind"),
        ({"name": "null"}, "kind", "is a word of YAML", "--kind my_null"),
        ({"name": "noether-init-2nd"}, "kind", "is not allowed", "--kind nd"),
        ({"name": "demo", "kind": "my.Kind"}, "kind", "is not allowed", "--kind my_kind"),
        ({"name": "demo", "kind": "my-kind"}, "kind", "single _ between", "--kind my_kind"),
        ({"name": "demo", "kind": "import"}, "kind", "is a keyword of Python", "--kind my_import"),
        (
            {"name": "demo", "distribution": "json"},
            "distribution",
            "package json, which is a module",
            "noether-init-json",
        ),
        ({"name": "demo", "distribution": "Acme.Init"}, "distribution", "is not allowed", "--distribution acme-init"),
        ({"name": "demo", "distribution": "lambda"}, "distribution", "is a keyword", "noether-init-lambda"),
    ],
)
def test_names_that_cannot_work_are_told_one_that_can(
    arguments: dict[str, str], what: str, problem: str, following: str
) -> None:
    """The error says what is wrong with which name, and ends with what to type."""
    with pytest.raises(InvalidNameError) as caught:
        names_of(**arguments)
    assert caught.value.what == what
    assert problem in str(caught.value)
    assert str(caught.value).endswith(following)


@pytest.mark.parametrize("word", ["null", "true", "false", "yes", "no", "on", "off", "y", "n"])
def test_a_word_that_some_reader_of_yaml_takes_for_a_value_is_no_kind(word: str) -> None:
    """``kind: off`` must be a text for whoever reads the config."""
    with pytest.raises(InvalidNameError, match=rf"word of YAML.*--kind my_{word}$"):
        names_of("demo", kind=word)


TEXTS = st.one_of(
    st.text(max_size=120),
    st.text(st.sampled_from("abz09-_. AÄ/\\"), max_size=12),
    st.from_regex(r"(noether[-_]init[-_])?[a-z][a-z0-9]{0,5}([-_][a-z0-9]{1,4}){0,3}", fullmatch=True),
    st.sampled_from(["class", "null", "json", "core", "source", "noether_init", "None", "match"]),
)


@settings(deadline=None)
@given(name=TEXTS, kind=st.none() | TEXTS, distribution=st.none() | TEXTS)
@example(name="demo", kind="\ud800", distribution=None)
@example(name="noether-init-core", kind=None, distribution=None)
@example(name="noether_init_noether_init_core", kind=None, distribution=None)
def test_names_are_safe_or_refused_with_one_that_is(name: str, kind: str | None, distribution: str | None) -> None:
    """Whatever the texts: what is accepted can be a folder, a module, a kind; following the advice leads there."""
    said = {"name": name, "kind": kind, "distribution": distribution}
    for _time in range(4):
        try:
            names = names_of(said["name"] or "", kind=said["kind"], distribution=said["distribution"])
        except InvalidNameError as error:
            advice = shlex.split(str(error).rpartition("Next: ")[2])
            assert [*advice[:-1]] in (["ninit", "new"], ["--kind"], ["--distribution"])
            said[error.what] = advice[-1]
        else:
            break
    else:
        pytest.fail(f"the advice leads nowhere: {said}")
    assert names.folder == said["name"]
    assert WORD.fullmatch(names.package)
    assert WORD.fullmatch(names.kind)
    assert re.fullmatch(r"[a-z][a-z0-9]*([-_][a-z0-9]+)*", names.folder)
    assert names.distribution == names.package.replace("_", "-")
    assert names.package not in {*sys.stdlib_module_names, "noether_init_core", "noether_init"}
    assert max(len(one) for one in (names.folder, names.package, names.kind)) <= MAX_LENGTH
    ast.parse(f"import {names.package}\nclass {names.class_prefix}Initializer: pass\n{names.kind} = 1")
    assert yaml.safe_load(f"kind: {names.kind}") == {"kind": names.kind}


@settings(deadline=None)
@given(name=TEXTS, base=st.sampled_from(Base))
def test_whatever_the_name_the_files_are_what_they_should_be(name: str, base: Base) -> None:
    """Python parses, TOML and YAML load, no placeholder is left, and no file has a name that leads elsewhere."""
    try:
        names = names_of(name)
    except InvalidNameError:
        return
    files = rendered(name, base)
    for path, text in files.items():
        assert re.fullmatch(r"[\w.]+(/[\w.]+)*", path)
        assert ".." not in path
        assert "{%" not in text
        if path.endswith(".py"):
            ast.parse(text)
    project = tomllib.loads(files["pyproject.toml"])["project"]
    target = f"{names.package}:{names.class_prefix}Initializer"
    assert project["name"] == names.distribution
    assert project["entry-points"]["noether_init.initializers"] == {names.kind: target}
    steps = yaml.safe_load(files[".github/workflows/ci.yml"])["jobs"]["wheel"]["steps"]
    assert {"run": f"ninit check {names.kind}"} in steps
    assert {"python-version": "${{ matrix.python }}"} in [step.get("with") for step in steps]


def test_a_kind_that_somebody_offers_is_refused(foreign: ForeignPackages) -> None:
    """It would be a conflict at use. The error names distribution, version and target, and how to get another kind."""
    foreign.install("acme-init", offers={"acme": "acme_cli:K"}, version="2.3")
    with pytest.raises(KindConflictError) as caught:
        check_free(names_of("acme"))
    assert caught.value.kind == "acme"
    assert caught.value.offers == ("acme-init 2.3 -> acme_cli:K",)
    assert str(caught.value).endswith("ninit new my-acme")
    check_free(names_of("my-acme"))
    with pytest.raises(KindConflictError, match=r"Next: --kind my_acme$"):
        check_free(names_of("demo", kind="acme", distribution="d-d"))


def test_a_kind_of_a_shut_out_distribution_is_refused_too(
    foreign: ForeignPackages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Elsewhere it is not shut out."""
    foreign.install("acme-init", offers={"acme": "acme_cli:K"})
    monkeypatch.setenv("NOETHER_INIT_DENY", "acme-init")
    with pytest.raises(KindConflictError, match="acme-init"):
        check_free(names_of("acme"))


@pytest.mark.usefixtures("isolated_kinds")
def test_a_kind_that_is_known_to_come_with_another_distribution_is_refused() -> None:
    """Installed or not: where both are installed, neither could be used."""
    with pytest.raises(KindConflictError, match=r"noether-init-random.*ninit new my-random"):
        check_free(names_of("random"))


@pytest.mark.parametrize(
    ("distribution", "message"),
    [("attrs", r"distribution attrs \d[.\d]* is installed, and"), ("yaml", r"package yaml exists \(")],
)
def test_what_would_replace_an_installed_package_is_refused(distribution: str, message: str) -> None:
    """A distribution of that name, or a package of that name in a distribution of another."""
    with pytest.raises(ConfigError, match=rf"{message}.*--distribution noether-init-my-{distribution}$"):
        check_free(names_of("demo", distribution=distribution))


def test_no_plugin_and_no_torch_is_imported(tmp_path: Path) -> None:
    """Not for a name that is free, nor for one that is taken."""
    program = (
        "import sys\nfrom noether_init_core import cli\n"
        "for arguments in (['new', 'demo'], ['new', 'file']):\n"
        "    sys.argv = ['ninit', *arguments]\n"
        "    try:\n        cli.main()\n    except SystemExit as ended:\n        print(ended.code)\n"
        "print([name for name in sys.modules if name in ('torch', 'numpy') or '.builtin' in name])"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-3:] == ["0", "1", "[]"]


# What is written


@pytest.mark.parametrize("base", Base)
def test_the_files_of_a_package(new: New, tmp_path: Path, base: Base) -> None:
    """Class, tests, kit, metadata, CI; on disk is what was listed."""
    result = new("demo", "--base", base.value, "--json")
    assert (result.code, result.err) == (0, "")
    said = json.loads(result.out)
    files = written(tmp_path / "demo")
    assert sorted(files) == said["files"]
    assert set(files) == {
        ".github/workflows/ci.yml",
        ".gitignore",
        "CHANGELOG.md",
        "LICENSE",
        "README.md",
        "pyproject.toml",
        "src/noether_init_demo/__init__.py",
        "src/noether_init_demo/kind.py",
        "src/noether_init_demo/py.typed",
        "tests/conftest.py",
        "tests/test_conformance.py",
        "tests/test_kind.py",
    }
    assert {key: said[key] for key in ("version", "folder", "distribution", "package", "kind", "base", "written")} == {
        "version": 1,
        "folder": "demo",
        "distribution": "noether-init-demo",
        "package": "noether_init_demo",
        "kind": "demo",
        "base": base.value,
        "written": True,
    }
    assert said["next"][0] == "cd demo"
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


def test_it_prints_the_files_and_the_next_commands(new: New, tmp_path: Path) -> None:
    """In the order in which they are typed; what each does stands below it."""
    (tmp_path / "there").mkdir()
    result = new("demo", "--into", "there")
    assert (result.code, result.err) == (0, "")
    files, _, following = result.out.partition("\nnext:\n")
    assert "there/demo/src/noether_init_demo/kind.py" in files.splitlines()
    commands = [line.strip() for line in following.splitlines() if not line.startswith("   ")]
    assert commands == [
        "cd there/demo",
        "python -m pip install '.[test]'",
        "python -m pytest",
        "ninit kinds",
        "ninit check demo",
    ]


def test_a_dry_run_lists_and_writes_nothing(new: New, tmp_path: Path) -> None:
    """The same files as without it."""
    result = new("demo", "--dry-run", "--json")
    said = json.loads(result.out)
    assert said["written"] is False
    assert result.code == 0
    assert list(tmp_path.iterdir()) == []
    plain = new("demo", "--dry-run").out
    assert f"{len(said['files'])} files, not written (--dry-run)" in plain
    assert list(tmp_path.iterdir()) == []
    new("demo")
    assert sorted(written(tmp_path / "demo")) == said["files"]


@pytest.mark.parametrize("base", Base)
def test_what_is_written_is_clean(new: New, tmp_path: Path, base: Base) -> None:
    """ruff and its formatter as they come, and mypy as strict as the package itself asks for."""
    new("my-demo", "--base", base.value)
    where = tmp_path / "my-demo"
    for command in (
        ["ruff", "check", "--isolated", "--no-cache"],
        ["ruff", "format", "--isolated", "--no-cache", "--check", "--diff"],
        ["mypy", "--cache-dir", str(ROOT / ".mypy_cache" / "scaffold")],
    ):
        done = subprocess.run(
            [sys.executable, "-m", *command],
            cwd=where,
            env={"MYPYPATH": "src", "PATH": ""},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("author", "in_metadata", "in_licence"),
    [
        (None, {"name": "The noether-init-demo developers"}, "The noether-init-demo developers"),
        ("Zoë O'Hara", {"name": "Zoë O'Hara"}, "Zoë O'Hara"),
        (" Jane Doe <jane@example.org>", {"name": "Jane Doe", "email": "jane@example.org"}, "Jane Doe"),
    ],
)
def test_the_author_is_in_metadata_and_licence(
    author: str | None, in_metadata: dict[str, str], in_licence: str
) -> None:
    """With a mail address where there is one."""
    files = rendered(author=author)
    assert tomllib.loads(files["pyproject.toml"])["project"]["authors"] == [in_metadata]
    assert f"Copyright (c) 2026 {in_licence}\n" in files["LICENSE"]


@settings(deadline=None)
@given(author=st.text(max_size=220))
@example('Jane "x" Doe')
@example("back\\slash")
@example("two\nlines")
@example("<only@mail.org>")
@example("Doe, Jane")
def test_an_author_is_one_line_of_metadata_or_refused(author: str) -> None:
    """No text of an author can change what else is in the project file."""
    try:
        files = rendered(author=author)
    except ConfigError as error:
        assert "--author 'Jane Doe'" in str(error)  # noqa: PT017 - either way is right, for some author
        return
    project = tomllib.loads(files["pyproject.toml"])["project"]
    without = tomllib.loads(rendered()["pyproject.toml"])["project"]
    assert {**project, "authors": None} == {**without, "authors": None}
    assert len(project["authors"]) == 1
    assert project["authors"][0]["name"] in author


@pytest.mark.parametrize(
    ("core", "least"), [("0.1.0", "0.1"), ("1.12.3+cpu", "1.12"), ("2.0", "2.0"), ("0.2.0.dev1", "0.2.0.dev1")]
)
def test_the_core_that_it_was_written_for_is_the_least_one(core: str, least: str) -> None:
    """Its minor release; an unreleased version itself, which the release does not include."""
    project = tomllib.loads(rendered(core=core)["pyproject.toml"])["project"]
    assert project["dependencies"] == [f"noether-init-core>={least}"]


# All or nothing


def test_what_exists_is_refused_and_left_alone(new: New, tmp_path: Path) -> None:
    """A folder, even an empty one, a file, a link to nothing."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("the only copy")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file-it").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    before = {path: path.lstat().st_mtime_ns for path in [tmp_path, *tmp_path.rglob("*")]}
    for name in ("full", "empty", "file-it", "link"):
        for more in ([], ["--dry-run"]):
            result = new(name, *more)
            assert (result.code, result.out) == (1, "")
            assert result.err.startswith(f"{name} exists and was not changed. Next: ")
    assert {path: path.lstat().st_mtime_ns for path in [tmp_path, *tmp_path.rglob("*")]} == before
    assert (tmp_path / "full" / "thesis.txt").read_text() == "the only copy"


@pytest.mark.parametrize(
    "arguments",
    [["Demo"], [".."], ["demo", "--kind", "file"], ["demo", "--into", "absent"], ["demo", "--author", "a\nb"]],
)
def test_a_refusal_leaves_the_disk_alone(new: New, tmp_path: Path, arguments: list[str]) -> None:
    """Whatever is refused is refused before the first file; the message is on standard error, without a traceback."""
    result = new(*arguments)
    assert (result.code, result.out) == (1, "")
    assert "Next: " in result.err
    assert "Traceback" not in result.err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_to_is_an_error_of_ours(new: New, tmp_path: Path) -> None:
    """A file stands where a folder is needed to write into."""
    (tmp_path / "file").write_text("")
    result = new("demo", "--into", tmp_path / "file")
    assert result.code == 1
    assert "file is not a folder. Next: " in result.err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_failure_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    """The last file has a name that no disk takes; what was written before it is gone."""
    from noether_init_core.scaffold.package import write_folder

    with pytest.raises(ConfigError, match="could not be written, and no file was left"):
        write_folder(tmp_path / "demo", {"first": "1", "sub/second": "2", "x" * 300: "3"})
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from noether_init_core.scaffold.package import names_of
from noether_init_core.scaffold.package import Base, render, write_folder

files = render(names_of("demo"), Base.SOURCE, author=None, year=2026, core="0.1")
count, limit = 0, None

def watch(event, arguments):
    global count
    if limit is None or event not in ("open", "os.mkdir", "os.rename"):
        return
    count += 1
    if count > limit:
        os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(watch)
for limit_here in range(200):
    where = Path(f"killed-{limit_here}")
    where.mkdir()
    child = os.fork()
    if child == 0:
        limit = limit_here
        write_folder(where / "demo", files)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, status
    if not os.WIFSIGNALED(status):
        print(limit_here, (where / "demo").is_dir())
        break
"""


def test_a_kill_in_the_middle_leaves_nothing_under_the_name(tmp_path: Path) -> None:
    """Killed before each operation in turn, up to the one that gives the folder its name; then all of it is there."""
    command = [sys.executable, "-c", textwrap.dedent(KILLED)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    operations, is_there = done.stdout.split()
    files = rendered()
    assert (int(operations) > len(files), is_there) == (True, "True")
    assert written(tmp_path / f"killed-{operations}" / "demo") == files
    for number in range(int(operations)):
        left = list((tmp_path / f"killed-{number}").iterdir())
        assert all(re.fullmatch(r"\.demo\.[0-9a-f]{8}\.partial", path.name) for path in left)
        assert len(left) == (number > 0)
