"""What is published is what its record makes: every report and finding is rendered again and compared byte for byte."""

import json

import pytest

from conftest import ROOT
from moe_routing.runs.run import made_on
from moe_routing.runs.study import load_runs, read_records
from moe_routing.studies.findings import Finding, find, read_findings, write_findings
from moe_routing.studies.report import publish_report, published_studies, render

STUDIES = published_studies(ROOT)
PUBLISHED = ROOT / "papermill_runs"


def test_there_is_something_published():
    assert {"bh_sweep", "routers", "spectra", "capacity", "balance"} <= set(STUDIES)


@pytest.mark.parametrize("study", STUDIES)
def test_the_report_is_what_its_record_makes(study, tmp_path):
    publish_report(study, ROOT, tmp_path)
    for name in ("findings.json", "report.md"):
        new, old = (tmp_path / name).read_text(), (PUBLISHED / study / name).read_text()
        assert new == old, f"run `make figures STUDY={study}`: {name} is not what runs.jsonl makes"
    linked = [w.split(")")[0] for w in (tmp_path / "report.md").read_text().split("](")[1:]]
    for name in [n for n in linked if n.endswith(".png")]:
        assert (tmp_path / name).stat().st_size > 5_000 and (PUBLISHED / study / name).is_file(), name


@pytest.mark.parametrize("study", STUDIES)
def test_a_record_is_whole_and_of_one_model(study):
    records = read_records(PUBLISHED / study)
    assert len({r["run"] for r in records}) == len(records) and all(r["status"] == "finished" for r in records)
    runs = load_runs(PUBLISHED / study)  # refuses two models
    assert len(runs) == sum(r["run"] != "prepare" for r in records), "stale runs are published"
    tiny = {made_on(r) for r in records if r["parameters"].get("model") == "tiny"}
    assert len(tiny - {None}) <= 1


@pytest.mark.parametrize("study", STUDIES)
def test_findings_name_runs_of_their_record(study):
    there = {r["run"] for r in read_records(PUBLISHED / study)}
    findings = read_findings(PUBLISHED / study)
    assert findings and all(set(f.runs) <= there for f in findings.values())
    assert any(f.runs for f in findings.values())


def test_nothing_is_rendered_half(tmp_path, monkeypatch):
    "A study that is not there, a broken line, an unknown notebook: one error, and no page."
    with pytest.raises(ValueError, match="bh_sweeep"):
        publish_report("bh_sweeep", ROOT, tmp_path)
    with pytest.raises(ValueError, match="study notebook"):
        render("no_such_notebook", tmp_path, root=ROOT)
    (tmp_path / "record").mkdir()
    (tmp_path / "record" / "runs.jsonl").write_text('{"run": "torn')
    with pytest.raises(RuntimeError, match="runs.jsonl, line 1"):
        render("bh", tmp_path / "out", {"study": "bh_sweep", "record": str(tmp_path / "record")}, ROOT)
    assert not list((tmp_path / "out").glob("report.*")) and not (tmp_path / "out" / "findings.json").exists()


def test_findings_are_refused_with_their_name(tmp_path):
    folder = tmp_path / "papermill_runs" / "demo"
    folder.mkdir(parents=True)
    one = Finding("demo.one", "One is {x:.1f}.", {"x": 1.0}, ("a",))
    with pytest.raises(ValueError, match="'demo.one' is said twice"):
        write_findings(folder, [one, one])
    write_findings(folder, [one])
    assert find("demo:demo.one", tmp_path) == one
    for key, words in (("demo:demo.two", "demo.one"), ("demo", "<study>:<finding>"), ("nothing:x", "findings.json")):
        with pytest.raises(ValueError, match=words):
            find(key, tmp_path)
    raw = json.loads((folder / "findings.json").read_text())
    for broken in ([{**raw[0], "values": {}}], [{"key": "x"}], {"key": "x"}):
        (folder / "findings.json").write_text(json.dumps(broken))
        with pytest.raises(ValueError, match="findings.json"):
            read_findings(folder)
