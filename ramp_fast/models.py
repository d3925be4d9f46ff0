"""Loading a classifier by name: timm's architectures, a checkpoint file, or the embedded demo model."""

from __future__ import annotations

import difflib
import hashlib
import logging
import os
import pickle
import socket
import urllib.parse
import urllib.request
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ramp_fast._checks import is_whole, positive
from ramp_fast._files import NotRegularError, open_regular, reason
from ramp_fast.data import ClassNames, Preprocessing
from ramp_fast.demo import DEMO_ARCHITECTURE, DEMO_CONFIG, demo_state_dict, demo_weights_path
from ramp_fast.errors import RampFastError

__all__ = ["LoadedModel", "ModelError", "load_model", "read_checkpoint"]

WRAPPERS = ("state_dict", "model", "model_state_dict")
"""Entries under which training scripts keep the state dict."""

DATA_PARALLEL = "module."
"""What DataParallel puts before every name."""

WRAPPER_MODULES = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""What torch.compile, FSDP and activation checkpointing put into names, at any level."""

# An archive, and a pickle since Python 2.3: older ones are never plain state dicts.
_TORCH_STARTS = (b"PK", b"\x80")

NOT_BY_ARGUMENT = {
    "pretrained": "weights are pretrained without --checkpoint, and the file's with it",
    "checkpoint_path": "give the file by --checkpoint, which cannot run code",
}
"""Arguments of timm.create_model that would bring other weights than those that results name."""


class ModelError(RampFastError):
    """A model or its weights cannot be loaded; the message says why and what to do."""


@dataclass(frozen=True)
class LoadedModel:
    """A classifier in evaluation mode with all that is needed to show it photographs.

    Attributes
    ----------
    model : torch.nn.Module
        In evaluation mode, on the CPU.
    name : str
        Architecture, with the tag of the pretrained weights where they were used.
    weights : str
        What the weights are: ``demo``, ``pretrained:TAG`` or ``sha256:HEX`` of the checkpoint file.
    preprocessing : Preprocessing
        As the model was trained.
    class_names : ClassNames
        One per output.
    """

    model: torch.nn.Module
    name: str
    weights: str
    preprocessing: Preprocessing
    class_names: ClassNames


def load_model(
    name: str = "demo",
    checkpoint: str | Path | None = None,
    *,
    num_classes: int | None = None,
    class_names: str | Path | None = None,
    model_args: Mapping[str, Any] | None = None,
    **preprocessing: Any,
) -> LoadedModel:
    """Load a classifier.

    Parameters
    ----------
    name : str
        ``demo``, or a timm architecture, with or without the tag of its pretrained weights.
    checkpoint : str or pathlib.Path, optional
        Weights to load strictly (see `read_checkpoint`); without it timm downloads pretrained ones.
    num_classes : int, optional
        Number of classes where the checkpoint's differs from the architecture's default.
    class_names : str or pathlib.Path, optional
        Text file with one name per class; without it the ImageNet variant is told by the number of classes.
    model_args : mapping, optional
        Further arguments of ``timm.create_model``, as ``{"img_size": 384}``.
    **preprocessing
        Entries of timm's data config to replace (``mean``, ``std``, ``crop_pct``, ``interpolation``).

    Raises
    ------
    ModelError
        Unknown name, weights that are missing or do not fit, no network, not a classifier.
    InputError
        Class names do not fit, or the model does not take RGB images.

    Notes
    -----
    The caller's random state is left as it was, although timm initialises the weights at random first.
    """
    extra = _model_arguments(model_args)
    if num_classes is not None:
        positive("load_model", "num_classes", num_classes)
        if checkpoint is None:
            raise ModelError("--num-classes needs --checkpoint: pretrained weights have their own number of classes")
        extra["num_classes"] = num_classes
    if name == "demo":
        if checkpoint is not None:
            raise ModelError(
                f"the demo model has its own weights; for others name the architecture ({DEMO_ARCHITECTURE})"
            )
        state = demo_state_dict(read_checkpoint(demo_weights_path()))
        overlay = {"pretrained_cfg_overlay": dict(DEMO_CONFIG)}
        model, full_name, weights = _create(DEMO_ARCHITECTURE, pretrained=False, **overlay, **extra), "demo", "demo"
        _fit(model, state, "the demo weights")
    elif checkpoint is not None:
        _check_name(name)
        # The file first: a wrong path should not cost the building of a large model.
        state = read_checkpoint(checkpoint)
        model, full_name, weights = _create(name, pretrained=False, **extra), name, f"sha256:{_sha256(checkpoint)}"
        _fit(model, state, str(checkpoint))
    else:
        _check_name(name)
        model = _create_pretrained(name, **extra)
        tag = getattr(model, "pretrained_cfg", {}).get("tag") or "default"
        full_name = name if "." in name else f"{name}.{tag}"
        weights = f"pretrained:{tag}"

    count = int(getattr(model, "num_classes", 0) or 0)
    if count < 1:
        raise ModelError(
            f"{full_name} has no classifier (0 classes); pass --num-classes with a --checkpoint that has one"
        )
    names = ClassNames.imagenet(count) if class_names is None else ClassNames.from_file(class_names, count)
    if "img_size" in extra:
        # timm builds the model for this size, but its data config goes on naming the published one.
        preprocessing.setdefault("input_size", (3, *_height_width(extra["img_size"])))
    return LoadedModel(model.eval(), full_name, weights, Preprocessing.of_model(model, **preprocessing), names)


def _model_arguments(given: Mapping[str, Any] | None) -> dict[str, Any]:
    extra = dict(given or {})
    for key, instead in NOT_BY_ARGUMENT.items():
        if key in extra:
            raise ModelError(f"{key} is not an argument to pass on to timm: {instead}")
    for key in ("pretrained_cfg", "pretrained_cfg_overlay"):
        if isinstance(extra.get(key), Mapping) and "file" in extra[key]:
            raise ModelError(f"{key} names a file of weights: give it by --checkpoint, which cannot run code")
    return extra


def _height_width(size: Any) -> tuple[int, int]:
    pair = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
    if len(pair) != 2 or not all(is_whole(n) for n in pair):
        raise ModelError(f"img_size must be a positive integer or two of them (height, width), got {size!r}")
    return pair


def _check_name(name: str) -> None:
    import timm
    from timm.models import split_model_name_tag

    if not isinstance(name, str):
        raise ModelError(f"a model is the name of a timm architecture, got {type(name).__name__}")
    if ":" in name or "/" in name:
        raise ModelError(f"{name!r} is not a timm architecture: give its name, and weights of your own by --checkpoint")
    architecture, tag = split_model_name_tag(name)
    if not timm.is_model(architecture):
        known = timm.list_models()
        close = difflib.get_close_matches(architecture, known, n=3, cutoff=0.6)
        close += [k for k in known if k.startswith(architecture) and k not in close][: 5 - len(close)]
        hint = f"; close: {', '.join(close)}" if close else "; timm.list_models() has the names"
        raise ModelError(f"unknown model {name!r}{hint}")
    if tag:
        tags = [split_model_name_tag(full)[1] for full in timm.list_models(f"{architecture}.*", pretrained=True)]
        if tag not in tags:
            hint = f"its tags: {', '.join(tags)}" if tags else "timm has no pretrained weights for it"
            raise ModelError(f"{architecture} has no pretrained weights tagged {tag!r}; {hint}")


@contextmanager
def _quiet_and_reproducible() -> Iterator[None]:
    """Keep the libraries' retry and loading messages to themselves, and the caller's random state as it is."""
    loggers = [logging.getLogger(name) for name in ("timm", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _create(name: str, *, pretrained: bool, **extra: Any) -> torch.nn.Module:
    import timm

    try:
        with _quiet_and_reproducible():
            model: torch.nn.Module = timm.create_model(name, pretrained=pretrained, **extra)
    except Exception as error:  # an argument that timm does not check may fail anywhere
        if pretrained:
            raise
        raise ModelError(f"timm cannot build {name}: {reason(error)}") from error
    return model


def _create_pretrained(name: str, **extra: Any) -> torch.nn.Module:
    from timm.models import get_pretrained_cfg

    config = get_pretrained_cfg(name)
    if config is None or not config.has_weights:
        raise ModelError(f"timm has no pretrained weights for {name}; pass --checkpoint FILE")
    if config.hf_hub_id and not _hub_reachable() and not _cached(config.hf_hub_id):
        raise ModelError(f"cannot download pretrained weights for {name} (no network); pass --checkpoint FILE")
    try:
        return _create(name, pretrained=True, **extra)
    except Exception as error:  # hub, network, disk and format errors share no base class
        raise ModelError(
            f"cannot load pretrained weights for {name} ({reason(error)}); pass --checkpoint FILE"
        ) from error


def _hub_reachable() -> bool:
    """Whether the hub's name resolves: asked first, as the hub's client retries for a minute without it."""
    if urllib.request.getproxies():
        return True
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        return False
    host = urllib.parse.urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname
    if host is None:
        return True
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return False
    return True


def _cached(hub_id: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    files = ("model.safetensors", "pytorch_model.bin")
    return any(isinstance(try_to_load_from_cache(hub_id, file), str) for file in files)


def read_checkpoint(path: str | Path) -> dict[str, torch.Tensor]:
    """Read a state dict: safetensors, or what ``torch.load(weights_only=True)`` accepts, and nothing else.

    Parameters
    ----------
    path : str or pathlib.Path
        ``*.safetensors``, or a file written by ``torch.save``, told by content where it has another name. The wrappers
        of common training scripts (``state_dict``, ``model``, ``model_state_dict``) are removed, and so is what
        DataParallel, torch.compile, FSDP and activation checkpointing put into names (``module.``, ``_orig_mod.`` and
        the like), in any order.

    Returns
    -------
    dict of str to torch.Tensor
        On the CPU.

    Raises
    ------
    ModelError
        The file is missing, damaged, not of these formats, would run code when loaded, or holds no state dict.
    """
    file = Path(path)
    try:
        with open_regular(file) as opened:
            head = opened.read(9)
    except FileNotFoundError as error:
        raise ModelError(f"{file}: no such checkpoint file") from error
    except NotRegularError as error:
        raise ModelError(f"{file}: not a file but {error}".removesuffix(", not a file")) from error
    except OSError as error:
        raise ModelError(f"{file}: cannot be read ({reason(error)})") from error
    if _is_safetensors(file, head):
        content = _unwrapped(_read_safetensors(file))
    elif head.startswith(_TORCH_STARTS):
        content = _unwrapped(_read_torch(file))
    else:
        raise ModelError(f"{file}: not a checkpoint: neither safetensors nor what torch.save writes")
    if not isinstance(content, Mapping) or not content:
        raise ModelError(f"{file}: holds {type(content).__name__}, not a state dict")
    stray = [str(key) for key, value in content.items() if not (isinstance(key, str) and isinstance(value, Tensor))]
    if stray:
        raise ModelError(f"{file}: not a state dict, these entries are not tensors: {_some(stray)}")
    state = {_plain_name(key): value for key, value in content.items()}
    if len(state) < len(content):
        raise ModelError(f"{file}: names that differ only by {', '.join(sorted(WRAPPER_MODULES))}")
    while all(key.startswith(DATA_PARALLEL) for key in state):
        state = {key.removeprefix(DATA_PARALLEL): value for key, value in state.items()}
    return state


def _unwrapped(content: Any) -> Any:
    """What is within the wrappers of training scripts."""
    seen: set[int] = set()
    while isinstance(content, Mapping) and id(content) not in seen:  # a wrapper may hold itself
        seen.add(id(content))
        content = next((content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)), content)
    return content


def _plain_name(key: str) -> str:
    return ".".join(part for part in key.split(".") if part not in WRAPPER_MODULES)


def _is_safetensors(file: Path, head: bytes) -> bool:
    """By its name, or by how it begins: the length of a header, which is JSON."""
    return file.suffix == ".safetensors" or (head[8:] == b"{" and int.from_bytes(head[:8], "little") < 2**27)


def _read_safetensors(file: Path) -> Any:
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except Exception as error:  # damaged headers raise SafetensorError, OverflowError, MemoryError and others
        raise ModelError(f"{file}: not a readable safetensors file ({reason(error)})") from error


def _read_torch(file: Path) -> Any:
    _check_archive(file)
    try:
        with warnings.catch_warnings():
            # torch warns of old pickle protocols; whether it can read the file is all that matters here.
            warnings.simplefilter("ignore", UserWarning)
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{file}: not a plain state dict, torch.load(weights_only=True) refused it; "
            "save one with torch.save(model.state_dict(), FILE) or as safetensors"
        ) from error
    except Exception as error:  # a damaged archive raises RuntimeError, EOFError, OSError, ValueError and others
        raise ModelError(f"{file}: not a readable PyTorch checkpoint ({reason(error)})") from error


def _check_archive(file: Path) -> None:
    """Compare the checksums of an archive by torch.save: torch.load does not, so damaged weights would be loaded."""
    try:
        if not zipfile.is_zipfile(file):
            return
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
    except Exception as error:  # damaged archives raise BadZipFile, NotImplementedError, zlib.error and others
        raise ModelError(f"{file}: a damaged archive ({reason(error)})") from error
    if damaged is not None:
        raise ModelError(
            f"{file}: the checksum of {damaged} in it is wrong: the file is damaged (or was saved without, by "
            "torch.serialization.set_crc32_options(False): save it once more with them)"
        )


def _fit(model: torch.nn.Module, state: Mapping[str, torch.Tensor], source: str) -> None:
    own = model.state_dict()
    # Written before PyTorch 1.0, or by exporters that leave the counters out: evaluation does not read them.
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in own]
    reshaped = [
        f"{key} {list(state[key].shape)} instead of {list(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    of_another_kind = [
        f"{key} {_kind(state[key])} instead of {own[key].dtype}"
        for key in own
        if key in state and not _fits_kind(state[key], own[key])
    ]
    problems = [
        f"{len(keys)} {label} ({_some(keys)})"
        for label, keys in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", reshaped),
            ("of another kind", of_another_kind),
        )
        if keys
    ]
    if problems:
        hint = _hint(model, state)
        raise ModelError(f"wrong checkpoint: {source} does not fit the model: {'; '.join(problems)}{hint}")
    model.load_state_dict(state, strict=False)


def _kind(tensor: Tensor) -> str:
    """The dtype, and what else sets a tensor apart from one that holds its values."""
    if tensor.is_meta:
        return f"{tensor.dtype} without values (meta device)"
    return str(tensor.dtype) if tensor.layout == torch.strided else f"{tensor.dtype} as {tensor.layout}"


def _fits_kind(given: Tensor, own: Tensor) -> bool:
    """Whether copying keeps the values: quantised integers and complex numbers would be cast without a word."""
    dense = given.layout == torch.strided and not given.is_quantized and not given.is_meta
    return dense and given.is_complex() == own.is_complex() and given.is_floating_point() == own.is_floating_point()


def _hint(model: torch.nn.Module, state: Mapping[str, torch.Tensor]) -> str:
    classifier = getattr(model, "pretrained_cfg", {}).get("classifier")
    weight = state.get(f"{classifier}.weight") if isinstance(classifier, str) else None
    if weight is not None and weight.ndim > 0 and weight.shape[0] != getattr(model, "num_classes", None):
        return f"; its classifier has {weight.shape[0]} classes: pass --num-classes {weight.shape[0]}"
    return ""


def _some(keys: Sequence[str], limit: int = 3) -> str:
    more = f", and {len(keys) - limit} more" if len(keys) > limit else ""
    return ", ".join(keys[:limit]) + more


def _sha256(path: str | Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()
