"""Precision modes: which dtypes a plan computes in, and float32 that is float32."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Precision:
    """Dtypes of one precision mode.

    Attributes
    ----------
    name : str
    forward : torch.dtype
        Of weights and activations in the forward pass.
    pullback : torch.dtype
        Of coefficients and weights in the pull-back's products.
    output : torch.dtype
        Of maps and logits.
    """

    name: str
    forward: torch.dtype
    pullback: torch.dtype
    output: torch.dtype

    @property
    def accumulate(self) -> torch.dtype:
        """For masses and scalings: never below float32."""
        return torch.float64 if self.pullback == torch.float64 else torch.float32


def cpu_has_bf16() -> bool:
    """Whether bf16 products are native on this processor (AVX512-BF16 or AMX)."""
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, n)()) for n in names if hasattr(torch.cpu, n))


def precision_for(name: str, device: torch.device) -> Precision:
    """The dtypes of precision mode ``name`` on ``device``."""
    f64, f32, bf16 = torch.float64, torch.float32, torch.bfloat16
    if name == "float64":
        return Precision(name, f64, f64, f64)
    if name == "float32":
        return Precision(name, f32, f32, f32)
    native = device.type == "cuda" or cpu_has_bf16()
    pull = bf16 if native else f32
    if name == "mixed":
        return Precision(name, f32, pull, f32)
    return Precision(name, pull, pull, f32)


@contextmanager
def exact_float32(device: torch.device) -> Iterator[None]:
    """float32 products in true float32, whatever the global flags say; the flags are restored on exit.

    Nothing is written where the flags already say so, which is the default on CPUs. Of several threads in here
    the first saves the flags and the last restores them.
    """
    backends: Any = torch.backends  # mkldnn.matmul and its like are set up at run time
    flags = [backends.mkldnn.matmul, backends.mkldnn.conv]
    if device.type == "cuda":
        flags = [backends.cuda.matmul, backends.cudnn.conv]
    with _FLAGS_LOCK:
        _INSIDE.append(device)
        for flag in flags:
            if flag.fp32_precision not in ("none", "ieee"):
                _SAVED.append((flag, flag.fp32_precision))
                flag.fp32_precision = "ieee"
    try:
        yield
    finally:
        with _FLAGS_LOCK:
            _INSIDE.remove(device)
            while _SAVED and not _INSIDE:
                flag, value = _SAVED.pop()
                flag.fp32_precision = "none"  # which inherits the backend's setting
                if flag.fp32_precision != value:
                    flag.fp32_precision = value


_FLAGS_LOCK = threading.Lock()
_INSIDE: list[torch.device] = []
_SAVED: list[tuple[Any, str]] = []
