"""Memory layouts that elementwise kernels take."""

from __future__ import annotations

import torch
from torch import Tensor


def same_layout(coefficients: tuple[Tensor, ...], samples: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Give coefficients [T, B, ...] and samples [B, ...] one dense memory layout.

    Elementwise kernels see memory as [T, B, elements], so any order of the inner axes will do as long as it is
    the same everywhere (channels-last, for example); otherwise every tensor is made contiguous.
    """
    tensors = coefficients + samples
    if all(tensor.is_contiguous() for tensor in tensors) or alike(tensors, len(coefficients)):
        return tensors
    return tuple([tensor.contiguous() for tensor in tensors])


def rows_dense(t: Tensor) -> Tensor:
    """``t`` with neighbours side by side along the last axis: parts of wider rows are not copied."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def alike(tensors: tuple[Tensor, ...], count: int) -> bool:
    """Whether ``count`` coefficients and the samples behind them have one dense layout, with samples outermost."""
    first = tensors[0]
    shape, strides = first.shape, first.stride()
    inner_shape, inner_strides = shape[1:], strides[1:]
    return (
        first.ndim > 2
        and strides[0] == first[0].numel()
        and strides[1] == first[0, 0].numel()
        and _is_dense(shape[2:], strides[2:])
        and all(tensor.stride() == strides and tensor.shape == shape for tensor in tensors[1:count])
        and all(tensor.stride() == inner_strides and tensor.shape == inner_shape for tensor in tensors[count:])
    )


def _is_dense(shape: torch.Size, strides: tuple[int, ...]) -> bool:
    run = 1
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size != 1:
            if stride != run:
                return False
            run *= size
    return True
