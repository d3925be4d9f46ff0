"""What every metric shares: methods under test, values of images as they come in, their mean and its error."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ramp_fast.engine import Engine
from ramp_fast.errors import InputError

# (model, images [N, C, H, W], target [N]) -> maps [N, C or 1, H, W]
Method = Callable[[nn.Module, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Result:
    """What :meth:`Metric.compute` returns.

    Attributes
    ----------
    name : str
        Of the metric.
    values : dict of str to Tensor [n]
        The metric by its name and its components, an entry per image (or group of images), float64 on the CPU.
    """

    name: str
    values: dict[str, Tensor]

    @property
    def count(self) -> int:
        """Entries."""
        return self.values[self.name].numel()

    @property
    def mean(self) -> float:
        """The mean over entries, NaN where there are none."""
        return float(self.values[self.name].mean())

    @property
    def standard_error(self) -> float:
        """Of the mean, ``std / sqrt(n)`` with the sample's standard deviation; NaN for fewer than two entries."""
        return float(self.values[self.name].std()) / math.sqrt(self.count) if self.count > 1 else math.nan

    def __str__(self) -> str:
        return f"{self.name} {self.mean:.4f} +- {self.standard_error:.4f} (n = {self.count})"


class Metric:
    """Collects values; a subclass computes them in ``update`` and calls :meth:`_add` once they are complete.

    Values stay on the device they were computed on until :meth:`compute`.
    """

    name: str

    def __init__(self) -> None:
        self._values: list[dict[str, Tensor]] = []

    def _add(self, values: dict[str, Tensor]) -> None:
        self._values.append({name: v.detach().flatten() for name, v in values.items()})

    def settings(self) -> dict[str, Any]:
        """What two states must agree in to be merged."""
        return {}

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
        return {"settings": self.settings(), "values": self.compute().values if self._values else {}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace the values by those of a state; settings must be the same, or nothing changes."""
        before, self._values = self._values, []
        try:
            self.merge_state(state)
        except InputError:
            self._values = before
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
            self._add(state["values"])


def attribute(method: Method | Engine, metric: str, model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
    """Maps ``[N, C or 1, H, W]`` of a method under test, in the images' dtype.

    Raises
    ------
    InputError
        The maps have another shape. The message names metric, method and batch.
    """
    name = method_name(method)
    if isinstance(method, Engine):
        maps: Any = method.attribute(images, target).maps
    else:
        maps = method(model, images, target)
    n, channels, *size = images.shape
    shapes = ([n, channels, *size], [n, 1, *size])
    if not isinstance(maps, Tensor) or list(maps.shape) not in shapes:
        found = list(maps.shape) if isinstance(maps, Tensor) else type(maps).__name__
        raise InputError(
            f"{metric}: {name} returned {found} for images {list(images.shape)}; "
            f"maps must be {shapes[0]} or {shapes[1]}"
        )
    return maps.detach().to(images)


def method_name(method: Method | Engine) -> str:
    """What messages and tables call it."""
    if isinstance(method, Engine):
        return f"Engine({method.rule})"
    return str(getattr(method, "__name__", type(method).__name__))


def input_x_gradient(model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
    """Input x gradient of the target logit, ``[N, C, H, W]`` (Shrikumar et al. 2016, arXiv 1605.01713)."""
    return logit_and_product(model, images, target)[1]


def logit_and_product(model: nn.Module, images: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The target logits ``[N]`` and input x gradient ``[N, C, H, W]``; parameters get no gradient."""
    with torch.enable_grad():
        leaf = images.detach().requires_grad_()
        logit = model(leaf).gather(1, target.unsqueeze(1)).squeeze(1)
        (gradient,) = torch.autograd.grad(logit.sum(), leaf)
    return logit.detach(), gradient * images
