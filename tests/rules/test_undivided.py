"""lrp-undivided against a loop over explicit matrices and against modified autograd, and that nothing overflows."""

from __future__ import annotations

from collections.abc import Callable

import modified_autograd as oracle
import pytest
import torch
import torch.nn.functional as F
from small_models import FAMILIES, images
from torch import Tensor, nn

from ramp_fast import Engine
from ramp_fast.errors import UnsupportedModelError


class Residual(nn.Module):
    """BatchNorm, a residual sum, both pools and a last layer, small enough for explicit matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)
        self.one, self.two, self.fc = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1), nn.Linear(3, 5)
        with torch.no_grad():
            self.norm.running_mean.normal_(std=0.2)
            self.norm.running_var.uniform_(0.5, 2)
            self.norm.bias.normal_(std=0.2)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.norm(self.stem(x)))
        z = F.relu(a + self.two(F.relu(self.one(a))))
        return self.fc(F.max_pool2d(z, 2).mean((2, 3)))


def through(function: Callable[[Tensor], Tensor], x: Tensor, r: Tensor) -> Tensor:
    """``R_i = x_i sum_j w_ij R_j`` of a layer without its bias, entry by entry; its sum is ``sum_j z_j R_j``."""
    found, total = torch.zeros_like(x), 0.0
    for i in range(x.numel()):
        unit = torch.zeros_like(x).view(-1)
        unit[i] = 1
        column = function(unit.view(x.shape))
        for w, relevance in zip(column.flatten(), r.flatten(), strict=True):
            found.view(-1)[i] += x.view(-1)[i] * w * relevance
    z = function(x)
    for output, relevance in zip(z.flatten(), r.flatten(), strict=True):
        total += float(output * relevance)
    assert float(found.sum()) == pytest.approx(total, rel=1e-9, abs=1e-12)
    return found


def by_loops(model: Residual, x: Tensor, seed: Tensor) -> Tensor:
    """Relevance of one image ``[C, H, W]`` from that of the logits."""
    gain = (model.norm.running_var + model.norm.eps).rsqrt() * model.norm.weight
    folded = model.stem.weight * gain.view(-1, 1, 1, 1)
    x = x.unsqueeze(0)
    a = F.relu(model.norm(model.stem(x)))
    h = F.relu(model.one(a))
    b = model.two(h)
    z = F.relu(a + b)
    pooled, chosen = F.max_pool2d(z, 2, return_indices=True)
    p = pooled.mean((2, 3))
    r_p = through(lambda u: F.linear(u, model.fc.weight), p, seed)
    r_pooled = pooled / pooled.sum((2, 3), keepdim=True) * r_p.view(1, -1, 1, 1)  # terms of an average
    r_z = F.max_unpool2d(torch.nan_to_num(r_pooled), chosen, 2)
    total = a + b
    r_a, r_b = (torch.where(z > 0, part / total * r_z, 0.0) for part in (a, b))
    r_h = through(lambda u: F.conv2d(u, model.two.weight), h, r_b)
    r_a = r_a + through(lambda u: F.conv2d(u, model.one.weight, padding=1), a, r_h)
    return through(lambda u: F.conv2d(u, folded, padding=1), x, r_a)[0]


@pytest.mark.parametrize("contrast", ["none", "others"])
def test_definition(contrast: str) -> None:
    torch.manual_seed(0)
    model, x = Residual().double().eval().requires_grad_(False), torch.randn(2, 2, 4, 4, dtype=torch.float64)
    target = torch.tensor([[0, 3], [4, 1]])
    found = Engine(model, "lrp-undivided", "float64", input_shape=(2, 4, 4)).attribute(x, target, contrast, "none").maps
    for image in range(2):
        for place, label in enumerate(target[image].tolist()):
            seed = torch.zeros(1, 5, dtype=torch.float64)
            seed[0, label] = 1
            if contrast == "others":
                seed = seed - (1 - seed) / 4
            expected = by_loops(model, x[image], seed)
            assert expected.abs().max() > 0
            torch.testing.assert_close(found[image, place], expected / expected.abs().max(), rtol=1e-9, atol=1e-11)


def undivided(apply: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    z = apply(x, weight, bias)
    return oracle.with_gradient(z, apply(x, weight, None) * z.detach())


class Branches(nn.Module):
    """Channels that are split, go through a different number of layers, and are joined again; logits of a pool."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.deep = nn.Sequential(*[m for _ in range(3) for m in (nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())])
        self.last = nn.Conv2d(8, 10, 1)

    def forward(self, x: Tensor) -> Tensor:
        left, right = F.relu(self.stem(x)).chunk(2, 1)
        return self.last(torch.cat([100 * self.deep(left), right], 1)).mean((2, 3))


@pytest.mark.parametrize("name", ["resnet", "vgg", "branches"])
def test_maps_are_those_of_modified_autograd(name: str) -> None:
    torch.manual_seed(1)
    model = (Branches().eval() if name == "branches" else FAMILIES[name]()).double()
    x = images(2).double()
    engine = Engine(model, "lrp-undivided", "float64", input_shape=(3, 16, 16))
    seed = torch.randn(2, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    found = engine.attribute(x, seed, "none", "none")
    expected = oracle.relevance(oracle.folded(model), x, seed / found.logits, oracle.Modified(undivided))
    expected = expected / expected.abs().flatten(1).amax(1).view(-1, 1, 1, 1)
    assert (found.maps - expected).abs().max() < 1e-8


@pytest.mark.parametrize("precision", ["float64", "float32", "mixed"])
def test_the_scale_of_layers_does_not_show(precision: str) -> None:
    """Relevance grows by 2^15 with every second layer, past what any of these dtypes can hold."""

    def network(factor: float) -> nn.Module:
        torch.manual_seed(2)
        layers: list[nn.Module] = [nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.ReLU()]
        for depth in range(160):
            conv = nn.Conv2d(6, 6, 1, bias=False)
            with torch.no_grad():
                rows = conv.weight.abs()
                conv.weight.copy_(rows / rows.sum(1, keepdim=True) * (factor if depth % 2 == 0 else 1 / factor))
            layers += [conv, nn.ReLU()]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(6 * 16, 4)).eval()

    x = images(2, size=4)
    plain, scaled = (
        Engine(network(factor), "lrp-undivided", precision, input_shape=(3, 4, 4)).attribute(x, 1).maps
        for factor in (1.0, 2.0**15)
    )
    assert plain.isfinite().all()
    assert plain.flatten(1).abs().amax(1).eq(1).all()
    # To the last bit, but for what is lost next to the smallest numbers that float32 has.
    torch.testing.assert_close(scaled, plain, rtol=0, atol=1e-30)


@pytest.mark.parametrize("precision", ["float32", "mixed"])
@pytest.mark.parametrize("factor", [2.0**70, 2.0**-70])
def test_large_and_small_weights_of_one_layer(precision: str, factor: float) -> None:
    """Coefficients times outputs times weights are past what float32 can hold, above or below."""

    def network(factor: float) -> nn.Module:
        torch.manual_seed(3)
        convolutions = [nn.Conv2d(3 if i == 0 else 6, 6, 3, padding=1, bias=False) for i in range(3)]
        with torch.no_grad():
            convolutions[1].weight.mul_(factor)
            convolutions[2].weight.div_(factor)
        layers = [m for conv in convolutions for m in (conv, nn.ReLU())]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(6 * 16, 4)).eval()

    x = images(2, size=4)
    plain, scaled = (
        Engine(network(f), "lrp-undivided", precision, input_shape=(3, 4, 4)).attribute(x, 1).maps
        for f in (1.0, factor)
    )
    assert plain.flatten(1).abs().amax(1).eq(1).all()
    torch.testing.assert_close(scaled, plain, rtol=0, atol=1e-30)


def test_what_the_method_says_nothing_of_is_refused() -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"lrp-undivided .*no pull-back for layer_norm.*blocks\.0\.norm1"
    ) as refusal:
        Engine(FAMILIES["vit"](), "lrp-undivided", input_shape=(3, 16, 16))
    assert {kind for kind, _ in refusal.value.operations} == {"layer_norm", "attention"}
