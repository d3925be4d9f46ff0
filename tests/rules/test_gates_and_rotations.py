"""Gates and rotary embeddings, whose pull-backs are done in one pass, against the separate steps they are made of."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ramp_fast import Engine, ops
from ramp_fast import graph as g
from ramp_fast.capture.linear_maps import LinearMap, OfLastRows, exchange_of
from ramp_fast.rules import abslrp, fusion, junctions, pools
from ramp_fast.rules.masses import Masses

Turn = Callable[[Tensor, Tensor, Tensor], Tensor]


def neighbours(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + torch.stack([-x[..., 1::2], x[..., ::2]], -1).reshape(x.shape) * sin


def halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


def summed(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """No exchange of partners."""
    return x * cos + x[..., :1].expand(x.shape) * sin


class Rotated(nn.Module):
    """A block of attention whose queries and keys are turned, all but those of the first tokens."""

    def __init__(self, turn: Turn, first: int, heads: int = 1) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.turn, self.first = turn, first
        self.patches, self.tokens = nn.Conv2d(3, 16, 4, 4), nn.Parameter(torch.randn(1, first, 16))
        self.qkv, self.head = nn.Linear(16, 48), nn.Linear(16, 5)
        angle = torch.randn(heads, 9, 8) if heads > 1 else torch.randn(9, 8)
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())

    def turned(self, x: Tensor) -> Tensor:
        if not self.first:
            return self.turn(x, self.cos, self.sin)
        return torch.cat([x[:, :, : self.first], self.turn(x[:, :, self.first :], self.cos, self.sin)], 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.tokens.expand(len(x), -1, -1), x], 1) if self.first else x
        q, k, v = self.qkv(x).view(len(x), -1, 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
        y = nn.functional.scaled_dot_product_attention(self.turned(q), self.turned(k), v)
        return self.head((x + y.transpose(1, 2).flatten(2)).mean(1))


def separately(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every operation by itself: no folding, no fused activation, no operator for gates, rotations or parts."""
    monkeypatch.setattr(abslrp, "fold_moved_rows", lambda graph: None)
    monkeypatch.setattr(fusion._Search, "_activation_below", lambda self, product: None)
    monkeypatch.setattr(junctions, "plain_product", lambda node: False)
    monkeypatch.setattr(pools, "exchange_of", lambda terms, shape: None)
    monkeypatch.setattr(Masses, "settled_together", lambda self, parts, c: None)
    monkeypatch.setattr(Masses, "measured", lambda self, x, part, axis: self.exact(x, part, axis))


def images() -> Tensor:
    return torch.randn(3, 3, 12, 12, generator=torch.Generator().manual_seed(5))


def agrees(model: nn.Module, rule: str, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """Maps in one pass are those of separate steps, with contrast and without, and of an image alone."""
    engine = Engine(model.eval(), rule, "float64", input_shape=(3, 12, 12), micro_batch=3)
    found = [engine.attribute(images(), contrast=contrast).maps for contrast in ("others", "none")]
    # To the last bit but for products of float64, which are a library's.
    mixed = Engine(model.eval(), rule, "mixed", input_shape=(3, 12, 12), micro_batch=3)
    assert torch.equal(mixed.attribute(images()[1:2], target=1).maps, mixed.attribute(images(), target=1).maps[1:2])
    separately(monkeypatch)
    steps = Engine(model.eval(), rule, "float64", input_shape=(3, 12, 12), micro_batch=3)
    for contrast, maps in zip(("others", "none"), found, strict=True):
        torch.testing.assert_close(maps, steps.attribute(images(), contrast=contrast).maps, rtol=1e-8, atol=1e-12)
    return engine


@pytest.mark.parametrize("rule", ["abslrp", "abslrp-release"])
@pytest.mark.parametrize(("turn", "heads"), [(neighbours, 1), (halves, 1), (halves, 2), (summed, 1)])
@pytest.mark.parametrize("first", [0, 1, 2])
def test_rotations(turn: Turn, heads: int, first: int, rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = agrees(Rotated(turn, first, heads), rule, monkeypatch)
    maps = [n for n in engine.plan.graph.nodes if n.kind == g.LINEAR_MAP]
    # With equal shares every operation has masses of its own.
    folded = first > 0 and rule == "abslrp"
    assert [type(n.target) for n in maps] == [OfLastRows if folded else LinearMap] * 2
    assert all(n.params.first == (first if folded else 0) for n in maps)
    kinds = [n.kind for n in engine.plan.graph.nodes if n.kind == g.REARRANGE and n.params.how in ("cat", "slice")]
    assert len(kinds) == (0 if not first else 1 if folded else 7)  # that of the tokens stays


@pytest.mark.parametrize("first", [0, 1])
def test_rotations_before_heads_are_moved(first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    class Before(Rotated):
        def turned(self, x: Tensor) -> Tensor:
            x, cos, sin = x.transpose(1, 2), self.cos.unsqueeze(1), self.sin.unsqueeze(1)
            moved = self.turn(x[:, self.first :], cos, sin) if self.first else self.turn(x, cos, sin)
            return (torch.cat([x[:, : self.first], moved], 1) if self.first else moved).transpose(1, 2)

    engine = agrees(Before(halves, first), "abslrp", monkeypatch)
    maps = [n for n in engine.plan.graph.nodes if n.kind == g.LINEAR_MAP]
    assert [(n.params.dim, n.params.first) for n in maps] == [(1, 1) if first else (0, 0)] * 2


def test_other_readers_of_the_parts_keep_them() -> None:
    class Read(Rotated):
        def turned(self, x: Tensor) -> Tensor:
            moved = x[:, :, : self.first]
            return torch.cat([moved, self.turn(x[:, :, self.first :], self.cos, self.sin)], 2) + moved.mean(
                (1, 2, 3), True
            )

    plan = Engine(Read(neighbours, 1).eval(), precision="float64", input_shape=(3, 12, 12)).plan
    assert not any(isinstance(n.target, OfLastRows) for n in plan.graph.nodes)


def test_exchanges() -> None:
    shape = torch.Size((2, 3, 4, 6))

    def map_(turn: Turn, cos: Tensor, sin: Tensor):  # type: ignore[no-untyped-def]
        class Alone(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.register_buffer("cos", cos)
                self.register_buffer("sin", sin)

            def forward(self, x: Tensor) -> Tensor:
                return turn(x, self.cos, self.sin).flatten(1)

        plan = Engine(Alone().eval(), precision="float64", input_shape=shape[1:]).plan
        (node,) = (n for n in plan.graph.nodes if n.kind == g.LINEAR_MAP)
        x = torch.randn(shape, dtype=torch.float64)
        constants = [plan.constants[n].double() if n in plan.constants else len(x) for n in node.args[1:]]
        return exchange_of(node.target.terms(x, *constants), shape)

    one, per_head = torch.randn(4, 6), torch.randn(3, 4, 6)
    found = map_(neighbours, one, one + 1)
    assert (found.stay.shape, found.pair, found.rows_first) == ((1, 4, 6), 1, False)
    found = map_(halves, per_head, per_head + 1)
    assert (found.stay.shape, found.pair, found.rows_first) == ((3, 4, 6), 3, False)
    found = map_(halves, torch.randn(3, 1, 6), torch.randn(3, 1, 6))
    assert (found.stay.shape, found.pair, found.rows_first) == ((1, 3, 6), 3, True)
    assert map_(summed, one, one) is None


class Gated(nn.Module):
    """Tokens, or windows of them, or images with channels first, whose parts gate each other."""

    def __init__(self, function: nn.Module | None, last: bool, where: str) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.function, self.last, self.where = function, last, where
        self.patches, self.wide = nn.Conv2d(3, 16, 4, 4), nn.Linear(16, 24)
        self.narrow, self.head = nn.Linear(12, 16), nn.Linear(16, 5)

    def gated(self, a: Tensor, b: Tensor) -> Tensor:
        if self.function is None:
            return a * b
        return a * self.function(b) if self.last else self.function(a) * b

    def forward(self, x: Tensor) -> Tensor:
        images = self.patches(x)
        x = images.flatten(2).transpose(1, 2)
        if self.where == "windows":
            x = x.unflatten(1, (3, 3)).flatten(0, 1)
        if self.where == "images":
            wide = nn.functional.conv2d(images, self.wide.weight.view(24, 16, 1, 1), self.wide.bias)
            y = self.gated(*wide.chunk(2, 1)).flatten(2).transpose(1, 2)
        else:
            y = self.gated(*self.wide(x).chunk(2, -1))
        x = x + self.narrow(y)
        if self.where == "windows":
            x = x.unflatten(0, (-1, 3)).flatten(1, 2)
        return self.head(x.mean(1))


@pytest.mark.parametrize("rule", ["abslrp", "abslrp-release"])
@pytest.mark.parametrize("where", ["tokens", "windows", "images"])
@pytest.mark.parametrize(
    ("function", "last"),
    [(None, False), (nn.SiLU(), False), (nn.GELU(), True), (nn.Sigmoid(), True), (nn.Tanh(), True)],
)
def test_gates(function: nn.Module | None, last: bool, where: str, rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = agrees(Gated(function, last, where), rule, monkeypatch)
    (product,) = (s.operation for s in engine.plan.steps if s.node.kind == g.MUL and s.operation is not None)
    assert product.pullback_kernel == "gating_pullback"
    fused = function is not None and not isinstance(function, nn.Tanh)
    assert (product.fusion.fused_activation is not None) == fused


@pytest.mark.parametrize("parts", [(0,), (1, 2), (2, 0)])
def test_parts_that_nobody_reads(parts: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    class Some(Rotated):
        def forward(self, x: Tensor) -> Tensor:
            x = self.patches(x).flatten(2).transpose(1, 2)
            several = self.qkv(x).view(len(x), -1, 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
            return self.head(torch.stack([several[i].relu() for i in parts]).sum(0).transpose(1, 2).flatten(2).mean(1))

    agrees(Some(neighbours, 0), "abslrp", monkeypatch)


def test_an_activation_with_another_reader_has_its_own_step() -> None:
    class Twice(Gated):
        def gated(self, a: Tensor, b: Tensor) -> Tensor:
            a = nn.functional.silu(a)
            return a * b + a

    plan = Engine(Twice(None, False, "tokens").eval(), precision="float64", input_shape=(3, 12, 12)).plan
    (product,) = (s.operation for s in plan.steps if s.node.kind == g.MUL and s.operation is not None)
    assert product.fusion.fused_activation is None


def test_the_model_s_nan_shows() -> None:
    model = Gated(nn.SiLU(), False, "tokens")
    engine = Engine(model.eval(), precision="float32", input_shape=(3, 12, 12))
    with torch.no_grad():
        model.wide.bias[0] = float("nan")
    engine.refresh()
    assert engine.attribute(images(), target=0).maps.isnan().any()


@pytest.mark.parametrize("of", ["rotation", "gate"])
def test_without_kernels_for_the_device(of: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on GPUs, or with a backend that is forced and has no kernel for them."""

    def model() -> nn.Module:
        return (Rotated(neighbours, 2, 2) if of == "rotation" else Gated(nn.SiLU(), True, "tokens")).double().eval()

    x = images().double()
    want = Engine(model(), precision="float64").attribute(x).maps

    def refuse(*_: object) -> None:
        raise AssertionError("has no kernel there")

    for name in ("rotary", "rotary_pullback", "gating_pullback", "rescale_pieces"):
        monkeypatch.setattr(ops, name, refuse)
    monkeypatch.setattr(ops, "cpu_kernels", lambda device: False)
    found = Engine(model(), precision="float64").attribute(x).maps
    torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-12)
