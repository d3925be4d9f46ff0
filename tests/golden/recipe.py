"""The networks and images that the expected maps of this folder belong to.

Everything is drawn from ``numpy.random.RandomState``, whose streams NumPy has frozen, so the files hold results only:
``logits``, and for the rules "abslrp" (no prefix) and "abslrp-release" (``release_``) the maps ``positive`` (one-hot
seed, sum 1), ``negative`` (seed uniform over the other classes, sum 1; release only) and ``relevance`` (the
difference, maximum 1), all computed without the published code's 1e-9 in denominators.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from timm.models.vgg import VGG
from timm.models.vision_transformer import VisionTransformer

BATCH = 3


def _vit(image: int, width: int, depth: int, heads: int, classes: int) -> VisionTransformer:
    return VisionTransformer(
        img_size=image, patch_size=8, embed_dim=width, depth=depth, num_heads=heads, num_classes=classes
    )


# Name: the network, without its weights, and the size of its images.
CASES: dict[str, tuple[Callable[[], torch.nn.Module], int]] = {
    "vit": (lambda: _vit(32, 48, 3, 3, 10), 32),
    "vit_deep": (lambda: _vit(40, 64, 6, 4, 17), 40),
    "resnet_basic": (lambda: ResNet(BasicBlock, (1, 2, 1, 1), num_classes=10, channels=(8, 16, 24, 32)), 64),
    "resnet_bottleneck": (lambda: ResNet(Bottleneck, (1, 2, 1, 1), num_classes=10, channels=(8, 8, 16, 16)), 64),
    "vgg": (lambda: VGG([8, "M", 12, 12, "M", 16, "M"], num_classes=10, mlp_ratio=0.25), 64),
}


def _drawn(name: str, tensor: torch.Tensor, stream: np.random.RandomState) -> torch.Tensor:
    """A value for the parameter or buffer ``name``, which says what it is."""
    normal = torch.from_numpy(stream.standard_normal(tuple(tensor.shape))).to(tensor)
    if name.endswith("running_var"):
        return 1.0 + 0.2 * normal.abs()
    if name.endswith("weight"):
        if tensor.dim() == 1:  # of a normalisation
            return 1.0 + 0.1 * normal
        return 1.4 * normal / tensor[0].numel() ** 0.5
    return 0.1 * normal


@torch.no_grad()
def fill(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Weights for ``model``, one stream of numbers over all parameters and buffers by name."""
    stream = np.random.RandomState(seed)
    state = dict(model.named_parameters()) | dict(model.named_buffers())
    for name in sorted(state):
        if state[name].is_floating_point():
            state[name].copy_(_drawn(name, state[name], stream))
    return model


def build(case: str, batch: int = BATCH, seed: int = 0) -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    """The network in float64 and eval mode, images ``[batch, 3, H, W]`` and target classes ``[batch]``."""
    make, size = CASES[case]
    model = fill(make().double().eval(), seed)
    stream = np.random.RandomState(1000 + seed)
    images = torch.from_numpy(stream.standard_normal((batch, 3, size, size)))
    classes = int(model.num_classes)  # type: ignore[arg-type]
    return model, images, torch.from_numpy(stream.randint(0, classes, size=batch))
