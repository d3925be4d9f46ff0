"""Methods and metrics on trained networks and photographs: writes docs/evaluation.md, its table and its figures.

    RAMP_FAST_MODELS=FOLDER python bench/evaluation.py [--networks vit resnet50] [--out docs]

FOLDER holds ``load.py`` with ``vit_small_tin200()`` (ViT-S/14, 112 px, Tiny ImageNet) and ``resnet50()`` (ImageNet), as
for the tests marked ``models``. The photographs are the twenty ImageNet images of PyPI's ``foolbox`` 3.3.4. Some
fifty minutes on two cores. Results of a network are kept in bench/results/evaluation/; the page is made from those.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import transforms

from ramp_fast.data import boxes_to_masks
from ramp_fast.evaluation import Evaluation, evaluate

# Steps and draws are few, so that it takes minutes: the errors of a dozen images are larger than theirs.
METRICS = {
    "gae": "gae",
    "abpc": "abpc:granularity=patch:{patch},steps={steps}",
    "insertion": "insertion:granularity=patch:{patch},steps={steps}",
    "irof": "irof:granularity=superpixel:{segments}",
    "road": "road:percentages=(10, 30, 50, 70, 90)",
    "faithfulness": "faithfulness_correlation:granularity=patch:{patch},subset_size=16,samples={subsets}",
    "sensitivity": "max_sensitivity:samples=2",
    "random logit": "random_logit",
    "randomisation": "parameter_randomisation:stages=4",
    "mass in box": "relevance_mass_accuracy",
    "pointing game": "pointing_game",
    "sparseness": "sparseness",
}
METHODS = {
    "abslrp": "abslrp",
    "abslrp-release": "abslrp-release",
    "input x gradient": "ixg",
    "integrated gradients": "ig:steps={steps}",
    "SmoothGrad": "smoothgrad:samples={noises}",
    "Grad-CAM": "gradcam",
    "occlusion": "occlusion:window={window},stride={window}",
    "rollout": "rollout",
    "random": "random",
}
# Where the objects are, drawn by hand on the crops: left, top, right, bottom as shares of the side. Two photographs (a
# drum, a rug) are filled by theirs and have none.
BOXES: list[list[tuple[float, float, float, float]]] = [
    [(0.2, 0.05, 0.6, 0.95)],
    [(0, 0, 1, 0.35), (0.24, 0.32, 0.72, 1), (0.72, 0.48, 1, 0.95), (0, 0.5, 0.24, 0.8)],
    [(0.33, 0.5, 0.63, 1), (0.77, 0.4, 1, 0.98)],
    [(0.03, 0.22, 0.48, 0.75), (0.38, 0.5, 0.9, 1)],
    [
        *((0.38, 0, 0.63, 0.25), (0.77, 0.22, 1, 0.48), (0, 0.32, 0.14, 0.5), (0.16, 0.36, 0.37, 0.57)),
        *((0.4, 0.31, 0.63, 0.54), (0.08, 0.56, 0.27, 0.8), (0.3, 0.58, 0.5, 0.76), (0.66, 0.52, 0.83, 0.71)),
        (0.38, 0.84, 0.57, 1),
    ],
    [(0.12, 0.02, 0.85, 0.28), (0.78, 0.14, 1, 0.3)],
    [(0.17, 0.22, 0.87, 0.7)],
    [(0, 0.25, 1, 0.82)],
    [(0, 0.57, 0.43, 0.95), (0.53, 0.37, 1, 0.9)],
    [(0, 0.1, 1, 0.97)],
    [],
    [(0, 0.1, 1, 0.8)],
    [],
    [(0, 0.07, 0.93, 1)],
    [(0.32, 0.3, 0.5, 0.6), (0.9, 0.33, 1, 0.6)],
    [(0, 0.13, 0.32, 0.78), (0.46, 0.08, 0.7, 0.5), (0.4, 0.35, 0.68, 1)],
    [(0, 0, 0.87, 0.85)],
    [(0, 0.2, 1, 0.73)],
    [(0.22, 0.02, 0.85, 0.97)],
    [(0.13, 0.23, 0.88, 0.85)],
]
# What a pass costs decides how many there are, and which methods run.
NETWORKS: dict[str, dict[str, Any]] = {
    "vit": {
        "title": "ViT-S/14, Tiny ImageNet (200 classes), 112 px, the first twelve photographs",
        **{"size": 112, "photographs": 12, "without": ()},
        **{"patch": 14, "window": 28, "steps": 8, "segments": 16, "subsets": 16, "noises": 4},
    },
    "resnet50": {
        "title": "ResNet-50, ImageNet, 224 px, the first eight photographs",
        **{"size": 224, "photographs": 8, "without": ("SmoothGrad", "occlusion", "rollout")},
        **{"patch": 28, "window": 56, "steps": 8, "segments": 16, "subsets": 16, "noises": 4},
    },
}


def networks(folder: str) -> ModuleType:
    """The folder's ``load.py``."""
    spec = importlib.util.spec_from_file_location("load", Path(folder) / "load.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def network(name: str, loader: ModuleType) -> tuple[nn.Module, Tensor]:
    """A trained network and the photographs as it wants them."""
    if name == "vit":
        model, mean, std = loader.vit_small_tin200(), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    else:
        model, mean, std = loader.resnet50(), loader.RESNET50_MEAN, loader.RESNET50_STD
    size = NETWORKS[name]["size"]
    prepare = transforms.Compose(
        [
            transforms.Resize(size * 8 // 7, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(size),
            transforms.ToTensor(),
            transforms.Normalize(mean, std),
        ]
    )
    package = importlib.util.find_spec("foolbox")
    if package is None or package.origin is None:
        sys.exit("the photographs are in foolbox: pip install foolbox==3.3.4")
    files = sorted((Path(package.origin).parent / "data").glob("imagenet_*.jpg"))
    return model, torch.stack([prepare(Image.open(f).convert("RGB")) for f in files])


def masks(size: int) -> Tensor:
    """The boxes as masks, ``[20, 1, H, W]``."""
    shares = [torch.tensor(boxes, dtype=torch.float64).view(-1, 4) for boxes in BOXES]
    return boxes_to_masks([(size * edges).round() for edges in shares], size, size)


def run(name: str, loader: ModuleType) -> Evaluation:
    """All metrics of all methods for one network."""
    model, images = network(name, loader)
    about = NETWORKS[name]
    methods = {label: spec.format(**about) for label, spec in METHODS.items() if label not in about["without"]}
    metrics = {label: spec.format(**about) for label, spec in METRICS.items()}
    started = time.perf_counter()
    count = about["photographs"]
    where = masks(about["size"])
    result = evaluate(
        model,
        [(images[i : i + 4], None, where[i : i + 4]) for i in range(0, count, 4)],
        metrics,
        methods,
        batch_size=20,
        explain="predicted",
        progress=lambda n: print(f"{name}: {n} images, {time.perf_counter() - started:.0f} s", file=sys.stderr),
    )
    for pair, why in result.failures.items():
        print(f"FAILED {pair}: {why}", file=sys.stderr)
    return result


def page(results: dict[str, Evaluation]) -> str:
    """docs/evaluation.md."""
    covered = float(torch.stack([m.float().mean() for m, boxes in zip(masks(224), BOXES, strict=True) if boxes]).mean())
    torch_version = torch.__version__.split("+")[0]
    lines = [
        "# Methods and metrics on trained networks",
        "",
        "Photographs of ImageNet (the twenty in PyPI's `foolbox`), the predicted class explained; means over images "
        "± their standard errors (GAE: over groups of four). ↑ higher is better, ↓ lower is better. Made by",
        "",
        "    pip install '.[evaluate]' foolbox torchvision",
        "    RAMP_FAST_MODELS=FOLDER python bench/evaluation.py",
        "",
        f"on {platform.machine()}, {os.cpu_count()} cores, PyTorch {torch_version}. They are few: differences "
        "of less than two standard errors mean nothing. Boxes of the objects were drawn by hand; they cover "
        f"{100 * covered:.0f} % of a picture on average, which is what a random map has in them. GAE is 0 where "
        "faithfulness and robustness add up to nothing positive, or contrastiveness is not: a few groups say little "
        "of a method.",
    ]
    for name, result in results.items():
        lines += ["", f"## {NETWORKS[name]['title']}", "", result.markdown(), ""]
        lines += [f"![curves of {name}](images/evaluation-{name}.svg)"]
        took: dict[str, float] = {}
        for pair, seconds in result.seconds.items():
            method = pair.split(" / ")[0]
            took[method] = took.get(method, 0.0) + seconds
        lines += ["", "Seconds for all metrics: " + ", ".join(f"{m} {s:.0f}" for m, s in took.items()) + "."]
    settings = [f"* {label}: `{spec}`" for label, spec in (*METRICS.items(), *METHODS.items()) if label != spec]
    names = ("patch", "window", "steps", "segments", "subsets", "noises")
    lines += ["", "## Settings", "", *settings, ""]
    lines += ["| | " + " | ".join(f"`{{{n}}}`" for n in names) + " |", "|---" * (len(names) + 1) + "|"]
    for name in results:
        title = NETWORKS[name]["title"].split(",")[0]
        lines += [f"| {title} | " + " | ".join(str(NETWORKS[name][n]) for n in names) + " |"]
    lines += [""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs")
    arguments = parser.parse_args()
    kept = Path(__file__).parent / "results" / "evaluation"
    if arguments.networks:
        folder = os.environ.get("RAMP_FAST_MODELS")
        if not folder:
            sys.exit("RAMP_FAST_MODELS names no folder with load.py")
        loader = networks(folder)
        kept.mkdir(parents=True, exist_ok=True)
        for name in arguments.networks:
            run(name, loader).save(kept / f"{name}.json")
    results = {name: Evaluation.load(kept / f"{name}.json") for name in NETWORKS if (kept / f"{name}.json").exists()}
    for name, result in results.items():
        result.plot("curves", ["abpc", "insertion"]).savefig(arguments.out / "images" / f"evaluation-{name}.svg")
    (arguments.out / "evaluation.md").write_text(page(results), encoding="utf-8")


if __name__ == "__main__":
    main()
