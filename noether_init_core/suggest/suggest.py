"""Suggests the rules that turn names of a file into those of a model, from names, shapes and dtypes alone. Pure.

No file is read and no rule is applied. The suggested rules are planned, so that they are known to give a plan. What
names and shapes do not decide is reported with its reason and its alternatives.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from itertools import accumulate

import attrs

from noether_init_core.messages import yaml_field
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
from noether_init_core.surgery.advice import covering, resized
from noether_init_core.surgery.fit import TIED, PlanPart, TargetSpec, TensorSpec, shapes_of
from noether_init_core.surgery.planner import Policies, plan_load
from noether_init_core.surgery.roots import is_average, roots_for, told
from noether_init_core.surgery.steps import written
from noether_init_core.surgery.ties import names_of_ties
from noether_init_core.surgery.wrappers import bare_names, below

# buffers that models compute themselves
_COMPUTED = frozenset(
    {"inv_freq", "position_ids", "masked_bias", "num_batches_tracked", "relative_position_index", "attn_mask"}
)
# a reader checks each suggested rule, and RE2 cannot compile many thousands at once
_MOST_RULES = 500
# real models stay below; matching splits names into segments, which a hostile file could make slow
_LONGEST, _DEEPEST = 256, 32
# parts of a file that are tried as its root
_MOST_ROOTS = 4


def suggest(
    sources: Mapping[str, TensorSpec],
    targets: Mapping[str, TargetSpec],
    *,
    model: str = "",
    policies: Policies | None = None,
    hidden: frozenset[str] = frozenset(),
    loaded: frozenset[str] = frozenset(),
    roots: tuple[str, str] = ("", ""),
    is_followed: bool = False,
    finds_root: bool = True,
    beside: tuple[str, ...] = (),
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
        loaded: Names of the model that an earlier initializer loads.
        roots: ``source_root`` and ``target_root`` of the config; the rules are relative to them.
        is_followed: Whether a later initializer loads weights of the model, so that the file may lack some.
        finds_root: Whether the suggestion may name another ``source_root``, where ``roots`` has none that fits.
        beside: Names of parts of the file beside its state dict, of which ``roots`` may name one.

    Never raises. Names that a rule cannot match stay unmatched: those with ``<``, ``*`` or an empty segment, and
    those of more than 256 characters or 32 segments.
    """
    part = PlanPart(model or "model", "", (), sources, targets, hidden=hidden, loaded=loaded, beside=beside)

    def below_root(root: str) -> Suggestion:
        made = _Suggesting(part, policies or Policies(), (root, roots[1]), is_followed=is_followed).run()
        given = {"source_root": roots[0] if root == roots[0] else "", "target_root": roots[1]}
        within = ", ".join(yaml_field(name, text) for name, text in given.items() if text)
        return attrs.evolve(made, within=within, source_root=root if root != roots[0] else "")

    is_absent = bool(roots[0]) and not below(transforms_of((), roots[0]).source_root, bare_names(sources))
    if not finds_root or roots[0] in beside or (roots[0] and not is_absent):
        return below_root(roots[0])
    found = roots_for(part, roots[1], roots[0])
    if found:
        made = below_root(found[0].name)
        return _among(made, [root.name for root in found], told(found, part)) if found[1:] and found[0].name else made
    return _below_one_of(part, below_root(roots[0]), below_root, [""] * is_absent)


def suggest_together(
    parts: Sequence[PlanPart], policies: Policies, roots: tuple[str, str], *, is_followed: bool
) -> dict[str, Suggestion]:
    """Path of a single model -> ``suggest`` for it. One config names one root for the files of all models."""

    def found(*, finds_root: bool) -> dict[str, Suggestion]:
        return {
            part.model: suggest(
                part.sources,
                part.targets,
                model=part.model,
                policies=policies,
                hidden=part.hidden,
                loaded=part.loaded,
                roots=roots,
                is_followed=is_followed,
                finds_root=finds_root,
                beside=part.beside,
            )
            for part in parts
        }

    made = found(finds_root=True)
    return made if len({one.source_root for one in made.values()}) <= 1 else found(finds_root=False)


def _among(made: Suggestion, names: Sequence[str], reason: str) -> Suggestion:
    """A suggestion for the first of several roots that fit equally well."""
    first, *others = (yaml_field("source_root", name) for name in names)
    targets = tuple(row.key for row in made.plan.rows if row.writes)
    return attrs.evolve(made, unsure=(Unsure(first, reason, tuple(others), targets=targets), *made.unsure))


def _below_one_of(
    part: PlanPart, made: Suggestion, below_root: Callable[[str], Suggestion], others: Sequence[str]
) -> Suggestion:
    """The suggestion for the part of the file that gives the best plan; ``made`` if none is better."""
    counts = Counter(name.partition(".")[0] for name in bare_names(part.sources) if "." in name and _can_say(name))
    large = [name for name, count in counts.items() if 2 * count >= len(part.targets)]
    large = [*others, *(large if len(counts) > 1 else ())]
    # a plan that is fine may take everything from one part of which there are copies
    is_fine = made.plan.is_fine
    if not is_fine < len(large) <= _MOST_ROOTS or (is_fine and not made.rules):
        return made

    def mark(one: Suggestion) -> tuple[bool, float, int]:
        return one.plan.is_fine, one.plan.coverage(), -len(one.unsure)

    tried = {name: below_root(name) for name in large}
    best = max(map(mark, tried.values()))
    names = sorted((name for name, one in tried.items() if mark(one) == best), key=is_average)
    if best[:2] < mark(made)[:2] or (best[:2] == mark(made)[:2] and not (is_fine and names[1:])):
        return made
    chosen = tried[names[0]]
    return _among(chosen, names, f"the rules fit below {' and below '.join(names)}") if names[1:] else chosen


class _Suggesting:
    """The state of one suggestion. Names in it are bare: below the roots, without the prefixes of wrappers."""

    def __init__(self, part: PlanPart, policies: Policies, roots: tuple[str, str], *, is_followed: bool) -> None:
        self._part, self._policies, sources, targets = part, policies, part.sources, part.targets
        self._roots, self._is_followed = roots, is_followed
        empty = transforms_of((), *roots)
        of_file, of_model = below(empty.source_root, bare_names(sources)), below(empty.target_root, bare_names(targets))
        self._is_outside = bool(sources) and not of_file
        # an earlier initializer loads these; only an entry of the same name replaces them
        of_model = {bare: name for bare, name in of_model.items() if name not in part.loaded or bare in of_file}
        self._source_names = {bare: name for bare, name in of_file.items() if _can_say(bare)}
        self._target_names = {bare: name for bare, name in of_model.items() if _can_say(bare)}
        bare_of = {name: bare for bare, name in self._target_names.items()}
        ties = [[bare_of[name] for name in names if name in bare_of] for names in names_of_ties(targets).values()]
        self._pairing = Pairing(
            {bare: sources[name] for bare, name in self._source_names.items() if name not in part.hidden},
            {bare: targets[name] for bare, name in self._target_names.items()},
            {bare: names for names in ties for bare in names},
        )
        self._unsure: list[Unsure] = []

    def run(self) -> Suggestion:
        if self._is_outside:
            # no entry of the file is below the root, so there is nothing to tell a fresh head from
            return attrs.evolve(self._planned(()), unmatched_targets=tuple(self._target_names.values()))
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
        found = self._completed(found)
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
        plan = plan_load("suggest", [self._part], transforms_of(rules, *self._roots), policies=self._policies)
        return Suggestion(tuple(rules), plan)

    def _completed(self, found: Suggestion) -> Suggestion:
        """The suggestion with rules for what is left: other sizes, entries of one side only, and counters."""
        rows, more = found.plan.rows, []
        bare_sources = {name: bare for bare, name in self._source_names.items()}
        bare_targets = {name: bare for bare, name in self._target_names.items()}
        misfits = [row for row in rows if row.action == "mismatch" and len(row.sources) == 1 and not row.steps]
        misfits = [row for row in misfits if not (row.rule or "").startswith(TIED)]
        parts = resized(shapes_of(misfits), shapes_of(row for row in rows if row.writes))
        for row in misfits:
            source, target = bare_sources.get(row.sources[0]), bare_targets.get(row.key)
            if row.key in parts and source and target and self._policies.on_mismatch == "error":
                move = {"from": source, "to": target} if source != target else {"from": source}
                steps = [written(step) for step in parts[row.key]]
                reason = "the common part is taken over" + " and the rest stays as it is" * ("pad" in steps[0])
                more.append(SuggestedRule({**move, "do": steps}, reason, ("shapes do not show what is at the end",)))
        missing = [row.key for row in rows if row.action == "missing"]
        counters = [name for name in missing if name.rpartition(".")[2] == "num_batches_tracked"]
        kept = covering(counters, [bare for name, bare in bare_targets.items() if name not in counters])
        more += [SuggestedRule({"keep_model": glob}, "the file has no such counters") for glob in kept]
        unused = [row.key for row in rows if row.action == "unexpected"]
        # while something is unsure, an unused entry may be the one that was meant
        if unused and not self._unsure and len(missing) == len(counters) and any(row.writes for row in rows):
            names = [bare_sources[name] for name in unused if name in bare_sources]
            dropped = covering(names, [bare for bare in self._source_names if bare not in set(names)])
            more += [SuggestedRule({"drop": glob}, "not found in the model") for glob in dropped]
        # special before general, as rules_of sorts them
        better = self._planned([*more, *found.rules]) if more else found
        lacks = any(row.action == "missing" for row in better.plan.rows)
        if lacks and self._is_followed and not any(row.action == "unexpected" for row in better.plan.rows):
            self._policies = attrs.evolve(self._policies, on_missing="keep")
            better = attrs.evolve(self._planned(better.rules), on_missing="keep")
        return better

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
            alike = [layer for layer in theirs if f"{layer.path}.".startswith(glob)] or theirs
            shapes = [list(layer.shapes[()]["weight"]) for layer in alike if "weight" in layer.leaves]
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
