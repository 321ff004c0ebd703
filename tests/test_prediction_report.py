"""The prediction report on made-up studies whose truth is known: every verdict comes out each way, pairing refuses other documents, nothing is claimed without runs."""

import json

import numpy as np
import pandas as pd
import pytest

from moe_routing import prediction_report as report, runs as running
from moe_routing.predictors.baselines import COVERAGE, random_value
from moe_routing.settings import find_root

FREE = {"marginal": 0.2, "token_table": 0.5, "own_gate": (1.0, 1.0)}
QWEN, CARD = "Qwen/Qwen1.5-MoE-A2.7B", ["NVIDIA GeForce RTX 3090"]


@pytest.fixture(autouse=True)
def one_code(monkeypatch):
    "Made-up runs are of today's code by definition; hashing it anew for each of them takes long."
    for module in (running, report):
        monkeypatch.setattr(module, "code_hash", lambda *a: "today")


@pytest.fixture
def study(tmp_path):
    def make(rows, **more):
        plan = report.made_up_prediction(tmp_path / str(len(list(tmp_path.iterdir()))) / "prediction", rows, **more)
        return plan, report.prediction_runs(plan.folder)

    return make


def horizon(name, group="horizons", **scores):
    return {"group": group, "horizon": name, "scores": {**FREE, **scores}}


def protocol(hit=0.5, recall=0.35, **more):
    return {
        "group": "seed_protocol",
        "horizon": "own_gate",
        "preset": "seed",
        "scores": {**FREE, "seed_simple": (recall, hit)},
        **more,
    }


def simple(group, hit, preset="seed", **more):
    return {
        "group": group,
        "horizon": "own_gate",
        "preset": preset,
        "scores": {**FREE, "seed_simple": (0.3, hit)},
        **more,
    }


# --- numbers that need no run


@pytest.mark.parametrize(
    "claimed, metric, value, word",
    [
        (28.5, "hit@1", 47.55, "corrected"),
        (44, "any@5", 73.85, "corrected"),
        (7.1, "hit@1", 47.55, "confirmed"),
        (2.5, "any@5", 73.85, "confirmed"),
        (28.5, "hit@1", 6.6, "refuted"),
    ],
)
def test_times_chance(claimed, metric, value, word):
    assert report.times_chance(claimed, metric, value).verdict == word


def test_the_right_factors_are_named():
    one, five = (report.times_chance(c, m, report.PUBLISHED[m]) for c, m in ((28.5, "hit@1"), (44, "any@5")))
    assert (
        "6.67 %" in one.reason
        and "factor is 7.1" in one.reason
        and "30.06 %" in five.reason
        and "factor is 2.5" in five.reason
    )


@pytest.mark.parametrize(
    "m, claimed, word",
    [
        (1, 1.67, "corrected"),
        (4, 6.67, "corrected"),
        (10, 16.67, "corrected"),
        (1, 6.67, "confirmed"),
        (10, 52.77, "confirmed"),
        (4, 9.0, "refuted"),
    ],
)
def test_chance_of(m, claimed, word):
    assert report.chance_of(m, claimed).verdict == word


@pytest.mark.parametrize(
    "all_, any_, word",
    [
        (30.57, 87.43, "corrected"),
        (88.0, 99.0, "confirmed"),
        (30.0, 60.0, "refuted"),
        (None, None, "undecided"),
        (None, 87.0, "corrected"),
    ],
)
def test_all_needed(all_, any_, word):
    assert report.all_needed(10, 85, 90, all_, any_).verdict == word


def test_coverage_is_read_beside_our_own(study):
    found = report.all_needed(20, 96, 99, 39.04, 97.02, study([protocol()])[1])
    assert (
        found.verdict == "corrected" and "the same protocol here" in found.reason and "0.99 and 81.26" in found.reason
    )


@pytest.mark.parametrize("value, k, word", [(9.57, 4, "corrected"), (9.57, 1, "confirmed"), (26.0, 4, "undecided")])
def test_hybrid_artefact(value, k, word):
    found = report.hybrid_artefact(None, value, k=k)
    assert found.verdict == word and f"{value * k:.2f} % hit@1" in found.reason


def test_our_own_tables_can_refute_the_conversion(study):
    runs = study([protocol()])[1]
    assert report.hybrid_artefact(runs).verdict == "corrected"
    rows = runs.notes[0]["coverage"]["seed_simple"]
    next(r for r in rows if r["m"] == 1)["any"] += 0.1
    assert report.hybrid_artefact(runs).verdict == "refuted"


def test_costs_from_shapes():
    c = report.protocol_costs()
    assert (
        c["parameters"] == 672572
        and c["forwards"] == 209
        and c["texts"] == 1672
        and c["trace_bytes"] == 8 * 256 * 2048 * 2 * 2
    )
    assert (
        c["flops"] == 6 * 672572 * 4000 * 128 * 20
        and c["used"] == 1 / 32
        and c["read_bytes"] == 20 * 4000 * c["trace_bytes"]
    )
    assert [report.shard_size(x).verdict for x in (4.0, 8.4, 9.9)] == [
        "undecided",
        "confirmed",
        "refuted",
    ] and "122 tokens" in report.shard_size().reason
    assert [report.training_memory(x).verdict for x in (20.0, 0.019, 0.001)] == ["corrected", "confirmed", "refuted"]
    assert [report.host_memory(x).verdict for x in (32.0, 64.0, 10.0)] == ["undecided", "confirmed", "refuted"]
    assert [report.storage(x).verdict for x in (100.0, 50.0)] == ["confirmed", "refuted"]
    assert [report.shard_count(*x).verdict for x in ((5000, 500, 10), (5001, 500, 10))] == ["confirmed", "refuted"]
    assert [
        report.equal_shares(*x).verdict for x in ((833, 6, 5000), (1666, 3, 5000), (500, 10, 5000), (700, 6, 5000))
    ] == ["corrected", "corrected", "confirmed", "refuted"]
    assert [report.needs_version(*x).verdict for x in (("4.35.0",), ("4.39.0",), ("4.100.0",))] == [
        "refuted",
        "confirmed",
        "confirmed",
    ]


def test_memory_of_the_collection():
    assert (
        report.collection_memory().verdict == "confirmed"
        and report.collection_memory(quantize=None).verdict == "refuted"
        and report.collection_memory(5.0).verdict == "refuted"
    )
    seen = {"parameters": {"model": QWEN}, "metrics": {"device_mb": 30000.0}}
    assert (
        report.collection_memory(prepare=seen).verdict == "refuted"
        and "measured" in report.collection_memory(prepare=seen).reason
    )
    assert "measured" not in report.collection_memory(prepare={**seen, "parameters": {"model": "tiny"}}).reason


# --- numbers that need runs


@pytest.mark.parametrize(
    "model, hit, word",
    [
        ("tiny", 0.4755, "cannot be verified here"),
        (QWEN, 0.47, "confirmed"),
        (QWEN, 0.6, "corrected"),
        (QWEN, 0.3, "refuted"),
    ],
)
def test_headline(study, model, hit, word):
    assert report.headline(study([protocol(hit)], model=model)[1]).verdict == word


def test_nothing_without_runs():
    for v in (
        report.headline(None),
        report.foresight(None),
        report.quick_test(None),
        report.high_memory(None),
        report.progression(None),
        report.share_by(None),
        report.simple_beats_complex(None),
        report.temporal(None),
        report.prefetching(None),
        *report.setting_verdicts(None),
    ):
        assert v.verdict == "undecided", v
    assert report.minutes(None).verdict == report.collection_minutes(None).verdict == "cannot be verified here"
    found = report.seed_verdicts(None)
    assert (
        len({v.claim for v in found}) == len(found)
        and {v.verdict for v in found} <= set(report.WORDS)
        and len(report.answer(None, found)) == 5
    )
    for table in (
        report.gain_table,
        report.coverage_table,
        report.layer_table,
        report.confusion_table,
        report.ablation_table,
        report.network_table,
        report.worth_table,
        report.best_replays,
        report.locality_table,
    ):
        assert table(None).empty


@pytest.mark.parametrize(
    "gate, simple_, word", [(1.0, 0.35, "corrected"), (0.2, 0.5, "confirmed"), (None, 0.5, "undecided")]
)
def test_foresight(study, gate, simple_, word):
    scores = {"token_table": 0.1, "seed_simple": simple_, **({"own_gate": gate} if gate else {})}
    assert report.foresight(study([protocol(scores=scores)])[1]).verdict == word


@pytest.mark.parametrize(
    "model, devices, seconds, word",
    [
        (QWEN, CARD, 2400.0, "confirmed"),
        (QWEN, CARD, 100.0, "refuted"),
        (QWEN, ["cpu"], 2400.0, "cannot be verified here"),
        ("tiny", CARD, 2400.0, "cannot be verified here"),
    ],
)
def test_minutes(study, model, devices, seconds, word):
    runs = study([protocol(devices=devices, seconds=seconds)], model=model)[1]
    assert report.minutes(runs).verdict == word


@pytest.mark.parametrize(
    "model, devices, rate, word",
    [
        (QWEN, CARD, 300.0, "confirmed"),
        (QWEN, CARD, 3000.0, "refuted"),
        ("tiny", ["cpu"], 300.0, "cannot be verified here"),
    ],
)
def test_collection_minutes(model, devices, rate, word):
    record = {"parameters": {"model": model}, "devices": devices, "tokens_per_s": rate, "metrics": {"tokens": 428032}}
    assert report.collection_minutes(record).verdict == word


@pytest.mark.parametrize(
    "lows, words",
    [((-0.2, -0.1), "confirmed"), ((-0.2, 0.1), "refuted"), ((0.0, 0.0), "refuted"), ((-0.2, 0.0), "corrected")],
)
def test_learning_rate(study, lows, words):
    base = simple("width", 0.5, predictors={"seed_simple": {"width": 256}}, recipe={"epochs": 10})
    rows = [
        base,
        *(simple("learning_rate", 0.5 + d, recipe={"lr": lr, "epochs": 10}) for lr, d in zip((1e-5, 1e-4), lows)),
    ]
    assert report.setting_verdicts(study(rows)[1])[0].verdict == words


def test_without_the_run_to_compare_with_nothing_is_said(study):
    runs = study(
        [simple("learning_rate", h, recipe={"lr": lr, "epochs": 10}) for lr, h in ((1e-5, 0.3), (3e-5, 0.6))]
        + [simple("width", 0.7, predictors={"seed_simple": {"width": 512}})]
    )[1]
    assert report.ablation_table(runs).empty and {v.verdict for v in report.setting_verdicts(runs)} == {"undecided"}


def test_few_documents_leave_it_undecided(study):
    base = simple("width", 0.5, predictors={"seed_simple": {"width": 256}}, recipe={"epochs": 10})
    runs = study([base, simple("learning_rate", 0.49, recipe={"lr": 1e-4, "epochs": 10})], documents=3, spread=0.3)[1]
    assert report.setting_verdicts(runs)[0].verdict == "undecided"


@pytest.mark.parametrize("wide, word", [(0.4, "confirmed"), (0.6, "refuted"), (0.5, "refuted")])
def test_width(study, wide, word):
    rows = [
        simple("width", h, predictors={"seed_simple": {"width": w}}, recipe={"epochs": 10})
        for w, h in ((128, 0.3), (256, 0.5), (512, wide))
    ]
    assert report.setting_verdicts(study(rows)[1])[1].verdict == word


@pytest.mark.parametrize(
    "hit, seconds, critical, similar",
    [
        (0.5, 30.0, "refuted", "confirmed"),
        (0.5, 90.0, "refuted", "corrected"),
        (0.3, 30.0, "undecided", "corrected"),
        (0.3, 90.0, "undecided", "refuted"),
        (0.7, 30.0, "refuted", "corrected"),
    ],
)
def test_batch_and_shards_changed_together(study, hit, seconds, critical, similar):
    runs = study(
        [
            protocol(0.5),
            simple("seed_settings", hit, "seed_high_memory", recipe={"batch": 16, "group": 6}, seconds=seconds),
        ]
    )[1]
    assert [v.verdict for v in report.setting_verdicts(runs)[2:]] == [critical] * 2 and report.high_memory(
        runs
    ).verdict == similar


def test_a_trace_with_few_shards_says_nothing_of_them(study):
    "4 of 4 and 6 of 4 shards are the same: only the batch size differs, and its verdict can be confirmed."
    runs = study([protocol(0.5), simple("seed_settings", 0.3, "seed_high_memory", recipe={"batch": 16, "group": 6})])[
        1
    ].assign(shard=1250)
    batch, shards = report.setting_verdicts(runs)[2:]
    assert (
        batch.verdict == "confirmed"
        and "together" not in batch.reason
        and shards.verdict == "undecided"
        and "too small" in shards.reason
    )


@pytest.mark.parametrize(
    "model, hit, word",
    [
        (QWEN, 0.37, "confirmed"),
        (QWEN, 0.6, "corrected"),
        (QWEN, 0.2, "refuted"),
        ("tiny", 0.37, "cannot be verified here"),
    ],
)
def test_quick_test(study, model, hit, word):
    assert (
        report.quick_test(study([protocol(0.5), simple("seed_settings", hit, "seed_quick")], model=model)[1]).verdict
        == word
    )


@pytest.mark.parametrize(
    "values, model, word, share",
    [
        ((0.27, 0.32, 0.40, 0.45, 0.4755), QWEN, "confirmed", "confirmed"),
        ((0.10, 0.32, 0.40, 0.45, 0.4755), QWEN, "corrected", "confirmed"),
        ((0.05, 0.06, 0.07, 0.08, 0.4), QWEN, "refuted", "refuted"),
        ((0.7, 0.8, 0.89, 0.9, 0.9), "tiny", "cannot be verified here", "corrected"),
    ],
)
def test_progression(study, values, model, word, share):
    watched = [{"epoch": e, "hit@1": v, "any@5": v, "recall@4": v} for e, v in zip((1, 2, 5, 10, 20), values)]
    runs = study([protocol(watched=watched)], model=model)[1]
    assert report.progression(runs).verdict == word and report.share_by(runs, 10).verdict == share
    assert list(report.progression_table(runs)["ours: hit@1"]) == [f"{100 * v:.2f}" for v in values]


@pytest.mark.parametrize(
    "hybrid, transformer, word", [(-0.1, -0.1, "confirmed"), (0.1, -0.1, "corrected"), (0.1, 0.1, "refuted")]
)
def test_simple_beats_complex(study, hybrid, transformer, word):
    runs = study(
        [
            horizon(
                h,
                "seed_networks",
                seed_simple=0.5,
                seed_hybrid=0.5 + hybrid,
                seed_transformer=0.5 + transformer,
                linear=0.6,
            )
            for h in ("own_gate", "previous_token")
        ]
    )[1]
    assert report.simple_beats_complex(runs).verdict == word


def test_a_tie_of_the_networks_is_undecided(study):
    runs = study(
        [horizon("own_gate", "seed_networks", seed_simple=0.5, seed_hybrid=0.5, seed_transformer=0.5)],
        rng=np.random.default_rng(5),
    )[1]
    table = report.network_table(runs)
    assert (report.simple_beats_complex(runs).verdict == "undecided") == (not (table.verdict != "undecided").any())


@pytest.mark.parametrize("hybrid, word", [(0.01, "confirmed"), (0.2, "corrected"), (-0.1, "refuted")])
def test_temporal(study, hybrid, word):
    assert (
        report.temporal(
            study([horizon("own_gate", "seed_networks", seed_simple=0.5, seed_hybrid=0.5 + hybrid)])[1]
        ).verdict
        == word
    )


def test_a_leak_is_shown_and_not_counted(study):
    runs = study(
        [horizon("previous_token", "seed_networks", seed_simple=0.5, seed_hybrid=0.5, seed_hybrid_as_shipped=0.9)]
    )[1]
    table = report.network_table(runs)
    assert (
        not table[table.a == "seed_hybrid_as_shipped"].counted.any()
        and "seeing the future" in report.shown_networks(table).shown.iloc[-1]
    )
    assert report.sees_future("seed_hybrid_as_shipped", "previous_token") and not report.sees_future(
        "seed_hybrid_as_shipped", "own_gate"
    )


def replay(guess, word, saved, **more):
    return {
        "guess": guess,
        "policy": "lru",
        "hit_rate": 0.5,
        "saved": saved,
        "saved_low": saved - 0.01,
        "saved_high": saved + 0.01,
        "verdict": word,
        **more,
    }


@pytest.mark.parametrize(
    "words, word",
    [
        (("pays", "pays"), "confirmed"),
        (("pays", "does not pay"), "corrected"),
        (("does not pay", "does not pay"), "refuted"),
        (("undecided", "does not pay"), "undecided"),
    ],
)
def test_prefetching(study, words, word):
    rows = [
        {
            **horizon(h, mlp=0.7),
            "replay": [
                {"guess": "(none)", "hit_rate": 0.4},
                replay("mlp", w, 0.1),
                replay("mlp", "does not pay", -0.3, fetch=1),
                replay("oracle", "pays", 0.5),
                replay("token_table", "pays", 0.9),
            ],
        }
        for h, w in zip(("pre_attention", "previous_layer"), words)
    ]
    runs = study(rows)[1]
    assert report.prefetching(runs).verdict == word  # what costs nothing and the oracle decide nothing
    assert set(report.best_replays(runs).kind) == {"learned", "free", "oracle"}


def test_the_best_of_many_replays_is_corrected(study):
    "An interval just above 0 is enough for one guess and not for the best of forty."
    near = {"guess": "mlp", "saved": 0.0101, "saved_low": 0.0001, "saved_high": 0.0201, "verdict": "pays"}
    lost = [{**near, "saved": 0.0, "saved_low": -0.01, "saved_high": 0.01, "verdict": "undecided"} for _ in range(39)]
    for replays, word in (([near], "pays"), ([near, *lost], "undecided")):
        assert (
            report.best_replays(study([{**horizon("pre_attention", mlp=0.7), "replay": replays}])[1]).word.item()
            == word
        )


def test_a_prediction_without_a_lead_decides_nothing(study):
    assert (
        report.prefetching(study([{**horizon("own_gate", mlp=0.9), "replay": [replay("mlp", "pays", 0.2)]}])[1]).verdict
        == "undecided"
    )


def test_replays_with_other_columns(study):
    "Whatever a replay holds is shown; infinity and nothing have words."
    odd = [
        {"guess": "mlp", "break_even_gb_s": float("inf"), "useful_ratio": None, "new_column": 3},
        {"guess": "x", "break_even_gb_s": 0.0, "ms_per_token": 1.25},
    ]
    shown = report.shown_worth(report.worth_table(study([{**horizon("pre_attention", mlp=0.7), "replay": odd}])[1]))
    assert (
        list(shown["faster above, GB/s"]) == ["nowhere", "always"]
        and list(shown.new_column) == ["3", "-"]
        and shown["used, % of fetched"][0] == "-"
    )
    assert report.best_replays(study([{**horizon("pre_attention", mlp=0.7), "replay": odd}])[1]).empty


# --- tables and the report


def test_must_reach_says_no(study):
    rows = [
        horizon("pre_attention", mlp=0.6, stream_gate=0.58),
        horizon("previous_layer", mlp=0.5),
        horizon("token_id", token_embedding=0.45),
        {**horizon("own_gate", linear=0.9), "agreement": 99.9},
        protocol(seconds=1000.0),
    ]
    found = report.must_reach(study(rows)[1]).set_index("what").reached
    assert list(found) == ["no", "no", "no", "no", "no", "not run", "no", "yes"]


def test_gains_are_adjusted_over_the_table(study):
    runs = study([horizon("pre_attention", mlp=0.9, linear=0.5001), horizon("previous_token", mlp=0.1)], spread=0.05)[1]
    table = report.gain_table(runs).set_index(["horizon", "predictor"])
    assert table.verdict["pre_attention", "mlp"] == "better" and table.verdict["previous_token", "mlp"] == "worse"
    raw = {(h, n): g["p"] for h, r in report.horizon_runs(runs).items() for n, g in r.notes["gains"].items()}
    assert all(table.p[key] >= p for key, p in raw.items())


def test_pairing_refuses_other_documents(study):
    a, b = (next(study([horizon("own_gate", mlp=0.5)], documents=n)[1].itertuples()) for n in (20, 30))
    with pytest.raises(ValueError, match="not judged on the same tokens: 20 and 30 documents"):
        report.paired(a, b, "mlp")
    with pytest.raises(ValueError, match="linear"):
        report.paired(a, a, "linear")
    with pytest.raises(ValueError, match="exact"):
        report.paired(a, a, "mlp", metric="exact")


def test_pairing_finds_the_planted_difference(study):
    a, b = study([horizon("own_gate", linear=0.7), horizon("own_gate", "other", linear=0.6)])[1].itertuples()
    i = report.paired(a, b, "linear") if a.group == "horizons" else report.paired(b, a, "linear")
    assert i.low <= 0.1 <= i.high and i.high - i.low < 0.02


def test_horizon_table_carries_chance(study):
    run = next(study([horizon("pre_attention", mlp=0.9)])[1].itertuples())
    table = report.horizon_table(run)
    later = next(study([horizon("previous_token", mlp=0.3)])[1].itertuples())
    assert later.notes["trivial"] == "marginal" and set(
        report.horizon_table(later).predictor[report.horizon_table(later)["known then"] == "no"]
    ) == {"token_table", "own_gate"}
    assert (
        table.iloc[0]["any@5"] == f"{100 * random_value('any@5', 4, 60):.1f}"
        and table["known then"][table.predictor == "own_gate"].item() == "no"
    )
    assert len(
        report.shown_coverage(report.coverage_table(study([horizon("pre_attention", mlp=0.9)])[1])).columns
    ) == 2 + len(COVERAGE)


def test_the_report_is_built_from_what_is_there(study, monkeypatch):
    plan, _ = study([horizon("pre_attention", mlp=0.9), protocol()])
    published = []
    monkeypatch.setattr(report, "save_fig", lambda fig, name, *a: published.append(name))
    plan.study.report_options["publish"] = True
    page = report.prediction_report(plan).read_text()
    assert (
        page.count("\n## ") == 14
        and {"prediction-recall", "prediction-coverage", "prediction-progression"} == set(published)
        and (plan.folder / "recall.png").is_file()
        and len(pd.read_csv(plan.folder / "verdicts.csv")) > 30
    )
    plan.runs["another"], before = {}, len(published)
    page = report.prediction_report(plan).read_text()
    assert "1 of 3 runs are missing" in page and len(published) == before
    plan.study.report_options["colour"] = "red"
    with pytest.raises(ValueError, match="colour"):
        report.prediction_report(plan)


def test_the_report_needs_a_run(study, tmp_path):
    plan, _ = study([protocol()])
    for name in plan.runs:
        (plan.folder / name / "run.json").unlink()
    with pytest.raises(ValueError, match="none of its 1 runs is finished"):
        report.prediction_report(plan)


def test_the_collection_is_told(study):
    plan, _ = study([protocol()])
    (plan.folder / "prepare").mkdir()
    record = {
        "status": "finished",
        "template": "collect_traces",
        "group": "prepare",
        "run_id": "p",
        "seconds": 1.0,
        "documents": {},
        "commit": "0",
        "dirty": False,
        "threads": 1,
        "versions": {},
        "parameters": {"model": "tiny"},
        "devices": ["cpu"],
        "tokens_per_s": 500.0,
        "code": "abc",
        "notes": {"datasets": {"a": {"texts": 7}, "b": {"texts": 7}}},
        "metrics": {"tokens": 1000, "forwards": 3, "bytes": 10, "estimated_bytes": None, "device_mb": None},
    }
    (plan.folder / "prepare" / "run.json").write_text(json.dumps(record))
    page = report.prediction_report(plan).read_text()
    assert "Collected at 500 tokens/s" in page and "7, 7 texts of 2 data sets" in page
    assert report.collection(plan.folder)["code"] == "abc"


def test_the_study_has_the_groups_that_the_report_reads():
    "A group that is renamed in the YAML would vanish from the report without a word."
    plan = running.plan_study("prediction", root=find_root())
    groups = {p["group"] for p in plan.runs.values()}
    assert {
        "horizons",
        "seed_protocol",
        "seed_settings",
        "seed_networks",
        "seed_hybrid",
        "learning_rate",
        "width",
    } <= groups and plan.study.report == "prediction_report"
    assert {p["horizon"] for p in plan.runs.values() if p["group"] == "horizons"} == set(report.ORDER)
    assert {p["predictors"]["seed_simple"]["width"] for p in plan.runs.values() if p["group"] == "width"} == {
        128,
        256,
        512,
    }
