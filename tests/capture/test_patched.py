"""Models that another library has changed: the engine says so."""

from __future__ import annotations

import sys
import types
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))

from small_models import images, vit  # beside this file

from ramp_fast import Engine


def from_library(name: str, source: str) -> types.ModuleType:
    """A module that says it is a library's: lxt and zennit are not needed for these tests."""
    module = types.ModuleType(name)
    exec(source, module.__dict__)
    return module


LXT = from_library(
    "lxt.efficient.patches",
    """
def layer_norm_forward(self, x):
    centred = x - x.mean(-1, keepdim=True)
    spread = ((centred**2).mean(-1, keepdim=True) + self.eps).sqrt()
    y = centred / spread.detach()
    y *= self.weight
    y += self.bias
    return y
""",
)
ZENNIT = from_library(
    "zennit.core",
    """
class Hook:
    def forward(self, module, args, output):
        return output
""",
)


def test_a_method_that_lxt_has_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only its spelling is another: the map is the same, and there is a warning."""
    model, x = vit().double(), images().double()

    class Norm(nn.LayerNorm):
        pass

    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.__class__ = Norm
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        expected = Engine(model, precision="float64").attribute(x, 1).maps
    monkeypatch.setattr(Norm, "forward", LXT.layer_norm_forward)
    with pytest.warns(
        UserWarning, match=r"lxt has replaced or added .*Norm\.forward: .*make the engine before monkey_patch"
    ) as said:
        found = Engine(model, precision="float64").attribute(x, 1).maps
    assert len([w for w in said if "lxt" in str(w.message)]) == 1
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


def test_hooks_of_zennit() -> None:
    model = vit()
    handles = [m.register_forward_hook(ZENNIT.Hook().forward) for m in model.modules() if isinstance(m, nn.Linear)]
    with pytest.warns(
        UserWarning, match=r"zennit has replaced or added hooks on Linear: .*end the composite's context"
    ):
        Engine(model, input_shape=(3, 16, 16))
    for handle in handles:
        handle.remove()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        Engine(model, input_shape=(3, 16, 16))


def test_hooks_of_ones_own_are_nobodys_patch() -> None:
    model = vit()

    def look(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        return None

    model.head.register_forward_hook(look)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        Engine(model, input_shape=(3, 16, 16))
