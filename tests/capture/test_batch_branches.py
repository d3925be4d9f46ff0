"""Models whose forward pass decides by the size of the batch are right or refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ramp_fast import Engine
from ramp_fast.capture.batch_branches import BatchBranches
from ramp_fast.errors import UnsupportedModelError

SHAPE = (3, 8, 8)


class Net(nn.Module):
    """Logits of features, by a function that sees the images as well."""

    def __init__(self, function: Callable[[Net, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.conv, self.head, self.other = nn.Conv2d(3, 8, 3, 2), nn.Linear(8, 5), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x, self.conv(x).relu().mean((2, 3)))


def _one_is_special(m: Net, x: Tensor, f: Tensor) -> Tensor:
    if x.shape[0] == 1:
        return m.other(f)
    return m.head(f)


def _several(m: Net, x: Tensor, f: Tensor) -> Tensor:
    return m.head(f) if len(x) > 1 else m.other(f)


def _odd(m: Net, x: Tensor, f: Tensor) -> Tensor:
    return m.other(f) if x.size(0) % 2 else m.head(f)


def _many(m: Net, x: Tensor, f: Tensor) -> Tensor:
    if x.shape[0] > 16:
        f = f * 2
    return m.head(f)


def _many_by_len(m: Net, x: Tensor, f: Tensor) -> Tensor:
    """``len`` makes a number of the size."""
    return m.head(f * 2) if len(x) > 4 else m.head(f)


def _many_and_odd(m: Net, x: Tensor, f: Tensor) -> Tensor:
    if x.shape[0] >= 4 and x.shape[0] % 2:
        f = f * 2
    return m.head(f)


def _as_a_number(m: Net, x: Tensor, f: Tensor) -> Tensor:
    return m.head(f) + 0.5 * int(x.shape[0] == 1)


def _smaller(m: Net, x: Tensor, f: Tensor) -> Tensor:
    return m.head(f) * (1 if min(x.shape[0], 3) == 2 else 2)


def _three_one_by_one(m: Net, x: Tensor, f: Tensor) -> Tensor:
    """The exporter takes a fixed number of images here."""
    return torch.stack([m.head(row) * (1 + (len(x) == 3)) for row in f])


OTHERS = {
    function.__name__.lstrip("_"): (function, words)
    for function, words in (
        (_one_is_special, r"batch of 1 than in one of 2.*line \d+ of test_batch_branches.py: if x.shape\[0\] == 1"),
        (_several, "batch of 2 than alone"),
        (_many_by_len, "batch of 17 than alone"),
        (_odd, "batch of [13] .*size"),
        (_many, r"batch of 17 .*x.shape\[0\] > 16"),
        (_many_and_odd, r"batch of 5 .*x.shape\[0\] >= 4"),
        (_as_a_number, "batch of 1 "),
        (_smaller, "batch of [13] "),
        (_three_one_by_one, "batch of 3 than alone"),
    )
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_logits_for_other_sizes_are_refused(name: str) -> None:
    function, words = OTHERS[name]
    model = Net(function).eval()
    with pytest.raises(UnsupportedModelError, match=f"(?s)Net gives an image other logits in a {words}"):
        Engine(model, input_shape=SHAPE)


def _squeezed(m: Net, x: Tensor, f: Tensor) -> Tensor:
    return m.head(f[0])[None] if len(x) == 1 else m.head(f)


def _in_parts(m: Net, x: Tensor, f: Tensor) -> Tensor:
    if x.shape[0] > 4:
        return torch.cat([m.head(f[:4]), m.head(f[4:])])
    return m.head(f)


def _asserted(m: Net, x: Tensor, f: Tensor) -> Tensor:
    assert x.shape[0] < 6
    assert x.shape[1] == 3
    return m.head(f)


@pytest.mark.parametrize("function", [_squeezed, _in_parts, _asserted])
def test_branches_that_compute_the_same_are_attributed(function: Callable[..., Tensor]) -> None:
    model = Net(function).eval()
    images = torch.randn(5, *SHAPE)
    engine = Engine(model, precision="float32", input_shape=SHAPE)
    for count in (1, 2, 5):
        torch.testing.assert_close(engine.attribute(images[:count]).logits, model(images[:count]).detach())


def test_only_the_models_own_decisions_are_noted() -> None:
    """PyTorch's own code asks about sizes all the time."""
    before = torch.SymBool.__bool__
    with BatchBranches() as decided:
        any_number = ({0: torch.export.Dim.AUTO},)
        torch.export.export(Net(_many).eval(), (torch.zeros(2, *SHAPE),), dynamic_shapes=any_number, strict=False)
    assert torch.SymBool.__bool__ is before
    (branch,) = decided.branches()
    assert branch.sizes == (17, 18)
