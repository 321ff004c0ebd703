"""Reports: fronts against brute force, interpolation, verdicts on made-up studies, refusal of unfinished studies."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from moe_routing.routers.pvalue import bh_count
from moe_routing.runs.study import plan_study
from moe_routing.studies import bh as reports
from moe_routing.studies.report import build_report, publish_report, render


def test_front_against_brute_force():
    rng = np.random.default_rng(0)
    for _ in range(50):
        x, y = rng.integers(0, 6, 12), rng.integers(0, 6, 12)
        front = set(reports.pareto_front(x.tolist(), y.tolist()))
        for i in range(12):
            beaten = any((x[j] <= x[i] and y[j] < y[i]) or (x[j] < x[i] and y[j] <= y[i]) for j in range(12))
            assert (i in front) == (not beaten)


def study(worse, seed=0, documents=200):
    rng, rows = np.random.default_rng(seed), []
    difficulty = rng.normal(2, 0.3, documents)
    for router, k, extra in [("topk", k, 0) for k in (1, 2, 3, 4, 8)] + [("bh", 2.5, worse)]:
        # linear between 2 and 3, so that interpolation is exact and only `worse` differs
        loss = difficulty - 0.05 * k + np.log1p(extra) + rng.normal(0, 0.02, documents)
        rows.append(
            {
                "run": f"{router}{k}",
                "router": router,
                "dataset": "wikitext",
                "weigh": "native",
                "effective_k": float(k),
                "perplexity": float(np.exp(loss.mean())),
                "group": "g",
                "documents": {"id": list(range(documents)), "tokens": [50] * documents, "loss": loss.tolist()},
                "notes": {"config": f"{router}{k}", "num_experts": 64},
            }
        )
    return pd.DataFrame(rows)


@pytest.mark.parametrize("worse, words", [(0.05, "worse"), (-0.05, "better"), (0, "undecided")])
def test_a_known_difference_gets_its_verdict(worse, words):
    (row,) = reports.compare_at_equal_k(study(worse)).itertuples()
    assert row.verdict == words and row.low <= 1 + worse <= row.high


def test_own_routing_is_its_own_reference():
    table = reports.against_own(study(0.05), "wikitext", 8)
    assert table.ratio.iloc[-1] == 1 and (table.ratio.iloc[:-1] > 1).all()
    assert (
        reports.best_trade_off(table, 1e-9).config == "topk8"
        and reports.best_trade_off(table[table.router == "bh"], 1e-9) is None
    )
    with pytest.raises(ValueError, match="own top-7"):
        reports.against_own(study(0), "wikitext", 7)


def test_noise_columns_are_what_noise_does():
    run = study(0).tail(1).assign(router="bh", alpha=0.5, max_k=8, min_k=None, ceiling_hit_rate=0.0)
    row = reports.noise_distance(run).iloc[0]
    p = np.random.default_rng(0).random((100_000, 64))
    import torch

    counts = bh_count(torch.from_numpy(p), 0.5).clamp(1, 8).double()
    assert row.noise_mean_k == pytest.approx(counts.mean().item(), abs=0.03) and row.over_noise == pytest.approx(
        2.5 - row.noise_mean_k
    )
    assert row.noise_ceiling_pct == pytest.approx(100 * (counts == 8).double().mean().item(), abs=0.5)


def test_an_unfinished_study_is_not_reported(root, tmp_path):
    plan = plan_study("smoke", {"limit": 3})
    with pytest.raises(ValueError, match="4 of 4 runs are not finished"):
        build_report(replace(plan, folder=tmp_path / "smoke"))
    assert not list(tmp_path.rglob("report.*"))


def test_an_unknown_report_offers_the_known_ones(root, tmp_path):
    with pytest.raises(ValueError, match="unknown study notebook 'bh_report'.*bh"):
        render("bh_report", tmp_path, root=root)


def test_a_study_without_a_record_is_named(root):
    with pytest.raises(ValueError, match="make publish STUDY=smoke"):
        publish_report("smoke")
