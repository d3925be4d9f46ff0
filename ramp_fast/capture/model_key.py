"""What decides about the graph that a model is captured as, but for the values of its weights, as one key.

The key is a hash of what :class:`~ramp_fast.capture.model_state.Structure` watches within a process, in a form that
another process finds again: attributes of modules, names and layouts of tensors, the code of the forward pass. The
code is followed from the modules' ``forward`` by name: methods and functions outside PyTorch, as they are in memory,
with their files, and the values of globals that they name (switches such as timm's for fused attention).
"""

from __future__ import annotations

import enum
import functools
import hashlib
import logging
import os
import pathlib
import platform
import re
import sys
import types
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from torch.nn.utils import parametrize

import ramp_fast
from ramp_fast.capture.model_checks import words
from ramp_fast.capture.model_state import tensors_of
from ramp_fast.capture.preserve import HOOKS, attributes_of

# Of a module's own dictionary: described by themselves, refused where they are not empty, or of no effect.
_NOT_ATTRIBUTES = frozenset({"_parameters", "_buffers", "_modules", "_backward_hooks", "_backward_pre_hooks"}
                            | {"_forward_hooks", "_forward_pre_hooks", "_state_dict_hooks", "_state_dict_pre_hooks"}
                            | {"_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"})  # fmt: skip
_TORCH, _NUMPY, _PYTHON = (str(pathlib.Path(str(m.__file__)).parent) + os.sep for m in (torch, np, os))
_OURS = pathlib.Path(ramp_fast.__file__).parent
_STANDARD = frozenset({"torch", "numpy", "builtins", *sys.stdlib_module_names}) - {"__main__"}
_BUILTIN = (
    *(types.BuiltinFunctionType, np.ufunc, torch._ops.OpOverload, torch._ops.OpOverloadPacket),
    *(types.GetSetDescriptorType, types.MemberDescriptorType, types.MethodDescriptorType, types.WrapperDescriptorType),
)
# A forward pass does not get at these by itself.
_UNCALLED = frozenset(
    {"__init__", "__new__", "__setstate__", "__getstate__", "__repr__", "__del__", "__init_subclass__"}
)
_MOST = 100_000  # values in one description

Form = tuple[Any, ...]


class NotCacheable(Exception):
    """Something decides about the graph that has no form another process finds again; says what."""


def model_key(model: nn.Module, image_shape: tuple[int, int, int], strict: bool) -> str:
    """A key that two models have in common only if they are captured as one graph.

    Raises
    ------
    NotCacheable
    """
    description = _Description(model)
    parts = (_versions(), _settings(model), tuple(image_shape), strict, description.model(), description.code())
    return hashlib.sha256(repr(parts).encode("utf-8", "surrogatepass")).hexdigest()


def _versions() -> Form:
    own = [*sorted((_OURS / "capture").glob("*.py")), _OURS / "graph.py", _OURS / "params.py"]
    sources = tuple((path.name, _digest_of_file(str(path))) for path in own)
    python = sys.implementation.name, platform.python_version(), sys.flags.optimize
    return ramp_fast.__version__, sources, torch.__version__, torch.version.git_version, np.__version__, python


def _settings(model: nn.Module) -> Form:
    """What of the process decides about operations that PyTorch chooses."""
    device = next((t.device for t in tensors_of(model).values()), torch.device("cpu")).type
    b = torch.backends
    return (
        *(str(torch.get_default_dtype()), str(torch.get_default_device()), torch.is_inference_mode_enabled()),
        *(torch.is_autocast_enabled(device), str(torch.get_autocast_dtype(device))),
        *(b.cuda.flash_sdp_enabled(), b.cuda.mem_efficient_sdp_enabled(), b.cuda.math_sdp_enabled()),
        *(b.cuda.cudnn_sdp_enabled(), b.mha.get_fastpath_enabled(), b.cudnn.enabled, b.mkldnn.enabled),
        *(torch.are_deterministic_algorithms_enabled(),),
    )


class _Description:
    """A model in values that can be written down, with the classes and functions that are met on the way."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._paths: dict[int, str] = {}
        self._seen: dict[int, int] = {}  # containers and objects by number: they may contain themselves
        self._held: list[Any] = []  # so that identities are not used twice
        self._kinds: dict[type, int] = {}  # by number: several that a function made may have one name
        self._functions: dict[types.FunctionType, int] = {}
        self._torch: set[types.FunctionType] = set()
        self._files: dict[str, None] = {}
        self._packages: dict[str, None] = {}
        self._count = 0

    def model(self) -> Form:
        """Modules, attributes and tensors."""
        for name in HOOKS:
            if getattr(nn_module, f"_global{name}", None):
                raise NotCacheable("hooks of all modules")
        self._paths = {id(m): path for path, m in reversed(list(self._model.named_modules(remove_duplicate=False)))}
        order: dict[int, int] = {}  # tensors that are one in this model may be two in another
        found = []
        for path, module in self._model.named_modules(remove_duplicate=False):
            if any(vars(module).get(name) for name in HOOKS):
                raise NotCacheable(f"hooks of {path or 'the model'}")
            if parametrize.is_parametrized(module):
                raise NotCacheable(f"parametrizations of {path or 'the model'}")
            if {"forward", "__call__"} & vars(module).keys():
                raise NotCacheable(f"a forward method that {path or 'the model'} has of its own")
            self._kinds.setdefault(type(module), len(self._kinds))
            own = tuple((n, self.form(v)) for n, v in vars(module).items() if n not in _NOT_ATTRIBUTES)
            tensors = tuple(
                (name, *_tensor(name, t), order.setdefault(id(t), len(order)))
                for name, t in (*module._parameters.items(), *module._buffers.items())
            )
            found.append(
                (path, self._paths[id(module)], self._class(type(module)), own, tensors, tuple(module._modules))
            )
        return tuple(found)

    def code(self) -> Form:
        """Code that the forward pass may run, outside PyTorch, and what it reads by name."""
        found: list[Form] = []
        names: set[str] = set()
        members: set[tuple[type, str]] = set()
        modules: set[tuple[int, str]] = set()
        done = 0
        while True:
            before = done, len(members), len(self._kinds)
            for function in list(self._functions)[done:]:
                done += 1
                found.append((self._functions[function], *self._of_function(function, names, modules)))
            for base in [b for kind in list(self._kinds) for b in kind.__mro__ if b is not object]:
                for name, value in list(vars(base).items()):
                    if (base, name) not in members and _is_called(base, name, value, names):
                        members.add((base, name))
                        found.append((self._class(base), name, self._member(base, value)))
            if before == (done, len(members), len(self._kinds)):
                break
        files = tuple((pathlib.Path(path).name, _digest_of_file(path)) for path in self._files)
        packages = tuple((n, str(getattr(sys.modules.get(n), "__version__", ""))) for n in sorted(self._packages))
        environment = tuple(sorted((n, os.environ[n]) for n in names if n in os.environ))
        return *found, files, packages, environment

    def form(self, value: Any) -> Form:
        """A value in text and tuples: equal for values that a forward pass cannot tell apart."""
        self._count += 1
        if self._count > _MOST:
            raise NotCacheable("more values than are looked at")
        kind = type(value)
        if value is None or kind in (bool, int, float, complex, str, bytes):
            return kind.__name__, repr(value)
        if isinstance(value, (torch.dtype, torch.device, torch.layout, torch.memory_format)):
            return kind.__name__, str(value)
        if isinstance(value, Tensor):
            raise NotCacheable("a tensor that is neither parameter nor buffer")
        if isinstance(value, nn.Module):
            if id(value) not in self._paths:
                raise NotCacheable(f"a module ({kind.__name__}) that is not registered")
            return "module", self._paths[id(value)]
        if isinstance(value, (type, types.GenericAlias)):
            return self._class(value) if isinstance(value, type) else ("alias", repr(value))
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if kind.__module__ == "typing":
            return "typing", repr(value)
        if isinstance(value, types.ModuleType):
            return "import", value.__name__
        if isinstance(value, logging.Logger):
            return "logger", value.name
        if isinstance(value, np.generic):
            return "numpy", str(value.dtype), repr(value)
        if isinstance(value, types.CodeType):
            return "code", *self._of_code(value)
        if kind in (tuple, torch.Size):  # which of these are one object is Python's business
            return kind.__name__, *(self.form(v) for v in value)
        if kind is frozenset:
            return kind.__name__, *sorted((self.form(v) for v in value), key=repr)
        if id(value) in self._seen:
            return "again", self._seen[id(value)]
        self._seen[id(value)] = len(self._seen)
        self._held.append(value)
        return self._of_container(value, kind)

    def _of_container(self, value: Any, kind: type) -> Form:
        if kind in (list, deque):
            return kind.__name__, *(self.form(v) for v in value)
        if kind is set:
            return kind.__name__, *sorted((self.form(v) for v in value), key=repr)
        if kind in (dict, OrderedDict, defaultdict, types.MappingProxyType):
            default = self.form(getattr(value, "default_factory", None))
            return kind.__name__, default, *((self.form(k), self.form(v)) for k, v in value.items())
        if isinstance(value, np.ndarray) and not value.dtype.hasobject:
            return "array", str(value.dtype), value.shape, hashlib.sha256(value.tobytes()).hexdigest()
        if isinstance(value, enum.Enum):
            return "enum", self._class(kind), value.name
        if isinstance(value, functools.partial):
            return "partial", *(self.form(v) for v in (value.func, value.args, value.keywords))
        if isinstance(value, types.MethodType):
            return "method", self.form(value.__func__), self.form(value.__self__)
        if isinstance(value, (staticmethod, classmethod)):
            return kind.__name__, self.form(value.__func__)
        if isinstance(value, property):
            return "property", *(self.form(f) for f in (value.fget, value.fset))
        if isinstance(value, functools._lru_cache_wrapper):
            return "cached", self.form(value.__wrapped__)
        if isinstance(value, _BUILTIN):
            if not isinstance(getattr(value, "__self__", None), (types.ModuleType, type, type(None))):
                raise NotCacheable(f"a method of an object ({value})")
            return "builtin", str(getattr(value, "__module__", "")), getattr(value, "__qualname__", str(value))
        if isinstance(value, (slice, range)):
            return kind.__name__, repr(value)
        if value is Ellipsis or value is NotImplemented:
            return (repr(value),)
        if isinstance(value, pathlib.PurePath):
            return "path", str(value)
        if kind.__name__ == "_tuplegetter":  # of a named tuple, whose fields are named beside it
            return (kind.__name__,)
        if isinstance(value, re.Pattern):
            return "pattern", repr(value.pattern), value.flags
        return self._of_object(value, kind)

    def _of_object(self, value: Any, kind: type) -> Form:
        if kind is object:
            return ("sentinel",)
        plain = kind.__module__ == "torch.autograd.grad_mode"  # decorators
        if (_standard(kind) and not plain) or not (hasattr(value, "__dict__") or attributes_of(value)):
            raise NotCacheable(f"an object of {kind.__module__}.{kind.__qualname__}")
        items: Form = ()
        readers: Any = ((dict, dict.items), (list, list.__iter__), (tuple, tuple.__iter__))
        for plain_kind, contents in readers:
            if isinstance(value, plain_kind):  # past what a class of its own may do when it is asked
                items = tuple(self.form(v) for v in contents(value))
        return "object", self._class(kind), items, *((n, self.form(v)) for n, v in attributes_of(value).items())

    def _class(self, kind: type) -> Form:
        if _standard(kind):
            return "class", kind.__module__, kind.__qualname__
        self._packages.setdefault(kind.__module__.partition(".")[0])
        self._note_file(getattr(sys.modules.get(kind.__module__), "__file__", None))
        return "class", kind.__module__, kind.__qualname__, self._kinds.setdefault(kind, len(self._kinds))

    def _note_file(self, path: str | None) -> None:
        if path and os.path.isfile(path):
            self._files.setdefault(path)

    def _function(self, function: types.FunctionType) -> Form:
        if _of_library(function) and not function.__closure__:
            self._look_into(function)
            return "function", str(function.__module__), function.__qualname__, function.__code__.co_firstlineno
        if function not in self._functions:
            self._functions[function] = len(self._functions)
            if not _of_library(function):
                self._note_file(function.__code__.co_filename)
        return "function", self._functions[function]

    def _of_function(self, function: types.FunctionType, names: set[str], modules: set[tuple[int, str]]) -> Form:
        """A function's code and values, and those that it finds by name."""
        cells = tuple(self._cell(cell) for cell in function.__closure__ or ())
        defaults = self.form(function.__defaults__), self.form(function.__kwdefaults__)
        own = self.form({k: v for k, v in vars(function).items() if k == "__wrapped__"})
        read: list[Form] = []
        if not _of_library(function):
            found = list(dict.fromkeys(words(function.__code__)))
            names.update(found)
            read = list(self._named(found, function.__globals__, modules, ()))
            package = function.__globals__.get("__package__")
            for name in found:  # imported where it is used
                for module in (sys.modules.get(name), sys.modules.get(f"{package}.{name}")):
                    if module is not None and not _is_standard(module.__name__):
                        read += self._named(found, vars(module), modules, ())
        return "function", *self._of_code(function.__code__), defaults, cells, own, *read

    def _named(
        self, names: list[str], space: dict[str, Any], modules: set[tuple[int, str]], inside: tuple[int, ...]
    ) -> Iterator[Form]:
        """Values of ``names`` in a module, and in modules that are among them; ``inside`` are those on the way."""
        for name in names:
            if name not in space or id(space) in inside:
                continue
            value = space[name]
            if not isinstance(value, types.ModuleType):
                if (id(space), name) not in modules:
                    modules.add((id(space), name))
                    yield name, self.form(value)
                continue
            yield name, value.__name__
            if not _is_standard(value.__name__):
                yield from self._named(names, vars(value), modules, (*inside, id(space)))
            else:
                yield from (self.form(f) for f in _foreign(names, vars(value)))

    def _look_into(self, function: types.FunctionType) -> None:
        """Notice functions of others that have taken the place of PyTorch's, where its modules call them."""
        waiting = [function]
        while waiting:
            own = waiting.pop()
            if own in self._torch:
                continue
            self._torch.add(own)
            names = own.__code__.co_names
            spaces = [own.__globals__, *(v for n in names if isinstance(v := own.__globals__.get(n), types.ModuleType))]
            for space in (s if isinstance(s, dict) else vars(s) for s in spaces):
                if not str(space.get("__name__")).startswith("torch"):
                    continue
                for value in (space.get(n) for n in names):
                    if isinstance(value, types.FunctionType):
                        if not _of_library(value):
                            self._function(value)
                        elif value.__module__.startswith("torch.nn."):
                            waiting.append(value)

    def _member(self, base: type, value: Any) -> Form:
        if not _standard(base):
            return self.form(value)
        return tuple(self._function(function) for function in _functions_of(value))

    def _cell(self, cell: types.CellType) -> Form:
        try:
            return self.form(cell.cell_contents)
        except ValueError:
            return ("empty",)

    def _of_code(self, code: types.CodeType) -> Form:
        """What a function does, wherever its lines are."""
        constants = tuple(self.form(c) for c in code.co_consts)
        tables = code.co_code, getattr(code, "co_exceptiontable", b"")
        counts = code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags
        return (
            *(hashlib.sha256(table).hexdigest() for table in tables),
            *(code.co_name, code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars, *counts, constants),
        )


def _tensor(name: str, tensor: Tensor | None) -> Form:
    """A parameter or buffer but for its values; those of integers, which may be indices, are taken in."""
    if tensor is None:
        return ("None",)
    if type(tensor) not in (Tensor, nn.Parameter, nn.Buffer):
        raise NotCacheable(f"{name} of type {type(tensor).__name__}")
    content = ""
    if not tensor.is_floating_point() and name != "num_batches_tracked":
        content = hashlib.sha256(tensor.detach().cpu().contiguous().numpy().tobytes()).hexdigest()
    return (
        *(type(tensor).__name__, tuple(tensor.shape), str(tensor.dtype), str(tensor.device), str(tensor.layout)),
        *(tensor.stride() if tensor.layout == torch.strided else (), tensor.requires_grad, tensor.is_inference()),
        content,
    )


def _standard(kind: type) -> bool:
    """Whether a class is Python's, PyTorch's or NumPy's: their versions say what it is."""
    return _is_standard(kind.__module__)


def _is_standard(module: str) -> bool:
    return module.partition(".")[0] in _STANDARD


def _of_library(function: types.FunctionType) -> bool:
    """Whether a function's code is that of Python, PyTorch or NumPy."""
    file = function.__code__.co_filename
    return file.startswith((_TORCH, _NUMPY, "<frozen ")) or (file.startswith(_PYTHON) and "-packages" not in file)


def _foreign(names: Iterable[str], space: dict[str, Any]) -> Iterator[types.FunctionType]:
    """Functions of others in a module of Python, PyTorch or NumPy."""
    for value in (space.get(name) for name in names):
        if isinstance(value, types.FunctionType) and not _of_library(value):
            yield value


def _functions_of(value: Any) -> Iterator[types.FunctionType]:
    for function in (value.fget, value.fset) if isinstance(value, property) else (value,):
        function = getattr(function, "__func__", function)
        if isinstance(function, types.FunctionType):
            yield function


def _is_called(base: type, name: str, value: Any, names: set[str]) -> bool:
    """Whether a forward pass may come to a member of a class: by one of ``names``, or because Python calls it."""
    if issubclass(base, nn.Module) and name in _UNCALLED:
        return False
    functions = list(_functions_of(value))
    if _standard(base):
        return any(name in names or name == "forward" or not _of_library(f) for f in functions)
    return name in names or name == "forward" or (bool(functions) and name.startswith("__") and name.endswith("__"))


@functools.lru_cache(maxsize=4096)
def _digest(path: str, time: int, size: int) -> str:
    return hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()


def _digest_of_file(path: str) -> str:
    try:
        found = os.stat(path)
        return _digest(path, found.st_mtime_ns, found.st_size)
    except OSError as error:
        raise NotCacheable(f"{path} cannot be read") from error
