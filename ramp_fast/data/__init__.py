"""Images in: finding and reading files, preprocessing as the model was trained, labelled data, names of classes."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ramp_fast.data.boxes import boxes_to_masks
    from ramp_fast.data.classes import ClassNames
    from ramp_fast.data.datasets import Batch, Dataset, Example, batches, open_data
    from ramp_fast.data.files import ImageItem, Problem, find_images
    from ramp_fast.data.images import ImageError, OwnPictureError, read_image
    from ramp_fast.data.preprocessing import Preprocessing
    from ramp_fast.data.records import Record, Source
    from ramp_fast.data.sources import LAYOUTS, open_source
    from ramp_fast.data.voc import VOC_CLASSES

# Imported when they are asked for: processes that decode images should not wait for torch, nor hold it.
_WHERE = {
    "boxes": ("boxes_to_masks",),
    "classes": ("ClassNames",),
    "datasets": ("Batch", "Dataset", "Example", "batches", "open_data"),
    "files": ("ImageItem", "Problem", "find_images"),
    "images": ("ImageError", "OwnPictureError", "read_image"),
    "preprocessing": ("Preprocessing",),
    "records": ("Record", "Source"),
    "sources": ("LAYOUTS", "open_source"),
    "voc": ("VOC_CLASSES",),
}
_LAZY = {name: module for module, names in _WHERE.items() for name in names}

__all__ = [
    "LAYOUTS",
    "VOC_CLASSES",
    "Batch",
    "ClassNames",
    "Dataset",
    "Example",
    "ImageError",
    "ImageItem",
    "OwnPictureError",
    "Preprocessing",
    "Problem",
    "Record",
    "Source",
    "batches",
    "boxes_to_masks",
    "find_images",
    "open_data",
    "open_source",
    "read_image",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    globals()[name] = value
    return value
