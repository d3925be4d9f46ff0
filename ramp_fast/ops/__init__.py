"""Fused steps of the relevance pull-back as ``torch.ops.ramp_fast.*`` operators.

Relevance is ``R = |x| c``. A coefficient c is [T, B, ...]: T maps, B samples; the activation x that it belongs to is
[B, ...]. With ``contrast`` T is even: rows [0, T/2) are P (positive), rows [T/2, T) are D = P - N.

Arithmetic is float32 for float32 and bfloat16 operands and float64 as soon as one operand is float64; masses are
float32 or float64 accordingly, summed in double in an order that depends on neither the number of threads nor the
other samples of the batch. `RAMP_FAST_BACKEND` forces a backend, which then never falls back.
"""

from __future__ import annotations

import torch

from ramp_fast.errors import BackendError
from ramp_fast.ops import _registry
from ramp_fast.ops._registry import BACKENDS, forced_backend, set_backend, unavailable
from ramp_fast.ops.activation import activation_factor, activation_share, affine_factor
from ramp_fast.ops.attention import attention_gradient, attention_pullback
from ramp_fast.ops.by_channel import mul_gradient, mul_pullback, spread
from ramp_fast.ops.depthwise import depthwise
from ramp_fast.ops.gating import gating_pullback, rescale_pieces
from ramp_fast.ops.junction import junction, merge_junction, residual_pullback
from ramp_fast.ops.linear import linear_norm_pullback, linear_pullback, pack_panels
from ramp_fast.ops.masking import copies_in_turn, mask_steps, masked_copies
from ramp_fast.ops.masses import scale_to, share
from ramp_fast.ops.max_pool import max_pool_pullback, unpool
from ramp_fast.ops.norm import norm_gradient, norm_pullback
from ramp_fast.ops.phases import select_phases, sides
from ramp_fast.ops.pieces import merge_pieces, piece_masses
from ramp_fast.ops.product import INT8_DEPTH, has_tiles, multiplies, pack_tiles, product
from ramp_fast.ops.rotary import rotary, rotary_pullback
from ramp_fast.ops.scaling import affine_pullback, centring, gate, mass, merge, ratio, rescale, rescale_parts, scale_by
from ramp_fast.ops.softmax import softmax_pullback

__all__ = [
    "BACKENDS",
    "INT8_DEPTH",
    "activation_factor",
    "activation_share",
    "affine_factor",
    "affine_pullback",
    "attention_gradient",
    "attention_pullback",
    "centring",
    "copies_in_turn",
    "cpu_isas",
    "cpu_kernels",
    "depthwise",
    "forced_backend",
    "gate",
    "gating_pullback",
    "has_tiles",
    "junction",
    "linear_norm_pullback",
    "linear_pullback",
    "mask_steps",
    "masked_copies",
    "mass",
    "max_pool_pullback",
    "merge",
    "merge_junction",
    "merge_pieces",
    "mul_gradient",
    "mul_pullback",
    "multiplies",
    "norm_gradient",
    "norm_pullback",
    "pack_panels",
    "pack_tiles",
    "piece_masses",
    "product",
    "ratio",
    "rescale",
    "rescale_parts",
    "rescale_pieces",
    "residual_pullback",
    "rotary",
    "rotary_pullback",
    "scale_by",
    "scale_to",
    "select_phases",
    "set_backend",
    "set_cpu_isa",
    "share",
    "sides",
    "softmax_pullback",
    "spread",
    "unavailable",
    "unpool",
]


def cpu_isas() -> list[str]:
    """Instruction sets that the C++ kernels can use here, slowest first; empty without the extension."""
    return list(_registry.extension.supported_isas()) if _registry.extension is not None else []


def cpu_kernels(device: torch.device) -> bool:
    """Whether every operator runs on tensors there: by C++ kernels or references, not by a forced GPU backend."""
    return device.type == "cpu" and forced_backend() in (None, "cpu", "reference")


def set_cpu_isa(name: str) -> None:
    """Choose the instruction set of the C++ kernels (for tests; the fastest is chosen by default)."""
    if _registry.extension is None:
        raise BackendError(f"the C++ extension is missing: {_registry.extension_reason}")
    _registry.extension.set_isa(name)


_registry.force_from_environment()
