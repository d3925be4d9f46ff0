"""Junctions ``z = a + b``.

    c_a = 2 [a > 0] c,    c_b = 2 [b > 0] c,    mass_a = sum |a| |c_a|,    mass_b = sum |b| |c_b|

With contrast rows [0, T/2) of c are P and rows [T/2, T) are D = P - N; the masses are those of P and of N. One
program per sample and block of elements: a and b are read once, and every block's masses are summed in a fixed order.
c may be the sum of two scaled coefficients, merged on the way (``merge_junction``).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ramp_fast.kernels.common import compute_dtype, sum_partials
from ramp_fast.kernels.scaling import (
    block_of_sample,
    check_shapes,
    inner_size,
    load_merged_pair,
    load_pair,
    store_masses,
    store_pair,
)
from ramp_fast.ops._layout import same_layout

BLOCK = 1024
WARPS = 8  # 16 bytes of each operand a thread; with twice that the kernel takes 150 registers


@triton.jit
def _store_branch(
    out_ptr,  # [T, B, inner]
    masses_ptr,  # [T, B, blocks]
    row,  # of P in [T, B]
    row_d,
    inner,
    elements,
    inside,
    blocks,
    block,
    x,
    p,
    d,
    CONTRAST: tl.constexpr,
):
    """What the branch x of a sum gets, and its masses."""
    gated_p = tl.where(x > 0, p, 0.0)
    gated_d = tl.where(x > 0, d, 0.0)
    store_pair(out_ptr, row, row_d, inner, elements, inside, gated_p, gated_d, CONTRAST)
    of_p = tl.where(x > 0, x * tl.abs(p), 0.0)
    of_n = tl.where(x > 0, x * tl.abs(p - d), 0.0)
    store_masses(masses_ptr, row, row_d, blocks, block, of_p, of_n, CONTRAST)


@triton.jit(do_not_specialize=["batch"])
def junction_kernel(
    c_ptr,  # [T, B, inner]
    c_scale_ptr,  # [T, B]; this and the next two are not read unless MERGE: c is the sum of two, scaled
    second_ptr,  # [T, B, inner]
    second_scale_ptr,  # [T, B]
    a_ptr,  # [B, inner]
    b_ptr,  # [B, inner]
    c_a_ptr,  # [T, B, inner]
    c_b_ptr,  # [T, B, inner]
    masses_ptr,  # [2, T, B, blocks]: of a, of b
    batch,  # B
    inner,
    NUM_MAPS: tl.constexpr,  # T
    CONTRAST: tl.constexpr,
    MERGE: tl.constexpr,
    RELU: tl.constexpr,  # c <- 2 [a + b > 0] c first
    COMPUTE: tl.constexpr,  # float32 or float64
    BLOCK: tl.constexpr,
):
    sample, block, elements, inside = block_of_sample(inner, BLOCK)
    blocks = tl.cdiv(inner, BLOCK)
    a = tl.load(a_ptr + sample * inner + elements, mask=inside, other=0.0).to(COMPUTE)
    b = tl.load(b_ptr + sample * inner + elements, mask=inside, other=0.0).to(COMPUTE)

    masses_b_ptr = masses_ptr + NUM_MAPS * batch.to(tl.int64) * blocks
    GROUPS: tl.constexpr = NUM_MAPS // 2 if CONTRAST else NUM_MAPS
    for t in range(GROUPS):
        row = t * batch.to(tl.int64) + sample
        row_d = row + GROUPS * batch.to(tl.int64)
        if MERGE:
            p, d = load_merged_pair(
                *(c_ptr, c_scale_ptr, second_ptr, second_scale_ptr),
                *(row, row_d, inner, elements, inside, CONTRAST, COMPUTE),
            )
        else:
            p, d = load_pair(c_ptr, row, row_d, inner, elements, inside, CONTRAST, COMPUTE)
        p = 2 * p
        d = 2 * d
        if RELU:
            p = tl.where(a + b > 0, 2 * p, 0.0)
            d = tl.where(a + b > 0, 2 * d, 0.0)
        _store_branch(c_a_ptr, masses_ptr, row, row_d, inner, elements, inside, blocks, block, a, p, d, CONTRAST)
        _store_branch(c_b_ptr, masses_b_ptr, row, row_d, inner, elements, inside, blocks, block, b, p, d, CONTRAST)


def _launch(
    parts: tuple[Tensor, ...], dtypes: tuple[torch.dtype, torch.dtype], contrast: bool, relu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch for parts (c, a, b) or (first, its scale, second, its scale, a, b), in one memory layout."""
    c, a, b = parts[0], *parts[-2:]
    merge = len(parts) == 6
    c_a, c_b = (torch.empty_like(c, dtype=dtype) for dtype in dtypes)
    dtype, compute = compute_dtype(*parts)
    num_maps, batch = c.shape[:2]
    inner = inner_size(c)
    blocks = triton.cdiv(inner, BLOCK)
    masses = torch.empty((2, num_maps, batch, blocks), dtype=dtype, device=c.device)
    if masses.numel():
        with torch.cuda.device_of(c):
            junction_kernel[(blocks * batch,)](
                c,
                *(parts[1:4] if merge else (c, c, c)),
                *(a, b, c_a, c_b, masses, batch, inner),
                NUM_MAPS=num_maps,
                CONTRAST=contrast,
                MERGE=merge,
                RELU=relu,
                COMPUTE=compute,
                BLOCK=BLOCK,
                num_warps=WARPS,
            )
    return c_a, c_b, sum_partials(masses[0]), sum_partials(masses[1])


def junction(
    c: Tensor, a: Tensor, b: Tensor, contrast: bool, b_dtype: torch.dtype | None = None, relu: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``ramp_fast::junction`` for c [T, B, ...], a and b [B, ...]."""
    check_shapes(c, (a, b), (), contrast)
    c, a, b = same_layout((c,), (a, b))
    return _launch((c, a, b), (c.dtype, b_dtype or c.dtype), contrast, relu)


def merge_junction(
    first: Tensor,
    first_scale: Tensor,
    second: Tensor,
    second_scale: Tensor,
    a: Tensor,
    b: Tensor,
    contrast: bool,
    b_dtype: torch.dtype | None = None,
    relu: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``ramp_fast::merge_junction`` for first and second [T, B, ...], scales [T, B], a and b [B, ...]."""
    if first.shape != second.shape:
        raise ValueError(f"first {list(first.shape)} and second {list(second.shape)} must have the same shape")
    check_shapes(first, (a, b), (first_scale, second_scale), contrast)
    out_dtype = torch.promote_types(first.dtype, second.dtype)
    first, second, a, b = same_layout((first, second), (a, b))
    parts = first, first_scale.contiguous(), second, second_scale.contiguous(), a, b
    return _launch(parts, (out_dtype, b_dtype or out_dtype), contrast, relu)
