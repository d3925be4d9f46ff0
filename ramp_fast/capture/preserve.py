"""A model is looked at and left as it was: attributes, caches, hooks and what hooks keep are put back."""

from __future__ import annotations

import contextlib
import functools
import random
import sys
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

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = tuple(f"_global{name}" for name in HOOKS)
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
    registered = [vars(m).get(name) for m in model.modules() for name in HOOKS]
    registered += [vars(nn_module)[name] for name in _GLOBAL_HOOKS]
    return {key: hook for hooks in registered if hooks for key, hook in hooks.items() if not _makes_weights(hook)}


def _makes_weights(hook: Any) -> bool:
    return isinstance(hook, BasePruningMethod) or type(hook).__module__.startswith("torch.nn.utils.")


@contextmanager
def _other_hooks(model: torch.nn.Module, other: Callable[[Any], Any]) -> Iterator[None]:
    """In place of each of :func:`user_hooks` run ``other`` of it (None: nothing); registrations stay as they are."""
    places = [(vars(m), name) for m in model.modules() for name in HOOKS]
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


# How far what functions find by name is looked into: it may refer to all of a program.
_DEPTH = 4
_MOST_ITEMS = 10_000

_ABSENT = object()


class _Snapshot:
    """Contents of everything mutable that can be reached from some objects.

    What is the model's own is put back as it was, and so are containers and caches that functions find by name. Other
    names of modules, and the objects and classes under them, may be other threads' work: of those only tensors that
    have come meanwhile are taken out.
    """

    def __init__(self) -> None:
        self._seen: dict[int, Any] = {}  # objects stay alive, so that identities are not used twice
        self._contents: list[tuple[Any, Any]] = []
        self._attributes: list[tuple[Any, dict[str, Any]]] = []
        self._cells: list[tuple[types.CellType, Any]] = []
        self._caches: list[tuple[Any, int]] = []
        self._spaces: set[tuple[int, frozenset[str]]] = set()
        self._globals: list[tuple[dict[str, Any], str, Any]] = []
        self._shared: dict[int, Any] = {}
        self._shared_contents: list[tuple[Any, Any]] = []
        self._shared_attributes: list[tuple[Any, dict[str, Any]]] = []

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
            self._contents.append((value, copied(value)))
            return _items(value)
        if isinstance(value, (tuple, frozenset)):
            return value
        if isinstance(value, _CACHED):
            self._caches.append((value, value.cache_info().currsize))
            return [value.__wrapped__]
        if isinstance(value, _Function):
            return self._of_function(value)
        if isinstance(value, type):
            return self._of_class(value)
        if _has_attributes(value):
            self._attributes.append((value, attributes_of(value)))
            return [type(value), *attributes_of(value).values()]
        return ()

    def _of_class(self, value: type) -> Iterable[Any]:
        if not _has_attributes(value):
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
            self._cells.append((cell, _content(cell)))
            held.append(_content(cell))
        names, space = _names(function.__code__), function.__globals__
        held += self._named(names, space)
        for name in names:  # imported where it is used
            held += self._named(names, _space(sys.modules.get(name)))
            held += self._named(names, _space(sys.modules.get(f"{space.get('__package__')}.{name}")))
        return held

    def _named(self, names: frozenset[str], space: dict[str, Any]) -> list[Any]:
        """Note what ``names`` are in a module, and in modules that are among them; return what is to be added."""
        if (id(space), names) in self._spaces:
            return []
        self._spaces.add((id(space), names))
        held: list[Any] = []
        for name in names if space else ():
            value = space.get(name, _ABSENT)
            self._globals.append((space, name, value))
            if isinstance(value, (dict, list, set, deque, types.FunctionType, _CACHED)):
                held.append(value)
            elif isinstance(value, types.ModuleType):
                held += self._named(names, _space(value))
            else:
                held += self._note_shared(value)
        return held

    def _note_shared(self, top: Any) -> list[Any]:
        """Note what an object or class holds; return the functions among that, which are to be added."""
        functions: list[Any] = []
        waiting = [(top, _DEPTH)]
        while waiting:
            value, depth = waiting.pop()
            if isinstance(value, (*_Function, _CACHED)):
                functions.append(value)
                continue
            if id(value) in self._shared:
                continue
            self._shared[id(value)] = value
            inner: list[Any] = []
            if isinstance(value, (dict, list, set, deque)):
                self._shared_contents.append((value, copied(value)))
                inner = _items(value)
            elif isinstance(value, (tuple, frozenset)):
                inner = list(value)
            elif _has_attributes(value):
                own = attributes_of(value)
                self._shared_attributes.append((value, own))
                inner = [*own.values(), *(value.__bases__ if isinstance(value, type) else [type(value)])]
            if depth and len(inner) <= _MOST_ITEMS:
                waiting += [(item, depth - 1) for item in inner]
        return functions

    def restore(self) -> None:
        for own, kept in self._contents:
            if not _same_items(own, kept):
                _refill(own, kept)
        for owner, attributes in self._attributes:
            now = attributes_of(owner)
            for name in [*now, *(n for n in attributes if n not in now)]:
                if now.get(name, _ABSENT) is not attributes.get(name, _ABSENT):
                    _put_back(owner, name, attributes.get(name, _ABSENT))
        for cell, value in self._cells:
            if value is not _ABSENT:
                cell.cell_contents = value
            elif _content(cell) is not _ABSENT:
                del cell.cell_contents
        self._restore_shared()
        for cache, size in self._caches:
            if cache.cache_info().currsize != size:
                cache.cache_clear()

    def _restore_shared(self) -> None:
        for space, name, value in self._globals:
            if space.get(name, value) is not value and _holds_tensors(space[name]):
                _put_back(space, name, value)
        for owner, attributes in self._shared_attributes:
            for name, value in attributes_of(owner).items():
                before = attributes.get(name, _ABSENT)
                if value is not before and _holds_tensors(value):
                    _put_back(owner, name, before)
        for own, kept in self._shared_contents:
            if isinstance(own, dict):
                for key in [k for k, v in copied(own).items() if v is not kept.get(k, _ABSENT) and _holds_tensors(v)]:
                    _put_back(own, key, kept.get(key, _ABSENT))
            elif not _same_items(own, kept):
                before_ids = {id(item) for item in kept}
                if any(id(item) not in before_ids and _holds_tensors(item) for item in _items(own)):
                    _refill(own, kept)


# Containers of other classes are read and written as these are: a registry may make what it is asked for.
_CONTAINERS: tuple[Any, ...] = (OrderedDict, dict, list, set, frozenset, tuple, deque)


def _plain(container: Any) -> Any:
    """The class of Python's own that a container is of."""
    return next(kind for kind in _CONTAINERS if isinstance(container, kind))


def _items(container: Any) -> list[Any]:
    """What a container holds, of a dictionary the values."""
    kind = _plain(container)
    return list(kind.values(container) if isinstance(container, dict) else kind.__iter__(container))


def copied(container: Any) -> Any:
    """What a container holds, in a dict, a set or a list."""
    kind = _plain(container)
    if isinstance(container, dict):
        return dict(list(kind.items(container)))
    return (set if kind is set else list)(kind.__iter__(container))


def _refill(container: Any, kept: Any) -> None:
    """Let a container hold what a copy of it holds."""
    kind = _plain(container)
    kind.clear(container)
    if isinstance(container, dict):
        for key, value in kept.items():
            kind.__setitem__(container, key, value)
    else:
        (kind.update if kind is set else kind.extend)(container, kept)


def _content(cell: types.CellType) -> Any:
    """What a variable of a closure is, if it has been assigned yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return _ABSENT


def _names(code: types.CodeType) -> frozenset[str]:
    """Names that a function, and the functions within it, look up."""
    inner = (c for c in code.co_consts if isinstance(c, types.CodeType))
    return frozenset(code.co_names).union(*(_names(c) for c in inner))


def _space(module: types.ModuleType | None) -> dict[str, Any]:
    """The names of a module, if it is one that may keep what a model gives it."""
    top = "" if module is None else module.__name__.partition(".")[0]
    return {} if module is None or top in ("torch", "numpy", *sys.stdlib_module_names) else vars(module)


def _of_torch(value: Any) -> bool:
    module = getattr(value, "__module__", None) or ""
    return module == "torch" or module.startswith(("torch.", "torchgen."))


def _has_attributes(value: Any) -> bool:
    """Whether an object or a class has attributes of its own that a model may set."""
    if value is _ABSENT or isinstance(value, (torch.Tensor, types.ModuleType)) or type(value) in weakref.ProxyTypes:
        return False
    if isinstance(value, type):
        return not _of_torch(value) and value.__module__ != "builtins"
    return isinstance(value, torch.nn.Module) or (
        not _of_torch(type(value)) and (hasattr(value, "__dict__") or bool(_slots(type(value))))
    )


def _slots(kind: type) -> list[str]:
    given = [vars(base).get("__slots__", ()) for base in kind.__mro__]
    names = [n for slots in given for n in ([slots] if isinstance(slots, str) else slots)]
    return [n for n in names if not n.startswith("__")]


def attributes_of(owner: Any) -> dict[str, Any]:
    """The attributes of an object or a class that are set."""
    slots = [] if isinstance(owner, type) else _slots(type(owner))
    held = {name: getattr(owner, name, _ABSENT) for name in slots}
    return {**{n: v for n, v in held.items() if v is not _ABSENT}, **getattr(owner, "__dict__", {})}


def _holds_tensors(value: Any, depth: int = _DEPTH) -> bool:
    """Whether a value is a tensor, or something made lately that has one."""
    if isinstance(value, torch.Tensor):
        return True
    if not depth or isinstance(value, (str, type, types.ModuleType)):
        return False
    if isinstance(value, (dict, list, set, deque, tuple, frozenset)):
        inner = _items(value)
    else:
        inner = list(attributes_of(value).values()) if _has_attributes(value) else []
    return any(_holds_tensors(item, depth - 1) for item in list(inner))


def _put_back(owner: Any, name: Any, value: Any) -> None:
    """An entry of a dictionary, or an attribute of an object or a class, is what it was again, or is gone again."""
    if not isinstance(owner, (dict, type)) and name not in _slots(type(owner)):
        owner = vars(owner)  # past what a module does when it is given a parameter
    if isinstance(owner, dict):
        kind = _plain(owner)
        if value is not _ABSENT:
            kind.__setitem__(owner, name, value)
        elif kind.__contains__(owner, name):
            kind.__delitem__(owner, name)
        return
    with contextlib.suppress(AttributeError, TypeError):  # what Python itself keeps in a class
        if value is _ABSENT:
            delattr(owner, name)
        else:
            setattr(owner, name, value)


def _same_items(a: Any, b: Any) -> bool:
    """Whether two containers hold the same objects, compared by identity."""
    a = copied(a)
    if isinstance(a, set):
        return {id(v) for v in a} == {id(v) for v in b}
    if isinstance(a, dict):
        return list(a) == list(b) and all(a[k] is b[k] for k in a)
    return len(a) == len(b) and all(v is w for v, w in zip(a, b, strict=True))
