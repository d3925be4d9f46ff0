"""Targets, contrast and seeds under signed rules, and that images do not show in each other's maps."""

from __future__ import annotations

import functools

import pytest
import torch
from small_models import FAMILIES, images
from timm.models._efficientnet_blocks import DepthwiseSeparableConv, InvertedResidual
from torch import Tensor, nn

from ramp_fast import Engine

RULES = ["attnlrp", "ramp", "lrp-gamma", "epsilon-plus-flat", "lrp-epsilon", "lrp-undivided"]


def lite() -> nn.Module:
    """The blocks of EfficientNet-Lite0: depthwise convolutions, BatchNorm, ReLU6, an inverted residual."""
    torch.manual_seed(4)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU6(),
        DepthwiseSeparableConv(8, 8, act_layer=nn.ReLU6),
        InvertedResidual(8, 12, stride=2, exp_ratio=3.0, act_layer=nn.ReLU6),
        InvertedResidual(12, 12, exp_ratio=3.0, act_layer=nn.ReLU6),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 10),
    )
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.2, 1)
            nn.init.normal_(module.bias, std=0.2)
    return model.eval()


NETWORKS = {"vit": FAMILIES["vit"], "resnet": FAMILIES["resnet"], "lite": lite}
CASES = [
    pytest.param(name, rule, precision, id=f"{name}-{rule}-{precision}")
    for name in NETWORKS
    for rule in RULES
    for precision in ("float64", "mixed")
    if not (name == "vit" and rule == "lrp-undivided")  # which has no pull-back for attention
]


# Maps of the others are scaled to 1, or come through the normalised parts of ramp's head.
LINEAR = [
    case for case in CASES if case.values[1] != "lrp-undivided" and ("ramp" not in case.values or "vit" in case.values)
]


@functools.cache
def engine_of(name: str, rule: str, precision: str) -> Engine:
    model = NETWORKS[name]()
    return Engine(model.double() if precision == "float64" else model, rule, precision, input_shape=(3, 16, 16))


def pictures(count: int, precision: str) -> Tensor:
    x = images(count)
    return x.double() if precision == "float64" else x


def close(found: Tensor, expected: Tensor, precision: str, scale: Tensor | None = None) -> None:
    """Equal but for rounding: of float64, and of bfloat16 products (2^-9 each) in "mixed"; ``scale``: of the terms."""
    assert expected.abs().amax() > 0
    errors = (found - expected).flatten(1).norm(dim=1)
    sizes = expected.flatten(1).norm(dim=1) if scale is None else scale
    assert (errors / sizes).max() < (1e-9 if precision == "float64" else 2e-2)


@pytest.mark.parametrize(("name", "rule", "precision"), CASES)
def test_several_targets_are_single_calls(name: str, rule: str, precision: str) -> None:
    """One product has the rows of all classes, and libraries may sum in another order for another number of rows."""
    engine, x = engine_of(name, rule, precision), pictures(3, precision)
    target = torch.tensor([[1, 7, 2], [0, 3, 3], [9, 8, 4]])
    for contrast in ("others", "none"):
        found = engine.attribute(x, target, contrast)
        assert torch.equal(found.target, target)
        for k in range(3):
            close(found.maps[:, k], engine.attribute(x, target[:, k], contrast).maps, precision)


def others(rule: str, name: str, logits: Tensor, target: Tensor) -> Tensor:
    """The signed seed of ``contrast="others"``, from its definition in docs/signed-rules.md."""
    seed = torch.zeros_like(logits)
    for row, label in enumerate(target.tolist()):
        rest = [j for j in range(logits.shape[1]) if j != label]
        weights = torch.full((len(rest),), 1 / len(rest), dtype=logits.dtype)
        if rule == "ramp":
            weights = (logits[row, rest] / (3.0 if name == "vit" else 1.0)).softmax(0)
        seed[row, rest] = -weights
        seed[row, label] = 1.0
    return seed


@pytest.mark.parametrize(("name", "rule", "precision"), CASES)
def test_contrast_is_a_signed_seed(name: str, rule: str, precision: str) -> None:
    engine, x = engine_of(name, rule, precision), pictures(3, precision)
    target = torch.tensor([4, 0, 9])
    found = engine.attribute(x, target, "others", "none")
    seed = others(rule, name, found.logits, target)
    given = engine.attribute(x, seed, "none", "none")
    assert torch.equal(given.target, seed)
    close(given.maps, found.maps, precision)  # the seed's own rounding
    alone = engine.attribute(x, target, "none", "none").maps
    assert (alone - found.maps).norm() > 1e-3 * found.maps.norm()


@pytest.mark.parametrize(("name", "rule", "precision"), CASES)
def test_a_function_computes_the_seed(name: str, rule: str, precision: str) -> None:
    engine, x = engine_of(name, rule, precision), pictures(3, precision)
    logits = engine.attribute(x).logits
    computed = engine.attribute(x, lambda z: z.softmax(-1) - 0.5 * (z > 0), "none", "none")
    given = engine.attribute(x, logits.softmax(-1) - 0.5 * (logits > 0), "none", "none")
    assert torch.equal(computed.maps, given.maps)
    assert torch.equal(computed.target, given.target)


@pytest.mark.parametrize(("name", "rule", "precision"), LINEAR)
def test_maps_are_linear_in_seeds(name: str, rule: str, precision: str) -> None:
    engine, x = engine_of(name, rule, precision), pictures(2, precision)
    random = torch.Generator().manual_seed(3)
    one, two = (torch.randn(2, 10, generator=random, dtype=x.dtype) for _ in range(2))
    maps = [engine.attribute(x, seed, "none", "none").maps for seed in (one, two, 2 * one - 3 * two)]
    sizes = sum(factor * m.flatten(1).norm(dim=1) for factor, m in zip((2, 3), maps, strict=False))
    assert isinstance(sizes, Tensor)
    close(maps[2], 2 * maps[0] - 3 * maps[1], precision, sizes)


@pytest.mark.parametrize(("name", "rule", "precision"), CASES)
def test_images_do_not_show_in_each_other_s_maps(name: str, rule: str, precision: str) -> None:
    engine, x = engine_of(name, rule, precision), pictures(6, precision)
    target = torch.tensor([[1, 2], [3, 4], [5, 6], [7, 8], [9, 0], [2, 2]])
    together = engine.attribute(x, target).maps
    for size in (1, 2, 4):
        assert torch.equal(engine.attribute(x, target, batch_size=size).maps, together)
    turned = torch.tensor([3, 0, 5, 1, 4, 2])
    assert torch.equal(engine.attribute(x[turned], target[turned]).maps, together[turned])
    loud = x.clone()
    loud[1:] *= 1e4
    assert torch.equal(engine.attribute(loud, target).maps[:1], together[:1])
    grouped = Engine(engine.model, rule, precision, input_shape=(3, 16, 16), micro_batch=3)
    close(grouped.attribute(x, target).maps, together, precision)  # as for several classes
