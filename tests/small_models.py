"""Small networks for the tests of the engine: quick to capture, with junctions, attention and convolutions."""

from __future__ import annotations

import torch
from timm.models.resnet import BasicBlock, ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

CLASSES = 10
SIZE = 16


def vit() -> nn.Module:
    torch.manual_seed(1)
    model = VisionTransformer(
        img_size=SIZE, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=CLASSES, global_pool="token"
    ).eval()
    nn.init.normal_(model.cls_token)  # as initialised it is nearly zero
    return model


def resnet() -> nn.Module:
    torch.manual_seed(2)
    return ResNet(BasicBlock, (1, 1, 1, 1), num_classes=CLASSES, channels=(8, 12, 16, 24)).eval()


def vgg() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4 * 64, CLASSES)
    ).eval()


def images(count: int = 3, *, size: int = SIZE, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


FAMILIES = {"vit": vit, "resnet": resnet, "vgg": vgg}
