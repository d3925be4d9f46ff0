"""Linear maps given by an operation with constant operands: the map itself and its entrywise absolute value.

A rule needs ``L^T c`` and ``|L|^T c``; both come from differentiating these callables, so that no matrix is built.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ramp_fast import graph as g
from ramp_fast.graph import Node


@dataclass(frozen=True)
class _Slot:
    """The place of an argument that is given at run time: 0 is the operand, the others are constants."""

    index: int


class Call:
    """An operation that is linear (affine) in ``source``, with everything else constant.

    Parameters
    ----------
    node : Node
        The operation as captured.
    source : Node
        The argument in which it is linear.
    """

    def __init__(self, node: Node, source: Node) -> None:
        self.target: Callable[..., Any] = node.target
        self.constants = list(dict.fromkeys(n for n in node.references() if n is not source))
        places = {source: _Slot(0), **{n: _Slot(i + 1) for i, n in enumerate(self.constants)}}
        self.args = g.map_nodes(places.__getitem__, node.args)
        self.kwargs = g.map_nodes(places.__getitem__, node.kwargs)
        self.__name__ = str(node.target)

    def __call__(self, x: Tensor, *constants: Any) -> Tensor:
        given = (x, *constants)
        y: Tensor = self.target(*_filled(self.args, given), **_filled(self.kwargs, given))
        return y

    def absolute(self, x: Tensor, *constants: Any) -> Tensor:
        """The same map with the absolute value of every entry of its matrix."""
        return self(x, *(c.abs() if isinstance(c, Tensor) and c.is_floating_point() else c for c in constants))


class Resampling(Call):
    """Separable resampling of the last two axes with weights of both signs (bicubic)."""

    def __init__(self, node: Node, source: Node) -> None:
        super().__init__(node, source)
        self.rows, self.columns = self._matrix(source, 2), self._matrix(source, 3)

    def _matrix(self, source: Node, axis: int) -> Tensor:
        """Absolute weights along ``axis``, read off by resampling the identity."""
        sizes = list(source.example)
        length = sizes[axis]
        shape = [1, length, 1, 1]
        shape[axis] = length
        identity = torch.eye(length, dtype=torch.float64).view(shape).expand(1, length, sizes[2], sizes[3])
        response = self(identity.contiguous())
        return (response[0, :, :, 0] if axis == 2 else response[0, :, 0, :]).t().abs()

    def absolute(self, x: Tensor, *constants: Any) -> Tensor:
        """Kronecker products: the absolute value of the map is that of its factors."""
        return self.rows.to(x) @ x @ self.columns.to(x).t()


def _filled(value: Any, given: tuple[Any, ...]) -> Any:
    if isinstance(value, _Slot):
        return given[value.index]
    if isinstance(value, (tuple, list)):
        return type(value)(_filled(v, given) for v in value)
    if isinstance(value, dict):
        return {k: _filled(v, given) for k, v in value.items()}
    return value
