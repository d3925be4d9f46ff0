"""Results of benchmarks: files in bench/results, and the tables of the pages that are made from them."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
BENCH = ROOT / "bench"


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("report")


@pytest.fixture
def results_io(report: ModuleType) -> ModuleType:
    return report.results_io


@pytest.fixture
def pages(report: ModuleType, tmp_path: Path) -> Path:
    """A copy of what the report reads and writes."""
    for page in report.PAGES:
        (tmp_path / page).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / page, tmp_path / page)
    shutil.copytree(BENCH / "results", tmp_path / "bench" / "results")
    return tmp_path


def test_pages_are_what_the_results_say(report: ModuleType) -> None:
    assert report.main(["--check"]) == 0
    shown = [name for page in report.PAGES for _, name, *_ in report._BLOCK.findall((ROOT / page).read_text())]
    assert sorted(shown) == sorted(report.TABLES)


def test_a_page_that_was_edited(report: ModuleType, pages: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = pages / "docs" / "performance.md"
    text = page.read_text()
    page.write_text(text.replace("| resnet50 | 8 |", "| resnet50 | 9 |"))
    assert report.main(["--check"], pages) == 1
    assert "docs/performance.md" in capsys.readouterr().err
    assert report.main([], pages) == 0
    assert page.read_text() == text


def network(results_io: ModuleType, method: str, value: float, forward: float = 100.0) -> dict[str, Any]:
    of = {"ratio": value / forward, "ratio_of": "resnet50/8/forward", "reference": forward}
    return results_io.measurement(f"resnet50/8/{method}", value, "ms/image", rounds=5, **of)


def test_a_new_result_is_shown(report: ModuleType, results_io: ModuleType, pages: Path) -> None:
    folder, machine = pages / "bench" / "results", results_io.machine("new")
    machine |= {"processor": "A processor", "cores": 4}
    first = [network(results_io, "mixed", 300.0), network(results_io, "float32", 400.0)]
    options = {"versions": results_io.versions(), "folder": folder}
    results_io.write(machine, first, "a test", date="2030-01-01", commit="a" * 40, **options)
    second = [network(results_io, "mixed", 1234.0)]
    results_io.write(machine, second, "a test", date="2030-01-02", commit="b" * 40, changes=True, **options)
    assert report.main(["--check"], pages) == 1
    assert report.main([], pages) == 0
    (line,) = [row for row in (pages / "docs" / "performance.md").read_text().splitlines() if "A processor" in row]
    # † marks what is not of the last run
    assert line.startswith("| A processor, 4 cores | resnet50 | 8 | 100 | 1,234 (12.3) | 400 (4.00) † | – |")
    assert line.endswith("| 2030-01-02, bbbbbbb and changes |")


def test_files_are_never_overwritten(results_io: ModuleType, tmp_path: Path) -> None:
    def write(**options: Any) -> Path:
        rows = [network(results_io, "mixed", 1.0)]
        return results_io.write(results_io.machine("m"), rows, "a test", versions={}, folder=tmp_path, **options)

    names = [write(commit="c" * 40).name for _ in range(3)]
    assert names == ["m-ccccccc.json", "m-ccccccc-2.json", "m-ccccccc-3.json"]
    assert write(commit="c" * 40, changes=True).name == "m-ccccccc-changed.json"
    assert write(date="2030-01-02", label="breakdown").name == "m-20300102-breakdown.json"
    records = results_io.read(tmp_path)
    assert [record["file"] for record in records][-1] == "m-20300102-breakdown.json"
    assert json.loads((tmp_path / names[0]).read_text())["measurements"] == records[0]["measurements"]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"value": None}, "the value is None, not a number"),
        ({"ratio_of": None}, "ratio_of is missing"),
        ({"colour": "red"}, "unknown entry colour"),
    ],
)
def test_what_is_refused(results_io: ModuleType, tmp_path: Path, change: dict[str, Any], problem: str) -> None:
    row = {**network(results_io, "mixed", 1.0), **change}
    with pytest.raises(ValueError, match=problem):
        results_io.write(results_io.machine("m"), [row], "a test", versions={}, folder=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_name_is_one_machine(results_io: ModuleType) -> None:
    """Tables show the newest result of a name."""
    machines: dict[str, set[tuple[Any, ...]]] = {}
    for record in results_io.read():
        machine = record["machine"]
        machines.setdefault(machine["name"], set()).add((machine["cores"], machine["accelerator"]))
    assert all(len(described) == 1 for described in machines.values()), f"choose another name: {machines}"


def test_this_machine(results_io: ModuleType) -> None:
    found = results_io.machine("here")
    assert found["name"] == "here"
    assert found["processor"]
    assert found["cores"] >= 1


def test_the_page_of_evaluations_is_what_the_results_say(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("timm")
    monkeypatch.syspath_prepend(str(BENCH))
    evaluation = importlib.import_module("evaluation")
    text = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    assert evaluation.render(text) == text
    networks = {name for _, name, *_ in evaluation._BLOCK.findall(text)}
    assert networks == set(evaluation.NETWORKS)

    shutil.copytree(evaluation.RESULTS, tmp_path / "results")
    file = tmp_path / "results" / "vit.json"
    kept = json.loads(file.read_text())
    kept["rows"]["abslrp"]["srg"]["AB"]["mean"] = [0.98765, 0.00123, 17]
    file.write_text(json.dumps(kept))
    changed = evaluation.render(text, tmp_path / "results")
    assert "**.988 ± .001**" in changed
    assert changed != text


def test_values_of_an_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    evaluation = importlib.import_module("evaluation")
    assert evaluation.mean([1.0]) is None
    assert evaluation.mean([1.0, 2.0, 6.0]) == [3.0, round((14 / 2 / 3) ** 0.5, 5), 3]
    assert evaluation.number(0.1234) == ".123"
    assert evaluation.number(-0.0504, signed=True) == "−.050"
    assert evaluation.number(0.25, signed=True) == "+.250"
    assert evaluation.number(10.5) == "10.500"
