"""The reasons why no set was selected, and their errors: what was asked, what was found, and the next step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import attrs

from noether_init_core.errors import (
    AmbiguousCheckpointError,
    CheckpointCorruptError,
    CheckpointError,
    CheckpointFormatError,
    CheckpointNotFoundError,
    CheckpointUnreachableError,
    IncompleteSetError,
    NoGoodSetError,
)
from noether_init_core.files.storage.disk import is_out_of_reach
from noether_init_core.iteration import TrainingIteration
from noether_init_core.messages import counted, in_shell, listed, near
from noether_init_core.sets.checkpoint_set import CheckpointSet, Need, SetFolder
from noether_init_core.sets.file_names import PART_NAMES, parse
from noether_init_core.sets.hints import UNKNOWN, AskedBy, fields_with_info, fields_without_info, nearest_model
from noether_init_core.sets.places import runs, stages
from noether_init_core.sets.snapshot import Snapshot
from noether_init_core.sets.ways import ways_on, without_advice


@attrs.frozen
class NothingHere:
    """There is no set: the run or stage does not exist, or has no checkpoints."""


@attrs.frozen
class NoSuchTag:
    """There are sets, but no set has the tag."""

    tag: str


@attrs.frozen
class SeveralBest:
    """``best`` matches several tags."""

    tags: tuple[str, ...]


@attrs.frozen
class Missing:
    """The selected set lacks a needed file: the name is wrong, or the part was never saved."""

    found: CheckpointSet
    tag: str
    needs: tuple[Need, ...]


@attrs.frozen
class Broken:
    """The selected set is damaged, or a newer set that may match cannot be read.

    Attributes:
        error: The problem of the set.
        good: The newest older set with all its files.
        may_walk_back: Whether ``on_invalid: previous`` selects it.
        saved_as: The tag of ``good``, if ``good`` is the newest older set with this tag but not the newest of all.
    """

    error: CheckpointError
    good: CheckpointSet | None = None
    may_walk_back: bool = False
    saved_as: str = ""


@attrs.frozen
class LaterFlatFiles:
    """Beside the committed sets there are flat files of later iterations that another program wrote."""

    newest: SetFolder
    later: tuple[tuple[CheckpointSet, TrainingIteration], ...]


@attrs.frozen
class NoGoodSet:
    """Every set that was tried is broken: name -> reason."""

    tried: Mapping[str, str]


Refusal = NothingHere | NoSuchTag | SeveralBest | Missing | Broken | LaterFlatFiles | NoGoodSet


def worded(refusal: Refusal, snapshot: Snapshot, asked_by: AskedBy = UNKNOWN) -> CheckpointError:
    """Return the error for a refusal, with the sets on disk and the next step."""
    match refusal:
        case NothingHere():
            return _nothing_here(snapshot, asked_by)
        case NoSuchTag(tag):
            return _no_such_tag(snapshot, tag, asked_by)
        case SeveralBest(tags):
            return AmbiguousCheckpointError(
                f'"best" matches several tags: {", ".join(tags)}. Next: select one, such as {asked_by.tag(tags[0])}',
                path=snapshot.folder,
                candidates=tags,
            )
        case Missing():
            return _Lack(snapshot, asked_by, refusal.found, refusal.needs, refusal.tag).error()
        case Broken(error, good, may_walk_back, saved_as):
            known = (CheckpointFormatError, CheckpointUnreachableError)
            kind = next((one for one in known if isinstance(error, one)), CheckpointCorruptError)
            message = str(error)
            # as long as it is unknown what exists, no other set may be selected
            if not is_out_of_reach(error):
                message = ways_on(message, snapshot, good, asked_by, may_walk_back=may_walk_back, saved_as=saved_as)
            return kind(message, path=error.path)
        case LaterFlatFiles():
            return _later_flat_files(snapshot, refusal, asked_by)
        case NoGoodSet(tried):
            reasons = "".join(f"\n- {name}: {without_advice(reason)}" for name, reason in tried.items())
            return NoGoodSetError(
                f"no set in {snapshot.folder} can be resumed; nothing was changed, and no new training was "
                f"started. Tried, newest first:{reasons}\nNext: ninit verify {in_shell(snapshot.folder)}",
                path=snapshot.folder,
                tried=dict(tried),
            )


def _nothing_here(snapshot: Snapshot, asked_by: AskedBy) -> CheckpointNotFoundError:
    paths, storage = snapshot.paths, snapshot.storage
    root, run, stage = paths.run_output_path.parent, paths.run_id, paths.stage_name
    run_folder = paths.run_output_path if stage is None else root
    if not storage.is_folder(paths.output_root):
        return CheckpointNotFoundError(
            f'run "{run}" not found: its output root {paths.output_root} does not exist '
            f"({paths.output_root.absolute()}). Next: set output_path{asked_by.where} to the folder of the "
            "runs, or pass it to PathProvider",
            path=paths.output_root,
            asked=run,
        )
    if not storage.is_folder(run_folder):
        names = runs(paths, storage)
        return CheckpointNotFoundError(
            f'run "{run}" not found below {run_folder.parent}. {_near(run, names, "no run with checkpoints")}. '
            f"Next: ninit inspect {in_shell(run_folder.parent)}",
            path=run_folder,
            asked=run,
            candidates=_by_nearness(run, names),
        )
    others = [name for name in stages(paths, run, storage) if name != stage]
    found = [f'stage "{name}" has {_count(snapshot, name)}' for name in others]
    candidates: Sequence[str] = others[:1]
    if stage is None:
        what, advice = f'run "{run}" itself has no checkpoints', "Next"
    else:
        own = _count(snapshot, None)
        if own != "no sets":
            found.insert(0, f"the run itself has {own} (without stage_name)")
        exists = storage.is_folder(paths.checkpoint_path)
        what = f'stage "{stage}" of run "{run}" has no checkpoints' if exists else f'run "{run}" has no stage "{stage}"'
        candidates, advice = near(stage, others, cutoff=0.5), "Did you mean"
    return CheckpointNotFoundError(
        f"{what}; {'; '.join(found) or f'searched in {paths.checkpoint_path}'}"
        + (f". {advice}: {asked_by.line({'stage_name': candidates[0]})}" if candidates else "")
        + _unfinished(snapshot.uncommitted()),
        path=paths.checkpoint_path,
        asked=run if stage is None else stage,
        candidates=others,
    )


def _count(snapshot: Snapshot, stage: str | None) -> str:
    paths = attrs.evolve(snapshot.paths, stage_name=stage)
    return counted(len(Snapshot(paths, storage=snapshot.storage).sets()), "set").replace("0 sets", "no sets")


def _no_such_tag(snapshot: Snapshot, tag: str, asked_by: AskedBy) -> CheckpointNotFoundError:
    tags = snapshot.tags()
    unfinished = snapshot.uncommitted()
    # An interrupted save of this iteration is probably the reason for the question.
    cut = [name for name in unfinished if name.partition("_")[2] == tag]
    found = ""
    if cut:
        found = f"The save of {cut[-1]} was interrupted (uncommitted). "
    elif any(one.name == tag for one in snapshot.flat):
        found = "Flat files with this tag are not read beside committed sets (kind: file reads one). "
    elif tag == "best":
        whose = "of these models " if any(one.startswith("best_model.") for one in tags) else ""
        found = f"No set {whose}was saved under a best_model.* tag. "
    elif tag.isascii() and tag.isdigit():
        found = f"An iteration is written E{tag}, U{tag} or {{epoch: {tag}}}. "
    # No hint for "best": its nearest tag would be "latest", which is something else.
    asked = "" if tag == "best" else tag
    there = _near(asked, _by_nearness(tag, tags), "no tags")
    alike = near(asked, tags, cutoff=0.5)
    infos = {info for one in snapshot.sets() for model in one.models("model") for info in one.infos(model)}
    fields = fields_with_info(tag, tags, infos) if "=" in tag else None
    if fields is not None:
        step = asked_by.line(fields)
    else:
        step = asked_by.tag(alike[0]) if alike else f"ninit inspect {in_shell(snapshot.paths.run_output_path)}"
    return CheckpointNotFoundError(
        f'{_where(snapshot)} has no checkpoint "{tag}". {found}{there}'
        + _unfinished(() if cut else unfinished)
        + _irregular(snapshot)
        + f". Next: {step}",
        path=snapshot.folder,
        asked=tag,
        candidates=_by_nearness(tag, tags),
    )


def _later_flat_files(snapshot: Snapshot, refusal: LaterFlatFiles, asked_by: AskedBy) -> AmbiguousCheckpointError:
    newest, (first, iteration) = refusal.newest, refusal.later[0]
    names = ", ".join(f"*_cp={flat.name}_*.th" for flat, _ in refusal.later)
    if asked_by.kind == "auto_resume":
        go_on = (
            f"remove {names} if they are not needed; or, to resume the committed set, replace auto_resume by the "
            f"initializer - {{kind: resume, checkpoint_tag: {newest.iteration}}}"
        )
    else:
        go_on = (
            f"{asked_by.tag(str(newest.iteration))} to resume the committed set; or kind: file for one of the flat "
            f"files; or remove {names} if they are not needed"
        )
    return AmbiguousCheckpointError(
        f"{snapshot.folder} has flat files of {iteration} ({first.files[0].path.name}), later than the newest "
        f"committed set {newest.name}. noether-init-core did not write them in this form: another program may have "
        f"continued the run, or their set was removed. Next: {go_on}",
        path=snapshot.folder,
        candidates=(str(newest.iteration), first.name),
    )


def several_models(snapshot: Snapshot, names: Sequence[str], asked_by: AskedBy) -> AmbiguousCheckpointError:
    """Return the error for a resume without ``model_name`` in a run with trainer files of several models."""
    path = snapshot.paths.checkpoint_path
    return AmbiguousCheckpointError(
        f"{path} has trainer files of several models: {', '.join(names)}. Next: select one, such as "
        f"{asked_by.line({'model_name': names[0]})}",
        path=path,
        candidates=names,
    )


@attrs.frozen
class _Lack:
    """The error for a set that lacks a needed file, with the sets that have it."""

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
                f'"{self.shown}" has {what} of several models: {", ".join(plain)}. Next: select one, such as '
                f"{self.asked_by.line({'model_name': plain[0]})}",
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
        fields = fields_without_info(self.shown, need.info, self.snapshot.tags())
        advice = f"Next: {self.asked_by.line(fields or {'model_info': infos[0] if infos else None})}"
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
        complete, earlier = self._complete(), self._earlier_save()
        advice = f"Next: resume from {self._alternatives(complete)}" if complete else "No other set is complete. Next"
        advice = f"Next: {earlier}" if earlier else advice
        join = "; " if complete or earlier else ": "
        if need.part == "optim" and found.manifest is not None and need.model in found.manifest.frozen:
            holds += f": {need.model} was frozen at the save, so its optimizer was not saved"
            advice, join = f"{advice}{join}{self.asked_by.line({'load_optim': False})} uses a fresh optimizer", "; "
        if need.part != "model":
            paths = self.snapshot.paths
            run = {"run_id": paths.run_id} | ({"stage_name": paths.stage_name} if paths.stage_name else {})
            advice, join = f"{advice}{join}{self.asked_by.of_kind('previous_run', **run)} loads weights only", "; "
        advice = advice.removesuffix(" Next")
        return IncompleteSetError(
            f'"{self.shown}" {holds}. {advice}{_irregular(self.snapshot)}',
            path=found.folder,
            asked=self.tag,
            missing=missing,
            candidates=[tag for one in complete for tag in self.snapshot.selected_by[one.place]],
        )

    def _complete(self) -> list[CheckpointSet]:
        """Return the complete sets: those of the same iteration first, then ``latest``, then the newest.

        Sets whose iteration tag selects a later set are left out, because the advice would not lead to them.
        """
        selected_by = self.snapshot.selected_by
        others = (one for one in self.snapshot.sets()[::-1] if one != self.found and one.name in selected_by[one.place])
        sets = [one for one in others if all(map(one.has, self.needs))]
        same = self._iteration()
        sets.sort(key=lambda one: "latest" not in self.snapshot.selected_by[one.place])
        sets.sort(key=lambda one: same is None or one.iteration != same)
        return sets

    def _earlier_save(self) -> str:
        """Return the line that selects a complete set of the same iteration which the later one hides; empty if none.

        A second save of an iteration may leave out what the first one has, such as the optimizer.
        """
        iteration = self.found.iteration
        if iteration is None or not self.found.committed:
            return ""
        for one in reversed(self.snapshot.sets()):
            tags = self.snapshot.selected_by[one.place]
            if one.iteration != iteration or one.name in tags or not all(map(one.has, self.needs)):
                continue
            line = self.asked_by.tag(next(iter(tags), f"U{iteration.update}"))
            line = self.asked_by.walk_back() if self.asked_by.kind == "auto_resume" else line
            return f"{line} selects {one.place}, an earlier save of {iteration} with all parts"
        return ""

    def _alternatives(self, complete: Sequence[CheckpointSet]) -> str:
        same = self._iteration()
        names, shown = [], []
        for one in complete[:3]:
            is_same = same is not None and one.iteration == same
            name = "latest" if "latest" in self.snapshot.selected_by[one.place] and not is_same else one.name
            names.append(name)
            shown.append(f"{name} (same iteration)" if is_same else name)
        return f"{' or '.join(shown)}, with {self.asked_by.tag(names[0])}"

    def _iteration(self) -> object:
        try:
            return self.snapshot.iteration_of(self.found)
        except CheckpointError:  # only needed for advice; reading the file reports its problem
            return None

    def _where_else(self, asked: str, named: Sequence[str]) -> str:
        """Return advice for a model that this set lacks: another set, or another name."""
        elsewhere = sorted({name for one in self.snapshot.sets() for name in one.models("model")})
        alike = nearest_model(asked, named) or nearest_model(asked, elsewhere, 0.6)
        tags = self._tags_with()
        if tags:
            return f"Next: {self.asked_by.tag(tags[0])}{self._others_with()}"
        if alike:
            return f"Next: {self.asked_by.line({'model_name': alike})}"
        return f"Next, if it is the same model under another name: {self.asked_by.line({'model_name': named[0]})}"

    def _others_with(self) -> str:
        tags = self._tags_with()
        return f". Found in other sets: {listed(tags, 8)}" if tags else ""

    def _tags_with(self) -> list[str]:
        """Return the names of other complete sets, without the requested tag."""
        return [one.name for one in self._complete() if one.name != self.shown]


def _where(snapshot: Snapshot) -> str:
    stage = snapshot.paths.stage_name
    return f'run "{snapshot.paths.run_id}"' + (f', stage "{stage}"' if stage is not None else "")


def _unfinished(names: Sequence[str]) -> str:
    return f". Uncommitted, never selected: {listed(names, 8)}" if names else ""


def _irregular(snapshot: Snapshot) -> str:
    """Return a note on names of checkpoints that are not regular files: FIFOs, folders, dangling links."""
    storage, folder = snapshot.storage, snapshot.folder
    try:
        odd = sorted(
            name for name in storage.list_folder(folder) if parse(name) and storage.size_of(Path(folder, name)) is None
        )
    except OSError:  # only needed for a note
        return ""
    return f". Not regular files, ignored: {listed(odd, 8)}" if odd else ""


def _by_nearness(asked: str, names: Sequence[str]) -> tuple[str, ...]:
    alike = near(asked, names, cutoff=0.5)
    return (*alike, *(name for name in names if name not in alike))


def _near(asked: str, names: Sequence[str], nothing: str) -> str:
    alike = near(asked, names, cutoff=0.5)
    return (
        (f"Near: {', '.join(alike)}. " if alike else "") + f"Found: {listed(names, 8)}"
        if names
        else (f"Found: {nothing}")
    )
