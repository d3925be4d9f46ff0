"""Whether a map points at the object: metrics that need masks of the objects, or boxes (:func:`boxes_to_masks`).

Maps are summed over channels. An image whose mask is empty has no object to point at: its values are NaN.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ramp_fast._checks import positive
from ramp_fast.data import boxes_to_masks
from ramp_fast.errors import InputError
from ramp_fast.explainer import Model
from ramp_fast.metrics._maps import Sign, checked_sign, with_sign
from ramp_fast.metrics.base import Metric, MetricInputs

__all__ = [
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

    Notes
    -----
    Quantus takes maps as they are, as ``sign="signed"`` does. With entries of both signs the denominator may be close
    to zero and the value any number, which is why the paper asks for maps without negative entries.
    """

    name = "relevance_mass_accuracy"

    def __init__(self, model: Model, *, sign: Sign = "positive", seed: int = 0, batch_size: int | None = None) -> None:
        super().__init__(model, sign=sign, seed=seed, batch_size=batch_size)

    def _located(self, scores: Tensor, masks: Tensor) -> Tensor:
        inside = scores.masked_fill(~masks.squeeze(1), 0)
        return inside.flatten(1).sum(1) / scores.flatten(1).sum(1)


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


def _largest_on(scores: Tensor, masks: Tensor, count: Tensor) -> Tensor:
    """How many of each image's ``count [N]`` pixels of largest scores ``[N, D]`` are in its mask ``[N, D]``.

    Those that share the last place count in part, so that the order in which a device sorts equals does not matter.
    """
    last = scores.sort(1, descending=True).values.gather(1, (count - 1).unsqueeze(1))
    above, level = scores > last, scores == last
    open_places = (count - above.sum(1)).double() / level.sum(1)
    return (above & masks).sum(1) + open_places * (level & masks).sum(1)
