"""absLRP as Quantus' ``explain_func``."""

from __future__ import annotations

import operator
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ramp_fast.engine import Engine
from ramp_fast.errors import InputError
from ramp_fast.rules.abslrp import AbsLRP

__all__ = ["explain", "forget"]

# Engines by the model's id and their settings, the one used last at the end. An engine holds its model, whose id is no
# other's meanwhile.
_ENGINES: OrderedDict[tuple[Any, ...], Engine] = OrderedDict()
_KEPT = 4
_LOCK = threading.Lock()


def explain(
    model: nn.Module,
    inputs: npt.NDArray[Any] | Tensor,
    targets: int | Sequence[int] | npt.NDArray[Any] | Tensor | None,
    *,
    rule: str | AbsLRP = "abslrp",
    precision: str = "mixed",
    strict: bool = True,
    contrast: str | None = None,
    normalize: str = "max",
    batch_size: int | None = None,
    device: str | torch.device | None = None,
    reduce_axes: Sequence[int] | None = None,
    keepdims: bool = True,
    channel_first: bool | None = None,
    abs: bool = False,
    normalise: bool = False,
    normalise_func: Callable[..., npt.NDArray[Any]] | None = None,
    softmax: bool | None = None,
    method: str | None = None,
) -> npt.NDArray[Any]:
    """Relevance maps, for ``explain_func`` of Quantus' metrics and ``xai_methods`` of ``quantus.evaluate``; the keyword
    arguments go into ``explain_func_kwargs``.

    A model is captured at its first call. The four engines used last are kept, each with its model, until others take
    their place or :func:`forget` is called. What changes in a model, as weights do in Quantus' randomisation tests, is
    noticed as by :class:`ramp_fast.Engine`.

    Parameters
    ----------
    model : torch.nn.Module
        A classifier in eval mode, ``[N, C, H, W]`` to logits ``[N, classes]``.
    inputs : array or Tensor [N, C, H, W]
        Preprocessed for the model, floating point.
    targets : int, list, integer array or Tensor [N], or None
        The classes to explain, one for all images or one each; None: the predicted ones.
    rule, precision, strict
        As for :class:`ramp_fast.Engine`.
    contrast : {"others", "none"}, optional
        As for :meth:`ramp_fast.Engine.attribute`. By default "others"; "none" for models of one logit, which have no
        others.
    normalize, batch_size
        As for :meth:`ramp_fast.Engine.attribute`; ``normalize`` is about the map of all channels.
    device : str or torch.device, optional
        Where the model is expected to be, as Quantus passes it on. The model is not moved.
    reduce_axes : sequence of int, optional
        Axes that maps are summed over, as for ``quantus.explain``. By default the channels are, which is what Quantus'
        metrics of localisation and ROAD take; ``()`` keeps them.
    keepdims : bool
        Whether axes that were summed over stay, with one entry.
    channel_first : bool, optional
        False where the model takes ``[N, H, W, C]``: channels are the last axis then.
    abs, normalise : bool
        Absolute values of the maps; maps through ``normalise_func``. Quantus' metrics do both themselves.
    normalise_func : callable, optional
        Of an array, such as Quantus' ``normalise_by_max``; by default each map is divided by its largest magnitude.
    softmax : bool, optional
        None or False: logits are what is explained.
    method : str, optional
        The name that ``quantus.evaluate`` has for this function. Not used.

    Returns
    -------
    numpy.ndarray [N, 1, H, W]
        float32 (float64 under precision "float64"). ``[N, C, H, W]`` with ``reduce_axes=()``.

    Raises
    ------
    InputError
        An argument is not as described, or the model is on another device.
    UnsupportedModelError
        As :class:`ramp_fast.Engine`.

    Examples
    --------
    >>> metric = quantus.MaxSensitivity(nr_samples=10)
    >>> metric(model, x, y, a_batch=None, explain_func=explain, explain_func_kwargs={"precision": "float32"})
    >>> quantus.evaluate({"sparseness": quantus.Sparseness()}, {"absLRP": explain}, model, x, y, explain_func_kwargs={})
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if softmax:
        raise InputError(
            "softmax=True: absLRP explains logits, not probabilities; leave softmax out of explain_func_kwargs"
        )
    images = _tensor("inputs", inputs)
    target = _targets(targets, images.shape[0] if images.dim() else 0)
    axes = _axes(reduce_axes, images.dim(), channel_first)
    if device is not None:
        _check_device(model, device)
    engine = _engine(model, rule, precision, strict)
    if contrast is None:
        contrast = "none" if engine.classes(images) == 1 else "others"
    found = engine.attribute(images, target, contrast=contrast, normalize=normalize, batch_size=batch_size)
    maps: npt.NDArray[Any] = found.maps.cpu().numpy()
    if axes:
        maps = maps.sum(axes, keepdims=True) if keepdims else maps.sum(axes)
    if normalise:
        maps = (normalise_func or _by_largest)(maps)
    return np.abs(maps) if abs else maps


def forget() -> None:
    """Let go of the engines, and of their models, that :func:`explain` keeps."""
    with _LOCK:
        _ENGINES.clear()


def _targets(targets: Any, count: int) -> int | Tensor | None:
    """In the engine's words: None, one class, or an integer Tensor ``[count]``."""
    if targets is None or (isinstance(targets, int) and not isinstance(targets, bool)):
        return targets
    found = _tensor("targets", targets)
    whole = not (found.is_floating_point() or found.is_complex() or found.dtype == torch.bool)
    if whole and found.dim() == 0:
        return int(found)
    if not whole or found.shape != (count,):
        raise InputError(f"targets must be {count} integers, one per image; got {list(found.shape)}, {found.dtype}")
    return found


def _axes(reduce_axes: Any, rank: int, channel_first: bool | None) -> tuple[int, ...]:
    """What maps are summed over, as positive numbers."""
    if reduce_axes is None:
        reduce_axes = (-1,) if channel_first is False else (1,)
    if isinstance(reduce_axes, int):
        reduce_axes = (reduce_axes,)
    try:
        axes = tuple(axis + rank if axis < 0 else axis for axis in map(operator.index, reduce_axes))
    except TypeError as error:
        raise InputError(f"reduce_axes must be integers, got {reduce_axes!r}") from error
    if not all(0 < axis < max(rank, 2) for axis in axes):
        raise InputError(f"reduce_axes must be axes of an image's map, 1 to {rank - 1}; got {tuple(reduce_axes)}")
    if len({*axes}) < len(axes):
        raise InputError(f"reduce_axes names an axis twice: {tuple(reduce_axes)}")
    return axes


def _by_largest(maps: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Each map by its largest absolute value; a map of zeros stays one."""
    largest = np.abs(maps).max(tuple(range(1, maps.ndim)), keepdims=True, initial=0)
    return maps / np.where(largest == 0, 1, largest)


def _engine(model: nn.Module, rule: str | AbsLRP, precision: str, strict: bool) -> Engine:
    key = (id(model), rule, precision, strict)
    with _LOCK:
        engine = _ENGINES.get(key)
        if engine is None:
            engine = Engine(model, rule, precision, strict)
        _ENGINES[key] = engine
        _ENGINES.move_to_end(key)
        while len(_ENGINES) > _KEPT:
            _ENGINES.popitem(last=False)
    return engine


def _tensor(name: str, value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value
    try:
        return torch.as_tensor(np.asarray(value), device="cpu")
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} must be an array or a Tensor of numbers, got {type(value).__name__}") from error


def _check_device(model: nn.Module, device: str | torch.device) -> None:
    try:
        wanted = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"device must be the name of a torch device, got {device!r}") from error
    first = next(model.parameters(), None)
    if first is None:
        return
    same = first.device.type == wanted.type and wanted.index in (None, first.device.index)
    if not same:
        raise InputError(f"the model is on {first.device}, not on {wanted}: move it there first, model.to({device!r})")
