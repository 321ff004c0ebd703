"""Analyses of section 5.6 of seed 001: each finds what was planted, and finds nothing where nothing is."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from moe_routing.analysis.tokens import (
    Choices,
    _direction,
    _random_like,
    _spread,
    boundary_jumps,
    change_numbers,
    draw_change,
    draw_flow,
    draw_landscape,
    draw_map,
    draw_positions,
    expert_keywords,
    expert_map,
    expert_samples,
    expert_vectors,
    flow_numbers,
    gradient_flow,
    jump_numbers,
    loss_landscape,
    loss_plane,
    position_heatmap,
    read_choices,
    router_parameters,
    routing_change,
    swap_last,
    token_spans,
    token_words,
    watch,
    window_losses,
)
from moe_routing.core import Router, Routing
from moe_routing.models.load import make_tokenizer
from moe_routing.patching.patch import families, tiny_family
from moe_routing.routers.zoo import make_router, make_rule
from moe_routing.traces.recorder import record
from moe_routing.training.loop import Recipe, TrainingText, char_tokenizer, prepare, unmount

TEXT = "The naïve café — where 数学 and müsli meet! Don't 42 times…\n\tDone.  Привет, мир 🙂 end"


def seeded(n=0):
    return torch.Generator().manual_seed(n)


@cache
def model():
    return tiny_family("olmoe", families()["olmoe"])


@cache
def ids(n=6, s=24):
    return torch.randint(3, 90, (n, s), generator=seeded(1))


@cache
def text():
    "A text of four words, so that words are known."
    sentences = [
        " ".join(("red", "green", "blue", "black")[i] for i in torch.randint(4, (12,), generator=seeded(n)).tolist())
        for n in range(60)
    ]
    tokenizer = char_tokenizer(sentences)
    rows = [tokenizer(s)["input_ids"] + [tokenizer.eos_token_id] for s in sentences]
    flat = torch.tensor([i for r in rows for i in r])
    return TrainingText("words", tokenizer, rows, flat[: len(flat) // 16 * 16].view(-1, 16)[:24])


def started(router="softk", **changes):
    params = (
        dict(
            capacity_factor=None,
            k=2,
            num_experts=4,
            hidden=16,
            layers=2,
            heads=2,
            intermediate=16,
            length=16,
            batch=4,
            steps=8,
        )
        | changes
    )
    return prepare(Recipe(router=router, **params), text(), cpu=True)


def ended(run):
    run.patch.__exit__(None, None, None)
    unmount(run.bare)
    return run.bare.eval(), [r.eval() for r in run.meter.routers]


def made(first, token_id=None, length=20, others=()):
    "Choices of one layer (or more) from chosen experts."
    T = len(first)
    at = torch.arange(T)
    experts = torch.stack([first, *others], 1)[..., None]
    return Choices(
        torch.zeros(T, dtype=torch.long) if token_id is None else token_id,
        at % length,
        at // length,
        experts,
        int(experts.max()) + 1,
    )


# tokens and words


@pytest.mark.parametrize(
    "tokenizer",
    [make_tokenizer([], 257), make_tokenizer([TEXT] * 3, 300), char_tokenizer([TEXT])],
    ids=["byte", "bpe", "char"],
)
def test_spans_rebuild_the_text(tokenizer):
    found = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    back, spans = token_spans(found, tokenizer)
    assert back == TEXT and len(spans) == len(found)
    distinct = list(dict.fromkeys(spans))
    assert (
        all(a < b for a, b in distinct) and "".join(back[a:b] for a, b in distinct) == TEXT
    )  # they tile it, without gap or overlap
    words = token_words(found, tokenizer)
    assert {"naïve", "café", "数学", "müsli", "привет", "🙂", "42", "⏎"} <= set(words) and len(words) == len(found)
    order = [w for i, w in enumerate(words) if w not in "␣⏎" and words[i - 1 : i] != [w]]
    assert order[:9] == ["the", "naïve", "café", "—", "where", "数学", "and", "müsli", "meet"]


def test_special_tokens_end_words_and_a_cut_character_is_survived():
    tokenizer = make_tokenizer([], 257)
    a, end, e = tokenizer("a")["input_ids"][0], tokenizer.eos_token_id, tokenizer("é")["input_ids"]
    assert token_words([a, end, a], tokenizer) == ["a", "⏎", "a"]
    back, spans = token_spans([a, e[0]], tokenizer)  # the second byte is missing
    assert len(spans) == 2 and back[0] == "a" and token_words([], tokenizer) == []


# what was chosen


def test_a_trace_and_a_watched_model_agree_with_padding(tmp_path):
    mask = torch.ones_like(ids())
    mask[1, :5] = mask[3, :11] = 0  # padded on the left
    rule, batches = (
        make_rule("top_p", p=0.5),
        [{"input_ids": ids()[i : i + 2], "attention_mask": mask[i : i + 2]} for i in (0, 2, 4)],
    )
    seen, trace = (
        watch(model(), batches, rule),
        read_choices(record(model(), batches, tmp_path, rule=rule, shard_tokens=30)),
    )
    assert all(
        torch.equal(getattr(seen, n), getattr(trace, n)) for n in ("token_id", "position", "sequence", "experts")
    )
    assert len(seen.token_id) == int(mask.sum()) and seen.sequence.bincount().tolist() == mask.sum(1).tolist()
    assert all((seen.position[seen.sequence == s] == torch.arange(n)).all() for s, n in enumerate(mask.sum(1).tolist()))
    assert read_choices(seen) is seen


def test_a_generated_trace_is_put_in_order(tmp_path):
    trace = record(
        model(),
        [{"input_ids": ids(2, 4)}],
        tmp_path,
        generate={"max_new_tokens": 4, "do_sample": False, "eos_token_id": None},
    )
    seen = read_choices(trace)
    assert seen.sequence.tolist() == sorted(seen.sequence.tolist()) and all(
        seen.position[seen.sequence == s].diff().eq(1).all() for s in (0, 1)
    )
    assert len(read_choices(trace, tokens=5).token_id) == 5


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: read_choices([1]), "Trace or Choices"),
        (lambda: watch(model(), []), "no token"),
        (lambda: made(torch.zeros(4, dtype=torch.long)).first(3), "layer = 3"),
        (lambda: expert_keywords(made(torch.tensor([0, 1])), char_tokenizer(["ab"]), 0), "least = 3"),
        (lambda: expert_keywords(made(torch.tensor([0, 1])), None, 0, draws=1), "draws = 1"),
        (lambda: position_heatmap(made(torch.tensor([0, 1]), length=1), 0), "one token"),
        (lambda: position_heatmap(made(torch.tensor([0, 1])), 0, bins=1), "bins = 1"),
        (lambda: expert_map(torch.randn(3, 4)), "number of experts"),
        (lambda: expert_map(torch.randn(6, 4), perplexity=6), "perplexity = 6"),
        (lambda: expert_map(torch.randn(6)), "must be"),
        (lambda: expert_map(torch.full((6, 2), float("nan"))), "NaN"),
        (lambda: expert_vectors(model(), "gates"), "did you mean"),
        (lambda: expert_vectors(model(), layer=9), "layer = 9"),
        (lambda: expert_vectors(model(), "representation", rule=make_rule("topk", k=2)), "needs windows"),
        (
            lambda: expert_vectors(model(), "representation", rule=make_rule("topk", k=2), windows=ids()),
            "no expert representations",
        ),
        (lambda: routing_change(made(torch.tensor([0, 1]))), "number of layers = 1"),
        (lambda: loss_plane(model(), ids(), None, router_parameters(model()), points=4), "points = 4"),
        (lambda: loss_plane(model(), ids(), None, router_parameters(model()), axes=3), "number of axes"),
        (lambda: loss_plane(model(), ids(), None, [], radius=0), "radius = 0"),
        (lambda: boundary_jumps(model(), ids(), layers=[7]), "layer = 7"),
        (lambda: boundary_jumps(model(), ids(), make_rule("dense")), "no decision could be swapped"),
        (lambda: gradient_flow(None, 0), "count = 0"),
    ],
)
def test_bad_input_is_refused(call, words):
    with pytest.raises((ValueError, TypeError), match=words):
        call()


@pytest.mark.parametrize("call", [lambda m: watch(m, [ids()]), lambda m: window_losses(m, ids())])
def test_a_model_in_training_is_refused(call):
    m = tiny_family("olmoe", families()["olmoe"]).train()
    with pytest.raises(ValueError, match="eval"):
        call(m)


# keywords and samples


def test_planted_keywords_are_found_and_random_ones_are_not():
    tokenizer, flat = text().tokenizer, torch.tensor([i for row in text().train for i in row])
    spoken = token_words(flat.tolist(), tokenizer)
    owner = torch.tensor([("red", "green", "blue").index(w) if w in ("red", "green", "blue") else 3 for w in spoken])
    found = expert_keywords(made(owner, flat, 10**6), tokenizer, 0, top=2)
    best = {r["expert"]: r["word"] for r in reversed(found["rows"])}
    assert (
        {e: best[e] for e in range(3)} == {0: "red", 1: "green", 2: "blue"}
        and found["above"] > 0.8
        and found["p"] < 0.05
    )
    row = next(r for r in found["rows"] if r["word"] == "red")
    assert row["tokens"] == spoken.count("red") and row["lift"] == pytest.approx(len(spoken) / spoken.count("red"))
    values = [
        expert_keywords(
            made(torch.randint(4, (len(flat),), generator=seeded(s)), flat, 10**6),
            tokenizer,
            0,
            top=3,
            draws=9,
            generator=seeded(s),
        )
        for s in range(12)
    ]
    assert (
        abs(np.mean([v["above"] - v["above_shuffled"] for v in values])) < 0.1
        and min(v["p"] for v in values) > 0
        and np.mean([v["p"] < 0.2 for v in values]) < 0.6
    )


def test_keywords_are_those_of_scikit_learn():
    from sklearn.feature_extraction.text import TfidfVectorizer

    tokenizer, flat = text().tokenizer, torch.tensor([i for row in text().train[:5] for i in row])
    first, spoken = torch.arange(len(flat)) % 3, token_words(flat.tolist(), tokenizer)
    vectoriser = TfidfVectorizer(token_pattern=r"\S+", lowercase=False)
    score = vectoriser.fit_transform([" ".join(w for w, e in zip(spoken, first) if e == k) for k in range(3)]).toarray()
    for r in expert_keywords(made(first, flat, 10**6), tokenizer, 0, least=1)["rows"]:
        assert r["score"] == pytest.approx(score[r["expert"], vectoriser.vocabulary_[r["word"]]])


def test_an_expert_without_tokens_and_a_token_without_expert():
    flat = torch.tensor(text().train[0])
    first = torch.where(
        torch.arange(len(flat)) % 5 == 0, 4, torch.arange(len(flat)) % 2
    )  # experts 2 and 3 are never chosen, 4 = unused
    choices = replace(made(first, flat, 10**6), num_experts=4)
    assert (
        {r["expert"] for r in expert_keywords(choices, text().tokenizer, 0)["rows"]}
        == {0, 1}
        == {r["expert"] for r in expert_samples(choices, text().tokenizer, 0)}
    )


def test_samples_are_the_experts_own_tokens():
    seen = watch(*[ended(started())[0]], [text().windows])
    for r in expert_samples(seen, text().tokenizer, 1, per_expert=3, width=5):
        at = int(((seen.sequence == r["sequence"]) & (seen.position == r["position"])).nonzero())
        assert int(seen.first(1)[at]) == r["expert"] and r["tokens"] == int((seen.first(1) == r["expert"]).sum())
        before, _, rest = r["context"].partition("⟦")
        marked, _, after = rest.partition("⟧")
        assert marked == (r["token"].replace("\n", "⏎")) and len(before) <= 5 and len(after) <= 5
        assert text().tokenizer.decode([int(seen.token_id[at])]) in (r["token"], "<|end|>")


# position


def test_position_test_keeps_its_level_on_runs_and_finds_what_depends_on_position():
    def runs(seed):
        "Experts in runs of about five tokens: dependent on their neighbours, not on position."
        g = seeded(seed)
        new, fresh = torch.rand(1600, generator=g) < 0.2, torch.randint(4, (1600,), generator=g)
        keep = torch.where(new, torch.arange(1600), 0).cummax(0).values
        return made(fresh[keep], length=40)

    p = [position_heatmap(runs(s), 0, bins=8, draws=39, generator=seeded(s))["p"] for s in range(60)]
    assert np.mean([x <= 0.1 for x in p]) < 0.25 and 0.35 < np.mean(p) < 0.65
    planted = runs(0)
    planted.experts[planted.position < 5] = 0  # the first positions go to one expert
    found = position_heatmap(planted, 0, bins=8, draws=99)
    assert found["p"] == 0.01 and found["explained"] > found["shuffled_95"] and found["rate"][0, 0] == 1


def test_rates_are_counts():
    seen = watch(model(), [ids()], make_rule("top_p", p=0.6))
    found = position_heatmap(seen, 1, bins=5, draws=3)
    for b, (low, high) in enumerate(zip(found["edges"], found["edges"][1:])):
        inside = (seen.position >= low) & (seen.position < high)
        assert np.allclose(found["rate"][:, b], seen.mask(1)[inside].double().mean(0).numpy())
    assert (
        found["edges"][0] == 0
        and found["edges"][-1] == 24
        and position_heatmap(seen, 1, bins=500, draws=1)["rate"].shape[1] == 24
    )


# maps


def test_map_repeats_and_random_vectors_look_random():
    x = torch.randn(6, 40, generator=seeded())
    a, b = expert_map(x, draws=4, maps=1), expert_map(x, draws=4, maps=1)
    assert np.array_equal(a["map"], b["map"]) and a["map"].shape == (6, 2) and a["perplexity"] < 6
    inside = [
        _spread(torch.randn(5, 30, generator=seeded(s)).double())["pca_2"]
        <= np.quantile([_spread(_random_like(x[:5], seeded(100 * s + d)))["pca_2"] for d in range(40)], 0.9)
        for s in range(100)
    ]
    assert 0.8 < np.mean(inside) < 0.98
    low = torch.randn(8, 2, generator=seeded()) @ torch.randn(2, 30, generator=seeded(1))
    found = expert_map(low, maps=1)
    assert found["pca_2"] == pytest.approx(1) and found["pca_2_random_95"] < 0.8


def test_vectors_of_shared_and_own_routers():
    shared = Router(make_rule("topk", k=2), 32, 8)
    assert torch.equal(expert_vectors(model(), "gate", 1, [shared] * 4), shared.weight) and torch.equal(
        expert_vectors(model(), "gate", 1), model().model.layers[1].mlp.gate.weight
    )
    assert len(router_parameters(model(), [shared] * 4)) == 1 and len(router_parameters(model())) == 4


# layers


def test_routing_by_token_alone_is_explained_by_the_token():
    seen = watch(model(), [ids()], make_rule("token_hash", k=1))
    change = routing_change(seen)
    assert np.allclose(change["nmi"], change["nmi_same_token"]) and change["nmi_shuffled"][0, 1] < change["nmi"][0, 1]


def test_aligned_layers():
    first = torch.randint(5, (4000,), generator=seeded())
    other = torch.where(
        torch.rand(4000, generator=seeded(1)) < 0.5, first, torch.randint(5, (4000,), generator=seeded(2))
    )
    change = routing_change(
        made(first, others=[first, other, torch.randint(5, (4000,), generator=seeded(3))]), aligned=True
    )
    assert change["jaccard"][0, 1] == 1 and change["jaccard"][1, 2] == pytest.approx(
        (first == other).double().mean().item()
    )
    assert change["jaccard_shuffled"][0, 1] == pytest.approx(0.2, abs=0.02) and change["nmi"][2, 3] < 0.01
    assert np.allclose(change["transition"].sum(-1), 1) and np.allclose(change["transition"][0], np.eye(5))
    assert set(change_numbers(change)) == {"nmi", "nmi_shuffled", "nmi_same_token", "jaccard", "jaccard_shuffled"}
    assert change_numbers(change)["jaccard_shuffled"] == pytest.approx(0.2, abs=0.02)


# gradients


@pytest.mark.parametrize(
    "router, changes",
    [
        ("softk", {}),
        ("loss_free", {"accumulate": 2}),
        ("token_hash", {}),
        ("topk_aux", {"clip": 0.01}),
        ("spectra", {"match": "width", "router_params": {"router_dim": 4}}),
    ],
)
def test_watching_leaves_training_as_it_is(router, changes, one_thread):
    plain, watched = started(router, **changes), started(router, **changes)
    losses = [plain(i)[0] for i in range(6)]
    rows = gradient_flow(watched, 6, every=2)
    assert [l for l, i in zip(losses, range(6)) if i % 2 == 0] == [r["loss"] for r in rows if r["group"] == "experts"]
    for a, b in (
        (plain.bare.state_dict(), watched.bare.state_dict()),
        *((p.state_dict(), q.state_dict()) for p, q in zip(plain.meter.routers, watched.meter.routers)),
    ):
        assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
    inner = watched.optimizer.optimizer
    assert not inner._optimizer_step_pre_hooks and not inner._optimizer_step_post_hooks
    trainable = sum(p.numel() for p in {id(p): p for p in watched.bare.parameters() if p.requires_grad}.values())
    assert sum(r["parameters"] for r in rows if r["step"] == 0) == trainable
    assert (
        all(r["steady"] <= 1.5 and r["gradient"] >= 0 for r in rows)
        and sum(r["gradient"] ** 2 for r in rows if r["step"] == 0) ** 0.5 <= watched.recipe.clip * 1.001
    )
    for run in (plain, watched):
        ended(run)


def test_update_is_what_changed(one_thread):
    run = started()
    before = [r.weight.detach().clone() for r in run.meter.routers]
    rows = {r["group"]: r for r in gradient_flow(run, 1)}
    moved = torch.cat([(r.weight - b).flatten() for r, b in zip(run.meter.routers, before)]).norm().item()
    size = torch.cat([b.flatten() for b in before]).norm().item()
    assert rows["router"]["update"] == pytest.approx(moved, rel=1e-5) and rows["router"][
        "effective_lr"
    ] == pytest.approx(moved / size, rel=1e-5)
    assert rows["router"]["steady"] == pytest.approx(
        1, rel=0.05
    )  # the first step of Adam has the size of the learning rate everywhere
    assert flow_numbers(list(rows.values()))["effective_lr_router"] == rows["router"]["effective_lr"]
    ended(run)


def test_a_step_that_fails_leaves_no_hook(one_thread):
    run = started()
    with pytest.raises(IndexError):
        gradient_flow(run, 2, first=len(run.batches) - 1)
    assert not run.optimizer.optimizer._optimizer_step_pre_hooks
    ended(run)


# the loss


def test_the_plane_restores_the_model_also_after_an_error():
    bits = [p.detach().clone() for p in model().parameters()]
    plane = loss_plane(model(), ids(), None, router_parameters(model()), points=3)
    assert (
        plane["loss"][1, 1] == plane["centre"] == pytest.approx(float(window_losses(model(), ids()).mean()))
        and plane["low"][1, 1] == plane["high"][1, 1] == 0
    )
    assert (
        plane["changed"][1, 1] == 0 < plane["changed"].max()
        and np.isfinite(plane["loss"]).all()
        and (plane["low"] <= plane["loss"] - plane["centre"] + 1e-12).all()
    )
    with pytest.raises(IndexError):
        loss_plane(model(), torch.full((2, 5), 10**6), None, router_parameters(model()))
    assert all(torch.equal(p, q) for p, q in zip(model().parameters(), bits))


def test_directions_have_the_length_of_rows():
    parameters = [
        torch.nn.Parameter(torch.randn(3, 4, 5)),
        torch.nn.Parameter(torch.randn(7)),
        torch.nn.Parameter(torch.zeros(2, 3)),
    ]
    made_ = _direction(parameters, seeded())
    assert (
        torch.allclose(made_[0].norm(dim=-1), parameters[0].norm(dim=-1)) and not made_[1].any() and not made_[2].any()
    )


@pytest.mark.parametrize("name, params", [("topk", {"k": 2}), ("top_p", {"p": 0.6}), ("topk", {"k": 1})])
def test_swap_takes_the_last_for_the_next(name, params):
    for seed in range(20):
        logits = torch.randn(30, 6, generator=seeded(seed))
        routing, rows = make_rule(name, **params)(logits), torch.rand(30, generator=seeded(seed)) < 0.5
        swapped, gap = swap_last(routing, logits, rows)
        swapped.validate()
        other = swap_last(routing, logits, rows, seeded(seed))[0].validate()
        for t in range(30):
            old, new, drawn = (set(r.experts[t].tolist()) - {6} for r in (routing, swapped, other))
            if not rows[t] or len(old) == 6:
                assert old == new == drawn and gap[t].isnan()
                continue
            last, following = min(old, key=lambda e: logits[t, e]), max(set(range(6)) - old, key=lambda e: logits[t, e])
            assert (
                old - new == {last}
                and new - old == {following}
                and gap[t] == logits[t, last] - logits[t, following] >= 0
            )
            assert old - drawn == {last} and (drawn - old != {following} or len(old) == 5)
        assert torch.equal(swapped.weights, routing.weights)


def test_swap_takes_no_excluded_expert():
    choice = torch.tensor([[2.0, 1.0, -torch.inf, -torch.inf], [3.0, 2.0, 1.0, -torch.inf]])
    routing = Routing(torch.zeros(2, 4), torch.tensor([[0, 1], [0, 1]]), torch.tensor([[0.5, 0.4], [0.5, 0.4]]))
    swapped, gap = swap_last(routing, choice, torch.tensor([True, True]), seeded())
    assert swapped.experts.tolist() == [[0, 1], [0, 2]] and gap[0].isnan()


def test_jumps_are_of_the_swapped_tokens_only():
    "An expert that is the copy of the one it replaces changes nothing."
    m = tiny_family("olmoe", families()["olmoe"])
    with torch.no_grad():
        for layer in m.model.layers:
            for p in layer.mlp.experts.parameters():
                p.copy_(p[:1].expand_as(p).clone())
    rows = boundary_jumps(m, ids())
    assert (
        len(rows) == 4 * 2 * 6
        and max(abs(r["next"]) + abs(r["random"]) for r in rows) < 1e-4
        and all(r["gap"] >= 0 for r in rows)
    )
    again = boundary_jumps(model(), ids())
    assert max(abs(r["next"]) for r in again) > 1e-3 and again == boundary_jumps(model(), ids())
    numbers = jump_numbers(again)
    assert (
        numbers["jump_next"][1] <= numbers["jump_next"][0] <= numbers["jump_next"][2]
        and numbers["n"] == len(again)
        and len(numbers["by_gap"]) == 3
    )
    assert numbers["jump_excess"][0] == pytest.approx(numbers["jump_random"][0] - numbers["jump_next"][0])


# any model


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_every_analysis_of_a_models_own_routing(family):
    m = tiny_family(family, families()[family])
    seen = watch(m, [ids()])
    if seen.num_layers > 1:
        assert np.isfinite(change_numbers(routing_change(seen))["nmi"])
    assert 0 < position_heatmap(seen, 0, draws=9)["p"] <= 1
    assert expert_vectors(m, "weights").shape[0] == expert_vectors(m, "gate").shape[0] == seen.num_experts
    found = loss_landscape(m, ids(), points=3, repeats=1)
    assert np.isfinite(found["plane"]["loss"]).all() and len(found["jumps"]) == 6 * seen.num_layers


def test_a_shared_router_with_a_state():
    "SPECTRA: one object for all layers, whose state flows through them."
    router = make_router("spectra", hidden_size=32, num_experts=8, k=2, num_layers=4, router_dim=4)
    with torch.no_grad():
        router.mean_expression.normal_(generator=seeded())
    rules = [router.eval()] * 4
    seen = watch(model(), [ids()], rules)
    assert set(change_numbers(routing_change(seen, aligned=True))) >= {"jaccard", "jaccard_shuffled"}
    g = expert_vectors(model(), "representation", 1, rules, ids())
    assert g.shape == (8, 4) and torch.allclose(g.norm(dim=1), torch.ones(8), atol=1e-5)
    with pytest.raises(ValueError, match="representation"):
        expert_vectors(model(), "gate", 0, rules)
    assert len(router_parameters(model(), rules)) == len(list(router.parameters()))
    bits = {n: p.detach().clone() for n, p in router.state_dict().items()}
    found = loss_landscape(model(), ids(), rules, points=3, repeats=1)
    assert all(torch.equal(p, bits[n]) for n, p in router.state_dict().items()) and found["router"]["changed"].max() > 0
    assert np.isfinite(found["numbers"]["jump_next"]).all()


def test_figures_are_drawn_and_released():
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    run = started(num_experts=4)
    flow = gradient_flow(run, 3)
    m, routers = ended(run)
    seen = watch(m, [text().windows], routers)
    figs = [
        draw_flow(flow),
        draw_positions({"a": position_heatmap(seen, 0, draws=3)}),
        draw_change(routing_change(seen, draws=2)),
        draw_landscape(loss_landscape(m, text().windows, routers, points=3, repeats=1)),
        draw_map({"gate": expert_map(expert_vectors(m, "gate", 0, routers), draws=2, maps=1)}),
    ]
    for fig in figs:
        fig.canvas.draw()
        plt.close(fig)
