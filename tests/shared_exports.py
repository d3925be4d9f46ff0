"""What torch.export makes of a model is used again for models of the same architecture: it takes most of a test's time.

Tests of capture itself do without (``OWN_EXPORTS`` of conftest.py).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn

from ramp_fast.capture.export import Exported

_PLAIN = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
_OWN = {"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"}


class _NotShared(Exception):
    """Something decides about the export that cannot be compared."""


def shared(export: Callable[..., Exported]) -> Callable[..., Exported]:
    """``export(model, batch, image_shape, *, symbolic)``, from what it gave for the last models of the same kind."""
    found: dict[Hashable, Exported] = {}

    def exported(model: nn.Module, *arguments: Any, **options: Any) -> Exported:
        try:
            key = (*_described(model), arguments, tuple(options.items()), torch.is_inference_mode_enabled())
        except _NotShared:
            return export(model, *arguments, **options)
        if key not in found:
            new = export(model, *arguments, **options)
            if new.weights_read:
                return new
            found[key] = new
            return new
        try:
            return _with_tensors_of(model, found[key])
        except KeyError:  # weights under other names than the model's
            return export(model, *arguments, **options)

    return exported


def _described(model: nn.Module) -> tuple[Hashable, ...]:
    order: dict[int, int] = {}  # tensors that are one in this model may be two in another

    def layout(tensor: Tensor | None) -> Hashable:
        return _layout(tensor), order.setdefault(id(tensor), len(order))

    return tuple(
        (
            *(path, type(module), getattr(type(module), "forward", None), module.training),
            tuple((name, _value(value)) for name, value in vars(module).items() if name not in _OWN),
            tuple((name, layout(t)) for name, t in (*module._parameters.items(), *module._buffers.items())),
            frozenset(module._non_persistent_buffers_set),
            tuple(module._modules),
        )
        for path, module in model.named_modules(remove_duplicate=False)
    )


def _layout(tensor: Tensor | None) -> Hashable:
    if tensor is None:
        return None
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_inference():
        raise _NotShared
    return tensor.shape, tensor.dtype, tensor.device, tensor.stride(), type(tensor), tensor.requires_grad


def _value(value: Any) -> Hashable:
    if isinstance(value, _PLAIN):
        return type(value), repr(value)  # 1.0, 1 and True are equal
    if isinstance(value, (tuple, list)):
        return type(value), tuple(_value(v) for v in value)
    if isinstance(value, dict):
        return type(value), tuple((_value(k), _value(v)) for k, v in value.items())
    if isinstance(value, (set, frozenset)):
        if value:
            raise _NotShared
        return type(value)
    if isinstance(value, (type, type(_value), type(len))):  # classes and functions, by identity
        return value
    raise _NotShared


def _with_tensors_of(model: nn.Module, exported: Exported) -> Exported:
    program = copy.copy(exported.program)
    tensors = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    program._state_dict = {name: tensors[name] for name in program.state_dict}
    program._constants = {name: tensors.get(name, value) for name, value in program.constants.items()}
    return Exported(program, exported.weights_read)
