"""Every named rule at the edges: nothing to share, numbers that are none, batches and images of odd forms."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import pytest
import torch
from small_models import FAMILIES, images
from torch import Tensor, nn

from ramp_fast import Engine
from ramp_fast.errors import InputError
from ramp_fast.rules import NAMED, AbsLRP, RelativeStabilizer, Rule, resolve

SIZE = 16


def rule_of(name: str) -> Rule:
    return resolve("epsilon-gamma-box:low=-3,high=3" if name == "epsilon-gamma-box" else name)


def convolutional(classes: int = 10, *, bias: float | None = None) -> nn.Module:
    """Every kind of layer of a convolutional network; with a bias of convolutions that is far below zero it is dead."""
    torch.manual_seed(0)

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x + self.norm(self.conv(x)))

    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        Sum(),
        nn.Conv2d(6, 6, 3, stride=2),
        nn.ReLU6(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, classes),
    ).eval()
    if bias is not None:
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.constant_(module.bias, bias)
    return model


NETWORKS: dict[str, Callable[[], nn.Module]] = {"cnn": convolutional, "vit": FAMILIES["vit"]}
# The others differ from one of these in layers or activations alone.
QUICK = ("abslrp", "attnlrp", "ramp", "epsilon-plus-flat", "lrp-undivided")
RULES = [pytest.param(rule, marks=[] if rule in QUICK else pytest.mark.slow) for rule in NAMED]
CASES = [
    pytest.param(network, rule, marks=[] if rule in QUICK else pytest.mark.slow)
    for network in NETWORKS
    for rule in NAMED
    if (network, rule) != ("vit", "lrp-undivided")
]


@functools.cache
def engine_of(network: str, rule: str) -> Engine:
    return Engine(NETWORKS[network](), rule_of(rule), input_shape=(3, SIZE, SIZE))


@pytest.mark.parametrize(("network", "rule"), CASES)
def test_images_of_zeros(network: str, rule: str) -> None:
    engine, x = engine_of(network, rule), images(3)
    x[1] = 0.0
    beside = engine.attribute(x[[0, 2]], torch.tensor([3, 5])).maps
    for normalize in ("max", "sum", "none"):
        for contrast in ("others", "none"):
            maps = engine.attribute(x, torch.tensor([3, 4, 5]), contrast, normalize).maps
            assert maps.isfinite().all()
            if (normalize, contrast) == ("max", "others"):
                assert torch.equal(maps[[0, 2]], beside)


@pytest.mark.parametrize("offset", [-100.0, 0.0])
@pytest.mark.parametrize("rule", RULES)
def test_networks_without_any_activity(rule: str, offset: float) -> None:
    """No ReLU is above zero; or there is no bias, and images of zeros are zero everywhere."""
    model = convolutional(bias=offset)
    nn.init.zeros_(model[-1].bias)
    engine = Engine(model, rule_of(rule), input_shape=(3, SIZE, SIZE))
    x = images(2) if offset else torch.zeros(2, 3, SIZE, SIZE)
    for normalize in ("max", "sum", "none"):
        found = engine.attribute(x, torch.tensor([[3, 4]] * 2), "others", normalize)
        assert found.maps.isfinite().all()
        if rule not in ("deconvnet", "beta-smooth"):  # whose gradients go through ReLUs that are shut
            assert not found.maps.any()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("layer", ["first", "last"])
@pytest.mark.parametrize(("network", "rule"), CASES)
def test_the_model_s_own_nan_is_not_hidden(network: str, rule: str, layer: str, value: float) -> None:
    model = NETWORKS[network]()
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    with torch.no_grad():
        layers[0 if layer == "first" else -1].weight.flatten()[5] = value
    engine = Engine(model, rule_of(rule), input_shape=(3, SIZE, SIZE))
    found = engine.attribute(images(2), 3)
    wrong = ~found.logits.isfinite().all(1)
    assert wrong.all() or network == "cnn"  # where ReLU6 makes 6 of infinity
    assert found.maps[wrong].isnan().all()


@pytest.mark.parametrize("rule", RULES)
def test_one_logit(rule: str) -> None:
    engine = Engine(convolutional(1), rule_of(rule), input_shape=(3, SIZE, SIZE))
    with pytest.raises(InputError, match="two classes"):
        engine.attribute(images(2))
    found = engine.attribute(images(2), contrast="none")
    assert found.maps.isfinite().all()
    assert found.maps.any()
    assert found.target.tolist() == [0, 0]


@pytest.mark.parametrize(("network", "rule"), CASES)
def test_precisions_agree(network: str, rule: str) -> None:
    """Each against float64; rules that share contributions of both signs magnify the rounding of bf16."""
    x = images(2).double()
    given = rule_of(rule)
    if isinstance(given, AbsLRP):
        given = AbsLRP(RelativeStabilizer(0.1), given.shares)
    exact = Engine(NETWORKS[network]().double(), given, "float64").attribute(x, 3).maps
    assert exact.dtype == torch.float64
    for precision, tolerance in (("float32", 1e-3), ("mixed", 0.05), ("fast", 0.3)):
        found = Engine(NETWORKS[network](), given, precision).attribute(x.float(), 3).maps
        assert found.dtype == torch.float32
        assert (found - exact).norm() < tolerance * exact.norm(), precision


@pytest.mark.parametrize(("network", "rule"), CASES)
def test_batches_and_layouts(network: str, rule: str) -> None:
    engine, x = engine_of(network, rule), images(3)
    maps = engine.attribute(x, 2).maps
    empty = engine.attribute(x[:0], 2)
    assert empty.maps.shape == (0, 3, SIZE, SIZE)
    assert empty.logits.shape == (0, 10)
    several = engine.attribute(x[:0], torch.zeros(0, 2, dtype=torch.long))
    assert several.maps.shape == (0, 2, 3, SIZE, SIZE)
    wide = torch.zeros(3, 3, 2 * SIZE, 2 * SIZE)
    wide[:, :, ::2, ::2] = x
    forms = {
        "channels last": x.contiguous(memory_format=torch.channels_last),
        "every other pixel": wide[:, :, ::2, ::2],
        "turned": x.transpose(2, 3).contiguous().transpose(2, 3),
        "one for all": x[:1].expand(3, -1, -1, -1),
    }
    for form, given in forms.items():
        before = given.clone()
        found = engine.attribute(given, 2).maps
        assert torch.equal(found, maps[:1].expand_as(maps) if form == "one for all" else maps), form
        assert torch.equal(given, before)
    with torch.inference_mode():
        assert torch.equal(engine.attribute(x.clone(), 2).maps, maps)
    with torch.enable_grad():
        assert not engine.attribute(x.clone().requires_grad_(), 2).maps.requires_grad
