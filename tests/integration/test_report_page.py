# SPDX-License-Identifier: LGPL-2.1-or-later
"""The page of a night in a real browser: Debian's Chromium, without a screen.

Screenshots and the print are left in build/report-page, for people to look at.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmi_host.report import write
from kvmi_host.testing.chromium import Chromium
from kvmi_host.testing.nights import MadeUpHost, lab, suite_of, write_night

SHOTS = Path(__file__).parents[2] / "build/report-page"
WIDTHS = (1280, 390, 360)  # pixels: a desktop, a phone, a small phone

BEYOND = """
[...document.querySelectorAll("body *")].filter((element) => {
  const place = element.getBoundingClientRect();
  const outside = place.width && (place.right > document.documentElement.clientWidth + 0.5 || place.left < 0);
  return outside && !element.closest(".scroll, pre, .spoken, .skip");
}).map((element) => element.outerHTML.slice(0, 120))
"""
"""What reaches out of the page, apart from what scrolls in a box of its own."""

PALE = """
(() => {
  const channels = (color) => color.match(/[\\d.]+/g).map(Number);
  const light = (color) => channels(color).slice(0, 3).map((part) => part / 255)
    .map((part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4))
    .reduce((sum, part, index) => sum + part * [0.2126, 0.7152, 0.0722][index], 0);
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const color = getComputedStyle(at).backgroundColor;
      if (channels(color)[3] !== 0) return color;
    }
    return "rgb(255, 255, 255)";
  };
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const found = new Set();
  for (let text = texts.nextNode(); text; text = texts.nextNode()) {
    const element = text.parentElement;
    const seen = element.getClientRects().length && !element.closest("script, style, title, desc");
    if (!text.data.trim() || !seen) continue;
    const style = getComputedStyle(element);
    const front = light(element.closest("svg") ? style.fill : style.color);
    const back = light(behind(element));
    const contrast = (Math.max(front, back) + 0.05) / (Math.min(front, back) + 0.05);
    if (contrast < 4.5) found.add(`${contrast.toFixed(2)}: ${element.className} ${text.data.trim().slice(0, 40)}`);
  }
  return [...found];
})()
"""
"""Texts whose contrast to what is behind them is less than WCAG 2.1 asks for (1.4.3, level AA)."""

SHOWN = '[...document.querySelectorAll("table.rules tr[data-kinds]")].filter((row) => row.offsetParent).length'


@pytest.fixture(scope="module")
def night(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of the last of twelve nights: hosts that died and are away, new failures, a kernel that complains."""
    top = tmp_path_factory.mktemp("nights")
    for number in range(1, 13):
        write(write_night(top / str(number), lab(number), number), top / "history.sqlite")
    return top / "12/index.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Chromium]:
    with Chromium() as chromium:
        yield chromium


@pytest.mark.integration
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_is_wider_than_the_page(browser: Chromium, night: Path, width: int, dark: bool) -> None:
    browser.show(night, width, dark=dark)
    browser.screenshot(SHOTS / f"{width}-{'dark' if dark else 'light'}.png")
    assert browser.evaluate("document.documentElement.scrollWidth") == width
    assert browser.evaluate(BEYOND) == []


@pytest.mark.integration
def test_the_page_asks_for_nothing_but_itself_and_the_browser_has_no_complaint(browser: Chromium, night: Path) -> None:
    browser.show(night, 1280)
    assert browser.requests == [night.as_uri()]
    assert browser.complaints == []


@pytest.mark.integration
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_every_text_can_be_told_from_what_is_behind_it(browser: Chromium, night: Path, dark: bool) -> None:
    browser.show(night, 1280, dark=dark)
    assert browser.evaluate(PALE) == []


@pytest.mark.integration
def test_a_text_without_contrast_would_be_found(browser: Chromium, tmp_path: Path) -> None:
    page = tmp_path / "pale.html"
    page.write_text('<!DOCTYPE html><p style="color: #999; background: #fff">pale</p>')
    browser.show(page, 1280)
    assert browser.evaluate(PALE) == ["2.85:  pale"]


@pytest.mark.integration
def test_what_is_wider_than_the_page_would_be_found(browser: Chromium, tmp_path: Path) -> None:
    page = tmp_path / "wide.html"
    page.write_text('<!DOCTYPE html><div style="width: 2000px">wide</div>')
    browser.show(page, 390)
    assert browser.evaluate("document.documentElement.scrollWidth") > 390
    assert len(browser.evaluate(BEYOND)) == 1


@pytest.mark.integration
def test_the_filter_shows_the_rules_that_are_asked_for(browser: Chromium, night: Path) -> None:
    browser.show(night, 1280)
    everything = browser.evaluate(SHOWN)

    def choose(outcome: str, words: str) -> int:
        browser.evaluate(
            f'document.getElementById("filter-outcome").value = "{outcome}";'
            f'document.getElementById("filter-text").value = "{words}";'
            'document.querySelector(".filter").dispatchEvent(new Event("input"))'
        )
        return int(browser.evaluate(SHOWN))

    assert choose("failed", "") == 2
    assert choose("not-applicable", "page ACCESS") == 12
    assert choose("not-run", "") == 1
    assert choose("", "zebra") == 0
    assert choose("", "") == everything > 90


@pytest.mark.integration
def test_a_cell_of_the_matrix_leads_to_its_rules_whatever_was_filtered(browser: Chromium, night: Path) -> None:
    browser.show(night, 1280)
    browser.evaluate(
        'document.getElementById("filter-text").value = "zebra";'
        'document.querySelector(".filter").dispatchEvent(new Event("input"));'
        'document.querySelector(".matrix td.failed a").click()'
    )
    assert browser.evaluate("location.hash") == "#group-2"
    assert browser.evaluate('document.querySelector(":target tr[data-kinds]").offsetParent !== null')


@pytest.mark.integration
def test_without_javascript_all_is_there_but_the_filter(browser: Chromium, night: Path) -> None:
    browser.show(night, 1280)
    with_it = browser.evaluate(SHOWN)
    browser.show(night, 1280, scripts=False)
    assert browser.evaluate(SHOWN) == with_it
    assert browser.evaluate('document.querySelector(".filter").offsetParent') is None


@pytest.mark.integration
def test_a_script_that_came_through_would_not_run(browser: Chromium, night: Path, tmp_path: Path) -> None:
    page = tmp_path / "index.html"
    ours = night.read_text()
    page.write_text(ours.replace("</main>", "<script>document.title = 'taken'</script></main>"))
    browser.show(page, 1280)
    assert browser.evaluate("document.title").startswith("Failed: ")
    assert any("Content Security Policy" in complaint for complaint in browser.complaints)


@pytest.mark.integration
def test_long_names_without_blanks_do_not_widen_the_page(browser: Chromium, tmp_path: Path) -> None:
    folder = write_night(tmp_path, [MadeUpHost("h" * 64)])
    suite = suite_of(MadeUpHost("h" * 64, fails={0: "m" * 3000}))
    suite["host"]["kernel"] = "k" * 400
    suite["groups"][0]["title"] = "g" * 400
    suite["rules"][0].update(number="n" * 50, text="r" * 400)
    for test in suite["tests"]:
        test["id"] += "t" * 400
    (folder / f"hosts/{'h' * 64}/suite.json").write_text(json.dumps(suite))
    write(folder)
    browser.show(folder / "index.html", 360)
    assert browser.evaluate("document.documentElement.scrollWidth") == 360
    assert browser.evaluate(BEYOND) == []


@pytest.mark.integration
def test_it_is_printed_dark_on_light_and_within_the_paper(browser: Chromium, night: Path) -> None:
    a4 = 718  # pixels between the margins that Chromium leaves on A4
    browser.show(night, a4, dark=True)
    browser.print(SHOTS / "print.pdf")
    scheme = {"name": "prefers-color-scheme", "value": "dark"}
    browser.ask("Emulation.setEmulatedMedia", media="print", features=[scheme])
    assert browser.evaluate(PALE) == []
    assert browser.evaluate("getComputedStyle(document.body).backgroundColor") == "rgba(0, 0, 0, 0)"
    assert browser.evaluate("document.documentElement.scrollWidth") == a4
