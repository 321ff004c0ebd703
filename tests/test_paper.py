"""The paper: findings of any name in three forms, one error for a finding that is not there, nothing replaced half."""

import html.parser
import json
import re
import shutil

import pytest
from markdown_it import MarkdownIt
from PIL import Image

from conftest import ROOT
from latex_reading import check_latex
from moe_routing.studies import paper
from moe_routing.studies.findings import Finding, fill, write_findings
from moe_routing.studies.paper import STYLES, check_commands, compose, form, published, references, style_found, words
from moe_routing.studies.week import compile_latex, latex_engine

NAMES = [
    "a_b & 50% #1 {x} \\n ~ ^ < > | \" ' `",
    "R² 模型 é ß ± − ∞ \u202e",
    "costs $5$ or $6",
    "\\input{/etc/passwd}",
    "<script>alert(1)</script> <b>bold</b>",
    "**half `open [@nobody]",
    "![x](y.png) [link](z) a*b*c __d__",
]


@pytest.fixture
def root(tmp_path):
    "A repository with two published studies; the names in their findings are as bad as names get."
    for study in ("bh_sweep", "seven_day"):
        folder = tmp_path / "papermill_runs" / study
        folder.mkdir(parents=True)
        keys = {
            "bh_sweep": ("bh.range_of_k", "bh.equal_k.perplexity", "bh.trade_off.bh"),
            "seven_day": ("week.claims",),
        }
        named = [Finding(f"name.{i}", "Model {name} at {x:.1%}.", {"name": n, "x": 0.5}) for i, n in enumerate(NAMES)]
        write_findings(folder, [*(Finding(k, "**Said** of `{k}`.", {"k": k}) for k in keys[study]), *named])
        Image.new("L", (40, 30), 120).save(folder / f"{study}-equal_k.png", dpi=(300, 300))
        (folder / "report.md").write_text(f"# Title\n\n![A caption with 5 % & $]({study}-equal_k.png)\n")
    report = tmp_path / "papermill_runs" / "report"
    report.mkdir()
    for name in ("report-timeline.png", "report-spectrum.png"):
        Image.new("L", (40, 30), 120).save(report / name)
    return tmp_path


def test_every_published_finding_stands_in_the_paper():
    made, studies = compose(ROOT), published(ROOT)
    assert {"bh_sweep", "routers"} <= {s.name for s in studies}
    for study in studies:
        for finding in study.findings.values():
            assert form(finding.text, "tex") in made["paper.tex"], finding.key


@pytest.mark.parametrize("name", NAMES)
def test_any_name_is_text_in_every_form(name):
    assert check_latex(form(name, "tex")) == []
    assert set(re.findall(r"<(\w+)", form(name, "html"))) <= {"b", "code"}
    shown = MarkdownIt("commonmark").render(form(name, "md"))
    assert set(re.findall(r"<(\w+)", shown)) <= {"p", "strong", "code"} and not re.search(
        r"(?<!\\)\$", form(name, "md")
    )


def test_marks_become_marks():
    text = "Said by [@switch], **50 %** of `a_b`."
    assert form(text, "tex") == r"Said by \cite{switch}, \textbf{50 \%} of \texttt{a\_b}."
    assert "[Fedus et al., arXiv 2101.03961](https://arxiv.org/abs/2101.03961)" in form(text, "md")
    assert form(text, "html").endswith("<b>50 %</b> of <code>a_b</code>.")
    with pytest.raises(ValueError, match="form"):
        form(text, "pdf")


@pytest.mark.parametrize("style", STYLES)
def test_the_paper_is_sound_in_every_style(root, style):
    tex = compose(root, style)["paper.tex"]
    assert check_latex(tex) == []
    assert (rf"\usepackage{{{style}}}" in tex) == (style != "article") and ("figure*" in tex) == (style == "icml2026")
    assert r"\textbf{Said} of \texttt{bh.range\_of\_k}" in tex and "../bh_sweep/bh_sweep-equal_k.png" in tex
    assert r"caption{A caption with 5 \% \& \$}" in tex and "Not published: " in tex


@pytest.mark.parametrize("broken", [r"\section{open", "an & outside", "a_b", "$x", r"\nosuch"])
def test_a_broken_paper_is_found(root, broken):
    assert check_latex(compose(root)["paper.tex"].replace("Not published", broken + " Not published"))


def test_it_compiles_where_there_is_an_engine(root):
    folder, engine = root / "papermill_runs" / "report", latex_engine()
    for name, text in compose(root).items():
        (folder / name).write_text(text)
    before = sorted(folder.iterdir())
    if engine:
        assert compile_latex(folder / "paper.tex", engine)[:4] == b"%PDF"
        (folder / "paper.tex").write_text((folder / "paper.tex").read_text().replace(r"\maketitle", r"\nosuchcommand"))
        with pytest.raises(RuntimeError, match="cannot compile paper.tex.*Undefined control sequence"):
            compile_latex(folder / "paper.tex", engine)
    assert sorted(folder.iterdir()) == before


class Tags(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.seen, self.links = [], []

    def handle_starttag(self, tag, attributes):
        self.seen.append(tag)
        self.links += [v for k, v in attributes if k in ("src", "href")]


def test_slides_need_no_network_and_run_nothing_of_a_name(root):
    tags, page = Tags(), compose(root)["slides.html"]
    tags.feed(page)
    assert 10 <= tags.seen.count("section") <= 14 and tags.seen.count("script") == 1
    assert tags.links and not [link for link in tags.links if re.match("https?:|//", link)]
    assert "../seven_day/" not in page or (root / "papermill_runs" / "seven_day").is_dir()


def test_a_finding_that_is_not_there_is_one_error_and_nothing_is_replaced(root, monkeypatch):
    folder = root / "papermill_runs" / "report"
    (folder / "paper.tex").write_text("old")
    write_findings(root / "papermill_runs" / "bh_sweep", [Finding("bh.range_of_k", "Said.", {})])
    line = next(
        i
        for i, text in enumerate((ROOT / "moe_routing/data/templates/in_short.j2").read_text().splitlines(), 1)
        if "bh.equal_k.perplexity" in text
    )
    with pytest.raises(ValueError, match=rf"in_short.j2, line {line}: .*'bh.equal_k.perplexity'"):
        paper.write_paper(root=root)
    (root / "papermill_runs" / "bh_sweep" / "findings.json").unlink()

    def fails(*args, **kwargs):
        raise RuntimeError("report.ipynb: ValueError: no")

    monkeypatch.setattr(paper, "render", fails)
    with pytest.raises(RuntimeError, match="report.ipynb"):
        paper.write_paper(root=root)
    assert (folder / "paper.tex").read_text() == "old" and not list(folder.parent.glob(".report-*"))


def test_what_is_written_replaces_what_was_there(root, monkeypatch):
    folder = root / "papermill_runs" / "report"

    def drawn(notebook, out, root):
        for name in ("report-timeline.png", "report-spectrum.png"):
            shutil.copy(folder / name, out)
        (out / "report.md").write_text("new")

    monkeypatch.setattr(paper, "render", drawn)
    assert paper.write_paper(root=root) == folder / "report.md" and (folder / "report.md").read_text() == "new"
    there = {f.name for f in folder.iterdir()}
    assert {"report.md", "paper.tex", "references.bib", "slides.html"} <= there
    assert ("paper.pdf" in there) == bool(latex_engine()) and not list(folder.parent.glob(".report-*"))


def test_fill_names_file_line_and_key(root):
    with pytest.raises(ValueError, match="page.md, line 2: .*unknown finding of seven_day 'week.claim'"):
        fill("ok\n{{ seven_day:week.claim }}", root, "page.md")


def test_a_broken_findings_file_is_named(root):
    (root / "papermill_runs" / "seven_day" / "findings.json").write_text('[{"key": "a"}]')
    with pytest.raises(ValueError, match="seven_day/findings.json.*make figures STUDY=seven_day"):
        published(root)


def test_studies_come_in_the_order_of_the_words(root):
    for name in ("zoo_of_mine", "capacity"):
        (root / "papermill_runs" / name).mkdir()
        write_findings(root / "papermill_runs" / name, [])
    assert [s.name for s in published(root)] == ["bh_sweep", "capacity", "seven_day", "zoo_of_mine"]


def test_style_files_are_taken_when_there(tmp_path):
    for style in STYLES[1:]:
        assert style_found(style, tmp_path) == "article"
        (tmp_path / f"{style}.sty").write_text("")
        assert style_found(style, tmp_path) == style
    with pytest.raises(ValueError, match="style"):
        style_found("icml2062", tmp_path)


def test_every_citation_has_an_entry():
    entries, cited = references(), set(re.findall(r"\[@(\w+)\]", json.dumps(words())))
    assert cited <= set(entries) and len(cited) > 10 and sum("core" in p for p in entries.values()) == 5
    assert all(p["url"].startswith("https://") and p["year"].isdigit() for p in entries.values())
    assert (ROOT / "moe_routing/data/references.bib").read_text().count("@misc") == len(entries)


def test_serving_commands():
    about = words()
    assert check_commands(about["serving"], about["documented"]) == []
    assert all(d["page"].startswith("https://docs.vllm.ai/") for d in about["documented"].values())
    for title, text in about["serving"].items():
        for wrong in (text.rstrip() + " --no-such-flag", text + " '", "v" + text):
            assert check_commands({title: wrong}, about["documented"])
