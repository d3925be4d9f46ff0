"""A model is looked at and left as it was: attributes, caches, hooks and what hooks keep are put back."""

from __future__ import annotations

import contextlib
import functools
import random
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.nn.modules import module as nn_module
from torch.nn.utils.prune import BasePruningMethod

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = tuple(f"_global{name}" for name in _HOOKS)
_CACHED = functools._lru_cache_wrapper
_Function = (types.FunctionType, types.MethodType, functools.partial, staticmethod, classmethod, property)


@contextmanager
def preserved(model: torch.nn.Module) -> Iterator[None]:
    """Put back whatever the model, its classes, its hooks and the functions they call have kept in the meantime.

    A model that is traced works on tensors without values: none may stay in a cache, a list or an attribute.
    """
    before = _Snapshot()
    before.add(model.modules())
    before.add(user_hooks(model).values())
    numbers = random.getstate(), np.random.get_state()  # noqa: NPY002  # the global stream is what must not move
    try:
        yield
    finally:
        before.restore()
        random.setstate(numbers[0])
        np.random.set_state(numbers[1])  # noqa: NPY002


def user_hooks(model: torch.nn.Module) -> dict[int, Callable[..., Any]]:
    """Hooks of the modules, and those of all modules, that see tensors of a forward or backward pass.

    Not those that make up the weights: weight_norm, spectral_norm and pruning are written as hooks. The keys are
    PyTorch's own, which no other hook gets again.
    """
    registered = [vars(m).get(name) for m in model.modules() for name in _HOOKS]
    registered += [vars(nn_module)[name] for name in _GLOBAL_HOOKS]
    return {key: hook for hooks in registered if hooks for key, hook in hooks.items() if not _makes_weights(hook)}


def _makes_weights(hook: Any) -> bool:
    return isinstance(hook, BasePruningMethod) or type(hook).__module__.startswith("torch.nn.utils.")


@contextmanager
def _other_hooks(model: torch.nn.Module, other: Callable[[Any], Any]) -> Iterator[None]:
    """In place of each of :func:`user_hooks` run ``other`` of it (None: nothing); registrations stay as they are."""
    places = [(vars(m), name) for m in model.modules() for name in _HOOKS]
    places += [(vars(nn_module), name) for name in _GLOBAL_HOOKS]
    kept = [(place, name, place[name]) for place, name in places if place.get(name)]
    try:
        for place, name, hooks in kept:
            run = {key: hook if _makes_weights(hook) else other(hook) for key, hook in hooks.items()}
            place[name] = OrderedDict((key, hook) for key, hook in run.items() if hook is not None)
        yield
    finally:
        for place, name, hooks in kept:
            place[name] = hooks


@contextmanager
def without_hooks(model: torch.nn.Module) -> Iterator[None]:
    """Run no :func:`user_hooks` meanwhile; registrations, their order and their handles stay as they are."""
    with _other_hooks(model, lambda hook: None):
        yield


@contextmanager
def watched_hooks(model: torch.nn.Module) -> Iterator[list[str]]:
    """Meanwhile :func:`user_hooks` that return another value than they were given are noted, by name."""
    noted: list[str] = []

    def watched(hook: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            result = hook(*args, **kwargs)
            if result is not None and not any(result is arg for arg in args):
                noted.append(getattr(hook, "__qualname__", type(hook).__name__))
            return result

        return call

    with _other_hooks(model, watched):
        yield noted


class _Snapshot:
    """Contents of everything mutable that can be reached from some objects."""

    def __init__(self) -> None:
        self._seen: dict[int, Any] = {}  # objects stay alive, so that identities are not used twice
        self._contents: list[tuple[Any, Any]] = []
        self._attributes: list[tuple[Any, dict[str, Any]]] = []
        self._cells: list[tuple[types.CellType, Any]] = []
        self._globals: list[tuple[dict[str, Any], str, Any]] = []
        self._caches: list[tuple[Any, int]] = []

    def add(self, values: Iterable[Any]) -> None:
        waiting = list(values)
        while waiting:
            value = waiting.pop()
            if type(value) in weakref.ProxyTypes or isinstance(value, (torch.Tensor, str, int, float, type(None))):
                continue  # what a proxy stands for may be gone
            if id(value) in self._seen:
                continue
            self._seen[id(value)] = value
            waiting.extend(self._note(value))

    def _note(self, value: Any) -> Iterable[Any]:
        """Note what ``value`` holds; return it."""
        if isinstance(value, (dict, list, set, deque)):
            plain = dict if isinstance(value, dict) else set if isinstance(value, set) else list
            self._contents.append((value, plain(value)))
            return list(value.values() if isinstance(value, dict) else value)
        if isinstance(value, (tuple, frozenset)):
            return value
        if isinstance(value, _CACHED):
            self._caches.append((value, value.cache_info().currsize))
            return [value.__wrapped__]
        if isinstance(value, _Function):
            return self._of_function(value)
        if isinstance(value, type):
            return self._of_class(value)
        if isinstance(value, types.ModuleType) or not hasattr(value, "__dict__"):
            return ()
        if isinstance(value, torch.nn.Module) or not _of_torch(type(value)):
            self._attributes.append((value, dict(vars(value))))
            return [type(value), *vars(value).values()]
        return ()

    def _of_class(self, value: type) -> Iterable[Any]:
        if _of_torch(value) or value.__module__ == "builtins":
            return ()
        self._attributes.append((value, dict(vars(value))))
        return [*value.__bases__, *vars(value).values()]

    def _of_function(self, function: Any) -> Iterable[Any]:
        if isinstance(function, functools.partial):
            return [function.func, *function.args, *function.keywords.values()]
        if isinstance(function, property):
            return [function.fget]
        if not isinstance(function, types.FunctionType):
            return [function.__func__, getattr(function, "__self__", None)]
        if _of_torch(function):
            return ()
        held: list[Any] = [*(function.__defaults__ or ()), vars(function)]
        for cell in function.__closure__ or ():
            try:
                self._cells.append((cell, cell.cell_contents))
            except ValueError:  # not assigned yet
                continue
            held.append(cell.cell_contents)
        for name in _names(function.__code__):
            value = function.__globals__.get(name)
            if isinstance(value, (dict, list, set, deque, types.FunctionType, _CACHED)):
                held.append(value)
            if name in function.__globals__:
                self._globals.append((function.__globals__, name, value))
        return held

    def restore(self) -> None:
        for own, kept in self._contents:
            if not _same_items(own, kept):
                own.clear()
                (own.extend if isinstance(own, (list, deque)) else own.update)(kept)
        for owner, attributes in self._attributes:
            now = vars(owner)
            for name in [n for n in now if n not in attributes]:
                _delete(owner, name)
            for name, value in attributes.items():
                if now.get(name, now) is not value:
                    _set(owner, name, value)
        for cell, value in self._cells:
            cell.cell_contents = value
        for names, name, value in self._globals:
            if isinstance(names.get(name), torch.Tensor):  # whatever else changed may be another thread's work
                names[name] = value
        for cache, size in self._caches:
            if cache.cache_info().currsize != size:
                cache.cache_clear()


def _names(code: types.CodeType) -> set[str]:
    """Names that a function, and the functions within it, look up."""
    inner = (c for c in code.co_consts if isinstance(c, types.CodeType))
    return set(code.co_names).union(*(_names(c) for c in inner))


def _of_torch(value: Any) -> bool:
    module = getattr(value, "__module__", None) or ""
    return module == "torch" or module.startswith(("torch.", "torchgen."))


def _set(owner: Any, name: str, value: Any) -> None:
    if isinstance(owner, type):
        with contextlib.suppress(AttributeError, TypeError):  # what Python itself keeps there
            setattr(owner, name, value)
    else:
        vars(owner)[name] = value


def _delete(owner: Any, name: str) -> None:
    if isinstance(owner, type):
        with contextlib.suppress(AttributeError, TypeError):
            delattr(owner, name)
    else:
        del vars(owner)[name]


def _same_items(a: Any, b: Any) -> bool:
    """Whether two containers hold the same objects, compared by identity."""
    if isinstance(a, (set, frozenset)):
        return {id(v) for v in a} == {id(v) for v in b}
    if isinstance(a, dict):
        return list(a) == list(b) and all(a[k] is b[k] for k in a)
    return len(a) == len(b) and all(v is w for v, w in zip(a, b, strict=True))
