"""Benchmarks: every promise has a place that exists, and a verdict that can come out each way."""

import json
import re

import pandas as pd
import pytest

from conftest import ROOT
from moe_routing.studies import benchmarks
from moe_routing.studies.benchmarks import (
    PROMISES,
    TOPICS,
    benchmarks_text,
    draw_benchmarks,
    of_target,
    promised,
    run_benchmarks,
)
from moe_routing.runs.run import code_hash, template_path


@pytest.mark.parametrize(
    "target, reached, missed",
    [
        ("<= 1.6", 1.5, 1.7),
        ("< 0.05", 0.04, 0.06),
        (">= 1.7", 1.8, 1.6),
        (">= 0.50 (chance 0.25)", 0.6, 0.4),
        ("0.95 to 1.05", 1.04, 1.06),
        ("0.97 .. 1.03", 0.98, 0.96),
        ("flat: <= 1.10", 1.0, 1.2),
    ],
)
def test_a_target_is_reached_on_one_side(target, reached, missed):
    assert of_target(reached, target) < 1 < of_target(missed, target)


@pytest.mark.parametrize("target", ["reported", "none", "equal", "> 0", "", "nan"])
def test_what_promises_nothing(target):
    assert of_target(1.0, target) is None


def test_every_measured_row_agrees_with_its_verdict():
    table = pd.read_csv(ROOT / "figures" / "benchmarks.csv")
    assert (
        set(table.benchmark)
        == set(TOPICS)
        == {p.stem.removeprefix("bench_") for p in (ROOT / "nbs" / "runs").glob("bench_*.ipynb")}
    )
    for r in table.assign(figure=table.ratio.fillna(table.value)).itertuples():
        share = of_target(r.figure, r.target)
        if share is not None and "identical" not in r.target:
            assert (share <= 1) == bool(r.met), r.what


def test_every_promise_has_a_place_that_exists():
    for p in PROMISES:
        if p.value is None:
            file, name = p.where.split("::")
            assert re.search(rf"^def {name}\(", (ROOT / file).read_text(), re.M), p.where
        else:
            assert (ROOT / "papermill_runs" / "studies" / f"{p.where}.yaml").is_file(), p.where


def record(folder, name, template, metrics, **parameters):
    (folder / name).mkdir(parents=True)
    (folder / name / "run.json").write_text(
        json.dumps(
            {
                "study": folder.name,
                "group": "",
                "template": template,
                "run_id": name,
                "parameters": parameters,
                "settings": {},
                "code": code_hash(template_path(template, ROOT)),
                "commit": None,
                "dirty": False,
                "seed": 0,
                "status": "finished",
                "error": None,
                "metrics": metrics,
                "documents": {},
                "notes": {},
                "files": [],
                "seconds": 600.0,
            }
        )
    )


@pytest.mark.parametrize(
    "recall, control, spread, verdicts",
    [(0.9, 100.0, 0.04, ["yes", "yes", "yes"]), (0.8, 99.9, 0.2, ["no", "no", "no"])],
)
def test_promises_of_studies_come_out_each_way(tmp_path, recall, control, spread, verdicts):
    record(
        tmp_path / "prediction",
        "a-pre_attention-b",
        "predict_experts",
        {"recall_history": recall, "gain_history": 0.1, "control_agreement": control},
    )
    record(
        tmp_path / "balance",
        "q",
        "train_router",
        {"layer_max_violation": [0.01 + spread, 0.02], "layer_floor_maxvio": [0.01, 0.01]},
        router="quantile",
    )
    found = promised(tmp_path).set_index("what").reached
    assert [
        found["slot recall before attention, best learned"],
        found["own-gate control, smallest agreement in %"],
        found["quantile balancing, worst layer's MaxVio over the floor, mean over seeds"],
    ] == verdicts
    assert found["the week on the embedded model, minutes"] == "not measured"


def test_the_page_says_what_was_missed_and_by_which_code():
    table = pd.DataFrame(
        {
            "benchmark": ["bh", "tiny"],
            "what": ["fast / slow", "late / early"],
            "ratio": [1.2, 0.5],
            "low": [1.1, 0.4],
            "high": [1.3, 0.6],
            "target": ["<= 1", "<= 1"],
            "met": [False, True],
        }
    )
    page = benchmarks_text(table, "CPU", {"bh": "today", "tiny": "2026-01-01; stale: by other code"})
    missed = page.split("## Missed")[1].split("##")[0]
    assert "fast / slow" in missed and "late / early" not in missed and "stale: by other code" in page
    assert draw_benchmarks(table).axes[0].get_yticklabels()[0].get_text().startswith(("fast", "late"))


def test_an_unknown_benchmark_is_refused_before_any_is_run(monkeypatch):
    monkeypatch.setattr(benchmarks, "write_page", lambda root: pytest.fail("nothing was to be written"))
    with pytest.raises(ValueError, match="bhh.*bh"):
        run_benchmarks(["bh", "bhh"])
