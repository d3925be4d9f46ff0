"""Relevance as it is stored: channels summed or kept, in few bits, with a scale for each map."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["encode"]

_INT8 = 127.0


def encode(maps: Tensor, dtype: str, channels: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Maps as a store has them.

    Parameters
    ----------
    maps : Tensor [B, C, H, W] or [B, K, C, H, W]
        Of an engine, on any device.
    dtype : {"float16", "int8", "float32"}
        float16 holds maps divided by their largest absolute value, to 2^-12 of it; int8 whole steps of 1/127 of that,
        to half a step; float32 the relevance itself.
    channels : bool
        Keep channels; else they are summed.

    Returns
    -------
    values : Tensor [B, (K,) (C,) H, W]
        In ``dtype``.
    scale : Tensor [B] or [B, K]
        float32: relevance is ``values * scale``.
    finite : bool Tensor [B]
        Whether all relevance of an image is.
    """
    maps = maps.to(torch.float32)
    if not channels:
        # In one order of sums, whatever a reduction would choose for this shape.
        total = maps.select(-3, 0).clone()
        for channel in range(1, maps.shape[-3]):
            total += maps.select(-3, channel)
        maps = total
    lead = maps.dim() - (3 if channels else 2)
    low, high = _extremes(maps.flatten(lead))
    largest = torch.maximum(high, -low)
    finite = largest.isfinite()
    if dtype == "float32":
        values, scale = maps, torch.ones_like(largest)
    else:
        divisor = torch.where(largest > 0, largest, 1).reshape(*largest.shape, *(1,) * (maps.dim() - lead))
        if dtype == "float16":
            values, scale = (maps / divisor).to(torch.float16), largest
        else:
            values, scale = (maps / divisor * _INT8).round_().to(torch.int8), largest / _INT8
    return values, scale, finite if finite.dim() == 1 else finite.all(1)


def _extremes(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Least and largest values along the last axis; both NaN where any value is."""
    if rows.device.type != "cpu":
        low, high = rows.aminmax(dim=-1)
        return low, high
    # Along an axis the CPU's reduction is four times as slow as over all of a tensor.
    found = torch.stack([torch.stack(row.aminmax()) for row in rows.reshape(-1, rows.shape[-1])])
    return found[:, 0].reshape(rows.shape[:-1]), found[:, 1].reshape(rows.shape[:-1])
