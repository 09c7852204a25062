"""A page in Chromium: quiet, alone, readable without its script and sorted with it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="needs Chromium: the package chromium, or its path in CHROMIUM"
)
QUIET = (
    "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=list(QUIET))
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser: Any) -> Iterator[Callable[..., Any]]:
    """Return a function that opens a page; what it said or asked for fails the test."""
    said: list[str] = []
    contexts = []

    def open_page(path: Path, **options: Any) -> Any:
        context = browser.new_context(**{"viewport": {"width": 1200, "height": 900}, **options})
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        address = path.as_uri()

        def only_itself(route: Any) -> None:
            if route.request.url == address:
                route.continue_()
            else:
                said.append(route.request.url)
                route.abort()

        page.route("**/*", only_itself)
        page.goto(address)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert said == []


def column(page: Any, table: str, number: int) -> list[str]:
    found: list[str] = page.locator(
        f"#{table} tbody tr:visible td:nth-child({number})"
    ).all_inner_texts()
    return found


def test_without_its_script(opened: Callable[..., Any], good_page: Any, bad_page: Any) -> None:
    """All tables are there with all rows, and nothing that does nothing."""
    for path, content in (good_page, bad_page):
        page = opened(path, java_script_enabled=False)
        assert page.locator("h1").inner_text() == "tone"
        assert len(column(page, "checks", 1)) == len(content.outcomes)
        assert column(page, "layers", 2) == [layer.layer for layer in content.layers]
        assert len(column(page, "tensors", 1)) == len(content.parity.tensors)
        assert page.locator("button, input").count() == 0
        assert page.locator("svg[role=img] desc").count() >= 5


def test_a_pack(opened: Callable[..., Any], pack_page: Any) -> None:
    """Each task, switched to and folded, and no two things of one id."""
    path, content = pack_page
    page = opened(path)
    assert page.locator("h1").inner_text() == "tone, score"
    assert column(page, "tensors", 1) == [what for what, _ in content.compared]
    assert len(column(page, "checks", 1)) == len(content.outcomes)
    ids = page.eval_on_selector_all("[id]", "all => all.map((one) => one.id)")
    assert len(ids) == len(set(ids))
    page.get_by_label("Show rows with").first.fill("score, folded")
    shown = column(page, "checks", 2)
    assert shown
    assert all(which.startswith("score, folded") for which in shown)


def test_sorting(opened: Callable[..., Any], bad_page: Any) -> None:
    path, content = bad_page
    page = opened(path)
    before = column(page, "layers", 2)
    ratios = sorted(layer.ratio for layer in content.layers)
    head = page.locator("#layers th", has_text="error / bound")
    head.get_by_role("button").click()
    assert head.get_attribute("aria-sort") == "ascending"
    assert [float(text) for text in column(page, "layers", 7)] == [
        float(f"{r:.2g}") for r in ratios
    ]
    head.get_by_role("button").click()
    assert head.get_attribute("aria-sort") == "descending"
    assert float(column(page, "layers", 7)[0]) == float(f"{ratios[-1]:.2g}")
    page.locator("#layers th").first.get_by_role("button").press("Enter")
    assert column(page, "layers", 2) == before
    assert head.get_attribute("aria-sort") is None


def test_filter(opened: Callable[..., Any], bad_page: Any) -> None:
    page = opened(bad_page[0])
    page.get_by_label("Show rows with").first.fill("FAILED")
    assert len(column(page, "checks", 1)) == len(bad_page[1].failed)
    page.get_by_label("Show rows with").first.fill("")
    assert len(column(page, "checks", 1)) == len(bad_page[1].outcomes)


def test_a_bar_points_to_its_row(opened: Callable[..., Any], bad_page: Any) -> None:
    page = opened(bad_page[0])
    layer = bad_page[1].divergence.layer.layer
    page.locator(f'svg [data-key="{layer}"]').hover()
    assert page.locator("tr.lit").inner_text().split("\t")[1] == layer


# What text stands on, against what it is written in (WCAG 2, AA).
_CONTRAST = """() => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = (rgb) => {
    const [r, g, b] = rgb.slice(0, 3).map((c) => c / 255)
      .map((c) => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const colour = parse(getComputedStyle(at).backgroundColor);
      if (colour.length < 4 || colour[3] > 0) return colour;
    }
  };
  const poor = [];
  for (const element of document.querySelectorAll("p, td, th, dt, dd, a, h1, h2, caption, text")) {
    const style = getComputedStyle(element);
    const drawn = element.tagName === "text";
    const [a, b] = [parse(drawn ? style.fill : style.color), behind(element)].map(light);
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) poor.push(`${element.tagName} ${element.className} ${ratio.toFixed(2)}`);
  }
  return poor;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(opened: Callable[..., Any], bad_page: Any, good_page: Any, scheme: str) -> None:
    grounds = set()
    for path, _ in (bad_page, good_page):
        page = opened(path, color_scheme=scheme)
        assert page.evaluate(_CONTRAST) == []
        grounds.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert grounds == {"rgb(246, 247, 249)" if scheme == "light" else "rgb(15, 19, 23)"}


def test_a_narrow_screen(opened: Callable[..., Any], bad_page: Any) -> None:
    """Wide tables scroll by themselves; the page does not."""
    page = opened(bad_page[0], viewport={"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") == 390


def test_drawings_have_names(opened: Callable[..., Any], good_page: Any) -> None:
    page = opened(good_page[0])
    ids = page.eval_on_selector_all("[id]", "all => all.map((one) => one.id)")
    assert len(ids) == len(set(ids))
    for names in page.eval_on_selector_all(
        "[aria-labelledby]", "all => all.map((one) => one.getAttribute('aria-labelledby'))"
    ):
        assert set(names.split()) <= set(ids)
    assert page.locator("svg:not([role=img]):not([aria-hidden])").count() == 0
