"""How many of timm's model families attribute under which rules, and which operations the others lack.

Every family is a module of ``timm.models``; its smallest classifier stands for it. Each one is built with
random weights in a process of its own, and captured, planned and attributed under one rule after the other. Four
things are checked: the maps are finite, they are not zero, the logits are the model's own, and an image's map does
not depend on the image beside it.

    python bench/families.py                      # all families, a Markdown table with a column per rule
    python bench/families.py --family swin_transformer --family eva
    python bench/families.py --rule attnlrp --rule lrp-gamma:gamma=0.1
    python bench/families.py --results FILE --page docs/families.md   # can be stopped and taken up again
    python bench/families.py --capture-only       # operations only, no relevance
    python bench/families.py --all --family eva   # every model of a family
"""

from __future__ import annotations

import argparse
import collections
import json
import multiprocessing
import multiprocessing.connection
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch

from ramp_fast.capture import capture
from ramp_fast.capture.model_state import configured_shape
from ramp_fast.engine import Engine
from ramp_fast.errors import RampFastError, UnsupportedModelError
from ramp_fast.rules import resolve

try:
    import resource
except ImportError:  # Windows: only the clock on the wall limits a process
    resource = None  # type: ignore[assignment]

# What small models are called, smallest first.
SMALL = ("atto", "femto", "pico", "nano", "xxs", "xx_small", "xxt", "tiny", "xs", "x_small", "mini", "small",
         "_s", "_t", "050", "18", "26", "b0", "_0", "m0", "32", "16")  # fmt: skip
CANDIDATES = 12
CLASSES = 10
RULES = ("abslrp", "lrp-epsilon", "attnlrp", "ramp")
WORKS = "attributes"
CAPTURE = "capture"  # in the place of a rule
BEGIN, END = "<!-- bench/families.py: table -->", "<!-- bench/families.py: end -->"
LARGE = 512  # images of this size and more are attributed at SMALL_SIZE where the architecture allows it
SMALL_SIZE = 256
MEMORY = 10 * 2**30
WAIT = 10  # a process may take this many times its processor time
LOGITS_TOLERANCE = 1e-3  # float32, fused against unfused products
BATCH_TOLERANCE = 5e-2  # float32 with near-zero logits: rounding, not mixing, which changes a map altogether


@dataclass
class Result:
    """One row of the table.

    Attributes
    ----------
    statuses : dict of str to str
        By rule.
    operations : dict of str to int
        Those outside the vocabulary, which no rule has, with how often they occur.
    """

    family: str
    model: str
    statuses: dict[str, str]
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


def attribute(model: torch.nn.Module, shape: tuple[int, int, int], rule: str, precision: str) -> str:
    """Attribute two images with one model under one rule, and say what is wrong with the result."""
    images = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
    engine = Engine(model, rule, precision, micro_batch=2, input_shape=shape)
    both = engine.attribute(images, normalize="sum")
    second = engine.attribute(images[1:], normalize="sum")
    with torch.no_grad():
        logits = model(images)
    error = float((both.logits - logits).norm() / logits.norm())
    if not bool(both.maps.isfinite().all()):
        return "maps are not finite"
    if not bool((both.maps.flatten(1).abs().sum(1) > 0).all()):
        return "maps are zero"
    if error > LOGITS_TOLERANCE:
        return f"logits differ from the model's by {error:.1e}"
    mixed = float((both.maps[1] - second.maps[0]).norm() / second.maps[0].norm())
    if mixed > BATCH_TOLERANCE:
        return f"maps depend on the batch: {mixed:.1e}"
    return WORKS


def survey_model(family: str, name: str, rules: list[str], precision: str) -> Result:
    """One model under every rule; without rules it is captured and no more."""
    torch.manual_seed(0)
    model = build(name)
    fill(model)
    shape = image_shape(model)
    result = Result(family, name, {})
    for rule in rules or [CAPTURE]:
        try:
            if rule == CAPTURE:
                capture(model, shape)
                result.statuses[rule] = "captures"
            else:
                result.statuses[rule] = attribute(model, shape, rule, precision)
        except UnsupportedModelError as error:
            unknown = [operation for operation, _ in error.operations if "." in operation]  # ATen's, not a kind
            if unknown:  # every rule refuses it
                result.operations = dict(collections.Counter(unknown))
                result.statuses = dict.fromkeys(rules or [CAPTURE], "unsupported")
                break
            result.statuses[rule] = f"refused: {_first_line(error)}"
        except RampFastError as error:
            result.statuses[rule] = f"refused: {_first_line(error)}"
        except Exception as error:
            result.statuses[rule] = _described(error)
    return result


def work(
    pipe: multiprocessing.connection.Connection,
    family: str,
    name: str | None,
    rules: list[str],
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
        result = survey_model(family, name, rules, precision)
    except Exception as error:  # while the model is built
        result = Result(family, name, dict.fromkeys(rules or [CAPTURE], _described(error)))
    result.seconds = time.process_time()
    pipe.send(result)
    pipe.close()


def _described(error: Exception) -> str:
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return f"more than {MEMORY >> 30} GiB of memory"
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"error: {type(error).__name__}: {_first_line(error)} ({Path(place.filename).name}:{place.lineno})"


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]


def survey(
    jobs: list[tuple[str, str | None]],
    rules: list[str],
    precision: str,
    limit: float,
    workers: int,
    done: Callable[[Result], None],
) -> None:
    """Run every job in a process of its own, at most ``workers`` at a time, ``limit`` seconds each."""
    # The parent has never run an operator: no threads, so that forking saves the imports.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    waiting, running = list(reversed(jobs)), []
    while waiting or running:
        while waiting and len(running) < workers:
            family, name = waiting.pop()
            here, there = context.Pipe(duplex=False)
            process = context.Process(target=work, args=(there, family, name, rules, precision, limit), daemon=True)
            process.start()
            there.close()
            running.append({"process": process, "pipe": here, "family": family, "name": name or "?", "rules": rules,
                            "start": time.perf_counter()})  # fmt: skip
        multiprocessing.connection.wait([job["pipe"] for job in running], timeout=1.0)
        for job in list(running):
            result = _poll(job, limit)
            if result is None:
                continue
            running.remove(job)
            job["process"].join()
            done(result)
            statuses = "; ".join(f"{rule}: {status}" for rule, status in result.statuses.items())
            print(f"{len(waiting) + len(running)} left. {result.family} {result.model} {statuses} "
                  f"{'; '.join(result.operations)} {result.seconds:.0f} s", file=sys.stderr, flush=True)  # fmt: skip


def _poll(job: dict[str, Any], limit: float) -> Result | None:
    def ended(status: str, seconds: float) -> Result:
        statuses = dict.fromkeys(job["rules"] or [CAPTURE], status)
        return Result(job["family"], job["name"], statuses, seconds=seconds)

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
        return ended(status, limit)
    if seconds > WAIT * limit:
        job["process"].kill()
        return ended(f"more than {limit:.0f} s", seconds)
    return None


def table(results: list[Result], noun: str) -> str:
    """Markdown: a summary, the models by rules, and the missing operations by how many families lack them."""
    rules = list(dict.fromkeys(rule for r in results for rule in r.statuses))
    works = {rule: sum(r.statuses.get(rule) in (WORKS, "captures") for r in results) for rule in rules}
    counts = ", ".join(f"{rule} {count}" for rule, count in works.items())
    lines = [f"Of {len(results)} {noun} (timm {timm.__version__}, torch {torch.__version__}): {counts}.", ""]
    lines += [f"| family | model | {' | '.join(rules)} | seconds |", "|---|---|" + "---|" * len(rules) + "---|"]
    for r in sorted(results, key=lambda r: (r.family, r.model)):
        missing = ", ".join(f"{o} ({n})" if n > 1 else o for o, n in sorted(r.operations.items()))
        cells = [r.statuses.get(rule, "") + (f": {missing}" if missing else "") for rule in rules]
        lines.append(f"| {r.family} | {r.model} | {' | '.join(cells)} | {r.seconds:.0f} |".replace("\n", " "))
    lacking: dict[str, list[str]] = collections.defaultdict(list)
    for r in results:
        for operation in r.operations:
            lacking[operation].append(r.family)
    if lacking:
        lines += ["", "| unsupported operation | lacking | of these, lacking nothing else |", "|---|---|---|"]
        only = {r.family for r in results if len(r.operations) == 1}
        for operation, families in sorted(lacking.items(), key=lambda item: -len(item[1])):
            alone = [f for f in families if f in only]
            lines.append(f"| {operation} | {', '.join(families)} | {', '.join(alone)} |")
    return "\n".join(lines)


class Results:
    """Results, and the file of them, one line of JSON for each: what is in it is not computed again."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path is not None and path.exists() else []
        self.all = [Result(**json.loads(line)) for line in lines]

    def add(self, result: Result) -> None:
        """One more, written at once."""
        self.all.append(result)
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(result)) + "\n")

    def has(self, family: str, name: str | None) -> bool:
        """Whether the model, or any of the family where no model is named, is among them."""
        return any(r.family == family and name in (None, r.model) for r in self.all)


def write_page(path: Path, text: str) -> None:
    """Put a table into a page, between the marks."""
    page = path.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    path.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", action="append", help="only this family (may repeat)")
    parser.add_argument("--model", action="append", help="only this model (may repeat)")
    parser.add_argument("--all", action="store_true", help="every model of the families, not only the smallest")
    parser.add_argument("--rule", action="append", help=f"under this rule (may repeat; default: {', '.join(RULES)})")
    parser.add_argument("--capture-only", action="store_true", help="stop after capture")
    parser.add_argument("--precision", default="mixed", help="of the engine (default: mixed)")
    parser.add_argument("--limit", type=float, default=800.0, help="processor seconds per model (default: 800)")
    parser.add_argument("--workers", type=int, default=1, help="models at a time (default: 1)")
    parser.add_argument("--results", type=Path, help="keep results in this file, and leave out those it has")
    parser.add_argument("--out", type=Path, help="write the table to this file as well")
    parser.add_argument("--page", type=Path, help="put the table into this page, in the place of the one it has")
    options = parser.parse_args()
    rules = [] if options.capture_only else options.rule or list(RULES)
    for rule in rules:
        resolve(rule)
    jobs: list[tuple[str, str | None]]
    if options.model:
        jobs = [(timm.models._registry._model_to_module.get(name, "?"), name) for name in options.model]
    else:
        families = options.family or timm.list_modules()
        unknown = sorted(set(families) - set(timm.list_modules()))
        if unknown:
            parser.error(f"timm has no family {', '.join(unknown)}")
        jobs = [(f, n) for f in families for n in (candidates(f) if options.all else [None])]
    results = Results(options.results)
    jobs = [job for job in jobs if not results.has(*job)]
    survey(jobs, rules, options.precision, options.limit, options.workers, results.add)
    text = table(results.all, "models" if options.all or options.model else "families")
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n", encoding="utf-8")
    if options.page is not None:
        write_page(options.page, text)


if __name__ == "__main__":
    main()
