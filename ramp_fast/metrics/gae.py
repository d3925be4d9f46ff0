"""GAE, the global attribution evaluation: local consistency times contrastiveness.

Source: Vukadin, Afrić, Šilić, Delač, ACM TIST 15(3):47, 2024, arXiv 2412.09311, and its published code.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ramp_fast import ops
from ramp_fast._checks import positive
from ramp_fast.errors import InputError
from ramp_fast.explainer import Model
from ramp_fast.methods import logit_and_product
from ramp_fast.metrics._counts import check_bytes, checked_count
from ramp_fast.metrics.base import Metric, MetricInputs

PROTOCOLS = ("default", "published")
TILES = 4
# The published code's, in every denominator that may be zero.
EPSILON = 1e-9
# Ranking scores of both chains closer than this are taken for equal, as a multiple of their root mean square: so many
# times the rounding unit of the images' dtype (scores of float32 networks were up to 130 units off), but no more than
# the second number, which changes no sign that means something.
TIE = 1024, 1e-3


class GAE(Metric):
    """Global attribution evaluation: how faithful, robust and contrastive a method's maps are, in one number.

    Images come in groups of four. One of them is the positive image ``a`` with its predicted class ``y``. With S steps:

    * Two chains start at ``a``: MoRF sets the entries of largest absolute input x gradient of ``y`` to zero, LeRF the
      smallest, a share of ``t / S`` after step t, ranked anew at every step.
    * Faithfulness ``F = sum s R+ / sum R+`` in [-1, 1]: ``R+`` is the positive part of the map of ``a``, ``s`` the sign
      of LeRF's mean ranking scores minus MoRF's, 0 where they are equal but for rounding. (Where the
      gradient is zero at what MoRF leaves and does not change along LeRF, all signs are 0 and F is 0.)
    * Robustness ``1 - 2 d(dr, do)`` in [-1, 1]: the map's distance from the start along both chains, ``dr_t``, must go
      with that of the logit, ``do_t``; ``d(u, v) = sum |u - v| / (sum |u| + sum |v|)``.
    * Local consistency ``LC = relu(F + robustness) / 2``.
    * Contrastiveness ``C = relu(sum w R+ / sum R+)`` on the 2 x 2 mosaic of all four images at half size, explained for
      ``y``: tile k weighs ``2 q_k / q_a - 1`` with ``q = softmax f(a)`` at the classes of the tiles.
    * ``GAE = LC C`` in [0, 1]; higher is better.

    Parameters
    ----------
    model : torch.nn.Module or Engine
        In eval mode; its classes are what is explained. It is left as it is.
    protocol : {"default", "published"}
        "published" repeats the published code, including what its authors may not have meant: mosaic m of a batch of
        4 n images has the images m, m + n, m + 2 n and m + 3 n, while its positive image, and the classes by which that
        is drawn, are among 4 m to 4 m + 3; MoRF's steps add up (from the fifth on nothing is left of an image);
        ``do_t = (o_LeRF - o_MoRF) / (o_0 + 1e-9)`` is unbounded; the signs s of scores that are equal are those of
        rounding; only four pixels in the centre of a mosaic belong to no tile; and a map of one channel counts as often
        as the image has channels. Its C is unbounded where ``target`` says that the positive image is of another class
        than predicted, since ``q_a`` is taken at its label. "default" makes mosaics of the group, masks exactly t / S,
        takes ``do_t = |o_0 - o_MoRF| / (|o_0| + |o_MoRF|)`` minus the same of LeRF, gives the two rows and two columns
        where tiles meet weight 1, and counts maps of one channel once.
    steps : int
        S, at least 2.
    batch : int, optional
        For the protocol "published": how many images, a multiple of four, the published code's batches have;
        ``update`` takes multiples of it. By default what ``update`` is given is one batch, so that values depend on how
        images are split, as they do there.
    seed : int
        Of the choice of positive images; the n-th group of a metric always draws the same number.
    batch_size : int, optional
        As for :class:`Metric`.

    Notes
    -----
    ``update(..., positive=)`` forces positive images: an int or integers ``[G]`` in 0 to 3, each group's among its
    four. By default they are drawn with the mosaic's own probabilities of the four predicted classes. ``target`` holds
    the labels of the tiles for the protocol "published", which weighs tiles by them; the default protocol takes
    predicted classes, as None does. H and W must be even.

    Values are, for each group of four: gae, local_consistency, contrastiveness, faithfulness, robustness, positive;
    ``[G, S]``: morf_output, lerf_output (logits), morf_zeroed, lerf_zeroed (shares of entries that are zero);
    ``[G, 4]``: tile_distribution.
    """

    name = "gae"
    higher_is_better = True
    uses_maps = False
    asks_method = True
    group = TILES

    def __init__(
        self,
        model: Model,
        protocol: str = "default",
        *,
        steps: int = 10,
        batch: int | None = None,
        seed: int = 0,
        batch_size: int | None = None,
    ) -> None:
        super().__init__(model, seed=seed, batch_size=batch_size)
        if protocol not in PROTOCOLS:
            raise InputError(f"gae: protocol must be one of {', '.join(map(repr, PROTOCOLS))}; got {protocol!r}")
        checked_count("gae", "steps", steps, least=2)
        if batch is not None:
            positive("gae", "batch", batch)
            if batch % TILES or protocol != "published":
                raise InputError(
                    f'gae: batch is a multiple of {TILES}, and for protocol "published"; got {batch} for {protocol!r}'
                )
            self.group = batch  # type: ignore[misc]  # of this metric alone
        self.protocol, self.steps, self.batch = protocol, steps, batch

    def settings(self) -> dict[str, Any]:
        own = {"protocol": self.protocol, "steps": self.steps}
        return {**super().settings(), **own, **({"batch": self.batch} if self.batch else {})}

    def measure(self, sample: MetricInputs, positive: int | Tensor | None = None, **options: Any) -> dict[str, Tensor]:
        images, groups = sample.images, sample.images.shape[0] // TILES
        predicted = sample.logits.argmax(1).view(groups, TILES)
        labels = predicted if self.protocol == "default" else sample.target.view(groups, TILES)
        if sample.logits.shape[1] < 2:
            raise InputError("gae: the model has a single class: mosaics tell classes apart, and there is no other one")
        # the images of two chains at every step, and their maps
        check_bytes("gae", f"steps={self.steps}", self.steps * 2 * groups * 2 * 4 * images[0].numel())
        mosaic = _mosaic(self._tiles(images))
        distribution = self.logits(mosaic).gather(1, predicted).softmax(1)
        chosen = self._positive(positive, distribution, sample.numbers.start // TILES)
        rows = torch.arange(groups, device=images.device)
        start, y = images.view(groups, TILES, *images.shape[1:])[rows, chosen], predicted[rows, chosen]

        chains = self._chains(start, y)
        of_start, of_mosaic, along = self._maps(sample, start, chains.states, mosaic, y)
        channels = images.shape[1]
        faithfulness = self._share(chains.impact, of_start, channels)
        robustness = 1 - 2 * _distance(self._map_changes(of_start, along), self._logit_changes(chains.outputs))
        consistency = F.relu(faithfulness + robustness) / 2
        certain = self.probabilities(images, sample.logits).view(groups, TILES, -1)[rows, chosen]
        weights = self._tile_weights(certain, labels, chosen, images)
        contrastiveness = F.relu(self._share(weights, of_mosaic, channels))
        chain_values = {
            f"{name}_{what}": values.view(2, groups, -1)[i]
            for what, values in (("output", chains.outputs), ("zeroed", chains.zeroed))
            for i, name in enumerate(("morf", "lerf"))
        }
        return {
            "gae": consistency * contrastiveness,
            "local_consistency": consistency,
            "contrastiveness": contrastiveness,
            "faithfulness": faithfulness,
            "robustness": robustness,
            "positive": chosen,
            **chain_values,
            "tile_distribution": distribution,
        }

    def _tiles(self, values: Tensor) -> Tensor:
        """What images ``[4 G, ...]`` have, as mosaics take it, ``[G, 4, ...]``."""
        count = 1 if self.protocol == "default" else (self.batch or values.shape[0]) // TILES  # of mosaics of a batch
        tiles = values.view(-1, TILES, count, *values.shape[1:])
        return tiles.transpose(1, 2).flatten(0, 1)

    def _checked(self, images: Tensor, target: int | Tensor | None) -> tuple[Tensor, Tensor | None]:
        if isinstance(images, Tensor) and images.dim() == 4 and (images.shape[2] % 2 or images.shape[3] % 2):
            height, width = images.shape[2:]
            raise InputError(f"gae: height and width must be even to tile a mosaic, got {height} x {width}")
        return super()._checked(images, target)

    def _positive(self, positive: int | Tensor | None, distribution: Tensor, first: int) -> Tensor:
        """Of each group, numbered from ``first``."""
        groups, device = distribution.shape[0], distribution.device
        if positive is None:
            numbers = range(first, first + groups)
            drawn = torch.cat(
                [torch.rand(1, generator=self.generator(n), dtype=torch.float64, device="cpu") for n in numbers]
            )
            below = distribution.double().cumsum(1) <= drawn.to(device).unsqueeze(1)
            return below.sum(1).clamp_max(TILES - 1)
        chosen = torch.full((groups,), positive, device="cpu") if isinstance(positive, int) else positive
        if chosen.shape != (groups,) or chosen.is_floating_point() or not ((chosen >= 0) & (chosen < TILES)).all():
            raise InputError(f"gae: positive must be 0 to 3, an int or [{groups}] integers; got {positive!r}")
        return chosen.to(device)

    def _chains(self, start: Tensor, y: Tensor) -> _Chains:
        """Both chains of every positive image, MoRF's first, through the model together."""
        count = start[0].numel()
        images, classes = torch.cat([start, start]), torch.cat([y, y])
        masked = torch.zeros(images.shape[0], count, dtype=torch.bool, device=start.device)
        # in float64, so that equal scores stay equal in sum; the published code has the images' precision
        scores_sum = torch.zeros_like(images, dtype=torch.float64 if self.protocol == "default" else _wide(start).dtype)
        sign = (
            torch.ones(2, dtype=_wide(start).dtype, device=start.device).repeat_interleave(start.shape[0]).unsqueeze(1)
        )
        sign[start.shape[0] :] = -1
        states, outputs, zeroed = [], [], []
        for step in range(self.steps):
            # both chains start with the same images
            fresh, of, repeats = (images, classes, 1) if step else (start, y, 2)
            pieces = [logit_and_product(self.model, fresh[i], of[i]) for i in self.slices(fresh)]
            scores = _normalized(_wide(torch.cat([product for _, product in pieces] * repeats)).abs())
            scores_sum += scores
            states.append(images)
            outputs.append(_wide(torch.cat([logit for logit, _ in pieces] * repeats)))
            zeroed.append((images == 0).flatten(1).sum(1).double() / count)
            if step == self.steps - 1:
                break
            ranking = sign * scores.flatten(1)
            if self.protocol == "default":  # what is masked stays among the first
                ranking = ranking.masked_fill(masked, torch.inf)
            masked = ops.mask_steps(ranking, [self._masked(step + 1, count)], True) == 0
            images = images.masked_fill(masked.view(images.shape), 0.0)
        morf, lerf = scores_sum.chunk(2)
        impact = self._impact(morf, lerf, torch.finfo(start.dtype).eps).to(sign.dtype)
        return _Chains(torch.stack(states), torch.stack(outputs, 1), torch.stack(zeroed, 1), impact)

    def _impact(self, morf: Tensor, lerf: Tensor, rounding: float) -> Tensor:
        """The sign ``s`` of sums of scores ``[G, C, H, W]``."""
        if self.protocol == "published":
            return (_normalized(lerf) - _normalized(morf)).sign()
        # EPSILON would make a difference of its own between sums of unlike size
        morf, lerf = (total / total.flatten(1).sum(1).view(-1, 1, 1, 1).clamp_min(1e-300) for total in (morf, lerf))
        size = ((morf.square() + lerf.square()) / 2).flatten(1).mean(1).sqrt().view(-1, 1, 1, 1)
        units, most = TIE
        difference = lerf - morf
        return difference.masked_fill(difference.abs() <= min(units * rounding, most) * size, 0).sign()

    def _masked(self, step: int, count: int) -> int:
        """How many of ``count`` entries a step masks."""
        if self.protocol == "default":
            return step * count // self.steps
        # in float32, whose rounding takes one entry away here and there
        return int(torch.linspace(1 / self.steps, 1, self.steps, dtype=torch.float32, device="cpu")[step - 1] * count)

    def _maps(
        self, sample: MetricInputs, start: Tensor, states: Tensor, mosaic: Tensor, y: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``R+`` of the starts ``[G, ...]``, of the mosaics, and of later states ``[S - 1, 2 G, ...]``."""
        images = torch.cat([start, mosaic, states[1:].flatten(0, 1)])
        positive = F.relu(sample.attribute(images, y.repeat(images.shape[0] // y.shape[0])))
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

    def _tile_weights(self, certain: Tensor, labels: Tensor, chosen: Tensor, images: Tensor) -> Tensor:
        """``[G, 1, H, W]``, of the positive images' probabilities ``[G, classes]``."""
        probability = certain.gather(1, labels)
        own = probability.gather(1, chosen.unsqueeze(1))
        weights = self._tiles((2 * probability / own - 1).flatten()).view(-1, 1, 2, 2)
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


def _mosaic(tiles: Tensor) -> Tensor:
    """Four images ``[G, 4, C, H, W]`` at half size (nearest), ``[G, C, H, W]``: top left, right, bottom left, right."""
    half = tiles[..., ::2, ::2]
    top, bottom = (torch.cat([half[:, i], half[:, i + 1]], -1) for i in (0, 2))
    return torch.cat([top, bottom], -2)


def _wide(values: Tensor) -> Tensor:
    """In float32 or better: sums and shares of half precision would not hold."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _normalized(values: Tensor) -> Tensor:
    """Divided by each sample's sum of absolute values."""
    size = values.abs().flatten(1).sum(1) + EPSILON
    return values / size.view(-1, *[1] * (values.dim() - 1))


def _distance(u: Tensor, v: Tensor) -> Tensor:
    """``sum |u - v| / (sum |u| + sum |v|)`` over the last axis, in [0, 1]."""
    return (u - v).abs().sum(-1) / (u.abs().sum(-1) + v.abs().sum(-1) + EPSILON)
