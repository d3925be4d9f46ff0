"""Whether a map points at the object: metrics that need masks of the objects, or boxes (:func:`boxes_to_masks`).

Maps are summed over channels. An image whose mask is empty has no object to point at: its values are NaN.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ramp_fast._checks import is_number, positive
from ramp_fast.data import boxes_to_masks
from ramp_fast.errors import InputError
from ramp_fast.explainer import Model
from ramp_fast.metrics._maps import Sign, checked_sign, with_sign
from ramp_fast.metrics.base import Metric, MetricInputs

__all__ = [
    "GridPointingGame",
    "PointingGame",
    "RelevanceMassAccuracy",
    "RelevanceRankAccuracy",
    "TopKIntersection",
    "boxes_to_masks",
]


class _Localisation(Metric):
    """A metric of scores ``[N, H, W]`` and masks ``[N, 1, H, W]``."""

    higher_is_better = True
    needs_masks = True

    def __init__(self, model: Model, *, sign: Sign = "signed", seed: int = 0, batch_size: int | None = None) -> None:
        super().__init__(model, seed=seed, batch_size=batch_size)
        self.sign = checked_sign(self.name, sign)

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "sign": self.sign}

    def measure(self, sample: MetricInputs, **options: Any) -> dict[str, Tensor]:
        masks = sample.masks
        assert masks is not None  # update has seen to it
        values = self._located(with_sign(sample.scores.double(), self.sign), masks)
        return {self.name: values.masked_fill(~masks.flatten(1).any(1), torch.nan)}

    def _located(self, scores: Tensor, masks: Tensor) -> Tensor:
        """Of every image, ``[N]``; what it says of an empty mask does not matter."""
        raise NotImplementedError


class PointingGame(_Localisation):
    """Whether the largest value of a map lies on the object: 1 if it does, else 0.

    The map is summed over channels. A largest value within ``tolerance`` pixels of the object hits as well (Euclidean
    distance between the pixels' centres). Where several pixels share the largest value it is the share of them that
    hits, what choosing one by chance would give on average. In [0, 1]; higher is better; NaN for an empty mask. Source:
    Zhang et al., IJCV 126, 2018, arXiv 1608.00507.

    Parameters
    ----------
    model, seed, batch_size
        As for :class:`Metric`; nothing is random here.
    tolerance : float
        Radius in pixels: 15 in the paper, 0 in Quantus.
    sign : {"signed", "positive", "absolute"}
        What of the map counts.

    Notes
    -----
    Differences from Quantus: it has no tolerance; one of several largest values on the object is a hit for it, so that
    a constant map always hits; and it takes an empty mask for a hit (its NaN becomes True).
    """

    name = "pointing_game"

    def __init__(
        self,
        model: Model,
        *,
        tolerance: float = 0,
        sign: Sign = "signed",
        seed: int = 0,
        batch_size: int | None = None,
    ) -> None:
        super().__init__(model, sign=sign, seed=seed, batch_size=batch_size)
        if not isinstance(tolerance, (int, float)) or not math.isfinite(tolerance) or tolerance < 0:
            raise InputError(f"{self.name}: tolerance must be a radius in pixels, 0 or more; got {tolerance!r}")
        self.tolerance = float(tolerance)

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "tolerance": self.tolerance}

    def _located(self, scores: Tensor, masks: Tensor) -> Tensor:
        scores, near = scores.flatten(1), self._near(masks).flatten(1)
        largest = scores == scores.amax(1, keepdim=True)
        return (largest & near).sum(1).double() / largest.sum(1)

    def _near(self, masks: Tensor) -> Tensor:
        """Pixels within the tolerance of a mask ``[N, 1, H, W]``, ``[N, H, W]``.

        A disc is a run of pixels in each row, and whether a run meets the mask is a difference of two counts: a
        convolution with the disc takes 20 times as long on CPUs.
        """
        masks = masks.squeeze(1)
        _, height, width = masks.shape
        before = F.pad(masks.cumsum(2), (1, 0))  # the mask's pixels in the columns before
        column = torch.arange(width, device=masks.device)
        near = torch.zeros_like(masks)
        for away in range(min(int(self.tolerance), height - 1) + 1):
            half = int(math.sqrt(self.tolerance**2 - away**2 + 1e-9))  # a root that was squared still reaches its pixel
            start, stop = (column - half).clamp_min(0), (column + half + 1).clamp_max(width)
            meets = before[..., stop] > before[..., start]
            near[:, : height - away] |= meets[:, away:]
            near[:, away:] |= meets[:, : height - away]
        return near


class RelevanceMassAccuracy(_Localisation):
    """How much of a map's mass lies on the object: ``sum of R inside the mask / sum of R``.

    R is the map summed over channels, by default its positive part. In [0, 1] (unbounded for ``sign="signed"``); higher
    is better; NaN for an empty mask, and where all of R is zero. Source: Arras, Osman, Samek, Information Fusion 81,
    2022, arXiv 2003.07258, whose pooling "sum,pos" is the default here and "sum,abs" is ``sign="absolute"``.

    Parameters
    ----------
    model, seed, batch_size
        As for :class:`Metric`; nothing is random here.
    sign : {"positive", "absolute", "signed"}
        What of the map counts.
    area : float or None
        Mass at equal area: only this share of an image's pixels counts, those of largest values, in (0, 1]. A map of a
        few points and a blurred one are then asked about the same number of pixels, as
        :class:`RelevanceRankAccuracy` does without the values. Of pixels that share the last place each counts in
        part. None: all pixels.

    Notes
    -----
    Quantus takes maps as they are, as ``sign="signed"`` does, and has no ``area``. With entries of both signs the
    denominator may be close to zero and the value any number, which is why the paper asks for maps without negative
    entries.
    """

    name = "relevance_mass_accuracy"

    def __init__(
        self,
        model: Model,
        *,
        sign: Sign = "positive",
        area: float | None = None,
        seed: int = 0,
        batch_size: int | None = None,
    ) -> None:
        super().__init__(model, sign=sign, seed=seed, batch_size=batch_size)
        if area is not None and not (is_number(area) and 0 < area <= 1):
            raise InputError(f"{self.name}: area must be a share of the pixels in (0, 1], or None; got {area!r}")
        self.area = area

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "area": self.area}

    def _located(self, scores: Tensor, masks: Tensor) -> Tensor:
        scores, masks = scores.flatten(1), masks.flatten(1)
        if self.area is not None:
            pixels = scores.shape[1]
            count = torch.full((scores.shape[0],), max(1, math.floor(self.area * pixels + 1e-9)), device=scores.device)
            scores = scores * _share_taken(scores, count)
        return scores.masked_fill(~masks, 0).sum(1) / scores.sum(1)


class RelevanceRankAccuracy(_Localisation):
    """How many of the K pixels of largest values lie on the object of K pixels, as a share of K.

    The map is summed over channels. Of pixels that share the K-th largest value as many count as are needed, on and off
    the object in proportion: what breaking ties by chance would give on average (Quantus takes them as they come). In
    [0, 1]; higher is better; NaN for an empty mask. Source: Arras, Osman, Samek, Information Fusion 81, 2022, arXiv
    2003.07258.

    Parameters
    ----------
    model, seed, batch_size
        As for :class:`Metric`; nothing is random here.
    sign : {"signed", "positive", "absolute"}
        What of the map counts.
    """

    name = "relevance_rank_accuracy"

    def _located(self, scores: Tensor, masks: Tensor) -> Tensor:
        masks = masks.flatten(1)
        size = masks.sum(1).clamp_min(1)  # an empty mask has no K-th value
        return _largest_on(scores.flatten(1), masks, size) / size


class TopKIntersection(_Localisation):
    """How many of the ``k`` pixels of largest values lie on the object, as a share of ``k``.

    The map is summed over channels; ties at the k-th value as in :class:`RelevanceRankAccuracy`. In [0, 1]; higher is
    better; NaN for an empty mask. Source: Theiner, Müller-Budack, Ewerth, WACV 2022, arXiv 2104.14995.

    Parameters
    ----------
    model, seed, batch_size
        As for :class:`Metric`; nothing is random here.
    k : int
        At most the pixels of an image.
    concept_influence : bool
        Divide by the share of the image that the object takes, the paper's concept influence: above 1 where the map
        prefers the object, up to the image's pixels by the mask's.
    sign : {"signed", "positive", "absolute"}
        What of the map counts.
    """

    name = "top_k_intersection"

    def __init__(
        self,
        model: Model,
        *,
        k: int = 1000,
        concept_influence: bool = False,
        sign: Sign = "signed",
        seed: int = 0,
        batch_size: int | None = None,
    ) -> None:
        super().__init__(model, sign=sign, seed=seed, batch_size=batch_size)
        positive(self.name, "k", k)
        if not isinstance(concept_influence, bool):
            raise InputError(f"{self.name}: concept_influence must be True or False, got {concept_influence!r}")
        self.k, self.concept_influence = k, concept_influence

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "k": self.k, "concept_influence": self.concept_influence}

    def measure(self, sample: MetricInputs, **options: Any) -> dict[str, Tensor]:
        height, width = sample.images.shape[-2:]
        if self.k > height * width:
            raise InputError(
                f"{self.name}: images of {height} x {width} have fewer than k = {self.k} pixels: choose a smaller k"
            )
        return super().measure(sample, **options)

    def _located(self, scores: Tensor, masks: Tensor) -> Tensor:
        scores, masks = scores.flatten(1), masks.flatten(1)
        count = torch.full((scores.shape[0],), self.k, device=scores.device)
        share = _largest_on(scores, masks, count) / self.k
        return share / masks.double().mean(1) if self.concept_influence else share


class GridPointingGame(Metric):
    """How much of a map lies on the right photograph of a mosaic: Böhle, Fritz, Schiele, CVPR 2021, arXiv 2104.00032.

    ``side ** 2`` images that follow each other make one mosaic, row by row, each at ``1 / side`` of its size (means
    over squares of pixels), and every one's class is explained on it. A tile's value is ``sum of R on the tile / sum of
    R``, R the positive part of the map summed over channels. In [0, 1]; higher is better; ``1 / side ** 2`` for a
    random map.

    Parameters
    ----------
    model, seed, batch_size
        As for :class:`Metric`; nothing is random here.
    side : int
        Tiles along each side. ``update`` takes multiples of ``side ** 2`` images, whose height and width ``side``
        divides.

    Notes
    -----
    Values are, for each mosaic, grid_pointing_game (the mean over its tiles) and tiles ``[side ** 2]``; a tile is NaN
    where another tile has its class, or where nothing of its map is positive. The paper enlarges the model's input to
    the size of the mosaic, which takes a model of any size of images, and chooses photographs that the model is sure
    of: give such photographs, of classes in turn.
    """

    name = "grid_pointing_game"
    higher_is_better = True
    uses_maps = False
    asks_method = True

    def __init__(self, model: Model, *, side: int = 2, seed: int = 0, batch_size: int | None = None) -> None:
        super().__init__(model, seed=seed, batch_size=batch_size)
        positive(self.name, "side", side, least=2)
        self.side = side
        self.group = side * side  # type: ignore[misc]  # of this metric alone

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "side": self.side}

    def measure(self, sample: MetricInputs, **options: Any) -> dict[str, Tensor]:
        images, side, count = sample.images, self.side, self.group
        height, width = images.shape[-2:]
        if height % side or width % side:
            raise InputError(
                f"{self.name}: height and width must be multiples of side = {side} to tile a mosaic, got "
                f"{height} x {width}"
            )
        if (self._classes or sample.logits.shape[1]) < 2:
            raise InputError(f"{self.name}: the model has a single class: there is no other one on a mosaic")
        classes = sample.target.view(-1, count)
        mosaics = _tiled(F.avg_pool2d(images, side).unflatten(0, (-1, side, side)))
        maps = sample.attribute(mosaics.repeat_interleave(count, 0), classes.flatten())
        found = with_sign(maps.sum(1).double(), "positive")
        tiles = F.avg_pool2d(found.unsqueeze(1), (height // side, width // side)).view(-1, count, count)
        own = tiles.diagonal(dim1=1, dim2=2) / tiles.sum(2)
        repeated = (classes.unsqueeze(1) == classes.unsqueeze(2)).sum(2) > 1
        own = own.masked_fill(repeated, torch.nan)
        return {self.name: own.nanmean(1), "tiles": own}


def _tiled(tiles: Tensor) -> Tensor:
    """``[G, rows, columns, C, h, w]`` as images ``[G, C, rows h, columns w]``."""
    return tiles.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def _largest_on(scores: Tensor, masks: Tensor, count: Tensor) -> Tensor:
    """How many of each image's ``count [N]`` pixels of largest scores ``[N, D]`` are in its mask ``[N, D]``."""
    return (_share_taken(scores, count) * masks).sum(1)


def _share_taken(scores: Tensor, count: Tensor) -> Tensor:
    """1 for each image's ``count [N]`` pixels of largest scores ``[N, D]``, 0 for the others, float64.

    Those that share the last place count in part, so that the order in which a device sorts equals does not matter.
    """
    last = scores.sort(1, descending=True).values.gather(1, (count - 1).unsqueeze(1))
    above, level = scores > last, scores == last
    open_places = (count - above.sum(1)).double() / level.sum(1)
    return above + open_places.unsqueeze(1) * level
