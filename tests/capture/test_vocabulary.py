"""Operations of the wider vocabulary, each on a tiny module against its definition by float64 autograd.

``R_x = x * d/dx <f(x) + f_abs(|x|), R / |f(x)|>``, normalised; ``f_abs`` is ``f`` at absolute weights, without bias.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention

from ramp_fast import Engine, UnsupportedModelError
from ramp_fast.rules import AbsLRP, RelativeStabilizer

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


def cubic_down(x: Tensor) -> Tensor:
    return F.interpolate(x, size=(3, 4), mode="bicubic", antialias=True)


def cubic_up(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=(1.5, 2.0), mode="bicubic", align_corners=True)


def absolute_map(function: Function, x: Tensor) -> Tensor:
    """A linear map of ``[4, 6]``, its matrix written out, at absolute values."""
    basis = function(torch.eye(24, dtype=torch.float64).view(24, 1, 4, 6))
    return (x.flatten(2) @ basis.flatten(1).abs()).unflatten(2, basis.shape[2:])


GRID = numbers(1, 3, 5, 2, seed=8) * 0.5
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
    "bicubic": One(bicubic, lambda x: absolute_map(bicubic, x)),
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
    "resampling, cubic, antialiased": One(cubic_down, lambda x: absolute_map(cubic_down, x)),
    "resampling, cubic, by a factor": One(cubic_up, lambda x: absolute_map(cubic_up, x)),
    "resampling, linear, antialiased": linear(
        lambda x: F.interpolate(x, size=(3, 9), mode="bilinear", antialias=True, align_corners=False)
    ),
    "resampling, trilinear": linear(lambda x: F.interpolate(x[:, None], scale_factor=(2, 1.5, 0.5), mode="trilinear")),
    "resampling, area": linear(lambda x: F.interpolate(x, size=(3, 4), mode="area")),
    "grid_sample": linear(lambda x: F.grid_sample(x, GRID.expand(x.shape[0], -1, -1, -1), align_corners=False)),
    "bilinear with a constant": linear(
        lambda x, w, v: F.bilinear(x, v.expand(x.shape), w), numbers(3, 6, 6), numbers(6)
    ),
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
    "nearest-exact": lambda x: F.interpolate(x, size=(7, 4), mode="nearest-exact"),
    "nearest in one axis": lambda x: F.interpolate(x.flatten(1, 2), size=9, mode="nearest"),
    "nearest in three axes": lambda x: F.interpolate(x[:, None], size=(3, 4, 3), mode="nearest-exact"),
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


# Two ways to write one model give one map.
A, B = numbers(2, 2, 1, 1, seed=6), numbers(2, 2, 1, 1, seed=7)
ROWS = numbers(6, seed=8)
TEXT = numbers(5, 6, seed=4)


def two(x: Tensor) -> tuple[Tensor, Tensor]:
    """Two tensors of the images."""
    return F.conv2d(x, A), F.conv2d(x, B)


def with_zeros(x: Tensor) -> Tensor:
    y = F.conv2d(x, A)
    y[y < 0] = 0
    return y


def written(places: object, take: object) -> Function:
    def write(x: Tensor) -> Tensor:
        y = x * 1.0
        y[(slice(None), slice(None), places)] = x[(slice(None), slice(None), take)].relu()
        return y

    return write


def filled(x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[:, :, 1:3] = x[:, :, 1:3]
    return y


def through_part(x: Tensor) -> Tensor:
    y = x * 1.0
    y.chunk(2, -1)[0].mul_(2.0)
    return y + x


def gem(p: object) -> Function:
    return lambda x: x.clamp(min=1e-3).pow(p).mean((2, 3)).pow(1 / p)  # type: ignore[arg-type, operator]


def image(x: Tensor) -> Tensor:
    return F.normalize(x.mean((1, 2)), dim=-1)


def image_root(x: Tensor) -> Tensor:
    return x.abs().mean((1, 2, 3), keepdim=True).sqrt()


def zeroed(x: Tensor, places: object) -> Tensor:
    y = x * 1.0
    y[..., places] = 0.0
    return y


P = numbers(1, seed=5).abs()[0] + 2
ROW_MASK = torch.tensor([True, False, True, False, False, True])
LISTED_MASK, ARRAY_MASK = ROW_MASK.tolist(), ROW_MASK.numpy()
SQUARE_MASK = torch.zeros(4, 6, dtype=torch.bool)
SQUARE_MASK[[0, 1, 3], [1, 4, 5]] = True
TWO_WAYS: dict[str, tuple[Function, Function]] = {
    "glu": (lambda x: F.glu(x, -1), lambda x: x[..., :3] * x[..., 3:].sigmoid()),
    "log_softmax at the end": (lambda x: x.mean((1, 2)).log_softmax(-1), lambda x: x.mean((1, 2))),
    "softmax at the end": (lambda x: x.mean((1, 2)).softmax(1), lambda x: x.mean((1, 2))),
    "log of softmax at the end": (lambda x: x.mean((1, 2)).softmax(1).log(), lambda x: x.mean((1, 2))),
    "squeeze": (lambda x: x.mean((2, 3), keepdim=True).squeeze()[:, [1, 0]], lambda x: x.mean((2, 3))[:, [1, 0]]),
    "GeM with a number": (gem(P), gem(float(P))),
    "GeM with average pooling": (
        gem(P), lambda x: F.avg_pool2d(x.clamp(min=1e-3).pow(P), (x.size(-2), x.size(-1))).pow(1 / P)
    ),
    "texts by images": (lambda x: (P.exp() * (TEXT @ image(x).t())).t(), lambda x: P.exp() * image(x) @ TEXT.t()),
    "cosine similarity": (
        lambda x: F.cosine_similarity(x.mean((1, 2))[:, None], TEXT, dim=-1),
        lambda x: (
            x.mean((1, 2))[:, None] / image_norm(x) * (TEXT / TEXT.norm(dim=-1, keepdim=True))
        ).sum(-1),
    ),
    "maximum": (lambda x: torch.maximum(*two(x)), lambda x: (lambda a, b: torch.where(a > b, a, b))(*two(x))),
    "max of two": (lambda x: torch.max(*two(x)), lambda x: torch.fmax(*two(x))),
    "clamp by tensors": (
        lambda x: x.clamp(max=ROWS), lambda x: torch.where(x > ROWS, ROWS.expand(x.shape), x)
    ),
    "a mask as a factor": (lambda x: x * (x < 0.5), lambda x: torch.where(x < 0.5, x, 0.0)),
    "a mask as numbers": (lambda x: x * (1 - (x >= 0.5).float()), lambda x: x.masked_fill(x >= 0.5, 0.0)),
    "zeros under a mask": (with_zeros, lambda x: (lambda y: y.masked_fill(y < 0, 0.0))(F.conv2d(x, A))),
    "masked mean": (
        lambda x: (lambda m: (x * m).sum(2) / m.sum(2).clamp(min=1))((x > 0).any(-1, keepdim=True).long()),
        lambda x: (lambda m: torch.where(m, x, 0.0).sum(2) / m.double().sum(2).clamp(min=1))((x > 0).any(3, True)),
    ),
    "ellipsis": (
        lambda x: torch.einsum("...ij,...kj", x, F.conv2d(x, A)),
        lambda x: torch.einsum("bcij,bckj->bcik", x, F.conv2d(x, A)),
    ),
    "bilinear": (
        lambda x: F.bilinear(x, F.conv2d(x, A), W3),
        lambda x: torch.einsum("bchi,kij,bchj->bchk", x, W3, F.conv2d(x, A)),
    ),
    "instance norm, running": (
        lambda x: F.instance_norm(x, ROWS[:2], ROWS[2:4].abs(), A[0, :, 0, 0], use_input_stats=False),
        lambda x: F.batch_norm(x, ROWS[:2], ROWS[2:4].abs(), A[0, :, 0, 0]),
    ),
    "rrelu": (lambda x: F.rrelu(x, 0.1, 0.3), lambda x: F.leaky_relu(x, 0.2)),
    "addmm": (
        lambda x: torch.addmm(ROWS[:5], x.mean((1, 2)), TEXT.t(), beta=0.5, alpha=2),
        lambda x: x.mean((1, 2)) @ TEXT.t() * 2 + ROWS[:5] * 0.5,
    ),
    "lerp": (lambda x: torch.lerp(*two(x), 0.25), lambda x: (lambda a, b: a * (1 - 0.25) + b * 0.25)(*two(x))),
    "sub with alpha": (lambda x: torch.sub(*two(x), alpha=2), lambda x: (lambda a, b: a - b * 2)(*two(x))),
    "logaddexp": (lambda x: torch.logaddexp(*two(x)), lambda x: torch.stack(two(x), -1).logsumexp(-1)),
    "std_mean": (lambda x: (lambda s, m: s + m)(*torch.std_mean(x, (2, 3))), lambda x: x.std((2, 3)) + x.mean((2, 3))),
    "aliases": (lambda x: torch.multiply(torch.special.expit(x), x.clip(0)), lambda x: x.sigmoid() * x.clamp(min=0)),
    "every second row written": (
        written(slice(0, 4, 2), slice(0, 4, 2)),
        lambda x: torch.stack([x[:, :, ::2].relu(), x[:, :, 1::2]], 3).flatten(2, 3),
    ),
    "one row written": (written(1, 0), lambda x: torch.cat([x[:, :, :1], x[:, :, :1].relu(), x[:, :, 2:]], 2)),
    "listed rows written": (
        written([2, 1], [0, 3]), lambda x: torch.cat([x[:, :, :1], x[:, :, [3, 0]].relu(), x[:, :, 3:]], 2)
    ),
    "written through a part": (through_part, lambda x: torch.cat([x[..., :3] * 2.0, x[..., 3:]], -1) + x),
    "rows of zeros": (filled, lambda x: F.pad(x[:, :, 1:3], (0, 0, 1, 1))),
    "a mask as an index": (lambda x: x[..., ROW_MASK], lambda x: x[..., [0, 2, 5]]),
    "a mask as a list": (lambda x: x[..., LISTED_MASK], lambda x: x[..., ARRAY_MASK]),
    "a mask of two axes": (lambda x: x[:, :, SQUARE_MASK], lambda x: x[:, :, [0, 1, 3], [1, 4, 5]]),
    "places of a mask": (lambda x: x[..., ROW_MASK.nonzero().squeeze(1)], lambda x: x[..., torch.where(ROW_MASK)[0]]),
    "entries of a mask written": (lambda x: zeroed(x, ROW_MASK), lambda x: zeroed(x, [0, 2, 5])),
    "scaled inverse of a statistic": (
        lambda x: x * (0.5 * ROWS[:1] / image_root(x)), lambda x: x / image_root(x) * (0.5 * ROWS[:1]),
    ),
    "limited inverse of a statistic": (
        lambda x: x * (1 / image_root(x)).clamp(max=1e6), lambda x: x / image_root(x).clamp(min=1e-6)
    ),
    "flags in tensors": (lambda x: x * 2.0 if bool(P > 1) else x, lambda x: x * 2.0),
}  # fmt: skip


def image_norm(x: Tensor) -> Tensor:
    return x.mean((1, 2))[:, None].norm(dim=-1, keepdim=True)


W3 = numbers(3, 6, 6, seed=3)


@pytest.mark.parametrize("name", TWO_WAYS)
def test_two_ways_to_write_a_model(name: str) -> None:
    x = numbers(3, *SHAPE, seed=1)
    maps = []
    for function in TWO_WAYS[name]:
        engine = Engine(Fn(function).eval(), AbsLRP(stabilizer=0.0), "float64", input_shape=SHAPE)
        seed = numbers(*function(x).flatten(1).shape, seed=2)
        maps.append(engine.attribute(x, seed, contrast="none", normalize="sum").maps)
        alone = engine.attribute(x[1:2], seed[1:2], contrast="none", normalize="sum").maps
        torch.testing.assert_close(alone, maps[-1][1:2], rtol=0, atol=0)
    assert float(maps[0].abs().sum()) > 0
    torch.testing.assert_close(*maps, rtol=0, atol=1e-12)


@pytest.mark.parametrize("module", ["torchvision.transforms", "torchvision.transforms.v2"])
def test_preprocessing_inside_a_model(module: str) -> None:
    normalize = pytest.importorskip(module).Normalize([0.1, 0.2], [0.3, 0.4])
    net = nn.Sequential(nn.Conv2d(2, 3, 2), nn.ReLU(), nn.Flatten()).double()
    mean, std = (torch.tensor(v, dtype=torch.float64).view(-1, 1, 1) for v in ([0.1, 0.2], [0.3, 0.4]))
    x, seed = numbers(3, *SHAPE, seed=1), numbers(3, 45, seed=2)
    expected = engine_map(Fn(lambda x: net((x - mean) / std)), x, seed)
    check(engine_map(nn.Sequential(normalize, net), x, seed), expected)


class Cooled(nn.Module):
    """Python numbers from weights: an exponent, a temperature, a branch."""

    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.tensor(3.0, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        y = x.abs().pow(self.p.item()) / float(self.p * 2)
        return (y + x if self.p > 2 else y - x).flatten(1)


def test_numbers_read_off_weights_follow_them() -> None:
    model, x, seed = Cooled().eval(), numbers(3, *SHAPE, seed=1), numbers(3, 48, seed=2)
    engine = Engine(model, AbsLRP(stabilizer=0.0), "float64", input_shape=SHAPE)
    for value in (3.0, 1.5):
        with torch.no_grad():
            model.p.fill_(value)
        written_out = Fn(lambda x, v=value: x.abs().pow(v) / (2 * v) + (x if v > 2 else -x))
        maps = engine.attribute(x, seed, contrast="none", normalize="sum").maps
        check(maps, engine_map(written_out, x, seed))


def masks(hidden: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    """Ways to hide scores."""
    lowest = torch.finfo(torch.float32).min
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "filled, of the scores' dtype": lambda s: s.masked_fill(hidden, torch.finfo(s.dtype).min),
        "filled, of float32": lambda s: s.masked_fill(hidden, lowest),
        "added": lambda s: s + hidden.float() * lowest,
        "added, by way of float64": lambda s: s + (hidden.double() * torch.finfo(torch.float64).min).float(),
        "where": lambda s: torch.where(hidden, lowest, s),
        "made of zeros": lambda s: s + s.new_zeros(s.shape[-2:]).masked_fill(hidden, -100.0),
    }
    return ways


@pytest.mark.parametrize("precision", ["float64", "fast"])
def test_masks_in_any_precision(precision: str) -> None:
    hidden = torch.ones(5, 5, dtype=torch.bool).triu(1)
    x = torch.randn(2, 2, 5, 6, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    qkv = nn.Linear(6, 18)

    def maps(hide: Callable[[Tensor], Tensor]) -> Tensor:
        def attend(x: Tensor) -> Tensor:
            q, k, v = qkv(x).chunk(3, -1)
            return hide(q @ k.mT).softmax(-1) @ v

        model = nn.Sequential(Fn(attend), nn.Linear(60, 4)).float().eval()
        nn.init.constant_(model[1].bias, 0.0)
        with torch.no_grad():
            model[1].weight.copy_(numbers(4, 60, seed=3))
        return Engine(model, AbsLRP(RelativeStabilizer(0.1)), precision, input_shape=(2, 5, 6)).attribute(x, 0).maps

    expected = maps(lambda s: s.masked_fill(hidden, float("-inf")))
    assert expected.isfinite().all()
    assert bool((expected.abs().flatten(1).sum(1) > 0).all())
    for name, hide in masks(hidden).items():
        # Written out and fused attention round scores to bfloat16 at other places.
        tolerance = 0.02 if precision == "fast" else 1e-6
        torch.testing.assert_close(maps(hide), expected, rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("precision", ["mixed", "fast"])
def test_operations_without_a_kernel_for_bfloat16(mode: str, precision: str) -> None:
    torch.manual_seed(0)
    conv, x = nn.Conv2d(3, 4, 3), torch.randn(2, 3, 12, 12)

    def resized(x: Tensor) -> Tensor:
        return conv(F.interpolate(x, size=(7, 9), mode=mode, antialias=True)).relu().mean((2, 3))

    def maps(precision: str) -> Tensor:
        model = Fn(resized).float().eval()
        return Engine(model, AbsLRP(RelativeStabilizer(0.1)), precision, input_shape=(3, 12, 12)).attribute(x, 1).maps

    expected = maps("float32")
    error = (maps(precision) - expected).norm() / expected.norm()
    assert error < (0.02 if precision == "mixed" else 0.2)  # bfloat16 products; a bfloat16 forward pass


class Tokens(nn.Module):
    """A class token in front of others, each made by a function of the token and the others."""

    def __init__(self, token: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.token, self.cls = token, nn.Parameter(numbers(1, 1, 6, seed=4))

    def forward(self, x: Tensor) -> Tensor:
        others = x.flatten(1, 2)
        t = torch.cat([self.token(self.cls, others), others], 1)
        return ((t @ t.mT).softmax(-1) @ t)[:, 0]


CLASS_TOKENS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "expand_as": lambda cls, t: cls.expand_as(t[:, :1]),
    "repeat": lambda cls, t: cls.repeat(t.size(0), 1, 1),
    "zeros_like": lambda cls, t: torch.zeros_like(t[:, :1]) + cls,
    "ones": lambda cls, t: torch.ones(t.shape[0], 1, 1, dtype=t.dtype) * cls,
    "tile": lambda cls, t: cls.tile(t.shape[0], 1, 1),
}


@pytest.mark.parametrize("name", CLASS_TOKENS)
def test_class_tokens_of_any_form(name: str) -> None:
    x, seed = numbers(3, *SHAPE, seed=1), numbers(3, 6, seed=2)
    plain = Tokens(lambda cls, t: cls.expand(t.shape[0], -1, -1))
    check(engine_map(Tokens(CLASS_TOKENS[name]), x, seed), engine_map(plain, x, seed))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(6, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(1, 2).float())[0][:, -1]


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
    "the largest k": (Fn(lambda x: x.topk(2, -1)[0]), r"topk\.default \(choosing by rank"),
    "products over an axis": (Fn(lambda x: x.cumprod(-1)), "cumprod"),
    "rounding": (Fn(lambda x: x.round()), "rounding has no slope"),
    "a recurrent layer": (Recurrent(), r"lstm\.input \(recurrent.*\n?.*in  layer"),
    "random numbers": (Fn(lambda x: x + torch.rand(6)), "draws random numbers"),
    "a branch": (
        Fn(lambda x: torch.cond(x.amax() > 0, lambda t: t.relu(), lambda t: t * 2.0, (x,))),
        r"cond \(write it with|higher order",
    ),
    "flex_attention": (Fn(lambda x: flex_attention(x, x, x)), "flex_attention"),
    "the batch's own statistics": (
        nn.Sequential(nn.BatchNorm2d(2, track_running_stats=False), nn.Flatten()), "own statistics"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_the_operation(name: str) -> None:
    model, message = REFUSED[name]
    with pytest.raises(UnsupportedModelError, match=message):
        Engine(model.eval(), precision="float64", input_shape=SHAPE)


@pytest.mark.parametrize("split", [lambda x: x.unbind(1), lambda x: [p.squeeze(1) for p in x.chunk(3, 1)]])
def test_weighted_sums_of_parts(split: Callable[[Tensor], Sequence[Tensor]]) -> None:
    """Parts of one tensor, weighted and added, are a linear map of it, as slices are."""

    class Gray(nn.Module):
        def __init__(self, parts: Callable[[Tensor], Sequence[Tensor]]) -> None:
            super().__init__()
            self.parts, self.head = parts, nn.Linear(36, 4)

        def forward(self, x: Tensor) -> Tensor:
            r, g, b = self.parts(x)
            return self.head((0.3 * r + 0.6 * g + 0.1 * b).flatten(1))

    x, maps = torch.randn(2, 3, 6, 6, dtype=torch.float64), []
    for parts in (split, lambda x: (x[:, 0], x[:, 1], x[:, 2])):
        torch.manual_seed(0)
        maps.append(Engine(Gray(parts).double().eval(), precision="float64").attribute(x, 1).maps)
    torch.testing.assert_close(maps[0], maps[1], rtol=0, atol=1e-10)


def test_attention_between_constants() -> None:
    class Queries(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.queries, self.conv, self.head = nn.Parameter(torch.randn(1, 2, 8)), nn.Conv2d(3, 8, 3), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            own = F.scaled_dot_product_attention(self.queries, self.queries, self.queries)
            return self.head(self.conv(x).mean((2, 3)) + own.mean(1))

    assert Engine(Queries().eval()).attribute(torch.randn(2, 3, 6, 6), 1).maps.any()
