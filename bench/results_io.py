"""Results of benchmarks as data: reading and writing ``bench/results/MACHINE-COMMIT.json``.

Files are only ever added. A file holds the results of one run::

    {
      "format": 1,
      "machine": {"name": "zen5", "processor": "AMD EPYC (Zen 5)", "cores": 2, "accelerator": null},
      "date": "2026-11-27",
      "commit": "a70e412...",          # null: not recorded
      "changes": false,                # whether the checkout had uncommitted changes; null: not recorded
      "versions": {"python": "3.12.3", "torch": "2.14.1"},
      "source": "pytest bench",        # what wrote it
      "note": "",                      # what a reader should know, such as other work on the machine
      "measurements": [
        {
          "name": "resnet50/8/mixed",  # of a network: model/images at once/method
          "value": 48.8,
          "unit": "ms/image",          # "ratio": the value is itself a ratio to ratio_of
          "rounds": 5,                 # the value is the median of so many; null: not recorded
          "spread": 1.04,              # the slowest of them over the fastest; null: not recorded
          "ratio": 1.91,               # over the median of ratio_of, measured in the same rounds; or null
          "ratio_of": {"name": "resnet50/8/forward", "value": 25.0, "spread": 1.04}
        }
      ]
    }

``floor`` is an optional entry of a measurement: the least value that its products allow. Nothing but the standard
library is imported here.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

FORMAT = 1
ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "bench" / "results"

_PACKAGES = ("torch", "timm", "numpy", "triton", "captum", "zennit", "lxt", "transformers", "quantus")
_INSTRUCTIONS = {"amx_bf16": "AMX", "avx512_bf16": "AVX-512 with bf16", "avx512f": "AVX-512", "avx2": "AVX2"}
_ENTRIES = {"format", "machine", "date", "commit", "changes", "versions", "source", "note", "measurements"}
_OF_MACHINE = {"name", "processor", "cores", "accelerator"}
_OF_MEASUREMENT = {"name", "value", "unit", "rounds", "spread", "ratio", "ratio_of"}
_OF_REFERENCE = {"name", "value", "spread"}


def measurement(
    name: str,
    value: float,
    unit: str,
    *,
    rounds: int | None = None,
    spread: float | None = None,
    ratio: float | None = None,
    ratio_of: str | None = None,
    reference: float | None = None,
    reference_spread: float | None = None,
    **more: float,
) -> dict[str, Any]:
    """One entry of ``measurements``; ``reference`` is the value of ``ratio_of``, in the same unit."""
    of = None if ratio_of is None else {"name": ratio_of, "value": reference, "spread": reference_spread}
    entry = {"name": name, "value": value, "unit": unit, "rounds": rounds, "spread": spread}
    return {**entry, "ratio": ratio, "ratio_of": of, **more}


def commit() -> tuple[str | None, bool | None]:
    """Commit of the checkout, and whether tracked files have changed since; None where git does not say."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):
        return None, None


def machine(name: str, accelerator: str | None = None) -> dict[str, Any]:
    """Describe this machine under a name, which stands for one machine: tables describe it by its oldest file."""
    processor = platform.processor() or platform.machine()
    try:
        lines = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines()]
        entries = {entry.strip(): value.strip() for entry, _, value in reversed(lines)}
        flags = entries["flags"].split()
        known = next((words for flag, words in _INSTRUCTIONS.items() if flag in flags), "no AVX2")
        processor = f"{entries['model name']} ({known})"
    except (OSError, KeyError):  # another system, or another kind of processor
        pass
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"name": name, "processor": processor, "cores": cores, "accelerator": accelerator}


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter, where they are installed."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def write(
    machine: dict[str, Any],
    measurements: list[dict[str, Any]],
    source: str,
    *,
    versions: dict[str, str],
    date: str = "",
    commit: str | None = None,
    changes: bool | None = None,
    note: str = "",
    label: str = "",
    folder: Path = FOLDER,
) -> Path:
    """Write a new file and return its path.

    It is named after the machine and the commit (without one: the date), and ``label``; a number is added where such a
    file exists.
    """
    date = date or time.strftime("%Y-%m-%d")
    record = {"format": FORMAT, "machine": machine, "date": date, "commit": commit, "changes": changes}
    record |= {"versions": versions, "source": source, "note": note, "measurements": measurements}
    if problems := check(record):
        raise ValueError("; ".join(problems))
    parts = [machine["name"], commit[:7] if commit else date.replace("-", ""), "changed" if changes else "", label]
    stem = "-".join(filter(None, parts))
    folder.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        path = folder / f"{stem}{'' if number == 1 else f'-{number}'}.json"
        try:
            with path.open("x") as sink:
                sink.write(_text(record))
        except FileExistsError:
            number += 1
        else:
            return path


def write_here(name: str, measurements: list[dict[str, Any]], source: str, label: str = "") -> Path:
    """:func:`write` what was measured on this machine, called ``name``, with the checkout's commit."""
    own, changes = commit()
    found = {"versions": versions(), "commit": own, "changes": changes, "label": label}
    return write(machine(name), measurements, source, **found)  # type: ignore[arg-type]


def _text(record: dict[str, Any]) -> str:
    """JSON with a line for every measurement."""
    rows = ",\n".join(f"  {json.dumps(row, allow_nan=False)}" for row in record["measurements"])
    head = json.dumps({**record, "measurements": []}, indent=1)
    return head.removesuffix("[]\n}") + f"[\n{rows}\n ]\n}}\n"


def read(folder: Path = FOLDER) -> list[dict[str, Any]]:
    """All files, the oldest first; files of a day in the order of their names. ``file`` is added to each."""
    records = []
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text())
        if problems := check(record):
            raise ValueError(f"{path.name}: {'; '.join(problems)}")
        records.append({**record, "file": path.name})
    return sorted(records, key=lambda record: (record["date"], record["file"]))


def check(record: Any) -> list[str]:
    """What is wrong with the form of a record."""
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        return [f"format is not {FORMAT}"]
    problems = _entries("the file", record, _ENTRIES)
    if not problems:
        problems += _entries("machine", record["machine"], _OF_MACHINE)
        if len(record["date"].split("-")) != 3:
            problems.append(f"date is {record['date']!r}, not YYYY-MM-DD")
        if not record["measurements"]:
            problems.append("there are no measurements")
        for row in record["measurements"]:
            problems += _of_measurement(row)
    return problems


def _of_measurement(row: dict[str, Any]) -> list[str]:
    name = row.get("name")
    problems = _entries(f"{name}", row, _OF_MEASUREMENT, optional=frozenset({"floor"}))
    if problems:
        return problems
    if not isinstance(row["value"], (int, float)):
        problems.append(f"{name}: the value is {row['value']!r}, not a number")
    if row["ratio_of"] is not None:
        problems += _entries(f"ratio_of of {name}", row["ratio_of"], _OF_REFERENCE)
    elif row["ratio"] is not None or row["unit"] == "ratio":
        problems.append(f"{name}: ratio_of is missing")
    return problems


def _entries(what: str, found: dict[str, Any], wanted: set[str], optional: frozenset[str] = frozenset()) -> list[str]:
    missing, unknown = wanted - found.keys(), found.keys() - wanted - optional
    return [f"{what} has no {entry}" for entry in sorted(missing)] + [
        f"{what} has an unknown entry {entry}" for entry in sorted(unknown)
    ]
