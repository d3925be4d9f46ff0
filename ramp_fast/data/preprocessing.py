"""From a photograph to the model's input as timm's data config says, and back to what the model saw."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from ramp_fast._checks import is_number, is_whole
from ramp_fast.errors import InputError

__all__ = ["Preprocessing"]

_SMALLEST = 1e-6
"""Of a standard deviation and a crop: what is smaller was meant to be something else."""


class Preprocessing:
    """Evaluation-time preprocessing of one model.

    Parameters
    ----------
    config : mapping
        A timm data config: ``input_size`` (channels, height, width), ``mean``, ``std``, ``interpolation``,
        ``crop_pct``, ``crop_mode``.

    Raises
    ------
    InputError
        The model does not take 3 channels, a mean is not in [0, 1], or a standard deviation or the crop not in (0, 1].

    Examples
    --------
    >>> preprocess = Preprocessing.of_model(model)
    >>> x = preprocess(read_image("cat.jpg"))  # [3, 224, 224]
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        from timm.data.transforms_factory import create_transform

        size = config["input_size"]
        if not isinstance(size, Sequence) or len(size) != 3 or not all(is_whole(n) for n in size):
            raise InputError(f"input_size must be three positive integers (channels, height, width), got {size!r}")
        channels, height, width = size
        if channels != 3:
            raise InputError(f"the model takes {channels} input channels; photographs have 3 (RGB)")
        if not _are_shares(config["mean"], least=0):
            raise InputError(f"the means {config['mean']} are not three numbers in [0, 1]")
        if not _are_shares(config["std"], least=_SMALLEST):
            raise InputError(f"the standard deviations {config['std']} are not three numbers in (0, 1]")
        if not _is_share(config.get("crop_pct", 1.0), _SMALLEST):
            raise InputError(f"the crop {config['crop_pct']!r} is not a number in (0, 1]")
        self.input_size = (channels, height, width)
        self.config = dict(config)
        self._transform: Callable[[Image.Image], torch.Tensor] = create_transform(**self.config, is_training=False)
        self._mask_transform: Callable[[Image.Image], torch.Tensor] | None = None
        self._mean = torch.tensor([float(v) for v in config["mean"]], device="cpu").view(-1, 1, 1)
        self._std = torch.tensor([float(v) for v in config["std"]], device="cpu").view(-1, 1, 1)

    @classmethod
    def of_model(cls, model: torch.nn.Module, **overrides: Any) -> Preprocessing:
        """Preprocessing from a timm model's data config.

        Parameters
        ----------
        model : torch.nn.Module
            A timm model (``pretrained_cfg``).
        **overrides
            Entries of the config to replace; None leaves the entry as it is.
        """
        from timm.data.config import resolve_model_data_config

        config: dict[str, Any] = dict(resolve_model_data_config(model))  # type: ignore[no-untyped-call]  # timm's
        config.update({key: value for key, value in overrides.items() if value is not None})
        return cls(config)

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """The model's input for one RGB image.

        Parameters
        ----------
        image : PIL.Image.Image
            Mode RGB.

        Returns
        -------
        torch.Tensor
            ``[3, H, W]``, float32, normalised.
        """
        return self._transform(image)

    def mask(self, mask: npt.NDArray[np.bool_]) -> torch.Tensor:
        """Where a region of a photograph lies in the model's input for it.

        Parameters
        ----------
        mask : numpy.ndarray [h, w]
            bool, of the photograph's size.

        Returns
        -------
        torch.Tensor
            bool, ``[1, H, W]``: True where the region is, by the nearest pixel; borders that are added are False.

        Raises
        ------
        InputError
            The mask has another dtype or number of dimensions.
        """
        from timm.data.transforms_factory import create_transform

        if mask.dtype != np.bool_ or mask.ndim != 2:
            raise InputError(f"a mask must be bool [h, w], got {mask.dtype} {list(mask.shape)}")
        if self._mask_transform is None:
            # The photograph's own steps, so that they cannot drift apart; black borders, values left as they are.
            plain = {**self.config, "interpolation": "nearest", "mean": (0.0,) * 3, "std": (1.0,) * 3}
            self._mask_transform = create_transform(**plain, is_training=False)
        picture = Image.fromarray(mask.astype(np.uint8) * 255).convert("RGB")
        return self._mask_transform(picture)[:1] > 0.5

    def to_display(self, x: torch.Tensor) -> npt.NDArray[np.uint8]:
        """The crop that the model saw, de-normalised.

        Parameters
        ----------
        x : torch.Tensor
            ``[3, H, W]``, as returned by calling this object.

        Returns
        -------
        numpy.ndarray
            ``[H, W, 3]``, uint8.
        """
        values = (x.detach().cpu().float() * self._std + self._mean).clamp(0, 1) * 255
        array: npt.NDArray[np.uint8] = values.round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
        return array

    def settings(self) -> dict[str, object]:
        """The config in plain JSON types, to tell whether a finished file was made with the same one."""
        return {
            key: list(value) if isinstance(value, (tuple, list)) else value
            for key, value in sorted(self.config.items())
            if isinstance(value, (str, int, float, tuple, list))
        }


def _is_share(value: Any, least: float) -> bool:
    return is_number(value) and least <= value <= 1


def _are_shares(values: Any, least: float) -> bool:
    return isinstance(values, Sequence) and len(values) == 3 and all(_is_share(v, least) for v in values)
