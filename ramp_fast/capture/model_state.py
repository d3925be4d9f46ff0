"""What a model was when it was captured, so that it is noticed when it has changed.

Capture and packed weights hold for the model of that moment. :class:`Structure` compares everything in Python that a
forward pass may read: modules, their attributes, hooks and classes. :class:`Weights` compares tensors: where they lie,
their version counters, and checksums of their bytes, since writes through ``.data``, NumPy views and fused optimizers
leave the counters as they are.
"""

from __future__ import annotations

import functools
import logging
import types
import warnings
import weakref
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, get_num_threads
from torch.nn.modules import module as hooks_of_all_modules

from ramp_fast.capture.preserve import copied
from ramp_fast.ops.checksum import PIECE, checksum, pieces, tensor_identity

# Attributes of attributes of modules are looked at, no deeper: configurations, not what they refer to.
_DEPTH = 2
_SMALL_ARRAY = 1 << 20  # bytes of a NumPy array that is compared by value
_OPAQUE = (
    *(torch.dtype, torch.device, logging.Logger, type, types.ModuleType),
    *(types.FunctionType, types.BuiltinFunctionType, types.MethodType),
    *weakref.ProxyTypes,
    weakref.ref,
)
# Of a module's own dictionaries: watched as tensors, taken by themselves, or of no effect on a forward pass.
_NOT_WITHIN = frozenset({"_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks"})
_WITHOUT_EFFECT = frozenset(
    {"_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks", "_state_dict_pre_hooks"}
    | {"_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"}
)


class Structure:
    """Modules of a model with everything in their attributes that its forward pass may read."""

    def __init__(self, model: torch.nn.Module, unwatched: Collection[str] = ()) -> None:
        self.unwatched = unwatched
        self.tensors: dict[str, Tensor] = {}  # that are neither parameters nor buffers
        self._copies: list[tuple[str, Any, Any]] = []
        self._empty: list[Any] = []
        self._arrays: list[tuple[str, Any, bytes]] = []
        self._slotted: list[tuple[str, Any, dict[str, Any]]] = []
        self._held: list[tuple[str, Any, Any, Tensor]] = []
        self._seen: set[int] = set()
        self._modules: dict[str, torch.nn.Module] = {}
        self._take_modules("", model)
        for name in ("_global_forward_hooks", "_global_forward_pre_hooks"):
            self._take(f"torch.nn.modules.module.{name}", getattr(hooks_of_all_modules, name, {}), 0)
        self._kinds = [(path, module, type(module)) for path, module in self._modules.items()]
        classes = dict.fromkeys(base for _, _, kind in self._kinds for base in kind.__mro__ if base is not object)
        self._classes = [(kind, dict(vars(kind))) for kind in classes]

    def _take_modules(self, prefix: str, model: torch.nn.Module) -> None:
        for path, module in model.named_modules():
            if id(module) not in self._seen:
                self._seen.add(id(module))
                name = f"{prefix}{path}".rstrip(".") or "(model)"
                self._modules[name] = module
                self._take(name, vars(module), _DEPTH)

    def _take(self, path: str, value: Any, depth: int) -> None:
        """Keep what ``value`` is now, and what it holds."""
        kind = type(value)  # what stands for another object may refer to one that is gone
        if issubclass(kind, Tensor):
            if not path.endswith((".grad", "._grad")):
                self.tensors[path] = value
            return
        if value is None or issubclass(kind, (bool, int, float, complex, str, bytes, *_OPAQUE)):
            return
        if issubclass(kind, torch.nn.Module):  # in a list or an object, where it is not registered
            self._take_modules(f"{path}.", value)
            return
        if id(value) in self._seen:
            return
        self._seen.add(id(value))
        if issubclass(kind, np.ndarray):
            if value.nbytes <= _SMALL_ARRAY and not value.dtype.hasobject:
                self._arrays.append((path, value, value.tobytes()))
        elif issubclass(kind, functools.partial):
            self._take(path, value.keywords, depth)
            self._take(path, value.args, depth)
        elif issubclass(kind, dict):
            own = path.rpartition(".")[2]
            if own in _WITHOUT_EFFECT:
                return
            copy = copied(value)  # a registry may make what it is asked for
            self._keep(path, value, copy)
            # Two tensors of one number are equal, and may be two.
            self._held += [(path, value, k, t) for k, t in copy.items() if issubclass(type(t), Tensor)]
            if own not in _NOT_WITHIN:
                for key, item in copy.items():
                    self._take(f"{path}.{key}", item, depth)
        elif issubclass(kind, (list, set, deque)):
            copy = set(value) if issubclass(kind, set) else deque(value) if issubclass(kind, deque) else list(value)
            self._keep(path, value, copy)
            for i, item in enumerate(value):
                self._take(f"{path}.{i}", item, depth)
        elif issubclass(kind, (tuple, frozenset)):
            for i, item in enumerate(value):
                self._take(f"{path}.{i}", item, depth)
        elif depth:
            slots = [name for base in kind.__mro__ for name in _slots(base) if hasattr(value, name)]
            if slots:
                self._slotted.append((path, value, {name: getattr(value, name) for name in slots}))
            if hasattr(value, "__dict__"):
                self._take(path, vars(value), depth - 1)

    def _keep(self, path: str, value: Any, copy: Any) -> None:
        if not value:
            self._empty.append((path, value))
        else:
            self._copies.append((path, value, copy))

    def changes(self) -> Iterator[str]:
        """Paths of what is no longer what it was, without those that are not watched."""
        for path, value in self._empty:
            if value and path not in self.unwatched:
                yield path
        for path, value, copy in self._copies:
            if not _equal(value, copy):
                for key in _differing(path, value, copy):
                    if key not in self.unwatched:
                        yield key
        for path, holder, key, tensor in self._held:
            if holder.get(key) is not tensor and f"{path}.{key}" not in self.unwatched:
                yield f"{path}.{key}"
        for path, array, content in self._arrays:
            if array.tobytes() != content and path not in self.unwatched:
                yield path
        for path, value, before in self._slotted:
            now = {name: getattr(value, name, None) for name in before}
            if not _equal(now, before) and path not in self.unwatched:
                yield path
        for path, module, kind in self._kinds:
            if type(module) is not kind:
                yield f"{path}.__class__"
        for kind, members in self._classes:
            if not _equal(vars(kind), members):
                for key in _differing(kind.__qualname__, dict(vars(kind)), members):
                    if key not in self.unwatched:
                        yield key


def _slots(kind: type) -> Iterable[str]:
    slots = vars(kind).get("__slots__", ())
    names = [slots] if isinstance(slots, str) else list(slots)
    return [name for name in names if not name.startswith("__")]


def _equal(a: Any, b: Any) -> bool:
    """Whether two containers hold the same; what cannot be compared is not."""
    try:
        return bool(a == b)
    except Exception:  # tensors and arrays, of several elements, that have been replaced
        return False


def _differing(path: str, value: Any, copy: Any) -> list[str]:
    if not isinstance(value, dict):
        return [path]
    keys = [*value, *(key for key in copy if key not in value)]
    absent = object()

    def same(key: Any) -> bool:
        a, b = value.get(key, absent), copy.get(key, absent)
        return a is b or (not isinstance(a, Tensor) and _equal(a, b))

    return [f"{path}.{key}" for key in keys if not same(key)]


# What is compared of all bytes for every image.
_BYTES_PER_IMAGE = 8 << 20


class Weights:
    """Tensors whose values a captured model depends on.

    Attributes
    ----------
    tensors : dict of str to Tensor
    """

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors
        self._identities = [tensor_identity(t) for t in tensors.values()]
        parts = [(i, *piece) for i, t in enumerate(tensors.values()) if _readable(t) for piece in pieces(t)]
        self._owner = [i for i, _, _ in parts]
        self._addresses = np.array([address for _, address, _ in parts], dtype=np.uint64)
        self._bytes = np.array([size for _, _, size in parts], dtype=np.int64)
        self._sums = {sampled: self._checksums(np.full(len(parts), sampled, np.uint8)) for sampled in (0, 1)}
        self._end = np.cumsum(self._bytes)
        self._turn = 0

    def changes(self, images: float, look: bool) -> tuple[list[str], bool]:
        """Names of tensors that have changed, and whether one of them has another shape, dtype, device or strides.

        Parameters
        ----------
        images : float
            How many will be computed: the more, the more bytes are compared, all of them in turns.
        look : bool
            Whether to compare bytes at all.
        """
        now = [tensor_identity(t) for t in self.tensors.values()]
        other = {i for i, (a, b) in enumerate(zip(now, self._identities, strict=True)) if a != b}
        layout = any(now[i].layout != self._identities[i].layout for i in other)
        if look and not other and len(self._owner):
            other = self._with_other_bytes(images)
        names = list(self.tensors)
        return [names[i] for i in sorted(other)], layout

    def _with_other_bytes(self, images: float) -> set[int]:
        sampled = np.ones(len(self._owner), np.uint8)
        total = int(self._end[-1])
        budget = images * _BYTES_PER_IMAGE
        if budget >= total:
            sampled[:] = 0
        else:
            start = self._turn
            inside = (self._end - 1 - start) % total < budget + PIECE
            sampled[inside] = 0
            self._turn = int(start + budget) % total
        found = self._checksums(sampled)
        right = found == np.where(sampled, self._sums[1], self._sums[0])
        return {self._owner[i] for i in np.flatnonzero(~right)}

    def _checksums(self, sampled: Any) -> Any:
        return checksum(self._addresses, self._bytes, sampled, get_num_threads())


def _readable(tensor: Tensor) -> bool:
    """Whether its bytes lie in this process' memory."""
    return tensor.device.type == "cpu" and tensor.layout == torch.strided and tensor.numel() > 0


# After so many captures that gave the same graph, a change of an attribute is no longer a reason for one.
VAIN_CAPTURES = 3

Shape = tuple[int, int, int]


class ModelState:
    """What a model was when an engine captured it, and what has been learned about its changes.

    Attributes
    ----------
    model : torch.nn.Module
    captured : bool
        Whether there is something to compare the model with.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self._structure: Structure | None = None
        self._weights: Weights | None = None
        self._former: dict[Shape, Any] = {}
        self._suspects: list[str] = []
        self._vain: dict[str, int] = {}
        self._unwatched: set[str] = set()

    @property
    def captured(self) -> bool:
        return self._structure is not None

    def take_structure(self) -> None:
        """Compare attributes, hooks and classes with what they are now from here on."""
        self._structure = Structure(self.model, self._unwatched)

    def take_weights(self, constants: Mapping[str, Tensor]) -> None:
        """Compare tensors from here on: the model's, those in its attributes, and ``constants`` of captured graphs."""
        assert self._structure is not None
        found = {**tensors_of(self.model), **self._structure.tensors, **constants}
        once = {id(t): (n, t) for n, t in reversed(found.items()) if not n.endswith("num_batches_tracked")}
        self._weights = Weights(dict(once.values()))

    def take_weights_again(self) -> None:
        """Compare the same tensors with what they are now."""
        if self._weights is not None:
            self._weights = Weights(self._weights.tensors)

    def changed_attributes(self) -> list[str]:
        """Paths of attributes that are no longer what they were."""
        return [] if self._structure is None else list(self._structure.changes())

    def changed_weights(self, images: float, look: bool) -> tuple[list[Tensor], bool]:
        """Tensors that have changed, and whether one of them has another shape, dtype, device or strides."""
        if self._weights is None:
            return [], False
        names, layout = self._weights.changes(images, look)
        return [self._weights.tensors[name] for name in names], layout

    def forget(self, signatures: Mapping[Shape, Any], suspects: Sequence[str]) -> None:
        """The model will be captured anew; ``suspects`` are the attributes that are said to be the reason."""
        self._former, self._suspects = dict(signatures), list(suspects)
        self._structure = self._weights = None

    def learn(self, shape: Shape, signature: Any) -> None:
        """Stop watching attributes that have changed several times without any effect on the captured graph."""
        former = self._former.pop(shape, None)
        if former is None or former != signature:
            return
        for path in self._suspects:
            self._vain[path] = self._vain.get(path, 0) + 1
            if self._vain[path] == VAIN_CAPTURES:
                self._unwatched.add(path)
                warnings.warn(
                    f"{path} of the model has changed {VAIN_CAPTURES} times without changing what the model computes. "
                    "The engine no longer captures the model anew because of it; if it comes to matter, call "
                    "engine.refresh().",
                    RuntimeWarning,
                    stacklevel=6,
                )
        self._suspects = []


def tensors_of(model: torch.nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def device_of(model: torch.nn.Module) -> torch.device:
    """Where the first parameter or buffer lies; the CPU where there is none."""
    first = next(iter(tensors_of(model).values()), None)
    return torch.device("cpu") if first is None else first.device


def configured_shape(model: torch.nn.Module) -> Shape | None:
    """The input shape from timm's configuration, where the model's own patch grid does not contradict it."""
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    size = config.get("input_size") if isinstance(config, dict) else None
    if size is None or len(size) != 3:
        return None
    own = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if own is not None:
        size = (size[0], *own)
    return int(size[0]), int(size[1]), int(size[2])
