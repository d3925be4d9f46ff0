"""Attention with relative positions and masks, whose pull-back is one step, against its products one by one."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from ramp_fast import Engine, ops
from ramp_fast import graph as g
from ramp_fast.capture import passes
from ramp_fast.capture.passes import joined_bias
from ramp_fast.rules import attention

HIDDEN = -100.0


class Windows(nn.Module):
    """As Swin: attention within windows of 3 x 3 tokens of 6 x 6, then within shifted ones that mask each other."""

    def __init__(self, by_window: bool = True, scale_first: bool = True) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.by_window, self.scale_first = by_window, scale_first
        self.patches, self.head = nn.Conv2d(3, 16, 2, 2), nn.Linear(16, 5)
        self.qkv = nn.ModuleList(nn.Linear(16, 48) for _ in range(2))
        self.norm = nn.ModuleList(nn.LayerNorm(16) for _ in range(2))
        self.table = nn.ParameterList(torch.randn(2, 25) for _ in range(2))
        place = torch.stack(torch.meshgrid(torch.arange(3), torch.arange(3), indexing="ij")).flatten(1)
        apart = place[:, :, None] - place[:, None] + 2
        self.register_buffer("apart", 5 * apart[0] + apart[1])
        part = torch.zeros(6, 6)
        part[3:5], part[5:] = 1, 2
        part = part * 3 + part.T
        part = self.windows(part[None, ..., None]).squeeze(-1)  # [4, 9]
        self.register_buffer("mask", HIDDEN * (part[:, None] != part[:, :, None]))

    @staticmethod
    def windows(x: Tensor) -> Tensor:
        b, _, _, c = x.shape
        return x.view(b, 2, 3, 2, 3, c).transpose(2, 3).reshape(-1, 9, c)

    def attend(self, block: int, x: Tensor) -> Tensor:
        q, k, v = self.qkv[block](x).view(len(x), 9, 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
        scores = q * 0.5 @ k.transpose(-2, -1) if self.scale_first else q @ k.transpose(-2, -1) / 2.0
        scores = scores + self.table[block][:, self.apart.view(-1)].view(1, 2, 9, 9)
        if block == 1 and self.by_window:
            scores = scores.view(-1, 4, 2, 9, 9) + self.mask.unsqueeze(1).unsqueeze(0)
            scores = scores.view(-1, 2, 9, 9)
        return (scores.softmax(-1) @ v).transpose(1, 2).reshape(len(x), 9, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).permute(0, 2, 3, 1)
        for block, shift in enumerate((0, 1)):
            y = self.windows(self.norm[block](x).roll((-shift, -shift), (1, 2)))
            y = self.attend(block, y).view(-1, 2, 2, 3, 3, 16).transpose(2, 3).reshape(-1, 6, 6, 16)
            x = x + y.roll((shift, shift), (1, 2))
        return self.head(x.mean((1, 2)))


class Positions(nn.Module):
    """As BEiT: a bias of every head, given to the function for attention."""

    def __init__(self, bias: Tensor) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.patches, self.head = nn.Conv2d(3, 16, 4, 4), nn.Linear(16, 5)
        self.qkv = nn.Linear(16, 48)
        if bias.is_floating_point():
            self.bias = nn.Parameter(bias)
        else:
            self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(x).view(len(x), 9, 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
        y = nn.functional.scaled_dot_product_attention(q, k, v, self.bias)
        return self.head((x + y.transpose(1, 2).flatten(2)).mean(1))


def images() -> Tensor:
    return torch.randn(3, 3, 12, 12, generator=torch.Generator().manual_seed(5))


def engine_of(model: nn.Module, rule: str, precision: str) -> Engine:
    return Engine(model.eval(), rule, precision, input_shape=(3, 12, 12), micro_batch=3)


def kernels(engine: Engine) -> list[str]:
    return [s.operation.pullback_kernel for s in engine.plan.steps if s.operation and s.node.kind == g.ATTENTION]


def contrasts(rule: str) -> list[dict[str, str]]:
    return [{"contrast": "others"}, {"contrast": "none"}] if rule.startswith("abslrp") else [{}]


def separately(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "_added_by_window", lambda scores, users: None)
    monkeypatch.setattr(attention.Forward, "in_one_step", lambda self, device: False)


def agrees(model: nn.Module, rule: str, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Maps in one step are those of products, with contrast and without, and of an image alone."""
    engine = engine_of(model, rule, "float64")
    assert set(kernels(engine)) <= {"attention_pullback", "attention_gradient"}
    assert len(kernels(engine)) == count
    found = [engine.attribute(images(), **how).maps for how in contrasts(rule)]
    mixed = engine_of(model, rule, "mixed")
    assert torch.equal(mixed.attribute(images()[1:2], target=1).maps, mixed.attribute(images(), target=1).maps[1:2])
    separately(monkeypatch)
    steps = engine_of(model, rule, "float64")
    for how, maps in zip(contrasts(rule), found, strict=True):
        expected = steps.attribute(images(), **how).maps
        assert expected.abs().max() > 1e-6
        torch.testing.assert_close(maps, expected, rtol=1e-8, atol=1e-12)


RULES = ["abslrp", "abslrp-release", "ramp", "attnlrp", "gradient-x-input"]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("scale_first", [False, True])
def test_shifted_windows(rule: str, scale_first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    agrees(Windows(scale_first=scale_first), rule, monkeypatch, 2)


def bias_of(name: str) -> Tensor:
    draw = torch.Generator().manual_seed(9)
    bias = torch.randn(1, 2, 9, 9, generator=draw)
    hidden = torch.rand(2, 9, 9, generator=draw) < 0.3
    hidden[:, range(9), range(9)] = False
    kinds = {
        "of heads": bias,
        "without a batch": bias[0],
        "of keys": bias[:, :1, :1],
        "no number": bias[0, 0] * 0,
        "minus infinity": torch.zeros(2, 9, 9).masked_fill(hidden, -math.inf),
        "-100 and a bias": bias.masked_fill(hidden, HIDDEN),
        "boolean": ~hidden[0],
    }
    return kinds[name]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "name", ["of heads", "without a batch", "of keys", "no number", "minus infinity", "-100 and a bias", "boolean"]
)
def test_positions(name: str, rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    agrees(Positions(bias_of(name)), rule, monkeypatch, 1)


def test_bias_and_mask_are_one_where_windows_lie_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(Windows(), "abslrp", "float64")
    found = [n for n in engine.plan.graph.nodes if n.kind == g.ATTENTION]
    assert [n.params.mask.example for n in found] == [(1, 2, 9, 9), (4, 2, 9, 9)]
    assert not any(n.kind == g.SOFTMAX for n in engine.plan.graph.nodes)
    # The very function: logits are those of the model.
    model, x = Windows().double().eval(), images().double()
    torch.testing.assert_close(engine.attribute(x).logits, model(x).detach())


def test_windows_of_another_order_stay_as_they_are() -> None:
    class Turned(Windows):
        """Windows outside, samples inside: a mask of each is no longer one of the first axis."""

        def attend(self, block: int, x: Tensor) -> Tensor:
            if block == 0:
                return super().attend(block, x)
            q, k, v = self.qkv[block](x).view(len(x), 9, 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
            scores = (q @ k.transpose(-2, -1)).view(-1, 2, 2, 2, 9, 9) + self.mask[:2, None]
            return (scores.view(-1, 2, 9, 9).softmax(-1) @ v).transpose(1, 2).reshape(len(x), 9, 16)

    engine = engine_of(Turned(), "abslrp", "float64")
    assert sum(n.kind == g.SOFTMAX for n in engine.plan.graph.nodes) == 1


def test_what_a_mask_hides_stays_hidden_under_a_high_bias() -> None:
    mask = torch.zeros(1, 2, 1, 3, 3)
    mask[0, 1, 0, 0, 1:] = mask[0, 1, 0, 1] = HIDDEN
    bias = torch.full((4, 3, 3), 7.0)
    joined = joined_bias(mask, bias)
    assert joined.shape == (2, 4, 3, 3)
    assert (joined[0] == 7).all()
    assert (joined[1, :, 0] == torch.tensor([7.0, -math.inf, -math.inf])).all()
    assert (joined[1, :, 1] == HIDDEN + 7).all()  # a row as a whole keeps its softmax
    assert torch.equal(joined_bias(mask), mask[0])


@pytest.mark.parametrize("rule", ["abslrp", "attnlrp"])
def test_a_table_that_changes(rule: str) -> None:
    model = Windows()
    engine = engine_of(model, rule, "float64")
    before = engine.attribute(images(), target=1).maps
    with torch.no_grad():
        model.table[1].mul_(-1)
    after = engine.attribute(images(), target=1).maps
    assert torch.equal(after, engine_of(model, rule, "float64").attribute(images(), target=1).maps)
    assert (after - before).norm() > 1e-3 * before.norm()


@pytest.mark.parametrize("rule", ["abslrp", "attnlrp"])
def test_a_backend_without_a_kernel_for_a_bias(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products in place of the operator, windows too: the same maps."""
    engine = engine_of(Windows(), rule, "float64")
    found = engine.attribute(images(), target=1).maps
    monkeypatch.setattr(ops, "cpu_kernels", lambda device: False)
    monkeypatch.setattr(ops, "attention_pullback", None)
    monkeypatch.setattr(ops, "attention_gradient", None)
    torch.testing.assert_close(engine.attribute(images(), target=1).maps, found, rtol=1e-8, atol=1e-12)
    other = engine_of(Windows(), rule, "float64")  # made where there is none: the plan says what runs
    assert set(kernels(other)) == {"products"}
    torch.testing.assert_close(other.attribute(images(), target=1).maps, found, rtol=1e-8, atol=1e-12)
