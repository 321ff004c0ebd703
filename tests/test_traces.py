"""Traces: every column against the model, odd shapes, guards, damage, full disks, memory."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import OlmoeConfig, OlmoeForCausalLM

from moe_routing.traces import recorder as traces
from moe_routing.patching.patch import route
from moe_routing.routers.pvalue import fit_null
from moe_routing.routers.zoo import make_rule
from moe_routing.traces.collect import write_logs
from moe_routing.traces.format import Trace, pack, unpack
from moe_routing.traces.recorder import Recorder, record


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return OlmoeForCausalLM(
        OlmoeConfig(
            vocab_size=61,
            hidden_size=16,
            intermediate_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_experts=8,
            num_experts_per_tok=2,
            max_position_embeddings=64,
            pad_token_id=0,
            eos_token_id=60,
        )
    ).eval()


def batches(n, left=False):
    g = torch.Generator().manual_seed(1)
    for i in range(n):
        ids, lengths = torch.randint(1, 60, (3, 10), generator=g), torch.tensor([10, 6, 3])
        mask = (torch.arange(10) < lengths[:, None]).long()
        yield {
            "input_ids": ids,
            "attention_mask": mask.flip(1) if left else mask,
            "sample": [3 * i, 3 * i + 1, 3 * i + 2],
            "texts": ["a" * 200, "b", "c"],
        }


@pytest.mark.parametrize("left", [False, True])
def test_columns_are_what_the_model_did(model, tmp_path, left):
    rule = make_rule("top_p", p=0.5, max_k=5)
    trace = record(
        model, batches(2, left), tmp_path, keep=("logits", "hidden"), rule=rule, hidden_layers=[1], shard_tokens=5
    )
    assert trace.tokens == 38 and len(trace.head["shards"]) == 2 and trace.head["complete"]
    (first, *_), columns = list(trace), list(trace.columns())
    for layer in range(2):
        again = rule(first[layer].logits)
        assert torch.equal(again.experts[:, : first[layer].experts.shape[1]], first[layer].experts) and torch.allclose(
            again.dense(), first[layer].dense(), atol=1e-6
        )
        first[layer].validate()
    assert columns[0]["hidden"].shape == (19, 1, 16)
    gate = model.model.layers[1].mlp.gate
    assert torch.allclose(columns[0]["hidden"][:, 0] @ gate.weight.T, first[1].logits, atol=1e-5)
    batch = next(batches(1, left))
    assert columns[0]["token_id"].tolist() == batch["input_ids"][batch["attention_mask"].bool()].tolist()
    samples = list(trace.samples())
    assert [s["tokens"] for s in samples] == [10, 6, 3] * 2 and len(samples[0]["preview"]) == 100
    with torch.inference_mode():
        text = batch["input_ids"][:1]
        if not left:
            with route(model, rule):
                loss = model(input_ids=text, labels=text).loss
            assert samples[0]["loss"] == pytest.approx(float(loss), abs=1e-4)


@pytest.mark.parametrize(
    "E, dtype", [(8, torch.uint8), (255, torch.uint8), (256, torch.uint16), (70_000, torch.uint32)]
)
def test_ids_take_the_smallest_type_that_holds_the_mark_of_an_unused_slot(E, dtype):
    experts, weights = torch.tensor([[[E - 1, E]], [[0, E - 1]]]), torch.tensor([[[0.5, 0.0]], [[0.4, 0.3]]])
    packed = pack(experts, weights, E)
    assert packed["experts"].dtype == dtype
    assert torch.equal(unpack(packed, 1, E)[0], experts) and torch.equal(unpack(packed, 1, E)[1], weights)


@pytest.mark.parametrize("counts", [[0, 0], [0, 1], [4, 0]])
def test_empty_slots_survive_packing(counts):
    T, K, E = len(counts), 4, 6
    unused = torch.arange(K) >= torch.tensor(counts)[:, None, None]
    experts = torch.arange(K).expand(T, 1, K).masked_fill(unused, E)
    weights = torch.full((T, 1, K), 0.25).masked_fill(unused, 0)
    back = unpack(pack(experts, weights, E), 1, E)
    width = max(max(counts), 1)
    assert torch.equal(back[0], experts[..., :width]) and torch.equal(back[1], weights[..., :width])


def observed(model, folder, change):
    "Run one batch with a recorder that is handed changed observations."
    recorder = Recorder(folder, model)
    batch = next(batches(1))
    with route(model, None, observe=lambda c, r, h: change(recorder, c, r, h)), torch.inference_mode():
        recorder.start(batch["sample"], batch["texts"])
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        recorder.end()


def test_guards(model, tmp_path):
    def probabilities(recorder, context, routing, hidden):
        routing.logits = routing.logits.softmax(-1)
        recorder.observe(context, routing, hidden)

    def wrong_k(recorder, context, routing, hidden):
        routing.experts[:, -1] = 8
        recorder.observe(context, routing, hidden)

    def missing(recorder, context, routing, hidden):
        if context.layer:
            recorder.observe(context, routing, hidden)

    def last_missing(recorder, context, routing, hidden):
        if not context.layer:
            recorder.observe(context, routing, hidden)

    for i, (change, words) in enumerate(
        [
            (probabilities, "probabilities"),
            (wrong_k, "wrong k"),
            (missing, "missing layers"),
            (last_missing, "missing layers"),
        ]
    ):
        with pytest.raises((ValueError, RuntimeError), match=words):
            observed(model, tmp_path / str(i), change)
    with pytest.raises(RuntimeError, match="whose it is"):
        recorder = Recorder(tmp_path / "nobody", model)
        with route(model, None, observe=recorder.observe):
            model(input_ids=torch.ones(1, 3, dtype=torch.long))


def test_padding_that_is_counted_is_found(model, tmp_path, monkeypatch):
    monkeypatch.setattr(
        traces, "_valid_rows", lambda self, context: torch.ones(len(context.sequence), dtype=torch.bool)
    )
    with pytest.raises(RuntimeError, match="padding counted"):
        record(model, batches(1), tmp_path)


def test_a_training_model_and_unknown_columns_are_refused(model, tmp_path):
    with pytest.raises(ValueError, match="hidden"):
        record(model, batches(1), tmp_path, keep=("hiden",))
    with pytest.raises(ValueError, match="p_values"):
        record(model, batches(1), tmp_path / "p", keep=("p_values",), rule=make_rule("topk"))
    model.train()
    try:
        with pytest.raises(ValueError, match="eval"):
            record(model, batches(1), tmp_path / "train")
    finally:
        model.eval()


def test_a_folder_of_another_trace_is_not_continued(model, tmp_path):
    record(model, batches(1), tmp_path)
    with pytest.raises(ValueError, match="something else"):
        record(model, batches(1), tmp_path, rule=make_rule("topk", k=1))
    with pytest.raises(ValueError, match="no trace.json"):
        Trace.open(tmp_path / "nothing")
    (tmp_path / "trace.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        Trace.open(tmp_path)


def test_a_full_disk_keeps_what_was_written(model, tmp_path, monkeypatch):
    calls = []

    def full(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return save(*args, **kwargs)

    save = traces.save_file
    monkeypatch.setattr(traces, "save_file", full)
    with pytest.raises(OSError, match="shards before it are kept"):
        record(model, batches(4), tmp_path, shard_tokens=1)
    half = Trace.open(tmp_path)
    assert half.tokens == 19 and sum(len(b[0].experts) for b in half) == 19 and not list(tmp_path.glob("*.part"))
    monkeypatch.undo()
    whole = record(model, batches(4), tmp_path, shard_tokens=1)
    assert whole.tokens == 4 * 19 and [s["id"] for s in whole.samples()] == list(range(12))


def test_a_resumed_trace_equals_one_made_in_one_go(model, tmp_path):
    one = record(model, batches(3), tmp_path / "one", shard_tokens=1)

    def cut():
        for i, batch in enumerate(batches(3)):
            if i == 2:
                raise KeyboardInterrupt
            yield batch

    with pytest.raises(KeyboardInterrupt):
        record(model, cut(), tmp_path / "two", shard_tokens=1)
    two = record(model, batches(3), tmp_path / "two", shard_tokens=1)
    assert [s["sha256"] for s in one.head["shards"]] == [s["sha256"] for s in two.head["shards"]]


def test_generated_rows_belong_to_their_sequences(model, tmp_path):
    batch = next(batches(1, left=True))
    trace = record(model, [batch], tmp_path, generate={"max_new_tokens": 5, "do_sample": False})
    samples = {s["id"]: s["tokens"] for s in trace.samples()}
    with torch.inference_mode():
        out = model.generate(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=5, do_sample=False
        )
    for row, (prompt, i) in enumerate(zip(batch["attention_mask"].sum(1).tolist(), batch["sample"])):
        new = out[row, 10:].tolist()
        length = new.index(60) + 1 if 60 in new else len(new)
        assert samples[i] == prompt + (length if length < len(new) else len(new) - 1)


def test_logs_hold_everything_the_seed_asks_for(model, tmp_path):
    null = fit_null(torch.randn(300, 2, 8, generator=torch.Generator().manual_seed(0)), "kde")
    rule = make_rule("bh", alpha=0.5, max_k=4, null=null)
    trace = record(model, batches(2), tmp_path / "trace", keep=("logits",), rule=rule)
    files = write_logs(
        trace, tmp_path / "logs", "4experts_bh_a050", "demo", "bh", 4, 0.5, {"x": 1.0}, 2.0, null, internal_samples=None
    )
    summary, internal = (json.loads(f.read_text()) for f in files)
    assert set(summary) == {"config", "strategy", "k_or_max_k", "alpha", "num_experts", "dataset", "metrics", "summary"}
    assert summary["summary"] == {"total_samples": 6, "total_tokens": 38, "elapsed_time_seconds": 2.0}
    assert set(internal["aggregate_stats"]) == {
        "per_layer_avg_experts",
        "per_layer_std_experts",
        "per_layer_counts",
        "expert_usage_counts",
        "total_ceiling_hits",
        "total_floor_hits",
        "all_expert_counts",
    }
    assert [s["sample_id"] for s in internal["samples"]] == list(range(6))
    total = 0
    for (sample, block), row in zip(trace.by_sample(), internal["samples"]):
        assert sample["id"] == row["sample_id"] and len(row["layers"]) == 2
        for layer, (routing, log) in enumerate(zip(block, row["layers"])):
            ids = [[e for e in slots if e >= 0] for slots in log["selected_experts"]]
            assert (
                ids == [[e for e in slots if e < 8] for slots in routing.experts.tolist()]
                and list(map(len, ids)) == log["expert_counts"] == routing.counts.tolist()
            )
            assert log["expert_weights"] == pytest.approx(routing.weights[routing.used].tolist(), rel=6e-4)
            assert torch.allclose(
                torch.tensor(log["p_values_sample"]),
                null.p_values(routing.logits[:5], layer).float(),
                rtol=1e-3,
                atol=1e-6,
            )
            assert log["router_logits_shape"] == [row["num_tokens"], 8] and len(log["router_logits_sample"]) == min(
                5, row["num_tokens"]
            )
            assert log["layer_stats"]["floor_hits"] == sum(c <= 1 for c in log["expert_counts"])
            total += sum(log["expert_counts"])
    assert sum(internal["aggregate_stats"]["expert_usage_counts"]) == total
    limited = json.loads(
        write_logs(trace, tmp_path / "logs", "limited", "demo", "bh", 4, 0.5, {}, 1.0, internal_samples=2)[
            1
        ].read_text()
    )
    assert (
        len(limited["samples"]) == 2
        and limited["internal_samples"] == 2
        and limited["aggregate_stats"] == internal["aggregate_stats"]
    )


def test_logs_that_do_not_fit_are_refused_before_they_are_written(model, tmp_path, monkeypatch):
    trace = record(model, batches(1), tmp_path / "trace", keep=("logits",))
    monkeypatch.setattr(traces.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1000})())
    with pytest.raises(OSError, match="lower internal_samples"):
        write_logs(trace, tmp_path / "logs", "c", "d", "topk", 2, None, {}, 1.0)
    assert not list((tmp_path / "logs").iterdir())


def test_shards_are_plain_safetensors(model, tmp_path):
    record(model, batches(1), tmp_path)
    columns = load_file(tmp_path / "shard-00000.safetensors")
    assert set(columns) == {"token_id", "position", "sample", "experts", "weights"} and columns["experts"].shape == (
        19,
        2,
        2,
    )
    assert not [p for p in tmp_path.iterdir() if p.suffix not in (".json", ".safetensors")]
