"""Linear layers whose input has both signs: ``c_x = W+^T c`` where x > 0, ``W-^T c`` where x < 0.

Weights are packed into panels (:func:`pack_panels`) in the layout of the backend that will run. Those of the CPU kernel
hold W once, with its signs: it multiplies only by the half that the sign of each input asks for. Those of the Triton
kernel hold both halves, W+ and W-: tensor cores multiply by both, and the result is chosen afterwards.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ramp_fast.ops._common import mass_equation
from ramp_fast.ops._registry import backends_for, operator
from ramp_fast.ops.norm import inverse_sigma, norm_factor

# Columns of one panel (kLinearColumns in csrc/cpu/kernels.h).
COLUMNS = 32


def pack_panels(weight: Tensor) -> Tensor:
    """Weights ``[K, I]`` (outputs, inputs) in the layout of the backend that runs on their device.

    Parameters
    ----------
    weight : Tensor [K, I]
        float32, float64 or bfloat16.

    Returns
    -------
    Tensor [ceil(I / 32), ceil(K / pack), 32, pack], or [I, 2, K]
        Panels padded with zeros, ``pack`` rows side by side: 2 for bfloat16, else 1. For the Triton kernel (not
        float64, which has none) W+ and W-.
    """
    if "triton" in backends_for(weight.device.type) and weight.dtype != torch.float64:
        return torch.stack((weight.clamp_min(0), weight.neg().clamp_min(0))).permute(2, 0, 1).contiguous()
    pack = 2 if weight.dtype == torch.bfloat16 else 1
    depth, width = weight.shape
    padded = F.pad(weight, (0, -width % COLUMNS, 0, -depth % pack))
    steps, panels = padded.shape[0] // pack, padded.shape[1] // COLUMNS
    return padded.reshape(steps, pack, panels, COLUMNS).permute(2, 0, 3, 1).contiguous()


def unpack_panels(panels: Tensor, depth: int, width: int) -> Tensor:
    """The weights ``[K, I]`` in ``panels`` of either layout."""
    if panels.ndim == 3:
        return (panels[:, 0] - panels[:, 1]).t()[:depth, :width]
    count, steps, columns, pack = panels.shape
    return panels.permute(1, 3, 0, 2).reshape(steps * pack, count * columns)[:depth, :width]


def _selected(c: Tensor, panels: Tensor, gate: Tensor) -> Tensor:
    """The sums, in float64 for float64 panels and float32 for others."""
    dtype = torch.float64 if panels.dtype == torch.float64 else torch.float32
    weight = unpack_panels(panels, c.shape[-1], gate.shape[-1]).to(dtype)
    wide = c.to(dtype)
    upper, lower = wide @ weight.clamp_min(0), wide @ weight.neg().clamp_min(0)
    return torch.where(gate > 0, upper, torch.where(gate < 0, lower, torch.zeros((), dtype=dtype, device=c.device)))


@operator(
    outputs=lambda c, _, x, dtype: c.new_empty((c.shape[0], *x.shape), dtype=dtype), triton="linear:linear_pullback"
)
def linear_pullback(c: Tensor, panels: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Pull coefficients through a linear layer: ``c W+`` where x > 0, ``c W-`` where x < 0, else 0.

    The rule's factor 2 is left to the weights, where it is exact in every binary format.

    Parameters
    ----------
    c : Tensor [T, B, ..., K]
        In the dtype of ``panels``.
    panels : Tensor
        ``pack_panels`` of the layer's weight [K, I].
    x : Tensor [B, ..., I]
        The layer's input.
    dtype : torch.dtype
        Of the result.

    Returns
    -------
    Tensor [T, B, ..., I]
    """
    return _selected(c, panels, x).to(dtype).contiguous()


def _norm_outputs(c: Tensor, panels: Tensor, x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if panels.dtype == torch.float64 else torch.float32
    return c.new_empty((c.shape[0], *x.shape), dtype=dtype), c.new_empty(c.shape[:2], dtype=dtype)


@operator(outputs=_norm_outputs, triton="linear:linear_norm_pullback")
def linear_norm_pullback(
    c: Tensor, panels: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, contrast: bool
) -> tuple[Tensor, Tensor]:
    """Pull coefficients through a linear layer and the LayerNorm that feeds it, in one pass.

    With n the LayerNorm's output: :func:`linear_pullback` at n, then :func:`ramp_fast.ops.norm_pullback` at x.

    Parameters
    ----------
    c : Tensor [T, B, ..., K]
        In the dtype of ``panels``.
    panels : Tensor
        ``pack_panels`` of the layer's weight [K, I].
    x : Tensor [B, ..., I]
        The LayerNorm's input.
    weight, bias : Tensor [I], optional
        The LayerNorm's parameters.
    eps : float
    contrast : bool

    Returns
    -------
    c : Tensor [T, B, ..., I]
        float32, or float64 with float64 panels.
    mass : Tensor [T, B]
        As :func:`ramp_fast.ops.mass` of (x, c).
    """
    dtype = torch.float64 if panels.dtype == torch.float64 else torch.float32
    x = x.to(dtype)
    n = (x - x.mean(-1, keepdim=True)) * inverse_sigma(x, eps)
    if weight is not None:
        n = n * weight.to(dtype)
    if bias is not None:
        n = n + bias.to(dtype)
    out = (norm_factor(x, weight, eps) * _selected(c, panels, n)).contiguous()
    return out, mass_equation(x, out, contrast)
