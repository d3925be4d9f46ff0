"""From 8-bit pixels to what a model takes, on its device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ramp_fast.runtime import host_copies

__all__ = ["Normaliser"]


class Normaliser:
    """Makes images of pixels with the operations of timm's transform, in their order: the same bits.

    Parameters
    ----------
    mean, std : sequence of float
        Of the model's channels, for pixels in [0, 1].
    device : torch.device
        Where images go.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device) -> None:
        self.device = device
        self._mean = torch.tensor([float(v) for v in mean], device=device).view(-1, 1, 1)
        self._std = torch.tensor([float(v) for v in std], device=device).view(-1, 1, 1)

    def __call__(self, pixels: Tensor) -> Tensor:
        """uint8 ``[B, H, W, 3]`` -> float32 ``[B, 3, H, W]`` on the device."""
        pixels = host_copies.to_device(pixels, self.device).permute(0, 3, 1, 2)  # as bytes: a quarter of the way
        images = pixels.to(torch.float32, memory_format=torch.contiguous_format)
        return images.div_(255).sub_(self._mean).div_(self._std)
