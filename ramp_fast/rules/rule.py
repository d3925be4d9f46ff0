"""What a rule is: the interface that the plan, the runtime and the engine know."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from ramp_fast.capture.passes import STANDARD
from ramp_fast.gemm import Precision
from ramp_fast.graph import Graph, Node
from ramp_fast.rules.base import Flow, Fusion, Operation, Values
from ramp_fast.rules.conservation import Conservation

Pass = Callable[[Graph], None]


class Rule(ABC):
    """How relevance is pulled back through every kind of operation.

    A rule is immutable. What it packs is shared between engines by the class of the operation that packs it and by that
    operation's ``parameters()``: options of the rule that packed weights depend on belong there.

    Attributes
    ----------
    conservation : type of Conservation
        What the rule keeps constant.
    seeds_are_coefficients : bool
        Whether a seed is multiplied by the logits to give their relevance, as a gradient's; otherwise it is their
        relevance.
    """

    conservation: ClassVar[type[Conservation]] = Conservation
    seeds_are_coefficients: ClassVar[bool] = False

    @property
    @abstractmethod
    def name(self) -> str:
        """Short name, as in ``Engine(model, rule=name)`` and tables."""

    def rewrites(self) -> Sequence[Pass]:
        """Passes over the captured graph, in order. They keep the function that the graph computes."""
        return STANDARD

    def for_graph(self, graph: Graph) -> Rule:
        """The rule for one network, of which it may decide something; by default itself."""
        return self

    def fuse(self, graph: Graph, precision: Precision) -> Mapping[Node, Fusion]:
        """What steps compute together; by default nothing is fused, which is always right."""
        return {}

    def check_precision(self, precision: str) -> None:
        """Raise a ValueError where the rule cannot be computed in a precision mode."""
        return None

    def check_balance(self) -> None:
        """Raise an InputError where sums of relevance before and after an operation say nothing."""
        return None

    @abstractmethod
    def start(self, seed: Tensor, logits: Tensor) -> Tensor:
        """Coefficients at the logits ``[maps, B, classes]`` of relevance ``seed`` (the same shape)."""

    def others(self, positive: Tensor, logits: Tensor) -> Tensor:
        """The seed of the classes to contrast with, for one-hot seeds ``positive`` ``[K, B, classes]``.

        By default all other classes alike.
        """
        return (1 - positive) / (logits.shape[-1] - 1)

    @abstractmethod
    def relevance(self, c: Tensor, x: Tensor) -> Tensor:
        """Relevance of ``x`` from its coefficients ``c`` ``[maps, *x.shape]``."""

    @abstractmethod
    def operation(self, node: Node, precision: Precision, fusion: Fusion) -> Operation:
        """The operation of ``node`` under this rule.

        Raises
        ------
        UnsupportedModelError
            The rule has no pull-back for this kind of operation.
        """

    def leave(self, operation: Operation, flow: Flow, values: Values, conservation: Any) -> Any:
        """The contribution of ``flow`` as it leaves an operation towards one of its operands."""
        return flow.contribution
