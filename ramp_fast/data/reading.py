"""Reading ahead in threads, in order, with bounded memory."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

__all__ = ["read_ahead", "usual_workers"]

T = TypeVar("T")
R = TypeVar("R")


def usual_workers() -> int:
    """Threads that read where nobody says how many: up to 4."""
    return min(4, os.cpu_count() or 1)


def read_ahead(items: Iterable[T], read: Callable[[T], R], workers: int, window: int) -> Iterator[R]:
    """``read`` of every item, in order, some of them ahead of time.

    Parameters
    ----------
    items : iterable
        Taken one by one, no sooner than there is room for its result.
    read : callable
        Runs in a thread; what it raises is raised here, in the item's turn.
    workers : int
        Threads; 0 reads in the caller's, when asked.
    window : int
        Results that are held or under way at a time, at least 1.
    """
    if workers == 0:
        yield from map(read, items)
        return
    source = iter(items)
    pool = ThreadPoolExecutor(workers, thread_name_prefix="ramp-fast-read")
    waiting: deque[Future[R]] = deque()
    try:
        while True:
            for item in islice(source, window - len(waiting)):
                waiting.append(pool.submit(read, item))
            if not waiting:
                return
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
