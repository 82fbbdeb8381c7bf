"""``compare_checkpoints``: find the files of two checkpoints, and compare names, shapes and values."""

from __future__ import annotations

import itertools
import json
import math
import os
import shlex
import struct
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Literal

import attrs

from noether_init_core.diff.drift import Drift, Room, are_comparable, drift_of, finite, total_of
from noether_init_core.diff.sides import DiffSide, Side, side_at
from noether_init_core.errors import CheckpointCorruptError, CheckpointError
from noether_init_core.files.checkpoint import Checkpoint
from noether_init_core.files.content import ForeignObject, TensorInfo
from noether_init_core.files.opening import open_checkpoint
from noether_init_core.files.storage.disk import reaching
from noether_init_core.nested import equal, mapped
from noether_init_core.sets.checkpoint_set import recorded_in
from noether_init_core.shown import Shown

DIFF_VERSION = 1
_OBJECT = "object"
_LEAST_SHARE = 0.5
# Largest number of segments of a prefix that is suggested.
_DEEPEST = 3

State = Literal["equal", "changed", "dtype", "shape", "nonfinite", "only_a", "only_b"]


@attrs.frozen
class DiffRow:
    """One name of one or both checkpoints.

    Attributes:
        model: Name of the model, for an average followed by its info, as in ``mlp (ema=0.99)``; may be empty.
        key: Its name in the state dict.
        state: ``equal``: the same dtype, shape and bits. ``changed``: other bits. ``dtype``: another dtype, compared by
            value. ``shape``: another shape, not compared. ``nonfinite``: NaN or infinities on one side, not compared.
            ``only_a``, ``only_b``: on one side only.
        shape_a: Shape in A; None if it is not in A or not a tensor.
        shape_b: Shape in B.
        dtype_a: Dtype in A, without ``torch.``; ``object`` for an entry that is not a tensor; None if it is not in A.
        dtype_b: Dtype in B.
        elements: Number of elements in A, or in B if it is only there.
        relative_norm: Euclidean norm of B - A divided by that of A, in float64. None if it is not compared, or if A is
            all zero and B is not.
        cosine: Cosine of the angle between A and B as vectors; None if not compared, or if one is all zero.
        norm_a: Euclidean norm of A.
        norm_b: Euclidean norm of B.
        max_abs: Largest absolute difference of two elements.
        nonfinite_a: Number of NaN and infinite elements in A.
        nonfinite_b: Number of NaN and infinite elements in B.
        note: A remark for people; may be empty.
    """

    model: str
    key: str
    state: State
    shape_a: tuple[int, ...] | None = None
    shape_b: tuple[int, ...] | None = None
    dtype_a: str | None = None
    dtype_b: str | None = None
    elements: int = 0
    relative_norm: float | None = None
    cosine: float | None = None
    norm_a: float | None = None
    norm_b: float | None = None
    max_abs: float | None = None
    nonfinite_a: int = 0
    nonfinite_b: int = 0
    note: str = ""


@attrs.frozen(repr=False)
class CheckpointDiff(Shown):
    """The result of comparing two checkpoints; pure data. ``str(diff)`` is what ``ninit diff`` prints.

    Attributes:
        a: The first checkpoint.
        b: The second checkpoint.
        rows: A row for every name, in the order of A, then names of B only.
        elements: Number of elements of names that are on both sides.
        elements_compared: Number of elements that were compared by value.
        relative_norm: Relative norm of all compared elements as one vector; see ``DiffRow``.
        cosine: Cosine of all compared elements as one vector.
        notes: Remarks for people, one sentence each.
    """

    a: DiffSide
    b: DiffSide
    rows: tuple[DiffRow, ...]
    elements: int = 0
    elements_compared: int = 0
    relative_norm: float | None = None
    cosine: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def is_same_form(self) -> bool:
        """Whether both have the same names and shapes, and only finite numbers."""
        return not any(row.state in ("shape", "nonfinite", "only_a", "only_b") for row in self.rows)

    @property
    def is_equal(self) -> bool:
        """Whether both have the same names with the same bits."""
        return all(row.state == "equal" for row in self.rows)

    def counts(self) -> dict[str, int]:
        """Return state -> number of rows, for the states that occur."""
        return dict(sorted(Counter(row.state for row in self.rows).items()))

    def to_dict(self) -> dict[str, Any]:
        """Return plain data that follows ``docs/schemas/diff.schema.json``. Numbers are finite or None."""
        data = attrs.asdict(self)
        totals = {name: data.pop(name) for name in ("elements", "elements_compared", "relative_norm", "cosine")}
        last = {"counts": self.counts(), "totals": totals, "notes": data.pop("notes")}
        return {"format": "noether-init-diff", "version": DIFF_VERSION, **data, **last}

    def to_json(self) -> str:
        """Return ``to_dict()`` as JSON text."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False)


def _known_from(reader: Checkpoint, side: DiffSide) -> DiffSide:
    """Add run and iteration from the metadata of a file, if they are unknown."""
    iteration, run_id = None, None
    if side.run_id is None:
        with suppress(CheckpointError):
            iteration, run_id = recorded_in(reader.metadata, Path(reader.path))
    if run_id is None:
        return side
    return attrs.evolve(side, run_id=run_id, iteration=None if iteration is None else str(iteration))


def compare_checkpoints(a: Path | str, b: Path | str, *, strip: Sequence[str] = ()) -> CheckpointDiff:
    """Compare the weights of two checkpoints: keys, shapes, and the difference of every tensor from A to B.

    It only reads, and may be repeated. Tensors are read in pieces of a few megabytes, so memory does not grow with the
    model. Bytes are not verified; ``ninit verify`` does that. Sums are in float64. Models with equal names are
    compared, or the only models of both sides.

    Args:
        a: A checkpoint file, the folder of a set, a run folder (its newest set), or a run folder, ``@`` and a tag.
        b: The other checkpoint, in the same form.
        strip: Prefixes to remove from the names of both, such as ``module.``.

    Raises the errors of ``open_checkpoint``, ``CheckpointNotFoundError`` for a path without checkpoint, and
    ``CheckpointCorruptError`` if a file changes meanwhile.
    """
    return compare_sides(side_at(a), side_at(b), strip=strip)


def compare_sides(
    a: Side, b: Side, *, strip: Sequence[str] = (), advance: Callable[[int], None] | None = None
) -> CheckpointDiff:
    """Compare two sides as ``compare_checkpoints`` does; ``advance`` is called with the bytes of each read."""
    with Room() as room:
        work = _Work([a.description, b.description], strip, room, advance or (lambda _bytes: None))
        pairs = list(_paired(a.files, b.files))
        for model, first, second in pairs:
            work.add(model, first, second)
        if not any(first is not None and second is not None for _model, first, second in pairs):
            names = [", ".join(name or "no name" for name in side.files) for side in (a, b)]
            work.notes.append(f"no model is on both sides: A has {names[0]}; B has {names[1]}. Next: give two files")
    rows = tuple(work.rows)
    both = [row for row in rows if row.state not in ("only_a", "only_b")]
    total, compared = total_of(work.drifts), sum(row.elements for row in rows if row.norm_a is not None)
    return CheckpointDiff(
        work.sides[0],
        work.sides[1],
        rows,
        elements=sum(row.elements for row in both),
        elements_compared=compared,
        relative_norm=total.relative_norm if compared else None,
        cosine=total.cosine if compared else None,
        notes=tuple(work.notes),
    )


def _paired(a: Mapping[str, Path], b: Mapping[str, Path]) -> Iterator[tuple[str, Path | None, Path | None]]:
    """Yield pairs of models with equal names; if each side has only one model, not counting averages, these two."""
    # The name of an average ends with its info: net (ema=0.99).
    weights = [[name for name in files if not name.endswith(")")] or list(files) for files in (a, b)]
    if 1 in (len(a), len(b)) and [len(names) for names in weights] == [1, 1] and not (a.keys() & b.keys()):
        (first,), (second,) = weights
        yield first or second, a[first], b[second]
        a, b = ({name: path for name, path in files.items() if name not in (first, second)} for files in (a, b))
    for name in {**a, **b}:
        yield name, a.get(name), b.get(name)


class _Work:
    """Compares pairs of files and collects the results."""

    def __init__(self, sides: list[DiffSide], strip: Sequence[str], room: Room, advance: Callable[[int], None]) -> None:
        self.rows: list[DiffRow] = []
        self.notes: list[str] = []
        self.sides = sides
        self.drifts: list[Drift] = []
        self._strip = strip
        self._advance = advance
        self._room = room

    def add(self, model: str, *paths: Path | None) -> None:
        """Compare two files of one model; None for a model that is on one side only."""
        with ExitStack() as opened:
            stamps = [None if path is None else _stamp(path) for path in paths]
            readers = [None if path is None else opened.enter_context(open_checkpoint(path)) for path in paths]
            a, b = sides = [{} if reader is None else self._entries(reader) for reader in readers]
            for number, (reader, entries) in enumerate(zip(readers, sides, strict=True)):
                if reader is not None:
                    side = _known_from(reader, self.sides[number])
                    nbytes = sum(one.nbytes for one in entries.values() if isinstance(one, TensorInfo))
                    tensors, nbytes = side.tensors + len(entries), side.bytes + nbytes
                    self.sides[number] = attrs.evolve(side, tensors=tensors, bytes=nbytes)
            note = "" if None in paths else prefix_note(a, b)
            self.notes += [note] if note else []
            self.rows += [self._compare(model, key, sides, readers) for key in {**a, **b}]
            for path, stamp in zip(paths, stamps, strict=True):
                if path is not None and _stamp(path) != stamp:
                    raise CheckpointCorruptError(
                        f"{path} changed while it was compared. Next: repeat the comparison", path=path
                    )

    def _entries(self, reader: Checkpoint) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in {**reader.tensors(), **reader.extra_state}.items():
            name = without_prefixes(str(key), self._strip)
            if name in found:
                self.notes.append(f"{reader.path}: without prefixes, {name} would occur twice; {key} keeps its prefix")
                name = str(key)
            found[name] = value
        return found

    def _compare(
        self, model: str, key: str, sides: Sequence[Mapping[str, Any]], readers: Sequence[Checkpoint | None]
    ) -> DiffRow:
        """Compare one name by shape and dtype, and by values if both sides have the same shape."""
        (shape_a, dtype_a), (shape_b, dtype_b) = (_form(side[key]) if key in side else (None, None) for side in sides)
        known = shape_b if shape_a is None else shape_a
        elements = 0 if known is None else math.prod(known)
        row = DiffRow(model, key, "shape", shape_a, shape_b, dtype_a, dtype_b, elements)
        if dtype_a is None or dtype_b is None:
            return attrs.evolve(row, state="only_a" if dtype_b is None else "only_b")
        if shape_a != shape_b:
            is_one_sided = shape_a is None or shape_b is None
            return attrs.evolve(row, note="a tensor on one side only" if is_one_sided else "")
        first, second = filter(None, readers)
        one, two = (side[key] for side in sides)
        if shape_a is not None:
            drift = drift_of((first, one), (second, two), self._room, self._advance)
            self.drifts += [drift] if drift.norm_a is not None else []
            return _measured(row, drift, are_comparable(one, two))
        is_same = equal(mapped(first.materialize(one), _bits), mapped(second.materialize(two), _bits))
        return attrs.evolve(row, state="equal" if is_same else "changed", note="" if is_same else "not a tensor")


def _measured(row: DiffRow, drift: Drift, is_comparable: bool) -> DiffRow:
    state: State = "dtype" if row.dtype_a != row.dtype_b else "equal" if drift.is_equal else "changed"
    row = attrs.evolve(row, state=state)
    if state == "equal":
        row = attrs.evolve(row, relative_norm=0.0, max_abs=0.0)
    if not is_comparable:
        return attrs.evolve(row, note="numbers of this dtype are not compared")
    if drift.nonfinite_a or drift.nonfinite_b:
        row = attrs.evolve(row, nonfinite_a=drift.nonfinite_a, nonfinite_b=drift.nonfinite_b)
        # An equal tensor with infinities is probably a mask, which is intended.
        is_mask = state == "equal"
        return attrs.evolve(row, note="not all finite") if is_mask else attrs.evolve(row, state="nonfinite")
    note = "other bits; no difference in float64" if state == "changed" and drift.max_abs == 0 else ""
    if drift.relative_norm is None:
        note = "A is all zero" if drift.norm_a == 0 else "beyond the range of float64"
    return attrs.evolve(
        row,
        relative_norm=drift.relative_norm,
        cosine=drift.cosine,
        norm_a=finite(drift.norm_a),
        norm_b=finite(drift.norm_b),
        max_abs=finite(drift.max_abs),
        note=note,
    )


def _form(value: Any) -> tuple[tuple[int, ...] | None, str]:
    return (value.shape, value.dtype) if isinstance(value, TensorInfo) else (None, _OBJECT)


def _bits(leaf: Any) -> Any:
    """Convert a leaf so that ``==`` compares bits: NaN equals NaN, and 0.0 differs from -0.0."""
    if isinstance(leaf, ForeignObject):
        return [mapped(getattr(leaf, name), _bits) for name in ("name", "args", "state", "items")]
    return struct.pack("d", leaf) if isinstance(leaf, float) else leaf


def _stamp(path: Path) -> tuple[int, int, int]:
    with reaching(path):
        found = os.stat(path)  # the inode, too: a replaced file may have the same size and time
    return found.st_ino, found.st_size, found.st_mtime_ns


def without_prefixes(name: str, prefixes: Sequence[str]) -> str:
    """Return the name without the prefixes; each is removed once, in any order."""
    left = [prefix for prefix in prefixes if prefix]
    while found := next((prefix for prefix in left if name.startswith(prefix)), None):
        left.remove(found)
        name = name.removeprefix(found)
    return name


def prefix_note(a: Collection[str], b: Collection[str]) -> str:
    """Return advice on prefixes to strip, if few names are common and stripping makes most common; else empty."""
    enough = _LEAST_SHARE * min(len(a), len(b))
    common = len(set(a) & set(b))
    if common >= enough:
        return ""
    for of_a, of_b in itertools.product(_fronts(a), _fronts(b)):
        if len({name.removeprefix(of_a) for name in a} & {name.removeprefix(of_b) for name in b}) >= enough:
            found = [(side, prefix) for side, prefix in (("A", of_a), ("B", of_b)) if prefix]
            prefixes = " and ".join(f"{side} has the prefix {prefix!r}" for side, prefix in found)
            options = " ".join(f"--strip {shlex.quote(prefix)}" for _side, prefix in found)
            return f"{common} of {min(len(a), len(b))} names are on both sides; {prefixes}. Next: {options}"
    return ""


def _fronts(names: Collection[str]) -> list[str]:
    """Return the empty prefix, and the most frequent prefixes of one, two and three segments."""
    found = [""]
    for depth in range(1, _DEEPEST + 1):
        pieces = (name.split(".", depth) for name in names)
        seen = Counter(".".join(one[:-1]) + "." for one in pieces if len(one) > depth)
        found += [prefix for prefix, _count in seen.most_common(1)]
    return found
