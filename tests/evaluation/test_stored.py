"""Evaluation of stored maps: the values, going on, parts, what is refused."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from stored_run import CLASSES, SIZE, Bright, contents, evaluation, loaded, photographs, slow, write_store
from torch import Tensor

from ramp_fast.data import open_source
from ramp_fast.errors import InputError, RampFastError
from ramp_fast.evaluation import Evaluation
from ramp_fast.metrics import METRICS, Metric, make_metric
from ramp_fast.results import StoreError, open_maps
from ramp_fast.results.metric_values import ValueWriter
from ramp_fast.results.shard_folder import BusyError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return photographs(tmp_path_factory.mktemp("data") / "photographs")


@pytest.fixture(scope="module")
def store(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(folder, tmp_path_factory.mktemp("stores") / "maps")


def images_of(folder: Path) -> Tensor:
    prepare = loaded().preprocessing
    pictures = []
    for path in sorted(folder.glob("*.png")):
        with Image.open(path) as picture:
            pictures.append(prepare(picture.convert("RGB")))
    return torch.stack(pictures)


def measured(metric: Metric, images: Tensor, store: Path, number: int, k: int | None = None) -> dict[str, Tensor]:
    """Values of one image, without the evaluation."""
    found = open_maps(store)[number]
    own = torch.from_numpy(found.map if k is None else found.map[k])
    target = torch.from_numpy(np.atleast_1d(found.target))[[k or 0]]
    fresh = metric.fresh(number)
    return fresh.update(images[[number]], target, None, maps=own.reshape(1, -1, SIZE, SIZE))


@pytest.mark.parametrize("channels", [False, True])
def test_values_are_those_of_the_metrics(folder: Path, tmp_path: Path, channels: bool) -> None:
    maps = write_store(folder, tmp_path / "maps", channels=channels)
    result = evaluation(maps, tmp_path / "out")
    assert result is not None
    assert list(result.results) == ["ixg"]
    assert (result.images, result.failures, result.names) == (10, {}, [f"{n:02d}" for n in range(10)])
    images = images_of(folder)
    for label, found in result.results["ixg"].items():
        name, _, settings = label.partition(":")
        metric = make_metric(name, Bright().eval(), **eval(f"dict({settings})"))
        assert found.count == 10
        for number in range(10):
            alone = measured(metric, images, maps, number)
            for component, values in found.values.items():
                torch.testing.assert_close(values[number], alone[component][0].double(), rtol=1e-5, atol=1e-6)


def test_every_target_is_a_method(folder: Path, tmp_path: Path) -> None:
    maps = write_store(folder, tmp_path / "maps", targets="predicted,2")
    result = evaluation(maps, tmp_path / "out", ["deletion:steps=4"])
    assert result is not None
    assert list(result.results) == ["ixg (predicted)", "ixg (class 2)"]
    images = images_of(folder)
    metric = make_metric("deletion", Bright().eval(), steps=4)
    for k, found in enumerate(result.results.values()):
        values = found["deletion:steps=4"].values["deletion"]
        alone = torch.cat([measured(metric, images, maps, number, k)["deletion"] for number in range(10)])
        torch.testing.assert_close(values, alone.double(), rtol=1e-5, atol=1e-6)
    first, second = (found["deletion:steps=4"].mean for found in result.results.values())
    assert first != second


def test_batches_do_not_show(store: Path, tmp_path: Path) -> None:
    one, other = (evaluation(store, tmp_path / str(size), batch_size=size) for size in (1, 4))
    assert one is not None
    assert other is not None
    for label, found in one.results["ixg"].items():
        for component, values in found.values.items():
            torch.testing.assert_close(values, other.results["ixg"][label].values[component], rtol=1e-6, atol=1e-7)


def test_a_second_call_computes_nothing(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = evaluation(store, tmp_path)
    before = contents(tmp_path)
    monkeypatch.setattr(METRICS["complexity"], "measure", lambda *a, **k: pytest.fail("computed again"))
    second = evaluation(store, tmp_path)
    assert str(first) == str(second)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("kills", [(1,), pytest.param((0, 1, 2), marks=pytest.mark.slow)])
def test_killed_and_gone_on_with_is_as_not_killed(store: Path, tmp_path: Path, kills: tuple[int, ...]) -> None:
    """The same bytes of values, journal and result, whenever it was killed: with so many shards finished."""
    whole, out = tmp_path / "whole", tmp_path / "killed"
    program = [sys.executable, str(Path(__file__).with_name("stored_run.py")), str(store), str(out)]
    for shards in kills:
        process = subprocess.Popen(program, cwd=os.sep)
        wait_for(lambda process=process, shards=shards: written(out) >= shards or process.poll() is not None)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert written(out) < 3
    for folder in (whole, out):
        network = Bright().eval()
        found = evaluation(store, folder, slow(network), model=network, batch_size=1)
        assert found is not None
        found.save(folder / "evaluation.json")
    assert contents(out) == contents(whole)


def written(out: Path) -> int:
    journal = out / "journal.jsonl"
    return journal.read_bytes().count(b"\n") if journal.exists() else 0


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


def test_parts_give_what_one_call_gives(store: Path, tmp_path: Path) -> None:
    whole = evaluation(store, tmp_path / "whole")
    assert whole is not None
    for number in (2, 1):
        assert evaluation(store, tmp_path / "parts", part=(number, 2)) is None
    assert sorted(path.name for path in (tmp_path / "parts").glob("journal*")) == [
        "journal-1-of-2.jsonl",
        "journal-2-of-2.jsonl",
    ]
    together = evaluation(store, tmp_path / "parts")
    assert together is not None
    for found, name in ((whole, "a"), (together, "b")):
        found.save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_two_calls_on_one_folder(store: Path, tmp_path: Path) -> None:
    with ValueWriter(tmp_path), pytest.raises(BusyError, match="being written by another run"):
        evaluation(store, tmp_path)


def test_a_store_that_grows(folder: Path, tmp_path: Path) -> None:
    maps = write_store(folder, tmp_path / "maps", shards=1)
    first = evaluation(maps, tmp_path / "out")
    assert first is not None
    assert first.images == 4
    write_store(folder, maps)
    second = evaluation(maps, tmp_path / "out")
    whole = evaluation(maps, tmp_path / "other")
    assert second is not None
    assert second.images == 10
    assert str(second) == str(whole)


def test_maps_that_are_others_now_are_evaluated_again(folder: Path, tmp_path: Path) -> None:
    maps = write_store(folder, tmp_path / "maps")
    evaluation(maps, tmp_path / "out", ["complexity"])
    (path,) = (tmp_path / "out" / "values").glob("000001.npz")
    path.unlink()  # as of a shard that has been done again
    journal = tmp_path / "out" / "journal.jsonl"
    journal.write_text(journal.read_text().replace('"shard": 0, "files": {"values": "', '"shard": 0, "files": {"v": "'))
    lines = (maps / "journal.jsonl").read_text().splitlines(keepends=True)
    (maps / "journal.jsonl").write_text("".join(lines).replace('"scale": "', '"scale": "0'))
    result = evaluation(maps, tmp_path / "out", ["complexity"])
    assert result is not None
    assert result.images == 10
    assert len(journal.read_text().splitlines()) == 6


def test_images_without_maps_are_left_out_and_move_no_draws(folder: Path, tmp_path: Path) -> None:
    broken = photographs(tmp_path / "broken")
    (broken / "05.png").write_bytes(b"no image")
    maps = write_store(broken, tmp_path / "maps")
    result, whole = (evaluation(m, tmp_path / f"out-{m.name}") for m in (maps, write_store(folder, tmp_path / "all")))
    assert result is not None
    assert whole is not None
    assert result.images == 9
    assert "05" not in result.names
    others = [n for n in range(10) if n != 5]
    for label, found in result.results["ixg"].items():
        for component, values in found.values.items():
            expected = whole.results["ixg"][label].values[component][others]
            torch.testing.assert_close(values, expected, rtol=1e-6, atol=1e-7)


def test_masks_of_the_source(folder: Path, store: Path, tmp_path: Path) -> None:
    source = open_source(folder)

    def left_half(size: tuple[int, int]) -> np.ndarray:
        mask = np.zeros(size, bool)
        mask[:, : size[1] // 2] = True
        return mask

    with pytest.raises(InputError, match=r"pointing_game: the source .* has no boxes or masks of the objects"):
        evaluation(store, tmp_path, ["pointing_game"], source=source)
    source.records = [replace(record, region=left_half) for record in source.records]
    result = evaluation(store, tmp_path, ["relevance_mass_accuracy:sign=absolute"], source=source)
    assert result is not None
    values = result.results["ixg"]["relevance_mass_accuracy:sign=absolute"].values["relevance_mass_accuracy"]
    for number, value in enumerate(values.tolist()):
        scores = np.abs(open_maps(store)[number].map)
        assert value == pytest.approx(scores[:, : SIZE // 2].sum() / scores.sum(), rel=1e-5)


def test_metrics_say_rightly_what_they_need(folder: Path) -> None:
    """Every metric: with maps alone it is computed, or it says before that it asks for further ones."""
    model, images = Bright().eval(), images_of(folder)[:4]
    maps = torch.rand(4, 1, SIZE, SIZE)
    masks = torch.zeros(4, SIZE, SIZE, dtype=torch.bool)
    masks[:, :4] = True
    few = {"top_k_intersection": {"k": 5}, "sensitivity_n": {"sizes": (4, 8)}, "parameter_randomisation": {}}
    for name in METRICS:
        metric = make_metric(name, model, **few.get(name, {}))
        asked = pytest.raises(InputError, match="asks the method for maps of its own")
        with asked if metric.asks_method else contextlib.nullcontext():
            metric.update(images, torch.tensor([0, 1, 2, 0]), None, maps=maps, masks=masks)


@pytest.mark.parametrize(
    ("metric", "reason"),
    [
        ("gae", "gae needs maps of other images, classes or models, which a store does not have"),
        ("max_sensitivity", "max_sensitivity needs maps of other images"),
        ("parameter_randomisation", "parameter_randomisation needs maps of other images"),
        ("sufficiency", "sufficiency compares every image with all others"),
        ("nonsense", "no metric 'nonsense'"),
    ],
)
def test_metrics_that_a_store_cannot_answer(store: Path, tmp_path: Path, metric: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        evaluation(store, tmp_path / "out", [metric])
    assert not (tmp_path / "out").exists()


def test_another_model(store: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"holds maps of another model: state_sha256 is .* there and .* here"):
        evaluation(store, tmp_path / "out", model=Bright(2.0).eval())
    assert not (tmp_path / "out").exists()


def test_other_images(folder: Path, tmp_path: Path) -> None:
    own = photographs(tmp_path / "photographs")
    maps = write_store(own, tmp_path / "maps")
    shutil.copy(own / "04.png", own / "03.png")  # of the same size: they are not compressed
    with pytest.raises(StoreError, match=r"03.png: the image has other bytes than what was attributed"):
        evaluation(maps, tmp_path / "out")
    (own / "03.png").unlink()
    with pytest.raises(StoreError, match=r"the source has changed since the plan: 1 gone \(03\)"):
        evaluation(maps, tmp_path / "out")
    result = evaluation(maps, tmp_path / "out", source=open_source(folder))
    assert result is not None


def test_another_evaluation_in_the_folder(store: Path, tmp_path: Path) -> None:
    evaluation(store, tmp_path / "out", {"a": "deletion:steps=4"})
    with pytest.raises(StoreError, match=r"holds another evaluation: a.steps is 4 there and 5 here; choose"):
        evaluation(store, tmp_path / "out", {"a": "deletion:steps=5"})
    with pytest.raises(StoreError, match=r"holds other files .* and no evaluation of stored maps"):
        evaluation(store, store)


def test_a_damaged_file_of_values(store: Path, tmp_path: Path) -> None:
    evaluation(store, tmp_path)
    path = tmp_path / "values" / "000001.npz"
    before = path.read_bytes()
    path.write_bytes(before[:-1])
    with pytest.raises(StoreError, match=r"000001.npz: damaged: .* remove it, and the same command computes shard 1"):
        evaluation(store, tmp_path)
    path.unlink()
    assert evaluation(store, tmp_path) is not None
    assert path.read_bytes() == before


def test_caller_is_left_as_it_was(store: Path, tmp_path: Path) -> None:
    model = Bright().eval()
    before, state = torch.random.get_rng_state(), {n: v.clone() for n, v in model.state_dict().items()}
    template = make_metric("complexity", model)
    evaluation(store, tmp_path, {"c": template}, model=model)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(v, state[n]) for n, v in model.state_dict().items())
    with pytest.raises(RuntimeError, match="no values yet"):
        template.compute()


def test_progress(store: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    evaluation(store, tmp_path, progress=lambda *both: seen.append(both))
    assert {total for _, total in seen} == {10}
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (10, 10)


def test_saved_and_loaded(store: Path, tmp_path: Path) -> None:
    result: Any = evaluation(store, tmp_path)
    result.save(tmp_path / "evaluation.json")
    assert str(Evaluation.load(tmp_path / "evaluation.json")) == str(result)
    (row, *_) = result.rows()
    low, high = result.results["ixg"]["complexity"].confidence_interval
    assert (row["low_95"], row["high_95"]) == (low, high)
    assert low < row["mean"] < high
    assert CLASSES == 3
    assert issubclass(StoreError, RampFastError)
