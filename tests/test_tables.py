"""Tables: rankings against scipy and brute force, words against intervals, tau against enumeration, false alarms."""

from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from scipy import stats as reference

from moe_routing.stats import minimum_detectable_effect
from moe_routing.studies import tables

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
            word = {"different": "lower" if p.difference < 0 else "higher"}.get(p.verdict, p.verdict)
            sign = {"lower": "<>", "higher": "><", "equivalent": "==", "undecided": "??"}[word]
            assert r.relation(p.a, p.b) == word and sign == r.matrix.loc[p.a, p.b] + r.matrix.loc[p.b, p.a]
        for row in r.table.itertuples():
            beaten = sum(r.relation(row.router, o) == "higher" for o in NAMES if o != row.router)
            assert row.rank_low == beaten + 1 and row.rank_low <= row.rank_high
        assert (r.table.to_best.dropna() >= 0).all()


def test_ranking_refuses_and_warns():
    with pytest.raises(ValueError, match="at least 3"):
        tables.rank_with_classes(table(2))
    with pytest.raises(ValueError, match="at least 2 routers"):
        tables.rank_with_classes(table()[["r0"]])
    wild = table()
    wild["r6"] += [0, 3, 0, -3, 0]
    assert tables.rank_with_classes(wild).wild == ("r6",) and tables.rank_with_classes(table()).wild == ()


def test_a_wide_margin_makes_no_claim():
    x = table(own=0.01)
    free, bound = tables.rank_with_classes(x, margin=0.5), tables.rank_with_classes(x, margin=0.5, widest=0.1)
    assert free.counts["equivalent"] > 0 == bound.counts["equivalent"] and bound.too_wide and not free.too_wide
    assert list(tables.shown_ranking(free))[-1] == "shown equivalent" not in tables.shown_ranking(bound)
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
    same = {"template": "demo", "protocol": 1, "stale": False, "commit": "0123456789abc"}
    return pd.DataFrame({"run": [f"run{i}" for i in range(n)], **{k: [v] * n for k, v in same.items()}, **columns})


def test_tables_refuse_mixed_protocols_and_double_runs():
    runs = runs_of(router=["x", "x"], seed=[0, 1], val_loss=[1.0, 2.0])
    makers = (
        lambda r: tables.by_seed(r, "val_loss"),
        lambda r: tables.mean_table(r, "router", ["val_loss"]),
        lambda r: tables.latex_table(r, runs=r),
    )
    for make in makers:
        assert len(make(runs)) and len(make(runs.assign(protocol=None)))
        with pytest.raises(ValueError, match="several protocols of demo .*protocol 1: 1, protocol 2: 1"):
            make(runs.assign(protocol=[None, 2]))
    double = runs_of(router=["x", "x"], seed=[0, 0], val_loss=[1.0, 2.0], match=["compute", "width"])
    with pytest.raises(ValueError, match="they differ in match"):
        tables.by_seed(double, "val_loss")


def test_missing_metrics_are_dashes_and_leave_a_table():
    runs = runs_of(router=["x", "x", "y"], seed=[0, 1, 0], val_loss=[1.0, 2.0, 3.0], leak=[None] * 3, k=[2, 2, 2])
    t = tables.mean_table(runs, "router", ["val_loss", "leak", "absent", "k"])
    assert t.leak.tolist() == ["-", "-"] == t.absent.tolist() and t.val_loss[1] == "3.000"
    assert list(tables.informative(t, keep=["router"])) == ["router", "seeds", "val_loss", "k"]
    assert list(tables.informative(t.head(1))) == ["router", "seeds", "val_loss", "k"]


def test_paired_table():
    shifts = {"base": 0, "worse": 0.1, "same": 0}
    loss = lambda i, shift: (2 + shift + np.random.default_rng(i).normal(0, 0.001, 5)).tolist()
    parts = [runs_of(router=[r] * 5, seed=range(5), val_loss=loss(i, s)) for i, (r, s) in enumerate(shifts.items())]
    runs = pd.concat([*parts, runs_of(router=["once"], seed=[0], val_loss=[2.0])])
    t = tables.paired_table(runs, "base", margin=0.02).set_index("router")
    assert t.verdict.to_dict() == {"worse": "worse", "same": "equivalent"} and t.mde.between(0, 0.02).all()
    relative = tables.paired_table(runs, "base", relative=True).set_index("router")
    assert relative.difference["worse"] == pytest.approx(5, abs=0.2)
    with pytest.raises(ValueError, match="no run of 'other'"):
        tables.paired_table(runs, "other")
    assert tables.paired_table(runs[runs.router.isin(["base", "once"])], "base").empty


def test_at_most_needs_evidence_on_either_side():
    rng = np.random.default_rng(0)
    said = [tables.at_most({"x": rng.normal(0.05, 0.02, 5)}, 0.05)["x"] for _ in range(1000)]
    assert 0.03 <= said.count("yes") / 1000 <= 0.075 and 0.03 <= said.count("no") / 1000 <= 0.075
    assert tables.at_most({"one": [0.0], "none": [0.0, 0.0], "nan": [np.nan, 0.0]}, 0.05) == {
        "one": "undecided",
        "none": "yes",
        "nan": "undecided",
    }


def test_latex_is_escaped_and_traceable():
    table = pd.DataFrame({"a_b": ["50 %", "x < y"], "v": [1.23456, None]})
    tex = tables.latex_table(table, "A & B", "tab:x", runs=runs_of(router=["x"], seed=[0]))
    assert tex.startswith("% 1 runs, commit 0123456789\n")
    assert all(said in tex for said in (r"a\_b", r"50 \%", "$<$", "1.235", r"\midrule", r"A \& B"))
