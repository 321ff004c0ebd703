"""The paper and the slides: made of published findings, escaped, whole or not at all."""

import json
import shutil

import pytest

from conftest import ROOT
from moe_routing.studies.findings import Finding, fill, read_findings, write_findings
from moe_routing.studies.paper import STYLES, check_commands, compose, form, published, references, style_found, words
from moe_routing.studies.week import compile_latex, latex_engine


@pytest.fixture(scope="module")
def made():
    "Paper, slides and references of what is published today."
    return compose(ROOT)


def test_every_published_finding_stands_in_the_paper(made):
    studies = published(ROOT)
    assert {"bh_sweep", "routers", "spectra"} <= {s.name for s in studies}
    for study in studies:
        first = next(iter(study.findings.values()))
        assert form(first.text, "tex") in made["paper.tex"], first.key


@pytest.mark.skipif(not latex_engine(), reason="no LaTeX engine on this machine")
def test_the_paper_compiles(made, tmp_path):
    for name, text in made.items():
        (tmp_path / name).write_text(text)
    assert compile_latex(tmp_path / "paper.tex", latex_engine()).startswith(b"%PDF")


def test_the_slides_are_one_page_with_a_section_a_slide(made):
    assert made["slides.html"].count("<section") == made["slides.html"].count("</section") >= 5


@pytest.mark.parametrize("kind, bad", [("tex", "$x_1$ & 5%"), ("html", "<script>x</script>"), ("md", "a <b> *c* | d")])
def test_text_is_escaped(kind, bad):
    said = form(f"Model {bad} is better.", kind)
    raw = {"tex": ("$x", " & "), "html": ("<script>",), "md": ("<b>", " *c*", " | ")}[kind]
    assert not any(r in said for r in raw), said


def test_a_finding_that_is_not_there_is_named_with_its_line(tmp_path):
    folder = tmp_path / "papermill_runs" / "demo"
    folder.mkdir(parents=True)
    write_findings(folder, [Finding("demo.one", "One.", {}, ("a",))])
    with pytest.raises(ValueError, match="paper.tex, line 2: .*demo.one"):
        fill("ok\n{{ demo:demo.on }}", tmp_path, "paper.tex")


def test_a_broken_study_stops_the_whole(tmp_path):
    target = tmp_path / "papermill_runs"
    shutil.copytree(ROOT / "papermill_runs" / "bh_sweep", target / "bh_sweep")
    shutil.copytree(ROOT / "papermill_runs" / "studies", target / "studies")
    raw = json.loads((target / "bh_sweep" / "findings.json").read_text())
    raw[0]["values"] = {}
    (target / "bh_sweep" / "findings.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="findings.json"):
        published(tmp_path)


def test_commands_references_and_styles():
    about = words()
    assert check_commands(about["serving"], about["documented"]) == []
    title, text = next(iter(about["serving"].items()))
    assert check_commands({title: text + " --no-such-flag"}, about["documented"])
    assert len(references()) >= 5 and all("title" in r and "year" in r for r in references().values())
    assert style_found(STYLES[1], ROOT) == "article"
    with pytest.raises(ValueError, match="style"):
        style_found("no_such", ROOT)
    assert read_findings(ROOT / "papermill_runs" / "bh_sweep")
