"""The operation graph of a captured model: nodes, their vocabulary and small graph utilities.

A :class:`Graph` is a list of :class:`Node` in execution order. Every node keeps the ATen call that
computes it (``target``, ``args``, ``kwargs`` with other nodes as references), so that the forward pass
needs no second definition, and a ``kind`` with ``operands`` and ``params``, which is what rules read.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

from ramp_fast import params as p
from ramp_fast.params import Params

# Kinds of nodes without relevance.
INPUT = "input"  # the images
PARAM = "param"  # a parameter, buffer or lifted constant of the model
CONST = "const"  # computed from constants only, possibly of the batch size
INT = "int"  # a size: a Python integer at run time

# Kinds of nodes that relevance flows through; docs/rules.md has their pull-backs.
LINEAR = "linear"
CONV = "conv"
BATCH_NORM = "batch_norm"
LAYER_NORM = "layer_norm"
GROUP_NORM = "group_norm"
RMS_NORM = "rms_norm"
ACTIVATION = "activation"
ADD = "add"
MUL = "mul"
DIV = "div"
SCALE = "scale"
MATMUL = "matmul"
SOFTMAX = "softmax"
ATTENTION = "attention"
MAX_POOL = "max_pool"
LINEAR_POOL = "linear_pool"
SELECT_TOKENS = "select_tokens"
LINEAR_MAP = "linear_map"
BILINEAR = "bilinear"  # einsum of two tensors
MAX_REDUCTION = "max_reduction"  # the largest (smallest) of several entries
REDUCTION = "reduction"  # norms, standard deviations: one tensor, not elementwise
SHIFT = "shift"  # minus a statistic: log_softmax
CHOICE = "choice"  # every entry is one of two tensors': maximum, minimum, where
DECISION = "decision"  # comparisons and signs of values: constant wherever they are differentiable
REARRANGE = "rearrange"
SPLIT = "split"  # unbind, split, chunk: several outputs
SPLIT_OUTPUT = "split_output"  # one of them
GENERIC = "generic"  # strict=False: an elementwise operation outside the vocabulary

PARAMS: dict[str, type[Params]] = {
    PARAM: p.Leaf,
    CONST: p.Leaf,
    INT: p.Leaf,
    LINEAR: p.Linear,
    CONV: p.Conv,
    BATCH_NORM: p.BatchNorm,
    LAYER_NORM: p.LayerNorm,
    GROUP_NORM: p.GroupNorm,
    RMS_NORM: p.RmsNorm,
    ACTIVATION: p.Activation,
    ADD: p.Add,
    DIV: p.Div,
    SCALE: p.Scale,
    MATMUL: p.Product,
    BILINEAR: p.Product,
    SOFTMAX: p.Along,
    SHIFT: p.Along,
    ATTENTION: p.Attention,
    MAX_POOL: p.MaxPool,
    LINEAR_POOL: p.LinearPool,
    LINEAR_MAP: p.LinearMap,
    MAX_REDUCTION: p.Reduction,
    REDUCTION: p.Reduction,
    DECISION: p.Reduction,
    REARRANGE: p.Rearrange,
    SPLIT: p.Split,
    SPLIT_OUTPUT: p.SplitOutput,
}
"""What is known of a node of each kind; of kinds that are missing nothing but the operands."""

WEIGHTED = frozenset({LINEAR, CONV})
JUNCTIONS = frozenset({ADD, MUL, MATMUL, ATTENTION, BILINEAR, CHOICE})
CONSTANT = frozenset({PARAM, CONST, INT})


@dataclass(frozen=True)
class BatchAxis:
    """Where the samples of a tensor live: ``shape[axis] == outer * batch * inner``."""

    axis: int = 0
    outer: int = 1
    inner: int = 1

    @property
    def leading(self) -> bool:
        """Whether the tensor is already batch-major, so that ``reshape(batch, -1)`` separates the samples."""
        return self.axis == 0 and self.outer == 1

    @property
    def plain(self) -> bool:
        """Whether the first axis is the samples, one entry for each."""
        return self.leading and self.inner == 1

    def samples_first(self, t: torch.Tensor, batch: int, lead: int = 1) -> torch.Tensor:
        """``t`` ``[*lead, *shape]`` with its samples in the axis behind the leading ones.

        What shares the axis with the samples, as windows of an image may, has an axis of its own behind theirs.
        """
        if self.plain:
            return t
        at = lead + self.axis
        split: torch.Tensor = t.unflatten(at, (self.outer, batch, self.inner))
        t = split.movedim(at + 1, lead).flatten(at + 1, at + 2)
        return t if self.outer * self.inner > 1 else t.squeeze(at + 1)

    def samples_back(self, t: torch.Tensor, lead: int = 1) -> torch.Tensor:
        """The inverse of :meth:`samples_first`."""
        if self.plain:
            return t
        at = lead + self.axis
        if self.outer * self.inner == 1:
            t = t.unsqueeze(at + 1)
        split: torch.Tensor = t.unflatten(at + 1, (self.outer, self.inner))
        return split.movedim(lead, at + 1).flatten(at, at + 2)


@dataclass(eq=False)
class Node:
    """One operation.

    Attributes
    ----------
    name : str
        Unique name, from the exported graph.
    kind : str
        One of the constants of this module.
    target : callable
        What the forward pass calls (an ATen overload or a Python operator).
    args, kwargs : tuple, dict
        Its arguments; other nodes appear as references.
    operands : list of Node
        The tensors whose product, sum or map this is; constants among them carry no relevance.
    params : Params
        What rules and kernels need to know: the class of :data:`PARAMS` for this kind.
    module : str
        Dotted name of the module the operation runs in, "" for the model itself.
    shape : tuple
        Sizes at capture; the batch shows as a string. Empty for nodes with several outputs.
    example : tuple of int
        Sizes at the batch the model was captured with.
    batch : BatchAxis
        Where the samples live in this node's output.
    dtype : torch.dtype or None
        What the model has here; in a run the precision decides.
    decided : bool
        Whether the images come in through comparisons and signs only.
    """

    name: str
    kind: str
    target: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    operands: list[Node] = field(default_factory=list)
    params: Any = field(default_factory=Params)
    module: str = ""
    shape: tuple[int | str, ...] = ()
    example: tuple[int, ...] = ()
    batch: BatchAxis = field(default_factory=BatchAxis)
    dtype: torch.dtype | None = None
    decided: bool = False

    @property
    def constant(self) -> bool:
        """Whether the value does not depend on the images."""
        return self.kind in CONSTANT

    @property
    def sources(self) -> list[Node]:
        """Operands that carry relevance."""
        return [n for n in self.operands if not n.constant]

    def references(self) -> list[Node]:
        """Every node this one reads, constants and sizes included (may repeat)."""
        return nodes_in((self.args, self.kwargs, self.operands, self.params))

    def replace(self, old: Node, new: Node) -> None:
        """Read ``new`` wherever this node reads ``old``."""
        if old not in self.references():
            return

        def swap(value: Node) -> Node:
            return new if value is old else value

        self.args = map_nodes(swap, self.args)
        self.kwargs = map_nodes(swap, self.kwargs)
        self.operands = [swap(n) for n in self.operands]
        self.params = map_nodes(swap, self.params)

    def __repr__(self) -> str:
        return f"Node({self.name}: {self.kind} {list(self.shape)})"


_FEW = 4096  # numbers of a constant


def _constant(tensor: Any) -> Any:
    """A tensor by identity, or a small constant, which may be made anew at every capture, by value."""
    made_anew = type(tensor) is torch.Tensor and tensor.numel() <= _FEW and not tensor.is_complex()
    return (tensor.dtype, tensor.tolist()) if made_anew else id(tensor)


def map_nodes(function: Callable[[Node], Any], value: Any) -> Any:
    """Apply ``function`` to every node inside nested tuples, lists, dicts and parameters."""
    if isinstance(value, Node):
        return function(value)
    if isinstance(value, (tuple, list)):
        return type(value)(map_nodes(function, v) for v in value)
    if isinstance(value, dict):
        return {k: map_nodes(function, v) for k, v in value.items()}
    if isinstance(value, Params):
        return replace(value, **{f.name: map_nodes(function, getattr(value, f.name)) for f in fields(value)})
    return value


def nodes_in(value: Any) -> list[Node]:
    """The nodes inside nested tuples, lists, dicts and parameters, in order (may repeat)."""
    found: list[Node] = []
    _collect(value, found)
    return found


def _collect(value: Any, found: list[Node]) -> None:
    # Passes ask this of every node again and again: no generators, no `fields`.
    for v in value if isinstance(value, (tuple, list)) else (value,):
        if isinstance(v, Node):
            found.append(v)
        elif isinstance(v, (tuple, list)):
            _collect(v, found)
        elif isinstance(v, dict):
            _collect(tuple(v.values()), found)
        elif isinstance(v, Params):
            _collect(tuple(vars(v).values()), found)


@dataclass
class Graph:
    """Nodes in execution order, with the one that is the images and the one that is the logits.

    ``weights_read``: numbers were read off the weights at capture, so that the graph holds for these weights only.
    """

    nodes: list[Node]
    input: Node
    output: Node
    weights_read: bool = False
    ending: tuple[str, ...] = ()  # functions behind the output, which are left out of what is explained
    observed: dict[str, Node] = field(default_factory=dict)  # nodes that stand for modules' outputs
    signature: tuple[Any, ...] = ()  # of the graph as it was captured

    def copy(self) -> Graph:
        """A graph of nodes of its own, which passes may change; tensors are shared."""
        twins: dict[Node, Node] = {}
        for node in self.nodes:  # in execution order: what a node reads has been copied
            parts = (node.args, node.kwargs, node.operands, node.params)
            args, kwargs, operands, params = map_nodes(twins.__getitem__, parts)
            twins[node] = replace(node, args=args, kwargs=kwargs, operands=operands, params=params)
        observed = map_nodes(twins.__getitem__, self.observed)
        ends = twins[self.input], twins[self.output]
        return replace(self, nodes=list(twins.values()), input=ends[0], output=ends[1], observed=observed)

    def describe(self) -> tuple[Any, ...]:
        """What tells apart graphs that compute other things, but for the values of their tensors."""
        return tuple(
            (
                *(n.name, n.kind, n.shape, getattr(n.target, "__qualname__", str(n.target))),
                repr(map_nodes(lambda m: m.name, (n.args, n.kwargs))),
                _constant(n.params.tensor) if n.kind == PARAM else None,
            )
            for n in self.nodes
        )

    def users(self, *, shapes: bool = True) -> dict[Node, list[Node]]:
        """For every node the nodes that read it, each once, in execution order.

        Without ``shapes`` the constants that only take its shape (``x.new_zeros(...)``) are left out.
        """
        users: dict[Node, list[Node]] = {n: [] for n in self.nodes}
        for node in self.nodes:
            for ref in dict.fromkeys(node.references()):
                if shapes or ref.constant or not node.constant:
                    users[ref].append(node)
        return users

    def carriers(self) -> set[Node]:
        """Nodes that relevance flows through: operands, from the logits down (statistics are detached)."""
        found = {self.output}
        stack = [self.output]
        while stack:
            for source in stack.pop().sources:
                if source not in found:
                    found.add(source)
                    stack.append(source)
        return found

    def replace_uses(self, old: Node, new: Node, *, keep: Iterable[Node] = ()) -> None:
        """Let every reader of ``old`` read ``new`` instead, except the nodes in ``keep``."""
        kept = {id(n) for n in keep}
        if old not in new.references():  # a node in front of which another is put stays what it was
            self.observed = {name: new if node is old else node for name, node in self.observed.items()}
        for node in self.nodes:
            if id(node) not in kept and node is not new:
                node.replace(old, new)
        if self.output is old:
            self.output = new

    def insert_after(self, anchor: Node, node: Node) -> None:
        self.nodes.insert(self.nodes.index(anchor) + 1, node)

    def put_behind(self, node: Node, suffix: str, kind: str, target: Callable[..., Any], params: Any = None) -> Node:
        """Put a step of one operand, of the same shape, behind a node: what read the node reads the step."""
        step = replace(
            node,
            name=f"{node.name}_{suffix}",
            kind=kind,
            target=target,
            args=(node,),
            kwargs={},
            operands=[node],
            params=params or Params(),
        )
        self.insert_after(node, step)
        self.replace_uses(node, step, keep=[step])
        return step

    def prune(self) -> None:
        """Remove nodes that the output does not need and restore execution order."""
        order: list[Node] = []
        state: dict[int, bool] = {}
        stack: list[tuple[Node, bool]] = [(self.output, False), (self.input, False)]
        while stack:
            node, done = stack.pop()
            if done:
                if not state[id(node)]:
                    state[id(node)] = True
                    order.append(node)
                continue
            if id(node) in state:
                continue
            state[id(node)] = False
            stack.append((node, True))
            stack.extend((ref, False) for ref in node.references() if id(ref) not in state)
        position = {id(n): i for i, n in enumerate(self.nodes)}
        if all(id(n) in position for n in order) and _in_order(order, position):
            order.sort(key=lambda n: position[id(n)])
        self.nodes = order


def _in_order(nodes: list[Node], position: dict[int, int]) -> bool:
    return all(position[id(ref)] < position[id(n)] for n in nodes for ref in n.references())


def only_user(users: dict[Node, list[Node]], node: Node) -> Node | None:
    """The node that alone reads ``node``, if there is one."""
    return users[node][0] if len(users[node]) == 1 else None


def copied(node: Node) -> Node:
    """A node of its own with the same call."""
    return Node(
        node.name,
        node.kind,
        node.target,
        node.args,
        dict(node.kwargs),
        list(node.operands),
        copy.copy(node.params),
        node.module,
        node.shape,
        node.example,
        node.batch,
    )
