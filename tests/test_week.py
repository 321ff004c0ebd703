"""The week of seed 000: its plan in the seed's words, its flags, its log, and a NO-GO that ends it."""

import json
import subprocess
import sys

import pytest
import yaml

from conftest import ROOT
from moe_routing.runs import study as runs
from moe_routing.settings import load_study

DAYS = ["day0_sanity_check", "day1_2_benchmarks", "day3_4_expert_analysis", "day5_efficiency", "day6_final"]
LATER = {
    "day1_2_standard_benchmarks": DAYS[1],
    "day3_4_expert_analysis": DAYS[2],
    "day5_throughput": DAYS[3],
    "day6_comparison_table": DAYS[4],
}


def week(*flags, **environ):
    import os

    done = subprocess.run(
        [sys.executable, "-m", "moe_routing", "week", "--dry_run", *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, **environ},
    )
    return done.returncode, done.stdout + done.stderr


def planned(text):
    "The days that a dry run would do."
    return [
        d
        for d in DAYS
        if any(
            line.split()[:1] and line.split()[0].endswith(d) and line.split()[-1] == "1" for line in text.splitlines()
        )
    ]


def plan(**overrides):
    return runs.plan_study("seven_day", overrides, ROOT)


def test_the_plan_has_the_seeds_keys():
    for name in ("seven_day", "seven_day_gpu"):
        raw = yaml.safe_load((ROOT / "papermill_runs" / "studies" / f"{name}.yaml").read_text())
        assert {"model", "wandb", "compute", "days", "baselines"} <= set(raw)
        assert (
            {"checkpoint_path", "model_name", "num_experts", "active_experts"} <= set(raw["model"])
            and {"run_id", "project"} <= set(raw["wandb"])
            and {"num_gpus", "batch_size_per_gpu", "use_bf16"} <= set(raw["compute"])
        )
        assert list(runs.plan_study(name, root=ROOT).runs) == DAYS
    real = runs.plan_study("seven_day_gpu", root=ROOT)
    assert real.study.gpus == 4 and real.study.dtype == "bfloat16" and not real.runs[DAYS[1]]["anyway"]
    assert [b["name"] for b in real.runs[DAYS[1]]["baselines"]] == ["mixtral", "llama3"] and real.runs[DAYS[3]][
        "inputs"
    ] == [128, 512, 1024, 2048]
    assert real.runs[DAYS[0]]["batch_size"] == 8 and "batch_size" not in real.runs[DAYS[4]]  # a day gets what it knows


@pytest.mark.parametrize(
    "overrides, days, where",
    [
        ({"only": "day3_4"}, DAYS[2:3], None),
        ({"start_from": "day1_2"}, DAYS[1:], None),
        ({"continue_on_error": True}, DAYS, None),
        ({"skip_baselines": True}, DAYS, "baselines"),
        ({"skip_ablation": True}, DAYS, "ablation"),
        ({"skip_wandb": True}, DAYS, "wandb"),
    ],
)
def test_what_the_flags_of_the_seed_do_to_the_plan(overrides, days, where):
    found = plan(**overrides)
    assert list(found.runs) == days
    if "continue_on_error" in overrides:
        assert not found.after
    if where:
        flag = f"skip_{where}"
        told = [d for d, p in found.runs.items() if p.get(flag)]
        assert (
            told
            == {"baselines": [DAYS[0], DAYS[1], DAYS[3], DAYS[4]], "ablation": [DAYS[3]], "wandb": [DAYS[0]]}[where]
            and found.folder.name == f"seven_day--{flag}"
        )


@pytest.mark.parametrize(
    "flags, days, folder",
    [
        (("--only", "day3_4", "--skip_wandb"), DAYS[2:3], "seven_day--skip_wandb"),
        (("--start_from", "day5", "--skip_ablation"), DAYS[3:], "seven_day--skip_ablation"),
        (
            ("--checkpoint", "some/model", "--skip_baselines", "--anyway", "--only", "day1_2"),
            DAYS[1:2],
            "seven_day_gpu--model--skip_baselines--anyway",
        ),
    ],
)
def test_flags_of_the_command_line(flags, days, folder, tmp_path):
    code, text = week(*flags, "--output_dir", str(tmp_path / "results"))
    assert (
        code == 0 and planned(text) == days and f"/{folder}/report.md" in text and not (tmp_path / "results").exists()
    )


def test_a_word_for_a_day_that_does_not_exist():
    code, text = week("--only", "day9")
    assert code == 1 and "day9" in text and "day3_4_expert_analysis" in text


def test_picture_of_the_plan(tmp_path):
    from matplotlib.image import imread

    for name in ("seven_day", "bh_sweep"):
        image = imread(runs.draw_plan(runs.plan_study(name, root=ROOT), tmp_path / f"{name}.png"))
        assert min(image.shape[:2]) > 150 and image[..., :3].std() > 0.02


@pytest.mark.parametrize("template, folder", LATER.items())
def test_no_go_ends_the_later_days(template, folder, tmp_path):
    (tmp_path / DAYS[0]).mkdir()
    (tmp_path / DAYS[0] / "decision.json").write_text(
        json.dumps(
            {
                "verdict": "NO-GO",
                "decides": "excess",
                "rules": {"excess": {"verdict": "NO-GO", "reasons": ["excess maxvio is 2 in layer 1"], "checks": []}},
            }
        )
    )
    with pytest.raises(RuntimeError, match="NO-GO: excess maxvio is 2 in layer 1.*allow it explicitly"):
        runs.run_template(template, {}, tmp_path / folder, root=ROOT)
    assert json.loads((tmp_path / folder / "run.json").read_text())["status"] == "failed"


def test_a_plan_that_does_not_fit_the_checkpoint(tmp_path):
    with pytest.raises(RuntimeError, match="num_experts = 256, but tiny has 64"):
        runs.run_template("day0_sanity_check", {"num_experts": 256, "data": "embedded"}, tmp_path / "day0", root=ROOT)


def test_everything_printed_is_kept_with_the_time(tmp_path):
    log = tmp_path / "study" / "full_pipeline_log.txt"
    says = "import sys; print('day one'); print('trouble', file=sys.stderr); sys.exit(3)"
    for _ in range(2):
        assert runs._shown_and_kept([sys.executable, "-c", says, "--cores", "2"], ROOT, log) == 3
    lines = log.read_text().splitlines()
    assert (
        len(lines) == 8
        and sum("trouble" in line for line in lines) == 2
        and lines[0].split("  ")[1].startswith("started at commit")
        and lines[-1].endswith("ended with code 3")
    )


@pytest.mark.parametrize(
    "change, words",
    [
        ({"model": {"checkpoint": "x"}}, "unknown key in model 'checkpoint'"),
        ({"compute": 4}, "compute = 4 is not a mapping"),
        ({"days": {"monday": {}}}, "monday"),
        ({"baselines": ["mixtrall"]}, "mixtral"),
        ({"groups": {}}, "groups"),
    ],
)
def test_faulty_plans(change, words, tmp_path):
    raw = yaml.safe_load((ROOT / "papermill_runs" / "studies" / "seven_day.yaml").read_text()) | change
    (tmp_path / "studies").mkdir()
    (tmp_path / "baseline_models.yaml").write_text((ROOT / "papermill_runs" / "baseline_models.yaml").read_text())
    (tmp_path / "studies" / "w.yaml").write_text(yaml.safe_dump(raw))
    with pytest.raises(ValueError, match=words):
        load_study(tmp_path / "studies" / "w.yaml")
