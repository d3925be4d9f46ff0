"""Curves against plain loops that mask feature after feature, baselines and imputation against their definitions."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small import CLASSES, Linear, classifier, contributions, normal
from torch import Tensor, nn

from ramp_fast import InputError
from ramp_fast.metrics import ABPC, AOPC, IROF, ROAD, Deletion, Insertion, Metric, make_metric
from ramp_fast.metrics.baselines import BASELINES, Fill, Impute, filling, impute
from ramp_fast.metrics.features import Patches, Superpixels, kind_of_feature

HEIGHT, WIDTH = 8, 10
GRANULARITIES = ("entry", "pixel", "patch:3", "superpixel:6")
EXACT = {"rtol": 1e-10, "atol": 1e-12}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return classifier(HEIGHT, WIDTH)


@pytest.fixture(scope="module")
def images() -> Tensor:
    """Blobs of colour, of other sizes in every image, so that superpixels differ in number."""
    blobs = [
        nn.functional.interpolate(normal(1, 3, *grid, seed=s), (HEIGHT, WIDTH), mode="nearest")
        for s, grid in enumerate([(2, 2), (4, 5), (3, 2), (1, 4)])
    ]
    return torch.cat(blobs) + 0.05 * normal(4, 3, HEIGHT, WIDTH, seed=9)


TARGET = torch.tensor([0, 3, 1, 4])


@pytest.fixture(scope="module")
def maps() -> Tensor:
    return normal(4, 3, HEIGHT, WIDTH, seed=1)


def features(granularity: str, image: Tensor, map: Tensor) -> list[tuple[float, Tensor]]:
    """Score and mask ``[C, H, W]`` of every feature of one image, one by one."""
    channels, height, width = image.shape
    everything = [(c, h, w) for c in range(channels) for h in range(height) for w in range(width)]
    kind, _, number = granularity.partition(":")
    if kind == "superpixel":
        labels = Superpixels(int(number)).labels(image.unsqueeze(0))[0]

    def key(c: int, h: int, w: int) -> int:
        if kind == "entry":
            return (c * height + h) * width + w
        if kind == "pixel":
            return h * width + w
        if kind == "patch":
            return h // int(number) * -(-width // int(number)) + w // int(number)
        return int(labels[h, w])

    masks: dict[int, Tensor] = {}
    for c, h, w in everything:
        masks.setdefault(key(c, h, w), torch.zeros(image.shape, dtype=torch.bool))[c, h, w] = True
    wide = map.expand(image.shape) if kind == "entry" else map
    found = []
    for number_of_feature in sorted(masks):
        mask = masks[number_of_feature]
        values = wide[mask] if wide.shape == image.shape else wide[mask[:1]]
        found.append((float(values.mean() if kind == "superpixel" else values.sum()), mask))
    return found


def outputs_of_loop(
    model: nn.Module,
    image: Tensor,
    target: int,
    found: list[tuple[float, Tensor]],
    baseline: Tensor,
    ks: Callable[[int], list[int]],
    *,
    descending: bool = True,
    reveal: bool = False,
) -> Tensor:
    """Probabilities of the class with the first ``ks`` features masked, or revealed."""
    order = sorted(found, key=lambda f: f[0], reverse=descending)
    outputs = []
    for k in ks(len(order)):
        masked = sum((mask for _, mask in order[:k]), torch.zeros(image.shape, dtype=torch.bool))
        copy = torch.where(masked, image, baseline) if reveal else torch.where(masked, baseline, image)
        with torch.no_grad():
            outputs.append(model(copy.unsqueeze(0)).softmax(1)[0, target])
    return torch.stack(outputs)


def shares(steps: int) -> Callable[[int], list[int]]:
    return lambda count: [s * count // steps for s in range(steps + 1)]


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("channels", [1, 3])
def test_curves_against_a_loop(model: nn.Module, images: Tensor, maps: Tensor, granularity: str, channels: int) -> None:
    maps, steps = maps[:, :channels], 7
    common = {"granularity": granularity, "steps": steps, "baseline": "zero"}
    deletion = Deletion(model, **common).update(images, TARGET, None, maps=maps)
    insertion = Insertion(model, **common).update(images, TARGET, None, maps=maps)
    abpc = ABPC(model, **common).update(images, TARGET, None, maps=maps)
    for i in range(len(images)):
        found = features(granularity, images[i], maps[i])
        morf, lerf, inserted = (
            outputs_of_loop(model, images[i], int(TARGET[i]), found, torch.zeros(1).double(), shares(steps), **how)
            for how in ({}, {"descending": False}, {"reveal": True})
        )
        torch.testing.assert_close(deletion["curve"][i], morf, **EXACT)
        torch.testing.assert_close(insertion["curve"][i], inserted, **EXACT)
        torch.testing.assert_close(abpc["morf"][i], morf, **EXACT)
        torch.testing.assert_close(abpc["lerf"][i], lerf, **EXACT)
        areas = [float(sum((c[s] + c[s + 1]) / 2 / steps for s in range(steps))) for c in (morf, inserted, lerf)]
        assert float(deletion["deletion"][i]) == pytest.approx(areas[0], rel=1e-9)
        assert float(insertion["insertion"][i]) == pytest.approx(areas[1], rel=1e-9)
        assert float(abpc["abpc"][i]) == pytest.approx(areas[2] - areas[0], rel=1e-9)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_regions_and_removal_against_a_loop(model: nn.Module, images: Tensor, maps: Tensor, granularity: str) -> None:
    regions = 9  # more than some images have superpixels
    common = {"granularity": granularity, "baseline": "mean"}
    aopc = AOPC(model, regions=regions, **common).update(images, TARGET, None, maps=maps)
    irof = IROF(model, **common).update(images, TARGET, None, maps=maps)
    for i in range(len(images)):
        mean = images[i].mean((1, 2)).view(3, 1, 1)
        where = model, images[i], int(TARGET[i]), features(granularity, images[i], maps[i]), mean
        outputs = outputs_of_loop(*where, lambda count: [min(t, count) for t in range(regions + 1)])
        torch.testing.assert_close(aopc["curve"][i], outputs[0] - outputs, **EXACT)
        assert float(aopc["aopc"][i]) == pytest.approx(float((outputs[0] - outputs).mean()), rel=1e-9)
        every = outputs_of_loop(*where, lambda count: list(range(count + 1)))
        count = len(every) - 1
        assert int(irof["segments"][i]) == count
        expected = 1 - float(torch.trapezoid(every / every[0])) / count
        assert float(irof["irof"][i]) == pytest.approx(expected, rel=1e-9)


def test_superpixels_of_these_images_differ_in_number(images: Tensor) -> None:
    counts = Superpixels(6).labels(images).flatten(1).amax(1) + 1
    assert len(set(counts.tolist())) > 1
    assert int(counts.min()) < 9


METRICS: dict[str, dict[str, object]] = {
    "deletion": {"steps": 6, "granularity": "pixel"},
    "insertion": {"steps": 6, "granularity": "superpixel:6"},
    "abpc": {"steps": 5, "granularity": "entry", "baseline": "uniform"},
    "aopc": {"regions": 7, "granularity": "patch:3"},
    "irof": {"granularity": "superpixel:6"},
    "road": {"percentages": (10, 40, 80), "granularity": "superpixel:6", "noise": 0.3},
}


def same(a: Metric, b: Metric) -> None:
    expected, actual = b.compute().values, a.compute().values
    assert expected.keys() == actual.keys()
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", METRICS)
def test_results_do_not_depend_on_batches(model: nn.Module, images: Tensor, maps: Tensor, name: str) -> None:
    whole = make_metric(name, model, **METRICS[name])
    whole.update(images, TARGET, None, maps=maps)
    for batch_size, size in ((1, 4), (3, 2), (64, 1), (None, 3)):
        pieces = make_metric(name, model, batch_size=batch_size, **METRICS[name])
        for part in torch.arange(4).split(size):
            pieces.update(images[part], TARGET[part], None, maps=maps[part])
        same(pieces, whole)


def test_no_more_than_a_batch_goes_through_the_model(model: nn.Module, images: Tensor, maps: Tensor) -> None:
    sizes: list[int] = []
    with_hook = classifier(HEIGHT, WIDTH)
    with_hook.register_forward_hook(lambda module, args, output: sizes.append(args[0].shape[0]))
    Deletion(with_hook, steps=9, batch_size=7).update(images, TARGET, None, maps=maps)
    assert max(sizes) <= 7
    sizes.clear()
    Deletion(with_hook, steps=1, batch_size=8).update(images, TARGET, None, maps=maps)
    assert sizes[-1] == 8  # two steps of four images together


@pytest.mark.parametrize("name", METRICS)
def test_states_and_random_numbers(model: nn.Module, images: Tensor, maps: Tensor, name: str, tmp_path: Path) -> None:
    before = torch.get_rng_state()
    whole, first, second = (make_metric(name, model, **METRICS[name]) for _ in range(3))
    whole.update(images, TARGET, None, maps=maps)
    first.update(images[:2], TARGET[:2], None, maps=maps[:2])
    second.load_state_dict(first.state_dict())
    second.update(images[2:], TARGET[2:], None, maps=maps[2:])
    same(second, whole)
    torch.save(second.state_dict(), tmp_path / "state.pt")
    loaded = make_metric(name, model, **METRICS[name])
    loaded.load_state_dict(torch.load(tmp_path / "state.pt"))
    same(loaded, whole)
    assert torch.equal(torch.get_rng_state(), before)
    other = {"steps": 3} if "steps" in METRICS[name] else {"output": "logit"}
    for settings in (other, {"baseline": 0.25}, {"granularity": "patch:2"}, {"seed": 1}):
        with pytest.raises(InputError, match="does not fit"):
            make_metric(name, model, **{**METRICS[name], **settings}).load_state_dict(whole.state_dict())


@pytest.mark.parametrize("baseline", ["uniform", "road"])
def test_random_fillings_follow_the_seed(model: nn.Module, images: Tensor, maps: Tensor, baseline: str) -> None:
    def curve(seed: int) -> Tensor:
        metric = Deletion(model, steps=3, baseline=baseline, noise=0.5, seed=seed)
        return metric.update(images, TARGET, None, maps=maps)["curve"]

    assert torch.equal(curve(0), curve(0))
    assert not torch.allclose(curve(0)[:, 1:], curve(1)[:, 1:], atol=1e-6)
    twice = Deletion(model, steps=3, baseline=baseline, noise=0.5)
    found = twice.update(images[:1].repeat(2, 1, 1, 1), 0, None, maps=maps[:1].repeat(2, 1, 1, 1))["curve"]
    assert not torch.allclose(found[0, 1:], found[1, 1:], atol=1e-6)  # every image has numbers of its own


def test_channels_last_images(model: nn.Module, images: Tensor, maps: Tensor) -> None:
    last = images.to(memory_format=torch.channels_last)
    for name, settings in METRICS.items():
        expected, actual = (make_metric(name, model, **settings) for _ in range(2))
        expected.update(images, TARGET, None, maps=maps)
        actual.update(last, TARGET, None, maps=maps)
        same(actual, expected)


class Careless(nn.Module):
    """Writes to its input, or returns a part of it."""

    def __init__(self, writes: bool) -> None:
        super().__init__()
        self.writes, self.weight = writes, nn.Parameter(normal(CLASSES, seed=3))

    def forward(self, x: Tensor) -> Tensor:
        part = x.flatten(1)[:, :CLASSES]
        if not self.writes:
            return part
        logits = part * self.weight + x.flatten(1).sum(1, keepdim=True)
        x.mul_(2).add_(1)
        return logits


@pytest.mark.parametrize("metric", [Deletion, Insertion])
@pytest.mark.parametrize("writes", [False, True])
def test_models_may_do_with_copies_what_they_like(
    images: Tensor, maps: Tensor, metric: type[Deletion | Insertion], writes: bool
) -> None:
    model, target = Careless(writes).eval(), torch.arange(images.shape[0]) % CLASSES
    curves = []
    for size in (1, 3, 1000):  # one step of one image, of some, and everything at a time
        values = metric(model, steps=24, batch_size=size, output="logit").update(
            images.clone(), target, None, maps=maps
        )
        curves.append(values["curve"])
    for curve in curves[:-1]:
        torch.testing.assert_close(curve, curves[-1], rtol=1e-12, atol=1e-12)


def generators(count: int = 4) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(count)]


def fixed(baseline: object, images: Tensor) -> Tensor:
    found = filling(baseline, images, generators(len(images)))  # type: ignore[arg-type]
    assert isinstance(found, Fill)
    return found.baseline.expand_as(images)


def test_values_of_baselines(images: Tensor) -> None:
    assert (fixed("zero", images) == 0).all()
    for i, image in enumerate(images):
        assert (fixed("black", images)[i] == min(image.flatten().tolist())).all()
        assert (fixed("white", images)[i] == max(image.flatten().tolist())).all()
        for c in range(3):
            mean = math.fsum(image[c].flatten().tolist()) / (HEIGHT * WIDTH)
            assert (fixed("mean", images)[i, c] - mean).abs().max() < 1e-12
    uniform = fixed("uniform", images)
    low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
    shares = (uniform - low) / (high - low)
    assert float(shares.min()) >= 0
    assert float(shares.max()) <= 1
    for image in shares:  # of 240 values, uniform in [0, 1]
        assert abs(float(image.mean()) - 0.5) < 5 * (1 / 12 / image.numel()) ** 0.5
        assert abs(float(image.var()) - 1 / 12) < 0.02
    assert not torch.allclose(shares[0], shares[1], atol=0.1)
    assert (fixed(0.25, images) == 0.25).all()
    assert (fixed(2, images) == 2).all()


def test_blur(images: Tensor) -> None:
    weights = [[math.exp(-(y * y + x * x) / 50) for x in range(-5, 6)] for y in range(-5, 6)]
    total = sum(map(sum, weights))
    blurred = fixed("blur", images)
    for h, w in ((0, 0), (3, 4), (7, 9)):  # beyond the border the nearest pixel
        expected = sum(
            weights[y + 5][x + 5] / total * images[:, :, min(max(h + y, 0), HEIGHT - 1), min(max(w + x, 0), WIDTH - 1)]
            for y in range(-5, 6)
            for x in range(-5, 6)
        )
        torch.testing.assert_close(blurred[:, :, h, w], expected, **EXACT)


def test_values_as_baselines(images: Tensor) -> None:
    color = torch.tensor([0.1, 0.2, 0.3])
    torch.testing.assert_close(fixed(color, images), color.double().view(3, 1, 1).expand_as(images))
    for values in (normal(3, HEIGHT, WIDTH, seed=3), normal(1, 3, 1, 1, seed=4), normal(4, 3, HEIGHT, WIDTH, seed=5)):
        torch.testing.assert_close(fixed(values, images), values.expand_as(images))
    for wrong in (torch.zeros(2), torch.zeros(3, HEIGHT, WIDTH + 1), torch.zeros(2, 3, HEIGHT, WIDTH)):
        with pytest.raises(InputError, match=r"deletion: a baseline .* does not fit images \[4, 3, 8, 10\]"):
            filling(wrong, images, generators(), metric="deletion")


def test_parts_of_a_filling_keep_their_images(images: Tensor) -> None:
    steps = torch.zeros(2, 1, HEIGHT, WIDTH, dtype=torch.int32)
    steps[..., 0] = 1  # one column is known, which imputation needs
    for baseline in BASELINES:
        fill = filling(baseline, images, generators(), noise=0.3)
        whole = fill.copies(images, steps.repeat(2, 1, 1, 1), 0, 1)[0]
        torch.testing.assert_close(fill.of(slice(1, 3)).copies(images[1:3], steps, 0, 1)[0], whole[1:3], **EXACT)
        rows = torch.tensor([3, 0, 3])
        found = fill.of(rows).copies(images[rows], steps[:1].repeat(3, 1, 1, 1), 0, 1)[0]
        torch.testing.assert_close(found, whole[rows], **EXACT)


def dense_imputation(image: Tensor, masked: Tensor) -> Tensor:
    """Every masked pixel is the weighted mean of its neighbours within the image: a dense system, solved."""
    height, width = masked.shape
    numbers = {(h, w): n for n, (h, w) in enumerate(masked.nonzero().tolist())}
    system = torch.zeros(len(numbers), len(numbers), dtype=torch.float64)
    right = torch.zeros(len(numbers), image.shape[0], dtype=torch.float64)
    for (h, w), n in numbers.items():
        for y in (-1, 0, 1):
            for x in (-1, 0, 1):
                if (y, x) == (0, 0) or not (0 <= h + y < height and 0 <= w + x < width):
                    continue
                weight = 1 / 12 if y and x else 1 / 6
                system[n, n] += weight
                if (h + y, w + x) in numbers:
                    system[n, numbers[h + y, w + x]] -= weight
                else:
                    right[n] += weight * image[:, h + y, w + x].double()
    filled = image.double().clone()
    filled[:, masked] = torch.linalg.solve(system, right).t()
    return filled


def imputation_masks() -> dict[str, Tensor]:
    masks = {name: torch.zeros(9, 12, dtype=torch.bool) for name in ("one known", "border", "corner", "one", "half")}
    masks["one known"][:] = True
    masks["one known"][2, 7] = False
    masks["border"][[0, -1]] = masks["border"][:, [0, -1]] = True
    masks["corner"][5:, 7:] = True
    masks["one"][4, 4] = True
    masks["half"] = normal(9, 12, seed=11) > 0
    return masks


@pytest.mark.parametrize("mask", imputation_masks())
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-8), (torch.float32, 2e-4), (torch.float16, 4e-3)])
def test_imputation_solves_the_system(mask: str, dtype: torch.dtype, tolerance: float) -> None:
    masked = imputation_masks()[mask]
    images = (normal(2, 3, 9, 12, seed=12) + 1).to(dtype)
    # beside a system that is solved at once and one that is not
    masks = torch.stack([masked, imputation_masks()["half"]]).unsqueeze(1)
    found = impute(images, masks)
    for i in range(2):
        expected = dense_imputation(images[i], masks[i, 0])
        torch.testing.assert_close(found[i].double(), expected, rtol=0, atol=tolerance)
        assert torch.equal(found[i][:, ~masks[i, 0]], images[i][:, ~masks[i, 0]])


def test_imputation_without_a_known_pixel_is_the_mean() -> None:
    images = normal(2, 3, 5, 6, seed=13)
    masked = torch.ones(2, 1, 5, 6, dtype=torch.bool)
    masked[1, 0, 0, 0] = False
    found = impute(images, masked)
    torch.testing.assert_close(found[0], images[0].mean((1, 2), keepdim=True).expand(3, 5, 6), **EXACT)
    torch.testing.assert_close(found[1], images[1, :, :1, :1].expand(3, 5, 6), rtol=0, atol=1e-8)
    nothing = impute(images, torch.zeros_like(masked))
    assert torch.equal(nothing, images)


def test_noise_is_added_to_what_is_imputed(images: Tensor) -> None:
    fill = filling("road", images, generators(), noise=0.5)
    assert isinstance(fill, Impute)
    steps = torch.ones(4, 1, HEIGHT, WIDTH, dtype=torch.int32)
    steps[:, :, :5] = 0
    masked = steps == 0
    found = fill.copies(images, steps, 0, 2)
    added = found[0] - impute(images, masked)
    torch.testing.assert_close(added, torch.where(masked, fill.noise, 0.0), rtol=0, atol=1e-12)
    assert torch.equal(found[1], images.mean((2, 3), keepdim=True) + fill.noise)
    hidden = fill.copies(images, steps, 0, 1, reveal=True)[0]
    torch.testing.assert_close(hidden, torch.where(masked, images, impute(images, ~masked) + fill.noise), **EXACT)
    assert 0.4 < float(fill.noise.std()) < 0.6


@pytest.mark.parametrize("granularity", ["pixel", "superpixel:6"])
def test_percentages_of_road(model: nn.Module, images: Tensor, maps: Tensor, granularity: str) -> None:
    percentages = (0, 1.2, 12.5, 50, 99, 100)
    seen: list[Tensor] = []
    with_hook = classifier(HEIGHT, WIDTH)
    with_hook.register_forward_hook(lambda module, args, output: seen.append(args[0].clone()))
    with torch.no_grad():
        target = model(images).argmax(1)
    metric = ROAD(with_hook, percentages=percentages, granularity=granularity, noise=1e-3)
    found = metric.update(images, target, None, maps=maps)
    copies = seen[-1].unflatten(0, (len(percentages), 4))
    changed = (copies != images).any(2).flatten(2)  # [P, N, pixels]: noise moves every pixel that is filled in
    predicted = []
    for i in range(4):
        order = sorted(features(granularity, images[i], maps[i]), key=lambda f: f[0], reverse=True)
        for p, percentage in enumerate(percentages):
            masked = torch.zeros(HEIGHT, WIDTH, dtype=torch.bool)
            for _, mask in order[: math.floor(len(order) * percentage / 100)]:
                masked |= mask[0]
            assert torch.equal(changed[p, i], masked.flatten()), (i, percentage)
        with torch.no_grad():
            predicted.append(model(copies[:, i]).argmax(1) == target[i])
    assert torch.equal(found["curve"], torch.stack(predicted).float())
    assert torch.equal(found["road"], torch.stack(predicted).float().mean(1))
    assert (found["curve"][:, 0] == 1).all()
    assert (found["curve"] == 0).any()


def test_right_maps_score_better_than_random_and_inverted_ones() -> None:
    model = Linear(3, 8, 8).eval()
    images = normal(6, 3, 8, 8, seed=20)
    with torch.no_grad():
        target = model(images).argmax(1)
    right = contributions(model, images, target)
    maps = {"right": right, "random": normal(6, 3, 8, 8, seed=21), "inverted": -right}
    for name, settings in {
        "deletion": {"steps": 16, "output": "logit"},
        "insertion": {"steps": 16, "output": "logit", "baseline": "zero"},
        "abpc": {"steps": 16, "output": "logit"},
        "aopc": {"granularity": "patch:2", "regions": 16, "output": "logit", "baseline": "zero"},
        "irof": {"granularity": "patch:2", "baseline": "zero"},
        "road": {"percentages": (10, 30, 50, 70), "baseline": "zero"},
    }.items():
        metric = make_metric(name, model, **settings)
        mean = {m: metric.fresh() for m in maps}
        for m, values in maps.items():
            mean[m].update(images, target, None, maps=values)
        order = [mean[m].compute().mean for m in ("right", "random", "inverted")]
        assert order == sorted(order, reverse=metric.higher_is_better), name
        assert abs(order[0] - order[2]) > 0.1, name
    # with a linear model and the true map the curve is what is left of the sum
    curve = Deletion(model, steps=64, output="logit").update(images, target, None, maps=right)["curve"]
    pixels = right.sum(1).flatten(1).sort(1, descending=True).values
    torch.testing.assert_close(curve[:, :1] - curve[:, 1:], pixels.cumsum(1), rtol=1e-9, atol=1e-9)
    found = ABPC(model, steps=64, output="logit").update(images, target, None, maps=right)["abpc"]
    against = ABPC(model, steps=64, output="logit").update(images, target, None, maps=-right)["abpc"]
    torch.testing.assert_close(found, -against, rtol=1e-9, atol=1e-9)


def test_reduced_precision_is_watched_in_float32(images: Tensor, maps: Tensor) -> None:
    model = classifier(HEIGHT, WIDTH).to(torch.bfloat16)
    found = Deletion(model, steps=4).update(images.to(torch.bfloat16), TARGET, None, maps=maps)
    assert found["curve"].dtype == torch.float32
    exact = Deletion(classifier(HEIGHT, WIDTH), steps=4).update(images, TARGET, None, maps=maps)
    assert (found["curve"][:, 0] - exact["curve"][:, 0]).abs().max() < 0.05


def test_steps_of_features(images: Tensor, maps: Tensor) -> None:
    for granularity in GRANULARITIES:
        kind = kind_of_feature(granularity)
        assert kind.name == granularity
        whole = kind.of(images, maps)
        values = torch.arange(whole.scores.shape[1]).expand(2, 4, -1)
        spread = whole.spread(values + torch.tensor([0, 1000]).view(2, 1, 1))
        assert torch.equal(spread[1], spread[0] + 1000)
        for i in range(4):
            found = features(granularity, images[i], maps[i])
            assert int(torch.as_tensor(whole.counts).expand(4)[i]) == len(found)
            for number, (score, mask) in enumerate(found):
                assert float(whole.scores[i, number]) == pytest.approx(score, abs=1e-12)
                assert float(whole.sums[i, number]) == pytest.approx(float(maps[i][mask].sum()), abs=1e-12)
                assert torch.equal(spread[0, i].expand(3, -1, -1) == number, mask)
    assert kind_of_feature("patch").name == "patch:16"
    assert kind_of_feature("superpixel").name == "superpixel:100"
    assert Superpixels(6, 1.0).name == "superpixel:6,1.0"
    assert kind_of_feature(Patches(5)).name == "patch:5"


def test_settings_say_everything(model: nn.Module) -> None:
    color = torch.tensor([0.5, 0.25, 0.0])
    assert Deletion(model, baseline=color, granularity="patch:4", output="logit", steps=3, seed=2).settings() == {
        "metric": "deletion",
        "seed": 2,
        "granularity": "patch:4",
        "baseline": [0.5, 0.25, 0.0],
        "output": "logit",
        "steps": 3,
    }
    assert ROAD(model, percentages=(1, 2), noise=0.5).settings() == {
        "metric": "road",
        "seed": 0,
        "granularity": "pixel",
        "baseline": "road",
        "output": "probability",
        "noise": 0.5,
        "percentages": [1, 2],
    }
    assert (AOPC(model).settings()["regions"], AOPC(model).settings()["granularity"]) == (100, "patch:9")
    assert (IROF(model).settings()["granularity"], IROF(model).settings()["baseline"]) == ("superpixel:100", "mean")
    assert Insertion(model).settings()["baseline"] == "blur"


def test_what_does_not_fit(model: nn.Module, images: Tensor, maps: Tensor) -> None:
    for call, problem in (
        (lambda: Deletion(model, granularity="block"), "granularity must be entry, pixel, patch or superpixel"),
        (lambda: Deletion(model, granularity="patch:"), "granularity must be"),
        (lambda: Deletion(model, granularity="patch:0"), "patches: size must be a positive integer, got 0"),
        (lambda: Deletion(model, granularity="pixel:2"), "'pixel' has no number"),
        (lambda: Deletion(model, granularity="superpixel:1"), "superpixels: count must be an integer of at least 2"),
        (lambda: Deletion(model, baseline="grey"), "deletion: baseline must be one of zero, .*road"),
        (lambda: Deletion(model, baseline=None, output="loss"), "deletion: output must be probability or logit"),
        (lambda: Deletion(model, baseline=(0, 0, 0)), "deletion: baseline must be a name, a number or a Tensor"),
        (lambda: Deletion(model, steps=0), "deletion: steps must be a positive integer"),
        (lambda: Deletion(model, steps=True), "deletion: steps must be a positive integer, got True"),
        (lambda: AOPC(model, regions=2.0), "aopc: regions must be a positive integer"),
        (lambda: ROAD(model, granularity="entry"), 'road: baseline "road" fills in whole pixels'),
        (lambda: Deletion(model, baseline="road", granularity="entry"), 'deletion: baseline "road" fills in whole'),
        (lambda: ROAD(model, percentages=()), "road: percentages must ascend"),
        (lambda: ROAD(model, percentages=(5, 3)), "road: percentages must ascend"),
        (lambda: ROAD(model, percentages=(5, 101)), "road: percentages must ascend"),
        (
            lambda: Deletion(model, baseline=torch.zeros(2)).update(images, TARGET, None, maps=maps),
            "deletion: a baseline",
        ),
        (lambda: Deletion(model).update(images, TARGET, None), "deletion asks the method for maps"),
        (lambda: Deletion(model).update(images, TARGET, None, maps=maps[:, :2]), "deletion: the caller returned"),
        (lambda: Deletion(model).update(images, CLASSES, None, maps=maps), "deletion: target must be 0 to 4"),
    ):
        with pytest.raises(InputError, match=problem):
            call()


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_both_ends_of_abpc_are_computed_once(images: Tensor, maps: Tensor, steps: int, granularity: str) -> None:
    model, passed = classifier(HEIGHT, WIDTH), []
    common: dict[str, object] = {"steps": steps, "granularity": granularity, "batch_size": 4}
    curves = {
        name: Deletion(model, **common).update(images, TARGET, None, maps=sign * maps)["curve"]  # type: ignore[arg-type]
        for name, sign in (("morf", 1), ("lerf", -1))
    }
    metric = ABPC(model, **common)  # type: ignore[arg-type]
    metric.update(images, TARGET, None, maps=maps)
    model.register_forward_pre_hook(lambda _, inputs: passed.append(inputs[0].shape[0]))
    found = metric.update(images, TARGET, None, maps=maps)
    assert sum(passed) == len(images) * 2 * steps
    for name, curve in curves.items():
        assert found[name].shape == curve.shape
        torch.testing.assert_close(found[name], curve, **EXACT)
