"""Captured graphs on the disk: when one is used again, and that nothing comes of it but time saved."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import small_models
import timm.layers
import torch
import torch.nn.functional as F
from small_models import CLASSES, FAMILIES, SIZE, images, resnet, vgg, vit
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from ramp_fast import Engine, UnsupportedModelError
from ramp_fast.capture import capture, export, graph_cache, model_key
from ramp_fast.capture.graph_cache import CACHE_VARIABLE
from ramp_fast.capture.stored_graph import decode

SHAPE = (3, SIZE, SIZE)
TESTS = Path(small_models.__file__).parent


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "graphs"))
    monkeypatch.setattr(graph_cache, "_complained", set())
    return tmp_path / "graphs"


@pytest.fixture
def exports(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The models that have been exported."""
    models: list[nn.Module] = []
    export_one = export._exported

    def exported(model: nn.Module, *args: Any, **options: Any) -> Any:
        models.append(model)
        return export_one(model, *args, **options)

    monkeypatch.setattr(export, "_exported", exported)
    return models


def key(model: nn.Module, shape: tuple[int, int, int] = SHAPE, strict: bool = True) -> str:
    return model_key.model_key(model, shape, strict)


def maps(model: nn.Module, rule: str = "abslrp", precision: str = "mixed") -> Tensor:
    return Engine(model, rule, precision, input_shape=SHAPE).attribute(images(2)).maps


def only_file(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


def rewritten(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Another document in a file of the cache, with the checksum that it should have."""
    document = json.loads(path.read_text().partition("\n")[2])
    change(document)
    body = json.dumps(document)
    path.write_text(f"{hashlib.sha256(body.encode()).hexdigest()}\n{body}")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("rule", "precision"), [("abslrp", "mixed"), ("attnlrp", "float64")])
def test_maps_are_those_without_a_cache(
    family: str, rule: str, precision: str, folder: Path, exports: list[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = FAMILIES[family]()
    first = maps(model, rule, precision)
    again = maps(FAMILIES[family](), rule, precision)
    assert len(exports) == 1
    monkeypatch.delenv(CACHE_VARIABLE)
    without = maps(model, rule, precision)
    assert len(exports) == 2
    assert torch.equal(first, without)
    assert torch.equal(again, without)


def test_a_graph_that_was_read_is_the_captured_one(folder: Path, exports: list[nn.Module]) -> None:
    model = vit()
    captured, found = capture(model, SHAPE), capture(model, SHAPE)
    assert len(exports) == 1
    assert found.signature == captured.signature  # weights by identity
    for name in ("name", "kind", "shape", "example", "batch", "dtype", "decided", "module"):
        assert [getattr(n, name) for n in found.nodes] == [getattr(n, name) for n in captured.nodes]


def test_nothing_is_kept_unless_asked_for(
    tmp_path: Path, exports: list[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(CACHE_VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    for value in (None, ""):
        if value is not None:
            monkeypatch.setenv(CACHE_VARIABLE, value)
        capture(vgg(), SHAPE)
    assert len(exports) == 2
    assert not list(tmp_path.iterdir())


def test_other_weights_find_the_graph_and_have_their_own_maps(
    folder: Path, exports: list[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    maps(vit())
    other = vit()
    with torch.no_grad():
        for tensor in other.parameters():
            tensor.add_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(5)) / 10)
    found = maps(other)
    assert len(exports) == 1
    monkeypatch.delenv(CACHE_VARIABLE)
    assert torch.equal(found, maps(other))
    assert not torch.equal(found, maps(vit()))


def test_no_weight_is_in_the_file(folder: Path) -> None:
    model = resnet()
    capture(model, SHAPE)
    text = only_file(folder).read_text()
    numbers = _numbers(json.loads(text.partition("\n")[2]))
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            assert not numbers & (set(tensor.flatten().tolist()) - {0.0, 1.0})  # norms begin with 0 and 1


def _numbers(value: Any) -> set[float]:
    if isinstance(value, float):
        return {value}
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return set().union(*(_numbers(v) for v in inner))


_SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from small_models import SIZE, vit
from ramp_fast.capture import capture, export
count = []
plain = export._exported
export._exported = lambda *args, **options: (count.append(1), plain(*args, **options))[1]
sys.stdin.readline()
capture(vit(), (3, SIZE, SIZE))
print(len(count))
"""


def test_processes_that_write_at_once_leave_one_file_for_others(folder: Path, exports: list[nn.Module]) -> None:
    def start(seed: str) -> subprocess.Popen[str]:
        environment = os.environ | {"PYTHONHASHSEED": seed}
        command = [sys.executable, "-P", "-c", _SCRIPT, str(TESTS)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, env=environment, **pipes)

    processes = [start(seed) for seed in ("1", "2")]
    counts = [process.communicate("\n")[0].strip() for process in processes]
    assert "1" in counts
    only_file(folder)
    capture(vit(), SHAPE)
    assert not exports


# What the key covers


class Scaled(nn.Module):
    """A model with an attribute, a helper, a switch and a constant."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.head = nn.Linear(4, CLASSES)
        self.factor = 2.0
        self.settings = {"names": ["a", "b"]}
        self.register_buffer("order", torch.tensor([1, 0, 3, 2]))

    def forward(self, x: Tensor) -> Tensor:
        x = activation(self.conv(x)) * self.factor
        return self.head(x.mean((2, 3)).index_select(1, self.order))


SWITCH = False


def activation(x: Tensor) -> Tensor:
    return F.gelu(x) if SWITCH else F.relu(x)


def other_activation(x: Tensor) -> Tensor:
    return F.silu(x)


def other_forward(self: Scaled, x: Tensor) -> Tensor:
    x = activation(self.conv(x)) * (self.factor + 1)
    return self.head(x.mean((2, 3)).index_select(1, self.order))  # type: ignore[operator]


def foreign(*args: Any, **kwargs: Any) -> Tensor:
    return torch.relu(*args)


def _tied(model: Any) -> None:
    model.conv = nn.Conv2d(3, 3, 3, padding=1)
    model.head.weight, model.head.bias = nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3))
    model.conv.bias = model.head.bias


MODEL_CHANGES: dict[str, Callable[[Any], Any]] = {
    "an attribute": lambda m: setattr(m, "factor", 3.0),
    "its type": lambda m: setattr(m, "factor", 2),
    "within an attribute": lambda m: m.settings["names"].append("c"),
    "an attribute of a layer": lambda m: setattr(m.conv, "stride", (2, 2)),
    "a new attribute": lambda m: setattr(m, "more", None),
    "a shape": lambda m: setattr(m, "head", nn.Linear(4, CLASSES + 1)),
    "dtype": lambda m: m.double(),
    "strides": lambda m: m.to(memory_format=torch.channels_last),
    "requires_grad": lambda m: m.requires_grad_(False),
    "no bias": lambda m: setattr(m.head, "bias", None),
    "a class": lambda m: setattr(m, "head", nn.modules.linear.NonDynamicallyQuantizableLinear(4, CLASSES)),
    "an index": lambda m: m.order.copy_(torch.tensor([0, 1, 2, 3])),
    "mode": lambda m: m.conv.train(),
    "a module more": lambda m: m.add_module("more", nn.Identity()),
}


@pytest.mark.parametrize("change", MODEL_CHANGES)
def test_a_change_of_the_model_changes_the_key(change: str) -> None:
    model = Scaled().eval()
    before = key(model)
    MODEL_CHANGES[change](model)
    assert key(model) != before
    assert key(Scaled().eval()) == before


def test_tensors_that_are_one_are_told_from_tensors_that_are_two() -> None:
    one = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    two = copy.deepcopy(one)
    one[1].bias = one[0].bias
    assert key(one) != key(two)


CODE_CHANGES: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "forward": lambda patch: patch.setattr(Scaled, "forward", other_forward),
    "a function": lambda patch: patch.setitem(globals(), "activation", other_activation),
    "a switch": lambda patch: patch.setitem(globals(), "SWITCH", True),
    "a function of PyTorch": lambda patch: patch.setattr(F, "relu", foreign),
    "a function of a layer": lambda patch: patch.setattr(F, "linear", foreign),
    "a method of a layer": lambda patch: patch.setattr(nn.Conv2d, "_conv_forward", foreign),
    "a file": lambda patch: patch.setattr(model_key, "_digest", lambda *args: "another"),
    "torch's version": lambda patch: patch.setattr(torch, "__version__", "0.0"),
    "this package's version": lambda patch: patch.setattr("ramp_fast.__version__", "0.0", raising=False),
}


@pytest.mark.parametrize("change", CODE_CHANGES)
def test_a_change_of_code_changes_the_key(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Scaled().eval()
    before = key(model)
    CODE_CHANGES[change](monkeypatch)
    assert key(model) != before
    monkeypatch.undo()
    assert key(model) == before


def test_timms_switch_for_fused_attention_changes_the_key() -> None:
    fused = timm.layers.use_fused_attn()
    try:
        timm.layers.set_fused_attn(True)
        before = key(vit())
        timm.layers.set_fused_attn(False)
        assert key(vit()) != before
    finally:
        timm.layers.set_fused_attn(fused)


def test_settings_of_the_process_change_the_key() -> None:
    model = vit()
    keys = [key(model), key(model, (3, SIZE, 2 * SIZE)), key(model, strict=False)]
    with torch.autocast("cpu", torch.bfloat16):
        keys.append(key(model))
    with torch.inference_mode():
        keys.append(key(model))
    switches: list[tuple[Callable[[Any], Any], Any, Any]] = [
        (torch.set_default_dtype, torch.float64, torch.float32),
        (torch.backends.cuda.enable_flash_sdp, False, True),
        (torch.backends.cuda.enable_math_sdp, False, True),
        (torch.backends.mha.set_fastpath_enabled, False, True),
    ]
    for switch, value, usual in switches:
        switch(value)
        try:
            keys.append(key(model))
        finally:
            switch(usual)
    assert len(set(keys)) == len(keys)
    assert key(model) == keys[0]


def test_the_same_class_with_other_code_has_another_key() -> None:
    def made(sign: str) -> nn.Module:
        space: dict[str, Any] = {"nn": nn, "__name__": __name__}
        exec(f"class Net(nn.Module):\n    def forward(self, x):\n        return x.mean((2, 3)) {sign} 1\n", space)
        net: nn.Module = space["Net"]().eval()
        return net

    assert key(made("+")) == key(made("+"))
    assert key(made("+")) != key(made("-"))


def test_classes_of_one_name_are_told_apart() -> None:
    def made(factor: float) -> nn.Module:
        class Times(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x * factor

        return Times()

    one, two = made(2.0), made(3.0)
    assert key(nn.Sequential(one, two, one)) != key(nn.Sequential(one, two, two))
    one_again, same = made(2.0), type(one)()
    assert key(nn.Sequential(one, same)) != key(nn.Sequential(one, two))
    assert key(one) == key(one_again)


# What is not kept


class Constant(nn.Module):
    """A model with tensors that are no parameters: ``what`` says where they are."""

    def __init__(self, what: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(3, CLASSES)
        self.what = what
        if what == "attribute":
            self.shift = torch.ones(3)
        elif what == "object":
            self.shift = Holder()
        elif what == "module in a list":
            self.shift = [nn.Linear(3, 3)]

    def forward(self, x: Tensor) -> Tensor:
        x = x.mean((2, 3))
        if self.what == "attribute":
            x = x + self.shift  # type: ignore[operator]
        elif self.what == "object":
            x = x + self.shift.held  # type: ignore[union-attr,operator]
        elif self.what == "module in a list":
            x = self.shift[0](x)  # type: ignore[index]
        elif self.what == "global by another way":
            x = x + globals()["".join(["GLO", "BAL"])]
        elif self.what == "read":
            x = x * self.head.weight.detach().abs().max().item()
        return self.head(x)  # type: ignore[no-any-return]


class OfGlobal(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)) + GLOBAL


class Literal(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)) + torch.tensor([1.5, float("inf"), 2.5]).clamp(max=4)


class Holder:
    def __init__(self) -> None:
        self.held = torch.ones(3)


GLOBAL = torch.ones(3)


def hooked(model: nn.Module) -> nn.Module:
    model.register_forward_hook(lambda module, args, result: result * 2)
    return model


def with_own_forward(model: nn.Module) -> nn.Module:
    plain = model.forward
    model.forward = lambda x: plain(x) * 2  # type: ignore[method-assign]
    return model


def parametrized(model: Any) -> nn.Module:
    parametrizations.weight_norm(model[-1])
    return model  # type: ignore[no-any-return]


def with_generator(model: nn.Module) -> nn.Module:
    model.draws = torch.Generator()  # type: ignore[assignment]
    return model


NOT_KEPT: dict[str, Callable[[], nn.Module]] = {
    "a hook": lambda: hooked(vgg()),
    "a forward method of its own": lambda: with_own_forward(vgg()),
    "a parametrization": lambda: parametrized(vgg()),
    "a global": lambda: OfGlobal().eval(),
    "an opaque attribute": lambda: with_generator(vgg()),
    **{
        what: functools.partial(lambda what: Constant(what).eval(), what)
        for what in ("attribute", "object", "module in a list", "global by another way", "read")
    },
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("what", NOT_KEPT)
def test_models_that_cannot_be_kept_are_captured_every_time(
    what: str, folder: Path, exports: list[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = NOT_KEPT[what]()
    found = maps(model), maps(model)
    assert len(exports) >= 2
    assert not folder.exists()
    monkeypatch.delenv(CACHE_VARIABLE)
    without = maps(model)
    assert torch.equal(found[0], without)
    assert torch.equal(found[1], without)


def test_numbers_that_a_model_makes_tensors_of_are_kept(folder: Path, exports: list[nn.Module]) -> None:
    model = Literal().eval()
    assert torch.equal(maps(model), maps(model))
    assert len(exports) == 1


def test_generic_operations_warn_every_time(folder: Path, exports: list[nn.Module]) -> None:
    class Rounding(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.special.bessel_j0(x).mean((2, 3))

    for _ in range(2):
        with pytest.warns(UserWarning, match="outside the vocabulary"):
            capture(Rounding().eval(), SHAPE, strict=False)
    assert len(exports) == 2


# Files that are not what they should be


@pytest.fixture
def filled(folder: Path, exports: list[nn.Module]) -> Path:
    capture(vgg(), SHAPE)
    exports.clear()
    return only_file(folder)


def _damaged() -> Iterator[tuple[str, Callable[[Path], Any]]]:
    yield "truncated", lambda path: path.write_bytes(path.read_bytes()[:-50])
    yield "empty", lambda path: path.write_bytes(b"")
    yield "one byte", lambda path: path.write_bytes(path.read_bytes().replace(b"relu", b"gelu", 1))
    yield "no text", lambda path: path.write_bytes(bytes(range(256)))
    yield "foreign", lambda path: path.write_text('{"nodes": []}')
    yield "newer", lambda path: rewritten(path, lambda d: d.update(format=graph_cache.FORMAT + 1))
    yield "another's", lambda path: rewritten(path, lambda d: d.update(key="0" * 64))
    yield "no graph", lambda path: rewritten(path, lambda d: d.update(graph={"nodes": 3}))
    yield "no node", lambda path: rewritten(path, lambda d: d["graph"].update(output=10**6))
    yield "no weight", lambda path: rewritten(path, lambda d: _leaf(d).__setitem__("params", ["gone", None]))
    yield "another graph", lambda path: rewritten(path, _without_relu)
    yield "no shapes", lambda path: rewritten(path, _without_shapes)
    yield "other weights", lambda path: rewritten(path, lambda d: _leaf(d).__setitem__("params", ["4.weight", None]))


def _leaf(document: Any) -> Any:
    return next(n for n in document["graph"]["nodes"] if n["kind"] == "param")


def _without_relu(document: Any) -> None:
    node = next(n for n in document["graph"]["nodes"] if n["target"] == "aten.relu.default")
    node["target"] = "aten.gelu.default"


def _without_shapes(document: Any) -> None:
    for node in document["graph"]["nodes"]:
        node["example"] = None


DAMAGED = dict(_damaged())


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_files_are_as_good_as_none(damage: str, filled: Path, exports: list[nn.Module]) -> None:
    sound = filled.read_bytes()
    DAMAGED[damage](filled)
    assert filled.read_bytes() != sound
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        capture(vgg(), SHAPE)
    assert len(exports) == 1
    assert only_file(filled.parent).read_bytes() == sound  # it is written again
    capture(vgg(), SHAPE)
    assert len(exports) == 1


@pytest.mark.parametrize(
    "name",
    ["os.system", "aten.from_file.default", "aten.relu_.default", "aten.relu", "prims.sin.default", "operator.iadd"],
)
def test_nothing_but_known_operations_is_called(name: str, filled: Path) -> None:
    document = json.loads(filled.read_text().partition("\n")[2])
    node = next(n for n in document["graph"]["nodes"] if n["target"] == "aten.relu.default")
    weights = dict(vgg().named_parameters())
    decode(document["graph"], weights)
    node["target"] = name
    with pytest.raises(Exception, match=r"operation|unpack|attribute"):
        decode(document["graph"], weights)


@pytest.mark.parametrize("why", ["a file in the folder's place", "a full disk"])
def test_what_cannot_be_written_is_said_once(
    why: str, folder: Path, exports: list[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    if why == "a full disk":
        monkeypatch.setattr(graph_cache, "write_whole", full)
    else:
        folder.write_text("")
    with pytest.warns(RuntimeWarning, match=CACHE_VARIABLE):
        found = maps(vgg())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        maps(resnet())
    assert len(exports) == 2
    monkeypatch.delenv(CACHE_VARIABLE)
    assert torch.equal(found, maps(vgg()))


# Models that need more than their graph


class Branching(nn.Module):
    """A model with something more for one image, which may be nothing."""

    def __init__(self, more: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(3, CLASSES)
        self.more = nn.Parameter(torch.full((3,), more))

    def forward(self, x: Tensor) -> Tensor:
        x = x.mean((2, 3))
        if x.shape[0] == 5:
            x = x * (1 + self.more)
        return self.head(x)  # type: ignore[no-any-return]


def test_decisions_by_the_size_of_the_batch_are_looked_at_again(folder: Path, exports: list[nn.Module]) -> None:
    capture(Branching(0.0).eval(), SHAPE)
    only_file(folder)
    with pytest.raises(UnsupportedModelError, match="decides by the size of the batch"):
        capture(Branching(1.0).eval(), SHAPE)


def test_probabilities_are_left_out_of_graphs_that_were_read(folder: Path, exports: list[nn.Module]) -> None:
    model = nn.Sequential(vgg(), nn.Softmax(1)).eval()
    assert [capture(model, SHAPE).ending for _ in range(2)] == [("softmax",)] * 2
    assert len(exports) == 1


def test_models_in_bfloat16_have_the_same_maps(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = vit().bfloat16()
    found = [maps(model) for _ in range(2)]
    monkeypatch.delenv(CACHE_VARIABLE)
    without = maps(model)
    assert all(torch.equal(one, without) for one in found)


def test_models_of_one_image_at_a_time_are_kept(folder: Path, exports: list[nn.Module]) -> None:
    class OneByOne(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(3, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([self.head(image.mean((1, 2))) for image in x])

    torch.manual_seed(0)
    model = OneByOne().eval()
    first, count = maps(model), len(exports)
    assert torch.equal(maps(model), first)
    assert len(exports) == count
