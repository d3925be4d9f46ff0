"""What an engine notices of changes of its model: results are those of the model as it is."""

from __future__ import annotations

import copy
import warnings
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ramp_fast import Engine
from ramp_fast import engine as engine_module
from ramp_fast.capture import model_state
from ramp_fast.ops import checksum as checksums


class Factor:
    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 1.0


class Scaled(nn.Module):
    size = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.scaled(x)

    def scaled(self, x: Tensor) -> Tensor:
        return x * self.size


class Doubled(Scaled):
    def scaled(self, x: Tensor) -> Tensor:
        return 2 * x


class Net(nn.Module):
    """With everything that a forward pass may read besides parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Linear(8, 5)
        self.shift, self.bright = torch.zeros(1, 8, 1, 1), True
        self.settings: dict[str, Any] = {"factors": [1.0, 2.0], "table": np.ones(8, np.float32)}
        self.config = SimpleNamespace(scale=1.0)
        self.slotted, self.queue, self.scaled = Factor(), deque([1.0]), Scaled()
        self.unregistered = [nn.Sequential(nn.Linear(5, 5))]
        self.activation: Callable[[Tensor], Tensor] = F.relu
        self.temperature = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)) + self.shift + torch.from_numpy(self.settings["table"]).view(1, 8, 1, 1)
        x = self.activation(x) if self.bright else x
        x = self.scaled(x.mean((2, 3))) * self.settings["factors"][1] * self.config.scale
        x = self.head(x * self.slotted.value * self.queue[0])
        return self.unregistered[0](x) / float(self.temperature)


def other_forward(self: nn.Module, x: Tensor) -> Tensor:
    return 3 * F.linear(x, self.weight, self.bias)  # type: ignore[arg-type]


def strided(m: Net) -> None:
    m.conv.stride = (2, 2)


CHANGES: dict[str, Callable[[Net], Any]] = {
    "in place": lambda m: m.head.weight.detach().mul_(-1),
    "data replaced": lambda m: setattr(m.head.weight, "data", -m.head.weight.data),
    "data multiplied": lambda m: m.head.weight.data.mul_(-1),
    "one number of data": lambda m: m.conv.weight.data.view(-1)[100:101].add_(5),
    "NumPy view": lambda m: np.negative(m.head.weight.detach().numpy(), m.head.weight.detach().numpy()),
    "statistics": lambda m: m.norm.running_mean.data.fill_(1),  # type: ignore[union-attr]
    "parameter replaced": lambda m: setattr(m.head, "weight", nn.Parameter(torch.ones(5, 8))),
    "attribute tensor filled": lambda m: m.shift.fill_(1),
    "attribute tensor's data": lambda m: m.shift.data.fill_(1),
    "attribute tensor replaced": lambda m: setattr(m, "shift", torch.ones(1, 8, 1, 1)),
    "a number read at capture": lambda m: m.temperature.data.mul_(4),
    "epsilon": lambda m: setattr(m.norm, "eps", 10.0),
    "stride": strided,
    "switch": lambda m: setattr(m, "bright", False),
    "list within a dict": lambda m: m.settings["factors"].__setitem__(1, 5.0),
    "array": lambda m: m.settings["table"].fill(-2),
    "object": lambda m: setattr(m.config, "scale", 3.0),
    "function": lambda m: setattr(m, "activation", torch.tanh),
    "hook": lambda m: m.conv.register_forward_hook(lambda module, args, out: -out),
    "slots": lambda m: setattr(m.slotted, "value", 3.0),
    "deque": lambda m: m.queue.__setitem__(0, 3.0),
    "class of a module": lambda m: setattr(m.scaled, "__class__", Doubled),
    "parameter within a list": lambda m: setattr(m.unregistered[0][0], "weight", nn.Parameter(torch.eye(5))),
    "hook within a list": lambda m: m.unregistered[0][0].register_forward_hook(lambda module, args, out: -out),
    "module replaced": lambda m: setattr(m, "head", nn.Linear(8, 5)),
    "forward of an instance": lambda m: setattr(m.head, "forward", other_forward.__get__(m.head)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_results_are_those_of_the_model_as_it_is(name: str) -> None:
    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(2, 3, 10, 10)
    engine = Engine(model, precision="float32")
    before = engine.attribute(x, 0)
    CHANGES[name](model)
    with torch.no_grad():
        logits = model(x)
    assert not torch.allclose(logits, before.logits, atol=1e-3)
    fresh = Engine(copy.deepcopy(model), precision="float32").attribute(x, 0)
    for other in (engine, Engine(model, precision="float32")):
        found = other.attribute(x, 0)
        torch.testing.assert_close(found.logits, logits, rtol=1e-4, atol=1e-5)
        assert torch.equal(found.maps, fresh.maps)
    torch.testing.assert_close(engine.logits(x), logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [(nn.Linear, "forward", other_forward), (Scaled, "scaled", Doubled.scaled), (Scaled, "size", 3.0)],
)
def test_what_classes_have(kind: type, name: str, value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Net().eval(), torch.randn(2, 3, 10, 10)
    engine = Engine(model, precision="float32")
    engine.attribute(x)
    monkeypatch.setattr(kind, name, value)
    with torch.no_grad():
        torch.testing.assert_close(engine.logits(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_number_replaced_by_an_equal_one() -> None:
    model, x = Net().eval(), torch.randn(2, 3, 10, 10)
    engine = Engine(model, precision="float32")
    engine.attribute(x)
    model.temperature = nn.Parameter(torch.tensor(2.0))
    engine.attribute(x)
    model.temperature.data.fill_(5)
    with torch.no_grad():
        torch.testing.assert_close(engine.logits(x), model(x), rtol=1e-4, atol=1e-5)


def test_memory_of_a_deleted_model() -> None:
    """Weights written to where another model's were packed from are not taken for them."""
    x, storage = torch.randn(2, 3, 10, 10), torch.empty(5, 8)
    for seed in range(3):
        torch.manual_seed(seed)
        model = Net().eval()
        storage.numpy()[...] = torch.randn(5, 8).numpy()
        model.head.weight = nn.Parameter(storage)
        with torch.no_grad():
            torch.testing.assert_close(Engine(model, precision="float32").logits(x), model(x), rtol=1e-4, atol=1e-5)


def test_changes_of_large_weights_are_found_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """What no sample shows is found once its turn has come; what is written to a whole tensor, at once."""
    monkeypatch.setattr(model_state, "_BYTES_PER_IMAGE", 3 << 17)
    weights = {"a": torch.zeros(10, 1 << 15), "b": torch.zeros(1 << 14)}
    for at in (0, 123_456, 327_679):
        weights["a"].zero_()
        watched = model_state.Weights(weights)
        assert watched.changes(1, True) == ([], False)
        weights["a"].numpy().reshape(-1)[at] = 1e-3
        found = [watched.changes(1, True)[0] for _ in range(4)]
        assert ["a"] in found
        assert watched.changes(4, True)[0] == ["a"]
        assert watched.changes(4, False)[0] == []
    for part in (np.s_[:], np.s_[3, :8192], np.s_[:, 5]):
        wide = {"a": torch.zeros(4096, 1024)}
        watched = model_state.Weights(wide)
        wide["a"].numpy()[part] = 1
        monkeypatch.setattr(model_state, "_BYTES_PER_IMAGE", 0)
        assert watched.changes(1, True)[0] == ["a"]


@pytest.mark.parametrize("extension", [True, False])
def test_no_word_changes_unnoticed(extension: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not extension:
        monkeypatch.setattr(checksums, "extension", None)
    elif checksums.extension is None:
        pytest.skip("there is no C++ extension")
    data = torch.randn(10_007)
    before = checksums.whole_checksum(data)
    for at in (0, 15, 16, 63, 64, 5_000, 10_006):
        changed = data.clone()
        changed[at] = torch.nextafter(changed[at], torch.tensor(torch.inf))
        assert checksums.whole_checksum(changed) != before
    assert checksums.whole_checksum(data.clone()) == before
    assert checksums.whole_checksum(data[:0]) == 0
    assert checksums.whole_checksum(data.view(-1, 1).expand(-1, 2)) != before


def test_attributes_that_change_in_vain_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    captures = []
    real = engine_module.capture
    monkeypatch.setattr(engine_module, "capture", lambda *a, **k: captures.append(1) or real(*a, **k))
    model, x = Net().eval(), torch.randn(1, 3, 10, 10)
    engine = Engine(model)
    engine.attribute(x)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for i in range(8):
            model.seen = i  # type: ignore[assignment]
            engine.attribute(x)
    assert len(captures) == 1 + model_state.VAIN_CAPTURES
    assert [str(w.message).split(" of the model")[0] for w in caught] == ["(model).seen"]
    model.bright = False
    with torch.no_grad():
        torch.testing.assert_close(engine.logits(x), model(x), rtol=1e-4, atol=1e-5)
    engine.refresh()
    engine.attribute(x)
    assert len(captures) == 3 + model_state.VAIN_CAPTURES


def test_fused_optimizers() -> None:
    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(2, 3, 10, 10)
    engine = Engine(model, precision="float32")
    engine.attribute(x)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    F.cross_entropy(model(x), torch.tensor([1, 2])).backward()
    optimizer.step()
    with torch.no_grad():
        torch.testing.assert_close(engine.logits(x), model(x), rtol=1e-4, atol=1e-5)
