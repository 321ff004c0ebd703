"""Reports of router studies: verdicts and numbers on made-up studies with a known answer, one number at every door."""

import json

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from made_up import made_up_study, read_report

from moe_routing.figures import ROUTER_STYLE
from moe_routing.runs.study import load_logs, load_runs
from moe_routing.studies import routers as chapter
from moe_routing.studies.findings import read_findings
from moe_routing.studies.tables import by_seed

TRUTH = {
    "softk": 2.30,
    "switch": 2.33,
    "topk_aux": 2.31,
    "quantile": 2.303,
    "token_hash": 2.40,
    "expert_choice": 2.32,
    "position_hash": 2.45,
    "top1_as_shipped": 2.47,
    "topk_hard_as_shipped": 2.43,
    "expert_choice_as_shipped": 2.28,
}
PLANTED = {
    "spread": 0.001,
    "drops": {"quantile": 0, "position_hash": 0},
    "excess": {"quantile": 0.01},
    "speed": {"expert_choice_as_shipped": 20000.0},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    home = tmp_path_factory.mktemp("results")
    shipped = {r: v - 0.3 for r, v in TRUTH.items() if r.endswith(("shipped", "softk", "position_hash"))}
    made_up_study(home / "larger", shipped, 3, (1.5,), match="width", spread=0.001, rng=np.random.default_rng(5))
    return made_up_study(home / "routers", TRUTH, **PLANTED)


@pytest.fixture(scope="module")
def runs(folder):
    return chapter.with_groups(load_runs(folder))


@pytest.fixture(scope="module")
def report(folder):
    out = folder / "report"
    out.mkdir()
    read_report("routers", record=str(folder), out=str(out))
    return read_findings(out)


def test_every_router_of_the_zoo_has_its_own_look():
    from moe_routing.routers.zoo import ROUTERS

    assert set(ROUTERS) <= set(ROUTER_STYLE) and len(set(ROUTER_STYLE.values())) == len(ROUTER_STYLE)


def test_summary_has_the_seed_documents_columns(runs, tmp_path):
    chapter.summary_csv(runs, tmp_path / "x.csv", "routers")
    back = pd.read_csv(tmp_path / "x.csv")
    assert (
        list(back)[:22]
        == (
            "run router top_k capacity_factor num_experts dim expand world_size best_step best_val_ppl best_val_loss "
            "best_tokens_per_s best_eff_tflops final_val_ppl final_val_loss median_tokens_per_s median_eff_tflops "
            "median_bw_GiBps mean_drop_rate mean_load_cv mean_gate_entropy log_path"
        ).split()
    )
    assert len(back) == len(runs) and set(back.log_path) == {"papermill_runs/routers/logs.jsonl"}
    assert np.allclose(back.mean_load_cv, runs.demand_cv)
    assert np.allclose(back.final_val_ppl, np.exp(back.final_val_loss), rtol=1e-4)


def test_the_report_says_what_was_planted(report, runs):
    best = report["routers.lowest_loss"]
    assert (
        best.values["best"] == "softk"
        and best.values["last"] == "top1_as_shipped"
        and "capacity factor 1.25" in best.text
    )
    assert best.values["gap"] == pytest.approx(0.17, abs=0.003)
    assert not any("expert_choice_as_shipped" in run for run in best.runs) and "quantile-1.25-compute-0" in best.runs
    counts = report["routers.pairs"].values
    assert counts["pairs"] == counts["different"] + counts["equivalent"] + counts["undecided"] == 36
    assert report["balance.closest"].values["router"] == "quantile" == report["balance.closest"].values["shown"]
    assert report["routers.capacity.compute.embedded"].values["better"] == len(TRUTH)


def test_headlines_say_what_their_runs_do_not_carry(report, folder, tmp_path):
    "The n-gram table, what could be shown, and how far the controls lie apart stand in the headline itself."
    said = report["routers.lowest_loss"].text
    assert "9 of 9 routers predict worse than a 6-gram table" in said and "could be shown" in said
    assert "perplexity 11.0" in said and "a range of 5%" in said and "under 10 %" in said
    assert "9 of 9 routers" in report["balance.closest"].text and "could be shown" in report["balance.closest"].text
    good = made_up_study(tmp_path / "routers", TRUTH, 3, (1.25,), logs=False, ngram=3.0)
    names = read_report("routers", record=str(good))
    text = next(f.text for f in names["report"].findings if f.key == "routers.lowest_loss")
    assert "All 9 routers predict better" in text


def test_the_report_writes_its_files(report, folder):
    there = {p.name for p in (folder / "report").iterdir()}
    figures = ("frontier", "overlay", "load_vs_ppl", "gate_entropy", "expert_histogram", "expert_heatmap")
    assert {f"unified-{f}.{e}" for f in figures for e in ("png", "csv")} | {
        "findings.json",
        "unified_summary.csv",
    } <= there


def test_groups(runs):
    kinds = dict(zip(runs.router, runs.kind))
    assert kinds["expert_choice_as_shipped"] == chapter.ROUTER_KINDS[-1] and kinds["expert_choice"] == "trainable"
    assert kinds["position_hash"] == "control" and kinds["topk_hard_as_shipped"] == "as shipped"


def test_settings_and_the_main_one(runs):
    found = chapter.settings_of(runs)
    assert [s.key for s in found] == ["compute_1.25", "compute_1"]
    more = pd.concat([runs[(runs.capacity_factor == 1.25) | (runs.seed < 3)], runs.assign(match="width")])
    assert [s.key for s in chapter.settings_of(more)][0] == "compute_1.25"
    assert chapter.settings_of(runs.assign(capacity_factor=None))[0].label.endswith("no capacity limit")


def test_published_pairs(runs):
    said = lambda r: chapter.published_pairs(r)[0]["as shipped"].tolist()
    pairs, used = chapter.published_pairs(runs)
    assert pairs["in trained form"][0] == "higher" and len(used) > 30  # expert choice is planted behind soft-k
    shipped = runs[runs.router.isin([f[0] for f in chapter.PUBLISHED_AS.values()])]
    assert said(shipped) == ["lower"] * 5 and said(shipped[shipped.seed < 2]) == ["not run"] * 5 == said(runs[:0])
    assert said(shipped.assign(val_loss=-shipped.val_loss, val_loss_as_trained=None)) == ["higher"] * 5


def test_two_studies_that_rank_alike(runs):
    small = runs[runs.capacity_factor == 1.25]
    same, turned = (chapter.compare_studies(small, o) for o in (small, small.assign(val_loss=-small.val_loss)))
    assert same.published.open == 0 == len(same.published.reverse) and same.form == "as shipped"
    assert len(same.routers) == len(TRUTH) and same.apart == ["expert_choice_as_shipped"]
    assert len(turned.published.reverse) == 10 and not turned.published.agree
    noisy = small.assign(val_loss=small.val_loss + np.random.default_rng(1).normal(0, 1, len(small)))
    assert chapter.compare_studies(small, noisy).published.open > 0
    trained = small[~small.kind.isin(["as shipped", chapter.ROUTER_KINDS[-1]])]
    assert chapter.compare_studies(trained, small).form == "in trained form"
    few = chapter.compare_studies(small[small.router == "softk"], small)
    assert few.routers == ["softk"] and few.ranked is None and few.published is None


def test_who_drops(runs):
    answers = lambda r: dict(zip(*chapter.dropping(r)[["router", "answer"]].to_numpy().T))
    trained = runs[runs.router.isin(["softk", "switch"])]
    one = trained.assign(drop_rate=0.0, capacity_factor=1.05).drop_duplicates(["router", "seed"])
    assert answers(runs)["quantile"] == "none" and answers(trained) == {"softk": "drops", "switch": "drops"}
    assert answers(one) == {"softk": "none", "switch": "none"}
    # no drops at 1.25 say nothing about 1.10, and one seed says nothing at all
    assert set(answers(trained[trained.capacity_factor == 1.25].assign(drop_rate=0.0)).values()) == {"open"}
    assert set(answers(trained[trained.seed == 0]).values()) == {"open"} and chapter.dropping(runs[:0]).empty


def test_speed_against_expert_choice(runs):
    table, used = chapter.speed_against(runs)
    assert set(table.verdict) == {"worse"} and used
    slow = runs.median_tokens_per_s.where(runs.router != "expert_choice_as_shipped", 10.0)
    assert set(chapter.speed_against(runs.assign(median_tokens_per_s=slow))[0].verdict) == {"better"}
    assert chapter.speed_against(runs[runs.router == "softk"])[0].empty


def test_balance_verdicts_and_missing_reference(runs):
    setting = runs[(runs.capacity_factor == 1.25) & runs.router.isin([*chapter.BALANCERS, "softk"])]
    t = chapter.balance_table(setting).set_index("router")
    assert t.on_floor["quantile"] == "yes" == t.cheap["quantile"] and t.on_floor["switch"] == "no" == t.cheap["switch"]
    assert t.cheap["softk"] == "-"
    with pytest.raises(ValueError, match="no run of 'softk'"):
        chapter.balance_table(setting[setting.router != "softk"])
    bare = chapter.balance_table(setting.drop(columns=["layer_max_violation", "layer_cv"]))
    assert (bare.on_floor == "undecided").all() and set(chapter.shown_balance(bare)["MaxVio, worst layer"]) == {"-"}


def test_the_same_model_counts_under_both_matches(runs):
    shipped = runs[(runs.router == "softk") & (runs.capacity_factor == 1.25)].assign(match="width")
    some = pd.concat([runs[runs.router.isin(["switch", "topk_aux"])], shipped], ignore_index=True)
    both = chapter.same_models(some)
    at = lambda match: both[(both.match == match) & (both.capacity_factor == 1.25)]
    assert set(at("compute").router) == {"switch", "topk_aux", "softk"}
    assert set(at("width").router) == {"softk", "topk_aux"}  # switch asks for one expert: another width
    assert not at("width").duplicated(["router", "seed"]).any() and len(both) == len(some) + 10
    assert chapter.same_models(runs) is runs and chapter.same_models(both) is both


def test_range_of_the_controls(runs):
    moved = chapter.control_range(runs[runs.capacity_factor == 1.25])
    assert (moved["worst"], moved["best"], moved["controls"]) == ("position_hash", "token_hash", 2)
    assert moved["range"] == pytest.approx(np.exp(0.05) - 1, abs=0.003)
    assert chapter.control_range(runs[runs.router == "token_hash"]) == {"controls": 1, "range": None}


def test_how_far_training_went(runs, folder):
    here = chapter.largest_factor(runs)
    found = chapter.still_learning(chapter.loss_curves(here, load_logs(folder)), ["softk", "topk_aux"])
    # 2 exp(-s / 60) (1 - s / 300) at step 200, and 0 at step 300
    assert found["least"] == pytest.approx(2 * np.exp(-200 / 60) / 3, rel=1e-6) == found["most"]
    assert found["lead"] == pytest.approx(found["lead_before"]) and (found["since"], found["steps"]) == (200, 300)


def test_ngram_tables_are_made_once(runs, tmp_path):
    asked, file = runs.assign(steps=4, windows=16), tmp_path / "ngram.csv"
    first = chapter.ngram_baselines(asked, file, orders=2)
    assert first.loss[1] < first.loss[0] and set(first.tokens) == {4 * 16 * 128}
    file.write_text(file.read_text().replace(f"{first.loss[0]:.6g}", "9.5"))
    assert chapter.ngram_baselines(asked, file, orders=2).loss[0] == 9.5  # read, not made again
    assert len(chapter.ngram_baselines(asked.assign(steps=8), file, orders=2)) == 4


def test_an_ngram_table_predicts_what_it_has_counted():
    "The published baseline of the embedded corpus, counted again."
    kept = pd.read_csv(ROOT / "papermill_runs" / "routers" / "ngram.csv")
    (row,) = kept[kept.order == 3].to_dict("records")
    asked = pd.DataFrame([{**row, "steps": row["tokens"], "batch": 1, "length": row["length"], "source": "auto"}])
    asked["steps"] = row["tokens"] // row["length"]
    made = chapter._ngram_rows(next(asked.itertuples()), 3)
    assert made[-1]["loss"] == pytest.approx(row["loss"], rel=1e-4)


# --- one answer at every door ---


@pytest.fixture(scope="module")
def doors():
    "The findings of both studies, by their notebooks on the published record, and the function itself."
    home = ROOT / "papermill_runs"
    one, two = (chapter.with_groups(load_runs(home / name, root=ROOT)) for name in ("routers", "larger"))
    said = {
        name: {f.key: f for f in read_report("routers", study=name, options=options)["report"].findings}
        for name, options in {"routers": {}, "larger": {"reference": "routers"}}.items()
    }
    return said, chapter.compare_studies(one, two)


def test_how_many_routers_two_studies_share_is_one_number(doors):
    said, found = doors
    here, there = said["routers"]["routers.agreement.larger"].values, said["larger"]["routers.agreement"].values
    numbers = ("tau", "low", "high", "n", "agree", "reversed", "open")
    for key in ("shared", "ranked", *numbers, *(f"ranked_{k}" for k in numbers)):
        assert here[key] == pytest.approx(there[key]), key
    assert (
        here["shared"] == len(found.routers) == 5
        and here["ranked"] == here["ranked_n"] == len(found.ranked.routers) == 4
    )
    assert here["n"] == len(found.published.routers) and here["tau"] == pytest.approx(found.published.tau)


def test_the_ngram_table_is_one_number_in_every_headline(doors):
    for findings in doors[0].values():
        table = findings["routers.ngram"].values
        there = [f.values for f in findings.values() if "{ngram_loss" in f.says]
        assert len(there) > 3 and {v["ngram_loss"] for v in there} == {table["ngram_loss"]}


# --- bad input ---


def test_a_study_with_one_seed_has_no_ranking(tmp_path):
    alone = {r: TRUTH[r] for r in ("softk", "switch", "token_hash")}
    made_up_study(tmp_path / "routers", alone, 1, (1.25,), logs=False)
    findings = {f.key: f for f in read_report("routers", record=str(tmp_path / "routers"))["report"].findings}
    assert findings["routers.no_ranking"].values["most"] == 1 and "routers.lowest_loss" not in findings
    assert "routers.learning" not in findings


def test_figures_without_logs_are_left_out(tmp_path):
    some = {"softk": 2.3, "switch": 2.4, "topk_aux": 2.35}
    made_up_study(tmp_path / "routers", some, 3, (None,), logs=False)
    names = read_report("routers", record=str(tmp_path / "routers"), out=str(tmp_path), options={"prefix": "bare"})
    assert sorted(p.name for p in tmp_path.glob("*.png")) == [
        f"bare-{w}.png" for w in ("frontier", "gate_entropy", "load_vs_ppl")
    ]
    said = {f.key: f.text for f in names["report"].findings}
    assert "Only 3 seeds" in said["routers.pairs"] and "no limit" in said["routers.setting"]


def test_balance_is_an_option(folder, tmp_path):
    names = read_report("routers", study="balance", record=str(folder), out=str(tmp_path), options={"only": "balance"})
    keys = {f.key for f in names["report"].findings}
    assert {"balance.closest", "routers.ngram"} <= keys and not any(
        "lowest_loss" in k or "published" in k for k in keys
    )
    assert {p.name for p in tmp_path.glob("*.png")} == {"balance-compute_1.png", "balance-compute_1_25.png"}


def test_bad_input_is_named(folder, tmp_path):
    with pytest.raises(ValueError, match="'margn'.*margin"):
        read_report("routers", record=str(folder), options={"margn": 1})
    with pytest.raises(ValueError, match="make run STUDY=routers"):
        read_report("routers", record=str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="unknown study 'nowhere'"):
        read_report("routers", study="nowhere")
    broken = made_up_study(tmp_path / "routers", {"softk": 2.3}, 2, (1.0,), logs=False)
    text = (broken / "runs.jsonl").read_text()
    (broken / "runs.jsonl").write_text(text + '{"run": "torn')
    with pytest.raises(ValueError, match="runs.jsonl, line 3: broken"):
        read_report("routers", record=str(broken))
    (broken / "runs.jsonl").write_text(text + json.dumps({"run": "bare"}) + "\n")
    with pytest.raises(ValueError, match="line 3: broken .'template'"):
        read_report("routers", record=str(broken))


def test_windows_must_give_the_loss(runs):
    with pytest.raises(ValueError, match="must be summed over the tokens of a window"):
        chapter.windows_of(next(runs.assign(val_loss=9.0).itertuples()))
    run = next(runs.itertuples())
    assert chapter.windows_of(run).nll.sum() / (32 * 128) == pytest.approx(run.val_loss)
    assert by_seed(runs[runs.capacity_factor == 1], "val_loss").shape == (5, len(TRUTH))
