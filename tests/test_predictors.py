"""Predictors see what their horizon allows and nothing else, and bad input says so."""

import math

import pytest
import torch
from transformers import OlmoeForCausalLM

from moe_routing.models.load import TinyRecipe, tiny_config, tiny_model
from moe_routing.predictors.baselines import (
    BASELINES,
    COVERAGE,
    HORIZONS,
    Table,
    Tally,
    look,
    make_baselines,
    random_value,
    shift,
    targets,
)
from moe_routing.predictors.evaluate import evaluate_predictors, rank_tokens, tally
from moe_routing.predictors.learned import PREDICTORS, Recipe, make_predictor, make_recipe, train_predictor
from moe_routing.traces.collect import collect
from moe_routing.traces.format import Trace, own_gate

COLUMNS = ("token_id", "experts", "hidden", "pre_attention")


def small_model(layers):
    "A model with random weights that is small enough to be traced in a moment, and the shipped tokenizer."
    recipe = TinyRecipe(hidden=32, intermediate=16, layers=layers, heads=2, num_experts=16, top_k=3)
    torch.manual_seed(0)
    model = OlmoeForCausalLM._from_config(tiny_config(recipe), experts_implementation="ragged")
    return model.eval(), tiny_model()[1]


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    model, tokenizer = small_model(layers=4)
    return collect(
        model,
        tokenizer,
        tmp_path_factory.mktemp("predictors") / "trace",
        datasets="embedded",
        traces=80,
        batch=4,
        max_length=32,
        shard=40,
        keep=("hidden", "pre_attention"),
        split="calibration",
        progress=False,
    )


@pytest.fixture(scope="module")
def batch(trace):
    return next(iter(trace.batches(COLUMNS, batch=6)))


def hide(batch, horizon, t, l):
    "The batch with everything changed that a guess for (t, l) may not see."
    g, other = torch.Generator().manual_seed(1), {k: v.clone() for k, v in batch.items()}

    def scramble(token, layers):
        for c in ("hidden", "pre_attention"):
            other[c][:, token, layers[c]] = torch.randn(other[c][:, token, layers[c]].shape, generator=g)
        e = other["experts"][:, token, layers["experts"]]
        other["experts"][:, token, layers["experts"]] = torch.rand(*e.shape[:-1], 16, generator=g).argsort(-1)[
            ..., : e.shape[-1]
        ]

    own = {
        "own_gate": (l, l + 1, l + 1),
        "pre_attention": (l, l, l + 1),
        "previous_layer": (l, l, l),
        "two_back": (l - 1, l - 1, l - 1),
        "token_id": (0, 0, 0),
        "previous_token": (0, 0, 0),
    }[horizon.name]
    scramble(slice(t, t + 1), dict(zip(("experts", "hidden", "pre_attention"), (slice(i, None) for i in own))))
    scramble(slice(t + 1, None), dict.fromkeys(("experts", "hidden", "pre_attention"), slice(None)))
    other["token_id"][:, t + (horizon.name != "previous_token") :] = 5
    return other


@pytest.mark.parametrize("horizon", HORIZONS.values(), ids=list(HORIZONS))
def test_nothing_hidden_is_seen(trace, batch, horizon):
    t, l = 9, 2
    free, seen = make_baselines(horizon, trace, range(20)), {}
    learned = {
        n: make_predictor(n, horizon, trace, seed=1)
        for n, e in PREDICTORS.items()
        if n not in free and horizon.name in e.horizons and "as_shipped" not in n
    }
    for p in learned.values():
        for w in p.parameters():
            w.data.add_(torch.randn(w.shape, generator=torch.Generator().manual_seed(2)) * 0.05)
    for name, p in {**free, **learned}.items():
        if name == "random" or not p.needs <= horizon.knows:
            continue
        with torch.no_grad():
            a, b = (p.eval()(x)[:, t, l] for x in (batch, hide(batch, horizon, t, l)))
        assert torch.allclose(a, b, atol=1e-5), name
        seen[name] = a
    assert "marginal" in seen and len(seen) > (len(learned) + 2)
    if "token" in horizon.knows:
        assert "token_table" in seen
    cheat = {n: p for n, p in free.items() if not p.needs <= horizon.knows}
    for name, p in cheat.items():  # the test would notice: what is not possible here does react
        if name == "own_gate":
            assert not torch.allclose(p(batch)[:, t, l], p(hide(batch, horizon, t, l))[:, t, l], atol=1e-3)


def test_as_shipped_hybrid_sees_the_future(trace, batch):
    for name, leaks in (("seed_hybrid", False), ("seed_hybrid_as_shipped", True)):
        p = make_predictor(name, "previous_token", trace, width=32).eval()
        later = {k: v.clone() for k, v in batch.items()}
        later["hidden"][:, 12:] += 3
        with torch.no_grad():
            assert ((p(batch) - p(later))[:, :12].abs().max() > 1e-4) == leaks


def test_the_control_is_exact(trace):
    found = evaluate_predictors(trace, "previous_layer", [], progress=False)
    control = found.tallies["own_gate"]
    assert control.value("exact") == 1 and control.value("recall@3") == 1
    rows = found.tallies["random"].tokens.sum()
    assert control.ties < 0.02 * rows and control.tokens.sum() + control.ties == rows  # rounding decides few
    assert found.tallies["stale_gate"].ties == 0
    assert not found.possible["own_gate"] and found.best_trivial() in (
        "bigram_table",
        "token_table",
        "stale_gate",
        "previous_layer_table",
        "previous_token_table",
    )
    assert set(found.tallies) == set(BASELINES)


def test_rows_that_rounding_decides_are_left_out_and_counted(tmp_path):
    model, tokenizer = small_model(layers=2)
    gate = model.model.layers[1].mlp.gate.weight.data
    gate[1] = gate[0]  # two experts with one score: rounding says which of them is chosen
    options = dict(datasets="embedded", traces=40, batch=2, max_length=24, split="calibration", progress=False)
    trace = collect(model, tokenizer, tmp_path / "tied", keep=("hidden",), **options)
    held, control = trace.split()[1], make_baselines("own_gate", trace, range(4))["own_gate"]
    forward = control.forward
    for noise, exact in ((1e-7, True), (1e-2, False)):  # of a matrix product in another shape, and of another gate
        generator = torch.Generator().manual_seed(0)
        control.forward = lambda b: (
            forward(b) * (1 + noise * torch.randn(b["experts"].shape[1], 2, 16, generator=generator))
        )
        found = tally({"own_gate": control}, trace, held)["own_gate"]
        assert found.ties == sum(row["ties"] for row in own_gate(trace, held)) > 0
        assert (found.value("exact") == 1) == exact
    assert all(row["agreement"] == 100 for row in own_gate(trace, held))


def test_differences_with_a_control_that_leaves_rows_out(trace):
    found = evaluate_predictors(trace, "previous_layer", [], progress=False)
    metric = "recall@3"
    before = found.difference("token_table", "own_gate", metric)
    found.tallies["own_gate"].tokens *= 0.5  # as if half the rows of each document had been ties
    found.tallies["own_gate"].sums[metric] *= 0.5
    for one, other in zip(before[:4], found.difference("token_table", "own_gate", metric)[:4]):
        assert one == pytest.approx(other)


def test_tables_know_what_they_count(trace):
    "Where the experts follow from the token id, the token table is right and the previous token is not."
    made = {
        "token": Table(HORIZONS["token_id"], trace, "token"),
        "previous": Table(HORIZONS["token_id"], trace, "previous"),
        "bigram": Table(HORIZONS["token_id"], trace, "bigram"),
    }
    g = torch.Generator().manual_seed(0)
    rule = torch.rand(50, trace.num_layers, 16, generator=g).argsort(-1)[..., :3]

    def text():
        ids = torch.randint(50, (8, 40), generator=g)
        return {"token_id": ids, "experts": rule[ids], "valid": torch.ones(8, 40, dtype=torch.bool)}

    for _ in range(12):
        b = text()
        for p in made.values():
            p.count(b)
    b = text()
    recall = {
        n: (p(b).topk(3).indices[..., None] == b["experts"][..., None, :]).any(-1).float().mean().item()
        for n, p in made.items()
    }
    assert recall["token"] > 0.99 and recall["bigram"] > 0.95 and recall["previous"] < 0.35
    assert torch.allclose(made["token"](b).sum(-1), torch.tensor(3.0), atol=1e-4)


def test_a_full_table_leaves_the_rest_to_the_backoff(trace, batch):
    p = Table(HORIZONS["token_id"], trace, "token")
    p.counts.most = 2
    p.count(batch)
    p.count(batch)
    assert len(p.counts.rows) == 2 and p(batch).isfinite().all()
    strange = {**batch, "token_id": torch.full_like(batch["token_id"], 10**6)}
    assert torch.allclose(p(strange), p.backoff(strange))


def test_adaptive_routing_counts_used_slots_only():
    "A token with fewer experts is judged by its own number."
    t = Tally(1, 8, 3, 1)
    truth = torch.zeros(2, 1, 8, dtype=torch.bool)
    truth[0, 0, 2], truth[1, 0, [1, 4, 5]] = True, True
    scores = torch.zeros(2, 1, 8)
    scores[0, 0, 2], scores[1, 0, [1, 4]], scores[1, 0, 7] = 1, 1, 1
    t.update(scores, truth, torch.zeros(2, dtype=torch.long))
    assert (
        t.value("exact") == 0.5
        and t.value("hit@1") == 1
        and math.isclose(t.value("recall@3"), (1 + 2 / 3) / 2, rel_tol=1e-6)
    )
    experts = torch.tensor([[[[2, 8, 8]], [[4, 1, 5]]]])
    assert torch.equal(targets({"experts": experts}, 8)[0], truth)


def test_sizes_stop_at_the_number_of_experts():
    t = Tally(2, 6, 2, 1)
    assert t.widest == 6 and max(t.sizes) == 6
    assert (
        random_value("recall@30", 2, 6) == 1 and random_value("any@30", 2, 6) == 1 and random_value("all@1", 2, 6) == 0
    )


def test_calibration_notices_a_liar():
    g = torch.Generator().manual_seed(0)
    truth = torch.rand(3000, 1, 10, generator=g) < 0.3
    honest, liar = (Tally(1, 10, 3, 1) for _ in range(2))
    honest.update(
        torch.rand(3000, 1, 10, generator=g), truth, torch.zeros(3000, dtype=torch.long), torch.full((3000, 1, 10), 0.3)
    )
    liar.update(
        torch.rand(3000, 1, 10, generator=g), truth, torch.zeros(3000, dtype=torch.long), torch.full((3000, 1, 10), 0.9)
    )
    assert (
        honest.calibration_error() < 0.02
        and liar.calibration_error() > 0.5
        and liar.brier_score() > honest.brier_score()
    )
    silent = Tally(1, 10, 3, 1)
    silent.update(torch.rand(4, 1, 10), truth[:4], torch.zeros(4, dtype=torch.long))
    assert silent.calibration_error() is None and silent.brier_score() is None


def test_broken_scores_are_counted_not_ranked(trace):
    p = make_predictor("linear", "own_gate", trace)
    p.map.bias.data.fill_(float("nan"))
    found = tally({"it": p}, trace, trace.split()[1])["it"]
    assert found.broken == found.tokens[:, 0].sum() and 0 <= found.value("recall@3") <= 1


def test_training_repeats_and_learns(trace):
    train, held = trace.split()

    def once(seed, name="linear", **recipe):
        p = make_predictor(name, "previous_layer", trace, seed)
        return train_predictor(
            p, trace, train, make_recipe(epochs=3, batch=4, **recipe), held, (1, 3), seed, progress=False
        ), p

    (a, p), (b, q), (c, _) = once(0, "mlp"), once(0, "mlp"), once(1, "mlp")
    assert (
        a["losses"] == b["losses"] != c["losses"]
        and a["losses"][-1] < a["losses"][0]
        and [r["epoch"] for r in a["watched"]] == [1, 3]
    )
    assert (
        torch.equal(p.map.weight, q.map.weight)
        and a["waited"] <= a["seconds"]
        and a["steps"] == 3 * math.ceil(len(train) / 4)
    )
    assert (p.map.weight[0] == 0).all()  # layer 0 has no previous layer and is not trained
    for loss in ("cross_entropy", "ranking"):
        assert once(0, "mlp", loss=loss)[0]["losses"][-1] < once(0, "mlp", loss=loss)[0]["losses"][0]


def test_ranking_loss_by_hand(trace):
    from moe_routing.predictors.learned import LOSSES

    scores, target = torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([[1.0, 0.0, 0.0]])
    pairs = [math.log1p(math.exp(0 - 2)), math.log1p(math.exp(1 - 2))]
    assert math.isclose(LOSSES["ranking"](scores, target).item(), sum(pairs) / 2, rel_tol=1e-6)
    assert math.isclose(
        LOSSES["cross_entropy"](torch.zeros(1, 60), torch.eye(60)[:1]).item(), math.log(60), rel_tol=1e-6
    )
    four = torch.zeros(1, 60)
    four[0, :4] = 1
    assert math.isclose(
        LOSSES["cross_entropy"](four * 50, four).item(), math.log(4), rel_tol=1e-5
    )  # the floor of the seed's loss


def test_the_seed_protocol_takes_layers_one_at_a_time(trace):
    train, held = trace.split()
    recipe = make_recipe("seed", epochs=1, batch=8)
    log = train_predictor(
        make_predictor("seed_simple", "own_gate", trace, width=16), trace, train, recipe, progress=False
    )
    assert log["steps"] == math.ceil(len(train) * trace.num_layers / 8) and PRESETS_OF_THE_SEED == (
        recipe.lr,
        recipe.weight_decay,
        recipe.length,
        recipe.group,
        recipe.loss,
    )
    with pytest.raises(ValueError, match="weights for each layer"):
        train_predictor(make_predictor("linear", "own_gate", trace), trace, train, recipe, progress=False)
    with pytest.raises(ValueError, match="looks across layers"):
        train_predictor(make_predictor("seed_simple", "previous_layer", trace), trace, train, recipe, progress=False)


PRESETS_OF_THE_SEED = (5e-5, 0.01, 128, 4, None)


def test_ranked_guesses_follow_the_rows(trace):
    free, held = make_baselines("two_back", trace, range(10)), trace.split()[1]
    ranked = rank_tokens(free["own_gate"], trace, held, 3)
    batches = list(trace.batches(("experts", "hidden"), samples=held))
    rows = torch.cat([b["experts"][b["valid"]] for b in batches])[:, 2:]
    decided = ~torch.cat([free["own_gate"].ties(b)[b["valid"]] for b in batches])[:, 2:]
    same = (ranked[:, 2:].long().sort(-1).values == rows.sort(-1).values).all(-1)
    assert same[decided].all() and decided.float().mean() > 0.98
    assert (ranked[:, :2] == 16).all() and ranked.dtype == torch.int16


def test_nan_in_hidden_states_stops_the_training(trace, monkeypatch):
    train, real = trace.split()[0], Trace.batches

    class Damaged:
        def __init__(self, inner):
            self.inner = inner

        def __len__(self):
            return len(self.inner)

        def __getattr__(self, name):
            return getattr(self.inner, name)

        def __iter__(self):
            for b in self.inner:
                if "hidden" in b:
                    b["hidden"][0, 0] = float("nan")
                yield b

    monkeypatch.setattr(Trace, "batches", lambda self, *a, **k: Damaged(real(self, *a, **k)))
    p = make_predictor("seed_simple", "own_gate", trace, width=16)
    with pytest.raises(FloatingPointError, match="step 1.*lower lr"):
        train_predictor(p, trace, train, make_recipe(epochs=1), progress=False)
    log = train_predictor(p, trace, train, make_recipe(epochs=1, on_nan="skip"), progress=False)
    assert log["skipped"] == log["steps"] and log["losses"] == [None]


@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda t: random_value("precision@3", 2, 8), "unknown metric"),
        (lambda t: make_predictor("oracle", "own_gate", t), "unknown predictor 'oracle'"),
        (lambda t: make_predictor("linear", "tomorrow", t), "unknown horizon 'tomorrow'"),
        (lambda t: make_predictor("linear", "token_id", t), "not for horizon 'token_id'"),
        (lambda t: make_predictor("token_embedding", "previous_token", t), "not for horizon 'previous_token'"),
        (lambda t: make_predictor("mlp", "own_gate", t, depth=3), "predictor 'mlp'.*depth"),
        (lambda t: make_predictor("low_rank", "own_gate", t, rank=99), r"rank = 99 is outside \[1, 32\]"),
        (lambda t: make_predictor("mlp", "own_gate", t, width=0), "width = 0"),
        (lambda t: make_predictor("history", "own_gate", t, memory=30), "memory = 30 is not a multiple"),
        (lambda t: make_predictor("seed_hybrid", "own_gate", t, width=30), "width = 30 is not a multiple"),
        (lambda t: make_recipe("fast"), "unknown preset 'fast'"),
        (lambda t: make_recipe(speed=1), "unknown field of Recipe 'speed'"),
        (lambda t: Recipe(lr=0), "lr = 0 is outside"),
        (lambda t: Recipe(epochs=0), "epochs = 0"),
        (lambda t: Recipe(loss="mse"), "unknown loss 'mse'"),
        (lambda t: look({"experts": None}, HORIZONS["pre_attention"]), "record the trace with keep="),
        (lambda t: look({}, HORIZONS["token_id"]), "sees token ids only"),
        (lambda t: tally({}, t, [0]), "no predictor"),
        (lambda t: evaluate_predictors(t, "own_gate", split=([0], [])), "0 to judge by"),
        (
            lambda t: rank_tokens(make_predictor("linear", "own_gate", t), t, [0], 17),
            r"guesses = 17 is outside \[1, 16\]",
        ),
    ],
)
def test_bad_input_says_what_is_wrong(trace, wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong(trace)


def test_a_trace_without_hidden_states_still_gives_tables(tmp_path):
    model, tokenizer = small_model(layers=2)
    bare = collect(
        model,
        tokenizer,
        tmp_path / "bare",
        datasets="embedded",
        traces=40,
        batch=2,
        max_length=24,
        keep=(),
        split="calibration",
        progress=False,
    )
    found = evaluate_predictors(bare, "token_id", ["token_embedding"], make_recipe(epochs=1), progress=False)
    assert "own_gate" not in found.tallies and {"token_table", "token_embedding", "previous_token"} <= set(
        found.tallies
    )
    with pytest.raises(ValueError, match="needs hidden states"):
        make_predictor("linear", "own_gate", bare)


def test_shift_by_more_than_there_is():
    x = torch.ones(2, 3, 1)
    assert torch.equal(shift(x, 5, 1), torch.zeros_like(x)) and torch.equal(shift(x, 0, 1), x)
    assert COVERAGE == (1, 3, 5, 8, 10, 12, 15, 20, 25, 30)


def test_from_a_checkpoint_in_four_bits_to_the_table(tmp_path):
    "The documented way for Qwen1.5-MoE on a small model of its class: quantise, collect, keep the control, predict."
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    from moe_routing.models.load import load_model

    _, tokenizer = tiny_model()
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts=12,
        num_experts_per_tok=4,
    )
    Qwen2MoeForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    model, tokenizer = load_model(str(tmp_path / "model"), quantize="4bit", dtype="float32")
    trace = collect(
        model,
        tokenizer,
        tmp_path / "trace",
        datasets="embedded",
        traces=45,
        batch=4,
        max_length=32,
        shard=30,
        keep=("hidden", "pre_attention"),
        split="calibration",
        progress=False,
    )
    found = evaluate_predictors(trace, "pre_attention", ["linear"], make_recipe(epochs=2), progress=False)
    assert found.value("own_gate", "exact", slice(None)) == 1 and trace.head["family"] == "qwen2_moe"
    assert found.value("linear", "recall@4") > found.value("random", "recall@4") + 0.05
