"""The kind ``random``: parameters drawn by functions of ``torch.nn.init``, chosen by name. No checkpoint is read."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, create_model, model_validator

from noether_init_core import InitializerBase, KindConfig, NameGlobs, PlanError, named_parameters

__all__ = ["FUNCTIONS", "RandomConfig", "RandomInitializer", "Rule", "seed_of"]

#: What ``init`` may name. Not sparse_: it draws from torch's global generator, also where it is given another one.
FUNCTIONS = {
    name: function
    for name, function in sorted(vars(torch.nn.init).items())
    if inspect.isfunction(function) and name.endswith("_") and not name.startswith("_") and name != "sparse_"
}


class Rule(BaseModel):
    """Which parameters, and the function that draws them. Further keys are arguments of the function."""

    model_config = ConfigDict(extra="allow", frozen=True)

    match: str = Field(description="Names: * is part of a segment, ** any segments, a trailing dot everything below.")
    init: str = Field(description="A function of torch.nn.init.", json_schema_extra={"enum": [*FUNCTIONS]})
    _arguments: dict[str, Any] = PrivateAttr()

    @model_validator(mode="after")
    def _check(self) -> Self:
        NameGlobs([self.match])
        if self.init not in FUNCTIONS:
            raise ValueError(f"{self.init!r} is none of {', '.join(FUNCTIONS)}")
        parameters, given = inspect.signature(FUNCTIONS[self.init], eval_str=True).parameters, self.model_extra or {}
        takes = {name: one for name, one in parameters.items() if name not in ("tensor", "generator")}
        if unknown := [name for name in given if name not in takes]:
            raise ValueError(f"{self.init} takes no {', '.join(unknown)}; it takes {', '.join(takes) or 'nothing'}")
        fields: Any = {k: (p.annotation, ... if p.default is p.empty else p.default) for k, p in takes.items()}
        arguments = create_model(self.init, __config__=ConfigDict(allow_inf_nan=False), **fields)
        self._arguments = arguments.model_validate(given).model_dump()
        return self

    def draw(self, seed: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """New values: on the CPU, so that no device differs, and in float32 where few functions know ``dtype``."""
        function, arguments = FUNCTIONS[self.init], dict(self._arguments)
        if "generator" in inspect.signature(function).parameters:
            arguments["generator"] = torch.Generator("cpu").manual_seed(seed)
        with torch.device("cpu"):
            values = torch.empty(tuple(shape), dtype=dtype if dtype.itemsize >= 4 else torch.float32)
            function(values, **arguments)
        return values


class RandomConfig(KindConfig):
    """The config of ``random``."""

    seed: int = Field(0, description="Decides, together with the name of a parameter, which values are drawn for it.")
    rules: list[Rule] = Field(min_length=1, description="For each parameter, the first one that matches counts.")
    on_leftover: Literal["keep", "error"] = Field("keep", description="What parameters that no rule matches lead to.")


def seed_of(seed: int, name: str) -> int:
    """The seed for the parameter ``name``: 32 bits, all that torch's generator on the CPU looks at."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:4], "big")


class RandomInitializer(InitializerBase):
    """Draws parameters in place. Buffers, optimizers and the global generators are left as they are."""

    config_class: ClassVar[type[KindConfig]] = RandomConfig
    contract: ClassVar[int] = 1
    config: RandomConfig

    def check(self, model: Any, trainer: Any = None, callbacks: list[Any] | None = None) -> None:
        """Raise ``PlanError`` with all that is in the way. Every function is tried, on small tensors on the CPU."""
        self._decide(model)

    def init_weights(self, model: Any) -> None:
        """Draw one parameter after the other, once everything about all of them has been checked."""
        chosen, left = self._decide(model)
        for name, (parameter, rule) in chosen.items():
            if parameter.dtype.itemsize < 4:  # before the first one changes: what a small trial does not draw
                values = rule.draw(seed_of(self.config.seed, name), parameter.shape, parameter.dtype)
                if not values.to(parameter.dtype).float().isfinite().all():
                    raise PlanError(f"random: {parameter.dtype} cannot hold what {rule.init} draws for {name}")
        with torch.no_grad():
            for name, (parameter, rule) in chosen.items():
                parameter.copy_(rule.draw(seed_of(self.config.seed, name), parameter.shape, parameter.dtype))
        drawn = f"{len(chosen)} drawn with seed {self.config.seed}"
        self.logger.info("random: %s; left as they are: %s", drawn, ", ".join(left) or "none")
        with self.in_session() as session:
            session.restored += [drawn, f"left as they are: {_listed(left)}"] if left else [drawn]

    def init_optimizer(self, model: Any) -> None:
        """Nothing: a parameter that was drawn just now has no state."""

    def _decide(self, model: Any) -> tuple[dict[str, tuple[torch.Tensor, Rule]], list[str]]:
        """Name -> parameter and the rule that draws it; and the names that no rule matches."""
        parameters, rules = _parameters(model), self.config.rules
        globs = NameGlobs(rule.match for rule in rules)
        first = {name: matching[0] for name in parameters if (matching := globs.matching(name))}
        left = [name for name in parameters if name not in first]
        problems = [
            f"rules.{number}: {rules[number].init} cannot draw {name}: {problem}"
            for name, number in first.items()
            if (problem := _problem(parameters[name], rules[number]))
        ]
        for number, rule in enumerate(rules):
            if number not in first.values():
                there = _listed(NameGlobs.near(rule.match, parameters) or [*parameters]) or "none"
                problems.append(f"rules.{number}: {rule.match} matches nothing earlier rules left. Near: {there}")
        if left and self.config.on_leftover == "error":
            problems.append(f"no rule matches {_listed(left)} (on_leftover: error)")
        if problems:
            raise PlanError("random:\n  " + _listed(problems, "\n  ") + "\nNothing was changed.", problems=problems)
        return {name: (parameters[name], rules[number]) for name, number in first.items()}, left


def _parameters(model: Any) -> dict[str, torch.Tensor]:
    """Name below ``model`` -> parameter of real or complex numbers; a tied one under its first name."""
    found = named_parameters(model)
    return {name: one for name, one in found.items() if one.dtype.is_floating_point or one.dtype.is_complex}


def _problem(parameter: torch.Tensor, rule: Rule) -> str:
    """Why the rule cannot fill the parameter, in words; empty where it can."""
    if torch.nn.parameter.is_lazy(parameter) or parameter.is_meta:
        return "it has no memory. Next: module.to_empty(device='cpu'); for a lazy module, pass one batch through it"
    if type(parameter.data) is not torch.Tensor or parameter.is_inference():
        return "it is sharded, quantized or of inference mode. Next: initialize the model before it is that"
    if any(step == 0 and size > 1 for step, size in zip(parameter.stride(), parameter.shape, strict=True)):
        return "several of its elements share memory. Next: parameter.data = parameter.data.clone()"
    try:
        # of all sizes only the first can be refused: dirac_ divides it by groups
        values = rule.draw(0, [*parameter.shape[:1], *(min(size, 1) for size in parameter.shape[1:])], parameter.dtype)
    except Exception as error:  # every function has its own
        return str(error)
    fit = values.to(parameter.dtype).to(values.dtype).isfinite().all()
    return "" if fit else f"{parameter.dtype} cannot hold the values"


def _listed(words: Sequence[str], separator: str = ", ") -> str:
    return separator.join([*words[:8], *([f"and {len(words) - 8} more"] if words[8:] else [])])
