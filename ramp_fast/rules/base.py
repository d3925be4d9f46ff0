"""What every rule shares: the interface of an operation and the linear-algebra helpers of pull-backs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ramp_fast import graph as g
from ramp_fast import ops
from ramp_fast.gemm import Precision
from ramp_fast.graph import Node
from ramp_fast.rules.conservation import Contribution
from ramp_fast.rules.gradients import gradient


class Flow(NamedTuple):
    """Relevance on its way to ``node``; ``part`` numbers one output of a node with several."""

    node: Node
    contribution: Contribution
    part: int | None = None


@dataclass
class Fusion:
    """What a rule decides for one node before its operation is made: what its step computes too, or who computes it.

    Attributes
    ----------
    fused_norm : Node or None
        Of a linear layer: the LayerNorm whose output it alone reads. The layer's step pulls back through both.
    fused_batch_norm, fused_add : Node or None
        Of a convolution: the BatchNorm that its step computes as well, and what is added to that, where the sum is a
        residual sum. Of an activation: the BatchNorm below, which its step pulls back as well.
    fused_relu : Node or None
        Of a sum, a BatchNorm, or a convolution that computes either: the ReLU that is computed with it.
    fused_into : Node or None
        The node whose step computes this one in the forward pass.
    pulled_back_in : Node or None
        The node whose step does this one's pull-back.
    fused_activation : Node or None
        Of a product of two tensors: the activation that is one of them, which its step pulls back as well.
    branch : Node or None
        Of a residual sum: the operand that is not the shortcut.
    positive_input : bool
        Of a weighted layer: relevance can only reach positive entries of its input, so that W+ is enough.
    positive_operand : bool
        Of a product of two tensors: one of them is never negative, so that positive terms are all there are.
    divided : bool
        Of pools that take a largest entry: ``c`` goes to it, not ``z c``.
    adds_classes : bool
        Of a weighted layer: none is behind it, so that relevance of several classes is added here first.
    """

    fused_norm: Node | None = None
    fused_batch_norm: Node | None = None
    fused_add: Node | None = None
    fused_relu: Node | None = None
    fused_into: Node | None = None
    pulled_back_in: Node | None = None
    fused_activation: Node | None = None
    branch: Node | None = None
    positive_input: bool = False
    positive_operand: bool = False
    divided: bool = True
    adds_classes: bool = False


def fused_into(node: Node) -> str:
    """What ``print(engine.plan)`` says of a step that the step of ``node`` computes."""
    return f"fused into {node.module or node.name}"


class Values:
    """Values of nodes during one run; constants resolve to what was prepared for this precision.

    Attributes
    ----------
    pulled_back : bool
        Whether a pull-back follows; otherwise operations need to keep nothing for it.
    """

    def __init__(self, constants: dict[Node, Any], pulled_back: bool = True) -> None:
        self._constants = constants
        self.pulled_back = pulled_back
        self._values: dict[Node, Any] = {}
        self._bounds: dict[Node, float] = {}
        self._left: dict[Node, Any] = {}

    def __getitem__(self, node: Any) -> Any:
        if not isinstance(node, Node):
            return node
        if node in self._values:
            return self._values[node]
        return self._constants[node]

    def __setitem__(self, node: Node, value: Any) -> None:
        self._values[node] = value

    def drop(self, node: Node) -> None:
        self._values.pop(node, None)

    def leave(self, node: Node, kept: Any) -> None:
        """Keep for another step what the step of ``node`` would keep for its own pull-back."""
        self._left[node] = kept

    def take(self, node: Node) -> Any:
        """What the step of ``node`` has left (:meth:`leave`), once."""
        return self._left.pop(node)

    def bound(self, node: Node) -> float:
        """A number that no entry of the node's value exceeds in size; not finite where one is not.

        Known for what :meth:`limit` was called for and what only passes its operand's values on, else measured.
        """
        known = self.known_bound(node)
        return self.measure(node) if known is None else known

    def known_bound(self, node: Node) -> float | None:
        """:meth:`bound` where nothing has to be measured for it."""
        if node in self._bounds or not _no_larger(node):
            return self._bounds.get(node)
        found = [self.known_bound(n) for n in node.operands]
        known = [bound for bound in found if bound is not None]
        return max(known) if len(known) == len(found) else None

    def limit(self, node: Node, bound: float) -> None:
        """Say what no entry of the node's value exceeds."""
        self._bounds[node] = bound

    def limit_as(self, node: Node, source: Node) -> None:
        """Say that the node's value is that of ``source``."""
        if source in self._bounds:
            self._bounds[node] = self._bounds[source]

    def measure(self, node: Node) -> float:
        """The largest size of an entry of the node's value, NaN where one is."""
        value: Tensor = self[node]
        largest = 0.0
        if value.numel():
            # As it lies in memory: of another order PyTorch would make a copy first.
            low, high = torch.aminmax(value.permute(sorted(range(value.dim()), key=value.stride, reverse=True)))
            largest = float(torch.maximum(high, -low))
        self._bounds[node] = largest
        return largest

    def call(self, node: Node) -> Any:
        """The node's own ATen call on these values, in float32 where it has no kernel for a narrower dtype."""
        args, kwargs = g.map_nodes(self.__getitem__, node.args), g.map_nodes(self.__getitem__, node.kwargs)
        try:
            return node.target(*args, **kwargs)
        except RuntimeError as error:
            if not _lacks_kernel(error):
                raise
            result = node.target(*_widened(args), **_widened(kwargs))
            narrow = next((t.dtype for t in _floating(args)), None)
            return result.to(narrow) if isinstance(result, Tensor) and result.is_floating_point() else result

    def call_at(self, node: Node, operand: Node, u: Tensor) -> Tensor:
        """The same call with ``u`` in the place of an operand, in the dtype of ``u``."""

        def value(n: Node) -> Any:
            v = u if n is operand else self[n]
            return v.to(u.dtype) if isinstance(v, Tensor) and v.is_floating_point() else v

        y: Tensor = node.target(*g.map_nodes(value, node.args), **g.map_nodes(value, node.kwargs))
        return y


def _no_larger(node: Node) -> bool:
    """Whether no entry of the value is larger than the largest of the operands."""
    if node.kind == g.ACTIVATION:
        return bool(node.params.how == "relu")
    if node.kind == g.REARRANGE:
        return node.params.how in ("reshape", "permute", "slice", "select", "cat", "stack", "same")
    if node.kind == g.LINEAR_POOL:
        return node.params.how == "mean" or node.params.window is not None
    return bool(node.kind == g.MAX_POOL)


class Operation:
    """One node under one rule: forward pass, what it keeps for later, and the pull-back.

    Attributes
    ----------
    forward_kernel, pullback_kernel : str
        Names of the routines, for ``print(engine.plan)``.
    packs : bool
        Whether :meth:`prepare` takes the node's constants, so that nobody else has to keep them.
    """

    forward_kernel = "aten"
    pullback_kernel = "torch"
    packs = False

    def __init__(self, node: Node, precision: Precision, fusion: Fusion, rule: Any = None) -> None:
        self.node, self.precision, self.fusion, self.rule = node, precision, fusion, rule

    def prepare(self, constants: dict[Node, Any]) -> None:
        """Pack weights; called again when the model's weights have changed."""

    @property
    def weight_bytes(self) -> int:
        """Memory of packed weights."""
        return 0

    def needs(self) -> list[Node]:
        """Nodes whose values the pull-back reads."""
        return []

    def keeps(self) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Shapes and dtypes of what the forward pass keeps besides :meth:`needs`."""
        return []

    def forward(self, values: Values) -> tuple[Any, Any]:
        """The node's value, and what to keep besides :meth:`needs`."""
        return values.call(self.node), None

    def pullback(self, parts: list[Any], values: Values, kept: Any, conservation: Any) -> Iterator[Flow]:
        """Relevance of the operands from that of the output (``parts``, one per reader)."""
        raise NotImplementedError

    def merged(self, parts: list[Any], values: Values, conservation: Any) -> Any:
        """The readers' relevance as one contribution."""
        if len(parts) == 1:
            return parts[0]
        return conservation.merge(values[self.node], parts, self.node.batch)


class ReadsInput(Operation):
    """An operation whose pull-back reads the value of its first operand."""

    def needs(self) -> list[Node]:
        return [self.node.operands[0]]


def vjp(function: Callable[[Tensor], Tensor], like: Tensor | tuple[int, ...], c: Tensor) -> Tensor:
    """``J^T c`` for every right-hand side of ``c`` ``[T, *out]``, of a function linear in its argument.

    ``like`` is the point of linearisation, or the shape of the argument where the point does not matter. What has no
    kernel for a narrower dtype is differentiated in float32.
    """
    try:
        return _vjp(function, like, c)
    except RuntimeError as error:
        if not _lacks_kernel(error) or c.dtype not in _NARROW:
            raise
        return _vjp(function, like, c.float()).to(c.dtype)


def _vjp(function: Callable[[Tensor], Tensor], like: Tensor | tuple[int, ...], c: Tensor) -> Tensor:
    with torch.enable_grad():
        if isinstance(like, tuple):
            leaf = torch.zeros(like, dtype=c.dtype, device=c.device)
        else:
            leaf = like.detach().to(c.dtype)
        leaf = leaf.requires_grad_()
        out = function(leaf)
        grads = [gradient(out, leaf, side.to(out.dtype)) for side in c]
    return torch.stack(grads)


_NARROW = (torch.bfloat16, torch.float16)


def _lacks_kernel(error: RuntimeError) -> bool:
    """Whether PyTorch says that an operation has not been written for this dtype."""
    return isinstance(error, NotImplementedError) or "not implemented for" in str(error)


def _widened(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(_widened(v) for v in value)
    if isinstance(value, dict):
        return {k: _widened(v) for k, v in value.items()}
    return value.float() if isinstance(value, Tensor) and value.dtype in _NARROW else value


def _floating(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor) and value.is_floating_point():
        yield value
    elif isinstance(value, (tuple, list)):
        for v in value:
            yield from _floating(v)


def reduce_to(c: Tensor, shape: tuple[int, ...] | torch.Size) -> Tensor:
    """Sum ``c`` ``[T, *out]`` over the axes along which an operand of ``shape`` was broadcast."""
    lead = c.dim() - 1 - len(shape)
    if lead:
        c = c.sum(tuple(range(1, 1 + lead)))
    axes = tuple(i + 1 for i, s in enumerate(shape) if s == 1 and c.shape[i + 1] != 1)
    return c.sum(axes, keepdim=True) if axes else c


def stacked_view(pieces: list[Tensor], dim: int) -> Tensor | None:
    """``torch.stack(pieces, dim)`` without a copy: None unless they lie at equal distances in one buffer."""
    first = pieces[0]
    step = pieces[1].storage_offset() - first.storage_offset() if len(pieces) > 1 else 0
    for i, piece in enumerate(pieces):
        if (
            piece.dtype != first.dtype
            or piece.shape != first.shape
            or piece.stride() != first.stride()
            or piece.untyped_storage()._cdata
            != first.untyped_storage()._cdata  # the same one; fake tensors have no address
            or piece.storage_offset() != first.storage_offset() + i * step
        ):
            return None
    if step <= 0:
        return None
    shape, stride = list(first.shape), list(first.stride())
    shape.insert(dim, len(pieces))
    stride.insert(dim, int(step))
    return first.as_strided(shape, stride)


def gate(c: Tensor, x: Tensor) -> Tensor:
    """``[x > 0] c``; a product because that is several times faster than ``torch.where`` in bf16."""
    return c * (x > 0).to(c.dtype)


def linear_gate(c: Tensor, x: Tensor) -> Tensor:
    """``2 [x > 0] c``, as a linear layer of weight one sends back; ``x`` may be broadcast."""
    return ops.gate(c, x) if x.shape == c.shape[1:] else 2 * gate(c, x)


def selected(acc_positive: Tensor, acc_negative: Tensor, x: Tensor) -> Tensor:
    """The first where x > 0, the second where x < 0, otherwise 0."""
    zero = torch.zeros((), dtype=acc_positive.dtype, device=acc_positive.device)
    return torch.where(x > 0, acc_positive, torch.where(x < 0, acc_negative, zero))
