"""Pictures of attributions: the crop the model saw beside its map, and contact sheets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from ramp_fast._checks import fraction, is_number, positive
from ramp_fast.errors import InputError

__all__ = ["blend", "colourise", "contact_sheet", "overlay", "scale_of"]

POSITIVE = np.array([178.0, 10.0, 28.0])
NEGATIVE = np.array([20.0, 70.0, 178.0])
PAPER = (255, 255, 255)
INK = (30, 30, 30)
MIN_PANEL = 224
MARGIN = 6


def _flat(relevance: npt.ArrayLike) -> npt.NDArray[np.float64]:
    values = np.asarray(relevance, dtype=np.float64)
    if values.ndim == 3:
        values = values.sum(axis=0)
    if values.ndim != 2 or values.size == 0:
        raise InputError(f"a map is [C, H, W] or [H, W], not {list(np.shape(relevance))}")
    if not np.isfinite(values).all():
        raise InputError("the map has values that are not finite")
    return values


def scale_of(relevance: npt.ArrayLike, percentile: float = 99.5) -> float:
    """The absolute value drawn in full colour.

    Parameters
    ----------
    relevance : array_like
        ``[C, H, W]`` (summed over channels) or ``[H, W]``.
    percentile : float
        In (0, 100]: a few extreme pixels would otherwise leave the rest of the picture white.

    Returns
    -------
    float
        The percentile of the absolute values; their maximum where that is 0; 1 for a map of zeros.

    Raises
    ------
    InputError
        Not a map, or values that are not finite.
    """
    if not is_number(percentile) or not 0 < percentile <= 100:
        raise InputError(f"percentile must be in (0, 100], got {percentile!r}")
    sizes = np.abs(_flat(relevance))
    scale = float(np.percentile(sizes, percentile))
    return scale if scale > 0 else float(sizes.max()) or 1.0


def colourise(relevance: npt.ArrayLike, scale: float | None = None) -> npt.NDArray[np.uint8]:
    """A map in diverging colours, red positive, blue negative, white zero, symmetric about zero.

    Parameters
    ----------
    relevance : array_like
        ``[C, H, W]`` (summed over channels) or ``[H, W]``.
    scale : float, optional
        Absolute value drawn in full colour, more than 0; by default `scale_of`.

    Returns
    -------
    numpy.ndarray
        ``[H, W, 3]``, uint8.
    """
    values = _flat(relevance)
    return blend(np.full((*values.shape, 3), 255, dtype=np.uint8), values, scale, backdrop=1.0)


def blend(
    photograph: npt.NDArray[np.uint8],
    relevance: npt.ArrayLike,
    scale: float | None = None,
    backdrop: float = 0.45,
) -> npt.NDArray[np.uint8]:
    """A map in diverging colours over a pale grey photograph.

    Parameters
    ----------
    photograph : numpy.ndarray
        ``[H, W, 3]``, uint8.
    relevance : array_like
        ``[C, H, W]`` (summed over channels) or ``[H, W]``, of the same height and width.
    scale : float, optional
        Absolute value drawn in full colour, more than 0; by default `scale_of`.
    backdrop : float
        In [0, 1]: contrast left to the photograph.

    Returns
    -------
    numpy.ndarray
        ``[H, W, 3]``, uint8.

    Raises
    ------
    InputError
        Shapes differ, or values are not finite.
    """
    values = _flat(relevance)
    fraction("blend", "backdrop", backdrop)
    if scale is not None and not (is_number(scale) and scale > 0):
        raise InputError(f"scale must be a number above 0, got {scale!r}")
    if photograph.shape != (*values.shape, 3):
        raise InputError(f"photograph {list(photograph.shape)} and map {list(values.shape)} do not match")
    strength = np.clip(values / (scale_of(values) if scale is None else scale), -1, 1)[..., None]
    # ITU-R 601 luma, as Pillow's mode L; pale, so that colour always means relevance.
    grey = photograph.astype(np.float64) @ np.array([[0.299], [0.587], [0.114]])
    ground = 255.0 - backdrop * (255.0 - grey)
    colour = np.where(strength >= 0, POSITIVE, NEGATIVE)
    opacity = np.abs(strength)
    mixed: npt.NDArray[np.uint8] = np.rint(ground * (1 - opacity) + colour * opacity).astype(np.uint8)
    return mixed


def _font(size: int) -> Any:
    try:
        return ImageFont.load_default(size=size)
    except (TypeError, OSError):  # Pillow before 10.1 or without FreeType: the small bitmap font
        return ImageFont.load_default()


def _fitting(draw: ImageDraw.ImageDraw, text: str, font: Any, width: int) -> str:
    if len(text) <= width and draw.textlength(text, font=font) <= width:
        return text
    text = text[: max(width, 0)]  # a character is no narrower than a pixel; measuring more would take for ever
    while text and draw.textlength(text + "...", font=font) > width:
        text = text[:-1]
    return text.rstrip(" ,") + "..."


def _drawable(text: str) -> str:
    # Pillow's bitmap font knows Latin-1 only and raises on anything else.
    return "".join(c if c.isprintable() else "?" for c in text).encode("latin-1", "replace").decode("latin-1")


def _panel(pixels: npt.NDArray[np.uint8]) -> Image.Image:
    # Whole factors only, so that each of the model's pixels stays a square of one colour.
    factor = math.ceil(MIN_PANEL / max(pixels.shape[:2]))
    return Image.fromarray(np.repeat(np.repeat(pixels, factor, axis=0), factor, axis=1))


def overlay(
    photograph: npt.NDArray[np.uint8],
    relevance: npt.ArrayLike,
    caption: str,
    probability: float | None = None,
) -> Image.Image:
    """The crop the model saw, its map over it, and what was explained.

    Parameters
    ----------
    photograph : numpy.ndarray
        ``[H, W, 3]``, uint8: the preprocessed crop, de-normalised.
    relevance : array_like
        ``[C, H, W]`` or ``[H, W]``.
    caption : str
        Name of the class; cut where it does not fit.
    probability : float, optional
        In [0, 1]; shown in per cent.

    Returns
    -------
    PIL.Image.Image
        Mode RGB: two panels side by side with a caption below. Small crops are enlarged by a whole factor.

    Raises
    ------
    InputError
        Shapes differ, or values are not finite.
    """
    if probability is not None:
        fraction("overlay", "probability", probability)
    left, right = _panel(photograph), _panel(blend(photograph, relevance))
    font = _font(15)
    width = left.width + right.width + 3 * MARGIN
    sheet = Image.new("RGB", (width, left.height + 2 * MARGIN + 24), PAPER)
    sheet.paste(left, (MARGIN, MARGIN))
    sheet.paste(right, (left.width + 2 * MARGIN, MARGIN))
    draw = ImageDraw.Draw(sheet)
    share = "" if probability is None else f"  {100 * probability:.1f} %"
    room = width - 2 * MARGIN - math.ceil(draw.textlength(share, font=font))
    text = _fitting(draw, _drawable(caption), font, room) + share
    draw.text((MARGIN, left.height + MARGIN + 4), text, fill=INK, font=font)
    return sheet


def contact_sheet(pictures: Sequence[tuple[str, Image.Image]], columns: int | None = None) -> Image.Image:
    """Several pictures on one sheet.

    Parameters
    ----------
    pictures : sequence of (str, PIL.Image.Image)
        Title (such as the file's name) and picture, at least one.
    columns : int, optional
        Pictures per row; by default about as many as rows, as a picture is twice as wide as high.

    Returns
    -------
    PIL.Image.Image
        Mode RGB. Every cell has the size of the largest picture, at most 480 pixels wide.

    Raises
    ------
    InputError
        No pictures.
    """
    if not pictures:
        raise InputError("a contact sheet needs at least one picture")
    if columns is not None:
        positive("contact_sheet", "columns", columns)
    font, title_height, max_width = _font(13), 20, 480
    fitted = []
    for title, picture in pictures:
        if picture.width > max_width:
            height = max(1, round(picture.height * max_width / picture.width))
            picture = picture.resize((max_width, height), Image.Resampling.LANCZOS)
        fitted.append((title, picture.convert("RGB")))
    count = len(fitted)
    if columns is None:
        columns = max(1, round(math.sqrt(count / 1.5)))
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    cell_width = max(p.width for _, p in fitted) + MARGIN
    cell_height = max(p.height for _, p in fitted) + title_height + MARGIN
    sheet = Image.new("RGB", (columns * cell_width + MARGIN, rows * cell_height + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    for index, (title, picture) in enumerate(fitted):
        x, y = MARGIN + index % columns * cell_width, MARGIN + index // columns * cell_height
        draw.text((x + MARGIN, y + 3), _fitting(draw, _drawable(title), font, picture.width), fill=INK, font=font)
        sheet.paste(picture, (x, y + title_height))
    return sheet
