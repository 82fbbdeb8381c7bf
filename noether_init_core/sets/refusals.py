"""Why no set was selected, and the error that says so: what was asked, what there is, and the next step."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import attrs

from noether_init_core.errors import (
    AmbiguousCheckpointError,
    CheckpointCorruptError,
    CheckpointError,
    CheckpointFormatError,
    CheckpointNotFoundError,
    IncompleteSetError,
    NoGoodSetError,
)
from noether_init_core.iteration import TrainingIteration
from noether_init_core.messages import counted, listed, near
from noether_init_core.sets.checkpoint_set import CheckpointSet, Need, SetFolder
from noether_init_core.sets.file_names import PART_NAMES, parse
from noether_init_core.sets.places import runs, stages
from noether_init_core.sets.snapshot import Snapshot

#: What asks, hence what its config can say: a tag only, ``on_invalid`` besides, or ``on_invalid`` and no tag.
AskedBy = Literal["tag", "resume", "auto_resume"]


@attrs.frozen
class NothingHere:
    """There is no set at all: no such run or stage, or one without checkpoints."""


@attrs.frozen
class NoSuchTag:
    """There are sets, and none is meant by the tag."""

    tag: str


@attrs.frozen
class SeveralBest:
    """``best`` could be any of these tags."""

    tags: tuple[str, ...]


@attrs.frozen
class Missing:
    """The set that is meant lacks a file: a wrong name, or a part that was never saved."""

    found: CheckpointSet
    tag: str
    needs: tuple[Need, ...]


@attrs.frozen
class Broken:
    """The set that is meant is damaged, or a newer one that cannot be read may be the one that is meant.

    Attributes:
        error: What is wrong with it.
        good: The newest older set whose files are there.
        may_walk_back: Whether ``on_invalid: previous`` leads to it.
        saved_as: A tag, where ``good`` is the newest older set that has it, and not the newest of all.
    """

    error: CheckpointError
    good: CheckpointSet | None = None
    may_walk_back: bool = False
    saved_as: str = ""


@attrs.frozen
class LaterFlatFiles:
    """Beside the committed sets there are files that go further, and not we wrote them."""

    newest: SetFolder
    later: tuple[tuple[CheckpointSet, TrainingIteration], ...]


@attrs.frozen
class NoGoodSet:
    """Every set that could be walked back to is broken: name -> why."""

    tried: Mapping[str, str]


Refusal = NothingHere | NoSuchTag | SeveralBest | Missing | Broken | LaterFlatFiles | NoGoodSet


def worded(refusal: Refusal, snapshot: Snapshot, asked_by: AskedBy = "tag") -> CheckpointError:
    """The error that says why nothing was selected from the snapshot, and what can be done."""
    match refusal:
        case NothingHere():
            return _nothing_here(snapshot)
        case NoSuchTag(tag):
            return _no_such_tag(snapshot, tag)
        case SeveralBest(tags):
            return AmbiguousCheckpointError(
                f'"best" could be any of {", ".join(tags)}. Say which: checkpoint_tag: {tags[0]}',
                path=snapshot.folder,
                candidates=tags,
            )
        case Missing():
            return _Lack(snapshot, asked_by, refusal.found, refusal.needs, refusal.tag).error()
        case Broken(error, good, may_walk_back, saved_as):
            kind = CheckpointFormatError if isinstance(error, CheckpointFormatError) else CheckpointCorruptError
            ways = ways_on(snapshot, good, asked_by, may_walk_back=may_walk_back, saved_as=saved_as)
            return kind(f"{error}. {ways}", path=error.path)
        case LaterFlatFiles():
            return _later_flat_files(snapshot, refusal, asked_by)
        case NoGoodSet(tried):
            reasons = "".join(f"\n- {name}: {reason}" for name, reason in tried.items())
            return NoGoodSetError(
                f"{snapshot.folder} holds no set that can be resumed from; nothing was changed, and nothing was "
                f"started anew. Tried, newest first:{reasons}\nNext: ninit verify {snapshot.folder}",
                path=snapshot.folder,
                tried=dict(tried),
            )


def model_line(name: str, asked_by: AskedBy) -> str:
    """The line of a config that says which model is meant."""
    return f"auto_resume: {{model_name: {name}}}" if asked_by == "auto_resume" else f"model_name: {name}"


def ways_on(
    snapshot: Snapshot,
    good: CheckpointSet | None,
    asked_by: AskedBy,
    *,
    may_walk_back: bool,
    saved_as: str = "",
) -> str:
    """What can be done about a broken set: the same arguments as the fields of ``Broken``."""
    ways = []
    by_itself = asked_by == "auto_resume"
    if good is not None:
        which = f"set saved as {saved_as}" if saved_as else "set"
        said = f"The newest older {which} whose files are there is {good.name}"
        said += f" ({good.folder.name})" if good.committed else ""
        if may_walk_back and asked_by != "tag":
            place = "beside auto_resume" if by_itself else "in this resume"
            ways.append(f"on_invalid: previous {place} goes on from the newest good {which}")
        if not by_itself and _is_meant_by_its_name(snapshot, good):
            ways.append(f"checkpoint_tag: {good.name}")
    else:
        said = "No older set is left"
        if by_itself:
            ways.append("a new run_id starts anew")
    if asked_by != "tag" or (good is not None and not ways):
        path = shlex.quote(str(snapshot.paths.checkpoint_path))
        ways.append(f"ninit verify {path} shows the state of every set")
    return f"{said}. Next: {'; '.join(ways)}" if ways else said


def _is_meant_by_its_name(snapshot: Snapshot, good: CheckpointSet) -> bool:
    """The name of an iteration means the last set of it."""
    if not good.committed or good.iteration is None:
        return True
    return not any(folder.sequence > (good.sequence or 0) for folder, _found in snapshot.heads(good.iteration))


def _nothing_here(snapshot: Snapshot) -> CheckpointNotFoundError:
    paths, storage = snapshot.paths, snapshot.storage
    root, run, stage = paths.run_output_path.parent, paths.run_id, paths.stage_name
    run_folder = paths.run_output_path if stage is None else root
    if not storage.is_folder(paths.output_root):
        return CheckpointNotFoundError(
            f'run "{run}" was sought below {paths.output_root}, and there is no such folder: '
            f"{paths.output_root.absolute()}. Next: say the folder of the runs with output_path:, or in PathProvider",
            path=paths.output_root,
            asked=run,
        )
    if not storage.is_folder(run_folder):
        names = runs(paths, storage)
        return CheckpointNotFoundError(
            f'run "{run}" does not exist below {run_folder.parent}. {_near(run, names, "no run with checkpoints")}. '
            f"Next: ninit inspect {run_folder.parent}",
            path=run_folder,
            asked=run,
            candidates=_by_nearness(run, names),
        )
    others = [name for name in stages(paths, run, storage) if name != stage]
    said = [f'stage "{name}" has {_count(snapshot, name)}' for name in others]
    meant: Sequence[str] = others[:1]
    if stage is None:
        what, advice = f'run "{run}" has no checkpoints itself', "Add"
    else:
        own = _count(snapshot, None)
        if own != "no sets":
            said.insert(0, f"the run itself has {own}. Leave out stage_name")
        exists = storage.is_folder(paths.checkpoint_path)
        what = f'stage "{stage}" of run "{run}" has no checkpoints' if exists else f'run "{run}" has no stage "{stage}"'
        meant, advice = near(stage, others, cutoff=0.5), "Did you mean"
    return CheckpointNotFoundError(
        f"{what}; {'; '.join(said) or f'looked in {paths.checkpoint_path}'}"
        + (f". {advice}: stage_name: {meant[0]}" if meant else "")
        + _unfinished(snapshot.uncommitted()),
        path=paths.checkpoint_path,
        asked=run if stage is None else stage,
        candidates=others,
    )


def _count(snapshot: Snapshot, stage: str | None) -> str:
    paths = attrs.evolve(snapshot.paths, stage_name=stage)
    return counted(len(Snapshot(paths, storage=snapshot.storage).sets()), "set").replace("0 sets", "no sets")


def _no_such_tag(snapshot: Snapshot, tag: str) -> CheckpointNotFoundError:
    tags = snapshot.tags()
    unfinished = snapshot.uncommitted()
    cut = [name for name in unfinished if name.partition("_")[2] == tag]
    found = ""
    if cut:
        found = f"the save of {cut[-1]} was never finished (uncommitted). "
    elif any(one.name == tag for one in snapshot.flat):
        found = "There are flat files of it, which are not read beside committed sets (kind: file reads one). "
    elif tag == "best":
        whose = "of these models " if any(one.startswith("best_model.") for one in tags) else ""
        found = f"No set {whose}was saved under a best_model.* tag. "
    elif tag.isascii() and tag.isdigit():
        found = f"An iteration is written E{tag}, U{tag} or {{epoch: {tag}}}. "
    # nothing is near to best: latest only looks alike
    there = _near("" if tag == "best" else tag, _by_nearness(tag, tags), "no tags")
    return CheckpointNotFoundError(
        f'{_where(snapshot)} has no checkpoint "{tag}". {found}{there}'
        + _unfinished(() if cut else unfinished)
        + _irregular(snapshot),
        path=snapshot.folder,
        asked=tag,
        candidates=_by_nearness(tag, tags),
    )


def _later_flat_files(snapshot: Snapshot, refusal: LaterFlatFiles, asked_by: AskedBy) -> AmbiguousCheckpointError:
    newest, (first, iteration) = refusal.newest, refusal.later[0]
    names = ", ".join(f"*_cp={flat.name}_*.th" for flat, _ in refusal.later)
    if asked_by == "auto_resume":
        go_on = (
            f"if nobody needs them, remove {names}; to go on from the committed set all the same, in place of "
            f"auto_resume an initializer - {{kind: resume, checkpoint_tag: {newest.iteration}}}"
        )
    else:
        go_on = (
            f"checkpoint_tag: {newest.iteration} to go on from the committed set; or kind: file for one of the flat "
            f"files; if nobody needs them, remove {names}"
        )
    return AmbiguousCheckpointError(
        f"{snapshot.folder} holds flat files {first.files[0].path.name} of {iteration}, later than the newest "
        f"committed set {newest.name}, and they are not as a save of ours left them: either another program has "
        f"gone on from here, or the set that they belonged to was removed. Next: {go_on}",
        path=snapshot.folder,
        candidates=(str(newest.iteration), first.name),
    )


def several_models(snapshot: Snapshot, names: Sequence[str], asked_by: AskedBy) -> AmbiguousCheckpointError:
    """There are trainer files of several models, and none was named."""
    path = snapshot.paths.checkpoint_path
    return AmbiguousCheckpointError(
        f"{path} has trainer files of several models: {', '.join(names)}. Add: {model_line(names[0], asked_by)}",
        path=path,
        candidates=names,
    )


@attrs.frozen
class _Lack:
    """What a set lacks, why, and where it is instead."""

    snapshot: Snapshot
    asked_by: AskedBy
    found: CheckpointSet
    needs: tuple[Need, ...]
    tag: str

    def error(self) -> CheckpointError:
        found = self.found
        need = next(need for need in self.needs if not found.has(need))
        named = found.models(need.part)
        plain = [file.model for file in found.files if file.part == need.part and file.info == need.info]
        what = PART_NAMES[need.part]
        if need.model is None and len(plain) > 1:
            return AmbiguousCheckpointError(
                f'"{self.shown}" has {what} of {", ".join(plain)}. Say which: {model_line(plain[0], self.asked_by)}',
                path=found.folder,
                candidates=plain,
            )
        if need.part == "model" and need.model in named:
            return self._other_info(need)
        is_misnamed = need.model is not None and (need.part != "optim" or need.model not in found.models())
        if named and need.model is not None and is_misnamed:
            return CheckpointNotFoundError(
                f'"{self.shown}" of {_where(self.snapshot)} has no {what} of "{need.model}"; it has {what} of '
                f"{listed(named, 8)}. {self._where_else(need.model, named)}{_irregular(self.snapshot)}",
                path=found.folder,
                asked=need.model,
                candidates=_by_nearness(need.model, named),
            )
        return self._incomplete(need, named)

    @property
    def shown(self) -> str:
        return self.tag if self.tag in self.found.tags or self.found.iteration is None else self.found.name

    def _other_info(self, need: Need) -> CheckpointError:
        assert need.model is not None
        infos = self.found.infos(need.model)
        there = ", ".join((*(["plain weights"] if self.found.file(need.model, "model") else []), *infos))
        asked = f'with model_info "{need.info}"' if need.info is not None else "without model_info"
        advice = f"Add: model_info: {infos[0]}" if infos else "Leave out model_info"
        return CheckpointNotFoundError(
            f'"{self.shown}" has no weights of {need.model} {asked}; it has {there}. {advice}'
            + self._others_with()
            + _irregular(self.snapshot),
            path=self.found.folder,
            asked=need.info or "",
            candidates=infos,
        )

    def _incomplete(self, need: Need, named: Sequence[str]) -> IncompleteSetError:
        found = self.found
        missing = sorted({PART_NAMES[other.part] for other in self.needs if not found.has(other)})
        holds = f"has no {' and no '.join(missing)}"
        if {file.part for file in found.files} == {"model"}:
            holds = "holds weights only"
        if named and need.model is not None:
            holds = f"has no {PART_NAMES[need.part]} of {need.model}, only of {listed(named, 8)}"
        complete = self._complete()
        advice = f"Resume from {self._alternatives(complete)}" if complete else "No other set has everything"
        if need.part == "optim" and found.manifest is not None and need.model in found.manifest.frozen:
            holds += f": {need.model} was frozen when it was saved, so its optimizer was left out"
            advice += "; with a fresh optimizer: load_optim: false"
        if need.part != "model":
            advice += "; weights alone: kind: previous_run"
        return IncompleteSetError(
            f'"{self.shown}" {holds}. {advice}{_irregular(self.snapshot)}',
            path=found.folder,
            asked=self.tag,
            missing=missing,
            candidates=[tag for one in complete for tag in self.snapshot.meant_by[one.place]],
        )

    def _complete(self) -> list[CheckpointSet]:
        """Sets that have everything: those of the same iteration first, then ``latest``, then the newest.

        One whose name means a later set of its iteration is no advice.
        """
        meant_by = self.snapshot.meant_by
        others = (one for one in self.snapshot.sets()[::-1] if one != self.found and one.name in meant_by[one.place])
        sets = [one for one in others if all(map(one.has, self.needs))]
        same = self._iteration()
        sets.sort(key=lambda one: "latest" not in self.snapshot.meant_by[one.place])
        sets.sort(key=lambda one: same is None or one.iteration != same)
        return sets

    def _alternatives(self, complete: Sequence[CheckpointSet]) -> str:
        same = self._iteration()
        names = []
        for one in complete[:3]:
            is_same = same is not None and one.iteration == same
            name = "latest" if "latest" in self.snapshot.meant_by[one.place] and not is_same else one.name
            names.append(f"{name} (same iteration)" if is_same else name)
        return " or ".join(names)

    def _iteration(self) -> object:
        try:
            return self.snapshot.iteration_of(self.found)
        except CheckpointError:  # advice only; what is wrong with the file is said when it is read
            return None

    def _where_else(self, asked: str, named: Sequence[str]) -> str:
        """Where a model is that this set has not: in other sets, else perhaps under another name."""
        elsewhere = sorted({name for one in self.snapshot.sets() for name in one.models("model")})
        alike = [name for name in near(asked, named, 1, cutoff=0.5) or near(asked, elsewhere, 1) if name != asked]
        tags = self._tags_with()
        if tags:
            return f"Add: checkpoint_tag: {tags[0]}{self._others_with()}"
        if alike:
            return f"Add: {model_line(alike[0], self.asked_by)}"
        return f"If that is the same model under another name, add: {model_line(named[0], self.asked_by)}"

    def _others_with(self) -> str:
        tags = self._tags_with()
        return f". Other sets have it: {listed(tags, 8)}" if tags else ""

    def _tags_with(self) -> list[str]:
        """Names of other sets that have everything; the tag that was asked for is no advice."""
        return [one.name for one in self._complete() if one.name != self.shown]


def _where(snapshot: Snapshot) -> str:
    stage = snapshot.paths.stage_name
    return f'run "{snapshot.paths.run_id}"' + (f', stage "{stage}"' if stage is not None else "")


def _unfinished(names: Sequence[str]) -> str:
    return f". Uncommitted, never picked: {listed(names, 8)}" if names else ""


def _irregular(snapshot: Snapshot) -> str:
    """Names of checkpoints that are no regular files: FIFOs, folders, dangling links."""
    storage, folder = snapshot.storage, snapshot.folder
    try:
        odd = sorted(
            name for name in storage.list_folder(folder) if parse(name) and storage.size_of(Path(folder, name)) is None
        )
    except OSError:  # advice only
        return ""
    return f". No regular files, ignored: {listed(odd, 8)}" if odd else ""


def _by_nearness(asked: str, names: Sequence[str]) -> tuple[str, ...]:
    alike = near(asked, names, cutoff=0.5)
    return (*alike, *(name for name in names if name not in alike))


def _near(asked: str, names: Sequence[str], nothing: str) -> str:
    alike = near(asked, names, cutoff=0.5)
    return (
        (f"Near: {', '.join(alike)}. " if alike else "") + f"It has: {listed(names, 8)}"
        if names
        else (f"It has {nothing}")
    )
