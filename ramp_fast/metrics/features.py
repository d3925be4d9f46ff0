"""Features that perturbation metrics mask as one: entries, pixels, patches or superpixels, and their ranking.

A kind of feature numbers the features of an image from 0 to M - 1, scores them from a map, and spreads a value per
feature over the image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ramp_fast import ops
from ramp_fast._checks import positive
from ramp_fast.errors import InputError, RampFastError


@dataclass(frozen=True)
class Features:
    """The features of some images.

    Attributes
    ----------
    scores : Tensor [N, M]
        Of every feature; NaN for numbers that an image does not use.
    counts : integer Tensor [N] or int
        How many features an image has.
    spread : callable
        Values per feature ``[..., N, M]`` to ``[..., N, 1, H, W]``, or ``[..., N, C, H, W]`` where features are
        entries.
    sums : Tensor [N, M]
        The map's sum over every feature, 0 for numbers that an image does not use: what all of a feature got.
    """

    scores: Tensor
    counts: Tensor | int
    spread: Callable[[Tensor], Tensor]
    sums: Tensor

    def steps(self, ks: Sequence[int], descending: bool) -> Tensor:
        """When every entry is masked, as :func:`ramp_fast.ops.mask_steps`, if step s masks the first ``ks[s]``."""
        return self.spread(ops.mask_steps(self.scores, [min(k, self.scores.shape[1]) for k in ks], descending))

    def shares(self, count: int, descending: bool) -> Tensor:
        """The same where step s of ``count`` masks a share of ``s / (count - 1)``, rounded down: none to all."""
        size = self.scores.shape[1]
        parts = count - 1
        if isinstance(self.counts, int):
            return self.steps([s * size // parts for s in range(count)], descending)
        ranks = ops.mask_steps(self.scores, range(1, size + 1), descending)
        # masked from the first step on with step * counts // parts > rank
        return self.spread(_ceil_div((ranks.long() + 1) * parts, self.counts.view(-1, 1)).to(torch.int32))

    def percentages(self, percentages: Sequence[float], descending: bool) -> Tensor:
        """The same where step s masks ``percentages[s]`` of every image's features, rounded down."""
        size = self.scores.shape[1]
        if isinstance(self.counts, int):
            return self.steps([int(size * p / 100) for p in percentages], descending)
        ranks = ops.mask_steps(self.scores, range(1, size + 1), descending)
        ks = torch.stack([(self.counts.double() * p / 100).long() for p in percentages], 1)
        return self.spread(torch.searchsorted(ks, ranks.long(), right=True).to(torch.int32))


def _ceil_div(a: Tensor, b: Tensor) -> Tensor:
    return -(-a).div(b, rounding_mode="floor")


def _unflatten(shape: Sequence[int]) -> Callable[[Tensor], Tensor]:
    def spread(values: Tensor) -> Tensor:
        return values.view(*values.shape[:-1], *shape)

    return spread


class Entries:
    """Every channel of every pixel; a map of one channel counts for all."""

    name = "entry"

    def of(self, images: Tensor, maps: Tensor) -> Features:
        scores = maps.expand_as(images).flatten(1)
        return Features(scores, scores.shape[1], _unflatten(images.shape[1:]), scores)


class Pixels:
    """Pixels, scored by the sum of their map over channels."""

    name = "pixel"

    def of(self, images: Tensor, maps: Tensor) -> Features:
        scores = maps.sum(1).flatten(1)
        return Features(scores, scores.shape[1], _unflatten((1, *images.shape[2:])), scores)


class Patches:
    """Squares of ``size`` pixels, smaller at the right and lower border, scored by the sum of their map."""

    def __init__(self, size: int = 16) -> None:
        positive("patches", "size", size)
        self.size = size

    @property
    def name(self) -> str:
        return f"patch:{self.size}"

    def of(self, images: Tensor, maps: Tensor) -> Features:
        size, (height, width) = self.size, images.shape[2:]
        rows, columns = -(-height // size), -(-width // size)
        padded = F.pad(maps.sum(1), (0, columns * size - width, 0, rows * size - height))
        scores = padded.unflatten(2, (columns, size)).unflatten(1, (rows, size)).sum((2, 4)).flatten(1)

        def spread(values: Tensor) -> Tensor:
            grid = values.view(*values.shape[:-1], 1, rows, columns)
            return grid.repeat_interleave(size, -2).repeat_interleave(size, -1)[..., :height, :width].contiguous()

        return Features(scores, scores.shape[1], spread, scores)


class Superpixels:
    """Segments of an image, scored by the mean of their map over pixels and channels.

    SLIC (Achanta et al. 2012) of scikit-image, of the image scaled to [0, 1]; it runs on the CPU.

    Parameters
    ----------
    count : int
        About so many segments.
    compactness : float
        Of SLIC: higher is squarer.
    """

    def __init__(self, count: int = 100, compactness: float = 10.0) -> None:
        positive("superpixels", "count", count, least=2)
        self.count, self.compactness = count, compactness

    @property
    def name(self) -> str:
        return f"superpixel:{self.count}" + ("" if self.compactness == 10.0 else f",{self.compactness}")

    def labels(self, images: Tensor) -> Tensor:
        """Numbers of segments from 0, ``[N, H, W]``, int64, on the images' device."""
        try:
            from skimage.segmentation import slic
        except ImportError as error:
            raise RampFastError("superpixels need scikit-image: pip install 'ramp_fast[evaluate]'") from error
        low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
        scaled = ((images - low) / (high - low).clamp_min(torch.finfo(images.dtype).tiny)).double()
        pictures = scaled.permute(0, 2, 3, 1).cpu().numpy()
        found = [
            torch.from_numpy(slic(p, n_segments=self.count, compactness=self.compactness, start_label=0))
            for p in pictures
        ]
        return torch.stack(found).long().to(images.device)

    def of(self, images: Tensor, maps: Tensor) -> Features:
        labels = self.labels(images).flatten(1)
        counts = labels.amax(1) + 1
        size = int(counts.max())
        wide = torch.promote_types(maps.dtype, torch.float32)
        zeros = torch.zeros(labels.shape[0], size, dtype=wide, device=maps.device)
        sums = zeros.scatter_add(1, labels, maps.mean(1).flatten(1).to(wide))
        pixels = zeros.scatter_add(1, labels, torch.ones_like(labels, dtype=wide))
        unflatten = _unflatten((1, *images.shape[2:]))

        def spread(values: Tensor) -> Tensor:
            return unflatten(values.gather(-1, labels.expand(*values.shape[:-1], labels.shape[1])))

        return Features(sums / pixels, counts, spread, sums * maps.shape[1])


Granularity = Entries | Pixels | Patches | Superpixels

_KINDS: dict[str, Callable[..., Granularity]] = {
    "entry": Entries,
    "pixel": Pixels,
    "patch": Patches,
    "superpixel": Superpixels,
}


def kind_of_feature(kind: str | Granularity) -> Granularity:
    """A kind of feature by its name: "entry", "pixel", "patch", "superpixel", the latter two also as "patch:8".

    Raises
    ------
    InputError
        There is none of that name.
    """
    if not isinstance(kind, str):
        return kind
    name, colon, number = kind.partition(":")
    if name not in _KINDS or (colon and not number.isdecimal()):
        raise InputError(
            f"granularity must be entry, pixel, patch or superpixel (patch:8, superpixel:50 say the size or the "
            f"count), got {kind!r}"
        )
    if colon and name in ("entry", "pixel"):
        raise InputError(f"granularity {name!r} has no number, got {kind!r}")
    return _KINDS[name](int(number)) if colon else _KINDS[name]()
