"""The trees of a file: the state dict, and whatever else holds tensors; which one is meant, and what is in each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import attrs

from noether_init_core.errors import CheckpointFormatError
from noether_init_core.files.formats.content import Content
from noether_init_core.files.formats.module_versions import Versions
from noether_init_core.files.tensor_info import TensorInfo
from noether_init_core.files.tensor_names import children, is_state_dict, state_dict_of
from noether_init_core.messages import one_line

__all__ = ["Tree", "Trees"]


@attrs.frozen(eq=False)
class Tree:
    """One tree: its tensors by key, its other entries where it is a state dict, and what lies beside it in the file."""

    name: str
    value: Any
    tensors: Mapping[str, TensorInfo]
    extra_state: Mapping[str, Any]
    beside: Mapping[Any, Any]
    versions: Versions


class Trees:
    """The trees of one file. An empty name means the whole object."""

    def __init__(self, content: Content, path: Path) -> None:
        self._content = content
        self._path = path
        root = content.value
        self._own = state_dict_of(root, TensorInfo)
        self._is_below = self._own is not None and self._own is not root
        self._parts: Mapping[Any, Any] = root if type(root) is dict else {"object": root}
        self._found = {
            key: child
            for key, child in (root.items() if type(root) is dict else ())
            if type(key) is str and key and (content.graph.count(child) or (self._is_below and child is self._own))
        }

    @property
    def counts(self) -> dict[str, int]:
        """Name -> number of tensors; the empty name counts those that lie in no other tree."""
        found = {name: self._content.graph.count(tree) for name, tree in self._found.items()}
        outside = self._content.graph.count(self._content.value) - sum(found.values())
        return {"": outside, **found} if outside or not found else found

    def value(self, name: str) -> Any:
        """The tree of that name. Raises ``KeyError`` for a name that does not exist."""
        return self._found[name] if name else self._content.value

    def tensors(self, name: str) -> Mapping[str, TensorInfo]:
        """A state dict's tensors by its own keys, those of another tree by dotted paths in it. Raises ``KeyError``."""
        tree = self.value(name)
        return tree if is_state_dict(tree, TensorInfo) else self._dotted(name)

    def select(self, entry: str | None) -> Tree:
        """The tree that is meant; None: the state dict, else everything. Raises ``KeyError``."""
        name = entry if entry is not None else "state_dict" if self._is_below else ""
        tree = self.value(name)
        beside = {key: child for key, child in self._parts.items() if key != name} if name else self._parts
        has_tensors = type(tree) is dict and any(type(child) is TensorInfo for child in tree.values())
        if not (name and has_tensors) and (self._own is None or tree is not self._own):
            return Tree(name, tree, MappingProxyType(self._dotted(name)), {}, beside, {})
        wrong = next((key for key in tree if type(key) is not str), None)
        if wrong is not None:
            raise CheckpointFormatError(
                f"{self._path} cannot be read as a checkpoint: its state dict has the key {one_line(repr(wrong))}, "
                "which is no text. Next: write it again with torch.save(state_dict, path)",
                path=self._path,
            )
        tensors = {key: child for key, child in tree.items() if type(child) is TensorInfo}
        others = {key: child for key, child in tree.items() if key not in tensors}
        versions = self._content.versions.get(id(tree), {})
        return Tree(name, tree, MappingProxyType(tensors), others, beside if name else {}, versions)

    def _dotted(self, name: str) -> dict[str, TensorInfo]:
        return self._content.graph.tensors(dict(children(self._found[name])) if name else self._parts)
