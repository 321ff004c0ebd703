"""Bad input through the public names: one clear error that names value and way out; nothing finished is lost."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, OlmoeConfig, OlmoeForCausalLM

from moe_routing.traces.calibration import calibration_trace, matched_rule, resolve_source
from moe_routing.corpora import load_choices, load_text
from moe_routing.models.load import fingerprint, load_model
from moe_routing.patching.patch import route
from moe_routing.patching.probe import moe_layers
from moe_routing.routers.pvalue import fit_null
from moe_routing.routers.zoo import ROUTERS, make_rule
from moe_routing.runs.run import run_template
from moe_routing.traces.collect import write_logs
from moe_routing.traces.format import Trace
from moe_routing.traces.recorder import record

SIZES = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=16,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=4,
    initializer_range=0.3,
    pad_token_id=None,
    bos_token_id=None,
    eos_token_id=None,
)
IDS = torch.randint(3, 64, (4, 12), generator=torch.Generator().manual_seed(0))


def olmoe(seed=0, **changes):
    torch.manual_seed(seed)
    return OlmoeForCausalLM(OlmoeConfig(**{**SIZES, "num_experts": 16, "num_experts_per_tok": 4, **changes})).eval()


def gate_logits(model):
    seen = []
    with torch.no_grad(), route(model, None, observe=lambda context, routing, hidden: seen.append(routing.logits)):
        model(IDS)
    return torch.stack(seen, 1)


def null_of(model):
    return fit_null(gate_logits(model), model=fingerprint(model))


def forward(model, rule):
    with torch.no_grad(), route(model, rule) as patch:
        model(IDS)
    return patch.report()


@pytest.fixture(scope="module")
def model():
    return olmoe()


@pytest.fixture(scope="module")
def null(model):
    return null_of(model)


# routers and their parameters
@pytest.mark.parametrize(
    "params, words",
    [
        ({"alpha": 0}, ["alpha = 0", "(0, 1)"]),
        ({"alpha": 1.0}, ["alpha = 1.0", "(0, 1)"]),
        ({"alpha": float("nan")}, ["alpha = nan"]),
        ({"alpha": "much"}, ["alpha", "much"]),
        ({"min_k": 5}, ["min_k = 5", "max_k = 4"]),
        ({"min_k": 1.5}, ["min_k = 1.5", "whole number"]),
        ({"max_k": 2.5}, ["max_k = 2.5", "whole number"]),
        ({"max_k": None}, ["max_k", "number of experts"]),
        ({"max_k": 0}, ["max_k = 0"]),
        ({"alfa": 0.3}, ["'alfa'", "'alpha'"]),
        ({"null": None}, ["fit_null"]),
        ({"weigh": "nativ"}, ["'native'"]),
    ],
)
def test_parameters_of_a_rule(null, params, words):
    with pytest.raises(ValueError) as e:
        make_rule("bh", **{"alpha": 0.3, "max_k": 4, "null": null, **params})
    assert all(word in str(e.value) for word in words) and "tensor(" not in str(e.value) and len(str(e.value)) < 300


@pytest.mark.parametrize(
    "name, params, words",
    [
        ("bhh", {}, "'bh'"),
        ("topk", {"k": 2.5}, "k = 2.5 is not a whole number"),
        ("random", {"k": 2.5}, "k = 2.5"),
        ("topk", {"k": 0}, "k = 0"),
    ],
)
def test_routers_by_name(name, params, words):
    with pytest.raises(ValueError, match=words):
        make_rule(name, **params)


@pytest.mark.parametrize(
    "name, params",
    [
        ("bh", {"alpha": 0.3, "max_k": 17}),
        ("topk", {"k": 17}),
        ("random", {"k": 17}),
        ("top_p", {"p": 0.5, "max_k": 17}),
        ("hc", {"max_k": 17}),
    ],
)
def test_more_experts_than_there_are(model, null, name, params):
    rule = make_rule(name, **params, **({"null": null} if ROUTERS[name].needs_null else {}))
    with pytest.raises(ValueError, match="17.*16"):
        forward(model, rule)


# models and nulls
def test_a_null_of_another_model_of_the_same_shape(model, null):
    other = olmoe(seed=1)
    for name, params in (("bh", {"alpha": 0.3}), ("by", {"alpha": 0.3}), ("hc", {})):
        rule = make_rule(name, max_k=4, null=null, **params)
        assert forward(model, rule).asked >= 1
        with pytest.raises(ValueError, match="fitted for another model.*fit_null"):
            forward(other, rule)
        with pytest.raises(ValueError, match="fitted for another model"):
            route(other, [None, rule, None])
    unnamed = fit_null(gate_logits(model))  # whoever fits it without saying whose it is has to know
    assert forward(other, make_rule("bh", alpha=0.3, max_k=4, null=unnamed)).asked >= 1


@pytest.mark.parametrize(
    "changes, words",
    [({"num_hidden_layers": 2}, "MoE layers 3 instead of 2"), ({"num_experts": 8}, "experts 16 instead of 8")],
)
def test_a_null_of_another_shape_is_refused_before_the_forward(null, changes, words):
    with pytest.raises(ValueError, match=words):
        route(olmoe(**changes), make_rule("bh", alpha=0.3, max_k=4, null=null))


def test_models_without_moe_layers():
    dense = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    for call in (moe_layers, lambda m: route(m, None), lambda m: record(m, [], "never")):
        with pytest.raises(ValueError, match="LlamaForCausalLM has no MoE layer"):
            call(dense)
    for thing in ((dense, None), None, torch.nn.Linear(2, 2)):
        with pytest.raises(TypeError, match="a transformers model is needed.*load_model"):
            moe_layers(thing)
    assert not Path("never").exists()


# texts
def test_batches_without_tokens(model, tmp_path):
    with pytest.raises(ValueError, match="'a'.*leave empty texts out"):
        record(model, [{"input_ids": IDS[:1, :0], "sample": ["a"]}], tmp_path / "none")
    one = record(model, [{"input_ids": IDS[:1, :1]}], tmp_path / "one")
    assert [(s["tokens"], s["loss"]) for s in one.samples()] == [(1, None)]


@pytest.mark.parametrize("empty", [0, 1, 2])
def test_a_text_without_tokens_in_a_batch_takes_nobody_elses_rows(model, tmp_path, empty):
    mask = torch.ones(3, 12, dtype=torch.long)
    mask[empty] = 0
    batches = [
        {"input_ids": IDS[:3], "attention_mask": mask, "sample": list("abc")},
        {"input_ids": IDS[3:], "sample": ["d"]},
    ]
    trace = record(model, batches, tmp_path, shard_tokens=1)
    found = {sample["id"]: block for sample, block in trace.by_sample()}
    expected = {name: 0 if i == empty else 12 for i, name in enumerate("abcd")}
    assert (
        {name: len(block[0].experts) for name, block in found.items()}
        == expected
        == {s["id"]: s["tokens"] for s in trace.samples()}
    )
    alone = record(model, [{"input_ids": IDS[3:]}], tmp_path / "alone")
    assert torch.equal(found["d"][2].experts, next(iter(alone))[2].experts)


# logits
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_not_finite(null, tmp_path, bad):
    broken = olmoe()
    broken.model.layers[1].mlp.gate.weight.data[3, 2] = bad
    for name in ("topk", "bh", "random"):
        rule = make_rule(
            name, **ROUTERS[name].example, **({"null": fit_null(gate_logits(olmoe()))} if name == "bh" else {})
        )
        with pytest.raises(ValueError, match="NaN or infinite, first in row 0 of layer 1: look for"):
            forward(broken, rule)
    with pytest.raises(ValueError, match="NaN or infinite, first in token 0 of the batch, layer 1: look for"):
        record(broken, [{"input_ids": IDS}], tmp_path)
    assert not (tmp_path / "trace.json").exists()


def test_a_trace_before_the_fault_is_kept(tmp_path):
    breaks = olmoe()

    def batches():
        yield {"input_ids": IDS[:2]}
        breaks.model.layers[1].mlp.gate.weight.data[3, 2] = float("nan")
        yield {"input_ids": IDS[2:]}

    with pytest.raises(ValueError, match="NaN"):
        record(breaks, batches(), tmp_path, shard_tokens=1)
    kept = Trace.open(tmp_path)
    assert kept.tokens == 24 and not kept.head["complete"] and len(list(kept)) == 1


# traces
def test_generating_with_several_end_tokens(tmp_path):
    model, prompt = olmoe(), {"input_ids": IDS[:2, :3]}
    how = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with torch.inference_mode():
        free = model.generate(input_ids=IDS[:2, :3], attention_mask=torch.ones(2, 3, dtype=torch.long), **how)
    stop = int(free[0, 3])  # the first new token of sequence 0 ends it
    assert stop not in free[1, 3:].tolist()
    for number, ends in enumerate((stop, [stop, 63 if 63 not in free[1] else 62])):
        model.generation_config.eos_token_id = ends
        trace = record(model, [prompt], tmp_path / str(number), generate=how)
        assert [s["tokens"] for s in trace.samples()] == [4, 8], ends


@pytest.mark.parametrize("more", [{"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}])
def test_generating_more_sequences_than_prompts(model, tmp_path, more):
    with pytest.raises(ValueError, match="4 sequences, but start\\(\\) named 2.*repeat the prompts"):
        record(model, [{"input_ids": IDS[:2]}], tmp_path, generate={"max_new_tokens": 2, "pad_token_id": 0, **more})


def test_going_on_with_other_batches_records_nothing_twice(model, tmp_path):
    def cut_off():
        yield {"input_ids": IDS[:2], "sample": [0, 1]}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        record(model, cut_off(), tmp_path, shard_tokens=1)
    trace = record(
        model,
        [{"input_ids": IDS[:3], "sample": [0, 1, 2]}, {"input_ids": IDS[3:], "sample": [3]}],
        tmp_path,
        shard_tokens=1,
    )
    assert [s["id"] for s in trace.samples()] == [0, 1, 2, 3] and trace.tokens == 48
    assert torch.equal(torch.cat([c["token_id"] for c in trace.columns()]).long(), IDS.flatten())


def test_the_way_out_of_a_damaged_shard_works(model, tmp_path):
    batches = [{"input_ids": IDS[i : i + 2], "sample": [i, i + 1]} for i in (0, 2)]
    trace = record(model, batches, tmp_path / "trace", keep=("logits",), shard_tokens=1)
    shard = tmp_path / "trace" / "shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    for read in (
        list,
        lambda t: list(t.by_sample()),
        lambda t: list(t.samples()),
        Trace.logits,
        lambda t: write_logs(t, tmp_path, "c", "d", "topk", 4, None, {}, 1.0),
    ):
        with pytest.raises(
            ValueError,
            match="shard-00001.safetensors is missing or damaged.*delete the folder and record it again.*skip_damaged",
        ):
            read(trace)
    assert not list(tmp_path.glob("*.json"))
    left = Trace.open(tmp_path / "trace", skip_damaged=True)
    assert [s["id"] for s, _ in left.by_sample()] == [0, 1]
    shutil.rmtree(tmp_path / "trace")
    assert len(list(record(model, batches, tmp_path / "trace", keep=("logits",), shard_tokens=1))) == 2


def test_a_negative_number_of_samples_is_no_number_of_samples(model, tmp_path):
    trace = record(model, [{"input_ids": IDS}], tmp_path / "trace")
    with pytest.raises(ValueError, match="internal_samples = -1"):
        write_logs(trace, tmp_path / "logs", "c", "d", "topk", 4, None, {}, 1.0, internal_samples=-1)


# a full disk: files may not grow beyond a limit, which the operating system enforces as it does a full disk
def test_a_full_disk(tmp_path):
    code = f"""
import resource, signal, sys, torch
sys.path.insert(0, "tests")
from test_bad_input import *
from types import SimpleNamespace
import moe_routing.traces.recorder as traces
model, folder = olmoe(), Path({str(tmp_path)!r})
null, trace = null_of(model), record(model, [{{"input_ids": IDS}}], folder / "whole", keep=("logits",))
resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))
def says(call):
    try: call()
    except OSError as e: print(str(e).replace("\\n", " "))
batches = [{{"input_ids": IDS[i:i + n]}} for i, n in ((0, 1), (1, 3))]
says(lambda: record(model, batches, folder / "cut", keep=("logits",), shard_tokens=1))
says(lambda: null.save(folder / "null.safetensors"))
traces.shutil.disk_usage = lambda path: SimpleNamespace(free=2**40)
says(lambda: write_logs(trace, folder / "logs", "c", "d", "topk", 4, None, {{}}, 1.))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    lines = out.stdout.splitlines()
    assert len(lines) == 3, out.stderr[-2000:]
    assert "shard-00001" in lines[0] and "the 1 shards before it are kept" in lines[0]
    assert "null.safetensors" in lines[1] and "free some space" in lines[1]
    assert "c_d_internal_routing.json" in lines[2] and "the trace is kept" in lines[2]
    assert len(list(Trace.open(tmp_path / "cut"))) == 1 and not list((tmp_path / "logs").iterdir())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cut", "logs", "whole"]  # no half file


# data and models by name
@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: load_text("wikitxt"), "'wikitext'"),
        (lambda: load_choices("helaswag"), "'hellaswag'"),
        (lambda: load_text("wikitext", source="embeded"), "'embedded'"),
        (lambda: load_text("wikitext", limit=0), "limit = 0"),
        (lambda: load_model("tinny"), "'tiny'"),
        (lambda: load_model("someone/nowhere-1B"), "someone/nowhere-1B.*network.*'tiny'"),
        (lambda: load_text("someone/nowhere", source="hub"), "someone/nowhere.*network.*embedded"),
        (lambda: resolve_source("embeded", "tiny"), "'embedded'"),
    ],
)
def test_names(call, words):
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        call()


def test_calibration_is_recorded_again_when_its_texts_change(tmp_path, monkeypatch):
    import moe_routing.traces.calibration as calibration

    model, tokenizer = load_model("tiny")
    texts = [{"id": i, "text": f"text number {i} of many"} for i in range(6)]
    monkeypatch.setattr(calibration, "load_calibration", lambda source, limit: texts[:limit])
    first = calibration_trace(model, tokenizer, texts=4, cache_dir=tmp_path)
    assert calibration_trace(model, tokenizer, texts=4, cache_dir=tmp_path).folder == first.folder
    texts[2]["text"] = "a text that was put there later"
    second = calibration_trace(model, tokenizer, texts=4, cache_dir=tmp_path)
    assert second.folder != first.folder and [s["preview"] for s in second.samples()][2] == texts[2]["text"]
    with pytest.raises(ValueError, match="'topk'.*top_p"):
        matched_rule("topk", make_rule("topk", k=2), second.logits(), max_k=8)


# the template
SMALL = dict(model="tiny", steps=1500, limit=2, max_length=32, second_run_samples=0, calibration_texts=8, logs=False)


def test_the_template_refuses_before_anything_is_loaded(tmp_path):
    with pytest.raises(ValueError, match="unknown parameter 'alfa'.*'alpha'"):
        run_template("evaluate_router", {**SMALL, "alfa": 0.3}, tmp_path / "run")
    assert not (tmp_path / "run" / "run.json").exists()


@pytest.mark.parametrize("params, words", [({"router": "bhh"}, "unknown router 'bhh': did you mean 'bh'")])
def test_the_template_names_the_mistake_and_keeps_a_record(tmp_path, params, words):
    with pytest.raises(RuntimeError, match=words):
        run_template("evaluate_router", {**SMALL, **params}, tmp_path / "run")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["status"] == "failed" and words in record["error"]


def test_the_template_takes_routers_whose_ceiling_is_their_own(tmp_path):
    record = run_template(
        "evaluate_router", {**SMALL, "router": "top_p", "p": 0.9}, tmp_path / "run"
    )  # no max_k: up to all experts
    assert record["status"] == "finished" and record["metrics"]["effective_k"] > 8
