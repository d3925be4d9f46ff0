"""Reading one image file as 8-bit RGB, whatever it holds, or saying in one line why not."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from ramp_fast.errors import RampFastError

__all__ = ["MAX_ASPECT", "ImageError", "OwnPictureError", "read_image"]

SOFTWARE = "ramp_fast"
"""The ``Software`` entry of every PNG this package writes, by which it is told from a photograph."""

MAX_ASPECT = 50
"""Longest side over shortest: beyond it, scaling the short side to the model's input explodes the long one."""


class ImageError(RampFastError):
    """A file cannot be read as an image; the message says why, without the file's name."""


class OwnPictureError(ImageError):
    """The file is an overlay or a contact sheet that this package wrote."""


def read_image(path: str | Path) -> Image.Image:
    """Read an image file as upright 8-bit RGB.

    The EXIF orientation is applied. Grey, palette, CMYK and 16-bit images are converted, transparent
    pixels are laid over white, of several frames the first is taken. Colour profiles are ignored, as
    in the pipelines the models were trained with.

    Parameters
    ----------
    path : str or pathlib.Path
        The file.

    Returns
    -------
    PIL.Image.Image
        Mode RGB, decoded.

    Raises
    ------
    OwnPictureError
        The file is a picture that this package wrote (its PNG says so).
    ImageError
        The file is missing, unreadable, broken, truncated, not an image, too large
        (twice ``PIL.Image.MAX_IMAGE_PIXELS``, Pillow's limit) or longer than ``MAX_ASPECT`` times its width.
    """
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise ImageError("the file is empty")
            with Image.open(file) as image:
                if image.info.get("Software") == SOFTWARE:
                    raise OwnPictureError("a picture made by ramp-fast, not a photograph")
                _check_shape(image.size)
                image.load()
                return _to_rgb(_upright(image))
    except ImageError:
        raise
    except FileNotFoundError as error:
        raise ImageError("no such file") from error
    except UnidentifiedImageError as error:
        raise ImageError("not an image, or in a format that Pillow cannot read here") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"too large: {_first_line(error)}; scale it down first") from error
    except OSError as error:
        # An errno means the file system, its absence the decoder.
        raise ImageError(error.strerror or f"broken image: {_first_line(error)}") from error
    except MemoryError as error:
        raise ImageError("not enough memory to decode it; scale it down first") from error
    except Exception as error:  # damaged files make decoders raise SyntaxError, ValueError, struct.error and others
        raise ImageError(f"broken image: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__


def _check_shape(size: tuple[int, int]) -> None:
    width, height = size
    if min(size) < 1:
        raise ImageError(f"it has no pixels ({width} x {height})")
    if max(size) > MAX_ASPECT * min(size):
        raise ImageError(f"too elongated ({width} x {height}, more than {MAX_ASPECT} to 1); crop it first")


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # the pixels are sound, only the metadata is not: an unreadable orientation is none
        return image.copy()


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        return Image.fromarray(_deep_to_8_bit(image)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        picture = image.convert("RGBA")
        ground = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        return Image.alpha_composite(ground, picture).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _deep_to_8_bit(image: Image.Image) -> npt.NDArray[np.uint8]:
    # Pillow's own conversion clips at 255, which turns a 16-bit photograph white.
    values: npt.NDArray[Any] = np.asarray(image).astype(np.float64)
    low, high = float(values.min()), float(values.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ImageError("it has pixels that are not finite")
    if image.mode == "F":
        if low < 0 or high > 255:
            raise ImageError(f"floating-point pixels in [{low:g}, {high:g}]; [0, 1] and [0, 255] are supported")
        scale = 255.0 if high <= 1 else 1.0
    else:
        if low < 0 or high > 65535:
            raise ImageError(f"integer pixels in [{low:g}, {high:g}]; 16-bit values are supported")
        scale = 255.0 / 65535.0
    return np.rint(values * scale).astype(np.uint8)
