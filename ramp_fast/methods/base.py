"""What methods share: checks of what they are given, seeds that depend on an image, tokens laid out as a picture."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ramp_fast.capture.model_checks import in_training
from ramp_fast.errors import InputError, UnsupportedModelError


def checked(name: str, model: nn.Module, images: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Images without their history and targets beside them, if both are what a method needs.

    Values of targets are looked at on CPUs only, as that waits for a GPU, and against the number of classes where the
    model says it (timm's ``num_classes``).

    Raises
    ------
    InputError
        An argument has the wrong type, shape, dtype or range.
    UnsupportedModelError
        The model is in training mode.
    """
    if not isinstance(images, Tensor) or images.dim() != 4 or not images.is_floating_point():
        raise InputError(f"{name}: images must be a floating point Tensor [N, C, H, W], got {_described(images)}")
    count = images.shape[0]
    if count < 1:
        raise InputError(f"{name}: no images: got {_described(images)}")
    whole = isinstance(target, Tensor) and not (
        target.is_floating_point() or target.is_complex() or target.dtype == torch.bool
    )
    if not whole or target.shape != (count,):
        raise InputError(f"{name}: target must be integers [{count}], one per image; got {_described(target)}")
    if in_training(model):
        raise UnsupportedModelError(f"{name}: the model is in training mode: call model.eval()")
    if target.device.type == "cpu":
        low, high = int(target.min()), int(target.max())
        said = getattr(model, "num_classes", None)
        classes = said if isinstance(said, int) and said > 0 else None
        if low < 0 or (classes is not None and high >= classes):
            bounds = "at least 0" if classes is None else f"0 to {classes - 1}"
            raise InputError(f"{name}: target must be {bounds}, got {low} to {high}")
    return images.detach(), target.to(images.device).long()


def _described(value: Any) -> str:
    return f"{list(value.shape)}, {value.dtype}" if isinstance(value, Tensor) else repr(value)[:80]


def checked_seed(name: str, seed: Any) -> None:
    """Refuse a seed that is not an integer."""
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise InputError(f"{name}: seed must be an integer, got {seed!r}")


def seed_of(image: Tensor, seed: int) -> int:
    """A seed of 63 bits from ``seed`` and an image's shape, dtype and values, whatever device it is on."""
    digest = hashlib.blake2b(f"{seed} {list(image.shape)} {image.dtype} ".encode(), digest_size=8)
    digest.update(image.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return int.from_bytes(digest.digest(), "little") >> 1


def one_by_one(images: Tensor, target: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs ``[1, C, H, W]``, ``[1]``: so that no bit of a map depends on the images beside it."""
    return zip(images.split(1), target.split(1), strict=True)


def token_grid(model: nn.Module, tokens: int, size: torch.Size) -> tuple[int, int, int]:
    """How ``tokens`` of an image ``size`` (H, W) lie: those before the patches, rows, columns.

    Raises
    ------
    UnsupportedModelError
        The model does not say its patch size, or has fewer tokens than patches.
    """
    embedding = getattr(model, "patch_embed", None) or getattr(model, "stem", None) or model
    grid, made_for = getattr(embedding, "grid_size", None), getattr(embedding, "img_size", None)
    patch = getattr(embedding, "patch_size", None) or getattr(model, "patch_size", None)
    if grid is not None and made_for is not None and tuple(made_for) == tuple(size):
        rows, columns = grid
    elif patch is not None:
        high, wide = (patch, patch) if isinstance(patch, int) else patch
        rows, columns = math.ceil(size[0] / high), math.ceil(size[1] / wide)
    else:
        raise UnsupportedModelError(
            f"{type(model).__name__} does not say its patch size (patch_embed.patch_size), so {tokens} tokens cannot "
            "be laid out as a picture"
        )
    before = tokens - rows * columns
    if before < 0:
        raise UnsupportedModelError(
            f"{tokens} tokens for {rows} x {columns} patches: {type(model).__name__} merges or drops some, so they "
            "cannot be laid out as a picture"
        )
    return before, rows, columns


def upsampled(maps: Tensor, size: torch.Size) -> Tensor:
    """Maps ``[N, 1, h, w]`` at the images' size, bilinear."""
    return F.interpolate(maps, tuple(size), mode="bilinear", align_corners=False)
