"""What a refusal may cost: small files that ask for much, and keys that were chosen to collide."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import attrs
import pytest
import torch
from support.advice import executes
from support.counting import LineCounter
from support.handmade import call, integer, name, string, tensor, write_pickle
from support.hostile import FILES

from noether_init_core import CheckpointFormatError, UnsafeGlobalError, open_checkpoint
from noether_init_core.files import graph
from noether_init_core.files.formats import opcodes, rare_opcodes

# Another process opens each file, in the way a program would, and prints what that took: lines of Python, and the peak
# of resident memory or of Python's own, whichever grew more.
MEASURE = """
import json, sys, tracemalloc
import torch
from support.counting import LineCounter
from noether_init_core import CheckpointError, InitializerStack, PathProvider, bind, open_checkpoint

def peak():
    # resident bytes at most, since reset
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

def by_stack(path):
    stack = InitializerStack.from_config([{"kind": "file", "path": path}], path_provider=PathProvider(".", "run"))
    stack.initialize(bind(torch.nn.Linear(3, 2), name="net"))

def refuse(entry, path):
    try:
        entry(path)
    except CheckpointError:
        return
    raise AssertionError(f"{path} was read")

good, *paths = sys.argv[1:]
found = {}
for entry in (open_checkpoint, by_stack):
    entry(good)  # imports what is imported at first use
    for path in paths:
        open("/proc/self/clear_refs", "w").write("5")
        before = peak()
        refuse(entry, path)
        grown = peak() - before
        tracemalloc.start()
        refuse(entry, path)
        traced = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        with LineCounter() as lines:
            refuse(entry, path)
        found[f"{entry.__name__} {path}"] = [lines.count, max(grown, traced)]
print(json.dumps(found))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of resident memory is asked of Linux")
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_files_that_ask_for_much_cost_little(tmp_path: Path) -> None:
    """Each is refused within 100,000 lines of Python and 50 MB, by open_checkpoint and by the kind ``file``."""
    good = tmp_path / "good.th"
    torch.save(torch.nn.Linear(3, 2).state_dict(), good)
    paths = []
    for title, (row, write, _error, _says) in FILES.items():
        if row in (3, 4, 5):
            paths.append(tmp_path / f"{title}.th")
            write(paths[-1])
    assert all(path.stat().st_size < 4000 for path in paths)
    command = [sys.executable, "-c", MEASURE, str(good), *map(str, paths)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    output = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path, env=environment).stdout
    measured = json.loads(output)
    assert len(measured) == 2 * len(paths)
    assert {what: cost for what, cost in measured.items() if cost[0] >= 100_000 or cost[1] >= 50 << 20} == {}


def colliding(count: int) -> list[bytes]:
    """Integers of different value and equal hash: hashes of integers are remainders of a known prime."""
    return [integer(index * ((1 << 61) - 1)) for index in range(1, count)]


def _signs(number: int) -> bytes:
    """Fifteen numbers that tell tuples apart, and not their hashes: those of -1 and -2 are equal."""
    return b"".join(integer(-2 if number >> place & 1 else -1) for place in range(15))


def equal_but_for_the_end(length: int, count: int) -> list[bytes]:
    """Tuples of equal hash that are long and differ at their ends only."""
    return [b"(" + b"N" * length + _signs(index) + b"t" for index in range(count)]


def equal_texts_before_numbers(length: int, count: int) -> list[bytes]:
    """Tuples of equal hash that begin with one text, written anew for each."""
    text = b"X" + (4 * length).to_bytes(4, "little") + b"x" * 4 * length
    return [b"(" + text + _signs(index) + b"t" for index in range(count)]


MANY = 70_000
COLLISIONS: dict[str, Callable[[], bytes]] = {
    "keys of one dict": lambda: b"}(" + b"N".join([*colliding(MANY), b"u"]),
    "keys one by one": lambda: b"}" + b"Ns".join([*colliding(MANY), b""]),
    "tuples as keys": lambda: b"}(" + b"\x85N".join([*colliding(MANY), b"u"]),
    "long tuples": lambda: b"}(" + b"N".join([*equal_but_for_the_end(400, 2500), b"u"]),
    "tuples with long texts": lambda: b"}(" + b"N".join([*equal_texts_before_numbers(250, 3500), b"u"]),
    "members of a set": lambda: b"\x8f(" + b"".join(colliding(MANY)) + b"\x90",
    "members of a frozenset": lambda: b"(" + b"".join(colliding(MANY)) + b"\x91",
    "set from a list": lambda: call("builtins", "set", b"](" + b"".join(colliding(MANY)) + b"e"),
    "dict from pairs": lambda: call("collections", "OrderedDict", b"](" + b"N\x86".join([*colliding(MANY), b"e"])),
}


@pytest.mark.parametrize("title", COLLISIONS, ids=lambda title: title.replace(" ", "_"))
def test_keys_that_collide_are_refused(tmp_path: Path, title: str) -> None:
    """Some megabytes of keys with one hash are refused before these take long, by what comparisons would look at."""
    path = write_pickle(tmp_path / "a.th", COLLISIONS[title]())
    assert path.stat().st_size < 4_000_000
    with pytest.raises(CheckpointFormatError, match="may collide with each other"):
        open_checkpoint(path)


def test_honest_keys_of_other_kinds_are_read(tmp_path: Path) -> None:
    """A hundred thousand whole numbers in any order and bytes, five thousand of any others, and many small dicts."""
    numbers = range(100_000)
    content = {
        "dense": dict.fromkeys(numbers, 0.5),
        "set": {*numbers},
        "bytes": dict.fromkeys(map(str.encode, map(str, numbers))),
        "sparse": {(7919 * n - 2**40) << (n % 8): n for n in torch.randperm(100_000).tolist()},
        "floats": {n / 7: n for n in range(5000)},
        "tuples": {(n % 70, str(n)) for n in range(5000)},
        "small": [{float(n): n, -n - 1: n, (n, 1): n} for n in range(20_000)],
    }
    torch.save({"w": torch.ones(1), **content}, tmp_path / "a.th")
    with open_checkpoint(tmp_path / "a.th") as reader:
        assert {key: reader.metadata[key] for key in content} == content


SIZE = 4 << 20
MULTIPLIED: dict[str, Callable[[], bytes]] = {
    "entries of the memo": lambda: b"N" + b"\x94" * SIZE,
    "tuples in tuples": lambda: b"N" + b"\x85" * SIZE,
    "tuples": lambda: b"(" + b"N\x85" * (SIZE // 2) + b"t",
    "pairs": lambda: b"(N" + b"N\x86" * (SIZE // 2) + b"t",
    "tuples of a mark": lambda: b"(" + b"(t" * (SIZE // 2) + b"t",
    "lists": lambda: b"(" + b"]" * SIZE + b"t",
    "dicts": lambda: b"(" + b"}" * SIZE + b"t",
    "sets": lambda: b"(" + b"\x8f" * SIZE + b"t",
    "frozensets": lambda: b"(" + b"(\x91" * (SIZE // 2) + b"t",
    "names": lambda: b"(" + b"".join(b"c\n%x\n" % number for number in range(SIZE // 9)) + b"t",
    "nothing": lambda: b"](" + b"N" * SIZE + b"e",
    "short texts": lambda: b"](" + b"\x8c\x02\xc5\xa1" * (SIZE // 4) + b"e",
    "bytes": lambda: b"](" + b"C\x02ab" * (SIZE // 4) + b"e",
    "dicts with an item": lambda: b"](" + b"}K\x00Ns" * (SIZE // 5) + b"e",
    "foreign objects": lambda: name("a.b", "C") + b"q\x000](" + b"h\x00)R" * (SIZE // 4) + b"e",
    "foreign objects that are dropped": lambda: name("a.b", "C") + b"q\x000](" + b"h\x00)R0" * (SIZE // 5) + b"e",
    "foreign objects with a state": lambda: name("a.b", "C") + b"q\x000](" + b"h\x00)R}b" * (SIZE // 6) + b"e",
    "tensors": lambda: (
        name("torch._utils", "_rebuild_meta_tensor_no_storage")
        + b"q\x000)q\x010]("
        + b"h\x00h\x01R" * (SIZE // 5)
        + b"e"
    ),
    "versions": lambda: b"(X\x09\x00\x00\x00_metadataq\x000" + b"}}h\x00}sb" * (SIZE // 7) + b"t",
}
LIMITS = {opcodes: ("MEMOIZED", "OBJECTS", "SHORT"), rare_opcodes: ("FOREIGN", "NAMES", "OBJECTS"), graph: ("PLACES",)}
MEASURE_ONE = """
import sys
from noether_init_core import CheckpointFormatError, open_checkpoint

def peak():
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

good, bad = sys.argv[1:]
open_checkpoint(good).close()
open("/proc/self/clear_refs", "w").write("5")
before = peak()
try:
    open_checkpoint(bad)
except CheckpointFormatError as error:
    print(peak() - before, error)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of resident memory is asked of Linux")
@pytest.mark.parametrize("title", MULTIPLIED, ids=lambda title: title.replace(" ", "_"))
def test_bytes_that_stand_for_much_memory_are_counted(tmp_path: Path, title: str) -> None:
    """Each is refused within 64 MiB and 15 times its size, with the limit; some took hundreds of megabytes."""
    good, bad = tmp_path / "good.th", write_pickle(tmp_path / "bad.th", MULTIPLIED[title]())
    torch.save(torch.nn.Linear(3, 2).state_dict(), good)
    command = [sys.executable, "-c", MEASURE_ONE, str(good), str(bad)]
    output = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    grown, _, message = output.partition(" ")
    assert re.search(
        rf"more than [\d,]+ .* (by byte [\d,]+ of|in) {len(MULTIPLIED[title]()) + 3:,}( bytes)?; the limit is", message
    )
    assert int(grown) < (64 << 20) + 15 * bad.stat().st_size


def test_numbers_left_out_of_the_memo_are_counted_in_all(tmp_path: Path) -> None:
    """A file may begin with another number than 0, and cannot make room for a thousand more each time."""
    numbers = b"".join(b"r" + (1000 * number).to_bytes(4, "little") for number in range(1000))
    path = write_pickle(tmp_path / "a.th", b"N" + numbers)
    assert peak_of(functools.partial(attempt, path)) < 1 << 20
    from_one = b"](" + b"".join(b"}r" + number.to_bytes(4, "little") for number in range(1, 999)) + b"h\x09e"
    with open_checkpoint(write_pickle(tmp_path / "b.th", b"}" + string("x") + from_one + b"s")) as reader:
        assert reader.metadata["x"] == [{}] * 999


def test_a_refusal_takes_no_more_of_a_larger_file(tmp_path: Path) -> None:
    """Twice the size takes at most twice the lines, for objects of foreign classes too; few of them are walked over."""
    foreign = name("a.b", "C") + b"q\x00" + name("a.b", "D") + b"q\x0100]("
    counts = []
    for count in (20_000, 40_000):
        path = write_pickle(tmp_path / "a.th", foreign + b"h\x00h\x01\x85R" * count + b"e")
        with LineCounter() as lines:
            said = attempted(path)
        assert said is not None
        assert re.search(r"refers to a\.b\.C \(at 0\), a\.b\.D", said)
        counts.append(lines.count)
    assert counts[1] < 2.1 * counts[0]
    assert counts[1] < 250 * 40_000


def test_a_limit_says_what_would_help(tmp_path: Path) -> None:
    """Allowing names would not, so the error of a limit is not that of unknown names."""
    foreign = name("a.b", "C") + b"q\x000](" + b"h\x00)R" * 150_000 + b"e"
    with pytest.raises(CheckpointFormatError) as caught:
        open_checkpoint(write_pickle(tmp_path / "a.th", foreign), allow_globals=["a.b.C"])
    assert not isinstance(caught.value, UnsafeGlobalError)
    assert re.search(r"more than 140,\d+ objects of foreign classes", str(caught.value))


@executes("files/refusals.py", "with one tensor in place of a list of many ")
def test_a_file_of_too_many_values_is_written_again_with_tensors(tmp_path: Path) -> None:
    """A million tuples are refused; one tensor of them is read."""
    pairs, path = [(number % 100,) for number in range(1_200_000)], tmp_path / "a.pt"
    torch.save({"weight": torch.ones(2), "pairs": pairs}, path, pickle_protocol=4)
    with pytest.raises(CheckpointFormatError, match=r"more than 1,[\d,]+ objects by byte .* the limit is 524,288 and"):
        open_checkpoint(path)
    torch.save({"weight": torch.ones(2), "pairs": torch.tensor(pairs)}, tmp_path / "b.pt")
    with open_checkpoint(tmp_path / "b.pt") as reader:
        assert torch.equal(reader.load()["pairs"], torch.tensor(pairs))


@pytest.mark.parametrize("protocol", [2, 5])
def test_weights_and_states_of_any_size_stay_within_the_limits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: int
) -> None:
    """With Adam, up to a million tensors in the protocol that torch.save uses, a hundred thousand in the shortest."""
    names = [f"layers.{number // 10}.attention.{number % 10}.weight" for number in range(600)]
    state = {number: {part: torch.zeros(2) for part in ("step", "exp_avg", "exp_avg_sq")} for number in range(600)}
    groups = [{"lr": 1e-3, "betas": (0.9, 0.999), "foreach": None, "amsgrad": False, "params": list(range(600))}]
    content = {
        "state_dict": {name: torch.zeros(2) for name in names},
        "optimizer": {"state": state, "param_groups": groups},
        "losses": [number / 7 for number in range(2000)],
        "steps": {number: {"step": number, "value": number / 7, "note": None} for number in range(500)},
    }
    torch.save(content, tmp_path / "a.th", pickle_protocol=protocol)
    for module, limits in LIMITS.items():
        for limit in limits:
            always = getattr(module, limit).always * 2400 // {2: 1_000_000, 5: 100_000}[protocol]
            monkeypatch.setattr(module, limit, attrs.evolve(getattr(module, limit), always=always))
    with open_checkpoint(tmp_path / "a.th") as reader:
        assert len(reader.tensors()) == 600
        assert reader.metadata["losses"] == content["losses"]


def test_honest_headers_of_many_small_parts_are_read(tmp_path: Path) -> None:
    """A hundred thousand of each kind, in every protocol: what is counted is far from what such files have."""
    content = {
        "tuples": [(number % 200, number % 7) for number in range(100_000)],
        "ones": [(number % 200,) for number in range(100_000)],
        "lists": [[] for _ in range(60_000)],
        "dicts": [{} for _ in range(60_000)],
        "sets": [set() for _ in range(20_000)],
    }
    for protocol in (2, 3, 4, 5):
        torch.save({"w": torch.ones(1), **content}, tmp_path / "a.th", pickle_protocol=protocol)
        with open_checkpoint(tmp_path / "a.th") as reader:
            assert {key: reader.metadata[key] for key in content} == content


WEIGHT = tensor([2], [1])


CHAINS = {
    "calls without weights": (b"h\x08h\x09\x85Rq\x090", None),
    "calls with weights": (b"h\x08h\x09h\x07\x86Rq\x090", "a call that takes the weights"),
    "new objects with weights": (b"h\x08h\x09h\x07\x86\x81q\x090", "a call that takes the weights"),
}


@pytest.mark.parametrize("case", CHAINS, ids=lambda case: case.replace(" ", "_"))
def test_a_chain_of_calls_is_walked_once(tmp_path: Path, case: str) -> None:
    """Twice as many calls, each of which holds all before it, take twice as long, whether they are refused or not."""
    taken, says = CHAINS[case]
    counts = []
    for count in (1000, 2000):
        weights = b"".join(string(str(number)) + b"h\x07" for number in range(count))
        head = WEIGHT + b"q\x07" + name("a.b", "f") + b"q\x08Nq\x09000"
        calls = string("x") + b"(" + taken * count + b"tu"
        path = write_pickle(tmp_path / "a.th", head + b"}(" + string("state_dict") + b"}(" + weights + b"u" + calls)
        with LineCounter() as lines:
            said = attempted(path)
        assert said is None if says is None else said is not None and says in said
        counts.append(lines.count)
    assert counts[1] < 2.2 * counts[0]


def attempted(path: Path) -> str | None:
    """What is said if the file is refused."""
    try:
        open_checkpoint(path).close()
    except CheckpointFormatError as error:
        return str(error)
    return None


LONG = "k" * 100_000


def under_long_key(items: bytes) -> bytes:
    """A dict with a weight, and a dict under a long key."""
    return WEIGHT + b"q\x070}(" + string(LONG) + b"}(" + items + b"u" + string("w") + b"h\x07u"


def test_names_under_long_keys_are_counted_before_they_are_written(tmp_path: Path) -> None:
    """Eight thousand tensors under one long key would take 800 MB of names; so would nested keys, and tuples."""
    tensors = b"".join(string(str(number)) + b"h\x07" for number in range(8000))
    nested = b"(" + b"h\x06" * 400 + b"tq\x05"
    for pickled in (
        under_long_key(tensors),
        string(LONG) + b"q\x060" + WEIGHT + b"q\x070}" + nested + b"}(" + tensors + b"us",
        string(LONG) + b"q\x060" + WEIGHT + b"q\x070" + b"}h\x06" * 100 + b"h\x07" + b"s" * 100,
    ):
        path = write_pickle(tmp_path / "a.th", pickled)
        with pytest.raises(CheckpointFormatError, match="names of its tensors are far longer"):
            open_checkpoint(path)
        assert peak_of(functools.partial(attempt, path)) < (16 << 20) + 80 * path.stat().st_size


def test_unread_and_damaged_parts_under_long_keys_are_listed_shortly(tmp_path: Path) -> None:
    """Places are cut, the first ones are listed, and the others are counted."""
    foreign = name("a", "B") + b"q\x050"
    items = b"".join(string(str(number)) + b"h\x05" for number in range(20_000))
    path = write_pickle(tmp_path / "a.th", foreign + under_long_key(items))

    def look() -> None:
        with open_checkpoint(path) as reader:
            assert list(reader.tensors()) == ["w"]
            assert len(reader.unread) <= 10_001
            assert reader.unread["<more>"].reason.endswith("more parts")

    assert peak_of(look) < (16 << 20) + 80 * path.stat().st_size
    damaged = tensor([9], [1]) + b"q\x050"
    path = write_pickle(tmp_path / "b.th", damaged + under_long_key(items))
    with pytest.raises(CheckpointFormatError, match=r"does not fit.*and 90 more"):
        open_checkpoint(path)
    assert peak_of(functools.partial(attempt, path)) < (16 << 20) + 80 * path.stat().st_size


def attempt(path: Path) -> None:
    """Open a file that is refused."""
    with pytest.raises(CheckpointFormatError):
        open_checkpoint(path)


def peak_of(function: Callable[[], object]) -> int:
    """The most memory that Python objects take meanwhile, in bytes."""
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
