"""What every metric shares: the frame of ``update``, values of images as they come in, their mean and its error."""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from ramp_fast._checks import finite_samples, positive
from ramp_fast.capture.model_checks import in_training
from ramp_fast.errors import InputError, RampFastError
from ramp_fast.explainer import Explainer, Method, Model, logits_of, method_name, module_of
from ramp_fast.runtime.heap import keep_freed_memory

# Images that a metric makes at a time (masked copies, perturbed images) take about this many bytes, unless
# ``batch_size`` says how many go through the model together. On CPUs that is eight images of 224 x 224: with more of
# them ViTs are as fast, and ResNets slower.
_MEMORY = {"cpu": 5 << 20, "cuda": 256 << 20}


M = TypeVar("M", bound="Metric")


class MethodError(RampFastError):
    """A method under test raised an error; the message names the metric, the method and the batch."""


@dataclass(frozen=True)
class Result:
    """What :meth:`Metric.compute` returns.

    Attributes
    ----------
    name : str
        Of the metric.
    values : dict of str to Tensor [n, ...]
        The metric by its name ``[n]`` and its components (curves ``[n, S]``), an entry per image (or group of images),
        float64 on the CPU. An entry is NaN where the metric is not defined for an image.
    """

    name: str
    values: dict[str, Tensor]

    @property
    def count(self) -> int:
        """Entries that are not NaN."""
        return int(self._defined.numel())

    @property
    def mean(self) -> float:
        """The mean over entries, NaN where there are none."""
        return float(self._defined.mean())

    @property
    def standard_error(self) -> float:
        """Of the mean, ``std / sqrt(n)`` with the sample's standard deviation; NaN for fewer than two entries."""
        return float(self._defined.std()) / math.sqrt(self.count) if self.count > 1 else math.nan

    @property
    def confidence_interval(self) -> tuple[float, float]:
        """95 % confidence interval of the mean: ``mean ± t * standard_error``; NaN for fewer than two entries.

        t is the 97.5 % quantile of Student's distribution with ``count - 1`` degrees of freedom. It takes entries as
        independent; for few of them of a lopsided distribution it is a rough one, and may reach beyond the metric's
        range. Nothing is drawn, so that it is the same for every seed, and of a million images as quick as of ten.
        """
        if self.count < 2:
            return math.nan, math.nan
        reach = student_quantile(self.count - 1) * self.standard_error
        return self.mean - reach, self.mean + reach

    @property
    def _defined(self) -> Tensor:
        values = self.values[self.name]
        return values[~values.isnan()]

    def __str__(self) -> str:
        return f"{self.name} {self.mean:.4f} +- {self.standard_error:.4f} (n = {self.count})"


_NORMAL_QUANTILE = 1.959963984540054


def student_quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's t distribution with so many degrees of freedom, to 0.15 %.

    Abramowitz and Stegun 26.7.5, of four terms, from three degrees on; in closed form below.
    """
    if freedom == 1:
        return math.tan(0.475 * math.pi)
    if freedom == 2:
        return 0.95 * math.sqrt(2 / (1 - 0.95**2))
    z = _NORMAL_QUANTILE
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / float(freedom**power) for power, term in enumerate(terms, 1))


class MetricInputs:
    """What a metric measures: images of one ``update``, checked.

    Maps, logits and predicted classes are computed when they are first asked for.

    Attributes
    ----------
    images : Tensor [N, C, H, W]
        On the model's device.
    masks : bool Tensor [N, 1, H, W] or None
        Where the object is.
    numbers : range
        Of the images, counted since the metric began: what random draws are seeded with.
    """

    def __init__(
        self,
        metric: Metric,
        images: Tensor,
        target: Tensor | None,
        method: Method | Explainer | None,
        maps: Tensor | None = None,
        masks: Tensor | None = None,
    ) -> None:
        self._metric, self._method, self._maps, self._target = metric, method, maps, target
        self.images, self.masks = images, masks
        first = metric.first_image + metric.images_seen
        self.numbers = range(first, first + images.shape[0])

    @cached_property
    def target(self) -> Tensor:
        """The classes explained, ``[N]``."""
        return self.logits.argmax(1) if self._target is None else self._target

    @cached_property
    def logits(self) -> Tensor:
        """The model's, ``[N, classes]``."""
        return self._metric.logits(self.images)

    @property
    def maps(self) -> Tensor:
        """The method's maps of the images, ``[N, C or 1, H, W]``, finite, float32 or better."""
        if self._maps is None:
            self._maps = self.attribute(self.images, self.target)
        return self._maps

    @property
    def scores(self) -> Tensor:
        """The maps summed over channels, ``[N, H, W]``."""
        return self.maps.sum(1)

    def attribute(self, images: Tensor, target: Tensor, model: nn.Module | None = None) -> Tensor:
        """Maps ``[M, C or 1, H, W]`` of the method under test for other images, classes, or of another model."""
        return self._metric.attribute(self._method, images, target, model)


class Metric:
    """Measures maps of a method, batch by batch.

    A subclass has a ``name``, says whether higher is better, and computes the values of a :class:`MetricInputs` in
    :meth:`measure`. Values stay on the device they were computed on until :meth:`compute`.

    Parameters
    ----------
    model : torch.nn.Module or Engine
        A classifier in eval mode, ``[N, C, H, W]`` to logits ``[N, classes]``. It is left as it is. On CPUs
        :meth:`ramp_fast.Engine.logits` takes the place of the forward pass of an engine's model: faster, equal but for
        rounding. (Not under precision "fast", nor for float64 images under another one than "float64".)
    seed : int
        Of random draws. Image n of a metric always gets the same ones, whatever batch it comes in.
    batch_size : int, optional
        Images that go through the model, or the method, at a time; by default as many as a memory budget allows.
        Results do not depend on it.
    """

    name: ClassVar[str]
    higher_is_better: ClassVar[bool]
    needs_masks: ClassVar[bool] = False
    uses_maps: ClassVar[bool] = True
    """Whether it looks at the maps of the images themselves, which several metrics can share."""
    asks_method: ClassVar[bool] = False
    """Whether it asks the method for further maps, of other images, classes or models, beside those of the images."""
    compares_images: ClassVar[bool] = False
    """Whether the value of an image depends on the other images, so that it is known at the end only."""
    group: ClassVar[int] = 1
    """How many images belong together: ``update`` takes multiples of this."""

    def __init__(self, model: Model, *, seed: int = 0, batch_size: int | None = None) -> None:
        self.engine = model if isinstance(model, Explainer) else None
        model = module_of(model)
        if not isinstance(model, nn.Module):
            raise TypeError(f"{self.name}: model must be a torch.nn.Module or an Engine, got {type(model).__name__}")
        if batch_size is not None:
            positive(self.name, "batch_size", batch_size)
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise InputError(f"{self.name}: seed must be an integer, got {seed!r}")
        self.model, self.seed, self.batch_size = model, seed, batch_size
        self._values: list[dict[str, Tensor]] = []
        self.first_image = self.images_seen = 0
        self._batches = 0
        self._classes: int | None = None
        self._noticed: list[str] = []  # shared with copies: what is said of a model is said once
        self.contrast: str | None = None

    def settings(self) -> dict[str, Any]:
        """What two states must agree in to be merged: plain JSON values."""
        return {"metric": self.name, "seed": self.seed}

    def axis(self) -> dict[str, Any] | None:
        """What its curves are drawn over: "label", "values" [S] and "curves", the names of them; None without."""
        return None

    def measure(self, sample: MetricInputs, **options: Any) -> dict[str, Tensor]:
        """The metric by its name ``[N]`` (``[N / group]``), and components ``[N, ...]``."""
        raise NotImplementedError

    def update(
        self,
        images: Tensor,
        target: int | Tensor | None,
        method: Method | Explainer | None,
        *,
        maps: Tensor | None = None,
        masks: Tensor | None = None,
        **options: Any,
    ) -> dict[str, Tensor]:
        """Add images.

        Parameters
        ----------
        images : Tensor [N, C, H, W]
            Preprocessed for the model.
        target : int, integer Tensor [N] or None
            The classes to explain; None: the predicted ones.
        method : callable, Engine or None
            ``(model, images, target) -> maps`` ``[N, C or 1, H, W]``. None where ``maps`` says it all.
        maps : Tensor [N, C or 1, H, W], optional
            The method's maps of these images, where they are known already.
        masks : bool Tensor [N, H, W] or [N, 1, H, W], optional
            Where the object is; metrics of localisation need them.
        **options
            Of this metric: see its class.

        Returns
        -------
        dict of str to Tensor [N, ...]
            Of these images: the metric by its name, and its components.

        Raises
        ------
        InputError
            An argument is not as described, or maps have another shape or are not finite.
        MethodError
            The method raised an error.
        UnsupportedModelError
            The metric is one of an engine, and that does not take the model as it is now.

        Nothing is added in any of these cases.
        """
        for option in options:
            if option not in inspect.signature(self.measure).parameters:
                raise InputError(f"{self.name}: update has no option {option!r}")
        images, target = self._checked(images, target)
        if images.device.type == "cpu":
            keep_freed_memory()
        if masks is None and self.needs_masks:
            raise InputError(f"{self.name} needs masks [N, H, W] of the objects")
        if masks is not None:
            masks = checked_masks(self.name, masks, images)
        if maps is not None:
            maps = checked_maps(maps, images, self.name, "the caller", self._batches)
        measured = self.measure(MetricInputs(self, images, target, method, maps, masks), **options)
        values = {name: v.detach() for name, v in measured.items()}
        self._add(values, images.shape[0])
        return values

    def fresh(self: M, first_image: int = 0) -> M:
        """A metric of the same settings without values.

        Parameters
        ----------
        first_image : int
            The number of its first image. Processes that share a data set draw what one process would if each starts at
            the first image of its part.
        """
        other = copy.copy(self)
        other.first_image = first_image
        other._values, other.images_seen, other._batches = [], 0, 0
        return other

    def belong_together(self, noticed: list[str], contrast: str | None) -> None:
        """Share with other metrics of the model what has been said of it, and the contrast of engines' maps."""
        self._noticed, self.contrast = noticed, contrast

    def compute(self) -> Result:
        """All values so far.

        Raises
        ------
        RuntimeError
            Nothing has been added yet.
        """
        if not self._values:
            raise RuntimeError(f"{self.name} has no values yet: call update first")
        names = self._values[0]
        return Result(self.name, {n: torch.cat([v[n].double().cpu() for v in self._values]) for n in names})

    def state_dict(self) -> dict[str, Any]:
        """Settings and values, for ``torch.save``."""
        return {
            "settings": self.settings(),
            "values": self.compute().values if self._values else {},
            "images": self.images_seen,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace the values by those of a state; settings must be the same, or nothing changes."""
        before = self._values, self.images_seen, self._batches
        self._values, self.images_seen, self._batches = [], 0, 0
        try:
            self.merge_state(state)
        except BaseException:
            self._values, self.images_seen, self._batches = before
            raise

    def merge_state(self, state: dict[str, Any]) -> None:
        """Add the values of a state, of another process for example.

        Raises
        ------
        InputError
            It comes from other settings. Nothing has been added then.
        """
        if state["settings"] != self.settings():
            raise InputError(f"{self.name}: a state with {state['settings']} does not fit into {self.settings()}")
        if state["values"]:
            self._add(state["values"], state["images"])

    def _add(self, values: dict[str, Tensor], images: int) -> None:
        self._values.append(values)
        self.images_seen += images
        self._batches += 1

    def _checked(self, images: Tensor, target: int | Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Both on the model's device."""
        images, target = checked_images(self.name, self.model, images, target)
        if images.shape[0] % self.group:
            raise InputError(f"{self.name}: images come in groups of {self.group}, got {images.shape[0]}")
        if target is not None:
            check_classes(self.name, target, self.classes(images))
        return images, target

    def attribute(
        self, method: Method | Explainer | None, images: Tensor, target: Tensor, model: nn.Module | None = None
    ) -> Tensor:
        """Maps ``[N, C or 1, H, W]`` of a method, checked; so many images at a time as go through the model together.

        Raises
        ------
        InputError
            The maps have another shape or are not finite.
        MethodError
            The method raised an error. Both messages name metric, method and batch.
        """
        if method is None:
            raise InputError(f"{self.name} asks the method for maps of its own: pass one, not only maps")
        if isinstance(method, Explainer) and method.model is not self.model:
            raise InputError(f"{self.name}: the engine is one of another model than the metric")
        if isinstance(method, Explainer) and model is not None:
            method = method.for_model(model)
        model = model or self.model
        contrast = self.contrast
        if contrast is None and isinstance(method, Explainer):  # a single logit has no others to be contrasted with
            contrast = "none" if self.classes(images) == 1 else "others"
        pieces = []
        for here in self.slices(images):
            try:
                if isinstance(method, Explainer):
                    maps = method.attribute(images[here], target[here], contrast or "others").maps
                else:
                    maps = method(model, images[here].clone(), target[here].clone())  # which it may write to
            except Exception as error:
                raise MethodError(
                    f"{self.name}: {method_name(method)} failed in batch {self._batches}, on images "
                    f"{list(images[here].shape)}: {type(error).__name__}: {error}"
                ) from error
            pieces.append(checked_maps(maps, images[here], self.name, method_name(method), self._batches))
        return torch.cat(pieces)

    def logits(self, images: Tensor, model: nn.Module | None = None) -> Tensor:
        """``[N, classes]``, so many images at a time as go through the model together.

        Raises
        ------
        InputError
            They are not finite: comparisons would turn them into values that look like any other. Or the model returns
            something else than ``[N, classes]``.
        """
        with torch.no_grad():
            found = torch.cat(
                [
                    self.answer(images[here]) if model is None else logits_of(model, images[here])
                    for here in self.slices(images)
                ]
            )
        return self.finite(found)

    def answer(self, images: Tensor) -> Tensor:
        """``logits_of`` of the metric's model or engine."""
        return logits_of(self.engine or self.model, images)

    def classes(self, images: Tensor) -> int:
        """How many logits the model has; the first time, one of the images goes through it."""
        if self._classes is None:
            self._classes = self.logits(images[:1]).shape[1]
        return self._classes

    def probabilities(self, images: Tensor, logits: Tensor) -> Tensor:
        """Of logits ``[..., classes]``, in float32 or better: their softmax, of a single one the sigmoid."""
        self._warn_of_probabilities(images, logits)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits.sigmoid() if logits.shape[-1] == 1 else logits.softmax(-1)

    def predictions(self, images: Tensor, logits: Tensor) -> Tensor:
        """Predicted classes of logits ``[..., classes]``; of a single one 0, and -1 where it is not positive."""
        if logits.shape[-1] > 1:
            return logits.argmax(-1)
        self._warn_of_probabilities(images, logits)
        return (logits[..., 0] > 0).long() - 1

    def _warn_of_probabilities(self, images: Tensor, logits: Tensor) -> None:
        """Say once that what should be logits look like probabilities; ``images`` are any of the model's."""
        if self._noticed:
            return
        self._noticed.append(self.name)
        seen = squashing(self.model, images, logits)
        if seen is None:
            return
        kind = type(self.model).__name__
        if seen in _SQUASHES:
            what, then = (
                f"{kind} returns probabilities, its last operation is a {seen}",
                f"Evaluate it without its {seen}",
            )
        else:
            what, then = f"of {kind} {seen}, as of probabilities", "If they are, evaluate the scores below them"
        warnings.warn(
            f"{self.name}: {what}: metrics take logits, and squash these a second time, which flattens curves. {then} "
            "(or with output='logit', where a metric has it: the output as it is)",
            RuntimeWarning,
            stacklevel=2,
        )

    def finite(self, logits: Tensor) -> Tensor:
        """Logits ``[..., classes]`` as they are, or InputError where some are not finite."""
        wrong = int((~finite_samples(logits.flatten(0, -2))).sum())
        if wrong:
            raise InputError(
                f"{self.name}: logits of {wrong} of {logits[..., 0].numel()} images are not finite in batch "
                f"{self._batches}: is the model's precision ({logits.dtype}) enough?"
            )
        return logits

    def slices(self, images: Tensor) -> Iterator[slice]:
        """Ranges of images that go through the model together."""
        size = self.together(images)
        return (slice(start, start + size) for start in range(0, images.shape[0], size))

    def together(self, images: Tensor) -> int:
        """How many images go through the model at a time."""
        if self.batch_size is not None:
            return self.batch_size
        budget = _MEMORY.get(images.device.type, _MEMORY["cuda"])
        return max(1, budget // max(1, images[0].numel() * images.element_size()))

    def generator(self, number: int, stream: int = 0) -> torch.Generator:
        """Random numbers of image ``number`` (on the CPU, so that every device gets the same).

        ``stream`` tells apart draws for different purposes.
        """
        return torch.Generator().manual_seed(_mixed(self.seed, number, stream))


def squashing(model: nn.Module, images: Tensor, outputs: Tensor) -> str | None:
    """What tells that outputs ``[..., classes]`` of a model are probabilities; None where they pass for logits.

    "softmax" or "sigmoid" where that is the model's last operation. Otherwise what has been seen of them, in words:
    four or more that all lie between 0 and 1 and are not all 0, or fewer that add up to 1, unless a linear layer or a
    ReLU is last.

    Parameters
    ----------
    model : torch.nn.Module
    images : Tensor [N, C, H, W]
        One of them goes through the model again where all outputs are in [0, 1], to see which operation is its last.
    outputs : Tensor [..., classes]
        Of any images.
    """
    if not outputs.numel() or not bool(((outputs >= 0) & (outputs <= 1)).all()):
        return None
    with torch.enable_grad():
        last = model(images[:1].clone().requires_grad_().clone()).grad_fn  # which the model may write to
    while last is not None and last.name().startswith(_VIEWS):
        last = last.next_functions[0][0]
    name = "" if last is None else last.name()
    for how in _SQUASHES:
        if name.startswith(f"{how.capitalize()}Backward"):
            return how
    if name.startswith(_HEADS):
        return None
    near = 1e-3 if torch.finfo(outputs.dtype).eps < 1e-5 else 2e-2  # rounding of many classes in half precision
    if outputs.shape[-1] > 1 and bool(((outputs.double().sum(-1) - 1).abs() < near).all()):
        return "every output lies between 0 and 1, and those of each image add up to 1"
    few = outputs.numel() < 4  # logits that are there by chance
    return None if few or not bool(outputs.any()) else "every output lies between 0 and 1"


_SQUASHES = ("sigmoid", "softmax")
_HEADS = ("Addmm", "Relu")  # autograd's names for what ends in logits, small as they may be

# The beginnings of autograd's names for operations that only arrange values.
_VIEWS = ("View", "UnsafeView", "Reshape", "Squeeze", "Unsqueeze", "Alias", "Clone", "ToCopy", "Transpose", "TBackward")


def _mixed(*numbers: int) -> int:
    """One seed of several numbers, so that neighbours share no stream (splitmix64)."""
    state = 0
    for number in numbers:
        state = (state ^ (number & 0xFFFFFFFFFFFFFFFF)) + 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1  # torch takes 63 bits


def checked_images(
    name: str, model: nn.Module, images: Tensor, target: int | Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Images ``[N, C, H, W]`` and integer classes ``[N]`` or None, on the device of a model in eval mode.

    Raises
    ------
    InputError
        An argument is not as described; the message begins with ``name``.
    """
    if not isinstance(images, Tensor) or images.dim() != 4 or not images.is_floating_point():
        found = f"{list(images.shape)}, {images.dtype}" if isinstance(images, Tensor) else type(images).__name__
        raise InputError(f"{name}: images must be a floating point Tensor [N, C, H, W], got {found}")
    count = images.shape[0]
    if count < 1:
        raise InputError(f"{name}: there are no images")
    if in_training(model):
        raise InputError(f"{name}: the model is in training mode: call model.eval()")
    if isinstance(target, int) and not isinstance(target, bool):
        target = torch.full((count,), target, device="cpu")
    if target is not None and (
        not isinstance(target, Tensor) or target.shape != (count,) or target.is_floating_point()
    ):
        found = f"{list(target.shape)}, {target.dtype}" if isinstance(target, Tensor) else repr(target)
        raise InputError(f"{name}: target must be an int or integers [{count}], got {found}")
    device = next((p.device for p in model.parameters()), images.device)
    return images.detach().to(device), None if target is None else target.to(device).long()


def check_classes(name: str, target: Tensor, classes: int) -> None:
    """Raise InputError where a target is not one of the model's classes."""
    if bool(((target < 0) | (target >= classes)).any()):
        low, high = int(target.min()), int(target.max())
        which = "the model's classes" if classes > 1 else "the model's one logit, whatever the label"
        raise InputError(f"{name}: target must be 0 to {classes - 1}, {which}; got {low} to {high}")


def checked_masks(name: str, masks: Tensor, images: Tensor) -> Tensor:
    """Masks of objects ``[N, 1, H, W]``, on the images' device.

    Raises
    ------
    InputError
        They are not bool, or do not fit the images.
    """
    count, _, height, width = images.shape
    if not isinstance(masks, Tensor) or masks.dtype != torch.bool:
        found = masks.dtype if isinstance(masks, Tensor) else type(masks).__name__
        raise InputError(f"{name}: masks must be a bool Tensor, got {found}")
    if masks.shape not in ((count, height, width), (count, 1, height, width)):
        raise InputError(f"{name}: masks must be [{count}, {height}, {width}], got {list(masks.shape)}")
    return masks.to(images.device).view(count, 1, height, width)


def checked_maps(maps: Any, images: Tensor, metric: str, method: str, batch: int) -> Tensor:
    """Maps in float32 or better, on the images' device.

    Raises
    ------
    InputError
        They have another shape than ``[N, C or 1, H, W]`` or are not finite.
    """
    n, channels, *size = images.shape
    shapes = ([n, channels, *size], [n, 1, *size])
    if not isinstance(maps, Tensor) or list(maps.shape) not in shapes:
        what = list(maps.shape) if isinstance(maps, Tensor) else type(maps).__name__
        raise InputError(
            f"{metric}: {method} returned {what} for images {list(images.shape)} in batch {batch}; "
            f"maps must be {shapes[0]} or {shapes[1]}"
        )
    # ranks and sums are those of the maps, whatever the images' precision
    wide = torch.promote_types(torch.promote_types(maps.dtype, images.dtype), torch.float32)
    found = maps.detach().to(images.device, wide)
    wrong = int((~finite_samples(found)).sum())
    if wrong:
        raise InputError(f"{metric}: {wrong} of {n} maps of {method} are not finite in batch {batch}")
    return found
