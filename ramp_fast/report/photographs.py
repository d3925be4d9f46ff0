"""The photographs that maps of a store belong to, as the model saw them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from PIL import Image

from ramp_fast.data.decoders import Decoders
from ramp_fast.data.images import ImageError, read_picture
from ramp_fast.data.pixels import Framing
from ramp_fast.data.records import Source
from ramp_fast.errors import InputError
from ramp_fast.results.maps import Plan

__all__ = ["Photograph", "Photographs"]


@dataclass(frozen=True)
class Photograph:
    """One photograph.

    Attributes
    ----------
    pixels : numpy.ndarray [H, W, 3] or None
        uint8, what the model saw; None where it cannot be read.
    problem : str
        Why not.
    checksum : int
        CRC-32 of the encoded image.
    inside : numpy.ndarray [H, W] or None
        bool, where its object is; None where nothing says so.
    """

    pixels: npt.NDArray[np.uint8] | None
    problem: str
    checksum: int
    inside: npt.NDArray[np.bool_] | None


class Photographs:
    """Photographs of a source; a context manager, which ends the processes that decode.

    Parameters
    ----------
    plan : Plan
        Of the store.
    source : Source
        Of the same images.
    batch_size : int
        Images asked for at a time, at most.
    workers : int
        Processes; 0: none but this one.

    Raises
    ------
    InputError
        The plan does not say how photographs are cropped.
    """

    def __init__(self, plan: Plan, source: Source, batch_size: int, workers: int) -> None:
        config = plan.settings.get("preprocessing")
        if not isinstance(config, dict) or "input_size" not in config or "mean" not in config:
            raise InputError("the plan of the store does not say how photographs are cropped")
        framing = Framing.of(config, fast=True)
        if framing.size != plan.map_shape[-2:]:
            raise InputError(f"photographs are cropped to {framing.size}, maps have {plan.map_shape[-2:]}")
        self.source = source
        self._masks = replace(framing, interpolation="nearest", fill=(0, 0, 0))
        self.has_regions = any(record.region is not None for record in source.records)
        self._decoders = Decoders(framing, batch_size, workers)

    def __enter__(self) -> Photographs:
        return self

    def __exit__(self, *_: object) -> None:
        self._decoders.close()

    def batches(self, parts: Sequence[Sequence[int]]) -> Iterator[list[Photograph]]:
        """Photographs by number, in parts, decoded ahead of what is asked for."""
        decoded = self._decoders.batches([self.source.locate(number) for number in part] for part in parts)
        for part in parts:
            batch = next(decoded)
            found = []
            for place, number in enumerate(part):
                problem = batch.failures.get(place, "")
                pixels = None if problem else batch.pixels[place]
                found.append(Photograph(pixels, problem, int(batch.checksums[place]), self._inside(number)))
            yield found

    def _inside(self, number: int) -> npt.NDArray[np.bool_] | None:
        region = self.source.records[number].region
        if region is None:
            return None
        try:
            with self.source.locate(number).open() as file:
                picture = read_picture(file)
            mask = region((picture.height, picture.width))
        except (ImageError, OSError):
            return None  # the photograph itself says why
        white = Image.fromarray(mask.astype(np.uint8) * 255).convert("RGB")
        return self._masks.of_picture(white)[..., 0] > 127
