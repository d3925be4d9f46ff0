"""The plan: fused steps compute what the model computes, structural savings, liveness, and how it prints."""

from __future__ import annotations

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from ramp_fast import Engine, ops
from ramp_fast import graph as g
from ramp_fast.graph import BatchAxis
from ramp_fast.rules.masses import Massed, Masses


@pytest.fixture
def bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans as on a processor with bfloat16: only then convolutions compute what is behind them under "mixed"."""
    monkeypatch.setattr("ramp_fast.gemm.precision.cpu_has_bf16", lambda: True)


class Clamp(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.clamp(min=0)


ACTIVATIONS = [nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), nn.Hardtanh(0, 2.5), Clamp(), nn.SiLU()]


def conv_bn(activation: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5), activation, nn.Flatten(), nn.Linear(320, 4))
    norm = model[1]
    with torch.no_grad():
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        norm.weight.normal_(std=6)  # so that outputs pass 6, and gains have both signs
        norm.bias.normal_()
    return model.eval()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("precision", ["float64", "float32", "mixed"])
def test_batch_norm_and_its_activation_compute_what_the_model_computes(activation: nn.Module, precision: str) -> None:
    model = conv_bn(activation)
    images = torch.randn(2, 3, 8, 8)
    if precision == "float64":
        model, images = model.double(), images.double()
    with torch.no_grad():
        expected = model(images)
    logits = Engine(model, precision=precision).attribute(images).logits
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_relu_is_absorbed_by_batch_norm_only_where_nothing_else_reads_it() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = conv_bn(nn.ReLU())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.layers[1](self.layers[0](x))
            return self.layers[4]((y.relu() + y).flatten(1))  # type: ignore[no-any-return]

    def relus(engine: Engine) -> list[str]:
        return [s.operation.pullback_kernel for s in engine.plan.steps if s.node.kind == g.ACTIVATION]

    assert relus(Engine(conv_bn(nn.ReLU()), input_shape=(3, 8, 8))) == ["fused into 1"]
    assert relus(Engine(Shared().eval(), input_shape=(3, 8, 8))) == ["gate"]


class Residual(nn.Module):
    """A block with a projected shortcut and one without, as a ResNet has them; gains of both signs and zero."""

    def __init__(self, shortcut_first: bool = False, activation: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shortcut_first = shortcut_first
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1, bias=True), nn.BatchNorm2d(6), activation())
        self.first = nn.Sequential(nn.Conv2d(6, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8))
        self.projection = nn.Sequential(nn.Conv2d(6, 8, 1, 2, bias=False), nn.BatchNorm2d(8))
        self.second = nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), activation(), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        )
        self.activation = activation()
        self.head = nn.Linear(8, 5)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
                nn.init.normal_(module.running_mean, std=0.3)
                nn.init.uniform_(module.running_var, 0.5, 2)
                with torch.no_grad():
                    module.weight[1] = 0
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        if self.shortcut_first:
            y = self.projection(x)
            x = self.activation(self.first(x) + y)
        else:
            y = self.first(x)
            x = self.activation(y + self.projection(x))
        x = self.activation(self.second(x) + x)
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


def fused(engine: Engine) -> dict[str, str]:
    return {s.node.module: s.operation.forward_kernel for s in engine.plan.steps if s.node.kind == g.CONV}


@pytest.mark.usefixtures("bfloat16")
@pytest.mark.parametrize("shortcut_first", [False, True])
def test_convolutions_compute_the_batch_norms_and_sums_behind_them(shortcut_first: bool) -> None:
    model = Residual(shortcut_first)
    engine = Engine(model, input_shape=(3, 16, 16))
    kernels = {module: kernel.partition(" > ")[2] for module, kernel in fused(engine).items()}
    # The operand that is computed last takes the sum along.
    last, other = ("first.0", "projection.0") if shortcut_first else ("projection.0", "first.0")
    assert kernels == {
        "stem.0": "batch_norm > relu",
        last: "batch_norm > add > relu",
        other: "batch_norm",
        "second.0": "batch_norm > relu",
        "second.3": "batch_norm > add > relu",
    }
    steps = {s.node.module: s.operation for s in engine.plan.steps if s.node.kind == g.BATCH_NORM}
    in_sums = {last.replace(".0", ".1"): "add", "second.4": "add_1"}
    assert {m: op.pullback_kernel for m, op in steps.items()} == {
        m: f"fused into {in_sums[m]}" if m in in_sums else "affine_pullback" for m in steps
    }
    # Nothing but the results is kept for them.
    assert not any(op.keeps() for op in steps.values())


@pytest.mark.parametrize("contrast", ["none", "others"])
@pytest.mark.parametrize(
    ("shortcut_first", "activation"),
    [
        (True, nn.ReLU),
        *((False, own) for own in (nn.ReLU, nn.GELU, nn.SiLU, nn.Hardswish, nn.Sigmoid, nn.Hardsigmoid)),
    ],
)
def test_maps_are_those_of_separate_steps(
    shortcut_first: bool, activation: type[nn.Module], contrast: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Residual(shortcut_first, activation)
    images = torch.randn(3, 3, 16, 16)
    images[0, :, :5] = 0
    apart = Engine(model, precision="float32", input_shape=(3, 16, 16))
    assert not any(" > " in kernel for kernel in fused(apart).values())
    monkeypatch.setattr("ramp_fast.rules.fusion.fuses_convolutions", lambda precision, device: True)
    together = Engine(model, precision="float32", input_shape=(3, 16, 16))
    assert all(" > " in kernel for kernel in fused(together).values())
    a, b = (e.attribute(images, contrast=contrast) for e in (together, apart))
    torch.testing.assert_close(a.logits, b.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(a.maps, b.maps, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "model"),
    [
        ({"precision": "float64"}, Residual()),
        ({"precision": "float32"}, Residual()),
        ({}, Residual(activation=nn.ReLU6)),  # what was cut says nothing
        ({"rule": "abslrp-release"}, Residual()),
    ],
)
def test_sums_are_computed_apart_where_their_results_do_not_tell_enough(
    options: dict[str, str], model: nn.Module
) -> None:
    assert not any("add" in kernel for kernel in fused(Engine(model, input_shape=(3, 16, 16), **options)).values())


class Tail(nn.Module):
    """A residual sum, and what a function makes of it."""

    def __init__(self, read: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.read = read
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.readers = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(3))
        self.head = nn.Linear(4, 3)
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        y = self.norm(self.conv(x))
        if self.read == "three readers":
            z = (y + x).relu()
            z = sum(reader(z) for reader in self.readers)  # type: ignore[assignment]
        elif self.read == "detached":
            z = self.readers[0](x) / ((y + x).relu() + 1)
        elif self.read == "doubled":
            z = (y + y).relu()
        elif self.read == "also alone":
            alone = y.relu()
            z = (y + x).relu() + alone
        elif self.read == "twice the same":  # with a ReLU and without
            z = self.norm(self.conv(y.relu() + x)) + x
        return self.head(z.mean((2, 3)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("read", ["three readers", "detached", "doubled", "also alone", "twice the same"])
def test_sums_that_are_read_in_other_ways(read: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = Tail(read), torch.randn(2, 3, 8, 8)
    # Not scaled to 1: where all relevance goes one way P and N are the same map, and their difference is rounding.
    exact = Engine(model.double(), precision="float64").attribute(images.double(), normalize="none")
    monkeypatch.setattr("ramp_fast.rules.fusion.fuses_convolutions", lambda precision, device: True)
    result = Engine(model.float(), precision="float32").attribute(images, normalize="none")
    with torch.no_grad():
        torch.testing.assert_close(result.logits, model(images), rtol=1e-4, atol=1e-5)
    assert exact.maps.abs().amax() > 1e-3
    torch.testing.assert_close(result.maps, exact.maps.float(), rtol=1e-3, atol=1e-6)


def test_what_leaves_a_batch_norm_is_centred() -> None:
    y, gain, shift = torch.randn(1, 3, 8, 8), torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.0, 0.5, -0.5])
    p = torch.rand(1, 1, 3, 8, 8)
    part = Massed(torch.cat((p, p - 100 * p)), torch.ones(2, 1))  # N is 100 P
    pulled = Masses(1, 2, True).affine(part, y, gain, shift, True)
    own = 2 * (y > 0) * gain.abs().view(3, 1, 1) * (1 + (y - shift.view(3, 1, 1)).sign())
    assert pulled.centred
    torch.testing.assert_close(pulled.c[0], own * p[0])
    torch.testing.assert_close(pulled.c[1], torch.zeros_like(p[0]), rtol=0, atol=1e-5)  # N has become P


def test_masses_of_samples_that_lie_side_by_side() -> None:
    """As a mean over tokens of one feature spreads its coefficients."""
    x = torch.randn(3, 4, 1)
    c = torch.randn(2, 3, 1).unsqueeze(2).expand(2, 3, 4, 1)
    assert c.stride(1) == 1
    torch.testing.assert_close(Masses(3, 2, False).mass(x, c, BatchAxis()), (x * c).abs().sum((2, 3)))


def test_convolutions_are_not_fused_without_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ramp_fast.gemm.precision.cpu_has_bf16", lambda: False)
    assert not any(" > " in kernel for kernel in fused(Engine(Residual(), input_shape=(3, 16, 16))).values())


@pytest.mark.usefixtures("bfloat16")
def test_convolutions_are_fused_where_coefficients_are_bfloat16() -> None:
    assert all(" > " in kernel for kernel in fused(Engine(Residual(), input_shape=(3, 16, 16))).values())


@pytest.mark.usefixtures("bfloat16")
def test_what_convolutions_compute_as_well_is_counted_once() -> None:
    plan = Engine(Residual(), input_shape=(3, 16, 16)).plan
    steps = [s for s in plan.steps if s.operation is not None and s.operation.fusion.fused_into is not None]
    assert len(steps) == 11  # five BatchNorms, two sums, four ReLUs
    assert not any(plan.kept_bytes(s) for s in steps)


def test_a_convolution_with_two_readers_computes_nothing_else() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = conv_bn(nn.ReLU())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.layers[0](x)
            return self.layers[4]((self.layers[1](y).relu() + y).flatten(1))  # type: ignore[no-any-return]

    assert not any(" > " in kernel for kernel in fused(Engine(Shared().eval(), input_shape=(3, 8, 8))).values())


def small_vit(**options: object) -> VisionTransformer:
    torch.manual_seed(0)
    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
    return VisionTransformer(**{**arguments, **options}).eval()


def shapes(engine: Engine, kind: str) -> list[tuple[int | str, ...]]:
    return [step.node.shape for step in engine.plan.steps if step.node.kind == kind]


def test_the_last_block_of_a_vit_computes_the_class_token_only() -> None:
    engine = Engine(small_vit(), input_shape=(3, 32, 32))
    assert shapes(engine, g.ATTENTION) == [("batch", 3, 17, 8), ("batch", 3, 1, 8)]
    hidden = [s for s in shapes(engine, g.LINEAR) if s[-1] == 96]
    assert hidden == [("batch", 17, 96), ("batch", 1, 96)]


def test_average_pooling_over_patches_leaves_out_the_class_token_only() -> None:
    engine = Engine(small_vit(global_pool="avg"), input_shape=(3, 32, 32))
    assert shapes(engine, g.ATTENTION) == [("batch", 3, 17, 8), ("batch", 3, 16, 8)]


def test_non_negative_and_gated_inputs_need_only_the_positive_weights() -> None:
    text = str(Engine(small_vit(), input_shape=(3, 32, 32), precision="float32").plan)
    row = {line.split()[1]: line for line in text.splitlines() if line.startswith("linear")}
    assert "W+/W-" in row["blocks.0.attn.qkv"]
    assert "W+/W-" in row["blocks.0.mlp.fc1"]
    for gated in ("blocks.0.attn.proj", "blocks.0.mlp.fc2", "head"):
        assert "W+" in row[gated]
        assert "W-" not in row[gated]


def test_equal_shares_do_not_gate_the_head_outputs() -> None:
    text = str(Engine(small_vit(), "abslrp-release", input_shape=(3, 32, 32), precision="float32").plan)
    row = next(line for line in text.splitlines() if "blocks.0.attn.proj" in line)
    assert "W+/W-" in row


def test_values_are_dropped_once_nobody_needs_them() -> None:
    plan = Engine(small_vit(), input_shape=(3, 32, 32)).plan
    dropped = [n for step in plan.steps for n in (*step.drop_forward, *step.drop_pullback)]
    assert len(dropped) == len(set(dropped))
    variable = {step.node for step in plan.steps if not step.node.constant}
    assert variable - set(dropped) <= {plan.graph.output}


def test_the_plan_prints_operations_modules_shapes_kernels_and_bytes() -> None:
    text = str(Engine(small_vit(), input_shape=(3, 32, 32)).plan)
    for part in ("attention", "blocks.1.mlp.fc1", "batchx17x96", "linear_pullback", "activation_factor", "KB"):
        assert part in text


def test_weight_bytes_are_those_of_the_packed_weights() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 7)).eval()
    plan = Engine(model, precision="float32", input_shape=(3, 2, 2)).plan
    # float32: forward (on tile registers three tiles of digits and a block of scales), and for the pull-back one panel
    # of 32 columns, of which 12 are used
    forward = (3 + 1) * 1024 if ops.has_tiles() else 12 * 7 * 4
    assert plan.weight_bytes == forward + 32 * 7 * 4


def test_engines_of_one_model_share_their_packed_weights() -> None:
    def maps(engine: Engine) -> dict[str, object]:
        return {s.node.module: s.operation.layer for s in engine.plan.steps if s.node.kind == g.LINEAR}

    model = small_vit()
    first, second = (Engine(model, input_shape=(3, 32, 32)) for _ in range(2))
    other = Engine(small_vit(), input_shape=(3, 32, 32))
    wider = Engine(model, input_shape=(3, 32, 32), precision="float64")
    assert all(maps(first)[name] is pack for name, pack in maps(second).items())
    assert not set(map(id, maps(first).values())) & set(map(id, (*maps(other).values(), *maps(wider).values())))
    images = torch.zeros(1, 3, 32, 32)
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight.mul_(2)
    before = maps(second)
    first.attribute(images)
    changed = [name for name, pack in before.items() if maps(first)[name] is not pack]
    assert changed == ["blocks.0.mlp.fc1"]
