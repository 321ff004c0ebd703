"""Runs and studies: parameters, identity, state; and what is left after a kill -9 at any moment."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import nbformat
import psutil
import pytest

from conftest import ROOT
from moe_routing.runs import run as one
from moe_routing.runs import study as runs

TEMPLATE = """from moe_routing.runs.run import Run
run = Run(out)
import time
from pathlib import Path
for step in range(int(seconds * 10)):
    time.sleep(.1)
if alpha > 1: raise ValueError(f"alpha = {alpha} is outside (0, 1)")
if out:
    log = Path(out).parent / "logs" / f"{alpha}.txt"
    log.parent.mkdir(exist_ok=True)
    log.write_text(f"alpha {alpha}")
    run.finish(metrics={"twice": 2 * alpha}, files=[f"logs/{alpha}.txt"])"""


@pytest.fixture
def lab(tmp_path):
    "A repository with one template and one study of three runs."
    (tmp_path / "nbs" / "runs").mkdir(parents=True)
    (tmp_path / "settings.ini").write_text("[moe_routing]\ndevice = cpu\n")
    shutil.copytree(ROOT / "moe_routing", tmp_path / "moe_routing")
    (tmp_path / "papermill_runs" / "studies").mkdir(parents=True)
    shutil.copy(ROOT / "papermill_runs" / "Snakefile", tmp_path / "papermill_runs")
    shutil.copytree(ROOT / "papermill_runs" / "profiles", tmp_path / "papermill_runs" / "profiles")
    nb = nbformat.v4.new_notebook(
        metadata={"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}},
        cells=[
            nbformat.v4.new_code_cell("protocol = 1"),
            nbformat.v4.new_code_cell(
                'alpha = 0.3\nseconds = 0.0\nseed = 0\nout = ""', metadata={"tags": ["parameters"]}
            ),
            nbformat.v4.new_code_cell(TEMPLATE),
        ],
    )
    nbformat.write(nb, tmp_path / "nbs" / "runs" / "demo.ipynb")
    study(tmp_path, [0.1, 0.2, 0.3], seconds=0)
    return tmp_path


def study(lab, alphas, seconds):
    (lab / "papermill_runs" / "studies" / "demo.yaml").write_text(
        f"question: q\ntemplate: demo\nbase: {{seconds: {seconds}}}\ngroups: {{all: {{grid: {{alpha: {alphas}}}}}}}\n"
    )


def start(lab, verb=("run", "demo", "--cores", "2"), **environ):
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONPATH": str(lab), **environ}
    return subprocess.Popen(
        [sys.executable, "-m", "moe_routing", *verb],
        cwd=lab,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def finish(lab, *verb):
    process = start(lab, *([verb] if verb else []))
    return process.communicate(timeout=180)[0], process.returncode


def logs(lab):
    return {p.name: p.read_text() for p in (lab / "papermill_runs" / "local" / "demo" / "logs").iterdir()}


def our_processes(lab):
    found = []
    for p in psutil.process_iter(["cmdline", "cwd"]):
        if p.info["cwd"] == str(lab) and p.pid != os.getpid() and p.info["cmdline"]:
            found.append(p)
    return found


def find(lab, kind):
    words = {"snakemake": "snakemake", "papermill": "execute", "kernel": "ipykernel_launcher"}[kind]
    return [
        p
        for p in our_processes(lab)
        if any(words in a for a in p.info["cmdline"]) and "sh" != p.info["cmdline"][0].split("/")[-1][-2:]
    ]


def wait_for(what, seconds=60):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if found := what():
            return found
        time.sleep(0.1)
    raise AssertionError("nothing came")


def test_a_study_runs_once_and_a_second_time_does_nothing(lab):
    study(lab, [0.1, 0.2], seconds=0)
    text, code = finish(lab)
    assert code == 0 and "2 of 2 runs finished" in text
    times = {p: p.stat().st_mtime_ns for p in (lab / "papermill_runs" / "local" / "demo").rglob("run.json")}
    assert len(times) == 2
    text, code = finish(lab)
    assert code == 0 and {p: p.stat().st_mtime_ns for p in times} == times
    next(
        iter((lab / "papermill_runs" / "local" / "demo" / "logs").iterdir())
    ).unlink()  # a result that lost a file is not finished
    text, code = finish(lab)
    assert code == 0 and len(logs(lab)) == 2 and sum(p.stat().st_mtime_ns != t for p, t in times.items()) == 1


def test_one_failure_does_not_stop_the_rest_and_is_named(lab):
    study(lab, [0.1, 7, 0.3], seconds=0)
    text, code = finish(lab)
    assert code != 0 and "2 of 3 runs finished" in text
    said = [line for line in text.splitlines() if line.startswith("failed:")]
    assert len(said) == 1 and "alpha = 7.0 is outside (0, 1)" in said[0]
    failed = [json.loads(p.read_text()) for p in (lab / "papermill_runs" / "local" / "demo").glob("7*/run.json")]
    assert failed[0]["status"] == "failed" and (lab / "papermill_runs" / "local" / "demo").glob("7*/run.ipynb")
    assert "failed 1" in finish(lab, "status")[0]


@pytest.mark.parametrize("victim", ["snakemake", "papermill", "kernel", "everything"])
def test_kill_9_and_the_same_command_goes_on(lab, victim):
    alphas = (
        [0.1, 0.2, 0.3] if victim in ("snakemake", "everything") else [0.1, 0.2]
    )  # the third has not begun when the others are killed
    study(lab, alphas, seconds=2)
    first = start(lab)
    wait_for(lambda: list((lab / "papermill_runs" / "local" / "demo").glob("*/kernel.json")))
    if victim == "everything":
        os.killpg(first.pid, signal.SIGKILL)
    else:
        for p in wait_for(lambda: find(lab, victim))[:1]:
            p.send_signal(signal.SIGKILL)
    if victim in ("snakemake", "everything"):
        first.wait(timeout=60)
    else:
        first.communicate(timeout=180)
    text, code = finish(lab)
    assert code == 0, text
    assert logs(lab) == {f"{a}.txt": f"alpha {a}" for a in alphas}
    assert f"{len(alphas)} of {len(alphas)} runs finished" in text
    wait_for(lambda: not find(lab, "kernel") and not find(lab, "papermill"), 20)


def test_a_second_start_beside_a_living_one_is_refused(lab):
    study(lab, [0.1, 0.2], seconds=3)
    first = start(lab)
    wait_for(lambda: list((lab / "papermill_runs" / "local" / "demo").glob("*/kernel.json")))
    text, code = finish(lab)
    assert code != 0 and "is being run by process" in text
    assert first.communicate(timeout=120) and first.returncode == 0


def test_what_makes_a_result_stale(lab):
    "Another text of the template does not; a raised protocol does, and the next start does the run again."
    study(lab, [0.1], seconds=0)
    finish(lab)
    template, folder = lab / "nbs" / "runs" / "demo.ipynb", lab / "papermill_runs" / "local" / "demo"
    template.write_text(template.read_text().replace("2 * alpha", "3 * alpha - alpha"))
    for file in (lab / "moe_routing").rglob("*.py"):
        file.write_text(file.read_text() + "\n# reworded\n")
    assert "finished 1" in finish(lab, "status")[0] and len(runs.load_runs(folder, root=lab)) == 1
    template.write_text(template.read_text().replace("protocol = 1", "protocol = 2"))
    assert "stale 1" in finish(lab, "status")[0] and runs.load_runs(folder, root=lab).empty
    assert len(runs.load_runs(folder, stale=True, root=lab)) == 1
    text, code = finish(lab)
    assert code == 0 and "1 of 1 runs finished" in text
    assert json.loads(next(folder.glob("*/run.json")).read_text())["protocol"] == 2


def test_a_result_belongs_to_its_model(lab):
    "Two fingerprints of one model may not stand in one table; a run on another tiny model than ours is stale."
    folder = lab / "papermill_runs" / "local" / "demo"
    record = {"template": "demo", "protocol": 1, "status": "finished", "group": "g", "metrics": {"loss": 1.0}}
    for name, mark, steps in (("a", "one", 7), ("b", "two", 7), ("c", "three", 9)):
        (folder / name).mkdir(parents=True)
        known = {"parameters": {"model": "tiny", "steps": steps, "seed": 0}, "notes": {"fingerprint": mark}}
        (folder / name / "run.json").write_text(json.dumps(record | known))
    with pytest.raises(ValueError, match="'tiny' is 2 models: {'one': 'a', 'two': 'b'}"):
        runs.load_runs(folder, root=lab)
    shutil.rmtree(folder / "b")
    assert runs.load_runs(folder, root=lab).run.tolist() == ["a", "c"]  # trained for another number of steps
    shipped = {"parameters": {"model": "tiny"}, "notes": {"fingerprint": "one"}}
    assert runs.is_stale(record | shipped, lab)
    shipped["notes"]["fingerprint"] = one.expected_model({"model": "tiny"})
    assert not runs.is_stale(record | shipped, lab)


def test_published_results_are_compared_with_and_never_taken_over(lab):
    "A clone that holds the published record does every run itself, and says how far they are from the published ones."
    study(lab, [0.1, 0.2], seconds=0)
    finish(lab)
    local = lab / "papermill_runs" / "local" / "demo"
    for file in local.glob("*/run.json"):
        file.write_text(json.dumps({**json.loads(file.read_text()), "dirty": False}))
    published = runs.publish(runs.plan_study("demo", root=lab), lab)
    before = (published / "runs.jsonl").read_bytes()
    shutil.rmtree(local)
    text, code = finish(lab)
    assert code == 0 and "[  2/2]" in text and "2 of 2 runs agree with the published ones" in text
    lines = (published / "runs.jsonl").read_text().splitlines()
    lines[0] = lines[0].replace('"twice":', '"twice":1')
    (published / "runs.jsonl").write_text("\n".join(lines) + "\n")
    said = runs.compare_with_published(runs.plan_study("demo", root=lab), lab)
    assert said.startswith("1 of 2 runs agree") and "twice" in said
    (published / "runs.jsonl").write_bytes(before)
    found = runs.reproduce("demo", 1, root=lab, say=lambda line: None)
    assert len(found) == 2 and not any(found.values())


@pytest.mark.parametrize("line", ['{"run": "a"', '{"run": "a"}', "[]", "null"])
def test_a_broken_line_of_a_record_is_named(lab, line):
    file = lab / "papermill_runs" / "demo" / "runs.jsonl"
    file.parent.mkdir()
    file.write_text("\n" + line + "\n")
    with pytest.raises(ValueError, match=r"runs.jsonl, line 2: broken"):
        runs.load_runs(file.parent, root=lab)


def test_parameters_mean_what_a_person_means(lab):
    "The types of the defaults hold from the command line, from YAML and from a function call."
    study(lab, ["3e-1", 0.2], seconds=0)
    path = one.template_path("demo", lab)
    assert one.resolve_parameters(path, {"alpha": "3e-5", "seconds": 1})["alpha"] == 3e-5
    for given in ({"alpha": "much"}, {"alpha": True}, {"seed": 1.5}, {"seconds": [1]}):
        with pytest.raises(ValueError, match=f"demo: {next(iter(given))} = .* is no "):
            one.resolve_parameters(path, given)
    first = runs.plan_study("demo", root=lab).runs
    study(lab, [0.3, 0.2], seconds=0)
    assert [n[-6:] for n in first] == [n[-6:] for n in runs.plan_study("demo", root=lab).runs]


def test_misspelt_parameter_and_study_are_refused_before_anything_runs(lab):
    (lab / "papermill_runs" / "studies" / "demo.yaml").write_text(
        "question: q\ntemplate: demo\ngroups: {all: {grid: {alhpa: [1]}}}\n"
    )
    text, code = finish(lab)
    assert (
        code == 1
        and "'alpha'" in text
        and "demo.yaml" in text
        and not (lab / "papermill_runs" / "local" / "demo").exists()
    )
    text, code = finish(lab, "run", "demmo")
    assert code == 1 and "'demo'" in text


def test_an_override_makes_a_study_of_its_own(lab):
    study(lab, [0.1], seconds=0)
    text, code = finish(lab, "run", "demo", "--cores", "2", "seconds=0.1")
    assert code == 0 and "1 of 1 runs finished" in text, text
    (record,) = [json.loads(p.read_text()) for p in (lab / "papermill_runs" / "local" / "demo--0.1").glob("*/run.json")]
    assert record["parameters"]["seconds"] == 0.1 and not (lab / "papermill_runs" / "local" / "demo").exists()


def test_gpus_are_handed_out_as_many_as_a_run_takes(lab, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    (lab / "settings.ini").write_text("[moe_routing]\n")
    assert one.visible_gpus() == ["0", "1"]
    with runs._some_gpus(lab):
        first = os.environ["CUDA_VISIBLE_DEVICES"]
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
        with runs._some_gpus(lab):
            second = os.environ["CUDA_VISIBLE_DEVICES"]
    assert {first, second} == {"0", "1"}
    for asked, held in ((2, "0,1"), (8, "0,1")):  # all there are, where a plan asks for more
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
        with runs._some_gpus(lab, asked):
            assert os.environ["CUDA_VISIBLE_DEVICES"] == held


def test_never_more_runs_start_than_there_are_gpus(lab):
    (lab / "settings.ini").write_text("[moe_routing]\n")
    study(lab, [0.1, 0.2], seconds=1)
    process = start(lab, CUDA_VISIBLE_DEVICES="0")
    most = 0
    while process.poll() is None:
        most = max(most, len(list((lab / "papermill_runs" / "local" / "demo").glob("*/owner.json"))))
        time.sleep(0.1)
    assert process.returncode == 0 and most == 1, process.stdout.read()
    records = [json.loads(p.read_text()) for p in (lab / "papermill_runs" / "local" / "demo").glob("*/run.json")]
    assert [r["settings"]["device"] for r in records] == ["auto", "auto"]  # a name does not depend on the machine


@pytest.mark.parametrize(
    "text, words",
    [
        ("question: q\ntemplate: demo\n", "'groups' is missing"),
        ("question: q\ntemplate: demo\ngroups: {a: {grid: {}}}\n", "is empty"),
        ("question: q\ntemplate: demo\ngroups: {a: {list: [{alpha: 1}, {alpha: 1}]}}\n", "listed twice"),
        ("question: q\ntemplate: nothing\ngroups: {a: {list: [{alpha: 1}]}}\n", "no template"),
        ("question: [q\n", "not valid YAML"),
    ],
)
def test_faulty_studies_name_file_and_fault(lab, text, words):
    (lab / "papermill_runs" / "studies" / "demo.yaml").write_text(text)
    with pytest.raises(ValueError, match=words):
        runs.plan_study("demo", root=lab)


def test_names_of_runs_are_never_taken_for_options(root):
    "A value without letters or digits, such as an empty recipe, must not leave a name that begins with a dash."
    for study in sorted((root / "papermill_runs" / "studies").glob("*.yaml")):
        for name in runs.plan_study(study.stem, root=root).runs:
            assert name[0].isalnum() and "--" not in name, (study.stem, name)


DAYS = """question: q
base: {alpha: 0.3, k: 2}
groups:
  first: {template: demo, name: day0_first, list: [{seconds: 0.0}]}
  second: {template: other, name: day1_second, after: [first], list: [{beta: 1}]}
  third: {template: demo, name: day2_third, after: [first, second], list: [{seconds: 0.1}]}
"""


@pytest.fixture
def days(lab):
    nb = nbformat.read(lab / "nbs" / "runs" / "demo.ipynb", 4)
    nb.cells[1].source = 'beta = 0\nwords = []\nk = 1\nfail = False\nseed = 0\nout = ""'
    nb.cells[2].source = """from pathlib import Path
from moe_routing.runs.run import Run
run = Run(out)
if fail: raise ValueError("asked to fail")
before = sorted(p.parent.name for p in Path(out).parent.glob("*/finished"))
run.finish(metrics={"before": len(before), "k": k})"""
    nbformat.write(nb, lab / "nbs" / "runs" / "other.ipynb")
    (lab / "papermill_runs" / "studies" / "demo.yaml").write_text(DAYS)
    return lab


def test_groups_with_templates_of_their_own(days):
    plan = runs.plan_study("demo", root=days)
    assert list(plan.runs) == ["day0_first", "day1_second", "day2_third"] and [plan.template(n) for n in plan.runs] == [
        "demo",
        "other",
        "demo",
    ]
    assert (
        plan.runs["day1_second"] == {"beta": 1, "k": 2, "seed": 0, "group": "second"}
        and "k" not in plan.runs["day0_first"]
    )  # what all share goes to those that know it
    assert plan.after == {"day1_second": ["day0_first"], "day2_third": ["day0_first", "day1_second"]}
    assert (
        list(runs.plan_study("demo", {"only": "second"}, days).runs) == ["day1_second"]
        and not runs.plan_study("demo", {"only": "second"}, days).after
    )
    late = runs.plan_study("demo", {"start_from": "second", "k": 5}, days)
    assert (
        list(late.runs) == ["day1_second", "day2_third"]
        and late.after == {"day2_third": ["day1_second"]}
        and late.runs["day1_second"]["k"] == 5
    )
    assert not runs.plan_study("demo", {"continue_on_error": True}, days).after and late.folder.name == "demo--5"
    with pytest.raises(ValueError, match="no group 'sunday'"):
        runs.plan_study("demo", {"only": "sunday"}, days)
    with pytest.raises(ValueError, match="no template of the study has the parameter 'kk'"):
        runs.plan_study("demo", {"kk": 1}, days)


@pytest.mark.parametrize(
    "old, new, words",
    [
        ("template: other, ", "", "names none of its own"),
        ("after: [first]", "after: [third]", "unknown group before 'second'"),
        ("{beta: 1}", "{gamma: 1}", "gamma"),
        ("[{beta: 1}]", "[{beta: 1}, {beta: 2}]", "is for one run"),
    ],
)
def test_faulty_plans_of_several_templates(days, old, new, words):
    (days / "papermill_runs" / "studies" / "demo.yaml").write_text(DAYS.replace(old, new))
    with pytest.raises(ValueError, match=words):
        runs.plan_study("demo", root=days)


def test_days_run_in_order_one_alone_and_past_a_failure(days):
    text, code = finish(days, "week", "--config", "demo", "--cores", "2")
    folder = days / "papermill_runs" / "local" / "demo"
    read = lambda day: json.loads((folder / day / "run.json").read_text())
    assert code == 0 and "3 of 3 runs finished" in text and read("day1_second")["metrics"] == {"before": 1, "k": 2}
    shutil.rmtree(folder)
    text, code = finish(days, "week", "--config", "demo", "--only", "second")
    assert (
        code == 0
        and [p.parent.name for p in folder.glob("*/finished")] == ["day1_second"]
        and read("day1_second")["metrics"]["before"] == 0
    )
    text, code = finish(days, "week", "--config", "demo", "fail=True")
    failed = days / "papermill_runs" / "local" / "demo--fail"
    assert (
        code != 0
        and "asked to fail" in text
        and not (failed / "day2_third" / "finished").exists()
        and (failed / "day0_first" / "finished").exists()
    )
    text, code = finish(
        days, "week", "--config", "demo", "--only", "second", "words=['a b/c', {'name': 'x'}, 4]"
    )  # lists and quotes arrive as they were given
    assert code == 0 and json.loads(
        next((days / "papermill_runs" / "local").glob("demo--*c_name_x_4*/day1_second/run.json")).read_text()
    )["parameters"]["words"] == ["a b/c", {"name": "x"}, 4]
    text, code = finish(days, "week", "--config", "demo", "words=abc")
    assert code == 1 and "words = 'abc' is no list: write it as ['abc']" in text
    text, code = finish(days, "week", "--config", "demo", "--continue_on_error", "fail=True")
    assert (failed / "day2_third" / "finished").exists() and "asked to fail" in text
