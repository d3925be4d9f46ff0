"""Masking: the order of scores and its ties, ranges of steps, memory that is reused, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ramp_fast import InputError, ops
from ramp_fast.ops import _registry

VARIANTS = ["reference", *ops.cpu_isas()]
INF, NAN = float("inf"), float("nan")

needs_extension = pytest.mark.skipif(_registry.extension is None, reason="tests the C++ extension itself")


@pytest.fixture(params=VARIANTS)
def _variant(request: pytest.FixtureRequest) -> None:
    if request.param == "reference":
        ops.set_backend("reference")
    else:
        ops.set_backend("cpu")
        ops.set_cpu_isa(request.param)


on_every_variant = pytest.mark.usefixtures("_variant")


def ranks(scores: list[float], descending: bool, dtype: torch.dtype = torch.float32) -> list[int]:
    count = len(scores)
    return ops.mask_steps(torch.tensor([scores], dtype=dtype), range(1, count + 1), descending)[0].tolist()


@on_every_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_order_of_scores(dtype: torch.dtype) -> None:
    tiny = torch.finfo(dtype).smallest_normal / 4  # subnormal
    scores = [-0.0, 1.0, NAN, -INF, 0.0, 1.0, tiny, INF, -tiny, -NAN, -1.0]
    assert ranks(scores, False, dtype) == [3, 6, 9, 0, 4, 7, 5, 8, 2, 10, 1]
    assert ranks(scores, True, dtype) == [4, 1, 9, 8, 5, 2, 3, 0, 6, 10, 7]


def _scores() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(2, 9001, generator=generator)
    heavy = normal.double() * 10.0 ** torch.randint(-200, 200, normal.shape, generator=generator)
    return {
        "normal": normal,
        "float64": heavy,
        "cut at zero": normal.relu(),
        "all equal": torch.zeros(2, 9001),
        "ten values": (2 * normal).round(),
        "one bucket": 1 + normal.abs() * 1e-6,
        "not finite": torch.where(normal > 2, INF, torch.where(normal < -2, -INF, normal)).where(
            normal.abs() > 0.1, NAN
        ),
        "wider than float32": normal.clamp(-3, 3) * 1e38,
        "narrower than float32": normal * 1e-43,
        "one far from the others": torch.where(torch.arange(9001) == 77, 1e9, normal),
        "ascending": torch.arange(9001.0).expand(2, -1),
        "segments": normal[:, :97],
    }


@on_every_variant
@pytest.mark.parametrize("name", _scores())
@pytest.mark.parametrize("descending", [False, True])
def test_every_step_masks_the_first_of_a_stable_order(name: str, descending: bool) -> None:
    scores = _scores()[name]
    count = scores.shape[1]
    order = (-scores if descending else scores).sort(stable=True).indices
    for ks in ([], [0], [count], [1, 1, count - 1], [k * count // 100 for k in range(101)]):
        steps = ops.mask_steps(scores, ks, descending)
        assert steps.dtype == torch.int32
        expected = torch.full(scores.shape, len(ks), dtype=torch.int32)
        for step in reversed(range(len(ks))):
            expected.scatter_(1, order[:, : ks[step]], step)
        assert torch.equal(steps, expected)
    ranks = ops.mask_steps(scores, range(1, count + 1), descending)
    assert torch.equal(ranks.gather(1, order), torch.arange(count).expand_as(ranks))


def drawn(channels: int = 3, shared: bool = False, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Images, steps 0 to 6 and baselines whose rows span several blocks of the kernel."""
    generator = torch.Generator().manual_seed(1)
    shape = (2, channels, 29, 67)
    steps = torch.randint(0, 7, (2, 1 if shared else channels, 29, 67), generator=generator, dtype=torch.int32)
    images, baseline = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    return images, steps, baseline


@on_every_variant
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("reveal", [False, True])
def test_copies(reveal: bool, shared: bool, memory_format: torch.memory_format) -> None:
    images, steps, baseline = drawn(shared=shared)
    copies = ops.masked_copies(images.contiguous(memory_format=memory_format), steps, baseline, 2, 6, reveal)
    assert copies.flatten(0, 1).is_contiguous(memory_format=memory_format)
    for step, copy in zip(range(2, 6), copies, strict=True):
        masked = (steps <= step).expand_as(images)
        assert torch.equal(copy[masked], (images if reveal else baseline)[masked])
        assert torch.equal(copy[~masked], (baseline if reveal else images)[~masked])


@on_every_variant
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_baseline_of_one_value_a_channel(
    dtype: torch.dtype, shared: bool, memory_format: torch.memory_format
) -> None:
    images, steps, _ = drawn(shared=shared, dtype=dtype)
    images = images.contiguous(memory_format=memory_format)
    for values in (torch.arange(6).view(2, 3, 1, 1).to(dtype), torch.arange(3).view(1, 3, 1, 1).to(dtype)):
        for reveal in (False, True):
            whole = ops.masked_copies(images, steps, values.expand_as(images), 0, 7, reveal)
            assert torch.equal(ops.masked_copies(images, steps, values, 0, 7, reveal), whole)
        late = steps + 9  # enough steps for copies to be taken on
        turns = [part.clone() for part in ops.copies_in_turn(images, late, values, 17, 2)]
        assert torch.equal(torch.cat(turns)[9:16], ops.masked_copies(images, steps, values, 0, 7))


@on_every_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_ranges_together_are_the_whole(dtype: torch.dtype) -> None:
    images, steps, baseline = drawn(dtype=dtype)
    whole = ops.masked_copies(images, steps, baseline, 0, 7)
    parts = [ops.masked_copies(images, steps, baseline, first, last) for first, last in [(0, 3), (3, 3), (3, 7)]]
    assert torch.equal(torch.cat(parts), whole)


@on_every_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_more_steps_than_a_narrow_integer_counts(dtype: torch.dtype) -> None:
    first, last = 5, 70_000
    steps = torch.tensor([0, 5, 6, 32_766, 32_770, 32_771, 32_772, 65_536, 69_999, 70_000, 2**31 - 1])
    steps = steps.to(torch.int32).view(1, 1, 1, -1)
    copies = ops.masked_copies(torch.ones(steps.shape, dtype=dtype), steps, torch.zeros(steps.shape).to(dtype), 5, last)
    assert torch.equal((copies == 1).sum(0).view(-1), (steps.view(-1) - first).clamp(0, last - first))


@on_every_variant
def test_steps_that_are_none() -> None:
    # nothing says that steps come from mask_steps: a negative one is masked from the start
    image, baseline = torch.ones(1, 1, 1, 2), torch.zeros(1, 1, 1, 2)
    steps = torch.tensor([-(2**31), 2**31 - 1], dtype=torch.int32).view(1, 1, 1, 2)
    last = 2**31 - 1
    assert ops.masked_copies(image, steps, baseline, last - 1, last).flatten().tolist() == [0, 1]


@on_every_variant
def test_values_are_moved_and_never_computed_with() -> None:
    bits = torch.tensor([0x7F80_0001, -0x80_0000 + 3, 1, -(2**31)], dtype=torch.int32)  # two NaNs, a subnormal, -0.0
    images = bits.view(torch.float32).view(1, 1, 2, 2)
    steps = torch.full((1, 1, 2, 2), 9, dtype=torch.int32)
    copies = ops.masked_copies(images, steps, torch.zeros_like(images), 0, 2)
    assert torch.equal(copies.view(torch.int32).view(2, 4), bits.expand(2, 4))


@on_every_variant
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_memory_that_is_reused(memory_format: torch.memory_format) -> None:
    images, steps, baseline = drawn()
    images = images.contiguous(memory_format=memory_format)
    expected = ops.masked_copies(images, steps, baseline, 1, 4)
    size = expected.numel()
    memory = torch.full((size + 128,), NAN)
    out = memory[64:-64].as_strided(expected.shape, expected.stride(), memory.storage_offset() + 64)
    for _ in range(2):
        assert ops.masked_copies(images, steps, baseline, 1, 4, out=out) is out
        assert torch.equal(out, expected)
    assert memory[:64].isnan().all()
    assert memory[-64:].isnan().all()
    torch.use_deterministic_algorithms(False)  # opcheck compares freshly allocated fakes
    args = (out, images, steps, baseline, 1, 4, False)
    checks = ["test_schema", "test_faketensor", "test_autograd_registration"]
    torch.library.opcheck(torch.ops.ramp_fast.masked_copies_into.default, args, test_utils=checks)


class TestCopiesInTurn:
    """Ranges of copies in memory that is reused: taken on from the range before, or written anew."""

    @staticmethod
    def drawn(count: int, shared: bool, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        images, steps, baseline = drawn(shared=shared, dtype=dtype)
        generator = torch.Generator().manual_seed(2)
        # some entries are masked before the first step, some after the last
        steps = torch.randint(-1, count + 2, steps.shape, generator=generator, dtype=torch.int32)
        return images, steps, baseline

    @on_every_variant
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    @pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
    @pytest.mark.parametrize("shared", [False, True])
    @pytest.mark.parametrize("reveal", [False, True])
    def test_are_the_copies(
        self, reveal: bool, shared: bool, memory_format: torch.memory_format, dtype: torch.dtype
    ) -> None:
        images, steps, baseline = self.drawn(23, shared, dtype)
        images = images.contiguous(memory_format=memory_format)
        for base in (baseline, baseline[:1]):
            whole = ops.masked_copies(images, steps, base, 0, 23, reveal)
            for together in (1, 2, 23, 40):
                turns = []
                for part in ops.copies_in_turn(images, steps, base, 23, together, reveal):
                    assert part.flatten(0, 1).is_contiguous(memory_format=memory_format)
                    turns.append(part.clone())
                assert max(len(t) for t in turns) == min(together, 23)
                assert torch.equal(torch.cat(turns), whole)

    @pytest.mark.parametrize("inference", [False, True])
    def test_writing_to_them_changes_only_what_was_yielded(self, inference: bool) -> None:
        images, steps, baseline = self.drawn(30, False)
        whole = ops.masked_copies(images, steps, baseline, 0, 30)
        with torch.inference_mode(inference):
            for step, part in enumerate(ops.copies_in_turn(images, steps, baseline, 30, 1)):
                assert torch.equal(part[0], whole[step])
                if step % 3 == 0:
                    part.flatten(0, 1).relu_()

    @needs_extension
    def test_entries_that_stay_are_not_written(self) -> None:
        ops.set_backend("cpu")
        images, steps, baseline = self.drawn(30, False)
        turns = ops.copies_in_turn(images, steps, baseline, 30, 1)
        next(turns).data.fill_(7)  # which changes no version
        step = next(turns)[0]
        assert torch.equal(step == 7, steps != 1)

    def test_refused_at_the_call(self) -> None:
        images, steps, baseline = self.drawn(3, False)
        with pytest.raises(InputError, match="together must be a positive integer, got 0"):
            ops.copies_in_turn(images, steps, baseline, 3, 0)
        with pytest.raises(InputError, match="steps must be int32"):
            ops.copies_in_turn(images, steps.long(), baseline, 3, 1)

    def test_nothing_to_copy(self) -> None:
        images, steps, baseline = self.drawn(3, False)
        assert list(ops.copies_in_turn(images, steps, baseline, 0, 4)) == []
        (empty,) = ops.copies_in_turn(images[:0], steps[:0], baseline[:1], 3, 4)
        assert empty.shape == (3, 0, *images.shape[1:])
        turns = list(ops.copies_in_turn(images[:0], steps[:0], baseline[:1], 30, 1))
        assert len(turns) == 30


@needs_extension
@pytest.mark.parametrize("isa", ops.cpu_isas())
@pytest.mark.parametrize("entries", [5003, 64, 63, 5])  # with a part of their own for the last, one part alone
def test_entries_in_the_order_of_their_steps(isa: str, entries: int) -> None:
    ops.set_cpu_isa(isa)
    generator = torch.Generator().manual_seed(0)
    steps = torch.randint(-2, 9, (3, entries), generator=generator, dtype=torch.int32)
    order, begins = torch.empty_like(steps), torch.empty(3, 8, dtype=torch.int32)
    _registry.extension.order_by_step(steps, order, begins, 2)
    cut = steps.clamp(0, 7)
    assert torch.equal(order.long(), cut.sort(dim=1, stable=True).indices)
    assert begins.tolist() == [[int((row < s).sum()) for s in range(8)] for row in cut]


def copies(**changed: Any) -> Tensor:
    arguments: dict[str, Any] = {
        "images": torch.ones(2, 3, 4, 5),
        "steps": torch.zeros(2, 1, 4, 5, dtype=torch.int32),
        "baseline": torch.zeros(1, 3, 4, 5),
        "first": 0,
        "last": 2,
    }
    return ops.masked_copies(**(arguments | changed))


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        (lambda: ops.mask_steps(torch.zeros(5), [1], True), r"scores must be \[B, N\].*got \[5\]"),
        (lambda: ops.mask_steps(torch.zeros(1, 5, dtype=torch.int32), [1], True), "floating point"),
        (lambda: ops.mask_steps(torch.zeros(1, 5), [2, 1], True), "ks must ascend from 0 to 5.*1 follows 2"),
        (lambda: ops.mask_steps(torch.zeros(1, 5), [6], True), "5 follows 6"),
        (lambda: ops.mask_steps(torch.zeros(1, 5), [-1], True), "-1 follows 0"),
        (lambda: copies(images=torch.ones(3, 4, 5)), r"images must be \[B, C, H, W\]"),
        (lambda: copies(images=torch.ones(2, 3, 4, 5, dtype=torch.int32)), "images must be .* floating point"),
        (lambda: copies(steps=torch.zeros(2, 2, 4, 5, dtype=torch.int32)), r"steps must be int32 \[2, 3 or 1, 4, 5\]"),
        (lambda: copies(steps=torch.zeros(2, 1, 4, 5)), "steps must be int32"),
        (lambda: copies(baseline=torch.zeros(3, 3, 4, 5)), r"baseline must be torch.float32 \[2 or 1, 3, 4, 5\]"),
        (lambda: copies(baseline=torch.zeros(1, 3, 4, 5).double()), "baseline must be torch.float32"),
        (lambda: copies(baseline=torch.zeros(1, 3, 4, 5, device="meta")), "on one device"),
        (lambda: copies(first=-1), "need 0 <= first <= last"),
        (lambda: copies(first=3), "need 0 <= first <= last"),
        (lambda: copies(out=torch.empty(1, 2, 3, 4, 5)), r"out must be \[2, 2, 3, 4, 5\]"),
        (lambda: copies(out=torch.empty(2, 2, 3, 4, 5).double()), "out must be .* torch.float32"),
        (lambda: copies(out=torch.empty(2, 2, 4, 5, 3).movedim(-1, 2)), "out has strides"),
    ],
)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_refused(call, problem: str, backend: str) -> None:  # type: ignore[no-untyped-def]
    if ops.unavailable(backend):
        pytest.skip(ops.unavailable(backend))
    ops.set_backend(backend)
    with pytest.raises(InputError, match=problem):
        call()


@needs_extension
@pytest.mark.parametrize(
    ("name", "args", "problem"),
    [
        ("mask_steps", (torch.zeros(1, 5), [2, 1], True, torch.empty(1, 5, dtype=torch.int32), 1), "ascending"),
        ("mask_steps", (torch.zeros(1, 5), [1], True, torch.empty(1, 4, dtype=torch.int32), 1), "do not fit"),
        ("mask_steps", (torch.zeros(1, 5), [1], True, torch.empty(1, 5, dtype=torch.int64), 1), "out must be int32"),
        ("mask_steps", (torch.zeros(1, 5), [1], True, torch.empty(1, 5), 1), "out must be int32"),
    ],
)
def test_the_extension_refuses_too(name: str, args: tuple[Any, ...], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        getattr(_registry.extension, name)(*args)


@needs_extension
@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({1: torch.zeros(1, 2, 2, 2, dtype=torch.int32)}, "do not fit"),
        ({1: torch.zeros(1, 1, 2, 3, dtype=torch.int32)}, "do not fit"),
        ({1: torch.zeros(1, 1, 2, 2)}, "steps must be int32"),
        ({2: torch.zeros(1, 3, 2, 1)}, "do not fit"),
        ({2: torch.zeros(1, 3, 2, 2).double()}, "one dtype"),
        ({3: -1}, "no range"),
        ({7: torch.empty(1, 1, 3, 2, 2)}, "must hold 2 steps"),
        ({7: torch.empty(2, 1, 3, 2, 1)}, "do not fit"),
        ({6: True}, "do not fit"),
    ],
)
def test_the_extension_refuses_copies_it_would_overrun(changed: dict[int, Any], problem: str) -> None:
    image = torch.zeros(1, 3, 2, 2)
    steps = torch.zeros(1, 1, 2, 2, dtype=torch.int32)
    args = [image, steps, image, 0, 2, False, False, torch.empty(2, *image.shape), 1]
    with pytest.raises(ValueError, match=problem):
        _registry.extension.masked_copies(*[changed.get(i, a) for i, a in enumerate(args)])


@needs_extension
@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({0: torch.zeros(4, dtype=torch.int32)}, r"must be \[B, N\]"),
        ({0: torch.zeros(1, 4)}, "steps must be int32"),
        ({1: torch.zeros(1, 5, dtype=torch.int32)}, "do not fit"),
        ({2: torch.zeros(2, 5, dtype=torch.int32)}, "do not fit"),
        ({2: torch.zeros(1, 0, dtype=torch.int32)}, r"must be \[B, steps \+ 1\]"),
    ],
)
def test_the_extension_refuses_to_order_what_does_not_fit(changed: dict[int, Any], problem: str) -> None:
    args = [torch.zeros(1, 4, dtype=torch.int32), torch.zeros(1, 4, dtype=torch.int32)]
    args = [*args, torch.zeros(1, 5, dtype=torch.int32), 1]
    with pytest.raises(ValueError, match=problem):
        _registry.extension.order_by_step(*[changed.get(i, a) for i, a in enumerate(args)])


@needs_extension
@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({0: torch.zeros(1, 3, 2, 1)}, "do not fit"),
        ({0: torch.zeros(1, 3, 2, 2).double()}, "one dtype"),
        ({1: torch.zeros(1, 5, dtype=torch.int32)}, "an entry for every pixel"),
        ({2: torch.zeros(2, 5, dtype=torch.int32)}, "do not fit"),
        ({3: 2}, "from step 2 on"),
        ({4: 4}, "cannot go 4 of 4"),
        ({6: torch.empty(4, 1, 3, 2, 2)}, "4 copies"),
        ({5: True}, "an entry for every pixel"),
    ],
)
def test_the_extension_refuses_to_advance_what_it_would_overrun(changed: dict[int, Any], problem: str) -> None:
    order, begins = torch.zeros(1, 4, dtype=torch.int32), torch.zeros(1, 5, dtype=torch.int32)
    args = [torch.zeros(1, 3, 2, 2), order, begins, 0, 1, False, torch.empty(2, 1, 3, 2, 2), 1]
    with pytest.raises(ValueError, match=problem):
        _registry.extension.advance_copies(*[changed.get(i, a) for i, a in enumerate(args)])


@needs_extension
def test_an_order_that_is_none_writes_nowhere_else() -> None:
    memory = torch.zeros(3, 12)
    order = torch.tensor([[-1, 4, 2**31 - 1, 1]], dtype=torch.int32)
    begins = torch.tensor([[0, -5, 2**31 - 1]], dtype=torch.int32)
    out = memory[1].view(1, 1, 3, 2, 2)
    _registry.extension.advance_copies(torch.ones(1, 3, 2, 2), order, begins, 0, 1, False, out, 1)
    assert memory[1].tolist() == [0, 1, 0, 0] * 3
    assert not memory[[0, 2]].any()
