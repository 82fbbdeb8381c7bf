"""Where every tensor came from: recorded beside every set, inherited by what starts from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from noether_init_core import (
    CheckpointWriter,
    InitializerStack,
    PathProvider,
    TrainerState,
    TrainingIteration,
    bind,
    compose,
)
from noether_init_core.initializers.base import Outcome
from noether_init_core.stack.members import Carried, trace
from noether_init_core.surgery.plan import LoadPlan, PlanRow


class Net(torch.nn.Module):
    def __init__(self, head: str = "head") -> None:
        super().__init__()
        self.body = torch.nn.Linear(2, 2)
        self.add_module(head, torch.nn.Linear(2, 2))


def at(epoch: int) -> TrainingIteration:
    return TrainingIteration(epoch, epoch, epoch)


def begin(paths: PathProvider, module: torch.nn.Module, *configs: dict[str, Any], trainer: Any = None) -> Any:
    stack = InitializerStack.from_config(list(configs), path_provider=paths)
    return stack.initialize(bind(module, name="net"), trainer=trainer)


def story(report: Any) -> dict[str, list[tuple[str, tuple[str, ...]]]]:
    """Name -> (run, names there) of every step back."""
    found = {}
    for record in report.tensors:
        steps = [] if record.source is None else [(record.source, record.keys), *record.ancestors]
        found[record.name] = [
            (dict(report.sources[number].origin).get("run_id", report.sources[number].file), keys)
            for number, keys in steps
        ]
    return found


def test_origins_are_inherited_through_warm_starts(tmp_path: Path) -> None:
    """Pretrained, adapted with a fresh head, then renamed: each tensor knows its whole way."""
    torch.save(Net().state_dict(), tmp_path / "public.pt")
    first, second, third = (PathProvider(tmp_path, run) for run in ("pretrain", "adapt", "deploy"))
    module = Net()
    report = begin(first, module, {"kind": "file", "path": str(tmp_path / "public.pt")})
    CheckpointWriter(first, report=report).save(bind(module, name="net"), at(1))

    module = Net()
    keep = {"transforms": [{"keep_model": "head."}]}
    report = begin(second, module, {"kind": "previous_run", "run_id": "pretrain", **keep})
    assert story(report)["body.weight"] == [("pretrain", ("body.weight",)), ("public.pt", ("body.weight",))]
    assert story(report)["head.weight"] == []
    CheckpointWriter(second, report=report).save(bind(module, name="net"), at(2))

    module = Net("classifier")
    rename = {"transforms": [{"from": "head.", "to": "classifier."}]}
    report = begin(third, module, {"kind": "previous_run", "run_id": "adapt", **rename})
    assert story(report) == {
        "body.weight": [(run, ("body.weight",)) for run in ("adapt", "pretrain", "public.pt")],
        "body.bias": [(run, ("body.bias",)) for run in ("adapt", "pretrain", "public.pt")],
        "classifier.weight": [("adapt", ("head.weight",))],
        "classifier.bias": [("adapt", ("head.bias",))],
    }
    record = next(record for record in report.tensors if record.name == "classifier.weight")
    assert record.rule == "transforms.0 (head. -> classifier.)"
    assert record.digests[0] is not None
    assert report.sources[record.source].digest is not None


def test_a_run_that_goes_on_keeps_the_origin_that_it_had(tmp_path: Path) -> None:
    """However often it was killed: its own sets are no ancestors."""
    torch.save(Net().state_dict(), tmp_path / "public.pt")
    paths = PathProvider(tmp_path, "run")
    keep = {"kind": "file", "path": str(tmp_path / "public.pt"), "transforms": [{"keep_model": "head."}]}
    for start in range(3):
        module, state = Net(), TrainerState(seed=0)
        if start == 0:
            report = begin(paths, module, keep, trainer=state)
        else:
            report = begin(paths, module, {"kind": "resume"}, trainer=state)
            assert story(report)["head.weight"] == [("run", ("head.weight",))]
            assert story(report)["body.weight"] == [("run", ("body.weight",)), ("public.pt", ("body.weight",))]
        state.advance(samples=1)
        saved = CheckpointWriter(paths).save(bind(module, name="net"), trainer=state)
        kept = json.loads((saved.folder / "provenance.json").read_text())
        origins = {
            one["name"]: None if one["source"] is None else kept["sources"][one["source"]]["file"]
            for one in kept["tensors"]
        }
        assert origins == {
            "body.weight": "public.pt",
            "body.bias": "public.pt",
            "head.weight": None,
            "head.bias": None,
        }
        assert all(len(one["ancestors"]) == 0 for one in kept["tensors"])


def test_one_tensor_of_two_submodels_is_loaded_in_both(tmp_path: Path) -> None:
    """Whichever of them a file was loaded into."""
    first, second = Net(), Net()
    second.body = first.body
    torch.save(Net().state_dict(), tmp_path / "public.pt")
    model = compose("pair", {"a": bind(first, name="a"), "b": bind(second, name="b")})
    config = {"kind": "file", "path": str(tmp_path / "public.pt"), "submodel": "b"}
    report = InitializerStack.from_config([config]).initialize(model)
    loaded = {(record.model, record.name): record.rule for record in report.tensors if record.is_loaded}
    assert loaded == {
        ("pair.a", "body.weight"): "the same tensor as body.weight of pair.b",
        ("pair.a", "body.bias"): "the same tensor as body.bias of pair.b",
        **{("pair.b", name): None for name in ("body.weight", "body.bias", "head.weight", "head.bias")},
    }


@pytest.mark.parametrize(("action", "source"), [("keep", 0), ("reset", None)])
def test_what_a_later_plan_resets_is_fresh_and_what_it_keeps_is_not(action: Any, source: int | None) -> None:
    """Any kind may state a plan of its own."""
    rows = [PlanRow("net", "weight", ("w",), "load", (1, 1), "float32", 4)]
    rows.append(PlanRow("net", "weight", (), action, (1, 1), "float32", 4, "its rule"))
    plans = [Carried("mine", LoadPlan("mine", (row,)), Outcome(), "net", "net") for row in rows]
    _sources, records = trace(bind(torch.nn.Linear(1, 1, bias=False), name="net"), plans)
    assert [record.source for record in records] == [source]


def test_each_set_has_the_record_of_the_report_at_its_time(tmp_path: Path) -> None:
    """A trainer that is initialized again in one process has another report, and its next set another origin."""
    paths, state = PathProvider(tmp_path, "run"), TrainerState(seed=0)
    writer, files = CheckpointWriter(paths), []
    for name in ("first.pt", "second.pt"):
        torch.save(Net().state_dict(), tmp_path / name)
        module = Net()
        begin(PathProvider(tmp_path, "run"), module, {"kind": "file", "path": str(tmp_path / name)}, trainer=state)
        for _ in range(2):
            state.advance(samples=1)
            saved = writer.save(bind(module, name="net"), trainer=state)
            kept = json.loads((saved.folder / "provenance.json").read_text())
            files.append([one["file"] for one in kept["sources"]])
    assert files == [["first.pt"], ["first.pt"], ["second.pt"], ["second.pt"]]


def test_a_damaged_record_keeps_nobody_from_loading(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Weights are verified by themselves; the log says that their origin is not known."""
    torch.save(Net().state_dict(), tmp_path / "public.pt")
    paths = PathProvider(tmp_path, "pretrain")
    module = Net()
    report = begin(paths, module, {"kind": "file", "path": str(tmp_path / "public.pt")})
    saved = CheckpointWriter(paths, report=report).save(bind(module, name="net"), at(1))
    path = saved.folder / "provenance.json"
    path.chmod(0o644)
    content = path.read_text()
    for broken in (content.replace("public.pt", "private.pt"), "[]", "", None):
        if broken is None:
            path.unlink()
        else:
            path.write_text(broken)
        caplog.clear()
        other = Net()
        report = begin(PathProvider(tmp_path, "next"), other, {"kind": "previous_run", "run_id": "pretrain"})
        assert torch.equal(other.body.weight, module.body.weight)
        assert story(report)["body.weight"] == [("pretrain", ("body.weight",))]
        assert "the origin of the weights cannot be read" in caplog.text


def test_names_of_composites_have_the_path_below_the_whole(tmp_path: Path) -> None:
    """For the groups of an optimizer over all of them, or of one."""
    encoder = Net()
    torch.save(encoder.state_dict(), tmp_path / "encoder.pt")
    model = compose("autoenc", {"encoder": bind(encoder, name="enc"), "decoder": bind(Net(), name="dec")})
    rules = [{"keep_model": "head."}]
    config = {"kind": "file", "path": str(tmp_path / "encoder.pt"), "submodel": "encoder", "transforms": rules}
    report = InitializerStack.from_config([config]).initialize(model)
    assert report.loaded_parameters() == ("encoder.body.weight", "encoder.body.bias")
    assert report.loaded_parameters("autoenc.encoder") == ("body.weight", "body.bias")
    assert report.fresh_parameters("autoenc.decoder") == ("body.weight", "body.bias", "head.weight", "head.bias")
    assert report.fresh_parameters()[:2] == ("encoder.head.weight", "encoder.head.bias")


def test_the_report_is_json_with_a_version(tmp_path: Path) -> None:
    """Every tensor is in it, with the number of its file."""
    torch.save(Net().state_dict(), tmp_path / "public.pt")
    report = begin(PathProvider(tmp_path, "a"), Net(), {"kind": "file", "path": str(tmp_path / "public.pt")})
    data = json.loads(report.to_json())
    assert (data["format"], data["version"]) == ("noether-init-report", 1)
    assert [one["name"] for one in data["tensors"]] == ["body.weight", "body.bias", "head.weight", "head.bias"]
    assert {data["sources"][one["source"]]["file"] for one in data["tensors"]} == {"public.pt"}
