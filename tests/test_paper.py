"""The paper: forms of one text, commands, adapters, and what is said where nothing was run."""

import re
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from conftest import ROOT
from moe_routing import paper
from moe_routing.metrics.dependence import depends_on
from moe_routing.models.adapters import VARIANTS, Adapted, adapter_gain, adapter_losses, adapter_parameters
from moe_routing.paper import FLAGS, PAPERS, SERVING, STUDIES, Quote, Report, ToyExperts, _quote, add_study, bibtex, check_commands, check_paper, compile_paper, compose, fine_tuned, loop_points, read_pieces, slides_html, style_found, to_latex, to_markdown
from moe_routing.studies.claims import Inputs
from moe_routing.published import Ledger, read_ledger
from moe_routing.studies.week import latex_engine


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
        with pytest.raises(RuntimeError, match="cannot compile"):
            compile_paper(tmp_path, engine)


@pytest.mark.parametrize("style", ["icml2026", "neurips_2026"])
def test_style_files_are_taken_when_there(report, tmp_path, style):
    assert style_found(style, tmp_path) == "article"
    (tmp_path / f"{style}.sty").write_text("")
    assert style_found(style, tmp_path) == style
    tex = to_latex(report, style)
    assert rf"\usepackage{{{style}}}" in tex and check_paper(tex) == []
    with pytest.raises(ValueError, match="style"):
        style_found("icml2062", tmp_path)


def test_every_citation_has_an_entry():
    source = (ROOT / "moe_routing" / "paper.py").read_text()
    cited = set(re.findall(r"\[@(\w+)\]", source))
    assert cited <= set(PAPERS) and len(cited) > 10
    assert sum(bool(p.core) for p in PAPERS.values()) == 5 and all(re.search(rf"@misc{{{k},", bibtex()) for k in PAPERS)


def test_serving_commands():
    assert check_commands() == []
    assert all(page.startswith("https://docs.vllm.ai/") for page, _ in FLAGS.values())
    for title, text in SERVING.items():
        assert (
            check_commands({title: text + " --no-such-flag"})
            and check_commands({title: text + " '"})
            and check_commands({title: "v" + text})
        )


@pytest.mark.parametrize("variant", VARIANTS)
def test_adapters(variant):
    found = adapter_losses(variant)
    assert found["change"] == 0 and found["losses"][-1] < found["losses"][0] - 0.01
    assert found["parameters"] == adapter_parameters(variant, 2, 32, 8)


def test_bad_input():
    with pytest.raises(ValueError, match="variant"):
        adapter_parameters("Q", 1, 1, 1)
    with pytest.raises(ValueError, match="divisor"):
        ToyExperts(k=3, rounds=2)
    with pytest.raises(ValueError, match="router"):
        depends_on("no_such")


def test_not_run_is_said(tmp_path):
    for name in STUDIES:
        if not (ROOT / "papermill_runs" / "studies" / f"{name}.yaml").is_file():
            continue
        r = Report(Ledger("moe_routing.paper:write_paper"))
        assert not add_study(r, Inputs(tmp_path), name)
        assert "Not run" in to_markdown(r) and not r.blocks[-1].kind == "table"


def test_slides_need_no_network():
    page = slides_html([["# a"], ["# b"], ["# c"]], "t")
    assert (
        not re.search(r"""(?:src|href)=["']https?:|import\s+\w+\s+from""", page) and len(re.findall(r"<h1", page)) == 3
    )


# --- where numbers come from


def test_a_number_belongs_to_the_run_of_its_place(tmp_path):
    from moe_routing.published import _given, numbers

    r = Report(Ledger("moe_routing.paper:write_paper"))
    r.head("Title")
    r.table(pd.DataFrame({"a": ["x", "y"], "b": ["0.5", "0.5"]}), "First.", [("0" * 10,), ("1" * 10,)])
    r.table(pd.DataFrame({"a": ["x"], "b": ["0.5"]}), "Second, the same row of another run.", [("2" * 10,)])
    for text in (to_markdown(r), to_latex(r)):
        of = _given(text, r.ledger.entries)
        assert [of(f).runs for f in numbers(text) if f.text == "0.5"] == [("0" * 10,), ("1" * 10,), ("2" * 10,)]


def test_a_number_of_nobody_is_refused(tmp_path):
    r = Report(Ledger("moe_routing.paper:write_paper"))
    value = 0.125
    r.head("Title"), r.say(f"A loss of {value} from nowhere.")
    (tmp_path / "report.md").write_text(to_markdown(r))
    with pytest.raises(ValueError, match=r"report.md:3: 0.125"):
        r.ledger.save([tmp_path / "report.md"], results=tmp_path)


@pytest.mark.parametrize("name", [n for n, s in STUDIES.items() if s.quotes])
def test_what_is_quoted_stands_in_the_studys_report_with_its_runs(name):
    files = sorted((ROOT / "papermill_runs" / name).glob("*_report.md"))
    if not files:  # a study without committed runs
        assert not list((ROOT / "papermill_runs" / name).glob("*/run.json"))
        return
    pieces, lines = read_pieces(files[0]), files[0].read_text()
    for q in STUDIES[name].quotes:
        r = Report(Ledger("moe_routing.paper:write_paper"))
        _quote(r, files[0], pieces, q)
        assert r.blocks and all(
            t in lines
            for b in r.blocks
            for t in (
                [b.content]
                if b.kind == "text"
                else [re.sub(r"^H\d\. ", "", i) for i in b.content]
                if b.kind == "list"
                else b.content.values.ravel()
            )
        )
        assert r.ledger.entries or not re.search(r"\d", to_markdown(r))
        assert all(
            run in read_ledger(files[0].with_suffix(".numbers.json"))["runs"]
            for e in r.ledger.entries
            for run in e.runs
        )
    with pytest.raises(ValueError, match="no item under 'No such'"):
        _quote(r, files[0], pieces, Quote("item", "No such"))


def test_the_loop_compares_one_setting_only():
    row = lambda router, match, cf, v, n: {
        "router": router,
        "match": match,
        "capacity_factor": cf,
        "gate_entropy": v,
        "demand_cv": v,
        "val_loss": v,
        "run_id": f"{n:010d}",
    }
    runs = pd.DataFrame(
        [
            row("a", "compute", 1.25, 1.0, 0),
            row("a", "compute", 1.25, 3.0, 1),
            row("a", "width", 1.25, 9.0, 2),
            row("a", "compute", 1.0, 9.0, 3),
            row("b", "compute", 1.25, 2.0, 4),
        ]
    )
    points = loop_points(runs)
    assert (
        points.router.tolist() == ["a"] and points.demand_cv[0] == 2 and points.ids[0] == ("0000000000", "0000000001")
    )
    assert loop_points(runs.drop(columns=["match", "capacity_factor"])).empty


def test_fine_tuning_is_paired_by_seed():
    shift = {("routers", "spectra"): -0.1, ("routers", "topk_aux"): 0.0, ("dense", "none"): 0.3}
    runs = pd.DataFrame(
        [
            {
                "group": g,
                "router": r,
                "seed": s,
                "loss_sft": 3 + s + d + 0.01 * s * (r == "spectra"),
                "run_id": f"{i}{s}".rjust(10, "0"),
            }
            for i, ((g, r), d) in enumerate(shift.items())
            for s in (2, 0, 1)
        ]
    )
    found = fine_tuned(runs).set_index("comparison")
    assert (
        set(found.index) == {"SPECTRA minus top-k", "top-k minus dense", "SPECTRA minus dense"}
        and found.seeds.eq("3").all()
    )
    assert (
        found.difference["SPECTRA minus top-k"].startswith("-0.0900 [")
        and found.difference["top-k minus dense"] == "-0.3000 [-0.3000, -0.3000]"
    )


class Letters:
    "A tokenizer of letters."

    def __call__(self, text, max_length, **more):
        return SimpleNamespace(input_ids=torch.tensor([[ord(c) % 64 for c in text[:max_length]]]))


@pytest.mark.parametrize("variant", VARIANTS)
def test_adapters_on_texts_leave_the_model_as_it_was(variant):
    from transformers import OlmoeConfig, OlmoeForCausalLM

    torch.manual_seed(0)
    model = OlmoeForCausalLM(
        OlmoeConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_experts=4,
            num_experts_per_tok=2,
            pad_token_id=0,
            eos_token_id=0,
        )
    ).eval()
    ids = torch.arange(9)[None]
    before = model(ids).logits
    found = adapter_gain(model, Letters(), variant, ["ab" * 6, "ba" * 6], ["ab" * 3, "ba" * 3], steps=8)
    assert (
        (found.after < found.before).all()
        and torch.equal(model(ids).logits, before)
        and all(p.requires_grad for p in model.parameters())
    )
    with pytest.raises(ValueError, match="at least one of each"):
        adapter_gain(model, Letters(), variant, [], ["ab"])
    with pytest.raises(ValueError, match="'a' has fewer than two tokens"):
        adapter_gain(model, Letters(), variant, ["ab"], ["a"])
    with pytest.raises(ValueError, match="variant"):
        adapter_gain(model, Letters(), "Q", ["ab"], ["ab"])
    assert torch.equal(model(ids).logits, before) and all(p.requires_grad for p in model.parameters())


def test_a_report_without_a_single_run_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(
        paper,
        "spectrum",
        lambda: pd.DataFrame([{"router": "topk", "group": "fixed", **dict.fromkeys(paper.FACTS, False), "depends": 0}]),
    )
    report, slides = compose(tmp_path)
    text = to_markdown(report)
    assert (
        text.count("Not run: the study") >= len(STUDIES)
        and "Not judged" in text
        and "No study has a finished run" in text
    )
    assert check_paper(to_latex(report)) == [] and 8 <= len(slides) <= 12
    assert not [e for e in report.ledger.entries if e.runs]


def test_every_study_of_the_book_is_in_the_report():
    "A plan that has committed runs is a section, or says why it is none."
    not_a_result = {
        "seven_day": "has a section of its own",
        "smoke": "shows that the machinery runs",
        "check_data": "shows that local data are read",
    }
    ran = {f.parts[-3] for f in (ROOT / "papermill_runs").glob("*/*/run.json")}
    assert {n for n in ran if (ROOT / "papermill_runs" / "studies" / f"{n}.yaml").is_file()} <= set(STUDIES) | set(
        not_a_result
    )
