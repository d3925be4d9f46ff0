"""Memory of the C library's heap that stays with the process from one run to the next.

Attributions and metrics take and free hundreds of blocks of some megabytes. Where their memory goes back to the system
in between, the next ones get it page by page, each cleared first: a tenth of the time of a ResNet.
"""

from __future__ import annotations

import functools
import threading

import torch


@functools.cache
def keep_freed_memory() -> None:
    """Lets freed blocks of up to 32 MiB stay in the heap.

    glibc maps blocks for themselves, and unmaps them when they are freed, if they are larger than any such block that
    was freed before, or 128 KiB. So a block of the largest size that counts, just under 32 MiB, is mapped and freed
    without having been written. Settings of the user's (``MALLOC_*``, ``mallopt``) stay in force, and then this has no
    effect; nor has it with other allocators.
    """
    _large_block()


class HeapPin(threading.local):
    """A block that keeps glibc from giving the end of the heap back after a run; each thread has a heap of its own.

    What is freed at the end goes back to the system as soon as it is 64 MiB. So a block that is never written, and
    costs addresses only, is taken where the heap ends when it is longest, and kept as long as the plan: what is freed
    below it stays for the next run.
    """

    def __init__(self) -> None:
        self._runs: dict[int, int] = {}
        self._block: torch.UntypedStorage | None = None

    def may_grow(self, device: torch.device, maps: int) -> bool:
        """Called once in every run, of so many samples times right-hand sides: whether it may need a longer heap."""
        if device.type != "cpu":
            return False
        self._runs[maps] = runs = self._runs.get(maps, 0) + 1
        return runs <= _RUNS and maps == max(self._runs)

    def pin(self) -> None:
        """Called in every step of a run that :meth:`may_grow`: pin the heap where it ends now, if that is later."""
        block = _large_block()
        if self._block is None or block.data_ptr() > self._block.data_ptr():
            self._block = block


# Runs until the heap is as long as it gets: what lies where in it changes a little from one to the next.
_RUNS = 3


def _large_block() -> torch.UntypedStorage:
    """Of the largest size that comes from the heap, unwritten: it fits into no gap below the heap's end."""
    return torch.UntypedStorage(2**25 - 2**16, device="cpu")
