"Section 5.5 on every layer against plain loops, baselines against simulation, padding, unknown facts, bad input."

from itertools import combinations
from math import log

import numpy as np
import pytest
import torch

from moe_routing.capacity import drop_rate, limit, orphan_rate
from moe_routing.core import Context, Routing, order_slots
from moe_routing.metrics.decision import confidence, confidence_seed, confidence_sums
from moe_routing.metrics.load import cv
from moe_routing.metrics.specialisation import (
    expert_overlap,
    random_cosines,
    random_expert_overlap,
    random_similarity,
    similarity_statistics,
    token_sets,
)
from moe_routing.metrics.stability import circle, neighbours, random_overlap_sums, sequential_sums
from moe_routing.metrics.table import LAYERED, METRICS, Tally, per_layer, summarise, tally

UNKNOWN = {
    "expert_overlap",
    "expert_overlap_seed",
    "gram_orthogonality",
    "similarity_abs",
    "similarity_mean",
    "similarity_max",
    "similarity_std",
    "checkpoint_consistency",
    "sequential_overlap",
    "demand_cv",
    "drop_rate",
    "orphan_rate",
}


def made(T, E, K, L=2, seed=0, least=0, R=None):
    "L decisions of `least` to K experts a token, and where their rows come from: sequences of 7, padding among them."
    g, out = torch.Generator().manual_seed(seed), []
    for _ in range(L):
        counts = torch.randint(least, K + 1, (T, 1), generator=g)
        experts = (
            (torch.rand(T, E, generator=g) + torch.linspace(0, 0.5, E))
            .argsort(-1)[:, :K]
            .masked_fill(torch.arange(K) >= counts, E)
        )
        weights = torch.rand(T, K, generator=g) * (experts < E)
        extras = {} if R is None else {"representation": torch.randn(E, R, generator=g)}
        out.append(Routing(torch.randn(T, E, generator=g), *order_slots(experts, weights, E), extras).validate())
    at = torch.arange(T)
    valid = torch.rand(T, generator=g) < 0.8
    position = torch.cat([(v.long().cumsum(0) - 1).clamp(min=0) for v in valid.split(7)])
    return out, Context(
        token_id=torch.randint(0, 30, (T,), generator=g), position=position, sequence=at // 7, valid=valid
    )


def sets(r):
    return [{e for e in row if e < r.num_experts} for row in r.experts.tolist()]


def J(a, b):
    return len(a & b) / len(a | b) if a | b else 1.0


def by_hand(r, before, context, representation):
    "One layer with loops over tokens."
    keep = context.valid.nonzero().squeeze(1).tolist()
    chosen, old, E = sets(r), sets(before), r.num_experts
    seen = [{int(context.token_id[t]) for t in keep if e in chosen[t]} for e in range(E)]
    pairs = list(combinations(range(E), 2))
    near = [(i, j) for i, j in zip(keep, keep[1:]) if context.sequence[i] == context.sequence[j]]
    ours = [J(seen[a], seen[b]) for a, b in pairs if seen[a] and seen[b]]
    g = representation.double() / representation.double().norm(dim=1, keepdim=True)
    G, w = (g @ g.T).numpy(), r.weights.double().numpy()
    off = np.array([G[a, b] for a in range(E) for b in range(E) if a != b])
    mean = lambda x: np.mean(x) if len(x) else None
    share = [w[t][: len(chosen[t])] / w[t].sum() for t in keep if chosen[t]]
    return {
        "tokens": len(keep),
        "unused_expert_rate": np.mean([not s for s in seen]),
        "expert_overlap": mean(ours),
        "expert_overlap_seed": mean([J(seen[a], seen[b]) for a, b in pairs]),
        "gram_orthogonality": 1 - np.linalg.norm(G - np.eye(E)) / (E * 2**0.5) if E > 1 else None,
        "similarity_abs": mean(np.abs(off)),
        "similarity_mean": mean(off),
        "similarity_max": off.max() if len(off) else None,
        "similarity_std": off.std() if len(off) else None,
        "checkpoint_consistency": np.mean([J(chosen[t], old[t]) for t in keep]),
        "sequential_overlap": mean([J(chosen[i], chosen[j]) for i, j in near]),
        "confidence": mean([s.max() for s in share]),
        "confidence_random": mean([1 / len(s) for s in share]),
        "confidence_seed": mean([-(s * np.log(s)).sum() / log(len(s)) for s in share if len(s) > 1]),
    }


@pytest.mark.parametrize(
    "T,E,K,least",
    [(63, 8, 3, 1), (63, 8, 8, 0), (40, 12, 1, 1), (64, 5, 2, 0), (16, 16, 4, 1), (30, 1, 1, 1), (21, 2, 2, 2)],
)
def test_rows_equal_plain_loops(T, E, K, least):
    block, context = made(T, E, K, least=least, R=6)
    before, _ = made(T, E, K, seed=1, least=least)
    rows = per_layer(block, contexts=context, previous=before)
    means = summarise(block, contexts=context, previous=before)
    for l, row in enumerate(rows):
        for name, want in by_hand(block[l], before[l], context, block[l].extras["representation"]).items():
            assert (row[name] is None) == (want is None) and (
                want is None or row[name] == pytest.approx(want, rel=1e-5, abs=1e-6)
            ), (l, name, row[name], want)
            if name in LAYERED:
                assert (
                    means[f"{name}_per_layer"][l] == row[name] if means[f"{name}_per_layer"] else row[name] is None
                ), name
    for name in LAYERED:
        values = [r.get(name) for r in rows]
        if name in METRICS and METRICS[name].level == "model" and None not in values and name != "expert_utilization":
            assert means[name] == pytest.approx(np.mean(values)), name


def test_every_layered_metric_has_its_rows():
    for name in UNKNOWN | {"unused_expert_rate", "served_cv", "confidence", "confidence_seed"}:
        assert METRICS[name].level == "model" and METRICS[f"{name}_per_layer"].level == "layer" and name in LAYERED
        assert (f"{name}_noise" in METRICS) == (LAYERED[name][1] is not None) and (
            METRICS[name].noise_floor is None
        ) == (name in ("drop_rate", "orphan_rate"))
    block, context = made(70, 8, 3, R=6)
    before, _ = made(70, 8, 3, seed=1)
    row = per_layer(
        [limit(r, capacity_factor=1.0) for r in block],
        2,
        contexts=context,
        previous=before,
        second_run=before,
        own_run=before,
    )[0]
    for name, (_, chance) in LAYERED.items():
        assert (
            row[name] is not None
            and (f"{name}_random" in row) == (chance is not None)
            and row.get(f"{name}_random", 0) is not None
        ), name


def test_unknown_facts_are_none():
    block, context = made(40, 8, 3)

    def gone(**more):
        return {
            k for k, v in per_layer(block, native_k=2, **more)[0].items() if v is None and not k.endswith("_random")
        }

    always = {"expert_overlap_score", "overlap_with_own_run"}
    assert gone() == UNKNOWN | always
    assert gone(contexts=Context()) == UNKNOWN | always
    assert (
        gone(contexts=Context(token_id=context.token_id))
        == UNKNOWN - {"expert_overlap", "expert_overlap_seed"} | always
    )
    assert gone(contexts=Context(position=context.position)) == UNKNOWN | always
    assert (
        gone(contexts=Context(position=context.position, sequence=context.sequence))
        == UNKNOWN - {"sequential_overlap"} | always
    )
    for row in per_layer(block):
        assert all(row[f"{n}_random"] is None for n in UNKNOWN if f"{n}_random" in row)
    mixed = tally([block, block], contexts=[context, Context(valid=context.valid)])
    assert mixed.sums["token_sets"] is None is mixed.sums["sequential"] and mixed.tokens == 2 * int(context.valid.sum())
    half = [
        Routing(block[0].logits, block[0].experts, block[0].weights, {"representation": torch.randn(8, 4)}),
        block[1],
    ]
    assert per_layer(half)[0]["gram_orthogonality"] is None


def test_padding_changes_nothing():
    block, context = made(70, 8, 3, R=6)
    before, _ = made(70, 8, 3, seed=1)
    limited = [limit(r, capacity_factor=1.0, valid=context.valid) for r in block]
    other = [
        Routing(
            torch.where(context.valid[:, None], r.logits, 9.0),
            *order_slots(
                torch.where(context.valid[:, None], r.experts, b.experts),
                torch.where(context.valid[:, None], r.weights, b.weights),
                8,
            ),
            r.extras,
        )
        for r, b in zip(limited, before)
    ]
    assert per_layer(limited, 2, contexts=context, previous=before) == per_layer(
        other, 2, contexts=context, previous=before
    )
    nobody = Context(valid=torch.zeros(70, dtype=torch.bool))
    with pytest.raises(ValueError, match="not one token"):
        tally(block, contexts=nobody)
    assert per_layer([block, block], contexts=[Context(), nobody]) == per_layer(block)


def test_blocks_of_whole_sequences_add_up():
    block, context = made(70, 8, 3, R=6)
    before, _ = made(70, 8, 3, seed=1)
    part = lambda keep: (
        lambda b: [r.rows(keep) for r in b],
        Context(**{k: getattr(context, k)[keep] for k in ("token_id", "position", "sequence", "valid")}),
    )
    vectors = [r.extras["representation"] for r in block]
    whole, t = tally(block, contexts=context, previous=before), Tally()
    for keep in (context.sequence < 4, context.sequence >= 4):
        rows, where = part(keep)
        t.update(rows(block), contexts=where, previous=rows(before), representations=torch.stack(vectors))
    a, b = per_layer(whole), per_layer(t)
    for x, y in zip(a, b):
        for name in x:
            if name not in ("sequential_overlap_random", "checkpoint_consistency_random"):
                assert x[name] == pytest.approx(y[name]), name  # those pair tokens inside a block
    assert (t.sums["token_sets"].occurrences == whole.sums["token_sets"].occurrences).all()


def test_neighbours_never_cross():
    c = lambda position, sequence, valid=None: neighbours(
        Context(
            position=torch.tensor(position),
            sequence=torch.tensor(sequence),
            valid=None if valid is None else torch.tensor(valid),
        )
    ).tolist()
    assert c([0, 1, 2, 0, 1], [0, 0, 0, 1, 1]) == [True, True, False, True]  # two sequences
    assert c([0, 1, 2, 3], [0, 0, 1, 1]) == [True, False, True]  # positions that go on by accident
    assert c([0, 1, 0, 1], [0, 0, 0, 0]) == [True, False, True]  # two documents packed into one row
    assert c([0, 0, 0, 1], [0] * 4, [False, False, True, True]) == [False, False, True]  # padding on the left
    assert c([0, 1, 1, 1], [0] * 4, [True, True, False, False]) == [True, False, False]  # padding on the right
    assert c([], []) == [] == c([3], [0])
    one = Routing(torch.zeros(1, 4), torch.tensor([[1]]), torch.ones(1, 1))
    row = per_layer([one], contexts=Context(position=torch.tensor([5]), sequence=torch.tensor([0])))[0]
    assert (
        row["sequential_overlap"] is None is row["sequential_overlap_random"]
    )  # a step of generation has no neighbour


def test_random_pairs_are_of_different_tokens():
    for T in (0, 1, 2, 3, 50):
        a, b = circle(T)
        assert (
            len(a) == (T if T > 1 else 0)
            and not (a == b).any()
            and sorted(a.tolist()) == sorted(b.tolist()) == list(range(len(a)))
        )
    state = torch.get_rng_state()
    circle(100)
    assert torch.equal(state, torch.get_rng_state())


def drawn(T, E, k, skew, seed):
    g = torch.Generator().manual_seed(seed)
    gumbel = -(-torch.rand(T, E, generator=g).log()).log()
    w, e = (gumbel + torch.linspace(0, skew, E)).softmax(-1).topk(k)
    return Routing(torch.zeros(T, E), e, w)


@pytest.mark.parametrize("E,k,skew", [(8, 1, 0.0), (16, 2, 0.0), (8, 4, 0.0), (16, 2, 1.5), (8, 8, 0.0)])
def test_random_routing_reads_its_baselines(E, k, skew):
    T, g = 6000, torch.Generator().manual_seed(5)
    ids = (torch.rand(T, generator=g) ** 3 * 400).long()
    context = Context(token_id=ids, position=torch.arange(T) % 50, sequence=torch.arange(T) // 50)
    now, before = [drawn(T, E, k, skew, 1)], [drawn(T, E, k, skew, 2)]
    row = per_layer(now, contexts=context, previous=before)[0]
    for name in ("checkpoint_consistency", "sequential_overlap", "expert_overlap", "expert_overlap_seed"):
        assert row[name] == pytest.approx(row[f"{name}_random"], abs=0.012), (name, row[name], row[f"{name}_random"])


def test_baselines_tell_structure_from_loads():
    T, E, V = 4000, 16, 200
    ids = torch.randint(0, V, (T,), generator=torch.Generator().manual_seed(3))
    hashed = [Routing(torch.zeros(T, E), (ids % E)[:, None], torch.ones(T, 1))]
    context = Context(token_id=ids, position=torch.arange(T), sequence=torch.zeros(T))
    row = per_layer(hashed, contexts=context, previous=hashed)[0]
    assert (
        row["expert_overlap"] == 0 < 0.4 < row["expert_overlap_random"]
        and row["checkpoint_consistency"] == 1
        and row["checkpoint_consistency_random"] < 0.1
    )


def test_gold_vectors_of_gram_orthogonality():
    for R, want in ((128, 0.938), (256, 0.956), (32, 0.876)):
        assert random_similarity(32, R)[0] == pytest.approx(want, abs=1.5e-3)
    assert similarity_statistics(torch.zeros(128, 8))[0] == pytest.approx(0.9375)
    assert similarity_statistics(torch.ones(32, 4))[0] == pytest.approx(0.304, abs=1e-3)
    g = torch.Generator().manual_seed(0)
    for E, R in ((2, 1), (2, 3), (4, 1), (8, 16), (64, 32), (32, 256), (48, 200)):
        direct = np.mean(
            [similarity_statistics(torch.randn(E, R, generator=g)) for _ in range(1500 if E < 32 else 100)], 0
        )
        assert np.allclose(direct, random_similarity(E, R), atol=0.06 if E < 8 else 0.01), (
            E,
            R,
            direct,
            random_similarity(E, R),
        )
    assert np.allclose(random_cosines(6, 12, 4000, np.random.default_rng(1)).std(), 12**-0.5, rtol=0.02)
    block, _ = made(20, 8, 2)
    flat = per_layer(block, representations=torch.randn(2, 8, 128, generator=g))[0]
    assert flat["gram_orthogonality_random"] == pytest.approx(random_similarity(8, 128)[0])


def test_similarity_does_not_depend_on_length_and_keeps_records_with_as_many_tokens_as_experts():
    block, context = made(8, 8, 2, R=8)  # T = E: a cut of rows must not cut the expert vectors
    row = per_layer(block, contexts=context)[0]
    scaled = [
        Routing(r.logits, r.experts, r.weights, {"representation": 7 * r.extras["representation"]}) for r in block
    ]
    assert not context.valid.all() and row["similarity_max"] == pytest.approx(
        per_layer(scaled, contexts=context)[0]["similarity_max"]
    )


@pytest.mark.parametrize("factor,by", [(1.0, "position"), (0.5, "score"), (None, "position")])
def test_demand_and_refusals(factor, by):
    block, context = made(70, 8, 3, least=1)
    limited = [limit(r, factor, by=by, valid=context.valid) for r in block]
    rows = per_layer(limited, contexts=context)
    for r, l, row in zip(block, limited, rows):
        assert (
            row["demand_cv"] == pytest.approx(float(cv(r.rows(context.valid).load)))
            and row["served_cv"] == pytest.approx(float(cv(l.load))) == row["load_cv"]
        )
        assert row["drop_rate"] == pytest.approx(drop_rate(l)) and row["orphan_rate"] == pytest.approx(orphan_rate(l))
    assert (rows[0]["drop_rate"] > 0) == (factor is not None)


def test_confidence_at_its_ends():
    k1 = [Routing(torch.zeros(4, 3), torch.tensor([[0], [1], [2], [3]]), torch.tensor([[1.0], [0.5], [0.2], [0]]))]
    sums = confidence_sums(k1)
    assert confidence(sums)[0] == 1 and np.isnan(confidence_seed(sums)[0])
    none = [Routing(torch.zeros(2, 3), torch.full((2, 2), 3), torch.zeros(2, 2))]
    assert np.isnan(confidence(confidence_sums(none))[0])
    weightless = [Routing(torch.zeros(1, 3), torch.tensor([[0, 1]]), torch.zeros(1, 2))]
    assert confidence(confidence_sums(weightless))[0] == 0.5 and confidence_seed(confidence_sums(weightless))[
        0
    ] == pytest.approx(1)
    slotless = [Routing(torch.zeros(2, 3), torch.zeros(2, 0, dtype=torch.long), torch.zeros(2, 0))]
    assert np.isnan(confidence(confidence_sums(slotless))[0])


def test_numbers_of_the_definitions():
    ids, E = torch.arange(3000), 32
    block = [drawn(3000, E, 4, 0.0, 1)]
    overlap = expert_overlap(token_sets(block, ids), 0)[0]
    p2 = 4 * 3 / (32 * 31)  # a token's experts differ: a little below (k/E) / (2 - k/E)
    assert (
        overlap
        == pytest.approx(p2 / (2 * 4 / 32 - p2), abs=0.004)
        == pytest.approx(
            random_expert_overlap(block[0].load.numpy(), np.bincount([4] * 3000, minlength=33), np.ones(3000, int))[0],
            abs=0.004,
        )
    )
    assert overlap < (4 / 32) / (2 - 4 / 32)
    dead = [Routing(torch.zeros(10, 4), torch.zeros(10, 1, dtype=torch.long), torch.ones(10, 1))]
    ours, seed = expert_overlap(token_sets(dead, torch.arange(10)), 0)
    assert np.isnan(ours) and seed == 0.5  # one used expert has no pair; the seed counts pairs of unused ones as equal


@pytest.mark.parametrize(
    "options,message",
    [
        (dict(contexts=Context(token_id=torch.arange(3))), "token_id has 3 rows, the block has 5"),
        (dict(contexts=Context(valid=torch.ones(6).bool())), "valid has 6 rows"),
        (dict(contexts=[]), "different numbers of blocks"),
        (dict(representations=torch.zeros(2, 7, 3)), "E = 8"),
        (dict(representations=torch.zeros(3, 8, 3)), "2 layers"),
        (dict(representations=[torch.zeros(8), torch.zeros(8)]), r"one \(E, R\)"),
        (dict(representations=torch.full((2, 8, 3), float("nan"))), "NaN"),
        (dict(previous=made(4, 8, 2)[0]), "does not match"),
        (dict(previous=[made(5, 8, 2)[0]] * 2), "different numbers of blocks"),
    ],
)
def test_bad_input_gets_one_clear_error(options, message):
    with pytest.raises(ValueError, match=message):
        summarise(made(5, 8, 2)[0], **options)


def test_a_tally_is_finished():
    block, context = made(5, 8, 2)
    with pytest.raises(ValueError, match="finished Tally"):
        per_layer(tally(block), contexts=context)
    t = Tally().update(block, representations=torch.randn(2, 8, 3))
    with pytest.raises(ValueError, match="width 4, those of earlier blocks were 3"):
        t.update(block, representations=torch.randn(2, 8, 4))


def test_neither_gradients_nor_the_random_state_matter():
    block, context = made(40, 8, 3, R=6)
    live = [
        Routing(
            r.logits.requires_grad_(),
            r.experts,
            r.weights.requires_grad_(),
            {"representation": r.extras["representation"].requires_grad_()},
        )
        for r in block
    ]
    state = torch.get_rng_state()
    assert per_layer(live, contexts=context, previous=live) == per_layer(
        block, contexts=context, previous=block
    ) and torch.equal(state, torch.get_rng_state())
    assert (
        np.allclose(random_overlap_sums(block, block), random_overlap_sums(block, block))
        and sequential_sums(block, Context(position=context.position)) is None
    )
