"""absLRP, relative absolute magnitude LRP, in coefficient form.

Source: Vukadin, Afrić, Šilić, Delač, "Advancing Attribution-Based Neural Network Explainability through
Relative Absolute Magnitude Layer-Wise Relevance Propagation and Multi-Component Evaluation", ACM TIST 15(3):47,
2024, arXiv 2412.09311. ``docs/rules.md`` derives every pull-back below from the general definition

    R = N(x * d/dx <f(x) + f_abs(|x|), R/|f|>)

with ``R = |x| c``: division and multiplication cancel, and coefficients ``c`` are pulled back like gradients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ramp_fast import graph as g
from ramp_fast._checks import flag, is_number
from ramp_fast.capture import passes
from ramp_fast.capture.linear_maps import fold_moved_rows, recognize_linear_maps
from ramp_fast.capture.token_slices import gate_token_selections, hoist_slices
from ramp_fast.errors import InputError
from ramp_fast.gemm import Precision
from ramp_fast.graph import Graph, Node
from ramp_fast.ops._common import divide
from ramp_fast.rules.attention import Attention, Softmax
from ramp_fast.rules.base import Flow, Fusion, Operation, Values
from ramp_fast.rules.conservation import Conservation
from ramp_fast.rules.diagonal import (
    Activation,
    BatchNorm,
    Div,
    FusedRelu,
    Generic,
    GroupNorm,
    LayerNorm,
    Relu,
    RmsNorm,
    Scale,
    SelectTokens,
    Shift,
)
from ramp_fast.rules.fusion import Options, fusions
from ramp_fast.rules.junctions import Add, Bilinear, Choice, Matmul, Mul
from ramp_fast.rules.masses import Massed, Masses, unit_mass
from ramp_fast.rules.pools import LinearMap, LinearPool, MaxPool, MaxReduction, Reduction
from ramp_fast.rules.rearrange import Decision, Join, Rearrange, Split, SplitOutput
from ramp_fast.rules.rule import Pass, Rule
from ramp_fast.rules.weighted import Conv, Linear

# Below this the stabilizer no longer tames the rounding of a reduced-precision forward pass.
_SMALLEST_FAST_STABILIZER = 0.05


@dataclass(frozen=True)
class RelativeStabilizer:
    """A stabilizer proportional to the spread of a sample's logits.

    Parameters
    ----------
    factor : float
        The stabilizer is ``factor * std(logits)`` of each sample. Between 0.05 and 0.2 it leaves the maps'
        meaning alone and takes away most of their sensitivity to rounding (docs/rules.md, "Precision").
    """

    factor: float = 0.1

    def __post_init__(self) -> None:
        if not (is_number(self.factor) and self.factor > 0):
            raise ValueError(f"RelativeStabilizer needs a positive factor, got {self.factor!r}")


@dataclass(frozen=True)
class AbsLRP(Rule):
    """The absLRP rule and its options.

    Parameters
    ----------
    stabilizer : float or RelativeStabilizer
        Added to the absolute value of the logits, the only division of the rule. 1e-9 as published.
    shares : {"kept", "equal"}
        At a junction (residual sum, attention product) each operand keeps the share of relevance it gets
        ("kept", the rule "abslrp"), or all operands are scaled to mass 1 ("equal", "abslrp-release": the
        published package's refactored release).
    maxpool : {"auto", "divided", "undivided"}
        Max-pooling sends ``c`` ("divided") or ``z c`` ("undivided") to the largest input. "auto", as published:
        divided for networks with residual sums, undivided for the others.
    fold_batchnorm : bool
        Fold BatchNorm into the convolution before it first (Guillemot et al. 2020, arXiv 2002.11018).
    """

    conservation: ClassVar[type[Conservation]] = Masses

    stabilizer: float | RelativeStabilizer = 1e-9
    shares: str = "kept"
    maxpool: str = "auto"
    fold_batchnorm: bool = False

    def __post_init__(self) -> None:
        if self.shares not in ("kept", "equal"):
            raise ValueError(f'shares must be "kept" or "equal", got {self.shares!r}')
        if self.maxpool not in ("auto", "divided", "undivided"):
            raise ValueError(f'maxpool must be "auto", "divided" or "undivided", got {self.maxpool!r}')
        own = isinstance(self.stabilizer, RelativeStabilizer)
        if not own and not (is_number(self.stabilizer) and self.stabilizer >= 0):  # type: ignore[operator]  # a number
            raise ValueError(f"stabilizer must be a number that is not negative, got {self.stabilizer!r}")
        flag("AbsLRP", "fold_batchnorm", self.fold_batchnorm)

    @property
    def name(self) -> str:
        """What Engine takes for these options, or the options."""
        names = {AbsLRP(): "abslrp", AbsLRP(shares="equal"): "abslrp-release"}
        return names.get(self, repr(self))

    def rewrites(self) -> Sequence[Pass]:
        """As :meth:`ramp_fast.rules.Rule.rewrites`: gates behind token selections, BatchNorm folded if asked for."""
        folded = (passes.fold_batchnorm,) if self.fold_batchnorm else ()
        return (
            passes.refuse_log_probabilities,
            *folded,
            *passes.RECOGNITIONS,
            recognize_linear_maps,
            gate_token_selections,
            hoist_slices,
            # With equal shares what is moved and what is turned have masses of their own.
            *((fold_moved_rows,) if self.shares == "kept" else ()),
        )

    def fuse(self, graph: Graph, precision: Precision) -> Mapping[Node, Fusion]:
        """As :meth:`ramp_fast.rules.Rule.fuse`."""
        return fusions(graph, Options(precision, self.shares == "kept", self.maxpool, self.gated_output))

    def check_precision(self, precision: str) -> None:
        """As :meth:`ramp_fast.rules.Rule.check_precision`: "fast" needs a relative stabilizer."""
        s = self.stabilizer
        if precision == "fast" and not (isinstance(s, RelativeStabilizer) and s.factor >= _SMALLEST_FAST_STABILIZER):
            raise ValueError(
                'precision="fast" computes the forward pass in reduced precision, and the division by near-zero logits '
                f"would amplify its rounding to errors of 40 % of a map: use a rule with a relative stabilizer of at "
                f"least {_SMALLEST_FAST_STABILIZER}, such as AbsLRP(stabilizer=RelativeStabilizer(0.1)); got {s!r}"
            )

    def check_balance(self) -> None:
        """As :meth:`ramp_fast.rules.Rule.check_balance`: there is nothing to compare."""
        raise InputError(
            f"check_conservation: {self.name} restores the mass of every image's relevance behind every operation; ask "
            "it of a signed rule, for example lrp-epsilon"
        )

    @property
    def gates_attention(self) -> bool:
        """Whether only positive head outputs, queries and keys carry relevance."""
        return self.shares == "kept"

    def start(self, seed: Tensor, logits: Tensor) -> Tensor:
        """Coefficients at the logits, ``seed / (|logit| + stabilizer)``; ``seed`` is ``[T, B, classes]``.

        A logit of exactly zero without stabilizer gets no relevance.
        """
        size = logits.abs()
        if isinstance(self.stabilizer, RelativeStabilizer):
            size = size + self.stabilizer.factor * logits.std(-1, keepdim=True, unbiased=False)
        else:
            size = size + self.stabilizer
        return divide(seed, size.expand_as(seed))

    def relevance(self, c: Tensor, x: Tensor) -> Tensor:
        """As :meth:`ramp_fast.rules.Rule.relevance`: ``|x| c``."""
        return x.abs() * c

    def operation(self, node: Node, precision: Precision, fusion: Fusion) -> Operation:
        """As :meth:`ramp_fast.rules.Rule.operation`."""
        kind: type[Operation] = TABLE[node.kind]
        if node.kind == g.REARRANGE and node.params.how in ("cat", "stack"):
            kind = Join
        elif node.kind == g.ACTIVATION and node.params.how == "relu":
            kind = Relu if fusion.fused_into is None else FusedRelu
        return kind(node, precision, fusion, self)

    def leave(self, operation: Operation, flow: Flow, values: Values, conservation: Masses) -> Massed:
        """As :meth:`ramp_fast.rules.Rule.leave`.

        With equal shares there is mass 1 below every operation but one that rearranges; below the last layers with
        weights, where classes are added, a difference that is rounding is none.
        """
        contribution: Massed = flow.contribution  # type: ignore[assignment]  # of this rule's conservation
        if self.shares == "equal" and operation.node.kind not in (g.REARRANGE, g.SPLIT, g.SPLIT_OUTPUT):
            contribution.target = unit_mass(contribution.target)
        if operation.fusion.adds_classes:
            contribution = conservation.without_rounding(contribution, values[flow.node], flow.node.batch)
        return contribution

    def gated_output(self, node: Node) -> bool:
        """Whether relevance of non-positive outputs of ``node`` is dropped by its own pull-back."""
        if node.kind == g.ATTENTION or (node.kind in (g.MATMUL, g.BILINEAR) and node.params.role == "attend"):
            return self.gates_attention
        return node.kind in (g.ACTIVATION, g.SELECT_TOKENS, g.MUL)


TABLE: dict[str, type[Operation]] = {
    g.LINEAR: Linear,
    g.CONV: Conv,
    g.BATCH_NORM: BatchNorm,
    g.LAYER_NORM: LayerNorm,
    g.GROUP_NORM: GroupNorm,
    g.RMS_NORM: RmsNorm,
    g.ACTIVATION: Activation,
    g.ADD: Add,
    g.MUL: Mul,
    g.DIV: Div,
    g.SCALE: Scale,
    g.MATMUL: Matmul,
    g.SOFTMAX: Softmax,
    g.ATTENTION: Attention,
    g.MAX_POOL: MaxPool,
    g.LINEAR_POOL: LinearPool,
    g.SELECT_TOKENS: SelectTokens,
    g.LINEAR_MAP: LinearMap,
    g.BILINEAR: Bilinear,
    g.MAX_REDUCTION: MaxReduction,
    g.REDUCTION: Reduction,
    g.SHIFT: Shift,
    g.CHOICE: Choice,
    g.DECISION: Decision,
    g.REARRANGE: Rearrange,
    g.SPLIT: Split,
    g.SPLIT_OUTPUT: SplitOutput,
    g.GENERIC: Generic,
}
