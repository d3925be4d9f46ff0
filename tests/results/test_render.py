"""Pictures: signs, scale and geometry of what is drawn."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from ramp_fast.errors import InputError
from ramp_fast.results.render import MARGIN, blend, colourise, contact_sheet, overlay, scale_of


def test_red_is_positive_blue_is_negative_white_is_zero() -> None:
    red, white, blue = colourise(np.array([[1.0, 0.0, -1.0]]))[0].astype(int)
    assert red[0] > red[1] + 100
    assert red[0] > red[2] + 100
    assert blue[2] > blue[0] + 100
    assert (white == 255).all()


def test_symmetric_about_zero() -> None:
    # Half the strength of full blue however large the positive values: no separate scales for the signs.
    picture = colourise(np.array([[4.0, 2.0, -2.0, -4.0]]), scale=4.0)[0].astype(float)
    for full, half in ((0, 1), (3, 2)):
        np.testing.assert_allclose(255 - picture[half], (255 - picture[full]) / 2, atol=1)


def test_channels_are_summed() -> None:
    relevance = np.zeros((3, 4, 4))
    relevance[0, 1, 1], relevance[1, 1, 1] = 2.0, -2.0
    relevance[2, 2, 2] = 1.0
    picture = colourise(relevance)
    assert (picture[1, 1] == 255).all()
    assert (picture[2, 2] != 255).any()


def test_scale_is_robust_to_a_few_pixels() -> None:
    relevance = np.full((100, 100), 0.5)
    relevance[0, 0] = 1e6
    assert scale_of(relevance) == pytest.approx(0.5)


def test_scale_of_sparse_and_zero_maps() -> None:
    sparse = np.zeros((100, 100))
    sparse[3, 3] = -7.0
    assert scale_of(sparse) == 7.0
    assert scale_of(np.zeros((4, 4))) == 1.0
    assert (colourise(np.zeros((4, 4))) == 255).all()


def test_blend_shows_the_photograph_where_the_map_is_zero() -> None:
    photograph = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    relevance = np.zeros((8, 8))
    relevance[0, 0] = 1.0
    picture = blend(photograph, relevance)
    assert (picture[1:, :, 0] == picture[1:, :, 1]).all()  # grey
    grey = np.asarray(Image.fromarray(photograph).convert("L"), dtype=float)
    assert np.corrcoef(picture[1:, :, 0].ravel(), grey[1:].ravel())[0, 1] > 0.99
    assert tuple(picture[0, 0]) == (178, 10, 28)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(InputError, match="finite"):
        colourise(np.array([[1.0, bad]]))


@pytest.mark.parametrize("shape", [(4,), (1, 3, 4, 4), (3, 0, 4)])
def test_wrong_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="map is"):
        scale_of(np.zeros(shape))


def test_map_and_photograph_must_match() -> None:
    with pytest.raises(InputError, match="do not match"):
        blend(np.zeros((4, 5, 3), np.uint8), np.zeros((5, 4)))


def test_overlay_holds_the_crop_and_the_map_pixel_by_pixel() -> None:
    rng = np.random.default_rng(0)
    photograph = rng.integers(0, 256, (224, 224, 3), dtype=np.uint8)
    relevance = rng.normal(size=(3, 224, 224))
    picture = np.asarray(overlay(photograph, relevance, "tabby, tabby cat", 0.5))
    left = picture[MARGIN : MARGIN + 224, MARGIN : MARGIN + 224]
    right = picture[MARGIN : MARGIN + 224, 2 * MARGIN + 224 : 2 * MARGIN + 448]
    assert (left == photograph).all()
    assert (right == blend(photograph, relevance)).all()


def test_small_crops_are_enlarged_in_whole_pixels() -> None:
    photograph = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    picture = np.asarray(overlay(photograph, np.zeros((32, 32)), "x"))
    assert (picture[MARGIN : MARGIN + 224 : 7, MARGIN : MARGIN + 224 : 7] == photograph).all()


def test_caption_depends_on_the_text_and_fits() -> None:
    photograph, relevance = np.zeros((32, 32, 3), np.uint8), np.zeros((32, 32))
    captions = ["cat", "dog", "a very long name " * 20, "猫\n"]
    pictures = [np.asarray(overlay(photograph, relevance, c, 0.123)) for c in captions]
    assert len({p.shape for p in pictures}) == 1
    assert not (pictures[0] == pictures[1]).all()
    # The margin on the right stays empty: nothing runs over the edge.
    assert all((p[:, -MARGIN:] == 255).all() for p in pictures)
    assert not (pictures[0] == np.asarray(overlay(photograph, relevance, "cat", 0.456))).all()


@pytest.mark.parametrize("count", [1, 2, 5, 24])
def test_contact_sheet_shows_every_picture(count: int) -> None:
    colours = [(10 * i, 255 - 10 * i, 7 * i) for i in range(count)]
    sheet = contact_sheet([(f"{i}", Image.new("RGB", (400, 220), c)) for i, c in enumerate(colours)])
    pixels = np.asarray(sheet).reshape(-1, 3)
    for colour in colours:
        assert (pixels == colour).all(axis=1).sum() == 400 * 220


def test_contact_sheet_bounds_large_pictures_and_refuses_none() -> None:
    sheet = contact_sheet([("x", Image.new("RGB", (4000, 2000))), ("y", Image.new("L", (40, 20)))])
    assert sheet.width <= 1000
    with pytest.raises(InputError):
        contact_sheet([])


@pytest.mark.parametrize("caption", ["", "x" * 10**6, "\u0301" * 10**6, "a\nb\x00c", "日本語" * 1000])
def test_captions_of_any_length(caption: str) -> None:
    crop = np.zeros((8, 8, 3), np.uint8)
    assert overlay(crop, np.zeros((8, 8)), caption, 0.5).size == overlay(crop, np.zeros((8, 8)), "cat", 0.5).size
    assert contact_sheet([(caption, Image.new("RGB", (50, 50)))]).width < 100


@pytest.mark.parametrize(
    "call",
    [
        lambda: scale_of(np.ones((2, 2)), float("nan")),
        lambda: scale_of(np.ones((2, 2)), 0),
        lambda: colourise(np.ones((2, 2)), scale=0),
        lambda: colourise(np.ones((2, 2)), scale=float("inf")),
        lambda: blend(np.zeros((2, 2, 3), np.uint8), np.ones((2, 2)), backdrop=float("nan")),
        lambda: overlay(np.zeros((2, 2, 3), np.uint8), np.ones((2, 2)), "cat", float("nan")),
        lambda: contact_sheet([("a", Image.new("RGB", (2, 2)))], columns=True),
    ],
)
def test_numbers_that_are_none(call: Callable[[], object]) -> None:
    with pytest.raises(InputError):
        call()
