"""Results on the disk: maps and pictures, written whole or not at all, and told from other files."""

from __future__ import annotations

from ramp_fast.results.maps import StoredMap, StoredMaps, open_maps
from ramp_fast.results.store import DamagedResultError, Result, Store, StoreError, read_result

__all__ = [
    "DamagedResultError",
    "Result",
    "Store",
    "StoreError",
    "StoredMap",
    "StoredMaps",
    "open_maps",
    "read_result",
]
