"""bench/gpu/run.py where there is no GPU: what it writes, and that parts which fail, break or hang stop no other."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ramp_fast import ops

RUN = Path(__file__).parents[1] / "bench" / "gpu" / "run.py"


@pytest.mark.slow
@pytest.mark.skipif(bool(ops.unavailable("cpu")), reason="runs the CPU kernels")
def test_on_a_cpu(tmp_path: Path) -> None:
    only = "check:mask,check:mass,golden,network:vgg,time:mass,time:linear_p"
    command = [sys.executable, str(RUN), "--device", "cpu", "--quick", "--out", str(tmp_path), "--only", only]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = tmp_path.iterdir()
    assert str(file) in done.stdout
    record = json.loads(file.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert record["format"] == 1
    assert {"started", "finished", "commit", "build", "arguments"} <= record.keys()
    parts = {part["name"]: part for part in record["parts"]}
    assert list(parts) == [
        *("environment", "limits", "check:mask_steps:cpu", "check:masked_copies:cpu", "check:masked_copies_into:cpu"),
        *("check:mass:cpu", "golden:vit", "network:vgg", "time:linear_pullback:cpu", "time:mass:cpu"),
    ]
    assert all(part["status"] == "ok" and part["seconds"] >= 0 for part in parts.values())
    assert {"torch", "triton", "captum"} <= parts["environment"]["result"]["versions"].keys()
    results = {name: part["result"].get("rows") for name, part in parts.items()}
    assert results["check:mask_steps:cpu"] == [{"backend": "cpu", "agree": 6, "wrong": 0, "left_out": 0}]
    assert len(results["golden:vit"]) == 6
    assert {(row["batch"], row["way"]) for row in results["network:vgg"]} == {
        (batch, way) for batch in (1, 2) for way in ("forward", "mixed", "fast", "forward and gradient")
    }
    for row in results["network:vgg"]:
        assert row["ms_image"] * row["images/s"] == pytest.approx(1000)
    (row,) = results["time:linear_pullback:cpu"]
    assert row["roofline_%"] > 0
    assert row["TFLOP/s"] > 0
    assert row["reference_ms"] > 0


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_run", RUN)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "HANGS", 1.0)
    monkeypatch.setattr(module, "STARTING", 5.0)
    return module


# Parts that are done, raise, break their process and hang; then one more.
WORKER = """
import argparse, json, os, sys, time
parser = argparse.ArgumentParser()
for name in ("--device", "--only", "--deadline", "--results", "--without", "--share"):
    parser.add_argument(name)
args = parser.parse_args()
def report(**line):
    with open(args.results, "a") as sink:
        sink.write(json.dumps(line) + "\\n")
for name in ("good", "raises", "breaks", "hangs", "last"):
    if name in args.without.split(","):
        continue
    if time.time() > float(args.deadline):
        report(name=name, status="skipped", error="out of time")
        continue
    report(name=name, status="running")
    if name == "breaks":
        print("CUDA error: an illegal memory access", flush=True)
        os._exit(3)
    if name == "hangs":
        time.sleep(60)
    report(name=name, status="failed" if name == "raises" else "ok", error="an error", result={"rows": [{"ms": 1.0}]})
"""


def parts_of(
    run: ModuleType, tmp_path: Path, worker: str, seconds: float, jobs: int = 1
) -> tuple[dict[str, Any], list[Any]]:
    (tmp_path / "worker.py").write_text(worker)
    run.WORKER = tmp_path / "worker.py"
    record: dict[str, Any] = {}
    parts = run.Parts(tmp_path / "out.json", record, ["--device", "cpu", "--only", ""], {})
    parts.run(time.time() + seconds, jobs)
    assert json.loads((tmp_path / "out.json").read_text()) == record
    return record, [(part["name"], part["status"]) for part in record["parts"]]


def test_a_part_that_fails_breaks_or_hangs(run: ModuleType, tmp_path: Path) -> None:
    record, parts = parts_of(run, tmp_path, WORKER, 30)
    assert parts == [*(("good", "ok"), ("raises", "failed"), ("breaks", "failed"), ("hangs", "failed"), ("last", "ok"))]
    assert "illegal memory access" in record["parts"][2]["error"]
    text = run.table(record["parts"])
    assert "breaks" in text
    assert "ms 1" in text


def test_checks_side_by_side(run: ModuleType, tmp_path: Path) -> None:
    """Each worker takes its share of the checks; the one that times comes after them all, and does no part again."""
    chosen = """
first, jobs = map(int, (args.share or "0/1").split("/"))
checks = ["check:a", "check:b", "check:c"]
for name in checks[first::jobs] if args.share else [*checks, "time:a"]:
    if name in args.without.split(","):
        continue
    report(name=name, status="running")
    if name == "check:b":
        os._exit(3)
    report(name=name, status="ok", worker=os.getpid(), begun=time.time())
"""
    head = WORKER[: WORKER.index('for name in ("good"')]
    record, parts = parts_of(run, tmp_path, head + chosen, 30, jobs=2)
    assert sorted(parts) == [("check:a", "ok"), ("check:b", "failed"), ("check:c", "ok"), ("time:a", "ok")]
    found = {part["name"]: part for part in record["parts"]}
    assert found["check:a"]["worker"] == found["check:c"]["worker"] != found["time:a"]["worker"]
    assert found["time:a"]["begun"] > max(found[name]["begun"] for name in ("check:a", "check:c"))


def test_no_time(run: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "HANGS", 40.0)  # the worker is let end
    _, parts = parts_of(run, tmp_path, "import time; time.sleep(0.3)\n" + WORKER, 0.2)
    assert parts == [(name, "skipped") for name in ("good", "raises", "breaks", "hangs", "last")]


def test_a_worker_that_does_not_start(run: ModuleType, tmp_path: Path) -> None:
    record, parts = parts_of(run, tmp_path, "raise ImportError('no such library')", 30)
    assert parts == []
    assert "no such library" in record["broken"][0]


def test_results(run: ModuleType, tmp_path: Path) -> None:
    """The committed record of a run, as ``--results`` writes it."""
    record = json.loads((RUN.parents[1] / "results" / "gpu" / "h200-2-times.json").read_text())
    written = run.write_results("h200", {**record, "changes": False}, tmp_path)
    assert written == tmp_path / "h200-d73d865.json"
    result = json.loads(written.read_text())
    assert result["machine"]["accelerator"] == "NVIDIA H200"
    assert (result["date"], result["versions"]["torch"]) == ("2026-11-27", "2.11.0")
    rows = {row["name"]: row for row in result["measurements"]}
    mixed = rows["vit_base_patch16_224/64/mixed"]
    assert (mixed["value"], mixed["unit"]) == (pytest.approx(0.7746, abs=1e-4), "ms/image")
    assert mixed["ratio"] == pytest.approx(mixed["value"] / rows[mixed["ratio_of"]["name"]]["value"])
    assert rows["limits/copy"]["value"] == pytest.approx(4193, abs=1)
    assert rows["vit_base_patch16_224/64/mixed/peak memory"]["unit"] == "MB"
    assert run.write_results("h200", {"parts": []}, tmp_path) is None
