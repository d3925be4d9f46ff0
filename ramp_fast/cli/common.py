"""What the commands share: exit codes, options of models, messages."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from ramp_fast.errors import InputError
from ramp_fast.specs import literal

# torch and timm take seconds to import: `--help` and a mistyped option should not wait for them.
if TYPE_CHECKING:
    import torch

    from ramp_fast.models import LoadedModel

OK, FAILED, INTERRUPTED = 0, 2, 130


def positive(text: str) -> int:
    """The type of a count."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


positive.__name__ = "number"  # argparse puts it into its messages


def not_negative(text: str) -> int:
    """The type of a count that may be 0."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return value


not_negative.__name__ = "number"


def key_value(text: str) -> tuple[str, Any]:
    """The type of KEY=VALUE; a value is a Python literal or text."""
    key, separator, value = text.partition("=")
    if not separator or not key.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    return key, literal(value)


def add_model_options(run: argparse.ArgumentParser) -> None:
    """Which model, with which weights and preprocessing: what :func:`load` reads."""
    model = run.add_argument_group("model")
    model.add_argument("--model", default="demo", metavar="NAME", help="timm's name, or 'demo' (default)")
    model.add_argument("--checkpoint", metavar="FILE", help="weights: safetensors, or a state dict by torch.save")
    model.add_argument("--num-classes", type=positive, metavar="N", help="classes of the checkpoint")
    model.add_argument("--class-names", metavar="FILE", help="text file, one name per line (default: ImageNet's)")
    model.add_argument(
        "--model-arg",
        type=key_value,
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="further argument of timm.create_model, as img_size=384; may be repeated",
    )
    model.add_argument("--mean", type=float, nargs=3, metavar=("R", "G", "B"), help="replaces timm's mean, in [0, 1]")
    model.add_argument("--std", type=float, nargs=3, metavar=("R", "G", "B"), help="replaces timm's std, in [0, 1]")
    model.add_argument("--crop-pct", type=float, metavar="P", help="replaces timm's share of the image kept")


def load(arguments: argparse.Namespace) -> LoadedModel:
    """The model that was asked for, on the CPU."""
    from ramp_fast.models import load_model

    return load_model(
        arguments.model,
        arguments.checkpoint,
        num_classes=arguments.num_classes,
        class_names=arguments.class_names,
        model_args=dict(arguments.model_arg),
        mean=arguments.mean,
        std=arguments.std,
        crop_pct=arguments.crop_pct,
    )


def add_running_options(how: argparse._ArgumentGroup) -> None:
    """Device, threads, errors."""
    how.add_argument(
        "--device", default="auto", metavar="DEVICE", help="cpu, cuda, ... (default: cuda if there is one)"
    )
    how.add_argument("--workers", type=not_negative, metavar="N", help="threads that read images (default: up to 4)")
    how.add_argument(
        "--progress", action=argparse.BooleanOptionalAction, default=None, help="progress bar (default: on a terminal)"
    )
    how.add_argument("--debug", action="store_true", help="show the traceback of an error")


def chosen_device(name: str) -> torch.device:
    """The device of that name, a GPU where there is one for "auto".

    Raises
    ------
    InputError
        It cannot be used here.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"device {name!r} cannot be used here: {reason(error)[:120]}") from error
    return device


def shows_bar(arguments: argparse.Namespace) -> bool:
    """Whether there is a progress bar: as said, or on a terminal."""
    return sys.stderr.isatty() if arguments.progress is None else bool(arguments.progress)


def reason(error: BaseException) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return text if len(text) <= 300 else f"{text[:300]}..."


def shown(path: str) -> str:
    """A file's name in one printable line."""
    # File names may hold anything; a message is one line that every terminal can print.
    return path if path.isprintable() else path.encode("unicode_escape", "replace").decode("ascii")


def complain(message: str) -> None:
    """Say what went wrong."""
    print(f"ramp-fast: {message}", file=sys.stderr, flush=True)
