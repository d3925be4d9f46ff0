"""Capture leaves caches, hooks and what hooks keep as they were; hooks that change the result are part of the model."""

from __future__ import annotations

import functools
import sys
import types
import warnings
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from threading import local
from typing import Any, ClassVar

import pytest
import torch
from small_models import SIZE, images, vgg
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from ramp_fast import Engine
from ramp_fast.errors import UnsupportedModelError

SHAPE = (3, SIZE, SIZE)
KEPT: list[Tensor] = []
LAST: Tensor | None = None


class Keeper:
    """A hook with a memory."""

    def __init__(self) -> None:
        self.last: Tensor | None = None
        self.calls = 0
        self.all: deque[Tensor] = deque(maxlen=2)
        self.gone = weakref.proxy({self})

    def __call__(self, module: nn.Module, args: Any, out: Tensor) -> None:
        self.last = out
        self.calls += 1
        self.all.append(out)


def _in_a_global(module: nn.Module, args: Any, out: Tensor) -> None:
    global LAST
    LAST = out


def test_what_hooks_keep_is_put_back() -> None:
    model, keeper, inside, held = vgg(), Keeper(), [], {}
    model[1].register_forward_hook(keeper)
    model[1].register_forward_hook(keeper.__call__, prepend=True)
    model[2].register_forward_hook(lambda m, a, out: inside.append(out))
    model[2].register_forward_hook(lambda m, a, out: KEPT.append(out))
    model[3].register_forward_hook(functools.partial(lambda store, m, a, out: store.update(out=out), held))
    model[3].register_forward_hook(lambda m, a, out: out.register_hook(inside.append) and None)
    model[4].register_forward_hook(_in_a_global, always_call=True)
    model[4].register_forward_pre_hook(lambda m, args, kwargs: inside.append(args[0]), with_kwargs=True)
    model[4].register_full_backward_hook(lambda m, given, out: None)
    everywhere = register_module_forward_hook(lambda m, a, out: inside.append(out))
    before = [(m._forward_hooks, list(m._forward_hooks.items()), dict(m._forward_pre_hooks)) for m in model]
    try:
        Engine(model).attribute(images())
    finally:
        everywhere.remove()
    assert not any([inside, held, KEPT, keeper.calls, keeper.all])
    assert LAST is None
    assert keeper.last is None
    for module, (own, hooks, pre_hooks) in zip(model, before, strict=True):
        assert module._forward_hooks is own
        assert list(own.items()) == hooks
        assert module._forward_pre_hooks == pre_hooks


def _doubled(module: nn.Module, args: Any, out: Tensor) -> None:
    out.mul_(2)


def _with(register: Callable[[nn.Sequential], Any]) -> nn.Module:
    model = vgg()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # two of them are deprecated
        register(model)
    return model.eval()


@pytest.mark.parametrize(
    "register",
    [
        lambda m: m[1].register_forward_hook(lambda m, a, out: out * 2 - 1),
        lambda m: m[1].register_forward_hook(_doubled),
        lambda m: m[4].register_forward_pre_hook(lambda m, args: (args[0] + 1,)),
        lambda m: m.register_forward_hook(lambda m, a, k, out: out * torch.arange(10.0), with_kwargs=True),
        lambda m: nn.utils.weight_norm(m[4]),
        lambda m: nn.utils.spectral_norm(m[0]),
        lambda m: nn.utils.parametrizations.weight_norm(m[4]),
        lambda m: nn.utils.prune.l1_unstructured(m[4], "weight", amount=0.5),
    ],
    ids=["result", "in place", "argument", "logits", "weight_norm", "spectral_norm", "parametrization", "pruning"],
)
def test_hooks_that_change_the_result_are_part_of_the_model(register: Callable[[nn.Sequential], Any]) -> None:
    model, x = _with(register), images()
    a = Engine(model, precision="float64").attribute(x)
    torch.testing.assert_close(a.logits.float(), model(x).detach(), rtol=1e-5, atol=1e-5)  # the model's are float32


def test_hooks_that_come_later_are_noticed() -> None:
    model, x = vgg(), images()
    engine = Engine(model, precision="float32", input_shape=SHAPE)
    handle = model.register_forward_hook(lambda m, a, out: out * torch.arange(10.0))
    torch.testing.assert_close(engine.attribute(x).logits, model(x).detach(), rtol=1e-5, atol=1e-5)
    handle.remove()
    torch.testing.assert_close(engine.attribute(x).logits, model(x).detach(), rtol=1e-5, atol=1e-5)


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = vgg()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        out: Tensor = self.inner(x)
        return out


def test_buffers_are_not_written_to_when_hooks_are_tried() -> None:
    model = Counting().eval()
    model.register_forward_hook(lambda m, a, out: None)
    Engine(model, input_shape=SHAPE)
    assert float(model.calls) == 0


def test_a_hook_that_wants_numbers() -> None:
    model, seen = vgg(), [0.0]
    model[1].register_forward_hook(lambda m, a, out: seen.append(float(out.numpy().sum())))
    Engine(model, input_shape=SHAPE)
    assert seen == [0.0]


def test_a_hook_that_fails_is_named_as_the_reason() -> None:
    model = vgg()
    handle = model[1].register_forward_hook(lambda m, a, out: 1 / 0)
    with pytest.raises(UnsupportedModelError, match=r"hooks.*division by zero"):
        Engine(model, input_shape=SHAPE)
    handle.remove()
    assert not model[1]._forward_hooks
    Engine(model, input_shape=SHAPE)


@functools.lru_cache
def _table(size: int) -> Tensor:
    return torch.zeros(1) + size


class Caching(nn.Module):
    """Leaves its result everywhere."""

    last_of_all: ClassVar[Tensor | None] = None
    all_of_all: ClassVar[list[Tensor]] = []

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.queue, self.nested = vgg(), deque(), (defaultdict(list), OrderedDict())  # type: ignore[var-annotated]
        self.helper = Keeper()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x) + _table(1)
        self.last = y
        self.queue.append(y)
        self.nested[0]["y"].append(y)
        self.nested[1]["y"] = y
        self.helper(self, (), y)
        Caching.last_of_all = y
        Caching.all_of_all.append(y)
        KEPT.append(y)
        return y


def test_no_tensor_without_values_stays() -> None:
    model = Caching().eval()
    Engine(model, input_shape=SHAPE)
    assert not hasattr(model, "last")
    assert not any([model.queue, *model.nested, model.helper.all, Caching.all_of_all, KEPT])
    assert model.helper.last is None
    assert Caching.last_of_all is None
    assert type(_table(1)) is Tensor
    assert float(_table(1)) == 1.0


class Store:
    """An object that functions find by name."""

    runs: ClassVar[list[Any]] = []

    def __init__(self) -> None:
        self.last: Tensor | None = None
        self.all: list[Any] = []
        self.named: dict[str, Any] = {}

    def take(self, y: Tensor) -> None:
        self.last = y
        self.all.append(("y", y))
        self.named.setdefault("y", []).append(y)
        Store.runs.append({"y": y})


class Slotted:
    __slots__ = ("last",)


class Keeping(nn.Module):
    """Leaves its result where it finds a place by name."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.reading = vgg(), _reading()

    def forward(self, x: Tensor) -> Tensor:
        global NEW, ACTIVATIONS
        import kept_elsewhere

        y: Tensor = self.inner(x)
        NEW, ACTIVATIONS = y, [y]  # type: ignore[name-defined]
        STORE.take(y)
        SLOTTED.last = y
        SPACE.runs.append(y)
        SHARED.seen = y
        THREAD.last = y
        elsewhere.LAST = y
        elsewhere.store.take(y)
        kept_elsewhere.OTHER = y
        self.reading(y)
        return y


def _reading() -> Callable[[Tensor], None]:
    def read(y: Tensor) -> None:
        nonlocal last
        last = y

    if STORE.last is not None:
        last = STORE.last
    return read


STORE, SLOTTED, SPACE, SHARED, THREAD = Store(), Slotted(), types.SimpleNamespace(runs=[]), nn.Identity(), local()
ACTIVATIONS: list[Tensor] = []
elsewhere = types.ModuleType("kept_elsewhere")
elsewhere.store = Store()  # type: ignore[attr-defined]


def test_no_tensor_stays_where_functions_find_a_place_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kept_elsewhere", elsewhere)
    model, activations = Keeping().eval(), ACTIVATIONS
    STORE.named["mine"] = mine = object()
    Engine(model, input_shape=SHAPE)
    assert "NEW" not in globals()
    assert ACTIVATIONS is activations
    for store in (STORE, elsewhere.store):
        assert store.last is None
        assert not any([store.all, store.runs])
    assert STORE.named == {"mine": mine}
    assert not SPACE.runs
    assert not any(hasattr(place, name) for place, name in ((SLOTTED, "last"), (THREAD, "last"), (SHARED, "seen")))
    assert not any(hasattr(elsewhere, name) for name in ("LAST", "OTHER"))
    with pytest.raises(ValueError, match="empty"):
        _ = model.reading.__closure__[0].cell_contents


class Registry(OrderedDict[str, Any]):
    """Makes what it is asked for, as that of activations in transformers does."""

    def __getitem__(self, key: str) -> Any:
        return super().__getitem__(key)()

    def __setitem__(self, key: str, value: Any) -> None:
        raise TypeError("it is full")


class Lazy(dict[str, Any]):
    def items(self) -> Any:  # type: ignore[override]
        raise RuntimeError("nobody may look at all of it")

    keys = values = __iter__ = items  # type: ignore[assignment]


REGISTRY = Registry()
OrderedDict.__setitem__(REGISTRY, "relu", nn.ReLU)
LAZY = Lazy(a=nn.ReLU)


class Asking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.registry, self.inner = REGISTRY, nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE**2, 5))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(REGISTRY["relu"](x) + len(LAZY))
        return y


def test_registries_that_make_what_they_are_asked_for() -> None:
    model, x = Asking().eval(), torch.randn(1, *SHAPE)
    engine = Engine(model, input_shape=SHAPE)
    plan = engine.plan
    assert dict(OrderedDict.items(REGISTRY)) == {"relu": nn.ReLU}
    engine.attribute(x)
    assert engine.plan is plan
    OrderedDict.__setitem__(REGISTRY, "relu", nn.Tanh)
    try:
        torch.testing.assert_close(engine.logits(x), model(x).detach())
    finally:
        OrderedDict.__setitem__(REGISTRY, "relu", nn.ReLU)


def test_what_others_do_meanwhile_to_what_functions_find_by_name_stays() -> None:
    class Busy(Keeping):
        def forward(self, x: Tensor) -> Tensor:
            STORE.named["count"] = STORE.named.get("count", 0) + 1
            y: Tensor = self.inner(x)
            return y

    Engine(Busy().eval(), input_shape=SHAPE)
    assert STORE.named.pop("count") > 0


def test_hooks_that_return_a_value_are_part_of_the_model() -> None:
    """Also where they change nothing of the image that they are tried on."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)).eval()
    handle = model[0].register_forward_hook(lambda module, args, out: out.clamp(max=50.0))
    images = 1000 * torch.randn(2, 3, 8, 8)
    engine = Engine(model, precision="float32")
    with torch.no_grad():
        torch.testing.assert_close(engine.logits(images), model(images), rtol=1e-4, atol=1e-2)
        handle.remove()
        torch.testing.assert_close(engine.logits(images), model(images), rtol=1e-4, atol=1e-2)
