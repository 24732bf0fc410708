# SPDX-License-Identifier: LGPL-2.1-or-later
"""The guide as a site: built as `make docs` does, and looked at in a browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from kvmi_host.testing.chromium import Chromium

ROOT = Path(__file__).parents[2]
SHOTS = ROOT / "build/site-shots"
DESKTOP, PHONE = 1280, 390
PAGES = [
    "index.html",
    "docs/tutorial.html",
    "docs/protocol.html",
    "docs/security.html",
    "docs/troubleshooting.html",
    "docs/selftests.html",
    "docs/api/kvmi_host.introspect.html",
    "kernel/index.html",
]

pytestmark = pytest.mark.integration


class Quiet(SimpleHTTPRequestHandler):
    """Serves files, and does not say so."""

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    subprocess.run([ROOT / "ci/docs", folder], check=True, timeout=300)
    return folder


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    """Where the site is served, without the slash."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def browser() -> Iterator[Chromium]:
    with Chromium() as chromium:
        yield chromium


@pytest.mark.parametrize("width", [DESKTOP, PHONE])
@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_no_wider_than_the_window(browser: Chromium, address: str, page: str, width: int) -> None:
    browser.show(f"{address}/{page}", width)
    browser.screenshot(SHOTS / f"{page.replace('/', '-').removesuffix('.html')}-{width}.png")
    assert browser.evaluate('document.querySelector("article h1").innerText')
    assert browser.evaluate("document.documentElement.scrollWidth") == width


@pytest.mark.parametrize("page", PAGES)
def test_a_page_asks_for_nothing_from_elsewhere_and_the_browser_has_no_complaint(
    browser: Chromium, address: str, page: str
) -> None:
    browser.show(f"{address}/{page}", DESKTOP)
    assert [request for request in browser.requests if not request.startswith((address, "data:"))] == []
    assert browser.complaints == []


@pytest.mark.parametrize("page", ["docs/tutorial.html", "docs/protocol.html"])
def test_its_pictures_are_there(browser: Chromium, address: str, page: str) -> None:
    browser.show(f"{address}/{page}", DESKTOP)
    assert browser.evaluate("[...document.images].every((image) => image.complete && image.naturalWidth > 0)")


def test_it_can_be_read_without_a_server(browser: Chromium, site: Path) -> None:
    browser.show(site / "docs/tutorial.html", DESKTOP)
    link = browser.evaluate('document.querySelector("article a[href*=library]").href')
    assert link.partition("#")[0] == (site / "docs/library.html").as_uri()
    assert (site / "docs/library.html").exists()


def test_what_is_searched_has_every_guide_and_the_reference(site: Path) -> None:
    index = json.loads((site / "search/search_index.json").read_text())
    found = {entry["location"].partition("#")[0] for entry in index["docs"]}
    assert set(PAGES) - {"index.html"} <= found


def test_what_is_for_those_who_write_the_pages_is_not_in_it(site: Path) -> None:
    assert not [path for path in ("docs/make", "docs/drawings", "docs/man") if (site / path).exists()]


def test_a_file_that_a_page_links_to_comes_along(site: Path) -> None:
    unit = re.search(r"\(\.\./(\S+/kvmi-agent\.service)\)", (ROOT / "docs/agent.md").read_text())
    assert unit
    assert (site / unit[1]).read_bytes() == (ROOT / unit[1]).read_bytes()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("[a page](nowhere.md)", "nowhere.md"),
        ("[an anchor](operating.md#nowhere)", "#nowhere"),
        ("[a file](../nowhere.toml)", "nowhere.toml"),
        ("[another page's anchor](../kernel/README.md#nowhere)", "#nowhere"),
    ],
)
def test_a_link_that_leads_nowhere_is_an_error(tmp_path: Path, line: str, said: str) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("docs", "ci", "kernel", "kvmi_host", "tests"):
        (tree / name).symlink_to(ROOT / name)
    for name in ("README.md", "mkdocs.yml"):
        shutil.copy(ROOT / name, tree)
    for name in ("docs", "ci"):
        (tree / name).unlink()
        shutil.copytree(ROOT / name, tree / name)
    with (tree / "docs/tutorial.md").open("a") as page:
        page.write(f"\n{line}\n")
    result = subprocess.run(
        [tree / "ci/docs", tmp_path / "site"], capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 1
    assert said in result.stderr
