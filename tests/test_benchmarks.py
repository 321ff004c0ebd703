"""Benchmarks: every promise has a place that exists and a verdict that can come out each way; records are read as they
are; what is measured is a run."""

import json
import re

import pandas as pd
import pytest
import yaml
from conftest import ROOT

from moe_routing.runs.study import Plan, plan_study, read_records
from moe_routing.studies import benchmarks as chapter
from moe_routing.studies.benchmarks import (
    draw_benchmarks,
    machine,
    measure_benchmarks,
    measured,
    of_target,
    promised,
    read_benchmarks,
)
from moe_routing.studies.findings import Finding, write_findings

ASKED = read_benchmarks()
TOPICS, PROMISES = ASKED["topics"], ASKED["promises"]
RECORD = ROOT / "papermill_runs" / "benchmarks"


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


@pytest.mark.parametrize("target", ["reported", "none", "equal", "> 0", "", "nan", None])
def test_what_promises_nothing(target):
    assert of_target(1.0, target) is None


# --- what was measured


def test_every_benchmark_is_a_template_a_group_of_the_study_and_has_a_topic():
    templates = {p.stem.removeprefix("bench_") for p in (ROOT / "nbs" / "runs").glob("bench_*.ipynb")}
    plan = plan_study("benchmarks")
    assert set(TOPICS) == templates == set(plan.runs)
    assert all(plan.template(n) == f"bench_{n}" and plan.runs[n]["smoke"] is False for n in plan.runs)


def test_every_published_row_agrees_with_its_verdict():
    table = measured(RECORD, TOPICS)
    assert len(table) == sum(len(r["notes"]["rows"]) for r in read_records(RECORD))
    judged = table[table.share.notna() & table.reached.notna()]
    assert len(judged) > 50 and ((judged.share.astype(float) <= 1) == judged.reached.astype(bool)).all()
    assert table.commit.str.match(r"[0-9a-f]{10}").all() and table.date.str.match(r"20\d\d-\d\d-\d\d$").all()


def record(folder, name, rows, **facts):
    folder.mkdir(parents=True, exist_ok=True)
    line = {
        "run": name,
        "template": f"bench_{name}",
        "group": name,
        "parameters": {},
        "status": "finished",
        "metrics": {},
    }
    line |= {"started": "2026-01-01T10:00:00+00:00", "commit": "0123456789abcdef", "dirty": False, "devices": ["cpu"]}
    with open(folder / "runs.jsonl", "a") as file:
        file.write(json.dumps(line | {"notes": {"rows": rows}} | facts) + "\n")


def row(**other):
    return {"what": "fast / slow", "ratio": 0.5, "low": 0.4, "high": 0.6, "target": "<= 1", "met": True} | other


def test_rows_tell_what_was_promised_and_where_it_was_measured(tmp_path):
    record(tmp_path, "tiny", [row(), row(ratio=1.2, met=False), row(target="reported"), row(target=None)])
    record(tmp_path, "bh", [row(ratio=None, value=3.0, target=">= 2")], dirty=True, cores=2, load=[0.5, 1.25])
    table = measured(tmp_path, {"bh": "first", "tiny": "second"})
    assert table.benchmark.tolist() == ["bh", "tiny", "tiny", "tiny", "tiny"]
    assert table.reached.tolist() == [True, True, False, None, None] and table.figure[0] == 3
    assert "uncommitted" in table.commit[0] and table.commit[1] == "0123456789"
    assert table.machine.tolist()[:2] == ["cpu, 2 cores, load 0.5 before and 1.25 after", "cpu"]


def test_a_run_that_failed_has_no_rows_and_an_unknown_benchmark_is_named(tmp_path):
    record(tmp_path, "bh", [row()])
    record(tmp_path, "tiny", [row()], status="failed")
    assert measured(tmp_path, {"bh": "first", "tiny": "second"}).benchmark.tolist() == ["bh"]
    with pytest.raises(ValueError, match="unknown topic of a benchmark 'tiny'"):
        measured(tmp_path, {"bh": "first"})


def test_a_machine_that_is_not_recorded_is_unknown():
    assert machine({"devices": None}) == "unknown device"


def test_the_picture_shows_figures_with_a_target_as_shares(tmp_path):
    rows = [row(), row(what="late / early", ratio=1.2, low=1.1, high=1.4), row(what="size", target="reported")]
    record(tmp_path, "bh", rows)
    fig, behind = draw_benchmarks(measured(tmp_path, {"bh": "first"}))
    labels = [t.get_text() for t in fig.axes[0].get_yticklabels()]
    assert behind.what.tolist() == ["fast / slow", "late / early"] and labels[-1] == "fast / slow  [first]"
    assert behind.iloc[1].share == 1.2 and behind.iloc[1].most == 1.4 and len(labels) == 2


# --- promises


def test_every_promise_has_a_place_that_exists():
    for p in PROMISES:
        if "test" in p:
            file, name = p["test"].split("::")
            assert re.search(rf"^def {name}\(", (ROOT / file).read_text(), re.M), p["test"]
        else:
            study = p.get("minutes") or p["finding"].partition(":")[0]
            assert (ROOT / "papermill_runs" / "studies" / f"{study}.yaml").is_file(), study


@pytest.mark.parametrize(
    "change, said",
    [
        ({"test": None}, "exactly one of finding, minutes, test"),
        ({"minutes": "routers"}, "exactly one of finding, minutes, test"),
        ({"target": None}, "needs the keys target, test, topic, what"),
        ({"value": "x"}, "needs the keys"),
        ({"topic": "bhh"}, "unknown topic of promise 1"),
    ],
)
def test_a_broken_promise_is_named(tmp_path, change, said):
    good = {"topic": "foundation", "what": "speed", "target": "<= 1", "test": "tests/test_x.py::test_y"}
    broken = {k: v for k, v in {**good, **change}.items() if v is not None}
    (file := tmp_path / "benchmarks.yaml").write_text(yaml.safe_dump({"topics": TOPICS, "promises": [broken]}))
    with pytest.raises(ValueError) as error:
        read_benchmarks(file)
    assert str(file) in str(error.value) and said in str(error.value)


@pytest.mark.parametrize("text", ["topics: {}", "[1]", "topics: {", ""])
def test_a_broken_file_is_named(tmp_path, text):
    (file := tmp_path / "benchmarks.yaml").write_text(text)
    with pytest.raises(ValueError, match="benchmarks.yaml.*topics and promises are expected"):
        read_benchmarks(file)


@pytest.mark.parametrize("recall, seconds, reached", [(0.9, 600, [True, True]), (0.8, 6000, [False, False])])
def test_promises_of_studies_come_out_each_way(tmp_path, recall, seconds, reached):
    (folder := tmp_path / "papermill_runs" / "demo").mkdir(parents=True)
    for name in ("a", "b", "prepare"):
        record(folder, name, [], seconds=seconds)
    write_findings(folder, [Finding("demo.recall", "{recall}", {"recall": recall}, ("c",))])
    shared = {"topic": "prediction", "what": "w"}
    by_finding = {**shared, "target": ">= 0.85", "finding": "demo:demo.recall", "value": "recall"}
    by_time = {**shared, "target": "<= 15", "minutes": "demo", "processes": 2}
    table, runs = promised([by_finding, by_time, {**shared, "target": "equal", "test": "tests/x.py::y"}], tmp_path)
    assert table.reached.tolist() == [*reached, None] and runs == ["a", "b", "c"]
    assert table.figure[1] == 2 * seconds / 60 / 2
    with pytest.raises(ValueError, match="unknown value of demo:demo.recall 'recal'"):
        promised([{**by_finding, "value": "recal"}], tmp_path)
    with pytest.raises(ValueError, match="did you mean 'demo.recall'"):
        promised([{**by_finding, "finding": "demo:demo.recal"}], tmp_path)


# --- measuring


def test_an_unknown_benchmark_is_refused_before_any_is_run(monkeypatch):
    monkeypatch.setattr(chapter, "execute", lambda *a, **k: pytest.fail("nothing was to be run"))
    with pytest.raises(ValueError, match="bhh.*bh"):
        measure_benchmarks(["bh", "bhh"])


def test_a_benchmark_is_measured_again_and_says_how_busy_the_machine_was(tmp_path, monkeypatch):
    plan = plan_study("benchmarks")
    plan = Plan(plan.study, tmp_path, plan.runs, None, {}, {})
    for name in ("bh", "tiny"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text('{"old": true}')
    done = []

    def execute(plan, name, root, threads):
        assert not (tmp_path / name / "run.json").exists()
        done.append(name)
        return {"run": name}

    monkeypatch.setattr(chapter, "plan_study", lambda *a, **k: plan)
    monkeypatch.setattr(chapter, "execute", execute)
    assert measure_benchmarks(["tiny"]) is plan and done == ["tiny"]
    said = json.loads((tmp_path / "tiny" / "run.json").read_text())
    assert len(said["load"]) == 2 and said["cores"] > 0
    assert json.loads((tmp_path / "bh" / "run.json").read_text()) == {"old": True}


# --- the report


def test_the_report_tells_what_was_missed(tmp_path, monkeypatch):
    "The cells of the notebook, on a record with one miss and on promises that tests keep."
    record(tmp_path / "record", "bh", [row(), row(what="late / early", ratio=1.2, met=False)])
    names, shown = {"__name__": "__main__"}, []
    for cell in json.loads((ROOT / "nbs" / "studies" / "benchmarks.ipynb").read_text())["cells"]:
        if cell["cell_type"] != "code":
            continue
        exec(compile("".join(cell["source"]), "benchmarks.ipynb", "exec"), names)
        if "parameters" in cell["metadata"].get("tags", []):
            (tmp_path / "out").mkdir()
            names |= {"record": str(tmp_path / "record"), "out": str(tmp_path / "out")}
            monkeypatch.setattr("moe_routing.studies.report.show", shown.append)
            tests = [p for p in PROMISES if "test" in p]
            monkeypatch.setattr(chapter, "read_benchmarks", lambda: {"topics": TOPICS, "promises": tests})
    said = {f["key"]: f for f in json.loads((tmp_path / "out" / "findings.json").read_text())}
    assert said["bench.reached"]["values"] == {"n": 2, "reached": 1, "missed": 1, "benchmarks": 1, "topics": 1}
    assert said["bench.reached"]["runs"] == ["bh"] and said["bench.kept"]["values"]["tests"] == len(tests)
    page = "\n".join(shown)
    assert page.count("late / early") == 2 and page.count("fast / slow") == 1
    assert len(pd.read_csv(tmp_path / "out" / "benchmarks-shares.csv")) == 2
