"""Samples of a batch never meet: models that mix them are refused, all others are attributed image by image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ramp_fast import Engine
from ramp_fast.errors import UnsupportedModelError

SHAPE = (3, 8, 8)


class Net(nn.Module):
    """Tokens ``[B, T, C]`` and features ``[B, C]`` of images, given to a function that computes the logits."""

    def __init__(self, function: Callable[[Any, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.conv, self.head, self.cls = nn.Conv2d(3, 8, 3, 2, 1), nn.Linear(8, 5), nn.Parameter(torch.randn(1, 1, 8))
        self.second = nn.MultiheadAttention(8, 2)
        self.first = nn.MultiheadAttention(8, 2, batch_first=True)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16)

    def forward(self, x: Tensor) -> Tensor:
        maps = F.relu(self.conv(x))
        return self.function(self, maps.flatten(2).transpose(1, 2), maps.mean((2, 3)))

    def attend(self, x: Tensor) -> Tensor:
        return self.first(x, x, x, need_weights=False)[0]


MIXING: dict[str, tuple[Callable[[Any, Tensor, Tensor], Tensor], str]] = {
    "attention": (
        lambda m, t, f: m.head((t + m.second(t, t, t, need_weights=False)[0]).mean(1)), "scaled_dot.* in second "
    ),
    "encoder layer": (lambda m, t, f: m.head(m.layer(t).mean(1)), r"layer\.self_attn"),
    "softmax": (lambda m, t, f: m.head(f).softmax(0), "softmax in the model"),
    "scores between samples": (lambda m, t, f: m.head(torch.softmax(f @ f.t(), -1) @ f), "matmul"),
    "einsum": (lambda m, t, f: m.head(torch.einsum("bd,dc->bc", torch.einsum("bc,dc->bd", f, f), f)), "einsum"),
    "differences": (lambda m, t, f: m.head((f[:, None] - f[None]).mean(1)), "add"),
    "running sum": (lambda m, t, f: m.head(f).cumsum(0), "cumsum"),
    "layer norm": (lambda m, t, f: m.head(F.layer_norm(f.t(), (f.shape[0],)).t()), "layer_norm"),
    "group norm": (
        lambda m, t, f: m.head(F.group_norm(t.transpose(1, 2).reshape(1, -1, 16), 2).view(-1, 8, 16).mean(2)),
        "group_norm",
    ),
    "average pool": (lambda m, t, f: m.head(F.avg_pool1d(f.t()[None], 3, 1, 1)[0].t()), "avg_pool1d"),
    "max pool": (lambda m, t, f: m.head(F.max_pool1d(f.t()[None], 3, 1, 1)[0].t()), "max_pool1d"),
    "convolution": (
        lambda m, t, f: m.head(F.conv1d(f.t()[None], torch.ones(8, 8, 3), padding=1)[0].t()), "conv1d|conv "
    ),
    "maximum": (lambda m, t, f: m.head(f - f.amax(0)), "amax"),
    "roll by the example's batch": (lambda m, t, f: m.head(f.roll(2, 0)), "roll"),
    "instance norm": (lambda m, t, f: m.head(F.instance_norm(f.t()[None])[0].t()), "instance_norm"),
    "pairs": (lambda m, t, f: m.head(f + f.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)), "rearrange"),
}  # fmt: skip


@pytest.mark.parametrize("name", MIXING)
def test_models_that_mix_samples_are_refused(name: str) -> None:
    function, words = MIXING[name]
    with pytest.raises(UnsupportedModelError, match=rf"(?=.*mixes the samples of a batch)(?=.*({words}))"):
        Engine(Net(function).eval(), input_shape=SHAPE)


@pytest.mark.parametrize(
    "function",
    [
        lambda m, t, f: m.head(f + torch.arange(f.shape[0], dtype=f.dtype).unsqueeze(1)),
        lambda m, t, f: m.head(f * torch.full((1,), 1.0 / f.shape[0])),
        lambda m, t, f: m.head(f * torch.full((f.shape[0], 1), f.shape[0])),
    ],
    ids=["places", "share", "number of samples"],
)
def test_constants_that_depend_on_the_batch_are_refused(function: Callable[[Any, Tensor, Tensor], Tensor]) -> None:
    with pytest.raises(UnsupportedModelError, match="computed from the size of the batch"):
        Engine(Net(function).eval(), input_shape=SHAPE)


def _with_token(token: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Net, Tensor, Tensor], Tensor]:
    return lambda m, t, f: m.head(m.attend(torch.cat([token(m.cls, t), t], 1))[:, 0])


def _sum_of_halves(y: Tensor, count: int) -> Tensor:
    return y[:count] + 2 * y[count:]


def _shifted_windows(m: Net, t: Tensor, f: Tensor) -> Tensor:
    windows = t.view(-1, 2, 2, 2, 2, 8).roll((1, 1), (1, 3)).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, 8)
    return m.head(m.attend(windows).reshape(-1, 16, 8).mean(1))


SEPARATE: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "token, expand to shape": _with_token(lambda c, t: c.expand(t.shape[0], -1, -1)),
    "token, expand to len": _with_token(lambda c, t: c.expand(len(t), -1, -1)),
    "token, expand_as": _with_token(lambda c, t: c.expand_as(t[:, :1])),
    "token, stack": _with_token(lambda c, t: torch.stack([c[0]] * len(t))),
    "token, repeat": _with_token(lambda c, t: c.repeat(t.size(0), 1, 1)),
    "token, added to zeros": _with_token(lambda c, t: c + torch.zeros_like(t[:, :1])),
    "windows": _shifted_windows,
    "tokens one by one": lambda m, t, f: m.head(t.reshape(-1, 8)).view(-1, 16, 5).mean(1),
    "batch second": lambda m, t, f: m.head(m.layer(t.transpose(0, 1)).mean(0)),
    "flipped copies": lambda m, t, f: sum(m.head(torch.cat([t, t.flip(1)])[:, 0]).chunk(2)),
    "first of two copies": lambda m, t, f: m.head(torch.cat([f, f.flip(1)])[: len(f)]),
    "last of two copies": lambda m, t, f: m.head(torch.cat([f, f.flip(1)]))[-f.size(0) :],
    "both of two copies": lambda m, t, f: _sum_of_halves(m.head(torch.cat([f, f.flip(1)])), f.shape[0]),
    "halves of two copies": lambda m, t, f: _sum_of_halves(y := m.head(torch.cat([f, f.flip(1)])), y.shape[0] // 2),
    "two of three copies": lambda m, t, f: m.head(torch.cat([t, t.flip(1), -t], 0)[len(t) :]).mean(1)[: len(t)],
    "a copy by narrow": lambda m, t, f: m.head(torch.cat([f, f.flip(1)])).narrow(0, len(f), len(f)),
    "copies of channels": lambda m, t, f: m.head(torch.cat([f, -f], 1)[:, f.shape[1] // 2 : 3 * f.shape[1] // 2]),
    "batch last": lambda m, t, f: (m.head.weight @ f.t()).t(),
    "pool across channels": lambda m, t, f: m.head(F.avg_pool1d(f[None], 3, 1, 1)[0]),
    "index of every sample": lambda m, t, f: m.head(t[torch.arange(len(t)), 3]),
    "index by shape": lambda m, t, f: m.head(t[torch.arange(t.shape[0]), 3]),
    "image by image": lambda m, t, f: torch.stack([m.head(row) for row in f]),
    "size as an int": lambda m, t, f: m.head(t.view(int(t.size(0)), 16, 8).mean(1)),
    "size through a tensor": lambda m, t, f: m.head(t.view(torch.tensor(t.shape)[0], 16, 8).mean(1)),
}


@pytest.mark.parametrize("name", SEPARATE)
def test_models_that_keep_samples_apart_are_attributed(name: str) -> None:
    model = Net(SEPARATE[name]).double().eval()
    images = torch.randn(3, *SHAPE, dtype=torch.float64)
    engine = Engine(model, precision="float64", input_shape=SHAPE, micro_batch=3)
    a = engine.attribute(images, 1, "none", "none")
    torch.testing.assert_close(a.logits, model(images), rtol=0, atol=1e-12)
    alone = torch.cat([engine.attribute(images[i : i + 1], 1, "none", "none").maps for i in range(3)])
    torch.testing.assert_close(a.maps, alone, rtol=0, atol=1e-10)  # another order of sums in float64


def test_weights_that_are_nan_are_no_reason_to_refuse() -> None:
    """NaN is not equal to itself: tokens of NaN do not differ from sample to sample."""
    model = Net(SEPARATE["token, expand to shape"]).eval()
    nn.init.constant_(model.cls, torch.nan)
    assert bool(Engine(model, input_shape=SHAPE).logits(torch.randn(2, *SHAPE)).isnan().all())
