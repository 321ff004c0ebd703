"""P-values, nulls, step-up counts and the ladder, against definitions written out here."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import gaussian_kde

from moe_routing.core import Context, as_view
from moe_routing.routers.pvalue import (
    BH,
    BY,
    HC,
    NULL_KINDS,
    Null,
    bh_count,
    by_count,
    critical_values,
    fdr_study,
    fit_null,
    hc_count,
    kde_tail,
    load_null,
    noise_curve,
    null_law,
    planted_logits,
)

INF = float("inf")


pytestmark = pytest.mark.usefixtures("one_thread")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def logits_of(T, E, seed=0, scale=1.5):
    return torch.randn(T, E, generator=generator(seed)) * scale - 0.5


def step_up(p, alpha, by=False):
    E = len(p)
    c = sum(1 / r for r in range(1, E + 1)) if by else 1
    return max((r for r, q in enumerate(sorted(p), 1) if q <= alpha * r / (E * c)), default=0)


def hc_by_hand(p, beta, min_k):
    E, q = len(p), sorted(min(max(x, 1e-10), 1 - 1e-10) for x in p)
    score = {r: E**0.5 * (r / E - q[r - 1]) / (q[r - 1] * (1 - q[r - 1]) + 1e-10) ** 0.5 for r in range(1, E + 1)}
    if beta == "auto":
        ranks = [r for r in score if q[r - 1] < r / E]
    else:
        ranks = [r for r in score if beta >= 1 or r <= max(1, int(E * beta))]
    ranks = [r for r in ranks if r >= min_k]
    return max(ranks, key=lambda r: (score[r], -r)) if ranks else min_k


def test_counts_against_definition():
    for E in (1, 2, 7, 64):
        p = torch.rand(200, E, generator=generator(E), dtype=torch.float64) ** 2
        p[::5] = p[::5].mul(8).floor().div(8)  # ties, zeros
        p[1] = 1.0
        for alpha in (0.01, 0.3, 0.99):
            assert bh_count(p, alpha).tolist() == [step_up(row, alpha) for row in p.tolist()]
            by = by_count(p, alpha)
            slow = torch.tensor([step_up(row, alpha, by=True) for row in p.tolist()])
            assert (by == slow).all()
        for beta in ("auto", 0.3, 1, 2.0):
            for min_k in {1, E}:
                assert hc_count(p, beta, min_k).tolist() == [hc_by_hand(row, beta, min_k) for row in p.tolist()]


def test_boundary_is_included():
    "A p-value equal to its critical value is rejected."
    c = critical_values(0.3, 8)
    assert bh_count(c[None], 0.3) == 8
    assert bh_count(torch.nextafter(c, torch.tensor(1.0, dtype=torch.float64))[None], 0.3) == 0


@pytest.mark.parametrize(
    "bad",
    [torch.tensor([[0.1, float("nan")]]), torch.tensor([[0.1, 1.1]]), torch.tensor([[-0.1, 0.1]]), torch.tensor([0.1])],
)
def test_bad_p_values(bad):
    for count in (lambda p: bh_count(p, 0.1), lambda p: by_count(p, 0.1), hc_count):
        with pytest.raises(ValueError, match="p-values"):
            count(bad)


@pytest.mark.parametrize("alpha", [0, 1, -0.1, 1.5, float("nan")])
def test_bad_alpha(alpha):
    null = fit_null(logits_of(20, 4))
    for call in (
        lambda: bh_count(torch.rand(2, 4), alpha),
        lambda: BH(alpha, 2, null=null),
        lambda: BY(alpha, 2, null=null),
        lambda: noise_curve(alpha, 8),
    ):
        with pytest.raises(ValueError, match="alpha"):
            call()


def test_empty():
    assert bh_count(torch.zeros(0, 8), 0.3).shape == (0,) and hc_count(torch.zeros(0, 8)).shape == (0,)


@pytest.mark.parametrize("correction", ["bh", "by"])
@pytest.mark.parametrize("alpha, E", [(0.05, 2), (0.3, 8), (0.6, 64), (0.9, 16), (0.01, 128)])
def test_null_law(alpha, E, correction):
    law = null_law(alpha, E, correction)
    count = bh_count if correction == "bh" else by_count
    p = torch.rand(20_000, E, generator=generator(), dtype=torch.float64)
    seen = torch.bincount(count(p, alpha), minlength=E + 1) / len(p)
    assert abs(float(law.sum()) - 1) < 1e-9 and (law >= 0).all()
    assert ((seen - law).abs() < 5 * (law * (1 - law) / len(p)).sqrt() + 5 / len(p)).all()


def test_noise_curve_clamps():
    free, capped = noise_curve(0.5, 64), noise_curve(0.5, 64, min_k=2, max_k=4)
    assert (
        2 <= capped["mean_k"] <= 4
        and free["no_rejection"] == capped["no_rejection"]
        and capped["ceiling"] > free["ceiling"]
    )
    assert noise_curve(0.5, 64, min_k=4, max_k=4)["mean_k"] == pytest.approx(4)
    with pytest.raises(ValueError):
        noise_curve(0.5, 4, max_k=8)


@pytest.mark.parametrize("n, scale, shift", [(30, 1.0, 0.0), (400, 0.1, 5.0), (2000, 3.0, -4.0)])
def test_kernel_density_against_scipy(n, scale, shift):
    x = torch.randn(n, generator=generator(n), dtype=torch.float64) * scale + shift
    oracle = gaussian_kde(x.numpy())
    low, step, tail = kde_tail(x)
    at = np.linspace(0, len(tail) - 1, 60).astype(int)
    exact = np.array([oracle.integrate_box_1d(low + step * i, np.inf) for i in at])
    assert np.abs(tail.numpy()[at] - exact).max() < 2e-7
    low, step, tail = kde_tail(x, as_seeded=True)
    assert low == pytest.approx(float(x.min() - 0.2 * x.min().abs())) and low + step * 9999 == pytest.approx(
        float(x.max() + 0.2 * x.max().abs())
    )
    cdf = np.cumsum(oracle(low + step * np.arange(10_000)))
    assert np.abs(1 - cdf / cdf[-1] - tail.numpy()).max() < 1e-6 and tail[-1] == 0


@pytest.mark.parametrize("kind", NULL_KINDS)
def test_monotone_and_ladder(kind):
    "P falls exactly with the logit over neighbouring float32 numbers, and the ladder is the exact crossing."
    E = 16
    null = fit_null(logits_of(300, 2 * E).view(300, 2, E).bfloat16(), kind)
    around = torch.cat([torch.linspace(-9, 9, 3000), null.thresholds(0.3, 1)])
    around = around[around.isfinite()]
    for _ in range(4):
        around = torch.cat([around, around.nextafter(torch.tensor(INF)), around.nextafter(torch.tensor(-INF))]).unique()
    p = null.p_values(around[None], 1)[0]
    assert (p.diff() <= 0).all() and p.dtype == torch.float64 and (p >= 0).all() and (p <= 1).all()
    for correction in ("bh", "by"):
        for alpha in (0.001, 0.05, 0.3, 0.95):
            t, c = null.thresholds(alpha, 1, correction), critical_values(alpha, E, correction)
            known = t.isfinite()
            assert (null.p_values(t[known][None], 1)[0] <= c[known]).all()
            assert (null.p_values(t[known].nextafter(torch.tensor(-INF))[None], 1)[0] > c[known]).all()
            assert (null.p_values(torch.full((1, 1), torch.finfo(torch.float32).max), 1)[0] > c[~known]).all()
    many = null.thresholds([0.05, 0.3], 1)
    assert torch.equal(many[1], null.thresholds(0.3, 1))


@pytest.mark.parametrize("kind", NULL_KINDS)
def test_ladder_equals_step_up(kind):
    E = 32
    null = fit_null(logits_of(200, E), kind)
    logits = logits_of(4000, E, seed=1) * (0.3 + 2 * torch.rand(4000, 1, generator=generator(2)))
    logits[::3] = logits[::3].bfloat16().float()
    logits[::7] = logits[::7].round()
    logits[0], logits[1] = 0.0, -0.0
    logits[2], logits[3] = 1e30, -1e30
    p = null.p_values(logits, 0)
    for rule, count in ((BH, bh_count), (BY, by_count)):
        for alpha in (0.01, 0.2, 0.6, 0.99):
            for max_k, min_k in ((E, 1), (4, 1), (8, 3), (2, 2)):
                a, b = (
                    rule(alpha, max_k, min_k, null=null, method=m)(logits).validate() for m in ("ladder", "p_values")
                )
                raw = count(p, alpha)
                assert torch.equal(a.extras["count_raw"], raw) and torch.equal(b.extras["count_raw"], raw)
                assert (
                    torch.equal(a.counts, raw.clamp(min_k, max_k))
                    and torch.equal(a.experts, b.experts)
                    and torch.equal(a.weights, b.weights)
                )
                assert torch.equal(a.extras["fallback"], raw == 0) and "p_values" not in a.extras


def test_kept_p_values():
    null, logits = fit_null(logits_of(200, 8), "trimmed", trim=2), logits_of(50, 8, seed=1)
    for rule in (
        BH(0.3, 4, null=null, keep_p_values=True),
        BH(0.3, 4, null=null, keep_p_values=True, method="p_values"),
        HC(null=null, max_k=4, keep_p_values=True),
    ):
        assert torch.equal(rule(logits).extras["p_values"], null.p_values(logits, 0))


def test_excluded_experts():
    null, logits = fit_null(logits_of(200, 8)), logits_of(100, 8, seed=1, scale=4.0)
    choice = logits.clone()
    choice[:, :5] = -INF
    view = replace(as_view(logits), choice=choice)
    for rule in (
        BH(0.6, 8, null=null),
        BH(0.6, 8, null=null, method="p_values"),
        BY(0.9, 8, null=null),
        HC("auto", 8, null=null),
    ):
        routing = rule(view).validate()
        assert routing.load[:5].sum() == 0 and routing.counts.max() <= 3
    p = null.p_values(logits, 0).masked_fill(choice == -INF, 1.0)
    assert torch.equal(BH(0.6, 8, null=null)(view).extras["count_raw"], bh_count(p, 0.6))


def test_bfloat16_logits_keep_small_p():
    null = fit_null(logits_of(2000, 8), "trimmed", trim=2)
    assert null.p_values(torch.tensor([[6.0]]).bfloat16(), 0) < 1e-4


@pytest.mark.parametrize("kind", NULL_KINDS)
def test_save_load(kind, tmp_path):
    options = {"trim": 2} if kind == "trimmed" else {}
    null = fit_null(logits_of(90, 3 * 8).view(90, 3, 8), kind, model="m", **options)
    null.save(tmp_path / "deep" / "null.safetensors")
    again = load_null(tmp_path / "deep" / "null.safetensors")
    assert again.describe() == null.describe() and not list(tmp_path.glob("**/*.part"))
    x = logits_of(20, 8, seed=4)
    for layer in range(3):
        assert torch.equal(null.p_values(x, layer), again.p_values(x, layer))


def test_load_faults(tmp_path):
    with pytest.raises(FileNotFoundError, match="fit"):
        load_null(tmp_path / "none")
    path = tmp_path / "null"
    fit_null(logits_of(90, 8)).save(path)
    loaded = load_null(path)
    data = path.read_bytes()
    for damaged in (b"", data[:100], data[:-5], b"x" + data[1:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged"):
            load_null(path)
    loaded.p_values(logits_of(5, 8), 0)  # a loaded null does not depend on its file any more
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="not a null"):
        load_null(path)


def test_foreign_model():
    null = fit_null(logits_of(90, 16).view(90, 2, 8), model="a")
    null.check(2, 8, "a")
    null.check(2, 8)
    for wrong, message in (
        ((3, 8), "MoE layers 2 instead of 3"),
        ((2, 4), "experts 8 instead of 4"),
        ((2, 8, "b"), "'a' instead of 'b'"),
    ):
        with pytest.raises(ValueError, match=message):
            null.check(*wrong)
    rule = BH(0.3, 4, null=null)
    with pytest.raises(ValueError, match="experts"):
        rule(torch.randn(3, 4))
    with pytest.raises(ValueError, match="MoE layers"):
        rule(as_view(torch.randn(3, 8), context=Context(layer=0, num_layers=5)))
    for method in ("ladder", "p_values"):
        with pytest.raises(ValueError, match="layer = 2"):
            BH(0.3, 4, null=null, method=method)(as_view(torch.randn(3, 8), context=Context(layer=2)))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: fit_null(logits_of(9, 4), "kernel"), "kind of null"),
        (lambda: fit_null(logits_of(9, 4), "kde", trim=2), "option of a kde null"),
        (lambda: fit_null(logits_of(9, 4), "trimmed"), "leaves no null"),
        (lambda: fit_null(logits_of(9, 4), "conformal", drop_top=4), "leaves no null"),
        (lambda: fit_null(torch.ones(9, 4)), "spread"),
        (lambda: fit_null(torch.full((9, 4), float("nan"))), "NaN"),
        (lambda: fit_null(torch.zeros(0, 2, 4)), "at least 2 tokens"),
        (lambda: BH(0.3, 2, min_k=3, null=fit_null(logits_of(9, 4))), "min_k"),
        (lambda: BH(0.3, 2, null="kde"), "fit_null"),
        (lambda: BH(0.3, 2, null=fit_null(logits_of(9, 4)), method="exact"), "method"),
        (lambda: HC(beta="all", null=fit_null(logits_of(9, 4))), "beta"),
        (lambda: hc_count(torch.rand(2, 4), min_k=5), "min_k"),
        (lambda: BH(0.3, 9, null=fit_null(logits_of(9, 4)))(torch.randn(2, 4)), "max_k = 9"),
        (lambda: planted_logits(3, dependence="hostile"), "level"),
        (lambda: planted_logits(3, planted=64), "planted"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_conformal_options():
    x = logits_of(500, 8)
    dropped = fit_null(x, "conformal", drop_top=2)
    kept = x.sort(-1).values[:, :6].flatten()
    at = torch.tensor([[0.0, 1.0, 5.0, -20.0]])
    want = (1 + (kept[:, None] >= at).sum(0).double()) / (1 + len(kept))
    assert torch.equal(dropped.p_values(at, 0)[0], want)
    single = fit_null(x, "conformal", one_per_token=True, seed=3)
    assert single.p_values(torch.full((1, 1), 99.0), 0) == 1 / 501
    assert torch.equal(single.p_values(at, 0), fit_null(x, "conformal", one_per_token=True, seed=3).p_values(at, 0))


def test_conformal_is_valid():
    "P(p <= u) <= u for a new null logit, over calibration draws, also for tiny samples."
    u, hits = 0.25, 0
    g = generator(5)
    for _ in range(1500):
        hits += int(
            fit_null(torch.randn(11, 1, 1, generator=g), "conformal").p_values(torch.randn(1, 1, generator=g), 0)[0, 0]
            <= u
        )
    assert hits / 1500 <= u + 3 * (u * (1 - u) / 1500) ** 0.5


def test_false_discovery_rate():
    "The guarantee, and that the study can fail."
    for rule, dependence in (("bh", "independent"), ("bh", "positive"), ("by", "hostile")):
        rows = fdr_study(rule, dependence, alphas=(0.05, 0.3, 0.6), tokens=15_000)
        assert all(r["held"] for r in rows), rows
        assert rows[0]["draws"] == 200 and rows[0]["tokens"] >= 15_000 and rows[0]["null_share"] == 60 / 64
    assert not any(r["held"] for r in fdr_study("bh", "hostile", alphas=(0.1, 0.3), tokens=15_000))


def test_null_moves_nothing():
    "A rule with a null can be compared, copied and described."
    from copy import deepcopy

    null = fit_null(logits_of(90, 8))
    a, b = BH(0.3, 4, null=null), BH(0.3, 4, null=null)
    assert a == b and a != BH(0.2, 4, null=null) and "ladder" not in a.describe() and isinstance(deepcopy(a).null, Null)
    assert "ladder=" not in repr(a) and torch.equal(replace(a, alpha=0.2).ladder, BH(0.2, 4, null=null).ladder)
