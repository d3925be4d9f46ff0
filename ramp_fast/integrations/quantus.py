"""absLRP as Quantus' ``explain_func``."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ramp_fast.engine import Engine
from ramp_fast.errors import InputError
from ramp_fast.rules.abslrp import AbsLRP

__all__ = ["explain"]

_ENGINES: weakref.WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], Engine]] = weakref.WeakKeyDictionary()


def explain(
    model: nn.Module,
    inputs: npt.NDArray[Any] | Tensor,
    targets: int | npt.NDArray[Any] | Tensor | None,
    *,
    rule: str | AbsLRP = "abslrp",
    precision: str = "mixed",
    strict: bool = True,
    contrast: str = "others",
    normalize: str = "max",
    batch_size: int | None = None,
    device: str | torch.device | None = None,
) -> npt.NDArray[Any]:
    """Relevance maps, for ``explain_func`` of Quantus' metrics; the keyword arguments go into ``explain_func_kwargs``.

    A model is captured at its first call and its engine kept for as long as the model lives; weights that change, as
    in Quantus' randomisation tests, are noticed.

    Parameters
    ----------
    model : torch.nn.Module
        A classifier in eval mode, ``[N, C, H, W]`` to logits ``[N, classes]``.
    inputs : array or Tensor [N, C, H, W]
        Preprocessed for the model, floating point.
    targets : int, integer array or Tensor [N], or None
        The classes to explain; None: the predicted ones.
    rule, precision, strict
        As for :class:`ramp_fast.Engine`.
    contrast, normalize, batch_size
        As for :meth:`ramp_fast.Engine.attribute`.
    device : str or torch.device, optional
        Where the model is expected to be, as Quantus passes it on. The model is not moved.

    Returns
    -------
    numpy.ndarray [N, C, H, W]
        float32 (float64 under precision "float64").

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
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    images = _tensor("inputs", inputs)
    target = targets if targets is None or isinstance(targets, int) else _tensor("targets", targets)
    if isinstance(target, Tensor) and (target.is_floating_point() or target.shape != images.shape[:1]):
        raise InputError(
            f"targets must be {images.shape[0]} integers, one per image; got {list(target.shape)}, {target.dtype}"
        )
    if device is not None:
        _check_device(model, device)
    engine = _engine(model, rule, precision, strict)
    found = engine.attribute(images, target, contrast=contrast, normalize=normalize, batch_size=batch_size)
    maps: npt.NDArray[Any] = found.maps.cpu().numpy()
    return maps


def _engine(model: nn.Module, rule: str | AbsLRP, precision: str, strict: bool) -> Engine:
    engines = _ENGINES.setdefault(model, {})
    key = (rule, precision, strict)
    if key not in engines:
        # An engine holds its model, which would never be freed then: it gets a copy of the outermost module, which
        # shares all that is inside it.
        engines[key] = Engine(copy.copy(model), rule, precision, strict)
    engines[key].model.training = model.training
    return engines[key]


def _tensor(name: str, value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value
    try:
        return torch.as_tensor(np.asarray(value))
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
