"""What stands between operations and library routines."""

from __future__ import annotations

import pytest
import torch
from small_models import FAMILIES, images
from timm.models.resnet import Bottleneck, ResNet
from torch import Tensor

from ramp_fast import Engine, gemm, ops
from ramp_fast.rules.base import Values


@pytest.mark.parametrize(("rows", "sizes"), [(1, [1, 1, 1]), (7, [1, 1, 1]), (8, [3])])
def test_samples_with_few_rows_go_alone(rows: int, sizes: list[int]) -> None:
    seen: list[int] = []

    def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        seen.append(a.shape[1])
        return a + b

    a, b = torch.randn(2, 3, rows, 5), torch.randn(2, 3, rows, 5)
    assert torch.equal(gemm.by_sample(product, rows, (a, b), 1), a + b)
    assert seen == sizes


def test_the_head_sees_one_sample_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []
    plain = gemm.Matrix.__call__

    def watched(self: gemm.Matrix, x: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(x.shape))
        return plain(self, x)

    monkeypatch.setattr(gemm.Matrix, "__call__", watched)
    # Of float64, whose products do not say that rows do not see each other.
    Engine(FAMILIES["vit"](), precision="float64", micro_batch=4).attribute(images(4), 3)
    heads = [shape for shape in seen if len(shape) == 2]  # class token only
    assert heads
    assert all(shape[0] == 1 for shape in heads)


@pytest.mark.skipif(not ops.has_tiles(), reason="products on tile registers (AMX) only")
@pytest.mark.parametrize("stride", [1, 2])
def test_convolutions_of_pixels_are_products(stride: int) -> None:
    torch.manual_seed(0)
    weight, bias, x = torch.randn(5, 130, 1, 1), torch.randn(5), torch.randn(2, 130, 7, 6)
    geometry = gemm.Geometry([stride, stride], [0, 0], [1, 1], 1)
    forward = gemm.convolution(weight, bias, geometry)
    assert forward.kernel == "product-float32"
    expected = torch.nn.functional.conv2d(x, weight, bias, stride)
    for batch in (x, x.contiguous(memory_format=torch.channels_last)):
        y = forward(batch)
        assert y.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-4)

    other = gemm.Geometry([stride, stride], [1, 0], [1, 1], 1)  # padded
    assert gemm.convolution(weight, bias, other).kernel == "onednn-float32"
    assert gemm.convolution(weight[:, :100], bias, geometry).kernel == "onednn-float32"  # few channels
    assert gemm.convolution(weight.bfloat16(), bias, geometry).kernel == "onednn-bfloat16"
    pull = gemm.ConvPullback(torch.randn(130, 3, 1, 1), gemm.Geometry([1, 1], [0, 0], [1, 1], 1), (7, 6))
    assert pull.kernel == "product-float32"
    assert pull(x).shape == (2, 3, 7, 6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_convolution_adds_and_cuts_as_it_is_told(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(6, 4, 3, 3, dtype=dtype), torch.randn(6, dtype=dtype)
    x, addend = torch.randn(2, 4, 9, 8, dtype=dtype), torch.randn(2, 6, 5, 4, dtype=dtype)
    plain = torch.nn.functional.conv2d(x, weight, bias, 2, 1)
    geometry = gemm.Geometry([2, 2], [1, 1], [1, 1], 1)
    before = addend.clone()
    for relu in (False, True):
        forward = gemm.ConvForward(weight, bias, geometry, relu)
        for extra in ((), (addend,)):
            expected = sum(extra, plain)
            torch.testing.assert_close(forward(x, *extra), expected.relu() if relu else expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(addend, before)


@pytest.mark.parametrize("relu", [False, True])
def test_convolution_to_a_single_pixel_and_what_follows(relu: bool) -> None:
    torch.manual_seed(0)
    weight, bias, x, addend = (
        torch.randn(16, 8, 1, 1),
        torch.randn(16),
        torch.randn(3, 8, 2, 2),
        torch.randn(3, 16, 1, 1),
    )
    forward = gemm.ConvForward(weight, bias, gemm.Geometry([2, 2], [0, 0], [1, 1], 1), relu)
    expected = torch.nn.functional.conv2d(x, weight, bias, 2) + addend
    torch.testing.assert_close(forward(x, addend), expected.relu() if relu else expected)


@pytest.mark.parametrize("relu", [False, True])
def test_a_convolution_of_pixels_adds_and_cuts_as_it_is_told(relu: bool) -> None:
    torch.manual_seed(0)
    weight, bias, x, addend = torch.randn(6, 4, 1, 1), torch.randn(6), torch.randn(2, 4, 9, 8), torch.randn(2, 6, 5, 4)
    plain = torch.nn.functional.conv2d(x, weight, bias, 2)
    forward, before = gemm.PixelForward(weight, bias, [2, 2], relu), addend.clone()
    for extra in ((), (addend,)):
        expected = sum(extra, plain)
        torch.testing.assert_close(forward(x, *extra), expected.relu() if relu else expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(addend, before)


@pytest.mark.parametrize("stride", [(2, 2), (1, 2), (3, 2)])
@pytest.mark.parametrize("size", [(7, 8), (6, 5)])
def test_strided_pixels_are_pulled_back_as_a_convolution_with_zeros_between(
    stride: tuple[int, int], size: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    weight = torch.randn(5, 4, 1, 1)
    rows, columns = (-(-n // s) for n, s in zip(size, stride, strict=True))
    c = torch.randn(3, 5, rows, columns)
    pull = gemm.ConvPullback(weight, gemm.Geometry(list(stride), [0, 0], [1, 1], 1), size)
    assert "transposed" not in pull.kernel
    expected = torch.nn.grad.conv2d_input((3, 4, *size), weight, c, stride)
    torch.testing.assert_close(pull(c), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding"),
    [((7, 7), (2, 2), (3, 3)), ((3, 3), (2, 2), (1, 1)), ((3, 5), (1, 3), (0, 2)), ((2, 2), (3, 3), (0, 0)),
     ((4, 4), (2, 2), (0, 0)), ((1, 1), (2, 1), (0, 0)), ((3, 3), (1, 1), (2, 2)), ((5, 5), (2, 2), (0, 4))],
)  # fmt: skip
@pytest.mark.parametrize("size", [(14, 17), (9, 8)])
def test_phases_are_the_transposed_convolution_of_the_sign_s_half(
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    size: tuple[int, int],
    dtype: torch.dtype,
) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(4, 3, *kernel, dtype=dtype), torch.randn(2, 3, *size, dtype=dtype)
    x[:, :, ::3, ::2] = 0
    geometry = gemm.Geometry(list(stride), list(padding), [1, 1], 1)
    assert gemm.SubpixelSelection.pays(weight, geometry)
    outputs = torch.nn.functional.conv2d(x, weight, stride=stride, padding=padding).shape[2:]
    c = torch.randn(2, 2, 4, *outputs, dtype=dtype)
    phases = gemm.SubpixelSelection(weight, geometry, size)
    pulled = phases.select(phases(c), x)
    for side, found in zip(c, pulled, strict=True):
        halves = [
            torch.nn.grad.conv2d_input(x.shape, half, side, stride, padding)
            for half in (weight.clamp_min(0), (-weight).clamp_min(0))
        ]
        expected = torch.where(x > 0, halves[0], halves[1]) * (x != 0)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "geometry",
    [
        gemm.Geometry([2, 2], [1, 1], [2, 2], 1),  # dilated
        gemm.Geometry([2, 2], [1, 1], [1, 1], 3),  # grouped
        gemm.Geometry([2, 2], [3, 1], [1, 1], 1),  # windows with nothing in them
        gemm.Geometry([4, 4], [1, 1], [1, 1], 1),  # many phases
    ],
)
def test_other_convolutions_are_not_pulled_back_in_phases(geometry: gemm.Geometry) -> None:
    assert not gemm.SubpixelSelection.pays(torch.zeros(6, 3, 3, 3), geometry)


def test_what_a_convolution_cannot_exceed() -> None:
    weight, bias = torch.tensor([[1.0, -2.0], [3.0, 0.5]]).view(2, 2, 1, 1), torch.tensor([0.25, -4.0])
    plain = gemm.ConvForward(weight, bias, gemm.Geometry([1, 1], [0, 0], [1, 1], 1))
    assert plain.reach == gemm.PixelForward(weight, bias, [1, 1]).reach == (3.5, 4.0)
    assert gemm.PixelForward(weight, None, [1, 1]).reach == (3.5, 0.0)


@pytest.mark.skipif(not gemm.fuses_convolutions(gemm.precision_for("mixed", torch.device("cpu")), torch.device("cpu")),
                    reason="no bfloat16, so that no ReLU is fused")  # fmt: skip
def test_bounds_are_known_and_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    # Wide enough for pointwise convolutions on tiles: each of them lost the bound, and the next ReLU measured again.
    torch.manual_seed(0)
    model = ResNet(Bottleneck, (1, 1, 1, 1), num_classes=3, channels=(32, 32, 32, 32)).eval()
    engine, images = Engine(model, input_shape=(3, 32, 32)), torch.randn(1, 3, 32, 32)
    measured = []
    measure = Values.measure
    monkeypatch.setattr(Values, "measure", lambda self, node: measured.append(node.kind) or measure(self, node))
    engine.attribute(images)
    assert measured == ["input"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(10, 48), (1000, 2 * 768)])
def test_rows_do_not_see_how_many_they_are(shape: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    matrix = gemm.Matrix(torch.randn(shape).to(dtype), torch.randn(shape[0]).to(dtype))
    x = torch.randn(20, shape[1]).to(dtype)
    whole = matrix(x)
    if matrix.independent:
        for count in (1, 2, 3, 7, 8, 13):
            assert torch.equal(matrix(x[:count]), whole[:count])
    else:
        assert not matrix.packed or ops.has_tiles()


@pytest.mark.parametrize("kernel", [(3, 3), (5, 4), (1, 7)])
@pytest.mark.parametrize("stride", [[1, 1], [2, 2], [1, 3]])
@pytest.mark.parametrize("positive_input", [False, True])
def test_depthwise_convolutions_and_their_transposes(
    kernel: tuple[int, int], stride: list[int], positive_input: bool
) -> None:
    torch.manual_seed(0)
    channels, size = 37, (13, 12)
    geometry = gemm.Geometry(stride, [kernel[0] // 2, kernel[1] // 2], [1, 1], channels)
    weight, bias = torch.randn(channels, 1, *kernel), torch.randn(channels)
    x = torch.randn(3, channels, *size)
    where = stride, geometry.padding, 1, channels
    assert geometry.depthwise(weight)
    for relu in (False, True):
        expected = torch.nn.functional.conv2d(x, weight, bias, *where)
        forward = gemm.convolution(weight, bias, geometry, relu)
        assert isinstance(forward, gemm.DepthwiseForward)
        addend = torch.randn_like(expected)
        for plus in (None, addend):
            sum_ = expected if plus is None else expected + plus
            torch.testing.assert_close(forward(x, plus), sum_.relu() if relu else sum_)
    c = torch.randn(2, *expected.shape)

    def pulled(w: Tensor) -> Tensor:
        leaf = x.clone().requires_grad_()
        y = torch.nn.functional.conv2d(leaf, w, None, *where)
        return torch.stack([torch.autograd.grad(y, leaf, side, retain_graph=True)[0] for side in c])

    upper, lower = pulled(weight.clamp_min(0)), pulled(weight.neg().clamp_min(0))
    found = gemm.DepthwisePullback(weight, geometry, size, positive_input)(c, None if positive_input else x)
    torch.testing.assert_close(found, upper if positive_input else torch.where(x > 0, upper, lower))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("groups", [1, 2, 36])
@pytest.mark.parametrize("kernel", [1, 3])
def test_one_weight_for_each_sign_of_an_image(stride: int, groups: int, kernel: int) -> None:
    """Against two convolutions of the parts, and autograd through them; the last groups are depthwise."""
    torch.manual_seed(0)
    channels, size = 36, (9, 8)
    geometry = gemm.Geometry([stride] * 2, [kernel // 2] * 2, [1, 1], groups)
    upper, lower = torch.randn(2, 36, channels // groups, kernel, kernel)
    bias = torch.randn(36)
    x = torch.randn(3, channels, *size)
    x[:, :, 2, 3:5] = 0
    where = geometry.stride, geometry.padding, 1, groups

    def pulled(w: Tensor, c: Tensor) -> Tensor:
        leaf = x.clone().requires_grad_()
        y = torch.nn.functional.conv2d(leaf, w, None, *where)
        return torch.stack([torch.autograd.grad(y, leaf, side, retain_graph=True)[0] for side in c])

    expected = torch.nn.functional.conv2d(x.clamp_min(0), upper, bias, *where)
    expected = expected + torch.nn.functional.conv2d(x.clamp_max(0), lower, None, *where)
    c = torch.randn(2, *expected.shape)
    chosen = torch.where(x > 0, pulled(upper, c), torch.where(x < 0, pulled(lower, c), 0.0))
    if geometry.depthwise(upper):
        forward: gemm.LinearOp = gemm.DepthwiseForward(upper, bias, geometry, negative=lower)
        found = gemm.DepthwisePullback.of([upper, lower], geometry, size)(c, x)
    else:
        forward = gemm.SidedForward(upper, lower, bias, geometry, expected.shape[2:], torch.float32)
        back = gemm.SidedPullback(upper, lower, geometry, size, torch.float32)
        found = back.select(back.function(c.flatten(0, 1)).unflatten(0, c.shape[:2]), x)
    for own in (x, x.contiguous(memory_format=torch.channels_last)):
        torch.testing.assert_close(forward(own), expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found, chosen, rtol=1e-5, atol=1e-4)


def test_one_weight_for_each_sign_of_a_row() -> None:
    torch.manual_seed(0)
    upper, lower = torch.randn(2, 11, 24)
    bias, x, c = torch.randn(11), torch.randn(3, 5, 24), torch.randn(2, 3, 5, 11)
    x[1, 2] = 0
    forward = gemm.SidedForward(upper, lower, bias, None, (), torch.float32)
    torch.testing.assert_close(forward(x), x.clamp_min(0) @ upper.t() + x.clamp_max(0) @ lower.t() + bias)
    back = gemm.SidedPullback(upper, lower, None, (), torch.float32)
    chosen = torch.where(x > 0, c @ upper, torch.where(x < 0, c @ lower, 0.0))
    torch.testing.assert_close(back.select(back.function(c), x), chosen)
