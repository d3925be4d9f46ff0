"""Images in: finding and reading files, preprocessing as the model was trained, names of classes."""

from __future__ import annotations

from ramp_fast.data.classes import ClassNames
from ramp_fast.data.files import ImageItem, Problem, find_images
from ramp_fast.data.images import ImageError, OwnPictureError, read_image
from ramp_fast.data.preprocessing import Preprocessing

__all__ = [
    "ClassNames",
    "ImageError",
    "ImageItem",
    "OwnPictureError",
    "Preprocessing",
    "Problem",
    "find_images",
    "read_image",
]
