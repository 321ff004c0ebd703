"Cache replay: Belady against every policy, fast against slow, time against an event list, controls, bad input."

import json
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from moe_routing.prefetch import (
    POLICIES,
    Replay,
    break_even,
    expert_frequency,
    expert_size,
    hit_rate_interval,
    load_predictions,
    local_consistency,
    replay,
    serving_time,
    worth,
)

ONLINE = [p for p in POLICIES if p != "belady"]


def case(g, most=9, layers=3, experts=6):
    "A small random trace and the settings of a cache for it."
    T, L, E = int(g.integers(1, most + 1)), int(g.integers(1, layers + 1)), int(g.integers(1, experts + 1))
    K, sticky = int(g.integers(1, E + 1)), g.random() * 3
    x = (-g.random((T, L, E)) - sticky * g.random((1, L, E))).argsort(-1)[..., :K]
    if g.random() < 0.4:
        x = np.where(g.random(x.shape) < 0.3, E, x)
    x[0, 0, 0] = 0 if 0 not in x[0, 0, 1:] else x[0, 0, 0]
    if (x == E).all():
        x[0, 0, 0] = 0
    scope = ("layer", "global")[int(g.integers(2))]
    capacity = int(g.integers(1, (E if scope == "layer" else L * E) + 1))
    M = int(g.integers(1, E + 1))
    guess = (
        np.where(g.random((T, L, M)) < 0.2, E, g.random((T, L, E)).argsort(-1)[..., :M])
        if g.random() < 0.6
        else np.pad(x, ((0, 0), (0, 0), (0, max(0, M - K))), constant_values=E)[..., : max(M, K)]
    )
    settings = dict(
        predicted=guess,
        prefetch=int(g.integers(0, min(capacity, guess.shape[-1]) + 1)),
        horizon=int(g.integers(1, min(2 * L + 2, T * L) + 1)),
    )
    common = dict(capacity=capacity, scope=scope, sample=np.sort(g.integers(0, 3, T)), clear=bool(g.integers(2)))
    return x, E, common, settings, g.integers(0, 4, (L, E))


def test_belady_is_never_beaten_in_ten_thousand_traces():
    g, beaten_by_more = np.random.default_rng(0), 0
    for n in range(10_000):
        x, E, common, ahead, frequency = case(g)
        bound, policy = replay(x, E, "belady", **common), ONLINE[n % len(ONLINE)]
        demand = replay(
            x, E, policy, **common, predicted=ahead["predicted"], horizon=ahead["horizon"], frequency=frequency
        )
        assert bound.misses <= demand.misses and demand.loads == demand.misses, (n, policy)
        beaten_by_more += demand.misses > bound.misses
        if policy == "none":
            continue
        early = replay(x, E, policy if n % 2 else "belady", **common, **ahead, frequency=frequency)
        assert early.loads >= bound.misses and early.useful <= early.fetched, (
            n,
            policy,
        )  # it may have more hits, never fewer loads
        assert early.hits + early.misses == (x < E).sum() == bound.accesses and early.collisions <= early.misses
    assert beaten_by_more > 2000  # the cases are not trivial


def fewest_misses(steps, capacity):
    "Everything a cache could do, searched."
    states = {frozenset(): 0}
    for need in map(frozenset, steps):
        after = {}
        for held, misses in states.items():
            misses += len(need - held)
            must = need if len(need) <= capacity else frozenset()
            rest = (held | need) - must
            for size in range(min(capacity - len(must), len(rest)) + 1):
                for kept in combinations(rest, size):
                    after[must | frozenset(kept)] = min(misses, after.get(must | frozenset(kept), misses))
        states = after
    return min(states.values())


def test_belady_is_the_optimum_of_a_full_search():
    g = np.random.default_rng(1)
    for _ in range(250):
        x, E, common, _, _ = case(g, most=6, layers=2, experts=4)
        T, L, _ = x.shape
        if common["scope"] == "global" and L * E > 6:
            continue
        total, s = 0, common["sample"]
        for part in [np.flatnonzero(s == i) for i in np.unique(s)] if common["clear"] else [np.arange(T)]:
            needs = [[[(l, e) for e in x[t, l] if e < E] for l in range(L)] for t in part]
            streams = (
                [[row[l] for row in needs] for l in range(L)]
                if common["scope"] == "layer"
                else [[step for row in needs for step in row]]
            )
            total += sum(fewest_misses(steps, common["capacity"]) for steps in streams)
        assert replay(x, E, "belady", **common).misses == total


def test_fast_equals_the_slow_version_of_the_notebook():
    cells = json.loads(Path("nbs/52_prefetch.ipynb").read_text())["cells"]
    space = {}
    exec(next("".join(c["source"]) for c in cells if "".join(c["source"]).startswith("def slow_replay")), space)
    g = np.random.default_rng(2)
    for n in range(400):
        x, E, common, ahead, frequency = case(g)
        policy = ("lru", "lfu", "static", "least_stale", "predicted", "belady")[n % 6]
        slow = space["slow_replay"](x, E, policy, **common, **ahead, frequency=frequency)
        fast = replay(x, E, policy, **common, **ahead, frequency=frequency)
        assert slow == {k: getattr(fast, k) for k in slow}, (n, policy, common, ahead)


def routing(T=400, L=2, E=16, K=4, seed=0):
    return torch.rand(T, L, E, generator=torch.Generator().manual_seed(seed)).argsort(-1)[..., :K]


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("policy", [p for p in POLICIES if p != "none"])
def test_a_cache_for_everything_loads_each_expert_once(policy, scope):
    x = routing()
    found = replay(x, 16, policy, 16 if scope == "layer" else 32, scope, predicted=x, frequency=expert_frequency(x, 16))
    assert found.misses == 32 and found.collisions == 0 and found.hit_rate == 1 - 32 / x.numel()


@pytest.mark.parametrize("policy", ["random", "lru", "lfu"])
def test_random_routing_gives_the_share_that_is_held(policy):
    assert abs(replay(routing(3000), 16, policy, 6).hit_rate - 6 / 16) < 0.015


def test_random_eviction_is_uniform_and_repeatable():
    seen = np.zeros(3)
    for seed in range(600):  # experts 0, 1, 2 fill the cache, 3 evicts one of them; the last token shows which
        x = torch.tensor([[[0, 1, 2, 4, 4]], [[3, 4, 4, 4, 4]], [[0, 1, 2, 3, 4]]])
        g = np.random.default_rng(seed)
        x = torch.cat([x[:2], torch.tensor([[[int(g.integers(3)), 4, 4, 4, 4]]])])
        seen[int(x[2, 0, 0])] += replay(x, 4, "random", 3, generator=np.random.default_rng(1000 + seed)).misses - 4
    assert (abs(seen / 200 - 1 / 3) < 0.12).all()
    assert replay(routing(), 16, "random", 5).misses == replay(routing(), 16, "random", 5).misses


def test_unused_slots_and_one_wide_trace_agree():
    x = routing(60)
    wide = torch.cat([x, torch.full((60, 2, 3), 16)], -1)
    for policy in ("lru", "lfu", "least_stale", "belady"):
        for scope in ("layer", "global"):
            assert replay(x, 16, policy, 6, scope).misses == replay(wide, 16, policy, 6, scope).misses
    assert replay(x.to(torch.uint8), 16, "lru", 6).misses == replay(x.numpy(), 16, "lru", 6).misses


def test_an_oracle_ahead_misses_only_what_nobody_could_announce():
    x, sample = routing(200), torch.arange(200) // 20
    for horizon in (1, 2, 3):
        found = replay(x, 16, "lru", 8, predicted=x, prefetch=4, horizon=horizon, sample=sample)
        unannounced = sum(1 for i in range(400) if i % 40 < horizon)  # the first steps of each sample
        assert found.misses <= 4 * unannounced and found.useful == found.fetched
    assert (
        replay(x, 16, "lru", 8, predicted=x, prefetch=4, horizon=41, sample=sample).fetched == 0
    )  # a sample has 40 steps


def test_clearing_forgets_and_samples_add_up():
    x, sample = routing(90), torch.arange(90) // 30
    kept, cleared = replay(x, 16, "lru", 12, sample=sample), replay(x, 16, "lru", 12, sample=sample, clear=True)
    alone = [replay(x[i : i + 30], 16, "lru", 12).misses for i in (0, 30, 60)]
    assert (
        cleared.sample_misses.tolist() == alone and kept.misses < cleared.misses and kept.sample_misses[0] == alone[0]
    )
    assert (
        kept.sample_accesses.tolist() == [240] * 3 and replay(x, 16, "lru", 12, sample=sample + 7).misses == kept.misses
    )
    assert json.loads(json.dumps(kept.as_dict()))["misses"] == kept.misses and kept.bytes == kept.loads


def event_time(r: Replay, load, c):
    "Gate by gate with an explicit queue of the link: the time model in other words."
    done, gate, link = {}, 0.0, 0.0
    for j in range(len(r.demand)):
        arrived = [gate]
        for k in range(r.demand[j]):
            link = max(link, gate) + load
            arrived.append(link)
        if r.waits[j] >= 0:
            arrived.append(done[(int(r.waits[j]) >> 16, int(r.waits[j]) & 0xFFFF)])
        for k in range(r.speculative[j]):
            link = max(link, gate) + load
            done[j, k] = link
        gate = max(arrived) + c
    return gate


def test_time_matches_an_event_list_and_a_straight_line():
    g = np.random.default_rng(3)
    for n in range(300):
        x, E, common, ahead, frequency = case(g)
        found, plain = (
            replay(x, E, "lru", **common, **ahead, expert_bytes=1e6),
            replay(x, E, "lru", **common, expert_bytes=1e6),
        )
        for bandwidth in (0.3, 1, 20):
            load = 0.05 + 1 / bandwidth
            assert np.isclose(
                serving_time(found, bandwidth, 0.7, 0.05)["sample_ms"].sum(), event_time(found, load, 0.7)
            )
            assert np.isclose(
                serving_time(plain, bandwidth, 0.7, 0.05)["sample_ms"].sum(),
                plain.misses * load + 0.7 * len(plain.demand),
            )


def test_break_even_separates_faster_from_slower():
    g, kinds = np.random.default_rng(4), {"nowhere": 0, "always": 0, "between": 0}
    total = lambda r, b: serving_time(r, b, 1)["sample_ms"].sum()
    for n in range(150):
        x, E, common, ahead, _ = case(g, most=30)
        found, plain = (
            replay(x, E, "lru", **common, **ahead, expert_bytes=1e6),
            replay(x, E, "lru", **common, expert_bytes=1e6),
        )
        limit, grid = break_even(found, plain, 1), np.geomspace(1e-3, 1e2, 40)
        kinds["nowhere" if limit == np.inf else "always" if limit == 0 else "between"] += 1
        for b in grid:
            if b > limit * 1.01:
                assert total(found, b) < total(plain, b)
            if b < limit / 1.01:
                assert total(found, b) >= total(plain, b) - 1e-6
    assert min(kinds.values()) > 5, kinds


def test_latency_can_make_prefetching_pay_nowhere():
    x = routing(100)
    wrong = replay(x, 16, "lru", 6, predicted=routing(100, seed=5), prefetch=4)
    assert break_even(wrong, replay(x, 16, "lru", 6), 1, latency_ms=50) == np.inf


def test_verdicts_in_words():
    x, sample = routing(400), torch.arange(400) // 20
    plain = [replay(x, 16, p, 8, sample=sample, expert_bytes=1e7) for p in ("none", "lru", "lfu", "belady")]
    oracle, noise = (
        replay(x, 16, "lru", 8, predicted=p, prefetch=4, sample=sample, expert_bytes=1e7)
        for p in (x, routing(400, seed=9))
    )
    good, bad = worth(oracle, plain, 50, 1), worth(noise, plain, 5, 1)
    assert (
        good["verdict"] == "pays" and good["low"] > 0 and "pays" in good["words"] and good["demand_policy"] != "belady"
    )
    assert bad["verdict"] == "does not pay" and "does not pay" in bad["words"] and bad["saved"] < 0
    one = replay(x, 16, "lru", 8, predicted=x, prefetch=4, expert_bytes=1e7)
    assert worth(one, [replay(x, 16, "lru", 8, expert_bytes=1e7)], 50, 1)["verdict"] == "undecided"  # one document
    with pytest.raises(ValueError, match="that is not belady"):
        worth(oracle, plain[3:], 5, 1)


def test_intervals_are_paired_by_document():
    x, sample = routing(600), torch.arange(600) // 20
    a, b = replay(x, 16, "belady", 8, sample=sample), replay(x, 16, "lru", 8, sample=sample)
    rate, gain, grouped = (
        hit_rate_interval(a),
        hit_rate_interval(a, b),
        hit_rate_interval(a, b, documents=np.arange(30) // 5),
    )
    assert np.isclose(rate.estimate, a.hit_rate) and np.isclose(gain.estimate, a.hit_rate - b.hit_rate) and rate.n == 30
    assert (
        grouped.method == "cluster t"
        and grouped.n == 6
        and np.isclose(grouped.estimate, gain.estimate)
        and gain.low > 0
    )
    assert hit_rate_interval(a, a).estimate == 0
    with pytest.raises(ValueError, match="different traces"):
        hit_rate_interval(a, replay(x[:40], 16, sample=sample[:40]))
    with pytest.raises(ValueError, match="3 labels, but there are 30"):
        hit_rate_interval(a, documents=[1, 2, 3])


def test_local_consistency_at_its_ends():
    same = torch.arange(4).expand(50, 2, 4)
    for row in local_consistency(same, 16, 10, 4):
        assert row["srp"] == row["sch"] == row["group"] == row["srp_shuffled"] == 1 and row["sch_random"] < 0.6
    x = routing(2000, L=1)
    (one,) = local_consistency(x, 16, 1, 4)
    assert one["srp"] == one["sch"] == one["srp_random"] == 1  # a window of one token is covered by its own experts
    (row,) = local_consistency(x, 16, 12, 4)
    assert abs(row["srp"] - row["srp_random"]) < 0.02 and abs(row["sch"] - row["sch_shuffled"]) < 0.02
    rates = [local_consistency(x, 16, 12, c)[0]["sch"] for c in (1, 4, 9, 16)]
    assert rates == sorted(rates) and rates[-1] == 1
    (row,) = local_consistency(torch.where(torch.rand(x.shape) < 0.5, 16, x), 16, 5, 3)  # adaptive counts
    assert 0 < row["srp"] <= 1


def test_expert_size_of_a_configuration_without_experts():
    from transformers import LlamaConfig

    with pytest.raises(ValueError, match="stacked"):
        expert_size(
            LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
        )


@pytest.mark.parametrize(
    "change, words",
    [
        ({"token": None}, "must hold ranked"),
        ({"token": torch.arange(4)}, "not (N, L, M) and (N,)"),
        ({"ranked": torch.zeros(5, 2)}, "not (N, L, M) and (N,)"),
        ({"token": torch.arange(6, 11)}, "row 10"),
        ({"token": torch.arange(-1, 4)}, "below 0"),
        ({"token": torch.tensor([1, 2, 2, 3, 4])}, "a row twice"),
        (None, "cannot be read"),
    ],
)
def test_predictions_of_another_trace_are_refused(change, words, tmp_path):
    file = tmp_path / "ranked.safetensors"
    if change is None:
        file.write_bytes(b"not safetensors")
    else:
        save_file(
            {
                k: v
                for k, v in (
                    {"ranked": torch.zeros(5, 2, 3, dtype=torch.int16), "token": torch.arange(5)} | change
                ).items()
                if v is not None
            },
            file,
        )
    with pytest.raises(ValueError) as e:
        load_predictions(file, 10)
    assert words in str(e.value) and str(file) in str(e.value)


X = routing(10)


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(capacity=0), "capacity = 0 is outside [1, 16]"),
        (dict(capacity=17), "capacity = 17 is outside [1, 16]"),
        (dict(capacity=33, scope="global"), "outside [1, 32]"),
        (dict(policy="lur"), "did you mean 'lru'"),
        (dict(scope="all"), "unknown cache scope 'all'"),
        (dict(policy="predicted"), "needs predicted"),
        (dict(prefetch=2), "needs predicted"),
        (dict(predicted=X[:5], prefetch=1), "predicted has shape (5, 2, 4)"),
        (dict(predicted=X + 2, prefetch=1), "outside 0..16"),
        (dict(predicted=X - 1, prefetch=1), "holds id -1"),
        (dict(predicted=X, prefetch=5), "prefetch"),
        (dict(predicted=X, prefetch=3, capacity=2), "prefetch"),
        (dict(predicted=X, prefetch=1, policy="none"), "no cache to fetch into"),
        (dict(predicted=X, horizon=0), "horizon = 0"),
        (dict(policy="static"), "needs frequency"),
        (dict(policy="static", frequency=torch.ones(2, 3)), "shape (2, 3)"),
        (dict(experts=X[:0]), "empty trace"),
        (dict(experts=torch.full((3, 2, 1), 16)), "empty trace"),
        (dict(experts=X[0]), "(T, L, K)"),
        (dict(experts=X + 2), "outside 0..16"),
        (dict(experts=torch.zeros(3, 1, 2).long()), "uses an expert twice"),
        (dict(sample=torch.arange(3)), "10 tokens"),
        (dict(sample=torch.arange(10) % 2), "must follow each other"),
        (dict(capacity=2.5), "2.5 is not a whole number"),
        (dict(expert_bytes=-1), "expert_bytes = -1"),
        (dict(num_experts=0), "num_experts = 0"),
    ],
)
def test_bad_input_is_one_clear_error(change, words):
    with pytest.raises(ValueError) as e:
        replay(**{**dict(experts=X, num_experts=16, policy="lru", capacity=6), **change})
    assert words in str(e.value) and len(str(e.value)) < 250


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda r, p: serving_time(r, -1, 1), "bandwidth (GB/s) = -1"),
        (lambda r, p: serving_time(r, 0, 1), "bandwidth (GB/s) = 0"),
        (lambda r, p: serving_time(r, 1, 0), "compute_ms = 0"),
        (lambda r, p: serving_time(r, 1, 1, -1), "latency_ms = -1"),
        (lambda r, p: break_even(r, r, 1), "with a demand replay"),
        (lambda r, p: break_even(r, p, float("nan")), "compute_ms = nan"),
        (lambda r, p: local_consistency(X, 16, 11), "segment (at most the longest sample) = 11"),
        (lambda r, p: local_consistency(X, 16, 4, 17), "capacity = 17"),
    ],
)
def test_bad_links_are_refused(call, words):
    with pytest.raises(ValueError) as e:
        call(replay(X, 16, "lru", 6, predicted=X, prefetch=2), replay(X, 16, "lru", 6))
    assert words in str(e.value)
