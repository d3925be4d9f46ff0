"""Numbers that a model reads off its own constants while it is captured: ``param.item()``, ``if (std == 0).any():``.

The exporter's tensors have no values, so it gives up where Python needs one. What depends on weights and literals only
is computed here, from the real ones, when a model asks for it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

_READS = {Tensor.item, Tensor.tolist, Tensor.__bool__, Tensor.__float__, Tensor.__int__, Tensor.__index__}
_PLACES = {torch.nonzero, Tensor.nonzero, torch.argwhere, Tensor.argwhere, torch.where}
_INDEXED = {Tensor.__getitem__, Tensor.__setitem__}
_RANDOM = ("rand", "normal", "bernoulli", "multinomial", "poisson", "dropout", "exponential")


class _Unknown(Exception):
    """The value depends on the images, or on what was written since."""


class KnownValues(TorchFunctionMode):
    """While active, numbers are read off tensors that depend on the model's weights and on literals only.

    Attributes
    ----------
    read : bool
        Whether a number came from a weight: then the captured graph holds for these weights only.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model, self.read = model, False
        self._real = _named(model)
        # By identity: weights by name, other constants by the call that made them, None for what is not known.
        # The tensors are held, so that no other one gets their identity.
        self._origin: dict[int, tuple[Tensor, str | tuple[Any, Any, Any] | None]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _READS and len(args) == 1 and not kwargs:
            try:
                return self._read(func, args[0])
            except _Unknown:
                return func(*args, **kwargs)
        if func in _PLACES and len(args) == 1 and isinstance(args[0], Tensor):
            found = self._places_of(args[0])
            if found is not None:
                as_tuple = kwargs.get("as_tuple", func is torch.where)
                return tuple(found.unbind(1)) if as_tuple else found
        if func in _INDEXED:
            args = args[0], self._whole_numbers(*args[:2]), *args[2:]
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name == "__setitem__" or (name.endswith("_") and not name.endswith("__")) or "out" in kwargs:
            written = kwargs.get("out", args[0] if args else None)
            if isinstance(written, Tensor):
                self._origin[id(written)] = written, None
        elif isinstance(result, Tensor) and id(result) not in self._origin:
            known = not any(word in name for word in _RANDOM)
            known = known and all(self._known(t) is not None for t in _tensors_in((args, kwargs)))
            self._origin[id(result)] = result, (func, args, kwargs) if known else None
        return result

    def _whole_numbers(self, tensor: Tensor, index: Any) -> Any:
        """An index with masks as the places where they are true: how many there are, the exporter cannot know."""
        parts = list(index) if isinstance(index, tuple) else [index]
        axes = [_axes_of(part) for part in parts]
        axis, found = 0, []
        for part, own in zip(parts, axes, strict=True):
            if part is Ellipsis:
                axis += tensor.dim() - sum(axes)
                found.append(part)
                continue
            sizes = tensor.shape[axis : axis + own]
            axis += own
            found += self._places(part, sizes) if _is_mask(part) else [part]
        return tuple(found) if any(_is_mask(part) for part in parts) else index

    def _places(self, mask: Any, sizes: Any) -> list[Any]:
        """For every axis of a mask where it is true; the mask itself where it is not known or does not fit."""
        own = tuple(mask.shape) if isinstance(mask, Tensor) else np.shape(mask)
        if not all(isinstance(size, int) for size in sizes) or own != tuple(sizes):
            return [mask]
        found = self._places_of(mask) if isinstance(mask, Tensor) else torch.tensor(np.argwhere(mask), device="cpu")
        return [mask] if found is None else list(found.unbind(1))

    def _places_of(self, mask: Tensor) -> Tensor | None:
        """Where a tensor is not zero, ``[places, axes]``, if that is known."""
        try:
            places = self._read(lambda known: known.nonzero().tolist(), mask)
        except _Unknown:
            return None
        found = torch.tensor(places, dtype=torch.long, device=mask.device).reshape(len(places), mask.dim())
        self._origin[id(found)] = found, (torch.tensor, (places,), {})
        return found

    def _known(self, tensor: Tensor) -> str | tuple[Any, Any, Any] | None:
        if id(tensor) not in self._origin:
            # A tensor that has values is a constant that the exporter was not told of.
            real = not isinstance(tensor, FakeTensor) and type(tensor) in (Tensor, torch.nn.Parameter)
            self._origin[id(tensor)] = tensor, (lambda: tensor, (), {}) if real else None
            for name, weight in _named(self.model).items():  # while it is traced, the model has other tensors
                self._origin.setdefault(id(weight), (weight, name))
                if weight is tensor:
                    self._origin[id(weight)] = weight, name
        return self._origin[id(tensor)][1]

    def _read(self, func: Any, tensor: Tensor) -> Any:
        with torch.no_grad(), _disable_current_modes(), torch._C.DisableTorchFunction():
            return func(self._computed(tensor))

    def _computed(self, value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return type(value)(self._computed(v) for v in value)
        if not isinstance(value, Tensor):
            return value
        origin = self._known(value)
        if origin is None:
            raise _Unknown
        if isinstance(origin, str):
            self.read = True
            return self._real[origin].detach()
        func, args, kwargs = origin
        return func(*self._computed(args), **{k: self._computed(v) for k, v in kwargs.items()})


def _is_mask(part: Any) -> bool:
    """Whether a part of an index says of every entry whether it is taken."""
    if isinstance(part, list):
        return bool(part) and all(type(entry) is bool for entry in part)
    if isinstance(part, np.ndarray):
        return part.dtype == np.bool_ and part.ndim > 0
    return isinstance(part, Tensor) and part.dtype in (torch.bool, torch.uint8) and part.dim() > 0


def _axes_of(part: Any) -> int:
    """How many axes a part of an index is about, as far as that is known without the others."""
    if part is None or part is Ellipsis or isinstance(part, bool):
        return 0
    if not _is_mask(part):
        return 1
    return part.dim() if isinstance(part, Tensor) else np.ndim(part)


def _named(model: torch.nn.Module) -> dict[str, Tensor]:
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def _tensors_in(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for v in value for t in _tensors_in(v)] if isinstance(value, (tuple, list)) else []
