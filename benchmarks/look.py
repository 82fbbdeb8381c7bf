"""How long a look into a file of 1.2 GB takes, and a comparison of two: ``python benchmarks/look.py``.

The command is started as a user starts it, and compared in the same run with ``python -c pass`` (the interpreter alone)
and with ``python -c "import torch"``. Bytes are those of the file that the system was asked for (Linux). The
safetensors library, which checks every header after us, maps the file and touches nothing but that header.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

LAYERS, WIDTH = 24, 1024
PROGRAM = Path(sys.executable).with_name("ninit")
#: Looks into a file and prints how many bytes of that file were asked for by name of its descriptor.
COUNTING = """
import os, sys
path, asked = os.path.realpath(sys.argv[1]), 0
def counted(name):
    whole = getattr(os, name)
    def call(descriptor, *arguments):
        global asked
        found = whole(descriptor, *arguments)
        if os.readlink(f'/proc/self/fd/{descriptor}') == path:
            asked += found if isinstance(found, int) else len(found)
        return found
    setattr(os, name, call)
for name in ('read', 'pread', 'preadv', 'readv'):
    counted(name)
from noether_init_core import cli
sys.argv = ['ninit', 'inspect', path]
try:
    cli.main()
finally:
    print(asked, file=sys.stderr)
"""


def write_files(folder: Path) -> list[Path]:
    """The same 302M parameters as ``torch.save`` and as safetensors write them: 288 tensors."""
    import torch
    from safetensors.torch import save_file

    shapes = dict.fromkeys(("q", "k", "v", "out"), (WIDTH, WIDTH))
    shapes |= {"up": (4 * WIDTH, WIDTH), "down": (WIDTH, 4 * WIDTH)}
    state = {}
    for layer in range(LAYERS):
        for name, shape in shapes.items():
            state[f"blocks.{layer}.{name}.weight"] = torch.randn(shape)
            state[f"blocks.{layer}.{name}.bias"] = torch.randn(shape[0])
    torch.save(state, folder / "model.th")
    save_file(state, folder / "model.safetensors")
    return [folder / "model.th", folder / "model.safetensors"]


def seconds(words: list[str], rounds: int) -> float:
    """Median of the time from start to end."""
    found = []
    for _ in range(rounds):
        began = time.perf_counter()
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
        found.append(time.perf_counter() - began)
    return statistics.median(found)


def main(rounds: int) -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as folder:
        start = seconds([sys.executable, "-c", "pass"], rounds)
        torch = seconds([sys.executable, "-c", "import torch"], 3)
        print(f"interpreter alone {start:.3f} s; import torch {torch:.2f} s")
        print("| file | bytes | seconds beyond the interpreter | bytes read |\n|---|---|---|---|")
        for path in write_files(Path(folder)):
            taken = seconds([str(PROGRAM), "inspect", str(path)], rounds)
            counted = subprocess.run(
                [sys.executable, "-c", COUNTING, str(path)], check=True, capture_output=True, text=True
            )
            print(f"| {path.suffix} | {os.path.getsize(path):,} | {taken - start:.3f} | {int(counted.stderr):,} |")
        compared(Path(folder), rounds)


def compared(folder: Path, rounds: int) -> None:
    """Print how long a comparison takes, as a ratio to copying both sides in memory in the same run."""
    import torch

    from noether_init_core import compare_checkpoints, open_checkpoint

    first = folder / "model.th"
    with open_checkpoint(first) as reader:
        state = {key: reader.read(key) for key in reader.tensors()}
    copies = {key: torch.empty_like(value) for key, value in state.items()}

    def copy() -> None:
        for key, value in state.items():
            copies[key].copy_(value)

    copy()
    copying = 2 * statistics.median(timed(copy) for _ in range(rounds))
    moved = folder / "moved.th"
    torch.save({key: value + 0.01 for key, value in state.items()}, moved)
    print(f"copying both sides in memory {copying:.3f} s")
    for what, second in (("other values", moved), ("the same bytes", first)):
        call = functools.partial(compare_checkpoints, first, second)
        taken = statistics.median(timed(call) for _ in range(rounds))
        print(f"| compared, {what} | {taken:.2f} s | {taken / copying:.1f} copies |")


def timed(call: Callable[[], object]) -> float:
    """Seconds of one call."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    main(parser.parse_args().rounds)
