"""Random logit and parameter randomisation: similarities against brute force, and methods that know nothing."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ramp_fast import Engine, InputError
from ramp_fast.methods import input_x_gradient
from ramp_fast.metrics import Metric, ParameterRandomisation, RandomLogit
from ramp_fast.metrics._maps import SIMILARITIES

SIZE = 16
CLASSES = 7


class Net(nn.Module):
    """Convolutions, a normalization, and a parameter that no module resets."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(1, 4, 1, 1))
        self.first = nn.Conv2d(3, 4, 3, stride=2)
        self.norm = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 6, 3)
        self.head = nn.Linear(6 * 25, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm(self.first(x)) + self.bias)
        return self.head(torch.tanh(self.second(x)).flatten(1))


LAYERS = ["head", "second", "norm", "first", ""]  # from the last


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    model = Net().double().eval()
    with torch.no_grad():
        model.norm.running_mean.normal_()
        model.norm.weight.uniform_(0.5, 2)
    return model


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(6, 3, SIZE, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def edges(model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
    """A method that looks at neither model nor class."""
    return F.pad(images.diff(dim=-1), (0, 1)).sum(1, keepdim=True)


def naive_ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Window by window."""
    extent = max(a.max(), b.max()) - min(a.min(), b.min())
    c1, c2 = (0.01 * extent) ** 2, (0.03 * extent) ** 2
    height = min(7, a.shape[0])
    values = []
    for i in range(a.shape[0] - height + 1):
        for j in range(a.shape[1] - 6):
            u, v = (x[i : i + height, j : j + 7].ravel() for x in (a, b))
            (uu, uv), (_, vv) = np.cov(u, v)
            mean, other = u.mean(), v.mean()
            values.append((2 * mean * other + c1) * (2 * uv + c2) / ((mean**2 + other**2 + c1) * (uu + vv + c2)))
    return float(np.mean(values))


def naive_spearman(a: np.ndarray, b: np.ndarray) -> float:
    def ranks(values: np.ndarray) -> np.ndarray:
        return np.array([(values < v).sum() + ((values == v).sum() + 1) / 2 for v in values])

    return float(np.corrcoef(ranks(a.ravel()), ranks(b.ravel()))[0, 1])


NAIVE = {
    "ssim": naive_ssim,
    "ssim_flat": lambda a, b: naive_ssim(a.reshape(1, -1), b.reshape(1, -1)),
    "spearman": naive_spearman,
    "pearson": lambda a, b: float(np.corrcoef(a.ravel(), b.ravel())[0, 1]),
}


@pytest.mark.parametrize("name", list(SIMILARITIES))
def test_similarities(name: str) -> None:
    generator = torch.Generator().manual_seed(2)
    a, noise = torch.randn(2, 5, 10, 12, dtype=torch.float64, generator=generator)
    b = a + noise * torch.tensor([0.0, 0.1, 0.5, 2.0, 10.0]).view(-1, 1, 1)
    a, b = (10 * a).round() / 10, (10 * b).round() / 10  # with ties
    found = SIMILARITIES[name](a, b)
    assert found.tolist() == pytest.approx([NAIVE[name](x, y) for x, y in zip(a.numpy(), b.numpy(), strict=True)])
    assert found[0].item() == pytest.approx(1)
    assert (found.diff() < 0).all()
    torch.testing.assert_close(SIMILARITIES[name](b, a), found)
    constant = torch.full_like(a, 0.9)  # whose mean is not 0.9 after rounding
    assert SIMILARITIES[name](constant, constant).isnan().all()
    assert SIMILARITIES[name](a, constant).isnan().all() == ("ssim" not in name)
    if "ssim" not in name:
        assert SIMILARITIES[name](a, constant + 1e-15 * noise).isnan().all()  # equal but for rounding


def test_opposites() -> None:
    a = torch.randn(3, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for name in ("spearman", "pearson"):
        assert SIMILARITIES[name](a, -a).tolist() == pytest.approx([-1] * 3)


@pytest.mark.parametrize("similarity", list(SIMILARITIES))
@pytest.mark.parametrize("sign", ["signed", "positive", "absolute"])
def test_random_logit_is_as_defined(model: nn.Module, images: Tensor, similarity: str, sign: str) -> None:
    target = torch.arange(6)
    found = RandomLogit(model, similarity, sign=sign).update(images, target, input_x_gradient)  # type: ignore[arg-type]
    assert (found["other"] != target).all()
    for n in range(6):
        scores = []
        for k in (n, int(found["other"][n])):
            one = input_x_gradient(model, images[n : n + 1], torch.tensor([k])).sum(1)[0].numpy()
            one = {"signed": one, "positive": np.maximum(one, 0), "absolute": np.abs(one)}[sign]
            scores.append(one / np.abs(one).max())
        assert found["random_logit"][n].item() == pytest.approx(NAIVE[similarity](*scores), abs=1e-9)


def test_other_classes_are_drawn_alike(model: nn.Module, images: Tensor) -> None:
    metric = RandomLogit(model)
    many = images[:1].repeat(1400, 1, 1, 1)
    target = torch.full((1400,), 3)
    other = metric.update(many, target, edges, maps=edges(model, many, target))["other"]
    counts = torch.bincount(other, minlength=CLASSES).tolist()
    assert counts[3] == 0
    expected = 1400 / 6
    assert sum((c - expected) ** 2 / expected for k, c in enumerate(counts) if k != 3) < 20.5  # chi2(5), p = 0.001


def test_a_method_that_knows_neither_class_nor_model(model: nn.Module, images: Tensor) -> None:
    for metric in (RandomLogit(model), ParameterRandomisation(model)):
        found = metric.update(images, None, edges)[metric.name]
        assert found.tolist() == pytest.approx([1.0] * 6)
        knows = metric.fresh().update(images, None, input_x_gradient)[metric.name]
        assert (knows < 0.8).all()
        assert (knows >= -1).all()


class Recorder:
    """Input x gradient that keeps the parameters it met."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []
        self.targets: list[Tensor] = []

    def __call__(self, model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
        assert not model.training
        self.states.append(copy.deepcopy(model.state_dict()))
        self.targets.append(target)
        return input_x_gradient(model, images, target)


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name.rpartition(".")[0] for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize(
    ("stages", "groups"),
    [
        (None, [[0], [1], [2], [3], [4]]),
        (9, [[0], [1], [2], [3], [4]]),
        (2, [[0, 1], [2, 3, 4]]),
        (1, [[0, 1, 2, 3, 4]]),
    ],
)
def test_layers_are_forgotten_from_the_last(
    model: nn.Module, images: Tensor, stages: int | None, groups: list[list[int]]
) -> None:
    method = Recorder()
    found = ParameterRandomisation(model, stages=stages).update(images, 2, method)
    assert found["similarity"].shape == (6, len(groups))
    assert all(torch.equal(t, torch.full((6,), 2)) for t in method.targets)
    states = method.states
    assert changed(model.state_dict(), states[0]) == set()
    for group, before, after in zip(groups, states[:-1], states[1:], strict=True):
        assert changed(before, after) == {LAYERS[k] for k in group}
    # the deeper the change the less is left
    last = ParameterRandomisation(model, stages=None).update(images, 2, input_x_gradient)["similarity"][:, -1]
    torch.testing.assert_close(found["similarity"][:, -1], last, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found["parameter_randomisation"], found["similarity"].mean(1))
    scores = [input_x_gradient(model, images, torch.full((6,), 2)).sum(1).abs().numpy()]
    forgetful = copy.deepcopy(model)
    forgetful.load_state_dict(states[-1])
    scores.append(input_x_gradient(forgetful, images, torch.full((6,), 2)).sum(1).abs().numpy())
    expected = [naive_spearman(a, b) for a, b in zip(*scores, strict=True)]
    assert found["similarity"][:, -1].tolist() == pytest.approx(expected, abs=1e-9)


def test_new_parameters(model: nn.Module, images: Tensor) -> None:
    method = Recorder()
    ParameterRandomisation(model, stages=1).update(images, None, method)
    new = method.states[-1]
    assert (new["norm.weight"] == 1).all()
    assert (new["norm.running_mean"] == 0).all()
    bound = 1 / math.sqrt(6 * 25)  # of nn.Linear
    assert 0.9 * bound < new["head.weight"].abs().max() <= bound
    old = model.state_dict()
    assert (new["bias"] - old["bias"].mean()).abs().max() < 5 * old["bias"].std()
    again = Recorder()
    ParameterRandomisation(model, stages=1).update(images[:1], None, again)
    other = Recorder()
    ParameterRandomisation(model, stages=1, seed=1).update(images[:1], None, other)
    for name in ("head.weight", "bias"):
        assert torch.equal(again.states[-1][name], new[name])
        assert not torch.isclose(other.states[-1][name], new[name]).any()


class Twins(nn.Module):
    """Two layers alike."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x.mean((2, 3)))))


def test_every_layer_gets_numbers_of_its_own(images: Tensor) -> None:
    method = Recorder()
    ParameterRandomisation(Twins().double().eval(), stages=1).update(images, None, method)
    new = method.states[-1]
    assert not torch.isclose(new["a.weight"], new["b.weight"]).any()


def test_deep_models_have_eight_stages(images: Tensor) -> None:
    deep = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, 4), *[nn.Linear(4, 4) for _ in range(10)])
    deep = deep.double().eval()
    assert ParameterRandomisation(deep).update(images, 0, edges)["similarity"].shape == (6, 8)
    assert ParameterRandomisation(deep, stages=None).update(images, 0, edges)["similarity"].shape == (6, 11)


def test_model_and_random_numbers_are_left_alone(model: nn.Module, images: Tensor) -> None:
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    for metric in (ParameterRandomisation(model), RandomLogit(model)):
        metric.update(images, None, input_x_gradient)
    assert changed(before, model.state_dict()) == set()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


def test_results_do_not_depend_on_batches(model: nn.Module, images: Tensor) -> None:
    def pair(batch_size: int | None) -> tuple[Metric, Metric]:
        return (
            RandomLogit(model, batch_size=batch_size),
            ParameterRandomisation(model, stages=2, batch_size=batch_size),
        )

    for number, whole in enumerate(pair(None)):
        whole.update(images, None, input_x_gradient)
        for batch_size, sizes in ((1, [6]), (4, [1, 3, 2])):
            pieces = pair(batch_size)[number]
            for part in images.split(sizes):
                pieces.update(part, None, input_x_gradient)
            for name, expected in whole.compute().values.items():
                torch.testing.assert_close(pieces.compute().values[name], expected, rtol=1e-9, atol=1e-12)


def test_an_engine_explains_the_copy() -> None:
    torch.manual_seed(4)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, CLASSES)).eval()
    images = torch.randn(3, 3, 8, 8)
    engine = Engine(model)

    def method(model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
        return Engine(model).attribute(images, target).maps

    expected = ParameterRandomisation(model, stages=1).update(images, None, method)
    found = ParameterRandomisation(model, stages=1).update(images, None, engine)
    torch.testing.assert_close(found["similarity"], expected["similarity"])
    assert (found["similarity"][:, -1] < 0.9).all()
    assert engine.model is model


def test_stages_without_a_value_do_not_count(model: nn.Module, images: Tensor) -> None:
    first = copy.deepcopy(model.state_dict())["first.weight"]

    def dies(model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
        alive = torch.equal(model.get_parameter("first.weight"), first)
        return input_x_gradient(model, images, target) * alive

    found = ParameterRandomisation(model, stages=None).update(images, None, dies)
    assert found["similarity"].isnan().any(0).tolist() == [False, False, False, True, True]
    torch.testing.assert_close(found["parameter_randomisation"], found["similarity"][:, :3].mean(1))


class Locked(nn.Linear):
    """Cannot be copied."""

    def __deepcopy__(self, memo: object) -> nn.Module:
        raise RuntimeError("no copies")


def test_what_does_not_fit(model: nn.Module, images: Tensor) -> None:
    single = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, 1)).double().eval()
    locked = nn.Sequential(nn.Flatten(), Locked(3 * SIZE * SIZE, 2)).double().eval()
    pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    small = images[..., :6]
    for call, problem in (
        (lambda: RandomLogit(model, "cosine"), "random_logit: similarity must be one of 'ssim', .* got 'cosine'"),
        (lambda: RandomLogit(model, sign="none"), "random_logit: sign must be one of"),  # type: ignore[arg-type]
        (lambda: RandomLogit(single).update(images, 0, input_x_gradient), "random_logit: the model has a single class"),
        (lambda: RandomLogit(pooled).update(small, 0, edges), "random_logit: similarity 'ssim' needs .* 16 x 6"),
        (lambda: RandomLogit(model).update(images, 0, None, maps=images), "asks the method for maps"),
        (lambda: ParameterRandomisation(model, stages=0), "parameter_randomisation: stages must be .* got 0"),
        (lambda: ParameterRandomisation(pooled), "parameter_randomisation: the model has no parameters"),
        (
            lambda: ParameterRandomisation(locked).update(images, 0, input_x_gradient),
            "parameter_randomisation: the model cannot be copied .RuntimeError: no copies",
        ),
    ):
        with pytest.raises(InputError, match=problem):
            call()
    saved = ParameterRandomisation(model, stages=2)
    saved.update(images, 0, edges)
    for other in (
        ParameterRandomisation(model, stages=3),
        ParameterRandomisation(model, "pearson", stages=2),
        ParameterRandomisation(model, stages=2, sign="signed"),
    ):
        with pytest.raises(InputError, match="does not fit"):
            other.merge_state(saved.state_dict())
