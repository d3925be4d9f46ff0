"""Tables of the README and of docs/, made from ``bench/results/*.json``.

    python bench/report.py            # rewrites the tables
    python bench/report.py --check    # fails where a page is not what the results say

A table stands between ``<!-- bench/report.py: NAME -->`` and ``<!-- bench/report.py: end -->``. It shows the newest
result of every machine.
"""

from __future__ import annotations

import argparse
import math
import re
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import results_io

PAGES = ("README.md", "docs/performance.md", "docs/gpu.md", "docs/signed-rules.md")

FIRST_SIGHT = ("zen5", "h200")  # machines of the README's table
FIRST_SIGHT_IMAGES = 8
MODELS = {"vit_base_patch16_224": "ViT-B/16", "resnet50": "ResNet-50"}
GRADIENT, PUBLISHED = "captum InputXGradient", "published absLRP"
# What docs/signed-rules.md compares, by the names of measurements.
METHODS = {
    "mixed, one class": "`abslrp`, one class",
    "mixed": "`abslrp`, class against others",
    **{f"ramp_fast {rule}": f"`{rule}`" for rule in ("attnlrp", "ramp", "epsilon-plus-flat")},
    GRADIENT: "gradient x input, captum",
    "LXT AttnLRP": "AttnLRP, LXT",
    "zennit EpsilonPlusFlat": "EpsilonPlusFlat, zennit",
}

_BLOCK = re.compile(r"(<!-- bench/report\.py: ([\w/-]+) -->\n)(.*?)(<!-- bench/report\.py: end -->)", re.DOTALL)


class Found(NamedTuple):
    """A measurement and the file that it is in."""

    row: dict[str, Any]
    record: dict[str, Any]


def newest(records: list[dict[str, Any]], machine: str) -> dict[str, Found]:
    """The newest measurement of every name on a machine."""
    found = {}
    for record in records:
        if record["machine"]["name"] == machine:
            found |= {row["name"]: Found(row, record) for row in record["measurements"]}
    return found


def number(value: float) -> str:
    """Three digits."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(line)} |" for line in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:], ""])


def title(records: list[dict[str, Any]], name: str) -> str:
    """What a machine is, by its oldest file."""
    machine = next(record["machine"] for record in records if record["machine"]["name"] == name)
    if machine["accelerator"]:
        return str(machine["accelerator"])
    return f"{machine['processor']}, {machine['cores']} cores"


def measured(record: dict[str, Any]) -> str:
    commit = record["commit"]
    return f"{record['date']}, {commit[:7] + (' and changes' if record['changes'] else '') if commit else '–'}"


def own_forward(found: dict[str, Found], key: str, of: Found) -> float:
    """The model's forward pass: measured in the rounds of ``of``, or by itself in the same file."""
    if of.row["ratio_of"] and of.row["ratio_of"]["value"] is not None:
        return float(of.row["ratio_of"]["value"])
    return float(found[f"{key}/forward"].row["value"])


def cell(found: dict[str, Found], name: str, record: dict[str, Any]) -> str:
    """Milliseconds and, in brackets, forward passes; marked where they are not of ``record``."""
    if name not in found:
        return "–"
    row = found[name].row
    mark = "" if found[name].record is record else " †"
    return f"{number(row['value'])} ({number(row['ratio'])}){mark}"


def networks(records: list[dict[str, Any]]) -> str:
    """Every machine, network and number of images: milliseconds an image, and forward passes."""
    methods = {"mixed": "mixed", "float32": "float32", "fast": "fast", "gradient": GRADIENT, "published": PUBLISHED}
    rows = []
    for machine in sorted({record["machine"]["name"] for record in records}):
        found = newest(records, machine)
        sizes = [name.split("/")[:2] for name in found if re.fullmatch(r"\w+/\d+/mixed", name)]
        order = list(dict.fromkeys(model for model, _ in sizes))
        for model, images in sorted(sizes, key=lambda size: (order.index(size[0]), -int(size[1]))):
            key = f"{model}/{images}"
            ours = found[f"{key}/mixed"]
            cells = [cell(found, f"{key}/{method}", ours.record) for method in methods.values()]
            head = [title(records, machine), model, images, number(own_forward(found, key, ours))]
            rows.append([*head, *cells, measured(ours.record)])
    return table(["machine", "model", "images", "forward", *methods, "date, commit"], rows)


def first_sight(records: list[dict[str, Any]]) -> str:
    """ViT-B and ResNet-50 on a CPU and on a GPU."""
    rows = []
    for model, name in MODELS.items():
        for machine in FIRST_SIGHT:
            found, key = newest(records, machine), f"{model}/{FIRST_SIGHT_IMAGES}"
            ours = found[f"{key}/mixed"]
            methods = [f"{key}/{method}" for method in ("mixed", GRADIENT, PUBLISHED)]
            cells = [cell(found, method, ours.record) for method in methods]
            cells[0] = f"**{cells[0]}**"
            where = title(records, machine)
            rows.append([name, where, number(own_forward(found, key, ours)), *cells, measured(ours.record)])
    head = ["model", "machine", "forward", "`ramp_fast`", "gradient", "published package", "date, commit"]
    return table(head, rows)


def throughput(records: list[dict[str, Any]], model: str, machine: str = "h200") -> str:
    """Images a second for every number of images at once."""
    found, rows = newest(records, machine), []
    sizes = {int(name.split("/")[1]) for name in found if re.fullmatch(rf"{model}/\d+/mixed", name)}
    for images in sorted(sizes, reverse=True):
        cells = [str(images)]
        for method in ("forward", "mixed", "fast"):
            row = found[f"{model}/{images}/{method}"].row
            cells.append(f"{1000 / row['value']:,.0f}")
            if method != "forward":
                cells.append(f"{row['ratio']:.2f}")
        rows.append(cells)
    head = [f"{MODELS[model]}, images at once", "forward, images/s", "mixed, images/s", "forward passes"]
    return table([*head, "fast, images/s", "forward passes"], rows)


def breakdown(records: list[dict[str, Any]], model: str, machine: str = "zen5") -> str:
    """Milliseconds an image of every step, against the floor of its products."""
    prefix = f"breakdown/{model}/8/mixed/"
    record = [r for r in records if any(m["name"].startswith(prefix) for m in r["measurements"])]
    steps = [m for m in record[-1]["measurements"] if m["name"].startswith(prefix)]
    whole = next(m["value"] for m in steps if m["name"] == f"{prefix}whole")
    rows = []
    for step in steps:
        floor = f"{step['floor']:.1f}" if "floor" in step else ""
        name = step["name"].removeprefix(prefix)
        share = "" if name == "whole" else f"{100 * step['value'] / whole:.1f} %"
        rows.append([name, f"{step['value']:.1f}", floor, share])
    return table(["step", "ms", "floor", "share"], rows)


def breadth(records: list[dict[str, Any]]) -> str:
    """Every machine and family: maps against the forward and backward pass, the engine's logits against the forward."""
    rows = []
    for machine in sorted({record["machine"]["name"] for record in records}):
        found = newest(records, machine)
        models = dict.fromkeys(m[1] for name in found if (m := re.fullmatch(r"breadth/(\w+)/8/abslrp", name)))
        ratios = []
        for model in models:
            key = f"breadth/{model}/8"
            ours = found[f"{key}/abslrp"]
            ratios.append(ours.row["ratio"])
            own = [number(found[f"{key}/forward"].row["value"])]
            for what in ("forward+backward", "logits", "abslrp", "attnlrp", "ramp"):
                there = found.get(f"{key}/{what}")
                mark = "" if there is None or there.record is ours.record else " †"
                own.append("–" if there is None else number(there.row["ratio"]) + mark)
            rows.append([title(records, machine), model, *own, measured(ours.record)])
        if ratios:
            mean = math.exp(statistics.fmean(map(math.log, ratios)))
            rows.append([title(records, machine), "geometric mean", "", "", "", number(mean), "", "", ""])
    head = [
        "machine",
        "model",
        "forward, ms",
        "forward + backward",
        "logits",
        "abslrp",
        "attnlrp",
        "ramp",
        "date, commit",
    ]
    return table(head, rows)


def latency(records: list[dict[str, Any]]) -> str:
    """The same of one image and of two."""
    rows = []
    for machine in sorted({record["machine"]["name"] for record in records}):
        found = newest(records, machine)
        models = dict.fromkeys(m[1] for name in found if (m := re.fullmatch(r"breadth/(\w+)/1/abslrp", name)))
        ratios: dict[int, list[float]] = {1: [], 2: []}
        for model in models:
            own: list[str] = []
            for batch, of in ratios.items():
                rule = found.get(f"breadth/{model}/{batch}/abslrp")
                if rule is None:
                    own += ["–"] * 3
                    continue
                of.append(rule.row["ratio"])
                forward, logits = (found[f"breadth/{model}/{batch}/{what}"].row for what in ("forward", "logits"))
                own += [number(batch * forward["value"]), number(logits["ratio"]), number(rule.row["ratio"])]
            record = found[f"breadth/{model}/1/abslrp"].record
            rows.append([title(records, machine), model, *own, measured(record)])
        if models:
            means = [number(math.exp(statistics.fmean(map(math.log, of)))) if of else "–" for of in ratios.values()]
            rows.append([title(records, machine), "geometric mean", "", "", means[0], "", "", means[1], ""])
    each = ["forward, ms", "logits", "abslrp"]
    images = [f"{which}: {what}" for which in ("one image", "two") for what in each]
    return table(["machine", "model", *images, "date, commit"], rows)


def overhead(records: list[dict[str, Any]]) -> str:
    """Calls with next to nothing to compute: all of their time, and what of it is outside kernels."""
    rows = []
    for machine in sorted({record["machine"]["name"] for record in records}):
        for name, there in newest(records, machine).items():
            if match := re.fullmatch(r"overhead/(\w+)/1/(.*)/outside kernels", name):
                whole = newest(records, machine)[name.removesuffix("/outside kernels")].row["value"]
                times = [f"{value:.2f}" for value in (whole, there.row["value"])]
                rows.append([title(records, machine), *match.groups(), *times, measured(there.record)])
    return table(["machine", "layers of", "call", "ms", "outside kernels, ms", "date, commit"], rows)


def methods(records: list[dict[str, Any]], machine: str = "zen5") -> str:
    """Forward passes and memory of rules and of other libraries' methods, batches of eight."""
    found, rows = newest(records, machine), []
    for model, label in {**MODELS, "vgg16": "VGG16"}.items():
        for method, title in METHODS.items():
            name = f"{model}/8/{method}"
            if name in found:
                memory = found.get(f"{name}/peak memory")
                megabytes = "–" if memory is None else number(memory.row["value"])
                rows.append([label, title, number(found[name].row["ratio"]), megabytes, measured(found[name].record)])
    return table(["model", "method", "forwards", "MB an image", "date, commit"], rows)


def rule_errors(records: list[dict[str, Any]]) -> str:
    """Every rule and network: the largest error in float64 of all machines, and that of "mixed"."""
    worst: dict[tuple[str, str], dict[str, float]] = {}
    for machine in sorted({record["machine"]["name"] for record in records}):
        for name, there in newest(records, machine).items():
            if name.startswith("error/"):
                _, network, rule, precision = name.split("/")
                own = worst.setdefault((rule, network), {})
                own[precision] = max(own.get(precision, 0.0), there.row["value"])
    networks = list(dict.fromkeys(network for _, network in worst))
    rows = []
    for rule in dict.fromkeys(rule for rule, _ in worst):
        cells = [worst.get((rule, network)) for network in networks]
        rows.append([f"`{rule}`", *("–" if c is None else f"{c['float64']:.0e}, {c['mixed']:.1%}" for c in cells)])
    return table(["rule", *networks], rows)


def construction(records: list[dict[str, Any]]) -> str:
    """Seconds of making an engine, of torch.export in that, and with a cache of captured graphs."""
    rows = []
    for machine in sorted({record["machine"]["name"] for record in records}):
        found = newest(records, machine)
        for name in (n for n in found if re.fullmatch(r"construction/\w+", n)):
            ours = found[name]
            parts = [found.get(f"{name}/{part}") for part in ("export", "cache")]
            seconds = [f"{part.row['value']:.2f}" if part else "–" for part in (ours, *parts)]
            rows.append([title(records, machine), name.partition("/")[2], *seconds, measured(ours.record)])
    return table(["machine", "model", "engine, s", "torch.export, s", "from the cache, s", "date, commit"], rows)


TABLES: dict[str, Callable[[list[dict[str, Any]]], str]] = {
    "networks": networks,
    "first-sight": first_sight,
    "breadth": breadth,
    "latency": latency,
    "overhead": overhead,
    "methods": methods,
    "rule-errors": rule_errors,
    "construction": construction,
    **{f"throughput/{model}": partial(throughput, model=model) for model in MODELS},
    **{f"breakdown/{model}": partial(breakdown, model=model) for model in MODELS},
}


def render(text: str, records: list[dict[str, Any]]) -> str:
    """A page with its tables as the results have them."""
    return _BLOCK.sub(lambda block: block[1] + TABLES[block[2]](records) + block[4], text)


def main(arguments: list[str] | None = None, root: Path = results_io.ROOT) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a page would change")
    args = parser.parse_args(arguments)
    records, stale = results_io.read(root / "bench" / "results"), []
    for page in PAGES:
        text = (root / page).read_text(encoding="utf-8")
        made = render(text, records)
        if made != text:
            stale.append(page)
            if not args.check:
                (root / page).write_text(made, encoding="utf-8")
    if args.check and stale:
        print(f"not what bench/results say: {', '.join(stale)}; run python bench/report.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
