"""Images in: finding and reading files, preprocessing as the model was trained, labelled data, names of classes."""

from __future__ import annotations

from ramp_fast.data.boxes import boxes_to_masks
from ramp_fast.data.classes import ClassNames
from ramp_fast.data.datasets import LAYOUTS, VOC_CLASSES, Batch, Dataset, Example, batches, open_data
from ramp_fast.data.files import ImageItem, Problem, find_images
from ramp_fast.data.images import ImageError, OwnPictureError, read_image
from ramp_fast.data.preprocessing import Preprocessing

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
    "batches",
    "boxes_to_masks",
    "find_images",
    "open_data",
    "read_image",
]
