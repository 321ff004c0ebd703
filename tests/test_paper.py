"""The paper: forms of one text, commands, adapters, and what is said where nothing was run."""
import re
import shutil
import subprocess

import pandas as pd
import pytest

from conftest import ROOT
from moe_routing.paper import (FLAGS, PAPERS, SERVING, STUDIES, VARIANTS, Adapted, Report, ToyExperts, adapter_losses, adapter_parameters, add_study, bibtex,
                               check_commands, check_paper, compile_paper, depends_on, slides_html, style_found, to_latex, to_markdown)
from moe_routing.claims import Inputs
from moe_routing.published import Ledger
from moe_routing.week_report import latex_engine


@pytest.fixture
def report():
    r = Report(Ledger("moe_routing.paper:write_paper"))
    r.head("A title & more")
    r.head("Section", 2)
    r.say("Said by [@switch], **50 %** of `a_b`.")
    r.points(["one", "two_three"])
    r.table(pd.DataFrame({"router": ["a_b"], "loss": ["1.5 [1.0, 2.0]"]}), "A table", "0" * 10)
    r.code("echo $HOME_1")
    return r


def test_three_forms(report):
    text, tex = to_markdown(report), to_latex(report)
    assert "| a_b | 1.5 [1.0, 2.0] |" in text and "arxiv.org/abs/2101.03961" in text
    assert r"\cite{switch}" in tex and r"a\_b" in tex and r"50 \%" in tex and r"\toprule" in tex
    assert check_paper(tex) == []


@pytest.mark.parametrize("broken", [r"\section{open", "an & outside", "a_b", "$x", r"\nosuch"])
def test_a_broken_paper_is_found(report, broken):
    assert check_paper(to_latex(report).replace("Said by", broken + " Said by"))


def test_compiles_where_there_is_an_engine(report, tmp_path):
    tex = to_latex(report)
    assert check_paper(tex) == []
    engine = latex_engine()
    if engine:
        (tmp_path / "paper.tex").write_text(tex), (tmp_path / "references.bib").write_text(bibtex())
        assert compile_paper(tmp_path, engine)[:4] == b"%PDF"
        (tmp_path / "paper.tex").write_text(tex.replace(r"\maketitle", r"\nosuchcommand"))
        with pytest.raises(RuntimeError, match="cannot compile"): compile_paper(tmp_path, engine)


@pytest.mark.parametrize("style", ["icml2026", "neurips_2026"])
def test_style_files_are_taken_when_there(report, tmp_path, style):
    assert style_found(style, tmp_path) == "article"
    (tmp_path / f"{style}.sty").write_text("")
    assert style_found(style, tmp_path) == style
    tex = to_latex(report, style)
    assert rf"\usepackage{{{style}}}" in tex and check_paper(tex) == []
    with pytest.raises(ValueError, match="style"): style_found("icml2062", tmp_path)


def test_every_citation_has_an_entry():
    source = (ROOT / "moe_routing" / "paper.py").read_text()
    cited = set(re.findall(r"\[@(\w+)\]", source))
    assert cited <= set(PAPERS) and len(cited) > 10
    assert sum(bool(p.core) for p in PAPERS.values()) == 5 and all(re.search(rf"@misc{{{k},", bibtex()) for k in PAPERS)


def test_serving_commands():
    assert check_commands() == []
    assert all(page.startswith("https://docs.vllm.ai/") for page, _ in FLAGS.values())
    for title, text in SERVING.items():
        assert check_commands({title: text + " --no-such-flag"}) and check_commands({title: text + " '"}) and check_commands({title: "v" + text})


@pytest.mark.parametrize("variant", VARIANTS)
def test_adapters(variant):
    found = adapter_losses(variant)
    assert found["change"] == 0 and found["losses"][-1] < found["losses"][0] - .01
    assert found["parameters"] == adapter_parameters(variant, 2, 32, 8)


def test_bad_input():
    with pytest.raises(ValueError, match="variant"): adapter_parameters("Q", 1, 1, 1)
    with pytest.raises(ValueError, match="divisor"): ToyExperts(k=3, rounds=2)
    with pytest.raises(ValueError, match="router"): depends_on("no_such")


def test_not_run_is_said(tmp_path):
    for name in STUDIES:
        if not (ROOT / "papermill_runs" / "studies" / f"{name}.yaml").is_file(): continue
        r = Report(Ledger("moe_routing.paper:write_paper"))
        assert not add_study(r, Inputs(tmp_path), name)
        assert "Not run" in to_markdown(r) and not r.blocks[-1].kind == "table"


def test_slides_need_no_network():
    page = slides_html([["# a"], ["# b"], ["# c"]], "t")
    assert not re.search(r"""(?:src|href)=["']https?:|import\s+\w+\s+from""", page) and len(re.findall(r"<h1", page)) == 3
