"""One table of tolerances, and the comparison that uses it.

An error is measured in units of the element's magnitude: the sum of the absolute values of the terms that it is the
sum of (``Case.magnitude``). So cancellation is allowed for exactly, and nothing else is.
"""

from __future__ import annotations

import torch
from torch import Tensor

# What storing a result in its dtype costs: half a unit in the last place.
STORE = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.int32: 0.0}

# What computing it costs, by operator and dtype of arithmetic, each with its reason.
COMPUTE = {
    # 512 terms are summed in 16 or fewer float lanes before they go on in double
    ("mass", torch.float32): 2e-6,
    ("mass", torch.float64): 1e-14,
    # two products and two sums
    ("rescale", torch.float32): 4e-7,
    ("rescale", torch.float64): 1e-15,
    ("rescale_parts", torch.float32): 4e-7,
    ("rescale_parts", torch.float64): 1e-15,
    # twice that and a sum
    ("merge", torch.float32): 6e-7,
    ("merge", torch.float64): 2e-15,
    # coefficients are exact (times 2); the masses as above
    ("junction", torch.float32): 2e-6,
    ("junction", torch.float64): 1e-14,
    # merge, then masses
    ("merge_junction", torch.float32): 3e-6,
    ("merge_junction", torch.float64): 1e-14,
    # variances of a row in float32, two passes; square root and division halve and round
    ("norm_pullback", torch.float32): 4e-6,
    ("norm_pullback", torch.float64): 1e-13,
    # the same, and a mean
    ("norm_gradient", torch.float32): 4e-6,
    ("norm_gradient", torch.float64): 1e-13,
    # up to 64 terms summed one after another; products of bfloat16 are exact
    ("linear_pullback", torch.float32): 4e-6,
    ("linear_pullback", torch.float64): 8e-15,
    # of bfloat16 the same; what int8 slices of float32 lose is in Case.magnitude, its parts lose up to 2^-21 of a term
    ("product", torch.float32): 1e-6,
    ("product", torch.float64): 8e-15,
    # the same, the norm's factor and a mass
    ("linear_norm_pullback", torch.float32): 1e-5,
    ("linear_norm_pullback", torch.float64): 1e-13,
    # with N scaled: 1 - s, two products, a sum and a product (test_kernels.py: without, one product or none)
    ("scale_by", torch.float32): 5e-7,
    ("scale_by", torch.float64): 1e-15,
    # a sum of numbers of one sign, a quotient (two units on GPUs) and a product
    ("ratio", torch.float32): 6e-7,
    ("ratio", torch.float64): 1e-15,
    ("gate", torch.float32): 4e-7,
    ("gate", torch.float64): 1e-15,
    # the same; the factor is exact
    ("affine_pullback", torch.float32): 5e-7,
    ("affine_pullback", torch.float64): 1e-15,
    # two sums of up to 2048 terms that are not negative, and their quotient
    ("centring", torch.float32): 2e-6,
    ("centring", torch.float64): 1e-14,
    # up to five terms that are not negative, a quotient (two units on GPUs) and a product
    ("share", torch.float32): 6e-7,
    ("share", torch.float64): 1e-15,
    ("scale_to", torch.float32): 2e-7,
    ("scale_to", torch.float64): 3e-16,
    # as merge_junction
    ("residual_pullback", torch.float32): 3e-6,
    ("residual_pullback", torch.float64): 1e-14,
    # up to four terms
    ("unpool", torch.float32): 4e-7,
    ("unpool", torch.float64): 1e-15,
    # a choice
    ("select_phases", torch.float32): 0.0,
    ("select_phases", torch.float64): 0.0,
    # rational erf (3e-7 near its clamp at 4), exp with 1e-7, argument squares up to 100 half-units
    ("activation_factor", torch.float32): 6e-7,
    ("activation_factor", torch.float64): 1e-15,
    # two products; sums in blocks, in double from there on
    ("mul_pullback", torch.float32): 4e-6,
    ("mul_pullback", torch.float64): 1e-14,
    ("mul_gradient", torch.float32): 4e-6,
    ("mul_gradient", torch.float64): 1e-14,
    # moved, and rounded to the dtype that is asked for
    ("sides", torch.float32): 0.0,
    ("sides", torch.float64): 0.0,
    ("spread", torch.float32): 4e-6,
    ("spread", torch.float64): 1e-14,
    ("piece_masses", torch.float32): 4e-6,
    ("piece_masses", torch.float64): 1e-14,
    # up to four terms of two products each
    ("merge_pieces", torch.float32): 2e-6,
    ("merge_pieces", torch.float64): 4e-15,
    # three products; sums in blocks, in double from there on
    ("gating_pullback", torch.float32): 2e-6,
    ("gating_pullback", torch.float64): 1e-14,
    # as rescale
    ("rescale_pieces", torch.float32): 4e-7,
    ("rescale_pieces", torch.float64): 1e-15,
    # two products and a sum
    ("rotary", torch.float32): 2e-7,
    ("rotary", torch.float64): 4e-16,
    # the same with weights that are sums, masses of a row's heads in float, quotients of masses, and rescale
    ("rotary_pullback", torch.float32): 2e-6,
    ("rotary_pullback", torch.float64): 1e-14,
    # up to 15 terms and a bias
    ("depthwise", torch.float32): 2e-6,
    ("depthwise", torch.float64): 4e-15,
    # the same without the slope
    ("activation_share", torch.float32): 6e-7,
    ("activation_share", torch.float64): 1e-15,
    # a product and a sum; the factor is two sums
    ("affine_factor", torch.float32): 2e-7,
    ("affine_factor", torch.float64): 4e-16,
    # a choice and at most one product
    ("max_pool_pullback", torch.float32): 1e-7,
    ("max_pool_pullback", torch.float64): 2e-16,
    # an order, and values that are moved: exact
    ("mask_steps", torch.float32): 0.0,
    ("mask_steps", torch.float64): 0.0,
    ("masked_copies", torch.float32): 0.0,
    ("masked_copies", torch.float64): 0.0,
    # exp(s - max) carries the rounding of s - max: 2^-24 times up to 60, twice
    ("softmax_pullback", torch.float32): 8e-6,
    ("softmax_pullback", torch.float64): 2e-14,
    # softmax as above on exact scores, then up to 513 terms summed one after another, three times in a row
    ("attention_pullback", torch.float32): 8e-6,
    ("attention_pullback", torch.float64): 3e-14,
    # products of bfloat16: three operands are rounded on the way to c_Q (V+, c_S, K+) and c_K, 2^-8 each
    ("attention_pullback", torch.bfloat16): 1.2e-2,
    # the same without a second softmax; the sum over keys is one more
    ("attention_gradient", torch.float32): 8e-6,
    ("attention_gradient", torch.float64): 3e-14,
    ("attention_gradient", torch.bfloat16): 1.2e-2,
}

# Below this, exp flushes to zero (exp(-87) and smaller) and products leave the range of float32.
FLOOR = 1e-36


def assert_close(
    name: str, index: int, actual: Tensor, expected: Tensor, magnitude: Tensor, arithmetic: torch.dtype
) -> None:
    """Compare one output with its float64 reference; the message names the worst element and how many fail."""
    assert actual.shape == expected.shape
    if actual.numel() == 0:
        return
    assert not actual.isnan().any(), (
        f"{name}[{index}]: {int(actual.isnan().sum())} elements are NaN or were not written"
    )
    allowed = (COMPUTE[name, arithmetic] + STORE[actual.dtype]) * magnitude.expand_as(expected) + FLOOR
    error = (actual.double() - expected).abs()
    failing = error > allowed
    if failing.any():
        ratio = (error / allowed).flatten()
        worst = int(ratio.argmax())
        position = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), expected.shape))
        norm = expected.norm().clamp_min(torch.finfo(torch.float64).tiny)
        raise AssertionError(
            f"{name}[{index}] {tuple(expected.shape)} {actual.dtype}: {int(failing.sum())} of {failing.numel()} "
            f"elements are off, worst {ratio[worst]:.3g} times the tolerance at {position}: "
            f"{actual.flatten()[worst].item()!r} instead of {expected.flatten()[worst].item()!r}; "
            f"relative error of the whole {float(error.norm() / norm):.3g}"
        )
