"""Matrix products: which library routine runs them.

A weighted layer needs two linear functions: the forward one, ``W x + b``, and the pull-back of coefficients. Both are
built once per set of weights.

On CPUs the routines are oneDNN's with weights packed ahead: float32 there is arithmetic in float32, where MKL does not
know the processor about a third faster than the default route; from eight rows on results do not depend on their
number. With tile registers (AMX) matrices are :func:`ramp_fast.ops.product`'s: float32 in int8 slices of 24 bits is
faster than oneDNN's and its errors are smaller, and oneDNN's bfloat16 products there give a row other bits in another
batch. So they are on GPUs, for the same two reasons: float32 in parts of float16 is multiplied by tensor cores, and
cuBLAS chooses the order of its sums by the number of rows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ramp_fast import ops
from ramp_fast.gemm import private_operators

# oneDNN multiplies a row by another routine where it is alone; from two rows on results were equal to the last bit.
FEW_ROWS = 8


def by_sample(function: Callable[..., Tensor], rows: int, operands: tuple[Tensor, ...], axis: int) -> Tensor:
    """``function(*operands)``, where samples along ``axis`` do not show in each other's results.

    On CPUs a sample at a time where each has so few rows that library products would notice the others, and the
    function does not say that it is ``independent``.
    """
    x = operands[0]
    if x.device.type != "cpu" or rows >= FEW_ROWS or x.shape[axis] == 1 or getattr(function, "independent", False):
        return function(*operands)
    samples = zip(*(t.split(1, axis) for t in operands), strict=True)
    return torch.cat([function(*sample) for sample in samples], axis)


class Matrix:
    """``x @ weight.T + bias`` over the last axis; ``weight`` is ``[out, in]``. See the module for what runs it.

    Attributes
    ----------
    independent : bool
        Whether the bits of a row do not depend on how many there are.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.bias = bias
        dtype = str(weight.dtype).removeprefix("torch.")
        self.packed = private_operators.packs_linear(weight)
        self.nbytes = weight.numel() * weight.element_size()
        self.width = weight.shape[0]
        self.tiles: Tensor | None = None
        if weight.numel() and ops.multiplies(weight):
            self.tiles = ops.pack_tiles(weight)
            self.nbytes = self.tiles.numel() * self.tiles.element_size()
            self.kernel = f"product-{dtype}"
        elif self.packed:
            self.weight = private_operators.pack_linear(weight)
            self.kernel = f"onednn-{dtype}"
        else:
            self.weight = weight
            self.kernel = f"aten-{dtype}"
        self.independent = self.tiles is not None or (self.packed and not ops.has_tiles())

    def __call__(self, x: Tensor) -> Tensor:
        if self.tiles is not None:
            return ops.product(x, self.tiles, self.bias, self.width)
        if self.packed and x.numel():
            rows = x.numel() // x.shape[-1]
            if rows >= FEW_ROWS or not self.independent:
                return private_operators.linear(x, self.weight, self.bias)
            # As many as it takes; what they hold does not matter.
            padded = F.pad(x.reshape(rows, -1), (0, 0, 0, FEW_ROWS - rows))
            return private_operators.linear(padded, self.weight, self.bias)[:rows].view(*x.shape[:-1], self.width)
        return F.linear(x, self.weight.to_dense() if self.weight.is_mkldnn else self.weight, self.bias)


class Selection:
    """The pull-back of a matrix ``[out, in]`` whose input has both signs: ``W+`` or ``W-`` by the input's sign."""

    def __init__(self, weight: Tensor) -> None:
        self.panels = ops.pack_panels(weight)
        self.nbytes = self.panels.numel() * self.panels.element_size()
        self.kernel = f"linear_pullback-{str(weight.dtype).removeprefix('torch.')} W+/W-"

    def __call__(self, c: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
        """``c`` ``[T, B, ..., out]`` at the input ``x`` ``[B, ..., in]``."""
        return ops.linear_pullback(c, self.panels, x, dtype)

    def through_norm(
        self, c: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, contrast: bool
    ) -> tuple[Tensor, Tensor]:
        """On through the LayerNorm of ``x`` that the input is; with masses ``[T, B]``."""
        return ops.linear_norm_pullback(c, self.panels, x, weight, bias, eps, contrast)


def positive_part(weight: Tensor) -> Tensor:
    return weight.clamp_min(0)


def negative_part(weight: Tensor) -> Tensor:
    return weight.neg().clamp_min(0)
