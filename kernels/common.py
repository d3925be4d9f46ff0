"""Launch helpers that the kernel families share."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor


def compute_dtype(*tensors: Tensor | None) -> tuple[torch.dtype, tl.dtype]:
    """The dtype of arithmetic and masses, for torch and for Triton."""
    wide = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return (torch.float64, tl.float64) if wide else (torch.float32, tl.float32)
