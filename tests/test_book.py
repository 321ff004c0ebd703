"""The book as pages: it builds without a network, every link leads somewhere, and a browser can read and search it."""

import fcntl
import json
import os
import re
import shutil
import time
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from conftest import ROOT

pytestmark = pytest.mark.filterwarnings("ignore:.*MystReferenceResolver.app")  # MyST-Parser's own

TERM, CHAPTER, TITLE = "Benjamini-Hochberg", "nbs/12_routers.pvalue.html", "P-values for experts"
READ = ["nbs/index.html", CHAPTER, "papermill_runs/bh_sweep/bh_routing_report.html"]  # the pages a browser opens
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "microsoft-edge")
PLACES = (
    "/usr/lib/chromium/chromium",
    "/snap/bin/chromium",
    "/opt/google/chrome/chrome",
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
)


@pytest.fixture(scope="session")
def book(tmp_path_factory):
    "Built once, also where several processes share the tests."
    shared = "PYTEST_XDIST_TESTRUNUID" in os.environ
    folder = (
        tmp_path_factory.getbasetemp().parent if shared else tmp_path_factory.mktemp("book")
    ) / f"book-{os.environ.get('PYTEST_XDIST_TESTRUNUID', 'alone')}"
    with open(f"{folder}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "index.html").exists():
            from moe_routing.book import build_book

            began, computed = time.monotonic(), time.process_time()
            build_book(ROOT, folder)
            Path(f"{folder}.json").write_text(
                json.dumps({"seconds": time.monotonic() - began, "cpu": time.process_time() - computed})
            )
    yield folder
    if not shared:
        shutil.rmtree(folder)


class Page(HTMLParser):
    "Ids, links, what the browser would load, and the text of a page."

    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.loads, self.text = set(), [], [], []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        self.ids |= {a[k] for k in ("id", "name") if a.get(k)}
        if tag == "a" and a.get("href"):
            self.links.append(a["href"])
        loads = a.get("src") or a.get("srcset") or (a.get("href") if tag == "link" else None)
        if loads:
            self.loads.append(loads)

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="session")
def pages(book):
    return {p: Page(p) for p in sorted(book.rglob("*.html")) if "_static" not in p.parts}


def test_building_is_quick(book):
    took = json.loads(Path(f"{book}.json").read_text())
    print(took)
    assert took["cpu"] < 90, took  # of one core, whatever else the machine does; some 25 s where this was written


def test_every_notebook_and_report_is_in_the_book(book, pages):
    sources = [
        *(ROOT / "nbs").glob("*.ipynb"),
        *(ROOT / "nbs").glob("*/*.ipynb"),
        *(ROOT / "papermill_runs").glob("*/*.md"),
        *(ROOT / "figures").glob("*.md"),
    ]
    missing = [
        s
        for s in sources
        if book / s.relative_to(ROOT).with_suffix(".html") not in pages and ".ipynb_checkpoints" not in s.parts
    ]
    assert len(sources) > 60 and not missing
    side = pages[book / "nbs" / "index.html"].links
    assert all(any(link.endswith(s.with_suffix(".html").name) for link in side) for s in sources if s.stem != "index")


def test_every_internal_link_leads_somewhere(book, pages):
    broken, seen = [], 0
    for path, page in pages.items():
        for link in page.links + page.loads:
            url = urlsplit(link)
            if url.scheme or url.netloc:
                continue
            seen += 1
            target = (path.parent / unquote(url.path)).resolve() if url.path else path
            if not target.exists():
                broken.append(f"{path.relative_to(book)}: {link}")
            elif url.fragment and target in pages and unquote(url.fragment) not in pages[target].ids | {""}:
                broken.append(f"{path.relative_to(book)}: {link} (no such place)")
    assert seen > 1000 and not broken, broken[:20]


def test_nothing_is_loaded_from_elsewhere(book, pages):
    loads = [
        f"{path.relative_to(book)}: {load}"
        for path, page in pages.items()
        for load in page.loads
        if urlsplit(load).netloc
    ]
    styles = [
        f"{p.relative_to(book)}: {m}"
        for p in book.rglob("*.css")
        for m in re.findall(r"(?:@import|url\()\s*['\"]?(?:https?:)?//[^'\")\s]+", p.read_text(errors="ignore"))
    ]
    assert not loads and not styles, (loads + styles)[:10]
    assert list(book.rglob("tex-*.js")) or list(book.rglob("mathjax/**/*.js")), "MathJax is not beside the pages"


def find_browser() -> str | None:
    "A Chromium of the system, in the usual places."
    found = next(filter(None, map(shutil.which, NAMES)), None) or next((p for p in PLACES if Path(p).exists()), None)
    return os.environ.get("BROWSER_PATH") or found


def without_javascript(book, pages):
    "What can be said of the same pages where no browser is installed: they say what they should, their figures are files with a size, the index of the search knows the term."
    first = pages[book / READ[0]]
    assert "What the studies found" in "".join(first.text) and any(
        link.endswith(Path(CHAPTER).name) for link in first.links
    )
    assert TITLE in "".join(pages[book / CHAPTER].text)
    for name in READ:
        for load in pages[book / name].loads:
            if load.endswith((".png", ".svg")):
                assert ((book / name).parent / unquote(load)).stat().st_size > 500
    index = (book / "searchindex.js").read_text()
    assert all(stem in index for stem in ("benjamini", "hochberg"))


def in_browser(book, browser):
    from playwright.sync_api import sync_playwright

    faults = []
    with sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=browser, args=["--no-sandbox", "--disable-gpu"])
        tab = chromium.new_page(viewport={"width": 1300, "height": 900})
        tab.on("console", lambda m: faults.append(f"console: {m.text}") if m.type in ("error", "warning") else None)
        tab.on("pageerror", lambda e: faults.append(f"error: {e}"))
        tab.on("requestfailed", lambda r: faults.append(f"failed: {r.url}"))
        tab.on(
            "request",
            lambda r: (
                None if r.url.startswith(("file:", "data:", "blob:", "about:")) else faults.append(f"network: {r.url}")
            ),
        )

        tab.goto((book / "index.html").as_uri())
        tab.wait_for_url("**/nbs/index.html")
        assert (
            tab.locator("h1").first.inner_text().startswith("moe_routing")
            and tab.get_by_text("What the studies found").first.is_visible()
        )
        tab.locator(f'article td a[href$="{Path(CHAPTER).name}"]').first.click()
        tab.wait_for_url(f"**/{CHAPTER}")
        assert TITLE in tab.locator("h1").first.inner_text()

        for name in READ:
            tab.goto((book / name).as_uri())
            tab.wait_for_load_state("load")
            for image in tab.locator("article img").all():
                image.scroll_into_view_if_needed()  # they are loaded when they are seen
            tab.wait_for_function(
                "[...document.querySelectorAll('article img')].every(i => i.complete && i.naturalWidth > 0)",
                timeout=10_000,
            )
        assert tab.locator("article img").count() > 0

        tab.goto((book / "nbs" / "09_capacity.html").as_uri())
        tab.wait_for_selector("mjx-container", timeout=20_000)  # formulas are set

        tab.goto((book / "nbs" / "index.html").as_uri())
        box = tab.locator("input[name=q]").first
        box.fill(TERM)
        box.press("Enter")
        tab.wait_for_selector("#search-results li a", timeout=20_000)
        titles = tab.locator("#search-results li a").all_inner_texts()
        assert any(TITLE in t for t in titles), titles
        tab.locator("#search-results li a", has_text=TITLE).first.click()
        tab.wait_for_url(f"**/{CHAPTER}**")
        chromium.close()
    assert not faults, faults


def test_the_book_in_a_browser(book, pages):
    browser = find_browser()
    if browser is None:
        assert os.environ.get("CI") != "true", (
            "no browser to read the book with: install one (Debian: apt-get install chromium), or name it in BROWSER_PATH"
        )
        without_javascript(book, pages)
        return
    in_browser(book, browser)


def test_the_book_without_javascript(book, pages):
    without_javascript(book, pages)


def test_no_browser_is_a_failure_where_it_counts(book, pages, monkeypatch):
    monkeypatch.setattr("test_book.find_browser", lambda: None)
    monkeypatch.setenv("CI", "true")
    with pytest.raises(AssertionError, match="apt-get install chromium"):
        test_the_book_in_a_browser(book, pages)
    monkeypatch.delenv("CI")
    test_the_book_in_a_browser(book, pages)
