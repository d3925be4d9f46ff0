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
    [(n, layer_norm, g.LAYER_NORM) for n in (_plain, _in_place, _by_var, _by_moments, _over_channels)]
    + [(_rms, rms_norm, g.RMS_NORM)],
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
