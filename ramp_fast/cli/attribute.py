"""``ramp-fast attribute`` turns photographs into relevance maps and pictures."""

from __future__ import annotations

import argparse
import errno
import json
import os
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ramp_fast._files import reason as file_reason
from ramp_fast.cli.common import (
    FAILED,
    OK,
    add_attribution_options,
    add_model_options,
    add_running_options,
    chosen_device,
    complain,
    count,
    load,
    model_settings,
    reason,
    rule_settings,
    say_line,
    shows_bar,
)
from ramp_fast.errors import InputError, RampFastError

# torch and timm take seconds to import: `--help` and a mistyped option should not wait for them.
if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

    from ramp_fast.data import ImageError, ImageItem, Problem
    from ramp_fast.models import LoadedModel
    from ramp_fast.results.store import Store

__all__ = ["add_command", "make_engine"]

NAMED_FAILURES = 20
"""How many failures the summary names; each one was reported when it happened."""

SHEET = "contact_sheet.png"

# The entry of the sheet's PNG that says which pictures are on it.
SHEET_PICTURES = "Pictures"

# The disk is full, over quota or gone: every further image would fail in the same way.
FATAL_ERRNO = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO})


class _Engine(Protocol):
    def classes(self, images: torch.Tensor) -> int: ...

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


def add_command(commands: Any) -> None:
    """``ramp-fast attribute``."""
    run = commands.add_parser(
        "attribute",
        help="attribute photographs",
        description="Attribute photographs: for each an overlay (.png) and the raw map (.npz), and a contact sheet.",
        epilog="Without PATH the demonstration's photographs are attributed. A rerun skips what is finished.",
    )
    run.add_argument("paths", nargs="*", metavar="PATH", help="images, or folders to search for them")
    run.add_argument("--out", required=True, metavar="DIR", help="folder for the results, made when missing")

    add_model_options(run)

    what = run.add_argument_group("attribution")
    what.add_argument("--target", type=int, metavar="K", help="class to explain (default: the predicted one)")
    add_attribution_options(what)

    how = run.add_argument_group("running")
    how.add_argument("--batch-size", type=count(1), default=8, metavar="N", help="default: 8")
    add_running_options(how)
    how.add_argument("--overwrite", action="store_true", help="do finished images again")
    how.add_argument("--overlay", action=argparse.BooleanOptionalAction, default=True, help="write overlays (default)")
    how.add_argument(
        "--sheet",
        type=count(0, 1000),
        default=24,
        metavar="N",
        help="images on the contact sheet, 0 for none (default 24)",
    )
    how.add_argument("--quiet", action="store_true", help="no line per image")
    run.set_defaults(run=_attribute, kept="finished images are kept, the same command goes on from there")


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
            self.first_failed.append(path)
        self._line(f"ramp-fast: {path}: {message}", sys.stderr)
        self._advance()

    def note(self, path: str, message: str) -> None:
        self._line(f"ramp-fast: {path}: {message}", sys.stderr)

    def finished(self, path: str, name: str, probability: float) -> None:
        self.done += 1
        if not self.quiet:
            self._line(f"{path}: {name} ({100 * probability:.1f} %)", sys.stdout)
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
        say_line(text, stream, self.bar)

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
        return f"{out}: {'; '.join(parts)} ({seconds:.1f} s)"


def _attribute(arguments: argparse.Namespace) -> int:
    from ramp_fast.data import ImageItem, find_images
    from ramp_fast.demo import demo_photographs
    from ramp_fast.results.store import check_writable

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
                complain(str(error))
                stopped = True
    say_line(report.summary(arguments.out, time.perf_counter() - started), sys.stdout)
    return FAILED if report.failed or stopped else OK


def _attribute_all(
    arguments: argparse.Namespace, paths: Sequence[str], items: Iterable[ImageItem | Problem], report: _Report
) -> None:
    from ramp_fast.results.store import Store, check_free

    if arguments.overlay and arguments.sheet and (len(paths) > 1 or os.path.isdir(paths[0])):
        check_free(Path(arguments.out) / SHEET)  # hours later would be late
    device = chosen_device(arguments.device)
    loaded = load(arguments)
    classes = len(loaded.class_names)
    if arguments.target is not None and not 0 <= arguments.target < classes:
        raise InputError(f"target {arguments.target} is out of range: {loaded.name} has classes 0 to {classes - 1}")
    store = Store(arguments.out, _settings(arguments, loaded), overlays=arguments.overlay)
    job = _Job(arguments, loaded, device, store, report)

    if shows_bar(arguments):
        report.bar = _progress_bar(paths, arguments.out, already=report.failed)
    try:
        job.run(items)
    except BaseException:
        job.remove_old_sheet()  # pictures on it may have been replaced
        raise
    finally:
        if report.bar is not None:
            report.bar.close()
            report.bar = None
    job.write_sheet()


def _settings(arguments: argparse.Namespace, loaded: LoadedModel) -> dict[str, object]:
    target = "predicted" if arguments.target is None else arguments.target
    return {**model_settings(loaded), **rule_settings(arguments), "target": target}


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
    image: dict[str, object]  # the fingerprint of the file


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
        self.on_sheet: list[str] = []

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
            elif not self._may_write(entry):
                continue
            elif self._is_done(entry):
                self.report.skip()
                self._to_sheet(entry)
            else:
                yield entry

    def _is_done(self, item: ImageItem) -> bool:
        from ramp_fast.results.store import State

        if self.arguments.overwrite:
            return False
        state = self.store.state(item.key, item.path)
        if state in (State.DAMAGED, State.MIXED):
            path = (self.store.map_path if state is State.DAMAGED else self.store.picture_path)(item.key)
            self.report.note(item.path, f"{state.value} ({path}); it is done again")
        return state is State.FINISHED

    def _may_write(self, item: ImageItem) -> bool:
        """Whether its result can have its names: asked before anything is computed."""
        from ramp_fast.results.store import StoreError

        try:
            self.store.check_free(item.key, item.path)
        except StoreError as error:
            self.report.failure(item.path, str(error))
        except OSError as error:
            self.report.failure(item.path, f"cannot write its result: {reason(error)}")
        else:
            return True
        return False

    def _read_ahead(self, items: Iterator[ImageItem]) -> Iterator[_Read]:
        from ramp_fast.data import ImageError
        from ramp_fast.data.reading import read_ahead, usual_workers

        arguments = self.arguments
        workers = usual_workers() if arguments.workers is None else arguments.workers
        # The window bounds memory: so many images are decoded and waiting, whatever the folder holds.
        for item, read in read_ahead(items, self._attempt, workers, workers + arguments.batch_size):
            if isinstance(read, ImageError):
                self._unreadable(item, read)
            else:
                yield read

    def _attempt(self, item: ImageItem) -> tuple[ImageItem, _Read | ImageError]:
        from ramp_fast.data import ImageError

        try:
            return item, self._read(item)
        except ImageError as error:
            return item, error

    def _unreadable(self, item: ImageItem, error: ImageError) -> None:
        from ramp_fast.data import OwnPictureError

        if isinstance(error, OwnPictureError):
            self.report.pass_over()
        else:
            self.store.discard(item.key, item.path)  # of what the file held before, or of other settings
            self.report.failure(item.path, str(error))

    def _read(self, item: ImageItem) -> _Read:
        from ramp_fast.data import ImageError, read_image
        from ramp_fast.results.store import fingerprint

        try:
            image = fingerprint(item.path)  # before: if the file changes meanwhile, the result is that of the old one
        except OSError as error:
            read_image(item.path)  # which says why it cannot be read
            raise ImageError(file_reason(error)) from error
        return _Read(item, self.loaded.preprocessing(read_image(item.path)), image)

    def _attribute(self, batch: list[_Read]) -> None:
        import torch

        arguments = self.arguments
        images = torch.stack([read.tensor for read in batch]).to(self.device)
        if self.engine is None:
            self.loaded.model.to(self.device)
            self.engine = make_engine(
                self.loaded.model, rule=arguments.rule, precision=arguments.precision, strict=arguments.strict
            )
            if arguments.contrast == "others" and self.engine.classes(images) == 1:
                raise InputError("the model has one class, and no others to contrast it with: pass --contrast none")
        try:
            found = self.engine.attribute(
                images, target=arguments.target, contrast=arguments.contrast, normalize=arguments.normalize
            )
        except RampFastError:  # the model or the settings: the same for every image
            raise
        except torch.OutOfMemoryError as error:
            raise RampFastError(f"out of memory on {self.device}; try a smaller --batch-size") from error
        except Exception as error:
            if arguments.debug:
                raise
            for read in batch:
                self.report.failure(read.item.path, f"the attribution failed: {reason(error)}")
            return
        maps, targets, logits = (t.detach().cpu().numpy() for t in (found.maps, found.target, found.logits))
        for read, relevance, target, outputs in zip(batch, maps, targets, logits, strict=True):
            self._write(read, relevance, int(target), outputs)

    def _write(
        self, read: _Read, relevance: npt.NDArray[np.float32], target: int, logits: npt.NDArray[np.float32]
    ) -> None:
        import numpy

        from ramp_fast.results.render import overlay
        from ramp_fast.results.store import Result, StoreError

        if not (numpy.isfinite(relevance).all() and numpy.isfinite(logits).all()):
            self.store.discard(read.item.key)  # of other settings, which would pass for this one's
            self.report.failure(read.item.path, "the map or the logits are not finite; nothing was written")
            return
        result = Result(relevance, target, logits, self.names)
        name, probability = self.names[target], result.probability()
        picture = None
        if self.arguments.overlay:
            picture = overlay(self.loaded.preprocessing.to_display(read.tensor), relevance, name, probability)
        try:
            self.store.save(read.item.key, read.item.path, result, picture, read.image)
        except StoreError as error:
            self.report.failure(read.item.path, str(error))
            return
        except OSError as error:
            if error.errno in FATAL_ERRNO:
                raise RampFastError(f"cannot write to {self.arguments.out}: {error.strerror}") from error
            self.report.failure(read.item.path, f"cannot write its result: {reason(error)}")
            return
        self.report.finished(read.item.path, name, probability)
        self._to_sheet(read.item)

    def _to_sheet(self, item: ImageItem) -> None:
        if self.arguments.overlay and len(self.on_sheet) < self.arguments.sheet:
            self.on_sheet.append(item.key)

    def write_sheet(self) -> None:
        """Write the contact sheet of the first images, those finished before included, or remove an old one."""
        from PIL import Image

        from ramp_fast.results.render import contact_sheet
        from ramp_fast.results.store import check_free, save_picture

        path = self.store.folder / SHEET
        pictures, digests = [], {}
        for key, digest in self.store.picture_digests(self.on_sheet).items():
            try:
                with Image.open(self.store.picture_path(key), formats=["PNG"]) as picture:
                    pictures.append((key, picture.convert("RGB")))
            except (OSError, ValueError, SyntaxError):
                continue  # removed or replaced by someone since
            digests[key] = digest
        if len(self.on_sheet) > 1 and pictures:
            check_free(path)
            save_picture(path, contact_sheet(pictures), {SHEET_PICTURES: json.dumps(digests)})
        else:
            self.remove_old_sheet()

    def remove_old_sheet(self) -> None:
        """Remove the sheet of an earlier run if it is damaged, or shows a picture that is no longer there."""
        from PIL import Image

        from ramp_fast.results.store import check_free

        path = self.store.folder / SHEET
        try:
            check_free(path)
            with Image.open(path, formats=["PNG"]) as sheet:
                sheet.load()
                shown = json.loads(sheet.info[SHEET_PICTURES])
            if self.store.picture_digests(shown) == shown:
                return
        except (RampFastError, FileNotFoundError):
            return
        except Exception:  # broken pictures make Pillow raise almost anything
            pass
        path.unlink(missing_ok=True)
