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

from ramp_fast import rules
from ramp_fast.integrations.zennit import Attributor, rule_of

zennit = pytest.importorskip("zennit")
from zennit import canonizers, composites  # noqa: E402  # after the line that skips without it
from zennit import rules as hooks  # noqa: E402
from zennit.attribution import Gradient  # noqa: E402
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


def test_what_is_not_known_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Norm has no counterpart here; known for ReLUs.*ReLUBetaSmooth"):
        rule_of(composites.LayerMapComposite([(nn.ReLU, hooks.Norm())], canonizers=MERGED))
    with pytest.raises(ValueError, match="a function as stabilizer"):
        rule_of(composites.EpsilonPlus(epsilon=lambda z: z + 1, canonizers=MERGED))
    with pytest.raises(ValueError, match="Pass has no counterpart"):
        rule_of(composites.LayerMapComposite([(nn.Linear, hooks.Pass())], canonizers=MERGED))
    with pytest.raises(ValueError, match=r"unknown rule 'epsilon-plus-fla'.*did you mean 'epsilon-plus-flat'"):
        Attributor(small(), "epsilon_plus_fla")


def test_without_canonizers_there_is_a_warning() -> None:
    with pytest.warns(UserWarning, match="no canonizers"):
        rule_of(composites.EpsilonPlus())
