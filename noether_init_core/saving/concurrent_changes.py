"""A second pair of eyes on a save: digests of all tensors in memory, and whether they stay as they were.

Files of a set are written one after the other. Were the weights taken from one iteration and the moments from the next,
every file would be sound and the set would be torn.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

import attrs
import torch
from isal import isal_zlib

from noether_init_core.files.content import named, state_dict_of
from noether_init_core.files.examining import Examined, examine_memory
from noether_init_core.files.plain_data import bytes_of_tensor, memory_of_tensor
from noether_init_core.saving.content import FileContent

__all__ = ["Seen", "Watch"]


@attrs.frozen
class Seen:
    """A tensor when it was looked at. The CRC-32 is that of its bytes as they lie in memory and in a file."""

    dtype: str
    shape: tuple[int, ...]
    examined: Examined


class Watch:
    """Looks at every tensor of a save in a thread of its own: once, and again when all were looked at.

    What is the same in both looks had these values at the moment between them. So if the files hold what the first look
    saw, all of them together are the state of that one moment. A context manager; it ends with the block.
    """

    def __init__(self, contents: Sequence[FileContent]) -> None:
        self._contents = tuple(contents)
        self._stopped = False
        # tied tensors are one object, and are looked at once
        self._seen: dict[int, Seen] = {}
        self._pool = ThreadPoolExecutor(1)
        self._first: list[Future[None]] = []
        self._second: Future[list[str]] | None = None

    def __enter__(self) -> Self:
        self._first = [self._pool.submit(self._look, content) for content in self._contents]
        self._second = self._pool.submit(self._look_again)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stopped = True
        self._pool.shutdown(cancel_futures=True)

    def listed(self, content: FileContent) -> dict[str, Seen]:
        """The tensors of one file that a manifest lists, by the names that the reader gives them."""
        self._first[self._contents.index(content)].result()
        state_dict = state_dict_of(content.content, torch.Tensor)
        if state_dict is None:
            return self.all(content)
        return {key: self._seen[id(value)] for key, value in state_dict.items() if isinstance(value, torch.Tensor)}

    def all(self, content: FileContent) -> dict[str, Seen]:
        """All tensors of one file, by their paths in the whole object."""
        self._first[self._contents.index(content)].result()
        return {path: self._seen[id(tensor)] for path, tensor in _tensors(content).items()}

    def changed(self) -> list[str]:
        """Those tensors that were not the same in both looks: file and path. To be asked when all is written."""
        assert self._second is not None
        return self._second.result()

    def _look(self, content: FileContent) -> None:
        for tensor in _tensors(content).values():
            if self._stopped:
                return
            if id(tensor) in self._seen:
                continue
            dtype = str(tensor.dtype).removeprefix("torch.")
            # before the look: what changes between both is found by the second one
            crc = None if tensor.is_contiguous() else _checksum(tensor)
            examined = examine_memory(bytes_of_tensor(tensor), dtype)
            if crc is not None:
                examined = attrs.evolve(examined, crc=crc)
            self._seen[id(tensor)] = Seen(dtype, tuple(tensor.shape), examined)

    def _look_again(self) -> list[str]:
        changed: dict[int, str] = {}
        compared: set[int] = set()
        for content in self._contents:
            for path, tensor in _tensors(content).items():
                if self._stopped:
                    return []
                if id(tensor) in self._seen and id(tensor) not in compared:
                    compared.add(id(tensor))
                    if _checksum(tensor) != self._seen[id(tensor)].examined.crc:
                        changed[id(tensor)] = f"{path.removeprefix('state_dict.')} of {content.name}"
        return list(changed.values())


def _checksum(tensor: torch.Tensor) -> int:
    return int(isal_zlib.crc32(memory_of_tensor(tensor)))


def _tensors(content: FileContent) -> dict[str, torch.Tensor]:
    return named(content.content, torch.Tensor)
