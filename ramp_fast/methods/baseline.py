"""The method that knows nothing: what any other has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ramp_fast.methods.base import checked, checked_seed, seed_of


@dataclass(frozen=True)
class Random:
    """Standard normal noise, a function of the seed and of the image's values.

    The same image gets the same map in any batch, on any device and in any process; one that differs in a single bit
    gets another. Model and target do not matter.

    Parameters
    ----------
    seed : int
        Other seeds, other maps.

    Raises
    ------
    InputError
        ``seed`` is not an integer.
    """

    __name__: ClassVar[str] = "random"
    seed: int = 0

    def __post_init__(self) -> None:
        checked_seed("random", self.seed)

    def __call__(self, model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
        """Maps ``[N, C, H, W]`` in the images' dtype, on their device; arguments and errors as for :func:`gradient`."""
        images, _ = checked("random", model, images, target)
        maps = []
        for image in images:
            generator = torch.Generator().manual_seed(seed_of(image, self.seed))
            maps.append(torch.randn(image.shape, generator=generator, dtype=torch.float32, device="cpu"))
        return torch.stack(maps).to(images)
