"lm-eval under our routers: the own gate changes nothing, pairs are pairs, and what cannot be scored says so."

import json
import math
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from lm_eval.models.huggingface import HFLM
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, OlmoeForCausalLM

from conftest import ROOT
from moe_routing.harness import compare, routed as model_class, tasks as task_module
from moe_routing.harness.compare import (
    compare_benchmarks,
    main,
    paired_scores,
    run_benchmarks,
    score_task,
    write_comparison,
)
from moe_routing.harness.routed import RoutedLM, score_depends_on
from moe_routing.harness.tasks import (
    BENCHMARKS,
    EMBEDDED_TASKS,
    SEED_TASKS,
    Tasks,
    code_judge,
    load_tasks,
    local_folder,
    program_passes,
    unknown_task,
    with_examples,
)
from moe_routing.models.load import TinyRecipe, make_tokenizer, tiny_config
from moe_routing.routers.zoo import ROUTERS
from moe_routing.settings import load_settings

WORDS = (
    "the old river runs past a small stone bridge where nobody waits for rain and 12 birds sing Question Answer".split()
)
silent = lambda line: None


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer([" ".join(WORDS)] * 9, 300)


@pytest.fixture(scope="module", params=["olmoe", "mixtral"])
def model(request):
    torch.manual_seed(1)
    if request.param == "olmoe":
        return OlmoeForCausalLM(
            tiny_config(
                TinyRecipe(
                    vocab_size=300, hidden=16, intermediate=8, layers=2, heads=2, num_experts=4, top_k=2, init=0.3
                )
            )
        ).eval()
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=300,
            hidden_size=16,
            intermediate_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_local_experts=4,
            initializer_range=0.3,
        )
    ).eval()


@pytest.fixture(scope="module")
def small(tokenizer):
    torch.manual_seed(1)
    return OlmoeForCausalLM(
        tiny_config(
            TinyRecipe(vocab_size=300, hidden=16, intermediate=8, layers=2, heads=2, num_experts=4, top_k=2, init=0.3)
        )
    ).eval()


def routed(model, tokenizer, **more):
    return RoutedLM(model, tokenizer=tokenizer, batch_size=8, progress=False, **more)


def write(folder, **splits):
    folder.mkdir(parents=True)
    for name, rows in splits.items():
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(r) for r in rows))


@pytest.fixture
def settings(tmp_path):
    "Data of this test's own making, in the hub's columns; no hub."
    arc = [
        dict(
            id=f"q{i}",
            question=f"where is bird {i}",
            choices=dict(text=["river", "bridge", "rain", "stone"], label=list("ABCD")),
            answerKey="ABCD"[i % 4],
        )
        for i in range(12)
    ]
    write(tmp_path / "ai2_arc" / "ARC-Challenge", train=arc[:6], test=arc[6:])
    write(
        tmp_path / "hellaswag",
        validation=[
            dict(
                ind=i,
                activity_label="Rain",
                ctx_a=f"Bird {i} waits.",
                ctx_b="it",
                ctx="",
                endings=["sings", "runs", "waits", "is small"],
                source_id=f"s{i // 2}",
                label=str(i % 4),
            )
            for i in range(16)
        ],
    )
    subjects = ("anatomy", "astronomy")
    write(
        tmp_path / "mmlu" / "all",
        dev=[
            dict(question=f"dev {s} {i}\u2028?", subject=s, choices=list("wxyz"), answer=0)
            for s in subjects
            for i in range(5)
        ],
        test=[
            dict(question=f"test {s} {i}?", subject=s, choices=list("wxyz"), answer=i % 4)
            for s in subjects
            for i in range(4)
        ],
    )
    write(
        tmp_path / "openai_humaneval",
        test=[
            dict(
                task_id=f"HumanEval/{i}",
                prompt=f"def f{i}():\n",
                entry_point=f"f{i}",
                canonical_solution="    return 1\n",
                test="def check(f):\n    assert f() == 1\n",
            )
            for i in range(3)
        ],
    )
    write(
        tmp_path / "mbpp" / "full",
        test=[
            dict(
                task_id=i,
                text="return one",
                code="def f(): return 1",
                test_list=["assert f() == 1"] * 3,
                test_setup_code="",
                challenge_test_list=[],
            )
            for i in range(3)
        ],
    )
    write(
        tmp_path / "gsm8k" / "main",
        train=[dict(question=f"What is {i} and 1?", answer=f"Add. #### {i + 1}") for i in range(9)],
        test=[dict(question="What is 1 and 1?", answer="#### 2"), dict(question="What is 2 and 1?", answer="#### 3")],
    )
    return replace(load_settings(), data_dir=tmp_path, hub=False)


def allowing(settings):
    "The same settings with allow_code_execution = yes."
    return replace(settings, allow_code_execution=True)


# ---------------------------------------------------------------- the own gate


def test_own_gate_scores_as_plain_lm_eval(model, tokenizer):
    ours, plain = routed(model, tokenizer), HFLM(model, tokenizer=tokenizer, batch_size=8)
    for item in load_tasks(EMBEDDED_TASKS, {"embedded_arithmetic": 1, "embedded_choice": 1}, say=silent):
        a, b = (score_task(lm, item, 6, max_answer=8, say=silent) for lm in (ours, plain))
        assert a["documents"] == b["documents"] and a["metrics"] == b["metrics"]
        (certificate,) = a["model"]["certificates"].values()
        assert (
            certificate["changed"] == 0
            and certificate["rule"] is None
            and certificate["asked"] == 2
            and certificate["forwards"] == 1
        )
        assert not model._forward_hooks


def test_a_rule_changes_answers_and_leaves_no_trace(model, tokenizer):
    ours, plain = routed(model, tokenizer, router="topk", k=1), HFLM(model, tokenizer=tokenizer, batch_size=8)
    task = load_tasks(["embedded_word"])[0]
    under = score_task(ours, task, 6)
    certificate = under["model"]["certificates"]["loglikelihood"]
    assert (
        certificate["asked"] == certificate["received"] == 1
        and certificate["changed"] == 1
        and under["model"]["router"] == "topk"
    )
    requests = task.leaves[0].instances
    different, same = (
        ours.loglikelihood(requests),
        HFLM(model, tokenizer=tokenizer, batch_size=3).loglikelihood(requests),
    )
    assert all(a[0] != b[0] for a, b in zip(different, same))
    assert [a[0] for a in plain.loglikelihood(requests)] == pytest.approx([b[0] for b in same], abs=1e-4)


def test_batch_size_does_not_change_a_causal_rule(small, tokenizer):
    task = load_tasks(["embedded_choice"])[0]
    score_task(routed(small, tokenizer), task, 5)
    one, many = (
        RoutedLM(small, tokenizer=tokenizer, router="top_p", p=0.5, batch_size=n, progress=False).loglikelihood(
            task.leaves[0].instances
        )
        for n in (1, 7)
    )
    assert [a for a, _ in one] == pytest.approx([b for b, _ in many], abs=1e-4)


def test_rolling_windows_run_under_the_rule(small, tokenizer):
    from lm_eval.api.instance import Instance

    lm = routed(small, tokenizer, router="topk", k=1, max_length=16)
    value = lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (" ".join(WORDS * 3),), 0)])
    assert value[0] < 0 and lm.certificates["loglikelihood_rolling"]["forwards"] > 1
    assert lm.loglikelihood([]) == []


def test_loads_by_name_and_quantises(tmp_path, small, tokenizer):
    small.save_pretrained(tmp_path / "m"), tokenizer.save_pretrained(tmp_path / "m")
    by_name = RoutedLM(str(tmp_path / "m"), device="cpu", progress=False)
    task = load_tasks(["embedded_word"])[0]
    assert score_task(by_name, task, 4)["documents"] == score_task(routed(small, tokenizer), task, 4)["documents"]
    four = RoutedLM(str(tmp_path / "m"), device="cpu", quantize="4bit", router="topk", k=1, progress=False)
    assert score_task(four, task, 4)["model"]["quantize"] == "4bit" and four.certificates["loglikelihood"]["asked"] == 1


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("name", sorted(ROUTERS))
def test_dependent_rows_are_refused_others_are_not(small, tokenizer, name):
    row = ROUTERS[name]
    params = (
        {k: v for k, v in row.example.items() if k not in ("k", "max_k")}
        | ({"max_k": 2} if "max_k" in row.example else {})
        | ({"weigh": "renorm"} if name == "dense" else {})
    )
    if name in ("expert_choice", "expert_threshold", "expert_choice_as_shipped", "random", "position_hash"):
        with pytest.raises(ValueError, match="depend"):
            routed(small, tokenizer, router=name, **params)
    elif row.needs_null:
        assert not score_depends_on(name)
    else:
        assert routed(small, tokenizer, router=name, **params).rule is not None


def test_a_dependent_router_can_be_forced_and_is_marked(small, tokenizer):
    lm = routed(small, tokenizer, router="random", k=2, allow_dependent=True)
    assert "padding" in score_task(lm, load_tasks(["embedded_word"])[0], 3)["model"]["score_depends_on"]


def test_parameters_are_checked_before_a_model_is_loaded(monkeypatch):
    monkeypatch.setattr(model_class, "load_model", lambda *a, **k: pytest.fail("loaded"))
    for more, word in (
        (dict(router="bhh"), "'bh'"),
        (dict(router="bh", alfa=0.3), "'alpha'"),
        (dict(router="bh", alpha=3.0, max_k=4), "alpha"),
        (dict(experts="raged"), "ragged"),
        (dict(max_lenght=4), "max_length"),
        (dict(trust_remote_code=True), "trust_remote_code = yes"),
    ):
        with pytest.raises(ValueError, match=word):
            RoutedLM("tiny", **more)


def test_dense_models_score_with_their_own_gate_only(tokenizer):
    dense = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=300,
            hidden_size=16,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
        )
    ).eval()
    with pytest.raises(ValueError, match="no experts"):
        routed(dense, tokenizer, router="topk", k=1)
    lm = routed(dense, tokenizer)
    result = score_task(lm, load_tasks(["embedded_word"])[0], 3)
    assert result["model"]["certificates"] == {} and "no MoE layer" in result["model"]["unobserved"]


def test_a_gated_model_says_what_to_do(monkeypatch, settings):
    def refuse(*a, **k):
        raise OSError("You are trying to access a gated repo.\nMake sure to have access to it")

    monkeypatch.setattr("moe_routing.models.load.AutoConfig.from_pretrained", refuse)
    with pytest.raises(PermissionError, match="HF_TOKEN"):
        RoutedLM("meta-llama/Meta-Llama-3-8B", settings=settings)


def test_a_loaded_model_needs_its_tokenizer(small):
    with pytest.raises(ValueError, match="tokenizer="):
        RoutedLM(small)


def test_a_missing_model_names_the_way_out(settings):
    with pytest.raises(FileNotFoundError, match="hub = no"):
        RoutedLM("mistralai/Mixtral-8x7B-v0.1", settings=settings)


def test_full_memory_halves_the_batch_then_names_the_settings(monkeypatch, small, tokenizer, capsys):
    call, task = HFLM._model_call, load_tasks(["embedded_word"])[0]

    def limited(most):
        def f(self, inps, *a, **k):
            if len(inps) > most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            return call(self, inps, *a, **k)

        return f

    expected = score_task(routed(small, tokenizer), task, 8)["documents"]
    monkeypatch.setattr(HFLM, "_model_call", limited(2))
    lm = routed(small, tokenizer)
    result = score_task(lm, task, 8)
    assert (
        result["batch_size"] == 2 and result["documents"] == expected and "going on with 4" in capsys.readouterr().out
    )
    with pytest.raises(RuntimeError, match="lower batch_size"):
        routed(small, tokenizer, halve=False).loglikelihood(task.leaves[0].instances)
    monkeypatch.setattr(HFLM, "_model_call", limited(0))
    with pytest.raises(RuntimeError, match="batch_size=1"):
        routed(small, tokenizer).loglikelihood(task.leaves[0].instances)


# ---------------------------------------------------------------- tasks


def test_seed_tasks_on_local_files(settings, small, tokenizer):
    lines = []
    items = {
        t.name: t for t in load_tasks(["arc_challenge", "hellaswag", "gsm8k"], settings=settings, say=lines.append)
    }
    assert {n: (t.shots, t.default_shots, t.source) for n, t in items.items()} == {
        "arc_challenge": (5, 0, "local"),
        "hellaswag": (3, 0, "local"),
        "gsm8k": (8, 5, "local"),
    }
    text = "\n".join(lines)
    assert (
        "gsm8k: 8 shots requested, the task's default is 5" in text
        and "no split 'train' on disk" in text
        and "there are 3 examples" in text
    )
    assert len(items["hellaswag"].leaves[0].eval_docs) == 12 and str(items["gsm8k"].version) == "3.0"
    question = items["gsm8k"].leaves[0].doc_to_text(items["gsm8k"].leaves[0].eval_docs[0])
    assert question == "Question: What is 1 and 1?\nAnswer:"
    result = score_task(routed(small, tokenizer), items["hellaswag"], say=silent)
    assert result["clusters"] == 6 and result["n"] == 12 and result["chance"] == 0.25 and result["interval"] != "wilson"


def test_mmlu_leaves_are_filtered_by_subject(settings):
    manager = Tasks(["mmlu/default"], settings=settings)
    tasks = manager.load(["mmlu_anatomy", "mmlu_astronomy"])["tasks"]
    assert {n: len(t.eval_docs) for n, t in tasks.items()} == {"mmlu_anatomy": 4, "mmlu_astronomy": 4}
    assert (
        all(d["subject"] == "anatomy" for d in tasks["mmlu_anatomy"].fewshot_docs())
        and local_folder("cais/mmlu", "anatomy", settings.data_dir)[1] == "anatomy"
    )
    with pytest.raises(FileNotFoundError, match="mmlu_virology|no rows"):
        manager.load("mmlu_virology")


def test_unknown_and_missing_data(settings):
    with pytest.raises(FileNotFoundError, match="winogrande"):
        load_tasks(["winogrande"], settings=settings)
    (settings.data_dir / "gsm8k" / "main" / "test.jsonl").write_text('{"question": "a"}\n{"que')
    with pytest.raises(ValueError, match="line 2"):
        load_tasks(["gsm8k"], settings=settings, say=silent)
    with pytest.raises(ValueError, match="did you mean 'hellaswag'"):
        Tasks([], settings=settings).match_tasks(["helaswag"])
    assert "gsm8k" in unknown_task("gms8k", ["gsm8k_cot"]) and Tasks([], settings=settings).match_tasks(
        ["embedded_*"]
    ) == sorted(EMBEDDED_TASKS)
    with pytest.raises(ValueError, match="shots"):
        load_tasks(["embedded_word"], -1)


def test_examples_never_come_from_scored_rows():
    rows, note = with_examples({"test": list(range(10))}, "test", "train")
    assert rows == {"test": list(range(8)), "train": [8, 9]} and "last 2 rows" in note
    assert with_examples({"test": [1], "train": [2]}, "test", "train") == ({"test": [1], "train": [2]}, "")


# ---------------------------------------------------------------- code


def test_code_runs_only_when_allowed(monkeypatch, settings, small, tokenizer):
    monkeypatch.setattr(task_module, "program_passes", lambda *a, **k: pytest.fail("code was run"))
    lines, lm = [], routed(small, tokenizer, max_length=128)
    for item in load_tasks(["humaneval", "mbpp"], settings=settings, say=lines.append):
        found = score_task(lm, item, 2, max_answer=4, settings=settings, say=silent)
        assert found["score"] is None and found["interval"] == "not scored" and len(found["answers"]) == 2
    assert (
        sum("not scored" in line for line in lines) == 2 and "mbpp: 0 shots requested, the task's default is 3" in lines
    )
    assert not [m for m in sys.modules if m in ("lm_eval.tasks.humaneval.utils", "lm_eval.tasks.mbpp.utils")]


def test_allowed_code_is_scored(settings, small, tokenizer, monkeypatch):
    right = {"humaneval": "    return 1\n", "mbpp": "def f(): return 1"}
    for item in load_tasks(["humaneval", "mbpp"], settings=allowing(settings), say=silent):
        monkeypatch.setattr(
            HFLM,
            "generate_until",
            lambda self, requests, disable_tqdm=False: [
                right[item.name] if i else "    return 2\n" for i in range(len(requests))
            ],
        )
        lm = HFLM(small, tokenizer=tokenizer)
        found = score_task(lm, item, settings=allowing(settings), say=silent)
        assert found["score"] == pytest.approx(2 / 3) and found["documents"]["score"] == [0, 1, 1]


def test_programs_cannot_pass_by_leaving():
    assert program_passes("print(1)")
    for program in ("import os; os._exit(0)", "raise SystemExit", "1/0", "def f(:", "import time; time.sleep(9)"):
        assert not program_passes(program, seconds=1)


def test_the_judge_is_gone_after_the_block(settings):
    import evaluate

    load = evaluate.load
    with code_judge(settings) as judge:
        assert evaluate.load("code_eval") is judge
    assert evaluate.load is load


# ---------------------------------------------------------------- comparison


def result(scores, clusters=None, task="arc_challenge", **more):
    n = len(scores)
    documents = dict(
        id=[f"d{i}" for i in range(n)],
        hash=[f"h{i}" for i in range(n)],
        cluster=clusters or [f"d{i}" for i in range(n)],
        score=scores,
    )
    return {
        "task": task,
        "group": "reasoning",
        "version": 1.0,
        "shots": 5,
        "default_shots": 0,
        "metric": "acc_norm,none",
        "source": "local",
        "chance": 0.25,
        "notes": [],
        "score": sum(scores) / n,
        "low": 0,
        "high": 1,
        "n": n,
        "clusters": n,
        "interval": "wilson",
        "seconds": 1,
        "model": {},
        "documents": documents,
    } | more


def test_pairs_decide_what_averages_cannot():
    generator = torch.Generator().manual_seed(0)
    base = (torch.rand(400, generator=generator) < 0.5).tolist()
    better = [bool(b) or i % 12 == 0 for i, b in enumerate(base)]
    summary = compare_benchmarks(
        {
            "base": {"arc_challenge": result([float(b) for b in base])},
            "better": {"arc_challenge": result([float(b) for b in better])},
        }
    )
    (row,) = summary["differences"]
    assert (
        row["difference"] == pytest.approx(sum(better) / 400 - sum(base) / 400)
        and row["low"] > 0
        and row["verdict"] == "better"
        and row["changed"] < 40
    )
    assert 0 < row["mde"] < 0.1


def test_clusters_widen_an_interval():
    scores = [float(c % 2) for c in range(20) for _ in range(20)]
    wide, narrow = (
        compare_benchmarks({"a": {"t": result([0.0] * 400, k, "t")}, "b": {"t": result(scores, k, "t")}})[
            "differences"
        ][0]
        for k in ([f"c{i // 20}" for i in range(400)], None)
    )
    assert wide["high"] - wide["low"] > 3 * (narrow["high"] - narrow["low"]) and wide["clusters"] == 20


def test_few_changes_give_a_finite_interval():
    one = [0.0] * 39 + [1.0]
    (row,) = compare_benchmarks({"a": {"t": result([0.0] * 40, task="t")}, "b": {"t": result(one, task="t")}})[
        "differences"
    ]
    assert row["method"] == "t" and row["high"] < 0.2 and row["verdict"] == "undecided"
    (same,) = compare_benchmarks({"a": {"t": result(one, task="t")}, "b": {"t": result(one, task="t")}})["differences"]
    assert same["difference"] == 0 and same["p"] == 1 and same["changed"] == 0


def test_what_is_missing_is_said(tmp_path):
    unscored = result([1.0, 0.0], task="humaneval") | {
        "score": None,
        "notes": ["humaneval: answers are generated but not scored, because ..."],
    }
    summary = write_comparison(
        {
            "ours": {"arc_challenge": result([1.0, 0.0]), "humaneval": unscored},
            "llama3": {"arc_challenge": {"task": "arc_challenge", "error": "gated"}},
        },
        tmp_path / "deep" / "comparison_summary.json",
    )
    assert {(m["model"], m["task"], m["why"][:12]) for m in summary["missing"]} == {
        ("llama3", "arc_challenge", "gated"),
        ("ours", "humaneval", "humaneval: a"),
        ("llama3", "humaneval", "was not run"),
    }
    assert (
        summary["differences"] == []
        and json.loads((tmp_path / "deep" / "comparison_summary.json").read_text()) == summary
    )
    assert not math.isnan(summary["tasks"]["arc_challenge"]["scores"]["ours"]["score"])


def test_results_that_differ_are_not_paired():
    other = result([1.0, 0.0]) | {"shots": 4}
    assert (
        compare_benchmarks({"a": {"t": result([1.0, 1.0])}, "b": {"t": other}})["differences"][0]["verdict"]
        == "not comparable"
    )
    changed = result([1.0, 0.0])
    changed["documents"]["hash"] = ["h0", "x"]
    with pytest.raises(ValueError, match="other texts"):
        paired_scores(result([1.0, 1.0]), changed)
    with pytest.raises(ValueError, match="at least 2"):
        paired_scores(result([1.0]), result([1.0]))
    with pytest.raises(ValueError, match="'ours'"):
        compare_benchmarks({"ours": {}}, reference="our")


def test_finished_tasks_survive_a_failure(tmp_path, small, tokenizer, monkeypatch):
    lm, score = routed(small, tokenizer), compare.score_task

    def fails(lm, item, *a):
        return (
            score(lm, item, *a)
            if item.name == "embedded_word"
            else (_ for _ in ()).throw(RuntimeError("the GPU's memory is full"))
        )

    monkeypatch.setattr(compare, "score_task", fails)
    with pytest.raises(RuntimeError, match="embedded_choice.*memory is full.*finished"):
        run_benchmarks(lm, ["embedded_word", "embedded_choice"], tmp_path, limit=4, say=silent)
    kept = run_benchmarks(lm, ["embedded_word", "embedded_choice"], tmp_path, limit=4, say=silent, keep_going=True)
    assert (
        kept["embedded_choice"]["error"].startswith("the GPU")
        and (tmp_path / "commonsense" / "embedded_word_results.json").is_file()
    )
    monkeypatch.setattr(
        compare, "score_task", lambda *a: pytest.fail("done again") if a[1].name == "embedded_word" else score(*a)
    )
    done = run_benchmarks(lm, ["embedded_word", "embedded_choice"], tmp_path, limit=4, say=silent)
    assert done["embedded_word"] == kept["embedded_word"] and compare_benchmarks({"a": tmp_path})["groups"] == [
        "commonsense",
        "knowledge",
    ]
    monkeypatch.setattr(compare, "score_task", score)
    assert run_benchmarks(lm, ["embedded_word"], tmp_path, limit=5, say=silent)["embedded_word"]["n"] == 5


def test_seed_groups():
    assert {
        g: [n for n in SEED_TASKS if BENCHMARKS[n].group == g]
        for g in ("knowledge", "reasoning", "commonsense", "coding")
    } == {
        "knowledge": ["mmlu"],
        "reasoning": ["gsm8k", "arc_challenge"],
        "commonsense": ["hellaswag", "winogrande"],
        "coding": ["humaneval", "mbpp"],
    }
    assert {n: BENCHMARKS[n].shots for n in SEED_TASKS} == dict(
        mmlu=5, gsm8k=8, arc_challenge=5, hellaswag=5, winogrande=5, humaneval=0, mbpp=0
    )


# ---------------------------------------------------------------- command line


def test_command_line_scores_an_embedded_task(tmp_path, small, tokenizer, monkeypatch, capsys):
    small.save_pretrained(tmp_path / "m"), tokenizer.save_pretrained(tmp_path / "m")
    original = compare.Tasks
    monkeypatch.setattr(
        compare,
        "Tasks",
        type("NoIndex", (original,), {"__init__": lambda self, *a, **k: original.__init__(self, [], **k)}),
    )  # without the index of all tasks, which takes many seconds
    code = main(
        [
            "run",
            "--model",
            "routed",
            "--model_args",
            f"pretrained={tmp_path / 'm'},router=topk,k=1",
            "--device",
            "cpu",
            "--tasks",
            "embedded_word",
            "--limit",
            "3",
            "--output_path",
            str(tmp_path / "out"),
        ]
    )
    out = capsys.readouterr().out
    assert code == 0 and "embedded_word" in out
    (file,) = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(file.read_text())["config"]["certificates"]["loglikelihood"]["asked"] == 1
    assert main(["run", "--model", "routed", "--tasks", "embeded_word"]) == 1
    assert "did you mean 'embedded_word'" in capsys.readouterr().err


def test_lm_eval_can_derive_from_our_task_manager(settings):
    import lm_eval.tasks

    theirs = lm_eval.tasks.TaskManager
    with compare._our_tasks(settings):

        class Derived(lm_eval.tasks.TaskManager):
            pass

        assert issubclass(Derived, Tasks)
    assert lm_eval.tasks.TaskManager is theirs


SEVERAL = """import json, sys
from moe_routing.harness.compare import run_benchmarks
from moe_routing.harness.routed import RoutedLM
from moe_routing.harness.tasks import load_tasks
folder, out = sys.argv[1:]
lm = RoutedLM(folder, router="topk", k=2, device="cpu", batch_size=4, progress=False)
assert lm.world_size == 2
found = run_benchmarks(lm, ["embedded_choice"], out, limit=9, say=lambda line: None)
if lm.rank == 0: assert found["embedded_choice"]["n"] == 9
"""


def test_several_processes_share_the_documents(tmp_path, small, tokenizer):
    "As `accelerate launch` starts them, here on CPUs: each document is answered once, scores are those of one process."
    folder = tmp_path / "m"
    small.save_pretrained(folder), tokenizer.save_pretrained(folder)
    (tmp_path / "several.py").write_text(SEVERAL)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            "2",
            str(tmp_path / "several.py"),
            str(folder),
            str(tmp_path / "out"),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, "\n".join(l for l in done.stderr.splitlines() if "Error" in l) + done.stderr[-600:]
    several = json.loads(next((tmp_path / "out").rglob("*_results.json")).read_text())
    alone = run_benchmarks(
        RoutedLM(str(folder), router="topk", k=2, device="cpu", batch_size=4, progress=False),
        ["embedded_choice"],
        tmp_path / "alone",
        limit=9,
        say=lambda line: None,
    )["embedded_choice"]
    order = lambda r: sorted(zip(r["documents"]["id"], r["documents"]["hash"], r["documents"]["score"]))
    assert order(several) == order(alone) and several["score"] == alone["score"]
