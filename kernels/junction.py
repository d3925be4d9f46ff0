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
from ramp_fast.kernels.scaling import check_sides, inner_size, merged_sides
from ramp_fast.ops._common import same_layout

BLOCK = 1024
WARPS = 8  # 16 bytes of each operand a thread; with twice that the kernel takes 150 registers


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
    RHS: tl.constexpr,  # T
    CONTRAST: tl.constexpr,
    MERGE: tl.constexpr,
    RELU: tl.constexpr,  # c <- 2 [a + b > 0] c first
    COMPUTE: tl.constexpr,  # float32 or float64
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(inner, BLOCK)
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    elements = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = elements < inner
    a = tl.load(a_ptr + sample * inner + elements, mask=inside, other=0.0).to(COMPUTE)
    b = tl.load(b_ptr + sample * inner + elements, mask=inside, other=0.0).to(COMPUTE)

    MAPS: tl.constexpr = RHS // 2 if CONTRAST else RHS
    for t in range(MAPS):
        row = t * batch.to(tl.int64) + sample
        row_d = row + MAPS * batch.to(tl.int64)
        offset = row * inner + elements
        offset_d = row_d * inner + elements
        if MERGE:
            p, d = merged_sides(
                c_ptr,
                c_scale_ptr,
                second_ptr,
                second_scale_ptr,
                row,
                row_d,
                offset,
                offset_d,
                inside,
                CONTRAST,
                COMPUTE,
            )
        else:
            p = tl.load(c_ptr + offset, mask=inside, other=0.0).to(COMPUTE)
            d = p
            if CONTRAST:
                d = tl.load(c_ptr + offset_d, mask=inside, other=0.0).to(COMPUTE)
        p = 2 * p
        if RELU:
            p = tl.where(a + b > 0, 2 * p, 0.0)
        mass_row = row * blocks + block
        mass_b_row = (RHS * batch.to(tl.int64) + row) * blocks + block
        tl.store(c_a_ptr + offset, tl.where(a > 0, p, 0.0).to(c_a_ptr.dtype.element_ty), mask=inside)
        tl.store(c_b_ptr + offset, tl.where(b > 0, p, 0.0).to(c_b_ptr.dtype.element_ty), mask=inside)
        tl.store(masses_ptr + mass_row, tl.sum(tl.where(a > 0, a * tl.abs(p), 0.0), 0))
        tl.store(masses_ptr + mass_b_row, tl.sum(tl.where(b > 0, b * tl.abs(p), 0.0), 0))
        if CONTRAST:
            d = 2 * d
            if RELU:
                d = tl.where(a + b > 0, 2 * d, 0.0)
            mass_row += MAPS * batch.to(tl.int64) * blocks
            mass_b_row += MAPS * batch.to(tl.int64) * blocks
            n = tl.abs(p - d)
            tl.store(c_a_ptr + offset_d, tl.where(a > 0, d, 0.0).to(c_a_ptr.dtype.element_ty), mask=inside)
            tl.store(c_b_ptr + offset_d, tl.where(b > 0, d, 0.0).to(c_b_ptr.dtype.element_ty), mask=inside)
            tl.store(masses_ptr + mass_row, tl.sum(tl.where(a > 0, a * n, 0.0), 0))
            tl.store(masses_ptr + mass_b_row, tl.sum(tl.where(b > 0, b * n, 0.0), 0))


def _split(
    parts: tuple[Tensor, ...], dtypes: tuple[torch.dtype, torch.dtype], contrast: bool, relu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch for parts (c, a, b) or (first, its scale, second, its scale, a, b), in one memory layout."""
    c, a, b = parts[0], *parts[-2:]
    merge = len(parts) == 6
    c_a, c_b = (torch.empty_like(c, dtype=dtype) for dtype in dtypes)
    dtype, compute = compute_dtype(*parts)
    rhs, batch = c.shape[:2]
    inner = inner_size(c)
    blocks = triton.cdiv(inner, BLOCK)
    masses = torch.empty((2, rhs, batch, blocks), dtype=dtype, device=c.device)
    if masses.numel():
        with torch.cuda.device_of(c):
            junction_kernel[(blocks * batch,)](
                c,
                *(parts[1:4] if merge else (c, c, c)),
                *(a, b, c_a, c_b, masses, batch, inner),
                RHS=rhs,
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
    check_sides(c, (a, b), (), contrast)
    c, a, b = same_layout((c,), (a, b))
    return _split((c, a, b), (c.dtype, b_dtype or c.dtype), contrast, relu)


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
    check_sides(first, (a, b), (first_scale, second_scale), contrast)
    out_dtype = torch.promote_types(first.dtype, second.dtype)
    first, second, a, b = same_layout((first, second), (a, b))
    parts = first, first_scale.contiguous(), second, second_scale.contiguous(), a, b
    return _split(parts, (out_dtype, b_dtype or out_dtype), contrast, relu)
