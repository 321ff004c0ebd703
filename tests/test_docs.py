"""What README and CONTRIBUTING show is what happens: their Python runs, their commands exist, and README is what its
template and the published findings make."""

import re
import shlex
import subprocess
import sys

import pytest

from conftest import ROOT
from moe_routing.studies.findings import fill

PAGES = ["README.md", "CONTRIBUTING.md"]


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.S)


@pytest.mark.parametrize("page, text", [(p, b) for p in PAGES for b in blocks(p, "python")], ids=lambda x: x[:12])
def test_python_of_the_pages_runs(page, text, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MOE_ROUTING_CACHE_DIR", str(tmp_path / "cache"))
    sys.path.insert(0, str(tmp_path))
    if "plan_study(" in text:  # it looks for the templates of this repository, and writes a file
        text = text.replace('"my_study.yaml"', repr(str(tmp_path / "my_study.yaml")))
    exec(compile(text, page, "exec"), {"__name__": "__main__"})
    sys.path.remove(str(tmp_path))
    assert capsys.readouterr().out.strip()


def test_commands_of_the_pages_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    said = [m for p in PAGES for m in re.findall(r"make ([a-z-]+)", (ROOT / p).read_text())]
    assert said and set(said) <= targets, set(said) - targets
    clean = {"PATH": "/usr/bin:/bin"}  # make inside make would speak of its folders
    for target in sorted(set(said) & targets):
        done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, env=clean)
        assert done.returncode == 0, done.stderr
    words = [w for p in PAGES for w in re.findall(r"python -m (moe_routing[\w.]*)", (ROOT / p).read_text())]
    for module in set(words):
        done = subprocess.run([sys.executable, "-m", *shlex.split(module), "--help"], capture_output=True, cwd=ROOT)
        assert done.returncode == 0, module


def test_readme_is_what_its_template_and_the_findings_make():
    template = ROOT / "docs" / "readme.md"
    assert (ROOT / "README.md").read_text() == fill(template.read_text(), ROOT, str(template)), "run `make readme`"


def test_readme_is_short_and_says_the_commands_first():
    text = (ROOT / "README.md").read_text()
    template = (ROOT / "docs" / "readme.md").read_text().splitlines()  # a finding is as long as it is
    assert len(text.splitlines()) <= 80 and max(map(len, template)) <= 150
    before = text[: text.index("make test")].split()
    assert len(before) <= 90, f"{len(before)} words before the second command"


def test_links_of_the_pages_lead_somewhere():
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#:]+)\)", (ROOT / page).read_text()):
            assert (ROOT / link).exists(), f"{page}: {link}"
