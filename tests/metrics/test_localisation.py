"""Metrics of localisation against brute force, and masks of boxes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ramp_fast import InputError
from ramp_fast.metrics import (
    GridPointingGame,
    Metric,
    PointingGame,
    RelevanceMassAccuracy,
    RelevanceRankAccuracy,
    TopKIntersection,
    boxes_to_masks,
)

HEIGHT, WIDTH = 16, 20
PIXELS = HEIGHT * WIDTH


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * PIXELS, 4)).eval()


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_maps(count: int) -> Tensor:
    return torch.randn(count, 3, HEIGHT, WIDTH, generator=generator(0))


def random_masks(count: int) -> Tensor:
    return torch.rand(count, HEIGHT, WIDTH, generator=generator(1)) < 0.3


def values(metric: Metric, maps: Tensor, masks: Tensor) -> Tensor:
    images = torch.zeros(maps.shape[0], 3, HEIGHT, WIDTH)
    return metric.update(images, None, None, maps=maps, masks=masks)[metric.name]


def metrics(model: nn.Module, **settings: Any) -> list[Metric]:
    """One of each, with settings that all have."""
    return [
        PointingGame(model, tolerance=1, **settings),
        RelevanceMassAccuracy(model, **settings),
        RelevanceMassAccuracy(model, area=0.15, **settings),
        RelevanceRankAccuracy(model, **settings),
        TopKIntersection(model, k=40, **settings),
    ]


def test_maps_that_point_at_the_object_and_beside_it(model: nn.Module) -> None:
    masks = random_masks(4)
    noise = 0.1 * torch.rand(4, HEIGHT, WIDTH, generator=generator(2))
    for on, wanted in ((masks, 1.0), (~masks, 0.0)):
        maps = ((1 + noise) * on).unsqueeze(1)
        for metric in metrics(model):
            if metric.name == "pointing_game":
                metric = PointingGame(model)  # next to a scattered mask is within any tolerance
            assert values(metric, maps, masks).tolist() == pytest.approx([wanted] * 4, abs=1e-12), metric.name


def test_definitions(model: nn.Module) -> None:
    maps, masks = random_maps(6), random_masks(6)
    found = {m.name: values(m, maps, masks) for m in metrics(model) if getattr(m, "area", None) is None}
    at_area = values(RelevanceMassAccuracy(model, area=0.15), maps, masks)
    signed = values(RelevanceMassAccuracy(model, sign="signed"), maps, masks)
    absolute = values(TopKIntersection(model, k=40, sign="absolute"), maps, masks)
    influence = values(TopKIntersection(model, k=40, concept_influence=True), maps, masks)
    scores = maps.sum(1).double().numpy().reshape(6, -1)
    for image, (r, mask) in enumerate(zip(scores, masks.numpy().reshape(6, -1), strict=True)):
        order = np.argsort(-r)
        rank = mask[order[: mask.sum()]].mean()
        top = mask[order[:40]].mean()
        largest = mask[np.argsort(-np.abs(r))[:40]].mean()
        positive = np.maximum(r, 0)
        assert found["relevance_rank_accuracy"][image].item() == pytest.approx(rank, abs=1e-12)
        assert found["top_k_intersection"][image].item() == pytest.approx(top, abs=1e-12)
        assert absolute[image].item() == pytest.approx(largest, abs=1e-12)
        assert influence[image].item() == pytest.approx(top / mask.mean(), abs=1e-9)
        mass = found["relevance_mass_accuracy"][image].item()
        assert mass == pytest.approx(positive[mask].sum() / positive.sum(), abs=1e-9)
        assert 0 <= mass <= 1
        kept = np.zeros_like(positive)
        kept[order[: int(0.15 * PIXELS)]] = positive[order[: int(0.15 * PIXELS)]]
        assert at_area[image].item() == pytest.approx(kept[mask].sum() / kept.sum(), abs=1e-9)
        assert at_area[image].item() != pytest.approx(mass, abs=1e-3)
        assert signed[image].item() == pytest.approx(r[mask].sum() / r.sum(), rel=1e-9)


@pytest.mark.parametrize("tolerance", [0, 0.9, 1, 1.5, 3, math.sqrt(13), 4.3, 15, 1000])
def test_the_pointing_game_has_a_round_tolerance(model: nn.Module, tolerance: float) -> None:
    count = 30
    maps = random_maps(count)
    masks = torch.rand(count, HEIGHT, WIDTH, generator=generator(3)) < 0.01
    masks[:, 0, 0] = True
    found = values(PointingGame(model, tolerance=tolerance), maps, masks)
    expected = []
    for scores, mask in zip(maps.sum(1), masks, strict=True):
        row, column = divmod(int(scores.argmax()), WIDTH)
        nearest = min(math.hypot(row - i, column - j) for i, j in mask.nonzero().tolist())
        expected.append(float(nearest <= tolerance))
    assert found.tolist() == expected
    if tolerance in (1.5, 3):  # some hit and some do not, so that there is something to tell apart
        assert 0 < sum(expected) < count


def test_ties_count_as_if_broken_by_chance(model: nn.Module) -> None:
    masks = random_masks(3)
    share = masks.flatten(1).double().mean(1).tolist()
    constant = torch.full((3, 1, HEIGHT, WIDTH), 2.0)
    for metric in (
        PointingGame(model),
        RelevanceMassAccuracy(model),
        RelevanceMassAccuracy(model, area=0.3),
        RelevanceRankAccuracy(model),
        TopKIntersection(model, k=7),
    ):
        assert values(metric, constant, masks).tolist() == pytest.approx(share, abs=1e-12), metric.name
    # three certain places, and two for four equals of which one is on the object
    maps, mask = torch.zeros(1, 1, HEIGHT, WIDTH), torch.zeros(1, HEIGHT, WIDTH, dtype=torch.bool)
    maps[0, 0, 0, :3], maps[0, 0, 1, :4] = 5, 3
    mask[0, 0, 0], mask[0, 1, 0] = True, True
    assert values(TopKIntersection(model, k=5), maps, mask).item() == pytest.approx((1 + 2 / 4) / 5)
    at_area = RelevanceMassAccuracy(model, area=5 / PIXELS)
    assert values(at_area, maps, mask).item() == pytest.approx((5 + 3 * 2 / 4) / (3 * 5 + 2 * 3))


def test_results_do_not_depend_on_batches(model: nn.Module) -> None:
    maps, masks = random_maps(6), random_masks(6)
    for whole, pieces in zip(metrics(model), metrics(model, batch_size=2), strict=True):
        expected = values(whole, maps, masks)
        for start, stop in ((0, 1), (1, 4), (4, 6)):
            values(pieces, maps[start:stop], masks[start:stop].unsqueeze(1))
        assert torch.equal(pieces.compute().values[whole.name], expected)


def test_an_empty_mask_has_no_value(model: nn.Module) -> None:
    maps, masks = random_maps(3), random_masks(3)
    masks[1] = False
    for metric in [*metrics(model), TopKIntersection(model, k=40, concept_influence=True)]:
        assert values(metric, maps, masks).isnan().tolist() == [False, True, False], metric.name
        assert metric.compute().count == 2
    nothing_positive = -maps.abs()
    assert values(RelevanceMassAccuracy(model), nothing_positive, masks).isnan().all()


def mosaics(model: nn.Module, side: int, target: Tensor, batch_size: int | None = None) -> dict[str, Tensor]:
    """Of maps that are the mosaic itself, times the class explained and with its sign turned at every other pixel."""

    def method(model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
        return images * (target - 1).view(-1, 1, 1, 1)

    images = torch.randn(target.shape[0], 3, HEIGHT, WIDTH, generator=generator(4))
    return GridPointingGame(model, side=side, batch_size=batch_size).update(images, target, method)


@pytest.mark.parametrize("side", [2, 4])
def test_the_grid_pointing_game(model: nn.Module, side: int) -> None:
    count = 2 * side**2
    # class 1 has a map of zeros; class 3 and 0 are on the first mosaic twice where there are more than four tiles
    target = torch.arange(count) % 4
    target[4:8] = torch.tensor([2, 0, 2, 3])
    found = mosaics(model, side, target)
    images = torch.randn(count, 3, HEIGHT, WIDTH, generator=generator(4)).double().numpy()
    height, width = HEIGHT // side, WIDTH // side
    expected = np.full((2, side**2), np.nan)
    for group in range(2):
        first = group * side**2
        mosaic = np.zeros((3, HEIGHT, WIDTH))
        for tile in range(side**2):
            row, column = divmod(tile, side)
            for i in range(height):
                for j in range(width):
                    square = images[first + tile, :, i * side : (i + 1) * side, j * side : (j + 1) * side]
                    mosaic[:, row * height + i, column * width + j] = square.mean((1, 2))
        classes = target[first : first + side**2].tolist()
        for tile, label in enumerate(classes):
            row, column = divmod(tile, side)
            positive = np.maximum((mosaic * (label - 1)).sum(0), 0)
            if classes.count(label) == 1 and positive.sum() > 0:
                here = positive[row * height : (row + 1) * height, column * width : (column + 1) * width]
                expected[group, tile] = here.sum() / positive.sum()
    assert np.allclose(found["tiles"].numpy(), expected, atol=1e-6, equal_nan=True)
    if side == 2:
        assert np.isfinite(expected).sum() == 3 + 2
        assert np.allclose(found["grid_pointing_game"].numpy(), np.nanmean(expected, 1), atol=1e-6)
    else:
        assert found["grid_pointing_game"].isnan().all()
    pieces = mosaics(model, side, target, batch_size=3)
    assert torch.equal(pieces["tiles"].nan_to_num(-1), found["tiles"].nan_to_num(-1))


def test_a_map_of_the_right_tile_wins_the_grid_pointing_game(model: nn.Module) -> None:
    def method(model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
        maps = -torch.ones(images.shape[0], 1, HEIGHT, WIDTH)
        for number, label in enumerate(target.tolist()):
            row, column = divmod(label, 2)
            maps[number, :, row * 8 : row * 8 + 8, column * 10 : column * 10 + 10] = 1
        return maps

    metric = GridPointingGame(model)
    for start in (0, 4):
        metric.update(torch.zeros(4, 3, HEIGHT, WIDTH), torch.tensor([0, 1, 2, 3]) ^ (start // 4), method)
    assert metric.compute().values["grid_pointing_game"].tolist() == [1.0, 0.0]
    single = nn.Sequential(nn.Flatten(), nn.Linear(3 * PIXELS, 1)).eval()
    with pytest.raises(InputError, match="a single class"):
        GridPointingGame(single).update(torch.zeros(4, 3, HEIGHT, WIDTH), 0, method)


def test_boxes() -> None:
    one = torch.tensor([[2, 1, 5, 3], [0, 0, WIDTH, HEIGHT], [-4, 5, 3, 90]])
    masks = boxes_to_masks(one, HEIGHT, WIDTH)
    assert masks.shape == (3, 1, HEIGHT, WIDTH)
    assert masks.dtype == torch.bool
    assert masks[0].nonzero()[:, 1:].tolist() == [[i, j] for i in (1, 2) for j in (2, 3, 4)]
    assert masks[1].all()
    assert masks[2].sum() == 3 * (HEIGHT - 5)
    assert masks[2, 0, 5:, :3].all()

    both = boxes_to_masks(torch.stack([one, one.flip(0)]), HEIGHT, WIDTH)
    assert torch.equal(both[0, 0], masks.any(0)[0])
    none, two = torch.zeros(0, 4), torch.tensor([[0.5, 0.4, 1.6, 1.0], [3.0, 3.0, 3.0, 9.0]])
    listed = boxes_to_masks([none, two, one[:1].float()], HEIGHT, WIDTH)
    assert not listed[0].any()
    assert listed[1].nonzero()[:, 1:].tolist() == [[0, 0], [0, 1]]  # centres count, and no area covers nothing
    assert torch.equal(listed[2], masks[0])


def test_what_does_not_fit(model: nn.Module) -> None:
    maps, masks = random_maps(2), random_masks(2)
    nan = torch.tensor([[0, 0, math.nan, 1]])
    for call, problem in (
        (lambda: values(TopKIntersection(model), maps, masks), "top_k_intersection: images of 16 x 20 .* k = 1000"),
        (lambda: TopKIntersection(model, k=0), "top_k_intersection: k must be a positive integer, got 0"),
        (lambda: TopKIntersection(model, concept_influence=1), "concept_influence must be True or False"),  # type: ignore[arg-type]
        (
            lambda: RelevanceMassAccuracy(model, area=0),
            r"area must be a share of the pixels in \(0, 1\], or None; got 0",
        ),
        (lambda: RelevanceMassAccuracy(model, area=20), "area must be a share of the pixels"),
        (lambda: GridPointingGame(model, side=1), "grid_pointing_game: side must be an integer of at least 2, got 1"),
        (lambda: mosaics(model, 3, torch.zeros(9, dtype=torch.long)), "multiples of side = 3 .* got 16 x 20"),
        (lambda: mosaics(model, 2, torch.zeros(6, dtype=torch.long)), "groups of 4, got 6"),
        (lambda: PointingGame(model, tolerance=-1), "pointing_game: tolerance must be"),
        (lambda: PointingGame(model, tolerance=math.inf), "pointing_game: tolerance must be"),
        (lambda: RelevanceRankAccuracy(model, sign="negative"), "relevance_rank_accuracy: sign must be one of"),  # type: ignore[arg-type]
        (lambda: values(PointingGame(model), maps, masks.float()), "masks must be a bool Tensor"),
        (lambda: PointingGame(model).update(torch.zeros(2, 3, HEIGHT, WIDTH), None, None, maps=maps), "needs masks"),
        (lambda: boxes_to_masks(torch.zeros(4), HEIGHT, WIDTH), r"\[N, 4\] .* got \[4\]"),
        (lambda: boxes_to_masks([torch.zeros(2, 4), torch.zeros(4)], HEIGHT, WIDTH), r"got \[4\] for image 1"),
        (lambda: boxes_to_masks([], HEIGHT, WIDTH), "got list"),
        (lambda: boxes_to_masks(nan, HEIGHT, WIDTH), "finite"),
        (lambda: boxes_to_masks(torch.tensor([[0, 0, 1, 1], [3, 0, 2, 1]]), HEIGHT, WIDTH), r"got \[3.0, 0.0, 2.0"),
        (lambda: boxes_to_masks(torch.zeros(1, 4), 0, WIDTH), "height must be a positive integer, got 0"),
    ):
        with pytest.raises(InputError, match=problem):
            call()
    for metric, setting in (
        (TopKIntersection, {"k": 3}),
        (TopKIntersection, {"concept_influence": True}),
        (RelevanceMassAccuracy, {"area": 0.5}),
        (PointingGame, {"tolerance": 1}),
        (PointingGame, {"sign": "absolute"}),
    ):
        with pytest.raises(InputError, match="does not fit"):
            metric(model).merge_state(metric(model, **setting).state_dict())  # type: ignore[arg-type]
    assert values(TopKIntersection(model, k=PIXELS), maps, masks).tolist() == pytest.approx(
        masks.flatten(1).double().mean(1).tolist()
    )
