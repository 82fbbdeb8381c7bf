"""One file of weights by itself, in a format that everybody reads; there as a whole, or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import attrs

from noether_init_core.errors import CheckpointError, CheckpointWriteError
from noether_init_core.files.opening import open_checkpoint
from noether_init_core.files.storage.disk import LOCAL
from noether_init_core.files.storage.handle import open_file
from noether_init_core.saving.file_writing import write_content
from noether_init_core.sets.checkpoint_set import lies_in_a_run

#: Suffix -> format.
FORMATS: Mapping[str, Literal["torch", "safetensors"]] = {
    ".safetensors": "safetensors",
    ".th": "torch",
    ".pt": "torch",
    ".pth": "torch",
    ".ckpt": "torch",
    ".bin": "torch",
}


@attrs.frozen
class WrittenFile:
    """A file that is on the disk; ``digest`` is that of all its bytes, as ``digest:`` of the kind ``file`` takes it."""

    path: Path
    format: Literal["torch", "safetensors"]
    bytes: int
    digest: str
    tensors: int


def check_place(path: Path, *, replace: bool = False) -> None:
    """Raise ``CheckpointWriteError`` for an unknown suffix, where there is no folder, and where a file is there."""
    if path.suffix.lower() not in FORMATS or not path.name:
        raise CheckpointWriteError(
            f"{path}: the suffix says the format, and {path.suffix or 'none'} is not known. There are: "
            f"{', '.join(FORMATS)}. Next: {path.with_suffix('.safetensors') if path.name else 'start.safetensors'}",
            path=path,
        )
    if not path.parent.is_dir():
        raise CheckpointWriteError(f"there is no folder {path.parent}. Next: mkdir -p {path.parent}", path=path)
    if os.path.lexists(path) and (not replace or not path.is_file()):
        raise CheckpointWriteError(
            f"{path} is there already, and was left as it is. Next: another name, or --force", path=path
        )
    if lies_in_a_run(path):
        raise CheckpointWriteError(f"{path} lies among checkpoints of a run. Next: a file in another folder", path=path)


def write_weights(
    path: Path, state: Mapping[str, Any], *, metadata: Mapping[str, str] | None = None, replace: bool = False
) -> WrittenFile:
    """Write a state dict as one file, and bring it onto the disk.

    Args:
        path: Where to. Its suffix says the format: ``.safetensors``, or ``.th``, ``.pt``, ``.pth``, ``.ckpt``, ``.bin``
            for a plain state dict as ``torch.save`` writes it.
        state: Name -> tensor. Other entries (extra state) can be in a file of torch only. Tensors that share memory
            are stored once by torch, and each by itself in safetensors.
        metadata: Texts for the header of a safetensors file.
        replace: Whether a file that is there is replaced, in one step.

    Raises ``CheckpointWriteError`` where it cannot be written; then nothing is there that was not there before.
    """
    check_place(path, replace=replace)
    kind = FORMATS[path.suffix.lower()]
    temporary = path.with_name(f".{secrets.token_hex(6)}.partial{path.suffix}")
    try:
        # what another program would give a new file here; writers give files of theirs other rights
        with temporary.open("xb") as probe:
            mode = stat.S_IMODE(os.fstat(probe.fileno()).st_mode)
        temporary.unlink()
        if kind == "safetensors":
            _write_safetensors(temporary, state, dict(metadata or {}))
        else:
            write_content(temporary, dict(state), LOCAL)
        temporary.chmod(mode)
        with contextlib.closing(open_file(temporary)) as handle:
            digest, size = handle.digest("xxh3_128"), handle.size
        with open_checkpoint(temporary) as reader:
            tensors = len(reader.tensors())
        _put(temporary, path, replace=replace)
        LOCAL.fsync_folder(path.parent)
    except CheckpointWriteError:
        raise
    except FileExistsError as error:
        raise CheckpointWriteError(f"{path} came to be meanwhile, and was left as it is", path=path) from error
    except Exception as error:  # safetensors raises classes of its own
        raise CheckpointWriteError(f"{path} was not written: {error}", path=path) from error
    finally:
        temporary.unlink(missing_ok=True)
    return WrittenFile(path, kind, size, digest, tensors)


def _write_safetensors(path: Path, state: Mapping[str, Any], metadata: dict[str, str]) -> None:
    import torch
    from safetensors.torch import save_file

    others = [name for name, value in state.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise CheckpointError(
            f"{', '.join(others[:5])} {'are no tensors' if others[1:] else 'is no tensor'}, and a safetensors file has "
            f"nothing else. Next: a name that ends in .th",
            path=path,
        )
    # tied tensors share memory, which the format does not know; each gets its own bytes
    # what is conjugated or negated only in name has other bytes in memory than values
    apart = {name: value.detach().resolve_conj().resolve_neg().contiguous() for name, value in state.items()}
    seen: set[int] = set()
    for name, value in apart.items():
        place = value.untyped_storage().data_ptr()
        if place in seen:
            apart[name] = value.clone()
        seen.add(place)
    save_file(apart, path, metadata=metadata)
    with path.open("rb+") as file:
        LOCAL.fsync(file)


def _put(temporary: Path, path: Path, *, replace: bool) -> None:
    """Give the file its name: in one step, and never over another one that came meanwhile, unless that is wanted."""
    if replace:
        os.replace(temporary, path)
        return
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        check_place(path)  # a file system without links
        os.rename(temporary, path)
