"""What rules and kernels need to know of a node besides its operands: a class for every kind that has something to say.

Tensors are nodes here, parameters or constants; ``None`` where the operation has none. Axes and sizes are those of one
batch. :data:`ramp_fast.graph.PARAMS` names the class of every
kind.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

Ref = Any  # a node of the graph

# Labels of the axes of every operand, and of the result, as an einsum would name them.
Labels = tuple[list[list[Any]], list[Any]]


@dataclass
class Params:
    """Of a kind that has nothing to say."""


@dataclass
class Leaf(Params):
    """A parameter or constant of the model, a value computed from constants, or a size.

    Attributes
    ----------
    tensor : Tensor or None
        Of a parameter, buffer or lifted constant.
    fqn : str
        Its name in the model.
    floating : bool
    more : int, float or bool
        Of a size: its value for one image more than the example has.
    read : bool
        Whether the captured graph depends on the values of this weight.
    literal : bool
        Whether the model makes this tensor of numbers in its code or attributes, in every forward pass.
    """

    tensor: torch.Tensor | None = None
    fqn: str = ""
    floating: bool = True
    more: Any = None
    read: bool = False
    literal: bool = False


@dataclass
class Linear(Params):
    """``x @ weight.T + bias``.

    Attributes
    ----------
    transposed : bool
        ``weight`` is ``[in, out]``.
    scale : Ref or None
        What the output is multiplied by, channel by channel.
    batch_norm : BatchNorm or None
        The BatchNorm behind it, where it was folded.
    """

    weight: Ref
    bias: Ref
    transposed: bool = False
    scale: Ref = None
    batch_norm: BatchNorm | None = None


@dataclass
class Conv(Params):
    """A convolution; ``scale`` and ``batch_norm`` as of :class:`Linear`."""

    weight: Ref
    bias: Ref
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int
    scale: Ref = None
    batch_norm: BatchNorm | None = None


@dataclass
class BatchNorm(Params):
    """``(x - mean) / sqrt(var + eps) * weight + bias``."""

    weight: Ref
    bias: Ref
    mean: Ref
    var: Ref
    eps: float


@dataclass
class LayerNorm(Params):
    """Over the last ``dims`` axes."""

    weight: Ref
    bias: Ref
    eps: float
    dims: int


@dataclass
class RmsNorm(Params):
    """Over the last ``dims`` axes."""

    weight: Ref
    eps: float | None
    dims: int


@dataclass
class GroupNorm(Params):
    """Over groups of channels."""

    weight: Ref
    bias: Ref
    eps: float
    groups: int


@dataclass
class Activation(Params):
    """A function of every entry.

    Attributes
    ----------
    how : {"relu", "smooth"}
        "relu": the output is the input where that is positive, up to ``cap``, and else 0.
    function : str
        ATen's name.
    """

    how: str
    function: str
    cap: float = math.inf


@dataclass
class Add(Params):
    """``signs[0] * first + signs[1] * second``, of nodes or numbers; ``scores``: on the way into a softmax."""

    first: Any
    second: Any
    signs: tuple[int, int]
    scores: bool = False


@dataclass
class Div(Params):
    """Division by ``denominator``, or (``inverse``) multiplication; ``number``: it is made of comparisons alone."""

    denominator: Ref
    inverse: bool
    number: bool


@dataclass
class Scale(Params):
    """Multiplication by a constant (node or number), or (``inverse``) division by it."""

    factor: Any
    inverse: bool


@dataclass
class Product(Params):
    """A product of two tensors of the images.

    Attributes
    ----------
    role : {"product", "scores", "attend"}
        In attention: ``Q K^T``, or weights times values.
    labels : Labels or None
        Of an einsum.
    """

    role: str = "product"
    labels: Labels | None = None


@dataclass
class Along(Params):
    """Along one axis."""

    dim: int


# A constant this low added to attention scores is a mask: it is left out of softmax(|S|) as -inf is.
MASK_BELOW = -99.0


@dataclass
class Attention(Params):
    """``softmax(scale Q K^T + mask) V``; ``grouped``: several heads of queries share one of keys and values.

    A mask of windows that lie side by side along the batch has one entry along its first axis for each of a sample's.
    """

    mask: Ref
    causal: bool
    scale: float
    grouped: bool


@dataclass
class MaxPool(Params):
    """As of ``torch.nn.functional.max_pool2d``."""

    kernel_size: Any
    stride: Any
    padding: Any
    dilation: Any
    ceil_mode: bool


@dataclass(frozen=True)
class Window:
    """Windows of an average pool, rows and columns.

    Attributes
    ----------
    counts_padding : bool
        Whether what lies beyond the image counts as pixels of value 0.
    """

    size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    counts_padding: bool

    def tiles(self, height: int, width: int) -> bool:
        """Whether windows lie side by side and cover all pixels."""
        beside = self.stride == self.size and self.padding == (0, 0)
        return beside and height % self.size[0] == 0 and width % self.size[1] == 0


@dataclass
class LinearPool(Params):
    """Means, sums and average pools.

    Attributes
    ----------
    how : {"mean", "sum", "vjp"}
        "vjp": some other linear function with weights that are not negative.
    dims : list of int or None
        Axes that are reduced, of means and sums.
    window : Window or None
        Of an average pool of images; no window reaches beyond the padding.
    """

    how: str
    dims: list[int] | None = None
    keepdim: bool = False
    labels: Labels | None = None
    window: Window | None = None


@dataclass
class Reduction(Params):
    """What several entries become one by, or a function of axes."""

    labels: Labels | None = None


@dataclass
class LinearMap(Params):
    """A linear function with constant weights of both signs.

    Attributes
    ----------
    dim, first : int
        Rows before ``first`` along an axis are moved as they are, as rotary embeddings do with class tokens.
    """

    labels: Labels | None = None
    dim: int = 0
    first: int = 0


@dataclass
class Rearrange(Params):
    """Values that go elsewhere.

    Attributes
    ----------
    how : {"reshape", "permute", "slice", "select", "expand", "cat", "stack", "vjp", "same"}
        "vjp": gathers, pads, masks and others that are pulled back by autograd. "same": what it reads, for what is
        read of an inner layer.
    dim, start, end, step, index, dims
        Arguments of the operation of that name.
    pads : bool
        Values may be zeros that belong to no sample.
    masks : bool
        A mask decides which values go on.
    """

    how: str
    dim: int = 0
    start: Any = None
    end: Any = None
    step: int = 1
    index: int = 0
    dims: list[int] | None = None
    pads: bool = False
    masks: bool = False


@dataclass
class Split(Params):
    """``unbind``, ``split`` or ``chunk`` along an axis."""

    how: str
    dim: int


@dataclass
class SplitOutput(Params):
    """Which one it is."""

    index: int
