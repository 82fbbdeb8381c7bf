"""The kind ``random``: draw parameters with functions of ``torch.nn.init``, selected by name, without a checkpoint."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, create_model, model_validator

from noether_init_core import InitializerBase, KindConfig, NameGlobs, PlanError, named_parameters

__all__ = ["FUNCTIONS", "RandomConfig", "RandomInitializer", "Rule", "seed_of"]

#: Functions for ``init``. sparse_ is left out, because it uses torch's global generator even if it gets another one.
FUNCTIONS = {
    name: function
    for name, function in sorted(vars(torch.nn.init).items())
    if inspect.isfunction(function) and name.endswith("_") and not name.startswith("_") and name != "sparse_"
}


class Rule(BaseModel):
    """A pattern of names, and the function that draws the parameters. Further keys are arguments of the function."""

    model_config = ConfigDict(extra="allow", frozen=True)

    match: str = Field(description="Names: * is part of a segment, ** any segments, a trailing dot everything below.")
    init: str = Field(description="A function of torch.nn.init.", json_schema_extra={"enum": [*FUNCTIONS]})
    _arguments: dict[str, Any] = PrivateAttr()

    @model_validator(mode="after")
    def _check(self) -> Self:
        NameGlobs([self.match])
        if self.init not in FUNCTIONS:
            raise ValueError(f"unknown function {self.init!r}; known are {', '.join(FUNCTIONS)}")
        parameters, given = inspect.signature(FUNCTIONS[self.init], eval_str=True).parameters, self.model_extra or {}
        takes = {name: one for name, one in parameters.items() if name not in ("tensor", "generator")}
        if unknown := [name for name in given if name not in takes]:
            raise ValueError(
                f"unknown argument {', '.join(unknown)} of {self.init}; it takes {', '.join(takes) or 'no arguments'}"
            )
        fields: Any = {k: (p.annotation, ... if p.default is p.empty else p.default) for k, p in takes.items()}
        arguments = create_model(self.init, __config__=ConfigDict(allow_inf_nan=False), **fields)
        self._arguments = arguments.model_validate(given).model_dump()
        return self

    def draw(self, seed: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Return new values on the CPU, so that they do not depend on the device.

        Dtypes narrower than 32 bits are drawn in float32, because few functions support them.
        """
        function, arguments = FUNCTIONS[self.init], dict(self._arguments)
        if "generator" in inspect.signature(function).parameters:
            arguments["generator"] = torch.Generator("cpu").manual_seed(seed)
        with torch.device("cpu"):
            values = torch.empty(tuple(shape), dtype=dtype if dtype.itemsize >= 4 else torch.float32, device="cpu")
            function(values, **arguments)
        return values


class RandomConfig(KindConfig):
    """The config of ``random``."""

    seed: int = Field(0, description="Determines, with the name of a parameter, the values that are drawn for it.")
    rules: list[Rule] = Field(min_length=1, description="The first rule that matches a parameter applies.")
    on_leftover: Literal["keep", "error"] = Field("keep", description="Action for parameters that no rule matches.")


def seed_of(seed: int, name: str) -> int:
    """Return the seed for the parameter ``name``: 32 bits, because torch's CPU generator ignores further bits."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:4], "big")


class RandomInitializer(InitializerBase):
    """Draws parameters in place. Buffers, optimizers and the global generators are not changed."""

    config_class: ClassVar[type[KindConfig]] = RandomConfig
    contract: ClassVar[int] = 1
    config: RandomConfig

    def check(self, model: Any, trainer: Any = None, callbacks: list[Any] | None = None) -> None:
        """Raise ``PlanError`` with all problems. Every function is tried on a small CPU tensor; nothing is changed."""
        self._decide(model)

    def init_weights(self, model: Any) -> None:
        """Check all parameters, then draw one after the other. Raises ``PlanError``; then nothing is changed."""
        chosen, left = self._decide(model)
        for name, (parameter, rule) in chosen.items():
            # The trial on a small tensor may miss values beyond the range of a narrow dtype.
            if parameter.dtype.itemsize < 4:
                values = rule.draw(seed_of(self.config.seed, name), parameter.shape, parameter.dtype)
                if not values.to(parameter.dtype).float().isfinite().all():
                    raise PlanError(f"random: {parameter.dtype} cannot hold the values of {rule.init} for {name}")
        with torch.no_grad():
            for name, (parameter, rule) in chosen.items():
                parameter.copy_(rule.draw(seed_of(self.config.seed, name), parameter.shape, parameter.dtype))
        drawn = f"{len(chosen)} drawn with seed {self.config.seed}"
        self.logger.info("random: %s; not changed: %s", drawn, ", ".join(left) or "none")
        with self.in_session() as session:
            session.restored += [drawn, f"not changed: {_listed(left)}"] if left else [drawn]

    def init_optimizer(self, model: Any) -> None:
        """Do nothing: new parameters have no optimizer state."""

    def _decide(self, model: Any) -> tuple[dict[str, tuple[torch.Tensor, Rule]], list[str]]:
        """Return name -> parameter and its rule, and the names that no rule matches. Raises ``PlanError``."""
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
                there = _listed(NameGlobs.near(rule.match, parameters) or [*parameters]) or "no parameters"
                apart = "matches no parameter, apart from those of earlier rules"
                problems.append(f"rules.{number}: {rule.match} {apart}. Near: {there}")
        if left and self.config.on_leftover == "error":
            problems.append(f"no rule matches {_listed(left)} (on_leftover: error)")
        if problems:
            raise PlanError("random:\n  " + _listed(problems, "\n  ") + "\nNothing was changed.", problems=problems)
        return {name: (parameters[name], rules[number]) for name, number in first.items()}, left


def _parameters(model: Any) -> dict[str, torch.Tensor]:
    """Return name below ``model`` -> floating-point or complex parameter; a tied one under its first name."""
    found = named_parameters(model)
    return {name: one for name, one in found.items() if one.dtype.is_floating_point or one.dtype.is_complex}


def _problem(parameter: torch.Tensor, rule: Rule) -> str:
    """Return why the rule cannot fill the parameter; empty if it can."""
    if torch.nn.parameter.is_lazy(parameter) or parameter.is_meta:
        return "it has no memory. Next: module.to_empty(device='cpu'); for a lazy module, pass one batch through it"
    if type(parameter.data) is not torch.Tensor or parameter.is_inference():
        return "it is sharded, quantized or an inference tensor. Next: initialize the model before that step"
    if any(step == 0 and size > 1 for step, size in zip(parameter.stride(), parameter.shape, strict=True)):
        return "several of its elements share memory. Next: parameter.data = parameter.data.clone()"
    try:
        # A function can refuse only the first size (dirac_ divides it by groups), so the others may be small.
        values = rule.draw(0, [*parameter.shape[:1], *(min(size, 1) for size in parameter.shape[1:])], parameter.dtype)
    except Exception as error:  # each function raises its own classes of errors
        return str(error)
    fit = values.to(parameter.dtype).to(values.dtype).isfinite().all()
    return "" if fit else f"{parameter.dtype} cannot hold the values"


def _listed(words: Sequence[str], separator: str = ", ") -> str:
    return separator.join([*words[:8], *([f"and {len(words) - 8} more"] if words[8:] else [])])
