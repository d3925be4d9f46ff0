"""Methods that are one gradient."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ramp_fast.explainer import logits_of
from ramp_fast.methods.base import checked


def gradient(model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
    """Gradient of the target logit, signed (Simonyan et al. 2013, arXiv 1312.6034, who take its absolute value).

    Parameters
    ----------
    model : torch.nn.Module
        In eval mode, ``[N, C, H, W]`` to logits ``[N, classes]``.
    images : Tensor [N, C, H, W]
        Preprocessed, on the model's device.
    target : integer Tensor [N]
        The classes to explain.

    Returns
    -------
    Tensor [N, C, H, W]

    Raises
    ------
    InputError
        An argument is not as described, or the model returns something else than logits.
    UnsupportedModelError
        The model is in training mode.
    """
    images, target = checked("gradient", model, images, target)
    return _logit_and_gradient(model, images, target)[1]


def input_x_gradient(model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
    """Input x gradient of the target logit (Shrikumar et al. 2016, arXiv 1605.01713); otherwise as :func:`gradient`."""
    images, target = checked("input_x_gradient", model, images, target)
    return logit_and_product(model, images, target)[1]


def logit_and_product(model: nn.Module, images: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The target logits ``[N]`` and input x gradient ``[N, C, H, W]``; parameters get no gradient."""
    logit, slope = _logit_and_gradient(model, images, target)
    return logit, slope * images


def _logit_and_gradient(model: nn.Module, images: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        leaf = images.detach().requires_grad_()
        logit = logits_of(model, leaf).gather(1, target.unsqueeze(1)).squeeze(1)
        (slope,) = torch.autograd.grad(logit.sum(), leaf)
    return logit.detach(), slope
