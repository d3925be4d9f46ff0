"""What a report says of maps and predictions, image by image and together."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Block", "ClassTable", "box_shares", "entropies", "summed_maps"]

TOP = 5


def summed_maps(
    stored: npt.NDArray[Any], scale: npt.NDArray[np.float32], several: bool, channels: bool
) -> npt.NDArray[np.float32]:
    """Relevance ``[B, K, H, W]``, summed over channels, from arrays of a store; K is 1 but for ``several`` targets."""
    maps = stored.astype(np.float32)
    maps *= scale.reshape(scale.shape + (1,) * (maps.ndim - scale.ndim))
    if channels:
        maps = maps.sum(-3)
    return maps if several else maps[:, None]


def entropies(maps: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Entropy of maps ``[B, H, W]`` in nats, as :class:`ramp_fast.metrics.Complexity`; NaN for a map of zeros."""
    sizes = np.abs(maps).reshape(len(maps), -1)
    largest = sizes.max(-1, keepdims=True)
    sizes /= np.where(largest > 0, largest, 1)
    total = sizes.sum(-1, dtype=np.float64)
    logarithms = np.log(sizes, out=np.zeros_like(sizes), where=sizes > 0)
    weighted = (sizes * logarithms).sum(-1, dtype=np.float64)
    safe = np.where(total > 0, total, 1)
    return np.where(total > 0, np.log(safe) - weighted / safe, np.nan)


def box_shares(relevance: npt.NDArray[np.float32], inside: npt.NDArray[np.bool_] | None) -> float:
    """The share of positive relevance ``[H, W]`` inside of a region, as
    :class:`ramp_fast.metrics.RelevanceMassAccuracy`; NaN where there is no region, or nothing in it.
    """
    if inside is None or not inside.any():
        return float("nan")
    positive = np.maximum(relevance, 0).astype(np.float64)
    total = positive.sum()
    return float(positive[inside].sum() / total) if total > 0 else float("nan")


@dataclass(frozen=True)
class Block:
    """Predictions of some images.

    Attributes
    ----------
    label : numpy.ndarray [B]
        The class that the source says; -1 where it says none.
    probabilities : numpy.ndarray [B, classes]
        float32: softmax of the logits, of a single logit the sigmoid.
    top : numpy.ndarray [B, k]
        The classes of the largest logits, best first.
    """

    label: npt.NDArray[np.int32]
    probabilities: npt.NDArray[np.float32]
    top: npt.NDArray[np.int64]

    @classmethod
    def of(cls, logits: npt.NDArray[np.float32], label: npt.NDArray[np.int32]) -> Block:
        """From arrays of a store."""
        if logits.shape[1] == 1:
            probabilities = 1 / (1 + np.exp(-logits))
        else:
            powers = np.exp(logits - logits.max(1, keepdims=True))
            probabilities = powers / powers.sum(1, keepdims=True)
        # Of equal logits the first, as argmax says.
        top = np.argsort(-logits, axis=1, kind="stable")[:, :TOP]
        return cls(label, probabilities.astype(np.float32), top)

    @property
    def predicted(self) -> npt.NDArray[np.int64]:
        """The class of the largest logit."""
        return self.top[:, 0]

    @property
    def confidence(self) -> npt.NDArray[np.float32]:
        """Probability of the predicted class."""
        return self.probabilities[np.arange(len(self.top)), self.predicted]

    @property
    def label_probability(self) -> npt.NDArray[np.float64]:
        """Probability of the class that the source says; NaN where it says none."""
        known = (self.label >= 0) & (self.label < self.probabilities.shape[1])
        found = self.probabilities[np.arange(len(self.label)), np.where(known, self.label, 0)]
        return np.where(known, found, np.nan)


@dataclass
class _OfClass:
    images: int = 0
    correct: int = 0
    confidence: float = 0.0
    entropy: float = 0.0
    with_entropy: int = 0
    mean: npt.NDArray[np.float64] | None = None


@dataclass
class ClassTable:
    """Sums over the images of every class, and over all.

    Attributes
    ----------
    labelled : bool
        Whether classes are those that the source says; else predicted ones.
    """

    labelled: bool
    rows: dict[int, _OfClass] = field(default_factory=dict)
    whole: _OfClass = field(default_factory=_OfClass)
    labels: int = 0
    top1: int = 0
    top5: int = 0

    def add(self, block: Block, entropy: npt.NDArray[np.float64], small: npt.NDArray[np.float32]) -> None:
        """Some images, with their reduced maps ``[B, h, w]``."""
        known = block.label >= 0
        hits = block.top == block.label[:, None]
        self.labels += int(known.sum())
        self.top1 += int((hits[:, 0] & known).sum())
        self.top5 += int((hits.any(1) & known).sum())
        # Every image counts the same, whatever the size of its relevance.
        total = np.abs(small).sum((1, 2), keepdims=True)
        shares = (small / np.where(total > 0, total, 1)).astype(np.float64)
        classes = block.label if self.labelled else block.predicted
        confidence = block.confidence
        for place, number in enumerate(classes.tolist()):
            for one in (self.whole, *([self.rows.setdefault(number, _OfClass())] if number >= 0 else [])):
                one.images += 1
                one.correct += int(hits[place, 0] and known[place])
                one.confidence += float(confidence[place])
                if not np.isnan(entropy[place]):
                    one.entropy += float(entropy[place])
                    one.with_entropy += 1
                if one.mean is None:
                    one.mean = np.zeros(small.shape[1:])
                one.mean += shares[place]
