"""From an encoded image to the 8-bit pixels that a model sees: decoding, resizing and cropping, without torch.

Pixels are those of :class:`ramp_fast.data.Preprocessing` to 1/255, in less time: the resizing computes what the crop
keeps, and JPEGs are decoded by simplejpeg where that is installed (the same libjpeg-turbo, without Pillow's
copies).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image

from ramp_fast.data.images import read_picture
from ramp_fast.errors import InputError

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

__all__ = ["Framing"]

_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
    "lanczos": Image.Resampling.LANCZOS,
}

_REACH = {"bilinear": 1.0, "bicubic": 2.0, "box": 0.5, "hamming": 1.0, "lanczos": 3.0}
"""Half the width of a filter, in pixels of the larger grid; "nearest" has none."""

_KNOWN = frozenset({"input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode", "color_mode"})

_SWAPS_SIDES = range(5, 9)
"""EXIF orientations that exchange width and height."""


@dataclass(frozen=True)
class Framing:
    """How an image is resized and cropped: timm's evaluation transform up to its last 8-bit values.

    Attributes
    ----------
    size : (int, int)
        Height and width of the result.
    scaled : (int, int)
        Height and width that the crop is taken from, before the image's own shape counts.
    mode : {"center", "squash", "border"}
        timm's ``crop_mode``.
    interpolation : str
        Pillow's name of the filter.
    fill : (int, int, int)
        Colour of borders.
    fast : bool
        Whether JPEGs may be decoded at 1/2, 1/4 or 1/8 of their size, where that is at least the size wanted.
    """

    size: tuple[int, int]
    scaled: tuple[int, int]
    mode: str
    interpolation: str
    fill: tuple[int, int, int]
    fast: bool = False

    @classmethod
    def of(cls, config: Mapping[str, Any], fast: bool = False) -> Framing:
        """The framing of a data config of timm's.

        Raises
        ------
        InputError
            It has entries of which this class knows nothing.
        """
        unknown = sorted(key for key, value in config.items() if key not in _KNOWN and value)
        interpolation = str(config.get("interpolation") or "bilinear")
        if unknown or interpolation not in _FILTERS:
            what = ", ".join(unknown) if unknown else f"interpolation {interpolation!r}"
            raise InputError(f"preprocessing with {what} is not known here")
        _, height, width = config["input_size"]
        share = config.get("crop_pct") or 0.875  # timm's default
        scaled = math.floor(height / share), math.floor(width / share)
        mode = str(config.get("crop_mode") or "center")
        red, green, blue = (round(255 * v) for v in config["mean"])
        fill = (red, green, blue) if mode == "border" else (0, 0, 0)
        return cls(
            (height, width), scaled, mode if mode in ("squash", "border") else "center", interpolation, fill, fast
        )

    def __call__(self, file: BinaryIO) -> npt.NDArray[np.uint8]:
        """The pixels of an encoded image.

        Parameters
        ----------
        file : binary file
            At its first byte.

        Returns
        -------
        numpy.ndarray [H, W, 3]
            uint8.

        Raises
        ------
        ImageError
            As :func:`ramp_fast.data.read_image`.
        """
        whole: list[tuple[int, int]] = []

        def decode(image: Image.Image, source: BinaryIO) -> Image.Image | None:
            if image.format != "JPEG":
                return None
            if not self.fast:
                return _by_simplejpeg(image, source)
            turned = _is_turned(image)
            whole.append((image.height, image.width) if turned else image.size)
            width, height = self._resized(*whole[0])
            image.draft("RGB", (height, width) if turned else (width, height))
            return None

        picture = read_picture(file, decode)
        return self.of_picture(picture, whole[0] if whole else None)

    def of_picture(self, picture: Image.Image, whole: tuple[int, int] | None = None) -> npt.NDArray[np.uint8]:
        """The same of a picture that is decoded, perhaps at less than its ``whole`` size (width, height)."""
        size = picture.size if whole is None else whole
        width, height = self._resized(*size)
        crop_height, crop_width = self.size
        # As torchvision and timm round, which pad first what is smaller than the crop.
        left, top = _offset(width, crop_width), _offset(height, crop_height)
        inside = max(left, 0), max(top, 0), min(left + crop_width, width), min(top + crop_height, height)
        part = self._part(picture, (width, height), inside)
        if part.shape[:2] == self.size:
            return part
        result = np.empty((*self.size, 3), np.uint8)
        result[:] = self.fill
        result[inside[1] - top : inside[3] - top, inside[0] - left : inside[2] - left] = part
        return result

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        """Width and height of the image before the crop."""
        tall, wide = self.scaled
        if self.mode == "squash":
            return wide, tall
        if self.mode == "border":
            ratio = max(height / tall, width / wide)
        elif tall != wide:
            ratio = min(height / tall, width / wide)
        elif width <= height:  # torchvision's rounding
            return wide, int(wide * height / width)
        else:
            return int(tall * width / height), tall
        return round(width / ratio), round(height / ratio)

    def _part(
        self, picture: Image.Image, size: tuple[int, int], box: tuple[int, int, int, int]
    ) -> npt.NDArray[np.uint8]:
        """Some pixels of the picture at that size: those in a box (left, top, right, bottom)."""
        left, top, right, bottom = box
        filter_ = _FILTERS[self.interpolation]
        reach = _REACH.get(self.interpolation)
        if reach is None or size == picture.size or _may_go_down_first(picture.size, size):
            return np.asarray(picture.resize(size, filter_).crop(box))
        # What the crop keeps: across, then down, as Pillow does it with the whole. (Asked for both at once it would
        # choose the order by the size of the crop, and values between the steps are rounded, so the order shows.) Rows
        # above and below that no kept pixel depends on are cut off first, columns at the sides in between. Pillow has
        # the edges of a box in 32 bits only: so there is one in the last step alone, where it moves no value by more
        # than a step.
        down = picture.height / size[1]
        margin = math.ceil(reach * max(down, 1.0)) + 1
        first, last = max(0, math.floor(top * down) - margin), min(picture.height, math.ceil(bottom * down) + margin)
        rows = picture.crop((0, first, picture.width, last)) if last - first < picture.height else picture
        rows = rows.resize((size[0], rows.height), filter_)
        if right - left < size[0]:
            rows = rows.crop((left, 0, right, rows.height))
        tall = 0, top * down - first, rows.width, min(bottom * down - first, rows.height)
        return np.asarray(rows.resize((rows.width, bottom - top), filter_, box=tall))


def _may_go_down_first(size: tuple[int, int], wanted: tuple[int, int]) -> bool:
    """Whether Pillow may resize columns before rows: from version 13 on where that leaves it much less to do."""
    lost_width, lost_height = size[0] - wanted[0], size[1] - wanted[1]
    return lost_height > 0 and lost_height > 2 * lost_width


def _offset(length: int, crop: int) -> int:
    """Where the crop begins; negative where there is a border."""
    if length < crop:
        return -((crop - length) // 2)
    return round((length - crop) / 2.0)


def _is_turned(image: Image.Image) -> bool:
    """Whether its metadata exchange width and height."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1) in _SWAPS_SIDES
    except Exception:  # metadata that cannot be read say nothing, as in read_picture
        return False


def _by_simplejpeg(image: Image.Image, source: BinaryIO) -> Image.Image | None:
    """Pixels of a plain JPEG; None for others, and where it is damaged: Pillow then says how."""
    if simplejpeg is None or image.mode not in ("RGB", "L"):
        return None
    source.seek(0)
    data = source.read()
    try:
        pixels = simplejpeg.decode_jpeg(data, colorspace="RGB", strict=True)
    except ValueError:
        return None
    return Image.fromarray(pixels)
