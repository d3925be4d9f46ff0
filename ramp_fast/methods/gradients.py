"""Methods that are one gradient."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def input_x_gradient(model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
    """Input x gradient of the target logit, ``[N, C, H, W]`` (Shrikumar et al. 2016, arXiv 1605.01713)."""
    return logit_and_product(model, images, target)[1]


def logit_and_product(model: nn.Module, images: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The target logits ``[N]`` and input x gradient ``[N, C, H, W]``; parameters get no gradient."""
    with torch.enable_grad():
        leaf = images.detach().requires_grad_()
        logit = model(leaf).gather(1, target.unsqueeze(1)).squeeze(1)
        (gradient,) = torch.autograd.grad(logit.sum(), leaf)
    return logit.detach(), gradient * images
