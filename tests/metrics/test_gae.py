"""GAE against the published code's values, and the properties of the default protocol."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ramp_fast import Engine, InputError
from ramp_fast.evaluation import evaluate
from ramp_fast.methods import input_x_gradient
from ramp_fast.metrics import GAE, MethodError, make_metric

GOLDEN = Path(__file__).parents[1] / "golden"
sys.path.insert(0, str(GOLDEN))

import recipe  # noqa: E402  # a script beside the files that it explains, not a package

STEPS = 10


@pytest.mark.parametrize(("case", "seed"), [("vit", 6), ("vit_deep", 9)])
def test_published(case: str, seed: int) -> None:
    model, images, _ = recipe.build(case, batch=4, seed=seed)
    with np.load(GOLDEN / f"gae_{case}.npz", allow_pickle=False) as file:
        golden = {name: file[name] for name in file.files}
    with torch.no_grad():
        assert model(images).argmax(1).tolist() == golden["prediction"].tolist()
    for positive in range(4):
        found = GAE(model, "published").update(images, None, input_x_gradient, positive=positive)
        np.testing.assert_allclose(found["tile_distribution"], golden["tile_distribution"], rtol=1e-12)
        for name in ("morf_output", "lerf_output", "morf_zeroed", "lerf_zeroed"):
            np.testing.assert_allclose(found[name].ravel(), golden[f"pos{positive}_{name}"].ravel(), rtol=1e-9)
        for name in ("local_consistency", "contrastiveness", "gae"):
            np.testing.assert_allclose(found[name], golden[f"pos{positive}_{name}"], rtol=1e-6, atol=1e-15)


def test_labels_weigh_the_tiles_of_the_published_protocol() -> None:
    model, images, _ = recipe.build("vit", batch=4, seed=6)
    with torch.no_grad():
        logits = model(images)
    labels = logits.argmax(1)
    expected = GAE(model, "published").update(images, None, input_x_gradient, positive=1)
    same = GAE(model, "published").update(images, labels, input_x_gradient, positive=1)
    assert torch.equal(same["gae"], expected["gae"])
    # tile 2 as likely as the positive image's own: its weight is 1 instead of nearly -1
    moved = labels.clone()
    moved[2] = labels[1]
    other = GAE(model, "published").update(images, moved, input_x_gradient, positive=1)
    assert other["contrastiveness"] > expected["contrastiveness"]
    default = GAE(model).update(images, moved, input_x_gradient, positive=1)
    assert torch.equal(default["gae"], GAE(model).update(images, None, input_x_gradient, positive=1)["gae"])
    for wrong in (-1, 10):
        with pytest.raises(InputError, match="target must be 0 to 9"):
            GAE(model).update(images, torch.tensor([0, 1, 2, wrong]), input_x_gradient)


def published_contrastiveness(model: nn.Module, images: Tensor, labels: Tensor, positive: int) -> list[float]:
    """C of a batch as the published code makes mosaics of it: a plain loop."""
    count = images.shape[0] // 4
    with torch.no_grad():
        logits = model(images)
    small, found = images[..., ::2, ::2], []
    for m in range(count):
        tiles = [m, m + count, m + 2 * count, m + 3 * count]
        weights = []
        for tile in tiles:  # by the probabilities of the positive image of the four that the tile is listed with
            own = tile // 4 * 4 + positive
            q = logits[own].softmax(0)
            weights.append((2 * q[labels[tile]] / q[labels[own]] - 1).expand_as(small[0]))
        mosaic, weight = (
            torch.cat([torch.cat([t[0], t[1]], -1), torch.cat([t[2], t[3]], -1)], -2)
            for t in (small[tiles], torch.stack(weights))
        )
        height, width = images.shape[-2:]
        weight[:, height // 2 - 1 : height // 2 + 1, width // 2 - 1 : width // 2 + 1] = 1
        shown = input_x_gradient(model, mosaic[None], logits[4 * m + positive].argmax()[None]).relu()
        found.append(float((weight * shown[0]).sum() / shown.sum()))
    return [max(c, 0.0) for c in found]


def test_mosaics_of_the_published_protocol_are_of_its_batch() -> None:
    model, images, _ = recipe.build("vit", batch=16, seed=6)
    with torch.no_grad():
        labels = model(images).argmax(1)
    values = {}
    for batch in (4, 8, 16):
        metric = GAE(model, "published")
        for part, own in zip(images.split(batch), labels.split(batch), strict=True):
            found = metric.update(part, own, input_x_gradient, positive=2)["contrastiveness"]
            np.testing.assert_allclose(found, published_contrastiveness(model, part, own, 2), rtol=1e-6, atol=1e-12)
        values[batch] = metric.compute().values["contrastiveness"]
    assert not torch.allclose(values[4], values[8])
    assert not torch.allclose(values[8], values[16])
    eights = GAE(model, "published", batch=8)  # whatever is given at a time
    found = eights.update(images, labels, input_x_gradient, positive=2)["contrastiveness"]
    torch.testing.assert_close(found, values[8], rtol=1e-9, atol=1e-12)
    assert eights.settings() != GAE(model, "published").settings()
    spec = "gae:protocol=published,batch=8,steps=2"
    runs = [evaluate(model, images[:12], [spec], ["ixg"], batch_size=size) for size in (3, 12)]
    for run in runs:
        assert run.left_out == {spec: 4}
        gae = run.results["ixg"][spec].values["gae"]
        torch.testing.assert_close(gae, runs[0].results["ixg"][spec].values["gae"], rtol=1e-9, atol=1e-12)
    with pytest.raises(InputError, match="groups of 8, got 4"):
        eights.update(images[:4], labels[:4], input_x_gradient)
    for settings in ({"protocol": "published", "batch": 6}, {"batch": 8}):
        with pytest.raises(InputError, match="batch is a multiple of 4, and for protocol"):
            GAE(model, **settings)  # type: ignore[arg-type]


class FewPixels(nn.Module):
    """Only the first row counts, and MoRF masks all of it at once: both chains rank alike from then on."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(10, 3 * 16, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, 0].flatten(1) @ self.weight.t()


def test_scores_that_are_equal_but_for_rounding_have_no_sign() -> None:
    model = FewPixels().eval()
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    for dtype in (torch.float32, torch.float64):
        found = GAE(model.to(dtype)).update(images.to(dtype), None, input_x_gradient, positive=1)
        assert found["faithfulness"].tolist() == [0.0]


@pytest.fixture(scope="module")
def setting() -> tuple[nn.Module, Tensor]:
    model, images, _ = recipe.build("vit", batch=12, seed=3)
    return model, images


def noise(model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
    """A method whose map depends on the image alone."""
    return (1e3 * images).sin()


@pytest.mark.parametrize("protocol", ["default", "published"])
@pytest.mark.parametrize("method", [input_x_gradient, noise])
def test_ranges(setting: tuple[nn.Module, Tensor], protocol: str, method) -> None:  # type: ignore[no-untyped-def]
    model, images = setting
    metric = GAE(model, protocol)
    found = metric.update(images, None, method)
    assert ((found["faithfulness"] >= -1) & (found["faithfulness"] <= 1)).all()
    assert ((found["robustness"] >= -1) & (found["robustness"] <= 1)).all()
    for name in ("gae", "local_consistency", "contrastiveness"):
        assert ((found[name] >= 0) & (found[name] <= 1)).all(), name
    torch.testing.assert_close(found["gae"], found["local_consistency"] * found["contrastiveness"])
    assert metric.compute().count == 3


def test_masking_is_cumulative(setting: tuple[nn.Module, Tensor]) -> None:
    model, images = setting
    found = GAE(model, steps=7).update(images, None, input_x_gradient)
    count = images[0].numel()
    expected = torch.tensor([t * count // 7 / count for t in range(7)], dtype=torch.float64).expand(3, 7)
    assert torch.equal(found["morf_zeroed"], expected)
    assert torch.equal(found["lerf_zeroed"], expected)


def test_results_do_not_depend_on_batches(setting: tuple[nn.Module, Tensor]) -> None:
    model, images = setting
    whole = GAE(model)
    whole.update(images, None, input_x_gradient)
    for batch_size, size in ((5, 12), (None, 4), (64, 8)):
        pieces = GAE(model, batch_size=batch_size)
        for part in images.split(size):
            pieces.update(part, None, input_x_gradient)
        for name, values in whole.compute().values.items():
            torch.testing.assert_close(pieces.compute().values[name], values, rtol=1e-9, atol=1e-12)


class Sum(nn.Module):
    """Logits that are weighted sums of pixels: input x gradient tells their whole story."""

    def __init__(self, size: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(4, 3 * size * size, generator=generator, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight.t()


def test_faithful_and_unfaithful_maps() -> None:
    model = Sum(8).eval()
    with torch.no_grad():
        model.weight.abs_()
    images = torch.rand(8, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 0.1

    def inverted(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
        right = input_x_gradient(model, x, target)
        return right.flatten(1).amax(1).view(-1, 1, 1, 1) - right

    def impact(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
        """The half that MoRF removes first, and nothing else."""
        scores = input_x_gradient(model, x, target)
        return (scores > scores.flatten(1).median(1).values.view(-1, 1, 1, 1)).double()

    values = {m: GAE(model).update(images, None, m) for m in (input_x_gradient, inverted, impact)}
    assert (values[input_x_gradient]["faithfulness"] > 0.3).all()
    assert (values[inverted]["faithfulness"] < 0).all()
    assert (values[input_x_gradient]["local_consistency"] > values[inverted]["local_consistency"]).all()


def test_contrastiveness_of_maps_that_point_at_a_tile() -> None:
    model = Sum(8).eval()
    images = torch.rand(4, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():  # every image is a class of its own
        model.weight.copy_((images - images.mean(0)).flatten(1) * 100)
        assert model(images).argmax(1).tolist() == [0, 1, 2, 3]

    def tile(number: int, channels: int):  # type: ignore[no-untyped-def]
        def method(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
            maps = torch.zeros(x.shape[0], channels, 8, 8, dtype=x.dtype)
            row, column = divmod(number, 2)
            maps[:, :, row * 5 : row * 5 + 3, column * 5 : column * 5 + 3] = 1  # beside the seams
            return maps

        return method

    for positive in range(4):
        for number in range(4):
            found = GAE(model).update(images, None, tile(number, 3), positive=positive)
            wanted = float(number == positive)
            assert found["contrastiveness"].item() == pytest.approx(wanted, abs=1e-6)
            single = GAE(model).update(images, None, tile(number, 1), positive=positive)
            torch.testing.assert_close(single["gae"], found["gae"])  # one channel counts as much as three


def test_positive_images_are_drawn_from_the_mosaic(setting: tuple[nn.Module, Tensor]) -> None:
    model, images = setting
    group = images[:4]
    metric = GAE(model, steps=2)
    drawn = torch.cat([metric.update(group.repeat(20, 1, 1, 1), None, noise)["positive"] for _ in range(20)])
    expected = GAE(model, steps=2).update(group, None, noise)["tile_distribution"][0]
    shares = torch.bincount(drawn, minlength=4) / drawn.numel()
    assert (shares - expected).abs().max() < 4 * 0.5 / drawn.numel() ** 0.5
    again = GAE(model, steps=2).update(group.repeat(20, 1, 1, 1), None, noise)["positive"]
    assert torch.equal(again, drawn[:20])
    other = GAE(model, steps=2, seed=1).update(group.repeat(20, 1, 1, 1), None, noise)["positive"]
    assert not torch.equal(other, again)


def test_an_engine_is_a_method(setting: tuple[nn.Module, Tensor]) -> None:
    model, images = setting
    engine = Engine(model, precision="float64")

    def method(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
        return engine.attribute(x, target).maps

    expected = GAE(model, steps=3).update(images[:4], None, method)
    actual = GAE(model, steps=3).update(images[:4], None, engine)
    assert torch.equal(actual["gae"], expected["gae"])


def test_states_are_saved_and_merged(setting: tuple[nn.Module, Tensor], tmp_path: Path) -> None:
    model, images = setting
    whole, first, second = (GAE(model, steps=3) for _ in range(3))
    whole.update(images[:8], None, noise, positive=torch.tensor([1, 2]))
    first.update(images[:4], None, noise, positive=1)
    second.update(images[4:8], None, noise, positive=2)
    torch.save(second.state_dict(), tmp_path / "second.pt")
    first.merge_state(torch.load(tmp_path / "second.pt"))
    for name, values in whole.compute().values.items():
        torch.testing.assert_close(first.compute().values[name], values)
    assert first.compute().standard_error == pytest.approx(whole.compute().standard_error)
    fresh = GAE(model, steps=3)
    fresh.load_state_dict(whole.state_dict())
    assert fresh.compute().mean == whole.compute().mean
    other = GAE(model, steps=4)
    other.update(images[:4], None, noise)
    for refused in (other.merge_state, other.load_state_dict):
        with pytest.raises(InputError, match="does not fit"):
            refused(whole.state_dict())
        assert other.compute().count == 1
    with pytest.raises(KeyError):
        other.load_state_dict({"settings": other.settings()})
    assert other.compute().count == 1
    assert other.images_seen == 4


def test_processes_that_share_the_images_draw_what_one_would(setting: tuple[nn.Module, Tensor]) -> None:
    model, images = setting
    batch = images[:4].repeat(30, 1, 1, 1)
    whole = GAE(model, steps=2)
    whole.update(batch, None, noise)
    first, second = whole.fresh(), whole.fresh(first_image=40)
    first.update(batch[:40], None, noise)
    second.update(batch[40:], None, noise)
    first.merge_state(second.state_dict())
    assert torch.equal(first.compute().values["positive"], whole.compute().values["positive"])
    apart = whole.fresh()
    apart.update(batch[40:], None, noise)
    assert not torch.equal(apart.compute().values["positive"], second.compute().values["positive"])


def test_half_precision(setting: tuple[nn.Module, Tensor]) -> None:
    model, images = setting
    half = copy.deepcopy(model).to(torch.bfloat16)

    def nothing(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
        return -torch.ones_like(x)

    assert (GAE(half, steps=3).update(images.bfloat16(), None, nothing)["gae"] == 0).all()
    # the same start and classes: what differs is the model's rounding
    found = GAE(half, steps=3).update(images.bfloat16(), None, noise, positive=0)
    assert found["morf_output"].dtype == torch.float32
    expected = GAE(model, steps=3).update(images.bfloat16().double(), None, noise, positive=0)
    torch.testing.assert_close(found["morf_output"][:, 0].double(), expected["morf_output"][:, 0], rtol=0.1, atol=0.1)


def test_a_loaded_state_goes_on_drawing_where_it_was(setting: tuple[nn.Module, Tensor]) -> None:
    model, images = setting
    whole, first, rest = (GAE(model, steps=2) for _ in range(3))
    batch = images[:4].repeat(30, 1, 1, 1)
    whole.update(batch, None, noise)
    first.update(batch[:40], None, noise)
    rest.load_state_dict(first.state_dict())
    rest.update(batch[40:], None, noise)
    assert torch.equal(rest.compute().values["positive"], whole.compute().values["positive"])


def test_the_model_and_its_images_are_left_alone(setting: tuple[nn.Module, Tensor]) -> None:
    model, images = setting
    before = images.clone()
    state = torch.get_rng_state()
    GAE(model, steps=3).update(images, None, input_x_gradient)
    assert torch.equal(images, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


def test_what_does_not_fit(setting: tuple[nn.Module, Tensor]) -> None:
    model, images = setting
    metric = GAE(model, steps=3)
    training = recipe.build("vit")[0].train()

    def small(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
        return x[..., ::2]

    def nan(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
        return torch.full_like(x, float("nan"))

    def broken(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
        raise ZeroDivisionError("no luck")

    metric.update(images[:4], None, noise)
    with pytest.raises(MethodError, match=r"gae: broken failed in batch 1, .*: ZeroDivisionError: no luck"):
        metric.update(images[:4], None, broken)
    for call, problem in (
        (lambda: metric.update(images[:3], None, noise), "groups of 4, got 3"),
        (lambda: metric.update(images[:4, :, :31], None, noise), "must be even"),
        (lambda: metric.update(images[0], None, noise), r"\[N, C, H, W\]"),
        (lambda: metric.update(images[:4], torch.zeros(3).long(), noise), "target must be"),
        (lambda: metric.update(images[:4], None, noise, positive=4), "positive must be 0 to 3"),
        (lambda: metric.update(images[:4], None, small), "gae: small returned .* in batch 1"),
        (lambda: metric.update(images[:4], None, nan), "gae: 6 of 6 maps of nan are not finite in batch 1"),
        (lambda: GAE(model, "other"), "protocol"),
        (lambda: GAE(model, steps=1), "steps"),
        (lambda: GAE(model, batch_size=0), "batch_size"),
        (
            lambda: make_metric("gae", model, depth=3),
            "no setting 'depth'; it has batch, ",
        ),
        (lambda: make_metric("gea", model), r"no metric 'gea' \(did you mean 'gae'\?\); there are"),
        (lambda: GAE(training).update(images[:4], None, noise), "training mode"),
    ):
        with pytest.raises(InputError, match=problem):
            call()
    assert metric.compute().count == 1  # finished work is kept
    with pytest.raises(RuntimeError, match="no values yet"):
        GAE(model).compute()
