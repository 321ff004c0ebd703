"""A week whose truth is known: day folders in the form in which the days leave them; the numbers are chosen."""

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from moe_routing.runs.run import template_path, template_protocol
from moe_routing.stats import mean_interval
from moe_routing.studies.week import DAYS, FIGURES

TEMPLATES = {
    "day0": "day0_sanity_check",
    "day1_2": "day1_2_standard_benchmarks",
    "day3_4": "day3_4_expert_analysis",
    "day5": "day5_throughput",
}
SCORES = {"Tiny-16E": 0.7, "Mixtral-8x7B": 0.5}  # model -> share of right answers; the first is the week's own


def write_day(study: Path, day: str, files: dict, parameters: dict, notes: dict) -> Path:
    "One made-up day."
    folder = study / DAYS[day]
    for name, what in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(what))
    record = {"study": study.name, "group": DAYS[day], "template": TEMPLATES[day], "commit": None, "metrics": {}}
    record |= {"protocol": template_protocol(template_path(TEMPLATES[day])), "run_id": f"{sum(map(ord, day)):010x}"}
    record |= {"status": "finished", "error": None, "files": [f"{DAYS[day]}/{n}" for n in files]}
    record |= {"parameters": {"model": "tiny", **parameters}, "notes": notes}
    (folder / "run.json").write_text(json.dumps(record))
    return folder


def made_up_week(
    folder: Path,
    scores: dict = SCORES,
    cv: float = 0.05,
    maxvio: float = 0.1,
    aux: dict | None = None,  # at the end of the training log; largest auxiliary terms
    share_below: float = 1.0,  # of the log's points below the limits
    speed: dict | None = None,  # model -> tokens/s
    domains: bool = True,  # do experts specialise by domain, beyond token ids?
    coherent: bool = True,  # does routing hang together over the layers, and are experts orthogonal?
    change: float = 0.2,  # perplexity that a removed component costs
    tasks=("mmlu", "gsm8k", "arc_challenge"),
    n: int = 60,
    without=(),  # days that are left out
) -> Path:
    "Write day folders with planted truths. No model is run."
    folder, own = Path(folder), next(iter(scores))
    folder.mkdir(parents=True)
    speed = speed or {m: 100.0 - i for i, m in enumerate(scores)}
    days = {
        "day0": (sanity_check(cv, maxvio, aux, share_below), {"model_name": own}, {"model_name": own}),
        "day1_2": (benchmarks(scores, tasks, n), {"model_name": own}, {"model_name": own}),
        "day3_4": ({"specialization_report.json": analysis(domains, coherent)}, {}, {}),
        "day5": (efficiency(speed, change), {"name": own, "ablations": "spectra"}, {}),
    }
    for day, about in days.items():
        if day not in without:
            write_day(folder, day, *about)
            for file in FIGURES.get(day, {}).values():
                for name in file:
                    draw(folder / DAYS[day] / name)
    return folder


def draw(file: Path, dpi: int = 300, blank: bool = False) -> None:
    "A small picture."
    image = Image.new("L", (40, 40), 255)
    if not blank:
        ImageDraw.Draw(image).line((0, 0, 39, 39))
    image.save(file, dpi=(dpi, dpi))


def sanity_check(cv, maxvio, aux, share_below):
    go = "GO" if cv < 0.3 and maxvio < 0.5 else "NO-GO"
    log = {
        "last": {"cv": cv, "maxvio": maxvio, "loss": 2.0},
        "share_of_points_below_limit": {"cv": share_below, "maxvio": share_below},
        "auxiliary_terms_largest": {"aux_loss": 0.0} if aux is None else aux,
    }
    rule = {"verdict": go, "reasons": [] if go == "GO" else [f"cv {cv} is too large"], "checks": []}
    ppl = {"perplexity": 12.5, "interval": [11.9, 13.2], "tokens": 4096, "texts": 64, "chance": 65.0}
    return {
        "decision.json": {"verdict": go, "decides": "excess", "rules": {"seed": rule, "excess": rule}},
        "metrics.json": {"log": log, "layers": [{"layer": 0, "cv": cv, "cv_random": 0.02}]},
        "perplexity.json": {"wikitext": {**ppl, "used": "embedded wikitext"}},
    }


def benchmarks(scores, tasks, n):
    rng, own = np.random.default_rng(0), next(iter(scores))
    models = {m: {"name": "tiny" if m == own else m, "router": None} for m in scores}
    files, table = {}, {}
    for task in tasks:
        hard, ids = rng.random(n), [f"{task}/{i}" for i in range(n)]  # harder documents are harder for all
        found = {m: [float(h < s) for h in hard] for m, s in scores.items()}
        for m, right in found.items():
            documents = {"id": ids, "hash": [f"{i:x}" for i in range(n)], "cluster": ids, "score": right}
            files[f"{m}/knowledge/{task}_results.json"] = {"task": task, "model": models[m], "documents": documents}
        about = {"group": "knowledge", "chance": 0.25, "shots": 5, "version": 1, "metric": "acc,none"}
        table[task] = {**about, "scores": {m: score(right) for m, right in found.items()}}
    summary = {"reference": own, "models": models, "missing": [], "differences": [], "tasks": table}
    return {"comparison_summary.json": summary, **files}


def score(right):
    i = mean_interval(right)
    return {"score": i.estimate, "low": max(0.0, i.low), "high": min(1.0, i.high), "n": i.n}


def analysis(domains, coherent):
    around = lambda x: {"estimate": x, "low": x - 0.05, "high": x + 0.05}
    pair = {"l1": 0.1 if coherent else 0.3, "relabelled": 0.3, "shuffled": 0.25}
    pair |= {
        "below_relabelled": around(-0.2 if coherent else 0.0),
        "below_shuffled": around(-0.15 if coherent else 0.05),
    }
    cosines = {"kind": "representation", "abs": 0.08 if coherent else 0.3, "abs_random": 0.09, "abs_high": 0.1}
    return {
        "domain_use": [{"layer": l, "effect_p": 0.001 if domains else 0.4 + 0.1 * l} for l in range(3)],
        "token_id": [{"layer": l, "explained": around(0.7) if domains else None} for l in range(3)],
        "trajectory": {"ids_align": True, "distance": [{"layer": l, **pair} for l in range(2)]},
        "orthogonality": [{"layer": l, **cosines} for l in range(3)],
    }


def efficiency(speed, change):
    rng = np.random.default_rng(0)
    grid = [
        {"model": m, "input_tokens": i, "batch_asked": b, "batch": b, "reason": "", "completed": 3}
        | {"output_throughput": v * b * (1 + 0.01 * rng.random())}
        for m, v in speed.items()
        for i in (128, 512)
        for b in (1, 4)
    ]
    empty = {"perplexity": None, "change": None, "low": None, "high": None, "p_adjusted": None, "seeds": 0}
    without = {"change": change, "low": change - 0.1, "high": change + 0.1, "p_adjusted": 0.01, "seeds": 3}
    ablation = [
        {**empty, "variant": "spectra", "perplexity": 12.5, "seeds": 3, "reason": ""},
        {**without, "variant": "spectra_no_gru", "perplexity": 12.5 + change, "reason": ""},
        {**empty, "variant": "no_explicit_bias", "reason": "no run of the study has bias_rate = 0"},
    ]
    about = {"model": next(iter(speed)), "device": "cpu", "grid": grid, "rules": [], "ablation": ablation}
    return {"efficiency_report.json": {**about, "ablation_runs": ["spectra-0", "spectra_no_gru-0"]}}
