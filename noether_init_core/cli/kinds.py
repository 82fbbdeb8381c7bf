"""The commands about kinds: ``kinds``, ``schema``, ``example``, ``new`` and ``check``."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import inspect
import json
import re
import shlex
import sys
import tomllib
import traceback
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import attrs
import typer

from noether_init_core import kinds
from noether_init_core.cli.options import KIND, AsJson, Kind
from noether_init_core.cli.output import print_json, show, show_commands, show_json, show_table, show_text
from noether_init_core.cli.usage import plain_kinds
from noether_init_core.errors import ConfigError, KindError, KindImportError, UnknownKindError
from noether_init_core.files.storage.disk import LOCAL, reaching
from noether_init_core.kinds.lookup import OBSERVERS
from noether_init_core.scaffold.package import (
    BUILT_IN,
    Base,
    Names,
    check_absent,
    check_free,
    example_of,
    names_of,
    render,
    write_folder,
)

if TYPE_CHECKING:
    from noether_init_core.kinds.contract import Finding


_CORE = "noether-init-core"


def list_kinds(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: a list of objects.")] = False,
    observers: Annotated[bool, typer.Option("--observers", help="List observers instead of kinds.")] = False,
) -> None:
    """List the kinds that installed distributions provide. Imports no plugin."""
    found = OBSERVERS.all() if observers else kinds.installed()
    what = "observer" if observers else "kind"
    counts = Counter(info.name for info in found if info.blocked_by is None)
    conflicts = {name for name, count in counts.items() if count > 1}
    if as_json:
        rows = [
            {**attrs.asdict(info), "conflict": info.blocked_by is None and info.name in conflicts} for info in found
        ]
        print_json(json.dumps(rows, indent=2))
        return
    if not found:
        show(f"no {what} is installed. Next: python -m pip install --force-reinstall --no-deps noether-init-core")
        return
    show_table(("", what, "provided by"), [(_mark(info, conflicts), info.name, info.source) for info in found])
    if conflicts:
        show(f"x a {what} that several distributions provide cannot be used. Next: {kinds.DENY_VARIABLE}=DISTRIBUTION")


def _mark(info: kinds.KindInfo, conflicts: Collection[str]) -> tuple[str, str]:
    if info.blocked_by is not None:
        return f"- {info.blocked_by}", "dim"
    return ("x conflict", "red") if info.name in conflicts else ("ok", "green")


def show_schema(
    kind: Annotated[str | None, KIND] = None,
    of_all: Annotated[bool, typer.Option("--all", help="Print the schema of whole config files, for editors.")] = False,
) -> None:
    """Print the JSON schema of the config of a kind. Imports the plugin of that kind.

    With --all: of whole config files. Write it with ninit schema --all > init.schema.json, and begin a YAML file with #
    yaml-language-server: $schema=init.schema.json. Kinds that cannot be used are left out, and named on standard error.
    """
    if of_all == (kind is not None):
        names = ", ".join(plain_kinds())
        what = "KIND and --all were both given" if of_all else f"no KIND was given. Installed kinds: {names}"
        raise typer.BadParameter(f"{what}. Next: ninit schema --all, or ninit schema previous_run")
    from noether_init_core.config.base import kind_schema, schema_of_files

    if kind is not None:
        with _naming_folders(kind):
            schema = kind_schema(kind, kinds.resolve(kind).config_class.model_json_schema())
    else:
        found = {}
        for name in sorted({info.name for info in kinds.installed() if info.blocked_by is None}):
            try:
                found[name] = kinds.resolve(name).config_class.model_json_schema()
            except KindError as error:
                show(f"- {name} was left out: {error}", err=True)
        observers = sorted({info.name for info in OBSERVERS.all() if info.blocked_by is None})
        schema = schema_of_files(found, observers)
    print_json(json.dumps(schema, indent=2))


def write_example(
    kind: Kind,
    folder: Annotated[
        Path, typer.Argument(metavar="[FOLDER]", help="Folder to write to; created if it does not exist.")
    ] = Path(),
    only_print: Annotated[bool, typer.Option("--print", help="Print the files instead of writing them.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a training loop that runs, and its init.yaml, for one kind. Replaces no file.

    For the kinds of the core the files run as they are, in seconds and without data. For other kinds, fill in the keys
    that init.yaml marks as required.
    """
    with _naming_folders(kind):
        name = kinds.describe(kind).name
        schema = None if name in BUILT_IN else kinds.resolve(kind).config_class.model_json_schema()
    files, following = example_of(name, schema)
    if not only_print:
        _write_files(name, folder, files)
    if as_json:
        commands = [command for command, _what in following]
        data = {"kind": name, "folder": folder, "written": not only_print, "files": files, "next": commands}
        show_json("example", data)
        return
    for file, text in files.items():
        show_text(f"# ---- {file}\n{text}" if only_print else str(folder / file))
    into = [(f"cd {shlex.quote(str(folder))}", "")] if folder != Path() else []
    show_commands([*into, *following])


def _write_files(kind: str, folder: Path, files: Mapping[str, str]) -> None:
    """Write all of them, or none. Raises ``ConfigError`` where one exists, or the folder cannot be written."""
    with reaching(folder):
        there = [str(folder / name) for name in files if LOCAL.exists(folder / name)]
    if there:
        raise ConfigError(
            f"{', '.join(there)} {'exists' if len(there) == 1 else 'exist'}; nothing was written. "
            f"Next: ninit example {shlex.quote(kind)} {shlex.quote(str(folder / 'example'))}"
        )
    written: list[Path] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            with (folder / name).open("x", encoding="utf-8", newline="\n") as file:
                written.append(folder / name)
                file.write(text)
    except OSError as error:
        for path in written:
            path.unlink(missing_ok=True)
        raise ConfigError(f"{folder} cannot be written: {error.strerror}. Nothing was written") from error


def new(
    name: Annotated[
        str, typer.Argument(help="Name of the new package and its folder, such as demo.", show_default=False)
    ],
    kind: Annotated[
        str | None, typer.Option(help="Name of the kind in configs.", show_default="the name, with _ for -")
    ] = None,
    distribution: Annotated[str | None, typer.Option(help="Name for pip.", show_default="noether-init-NAME")] = None,
    base: Annotated[
        Base, typer.Option(help="source: the kind locates a file of weights; plain: the kind sets weights itself.")
    ] = Base.SOURCE,
    into: Annotated[Path, typer.Option(help="Folder to create the package in.")] = Path(),
    author: Annotated[
        str | None,
        typer.Option(
            help="For pyproject.toml and LICENSE: 'Jane Doe' or 'Jane Doe <jane@example.org>'.", show_default=False
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the files without writing them.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a package with a new kind: class, config, tests, conformance kit, CI. Writes all of it, or nothing.

    Refused: a folder that exists, names that cannot work, and a kind that an installed distribution provides.
    """
    names = names_of(name, kind=kind, distribution=distribution)
    check_free(names)
    folder = into / names.folder
    check_absent(folder)
    core = importlib.metadata.version(_CORE)
    files = render(names, base, author=author, year=datetime.date.today().year, core=core)
    if not dry_run:
        write_folder(folder, files)
    following = _following(names, folder)
    if as_json:
        data = {
            **attrs.asdict(names),
            "folder": folder,
            "base": base.value,
            "written": not dry_run,
            "files": list(files),
            "next": [command for command, _what in following],
        }
        show_json("new", data)
        return
    for file in files:
        show(str(folder / file))
    if dry_run:
        show(f"{len(files)} files, not written (--dry-run)")
    else:
        show_commands(following)


def _following(names: Names, folder: Path) -> list[tuple[str, str]]:
    """The next commands, each with its purpose."""
    return [
        (f"cd {shlex.quote(str(folder))}", f"the code of the kind is src/{names.package}/kind.py"),
        ("python -m pip install '.[test]'", f"registers {names.kind} and installs pytest"),
        ("python -m pytest", "every test passes before you change anything"),
        ("ninit kinds", f"{names.kind}, provided by {names.distribution} 0.1.0"),
        (f"ninit check {names.kind}", "check the class without running it"),
    ]


def check(kind: Kind, as_json: AsJson = False) -> None:
    """Check an installed kind without running it: its module is imported, and none of its code is called.

    Lines marked x break the contract: the kind cannot be used. Lines marked ! are advice to the author.
    """
    from noether_init_core.initializers.base import InitializerBase
    from noether_init_core.kinds import contract

    try:
        with _naming_folders(kind):
            info, loaded = kinds.load(kind)
    except KindImportError as error:
        info = kinds.describe(kind)
        if ":" not in info.target:
            error.add(f"\nThe entry point has no colon. Write: {kind} = package.module:ClassName")
        if as_json:
            fix = "correct the module, or the entry point: package.module:ClassName"
            _show_json(info, [contract.Finding(error.message, fix)], [])
        if error.__cause__ is not None:  # the author needs the traceback of the plugin
            traceback.print_exception(error.__cause__, file=sys.stderr)
        raise
    advice = [*_of_distribution(info)]
    if isinstance(loaded, type) and issubclass(loaded, InitializerBase):
        problems = [*filter(None, [contract.newer(loaded)]), *contract.examine(loaded)]
        advice += contract.advice(loaded) if not problems else ()
    else:
        what = "a class" if isinstance(loaded, type) else f"of type {type(loaded).__qualname__}"
        message = f"{info.target} is {what}, not a subclass of InitializerBase"
        problems = [contract.Finding(message, "name the class in the entry point: package.module:ClassName")]
    if as_json:
        _show_json(info, problems, advice)
    else:
        try:
            file = inspect.getsourcefile(loaded)  # type: ignore[arg-type]  # an entry point may name any object
        except TypeError:
            file = None
        show(f"{info.name}  {info.source}  {info.target}")
        if file is not None:
            show(f"   imported from {file}")
        _show_findings(problems, advice)
    if problems:
        raise typer.Exit(1)


@contextlib.contextmanager
def _naming_folders(kind: str) -> Iterator[None]:
    """If a kind is unknown and a project here declares it, add the command that installs the project to the error."""
    try:
        yield
    except UnknownKindError as error:
        for file in (Path("pyproject.toml"), *sorted(Path().glob("*/pyproject.toml"))):
            try:
                project = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
                has_kind = kind in project["entry-points"][kinds.GROUP]
                has_tests = "test" in project.get("optional-dependencies", ())
            except (OSError, ValueError, LookupError, TypeError, AttributeError):
                continue
            if has_kind:
                place = f"./{file.parent}" if file.parent != Path() else "."
                target = shlex.quote(f"{place}{'[test]' if has_tests else ''}")
                error.add(
                    f"\n{file} declares it, and that project is not installed. Next: python -m pip install {target}"
                )
                break
        raise


def _of_distribution(info: kinds.KindInfo) -> Iterator[Finding]:
    """Advice on the metadata of the distribution that provides the kind."""
    from noether_init_core.kinds.contract import Finding

    if info.distribution in (None, _CORE):
        return
    if other := kinds.imported_from(info):
        yield Finding(
            f"the class was imported from {other}, which is not a file of {info.distribution}",
            "run the command in another folder, or rename the folder that has the name of the package",
        )
    distribution = importlib.metadata.distribution(str(info.distribution))
    requirements = [re.split(r"[ ;\[<>=!~(]", line)[0] for line in distribution.requires or ()]
    if _CORE not in [name.lower().replace("_", "-") for name in requirements]:
        ours = importlib.metadata.version(_CORE).rsplit(".", 1)[0]
        yield Finding(
            f"{info.distribution} does not require {_CORE}, so that pip may not install it, or keep an old version",
            f'dependencies = ["{_CORE}>={ours}"] in pyproject.toml',
        )
    if "Requires-Python" not in distribution.metadata:
        yield Finding(
            f"{info.distribution} does not declare the versions of Python that it supports",
            'requires-python = ">=3.11" in pyproject.toml',
        )


def _show_json(info: kinds.KindInfo, problems: Sequence[Finding], advice: Sequence[Finding]) -> None:
    found = [*(("problem", one) for one in problems), *(("advice", one) for one in advice)]
    data = {
        "kind": info.name,
        "distribution": info.distribution,
        "version": info.version,
        "target": info.target,
        "findings": [{"severity": how, "message": one.message, "fix": one.fix} for how, one in found],
    }
    show_json("check", data)


def _show_findings(problems: Sequence[Finding], advice: Sequence[Finding]) -> None:
    for number, finding in enumerate([*problems, *advice]):
        show(f" {'x' if number < len(problems) else '!'} {finding.message}")
        show(f"   fix: {finding.fix}")
    if not problems and not advice:
        show(" = no problem found without running it")
    show(f"problems: {len(problems)}, advice: {len(advice)}")
    if not problems:
        show("Next: python -m pytest, with noether_init_core.testing, which runs the kind")
