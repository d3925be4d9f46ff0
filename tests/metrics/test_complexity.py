"""Sparseness, complexity and effective complexity: known answers, ranges, and what they do not depend on."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ramp_fast import InputError
from ramp_fast.metrics import Complexity, EffectiveComplexity, Metric, Sparseness, make_metric

SIZE = 16
PIXELS = SIZE * SIZE
CLASSES = (Sparseness, Complexity, EffectiveComplexity)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * PIXELS, 4)).eval()


def random_maps(count: int, channels: int = 3) -> Tensor:
    return torch.randn(count, channels, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


def values(metric: Metric, maps: Tensor) -> Tensor:
    images = torch.zeros(maps.shape[0], 3, SIZE, SIZE)
    return metric.update(images, None, None, maps=maps)[metric.name]


def test_known_answers(model: nn.Module) -> None:
    maps = torch.zeros(3, 1, SIZE, SIZE)
    maps[0] = -2.5
    maps[1, 0, 3, 4] = 7.0
    maps[2, 0, :8] = torch.tensor([1.0, -1.0]).repeat(64).view(8, SIZE)
    expected = {
        Sparseness: [0, 1 - 1 / PIXELS, 0.5],
        Complexity: [math.log(PIXELS), 0, math.log(PIXELS / 2)],
        EffectiveComplexity: [PIXELS, 1, PIXELS / 2],
    }
    for metric, wanted in expected.items():
        assert values(metric(model), maps).tolist() == pytest.approx(wanted, abs=1e-12), metric.name


def test_definitions(model: nn.Module) -> None:
    maps = random_maps(5)
    sizes = np.abs(maps.numpy().astype(np.float32).sum(1, dtype=np.float32).astype(np.float64)).reshape(5, -1)
    for image, v in enumerate(sizes):
        pairs = np.abs(v[:, None] - v[None]).sum() / (2 * len(v) * v.sum())  # the Gini index as a mean difference
        assert values(Sparseness(model), maps)[image].item() == pytest.approx(pairs, abs=1e-6)
        p = v / v.sum()
        assert values(Complexity(model), maps)[image].item() == pytest.approx(-(p * np.log(p)).sum(), abs=1e-6)
        found = values(EffectiveComplexity(model, eps=0.3), maps)[image].item()
        assert found == (v > 0.3 * v.max()).sum()


def test_channels_are_summed(model: nn.Module) -> None:
    maps = random_maps(4)
    opposite = torch.cat([maps[:, :1], -maps[:, :1], maps[:, 2:]], 1)
    for metric in CLASSES:
        torch.testing.assert_close(values(metric(model), maps), values(metric(model), maps.sum(1, keepdim=True)))
        alone = values(metric(model), maps[:, 2:])
        torch.testing.assert_close(values(metric(model), opposite), alone, rtol=1e-5, atol=0)


def test_ranges(model: nn.Module) -> None:
    maps = random_maps(1).sum(1, keepdim=True) ** torch.tensor([1, 3, 5, 7, 9, 11]).view(-1, 1, 1, 1)
    sparseness, complexity, effective = (values(m(model), maps) for m in CLASSES)
    assert ((sparseness > 0) & (sparseness < 1)).all()
    assert ((complexity > 0) & (complexity < math.log(PIXELS))).all()
    assert ((effective >= 1) & (effective <= PIXELS)).all()
    # the higher the power the fewer pixels matter
    assert (sparseness.diff() > 0).all()
    assert (complexity.diff() < 0).all()
    assert (effective.diff() <= 0).all()
    assert effective[-1] < effective[0]


def test_scale_and_the_other_images_do_not_matter(model: nn.Module) -> None:
    maps = random_maps(6)
    for metric in CLASSES:
        expected = values(metric(model), maps)
        for factor in (-1.0, 1e-6, 1e6):
            torch.testing.assert_close(values(metric(model), factor * maps), expected)
        louder = torch.cat([maps, 1e6 * maps[:1]])
        torch.testing.assert_close(values(metric(model), louder)[:6], expected)
        split = metric(model, batch_size=2)
        for part in maps.split([1, 3, 2]):
            values(split, part)
        torch.testing.assert_close(split.compute().values[metric.name], expected)


def test_known_maps_need_no_model(model: nn.Module) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the model was called")

    silent = nn.Sequential(nn.Flatten(), nn.Linear(3 * PIXELS, 4)).eval()
    silent.register_forward_pre_hook(refuse)
    maps = random_maps(2)
    assert torch.equal(values(Sparseness(silent), maps), values(Sparseness(model), maps))


def test_a_map_of_zeros_has_no_value(model: nn.Module) -> None:
    maps = random_maps(3)
    maps[1] = 0
    for metric in CLASSES:
        one = metric(model)
        assert values(one, maps).isnan().tolist() == [False, True, False]
        assert one.compute().count == 2


def test_what_does_not_fit(model: nn.Module) -> None:
    for eps in (-0.1, 1.0, math.nan, "1e-5"):
        with pytest.raises(InputError, match=r"effective_complexity: eps must be a number in \[0, 1\)"):
            EffectiveComplexity(model, eps=eps)  # type: ignore[arg-type]
    assert make_metric("effective_complexity", model, eps=0.5).settings()["eps"] == 0.5
    with pytest.raises(InputError, match="no setting 'k'"):
        make_metric("sparseness", model, k=3)
    with pytest.raises(InputError, match="sparseness: update has no option 'eps'"):
        Sparseness(model).update(torch.zeros(1, 3, SIZE, SIZE), None, None, maps=random_maps(1), eps=0.1)
