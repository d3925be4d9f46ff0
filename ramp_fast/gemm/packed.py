"""Packed weights of a layer, shared between the engines of one model."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from ramp_fast.ops.checksum import content_key


class Packed(Protocol):
    """Something with weights inside."""

    @property
    def kernel(self) -> str: ...

    @property
    def nbytes(self) -> int: ...


class LinearOp(Packed, Protocol):
    """A linear function of one tensor."""

    def __call__(self, x: Tensor, /) -> Tensor: ...


@dataclass
class PackedLayer:
    """The packed weights of one layer, and the tensors they were made of."""

    forward: LinearOp
    pullback: Any
    sources: tuple[Tensor, ...]


_LAYERS: weakref.WeakValueDictionary[Any, PackedLayer] = weakref.WeakValueDictionary()
_LOCK = threading.Lock()


def shared_layer(
    kind: tuple[Any, ...], sources: tuple[Tensor, ...], pack: Callable[[], tuple[LinearOp, Any]]
) -> PackedLayer:
    """What ``pack()`` makes of ``sources``, from another engine where one has packed the same weights.

    The same are tensors at the same place with the same bytes (:func:`ramp_fast.ops.checksum.content_key`). A pack
    lives as long as an engine uses it.
    """
    key = kind, content_key(sources)
    with _LOCK:
        layer = _LAYERS.get(key)
        if layer is None:
            layer = _LAYERS[key] = PackedLayer(*pack(), sources)
    return layer
