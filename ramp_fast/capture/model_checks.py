"""What can be told of a model before it is captured: its mode, its weights, and what it is."""

from __future__ import annotations

import functools
import inspect
import types
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ramp_fast.errors import UnsupportedModelError


def require_module(model: Any) -> None:
    """Raise a TypeError where ``model`` is no module."""
    if isinstance(model, torch.export.ExportedProgram):
        raise TypeError("model must be a torch.nn.Module, got an ExportedProgram: pass its module()")
    if isinstance(model, type) or not isinstance(model, nn.Module):
        what = (
            f"the class {model.__name__}: make an instance of it" if isinstance(model, type) else type(model).__name__
        )
        if not isinstance(model, type) and callable(model):
            what += ": wrap it in a module whose forward calls it"
        raise TypeError(f"model must be a torch.nn.Module, got {what}")


def check_model(model: nn.Module) -> None:
    """Refuse models that cannot be captured or would not compute what they do at inference.

    Training mode is refused where a module reads it, as Dropout and BatchNorm do; that of containers says nothing.

    Raises
    ------
    UnsupportedModelError
    """
    for name, module in model.named_modules():
        shown = name or "the model"
        if isinstance(module, torch.jit.ScriptModule):
            raise UnsupportedModelError(
                f"{shown} is a torch.jit module ({type(module).__name__}), which torch.export cannot capture: "
                "use the module that it was made from"
            )
        if isinstance(module, nn.parallel.DistributedDataParallel):
            raise UnsupportedModelError(f"{shown} is a DistributedDataParallel wrapper: use its .module")
        if _quantised(type(module)):
            raise UnsupportedModelError(
                f"{shown} is a quantised module ({type(module).__name__}): use the floating-point model"
            )
    _check_tensors(model)
    if training := in_training(model):
        others = " and others" if len(training) > 1 else ""
        raise UnsupportedModelError(f"the model is in training mode ({training[0]}{others}): call model.eval()")


def in_training(model: nn.Module) -> list[str]:
    """Names of the modules that are in training mode and may compute something else than in eval mode."""
    return [name or "(model)" for name, m in model.named_modules() if m.training and _acts_in_training(m)]


def _check_tensors(model: nn.Module) -> None:
    devices: dict[torch.device, str] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise UnsupportedModelError(f"{name} has no shape yet (a lazy module): call the model on images once")
        if (kind := _special(tensor)) is not None:
            raise UnsupportedModelError(
                f"{name} is a {kind}, no plain tensor: use the model with its weights whole and not quantised"
            )
        devices.setdefault(tensor.device, name)
        narrow = tensor.is_floating_point() and tensor.dtype.itemsize < 2
        if tensor.is_quantized or narrow or (isinstance(tensor, nn.Parameter) and not tensor.is_floating_point()):
            raise UnsupportedModelError(
                f"parameter {name} is {tensor.dtype}: quantised and non-floating models cannot be attributed; "
                "use the floating-point model"
            )
    empty = next((name for device, name in devices.items() if device.type == "meta"), None)
    if empty is not None:
        raise UnsupportedModelError(f"the model has no weights ({empty} is on the meta device): load them first")
    if len(devices) > 1:
        where = ", ".join(f"{name} on {device}" for device, name in sorted(devices.items(), key=lambda d: str(d[0])))
        raise UnsupportedModelError(f"the model is spread over several devices ({where}): move it to one")


def _special(tensor: Any) -> str | None:
    """The class of a tensor that stands for others: a sharded one, or one of packed integers."""
    return type(tensor).__name__ if is_traceable_wrapper_subclass(tensor) else None


def _quantised(kind: type) -> bool:
    """Whether a module of this class computes in integers. FloatFunctional, for models to be quantised, does not."""
    parts = kind.__module__.split(".")
    return parts[0] == "torch" and "quantized" in parts and not kind.__name__.endswith("FloatFunctional")


_READS: weakref.WeakKeyDictionary[type, bool] = weakref.WeakKeyDictionary()


def _acts_in_training(module: nn.Module) -> bool:
    """Whether a module in training mode may compute something else than in eval mode."""
    if isinstance(module, _DropoutNd) and module.p == 0:
        return False
    if "drop_prob" in vars(module) and not module.drop_prob:  # stochastic depth
        return False
    kind = type(module)
    if kind not in _READS:
        _READS[kind] = _reads_training(kind, [_own(kind, name) for name in ("forward", "__call__")])
    return _READS[kind] or ("forward" in vars(module) and _reads_training(kind, [[vars(module)["forward"]]]))


def _own(kind: type, name: str) -> list[Any]:
    """What the classes of a module define under ``name``, nn.Module itself left out."""
    return [vars(k)[name] for k in kind.__mro__ if k not in (nn.Module, object) and name in vars(k)]


def _reads_training(kind: type, start: list[list[Any]]) -> bool:
    """Whether a forward pass, or a method or function that it names, names ``training``."""
    waiting, seen = [f for several in start for f in several], set()
    while waiting:
        function = _function(waiting.pop())
        if function is None or function.__code__ in seen:
            continue
        seen.add(function.__code__)
        for name in words(function.__code__):
            if name == "training":
                return True
            waiting.extend(_own(kind, name))
            helper = function.__globals__.get(name)
            if isinstance(helper, types.FunctionType) and not helper.__module__.startswith("torch."):
                waiting.append(helper)
    return False


def _function(value: Any) -> types.FunctionType | None:
    """The Python function behind a method, a property, a partial or a decorator."""
    value = inspect.unwrap(value.func if isinstance(value, functools.partial) else value)
    if isinstance(value, property):
        value = value.fget
    value = getattr(value, "__func__", value)
    return value if isinstance(value, types.FunctionType) else None


def words(code: types.CodeType) -> Iterator[str]:
    """Names and strings of a function and of the functions within it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, types.CodeType):
            yield from words(constant)
