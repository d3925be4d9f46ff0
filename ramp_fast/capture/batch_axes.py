"""Where the samples of a batch live in every tensor of a graph, and the proof that they never meet.

Every entry of a tensor belongs to one sample or to none (constants, padding). An entry that depends on two samples
means that the model mixes them: an image's map would depend on the images beside it, so the model is refused.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ramp_fast import graph as g
from ramp_fast.errors import UnsupportedModelError
from ramp_fast.graph import Graph, Node

EXAMPLE_BATCH = 2  # torch.export specialises a batch of 1

# Numbers of the example's samples; 0 stands for values that belong to none (constants, zero padding).
_SAMPLES = torch.arange(1, EXAMPLE_BATCH + 1, dtype=torch.int16, device="cpu")

# One entry of the result depends on the entries of the operands in the same place only, operands broadcast.
_ELEMENTWISE = frozenset({g.ACTIVATION, g.ADD, g.MUL, g.DIV, g.SCALE, g.BATCH_NORM, g.GENERIC})


# Their constants are packed once.
_PACKED = g.WEIGHTED | {g.BATCH_NORM, g.LAYER_NORM, g.GROUP_NORM, g.RMS_NORM}


class _Mixed(Exception):
    """An entry would belong to two samples."""


def locate_samples(graph: Graph, *, symbolic: bool = True) -> None:
    """Fill in :attr:`~ramp_fast.graph.Node.batch` of every node that depends on the images.

    Sample numbers are pushed through the graph, operation by operation. Those that move values move the numbers;
    of others it is known which axes they reduce; what is left is run on ones, with NaN in place of one sample after
    the other: NaN comes out wherever that sample has a say.

    Parameters
    ----------
    graph : Graph
        Captured with :data:`EXAMPLE_BATCH` images.
    symbolic : bool
        Whether the batch shows by name in :attr:`~ramp_fast.graph.Node.shape`.

    Raises
    ------
    UnsupportedModelError
        An operation mixes the samples of a batch.
    """
    values: dict[Node, Any] = {}
    constants = _Constants(graph)
    for node in graph.nodes:
        if node.constant:
            values[node] = constants.numbers(node)
            continue
        moves = node.kind in (g.REARRANGE, g.SPLIT, g.SPLIT_OUTPUT)
        for read in node.references() if symbolic else ():
            if node.kind in _PACKED and constants.depends(read) and read.kind == g.CONST:
                raise UnsupportedModelError(
                    f"{_described(node)} has weights that are computed from the size of the batch"
                )
            if not moves or getattr(read.params, "floating", True):  # integers may be indices
                constants.check(read)
        try:
            numbers = _numbers(node, values)
            if isinstance(numbers, Tensor):
                node.batch = _located(numbers, node, symbolic)
                numbers = _pattern(node)
        except _Mixed:
            raise UnsupportedModelError(
                f"{_described(node)} mixes the samples of a batch ({node.name}, shape {_sizes(node.shape)}): a map "
                "would depend on the images beside it. Is the batch where the operation expects it "
                "(batch_first=True, dim=...)?"
            ) from None
        values[node] = numbers


def _described(node: Node) -> str:
    name = str(node.target).removeprefix("aten.").split(".")[0]
    kind = node.kind if node.kind == name or not name.isidentifier() else f"{node.kind} ({name})"
    return f"{kind} in {node.module or 'the model'}"


def _sizes(shape: tuple[int | str, ...]) -> str:
    return f"[{', '.join(map(str, shape))}]"


class _Constants:
    """What operations read besides tensors that depend on the images."""

    def __init__(self, graph: Graph) -> None:
        tensors = [n.params.tensor for n in graph.nodes if n.kind == g.PARAM]
        self._device = tensors[0].device if tensors else torch.device("cpu")
        self._known: dict[tuple[Node, int], Any] = {}
        self._varies: dict[Node, bool] = {}

    def numbers(self, node: Node) -> Any:
        """Constants belong to no sample. Integers may be sizes or indices: they stay what they are."""
        if node.kind == g.INT:
            return node.example[0]
        if getattr(node.params, "floating", True):
            return torch.zeros((1,) * len(node.example), dtype=torch.int16, device="cpu").expand(node.example)
        value = self._value(node, EXAMPLE_BATCH)
        return value.cpu() if isinstance(value, Tensor) else value

    def check(self, node: Node) -> None:
        """Refuse what differs from sample to sample, or with the number of samples."""
        if node.kind != g.CONST or not self.depends(node):
            return
        try:
            two, three = (self._value(node, n) for n in (EXAMPLE_BATCH, EXAMPLE_BATCH + 1))
        except _UnknownSize:
            return
        if "batch" in node.shape:
            axis = node.shape.index("batch")
            first = two.narrow(axis, 0, 1)
            two = first.expand(*(s if i == axis else -1 for i, s in enumerate(three.shape)))
        if two.shape == three.shape and not bool(((two == three) | (two.isnan() & three.isnan())).all()):
            raise UnsupportedModelError(
                f"{node.name} in {node.module or 'the model'} is computed from the size of the batch, and differs with "
                "it or from sample to sample: a map would depend on the images beside it"
            )

    def depends(self, node: Node) -> bool:
        """Whether the size of the batch goes into a constant."""
        if node not in self._varies:
            self._varies[node] = node.kind != g.PARAM and (
                node.kind != g.CONST or any(self.depends(n) for n in node.references())
            )
        return self._varies[node]

    def _value(self, node: Node, batch: int) -> Any:
        key = node, batch
        if key not in self._known:
            if node.kind == g.PARAM:
                value = node.params.tensor
            elif node.kind == g.INT:
                value = node.example[0] if batch == EXAMPLE_BATCH else node.params.more
            elif not node.constant:  # of which only the shape is read
                value = torch.zeros([_size_at(s, batch) for s in node.shape], device=self._device)
            else:
                args, kwargs = (g.map_nodes(lambda n: self._value(n, batch), a) for a in (node.args, node.kwargs))
                value = node.target(*args, **kwargs)
            self._known[key] = value
        return self._known[key]


class _UnknownSize(Exception):
    """A size does not grow in proportion to the batch."""


def _size_at(size: int | str, batch: int) -> int:
    if isinstance(size, int):
        return size
    each, _, rest = size.rpartition("*")
    if rest != "batch" or not (each.isdecimal() or not each):
        raise _UnknownSize
    return int(each or 1) * batch


def _numbers(node: Node, values: dict[Node, Any]) -> Any:
    """Sample numbers of a node's result, from those of what it reads."""
    if node.kind == g.INPUT:
        return _SAMPLES.view(-1, *[1] * (len(node.example) - 1)).expand(node.example)
    if node.kind == g.REARRANGE and node.params.how == "vjp":
        return _moved(node, values)
    if node.kind == g.REARRANGE and node.params.how == "cat":
        cores = [_core(values[n]) for n in node.operands]
        if all(c.shape[node.params.dim] == 1 for c in cores):  # beside one another within the samples
            return _together(*cores).expand(node.example)
    if node.kind in (g.REARRANGE, g.SPLIT, g.SPLIT_OUTPUT):
        return node.target(*g.map_nodes(values.__getitem__, node.args), **g.map_nodes(values.__getitem__, node.kwargs))
    return _computed(node, values)


def _moved(node: Node, values: dict[Node, Any]) -> Tensor:
    """Sample numbers moved by an operation that knows floating tensors only; padding belongs to no sample."""
    source = node.operands[0]
    if node.params.masks:
        return values[source].expand(node.example)  # type: ignore[no-any-return]
    if str(node.target).startswith("aten.roll") and _rolls_samples(node, values[source]):
        raise _Mixed  # by the length of the example's batch it would change nothing
    args = g.map_nodes(lambda n: values[n].float() if n is source else values[n], node.args)
    if node.params.pads:
        args = (args[0], args[1])
    moved: Tensor = node.target(*args, **g.map_nodes(values.__getitem__, node.kwargs))
    return moved.to(torch.int16)


def _rolls_samples(node: Node, numbers: Tensor) -> bool:
    dims = node.args[2] if len(node.args) > 2 else node.kwargs.get("dims", ())
    dims = [dims] if isinstance(dims, int) else list(dims) or range(numbers.dim())
    return any(numbers.stride(d) != 0 for d in dims)


# Tensors of sample numbers are patterns along one axis; every other axis has stride 0, and one entry says it all.


def _core(numbers: Tensor) -> Tensor:
    for axis, stride in enumerate(numbers.stride()):
        if stride == 0:
            numbers = numbers.narrow(axis, 0, min(1, numbers.shape[axis]))
    return numbers


def _over(numbers: Tensor, axes: int | Sequence[int]) -> Tensor:
    """The sample that all entries along ``axes`` belong to; the axes stay, with one entry."""
    axes = [axes] if isinstance(axes, int) else list(axes)
    if not axes or not numbers.numel():
        return numbers
    largest = numbers.amax(axes, keepdim=True)
    if not bool(((numbers == largest) | (numbers == 0)).all()):
        raise _Mixed
    return largest


def _together(*several: Tensor) -> Tensor:
    """The sample that the entries in one place belong to, tensors broadcast."""
    result = several[0]
    for other in several[1:]:
        if bool(((result != other) & (result != 0) & (other != 0)).any()):
            raise _Mixed
        result = torch.maximum(result, other)
    return result


def _computed(node: Node, values: dict[Node, Any]) -> Tensor:
    """Sample numbers of an operation that computes."""
    sources = [n for n in dict.fromkeys(node.references()) if not n.constant]
    cores = {n: _core(values[n]) for n in sources}
    cores |= {
        n: torch.zeros((1,) * len(n.example), dtype=torch.int16, device="cpu") for n in node.operands if n.constant
    }
    rank = len(node.example)
    found: Tensor | None = None
    if _elementwise(node, sources):
        found = _together(*(cores[n] for n in sources))
    elif getattr(node.params, "labels", None) is not None:
        found = _contracted(node, cores)
    elif node.kind == g.LINEAR:
        found = _over(cores[node.operands[0]], -1)
    elif node.kind == g.MATMUL and all(len(n.example) > 1 for n in node.operands):
        a, b = (cores[n] for n in node.operands)
        found = _together(_over(a, -1), _over(b, -2))
    elif node.kind == g.ATTENTION:
        found = _attended(node, cores)
    elif node.kind == g.SOFTMAX:
        found = _over(cores[node.operands[0]], node.params.dim)
    elif node.kind in (g.LAYER_NORM, g.RMS_NORM):
        found = _over(cores[node.operands[0]], range(rank - node.params.dims, rank))
    elif node.kind in (g.GROUP_NORM, g.CONV, g.MAX_POOL):
        source = node.operands[0]
        if node.kind == g.GROUP_NORM and not isinstance(source.shape[1], int):
            raise _Mixed  # how many samples share a group changes with the batch
        unbatched = node.kind == g.CONV and len(node.params.weight.shape) > rank
        if not unbatched and all(s == 1 for s in cores[source].shape[1:]):
            found = cores[source]
    if found is None:
        return _probed(node, sources, values)
    return found.expand(node.example)


def _elementwise(node: Node, sources: list[Node]) -> bool:
    tags = getattr(node.target, "tags", ())
    if node.kind not in _ELEMENTWISE and torch.Tag.pointwise not in tags:
        return False
    try:
        return bool(torch.broadcast_shapes(node.example, *(n.example for n in sources)) == node.example)
    except RuntimeError:
        return False


def _contracted(node: Node, cores: dict[Node, Tensor]) -> Tensor:
    """Of an einsum, or a reduction written as one: axes that are not in the result are summed over."""
    labels, result = node.params.labels
    terms = []
    for operand, own in zip(node.operands, labels, strict=True):
        numbers = _over(cores[operand], [i for i, label in enumerate(own) if label not in result])
        left = sorted((i for i, label in enumerate(own) if label in result), key=lambda i: result.index(own[i]))
        gone = [i for i in range(len(own)) if i not in left]
        sizes = {own[i]: numbers.shape[i] for i in left}
        terms.append(numbers.permute(left + gone).reshape([sizes.get(label, 1) for label in result]))
    return _together(*terms)


def _attended(node: Node, cores: dict[Node, Tensor]) -> Tensor:
    q, k, v = (cores[n] for n in node.operands)
    keys, values = _over(k, (-2, -1)), _over(v, -2)
    if node.params.grouped:  # several heads of queries share one of keys
        share = node.operands[0].example[-3] // node.operands[1].example[-3]
        keys, values = (t if t.shape[-3] == 1 else t.repeat_interleave(share, -3) for t in (keys, values))
    return _together(_over(q, -1), keys, values)


def _probed(node: Node, sources: list[Node], values: dict[Node, Any]) -> Tensor:
    """Where NaN comes out of the operation itself, with NaN in place of one sample after the other."""

    def argument(n: Node, sample: int) -> Any:
        if n in sources:
            return torch.ones(n.example, device="cpu").masked_fill_(values[n] == sample, math.nan)
        if n.kind != g.INT and getattr(n.params, "floating", True):
            return torch.ones(n.example, device="cpu")
        return values[n].cpu() if isinstance(values[n], Tensor) else values[n]

    found = torch.zeros(node.example, dtype=torch.int16, device="cpu")
    for sample in _SAMPLES.tolist():
        args, kwargs = (g.map_nodes(lambda n: argument(n, sample), a) for a in (node.args, node.kwargs))  # noqa: B023
        result = node.target(*args, **kwargs)
        result = result[0] if isinstance(result, (tuple, list)) else result
        found = _together(found, result.isnan().to(torch.int16) * sample)
    return found


def _located(numbers: Tensor, node: Node, symbolic: bool) -> g.BatchAxis:
    """The axis along which the samples follow one another."""
    count = EXAMPLE_BATCH
    possible = [
        a for a, n in enumerate(numbers.shape) if n and n % count == 0 and _counts_samples(node.shape[a], n, symbolic)
    ]
    core = _core(numbers)
    if not bool(core.any()):  # nothing is there to be mixed
        axis = possible[0] if possible else 0
        return g.BatchAxis(axis, 1, numbers.shape[axis] // count if possible else 1)
    for axis in possible:
        length = core.shape[axis]
        if length != numbers.shape[axis]:
            continue
        index: list[Any] = [0] * core.dim()
        index[axis] = slice(None)
        line = core[tuple(index)]
        # Values that belong to no sample say nothing: look at the whole slice.
        if bool((line == 0).any()):
            line = core.movedim(axis, 0).reshape(length, -1).amax(1)
        change = (line != line[0]).nonzero()
        if not len(change):
            continue
        inner = int(change[0])
        if length % (count * inner):
            continue
        outer = length // (count * inner)
        expected = _SAMPLES.repeat_interleave(inner).repeat(outer)
        shaped = expected.view(*[-1 if i == axis else 1 for i in range(core.dim())])
        if torch.equal(line, expected) and bool(((core == shaped) | (core == 0)).all()):
            return g.BatchAxis(axis, outer, inner)
    raise _Mixed


def _counts_samples(size: int | str, length: int, symbolic: bool) -> bool:
    """Whether an axis grows with the batch, in proportion."""
    if not symbolic:
        return True
    each = length // EXAMPLE_BATCH
    return size == ("batch" if each == 1 else f"{each}*batch")


def _pattern(node: Node) -> Tensor:
    """Sample numbers of a tensor whose samples have been located; constants beside a sample count as its own."""
    batch, shape = node.batch, node.example
    if not shape or 0 in shape:
        return torch.zeros(shape, dtype=torch.int16, device="cpu")
    line = _SAMPLES.repeat_interleave(batch.inner).repeat(batch.outer)
    return line.view(*[-1 if i == batch.axis else 1 for i in range(len(shape))]).expand(shape)
