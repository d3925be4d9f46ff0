"""What the runtime does besides running plans."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

# Is a block of 20 MB mapped for itself? (Then freeing it unmaps it.)
MAPPED = """
import ctypes, torch
from ramp_fast.heap import keep_freed_memory

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


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or tuple(map(int, platform.libc_ver()[1].split("."))) < (2, 33),
    reason="glibc's statistics (2.33)",
)
@pytest.mark.parametrize("keep", [True, False])
def test_large_blocks_come_from_the_heap(keep: bool, tmp_path: Path) -> None:
    own = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(own)}
    command = [sys.executable, "-c", MAPPED.format(keep=keep)]
    mapped = subprocess.check_output(command, env=environment, cwd=tmp_path, text=True)
    assert (int(mapped) == 0) == keep
