"""Suggests the rules that turn names of a file into those of a model, from names, shapes and dtypes alone. Pure.

No file is read and no rule is applied. The suggested rules are planned, so that they are known to give a plan. What
names and shapes do not decide is reported with its reason and its alternatives.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from itertools import accumulate

import attrs

from noether_init_core.suggest.layer_names import Layer, concepts
from noether_init_core.suggest.matching import Pairing
from noether_init_core.suggest.pairs import MOST_COMPARISONS, Pair, has_conflict, is_head, likeness
from noether_init_core.suggest.rules import (
    SuggestedRule,
    Suggestion,
    Unsure,
    merged,
    rules_of,
    transforms_of,
)
from noether_init_core.surgery.fit import PlanPart, TargetSpec, TensorSpec, names_of_ties
from noether_init_core.surgery.planner import Policies, plan_load
from noether_init_core.surgery.wrappers import bare_names

# buffers that models compute themselves
_COMPUTED = frozenset(
    {"inv_freq", "position_ids", "masked_bias", "num_batches_tracked", "relative_position_index", "attn_mask"}
)
# a reader checks each suggested rule, and RE2 cannot compile many thousands at once
_MOST_RULES = 500
# real models stay below; matching splits names into segments, which a hostile file could make slow
_LONGEST, _DEEPEST = 256, 32


def suggest(
    sources: Mapping[str, TensorSpec],
    targets: Mapping[str, TargetSpec],
    *,
    model: str = "",
    policies: Policies | None = None,
    hidden: frozenset[str] = frozenset(),
) -> Suggestion:
    """Suggest rules for a file and a model. Pure: names, shapes and dtypes decide, and no value is read.

    It finds moved prefixes, renamed segments, transposed matrices, fused and separate projections, stacked and separate
    blocks, other heads, and other grids of position embeddings. Entries of equal name and shape are taken as the same;
    names and shapes cannot show whether a model uses two submodules in exchanged roles.

    Args:
        sources: Entries of the file's state dict, in order: name -> shape and dtype.
        targets: Entries of the model's state dict, in order: name -> shape and dtype.
        model: Name of the model, for messages.
        policies: How the plan treats what does not fit, such as ``on_missing``.
        hidden: Names of the model's non-persistent buffers, which a file may have.

    Never raises. Names that a rule cannot match stay unmatched: those with ``<``, ``*`` or an empty segment, and
    those of more than 256 characters or 32 segments.
    """
    return _Suggesting(PlanPart(model or "model", "", (), sources, targets, hidden=hidden), policies).run()


class _Suggesting:
    """The state of one suggestion. Names in it are bare: without the prefixes of wrappers."""

    def __init__(self, part: PlanPart, policies: Policies | None) -> None:
        self._part, self._policies, sources, targets = part, policies, part.sources, part.targets
        self._source_names = {bare: name for bare, name in bare_names(sources).items() if _can_say(bare)}
        self._target_names = {bare: name for bare, name in bare_names(targets).items() if _can_say(bare)}
        bare_of = {name: bare for bare, name in self._target_names.items()}
        ties = [[bare_of[name] for name in names if name in bare_of] for names in names_of_ties(targets).values()]
        self._pairing = Pairing(
            {bare: sources[name] for bare, name in self._source_names.items() if name not in part.hidden},
            {bare: targets[name] for bare, name in self._target_names.items()},
            {bare: names for names in ties for bare in names},
        )
        self._unsure: list[Unsure] = []

    def run(self) -> Suggestion:
        self._pairing.run()
        for pair in (*self._pairing.pairs, *self._pairing.unfit):
            if pair.doubts:
                self._unsure.append(self._unsure_of(pair))
        lone_sources, lone_targets = self._pairing.left()
        keeps, drops = self._heads(lone_sources, lone_targets)
        self._misfits(lone_sources, lone_targets)
        drops += [SuggestedRule({"drop": glob}, "computed anew by the model") for glob in self._computed()]
        wanted = {name: mine for pair in self._pairing.pairs for mine, its in self._names(pair) for name in its}
        moves = rules_of(self._pairing.pairs)
        surplus = moves[_MOST_RULES:]
        found = self._planned([*drops, *moves[:_MOST_RULES], *keeps])
        # one rule in place of several that differ in a number, only if the plan stays the same
        fewer = merged(found.rules)
        if len(fewer) < len(found.rules):
            other = self._planned(fewer)
            found = other if _done(other) == _done(found) else found
        got = {row.target: row.sources for row in found.plan.rows if row.writes}
        wrong = [name for name, names in wanted.items() if got.get(name) != names]
        if surplus:
            reason = f"more than {_MOST_RULES} are needed; the names have no pattern"
            self._unsure.append(Unsure(f"{len(surplus)} more rules", reason))
        elif wrong:
            reason = "the rules do not give the intended plan"
            self._unsure.append(Unsure(", ".join(wrong[:5]), reason, targets=tuple(wrong)))
        left: dict[str, list[str]] = {"unexpected": [], "missing": [], "mismatch": []}
        for row in found.plan.rows:
            if row.action in left:
                left[row.action].append(row.key)
        return attrs.evolve(
            found,
            unsure=tuple(self._unsure),
            unmatched_sources=tuple(left["unexpected"]),
            unmatched_targets=(*left["missing"], *left["mismatch"]),
        )

    def _planned(self, rules: Sequence[SuggestedRule]) -> Suggestion:
        plan = plan_load("suggest", [self._part], transforms_of(rules), policies=self._policies)
        return Suggestion(tuple(rules), plan)

    def _names(self, pair: Pair) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
        """Names in the file and in the model that belong together, if they exist: some blocks may have no bias."""
        return [
            (
                tuple(self._source_names[name] for name in mine if name in self._source_names),
                tuple(self._target_names[name] for name in its if name in self._target_names),
            )
            for leaf in pair.leaves
            for mine, its in pair.names(leaf)
        ]

    def _unsure_of(self, pair: Pair) -> Unsure:
        names = self._names(pair)
        return Unsure(
            " -> ".join(", ".join(layer.label for layer in layers) for layers in (pair.sources, pair.targets)),
            "; ".join(pair.doubts),
            pair.alternatives,
            tuple(name for mine, _ in names for name in mine),
            tuple(name for _, its in names for name in its),
        )

    def _heads(
        self, sources: Sequence[Layer], targets: Sequence[Layer]
    ) -> tuple[list[SuggestedRule], list[SuggestedRule]]:
        """Rules that keep heads without a tensor of that shape in the file, and rules that drop heads of the file."""
        specs = self._part.targets
        tied = {name for spec_name, spec in specs.items() if spec.tied_to for name in (spec_name, spec.tied_to)}
        fresh = [
            layer
            for layer in targets
            if is_head(layer) and tied.isdisjoint(self._target_names[bare] for bare in layer.names())
        ]
        theirs = [layer for layer in sources if is_head(layer)]
        keeps = []
        for glob in _modules(fresh, self._target_names, self._pairing.targets):
            below = [layer for layer in theirs if f"{layer.path}.".startswith(glob)] or theirs
            shapes = [list(layer.shapes[()]["weight"]) for layer in below if "weight" in layer.leaves]
            has = f"the file has {shapes[0]}" if shapes else "no head found in the file"
            doubts = () if theirs else self._of_embedding(glob, fresh)
            keeps.append(SuggestedRule({"keep_model": glob}, f"a fresh head: {has}", doubts))
        kept = [one.config["keep_model"] for one in keeps]
        dropped = [one for one in _modules(theirs, self._source_names, self._pairing.sources) if one not in kept]
        return keeps, [SuggestedRule({"drop": glob}, "a head not found in the model") for glob in dropped]

    def _of_embedding(self, glob: str, fresh: Sequence[Layer]) -> tuple[str, ...]:
        """Why a head may be the embedding of the file: many models use one tensor for both."""
        tables = [pair for pair in self._pairing.pairs if pair.way == "rename" and "token" in pair.sources[0].concepts]
        for layer in (one for one in fresh if f"{one.path}.".startswith(glob)):
            shape = layer.shapes[()].get("weight")
            for source, target in ((pair.sources[0], pair.targets[0]) for pair in tables):
                if shape is not None and source.shapes.get((), {}).get("weight") == shape:
                    other = target.label
                    reason = (
                        f"{source.label} {list(shape)} is in the file once, and a rule sends it to one place: {other}"
                    )
                    alternatives = f"tie {layer.label} to {other} in the model", f"{source.label} -> {layer.label}"
                    names = tuple(self._target_names[bare] for bare in layer.names())
                    self._unsure.append(Unsure(layer.label, reason, alternatives, (), names))
                    return (reason,)
        return ()

    def _misfits(self, sources: Sequence[Layer], targets: Sequence[Layer]) -> None:
        """Report layers of equal names and other shapes; only the reader can choose what to do."""
        sources, targets = ([one for one in layers if not is_head(one)] for layers in (sources, targets))
        by_path = {layer.path: [layer] for layer in sources}
        compared = sources if len(sources) * len(targets) <= MOST_COMPARISONS else []
        unfit = {layer.template for pair in self._pairing.unfit for layer in pair.targets}
        for target in (one for one in targets if one.template not in unfit):
            found = by_path.get(target.path) or [
                one for one in compared if likeness(one, target) > 0.9 and not has_conflict(one, target)
            ]
            leaf = next((leaf for leaf in target.leaves if leaf in found[0].leaves), None) if len(found) == 1 else None
            if leaf is None:
                continue
            (source,) = found
            have, want = (list(layer.shapes[()][leaf]) for layer in (source, target))
            self._unsure.append(
                Unsure(
                    f"{source.label} -> {target.label}",
                    f"the shapes differ: the file has {have}, the model {want}",
                    (f"keep_model: {target.name(leaf)}", "on_mismatch: slice, pad or keep, where the first rows agree"),
                    tuple(self._source_names[bare] for bare in source.names()),
                    (self._target_names[target.name(leaf)],),
                )
            )

    def _computed(self) -> list[str]:
        """Globs for buffers of the file that the model does not have, and that models compute themselves."""
        found = []
        for bare, spec in self._pairing.sources.items():
            *parents, last = bare.split(".")
            is_mask = last == "bias" and len(spec.shape) == 4 and tuple(spec.shape[:2]) == (1, 1)
            if (last in _COMPUTED or is_mask) and bare not in self._target_names:
                found.append(".".join("*" if part.isdigit() else part for part in (*parents, last)))
        return list(dict.fromkeys(found))


def _modules(layers: Sequence[Layer], names: Iterable[str], left: Container[str]) -> list[str]:
    """The modules of heads, as a config writes them: a whole module if no part of it is used."""
    used = {module for bare in names if bare not in left for module in _paths(bare)}
    found: list[str] = []
    for layer in layers:
        module = next((path for path in _paths(layer.path) if "head" in concepts(path)), layer.path)
        is_whole = layer.template.startswith(f"{module}.") and module not in used
        found += [f"{module}."] if is_whole else layer.names()
    return list(dict.fromkeys(found))


def _paths(name: str) -> list[str]:
    """``a``, ``a.b`` and ``a.b.c`` for ``a.b.c``."""
    return list(accumulate(name.split("."), "{}.{}".format))


def _done(found: Suggestion) -> list[tuple[object, ...]]:
    """The effect of the plan, apart from the rules that cause it."""
    return [(row.key, row.action, row.sources, row.part, row.parts, row.steps) for row in found.plan.rows]


def _can_say(name: str) -> bool:
    """Whether a rule can match the name: no signs of patterns, no empty segment, no line break, a normal length."""
    segments = name.split(".")
    is_short = len(name) <= _LONGEST and len(segments) <= _DEEPEST
    return is_short and name.isprintable() and not any(sign in name for sign in "<>*") and all(segments)
