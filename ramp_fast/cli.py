"""The ``ramp-fast`` command. ``ramp-fast attribute`` turns photographs into relevance maps and pictures."""

from __future__ import annotations

import argparse
import ast
import errno
import os
import sys
import time
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, Protocol

from ramp_fast.errors import InputError, RampFastError

# torch and timm take seconds to import: `--help` and a mistyped option should not wait for them.
if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

    from ramp_fast.data import ImageError, ImageItem, Problem
    from ramp_fast.models import LoadedModel
    from ramp_fast.store import Store

__all__ = ["main", "make_engine"]

OK, FAILED, INTERRUPTED = 0, 2, 130

NAMED_FAILURES = 20
"""How many failures the summary names; each one was reported when it happened."""

# The disk is full, over quota or gone: every further image would fail in the same way.
FATAL_ERRNO = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO})


class _Engine(Protocol):
    def attribute(
        self, images: torch.Tensor, target: int | None = ..., contrast: str = ..., normalize: str = ...
    ) -> Any: ...


def make_engine(model: torch.nn.Module, *, rule: str, precision: str, strict: bool) -> _Engine:
    """The engine that attributes a model.

    Parameters
    ----------
    model : torch.nn.Module
        In evaluation mode, on its device.
    rule, precision : str
        As for ``ramp_fast.Engine``.
    strict : bool
        As for ``ramp_fast.Engine``.
    """
    from ramp_fast import Engine

    engine: _Engine = Engine(model, rule=rule, precision=precision, strict=strict)
    return engine


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments without the program's name; by default those of the process.

    Returns
    -------
    int
        0 when all was done, 2 when anything failed, 130 when interrupted.
    """
    parser = _parser()
    try:
        arguments = parser.parse_args(argv)
    except SystemExit as stop:  # argparse has printed the reason, or the help
        return int(stop.code or 0)
    try:
        return _attribute(arguments)
    except KeyboardInterrupt:
        _complain("interrupted; finished images are kept, the same command goes on from there")
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has gone; without this the interpreter complains again on exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except RampFastError as error:
        if arguments.debug:
            raise
        _complain(str(error))
        return FAILED
    except Exception as error:
        if arguments.debug:
            raise
        _complain(f"{_reason(error)} (--debug shows where)")
        return FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ramp-fast", description="Fast absLRP attributions for image classifiers.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    run = commands.add_parser(
        "attribute",
        help="attribute photographs",
        description="Attribute photographs: for each an overlay (.png) and the raw map (.npz), and a contact sheet.",
        epilog="Without PATH the demonstration's photographs are attributed. A rerun skips what is finished.",
    )
    run.add_argument("paths", nargs="*", metavar="PATH", help="images, or folders to search for them")
    run.add_argument("--out", required=True, metavar="DIR", help="folder for the results, made when missing")

    model = run.add_argument_group("model")
    model.add_argument("--model", default="demo", metavar="NAME", help="timm's name, or 'demo' (default)")
    model.add_argument("--checkpoint", metavar="FILE", help="weights: safetensors, or a state dict by torch.save")
    model.add_argument("--num-classes", type=_positive, metavar="N", help="classes of the checkpoint")
    model.add_argument("--class-names", metavar="FILE", help="text file, one name per line (default: ImageNet's)")
    model.add_argument(
        "--model-arg",
        type=_key_value,
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="further argument of timm.create_model, as img_size=384; may be repeated",
    )
    model.add_argument("--mean", type=float, nargs=3, metavar=("R", "G", "B"), help="replaces timm's mean, in [0, 1]")
    model.add_argument("--std", type=float, nargs=3, metavar=("R", "G", "B"), help="replaces timm's std, in [0, 1]")
    model.add_argument("--crop-pct", type=float, metavar="P", help="replaces timm's share of the image kept")

    what = run.add_argument_group("attribution")
    what.add_argument("--target", type=int, metavar="K", help="class to explain (default: the predicted one)")
    what.add_argument("--rule", default="abslrp", metavar="RULE", help="abslrp (default) or abslrp-release")
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

    how = run.add_argument_group("running")
    how.add_argument("--batch-size", type=_positive, default=8, metavar="N", help="default: 8")
    how.add_argument(
        "--device", default="auto", metavar="DEVICE", help="cpu, cuda, ... (default: cuda if there is one)"
    )
    how.add_argument("--workers", type=_not_negative, metavar="N", help="threads that read images (default: up to 4)")
    how.add_argument("--overwrite", action="store_true", help="do finished images again")
    how.add_argument("--overlay", action=argparse.BooleanOptionalAction, default=True, help="write overlays (default)")
    how.add_argument(
        "--sheet",
        type=_not_negative,
        default=24,
        metavar="N",
        help="images on the contact sheet, 0 for none (default 24)",
    )
    how.add_argument(
        "--progress", action=argparse.BooleanOptionalAction, default=None, help="progress bar (default: on a terminal)"
    )
    how.add_argument("--quiet", action="store_true", help="no line per image")
    how.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


_positive.__name__ = "number"  # argparse puts it into its messages


def _not_negative(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return value


_not_negative.__name__ = "number"


def _key_value(text: str) -> tuple[str, Any]:
    key, separator, value = text.partition("=")
    if not separator or not key.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return text if len(text) <= 300 else f"{text[:300]}..."


def _shown(path: str) -> str:
    # File names may hold anything; a message is one line that every terminal can print.
    return path if path.isprintable() else path.encode("unicode_escape", "replace").decode("ascii")


def _complain(message: str) -> None:
    print(f"ramp-fast: {message}", file=sys.stderr, flush=True)


@dataclass
class _Report:
    """What became of the images so far."""

    bar: Any = None
    quiet: bool = False
    done: int = 0
    skipped: int = 0
    own: int = 0
    failed: int = 0
    first_failed: list[str] = field(default_factory=list)

    def failure(self, path: str, message: str) -> None:
        self.failed += 1
        if len(self.first_failed) < NAMED_FAILURES:
            self.first_failed.append(_shown(path))
        self._line(f"ramp-fast: {_shown(path)}: {message}", sys.stderr)
        self._advance()

    def finished(self, path: str, name: str, probability: float) -> None:
        self.done += 1
        if not self.quiet:
            self._line(f"{_shown(path)}: {name} ({100 * probability:.1f} %)", sys.stdout)
        self._advance()

    def skip(self) -> None:
        self.skipped += 1
        self._advance()

    def pass_over(self) -> None:
        self.own += 1
        self._advance()

    def _advance(self) -> None:
        if self.bar is not None:
            self.bar.update()

    def _line(self, text: str, stream: Any) -> None:
        if self.bar is None:
            print(text, file=stream, flush=True)
        else:
            self.bar.write(text, file=stream)

    def summary(self, out: str, seconds: float) -> str:
        parts = [f"{self.done} attributed"]
        if self.skipped:
            parts.append(f"{self.skipped} skipped (finished before)")
        if self.own:
            parts.append(f"{self.own} passed over (pictures made by ramp-fast)")
        if self.failed:
            more = self.failed - len(self.first_failed)
            names = ", ".join(self.first_failed) + (f" and {more} more" if more else "")
            parts.append(f"{self.failed} failed: {names}")
        return f"{_shown(out)}: {'; '.join(parts)} ({seconds:.1f} s)"


def _attribute(arguments: argparse.Namespace) -> int:
    from ramp_fast.data import ImageItem, find_images
    from ramp_fast.demo import demo_photographs
    from ramp_fast.store import check_writable

    started = time.perf_counter()
    photographs = [str(p) for p in demo_photographs()]
    paths = list(arguments.paths) or photographs
    if paths == ["demo"] and not os.path.exists("demo"):
        paths = photographs
    check_writable(arguments.out)

    report = _Report(quiet=arguments.quiet)
    items = find_images(paths, out=arguments.out)
    # Nothing readable at all should not cost the loading of a model.
    first: list[ImageItem] = []
    stopped = False
    for entry in items:
        if isinstance(entry, ImageItem):
            first.append(entry)
            break
        report.failure(entry.path, entry.message)
    if first:
        with warnings.catch_warnings():
            # Pillow warns of large images and odd metadata; what matters of it is an error of its own here.
            warnings.filterwarnings("ignore", module=r"PIL\.")
            try:
                _attribute_all(arguments, paths, chain(first, items), report)
            except RampFastError as error:
                if arguments.debug or not report.done:
                    raise
                # What was done before counts: the disk may have filled up after hours.
                _complain(str(error))
                stopped = True
    print(report.summary(arguments.out, time.perf_counter() - started), file=sys.stdout, flush=True)
    return FAILED if report.failed or stopped else OK


def _device(name: str) -> torch.device:
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"device {name!r} cannot be used here: {_reason(error)[:120]}") from error
    return device


def _attribute_all(
    arguments: argparse.Namespace, paths: Sequence[str], items: Iterable[ImageItem | Problem], report: _Report
) -> None:
    from ramp_fast.models import load_model
    from ramp_fast.store import Store

    device = _device(arguments.device)
    loaded = load_model(
        arguments.model,
        arguments.checkpoint,
        num_classes=arguments.num_classes,
        class_names=arguments.class_names,
        model_args=dict(arguments.model_arg),
        mean=arguments.mean,
        std=arguments.std,
        crop_pct=arguments.crop_pct,
    )
    classes = len(loaded.class_names)
    if arguments.target is not None and not 0 <= arguments.target < classes:
        raise InputError(f"target {arguments.target} is out of range: {loaded.name} has classes 0 to {classes - 1}")
    store = Store(arguments.out, _settings(arguments, loaded), overlays=arguments.overlay)
    job = _Job(arguments, loaded, device, store, report)

    show_bar = sys.stderr.isatty() if arguments.progress is None else arguments.progress
    if show_bar:
        report.bar = _progress_bar(paths, arguments.out, already=report.failed)
    try:
        job.run(items)
    finally:
        if report.bar is not None:
            report.bar.close()
            report.bar = None
    job.write_sheet()


def _settings(arguments: argparse.Namespace, loaded: LoadedModel) -> dict[str, object]:
    return {
        "model": loaded.name,
        "weights": loaded.weights,
        "model_args": {key: repr(value) for key, value in sorted(dict(arguments.model_arg).items())},
        "preprocessing": loaded.preprocessing.settings(),
        "rule": arguments.rule,
        "precision": arguments.precision,
        "contrast": arguments.contrast,
        "normalize": arguments.normalize,
        "strict": arguments.strict,
        "target": "predicted" if arguments.target is None else arguments.target,
    }


def _progress_bar(paths: Sequence[str], out: str, already: int) -> Any:
    from tqdm import tqdm

    from ramp_fast.data import find_images

    # A second walk over the names, cheap beside one image, gives the bar its end.
    total = sum(1 for _ in find_images(paths, out=out))
    return tqdm(total=total, initial=already, unit="image", file=sys.stderr, dynamic_ncols=True)


@dataclass
class _Read:
    item: ImageItem
    tensor: torch.Tensor


class _Job:
    """One run: read ahead in threads, attribute in batches, write each result as soon as it is there."""

    def __init__(
        self, arguments: argparse.Namespace, loaded: LoadedModel, device: torch.device, store: Store, report: _Report
    ) -> None:
        self.arguments = arguments
        self.loaded = loaded
        self.device = device
        self.store = store
        self.report = report
        self.names = loaded.class_names.all()
        self.engine: _Engine | None = None
        self.on_sheet: list[tuple[str, str]] = []

    def run(self, items: Iterable[ImageItem | Problem]) -> None:
        batch: list[_Read] = []
        for read in self._read_ahead(self._unfinished(items)):
            batch.append(read)
            if len(batch) == self.arguments.batch_size:
                self._attribute(batch)
                batch = []
        if batch:
            self._attribute(batch)

    def _unfinished(self, items: Iterable[ImageItem | Problem]) -> Iterator[ImageItem]:
        from ramp_fast.data import Problem

        for entry in items:
            if isinstance(entry, Problem):
                self.report.failure(entry.path, entry.message)
            elif not self.arguments.overwrite and self.store.is_finished(entry.key, entry.path):
                self.report.skip()
                self._to_sheet(entry)
            else:
                yield entry

    def _read_ahead(self, items: Iterator[ImageItem]) -> Iterator[_Read]:
        from ramp_fast.data import ImageError

        workers = min(4, os.cpu_count() or 1) if self.arguments.workers is None else self.arguments.workers
        if workers == 0:
            for item in items:
                try:
                    yield self._read(item)
                except ImageError as error:
                    self._unreadable(item, error)
            return
        # The window bounds memory: so many images are decoded and waiting, whatever the folder holds.
        window = workers + self.arguments.batch_size
        pool = ThreadPoolExecutor(workers, thread_name_prefix="ramp-fast-read")
        waiting: deque[tuple[ImageItem, Future[_Read]]] = deque()
        try:
            while True:
                for item in islice(items, window - len(waiting)):
                    waiting.append((item, pool.submit(self._read, item)))
                if not waiting:
                    return
                item, future = waiting.popleft()
                try:
                    yield future.result()
                except ImageError as error:
                    self._unreadable(item, error)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _unreadable(self, item: ImageItem, error: ImageError) -> None:
        from ramp_fast.data import OwnPictureError

        if isinstance(error, OwnPictureError):
            self.report.pass_over()
        else:
            self.report.failure(item.path, str(error))

    def _read(self, item: ImageItem) -> _Read:
        from ramp_fast.data import read_image

        return _Read(item, self.loaded.preprocessing(read_image(item.path)))

    def _attribute(self, batch: list[_Read]) -> None:
        import torch

        arguments = self.arguments
        if self.engine is None:
            self.loaded.model.to(self.device)
            self.engine = make_engine(
                self.loaded.model, rule=arguments.rule, precision=arguments.precision, strict=arguments.strict
            )
        images = torch.stack([read.tensor for read in batch]).to(self.device)
        try:
            found = self.engine.attribute(
                images, target=arguments.target, contrast=arguments.contrast, normalize=arguments.normalize
            )
        except RampFastError:
            raise  # the model or the settings: the same for every image
        except torch.OutOfMemoryError as error:
            raise RampFastError(f"out of memory on {self.device}; try a smaller --batch-size") from error
        except Exception as error:
            if arguments.debug:
                raise
            for read in batch:
                self.report.failure(read.item.path, f"the attribution failed: {_reason(error)}")
            return
        maps, targets, logits = (t.detach().cpu().numpy() for t in (found.maps, found.target, found.logits))
        for read, relevance, target, outputs in zip(batch, maps, targets, logits, strict=True):
            self._write(read, relevance, int(target), outputs)

    def _write(
        self, read: _Read, relevance: npt.NDArray[np.float32], target: int, logits: npt.NDArray[np.float32]
    ) -> None:
        import numpy

        from ramp_fast.render import overlay
        from ramp_fast.store import Result, StoreError

        if not (numpy.isfinite(relevance).all() and numpy.isfinite(logits).all()):
            self.report.failure(read.item.path, "the map or the logits are not finite; nothing was written")
            return
        result = Result(relevance, target, logits, self.names)
        name, probability = self.names[target], result.probability()
        picture = None
        if self.arguments.overlay:
            picture = overlay(self.loaded.preprocessing.to_display(read.tensor), relevance, name, probability)
        try:
            self.store.save(read.item.key, read.item.path, result, picture)
        except StoreError as error:
            self.report.failure(read.item.path, str(error))
            return
        except OSError as error:
            if error.errno in FATAL_ERRNO:
                raise RampFastError(f"cannot write to {self.arguments.out}: {error.strerror}") from error
            self.report.failure(read.item.path, f"cannot write its result: {_reason(error)}")
            return
        self.report.finished(read.item.path, name, probability)
        self._to_sheet(read.item)

    def _to_sheet(self, item: ImageItem) -> None:
        if self.arguments.overlay and len(self.on_sheet) < self.arguments.sheet:
            self.on_sheet.append((item.key, str(self.store.picture_path(item.key))))

    def write_sheet(self) -> None:
        """Write the contact sheet of the first images, those finished before included."""
        from PIL import Image

        from ramp_fast.render import contact_sheet
        from ramp_fast.store import save_picture

        if len(self.on_sheet) < 2:
            return
        pictures = []
        for key, path in self.on_sheet:
            try:
                with Image.open(path) as picture:
                    pictures.append((key, picture.convert("RGB")))
            except OSError:
                continue  # removed or replaced by someone since
        if pictures:
            save_picture(self.store.folder / "contact_sheet.png", contact_sheet(pictures))


if __name__ == "__main__":
    sys.exit(main())
