"""Softmax: ``c_S = (sign(S) softmax(S) + softmax(|S|)) c`` over rows of scores, -inf where masked.

For attention whose scores are in memory; :mod:`ramp_fast.ops.attention` pulls back attention as a whole.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ramp_fast.ops._common import compute_dtype
from ramp_fast.ops._registry import operator


@operator(
    outputs=lambda _, c: torch.empty_like(c, memory_format=torch.contiguous_format), triton="softmax:softmax_pullback"
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
    dtype = compute_dtype(scores, c)
    s = scores.to(dtype)
    masked = s == -torch.inf
    absolute = s.abs().masked_fill(masked, -torch.inf)
    weight = s.sign() * s.softmax(-1) + absolute.softmax(-1)
    weight = weight.masked_fill(masked, 0)  # also rows masked as a whole, whose softmax is NaN
    return torch.where(weight == 0, torch.zeros_like(weight), weight * c.to(dtype)).to(c.dtype).contiguous()
