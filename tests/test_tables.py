"""Tables and router reports: rankings against scipy and brute force, words against intervals, tau against enumeration, verdicts on made-up studies with a known answer."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from scipy import stats as reference

from moe_routing import router_reports as reports
from moe_routing.studies import tables
from moe_routing.figures import ROUTER_STYLE
from moe_routing.runs.study import load_runs
from moe_routing.stats import minimum_detectable_effect

NAMES = [f"r{i}" for i in range(7)]


def table(seeds=5, gaps=(0, 0, 0.01, 0.02, 0.02, 0.1, 0.3), own=0.004, seed=0, names=NAMES):
    rng = np.random.default_rng(seed)
    return pd.DataFrame(
        2 + np.array(gaps) + rng.normal(0, 0.05, (seeds, 1)) + rng.normal(0, own, (seeds, len(gaps))), columns=names
    )


def test_cliques_against_brute_force():
    rng = np.random.default_rng(0)
    for _ in range(40):
        joined = {frozenset(p) for p in combinations("abcdefg", 2) if rng.random() < 0.5}
        clique = lambda g: all(frozenset(p) in joined for p in combinations(g, 2))
        all_of_them = [set(g) for n in range(1, 8) for g in combinations("abcdefg", n) if clique(g)]
        maximal = {frozenset(g) for g in all_of_them if not any(g < h for h in all_of_them)}
        assert {frozenset(g) for g in tables.groups_of("abcdefg", joined)} == maximal


def test_more_groups_than_letters():
    names = [f"n{i}" for i in range(30)]
    assert tables.letters(names, set())["n29"] == "(30)" and set(
        tables.letters(names, set(), alone=False).values()
    ) == {""}


@pytest.mark.parametrize("seeds", [3, 5, 12])
def test_ranking_is_paired_t_with_correction(seeds):
    x = table(seeds)
    r = tables.rank_with_classes(x)
    p = {frozenset((a, b)): reference.ttest_rel(x[a], x[b]).pvalue for a, b in combinations(NAMES, 2)}
    assert np.allclose(r.pairs.p, [p[frozenset((q.a, q.b))] for q in r.pairs.itertuples()])
    assert np.allclose(r.pairs.p_adjusted, reference.false_discovery_control(r.pairs.p))
    assert ((r.pairs.low > 0) | (r.pairs.high < 0)).eq(r.pairs.verdict == "different").all()
    assert r.margin >= 2 * r.spread - 1e-15 and r.margin >= minimum_detectable_effect(r.spread, seeds) - 1e-12
    assert r.pairs[r.pairs.verdict == "equivalent"].mde.le(r.margin).all()
    assert r.table["mean"].is_monotonic_increasing and list(r.table.router) == list(x.mean().sort_values().index)


def test_words_letters_and_matrix_say_the_same():
    for seed in range(12):
        r = tables.rank_with_classes(table(seed=seed, own=0.01), margin=0.03)
        small, capital = r.table.set_index("router").not_different, r.table.set_index("router").equivalent
        shares = lambda letters, a, b: bool(set(letters[a]) & set(letters[b]))
        for p in r.pairs.itertuples():
            assert shares(small, p.a, p.b) == (p.verdict != "different") and shares(capital, p.a, p.b) == (
                p.verdict == "equivalent"
            )
            assert r.relation(p.a, p.b) == {"different": "lower" if p.difference < 0 else "higher"}.get(
                p.verdict, p.verdict
            )
        for row in r.table.itertuples():
            beaten = sum(r.relation(row.router, o) == "higher" for o in NAMES if o != row.router)
            assert row.rank_low == beaten + 1 and row.rank_low <= row.rank_high
        assert (r.table.to_best.dropna() >= 0).all()


def test_ranking_refuses_and_warns():
    with pytest.raises(ValueError, match="at least 3"):
        tables.rank_with_classes(table(2))
    with pytest.raises(ValueError, match="at least 2 routers"):
        tables.rank_with_classes(table()[["r0"]])
    assert (
        "Only 3 seeds" in tables.rank_with_classes(table(3)).note()
        and "seeds:" not in tables.rank_with_classes(table(5)).note()
    )
    wild = table()
    wild["r6"] += [0, 3, 0, -3, 0]
    assert any("r6" in w for w in tables.rank_with_classes(wild).warnings)


def test_a_wide_margin_makes_no_claim():
    x = table(own=0.01)
    free, bound = tables.rank_with_classes(x, margin=0.5), tables.rank_with_classes(x, margin=0.5, widest=0.1)
    assert (
        (free.pairs.verdict == "equivalent").any()
        and not (bound.pairs.verdict == "equivalent").any()
        and "wider than 0.1" in bound.note()
    )
    assert (free.pairs.verdict == "different").equals(bound.pairs.verdict == "different")


def test_identical_routers_are_equivalent():
    x = table()
    x["r1"] = x["r0"]
    assert tables.rank_with_classes(x, margin=0.02).relation("r0", "r1") == "equivalent"


def test_a_pair_uses_all_the_seeds_it_shares():
    x = table(6)
    x.loc[[4, 5], "r6"] = np.nan
    seeds = tables.rank_with_classes(x).pairs.set_index(["a", "b"]).seeds
    assert seeds[("r5", "r6")] == 4 and seeds[("r2", "r5")] == 6


def test_false_alarms_of_the_ranking_itself():
    """2000 tables of 12 equal routers by the exported function's arithmetic; 60 by the function."""
    rng, (i, j) = np.random.default_rng(5), np.triu_indices(12, 1)
    for seeds in (3, 5):
        loss = rng.normal(0, 1, (2000, seeds, 1)) + rng.normal(0, 0.5, (2000, seeds, 12))
        d = loss[:, :, i] - loss[:, :, j]
        p = reference.ttest_1samp(d, 0, axis=1).pvalue
        assert (
            0.04 <= (p < 0.05).mean() <= 0.06
            and (reference.false_discovery_control(p, axis=1) <= 0.05).any(1).mean() <= 0.06
        )
        for k in range(3):
            mine = tables.rank_with_classes(pd.DataFrame(loss[k], columns=[f"r{n:02d}" for n in range(12)])).pairs
            assert sorted(mine.p.round(9)) == sorted(p[k].round(9))


def test_kendall_bounds_by_enumeration():
    """Every order of the unresolved pairs gives a tau inside the interval, and the ends are reached."""
    a, b = table(5, seed=1), table(5, gaps=(0, 0.01, 0.005, 0.3, 0.02, 0.1, 0.02), seed=2)
    k = tables.kendall_agreement(a, b)
    m = 21
    assert len(k.agree) + len(k.reverse) + k.open == m and k.low <= k.tau <= k.high
    assert k.low == pytest.approx((len(k.agree) - len(k.reverse) - k.open) / m) and k.high == pytest.approx(
        (len(k.agree) - len(k.reverse) + k.open) / m
    )
    assert k.tau == pytest.approx(reference.kendalltau(a.mean(), b.mean()).statistic)
    same = tables.kendall_agreement(a * 10, a * 10)
    assert not same.reverse and same.high == 1


def test_kendall_refuses():
    with pytest.raises(ValueError, match="share 2 routers"):
        tables.kendall_agreement(table()[["r0", "r1", "r2"]], table()[["r1", "r2", "r3"]])
    with pytest.raises(ValueError, match="at least 2 in both"):
        tables.kendall_agreement(table(1), table())


def test_crossed_interval():
    rng = np.random.default_rng(3)
    with pytest.raises(ValueError, match="seeds x windows"):
        tables.crossed_interval(np.zeros((1, 50)))
    missed = {}
    for by_window in (0, 0.05, 0.3):
        d = (
            0.03 * rng.standard_normal((1500, 5, 1))
            + by_window * rng.standard_normal((1500, 1, 64))
            + 0.1 * rng.standard_normal((1500, 5, 64))
        )
        missed[by_window] = np.mean([not c.low <= 0 <= c.high for c in map(tables.crossed_interval, d)])
    assert max(missed.values()) <= 0.06 and missed[0] >= 0.03
    flat = tables.crossed_interval(np.ones((3, 4)))
    assert flat.low == flat.high == 1


def runs_of(**columns):
    n = len(next(iter(columns.values())))
    return pd.DataFrame({"run": [f"run{i}" for i in range(n)], "code": ["a"] * n, "stale": [False] * n, **columns})


def test_tables_refuse_mixed_code_and_double_runs():
    runs = runs_of(router=["x", "x"], seed=[0, 1], val_loss=[1.0, 2.0]).assign(code=["a", "b"])
    for make in (
        lambda **m: tables.by_seed(runs, "val_loss", **m),
        lambda **m: tables.mean_table(runs, "router", ["val_loss"], **m),
        lambda **m: tables.latex_table(runs, runs=runs, **m),
    ):
        with pytest.raises(ValueError, match="different code"):
            make()
        assert len(make(mixed=True))
    with pytest.raises(ValueError, match="they differ in match"):
        tables.by_seed(
            runs_of(router=["x", "x"], seed=[0, 0], val_loss=[1.0, 2.0], match=["compute", "width"]), "val_loss"
        )


def test_missing_metrics_are_dashes():
    runs = runs_of(router=["x", "x", "y"], seed=[0, 1, 0], val_loss=[1.0, 2.0, 3.0], leak=[None, None, None])
    t = tables.mean_table(runs, "router", ["val_loss", "leak", "absent"])
    assert t.leak.tolist() == ["-", "-"] == t.absent.tolist() and t.val_loss[1] == "3.000"


def test_paired_table():
    runs = pd.concat(
        [
            runs_of(
                router=[r] * 5,
                seed=range(5),
                val_loss=(2 + shift + np.random.default_rng(i).normal(0, 0.001, 5)).tolist(),
            )
            for i, (r, shift) in enumerate((("base", 0), ("worse", 0.1), ("same", 0)))
        ]
    )
    t = tables.paired_table(runs, "base", margin=0.02).set_index("router")
    assert t.verdict.to_dict() == {"worse": "worse", "same": "equivalent"}
    assert tables.paired_table(runs, "base", relative=True).set_index("router").difference["worse"] == pytest.approx(
        5, abs=0.2
    )
    with pytest.raises(ValueError, match="no run of 'other'"):
        tables.paired_table(runs, "other")


def test_latex_is_escaped_and_traceable():
    tex = tables.latex_table(
        pd.DataFrame({"a_b": ["50 %", "x < y"], "v": [1.23456, None]}),
        "A & B",
        "tab:x",
        runs=runs_of(router=["x"], seed=[0]),
    )
    assert (
        tex.startswith("% 1 runs, code a\n")
        and r"a\_b" in tex
        and r"50 \%" in tex
        and "$<$" in tex
        and "1.235" in tex
        and r"\midrule" in tex
    )


# --- router reports -----------------------------------------------------------------------------------------------------

TRUTH = {
    "softk": 2.30,
    "switch": 2.33,
    "topk_aux": 2.31,
    "quantile": 2.303,
    "token_hash": 2.40,
    "expert_choice": 2.32,
    "position_hash": 2.45,
    "top1_as_shipped": 2.47,
    "topk_hard_as_shipped": 2.43,
    "expert_choice_as_shipped": 2.28,
}


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    return reports.made_up_study(
        tmp_path_factory.mktemp("studies") / "routers",
        TRUTH,
        spread=0.001,
        drops={"quantile": 0, "position_hash": 0},
        excess={"quantile": 0.01},
        speed={"expert_choice_as_shipped": 20000.0},
    )


@pytest.fixture(scope="module")
def runs(plan):
    return reports.with_groups(load_runs(plan.folder))


def test_every_router_of_the_zoo_has_its_own_look():
    from moe_routing.routers.zoo import ROUTERS

    assert set(ROUTERS) <= set(ROUTER_STYLE) and len(set(ROUTER_STYLE.values())) == len(ROUTER_STYLE)


def test_summary_has_the_seeds_columns(runs, tmp_path):
    reports.summary_csv(runs, tmp_path / "x.csv", "papermill_runs/routers")
    back = pd.read_csv(tmp_path / "x.csv")
    want = "run router top_k capacity_factor num_experts dim expand world_size best_step best_val_ppl best_val_loss best_tokens_per_s best_eff_tflops final_val_ppl final_val_loss median_tokens_per_s median_eff_tflops median_bw_GiBps mean_drop_rate mean_load_cv mean_gate_entropy log_path".split()
    assert (
        list(back)[:22] == want
        and len(back) == len(runs)
        and back.log_path[0] == f"papermill_runs/routers/{runs.run[0]}/train_log.jsonl"
    )
    assert np.allclose(back.mean_load_cv, runs.demand_cv) and np.allclose(
        back.final_val_ppl, np.exp(back.final_val_loss), rtol=1e-4
    )


@pytest.fixture(scope="module")
def report(plan):
    return reports.routers_report(plan)


def test_what_looks_at_other_tokens_is_not_ranked(report, runs):
    kinds = dict(zip(runs.router, runs.kind))
    assert (
        kinds["expert_choice_as_shipped"] == reports.GROUPS[-1]
        and kinds["expert_choice"] == "trainable"
        and kinds["position_hash"] == "control"
    )
    text = report.read_text()
    ranking = text.split("**Ranking by held-out loss**")[1].split("pairs, paired by seed")[0]
    assert "| softk" in ranking and "expert_choice_as_shipped" not in ranking


def test_report_writes_the_seeds_files(plan, report):
    path = report
    names = {p.name for p in plan.folder.iterdir() if p.is_file()}
    assert (
        path.name == "routers_report.md"
        and {"unified_summary.csv", "verdicts.csv"} | {f"unified_{w}.png" for w in reports.FIGURES} <= names
    )
    assert "| nan" not in path.read_text() and "None" not in path.read_text()


def test_ranking_verdict_words(runs):
    assert reports.ranking_verdict(None)["verdict"] == "undecided" == reports.ranking_verdict(runs.iloc[:0])["verdict"]
    got = reports.ranking_verdict(runs)
    assert (
        got["verdict"] == "corrected"
        and "Trained form: expert-choice before softk: reversed" in got["measured"]
        and got["runs"]
    )
    shipped = runs[runs.router.isin([f[0] for f in reports.PUBLISHED_AS.values()])]
    assert reports.ranking_verdict(shipped)["verdict"] == "reproduced"
    flip = shipped.assign(val_loss=-shipped.val_loss, val_loss_as_trained=None)
    assert reports.ranking_verdict(flip)["verdict"] == "refuted"
    assert reports.ranking_verdict(shipped[shipped.seed < 2])["verdict"] == "undecided"


def test_scale_verdict_words(runs):
    small = runs[runs.capacity_factor == 1.25]
    assert reports.scale_verdict(small, small)["verdict"] == "reproduced"
    assert reports.scale_verdict(small, small.assign(val_loss=-small.val_loss))["verdict"] == "refuted"
    noisy = small.assign(val_loss=small.val_loss + np.random.default_rng(1).normal(0, 1, len(small)))
    assert reports.scale_verdict(small, noisy)["verdict"] == "undecided"
    assert (
        reports.scale_verdict(small, None)["why"] == "larger not run"
        and reports.subword_verdict(None, small)["why"] == "routers not run"
    )
    assert "hash, topk-hard" in reports.scale_verdict(None, None)["published"]


def test_capacity_verdict_words(runs):
    assert (
        reports.capacity_verdict(runs)["verdict"] == "corrected"
        and reports.capacity_verdict(None)["verdict"] == "undecided"
    )
    trained = runs[runs.router.isin(["softk", "switch"])]
    assert reports.capacity_verdict(trained)["verdict"] == "refuted"
    assert (
        reports.capacity_verdict(
            trained.assign(drop_rate=0.0, capacity_factor=1.05).drop_duplicates(["router", "seed"])
        )["verdict"]
        == "reproduced"
    )
    assert (
        reports.capacity_verdict(trained[trained.capacity_factor == 1.25].assign(drop_rate=0.0))["verdict"]
        == "undecided"
    )  # none at 1.25 says nothing about 1.10
    assert reports.capacity_verdict(trained[trained.seed == 0])["verdict"] == "undecided"


def test_throughput_verdict_words(runs):
    number, order = reports.throughput_verdicts(runs)
    assert number["verdict"] == "corrected" and "39700" in number["measured"] and order["verdict"] == "reproduced"
    slow = runs.assign(
        median_tokens_per_s=runs.median_tokens_per_s.where(runs.router != "expert_choice_as_shipped", 10.0)
    )
    assert (
        reports.throughput_verdicts(slow)[1]["verdict"] == "refuted"
        and reports.throughput_verdicts(None)[1]["verdict"] == "undecided"
    )


def test_balance_verdicts_and_missing_reference(runs):
    setting = runs[(runs.capacity_factor == 1.25) & runs.router.isin([*reports.BALANCERS, "softk"])]
    t = reports.balance_table(setting).set_index("router")
    assert (
        t.on_floor["quantile"] == "yes"
        and t.on_floor["switch"] == "no" == t.cheap["switch"]
        and t.cheap["quantile"] == "yes"
        and t.cheap["softk"] == "-"
    )
    with pytest.raises(ValueError, match="no run of 'softk'"):
        reports.balance_table(setting[setting.router != "softk"])
    bare = reports.balance_table(setting.drop(columns=["layer_max_violation", "layer_cv"]))
    assert (bare.on_floor == "undecided").all() and "-" in set(reports.shown_balance(bare)["worst layer"])


def test_at_most_needs_evidence_on_either_side():
    rng = np.random.default_rng(0)
    wrong = [reports.at_most({"x": rng.normal(0.05, 0.02, 5)}, 0.05)["x"] for _ in range(1000)]
    assert 0.03 <= wrong.count("yes") / 1000 <= 0.075 and 0.03 <= wrong.count("no") / 1000 <= 0.075


def test_the_same_model_counts_under_both_matches(runs):
    shipped = runs[(runs.router == "softk") & (runs.capacity_factor == 1.25)].assign(match="width")
    some = pd.concat([runs[runs.router.isin(["switch", "topk_aux"])], shipped], ignore_index=True)
    both = reports.same_models(some)
    at = lambda match: both[(both.match == match) & (both.capacity_factor == 1.25)]
    assert set(at("compute").router) == {"switch", "topk_aux", "softk"} and set(at("width").router) == {
        "softk",
        "topk_aux",
    }  # switch asks for one expert: another width
    assert not at("width").duplicated(["router", "seed"]).any() and len(both) == len(some) + 10
    assert reports.same_models(runs) is runs and reports.same_models(both) is both


def test_report_refuses_an_unfinished_study(plan):
    with pytest.raises(ValueError, match="1 of 101 runs are not finished"):
        reports.routers_report(replace(plan, runs={**plan.runs, "more": {}}))


def test_figures_without_logs_are_left_out(tmp_path):
    plan = reports.made_up_study(
        tmp_path / "bare",
        {"softk": 2.3, "switch": 2.4, "topk_aux": 2.35},
        seeds=3,
        capacity_factors=(None,),
        logs=False,
    )
    text = reports.routers_report(plan).read_text()
    assert (
        sorted(p.name for p in plan.folder.glob("*.png"))
        == ["bare_frontier.png", "bare_gate_entropy.png", "bare_load_vs_ppl.png"]
        and "Only 3 seeds" in text
        and "no limit" in text
    )
