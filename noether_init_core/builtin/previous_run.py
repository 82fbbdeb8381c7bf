"""The kind ``previous_run``: a warm start from the weights of an earlier run, with surgery on keys."""

from __future__ import annotations

import copy
from functools import cached_property
from typing import Annotated, Any, ClassVar, Self

import pydantic

from noether_init_core.config.base import KindConfig, RunId
from noether_init_core.config.source import CheckpointInitializerConfig
from noether_init_core.errors import ConfigError
from noether_init_core.initializers.callbacks import check_resumption, resume_callbacks
from noether_init_core.initializers.checkpoint import CheckpointInitializer
from noether_init_core.initializers.source import SourceInitializer
from noether_init_core.paths import check_model_name
from noether_init_core.surgery.name_rules import NameRules, NoetherSurgery, Rename

#: Fields of Noether -> how to write them as a transform.
_AS_TRANSFORM = {
    "keys_to_remove": "keys_to_remove: [a.w] is {drop: a.w}",
    "patterns_to_remove": "patterns_to_remove: [head.] is {drop: head.} for what begins with it",
    "patterns_to_rename": "patterns_to_rename: [{src: stem., dst: patch.}] is {from: stem., to: patch.}",
    "patterns_to_instantiate": "patterns_to_instantiate: [head.] is {keep_model: head.}",
}
Pattern = Annotated[str, pydantic.Field(min_length=1)]


class RenamePattern(pydantic.BaseModel):
    """Replaces each occurrence of ``src`` in a key by ``dst``, which is required (``dst: ""`` deletes ``src``)."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    src: Pattern = pydantic.Field(description="The text to replace, anywhere in a key of the file.")
    dst: str = pydantic.Field(description="The new text; empty deletes src.")


class PreviousRunInitializerConfig(CheckpointInitializerConfig):
    """The config of ``previous_run``.

    The four surgery fields work on substrings of keys, one field after the other, as in Noether.
    """

    kind: str = "previous_run"
    run_id: RunId = pydantic.Field(description="The run to start from.")
    load_optim: bool = pydantic.Field(default=False, description="Whether the state of the optimizer is loaded too.")
    load_callbacks: bool = pydantic.Field(
        default=False, description="Whether callbacks resume from the files of the source run (such as an EMA)."
    )
    keys_to_remove: list[Pattern] | None = pydantic.Field(
        default=None, description="Keys of the file to ignore, whole names."
    )
    patterns_to_remove: list[Pattern] | None = pydantic.Field(
        default=None, description="Keys of the file that contain one of these are ignored."
    )
    patterns_to_rename: list[RenamePattern] | None = pydantic.Field(
        default=None, description="Replacements in keys of the file, each applied to the result of the one before."
    )
    patterns_to_instantiate: list[Pattern] | None = pydantic.Field(
        default=None, description="Keys of the model that contain one of these keep their present value."
    )

    @pydantic.model_validator(mode="after")
    def _check_surgery(self) -> Self:
        fields = [name for name in _AS_TRANSFORM if getattr(self, name)]
        modern = [name for name in ("transforms", "source_root", "target_root") if getattr(self, name)]
        if fields and modern:
            raise ValueError(
                f"{modern[0]} and {fields[0]} are two ways to say the same, with different results. Write it all as "
                f"transforms: {_AS_TRANSFORM[fields[0]]}"
            )
        return self


class PreviousRunInitializer(CheckpointInitializer):
    """Warm start: weights of an earlier run, for single models and, recursively, for composites.

    Training starts at iteration zero. See ``PreviousRunInitializerConfig``.

    Attributes:
        keys_to_remove: A list of this instance, from the config; ``init_weights`` reads it when it plans.
        patterns_to_remove: The same.
        patterns_to_rename: The same, as mappings with ``src`` and ``dst``.
        patterns_to_instantiate: The same.
    """

    config_class: ClassVar[type[KindConfig]] = PreviousRunInitializerConfig
    contract: ClassVar[int] = 1
    config: PreviousRunInitializerConfig

    @cached_property
    def keys_to_remove(self) -> list[str]:  # described above, as the others
        return list(self.config.keys_to_remove or ())

    @cached_property
    def patterns_to_remove(self) -> list[str]:
        return list(self.config.patterns_to_remove or ())

    @cached_property
    def patterns_to_rename(self) -> list[dict[str, str]]:
        return [{"src": rename.src, "dst": rename.dst} for rename in self.config.patterns_to_rename or ()]

    @cached_property
    def patterns_to_instantiate(self) -> list[str]:
        return list(self.config.patterns_to_instantiate or ())

    @property
    def rules(self) -> NameRules:
        """``transforms``, or the four surgery fields of Noether."""
        fields = (self.keys_to_remove, self.patterns_to_remove, self.patterns_to_rename, self.patterns_to_instantiate)
        if self.config.transforms or self.config.source_root or self.config.target_root:
            # a subclass may have filled one of the lists, which the config cannot know
            if any(fields):
                raise ConfigError(
                    "transforms cannot be combined with the surgery fields of Noether, of which this instance has one. "
                    "Next: write it as a rule under transforms"
                )
            return super().rules
        return NoetherSurgery(
            tuple(dict.fromkeys(self.keys_to_remove)),
            tuple(self.patterns_to_remove),
            tuple(Rename(rename["src"], rename["dst"]) for rename in self.patterns_to_rename),
            tuple(self.patterns_to_instantiate),
            unmatched_is_error=self.config.on_unmatched_rule == "error",
        )

    @property
    def skipped_hooks(self) -> frozenset[str]:
        """``init_callbacks``, unless ``load_callbacks``."""
        return frozenset(() if self.config.load_callbacks else ("init_callbacks",))

    def init_weights(self, model: Any, model_name: str | None = None) -> None:
        """Write the weights in place, after all checks.

        With ``model_name`` the files of that name are used instead of those of the config. In a stack that is a
        ``ConfigError``, since its plan is for other files. Raises what ``SourceInitializer.init_weights`` raises.
        """
        if model_name is None:
            super().init_weights(model)
            return
        if self.session is not None:
            # the plan and the report of the stack would name the files of another model
            raise ConfigError(
                f"{self.config.kind}: init_weights(model, {model_name!r}) cannot be called in a stack: its plan is for "
                f"other files. Next: model_name: {model_name} in the config"
            )
        other = copy.copy(self)
        other.config = self.config.model_copy(update={"model_name": check_model_name(model_name)})
        other.session = None
        SourceInitializer.init_weights(other, model)

    def check(self, model: Any, trainer: Any = None, callbacks: list[Any] | None = None) -> None:
        """Check weights and optimizer as in ``CheckpointInitializer``, and whether callbacks can read their files."""
        super().check(model, trainer, callbacks)
        if callbacks and self.config.load_callbacks:
            with self.in_session():
                check_resumption(callbacks, self.select(self.leaves(model)))

    def init_callbacks(self, callbacks: list[Any], model: Any) -> None:
        """Let every callback with ``resume_from_checkpoint`` resume from the files of the source run."""
        with self.in_session() as session:
            self.select(self.leaves(model))
            resume_callbacks(callbacks, model, self.init_run_path_provider, session.selection.own, self.logger)
