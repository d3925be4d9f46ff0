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


def add_model_options(run: argparse.ArgumentParser, default: str | None = "demo") -> None:
    """Which model, with which weights and preprocessing: what :func:`load` reads, which takes None for "demo"."""
    model = run.add_argument_group("model")
    model.add_argument("--model", default=default, metavar="NAME", help="timm's name, or 'demo' (default)")
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
        "demo" if arguments.model is None else arguments.model,
        arguments.checkpoint,
        num_classes=arguments.num_classes,
        class_names=arguments.class_names,
        model_args=dict(arguments.model_arg),
        mean=arguments.mean,
        std=arguments.std,
        crop_pct=arguments.crop_pct,
    )


def add_attribution_options(what: argparse._ArgumentGroup) -> None:
    """Rule and precision: what :func:`map_settings` writes down."""
    what.add_argument(
        "--rule",
        default="abslrp",
        metavar="RULE",
        help="NAME or NAME:setting=value,setting=value, as --list-rules names them (default: abslrp)",
    )
    what.add_argument("--list-rules", action=_ListRules, help="print the rules with their settings and exit")
    what.add_argument(
        "--precision", default="mixed", choices=["float64", "float32", "mixed", "fast"], help="default: mixed"
    )
    what.add_argument("--contrast", default="others", choices=["others", "none"], help="default: others")
    what.add_argument("--normalize", default="max", choices=["max", "sum", "none"], help="default: max")
    what.add_argument(
        "--strict",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="refuse operations without a rule (default), or use the generic definition",
    )


class _ListRules(argparse.Action):
    def __init__(self, option_strings: Any, dest: str, **options: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, **options)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from ramp_fast.rules import NAMED

        lines = []
        for name, rule in sorted(NAMED.items()):
            settings = ", ".join(
                a.name if a.default is a.empty else f"{a.name}={a.default}" for a in rule.settings.values()
            )
            lines.append(f"{name}: {rule.about}{f' ({settings})' if settings else ''}")
        say("\n".join(lines), sys.stdout)
        parser.exit()


def rule_settings(arguments: argparse.Namespace) -> dict[str, object]:
    """What a map depends on beside model, target and image: without it a rerun takes others for finished."""
    return {
        "model_args": {key: repr(value) for key, value in sorted(dict(arguments.model_arg).items())},
        "rule": arguments.rule,
        "precision": arguments.precision,
        "contrast": arguments.contrast,
        "normalize": arguments.normalize,
        "strict": arguments.strict,
    }


def model_settings(loaded: LoadedModel) -> dict[str, object]:
    """What a map depends on of a model that was loaded."""
    return {
        "model": loaded.name,
        "weights": loaded.weights,
        "class_names": loaded.class_names.digest(),
        "preprocessing": loaded.preprocessing.settings(),
    }


def state_settings(loaded: LoadedModel) -> dict[str, object]:
    """The same, with what its weights are themselves: what a store of maps keeps of a model."""
    from ramp_fast.pipeline.planning import weights_digest

    return {**model_settings(loaded), "state_sha256": weights_digest(loaded.model)}


def part_of(text: str) -> tuple[int, int]:
    """The type of I/N."""
    number, _, count_ = text.partition("/")
    if not (number.isdecimal() and count_.isdecimal() and 1 <= int(number) <= int(count_)):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not I/N with I from 1 to N")
    return int(number), int(count_)


def add_source_options(data: argparse._ArgumentGroup) -> None:
    """How a source of images is read: what :func:`source_options` gives on."""
    data.add_argument(
        "--layout",
        default="auto",
        choices=["auto", "flat", "folders", "tiny-imagenet", "voc", "webdataset", "parquet"],
        help="how it is laid out (default: told by what is in it)",
    )
    data.add_argument(
        "--split", metavar="NAME", help="of Tiny ImageNet or Pascal VOC (default: val), or of archives named by it"
    )
    data.add_argument("--labels", metavar="FILE", help="the class of every image, where the source has none")
    data.add_argument(
        "--class-of",
        type=key_value,
        action="append",
        default=[],
        metavar="NAME=K",
        help="for Pascal VOC: the model's class of one of its classes; may be repeated",
    )
    data.add_argument("--limit", type=count(1), metavar="N", help="take so many images, evenly spaced")


def source_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Arguments of :func:`ramp_fast.data.open_source` that the options ask for."""
    return {
        "layout": arguments.layout,
        "split": arguments.split,
        "labels": arguments.labels,
        "targets": {name: _class_number(name, k) for name, k in arguments.class_of} or None,
        "limit": arguments.limit,
    }


def _class_number(name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise InputError(f"--class-of {name}={value}: {value!r} is not the number of a class")
    return value


def add_running_options(
    how: argparse._ArgumentGroup, readers: str = "threads that read images (default: up to 4)"
) -> None:
    """Device, threads, errors."""
    how.add_argument(
        "--device", default="auto", metavar="DEVICE", help="cpu, cuda, ... (default: cuda if there is one)"
    )
    how.add_argument("--workers", type=count(0, 256), metavar="N", help=readers)
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
