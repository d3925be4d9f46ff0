"""Softmax: ``c_S = (sign(S) softmax(S) + softmax(|S|)) c`` over rows of scores, -inf where masked."""

from __future__ import annotations

import torch
from torch import Tensor, get_num_threads

from ramp_fast.ops._common import C, compute_dtype
from ramp_fast.ops._registry import register


def _softmax_pullback_reference(scores: Tensor, c: Tensor) -> Tensor:
    dtype = compute_dtype(scores, c)
    s = scores.to(dtype)
    masked = s == -torch.inf
    absolute = s.abs().masked_fill(masked, -torch.inf)
    weight = s.sign() * s.softmax(-1) + absolute.softmax(-1)
    weight = weight.masked_fill(masked, 0)  # also rows masked as a whole, whose softmax is NaN
    return torch.where(weight == 0, torch.zeros_like(weight), weight * c.to(dtype)).to(c.dtype).contiguous()


def _softmax_pullback_fake(scores: Tensor, c: Tensor) -> Tensor:
    return torch.empty_like(c, memory_format=torch.contiguous_format)


def _softmax_pullback_cpu(scores: Tensor, c: Tensor) -> Tensor:
    out = torch.empty(c.shape, dtype=c.dtype)
    C.softmax_pullback(scores.contiguous(), c.contiguous(), out, get_num_threads())
    return out


_softmax_pullback = register(
    "softmax_pullback(Tensor scores, Tensor c) -> Tensor",
    reference=_softmax_pullback_reference,
    fake=_softmax_pullback_fake,
    cpu=_softmax_pullback_cpu,
)


def softmax_pullback(scores: Tensor, c: Tensor) -> Tensor:
    """Pull coefficients of attention weights back to the scores.

    Parameters
    ----------
    scores : Tensor [B, H, N, M]
        What softmax was taken of: scaled, with any bias added, -inf where masked.
    c : Tensor [T, B, H, N, M]

    Returns
    -------
    Tensor [T, B, H, N, M] in the dtype of c
        0 where masked, and in rows that are masked as a whole.
    """
    return _softmax_pullback(scores, c)  # type: ignore[no-any-return]
