"""Rules for layers against their definitions, by loops over an explicit matrix."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ramp_fast import Engine, rules
from ramp_fast.errors import InputError, UnsupportedModelError
from ramp_fast.rules import AlphaBeta, Composite, Epsilon, Flat, Gamma, LayerRule, SameSign, WSquare, ZBox, ZPlus
from ramp_fast.rules.ramp import RampHead

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(3 * 6 * 6, 7),
    "conv": lambda: nn.Conv2d(3, 4, 3, stride=2, padding=1),
    "grouped conv": lambda: nn.Conv2d(3, 6, 3, padding=1, groups=3),
    "patches": lambda: nn.Conv2d(3, 4, 3, stride=3),
    "pixels": lambda: nn.Conv2d(3, 4, 1, bias=False),
    "transposed conv": lambda: nn.ConvTranspose2d(3, 4, 3, stride=2, padding=2, output_padding=1, groups=1),
    "grouped transposed conv": lambda: nn.ConvTranspose2d(3, 6, 2, groups=3, bias=False),
    "einsum": lambda: Product("bchw,cd->bdhw", 3, 4),
    "a matrix for every channel": lambda: Product("bchw,cwd->bchd", 3, 6, 4),
}


class Product(nn.Module):
    """A product with a weight that is written as an einsum."""

    def __init__(self, equation: str, *shape: int) -> None:
        super().__init__()
        self.equation, self.weight = equation, nn.Parameter(torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum(self.equation, x, self.weight)


def stabilized(d: float, eps: float) -> float:
    return d + (eps if d >= 0 else -eps)


def over(a: float, b: float) -> float:
    return 0.0 if b == 0 else a / b


# From inputs x [n], weights w [n] of one output, its bias, z and relevance to the relevance of the inputs.
def by_epsilon(eps: float) -> Callable[..., Tensor]:
    return lambda x, w, b, z, r: x * w * over(r, stabilized(z, eps) if eps else z)


def side(x: Tensor, w: Tensor, b: float, r: float, sign: int, eps: float) -> Tensor:
    terms = (sign * x * w).clamp(min=0) * sign
    total = float(terms.sum()) + sign * max(sign * b, 0.0)
    return terms * over(r, stabilized(total, eps) if eps else total)


def by_gamma(gamma: float, eps: float) -> Callable[..., Tensor]:
    def rule(x: Tensor, w: Tensor, b: float, z: float, r: float) -> Tensor:
        if z == 0:
            return 0 * x
        sign = 1 if z > 0 else -1
        own = x * w + gamma * sign * (sign * x * w).clamp(min=0)
        total = float(own.sum()) + b + gamma * sign * max(sign * b, 0.0)
        return own * r / stabilized(total, eps)

    return rule


RULES: dict[LayerRule, Callable[..., Tensor]] = {
    Epsilon(0.0): by_epsilon(0.0),
    Epsilon(0.2): by_epsilon(0.2),
    Epsilon(0.2, zero_bias=True): lambda x, w, b, z, r: x * w * r / stabilized(z - b, 0.2),
    ZPlus(0.01): lambda x, w, b, z, r: side(x, w, b, r, 1, 0.01),
    ZPlus(0.0, zero_bias=True): lambda x, w, b, z, r: side(x, w, 0.0, r, 1, 0.0),
    AlphaBeta(2, 1, 0.01): lambda x, w, b, z, r: 2 * side(x, w, b, r, 1, 0.01) - side(x, w, b, r, -1, 0.01),
    AlphaBeta(1.5, 0.5, 0.01): lambda x, w, b, z, r: 1.5 * side(x, w, b, r, 1, 0.01) - 0.5 * side(x, w, b, r, -1, 0.01),
    Gamma(0.25, 0.01): by_gamma(0.25, 0.01),
    Gamma(3.0, 0.01): by_gamma(3.0, 0.01),
    SameSign(): lambda x, w, b, z, r: side(x, w, 0.0, r, 1 if z > 0 else -1, 0.0),
    Flat(0.0): lambda x, w, b, z, r: (w != 0).double() * over(r, float((w != 0).sum())),
    WSquare(0.01): lambda x, w, b, z, r: w**2 * r / (float((w**2).sum()) + b * b + 0.01),
    ZBox(-3.0, 4.0, 0.01): lambda x, w, b, z, r: (
        (x * w + 3 * w.clamp(min=0) - 4 * w.clamp(max=0))
        * r
        / stabilized(z + 3 * float(w.clamp(min=0).sum()) - 4 * float(w.clamp(max=0).sum()) - b, 0.01)
    ),
}


def matrix(layer: nn.Module, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """``[out, in]`` and ``[out]`` of a layer of flattened images."""
    count = torch.Size(shape).numel()
    bias = layer(torch.zeros(1, *shape, dtype=torch.float64)).flatten()
    columns = layer(torch.eye(count, dtype=torch.float64).view(count, *shape)).flatten(1) - bias
    return columns.t(), bias


@pytest.mark.parametrize("inputs", ["both signs", "not negative"])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_definition(rule: LayerRule, layer: str, inputs: str) -> None:
    torch.manual_seed(0)
    body = LAYERS[layer]().requires_grad_(False)
    flat = [nn.Flatten()] if layer == "linear" else []
    before = [nn.ReLU()] if inputs == "not negative" else []
    if before and rule.gives_relevance:
        pytest.skip("a rule for layers that read the images")
    model = nn.Sequential(*before, *flat, body, *([] if flat else [nn.Flatten()])).double().eval()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    x[0, 0, 0] = 0
    weights, bias = matrix(nn.Sequential(*flat, body), (3, 6, 6))
    with torch.no_grad():
        z = model(x)
    seed = torch.randn(z.shape, dtype=torch.float64)
    below = x.clamp(min=0) if before else x
    expected = torch.zeros_like(x)
    for image in range(2):
        for j in range(z.shape[1]):
            r = float(seed[image, j] * z[image, j])
            share = RULES[rule](below[image].flatten(), weights[j], float(bias[j]), float(z[image, j]), r)
            expected[image] += share.view(3, 6, 6)
    found = Engine(model, rule, "float64", input_shape=(3, 6, 6)).attribute(x, seed, "none", "none").maps
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


def test_layers_that_are_no_convolutions_have_kinds_and_places() -> None:
    model = nn.Sequential(
        nn.ConvTranspose2d(3, 4, 2), nn.ReLU(), Product("bchw,wd->bchd", 7, 3), nn.Conv2d(4, 4, 3), nn.Flatten()
    ).eval()
    rule = Composite({"conv": ZPlus(), "linear": Gamma()}, by_name={"3": Epsilon(0.5)}, first=ZBox([-3, -3, -2], 4))
    engine = Engine(model, rule, input_shape=(3, 6, 6))
    layers = {s.node.module: getattr(s.operation.fusion, "layer", None) for s in engine.plan.steps}
    assert [layers[name] for name in ("0", "2", "3")] == [ZBox([-3, -3, -2], 4), Gamma(), Epsilon(0.5)]
    with pytest.raises(ValueError, match="high has 2 values; the layer's input has 3 channels"):
        Engine(model, Composite(first=ZBox(-4, [4, 4])), input_shape=(3, 6, 6))
    with pytest.raises(ValueError, match="low has 3 values; the layer's input has no axis of channels"):
        Engine(model[2:3].append(nn.Flatten()), ZBox([-3, -3, -3], 4), input_shape=(4, 7, 7))


@pytest.mark.parametrize("precision", ["float64", "mixed"])
@pytest.mark.parametrize("rule", [Epsilon(1e-9), Gamma(0.0, 1e-9), "lrp-undivided"], ids=str)
def test_layers_that_are_no_convolutions_inside_a_network(rule: LayerRule | str, precision: str) -> None:
    """Without a gamma and nearly without a stabilizer rules are LRP-0. Images need not come first."""

    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.product = Product("cbhw,cd->dbhw", 4, 2)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.product(x.transpose(0, 1))
            return y.transpose(0, 1)

    torch.manual_seed(0)
    layers = nn.Conv2d(3, 6, 3), nn.GELU(), nn.ConvTranspose2d(6, 4, 3, stride=2), nn.GELU(), Turned(), nn.GELU()
    model = nn.Sequential(*layers, nn.ConvTranspose2d(2, 2, 2, bias=False), nn.Flatten(), nn.Linear(200, 5)).eval()
    model, x = model.double() if precision == "float64" else model, torch.randn(3, 3, 6, 6)
    engine = Engine(model, rule, precision)
    found = engine.attribute(x.to(model[0].weight), 1, "none", "none").maps
    each = [engine.attribute(i.to(model[0].weight), 1, "none", "none").maps for i in x.split(1)]
    assert torch.equal(found, torch.cat(each))
    # Gamma's denominators are sums of both signs, of which bfloat16 products leave little where they are near 0.
    if isinstance(rule, Epsilon) or (isinstance(rule, LayerRule) and precision == "float64"):
        expected = Engine(model.double(), Epsilon(0.0), "float64").attribute(x.double(), 1, "none", "none").maps
        assert (found - expected).norm() < (1e-5 if precision == "float64" else 0.03) * expected.norm()
    assert found.abs().amax() > 0


def test_rules_by_name_kind_and_place() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5), nn.Linear(5, 3)
    ).eval()
    rule = Composite({"conv": ZPlus(), "linear": Epsilon()}, by_name={"6": Epsilon(0.5)}, first=Flat())
    engine = Engine(model, rule, input_shape=(3, 6, 6))
    found = {s.node.module: s.operation.fusion.layer for s in engine.plan.steps if s.node.kind in ("conv", "linear")}
    assert found == {"0": Flat(), "2": ZPlus(), "5": Epsilon(), "6": Epsilon(0.5)}


def test_a_name_that_fits_no_layer() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 3)).eval()
    with pytest.raises(InputError, match=r"by_name: '4', for ZPlus.* fits no linear layer .*there are 1, 3"):
        Engine(model, Composite(by_name={"4": ZPlus()}), input_shape=(3, 2, 2))


@pytest.mark.parametrize(
    "fill",
    [
        lambda y: nn.functional.pad(y, (1, 0, 1, 1), value=-0.7),
        lambda y: y.masked_fill(y > 0.5, -0.7),
        lambda y: torch.where(y > 0.5, y, -0.7),
        lambda y: torch.where(y > 0.5, torch.full_like(y, -0.7), y),
        lambda y: nn.functional.max_pool2d(nn.functional.pad(y, (2, 2, 2, 2), value=-0.7), 2),
    ],
)
@pytest.mark.parametrize("rule", [ZPlus(0.01), Gamma(0.25, 0.01), AlphaBeta(2, 1, 0.01)], ids=repr)
def test_constants_below_zero_behind_a_relu(rule: LayerRule, fill: Callable[[Tensor], Tensor]) -> None:
    """Inputs of a layer that are filled up with constants of either sign are of both signs."""

    class Filled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return fill(x.relu())

    torch.manual_seed(0)
    x = torch.randn(1, 3, 6, 6, dtype=torch.float64)
    below = Filled()(x)
    model = nn.Sequential(Filled(), nn.Conv2d(3, 2, below.shape[-2:]), nn.Flatten()).double().eval()
    seed = torch.tensor([[1.0, -0.5]], dtype=torch.float64)
    weights, bias = (t.detach() for t in matrix(model[1], tuple(below.shape[1:])))
    z = model(x).detach()
    shares = [
        RULES[rule](below[0].flatten(), weights[j], bias[j].item(), z[0, j].item(), (seed * z)[0, j].item())
        for j in (0, 1)
    ]
    engine = Engine(model, rule, "float64", input_shape=(3, 6, 6))
    found = engine.attribute(x, seed, "none", "none", layers=["0"]).layers["0"]
    torch.testing.assert_close(found.flatten(), (shares[0] + shares[1]).detach(), rtol=1e-9, atol=1e-10)


class Normalised(nn.Module):
    """Grey images, normalised and as three channels within the model."""

    def __init__(self, both: bool) -> None:
        super().__init__()
        self.both, self.conv = both, nn.Conv2d(3, 2, 2, bias=False)
        self.register_buffer("std", torch.tensor([0.5, 1.0, 2.0]).view(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = (x - 0.25) / self.std
        return self.conv(y + 2 * x if self.both else y).flatten(1)


def test_relevance_goes_through_a_normalisation() -> None:
    model, x = Normalised(False).double().eval(), torch.randn(2, 1, 3, 3, dtype=torch.float64)
    engine = Engine(model, Composite(first=Flat(0.0)), "float64", input_shape=(1, 3, 3))
    found = engine.attribute(x, 3, "none", "none")
    assert found.maps.shape == x.shape
    torch.testing.assert_close(found.maps.flatten(1).sum(1), found.logits[:, 3])
    # logit 3 is the first channel at (1, 1): four pixels, whose three channels all get a twelfth
    corner = found.maps[:, 0, 1:, 1:]
    torch.testing.assert_close(corner, (found.logits[:, 3] / 4).view(2, 1, 1).expand(2, 2, 2))


def test_relevance_goes_through_activations_and_max_pools() -> None:
    """All of an activation's goes to its input, a pool's to the entry that was chosen."""
    conv = nn.Conv2d(3, 2, 2, bias=False)
    model = nn.Sequential(nn.MaxPool2d(2), nn.GELU(), conv, nn.Flatten()).double().eval()
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    found = Engine(model, Composite(first=Flat(0.0)), "float64", input_shape=(3, 4, 4)).attribute(x, 1, "none", "none")
    largest = x == nn.functional.max_pool2d(x, 2).repeat_interleave(2, 2).repeat_interleave(2, 3)
    expected = largest * (found.logits[:, 1] / 12).view(2, 1, 1, 1)
    torch.testing.assert_close(found.maps, expected)


def test_relevance_does_not_go_through_a_sum_of_tensors() -> None:
    with pytest.raises(UnsupportedModelError, match=r"conv follows Flat.*sum of tensors"):
        Engine(Normalised(True).eval(), Composite(first=Flat()), input_shape=(1, 3, 3))


def test_a_rule_that_gives_relevance_needs_the_images_below() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten()).eval()
    with pytest.raises(UnsupportedModelError, match=r"2 follows Flat.*there is conv,"):
        Engine(model, Composite(by_name={"2": Flat()}), input_shape=(3, 6, 6))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Epsilon(-1), "Epsilon: epsilon must be a number of at least 0, got -1"),
        (lambda: AlphaBeta(2, 0), "alpha - beta must be 1"),
        (lambda: ZBox("low", 1), "low must be a number, or one for every channel"),
        (lambda: ZBox(2, 1), "ZBox: low must not be above high, got 2 and 1"),
        (lambda: ZBox([0, 1, 2], 1.5), "ZBox: low must not be above high, got 2 and 1.5"),
        (lambda: ZBox([0, 1, 2], [3, 4]), "ZBox: low has 3 values and high 2"),
        (lambda: ZBox(0, math.nan), "high must be a number"),
        (lambda: ZBox(0, torch.ones(3, dtype=torch.bool)), "high must be a number"),
        (lambda: Epsilon(math.nan), "Epsilon: epsilon must be a number of at least 0, got nan"),
        (lambda: Epsilon(True), "Epsilon: epsilon must be a number of at least 0, got True"),
        (lambda: Epsilon(zero_bias=1), "Epsilon: zero_bias must be True or False, got 1"),
        (lambda: ZPlus(-1e-9), "ZPlus: stabilizer must be a number of at least 0"),
        (lambda: ZPlus(zero_bias="yes"), "ZPlus: zero_bias must be True or False"),
        (lambda: Gamma(-0.1), "Gamma: gamma must be a number of at least 0, got -0.1"),
        (lambda: Gamma(math.inf), "Gamma: gamma must be a number of at least 0, got inf"),
        (lambda: Gamma(0.1, "small"), "Gamma: stabilizer must be a number"),
        (lambda: AlphaBeta(math.nan, 1), "AlphaBeta: alpha must be a number"),
        (lambda: AlphaBeta(0.5, -0.5), "AlphaBeta: beta must be a number of at least 0"),
        (lambda: SameSign(zero_bias=None), "SameSign: zero_bias must be True or False"),
        (lambda: Flat(-1), "Flat: stabilizer must be a number"),
        (lambda: WSquare(math.nan), "WSquare: stabilizer must be a number"),
        (lambda: RampHead(1.5), r"RampHead: share must be a number in \[0, 1\]"),
        (lambda: rules.Ramp(0), "Ramp: temperature must be a positive number, got 0"),
        (lambda: rules.Ramp("hot"), "Ramp: temperature must be a positive number, got 'hot'"),
        (lambda: rules.AbsLRP(math.nan), "stabilizer must be a number that is not negative, got nan"),
        (lambda: rules.AbsLRP(shares="kep"), 'shares must be "kept" or "equal", got \'kep\''),
        (lambda: rules.AbsLRP(maxpool=None), "maxpool must be"),
        (lambda: rules.AbsLRP(fold_batchnorm=1), "fold_batchnorm must be True or False"),
        (lambda: Composite(first={"liner": Flat()}), "first: 'liner' is no kind of layer.*did you mean 'linear'"),
        (lambda: Composite({"conv": "zplus"}), "layers must map names to rules"),
        (lambda: Composite(attention="value"), "attention must be one of .*got 'value'"),
        (lambda: Composite(residual_gamma=-1), "residual_gamma must be a number that is not negative"),
        (lambda: Composite(stabilizer=math.nan), "stabilizer must be a number that is not negative, got nan"),
        (lambda: Composite(beta_smooth=0), "beta_smooth must be a positive number, got 0"),
        (lambda: Composite(times_input=1), "times_input must be True or False"),
        (lambda: Composite(fold_batchnorm="no"), "fold_batchnorm must be True or False"),
        (lambda: Composite({"convs": ZPlus()}), "'convs' is no kind of layer.*did you mean 'conv'"),
        (lambda: Composite(by_name={"fc": 1}), "by_name must map names to rules"),
        (lambda: Composite(activations="pas"), "activations must be one of"),
        (lambda: rules.resolve("lrp-epsilom"), "unknown rule 'lrp-epsilom'.*did you mean 'lrp-epsilon'"),
        (lambda: rules.resolve("lrp-epsilon:epsilom=1"), "unknown setting 'epsilom'.*did you mean 'epsilon'"),
        (lambda: rules.resolve("guided-backprop:x=1"), "it has no settings"),
        (lambda: rules.resolve("epsilon-gamma-box"), "needs low and high"),
        (lambda: rules.resolve("epsilon-gamma-box:low=1,high=-1"), "low must not be above high"),
        (lambda: rules.resolve("attnlpr"), "unknown rule 'attnlpr'.*did you mean 'attnlrp'"),
        (lambda: rules.resolve("epsilon_plus_flat"), "unknown rule.*did you mean 'epsilon-plus-flat'"),
        (lambda: rules.resolve("lrp-gamma:gama=1"), "unknown setting 'gama'.*did you mean 'gamma'.*it takes gamma"),
        (lambda: rules.resolve("lrp-gamma:gamma=much"), "gamma must be a number of at least 0, got 'much'"),
        (lambda: rules.resolve("lrp-gamma:gamma"), "'gamma' is not key=value"),
        (lambda: rules.resolve("lrp-alpha2-beta1:alpha=3"), "alpha - beta must be 1, got 3 - 1"),
        (lambda: rules.resolve("ramp:temperature=-1"), "temperature must be a positive number"),
        (lambda: rules.resolve("beta-smooth:beta_smooth=none"), "beta_smooth must be a positive number, got None"),
        (lambda: rules.resolve("lrp-undivided:gamma=1"), "it has no settings"),
    ],
)
def test_bad_settings(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("rule", ["attnlpr", "lrp-gamma:gama=0.1", "lrp-epsilon:epsilon=nan"])
def test_an_engine_says_so_before_it_captures(rule: str) -> None:
    class Unused(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError("called")

    with pytest.raises(ValueError, match=r"did you mean|must be a number"):
        Engine(Unused().eval(), rule, input_shape=(3, 6, 6))


@pytest.mark.parametrize(
    ("pattern", "like"),
    [("layer4.0.conv", r"layer4\.0\.conv[12]"), ("layr4.*", r"layer4\.\*"), ("layer4", r"layer4\.\*")],
)
def test_a_pattern_that_fits_no_layer_names_the_nearest(pattern: str, like: str) -> None:
    from small_models import FAMILIES

    with pytest.raises(InputError, match=rf"by_name: .* fits no .*\(did you mean '{like}'"):
        Engine(FAMILIES["resnet"](), Composite(by_name={pattern: ZPlus()}), input_shape=(3, 16, 16))


def test_wrong_types() -> None:
    for value in (None, 3, Epsilon):
        with pytest.raises(TypeError, match="rule must be a name or a rule object"):
            rules.resolve(value)
    with pytest.raises(TypeError, match="label must be text"):
        Composite(label=3)


def test_names_say_the_settings() -> None:
    assert rules.resolve("lrp-epsilon:epsilon=0.1").name == "lrp-epsilon:epsilon=0.1"
    assert rules.resolve("lrp-epsilon:epsilon=1e-6").name == "lrp-epsilon"
    assert rules.resolve("abslrp").name == "abslrp"
    assert rules.resolve(Gamma(0.5)).name == repr(rules.resolve(Gamma(0.5)))
