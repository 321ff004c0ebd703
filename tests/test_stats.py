"Statistics against scipy, simulation and their own promises; bad input."

import numpy as np
import pytest
from scipy import stats as reference

from moe_routing.stats import (
    benjamini_hochberg,
    mean_interval,
    minimum_detectable_effect,
    paired_bootstrap,
    paired_ratio,
    paired_t,
    tost,
    verdict,
    verdicts,
    wilson,
)


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize("n", [2, 3, 5, 40])
@pytest.mark.parametrize("level", [0.8, 0.95])
def test_t_intervals_match_scipy(n, level):
    a, b = rng(n).normal(size=(2, n))
    ci = reference.ttest_rel(a, b).confidence_interval(level)
    got = paired_t(a, b, level=level)
    assert np.allclose([got.low, got.high, got.p], [ci.low, ci.high, reference.ttest_rel(a, b).pvalue])
    assert np.allclose(mean_interval(a - b, level)[:3], got[:3]) and got.difference == got.estimate


def test_cluster_t_matches_a_loop_and_single_clusters():
    a, b = rng(1).normal(size=(2, 30))
    labels = np.array(list("aabbbccccdddddeeeeeeffffffffff"))
    d, G = a - b, 6
    parts = [d[labels == c].sum() - (labels == c).sum() * d.mean() for c in "abcdef"]
    se = (G / (G - 1) * sum(p * p for p in parts)) ** 0.5 / 30
    got = paired_t(a, b, labels)
    assert (
        got.n == 6
        and np.isclose(got.high - got.estimate, reference.t.ppf(0.975, 5) * se)
        and np.isclose(got.estimate, d.mean())
    )
    assert np.allclose(paired_t(a, b, range(30))[:4], paired_t(a, b)[:4])
    shuffle = rng(2).permutation(30)
    assert np.allclose(paired_t(a[shuffle], b[shuffle], labels[shuffle])[:4], got[:4])


@pytest.mark.parametrize("method", ["studentised", "percentile"])
def test_bootstrap_is_repeatable_symmetric_and_close_to_t_on_normal_data(method):
    a, b = rng(3).normal(0.2, 1, (2, 400))
    got = paired_bootstrap(a, b, method=method)
    again = paired_bootstrap(a, b, method=method)
    swapped = paired_bootstrap(b, a, method=method)
    t = paired_t(a, b)
    assert got == again and np.isclose(got.estimate, -swapped.estimate)
    assert np.allclose([got.low, got.high], [t.low, t.high], atol=0.02) and np.allclose(
        [swapped.low, swapped.high], [-got.high, -got.low], atol=0.02
    )
    assert (got.p < 0.05) == (not got.low <= 0 <= got.high)


def test_bootstrap_p_agrees_with_its_interval():
    for seed in range(40):
        d = rng(seed).exponential(size=25) - 0.7
        got = paired_bootstrap(d, np.zeros(25), draws=999)
        if abs(got.p - 0.05) > 0.01:
            assert (got.p < 0.05) == (not got.low <= 0 <= got.high)


def test_studentised_bootstrap_keeps_its_promise_with_few_unequal_clusters():
    g, wrong = rng(4), 0
    for _ in range(300):
        size = g.integers(1, 12, 12)
        d = np.repeat(g.normal(size=12), size) + g.normal(size=size.sum())
        wrong += paired_bootstrap(d, np.zeros(len(d)), np.repeat(np.arange(12), size), draws=400, generator=g).p < 0.05
    assert wrong / 300 < 0.09


def test_a_resampled_p_is_never_zero():
    d = 50 + rng().normal(size=30)
    assert paired_bootstrap(d, np.zeros(30), draws=500).p == pytest.approx(2 / 501)


@pytest.mark.parametrize(
    "clusters,method,way_out",
    [(3, "percentile", "paired_t"), (99, "percentile", "studentised"), (9, "studentised", "paired_t")],
)
def test_too_few_clusters_are_refused(clusters, method, way_out):
    d = rng().normal(size=200)
    with pytest.raises(ValueError, match=f"{clusters} clusters .* use .*{way_out}"):
        paired_bootstrap(d, np.zeros(200), np.arange(200) % clusters, method=method)


def test_no_spread():
    ones, same = np.ones(12), np.full(12, 0.1)
    for f in (paired_t, paired_bootstrap):
        assert f(ones, ones)[:4] == (0, 0, 0, 1) and f(ones, ones - same)[3] == 0
    assert tost(ones, ones, 0.1).equivalent and not tost(ones, ones - 0.2, 0.1).equivalent
    assert paired_ratio(ones, ones, ones)[:4] == (1, 1, 1, 1)


def test_mixed_token_weights_in_ratio():
    g = rng(5)
    n, a, b = g.integers(1, 400, 150), g.exponential(100, 150), g.exponential(100, 150)
    got = paired_ratio(a, b, n)
    assert np.isclose(got.estimate, np.exp((a.sum() - b.sum()) / n.sum())) and got.low < got.estimate < got.high
    back = paired_ratio(b, a, n)
    assert np.allclose([back.low, back.high], [1 / got.high, 1 / got.low], rtol=0.02)
    as_items = paired_t(np.repeat(a / n, n), np.repeat(b / n, n), np.repeat(np.arange(150), n))
    by_t = paired_ratio(a, b, n, method="t")
    assert np.allclose(np.log(by_t[:3]), as_items[:3]) and np.isclose(by_t.p, as_items.p)


@pytest.mark.parametrize("n", [3, 8, 50])
def test_tost_is_two_one_sided_t_tests(n):
    a, b = rng(n).normal(0, 0.3, (2, n))
    low = reference.ttest_1samp(a - b, -0.5, alternative="greater").pvalue
    high = reference.ttest_1samp(a - b, 0.5, alternative="less").pvalue
    got = tost(a, b, 0.5)
    assert np.isclose(got.p, max(low, high)) and got.equivalent == (got.p <= 0.05) == (
        -0.5 < got.low and got.high < 0.5
    )


@pytest.mark.parametrize("n", [2, 3, 10])
@pytest.mark.parametrize("power", [0.5, 0.8, 0.9])
def test_detectable_effect_has_the_power_it_says(n, power):
    effect = minimum_detectable_effect(2.0, n, power)
    x = rng(n).normal(effect, 2.0, (20000, n))
    t = x.mean(1) / (x.std(1, ddof=1) / n**0.5)
    assert abs((abs(t) > reference.t.ppf(0.975, n - 1)).mean() - power) < 0.015


def test_detectable_effect_of_many_is_the_normal_formula():
    for n in (200, 5000):
        assert np.isclose(minimum_detectable_effect(1.0, n), (1.959964 + 0.841621) / n**0.5, rtol=0.02)
    assert minimum_detectable_effect([1, 2, 3, 4.0]) == minimum_detectable_effect(np.std([1, 2, 3, 4], ddof=1), 4)
    assert minimum_detectable_effect(0.0, 5) == 0


def test_adjustment_of_a_table():
    p = list(rng(6).random(50) ** 3)
    q = benjamini_hochberg(p)
    found = {i for i in range(50) if q[i] <= 0.1}
    ranked = sorted(p)
    cut = max([x for r, x in enumerate(ranked, 1) if x <= 0.1 * r / 50], default=-1)
    assert found == {i for i in range(50) if p[i] <= cut} and found
    assert benjamini_hochberg([]) == [] and benjamini_hochberg([None, 0.3]) == [None, 0.3]
    with pytest.raises(ValueError, match=r"p_values\[1\] = 1.2"):
        benjamini_hochberg([0.1, 1.2])
    with pytest.raises(ValueError, match="nan"):
        benjamini_hochberg([float("nan")])


def test_wilson_against_scipy():
    from scipy.stats import binomtest

    for k, n in ((0, 5), (3, 7), (7, 7), (180, 400)):
        theirs = binomtest(k, n).proportion_ci(0.95, method="wilson")
        assert wilson(k, n)[1:3] == pytest.approx((theirs.low, theirs.high), abs=1e-9)


def test_wilson_edges():
    assert (
        wilson(0, 10).low == pytest.approx(0)
        and wilson(10, 10).high == pytest.approx(1)
        and wilson(5, 10).estimate == 0.5
    )
    for bad in ((0.5, 10), (11, 10), (-1, 10), (0, 0)):
        with pytest.raises(ValueError):
            wilson(*bad)


@pytest.mark.parametrize(
    "difference,p,higher,expected",
    [
        (1, 0.01, True, "better"),
        (1, 0.01, False, "worse"),
        (-1, 0.01, False, "better"),
        (-1, 0.01, True, "worse"),
        (1, 0.06, True, "undecided"),
        (0, 0.01, True, "undecided"),
    ],
)
def test_verdict_without_a_margin(difference, p, higher, expected):
    assert verdict(difference, p, higher) == expected


def test_equivalence_needs_data_that_could_have_shown_a_difference():
    claim = dict(difference=0.0, p=0.9, higher_is_better=True, equivalence_p=0.001, margin=0.1)
    assert verdict(**claim, mde=0.09) == "equivalent" and verdict(**claim, mde=0.11) == "undecided"
    assert verdict(**{**claim, "equivalence_p": 0.2}, mde=0.01) == "undecided"
    with pytest.raises(ValueError, match="margin"):
        verdict(0.0, 0.9, True, equivalence_p=0.01)


def test_verdicts_adjust_over_the_table():
    g = rng(7)
    base = g.normal(size=5)
    close = {"one": (base + np.array([0.5, 0.4, 0.7, 0.2, 0.9]), base)}
    many = close | {f"noise {i}": (base + g.permutation([1, -1, 0.5, -0.5, 0.1]), base) for i in range(15)}
    alone, crowd = verdicts(close, True)[0], verdicts(many, True)[0]
    assert (
        alone["verdict"] == "better"
        and crowd["verdict"] == "undecided"
        and alone["p"] == crowd["p"] < crowd["p_adjusted"]
    )
    long = {k: (np.resize(a, 40) + g.normal(size=40), np.resize(b, 40)) for k, (a, b) in close.items()}
    assert verdicts(long, True, clusters=np.arange(40) // 2, bootstrap=True, margin=5.0)[0]["n"] == 20


@pytest.mark.parametrize(
    "a,b,message",
    [
        ([1.0], [2.0], "1 value,"),
        ([1, 2], [1, 2, 3], "not paired: 2 and 3"),
        ([1, float("nan")], [1, 2], "index 1"),
        ([[1, 2]], [[1, 2]], "one-dimensional"),
        ([], [], "0 values"),
    ],
)
def test_bad_pairs(a, b, message):
    for f in (paired_t, paired_bootstrap, lambda a, b: tost(a, b, 1.0)):
        with pytest.raises(ValueError, match=message):
            f(a, b)


def test_bad_options():
    x, y = np.arange(12.0), np.zeros(12)
    for call, message in (
        (lambda: paired_t(x, y, [0] * 12), "one cluster"),
        (lambda: paired_t(x, y, [0, 1]), "clusters has shape"),
        (lambda: paired_t(x, y, level=1), "level = 1"),
        (lambda: tost(x, y, 0), "margin = 0"),
        (lambda: tost(x, y, -1), "margin = -1"),
        (lambda: paired_bootstrap(x, y, method="bca"), "unknown bootstrap method 'bca'"),
        (lambda: paired_ratio(x, y, np.zeros(12)), "tokens = 0 of document 0"),
        (lambda: minimum_detectable_effect(1.0), "n = None"),
        (lambda: minimum_detectable_effect(1.0, 1), "n = 1"),
        (lambda: minimum_detectable_effect(1.0, 5, power=0.01), "power = 0.01"),
        (lambda: minimum_detectable_effect(-1.0, 5), "deviation = -1"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
