"""Arithmetic on masses ``[T, B]``: a launch for what would be ten of a few hundred numbers each.

share: t m_i / (m_0 + m_1 + ...)          scale_to: t / m and t, 0 where m is
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ramp_fast.ops._registry import equation

BLOCK = 256
WARPS = 2


@triton.jit(do_not_specialize=["elements"])
def share_kernel(
    target_ptr,  # [elements]
    first_ptr,  # [elements]
    second_ptr,  # [elements]
    third_ptr,  # [elements]; not read unless THREE
    out_ptr,  # [2 or 3, elements]
    elements,
    THREE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < elements
    target = tl.load(target_ptr + place, mask=inside, other=0.0)
    first = tl.load(first_ptr + place, mask=inside, other=0.0)
    second = tl.load(second_ptr + place, mask=inside, other=0.0)
    whole = first + second
    if THREE:
        third = tl.load(third_ptr + place, mask=inside, other=0.0)
        whole += third
        tl.store(out_ptr + 2 * elements + place, target * tl.where(whole == 0, 0.0, third / whole), mask=inside)
    tl.store(out_ptr + place, target * tl.where(whole == 0, 0.0, first / whole), mask=inside)
    tl.store(out_ptr + elements + place, target * tl.where(whole == 0, 0.0, second / whole), mask=inside)


@triton.jit(do_not_specialize=["elements"])
def scale_to_kernel(
    target_ptr,  # [elements]
    actual_ptr,  # [elements]
    scale_ptr,  # [elements]
    mass_ptr,  # [elements]
    elements,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < elements
    target = tl.load(target_ptr + place, mask=inside, other=0.0)
    actual = tl.load(actual_ptr + place, mask=inside, other=0.0)
    tl.store(scale_ptr + place, tl.where(actual == 0, 0.0, target / actual), mask=inside)
    tl.store(mass_ptr + place, tl.where(actual > 0, target, 0.0), mask=inside)


def share(target: Tensor, masses: Sequence[Tensor]) -> Tensor:
    """``ramp_fast::share`` for target and masses of one shape."""
    if any(mass.shape != target.shape for mass in masses):
        raise ValueError(f"masses {[list(mass.shape) for mass in masses]} must have shape {list(target.shape)}")
    if len(masses) not in (2, 3) or any(mass.dtype != target.dtype for mass in masses):
        return equation("share")(target, masses)
    out = torch.empty((len(masses), *target.shape), dtype=target.dtype, device=target.device)
    if out.numel():
        own = [mass.contiguous() for mass in masses]
        with torch.cuda.device_of(target):
            share_kernel[(triton.cdiv(target.numel(), BLOCK),)](
                *(target.contiguous(), own[0], own[1], own[-1], out, target.numel()),
                THREE=len(own) == 3,
                BLOCK=BLOCK,
                num_warps=WARPS,
            )
    return out


def scale_to(target: Tensor, actual: Tensor) -> tuple[Tensor, Tensor]:
    """``ramp_fast::scale_to`` for tensors of one shape."""
    if actual.shape != target.shape:
        raise ValueError(f"target {list(target.shape)} and actual {list(actual.shape)} must have the same shape")
    if actual.dtype != target.dtype:
        return equation("scale_to")(target, actual)
    target, actual = target.contiguous(), actual.contiguous()
    scale, mass = torch.empty_like(target), torch.empty_like(target)
    if scale.numel():
        with torch.cuda.device_of(target):
            scale_to_kernel[(triton.cdiv(target.numel(), BLOCK),)](
                *(target, actual, scale, mass, target.numel()), BLOCK=BLOCK, num_warps=WARPS
            )
    return scale, mass
