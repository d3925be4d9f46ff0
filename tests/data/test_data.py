"""Finding and reading images, preprocessing, class names, the demo's photographs."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image, PngImagePlugin

from ramp_fast.data import (
    ClassNames,
    ImageError,
    ImageItem,
    OwnPictureError,
    Preprocessing,
    Problem,
    find_images,
    images,
    read_image,
)
from ramp_fast.data.images import MAX_METADATA_BYTES
from ramp_fast.demo import demo_photographs, demo_state_dict
from ramp_fast.errors import InputError, RampFastError


def gradient(mode: str = "RGB", size: tuple[int, int] = (40, 30)) -> Image.Image:
    """A picture without symmetry, so that a turned or mirrored copy differs."""
    across = np.linspace(0, 255, size[0])[None, :].repeat(size[1], 0)
    down = np.linspace(0, 200, size[1])[:, None].repeat(size[0], 1)
    return Image.fromarray(np.stack([across, down, 0 * down], -1).astype(np.uint8)).convert(mode)


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    return path


def keys(*paths: Path, out: Path | None = None) -> dict[str, str]:
    found = list(find_images(paths, out=out))
    assert all(isinstance(f, ImageItem) for f in found), found
    return {f.path: f.key for f in found if isinstance(f, ImageItem)}


class TestFindImages:
    def test_folder_is_mirrored_sorted_and_filtered(self, tmp_path: Path) -> None:
        for name in ("b/x.jpg", "a/x.JPEG", "z.png", "notes.txt", ".hidden.jpg", ".cache/y.jpg"):
            touch(tmp_path / name)
        found = keys(tmp_path)
        assert list(found.values()) == ["z", os.path.join("a", "x"), os.path.join("b", "x")]

    def test_names_that_differ_by_suffix_or_case_do_not_collide(self, tmp_path: Path) -> None:
        for name in ("a.jpg", "a.png", "B.jpg", "b.webp", "c.jpg", "c.jpg.png"):
            touch(tmp_path / name)
        found = list(keys(tmp_path).values())
        assert len({key.casefold() for key in found}) == 6
        assert {"a.jpg", "a.png", "B.jpg", "b.webp"} <= set(found)

    def test_stem_equal_to_another_file_name(self, tmp_path: Path) -> None:
        # Stems: "a.jpg" (of a.jpg.png) and "a"; file a.jpg may need its whole name because of a.gif.
        for name in ("a.jpg", "a.gif", "a.jpg.png"):
            touch(tmp_path / name)
        assert len(set(keys(tmp_path).values())) == 3

    def test_an_image_may_not_take_the_contact_sheet_s_name(self, tmp_path: Path) -> None:
        touch(tmp_path / "contact_sheet.jpg")
        assert list(keys(tmp_path).values()) == ["contact_sheet.jpg"]

    def test_a_folder_may_not_take_the_contact_sheet_s_name(self, tmp_path: Path) -> None:
        for name in ("Contact_Sheet.png/a.jpg", "contact_sheet.png_/a.jpg", "sub/contact_sheet.png/a.jpg"):
            touch(tmp_path / "in" / name)
        tops = [key.split(os.sep)[0] for key in keys(tmp_path / "in").values()]
        assert sorted(tops) == ["Contact_Sheet.png__", "contact_sheet.png_", "sub"]
        folder, file = tmp_path / "in/sub/contact_sheet.png", touch(tmp_path / "in/contact_sheet")
        assert list(keys(folder).values()) == ["a"]  # its own top is the output's
        assert list(keys(folder, file).values()) == [os.path.join("contact_sheet.png_", "a"), "contact_sheet_"]

    def test_same_name_in_two_folders_given_as_arguments(self, tmp_path: Path) -> None:
        one, two = touch(tmp_path / "one/a.jpg"), touch(tmp_path / "two/a.jpg")
        assert set(keys(one, two).values()) == {os.path.join("one", "a"), os.path.join("two", "a")}
        assert len(set(keys(one.parent, two.parent).values())) == 2
        three = touch(tmp_path / "x/one/a.jpg")
        assert len(set(keys(one.parent, three.parent).values())) == 2

    def test_files_by_name_keep_their_own_name(self, tmp_path: Path) -> None:
        one, two = touch(tmp_path / "one/a.jpg"), touch(tmp_path / "two/b.odd")
        assert keys(one, two) == {str(one): "a", str(two): "b"}

    def test_a_path_given_twice_is_walked_once(self, tmp_path: Path) -> None:
        file = touch(tmp_path / "a.jpg")
        assert len(list(find_images([file, tmp_path / "." / "a.jpg"]))) == 1

    def test_output_folder_is_not_entered(self, tmp_path: Path) -> None:
        touch(tmp_path / "a.jpg")
        touch(tmp_path / "out/a.png")
        assert list(keys(tmp_path, out=tmp_path / "out").values()) == ["a"]

    @pytest.mark.parametrize("others", [(), ("more",)], ids=["itself", "its parent with several folders"])
    def test_results_never_go_among_the_photographs(self, tmp_path: Path, others: tuple[str, ...]) -> None:
        photos = touch(tmp_path / "photos/a.jpg").parent
        paths = [photos, *(touch(tmp_path / name / "b.jpg").parent for name in others)]
        out = tmp_path if others else photos
        assert [type(f) for f in find_images(paths, out=out)] == [Problem] * len(paths)

    def test_problems_are_reported_in_place(self, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
        good = touch(tmp_path / "a.jpg")
        found = list(find_images([tmp_path / "no.jpg", good, tmp_path / "empty", tmp_path / "dangling"]))
        assert [f.message if isinstance(f, Problem) else f.key for f in found] == [
            "no such file or folder",
            "a",
            "no images in this folder",
            "a broken link",
        ]

    def test_loops_of_links_end(self, tmp_path: Path) -> None:
        touch(tmp_path / "deep/a.jpg")
        (tmp_path / "deep/loop").symlink_to(tmp_path)
        assert list(keys(tmp_path).values()) == [os.path.join("deep", "a")]

    def test_links_that_cannot_be_followed_cost_only_themselves(self, tmp_path: Path) -> None:
        touch(tmp_path / "a.jpg")
        (tmp_path / "x.jpg").symlink_to("x.jpg")
        found = list(find_images([tmp_path]))
        assert found[0] == Problem(str(tmp_path / "x.jpg"), "Too many levels of symbolic links")
        assert [f.key for f in found if isinstance(f, ImageItem)] == ["a"]

    def test_folders_that_are_all_linked_in_each_other(self, tmp_path: Path) -> None:
        # 9! ways to walk without meeting a folder twice
        for i in range(9):
            touch(tmp_path / f"f{i}/p.jpg")
            for j in range(9):
                (tmp_path / f"f{i}/to{j}").symlink_to(tmp_path / f"f{j}")
        found = list(find_images([tmp_path]))
        assert 9 <= len(found) < 200

    def test_folders_deeper_than_the_stack(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        for _ in range(1010):
            os.mkdir("x")
            os.chdir("x")
        touch(Path("a.jpg"))
        os.chdir(tmp_path)
        (item,) = find_images(["."])
        assert isinstance(item, ImageItem)
        assert item.key == os.path.join(*["x"] * 1010, "a")
        os.system("rm -rf x")  # deeper than shutil.rmtree of older Pythons goes

    def test_results_never_have_the_name_of_a_folder_of_results(self, tmp_path: Path) -> None:
        for name in ("a.jpg", "a.png/x.jpg", "b.jpg", "b.npz/x.jpg"):
            touch(tmp_path / name)
        assert set(keys(tmp_path).values()) == {
            "a.jpg",
            "b.jpg",
            os.path.join("a.png", "x"),
            os.path.join("b.npz", "x"),
        }

    def test_an_empty_name_is_not_the_current_folder(self) -> None:
        assert [type(found) for found in find_images([""])] == [Problem]

    def test_is_a_stream(self, tmp_path: Path) -> None:
        touch(tmp_path / "a/x.jpg")
        touch(tmp_path / "b/y.jpg")
        stream = find_images([tmp_path])
        assert next(stream) == ImageItem(str(tmp_path / "a/x.jpg"), os.path.join("a", "x"))
        # The second folder has not been read yet.
        touch(tmp_path / "b/late.jpg")
        assert [f.key for f in stream if isinstance(f, ImageItem)] == ["b/late", "b/y"]


class TestReadImage:
    @pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
    @pytest.mark.parametrize("suffix", [".png", ".tif"])
    def test_every_mode_becomes_rgb(self, tmp_path: Path, mode: str, suffix: str) -> None:
        if mode == "CMYK" and suffix == ".png":
            pytest.skip("PNG holds no CMYK")
        gradient(mode).save(tmp_path / f"x{suffix}")
        image = read_image(tmp_path / f"x{suffix}")
        assert (image.mode, image.size) == ("RGB", (40, 30))
        assert np.array_equal(np.asarray(image), np.asarray(gradient(mode).convert("RGB")))

    def test_16_bit_grey_is_scaled_not_clipped(self, tmp_path: Path) -> None:
        values = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
        Image.fromarray(values).save(tmp_path / "x.png")
        read = np.asarray(read_image(tmp_path / "x.png"))[..., 0]
        assert np.abs(read.astype(float) - values / 257).max() <= 1

    def test_float_pixels(self, tmp_path: Path) -> None:
        values = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
        Image.fromarray(values).save(tmp_path / "x.tif")
        assert np.asarray(read_image(tmp_path / "x.tif")).max() == 255
        Image.fromarray(values - 2).save(tmp_path / "y.tif")
        with pytest.raises(ImageError, match=r"\[-2, -1\]"):
            read_image(tmp_path / "y.tif")

    def test_transparency_is_laid_over_white(self, tmp_path: Path) -> None:
        image = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
        image.putpixel((0, 0), (255, 0, 0, 255))
        image.save(tmp_path / "x.png")
        read = read_image(tmp_path / "x.png")
        assert read.getpixel((0, 0)) == (255, 0, 0)
        assert read.getpixel((5, 5)) == (255, 255, 255)

    def test_transparent_colour_of_rgb(self, tmp_path: Path) -> None:
        Image.new("RGB", (8, 8), (1, 2, 3)).save(tmp_path / "x.png", transparency=(1, 2, 3))
        assert read_image(tmp_path / "x.png").getpixel((5, 5)) == (255, 255, 255)

    def test_exif_orientation(self, tmp_path: Path) -> None:
        upright = gradient()
        exif = Image.Exif()
        exif[0x0112] = 6  # the camera was turned: show it rotated by 90 degrees clockwise
        upright.rotate(90, expand=True).save(tmp_path / "x.png", exif=exif)
        assert np.array_equal(np.asarray(read_image(tmp_path / "x.png")), np.asarray(upright))

    def test_broken_files(self, tmp_path: Path) -> None:
        gradient(size=(300, 200)).save(tmp_path / "whole.jpg")
        gradient(size=(300, 200)).save(tmp_path / "whole.png")
        for suffix in (".jpg", ".png"):
            data = (tmp_path / f"whole{suffix}").read_bytes()
            (tmp_path / f"cut{suffix}").write_bytes(data[: len(data) // 2])
            with pytest.raises(ImageError, match="broken image"):
                read_image(tmp_path / f"cut{suffix}")
        (tmp_path / "text.jpg").write_text("not an image")
        with pytest.raises(ImageError, match="not an image"):
            read_image(tmp_path / "text.jpg")
        with pytest.raises(ImageError, match="empty"):
            read_image(touch(tmp_path / "empty.jpg"))
        with pytest.raises(ImageError, match="no such file"):
            read_image(tmp_path / "none.jpg")
        with pytest.raises(ImageError, match="directory"):
            read_image(tmp_path)

    def test_too_large_and_too_long(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        gradient(size=(100, 100)).save(tmp_path / "large.png")
        gradient(size=(600, 10)).save(tmp_path / "long.png")
        with pytest.raises(ImageError, match="elongated"):
            read_image(tmp_path / "long.png")
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)
        with pytest.raises(ImageError, match="too large"):
            read_image(tmp_path / "large.png")

    @pytest.mark.parametrize(
        ("start", "name"),
        [(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "PostScript"), (b"8BPS\0\1", "Photoshop")],
    )
    def test_other_formats_are_named_and_not_opened(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: bytes, name: str
    ) -> None:
        monkeypatch.setattr("subprocess.Popen", lambda *a, **k: pytest.fail("started a program"))
        (tmp_path / "cat.jpg").write_bytes(start + b"showpage\n" * 20)
        with pytest.raises(ImageError, match=f"{name}.*not opened; convert it"):
            read_image(tmp_path / "cat.jpg")

    def test_what_is_no_file_is_not_waited_for(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe.jpg")
        with pytest.raises(ImageError, match="a named pipe, not a file"):
            read_image(tmp_path / "pipe.jpg")
        with pytest.raises(ImageError, match="a device, not a file"):
            read_image("/dev/zero")

    @pytest.mark.parametrize("after", [True, False])
    def test_metadata_is_limited(self, tmp_path: Path, after: bool) -> None:
        info = PngImagePlugin.PngInfo()
        info.add(b"teSt", bytes(MAX_METADATA_BYTES + 1), after_idat=after)
        gradient().save(tmp_path / "x.png", pnginfo=info)
        with pytest.raises(ImageError, match="too much metadata"):
            read_image(tmp_path / "x.png")
        gradient().save(tmp_path / "x.gif", comment=bytes(2**21))
        with pytest.raises(ImageError, match="too much metadata"):
            read_image(tmp_path / "x.gif")

    def test_memory_is_limited(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        gradient("RGBA", (100, 100)).save(tmp_path / "x.webp")
        gradient("RGBA", (100, 100)).save(tmp_path / "x.png")
        monkeypatch.setattr(images, "MAX_DECODED_BYTES", 100 * 100 * 10)
        assert read_image(tmp_path / "x.png").size == (100, 100)
        with pytest.raises(ImageError, match=r"100 x 100 pixels.*WEBP.*scale it down"):
            read_image(tmp_path / "x.webp")

    @pytest.mark.parametrize(
        "head", [b"P3 %d %d 255 ", b"P2 %d %d 255 ", b"P1 %d %d ", b"P6 %d %d 65535 ", b"P5 %d %d 9 "]
    )
    def test_what_is_decoded_in_python_is_small(self, tmp_path: Path, head: bytes) -> None:
        pixels = b"1 " * 12 if head[1:2] in b"123" else b"\1" * 24
        (tmp_path / "x.ppm").write_bytes(head % (2, 2) + pixels)
        assert read_image(tmp_path / "x.ppm").size == (2, 2)
        (tmp_path / "x.ppm").write_bytes(head % (1001, 1000) + pixels)
        with pytest.raises(ImageError, match=r"too slow to decode: 1001 x 1000 pixels.*1 million"):
            read_image(tmp_path / "x.ppm")
        Image.new("RGB", (1001, 1000)).save(tmp_path / "x.ppm")
        assert read_image(tmp_path / "x.ppm").size == (1001, 1000)

    @pytest.mark.parametrize("where", ["between the pixels", "in front"])
    def test_comments_of_text_images(self, tmp_path: Path, where: str) -> None:
        """Every comment makes Pillow copy a megabyte, and it reads those in front byte by byte."""
        path = tmp_path / "x.ppm"
        head, pixels = b"P2 %s 2 2 255\n", b"#\n0 %s\n64 128 255\n"
        many = b"#\n" * 2_000_000
        path.write_bytes(head % b"# a comment\n" + pixels % b"# another\n")
        assert np.asarray(read_image(path).convert("L")).tolist() == [[0, 64], [128, 255]]
        written = (head % b"") + (pixels % many) if where == "between the pixels" else (head % many) + (pixels % b"")
        path.write_bytes(written)
        started = time.monotonic()
        with pytest.raises(ImageError, match=r"too slow to decode: it has more than|too much metadata"):
            read_image(path)
        assert time.monotonic() - started < 5  # Pillow takes minutes

    @pytest.mark.slow
    @pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is measured on Linux")
    @pytest.mark.parametrize(
        ("name", "mode", "millions", "options"),
        [
            ("x.jpg", "RGB", 45.9, {"quality": 60}),
            ("progressive.jpg", "CMYK", 30.6, {"progressive": True, "quality": 60}),
            ("x.png", "RGBA", 45.9, {"compress_level": 1}),
            ("x.tif", "RGBA", 22.9, {"compression": "tiff_deflate", "strip_size": 2**30}),
            ("x.webp", "RGB", 20, {"method": 0}),
            ("x.jp2", "RGBA", 13, {}),
        ],
    )
    def test_the_largest_images_take_less_than_400_mb(
        self, tmp_path: Path, name: str, mode: str, millions: float, options: dict[str, object]
    ) -> None:
        turned = Image.Exif()
        turned[0x112] = 6
        size = 6000, int(millions * 1e6 / 6000)
        noise = Image.effect_noise((1500, 1500), 50).resize(size).convert(mode)
        noise.save(tmp_path / name, **({"exif": turned} if name.endswith((".jpg", ".png")) else {}), **options)
        noise.crop((0, 0, 60, 60)).save(tmp_path / f"small_{name}", **options)
        code = (
            "import sys; from ramp_fast.data import read_image\n"
            "def now(key):\n"
            "    return int(open('/proc/self/status').read().split(key + ':')[1].split()[0])\n"
            "read_image(sys.argv[2]); open('/proc/self/clear_refs', 'w').write('5'); before = now('VmRSS')\n"
            "read_image(sys.argv[1]); print(now('VmHWM') - before)"
        )
        run = [sys.executable, "-c", code, str(tmp_path / name), str(tmp_path / f"small_{name}")]
        kilobytes = int(subprocess.run(run, capture_output=True, check=True, cwd=tmp_path).stdout)
        assert kilobytes < 400_000

    def test_strips_change_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        rng = np.random.default_rng(0)
        Image.fromarray(rng.integers(0, 256, (50, 40, 4), dtype=np.uint8)).save(tmp_path / "a.png")
        Image.fromarray(rng.integers(0, 65536, (50, 40), dtype=np.uint16)).save(tmp_path / "b.png")
        whole = [np.asarray(read_image(tmp_path / name)) for name in ("a.png", "b.png")]
        monkeypatch.setattr(images, "_STRIP_PIXELS", 120)
        for name, expected in zip(("a.png", "b.png"), whole, strict=True):
            np.testing.assert_array_equal(np.asarray(read_image(tmp_path / name)), expected)

    def test_own_pictures_are_told_apart(self, tmp_path: Path) -> None:
        info = PngImagePlugin.PngInfo()
        info.add_text("Software", "ramp_fast")
        gradient().save(tmp_path / "x.png", pnginfo=info)
        with pytest.raises(OwnPictureError):
            read_image(tmp_path / "x.png")


CONFIG: dict[str, object] = {
    "input_size": (3, 64, 48),
    "mean": (0.1, 0.2, 0.3),
    "std": (0.5, 0.6, 0.7),
    "interpolation": "bicubic",
    "crop_pct": 1.0,
    "crop_mode": "center",
}


class TestPreprocessing:
    def test_shape_values_and_way_back(self) -> None:
        preprocess = Preprocessing(CONFIG)
        image = Image.new("RGB", (100, 100), (10, 128, 250))
        x = preprocess(image)
        assert x.shape == (3, 64, 48)
        expected = (torch.tensor([10, 128, 250]) / 255 - torch.tensor([0.1, 0.2, 0.3])) / torch.tensor([0.5, 0.6, 0.7])
        torch.testing.assert_close(x[:, 5, 5], expected)
        shown = preprocess.to_display(x)
        assert shown.dtype == np.uint8
        assert (shown == [10, 128, 250]).all()

    def test_display_keeps_rows_and_columns(self) -> None:
        preprocess = Preprocessing({**CONFIG, "input_size": (3, 30, 40)})
        shown = preprocess.to_display(preprocess(gradient()))
        assert np.abs(shown.astype(int) - np.asarray(gradient()).astype(int)).max() <= 1

    def test_equals_timm_s_own_evaluation(self) -> None:
        model = timm.create_model("test_vit")
        preprocess = Preprocessing.of_model(model)
        transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
        torch.testing.assert_close(preprocess(gradient()), transform(gradient()), rtol=0, atol=0)

    def test_overrides(self) -> None:
        model = timm.create_model("test_vit")
        preprocess = Preprocessing.of_model(model, mean=(0, 0, 0), std=(1, 1, 1), crop_pct=None)
        assert preprocess.settings()["mean"] == [0, 0, 0]
        assert preprocess.settings()["crop_pct"] == Preprocessing.of_model(model).settings()["crop_pct"]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"input_size": (1, 64, 64)}, "1 input channels"),
            ({"std": (0.5, 0.0, 0.5)}, "standard deviations"),
            ({"crop_pct": 0.0}, "crop"),
            ({"crop_pct": float("nan")}, "crop"),
            ({"crop_pct": True}, "crop"),
            ({"mean": (float("nan"), 0.0, 0.0)}, "means"),
            ({"mean": (123.7, 116.3, 103.5)}, "means"),
            ({"std": (0.5, float("inf"), 0.5)}, "standard deviations"),
            ({"std": (0.5, 0.5)}, "standard deviations"),
            ({"input_size": (3, True, 64)}, "input_size"),
            ({"input_size": (3, 64, float("nan"))}, "input_size"),
        ],
    )
    def test_refusals(self, change: dict[str, object], message: str) -> None:
        with pytest.raises(InputError, match=message):
            Preprocessing({**CONFIG, **change})


class TestClassNames:
    @pytest.mark.parametrize(
        ("count", "index", "name"),
        [
            (1000, 281, "tabby, tabby cat"),
            (21841, 0, "organism, being"),
            (21842, 281, "tabby, tabby cat"),
            (21843, 21842, "knothole"),
            (11221, 0, "benthos"),
            (11821, 11820, "knothole"),
        ],
    )
    def test_imagenet_variants(self, count: int, index: int, name: str) -> None:
        names = ClassNames.imagenet(count)
        assert names.known
        assert names[index] == name
        assert len(names.all()) == count

    def test_unknown_variant(self) -> None:
        names = ClassNames.imagenet(37)
        assert not names.known
        assert names[36] == "class 36"
        with pytest.raises(IndexError):
            names[37]

    def test_from_file(self, tmp_path: Path) -> None:
        file = tmp_path / "names.txt"
        file.write_text("cat\ndog\n\n", encoding="utf-8")
        assert ClassNames.from_file(file, 2).all() == ["cat", "dog"]
        with pytest.raises(InputError, match="2 class names for a model with 3"):
            ClassNames.from_file(file, 3)
        with pytest.raises(InputError, match="cannot read"):
            ClassNames.from_file(tmp_path / "none.txt", 2)

    @pytest.mark.parametrize(
        ("content", "names"),
        [
            (b"\xef\xbb\xbfcat\r\ndog\r\n", ["cat", "dog"]),
            (b"cat\rdog\r\r", ["cat", "dog"]),
            ("one\u2028line\ndog".encode(), ["one\u2028line", "dog"]),
            (b"\ndog\n", ["class 0", "dog"]),
        ],
        ids=["byte order mark", "old Macintosh", "line separator in a name", "no name"],
    )
    def test_as_editors_save_them(self, tmp_path: Path, content: bytes, names: list[str]) -> None:
        (tmp_path / "names.txt").write_bytes(content)
        assert ClassNames.from_file(tmp_path / "names.txt", 2).all() == names

    def test_what_is_no_list_of_names(self, tmp_path: Path) -> None:
        (tmp_path / "long.txt").write_text("cat\n" + "x" * 2000)
        (tmp_path / "wide.txt").write_text("cat\ndog", encoding="utf-16")
        os.mkfifo(tmp_path / "pipe.txt")
        for name, problem in (("long", "line 2 has more than"), ("wide", "not UTF-8"), ("pipe", "named pipe")):
            with pytest.raises(InputError, match=problem):
                ClassNames.from_file(tmp_path / f"{name}.txt", 2)
        with pytest.raises(InputError, match="count must be"):
            ClassNames(True, ["cat"])


class TestDemo:
    def test_photographs_are_small_readable_and_licensed(self) -> None:
        photographs = demo_photographs()
        assert [p.name for p in photographs] == ["cat.jpg", "coffee.jpg", "rocket.jpg", "tripod.jpg"]
        licences = (photographs[0].parent / "LICENSES.md").read_text(encoding="utf-8")
        for photograph in photographs:
            assert photograph.stat().st_size <= 60_000
            assert min(read_image(photograph).size) == 320
            assert photograph.name in licences

    def test_unknown_weights_are_refused(self) -> None:
        with pytest.raises(RampFastError, match=r"_blocks\.16"):
            demo_state_dict({"_blocks.16._bn1.weight": torch.zeros(1)})
        with pytest.raises(RampFastError, match="_head"):
            demo_state_dict({"_head.weight": torch.zeros(1)})
