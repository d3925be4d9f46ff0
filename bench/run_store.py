"""What `ramp-fast run` costs beside the engine: a command for each question.

    python bench/run_store.py ratio --model resnet18        run over engine alone, images/s
    python bench/run_store.py pipeline                      all but the engine: decoding, resizing, writing
    python bench/run_store.py rerun --images 50000          a run that finds nothing to do
    python bench/run_store.py memory --images 100000        memory above the engine's, over the run
    python bench/run_store.py kills --times 40              SIGKILL at random moments, then whether the bytes are equal
    python bench/run_store.py decoders                      Pillow, simplejpeg, torchvision: speed and pixels
    python bench/run_store.py fast-decode                   what --fast-decode changes in pixels and maps

Images are JPEGs of 500 x 375, made here; a large set holds few of them under many names. Every command prints JSON.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ramp_fast import Engine
from ramp_fast.data import ClassNames, Preprocessing, open_source
from ramp_fast.data.decoders import Decoders
from ramp_fast.data.pixels import Framing
from ramp_fast.explainer import Attribution
from ramp_fast.models import LoadedModel
from ramp_fast.pipeline.planning import make_plan
from ramp_fast.pipeline.run import Job, Tally
from ramp_fast.pipeline.targets import Targets
from ramp_fast.results import open_maps
from ramp_fast.results.map_writer import MapWriter
from ramp_fast.results.maps import read_journals

DISTINCT = 64
CONFIG: dict[str, Any] = {
    "input_size": (3, 224, 224),
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "interpolation": "bicubic",
    "crop_pct": 0.875,
}


def photographs(folder: Path, count: int, size: tuple[int, int] = (500, 375)) -> Path:
    """A folder of ``count`` JPEGs with texture of many scales, of about 100 KB as ImageNet's are."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(min(DISTINCT, count)):
        layers = []
        for scale in (4, 16, 64, 250):
            coarse = rng.integers(0, 255, (max(2, size[1] // (500 // scale)), scale, 3), dtype=np.uint8)
            layers.append(np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC), np.float32))
        picture = np.average(layers, axis=0, weights=(8, 4, 2, 1.5)).clip(0, 255).astype(np.uint8)
        Image.fromarray(picture).save(folder / f"{number:08d}.jpg", quality=95)
    for number in range(DISTINCT, count):
        os.link(folder / f"{number % DISTINCT:08d}.jpg", folder / f"{number:08d}.jpg")
    return folder


class FreeEngine:
    """Gives the images themselves as maps."""

    def __init__(self, classes: int = 1000) -> None:
        self.classes = classes

    def attribute(self, images: Tensor, target: Any = None, contrast: str = "", normalize: str = "") -> Attribution:
        logits = torch.zeros(len(images), self.classes)
        return Attribution(images, torch.zeros(len(images), dtype=torch.long), logits)

    def logits(self, images: Tensor) -> Tensor:
        return torch.zeros(len(images), self.classes)


@contextmanager
def job(
    engine: Any, folder: Path, out: Path, workers: int, batch_size: int, shard_size: int = 512
) -> Iterator[tuple[Job, MapWriter]]:
    """A run as the command line builds it, with any engine."""
    source = open_source(folder)
    loaded = LoadedModel(torch.nn.Identity(), "free", "none", Preprocessing(CONFIG), ClassNames(1000))
    targets = Targets.parse("predicted")
    with MapWriter(out) as store, Decoders(Framing.of(CONFIG), batch_size, workers) as decoders:
        plan, images = make_plan(
            {}, {}, loaded, source, None, targets, dtype="float16", channels=False, shard_size=shard_size
        )
        store.create(plan, images)
        settings = {"mean": CONFIG["mean"], "std": CONFIG["std"], "device": torch.device("cpu"), "targets": targets}
        yield Job(engine, store, source.locate, [-1] * len(source), decoders, **settings), store


def about(tally: Tally) -> dict[str, Any]:
    return {
        "images": tally.images,
        "images_per_second": round(tally.images / tally.seconds, 1),
        **{name: round(share, 4) for name, share in tally.shares().items()},
        "decoding_ms": round(1000 * tally.decoding / max(1, tally.images), 3),
    }


def pipeline(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    folder = photographs(work / "images", arguments.images)
    found: dict[str, list[float]] = {"two_cores": [], "one_core": []}
    details: dict[str, Any] = {}
    cores = sorted(os.sched_getaffinity(0))[:2]
    for turn in range(arguments.rounds):
        for name, on, workers in (("two_cores", cores, 2), ("one_core", cores[:1], 1)):
            os.sched_setaffinity(0, on)
            torch.set_num_threads(1)
            with job(FreeEngine(), folder, work / f"out-{name}-{turn}", workers, 16) as (run, store):
                list(run.decoders.batches([[run.locate(0)]]))  # processes are there
                before = time.process_time()
                tally = run.run(range(store.plan.shards))  # type: ignore[union-attr]  # it was created
                own = 1000 * (time.process_time() - before) / tally.images
                found[name].append(tally.images / tally.seconds)
                details[name] = {**about(tally), "own_processor_ms": round(own, 3)}
    best = {name: max(rates) for name, rates in found.items()}
    return {"rates": found, "ratio": best["two_cores"] / best["one_core"], "last": details}


def ratio(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    import timm

    torch.manual_seed(0)
    model = timm.create_model(arguments.model).eval()
    engine = Engine(model)
    folder = photographs(work / "images", arguments.images)
    batch = arguments.batch_size
    images = torch.randn(batch, 3, 224, 224)
    for _ in range(3):
        engine.attribute(images)

    processor: dict[str, list[float]] = {"alone": [], "run": []}  # ms an image: on a busy machine these say more

    def alone() -> float:
        started, before = time.perf_counter(), time.process_time()
        for _ in range(arguments.images // batch):
            engine.attribute(images)
        count = arguments.images // batch * batch
        processor["alone"].append(1000 * (time.process_time() - before) / count)
        return count / (time.perf_counter() - started)

    pairs, details = [], {}
    for turn in range(arguments.rounds):
        first = alone()
        with job(engine, folder, work / f"out-{turn}", arguments.workers, batch) as (run, store):
            list(run.decoders.batches([[run.locate(0)]]))
            before = time.process_time()
            tally = run.run(range(store.plan.shards))  # type: ignore[union-attr]  # it was created
            own = time.process_time() - before
            processor["run"].append(1000 * (own + tally.decoding) / tally.images)
            details = about(tally)
        second = alone()
        pairs.append((tally.images / tally.seconds, (first + second) / 2))
    ratios = [run_rate / rate for run_rate, rate in pairs]
    spent = {name: statistics.median(values) for name, values in processor.items()}
    return {
        "model": arguments.model,
        "pairs": pairs,
        "ratio": statistics.median(ratios),
        "processor_ms": spent,
        "ratio_of_processor_time": spent["alone"] / spent["run"],
        "last": details,
    }


def command(*arguments: Any) -> list[str]:
    return [sys.executable, "-P", "-m", "ramp_fast.cli", *(str(a) for a in arguments)]


def small_checkpoint(work: Path, size: int) -> Path:
    import safetensors.torch
    import timm

    torch.manual_seed(0)
    path = work / "weights.safetensors"
    safetensors.torch.save_file(timm.create_model("test_vit", num_classes=10, img_size=size).state_dict(), path)
    return path


def small_run(work: Path, folder: Path, out: Path, *more: Any) -> list[str]:
    """A run of a model of 0.4 million parameters on 32 x 32 pixels."""
    weights = work / "weights.safetensors"
    if not weights.exists():
        small_checkpoint(work, 32)
    model = ("--model", "test_vit", "--checkpoint", weights, "--num-classes", 10)
    return command("run", folder, *model, "--model-arg", "img_size=32", "--out", out, *more)


def rerun(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    """The first run has an engine that costs nothing; the second one is the command as it is."""
    folder = photographs(work / "images", arguments.images, (64, 48))
    call = small_run(work, folder, work / "out", "--batch-size", 64)
    started = time.perf_counter()
    subprocess.run(without_engine(call), check=True, stdout=subprocess.DEVNULL)
    seconds = []
    for _ in range(3):
        middle = time.perf_counter()
        said = subprocess.run(call, check=True, capture_output=True, text=True).stdout
        seconds.append(time.perf_counter() - middle)
    return {"said": said.strip(), "first": middle - started, "seconds": seconds}


def without_engine(call: Sequence[str]) -> list[str]:
    """The command with an engine that costs nothing."""
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import run_store; from ramp_fast import cli;"
        "from ramp_fast.cli import run;"
        "run.make_engine = lambda model, *rest: run_store.FreeEngine(model.num_classes);"
        "sys.exit(cli.main(sys.argv[1:]))"
    )
    return [call[0], "-P", "-c", code, *call[call.index("run") :]]


def resident(process: int) -> int:
    """Proportional share of memory of a process and those it has started, in bytes."""
    total = 0
    for number in (process, *children(process)):
        try:
            text = Path(f"/proc/{number}/smaps_rollup").read_text()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:"))
    return total * 1024


def children(process: int) -> list[int]:
    found = []
    for folder in Path(f"/proc/{process}/task").glob("*/children"):
        for word in folder.read_text().split():
            found += [int(word), *children(int(word))]
    return found


def memory(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Of a run with an engine that costs nothing, above a process that has torch, timm and the model."""
    folder = photographs(work / "images", arguments.images, (64, 48))
    weights = small_checkpoint(work, 224)
    code = (
        "import sys, time, timm, torch, ramp_fast.models as m; from ramp_fast import Engine;"
        f"l = m.load_model('test_vit', {str(weights)!r}, num_classes=10, model_args={{'img_size': 224}});"
        "x = torch.zeros(64, 3, 224, 224); print('ready', flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-P", "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        alone = resident(process.pid)
        process.kill()
    model = ("--model", "test_vit", "--checkpoint", weights, "--num-classes", 10, "--model-arg", "img_size=224")
    call = command("run", folder, *model, "--out", work / "out", "--batch-size", 64, "--log-json")
    seen: list[tuple[float, int]] = []
    log = work / "log"
    with open(log, "w") as file, subprocess.Popen(without_engine(call), stdout=file) as run:
        started = time.perf_counter()
        while run.poll() is None and time.perf_counter() - started < arguments.seconds:
            time.sleep(0.5)
            above = resident(run.pid) - alone
            if above > 0:
                seen.append((round(time.perf_counter() - started, 1), above))
        run.send_signal(signal.SIGINT)
    lines = log.read_text().splitlines()
    last = json.loads(lines[-1]) if lines else {}
    # Without the last second, when processes have ended.
    second_half = [above for at, above in seen[:-2] if at > seen[-1][0] / 2]
    return {
        "alone_mb": round(alone / 1e6),
        "most_above_mb": round(max(above for _, above in seen) / 1e6),
        "second_half_mb": [round(min(second_half) / 1e6), round(max(second_half) / 1e6)],
        "images": last.get("images"),
        "images_per_second": last.get("images_per_second"),
        "tenths_mb": [round(above / 1e6) for _, above in seen[:: max(1, len(seen) // 10)]],
    }


def same(one: Path, other: Path) -> list[str]:
    """Files that differ between two stores, but for what says when they were written, and by which part of a run."""
    skipped = {"runs.jsonl"}
    files = {
        str(path.relative_to(root))
        for root in (one, other)
        for path in root.rglob("*")
        if path.is_file()
        and path.name not in skipped
        and path.parent.name != "locks"
        and not path.match("journal*.jsonl")
    }
    different = [
        name
        for name in sorted(files)
        if not ((one / name).is_file() and (other / name).is_file() and filecmp.cmp(one / name, other / name, False))
    ]
    # Of a run in parts there is a journal for each part.
    return different + ["journals"] * (read_journals(one) != read_journals(other))


class Forked:
    """A command in a copy of this process, which has imported all that it needs: it is killed at its work."""

    def __init__(self, call: Sequence[str]) -> None:
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            nowhere = os.open(os.devnull, os.O_RDWR)
            for stream in (0, 1, 2):
                os.dup2(nowhere, stream)
            from ramp_fast import cli

            os._exit(cli.main(call[call.index("run") :]))

    def wait(self, seconds: float = float("inf")) -> int:
        until = time.monotonic() + seconds
        while True:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(status)
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired("run", seconds)
            time.sleep(0.002)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)


def started(call: Sequence[str], on_ray: bool) -> Any:
    """A run as a process, and the first of a group: under Ray of an interpreter of its own."""
    if not on_ray:
        return Forked(call)
    return subprocess.Popen(call, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)


def wait(process: Any, draw: random.Random, seconds: float, out: Path, shards: int) -> int:
    """Wait for a run: its status, or TimeoutExpired at a random moment.

    That is a moment of the ``seconds`` that a run takes, or of the one in which one more of its shards is finished.
    """
    if draw.random() < 0.5:
        status: int = process.wait(draw.uniform(0.1, 1.1) * seconds)
        return status
    done = len(read_journals(out))
    until = draw.randint(done, shards)
    started = time.monotonic()
    while len(read_journals(out)) < until and time.monotonic() - started < 10 * seconds:
        with suppress(subprocess.TimeoutExpired):
            return int(process.wait(0.01))
    return int(process.wait(draw.uniform(0.0, seconds / shards)))


def kill(process: Any, draw: random.Random, on_ray: bool) -> str:
    """SIGKILL to a run with the processes that decode, to it alone, or under Ray to a worker; returns which.

    Returns when none of its processes is left, or under Ray, where the others go on without the worker, when the run
    has ended.
    """
    own = children(process.pid)
    workers = [number for number in own if _begins(number, b"ray::work")]  # cli.on_ray's
    agents = [number for number in own if _begins(number, b"ray::") and b"Agent" in _command(number)]
    if workers and draw.random() < 0.5:
        os.kill(draw.choice(workers), signal.SIGKILL)
        process.wait()
        return "worker"
    which = "run"
    if not on_ray and draw.random() < 0.5:
        os.killpg(process.pid, signal.SIGKILL)
        which = "run and decoders"
    else:
        process.kill()
    process.wait()
    for number in agents:  # of Ray, which look once a minute whether their cluster is there, and have no image
        with suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
    until = time.monotonic() + 120
    while any(_begins(number, b"") for number in own):
        assert time.monotonic() < until, "processes of a killed run do not end"
        time.sleep(0.1)
    return which


def _command(process: int) -> bytes:
    """Its command line; empty where it has ended."""
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return b""


def _begins(process: int, name: bytes) -> bool:
    """Whether a process is there and its command line begins so."""
    said = _command(process)
    return bool(said) and said.startswith(name)


def kills(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    folder = photographs(work / "images", arguments.images, (64, 48))
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no image")
    more: tuple[Any, ...] = ("--shard-size", 32, "--batch-size", 8)
    torch.set_num_threads(1)  # copies of this process have one thread
    if arguments.ray:  # the bytes are those of a run without Ray
        started(small_run(work, folder, work / "plain", *more), False).wait()
        more += ("--ray",)
    begun = time.perf_counter()
    started(small_run(work, folder, work / "whole", *more), arguments.ray).wait()
    whole = time.perf_counter() - begun
    done = int(open_maps(work / "whole").done.sum())
    assert done == arguments.images, f"{done} of {arguments.images} images have a map"
    draw, shards_of_all = random.Random(arguments.seed), len(read_journals(work / "whole"))
    killed: dict[str, int] = {}
    runs = gave_up = 0
    stores: list[list[str]] = []
    shards: list[int] = []  # finished when it was killed
    while sum(killed.values()) < arguments.times and time.perf_counter() - begun < arguments.seconds:
        out = work / f"killed-{len(stores)}"
        for _ in range(200):
            runs += 1
            call = small_run(work, folder, out, *more)
            process = started(call, arguments.ray)
            try:
                status = wait(process, draw, whole, out, shards_of_all)
            except subprocess.TimeoutExpired:
                found = kill(process, draw, arguments.ray)
                killed[found] = killed.get(found, 0) + 1
                shards.append(len(read_journals(out)))
                continue
            assert status in (0, 2), status
            if len(read_journals(out)) == shards_of_all:
                break
            gave_up += 1  # it said so: under Ray, where no worker was left
        stores.append(same(work / ("plain" if arguments.ray else "whole"), out))
    return {
        "kills": sum(killed.values()),
        "of": killed,
        "seconds_of_a_run": round(whole, 1),
        "runs": runs,
        "gave_up": gave_up,
        "stores": len(stores),
        "differences": [d for d in stores if d],
        "finished_shards_at_kills": shards,
    }


def decoders(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    import io

    import simplejpeg
    import torchvision

    folder = photographs(work / "images", DISTINCT)
    data = [path.read_bytes() for path in sorted(folder.iterdir())]
    torch.set_num_threads(1)

    def pillow(encoded: bytes) -> Any:
        image = Image.open(io.BytesIO(encoded))
        image.load()
        return np.asarray(image)

    def by_torchvision(encoded: bytes) -> Any:
        given = torch.frombuffer(bytearray(encoded), dtype=torch.uint8)
        return torchvision.io.decode_jpeg(given).permute(1, 2, 0).numpy()

    ways = {
        "pillow": pillow,
        "simplejpeg": lambda encoded: simplejpeg.decode_jpeg(encoded, strict=True),
        "torchvision": lambda encoded: (
            torchvision.io.decode_jpeg(torch.frombuffer(bytearray(encoded), dtype=torch.uint8)).permute(1, 2, 0).numpy()
        ),
    }
    reference = [pillow(encoded) for encoded in data]
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(arguments.rounds):
        for name, decode in ways.items():
            started = time.perf_counter()
            for encoded in data:
                decode(encoded)
            rates[name].append(len(data) / (time.perf_counter() - started))
    differences = {
        name: max(int(np.abs(decode(e).astype(int) - r).max()) for e, r in zip(data, reference, strict=True))
        for name, decode in ways.items()
    }
    framing, prepare = Framing.of(CONFIG), Preprocessing(CONFIG)
    from ramp_fast.data import read_image

    path = sorted(folder.iterdir())
    started = time.perf_counter()
    for p in path:
        prepare(read_image(p))
    middle = time.perf_counter()
    for p in path:
        with open(p, "rb") as file:
            framing(file)
    end = time.perf_counter()
    return {
        "kilobytes": statistics.mean(map(len, data)) / 1e3,
        "images_per_second": {name: round(max(found)) for name, found in rates.items()},
        "largest_difference_to_pillow": differences,
        "timm_ms": 1000 * (middle - started) / len(path),
        "framing_ms": 1000 * (end - middle) / len(path),
    }


def fast_decode(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    from ramp_fast.demo import demo_photographs
    from ramp_fast.models import load_model

    loaded = load_model("demo")
    engine = Engine(loaded.model)
    config = loaded.preprocessing.config
    scaled: list[Path] = []
    for path in demo_photographs():  # as from a camera, so that there is something to leave out
        with Image.open(path) as image:
            larger = image.convert("RGB").resize((image.width * 4, image.height * 4), Image.Resampling.LANCZOS)
        scaled.append(work / path.name)
        larger.save(scaled[-1], quality=92)
    found = []
    for path in scaled:
        exact, fast = (_framed(path, Framing.of(config, fast)) for fast in (False, True))
        maps = [engine.attribute(_normalised(pixels, config)).maps.sum(1)[0] for pixels in (exact, fast)]
        distance = float(((maps[0] - maps[1]).norm() / maps[0].norm()).item())
        correlation = float(torch.corrcoef(torch.stack([m.flatten() for m in maps]))[0, 1])
        found.append(
            {
                "image": path.name,
                "mean_pixel_difference": float(np.abs(exact.astype(int) - fast).mean()),
                "map_distance": distance,
                "map_correlation": correlation,
            }
        )
    return {"images": found}


def _framed(path: Path, framing: Framing) -> Any:
    with open(path, "rb") as file:
        return framing(file)


def _normalised(pixels: Any, config: Any) -> Tensor:
    images = torch.from_numpy(pixels.copy())[None].permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(config[key]).view(-1, 1, 1) for key in ("mean", "std"))
    return (images - mean) / std


COMMANDS = {
    "ratio": ratio,
    "pipeline": pipeline,
    "rerun": rerun,
    "memory": memory,
    "kills": kills,
    "decoders": decoders,
    "fast-decode": fast_decode,
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=COMMANDS)
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--times", type=int, default=40)
    parser.add_argument("--ray", action="store_true", help="kills: of runs on a Ray cluster of this machine")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=3600.0, help="memory, kills: stop after so long")
    arguments = parser.parse_args(argv)
    before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as work:
        found = COMMANDS[arguments.what](arguments, Path(work))
    print(json.dumps({"what": arguments.what, "load_before": before, **found}, indent=1))


if __name__ == "__main__":
    main()
