"""The week's report: gaps are dashes with a reason, bold needs a paired interval, claims can come out each way."""

import json
import os
import re
import stat

import numpy as np
import pytest

from latex_reading import check_latex
from made_up_week import draw, made_up_week
from moe_routing.models.size import specification
from moe_routing.studies import week as w


@pytest.fixture
def make(tmp_path):
    "A made-up week, read; `edit(folder)` changes files before it is read."

    def made(edit=None, read=True, **how):
        folder = made_up_week(tmp_path / f"seven_day_{len(list(tmp_path.iterdir()))}", **how)
        if edit:
            edit(folder)
        return w.read_week(folder) if read else folder

    return made


def change(day, name, do):
    "Edit a JSON file of a day."

    def edit(folder):
        file = folder / w.DAYS[day] / name
        found = json.loads(file.read_text())
        file.write_text(json.dumps(do(found) or found))

    return edit


def cells(week, baselines=()):
    rows = w.week_rows(week, baselines)
    return dict(w.comparison_table(week, rows, w.read_specifications(rows)).rows)


def test_a_whole_week_has_every_number_and_every_number_has_its_run(make):
    week = make()
    summary, files = w.write_week(week, week.folder / w.DAYS["day6"])
    there = [c for t in summary["tables"].values() for c in t["cells"] if c["value"] is not None]
    assert len(there) > 20
    for c in there:
        assert json.loads((week.folder / c["run"] / "run.json").read_text())["run_id"] == c["run_id"], c
        assert c["source"]
    for name, table in summary["tables"].items():
        tex = (week.folder / w.DAYS["day6"] / f"{name}.tex").read_text()
        for c in (c for c in table["cells"] if c["value"] is not None):
            assert re.search(rf"% {re.escape(c['row'])} \| {re.escape(c['column'])} \| {c['run']} {c['run_id']}", tex)
    assert json.loads((week.folder / w.DAYS["day6"] / "final_summary.json").read_text()) == json.loads(
        json.dumps(summary)
    )


@pytest.mark.parametrize(
    "day, row, columns",
    [
        ("day0", "Tiny-16E", ["ppl"]),
        ("day1_2", "Tiny-16E", ["mmlu", "gsm8k", "arc_challenge"]),
        ("day5", "Tiny-16E", ["speed"]),
    ],
)
def test_a_missing_day_is_a_dash_with_a_footnote_that_names_it(make, day, row, columns):
    week = make(without=[day])
    summary, _ = w.write_week(week, week.folder / w.DAYS["day6"])
    found = cells(week)[row]
    tex = (week.folder / w.DAYS["day6"] / "table1_comparison.tex").read_text()
    text = (week.folder / w.DAYS["day6"] / "final_report.txt").read_text()
    for c in columns:
        assert found[c].value is None and w.DAYS[day] in found[c].why
    assert (
        r"--\textsuperscript{" in tex
        and w.escape(f"{w.DAYS[day]} was not run") in tex
        and f"{w.DAYS[day]} was not run" in text
    )
    assert summary["days"][day]["run_id"] is None and not check_latex(tex)


def faults_of(folder):
    "What reading finds in the files of the sixth day."
    return [p for f in sorted(folder.glob("*.tex")) for p in check_latex(f.read_text())]


def test_all_subsets_of_days_give_a_report(make):
    days = ["day0", "day1_2", "day3_4", "day5"]
    for bits in range(1, 15):
        week = make(without=[d for i, d in enumerate(days) if bits >> i & 1])
        summary, _ = w.write_week(week, week.folder / w.DAYS["day6"])
        assert faults_of(week.folder / w.DAYS["day6"]) == [] and len(summary["claims"]) == 12


@pytest.mark.parametrize(
    "value, says",
    [
        (None, "no value"),
        ("0.7", "not a number: '0.7'"),
        (True, "not a number: True"),
        (float("nan"), "finite"),
        (float("inf"), "finite"),
        ([1], "not a number"),
    ],
)
def test_what_is_not_a_number_is_a_dash_that_says_so(make, value, says):
    week = make(
        change(
            "day1_2", "comparison_summary.json", lambda s: s["tasks"]["mmlu"]["scores"]["Tiny-16E"].update(score=value)
        )
    )
    found = cells(week)["Tiny-16E"]["mmlu"]
    assert found.value is None and says in found.why and "day1_2_benchmarks/comparison_summary.json" in found.why
    speed = make(
        change(
            "day5", "efficiency_report.json", lambda s: [r.update(output_throughput=value) for r in s["grid"]] and None
        )
    )
    assert cells(speed)["Tiny-16E"]["speed"].value is None
    ppl = make(change("day0", "perplexity.json", lambda s: s["wikitext"].update(perplexity=value)))
    assert says in cells(ppl)["Tiny-16E"]["ppl"].why


@pytest.mark.parametrize(
    "day, name",
    [
        ("day0", "perplexity.json"),
        ("day0", "metrics.json"),
        ("day0", "decision.json"),
        ("day1_2", "comparison_summary.json"),
        ("day3_4", "specialization_report.json"),
        ("day5", "efficiency_report.json"),
    ],
)
@pytest.mark.parametrize(
    "content",
    [
        "",
        "[1, 2]",
        "{}",
        '{"tasks": [], "grid": {}, "ablation": 3, "models": [], "log": 2, "wikitext": 1, "rules": [], "trajectory": 1, '
        '"domain_use": [1], "differences": 1}',
        '{"tasks": {"mmlu": 3}, "grid": [3], "log": {"last": 1}, "missing": 1}',
    ],
)
def test_spoilt_files_never_crash_the_report(make, day, name, content):
    def spoil(folder):
        (folder / w.DAYS[day] / name).write_text(content)

    week = make(spoil, n=10)
    w.write_week(week, week.folder / w.DAYS["day6"])
    assert faults_of(week.folder / w.DAYS["day6"]) == []


def test_bold_needs_a_paired_interval_that_excludes_0(make):
    def bold(week):
        rows = w.week_rows(week)
        return w.comparison_table(week, rows, w.read_specifications(rows)).bold

    clear, close = make(scores={"A": 0.8, "B": 0.5}, n=400), make(scores={"A": 0.702, "B": 0.700}, n=50)
    assert {c for _, c in bold(clear)} == {"mmlu", "gsm8k", "arc_challenge"} and {r for r, _ in bold(clear)} == {"A"}
    assert bold(close) == set()

    # without the documents and without a pair in the comparison nothing is shown to be best
    def drop(folder):
        for f in (folder / w.DAYS["day1_2"]).glob("*/*/*_results.json"):
            f.unlink()
        run = folder / w.DAYS["day1_2"] / "run.json"
        run.write_text(json.dumps(json.loads(run.read_text()) | {"files": []}))

    assert bold(make(drop, scores={"A": 0.8, "B": 0.5}, n=400)) == set()
    # the pair of the comparison decides, in either direction
    for model, reference, sign in (("B", "A", -1), ("A", "B", 1)):
        row = dict(
            task="mmlu",
            model=model,
            reference=reference,
            difference=sign * 0.1,
            low=min(sign * 0.02, sign * 0.2),
            high=max(sign * 0.02, sign * 0.2),
            p=0.001,
            n=9,
        )
        assert ("A", "mmlu") in bold(
            make(
                change("day1_2", "comparison_summary.json", lambda s: s.update(differences=[row])),
                scores={"A": 0.8, "B": 0.5},
            )
        )
        wide = row | dict(low=-0.3, high=0.3, p=0.5)
        assert ("A", "mmlu") not in bold(
            make(
                change("day1_2", "comparison_summary.json", lambda s: s.update(differences=[wide])),
                scores={"A": 0.8, "B": 0.5},
            )
        )


def test_documents_with_other_texts_are_not_paired(make):
    def other(folder):
        file = folder / w.DAYS["day1_2"] / "B" / "knowledge" / "mmlu_results.json"
        found = json.loads(file.read_text())
        found["documents"]["hash"][0] = "another"
        file.write_text(json.dumps(found))

    week = make(other, scores={"A": 0.8, "B": 0.5})
    a, b = w.week_rows(week)
    assert w.paired_score(week, a, b, "mmlu") is None and w.paired_score(week, a, b, "gsm8k")["n"] == 60


def test_embedded_tasks_take_columns_of_their_own_and_the_seeds_stay_dashes(make):
    found = cells(make(tasks=("embedded_choice", "embedded_word")))["Tiny-16E"]
    assert (
        found["embedded_choice"].value is not None
        and found["mmlu"].value is None
        and "embedded_choice" in found["mmlu"].why
    )


def test_names_of_one_model_meet_in_one_row(make):
    def rename(folder):
        file = folder / w.DAYS["day5"] / "efficiency_report.json"
        found = json.loads(file.read_text())
        for r in found["grid"]:
            r["model"] = {"Mixtral-8x7B": "mistralai/Mixtral-8x7B"}.get(r["model"], r["model"])
        file.write_text(json.dumps(found))

    week = make(rename)
    assert [r.name for r in w.week_rows(week)] == ["Tiny-16E", "Mixtral-8x7B", "mistralai/Mixtral-8x7B"][
        : len(w.week_rows(week))
    ]
    assert cells(week, ["mistralai/Mixtral-8x7B"])["Mixtral-8x7B"]["speed"].value is not None
    for wrong in (3, {"model": "x"}, None):
        with pytest.raises(ValueError, match="baseline"):
            w.week_rows(week, [wrong])


def test_folder_and_days_that_are_not_there(make, tmp_path):
    with pytest.raises(FileNotFoundError, match="run the week first"):
        w.read_week(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no finished day.*day0_sanity_check was not run"):
        w.read_week(tmp_path / "empty")
    folder = make(read=False, without=["day1_2"])
    with pytest.raises(FileNotFoundError, match="day1_2 is needed: day1_2_benchmarks was not run"):
        w.read_week(folder, need=["day1_2"])
    with pytest.raises(ValueError, match="unknown day 'day9'"):
        w.read_week(folder, need=["day9"])


@pytest.mark.parametrize(
    "record, says",
    [
        ({"status": "failed", "error": "ValueError: no such\n file"}, "failed: ValueError: no such file"),
        ({"status": "running"}, "running"),
        ("{torn", "torn"),
        ({"files": ["day0_sanity_check/gone.png"]}, "incomplete"),
    ],
)
def test_a_day_that_did_not_end_is_missing_with_its_reason(make, record, says):
    def edit(folder):
        file = folder / w.DAYS["day0"] / "run.json"
        file.write_text(record if isinstance(record, str) else json.dumps(json.loads(file.read_text()) | record))

    week = make(edit)
    assert week.days["day0"].record is None and says in week.days["day0"].why and week.days["day5"].record


def test_an_older_protocol_is_stale_and_two_sets_of_weights_never_share_a_week(make):
    def older(folder):
        file = folder / w.DAYS["day0"] / "run.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"protocol": 0}))

    folder = make(older, read=False)
    assert (
        "older protocol" in w.read_week(folder).days["day0"].why and w.read_week(folder, mixed=True).days["day0"].record
    )

    def marked(folder):
        for day, mark in (("day0", "one"), ("day3_4", "another")):
            file = folder / w.DAYS[day] / "run.json"
            record = json.loads(file.read_text())
            record["parameters"]["model"], record["notes"]["fingerprint"] = "some/model", mark
            file.write_text(json.dumps(record))

    folder = make(marked, read=False)
    with pytest.raises(ValueError, match="different weights.*one in day0_sanity_check; another in day3_4"):
        w.read_week(folder)
    assert w.read_week(folder, mixed=True).days["day0"].record


def test_a_baseline_with_a_sanity_check_of_its_own_has_its_perplexity(make):
    def add(folder):
        twin = folder / f"{w.DAYS['day0']}-mixtral"
        twin.mkdir()
        record = json.loads((folder / w.DAYS["day0"] / "run.json").read_text())
        (twin / "run.json").write_text(
            json.dumps(record | {"run_id": "twin", "files": [], "parameters": {"model": "Mixtral-8x7B"}, "notes": {}})
        )
        (twin / "perplexity.json").write_text(
            json.dumps({"wikitext": {"perplexity": 9.5, "interval": [9, 10], "texts": 64}})
        )

    c = cells(make(add))["Mixtral-8x7B"]["ppl"]
    assert (c.value, c.run_id, c.run) == (9.5, "twin", "day0_sanity_check-mixtral")


def test_a_model_that_no_day_names_is_traced_to_the_sixth_day(make, tmp_path):
    from transformers import LlamaConfig

    LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=50
    ).save_pretrained(tmp_path / "dense")
    week = make(without=["day5"])
    summary, _ = w.write_week(week, week.folder / w.DAYS["day6"], [str(tmp_path / "dense")], run_id="today")
    found = [
        c for t in summary["tables"].values() for c in t["cells"] if c["row"] == "dense" and c["value"] is not None
    ]
    assert {(c["run"], c["run_id"]) for c in found} == {("day6_final", "today")} and {c["column"] for c in found} == {
        "Total",
        "Active",
        "Experts",
        "k",
        "Router",
    }


def test_signs_of_the_ablation(make):
    for effect in (0.2, -0.3):
        table = w.ablation_table(make(change=effect))
        c = dict(table.rows)["spectra_no_gru"]["change"]
        assert c.value == effect and c.n == 3 and f"{effect:+.3f}" in w.fill_file("table.tex.j2", t=table)


def test_the_reason_of_a_dash_is_the_one_that_the_day_computed(make):
    def edit(s):
        s["ablation"][-1]["reason"] = "computed <today> & now"

    table = w.ablation_table(make(change("day5", "efficiency_report.json", edit)))
    assert dict(table.rows)["no_explicit_bias"]["change"].why == "day5_efficiency: computed <today> & now"
    assert r"computed $<$today$>$ \& now" in w.fill_file("table.tex.j2", t=table)


def test_ids_of_the_ablation_runs_are_named(make, tmp_path):
    run = tmp_path / "results" / "spectra" / "spectra_no_gru-0"
    run.mkdir(parents=True)
    (run / "run.json").write_text(json.dumps({"parameters": {"router": "spectra_no_gru"}, "run_id": "abc123"}))
    tex = w.fill_file("table.tex.j2", t=w.ablation_table(make(), tmp_path / "results"))
    assert "spectra/spectra_no_gru-0 abc123" in tex


OUTCOMES = [  # claim, holds, does not hold, not measured
    ("balance", {}, {"cv": 0.2}, {"aux": {}}),
    ("specialisation", {}, {"domains": False}, {"without": ["day3_4"]}),
    ("trajectory", {}, {"coherent": False}, {"without": ["day3_4"]}),
    ("orthogonality", {}, {"coherent": False}, {"without": ["day3_4"]}),
    ("efficiency", {}, {"speed": {"Tiny-16E": 50.0, "Mixtral-8x7B": 100.0}}, {"speed": {"Tiny-16E": 50.0}}),
    ("performance", {"n": 400}, {"scores": {"Tiny-16E": 0.4, "Mixtral-8x7B": 0.6}}, {"without": ["day1_2"]}),
    ("go", {}, {"cv": 0.4}, {"without": ["day0"]}),
    ("half", {}, {"scores": {"Tiny-16E": 0.4, "Mixtral-8x7B": 0.6}}, {"scores": {"Tiny-16E": 0.4}}),
    ("heatmaps", {}, {"domains": False}, {"without": ["day3_4"]}),
    ("throughout", {}, {"share_below": 0.98}, {"without": ["day0"]}),
    ("figures", {}, None, {"without": ["day3_4"]}),
]


@pytest.mark.parametrize("name, holds, fails, open_", OUTCOMES, ids=[o[0] for o in OUTCOMES])
def test_every_claim_can_come_out_each_way(make, name, holds, fails, open_):
    for how, wanted in ((holds, "holds"), (fails, "does not hold"), (open_, "not measured")):
        if how is None:
            continue
        week = make(**how)
        out = week.folder / w.DAYS["day6"]
        claim = {c["key"]: c for c in w.write_week(week, out)[0]["claims"]}[name]
        assert claim["verdict"] == wanted, claim
        assert (
            claim["value"]
            and claim["evidence"]
            and f"[{wanted}] {claim['text']}" in (out / "final_report.txt").read_text()
        )


def test_a_figure_counts_with_data_content_and_resolution(make, monkeypatch):
    week = make()
    heatmap = week.folder / w.DAYS["day3_4"] / "domain_heatmaps.png"
    assert w.judge_figures(week)[0] is True
    for how, says in (({"dpi": 72}, "domain_heatmaps.png (72 dpi)"), ({"blank": True}, "domain_heatmaps.png (blank)")):
        draw(heatmap, **how)
        ok, _, values = w.judge_figures(week)
        assert ok is False and values["bad"] == says and values["good"] == 7
    draw(heatmap)
    monkeypatch.setenv("MOE_ROUTING_FIGURE_DPI", "400")  # what the settings ask for and the figures do not have
    assert w.judge_figures(week)[0] is False and "300 dpi" in w.judge_figures(week)[2]["bad"]
    monkeypatch.delenv("MOE_ROUTING_FIGURE_DPI")
    ok, _, values = w.judge_figures(make(change("day0", "metrics.json", lambda s: s.update(log=None))))
    assert ok is None and values["good"] == 4 and "cv_curve.png (metrics.json has no log.last.cv)" in values["gaps"]


def test_broken_tables_are_said(make, monkeypatch):
    week = make()
    out = week.folder / w.DAYS["day6"]
    w.write_week(week, out)
    monkeypatch.setattr(w, "latex_engine", lambda: None)
    assert w.judge_tables(out)[0] is None and "no LaTeX engine" in w.judge_tables(out)[2]["why"]
    (out / "table3_specifications.tex").unlink()
    assert w.judge_tables(out) == (False, "", {"why": "table3_specifications.tex is not there"})


@pytest.mark.parametrize(
    "cv, floor, wanted", [(0.5, 0.05, "does not hold"), (0.05, 0.02, "not measured"), (0.5, 0.4, "not measured")]
)
def test_without_a_log_the_models_own_load_can_only_refute(make, cv, floor, wanted):
    week = make(
        change("day0", "metrics.json", lambda s: s.update(log=None, layers=[{"cv": cv, "cv_random": floor}] * 3))
    )
    verdict = {True: "holds", False: "does not hold", None: "not measured"}
    assert verdict[w.judge_balance(week)[0]] == wanted and w.judge_throughout(week)[0] is None


def test_one_gate_for_each_layer_is_no_evidence_about_a_gru(make):
    week = make(
        change(
            "day3_4",
            "specialization_report.json",
            lambda s: (
                s["trajectory"].update(ids_align=False) or [r.update(kind="gate") for r in s["orthogonality"]] and None
            ),
        )
    )
    w.write_week(week, week.folder / w.DAYS["day6"])
    said = (week.folder / w.DAYS["day6"] / "final_report.txt").read_text()
    assert w.judge_trajectory(week)[0] is w.judge_orthogonality(week)[0] is None
    assert "do not align" in said and "these are gate vectors" in said


ROW = r"a & b \\"
GOOD = (
    "\\begin{tabular}{lr}\n\\toprule\n"
    + ROW
    + "\n\\midrule\n1\\_2 & $x_1$ \\\\ % a_b & #\n\\multicolumn{2}{l}{x} \\\\\n\\bottomrule\n\\end{tabular}\n"
)


def test_the_reading_accepts_what_is_sound():
    assert check_latex(GOOD) == []


@pytest.mark.parametrize(
    "old, new, says",
    [
        (ROW, r"a & b & c \\", "3 columns"),
        (ROW, r"a \\", "1 columns"),
        (ROW, r"a_1 & b \\", "unescaped _"),
        (ROW, r"a# & b \\", "unescaped #"),
        (ROW, r"a^ & b \\", r"unescaped \^"),
        (ROW, r"{a & b \\", "not closed|closes"),
        (ROW, r"a} & b \\", "without {"),
        (ROW, r"$a & b \\", r"\$ without|unescaped"),
        (ROW, "a & 模 \\\\", r"U\+6A21"),
        (ROW, r"\nosuch a & b \\", "unknown command"),
        ("\\end{tabular}", "", "not closed"),
        ("\\end{tabular}", "\\end{table}", "closes tabular"),
        ("\\begin{tabular}{lr}", "", "closes nothing|outside a table"),
        ("\\bottomrule", "z & y", "does not end"),
    ],
)
def test_the_reading_finds_what_breaks_a_table(old, new, says):
    found = check_latex(GOOD.replace(old, new, 1))
    assert found and re.search(says, " ".join(found)), found


@pytest.mark.parametrize(
    "name",
    [
        "a_b & 50% #1 {x} \\n ~ ^ < > | \" ' `",
        "R² 模型 é ß ± − ∞ \u202e",
        "$$$",
        "\\input{/etc/passwd}",
        "\n%\n\\\\",
        "A]{B",
    ],
)
def test_any_name_becomes_sound_latex(make, name):
    week = make(scores={"Tiny-16E": 0.7, name: 0.5})
    w.write_week(week, week.folder / w.DAYS["day6"], baselines=[{"name": name}])
    assert faults_of(week.folder / w.DAYS["day6"]) == []


def test_the_tables_compile(make):
    "By an engine where there is one; by reading everywhere."
    week = make(scores={"Tiny-16E": 0.7, "Mixtral_8x7B & é #1 100%": 0.5}, without=["day0"])
    out = week.folder / w.DAYS["day6"]
    w.write_week(week, out, baselines=[{"name": "LLaMA-3-8B"}])
    assert faults_of(out) == []
    if engine := w.latex_engine():
        assert w.compile_latex(out / "tables.tex", engine).startswith(b"%PDF") and w.judge_tables(out)[0] is True
    broken = (out / "table2_ablation.tex").read_text().replace(r"\end{tabular}", "")
    (out / "table2_ablation.tex").write_text(broken)
    assert faults_of(out) and w.judge_tables(out)[0] is (False if engine else None)
    assert not list(out.glob("*.aux")) and not list(out.glob("*.log"))


@pytest.mark.parametrize(
    "script, problem",
    [
        ("for a; do case $a in -output-directory=*) echo '%PDF-1.5' > ${a#*=}/tables.pdf;; esac; done", None),
        ("test -f table1_comparison.tex && echo '! Undefined control sequence.'; exit 1", "Undefined control sequence"),
        ("exit 0", "cannot compile"),
    ],
)
def test_what_an_engine_says_is_passed_on(make, tmp_path, monkeypatch, script, problem):
    week = make()
    out = week.folder / w.DAYS["day6"]
    w.write_week(week, out)
    engine = tmp_path / "bin" / "pdflatex"
    engine.parent.mkdir()
    monkeypatch.setenv("PATH", f"{engine.parent}{os.pathsep}{os.environ['PATH']}")
    engine.write_text(f"#!/bin/sh\n{script}\n")
    engine.chmod(engine.stat().st_mode | stat.S_IXUSR)
    ok, _, values = w.judge_tables(out)
    assert ok is (problem is None) and (ok or problem in values["why"])
    with pytest.raises(ValueError, match="LaTeX engine"):
        w.compile_latex(out / "tables.tex", "word")


def test_counted_parameters():
    from moe_routing.models.load import TinyRecipe, model_size, tiny_config

    found, size = specification("tiny"), model_size(tiny_config(TinyRecipe()))
    assert (found["total"], found["active"]) == (size["parameters"], size["active"])
    half = specification("tiny", k=found["experts"] / 2)
    assert half["total"] - half["active"] == pytest.approx(
        (found["total"] - found["active"]) * 0.5 / (1 - found["k"] / found["experts"]), rel=1e-6
    )
    with pytest.raises(ValueError, match="experts a token"):
        specification("tiny", k=1000)
    with pytest.raises(FileNotFoundError, match="no/such"):
        specification("no/such")


def test_a_dense_model_and_one_with_routers_of_its_own(tmp_path):
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig
    from moe_routing.models.load import TinyRecipe, tiny_config

    LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=50,
    ).save_pretrained(tmp_path / "dense")
    dense = specification(str(tmp_path / "dense"))
    assert dense["total"] == dense["active"] and dense["router"] == "none (dense)"
    tiny_config(TinyRecipe()).save_pretrained(tmp_path / "best")
    before = specification(str(tmp_path / "best"))
    save_file({"0.gru": torch.zeros(7, 11)}, tmp_path / "best" / "routers.safetensors")
    (tmp_path / "best" / "training.json").write_text(json.dumps({"recipe": {"router": "spectra", "k": 4}}))
    after, r = specification(str(tmp_path / "best")), TinyRecipe()
    assert (
        after["router"] == "spectra"
        and after["k"] == 4
        and after["total"] == before["total"] + 77 - r.layers * r.hidden * r.num_experts
    )


def test_speeds_are_quoted_at_one_point_that_most_models_have(make):
    def edit(s):
        for r in s["grid"]:
            if r["model"] == "Mixtral-8x7B" and r["batch_asked"] == 4:
                r.update(output_throughput=None, reason="CUDA out of memory")

    week = make(change("day5", "efficiency_report.json", edit))
    assert w.speed_point(week) == (512, 1) and np.isfinite(cells(week)["Mixtral-8x7B"]["speed"].value)
    assert "CUDA out of memory" in w.speed_cell(week, w.week_rows(week)[1], (512, 4)).why
