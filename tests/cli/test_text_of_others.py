"""Text of others goes through every command and comes back unharmed, wherever it enters."""

from __future__ import annotations

import html.parser
import json
import logging
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import msgspec
import pytest
import torch
import yaml
from support.command import Invoke, Result, console
from support.foreign import ForeignPackages
from support.handmade import string, tensor, write_pickle

from noether_init_core import CheckpointWriter, InitializerStack, PathProvider, TrainingIteration, bind, kinds
from noether_init_core.sets.manifest import read_manifest

#: What others write: lines of their own, what a terminal acts on, marks of direction, and what YAML and HTML act on.
TEXTS = {
    "lines": "a\nx forged line\rx forged line\u2028x forged line\x85x forged line\x0bx forged line",
    "controls": "b\x1b[2J\x1b]0;t\x07\x9b2J\x08\u202e\u2066\u200f\x7f\u200b",
    "signs": "c\"'#: {e}, [f] &g *h !i %j @k `l </script><script>x</script> \\n $(m) ;n",
}
MODELS = """
import torch
from noether_init_core import bind

TEXT = {text!r}


def build():
    return bind(type(TEXT, (torch.nn.Linear,), {{"__module__": TEXT, "__qualname__": TEXT}})(2, 2), name="net")


def plain():
    return bind(torch.nn.Linear(2, 2), name="net")


def fail():
    raise ValueError(TEXT)
"""
KINDS = """
import logging
import warnings

from noether_init_core import InitializerBase, InitializerConfig

TEXT = {text!r}


class Odd(InitializerBase):
    __doc__ = TEXT
    config_class = InitializerConfig

    def check(self, model, trainer=None, callbacks=None):
        raise ValueError(TEXT)

    def init_weights(self, model):
        raise KeyError(TEXT)

    def init_optimizer(self, model):
        pass


class Late(Odd):
    def check(self, model, trainer=None, callbacks=None):
        pass


class Validated(InitializerConfig):
    def model_post_init(self, context):
        raise ValueError(TEXT)


class Validates(Odd):
    config_class = Validated
"""


def check(text: str) -> None:
    """Nothing in it acts on a terminal, and no line begins with what a name holds after a line break."""
    lines = text.split("\n")
    assert [line for line in lines if not line.isprintable()] == []
    assert [line for line in lines if line.lstrip(" -│").startswith("x forged")] == []


def texts_in(value: Any) -> Iterator[str]:
    """Every text in JSON data, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, child in value.items():
            yield key
            yield from texts_in(child)
    elif isinstance(value, list):
        for child in value:
            yield from texts_in(child)


def save_run(root: str, run: str, **manifest: Any) -> Path:
    """A run with one set; fields of its manifest as given."""
    model = bind(torch.nn.Linear(2, 2), name="net")
    CheckpointWriter(PathProvider(root, run)).save(model, TrainingIteration(1, 1, 1))
    folder = next(path.parent for path in (Path(root) / run).rglob("manifest.json"))
    changed = msgspec.structs.replace(read_manifest(folder / "manifest.json"), **manifest) if manifest else None
    if changed is not None:
        (folder / "manifest.json").write_bytes(changed.to_bytes())
    return folder


def config(*lines: str) -> None:
    """``init.yaml`` with these entries."""
    Path("init.yaml").write_text("initializers:\n" + "".join(f"  - {line}\n" for line in lines), "utf-8")


PLAN = "plan init.yaml --model odd_models:plain"
WITH = {
    "plan": PLAN + " --all",
    "suggest": "suggest init.yaml --model odd_models:plain",
    "apply": "apply init.yaml --model odd_models:plain --out out.safetensors",
}


@attrs.frozen
class Entered:
    """Where a text enters: what writes it, and the commands that meet it; those that give it back as JSON, last."""

    write: Callable[[str], object]
    commands: tuple[str, ...]
    exact: tuple[str, ...] = ()


def stack_global(module: str, attribute: str) -> bytes:
    """A name as protocol 4 writes it: line breaks included."""
    return string(module) + string(attribute) + b"\x93"


def foreign_class(text: str) -> None:
    made = stack_global("acme", text) + b")\x81"
    weights = b"}(" + string("weight") + tensor([2, 2], [2, 1]) + string("bias") + tensor([2], [1]) + b"u"
    write_pickle(Path("a.pt"), b"}(" + string("state_dict") + weights + string("other") + made + b"u")
    write_pickle(Path("b.pt"), b"}(" + string("weight") + made + b"u")
    config("{kind: file, path: b.pt}")


def keys(text: str) -> None:
    torch.save({"state_dict": {"weight": torch.ones(2, 2), text: torch.ones(2)}, text: {text: 1}}, "a.pt")
    torch.save({"weight": torch.ones(2, 2), text + "2": torch.ones(2)}, "b.pt")
    config("{kind: file, path: a.pt}")


def callbacks(text: str) -> None:
    content = {"callback_state_dicts": {text: {"a": 1}}, "run_id": text, "training_iteration": {text: text}}
    torch.save({"state_dict": {}, **content}, "a.pt")


def manifest(text: str) -> None:
    whole = {
        "run_id": text,
        "stage_name": text,
        "created": text,
        "metrics": {text: 1.0},
        "frozen": (text,),
        "training": text,
        "started_from": text,
        "passed_over": (text,),
        "versions": {text: text, "torch": text},
        "lineage": ({"kind": text, "run_id": text, "path": text, "model": text, text: text},),
    }
    save_run("runs", "first", **whole)
    config("{kind: previous_run, run_id: first}")


def in_file_name(text: str) -> str:
    """What of it can be the name of a file."""
    return text.split("/")[0]


def folders(text: str) -> None:
    odd = in_file_name(text)
    save_run("runs", "first")
    Path("runs/first").rename(Path("runs") / odd)
    Path("runs/link").symlink_to(odd)
    torch.save({"weight": torch.ones(2, 2), "bias": torch.ones(2)}, f"{odd}.pt")
    Path("init.yaml").write_text(f"initializers:\n  - {json.dumps({'kind': 'file', 'path': f'{odd}.pt'})}\n", "utf-8")


def config_keys(text: str) -> None:
    entry = {"kind": "file", text: text, "path": text, "transforms": [{text: {text: text}}], "missing": text}
    Path("init.yaml").write_text(json.dumps({"initializers": [entry], text: {text: text}}), "utf-8")


def values_of_config(text: str) -> None:
    torch.save({"weight": torch.ones(2, 2), "bias": torch.ones(2)}, "a.pt")
    entry = {"kind": "file", "path": "a.pt", "transforms": [{"rename": {text: text}}, {"drop": [text]}]}
    Path("init.yaml").write_text(json.dumps({"initializers": [entry]}), "utf-8")


def kind_name(text: str) -> None:
    Path("init.yaml").write_text(json.dumps({"initializers": [{"kind": text}]}), "utf-8")


def in_metadata(text: str) -> str:
    """What of it can stand in a line of the metadata of a distribution, and be the name of an entry point."""
    return "".join(one for one in text if one not in "=[]#:" and (one.isprintable() or one in "\x1b\x07\u202e"))


def metadata(text: str) -> None:
    odd = in_metadata(text)
    info = Path("site2") / "odder-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {odd}\nVersion: 1{odd}\nSummary: {odd}\n", "utf-8")
    (info / "entry_points.txt").write_text(f"[{kinds.GROUP}]\n{odd} = odder:{odd}\nodd = odder:Odd\n", "utf-8")
    sys.path.insert(0, str(Path("site2").resolve()))
    kinds.clear_cache()
    Path("init.yaml").write_text(json.dumps({"initializers": [{"kind": odd}, {"kind": "odd"}]}), "utf-8")


def kinds_fail(text: str) -> None:
    config("{kind: odd}")
    Path("late.yaml").write_text("initializers:\n  - {kind: late}\n")
    Path("validates.yaml").write_text("initializers:\n  - {kind: validates}\n")


PLACES: dict[str, Entered] = {
    "class of a pickled object": Entered(
        foreign_class,
        ("inspect a.pt", "inspect a.pt --all", "inspect b.pt", "verify a.pt b.pt", "diff a.pt b.pt", *WITH.values()),
        ("inspect a.pt --json",),
    ),
    "keys of a file": Entered(
        keys,
        ("inspect a.pt", "inspect a.pt --all", "verify a.pt", "diff a.pt b.pt --all", *WITH.values()),
        ("inspect a.pt --json", "diff a.pt b.pt --json", PLAN + " --json -"),
    ),
    "callbacks, run and iteration of a trainer file": Entered(callbacks, ("inspect a.pt",), ("inspect a.pt --json",)),
    "fields of a manifest": Entered(
        manifest,
        (
            "inspect runs/first",
            "inspect runs",
            "lineage runs",
            "lineage runs/first",
            "verify runs/first",
            "diff runs/first runs/first",
            *(f"{line} --runs runs --run-id next" for line in WITH.values()),
        ),
        ("lineage runs/first --json", "inspect runs/first --json"),
    ),
    "files and folders": Entered(
        folders,
        ("inspect .", "inspect runs", "inspect runs/link", "lineage runs", "verify .", *WITH.values()),
        ("lineage runs --json", PLAN + " --json -"),
    ),
    "metadata of a distribution": Entered(
        metadata,
        ("kinds", "validate init.yaml", *WITH.values()),
        ("kinds --json",),
    ),
    "keys of a config": Entered(config_keys, ("validate init.yaml", *WITH.values())),
    "values of a config": Entered(values_of_config, ("validate init.yaml", *WITH.values())),
    "kind in a config": Entered(kind_name, ("validate init.yaml", *WITH.values())),
    "exceptions of a plugin": Entered(
        kinds_fail,
        (
            "kinds",
            "schema odd",
            "check odd",
            "example odd --print",
            "validate validates.yaml",
            "plan validates.yaml --model odd_models:plain",
            *WITH.values(),
            WITH["apply"].replace("init", "late"),
        ),
    ),
    "exception of a model": Entered(
        values_of_config, tuple(line.replace("odd_models:plain", "odd_models:fail") for line in WITH.values())
    ),
    "class of a model": Entered(
        values_of_config, tuple(line.replace("odd_models:plain", "odd_models:build") for line in WITH.values())
    ),
    "what is typed": Entered(
        values_of_config,
        (
            "inspect TEXT",
            "diff TEXT TEXT",
            "lineage TEXT",
            "example TEXT",
            "schema TEXT",
            "validate TEXT",
            "suggest TEXT --model TEXT",
            "plan init.yaml --model TEXT",
            "plan init.yaml --model odd_models:TEXT",
            "plan init.yaml --model odd_models:plain --model-name TEXT",
            "verify TEXT",
            "apply init.yaml --model odd_models:plain --out TEXT",
            "new TEXT",
            "new demo --kind TEXT",
            "check TEXT",
            "TEXT",
            "kinds --TEXT",
        ),
    ),
}


@pytest.fixture(params=TEXTS)
def text(request: pytest.FixtureRequest) -> str:
    """Each of the texts."""
    return TEXTS[request.param]


@pytest.fixture
def invoke(
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    foreign: ForeignPackages,
) -> Iterator[Invoke]:
    """A folder with models and a distribution whose code is of others; what a command prints is checked."""
    offers = {name: f"odd_kinds:{name.capitalize()}" for name in ("odd", "late", "validates")}
    foreign.install("odd-init", offers=offers, modules={"odd_kinds": KINDS.format(text=text)})
    with console(tmp_path, monkeypatch, capsys, columns=100, odd_models=MODELS.format(text=text)) as call:

        def checked(*arguments: str, is_traceback: bool = False) -> Result:
            result = call(*arguments)
            if is_traceback:  # Python shows the lines of a text as lines
                assert [line for line in result.err.split("\n") if not line.isprintable()] == []
            else:
                check(result.err)
            if "--json" not in arguments:
                check(result.out)
            return result

        yield checked


@pytest.mark.parametrize("place", PLACES)
def test_no_command_prints_it_raw_and_json_has_it_exactly(invoke: Invoke, place: str, text: str) -> None:
    """No line is forged and nothing acts on the terminal; errors end with the code 1 or 2."""
    entered = PLACES[place]
    entered.write(text)
    for line in entered.commands:
        result = invoke(*(word.replace("TEXT", text) for word in shlex.split(line)))
        assert result.code in (0, 1, 2), line
        assert "Traceback" not in result.err, line
    for line in entered.exact:
        data = json.loads(invoke(*shlex.split(line)).out)
        in_names: dict[str, Callable[[str], str]] = {
            "files and folders": in_file_name,
            "metadata of a distribution": in_metadata,
        }
        sought = in_names.get(place, str)(text)
        assert any(sought in one for one in texts_in(data)), line


PAGES = {
    "plan": ("keys of a file", PLAN + " --html page.html"),
    "diff": ("keys of a file", "diff a.pt b.pt --html page.html"),
    "lineage": ("fields of a manifest", "lineage runs --html page.html"),
    "a file of a strange name": ("files and folders", PLAN + " --html page.html"),
}


class Scripts(html.parser.HTMLParser):
    """The elements of a page, and the content of its scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, tuple[str, ...]]] = []
        self.data: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, tuple(name for name, _value in attrs)))
        if tag == "script":
            self.data.append("")

    def handle_data(self, data: str) -> None:
        if self.elements and self.elements[-1][0] == "script":
            self.data[-1] += data


@pytest.mark.parametrize("page", PAGES)
def test_a_page_has_it_as_data_only(invoke: Invoke, page: str, text: str) -> None:
    """A parser finds the elements of any other page, and the exact text in the data."""
    pytest.importorskip("noether_init_pages")
    place, line = PAGES[page]
    PLACES[place].write(text)
    invoke(*shlex.split(line))
    found = Scripts(Path("page.html").read_text("utf-8"))
    for folder in ("runs", "site2"):
        shutil.rmtree(folder, ignore_errors=True)
    PLACES[place].write("plain")
    invoke(*shlex.split(line))
    assert found.elements == Scripts(Path("page.html").read_text("utf-8")).elements
    data = [json.loads(one) for one in found.data if one.startswith("{")]
    sought = in_file_name(text) if place == "files and folders" else text
    assert any(sought in one for one in texts_in(data))


def test_what_is_to_be_pasted_is_read_back(invoke: Invoke, text: str) -> None:
    """The lines that ``suggest`` and ``apply`` print name the keys and the file as they are."""
    prefix = text.partition("{")[0]
    torch.save({f"{prefix}.weight": torch.ones(2, 2), f"{prefix}.bias": torch.ones(2)}, "a.pt")
    config("{kind: file, path: a.pt}")
    printed = invoke(*shlex.split(WITH["suggest"])).out.partition("\ncoverage")[0]
    (suggested,) = json.loads(invoke(*shlex.split(WITH["suggest"]), "--json").out)["suggestions"]
    assert yaml.safe_load(printed) == suggested["config"]
    assert any(prefix in one for one in texts_in(suggested["config"]))
    torch.save({"weight": torch.ones(2, 2), "bias": torch.ones(2)}, "a.pt")
    out = f"{in_file_name(text)}.safetensors"
    done = invoke("apply", "init.yaml", "--model", "odd_models:plain", "--out", out)
    assert done.code == 0
    (line,) = (line for line in done.out.splitlines() if line.startswith("  - {"))
    assert yaml.safe_load(line)[0]["path"] == out


def test_the_traceback_of_a_plugin_is_safe(invoke: Invoke, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """``NOETHER_INIT_TRACEBACK=1`` shows what a plugin raised, and nothing in it acts on a terminal."""
    monkeypatch.setenv("NOETHER_INIT_TRACEBACK", "1")
    kinds_fail(text)
    failed = invoke(*shlex.split(WITH["plan"]), is_traceback=True)
    assert "Traceback (most recent call last)" in failed.err


def test_a_log_has_it_on_one_line(invoke: Invoke, text: str, caplog: pytest.LogCaptureFixture) -> None:
    """A start from a run whose manifest holds it."""
    given = {"kind": text, "run_id": text, "path": text, "model": text}
    save_run("runs", "first", versions={text: text, "torch": text}, lineage=(given,), training=text, frozen=(text,))
    stack = InitializerStack.from_config(
        [{"kind": "previous_run", "run_id": "first"}], path_provider=PathProvider("runs", "next")
    )
    with caplog.at_level(logging.DEBUG, "noether_init_core"):
        stack.initialize(bind(torch.nn.Linear(2, 2), name="net"))
    assert caplog.messages
    for message in caplog.messages:
        check(message)
