"""Which of several ways to compute the same thing is the fastest: measured once, and kept beside compiled kernels."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable
from pathlib import Path

import torch
import triton
from triton.runtime.cache import get_cache_manager

FILE = "fastest.json"

_LOCK = threading.Lock()
_CHOSEN: dict[str, str] = {}


def milliseconds(call: Callable[[], object]) -> float:
    """Median time of ``call`` on the current device."""
    return float(triton.testing.do_bench(call, return_mode="median"))


def fastest(key: tuple[object, ...], ways: dict[str, Callable[[], object]]) -> str:
    """The name of the fastest of ``ways``.

    Measured at the first question, and from then on read from Triton's cache on disk, so that processes agree and their
    results do not depend on the noise of a measurement.

    Parameters
    ----------
    key : tuple
        All that the choice may depend on, the device's name too. The number of rows must not be part of it, nor of what
        the ways compute: an image's result would depend on its batch.
    ways : dict of str to callable
        The first is the one to take where memory is too short to measure.
    """
    everything = repr((torch.__version__, triton.__version__, sorted(ways), key))
    name = hashlib.sha256(everything.encode()).hexdigest()
    with _LOCK:
        if name not in _CHOSEN:
            cache = get_cache_manager(name)
            chosen = _read(cache.get_file(FILE), ways)
            if chosen is None:
                try:
                    times = {way: milliseconds(call) for way, call in ways.items()}
                except torch.OutOfMemoryError:
                    return next(iter(ways))  # this time
                chosen = min(times, key=lambda way: times[way])
                cache.put(json.dumps({"key": everything, "milliseconds": times, "fastest": chosen}), FILE, binary=False)
            _CHOSEN[name] = chosen
        return _CHOSEN[name]


def _read(file: str | None, ways: dict[str, Callable[[], object]]) -> str | None:
    try:
        chosen = None if file is None else json.loads(Path(file).read_text())["fastest"]
    except (OSError, ValueError, KeyError, TypeError):  # damaged: measured again
        return None
    return chosen if chosen in ways else None
