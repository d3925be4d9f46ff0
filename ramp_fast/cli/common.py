"""What the commands share: exit codes, options of models, messages."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TextIO

from ramp_fast._files import printable
from ramp_fast._files import reason as file_reason
from ramp_fast.errors import InputError, RampFastError
from ramp_fast.specs import literal

# torch and timm take seconds to import: `--help` and a mistyped option should not wait for them.
if TYPE_CHECKING:
    import torch

    from ramp_fast.models import LoadedModel

OK, FAILED, INTERRUPTED = 0, 2, 130


MOST = 2**31 - 1
"""The largest number that is a count."""


class OutputError(RampFastError):
    """What is printed cannot be written: its reader has gone, or the disk is full."""


def count(least: int, most: int = MOST) -> Callable[[str], int]:
    """The type of a count from ``least`` to ``most``."""

    def number(text: str) -> int:
        value = int(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{printable(text[:40])} is not between {least} and {most}")
        return value

    return number  # argparse puts its name into messages


def key_value(text: str) -> tuple[str, Any]:
    """The type of KEY=VALUE; a value is a Python literal or text."""
    key, separator, value = text.partition("=")
    if not separator or not key.isidentifier():
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not KEY=VALUE")
    try:
        return key, literal(value)
    except InputError as error:
        raise argparse.ArgumentTypeError(f"{key}={printable(str(error))}") from error


def add_model_options(run: argparse.ArgumentParser) -> None:
    """Which model, with which weights and preprocessing: what :func:`load` reads."""
    model = run.add_argument_group("model")
    model.add_argument("--model", default="demo", metavar="NAME", help="timm's name, or 'demo' (default)")
    model.add_argument("--checkpoint", metavar="FILE", help="weights: safetensors, or a state dict by torch.save")
    model.add_argument("--num-classes", type=count(1), metavar="N", help="classes of the checkpoint")
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

    for option, name in (("--checkpoint", arguments.checkpoint), ("--class-names", arguments.class_names)):
        if name == "":  # which pathlib takes for the current folder
            raise InputError(f"{option} has an empty name")
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
    how.add_argument("--workers", type=count(0, 256), metavar="N", help="threads that read images (default: up to 4)")
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
    if sys.stderr is None or sys.stderr.closed:  # as daemons have it
        return False
    return sys.stderr.isatty() if arguments.progress is None else bool(arguments.progress)


def reason(error: BaseException) -> str:
    """An error in one line."""
    if isinstance(error, OSError) and error.strerror:
        text = file_reason(error)
        return f"{text}: {error.filename}" if error.filename else text
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]}..."


def printed(text: str, stream: TextIO) -> str:
    """The text as the stream can encode it; characters it has not are shown as escapes."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding, "replace")


def say(text: str, stream: TextIO | None, bar: Any = None) -> None:
    """Print text, above the progress bar if there is one; nothing where the stream is closed.

    Raises
    ------
    OutputError
        The stream takes no more; from now on what is printed there is dropped.
    """
    if stream is None or stream.closed:
        return
    try:
        if bar is None:
            print(printed(text, stream), file=stream, flush=True)
        else:
            bar.write(printed(text, stream), file=stream)
    except OSError as error:
        silence(stream)
        raise OutputError(f"cannot print: {file_reason(error)}") from error


def say_line(text: str, stream: TextIO | None, bar: Any = None) -> None:
    """As :func:`say`, in one line whatever a name within the text holds."""
    say(printable(text), stream, bar)


def silence(stream: TextIO) -> None:
    """Drop what is printed to a stream from now on; otherwise the interpreter complains once more on exit."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # streams within Python have no descriptor
        descriptor = stream.fileno()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, descriptor)
        os.close(nowhere)


def complain(message: str) -> None:
    """Say what went wrong, in one line."""
    with contextlib.suppress(OutputError):
        say_line(f"ramp-fast: {message}", sys.stderr)
