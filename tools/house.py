"""Count what a reader of the package has to go through: ``python tools/house.py [CHECKOUT]`` (``make house``).

Three tables about one checkout of this project, by default the one that this file lies in:

- **Size.** Code lines (lines with a token that is no comment, docstring or line break) for each folder of the package
  and each plugin, files, modules of more than 450 lines of any sort, and circles of imports. Imports inside functions
  and under ``TYPE_CHECKING`` count; importing a name from a package counts as importing the module that defines it
  where there is such a module.
- **Questions.** What runs of the package's own code to answer a question: *files* (modules of which a function runs),
  *changes of file* (a function of one file is entered from another file, or returns to one: a call there and back is
  two), and *depth* (functions of the package on the stack at once). Only the main thread is watched, code of other
  packages is passed over, and each question is asked once before it is measured, so that no import counts.
- **Looks at the disk.** For a run with many sets: how many heads of sets (manifests) are opened, how many of them are
  different files, and how many folders are listed.

It names the public front only, so that it runs on older checkouts too.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import os
import subprocess
import sys
import tempfile
import tokenize
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PACKAGE = "noether_init_core"
LONG = 450
SETS = 20

# ---------------------------------------------------------------- size


def code_lines(source: str) -> int:
    """Lines of ``source`` with a token that is no comment, docstring or line break."""
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and type(first.value.value) is str:
                docstrings.update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    no_code = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in no_code:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - docstrings)


def room_of(path: Path) -> str:
    """The folder of the package, or the plugin, that a source file belongs to."""
    if path.parts[0] == "plugins":
        return f"plugins/{path.parts[1]}"
    return path.parts[1] if len(path.parts) > 2 else "(root)"


def sources(root: Path) -> list[Path]:
    """Source files of package (the stub of its front included) and plugins, relative to ``root``."""
    found = [path for kind in ("py", "pyi") for path in root.glob(f"{PACKAGE}/**/*.{kind}")]
    found += root.glob("plugins/*/src/**/*.py")
    return sorted(path.relative_to(root) for path in found)


def circles(root: Path) -> list[list[str]]:
    """Groups of modules of the package that import each other, directly or by way of others."""
    modules = {}
    for path in (root / PACKAGE).rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    imports: dict[str, set[str]] = {name: set() for name in modules}
    for name, path in modules.items():
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                imports[name].update(alias.name for alias in node.names if alias.name in modules)
            elif isinstance(node, ast.ImportFrom) and node.module in modules:
                inner = {f"{node.module}.{alias.name}" for alias in node.names}
                imports[name].update(one if one in modules else node.module for one in inner)
        imports[name] -= {name, PACKAGE}
    return [sorted(group) for group in _strongly_connected(imports) if len(group) > 1]


def _strongly_connected(edges: dict[str, set[str]]) -> Iterator[set[str]]:
    """Sets of nodes that reach each other."""
    reached = {node: _reach(node, edges) for node in edges}
    left = set(edges)
    while left:
        node = min(left)
        group = {node} | {other for other in reached[node] if node in reached[other]}
        yield group
        left -= group


def _reach(start: str, edges: dict[str, set[str]]) -> set[str]:
    found: set[str] = set()
    waiting = [start]
    while waiting:
        for node in edges[waiting.pop()] - found:
            found.add(node)
            waiting.append(node)
    return found


def print_size(root: Path) -> None:
    """The first table."""
    lines: dict[str, int] = {}
    files: dict[str, int] = {}
    long = []
    for path in sources(root):
        text = (root / path).read_text("utf-8")
        room = room_of(path)
        lines[room] = lines.get(room, 0) + code_lines(text)
        files[room] = files.get(room, 0) + 1
        if len(text.splitlines()) > LONG:
            long.append(path.as_posix())
    print("| folder | code lines | files |\n|---|---:|---:|")
    for room in sorted(lines, key=lambda room: -lines[room]):
        print(f"| {room} | {lines[room]:,} | {files[room]} |")
    print(f"| **all** | **{sum(lines.values()):,}** | **{sum(files.values())}** |")
    print(f"\nModules of more than {LONG} lines: {len(long)}{': ' if long else ''}{', '.join(long)}")
    groups = circles(root)
    print(f"\nCircles of imports: {len(groups)}" + "".join(f"\n- {', '.join(group)}" for group in groups))


# ---------------------------------------------------------------- questions, in a process that imports the checkout


class Walk:
    """What runs of the package in a ``with`` block, in this thread."""

    def __init__(self, root: Path) -> None:
        self._roots = (f"{root / PACKAGE}{os.sep}", f"{root / 'plugins'}{os.sep}")
        self._stack: list[str | None] = []
        self.files: set[str] = set()
        self.entered: Counter[tuple[str, str, str]] = Counter()  # (from file, to file, function)
        self.changes = self.depth = 0

    def __enter__(self) -> Walk:
        sys.setprofile(self._event)
        return self

    def __exit__(self, *_error: object) -> None:
        sys.setprofile(None)

    def _event(self, frame: Any, event: str, _argument: Any) -> None:
        if event not in ("call", "return"):
            return
        name = frame.f_code.co_filename
        file = name if name.startswith(self._roots) and frame.f_code.co_name != "<module>" else None
        if event == "return" and self._stack:  # the first return is that of __enter__, which was not seen to begin
            self._stack.pop()
        if file is not None:
            below = next((other for other in reversed(self._stack) if other is not None), None)
            if below is not None and below != file:
                self.changes += 1
                self.entered[below, file, frame.f_code.co_name] += event == "call"
        if event == "call":
            self._stack.append(file)
            if file is not None:
                self.files.add(file)
                self.depth = max(self.depth, sum(other is not None for other in self._stack))


class Looks:
    """Heads of sets that are opened, and folders below ``folder`` that are listed, in a ``with`` block."""

    def __init__(self, folder: Path) -> None:
        self._folder = str(folder)
        self._watching = False
        self.heads: list[str] = []
        self.listings: list[str] = []
        sys.addaudithook(self._event)  # it stays until the process ends

    def __enter__(self) -> Looks:
        self._watching = True
        return self

    def __exit__(self, *_error: object) -> None:
        self._watching = False

    def _event(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._watching or event not in ("open", "os.listdir", "os.scandir"):
            return
        path = "." if arguments[0] is None else arguments[0]
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}") if event != "open" else ""
        path = os.fsdecode(path)
        if event != "open" and path.startswith(self._folder):
            self.listings.append(path)
        elif event == "open" and os.path.basename(path) == "manifest.json":
            self.heads.append(path)


def world(folder: Path, sets: int) -> Any:
    """A run ``old`` with ``sets`` sets and what asks about it."""
    import torch

    from noether_init_core import CheckpointWriter, PathProvider, TrainerState, bind

    class World:
        def __init__(self) -> None:
            self.folder = folder
            self.old = PathProvider(folder, "old")
            self.new = PathProvider(folder, "new")

        def at(self, number: int = 0) -> tuple[Any, Any]:
            """A model with optimizer and a trainer at the end of epoch ``number``."""
            module = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 2))
            optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
            module(torch.ones(3, 4)).sum().backward()
            optimizer.step()
            trainer = TrainerState(seed=1)
            for _ in range(number):
                trainer.advance(8, end_of_epoch=True)
            return bind(module, name="mlp", optimizer=optimizer), trainer

    made = World()
    for number in range(1, sets + 1):
        model, trainer = made.at(number)
        CheckpointWriter(made.old).save(model, trainer=trainer)
    return made


@contextmanager
def quiet() -> Iterator[None]:
    """Warnings of the log are not the table's."""
    import logging

    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def started(paths: Any, configs: Any, model: Any, trainer: Any = None) -> Any:
    """One start of training."""
    from noether_init_core import InitializerStack

    return InitializerStack.from_config(configs, path_provider=paths).initialize(model, trainer=trainer)


def saved(paths: Any, model: Any, trainer: Any, **options: Any) -> None:
    """One save, by a writer of its own."""
    from noether_init_core import CheckpointWriter

    CheckpointWriter(paths, **options).save(model, trainer=trainer)


def started_from_file(paths: Any, text: str, model: Any, trainer: Any) -> Any:
    """One start of training from a file of config beside the runs."""
    from noether_init_core import InitializerStack

    file = Path(paths.output_root) / "init.yaml"
    file.write_text(text)
    return InitializerStack.from_file(file, path_provider=paths).initialize(model, trainer=trainer)


def questions(made: Any) -> dict[str, Callable[[Any, Any], Any]]:
    """Title -> call with a model and a trainer."""
    previous = {"kind": "previous_run", "run_id": "old", "model_name": "mlp"}
    resume = {"kind": "resume", "run_id": "old", "model_name": "mlp"}
    drawn = {"kind": "random", "seed": 7, "rules": [{"match": "0.weight", "init": "xavier_uniform_"}]}
    return {
        "`previous_run`": lambda model, _trainer: started(made.new, [previous], model),
        "`resume`": lambda model, trainer: started(made.new, [resume], model, trainer),
        "`save`": lambda model, trainer: saved(made.new, model, trainer),
        "`random`, a kind of a plugin": lambda model, _trainer: started(made.new, [drawn], model),
    }


def look_ups(made: Any) -> dict[str, Callable[[Any, Any], Any]]:
    """Title -> call with a model and a trainer, beside many sets."""
    resume = {"kind": "resume", "run_id": "old", "model_name": "mlp"}
    own = "auto_resume: true\n"
    return {
        "`resume` by `latest`": lambda *pair: started(made.new, [resume], *pair),
        "`resume` by `{epoch: 3}`": lambda *pair: started(
            made.new, [{**resume, "checkpoint_tag": {"epoch": 3}}], *pair
        ),
        "`auto_resume`": lambda *pair: started_from_file(made.old, own, *pair),
        "`auto_resume`, `on_invalid: previous`": lambda *pair: started_from_file(
            made.old, f"{own}on_invalid: previous\n", *pair
        ),
        f"`save`, `keep_last: {SETS}`": lambda *pair: saved(made.old, *pair, keep_last=SETS),
    }


def measure(root: Path) -> dict[str, Any]:
    """The numbers of the second and third table, from the package that is imported here."""
    found: dict[str, Any] = {"questions": {}, "looks": {}}
    with tempfile.TemporaryDirectory() as folder, quiet():
        made = world(Path(folder).resolve(), 2)
        for number, (title, ask) in enumerate(questions(made).items()):
            ask(*made.at(10 + 2 * number))
            model, trainer = made.at(11 + 2 * number)
            with Walk(root) as walk:
                ask(model, trainer)
            found["questions"][title] = [len(walk.files), walk.changes, walk.depth]
            found.setdefault("files", {})[title] = sorted(os.path.relpath(file, root) for file in walk.files)
            found.setdefault("most", {})[title] = [
                f"{count} {os.path.relpath(first, root)} -> {os.path.relpath(other, root)} {function}"
                for (first, other, function), count in walk.entered.most_common(20)
            ]
    with tempfile.TemporaryDirectory() as folder, quiet():
        made = world(Path(folder).resolve(), SETS)
        for title, ask in look_ups(made).items():
            ask(*made.at(SETS + 1))
            model, trainer = made.at(SETS + 2)
            with Looks(made.folder) as looks:
                ask(model, trainer)
            found["looks"][title] = [len(looks.heads), len(set(looks.heads)), len(looks.listings)]
    return found


def print_measured(root: Path, *, name_files: bool) -> None:
    """The second and third table."""
    paths = [root, *sorted(root.glob("plugins/*/src"))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).resolve()), str(root), "--measure"]
    output = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    found = json.loads(output.splitlines()[-1])
    print("| question | files | changes of file | depth |\n|---|---:|---:|---:|")
    for title, (files, changes, depth) in found["questions"].items():
        print(f"| {title} | {files} | {changes:,} | {depth} |")
    print(f"\n| beside {SETS} sets | heads opened | different | folders listed |\n|---|---:|---:|---:|")
    for title, (heads, different, listings) in found["looks"].items():
        print(f"| {title} | {heads} | {different} | {listings} |")
    for title, files in found["files"].items() if name_files else ():
        print(f"\n{title}: {', '.join(files)}\n" + "".join(f"\n- {one}" for one in found["most"][title]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", nargs="?", type=Path, default=Path(__file__).resolve().parents[1])
    parser.add_argument(
        "--files", action="store_true", help="name the files, and the calls between files that occur most"
    )
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    checkout = chosen.checkout.resolve()
    if chosen.measure:
        print(json.dumps(measure(checkout)))
    else:
        print_size(checkout)
        print()
        print_measured(checkout, name_files=chosen.files)
