"""Serving times: exact moments, the reader of streams, faults of servers, a real server behind a second observer.

No duration is asserted."""

import asyncio
import json
import re
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from moe_routing.models.load import make_tokenizer
from moe_routing.patching.patch import route
from moe_routing.routers.zoo import make_rule
from moe_routing import serving
from moe_routing.serving import (
    EventStream,
    Measured,
    Request,
    check_length,
    check_servable,
    compare_rules,
    local_server,
    measure_generation,
    measure_grid,
    measure_server,
    perplexity_changes,
    positions_of,
    prompt_ids,
    recording_proxy,
    scripted_answer,
    scripted_server,
    serve_command,
    server_root,
    with_room,
)
from transformers import LlamaConfig, LlamaForCausalLM, OlmoeConfig, OlmoeForCausalLM

TEXTS = ["the cat sat on the mat and saw a dog", "a dog ran to the cat"] * 4


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(TEXTS, 300)


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    return OlmoeForCausalLM(
        OlmoeConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_experts=8,
            num_experts_per_tok=4,
            max_position_embeddings=64,
            eos_token_id=0,
            pad_token_id=0,
            bos_token_id=None,
        )
    ).eval()


def counting():
    now = iter(range(10**6))
    return lambda: float(next(now))


# definitions


def test_definitions_on_random_moments():
    "Every figure against sums written out over the moments."
    rng = np.random.default_rng(0)
    requests = [
        Request(s, tuple(s + np.cumsum(rng.random(n))), usage=u, input_tokens=7)
        for s, n, u in zip(rng.random(30), rng.integers(1, 9, 30), [None, 12] * 15)
    ]
    m = Measured({}, requests, 3.0).metrics(percentiles=(50, 90, 99))
    ttft = [1e3 * (r.times[0] - r.sent) for r in requests]
    tokens = [r.usage or len(r.times) for r in requests]
    tpot = [1e3 * (r.times[-1] - r.times[0]) / (n - 1) for r, n in zip(requests, tokens) if n > 1]
    itl = [1e3 * (b - a) for r in requests for a, b in zip(r.times, r.times[1:])]
    for name, values in dict(
        ttft=ttft, tpot=tpot, itl=itl, e2el=[1e3 * (r.times[-1] - r.sent) for r in requests]
    ).items():
        found = [m[f"{k}_{name}_ms"] for k in ("mean", "median", "std", "p50", "p90", "p99")]
        assert np.allclose(
            found, [np.mean(values), np.median(values), np.std(values), *np.percentile(values, [50, 90, 99])]
        )
        assert m[f"median_{name}_ms_low"] <= m[f"median_{name}_ms"] <= m[f"median_{name}_ms_high"]
    assert m["output_throughput"] == pytest.approx(sum(tokens) / 3) and m["total_token_throughput"] == pytest.approx(
        (sum(tokens) + 210) / 3
    )
    assert (
        m["counts_differ"] == sum(r.usage is not None and r.usage != len(r.times) for r in requests)
        and m["counted_by"] == "events and usage"
    )


def test_one_token_has_no_tpot():
    m = Measured({}, [Request(0.0, (1.0,))], 1.0).metrics()
    assert m["mean_ttft_ms"] == 1000 and m["mean_tpot_ms"] is None and m["mean_itl_ms"] is None


def test_broken_requests_are_counted_and_no_latency_is_taken_from_them():
    m = Measured(
        {},
        [Request(0.0, (1.0, 2.0)), Request(0.0, (9.0,), error="x", ended=9.0), Request(0.0, error="x", ended=9.0)],
        10.0,
    ).metrics()
    assert (m["completed"], m["failed"], m["errors"], m["mean_ttft_ms"], m["output_throughput"]) == (
        1,
        2,
        {"x": 2},
        1000.0,
        0.2,
    )


# streams


def line(text=None, end=None, role=None, chat=False, **more):
    choices = {
        "choices": [
            {
                "finish_reason": end,
                **(
                    {"delta": {k: v for k, v in (("role", role), ("content", text)) if v is not None}}
                    if chat
                    else {"text": text or ""}
                ),
            }
        ]
    }
    return (
        b"data: "
        + json.dumps({**({} if text is None and end is None and role is None else choices), **more}).encode()
        + b"\n\n"
    )


USAGE = {"usage": {"prompt_tokens": 5, "completion_tokens": 3}}
STREAMS = {  # events, the places of those that carry a token, tokens
    "vllm": ([line("a"), line(""), line("b", "length"), line(choices=[], **USAGE), b"data: [DONE]\n\n"], [0, 1, 2], 3),
    "transformers": ([line("a"), line("b"), line("c"), line("", "length", **USAGE)], [0, 1, 2], 3),
    "end token without text": ([line("a"), line("b"), line("", "stop", **USAGE)], [0, 1, 2], 3),
    "no usage": ([line("a"), line("b"), line("", "stop"), b"data: [DONE]\n\n"], [0, 1], 2),
    "two tokens in one event": ([line("ab"), line("c"), line("", "stop", **USAGE), b"data: [DONE]\n\n"], [0, 1, 2], 3),
    "usage says more than can be seen": ([line("abc", "length", **USAGE)], [0], 3),
    "chat": (
        [
            line("", role="assistant", chat=True),
            line("a", chat=True),
            line("b", chat=True),
            line("c", "stop", chat=True, **USAGE),
        ],
        [1, 2, 3],
        3,
    ),
    "role together with text": (
        [line("a", role="assistant", chat=True), line("b", chat=True), line(end="stop", chat=True)],
        [0, 1],
        2,
    ),
    "comments and carriage returns": (
        [b": ping\r\n\r\n", line("a").replace(b"\n", b"\r\n"), b"event: x\n\n", b"data:" + line("b", "stop")[6:]],
        [1, 3],
        2,
    ),
}


def fed(events):
    stream = EventStream()
    for i, e in enumerate(events):
        stream.feed(e, float(i))
    return stream.request(-1.0)


@pytest.mark.parametrize("name", STREAMS)
def test_which_events_carry_a_token(name):
    events, places, tokens = STREAMS[name]
    found = fed(events)
    assert not found.error and found.times == tuple(map(float, places)) and found.tokens == tokens


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_may_be_cut_anywhere(name):
    "Byte by byte an event counts when its line is whole; nothing else changes."
    events, places, tokens = STREAMS[name]
    whole, stream = b"".join(events), EventStream()
    for i in range(len(whole)):
        stream.feed(whole[i : i + 1], float(i))
    found = stream.request(-1.0)
    assert len(found.times) == len(places) and found.tokens == tokens and not found.error
    starts = np.cumsum([0, *map(len, events)])
    assert all(starts[p] < t < starts[p + 1] for p, t in zip(places, found.times))


@pytest.mark.parametrize(
    "events, says",
    [
        ([line("a")], "in the middle"),
        ([line("a"), b"data: {oops\n\n"], "not a JSON object"),
        ([line("a"), b"data: [1]\n\n"], "not a JSON object"),
        ([line("a"), line(error={"message": "engine is dead"})], "engine is dead"),
        ([line("a"), line(error="out of memory")], "out of memory"),
        ([b"data: [DONE]\n\n"], "no token"),
        ([], "in the middle"),
    ],
)
def test_broken_streams(events, says):
    found = fed(events)
    assert says in found.error and found.times == ((0.0,) if events and events[0] == line("a") else ())


# in process


def test_generation_with_a_counting_clock(model, tokenizer):
    found = measure_generation(model, tokenizer, 5, 3, 4, warmup=2, repeats=2, texts=TEXTS, clock=counting())
    assert [r.sent for r in found.requests] == [10.0, 15.0] and all(
        r.latency == 4 and r.itl == [1.0, 1.0, 1.0] and r.sequences == 3 for r in found.requests
    )
    m = found.metrics()
    assert (m["completed"], m["total_output_tokens"], m["total_input_tokens"], m["output_throughput"]) == (
        6,
        24,
        30,
        3.0,
    )


def test_an_end_token_does_not_shorten_an_answer(model, tokenizer):
    ids = prompt_ids(tokenizer, 5, 1, TEXTS)
    wanted = int(model(ids).logits[0, -1].argmax())
    before = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = wanted
    try:
        assert (
            len(
                measure_generation(model, tokenizer, 5, output_tokens=6, warmup=0, repeats=1, texts=TEXTS)
                .requests[0]
                .times
            )
            == 6
        )
    finally:
        model.generation_config.eos_token_id = before


def test_a_dense_model_too(tokenizer):
    dense = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
        )
    ).eval()
    assert measure_generation(dense, tokenizer, 4, 2, 3, repeats=1, warmup=0).metrics()["total_output_tokens"] == 6


@pytest.mark.parametrize("length, output", [(61, 4), (64, 1), (100, 4)])
def test_longer_than_the_positions(model, tokenizer, length, output):
    with pytest.raises(ValueError, match=rf"64 positions: input_tokens can be {64 - output} at most"):
        measure_generation(model, tokenizer, length, 1, output)
    check_length(64 - output, output, positions_of(model))


@pytest.mark.parametrize(
    "bad",
    [dict(input_tokens=0), dict(batch=0), dict(output_tokens=0), dict(repeats=0), dict(warmup=-1), dict(texts=[""])],
)
def test_bad_settings(model, tokenizer, bad):
    with pytest.raises(ValueError):
        measure_generation(model, tokenizer, **{**dict(input_tokens=4, output_tokens=2), **bad})


def test_under_a_rule(model, tokenizer):
    "The rule decides on every token of prompt and answer but the last, which is never fed back."
    with route(model, make_rule("topk", k=2)) as patch:
        measure_generation(model, tokenizer, 6, 2, 4, warmup=0, repeats=1, texts=TEXTS)
        report = patch.report()
    assert report.tokens == 2 * (6 + 3) and report.received == 2


@pytest.fixture
def small_memory(model, monkeypatch):
    "A model that runs out of memory with more than two prompts."
    whole = model.generate

    def generate(ids, **more):
        if len(ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")
        return whole(ids, **more)

    monkeypatch.setattr(model, "generate", generate)
    return model


def test_out_of_memory_halves_the_batch(small_memory, tokenizer):
    found = measure_generation(small_memory, tokenizer, 4, 9, 2, warmup=1, repeats=1, texts=TEXTS)
    assert found.about["batch"] == 2 and found.about["batch_asked"] == 9 and found.requests[0].sequences == 2
    with pytest.raises(RuntimeError, match="out of memory at batch 9.*lower batch"):
        measure_generation(small_memory, tokenizer, 4, 9, 2, halve=False)
    with pytest.raises(RuntimeError, match="lower batch"):
        compare_rules(small_memory, tokenizer, {"own": None}, 4, 4, 2)
    assert "forward" not in small_memory.model.layers[0].mlp.gate.__dict__, "the patch was left behind"


def test_nothing_fits():
    def never(batch):
        raise torch.OutOfMemoryError("no")

    with pytest.raises(RuntimeError, match="at batch 1.*input_tokens.*quantize"):
        with_room(never, 8)


def test_grid_has_reasons(small_memory, tokenizer):
    grid = measure_grid(small_memory, tokenizer, (4, 200), (1, 4), output_tokens=2, repeats=1, texts=TEXTS).set_index(
        ["input_tokens", "batch_asked"]
    )
    assert (
        grid.reason[4, 1] == ""
        and "out of memory at batch 4" in grid.reason[4, 4]
        and grid.batch[4, 4] == 2
        and "64 positions" in grid.reason[200, 4]
    )
    assert grid.output_throughput.notna().tolist() == [True, True, False, False]


def test_a_fault_is_no_dash(model, tokenizer, monkeypatch):
    "Only length and memory are reasons for a dash."

    def broken(*args, **more):
        raise RuntimeError("device side assert")

    monkeypatch.setattr(model, "generate", broken)
    with pytest.raises(RuntimeError, match="device side"):
        measure_grid(model, tokenizer, (4,), (1,), output_tokens=2)


def test_compare_rules_takes_turns(model, tokenizer, monkeypatch):
    "Whoever is measured, each turn is in another order, and ratios are taken within a turn."
    order, cost = [], {2: 1.0, 4: 2.0}

    def fake(model, ids, output_tokens, clock):
        model(ids)
        k = model.model.layers[0].mlp.gate.forward.layer.rule.k
        order.append(k)
        speed = cost[k] * (10 if len(order) > 6 else 1)  # the machine becomes slow
        return Request(0.0, tuple(speed * (i + 1) for i in range(output_tokens)))

    monkeypatch.setattr(serving, "_generate", fake)
    table = compare_rules(
        model,
        tokenizer,
        {"four": make_rule("topk", k=4), "two": make_rule("topk", k=2)},
        4,
        1,
        3,
        warmup=0,
        repeats=6,
        texts=TEXTS,
    )
    assert [order[i : i + 3] for i in range(0, 9, 3)] == [[4, 2, 4], [2, 4, 4], [4, 4, 2]]
    assert table.rule.tolist() == ["four", "two", "four again"] and table.mean_k.tolist() == [4, 2, 4]
    for what in ("ttft", "tpot", "e2el"):
        assert (table[f"{what}_ratio"].tolist(), table[f"{what}_ratio_low"].tolist()) == ([1, 0.5, 1], [1, 0.5, 1])


def test_prompts():
    tokenizer = make_tokenizer(TEXTS, 300)
    ids = prompt_ids(tokenizer, 7, 3, TEXTS[:1])
    once = tokenizer(TEXTS[0], add_special_tokens=False).input_ids
    assert ids.reshape(-1).tolist() == (once * 21)[:21]
    assert prompt_ids(tokenizer, 50, 2).max() < len(tokenizer)


# servers


def test_figures_of_a_scripted_server_are_those_of_its_events():
    "With a clock that counts, the moments are whole numbers in order, whatever the machine does."
    with scripted_server(lambda i, b: scripted_answer([0.0, 0.02, 0.04])) as url:
        found = measure_server(url, "scripted", ["a"] * 3, output_tokens=3, clock=counting())
    assert not found.broken() and all(
        len(r.times) == 3 and r.sent < r.times[0] <= r.times[1] <= r.times[2] for r in found.requests
    )
    assert found.metrics()["total_input_tokens"] == 12 and found.about["gate"] == "the checkpoint's own gate"


def test_nothing_arrives_before_it_was_sent():
    moments = [0.05, 0.06, 0.2]
    with scripted_server(lambda i, b: scripted_answer(moments)) as url:
        found = measure_server(url, "scripted", ["a"] * 2, output_tokens=3)
    assert all(t - r.sent >= m for r in found.requests for t, m in zip(r.times, moments))


def test_faults_are_named_and_the_finished_kept():
    def script(i, body):
        return {
            2: scripted_answer([0.0], end=False) + [(30.0, b": late\n\n")],
            3: scripted_answer([0.0, 0.01], end=False) + [(0.02, None)],
            4: (500, '{"error": {"message": "worker died"}}'),
            5: [(0.0, b"data: {bad\n\n")],
            6: [(0.0, line(error={"message": "lost a GPU"}))],
            7: scripted_answer([0.0], end=False),
        }.get(i, scripted_answer([0.0, 0.01]))

    with scripted_server(script) as url:
        found = measure_server(url, "scripted", list("abcdefgh"), output_tokens=2, timeout=4.0, patience=10)
    broken = {b["index"]: b for b in found.broken()}
    assert list(broken) == [1, 2, 3, 4, 5, 6] and found.metrics()["completed"] == 2 and found.metrics()["failed"] == 6
    for i, says in {
        1: "stopped answering: nothing for 4 s",
        2: "connection broke",
        3: "HTTP 500: worker died",
        4: "not a JSON object",
        5: "lost a GPU",
        6: "in the middle",
    }.items():
        assert says in broken[i]["error"]
    assert broken[1]["tokens"] == 1 and broken[2]["tokens"] == 2


def test_a_dead_server_is_not_asked_for_ever():
    asked = []

    def script(i, body):
        asked.append(i)
        return (503, "gone") if i > 1 else scripted_answer([0.0])

    with scripted_server(script) as url:
        found = measure_server(url, "scripted", ["a"] * 20, output_tokens=1, patience=3)
    assert (
        len(asked) == 5
        and found.metrics()["completed"] == 1
        and sum("not sent" in b["error"] for b in found.broken()) == 16
    )


def test_concurrency_and_order():
    "Never more than asked for are under way, and answers belong to their prompts."
    here, most = set(), []

    class Script(list):
        "Steps that know when they are over."

        def __init__(self, i, steps):
            super().__init__(steps)
            self.i = i

        def __iter__(self):
            here.add(self.i)
            most.append(len(here))
            yield from super().__iter__()
            here.discard(self.i)

    def script(i, body):
        return Script(i, scripted_answer([0.02] * int(body["prompt"])))

    lengths = [2, 3, 1, 4, 2, 5, 1, 3]
    with scripted_server(script) as url:
        found = measure_server(url, "scripted", [str(n) for n in lengths], concurrency=3, output_tokens=5)
    assert [r.tokens for r in found.requests] == lengths and max(most) <= 3


def test_what_is_asked():
    bodies = []

    def script(i, body):
        bodies.append(body)
        return [
            (0.0, line("", role="assistant", chat=True)),
            (0.0, line("a", chat=True)),
            (0.0, line(end="stop", chat=True)),
        ]

    with scripted_server(script) as url:
        found = measure_server(
            url,
            "scripted",
            ["short", "a longer one"],
            output_tokens=7,
            kind="chat",
            warmup=2,
            extra={"ignore_eos": True},
        )
    assert [b["messages"][0]["content"] for b in bodies] == ["a longer one"] * 2 + ["short", "a longer one"]
    assert (
        all(b["max_tokens"] == 7 and b["stream"] and b["ignore_eos"] for b in bodies)
        and [r.tokens for r in found.requests] == [1, 1]
        and found.metrics()["counted_by"] == "events"
    )


def first_error(script, error, **more):
    with scripted_server(script, models=("olmoe", "mixtral")) as url, pytest.raises(error) as e:
        measure_server(more.pop("url", url), **{**dict(model="olmoe", prompts=["a"], output_tokens=2), **more})
    return str(e.value)


def test_first_errors():
    refuse = lambda status, text: lambda i, b: (status, text)
    assert (
        "did you mean 'mixtral'"
        in (e := first_error(refuse(404, '{"error": {"message": "no such model"}}'), ValueError, model="mixtrl"))
        and "HTTP 404: no such model" in e
    )
    assert "HTTP 422: Unexpected fields" in first_error(refuse(422, '{"detail": "Unexpected fields"}'), ValueError)
    assert "HTTP 500: plain words" in first_error(refuse(500, "plain  words"), RuntimeError)
    assert "stopped answering" in first_error(lambda i, b: [(3.0, b"")], RuntimeError, timeout=1.0)
    assert (
        "no server answers" in (e := first_error(None, ConnectionError, url=f"http://127.0.0.1:{serving.free_port()}"))
        and "vllm serve" in e
    )
    assert "http://host:port" in first_error(None, ValueError, url="localhost:8000")
    assert "3 positions" in first_error(
        lambda i, b: scripted_answer([0.0, 0.0]), ValueError, positions=3
    )  # a prompt of 4 tokens by the server's count


@pytest.mark.parametrize(
    "bad",
    [
        dict(concurrency=0),
        dict(output_tokens=0),
        dict(prompts=[]),
        dict(kind="chats"),
        dict(timeout=0),
        dict(warmup=0),
        dict(router="bh"),
        dict(router="bhh"),
        dict(router="topk", k=2),
    ],
)
def test_refused_before_anything_is_sent(bad):
    with pytest.raises(ValueError):
        measure_server("http://127.0.0.1:1", **{**dict(model="m", prompts=["a"]), **bad})


def test_from_inside_a_loop():
    "As in a notebook, where a loop runs already."

    async def cell():
        with scripted_server(lambda i, b: scripted_answer([0.0, 0.0])) as url:
            return measure_server(url, "scripted", ["a"], output_tokens=2)

    assert asyncio.run(cell()).metrics()["completed"] == 1


@pytest.mark.parametrize(
    "url",
    ["http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/completions", " http://h:1/v1/chat/completions "],
)
def test_addresses(url):
    assert server_root(url) == "http://h:1/v1"


def test_commands():
    command = serve_command("m", gpus=4, positions=4096, quantize="4bit")
    assert (
        command[:3] == ["vllm", "serve", "m"]
        and "--no-enable-prefix-caching" in command
        and command[command.index("--tensor-parallel-size") + 1] == "4"
        and command[command.index("--max-model-len") + 1] == "4096"
    )
    assert serve_command("m", "transformers", 9, quantize="8bit")[-2:] == ["--quantization", "bnb-8bit"]
    with pytest.raises(ValueError, match="did you mean 'vllm'"):
        serve_command("m", "vlm")


def test_what_a_server_can_run(tmp_path, model):
    model.save_pretrained(tmp_path)
    assert "k = 4" in check_servable("topk", 4, tmp_path)
    with pytest.raises(ValueError, match="has 4; set model.config.num_experts_per_tok = 2"):
        check_servable("topk", 2, tmp_path)
    model.config.num_experts_per_tok, before = 2, model.config.num_experts_per_tok
    try:
        model.save_pretrained(tmp_path)
    finally:
        model.config.num_experts_per_tok = before
    assert "k = 2" in check_servable("topk", 2, tmp_path)
    with pytest.raises(ValueError, match="cannot run 'spectra'"):
        check_servable("spectra", checkpoint=tmp_path)


def test_a_server_that_does_not_start(monkeypatch):
    monkeypatch.setattr(
        serving,
        "serve_command",
        lambda *a, **k: [sys.executable, "-c", "print('no weights there'); raise SystemExit(3)"],
    )
    with pytest.raises(RuntimeError, match="ended: no weights there"):
        with local_server("m"):
            pass
    monkeypatch.setattr(serving, "serve_command", lambda *a, **k: ["no_such_program"])
    with pytest.raises(RuntimeError, match="not installed: pip install"):
        with local_server("m"):
            pass


def test_a_server_is_ended(monkeypatch):
    "Also when the body fails; here one that never answers, and whose child would go on."
    monkeypatch.setattr(
        serving,
        "serve_command",
        lambda *a, **k: [sys.executable, "-c", "import time; print('loading', flush=True); time.sleep(600)"],
    )
    began, whole = [], serving.subprocess.Popen
    monkeypatch.setattr(serving.subprocess, "Popen", lambda *a, **k: began.append(whole(*a, **k)) or began[0])
    with pytest.raises(RuntimeError, match="did not answer within 1 s"):
        with local_server("m", wait=1):
            pass
    assert began[0].poll() is not None


def test_a_real_server_and_a_second_observer(tmp_path, model, tokenizer):
    "The client is always behind the proxy, and sees the same tokens; the server's own count agrees."
    model.save_pretrained(tmp_path), tokenizer.save_pretrained(tmp_path)
    records = []
    with local_server(tmp_path) as server, recording_proxy(server, records) as url:
        found = measure_server(url, str(tmp_path), TEXTS[:3], output_tokens=5, positions=64)
        with pytest.raises(ValueError, match="HTTP 4"):
            measure_server(url, "another", TEXTS[:1])
        with pytest.raises(ValueError, match="64 positions"):
            measure_server(url, str(tmp_path), ["the cat sat on " * 50], positions=64)
    assert not found.broken() and found.metrics()["counted_by"] == "usage"
    stamps = {
        r["name"]: (r["came"], [t for t, data in r["chunks"] for _ in re.findall(rb'"choices":', data)])
        for r in records
    }
    for i, r in enumerate(found.requests):
        came, times = stamps[f"request-{i}"]
        assert r.sent <= came and len(r.times) in (
            len(times),
            len(times) - 1,
        )  # the closing event carries a token or not
        assert all(client >= proxy for client, proxy in zip(r.times, times))


# ablations


def test_perplexity_changes():
    rng = np.random.default_rng(1)
    luck = rng.normal(0, 0.1, 6)
    losses = pd.DataFrame(
        {
            "full": 2 + luck,
            "needed": 2.2 + luck,
            "same": 2 + luck + rng.normal(0, 0.001, 6),
            "harmful": 1.9 + luck,
            "once": [2.1] + [np.nan] * 5,
            "never": np.nan,
        }
    )
    table = perplexity_changes(losses, "full").set_index("variant")
    assert (
        table.change["needed"] == pytest.approx(np.mean(np.exp(losses.needed) - np.exp(losses.full)))
        and table.low["needed"] > 0 > table.high["harmful"]
    )
    assert table.low["same"] < 0 < table.high["same"] and table.p_adjusted["needed"] < 0.05
    assert (
        table.loc[["once", "never"], "change"].isna().all()
        and "two are needed" in table.reason["once"]
        and np.isnan(table.change["full"])
    )
    with pytest.raises(ValueError, match="did you mean 'full'"):
        perplexity_changes(losses, "ful")
