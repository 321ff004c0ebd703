"""The book: every chapter is a page, and no link inside it is dead."""

import re
import subprocess
import sys

import pytest

from conftest import ROOT


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    out = tmp_path_factory.mktemp("book")
    command = [sys.executable, "-m", "sphinx", "-q", "-b", "html", "-d", str(out / "trees"), "docs", str(out / "html")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stderr[-3000:]
    return out / "html"


def test_every_chapter_and_report_is_a_page(book):
    chapters = [*(ROOT / "nbs").glob("[0-9]*.ipynb"), *(ROOT / "nbs" / "studies").glob("*.ipynb")]
    assert len(chapters) > 60
    for path in chapters:
        page = book / "pages" / path.relative_to(ROOT).with_suffix(".html")
        assert page.is_file() and page.stat().st_size > 3_000, page


def test_no_link_is_dead(book):
    dead = []
    for page in book.rglob("*.html"):
        for link in re.findall(r'href="([^"#?:]+)["#]', page.read_text()):
            if not (page.parent / link).exists():
                dead.append(f"{page.relative_to(book)}: {link}")
    assert not dead, dead[:10]
