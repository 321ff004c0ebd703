"""The SPECTRA report on made-up studies whose truth is known: every verdict comes out each way, intervals cover, nothing is claimed without runs."""

import json

import numpy as np
import pandas as pd
import pytest

from moe_routing.studies import routers as router_reports, runs as running
from moe_routing import spectra_report as report
from moe_routing.stats import minimum_detectable_effect

ALL = {"supported", "refuted", "undecided", "not run"}


@pytest.fixture(autouse=True)
def one_code(monkeypatch):
    "Made-up runs are of today's code by definition; hashing it anew for each of them takes long."
    for module in (running, router_reports):
        monkeypatch.setattr(module, "code_hash", lambda *a: "today")


@pytest.fixture
def study(tmp_path):
    def make(rows, name="spectra", **more):
        plan = report.made_up_spectra(tmp_path / f"{name}{len(list(tmp_path.iterdir()))}" / name, rows, **more)
        return plan, report.study_runs(plan.folder)

    return make


def pair(spectra=2.30, switch=2.34, top2=2.34, **more):
    "Rows of SPECTRA and both Switch variants at equal width and matched compute."
    own = {k: v for k, v in more.items() if k in ("overlap", "gram", "consistency", "gains", "cv")}
    return [
        {"router": r, "loss": l, "match": m, **(own if r == "spectra" else more.get("other", {}))}
        for m in ("width", "compute")
        for r, l in (("spectra", spectra), ("switch", switch), ("switch_top2", top2))
    ]


@pytest.mark.parametrize(
    "losses, spread, word",
    [
        ((2.30, 2.34, 2.33), 0.002, "supported"),
        ((2.34, 2.30, 2.30), 0.002, "refuted"),
        ((2.30, 2.30, 2.30), 0.001, "refuted"),
        ((2.30, 2.315, 2.315), 0.03, "undecided"),
        ((2.30, 2.34, 2.26), 0.002, "refuted"),
    ],
)
def test_h1(study, losses, spread, word):
    "Better; worse; shown equivalent; not decided; better than one and worse than the other, so not better on most."
    found = report.h1(study(pair(*losses), spread=spread)[1])
    assert found.verdict == word and len(found.parts) == 6 and found.low <= found.estimate <= found.high
    assert (found.needed is None) == (word != "undecided") or found.parts.needed.isna().any()


def test_most_is_more_than_half(study):
    rows = [r for r in pair(2.30, 2.34, 2.34)]
    for r in rows:
        if r["router"] == "switch_top2" and r["match"] == "compute":
            r["loss"] = 2.28
    found = report.h1(study(rows, spread=0.001)[1])
    assert found.verdict == "supported" and (found.parts.verdict == "worse").sum() == 2 and found.estimate < 0


def test_tasks_join_the_comparison(study):
    plan, runs = study(pair(2.30, 2.34, 2.34), spread=0.001)
    runs["lambada_accuracy"] = (
        0.3 + 0.2 * (runs.router == "spectra") + np.random.default_rng(0).normal(0, 0.005, len(runs))
    )
    assert len(report.h1(runs).parts) == 12 and report.h1(runs).verdict == "supported"


@pytest.mark.parametrize(
    "mine, other, word",
    [
        ((-0.10, 0.05), (0.05, 0.01), "supported"),
        ((0.10, 0.05), (0.05, 0.01), "refuted"),
        ((-0.10, 0.0), (0.05, 0.0), "refuted"),
        ((-0.05, 0.02), (0.05, 0.0), "undecided"),
    ],
)
def test_h2_needs_the_baselines_and_chance(study, mine, other, word):
    rows = pair(overlap=mine[0], gram=mine[1], other={"overlap": other[0], "gram": other[1]})
    runs = study(rows, spread=0.002 if word != "undecided" else 0.06, seeds=4)[1]
    assert report.h2(runs).verdict == word


def test_h2_below_baselines_but_above_chance_is_refuted(study):
    found = report.h2(study(pair(overlap=0.05, gram=0.05, other={"overlap": 0.10, "gram": 0.01}), spread=0.001)[1])
    table = found.parts.set_index("comparison").verdict
    assert (
        found.verdict == "refuted"
        and table["overlap against random"] == "worse"
        and table["overlap against switch"] == "better"
    )


@pytest.mark.parametrize(
    "mine, other, spread, word",
    [
        (0.4, 0.3, 0.002, "supported"),
        (0.2, 0.3, 0.002, "refuted"),
        (0.3, 0.3, 0.002, "refuted"),
        (0.31, 0.3, 0.12, "undecided"),
    ],
)
def test_h3(study, mine, other, spread, word):
    assert (
        report.h3(study(pair(consistency=mine, other={"consistency": other}), spread=spread, seeds=4)[1]).verdict
        == word
    )


def bench(ratio, low, high):
    return pd.DataFrame(
        [
            {
                "benchmark": "spectra",
                "what": "training step, SPECTRA-Full / softmax top-4",
                "ratio": ratio,
                "low": low,
                "high": high,
            }
        ]
    )


@pytest.mark.parametrize(
    "times, rest, word",
    [
        ((1.1, 1.05, 1.15), 1e9, "supported"),
        ((1.5, 1.4, 1.6), 1e9, "refuted"),
        ((1.25, 1.1, 1.4), 1e9, "undecided"),
        ((1.1, 1.05, 1.15), 1e5, "refuted"),
    ],
)
def test_h4_takes_time_and_arithmetic(study, times, rest, word):
    runs = study(pair(), seeds=2)[1].assign(flops_per_token=rest, router_flops_per_token=0.0)
    found = report.h4(runs, bench(*times))
    assert found.verdict == word and "times Switch's" in found.why


def test_h4_without_a_measured_time_is_not_supported(study):
    runs = (
        study(pair(), seeds=2)[1]
        .assign(flops_per_token=1e9, router_flops_per_token=0.0)
        .drop(columns="median_tokens_per_s")
    )
    assert (
        report.h4(runs).verdict == "undecided"
        and report.h4(runs.assign(flops_per_token=1e5)).verdict == "refuted"
        and report.h4(None).verdict == "not run"
    )


def test_h4_reads_the_throughput_of_runs(study):
    rows = [{**r, "speed": 5000.0 if r["router"] == "spectra" else 9000.0} for r in pair()]
    found = report.h4(study(rows, seeds=4)[1].assign(flops_per_token=1e9, router_flops_per_token=0.0))
    row = found.parts.iloc[1]
    assert found.verdict == "refuted" and row.low <= 1.25 - 9 / 5 <= row.high


def test_flops_by_hand():
    "Six matrices of the cell, the projector, cosines, repulsion: counted one by one."
    H, E, R = 24, 4, 3
    multiplications = sum(a * b for a, b in [(H, E * R)] * 3 + [(E * R, E * R)] * 3 + [(H, E * R)]) + E * R + E * E
    assert report.router_flops(H, E, R, 10**9)["total"] == pytest.approx(2 * multiplications)
    assert (
        report.router_flops(H, E, R, 1)["total"] == 2 * (multiplications - 3 * (E * R) ** 2)
        and report.router_flops(H, E, R)["switch"] == 2 * H * E
    )
    with pytest.raises(ValueError, match="router_dim = 0"):
        report.router_flops(H, E, 0)


PARTS = {
    "spectra_no_expression": 0.04,
    "spectra_no_gru": 0.05,
    "spectra_no_repulsion": 0.04,
    "spectra_no_quota": 0.04,
    "spectra_no_ortho": 0.04,
}


@pytest.mark.parametrize(
    "change, spread, word",
    [
        ({}, 0.002, "supported"),
        ({"spectra_no_gru": 0.0}, 0.002, "refuted"),
        ({"spectra_no_quota": -0.04}, 0.002, "refuted"),
        ({"spectra_all_removed": 0.02}, 0.002, "refuted"),
        ({"spectra_no_gru": 0.012}, 0.02, "undecided"),
    ],
)
def test_h5(study, change, spread, word):
    losses = {"spectra": 0, **PARTS, "spectra_all_removed": 0.10} | change
    assert (
        report.h5(study([{"router": r, "loss": 2.3 + d} for r, d in losses.items()], spread=spread)[1]).verdict == word
    )


@pytest.mark.parametrize(
    "gains, spread, word",
    [
        ((0.01, 0.08), 0.003, "supported"),
        ((0.08, 0.01), 0.003, "refuted"),
        ((0.05, 0.05), 0.001, "refuted"),
        ((-0.09, -0.04), 0.003, "refuted"),
        ((0.03, 0.04), 0.03, "undecided"),
    ],
)
def test_h6(study, gains, spread, word):
    "Grows; shrinks; stays; grows but is none; not decided."
    rows = [
        {"router": r, "loss": l, "hidden": h}
        for h, g in ((128, gains[0]), (256, gains[1]))
        for r, l in (("spectra", 2.3 - g), ("switch", 2.3))
    ]
    found = report.h6(study(rows, "spectra_scaling", spread=spread)[1])
    assert found.verdict == word and "times the parameters" in found.why


@pytest.mark.parametrize(
    "gains, spread, word",
    [
        ({"code": 0.08, "math": 0.08}, 0.004, "supported"),
        ({"prose": 0.08, "story": 0.08}, 0.004, "refuted"),
        ({}, 0.03, "undecided"),
    ],
)
def test_h7(study, gains, spread, word):
    found = report.h7(study(pair(2.28, 2.30, 2.30, gains=gains), spread=spread)[1])
    assert found.verdict == word


def test_h7_without_domains_is_not_run(study):
    runs = study(pair(), seeds=2)[1]
    runs["documents"] = [{k: v for k, v in d.items() if k != "domain"} for d in runs.documents]
    assert report.h7(runs).verdict == "not run"


def test_the_contrast_is_the_difference_of_means_with_their_spread():
    rng, first = np.random.default_rng(0), np.arange(40) % 2 == 0
    second, inside = ~first, 0
    for _ in range(400):
        gain = (
            rng.normal(0, 0.02, (5, 1))
            + np.where(first, 0.1, 0.05)
            + rng.normal(0, 0.05, 40)
            + rng.normal(0, 0.01, (5, 40))
        )
        x = report._contrast(gain, first, second)
        assert np.isclose(x.mean(), gain[:, first].mean() - gain[:, second].mean())
        i = report.crossed_interval(x)
        inside += i.low <= 0.05 <= i.high
    assert inside / 400 >= 0.94 and i.high - i.low < 0.2  # keeps its level without being boundless


def test_a_null_is_rarely_called():
    "Under no difference at all, about one table in twenty holds a claim of a difference."
    rng, wrong = np.random.default_rng(0), 0
    for _ in range(60):
        pairs = [
            report.Pair(f"p{i}", pd.Series(rng.normal(0, 0.01, 5)), pd.Series(rng.normal(0, 0.01, 5)), False, 0.01)
            for i in range(4)
        ]
        wrong += report.claims(pairs).verdict.isin(["better", "worse"]).any()
    assert wrong < 10


def test_seeds_needed_is_what_decides():
    for sd, effect in ((0.01, 0.01), (0.01, 0.004), (0.02, 0.05)):
        n = report.seeds_needed(sd, effect)
        assert minimum_detectable_effect(sd, n) <= effect and (n == 2 or minimum_detectable_effect(sd, n - 1) > effect)
    assert report.seeds_needed(0.01, 0.004, tests=7) > report.seeds_needed(0.01, 0.004)  # a table asks for more
    three = pd.Series([-0.20, -0.25, -0.29])  # p of .01: shown alone, not among seven
    rows = report.claims(
        [
            report.Pair(f"p{i}", three if not i else pd.Series([-0.3, 0.3, 0.02]) * i, three * 0, True, 0.01)
            for i in range(7)
        ]
    )
    assert rows.verdict[0] == "undecided" and rows.needed[0] > 3
    assert report.seeds_needed(0.01, 0) is None and report.seeds_needed(0.01, 0, 0.01) < report.seeds_needed(
        0.01, 0.005, 0.01
    )


def test_the_number_of_seeds_is_that_after_which_the_rule_speaks():
    part = lambda advantage, needed, verdict="undecided": {
        "comparison": "x",
        "advantage": advantage,
        "low": -1.0,
        "high": 1.0,
        "margin": 0.01,
        "verdict": verdict,
        "needed": needed,
    }
    judge = lambda rows, most=False: report._judged("s", "t", pd.DataFrame(rows), ["r"], "", most)
    assert judge([part(0.05, 7), part(0.02, 30)]).needed == 30  # all must be shown
    assert (
        judge([part(0.05, 7), part(-0.02, 12), part(0.02, 90)]).needed == 12
    )  # one that speaks against it decides alone
    assert judge([part(0.05, 7), part(0.001, None)]).needed is None
    assert judge([part(0.05, 7), part(0.05, 9), part(0.05, None, "better"), part(0.001, 500)], most=True).needed == 9
    assert (
        judge([part(0.05, None, "better")]).needed is None
        and judge([part(-0.05, None, "worse"), part(0.01, 8)]).verdict == "refuted"
    )


def test_differences_are_those_of_the_losses(study):
    rows = [{"router": r, "loss": l} for r, l in (("spectra", 2.3), ("switch", 2.36), ("spectra_no_gru", 2.3))]
    runs = study(rows, spread=0.002)[1]
    table = report.ablation_table(report.at_share(runs, 1.0)).set_index("router")
    wide = runs.pivot(index="seed", columns="router", values="val_loss")
    assert (
        table.difference["switch"] == pytest.approx((wide.switch - wide.spectra).mean())
        and table.verdict["switch"] == "higher loss"
        and table.verdict["spectra_no_gru"] == "equivalent"
    )
    assert table.index[0] == "spectra" and table.load_cv_random["switch"] == pytest.approx(0.03)
    with pytest.raises(ValueError, match="no run of 'spectra'"):
        report.ablation_table(runs[runs.router != "spectra"])
    with pytest.raises(ValueError, match="share of training"):
        report.at_share(runs, 0.3)
    assert (
        set(report.ablation_table(report.at_share(runs[runs.seed < 1], 1.0)).verdict.dropna()) == set()
    )  # one seed: numbers, no words


def test_a_margin_that_is_too_wide_proves_nothing(study):
    runs = study([{"router": r, "loss": 2.3} for r in ("spectra", "spectra_no_gru")], spread=0.05)[1]
    assert report.ablation_table(report.at_share(runs)).verdict[1] != "equivalent"


def test_shares_read_the_right_checkpoint(study):
    runs = study([{"router": "spectra", "loss": 2.3}], seeds=2, spread=1e-6)[1]
    for share in report.SHARES:
        here = report.at_share(runs, share)
        assert here.val_loss.to_numpy() == pytest.approx(
            runs.val_loss.to_numpy() + 2 * (1 - share)
        ) and here.load_cv.mean() == pytest.approx(0.03 + 0.2 * share, abs=1e-4)


def test_settings_are_told_by_arithmetic(study):
    rows = [{"router": "spectra", "loss": 2.3, "match": m} for m in ("width", "compute")] + [
        {"router": r, "loss": 2.3, "match": m} for r in ("switch", "topk_aux") for m in ("width", "compute")
    ]
    runs = study(rows, seeds=1)[1]
    found = {
        name: {(r.router, r.match) for r in report.in_setting(runs, name).itertuples()} for name in report.SETTINGS
    }
    assert found["experts"] == {
        ("spectra", "width"),
        ("switch", "compute"),
        ("topk_aux", "width"),
    }  # Switch's one narrow expert is not four
    assert found["compute"] == {("spectra", "compute"), ("switch", "compute"), ("topk_aux", "compute")}
    assert found["width"] == {("spectra", "width"), ("switch", "width"), ("topk_aux", "width")}
    only = runs[~((runs.router == "topk_aux") & (runs.match == "width"))]
    assert ("topk_aux", "compute") in {
        (r.router, r.match) for r in report.in_setting(only, "width").itertuples()
    }  # the same model under another name
    with pytest.raises(ValueError, match="setting 'widht'"):
        report.in_setting(runs, "widht")


def test_old_and_foreign_names_in_the_log(study):
    plan, runs = study([{"router": "spectra", "loss": 2.3}], seeds=1)
    file = plan.folder / runs.run[0] / "routing_log.jsonl"
    rows = [json.loads(l) for l in file.read_text().splitlines()]
    file.write_text(
        "".join(
            json.dumps(
                {**r, "demand_cv": 0.5 if r["layer"] else None, "demand_cv_random": 0.02 if r["layer"] else None}
            )
            + "\n"
            for r in rows
        )
    )
    log = report.routing_log(runs)
    assert (log.load_cv[log.layer > 0] == 0.5).all() and (
        log.load_cv_random[log.layer > 0] == 0.02
    ).all()  # what was wanted counts, where it is known
    assert (log.load_cv_random[log.layer == 0] == 0.03).all()
    file.unlink()
    assert report.routing_log(runs).empty and report.draw_trends(runs, report.routing_log(runs)) is None


def sweep(study, cvs, losses, **more):
    rows = [
        {"router": "spectra", "group": "sweep_c", "router_params": {"osr_repulsion_weight": w}, "loss": l, "cv": c}
        for w, l, c in zip((0.0, 0.1, 0.3, 0.5), losses, cvs)
    ]
    return study(rows, "spectra_sweeps", **more)


@pytest.mark.parametrize(
    "cvs, losses, word",
    [
        ((0.3, 0.2, 0.05, 0.3), (2.30, 2.30, 2.305, 2.31), "reached"),
        ((0.3, 0.2, 0.05, 0.3), (2.30, 2.30, 2.40, 2.31), "missed"),
        ((0.3, 0.2, 0.15, 0.3), (2.30,) * 4, "missed"),
        ((0.3, 0.2, 0.0999, 0.3), (2.30, 2.30, 2.302, 2.31), "undecided"),
    ],
)
def test_the_search_for_balance(study, cvs, losses, word):
    "Reached; flat but too dear; flat nowhere; too close to call."
    plan, runs = sweep(study, cvs, losses, seeds=3, spread=0.002)
    found = report.cv_search(runs)
    assert found.verdict == word and word in found.text
    assert "osr_repulsion_weight 0.3" in found.flattest.point


def test_a_sweep_of_one_seed_still_says_its_numbers(study):
    plan, runs = sweep(study, (0.3, 0.2, 0.05, 0.3), (2.30, 2.30, 2.305, 2.31), seeds=1)
    found = report.cv_search(runs)
    assert found.verdict == "reached" and "One seed" in found.text and report.draw_sweep(runs)[1].seeds.eq(1).all()


def test_a_form_that_cannot_generate_is_kept_apart(study):
    rows = [
        {"router": "spectra", "group": "search", "router_params": p, "loss": 2.3, "cv": c}
        for p, c in (({}, 0.3), ({"bias_rate": 0.01}, 0.2), ({"sinkhorn_inference": True}, 0.02))
    ]
    plan, runs = study(rows, "spectra_search", seeds=3, spread=0.001)
    can, all_ = report.balance_text(runs).split("\n\n")
    assert "missed" in can and "bias_rate 0.01" in can and "reached" in all_ and "sinkhorn_inference True" in all_
    assert "## The search for balance" in report.spectra_report(plan).read_text()
    assert "cannot generate" in report.balance_text(runs[runs.settings.map(report.reads_batch)])


def test_the_cost_is_paired_with_the_point_of_lowest_loss(study):
    plan, runs = sweep(study, (0.3, 0.2, 0.1, 0.3), (2.30, 2.32, 2.35, 2.31), seeds=4, spread=0.003)
    table = report.sweep_table(runs)
    points = runs.assign(w=[s["osr_repulsion_weight"] for s in runs.settings]).pivot(
        index="seed", columns="w", values="val_loss"
    )
    assert (
        table.cost[2] == pytest.approx(100 * (points[0.3] - points[0.0]).mean() / points[0.0].mean())
        and table.cost_low[2] < table.cost[2] < table.cost_high[2]
    )
    assert table.demand_cv[2] - table.floor[2] == pytest.approx(table.excess_cv[2])


def long_runs(consistency):
    rng, rows = np.random.default_rng(0), []
    for router, value in consistency.items():
        for seed in range(4):
            lengths = [
                {
                    "tokens": t,
                    "consistency": value + rng.normal(0, 0.002),
                    "consistency_random": 0.2,
                    "layer_consistency": None,
                    "layer_consistency_random": None,
                    "sequential": 0.4,
                    "sequential_random": 0.2,
                    "peak_mb": 400.0,
                    "peak_to_8k": 1.01,
                    "seconds": 3.0,
                }
                for t in (8192, 131072)
            ]
            rows.append({"run": f"{router}{seed}", "router": router, "seed": seed, "code": "c", "lengths": lengths})
    return pd.DataFrame(rows)


def test_sweep_e():
    for other, word in ((0.5, "better"), (0.7, "worse"), (0.6, "equivalent")):
        found = (
            report.long_differences(long_runs({"spectra": 0.6, "spectra_no_gru": other}))
            .set_index("comparison")
            .verdict
        )
        assert found["consistency, 131072 tokens"] == word and found["sequential, 8192 tokens"] == "equivalent"
    shown = report.long_table(long_runs({"spectra": 0.6, "spectra_no_gru": 0.5}))
    assert (
        len(shown) == 4 and "random 0.200" in shown["sequential overlap"][0] and shown["layer to layer"].eq("-").all()
    )
    assert "within 1.2" in report._memory_text(long_runs({"spectra": 0.6}))[0]
    for short, word in ((2.6, "lowers"), (2.4, "raises"), (None, "does not change")):
        runs = long_runs({"spectra": 0.6})
        for i, r in enumerate(runs.itertuples()):
            r.lengths[-1].update(nll_long=2.5, nll_short=short or 2.5 + (-1) ** i * 0.1)
        assert word in report._context_text(runs)[0]


@pytest.fixture
def no_figures(monkeypatch):
    "The chapter itself draws them; here they only take time."
    for name in ("draw_trends", "draw_layers", "draw_sweep"):
        monkeypatch.setattr(report, name, lambda *a: None)


def test_reports(study, no_figures):
    plan, runs = study(pair() + [{"router": a, "loss": 2.32} for a in report.ABLATIONS], seeds=3)
    page = report.spectra_report(plan).read_text()
    assert (
        all(f"### {h}." in page for h in report.HYPOTHESES)
        and "Equal arithmetic in the experts" in page
        and "Equal active arithmetic" in page
        and "nan" not in page
    )
    stored = pd.read_csv(plan.folder / "verdicts.csv")
    assert set(stored.verdict) <= ALL and list(stored.hypothesis) == list(report.HYPOTHESES)
    (plan.folder / runs.run[0] / "run.json").unlink()
    with pytest.raises(ValueError, match="not finished by today's code"):
        report.spectra_report(plan)


def test_a_study_beside_it_is_read(study, no_figures):
    plan, _ = study(pair(), seeds=3)
    scaling = [
        {"router": r, "loss": l, "hidden": h}
        for h, g in ((128, 0.01), (256, 0.08))
        for r, l in (("spectra", 2.3 - g), ("switch", 2.3))
    ]
    report.made_up_spectra(plan.folder.parent / "spectra_scaling", scaling, seeds=3, spread=0.002)
    sweeps = report.made_up_spectra(
        plan.folder.parent / "spectra_sweeps",
        [
            {
                "router": "spectra",
                "group": "sweep_d",
                "router_params": {"router_entropy_coef": c},
                "loss": 2.3,
                "cv": 0.05,
            }
            for c in (0.0, 0.1)
        ],
        seeds=2,
    )
    page = report.spectra_report(plan).read_text()
    assert "more pronounced in larger models: supported" in page and "Sweeps A to D" in page and "One seed" not in page
    assert "## Sweep d" in report.spectra_report(sweeps).read_text()


def test_nothing_run_nothing_said():
    assert all(v.verdict == "not run" and not v.runs for v in report.hypotheses(None).values())
