"""Pictures of a report: maps in colours, reduced by averaging, many of them in one JPEG."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from ramp_fast.results.marks import JPEG_COMMENT, SHEET_PREFIX
from ramp_fast.results.render import NEGATIVE, POSITIVE

__all__ = ["Reduction", "Sheets", "coloured", "fitting", "reduced_photograph", "scales"]

PERCENTILE = 99.5
"""Of the absolute values of a map: where colours are full, as in :func:`ramp_fast.results.render.scale_of`."""

_STEPS = 255
_strength = np.linspace(-1, 1, 2 * _STEPS + 1)[:, None]
_COLOURS: npt.NDArray[np.uint8] = np.rint(
    255 * (1 - np.abs(_strength)) + np.where(_strength >= 0, POSITIVE, NEGATIVE) * np.abs(_strength)
).astype(np.uint8)


def fitting(height: int, width: int, most: int) -> tuple[int, int]:
    """Height and width of a picture whose longer side is ``most`` at most, in the same shape; never enlarged."""
    longest = max(height, width)
    if longest <= most:
        return height, width
    return max(1, round(height * most / longest)), max(1, round(width * most / longest))


class Reduction:
    """Maps at a smaller size, by averaging what a pixel covers: sums of relevance keep their proportions.

    Parameters
    ----------
    size, smaller : (int, int)
        Height and width before and after.
    """

    def __init__(self, size: tuple[int, int], smaller: tuple[int, int]) -> None:
        self._rows, self._columns = _averaging(size[0], smaller[0]), _averaging(size[1], smaller[1]).T
        self._same = size == smaller

    def __call__(self, maps: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """``[..., H, W] -> [..., h, w]``."""
        if self._same:
            return maps
        reduced: npt.NDArray[np.float32] = self._rows @ maps @ self._columns
        return reduced


def _averaging(size: int, smaller: int) -> npt.NDArray[np.float32]:
    """``[smaller, size]``: how much of every pixel lies in a larger one, with sums of 1."""
    edges = np.arange(smaller + 1) * (size / smaller)
    pixels = np.arange(size)
    covered = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    share: npt.NDArray[np.float64] = np.clip(covered, 0, None) * (smaller / size)
    return share.astype(np.float32)


def scales(maps: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """What is drawn in full colour of maps ``[..., H, W]``: ``[...]``, as :func:`ramp_fast.results.render.scale_of`."""
    sizes = np.abs(maps).reshape(*maps.shape[:-2], -1)
    found = np.percentile(sizes, PERCENTILE, axis=-1)
    found = np.where(found > 0, found, sizes.max(-1))
    return np.where(found > 0, found, 1).astype(np.float32)


def coloured(maps: npt.NDArray[np.float32], scale: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """Maps ``[..., H, W]`` as ``[..., H, W, 3]``, red positive, blue negative; ``scale`` ``[...]`` is full colour."""
    strength = np.clip(maps / scale[..., None, None], -1, 1)
    found: npt.NDArray[np.uint8] = _COLOURS[np.rint(strength * _STEPS).astype(np.int16) + _STEPS]
    return found


def reduced_photograph(pixels: npt.NDArray[np.uint8], size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """A photograph ``[H, W, 3]`` at that height and width."""
    if pixels.shape[:2] == size:
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((size[1], size[0]), Image.Resampling.BOX))


class Sheets:
    """Pictures of one size, so many of them in a file: ``report-KIND-000.jpg`` and so on, row by row.

    Parameters
    ----------
    folder : pathlib.Path
    kind : str
    size : (int, int)
        Height and width of a picture.
    columns, rows : int
        Of a full sheet; the last one has the rows that it needs.
    quality : int
        Of the JPEGs.
    """

    def __init__(
        self, folder: Path, kind: str, size: tuple[int, int], columns: int, rows: int, quality: int = 80
    ) -> None:
        self.folder, self.kind, self.size, self.columns, self.rows = folder, kind, size, columns, rows
        self.quality = quality
        self.count = 0
        self._pixels = np.full((rows * size[0], columns * size[1], 3), 255, np.uint8)

    @property
    def per_file(self) -> int:
        """Pictures of a full sheet."""
        return self.columns * self.rows

    def add(self, picture: npt.NDArray[np.uint8] | None) -> None:
        """The next picture; None leaves its place white."""
        row, column = divmod(self.count % self.per_file, self.columns)
        if picture is not None:
            height, width = self.size
            top, left = row * height, column * width
            self._pixels[top : top + height, left : left + width] = picture
        self.count += 1
        if self.count % self.per_file == 0:
            self._write(self.rows)

    def close(self) -> None:
        """Write the last sheet."""
        left = self.count % self.per_file
        if left:
            self._write(-(-left // self.columns))

    def _write(self, rows: int) -> None:
        number = (self.count - 1) // self.per_file
        path = self.folder / f"{SHEET_PREFIX}{self.kind}-{number:03d}.jpg"
        picture = Image.fromarray(self._pixels[: rows * self.size[0]])
        # Full colour resolution: red beside blue would be grey else. The comment tells it from a photograph.
        picture.save(path, "JPEG", quality=self.quality, subsampling=0, comment=JPEG_COMMENT)
        self._pixels[:] = 255

    def about(self) -> dict[str, object]:
        """What the page must know, in JSON types."""
        return {
            "kind": self.kind,
            "height": self.size[0],
            "width": self.size[1],
            "columns": self.columns,
            "rows": self.rows,
            "count": self.count,
        }
