"""What exists, in words: the errors of the store, each with what was asked, what there is, and the next step."""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import attrs

from noether_init_core.errors import (
    AmbiguousCheckpointError,
    CheckpointCorruptError,
    CheckpointError,
    CheckpointFormatError,
    CheckpointNotFoundError,
    IncompleteSetError,
)
from noether_init_core.iteration import TrainingIteration
from noether_init_core.sets.checkpoint_set import CheckpointSet, Need, SetFolder, set_folders
from noether_init_core.sets.file_names import parse
from noether_init_core.sets.queries import is_of

if TYPE_CHECKING:
    from noether_init_core.sets.store import RunStore

__all__ = [
    "AskedBy",
    "broken_set",
    "later_flat_files",
    "missing_files",
    "model_line",
    "no_such_tag",
    "nothing_here",
    "ways_on",
]

#: What asks, hence what its config can say: a tag only, ``on_invalid`` besides, or ``on_invalid`` and no tag.
AskedBy = Literal["tag", "resume", "auto_resume"]


_PART_NAMES = {"model": "weights", "optim": "optimizer state", "trainer": "trainer state"}


def nothing_here(store: RunStore) -> CheckpointNotFoundError:
    """There is no set at all: no such run or stage, or one without checkpoints."""
    paths, root = store.paths, store.paths.run_output_path.parent
    run, stage = paths.run_id, paths.stage_name
    run_folder = paths.run_output_path if stage is None else root
    if not store.storage.is_folder(paths.output_root):
        return CheckpointNotFoundError(
            f'run "{run}" was sought below {paths.output_root}, and there is no such folder: '
            f"{paths.output_root.absolute()}. Next: say the folder of the runs with output_path:, or in PathProvider",
            path=paths.output_root,
            asked=run,
        )
    if not store.storage.is_folder(run_folder):
        runs = store.runs()
        listed = _near(run, runs, "It has", "no run with checkpoints")
        return CheckpointNotFoundError(
            f'run "{run}" does not exist below {run_folder.parent}. {listed}. '
            f"Next: noether-init inspect {run_folder.parent}",
            path=run_folder,
            asked=run,
            candidates=_sorted_by_nearness(run, runs),
        )
    stages = {name: _count(store, name) for name in store.stages(run) if name != stage}
    listed = "; ".join(f'stage "{name}" has {count}' for name, count in stages.items())
    unfinished = _unfinished(store)
    if stage is None:
        name = next(iter(stages), None)
        return CheckpointNotFoundError(
            f'run "{run}" has no checkpoints itself; '
            + (f"{listed}. Add: stage_name: {name}" if name else f"looked in {paths.checkpoint_path}")
            + unfinished,
            path=paths.checkpoint_path,
            asked=run,
            candidates=tuple(stages),
        )
    own = _count(store, None)
    if own != "no sets":
        listed = "; ".join(filter(None, (f"the run itself has {own}. Leave out stage_name", listed)))
    near = _sorted_by_nearness(stage, tuple(stages))
    exists = store.storage.is_folder(paths.checkpoint_path)
    return CheckpointNotFoundError(
        (f'stage "{stage}" of run "{run}" has no checkpoints' if exists else f'run "{run}" has no stage "{stage}"')
        + (f"; {listed}" if listed else f"; looked in {paths.checkpoint_path}")
        + (f". Did you mean: stage_name: {near[0]}" if near else "")
        + unfinished,
        path=paths.checkpoint_path,
        asked=stage,
        candidates=tuple(stages),
    )


def no_such_tag(store: RunStore, tag: str) -> CheckpointNotFoundError:
    """The run has sets, none is meant by the tag."""
    tags = _sorted_by_nearness(tag, store.tags())
    unfinished = [name for name in store.uncommitted() if name.partition("_")[2] == tag]
    found = ""
    if unfinished:
        found = f"the save of {unfinished[-1]} was never finished (uncommitted). "
    elif tag in store.flat_tags():
        found = "There are flat files of it, which are not read beside committed sets (kind: file reads one). "
    elif tag == "best":
        found = "No set was saved under a best_model.* tag. "
    elif tag.isascii() and tag.isdigit():
        found = f"An iteration is written E{tag}, U{tag} or {{epoch: {tag}}}. "
    # nothing is near to best: latest only looks alike
    there = _near("" if tag == "best" else tag, tags, "It has", "no tags")
    return CheckpointNotFoundError(
        f'{_where(store)} has no checkpoint "{tag}". {found}{there}'
        + ("" if unfinished else _unfinished(store))
        + _irregular(store),
        path=store.folder,
        asked=tag,
        candidates=tags,
    )


def broken_set(
    store: RunStore, error: CheckpointError, good: CheckpointSet | None, *, may_walk_back: bool, saved_as: str = ""
) -> CheckpointError:
    """The set that was meant is damaged; the newest older good one is named, and the ways on."""
    kind = CheckpointFormatError if isinstance(error, CheckpointFormatError) else CheckpointCorruptError
    return kind(f"{error}. {ways_on(store, good, may_walk_back=may_walk_back, saved_as=saved_as)}", path=error.path)


def ways_on(store: RunStore, good: CheckpointSet | None, *, may_walk_back: bool, saved_as: str = "") -> str:
    """What can be done about a broken set: ``good`` is the newest older set whose files are there.

    ``may_walk_back``: whether ``on_invalid: previous`` would lead to it from what was asked for. ``saved_as``: a tag,
    where ``good`` is the newest one that has it, and not the newest of all.
    """
    ways = []
    by_itself = store.asked_by == "auto_resume"
    if good is not None:
        which = f"set saved as {saved_as}" if saved_as else "set"
        said = f"The newest older {which} whose files are there is {good.name}"
        said += f" ({good.folder.name})" if good.committed else ""
        if may_walk_back and store.asked_by != "tag":
            place = "beside auto_resume" if by_itself else "in this resume"
            ways.append(f"on_invalid: previous {place} goes on from the newest good {which}")
        if not by_itself and _is_meant_by_its_name(store, good):
            ways.append(f"checkpoint_tag: {good.name}")
    else:
        said = "No older set is left"
        if by_itself:
            ways.append("a new run_id starts anew")
    if store.asked_by != "tag" or (good is not None and not ways):
        ways.append(f"noether-init verify {shlex.quote(str(store.paths.checkpoint_path))} shows the state of every set")
    return f"{said}. Next: {'; '.join(ways)}" if ways else said


def _is_meant_by_its_name(store: RunStore, good: CheckpointSet) -> bool:
    """The name of an iteration means the last set of it."""
    same = [folder for folder in set_folders(store.folder, store.storage) if folder.iteration == good.iteration]
    return not any(folder.committed and folder.sequence > (good.sequence or 0) for folder in same if good.committed)


def later_flat_files(
    store: RunStore, newest: SetFolder, later: Sequence[tuple[CheckpointSet, TrainingIteration]]
) -> AmbiguousCheckpointError:
    """Beside the committed sets there are files that go further, and not we wrote them."""
    first, iteration = later[0]
    names = ", ".join(f"*_cp={flat.name}_*.th" for flat, _ in later)
    go_on = f"checkpoint_tag: {newest.iteration} to go on from the committed set"
    if store.asked_by == "auto_resume":
        go_on = (
            f"if nobody needs them, remove {names}; to go on from the committed set all the same, in place of "
            f"auto_resume an initializer - {{kind: resume, checkpoint_tag: {newest.iteration}}}"
        )
    else:
        go_on += f"; or kind: file for one of the flat files; if nobody needs them, remove {names}"
    return AmbiguousCheckpointError(
        f"{store.folder} holds flat files {first.files[0].path.name} of {iteration}, later than the newest "
        f"committed set {newest.path.name}, and they are not as a save of ours left them: either another program has "
        f"gone on from here, or the set that they belonged to was removed. Next: {go_on}",
        path=store.folder,
        candidates=(str(newest.iteration), first.name),
    )


def missing_files(store: RunStore, found: CheckpointSet, tag: str, needs: Sequence[Need]) -> CheckpointError:
    """The set lacks a file: the wrong name, or a part that was never saved."""
    need = next(need for need in needs if not found.has(need))
    shown = tag if tag in found.tags or found.iteration is None else found.name
    named = found.models(need.part)
    plain = [file.model for file in found.files if file.part == need.part and file.info == need.info]
    what = _PART_NAMES[need.part]
    if need.model is None and len(plain) > 1:
        return AmbiguousCheckpointError(
            f'"{shown}" has {what} of {", ".join(plain)}. Say which: {model_line(store, plain[0])}',
            path=found.folder,
            candidates=plain,
        )
    infos = found.infos(need.model) if need.model is not None else ()
    if need.part == "model" and need.model in named:
        listed = ", ".join((*(["plain weights"] if found.file(need.model, "model") else []), *infos))
        asked = f'with model_info "{need.info}"' if need.info is not None else "without model_info"
        advice = f"Add: model_info: {infos[0]}" if infos else "Leave out model_info"
        return CheckpointNotFoundError(
            f'"{shown}" has no weights of {need.model} {asked}; it has {listed}. {advice}'
            + _others_with(store, found, needs, shown)
            + _irregular(store),
            path=found.folder,
            asked=need.info or "",
            candidates=infos,
        )
    is_misnamed = need.model is not None and (need.part != "optim" or need.model not in found.models())
    if named and need.model is not None and is_misnamed:
        return CheckpointNotFoundError(
            f'"{shown}" of {_where(store)} has no {what} of "{need.model}"; it has {what} of {_some(named)}. '
            + _where_else(store, found, needs, shown, need.model, named)
            + _irregular(store),
            path=found.folder,
            asked=need.model,
            candidates=_sorted_by_nearness(need.model, named),
        )
    missing = sorted({_PART_NAMES[other.part] for other in needs if not found.has(other)})
    parts = {file.part for file in found.files}
    holds = "holds weights only" if parts == {"model"} else f"has no {' and no '.join(missing)}"
    if named and need.model is not None:
        holds = f"has no {what} of {need.model}, only of {_some(named)}"
    complete = _complete(store, found, needs)
    advice = f"Resume from {_alternatives(store, found, complete)}" if complete else "No other set has everything"
    frozen = need.part == "optim" and found.manifest is not None and need.model in found.manifest.frozen
    if frozen:
        holds += f": {need.model} was frozen when it was saved, so its optimizer was left out"
        advice += "; with a fresh optimizer: load_optim: false"
    if need.part != "model":
        advice += "; weights alone: kind: previous_run"
    return IncompleteSetError(
        f'"{shown}" {holds}. {advice}' + _irregular(store),
        path=found.folder,
        asked=tag,
        missing=missing,
        candidates=[tag for one in complete for tag in _meant_by(store, one)],
    )


def model_line(store: RunStore, name: str) -> str:
    """The line of a config that says which model is meant."""
    return f"auto_resume: {{model_name: {name}}}" if store.asked_by == "auto_resume" else f"model_name: {name}"


def _meant_by(store: RunStore, checkpoint_set: CheckpointSet) -> list[str]:
    """The tags that mean this set: a later set of its models that was saved under the same tag has taken it over."""
    own = checkpoint_set.sequence or 0
    models = frozenset(checkpoint_set.models())
    later = {tag for one in store.sets() if (one.sequence or 0) > own and is_of(one, models) for tag in one.tags}
    return [tag for tag in checkpoint_set.tags if tag not in later]


def _complete(store: RunStore, found: CheckpointSet, needs: Sequence[Need]) -> list[CheckpointSet]:
    """Sets that have everything: those of the same iteration first, then ``latest``, then the newest."""
    sets = [one for one in store.sets()[::-1] if one != found and all(one.has(need) for need in needs)]
    same = _iteration(store, found)
    sets.sort(key=lambda one: "latest" not in _meant_by(store, one))
    sets.sort(key=lambda one: same is None or one.iteration != same)
    return sets


def _alternatives(store: RunStore, found: CheckpointSet, complete: Sequence[CheckpointSet]) -> str:
    same = _iteration(store, found)
    names = []
    for one in complete[:3]:
        name = "latest" if "latest" in _meant_by(store, one) and one.iteration != same else one.name
        names.append(f"{name} (same iteration)" if same is not None and one.iteration == same else name)
    return " or ".join(names)


def _where_else(
    store: RunStore, found: CheckpointSet, needs: Sequence[Need], shown: str, asked: str, named: Sequence[str]
) -> str:
    """Where a model is that this set has not: in other sets, else perhaps under another name."""
    elsewhere = sorted({name for one in store.sets() for name in one.models("model")})
    near = difflib.get_close_matches(asked, named, n=1, cutoff=0.5) or difflib.get_close_matches(asked, elsewhere, n=1)
    near = [name for name in near if name != asked]
    others = _others_with(store, found, needs, shown)
    tags = _tags_with(store, found, needs, shown)
    if near:
        return f"Add: {model_line(store, near[0])}{others}"
    if tags:
        return f"Add: checkpoint_tag: {tags[0]}{others}"
    return f"If that is the same model under another name, add: {model_line(store, named[0])}"


def _others_with(store: RunStore, found: CheckpointSet, needs: Sequence[Need], shown: str) -> str:
    tags = _tags_with(store, found, needs, shown)
    return f". Other sets have it: {_some(tags)}" if tags else ""


def _tags_with(store: RunStore, found: CheckpointSet, needs: Sequence[Need], shown: str) -> list[str]:
    """Tags of other sets that have everything; the tag that was asked for is no advice."""
    return [one.name for one in _complete(store, found, needs) if one.name != shown]


def _iteration(store: RunStore, checkpoint_set: CheckpointSet) -> object:
    try:
        return store.iteration_of(checkpoint_set)
    except CheckpointError:  # advice only; what is wrong with the file is said when it is read
        return None


def _count(store: RunStore, stage: str | None) -> str:
    count = len(type(store)(attrs.evolve(store.paths, stage_name=stage), storage=store.storage).sets())
    return f"{count or 'no'} set{'' if count == 1 else 's'}"


def _where(store: RunStore) -> str:
    stage = store.paths.stage_name
    return f'run "{store.paths.run_id}"' + (f', stage "{stage}"' if stage is not None else "")


def _unfinished(store: RunStore) -> str:
    names = store.uncommitted()
    return f". Uncommitted, never picked: {_some(names)}" if names else ""


def _irregular(store: RunStore) -> str:
    """Names of checkpoints that are no regular files: FIFOs, folders, dangling links."""
    try:
        names = store.storage.list_folder(store.folder)
    except OSError:  # advice only
        return ""
    odd = sorted(name for name in names if parse(name) and store.storage.size_of(Path(store.folder, name)) is None)
    return f". No regular files, ignored: {_some(odd)}" if odd else ""


def _sorted_by_nearness(asked: str, names: Sequence[str]) -> tuple[str, ...]:
    near = difflib.get_close_matches(asked, names, n=3, cutoff=0.5)
    return (*near, *(name for name in names if name not in near))


def _near(asked: str, names: Sequence[str], words: str, nothing: str) -> str:
    near = difflib.get_close_matches(asked, names, n=3, cutoff=0.5)
    if not names:
        return f"{words} {nothing}"
    return (f"Near: {', '.join(near)}. " if near else "") + f"{words}: {_some(names)}"


def _some(names: Sequence[str], most: int = 8) -> str:
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")
