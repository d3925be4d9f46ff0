"""Masking for perturbation metrics: at which step an entry is masked, and the masked copies of images.

Step s masks the ``ks[s]`` entries of an image that come first: those with the largest scores (MoRF) or the smallest
(LeRF). A score per scalar, per pixel or per segment: steps of segments or pixels are expanded by the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, get_num_threads

from ramp_fast._checks import positive
from ramp_fast._ranges import ranges
from ramp_fast.errors import InputError
from ramp_fast.ops._common import C
from ramp_fast.ops._registry import KERNEL_DTYPES, backends_for, equation, operator

_INT32_MAX = 2**31 - 1
# Sorting entries by their step takes as long as writing some copies: it pays from so many ranges on.
_ORDERED = 8


def _current_stream(tensor: Tensor) -> tuple[int, int]:
    """The device of a CUDA tensor, which need not be the current one, and its stream."""
    return tensor.get_device(), torch.cuda.current_stream(tensor.device).cuda_stream


def _check_steps(scores: Tensor, ks: Sequence[int]) -> None:
    if scores.ndim != 2 or not scores.is_floating_point():
        raise InputError(f"scores must be [B, N], floating point; got {list(scores.shape)}, {scores.dtype}")
    count = scores.shape[1]
    if count > _INT32_MAX or len(ks) > _INT32_MAX:
        raise InputError(f"{count} entries and {len(ks)} steps: at most {_INT32_MAX} are supported (indices are int32)")
    for smaller, larger in pairwise((0, *ks, count)):
        if larger < smaller:
            raise InputError(f"ks must ascend from 0 to {count}, the entries of an image; {larger} follows {smaller}")


def _steps(scores: Tensor, ks: Sequence[int], descending: bool) -> Tensor:
    _check_steps(scores, ks)
    return torch.empty(scores.shape, dtype=torch.int32, device=scores.device)


def _mask_steps_cuda(scores: Tensor, ks: Sequence[int], descending: bool) -> Tensor:
    steps = _steps(scores, ks, descending)
    scores = scores.contiguous()
    batch, count = scores.shape
    device, stream = _current_stream(scores)
    C.cuda_mask_steps(
        scores.data_ptr(), scores.element_size(), batch, count, ks, descending, steps.data_ptr(), device, stream
    )
    return steps


@operator(outputs=_steps, cuda=_mask_steps_cuda)
def mask_steps(scores: Tensor, ks: Sequence[int], descending: bool) -> Tensor:
    """At which step each entry is masked, when step s masks the first ``ks[s]`` entries of every image.

    Parameters
    ----------
    scores : Tensor [B, N]
        Floating point. Of equal scores (``-0.0`` equals ``0.0``) the one with the lower index comes first, so that
        exactly ``ks[s]`` entries are masked and every backend masks the same ones. NaN comes after everything else,
        whatever the order.
    ks : sequence of int [S]
        Ascending, from 0 to N.
    descending : bool
        Largest scores first (MoRF); otherwise smallest first (LeRF).

    Returns
    -------
    Tensor [B, N], int32
        The first step that masks the entry; S where none does.

    Raises
    ------
    InputError
        Scores are not ``[B, N]`` floating point, or ks are not ascending numbers of entries.
    """
    _check_steps(scores, ks)
    # negated, and not sorted in descending order, so that NaN comes last either way
    order = (-scores if descending else scores).sort(dim=1, stable=True).indices
    ranks = torch.arange(scores.shape[1], device=scores.device)
    by_rank = torch.searchsorted(torch.tensor(ks, dtype=torch.int64, device=scores.device), ranks, right=True)
    steps = torch.empty(scores.shape, dtype=torch.int32, device=scores.device)
    return steps.scatter_(1, order, by_rank.to(torch.int32).expand_as(order))


def _fills(values: Tensor, shape: Sequence[int]) -> bool:
    """Whether they are values for images ``[B, C, H, W]``: for each or for all, of every pixel or one for all."""
    if values.ndim != 4 or values.shape[0] not in (shape[0], 1) or values.shape[1] != shape[1]:
        return False
    return tuple(values.shape[2:]) in (tuple(shape[2:]), (1, 1))


def _check_copies(images: Tensor, steps: Tensor, baseline: Tensor, first: int, last: int) -> None:
    if images.ndim != 4 or not images.is_floating_point():
        raise InputError(f"images must be [B, C, H, W], floating point; got {list(images.shape)}, {images.dtype}")
    batch, channels, height, width = images.shape
    if steps.dtype != torch.int32 or steps.shape not in (images.shape, (batch, 1, height, width)):
        raise InputError(
            f"steps must be int32 [{batch}, {channels} or 1, {height}, {width}] for images {list(images.shape)}; "
            f"got {list(steps.shape)}, {steps.dtype}"
        )
    if baseline.dtype != images.dtype or not _fills(baseline, images.shape):
        raise InputError(
            f"baseline must be {images.dtype} [{batch} or 1, {channels}, {height}, {width}] as the images are, or "
            f"[{batch} or 1, {channels}, 1, 1]; got {list(baseline.shape)}, {baseline.dtype}"
        )
    if not images.device == steps.device == baseline.device:
        raise InputError(
            f"images, steps and baseline must be on one device; got {images.device}, {steps.device}, {baseline.device}"
        )
    if not 0 <= first <= last <= _INT32_MAX:
        raise InputError(f"steps from {first} to {last}: need 0 <= first <= last")


def _check_room(out: Tensor, images: Tensor, steps: Tensor, baseline: Tensor, first: int, last: int) -> None:
    _check_copies(images, steps, baseline, first, last)
    shape = (last - first, *images.shape)
    if out.shape != shape or out.dtype != images.dtype or out.device != images.device:
        raise InputError(
            f"out must be {list(shape)}, {images.dtype}, on {images.device} as the images are; "
            f"got {list(out.shape)}, {out.dtype}, {out.device}"
        )
    if not _flat(out, _channels_last(images)).is_contiguous():
        raise InputError(
            f"out has strides {list(out.stride())}: copies lie one after another, each in the memory layout of the "
            f"images, which have strides {list(images.stride())}"
        )


def _channels_last(images: Tensor) -> bool:
    return not images.is_contiguous() and images.is_contiguous(memory_format=torch.channels_last)


def _copies(images: Tensor, count: int) -> Tensor:
    """Room for copies [count, B, C, H, W] in the layout of the images."""
    batch, channels, height, width = images.shape
    if _channels_last(images):
        return images.new_empty((count, batch, height, width, channels)).permute(0, 1, 4, 2, 3)
    return images.new_empty((count, *images.shape))


def _flat(tensor: Tensor, channels_last: bool) -> Tensor:
    """[..., C, H, W] in the order of memory: [..., H, W, C] with channels_last."""
    return tensor.movedim(-3, -1) if channels_last else tensor


def _masked_copies_cpu(
    out: Tensor, images: Tensor, steps: Tensor, baseline: Tensor, first: int, last: int, reveal: bool
) -> None:
    _check_room(out, images, steps, baseline, first, last)
    inner = _channels_last(images)
    x, y, z = (_flat(tensor, inner).contiguous() for tensor in (images, steps, baseline))
    C.masked_copies(x, y, z, first, last, reveal, inner, _flat(out, inner), get_num_threads())


def _masked_copies_cuda(
    out: Tensor, images: Tensor, steps: Tensor, baseline: Tensor, first: int, last: int, reveal: bool
) -> None:
    _check_room(out, images, steps, baseline, first, last)
    inner = _channels_last(images)
    batch, channels, height, width = images.shape
    baseline = baseline.expand(-1, -1, height, width)
    x, y, z = (_flat(tensor, inner).contiguous() for tensor in (images, steps, baseline))
    C.cuda_masked_copies(
        x.data_ptr(),
        y.data_ptr(),
        z.data_ptr(),
        images.element_size(),
        batch,
        channels,
        height * width,
        first,
        last,
        steps.shape[1] == 1,
        baseline.shape[0] == 1,
        inner,
        reveal,
        out.data_ptr(),
        *_current_stream(images),
    )


@operator(
    outputs=lambda *args: _check_room(*args[:-1]),
    mutates=("out",),
    cpu=_masked_copies_cpu,
    cuda=_masked_copies_cuda,
)
def _masked_copies_into(
    out: Tensor, images: Tensor, steps: Tensor, baseline: Tensor, first: int, last: int, reveal: bool
) -> None:
    _check_room(out, images, steps, baseline, first, last)
    masked, kept = (images, baseline) if reveal else (baseline, images)
    for step, copy in enumerate(out, first):
        copy.copy_(torch.where(steps <= step, masked, kept))


def _room(images: Tensor, steps: Tensor, baseline: Tensor, first: int, last: int, reveal: bool) -> Tensor:
    _check_copies(images, steps, baseline, first, last)
    return _copies(images, last - first)


def _allocating(into: Callable[..., None]) -> Callable[..., Tensor]:
    """``into`` with an output of its own."""

    def call(*args: Any) -> Tensor:
        out = _room(*args)
        into(out, *args)
        return out

    return call


@operator(outputs=_room, cpu=_allocating(_masked_copies_cpu), cuda=_allocating(_masked_copies_cuda))
def _masked_copies(images: Tensor, steps: Tensor, baseline: Tensor, first: int, last: int, reveal: bool) -> Tensor:
    out = _room(images, steps, baseline, first, last, reveal)
    equation("masked_copies_into")(out, images, steps, baseline, first, last, reveal)
    return out


def masked_copies(
    images: Tensor,
    steps: Tensor,
    baseline: Tensor,
    first: int,
    last: int,
    reveal: bool = False,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Copies of images as masked by steps ``[first, last)``, all from one read of the images.

    Parameters
    ----------
    images : Tensor [B, C, H, W]
    steps : Tensor [B, C, H, W] or [B, 1, H, W], int32
        When each scalar, or all channels of a pixel, are masked: :func:`mask_steps`.
    baseline : Tensor [B or 1, C, H, W] or [B or 1, C, 1, 1]
        What takes the place of masked entries, in the dtype of the images: of every image or of all, and of every pixel
        or of all.
    first, last : int
        The range of steps: as many as fit into memory and make a batch for the model.
    reveal : bool
        Insertion: the baseline, with the entries of the image revealed step by step.
    out : Tensor [last - first, B, C, H, W], optional
        Where to write, laid out as the result is. On CPUs new memory takes several times as long as writing to it; for
        ranges one after another see :func:`copies_in_turn`.

    Returns
    -------
    Tensor [last - first, B, C, H, W]
        In the images' dtype and memory layout (channels-last stays so). ``flatten(0, 1)`` is a batch, and its outputs
        are rows of the curves [S, B] of all images.

    Raises
    ------
    InputError
        Shapes, dtypes, layouts or devices do not fit together, or the range is none.
    """
    if out is None:
        return _masked_copies(images, steps, baseline, first, last, reveal)
    _masked_copies_into(out, images, steps, baseline, first, last, reveal)
    return out


def copies_in_turn(
    images: Tensor, steps: Tensor, baseline: Tensor, count: int, together: int, reveal: bool = False
) -> Iterator[Tensor]:
    """The copies of steps 0 to ``count - 1``, in ranges of at most ``together`` steps one after another.

    All ranges lie in the same memory: what is yielded is valid until the next one is asked for. On CPUs the copies of a
    range are made of those of the one before, by writing only the entries that change: many images and few steps
    together are fastest. If something else has written to the memory, which its version shows, everything is written.

    Parameters
    ----------
    images, steps, baseline, reveal
        As for :func:`masked_copies`.
    count : int
        Steps.
    together : int
        At most so many steps are yielded at a time, at least 1; ranges are as equal as they can be.

    Yields
    ------
    Tensor [k, B, C, H, W]
        As :func:`masked_copies` gives them.

    Raises
    ------
    InputError
        As for :func:`masked_copies`, or nothing may be together. At the call, before the first range.
    """
    _check_copies(images, steps, baseline, 0, count)
    positive("copies_in_turn", "together", together)
    return _in_turn(images, steps, baseline, list(ranges(count, together)), reveal)


def _in_turn(
    images: Tensor, steps: Tensor, baseline: Tensor, parts: list[tuple[int, int]], reveal: bool
) -> Iterator[Tensor]:
    with torch.inference_mode(False):  # whose tensors have no version
        room = _copies(images, parts[0][1] if parts else 0)
    incremental = None
    if "cpu" in backends_for(images.device.type) and images.dtype in KERNEL_DTYPES and len(parts) >= _ORDERED:
        incremental = _IncrementalCopies(room, steps, images if reveal else baseline, parts[-1][1])
    version, before = None, 0
    for first, last in parts:
        out = room[: last - first]
        if incremental is None or version != room._version:
            masked_copies(images, steps, baseline, first, last, reveal, out=out)
        else:
            incremental.advance(out, before, first)
        version, before = room._version, first
        yield out


class _IncrementalCopies:
    """Advances copies from one step to a later one in place: entries sorted by their steps tell which change."""

    def __init__(self, room: Tensor, steps: Tensor, source: Tensor, count: int) -> None:
        self._inner = _channels_last(room.flatten(0, 1))
        self._source = _flat(source, self._inner).contiguous()
        flat = _flat(steps, self._inner).flatten(1).contiguous()
        self._order = torch.empty_like(flat)
        self._begins = flat.new_empty(flat.shape[0], count + 1)
        C.order_by_step(flat, self._order, self._begins, get_num_threads())

    def advance(self, copies: Tensor, before: int, first: int) -> None:
        """From ``before`` to ``first``: the steps that the first of the copies shows."""
        args = self._source, self._order, self._begins, before, first - before, self._inner
        C.advance_copies(*args, _flat(copies, self._inner), get_num_threads())
