"""Softmax: ``c_S = (sign(S) softmax(S) + softmax(|S|)) c`` over rows of scores, -inf where masked.

One program per row: maxima, then sums, then every map; the row stays in cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ramp_fast.kernels.common import compute_dtype

MAX_BLOCK = 4096


@triton.jit(do_not_specialize=["rows"])
def softmax_pullback_kernel(
    scores_ptr,  # [rows, width]
    c_ptr,  # [T, rows, width]
    out_ptr,  # [T, rows, width]
    rows,
    NUM_MAPS: tl.constexpr,  # T
    WIDTH: tl.constexpr,
    COMPUTE: tl.constexpr,  # float32 or float64
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    scores_row = scores_ptr + row * WIDTH
    highest = tl.full([BLOCK], float("-inf"), COMPUTE)
    highest_absolute = tl.full([BLOCK], float("-inf"), COMPUTE)
    for start in range(0, WIDTH, BLOCK):
        s = tl.load(scores_row + start + columns, mask=start + columns < WIDTH, other=float("-inf")).to(COMPUTE)
        highest = tl.maximum(highest, s)
        highest_absolute = tl.maximum(highest_absolute, tl.where(s == float("-inf"), s, tl.abs(s)))
    # A row that is masked as a whole has no maximum, and no weight either.
    top = tl.max(highest, 0)
    top = tl.where(top == float("-inf"), 0.0, top)
    top_absolute = tl.max(highest_absolute, 0)
    top_absolute = tl.where(top_absolute == float("-inf"), 0.0, top_absolute)
    total = tl.zeros([BLOCK], COMPUTE)
    total_absolute = tl.zeros([BLOCK], COMPUTE)
    for start in range(0, WIDTH, BLOCK):
        s = tl.load(scores_row + start + columns, mask=start + columns < WIDTH, other=float("-inf")).to(COMPUTE)
        total += tl.exp(s - top)
        total_absolute += tl.where(s == float("-inf"), 0.0, tl.exp(tl.abs(s) - top_absolute))
    inverse = 1 / tl.sum(total, 0)
    inverse_absolute = 1 / tl.sum(total_absolute, 0)
    for start in range(0, WIDTH, BLOCK):
        inside = start + columns < WIDTH
        s = tl.load(scores_row + start + columns, mask=inside, other=float("-inf")).to(COMPUTE)
        a = tl.exp(s - top) * inverse
        weight = tl.where(s > 0, a, tl.where(s < 0, -a, 0.0)) + tl.exp(tl.abs(s) - top_absolute) * inverse_absolute
        weight = tl.where(s == float("-inf"), 0.0, weight)
        for t in range(NUM_MAPS):
            offset = (t * rows.to(tl.int64) + row) * WIDTH + start + columns
            c = tl.load(c_ptr + offset, mask=inside, other=0.0).to(COMPUTE)
            out = tl.where(weight == 0, 0.0, weight * c)
            tl.store(out_ptr + offset, out.to(out_ptr.dtype.element_ty), mask=inside)


def softmax_pullback(scores: Tensor, c: Tensor) -> Tensor:
    """``ramp_fast::softmax_pullback`` for scores [B, H, N, M] and c [T, B, H, N, M]."""
    if scores.ndim < 1 or c.shape[1:] != scores.shape:
        raise ValueError(f"c {list(c.shape)} and scores {list(scores.shape)} do not fit together")
    scores, c = scores.contiguous(), c.contiguous()
    out = torch.empty_like(c)
    if out.numel():
        width = scores.shape[-1]
        block = min(triton.next_power_of_2(width), MAX_BLOCK)
        rows = scores.numel() // width
        with torch.cuda.device_of(c):
            softmax_pullback_kernel[(rows,)](
                *(scores, c, out, rows),
                NUM_MAPS=c.shape[0],
                WIDTH=width,
                COMPUTE=compute_dtype(scores, c)[1],
                BLOCK=block,
                num_warps=4 if block <= 1024 else 8,
            )
    return out
