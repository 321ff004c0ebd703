"""Claims: broken entries are named, no verdict stands without runs, every rule can come out each way, and calculations
agree with arithmetic done another way."""

import ast
import json
import random
from math import comb, log, sqrt

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT

from moe_routing.studies import claims as chapter
from moe_routing.studies import findings as records
from moe_routing.studies.claims import (
    BY_RUNS,
    SEEDS,
    VERDICTS,
    SeedClaim,
    ClaimVerdict,
    claims_file,
    count_table,
    holds,
    judge_claim,
    parse_rule,
    read_claims,
)
from moe_routing.studies.findings import Finding, write_findings

ENTRY = """
- id: better
  seed: "003"
  place: nowhere
  says: the method is better
  test: a difference
  answer: {finding: "demo:demo.gain", when: {reproduced: low > 0, refuted: high < 0}}
"""
CLAIMS = {c.id: c for c in read_claims()}
BY_FINDING = [c for c in CLAIMS.values() if c.kind == "finding"]
CALCULATED = [c.id for c in CLAIMS.values() if c.kind == "calculation"]


def cells(tag=None):
    "Sources of the code cells of the claims notebook, of those with a tag or of those without any."
    code = [c for c in json.loads((ROOT / "nbs/studies/claims.ipynb").read_text())["cells"] if c["cell_type"] == "code"]
    return ["".join(c["source"]) for c in code if c["metadata"].get("tags", []) == ([tag] if tag else [])]


@pytest.fixture(scope="module")
def names():
    "What the calculation cells of the notebook define; their own asserts hold."
    found = {"__name__": "__main__"}
    for source in cells("calculations"):
        exec(compile(source, "claims.ipynb", "exec"), found)
    return found


@pytest.fixture(scope="module")
def calculations(names):
    return names["CALCULATIONS"]


def claim(**other):
    return SeedClaim(
        **{"id": "x", "seed": "000", "place": "p", "says": "s", "test": "t", "answer": {"not_testable": "it"}, **other}
    )


def by_finding(**when):
    return claim(answer={"finding": "demo:demo.gain", "when": when})


def lab(tmp_path, findings, study="demo"):
    (folder := tmp_path / "papermill_runs" / study).mkdir(parents=True, exist_ok=True)
    write_findings(folder, findings)
    return tmp_path


# --- rules


@pytest.mark.parametrize(
    "rule, values, true",
    [
        ("low > 0", {"low": 1}, True),
        ("low > 0", {"low": -1}, False),
        ("0.1 <= share <= 0.2 and not n == 3", {"share": 0.15, "n": 4}, True),
        ("2 * a - b / 4 == 1 or a > 9", {"a": 1, "b": 4}, True),
        ("word == 'better'", {"word": "worse"}, False),
        ("none == all", {"none": 2, "all": 2}, True),
    ],
)
def test_rules_compare_values(rule, values, true):
    assert holds(rule, values) is true


@pytest.mark.parametrize(
    "rule, said",
    [
        ("low >", "no expression"),
        ("low", "compares nothing"),
        ("low + 1", "compares nothing"),
        ("open('x') == 1", "may not use Call"),
        ("low.real > 0", "may not use Attribute"),
        ("[low][0] > 0", "may not use"),
        ("2 ** low > 0", "may not use Pow"),
        ("(lambda: 1) == 1", "may not use Lambda"),
    ],
)
def test_rules_can_do_nothing_else(rule, said):
    with pytest.raises(ValueError, match=said):
        parse_rule(rule)


@pytest.mark.parametrize(
    "rule, said",
    [("hihg > 0", "did you mean 'high'"), ("low > 0", "cannot be decided.*None"), ("high / zero > 0", "division")],
)
def test_values_that_a_rule_cannot_use(rule, said):
    with pytest.raises(ValueError, match=said):
        holds(rule, {"high": 1, "low": None, "zero": 0})


# --- reading


@pytest.mark.parametrize(
    "old, new, said",
    [
        ('"003"', '"005"', "unknown seed document '005'"),
        ("reproduced: low", "confirmed: low", "unknown verdict 'confirmed'"),
        ("reproduced: low", "not testable here: low", "unknown verdict 'not testable here'"),
        ("reproduced: low", "checked by calculation: low", "unknown verdict 'checked by calculation'"),
        (", refuted: high < 0", "", "could not come out otherwise"),
        ("reproduced: low > 0, ", "", "could not come out otherwise"),
        ("low > 0", "low", "compares nothing"),
        ("low > 0", "exit() > 0", "may not use Call"),
        (", when: {reproduced: low > 0, refuted: high < 0}", "", "has no 'when'"),
        ('finding: "demo:demo.gain", ', "", "no answer: write one of finding, calculation, not_testable"),
        ('{finding: "demo:demo.gain", when: {reproduced: low > 0, refuted: high < 0}}', "", "no answer"),
        ("when:", "whne:", "unknown key of the answer 'finding' 'whne': did you mean 'when'"),
        ("place:", "palce:", "unknown key 'palce': did you mean 'place'"),
        ("  test: a difference\n", "", "missing 1 required positional argument: 'test'"),
        ("test: a difference", 'test: ""', "'test' is empty"),
    ],
)
def test_a_broken_entry_is_named_with_file_line_and_way_out(tmp_path, old, new, said):
    assert old in ENTRY
    (file := tmp_path / "claims.yaml").write_text(ENTRY.replace("better", "good") + ENTRY.replace(old, new))
    with pytest.raises(ValueError) as error:
        read_claims(file)
    assert f"{file}, line 9, claim 'better': " in str(error.value) and said in str(error.value)


@pytest.mark.parametrize(
    "text, said",
    [
        (ENTRY + ENTRY, "line 9, claim 'better': the id is taken"),
        ("better: {seed: '003'}", "a list of claims is expected"),
        ("- {seed: '003'}", "entry 1 has no id"),
        ("- {id: better", "line 1"),
    ],
)
def test_a_broken_file_is_named(tmp_path, text, said):
    (file := tmp_path / "claims.yaml").write_text(text)
    with pytest.raises(ValueError) as error:
        read_claims(file)
    assert str(file) in str(error.value) and said in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="none.yaml"):
        read_claims(tmp_path / "none.yaml")


# --- judging


@pytest.mark.parametrize(
    "low, high, verdict",
    [(0.1, 0.3, "reproduced"), (-0.3, -0.1, "refuted"), (-0.1, 0.1, "undecided"), (0, 0.005, "corrected")],
)
def test_a_finding_decides(tmp_path, low, high, verdict):
    root = lab(tmp_path, [Finding("demo.gain", "{low} to {high}", {"low": low, "high": high}, ("a", "b"))])
    asked = by_finding(reproduced="low > 0", corrected="low == 0 and high < 0.01", refuted="high < 0")
    found = judge_claim(asked, root=root)
    assert (found.verdict, found.runs, found.found) == (verdict, ("a", "b"), f"{low} to {high}")


@pytest.mark.parametrize("word", BY_RUNS)
def test_no_verdict_by_runs_without_runs(tmp_path, word):
    with pytest.raises(ValueError, match="needs runs"):
        ClaimVerdict(claim(), word, "said", "demo:demo.gain")
    low, high = {"reproduced": (1, 2), "corrected": (0, 0), "refuted": (-2, -1), "undecided": (-1, 1)}[word]
    root = lab(tmp_path, [Finding("demo.gain", "{low}", {"low": low, "high": high})])
    asked = by_finding(reproduced="low > 0", corrected="low == 0", refuted="high < 0")
    with pytest.raises(ValueError, match=f"claim 'x': '{word}' needs runs, and 'demo:demo.gain' names none"):
        judge_claim(asked, root=root)


@pytest.mark.parametrize("word", BY_RUNS)
def test_a_calculation_is_never_called_a_verdict_by_runs(word):
    answer = {"calculation": "add", "holds": "sum == 4", "found": "{sum}"}
    for total in (4, 5):
        found = judge_claim(claim(answer=answer), {"add": lambda: {"sum": total}})
        assert found.verdict == "checked by calculation" and found.agrees is (total == 4) and not found.runs
    with pytest.raises(ValueError, match="unknown key of the answer"):
        claim(answer={**answer, "when": {word: "sum == 4"}})


def test_what_cannot_be_tested_says_what_would():
    found = judge_claim(claim(answer={"not_testable": "a larger model"}))
    assert found.verdict == "not testable here" and "a larger model" in found.found


@pytest.mark.parametrize(
    "answer, said",
    [
        ({"finding": "demo:demo.gian"}, "did you mean 'demo.gain'"),
        ({"finding": "none:demo.gain"}, "make figures STUDY=none"),
        ({"finding": "demo.gain"}, "is not <study>:<finding>"),
        ({"when": {"reproduced": "lwo > 0", "refuted": "low < 0"}}, "did you mean 'low'"),
    ],
)
def test_a_finding_that_is_not_there_is_named(tmp_path, answer, said):
    root = lab(tmp_path, [Finding("demo.gain", "{low}", {"low": 1}, ("a",))])
    asked = claim(
        line=7,
        answer={"finding": "demo:demo.gain", "when": {"reproduced": "low > 0", "refuted": "low < 0"}} | answer,
    )
    with pytest.raises(ValueError) as error:
        judge_claim(asked, root=root)
    assert f"{claims_file(root)}, line 7, claim 'x': " in str(error.value) and said in str(error.value)


@pytest.mark.parametrize(
    "answer, said",
    [
        ({"calculation": "ad"}, "unknown calculation 'ad': did you mean 'add'"),
        ({"with": {"parst": [1]}}, "unexpected keyword argument 'parst'"),
        ({"holds": "summ == 3"}, "did you mean 'sum'"),
        ({"found": "{summ}"}, "summ"),
    ],
)
def test_a_calculation_that_is_not_there_is_named(answer, said):
    answer = {"calculation": "add", "with": {"parts": [1, 2]}, "holds": "sum == 3", "found": "{sum}"} | answer
    with pytest.raises(ValueError, match="claim 'x'") as error:
        judge_claim(claim(answer=answer), {"add": lambda parts: {"sum": sum(parts)}})
    assert said in str(error.value)


def test_counts_keep_calculations_apart():
    judged = [ClaimVerdict(claim(id=str(i)), word, "", "s:k", ("a",)) for i, word in enumerate([*BY_RUNS, "refuted"])]
    judged += [
        ClaimVerdict(claim(seed="004"), "checked by calculation", "", "add", agrees=a) for a in (True, True, False)
    ]
    judged += [ClaimVerdict(claim(seed="004"), "not testable here", "", "")]
    table = count_table(judged).set_index("seed")
    assert table.loc["all", "all"] == 9 and table.loc["000", "refuted"] == 2 and table.loc["004", "reproduced"] == 0
    assert table.loc["004", "checked by calculation, agrees"] == 2
    assert table.loc["all", "checked by calculation, disagrees"] == 1
    assert list(table.columns)[:5] == [w for w in VERDICTS if w != "checked by calculation"]


# --- the entries


def test_every_document_has_its_claims():
    count = pd.Series([c.seed for c in CLAIMS.values()]).value_counts()
    assert dict(count) == {"000": 29, "001": 22, "002": 27, "003": 23, "004": 42} and set(count.index) == set(SEEDS)


def test_lines_are_short_and_entries_know_theirs():
    text = claims_file().read_text().splitlines()
    assert max(map(len, text)) <= 120
    assert all(text[c.line - 1] == f"- id: {c.id}" for c in CLAIMS.values())


@pytest.mark.parametrize("asked", BY_FINDING, ids=lambda c: c.id)
def test_every_verdict_of_a_finding_can_come_out(asked):
    "Values are drawn until each rule has decided once; a rule that never decides is dead."
    rules, draw = asked.answer["when"], random.Random(0)
    nodes = [n for rule in rules.values() for n in ast.walk(parse_rule(rule))]
    texts = sorted({n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)})
    numbers = sorted({n.value for n in nodes if isinstance(n, ast.Constant) and not isinstance(n.value, str)})
    near = [0, 1, 2, 3, *(v + d for v in numbers for d in (0, 0.01, -0.01, 1, -1)), *(-v - 0.01 for v in numbers)]
    values = [*texts, "other"] if texts else near
    seen, variables = set(), sorted({n.id for n in nodes if isinstance(n, ast.Name)})
    for _ in range(20_000):
        drawn = {name: draw.choice(values) for name in variables}
        seen.add(next((w for w, rule in rules.items() if holds(rule, drawn)), "undecided"))
        if seen >= set(rules):
            return
    pytest.fail(f"{asked.id}: {set(rules) - seen} never comes out")


def test_findings_are_asked_for_in_studies_that_exist():
    studies = {c.answer["finding"].partition(":")[0] for c in BY_FINDING}
    assert all((ROOT / "papermill_runs" / "studies" / f"{s}.yaml").is_file() for s in studies)


# --- the calculations

AGREE = {
    *("days", "distinct_usage", "topk_unbalances", "configs", "experiments", "log_files", "first_grid", "simes"),
    *("gini_formula", "entropy_formula", "kde_models", "olmoe_shape", "panels", "file_names"),
    *("system_test", "hours", "ppl_8", "ppl_32", "ppl_subword", "minutes_subword", "minutes_larger"),
    *("minutes_routers", "coe_memory", "collection_memory", "storage", "shard_count", "qwen_shape"),
}


def test_the_list_names_claims():
    assert AGREE < set(CALCULATED) and len(CALCULATED) == 74


@pytest.mark.parametrize("name", CALCULATED)
def test_which_calculations_agree(calculations, name):
    found = judge_claim(CLAIMS[name], calculations)
    assert found.agrees is (name in AGREE), found.found


@pytest.mark.parametrize(
    "name, change",
    [
        ("days", {"parts": [1, 2]}),
        ("go_cv", {"limit": 2.0}),
        ("go_maxvio", {"limit": 3.0}),
        ("go_noise", {"limit": 2.0}),
        ("go_perplexity", {"limit": 100}),
        ("orthogonality_mean", {"num_experts": 4, "width": 4}),
        ("half_of_tasks", {"share": 1.0}),
        ("total_time", {"hours": [[72, 96]]}),
        ("cost", {"dollars": 10}),
        ("strong_separation", {"width": 32}),
        ("hash_even", {"num_experts": 1, "k": 1}),
        ("sinkhorn_soft", {"iterations": 50}),
        ("topk_unbalances", {"narrow": 0.3, "wide": 0.3}),
        ("significance", {"variants": 1, "checkpoints": 1, "level": 0.04}),
        ("router_order", {"width": 1}),
        ("sweep_axes", {"sweeps": {"C": {"repulsion": [0, 1]}}}),
        ("configs", {"groups": ["bh"]}),
        ("experiments", {"groups": ["bh"]}),
        ("log_files", {"groups": ["bh"]}),
        ("first_grid", {"groups": ["bh"]}),
        ("entropy_formula", {"min_k": 3}),
        ("samples", {"samples": 1000}),
        ("full_logits", {"kept": 512}),
        ("kde_models", {"factors": [16, 8]}),
        ("file_names", {"alphas": [0.3, 0.57]}),
        ("system_test", {"factors": [2, 3, 2]}),
        ("hours", {"parts": [4, 6]}),
        ("ppl_8", {"factor": 1.0}),
        ("minutes_larger", {"published": "subword", "study": "subword"}),
        ("expert_choice_share", {"clamp": 0}),
        ("cf_law", {"factor": 1.5}),
        ("load_cv_after", {"shares": [0.125] * 8}),
        ("times_top1", {"num_experts": 240}),
        ("random_1", {"num_experts": 240}),
        ("all_10", {"all_needed": 87.43}),
        ("hybrid", {"k": 1}),
        ("shard_size", {"copies": 1}),
        ("host_memory", {"copies": 1}),
        ("storage", {"traces": 9000}),
        ("equal_shares", {"factors": [5, 1000]}),
        ("shard_count", {"factors": [10, 499]}),
        ("version", {"claimed": "4.40.0"}),
    ],
)
def test_another_truth_comes_out_the_other_way(calculations, name, change):
    "Arguments for which the claim would be right where it is wrong, and wrong where it is right."
    asked = CLAIMS[name]
    other = claim(answer={**asked.answer, "with": {**asked.answer.get("with", {}), **change}})
    assert judge_claim(other, calculations).agrees is not judge_claim(asked, calculations).agrees


def counted(model):
    "Counts of each layer of a published model, domains in rows."
    table = pd.read_csv(ROOT / "nbs" / "data" / "expert_counts.csv")
    for _, rows in table[table.model.str.contains(model)].groupby("layer"):
        yield np.array([[int(n) for n in counts.split()] for counts in rows.counts], float)


def test_published_counts_are_those_of_the_gate(names, calculations):
    for model in ("mistralai/Mixtral-8x7B-v0.1", "allenai/OLMoE-1B-7B-0924"):
        known = [np.atleast_2d(x).sum(0) for x in names["PUBLISHED_LOADS"][model]["loads"].values()]
        shares = [x.sum(0) / x.sum() for x in counted(model)]
        assert len(known) == len(shares) == 3
    loads = [x.sum(0) for x in counted("Mixtral")]
    cvs = [float(x.std() / x.mean()) for x in loads]
    found = calculations["published_below"]("cv", 0.1)
    assert found["mixtral_below"] == sum(v < 0.1 for v in cvs) and abs(found["mixtral_most"] - max(cvs)) < 1e-9
    most = calculations["published_below"]("max_violation", 0.1)["mixtral_most"]
    assert abs(most - max(x.max() / x.mean() - 1 for x in loads)) < 1e-9


def test_information_is_that_of_the_counts(calculations):
    ratios = []
    for model in ("Mixtral", "OLMoE"):
        for x in counted(model):
            p = x / x.sum(1, keepdims=True)
            mean = p.mean(0)
            used = int((mean > 0).sum())
            said = float(np.where(p > 0, p * np.log(np.where(p > 0, p, 1) / mean), 0).sum() / len(p))
            ratios.append(said / ((len(p) - 1) * (used - 1) / (2 * len(p) * x.sum(1).mean())))
    found = calculations["domain_information"](10)
    assert found["layers"] == len(ratios) and abs(found["least"] / min(ratios) - 1) < 1e-6


def test_arithmetic_done_another_way(calculations):
    c = calculations
    chance = lambda m: 100 * (1 - comb(56, m) / comb(60, m))
    assert abs(c["chance_of"](4)["any"] - chance(4)) < 1e-9 and abs(c["chance_of"](10)["recall"] - 1000 / 60) < 1e-9
    assert abs(c["times_chance"]("any@5", 73.85, 44)["factor"] - 73.85 / chance(5)) < 1e-9
    assert abs(c["reported_coverage"](10, 30, 87)["all_chance"] - 100 * comb(56, 6) / comb(60, 10)) < 1e-9
    assert (
        c["coin"](7, 0.5)["chance"] == sum(comb(7, i) for i in range(4, 8)) / 128 and c["coin"](7, 0.5)["needed"] == 7
    )
    assert abs(c["false_findings"](0.05, 6, 5)["chance"] - (1 - 0.95**30)) < 1e-12
    assert abs(c["chain_combinations"](64, 4, 2, 823, 0.005)["ratio"] - comb(64, 4) ** 2 / comb(64, 8)) < 1e-9
    assert abs(c["random_cosines"](32, 128)["gram"] - (1 - sqrt(31 / (64 * 128)))) < 1e-12
    assert abs(c["recipe"]()["shard"] - 500 * 8 * 256 * 2048 * 2 * 2 / 1e9) < 1e-9 and c["recipe"]()["forwards"] == 209
    layers = 2048 * 256 + 256 + 2 * (256 * 256 + 256 + 512) + 256 * 60 + 60
    assert c["recipe"]()["parameters"] == layers == 672572 and c["recipe"]()["maps"] == 4
    assert c["chosen"](8192, 8, 2, 1.25, 64) == {"share": 8 * 64 / 8192, "budget": 2560}
    assert c["even_counts"](8, 3)["entropy"] == log(6) / log(8)
    assert c["rounded_down"]([0.29])["wrong_of_all"] == 3 and c["rounded_down"]([0.29])["wrong"] == 1
    cost = lambda k: 0.6 * k / 64 + 0.4
    assert abs(c["olmoe_saving"](4, 512)["said"] - 100 * (1 - cost(4) / cost(8))) < 1e-9
    assert c["one_token_words"]() == {"share": 3046 / 4378, "words": 4378}
    assert c["logged_rows"](5, 512, 200, 16, 64)["gigabytes"] == 200 * 512 * 16 * 64 * 8 / 1e9


def test_arithmetic_over_the_published_tables(calculations):
    c = calculations
    rates = [7939978, 6427419, 6374528, 7331067, 6461836]
    logged = sum(2000 * 32768 / r for r in rates) / 60
    assert abs(c["bench_minutes"]("larger", "larger_scale")["minutes"] - 200 * logged) < 1e-6
    assert c["bench_rate"]("larger_scale", "expert-choice")["divided"] == 7939978 / 200
    assert c["bench_flops"](256)["least"] == 16 * 256**2 and c["bench_flops"](256)["ratio"] == 2
    assert round(c["bench_drops"]()["high"], 2) == 31.04 and c["bench_drops"]()["dropping"] == 4
    shares = np.array([0.3, 0.2, 0.15, 0.1, 0.1, 0.05, 0.05, 0.05]) * 8
    cut = np.minimum(shares, 1)
    assert abs(c["cut_load"](list(shares / 8))["at_1"] - cut.std() / cut.mean()) < 1e-6
    assert c["bench_entropy"]()["measured"] == 2 and c["bench_best"]("expert-choice")["both"] == 1


# --- the report


def values_for(asked, word):
    "Values for which a claim gets a word, and text for every other name its rules use."
    draw, rules = random.Random(1), asked.answer["when"]
    nodes = [n for rule in rules.values() for n in ast.walk(parse_rule(rule))]
    constants = sorted({n.value for n in nodes if isinstance(n, ast.Constant)}, key=str)
    texts = any(isinstance(v, str) for v in constants)
    near = constants if texts else [0, 1, 2, *(v + d for v in constants for d in (0, 0.01, -0.01, 1, -1))]
    variables = sorted({n.id for n in nodes if isinstance(n, ast.Name)})
    while True:
        drawn = {name: draw.choice(near) for name in variables}
        if next((w for w, rule in rules.items() if holds(rule, drawn)), "undecided") == word:
            return drawn


@pytest.fixture
def judged_lab(tmp_path, monkeypatch):
    "A repository with the entries and made-up findings for those of them that share no finding with another."
    asked = {}
    for c in BY_FINDING:
        asked.setdefault(c.answer["finding"], c)
    entries = [c for c in CLAIMS.values() if c.kind != "finding" or asked[c.answer["finding"]] is c]
    (tmp_path / "nbs" / "data").mkdir(parents=True)
    kept = [vars(c) | {"line": None} for c in entries]
    text = json.dumps([{k: v for k, v in e.items() if k != "line"} for e in kept])
    (tmp_path / "nbs" / "data" / "claims.yaml").write_text(text)
    by_study = {}
    for key, c in asked.items():
        study, _, name = key.partition(":")
        values = values_for(c, "reproduced")
        by_study.setdefault(study, []).append(Finding(name, f"{c.id} was run.", values, (f"run-{c.id}",)))
    for study, found in by_study.items():
        lab(tmp_path, found, study)
    for module in (chapter, records):
        monkeypatch.setattr(module, "find_root", lambda: tmp_path)
    return tmp_path, entries


def tell(names, out):
    "Execute the cells that judge and show; what they displayed."
    shown, found = [], dict(names)
    found |= {"out": str(out), "show": shown.append}
    for source in cells():
        exec(compile(source, "claims.ipynb", "exec"), found)
    return "\n".join(shown)


def test_the_report_shows_every_claim_once_with_its_runs(judged_lab, names, tmp_path):
    _, entries = judged_lab
    (out := tmp_path / "out").mkdir()
    page = tell(names, out)
    tables = page[page.index("### Seed document 000") :]
    rows = [line for line in tables.splitlines() if line.startswith("| ") and ("calculation" in line or "](" in line)]
    by_runs = [c for c in entries if c.kind == "finding"]
    assert sum("| reproduced |" in row for row in rows) == len(by_runs)
    assert all(f"{c.id} was run." in page for c in by_runs)
    said = {f["key"]: f for f in json.loads((out / "findings.json").read_text())}
    assert said["claims.by_runs"]["values"]["reproduced"] == len(by_runs) == len(said["claims.by_runs"]["runs"])
    checked = said["claims.by_calculation"]["values"]
    assert checked["checked"] == len(CALCULATED) and checked["agree"] == len(AGREE)
    assert checked["open"] == sum(c.kind == "not_testable" for c in entries)


def test_a_finding_that_is_missing_leaves_nothing_half(judged_lab, names, tmp_path):
    root, _ = judged_lab
    (root / "papermill_runs" / "capacity" / "findings.json").write_text("[]")
    (out := tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="claim 'cf_study': unknown finding of capacity 'capacity.claim_105'"):
        tell(names, out)
    assert not list(out.iterdir())
