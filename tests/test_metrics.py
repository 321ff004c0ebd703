"Every metric against plain loops, other libraries and both extremes; streaming; noise floors; FLOPs; bad input."

import json
from collections import Counter
from itertools import combinations
from math import log

import numpy as np
import pytest
import torch
from scipy import stats as reference

from moe_routing.core import Routing, order_slots
from moe_routing.metrics.cost import (
    flop_breakdown,
    flops_per_token,
    flops_reduction_pct,
    flops_reduction_pct_seed,
    own_k,
)
from moe_routing.metrics.decision import histogram, limit_rates, selection_entropy, selection_entropy_normalized
from moe_routing.metrics.load import LOAD_METRICS, blocks, counts_of, gini, noise_floor, random_loads
from moe_routing.metrics.stability import jaccard, output_determinism, overlap_noise, random_jaccard
from moe_routing.metrics.table import METRICS, metric_table, per_layer, summarise, tally


def made(T, E, K, L, seed=0, least=0, dtype=torch.float32):
    "L random decisions; each token uses `least` to K experts with random weights."
    g, out = torch.Generator().manual_seed(seed), []
    for _ in range(L):
        logits = 2 * torch.randn(T, E, generator=g)
        counts = torch.randint(least, K + 1, (T, 1), generator=g)
        experts = torch.rand(T, E, generator=g).argsort(-1)[:, :K].masked_fill(torch.arange(K) >= counts, E)
        weights = (torch.rand(T, K, generator=g) * (experts < E)).to(dtype)
        out.append(Routing(logits, *order_slots(experts, weights, E)).validate())
    return out


def sets(r):
    return [{e for e in row if e < r.num_experts} for row in r.experts.tolist()]


def by_hand(block, second, k_floor, k_ceiling, native_k):
    "The same numbers with Python loops, one token at a time."
    E = block[0].num_experts
    chosen, again = [sets(r) for r in block], [sets(r) for r in second]
    counts = [[len(s) for s in layer] for layer in chosen]
    loads = [[sum(e in s for s in layer) for e in range(E)] for layer in chosen]
    flat, pooled = sum(counts, []), [sum(l[e] for l in loads) for e in range(E)]
    out = {
        "effective_k": np.mean(flat),
        "effective_k_per_layer": [np.mean(c) for c in counts],
        "expert_activation_ratio": np.mean(flat) / k_ceiling,
        "count_std": np.std(flat),
        "adaptive_range": max(flat) - min(flat),
    }
    shares = [n / len(flat) for n in Counter(flat).values()]
    out["selection_entropy"] = -sum(p * log(p) for p in shares)
    out["selection_entropy_normalized"] = (
        out["selection_entropy"] / log(k_ceiling - k_floor + 1) if k_ceiling > k_floor else 0.0
    )
    out["ceiling_hit_rate"] = 100 * sum(c >= k_ceiling for c in flat) / len(flat)
    out["floor_hit_rate"] = 100 * sum(c <= k_floor for c in flat) / len(flat)
    out["mid_range_rate"] = max(0, 100 - out["ceiling_hit_rate"] - out["floor_hit_rate"])
    out["layer_expert_variance"] = np.var([np.mean(c) for c in counts])
    pairs = [None if np.std(a) == 0 or np.std(b) == 0 else np.corrcoef(a, b)[0, 1] for a, b in zip(counts, counts[1:])]
    defined = [r for r in pairs if r is not None]
    out["layer_consistency_per_pair"], out["layer_consistency_score"] = pairs, np.mean(defined) if defined else None
    mean = lambda values: None if any(v is None for v in values) else np.mean(values)
    ginis = lambda n: sum(abs(x - y) for x in n for y in n) / (2 * E * sum(n)) if sum(n) else 0.0
    cvs = lambda n: np.std(n) / np.mean(n) if sum(n) else None
    vios = lambda n: max(n) / np.mean(n) - 1 if sum(n) else None
    out |= {
        "load_cv": mean([cvs(n) for n in loads]),
        "load_cv_per_layer": [cvs(n) for n in loads],
        "load_cv_pooled": cvs(pooled),
        "load_gini": np.mean([ginis(n) for n in loads]),
        "gini_coefficient": ginis(pooled),
        "max_violation": mean([vios(n) for n in loads]),
        "max_violation_pooled": vios(pooled),
        "max_violation_per_layer": [vios(n) for n in loads],
        "unused_experts": np.mean([sum(x == 0 for x in n) for n in loads]),
        "expert_utilization": sum(x > 0 for x in pooled) / E,
        "expert_utilization_per_layer": [sum(x > 0 for x in n) / E for n in loads],
        "expert_utilization_mean": np.mean([sum(x > 0 for x in n) / E for n in loads]),
    }
    out["load_gini_per_layer"], out["served_cv_per_layer"] = [ginis(n) for n in loads], out["load_cv_per_layer"]
    out["unused_expert_rate_per_layer"] = [sum(x == 0 for x in n) / E for n in loads]
    if E > 1:
        out["load_entropy_per_layer"] = [reference.entropy(n) / log(E) if sum(n) else None for n in loads]
        out["load_cv_sample_per_layer"] = [np.std(n, ddof=1) / np.mean(n) if sum(n) else None for n in loads]
        out |= {n: mean(out[f"{n}_per_layer"]) for n in ("load_entropy", "load_cv_sample")}
    ws = [
        [[x for x, e in zip(w, row) if e < E] for w, row in zip(r.weights.double().tolist(), r.experts.tolist())]
        for r in block
    ]
    out["confidence_per_layer"] = [np.mean([max(w) / sum(w) for w in layer if w]) for layer in ws]
    some = [[reference.entropy(w) / log(len(w)) for w in layer if len(w) > 1] for layer in ws]
    out["confidence_seed_per_layer"] = [np.mean(x) if x else None for x in some]
    out |= {
        n: mean(out[f"{n}_per_layer"]) for n in ("served_cv", "unused_expert_rate", "confidence", "confidence_seed")
    }
    overlap = lambda x, y: np.mean([len(a & b) / len(a | b) if a | b else 1.0 for a, b in zip(sum(x, []), sum(y, []))])
    own = [[set(np.argsort(-row)[:native_k]) for row in r.logits.numpy()] for r in block]
    out |= {
        "expert_overlap_score": overlap(chosen, again),
        "overlap_with_own_run": overlap(chosen, again),
        "overlap_with_own_choice": overlap(chosen, own),
    }
    probs = [torch.softmax(r.logits.double(), -1).numpy() for r in block]
    out["routing_entropy_per_layer"] = [reference.entropy(p, axis=1).mean() for p in probs]
    out |= {
        "routing_entropy": np.mean([reference.entropy(p, axis=1) for p in probs]),
        "top1_probability": np.mean([p.max(1) for p in probs]),
        "used_mass": np.mean([p[list(s)].sum() for layer, ps in zip(chosen, probs) for s, p in zip(layer, ps)]),
    }
    sums = [float(w.sum()) for r in block for w in r.weights.double()]
    return out | {"weight_sum_mean": np.mean(sums), "weight_sum_std": np.std(sums)}


CASES = [
    (60, 16, 4, 3, 1),
    (60, 16, 16, 2, 0),
    (25, 5, 5, 4, 5),
    (40, 8, 1, 3, 1),
    (1, 8, 3, 2, 1),
    (30, 1, 1, 2, 1),
    (50, 64, 8, 1, 1),
    (20, 6, 3, 2, 0),
]


@pytest.mark.parametrize("T,E,K,L,least", CASES)
def test_summary_equals_plain_loops(T, E, K, L, least):
    block, second, native_k = made(T, E, K, L, least=least), made(T, E, K, L, seed=1, least=least), min(3, E)
    ceiling = max(int(r.counts.max()) for r in block)
    got = summarise(block, baseline=second, own=second, k_floor=1, k_ceiling=ceiling, native_k=native_k)
    want = by_hand(block, second, 1, ceiling, native_k)
    assert list(got) == list(METRICS) and json.loads(json.dumps(got, allow_nan=False)) == got
    for name, value in want.items():
        values, wanted = (x if isinstance(x, list) else [x] for x in (got[name], value))
        assert len(values) == len(wanted), name
        for a, b in zip(values, wanted):
            assert (a is None) == (b is None) and (a is None or np.isclose(a, b, rtol=1e-5, atol=1e-6)), (name, a, b)
    nobody_checked = {n for n, v in got.items() if v is not None} - set(want)
    assert all(
        METRICS[n].category == "noise" or n in ("flops_reduction_pct_seed", "load_entropy", "load_entropy_per_layer")
        for n in nobody_checked
    ), nobody_checked


def test_ranges_hold_and_extremes_lie_inside_them():
    for T, E, K, L, least in CASES:
        block = made(T, E, K, L, least=least)
        for name, value in summarise(block, baseline=block, native_k=1).items():
            m = METRICS[name]
            for v in value if isinstance(value, list) else [value]:
                assert v is None or m.low - 1e-9 <= v <= m.high + 1e-9, (name, v)
    for m in METRICS.values():
        assert (
            m.direction in ("higher", "lower", "neutral")
            and m.level in ("layer", "model", "run")
            and m.formula
            and m.source
        )
        for end in (m.perfect(64, 8, 1000), m.collapsed(64, 8, 1000)):
            assert end is None or m.low <= end <= m.high, m.name
        if m.noise_floor:
            assert m.low <= m.noise_floor(1000, 64, 2.5) <= m.high, m.name


@pytest.mark.parametrize("cuts", [1, 2, 7])
def test_blocks_add_up(cuts):
    block, second = made(90, 16, 6, 3), made(90, 16, 6, 3, seed=1)
    shards = lambda b: ([r.rows(torch.arange(90) % cuts == i) for r in b] for i in range(cuts))
    whole = summarise(block, baseline=second, own=second, native_k=4)
    parts = summarise(shards(block), baseline=shards(second), own=list(shards(second)), native_k=4)
    for name in METRICS:
        assert whole[name] is parts[name] is None or np.allclose(
            np.array(whole[name], float), np.array(parts[name], float)
        ), name
    assert per_layer(tally(shards(block), 4)) == per_layer(tally(shards(block), native_k=4)) != []


def test_blocks_without_tokens_and_single_layers_are_fine():
    block = made(20, 8, 3, 2)
    empty = [r.rows(torch.arange(0)) for r in block]
    assert summarise([empty, block, empty]) == summarise(block)
    assert summarise(block[0])["effective_k"] == pytest.approx(block[0].counts.double().mean().item())
    assert (
        summarise(block[0])["layer_consistency_score"] is None
        and summarise(block[0])["layer_consistency_per_pair"] == []
    )


def test_precision_gradients_and_missing_logits():
    block = made(40, 16, 4, 2, dtype=torch.bfloat16)
    live = [Routing(r.logits.clone().requires_grad_(), r.experts, r.weights.float().requires_grad_()) for r in block]
    a, b = summarise(block, native_k=2), summarise(live, native_k=2)
    assert all(a[k] == b[k] for k in METRICS)
    nan = torch.full((1, 1), float("nan")).expand(40, 16)
    blind = [Routing(nan, r.experts, r.weights) for r in block]
    gone = {k for k, v in summarise(blind, native_k=2).items() if v is None and a[k] is not None}
    assert gone == {
        "routing_entropy",
        "routing_entropy_per_layer",
        "top1_probability",
        "used_mass",
        "overlap_with_own_choice",
    }
    assert (
        summarise([block, blind], native_k=2)["routing_entropy"]
        is None
        is summarise([blind, block], native_k=2)["routing_entropy"]
    )
    broken = block[0].logits.clone()
    broken[3, 1] = float("nan")
    with pytest.raises(ValueError, match="layer 0 are partly NaN"):
        summarise([Routing(broken, block[0].experts, block[0].weights)])


def test_vectors_of_the_seeds_definitions():
    assert np.allclose(
        [gini(x) for x in ([7, 7, 7], [400, 0, 0, 0], [100, 50, 200, 30], [0, 0, 0])], [0, 0.75, 0.368421, 0], atol=1e-6
    )
    assert np.allclose(
        [flops_reduction_pct_seed(k, 64) for k in (8, 4.5, 1, 64)], [0, 6.9079, 13.8158, -110.526], atol=1e-3
    )
    h = histogram(range(1, 9), 64)
    assert np.allclose([selection_entropy(h), selection_entropy_normalized(h, 1, 8)], [2.0794, 1], atol=1e-4)
    h = histogram([3, 4, 5, 3, 6], 64)
    assert np.allclose([selection_entropy(h), selection_entropy_normalized(h, 1, 8)], [1.33218, 0.640643], atol=1e-5)
    fixed = histogram([8] * 10, 64)
    assert selection_entropy(fixed) == 0 and [float(x) for x in limit_rates(fixed, 1, 8)] == [100, 0, 0]
    assert [float(x) for x in limit_rates(fixed, 8, 8)] == [100, 100, 0]


@pytest.mark.parametrize("metric", LOAD_METRICS)
def test_load_metrics_work_on_any_leading_shape(metric):
    load = np.random.default_rng(0).integers(0, 50, (3, 2, 16))
    f = LOAD_METRICS[metric]
    assert np.allclose(f(load), [[f(row) for row in layer] for layer in load]) and np.allclose(
        f(torch.tensor(load)), f(load)
    )
    with pytest.raises(ValueError):
        f([-1, 3])
    with pytest.raises(ValueError):
        f([float("nan"), 3])
    with pytest.raises(ValueError):
        f([])


@pytest.mark.parametrize("E,counts", [(3, {1: 2}), (4, {2: 2}), (4, {1: 1, 3: 1})])
def test_random_loads_have_the_exact_distribution(E, counts):
    draws = random_loads(histogram(sum(([c] * n for c, n in counts.items()), []), E), 20000)
    exact = Counter({(0,) * E: 1.0})
    for c, n in counts.items():
        for _ in range(n):
            ways = list(combinations(range(E), c))
            after = Counter()
            for load, p in exact.items():
                for way in ways:
                    after[tuple(x + (e in way) for e, x in enumerate(load))] += p / len(ways)
            exact = after
    seen = Counter(map(tuple, draws.tolist()))
    assert set(seen) == set(exact)
    assert reference.chisquare([seen[k] for k in exact], [20000 * p for p in exact.values()]).pvalue > 0.001


def test_noise_floors():
    for E, k, T, want in ((256, 8, 512, 0.77), (256, 8, 2048, 0.37), (64, 8, 8192, 0.069), (32, 4, 32768, 0.031)):
        assert noise_floor("max_violation", T, E, k) == pytest.approx(want, rel=0.06)
    for E, k, T in ((64, 8, 1000), (64, 1, 500), (8, 2, 4000)):
        assert noise_floor("load_cv", T, E, k, draws=400) == pytest.approx(((E - k) / (k * T)) ** 0.5, rel=0.04)
    assert noise_floor("load_cv", 100, 8, 8) == 0 == noise_floor("unused_experts", 100, 8, 8)
    assert counts_of(10, 8, 2.3).tolist() == [0, 0, 7, 3, 0, 0, 0, 0, 0] and counts_of(10, 8, 8).tolist() == [0] * 8 + [
        10
    ]
    assert noise_floor("load_cv", 500, 64, 8, quantile=0.95) > noise_floor("load_cv", 500, 64, 8)
    for bad in (("load_vc", 10, 8, 2), ("load_cv", 0, 8, 2), ("load_cv", 10, 8, 9)):
        with pytest.raises(ValueError):
            noise_floor(*bad)


def test_random_routing_reads_its_noise_floor():
    block = made(2000, 32, 4, 4)
    got = summarise(block, native_k=4)
    for name in (
        "load_cv",
        "max_violation",
        "load_gini",
        "load_entropy",
        "overlap_with_own_choice",
        "load_cv_pooled",
        "gini_coefficient",
        "max_violation_pooled",
    ):
        assert got[name] == pytest.approx(got[name + "_noise"], rel=0.2), name
    assert abs(got["layer_consistency_score"]) < 4 * got["layer_consistency_noise"]
    skewed = [Routing(r.logits, r.experts.clamp(max=32) // 2 + 16 * (r.experts == 32), r.weights) for r in block]
    assert summarise(skewed[:1])["load_cv"] > 10 * got["load_cv_noise"]


def test_overlap_by_chance():
    for a, b, E in ((2, 3, 6), (8, 8, 64), (1, 5, 5), (0, 2, 4), (0, 0, 4)):
        first = set(range(a))
        want = (
            np.mean(
                [len(first & set(x)) / len(first | set(x)) if first | set(x) else 1 for x in combinations(range(E), b)]
            )
            if E < 10
            else random_jaccard(b, a, E)
        )
        assert random_jaccard(a, b, E) == pytest.approx(want)
    assert overlap_noise(histogram([2, 2, 4], 6), 3) == pytest.approx(
        (2 * random_jaccard(2, 3, 6) + random_jaccard(4, 3, 6)) / 3
    )
    with pytest.raises(ValueError):
        random_jaccard(9, 2, 8)
    none, all_ = torch.zeros(2, 4, dtype=torch.bool), torch.ones(2, 4, dtype=torch.bool)
    assert jaccard(none, none).tolist() == [1, 1] and jaccard(none, all_).tolist() == [0, 0]


def test_determinism_of_outputs():
    assert output_determinism([[1, 2], [3]], [[1, 2], [3]]) == 100 and output_determinism(
        [[1, 2, 3]], [[1]]
    ) == pytest.approx(100 / 3)
    assert output_determinism([torch.tensor([1, 2])], [torch.tensor([2, 1])]) == 0
    for bad in (([[1]], []), ([[]], [[]])):
        with pytest.raises(ValueError):
            output_determinism(*bad)


COMMON = dict(
    vocab_size=128,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=40,
    moe_intermediate_size=24,
    num_experts_per_tok=3,
    pad_token_id=0,
    eos_token_id=0,
    bos_token_id=0,
)
MLA = dict(
    n_routed_experts=16,
    n_group=2,
    topk_group=1,
    first_k_dense_replace=1,
    q_lora_rank=12,
    kv_lora_rank=8,
    qk_rope_head_dim=4,
    qk_nope_head_dim=8,
    v_head_dim=6,
    num_key_value_heads=4,
)


@pytest.mark.parametrize(
    "family,own",
    [
        ("olmoe", dict(num_experts=16)),
        ("qwen2_moe", dict(num_experts=16, shared_expert_intermediate_size=20)),
        ("mixtral", dict(num_local_experts=16)),
        ("gpt_oss", dict(num_local_experts=16, head_dim=8, sliding_window=64)),
        ("deepseek_v3", MLA),
    ],
)
def test_flops_are_those_that_torch_counts(family, own):
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, **{**COMMON, **own})
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config).eval()
    model.set_experts_implementation("eager")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.arange(20)[None], use_cache=False)
    assert own_k(config) == 3 and counter.get_total_flops() == 20 * flops_per_token(
        model, 3, 20
    ) == 20 * flops_per_token(config, 3, 20)
    layers = 2 if family == "deepseek_v3" else 3
    parts = flop_breakdown(config, [1, 2, 6][:layers], 20)
    assert (
        parts["experts"] == pytest.approx(flop_breakdown(config, np.mean([1, 2, 6][:layers]), 20)["experts"])
        and parts["router"] == layers * 2 * 16 * 32
    )
    assert (
        flops_reduction_pct(config, 3, 20) == 0 < flops_reduction_pct(config, 1, 20)
        and flops_reduction_pct(config, 16, 20) < 0
    )
    with pytest.raises(ValueError, match="mean_k has 7 values"):
        flops_per_token(config, [1] * 7, 20)
    with pytest.raises(ValueError, match="mean_k = 17"):
        flops_per_token(config, 17, 20)


def test_flops_in_the_summary():
    from transformers import LlamaConfig, OlmoeConfig

    config = OlmoeConfig(**{**COMMON, "num_experts": 16})
    block = made(50, 16, 6, 3)
    got = summarise(block, config_or_model=config, context_length=20)
    assert got["flops_per_token"] == pytest.approx(flops_per_token(config, got["effective_k_per_layer"], 20))
    assert got["flops_reduction_pct"] == pytest.approx(
        100 - 100 * got["flops_per_token"] / flops_per_token(config, 3, 20)
    )
    assert (
        got["flops_reduction_pct_seed"] == pytest.approx(flops_reduction_pct_seed(got["effective_k"], 16, 3))
        and got["overlap_with_own_choice"] is not None
    )
    with pytest.raises(ValueError, match="3 MoE layers"):
        summarise(block[:2], config_or_model=config)
    dense = LlamaConfig(**{k: v for k, v in COMMON.items() if "moe" not in k and "experts" not in k})
    with pytest.raises(ValueError, match="native_k"):
        summarise(block, config_or_model=dense)
    with pytest.raises(ValueError, match="no stacked experts"):
        summarise(block, config_or_model=dense, native_k=3)
    with pytest.raises(TypeError, match="str"):
        summarise(block, config_or_model="olmoe", native_k=3)


def test_given_quality_and_speed():
    block = made(10, 8, 2, 2)
    got = summarise(
        block,
        quality={"perplexity": 7.5, "accuracies": {"a": 0.5, "b": 0.7}, "accuracies_seed": {"a": 0.1}, "nll": None},
        speed={"tokens": 100, "seconds": 4.0, "tokens_seed": 100, "seconds_seed": 10.0},
    )
    assert (got["perplexity"], got["perplexity_seed"], got["avg_task_accuracy"], got["avg_task_accuracy_seed"]) == (
        7.5,
        None,
        pytest.approx(0.6),
        0.1,
    )
    assert (
        got["tokens_per_second"],
        got["latency_ms_per_token"],
        got["tokens_per_second_seed"],
        got["latency_ms_per_token_seed"],
    ) == (25, 40, 10, 100)


@pytest.mark.parametrize(
    "options,message",
    [
        (dict(source=[]), "empty"),
        (dict(source=iter(())), "empty"),
        (dict(source=[made(5, 8, 2, 2), made(5, 9, 2, 2)]), "block 1 has 2 layers of 9 experts"),
        (dict(source=[made(5, 8, 2, 2), made(5, 8, 2, 3)]), "block 1 has 3 layers"),
        (dict(source=made(5, 8, 2, 2) + made(6, 8, 2, 1)), r"\[5, 6\] tokens"),
        (dict(source=made(5, 8, 2, 1) + made(5, 9, 2, 1)), "different numbers of experts"),
        (dict(k_floor=3, k_ceiling=2), "k_ceiling = 2 is below k_floor = 3"),
        (dict(k_ceiling=9), "k_ceiling = 9"),
        (dict(k_ceiling=1), "a token used"),
        (dict(k_floor=-1), "k_floor = -1"),
        (dict(native_k=9), "native_k = 9"),
        (dict(baseline=made(4, 8, 2, 2)), "does not match"),
        (dict(baseline=[made(5, 8, 2, 2)] * 2), "different numbers of blocks"),
        (dict(quality={"ppl": 1}), "unknown key of quality 'ppl'"),
        (dict(quality={"accuracies": {}}), "no task"),
        (dict(quality={"accuracies": {"a": 40}}), "accuracy of a = 40"),
        (dict(quality={"nll": [1.0], "tokens": [0]}), "tokens = 0 of sample 0"),
        (dict(quality={"nll": [], "tokens": []}), "samples"),
        (dict(speed={"second": 1}), "did you mean 'seconds'"),
        (dict(speed={"tokens": 1, "seconds": 0}), "seconds = 0"),
    ],
)
def test_bad_input_gets_one_clear_error(options, message):
    with pytest.raises(ValueError, match=message):
        summarise(**{"source": made(5, 8, 2, 2), **options})


def test_wrong_kinds_of_source():
    for bad in ([1, 2], ["ab"], [made(5, 8, 2, 1)[0].experts], (r for r in made(5, 8, 2, 2)), [[]]):
        with pytest.raises(TypeError, match="give one record for each MoE layer"):
            list(blocks(bad))
    t = tally(made(5, 8, 2, 2))
    with pytest.raises(ValueError, match="finished Tally"):
        summarise(t, baseline=made(5, 8, 2, 2))


def test_table_and_layers():
    table, block = metric_table(), made(30, 8, 3, 4)
    assert list(table.metric) == list(METRICS) and set(table.columns) >= {
        "formula",
        "range",
        "better",
        "even",
        "collapsed",
        "by chance",
    }
    rows, whole = per_layer(block, native_k=2), summarise(block, native_k=2)
    assert [r["layer"] for r in rows] == [0, 1, 2, 3] and json.dumps(rows, allow_nan=False)
    for name in (
        "load_cv",
        "max_violation",
        "load_gini",
        "routing_entropy",
        "used_mass",
        "overlap_with_own_choice",
        "weight_sum_mean",
        "load_cv_noise",
        "effective_k",
    ):
        assert np.mean([r[name] for r in rows]) == pytest.approx(whole[name]), name
