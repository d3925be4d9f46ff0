"""Signed rules, ``R = x c``: what they do with every kind of operation.

Coefficients are the gradient of a modified network here. Linear layers and convolutions follow a
:class:`~ramp_fast.rules.layer_rules.LayerRule`; what the other kinds do is the same under all of these rules, but for
the options of :class:`Signed`.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from ramp_fast import gemm, ops
from ramp_fast import graph as g
from ramp_fast.capture import passes
from ramp_fast.capture.linear_maps import Call
from ramp_fast.errors import InputError, UnsupportedModelError
from ramp_fast.gemm import LinearOp, Precision
from ramp_fast.graph import Graph, Node, only_user
from ramp_fast.ops._common import divide
from ramp_fast.ops.activation import SHARES
from ramp_fast.rules import attention
from ramp_fast.rules.base import Flow, Fusion, Operation, Values, reduce_to, vjp
from ramp_fast.rules.conservation import Contribution, Relevance
from ramp_fast.rules.diagonal import FusedRelu
from ramp_fast.rules.fusion import never_negative
from ramp_fast.rules.junctions import gate_by_channel
from ramp_fast.rules.layer_rules import Epsilon, Layer, LayerContext, LayerPullback, LayerRule
from ramp_fast.rules.pools import MaxPool
from ramp_fast.rules.rearrange import Decision, Join, Rearrange, Split, SplitOutput
from ramp_fast.rules.rule import Pass, Rule
from ramp_fast.rules.weighted import Weighted, affine


@dataclass
class SignedFusion(Fusion):
    """What a signed rule decides for one node.

    Attributes
    ----------
    layer : LayerRule or None
        Of a linear layer or convolution.
    own_relevance : bool
        Of a sum with a constant: the other operand gets all relevance of the sum.
    takes_relevance : bool
        Of a layer: relevance of such a sum arrives at it, and no coefficients.
    """

    layer: LayerRule | None = None
    own_relevance: bool = False
    takes_relevance: bool = False


class Signed(Rule):
    """The base of signed rules.

    Attributes
    ----------
    activations : {"pass", "gradient", "guided", "deconvnet", "smooth"}
        Activations hand on the relevance of their output, ``c f(x) / x``. Otherwise activations, norms, products and
        attention have their gradient, but for ReLUs of guided backpropagation, of DeconvNet, and of a softplus of
        ``beta_smooth``.
    attention : {"all", "values"}
        Half of the relevance of attention goes to the values and a quarter each to queries and keys, or all of it to
        the values.
    residual_gamma : float
        Of sums of two tensors: an operand with the sign of the sum counts ``1 + gamma`` times.
    times_input : bool
        Whether maps are ``x c``, or the gradient ``c`` itself.
    constants_take_nothing : bool
        Constants that are added on the way from the first layer, as position embeddings are, take no relevance.
    stabilizer : float
        Of sums of two tensors and average pools: ``c z / (z + stabilizer sign(z))``, as zennit has it.
    fold_batchnorm : bool
        Whether BatchNorm becomes part of the layer before it.
    divides_nowhere : bool
        Whether no rule for layers divides.
    beta_smooth : float
        Of smooth activations: ReLUs have the gradient ``sigmoid(beta_smooth x)``.
    """

    seeds_are_coefficients: ClassVar[bool] = True
    activations: str = "pass"
    attention: str = "all"
    residual_gamma: float = 0.0
    times_input: bool = True
    constants_take_nothing: bool = False
    stabilizer: float = 0.0
    fold_batchnorm: bool = True
    divides_nowhere: bool = False
    beta_smooth: float = 10.0

    @property
    def own_gradients(self) -> bool:
        """Whether coefficients are the gradient of the network itself, but for its ReLUs."""
        return self.activations != "pass"

    def stabilizer_of(self, node: Node) -> float:
        """The stabilizer of a sum of two tensors or an average pool."""
        return self.stabilizer

    @abstractmethod
    def layer_rule(self, node: Node, first: bool) -> LayerRule:
        """The rule of a linear layer or convolution; ``first``: it reads the images with no other one between."""

    def rewrites(self) -> Sequence[Pass]:
        """As :meth:`ramp_fast.rules.Rule.rewrites`: BatchNorm becomes part of the layer before it, if asked for.

        So do the factors of LayerScale where no layer divides; stabilizers belong to the layer as it is written.
        """
        kept = passes.STANDARD if self.divides_nowhere else _WITHOUT_SCALES
        return (passes.fold_batchnorm, *kept) if self.fold_batchnorm else kept

    def fuse(self, graph: Graph, precision: Precision) -> Mapping[Node, Fusion]:
        """As :meth:`ramp_fast.rules.Rule.fuse`."""
        return _decisions(self, graph, precision)

    def start(self, seed: Tensor, logits: Tensor) -> Tensor:
        """The seed itself: the relevance of a logit is the logit times its seed."""
        return seed

    def check_balance(self) -> None:
        """As :meth:`ramp_fast.rules.Rule.check_balance`: gradients are not conserved."""
        if not self.times_input:
            raise InputError(f"check_conservation: maps of {self.name} are gradients, whose sums nothing conserves")

    def relevance(self, c: Tensor, x: Tensor) -> Tensor:
        """As :meth:`ramp_fast.rules.Rule.relevance`: ``x c``."""
        return x * c if self.times_input else c

    def operation(self, node: Node, precision: Precision, fusion: Fusion) -> Operation:
        """As :meth:`ramp_fast.rules.Rule.operation`."""
        kind = TABLE[node.kind]
        if node.kind == g.LINEAR_MAP:
            kind = _map_step(node, fusion, self)
        elif node.kind == g.REARRANGE and node.params.how in ("cat", "stack"):
            kind = Join
        elif node.kind == g.ACTIVATION and node.params.how == "relu" and node.params.cap == math.inf:
            kind = Relu if fusion.fused_into is None else FusedRelu
        elif self.own_gradients and node.kind in _WITH_GRADIENT:
            kind = AtPoint
        if self.own_gradients and any(_is_detached(node, read) for read in node.references()):
            raise UnsupportedModelError(
                f"{self.name} is the network's gradient, and {node.kind} reads a statistic of the images that is a "
                "constant to every rule; attnlrp and lrp-epsilon are defined for it"
            )
        return kind(node, precision, fusion, self)


_WITH_GRADIENT = frozenset({g.ACTIVATION, g.GENERIC, g.LAYER_NORM, g.GROUP_NORM, g.RMS_NORM, g.SHIFT})


def _is_detached(node: Node, read: Node) -> bool:
    """Whether ``node`` reads this value of the images without relevance, though it has a gradient."""
    return not (read.constant or read.decided or read.kind == g.DECISION or read in node.operands)


def layer_kind(node: Node) -> str | None:
    """What kind of layer a rule for layers sees in ``node``, :data:`graph.LINEAR` or :data:`graph.CONV`; None: in none.

    Layers are products with one constant weight: linear layers, convolutions, transposed convolutions, and products
    that are written as ``einsum`` or with a batch of matrices.
    """
    if node.kind in g.WEIGHTED:
        return node.kind
    if node.kind != g.LINEAR_MAP or type(node.target) is not Call:  # resampling and rotations have no weight
        return None
    if "conv_transpose" in str(node.target.target):
        return g.CONV
    return g.LINEAR if len(node.args) == 2 else None


_WITHOUT_SCALES = tuple(p for p in passes.STANDARD if p is not passes.fold_channel_scales)


def _decisions(rule: Signed, graph: Graph, precision: Precision) -> Mapping[Node, Fusion]:
    """Layer rules of all layers, and which sums hand on all of their relevance."""
    carriers, users = graph.carriers(), graph.users()
    below: dict[Node, frozenset[str]] = {graph.input: frozenset()}  # kinds between a node and the images
    decided: dict[Node, SignedFusion] = {}
    for node in graph.nodes:
        if node.constant or node.kind == g.INPUT or node not in carriers:
            continue
        under = frozenset[str]().union(*(below.get(n, frozenset()) for n in node.sources))
        # Relevance cannot be handed on to two tensors that were added.
        several = node.kind == g.ADD and len(node.sources) > 1
        below[node] = under | {"sum of tensors" if several else layer_kind(node) or node.kind}
        fusion = decided[node] = SignedFusion()
        if layer_kind(node) is not None:
            first = not under & g.WEIGHTED
            fusion.layer = rule.layer_rule(node, first)
            passing = PASSES_RELEVANCE if rule.own_gradients else PASSES_RELEVANCE | {g.ACTIVATION, g.GENERIC}
            if fusion.layer.gives_relevance and not under <= passing:
                kinds = ", ".join(sorted(under - passing))
                raise UnsupportedModelError(
                    f"{rule.name}: {node.module or node.name} follows {fusion.layer}, which gives relevance to what "
                    f"the layer reads, and between it and the images there is {kinds}, which takes coefficients only"
                )
            fusion.positive_input = never_negative(node.operands[0])
            fusion.fused_relu = _relu_of(node, users, fusion.layer, rule, precision)
        elif node.kind == g.ACTIVATION:
            source = decided.get(node.operands[0])
            fusion.fused_into = node.operands[0] if source is not None and source.fused_relu is node else None
        elif node.kind == g.ADD and rule.constants_take_nothing:
            layer = _first_layer(node.sources[0], below) if len(node.sources) == 1 else None
            if layer is not None:
                fusion.own_relevance = decided[layer].takes_relevance = True
    return decided


def _relu_of(
    node: Node, users: dict[Node, list[Node]], layer: LayerRule, rule: Signed, precision: Precision
) -> Node | None:
    """The ReLU that the step of a convolution computes as well: its rule multiplies by the output, 0 where that is."""
    relu = only_user(users, node)
    fits = (
        node.kind == g.CONV
        and layer.multiplies_output
        and relu is not None
        and relu.kind == g.ACTIVATION
        and relu.params.how == "relu"
        and relu.params.cap == math.inf
        and rule.activations == "pass"
        and not rule.constants_take_nothing
        and node.batch.leading
        and len(node.example) == 4
    )
    weight = node.params.weight if fits else None
    if weight is None or weight.kind != g.PARAM:
        return None
    tensor = weight.params.tensor
    tiles = gemm.Geometry.of(node.params).tiles(tensor, *node.operands[0].example[2:])
    return None if tiles or not gemm.fuses_convolutions(precision, tensor.device) else relu


def _first_layer(node: Node, below: Mapping[Node, frozenset[str]]) -> Node | None:
    """The first layer whose outputs ``node`` has, moved, beside constants or with constants added, if there is one."""
    while node.kind in (g.REARRANGE, g.ADD) and len(node.sources) == 1:
        node = node.sources[0]
    first = layer_kind(node) is not None and not below[node.operands[0]] & g.WEIGHTED
    return node if first else None


class Step(Operation):
    """An operation of one tensor: a subclass says how coefficients are handed on; relevance goes on as it is."""

    pullback_kernel = "torch"

    @property
    def source(self) -> Node:
        return self.node.sources[0]

    def pullback(self, parts: list[Any], values: Values, kept: Any, conservation: Any) -> Iterator[Flow]:
        part = self.merged(parts, values, conservation)
        if isinstance(part, Relevance):
            # All of it, of an operation of single entries: several that were one before get their sum.
            shape = part.c.shape[1], *self.source.example[1:]
            yield Flow(self.source, Relevance(reduce_to(part.c, shape)))
        else:
            yield Flow(self.source, part.moved(self.pull(part.c, values, kept).to(part.c.dtype)))

    def pull(self, c: Tensor, values: Values, kept: Any) -> Tensor:
        """``c`` of the operand from that of the output."""
        raise NotImplementedError

    def wide(self, c: Tensor) -> Tensor:
        return c.to(self.precision.accumulate)


class Linear(Weighted[LayerPullback]):
    """A linear layer or convolution under its :class:`LayerRule`."""

    fusion: SignedFusion

    def pack(self, constants: dict[Node, Any]) -> tuple[LinearOp, LayerPullback]:
        weight, bias = self.effective(constants)
        narrow, layer = self.precision.pullback, self.fusion.layer
        size, geometry = self.node.operands[0].example[2:], None
        if self.node.kind == g.CONV:
            geometry = gemm.Geometry.of(self.node.params)
        tiles = geometry is not None and len(size) == 2 and geometry.tiles(weight, *size)
        depthwise = geometry is not None and geometry.depthwise(weight)
        outputs = self.node.example[2:]

        def forward(w: Tensor, b: Tensor | None, relu: bool = False) -> LinearOp:
            if geometry is None:
                return gemm.Matrix(w, b)
            return gemm.PatchForward(w, b) if tiles else gemm.convolution(w, b, geometry, relu, outputs)

        def product(w: Tensor, b: Tensor | None) -> LinearOp:
            if geometry is not None and depthwise:  # it computes in float32
                return gemm.DepthwiseForward(w, b, geometry, dtype=narrow)
            return forward(w.to(narrow), None if b is None else b.to(narrow))

        def transposed(w: Tensor) -> Any:
            w = w.to(narrow)
            if geometry is None:
                return gemm.Matrix(w.t())
            if depthwise:
                return gemm.DepthwisePullback.of([w], geometry, size)
            return gemm.PatchPullback(w) if tiles else gemm.ConvPullback(w, geometry, size)

        def sided(positive: Tensor, negative: Tensor, b: Tensor | None) -> LinearOp:
            if geometry is not None and depthwise:
                return gemm.DepthwiseForward(positive, b, geometry, negative=negative, dtype=narrow)
            return gemm.SidedForward(positive, negative, b, geometry, outputs, narrow)

        def sided_transposed(positive: Tensor, negative: Tensor) -> gemm.Packed:
            if geometry is not None and depthwise:
                return gemm.DepthwisePullback.of([positive.to(narrow), negative.to(narrow)], geometry, size)
            return gemm.SidedPullback(positive, negative, geometry, size, narrow)

        assert layer is not None
        groups = 1 if geometry is None else geometry.groups
        images = geometry is None or weight.dim() == len(self.node.example) == 4
        one_step = ops.cpu_kernels(weight.device) and not tiles and images
        both = (sided, sided_transposed) if one_step else (None, None)
        channels = weight.shape[1] * groups
        parts = weight, bias, groups, self.fusion.positive_input, product, transposed
        seen = Layer(*parts, sided=both[0], sided_transposed=both[1], channels=channels)
        return forward(weight, bias, self.fusion.fused_relu is not None), layer.pack(seen)

    def parameters(self) -> Any:
        return self.node.params, repr(self.fusion.layer), self.fusion.fused_relu is not None

    def prepare(self, constants: dict[Node, Any]) -> None:
        super().prepare(constants)
        if self.fusion.fused_relu is not None:
            self.forward_kernel += " > relu"

    def needs(self) -> list[Node]:
        rule = self.fusion.layer
        assert rule is not None
        reads = [self.node.operands[0]] if rule.reads_input else []
        return [*reads, *([self.node] if rule.reads_output or self.fusion.takes_relevance else [])]

    def pullback(self, parts: list[Any], values: Values, kept: Any, conservation: Any) -> Iterator[Flow]:
        part = self.merged(parts, values, conservation)
        pulled = self.pullback_map(_Context(self, part, values))
        assert self.fusion.layer is not None
        if self.fusion.layer.gives_relevance:
            found: Contribution = Relevance(pulled)
        else:
            found = Contribution(pulled) if isinstance(part, Relevance) else part.moved(pulled)
        yield Flow(self.node.operands[0], found)


class MapLayer(Linear):
    """A layer that is an operation of its own kind: ``W^T s`` is the transpose of that operation at the weight."""

    def pack(self, constants: dict[Node, Any]) -> tuple[LinearOp, LayerPullback]:
        weight, *biases = (constants[n] for n in self.node.args[1:])
        bias = biases[0] if biases else None
        wide, layer = self.precision.accumulate, self.fusion.layer

        def product(w: Tensor, b: Tensor | None) -> LinearOp:
            return _AtWeight(self.node.target, w.to(wide), b if b is None else b.to(wide), len(biases))

        def transposed(w: Tensor) -> Any:
            return _Transposed(self.node.target, w.to(wide), None, len(biases))

        assert layer is not None
        # Of an einsum nobody knows which axis has the channels.
        channels = self.node.operands[0].example[1] if layer_kind(self.node) == g.CONV else None
        seen = Layer(weight, bias, 1, self.fusion.positive_input, product, transposed, channels=channels)
        return _AtWeight(self.node.target, weight, bias, len(biases)), layer.pack(seen)

    @property
    def images_first(self) -> bool:
        """Whether they are the first axis of input and output: the input's shape is known then."""
        return self.node.batch.leading and self.node.operands[0].batch.leading

    def needs(self) -> list[Node]:
        return super().needs() if self.images_first else [*super().needs(), self.node.operands[0]]

    def prepare(self, constants: dict[Node, Any]) -> None:
        self.layer = gemm.PackedLayer(*self.pack(constants), ())
        self.forward_kernel, self.pullback_kernel = self.forward_map.kernel, self.pullback_map.kernel


@dataclass
class _AtWeight:
    """A linear operation at one weight and bias."""

    function: Callable[..., Any]
    weight: Tensor
    bias: Tensor | None
    biases: int
    kernel: ClassVar[str] = "aten"

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = self.function(x.to(self.weight.dtype), self.weight, *[self.bias] * self.biases)
        return y


class _Transposed(_AtWeight):
    """Its transpose, by autograd."""

    kernel: ClassVar[str] = "autograd"


def _map_step(node: Node, fusion: Fusion, rule: Signed) -> type[Operation]:
    """The operation of a linear map: a layer where it has one weight that a rule says something about."""
    layer = getattr(fusion, "layer", None)
    if layer is None or layer == Epsilon(0.0):  # LRP-0 is the transpose itself
        return AtPoint
    if not all(n.kind == g.PARAM or _of_weights(n) for n in node.args[1:]):
        raise UnsupportedModelError(
            f"{rule.name}: {layer} needs the weight of {node.target.__name__}, which depends on the batch size here"
        )
    return MapLayer


def _of_weights(node: Node) -> bool:
    return node.kind == g.PARAM or (node.kind == g.CONST and all(_of_weights(n) for n in node.references()))


class _Context(LayerContext):
    def __init__(self, step: Linear, part: Contribution, values: Values) -> None:
        self.step, self.part, self.values = step, part, values
        self.narrow, self.wide = step.precision.pullback, step.precision.accumulate

    @property
    def x(self) -> Tensor:
        x: Tensor = self.values[self.step.node.operands[0]]
        return x

    @cached_property
    def narrow_x(self) -> Tensor:
        return self.x.to(self.narrow)

    @property
    def z(self) -> Tensor:
        z: Tensor = self.values[self.step.node]
        return z

    def coefficients(self) -> Tensor:
        c = self.part.c
        if isinstance(self.part, Relevance):
            c = divide(c.to(self.wide), self.z.to(self.wide).expand(c.shape))
        return c.to(self.narrow)

    def ratio(self, denominator: Tensor, stabilizer: float, side: int = 0) -> Tensor:
        if not isinstance(self.part, Relevance):
            return ops.ratio(self.part.c.to(self.narrow), self.z, denominator, stabilizer, side)
        relevance = self.part.c.to(self.wide)
        if side:
            relevance = relevance.masked_fill(side * self.z <= 0, 0.0)
        return ops.ratio(relevance, torch.ones_like(self.z, dtype=self.wide), denominator, stabilizer)

    def product(self, function: LinearOp, x: Tensor) -> Tensor:
        return self.step.by_sample(function, 0, x.to(self.narrow))

    def product_of_input(self, function: LinearOp) -> Tensor:
        if isinstance(function, (gemm.DepthwiseForward, gemm.SidedForward)):  # they narrow it themselves
            return self.step.by_sample(function, 0, self.x)
        return self.product(function, self.narrow_x)

    def transposed(self, function: gemm.Packed, s: Tensor) -> Tensor:
        if isinstance(function, gemm.DepthwisePullback):
            return function(s.to(self.narrow), None)
        if isinstance(function, _Transposed):
            return self.step.by_sample(partial(self._by_autograd, function), 1, s)
        return self._transposed(cast("LinearOp", function), s)

    def sided(self, function: gemm.Packed, s: Tensor) -> Tensor:
        if isinstance(function, gemm.DepthwisePullback):
            return function(s.to(self.narrow), self.x)
        assert isinstance(function, gemm.SidedPullback)
        return function.select(self._transposed(function.function, s), self.x)

    def _by_autograd(self, function: _Transposed, s: Tensor) -> Tensor:
        assert isinstance(self.step, MapLayer)
        read = self.step.node.operands[0]
        shape = (s.shape[1], *read.example[1:]) if self.step.images_first else tuple(self.x.shape)
        return vjp(function, shape, s.to(function.weight.dtype)).to(self.narrow)

    def _transposed(self, function: LinearOp, s: Tensor) -> Tensor:
        s = s.to(self.narrow)
        if self.step.node.kind == g.LINEAR:
            return self.step.by_sample(function, 1, s.contiguous())

        def of_images(t: Tensor) -> Tensor:
            pulled: Tensor = function(t.flatten(0, 1)).unflatten(0, t.shape[:2])
            return pulled

        alone = getattr(function, "independent", False)
        return _with_plain_strides(of_images(s) if alone else self.step.by_sample(of_images, 1, s))


def _with_plain_strides(c: Tensor) -> Tensor:
    """``c`` ``[T, B, ...]`` with the strides of a single map, or sample, as they would be beside others.

    Libraries give axes of one entry any stride, and operators would copy what they take for another layout.
    """
    inner = c.shape[2:].numel()
    own = c.stride()
    strides = (c.shape[1] * inner if c.shape[0] == 1 else own[0], inner if c.shape[1] == 1 else own[1], *own[2:])
    return c if strides == own else c.as_strided(c.shape, strides)


def _in_layout_of(c: Tensor, x: Tensor) -> Tensor:
    """``c`` ``[T, B, C, H, W]`` with channels last where ``x`` has them there, so that no later step copies it."""
    last = torch.channels_last
    if x.dim() != 4 or x.is_contiguous() or not x.is_contiguous(memory_format=last):
        return c
    return _with_plain_strides(c.flatten(0, 1).contiguous(memory_format=last).unflatten(0, c.shape[:2]))


class Relu(Step):
    """``[y > 0] c``; guided: also only positive ``c``; DeconvNet: positive ``c`` wherever it is; smooth: a sigmoid."""

    def needs(self) -> list[Node]:
        return [self.source if self.rule.activations == "smooth" else self.node]

    def pull(self, c: Tensor, values: Values, kept: Any) -> Tensor:
        if self.rule.activations == "deconvnet":
            return c.clamp_min(0)
        if self.rule.activations == "smooth":
            slope: Tensor = (self.rule.beta_smooth * self.wide(values[self.source])).sigmoid()
            return self.wide(c) * slope
        y = values[self.node]
        gated: Tensor = ops.ratio(c, y, y)  # y / y is 1, or 0 where y is
        return gated.clamp_min(0) if self.rule.activations == "guided" else gated


class PassOn(Step):
    """``c f(x) / x``, 0 where x is 0: the input gets the relevance of the output."""

    pullback_kernel = "f(x)/x"

    def keeps(self) -> list[tuple[tuple[int, ...], torch.dtype]]:
        return [] if self.divides else [(self.node.example, self.precision.pullback)]

    def needs(self) -> list[Node]:
        return [self.source] if self.divides else []

    def __init__(self, node: Node, precision: Precision, fusion: Fusion, rule: Any = None) -> None:
        super().__init__(node, precision, fusion, rule)
        self.function = None  # one that an operator has both of
        # Of a capped ReLU the input is enough, which rules for the layer below may need as well.
        self.divides = node.kind == g.ACTIVATION and node.params.how == "relu"
        if node.kind == g.ACTIVATION and node.params.function in SHARES:
            tanh = node.kwargs.get("approximate", "none") == "tanh"
            self.function = "gelu_tanh" if tanh else node.params.function
            self.forward_kernel = "activation_share"

    def forward(self, values: Values) -> tuple[Any, Any]:
        if self.function is not None:
            return ops.activation_share(values[self.source], self.function, self.precision.pullback)
        x, y = values[self.source], values.call(self.node)
        return y, None if self.divides else divide(y, x).to(self.precision.pullback)

    def pull(self, c: Tensor, values: Values, kept: Any) -> Tensor:
        if self.divides:
            return ops.ratio(c, values.call(self.node), values[self.source])
        handed: Tensor = c * kept
        return handed


class AtPoint(Step):
    """``J(x)^T c``: what is linear, or a choice of its inputs, or where a rule takes the gradient."""

    pullback_kernel = "autograd"

    def needs(self) -> list[Node]:
        return [n for n in dict.fromkeys(self.node.references()) if not n.constant]

    def forward(self, values: Values) -> tuple[Any, Any]:
        y = values.call(self.node)
        return (y[0] if isinstance(y, tuple) else y), None  # of `max` along an axis the values, not the places

    def pull(self, c: Tensor, values: Values, kept: Any) -> Tensor:
        def function(u: Tensor) -> Tensor:
            y: Any = values.call_at(self.node, self.source, u)
            result: Tensor = y[0] if isinstance(y, tuple) else y
            return result

        # a slope of infinity, as a norm has at zero, is no share of anything
        return torch.nan_to_num(vjp(function, values[self.source], self.wide(c)), nan=0.0, posinf=0.0, neginf=0.0)


class Unchanged(Step):
    """``c`` goes on as it is: token selections, and ``x`` minus a detached statistic."""

    pullback_kernel = "view"

    def pull(self, c: Tensor, values: Values, kept: Any) -> Tensor:
        return c


class Scale(Step):
    """A constant factor: ``s c``."""

    def forward(self, values: Values) -> tuple[Any, Any]:
        return values.call(self.node), values[self.source].shape

    def pull(self, c: Tensor, values: Values, kept: Any) -> Tensor:
        factor = values[self.node.params.factor]
        if isinstance(factor, Tensor):
            factor = self.wide(factor)
        # A wide factor makes the product wide: no copy of c in between.
        return reduce_to(c / factor if self.node.params.inverse else c * factor, kept)


class Div(Step):
    """Division by a detached statistic, or multiplication by one: ``c / d``, ``c d``."""

    def needs(self) -> list[Node]:
        return [self.source, self.node.params.denominator]

    def pull(self, c: Tensor, values: Values, kept: Any) -> Tensor:
        d, wide = self.wide(values[self.node.params.denominator]), self.wide(c)
        scaled = wide * d if self.node.params.inverse else divide(wide, d.expand(c.shape[1:]).expand_as(wide))
        return reduce_to(scaled, values[self.source].shape)


class BatchNorm(Step):
    """A diagonal linear layer where it is not folded: ``g c``."""

    def prepare(self, constants: dict[Node, Any]) -> None:
        self.gain = affine(self.node.params, constants)[0].to(self.precision.accumulate)

    def pull(self, c: Tensor, values: Values, kept: Any) -> Tensor:
        return self.wide(c) * self.gain.view(-1, *[1] * (c.dim() - 3))


class Norm(Step):
    """LayerNorm, RMSNorm and GroupNorm with a detached deviation: ``w c / sigma``, less the mean where one is taken."""

    def __init__(self, node: Node, precision: Precision, fusion: Fusion, rule: Any = None) -> None:
        super().__init__(node, precision, fusion, rule)
        if node.kind == g.LAYER_NORM:
            self.pullback_kernel = "norm_gradient"

    def needs(self) -> list[Node]:
        return [self.source]

    def pull(self, c: Tensor, values: Values, kept: Any) -> Tensor:
        p = self.node.params
        if self.node.kind == g.LAYER_NORM:
            scale = values[p.weight]
            flat = values[self.source].flatten(-p.dims), None if scale is None else scale.flatten()
            return ops.norm_gradient(c.flatten(-p.dims), *flat, p.eps).view(c.shape)
        x, own = self.wide(values[self.source]), self.wide(c)
        weight = None if p.weight is None else self.wide(values[p.weight])
        if self.node.kind == g.GROUP_NORM:
            own = own if weight is None else own * weight.view(-1, *[1] * (x.dim() - 2))
            rows, at = (t.unflatten(-x.dim() + 1, (p.groups, -1)).flatten(-x.dim() + 1) for t in (own, x))
            return ops.norm_gradient(rows, at, None, p.eps).view(c.shape)
        own = own if weight is None else own * weight
        axes = tuple(range(-p.dims, 0))
        eps = p.eps if p.eps is not None else torch.finfo(values[self.source].dtype).eps
        return own * (x.square().mean(axes, keepdim=True) + eps).rsqrt()


class Add(Operation):
    """``c`` to every operand; with a residual gamma ``w_a z c / (w_a a + w_b b)``.

    ``own_relevance``: a constant takes nothing, and the other operand gets the relevance of the sum.
    """

    fusion: SignedFusion

    @property
    def _residual(self) -> bool:
        return len(self.node.sources) == 2

    @property
    def _stabilizer(self) -> float:
        stabilizer: float = self.rule.stabilizer_of(self.node)
        return stabilizer

    def needs(self) -> list[Node]:
        if self.fusion.own_relevance:
            return [self.node]
        if self._residual and self.rule.residual_gamma:
            return [self.node, *self.node.sources]
        return [self.node] if self._residual and self._stabilizer else []

    def forward(self, values: Values) -> tuple[Any, Any]:
        return values.call(self.node), {n: values[n].shape for n in self.node.sources}

    def pullback(self, parts: list[Any], values: Values, kept: Any, conservation: Any) -> Iterator[Flow]:
        part = self.merged(parts, values, conservation)
        p = self.node.params
        if isinstance(part, Relevance) or self.fusion.own_relevance:
            (source,) = self.node.sources
            relevance = part.c
            if not isinstance(part, Relevance):
                relevance = part.c.to(self.precision.accumulate) * values[self.node]
            yield Flow(source, Relevance(reduce_to(relevance, kept[source])))
            return
        shared = None
        if self._residual and self.rule.residual_gamma:
            shared = self._shared(part.c, values)
        elif self._residual and self._stabilizer:
            wide = part.c.to(self.precision.accumulate)
            part = part.moved(_stabilized(wide, self.node, values, self._stabilizer).to(part.c.dtype))
        for i, (operand, sign) in enumerate(zip((p.first, p.second), p.signs, strict=True)):
            if isinstance(operand, Node) and not operand.constant:
                c = part.c if shared is None else shared[i]
                c = reduce_to(c if sign > 0 else -c, kept[operand])
                yield Flow(operand, part.moved(c.to(part.c.dtype), copies=True))

    def _shared(self, c: Tensor, values: Values) -> list[Tensor]:
        p, wide = self.node.params, self.precision.accumulate
        z = values[self.node].to(wide)
        terms = [sign * values[n].to(wide) for n, sign in zip((p.first, p.second), p.signs, strict=True)]
        weights = [1 + self.rule.residual_gamma * (t * z > 0) for t in terms]
        below = sum(w * t for w, t in zip(weights, terms, strict=True))
        assert isinstance(below, Tensor)
        r = divide(z, below) * c.to(wide)
        return [w * r for w in weights]


class Product(Operation):
    """``z = a b``: half of the relevance to each; with attention to the values alone nothing to its weights.

    Of gradients all of it to each.
    """

    pullback_kernel = "products"

    def needs(self) -> list[Node]:
        return list(self.node.operands)

    def pullback(self, parts: list[Any], values: Values, kept: Any, conservation: Any) -> Iterator[Flow]:
        part = self.merged(parts, values, conservation)
        gate = gate_by_channel(self.node, values) if self.node.kind == g.MUL else None
        if gate is not None:
            yield from self._gated(part, values, gate)
            return
        for place, share in enumerate(self._shares):
            operand = self.node.operands[place]
            if share and not operand.constant:
                own = self.pull(part.c, values, place).to(part.c.dtype).mul_(share)  # a power of two
                yield Flow(operand, part.moved(own, copies=True))

    @property
    def _shares(self) -> tuple[float, float]:
        attends = getattr(self.node.params, "role", None) == "attend"
        if attends and self.rule.attention == "values":
            return (0.0, 1.0) if _is_weights(self.node.operands[0]) else (1.0, 0.0)
        return (1.0, 1.0) if self.rule.own_gradients else (0.5, 0.5)

    def _gated(self, part: Any, values: Values, gate: Node) -> Iterator[Flow]:
        """Of images and one number for each of their channels, in one pass."""
        images = next(n for n in self.node.operands if n is not gate)
        x = values[images]
        c, rows = part.c.movedim(2, -1), x.movedim(1, -1)
        share, _ = self._shares
        c_a, c_b = ops.mul_gradient(c.flatten(2, 3), rows.flatten(1, 2), values[gate].flatten(1), share)
        yield Flow(images, part.moved(c_a.view(c.shape).movedim(-1, 2), copies=True))
        yield Flow(gate, part.moved(c_b.view(*c_b.shape, 1, 1).to(part.c.dtype), copies=True))

    def pull(self, c: Tensor, values: Values, place: int) -> Tensor:
        """``c`` of one operand, the other constant."""
        x, other = values[self.node.operands[place]], values[self.node.operands[1 - place]]
        if self.node.kind == g.MUL:
            if x.shape == other.shape == c.shape[1:]:
                return ops.scale_by(c, other)
            return reduce_to(c.to(self.precision.accumulate) * other, x.shape)
        narrow = self.precision.pullback
        c, other = c.to(narrow), other.to(narrow).mT
        return reduce_to(c @ other if place == 0 else other @ c, x.shape)


def _is_weights(node: Node) -> bool:
    while node.kind == g.REARRANGE:
        node = node.operands[0]
    return node.kind == g.SOFTMAX


class Bilinear(Product):
    """einsum of two tensors."""

    pullback_kernel = "autograd"

    def pull(self, c: Tensor, values: Values, place: int) -> Tensor:
        node, wide = self.node, self.precision.accumulate
        operands = [values[n].to(wide) for n in node.operands]

        def product(u: Tensor) -> Tensor:
            given = iter([u if i == place else x for i, x in enumerate(operands)])

            def value(n: Node) -> Any:
                return next(given) if n is node.operands[0] or n is node.operands[1] else values[n].to(wide)

            y: Tensor = node.target(*g.map_nodes(value, node.args), **g.map_nodes(value, node.kwargs))
            return y

        return vjp(product, tuple(operands[place].shape), c.to(wide))


class Softmax(Step):
    """Its Jacobian: ``A (c - sum A c)``."""

    def needs(self) -> list[Node]:
        return [self.node]

    def pull(self, c: Tensor, values: Values, kept: Any) -> Tensor:
        weights = self.wide(values[self.node])
        dim = self.node.params.dim % weights.dim() - weights.dim()
        own = weights * self.wide(c)
        return own - weights * own.sum(dim, keepdim=True)


class Attention(attention.Forward):
    """Half to the values, and through the softmax's Jacobian a quarter to queries and keys each; or all to the values.

    ``c_V = A^T c / 2``, ``c_A = c V^T / 2``, ``c_S = A (c_A - sum A c_A)``, ``c_Q = scale c_S K / 2``, ``c_K = scale
    c_S^T Q / 2``. Of gradients nothing is halved.
    """

    def __init__(self, node: Node, precision: Precision, fusion: Fusion, rule: Any = None) -> None:
        super().__init__(node, precision, fusion, rule)
        self.pullback_kernel = "attention_gradient" if self.fused else "products"

    def needs(self) -> list[Node]:
        return list(self.node.operands)

    @property
    def _shares(self) -> tuple[float, float]:
        """Of the values, and of queries and keys each."""
        of_values, of_scores = (1.0, 1.0) if self.rule.own_gradients else (0.5, 0.25)
        return (of_values, of_scores) if self.rule.attention == "all" else (1.0, 0.0)

    def _in_one_step(self, part: Any, values: Values) -> Iterator[Flow]:
        q, k, v = (values[n] for n in self.node.operands)
        between = q.shape[1:-2]  # heads are all axes between the first and the last two
        q, k, v = (t.reshape(t.shape[0], math.prod(between), *t.shape[-2:]) for t in (q, k, v))
        c = part.c.to(self.precision.pullback)
        c = c.reshape(*c.shape[:2], q.shape[1], *c.shape[-2:])
        of_values, of_scores = self._shares
        pulled = ops.attention_gradient(q, k, v, c, self.node.params.scale, of_values, of_scores, self.bias)
        for node, own, share in zip(self.node.operands, pulled, (of_scores, of_scores, of_values), strict=True):
            if share and not node.constant:
                own = own.reshape(*own.shape[:2], *between, *own.shape[-2:])
                yield Flow(node, part.moved(own.to(part.c.dtype), copies=True))

    def pullback(self, parts: list[Any], values: Values, kept: Any, conservation: Any) -> Iterator[Flow]:
        part = self.merged(parts, values, conservation)
        if self.in_one_step(part.c.device):
            yield from self._in_one_step(part, values)
            return
        p, narrow = self.node.params, self.precision.pullback
        query, key, value = self.node.operands
        q, k, v = (values[n] for n in self.node.operands)
        heads = k.shape[1]
        if p.grouped:
            k, v = (t.repeat_interleave(q.shape[1] // heads, 1) for t in (k, v))
        wide = self.precision.accumulate
        plain, bias = self.scores(q * p.scale, k, values)
        weights = torch.nan_to_num((plain if bias is None else plain + bias).softmax(-1)).to(wide)
        c, (of_values, of_scores) = part.c.to(narrow), self._shares

        def flow(node: Node, own: Tensor, share: float) -> Iterator[Flow]:
            if not node.constant:
                x = values[node]
                if own.shape[2] != x.shape[1] and node is not query:
                    own = own.unflatten(2, (heads, -1)).sum(3)  # the heads of queries that share it
                yield Flow(node, part.moved((share * own).to(part.c.dtype), copies=True))

        yield from flow(value, weights.to(narrow).mT @ c, of_values)
        if of_scores:
            c_a = (c @ v.to(narrow).mT).to(wide)
            own = weights * c_a
            c_s = ((own - weights * own.sum(-1, keepdim=True)) * (p.scale * of_scores)).to(narrow)
            yield from flow(query, c_s @ k.to(narrow), 1.0)
            yield from flow(key, c_s.mT @ q.to(narrow), 1.0)


class LinearPool(AtPoint):
    """Averages and sums: ``L^T c``."""

    def needs(self) -> list[Node]:
        return [*super().needs(), *([self.node] if self.rule.stabilizer_of(self.node) else [])]

    def pull(self, c: Tensor, values: Values, kept: Any) -> Tensor:
        x, p = values[self.source], self.node.params
        stabilized = _stabilized(self.wide(c), self.node, values, self.rule.stabilizer_of(self.node))
        if p.how == "mean" and sorted(p.dims) == [2, 3] and x.dim() == 4 and self.source.batch.leading:
            shared = stabilized / math.prod(x.shape[2:])
            shared = shared.to(c.dtype).view(*c.shape[:3], 1, 1)
            everywhere = shared.expand(len(c), *x.shape)
            laid_out = _in_layout_of(everywhere, x)
            return laid_out.contiguous() if laid_out is everywhere else laid_out
        pulled = super().pull(stabilized, values, kept)
        return _in_layout_of(pulled, values[self.source])


def _stabilized(c: Tensor, node: Node, values: Values, stabilizer: float) -> Tensor:
    """``c z / (z + stabilizer sign(z))``."""
    if stabilizer == 0:
        return c
    z = values[node]
    return ops.ratio(c, z, z, stabilizer)


class Choice(Operation):
    """Every entry is one of two tensors': ``c`` goes to the one chosen, half to each of two equal ones."""

    pullback_kernel = "autograd"

    def needs(self) -> list[Node]:
        return [n for n in dict.fromkeys(self.node.references()) if not n.constant]

    def pullback(self, parts: list[Any], values: Values, kept: Any, conservation: Any) -> Iterator[Flow]:
        part = self.merged(parts, values, conservation)
        c = part.c.to(self.precision.accumulate)
        for operand in self.node.sources:
            own = vjp(partial(values.call_at, self.node, operand), values[operand], c)
            yield Flow(operand, part.moved(own.to(part.c.dtype), copies=True))


PASSES_RELEVANCE = frozenset(
    {g.REARRANGE, g.SPLIT, g.SPLIT_OUTPUT, g.SCALE, g.DIV, g.ADD, g.BATCH_NORM, g.SELECT_TOKENS, g.MAX_POOL, g.CHOICE}
)
"""Kinds that hand relevance on from their output to their input, where it does not come as coefficients.

So do activations, but for those of gradients.
"""

TABLE: dict[str, type[Operation]] = {
    g.LINEAR: Linear,
    g.CONV: Linear,
    g.BATCH_NORM: BatchNorm,
    g.LAYER_NORM: Norm,
    g.GROUP_NORM: Norm,
    g.RMS_NORM: Norm,
    g.ACTIVATION: PassOn,
    g.ADD: Add,
    g.MUL: Product,
    g.DIV: Div,
    g.SCALE: Scale,
    g.MATMUL: Product,
    g.SOFTMAX: Softmax,
    g.ATTENTION: Attention,
    g.MAX_POOL: MaxPool,
    g.LINEAR_POOL: LinearPool,
    g.SELECT_TOKENS: Unchanged,
    g.LINEAR_MAP: AtPoint,
    g.BILINEAR: Bilinear,
    g.MAX_REDUCTION: AtPoint,
    g.REDUCTION: AtPoint,
    g.SHIFT: Unchanged,
    g.CHOICE: Choice,
    g.DECISION: Decision,
    g.REARRANGE: Rearrange,
    g.SPLIT: Split,
    g.SPLIT_OUTPUT: SplitOutput,
    g.GENERIC: PassOn,
}
