"""What takes the place of masked features: fixed values, or an imputation from what is left of the image."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ramp_fast import ops
from ramp_fast._ranges import ranges
from ramp_fast.errors import InputError

# images [N, C, H, W], a generator per image -> baseline [N or 1, C, H or 1, W or 1]
_Maker = Callable[[Tensor, list[torch.Generator]], Tensor]


def _zero(images: Tensor, generators: list[torch.Generator]) -> Tensor:
    return images.new_zeros(1, images.shape[1], 1, 1)


def _mean(images: Tensor, generators: list[torch.Generator]) -> Tensor:
    return images.mean((2, 3), keepdim=True)


def _black(images: Tensor, generators: list[torch.Generator]) -> Tensor:
    return images.amin((1, 2, 3), keepdim=True).expand(-1, images.shape[1], -1, -1).contiguous()


def _white(images: Tensor, generators: list[torch.Generator]) -> Tensor:
    return images.amax((1, 2, 3), keepdim=True).expand(-1, images.shape[1], -1, -1).contiguous()


def _blur(images: Tensor, generators: list[torch.Generator]) -> Tensor:
    sigma, radius = 5.0, 5  # RISE's kernel: 11 pixels wide
    taps = torch.arange(-radius, radius + 1, dtype=torch.float64, device="cpu")
    kernel = (-(taps**2) / (2 * sigma**2)).exp()
    kernel = (kernel / kernel.sum()).to(images)
    channels = images.shape[1]
    padded = F.pad(images, (radius,) * 4, mode="replicate")
    across = F.conv2d(padded, kernel.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)
    return F.conv2d(across, kernel.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)


def _uniform(images: Tensor, generators: list[torch.Generator]) -> Tensor:
    low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
    drawn = torch.stack(
        [torch.rand(images.shape[1:], generator=g, dtype=torch.float32, device="cpu") for g in generators]
    )
    return low + (high - low) * drawn.to(images)


_FIXED: dict[str, _Maker] = {
    "zero": _zero,
    "mean": _mean,
    "black": _black,
    "white": _white,
    "blur": _blur,
    "uniform": _uniform,
}
BASELINES = (*_FIXED, "road")


class Fill:
    """Masked entries take the values of a baseline ``[N or 1, C, H, W]`` or ``[N or 1, C, 1, 1]``."""

    def __init__(self, baseline: Tensor) -> None:
        self.baseline = baseline

    def of(self, image: slice | Tensor) -> Fill:
        """For some of the images: a range, or their numbers, some of them several times."""
        return self if self.baseline.shape[0] == 1 else Fill(self.baseline[image])

    def copies(self, images: Tensor, steps: Tensor, first: int, last: int, *, reveal: bool = False) -> Tensor:
        """As :func:`ramp_fast.ops.masked_copies`."""
        return ops.masked_copies(images, steps, self.baseline, first, last, reveal)

    def in_turn(
        self, images: Tensor, steps: Tensor, count: int, together: int, *, reveal: bool = False
    ) -> Iterator[Tensor]:
        """As :func:`ramp_fast.ops.copies_in_turn`."""
        return ops.copies_in_turn(images, steps, self.baseline, count, together, reveal)


class Impute:
    """Noisy linear imputation of masked pixels (Rong et al. 2022, ROAD, arXiv 2202.00449).

    A masked pixel is the weighted mean of its eight neighbours (1/6 beside, 1/12 diagonal, over those that exist),
    masked ones included: a linear system, solved for all copies and channels together by conjugate gradients on the
    images' device; the host looks at the residual now and then. Gaussian noise is added to what was filled in. Where
    every pixel is masked, all are the mean of the image.

    Parameters
    ----------
    noise : Tensor [N, C, H, W]
        Added to masked pixels.
    """

    def __init__(self, noise: Tensor) -> None:
        self.noise = noise

    def of(self, image: slice | Tensor) -> Impute:
        """For some of the images: a range, or their numbers, some of them several times."""
        return Impute(self.noise[image])

    def copies(self, images: Tensor, steps: Tensor, first: int, last: int, *, reveal: bool = False) -> Tensor:
        """As :func:`ramp_fast.ops.masked_copies`; revealing, what is not revealed yet is imputed."""
        if steps.shape[1] != 1:
            raise InputError('baseline "road" fills in whole pixels: granularity "entry" cannot be')
        at = torch.arange(first, last, device=images.device).view(-1, 1, 1, 1, 1)
        masked = steps.unsqueeze(0) > at if reveal else steps.unsqueeze(0) <= at
        filled = impute(images.expand(last - first, *images.shape).flatten(0, 1), masked.flatten(0, 1))
        filled = filled.unflatten(0, (last - first, -1))
        return torch.where(masked, filled + self.noise, images)

    def in_turn(
        self, images: Tensor, steps: Tensor, count: int, together: int, *, reveal: bool = False
    ) -> Iterator[Tensor]:
        """As :func:`ramp_fast.ops.copies_in_turn`."""
        for first, last in ranges(count, together):
            yield self.copies(images, steps, first, last, reveal=reveal)


def impute(images: Tensor, masked: Tensor) -> Tensor:
    """Images ``[M, C, H, W]`` with masked pixels ``[M, 1, H, W]`` filled in linearly, without noise.

    The system ``d u - K (m u) = K ((1 - m) x)`` on masked pixels, with ``K`` the neighbours' weights and ``d`` the sum
    of those that exist, is symmetric and positive definite unless nothing is known.
    """
    given, images = images, images.to(torch.promote_types(images.dtype, torch.float32))
    inside = masked.to(images.dtype)
    weight = _neighbours(torch.ones_like(images[:1, :1]))
    known = (images * (1 - inside)).contiguous()

    def system(u: Tensor) -> Tensor:  # u is zero outside the mask
        return (weight * u - _neighbours(u)) * inside

    wanted = _neighbours(known) * inside
    u = _spread_in(known, 1 - inside) * inside
    residual = wanted - system(u)
    direction, size = residual, _dot(residual, residual)
    enough = (1e-11 if images.dtype == torch.float64 else 1e-6) ** 2 * _dot(wanted, wanted)
    # in exact arithmetic there are at most as many steps as pixels; systems of images take some hundreds
    for step in range(4 * (images.shape[2] + images.shape[3]) + 64):
        going = size > enough
        if step % 16 == 0 and not bool(going.any()):
            break
        image = system(direction)
        # a system that is solved stays as it is: its numbers would go on to shrink below what is fast to compute with
        alpha = (size / _dot(direction, image)).where(going, 0)
        u = u + alpha * direction
        residual = residual - alpha * image
        size, before = _dot(residual, residual), size
        direction = residual + (size / before).where(going, 0) * direction
    nothing = inside.flatten(1).amin(1).view(-1, 1, 1, 1) > 0
    return torch.where(nothing, images.mean((2, 3), keepdim=True), known + u).to(given.dtype)


def _neighbours(x: Tensor) -> Tensor:
    """Of ``x`` ``[..., H, W]`` the sum of the neighbours, by their weights; beyond the border there is nothing.

    The eight weights are an outer product without its centre, and sums of slices are several times faster than a
    convolution of one channel.
    """
    across = 2 * x
    across[..., 1:] += x[..., :-1]
    across[..., :-1] += x[..., 1:]
    both = 2 * across
    both[..., 1:, :] += across[..., :-1, :]
    both[..., :-1, :] += across[..., 1:, :]
    return both.sub_(x, alpha=4).div_(12)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum((2, 3), keepdim=True)


def _spread_in(known: Tensor, weight: Tensor) -> Tensor:
    """A first guess of unknown pixels: the mean of the known ones of the smallest block around that has any."""
    if max(known.shape[2:]) == 1:
        return known / weight.clamp_min(torch.finfo(known.dtype).tiny)
    # sums of 2 x 2 blocks; beyond the border there is nothing
    coarse = _spread_in(_halved(known), _halved(weight))
    guess = coarse.repeat_interleave(2, 2).repeat_interleave(2, 3)[..., : known.shape[2], : known.shape[3]]
    return torch.where(weight > 0, known / weight.clamp_min(torch.finfo(known.dtype).tiny), guess)


def _halved(x: Tensor) -> Tensor:
    return F.avg_pool2d(F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2)), 2) * 4


Baseline = str | float | Tensor


def check_baseline(baseline: Baseline, metric: str) -> None:
    """Raise InputError where there is no such baseline."""
    if isinstance(baseline, str) and baseline not in BASELINES:
        raise InputError(
            f"{metric}: baseline must be one of {', '.join(BASELINES)}, a number or a Tensor; got {baseline!r}"
        )
    if not isinstance(baseline, (str, int, float, Tensor)):
        raise InputError(f"{metric}: baseline must be a name, a number or a Tensor, got {type(baseline).__name__}")


def filling(
    baseline: Baseline, images: Tensor, generators: list[torch.Generator], noise: float = 0.01, metric: str = "metric"
) -> Fill | Impute:
    """What takes the place of masked features of ``images`` ``[N, C, H, W]``.

    Parameters
    ----------
    baseline : str, float or Tensor [C], [C, H, W], [1 or N, C, H, W]
        "zero"; "mean", of every channel of the image; "black" and "white", the image's smallest and largest value;
        "blur", a Gaussian of 5 pixels, 11 wide; "uniform", values drawn between the image's extremes; "road",
        :class:`Impute`; or values.
    generators : list of torch.Generator
        One per image, for "uniform" and "road".
    noise : float
        Standard deviation of what "road" adds.
    """
    if isinstance(baseline, str):
        if baseline == "road":
            drawn = [torch.randn(images.shape[1:], generator=g, dtype=torch.float32, device="cpu") for g in generators]
            return Impute(torch.stack(drawn).to(images) * noise)
        return Fill(_FIXED[baseline](images, generators))
    if not isinstance(baseline, Tensor):
        return Fill(torch.full((1, images.shape[1], 1, 1), float(baseline), dtype=images.dtype, device=images.device))
    values = baseline.to(images)
    if values.dim() == 1:
        values = values.view(-1, 1, 1)
    try:
        values = values.expand(values.shape[0] if values.dim() == 4 else 1, *images.shape[1:])
    except RuntimeError:
        values = values[:0]
    if values.shape[0] not in (1, images.shape[0]):
        raise InputError(
            f"{metric}: a baseline {list(baseline.shape)} does not fit images {list(images.shape)}; [C], [C, H, W] or "
            f"[1 or N, C, H, W] does"
        )
    return Fill(values.contiguous())
