"""What a SPECTRA study is judged by, on made-up runs whose truth is known: every verdict comes out each way."""

import json

import numpy as np
import pandas as pd
import pytest

from moe_routing.stats import minimum_detectable_effect
from moe_routing.studies import spectra as report
from moe_routing.studies.tables import crossed_interval

DOMAINS = ("code", "math", "prose", "story")
OF_ROW = {"loss": None, "cv": 0.2, "overlap": 0.05, "gram": 0.02, "consistency": 0.3, "gains": {}, "speed": 9000.0}


def made_up(rows, seeds=5, spread=0.004, rng=None):
    "Runs and routing log with planted truths. Rows: router, loss, and what differs from the defaults."
    rng, luck, runs, log = rng or np.random.default_rng(0), None, [], []
    luck = rng.normal(0, 0.02, seeds)
    for i, row in enumerate(rows):
        given = OF_ROW | row
        for seed in range(seeds):
            run = one_run(f"p{i}-{seed}", given, seed, luck[seed] + rng.normal(0, spread), spread, rng)
            runs.append(run)
            log += one_log(run, given, spread, rng)
    return pd.DataFrame(runs), pd.DataFrame(log)


def one_run(name, given, seed, shift, spread, rng):
    "A run as `study_runs` gives it."
    ours, k = given["router"].startswith("spectra"), {"switch": 1, "switch_top2": 2}.get(given["router"], 4)
    shape = {"hidden": 128, "layers": 4, "intermediate": 96, "num_experts": 16, "k": 4, "steps": 100}
    shape |= {n: v for n, v in given.items() if n not in OF_ROW and n != "router_params"}
    match = shape.setdefault("match", "width" if ours else "compute")
    one, loss = 6 * shape["hidden"] * 96 * shape["layers"], given["loss"] + shift
    ffn, share = (k, 1.2 if ours else k / 4) if match == "width" else (4 * (0.6 if ours else 1), 1.0)
    nll = [10 * (loss - given["gains"].get(DOMAINS[w % 4], 0) + rng.normal(0, spread)) for w in range(32)]
    mean = sum(nll) / 320 - loss  # the windows must give the run's loss
    windows = {"window": list(range(32)), "tokens": [10] * 32, "domain": [DOMAINS[w % 4] for w in range(32)]}
    return {
        **{"run": name, "seed": seed, "router": given["router"], "group": "ablations", "corpus": "embedded", **shape},
        **{"val_loss": loss, "val_loss_as_trained": None, "ffn_flops_per_token": ffn * one, "active_share": share},
        **{"nominal_k": k, "median_tokens_per_s": given["speed"] * (1 + rng.normal(0, 0.01))},
        **{"flops_per_token": 1e9, "router_flops_per_token": 0.0, "settings": given.get("router_params", {})},
        "layer_cv": [0.03 + given["cv"] + rng.normal(0, spread) for _ in range(shape["layers"])],
        "layer_floor_cv": [0.03] * shape["layers"],
        "documents": {**windows, "nll": [x - 10 * mean for x in nll]},
    }


def one_log(run, given, spread, rng):
    "The routing log of a run, under the names of MEASURES."
    chance = {
        "load_cv": 0.03,
        "max_violation": 0.1,
        "overlap": 0.25,
        "gram": 0.9,
        "consistency": 0.25,
        "sequential": 0.2,
    }
    over = {"load_cv": given["cv"], "max_violation": 2 * given["cv"], "sequential": 0.1}
    over |= {m: given[m] for m in ("overlap", "gram", "consistency")}
    rows = [
        {"run": run["run"], "share": s, "step": round(100 * s), "layer": l} for s in report.SHARES for l in range(2)
    ]
    values = [{m: chance[m] + over[m] * r["share"] + rng.normal(0, spread) for m in chance} for r in rows]
    return [{**r, **v, **{f"{m}_random": c for m, c in chance.items()}} for r, v in zip(rows, values)]


def pair(spectra=2.30, switch=2.34, top2=2.34, other=None, **mine):
    "Rows of SPECTRA and both Switch variants at equal width and matched compute."
    losses = {"spectra": spectra, "switch": switch, "switch_top2": top2}
    more = {"spectra": mine, "switch": other or {}, "switch_top2": other or {}}
    return [{"router": r, "loss": l, "match": m, **more[r]} for m in ("width", "compute") for r, l in losses.items()]


@pytest.mark.parametrize(
    "losses, spread, word",
    [
        ((2.30, 2.34, 2.33), 0.002, "reproduced"),
        ((2.34, 2.30, 2.30), 0.002, "refuted"),
        ((2.30, 2.30, 2.30), 0.001, "refuted"),
        ((2.30, 2.315, 2.315), 0.03, "undecided"),
        ((2.30, 2.34, 2.26), 0.002, "refuted"),
    ],
)
def test_h1(losses, spread, word):
    "Better; worse; shown equivalent; not decided; better than one and worse than the other, so not better on most."
    found = report.h1(made_up(pair(*losses), spread=spread)[0])
    assert found.verdict == word and len(found.parts) == 6 and found.hardest.low <= found.hardest.high
    assert (found.needed is None) == (word != "undecided") or found.parts.needed.isna().any()
    assert found.facts["loss_spectra"] == pytest.approx(losses[0], abs=0.05) and "loss_as_trained" not in found.facts


def test_most_is_more_than_half():
    rows = [{**r, "loss": 2.28} if r["router"] == "switch_top2" and r["match"] == "compute" else r for r in pair()]
    found = report.h1(made_up(rows, spread=0.001)[0])
    assert found.verdict == "reproduced" and found.count("worse") == 2 and found.hardest.advantage < 0


def test_tasks_join_the_comparison():
    runs = made_up(pair(2.30, 2.34, 2.34), spread=0.001)[0]
    right = np.random.default_rng(0).normal(0, 0.005, len(runs))
    runs["lambada_accuracy"] = 0.3 + 0.2 * (runs.router == "spectra") + right
    assert len(report.h1(runs).parts) == 12 and report.h1(runs).verdict == "reproduced"


def test_a_search_says_what_another_setting_gains():
    rows = [
        {"router": "spectra", "loss": l, "router_params": p} for l, p in ((2.4, {}), (2.2, {"sinkhorn_epsilon": 0.5}))
    ]
    off = {"enable_sinkhorn": False, "expert_choice_routing": False}
    search = made_up([*rows, {"router": "spectra", "loss": 1.9, "router_params": off}], seeds=3)[0]
    gain = report.tuning_gain(search)
    assert gain["point"] == "sinkhorn_epsilon 0.5" and gain["low"] < 100 * 0.2 / 2.4 < gain["high"]
    assert report.tuning_gain(None) is None and report.tuning_gain(search[search.val_loss > 2.3]) is None


@pytest.mark.parametrize(
    "mine, other, word",
    [
        ((-0.10, 0.05), (0.05, 0.01), "reproduced"),
        ((0.10, 0.05), (0.05, 0.01), "refuted"),
        ((-0.10, 0.0), (0.05, 0.0), "refuted"),
        ((-0.05, 0.02), (0.05, 0.0), "undecided"),
    ],
)
def test_h2_needs_the_baselines_and_chance(mine, other, word):
    rows = pair(overlap=mine[0], gram=mine[1], other={"overlap": other[0], "gram": other[1]})
    found = report.h2(*made_up(rows, spread=0.002 if word != "undecided" else 0.08, seeds=4))
    assert found.verdict == word


def test_h2_below_baselines_but_above_chance_is_refuted():
    found = report.h2(*made_up(pair(overlap=0.05, gram=0.05, other={"overlap": 0.10, "gram": 0.01}), spread=0.001))
    table = found.parts.set_index("comparison").verdict
    assert table["overlap against random"] == "worse" and table["overlap against switch"] == "better"
    assert found.verdict == "refuted"


@pytest.mark.parametrize(
    "mine, other, spread, word",
    [
        (0.4, 0.3, 0.002, "reproduced"),
        (0.2, 0.3, 0.002, "refuted"),
        (0.3, 0.3, 0.002, "refuted"),
        (0.31, 0.3, 0.12, "undecided"),
    ],
)
def test_h3(mine, other, spread, word):
    rows = pair(consistency=mine, other={"consistency": other})
    assert report.h3(*made_up(rows, spread=spread, seeds=4)).verdict == word


@pytest.mark.parametrize(
    "speed, rest, word", [(8500.0, 1e9, "reproduced"), (5000.0, 1e9, "refuted"), (8500.0, 1e5, "refuted")]
)
def test_h4_takes_time_and_arithmetic(speed, rest, word):
    rows = [{**r, "speed": speed if r["router"] == "spectra" else 9000.0} for r in pair()]
    runs = made_up(rows, seeds=4)[0].assign(flops_per_token=rest)
    found = report.h4(runs)
    assert found.verdict == word and found.facts["time"] == pytest.approx(9000 / speed, rel=0.05)
    untimed = report.h4(runs.drop(columns="median_tokens_per_s"))
    assert untimed.verdict == ("refuted" if rest < 1e6 else "undecided") and "time" not in untimed.facts
    assert report.h4(runs[runs.router != "spectra"]).verdict == "not testable here"


def test_flops_by_hand():
    "Six matrices of the cell, the projector, cosines, repulsion: counted one by one."
    H, E, R = 24, 4, 3
    matrices = [(H, E * R)] * 3 + [(E * R, E * R)] * 3 + [(H, E * R)]
    multiplications = sum(a * b for a, b in matrices) + E * R + E * E
    assert report.router_flops(H, E, R, 10**9)["total"] == pytest.approx(2 * multiplications)
    assert report.router_flops(H, E, R, 1)["total"] == 2 * (multiplications - 3 * (E * R) ** 2)
    assert report.router_flops(H, E, R)["switch"] == 2 * H * E
    with pytest.raises(ValueError, match="router_dim = 0"):
        report.router_flops(H, E, 0)


@pytest.mark.parametrize(
    "change, spread, word",
    [
        ({}, 0.002, "reproduced"),
        ({"spectra_no_gru": 0.0}, 0.002, "refuted"),
        ({"spectra_no_quota": -0.04}, 0.002, "refuted"),
        ({"spectra_all_removed": 0.02}, 0.002, "refuted"),
        ({"spectra_no_gru": 0.012}, 0.02, "undecided"),
    ],
)
def test_h5(change, spread, word):
    losses = {"spectra": 0, **dict.fromkeys(report.VARIANTS, 0.04), "spectra_all_removed": 0.10} | change
    rows = [{"router": r, "loss": 2.3 + d} for r, d in losses.items()]
    assert report.h5(made_up(rows, spread=spread)[0]).verdict == word


@pytest.mark.parametrize(
    "gains, spread, word",
    [
        ((0.01, 0.08), 0.003, "reproduced"),
        ((0.08, 0.01), 0.003, "refuted"),
        ((0.05, 0.05), 0.001, "refuted"),
        ((-0.09, -0.04), 0.003, "refuted"),
        ((0.03, 0.04), 0.03, "undecided"),
    ],
)
def test_h6(gains, spread, word):
    "Grows; shrinks; stays; grows but is none; not decided."
    sizes = ((128, gains[0]), (256, gains[1]))
    rows = [{"router": r, "loss": l, "hidden": h} for h, g in sizes for r, l in (("spectra", 2.3 - g), ("switch", 2.3))]
    runs = made_up(rows, spread=spread)[0]
    found = report.h6(runs)
    times = (4 * 256 + 48 * 96) * 256 / ((4 * 128 + 48 * 96) * 128)  # attention and experts of a layer
    assert found.verdict == word and found.facts["times"] == pytest.approx(times)
    assert len(report.size_table(runs)) == 2 and report.h6(None).verdict == "not testable here"


@pytest.mark.parametrize(
    "gains, spread, word",
    [
        ({"code": 0.08, "math": 0.08}, 0.004, "reproduced"),
        ({"prose": 0.08, "story": 0.08}, 0.004, "refuted"),
        ({}, 0.03, "undecided"),
    ],
)
def test_h7(gains, spread, word):
    assert report.h7(made_up(pair(2.28, 2.30, 2.30, gains=gains), spread=spread)[0]).verdict == word


def test_h7_without_domains_is_not_testable():
    runs = made_up(pair(), seeds=2)[0]
    runs["documents"] = [{k: v for k, v in d.items() if k != "domain"} for d in runs.documents]
    assert report.h7(runs).verdict == "not testable here"


def test_the_contrast_is_the_difference_of_means_with_their_spread():
    rng, first, inside = np.random.default_rng(0), np.arange(40) % 2 == 0, 0
    for _ in range(400):
        gain = rng.normal(0, 0.02, (5, 1)) + np.where(first, 0.1, 0.05) + rng.normal(0, 0.05, 40)
        gain = gain + rng.normal(0, 0.01, (5, 40))
        x = report.contrast(gain[:, first], gain[:, ~first])
        assert np.isclose(x.mean(), gain[:, first].mean() - gain[:, ~first].mean())
        i = crossed_interval(x)
        inside += i.low <= 0.05 <= i.high
    assert inside / 400 >= 0.94 and i.high - i.low < 0.2  # keeps its level without being boundless


def test_a_null_is_rarely_called():
    "Under no difference at all, about one table in twenty holds a claim of a difference."
    rng, wrong = np.random.default_rng(0), 0
    for _ in range(60):
        drawn = [[pd.Series(rng.normal(0, 0.01, 5)) for _ in range(2)] for _ in range(4)]
        pairs = [report.Pair(f"p{i}", a, b, False, 0.01) for i, (a, b) in enumerate(drawn)]
        wrong += report.compare(pairs).verdict.isin(["better", "worse"]).any()
    assert wrong < 10


def test_seeds_needed_is_what_decides():
    for sd, effect in ((0.01, 0.01), (0.01, 0.004), (0.02, 0.05)):
        n = report.seeds_needed(sd, effect)
        assert minimum_detectable_effect(sd, n) <= effect and (n == 2 or minimum_detectable_effect(sd, n - 1) > effect)
    assert report.seeds_needed(0.01, 0.004, tests=7) > report.seeds_needed(0.01, 0.004)  # a table asks for more
    three = pd.Series([-0.20, -0.25, -0.29])  # p of .01: shown alone, not among seven
    others = [pd.Series([-0.3, 0.3, 0.02]) * i for i in range(1, 7)]
    rows = report.compare([report.Pair(f"p{i}", x, three * 0, True, 0.01) for i, x in enumerate([three, *others])])
    assert rows.verdict[0] == "undecided" and rows.needed[0] > 3
    assert report.seeds_needed(0.01, 0) is None
    assert report.seeds_needed(0.01, 0, 0.01) < report.seeds_needed(0.01, 0.005, 0.01)


def test_the_number_of_seeds_is_that_after_which_the_rule_speaks():
    def part(advantage, needed, verdict="undecided"):
        return {"comparison": "x", "advantage": advantage, "margin": 0.01, "verdict": verdict, "needed": needed}

    def judge(*rows, most=False):
        return report.judge(pd.DataFrame(rows), ["r"], most)

    assert judge(part(0.05, 7), part(0.02, 30)).needed == 30  # all must be shown
    assert judge(part(0.05, 7), part(-0.02, 12), part(0.02, 90)).needed == 12  # one that speaks against decides alone
    assert judge(part(0.05, 7), part(0.001, None)).needed is None
    rows = [part(0.05, 7), part(0.05, 9), part(0.05, None, "better"), part(0.001, 500)]
    assert judge(*rows, most=True).needed == 9
    assert judge(part(0.05, None, "better")).needed is None
    assert judge(part(-0.05, None, "worse"), part(0.01, 8)).verdict == "refuted"


def test_differences_are_those_of_the_losses():
    rows = [{"router": r, "loss": l} for r, l in (("spectra", 2.3), ("switch", 2.36), ("spectra_no_gru", 2.3))]
    runs, log = made_up(rows, spread=0.002)
    table = report.ablation_table(report.at_share(runs, 1.0, log)).set_index("router")
    wide = runs.pivot(index="seed", columns="router", values="val_loss")
    assert table.difference["switch"] == pytest.approx((wide.switch - wide.spectra).mean())
    assert table.verdict["switch"] == "higher loss" and table.verdict["spectra_no_gru"] == "equivalent"
    assert table.index[0] == "spectra" and table.detectable["switch"] < 0.06
    with pytest.raises(ValueError, match="no run of 'spectra'"):
        report.ablation_table(runs[runs.router != "spectra"])
    with pytest.raises(ValueError, match="share of training"):
        report.at_share(runs, 0.3, log)
    with pytest.raises(ValueError, match="several runs of one seed"):
        report.ablation_table(pd.concat([runs, runs]))
    one = report.ablation_table(report.at_share(runs[runs.seed < 1], 1.0, log))
    assert one.verdict.isna().all() and one.val_loss.notna().all()  # one seed: numbers, no words


def test_noise_proves_no_equivalence():
    runs = made_up([{"router": r, "loss": 2.3} for r in ("spectra", "spectra_no_gru")], spread=0.05)[0]
    assert report.ablation_table(runs).verdict[1] != "equivalent"


def test_shares_read_the_right_checkpoint():
    runs, log = made_up([{"router": "spectra", "loss": 2.3}], seeds=2, spread=1e-6)
    curves = {
        r.run: [{"step": 100 * s, "val_loss": r.val_loss + 2 * (1 - s)} for s in report.SHARES]
        for r in runs.itertuples()
    }
    for share in report.SHARES:
        here = report.at_share(runs, share, log, curves)
        assert here.val_loss.to_numpy() == pytest.approx(runs.val_loss.to_numpy() + 2 * (1 - share))
        assert here.load_cv.mean() == pytest.approx(0.03 + 0.2 * share, abs=1e-4)
    assert list(report.difference_over_time(runs, log, curves)) == ["variant"]  # nothing to compare with


def test_settings_are_told_by_arithmetic():
    rows = [
        {"router": r, "loss": 2.3, "match": m} for r in ("spectra", "switch", "topk_aux") for m in ("width", "compute")
    ]
    runs = made_up(rows, seeds=1)[0]
    found = {n: {(r.router, r.match) for r in report.in_setting(runs, n).itertuples()} for n in report.SETTINGS}
    # Switch's one narrow expert is not four
    assert found["experts"] == {("spectra", "width"), ("switch", "compute"), ("topk_aux", "width")}
    assert found["compute"] == {(r, "compute") for r in ("spectra", "switch", "topk_aux")}
    assert found["width"] == {(r, "width") for r in ("spectra", "switch", "topk_aux")}
    only = runs[~((runs.router == "topk_aux") & (runs.match == "width"))]
    there = {(r.router, r.match) for r in report.in_setting(only, "width").itertuples()}
    assert ("topk_aux", "compute") in there  # the same model under another name
    with pytest.raises(ValueError, match="setting 'widht'"):
        report.in_setting(runs, "widht")


def test_what_was_wanted_counts_where_it_is_known(tmp_path):
    rows = [
        {
            "step": 1,
            "share": 1.0,
            "layer": l,
            "load_cv": 0.3,
            "load_cv_random": 0.03,
            "demand_cv": d,
            "demand_cv_random": r,
        }
        for l, d, r in ((0, None, None), (1, 0.5, 0.02))
    ]
    (tmp_path / "logs.jsonl").write_text(json.dumps({"run": "a", "routing_log": rows}) + "\n")
    log = report.measures_of(tmp_path)
    assert log.load_cv.tolist() == [0.3, 0.5] and log.load_cv_random.tolist() == [0.03, 0.02]
    (tmp_path / "logs.jsonl").write_text(json.dumps({"run": "a"}) + "\n")
    assert report.measures_of(tmp_path).empty


def sweep(cvs, losses, **more):
    "Four values of one parameter."
    values = zip((0.0, 0.1, 0.3, 0.5), losses, cvs)
    rows = [
        {"router": "spectra", "loss": l, "cv": c, "router_params": {"osr_repulsion_weight": w}} for w, l, c in values
    ]
    return made_up(rows, **more)[0]


@pytest.mark.parametrize(
    "cvs, losses, word",
    [
        ((0.3, 0.2, 0.05, 0.3), (2.30, 2.30, 2.305, 2.31), "reached"),
        ((0.3, 0.2, 0.05, 0.3), (2.30, 2.30, 2.40, 2.31), "missed"),
        ((0.3, 0.2, 0.15, 0.3), (2.30,) * 4, "missed"),
        ((0.3, 0.2, 0.101, 0.3), (2.30, 2.30, 2.302, 2.31), "undecided"),
    ],
)
def test_the_search_for_balance(cvs, losses, word):
    "Reached; flat but too dear; flat nowhere; too close to call."
    found = report.cv_search(sweep(cvs, losses, seeds=3, spread=0.002))
    assert found.verdict == word and "osr_repulsion_weight 0.3" in found.flattest.point and found.points == 4


def test_a_sweep_of_one_seed_is_judged_by_its_values():
    runs = sweep((0.3, 0.2, 0.05, 0.3), (2.30, 2.30, 2.305, 2.31), seeds=1)
    found = report.cv_search(runs)
    assert found.verdict == "reached" and found.best.seeds == 1 and np.isnan(found.best.excess_low)
    assert "above the floor" in report.shown_sweep(report.sweep_table(runs))


def test_forms_that_left_spectra_are_told_apart():
    off = {"enable_sinkhorn": False, "expert_choice_routing": False}
    assert report.form_of({"bias_rate": 0.01}) == "SPECTRA" and report.form_of(off) == "Sinkhorn and quota off"
    assert report.form_of({"sinkhorn_inference": True}) == "reads the batch"
    assert report.form_of({"sinkhorn_inference": True, "enable_sinkhorn": False}) == "SPECTRA"


def test_the_noise_of_one_plan():
    grid = [(e, l) for e in (0.03, 0.05, 0.1, 0.2) for l in (True, False)]
    rows = [{"sinkhorn_epsilon": e, "log_sinkhorn_enabled": l} for e, l in grid]
    runs = made_up([{"router": "spectra", "loss": 2.3, "router_params": p} for p in rows], seeds=4, spread=0.02)[0]
    assert 0.012 < report.same_plan_spread(runs) < 0.03
    assert report.same_plan_spread(runs[runs.settings.map(lambda s: s["log_sinkhorn_enabled"])]) is None


def test_the_cost_is_paired_with_the_point_of_lowest_loss():
    runs = sweep((0.3, 0.2, 0.1, 0.3), (2.30, 2.32, 2.35, 2.31), seeds=4, spread=0.003)
    table = report.sweep_table(runs)
    weight = [s["osr_repulsion_weight"] for s in runs.settings]
    losses = runs.assign(w=weight).pivot(index="seed", columns="w", values="val_loss")
    assert table.cost[2] == pytest.approx(100 * (losses[0.3] - losses[0.0]).mean() / losses[0.0].mean())
    assert table.cost_low[2] < table.cost[2] < table.cost_high[2]
    assert table.demand_cv[2] - table.floor[2] == pytest.approx(table.excess_cv[2])


def test_a_default_stands_where_it_lies_and_a_zero_has_a_place():
    params = ({}, {"sinkhorn_epsilon": 0.5}, {"sinkhorn_epsilon": 0.2, "bias_rate": 0.01})
    runs = made_up([{"router": "spectra", "loss": 2.3, "router_params": p} for p in params], seeds=2)[0]
    x, values, labels = report._lines_of(report.sweep_table(runs), report.sweep_points(runs)[1])
    assert x == "sinkhorn_epsilon" and values.tolist() == [0.1, 0.5, 0.2]
    assert labels.tolist() == ["otherwise default", "otherwise default", "bias rate 0.01"]
    assert report._axis_of([], pd.Series([0.0, 0.001, 0.1])).tolist() == [0, 1, 2]
    assert report._axis_of([], pd.Series([0.0, 0.1, 0.3])).tolist() == [0.0, 0.1, 0.3]


def long_runs(consistency):
    "Runs of sweep E with a planted consistency."
    rng, rows = np.random.default_rng(0), []
    fixed = {"consistency_random": 0.2, "layer_consistency": None, "layer_consistency_random": None}
    fixed |= {"sequential": 0.4, "sequential_random": 0.2, "peak_mb": 400.0, "peak_to_8k": 1.01, "seconds": 3.0}
    for router, value in consistency.items():
        for seed in range(4):
            lengths = [{"tokens": t, "consistency": value + rng.normal(0, 0.002), **fixed} for t in (8192, 131072)]
            rows.append({"run": f"{router}{seed}", "router": router, "seed": seed, "lengths": lengths})
    return pd.DataFrame(rows)


@pytest.mark.parametrize("other, word", [(0.5, "better"), (0.7, "worse"), (0.6, "equivalent")])
def test_sweep_e(other, word):
    table = report.by_length(long_runs({"spectra": 0.6, "spectra_no_gru": other}))
    found = report.long_differences(table).set_index("comparison").verdict
    assert found["consistency, 131072 tokens"] == word and found["sequential, 8192 tokens"] == "equivalent"
    shown = report.long_table(table)
    assert len(shown) == 4 and shown["sequential overlap"][0].endswith("/ 0.200") and "layer to layer" not in shown


def test_fine_tuning_is_paired_by_seed():
    losses = {
        ("none", "mean"): 3.4,
        ("topk_aux", "mean"): 3.3,
        ("spectra", "mean"): 3.35,
        ("spectra", "sum_as_shipped"): 3.5,
    }
    fixed = {"loss_dense": 3.6, "harm_of_upcycling": 0.0, "gain_of_sft": 0.2, "parameters": 1e5}
    luck = [(s, 0.1 * s + 0.001 * (s == 1)) for s in range(3)]
    rows = [
        {"router": r, "combine": c, "seed": s, "loss_sft": l + x, **fixed}
        for (r, c), l in losses.items()
        for s, x in luck
    ]
    variants = report.sft_variants(pd.DataFrame(rows).assign(run=range(len(rows))))
    found = report.sft_comparisons(variants).set_index("comparison")
    assert found.verdict["spectra against topk_aux"] == "worse" and found.verdict["spectra against none"] == "better"
    assert found.advantage["spectra against spectra, sum as shipped"] == pytest.approx(0.15)
    assert report.sft_table(variants).model.tolist() == ["dense", "topk_aux", "spectra", "spectra, sum as shipped"]
