"""The ways on after a broken set: the older good set, the lines that select it, and a message with one ``Next:``."""

from __future__ import annotations

import re
from collections.abc import Sequence

from noether_init_core.messages import in_shell
from noether_init_core.sets.checkpoint_set import CheckpointSet
from noether_init_core.sets.hints import AskedBy
from noether_init_core.sets.snapshot import Snapshot

_NEXT = re.compile(r"\. Next(?P<unless>\b[^:.;]{0,60}): ")
#: What an error about one file or set says where it is not known which other sets exist.
_ANOTHER_SET = re.compile(r"(?:^|, or )take (?:an older checkpoint|another set)$")
_NO_OLDER = "No older set was found"


def ways_on(
    message: str,
    snapshot: Snapshot,
    good: CheckpointSet | None,
    asked_by: AskedBy,
    *,
    may_walk_back: bool,
    saved_as: str = "",
) -> str:
    """Return ``message``, about a broken set, with the older good set and the next steps, its own among them.

    ``good``, ``may_walk_back`` and ``saved_as`` are the fields of ``Broken``.
    """
    ways = []
    if good is not None:
        which = f"set saved as {saved_as}" if saved_as else "set"
        found = f"The newest older {which} with all its files is {good.name}"
        found += f" ({good.folder.name})" if good.committed else ""
        if may_walk_back and asked_by.kind != "tag":
            ways.append(f"{asked_by.walk_back()} continues from the newest good {which}")
        if asked_by.kind != "auto_resume" and _is_selected_by_its_name(snapshot, good):
            ways.append(asked_by.tag(good.name))
    else:
        found = _NO_OLDER
        if asked_by.kind == "auto_resume":
            ways.append("a new run_id starts a new training")
    if asked_by.kind != "tag" or not ways:
        ways.append(f"ninit verify {in_shell(snapshot.paths.checkpoint_path)} shows the state of every set")
    return _together(message, found, ways)


def _together(message: str, found: str, ways: Sequence[str]) -> str:
    """``message`` and what was found, with the advice of ``message`` and the ways behind one ``Next:``."""
    said = list(_NEXT.finditer(message))
    if not said:
        return f"{message}. {found}. Next: {'; '.join(ways)}"
    head, unless = message[: said[-1].start()], said[-1]["unless"].strip(", ")
    own = _ANOTHER_SET.sub("", message[said[-1].end() :].removesuffix("."))
    # another set continues the run sooner than a copy of the damaged file
    is_last = unless or (own.startswith("copy the file again") and found != _NO_OLDER)
    own = f"{unless}: {own}" if unless else own
    steps = [*ways, own] if is_last else [own, *ways]
    return f"{head}. {found}. Next: {'; '.join(filter(None, steps))}"


def without_advice(message: str) -> str:
    """``message`` up to its ``Next:``, for a list of reasons below one advice."""
    said = _NEXT.search(message)
    return message if said is None else message[: said.start()]


def _is_selected_by_its_name(snapshot: Snapshot, good: CheckpointSet) -> bool:
    """Whether the tag of its iteration selects this set: no later set is of the same iteration."""
    if not good.committed or good.iteration is None:
        return True
    return not any(folder.sequence > (good.sequence or 0) for folder, _found in snapshot.heads(good.iteration))
