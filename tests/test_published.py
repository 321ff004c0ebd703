"""No published number without its run: a digit changed anywhere, a stale or a missing run, and what the committed tree says."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from conftest import ROOT
from moe_routing import published
from moe_routing.studies.benchmarks import write_page
from moe_routing.studies.bh import build_report
from moe_routing.studies.routers import _made_up_run
from moe_routing.runs.run import code_hash, resolve_parameters, template_path
from moe_routing.runs.study import plan_study
from moe_routing.studies.week import made_up_week

STUDY = """question: which of three routers, trained alike, is best?
template: train_router
base: {steps: 300, capacity_factor: 1.0}
seeds: [0, 1, 2]
groups:
  compute:
    grid: {router: [softk, switch, topk_aux]}
report: routers_report
report_options: {publish: true}
"""


def skeleton(root: Path) -> Path:
    "A repository with nothing in it but settings and templates."
    (root / "nbs" / "runs").mkdir(parents=True)
    for f in (ROOT / "nbs" / "runs").glob("*.ipynb"):
        shutil.copy(f, root / "nbs" / "runs")
    (root / "figures").mkdir()
    (root / "papermill_runs" / "studies").mkdir(parents=True)
    (root / "settings.ini").write_text("[moe_routing]\ndevice = cpu\n")
    return root


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    "A repository with one study, its report and its ledger."
    root, back = skeleton(tmp_path_factory.mktemp("published") / "book"), Path.cwd()
    (root / "papermill_runs" / "studies" / "made_up.yaml").write_text(STUDY)
    os.chdir(root)
    try:
        plan, rng = plan_study("made_up", root=root), np.random.default_rng(0)
        template = template_path("train_router", root)
        for name, point in plan.runs.items():
            group = point["group"]
            p = {
                **resolve_parameters(template, {k: v for k, v in point.items() if k != "group"}),
                "group": group,
                "num_experts": 8,
                "layers": 2,
            }
            loss = {"softk": 1.5, "switch": 1.6, "topk_aux": 1.55}[p["router"]] + rng.normal(0, 0.004)
            _made_up_run(
                plan.folder / name,
                p,
                loss,
                0.3 * np.random.default_rng(1).exponential(size=32),
                rng,
                {},
                {},
                {},
                code_hash(template),
                "train_router",
                True,
            )
            file = plan.folder / name / "run.json"
            record = json.loads(file.read_text())
            file.write_text(json.dumps({**record, "run_id": f"{abs(hash(name)) % 16**10:010x}"}))
        build_report(plan)
    finally:
        os.chdir(back)
    return root


@pytest.fixture
def root(built, tmp_path, monkeypatch):
    "A copy to spoil."
    copy = tmp_path / "book"
    shutil.copytree(built, copy)
    monkeypatch.chdir(copy)
    return copy


LEDGER = "papermill_runs/made_up/routers_report.numbers.json"
FILES = [
    "papermill_runs/made_up/routers_report.md",
    "papermill_runs/made_up/made_up_summary.csv",
    "figures/made_up-frontier.csv",
    "figures/made_up-expert_heatmap.csv",
    LEDGER,
]


def edit(file: Path, pattern: str = r"\d\.\d*(\d)") -> tuple[int, str, str]:
    "Change the last digit of the last match: line, old and new number."
    text = file.read_text()
    m = list(re.finditer(pattern, text))[-1]
    digit = str((int(m[1]) + 1) % 10)
    file.write_text(text[: m.start(1)] + digit + text[m.end(1) :])
    number = lambda t: next(
        f.text for f in published.numbers(t, file.suffix == ".csv") if f.start <= m.start(1) < f.start + len(f.text)
    )
    return text[: m.start(1)].count("\n") + 1, number(text), number(file.read_text())


def test_the_untouched_tree_passes(root):
    assert published.check_ledger(root / LEDGER, root) == []
    assert published.check_cover(root) == []


def test_the_ledger_says_which_run(root):
    made = published.read_ledger(root / LEDGER)
    assert len(made["runs"]) == 9 and made["study"] == "made_up" and (root / LEDGER).stat().st_size < 200_000
    rows = made["files"]["made_up_summary.csv"]
    assert (
        {e[2] for e in rows} == {"recorded", "about"}
        and all(len(e[1]) == 1 for e in rows)
        and len({e[1] for e in rows}) == 9
    )
    assert {e[2] for e in made["files"]["routers_report.md"]} >= {"about", "computed"}


@pytest.mark.parametrize("file", FILES[:-1])
@pytest.mark.parametrize("again", [False, True])
def test_a_digit_edited_in_a_published_file(root, file, again):
    line, old, new = edit(root / file)
    found = published.check_ledger(root / LEDGER, root, again)
    assert any(f.startswith(f"{file}:{line}: ") and "run" in f for f in found), found
    if file.endswith(".md"):
        assert any(new in f and old in f for f in found), found
    if again:
        assert any(f"{file}:{line}:" in f for f in found)


@pytest.mark.parametrize("file", FILES[:-1])
def test_a_forged_ledger_is_found_by_making_the_file_again(root, file):
    line, old, new = edit(root / file)
    made = published.read_ledger(root / LEDGER)
    records = published.records_of(made, root / "papermill_runs", root)
    words = (*published.words_of(made["made_by"]), plan_study("made_up", root=root).study.question)
    files = {
        f: published._entries((root / LEDGER).parent / f, words, list(records.values()), made["made_by"])
        for f in made["files"]
    }
    (root / LEDGER).write_text(published.ledger_text(made["made_by"], made["study"], made["runs"], files))
    assert published.check_ledger(root / LEDGER, root, again=False) == []
    found = published.check_ledger(root / LEDGER, root)
    assert len(found) == 1 and f"{file}:{line}: {new} stands there, the runs give {old}" in found[0]


def test_a_digit_edited_in_the_ledger(root):
    text = (root / LEDGER).read_text()
    entry = next(m for m in re.finditer(r'^\[(\d+), \d+, "about", "([^#"]*\d)"\]', text, re.M))
    last = entry.end(2) - 1
    (root / LEDGER).write_text(text[:last] + str((int(text[last]) + 1) % 10) + text[last + 1 :])
    found = published.check_ledger(root / LEDGER, root, again=False)
    assert (
        len(found) == 1
        and f"routers_report.md:{entry[1]}: " in found[0]
        and "run made_up/" in found[0]
        or "runs, first made_up/" in found[0]
    )


def test_another_run_named_in_the_ledger(root):
    made = published.read_ledger(root / LEDGER)
    rows = made["files"]["made_up_summary.csv"]
    i, j = [i for i, e in enumerate(rows) if e[2] == "recorded"][:2]
    rows[i], rows[j] = (rows[i][0], rows[j][1], *rows[i][2:]), (rows[j][0], rows[i][1], *rows[j][2:])
    (root / LEDGER).write_text(published.ledger_text(made["made_by"], made["study"], made["runs"], made["files"]))
    found = published.check_ledger(root / LEDGER, root, again=False)
    assert len(found) == 2 and all(
        "made_up_summary.csv" in f and "no longer comes from the same run" in f for f in found
    )


def a_run(root: Path) -> Path:
    return sorted((root / "papermill_runs" / "made_up").glob("*/run.json"))[0]


def test_a_digit_edited_in_run_json(root):
    edit(a_run(root), r'"val_loss": \d\.\d*(\d)')
    found = published.check_ledger(root / LEDGER, root)
    assert any(a_run(root).parent.name in f and "not the one that was published" in f for f in found)


def test_a_digit_edited_in_a_log_that_a_figure_reads(root):
    for f in (root / "papermill_runs" / "made_up").glob("*/loads.json"):
        loads = json.loads(f.read_text())
        loads["demand"][0][0] += 100
        f.write_text(json.dumps(loads))
    assert any(
        "figures/made_up-expert_" in f and "the runs give" in f for f in published.check_ledger(root / LEDGER, root)
    )


def test_a_stale_run(root):
    file = a_run(root)
    file.write_text(re.sub(r'"code": "\w+"', '"code": "0000000000"', file.read_text()))
    made = published.read_ledger(root / LEDGER)
    name = f"made_up/{file.parent.name}"
    made["runs"][name] = (
        made["runs"][name][0],
        published.digest(file.read_bytes()),
    )  # even where the ledger agrees with the record
    (root / LEDGER).write_text(published.ledger_text(made["made_by"], made["study"], made["runs"], made["files"]))
    found = published.check_ledger(root / LEDGER, root)
    assert any(f"{LEDGER}: built from 1 stale runs, first {name}" in f for f in found), found
    with pytest.raises(ValueError, match="1 of 9 runs are not finished by today's code"):
        build_report(plan_study("made_up", root=root))


def test_a_missing_run(root):
    file = a_run(root)
    shutil.rmtree(file.parent)
    found = published.check_ledger(root / LEDGER, root)
    assert any(f"run made_up/{file.parent.name} is gone" in f for f in found)


def test_a_failed_run(root):
    file = a_run(root)
    file.write_text(file.read_text().replace('"status": "finished"', '"status": "failed"'))
    assert any("is not finished" in f for f in published.check_ledger(root / LEDGER, root))


def test_a_missing_and_a_torn_ledger(root):
    (root / LEDGER).write_text((root / LEDGER).read_text()[:500])
    assert "is no ledger" in published.check_ledger(root / LEDGER, root)[0]
    assert {f.split(":")[0] for f in published.check_cover(root)} >= set(FILES[:-1])


def test_a_published_file_that_nobody_made(root):
    (root / "papermill_runs" / "made_up" / "summary.md").write_text("ours is 3 times faster\n")
    assert published.check_cover(root) == [
        "papermill_runs/made_up/summary.md: no ledger says which runs its numbers come from; `make figures` writes it"
    ]


def test_making_again_leaves_the_tree_alone(root):
    before = {f: f.read_bytes() for f in root.rglob("*") if f.is_file()}
    here = Path.cwd()
    published.made_again(root / LEDGER, root)
    assert Path.cwd() == here and {f: f.read_bytes() for f in root.rglob("*") if f.is_file()} == before


def test_build_all_makes_report_and_ledger_again(root):
    before = {f: (root / f).read_bytes() for f in FILES}
    for f in FILES:
        (root / f).unlink()
    said = []
    assert published.build_all(root, jobs=1, say=said.append) == 0
    assert {f: (root / f).read_bytes() for f in FILES} == before and "routers_report.md" in said[0]


def test_build_all_says_what_cannot_be_made(root):
    shutil.rmtree(a_run(root).parent)
    said = []
    assert (
        published.build_all(root, jobs=1, say=said.append) == 1
        and said[0].startswith("error: made_up: ")
        and "FRESH=1" in said[0]
    )


def test_a_program_that_names_its_runs(root):
    "The ledger of slides and papers: numbers in prose, tables and pages."
    run = f"made_up/{a_run(root).parent.name}"
    record = json.loads(a_run(root).read_text())
    ledger, page = published.Ledger("moe_routing.published:check"), root / "papermill_runs" / "made_up" / "page.html"
    loss = ledger.number(record["metrics"]["val_loss"], ".4f", record["run_id"], what="loss")
    page.write_text(
        f"<style>p {{margin: 3px}}</style>\n<p class='a1'>loss {loss}</p>\n{ledger.block('of 9 runs', [run])}\n"
    )
    made = published.read_ledger(ledger.save([page]))
    assert made["files"]["page.html"] == [(2, (run,), "given", loss), (3, (run,), "given", "9")]
    assert published.check_ledger(page.with_suffix(".numbers.json"), root, again=False) == []
    page.write_text(page.read_text().replace(loss, loss[:-1] + str((int(loss[-1]) + 1) % 10)))
    found = published.check_ledger(page.with_suffix(".numbers.json"), root, again=False)
    assert len(found) == 1 and f"page.html:2: " in found[0] and f"the ledger has {loss} (run {run})" in found[0]
    with pytest.raises(ValueError, match="1 numbers come from no run: page.html:2"):
        ledger.save([page])


@pytest.mark.parametrize("runs", [[], "tomorrow", ["0123"], [3], None])
def test_a_number_without_a_run_is_refused(runs):
    with pytest.raises((ValueError, TypeError)):
        published.Ledger("moe_routing.published:check").number(1.5, ".1f", runs)


def test_a_run_that_is_not_committed_is_refused(root):
    ledger, page = published.Ledger("moe_routing.published:check"), root / "page.md"
    page.write_text(ledger.number(1.5, ".1f", "ffffffffff"))
    with pytest.raises(ValueError, match="run ffffffffff has no run.json"):
        ledger.save([page])


def test_a_number_from_a_formula_names_it(root):
    ledger, page = published.Ledger("moe_routing.published:check"), root / "page.md"
    page.write_text(ledger.number(0.5, ".1f", formula="moe_routing.capacity:expected_drop_rate"))
    assert published.read_ledger(ledger.save([page]))["files"]["page.md"] == [
        (1, (), "moe_routing.capacity:expected_drop_rate", "0.5")
    ]


def benchmarks(root: Path) -> Path:
    file = root / "figures" / "benchmarks.csv"
    file.write_text(
        "benchmark,what,ratio,low,high,value,target,met\nbh,ladder against top-8,0.9863,0.8895,1.043,,<= 4,True\nquality,recalled,,0.8,0.9,0.85,>= 0.9,False\n"
    )
    published.record_benchmarks(root, ["bh", "quality"], "CPU")
    write_page(root)
    return file


@pytest.mark.parametrize("name", ["benchmarks.csv", "benchmarks.md"])
def test_a_digit_edited_in_the_benchmarks(root, name):
    benchmarks(root)
    assert published.check_benchmarks(root) == []
    edit(root / "figures" / name)
    assert any(f"figures/{name}:" in f for f in published.check_benchmarks(root))


def test_a_stale_and_an_unrecorded_benchmark(root):
    benchmarks(root)
    file = root / "figures" / "benchmarks.numbers.json"
    made = json.loads(file.read_text())
    made["benchmarks"]["bh"]["code"] = "0" * 10
    del made["benchmarks"]["quality"]
    file.write_text(json.dumps(made))
    unknown, *page = published.check_benchmarks(root)
    assert (
        "benchmark quality has no record" in unknown
        and "bench quality" in unknown
        and page
        and all("figures/benchmarks.md:" in f for f in page)
    )
    write_page(root)  # what other code measured may stay, where the page says so
    assert (
        published.check_benchmarks(root) == [unknown]
        and "stale: by other code" in (root / "figures" / "benchmarks.md").read_text()
    )


def front(root: Path, prose: str = "Trained with 64 experts.") -> list:
    from moe_routing._readme import write_readme

    quote = '#| echo: false\nfrom pathlib import Path\n(Path("..") / "papermill_runs" / "made_up" / "routers_report.md").read_text().split("## Answers")[1].split("\\n## ")[0].strip()'
    cells = [
        {"cell_type": "markdown", "id": "a", "metadata": {}, "source": f"# A book\n\n{prose}"},
        {"cell_type": "code", "id": "b", "metadata": {}, "execution_count": None, "outputs": [], "source": quote},
    ]
    index = root / "nbs" / "index.ipynb"
    index.write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    index.write_text(json.dumps(published.outputs_again(index)[0]))
    write_readme(root)
    (root / "nbs" / "declared_numbers.csv").write_text("text,why\nwith 64 experts,the embedded model has that many\n")
    return [f for made in published.ledgers(root) for f in published.files_of(made)]


def test_the_first_page(root):
    checked = front(root)
    assert published.check_front(root, checked) == []
    line, old, new = edit(root / "README.md", r"\d\.\d*(\d)")
    found = published.check_front(root, checked)
    assert len(found) == 1 and found[0].startswith(f"README.md:{line}: {new} stands there, the runs give {old}")


def test_the_first_page_quotes_only_what_is_checked(root):
    front(root)
    assert published.check_front(root, []) == [
        "README.md quotes papermill_runs/made_up/routers_report.md, which has no ledger"
    ]


@pytest.mark.parametrize(
    "prose, what",
    [
        ("Trained with 65 experts.", "65 is written in the prose"),
        ("Trained with 64 experts, 1.3 times faster.", "1.3 is written in the prose"),
        ("Trained with many experts.", "'with 64 experts' is not in the prose of README.md any more"),
    ],
)
def test_a_number_typed_into_the_first_page(root, prose, what):
    assert any(what in f for f in published.check_front(root, front(root, prose)))


def test_a_declared_number_needs_a_reason(tmp_path):
    (tmp_path / "d.csv").write_text("text,why\n64 experts,\n")
    with pytest.raises(ValueError, match="needs a number, a word beside it and a reason"):
        published.declared(tmp_path / "d.csv")


def test_the_tables_of_the_week(root):
    week = made_up_week(root / "papermill_runs" / "seven_day")
    home = week / "day6_final"
    home.mkdir(exist_ok=True)
    code = code_hash(template_path("day6_comparison_table", root))
    record = {
        "study": "seven_day",
        "group": "day6_final",
        "template": "day6_comparison_table",
        "run_id": "0123456789",
        "parameters": {"need": [], "mixed": False, "baselines": [], "text": "wikitext"},
        "code": code,
        "seed": None,
        "seconds": 1.0,
        "status": "finished",
        "error": None,
        "metrics": {},
        "documents": {},
        "notes": {},
        "files": [],
    }
    (home / "run.json").write_text(json.dumps(record))
    (
        (home / "final_report.txt").write_text("Key claims\n  [holds] mean 0.125\n"),
        (home / "final_summary.json").write_text('{"mean": 0.125}\n'),
    )
    made = published.write_tables(root)
    assert {"day6_final/final_report.txt", "day6_final/final_summary.json"} < set(published.read_ledger(made)["files"])
    assert "day6_final/table1_comparison.tex" in published.read_ledger(made)["files"]
    assert published.check_ledger(made, root) == []
    file = home / "table1_comparison.tex"
    line, old, new = edit(file, r"& [^%\n]*?\d\.\d*(\d)")
    found = published.check_ledger(made, root)
    assert len(found) == 1 and f"table1_comparison.tex:{line}: {new} stands there" in found[0] and old in found[0]
    for name in ("final_report.txt", "final_summary.json"):
        (home / name).write_text((home / name).read_text().replace("0.125", "0.126"))
    found = published.check_ledger(made, root, again=False)
    assert (
        len(found) == 3
        and any("final_report.txt:2: 0.126 stands there, the ledger has 0.125" in f for f in found)
        and any("final_summary.json" in f for f in found)
    )


# the committed tree


@pytest.mark.parametrize(
    "made", [os.path.relpath(f, ROOT) for f in published.ledgers(ROOT)] or ["papermill_runs/none.numbers.json"]
)
def test_what_is_published_is_what_the_runs_recorded(made):
    assert published.check_ledger(ROOT / made, ROOT) == []


def test_every_published_file_has_a_ledger():
    assert published.check_cover(ROOT) == []


def test_the_benchmarks_are_those_that_were_measured():
    assert published.check_benchmarks(ROOT) == []


def test_the_first_page_is_checked():
    checked = [f for made in published.ledgers(ROOT) for f in published.files_of(made)] + [
        ROOT / "figures" / f"benchmarks{s}" for s in (".csv", ".md")
    ]
    assert published.check_front(ROOT, checked) == []
