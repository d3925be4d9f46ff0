"""Rules and methods on trained networks and photographs: what docs/evaluation.md says.

    RAMP_FAST_MODELS=FOLDER RAMP_FAST_TINY_IMAGENET=FOLDER python bench/evaluation.py --work FOLDER
    python bench/evaluation.py --page    # the tables of docs/evaluation.md alone

``RAMP_FAST_MODELS`` holds ``load.py`` with ``vit_small_tin200()`` (ViT-S/14, 112 px, Tiny ImageNet) and ``resnet50()``
(ImageNet), as for the tests marked ``models``; EfficientNet-Lite0 comes with the ``demo`` extra.
``RAMP_FAST_TINY_IMAGENET`` holds Tiny ImageNet's ``wnids.txt`` and ``val/`` with boxes.

Values of every photograph are kept in the folder of ``--work``, a file for each network, half, group of metrics and
row, and at the end in bench/results/evaluation/NETWORK.npz; what is in one of the two is not computed again, so that a
run may be stopped. Means, errors and paired differences go into bench/results/evaluation/NETWORK.json, and from there
between the marks of the page.

Photographs at positions of a multiple of 5 in ``val_annotations.txt`` are never taken. Of the others, in an order drawn
once, those are taken that the network classifies correctly; they go to halves A and B in turn. Whatever is chosen
(``--search``) is chosen on A.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import random
import re
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import cnn_candidates
import numpy as np
import small_convnext
import torch
from timm.data.imagenet_info import ImageNetInfo
from torch import Tensor, nn

from ramp_fast import Engine, rules
from ramp_fast.data import Preprocessing, read_image
from ramp_fast.evaluation import Evaluation, evaluate
from ramp_fast.models import load_model

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results" / "evaluation"
PAGE = ROOT / "docs" / "evaluation.md"
SIDES = ("A", "B")  # as they are kept
HALVES = ("B", "A")  # as they are computed
SMALL = 0.5  # boxes that cover less of the picture say something about localisation
COMPARED = ("ramp", "abslrp")  # rows that others are subtracted from
FORM = "form: "  # before the names of candidates among rows


@dataclass(frozen=True)
class Network:
    """A network, and how much of everything.

    Attributes
    ----------
    half : int
        Photographs of each half.
    chunk : int
        Photographs that are computed and kept together.
    photographs : dict of group of metrics to int
        How many of each half are taken where it is not all of them.
    batch : int
        Images that go through the network together.
    """

    title: str
    load: Callable[[ModuleType, Path], tuple[nn.Module, Preprocessing]]
    half: int
    chunk: int
    patch: int
    steps: int
    photographs: Mapping[str, int]
    batch: int


def _vit(loader: ModuleType, work: Path) -> tuple[nn.Module, Preprocessing]:
    return loader.vit_small_tin200(), _preprocessing(112, mean=small_convnext.MEAN, std=small_convnext.STD)


def _resnet(loader: ModuleType, work: Path) -> tuple[nn.Module, Preprocessing]:
    return loader.resnet50(), _preprocessing(224, mean=loader.RESNET50_MEAN, std=loader.RESNET50_STD)


def _convnext(loader: ModuleType, work: Path) -> tuple[nn.Module, Preprocessing]:
    model = small_convnext.model()
    model.load_state_dict(torch.load(work / "convnext.pt", weights_only=True))
    return model.eval(), _preprocessing(64, mean=small_convnext.MEAN, std=small_convnext.STD)


def _lite0(loader: ModuleType, work: Path) -> tuple[nn.Module, Preprocessing]:
    loaded = load_model("demo")
    config = loaded.preprocessing.config
    return loaded.model, _preprocessing(224, mean=config["mean"], std=config["std"])


def _preprocessing(size: int, **normalization: Any) -> Preprocessing:
    """The whole photograph: Tiny ImageNet's are squares."""
    shape = {"input_size": (3, size, size), "interpolation": "bicubic", "crop_pct": 1.0}
    return Preprocessing({**shape, **normalization})


NETWORKS = {
    "vit": Network(
        **{"title": "ViT-S/14, Tiny ImageNet, 112 px", "load": _vit, "half": 256, "chunk": 64, "patch": 14, "steps": 4},
        **{"photographs": {"pixels": 64, "checks": 32}, "batch": 64},
    ),
    "resnet50": Network(
        **{"title": "ResNet-50, ImageNet, 224 px", "load": _resnet, "half": 104, "chunk": 52, "patch": 28, "steps": 4},
        **{"photographs": {"pixels": 24, "checks": 16}, "batch": 8},
    ),
    "lite0": Network(
        **{"title": "EfficientNet-Lite0, ImageNet, 224 px", "load": _lite0, "half": 104, "chunk": 52, "patch": 28},
        **{"steps": 4, "photographs": {"pixels": 24, "checks": 16}, "batch": 8},
    ),
    "convnext": Network(
        **{"title": "Small ConvNeXt, Tiny ImageNet, 64 px", "load": _convnext, "half": 256, "chunk": 128, "patch": 8},
        **{"steps": 4, "photographs": {"pixels": 64, "checks": 32}, "batch": 64},
    ),
}

OF_TINY_IMAGENET = ("vit", "convnext")  # which know its 200 classes alone

METRICS: dict[str, dict[str, str]] = {
    "main": {
        "srg": "abpc:granularity=patch:{patch},steps={steps}",
        "mass": "relevance_mass_accuracy",
        "mass at 20 %": "relevance_mass_accuracy:area=0.2",
        "pointing": "pointing_game",
        "rank": "relevance_rank_accuracy",
        "mosaic": "grid_pointing_game",
    },
    "pixels": {"srg of pixels": "abpc:granularity=pixel,steps={steps}"},
    "checks": {"random logit": "random_logit", "randomisation": "parameter_randomisation:stages=4"},
}
# Of the photographs with small boxes alone.
LOCALISATION = ("mass", "mass at 20 %", "pointing", "rank")
# Areas under the two curves of "srg". Masking the least important first is insertion, read from its end.
CURVES = {"deletion": "morf", "insertion": "lerf"}
FALLING = ("deletion", *METRICS["checks"])

ROWS = {
    **{name: name for name in ("ramp", "abslrp", "attnlrp", "reslrp", "cp-lrp", "abslrp-release")},
    "Grad-CAM": "gradcam",
    "random": "random",
    "input x gradient": "ixg",
    **{name: name for name in ("lrp-epsilon", "lrp-gamma", "lrp-zplus", "epsilon-plus-flat")},
    "epsilon-alpha2-beta1-flat": "epsilon-alpha2-beta1-flat",
    "ramp, T = 1": "ramp:temperature=1",
    "integrated gradients": "ig:steps=16",
    "SmoothGrad": "smoothgrad:samples=8",
    "occlusion": "occlusion:window={patch},stride={patch}",
    "rollout": "rollout",
    **{name: name for name in ("epsilon-plus", "epsilon-alpha2-beta1", "epsilon-gamma-box", "lrp-alpha2-beta1")},
    **{name: name for name in ("excitation-backprop", "guided-backprop", "deconvnet", "gradient")},
    **{name: name for name in ("lrp-undivided", "beta-smooth")},
}
# Rules of attention are LRP-0 in networks without it; the rectified gradients are the gradient in one without ReLU;
# lrp-undivided refuses attention.
LEFT_OUT = {
    "vit": ("guided-backprop", "deconvnet", "beta-smooth", "lrp-undivided"),
    "resnet50": ("attnlrp", "cp-lrp", "rollout", "ramp, T = 1"),
    "lite0": ("attnlrp", "cp-lrp", "rollout", "ramp, T = 1"),
    "convnext": ("cp-lrp", "rollout", "guided-backprop", "deconvnet", "beta-smooth", "lrp-undivided"),
}


@dataclass(frozen=True)
class Photographs:
    """Of one half: what :func:`ramp_fast.evaluation.evaluate` takes, and their names."""

    images: Tensor
    target: Tensor
    masks: Tensor
    names: list[str]

    def part(self, start: int, stop: int) -> Photographs:
        here = slice(start, stop)
        return Photographs(self.images[here], self.target[here], self.masks[here], self.names[here])


class Bench:
    """A network with its photographs, and what was computed for them.

    Attributes
    ----------
    kept : dict of str to array
        ``positions`` of the photographs in the file of annotations, of halves A and B in turn, ``drawn`` for them; and
        for a row ``ROW/COLUMN``, values, and ``ROW/GROUP``, whether the group was computed: ``[half, photograph]``.
    """

    def __init__(self, name: str, loader: ModuleType, data: Path, work: Path) -> None:
        self.name, self.about, self.work = name, NETWORKS[name], work / name
        self.methods: dict[str, Any] = {}
        self.kept: dict[str, np.ndarray] = {}
        if self.archive.exists():
            with np.load(self.archive) as arrays:
                self.kept = dict(arrays)
        self.model, self.preprocessing = self.about.load(loader, work)
        self.engine = Engine(self.model)
        self.halves = self._photographs(data)

    @property
    def archive(self) -> Path:
        """Where values are kept in the repository."""
        return RESULTS / f"{self.name}.npz"

    def _photographs(self, data: Path) -> dict[str, Photographs]:
        kept = self.work / "photographs.json"
        lines = (data / "val" / "val_annotations.txt").read_text().splitlines()
        annotations = [line.split() for line in lines]
        ids = (data / "wnids.txt").read_text().split()  # the classes of the ViT are in the file's order
        classes = ids if self.name in OF_TINY_IMAGENET else ImageNetInfo("imagenet-1k").label_names()
        if not self.kept:
            if kept.exists():
                chosen = json.loads(kept.read_text())
            else:
                chosen = self._chosen(data, annotations, classes)
                kept.parent.mkdir(parents=True, exist_ok=True)
                kept.write_text(json.dumps(chosen))
            self.kept["positions"] = np.array(chosen["positions"], np.int32)
            self.kept["drawn"] = np.array(chosen["right of"], np.int32)

        def half(which: int) -> Photographs:
            positions = self.kept["positions"][which::2].tolist()
            found = [self._read(data, annotations[p], classes) for p in positions]
            images, targets, masks = zip(*found, strict=True)
            names = [annotations[p][0] for p in positions]
            return Photographs(torch.stack(images), torch.tensor(targets), torch.stack(masks), names)

        return {"A": half(0), "B": half(1)}

    def _chosen(self, data: Path, annotations: list[list[str]], classes: list[str]) -> dict[str, Any]:
        allowed = small_convnext.allowed(len(annotations))
        random.Random(0).shuffle(allowed)
        right: list[int] = []
        seen = 0
        while len(right) < 2 * self.about.half:
            positions = allowed[seen : seen + 32]
            images, targets, _ = zip(*(self._read(data, annotations[p], classes) for p in positions), strict=True)
            predicted = self.engine.logits(torch.stack(images)).argmax(1)
            right += [p for p, hit in zip(positions, predicted == torch.tensor(targets), strict=True) if hit]
            seen += len(positions)
        return {"positions": right[: 2 * self.about.half], "right of": [len(right), seen]}

    def _read(self, data: Path, annotation: list[str], classes: list[str]) -> tuple[Tensor, int, Tensor]:
        """Image, class and mask of one line of the annotations."""
        name, wordnet, *box = annotation
        picture = read_image(str(data / "val" / "images" / name))
        left, top, right, bottom = (int(edge) for edge in box)
        mask = np.zeros((picture.height, picture.width), bool)
        mask[top : bottom + 1, left : right + 1] = True
        return self.preprocessing(picture), classes.index(wordnet), self.preprocessing.mask(mask)

    def files(self, half: str, group: str, label: str) -> list[Path]:
        """What is kept of a row, in order."""
        name = re.sub("[^a-z0-9.]+", "-", label.lower())
        return sorted((self.work / half / group / name).glob("*.json"))

    def run(self, half: str, group: str, label: str, start: int, stop: int) -> None:
        """Values of one row for some photographs, unless they are there."""
        name = re.sub("[^a-z0-9.]+", "-", label.lower())
        file = self.work / half / group / name / f"{start:04}-{stop:04}.json"
        done = self.kept.get(f"{label}/{group}")
        if file.exists() or (done is not None and done[SIDES.index(half), start:stop].all()):
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        about, taken = self.about, self.halves[half].part(start, stop)
        metrics = {name: spec.format(patch=about.patch, steps=about.steps) for name, spec in METRICS[group].items()}
        data = (taken.images, taken.target, taken.masks)
        batch = stop - start if group == "checks" else about.batch  # which randomises the network once for all
        began = time.perf_counter(), time.process_time()
        result = evaluate(self.engine, data, metrics, {label: self.method(label)}, batch_size=batch)
        for why in result.failures.values():
            print(f"FAILED {self.name}: {why}", file=sys.stderr)
        replace(result, names=taken.names).save(file)
        wall, cpu = time.perf_counter() - began[0], time.process_time() - began[1]
        told = f"{self.name} {half} {group} {label} {start}-{stop}: {wall:.0f} s, {cpu:.0f} s of the processor"
        print(told, file=sys.stderr, flush=True)

    def method(self, label: str) -> Any:
        """What ``evaluate`` takes for a row: of a rule one engine, so that the network is captured once."""
        if label not in self.methods:
            self.methods[label] = self._made(label)
        return self.methods[label]

    def _made(self, label: str) -> Any:
        if label.startswith(FORM):
            return Engine(self.model, cnn_candidates.CANDIDATES[label.removeprefix(FORM)])
        if label == "epsilon-gamma-box":
            normal = self.preprocessing.config
            ends = [[(end - m) / s for m, s in zip(normal["mean"], normal["std"], strict=True)] for end in (0, 1)]
            layers = {"conv": rules.Gamma(), "linear": rules.Epsilon()}
            return Engine(self.model, rules.Composite(layers, first={"conv": rules.ZBox(*ends)}, stabilizer=1e-6))
        spec = ROWS[label].format(patch=self.about.patch)
        return Engine(self.model, spec) if spec.split(":")[0] in rules.NAMED else spec

    @cached_property
    def boxes(self) -> dict[str, float]:
        """The share of the picture that each photograph's box covers."""
        return {
            name: float(mask.float().mean())
            for half in self.halves.values()
            for name, mask in zip(half.names, half.masks, strict=True)
        }


def load(folder: str) -> ModuleType:
    """The folder's ``load.py``."""
    spec = importlib.util.spec_from_file_location("load", Path(folder) / "load.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compute(bench: Bench, rows: list[str], groups: list[str], halves: list[str], most: int | None) -> None:
    """Rows of a network, group by group and part by part, so that all rows have the same photographs at any time."""
    about = bench.about
    for group in groups:
        for half in halves:
            count = min(about.photographs.get(group, about.half), most or about.half)
            chunk = count if group == "checks" else about.chunk
            for start in range(0, count, chunk):
                for label in rows:
                    stop = min(start + chunk, count)
                    if label not in LEFT_OUT[bench.name]:
                        bench.run(half, group, label, start, stop)


def keep(bench: Bench, labels: list[str]) -> None:
    """Take values out of the folder into the archive."""
    for label in labels:
        for group in METRICS:
            for which, half in enumerate(SIDES):
                place = {name: k for k, name in enumerate(bench.halves[half].names)}
                for file in bench.files(half, group, label):
                    loaded = Evaluation.load(file)
                    at = [place[name] for name in loaded.names]
                    if label not in loaded.results:
                        continue  # it failed
                    for metric, result in loaded.results[label].items():
                        size = loaded.metrics[metric]["group"]
                        columns = {metric: result.values[result.name]}
                        if metric == "srg":
                            columns |= {name: _area(result.values[curve]) for name, curve in CURVES.items()}
                        for column, numbers in columns.items():
                            _array(bench, f"{label}/{column}", np.float32(np.nan))[which, at[::size]] = numbers.numpy()
                    _array(bench, f"{label}/{group}", np.False_)[which, at] = True
    unfinished = bench.archive.with_suffix(".unfinished.npz")
    np.savez_compressed(unfinished, **dict(sorted(bench.kept.items())))
    unfinished.replace(bench.archive)


def _array(bench: Bench, name: str, empty: np.generic) -> np.ndarray:
    return bench.kept.setdefault(name, np.full((len(SIDES), bench.about.half), empty))


Values = dict[tuple[str, str], float]
"""Of one row and column: by half, and by photograph, the first one of a mosaic."""


def values(bench: Bench, label: str) -> dict[str, Values]:
    """What was computed for a row, by column."""
    boxes = bench.boxes
    found: dict[str, Values] = {}
    for column in (*CURVES, *(metric for metrics in METRICS.values() for metric in metrics)):
        array = bench.kept.get(f"{label}/{column}")
        if array is None:
            continue
        for half, numbers in zip(SIDES, array.tolist(), strict=True):
            for name, value in zip(bench.halves[half].names, numbers, strict=True):
                if not math.isnan(value) and (column not in LOCALISATION or boxes[name] < SMALL):
                    found.setdefault(column, {})[half, name] = value
    return found


def _area(curve: Tensor) -> Tensor:
    return torch.trapezoid(curve, dx=1 / (curve.shape[1] - 1), dim=1)


def mean(numbers: list[float]) -> list[float] | None:
    """Mean, its standard error, and of how many."""
    if len(numbers) < 2:
        return None
    found = torch.tensor(numbers, dtype=torch.float64)
    return [round(float(found.mean()), 5), round(float(found.std()) / math.sqrt(len(numbers)), 5), len(numbers)]


def summary(bench: Bench, labels: list[str]) -> dict[str, Any]:
    """Means, and means of paired differences to the rows of ``COMPARED``; of both halves and of each."""
    rows = {label: found for label in labels if (found := values(bench, label))}
    made: dict[str, Any] = {}
    for label, found in rows.items():
        made[label] = {}
        for column, numbers in found.items():
            cell: dict[str, Any] = {}
            for halves in ("AB", "A", "B"):
                here = {key: value for key, value in numbers.items() if key[0] in halves}
                cell[halves] = {"mean": mean(list(here.values()))}
                for other in (*COMPARED, *(["Grad-CAM"] if bench.name != "vit" else [])):
                    theirs = rows.get(other, {}).get(column, {})
                    if other != label:
                        cell[halves][other] = mean([v - theirs[k] for k, v in here.items() if k in theirs])
            made[label][column] = cell
    return made


def record(bench: Bench, earlier: dict[str, Any]) -> dict[str, Any]:
    """What bench/results/evaluation keeps of a network; where no form was computed they stay as they were."""
    about, boxes = bench.about, bench.boxes
    labels = [FORM + label for label in cnn_candidates.CANDIDATES]
    searched = any(f"{label}/{group}" in bench.kept for group in METRICS for label in labels)
    forms = summary(bench, [*COMPARED, "Grad-CAM", *labels]) if searched else earlier.get("forms", {})
    return {
        "network": about.title,
        "torch": torch.__version__.split("+")[0],
        "photographs": {half: len(taken.names) for half, taken in bench.halves.items()},
        "classified correctly": bench.kept["drawn"].tolist(),
        "boxes below half": sum(share < SMALL for share in boxes.values()),
        "mean share of these boxes": round(float(np.mean([s for s in boxes.values() if s < SMALL])), 4),
        "metrics": {
            name: spec.format(patch=about.patch, steps=about.steps)
            for specs in METRICS.values()
            for name, spec in specs.items()
        },
        "methods": {label: spec.format(patch=about.patch) for label, spec in ROWS.items() if label != spec},
        "rows": summary(bench, [label for label in ROWS if label not in LEFT_OUT[bench.name]]),
        "forms": forms,
    }


def number(value: float, signed: bool = False) -> str:
    """Three digits behind the point, and no zero before it."""
    text = f"{value:+.3f}" if signed else f"{value:.3f}"
    return re.sub(r"(?<![0-9])0\.", ".", text).replace("-", "−")


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(line)} |" for line in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:], ""])


def shown(
    kept: dict[str, Any],
    columns: tuple[str, ...],
    *,
    rows: str = "rows",
    halves: str = "AB",
    against: str | None = None,
) -> str:
    """A table of means, or of differences to a row; the best mean of a column is bold."""
    found = kept[rows]
    columns = tuple(c for c in columns if any(c in row for row in found.values()))
    if not columns:
        return "Not computed yet.\n"
    what = "mean" if against is None else against

    def cell(label: str, column: str) -> list[float] | None:
        row = found[label].get(column)
        return row[halves].get(what) if row else None

    def gain(label: str) -> float:
        srg = found[label].get("srg")  # there is none of rows that only the other groups were computed for
        return float(srg[halves]["mean"][0]) if srg and srg[halves]["mean"] else -1.0

    order = sorted(found, key=lambda label: -gain(label))
    best = {}
    for column in columns:
        means = [m[0] for label in found if (m := cell(label, column))]
        best[column] = (min if column in FALLING else max)(means) if means else None
    lines = []
    for label in order:
        cells = []
        for column in columns:
            m = cell(label, column)
            text = "–" if m is None else f"{number(m[0], against is not None)} ± {number(m[1])}"
            cells.append(f"**{text}**" if m and against is None and m[0] == best[column] else text)
        counted = dict.fromkeys(str(m[2]) for column in columns if (m := cell(label, column)))
        if label != against and counted:
            # Where columns differ in photographs, theirs in order.
            several = ", ".join(counted) if columns[0] not in MAIN else next(iter(counted))
            lines.append([label.removeprefix(FORM), *cells, several])
    arrows = [f"{c} {'↓' if c in FALLING else '↑'}" for c in columns]
    return table(["row", *arrows, "photographs"], lines)


MAIN = ("srg", "insertion", "deletion", *LOCALISATION, "mosaic")
PAIRED = ("srg", *LOCALISATION, "mosaic")
TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "means": partial(shown, columns=MAIN),
    "against-ramp": partial(shown, columns=PAIRED, against="ramp"),
    "checks": partial(shown, columns=(*METRICS["pixels"], *METRICS["checks"])),
    "forms": partial(shown, columns=PAIRED, rows="forms", halves="A"),
    "forms-against-ramp": partial(shown, columns=PAIRED, rows="forms", halves="A", against="ramp"),
    "chosen": partial(shown, columns=PAIRED, rows="forms", halves="B"),
    "chosen-against-ramp": partial(shown, columns=PAIRED, rows="forms", halves="B", against="ramp"),
    "chosen-against-abslrp": partial(shown, columns=PAIRED, rows="forms", halves="B", against="abslrp"),
    "chosen-against-gradcam": partial(shown, columns=PAIRED, rows="forms", halves="B", against="Grad-CAM"),
}
_BLOCK = re.compile(
    r"(<!-- bench/evaluation\.py: (\w+)/([\w-]+) -->\n)(.*?)(<!-- bench/evaluation\.py: end -->)", re.DOTALL
)


def render(text: str, results: Path = RESULTS) -> str:
    """A page with its tables as the results have them."""

    def made(block: re.Match[str]) -> str:
        kept = json.loads((results / f"{block[2]}.json").read_text(encoding="utf-8"))
        return block[1] + TABLES[block[3]](kept) + block[5]

    return _BLOCK.sub(made, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder for the values of photographs, outside the repository")
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--groups", nargs="*", default=list(METRICS), choices=list(METRICS))
    parser.add_argument("--halves", nargs="*", default=list(HALVES), choices=list(HALVES))
    parser.add_argument("--search", nargs="*", choices=list(cnn_candidates.CANDIDATES), help="these forms, no rows")
    parser.add_argument("--count", type=int, help="at most so many photographs of a half")
    parser.add_argument("--page", action="store_true", help="compute nothing")
    arguments = parser.parse_args()
    if not arguments.page:
        folders = [os.environ.get(name) for name in ("RAMP_FAST_MODELS", "RAMP_FAST_TINY_IMAGENET")]
        if not all(folders) or arguments.work is None:
            parser.error("computing takes --work and the folders RAMP_FAST_MODELS and RAMP_FAST_TINY_IMAGENET")
        loader = load(str(folders[0]))
        RESULTS.mkdir(parents=True, exist_ok=True)
        for name in arguments.networks:
            bench = Bench(name, loader, Path(str(folders[1])), arguments.work)
            rows = arguments.rows if arguments.search is None else [FORM + label for label in arguments.search]
            compute(bench, rows, arguments.groups, arguments.halves, arguments.count)
            keep(bench, [*ROWS, *(FORM + label for label in cnn_candidates.CANDIDATES)])
            file = RESULTS / f"{name}.json"
            earlier = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
            text = json.dumps(record(bench, earlier), indent=1)
            text = re.sub(r"\[[^\[\]{}]*\]", lambda numbers: " ".join(numbers[0].split()), text)  # a line each
            file.write_text(text + "\n", encoding="utf-8")
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
