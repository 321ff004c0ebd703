"""What a prediction study is judged by, on made-up runs whose truth is known: every verdict comes out each way, pairing
refuses other documents, and what has not converged decides nothing."""

import numpy as np
import pandas as pd
import pytest

from moe_routing.predictors.baselines import COVERAGE, HORIZONS, random_value
from moe_routing.runs.study import plan_study
from moe_routing.settings import find_root
from moe_routing.stats import clustered_difference
from moe_routing.studies import prediction as report

FREE = {"marginal": 0.2, "token_table": 0.5, "own_gate": (1.0, 1.0)}
CONTROLS = ("random", *FREE)
NEEDS = {"token_table": "token", "own_gate": "own"}
QWEN, CARD = "Qwen/Qwen1.5-MoE-A2.7B", ["NVIDIA GeForce RTX 3090"]
TRACE = {"fingerprint": "f", "k": 4, "num_experts": 60, "num_layers": 4, "seed_traces": 5000}


def made_up(rows, documents=40, spread=0.01, model="tiny", rng=None):
    "Runs with planted slot recall, or (slot recall, hit@1). Rows: group, horizon, scores, and what differs."
    rng = rng or np.random.default_rng(0)
    size = rng.integers(60, 200, documents) * 3.0
    return pd.DataFrame([one_run(i, row, size, spread, model, rng) for i, row in enumerate(rows)])


def one_run(i, row, size, spread, model, rng):
    "A run as `load_runs` gives it."
    scores = {n: v if isinstance(v, tuple) else (v, min(1.0, 1.2 * v)) for n, v in row["scores"].items()}
    scores = {"random": (4 / 60, 4 / 60), **scores}
    possible = {n: n not in NEEDS or NEEDS[n] in HORIZONS[row["horizon"]].knows for n in scores}
    trained = [n for n in scores if n not in CONTROLS]
    hard = rng.normal(0, spread, len(size))  # a document is hard for everybody

    def summed(share):
        own = rng.normal(0, spread / 4, len(size))
        return size * np.clip(share + hard + own, 0, 1) if share < 1 else 1.0 * size

    sums, firsts = {n: summed(v[0]) for n, v in scores.items()}, {n: summed(scores[n][1]) for n in trained}
    recall = {n: float(v.sum() / size.sum()) for n, v in sums.items()}
    hit = {n: float(firsts[n].sum() / size.sum()) if n in trained else scores[n][1] for n in scores}
    table = [table_row(n, recall[n], hit[n], possible[n], spread) for n in scores]
    free = max((n for n in scores if n in CONTROLS and n != "own_gate" and possible[n]), key=lambda n: scores[n][0])
    gains = {n: {"against": free, **clustered_difference(sums[n], sums[free], size)._asdict()} for n in trained}
    coverage = [{"m": m, **{w: 0.5 for w in ("recall", "all", "any")}} for m in COVERAGE]
    coverage = [
        {**r, **{f"{w} by chance": random_value(f"{w}@{r['m']}", 4, 60) for w in ("recall", "all", "any")}}
        for r in coverage
    ]
    flat = [(2, 0.4), (6, 0.499), (8, 0.5)]
    watched = [{"epoch": e, "hit@1": v, "any@5": v, "recall@4": v} for e, v in row.get("watched", flat)]
    training = {n: {"seconds": row.get("seconds", 60.0), "waited": 0.5, "watched": watched} for n in trained}
    recipe = {"lr": 5e-5, "epochs": 20, "batch": 8, "group": 4, **row.get("recipe", {})}
    notes = {"trivial": free, "table": table, "layer0": table, "gains": gains, "training": training, "recipe": recipe}
    notes |= {"by_layer": [{"predictor": n, "layer 1": r} for n, r in recall.items()], "confused": []}
    notes |= {"coverage": dict.fromkeys([*trained, free], coverage), "replay": row.get("replay", [])}
    about = {n: row.get(n) for n in ("group", "horizon", "preset", "predictors", "shard")}
    documents = {**{n: v.tolist() for n, v in sums.items()}, **{f"hit@1 {n}": v.tolist() for n, v in firsts.items()}}
    documents |= {"document": list(range(len(size))), "token_layers": size.tolist()}
    more = {"run": f"run{i}", "seed": 0, "devices": row.get("devices", ["cpu"])}
    return {**more, **about, "notes": {**notes, "trace": {**TRACE, "model": model}}, "documents": documents}


def table_row(name, recall, hit, possible, spread):
    "A row of the table of a run."
    wide = {f"recall@{4 * m}": min(1.0, m * recall) for m in (1, 2, 4)}
    row = {
        "predictor": name,
        "possible": possible,
        "hit@1": hit,
        "low": recall - spread,
        "high": min(1.0, recall + spread),
    }
    return {**row, **wide, "exact": recall**4, "any@5": hit, "any@5 by chance": 0.3, "calibration error": None}


def horizon(name, group="horizons", watched=None, **scores):
    row = {"group": group, "horizon": name, "scores": {**FREE, **scores}}
    return row | ({"watched": watched} if watched else {})


def simple(group, hit, preset="seed", **more):
    scores = {**FREE, "seed_simple": (0.3, hit)}
    return {"group": group, "horizon": "own_gate", "preset": preset, "scores": scores, **more}


# --- runs, pairs, convergence


def test_pairing_refuses_other_documents():
    a, b = (next(made_up([horizon("own_gate", mlp=0.5)], documents=n).itertuples()) for n in (20, 30))
    with pytest.raises(ValueError, match="not judged on the same tokens: 20 and 30 documents"):
        report.paired(a, b, "mlp")
    with pytest.raises(ValueError, match="linear"):
        report.paired(a, a, "linear")
    with pytest.raises(ValueError, match="exact"):
        report.paired(a, a, "mlp", metric="exact")
    with pytest.raises(ValueError, match="predictor of this run"):
        report.score(a, "linaer")


def test_pairing_finds_the_planted_difference():
    a, b = made_up([horizon("own_gate", linear=0.7), horizon("own_gate", "other", linear=0.6)]).itertuples()
    i = report.paired(a, b, "linear")
    assert i.low <= 0.1 <= i.high and i.high - i.low < 0.02


@pytest.mark.parametrize(
    "watched, gain",
    [
        ([(8, 0.5)], np.nan),
        ([(4, 0.4), (8, 0.5)], 0.05),
        ([(6, 0.498), (8, 0.5)], 0.002),
        ([(6, 0.49), (8, 0.5)], 0.01),
    ],
)
def test_convergence_is_the_gain_of_the_last_quarter(watched, gain):
    run = next(made_up([horizon("own_gate", mlp=0.5, watched=watched)]).itertuples())
    assert report.last_quarter(run, "mlp") == pytest.approx(gain, nan_ok=True)
    assert report.converged(run, "mlp") == (gain < 0.003) and report.converged(run, "marginal")
    assert report.marked(run, "mlp") == "mlp" + ", not converged" * (not gain < 0.003)


def test_gains_are_adjusted_over_the_table():
    runs = made_up([horizon("pre_attention", mlp=0.9, linear=0.5001), horizon("previous_token", mlp=0.1)], spread=0.05)
    table = report.gain_table(runs).set_index(["horizon", "predictor"])
    assert table.verdict["pre_attention", "mlp"] == "better" and table.verdict["previous_token", "mlp"] == "worse"
    raw = {(h, n): g["p"] for h, r in report.horizon_runs(runs).items() for n, g in r.notes["gains"].items()}
    assert all(table.p[key] >= p for key, p in raw.items())
    row = table.loc["pre_attention", "mlp"]
    assert row.detectable == pytest.approx(2.8 * (row.high - row.low) / 3.92)


def test_tables_carry_chance_and_what_is_known_then():
    run = next(made_up([horizon("pre_attention", mlp=0.9)]).itertuples())
    table = report.horizon_table(run)
    assert table.iloc[0]["any@5"] == f"{100 * random_value('any@5', 4, 60):.1f}"
    assert table["known then"][table.predictor == "own_gate"].item() == "no" and "calibration error" not in table
    later = next(made_up([horizon("previous_token", mlp=0.3)]).itertuples())
    shown = report.horizon_table(later)
    assert later.notes["trivial"] == "marginal"
    assert set(shown.predictor[shown["known then"] == "no"]) == {"token_table", "own_gate"}
    with pytest.raises(ValueError, match="layer9"):
        report.horizon_table(run, "layer9")


def test_layers_and_coverage():
    runs = made_up([horizon("pre_attention", mlp=0.9), horizon("token_id", token_embedding=0.5)])
    first = report.layer0_table(runs)
    assert first.predictor.iloc[-1] == "own_gate" and (first.predictor == "marginal").sum() == 1
    assert len(report.layer_table(runs)) == 4 and report.confusion_table(runs).empty
    coverage = report.coverage_table(runs)
    assert list(report.shown_coverage(coverage, "all")["m = 10"])[-1] == "0.043"
    with pytest.raises(ValueError, match="coverage 'every'"):
        report.shown_coverage(coverage, "every")
    assert report.recall_table(runs).kind.tolist() == ["learned", "free"] * 2


# --- what is called critical


@pytest.mark.parametrize(
    "shifts, word",
    [((-0.2, -0.1), "reproduced"), ((-0.2, 0.1), "refuted"), ((0.0, 0.0), "refuted"), ((-0.2, 0.0), "corrected")],
)
def test_learning_rate(shifts, word):
    base = simple("width", 0.5, predictors={"seed_simple": {"width": 256}}, recipe={"epochs": 10})
    rates = [simple("learning_rate", 0.5 + d, recipe={"lr": lr, "epochs": 10}) for lr, d in zip((1e-5, 1e-4), shifts)]
    table = report.ablation_table(made_up([base, *rates]))
    assert report.critical(report.others(table, "learning rate", "lr", 5e-5)) == word


def test_without_the_run_to_compare_with_nothing_is_said():
    rows = [simple("learning_rate", h, recipe={"lr": lr}) for lr, h in ((1e-5, 0.3), (3e-5, 0.6))]
    table = report.ablation_table(made_up([*rows, simple("width", 0.7, predictors={"seed_simple": {"width": 512}})]))
    assert table.empty and report.critical(report.others(table, "learning rate", "lr", 5e-5)) == "not testable here"


def test_few_documents_leave_it_undecided():
    base = simple("width", 0.5, predictors={"seed_simple": {"width": 256}}, recipe={"epochs": 10})
    other = simple("learning_rate", 0.49, recipe={"lr": 1e-4, "epochs": 10})
    table = report.ablation_table(made_up([base, other], documents=3, spread=0.3))
    assert report.critical(report.others(table, "learning rate", "lr", 5e-5)) == "undecided"


@pytest.mark.parametrize(
    "hit, joint, word",
    [(0.3, True, "undecided"), (0.3, False, "reproduced"), (0.5, True, "refuted"), (0.7, True, "refuted")],
)
def test_settings_that_were_changed_together(hit, joint, word):
    rows = [
        simple("seed_protocol", 0.5),
        simple("seed_settings", hit, "seed_high_memory", recipe={"batch": 16, "group": 6}),
    ]
    table = report.ablation_table(made_up(rows))
    assert report.critical(table[table.estimate.notna()], joint) == word


def test_a_trace_with_few_shards_says_nothing_of_them():
    "4 of 4 and 6 of 4 shards are the same: only the batch size differs."
    more = {"recipe": {"batch": 16, "group": 6}, "shard": 1250}
    rows = [simple("seed_protocol", 0.5, shard=1250), simple("seed_settings", 0.3, "seed_high_memory", **more)]
    table = report.ablation_table(made_up(rows))
    assert table.shards.tolist() == [4, 4] and table.batch.tolist() == [8, 16]


# --- simple, complex, temporal


def networks(watched=None, **scores):
    return report.network_table(
        made_up([horizon(h, "seed_networks", watched, **scores) for h in ("own_gate", "previous_token")])
    )


@pytest.mark.parametrize(
    "hybrid, transformer, word", [(-0.1, -0.1, "reproduced"), (0.1, -0.1, "corrected"), (0.1, 0.1, "refuted")]
)
def test_simple_beats_complex(hybrid, transformer, word):
    scores = {"seed_simple": 0.5, "seed_hybrid": 0.5 + hybrid, "seed_transformer": 0.5 + transformer, "linear": 0.6}
    assert report.simple_beats_complex(networks(**scores)) == word
    assert report.simple_beats_complex(networks([(2, 0.3), (8, 0.5)], **scores)) == "undecided"  # not converged


@pytest.mark.parametrize("hybrid, word", [(0.01, "reproduced"), (0.2, "corrected"), (-0.1, "refuted")])
def test_temporal(hybrid, word):
    scores = {"seed_simple": 0.5, "seed_hybrid": 0.5 + hybrid}
    assert report.temporal_helps(networks(**scores)) == word
    assert report.temporal_helps(networks([(2, 0.3), (8, 0.5)], **scores)) == "undecided"


def test_without_networks_nothing_is_testable():
    table = networks(linear=0.5)
    assert table.empty and report.temporal_helps(table) == report.simple_beats_complex(table) == "not testable here"


def test_a_leak_is_shown_and_marked():
    table = networks(seed_simple=0.5, seed_hybrid=0.5, seed_hybrid_as_shipped=0.9)
    leaks = table[table.a == "seed_hybrid_as_shipped"].set_index("horizon").leak
    assert leaks["previous_token"] and not leaks["own_gate"] and not table.leak[table.a == "seed_hybrid"].any()


# --- worth


def replay(guess, word, saved, **more):
    interval = {"saved": saved, "saved_low": saved - 0.01, "saved_high": saved + 0.01}
    return {"guess": guess, "policy": "lru", "fetch": 4, "hit_rate": 0.5, **interval, "verdict": word, **more}


@pytest.mark.parametrize(
    "words, word",
    [
        (("pays", "pays"), "reproduced"),
        (("pays", "does not pay"), "corrected"),
        (("does not pay", "does not pay"), "refuted"),
        (("undecided", "does not pay"), "undecided"),
    ],
)
def test_prefetching(words, word):
    rows = []
    for h, w in zip(("pre_attention", "previous_layer"), words):
        more = [
            replay("mlp", "does not pay", -0.3, fetch=1),
            replay("oracle", "pays", 0.5),
            replay("token_table", "pays", 0.9),
        ]
        rows.append({**horizon(h, mlp=0.7), "replay": [{"guess": "(none)"}, replay("mlp", w, 0.1), *more]})
    best = report.best_replays(report.worth_table(made_up(rows)))
    assert report.prefetching_pays(best) == word  # what costs nothing and the oracle decide nothing
    assert set(best.kind) == {"learned", "free", "oracle"}


def test_the_best_of_many_replays_is_corrected():
    "An interval just above 0 is enough for one guess and not for the best of forty."
    near = {**replay("mlp", "pays", 0.0101), "saved_low": 0.0001, "saved_high": 0.0201}
    lost = [replay("mlp", "undecided", 0.0) for _ in range(39)]
    for replays, word in (([near], "pays"), ([near, *lost], "undecided")):
        runs = made_up([{**horizon("pre_attention", mlp=0.7), "replay": replays}])
        assert report.best_replays(report.worth_table(runs)).word.item() == word


def test_a_prediction_without_a_lead_decides_nothing():
    runs = made_up([{**horizon("own_gate", mlp=0.9), "replay": [replay("mlp", "pays", 0.2)]}])
    assert report.prefetching_pays(report.best_replays(report.worth_table(runs))) == "not testable here"
    nothing = report.worth_table(made_up([horizon("own_gate", mlp=0.9)]))
    assert nothing.empty and report.prefetching_pays(report.best_replays(nothing)) == "not testable here"


# --- the seed document's numbers


@pytest.mark.parametrize(
    "model, devices, value, word",
    [
        (QWEN, CARD, 47.0, "reproduced"),
        (QWEN, CARD, 60.0, "corrected"),
        (QWEN, CARD, 30.0, "refuted"),
        (QWEN, ["cpu"], 47.0, "not testable here"),
        ("tiny", CARD, 47.0, "not testable here"),
    ],
)
def test_a_claim_about_a_model_and_a_card_needs_both(model, devices, value, word):
    run = next(made_up([simple("seed_protocol", 0.5, devices=devices)], model=model).itertuples())
    assert report.range_word(run, value, 45.55, 49.55, card="3090") == word
    assert report.range_word(run, value, 45.55, 49.55) == (word if devices == CARD else "reproduced")


@pytest.mark.parametrize(
    "values, word",
    [
        ((0.27, 0.32, 0.40, 0.45, 0.4755), "reproduced"),
        ((0.05, 0.06, 0.07, 0.08, 0.4), "refuted"),
        ((0.7, 0.8, 0.89, 0.9, 0.9), "corrected"),
    ],
)
def test_progression(values, word):
    run = next(made_up([simple("seed_protocol", 0.5, watched=list(zip((1, 2, 5, 10, 20), values)))]).itertuples())
    assert report.progression_share(run, "seed_simple", 10)[1] == word
    assert list(report.progression_table(run, "seed_simple")["hit@1 found"]) == pytest.approx([100 * v for v in values])
    with pytest.raises(ValueError, match="after epoch 20"):
        report.progression_share(run, "seed_simple", 20)
    with pytest.raises(ValueError, match="trained predictor"):
        report.watched(run, "mlp")


def test_costs_from_shapes():
    c = report.protocol_costs()
    assert c["parameters"] == 672572 and c["forwards"] == 209 and c["texts"] == 1672
    assert c["trace_bytes"] == 8 * 256 * 2048 * 2 * 2 and c["flops"] == 6 * 672572 * 4000 * 128 * 20
    assert c["used"] == 1 / 32 and c["read_bytes"] == 20 * 4000 * c["trace_bytes"]
    assert report.protocol_costs(copies=1)["shard_bytes"] == c["shard_bytes"] / 2


def test_memory_of_the_collection():
    small, whole = report.collection_plan(), report.collection_plan(None)
    assert max(small.values()) < 21e9 < max(whole.values()) and small["weights"] < small["forward"]


def test_the_study_has_the_groups_that_the_report_reads():
    "A group that is renamed in the YAML would vanish from the report without a word."
    plan = plan_study("prediction", root=find_root())
    groups = {p["group"] for p in plan.runs.values()}
    read = {"horizons", "seed_protocol", "seed_settings", "seed_networks", "seed_hybrid", "learning_rate", "width"}
    assert read <= groups and plan.study.report == "prediction"
    assert {p["horizon"] for p in plan.runs.values() if p["group"] == "horizons"} == set(report.TITLES)
    widths = {p["predictors"]["seed_simple"]["width"] for p in plan.runs.values() if p["group"] == "width"}
    assert widths == {128, 256, 512}
