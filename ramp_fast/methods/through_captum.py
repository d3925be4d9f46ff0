"""Methods computed by captum, an optional package: what it returns, without its traps.

Captum draws noise from the global random state, mixes the images of a batch in one draw, evaluates all steps at once
unless told otherwise, and averages the wrong dimension of tokens in Grad-CAM.
"""

from __future__ import annotations

import importlib
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ramp_fast._checks import positive
from ramp_fast.errors import InputError, RampFastError, UnsupportedModelError
from ramp_fast.explainer import logits_of
from ramp_fast.methods.base import checked, checked_seed, one_by_one, seed_of, token_grid, upsampled

# Layers that Grad-CAM has chosen, by the shape of an image. Names, not modules: those would keep their model alive.
_CHOSEN: weakref.WeakKeyDictionary[nn.Module, dict[torch.Size, str]] = weakref.WeakKeyDictionary()


def captum_attr() -> Any:
    """The module ``captum.attr``.

    Raises
    ------
    RampFastError
        Captum is not installed.
    """
    try:
        return importlib.import_module("captum.attr")
    except ImportError as error:
        raise RampFastError(f"this needs captum ({error}): pip install 'ramp_fast[captum]'") from error


class _OneByOne:
    """What methods share that explain one image after another, so that maps do not depend on their batch."""

    __name__: ClassVar[str]

    def __call__(self, model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
        """Maps ``[N, C, H, W]``, of occlusion ``[N, 1, H, W]``; arguments and errors as for :func:`gradient`."""
        images, target = checked(self.__name__, model, images, target)
        method = self._method(model)
        with images.device:  # captum makes tensors on the default one
            maps = [self._map(method, image, label) for image, label in one_by_one(images, target)]
        return torch.cat(maps).detach().to(images)  # captum's occlusion is float32

    def _method(self, model: nn.Module) -> Any:
        """Captum's."""
        raise NotImplementedError

    def _map(self, method: Any, image: Tensor, label: Tensor) -> Tensor:
        """Of one image ``[1, C, H, W]``."""
        raise NotImplementedError


@dataclass(frozen=True)
class IntegratedGradients(_OneByOne):
    """Integrated gradients (Sundararajan et al. 2017, arXiv 1703.01365) from a constant picture.

    Parameters
    ----------
    steps : int
        Of the Gauss-Legendre rule along the path.
    baseline : float
        Value of every pixel at the path's beginning, in the model's normalised input: 0 is the mean colour.
    batch_size : int
        Steps that go through the model at a time. Images go one by one, so that maps do not depend on their batch.

    Raises
    ------
    InputError
        A setting is not as described.
    RampFastError
        Captum is not installed.
    """

    __name__: ClassVar[str] = "integrated_gradients"
    steps: int = 50
    baseline: float = 0.0
    batch_size: int = 16

    def __post_init__(self) -> None:
        positive(self.__name__, "steps", self.steps)
        positive(self.__name__, "batch_size", self.batch_size)
        _number(self.__name__, "baseline", self.baseline)
        captum_attr()

    def _method(self, model: nn.Module) -> Any:
        return captum_attr().IntegratedGradients(partial(logits_of, model))

    def _map(self, method: Any, image: Tensor, label: Tensor) -> Tensor:
        return method.attribute(  # type: ignore[no-any-return]
            image,
            baselines=float(self.baseline),
            target=label,
            n_steps=self.steps,
            internal_batch_size=self.batch_size,
        )


@dataclass(frozen=True)
class SmoothGrad(_OneByOne):
    """SmoothGrad (Smilkov et al. 2017, arXiv 1706.03825): the mean signed gradient over noisy copies of an image.

    Noise is a function of the seed and the image's values, on one kind of device; the caller's random state is left as
    it was.

    Parameters
    ----------
    samples : int
        Copies of each image.
    noise : float
        Standard deviation as a share of the image's range (its largest value minus its smallest), above 0; the paper
        advises 0.1 to 0.2.
    batch_size : int
        Copies that go through the model at a time. Images go one by one, so that maps do not depend on their batch.
    seed : int
        Of the noise.

    Raises
    ------
    InputError
        A setting is not as described.
    RampFastError
        Captum is not installed.
    """

    __name__: ClassVar[str] = "smoothgrad"
    samples: int = 25
    noise: float = 0.15
    batch_size: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        positive(self.__name__, "samples", self.samples)
        positive(self.__name__, "batch_size", self.batch_size)
        _number(self.__name__, "noise", self.noise)
        if not self.noise > 0:
            raise InputError(f"{self.__name__}: noise must be above 0, got {self.noise!r}")
        checked_seed(self.__name__, self.seed)
        captum_attr()

    def _method(self, model: nn.Module) -> Any:
        attr = captum_attr()
        return attr.NoiseTunnel(attr.Saliency(partial(logits_of, model)))

    def _map(self, method: Any, image: Tensor, label: Tensor) -> Tensor:
        with _seeded(seed_of(image[0], self.seed), image.device):
            return method.attribute(  # type: ignore[no-any-return]
                image,
                nt_type="smoothgrad",
                nt_samples=self.samples,
                nt_samples_batch_size=self.batch_size,
                stdevs=self.noise * float(image.max() - image.min()),
                target=label,
                abs=False,
            )


@dataclass(frozen=True)
class Occlusion(_OneByOne):
    """How much the target logit falls when a window is covered (Zeiler & Fergus 2014, arXiv 1311.2901).

    Windows that reach over the border are cut there; a pixel gets the mean over the windows that cover it.

    Parameters
    ----------
    window : int, optional
        Side of the square, in pixels; by default a seventh of the image's shorter side.
    stride : int, optional
        From window to window, at most ``window``; by default half of it. An image takes about ``(H / stride) *
        (W / stride)`` forward passes.
    baseline : float
        What covers, in the model's normalised input: 0 is the mean colour.
    batch_size : int
        Windows that go through the model at a time. Images go one by one, so that maps do not depend on their batch.

    Raises
    ------
    InputError
        A setting is not as described.
    RampFastError
        Captum is not installed.
    """

    __name__: ClassVar[str] = "occlusion"
    window: int | None = None
    stride: int | None = None
    baseline: float = 0.0
    batch_size: int = 16

    def __post_init__(self) -> None:
        for setting in ("window", "stride"):
            if getattr(self, setting) is not None:
                positive(self.__name__, setting, getattr(self, setting))
        if self.window is not None and self.stride is not None and self.stride > self.window:
            raise InputError(
                f"{self.__name__}: stride {self.stride} is larger than window {self.window}: pixels would be left out"
            )
        positive(self.__name__, "batch_size", self.batch_size)
        _number(self.__name__, "baseline", self.baseline)
        captum_attr()

    def _method(self, model: nn.Module) -> Any:
        return captum_attr().Occlusion(partial(logits_of, model))

    def _map(self, method: Any, image: Tensor, label: Tensor) -> Tensor:
        channels, height, width = image.shape[1:]
        window = self.window or max(1, min(height, width) // 7)
        stride = self.stride or max(1, window // 2)
        if window > min(height, width) or stride > window:
            raise InputError(
                f"{self.__name__}: window {window}, stride {stride} for images of {height} x {width}: a window must "
                "fit into the image, and a stride into the window"
            )
        found: Tensor = method.attribute(
            image,
            sliding_window_shapes=(channels, window, window),
            strides=(channels, stride, stride),
            baselines=float(self.baseline),
            target=label,
            perturbations_per_eval=self.batch_size,
        )
        return found[:, :1]  # a window covers all channels: each has the same map


@dataclass(frozen=True)
class GradCAM:
    """Grad-CAM (Selvaraju et al. 2017, arXiv 1610.02391), bilinear at the images' size.

    Parameters
    ----------
    layer : str, optional
        Name of the module whose output is taken, ``[N, C, h, w]`` (``[N, h, w, C]`` where a timm model says
        ``output_fmt = "NHWC"``) or tokens ``[N, T, C]``. By default the last feature map of a convolutional network,
        and of a transformer the first norm of its last block: its final norm knows nothing of other tokens than the
        class token.
    relu : bool
        Keep only what speaks for the class, as the paper does.

    Raises
    ------
    InputError
        A setting is not as described.
    RampFastError
        Captum is not installed.
    """

    __name__: ClassVar[str] = "gradcam"
    layer: str | None = None
    relu: bool = True

    def __post_init__(self) -> None:
        if self.layer is not None and not isinstance(self.layer, str):
            raise InputError(f"{self.__name__}: layer must be the name of a module, got {type(self.layer).__name__}")
        captum_attr()

    def __call__(self, model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
        """Maps ``[N, 1, H, W]``; arguments and errors as for :func:`gradient`.

        Raises
        ------
        UnsupportedModelError
            The model has no such layer, or no layer can be chosen for it, or its output is not a feature map.
        """
        images, target = checked(self.__name__, model, images, target)
        size = images.shape[2:]
        layer = self._layer(model, images[:1])
        through = _ThroughGrid(model, layer, size)
        attr = captum_attr()
        maps = attr.LayerGradCam(through, through.grid).attribute(
            images, target=target, relu_attributions=bool(self.relu)
        )
        return upsampled(maps.detach(), size)

    def _layer(self, model: nn.Module, image: Tensor) -> str:
        if self.layer is not None:
            if self.layer not in dict(model.named_modules()):
                raise UnsupportedModelError(
                    f"{self.__name__}: {type(model).__name__} has no module {self.layer!r}; model.named_modules() has "
                    "the names"
                )
            return self.layer
        known = _CHOSEN.setdefault(model, {})
        if image.shape not in known:
            known[image.shape] = feature_layer(model, image)
        return known[image.shape]


def feature_layer(model: nn.Module, image: Tensor) -> str:
    """The module whose output Grad-CAM takes; it costs a forward pass of one image ``[1, C, H, W]``.

    Raises
    ------
    UnsupportedModelError
        The model ends in tokens whose layout is not known, or has no feature map of more than one position.
    """
    blocks: Any = getattr(model, "blocks", None)
    ends: list[nn.Module] = []  # the last block and its first norm
    if isinstance(blocks, (nn.ModuleList, nn.Sequential)) and len(blocks):
        ends = [blocks[-1], getattr(blocks[-1], "norm1", blocks[-1])]
    found: list[tuple[str, int]] = []  # names of feature maps (4) and tokens (3), in the order they are made
    arrived: dict[nn.Module, Any] = {}  # what the ends were given
    channels_last = _channels_last(model)

    def receive(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if inputs:
            arrived[module] = inputs[0]

    def note(name: str, output: Any) -> None:
        if not isinstance(output, Tensor):
            return
        if output.dim() == 4 and _positions(output, channels_last) > 1:
            found.append((name, 4))
        elif output.dim() == 3 and output.shape[1] > 1:
            found.append((name, 3))

    handles = []
    try:
        for name, module in model.named_modules():
            if module in ends:
                handles.append(module.register_forward_pre_hook(receive))
            handles.append(module.register_forward_hook(lambda _, __, output, name=name: note(name, output)))
        with torch.no_grad():
            model(image)
    finally:
        for handle in handles:
            handle.remove()
    # A norm behind the attention (post-norm blocks) holds a branch, not the tokens.
    if len({*ends} & {*arrived}) == 2 and arrived[ends[0]] is arrived[ends[1]]:
        return f"blocks.{len(blocks) - 1}.norm1"
    name, kind = found[-1] if found else ("", 0)
    if kind == 4:
        return name
    if kind == 3:
        raise UnsupportedModelError(
            f"gradcam: {type(model).__name__} ends in tokens (module {name!r}): pass layer=, the name of a module "
            "whose tokens still reach the classifier, such as the first norm of the last block"
        )
    raise UnsupportedModelError(
        f"gradcam: no module of {type(model).__name__} returns a feature map of more than one position for images of "
        f"{image.shape[2]} x {image.shape[3]}: use larger images or another method"
    )


class _ThroughGrid(nn.Module):
    """A model whose chosen layer's output passes as ``[N, C, h, w]`` through ``grid``, which captum watches.

    Captum's Grad-CAM averages gradients over all dimensions behind the second and sums over the second, which is right
    for this layout only.
    """

    def __init__(self, model: nn.Module, layer: str, size: torch.Size) -> None:
        super().__init__()
        self.model, self.layer, self.size = model, layer, size
        self.grid = nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        handle = self.model.get_submodule(self.layer).register_forward_hook(self._pass)
        try:
            logits = logits_of(self.model, images)
        finally:
            handle.remove()
        return logits

    def _pass(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Tensor:
        if isinstance(output, Tensor) and output.dim() == 4:
            if _channels_last(self.model):
                return self._watched(output.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            return self._watched(output)
        if isinstance(output, Tensor) and output.dim() == 3:
            before, rows, columns = token_grid(self.model, output.shape[1], self.size)
            picture = output[:, before:].transpose(1, 2).unflatten(2, (rows, columns))
            return torch.cat([output[:, :before], self._watched(picture).flatten(2).transpose(1, 2)], 1)
        what = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise UnsupportedModelError(
            f"gradcam: module {self.layer!r} returns {what}; a feature map [N, C, h, w] or tokens [N, T, C] are needed"
        )

    def _watched(self, picture: Tensor) -> Tensor:
        watched: Tensor = self.grid(picture)
        return watched


def _channels_last(model: nn.Module) -> bool:
    return getattr(model, "output_fmt", None) == "NHWC"


def _positions(output: Tensor, channels_last: bool) -> int:
    return output.shape[1] * output.shape[2] if channels_last else output.shape[2] * output.shape[3]


def _number(name: str, setting: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < float("inf"):
        raise InputError(f"{name}: {setting} must be a finite number, got {value!r}")


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """The random state of the CPU and of a CUDA ``device`` begun with ``seed``, and afterwards what it was."""
    cuda = device.type == "cuda"
    with torch.random.fork_rng([device] if cuda else [], device_type="cuda"):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed every device
        if cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
