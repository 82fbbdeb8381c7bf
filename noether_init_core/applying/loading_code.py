"""Loading code of modules: which modules have it.

Such code is a hook on ``load_state_dict``, an override of it or of ``_load_from_state_dict``, or ``set_extra_state``.
A class of tensors with a ``copy_`` of its own has it, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs
import torch

from noether_init_core.surgery.plan import PlanRow

_PLAIN = torch.nn.Module
_PLAIN_TENSORS = (torch.Tensor, torch.nn.Parameter)


@attrs.frozen(eq=False)
class LoadingCode:
    """The loading code of a model, and what it is given beside the planned entries.

    Attributes:
        runs: Prefix -> module whose ``load_state_dict`` loads everything below. The whole model, if there is loading
            code of users: it may read and write any entry, so it runs where torch would run it.
        of_users: Prefix -> outermost module with loading code of its own.
        of_torch: Prefix -> module of torch that translates entries of earlier versions. It runs only where the entries
            of the file do not fit.
        passed: Name, as the code expects it -> name in the file, of entries that only the code knows.
        brought: Names of the model whose value the code makes, so that they are not given to it.
        fed: Name of the model -> the planned row of what the code is given, where it makes something else of it.
        own: Names whose present values the code is given: those outside of the state dict, and kept ones that it needs.
    """

    runs: Mapping[str, torch.nn.Module] = attrs.Factory(dict)
    of_users: Mapping[str, torch.nn.Module] = attrs.Factory(dict)
    of_torch: Mapping[str, torch.nn.Module] = attrs.Factory(dict)
    passed: Mapping[str, str] = attrs.Factory(dict)
    brought: frozenset[str] = frozenset()
    fed: Mapping[str, PlanRow] = attrs.Factory(dict)
    own: frozenset[str] = frozenset()

    @property
    def is_any(self) -> bool:
        """Whether there is any code that may run."""
        return bool(self.runs or self.of_torch)

    def of_key(self, key: str) -> torch.nn.Module:
        """The outermost module with loading code for an entry; the whole model, if no module has it."""
        groups = (self.of_users, self.of_torch, self.runs)
        return next(one for group in groups for prefix, one in group.items() if key.startswith(prefix))

    @classmethod
    def of(cls, root: torch.nn.Module) -> LoadingCode:
        """The loading code of a model."""
        users: dict[str, torch.nn.Module] = {}
        of_torch: dict[str, torch.nn.Module] = {}
        for path, module in root.named_modules():
            prefix = f"{path}." if path else ""
            who = _authors(module, is_root=not path)
            if "user" in who and not prefix.startswith(tuple(users)):
                users[prefix] = module
            elif who:
                of_torch[prefix] = module
        return cls({"": root} if users else {}, users, of_torch)


def _authors(module: torch.nn.Module, *, is_root: bool) -> set[str]:
    """``user`` and ``torch``: who wrote loading code of the module, or of the class of its tensors."""
    hooks = (*module._load_state_dict_pre_hooks.values(), *module._load_state_dict_post_hooks.values())
    code: list[Any] = [getattr(hook, "hook", hook) for hook in hooks]
    names = ["_load_from_state_dict", "set_extra_state", *(["load_state_dict"] if is_root else [])]
    for name in names:
        if name in module.__dict__:
            code.append(module.__dict__[name])
        elif getattr(type(module), name) is not getattr(_PLAIN, name):
            code.append(getattr(type(module), name))
    for tensor in (*module._parameters.values(), *module._buffers.values()):
        code += [] if tensor is None or type(tensor) in _PLAIN_TENSORS else _copying_code(type(tensor))
    return {"torch" if _module_of(one).split(".")[0] == "torch" else "user" for one in code}


def _copying_code(kind: type[torch.Tensor]) -> list[Any]:
    """The methods of a class of tensors that decide what a copy into one of them does."""
    own = [getattr(kind, name) for name in ("copy_", "__torch_function__")]
    plain = (torch.Tensor.copy_, torch.Tensor.__torch_function__, torch._C._disabled_torch_function_impl)
    return [one for one in own if one not in plain and _module_of(one).split(".")[0] != "torch"]


def _module_of(code: Any) -> str:
    return str(getattr(code, "__module__", None) or type(code).__module__)


def overrides_load(module: torch.nn.Module) -> bool:
    """Whether the module has a ``load_state_dict`` of its own."""
    return "load_state_dict" in module.__dict__ or type(module).load_state_dict is not _PLAIN.load_state_dict


def translates(module: torch.nn.Module) -> bool:
    """Whether code of the module or its class sees the loaded entries before they are copied."""
    return bool(module._load_state_dict_pre_hooks) or any(
        name in module.__dict__ or getattr(type(module), name) is not getattr(_PLAIN, name)
        for name in ("_load_from_state_dict", "load_state_dict")
    )
