"""Correlations, infidelity, monotonicity and sufficiency against plain loops over images, subsets and pairs."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from small import Linear, classifier, contributions, normal
from torch import Tensor, nn

from ramp_fast import InputError
from ramp_fast.metrics import (
    FaithfulnessCorrelation,
    Infidelity,
    Metric,
    Monotonicity,
    MonotonicityCorrelation,
    SensitivityN,
    Sufficiency,
    make_metric,
)
from ramp_fast.metrics._maps import Sign
from ramp_fast.metrics.features import kind_of_feature

SIZE = 8
TARGET = torch.tensor([0, 3, 1, 4])
SIGNED = {"signed": lambda maps: maps, "positive": lambda maps: maps.clamp(min=0), "absolute": torch.abs}
SETTINGS: dict[str, dict[str, object]] = {
    "sensitivity_n": {"samples": 9, "sizes": (0.1, 0.5), "granularity": "superpixel:6"},
    "faithfulness_correlation": {"samples": 12, "subset_size": 10, "baseline": "uniform"},
    "infidelity": {"samples": 11, "sizes": (2, 3), "baseline": "uniform"},
    "monotonicity": {"steps": 6, "granularity": "patch:3"},
    "monotonicity_correlation": {"groups": 5, "samples": 3},
    "sufficiency": {"threshold": 0.9, "granularity": "patch:4"},
}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return classifier()


@pytest.fixture(scope="module")
def images() -> Tensor:
    blobs = [
        nn.functional.interpolate(normal(1, 3, *grid, seed=s), (SIZE, SIZE), mode="nearest")
        for s, grid in enumerate([(2, 2), (4, 5), (3, 2), (1, 4)])
    ]
    return torch.cat(blobs) + 0.05 * normal(4, 3, SIZE, SIZE, seed=9)


@pytest.fixture(scope="module")
def maps() -> Tensor:
    return normal(4, 3, SIZE, SIZE, seed=1)


def probability(model: nn.Module, image: Tensor, target: Tensor | int) -> float:
    with torch.no_grad():
        return float(model(image.unsqueeze(0)).softmax(1)[0, int(target)])


def same(a: Metric, b: Metric) -> None:
    expected, actual = b.compute().values, a.compute().values
    assert expected.keys() == actual.keys()
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-8, atol=1e-10, equal_nan=True)


@pytest.mark.parametrize("granularity", ["entry", "pixel", "patch:3", "superpixel:6"])
def test_correlations_over_subsets_against_a_loop(
    model: nn.Module, images: Tensor, maps: Tensor, granularity: str
) -> None:
    sizes, samples = (1, 3), 8
    metric = SensitivityN(model, sizes=sizes, samples=samples, granularity=granularity, baseline="mean")
    found = metric.update(images, TARGET, None, maps=maps)
    single = FaithfulnessCorrelation(model, subset_size=3, samples=samples, granularity=granularity, baseline="mean")
    torch.testing.assert_close(
        single.update(images, TARGET, None, maps=maps)["faithfulness_correlation"], found["correlations"][:, 1]
    )
    kind = kind_of_feature(granularity)
    for i in range(4):
        here = kind.of(images[i : i + 1], maps[i : i + 1])
        count = int(torch.as_tensor(here.counts))
        order = metric.priorities(i, count).argsort(1)
        mean = images[i].mean((1, 2)).view(3, 1, 1)
        for number, n in enumerate(sizes):
            sums, drops = [], []
            for draw in range(samples):
                chosen = torch.zeros(1, count)
                chosen[0, order[draw, :n]] = 1
                masked = here.spread(chosen)[0] > 0
                sums.append(float(maps[i][masked.expand(3, -1, -1)].sum()))
                copy = torch.where(masked, mean, images[i])
                drops.append(probability(model, images[i], TARGET[i]) - probability(model, copy, TARGET[i]))
            expected = np.corrcoef(sums, drops)[0, 1]
            assert float(found["correlations"][i, number]) == pytest.approx(expected, abs=1e-9)
        assert float(found["sensitivity_n"][i]) == pytest.approx(float(found["correlations"][i].mean()), abs=1e-12)


def test_subsets_are_uniform(model: nn.Module) -> None:
    """Of 5 features every pair is drawn equally often, and no draw repeats another."""
    order = SensitivityN(model, samples=20000).priorities(3, 5).argsort(1)[:, :2].sort(1).values
    pairs = torch.bincount(order[:, 0] * 5 + order[:, 1], minlength=25)
    expected = 20000 / 10
    chosen = pairs[pairs > 0]
    assert len(chosen) == 10
    assert float(((chosen - expected) ** 2 / expected).sum()) < 30  # chi-squared, 9 degrees of freedom


def test_shares_of_features_are_rounded_down(model: nn.Module, images: Tensor, maps: Tensor) -> None:
    """0.29 of 9 patches are 2, 0.01 are one."""
    settings: dict[str, object] = {"samples": 6, "granularity": "patch:3"}
    shares = SensitivityN(model, sizes=(0.01, 0.29), **settings).update(images, TARGET, None, maps=maps)
    numbers = SensitivityN(model, sizes=(1, 2), **settings).update(images, TARGET, None, maps=maps)
    assert torch.equal(shares["correlations"], numbers["correlations"])


def test_correlations_that_are_not_defined(model: nn.Module, images: Tensor, maps: Tensor) -> None:
    """All nine patches are one subset only: no correlation; of a flat map there is none at all."""
    metric = SensitivityN(model, sizes=(2, 9), samples=6, granularity="patch:3")
    found = metric.update(images, TARGET, None, maps=maps)
    assert found["correlations"][:, 1].isnan().all()
    assert torch.equal(found["sensitivity_n"], found["correlations"][:, 0])
    # sums of a tenth over as many entries are equal up to rounding
    flat = metric.update(images, TARGET, None, maps=torch.full_like(maps, 0.1))
    assert flat["sensitivity_n"][~torch.isnan(flat["sensitivity_n"])].numel() == 4
    even = SensitivityN(model, sizes=(2,), samples=6, granularity="patch:4")
    even.update(images, TARGET, None, maps=torch.full_like(maps, 0.1))
    assert even.compute().count == 0


def test_right_maps_are_told_from_wrong_ones() -> None:
    model = Linear(3, SIZE, SIZE).eval()
    images = normal(4, 3, SIZE, SIZE, seed=20)
    right = contributions(model, images, TARGET)
    weights = model.weight.detach()[TARGET]
    common: dict[str, object] = {"output": "logit", "baseline": "zero", "granularity": "pixel"}
    for metric in (
        SensitivityN(model, samples=20, **common),
        FaithfulnessCorrelation(model, samples=20, subset_size=5, **common),
    ):
        for sign in (1, -1):
            found = metric.update(images, TARGET, None, maps=sign * right)[metric.name]
            torch.testing.assert_close(found, torch.full((4,), float(sign), dtype=torch.float64))
        random = metric.update(images, TARGET, None, maps=normal(4, 3, SIZE, SIZE, seed=2))[metric.name]
        assert (random.abs() < 0.9).all()

    def infidelity(maps: Tensor, **settings: object) -> Tensor:
        metric = Infidelity(model, samples=50, sizes=(1, 2, 3), **settings)
        return metric.update(images, TARGET, None, maps=maps)["infidelity"]

    for perturbation in ("square", "gaussian", "noisy_baseline"):
        assert infidelity(weights, perturbation=perturbation).max() < 1e-20
        # twice the right map is as far from it as no map
        nothing = infidelity(0 * weights, perturbation=perturbation)
        assert nothing.min() > 0.01
        torch.testing.assert_close(infidelity(2 * weights, perturbation=perturbation), nothing, rtol=1e-9, atol=0)
        assert infidelity(-7 * weights, perturbation=perturbation, rescaled=True).max() < 1e-20
        assert torch.equal(infidelity(0 * weights, perturbation=perturbation, rescaled=True), nothing)
    assert infidelity(right, times_input=True).max() < 1e-20
    assert infidelity(right.sum(1, keepdim=True), times_input=True).max() < 1e-20
    assert infidelity(weights, times_input=True).min() > 0.01


@pytest.mark.parametrize("output", ["logit", "probability"])
def test_infidelity_of_every_square_against_a_loop(model: nn.Module, images: Tensor, maps: Tensor, output: str) -> None:
    def watched(image: Tensor, target: Tensor) -> float:
        with torch.no_grad():
            logits = model(image.unsqueeze(0))
        return float((logits.softmax(1) if output == "probability" else logits)[0, int(target)])

    image, map = images[1:2, :, :, :6], maps[1:2, :1, :, :6]  # 8 x 6, so that rows and columns are told apart
    narrow = classifier(8, 6)
    model = narrow
    sizes = (2, 5)
    products, sums, drops = [], [], []
    for size in sizes:
        for top, left in product(range(8 - size + 1), range(6 - size + 1)):
            copy = image[0].clone()
            copy[:, top : top + size, left : left + size] = image.amin()
            products.append(float(((image[0] - copy) * map[0]).sum()))
            sums.append(float(map[0, 0, top : top + size, left : left + size].sum()))
            drops.append(watched(image[0], TARGET[1]) - watched(copy, TARGET[1]))
    common: dict[str, object] = {"samples": None, "sizes": sizes, "baseline": "black", "output": output}
    for times_input, counted in ((False, np.array(products)), (True, np.array(sums))):
        for rescaled in (False, True):
            factor = (counted * drops).sum() / (counted**2).sum() if rescaled else 1.0
            expected = ((factor * counted - drops) ** 2).mean()
            metric = Infidelity(narrow, times_input=times_input, rescaled=rescaled, batch_size=7, **common)
            found = metric.update(image, TARGET[1:2], None, maps=map)["infidelity"]
            assert float(found) == pytest.approx(expected, rel=1e-9)


def test_squares_are_drawn_from_all_of_them(model: nn.Module) -> None:
    metric = Infidelity(model, samples=6000, sizes=(3, 4))
    squares = metric._squares(torch.Generator().manual_seed(0), 4, 5)
    every = Infidelity(model, samples=None, sizes=(3, 4))._squares(torch.Generator(), 4, 5)
    expected = {(3, t, left) for t in range(2) for left in range(3)} | {(4, 0, left) for left in range(2)}
    assert {tuple(s) for s in every.tolist()} == expected
    assert len(every) == 8
    kinds, counts = squares.unique(dim=0, return_counts=True)
    assert {tuple(s) for s in kinds.tolist()} == expected
    assert float(((counts - 750) ** 2 / 750).sum()) < 27  # chi-squared, 7 degrees of freedom


def test_noise_of_infidelity(images: Tensor) -> None:
    """A model that adds up the entries, explained by nothing, loses the sum of the noise."""

    class Sum(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1).sum(1, keepdim=True).expand(-1, 2)

    model, nothing = Sum().eval(), torch.zeros_like(images)
    entries = images[0].numel()
    gaussian = Infidelity(model, perturbation="gaussian", samples=2000, sigma=0.5)
    found = gaussian.update(images, 0, None, maps=nothing)["infidelity"]
    torch.testing.assert_close(found, torch.full_like(found, 0.25 * entries), rtol=0.15, atol=0)
    around = Infidelity(model, perturbation="noisy_baseline", samples=2000, sigma=0.5, baseline=0.125)
    found = around.update(images, 0, None, maps=nothing)["infidelity"]
    expected = 0.25 * entries + (images - 0.125).flatten(1).sum(1) ** 2
    assert ((found - expected).abs() < 0.15 * expected + 10).all()
    assert not torch.allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("sign", list(SIGNED))
def test_monotonicity_against_a_loop(model: nn.Module, images: Tensor, maps: Tensor, sign: Sign) -> None:
    metric = Monotonicity(model, steps=6, granularity="patch:3", sign=sign)
    found = metric.update(images, TARGET, None, maps=maps)
    patches = kind_of_feature("patch:3")
    for i in range(4):
        here = patches.of(images[i : i + 1], SIGNED[sign](maps[i : i + 1]))
        order = here.scores[0].argsort(stable=True)
        curve = []
        for step in range(7):
            shown = torch.zeros(1, 9)
            shown[0, order[: step * 9 // 6]] = 1
            copy = torch.where(here.spread(shown)[0] > 0, images[i], images[i].min())
            curve.append(probability(model, copy, TARGET[i]))
        np.testing.assert_allclose(found["curve"][i], curve, rtol=1e-9)
        rising = np.diff(curve)[1:] >= -1e-6
        assert float(found["rising"][i]) == pytest.approx(rising.mean())
        assert bool(found["monotonicity"][i]) == rising.all()


def test_a_monotonous_model(images: Tensor) -> None:
    """Every pixel adds to the output or takes from it: maps say which."""
    model = Linear(3, SIZE, SIZE).eval()
    x = images.abs() + 0.1
    common: dict[str, object] = {"steps": 16, "granularity": "pixel", "baseline": "zero", "output": "logit"}
    with torch.no_grad():
        model.weight.abs_()
    right = contributions(model, x, TARGET)
    for maps in (right, -right):
        found = Monotonicity(model, **common).update(x, TARGET, None, maps=maps)
        assert (found["monotonicity"] == 1).all()
    with torch.no_grad():
        model.weight[:, :, 0, 0] = -50
    right = contributions(model, x, TARGET)
    found = Monotonicity(model, **common).update(x, TARGET, None, maps=right)
    assert (found["monotonicity"] == 0).all()
    assert torch.allclose(found["rising"], torch.tensor(14 / 15, dtype=torch.float64))
    # with its sign it comes first, before there is anything to compare with
    signed = Monotonicity(model, sign="signed", **common).update(x, TARGET, None, maps=right)
    assert (signed["monotonicity"] == 1).all()
    lenient = Monotonicity(model, tolerance=1e3, **common).update(x, TARGET, None, maps=right)
    assert (lenient["monotonicity"] == 1).all()


@pytest.mark.parametrize("granularity", ["entry", "patch:3", "superpixel:6"])
@pytest.mark.parametrize("sign", list(SIGNED))
def test_monotonicity_correlation_against_a_loop(
    model: nn.Module, images: Tensor, maps: Tensor, granularity: str, sign: Sign
) -> None:
    groups = 4
    common: dict[str, object] = {"groups": groups, "granularity": granularity, "sign": sign}
    metric = MonotonicityCorrelation(model, samples=3, **common)
    found = metric.update(images, TARGET, None, maps=maps)
    fixed = MonotonicityCorrelation(model, samples=3, baseline="mean", **common)
    found_fixed = fixed.update(images, TARGET, None, maps=maps)
    for i in range(4):
        map = SIGNED[sign](maps[i])
        here = kind_of_feature(granularity).of(images[i : i + 1], map.unsqueeze(0))
        count = here.scores.shape[1]
        order = here.scores[0].argsort(stable=True)
        low, high = images[i].min(), images[i].max()
        drawn = [
            low + (high - low) * torch.rand(3, SIZE, SIZE, generator=metric.generator(i, s)).double() for s in range(3)
        ]
        mean = images[i].mean((1, 2), keepdim=True).expand(3, SIZE, SIZE)
        for values, baselines in ((found, drawn), (found_fixed, [mean])):
            sums, squares = [], []
            for group in range(groups):
                members = [r for r in range(count) if r * groups // count == group]
                chosen = torch.zeros(1, count)
                chosen[0, order[members]] = 1
                masked = here.spread(chosen)[0] > 0
                sums.append(float(map[masked.expand(3, -1, -1)].sum()))
                whole = probability(model, images[i], TARGET[i])
                copies = [torch.where(masked, b, images[i]) for b in baselines]
                squares.append(np.mean([(whole - probability(model, c, TARGET[i])) ** 2 for c in copies]))
            expected = stats.spearmanr(sums, squares)[0]
            assert float(values["monotonicity_correlation"][i]) == pytest.approx(expected, abs=1e-9)


def test_equal_values_share_their_rank(images: Tensor) -> None:
    """A map of two values, an output that two thirds of the pixels have no part in."""
    model = Linear(3, SIZE, SIZE).eval()
    with torch.no_grad():
        model.weight[..., 2:] = 0
    maps = torch.zeros(4, 1, SIZE, SIZE, dtype=torch.float64)
    maps[..., :4] = torch.tensor([1.0, 2.0, 1.0, 2.0])
    metric = MonotonicityCorrelation(model, groups=SIZE, granularity="patch:1", baseline="zero", output="logit")
    # a group is eight pixels, by rank: the zeros of the right half first, in order
    found = metric.update(images, TARGET, None, maps=maps)["monotonicity_correlation"]
    for i in range(4):
        order = maps[i].flatten().sort(stable=True).indices.view(SIZE, SIZE)
        parts = contributions(model, images, TARGET)[i].sum(0).flatten()
        expected = stats.spearmanr(maps[i].flatten()[order].sum(1), parts[order].sum(1) ** 2)[0]
        assert float(found[i]) == pytest.approx(expected, abs=1e-9)
        assert len(maps[i].flatten()[order].sum(1).unique()) < SIZE
    flat = metric.update(images, TARGET, None, maps=torch.ones_like(maps))
    assert flat["monotonicity_correlation"].isnan().all()


def sufficiency_of_loop(signature: Tensor, predicted: Tensor, threshold: float) -> tuple[list[float], list[int]]:
    signature = signature / signature.std(0)
    count = len(signature)
    distance = [[float((signature[i] - signature[j]).norm()) for j in range(count)] for i in range(count)]
    largest = max(map(max, distance))
    shares, likes = [], []
    for i in range(count):
        alike = [j for j in range(count) if j != i and distance[i][j] <= threshold * largest]
        likes.append(len(alike))
        found = [bool(predicted[j] == predicted[i]) for j in alike]
        shares.append(sum(found) / len(found) if found else float("nan"))
    return shares, likes


@pytest.mark.parametrize(("sign", "threshold"), [("absolute", 0.2), ("signed", 0.45)])
def test_sufficiency_against_a_loop(sign: Sign, threshold: float) -> None:
    model, images = classifier(seed=4), normal(12, 3, SIZE, SIZE, seed=5)
    maps = normal(12, 3, SIZE, SIZE, seed=6)
    maps[2:] += 2 * maps[:5].repeat(2, 1, 1, 1)  # five kinds
    maps[:2] *= 5  # two of their own
    metric = Sufficiency(model, threshold=threshold, sign=sign, granularity="patch:2")
    first = metric.update(images[:7], 0, None, maps=maps[:7])  # predictions count, not what is explained
    second = metric.update(images[7:], 0, None, maps=maps[7:])
    with torch.no_grad():
        predicted = model(images).argmax(1)
    used = SIGNED[sign](maps).sum(1)
    signature = used.unflatten(2, (4, 2)).unflatten(1, (4, 2)).sum((2, 4)).flatten(1)
    whole = metric.compute().values
    for values, part in ((first, slice(7)), (second, slice(7, 12)), (whole, slice(12))):
        shares, likes = sufficiency_of_loop(signature[part], predicted[part], threshold)
        np.testing.assert_allclose(values["sufficiency"], shares)
        assert values["likes"].tolist() == likes
    assert 0 < metric.compute().count < 12  # some images have no likes
    assert len(set(whole["sufficiency"].nan_to_num(-1).tolist())) > 2


def test_sufficiency_of_equal_maps() -> None:
    """Twins are alike even at threshold 0; a feature that never changes says nothing."""
    model, images = classifier(seed=4), normal(60, 3, SIZE, SIZE, seed=5)
    maps = normal(30, 1, SIZE, SIZE, seed=6)
    maps[:, :, 0] = 1
    metric = Sufficiency(model, threshold=0)
    metric.update(images, None, None, maps=torch.cat([maps, maps]))
    found = metric.compute().values
    assert (found["likes"] == 1).all()
    with torch.no_grad():
        predicted = model(images).argmax(1)
    assert torch.equal(found["sufficiency"], (predicted == predicted.roll(30)).double())
    alone = Sufficiency(model).update(images[:1], None, None, maps=maps[:1])
    assert alone["sufficiency"].isnan().all()


@pytest.mark.parametrize("name", SETTINGS)
def test_results_do_not_depend_on_batches(model: nn.Module, images: Tensor, maps: Tensor, name: str) -> None:
    settings = SETTINGS[name]
    before = torch.get_rng_state()
    whole = make_metric(name, model, **settings)
    whole.update(images, TARGET, None, maps=maps)
    for batch_size, size in ((1, 4), (7, 2), (64, 3), (None, 1)):
        pieces = make_metric(name, model, batch_size=batch_size, **settings)
        for part in torch.arange(4).split(size):
            pieces.update(images[part], TARGET[part], None, maps=maps[part])
        same(pieces, whole)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("name", "settings", "calls"),
    [
        ("sensitivity_n", SETTINGS["sensitivity_n"], 1),
        ("faithfulness_correlation", SETTINGS["faithfulness_correlation"], 1),
        ("monotonicity", SETTINGS["monotonicity"], 1),
        ("monotonicity_correlation", SETTINGS["monotonicity_correlation"], 3),  # once for every draw
        ("monotonicity_correlation", {"groups": 4, "samples": 2, "baseline": "road", "noise": 0.2}, 2),
        ("monotonicity_correlation", {"groups": 4, "samples": 2, "baseline": "mean"}, 1),
        ("infidelity", SETTINGS["infidelity"], 4),  # once for every image
        ("infidelity", {"samples": 11, "perturbation": "gaussian"}, 4),
        ("infidelity", {"samples": 11, "perturbation": "noisy_baseline", "baseline": "mean"}, 4),
    ],
)
def test_copies_fill_the_batches(
    images: Tensor, maps: Tensor, name: str, settings: dict[str, object], calls: int
) -> None:
    sizes: list[int] = []
    model = classifier()
    model.register_forward_hook(lambda module, args, output: sizes.append(args[0].shape[0]))
    small = make_metric(name, model, batch_size=5, **settings)
    made: list[int] = []
    logits = small.logits
    small.logits = lambda x, *args: made.append(x.shape[0]) or logits(x, *args)  # type: ignore[method-assign]
    small.update(images, TARGET, None, maps=maps)
    assert max(sizes) <= 5
    assert max(made, default=0) <= 5  # nor are more copies made than go through the model
    passes = sum(sizes)
    sizes.clear()
    large = make_metric(name, model, batch_size=1000, **settings)
    large.update(images, TARGET, None, maps=maps)
    assert sum(sizes) == passes
    assert len([size for size in sizes if size > 4]) == calls  # the others are of the images themselves
    same(large, small)


@pytest.mark.parametrize("name", SETTINGS)
def test_states_and_seeds(model: nn.Module, images: Tensor, maps: Tensor, name: str, tmp_path: Path) -> None:
    settings = SETTINGS[name]
    whole, first, second = (make_metric(name, model, **settings) for _ in range(3))
    whole.update(images, TARGET, None, maps=maps)
    first.update(images[:2], TARGET[:2], None, maps=maps[:2])
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second.load_state_dict(torch.load(tmp_path / "state.pt"))
    second.update(images[2:], TARGET[2:], None, maps=maps[2:])
    same(second, whole)
    changed: dict[str, list[dict[str, object]]] = {
        "sensitivity_n": [{"samples": 8}, {"sizes": (0.2, 0.5)}, {"baseline": "blur"}, {"granularity": "pixel"}],
        "faithfulness_correlation": [{"samples": 8}, {"subset_size": 9}, {"output": "logit"}],
        "infidelity": [
            {"samples": 12},
            {"sizes": (2,)},
            {"perturbation": "gaussian"},
            {"times_input": True},
            {"rescaled": True},
            {"output": "probability"},
            {"baseline": 0.5},
        ],
        "monotonicity": [{"steps": 5}, {"sign": "signed"}, {"tolerance": 0.0}, {"granularity": "pixel"}],
        "monotonicity_correlation": [{"groups": 4}, {"samples": 2}, {"sign": "signed"}],
        "sufficiency": [{"threshold": 0.5}, {"sign": "signed"}, {"granularity": "patch:2"}],
    }
    for change in (*changed[name], {"seed": 1}):
        with pytest.raises(InputError, match="does not fit"):
            make_metric(name, model, **{**settings, **change}).load_state_dict(whole.state_dict())
    if name in ("sensitivity_n", "faithfulness_correlation", "infidelity", "monotonicity_correlation"):
        other = make_metric(name, model, **settings, seed=1)
        other.update(images, TARGET, None, maps=maps)
        assert not torch.allclose(other.compute().values[name], whole.compute().values[name], atol=1e-9)


def test_settings_say_everything(model: nn.Module) -> None:
    common = {"metric": "infidelity", "seed": 0, "baseline": "zero", "output": "logit", "samples": 1000}
    rest = {"times_input": False, "rescaled": False}
    square = Infidelity(model).settings()
    assert square == {**common, **rest, "perturbation": "square", "sizes": list(range(1, 11))}
    for perturbation in ("gaussian", "noisy_baseline"):
        found = Infidelity(model, perturbation=perturbation, sigma=0.1).settings()
        assert found == {**common, **rest, "perturbation": perturbation, "sigma": 0.1}
    defaults = {name: make_metric(name, model).settings() for name in SETTINGS}
    assert (defaults["sensitivity_n"]["samples"], defaults["sensitivity_n"]["baseline"]) == (100, "zero")
    assert defaults["faithfulness_correlation"]["subset_size"] == 224
    for name, baseline in (("faithfulness_correlation", "black"), ("monotonicity", "black")):
        assert defaults[name]["baseline"] == baseline
    assert defaults["monotonicity_correlation"]["baseline"] == "uniform"
    assert defaults["sufficiency"]["threshold"] == 0.6
    for name in ("monotonicity", "monotonicity_correlation", "sufficiency"):
        assert defaults[name]["sign"] == "absolute"


def test_axes_of_curves(model: nn.Module, images: Tensor, maps: Tensor) -> None:
    for metric, label in (
        (Monotonicity(model, steps=4, granularity="patch:4"), "share revealed"),
        (SensitivityN(model, sizes=(1, 2), samples=3, granularity="patch:4"), "features masked"),
        (SensitivityN(model, sizes=(0.3, 0.6), samples=3, granularity="patch:4"), "share of features masked"),
    ):
        axis = metric.axis()
        assert axis is not None
        assert axis["label"] == label
        found = metric.update(images, TARGET, None, maps=maps)
        for curve in axis["curves"]:
            assert found[curve].shape == (4, len(axis["values"]))


def test_noise_does_not_depend_on_how_much_is_drawn_together() -> None:
    """75 entries: a generator that fills more at once gives other numbers."""
    model, images, maps = classifier(5, 5), normal(2, 3, 5, 5, seed=1), normal(2, 3, 5, 5, seed=2)
    found = [
        Infidelity(model, perturbation="gaussian", samples=9, batch_size=size).update(images, 0, None, maps=maps)
        for size in (2, 64)
    ]
    torch.testing.assert_close(found[0]["infidelity"], found[1]["infidelity"], rtol=1e-9, atol=0)


def test_what_does_not_fit(model: nn.Module, images: Tensor, maps: Tensor) -> None:
    calls = 0

    def count(*args: object) -> None:
        nonlocal calls
        calls += 1

    watched = classifier()
    watched.register_forward_hook(count)

    def measured(metric: Metric, x: Tensor = images, r: Tensor = maps) -> None:
        metric.update(x, TARGET[: len(x)], None, maps=r)

    small = Sufficiency(model, granularity="pixel")
    measured(small)
    for call, problem in (
        (lambda: SensitivityN(model, sizes=()), "sensitivity_n: sizes must ascend"),
        (lambda: SensitivityN(model, sizes=(3, 1)), "sensitivity_n: sizes must ascend"),
        (lambda: SensitivityN(model, sizes=(0.5, 2)), "sensitivity_n: sizes must ascend"),
        (lambda: SensitivityN(model, sizes=(0, 2)), "sensitivity_n: sizes must ascend"),
        (lambda: SensitivityN(model, sizes=(True, 2)), "sensitivity_n: sizes must ascend"),
        (lambda: SensitivityN(model, samples=0), "sensitivity_n: samples must be"),
        (lambda: FaithfulnessCorrelation(model, subset_size=0), "faithfulness_correlation: subset_size must be"),
        (
            lambda: measured(FaithfulnessCorrelation(watched, granularity="patch:3", subset_size=10)),
            "faithfulness_correlation: subsets of 10 features of an image that has 9: take smaller",
        ),
        (lambda: Infidelity(model, perturbation="blur"), "infidelity: perturbation must be one of square, gaussian"),
        (lambda: Infidelity(model, samples=0), "infidelity: samples must be"),
        (lambda: Infidelity(model, samples=None, perturbation="gaussian"), "infidelity: samples=None"),
        (lambda: Infidelity(model, sizes=(0,)), "infidelity: sizes must be"),
        (lambda: Infidelity(model, sizes=(True,)), "infidelity: sizes must be"),
        (lambda: Infidelity(model, sizes=()), "infidelity: sizes must be"),
        (lambda: Infidelity(model, sigma=0), "infidelity: sigma must be"),
        (lambda: Infidelity(model, perturbation="gaussian", times_input=True), "infidelity: times_input goes with"),
        (lambda: measured(Infidelity(watched)), "infidelity: squares of 10 pixels do not fit images 8 x 8"),
        (lambda: make_metric("infidelity", model, granularity="pixel"), "no setting 'granularity'"),
        (lambda: Monotonicity(model, steps=1), "monotonicity: steps must be"),
        (lambda: Monotonicity(model, tolerance=-1.0), "monotonicity: tolerance must be"),
        (lambda: MonotonicityCorrelation(model, groups=1), "monotonicity_correlation: groups must be"),
        (lambda: MonotonicityCorrelation(model, samples=0), "monotonicity_correlation: samples must be"),
        (
            lambda: measured(MonotonicityCorrelation(watched, groups=10, granularity="patch:3")),
            "monotonicity_correlation: 10 groups of 9 features: take fewer",
        ),
        (lambda: Monotonicity(model, sign="none"), "monotonicity: sign must be one of"),
        (lambda: Sufficiency(model, threshold=1.5), "sufficiency: threshold must be"),
        (lambda: Sufficiency(model, granularity="superpixel"), "sufficiency: superpixels of two images"),
        (
            lambda: measured(small, normal(2, 3, SIZE, SIZE, seed=0), maps[:2]) or small.merge_state(wide(model)),
            "sufficiency: maps of 192 features cannot be compared with those before, of 64",
        ),
    ):
        with pytest.raises(InputError, match=problem):
            call()
    assert calls <= 3  # to learn how many classes there are, and nothing else
    assert small.compute().values["likes"].shape == (6,)


def wide(model: nn.Module) -> dict[str, object]:
    """A state of the same settings, of more features."""
    metric = Sufficiency(model, granularity="pixel")
    metric.update(normal(1, 3, SIZE, SIZE, seed=0), None, None, maps=normal(1, 3, SIZE, SIZE, seed=1))
    state = metric.state_dict()
    state["values"]["signature"] = torch.zeros(1, 192)
    return state
