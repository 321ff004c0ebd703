"""Studies whose truth is known, and the report notebooks read in this process. No model is trained."""

import json
from pathlib import Path

import numpy as np
from conftest import ROOT

from moe_routing.runs.run import template_path, template_protocol

TRAINING = {
    "refuse": "position",
    "renorm": True,
    "k": 2,
    "num_experts": 8,
    "hidden": 128,
    "layers": 4,
    "intermediate": 128,
    "match": "compute",
    "corpus": "embedded",
    "tokenizer": "char",
    "source": "auto",
    "windows": 32,
    "steps": 300,
    "batch": 16,
    "length": 128,
    "lr": 1e-3,
}
ACAUSAL = ("expert_choice", "sinkhorn", "sbase")
NGRAM = "corpus,tokenizer,length,windows,tokens,order,loss\n"


def read_report(name: str, **parameters) -> dict:
    "The variables of a notebook of nbs/studies after its cells were executed here, in place of a kernel."
    names = {"__name__": "__main__"}
    for cell in json.loads((ROOT / "nbs" / "studies" / f"{name}.ipynb").read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{name}.ipynb", "exec"), names)
            names |= parameters if "parameters" in cell["metadata"].get("tags", []) else {}
    return names


def made_up_study(
    folder: Path,  # of the study: runs.jsonl, logs.jsonl and ngram.csv are written
    routers: dict[str, float],  # name -> true held-out loss, nats a token
    seeds: int = 5,
    capacity_factors: tuple = (1.0, 1.25),
    logs: bool = True,
    ngram: float = 1.0,  # loss of the n-gram tables
    rng: np.random.Generator | None = None,
    **planted,  # spread=, drops=, excess=, speed= as for `made_up_run`; all else are parameters of the runs
) -> Path:
    "Write the records that a study of trained routers leaves."
    rng = rng or np.random.default_rng(0)
    how = {k: planted.pop(k) for k in ("spread", "drops", "excess", "speed") if k in planted}
    luck, hard = rng.normal(0, 0.02, seeds), 0.3 * rng.exponential(size=32)
    lines, logged = [], []
    for cf in capacity_factors:
        for router, true in routers.items():
            for seed in range(seeds):
                p = {**TRAINING, **planted, "router": router, "capacity_factor": cf, "seed": seed}
                run, log = made_up_run(p, true + luck[seed] + (0.02 if cf == 1 else 0), hard, rng, **how)
                lines.append(run)
                logged.append({"run": run["run"], **log})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "runs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if logs:
        (folder / "logs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in logged))
    tokens = p["steps"] * p["batch"] * p["length"]
    text = f"{p['corpus']},{p['tokenizer']},{p['length']},{p['windows']},{tokens}"
    (folder / "ngram.csv").write_text(NGRAM + "".join(f"{text},{n},{ngram + 0.1 * (6 - n)}\n" for n in range(1, 7)))
    return folder


def made_up_run(
    p: dict,  # its parameters
    true: float,  # its loss without its own luck
    hard: np.ndarray,  # (W,) how hard the windows are
    rng: np.random.Generator,
    spread: float = 0.004,  # own luck of a run
    drops: dict = {},  # router -> drop rate at capacity factor 1; default .1
    excess: dict = {},  # router -> MaxVio above the floor; default .3
    speed: dict = {},  # router -> tokens/s
) -> tuple[dict, dict]:
    "One record of template train_router, and its logs."
    E, L, router, cf = p["num_experts"], p["layers"], p["router"], p["capacity_factor"] or 9
    loss, tps = true + rng.normal(0, spread), speed.get(router, 9000.0) * rng.uniform(0.95, 1.05)
    k = {"switch": 1, "top1_as_shipped": 1, "dense": E}.get(router, p["k"])
    planted = drops.get(router, 0.1)
    drop = max(0.0, planted - 0.2 * (cf - 1)) * rng.uniform(0.95, 1.05) if planted else 0.0
    floor, over = 0.03 * E**0.5, excess.get(router, 0.3)
    nll = (loss - hard.mean() + hard + rng.normal(0, 0.02, len(hard))) * 128
    nll += 128 * loss - nll.mean()
    metrics = {"val_loss": loss, "val_ppl": np.exp(loss), "bpc": loss / np.log(2), "train_loss": loss - 0.05}
    metrics |= {"best_val_loss": loss, "best_val_ppl": np.exp(loss), "best_step": p["steps"], "nominal_k": float(k)}
    metrics |= {"val_loss_as_trained": loss - 0.01 if router in ACAUSAL else None, "leak_bits": None}
    metrics |= {"tokens_per_s": tps, "median_tokens_per_s": tps, "best_tokens_per_s": 1.1 * tps, "mean_k": float(k)}
    metrics |= {"best_eff_tflops": 2.2e-6 * tps, "eff_tflops": 2e-6 * tps, "flops_per_token": 2e6, "active_share": 1.0}
    metrics |= {"drop_rate": drop, "orphan_rate": drop / 4, "demand_cv": 0.03 + over / 2, "served_cv": 0.02 + over / 3}
    metrics |= {"pooled_cv": 0.03 + over / 2, "load_floor_cv": 0.03, "load_floor_maxvio": floor, "router_params": 1024}
    metrics |= {"max_violation": floor + over, "gate_entropy": rng.uniform(0.3, 0.69), "mean_topk_prob": 0.6}
    metrics |= {
        "layer_max_violation": (floor + over * rng.uniform(0.8, 1.2, L)).tolist(),
        "layer_drop_rate": [drop] * L,
    }
    metrics |= {"layer_cv": [0.03 + over / 2] * L, "layer_floor_maxvio": [floor] * L, "layer_floor_cv": [0.03] * L}
    run = {"run": f"{router}-{cf:g}-{p['match']}-{p['seed']}", "group": "made_up", "template": "train_router"}
    run |= {"protocol": template_protocol(template_path("train_router", ROOT)), "commit": "0" * 40, "notes": {}}
    run |= {"seed": p["seed"], "seconds": 1.0, "status": "finished", "error": None, "run_id": "made up"}
    windows = {"window": list(range(len(hard))), "nll": nll.tolist(), "tokens": [128] * len(hard)}
    demand = (np.sort(rng.dirichlet(np.full(E, 5 / (over + 0.02)), L))[:, ::-1] * 4096 * k).round()
    loads = {"demand": demand.tolist(), "served": np.minimum(demand, cf * 4096 * k / E).tolist()}
    far = [(s, 2 * np.exp(-s / 60)) for s in range(25, p["steps"] + 1, 25)]
    log = [{"step": s, "train_loss": loss + x, "val_loss": loss + x * (1 - s / p["steps"])} for s, x in far]
    return {**run, "parameters": p, "metrics": metrics, "documents": windows}, {"train_log": log, "loads": loads}
