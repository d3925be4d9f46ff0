"""What the runtime does besides running plans."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ramp_fast.runtime.heap import HeapPin

# Is a block of 20 MB mapped for itself? (Then freeing it unmaps it.)
MAPPED = """
import ctypes, torch
from ramp_fast.runtime.heap import keep_freed_memory

class Statistics(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd u s f d k".split()]

mallinfo = ctypes.CDLL(None).mallinfo2
mallinfo.restype = Statistics
if {keep}:
    with torch.device("meta"):  # the default one for new tensors, which the user may have set
        keep_freed_memory()
before = mallinfo().hblkhd
block = torch.empty(20 * 2**20, dtype=torch.uint8)
print(mallinfo().hblkhd - before)
"""


glibc = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or tuple(map(int, platform.libc_ver()[1].split("."))) < (2, 33),
    reason="glibc's statistics (2.33)",
)


def run_alone(script: str, folder: Path) -> str:
    """What a Python process of its own prints, without the user's settings of the allocator."""
    own = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(own)}
    return subprocess.check_output([sys.executable, "-c", script], env=environment, cwd=folder, text=True)


@glibc
@pytest.mark.parametrize("keep", [True, False])
def test_large_blocks_come_from_the_heap(keep: bool, tmp_path: Path) -> None:
    assert (int(run_alone(MAPPED.format(keep=keep), tmp_path)) == 0) == keep


# Does the held block lie above all others, and the heap stay as long as it is when they are freed?
HELD = """
import ctypes, torch
from ramp_fast.runtime.heap import HeapPin, keep_freed_memory

class Statistics(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd u s f d k".split()]

mallinfo = ctypes.CDLL(None).mallinfo2
mallinfo.restype = Statistics
keep_freed_memory()
heap, blocks = HeapPin(), []
for _ in range(10):
    blocks.append(torch.empty(20 * 2**20, dtype=torch.uint8))
    heap.pin()
print(heap._block.data_ptr() > max(block.data_ptr() for block in blocks))
before = mallinfo().arena
del blocks
print(mallinfo().arena == before)
"""


@glibc
def test_the_end_of_the_heap_is_held(tmp_path: Path) -> None:
    assert run_alone(HELD, tmp_path).split() == ["True", "True"]


def test_the_heap_grows_with_the_first_runs_of_the_most_maps() -> None:
    heap = HeapPin()
    assert [heap.may_grow(torch.device("cpu"), n) for n in (1, 1, 1, 1, 4, 1, 4, 4, 4)] == [
        *[True] * 3, False, True, False, True, True, False
    ]  # fmt: skip
    assert not HeapPin().may_grow(torch.device("meta"), 1)
