"""``ramp-fast evaluate``: what it reads and writes, and how it ends."""

from __future__ import annotations

import csv
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from ramp_fast import cli, models
from ramp_fast.data import ClassNames, Preprocessing
from ramp_fast.evaluation import Evaluation
from ramp_fast.methods import METHODS, MethodEntry
from ramp_fast.results.store import save_picture

NAMES = ("cat", "dog", "fox")


class Bright(nn.Module):
    """Class k where channel k is brightest."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(3.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x.mean((2, 3))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    draw = np.random.default_rng(0)
    for k, name in enumerate(NAMES):
        (folder / name).mkdir(parents=True)
        for number in range(2):
            pixels = draw.integers(0, 128, (40, 48, 3), dtype=np.uint8)
            pixels[10:30, 10:30, k] += 127
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


@pytest.fixture
def run(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    config = {
        "input_size": (3, 32, 32),
        "mean": (0.5,) * 3,
        "std": (0.5,) * 3,
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "crop_mode": "center",
    }
    loaded = models.LoadedModel(Bright().eval(), "bright", "none", Preprocessing(config), ClassNames(3, NAMES))
    monkeypatch.setattr(models, "load_model", lambda *a, **k: loaded)
    monkeypatch.setattr("ramp_fast.cli.evaluate.SAVE_EVERY", 0.0)

    def call(*arguments: Any) -> int:
        fixed = ["evaluate", "--data", photos, "--out", tmp_path / "out", "--method", "ixg", "--method", "random"]
        return cli.main([str(a) for a in (*fixed, "--metric", "deletion:steps=4", *arguments)])

    return call


def has_matplotlib() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def test_table_values_and_plots(run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--metric", "gae:steps=2", *([] if has_matplotlib() else ["--no-plots"])) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    result = Evaluation.load(tmp_path / "out" / "evaluation.json")
    assert str(result) in out
    assert "6 images; 2 left out of gae:steps=2" in out
    with open(tmp_path / "out" / "values.csv", newline="") as file:
        rows = [r for r in csv.DictReader(file) if r["metric"] == "deletion:steps=4" and r["method"] == "ixg"]
    assert [r["image"] for r in rows] == [f"{name}/{number}" for name in NAMES for number in range(2)]
    deletion = result.results["ixg"]["deletion:steps=4"].values["deletion"]
    assert [float(r["value"]) for r in rows] == deletion.tolist()
    assert result.results["ixg"]["deletion:steps=4"].mean < result.results["random"]["deletion:steps=4"].mean
    assert (tmp_path / "out" / "table.csv").is_file()
    for name in ("bars", "curves"):
        if has_matplotlib():
            with Image.open(tmp_path / "out" / f"{name}.png") as picture:
                assert min(picture.size) > 100


def test_batches_change_nothing(run: Callable[..., int], tmp_path: Path) -> None:
    path = tmp_path / "out" / "evaluation.json"
    assert run("--no-plots", "--batch-size", 4, "--seed", 3) == 0
    first = Evaluation.load(path)
    assert run("--no-plots", "--batch-size", 1, "--workers", 0, "--seed", 3) == 0
    second = Evaluation.load(path)
    for method, results in first.results.items():
        for metric, result in results.items():
            torch.testing.assert_close(second.results[method][metric].values, result.values)
    assert run("--no-plots", "--seed", 4) == 0
    other = Evaluation.load(path).results["random"]["deletion:steps=4"].mean
    assert other != first.results["random"]["deletion:steps=4"].mean


def test_the_class_of_the_folder_is_explained(run: Callable[..., int], tmp_path: Path) -> None:
    seen: list[int] = []

    def record(model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
        seen.extend(target.tolist())
        return images

    METHODS["record"] = MethodEntry("for this test", lambda model: record)
    try:
        assert run("--no-plots", "--method", "record") == 0
    finally:
        del METHODS["record"]
    assert seen == [0, 0, 1, 1, 2, 2]


def test_failures_and_broken_files(
    run: Callable[..., int], photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "dog" / "broken.jpg").write_bytes(b"no image")
    assert run("--no-plots", "--method", "rollout") == 2  # not a Vision Transformer: known before anything is computed
    assert "rollout" in capsys.readouterr().err
    assert not (tmp_path / "out" / "evaluation.json").exists()

    def broken(model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
        raise ZeroDivisionError("no luck")

    METHODS["broken"] = MethodEntry("for this test", lambda model: broken)
    try:
        assert run("--no-plots", "--method", "broken", "--progress") == 2
    finally:
        del METHODS["broken"]
    printed = capsys.readouterr()
    assert "broken.jpg" in printed.err
    assert "method broken, metric deletion:steps=4, batch 0" in printed.err
    assert "1 unreadable; 1 pairs of method and metric failed: broken / deletion:steps=4" in printed.out
    assert Evaluation.load(tmp_path / "out" / "evaluation.json").results["ixg"]["deletion:steps=4"].count == 6


def test_interrupted(run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calls = []

    def stops(model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return images

    METHODS["stops"] = MethodEntry("for this test", lambda model: stops)
    try:
        assert run("--no-plots", "--method", "stops", "--batch-size", 2) == 130
    finally:
        del METHODS["stops"]
    assert "what was evaluated before is in evaluation.json" in capsys.readouterr().err
    kept = Evaluation.load(tmp_path / "out" / "evaluation.json")
    assert kept.results["stops"]["deletion:steps=4"].count == 4
    assert kept.images == 4


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--metric", "delition"], "no metric 'delition'"),
        (["--metric", "deletion:depth=2"], "no setting 'depth'"),
        (["--metric", "deletion:"], "no settings follow the colon"),
        (["--metric", "deletion:steps=3,steps=4"], "steps is given twice"),
        (["--metric", "road:percentages=[50,'a']"], "percentages must be a sequence of numbers"),
        (["--metric", "deletion:steps=1000000000"], "steps must be at most"),
        (["--metric", "gae:steps=1000000000"], "steps must be at most"),
        (["--metric", "aopc:regions=1000000000"], "regions must be at most"),
        (["--metric", "infidelity:samples=1000000000"], "samples must be at most"),
        (["--metric", "max_sensitivity:samples=1000000000"], "samples must be at most"),
        (["--metric", "sensitivity_n:samples=1000000000"], "samples must be at most"),
        (["--method", "lrp"], "unknown method 'lrp'"),
        (["--metric", "pointing_game"], "have no masks"),
        (["--data", "nowhere"], "no such folder"),
        (["--class-of", "dog=big"], "not the number of a class"),
    ],
)
def test_what_does_not_fit(
    run: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    problem: str,
) -> None:
    assert run("--no-plots", *arguments) == 2
    error = capsys.readouterr().err
    assert problem in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "out" / "evaluation.json").exists()


def test_own_pictures_are_no_photographs(
    run: Callable[..., int], photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "maps").mkdir()
    save_picture(photos / "maps" / "0.png", Image.new("RGB", (40, 40)))
    (photos / "cat" / "overlay.jpg").write_bytes((photos / "maps" / "0.png").read_bytes())  # known only when read
    for _ in range(2):  # the second time its own results lie there
        plots = [] if has_matplotlib() else ["--no-plots"]
        assert run("--out", photos / "results", *plots) == 0, capsys.readouterr().err
        assert "6 images (" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["evaluation.json", "table.csv", "values.csv", "bars.png"])
def test_files_of_others_are_kept(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_bytes(b"mine")
    assert run(*([] if has_matplotlib() or name != "bars.png" else ["--no-plots"])) == 2
    assert f"{name} has no mark of ramp-fast" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "out").iterdir()] == [name]
    assert (tmp_path / "out" / name).read_bytes() == b"mine"


FILES = {"evaluation.json", "table.csv", "values.csv", "bars.png", "curves.png"}


def leave_earlier(out: Path) -> None:
    """All files that a run may write, as an earlier one would have left them."""
    for name in ("bars.png", "curves.png"):
        save_picture(out / name, Image.new("RGB", (40, 40)))
    (out / "table.csv").write_text("method,metric,mean,standard_error,count,higher_is_better\n")
    (out / "values.csv").write_text("method,metric,entry,image,value\n")


def test_nothing_of_an_earlier_run_stays(run: Callable[..., int], photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("--no-plots") == 0
    leave_earlier(out)
    assert {p.name for p in out.iterdir()} == FILES
    assert run("--no-plots") == 0
    assert {p.name for p in out.iterdir()} == {"evaluation.json", "table.csv", "values.csv"}
    assert len((out / "table.csv").read_text().splitlines()) == 3
    leave_earlier(out)
    (out / "bars.png").write_bytes(b"mine")
    for path in photos.rglob("*.png"):
        path.write_bytes(b"no image")
    assert run("--no-plots") == 2
    assert {p.name for p in out.iterdir()} == {"bars.png"}


def test_tables_go_before_a_new_evaluation_is_written(run: Callable[..., int], tmp_path: Path) -> None:
    out, seen = tmp_path / "out", []
    out.mkdir()
    leave_earlier(out)

    def look(model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
        seen.append({p.name for p in out.iterdir()})
        return images

    METHODS["look"] = MethodEntry("for this test", lambda model: look)
    try:
        assert run("--no-plots", "--method", "look", "--batch-size", 2) == 0
    finally:
        del METHODS["look"]
    assert seen == [FILES - {"evaluation.json"}, {"evaluation.json"}, {"evaluation.json"}]


def test_odd_names_and_nothing_named(
    run: Callable[..., int], photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "cat" / "0.png").rename(Path(os.fsdecode(os.fsencode(photos) + b"/cat/caf\xe9.png")))
    os.mkfifo(photos / "dog" / "pipe.jpg")
    assert run("--no-plots") == 2
    assert "pipe.jpg: a named pipe, not a file" in capsys.readouterr().err
    assert r"cat/caf\udce9" in (tmp_path / "out" / "values.csv").read_text(encoding="utf-8")
    assert run("--data", "") == 2  # not the demonstration's photographs
    assert run("--out", "") == 2
    assert run("--layout", "voc", "--class-of", "dog=True") == 2


def test_counts_that_memory_has_no_room_for(
    run: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ramp_fast.metrics._counts.MOST_BYTES", 300)
    assert run("--no-plots", "--metric", "gae:steps=2", "--metric", "faithfulness_correlation:samples=3") == 2
    said = capsys.readouterr().err
    for what in ("the logits of 5 steps of 6 images", "gae: steps=2", "samples=3"):
        assert f"{what} would take" in said


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", "--list"]) == 0
    out = capsys.readouterr().out
    assert "  deletion (lower is better; baseline, granularity, noise, output, steps)" in out
    assert "  ixg: input x gradient" in out
    assert cli.main(["evaluate"]) == 2
    assert "--out DIR is missing" in capsys.readouterr().err
