"""``ramp-fast run`` and ``verify``: what they refuse, go on with, and say."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image

from ramp_fast import cli
from ramp_fast.cli import run as run_module
from ramp_fast.explainer import Attribution
from ramp_fast.results import open_maps
from ramp_fast.results.map_writer import MapWriter

MODEL, SIZE, CLASSES = "test_vit", 32, 10


class StubEngine:
    """Input x gradient, image by image."""

    calls = 0

    def __init__(self, model: torch.nn.Module, request: Any, input_shape: Any) -> None:
        self.model = model

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.model(image[None]).detach() for image in images])

    def attribute(
        self, images: torch.Tensor, target: Any = None, contrast: str = "others", normalize: str = "max"
    ) -> Attribution:
        type(self).calls += 1
        maps, logits, chosen = [], [], []
        for number, image in enumerate(images):
            x = image[None].clone().requires_grad_(True)
            scores = self.model(x)
            k = int(scores.argmax()) if target is None else int(target[number])
            (gradient,) = torch.autograd.grad(scores[0, k], x)
            maps.append((gradient * x).detach())
            logits.append(scores.detach())
            chosen.append(k)
        return Attribution(torch.cat(maps), torch.tensor(chosen), torch.cat(logits))


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> type[StubEngine]:
    engine = type("Engine", (StubEngine,), {"calls": 0})
    monkeypatch.setattr(run_module, "make_engine", engine)
    return engine


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        path = tmp_path_factory.mktemp("weights") / "weights.safetensors"
        safetensors.torch.save_file(timm.create_model(MODEL, num_classes=CLASSES, img_size=SIZE).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "photographs"
    rng = np.random.default_rng(0)
    for number in range(9):
        group = folder / str(number % 3)
        group.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(group / f"{number}.jpg")
    return folder


@pytest.fixture
def command(checkpoint: Path, photographs: Path, tmp_path: Path) -> Callable[..., list[str]]:
    def arguments(*more: Any, source: Path = photographs, weights: Path = checkpoint, out: str = "s") -> list[str]:
        model = ("--model", MODEL, "--checkpoint", weights, "--num-classes", CLASSES)
        how = ("--model-arg", f"img_size={SIZE}", "--shard-size", 4, "--workers", 0)
        return [str(a) for a in ("run", source, *model, *how, "--out", tmp_path / out, *more)]

    return arguments


@pytest.fixture
def run(command: Callable[..., list[str]], stub: type[StubEngine]) -> Callable[..., int]:
    return lambda *more, **where: cli.main(command(*more, **where))


def test_a_folder_of_classes(
    run: Callable[..., int], tmp_path: Path, photographs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run() == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path}/s: 9 attributed; 9 in the store (")
    maps = open_maps(tmp_path / "s")
    assert maps.array("label").tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert maps.plan.source["layout"] == "folders"
    assert maps["1/4"].map.shape == (SIZE, SIZE)
    (line,) = (tmp_path / "s" / "runs.jsonl").read_text().splitlines()
    about = json.loads(line)
    assert (about["images"], about["failures"], about["device"]) == (9, 0, "cpu")
    assert 0.5 < about["reading"] + about["computing"] + about["writing"] <= 1


def test_nothing_to_do(
    run: Callable[..., int], tmp_path: Path, stub: type[StubEngine], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run() == 0
    calls = stub.calls
    capsys.readouterr()
    assert run() == 0
    assert capsys.readouterr().out == f"{tmp_path}/s: nothing to do: 9 images are finished\n"
    assert stub.calls == calls


def test_nothing_to_do_goes_without_torch(command: Callable[..., list[str]], stub: type[StubEngine]) -> None:
    assert cli.main(command()) == 0
    code = "import sys; from ramp_fast import cli; cli.main(sys.argv[1:]); print('torch' in sys.modules)"
    call = [sys.executable, "-c", code, *command()]
    said = subprocess.run(call, capture_output=True, text=True, check=True, cwd=os.sep).stdout.splitlines()
    assert "nothing to do" in said[0]
    assert said[1] == "False"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--rule", "lrp-epsilon"), 'rule is "abslrp" there and "lrp-epsilon" here'),
        (("--targets", "label"), 'targets is "predicted" there and "label" here'),
        (("--dtype", "int8"), 'dtype is "float16" there and "int8" here'),
        (("--channels",), "channels is false there and true here"),
        (("--limit", "5"), "limit is null there and 5 here"),
        (("--mean", "0.5", "0.5", "0.4"), "mean is null there and [0.5, 0.5, 0.4] here"),
        (("--fast-decode",), 'decoding is "exact" there and "scaled" here'),
    ],
)
def test_another_request_is_refused(
    run: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: tuple[str, ...],
    message: str,
) -> None:
    assert run("--limit", 4) == 0 if "--limit" not in change else run() == 0
    more = change if "--limit" in change else ("--limit", "4", *change)
    before = (tmp_path / "s" / "plan.json").read_bytes()
    capsys.readouterr()
    assert run(*more) == 2
    said = capsys.readouterr().err
    assert f"{tmp_path}/s holds maps of another run: {message}; choose another --out" in said
    assert (tmp_path / "s" / "plan.json").read_bytes() == before


def test_other_weights_are_refused(
    run: Callable[..., int], checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run() == 0
    state = safetensors.torch.load_file(checkpoint)
    state["head.bias"] = state["head.bias"] + 1
    safetensors.torch.save_file(state, tmp_path / "other.safetensors")
    assert run(weights=tmp_path / "other.safetensors") == 2
    assert "holds maps of another run: checkpoint is " in capsys.readouterr().err


class TestSourceChanged:
    @pytest.fixture
    def copy(self, photographs: Path, tmp_path: Path) -> Path:
        return Path(shutil.copytree(photographs, tmp_path / "copy"))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda p: (p / "0" / "3.jpg").unlink(), "1 gone (0/3)"),
            (lambda p: shutil.copy(p / "0" / "3.jpg", p / "0" / "new.jpg"), "1 new (0/new)"),
            (lambda p: (p / "0" / "3.jpg").write_bytes(b"x"), "1 of another size (0/3)"),
        ],
    )
    def test_names_and_sizes(
        self,
        run: Callable[..., int],
        copy: Path,
        capsys: pytest.CaptureFixture[str],
        change: Callable[[Path], Any],
        message: str,
    ) -> None:
        assert run(source=copy) == 0
        change(copy)
        assert run(source=copy) == 2
        assert f"the source has changed since the plan: {message}" in capsys.readouterr().err

    def test_other_bytes_of_equal_size(
        self, run: Callable[..., int], copy: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert run(source=copy) == 0
        path = copy / "1" / "4.jpg"
        data = bytearray(path.read_bytes())
        data[-10] ^= 1
        path.write_bytes(data)
        os.utime(path, ns=(1, 1))
        assert run(source=copy) == 2
        assert f"{path} has other bytes than what was attributed" in capsys.readouterr().err

    def test_an_archive_with_other_bytes(
        self, run: Callable[..., int], copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = tmp_path / "x.tar"
        with tarfile.open(path, "w") as archive:
            archive.add(copy, "x")
        assert run(source=path) == 0
        os.utime(path, ns=(1, 1))
        assert run(source=path) == 0
        data = path.read_bytes()
        at = data.index((copy / "2" / "5.jpg").read_bytes()) + 500
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        assert run(source=path) == 2
        assert f"{path}: 2/5 has other bytes" in capsys.readouterr().err.replace("x/2/5", "2/5")

    def test_a_copy_is_the_same(self, run: Callable[..., int], copy: Path, photographs: Path) -> None:
        assert run() == 0
        for path in copy.rglob("*.jpg"):
            os.utime(path, ns=(1, 1))
        assert run(source=copy) == 0


def test_broken_images_are_named(
    run: Callable[..., int], photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(photographs, tmp_path / "copy"))
    (folder / "1" / "4.jpg").write_bytes(b"no image")
    assert run(source=folder) == 2
    said = capsys.readouterr()
    assert f"ramp-fast: {folder}/1/4.jpg: not an image" in said.err
    assert "8 attributed; 8 in the store; 1 failed: 1/4 (failures.csv says why)" in said.out
    assert run(source=folder) == 2
    assert "nothing to do: 9 images are finished; 1 failed: 1/4" in capsys.readouterr().out
    assert run("--retry-failed", source=folder) == 2
    assert "3 attributed; 8 in the store; 1 failed" in capsys.readouterr().out


def test_explained_labels(run: Callable[..., int], tmp_path: Path, photographs: Path) -> None:
    assert run("--targets", "label", "--dtype", "float32") == 0
    maps = open_maps(tmp_path / "s")
    assert maps.array("target").tolist() == maps.array("label").tolist()
    assert maps.array("maps").dtype == np.float32


def test_labels_that_are_not_there(
    run: Callable[..., int], photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--targets", "label", source=photographs / "1") == 2
    assert "--targets label, but nothing here says the classes of images" in capsys.readouterr().err
    assert not (tmp_path / "s" / "plan.json").exists()


def test_folders_that_are_no_classes(
    run: Callable[..., int], photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "trips"
    for name in ("rome", "oslo"):
        shutil.copytree(photographs / "1", folder / name)
    assert run("--layout", "folders", source=folder) == 2
    capsys.readouterr()
    assert run(source=folder) == 0
    assert f"ramp-fast: labels are left out: {folder}: 2 class folders (oslo, rome)" in capsys.readouterr().err
    assert (open_maps(tmp_path / "s").array("label") == -1).all()
    assert run("--targets", "label", source=folder, out="other") == 2


def test_progress_as_json(run: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--log-json") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    last = lines[-1]
    assert (last["images"], last["total"], last["failures"], last["seconds_left"]) == (9, 9, 0, 0)
    assert last["images_per_second"] > 0
    assert {"reading", "computing", "writing", "seconds"} <= last.keys()


def test_quiet_without_a_terminal(run: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert len(said.out.splitlines()) == 1


class TestParts:
    def test_parts_make_the_whole(self, run: Callable[..., int], tmp_path: Path) -> None:
        assert run(out="whole") == 0
        assert run("--shards", "2/2") == 0
        assert open_maps(tmp_path / "s").done.tolist() == [False] * 4 + [True] * 4 + [False]
        assert run("--shards", "1/2") == 0
        for path in (tmp_path / "whole" / "maps.zarr").rglob("c.*"):
            assert (tmp_path / "s" / path.relative_to(tmp_path / "whole")).read_bytes() == path.read_bytes()
        assert open_maps(tmp_path / "s").done.all()
        assert sorted(p.name for p in (tmp_path / "s").glob("journal*")) == [
            "journal-1-of-2.jsonl",
            "journal-2-of-2.jsonl",
        ]

    def test_what_parts_have_done_is_finished(
        self, run: Callable[..., int], capsys: pytest.CaptureFixture[str]
    ) -> None:
        for part in ("1/3", "2/3", "3/3"):
            assert run("--shards", part) == 0
        capsys.readouterr()
        assert run("--shards", "3/3") == 0
        assert "nothing to do: 1 images of part 3/3 are finished" in capsys.readouterr().out
        assert run() == 0
        assert "nothing to do: 9 images are finished" in capsys.readouterr().out

    def test_the_last_turn_of_a_shard_holds(self, run: Callable[..., int], photographs: Path, tmp_path: Path) -> None:
        """An image that could not be read at first: whichever run tries it again, its line in the journal counts."""
        folder = Path(shutil.copytree(photographs, tmp_path / "copy"))
        path, aside = folder / "1" / "4.jpg", tmp_path / "aside.jpg"
        whole = path.read_bytes()
        for first, then in (((), ("--shards", "2/2")), (("--shards", "2/2"), ())):
            path.write_bytes(bytes(len(whole)))
            aside.write_bytes(whole)
            assert run(*first, source=folder) == 2
            path.write_bytes(whole)
            assert run(*then, "--retry-failed", source=folder) == 0
            assert open_maps(tmp_path / "s").failures() == {}
            assert cli.main(["verify", str(tmp_path / "s"), "--samples", "0"]) == 0
            shutil.rmtree(tmp_path / "s")

    def test_beside_each_other(
        self, run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert run("--shards", "1/2") == 0
        with MapWriter(tmp_path / "s", (1, 2)):
            assert run("--shards", "2/2") == 0
            assert run("--shards", "1/2") == 2
            assert run() == 2
        assert capsys.readouterr().err.count("is being written by another run") == 2

    @pytest.mark.slow
    def test_started_at_once(self, command: Callable[..., list[str]], run: Callable[..., int], tmp_path: Path) -> None:
        """Whoever is first makes the plan; the other one takes it."""
        assert run(out="whole") == 0
        code = (
            "import sys, test_cli_run as t; t.run_module.make_engine = t.StubEngine; sys.exit(t.cli.main(sys.argv[1:]))"
        )
        calls = [[sys.executable, "-c", code, *command("--shards", part)] for part in ("1/2", "2/2")]
        here = str(Path(__file__).parent)
        runs = [subprocess.Popen(call, stdout=subprocess.DEVNULL, cwd=here) for call in calls]
        assert [process.wait() for process in runs] == [0, 0]
        for path in (tmp_path / "whole" / "maps.zarr").rglob("c.*"):
            assert (tmp_path / "s" / path.relative_to(tmp_path / "whole")).read_bytes() == path.read_bytes()

    @pytest.mark.parametrize("part", ["0/2", "3/2", "1", "a/b", "1/0"])
    def test_no_parts(self, run: Callable[..., int], capsys: pytest.CaptureFixture[str], part: str) -> None:
        assert run("--shards", part) == 2
        assert "is not I/N with I from 1 to N" in capsys.readouterr().err


class TestVerify:
    def verify(self, tmp_path: Path, *more: Any) -> int:
        return cli.main(["verify", str(tmp_path / "s"), "--workers", "0", *(str(m) for m in more)])

    def test_a_whole_store(self, run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert run() == 0
        capsys.readouterr()
        assert self.verify(tmp_path) == 0
        expected = "3 of 3 shards; 9 of 9 images have a map; 8 maps again, to the last bit"
        assert capsys.readouterr().out == f"{tmp_path}/s: {expected}\n"

    def test_damage_and_mending(
        self, run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert run() == 0
        path = tmp_path / "s" / "maps.zarr" / "maps" / "c.1.0.0"
        whole = path.read_bytes()
        path.write_bytes(whole[:100] + b"\xff" + whole[101:])
        assert self.verify(tmp_path) == 2
        said = capsys.readouterr()
        assert f"{path}: damaged: its SHA-256 is not the journal's; remove it" in said.err
        assert "1 files are damaged or missing" in said.out
        path.unlink()
        assert self.verify(tmp_path) == 2
        assert f"{path}: missing" in capsys.readouterr().err
        assert run() == 0
        assert path.read_bytes() == whole
        assert self.verify(tmp_path) == 0

    def test_missing_shards(self, run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert run() == 0
        journal = tmp_path / "s" / "journal.jsonl"
        journal.write_text("".join(journal.read_text().splitlines(keepends=True)[:2]))
        assert self.verify(tmp_path, "--samples", 0) == 2
        assert "1 of 3 shards are not finished" in capsys.readouterr().err

    def test_another_engine_is_noticed(
        self, run: Callable[..., int], tmp_path: Path, stub: type[StubEngine], capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert run() == 0
        whole = stub.attribute

        def other(self: StubEngine, *arguments: Any, **options: Any) -> Attribution:
            found = whole(self, *arguments, **options)
            return Attribution(found.maps.flip(-1), found.target, found.logits)

        stub.attribute = other  # type: ignore[method-assign]  # of this test's own class
        assert self.verify(tmp_path) == 2
        said = capsys.readouterr()
        assert "8 of 8 maps are others" in said.out
        assert "the map computed now differs by" in said.err

    def test_no_store(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert self.verify(tmp_path) == 2
        assert "no such folder" in capsys.readouterr().err


def test_by_the_engine_itself(command: Callable[..., list[str]], tmp_path: Path) -> None:
    """The maps are those of ``Engine.attribute`` on timm's preprocessing."""
    from ramp_fast import Engine
    from ramp_fast.data import read_image
    from ramp_fast.models import load_model

    assert cli.main(command("--limit", 3)) == 0
    maps = open_maps(tmp_path / "s")
    given = command()
    weights = given[given.index("--checkpoint") + 1]
    loaded = load_model(MODEL, weights, num_classes=CLASSES, model_args={"img_size": SIZE})
    engine = Engine(loaded.model)
    for number, stored in enumerate(maps):
        path = Path(given[1]) / f"{maps.names[number]}.jpg"
        found = engine.attribute(loaded.preprocessing(read_image(path))[None])
        wanted = found.maps.sum(1)[0].numpy()
        assert np.linalg.norm(stored.map - wanted) < 0.02 * np.linalg.norm(wanted)
        assert int(stored.target) == int(found.target)


@pytest.mark.slow
def test_killed_at_random_moments(command: Callable[..., list[str]], tmp_path: Path) -> None:
    """Forty kills of the whole command, alone and with its processes: the bytes of a run that was left alone."""
    more = ("--workers", 1, "--shard-size", 2, "--batch-size", 1)

    def call(out: str) -> list[str]:
        return [sys.executable, "-m", "ramp_fast.cli", *command(*more, out=out)]

    def contents(out: str) -> dict[str, bytes]:
        files = (p for p in sorted((tmp_path / out).rglob("*")) if p.is_file() and p.parent.name != "locks")
        return {str(p.relative_to(tmp_path / out)): p.read_bytes() for p in files if p.name != "runs.jsonl"}

    started = time.monotonic()
    subprocess.run(call("whole"), check=True, stdout=subprocess.DEVNULL)
    seconds = time.monotonic() - started
    draw = np.random.default_rng(0)
    kills = stores = 0
    while kills < 40:
        out = f"killed-{stores}"
        while True:
            process = subprocess.Popen(call(out), stdout=subprocess.DEVNULL, start_new_session=True)
            try:
                assert process.wait(draw.uniform(0.3, 1.1) * seconds) == 0
                break
            except subprocess.TimeoutExpired:
                if draw.random() < 0.5:
                    os.killpg(process.pid, signal.SIGKILL)
                else:
                    process.kill()
                process.wait()
                kills += 1
        assert contents(out) == contents("whole")
        stores += 1


class TestEvaluateMaps:
    """``ramp-fast evaluate --maps`` of what the run has stored."""

    @pytest.fixture
    def evaluate(self, run: Callable[..., int], tmp_path: Path) -> Callable[..., int]:
        assert run() == 0
        fixed = ("--maps", tmp_path / "s", "--out", tmp_path / "e", "--metric", "deletion:steps=2", "--no-plots")
        return lambda *more: cli.main([str(a) for a in ("evaluate", *fixed, "--workers", 0, *more)])

    def test_model_and_images_are_the_stores(
        self, evaluate: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        capsys.readouterr()
        assert evaluate() == 0
        out = capsys.readouterr().out
        assert "abslrp" in out
        assert f"{tmp_path}/e: 9 images (" in out
        header, row = (tmp_path / "e" / "table.csv").read_text().splitlines()
        found = dict(zip(header.split(","), row.replace('"', "").split(","), strict=True))
        assert found["count"] == "9"
        assert float(found["low_95"]) < float(found["mean"]) < float(found["high_95"])
        assert len((tmp_path / "e" / "values.csv").read_text().splitlines()) == 10
        before = (tmp_path / "e" / "evaluation.json").read_bytes()
        assert evaluate() == 0
        assert (tmp_path / "e" / "evaluation.json").read_bytes() == before

    def test_parts(self, evaluate: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        for part in ("2/2", "1/2"):
            assert evaluate("--shards", part) == 0
            assert f"part {part} is finished; without --shards all parts are put together" in capsys.readouterr().out
        assert not (tmp_path / "e" / "table.csv").exists()
        assert evaluate() == 0
        assert (tmp_path / "e" / "table.csv").exists()

    @pytest.mark.parametrize(
        ("more", "message"),
        [
            (("--metric", "gae"), "gae needs maps of other images, classes or models"),
            (("--method", "ixg"), "--method and --maps are two ways"),
            (("--explain", "label"), "--explain: the maps of a store are those of the classes it was made for"),
            (("--limit", 3), "--limit: the plan of the store says how its source is read"),
            (("--layout", "flat"), "--layout: the plan of the store says"),
            (
                ("--mean", 0.1, 0.2, 0.3),
                "another model: preprocessing.mean is [0.5, 0.5, 0.5] there and [0.1, 0.2, 0.3] here",
            ),
            (("--maps", "nowhere"), "nowhere: no such folder"),
            (("--data", "."), "the source has changed since the plan"),
        ],
    )
    def test_what_is_refused(
        self,
        evaluate: Callable[..., int],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        more: tuple[Any, ...],
        message: str,
    ) -> None:
        (tmp_path / "other" / "0").mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "other" / "0" / "a.png")
        monkeypatch.chdir(tmp_path / "other")
        assert evaluate(*more) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "e" / "values").exists()

    def test_other_weights(
        self,
        evaluate: Callable[..., int],
        checkpoint: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        state = safetensors.torch.load_file(checkpoint)
        moved = tmp_path / "moved.safetensors"
        safetensors.torch.save_file(state, moved)
        assert evaluate("--checkpoint", moved) == 0
        state["head.bias"] += 1
        safetensors.torch.save_file(state, moved)
        assert evaluate("--checkpoint", moved) == 2
        said = capsys.readouterr().err
        assert "holds maps of another model: state_sha256 is" in said
        assert "weights is" in said

    def test_an_unfinished_store(
        self, evaluate: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        journal = tmp_path / "s" / "journal.jsonl"
        journal.write_text("".join(journal.read_text().splitlines(keepends=True)[:1]))
        assert evaluate() == 2
        said = capsys.readouterr()
        assert "2 of 3 shards have no maps yet and are not evaluated" in said.err
        assert f"{tmp_path}/e: 4 images (" in said.out

    def test_interrupted(
        self, evaluate: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def stop(*_: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("ramp_fast.metrics.Deletion.measure", stop)
        assert evaluate() == 130
        assert "finished shards are kept, the same command goes on" in capsys.readouterr().err

    def test_shards_need_a_store(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["evaluate", "--out", str(tmp_path / "e"), "--shards", "1/2", "--no-plots"]) == 2
        assert "--shards is for the maps of a store" in capsys.readouterr().err
