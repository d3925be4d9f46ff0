"""Operations of the wider vocabulary, each on a tiny module against its definition by float64 autograd.

``R_x = x * d/dx <f(x) + f_abs(|x|), R / |f(x)|>``, normalised; ``f_abs`` is ``f`` at absolute weights, without bias.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ramp_fast import Engine, UnsupportedModelError
from ramp_fast.rules import AbsLRP

Function = Callable[[Tensor], Tensor]
# float64 on both sides; what differs is the order of sums.
TOLERANCE = 1e-11
SHAPE = (2, 4, 6)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Fn(nn.Module):
    """A function as a model; whatever it returns, flattened, are the logits. Tensors it uses are its parameters."""

    def __init__(self, function: Callable[..., Tensor], *tensors: Tensor) -> None:
        super().__init__()
        self.function = function
        self.tensors = nn.ParameterList([numbers(1), *tensors])

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *list(self.tensors)[1:]).flatten(1)


def engine_map(model: nn.Module, x: Tensor, seed: Tensor, rule: AbsLRP | None = None) -> Tensor:
    # No stabilizer: the definition has none.
    rule = rule or AbsLRP(stabilizer=0.0, maxpool="divided")
    engine = Engine(model.eval(), rule, "float64", input_shape=tuple(x.shape[1:]))  # type: ignore[arg-type]
    result = engine.attribute(x, seed, contrast="none", normalize="sum")
    with torch.no_grad():
        torch.testing.assert_close(result.logits, model(x), rtol=1e-12, atol=1e-12)
    return result.maps


def ratio(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(b == 0, 0.0, a / b)


def normalized(relevance: Tensor) -> Tensor:
    return relevance / relevance.abs().flatten(1).sum(1).view(-1, *[1] * (relevance.dim() - 1))


def pull(f: Function, f_abs: Function, x: Tensor, relevance: Tensor) -> Tensor:
    """The definition for one operand; ``f_abs`` takes the absolute value of its argument itself."""
    with torch.enable_grad():
        leaf = x.detach().clone().requires_grad_()
        z = f(leaf)
        c = ratio(relevance.reshape(z.shape), z.detach().abs())
        (d,) = torch.autograd.grad(((z + f_abs(leaf)) * c).sum(), leaf)
    return torch.where(d == 0, 0.0, x * d)


def check(actual: Tensor, expected: Tensor) -> None:
    expected = normalized(expected)
    error = (actual - expected).norm() / expected.norm()
    assert error < TOLERANCE, f"relative error {error:.1e}, worst at {(actual - expected).abs().argmax().item()}"


@dataclass
class One:
    """One operation: the function, and its absolute form of (|x|, absolute weights)."""

    f: Callable[..., Tensor]
    f_abs: Callable[..., Tensor]
    tensors: tuple[Tensor, ...] = ()


def linear(f: Callable[..., Tensor], *tensors: Tensor) -> One:
    return One(f, f, tensors)


def detached_std(u: Tensor) -> Tensor:
    flat = u.detach().flatten(2)
    return (flat.var(-1, unbiased=False) + 1e-5).sqrt()[:, :, None, None]


def bicubic(x: Tensor) -> Tensor:
    return F.interpolate(x, size=(7, 4), mode="bicubic", align_corners=False)


def bicubic_absolute(x: Tensor) -> Tensor:
    """The resampling matrix, written out, at absolute values."""
    basis = torch.eye(24, dtype=torch.float64).view(24, 1, 4, 6)
    matrix = bicubic(basis).flatten(1).t().abs()
    return (x.flatten(2) @ matrix.t()).unflatten(2, (7, 4))


MASK = numbers(4, 6, seed=9) > 0
INDEX = torch.randint(0, 4, (1, 2, 5, 6), generator=torch.Generator().manual_seed(3))

OPERATIONS: dict[str, One] = {
    "conv_transpose2d": One(
        lambda x, w, b: F.conv_transpose2d(x, w, b, stride=2, padding=1),
        lambda x, w, b: F.conv_transpose2d(x, w, stride=2, padding=1),
        (numbers(2, 3, 3, 3), numbers(3)),
    ),
    "conv2d, same, even": One(
        lambda x, w, b: F.conv2d(x, w, b, padding="same"),
        lambda x, w, b: F.conv2d(x, w, padding="same"),
        (numbers(3, 2, 2, 4), numbers(3)),
    ),
    "einsum with a constant": linear(lambda x, w: torch.einsum("bchw,hwk->bkc", x, w), numbers(4, 6, 5)),
    "einsum with two constants": linear(
        lambda x, w, v: torch.einsum("bchw,hk,wl->blkc", x, w, v), numbers(4, 3), numbers(6, 2)
    ),
    "constant left operand": linear(lambda x, w: w @ x, numbers(5, 4)),
    "batch of constant matrices": linear(lambda x, w: x @ w, numbers(2, 6, 3)),
    "bicubic": One(bicubic, bicubic_absolute),
    "col2im": linear(lambda x: F.fold(x.flatten(1).unflatten(1, (8, 6)), (3, 4), (2, 2))),
    "cumsum": linear(lambda x: x.cumsum(2)),
    "vector norm": linear(lambda x: torch.linalg.vector_norm(x, dim=-1)),
    "vector norm, p = 3, of channels": linear(lambda x: torch.linalg.vector_norm(x, 3, dim=1, keepdim=True)),
    "standard deviation": linear(lambda x: x.std((2, 3), unbiased=False)),
    "logsumexp": linear(lambda x: x.logsumexp((1,))),
    "instance norm": One(
        lambda x, w, b: (
            (x - x.detach().mean((2, 3), keepdim=True)) / detached_std(x) * w.view(-1, 1, 1) + b.view(-1, 1, 1)
        ),
        lambda x, w, b: x / detached_std(x) * w.view(-1, 1, 1),
        (numbers(2), numbers(2)),
    ),
    "multiplied by rsqrt": linear(lambda x: x * (x.detach().square().mean(1, keepdim=True) + 1e-5).rsqrt()),
    "normalize": linear(lambda x: x / torch.linalg.vector_norm(x.detach(), dim=-1, keepdim=True)),
    "log1p of squares": linear(lambda x: x.square().log1p()),
}
# What the engine is given where the definition above is written with detached statistics.
AS_WRITTEN: dict[str, Callable[..., Tensor]] = {
    "instance norm": lambda x, w, b: F.instance_norm(x, weight=w, bias=b),
    "multiplied by rsqrt": lambda x: x * (x.square().mean(1, keepdim=True) + 1e-5).rsqrt(),
    "normalize": lambda x: F.normalize(x, dim=-1),
    "log1p of squares": lambda x: x.square().log1p(),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operation_follows_the_definition(name: str) -> None:
    case, x = OPERATIONS[name], numbers(3, *SHAPE, seed=1)
    written = AS_WRITTEN.get(name, case.f)
    if name == "log1p of squares":  # two operations, one after the other
        seed = numbers(3, 48, seed=2).abs()
        y = x.square()
        relevance = pull(lambda u: u.log1p(), lambda u: u.abs().log1p(), y, seed.view(y.shape))
        expected = pull(lambda u: u.square(), lambda u: u.abs().square(), x, relevance)
    else:
        seed = numbers(*case.f(x, *case.tensors).flatten(1).shape, seed=2)
        absolute = [t.abs() for t in case.tensors]
        expected = pull(lambda u: case.f(u, *case.tensors), lambda u: case.f_abs(u.abs(), *absolute), x, seed)
    check(engine_map(Fn(written, *case.tensors), x, seed), expected)


# Values change place: relevance follows them, copies add up, padding and masks lose theirs.
MOVES: dict[str, Function] = {
    "unfold, overlapping": lambda x: x.unfold(2, 3, 1).unfold(3, 2, 2),
    "im2col": lambda x: F.unfold(x, (2, 3), padding=1),
    "reflected": lambda x: F.pad(x, (2, 1, 1, 0), mode="reflect"),
    "replicated": lambda x: F.pad(x, (1, 1, 2, 0), mode="replicate"),
    "padded by a number": lambda x: F.pad(x, (1, 0, 2, 1), value=1.5),
    "gathered": lambda x: x.gather(2, INDEX.expand(x.shape[0], -1, -1, -1)),
    "masked": lambda x: x.masked_fill(MASK, 3.0),
    "where": lambda x: torch.where(MASK, x, torch.full((4, 6), 0.5, dtype=torch.float64)),
    "reshaped as": lambda x: x.transpose(1, 2).reshape_as(x),
    "nearest": lambda x: F.interpolate(x, scale_factor=2.0, mode="nearest"),
}


@pytest.mark.parametrize("name", MOVES)
def test_moves(name: str) -> None:
    function, x = MOVES[name], numbers(3, *SHAPE, seed=1)
    seed = numbers(*function(x).flatten(1).shape, seed=2)
    leaf = x.clone().requires_grad_()
    z = function(leaf)
    (d,) = torch.autograd.grad((z * ratio(seed.view(z.shape), z.detach().abs())).sum(), leaf)
    check(engine_map(Fn(function), x, seed), x.abs() * d)


EXTREMES: dict[str, Function] = {
    "amax": lambda x: x.amax((2, 3)),
    "amax, keepdim": lambda x: x.amax(1, keepdim=True),
    "amin": lambda x: x.amin(-1),
    "max": lambda x: x.max(2)[0],
    "max_pool1d": lambda x: F.max_pool1d(x.flatten(1, 2), 3, 2),
    "max_pool3d": lambda x: F.max_pool3d(x, (1, 2, 2)),
    "adaptive_max_pool2d": lambda x: F.adaptive_max_pool2d(x, (2, 3)),
}


@pytest.mark.parametrize("divided", [True, False])
@pytest.mark.parametrize("name", EXTREMES)
def test_extremes(name: str, divided: bool) -> None:
    function, x = EXTREMES[name], numbers(3, *SHAPE, seed=1)
    seed = numbers(*function(x).flatten(1).shape, seed=2)
    leaf = x.clone().requires_grad_()
    z = function(leaf)
    c = ratio(seed.view(z.shape), z.detach().abs())
    (d,) = torch.autograd.grad((z * (c if divided else c * z.detach())).sum(), leaf)
    rule = AbsLRP(stabilizer=0.0, maxpool="divided" if divided else "undivided")
    check(engine_map(Fn(function), x, seed, rule), x.abs() * d)


@pytest.mark.parametrize("shares", ["kept", "equal"])
def test_einsum_of_two_tensors_is_a_junction(shares: str) -> None:
    left, right = numbers(6, 3, seed=4), numbers(6, 3, seed=5)

    def model(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
        return torch.einsum("bhd,bkd->bhk", x[:, 0] @ left, x[:, 1] @ right)

    x, seed = numbers(3, *SHAPE, seed=1), numbers(3, 16, seed=2)
    seed = seed / seed.abs().sum(1, keepdim=True)
    a, b = x[:, 0] @ left, x[:, 1] @ right

    def product(u: Tensor, v: Tensor) -> Tensor:
        return torch.einsum("bhd,bkd->bhk", u, v)

    r_a = pull(lambda u: product(u, b), lambda u: product(u.abs(), b.abs()), a, seed)
    r_b = pull(lambda u: product(a, u), lambda u: product(a.abs(), u.abs()), b, seed)
    m_a, m_b = (r.abs().sum((1, 2), keepdim=True) for r in (r_a, r_b))
    t_a, t_b = (m_a / (m_a + m_b), m_b / (m_a + m_b)) if shares == "kept" else (1.0, 1.0)
    x_a = pull(lambda u: u @ left, lambda u: u.abs() @ left.abs(), x[:, 0], r_a)
    x_b = pull(lambda u: u @ right, lambda u: u.abs() @ right.abs(), x[:, 1], r_b)
    expected = torch.stack([normalized(x_a) * t_a, normalized(x_b) * t_b], 1)
    rule = AbsLRP(stabilizer=0.0, shares=shares, maxpool="divided")
    check(engine_map(Fn(model, left, right), x, seed, rule), expected)


def test_addcmul_is_a_product_and_a_sum() -> None:
    weight, bias, x = numbers(2, 1, 1, seed=4), numbers(2, 1, 1, seed=5), numbers(3, *SHAPE, seed=1)
    seed = numbers(3, 48, seed=2)
    together = engine_map(Fn(lambda x, w, b: torch.addcmul(b, w, x), weight, bias), x, seed)
    apart = engine_map(Fn(lambda x, w, b: b + w * x, weight, bias), x, seed)
    torch.testing.assert_close(together, apart, rtol=0, atol=0)


def test_writing_into_a_slice() -> None:
    x, seed = numbers(3, *SHAPE, seed=1), numbers(3, 48, seed=2)

    def written(x: Tensor) -> Tensor:
        y = x * 1.0
        y[:, :, 1:3, 2:] = y[:, :, 1:3, 2:] + y[:, :, 2:4, 2:].relu()
        return y

    def joined(x: Tensor) -> Tensor:
        y = x * 1.0
        new = y[:, :, 1:3, 2:] + y[:, :, 2:4, 2:].relu()
        middle = torch.cat([y[:, :, 1:3, :2], new], 3)
        return torch.cat([y[:, :, :1], middle, y[:, :, 3:]], 2)

    check(engine_map(Fn(written), x, seed), engine_map(Fn(joined), x, seed))


def test_writing_through_a_view_of_everything() -> None:
    """The view and its source are one tensor: both have the new values."""
    x, seed = numbers(3, *SHAPE, seed=1), numbers(3, 48, seed=2)

    def written(x: Tensor) -> Tensor:
        y = x * 1.0
        y[:, :, 0:] = y[:, :, 0:].relu() + x
        return y * 2.0

    def in_place(x: Tensor) -> Tensor:
        y = x * 1.0
        F.dropout(y, 0.5, training=False).relu_()
        return (y + x) * 2.0

    def plain(x: Tensor) -> Tensor:
        return ((x * 1.0).relu() + x) * 2.0

    expected = engine_map(Fn(plain), x, seed)
    check(engine_map(Fn(written), x, seed), expected)
    check(engine_map(Fn(in_place), x, seed), expected)


class Caching(nn.Module):
    """Computes a table once and keeps it, as LeViT keeps its attention biases."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(numbers(6, 3))
        self.kept: dict[str, Tensor] = {}
        self.nested = [[self.kept]]

    def forward(self, x: Tensor) -> Tensor:
        if "table" not in self.kept:
            self.kept["table"] = self.weight * 2.0
        return (x @ self.kept["table"]).flatten(1)


def test_capture_leaves_no_tensors_in_a_models_caches() -> None:
    model, x, seed = Caching(), numbers(3, *SHAPE, seed=1), numbers(3, 24, seed=2)
    kept = model.kept
    Engine(model.eval(), precision="float64", input_shape=SHAPE)
    assert model.kept is kept
    assert not kept
    maps = engine_map(model, x, seed)  # runs the model as well: now the table is there
    assert torch.equal(kept["table"], model.weight * 2.0)
    torch.testing.assert_close(engine_map(model, x, seed), maps)


def _heads(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (x.transpose(2, 3) @ w).chunk(3, -1)
    return q, k, v


def test_attention_of_any_rank() -> None:
    w, x, seed = numbers(4, 15, seed=4), numbers(3, *SHAPE, seed=1), numbers(3, 60, seed=2)

    def deep(x: Tensor, w: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*(t.unsqueeze(2) for t in _heads(x, w))).squeeze(2)

    def flat(x: Tensor, w: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*(t.flatten(0, 1) for t in _heads(x, w))).unflatten(0, (-1, 2))

    def plain(x: Tensor, w: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*_heads(x, w))

    expected = engine_map(Fn(plain, w), x, seed)
    check(engine_map(Fn(deep, w), x, seed), expected)
    check(engine_map(Fn(flat, w), x, seed), expected)


def test_attention_with_a_bias_from_the_images() -> None:
    w, position, x, seed = numbers(4, 15, seed=4), numbers(6, 5, seed=5), numbers(3, *SHAPE, seed=1), numbers(3, 60)

    def fused(x: Tensor, w: Tensor, position: Tensor) -> Tensor:
        q, k, v = _heads(x, w)
        return F.scaled_dot_product_attention(q, k, v, q @ position.t())

    def written(x: Tensor, w: Tensor, position: Tensor) -> Tensor:
        q, k, v = _heads(x, w)
        return ((q * 5**-0.5) @ k.transpose(2, 3) + q @ position.t()).softmax(-1) @ v

    check(engine_map(Fn(fused, w, position), x, seed), engine_map(Fn(written, w, position), x, seed))


class Region(nn.Module):
    """Operations in a region of their own, as models use it to keep sums in float32."""

    def __init__(self, region: Callable[[], object]) -> None:
        super().__init__()
        self.region = region
        self.weight = nn.Parameter(numbers(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight
        with self.region():  # type: ignore[attr-defined]
            z = y.relu() * 2.0
        return (z + y).flatten(1)


def test_regions_are_inlined() -> None:
    x, seed = numbers(3, *SHAPE, seed=1), numbers(3, 24, seed=2)
    region = Region(lambda: torch.autocast("cpu", enabled=False))
    plain = Fn(lambda x, w: (x @ w).relu() * 2.0 + x @ w, numbers(6, 3))
    maps = engine_map(region, x, seed)
    assert maps.isfinite().all()
    once = Fn(lambda x, w: (lambda y: y.relu() * 2.0 + y)(x @ w), numbers(6, 3))
    check(maps, engine_map(once, x, seed))
    assert plain(x).shape == region(x).shape


def _diagonal(x: Tensor, w: Tensor) -> Tensor:
    return torch.einsum("bchh,h->bc", x[..., :4], w)


REFUSED: dict[str, tuple[nn.Module, str]] = {
    "positions of maxima": (Fn(lambda x: x * x.max(2, keepdim=True)[1]), "secondary result"),
    "a diagonal": (Fn(_diagonal, numbers(4)), "diagonal"),
    "an index from the images": (
        Fn(lambda x: x.gather(2, (x.abs() * 0).long())), "depends on the images|to torch.int64|dtype"
    ),
    "autocast": (Region(lambda: torch.autocast("cpu", torch.bfloat16)), "autocast"),
    "sorting": (Fn(lambda x: x.sort(-1)[0]), "sort"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_the_operation(name: str) -> None:
    model, message = REFUSED[name]
    with pytest.raises(UnsupportedModelError, match=message):
        Engine(model.eval(), precision="float64", input_shape=SHAPE)
