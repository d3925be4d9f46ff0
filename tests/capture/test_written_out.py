"""Norms and projections that are written out have the maps of the functions that they are."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))

from ramp_fast import Engine
from ramp_fast import graph as g

EPS = 1e-5
Call = Callable[..., Tensor]


def _plain(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(((x - mean) ** 2).mean(-1, keepdim=True) + EPS) * w + b


def _in_place(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    x = x - x.mean(dim=-1, keepdim=True)
    y = x * torch.rsqrt(EPS + x.pow(2).mean(dim=-1, keepdim=True))
    y *= w
    y += b
    return y


def _by_var(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    variance = x.var(-1, unbiased=False, keepdim=True)
    return b + w * ((x - x.mean(-1, keepdim=True)) / (variance + EPS).pow(0.5))


def _by_moments(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    mean = x.mean(-1).unsqueeze(-1)
    variance = (x * x).mean(-1, keepdim=True) - mean * mean
    return torch.addcmul(b, (x - mean) * (variance + EPS) ** -0.5, w)


def _over_channels(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """ConvNeXt's: of ``[B, C, N, 1]``, over the axis behind the batch's."""
    x = x.transpose(1, 2).unsqueeze(-1)
    mean = x.mean(1, keepdim=True)
    variance = (x - mean).square().mean(1, keepdim=True)
    x = w[:, None, None] * ((x - mean) / (variance + EPS).sqrt()) + b[:, None, None]
    return x.squeeze(-1).transpose(1, 2)


def _rms(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)) + b


def layer_norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.layer_norm(x, (8,), w, b, EPS)


def rms_norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.rms_norm(x, (8,), w, EPS) + b


def _weighted_inverse(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    return (x - mean) * (w * (1 / torch.sqrt((x - mean).square().mean(-1, keepdim=True) + EPS))) + b


def _inverse_of_the_variance(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    inverse = (1 / (x.var(-1, correction=0, keepdim=True) + EPS)).sqrt().expand_as(x)
    return (x - x.mean(-1, keepdim=True)) * inverse * w + b


def _rms_by_reciprocal(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return x * torch.div(1.0, (x.pow(2).mean(-1, keepdim=True) + EPS) ** 0.5) * w + b


class Net(nn.Module):
    """Tokens of patches, a norm, a layer, and a norm without weight and bias behind a residual sum."""

    def __init__(self, norm: Call) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.stem, self.inner, self.head = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 8), nn.Linear(8, 5)
        self.weight, self.bias = nn.Parameter(torch.empty(8)), nn.Parameter(torch.empty(8))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(generator=generator)
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        x = x + self.inner(self.norm(x, self.weight, self.bias))
        return self.head(self.norm(x, self.weight, self.bias).mean(1))


IMAGES = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


def attributed(model: nn.Module) -> tuple[Tensor, list[str]]:
    engine = Engine(model.double().eval(), precision="float64")
    found = engine.attribute(IMAGES, torch.tensor([1, 3]))
    torch.testing.assert_close(found.logits, model(IMAGES).detach())
    return found.maps, [node.kind for node in engine.plan.graph.nodes]


@pytest.mark.parametrize(
    ("written", "function", "kind"),
    [
        (n, layer_norm, g.LAYER_NORM)
        for n in (_plain, _in_place, _by_var, _by_moments, _over_channels, _weighted_inverse, _inverse_of_the_variance)
    ]
    + [(n, rms_norm, g.RMS_NORM) for n in (_rms, _rms_by_reciprocal)],
)
def test_norms(written: Call, function: Call, kind: str) -> None:
    maps, kinds = attributed(Net(written))
    expected, _ = attributed(Net(function))
    assert kinds.count(kind) == 2
    torch.testing.assert_close(maps, expected, rtol=1e-7, atol=1e-9)


def test_what_is_no_layer_norm_is_not_taken_for_one() -> None:
    """Another variance (corrected, of other axes), eps beside the root, a mean of other axes."""

    def corrected(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + EPS).sqrt() * w + b

    def outside(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True).sqrt() + EPS) * w + b

    def other_axes(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return (x - x.mean(1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + EPS).sqrt() * w + b

    for norm in (corrected, outside, other_axes):
        _, kinds = attributed(Net(norm))
        assert g.LAYER_NORM not in kinds


class Maps(nn.Module):
    """Channels of a convolution through a norm."""

    def __init__(self, norm: Call) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.stem, self.head, self.norm = nn.Conv2d(3, 8, 3), nn.Linear(8, 5), norm
        self.weight, self.bias = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.stem(x), self.weight, self.bias).relu().square().mean((2, 3)))


def _groups(count: int) -> Call:
    def norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        groups = x.view(x.shape[0], count, -1)
        mean, variance = groups.mean(-1, keepdim=True), groups.var(-1, unbiased=False, keepdim=True)
        return ((groups - mean) / (variance + EPS).sqrt()).view_as(x) * w.view(1, -1, 1, 1) + b.view(1, -1, 1, 1)

    return norm


def _groups_of_rows(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    rows = x.reshape(-1, 4 * 36)
    rows = (rows - rows.mean(1, keepdim=True)) * torch.rsqrt(rows.var(1, correction=0, keepdim=True) + EPS)
    return rows.reshape(x.shape) * w[:, None, None] + b[:, None, None]


def _groups_in_five_axes(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    x = x.unflatten(1, (2, 4))
    variance, mean = torch.var_mean(x, (2, 3, 4), unbiased=False, keepdim=True)
    x = (x - mean) * (variance + EPS) ** -0.5
    return x.flatten(1, 2) * w[:, None, None] + b[:, None, None]


def _places(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    mean = x.mean((2, 3), keepdim=True)
    variance = (x - mean).square().mean((2, 3), keepdim=True)
    return torch.addcmul(b[:, None, None], (x - mean) * (1 / torch.sqrt(variance + EPS)), w[:, None, None])


def _everything(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    mean, variance = x.mean((1, 2, 3), keepdim=True), x.var((1, 2, 3), unbiased=False, keepdim=True)
    return (x - mean) / torch.sqrt(variance + EPS) * w.reshape(1, 8, 1, 1) + b.reshape(1, 8, 1, 1)


@pytest.mark.parametrize(
    ("written", "groups"),
    [(_groups(2), 2), (_groups(4), 4), (_groups_of_rows, 2), (_groups_in_five_axes, 2), (_places, 8), (_everything, 1)],
    ids=["two groups", "four groups", "rows", "five axes", "instance norm", "one group"],
)
def test_norms_of_groups(written: Call, groups: int) -> None:
    def group_norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.group_norm(x, groups, w, b, EPS)

    maps, kinds = attributed(Maps(written))
    expected, _ = attributed(Maps(group_norm))
    assert kinds.count(g.GROUP_NORM) == 1
    torch.testing.assert_close(maps, expected, rtol=1e-7, atol=1e-9)


def test_other_norms_of_groups_are_attributed_as_they_are_written() -> None:
    """The sample's own variance corrected, a deviation beside which eps is added, weights of every place."""

    def corrected(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        groups = x.unflatten(1, (2, -1)).flatten(2)
        groups = (groups - groups.mean(-1, keepdim=True)) / (groups.var(-1, keepdim=True) + EPS).sqrt()
        return groups.view_as(x) * w[:, None, None] + b[:, None, None]

    def outside(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        deviation = x.std((2, 3), unbiased=False, keepdim=True) + EPS
        return (x - x.mean((2, 3), keepdim=True)) / deviation * w[:, None, None] + b[:, None, None]

    def by_place(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        groups = x.unflatten(1, (2, -1)).flatten(2)
        groups = (groups - groups.mean(-1, keepdim=True)) / (groups.var(-1, False, keepdim=True) + EPS).sqrt()
        return groups.view_as(x) * w[:6] + b[:6]

    for norm in (corrected, outside, by_place):
        maps, kinds = attributed(Maps(norm))
        assert g.GROUP_NORM not in kinds
        assert bool(maps.isfinite().all())
        assert float(maps.abs().amax()) == 1.0


class Attention(nn.Module):
    def __init__(self, apart: bool) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.stem, self.mix, self.head = (
            nn.Conv2d(3, 8, 4, 4),
            nn.MultiheadAttention(8, 2, batch_first=True),
            nn.Linear(8, 5),
        )
        self.apart = apart

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        query, key = (x.detach(), x.detach()) if self.apart else (x, x)
        return self.head((x + self.mix(query, key, x, need_weights=False)[0]).mean(1))


def test_projections_of_one_tensor_under_three_names() -> None:
    apart, _ = attributed(Attention(True))
    together, _ = attributed(Attention(False))
    torch.testing.assert_close(apart, together, rtol=1e-7, atol=1e-9)
