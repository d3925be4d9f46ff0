"""Maps before they are measured, their sign and scale, and how alike two of them are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ramp_fast.errors import InputError

SIGNS = ("signed", "positive", "absolute")
Sign = Literal["signed", "positive", "absolute"]

# Side of the windows of SSIM and its two constants, as in Wang et al. 2004 and scikit-image.
WINDOW = 7
_K1, _K2 = 0.01, 0.03


def checked_sign(metric: str, sign: Sign) -> Sign:
    """``sign``, if it is one."""
    if sign not in SIGNS:
        raise InputError(f"{metric}: sign must be one of {', '.join(map(repr, SIGNS))}; got {sign!r}")
    return sign


def with_sign(maps: Tensor, sign: Sign) -> Tensor:
    """The maps, their positive part or their absolute values."""
    if sign == "positive":
        return maps.clamp_min(0)
    return maps.abs() if sign == "absolute" else maps


def scaled(maps: Tensor) -> Tensor:
    """Each map ``[N, ...]`` divided by its own largest absolute value; a map of zeros stays one."""
    largest = maps.flatten(1).abs().amax(1)
    return maps / largest.masked_fill(largest == 0, 1).view(-1, *[1] * (maps.dim() - 1))


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of maps ``[N, H, W]``, ``[N]`` in [-1, 1]; NaN where both are the same constant.

    Wang et al. 2004 (IEEE TIP 13(4)) with scikit-image's defaults: windows of 7 x 7 that weigh all entries alike, the
    sample's covariance, windows that fit into the map, and the range of values of both maps together.
    """
    return _ssim(a, b, (WINDOW, WINDOW))


def ssim_flat(a: Tensor, b: Tensor) -> Tensor:
    """:func:`ssim` with windows of 7 entries in reading order: what Quantus computes."""
    return _ssim(a.flatten(1).unsqueeze(1), b.flatten(1).unsqueeze(1), (1, WINDOW))


def _ssim(a: Tensor, b: Tensor, window: tuple[int, int]) -> Tensor:
    entries = window[0] * window[1]
    moments = torch.stack([a, b, a * a, b * b, a * b], 1)
    mean_a, mean_b, *products = F.avg_pool2d(moments, window, stride=1).unbind(1)
    of_sample = entries / (entries - 1)
    variance_a = of_sample * (products[0] - mean_a * mean_a)
    variance_b = of_sample * (products[1] - mean_b * mean_b)
    covariance = of_sample * (products[2] - mean_a * mean_b)
    both = torch.cat([a.flatten(1), b.flatten(1)], 1)
    extent = (both.amax(1) - both.amin(1)).view(-1, 1, 1)
    c1, c2 = (_K1 * extent) ** 2, (_K2 * extent) ** 2
    alike = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    size = (mean_a**2 + mean_b**2 + c1) * (variance_a + variance_b + c2)
    return (alike / size).flatten(1).mean(1).masked_fill(extent.flatten() == 0, torch.nan)


def pearson(a: Tensor, b: Tensor) -> Tensor:
    """Correlation over the last axis, float64 in [-1, 1]; NaN where one of them is constant, up to rounding."""
    a, b = (levelled - levelled.mean(-1, keepdim=True) for levelled in (_levelled(a), _levelled(b)))
    found: Tensor = (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))
    return found.clamp(-1, 1)


def spearman(a: Tensor, b: Tensor) -> Tensor:
    """Correlation of ranks over the last axis, equal entries sharing theirs; see :func:`pearson`."""
    return pearson(_ranks(_levelled(a)), _ranks(_levelled(b)))


def _levelled(values: Tensor) -> Tensor:
    """In float64; zeros where only rounding tells the entries of the last axis apart."""
    values = values.double()
    around = (values - values.mean(-1, keepdim=True)).norm(dim=-1, keepdim=True)
    return values.masked_fill(around <= 1e-13 * values.norm(dim=-1, keepdim=True), 0)


def _ranks(values: Tensor) -> Tensor:
    """Along the last axis, float64 from 1; the mean rank among equals."""
    ordered, order = values.sort(-1)
    place = torch.arange(values.shape[-1], device=values.device)
    differs = ordered.diff(dim=-1) != 0
    # the first and the last place of every run of equals
    first = (F.pad(differs, (1, 0), value=True) * place).cummax(-1).values
    last = place.where(F.pad(differs, (0, 1), value=True), values.shape[-1]).flip(-1).cummin(-1).values.flip(-1)
    mean = (first + last).double() / 2 + 1
    return torch.empty_like(mean).scatter_(-1, order, mean)


SIMILARITIES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "ssim": ssim,
    "ssim_flat": ssim_flat,
    "spearman": lambda a, b: spearman(a.flatten(1), b.flatten(1)),
    "pearson": lambda a, b: pearson(a.flatten(1), b.flatten(1)),
}
"""Of maps ``[N, H, W]``: numbers ``[N]`` in [-1, 1], 1 for the same map."""
