"""Every block of code of the README and of docs/ runs; so does every command line that these pages show.

Networks and pictures are made small by the replacements below, which must be found in the page as they stand here.
"""

from __future__ import annotations

import re
import shlex
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

from ramp_fast import cli, models
from ramp_fast.data import ClassNames, Preprocessing
from ramp_fast.methods import input_x_gradient

ROOT = Path(__file__).parents[1]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text() for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))
}

REPLACED = {
    "README.md": {
        '"vit_base_patch16_224", pretrained=True': '"vit_tiny_patch16_224", img_size=32, depth=2',
        "torch.randn(8, 3, 224, 224)": "torch.randn(4, 3, 32, 32)",
        "[8, 3, 224, 224], [8], [8, 1000]": "[4, 3, 32, 32], [4], [4, 1000]",
    },
    "docs/integrations.md": {"nr_samples=10": "nr_samples=2"},
}

# Beginnings of command lines that are not run here, and why.
NOT_RUN = {
    "pip install": "changes the environment; its extras are looked up",
    "pytest": "runs this test",
    "python bench/": "a benchmark; that its file is there is looked up",
    "python -m ramp_fast": "tests/cli/test_cli.py runs it",
    "RAMP_FAST_MODELS=FOLDER python bench/": "needs trained networks",
}
PLACEHOLDERS = {"PATH", "PATH...", "NAME", "NAME...", "FILE", "FOLDER", "DIR", "K", "SOURCE", "STORE"}

_FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMANDS = {
    command.strip(): page
    for page, text in PAGES.items()
    for line in (
        *re.findall(r"^    ((?:pip|ramp-fast|pytest|python|RAMP_FAST_\w+=\S+ python)\b.*)$", text, re.MULTILINE),
        *re.findall(r"`((?:ramp-fast \w+|python) [^`]+)`", _FENCED.sub("", text).replace("\n", " ")),
    )
    for command in line.split(" && ")
}


def blocks(page: str) -> list[str]:
    fenced = _FENCED.findall(PAGES[page])
    assert {language for language, _ in fenced} <= {"python"}, f"{page} has blocks in a language that nothing runs"
    return [code for _, code in fenced]


def small() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(img_size=32, patch_size=16, embed_dim=24, depth=2, num_heads=2, num_classes=1000).eval()


@pytest.mark.filterwarnings("ignore")  # Quantus warns of much
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)])
def test_python_blocks(page: str, tmp_path: Path, at_hand: None) -> None:
    """One after the other, with what a reader has at hand: a model, images and labels, a method of their own."""
    if '"val-maps"' in PAGES[page]:
        store_maps()
    model, images, labels = small(), torch.randn(4, 3, 32, 32), torch.arange(4)
    from ramp_fast import Engine

    names: dict[str, Any] = {
        "__name__": page,
        "model": model,
        "images": images,
        "labels": labels,
        "x": images.numpy(),
        "y": labels.numpy(),
        "loader": [(images, labels)],
        "my_method": input_x_gradient,
    }
    if page != "README.md":
        names["engine"] = Engine(model, input_shape=(3, 32, 32))
    replaced = dict(REPLACED.get(page, {}))
    for number, code in enumerate(blocks(page)):
        for there, here in REPLACED.get(page, {}).items():
            if there in code:
                code = code.replace(there, here)
                replaced.pop(there, None)
        exec(compile(code, f"{page}, block {number}", "exec"), names)
    assert not replaced, f"{page} has no longer {list(replaced)}"


def store_maps() -> None:
    """What the page makes with its first command."""
    assert cli.main(["run", "ILSVRC2012_img_val.tar", "--labels", "val.txt", "--out", "val-maps"]) == 0


@pytest.fixture
def at_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Photographs in ``photos/`` and in a tar as ImageNet's, and a small network for every name of one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    draw = np.random.default_rng(0)
    for number in range(4):
        Image.fromarray(draw.integers(0, 255, (40, 48, 3), dtype=np.uint8)).save(tmp_path / "photos" / f"{number}.png")
    with tarfile.open(tmp_path / "ILSVRC2012_img_val.tar", "w") as archive:
        for number, path in enumerate(sorted((tmp_path / "photos").iterdir()), 1):
            archive.add(path, f"ILSVRC2012_val_{number:08d}.JPEG")
    (tmp_path / "val.txt").write_text("".join(f"ILSVRC2012_val_{n:08d}.JPEG {n}\n" for n in range(1, 5)))
    config = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic"}
    preprocessing = Preprocessing({**config, "crop_pct": 1.0, "crop_mode": "center"})

    def load(name: str | None = None, *args: Any, **options: Any) -> models.LoadedModel:
        assert name in (None, "demo") or timm.is_model(name)
        return models.LoadedModel(small(), "small", "none", preprocessing, ClassNames(1000))

    monkeypatch.setattr(models, "load_model", load)


def shown(program: str) -> Iterator[list[str]]:
    """Arguments of the command lines that begin with a program's name."""
    for command in COMMANDS:
        if command.startswith(program):
            yield shlex.split(command.split("  #")[0])[1:]


RUN = [arguments for arguments in shown("ramp-fast") if not PLACEHOLDERS & set(arguments)]
SYNOPSES = [arguments for arguments in shown("ramp-fast") if PLACEHOLDERS & set(arguments)]


@pytest.mark.parametrize("arguments", RUN, ids=" ".join)
def test_commands(arguments: list[str], at_hand: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if "--maps" in arguments:
        store_maps()
    assert cli.main(arguments) == 0, capsys.readouterr().err
    if "--out" in arguments:
        assert any((tmp_path / arguments[arguments.index("--out") + 1]).iterdir())


@pytest.mark.parametrize("arguments", SYNOPSES, ids=" ".join)
def test_synopses(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Options that a page shows with placeholders are there."""
    cli.main([arguments[0], "--help"])
    known = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    assert {a.strip("[]") for a in arguments if a.strip("[]").startswith("--")} <= known


def test_other_commands_are_accounted_for() -> None:
    # Python 3.10 has no tomllib
    _, extras_of = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")
    extras = re.findall(r"^(\w+) = \[", extras_of.split("[project.scripts]")[0], re.MULTILINE)
    for command, page in COMMANDS.items():
        assert command.startswith(("ramp-fast ", *NOT_RUN)), f"{page} shows a command that nothing runs: {command}"
        for named in re.findall(r"\[([\w,]+)\]'", command):
            assert set(named.split(",")) <= set(extras), f"{page}: {command}"
        for script in re.findall(r"bench/\S+\.py", command):
            assert (ROOT / script).is_file(), f"{page}: {command}"
    assert RUN
    assert SYNOPSES
