"""What the runtime does besides running plans."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

# Page faults of writing 20 MB that were freed before. (A first block of that size would be mapped, and unmapped.)
AGAIN = """
import resource, torch
from ramp_fast.runtime import keep_freed_memory
if {kept}:
    keep_freed_memory()
torch.ones(5 * 2**20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(5 * 2**20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="thresholds of glibc's")
def test_freed_memory_is_used_again() -> None:
    own = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(own)}
    kept, given_back = (
        int(subprocess.check_output([sys.executable, "-c", AGAIN.format(kept=kept)], env=environment, text=True))
        for kept in (True, False)
    )
    assert kept < given_back / 4  # about 5120 pages given back; with transparent huge pages ten
