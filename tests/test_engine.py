"""The engine's contract: arguments, errors, independence of the batch, and what it notices."""

from __future__ import annotations

import copy
import itertools
import math
import multiprocessing
import os
import pickle
import types
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_models import CLASSES, FAMILIES, SIZE, images, resnet, vgg, vit
from torch import Tensor, nn

from ramp_fast import Attribution, Engine, InputError, UnsupportedModelError
from ramp_fast.plan import Plan
from ramp_fast.rules import AbsLRP, RelativeStabilizer
from ramp_fast.runtime import groups, run, targets

# Relative to the largest entry of a map. Batching changes the order of sums in matrix products and nothing else.
MICRO_BATCH = {
    "float64": 1e-9,  # 1e-16, magnified by the division by the smallest logit and by the contrast
    "float32": 2e-3,  # 6e-8, likewise
}


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(vit(), precision="float32")


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Engine:
    return Engine(FAMILIES[request.param](), precision="mixed")


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


# Targets


def test_default_target_is_the_predicted_class(engine: Engine) -> None:
    a = engine.attribute(images())
    assert a.maps.shape == (3, 3, SIZE, SIZE)
    assert a.target.shape == (3,)
    assert a.target.dtype == torch.long
    assert a.logits.shape == (3, CLASSES)
    assert torch.equal(a.target, a.logits.argmax(1))
    with torch.no_grad():
        torch.testing.assert_close(a.logits, engine.model(images()), rtol=1e-4, atol=1e-5)
    assert torch.equal(a.maps, engine.attribute(images(), a.target).maps)


def test_one_class_for_all(engine: Engine) -> None:
    a = engine.attribute(images(), 4)
    assert a.target.tolist() == [4, 4, 4]
    assert torch.equal(a.maps, engine.attribute(images(), torch.tensor([4, 4, 4])).maps)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int64])
def test_integer_dtypes_of_targets(engine: Engine, dtype: torch.dtype) -> None:
    a = engine.attribute(images(), torch.tensor([1, 2, 3], dtype=dtype))
    assert a.target.tolist() == [1, 2, 3]
    assert a.target.dtype == torch.long


@pytest.mark.parametrize("contrast", ["others", "none"])
def test_k_targets_equal_k_runs(engine: Engine, contrast: str) -> None:
    target = torch.tensor([[0, 5], [3, 3], [9, 1]])
    a = engine.attribute(images(), target, contrast)
    assert a.maps.shape == (3, 2, 3, SIZE, SIZE)
    assert torch.equal(a.target, target)
    for k in range(2):
        single = engine.attribute(images(), target[:, k], contrast)
        torch.testing.assert_close(a.maps[:, k], single.maps, rtol=0, atol=1e-4)
    assert relative(a.maps[0, 0], a.maps[0, 1]) > 0.1


def test_one_target_in_two_dimensions(engine: Engine) -> None:
    target = torch.tensor([[1], [2], [3]])
    a = engine.attribute(images(), target)
    assert a.maps.shape == (3, 1, 3, SIZE, SIZE)
    assert torch.equal(a.maps[:, 0], engine.attribute(images(), target[:, 0]).maps)


def test_seed(engine: Engine) -> None:
    seed = F.one_hot(torch.tensor([1, 2, 3]), CLASSES).float()
    a = engine.attribute(images(), seed, contrast="none")
    assert torch.equal(a.target, seed)
    assert torch.equal(a.maps, engine.attribute(images(), torch.tensor([1, 2, 3]), contrast="none").maps)


def test_seeds_keep_their_mass(engine: Engine) -> None:
    seed = torch.randn(3, CLASSES, generator=torch.Generator().manual_seed(0))
    maps = {n: engine.attribute(images(), seed, "none", n).maps for n in ("none", "sum")}
    size = seed.abs().sum(1).view(-1, 1, 1, 1)
    torch.testing.assert_close(maps["none"], size * maps["sum"], rtol=1e-5, atol=1e-7)
    assert torch.equal(engine.attribute(images(), 4 * seed, "none", "none").maps, 4 * maps["none"])
    assert torch.equal(engine.attribute(images(), 4 * seed, "none", "sum").maps, maps["sum"])
    assert not engine.attribute(images(), 0 * seed, "none", "none").maps.any()


def test_seeds_computed_from_logits(engine: Engine) -> None:
    def margin(logits: Tensor) -> Tensor:
        logits.sub_(logits.logsumexp(1, keepdim=True))  # which are the caller's own to write to
        return F.one_hot(logits.argmax(1), CLASSES) - logits.exp()

    logits = engine.logits(images())
    seed = F.one_hot(logits.argmax(1), CLASSES) - logits.softmax(1)
    a = engine.attribute(images(), margin, "none", "none")
    b = engine.attribute(images(), a.target, "none", "none")
    torch.testing.assert_close(a.target, seed)
    assert torch.equal(a.maps, b.maps)
    assert torch.equal(a.logits, logits)
    assert torch.equal(engine.attribute(images(), margin, "none", "none", batch_size=2).maps, a.maps)
    with pytest.raises(InputError, match="contrast"):
        engine.attribute(images(), margin)
    with pytest.raises(InputError, match=r"must return a floating-point seed \[\d, 10\].*int64 \[\d\]"):
        engine.attribute(images(), lambda logits: logits.argmax(1), "none")
    maps = engine.attribute(images(), lambda logits: logits / 0, "none").maps
    assert maps.isnan().all()


def test_contrast_is_the_difference_of_two_normalised_maps() -> None:
    engine = Engine(vit(), precision="float64")
    target = torch.tensor([1, 2, 3])
    onehot = F.one_hot(target, CLASSES).double()
    pair = [engine.attribute(images(), s, "none", "sum").maps for s in (onehot, (1 - onehot) / (CLASSES - 1))]
    maps = engine.attribute(images(), target, "others", "none").maps
    torch.testing.assert_close(maps, pair[0] - pair[1], rtol=0, atol=1e-12)


# Normalisation and dtypes


def test_normalize(engine: Engine) -> None:
    largest = engine.attribute(images(), 0, normalize="max").maps
    torch.testing.assert_close(largest.abs().flatten(1).amax(1), torch.ones(3), rtol=0, atol=1e-6)
    total = engine.attribute(images(), 0, normalize="sum").maps
    torch.testing.assert_close(total.abs().flatten(1).sum(1), torch.ones(3), rtol=0, atol=1e-5)
    plain = engine.attribute(images(), 0, contrast="none", normalize="none").maps
    torch.testing.assert_close(plain.abs().flatten(1).sum(1), torch.ones(3), rtol=0, atol=1e-5)
    difference = engine.attribute(images(), 0, normalize="none").maps
    assert bool((difference.abs().flatten(1).sum(1) <= 2).all())
    for one in (total, difference):
        torch.testing.assert_close(one / one.abs().flatten(1).amax(1).view(-1, 1, 1, 1), largest, rtol=0, atol=1e-5)


def test_normalize_per_target(engine: Engine) -> None:
    maps = engine.attribute(images(), torch.tensor([[0, 5]] * 3), normalize="max").maps
    torch.testing.assert_close(maps.abs().flatten(2).amax(2), torch.ones(3, 2), rtol=0, atol=1e-6)


@pytest.mark.parametrize("precision", ["float64", "float32", "mixed"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(precision: str, dtype: torch.dtype) -> None:
    a = Engine(vgg(), precision=precision).attribute(images().to(dtype), 1)
    expected = torch.float64 if precision == "float64" else torch.float32
    assert a.maps.dtype == a.logits.dtype == expected
    assert bool(a.maps.isfinite().all())
    exact = Engine(vgg(), precision="float64").attribute(images().to(dtype).double(), 1).maps
    assert relative(a.maps.double(), exact) < 0.1


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_models_in_other_dtypes(dtype: torch.dtype) -> None:
    """The engine's precision decides, not the model's dtype."""
    model = vit().to(dtype)
    a = Engine(model, precision="float32").attribute(images(), 1).maps
    b = Engine(copy.deepcopy(model).float(), precision="float32").attribute(images(), 1).maps
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_precisions_agree() -> None:
    target = torch.tensor([1, 2, 3])
    exact = Engine(vit(), precision="float64").attribute(images(), target).maps
    for precision, bound in (("float32", 1e-3), ("mixed", 5e-2)):
        assert relative(Engine(vit(), precision=precision).attribute(images(), target).maps.double(), exact) < bound
    rule = AbsLRP(stabilizer=RelativeStabilizer(0.1))
    exact = Engine(vit(), rule=rule, precision="float64").attribute(images(), target).maps
    assert relative(Engine(vit(), rule=rule, precision="fast").attribute(images(), target).maps.double(), exact) < 0.3


def test_stabilizer_shrinks_small_logits() -> None:
    seed = torch.rand(3, CLASSES)
    maps = [
        Engine(vit(), rule=AbsLRP(stabilizer=s), precision="float64").attribute(images(), seed, "none").maps
        for s in (1e-9, 1e-12, RelativeStabilizer(0.1))
    ]
    assert relative(maps[0], maps[1]) < 1e-6
    assert relative(maps[0], maps[2]) > 1e-3


def test_images_that_are_not_contiguous(engine: Engine) -> None:
    x = images()
    expected = engine.attribute(x, 0).maps
    assert torch.equal(engine.attribute(x.contiguous(memory_format=torch.channels_last), 0).maps, expected)
    assert torch.equal(engine.attribute(x.flip(3).flip(3)[:, :], 0).maps, expected)
    wide = torch.zeros(3, 3, SIZE, 2 * SIZE)
    wide[..., ::2] = x
    assert torch.equal(engine.attribute(wide[..., ::2], 0).maps, expected)


def test_images_that_require_grad(engine: Engine) -> None:
    x = images().requires_grad_()
    a = engine.attribute(x, 0)
    assert not a.maps.requires_grad
    assert x.grad is None


def test_under_the_users_autocast_and_inference_mode(family: Engine) -> None:
    expected = family.attribute(images(), 0).maps
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(family.attribute(images(), 0).maps, expected)
    with torch.inference_mode():
        own = images()
        found = family.attribute(own, 0)
        assert torch.equal(found.maps, expected)
        assert torch.equal(family.logits(own), found.logits)
        made_here = Engine(copy.deepcopy(family.model), input_shape=(3, SIZE, SIZE))
        assert torch.equal(made_here.attribute(own, 0).maps, expected)
    assert torch.equal(family.attribute(own, 0).maps, expected)
    found.maps.mul_(2)  # ordinary tensors


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_in_a_forked_process(family: Engine) -> None:
    """Autograd's engine does not run in a child of a process that has used it."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)  # as the workers of a DataLoader have; OpenMP's threads do not survive a fork
    try:
        expected = family.attribute(images(), 0)
        torch.ones(1, requires_grad=True).sum().backward()
        context = multiprocessing.get_context("fork")
        queue = context.Queue()

        def child() -> None:
            a = family.attribute(images(), 0)
            queue.put(torch.equal(a.maps, expected.maps) and torch.equal(a.logits, expected.logits))

        process = context.Process(target=child)
        process.start()
        process.join(60)
        assert process.exitcode == 0
        assert queue.get(timeout=10)
    finally:
        torch.set_num_threads(count)


def test_several_image_sizes() -> None:
    engine = Engine(resnet(), precision="float32")
    small = engine.attribute(images(), 0).maps
    assert engine.attribute(images(2, size=24), 0).maps.shape == (2, 3, 24, 24)
    assert torch.equal(engine.attribute(images(), 0).maps, small)


def test_plan_prints() -> None:
    engine = Engine(vgg())
    with pytest.raises(RuntimeError, match="input_shape"):
        _ = engine.plan
    engine = Engine(vgg(), input_shape=(3, SIZE, SIZE))
    text = str(engine.plan)
    for word in ("conv", "max_pool", "linear", "activation", "kept/image", "precision mixed", "batchx"):
        assert word in text


# The batch


@pytest.mark.parametrize("contrast", ["others", "none"])
def test_batch_and_order_invariance(family: Engine, contrast: str) -> None:
    x, target = images(4), torch.tensor([0, 3, 3, 9])
    whole = family.attribute(x, target, contrast)
    for i in range(4):
        one = family.attribute(x[i : i + 1], target[i : i + 1], contrast)
        assert torch.equal(one.maps[0], whole.maps[i])
        assert torch.equal(one.logits[0], whole.logits[i])
    order = torch.tensor([3, 0, 2, 1])
    shuffled = family.attribute(x[order], target[order], contrast)
    assert torch.equal(shuffled.maps, whole.maps[order])
    for size in (2, 100):
        assert torch.equal(family.attribute(x, target, contrast, batch_size=size).maps, whole.maps)


def test_determinism(family: Engine) -> None:
    first = family.attribute(images(), 3)
    family.attribute(images(2, seed=7), 1)  # nothing of it stays behind
    again = family.attribute(images(), 3)
    assert torch.equal(first.maps, again.maps)
    other = Engine(copy.deepcopy(family.model), precision="mixed").attribute(images(), 3)
    assert torch.equal(first.maps, other.maps)


@pytest.mark.parametrize("precision", ["float64", "float32"])
@pytest.mark.parametrize("name", FAMILIES)
def test_micro_batch(name: str, precision: str) -> None:
    one = Engine(FAMILIES[name](), precision=precision).attribute(images(4), torch.tensor([0, 1, 2, 3]))
    engine = Engine(FAMILIES[name](), precision=precision, micro_batch=3)
    together = engine.attribute(images(4), torch.tensor([0, 1, 2, 3]))
    assert relative(together.maps, one.maps) < MICRO_BATCH[precision]
    several = engine.attribute(images(4), torch.tensor([[0, 5], [1, 6], [2, 7], [3, 8]]))
    assert relative(several.maps[:, 0], one.maps) < MICRO_BATCH[precision]


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of what goes through the engine's plans; every trial of groups finds them faster."""
    sizes: list[int] = []

    def watched(plan: Plan, batch: Tensor, *, keep_all: bool = False) -> run.Forward:
        sizes.append(batch.shape[0])
        return run.run_forward(plan, batch, keep_all=keep_all)

    readings = itertools.cycle([0.0, 1.0, 3.0])  # before the group, after it, after the images alone
    monkeypatch.setattr(groups, "time", types.SimpleNamespace(perf_counter=lambda: next(readings)))
    monkeypatch.setattr(targets, "run_forward", watched)
    return sizes


@pytest.mark.parametrize("name", FAMILIES)
def test_groups_change_no_bit(name: str, batches: list[int]) -> None:
    one = Engine(FAMILIES[name](), precision="mixed", micro_batch=1).attribute(images(7), 3)
    four = Engine(FAMILIES[name](), precision="mixed", micro_batch=4).attribute(images(7), 3)
    same = torch.equal(four.maps, one.maps) and torch.equal(four.logits, one.logits)  # up to the processor's library
    engine = Engine(FAMILIES[name](), precision="mixed")
    for grouped in (False, False, same):  # the trial comes with the third call
        expected = [4, 1, 1, 1] if grouped else [1] * 7
        batches.clear()
        again = engine.attribute(images(7), 3)
        assert batches == expected
        assert torch.equal(again.maps, one.maps)
        assert torch.equal(again.logits, one.logits)


@pytest.mark.parametrize("where", ["maps", "logits"])
def test_images_go_one_by_one_where_groups_would_change_a_bit(
    where: str, batches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def grown(found: Tensor, batch: Tensor) -> Tensor:
        return found * (1 + 1e-6 * (batch.shape[0] > 1))

    def forward(plan: Plan, batch: Tensor) -> run.Forward:
        found = run.run_forward(plan, batch)
        if where == "logits":
            found.logits = grown(found.logits, batch)
        return found

    def pull_back(plan: Plan, found: run.Forward, c: Tensor, contrast: bool) -> Tensor:
        maps = run.pull_back(plan, found, c, contrast)
        return grown(maps, found.images) if where == "maps" else maps

    monkeypatch.setattr(groups, "run_forward", forward)
    monkeypatch.setattr(groups, "pull_back", pull_back)
    engine = Engine(FAMILIES["vit"](), precision="mixed")
    for _ in range(3):
        engine.attribute(images(8), 3)
    assert batches == [1] * 24


@pytest.mark.parametrize("micro_batch", [None, 3])
def test_logits_are_those_of_attributions(family: Engine, micro_batch: int | None) -> None:
    engine = Engine(family.model, precision="mixed", micro_batch=micro_batch)
    x = images(7)
    expected = engine.attribute(x, 3).logits
    for _ in range(4):  # with a trial of groups among them
        assert torch.equal(engine.logits(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(expected, engine.model(x), rtol=1e-4, atol=1e-5)
    assert engine.logits(x[:0]).shape == (0, CLASSES)
    assert torch.equal(engine.attribute(x, 3).logits, expected)
    with pytest.raises(InputError, match=r"images must be \[B, C, H, W\]"):
        engine.logits(x[0])
    with pytest.raises(InputError, match="not finite"):
        engine.logits(x * float("nan"))


def test_logits_alone_keep_nothing(family: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[set[Any]] = []

    class Watched(run.Values):
        def __setitem__(self, node: Any, value: Any) -> None:
            super().__setitem__(node, value)
            alive.append(set(self._values))

    monkeypatch.setattr(run, "Values", Watched)
    family.logits(images(1))
    plan = family.plan
    assert len(alive) == len(plan.steps) + 1
    for i, step in enumerate(plan.steps):
        read_later = {node for later in plan.steps[i:] for node in later.node.references()}
        kept = {node for node in alive[i + 1] if not node.constant}
        assert kept <= read_later | {plan.graph.input, step.node}


def test_copies_of_engines(engine: Engine) -> None:
    first = Engine(engine.model, AbsLRP(shares="equal"), "float32", micro_batch=2)
    expected = first.attribute(images(), 3).maps
    for other in (copy.deepcopy(first), pickle.loads(pickle.dumps(first))):
        assert other.model is not first.model
        assert (other.rule, other.precision, other.micro_batch) == (first.rule, "float32", 2)
        assert torch.equal(other.attribute(images(), 3).maps, expected)


def test_images_go_one_by_one_where_groups_are_slower(batches: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    readings = itertools.cycle([0.0, 2.0, 3.0])
    monkeypatch.setattr(groups, "time", types.SimpleNamespace(perf_counter=lambda: next(readings)))
    engine = Engine(FAMILIES["vit"](), precision="mixed")
    for _ in range(3):
        engine.attribute(images(8), 3)
    assert batches == [1] * 24


def test_values_that_nobody_looked_at_give_nan(family: Engine) -> None:
    batch = images(3)
    right = family.attribute(batch, torch.tensor([[1, 2], [3, 4], [5, 6]]))
    assert right.maps.isfinite().all()
    wrong = batch.clone()
    wrong[1, 2, 3, 4] = float("inf")
    target = torch.tensor([[1, 2], [3, 4], [5, CLASSES]])
    maps = family.attribute(wrong, target, check=False).maps
    assert torch.equal(maps[0], right.maps[0])
    assert torch.equal(maps[2, 0], right.maps[2, 0])
    assert maps[1].isnan().all()
    assert maps[2, 1].isnan().all()
    seed = torch.ones(3, CLASSES)
    seed[2, 1] = float("nan")
    maps = family.attribute(batch, seed, "none", check=False).maps
    assert maps[:2].isfinite().all()
    assert maps[2].isnan().all()


def test_no_images(family: Engine) -> None:
    for target, shape in ((None, (0, 3, SIZE, SIZE)), (torch.empty(0, 4).long(), (0, 4, 3, SIZE, SIZE))):
        a = family.attribute(images()[:0], target)
        assert a.maps.shape == shape
        assert a.logits.shape == (0, CLASSES)
    assert family.attribute(images()[:0], torch.empty(0, CLASSES), "none").maps.shape == (0, 3, SIZE, SIZE)


# Zeros


def zeroed(model: nn.Module, name: str) -> nn.Module:
    with torch.no_grad():
        for key, value in model.named_parameters():
            if name in key:
                value.zero_()
    return model


# The first layer and the head of every family, by name.
ENDS = {"vit": ("patch_embed", "head"), "resnet": ("conv1", "fc"), "vgg": ("0.", "4.")}


@pytest.mark.parametrize("dead", ["", "first", "head", "all"])
@pytest.mark.parametrize("name", FAMILIES)
def test_zeros_give_no_nan(name: str, dead: str) -> None:
    model = FAMILIES[name]()
    if dead:
        zeroed(model, {"first": ENDS[name][0], "head": ENDS[name][1], "all": ""}[dead])
    x = images(3)
    x[0] = 0
    x[1, :, :8] = 0
    equal = AbsLRP(stabilizer=0.0, shares="equal")
    for rule, precision, contrasts in (("abslrp", "mixed", ("others", "none")), (equal, "float64", ("others",))):
        engine = Engine(model, rule=rule, precision=precision)
        for contrast in contrasts:
            maps = engine.attribute(x, 1, contrast).maps
            assert bool(maps.isfinite().all())
            assert not maps[x == 0].any()
            assert bool(maps[2].any()) == (dead == "")


def test_a_zero_image_leaves_the_others_alone(family: Engine) -> None:
    x = images(3)
    expected = family.attribute(x, 1).maps
    x[1] = 0
    maps = family.attribute(x, 1).maps
    assert torch.equal(maps[[0, 2]], expected[[0, 2]])
    assert not maps[1].any()


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e4, 1e15])
def test_extreme_images(scale: float) -> None:
    maps = Engine(vit()).attribute(images() * scale, 1).maps
    assert bool(maps.isfinite().all())


def test_extreme_logits() -> None:
    model = vgg()
    with torch.no_grad():
        model[4].weight.mul_(1e-18)
        model[4].bias.mul_(1e-18)
    maps = Engine(model, rule=AbsLRP(stabilizer=0.0)).attribute(images(), 1).maps
    assert bool(maps.isfinite().all())
    assert bool((maps.abs().flatten(1).amax(1) == 1).all())


# Weights that change


def changed_weights(model: nn.Module) -> None:
    with torch.no_grad():
        model[0].weight.mul_(-1.5)


def loaded(model: nn.Module) -> None:
    torch.manual_seed(11)
    model.load_state_dict({k: torch.randn_like(v) for k, v in model.state_dict().items()})


def replaced_module(model: nn.Module) -> None:
    torch.manual_seed(12)
    model[4] = nn.Linear(4 * 64, CLASSES).eval()


def replaced_activation(model: nn.Module) -> None:
    model[1] = nn.Tanh().eval()


def replaced_data(model: nn.Module) -> None:
    model[0].weight.data = model[0].weight.data * -2


def changed_dtype(model: nn.Module) -> None:
    changed_weights(model)
    model.double()


def trained(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(images()).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize(
    "change",
    [changed_weights, loaded, replaced_module, replaced_activation, replaced_data, changed_dtype, trained],
    ids=lambda f: f.__name__,
)
def test_changes_of_the_model_are_noticed(change: Callable[[nn.Module], None]) -> None:
    model = vgg()
    engine = Engine(model, precision="float32")
    before = engine.attribute(images(), 1)
    engine.attribute(images(1, size=SIZE), 1)
    change(model)
    after = engine.attribute(images(), 1)
    fresh = Engine(copy.deepcopy(model), precision="float32").attribute(images(), 1)
    assert torch.equal(after.maps, fresh.maps)
    assert torch.equal(after.logits, fresh.logits)
    assert not torch.equal(after.maps, before.maps)


def test_changed_buffers_are_noticed() -> None:
    model = resnet()
    engine = Engine(model, precision="float32")
    before = engine.attribute(images(), 1).maps
    model.bn1.running_var.mul_(3)
    model.bn1.running_mean.add_(0.3)
    after = engine.attribute(images(), 1).maps
    assert not torch.equal(after, before)
    assert torch.equal(after, Engine(copy.deepcopy(model), precision="float32").attribute(images(), 1).maps)


def test_changes_are_noticed_for_every_size() -> None:
    model = resnet()
    engine = Engine(model, precision="float32")
    for size in (16, 24):
        engine.attribute(images(1, size=size), 1)
    with torch.no_grad():
        model.fc.weight.mul_(-1)
    for size in (16, 24):
        fresh = Engine(copy.deepcopy(model), precision="float32").attribute(images(1, size=size), 1)
        assert torch.equal(engine.attribute(images(1, size=size), 1).maps, fresh.maps)


# The model's own NaN


def nan_in_weights(norms: list[nn.Module], convs: list[nn.Module]) -> None:
    convs[0].weight.view(-1)[0] = float("nan")


def nan_in_statistics(norms: list[nn.Module], convs: list[nn.Module]) -> None:
    norms[0].running_mean[0] = float("nan")


def negative_variance(norms: list[nn.Module], convs: list[nn.Module]) -> None:
    norms[1].running_var[0] = -1.0


def overflow(norms: list[nn.Module], convs: list[nn.Module]) -> None:
    for conv in convs:
        conv.weight.mul_(1e30)


def late_overflow(norms: list[nn.Module], convs: list[nn.Module]) -> None:
    """Large, but finite, up to a layer whose positive and negative products are both infinite."""
    convs[0].weight.mul_(1e20)
    convs[-1].weight.mul_(1e25)


@pytest.mark.parametrize("rule", ["abslrp", "epsilon-plus-flat"])
@pytest.mark.parametrize("precision", ["mixed", "float32"])
@pytest.mark.parametrize("change", [nan_in_weights, nan_in_statistics, negative_variance, overflow, late_overflow])
def test_nan_of_the_model_is_shown(change: Callable[..., None], precision: str, rule: str) -> None:
    model = resnet()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    with torch.no_grad():
        change(norms, convs)
        expected = model(images())
    assert not expected.isfinite().any()
    engine = Engine(model, rule, precision)
    a = engine.attribute(images(), 1)
    assert not a.logits.isfinite().any()
    assert not engine.logits(images()).isfinite().any()
    assert a.maps.isnan().all()


def test_one_overflowing_image_leaves_the_others_alone(family: Engine) -> None:
    batch = images(3)
    expected = family.attribute(batch, torch.tensor([1, 2, 3]))
    batch[1] = batch[1].sign() * 3e38
    a = family.attribute(batch, torch.tensor([1, 2, 3]))
    assert torch.equal(a.maps[[0, 2]], expected.maps[[0, 2]])
    with torch.no_grad():
        own = family.model(batch)
    assert torch.equal(a.logits.isfinite(), own.isfinite())
    assert bool(a.maps[1].isnan().all()) == (not own[1].isfinite().all())


class LeavesOut(nn.Module):
    """Classes that are left out have a logit of minus infinity."""

    def __init__(self) -> None:
        super().__init__()
        self.body = vgg()
        self.register_buffer("out", torch.arange(CLASSES) % 3 == 0)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).masked_fill(self.out, float("-inf"))


def test_classes_that_are_left_out() -> None:
    engine = Engine(LeavesOut().eval(), precision="float32")
    maps = engine.attribute(images(), torch.tensor([[1, 0, 2]] * 3)).maps
    assert maps[:, [0, 2]].isfinite().all()
    assert maps[:, [0, 2]].flatten(2).any(2).all()
    assert maps[:, 1].isnan().all()


# Kinds of models


class Tiles(nn.Module):
    """Four tiles of every image go through a network side by side in the batch, and are averaged."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        tiles = x.unfold(2, half, half).unfold(3, half, half).permute(0, 2, 3, 1, 4, 5).reshape(-1, 3, half, half)
        return self.network(tiles).view(x.shape[0], 4, -1).mean(1)


@pytest.mark.parametrize("name", ["resnet", "vgg"])
def test_tiles_of_an_image_in_the_batch(name: str) -> None:
    model = Tiles(FAMILIES[name]()).eval()
    rule = AbsLRP(stabilizer=RelativeStabilizer(0.1))
    exact = Engine(model, rule, "float64").attribute(images(size=2 * SIZE), 0, normalize="sum").maps
    for precision, allowed in (("float32", 1e-5), ("mixed", 3e-2)):
        maps = Engine(model, rule, precision).attribute(images(size=2 * SIZE), 0, normalize="sum").maps
        assert float((maps - exact).norm() / exact.norm()) < allowed


class BatchSecond(nn.Module):
    """Tokens first, batch second, as nn.MultiheadAttention has it by default."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 12, 4, stride=4)
        self.norm = nn.LayerNorm(12)
        self.attention = nn.MultiheadAttention(12, 3)
        self.head = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        t = self.embed(x).flatten(2).permute(2, 0, 1)
        y = self.norm(t)
        t = t + self.attention(y, y, y, need_weights=False)[0]
        return self.head(t.mean(0))


class BatchFirst(BatchSecond):
    def __init__(self) -> None:
        super().__init__()
        self.attention.batch_first = True

    def forward(self, x: Tensor) -> Tensor:
        t = self.embed(x).flatten(2).transpose(1, 2)
        y = self.norm(t)
        t = t + self.attention(y, y, y, need_weights=False)[0]
        return self.head(t.mean(1))


def test_batch_in_the_second_axis() -> None:
    torch.manual_seed(0)
    second = BatchSecond().eval()
    first = BatchFirst().eval()
    first.load_state_dict(second.state_dict())
    expected = Engine(first, precision="float64").attribute(images(), 1)
    for micro_batch in (1, 3):
        got = Engine(second, precision="float64", micro_batch=micro_batch).attribute(images(), 1)
        torch.testing.assert_close(got.maps, expected.maps, rtol=0, atol=1e-9)
        torch.testing.assert_close(got.logits, expected.logits, rtol=0, atol=1e-12)


class InPlace(nn.Module):
    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.inplace = inplace
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4 * SIZE * SIZE, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        if self.inplace:
            F.relu_(y)
            z = self.second(y)
            z += y
            z[:, :2].mul_(0.5)
            z.relu_()
            return self.head(z.flatten(1))
        y = F.relu(y)
        z = self.second(y) + y
        z = torch.cat([z[:, :2] * 0.5, z[:, 2:]], 1)
        return self.head(F.relu(z).flatten(1))


def test_operations_in_place() -> None:
    torch.manual_seed(0)
    plain, inplace = InPlace(False).eval(), InPlace(True).eval()
    inplace.load_state_dict(plain.state_dict())
    x = images()
    kept = x.clone()
    got = Engine(inplace, precision="float64").attribute(x, 1)
    expected = Engine(plain, precision="float64").attribute(x, 1)
    torch.testing.assert_close(got.maps, expected.maps, rtol=0, atol=1e-9)
    assert torch.equal(x, kept)


def test_images_are_not_written_to() -> None:
    """A model whose first operation is in place."""
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(3 * SIZE * SIZE, CLASSES)).eval()
    for precision in ("float32", "float64"):
        x = images().to(torch.float64 if precision == "float64" else torch.float32)
        kept = x.clone()
        Engine(model, precision=precision).attribute(x, 1)
        assert torch.equal(x, kept)


def test_threads_share_an_engine() -> None:
    engine = Engine(vit(), precision="mixed")
    batches = [images(2, seed=s) for s in range(6)]
    expected = [engine.attribute(x, 1).maps for x in batches]
    fresh = Engine(vit(), precision="mixed")  # captured by whichever thread comes first
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda x: fresh.attribute(x, 1).maps, batches * 2))
    for got, want in zip(results, expected * 2, strict=True):
        assert torch.equal(got, want)


# Errors: every message names what was found


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"images": torch.zeros(3, 16, 16)}, r"\[B, C, H, W\].*\[3, 16, 16\]"),
        ({"images": [[1.0]]}, "list"),
        ({"images": torch.zeros(1, 3, 16, 16, dtype=torch.uint8)}, "uint8"),
        ({"images": torch.full((1, 3, 16, 16), float("nan"))}, "not finite"),
        ({"images": torch.full((1, 3, 16, 16), float("inf"))}, "not finite"),
        ({"images": torch.zeros(1, 1, 16, 16)}, r"\[1, 16, 16\]"),
        ({"images": torch.zeros(1, 3, 24, 24)}, r"\[3, 24, 24\]"),
        ({"images": torch.zeros(1, 3, 0, 0)}, r"\[3, 0, 0\]"),
        ({"target": 10}, "between 0 and 9, got 10"),
        ({"target": -1}, "between 0 and 9, got -1"),
        ({"target": torch.tensor([0, 1, 12])}, "got 0 to 12"),
        ({"target": torch.tensor([0, 1])}, r"\[3\] or \[3, K\], got \[2\]"),
        ({"target": torch.zeros(3, 0, dtype=torch.long)}, r"\[3, 0\]"),
        ({"target": torch.zeros(3, 1, 1, dtype=torch.long)}, r"\[3, 1, 1\]"),
        ({"target": torch.tensor([True, False, True])}, "torch.bool"),
        ({"target": True}, "bool"),
        ({"target": 1.5}, "float"),
        ({"target": "cat"}, "str"),
        ({"target": torch.zeros(3, dtype=torch.complex64)}, "complex64"),
        ({"target": torch.rand(3, CLASSES)}, 'contrast="none"'),
        ({"target": torch.rand(3, 4), "contrast": "none"}, r"\[3, 10\].*\[3, 4\]"),
        ({"target": torch.full((3, CLASSES), float("nan")), "contrast": "none"}, "not finite"),
        ({"contrast": "all"}, "'others', 'none'; got 'all'"),
        ({"normalize": "l2"}, "'max', 'sum', 'none'; got 'l2'"),
        ({"batch_size": 0}, "batch_size.*0"),
        ({"batch_size": 2.0}, "batch_size.*2.0"),
        ({"batch_size": True}, "batch_size.*True"),
        ({"check": "no"}, "check.*'no'"),
        ({"contrast": torch.ones(2)}, "tensor"),
        ({"target": 2**70}, f"between 0 and 9, got {2**70}"),
        ({"target": 2**70, "check": False}, f"between 0 and 9, got {2**70}"),
        ({"target": torch.tensor([1, 2, 2**63], dtype=torch.uint64)}, "between 0 and 9"),
        ({"target": torch.zeros(3, dtype=torch.long, device="meta")}, "target must be an ordinary.*meta"),
        ({"target": torch.zeros(3, dtype=torch.long).to_sparse()}, "target must be an ordinary.*sparse_coo"),
        ({"target": torch.rand(3, CLASSES).to(torch.float8_e5m2), "contrast": "none"}, "float8"),
        ({"images": torch.zeros(3, 3, SIZE, SIZE, device="meta")}, "images must be an ordinary.*meta"),
        ({"images": torch.zeros(3, 3, SIZE, SIZE).to_sparse()}, "images must be an ordinary.*sparse_coo"),
        ({"images": torch.zeros(1, 3, SIZE, SIZE).to(torch.float8_e4m3fn)}, "float8"),
    ],
)
def test_wrong_arguments(engine: Engine, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        engine.attribute(**{"images": images(), **arguments})
    assert bool(engine.attribute(images(1), 0).maps.any())  # the engine is still usable


@pytest.mark.filterwarnings("ignore::UserWarning")  # PyTorch's, of both kinds
def test_images_that_are_no_array(engine: Engine) -> None:
    x = images()
    with pytest.raises(InputError, match=r"images must be an ordinary.*nested"):
        engine.attribute(torch.nested.nested_tensor(list(x)))
    with pytest.raises(InputError, match=r"images must be an ordinary.*quantised"):
        engine.attribute(torch.quantize_per_tensor(x, 1, 0, torch.qint8))


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"model": "resnet50"}, TypeError, "str"),
        ({"rule": "lrp"}, ValueError, "'lrp'.*abslrp, abslrp-release"),
        ({"rule": 3}, TypeError, "int"),
        ({"precision": "bf16"}, ValueError, "'mixed', 'fast'; got 'bf16'"),
        ({"precision": "fast"}, ValueError, "near-zero logits.*1e-09"),
        ({"precision": "fast", "rule": AbsLRP(stabilizer=0.5)}, ValueError, "0.5"),
        ({"precision": "fast", "rule": AbsLRP(stabilizer=RelativeStabilizer(0.01))}, ValueError, "0.05.*0.01"),
        ({"micro_batch": 0}, ValueError, "0"),
        ({"micro_batch": True}, InputError, "micro_batch.*True"),
        ({"strict": "no"}, InputError, "strict.*'no'"),
        ({"cuda_graphs": 1}, InputError, "cuda_graphs.*1"),
        ({"input_shape": (3, SIZE, float("nan"))}, InputError, "input_shape.*nan"),
        ({"input_shape": (3, SIZE)}, InputError, "input_shape.*three"),
        ({"input_shape": (3, 20, 20)}, InputError, r"\[3, 20, 20\]"),
    ],
)
def test_wrong_construction(arguments: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        Engine(**{"model": vit(), **arguments})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"shares": "none"}, "'none'"),
        ({"maxpool": "avg"}, "'avg'"),
        ({"stabilizer": -1.0}, "-1.0"),
        ({"stabilizer": float("nan")}, "nan"),
        ({"stabilizer": float("inf")}, "inf"),
        ({"stabilizer": True}, "True"),
        ({"fold_batchnorm": "no"}, "'no'"),
    ],
)
def test_wrong_rule_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        AbsLRP(**options)


def test_relative_stabilizer_is_positive() -> None:
    with pytest.raises(ValueError, match="0"):
        RelativeStabilizer(0.0)


def test_training_mode() -> None:
    with pytest.raises(UnsupportedModelError, match=r"training mode.*eval\(\)"):
        Engine(vit().train())
    model = vit()
    model.blocks[1].attn.train()
    with pytest.raises(UnsupportedModelError, match=r"blocks\.1\.attn"):
        Engine(model)
    model.eval()
    engine = Engine(model)
    model.train()
    with pytest.raises(UnsupportedModelError, match="training mode"):
        engine.attribute(images())


def test_quantised_model() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao is deprecated
        model = torch.ao.quantization.quantize_dynamic(vgg(), {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(UnsupportedModelError, match="4 is a quantised module"):
        Engine(model)


def test_parameters_that_are_not_floating() -> None:
    model = vgg()
    model[4].weight = nn.Parameter(torch.ones(CLASSES, 4 * 64, dtype=torch.int8), requires_grad=False)
    with pytest.raises(UnsupportedModelError, match=r"4\.weight is torch\.int8"):
        Engine(model)


def test_model_without_weights() -> None:
    with pytest.raises(UnsupportedModelError, match="meta"):
        Engine(vgg().to("meta"))


class Odd(nn.Module):
    """Operations outside the vocabulary in two modules."""

    class Inner(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sort(-1)[0]

    def __init__(self) -> None:
        super().__init__()
        self.inner = self.Inner()
        self.head = nn.Linear(3 * SIZE * SIZE, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x).flatten(1)).erfinv() + self.head(x.flatten(1)).digamma()


def test_every_unsupported_operation_is_listed() -> None:
    for strict in (True, False):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(UnsupportedModelError) as caught:
                Engine(Odd().eval(), strict=strict, input_shape=(3, SIZE, SIZE))
        text = str(caught.value)
        names = {(name.split(".")[0], module) for name, module in caught.value.operations}
        assert ("sort", "inner") in names
        assert "inner" in text
        assert "sort" in text
        if strict:
            assert {("erfinv", ""), ("digamma", "")} <= names
            assert "strict=False" in text
        else:
            assert not {n for n, _ in names} & {"erfinv", "digamma"}


class Elementwise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3 * SIZE * SIZE, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return (self.head(x.sinh().flatten(1)) * 0.1).asinh() - 1.0


def test_strict_false_warns_once_per_operation() -> None:
    with pytest.raises(UnsupportedModelError, match=r"sinh(.|\n)*asinh"):
        Engine(Elementwise().eval(), input_shape=(3, SIZE, SIZE))
    with pytest.warns(UserWarning, match="sinh") as caught:
        engine = Engine(Elementwise().eval(), strict=False, input_shape=(3, SIZE, SIZE))
    assert sorted(str(w.message).split(".")[0] for w in caught) == ["asinh", "sinh"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        a = engine.attribute(images(), 1)
        engine.attribute(images(), 2)
    assert bool(a.maps.isfinite().all())
    assert bool(a.maps.any())


class Returns(nn.Module):
    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x * self.scale)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda x: x, r"logits.*batch.*classes.*returns one score for each class.*pixels, \.mean"),
        (lambda x: (x.mean((2, 3)), x.sum((2, 3))), "one tensor.*2"),
        (lambda x: [{"boxes": x[0, 0][x[0, 0] > 0], "scores": x[0] if x.sum() > 0 else -x[0]}], "one tensor.*2 values"),
        (lambda x: x.mean((1, 2, 3)), r"logits.*returns \['batch'\].*returns one score for each class\.$"),
        (lambda x: x.reshape(-1, 16), "logits|samples|batch"),
        (lambda x: x.flatten(1) - x.flatten(1).mean(0), "mixes the samples|batch"),
        (lambda x: x.flatten(1) if x.sum() > 0 else -x.flatten(1), r"by values of its tensors \(line \d+ of test_en"),
    ],
    ids=["image", "two tensors", "boxes", "no classes", "samples split", "samples mixed", "control flow"],
)
def test_models_that_are_no_classifiers(function: Callable[[Tensor], Any], words: str) -> None:
    with pytest.raises(UnsupportedModelError, match=words):
        Engine(Returns(function).eval(), input_shape=(3, SIZE, SIZE))


def test_nothing_is_printed_about_a_model_that_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    """The exporter prints its graph where a forward pass decides by values."""
    model = Returns(lambda x: x.flatten(1) if x.mean() > 0 else -x.flatten(1)).eval()
    with pytest.raises(UnsupportedModelError, match="decides by values"):
        Engine(model, input_shape=(3, SIZE, SIZE))
    assert capfd.readouterr() == ("", "")


HEADS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda y: y.log_softmax(1) + (2 * y).log_softmax(1),
    "mean": lambda y: (y.log_softmax(1) + (2 * y).log_softmax(1)) / 2,
    "stack": lambda y: torch.stack([y.log_softmax(1), (2 * y).log_softmax(1)]).mean(0),
    "log of mean": lambda y: torch.log(0.5 * y.softmax(1) + 0.5 * (2 * y).softmax(1)),
    "log of sum()": lambda y: (sum(z.softmax(1) for z in (y, 2 * y)) / 2).log(),
    "log of mean and more": lambda y: (torch.stack([y.softmax(1), (2 * y).softmax(1)]).mean(0) + 1e-8).log(),
    "log2 of what is limited": lambda y: ((y.softmax(1) + (2 * y).softmax(1)) / 2).clamp_min(1e-8).log2(),
    "log of weighted mean": lambda y: (
        (torch.stack([y, 2 * y]).softmax(2) * torch.tensor([[[0.3]], [[0.7]]])).sum(0).log()
    ),
    "logsumexp": lambda y: torch.stack([y.log_softmax(1), (2 * y).log_softmax(1)]).logsumexp(0) - math.log(2),
    "logaddexp": lambda y: torch.logaddexp(y.log_softmax(1), (2 * y).log_softmax(1)),
    "logarithms of single probabilities": nn.functional.logsigmoid,
}


@pytest.mark.parametrize("name", HEADS)
def test_means_of_log_probabilities_are_refused_or_signed(name: str) -> None:
    """Under absLRP positive summands get relevance; of these none is."""
    model = Returns(lambda x: HEADS[name](x.mean(3).flatten(1) + 3)).eval()
    with pytest.raises(UnsupportedModelError, match=r"log-probabilities(.|\n)*maps? would be zero"):
        Engine(model, input_shape=(3, SIZE, SIZE))
    a = Engine(model, "lrp-epsilon", precision="float32").attribute(images())
    torch.testing.assert_close(a.logits, model(images()).detach())
    assert float(a.maps.abs().amax()) == 1.0


@pytest.mark.parametrize(
    "written",
    [
        lambda y: y - y.logsumexp(1, keepdim=True),
        lambda y: y - y.logsumexp(-1)[:, None],
        lambda y: y.sub(y.logsumexp((1,)).unsqueeze(1)),
    ],
    ids=["kept", "indexed", "unsqueezed"],
)
@pytest.mark.parametrize("rule", ["abslrp", "attnlrp"])
def test_a_log_softmax_that_is_written_out(written: Callable[[Tensor], Tensor], rule: str) -> None:
    """It is left out as log_softmax is: scores are explained."""

    def attribution(head: Callable[[Tensor], Tensor]) -> Attribution:
        model = Returns(lambda x: head(x.mean(3).flatten(1))).eval()
        return Engine(model, rule, precision="float64").attribute(images().double(), 3)

    a, expected = attribution(written), attribution(lambda y: y.log_softmax(1))
    torch.testing.assert_close(a.logits, expected.logits)
    torch.testing.assert_close(a.maps, expected.maps)


def test_sums_that_are_no_log_softmax() -> None:
    """Of other scores, or over all classes and images: as it is written."""
    model = Returns(lambda x: (y := x.mean(3).flatten(1)) - (2 * y).logsumexp(1, keepdim=True)).eval()
    a = Engine(model, "lrp-epsilon", precision="float32").attribute(images())
    torch.testing.assert_close(a.logits, model(images()).detach())
    model = Returns(lambda x: (y := x.mean(3).flatten(1)) - y.logsumexp(0, keepdim=True)).eval()
    with pytest.raises(UnsupportedModelError, match="batch"):
        Engine(model, input_shape=(3, SIZE, SIZE))


def test_means_of_probabilities_are_explained() -> None:
    model = Returns(lambda x: ((y := x.mean(3).flatten(1)).softmax(1) + (2 * y).softmax(1)) / 2).eval()
    a = Engine(model, precision="float32").attribute(images())
    torch.testing.assert_close(a.logits, model(images()).detach())
    assert float(a.maps.abs().amax()) == 1.0


@pytest.mark.parametrize("precision", ["mixed", "float32", "float64"])
@pytest.mark.parametrize("name", FAMILIES)
def test_classes_that_are_one_have_no_contrast(name: str, precision: str) -> None:
    """P and N are equal but for rounding: it must not be scaled to a map. Beside that class there is another one."""
    model, x = FAMILIES[name](), images()
    head = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    with torch.no_grad():
        head.weight.copy_(head.weight[0].clone())
        head.bias.copy_(head.bias[0].clone())
    for rule in ("abslrp", "abslrp-release"):
        engine = Engine(model, rule, precision)
        for normalize in ("max", "sum", "none"):
            assert not bool(engine.attribute(x, 1, normalize=normalize).maps.any())
        assert float(engine.attribute(x, 1, "none").maps.abs().amax()) == 1.0
    with torch.no_grad():
        head.weight[2, ::2] *= 1.01
    maps = Engine(model, precision=precision).attribute(x, 2).maps
    assert bool((maps.abs().amax((1, 2, 3)) == 1.0).all())


def test_one_class_has_no_others() -> None:
    engine = Engine(nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, 1)).eval())
    with pytest.raises(InputError, match="two classes"):
        engine.attribute(images())
    assert bool(engine.attribute(images(), contrast="none").maps.any())
