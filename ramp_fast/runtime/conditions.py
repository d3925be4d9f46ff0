"""Conditions: which part of an inner layer's relevance goes on (concept relevance, Achtibat et al. 2023)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ramp_fast._checks import is_whole
from ramp_fast.errors import InputError
from ramp_fast.plan import Plan
from ramp_fast.runtime.inspection import shape_of_sample

Condition = Mapping[str, Any]


def checked(condition: Condition | Sequence[Condition] | None) -> tuple[list[Condition], bool]:
    """The conditions, one or several, and whether several were given.

    Raises
    ------
    InputError
        They are not mappings from modules' names.
    """
    if condition is None:
        return [], False
    several = isinstance(condition, Sequence) and not isinstance(condition, str)
    given: list[Any] = list(condition) if several else [condition]
    if not given or not all(isinstance(c, Mapping) and c and all(isinstance(n, str) for n in c) for c in given):
        raise InputError(
            'condition must be a dict of module names and what is kept of their outputs, for example {"layer4": [3, '
            f"17]}}, or a list of such dicts; got {condition!r}"
        )
    return given, several


def masks(conditions: Sequence[Condition], plan: Plan) -> dict[str, Tensor]:
    """What is kept of every module that a condition names: ``[conditions, *shape]`` in the shape of one sample.

    Raises
    ------
    InputError
        What is kept of a module is not a part of its output.
    """
    found: dict[str, Tensor] = {}
    for name in dict.fromkeys(name for condition in conditions for name in condition):
        shape = shape_of_sample(plan, plan.graph.observed[name])
        kept = [_mask(name, c[name], shape) if name in c else torch.ones(shape, device="cpu") for c in conditions]
        found[name] = torch.stack(kept)
    return found


def _mask(name: str, kept: Any, shape: tuple[int, ...]) -> Tensor:
    if isinstance(kept, (np.ndarray, np.generic)) and kept.dtype.kind in "biu":
        kept = torch.from_numpy(np.array(kept))  # a copy: arrays may be read-only or have strides that torch lacks
    if isinstance(kept, Tensor) and kept.dtype == torch.bool:
        try:
            return kept.detach().cpu().expand(shape).float()
        except RuntimeError:
            raise InputError(
                f"condition: the mask of {name!r} must broadcast to the shape of one image's output {list(shape)}, got "
                f"{list(kept.shape)}"
            ) from None
    channels = kept.tolist() if isinstance(kept, Tensor) else kept
    channels = [channels] if isinstance(channels, int) else channels
    if isinstance(channels, (list, tuple)):
        channels = [int(c) if isinstance(c, np.integer) else c for c in channels]
    if not isinstance(channels, Sequence) or isinstance(channels, str) or not all(is_whole(c, 0) for c in channels):
        raise InputError(
            f"condition: what is kept of {name!r} must be a channel, a list of channels or a boolean mask, got {kept!r}"
        )
    axis = _channel_axis(shape)
    if any(c >= shape[axis] for c in channels):
        raise InputError(f"condition: {name!r} has {shape[axis]} channels, from 0; got {max(channels)}")
    mask = torch.zeros(shape, device="cpu")
    mask.index_fill_(axis, torch.tensor(channels, dtype=torch.long, device="cpu"), 1.0)
    return mask


def _channel_axis(shape: tuple[int, ...]) -> int:
    """Where channels are in one sample: first in ``[C, H, W]``, last in ``[tokens, C]``."""
    return len(shape) - 1 if len(shape) == 2 else 0
