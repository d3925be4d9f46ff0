"""zennit's interface: the same calls, its composites by name and as objects, and its results."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from small_models import images

from ramp_fast import Engine, rules
from ramp_fast.errors import InputError, UnsupportedModelError
from ramp_fast.integrations.zennit import Attributor, rule_of

zennit = pytest.importorskip("zennit")
from zennit import canonizers, composites, types  # noqa: E402  # after the line that skips without it
from zennit import layer as layers  # noqa: E402
from zennit import rules as hooks  # noqa: E402
from zennit.attribution import Gradient  # noqa: E402
from zennit.core import Composite  # noqa: E402
from zennit.types import Convolution  # noqa: E402


def merging_fails() -> bool:
    """Whether zennit's merged BatchNorm does not run: zennit 1.0 sets eps to 0, which PyTorch 2.11 refuses."""
    try:
        with Gradient(small(), COMPOSITES["epsilon_plus"]) as attributor:
            attributor(images(1).double())
    except ValueError as error:
        return "eps must be positive" in str(error)
    return False


def small() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6, eps=1e-30), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 4, 3)
    model = nn.Sequential(*layers, nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 10), nn.ReLU(), nn.Linear(10, 5))
    nn.init.normal_(model[1].running_mean, std=0.2)
    nn.init.uniform_(model[1].running_var, 0.5, 2)
    return model.double().eval()


MERGED = [canonizers.SequentialMergeBatchNorm()]
LOW, HIGH = torch.tensor([-2.0, -2.5, -3.0]).view(1, 3, 1, 1), torch.tensor([2.0, 2.5, 3.0]).view(1, 3, 1, 1)
COMPOSITES: dict[str, Any] = {
    "epsilon_plus": composites.EpsilonPlus(epsilon=0.1, canonizers=MERGED),
    "epsilon_plus_flat": composites.EpsilonPlusFlat(stabilizer=1e-3, canonizers=MERGED),
    "zero_params": composites.EpsilonPlusFlat(zero_params="bias", canonizers=MERGED),
    "gamma_box": composites.EpsilonGammaBox(LOW, HIGH, gamma=0.4, canonizers=MERGED),
    "alpha2_beta1": composites.EpsilonAlpha2Beta1(canonizers=MERGED),
    "guided": composites.GuidedBackprop(canonizers=MERGED),
    "layer map": composites.LayerMapComposite(
        [(Convolution, hooks.AlphaBeta(3.0, 2.0)), (nn.Linear, hooks.Gamma(0.1))], canonizers=MERGED
    ),
    "names": composites.NameLayerMapComposite(
        name_map=[(["7"], hooks.ZPlus()), (["9"], hooks.Epsilon(0.3))],
        layer_map=[(nn.Linear, hooks.Epsilon()), (Convolution, hooks.ZPlus())],
        canonizers=MERGED,
    ),
}


needs_merging = pytest.mark.skipif(merging_fails(), reason="zennit's merged BatchNorm does not run with this PyTorch")


def one_hot(logits: Tensor) -> Tensor:
    return nn.functional.one_hot(logits.argmax(1), logits.shape[1]).to(logits)


@needs_merging
@pytest.mark.parametrize("output", [None, "tensor", "function"])
@pytest.mark.parametrize("name", COMPOSITES)
def test_objects_give_zennit_s_relevance(name: str, output: str | None) -> None:
    model, x = small(), images(3).double()
    seed = {None: None, "tensor": torch.eye(5, dtype=torch.float64)[[1, 4, 0]], "function": one_hot}[output]
    with Gradient(small(), COMPOSITES[name], seed) as attributor:
        logits, expected = attributor(x.clone())
    with Attributor(model, COMPOSITES[name], seed, precision="float64") as own:
        found_logits, found = own(x)
    torch.testing.assert_close(found_logits, logits.detach(), rtol=1e-12, atol=1e-12)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_names_of_both() -> None:
    model, x = small(), images(2).double()
    seed = torch.eye(5, dtype=torch.float64)[[1, 4]]
    expected = Attributor(model, "epsilon-plus-flat", precision="float64")(x, seed)[1]
    assert torch.equal(Attributor(model, "epsilon_plus_flat", precision="float64")(x, seed)[1], expected)
    assert torch.equal(Attributor(model, rules.resolve("epsilon-plus-flat"), precision="float64")(x, seed)[1], expected)


class Branches(nn.Module):
    """Two convolutions that read the images, and one that is called as a function."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.act = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 2, 1), nn.ReLU()
        self.up, self.act_up, self.norm = nn.ConvTranspose2d(5, 4, 2, stride=2), nn.GELU(), nn.BatchNorm2d(4)
        self.sum, self.pool, self.fc = layers.Sum(), nn.AvgPool2d(2), nn.Linear(4 * 64, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.act_up(self.up(torch.cat([self.act(self.one(x)), self.two(x)], 1))))
        return self.fc(self.pool(self.sum(torch.stack([x, x.roll(1, -1)], -1)))[..., ::2, ::2].flatten(1))


def branches() -> nn.Module:
    torch.manual_seed(0)
    model = Branches()
    nn.init.normal_(model.norm.running_mean, std=0.2)
    nn.init.uniform_(model.norm.running_var, 0.5, 2)
    return model.double().eval()


class Own(nn.Linear):
    pass


BASE = composites.layer_map_base()
ALL = (types.Linear, hooks.Epsilon(0.1))
MAPS: dict[str, Any] = {
    "the first module alone": composites.EpsilonPlusFlat(canonizers=MERGED),
    "the first of a kind": composites.SpecialFirstLayerMapComposite(
        [*BASE, ALL], [(nn.Linear, hooks.ZPlus())], canonizers=MERGED
    ),
    "a kind of convolution": composites.LayerMapComposite(
        [*BASE, (nn.ConvTranspose2d, hooks.Gamma(0.7)), (nn.Conv2d, hooks.ZPlus()), ALL], canonizers=MERGED
    ),
    "types before names": composites.MixedComposite(
        [composites.LayerMapComposite([*BASE, ALL]), composites.NameMapComposite([(["fc"], hooks.ZPlus())])],
        canonizers=MERGED,
    ),
    "sums and pools apart": composites.LayerMapComposite(
        [(types.AvgPool, hooks.Norm(0.3)), (layers.Sum, hooks.Norm(0.2)), *BASE, ALL], canonizers=MERGED
    ),
    "a map of its own": Composite(
        lambda ctx, name, module: (
            next((hook for kinds, hook in [*BASE, ALL] if isinstance(module, kinds)), None)
            if name != "up"
            else hooks.AlphaBeta()
        ),
        canonizers=MERGED,
    ),
    "without hooks": composites.LayerMapComposite([]),
    "none": None,
}


@pytest.mark.filterwarnings("ignore:the composite's canonizers do not merge")
@pytest.mark.parametrize("name", MAPS)
def test_every_module_has_the_hook_that_zennit_gives_it(name: str) -> None:
    """Also a BatchNorm that nothing is folded into: zennit hands its relevance on."""
    x, seed = images(3, size=16).double(), torch.eye(5, dtype=torch.float64)[[1, 4, 0]]
    with Gradient(branches(), MAPS[name], seed) as attributor:
        _, expected = attributor(x.clone())
    found = Attributor(branches(), MAPS[name], seed, precision="float64")(x)[1]
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_classes_of_somebody_s_own() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Flatten(), Own(768, 9), nn.ReLU(), nn.Linear(9, 5)).double().eval(), images(2).double()
    composite = composites.LayerMapComposite([(Own, hooks.Gamma(0.7)), ALL], canonizers=MERGED)
    with Gradient(model, composite) as attributor:
        _, expected = attributor(x.clone())
    found = Attributor(model, composite, precision="float64")(x)[1]
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()

    class Epsilon(hooks.Epsilon):
        """Not zennit's, though of its name."""

    with pytest.raises(ValueError, match=r"test_zennit_attributor\.Epsilon has no counterpart"):
        rule_of(composites.LayerMapComposite([(nn.Linear, Epsilon())], canonizers=MERGED), model)


def test_what_is_not_known_is_refused() -> None:
    model = small()

    def read(*pairs: tuple[Any, Any]) -> Any:
        return rule_of(composites.LayerMapComposite(list(pairs), canonizers=MERGED), model)

    with pytest.raises(ValueError, match=r"Norm has no counterpart here; known for ReLUs.*ReLUBetaSmooth"):
        read((nn.ReLU, hooks.Norm()))
    with pytest.raises(ValueError, match="a function as stabilizer"):
        rule_of(composites.EpsilonPlus(epsilon=lambda z: z + 1, canonizers=MERGED), model)
    with pytest.raises(ValueError, match="Pass has no counterpart"):
        read((nn.Linear, hooks.Pass()))
    with pytest.raises(ValueError, match=r"zennit's Epsilon for 3 \(MaxPool2d\) has no counterpart"):
        read((types.MaxPool, hooks.Epsilon()))
    with pytest.raises(ValueError, match=r"ReLUGuidedBackprop\) and has Epsilon for 0 \(Conv2d\)"):
        read((nn.ReLU, hooks.ReLUGuidedBackprop()), ALL)
    with pytest.raises(ValueError, match="got dict"):
        rule_of({}, model)
    with pytest.raises(ValueError, match=r"ZBox: .* must be Tensors \[1, C, 1, 1\], got \[3\]"):
        rule_of(composites.EpsilonGammaBox(LOW.flatten(), HIGH, canonizers=MERGED), model)
    with pytest.raises(ValueError, match=r"unknown rule 'epsilon-plus-fla'.*did you mean 'epsilon-plus-flat'"):
        Attributor(model, "epsilon_plus_fla")


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([*BASE, (types.Convolution, hooks.ZPlus())], r"gives no rule to fc \(Linear\).*such as Epsilon"),
        ([(types.Activation, hooks.Pass()), ALL], r"no rule to (norm|pool) .*by the gradient"),
        ([*BASE[1:], ALL], r"gives no rule to act_up \(GELU\).*to Pass"),
    ],
)
def test_what_zennit_leaves_to_the_gradient_is_refused(pairs: Any, message: str) -> None:
    composite = composites.LayerMapComposite(pairs, canonizers=MERGED)
    with pytest.raises(UnsupportedModelError, match=message), pytest.warns(UserWarning, match="norm"):
        Attributor(branches(), composite, precision="float64")(images(1, size=16).double())


@pytest.mark.filterwarnings("ignore:the composite's canonizers do not merge")
def test_modules_that_are_not_called_need_no_rule() -> None:
    model = small()
    model[0].register_module("unused", nn.GELU())
    composite = composites.LayerMapComposite([*BASE[1:], ALL], canonizers=MERGED)
    assert Attributor(model, composite, precision="float64")(images(1).double())[1].abs().max() > 0


def test_without_canonizers_there_is_a_warning() -> None:
    with pytest.warns(UserWarning, match="no canonizers"):
        rule_of(composites.EpsilonPlus(), small())
    with pytest.warns(UserWarning, match="do not merge the BatchNorms norm;"):
        rule_of(composites.EpsilonPlus(canonizers=MERGED), branches())


def test_relevance_of_all_images_together() -> None:
    """A function sees the logits of all images, as zennit's does."""
    model, x, seen = small(), images(3).double(), []

    def relevance(logits: Tensor) -> Tensor:
        seen.append(logits.shape)
        return logits * (logits == logits.max())

    found = Attributor(model, "epsilon_plus", precision="float64")(x, relevance)[1]
    assert seen == [(3, 5)]
    best = int(model(x).amax(1).argmax())
    assert [bool(m.any()) for m in found] == [i == best for i in range(3)]
    method = Attributor(model, "epsilon_plus")
    for given, message in [(3, "got int"), (torch.ones(2, 5), r"\[3, 5\].*got \[2, 5\]"), (lambda _: 1, "got int")]:
        with pytest.raises(InputError, match=message):
            method(x, given)


@pytest.mark.parametrize("end", [nn.Softmax(1), nn.LogSoftmax(1)])
def test_relevance_is_that_of_the_scores_below_a_softmax(end: nn.Module) -> None:
    model, x, seed = small(), images(2).double(), torch.eye(5, dtype=torch.float64)[[1, 4]]
    expected = Attributor(model, "epsilon_plus", seed, precision="float64")(x)[1]
    logits, found = Attributor(nn.Sequential(model, end), "epsilon_plus", seed, precision="float64")(x)
    torch.testing.assert_close(logits, end(model(x)).detach())
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("rule", ["abslrp", "lrp-undivided"])
def test_rules_whose_seeds_are_relevance(rule: str) -> None:
    model, x = small(), images(2).double()
    seed = torch.rand(2, 5, dtype=torch.float64)
    expected = Engine(model, rule, "float64").attribute(x, seed, "none", "none").maps
    torch.testing.assert_close(Attributor(model, rule, seed, precision="float64")(x)[1], expected)
