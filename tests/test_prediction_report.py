"""What a prediction study is judged by, on made-up runs whose truth is known: every verdict comes out each way, pairing
refuses other documents, and what has not converged decides nothing."""

import numpy as np
import pandas as pd
import pytest

from moe_routing.predictors.baselines import COVERAGE, HORIZONS, random_value
from moe_routing.settings import find_root, load_study
from moe_routing.stats import clustered_difference
from moe_routing.studies import prediction as report

FREE = {"marginal": 0.2, "token_table": 0.5, "own_gate": (1.0, 1.0)}
CONTROLS = ("random", *FREE)
NEEDS = {"token_table": "token", "own_gate": "own"}
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
    "shifts, sides",
    [
        ((-0.2, -0.1), {"worse": 2}),
        ((-0.2, 0.1), {"worse": 1, "better": 1}),
        ((0.0, 0.0), {"same": 2}),
        ((-0.2, 0.0), {"worse": 1, "same": 1}),
    ],
)
def test_sides_of_learning_rates(shifts, sides):
    base = simple("width", 0.5, predictors={"seed_simple": {"width": 256}}, recipe={"epochs": 10})
    rates = [simple("learning_rate", 0.5 + d, recipe={"lr": lr, "epochs": 10}) for lr, d in zip((1e-5, 1e-4), shifts)]
    found = report.sides_of(report.others(report.ablation_table(made_up([base, *rates])), "learning rate", "lr", 5e-5))
    assert {k: v for k, v in found.items() if v} == {**sides, "n": 2}


def test_without_the_run_to_compare_with_nothing_is_said():
    rows = [simple("learning_rate", h, recipe={"lr": lr}) for lr, h in ((1e-5, 0.3), (3e-5, 0.6))]
    table = report.ablation_table(made_up([*rows, simple("width", 0.7, predictors={"seed_simple": {"width": 512}})]))
    assert table.empty and report.sides_of(report.others(table, "learning rate", "lr", 5e-5))["n"] == 0


def test_few_documents_leave_it_open():
    base = simple("width", 0.5, predictors={"seed_simple": {"width": 256}}, recipe={"epochs": 10})
    other = simple("learning_rate", 0.49, recipe={"lr": 1e-4, "epochs": 10})
    table = report.ablation_table(made_up([base, other], documents=3, spread=0.3))
    assert report.sides_of(report.others(table, "learning rate", "lr", 5e-5))["open"] == 1


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


@pytest.mark.parametrize("hybrid, transformer", [(-0.1, -0.1), (0.1, -0.1), (0.1, 0.1)])
def test_networks_are_paired_within_a_run(hybrid, transformer):
    scores = {"seed_simple": 0.5, "seed_hybrid": 0.5 + hybrid, "seed_transformer": 0.5 + transformer, "linear": 0.6}
    table = networks(**scores)
    word = {b: "worse" if d > 0 else "better" for b, d in (("seed_hybrid", hybrid), ("seed_transformer", transformer))}
    rows = table[(table.question == "simple") & table.b.isin(word)]
    assert len(rows) == 4 and (rows.verdict == rows.b.map(word)).all() and table.converged.all()
    assert not networks([(2, 0.3), (8, 0.5)], **scores).converged.any()


def test_without_networks_there_is_nothing_to_compare():
    assert networks(linear=0.5).empty and "converged" in networks(linear=0.5)


def test_a_leak_is_shown_and_marked():
    table = networks(seed_simple=0.5, seed_hybrid=0.5, seed_hybrid_as_shipped=0.9)
    leaks = table[table.a == "seed_hybrid_as_shipped"].set_index("horizon").leak
    assert leaks["previous_token"] and not leaks["own_gate"] and not table.leak[table.a == "seed_hybrid"].any()


# --- worth


def replay(guess, word, saved, **more):
    interval = {"saved": saved, "saved_low": saved - 0.01, "saved_high": saved + 0.01}
    return {"guess": guess, "policy": "lru", "fetch": 4, "hit_rate": 0.5, **interval, "verdict": word, **more}


def test_the_best_replay_of_each_kind():
    more = [
        replay("mlp", "does not pay", -0.3, fetch=1),
        replay("oracle", "pays", 0.5),
        replay("token_table", "pays", 0.9),
    ]
    rows = [{**horizon("pre_attention", mlp=0.7), "replay": [{"guess": "(none)"}, replay("mlp", "pays", 0.1), *more]}]
    rows += [{**horizon("previous_layer", mlp=0.7), "replay": [replay("mlp", "prefetching does not pay", -0.1)]}]
    best = report.best_replays(report.worth_table(made_up(rows))).set_index(["horizon", "kind"])
    assert set(best.index.get_level_values("kind")) == {"learned", "free", "oracle"} and len(best) == 4
    assert best.word["pre_attention", "learned"] == "pays" and best.fetch["pre_attention", "learned"] == 4
    assert best.word["previous_layer", "learned"] == "does not pay"


def test_the_best_of_many_replays_is_corrected():
    "An interval just above 0 is enough for one guess and not for the best of forty."
    near = {**replay("mlp", "pays", 0.0101), "saved_low": 0.0001, "saved_high": 0.0201}
    lost = [replay("mlp", "undecided", 0.0) for _ in range(39)]
    for replays, word in (([near], "pays"), ([near, *lost], "undecided")):
        runs = made_up([{**horizon("pre_attention", mlp=0.7), "replay": replays}])
        assert report.best_replays(report.worth_table(runs)).word.item() == word


def test_without_replays_there_is_no_table():
    nothing = report.worth_table(made_up([horizon("own_gate", mlp=0.9)]))
    assert nothing.empty and report.best_replays(nothing).empty


# --- the seed document's numbers


def test_progression():
    values = (0.27, 0.32, 0.40, 0.45, 0.4755)
    watched = list(zip((1, 2, 5, 10, 20), values))
    run = next(made_up([simple("seed_protocol", 0.5, watched=watched)]).itertuples())
    shares = report.progress(run, "seed_simple")
    assert shares["hit_2"] == pytest.approx(0.32 / 0.4755) and shares["any_20"] == 1 and len(shares) == 10
    table = report.progression_table(run, "seed_simple")
    assert list(table["hit@1 found"]) == pytest.approx([100 * v for v in values])
    assert table["hit@1 times chance"].iloc[-1] == pytest.approx(47.55 / 100 * 15)
    with pytest.raises(ValueError, match="trained predictor"):
        report.watched(run, "mlp")


def test_the_study_has_the_groups_that_the_report_reads():
    "A group that is renamed in the YAML would vanish from the report without a word."
    study = load_study(find_root() / "papermill_runs" / "studies" / "prediction.yaml")
    points = study.points()
    read = {"horizons", "seed_protocol", "seed_settings", "seed_networks", "seed_hybrid", "learning_rate", "width"}
    assert read <= {p["group"] for p in points} and study.report == "prediction"
    assert {p["horizon"] for p in points if p["group"] == "horizons"} == set(report.TITLES)
    assert {p["predictors"]["seed_simple"]["width"] for p in points if p["group"] == "width"} == {128, 256, 512}
