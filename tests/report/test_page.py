"""The page of a report in Chromium, from the disk and from a web server."""

from __future__ import annotations

import functools
import http.server
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import numpy as np
import pytest
from synthetic_store import NASTY, write_store

from ramp_fast.report import write_report
from ramp_fast.results import open_maps

playwright = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")

COUNT = 130
PER_PAGE = 48


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    names = [*NASTY, *(f"folder/image {k}" for k in range(len(NASTY), COUNT))]
    store = write_store(folder / "a <b>store", COUNT, targets=("predicted", "label"), names=names, failed=[7])
    write_report(open_maps(store), folder / "report", no_photographs="No <i>photographs</i> here.")
    return folder / "report"


class Page:
    """A page, what it complained of, and which files it took."""

    def __init__(self, browser: Any, **options: Any) -> None:
        self.context = browser.new_context(viewport={"width": 1280, "height": 860}, **options)
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.files: list[Path] = []
        self.urls: list[str] = []
        self.under_way: set[Any] = set()
        self.page.on("console", lambda m: self.complaints.append(m.text) if m.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.complaints.append("a dialog"), dialog.dismiss()))
        self.page.on("request", self._asked)
        for event in ("requestfinished", "requestfailed"):
            self.page.on(event, lambda request: self.under_way.discard(request))

    def _asked(self, request: Any) -> None:
        self.urls.append(request.url)
        self.under_way.add(request)
        if request.url.startswith("file:"):
            self.files.append(Path(unquote(urlparse(request.url).path)))

    def open(self, report: Path, view: str = "overview") -> Page:
        self.page.goto(f"{report.as_uri()}/index.html#{view}")
        playwright.expect(self.page.locator(f"#view-{view}")).to_be_visible()
        if view in ("gallery", "sample"):
            self.named()
        return self

    def settle(self) -> None:
        """Wait until nothing is being loaded."""
        while True:
            self.page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
            if not self.under_way:
                return

    def named(self) -> None:
        """Wait until cells have their names."""
        cells = self.page.locator("section:not([hidden]) .cell .name")
        playwright.expect(cells).not_to_have_count(0)
        playwright.expect(cells.filter(has_text=re.compile("^…$"))).to_have_count(0)

    def names(self) -> list[str]:
        self.named()
        return list(self.page.locator("#cells .cell .name").all_inner_texts())

    def count(self, expected: str) -> None:
        playwright.expect(self.page.locator("#gallery-count")).to_have_text(expected)

    def has_focus(self, name: str) -> None:
        """Wait until the cell of this image has the focus."""
        playwright.expect(self.page.locator(":focus .name")).to_have_text(name)

    def open_image(self, place: int) -> Any:
        """Open the image of a cell, and wait for its dialog: what it shows is read from a file."""
        self.page.locator("#cells .cell").nth(place).click()
        dialog = self.page.locator("#image")
        playwright.expect(dialog).to_be_visible()
        return dialog


@pytest.fixture
def opened(browser: Any, report: Path) -> Iterator[Callable[..., Page]]:
    pages: list[Page] = []

    def open_page(view: str = "overview", folder: Path = report, **options: Any) -> Page:
        pages.append(Page(browser, **options))
        return pages[-1].open(folder, view)

    yield open_page
    for page in pages:
        page.context.close()
        assert page.complaints == []


@pytest.fixture(scope="module")
def numbers(report: Path) -> dict[str, np.ndarray]:
    maps = open_maps(report.parent / "a <b>store")
    done = np.flatnonzero(maps.done)
    logits = maps.array("logits")[done].astype(float)
    powers = np.exp(logits)
    probability = powers / powers.sum(1, keepdims=True)
    label = maps.array("label")[done]
    return {
        "name": np.array(maps.names)[done],
        "label": label,
        "predicted": logits.argmax(1),
        "confidence": probability.max(1),
        "error": 1 - probability[np.arange(len(done)), label],
    }


class TestViews:
    def test_overview(self, opened: Callable[..., Page], report: Path, numbers: dict[str, np.ndarray]) -> None:
        page = opened()
        text = page.page.locator("#view-overview").inner_text()
        right = int((numbers["label"] == numbers["predicted"]).sum())
        assert f"{right} of {COUNT - 1}" in text
        assert f"{100 * right / (COUNT - 1):.1f} %" in text
        assert f"of {COUNT}" in text
        assert "broken <b>image</b> 7" in text
        assert page.page.title() == "a <b>store – relevance maps"
        assert page.page.locator("#title").inner_text() == "a <b>store"
        assert page.page.locator("b, i, script:not([src])").count() == 0
        page.settle()
        assert all(path.is_relative_to(report) and path.is_file() for path in page.files)

    def test_classes(self, opened: Callable[..., Page]) -> None:
        page = opened("classes")
        rows = page.page.locator("#classes-table tbody th")
        assert rows.all_inner_texts() == [f"{name} ({k})" for k, name in enumerate([*NASTY, "class 4", "class 5"])]
        heads = page.page.locator("#classes-table thead th")
        page.page.get_by_role("button", name="Images").click()
        assert heads.nth(2).get_attribute("aria-sort") == "descending"
        assert heads.nth(1).get_attribute("aria-sort") == "none"
        assert rows.first.inner_text() == f"{NASTY[0]} (0)"  # 22 images, of class 1 one failed
        page.page.get_by_role("button", name="Images").click()
        assert rows.first.inner_text() == f"{NASTY[1]} (1)"
        page.page.get_by_label("Search").fill("SCRIPT>")
        assert rows.count() == 2
        rows.first.get_by_role("button").click()
        page.count("21 of 129 images")
        assert page.page.locator("#class").input_value() == "1"
        assert page.page.url.endswith("#gallery")

    def test_sample(self, opened: Callable[..., Page]) -> None:
        page = opened("sample")
        cells = page.page.locator("#sample-cells .cell")
        first = cells.all_inner_texts()
        assert len({*first}) == 12
        page.page.get_by_role("button", name="Next sample").click()
        page.named()
        assert cells.all_inner_texts() != first
        page.page.get_by_label("Number of the sample").fill("0")
        page.named()
        assert cells.all_inner_texts() == first
        page.page.get_by_label("Hide the classes").check()
        page.named()
        assert all("correct" not in text and "%" not in text for text in cells.all_inner_texts())


class TestGallery:
    def test_in_order(self, opened: Callable[..., Page], numbers: dict[str, np.ndarray]) -> None:
        page = opened("gallery")
        page.count("129 of 129 images")
        assert page.names() == numbers["name"][:PER_PAGE].tolist()
        assert page.page.locator("#gallery-note").inner_text() == (
            "All 129 images that have a map. No <i>photographs</i> here."
        )
        page.page.get_by_role("button", name="Next page").click()
        page.page.get_by_role("button", name="Next page").click()
        assert page.names() == numbers["name"][2 * PER_PAGE :].tolist()
        assert page.page.get_by_role("button", name="Next page").is_disabled()

    @pytest.mark.parametrize("sort", ["confidence", "error"])
    @pytest.mark.parametrize("up", [False, True])
    def test_sorting(self, opened: Callable[..., Page], numbers: dict[str, np.ndarray], sort: str, up: bool) -> None:
        page = opened("gallery")
        page.page.get_by_label("Sort by").select_option(sort)
        if up:
            page.page.locator("#order").select_option("up")
        values = dict(zip(numbers["name"], numbers[sort], strict=True))
        found = [values[name] for name in page.names()]
        expected = np.sort(numbers[sort])[:: 1 if up else -1][:PER_PAGE]
        np.testing.assert_allclose(found, expected, atol=1e-4)

    def test_sorting_by_entropy_shows_it(self, opened: Callable[..., Page]) -> None:
        page = opened("gallery")
        page.page.get_by_label("Sort by").select_option("entropy")
        texts = page.page.locator("#cells .cell").all_inner_texts()
        found = [float(text.split("entropy ")[1].split("\n")[0]) for text in texts]
        assert found == sorted(found, reverse=True)
        assert page.page.get_by_label("Sort by").locator("option").all_inner_texts() == [
            "order of the data set",
            "confidence",
            "error",
            "entropy of the map",
            "chance",
        ]

    def test_filters(self, opened: Callable[..., Page], numbers: dict[str, np.ndarray]) -> None:
        page = opened("gallery")
        label, predicted = numbers["label"], numbers["predicted"]
        field = page.page.get_by_label("Class", exact=True)
        which = page.page.get_by_label("which is")
        for wanted, of_class in (("4", label == 4), (NASTY[0], label == 0), ("SCRIPT>", np.isin(label, (1, 3)))):
            classes = np.unique(label[of_class])
            field.fill(wanted)
            which.select_option("label")
            page.count(f"{of_class.sum()} of 129 images")
            assert page.names() == numbers["name"][of_class][:PER_PAGE].tolist()
            which.select_option("predicted")
            page.count(f"{np.isin(predicted, classes).sum()} of 129 images")
            which.select_option("either")
            page.count(f"{(of_class | np.isin(predicted, classes)).sum()} of 129 images")
        page.page.get_by_label("Show").select_option("wrong")
        page.count(
            f"{((label != predicted) & (np.isin(label, (1, 3)) | np.isin(predicted, (1, 3)))).sum()} of 129 images"
        )
        page.page.get_by_role("button", name="Clear").click()
        page.count("129 of 129 images")
        page.page.get_by_label("Show").select_option("right")
        page.count(f"{(label == predicted).sum()} of 129 images")

    @pytest.mark.parametrize("name", NASTY)
    def test_names_are_text(self, opened: Callable[..., Page], name: str) -> None:
        page = opened("gallery")
        page.page.get_by_label("Image name").fill(name)
        page.count("1 of 129 images")
        assert page.names() == [name]
        page.open_image(0)
        playwright.expect(page.page.locator("#image-name")).to_have_text(name)
        assert page.page.locator("img, script:not([src]), b").count() == 0

    def test_nothing_found(self, opened: Callable[..., Page]) -> None:
        page = opened("gallery")
        page.page.get_by_label("Image name").fill("none such")
        page.count("No image is like that.")
        assert page.page.locator("#cells .cell").count() == 0


class TestKeyboard:
    def test_all_of_it(self, opened: Callable[..., Page], numbers: dict[str, np.ndarray]) -> None:
        page = opened()
        press, names = page.page.keyboard.press, numbers["name"]
        press("3")
        page.named()
        press("/")
        playwright.expect(page.page.locator("#class")).to_be_focused()
        press("1")  # a number within a field changes no view
        assert page.page.url.endswith("#gallery")
        press("Backspace")
        page.count("129 of 129 images")
        for _ in range(40):
            press("Tab")
            if page.page.locator(":focus .name").count():
                break
        page.has_focus(names[0])
        outline = page.page.evaluate(
            "(style => style.outlineStyle + ' ' + style.outlineWidth)(getComputedStyle(document.activeElement))"
        )
        assert outline == "solid 3px"
        across = page.page.evaluate(
            "(all => all.filter(e => e.offsetTop === all[0].offsetTop).length)([...document.querySelectorAll('.cell')])"
        )
        assert across > 3
        place = 0
        for key, by in (("ArrowRight", 1), ("ArrowDown", across), ("ArrowLeft", -1), ("ArrowUp", -across)):
            press(key)
            place += by
            page.has_focus(names[place])
        press("ArrowLeft")
        page.has_focus(names[0])
        press("End")
        page.has_focus(names[PER_PAGE - 1])
        press("ArrowRight")
        page.named()
        page.has_focus(names[PER_PAGE])
        press("PageDown")
        page.named()
        page.has_focus(names[2 * PER_PAGE])
        press("PageUp")
        press("Home")
        press("ArrowUp")
        page.named()
        page.has_focus(names[PER_PAGE - across])

    def test_one_image(self, opened: Callable[..., Page], numbers: dict[str, np.ndarray]) -> None:
        page = opened("gallery")
        press, name = page.page.keyboard.press, page.page.locator("#image-name")
        names = numbers["name"]
        page.page.locator("#cells .cell").nth(PER_PAGE - 1).focus()
        press("Enter")
        playwright.expect(name).to_have_text(names[PER_PAGE - 1])
        playwright.expect(page.page.locator("#image")).to_be_visible()
        assert page.page.locator("#image-place").inner_text() == f"{PER_PAGE} of 129"
        press("ArrowRight")
        playwright.expect(name).to_have_text(names[PER_PAGE])
        press("ArrowLeft")
        press("ArrowLeft")
        playwright.expect(name).to_have_text(names[PER_PAGE - 2])
        press("ArrowRight")
        press("ArrowRight")
        playwright.expect(name).to_have_text(names[PER_PAGE])
        press("Escape")
        playwright.expect(page.page.locator("#image")).to_be_hidden()
        page.named()
        page.has_focus(names[PER_PAGE])  # also on the page that it is on

    def test_what_an_image_shows(
        self, opened: Callable[..., Page], report: Path, numbers: dict[str, np.ndarray]
    ) -> None:
        page = opened("gallery")
        maps = open_maps(report.parent / "a <b>store")
        wrong = int(np.flatnonzero(numbers["label"] != numbers["predicted"])[0])
        dialog = page.open_image(wrong)
        one = maps[str(numbers["name"][wrong])]
        kinds = maps.plan.classes
        assert dialog.locator("#image-verdict").inner_text() == (
            f"Predicted {kinds[numbers['predicted'][wrong]]} ({100 * numbers['confidence'][wrong]:.1f} %), ✗ wrong: "
            f"it is {kinds[numbers['label'][wrong]]}"
        )
        top = np.argsort(-one.logits, kind="stable")[:5]
        found = dialog.locator("#image-top tbody th").all_inner_texts()
        assert [text.split(" (true")[0].split(" (explained")[0] for text in found] == [kinds[k] for k in top]
        assert dialog.locator("figcaption").all_inner_texts() == [
            f"Map of the predicted class: {kinds[one.target[0]]}",
            f"Map of the true class: {kinds[one.target[1]]}",
        ]
        assert dialog.locator("#image-note").inner_text() == "No <i>photographs</i> here."
        assert dialog.get_by_role("slider").count() == 0
        page.settle()
        assert {path.name for path in page.files} >= {f"report-maps-large-{k}-000.jpg" for k in (0, 1)}


def test_photographs_below_maps(browser: Any, opened: Callable[..., Page], tmp_path: Path) -> None:
    from test_report import plan_with_photographs

    from ramp_fast import cli

    store = plan_with_photographs(tmp_path)
    assert cli.main(["report", str(store), "--out", str(tmp_path / "report")]) == 0
    page = opened("gallery", tmp_path / "report")
    first = page.page.locator("#cells .cell .stack").first
    assert first.locator("span").evaluate_all("all => all.map(e => e.className.split(' ')[0])") == ["photo", "map"]
    page.page.get_by_label("Picture").select_option("photograph")
    assert first.locator("span").evaluate_all("all => all.map(e => e.className.split(' ')[0])") == ["photo"]
    page.open_image(0)
    slider = page.page.locator("#image").get_by_role("slider")
    seen = "e => [...e.querySelectorAll('span')].map(s => getComputedStyle(s).opacity)"
    overlay = page.page.locator("#image figure .stack").nth(1)
    for value, expected in ((0, ["1", "0"]), (50, ["1", "1"]), (100, ["0", "1"])):
        slider.fill(str(value))
        assert overlay.evaluate(seen) == expected
    slider.focus()
    page.page.keyboard.press("ArrowLeft")  # moves the slider, not to another image
    assert slider.input_value() == "95"
    page.page.locator("#close").focus()
    page.page.keyboard.press("-")
    assert slider.input_value() == "85"
    assert overlay.locator(".photo").evaluate("e => getComputedStyle(e).filter") == "grayscale(1)"
    page.page.get_by_label("in colour").check()
    assert overlay.locator(".photo").evaluate("e => getComputedStyle(e).filter") == "none"


CONTRASTS = """() => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  const luminance = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
  const ground = (element) => {
    for (let behind = element; behind; behind = behind.parentElement) {
      const colour = parse(getComputedStyle(behind).backgroundColor);
      if (colour.length === 3 || colour[3] > 0) return colour;
    }
  };
  const result = [];
  for (const element of document.querySelectorAll("body *")) {
    const hasText = [...element.childNodes].some((node) => node.nodeType === Node.TEXT_NODE && node.textContent.trim());
    if (!hasText || !element.checkVisibility() || element.disabled) continue;
    const both = [parse(getComputedStyle(element).color), ground(element)].map(luminance);
    const [more, less] = both.sort((a, b) => b - a);
    result.push([`${element.tagName}.${element.className}`, (more + 0.05) / (less + 0.05)]);
  }
  return [parse(getComputedStyle(document.documentElement).backgroundColor)[0], result];
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(opened: Callable[..., Page], scheme: str) -> None:
    """Every text has 4.5 to 1 against what is behind it (WCAG 2.2, AA), every field's focus is seen."""
    page = opened("gallery", color_scheme=scheme)
    page.open_image(0)
    ground, contrasts = page.page.evaluate(CONTRASTS)
    assert (ground < 60) == (scheme == "dark")
    assert len(contrasts) > 100
    assert [(what, ratio) for what, ratio in contrasts if ratio < 4.5] == []


def test_controls_have_names(opened: Callable[..., Page]) -> None:
    page = opened("gallery")
    for view in ("overview", "classes", "sample", "gallery"):
        page.page.goto(page.page.url.split("#")[0] + f"#{view}")
        for role in ("button", "combobox", "searchbox", "spinbutton", "slider", "checkbox", "link"):
            for control in page.page.get_by_role(role).all():
                snapshot = control.aria_snapshot()
                assert '"' in snapshot or "'" in snapshot or ":" in snapshot, (view, role, snapshot)


def test_a_missing_file_is_said(browser: Any, report: Path, tmp_path: Path) -> None:
    shutil.copytree(report, tmp_path / "report")
    (tmp_path / "report" / "data" / "names-000.js").unlink()
    page = Page(browser)
    page.page.goto(f"{(tmp_path / 'report').as_uri()}/index.html#gallery")
    playwright.expect(page.page.get_by_role("alert")).to_have_text(
        "data/names-000.js cannot be read: the folder of the report is not whole"
    )
    page.context.close()


def test_from_a_web_server(browser: Any, report: Path) -> None:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(report)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        page = Page(browser)
        origin = f"http://127.0.0.1:{server.server_port}/"
        page.page.goto(f"{origin}#gallery")
        page.named()
        page.open_image(0)
        page.settle()
        assert page.complaints == []
        assert all(url.startswith((origin, "data:")) for url in page.urls)
        page.context.close()
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of 50,000 images, whose maps are small: that takes half a minute."""
    folder = tmp_path_factory.mktemp("large")
    names = [f"ILSVRC2012_val_{k:08d}" for k in range(50_000)]
    write_store(folder / "store", 50_000, (16, 16), 200, dtype="int8", names=names, shard_size=4096)
    write_report(open_maps(folder / "store"), folder / "report", images=50_000)
    return folder / "report"


@pytest.mark.slow
@pytest.mark.parametrize("view", ["overview", "gallery"])
def test_first_view_of_fifty_thousand(opened: Callable[..., Page], large: Path, view: str) -> None:
    opened()  # so that the browser has started
    started = time.perf_counter()
    page = opened(view, large)
    page.settle()
    seconds = time.perf_counter() - started
    size = sum(path.stat().st_size for path in page.files)
    assert seconds < 2
    assert size < 2_000_000
    assert len(page.files) < 20


@pytest.mark.slow
def test_searching_fifty_thousand(opened: Callable[..., Page], large: Path) -> None:
    page = opened("gallery", large)
    page.page.get_by_label("Image name").fill("_0004321")
    page.count("10 of 50,000 images")
    page.page.get_by_role("button", name="Clear").click()
    page.page.get_by_label("Sort by").select_option("confidence")
    page.page.get_by_label("Show").select_option("wrong")
    page.count("16,666 of 50,000 images")
    page.page.get_by_role("spinbutton", name="Page").fill("200")
    page.page.get_by_role("spinbutton", name="Page").press("Enter")
    page.named()
    assert len(page.names()) == PER_PAGE


@pytest.mark.slow
def test_files_of_fifty_thousand(large: Path) -> None:
    assert len(list(large.rglob("*"))) < 5000
