"""Stored maps as a PyTorch data set."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

__all__ = ["MapDataset"]


class _Maps(Protocol):
    def __getitem__(self, image: int) -> Any: ...


class MapDataset(Dataset[dict[str, Any]]):
    """Maps of some images of a store, for a ``DataLoader``; see :meth:`ramp_fast.results.maps.StoredMaps.dataset`."""

    def __init__(self, maps: _Maps, chosen: npt.NDArray[np.integer[Any]]) -> None:
        self.maps, self.chosen = maps, chosen

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> dict[str, Any]:
        place = int(self.chosen[index])
        found = self.maps[place]
        return {
            "map": torch.from_numpy(found.map),
            "target": torch.from_numpy(found.target).to(torch.int64),
            "logits": torch.from_numpy(found.logits),
            "label": -1 if found.label is None else found.label,
            "index": place,
            "name": found.name,
        }
