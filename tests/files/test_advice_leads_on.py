"""What an error about a file, or about the cache of files, advises is done here, and leads on."""

from __future__ import annotations

import hashlib
import importlib
import os
import pickle
import re
import shutil
import sys
import threading
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from support.advice import digests, executes, typed
from support.following import advised, refusal

from noether_init_core import ArtifactCache, InitializerStack, PathProvider, bind
from noether_init_core.files.opening import open_checkpoint

CONTENT = b"content of the file"


def write(target: Path) -> None:
    target.write_bytes(CONTENT)


def setting(advice: str) -> tuple[str, str]:
    """Name and value of the variable that an advice sets."""
    found = re.search(r"set (\w+)=(<[^>]*>|\S+)", advice)
    assert found is not None, advice
    return found[1], found[2]


@executes("files/storage/artifact_cache.py", "Next: set {}=<a folder of your own>", "Next: set {}=<a folder>")
@executes("files/storage/artifact_cache.py", "Next: set {}=<absolute path of a folder>")
@pytest.mark.parametrize("case", ["a file", "of others", "no home", "unusable"])
def test_a_cache_gets_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    """By the variable of the message; what is in the first folder stays."""
    first = tmp_path / "first"
    if case == "a file":
        first.write_text("mine")
    elif case == "of others":
        first.mkdir()
        (first / "entry").write_text("mine")
        first.chmod(0o777)
    elif case == "unusable":
        first.symlink_to(first)
    monkeypatch.setenv("NOETHER_INIT_CACHE", "~no-such-user/cache" if case == "no home" else str(first))
    before = digests(tmp_path)
    name, value = setting(advised(lambda: ArtifactCache().get("key", write)))
    assert "folder" in value
    monkeypatch.setenv(name, str(tmp_path / "own"))
    assert ArtifactCache().get("key", write).read_bytes() == CONTENT
    assert before.items() <= digests(tmp_path).items()


@executes("files/storage/artifact_cache.py", "Next: set {}=1 to fetch nothing, or unset it to fetch missing files")
@executes("files/storage/artifact_cache.py", "Next: {}, or put the file there as {}")
def test_offline_mode_is_left_or_the_file_is_put_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the variable or the argument, or by a copy to the path of the message."""
    monkeypatch.setenv("NOETHER_INIT_OFFLINE", "maybe")
    name, value = setting(advised(lambda: ArtifactCache(tmp_path / "a")))
    monkeypatch.setenv(name, value)
    offline = ArtifactCache(tmp_path / "a")
    way, _, entry = advised(lambda: offline.get("key", write)).partition(", or put the file there as ")
    (tmp_path / "a").mkdir(mode=0o700, exist_ok=True)
    Path(entry).write_bytes(CONTENT)
    assert offline.get("key", write).read_bytes() == CONTENT
    monkeypatch.delenv(way.removeprefix("unset "))
    assert ArtifactCache(tmp_path / "b").get("key", write).read_bytes() == CONTENT
    advice = advised(lambda: ArtifactCache(tmp_path / "c", offline=True).get("key", write))
    assert advice.startswith("leave out offline=True, or put the file there as ")
    assert ArtifactCache(tmp_path / "c").get("key", write).read_bytes() == CONTENT


@executes("files/storage/artifact_cache.py", "Next: remove it, or put the file itself there")
@executes("files/storage/artifact_cache.py", "Next: write the content to target in download(target)")
@executes(
    "files/storage/artifact_cache.py", "Next: correct the digest if the file was replaced on purpose, or fetch it"
)
def test_an_entry_is_a_file_with_the_content(tmp_path: Path) -> None:
    """A link is removed or replaced, and what it leads to stays; a download writes to its argument."""
    cache = ArtifactCache(tmp_path / "cache")
    entry = cache.get("key", write)
    mine = tmp_path / "mine"
    mine.write_bytes(b"mine")
    for way in ("remove it", "put the file itself there"):
        entry.unlink()
        entry.symlink_to(mine)
        assert advised(lambda: cache.get("key", write)) == "remove it, or put the file itself there"
        entry.unlink()
        if way != "remove it":
            entry.write_bytes(b"mine")
        assert cache.get("key", write).read_bytes() == (CONTENT if way == "remove it" else b"mine")
    assert mine.read_bytes() == b"mine"

    linked = advised(lambda: cache.get("other", lambda target: target.symlink_to(mine)))
    assert linked == "write the content to target in download(target)"
    assert cache.get("other", lambda target: target.write_bytes(mine.read_bytes())).read_bytes() == b"mine"

    right, wrong = (f"sha256:{hashlib.sha256(one).hexdigest()}" for one in (CONTENT, b"another"))
    said = advised(lambda: cache.get("third", write, digest=wrong))
    assert said == "correct the digest if the file was replaced on purpose, or fetch it from another source"
    assert cache.get("third", lambda target: target.write_bytes(b"another"), digest=wrong).read_bytes() == b"another"
    assert cache.get("fourth", write, digest=right).read_bytes() == CONTENT


@executes("files/storage/artifact_cache.py", "Next: fuser {} shows its process; end it, or set a longer timeout")
def test_a_lock_is_waited_for_longer(tmp_path: Path) -> None:
    """The command names the lock file, in quotes where the shell needs them; with more time, the file is there."""
    folder = tmp_path / "a cache"
    begun, go_on = threading.Event(), threading.Event()

    def slow(target: Path) -> None:
        begun.set()
        assert go_on.wait(60)
        write(target)

    thread = threading.Thread(target=lambda: ArtifactCache(folder).get("key", slow))
    thread.start()
    assert begun.wait(60)
    advice = advised(lambda: ArtifactCache(folder, timeout=0.01).get("key", write))
    command = advice.partition(" shows its process")[0]
    assert typed(command.replace("fuser ", "ls ")).stdout.strip().startswith(str(folder))
    go_on.set()
    assert ArtifactCache(folder, timeout=60).get("key", write).read_bytes() == CONTENT
    thread.join()


def saved(path: Path, value: Any = None) -> Path:
    torch.save(torch.nn.Linear(3, 2).state_dict() if value is None else value, path)
    return path


@executes("files/storage/handle.py", "Next: open_checkpoint again", "Next: give the file itself")
@executes("files/storage/handle.py", "Next: start again after the run that writes it has ended, or select a checkpoint")
@executes("files/opening.py", "Next: open_checkpoint again", "Next: pass a leaf of values() of this checkpoint")
def test_a_file_is_opened_again(tmp_path: Path) -> None:
    """After it was closed or written again, and where a pipe is in its place; a leaf is taken from the right file."""
    path, other = saved(tmp_path / "a.pt"), saved(tmp_path / "b.pt", {"weight": torch.ones(9999)})
    with open_checkpoint(path) as reader:
        pass
    assert advised(lambda: reader.read("weight")) == "open_checkpoint again"
    with open_checkpoint(path) as reader, open_checkpoint(other) as second:
        of_other = second.values()["weight"]
        assert advised(lambda: reader.read(of_other)) == "pass a leaf of values() of this checkpoint"
        assert reader.read(reader.values()["weight"]).shape == (2, 3)
        text = pickle.dumps(reader)
    with open_checkpoint(path) as reader:
        os.utime(path, ns=(1, 1))
        said = advised(reader.verify)
        assert said.startswith("start again after the run that writes it has ended")
    with open_checkpoint(path) as reader:
        reader.verify()
    saved(path)
    assert advised(lambda: pickle.loads(text)) == "open_checkpoint again"
    os.mkfifo(tmp_path / "pipe")
    assert advised(lambda: open_checkpoint(tmp_path / "pipe")) == "give the file itself"


@executes("files/storage/handle.py", "Next: copy it again, or take an older checkpoint")
@executes("files/storage/handle.py", "Next: copy the file again from where it was written, or take an older checkpoint")
@executes("files/storage/handle.py", "Next: write xxh3_128:<32 hexadecimal digits> or sha256:<64 hexadecimal digits>")
@executes("files/formats/safetensors.py", "Next: copy the file again from where it was written, or take an older")
@executes("files/formats/others.py", "Next: copy the file again from where it was written, or take an older checkpoint")
@pytest.mark.parametrize("damage", ["a bit", "the digest", "the end of a.pt", "the end of a.safetensors"])
def test_a_damaged_file_is_copied_again_or_an_older_one_is_taken(tmp_path: Path, damage: str) -> None:
    """Both are verified; the file that was copied from is as it was."""
    name = damage.rpartition(" ")[2] if damage.startswith("the end") else "a.pt"
    origin = tmp_path / "origin"
    origin.mkdir()
    for file in (name, "older.pt"):
        saved(origin / file)
    if name.endswith("safetensors"):
        save_file(torch.nn.Linear(3, 2).state_dict(), origin / name)
    before = digests(origin)
    path = tmp_path / name
    content = (origin / name).read_bytes()
    with open_checkpoint(origin / name) as reader:
        first = reader.read("weight").numpy().tobytes()
    at = content.index(first)
    changed = content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
    path.write_bytes(content[: len(content) // 2] if damage.startswith("the end") else changed)
    digest = f"sha256:{hashlib.sha256(content).hexdigest()}" if damage == "the digest" else None

    def verified(file: Path, digest: str | None = digest) -> None:
        with open_checkpoint(file, digests=digest) as reader:
            reader.verify()
            reader.read("weight")

    if damage == "the digest":
        form = advised(lambda: verified(path, "sha256:12"))
        assert form.startswith("write xxh3_128:<32 hexadecimal digits> or sha256:<64 hexadecimal digits>")
    assert re.match(r"copy (it|the file) again.*, or take an older checkpoint", advised(lambda: verified(path)))
    shutil.copy(origin / name, path)
    if name.endswith("pt"):
        verified(path)
    else:
        with open_checkpoint(path) as reader:
            reader.read("weight")
    verified(origin / "older.pt", None)
    assert digests(origin) == before


@executes(
    "files/formats/safetensors.py", "Next: write it to another file with safetensors.torch.save_file(tensors, path)"
)
@executes("files/formats/others.py", "Next: write the weights to another file with torch.save(state_dict, path)")
@executes("files/refusals.py", "Next: write it to another file with torch.save(state_dict, path), with tensors and")
def test_a_refused_file_is_written_again(tmp_path: Path) -> None:
    """To another path, by the call of the message; the refused file stays."""
    import safetensors

    state = torch.nn.Linear(3, 2).state_dict()
    (tmp_path / "a.safetensors").write_bytes((24).to_bytes(8, "little") + b'{"__metadata__":{"a":1}}')
    saved(tmp_path / "b.pt", {"state_dict": {**state, 3: torch.ones(2)}})
    with zipfile.ZipFile(saved(tmp_path / "origin.pt")) as origin, zipfile.ZipFile(tmp_path / "c.pt", "w") as changed:
        for name in origin.namelist():
            changed.writestr(name, b"middle" if name.endswith("byteorder") else origin.read(name))
    before = digests(tmp_path)

    def read(path: Path) -> None:
        with open_checkpoint(path) as reader:
            reader.tensors()
            reader.load()

    for name in ("a.safetensors", "b.pt", "c.pt"):
        found = re.search(r"to another file with ([\w.]+)\((\w+), path\)", refusal(lambda: read(tmp_path / name)))  # noqa: B023
        assert found is not None
        new = tmp_path / f"new_{name}"
        eval(
            f"{found[1]}({found[2]}, path)", {"torch": torch, "safetensors": safetensors, found[2]: state, "path": new}
        )
        read(new)
    assert before.items() <= digests(tmp_path).items()


@executes("files/verification.py", "Next: set digest: xxh3_128:... or sha256:... to verify every byte")
@executes("files/verification.py", "Next: set verify: header to load it unverified")
def test_a_file_without_checksums_is_loaded_as_advised(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A torch file by its header; a safetensors file by a digest, after which nothing is warned of."""
    state = torch.nn.Linear(3, 2).state_dict()
    torch.serialization.set_crc32_options(False)
    try:
        saved(tmp_path / "a.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    save_file(state, tmp_path / "b.safetensors")
    before = digests(tmp_path)

    def loaded(name: str, more: str = "") -> None:
        entry = {"kind": "file", "path": str(tmp_path / name), **yaml.safe_load("{" + more + "}")}
        InitializerStack.from_config([entry], path_provider=PathProvider(tmp_path, "run")).initialize(
            bind(torch.nn.Linear(3, 2), "net")
        )

    field = advised(lambda: loaded("a.pt")).removeprefix("set ").partition(" to ")[0]
    loaded("a.pt", field)
    caplog.clear()
    loaded("b.safetensors")
    assert "Next: set digest: xxh3_128:... or sha256:... to verify every byte" in caplog.text
    caplog.clear()
    digest = hashlib.sha256((tmp_path / "b.safetensors").read_bytes()).hexdigest()
    loaded("b.safetensors", f"digest: 'sha256:{digest}'")
    assert "no checksums" not in caplog.text
    assert digests(tmp_path) == before


class Extra:
    """A class of a user, whose objects are in a file."""


def doubled(weight: torch.Tensor) -> torch.Tensor:
    """Twice the weight."""
    return 2 * weight


def emptied(state: dict[str, Any]) -> dict[str, Any]:
    """The same dict, whose weight is zero now."""
    state["weight"] = torch.zeros_like(state["weight"])
    return state


class Own(torch.Tensor):
    """A subclass of a user."""


class Made:
    """In the file, the call of a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> Any:
        return self.function, self.arguments


def made_by_calls(case: str) -> tuple[Any, torch.Tensor]:
    """An object to be pickled, and the weight that unpickling gives."""
    weight = torch.arange(6.0).reshape(2, 3)
    state = {"weight": weight, "bias": torch.ones(2)}
    match case:
        case "a tensor":
            return {**state, "weight": Made(doubled, weight)}, 2 * weight
        case "a tensor below a key":
            return {"a": {"state_dict": {**state, "weight": Made(doubled, weight)}}}, 2 * weight
        case "a subclass":
            return {"state_dict": {**state, "weight": weight.as_subclass(Own)}}, weight
        case "the dict":
            return {"state_dict": Made(emptied, state)}, torch.zeros(2, 3)
        case "all":
            return Made(emptied, state), torch.zeros(2, 3)
        case "arrays":
            return {"state_dict": {key: value.numpy() for key, value in state.items()}}, weight
    return {"state_dict": state, "also": Made(emptied, state)}, torch.zeros(2, 3)


@executes("files/refusals.py", "Next, if you trust it: {}, then give that file")
@pytest.mark.parametrize(
    "case", ["a tensor", "a tensor below a key", "a subclass", "the dict", "all", "arrays", "also handed over"]
)
def test_weights_that_calls_of_the_file_make_are_written_to_another_file(tmp_path: Path, case: str) -> None:
    """By the command of the message: the values are those that unpickling gives, and the file stays."""
    content, expected = made_by_calls(case)
    # the command runs in another process, where the functions are those of a module beside it
    (tmp_path / "theirs.py").write_text(
        "import torch\n"
        "class Own(torch.Tensor): pass\n"
        "def doubled(weight): return 2 * weight\n"
        "def emptied(state):\n"
        "    state['weight'] = torch.zeros_like(state['weight'])\n"
        "    return state\n"
    )
    path = tmp_path / "it's.pt"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        for one in (doubled, emptied, Own):
            patch.setattr(one, "__module__", "theirs")
            patch.setattr(importlib.import_module("theirs"), one.__name__, one)
        torch.save(content, path)
        sys.modules.pop("theirs")
    before = digests(tmp_path)
    module = torch.nn.Linear(3, 2)

    def load(path: Path, **fields: Any) -> None:
        InitializerStack.from_config([{"kind": "file", "path": str(path), **fields}]).initialize(bind(module, "net"))

    said = refusal(lambda: load(path, **({"source_root": "a.state_dict"} if "below" in case else {})))
    assert "allow_globals" not in said
    typed(said.partition("Next, if you trust it: ")[2].removesuffix(", then give that file"), tmp_path)
    load(tmp_path / "it's.state_dict.pt")
    assert torch.equal(module.weight, expected)
    assert before.items() <= digests(tmp_path).items()


@executes("files/refusals.py", "Next, to read objects of these classes as inert records: in code, open_checkpoint(")
@executes("files/storage/disk.py", "Next: mount its disk, or change its permissions")
def test_objects_are_read_as_records_and_a_disk_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the argument and by the variable of the message, which make no object; and after a disk failed."""
    path = saved(tmp_path / "a.pt", {"state_dict": torch.nn.Linear(3, 2).state_dict(), "extra": Extra()})
    before = digests(tmp_path)

    def read(**options: Any) -> Any:
        with open_checkpoint(path, **options) as reader:
            return reader.load()["extra"]

    said = refusal(read)
    variable = re.search(r"set (\w+)=(\S+) in the environment", said)
    assert variable is not None
    assert "allow_globals=[...]" in said
    assert not isinstance(read(allow_globals=variable[2].split(",")), Extra)
    monkeypatch.setenv(variable[1], variable[2])
    InitializerStack.from_config(
        [{"kind": "file", "path": str(path)}], path_provider=PathProvider(tmp_path, "run")
    ).initialize(bind(torch.nn.Linear(3, 2), "net"))
    opened = os.open

    def failing(name: Any, *arguments: Any, **options: Any) -> int:
        if str(name) == str(path):
            raise PermissionError(13, "Permission denied", str(name))
        return opened(name, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", failing)
        assert advised(lambda: open_checkpoint(path)) == "mount its disk, or change its permissions"
    with open_checkpoint(path) as reader:
        reader.verify()
    assert digests(tmp_path) == before
