"""What holds for every operator: opcheck, layouts, independence of threads and of the batch, clear errors."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, LARGE, Options, as_tuple, batch_axes, need_kernel, of_sample
from torch import Tensor

from ramp_fast import ops
from ramp_fast.ops._registry import extension


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", CASES)
def test_opcheck(name: str, dtype: torch.dtype, backend: str) -> None:
    if ops.unavailable(backend):
        pytest.skip(ops.unavailable(backend))
    ops.set_backend(backend)
    x_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    args = CASES[name].arguments(Options(c_dtype=dtype, x_dtype=x_dtype, seed=1))
    torch.use_deterministic_algorithms(False)  # opcheck compares freshly allocated fakes
    checks = ["test_schema", "test_faketensor"]
    if dtype == torch.float32:  # these take longest, and trace the same program whatever the dtype
        checks += ["test_autograd_registration", "test_aot_dispatch_dynamic"]
    torch.library.opcheck(getattr(torch.ops.ramp_fast, name).default, args, test_utils=checks)


@pytest.mark.parametrize("isa", ops.cpu_isas())
@pytest.mark.parametrize("name", CASES)
def test_threads_do_not_matter(name: str, isa: str) -> None:
    need_kernel(name, isa)
    ops.set_backend("cpu")
    ops.set_cpu_isa(isa)
    args = CASES[name].arguments(LARGE)
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        results.append(as_tuple(getattr(ops, name)(*args)))
    for other in results[1:]:
        for expected, actual in zip(results[0], other, strict=True):
            assert torch.equal(expected, actual)


@pytest.mark.parametrize("isa", ops.cpu_isas())
@pytest.mark.parametrize("name", CASES)
def test_the_rest_of_the_batch_does_not_matter(name: str, isa: str) -> None:
    need_kernel(name, isa)
    ops.set_backend("cpu")
    ops.set_cpu_isa(isa)
    args = CASES[name].arguments(LARGE)
    whole = as_tuple(getattr(ops, name)(*args))
    for first, last in [(0, 1), (2, 3), (1, 4)]:
        part = as_tuple(getattr(ops, name)(*of_sample(args, name, first, last)))
        for expected, actual, axis in zip(whole, part, batch_axes(name, len(whole)), strict=True):
            assert torch.equal(expected.narrow(axis, first, last - first), actual)


ELEMENTWISE = ["mass", "rescale", "merge", "junction", "merge_junction", "scale_by", "gate"]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_channels_last_stays_channels_last(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if ops.unavailable(backend):
        pytest.skip(ops.unavailable(backend))
    ops.set_backend(backend)
    args = CASES[name].arguments(Options(inner=(6, 5, 7)))
    expected = as_tuple(getattr(ops, name)(*args))
    moved = [a.movedim(-3, -1).contiguous().movedim(-1, -3) if _is_map(a) else a for a in args]
    if backend == "cpu":
        monkeypatch.setattr(Tensor, "contiguous", _only_small(Tensor.contiguous))
    actual = as_tuple(getattr(ops, name)(*moved))
    monkeypatch.undo()
    for e, a in zip(expected, actual, strict=True):
        torch.testing.assert_close(a, e)
        if _is_map(a):
            assert a.movedim(-3, -1).is_contiguous()


def _is_map(value: object) -> bool:
    return isinstance(value, Tensor) and value.ndim > 3


def _only_small(contiguous):  # type: ignore[no-untyped-def]
    def checked(self: Tensor) -> Tensor:
        assert not _is_map(self), "a tensor was copied"
        return contiguous(self)

    return checked


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", CASES)
def test_strided_arguments(name: str, backend: str) -> None:
    # a transposed coefficient, an expanded x, every other element: whatever the caller has
    if ops.unavailable(backend):
        pytest.skip(ops.unavailable(backend))
    ops.set_backend(backend)
    args = CASES[name].arguments(Options(inner=(6, 5, 7), rows=(5, 33)))
    expected = as_tuple(getattr(ops, name)(*args))
    for strided in (_every_other, _transposed):
        actual = as_tuple(getattr(ops, name)(*[strided(a) if isinstance(a, Tensor) else a for a in args]))
        for e, a in zip(expected, actual, strict=True):
            torch.testing.assert_close(a, e)


def _every_other(value: Tensor) -> Tensor:
    return value.repeat_interleave(2, -1)[..., ::2]


def _transposed(value: Tensor) -> Tensor:
    return value.transpose(0, -1).contiguous().transpose(0, -1)


def test_the_batch_may_be_inside_the_channels() -> None:
    # dense and equal strides, but samples are not outermost: must not be taken for [T, B, elements]
    c = torch.randn(2, 3, 4, 5).transpose(1, 2).contiguous().transpose(1, 2)
    x = torch.randn(3, 4, 5).transpose(0, 1).contiguous().transpose(0, 1)
    torch.testing.assert_close(ops.mass(x, c, False), ops.mass(x.contiguous(), c.contiguous(), False))


def _attention_of(
    keys: tuple[int, ...] = (1, 2, 5, 4),
    coefficients: tuple[int, ...] = (2, 1, 2, 3, 4),
    bias: tuple[int, ...] | None = None,
    junction: bool = False,
) -> tuple[Tensor, ...]:
    q, k, c = torch.zeros(1, 2, 3, 4), torch.zeros(keys), torch.zeros(coefficients)
    return ops.attention_pullback(q, k, k, q, c, 1.0, True, True, None if bias is None else torch.zeros(bias), junction)


def _gradient_of(
    keys: tuple[int, ...] = (1, 2, 5, 4),
    coefficients: tuple[int, ...] = (2, 1, 2, 3, 4),
    bias: tuple[int, ...] | None = None,
) -> tuple[Tensor, ...]:
    q, k, c = torch.zeros(1, 2, 3, 4), torch.zeros(keys), torch.zeros(coefficients)
    return ops.attention_gradient(q, k, k, c, 1.0, 0.5, 0.25, None if bias is None else torch.zeros(bias))


def _piece_masses_of(widths: list[int], x: tuple[int, ...] = (1, 5, 4)) -> Tensor:
    return ops.piece_masses(torch.zeros(2, 1, 5, 4), torch.zeros(x), widths, True)


def _merged_of(*pieces: tuple[int, ...], scales: tuple[int, ...] = (2, 2, 1)) -> Tensor:
    return ops.merge_pieces([torch.zeros(shape) for shape in pieces], torch.ones(scales), True)


def _rescaled_of(*pieces: tuple[int, ...], scales: tuple[int, ...] = (2, 2, 1)) -> Tensor:
    return ops.rescale_pieces([torch.zeros(shape) for shape in pieces], torch.ones(scales), True)


def _gating_of(
    b: tuple[int, ...] = (1, 5, 4), x: tuple[int, ...] | None = None, factor: tuple[int, ...] | None = None
) -> tuple[Tensor, ...]:
    further = (None if shape is None else torch.zeros(shape) for shape in (x, factor))
    return ops.gating_pullback(torch.zeros(2, 1, 5, 4), torch.zeros(1, 5, 4), torch.zeros(b), *further, True)


def _turned_of(
    stay: tuple[int, ...] = (1, 5, 4),
    cross: tuple[int, ...] = (1, 5, 4),
    pair: int = 2,
    y: tuple[int, ...] | None = None,
    target: tuple[int, ...] = (2, 1),
) -> tuple[Tensor, Tensor]:
    x = torch.zeros(1, 3, 5, 4)
    own = None if y is None else torch.zeros(y)
    weights = torch.zeros(stay), torch.zeros(cross)
    return ops.rotary_pullback(torch.zeros(2, *x.shape), x, own, *weights, pair, torch.ones(target), True)


def _residual_of(
    z: tuple[int, ...] = (1, 3, 4), gain: int = 4, second: tuple[int, ...] = (2, 1, 3, 4)
) -> tuple[Tensor, ...]:
    c, scale, b = torch.zeros(2, 1, 3, 4), torch.ones(2, 1), torch.zeros(1, 3, 4)
    numbers = torch.zeros(gain), torch.zeros(4)
    return ops.residual_pullback(c, scale, torch.zeros(second), scale, torch.zeros(z), b, *numbers, True)


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        (lambda: ops.mass(torch.zeros(2, 5), torch.zeros(3, 2, 5), True), "must be even"),
        (lambda: ops.mass(torch.zeros(2, 4), torch.zeros(2, 2, 5), False), "do not fit"),
        (lambda: ops.mass(torch.zeros(5), torch.zeros(5), False), r"must be \[T, B"),
        (lambda: ops.rescale(torch.zeros(2, 2, 5), torch.zeros(2, 3), False), "must have shape"),
        (lambda: ops.rescale_parts(torch.zeros(2, 2, 5), torch.zeros(2, 2, 5), False), r"must be \[T, B, rows, parts"),
        (lambda: ops.rescale_parts(torch.zeros(2, 2, 4, 3, 5), torch.zeros(2, 2, 5), False), "must have shape"),
        (lambda: ops.junction(torch.zeros(2, 2, 5), torch.zeros(2, 5), torch.zeros(2, 6), False), "do not fit"),
        (lambda: ops.norm_pullback(torch.zeros(2, 2, 5), torch.zeros(2, 5), torch.zeros(4), 1e-6), "must have shape"),
        (
            lambda: ops.linear_norm_pullback(
                torch.zeros(3, 2, 5), ops.pack_panels(torch.zeros(5, 4)), torch.zeros(2, 4), None, None, 1e-6, True
            ),
            "must be even",
        ),
        (
            lambda: ops.linear_pullback(
                torch.zeros(2, 2, 5), ops.pack_panels(torch.zeros(6, 4)), torch.zeros(2, 4), torch.float32
            ),
            r"panels .* must have shape \[1, 5, 32, 1\]",
        ),
        (lambda: ops.scale_by(torch.zeros(2, 2, 5), torch.zeros(3, 5)), "do not fit"),
        (lambda: ops.scale_by(torch.zeros(2, 2, 5), torch.zeros(2, 5), torch.zeros(2, 2)), "must have shape"),
        (lambda: ops.gate(torch.zeros(3, 2, 5), torch.zeros(2, 5), torch.zeros(1, 2)), "must be even"),
        (
            lambda: ops.affine_pullback(
                torch.zeros(2, 2, 5, 4), torch.zeros(2, 5, 4), torch.zeros(5), torch.zeros(4), False
            ),
            r"gain .* must have shape \[4\]",
        ),
        (lambda: ops.centring(torch.zeros(3, 2, 5)), "must be even"),
        (lambda: ops.centring(torch.zeros(2, 2, 5), torch.zeros(2, 6)), "do not fit"),
        (lambda: _residual_of(z=(1, 3, 5)), "do not fit"),
        (lambda: _residual_of(gain=3), r"gain .* must have shape \[4\]"),
        (lambda: _residual_of(second=(2, 1, 3, 5)), "do not fit"),
        (
            lambda: ops.unpool(
                torch.zeros(2, 1, 3, 3, 4), torch.zeros(1, 3, 2, 4, dtype=torch.int32), 6, 6, [2, 2], [2, 2], [0, 0]
            ),
            "do not fit",
        ),
        (lambda: ops.select_phases(torch.zeros(2, 1, 2, 2, 2, 2, 2, 3), torch.zeros(1, 5, 4, 3), 0, 0), "is not in"),
        (
            lambda: ops.select_phases(torch.zeros(1, 1, 4, 4, 2, 2, 2, 1), torch.zeros(1, 8, 8, 1), 2**63 - 1, 0),
            "not in",
        ),
        (lambda: ops.sides(torch.zeros(2, 5), 2, torch.float32), "2 groups"),
        (lambda: ops.mul_gradient(torch.zeros(2, 1, 5, 4), torch.zeros(1, 5, 4), torch.zeros(1, 5), 1.0), "must have"),
        (
            lambda: ops.depthwise(
                *(torch.zeros(1, 1, 3, 3, 4), torch.zeros(3, 1, 1, 4), None, None),
                *([1, 1], [0, 0], [1, 1], [3, 3], False, False),
            ),
            "one half, or two",
        ),
        (lambda: _piece_masses_of([2, 1]), "must add up"),
        (lambda: _piece_masses_of([5, -1]), "must not be negative"),
        (lambda: _piece_masses_of([4], x=(1, 6, 4)), "must have shape"),
        (lambda: _merged_of((2, 1, 5, 4), (2, 1, 5, 3)), "do not fit"),
        (lambda: _merged_of((2, 1, 5, 4), scales=(2, 2, 1)), "must have shape"),
        (lambda: _merged_of((3, 1, 5, 4), scales=(1, 3, 1)), "must be even"),
        (lambda: _gating_of(b=(1, 5, 3)), r"b .* must have shape \[1, 5, 4\]"),
        (lambda: _gating_of(x=(1, 5, 4)), "belong together"),
        (lambda: _gating_of(x=(1, 4, 4), factor=(1, 5, 4)), r"x .* must have shape \[1, 5, 4\]"),
        (lambda: _rescaled_of((2, 1, 3, 5, 4), (2, 1, 3, 5, 2)), "must have shape"),
        (lambda: _rescaled_of((2, 1, 3, 5, 4), scales=(1, 2, 2)), "must have shape"),
        (lambda: _turned_of(cross=(1, 5, 3)), "do not fit"),
        (lambda: _turned_of(stay=(2, 5, 4), cross=(2, 5, 4)), "of one head, or of those"),
        (lambda: _turned_of(stay=(1, 6, 4), cross=(1, 6, 4)), "does not fit"),
        (lambda: _turned_of(pair=4), "no pairs 4 apart"),
        (lambda: _turned_of(stay=(1, 4, 4), cross=(1, 4, 4)), "need y"),
        (lambda: _turned_of(y=(1, 3, 5, 6)), "do not fit"),
        (lambda: _turned_of(target=(2, 2)), "must have shape"),
        (lambda: ops.softmax_pullback(torch.zeros(2, 5), torch.zeros(2, 2, 6)), "do not fit"),
        (lambda: _attention_of(keys=(1, 2, 5, 5)), r"k .* must have shape \[1, 2, 5, 4\]"),
        (lambda: _attention_of(coefficients=(2, 1, 2, 4, 4)), r"c .* must have shape \[2, 1, 2, 3, 4\]"),
        (lambda: _attention_of(coefficients=(3, 1, 2, 3, 4)), "must be even"),
        (lambda: _gradient_of(keys=(1, 2, 5, 5)), r"k .* must have shape \[1, 2, 5, 4\]"),
        (lambda: _gradient_of(coefficients=(2, 1, 2, 4, 4)), r"c .* must have shape \[2, 1, 2, 3, 4\]"),
        (lambda: _attention_of(bias=(1, 2, 5, 3)), r"bias .* must have shape \[1, 2, 3, 5\]"),
        (lambda: _attention_of(bias=(1, 1, 3, 5)), r"bias .* must have shape \[1, 2, 3, 5\]"),
        (lambda: _attention_of(bias=(2, 2, 3, 5)), "a divisor of the batch"),
        (lambda: _attention_of(bias=(2, 3, 5)), "a divisor of the batch"),
        (lambda: _attention_of(junction=True), "a junction needs a bias"),
        (lambda: _gradient_of(bias=(1, 2, 5, 3)), r"bias .* must have shape \[1, 2, 3, 5\]"),
    ],
)
def test_wrong_shapes(call, problem: str) -> None:  # type: ignore[no-untyped-def]
    if ops.unavailable("cpu"):
        pytest.skip(ops.unavailable("cpu"))
    with pytest.raises(ValueError, match=problem):
        call()


def test_norm_pullback_writes_the_dtype_of_the_coefficients() -> None:
    if ops.unavailable("cpu"):
        pytest.skip(ops.unavailable("cpu"))
    c, x = torch.zeros(1, 2, 3, 4), torch.zeros(2, 3, 4)
    with pytest.raises(ValueError, match="must have the same dtype"):
        extension.norm_pullback(c, x, None, 1e-6, c.bfloat16(), 1)
