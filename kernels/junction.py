"""Junctions ``z = a + b``.

    c_a = 2 [a > 0] c,    c_b = 2 [b > 0] c,    mass_a = sum |a| |c_a|,    mass_b = sum |b| |c_b|

With contrast rows [0, T/2) of c are P and rows [T/2, T) are D = P - N; the masses are those of P and of N. One
program per sample and block of elements: a and b are read once, and every block's masses are summed in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ramp_fast.kernels.common import compute_dtype, sum_partials

BLOCK = 2048
WARPS = 8  # with 4 the kernel takes 181 registers and the loads of few blocks are in flight


@triton.jit
def junction_kernel(
    c_ptr,  # [T, B, inner]
    a_ptr,  # [B, inner]
    b_ptr,  # [B, inner]
    c_a_ptr,  # [T, B, inner]
    c_b_ptr,  # [T, B, inner]
    masses_ptr,  # [2, T, B, blocks]: of a, of b
    batch,  # B
    inner,
    RHS: tl.constexpr,  # T
    CONTRAST: tl.constexpr,
    RELU: tl.constexpr,  # c <- 2 [a + b > 0] c first
    COMPUTE: tl.constexpr,  # float32 or float64
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    sample = tl.program_id(1).to(tl.int64)
    blocks = tl.num_programs(0)
    elements = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = elements < inner
    a = tl.load(a_ptr + sample * inner + elements, mask=inside, other=0.0).to(COMPUTE)
    b = tl.load(b_ptr + sample * inner + elements, mask=inside, other=0.0).to(COMPUTE)

    MAPS: tl.constexpr = RHS // 2 if CONTRAST else RHS
    for t in range(MAPS):
        row = t * batch.to(tl.int64) + sample
        offset = row * inner + elements
        twice = 2 * tl.load(c_ptr + offset, mask=inside, other=0.0).to(COMPUTE)
        if RELU:
            twice = tl.where(a + b > 0, 2 * twice, 0.0)
        tl.store(c_a_ptr + offset, tl.where(a > 0, twice, 0.0).to(c_a_ptr.dtype.element_ty), mask=inside)
        tl.store(c_b_ptr + offset, tl.where(b > 0, twice, 0.0).to(c_b_ptr.dtype.element_ty), mask=inside)
        mass_row = row * blocks + block
        mass_b_row = (RHS * batch.to(tl.int64) + row) * blocks + block
        magnitude = tl.abs(twice)
        tl.store(masses_ptr + mass_row, tl.sum(tl.where(a > 0, a * magnitude, 0.0), 0))
        tl.store(masses_ptr + mass_b_row, tl.sum(tl.where(b > 0, b * magnitude, 0.0), 0))
        if CONTRAST:
            skip = MAPS * batch.to(tl.int64)  # from the row of P to that of D
            offset += skip * inner
            twice_d = 2 * tl.load(c_ptr + offset, mask=inside, other=0.0).to(COMPUTE)
            if RELU:
                twice_d = tl.where(a + b > 0, 2 * twice_d, 0.0)
            tl.store(c_a_ptr + offset, tl.where(a > 0, twice_d, 0.0).to(c_a_ptr.dtype.element_ty), mask=inside)
            tl.store(c_b_ptr + offset, tl.where(b > 0, twice_d, 0.0).to(c_b_ptr.dtype.element_ty), mask=inside)
            magnitude = tl.abs(twice - twice_d)
            mass_row += skip * blocks
            mass_b_row += skip * blocks
            tl.store(masses_ptr + mass_row, tl.sum(tl.where(a > 0, a * magnitude, 0.0), 0))
            tl.store(masses_ptr + mass_b_row, tl.sum(tl.where(b > 0, b * magnitude, 0.0), 0))


def junction(
    c: Tensor, a: Tensor, b: Tensor, contrast: bool, b_dtype: torch.dtype | None = None, relu: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``ramp_fast::junction`` for c [T, B, ...], a and b [B, ...]."""
    if c.ndim < 2 or c.shape[1:] != a.shape or a.shape != b.shape:
        raise ValueError(f"c {list(c.shape)} must be [T, *a.shape] with a {list(a.shape)} and b {list(b.shape)}")
    if contrast and c.shape[0] % 2:
        raise ValueError(f"c {list(c.shape)}: with contrast the first axis holds P and D rows and must be even")
    c, a, b = c.contiguous(), a.contiguous(), b.contiguous()
    c_a = torch.empty_like(c)
    c_b = torch.empty_like(c, dtype=b_dtype or c.dtype)
    dtype, compute = compute_dtype(c, a, b)
    rhs, batch = c.shape[:2]
    inner = c[0, 0].numel() if rhs and batch else 0
    blocks = triton.cdiv(inner, BLOCK)
    masses = torch.empty((2, rhs, batch, blocks), dtype=dtype, device=c.device)
    if masses.numel():
        with torch.cuda.device_of(c):
            junction_kernel[(blocks, batch)](
                c,
                a,
                b,
                c_a,
                c_b,
                masses,
                batch,
                inner,
                RHS=rhs,
                CONTRAST=contrast,
                RELU=relu,
                COMPUTE=compute,
                BLOCK=BLOCK,
                num_warps=WARPS,
            )
    mass_a, mass_b = sum_partials(masses).unbind(0)
    return c_a, c_b, mass_a.clone(), mass_b.clone()
