"""The book: sphinx builds it from the stored notebooks, every chapter is a page, and no link of its pages is dead."""

import re
import subprocess
import sys
from urllib.parse import unquote

import pytest

from conftest import ROOT


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    out = tmp_path_factory.mktemp("book")
    command = [sys.executable, "-m", "sphinx", "-q", "-b", "html", "-d", str(out / "trees"), str(ROOT / "docs")]
    done = subprocess.run([*command, str(out / "pages")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    empty = r".*toctree glob pattern .*report' didn't match any documents\n?"  # before anything is published
    return out / "pages", re.sub(empty, "", done.stderr).strip()


def test_it_is_built_without_a_warning(book):
    assert book[1] == ""


@pytest.mark.parametrize("folder", ["nbs", "nbs/runs", "nbs/studies"])
def test_every_chapter_is_a_page_of_the_contents(book, folder):
    contents = (book[0] / "index.html").read_text()
    chapters = [f for f in (ROOT / folder).glob("*.ipynb") if f.stem != "index"]
    for chapter in chapters:
        page = f"pages/{folder}/{chapter.stem}.html"
        assert (book[0] / page).stat().st_size > 3000 and f'href="{page}"' in contents, chapter
    assert chapters


def test_no_link_is_dead(book):
    dead = []
    for page in book[0].rglob("*.html"):
        for link in re.findall(r'(?:href|src)="([^"#?]+)', page.read_text()):
            if not re.match(r"[a-z]+:|//", link) and not (page.parent / unquote(link)).exists():
                dead.append(f"{page.relative_to(book[0])}: {link}")
    assert dead == []
