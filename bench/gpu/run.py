"""Everything a GPU can say about this package, in one command and a few minutes, without a network.

    python bench/gpu/run.py --minutes 8

Builds the package if it is not installed with its extension, then, most important first and each part skipped once
the time is up: the machine's limits (a copy, a product in bfloat16), every operator with a Triton or CUDA kernel
against the float64 reference, the golden maps, attributions of four networks against their forward pass and against
other packages, and the operators' times against the limits. Prints a table and writes everything it found into a JSON
file in ``--out``; with ``--results MACHINE`` also the measurements as ``bench/results/MACHINE-COMMIT.json``.

``--device cpu --quick`` runs the same on tiny networks in a few seconds, to test this script. ``RAMP_FAST_PUBLISHED``
names a checkout of the published package, which is timed as well then.

This process never touches the device. Parts run in ``worker.py``: checks, which mostly compile, in several workers side
by side; what is timed one after another. A worker is started again where a kernel has broken its CUDA context, and
killed where one does not end.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
WORKER = HERE / "worker.py"
sys.path.insert(0, str(HERE.parent))

import results_io  # noqa: E402

HANGS = 150.0  # seconds after which a part is taken for hanging
STARTING = 180.0  # the same while the worker imports and loads kernels


def build(build_folder: Path, rebuild: bool) -> tuple[dict[str, str], str]:
    """Environment variables that make ``import ramp_fast`` find a package with its extension, and how it came about."""
    check = "import torch, ramp_fast.kernels, ramp_fast._C"
    elsewhere = tempfile.gettempdir()  # not in the checkout, whose folder would hide an installed package
    if not rebuild:
        found = subprocess.run(
            [sys.executable, "-c", check], capture_output=True, text=True, cwd=elsewhere, check=False
        )
        if found.returncode == 0:
            return {}, "installed"
    shutil.rmtree(build_folder, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index"]
    command += ["--target", str(build_folder), str(ROOT)]
    environment = os.environ | {"RAMP_FAST_REQUIRE_EXTENSION": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    variables = {"PYTHONPATH": os.pathsep.join(filter(None, [str(build_folder), os.environ.get("PYTHONPATH")]))}
    if done.returncode == 0:
        return variables, "built"
    # Triton's kernels need no compiler: run what there is, and say so.
    variables["RAMP_FAST_REQUIRE_EXTENSION"] = "0"
    for source, target in (("ramp_fast", "ramp_fast"), ("kernels", "ramp_fast/kernels")):
        shutil.copytree(ROOT / source, build_folder / target, dirs_exist_ok=True)
    print(f"the extension was not built:\n{(done.stdout + done.stderr)[-4000:]}", file=sys.stderr)
    return variables, "without the extension"


class Parts:
    """Runs the parts in workers and keeps what they report, in memory and in the file."""

    def __init__(self, file: Path, record: dict[str, Any], options: list[str], environment: dict[str, str]) -> None:
        self.file, self.record, self.options, self.environment = file, record, options, environment
        self.parts: dict[str, dict[str, Any]] = {}
        self.lock = threading.Lock()

    def write(self) -> None:
        self.record["parts"] = list(self.parts.values())
        self.record["finished"] = time.strftime("%Y-%m-%dT%H:%M:%S")
        partial = self.file.with_suffix(".partial")
        # the file may be published: no folders of this machine in the errors
        partial.write_text(json.dumps(self.record, indent=1).replace(str(ROOT), "."))
        partial.replace(self.file)

    def run(self, deadline: float, jobs: int = 1) -> None:
        """All parts in the worker's order, but with several jobs the checks before what is timed; each part once."""
        if jobs > 1:
            shares = [threading.Thread(target=self._share, args=(deadline, f"{i}/{jobs}")) for i in range(jobs)]
            for share in shares:
                share.start()
            for share in shares:
                share.join()
        self._share(deadline, "")

    def _share(self, deadline: float, share: str) -> None:
        while time.time() < deadline:
            begun, finished = self._worker(deadline, share)
            self._broken(begun, "the worker ended while this part ran: its CUDA context or its process is broken")
            if finished or not begun:  # nothing is left, or nothing was even begun
                return

    def _broken(self, begun: set[str], why: str) -> None:
        with self.lock:
            for name in begun:
                part = self.parts[name]
                if part["status"] == "running":
                    part.update(status="failed", error=why + "\n" + part.pop("output", ""))
            self.write()

    def _worker(self, deadline: float, share: str) -> tuple[set[str], bool]:
        """One worker until it ends, hangs or the time is up: the parts it began, and whether it reached their end."""
        begun: set[str] = set()
        with tempfile.TemporaryDirectory() as folder:
            results, output = Path(folder) / "results.jsonl", Path(folder) / "output"
            results.touch()
            command = [sys.executable, str(WORKER), *self.options, "--deadline", str(deadline), "--share", share]
            command += ["--results", str(results), "--without", ",".join(self.parts)]
            with output.open("w") as sink:
                process = subprocess.Popen(
                    command, stdout=sink, stderr=subprocess.STDOUT, env=os.environ | self.environment, cwd=folder
                )
            seen, last, patience = 0, time.time(), STARTING
            while True:
                ended = process.poll() is not None
                lines = results.read_text().splitlines()
                if len(lines) > seen:
                    with self.lock:
                        for line in lines[seen:]:
                            part = json.loads(line)
                            self.parts[part["name"]] = part
                            begun.add(part["name"])
                        self.write()
                    seen, last, patience = len(lines), time.time(), HANGS
                if ended:
                    break
                if time.time() - last > patience or time.time() > deadline + HANGS / 4:
                    process.kill()
                    process.wait()
                    break
                time.sleep(0.1)
            if process.returncode != 0:
                tail = output.read_text(errors="replace")[-3000:]
                running = [self.parts[name] for name in begun if self.parts[name]["status"] == "running"]
                if not running:
                    self.record.setdefault("broken", []).append(tail)
                for part in running:
                    part["output"] = tail
            return begun, process.returncode == 0


def table(parts: list[dict[str, Any]]) -> str:
    """A line for everything that was found."""
    lines = []
    for part in parts:
        result = part.get("result", {})
        if part["status"] != "ok":
            lines.append(f"{part['name']:44} {part['status'].upper()}: {part.get('error', '').strip()[-160:]}")
        for row in result.get("rows", []):
            cells = [
                f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
            ]
            lines.append(f"{part['name']:44} {'  '.join(cells)}")
        if part["status"] == "ok" and "rows" not in result:
            lines.append(f"{part['name']:44} {json.dumps(result)[:160]}")
    return "\n".join(lines)


def measurements(parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Times, rates and errors of all parts, in the form of ``bench/results``."""
    found = []
    for part in parts:
        kind, _, name = part["name"].partition(":")
        result = part.get("result", {})
        for row in result.get("rows", []):
            if kind == "network":
                found += _of_network(name, row)
            elif kind == "limits":
                found.append(results_io.measurement("limits/copy", row["copy_GB/s"], "GB/s"))
                found.append(results_io.measurement("limits/bf16 product", row["bf16_TFLOP/s"], "TFLOP/s"))
            elif kind == "golden":
                name_of_map = f"golden/{name}/{row['rule']}/{row['precision']}"
                found.append(results_io.measurement(name_of_map, row["error"], "relative error"))
            elif kind == "time" and "ms" in row:
                operator = f"operator/{name.replace(':', '/')}"
                found.append(results_io.measurement(operator, row["ms"], "ms"))
                if row.get("roofline_%") is not None:
                    share = row["roofline_%"] / 100
                    found.append(
                        results_io.measurement(
                            f"{operator}/limit", share, "ratio", ratio_of="limits: bytes or products"
                        )
                    )
        if kind == "profile" and "ms" in result:
            model, precision = name.split(":")
            kernels = f"{model}/{result['batch']}/{precision}/all kernels"
            found.append(results_io.measurement(kernels, result["ms"], "ms"))
    return found


def _of_network(model: str, row: dict[str, Any]) -> list[dict[str, Any]]:
    name, of = f"{model}/{row['batch']}/{row['way']}", {}
    if row["way"] != "forward" and row["forwards"]:
        forward = row["ms_image"] / row["forwards"]
        of = {"ratio": row["forwards"], "ratio_of": f"{model}/{row['batch']}/forward", "reference": forward}
    found = [results_io.measurement(name, row["ms_image"], "ms/image", **of)]
    if "peak_MB" in row:
        found.append(results_io.measurement(f"{name}/peak memory", row["peak_MB"], "MB"))
    if "alone" in row:  # an image's map alone and in the batch
        found.append(
            results_io.measurement(f"{name}/alone", row["alone"], "ratio", ratio_of="the largest value of the map")
        )
    return found


def write_results(machine: str, record: dict[str, Any], folder: Path = results_io.FOLDER) -> Path | None:
    """A file in ``bench/results``, if anything was measured; the path."""
    found = measurements(record["parts"])
    if not found:
        return None
    environment = next(p["result"] for p in record["parts"] if p["name"] == "environment" and p.get("result"))
    accelerator = environment["device"] if "capability" in environment else None
    return results_io.write(
        results_io.machine(machine, accelerator),
        found,
        "bench/gpu/run.py",
        versions={"python": environment["python"], **environment["versions"]},
        date=record["started"][:10],
        commit=record["commit"],
        changes=record["changes"],
        folder=folder,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8, help="time for everything but the build (8)")
    parser.add_argument("--out", type=Path, default=results_io.FOLDER / "gpu", metavar="FOLDER")
    parser.add_argument("--results", metavar="MACHINE", help="a short name of this machine, such as h200")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny networks and operands, to test this script")
    parser.add_argument("--only", default="", metavar="PREFIXES", help="parts whose names begin so, comma-separated")
    parser.add_argument("--jobs", type=int, default=1, help="workers that check at the same time (1)")
    parser.add_argument("--rebuild", action="store_true", help="build the extension even if one is installed")
    args = parser.parse_args()

    environment, built = build(ROOT / "build" / "gpu-run", args.rebuild)
    args.out.mkdir(parents=True, exist_ok=True)
    started = time.strftime("%Y-%m-%dT%H:%M:%S")
    file = args.out.resolve() / f"{args.device.replace(':', '')}-{started.replace(':', '')}-{os.getpid()}.json"
    commit, changes = results_io.commit()
    record: dict[str, Any] = {
        "format": 1,
        "started": started,
        "commit": commit,
        "changes": changes,
        "build": built,
        "arguments": {"minutes": args.minutes, "device": args.device, "quick": args.quick, "only": args.only},
    }
    options = ["--device", args.device, "--only", args.only, *(["--quick"] if args.quick else [])]
    parts = Parts(file, record, options, environment)
    parts.write()
    parts.run(time.time() + 60 * args.minutes, args.jobs)
    parts.write()
    print(table(record["parts"]))
    for output in record.get("broken", []):
        print(f"a worker ended outside of any part:\n{output}")
    print(f"written to {file}")
    if args.results and (written := write_results(args.results, record)):
        print(f"written to {written}")
    return 0 if parts.parts and all(p["status"] in ("ok", "skipped") for p in parts.parts.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
