"""The same networks as torchvision writes them, for peers whose rules are tied to torchvision's modules.

A twin shares the timm model's weights and computes the same logits.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.models import ResNet, vgg16
from torchvision.models.resnet import Bottleneck

# timm's convolutional head of VGG, as torchvision's linear layers.
VGG_HEAD = {"pre_logits.fc1": "classifier.0", "pre_logits.fc2": "classifier.3", "head.fc": "classifier.6"}


def _with_weights(twin: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    """The weights themselves, not copies, so that a twin costs no memory; activations out of place, as hooks need."""
    twin.load_state_dict(weights, assign=True)
    for module in twin.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    return twin.eval()


def resnet50_equivalent(model: nn.Module, block: type[Bottleneck] = Bottleneck) -> nn.Module:
    """ResNet-50 of torchvision with the weights of timm's, made of ``block``."""
    with torch.device("meta"):
        twin = ResNet(block, [3, 4, 6, 3])
    return _with_weights(twin, model.state_dict())


def vgg16_equivalent(model: nn.Module) -> nn.Module:
    """VGG-16 of torchvision with the weights of timm's."""
    with torch.device("meta"):
        twin = vgg16()
    weights = {}
    for name, value in model.state_dict().items():
        layer, _, kind = name.rpartition(".")
        if layer in VGG_HEAD:
            layer, value = VGG_HEAD[layer], value.flatten(1) if kind == "weight" else value
        weights[f"{layer}.{kind}"] = value
    return _with_weights(twin, weights)
