"""Loading code of modules: which modules have it.

Such code is a hook on ``load_state_dict``, an override of it or of ``_load_from_state_dict``, or ``set_extra_state``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import attrs
import torch

_PLAIN = torch.nn.Module


@attrs.frozen(eq=False)
class LoadingCode:
    """The loading code of a model, and what it is given beside the planned entries.

    Attributes:
        of_users: Prefix -> outermost module with loading code of its own; it runs for everything below.
        of_torch: Prefix -> module of torch that translates entries of earlier versions. It runs only where the entries
            of the file do not fit.
        after: Modules with hooks that run after a load, in torch's order.
        passed: Name, as the code expects it -> name in the file, of entries that only the code knows.
        brought: Names of the model whose value the code makes, so that they are not given to it.
        own: Names outside of the state dict that the code expects: it gets their present values.
    """

    of_users: Mapping[str, torch.nn.Module] = attrs.Factory(dict)
    of_torch: Mapping[str, torch.nn.Module] = attrs.Factory(dict)
    after: tuple[torch.nn.Module, ...] = ()
    passed: Mapping[str, str] = attrs.Factory(dict)
    brought: frozenset[str] = frozenset()
    own: frozenset[str] = frozenset()

    @property
    def is_any(self) -> bool:
        """Whether there is any code that may run."""
        return bool(self.of_users or self.of_torch or self.after)

    @classmethod
    def of(cls, root: torch.nn.Module) -> LoadingCode:
        """The loading code of a model."""
        users: dict[str, torch.nn.Module] = {}
        torchs: dict[str, torch.nn.Module] = {}
        for path, module in root.named_modules():
            prefix = f"{path}." if path else ""
            who = _authors(module, is_root=not path)
            if "user" in who and not prefix.startswith(tuple(users)):
                users[prefix] = module
            elif who:
                torchs[prefix] = module
        after = tuple(module for prefix, module in _in_torchs_order(root) if not prefix.startswith(tuple(users)))
        return cls(users, torchs, after)


def _authors(module: torch.nn.Module, *, is_root: bool) -> set[str]:
    """``user`` and ``torch``: who wrote loading code of the module."""
    code: list[Any] = [getattr(hook, "hook", hook) for hook in module._load_state_dict_pre_hooks.values()]
    names = ["_load_from_state_dict", "set_extra_state", *(["load_state_dict"] if is_root else [])]
    for name in names:
        if name in module.__dict__:
            code.append(module.__dict__[name])
        elif getattr(type(module), name) is not getattr(_PLAIN, name):
            code.append(getattr(type(module), name))
    return {"torch" if _module_of(one).split(".")[0] == "torch" else "user" for one in code}


def _module_of(code: Any) -> str:
    return str(getattr(code, "__module__", None) or type(code).__module__)


def _in_torchs_order(root: torch.nn.Module, prefix: str = "") -> Iterator[tuple[str, torch.nn.Module]]:
    """Modules with hooks that run after a load: the inner ones first, a module with two names twice."""
    for name, child in root._modules.items():
        if child is not None:
            yield from _in_torchs_order(child, f"{prefix}{name}.")
    if root._load_state_dict_post_hooks:
        yield prefix, root


def overrides_load(module: torch.nn.Module) -> bool:
    """Whether the module has a ``load_state_dict`` of its own."""
    return "load_state_dict" in module.__dict__ or type(module).load_state_dict is not _PLAIN.load_state_dict


def translates(module: torch.nn.Module) -> bool:
    """Whether code of the module or its class sees the loaded entries before they are copied."""
    return bool(module._load_state_dict_pre_hooks) or any(
        name in module.__dict__ or getattr(type(module), name) is not getattr(_PLAIN, name)
        for name in ("_load_from_state_dict", "load_state_dict")
    )
