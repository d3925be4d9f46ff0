"""GAE, the global attribution evaluation: local consistency times contrastiveness.

Source: Vukadin, Afrić, Šilić, Delač, ACM TIST 15(3):47, 2024, arXiv 2412.09311, and its published code.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ramp_fast import ops
from ramp_fast.engine import Engine
from ramp_fast.errors import InputError
from ramp_fast.metrics.base import Method, Metric, attribute, logit_and_product, method_name

PROTOCOLS = ("default", "published")
TILES = 4
# The published code's, in every denominator that may be zero.
EPSILON = 1e-9


class GAE(Metric):
    """Global attribution evaluation: how faithful, robust and contrastive a method's maps are, in one number.

    Images come in groups of four. One of them is the positive image ``a`` with its predicted class ``y``. With S steps:

    * Two chains start at ``a``: MoRF sets the entries of largest absolute input x gradient of ``y`` to zero, LeRF the
      smallest, a share of ``t / S`` after step t, ranked anew at every step.
    * Faithfulness ``F = sum s R+ / sum R+`` in [-1, 1]: ``R+`` is the positive part of the map of ``a``, ``s`` the sign
      of LeRF's mean ranking scores minus MoRF's.
    * Robustness ``1 - 2 d(dr, do)`` in [-1, 1]: the map's distance from the start along both chains, ``dr_t``, must go
      with that of the logit, ``do_t``; ``d(u, v) = sum |u - v| / (sum |u| + sum |v|)``.
    * Local consistency ``LC = relu(F + robustness) / 2``.
    * Contrastiveness ``C = relu(sum w R+ / sum R+)`` on the 2 x 2 mosaic of all four images at half size, explained for
      ``y``: tile k weighs ``2 q_k / q_a - 1`` with ``q = softmax f(a)`` at the classes of the tiles.
    * ``GAE = LC C`` in [0, 1]; higher is better.

    Parameters
    ----------
    model : torch.nn.Module
        In eval mode; its classes are what is explained. It is left as it is.
    protocol : {"default", "published"}
        "published" repeats the published code, including what its authors may not have meant: MoRF's steps add up (from
        the fifth on nothing is left of an image), ``do_t = (o_LeRF - o_MoRF) / (o_0 + 1e-9)`` is unbounded, only four
        pixels in the centre of a mosaic belong to no tile, and a map of one channel counts as often as the image has
        channels. Its C is unbounded where ``target`` says that the positive image is of another class than predicted,
        since ``q_a`` is taken at its label. "default" masks exactly t / S, takes ``do_t = |o_0 - o_MoRF| / (|o_0| +
        |o_MoRF|)`` minus the same of LeRF, gives the two rows and two columns where tiles meet weight 1, and counts
        maps of one channel once.
    steps : int
        S, at least 2.
    seed : int
        Of the choice of positive images; the n-th group of a metric always draws the same number.
    batch_size : int, optional
        Images that go through the model or the method at a time; all at once by default. Results do not depend on it.
    """

    name = "gae"

    def __init__(
        self,
        model: nn.Module,
        protocol: str = "default",
        *,
        steps: int = 10,
        seed: int = 0,
        batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if protocol not in PROTOCOLS:
            raise InputError(f"gae: protocol must be one of {', '.join(map(repr, PROTOCOLS))}; got {protocol!r}")
        if not isinstance(steps, int) or steps < 2:
            raise InputError(f"gae: steps must be an integer of at least 2, got {steps!r}")
        if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1):
            raise InputError(f"gae: batch_size must be a positive integer, got {batch_size!r}")
        self.model, self.protocol, self.steps, self.seed, self.batch_size = model, protocol, steps, seed, batch_size
        self._groups = 0

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._groups = len(state["values"].get(self.name, ()))  # the next group draws the next number

    def settings(self) -> dict[str, Any]:
        return {"metric": self.name, "protocol": self.protocol, "steps": self.steps, "seed": self.seed}

    def update(
        self,
        images: Tensor,
        target: Tensor | None,
        method: Method | Engine,
        *,
        positive: int | Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Add groups of four images.

        Parameters
        ----------
        images : Tensor [4 G, C, H, W]
            Preprocessed for the model; H and W even.
        target : integer Tensor [4 G] or None
            Labels of the tiles for the protocol "published", which weighs tiles by them; the default protocol takes
            predicted classes, as None does.
        method : callable or Engine
            ``(model, images, target) -> maps``, ``[N, C or 1, H, W]``.
        positive : int or integer Tensor [G], optional
            Which of its four is each group's positive image. Drawn by default, with the mosaic's own probabilities of
            the four predicted classes.

        Returns
        -------
        dict of str to Tensor
            Of these groups, ``[G]``: gae, local_consistency, contrastiveness, faithfulness, robustness, positive;
            ``[G, S]``: morf_output, lerf_output (logits), morf_zeroed, lerf_zeroed (shares of entries that are zero);
            ``[G, 4]``: tile_distribution. The first six go into :meth:`compute`.

        Raises
        ------
        InputError
            An argument is not as described, or maps have another shape or are not finite. Nothing is added then.
        """
        groups = self._check(images, target)
        model_logits = self._logits(images)
        labels = self._labels(target, model_logits)
        predicted = model_logits.argmax(1).view(groups, TILES)
        mosaic = _mosaic(images)
        distribution = self._logits(mosaic).gather(1, predicted).softmax(1)
        chosen = self._positive(positive, distribution)
        rows = torch.arange(groups, device=images.device)
        start, y = images.view(groups, TILES, *images.shape[1:])[rows, chosen], predicted[rows, chosen]

        chains = self._chains(start, y)
        maps = self._maps(method, start, chains.states, mosaic, y)
        of_start, of_mosaic, along = maps
        channels = images.shape[1]
        faithfulness = self._share(chains.impact, of_start, channels)
        robustness = 1 - 2 * _distance(self._map_changes(of_start, along), self._logit_changes(chains.outputs))
        consistency = F.relu(faithfulness + robustness) / 2
        labels = predicted if labels is None or self.protocol == "default" else labels.view(groups, TILES)
        weights = self._tile_weights(model_logits.view(groups, TILES, -1)[rows, chosen], labels, chosen, images)
        contrastiveness = F.relu(self._share(weights, of_mosaic, channels))
        values = {
            "gae": consistency * contrastiveness,
            "local_consistency": consistency,
            "contrastiveness": contrastiveness,
            "faithfulness": faithfulness,
            "robustness": robustness,
            "positive": chosen,
        }
        self._add(values)
        self._groups += groups
        details = {
            f"{name}_{what}": values.view(2, groups, -1)[i]
            for what, values in (("output", chains.outputs), ("zeroed", chains.zeroed))
            for i, name in enumerate(("morf", "lerf"))
        }
        return {**values, **details, "tile_distribution": distribution}

    def _check(self, images: Tensor, target: Tensor | None) -> int:
        if not isinstance(images, Tensor) or images.dim() != 4 or not images.is_floating_point():
            found = f"{list(images.shape)}, {images.dtype}" if isinstance(images, Tensor) else type(images).__name__
            raise InputError(f"gae: images must be a floating point Tensor [4 G, C, H, W], got {found}")
        count, _, height, width = images.shape
        if count < TILES or count % TILES:
            raise InputError(f"gae: images come in groups of four, got {count}: leave out {count % TILES} of them")
        if height % 2 or width % 2:
            raise InputError(f"gae: height and width must be even to tile a mosaic, got {height} x {width}")
        if target is not None and (target.shape != (count,) or target.is_floating_point()):
            raise InputError(f"gae: target must be integers [{count}], got {list(target.shape)}, {target.dtype}")
        if self.model.training:
            raise InputError("gae: the model is in training mode: call model.eval()")
        return count // TILES

    def _labels(self, target: Tensor | None, logits: Tensor) -> Tensor | None:
        classes = logits.shape[1]
        if target is not None and bool(((target < 0) | (target >= classes)).any()):
            raise InputError(f"gae: target must be 0 to {classes - 1}, got {int(target.min())} to {int(target.max())}")
        return None if target is None else target.to(logits.device).long()

    def _positive(self, positive: int | Tensor | None, distribution: Tensor) -> Tensor:
        groups, device = distribution.shape[0], distribution.device
        if positive is None:
            numbers = range(self._groups, self._groups + groups)
            drawn = [np.random.default_rng([self.seed, number]).random() for number in numbers]
            uniform = torch.tensor(drawn, dtype=torch.float64).to(device)
            below = distribution.double().cumsum(1) <= uniform.unsqueeze(1)
            return below.sum(1).clamp_max(TILES - 1)
        chosen = torch.full((groups,), positive) if isinstance(positive, int) else positive
        if chosen.shape != (groups,) or chosen.is_floating_point() or not ((chosen >= 0) & (chosen < TILES)).all():
            raise InputError(f"gae: positive must be 0 to 3, an int or [{groups}] integers; got {positive!r}")
        return chosen.to(device)

    def _batches(self, count: int) -> list[slice]:
        size = self.batch_size or max(count, 1)
        return [slice(start, start + size) for start in range(0, count, size)]

    def _logits(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.cat([self.model(images[here]) for here in self._batches(images.shape[0])])

    def _chains(self, start: Tensor, y: Tensor) -> _Chains:
        """Both chains of every positive image, MoRF's first, through the model together."""
        count = start[0].numel()
        images, classes = torch.cat([start, start]), torch.cat([y, y])
        sign = torch.ones(2, dtype=start.dtype, device=start.device).repeat_interleave(start.shape[0]).unsqueeze(1)
        sign[start.shape[0] :] = -1
        masked = torch.zeros(images.shape[0], count, dtype=torch.bool, device=start.device)
        scores_sum = torch.zeros_like(images)
        states, outputs, zeroed = [], [], []
        for step in range(self.steps):
            pieces = [logit_and_product(self.model, images[i], classes[i]) for i in self._batches(images.shape[0])]
            scores = _normalized(torch.cat([product for _, product in pieces]).abs())
            scores_sum += scores
            states.append(images)
            outputs.append(torch.cat([logit for logit, _ in pieces]))
            zeroed.append((images == 0).flatten(1).sum(1).double() / count)
            if step == self.steps - 1:
                break
            ranking = sign * scores.flatten(1)
            if self.protocol == "default":  # what is masked stays among the first
                ranking = ranking.masked_fill(masked, torch.inf)
            masked = ops.mask_steps(ranking, [self._masked(step + 1, count)], True) == 0
            images = images.masked_fill(masked.view(images.shape), 0.0)
        morf, lerf = scores_sum.chunk(2)
        impact = (_normalized(lerf) - _normalized(morf)).sign()
        return _Chains(torch.stack(states), torch.stack(outputs, 1), torch.stack(zeroed, 1), impact)

    def _masked(self, step: int, count: int) -> int:
        """How many of ``count`` entries a step masks."""
        if self.protocol == "default":
            return step * count // self.steps
        # in float32, whose rounding takes one entry away here and there
        return int(torch.linspace(1 / self.steps, 1, self.steps, dtype=torch.float32)[step - 1] * count)

    def _maps(
        self, method: Method | Engine, start: Tensor, states: Tensor, mosaic: Tensor, y: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``R+`` of the starts ``[G, ...]``, of the mosaics, and of later states ``[S - 1, 2 G, ...]``."""
        later = states[1:].flatten(0, 1)
        images = torch.cat([start, mosaic, later])
        classes = y.repeat(images.shape[0] // y.shape[0])
        batches = self._batches(images.shape[0])
        maps = torch.cat([attribute(method, self.name, self.model, images[i], classes[i]) for i in batches])
        wrong = int((~maps.flatten(1).isfinite().all(1)).sum())
        if wrong:
            first, last = self._groups, self._groups + start.shape[0] - 1
            raise InputError(
                f"gae: {wrong} of {maps.shape[0]} maps of {method_name(method)} are not finite, "
                f"in groups {first} to {last}"
            )
        positive = F.relu(maps)
        positive = positive / (positive.flatten(1).amax(1) + EPSILON).view(-1, 1, 1, 1)
        groups = start.shape[0]
        along = positive[2 * groups :].unflatten(0, (self.steps - 1, 2 * groups))
        return positive[:groups], positive[groups : 2 * groups], along

    def _share(self, weights: Tensor, positive: Tensor, channels: int) -> Tensor:
        """``sum weights R+ / sum R+``, ``[G]``; weights ``[G, C or 1, H, W]``."""
        weighted = (weights.expand(-1, channels, -1, -1) * positive).flatten(1).sum(1)
        if self.protocol == "default":  # a map of one channel was counted once for each of the image's
            weighted = weighted * (positive.shape[1] / channels)
        return weighted / (positive.flatten(1).sum(1) + EPSILON)

    def _map_changes(self, start: Tensor, along: Tensor) -> Tensor:
        """``dr``, ``[G, S - 1]``: how much further the map is from the start's along MoRF than along LeRF."""
        groups = start.shape[0]
        far = _distance(torch.cat([start, start]).flatten(1).unsqueeze(0), along.flatten(2))
        return (far[:, :groups] - far[:, groups:]).t()

    def _logit_changes(self, outputs: Tensor) -> Tensor:
        """``do``, ``[G, S - 1]``."""
        morf, lerf = outputs.chunk(2)
        start = morf[:, :1]
        if self.protocol == "published":
            return (lerf[:, 1:] - morf[:, 1:]) / (start + EPSILON)

        def moved(later: Tensor) -> Tensor:
            return (start - later).abs() / (start.abs() + later.abs() + EPSILON)

        return moved(morf[:, 1:]) - moved(lerf[:, 1:])

    def _tile_weights(self, logits: Tensor, labels: Tensor, chosen: Tensor, images: Tensor) -> Tensor:
        """``[G, 1, H, W]``."""
        probability = logits.softmax(1).gather(1, labels)
        own = probability.gather(1, chosen.unsqueeze(1))
        weights = (2 * probability / own - 1).view(-1, 1, 2, 2).to(images.dtype)
        height, width = images.shape[-2:]
        weights = weights.repeat_interleave(height // 2, 2).repeat_interleave(width // 2, 3)
        row, column = slice(height // 2 - 1, height // 2 + 1), slice(width // 2 - 1, width // 2 + 1)
        if self.protocol == "published":
            weights[:, :, row, column] = 1
        else:
            weights[:, :, row, :] = 1
            weights[:, :, :, column] = 1
        return weights


class _Chains:
    """States ``[S, 2 G, C, H, W]``, logits and shares of zeros ``[2 G, S]`` (MoRF's first), impact ``[G, C, H, W]``."""

    def __init__(self, states: Tensor, outputs: Tensor, zeroed: Tensor, impact: Tensor) -> None:
        self.states, self.outputs, self.zeroed, self.impact = states, outputs, zeroed, impact


def _mosaic(images: Tensor) -> Tensor:
    """Groups of four at half size (nearest), ``[G, C, H, W]``: top left, top right, bottom left, bottom right."""
    half = images[..., ::2, ::2].unflatten(0, (-1, TILES))
    top, bottom = (torch.cat([half[:, i], half[:, i + 1]], -1) for i in (0, 2))
    return torch.cat([top, bottom], -2)


def _normalized(values: Tensor) -> Tensor:
    """Divided by each sample's sum of absolute values."""
    size = values.abs().flatten(1).sum(1) + EPSILON
    return values / size.view(-1, *[1] * (values.dim() - 1))


def _distance(u: Tensor, v: Tensor) -> Tensor:
    """``sum |u - v| / (sum |u| + sum |v|)`` over the last axis, in [0, 1]."""
    return (u - v).abs().sum(-1) / (u.abs().sum(-1) + v.abs().sum(-1) + EPSILON)
