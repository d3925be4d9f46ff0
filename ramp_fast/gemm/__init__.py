"""Products with packed weights: matrices, convolutions and attention, on the library routines that suit them best."""

from __future__ import annotations

from ramp_fast.gemm.convolution import (
    ConvForward,
    ConvPullback,
    DepthwiseForward,
    DepthwisePullback,
    Geometry,
    PatchForward,
    PatchPullback,
    PatchSelection,
    PixelForward,
    SidedForward,
    SidedPullback,
    SubpixelSelection,
    convolution,
    fuses_convolutions,
)
from ramp_fast.gemm.matrix import Matrix, Selection, by_sample, negative_part, positive_part
from ramp_fast.gemm.packed import LinearOp, Packed, PackedLayer, shared_layer
from ramp_fast.gemm.precision import Precision, cpu_has_bf16, exact_float32, precision_for

__all__ = [
    "ConvForward",
    "ConvPullback",
    "DepthwiseForward",
    "DepthwisePullback",
    "Geometry",
    "LinearOp",
    "Matrix",
    "Packed",
    "PackedLayer",
    "PatchForward",
    "PatchPullback",
    "PatchSelection",
    "PixelForward",
    "Precision",
    "Selection",
    "SidedForward",
    "SidedPullback",
    "SubpixelSelection",
    "by_sample",
    "convolution",
    "cpu_has_bf16",
    "exact_float32",
    "fuses_convolutions",
    "negative_part",
    "positive_part",
    "precision_for",
    "shared_layer",
]
