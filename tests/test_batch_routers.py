"""Rules that look at the whole batch, and those whose gate cannot learn: oracles, padding, ties, bad input."""

import json
from dataclasses import dataclass, replace
from math import ceil

import pytest
import torch

from moe_routing.core import Context, GateView, Router, as_view, one_past_last
from moe_routing.patching.patch import route
from moe_routing.routers.control import Dense
from moe_routing.routers.expert_choice import (
    ExpertChoice,
    ExpertChoiceAsShipped,
    ExpertThreshold,
    allocation_bits,
    budget,
    expert_scores,
    leak_bits,
    leak_bound,
    quantile_thresholds,
    top_tokens,
)
from moe_routing.routers.sinkhorn import SBase, Sinkhorn, _accept, log_sinkhorn, quota_assign, sinkhorn
from moe_routing.routers.soft import SoftK, SummedTopK, Top1AsShipped, TopKHardAsShipped
from moe_routing.routers.topk import WEIGHTS, TopK

INF = float("inf")
BATCH = [
    ExpertChoice(2),
    ExpertThreshold(2),
    ExpertChoiceAsShipped(2, clamp=5),
    Sinkhorn(2),
    SBase(2),
    SBase(2, capacity_factor=1.25),
]
ALL = [
    *BATCH,
    ExpertChoice(2, mode="causal", thresholds=[0.2] * 8),
    ExpertThreshold(2, thresholds=torch.full((8,), 0.2)),
    SoftK(2),
    SoftK(2, temperature=0.5),
    SummedTopK(2),
    Top1AsShipped(),
    TopKHardAsShipped(2),
    Dense(),
]
name_of = lambda rule: "-".join([type(rule).__name__, *(["causal"] if getattr(rule, "thresholds", None) else [])])


def logits_of(T, E, seed=0, scale=1.5, skew=0.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(T, E, generator=generator) * scale + skew * torch.randn(E, generator=generator)


def excluding(logits, k=2, valid=None):
    "A gate that excludes the upper half of the experts in every other row."
    choice = logits.clone()
    choice[::2, logits.shape[1] // 2 :] = -INF
    return GateView(logits, choice, lambda experts: one_past_last(experts, logits.softmax(-1)), k, Context(valid=valid))


@pytest.mark.parametrize("rule", ALL, ids=name_of)
def test_invariants_on_odd_batches(rule):
    for T in (0, 2, 7, 64):
        for valid in (None, torch.arange(T) % 3 > 0, torch.zeros(T, dtype=torch.bool)):
            for logits in (logits_of(T, 8), torch.zeros(T, 8), logits_of(T, 8).round(), logits_of(T, 8) * 1e30):
                for convention in WEIGHTS:
                    one = replace(rule, weigh=convention)
                    routing = one(as_view(logits, 2, Context(valid=valid))).validate()
                    assert len(routing.experts) == T and torch.equal(
                        routing.experts, one(as_view(logits, 2, Context(valid=valid))).experts
                    )
                    if valid is not None and rule in BATCH:
                        assert (routing.counts[~valid] == 0).all()


@pytest.mark.parametrize("rule", ALL, ids=name_of)
def test_excluded_experts_are_never_used(rule):
    view = excluding(logits_of(40, 8))
    routing = rule(view).validate()
    assert not (routing.mask & (view.choice == -INF)).any() and routing.load.sum() > 0


@pytest.mark.parametrize("rule", ALL, ids=name_of)
def test_padding_changes_nothing(rule):
    logits, keep = logits_of(60, 8, seed=1), torch.rand(60, generator=torch.Generator().manual_seed(2)) < 0.6
    alone = rule(as_view(logits[keep], 2)).dense()
    for filler in (0.0, 30.0, -30.0):
        padded = logits.clone()
        padded[~keep] = (
            filler * torch.randn(int((~keep).sum()), 8, generator=torch.Generator().manual_seed(3)) / 10 + filler
        )
        assert torch.allclose(rule(as_view(padded, 2, Context(valid=keep))).dense()[keep], alone, atol=1e-5)


@pytest.mark.parametrize("rule", ALL, ids=name_of)
def test_renaming_experts(rule):
    if getattr(rule, "thresholds", None):
        rule = replace(rule, thresholds=[0.2] * 16)
    logits, order = logits_of(64, 16), torch.randperm(16, generator=torch.Generator().manual_seed(3))
    assert torch.allclose(rule(logits[:, order]).dense(), rule(logits).dense()[:, order], atol=1e-6)


@pytest.mark.parametrize("rule", ALL, ids=name_of)
def test_who_looks_ahead(rule):
    "Rules of a batch change an earlier decision when later rows change, the others never do."
    logits = logits_of(64, 8)
    changed = torch.cat([logits[:40], logits_of(24, 8, seed=5, scale=4)])
    same = torch.equal(rule(logits).mask[:40], rule(changed).mask[:40])
    assert same == (rule not in BATCH)
    bits = leak_bits(rule, logits, cuts=16)
    assert (bits > 0.02) == (rule in BATCH) and (rule in BATCH or bits == 0)


@pytest.mark.parametrize("rule", ALL, ids=name_of)
def test_gradient_reaches_the_gate_or_cannot(rule):
    router = Router(rule, 6, 8, k=2)
    routing, _ = router(torch.randn(64, 6, generator=torch.Generator().manual_seed(0)))
    learns = not isinstance(rule, (Top1AsShipped, TopKHardAsShipped, Dense))
    assert routing.weights.requires_grad == learns
    if learns:
        (routing.dense() * torch.randn(64, 8, generator=torch.Generator().manual_seed(1))).sum().backward()
        assert router.weight.grad.isfinite().all() and router.weight.grad.abs().max() > 1e-3


@pytest.mark.parametrize("rule", ALL, ids=name_of)
def test_description_is_json(rule):
    described = rule.describe()
    assert json.loads(json.dumps(described)) == described and described["rule"] == type(rule).__name__
    assert hash(rule) == hash(replace(rule)) and rule == replace(rule)


# expert choice


@pytest.mark.parametrize(
    "T, E, k, cf",
    [
        (1, 1, 1, 1.0),
        (1, 8, 2, 1.0),
        (37, 8, 2, 1.25),
        (64, 4, 4, 1.0),
        (64, 4, 4, 3.0),
        (50, 64, 1, 0.5),
        (33, 5, 2, 1.1),
    ],
)
def test_expert_choice_against_sorting(T, E, k, cf):
    for ties in (False, True):
        scores = logits_of(T, E, scale=2)
        view = as_view(
            (scores.round() if ties else scores), k, Context(valid=torch.arange(T) % 5 != 3, position=torch.arange(T))
        )
        n = int(view.context.valid.sum())
        probs, c = expert_scores(view), min(n, max(1, ceil(cf * n * k / E - 1e-9)))
        mask = torch.zeros(T, E, dtype=torch.bool)
        for e in range(E):
            rows = sorted((t for t in range(T) if view.context.valid[t]), key=lambda t: (-float(probs[t, e]), t))
            mask[rows[:c], e] = True
        routing = ExpertChoice(k, cf)(view).validate()
        assert torch.equal(routing.mask, mask) and (routing.load == c).all() and budget(n, E, k, cf) == c


def test_quantile_is_the_bar_of_expert_choice():
    for T, E, k in ((100, 8, 2), (101, 8, 3), (3, 8, 1), (64, 64, 64)):
        scores = logits_of(T, E).softmax(-1)
        assert torch.equal(
            scores >= quantile_thresholds(scores, k / E), top_tokens(scores, max(1, ceil(T * k / E - 1e-9)))
        )
    bar = quantile_thresholds(logits_of(400, 8).softmax(-1), 0.25)
    assert torch.equal(
        ExpertThreshold(2, thresholds=bar)(logits_of(400, 8)).mask, ExpertThreshold(2)(logits_of(400, 8)).mask
    )


def test_thresholds_in_every_form():
    @dataclass
    class Live:
        rows: torch.Tensor

        def at(self, layer):
            return self.rows[layer]

    logits, rows = logits_of(50, 8), torch.stack([torch.full((8,), 0.1), torch.full((8,), 0.3)])
    for layer in (0, 1):
        view = as_view(logits, 2, Context(layer=layer))
        masks = [
            rule(view).mask
            for t in (rows[layer], tuple(rows[layer].tolist()), rows[layer].numpy(), Live(rows))
            for rule in (ExpertThreshold(2, thresholds=t), ExpertChoice(2, mode="causal", thresholds=t))
        ]
        assert all(torch.equal(m, logits.softmax(-1) >= rows[layer]) for m in masks)
    assert ExpertThreshold(thresholds=Live(rows)).describe()["thresholds"] == "Live"


def test_as_shipped_against_the_definition():
    T, E, k, clamp = 300, 8, 2, 20
    logits = logits_of(T, E)
    picked = torch.zeros(T, E, dtype=torch.bool).scatter_(0, logits.topk(clamp, dim=0).indices, True)
    rows = torch.where(picked.any(-1, keepdim=True), logits.masked_fill(~picked, -INF), logits)
    values, ids = rows.topk(k, -1)
    want = torch.zeros(T, E).scatter_(1, ids, values.softmax(-1))
    routing = ExpertChoiceAsShipped(k, capacity_factor=1.25, clamp=clamp)(logits).validate()
    assert torch.allclose(routing.dense(), want, atol=1e-6) and torch.equal(routing.extras["fallback"], ~picked.any(-1))
    ranked_by_probability = replace(as_view(logits, k), choice=logits.softmax(-1))
    assert torch.equal(
        ExpertChoiceAsShipped(k, capacity_factor=1.25, clamp=clamp)(ranked_by_probability).mask, routing.mask
    )
    assert ExpertChoiceAsShipped(k)(logits_of(32 * 256, 8)).extras["fallback"].float().mean() >= 0.9375
    assert ExpertChoiceAsShipped(k)(logits_of(32 * 256, 32)).extras["fallback"].float().mean() >= 0.75


# the leak


def test_leak_bound_and_count():
    assert leak_bound(16, 2) == pytest.approx(2 * 2.807354922, abs=1e-6) and leak_bound(8, 4) == 0
    for T, E, k in ((64, 8, 2), (2048, 64, 8), (4096, 16, 1)):
        assert allocation_bits(T, E, T * k // E) > leak_bound(E, k)
    assert allocation_bits(4, 1, 2) == pytest.approx(2.584962501 / 4)


def test_leak_counts_time_by_position():
    "The sequences of a batch advance together; answers can be repeated; a view and its logits with a context are one."
    B, S = 4, 64
    context = Context(
        position=torch.arange(S).repeat(B),
        sequence=torch.arange(B).repeat_interleave(S),
        valid=torch.arange(B * S) % 17 != 16,
    )
    logits, rule = logits_of(B * S, 8), ExpertChoice(2)
    value = leak_bits(rule, logits, context)
    assert 0.1 < value < 1 and value == leak_bits(rule, logits, context)
    bars = quantile_thresholds(logits.softmax(-1), 0.25)
    assert leak_bits(ExpertThreshold(2, thresholds=bars), logits, context) == 0
    assert leak_bits(rule, as_view(logits, 2, context)) == value


@pytest.mark.parametrize(
    "options, message",
    [
        ({"draws": 1}, "draws"),
        ({"cuts": 0}, "cuts"),
        ({"run": 1.5}, "run"),
        ({"context": Context(valid=torch.zeros(9, dtype=torch.bool))}, "no valid rows"),
    ],
)
def test_leak_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        leak_bits(TopK(2), logits_of(9, 8), **options)


# soft


def test_soft_identities():
    logits = logits_of(200, 8)
    for tau in (0.3, 1.0, 3.0):
        soft = SoftK(3, temperature=tau)(logits)
        assert torch.allclose(soft.weights, (logits.topk(3).values / tau).softmax(-1), atol=1e-6)
        assert torch.allclose(soft.weights, TopK(3, weigh="renorm", temperature=tau)(logits).weights, atol=1e-6)
    summed = SummedTopK(3)(logits)
    top = logits.topk(3).values.clamp(min=0)
    assert torch.allclose(summed.weights, top / (top.sum(-1, keepdim=True) + 1e-9), atol=1e-6)
    leaf = (-logits.abs()).requires_grad_()
    SummedTopK(3)(leaf).weights.sum().backward()
    assert (leaf.grad == 0).all()
    assert (TopKHardAsShipped(3)(logits).dense().sum(-1) == 3).all() and (
        Top1AsShipped()(as_view(logits, 4)).counts == 1
    ).all()


# Sinkhorn and the quota


@pytest.mark.parametrize(
    "iterations, first",
    [
        (1, [0.998948, 0.979284, 0.979284, 0.015611]),
        (3, [0.992153, 0.862913, 0.862913, 0.002107]),
        (50, [0.956339, 0.521648, 0.521648, 0.000366]),
    ],
)
def test_sinkhorn_gold(iterations, first):
    plan, max_vio = sinkhorn(torch.tensor([[0.9, 0.1], [0.8, 0.3], [0.7, 0.2], [0.1, 0.4]]), 0.1, iterations)
    columns = {1: (2.973, 1.027), 3: (2.7201, 1.2799), 50: (2, 2)}[iterations]
    assert torch.allclose(plan[:, 0], torch.tensor(first), atol=1e-6) and torch.allclose(
        plan.sum(0), torch.tensor(columns, dtype=torch.float32), atol=6e-4
    )
    assert abs(float(max_vio) - (columns[0] - 2)) < 6e-4


def test_sinkhorn_converges_and_stops():
    scores = logits_of(300, 16, skew=1)
    for epsilon in (0.5, 1.0):
        plan, max_vio = sinkhorn(scores, epsilon, 500)
        assert max_vio < 1e-2 and torch.allclose(plan.sum(-1), torch.ones(300), atol=1e-5)
        early, vio = sinkhorn(scores, epsilon, 500, tolerance=0.5)
        assert vio < 1 and not torch.equal(early, plan)
        _, at_once = sinkhorn(scores, epsilon, 1)
        assert vio < at_once
    valid = torch.arange(300) % 4 > 0
    plan, _ = sinkhorn(scores, 1.0, 50, valid)
    assert (plan[~valid] == 0).all() and torch.allclose(plan[valid], sinkhorn(scores[valid], 1.0, 50)[0], atol=1e-5)
    holes = scores.clone()
    holes[:, 3], holes[5] = -INF, -INF
    plan, max_vio = sinkhorn(holes, 1.0, 200)
    assert plan.isfinite().all() and max_vio.isfinite() and (plan[:, 3] == 0).all() and (plan[5] == 0).all()
    assert torch.allclose(plan.sum(0)[torch.arange(16) != 3], torch.full((15,), 299 / 15), atol=1e-2)


def one_at_a_time(scores, k, capacity):
    "Deferred acceptance, one bid after the other."
    wants = [
        [e for e in sorted(range(scores.shape[1]), key=lambda e: (-row[e], e)) if row[e] > -INF]
        for row in scores.tolist()
    ]
    held, bids = [[] for _ in range(scores.shape[1])], [t for t in range(len(scores)) for _ in range(k)]
    while bids:
        t = bids.pop()
        if not wants[t]:
            continue
        e = wants[t].pop(0)
        held[e].append((-float(scores[t, e]), t))
        if len(held[e]) > capacity:
            held[e].sort()
            bids.append(held[e].pop()[1])
    mask = torch.zeros(scores.shape, dtype=torch.bool)
    for e, tokens in enumerate(held):
        mask[[t for _, t in tokens], e] = True
    return mask


@pytest.mark.parametrize("seed", range(12))
def test_quota_against_one_at_a_time(seed):
    generator = torch.Generator().manual_seed(seed)
    T, E = int(torch.randint(1, 70, (), generator=generator)), int(torch.randint(1, 9, (), generator=generator))
    k = int(torch.randint(1, E + 1, (), generator=generator))
    capacity = int(torch.randint(1, T + 1, (), generator=generator))
    scores = logits_of(T, E, seed, skew=seed % 3)
    if seed % 2:
        scores = scores.round()
    if seed % 4 == 3:
        scores[torch.rand(T, E, generator=generator) < 0.2] = -INF
    want = one_at_a_time(scores, k, capacity)
    assert torch.equal(_accept(scores, k, capacity), want)
    experts = quota_assign(scores, k, capacity)
    load, used = torch.bincount(experts.flatten(), minlength=E + 1)[:E], experts < E
    assert load.max() <= capacity and used.sum() >= want.sum()
    assert (one_past_last(experts, scores)[used] > -INF).all()


@pytest.mark.parametrize(
    "T, E, k, cf, skew",
    [
        (512, 32, 4, 1.25, 2),
        (512, 32, 4, 1.0, 2),
        (240, 8, 2, 1.0, 3),
        (240, 8, 7, 1.0, 1),
        (64, 4, 4, 1.0, 0),
        (100, 7, 3, 1.0, 5),
    ],
)
def test_quota_gives_everybody_k(T, E, k, cf, skew):
    scores, capacity = logits_of(T, E, skew=skew), ceil(cf * T * k / E)
    experts = quota_assign(scores, k, capacity)
    assert (experts < E).all() and torch.bincount(experts.flatten()).max() <= capacity
    assert all(len(set(row)) == k for row in experts.tolist())
    valid = torch.arange(T) % 3 > 0
    part = quota_assign(scores, k, capacity, valid)
    assert (part[~valid] == E).all() and torch.equal(part[valid], quota_assign(scores[valid], k, capacity))


def test_quota_of_many_tokens():
    "More rows than a 16-bit id can hold."
    experts = quota_assign(logits_of(70_000, 2, skew=1), 1, 35_000)
    assert torch.bincount(experts.flatten()).tolist() == [35_000, 35_000]


def test_quota_is_near_the_optimum():
    from scipy.optimize import linear_sum_assignment

    for seed in range(3):
        scores = logits_of(128, 8, seed, skew=1)
        _, best = linear_sum_assignment(-scores.repeat_interleave(16, 1).numpy())
        top = scores.gather(1, torch.from_numpy(best)[:, None] // 16).sum()
        experts, raw = SBase(1, iterations=100)(scores).experts, quota_assign(scores, 1, 16)
        assert (
            max(top * 0.97, scores.gather(1, raw).sum()) < scores.gather(1, experts).sum() <= top + 1e-3
        )  # prices matter: on raw scores it is far off
        assert torch.bincount(experts.flatten()).tolist() == [16] * 8


def test_sinkhorn_of_steep_logits():
    "What would underflow outside of logarithms still gives distinct, ranked entries."
    steep = logits_of(64, 8) * 1000
    assert log_sinkhorn(steep, 0.01, 30).isfinite().all()
    routing = Sinkhorn(2, epsilon=0.01)(steep).validate()
    assert routing.load.max() < 64


# bad input


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: ExpertChoice(0), "k = 0"),
        (lambda: ExpertChoice(1.5), "whole number"),
        (lambda: ExpertChoice(2, 0), "capacity_factor = 0"),
        (lambda: ExpertChoice(2, -1), "capacity_factor = -1"),
        (lambda: ExpertChoice(2, INF), "capacity_factor"),
        (lambda: ExpertChoice(2, mode="online"), "unknown mode"),
        (lambda: ExpertChoice(2, mode="causal"), "needs thresholds"),
        (lambda: ExpertThreshold(2, thresholds=[0.1, float("nan")]), "NaN"),
        (lambda: ExpertThreshold(2, thresholds=[0.1] * 7)(logits_of(5, 8)), "one for each expert"),
        (
            lambda: ExpertChoice(2, mode="causal", thresholds=torch.zeros(2, 8))(logits_of(5, 8)),
            "one for each expert|shape",
        ),
        (lambda: quantile_thresholds(logits_of(5, 8), 0), "share"),
        (lambda: quantile_thresholds(logits_of(5, 8), 1.1), "share"),
        (lambda: quantile_thresholds(logits_of(0, 8), 0.5), "no tokens"),
        (lambda: ExpertChoiceAsShipped(2, clamp=0), "clamp = 0"),
        (lambda: ExpertChoiceAsShipped(2, capacity_factor=0), "capacity_factor"),
        (lambda: SoftK(0), "k = 0"),
        (lambda: SoftK(2, temperature=0), "temperature"),
        (lambda: Sinkhorn(2, epsilon=0), "epsilon"),
        (lambda: Sinkhorn(2, epsilon=-0.1), "epsilon"),
        (lambda: Sinkhorn(2, iterations=0), "iterations"),
        (lambda: sinkhorn(logits_of(4, 2), epsilon=0), "epsilon"),
        (lambda: SBase(2, capacity_factor=0), "capacity_factor"),
        (lambda: quota_assign(logits_of(4, 2), 3, 4), "k of the quota"),
        (lambda: quota_assign(logits_of(4, 2), 1, 0), "capacity"),
        (lambda: quota_assign(torch.full((4, 2), float("nan")), 1, 2), "NaN"),
        (lambda: leak_bound(8, 0), "k = 0"),
        (lambda: Dense(weigh="ones"), "'one'"),
    ],
)
def test_bad_parameters(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "rule",
    [
        ExpertChoice(9),
        ExpertThreshold(9),
        ExpertChoiceAsShipped(9),
        Sinkhorn(9),
        SBase(9),
        SoftK(9),
        SummedTopK(9),
        TopKHardAsShipped(9),
    ],
    ids=name_of,
)
def test_too_many_experts(rule):
    with pytest.raises(ValueError, match="9"):
        rule(logits_of(20, 8))


# generation


@pytest.fixture(scope="module")
def tiny():
    from transformers import OlmoeConfig, OlmoeForCausalLM

    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    return OlmoeForCausalLM(config).eval()


PROMPT = torch.tensor([[5, 6, 7, 8, 9], [0, 0, 11, 12, 13]])
MASK = (PROMPT > 0).long()


@pytest.mark.parametrize("rule", BATCH, ids=name_of)
@pytest.mark.parametrize("prompt", [PROMPT, PROMPT[:1, :1]], ids=["batch", "one token"])
def test_batch_rules_refuse_to_generate(tiny, rule, prompt):
    with route(tiny, rule), pytest.raises(ValueError, match="cannot decide on a continuation"):
        tiny.generate(prompt, attention_mask=(prompt > 0).long(), max_new_tokens=4, do_sample=False)
    with (
        route(tiny, [Router(rule, 16, 8, k=2) for _ in range(2)]),
        pytest.raises(ValueError, match="eval_rule|thresholds|token by token"),
    ):
        tiny.generate(prompt, attention_mask=(prompt > 0).long(), max_new_tokens=4, do_sample=False)


@pytest.mark.parametrize("rule", [r for r in ALL if r not in BATCH], ids=name_of)
def test_other_rules_generate(tiny, rule):
    "With a cache the same tokens as without: the decisions are causal."
    runs = []
    for cache in (True, False):
        with route(tiny, rule):
            runs.append(tiny.generate(PROMPT, attention_mask=MASK, max_new_tokens=4, do_sample=False, use_cache=cache))
    assert runs[0].shape == (2, 9) and torch.equal(*runs)


def test_eval_rule_is_the_way_out(tiny):
    routers = [Router(ExpertChoice(2), 16, 8, k=2, eval_rule=TopK(2)).eval() for _ in range(2)]
    with route(tiny, routers):
        assert tiny.generate(PROMPT, attention_mask=MASK, max_new_tokens=3, do_sample=False).shape == (2, 8)


@pytest.mark.parametrize("rule", BATCH, ids=name_of)
def test_reading_is_allowed(tiny, rule):
    "Whole texts, with padding on either side, with and without a mask."
    with torch.no_grad(), route(tiny, rule, validate=True):
        for ids in (PROMPT, PROMPT.flip(1)):
            assert tiny(ids, attention_mask=(ids > 0).long()).logits.isfinite().all()
        assert tiny(PROMPT).logits.isfinite().all()
        cache = tiny(PROMPT, use_cache=True).past_key_values
        with pytest.raises(ValueError, match="continuation"):
            tiny(PROMPT[:, :2], past_key_values=cache)
    for bare in (
        as_view(logits_of(1, 8), 2),
        as_view(logits_of(4, 8), 2, Context(position=torch.tensor([0, 1, 3, 4]), sequence=torch.tensor([0, 0, 1, 1]))),
    ):
        with pytest.raises(ValueError, match="continuation"):
            rule(bare)
