"""The parts of ``run.py``, in a process of their own: one JSON line when a part begins, one when it has ended."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
for folder in ("tests/golden", "tests/ops", "tests", "bench"):
    sys.path.insert(0, str(ROOT / folder))

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from ramp_fast import Engine, ops  # noqa: E402
from ramp_fast.ops import _registry  # noqa: E402
from ramp_fast.rules import AbsLRP  # noqa: E402
from ramp_fast.rules.abslrp import RelativeStabilizer  # noqa: E402

NETWORKS = ("vit_base_patch16_224", "resnet50", "vit_large_patch16_224", "vgg16")
BATCHES = (64, 8, 256, 1)  # most telling first
PUBLISHED_BATCHES = (1, 8)  # it takes 0.5 to 0.9 GB an image
ENOUGH, QUICK = 1.0, 0.01  # seconds that one timing takes, warm-up apart


class Device:
    """Where everything runs, its clock, and its limits once they are measured."""

    def __init__(self, name: str, quick: bool, deadline: float) -> None:
        self.torch = torch.device(f"{name}:0" if name == "cuda" else name)  # an index, which set_device wants
        self.is_cuda = self.torch.type == "cuda"
        self.quick, self.deadline = quick, deadline
        self.backends = ("cuda", "triton") if self.is_cuda else ("cpu",)
        self.bytes_per_second = self.flops = 0.0  # not measured

    def synchronize(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize(self.torch)

    def out_of_time(self) -> bool:
        return time.time() > self.deadline

    def seconds(self, call: Callable[[], Any], rounds: int = 20) -> float:
        """Median seconds of a call on the device, after two that do not count; at least one round."""
        for _ in range(2):
            call()
        self.synchronize()
        taken: list[float] = []
        start, enough = time.perf_counter(), QUICK if self.quick else ENOUGH
        while not taken or (len(taken) < rounds and time.perf_counter() - start < enough):
            taken.append(self._once(call))
        return statistics.median(taken)

    def recorded(self, call: Callable[[], Any]) -> Callable[[], Any]:
        """``call`` without what it costs the host: a graph of its kernels, as attributions are replayed."""
        if not self.is_cuda:
            return call
        call()  # builds and chooses kernels
        self.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay

    def _once(self, call: Callable[[], Any]) -> float:
        if not self.is_cuda:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before.record()
        call()
        after.record()
        after.synchronize()
        return before.elapsed_time(after) / 1e3


def environment(device: Device) -> dict[str, Any]:
    packages = {}
    for name in ("torch", "triton", "timm", "torchvision", "captum", "numpy"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "missing"
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "versions": packages,
        "backends": {name: ops.unavailable(name) or "available" for name in ops.BACKENDS},
        "device": str(device.torch),
    }
    if device.is_cuda:
        properties = torch.cuda.get_device_properties(device.torch)
        found["device"] = properties.name
        found["capability"] = [properties.major, properties.minor]
        found["memory_gib"] = properties.total_memory / 2**30
        found["multiprocessors"] = properties.multi_processor_count
        found["cuda"] = torch.version.cuda
    return found


def limits(device: Device) -> dict[str, Any]:
    """Rates that nothing here can pass: a copy (bytes read and written) and a large product in bfloat16."""
    elements, side = (2**20, 256) if device.quick else (2**28, 8192)

    def copy() -> float:
        source = torch.ones(elements, device=device.torch)
        target = torch.empty_like(source)
        return device.seconds(lambda: target.copy_(source))

    def product() -> float:
        a, b = (torch.randn(side, side, device=device.torch).bfloat16() for _ in range(2))
        return device.seconds(lambda: a @ b)

    device.bytes_per_second = 8 * elements / copy()
    device.flops = 2 * side**3 / product()
    return {"rows": [{"copy_GB/s": device.bytes_per_second / 1e9, "bf16_TFLOP/s": device.flops / 1e12}]}


def kernels(device: Device) -> list[tuple[str, str]]:
    """Operators and the backends of this device that have a kernel for them."""
    return [
        (name, backend)
        for name, operator in _registry._operators.items()
        for backend in device.backends
        if backend in operator._kernels
    ]


def _arithmetic(name: str, o: Any) -> torch.dtype:
    """The dtype that an operator computes in, by which tolerances are chosen."""
    from cases import FACTORS, OF_ATTENTION

    if name in FACTORS:
        return torch.float64 if o.x_dtype == torch.float64 else torch.float32
    if name in OF_ATTENTION and o.c_dtype == torch.bfloat16 and o.x_dtype != torch.float64:
        return torch.bfloat16
    return o.arithmetic  # type: ignore[no-any-return]


def _moved(args: tuple[Any, ...], device: torch.device) -> tuple[Any, ...]:
    def moved(a: Any) -> Any:
        return a.to(device) if isinstance(a, Tensor) else [moved(b) for b in a] if isinstance(a, list) else a

    return tuple(map(moved, args))


def check_operator(device: Device, name: str, backend: str) -> dict[str, Any]:
    """A forced backend, which falls back to nothing, against the float64 reference on the CPU."""
    from cases import CASES, LARGE, Options, as_tuple, in_float64, odd_options
    from tolerances import assert_close

    if name not in CASES:
        return {"rows": [{"backend": backend, "note": "no case: tested through the operator it is part of"}]}
    if reason := ops.unavailable(backend):
        raise RuntimeError(reason)
    case = CASES[name]
    large = [Options(c_dtype=torch.bfloat16, inner=(9, 4099), rows=(67, 521), seed=seed) for seed in (1, 2)]
    agreed, wrong, left = 0, [], 0
    for o in odd_options()[:6] if device.quick else [*large, *odd_options(), LARGE]:
        if device.out_of_time():
            left += 1
            continue
        ops.set_backend(backend)
        args = case.arguments(o)  # weights are packed for the backend that is forced
        try:
            actual = as_tuple(getattr(ops, name)(*_moved(args, device.torch)))
            magnitudes = as_tuple(case.magnitude(*in_float64(args)))
            for index, (a, e, m) in enumerate(zip(actual, case.expected(args), magnitudes, strict=True)):
                assert_close(name, index, a.cpu(), e, m, _arithmetic(name, o))
            agreed += 1
        except Exception as error:
            device.synchronize()  # a broken context ends this worker here
            wrong.append(f"{o}: {type(error).__name__}: {error}")
        finally:
            ops.set_backend(None)
    row: dict[str, Any] = {"backend": backend, "agree": agreed, "wrong": len(wrong), "left_out": left}
    return {"rows": [row], "wrong": wrong[:10]}


def check_golden(device: Device, case: str) -> dict[str, Any]:
    """Maps of a golden network, in float64 and in the modes that use kernels, with both rules."""
    import recipe
    from agreement import RULES, TOLERANCE, error, expected

    model, images, target = recipe.build(case)
    model, images, target = model.to(device.torch), images.to(device.torch), target.to(device.torch)
    rows, wrong = [], []
    for rule, prefix in RULES.items():
        for precision in ("float64", "float32", "mixed"):
            engine = Engine(model, rule=rule, precision=precision)
            maps = engine.attribute(images if precision == "float64" else images.float(), target).maps
            found = error(maps.cpu(), expected(case)[prefix + "relevance"])
            rows.append({"rule": rule, "precision": precision, "error": found})
            if not found < TOLERANCE[precision, "relevance"]:
                wrong.append(f"{rule}, {precision}: {found} is not below {TOLERANCE[precision, 'relevance']}")
    return {"rows": rows, "wrong": wrong}


def time_operator(device: Device, name: str, backend: str) -> dict[str, Any]:
    """Milliseconds, and the share of the time that is bytes or products at the limits of this device."""
    from operands import Sizes, count_bytes, count_flops, operands

    if reason := ops.unavailable(backend):
        raise RuntimeError(reason)
    small = Sizes(batch=1, tokens=5, width=32, hidden=64, heads=2, image=16, masked=2, steps=5)
    sizes = small if device.quick else Sizes(batch=64, masked=64)
    draws = operands(sizes, device.torch, torch.bfloat16)
    if name not in draws:
        return {"rows": [{"backend": backend, "note": "not timed"}]}
    ops.set_backend(backend)
    try:
        args = draws[name]()
        operator = getattr(ops, name)
        moved, flops = count_bytes(args, operator(*args)), count_flops(name, args)
        seconds = device.seconds(device.recorded(lambda: operator(*args)))
        ops.set_backend("reference")
        reference = None if device.out_of_time() else device.seconds(lambda: operator(*args), rounds=3)
    finally:
        ops.set_backend(None)
    known = device.bytes_per_second > 0 and device.flops > 0
    floor = max(moved / device.bytes_per_second, flops / device.flops) if known else None
    row = {
        "backend": backend,
        "ms": 1e3 * seconds,
        "GB/s": moved / seconds / 1e9,
        "TFLOP/s": flops / seconds / 1e12,
        "roofline_%": None if floor is None else 100 * floor / seconds,
        "reference_ms": None if reference is None else 1e3 * reference,
    }
    return {"rows": [row], "bytes": moved, "flops": flops}


def _network(name: str, device: Device) -> tuple[nn.Module, tuple[int, int, int]]:
    """A network with random weights, the same ones every time."""
    torch.manual_seed(0)
    if device.quick:
        import small_models

        return small_models.FAMILIES[name]().to(device.torch), (3, small_models.SIZE, small_models.SIZE)
    import timm

    model = timm.create_model(name).eval().to(device.torch)
    return model, model.default_cfg["input_size"]


def _gradient(model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    def call(images: Tensor, target: Tensor) -> Tensor:
        images = images.detach().requires_grad_()
        selected = model(images).gather(1, target[:, None]).sum()
        return torch.autograd.grad(selected, images)[0]

    return call


def _peers(device: Device) -> dict[str, Any]:
    """Prepared methods of other packages, where those are installed; why the others are missing."""
    try:
        from peers.methods import METHODS
    except ImportError as error:
        return {"captum InputXGradient": f"{error}", "published absLRP": f"{error}"}
    wanted = ("captum InputXGradient", *(["published absLRP"] if os.environ.get("RAMP_FAST_PUBLISHED") else []))
    return {name: METHODS[name].missing() or METHODS[name].prepare for name in wanted}


def time_network(device: Device, name: str) -> dict[str, Any]:
    """Attributions a second and what they take of the model's own forward pass, for every batch and precision."""
    model, shape = _network(name, device)
    stabilized = AbsLRP(stabilizer=RelativeStabilizer(0.1))
    ways: dict[str, Callable[[], Callable[[Tensor, Tensor], Any]]] = {
        "forward": lambda: lambda images, target: torch.no_grad()(model)(images),
        "mixed": lambda: _attributing(Engine(model, precision="mixed", input_shape=shape)),
        "fast": lambda: _attributing(Engine(model, rule=stabilized, precision="fast", input_shape=shape)),
        "forward and gradient": lambda: _gradient(model),
    }
    missing = {}
    for peer, prepare in _peers(device).items():
        if callable(prepare) and not device.quick:  # they know timm's networks
            ways[peer] = lambda prepare=prepare: prepare(_network(name, device)[0])  # they change the model
        else:
            missing[peer] = prepare if isinstance(prepare, str) else "not for these networks"
    calls: dict[str, Callable[[Tensor, Tensor], Any]] = {}
    rows, failed, left = [], [], []
    for batch in (2, 1) if device.quick else BATCHES:
        images = torch.randn((batch, *shape), generator=torch.Generator().manual_seed(batch)).to(device.torch)
        target = torch.zeros(batch, dtype=torch.long, device=device.torch)
        forward: float | None = None
        for way, prepare in ways.items():
            if device.out_of_time() or (way == "published absLRP" and batch not in PUBLISHED_BATCHES):
                left.append(f"{way}, batch {batch}")
                continue
            try:
                if device.is_cuda:
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats(device.torch)
                if way not in calls:
                    calls[way] = prepare()
                call = calls[way]
                found = _looked_at(call, images, target) if way in ("mixed", "fast") else {}
                seconds = device.seconds(lambda call=call, x=images, y=target: call(x, y), rounds=10)
            except Exception as error:
                failed.append(f"{way}, batch {batch}: {type(error).__name__}: {str(error)[:500]}")
                device.synchronize()
                continue
            forward = seconds if way == "forward" else forward
            row: dict[str, Any] = {"batch": batch, "way": way, "ms_image": 1e3 * seconds / batch}
            row |= {"images/s": batch / seconds, "forwards": seconds / forward if forward else None} | found
            if device.is_cuda:
                row["peak_MB"] = torch.cuda.max_memory_allocated(device.torch) / 1e6
            rows.append(row)
    return {"rows": rows, "wrong": failed, "left_out": left, "missing": missing}


def _looked_at(call: Callable[[Tensor, Tensor], Any], images: Tensor, target: Tensor) -> dict[str, Any]:
    """How far, of their largest number, maps move when they are computed again, replayed, and without neighbours."""
    first = call(images, target).maps
    if not bool(first.isfinite().all()):
        raise RuntimeError("maps are not finite")
    call(images, target)  # recorded
    replayed, alone = call(images, target).maps, call(images[:1], target[:1]).maps
    scale = float(first.abs().max())
    return {
        "replayed": float((replayed - first).abs().max()) / scale,
        "alone": float((alone - first[:1]).abs().max()) / scale,
    }


def profile_network(device: Device, name: str, precision: str) -> dict[str, Any]:
    """What an attribution's time goes to: kernels by their names, without the gaps between them."""
    from torch.profiler import ProfilerActivity, profile

    model, shape = _network(name, device)
    rule = AbsLRP(stabilizer=RelativeStabilizer(0.1)) if precision == "fast" else AbsLRP()
    engine = Engine(model, rule=rule, precision=precision, input_shape=shape, cuda_graphs=False)
    batch = 2 if device.quick else 64
    images = torch.randn((batch, *shape), generator=torch.Generator().manual_seed(batch)).to(device.torch)
    target = torch.zeros(batch, dtype=torch.long, device=device.torch)
    for _ in range(2):
        engine.attribute(images, target)
    device.synchronize()
    kind = ProfilerActivity.CUDA if device.is_cuda else ProfilerActivity.CPU
    with profile(activities=[kind]) as found:
        engine.attribute(images, target)
        device.synchronize()
    times = [
        (event.self_device_time_total if device.is_cuda else event.self_cpu_time_total, event.count, event.key)
        for event in found.key_averages()
    ]
    whole = sum(time for time, _, _ in times) or 1.0
    rows = [
        {"ms": time / 1e3, "%": 100 * time / whole, "calls": count, "kernel": key[:100]}
        for time, count, key in sorted(times, reverse=True)[:30]
    ]
    return {"rows": rows, "ms": whole / 1e3, "batch": batch}


def _attributing(engine: Engine) -> Callable[[Tensor, Tensor], Any]:
    return lambda images, target: engine.attribute(images, target)


def all_parts(device: Device) -> dict[str, Callable[[], dict[str, Any]]]:
    """Most important first."""
    import recipe

    networks = ("vgg", "vit") if device.quick else NETWORKS
    golden = list(recipe.CASES)[:1] if device.quick else list(recipe.CASES)
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "environment": partial(environment, device),
        "limits": partial(limits, device),
    }
    pairs = kernels(device)
    parts |= {f"check:{name}:{backend}": partial(check_operator, device, name, backend) for name, backend in pairs}
    parts |= {f"golden:{case}": partial(check_golden, device, case) for case in golden}
    parts[f"network:{networks[0]}"] = partial(time_network, device, networks[0])
    parts |= {
        f"profile:{name}:{precision}": partial(profile_network, device, name, precision)
        for name, precision in ((networks[0], "mixed"), (networks[0], "fast"), (networks[1], "mixed"))
    }
    parts |= {f"time:{name}:{backend}": partial(time_operator, device, name, backend) for name, backend in pairs}
    parts |= {f"network:{name}": partial(time_network, device, name) for name in networks[1:]}
    return parts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", required=True)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", default="")
    parser.add_argument("--without", default="", help="parts that are done")
    parser.add_argument("--share", default="", help="i/n: of the checks every n-th from i on, and nothing else")
    parser.add_argument("--deadline", type=float, required=True, help="seconds since the epoch")
    parser.add_argument("--results", type=Path, required=True)
    args = parser.parse_args()
    device = Device(args.device, args.quick, args.deadline)
    if device.is_cuda:
        if not torch.cuda.is_available():
            raise SystemExit("torch sees no CUDA device; --device cpu --quick tests this script without one")
        torch.cuda.set_device(device.torch)
    if args.quick:
        torch.set_num_threads(1)  # two that share a core wait for each other
    prefixes, done = tuple(filter(None, args.only.split(","))), set(args.without.split(","))

    def report(**line: Any) -> None:
        with args.results.open("a") as sink:
            sink.write(json.dumps(line) + "\n")

    parts = all_parts(device)
    if args.share:
        first, jobs = map(int, args.share.split("/"))
        torch.set_num_threads(max(1, torch.get_num_threads() // jobs))
        names = [name for name in parts if name.startswith(("check:", "golden:"))]
        parts = {name: parts[name] for name in [*(["environment"] if first == 0 else []), *names[first::jobs]]}
    for name, part in parts.items():
        measured = name == "limits" and name in done  # in a worker before this one: the roofline needs them again
        if measured and not device.out_of_time():
            part()
        if name in done or (prefixes and not name.startswith((*prefixes, "environment", "limits"))):
            continue
        if device.out_of_time():
            report(name=name, status="skipped", error="out of time")
            continue
        report(name=name, status="running")
        start = time.time()
        try:
            result = part()
            device.synchronize()
            status = "failed" if result.get("wrong") else "ok"
            problem = {"error": "\n".join(result["wrong"])} if result.get("wrong") else {}
        except Exception:
            status, result, problem = "failed", {}, {"error": traceback.format_exc()[-3000:]}
        report(name=name, status=status, seconds=time.time() - start, result=result, **problem)
        if device.is_cuda:
            device.synchronize()  # raises where the context is broken: the next worker goes on behind this part
            torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
