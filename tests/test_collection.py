"""Collection.

Hidden states in every family, stored gates, splits, batches, streams of texts, kills, full disks, damage."""

import importlib
import json
import random
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from moe_routing.traces import format as reading
from moe_routing.traces import recorder as traces
from moe_routing.corpora import stream_text
from moe_routing.patching.patch import families, route, tiny_family
from moe_routing.patching.probe import moe_layers
from moe_routing.routers.zoo import make_rule
from moe_routing.traces.collect import collect
from moe_routing.traces.format import Trace, own_gate
from moe_routing.traces.recorder import Recorder, estimate_trace_bytes, record

EVERY = families()
collecting = importlib.import_module("moe_routing.traces.collect")  # `collect` is a function of this name, too


def family(name):
    return tiny_family(name, EVERY[name])


@pytest.fixture(scope="module")
def model():
    return family("olmoe")


def batches(n=2, rows=4, left=False, datasets=("a", "b"), documents=3):
    g = torch.Generator().manual_seed(1)
    for i in range(n):
        lengths = torch.randint(3, 13, (rows,), generator=g)
        lengths[0] = 12
        mask = (torch.arange(12) < lengths[:, None]).long()
        yield {
            "input_ids": torch.randint(3, 90, (rows, 12), generator=g),
            "attention_mask": mask.flip(1) if left else mask,
            "sample": range(i * rows, (i + 1) * rows),
            "dataset": [datasets[i % len(datasets)]] * rows,
            "document": [j % documents for j in range(rows)],
        }


def hooks(model):
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


# ---- hidden states


@pytest.mark.parametrize("name", ["olmoe", "qwen2_moe", "gpt_oss", "granitemoe", "deepseek_v2"])
@pytest.mark.parametrize("left", [False, True])
def test_pre_attention_is_what_enters_the_decoder_layer(name, left, tmp_path):
    model = family(name)
    batch, before = next(batches(1, left=left)), hooks(model)
    trace = record(model, [batch], tmp_path, keep=("hidden", "pre_attention"), losses=False)
    assert hooks(model) == before
    columns, valid = next(trace.columns()), batch["attention_mask"].bool()
    with torch.inference_mode():
        states = model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            output_hidden_states=True,
            use_cache=False,
        ).hidden_states
    numbers = [
        int(n.split(".")[2]) for n in trace.head["layers"]
    ]  # decoder layers of these families are model.layers.N
    assert len(numbers) == trace.num_layers == columns["pre_attention"].shape[1]
    for i, n in enumerate(numbers):
        assert torch.allclose(columns["pre_attention"][:, i], states[n][valid], atol=1e-5)
    assert columns["hidden"].shape == columns["pre_attention"].shape
    assert trace.head["hidden_size"] == columns["hidden"].shape[-1] and trace.head["hidden_dtype"] == "float32"


def test_chosen_layers_dtypes_and_bounds(model, tmp_path):
    trace = record(
        model,
        batches(),
        tmp_path / "a",
        keep=("hidden", "pre_attention"),
        hidden_layers=[2, 0],
        hidden_dtype="bfloat16",
        losses=False,
    )
    full = record(model, batches(), tmp_path / "b", keep=("hidden", "pre_attention"), losses=False)
    for one, all_ in zip(trace.columns(), full.columns()):
        for name in ("hidden", "pre_attention"):
            assert torch.equal(one[name], all_[name][:, [2, 0]].bfloat16())
    batch = next(trace.batches(("hidden", "experts"), by_layer=True, batch=100))
    assert set(batch["layer"].tolist()) == {0, 2} and batch["hidden"].dtype == torch.bfloat16
    whole = next(full.batches(("hidden", "experts"), batch=100))
    for hidden, experts, layer, sample in zip(batch["hidden"], batch["experts"], batch["layer"], batch["sample"]):
        assert torch.equal(hidden[:, 0], whole["hidden"][sample, :, layer].bfloat16()) and torch.equal(
            experts[:, 0], whole["experts"][sample, :, layer]
        )
    for bad, words in ((dict(hidden_layers=[4]), "hidden_layers = 4"), (dict(hidden_dtype="float61"), "float16")):
        with pytest.raises(ValueError, match=words):
            record(model, batches(), tmp_path / "c", keep=("hidden",), **bad)


def test_a_decoder_layer_that_hides_its_states_is_named_and_nothing_stays(tmp_path):
    class Inner(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, *, stream, **rest):
            return self.layer(stream, **rest)

    class Outer(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.blocks = nn.ModuleList([Inner(layer)])

        def forward(self, hidden_states, **rest):
            return self.blocks[0](stream=hidden_states, **rest)

        def __getattr__(self, name):
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(self.blocks[0].layer, name)

    model = family("olmoe")
    model.model.layers[1] = Outer(model.model.layers[1])
    before = hooks(model)
    with pytest.raises(
        ValueError, match=r"layers\.1\.blocks\.0 gets its hidden states neither.*stream.*leave 'pre_attention' out"
    ):
        record(model, batches(), tmp_path / "a", keep=("pre_attention",), losses=False)
    assert hooks(model) == before and "forward" not in vars(moe_layers(model)[0].gate)
    assert record(model, batches(), tmp_path / "b", keep=("hidden",), losses=False).tokens


def test_more_streams_than_tokens_are_refused(tmp_path):
    with pytest.raises(ValueError, match="entered with .* rows, its gate has"):
        record(family("deepseek_v4"), batches(1), tmp_path, keep=("pre_attention",), losses=False)


def test_a_recorder_that_does_not_listen_says_so(model, tmp_path):
    recorder = Recorder(tmp_path, model, keep=("pre_attention",))
    with (
        route(model, None, observe=recorder.observe),
        torch.inference_mode(),
        pytest.raises(RuntimeError, match="recorder.listen"),
    ):
        recorder.start([0], ["text"])
        model(input_ids=torch.ones(1, 3, dtype=torch.long))


def spoilt(model, value, module):
    "Hooks by which a module hands out states that are `value` for token id 5."

    def break_(module, args, kwargs):
        seen["ids"] = kwargs["input_ids"] if "input_ids" in kwargs else args[0]

    def put(module, args, output):
        states = output if isinstance(output, torch.Tensor) else output[0]
        states[seen["ids"] == 5] = value
        return output

    seen = {}
    return [model.model.register_forward_pre_hook(break_, with_kwargs=True), module.register_forward_hook(put)]


@pytest.mark.parametrize(
    "column, first, module", [("hidden", 3, "layers.3.post_attention_layernorm"), ("pre_attention", 2, "layers.1")]
)
def test_nan_in_hidden_states_is_named_and_what_was_written_is_kept(model, tmp_path, column, first, module):
    good, bad, last = list(batches(3))
    for b in (good, bad, last):
        b["input_ids"][b["input_ids"] == 5] = 6
    if column == "hidden":
        good["input_ids"][good["attention_mask"] == 0] = (
            5  # what padding holds is no concern; earlier in the model attention would carry it to tokens
        )
    bad["input_ids"][1, 1] = 5
    token = int(bad["attention_mask"][0].sum()) + 1
    handles = spoilt(model, float("nan"), model.model.get_submodule(module))
    try:
        with pytest.raises(
            ValueError,
            match=rf"{column} states are NaN or infinite, first in token {token} of the batch, layer {first}.*kept",
        ):
            record(model, [good, bad], tmp_path, keep=(column,), losses=False, shard_forwards=1)
    finally:
        for h in handles:
            h.remove()
    kept = Trace.open(tmp_path)
    assert kept.tokens == int(good["attention_mask"].sum()) and not kept.head["complete"]
    assert record(model, [good, last], tmp_path, keep=(column,), losses=False, shard_forwards=1).head["samples"] == 8


def test_states_beyond_the_range_of_their_storage_are_refused(model, tmp_path):
    batch = next(batches(1))
    batch["input_ids"][0, 3] = 5
    handles = spoilt(model, 1e6, model.model.layers[0])
    try:
        with pytest.raises(ValueError, match="stored in torch.float16, whose range may be too small"):
            record(model, [batch], tmp_path, keep=("pre_attention",), hidden_dtype="float16", losses=False)
        assert record(model, [batch], tmp_path / "wide", keep=("pre_attention",), losses=False).tokens
    finally:
        for h in handles:
            h.remove()


# ---- gates


@pytest.mark.parametrize(
    "name, scoring",
    [
        ("olmoe", "linear"),
        ("qwen2_moe", "linear"),
        ("gpt_oss", "linear"),
        ("minimax_m2", "sigmoid"),
        ("ernie4_5_moe", "softmax"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stored_gates_choose_the_models_own_experts(name, scoring, dtype, tmp_path):
    model = family(name).to(dtype)
    trace = record(model, batches(8), tmp_path, keep=("hidden", "logits"), losses=False)
    assert trace.head["gates"]["scoring"] == scoring
    rows = own_gate(trace)
    assert len(rows) == trace.num_layers and all(
        row["agreement"] == 100 and row["ties"] < row["tokens"] / (20 if dtype == torch.float32 else 2) for row in rows
    )
    for columns in trace.columns():
        for layer, gate in enumerate(trace.gates()):
            assert torch.allclose(
                gate.raw(columns["hidden"][:, layer]),
                columns["logits"][:, layer],
                atol=1e-5 if dtype == torch.float32 else 0.05,
            )
    assert sum(r["tokens"] for r in own_gate(trace, samples=[0])) == 12 * trace.num_layers


def test_a_stored_gate_that_is_wrong_fails_its_control(model, tmp_path):
    trace = record(model, batches(4), tmp_path, keep=("hidden",), losses=False)
    with safe_open(tmp_path / "gates.safetensors", "pt") as f:
        weight = f.get_tensor("weight")
    save_file({"weight": weight.roll(1, 1).contiguous()}, tmp_path / "gates.safetensors")
    with pytest.raises(ValueError, match="gates.safetensors is missing or damaged"):
        trace.gates()
    trace.head["gates"]["sha256"] = traces._sha256(tmp_path / "gates.safetensors")
    assert all(row["agreement"] < 60 for row in own_gate(trace))


def test_a_gate_that_is_not_linear_has_a_reason(model, tmp_path):
    trace = record(
        family("deepseek_v3"), batches(), tmp_path / "groups", keep=("hidden",), losses=False
    )  # it chooses groups of experts first
    with pytest.raises(ValueError, match="layer 0: its choice is not the top-k of a linear map"):
        trace.gates()
    assert not (tmp_path / "groups" / "gates.safetensors").exists()
    with pytest.raises(ValueError, match="no hidden states"):
        record(model, batches(), tmp_path / "none", losses=False).gates()
    with pytest.raises(ValueError, match="under a rule"):
        record(model, batches(), tmp_path / "rule", keep=("hidden",), rule=make_rule("topk", k=1), losses=False).gates()


# ---- split and batches


def test_a_split_keeps_documents_together_and_every_data_set_on_both_sides(model, tmp_path):
    trace = record(model, batches(10, documents=4), tmp_path, losses=False)
    facts = dict(trace.numbered())
    for share in (0.1, 0.25, 0.5, 0.9):
        train, validation = trace.split(share)
        of = lambda numbers: {(facts[i]["dataset"], facts[i]["document"]) for i in numbers}
        assert sorted(train + validation) == list(range(40)) and not of(train) & of(validation)
        for dataset in "ab":
            assert sum(d == dataset for d, _ in of(validation)) == min(max(round(4 * share), 1), 3)
    assert (
        trace.split(0.25, seed=3) == trace.split(0.25, seed=3)
        and len({tuple(trace.split(0.25, seed=s)[1]) for s in range(8)}) > 1
    )
    for bad in (0, 1, -1, 1.5):
        with pytest.raises(ValueError, match="share"):
            trace.split(bad)
    single = record(model, batches(2, documents=1), tmp_path / "single", losses=False)
    with pytest.raises(ValueError, match="data set 'a' has one document"):
        single.split()


@pytest.fixture(scope="module")
def trace(model, tmp_path_factory):
    return record(
        model, batches(6), tmp_path_factory.mktemp("trace"), keep=("hidden", "logits"), losses=False, shard_forwards=2
    )


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("seed", [None, 0])
@pytest.mark.parametrize("by_layer", [False, True])
@pytest.mark.parametrize("group, batch, length", [(1, 5, None), (2, 3, 7), (9, 100, 1)])
def test_batches_hold_every_token_once(trace, ahead, seed, by_layer, group, batch, length):
    blocks = [block for _, block in trace.by_sample()]
    wanted = [i for i in range(24) if i % 3]
    loader, seen = (
        trace.batches(("experts", "logits", "token_id"), batch, wanted, length, group, seed, by_layer, ahead),
        [],
    )
    count = 0
    for b in loader:
        count += 1
        for i, sample in enumerate(b["sample"].tolist()):
            layers = [int(b["layer"][i])] if by_layer else range(trace.num_layers)
            block, n = blocks[sample], int(b["valid"][i].sum())
            assert n == min(len(block[0].experts), length or 99) and b["valid"][i, :n].all()
            for at, layer in enumerate(layers):
                assert torch.equal(b["experts"][i, :n, at], block[layer].experts[:n]) and torch.equal(
                    b["logits"][i, :n, at], block[layer].logits[:n]
                )
                seen.append((sample, layer))
            assert (
                (b["experts"][i, n:] == trace.num_experts).all()
                and not b["logits"][i, n:].any()
                and not b["token_id"][i, n:].any()
            )
    assert count == len(loader) and sorted(seen) == [(s, l) for s in wanted for l in range(trace.num_layers)]
    assert (seen == sorted(seen)) == (seed is None)


def test_shuffling_depends_on_the_seed_only(trace):
    order = lambda seed, **more: [
        s for b in trace.batches(("token_id",), 1, seed=seed, **more) for s in b["sample"].tolist()
    ]
    assert order(1) == order(1, ahead=False) != order(2) and sorted(order(1)) == order(None)
    shards = [i // 8 for i in order(1, group=1)]
    assert all(len(set(shards[i : i + 8])) == 1 for i in (0, 8, 16))  # one shard is held at a time
    assert len(set([i // 8 for i in order(1, group=3)][:8])) > 1


def test_a_checksum_is_taken_once_and_unknown_columns_are_refused(trace, monkeypatch):
    trace, calls = Trace.open(trace.folder), []
    real = reading._sha256
    monkeypatch.setattr(reading, "_sha256", lambda path: calls.append(path) or real(path))
    for _ in range(3):
        list(trace.batches(("hidden",)))
    trace.split(), list(trace.by_sample()), list(trace)
    assert len(calls) == 3
    with pytest.raises(ValueError, match="p_values"):
        trace.batches(("p_values",))
    for bad in (dict(batch=0), dict(group=0), dict(length=0)):
        with pytest.raises(ValueError, match=next(iter(bad))):
            trace.batches(("hidden",), **bad)
    loader = trace.batches(("hidden",))
    next(loader)
    assert 0 < loader.waited < 60 and len(loader) == 3


def test_damaged_and_foreign_shards_are_named_and_the_rest_is_usable(model, tmp_path):
    record(model, batches(6), tmp_path / "t", keep=("hidden",), losses=False, shard_forwards=2)
    other = record(family("qwen2_moe"), batches(2), tmp_path / "o", keep=("hidden",), losses=False, shard_forwards=2)
    file = tmp_path / "t" / "shard-00001.safetensors"
    whole = file.read_bytes()

    def refused(words):
        for use in (
            lambda t: list(t.batches(("hidden",))),
            lambda t: t.split(),
            lambda t: list(t.samples()),
            lambda t: list(t),
        ):
            with pytest.raises(ValueError, match=f"shard-00001.*{words}.*skip_damaged"):
                use(Trace.open(tmp_path / "t"))
        rest = Trace.open(tmp_path / "t", skip_damaged=True)
        assert (
            {s for b in rest.batches(("hidden",)) for s in b["sample"].tolist()}
            == {*range(8), *range(16, 24)}
            == {s for part in rest.split() for s in part}
        )
        assert rest.damaged == ["shard-00001.safetensors"] and all(row["agreement"] == 100 for row in own_gate(rest))

    for damage in (whole[:-1], whole[:200] + bytes([whole[200] ^ 1]) + whole[201:], b""):
        file.write_bytes(damage)
        refused("checksum")
    file.unlink()
    refused("checksum")
    file.write_bytes((other.folder / "shard-00000.safetensors").read_bytes())
    head = json.loads((tmp_path / "t" / "trace.json").read_text())
    head["shards"][1]["sha256"] = traces._sha256(file)  # even where somebody mended the checksum
    (tmp_path / "t" / "trace.json").write_text(json.dumps(head))
    refused("another model")


def test_a_trace_of_an_earlier_version_is_read(model, tmp_path):
    new = record(model, batches(3), tmp_path, keep=("hidden",), losses=False, shard_forwards=1)
    head, old = json.loads((tmp_path / "trace.json").read_text()), list(new.samples())
    for key in ("forwards", "hidden_size", "hidden_dtype", "gates"):
        del head[key]
    for shard in head["shards"]:
        file = tmp_path / shard["file"]
        with safe_open(file, "pt") as f:
            columns, about = {k: f.get_tensor(k) for k in f.keys()}, json.loads(f.metadata()["about"])
        samples = [{k: s[k] for k in ("id", "preview", "loss", "tokens")} for s in about["samples"]]
        save_file(columns, file, metadata={"samples": json.dumps(samples)})
        shard["sha256"] = traces._sha256(file)
    (tmp_path / "gates.safetensors").unlink()
    (tmp_path / "trace.json").write_text(json.dumps(head))
    trace = Trace.open(tmp_path)
    assert [s["tokens"] for s in trace.samples()] == [s["tokens"] for s in old] and trace.seed_traces == 0
    assert (
        sum(int(b["valid"].sum()) for b in trace.batches(("hidden", "experts"))) == trace.tokens
        and len(trace.split(0.25)[1]) == 3
    )
    with pytest.raises(ValueError, match="before gates were kept"):
        trace.gates()
    with pytest.raises(ValueError, match="record it again"):
        trace.export_seed(tmp_path / "seed")


# ---- collect


class Words:
    "A tokenizer without a padding token: one number a word."

    pad_token_id = None

    def __call__(self, texts, truncation, max_length):
        one = lambda text: [3 + sum(map(ord, word)) % 80 for word in text.split()][:max_length]
        return SimpleNamespace(input_ids=one(texts) if isinstance(texts, str) else [one(t) for t in texts])


@pytest.fixture
def data(tmp_path):
    "Two local data sets in the hub's columns; SQuAD has two questions a paragraph."
    rng = random.Random(0)
    words = lambda n: " ".join(rng.choice("mill river stone bridge lantern harbour".split()) for _ in range(n))
    rows = {
        "imdb/test": [{"text": words(rng.randint(10, 30)), "label": 0} for _ in range(60)]
        + [{"text": "short", "label": 1}, {"text": " ", "label": 1}],
        "squad/validation": [
            {"context": c, "question": words(3)} for c in (words(15) for _ in range(30)) for _ in range(2)
        ],
    }
    for name, lines in rows.items():
        path = tmp_path / "data" / f"{name}.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text("".join(json.dumps(r) + "\n" for r in lines))
    return SimpleNamespace(data_dir=tmp_path / "data", hub=False)


def collected(model, data, folder, **options):
    return collect(
        model,
        Words(),
        folder,
        **{
            "datasets": "imdb,squad",
            "traces": 30,
            "batch": 4,
            "max_length": 20,
            "shard": 9,
            "source": "local",
            "settings": data,
            "progress": False,
            "keep": ("hidden", "pre_attention"),
            **options,
        },
    )


def test_a_collection_is_balanced_and_counted(model, data, tmp_path):
    trace = collected(model, data, tmp_path / "t")
    samples = list(trace.samples())
    assert (
        trace.head["forwards"] == 8 and trace.seed_traces == 32 and trace.head["complete"]
    )  # 30 traces of 4 layers: 8 forwards, whole turns of 2 data sets
    assert [s["forwards"] for s in trace.head["shards"]] == [2, 2, 2, 2]  # 9 traces a shard: 2 forwards
    assert [s["dataset"] for s in samples[::4]] == ["imdb", "squad"] * 4 and [
        s["forward"] for s in samples[::4]
    ] == list(range(8))
    assert all(len({s["dataset"] for s in samples[i : i + 4]}) == 1 for i in range(0, 32, 4))
    assert (
        len({(s["dataset"], s["document"]) for s in samples if s["dataset"] == "squad"}) < 16
    )  # paragraphs are shared
    assert all(
        s["host_mb"] > 0 and s["device_mb"] is None and s["bytes"] == (trace.folder / s["file"]).stat().st_size
        for s in trace.head["shards"]
    )
    texts = {t["text"][:100] for t in stream_text("imdb", "local", settings=data)}
    assert all(s["preview"] in texts and len(s["preview"]) > 50 for s in samples if s["dataset"] == "imdb")
    other = [s["preview"] for s in collected(model, data, tmp_path / "o", seed=1).samples()]
    assert [s["preview"] for s in samples] != other
    assert abs(trace.head["estimate"]["tokens"] / trace.tokens - 1) < 0.2


@pytest.mark.parametrize("die", [1, 3, 7])
def test_a_killed_collection_goes_on_with_the_same_texts(model, data, tmp_path, monkeypatch, die):
    whole, calls, run = collected(model, data, tmp_path / "whole"), [], collecting._one_batch

    def killed(*args, **kwargs):
        calls.append(1)
        if len(calls) > die:
            raise KeyboardInterrupt
        run(*args, **kwargs)

    monkeypatch.setattr(collecting, "_one_batch", killed)
    before = hooks(model)
    with pytest.raises(KeyboardInterrupt):
        collected(model, data, tmp_path / "two")
    assert hooks(model) == before
    monkeypatch.setattr(collecting, "_one_batch", lambda *args, **kwargs: calls.append(2) or run(*args, **kwargs))
    two = collected(model, data, tmp_path / "two")
    assert [s["sha256"] for s in two.head["shards"]] == [s["sha256"] for s in whole.head["shards"]]
    assert calls.count(2) == 8 - die // 2 * 2  # what a shard holds is not run again
    assert collected(model, data, tmp_path / "two").tokens == two.tokens and calls.count(2) == 8 - die // 2 * 2
    assert collected(model, data, tmp_path / "two", traces=40).head["forwards"] == 10  # and it can grow


def test_a_full_disk_half_way_keeps_all_before_it(model, data, tmp_path, monkeypatch):
    save, calls = traces.save_file, []

    def full(columns, path, metadata=None):
        calls.append(1)
        if len(calls) == 4:
            raise OSError(28, "No space left on device")  # gates, two shards, then this one
        return save(columns, path, metadata=metadata)

    monkeypatch.setattr(traces, "save_file", full)
    with pytest.raises(OSError, match="make space and start again, the 2 shards before it are kept"):
        collected(model, data, tmp_path / "t")
    half = Trace.open(tmp_path / "t")
    assert (
        len(half.head["shards"]) == 2
        and sum(int(b["valid"].sum()) for b in half.batches(("hidden",))) == half.tokens
        and half.gates()
    )
    assert not list((tmp_path / "t").glob("*.part"))
    monkeypatch.undo()
    assert collected(model, data, tmp_path / "t").head["forwards"] == 8


def test_what_does_not_fit_is_refused_before_it_starts(model, data, tmp_path, monkeypatch):
    monkeypatch.setattr(traces.shutil, "disk_usage", lambda folder: SimpleNamespace(free=2**17))
    with pytest.raises(OSError, match=r"needs about \d+ MB, .* has 0 MB free: .*fewer traces.*hidden_dtype"):
        collected(model, data, tmp_path / "t")
    assert not (tmp_path / "t" / "trace.json").exists()


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(traces=4000), "'imdb' has 60 texts .* are needed: collect at most traces = 120"),
        (dict(traces=4000, min_characters=125), r"'squad' has \d+ texts"),
        (dict(min_characters=1000), "'imdb' has no usable text: 61 texts are empty or have at most 999 characters"),
        (dict(datasets="imdb,yelp"), "'yelp', split 'test': no local copy"),
        (
            dict(datasets="imdb,yelp", source="auto"),
            "'Yelp/yelp_review_full' is on the hub, and settings.ini says hub = no",
        ),
        (dict(datasets="imdb,imdbb"), r"unknown data set \(.*\) 'imdbb': did you mean 'imdb'"),
        (dict(datasets="imdb,imdb"), "once each: imdb"),
        (dict(datasets=[]), "once each"),
        (dict(datasets="hellaswag", source="local"), "no local copy|multiple choice"),
        (dict(datasets="embedded:prosa"), "unknown domain of the embedded world 'prosa'"),
        (dict(traces=0), "traces = 0"),
        (dict(shard=0), "shard = 0"),
        (dict(max_length=1), "max_length = 1"),
        (dict(keep=("hiden",)), "hidden"),
    ],
)
def test_bad_collections_are_refused_with_one_error(model, data, tmp_path, options, words):
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        collected(model, data, tmp_path / "t", **options)
    assert not (tmp_path / "t" / "trace.json").exists()


@pytest.mark.parametrize("name", ["dbrx", "llama4_text"])
def test_a_model_whose_gate_cannot_be_observed_loses_nothing(name, model, data, tmp_path):
    trace = collected(model, data, tmp_path / "t")
    before = {p.name: p.read_bytes() for p in trace.folder.iterdir()}
    with pytest.raises(ValueError, match="no MoE layer that can be patched: |cannot be observed as a whole: "):
        collected(family(name), data, tmp_path / "t")
    with pytest.raises(ValueError, match="fingerprint.*differ.: choose another folder"):
        collected(family("qwen2_moe"), data, tmp_path / "t")
    assert {p.name: p.read_bytes() for p in trace.folder.iterdir()} == before


@pytest.mark.parametrize("dtype, width", [(None, 4), ("bfloat16", 2)])
def test_the_estimate_is_what_lies_on_the_disk(dtype, width, tmp_path):
    model = family("qwen2_moe")
    big = [{"input_ids": torch.randint(3, 90, (16, 128), generator=torch.Generator().manual_seed(i))} for i in range(4)]
    trace = record(model, big, tmp_path, keep=("hidden", "pre_attention"), hidden_dtype=dtype, losses=False)
    tensors = sum(v.nbytes for c in trace.columns() for v in c.values())
    head = trace.head
    guess = estimate_trace_bytes(
        trace.tokens,
        trace.num_layers,
        trace.num_experts,
        head["k"],
        head["hidden_size"],
        trace.num_layers,
        head["keep"],
        hidden_bytes=width,
    )
    real = sum(p.stat().st_size for p in tmp_path.iterdir())
    assert guess == tensors and 1 <= real / tensors < 1.03


@pytest.mark.parametrize("keep", [("hidden",), ("hidden", "logits")])
def test_the_seeds_layout_holds_the_same_numbers(model, data, tmp_path, keep):
    trace = collected(model, data, tmp_path / "t", keep=keep)
    files = trace.export_seed(tmp_path / "seed", shard=10)
    assert [f.name for f in files] == [
        "shard_000_10_traces.safetensors",
        "shard_001_10_traces.safetensors",
        "shard_002_10_traces.safetensors",
        "shard_003_2_traces.safetensors",
    ]
    assert not [p for p in (tmp_path / "seed").iterdir() if p.suffix not in (".json", ".safetensors")]
    blocks, number = list(trace.by_sample()), 0
    loaded = {b["sample"].tolist()[0]: b for b in trace.batches(("hidden", "token_id"), 1)}
    for i, file in enumerate(files):
        about = json.loads((tmp_path / "seed" / f"shard_{i:03d}_metadata.json").read_text())
        assert set(about) == {
            "shard_id",
            "num_traces",
            "file_size_mb",
            "rtx3090_optimized",
            "created_streaming",
            "traces",
        } and about["num_traces"] == len(about["traces"])
        with safe_open(file, "pt") as f:
            for one in about["traces"]:
                get = lambda name: f.get_tensor(f"{one['sample_id']}.{name}")
                assert (
                    one["sample_id"] == f"trace_{number}"
                    and one["layer_id"] == number % 4
                    and one["forward"] == number // 4
                )
                hidden, mask = get("hidden_states"), get("mask")
                assert hidden.shape[:2] == mask.shape and mask.shape[1] == one["sequence_length"] and mask.any(0).all()
                for row, sample in enumerate(one["samples"]):
                    facts, block = blocks[sample]
                    n = facts["tokens"]
                    assert (
                        mask[row].sum() == n
                        and facts["dataset"] == one["dataset_name"]
                        and facts["forward"] == one["forward"]
                    )
                    assert torch.equal(
                        hidden[row, :n], loaded[sample]["hidden"][0, :n, one["layer_id"]]
                    ) and torch.equal(get("token_ids")[row, :n], loaded[sample]["token_id"][0, :n])
                    assert torch.equal(get("target_top_k")[row, :n], block[one["layer_id"]].experts)
                    if "logits" in keep:
                        assert torch.equal(get("target_routing")[row, :n], block[one["layer_id"]].logits)
                    else:
                        assert torch.equal(
                            get("target_routing")[row, :n].topk(2).indices.sort(-1).values,
                            block[one["layer_id"]].experts.sort(-1).values,
                        )
                number += 1
    assert number == trace.seed_traces


# ---- streams


def test_hub_rows_are_streamed_where_possible(monkeypatch, tmp_path):
    import datasets

    asked, settings = [], SimpleNamespace(data_dir=tmp_path, hub=True)

    def load(hub, config, split, streaming=False):
        asked.append((hub, split, streaming))
        if streaming and hub == "fancyzhx/ag_news":
            raise ConnectionError("offline")
        return iter(
            [
                {"title": " A title ", "content": "and what follows.", "text": "plain"},
                {"title": "", "content": "alone", "text": ""},
            ]
        )

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert [r["text"] for r in stream_text("amazon", settings=settings)] == ["A title and what follows.", "alone"]
    assert [(r["text"], r["document"]) for r in stream_text("ag_news", split="train+test", settings=settings)] == [
        ("plain", "train:0"),
        ("plain", "test:0"),
    ]
    assert asked == [("fancyzhx/amazon_polarity", "test", True)] + [
        ("fancyzhx/ag_news", s, streaming) for s in ("train", "test") for streaming in (True, False)
    ]


def test_a_stream_that_is_left_early_leaves_no_thread(trace):
    import threading

    before = threading.active_count()
    loader = trace.batches(("hidden",), batch=1)
    next(loader)
    assert threading.active_count() > before
    loader.stream.close()
    assert threading.active_count() == before


def test_a_shard_that_vanishes_while_it_is_read_is_an_error_not_a_hang(model, tmp_path):
    trace = record(model, batches(4), tmp_path, keep=("hidden",), losses=False, shard_forwards=1)
    loader = trace.batches(("hidden",), batch=4)
    (tmp_path / "shard-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError):
        list(loader)
