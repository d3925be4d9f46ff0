"""Writing a report: one pass over the store, a block of images at a time."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ramp_fast._checks import positive
from ramp_fast._files import open_regular, printable, reason
from ramp_fast.report.photographs import Photograph, Photographs
from ramp_fast.report.pictures import Reduction, Sheets, coloured, fitting, reduced_photograph, scales
from ramp_fast.report.statistics import Block, ClassTable, box_shares, entropies, summed_maps
from ramp_fast.results.maps import RUNS, StoredMaps
from ramp_fast.results.marks import JSON_HEAD, SOFTWARE
from ramp_fast.results.store import StoreError, atomic_folder, remove_leftovers

__all__ = ["BLOCK", "MOST_IMAGES", "check_target", "write_report"]

BLOCK = 64
"""Images in memory at a time."""

MOST_IMAGES = 100_000
"""Of a gallery: the page holds a line of numbers for each."""

MANIFEST = "report.json"
FORMAT = 1
PAGE = ("index.html", "report.css", "report.js")

THUMBNAIL, DETAIL, MEAN = 96, 224, 64
"""Longer sides of pictures: in the gallery, of one image, of mean maps."""

ROWS, NAMES, DETAILS = 16384, 1024, 256
"""Images of a file of each kind."""

_SHOWN_FAILURES = 500
_SHOWN_RUNS = 50
_MISSING = 65535
"""In columns of 16 bits: no value."""


def check_target(out: str | Path) -> None:
    """Refuse a folder that holds anything but an earlier report.

    Raises
    ------
    StoreError
        It says what is there.
    """
    if not os.fspath(out):  # which pathlib takes for the current folder
        raise StoreError("--out has an empty name")
    path = Path(out)
    if not os.path.lexists(path):
        return
    if not path.is_dir():
        raise StoreError(f"{out}: not a folder; choose another --out")
    try:
        there = _files_of(path)
        own = _manifest_of(path) if there else set()
    except OSError as error:
        raise StoreError(f"{out}: cannot be read: {reason(error)}") from error
    foreign = sorted(there - own)
    if foreign:
        what = printable(foreign[0])
        raise StoreError(f"{out} holds files that are not of a report ({what}): choose another --out")


def _files_of(folder: Path) -> set[str]:
    """Files below a folder, links and empty folders included, as paths with slashes."""
    found: set[str] = set()
    for base, folders, files in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(base, name))]
        names = [*files, *links, *([""] if not folders and not files and Path(base) != folder else [])]
        found.update(Path(base, name).relative_to(folder).as_posix() for name in names)
    return found


def _manifest_of(folder: Path) -> set[str]:
    try:
        with open_regular(folder / MANIFEST) as file:
            text = file.read().decode()
        document = json.loads(text)
        if text.startswith(JSON_HEAD) and "report" in document:
            return {MANIFEST, *(str(name) for name in document["files"])}
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        pass
    return set()


def write_report(
    store: StoredMaps,
    out: str | Path,
    *,
    images: int = 5000,
    seed: int = 0,
    photographs: Callable[[], Photographs] | None = None,
    no_photographs: str = "",
    progress: Callable[[int], object] | None = None,
) -> dict[str, Any]:
    """Write a report of a store.

    Parameters
    ----------
    store : StoredMaps
        As :func:`ramp_fast.results.open_maps` gives it; it may be unfinished.
    out : str or pathlib.Path
        The folder of the report: made, or an earlier report that is replaced.
    images : int
        Of the gallery at most, from 1 to 100,000: of more a random sample is shown. Numbers of the overview and of the
        classes are those of all images.
    seed : int
        Of the sample.
    photographs : callable, optional
        Makes what reads them; without it there are maps alone.
    no_photographs : str
        Why there are none, for the page.
    progress : callable, optional
        Told how many images of the store are done.

    Returns
    -------
    dict
        What the overview says.

    Raises
    ------
    StoreError
        The folder holds other files, or cannot be written; the store is damaged, or nothing in it is done.
    InputError
        An argument is out of range.
    """
    positive("write_report", "images", images)
    images = min(images, MOST_IMAGES)
    check_target(out)
    done = store.done
    if not done.any():
        raise StoreError(f"{store.folder}: no image in this store has a map yet")
    gallery = _sample(np.flatnonzero(done), images, seed)
    target = Path(os.path.realpath(out))
    with _reported(out):
        remove_leftovers(target.parent)
        with atomic_folder(target) as folder:
            writer = _Writer(store, folder, done, gallery, seed, no_photographs)
            if photographs is None:
                writer.run(None, progress)
            else:
                with photographs() as reader:
                    writer.run(reader, progress)
            summary = writer.summary
            check_target(out)  # hours may have passed
    return summary


@contextmanager
def _reported(out: str | Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(f"cannot write {out}: {reason(error)}") from error


def _sample(done: npt.NDArray[np.int64], most: int, seed: int) -> npt.NDArray[np.int64]:
    if len(done) <= most:
        return done
    return np.sort(np.random.default_rng(seed).choice(done, most, replace=False))


@dataclass
class _Columns:
    """Numbers of the gallery's images."""

    label: npt.NDArray[np.int64]
    predicted: npt.NDArray[np.int64]
    confidence: npt.NDArray[np.float64]
    label_probability: npt.NDArray[np.float64]
    entropy: npt.NDArray[np.float64]
    inside: npt.NDArray[np.float64]

    @classmethod
    def empty(cls, count: int) -> _Columns:
        def numbers() -> npt.NDArray[np.float64]:
            return np.full(count, np.nan)

        none = np.full(count, -1, np.int64)
        return cls(none, none.copy(), numbers(), numbers(), numbers(), numbers())


class _Writer:
    def __init__(
        self,
        store: StoredMaps,
        folder: Path,
        done: npt.NDArray[np.bool_],
        gallery: npt.NDArray[np.int64],
        seed: int,
        no_photographs: str,
    ) -> None:
        self.store, self.plan, self.folder, self.done, self.gallery, self.seed = (
            store,
            store.plan,
            folder,
            done,
            gallery,
            seed,
        )
        self.no_photographs = no_photographs
        self.size: tuple[int, int] = (self.plan.map_shape[-2], self.plan.map_shape[-1])
        self.thumbnail, self.detail, self.mean = (fitting(*self.size, most) for most in (THUMBNAIL, DETAIL, MEAN))
        self._to_thumbnail, self._to_detail, self._to_mean = (
            Reduction(self.size, size) for size in (self.thumbnail, self.detail, self.mean)
        )
        labelled = bool((store.array("label")[done] >= 0).any())
        self.table = ClassTable(labelled)
        self.columns = _Columns.empty(len(gallery))
        self.details: list[list[Any]] = []
        self.unread = 0
        self.first_unread = ""
        self.checksums = store.array("source_crc32")
        self.summary: dict[str, Any] = {}

    def run(self, photographs: Photographs | None, progress: Callable[[int], object] | None) -> None:
        pictures = self.folder / "pictures"
        pictures.mkdir()
        (self.folder / "data").mkdir()
        targets = range(len(self.plan.targets))
        small_maps = Sheets(pictures, "maps", self.thumbnail, 8, 8)
        large_maps = [Sheets(pictures, f"maps-large-{k}", self.detail, 4, 4) for k in targets]
        small = Sheets(pictures, "photographs", self.thumbnail, 8, 8)
        large = Sheets(pictures, "photographs-large", self.detail, 4, 4)
        sheets = [small_maps, *large_maps, *([small, large] if photographs is not None else [])]

        count = self.plan.count
        blocks = [range(start, min(start + BLOCK, count)) for start in range(0, count, BLOCK)]
        members = [self._members(block) for block in blocks]
        read = photographs.batches([part for part in members if part]) if photographs is not None else None
        for block, part in zip(blocks, members, strict=True):
            found = next(read) if read is not None and part else None
            maps = self._block(block, part)
            if part:
                scale = scales(maps)
                small_maps_of_part = coloured(self._to_thumbnail(maps[:, 0]), scale[:, 0])
                large_maps_of_part = coloured(self._to_detail(maps), scale)
                for place, number in enumerate(part):
                    small_maps.add(small_maps_of_part[place])
                    for k in targets:
                        large_maps[k].add(large_maps_of_part[place, k])
                    if found is not None:
                        self._photograph(number, found[place], maps[place, 0], small, large)
            if progress is not None:
                progress(block.stop)
        for sheet in sheets:
            sheet.close()
        means = self._means(pictures)
        self._write_data(photographs, sheets, means)

    def _members(self, block: range) -> list[int]:
        """Images of the gallery within a block."""
        first, last = np.searchsorted(self.gallery, (block.start, block.stop))
        return [int(number) for number in self.gallery[first:last]]

    def _block(self, block: range, part: Sequence[int]) -> npt.NDArray[np.float32]:
        """Count the images of a block; the maps of those in the gallery, ``[b, K, H, W]``."""
        plan, store = self.plan, self.store
        here = np.flatnonzero(self.done[block.start : block.stop])
        if not len(here):
            return np.empty((0, len(plan.targets), *self.size), np.float32)
        arrays = {
            name: store.array(name, block.start, block.stop)[here]
            for name in ("maps", "scale", "logits", "label", "target")
        }
        maps = summed_maps(arrays["maps"], arrays["scale"], len(plan.targets) > 1, plan.channels)
        predictions = Block.of(arrays["logits"], arrays["label"])
        entropy = entropies(maps[:, 0])
        self.table.add(predictions, entropy, self._to_mean(maps[:, 0]))

        chosen = np.flatnonzero(np.isin(here + block.start, part))
        if not len(chosen):
            return maps[:0]
        at = int(np.searchsorted(self.gallery, part[0]))
        rows = slice(at, at + len(part))
        columns = self.columns
        columns.label[rows] = predictions.label[chosen]
        columns.predicted[rows] = predictions.predicted[chosen]
        columns.confidence[rows] = predictions.confidence[chosen]
        columns.label_probability[rows] = predictions.label_probability[chosen]
        columns.entropy[rows] = entropy[chosen]
        largest = np.abs(maps[chosen]).max((-2, -1))
        for place, number in zip(chosen.tolist(), part, strict=True):
            top = [[int(k), round(float(predictions.probabilities[place, k]), 6)] for k in predictions.top[place]]
            explained = np.atleast_1d(arrays["target"][place]).tolist()
            self.details.append([number, top, explained])
        for detail, values in zip(self.details[rows], largest.tolist(), strict=True):
            detail += [[float(f"{value:.4g}") for value in values], ""]
        return maps[chosen]

    def _photograph(
        self, number: int, found: Photograph, relevance: npt.NDArray[np.float32], small: Sheets, large: Sheets
    ) -> None:
        row = small.count
        problem, pixels = found.problem, found.pixels
        if pixels is not None and found.checksum != int(self.checksums[number]):
            problem, pixels = "the file has other bytes than what was attributed", None
        if pixels is None:
            self.unread += 1
            self.first_unread = self.first_unread or f"{self.store.names[number]}: {problem}"
            self.details[row][-1] = printable(problem)
        else:
            self.columns.inside[row] = box_shares(relevance, found.inside)
        small.add(None if pixels is None else reduced_photograph(pixels, self.thumbnail))
        large.add(None if pixels is None else reduced_photograph(pixels, self.detail))

    def _means(self, pictures: Path) -> dict[str, Any]:
        """Mean maps: of all images first, then of the classes in order."""
        sheet = Sheets(pictures, "means", self.mean, 8, 8)
        for one in (self.table.whole, *(self.table.rows[k] for k in sorted(self.table.rows))):
            assert one.mean is not None
            mean = one.mean.astype(np.float32)
            sheet.add(coloured(mean, scales(mean)))
        sheet.close()
        return sheet.about()

    def _write_data(self, photographs: Photographs | None, sheets: Sequence[Sheets], means: dict[str, Any]) -> None:
        count, columns = len(self.gallery), self.columns
        names = self.store.names
        for number, start in enumerate(range(0, count, ROWS)):
            part = slice(start, min(start + ROWS, count))
            most_entropy = np.log(self.size[0] * self.size[1])
            row = {
                "label": _packed(columns.label[part], len(self.plan.classes)),
                "predicted": _packed(columns.predicted[part], len(self.plan.classes)),
                "confidence": _packed_share(columns.confidence[part]),
                "labelProbability": _packed_share(columns.label_probability[part]),
                "entropy": _packed_share(columns.entropy[part] / (most_entropy or 1)),
                "inside": _packed_share(columns.inside[part]),
            }
            self._put("rows", number, row)
        for number, start in enumerate(range(0, count, NAMES)):
            self._put("names", number, [printable(names[k]) for k in self.gallery[start : start + NAMES]])
        for number, start in enumerate(range(0, count, DETAILS)):
            self._put("details", number, self.details[start : start + DETAILS])
        self.summary = self._summary(photographs, sheets, means)
        self._put("summary", None, self.summary)
        page = resources.files("ramp_fast.report") / "page"
        for name in PAGE:
            (self.folder / name).write_bytes((page / name).read_bytes())
        files = sorted(_files_of(self.folder))
        document = {"software": SOFTWARE, "report": FORMAT, "store": self.plan.document()["hash"], "files": files}
        (self.folder / MANIFEST).write_text(json.dumps(document) + "\n", encoding="ascii")

    def _put(self, kind: str, number: int | None, value: Any) -> None:
        """A script that hands data to the page: pages that are opened from a disk may not read files otherwise."""
        name = kind if number is None else f"{kind}-{number:03d}"
        text = json.dumps(value, separators=(",", ":"), allow_nan=False)  # ASCII, line separators escaped
        (self.folder / "data" / f"{name}.js").write_text(f'ramp_fast.put("{name}",{text});\n', encoding="ascii")

    def _summary(
        self, photographs: Photographs | None, sheets: Sequence[Sheets], means: dict[str, Any]
    ) -> dict[str, Any]:
        from ramp_fast import __version__

        plan, table = self.plan, self.table
        failures = self.store.failures()
        done = int(self.done.sum())
        problem = self.no_photographs
        if photographs is not None and self.unread:
            problem = f"{self.unread} photographs cannot be shown ({printable(self.first_unread)}"
            problem += ", for one)" if self.unread > 1 else ")"
        return {
            "version": __version__,
            "title": printable(Path(os.path.abspath(self.store.folder)).name),
            "plan": [[name, printable(str(value))] for name, value in _about_plan(plan)],
            "counts": {
                "images": plan.count,
                "done": done,
                "failed": len(failures),
                "left": plan.count - done - len(failures),
                "labelled": table.labels,
            },
            "accuracy": {"top1": table.top1, "top5": table.top5} if table.labels else None,
            "confidence": table.whole.confidence / done,
            "entropy": _ratio(table.whole.entropy, table.whole.with_entropy),
            "mostEntropy": float(np.log(self.size[0] * self.size[1])),
            "runs": _runs_of(self.store.folder),
            "failures": [[printable(name), printable(why)] for name, why in list(failures.items())[:_SHOWN_FAILURES]],
            "classes": [printable(name) for name in plan.classes],
            "labelledClasses": table.labelled,
            "classRows": [
                [
                    k,
                    one.images,
                    one.correct,
                    _ratio(one.confidence, one.images),
                    _ratio(one.entropy, one.with_entropy),
                ]
                for k, one in sorted(table.rows.items())
            ],
            "means": means,
            "gallery": {
                "count": len(self.gallery),
                "seed": self.seed,
                "rows": ROWS,
                "names": NAMES,
                "details": DETAILS,
                "targets": list(plan.targets),
                "sheets": {sheet.kind: sheet.about() for sheet in sheets},
                "photographs": photographs is not None,
                "problem": problem,
                "regions": bool(np.isfinite(self.columns.inside).any()),
                "size": list(self.size),
            },
        }


def _ratio(total: float, count: int) -> float | None:
    return round(total / count, 6) if count else None


def _packed(classes: npt.NDArray[np.int64], count: int) -> str:
    """Numbers of classes in base64, -1 where there is none: in 16 bits where ``count`` classes fit, else in 32."""
    return base64.b64encode(classes.astype("<i2" if count <= 32768 else "<i4").tobytes()).decode()


def _packed_share(values: npt.NDArray[np.float64]) -> str:
    """Numbers from 0 to 1 in steps of 1 / 65534, 65535 where there is none, in base64."""
    steps = np.rint(np.clip(np.where(np.isnan(values), 0, values), 0, 1) * (_MISSING - 1))
    packed = np.where(np.isnan(values), _MISSING, steps).astype("<u2")
    return base64.b64encode(packed.tobytes()).decode()


def _about_plan(plan: Any) -> Iterator[tuple[str, Any]]:
    """What decides about values, in words."""
    request, settings = plan.request, plan.settings
    for name, value in (
        ("Model", settings.get("model", request.get("model"))),
        ("Rule", request.get("rule")),
        ("Explained", ", ".join(plan.targets)),
        ("Precision", request.get("precision")),
        ("Contrast", request.get("contrast")),
        ("Normalised by", request.get("normalize")),
        ("Maps", f"{' x '.join(map(str, plan.map_shape))}, {plan.dtype}"),
        ("Layout of the source", plan.source.get("layout")),
        ("Weights (SHA-256)", settings.get("state_sha256")),
        ("Plan (SHA-256)", plan.document()["hash"]),
    ):
        if value is not None:
            yield name, value


def _runs_of(folder: Path) -> list[dict[str, Any]]:
    """What ``runs.jsonl`` says, the last runs."""
    wanted: Mapping[str, type | tuple[type, ...]] = {
        "started": str,
        "images": int,
        "failures": int,
        "seconds": (int, float),
        "images_per_second": (int, float),
        "device": str,
        "device_name": str,
        "threads": int,
        "batch_size": int,
    }
    try:
        with open_regular(folder / RUNS) as file:
            lines = file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return []
    runs = []
    for line in lines[-_SHOWN_RUNS:]:
        try:
            run = json.loads(line)
            runs.append({name: run[name] for name, kind in wanted.items() if isinstance(run.get(name), kind)})
        except (ValueError, AttributeError):  # torn by a loss of power
            continue
    return runs
