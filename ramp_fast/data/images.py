"""Reading one image file as 8-bit RGB, whatever it holds, or saying in one line why not."""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from ramp_fast._files import open_regular, reason
from ramp_fast.errors import RampFastError
from ramp_fast.results.marks import JPEG_COMMENT, SOFTWARE

__all__ = ["FORMATS", "MAX_ASPECT", "MAX_DECODED_BYTES", "ImageError", "OwnPictureError", "read_image"]

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "JPEG2000", "AVIF", "PPM")
"""What is opened, by Pillow's names and told by content. Not PostScript: Pillow hands it to another program."""

MAX_ASPECT = 50
"""Longest side over shortest: beyond it, scaling the short side to the model's input explodes the long one."""

MAX_DECODED_BYTES = 368_000_000
"""What decoding an image may take: 46 million pixels in the simple formats."""

MAX_METADATA_BYTES = 16 * 2**20
"""Profiles, comments and the like in front of the pixels; Pillow holds several copies."""

# Bytes per pixel that decoding and converting take at their peak, measured. Pillow stores RGB in four bytes, and
# rotating or converting needs a second picture.
_PEAK_BYTES = {"WEBP": 17, "AVIF": 18, "JPEG2000": 28}
_PEAK_BYTES_PROGRESSIVE = 12  # the coefficients of the whole image
_PEAK_BYTES_OTHERS = 8
_PEAK_BYTES_STRIP = 8  # of a TIFF's strip, which may be the whole image

# Pillow joins a GIF's comments block by block, in quadratic time, and reads those in front of a PPM byte by byte.
_MAX_SLOW_METADATA_BYTES = 2**20
_SLOW_METADATA = (b"GIF8", *(b"P%d" % n for n in range(1, 7)))

# Pillow copies the block that it reads, a megabyte, for every comment in it.
_MAX_PPM_COMMENTS = 10_000
_PPM_TEXT = (b"P1", b"P2", b"P3")

# Decoders of these hold the whole file.
_MAX_HELD_FILE_BYTES = 96 * 2**20
_HELD_WHOLE = (b"RIFF", b"ftyp")

# TIFF's tags
_COMPRESSION, _STRIP_ROWS, _TILE_ROWS = 259, 278, 323

# What is likely to be met, by its first 16 bytes.
_NOT_OPENED = {
    b"%!PS": "PostScript",
    b"\xc5\xd0\xd3\xc6": "PostScript",
    b"%PDF": "a PDF",
    b"8BPS": "a Photoshop file",
    b"ftyphei": "a HEIC image",
    b"ftypmif1": "a HEIF image",
}

_STRIP_PIXELS = 2**20

# What EXIF's orientations say, as ImageOps.exif_transpose does it.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Pillow decodes these in Python, a value at a time: PPM and PGM as text, or of another depth than 8 bits.
_SLOW_DECODERS = ("ppm", "ppm_plain")
_MAX_SLOW_PIXELS = 1_000_000


class ImageError(RampFastError):
    """A file cannot be read as an image; the message says why, without the file's name."""


class OwnPictureError(ImageError):
    """The file is an overlay, a contact sheet or a sheet of a report that this package wrote."""


def read_image(path: str | Path) -> Image.Image:
    """Read an image file as upright 8-bit RGB.

    The EXIF orientation is applied. Grey, palette, CMYK and 16-bit images are converted, transparent
    pixels are laid over white, of several frames the first is taken. Colour profiles are ignored, as
    in the pipelines the models were trained with.

    Parameters
    ----------
    path : str or pathlib.Path
        JPEG, PNG, WebP, BMP, GIF, TIFF, JPEG 2000, AVIF or PPM, whatever its name says.

    Returns
    -------
    PIL.Image.Image
        Mode RGB, decoded.

    Raises
    ------
    OwnPictureError
        The file is a picture that this package wrote (it says so).
    ImageError
        The file is missing, unreadable, broken, truncated, not an image, too large to be decoded within
        ``MAX_DECODED_BYTES`` or Pillow's own limit, or longer than ``MAX_ASPECT`` times its width.
    """
    try:
        file = open_regular(path)
    except OSError as error:
        raise ImageError("no such file" if isinstance(error, FileNotFoundError) else reason(error)) from error
    with file:
        return read_picture(file)


Decoder = Callable[[Image.Image, BinaryIO], Image.Image | None]
"""Pixels of an image that was opened from a file but not loaded, in mode RGB and not turned yet, or None: as usual."""


def read_picture(file: BinaryIO, decoder: Decoder | None = None) -> Image.Image:
    """As :func:`read_image`, of a file that is open: a regular one, or bytes in memory.

    Parameters
    ----------
    file : binary file
        At its first byte.
    decoder : callable, optional
        Asked for the pixels first.
    """
    try:
        if not file.read(1):
            raise ImageError("the file is empty")
        file.seek(0)
        with opened(file) as image:
            if image.info.get("Software") == SOFTWARE or image.info.get("comment") == JPEG_COMMENT:
                raise OwnPictureError("a picture made by ramp-fast, not a photograph")
            pixels = decoder(image, file) if decoder is not None else None
            if pixels is not None:
                return _upright(pixels, image)
            image.load()
            _turn_upright(image)
            return _to_rgb(image)
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(_unidentified(file)) from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"too large: {reason(error)}; scale it down first") from error
    except OSError as error:
        # An errno means the file system, its absence the decoder or what is no file.
        broken = error.strerror is None and type(error) is OSError
        raise ImageError(f"broken image: {reason(error)}" if broken else reason(error)) from error
    except MemoryError as error:
        raise ImageError("not enough memory to decode it; scale it down first") from error
    except Exception as error:  # damaged files make decoders raise SyntaxError, ValueError, struct.error and others
        raise ImageError(f"broken image: {reason(error)}") from error


def opened(file: BinaryIO) -> Image.Image:
    """The image in a file, looked at but not decoded: its format, size and checksums are as they should be.

    Raises
    ------
    ImageError
        It would take too much memory, has an impossible shape, or is a PNG with a wrong checksum.
    Exception
        What Pillow raises of broken files.
    """
    head = file.read(16)
    file.seek(0)
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    is_held = head.startswith(_HELD_WHOLE) or head[4:8] in _HELD_WHOLE
    metered = _Metered(file, _metadata_limit(head, is_held))
    if not Image.OPEN.keys() >= set(FORMATS):
        Image.init()
    known = [name for name in FORMATS if name in Image.OPEN]
    image = Image.open(metered, formats=known)  # it needs read, seek, tell and fileno
    metered.left = None
    _check_shape(image.size)
    _check_memory(image, size if is_held else 0)
    _check_time(image)
    if head.startswith(_PPM_TEXT):
        _check_comments(file)
    if image.format == "PNG":
        at = file.tell()
        _check_png(file)
        file.seek(at)
    return image


class _Metered:
    """A file of which no more than ``left`` bytes can be read, or any number where that is None."""

    def __init__(self, file: BinaryIO, left: int) -> None:
        self.file = file
        self.left: int | None = left

    def read(self, size: int = -1) -> bytes:
        if self.left is None:
            return self.file.read(size)
        data = self.file.read(self.left + 1 if size is None or size < 0 else min(size, self.left + 1))
        if len(data) > self.left:
            raise ImageError("too much metadata, or too large a file for its format; save it without, or scaled down")
        self.left -= len(data)
        return data

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def _unidentified(file: BinaryIO) -> str:
    file.seek(0)
    head = file.read(16)
    found = next((name for start, name in _NOT_OPENED.items() if start in head), None)
    if found is None:
        return "not an image, or in a format that Pillow cannot read here"
    return f"{found}, which is not opened; convert it to one of {', '.join(FORMATS)}"


def _metadata_limit(head: bytes, held: bool) -> int:
    if held:
        return _MAX_HELD_FILE_BYTES
    return _MAX_SLOW_METADATA_BYTES if head.startswith(_SLOW_METADATA) else MAX_METADATA_BYTES


def _check_shape(size: tuple[int, int]) -> None:
    width, height = size
    if min(size) < 1:
        raise ImageError(f"it has no pixels ({width} x {height})")
    if max(size) > MAX_ASPECT * min(size):
        raise ImageError(f"too elongated ({width} x {height}, more than {MAX_ASPECT} to 1); crop it first")


def _peak_bytes(image: Image.Image) -> int:
    """Bytes per pixel."""
    if "progressive" in image.info or "progression" in image.info:
        return _PEAK_BYTES_PROGRESSIVE
    if image.format == "TIFF":
        tags = image.tag_v2  # type: ignore[attr-defined]  # of the class for this format
        if tags.get(_COMPRESSION) == 1:  # none: read row by row
            return _PEAK_BYTES_OTHERS + 2
        rows = next((n for n in (tags.get(_TILE_ROWS), tags.get(_STRIP_ROWS)) if isinstance(n, int)), image.height)
        return _PEAK_BYTES_OTHERS + math.ceil(_PEAK_BYTES_STRIP * min(1, rows / image.height))
    return _PEAK_BYTES.get(image.format or "", _PEAK_BYTES_OTHERS)


def _check_memory(image: Image.Image, held: int) -> None:
    """Refuse an image whose decoding would take too much, ``held`` bytes of its file among it."""
    width, height = image.size
    most = (MAX_DECODED_BYTES - held) // _peak_bytes(image)
    if width * height > most:
        raise ImageError(
            f"too large: {width} x {height} pixels; {most / 1e6:.0f} million can be decoded in this format "
            f"({image.format}); scale it down first"
        )


def _check_time(image: Image.Image) -> None:
    width, height = image.size
    slow = any(tile[0] in _SLOW_DECODERS for tile in getattr(image, "tile", ()))
    if slow and width * height > _MAX_SLOW_PIXELS:
        raise ImageError(
            f"too slow to decode: {width} x {height} pixels; as text, or with a largest value other than 255, "
            f"{image.format} may have {_MAX_SLOW_PIXELS / 1e6:g} million; save it as PNG first"
        )


def _check_comments(file: BinaryIO) -> None:
    """Look how many comments the text of an image has; where it is read from does not change."""
    at, comments = file.tell(), 0
    while block := file.read(2**20):
        comments += block.count(b"#")
        if comments > _MAX_PPM_COMMENTS:
            raise ImageError(f"too slow to decode: it has more than {_MAX_PPM_COMMENTS} comments; save it as PNG first")
    file.seek(at)


def _check_png(file: BinaryIO) -> None:
    """Look at the checksums of all chunks: Pillow passes over those of the pixels."""
    file.seek(8)
    metadata = 0
    while True:
        header = file.read(8)
        if len(header) < 8:
            raise ImageError("broken image: it ends too early")
        left, kind = int.from_bytes(header[:4], "big"), header[4:]
        if kind not in (b"IDAT", b"fdAT"):
            metadata += left
            if metadata > MAX_METADATA_BYTES:  # also behind the pixels, where Pillow reads it all
                raise ImageError("too much metadata; save it without")
        checksum = zlib.crc32(kind)
        while left > 0:
            block = file.read(min(left, 2**16))
            if not block:
                raise ImageError("broken image: it ends too early")
            checksum, left = zlib.crc32(block, checksum), left - len(block)
        if file.read(4) != checksum.to_bytes(4, "big"):
            raise ImageError(f"broken image: the checksum of its {kind.decode('latin-1')} chunk is wrong")
        if kind == b"IEND":
            return


def _turn_upright(image: Image.Image) -> None:
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except MemoryError:
        raise
    except Exception:  # the pixels are sound, only the metadata is not: an unreadable orientation is none
        return


def _upright(pixels: Image.Image, source: Image.Image) -> Image.Image:
    """Pixels turned as the metadata of the image say that they came from."""
    try:
        orientation = source.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # as above
        return pixels
    turn = _TURNS.get(orientation)
    return pixels if turn is None else pixels.transpose(turn)


def _strips(image: Image.Image) -> Iterator[tuple[int, int, int, int]]:
    """Boxes of some rows that cover the image: conversions with several steps then take little memory."""
    rows = max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        yield 0, top, image.width, min(top + rows, image.height)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        return Image.fromarray(_deep_to_8_bit(image)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        return _over_white(image)
    return image.copy() if image.mode == "RGB" else image.convert("RGB")


def _over_white(image: Image.Image) -> Image.Image:
    result = Image.new("RGB", image.size)
    for box in _strips(image):
        part = image.crop(box).convert("RGBA")
        ground = Image.new("RGBA", part.size, (255, 255, 255, 255))
        result.paste(Image.alpha_composite(ground, part).convert("RGB"), box)
    return result


def _deep_to_8_bit(image: Image.Image) -> npt.NDArray[np.uint8]:
    # Pillow's own conversion clips at 255, which turns a 16-bit photograph white.
    def strips() -> Iterator[tuple[slice, npt.NDArray[Any]]]:
        for box in _strips(image):
            yield slice(box[1], box[3]), np.asarray(image.crop(box)).astype(np.float64)

    extremes = [(float(part.min()), float(part.max())) for _, part in strips()]
    if not np.isfinite(extremes).all():  # NaN is its own extreme
        raise ImageError("it has pixels that are not finite")
    low, high = min(low for low, _ in extremes), max(high for _, high in extremes)
    if image.mode == "F":
        if low < 0 or high > 255:
            raise ImageError(f"floating-point pixels in [{low:g}, {high:g}]; [0, 1] and [0, 255] are supported")
        scale = 255.0 if high <= 1 else 1.0
    else:
        if low < 0 or high > 65535:
            raise ImageError(f"integer pixels in [{low:g}, {high:g}]; 16-bit values are supported")
        scale = 255.0 / 65535.0
    result = np.empty((image.height, image.width), np.uint8)
    for rows, part in strips():
        result[rows] = np.rint(part * scale)
    return result
