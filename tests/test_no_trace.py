"""Attributing leaves nothing behind: the model, random numbers and global settings are what they were."""

from __future__ import annotations

import logging
import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from small_models import CLASSES, FAMILIES, SIZE, images, vit
from torch import Tensor, nn

from ramp_fast import Engine
from ramp_fast.gemm import exact_float32

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
)


def model_state(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that a user could notice, tensors by value, identity and version."""
    state: dict[str, Any] = {}
    for name, module in model.named_modules():
        state[f"{name}:class"] = (type(module), type(module).forward, module.training)
        for hooks in _HOOKS:
            state[f"{name}:{hooks}"] = tuple(getattr(module, hooks))
        for key, value in vars(module).items():
            if key not in _HOOKS:
                known = isinstance(value, (bool, int, float, str, tuple, type(None)))
                state[f"{name}:{key}"] = value if known else id(value)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        hooked = tensor._backward_hooks is None
        state[f"{name}:tensor"] = (
            id(tensor),
            tensor.data_ptr(),
            tensor._version,
            tensor.requires_grad,
            tensor.stride(),
            hooked,
        )
        state[f"{name}:value"] = tensor.detach().clone()
        state[f"{name}:grad"] = (id(tensor.grad), None if tensor.grad is None else tensor.grad.clone())
    return state


def global_state() -> dict[str, Any]:
    b = torch.backends
    return {
        "python": random.getstate(),
        "numpy": str(np.random.get_state()),  # noqa: NPY002  # the global stream is what must not move
        "torch": torch.get_rng_state(),
        "float32": tuple(
            f.fp32_precision for f in (b, b.mkldnn, b.mkldnn.matmul, b.mkldnn.conv, b.cuda.matmul, b.cudnn.conv)
        ),
        "mkldnn": (b.mkldnn.enabled, b.mkldnn.deterministic),
        "cudnn": (b.cudnn.enabled, b.cudnn.benchmark, b.cudnn.deterministic),
        "cuda": b.cuda.matmul.allow_bf16_reduced_precision_reduction,
        "sdp": (b.cuda.flash_sdp_enabled(), b.cuda.math_sdp_enabled(), b.cuda.mem_efficient_sdp_enabled()),
        "fastpath": b.mha.get_fastpath_enabled(),
        "dtype": torch.get_default_dtype(),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "grad": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_anomaly_enabled()),
        "autocast": (
            torch.is_autocast_enabled("cpu"),
            torch.get_autocast_dtype("cpu"),
            torch.is_autocast_cache_enabled(),
        ),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warnings": list(warnings.filters),
        "logging": {name: logging.getLogger(name).level for name in ("", "torch", "torch.export", "ramp_fast")},
        "modules": {n: getattr(nn, n) for n in ("Linear", "Conv2d", "LayerNorm", "GELU")},
        "functions": (torch.nn.functional.linear, torch.nn.functional.scaled_dot_product_attention, Tensor.__add__),
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert _equal(value, after[key]), f"{key} was {value}, is {after[key]}"


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


class Watch:
    """Asserts on leaving that the model, the images and everything global are as they were."""

    def __init__(self, model: nn.Module, *tensors: Tensor) -> None:
        self.model, self.tensors = model, tensors

    def state(self) -> dict[str, Any]:
        tensors = {str(i): (t.clone(), t._version, t.requires_grad, t.grad) for i, t in enumerate(self.tensors)}
        return {**model_state(self.model), **global_state(), **tensors}

    def __enter__(self) -> None:
        self.before = self.state()

    def __exit__(self, *_: object) -> None:
        assert_same(self.before, self.state())


def with_gradients(model: nn.Module) -> nn.Module:
    """A model in the middle of training: gradients, a hook, a frozen parameter, an attribute of the user's."""
    model(images()).square().sum().backward()
    next(model.parameters()).requires_grad_(False)
    model.register_forward_hook(lambda module, args, out: None)
    model.note = "mine"  # type: ignore[assignment]
    return model


@pytest.mark.parametrize("precision", ["mixed", "float32", "float64"])
@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_is_left_behind(name: str, precision: str) -> None:
    model = with_gradients(FAMILIES[name]())
    x, target = images().requires_grad_(), torch.tensor([[0, 1], [2, 3], [4, 5]])
    with Watch(model, x, target):
        engine = Engine(model, precision=precision)
        engine.attribute(x)
        engine.attribute(x, target, "none")
        _ = str(engine.plan)
        del engine


@pytest.mark.parametrize("grad", [True, False])
def test_grad_mode(grad: bool) -> None:
    model = vit()
    with torch.set_grad_enabled(grad), Watch(model):
        Engine(model).attribute(images())


def test_autocast_and_default_dtype() -> None:
    model, x = vit(), images()
    expected = Engine(model, precision="float32").attribute(x, 1).maps
    torch.set_default_dtype(torch.float64)
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16), Watch(model):
            maps = Engine(model, precision="float32").attribute(x, 1).maps
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(maps, expected)


class Fails(nn.Module):
    """Raises in its forward pass, from the given call on."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.inner, self.left = vit(), [after]

    def forward(self, x: Tensor) -> Tensor:
        self.left[0] -= 1
        if self.left[0] < 0:
            raise RuntimeError("out of order")
        return self.inner(x)


def test_after_an_exception_in_the_model() -> None:
    model = Fails(after=0).eval()
    with Watch(model), pytest.raises(Exception, match="out of order"):
        Engine(model, input_shape=(3, SIZE, SIZE))
    engine = Engine(model)
    with Watch(model, images()), pytest.raises(Exception, match="out of order"):
        engine.attribute(images())


@pytest.mark.usefixtures("_highest")
@pytest.mark.parametrize("where", ["forward", "pullback"])
def test_after_an_exception_in_the_engine(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from ramp_fast.rules.weighted import Linear

    model = vit()
    engine = Engine(model)
    expected = engine.attribute(images(), 1).maps

    def broken(*_: Any) -> Any:
        raise MemoryError("no memory")

    monkeypatch.setattr(Linear, where, broken)
    medium()
    with Watch(model), pytest.raises(MemoryError):
        engine.attribute(images(), 1)
    monkeypatch.undo()
    assert torch.equal(engine.attribute(images(), 1).maps, expected)


def test_after_refused_arguments() -> None:
    model = vit()
    engine = Engine(model)
    with Watch(model):
        for arguments in ({"target": 99}, {"contrast": "all"}, {"images": torch.zeros(1)}):
            with pytest.raises(ValueError, match=r"."):
                engine.attribute(**{"images": images(), **arguments})  # type: ignore[arg-type]


class Sorts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3 * SIZE * SIZE, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(1).sort(-1)[0])


def test_after_a_refused_model() -> None:
    model = Sorts().eval()
    with Watch(model), pytest.raises(Exception, match="sort"):
        Engine(model, input_shape=(3, SIZE, SIZE))


def medium() -> None:
    torch.set_float32_matmul_precision("medium")


def bf16_products() -> None:
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    torch.backends.mkldnn.conv.fp32_precision = "bf16"


def tf32_everywhere() -> None:
    torch.backends.fp32_precision = "tf32"


def wide() -> nn.Module:
    """Wide enough for the reduced precision to be used where the processor has it."""
    torch.manual_seed(4)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, 512), nn.ReLU(), nn.Linear(512, CLASSES)).eval()


@pytest.fixture
def _highest() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.fp32_precision = "none"
    torch.backends.cuda.matmul.fp32_precision = "none"
    torch.backends.mkldnn.conv.fp32_precision = "none"
    torch.backends.mkldnn.matmul.fp32_precision = "none"


@pytest.mark.usefixtures("_highest")
@pytest.mark.parametrize("setting", [medium, bf16_products, tf32_everywhere], ids=lambda f: f.__name__)
def test_reduced_matmul_precision_of_the_user(setting: Callable[[], None]) -> None:
    """What the user allows for float32 products does not change the result, and stays as it was set."""
    models = {name: make() for name, make in {"vgg": FAMILIES["vgg"], "wide": wide}.items()}
    engines = {name: Engine(model, precision="float32") for name, model in models.items()}
    expected = {name: engine.attribute(images(), 1) for name, engine in engines.items()}
    setting()
    for name, model in models.items():
        with Watch(model):
            got = engines[name].attribute(images(), 1)
            fresh = Engine(model, precision="float32").attribute(images(), 1)
        for result in (got, fresh):
            assert torch.equal(result.maps, expected[name].maps)
            assert torch.equal(result.logits, expected[name].logits)


@pytest.mark.usefixtures("_highest")
def test_a_precision_set_for_all_backends() -> None:
    tf32_everywhere()
    with exact_float32(torch.device("cpu")):
        assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
    assert torch.backends.mkldnn.matmul.fp32_precision == "tf32"


@pytest.mark.usefixtures("_highest")
def test_true_float32_while_another_thread_leaves() -> None:
    """The flags stay until the last of several threads is done."""
    medium()
    device = torch.device("cpu")
    flag = torch.backends.mkldnn.matmul
    with exact_float32(device):
        with exact_float32(device):
            assert flag.fp32_precision == "ieee"
        assert flag.fp32_precision == "ieee"
    assert flag.fp32_precision == "bf16"


def test_the_watch_sees() -> None:
    """The comparison itself notices each kind of change."""
    changes: list[Callable[[nn.Module], Any]] = [
        lambda m: m.register_forward_hook(lambda *_: None),
        lambda m: setattr(m, "mark", 1),
        lambda m: m.head.weight.data.mul_(2),
        lambda m: m.head.weight.requires_grad_(False),
        lambda m: setattr(m.head.weight, "grad", torch.ones_like(m.head.weight)),
        lambda m: m.blocks[0].train(),
        lambda m: torch.rand(1),
        lambda m: random.random(),
        lambda m: np.random.rand(),  # noqa: NPY002
        lambda m: warnings.simplefilter("ignore"),
    ]
    for change in changes:
        filters = warnings.filters[:]
        watch = Watch(vit())
        watch.__enter__()
        change(watch.model)
        with pytest.raises(AssertionError, match=r"was|keys"):
            watch.__exit__()
        warnings.filters[:] = filters
