"""Signed rules on whole networks: modified autograd, zennit, and what the rules say themselves."""

from __future__ import annotations

import copy
from collections.abc import Callable

import modified_autograd as oracle
import pytest
import timm
import torch
from small_models import FAMILIES, images
from torch import Tensor, nn

from ramp_fast import Engine, rules
from ramp_fast.errors import UnsupportedModelError

ORACLES: dict[str, Callable[[], oracle.Modified]] = {
    "attnlrp": lambda: oracle.Modified(),
    "cp-lrp": lambda: oracle.Modified(values_only=True),
    "reslrp:gamma=0.5": lambda: oracle.Modified(residual_gamma=0.5),
    "lrp-epsilon": lambda: oracle.Modified(oracle.epsilon(1e-6)),
    "lrp-epsilon:epsilon=0.1": lambda: oracle.Modified(oracle.epsilon(0.1)),
    "lrp-zplus": lambda: oracle.Modified(oracle.z_plus()),
    "lrp-gamma": lambda: oracle.Modified(oracle.gamma(0.25)),
    "lrp-alpha2-beta1": lambda: oracle.Modified(oracle.alpha_beta(2, 1)),
}

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    **FAMILIES,
    "vit, registers and LayerScale": lambda: timm.create_model(
        "vit_small_patch14_reg4_dinov2", img_size=28, depth=2, num_classes=10, init_values=0.5
    ),
    "eva02": lambda: timm.create_model("eva02_tiny_patch14_224", img_size=28, depth=2, num_classes=10),
    "swin": lambda: timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=32, window_size=4, depths=(1, 1), num_heads=(2, 2), embed_dim=16,
        num_classes=10,
    ),
    "convnext": lambda: timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), num_classes=10),
    "efficientnet": lambda: timm.create_model("efficientnet_lite0", num_classes=10),
    "clip": lambda: timm.create_model("vit_base_patch32_clip_224", img_size=32, depth=2, embed_dim=32, num_heads=2,
                                      num_classes=10),
}  # fmt: skip


# The other rules differ in layers alone, which FAMILIES have too.
QUICK = ["attnlrp", "lrp-gamma"]


def network(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(3)
    model = NETWORKS[name]().eval().double()
    for p in model.parameters():  # heads that start at zero, LayerScale
        if float(p.detach().abs().max()) < 1e-3:
            nn.init.normal_(p, std=0.2)
    size = {"eva02": 28, "vit, registers and LayerScale": 28}.get(name, 16 if name in FAMILIES else 32)
    return model, images(2, size=size).double()


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        pytest.param(name, rule, marks=[] if name in FAMILIES or rule in QUICK else pytest.mark.slow)
        for name in NETWORKS
        for rule in ORACLES
    ],
)
def test_maps_are_those_of_modified_autograd(name: str, rule: str) -> None:
    model, x = network(name)
    seed = torch.randn(2, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    folded = model
    if any(isinstance(m, nn.BatchNorm2d) for m in model.modules()):
        folded = oracle.folded(copy.deepcopy(model))
    expected = oracle.relevance(folded, x, seed, ORACLES[rule]())
    found = Engine(model, rule, "float64").attribute(x, seed, "none", "none").maps
    assert expected.abs().max() > 0
    assert (found - expected).abs().max() < 1e-8 * expected.abs().max()


ZENNIT = {
    "epsilon-plus": ("epsilon_plus", {}),
    "epsilon-plus-flat": ("epsilon_plus_flat", {}),
    "epsilon-gamma-box:low=-2,high=2.5": ("epsilon_gamma_box", {"low": -2.0, "high": 2.5}),
    "epsilon-alpha2-beta1": ("epsilon_alpha2_beta1", {}),
    "epsilon-alpha2-beta1-flat": ("epsilon_alpha2_beta1_flat", {}),
    "excitation-backprop": ("excitation_backprop", {}),
    "guided-backprop": ("guided_backprop", {}),
    "deconvnet": ("deconvnet", {}),
}


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        *(("resnet18", rule) for rule in ZENNIT),
        *(pytest.param("vgg11_bn", rule, marks=pytest.mark.slow) for rule in ZENNIT),
    ],
)
def test_composites_are_zennit_s(name: str, rule: str) -> None:
    pytest.importorskip("zennit")
    from torchvision import models
    from zennit.attribution import Gradient
    from zennit.composites import COMPOSITES
    from zennit.torchvision import ResNetCanonizer, VGGCanonizer

    torch.manual_seed(0)
    model = getattr(models, name)(num_classes=10).eval().double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.bias, std=0.1)
            module.eps = 1e-30  # zennit 0.5 leaves it in the BatchNorm that it has merged, and so scales layers
    x = images(2, size=64).double()
    known, options = ZENNIT[rule]
    gradients = rule in ("guided-backprop", "deconvnet")
    canonizer = (ResNetCanonizer if name == "resnet18" else VGGCanonizer)()
    composite = COMPOSITES[known](canonizers=[canonizer], **options)
    seed = torch.eye(10, dtype=torch.float64)[[3, 7]]
    try:
        with Gradient(model, composite) as attributor:
            logits, expected = attributor(x.clone(), seed)
    except ValueError as error:  # zennit 1.0 sets the eps of a merged BatchNorm to 0, which PyTorch 2.11 refuses
        pytest.skip(str(error))
    # zennit's seed is the relevance of a logit, or of a gradient the gradient
    given = seed if gradients else seed / logits.detach()
    found = Engine(model, rule, "float64").attribute(x, given, "none", "none").maps
    assert expected.abs().max() > 0
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_beta_smooth_is_zennit_s() -> None:
    """Of ReLUs that are called once and not in place: zennit keeps one input per module, and reads it afterwards."""
    pytest.importorskip("zennit")
    from zennit.attribution import Gradient
    from zennit.composites import BetaSmooth

    from ramp_fast.integrations.zennit import rule_of

    torch.manual_seed(0)
    layers = nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, 10)
    model, x = nn.Sequential(*layers).double().eval(), images(2, size=8).double()
    composite, seed = BetaSmooth(beta_smooth=3.0), torch.eye(10, dtype=torch.float64)[[3, 7]]
    with Gradient(model, composite) as attributor:
        _, expected = attributor(x.clone(), seed)
    read = rule_of(composite, model)  # no warning: canonizers do not change a gradient
    for rule in ("beta-smooth:beta_smooth=3", read):
        found = Engine(model, rule, "float64", input_shape=(3, 8, 8)).attribute(x, seed, "none", "none").maps
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        pytest.param(name, rule, marks=[] if name in FAMILIES or name == "swin" else pytest.mark.slow)
        for name in NETWORKS
        for rule in ("gradient-x-input", "guided-backprop", "beta-smooth")
    ],
)
def test_gradients_are_the_network_s_own(name: str, rule: str) -> None:
    """Norms, products and attention have their whole gradient; the others change that of ReLUs alone."""
    model, x = network(name)
    seed = torch.randn(2, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(5))

    def changed(module: nn.Module, grads: tuple[Tensor, ...], outputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        (before,) = module.inputs
        return (
            (outputs[0].clamp(min=0) * (before > 0),)
            if rule == "guided-backprop"
            else (outputs[0] * (10 * before).sigmoid(),)
        )

    handles = []
    if rule != "gradient-x-input":
        for module in model.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = False
                handles += [
                    module.register_forward_pre_hook(lambda m, inputs: setattr(m, "inputs", (inputs[0].detach(),))),
                    module.register_full_backward_hook(changed),
                ]
    given = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad((model(given) * seed).sum(), given)
    for handle in handles:
        handle.remove()
    expected = expected * x if rule == "gradient-x-input" else expected
    found = Engine(network(name)[0], rule, "float64").attribute(x, seed, "none", "none").maps
    assert (found - expected).abs().max() < 1e-9 * expected.abs().max()


class DividedByNorm(nn.Module):
    """A division by a statistic that is no norm of the vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = x.flatten(1)
        return self.head(y / (1 + y.abs().amax(1, keepdim=True)))


@pytest.mark.parametrize("rule", ["gradient-x-input", "guided-backprop", "deconvnet", "beta-smooth"])
def test_gradients_of_detached_statistics_are_refused(rule: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"{rule} is the network's gradient, and div reads a statistic"):
        Engine(DividedByNorm().eval(), rule, input_shape=(3, 2, 2))
    Engine(DividedByNorm().eval(), "attnlrp", input_shape=(3, 2, 2))


def test_contrast_is_a_signed_seed() -> None:
    model, x = FAMILIES["vit"]().double(), images(1).double()
    engine = Engine(model, "attnlrp", "float64")
    each = engine.attribute(x.expand(10, -1, -1, -1), torch.arange(10), "none", "none").maps
    found = engine.attribute(x, torch.tensor([[4, 2]]), "others", "none").maps[0]
    for one, target in zip(found, (4, 2), strict=True):
        others = (each.sum(0) - each[target]) / 9
        torch.testing.assert_close(one, each[target] - others, rtol=1e-9, atol=1e-12)


# The others go through the same operations as these.
SOME = ["attnlrp", "ramp"]


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        pytest.param(name, rule, marks=[] if name in FAMILIES or rule in SOME else pytest.mark.slow)
        for name in NETWORKS
        for rule in rules.NAMED
        if not rule.startswith("abslrp")
    ],
)
def test_every_rule_on_every_network(name: str, rule: str) -> None:
    """Finite, and the same for an image alone and beside others, to the last bit."""
    spec = f"{rule}:low=-3,high=3" if rule == "epsilon-gamma-box" else rule
    model, x = network(name)
    if rule == "lrp-undivided" and name not in ("resnet", "vgg", "efficientnet"):
        with pytest.raises(UnsupportedModelError, match="lrp-undivided is for networks of layers"):
            Engine(model.float(), spec, input_shape=tuple(x.shape[1:]))
        return
    engine = Engine(model.float(), spec)
    found = engine.attribute(x.float(), torch.tensor([3, 7])).maps
    assert found.isfinite().all()
    assert found.abs().amax() > 0
    assert torch.equal(found[1:], engine.attribute(x[1:].float(), 7).maps)


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        pytest.param(name, rule, marks=[] if name in FAMILIES or rule == "attnlrp" else pytest.mark.slow)
        for name in NETWORKS
        for rule in (*SOME, "lrp-zplus")
    ],
)
def test_mixed_is_near_float64(name: str, rule: str) -> None:
    model, x = network(name)
    exact = Engine(model, rule, "float64").attribute(x, 3, "none").maps
    mixed = Engine(model.float(), rule, "mixed").attribute(x.float(), 3, "none").maps
    errors = (mixed - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
    assert errors.max() < 0.05


@pytest.mark.parametrize("contrast", ["others", "none"])
@pytest.mark.parametrize("name", ["vit", "vit, registers and LayerScale", "clip", "eva02", "swin", "convnext"])
def test_ramp_of_transformers(name: str, contrast: str) -> None:
    model, x = network(name)
    with torch.no_grad():
        logits = model(x)
    target = torch.tensor([3, 7])
    seed = nn.functional.one_hot(target, 10).double()
    if contrast == "others":
        seed = seed - (logits / 3).masked_fill(seed > 0, float("-inf")).softmax(-1)
    expected = oracle.relevance(model, x, seed, oracle.ramp_of_tokens())
    found = Engine(model, "ramp", "float64").attribute(x, target, contrast, "none").maps
    assert (found - expected).abs().max() < 1e-8 * expected.abs().max()


@pytest.mark.parametrize("contrast", ["others", "none"])
@pytest.mark.parametrize("name", ["resnet", "vgg", "efficientnet"])
def test_ramp_of_convolutional_networks(name: str, contrast: str) -> None:
    model, x = network(name)
    target = torch.tensor([3, 7])
    expected = oracle.ramp_of_convolutions(oracle.folded(copy.deepcopy(model)), x, target, contrast)
    found = Engine(model, "ramp", "float64").attribute(x, target, contrast, "none").maps
    assert expected.abs().max() > 0
    assert (found - expected).abs().max() < 1e-8 * expected.abs().max()
