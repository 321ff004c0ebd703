"""Capacity over odd cases: limit against a loop, pack and combine against the dense sum, drop law, bad input."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import binom

from moe_routing.capacity import (
    Capped,
    ORDERS,
    combine,
    demand_load,
    drop_law_error,
    drop_rate,
    expected_drop_rate,
    expert_capacity,
    limit,
    orphan_rate,
    pack,
    recommend_capacity_factor,
    served_load,
    share_cv,
    shares_from_cv,
)
from moe_routing.studies.capacity import capacity_report
from moe_routing.core import Context, Routing, as_view
from moe_routing.routers.adaptive import TopP
from moe_routing.routers.topk import TopK


def random_routing(T, E, K, seed, dtype=torch.float32, holes=True, ties=True):
    "Skewed choices, unused slots, and weights that tie."
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(T, E, generator=g) + torch.linspace(1.5, -1.5, E)
    weights, experts = logits.softmax(-1).topk(K)
    if ties:
        weights = (weights * 8).round() / 8
    if holes:
        gone = torch.arange(K) >= torch.randint(0, K + 1, (T, 1), generator=g)
        weights, experts = weights.masked_fill(gone, 0), experts.masked_fill(gone, E)
    return Routing(logits, experts, weights.to(dtype)).validate()


def slow(r, C, by, renorm, valid):
    "(T, E) weights and (T, E) mask, one slot at a time."
    T, E = r.logits.shape
    slots = [
        (t, e, w)
        for t in range(T)
        if valid is None or valid[t]
        for e, w in zip(r.experts[t].tolist(), r.weights[t].tolist())
        if e < E
    ]
    if by == "score":
        slots.sort(key=lambda s: -s[2])
    dense, mask, load = torch.zeros(T, E), torch.zeros(T, E, dtype=torch.bool), [0] * E
    for t, e, w in slots:
        if load[e] < C:
            dense[t, e], mask[t, e], load[e] = w, True, load[e] + 1
    if renorm:
        after = dense.sum(-1, keepdim=True)
        dense = torch.where(
            after > 0, dense * (r.weights.float().sum(-1, keepdim=True) / after.clamp_min(1e-30)), dense
        )
    return dense, mask


@pytest.mark.parametrize("by", ORDERS)
@pytest.mark.parametrize("renorm", [False, True])
@pytest.mark.parametrize("T,E,K", [(1, 1, 1), (1, 6, 3), (17, 5, 1), (40, 5, 2), (64, 8, 8), (33, 16, 4)])
def test_limit_is_the_loop(by, renorm, T, E, K):
    for seed in range(4):
        r = random_routing(T, E, K, seed, holes=seed % 2 == 0)
        valid = torch.rand(T, generator=torch.Generator().manual_seed(seed)) > 0.3 if seed > 1 else None
        for C in (1, 2, 7, T):
            got = limit(r, capacity=C, by=by, renorm=renorm, valid=valid).validate()
            dense, mask = slow(r, C, by, renorm, valid)
            assert torch.equal(got.mask, mask) and torch.allclose(got.dense(), dense, atol=1e-6)
            rows = torch.ones(T, dtype=torch.bool) if valid is None else valid
            assert torch.equal(demand_load(got), r.mask[rows].sum(0)) and torch.equal(served_load(got), mask.sum(0))
            assert torch.equal(got.extras["demand_counts"], r.counts * rows) and got.extras["capacity"] == C
            asked = int(r.counts[rows].sum())
            assert drop_rate(got) == pytest.approx(1 - int(mask.sum()) / asked if asked else 0)
            wanted = (r.counts > 0) & rows
            assert orphan_rate(got) == pytest.approx(int((wanted & ~mask.any(-1)).sum()) / max(int(wanted.sum()), 1))


def test_a_tie_goes_to_the_earlier_row():
    r = Routing(torch.zeros(4, 2), torch.tensor([[0, 1]] * 4), torch.full((4, 2), 0.5))
    for by in ORDERS:
        assert limit(r, capacity=2, by=by).mask.tolist() == [[True, True]] * 2 + [[False, False]] * 2
    r.weights[3] = 0.6
    assert limit(r, capacity=2, by="score").mask[:, 0].tolist() == [True, False, False, True]


def test_negative_zero_is_zero():
    r = Routing(torch.zeros(3, 1), torch.zeros(3, 1, dtype=torch.int64), torch.tensor([[-0.0], [0.0], [0.1]]))
    assert limit(r, capacity=2, by="score").mask[:, 0].tolist() == [True, False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_stays(dtype):
    r = random_routing(50, 6, 3, 0, dtype)
    for by in ORDERS:
        assert limit(r, 1.0, by=by, renorm=True).validate().weights.dtype == dtype


def test_dropless_changes_nothing_and_empty_batches_work():
    r = random_routing(30, 5, 2, 1)
    same = limit(r)
    assert (
        torch.equal(same.experts, r.experts)
        and same.weights is r.weights
        and same.extras["capacity"] is None
        and drop_rate(same) == 0
    )
    empty = Routing(torch.zeros(0, 4), torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2))
    for r in (limit(empty, 1.0), limit(random_routing(5, 4, 2, 0), 1.0, valid=torch.zeros(5, dtype=torch.bool))):
        assert served_load(r).sum() == 0 and drop_rate(r) == 0 and orphan_rate(r) == 0


def test_padding_neither_takes_nor_adds_capacity():
    r, valid = random_routing(60, 6, 2, 3, holes=False), torch.arange(60) % 3 > 0
    padded, alone = limit(r, 1.0, valid=valid), limit(r.rows(valid), 1.0)
    assert padded.extras["capacity"] == alone.extras["capacity"] == expert_capacity(40, 6, 2, 1.0)
    assert torch.equal(padded.experts[valid], alone.experts) and (padded.experts[~valid] == 6).all()
    assert drop_rate(padded) == drop_rate(alone) == drop_rate(padded.rows(valid))


def test_limiting_twice_keeps_the_first_demand():
    r = random_routing(80, 5, 2, 0, holes=False)
    twice = limit(limit(r, 1.25), 0.5)
    assert torch.equal(demand_load(twice), r.load) and drop_rate(twice) == pytest.approx(
        1 - int(twice.load.sum()) / 160
    )
    assert twice.load.max() <= expert_capacity(80, 5, 2, 0.5)


@pytest.mark.parametrize("renorm", [False, True])
def test_gradient_flows_through_what_survives(renorm):
    logits = torch.randn(12, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    experts = logits.detach().topk(2).indices

    def loss(x):
        weights = x.softmax(-1).gather(1, experts)
        out = limit(Routing(x.float(), experts, weights), capacity=4, renorm=renorm).dense()
        return (out * torch.arange(1.0, 5)).sum(-1)

    if not renorm:
        assert torch.autograd.gradcheck(loss, logits)  # renormalising is done in float32
    served = limit(Routing(logits.float(), experts, logits.softmax(-1).gather(1, experts)), capacity=4).mask.any(-1)
    grad = torch.autograd.grad(loss(logits).sum(), logits)[0]
    assert grad.isfinite().all() and ((grad.abs().sum(-1) > 0) == served).all()


def test_renorm_keeps_the_sum():
    r = TopK(3, weigh="renorm")(torch.randn(100, 6, generator=torch.Generator().manual_seed(0)))
    sums = limit(r, 0.8, renorm=True).weights.sum(-1)
    assert torch.allclose(sums[sums > 0], torch.ones(()))
    assert (limit(r, 0.8, renorm=False).weights.sum(-1) < 0.99).any()


@pytest.mark.parametrize("by", ORDERS)
@pytest.mark.parametrize("renorm", [False, True])
def test_pack_and_combine_are_the_dense_sum(by, renorm):
    for seed, (T, E, K) in enumerate([(1, 3, 1), (40, 5, 2), (64, 8, 4), (9, 4, 4)]):
        r = limit(random_routing(T, E, K, seed), 1.0, by=by, renorm=renorm)
        x, maps = torch.randn(T, 6, requires_grad=True), torch.randn(E, 6, 7)
        packed, cells = pack(x, r)
        y = combine(torch.einsum("ech,ehg->ecg", packed, maps), r, cells)
        reference = torch.einsum("te,th,ehg->tg", r.dense(), x, maps)
        assert torch.allclose(y, reference, atol=1e-5)
        a, b = (torch.autograd.grad((o * torch.arange(7.0)).sum(), x)[0] for o in (y, reference))
        assert torch.allclose(a, b, atol=1e-4)
        filled = (cells < E * r.extras["capacity"]).sum()
        assert filled == r.used.sum() and (packed.abs().sum(-1) > 0).sum() == filled


def test_capped_is_the_rule_with_a_limit():
    logits, valid = torch.randn(64, 8), torch.arange(64) < 50
    view = as_view(logits, k=2, context=Context(valid=valid))
    capped = Capped(TopK(weigh="softk"), 1.0)
    got = capped(view).validate()
    assert (
        capped.k is None and capped.weigh == "softk" and got.extras["capacity"] == expert_capacity(50, 8, 2, 1.0)
    )  # the model's own k
    assert Capped(TopK(3), 1.0)(view).extras["capacity"] == expert_capacity(50, 8, 3, 1.0)
    nested = Capped(TopP(p=0.5, max_k=6), 1.0, k=2.5)
    assert nested.max_k == 6 and nested.min_k == 1 and not hasattr(nested, "null")
    assert json.loads(json.dumps(nested.describe()))["inner"]["rule"] == "TopP" and nested == Capped(
        TopP(p=0.5, max_k=6), 1.0, k=2.5
    )
    import copy
    import pickle

    assert copy.deepcopy(nested) == nested and pickle.loads(pickle.dumps(nested)) == nested


def test_capped_under_a_patch():
    from transformers import OlmoeConfig, OlmoeForCausalLM
    from moe_routing.patching.patch import route

    torch.manual_seed(0)
    model = OlmoeForCausalLM(
        OlmoeConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_experts=8,
            num_experts_per_tok=2,
            eos_token_id=None,
            pad_token_id=None,
        )
    ).eval()
    tokens, mask = torch.randint(0, 64, (3, 20)), torch.ones(3, 20, dtype=torch.int64)
    mask[1, 12:] = 0
    seen, outputs = [], {}
    for experts in ("ragged", "keep"):
        with (
            torch.no_grad(),
            route(
                model,
                Capped(TopK(), 0.75, renorm=False),
                experts=experts,
                observe=lambda c, r, h: seen.append((c.valid, r)),
            ) as patch,
        ):
            outputs[experts] = model(tokens, attention_mask=mask).logits
        report = patch.report()
        assert report.weigh == "native" and report.asked < 2
    assert torch.allclose(outputs["ragged"][mask > 0], outputs["keep"][mask > 0], atol=1e-4)
    for valid, r in seen:
        assert r.load.max() <= r.extras["capacity"] == expert_capacity(52, 8, 2, 0.75) and drop_rate(r) > 0.2


@pytest.mark.parametrize(
    "call",
    [
        lambda: limit(random_routing(8, 4, 2, 0), 0),
        lambda: limit(random_routing(8, 4, 2, 0), -1.25),
        lambda: limit(random_routing(8, 4, 2, 0), float("nan")),
        lambda: limit(random_routing(8, 4, 2, 0), 1.0, k=5),
        lambda: limit(random_routing(8, 4, 2, 0), 1.0, by="scores"),
        lambda: limit(random_routing(8, 4, 2, 0), 1.0, capacity=3),
        lambda: limit(random_routing(8, 4, 2, 0), capacity=0),
        lambda: Capped(TopK(2), 0.0),
        lambda: Capped(TopK(2), 1.0, by="weight"),
        lambda: expert_capacity(8, 4, 5, 1.0),
        lambda: expected_drop_rate(64, 4, 2, 1.0, shares=[0.25] * 4, cv=0.1),
        lambda: expected_drop_rate(64, 4, 2, 1.0, shares=[0.5, 0.6, 0.0, 0.0]),
        lambda: expected_drop_rate(64, 4, 2, 1.0, shares=[0.5, 0.5]),
        lambda: expected_drop_rate(64, 4, 2, 1.0, shares=[-0.5, 0.5, 0.5, 0.5]),
        lambda: expected_drop_rate(64, 4, 2, 1.0, cv=1.8),
        lambda: expected_drop_rate(64, 4, 2, 1.0, max_violation=0.1),
        lambda: expected_drop_rate(64, 4, 2, 1.0, cv=0.1, max_violation=2.0),
        lambda: expected_drop_rate(64, 4, 5, 1.0),
        lambda: expected_drop_rate(0, 4, 2, 1.0),
        lambda: recommend_capacity_factor(0, 64, 4, 2),
        lambda: recommend_capacity_factor(1, 64, 4, 2),
        lambda: recommend_capacity_factor(float("nan"), 64, 4, 2),
        lambda: drop_law_error(np.ones((1, 4)), 4, 1),
        lambda: drop_law_error(np.ones(4), 4, 1),
        lambda: pack(torch.ones(8, 3), random_routing(8, 4, 2, 0, holes=False), capacity=1),
    ],
)
def test_bad_input(call):
    with pytest.raises(ValueError) as error:
        call()
    assert len(str(error.value)) > 20


@pytest.mark.parametrize(
    "T,E,k,cf,want",
    [
        (2048, 8, 2, 1.25, 640),
        (2048, 8, 2, 1.0, 512),
        (1, 64, 1, 1.0, 1),
        (0, 8, 2, 1.0, 1),
        (100, 10, 1, 1.1, 11),
        (7, 3, 1, 1.0, 3),
        (32768, 64, 1, 1.1, 564),
        (10, 4, 1.5, 1.0, 4),
    ],
)
def test_capacity_formula(T, E, k, cf, want):
    assert expert_capacity(T, E, k, cf) == want


def test_the_law_is_the_exact_sum():
    rng = np.random.default_rng(0)
    for T, E, k in ((1, 4, 2), (6, 3, 1), (40, 5, 2), (200, 8, 4)):
        shares = rng.dirichlet(np.full(E, 3.0)) * 0.5 + 0.5 / E
        for cf in (0.3, 1.0, 1.3, E):
            C, n = expert_capacity(T, E, k, cf), np.arange(T + 1)
            sure = np.maximum(T * k * shares - C, 0)
            each = [binom.pmf(n, T, k * s) @ np.maximum(n - C, 0) if k * s < 1 else a for s, a in zip(shares, sure)]
            assert expected_drop_rate(T, E, k, cf, shares) == pytest.approx(sum(each) / (T * k), abs=1e-12)
    assert (
        expected_drop_rate(64, 8, 2, None) == 0 and expected_drop_rate(64, 8, 8, 1.0) == 0
    )  # everybody takes every expert


def test_independent_slots():
    T, E, k, n = 60, 6, 2, np.arange(121)
    C = expert_capacity(T, E, k, 1.0)
    want = E * (binom.pmf(n, 120, 1 / E) @ np.maximum(n - C, 0)) / 120
    assert expected_drop_rate(T, E, k, 1.0, distinct=False) == pytest.approx(want) and want > expected_drop_rate(
        T, E, k, 1.0
    )


@pytest.mark.parametrize("E", [2, 3, 8, 64, 256])
def test_shares_have_the_cv_and_the_top(E):
    for cv in (0, 0.05, 0.5, 0.9 * math.sqrt(E - 1)):
        s = shares_from_cv(E, cv)
        assert s.sum() == pytest.approx(1) and s.std() / s.mean() == pytest.approx(cv, abs=1e-6) and (s >= 0).all()
    rng = np.random.default_rng(E)
    for width in (0.1, 0.7, 2.0):
        want = np.exp(width * rng.standard_normal(E))
        cv, top = want.std() / want.mean(), want.max() / want.mean() - 1
        s = shares_from_cv(E, cv, top)
        assert (
            s.sum() == pytest.approx(1)
            and (s <= s[-1] * (1 + 1e-9)).all()
            and s[-1] * E - 1 == pytest.approx(top, abs=1e-6)
            and s.std() / s.mean() == pytest.approx(cv, rel=1e-3, abs=1e-5)
        )


def test_distinct_experts_bound_the_shares():
    assert shares_from_cv(16, 1.2, k=4).max() <= 1 / 4 * (1 + 1e-9) < shares_from_cv(16, 1.2).max()
    s = shares_from_cv(16, 3.0, k=4)  # a CV that four distinct experts cannot have
    assert s.std() / s.mean() == pytest.approx(3.0, rel=1e-6)


def test_share_cv_takes_chance_out():
    rng = np.random.default_rng(0)
    s = shares_from_cv(32, 0.4)
    found = [share_cv(d.std() / d.mean(), 512, 32, 4) for d in rng.binomial(512, 4 * s, size=(4000, 32))]
    assert np.sqrt(np.mean(np.square(found))) == pytest.approx(0.4, abs=0.005)
    assert share_cv(0.05, 512, 32, 4) == 0


def test_recommended_factor_is_the_smallest():
    for kw in (
        {},
        {"cv": 0.7},
        {"cv": 0.7, "max_violation": 2.0},
        {"distinct": False},
        {"shares": np.array([0.9] + [0.1 / 15] * 15)},
    ):
        for target in (0.2, 0.01, 1e-4):
            cf = recommend_capacity_factor(target, 1000, 16, 2, **kw)
            assert (
                expected_drop_rate(1000, 16, 2, cf, **kw) <= target < expected_drop_rate(1000, 16, 2, cf - 0.001, **kw)
            )


def test_law_of_measured_batches():
    rng = np.random.default_rng(0)
    s = shares_from_cv(16, 0.5)
    rows = drop_law_error(torch.from_numpy(rng.binomial(1024, 2 * s, size=(80, 16))), 1024, 2)
    assert all(
        abs(r["error"]) < 0.002 and abs(r["error"]) <= r["worst"] < 0.05 and abs(r["error_from_cv"]) < 0.003
        for r in rows
    )


def test_report_of_some_runs(tmp_path, monkeypatch):
    from types import SimpleNamespace
    import moe_routing.studies.capacity as module

    study = SimpleNamespace(question="a question", report_options={"tolerance": 0.001, "publish": True})
    plan = SimpleNamespace(study=study, folder=tmp_path, runs={"a": {}, "b": {}}, overrides={})
    monkeypatch.setattr(module, "load_runs", lambda folder: pd.DataFrame([]))
    with pytest.raises(ValueError, match="none of its 2 runs"):
        capacity_report(plan)
    one = {name: [0.1, 0.2] for name in (*module.SEED_KEYS, *module.MORE_KEYS)} | {"capacity_factor": [1.0, 1.1]}
    notes = {
        "num_experts": 8,
        "top_k": 2,
        "num_tokens": 64,
        "hidden_dim": 4,
        "dtype": "float32",
        "device": "cpu",
        "routing": "iid",
        "name": "x",
        "bytes_per_token_strict": 1,
        "iters": 2,
        "reference_tokens": None,
        "demand_cv": 0.1,
    }
    monkeypatch.setattr(
        module,
        "load_runs",
        lambda folder: pd.DataFrame(
            [
                {
                    "run": "a",
                    "code": "x",
                    "notes": notes,
                    **one,
                    "reference_drop_rate": [None, None],
                    "reference_expected": [None, None],
                }
            ]
        ),
    )
    text = capacity_report(plan).read_text()
    assert "1 of 2 runs" in text and "missing: 1, first `b`" in text and "undecided" in text
    lines = [json.loads(line) for line in (tmp_path / "capacity_cf_multi.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and list(lines[0])[:13] == module.SEED_KEYS
    assert all(
        (tmp_path / f"capacity_{n}.{e}").exists()
        for n in ("drop_rate_multi", "tokens_per_s_multi")
        for e in ("png", "csv")
    )
    study.report_options = {"tolerence": 1}
    with pytest.raises(ValueError, match="tolerance"):
        capacity_report(plan)
