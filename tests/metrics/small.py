"""What the tests of metrics share: a small classifier, images and maps."""

from __future__ import annotations

import torch
from torch import Tensor, nn

CLASSES = 5


def classifier(height: int = 8, width: int = 8, channels: int = 3, *, seed: int = 0) -> nn.Module:
    """A convolution and a linear layer in float64, so that masked entries interact and sums are nearly exact."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(channels, 4, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(4 * height * width, CLASSES)
        )
    return model.double().eval()


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Linear(nn.Module):
    """Logits that are weighted sums of entries: ``weight * x`` is the one right map."""

    def __init__(self, *shape: int, seed: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(normal(CLASSES, *shape, seed=seed))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight.flatten(1).t()


def contributions(model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
    """The right map of :class:`Linear`."""
    assert isinstance(model, Linear)
    return model.weight.detach()[target] * images
