"""How many of timm's model families attribute, and which operations the others lack.

Every family is a module of ``timm.models``; its smallest classifier stands for it. Each one is built with
random weights, captured, planned and attributed in a process of its own, and four things are checked: the maps
are finite, they are not zero, the logits are the model's own, and an image's map does not depend on the image
beside it.

    python bench/families.py                      # all families, a Markdown table
    python bench/families.py --family swin_transformer --family eva
    python bench/families.py --capture-only       # operations only, no relevance
    python bench/families.py --all --family eva   # every model of a family
"""

from __future__ import annotations

import argparse
import collections
import multiprocessing
import multiprocessing.connection
import signal
import sys
import time
import traceback
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch

from ramp_fast.capture import capture
from ramp_fast.capture.model_state import configured_shape
from ramp_fast.engine import Engine
from ramp_fast.errors import RampFastError, UnsupportedModelError

try:
    import resource
except ImportError:  # Windows: only the clock on the wall limits a process
    resource = None  # type: ignore[assignment]

# What small models are called, smallest first.
SMALL = ("atto", "femto", "pico", "nano", "xxs", "xx_small", "xxt", "tiny", "xs", "x_small", "mini", "small",
         "_s", "_t", "050", "18", "26", "b0", "_0", "m0", "32", "16")  # fmt: skip
CANDIDATES = 12
CLASSES = 10
LARGE = 512  # images of this size and more are attributed at SMALL_SIZE where the architecture allows it
SMALL_SIZE = 256
MEMORY = 10 * 2**30
WAIT = 10  # a process may take this many times its processor time
LOGITS_TOLERANCE = 1e-3  # float32, fused against unfused products
BATCH_TOLERANCE = 5e-2  # float32 with near-zero logits: rounding, not mixing, which changes a map altogether


@dataclass
class Result:
    """One row of the table."""

    family: str
    model: str
    status: str
    operations: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0


def candidates(family: str) -> list[str]:
    """Classifiers of a family, small ones first; ``test_*`` models are not architectures that people use."""
    names = [n for n in timm.list_models(module=family) if not n.startswith("test_")]

    def rank(name: str) -> int:
        return min((i for i, s in enumerate(SMALL) if s in name), default=len(SMALL))

    return sorted(names, key=lambda n: (rank(n), n))


def build(name: str, device: str = "cpu") -> torch.nn.Module:
    """The architecture with random weights and few classes."""
    config = timm.get_pretrained_cfg(name)
    size = {"img_size": SMALL_SIZE} if config is not None and config.input_size[-1] >= LARGE else {}
    options: list[dict[str, int]] = [{"num_classes": CLASSES, **size}, {"num_classes": CLASSES}, {}]
    with torch.device(device):
        for given in options:
            try:
                return timm.create_model(name, pretrained=False, **given).eval()
            except TypeError:  # an architecture without this option
                if not given:
                    raise
    raise AssertionError("the last set of options is empty")


def smallest(family: str) -> str:
    """The model with the fewest parameters among the first candidates, counted without memory."""
    names = candidates(family)[:CANDIDATES]
    sizes: dict[str, int] = {}
    for name in names:
        try:
            model = build(name, "meta")
            if getattr(model, "num_classes", CLASSES) != 0 and not name.endswith("_enc"):  # encoders have no logits
                sizes[name] = sum(p.numel() for p in model.parameters())
        except Exception:  # some models compute values while they are built
            continue
    return min(sizes, key=lambda n: sizes[n]) if sizes else names[0]


def fill(model: torch.nn.Module, seed: int = 0) -> None:
    """Give parameters that start at zero (heads, residual scales, position embeddings) random values."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            if not p.is_floating_point() or p.numel() == 0 or float(p.abs().max()) > 1e-4:
                continue
            noise = torch.randn(p.shape, generator=random)
            if p.dim() >= 2 and name.endswith("weight"):
                p.copy_(noise / p[0].numel() ** 0.5)
            else:
                p.copy_(0.1 * noise)


def image_shape(model: torch.nn.Module) -> tuple[int, int, int]:
    """The configured one, or a small one where that is large and the model takes any."""
    shape = configured_shape(model)
    assert shape is not None, "timm's configuration has no input size"
    small = (shape[0], SMALL_SIZE, SMALL_SIZE)
    if shape[-1] >= LARGE:
        try:
            with torch.no_grad():
                model(torch.zeros(1, *small))
        except Exception:
            return shape
        return small
    return shape


def attribute(family: str, name: str, capture_only: bool, precision: str) -> Result:
    """Attribute two images with one model and check the result."""
    torch.manual_seed(0)
    model = build(name)
    fill(model)
    shape = image_shape(model)
    if capture_only:
        capture(model, shape)
        return Result(family, name, "captures")
    images = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
    engine = Engine(model, precision=precision, micro_batch=2, input_shape=shape)
    both = engine.attribute(images, normalize="sum")
    second = engine.attribute(images[1:], normalize="sum")
    with torch.no_grad():
        logits = model(images)
    error = float((both.logits - logits).norm() / logits.norm())
    if not bool(both.maps.isfinite().all()):
        return Result(family, name, "maps are not finite")
    if not bool((both.maps.flatten(1).abs().sum(1) > 0).all()):
        return Result(family, name, "maps are zero")
    if error > LOGITS_TOLERANCE:
        return Result(family, name, f"logits differ from the model's by {error:.1e}")
    mixed = float((both.maps[1] - second.maps[0]).norm() / second.maps[0].norm())
    if mixed > BATCH_TOLERANCE:
        return Result(family, name, f"maps depend on the batch: {mixed:.1e}")
    return Result(family, name, "attributes")


def work(
    pipe: multiprocessing.connection.Connection,
    family: str,
    name: str | None,
    capture_only: bool,
    precision: str,
    limit: float,
) -> None:
    """Body of the process of one model."""
    warnings.simplefilter("ignore")
    if resource is not None:
        resource.setrlimit(resource.RLIMIT_CPU, (int(limit), int(limit) + 5))
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))  # an error in this process, not the machine's end
    name = name or smallest(family)
    pipe.send(name)
    try:
        result = attribute(family, name, capture_only, precision)
    except UnsupportedModelError as error:
        if error.operations:
            counts = collections.Counter(operation for operation, _ in error.operations)
            result = Result(family, name, "unsupported", dict(counts))
        else:
            result = Result(family, name, f"refused: {_first_line(error)}")
    except RampFastError as error:
        result = Result(family, name, f"refused: {_first_line(error)}")
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(place.filename).name}:{place.lineno}"
        result = Result(family, name, f"error: {type(error).__name__}: {_first_line(error)} ({where})")
    result.seconds = time.process_time()
    pipe.send(result)
    pipe.close()


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]


def survey(
    jobs: list[tuple[str, str | None]], capture_only: bool, precision: str, limit: float, workers: int
) -> list[Result]:
    """Run every job in a process of its own, at most ``workers`` at a time, ``limit`` seconds each."""
    # The parent has never run an operator: no threads, so that forking saves the imports.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    waiting, running, results = list(reversed(jobs)), [], []
    while waiting or running:
        while waiting and len(running) < workers:
            family, name = waiting.pop()
            here, there = context.Pipe(duplex=False)
            process = context.Process(
                target=work, args=(there, family, name, capture_only, precision, limit), daemon=True
            )
            process.start()
            there.close()
            running.append({"process": process, "pipe": here, "family": family, "name": name or "?",
                            "start": time.perf_counter()})  # fmt: skip
        multiprocessing.connection.wait([job["pipe"] for job in running], timeout=1.0)
        for job in list(running):
            result = _poll(job, limit)
            if result is None:
                continue
            running.remove(job)
            job["process"].join()
            results.append(result)
            ops = "; ".join(result.operations)
            print(f"{len(results)}/{len(jobs)} {result.family} {result.model} {result.status} {ops} "
                  f"{result.seconds:.0f} s", file=sys.stderr, flush=True)  # fmt: skip
    return results


def _poll(job: dict[str, Any], limit: float) -> Result | None:
    seconds = time.perf_counter() - job["start"]
    try:
        while job["pipe"].poll():
            message = job["pipe"].recv()
            if isinstance(message, Result):
                return message
            job["name"] = message
    except EOFError:
        job["process"].join()
        code = job["process"].exitcode
        late = code is not None and -code in (getattr(signal, "SIGXCPU", 0),)
        status = f"more than {limit:.0f} s" if late else f"the process died ({code})"
        return Result(job["family"], job["name"], status, seconds=limit)
    if seconds > WAIT * limit:
        job["process"].kill()
        return Result(job["family"], job["name"], f"more than {limit:.0f} s", seconds=seconds)
    return None


def table(results: list[Result], per_family: bool = True) -> str:
    """Markdown: a summary, the models, and the missing operations by how many families lack them."""
    done = [r for r in results if r.status in ("attributes", "captures")]
    noun = "families" if per_family else "models"
    lines = [f"{len(done)} of {len(results)} {noun} (timm {timm.__version__}, torch {torch.__version__})", ""]
    lines += ["| family | model | status | seconds |", "|---|---|---|---|"]
    for r in sorted(results, key=lambda r: (r.family, r.model)):
        what = r.status
        if r.operations:
            what += ": " + ", ".join(f"{o} ({n})" if n > 1 else o for o, n in sorted(r.operations.items()))
        lines.append(f"| {r.family} | {r.model} | {what} | {r.seconds:.0f} |".replace("\n", " "))
    missing: dict[str, list[str]] = collections.defaultdict(list)
    for r in results:
        for operation in r.operations:
            missing[operation].append(r.family)
    if missing:
        lines += ["", "| unsupported operation | lacking | of these, lacking nothing else |", "|---|---|---|"]
        only = {r.family for r in results if len(r.operations) == 1}
        for operation, families in sorted(missing.items(), key=lambda item: -len(item[1])):
            alone = [f for f in families if f in only]
            lines.append(f"| {operation} | {', '.join(families)} | {', '.join(alone)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", action="append", help="only this family (may repeat)")
    parser.add_argument("--model", action="append", help="only this model (may repeat)")
    parser.add_argument("--all", action="store_true", help="every model of the families, not only the smallest")
    parser.add_argument("--capture-only", action="store_true", help="stop after capture")
    parser.add_argument("--precision", default="mixed", help="of the engine (default: mixed)")
    parser.add_argument("--limit", type=float, default=400.0, help="processor seconds per model (default: 400)")
    parser.add_argument("--workers", type=int, default=1, help="models at a time (default: 1)")
    parser.add_argument("--out", type=Path, help="write the table to this file as well")
    options = parser.parse_args()
    jobs: list[tuple[str, str | None]]
    if options.model:
        jobs = [(timm.models._registry._model_to_module.get(name, "?"), name) for name in options.model]
    else:
        families = options.family or timm.list_modules()
        unknown = sorted(set(families) - set(timm.list_modules()))
        if unknown:
            parser.error(f"timm has no family {', '.join(unknown)}")
        jobs = [(f, n) for f in families for n in (candidates(f) if options.all else [None])]
    results = survey(jobs, options.capture_only, options.precision, options.limit, options.workers)
    text = table(results, per_family=not (options.all or options.model))
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
