"""What is compared: attribution methods, each prepared for a timm model and then called with images and classes.

A library is imported when one of its methods is used, not before. A method may change the model it is given, and
works on a model of its own.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Attention
from timm.models import VGG, ResNet, VisionTransformer
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck

from ramp_fast import Engine

from .torchvision_equivalents import resnet50_equivalent, vgg16_equivalent

MODELS = ("vit_base_patch16_224", "resnet50", "vgg16")
CONVOLUTIONAL = MODELS[1:]
IG_STEPS = 20

# images [B, 3, H, W], classes [B] -> relevance [B, 3, H, W]
Attribute = Callable[[Tensor, Tensor], Tensor]


def forward(model: nn.Module) -> Attribute:
    """The model's own forward pass: logits, the reference of all others."""
    return lambda images, target: torch.no_grad()(model)(images)


def ramp_fast(model: nn.Module, contrast: str = "others", precision: str = "mixed", rule: str = "abslrp") -> Attribute:
    """The class against all others, of absLRP two right-hand sides, or the class alone, as in the peers' maps."""
    engine = Engine(model, rule, precision)
    return lambda images, target: engine.attribute(images, target=target, contrast=contrast).maps


def input_x_gradient(model: nn.Module) -> Attribute:
    """Captum's gradient times input: what autograd takes at least."""
    from captum.attr import InputXGradient

    method = InputXGradient(model)
    return lambda images, target: method.attribute(_leaf(images), target=target).detach()


def integrated_gradients(model: nn.Module) -> Attribute:
    """Captum's integrated gradients, ``IG_STEPS`` steps of one batch each; left alone it would run them all at once."""
    from captum.attr import IntegratedGradients

    method = IntegratedGradients(model)
    return lambda images, target: method.attribute(
        images, target=target, n_steps=IG_STEPS, internal_batch_size=len(images)
    )


def captum_lrp(model: nn.Module) -> Attribute:
    """Captum's LRP, by default the epsilon rule in every layer.

    It wants additions to be modules and no module twice: the ResNet is built of blocks written that way. Another
    model than a ResNet or a VGG goes in as it is, for captum to refuse.
    """
    from captum.attr import LRP
    from captum.attr._utils.custom_modules import Addition_Module

    class PlainBottleneck(Bottleneck):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.relu2, self.relu3, self.add = nn.ReLU(), nn.ReLU(), Addition_Module()

        def forward(self, x: Tensor) -> Tensor:
            shortcut = x if self.downsample is None else self.downsample(x)
            x = self.relu(self.bn1(self.conv1(x)))
            x = self.relu2(self.bn2(self.conv2(x)))
            return self.relu3(self.add(self.bn3(self.conv3(x)), shortcut))

    if isinstance(model, VGG):
        model = vgg16_equivalent(model)
    elif isinstance(model, ResNet):
        model = resnet50_equivalent(model, PlainBottleneck)
    method = LRP(model)
    return lambda images, target: method.attribute(_leaf(images), target=target).detach()


def zennit_epsilon_plus_flat(model: nn.Module) -> Attribute:
    """Zennit's composite for convolutional networks: flat rule first, z+ for convolutions, epsilon for linear ones."""
    from zennit.attribution import Gradient
    from zennit.composites import EpsilonPlusFlat
    from zennit.torchvision import ResNetCanonizer, VGGCanonizer

    if isinstance(model, VGG):
        model, canonizer = vgg16_equivalent(model), VGGCanonizer()
    else:
        model, canonizer = resnet50_equivalent(model), ResNetCanonizer()
    composite = EpsilonPlusFlat(canonizers=[canonizer])

    def attribute(images: Tensor, target: Tensor) -> Tensor:
        with Gradient(model, composite) as attributor:
            return attributor(images, lambda logits: F.one_hot(target, logits.shape[1]).to(logits))[1]

    return attribute


def lxt_attnlrp(model: nn.Module) -> Attribute:
    """AttnLRP by LXT's modified gradients, epsilon rule in linear layers.

    LXT's own table of patches is for torchvision's ViT, without AttnLRP's rule for attention, and changes classes for
    the whole process. Its rules are set on the modules of one timm model here. Attention's two products halve the
    gradient of their operands: half for all three behind the attention, another half for queries and keys.
    """
    from lxt.efficient.patches import layer_norm_forward, non_linear_forward, patch_method
    from lxt.efficient.rules import divide_gradient

    def halve(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return divide_gradient(output, 2)

    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            patch_method(MethodType(layer_norm_forward, module), module)
        elif isinstance(module, nn.GELU):
            patch_method(MethodType(non_linear_forward, module), module, keep_original=True)
        elif isinstance(module, Attention):
            for identity in (module.q_norm, module.k_norm, module.norm):
                identity.register_forward_hook(halve)

    def attribute(images: Tensor, target: Tensor) -> Tensor:
        images = _leaf(images)
        selected = model(images).gather(1, target[:, None]).sum()
        return images.detach() * torch.autograd.grad(selected, images)[0]

    return attribute


def published_abslrp(model: nn.Module) -> Attribute:
    """The published package's absLRP, contrastive, from the checkout that ``RAMP_FAST_PUBLISHED`` names."""
    from abslrp_gae.abslrp.relevancy_methods import AbsLRPRelevancyMethod
    from abslrp_gae.abslrp.rules import models as rules

    kinds = {
        VisionTransformer: rules.VisionTransformerAbsLRPRule,
        ResNet: rules.ResNetAbsLRPRule,
        VGG: rules.VGGAbsLRPRule,
    }
    kinds[type(model)]().apply(model)
    method = AbsLRPRelevancyMethod(model, next(model.parameters()).device)
    return lambda images, target: method.relevancy(images.clone(), target)


def _leaf(images: Tensor) -> Tensor:
    """The images as a tensor that takes a gradient; the caller's are left as they are."""
    return images.detach().requires_grad_()


@dataclass(frozen=True)
class Method:
    """A row of the comparison: how to prepare it, where its library comes from, which models it is for."""

    prepare: Callable[[nn.Module], Attribute]
    libraries: tuple[str, ...] = ()
    install: str = "pip install '.[bench,peers]'"
    models: tuple[str, ...] = MODELS
    rounds: int = 3  # one for what takes minutes, without a warm-up

    def missing(self) -> str:
        """Import the libraries; why that failed and what to do about it, or nothing."""
        try:
            with _published_on_path():
                for library in self.libraries:
                    importlib.import_module(library)
        except ImportError as error:
            return f"{error} ({self.install})"
        return ""


@contextmanager
def _published_on_path() -> Iterator[None]:
    path = os.environ.get("RAMP_FAST_PUBLISHED")
    if path is None:
        yield
        return
    sys.path.append(path)
    try:
        yield
    finally:
        sys.path.remove(path)


METHODS = {
    "forward": Method(forward),
    "ramp_fast": Method(ramp_fast),
    "ramp_fast, one class": Method(partial(ramp_fast, contrast="none")),
    "ramp_fast, float32": Method(partial(ramp_fast, precision="float32")),
    "ramp_fast attnlrp": Method(partial(ramp_fast, contrast="none", rule="attnlrp"), models=MODELS[:1]),
    "ramp_fast ramp": Method(partial(ramp_fast, rule="ramp")),
    "ramp_fast epsilon-plus-flat": Method(
        partial(ramp_fast, contrast="none", rule="epsilon-plus-flat"), models=CONVOLUTIONAL
    ),
    "captum InputXGradient": Method(input_x_gradient, ("captum.attr",)),
    "captum IntegratedGradients": Method(integrated_gradients, ("captum.attr",), rounds=1),
    "captum LRP": Method(captum_lrp, ("captum.attr",), models=CONVOLUTIONAL),
    "zennit EpsilonPlusFlat": Method(
        zennit_epsilon_plus_flat, ("zennit.composites", "zennit.torchvision"), models=CONVOLUTIONAL
    ),
    "LXT AttnLRP": Method(lxt_attnlrp, ("lxt.efficient",), models=MODELS[:1]),
    "published absLRP": Method(
        published_abslrp,
        ("abslrp_gae.abslrp.relevancy_methods", "abslrp_gae.abslrp.rules.models"),
        install="RAMP_FAST_PUBLISHED=<checkout of davor10105/relative-absolute-magnitude-propagation>; "
        "it needs pydantic and matplotlib",
        rounds=1,
    ),
}
