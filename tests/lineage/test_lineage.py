"""Lineage: what runs recorded of each other, put together; read from real folders."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
import xxhash
from hypothesis import given, strategies as st
from support.pages import ROOT

from noether_init_core import (
    CheckpointNotFoundError,
    CheckpointWriter,
    InitializerStack,
    Lineage,
    PathProvider,
    TrainingIteration,
    bind,
    lineage_of,
)
from noether_init_core.lineage import LineageEdge, LineageNode, related
from noether_init_core.sets.manifest import sealed

HEAD_FRESH = {"transforms": [{"keep_model": "1."}]}


class Counting:
    """A trainer with nothing to keep but that it is one."""

    def state_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {"counted": 1}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it."""
        assert state["counted"] == 1


class Runs:
    """An output root in which runs start from each other."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def train(self, run_id: str, *configs: dict[str, Any], stage: str | None = None, at: int = 1) -> Path:
        """Start a run as the configs say, save one set; its folder."""
        paths = PathProvider(self.root, run_id, stage)
        network = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
        model = bind(network, name="net", optimizer=torch.optim.SGD(network.parameters(), lr=0.1))
        stack = InitializerStack.from_config(list(configs), path_provider=paths)
        report = stack.initialize(model, trainer=Counting())
        CheckpointWriter(paths, report=report).save(model, TrainingIteration(at, at, at), trainer=Counting())
        return paths.run_output_path


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    """An empty output root."""
    return Runs(tmp_path / "runs")


def warm(run_id: str, **more: Any) -> dict[str, Any]:
    """A warm start."""
    return {"kind": "previous_run", "run_id": run_id, **more}


def ways(found: Lineage) -> list[tuple[str, str, str]]:
    """Source, target and kind of every edge."""
    return [(edge.source, edge.target, edge.kind) for edge in found.edges]


def test_a_run_shows_ancestors_and_descendants_and_nobody_else(runs: Runs) -> None:
    """Over several generations, with kind, tag, iteration and the share of tensors."""
    runs.train("first")
    middle = runs.train("second", warm("first", **HEAD_FRESH))
    runs.train("third", warm("second"))
    runs.train("stranger")
    found = lineage_of(middle)
    assert (found.focus, found.problems) == ("second", ())
    assert [(node.id, node.relation) for node in found.nodes] == [
        ("first", "ancestor"),
        ("second", "focus"),
        ("third", "descendant"),
    ]
    assert ways(found) == [("first", "second", "previous_run"), ("second", "third", "previous_run")]
    edge = found.edges[0]
    assert (edge.model, edge.tag, edge.iteration, edge.from_set) == ("net", "latest", "E1_U1_S1", "00000001_E1_U1_S1")
    assert (edge.tensors, edge.share, edge.is_resume) == (2, 0.5, False)
    assert found.node("second").sets[0].tags == ("E1_U1_S1", "latest")
    assert lineage_of(runs.root).focus is None
    assert len(lineage_of(runs.root).nodes) == 4


def test_going_on_is_no_ancestor_and_a_fork_is_one(runs: Runs) -> None:
    """A run that was continued counts how often; another run that resumed from it says so."""
    runs.train("first")
    again = {"kind": "resume", "run_id": "first"}
    runs.train("first", again, at=2)
    folder = runs.train("first", again, at=3)
    fork = runs.train("fork", again, at=4)
    found = lineage_of(folder)
    assert [(edge.source, edge.target, edge.is_resume) for edge in found.edges] == [("first", "fork", True)]
    assert found.node("first").resumed == 2
    assert lineage_of(fork).edges == found.edges


def test_a_run_that_was_started_anew_says_which_training_took_what(runs: Runs) -> None:
    """Each share is that of its own training; the earlier one is told as such."""
    runs.train("first")
    runs.train("second")
    runs.train("again", warm("first"))
    folder = runs.train("again", warm("second"), at=2)
    found = lineage_of(folder)
    assert {(edge.source, edge.share, edge.note) for edge in found.edges} == {
        ("second", 1.0, ""),
        ("first", 1.0, "by an earlier training in the same folder"),
    }


def test_a_run_from_two_files_has_two_ways_in(runs: Runs, tmp_path: Path) -> None:
    """Of what was loaded over, only the last counts."""
    runs.train("first")
    torch.save(torch.nn.Linear(4, 2).state_dict(), tmp_path / "head.pt")
    rules = {"transforms": [{"from": "<leaf>", "to": "1.<leaf>"}], "target_root": "", "on_missing": "keep"}
    head = {"kind": "file", "path": str(tmp_path / "head.pt"), "transforms": rules["transforms"], "on_missing": "keep"}
    folder = runs.train("both", warm("first"), head)
    found = lineage_of(folder)
    assert {(edge.source, edge.tensors, edge.share) for edge in found.edges} == {
        ("first", 2, 0.5),
        (f"file:{tmp_path / 'head.pt'}", 2, 0.5),
    }
    assert found.node(f"file:{tmp_path / 'head.pt'}").type == "file"


def test_what_is_not_there_any_more_is_missing_and_what_it_came_from_is_known(runs: Runs) -> None:
    """The record of the later run holds the chain, so that a folder that was deleted breaks nothing."""
    runs.train("first")
    middle = runs.train("second", warm("first"))
    last = runs.train("third", warm("second"))
    shutil.rmtree(middle)
    found = lineage_of(last)
    assert found.node("second").type == "missing"
    assert found.node("second").note == "no longer at the recorded path"
    assert ways(found) == [("second", "third", "previous_run"), ("first", "second", "previous_run")]
    assert found.node("first").relation == "ancestor"


def test_what_two_runs_say_of_one_that_is_gone_is_not_counted_twice(runs: Runs) -> None:
    """Entries count once; which share they were of the model that is gone, nobody knows."""
    runs.train("first")
    middle = runs.train("second", warm("first"))
    runs.train("third", warm("second", **HEAD_FRESH))
    runs.train("fourth", warm("second", **HEAD_FRESH))
    shutil.rmtree(middle)
    edge = next(edge for edge in lineage_of(runs.root).edges if edge.target == "second")
    assert (edge.source, edge.tensors, edge.share) == ("first", 2, None)


def test_a_run_that_was_made_anew_is_another_one(runs: Runs) -> None:
    """What the new one came from is no ancestor of those who started from the old one."""
    first = runs.train("first")
    second = runs.train("second", warm("first"))
    shutil.rmtree(first)
    runs.train("stranger")
    runs.train("first", warm("stranger", **HEAD_FRESH))
    found = lineage_of(second)
    assert [(edge.source, edge.target) for edge in found.edges] == [("first (before)", "second")]
    assert found.node("first (before)").type == "missing"
    assert found.node("first (before)").note == "it was deleted, and a new run of that name was started"
    assert "stranger" not in {node.id for node in found.nodes}


def test_a_file_is_recorded_by_where_it_lies_and_by_its_bytes(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two files of one name in two folders are two; one that has other bytes by now is another one."""
    state = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2)).state_dict()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        torch.save(state, tmp_path / name / "weights.pt")
        monkeypatch.chdir(tmp_path / name)
        runs.train(name, {"kind": "file", "path": "weights.pt"})
    found = lineage_of(runs.root)
    files = {node.path for node in found.nodes if node.type == "file"}
    assert files == {str(tmp_path / name / "weights.pt") for name in ("one", "two")}


def test_a_file_in_a_folder_of_checkpoints_is_no_run(runs: Runs, tmp_path: Path) -> None:
    """Many keep plain files in a folder of that name."""
    (tmp_path / "mine" / "checkpoints").mkdir(parents=True)
    file = tmp_path / "mine" / "checkpoints" / "weights.pt"
    torch.save(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2)).state_dict(), file)
    found = lineage_of(runs.train("first", {"kind": "file", "path": str(file)}))
    node = found.node(f"file:{file}")
    assert (node.type, node.run_id) == ("file", None)
    assert "no digest was recorded, so the file may have changed" in node.note
    file.unlink()
    found = lineage_of(runs.root / "first")
    assert (found.node(f"file:{file}").type, found.node(f"file:{file}").note) == (
        "missing",
        "not found at the recorded path",
    )


def test_a_set_that_was_retired_is_said(runs: Runs) -> None:
    """The run is there, the set that was read is not."""
    first = runs.train("first")
    second = runs.train("second", warm("first"))
    runs.train("first", at=2)
    (old,) = (first / "checkpoints" / "sets").glob("*_E1_U1_S1")
    shutil.rmtree(old)
    assert lineage_of(second).edges[0].note == "the set was deleted"


def test_output_roots_that_were_moved_as_a_whole_are_still_told(runs: Runs, tmp_path: Path) -> None:
    """Recorded paths are old then; the run of that name beside it is meant."""
    runs.train("first")
    runs.train("second", warm("first"))
    runs.root.rename(tmp_path / "elsewhere")
    found = lineage_of(tmp_path / "elsewhere" / "second")
    assert ways(found) == [("first", "second", "previous_run")]
    assert found.node("first").type == "run"


def test_a_run_of_the_same_name_with_other_weights_is_not_taken_for_the_one_that_is_gone(
    runs: Runs, tmp_path: Path
) -> None:
    """It was in another output root; the run of that name here is somebody else's."""
    other = Runs(tmp_path / "other")
    gone = other.train("first")
    runs.train("first")
    second = runs.train("second", warm("first", output_path=str(other.root)))
    away = lineage_of(second)
    assert (away.nodes[0].type, away.nodes[0].path) == ("run", str(gone))
    assert "--root" in away.nodes[0].note
    shutil.rmtree(other.root)
    found = lineage_of(second)
    assert [(node.type, node.path, node.relation) for node in found.nodes] == [
        ("missing", str(gone), "ancestor"),
        ("run", str(second), "focus"),
    ]


def test_links_lead_to_one_run(runs: Runs, tmp_path: Path) -> None:
    """A root behind a link, and a second name of a run in the same root, make no second run."""
    runs.train("first")
    second = runs.train("second", warm("first"))
    (tmp_path / "link").symlink_to(runs.root)
    (runs.root / "newest").symlink_to(second)
    assert [node.id for node in lineage_of(tmp_path / "link").nodes] == ["first", "second"]
    found = lineage_of(tmp_path / "link" / "second", roots=[tmp_path / "link"])
    assert [node.run_id for node in found.nodes] == ["first", "second"]
    assert ways(found) == [("first", "second", "previous_run")]


def test_an_output_root_with_one_run_is_still_a_root(runs: Runs) -> None:
    """Programs can tell what was asked for."""
    folder = runs.train("first")
    assert lineage_of(runs.root).focus is None
    for path in (folder, folder / "checkpoints", next((folder / "checkpoints" / "sets").iterdir())):
        assert lineage_of(path).focus == "first"


def test_runs_of_one_name_in_two_roots_are_told_apart(runs: Runs, tmp_path: Path) -> None:
    """Descendants in another root are found where that root is named."""
    first = runs.train("first")
    other = Runs(tmp_path / "other")
    other.train("first")
    other.train("second", warm("first", output_path=str(runs.root)))
    assert [node.id for node in lineage_of(first).nodes] == ["first"]
    found = lineage_of(first, roots=[other.root])
    assert found.focus == str(first)
    assert ways(found) == [(str(first), "second", "previous_run")]


def test_stages_are_runs_of_their_own(runs: Runs) -> None:
    """With run and stage as their names."""
    runs.train("run", stage="pretrain")
    folder = runs.train("run", warm("run", stage_name="pretrain"), stage="tune")
    found = lineage_of(folder)
    assert ways(found) == [("run/pretrain", "run/tune", "previous_run")]
    assert found.node("run/tune").stage == "tune"
    runs.train("stranger")
    of_both = lineage_of(folder.parent)
    assert (of_both.focus, [node.id for node in of_both.nodes]) == (None, ["run/pretrain", "run/tune"])


def test_without_records_nothing_is_made_up(noether_runs: Path) -> None:
    """Runs that Noether wrote have sets, and no ancestors."""
    found = lineage_of(noether_runs)
    assert found.edges == ()
    assert {node.note for node in found.nodes} == {"the origin of its weights was not recorded"}
    assert not any(one.committed for node in found.nodes for one in node.sets)


def test_a_damaged_record_is_a_problem_and_the_rest_is_shown(runs: Runs) -> None:
    """A changed byte in a record, garbage in a manifest: told, and nothing invented."""
    runs.train("first")
    second = runs.train("second", warm("first"))
    third = runs.train("third", warm("second"))
    (record,) = second.rglob("provenance.json")
    record.write_text(record.read_text().replace('"first"', '"other"'))
    found = lineage_of(third)
    assert len(found.problems) == 1
    assert "its digest is not the one in the manifest" in found.problems[0]
    assert ("second", "third", "previous_run") in ways(found)
    assert "other" not in {node.id for node in found.nodes}
    (manifest,) = second.rglob("manifest.json")
    manifest.write_text("{")
    assert any("manifest" in problem for problem in lineage_of(third).problems)


def test_a_damaged_record_is_not_taken_for_fresh_weights(runs: Runs) -> None:
    """The manifest still has words for it."""
    runs.train("first")
    second = runs.train("second", warm("first"))
    (record,) = second.rglob("provenance.json")
    record.unlink()
    note = lineage_of(second).node("second").note
    assert note == "its record cannot be read; its manifest lists previous_run net <- first @ latest = E1_U1_S1"


@pytest.mark.parametrize(
    "change",
    [
        {"digest": ["x"]},
        {"path": "/a\0/checkpoints/sets/00000001_E1_U1_S1/f.th", "origin": {}},
        {"path": "/" + "a" * 5000, "origin": {}},
        {"path": "first", "file": "first", "origin": {}},
        {"path": "", "file": "\ud800\x1b[2J", "origin": {"run_id": "\ud800\x1b[2J"}},
        {"origin": None},
    ],
)
def test_a_record_made_by_an_enemy_breaks_nothing(runs: Runs, change: dict[str, Any]) -> None:
    """Digests are right, what they vouch for is not: at worst a problem, and no run gets an ancestor that is a lie."""
    runs.train("first")
    second = runs.train("second", warm("first"))
    (record,), (manifest,) = second.rglob("provenance.json"), second.rglob("manifest.json")
    values = json.loads(record.read_text())
    values["sources"][0] |= change
    content = json.dumps(values).encode()
    record.write_bytes(content)
    said = json.loads(manifest.read_text())
    said.pop("digest")
    said["provenance"] = f"xxh3_128:{xxhash.xxh3_128_hexdigest(content)}"
    manifest.chmod(0o644)
    manifest.write_bytes(sealed(json.dumps(said, indent=1).encode()))
    found = lineage_of(second)
    json.dumps(found.to_dict()).encode()
    assert found.focus == "second"
    assert len(found.problems) + len(found.edges) == 1
    assert all(found.node(edge.source).type == "missing" for edge in found.edges)


def test_two_runs_that_started_from_each_other_do_not_hang(runs: Runs) -> None:
    """A circle by later sets; what is both is an ancestor."""
    runs.train("first")
    second = runs.train("second", warm("first"))
    runs.train("first", warm("second"), at=2)
    found = lineage_of(second)
    assert set(ways(found)) == {("first", "second", "previous_run"), ("second", "first", "previous_run")}
    assert found.node("first").relation == "ancestor"


def test_the_json_follows_its_schema(runs: Runs) -> None:
    """And comes back as it was."""
    runs.train("first")
    found = lineage_of(runs.train("second", warm("first")))
    schema = json.loads((ROOT / "docs" / "schemas" / "lineage.schema.json").read_text())
    jsonschema.validate(json.loads(found.to_json()), schema)
    assert json.loads(found.to_json()) == json.loads(json.dumps(found.to_dict()))


def test_where_no_run_is_the_error_says_what_was_meant(tmp_path: Path) -> None:
    """An empty folder, and a root that holds none."""
    with pytest.raises(CheckpointNotFoundError, match="no run found at"):
        lineage_of(tmp_path)


def test_neither_torch_nor_a_plugin_is_imported(runs: Runs) -> None:
    """Records are text."""
    runs.train("first")
    folder = runs.train("second", warm("first"))
    code = (
        "import sys; from noether_init_core import lineage_of; print(len(lineage_of(sys.argv[1]).edges), "
        "'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    assert done.stdout == "1 False\n"


names = st.sampled_from("abcdef")


@given(st.lists(st.tuples(names, names), max_size=12), names)
def test_only_those_on_a_way_are_related(pairs: list[tuple[str, str]], focus: str) -> None:
    """Ancestors reach the focus, descendants are reached from it, whatever the graph."""
    nodes = [LineageNode(name, "run", name, None, name) for name in "abcdef"]
    edges = [LineageEdge(a, b, "file", "m", "f", None, None, None, None, None) for a, b in pairs]
    found = related([focus], nodes, edges)

    def reaches(start: str, end: str) -> bool:
        seen, waiting = {start}, [start]
        while waiting:
            here = waiting.pop()
            for a, b in pairs:
                if a == here and b == end:
                    return True
                if a == here and b not in seen:
                    seen.add(b)
                    waiting.append(b)
        return False

    for name in set("abcdef") - {focus}:
        relation = next((node.relation for node in found.nodes if node.id == name), None)
        expected = "ancestor" if reaches(name, focus) else "descendant" if reaches(focus, name) else None
        assert relation == expected
