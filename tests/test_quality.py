"Quality metrics against slow and foreign implementations, on real transformers classes; odd texts; the recorder."

import math

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM, OlmoeForCausalLM

from moe_routing.models.load import TinyRecipe, make_tokenizer, tiny_config
from moe_routing.quality import (
    encode,
    lambada,
    measure_speed,
    multiple_choice,
    perplexity,
    unigram_perplexity,
    _ratio_interval,
)

WORDS = "the old river runs past a small stone bridge where nobody waits for rain and 12 birds sing".split()


def sentences(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        " ".join(WORDS[i] for i in torch.randint(0, len(WORDS), (int(n),), generator=generator))
        for n in torch.randint(2, 30, (count,), generator=generator)
    ]


TEXTS = sentences(23)
STORIES = [
    dict(id=i, text=t, context=t.rsplit(" ", 1)[0], word=t.rsplit(" ", 1)[1], kind="ab"[i % 2])
    for i, t in enumerate(sentences(15, 1))
    if " " in t
]
QUESTIONS = [
    dict(id=i, context=a, endings=sentences(4, 100 + i), label=i % 4, kind="xy"[i % 2])
    for i, a in enumerate(sentences(9, 2))
]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(TEXTS * 3, 290)


@pytest.fixture(scope="module", params=["olmoe", "mixtral"])
def model(request):
    torch.manual_seed(1)
    if request.param == "olmoe":
        return OlmoeForCausalLM(
            tiny_config(
                TinyRecipe(
                    vocab_size=290, hidden=16, intermediate=8, layers=2, heads=2, num_experts=4, top_k=2, init=0.3
                )
            )
        ).eval()
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=290,
            hidden_size=16,
            intermediate_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_local_experts=4,
            initializer_range=0.3,
        )
    ).eval()


@torch.inference_mode()
def slow(model, tokenizer, text):
    ids = tokenizer(text, return_tensors="pt").input_ids
    logp = model(ids).logits[0].double().log_softmax(-1)
    return [-logp[j - 1, ids[0, j]].item() for j in range(1, ids.shape[1])]


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_perplexity_against_one_text_at_a_time(model, tokenizer, batch_size):
    result, losses = (
        perplexity(model, tokenizer, TEXTS, batch_size=batch_size),
        [slow(model, tokenizer, t) for t in TEXTS],
    )
    assert result.metrics["perplexity"] == pytest.approx(
        math.exp(sum(map(sum, losses)) / sum(map(len, losses))), rel=1e-4
    )
    assert result.metrics["perplexity_per_sample"] == pytest.approx(
        math.exp(sum(sum(l) / len(l) for l in losses) / len(losses)), rel=1e-4
    )
    assert result.metrics["perplexity"] != pytest.approx(result.metrics["perplexity_per_sample"], rel=1e-3)
    low, high = result.intervals["perplexity"]
    assert low < result.metrics["perplexity"] < high
    assert {r["id"]: r["tokens"] for r in result.samples} == {i: len(l) for i, l in enumerate(losses)}


def test_against_lm_eval(model, tokenizer):
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    foreign = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3, device="cpu")

    def ask(pairs):
        return foreign.loglikelihood(
            [Instance("loglikelihood", {}, p, i) for i, p in enumerate(pairs)], disable_tqdm=True
        )

    words = lambada(model, tokenizer, STORIES)
    for row, (logp, greedy) in zip(
        sorted(words.samples, key=lambda r: r["id"]), ask([(r["context"], " " + r["word"]) for r in STORIES])
    ):
        assert row["loss"] * row["tokens"] == pytest.approx(-logp, abs=1e-3) and row["correct"] == greedy
    chosen = multiple_choice(model, tokenizer, QUESTIONS)
    answers = ask([(q["context"], " " + e) for q in QUESTIONS for e in q["endings"]])
    for row, q, at in zip(chosen.samples, QUESTIONS, range(0, len(answers), 4)):
        sums = [-logp for logp, _ in answers[at : at + 4]]
        assert row["losses"] == pytest.approx(sums, abs=1e-3)
        by_length = [s / len(e) for s, e in zip(sums, q["endings"])]
        assert row["choice"] == by_length.index(min(by_length)) and row["choice_unnormalised"] == sums.index(min(sums))


def test_whole_text_convention_of_the_seed(model, tokenizer):
    result = multiple_choice(model, tokenizer, QUESTIONS)
    for row, q in zip(result.samples, QUESTIONS):
        means = [sum(l) / len(l) for l in (slow(model, tokenizer, f"{q['context']} {e}") for e in q["endings"])]
        assert row["whole_text_losses"] == pytest.approx(means, abs=1e-4) and row["choice_seed"] == means.index(
            min(means)
        )
    assert result.metrics["hellaswag_accuracy"] == sum(r["correct"] for r in result.samples) / len(QUESTIONS)
    assert result.chance["hellaswag_accuracy"] == 0.25 and set(result.groups) == {"x", "y"}
    assert sum(g["count"] for g in result.groups.values()) == len(QUESTIONS)


def test_two_contexts_one_ending(model, tokenizer):
    q = dict(id=0, context="the old", contexts=["the old river", "the old stone"], endings=["runs past"] * 2, label=1)
    row = multiple_choice(model, tokenizer, [q], name="winogrande").samples[0]
    expected = [
        sum(slow(model, tokenizer, f"{c} runs past")[-len(tokenizer(" runs past").input_ids) :]) for c in q["contexts"]
    ]
    assert row["losses"] == pytest.approx(expected, abs=1e-4) and row["guess"] == 0.5


def test_different_numbers_of_endings_in_one_call(model, tokenizer):
    mixed = [dict(q, endings=q["endings"][: 2 + i % 3], label=0) for i, q in enumerate(QUESTIONS)]
    heard = []

    class Listener:
        def start(self, ids, texts):
            heard.extend(zip(ids, texts))

        def end(self, losses):
            pass

    result = multiple_choice(model, tokenizer, mixed, recorder=Listener())
    assert [len(r["losses"]) for r in result.samples] == [len(q["endings"]) for q in mixed] and 1 / 4 < result.chance[
        "hellaswag_accuracy"
    ] < 1 / 2
    assert dict(heard) == {
        q["id"] * 4 + j: f"{q['context']} {e}" for q in mixed for j, e in enumerate(q["endings"])
    } and len(heard) == len(dict(heard))


def test_long_texts(model, tokenizer):
    long = " ".join(WORDS * 8)
    result = perplexity(model, tokenizer, [long], max_length=20)
    assert result.metrics["tokens"] == 19 and result.metrics["loss"] == pytest.approx(
        sum(slow_ids(model, tokenizer(long).input_ids[:20])) / 19, abs=1e-4
    )
    e = encode(tokenizer, [long], [len(long) - len(" sing")], max_length=10)[
        0
    ]  # the end is kept where it is what counts
    assert e.ids == tokenizer(long).input_ids[-10:] and tokenizer.decode(e.ids[e.first :]) == " sing"
    story = dict(text=long, context=long.rsplit(" ", 1)[0], word="sing")
    assert lambada(model, tokenizer, [story], max_length=10).samples[0]["loss"] * e.scored == pytest.approx(
        sum(slow_ids(model, e.ids)[-e.scored :]), abs=1e-4
    )
    many = dict(context=story["context"], endings=["sing", "wait"], label=0)
    assert multiple_choice(model, tokenizer, [many], max_length=10).samples[0]["losses"][0] == pytest.approx(
        sum(slow_ids(model, e.ids)[-e.scored :]), abs=1e-4
    )


@torch.inference_mode()
def slow_ids(model, ids):
    logp = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return [-logp[j - 1, ids[j]].item() for j in range(1, len(ids))]


def test_empty_and_one_token_texts(model, tokenizer):
    result = perplexity(model, tokenizer, ["", "a", TEXTS[0], " "])
    assert result.skipped == 3 and [r["id"] for r in result.samples] == [2]
    for call in (
        lambda: perplexity(model, tokenizer, ["", "a"]),
        lambda: perplexity(model, tokenizer, []),
        lambda: lambada(model, tokenizer, [dict(text="a", context="", word="a")]),
        lambda: multiple_choice(model, tokenizer, []),
        lambda: measure_speed(model, tokenizer, [""]),
        lambda: unigram_perplexity(tokenizer, TEXTS, ["a"]),
    ):
        with pytest.raises(ValueError, match="at least two tokens"):
            call()
    half = [dict(context="", endings=["a", "the old river"], label=1), QUESTIONS[0]]
    result = multiple_choice(model, tokenizer, half)
    assert result.skipped == 1 and len(result.samples) == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite(model, tokenizer, bad):
    weight = model.get_input_embeddings().weight
    row, kept = tokenizer(" bridge").input_ids[0], None
    with torch.no_grad():
        kept, weight[row] = weight[row].clone(), bad
        try:
            with pytest.raises(ValueError, match="NaN or infinite, first in text 1"):
                perplexity(model, tokenizer, ["the old river", "a small stone bridge where nobody waits"])
        finally:
            weight[row] = kept


def test_constant_guess_and_kinds(model, tokenizer):
    stories = [
        dict(text=f"the old {w}", context="the old", word=w, kind=k)
        for w, k in (("river", "a"), ("river", "a"), ("bridge", "a"), ("rain", "b"))
    ]
    result = lambada(model, tokenizer, stories)
    assert (
        result.chance["lambada_accuracy"] == 0.5
        and result.groups["a"]["chance"]["lambada_accuracy"] == 2 / 3
        and result.groups["b"]["count"] == 1
    )


def test_recorder_hears_every_row_once_and_in_order(model, tokenizer):
    events = []

    class Listener:
        def start(self, ids, texts):
            events.append(("start", ids, texts))

        def end(self, losses):
            events.append(("end", losses))

    result = lambada(model, tokenizer, STORIES, batch_size=4, recorder=Listener())
    assert [e[0] for e in events] == ["start", "end"] * (len(events) // 2)
    heard = {
        i: (t, l)
        for (_, ids, texts), (_, losses) in zip(events[::2], events[1::2])
        for i, t, l in zip(ids, texts, losses, strict=True)
    }
    assert sorted(heard) == [s["id"] for s in STORIES] and all(heard[s["id"]][0] == s["text"] for s in STORIES)
    assert all(heard[r["id"]][1] == pytest.approx(r["loss"], abs=1e-5) for r in result.samples)


def test_ratio_interval():
    from scipy.stats import t

    values = [1.0, 2.5, 2.0, 4.0]
    mean, sd = 2.375, torch.tensor(values).std().item()
    assert _ratio_interval([10 * v for v in values], [10] * 4) == pytest.approx(
        (mean - t.ppf(0.975, 3) * sd / 2, mean + t.ppf(0.975, 3) * sd / 2), abs=1e-6
    )
    generator, hits = torch.Generator().manual_seed(0), 0
    for _ in range(400):  # texts of unequal length whose mean loss grows with the length: the true ratio is 7 / 3
        n = torch.randint(1, 4, (60,), generator=generator).double()
        low, high = _ratio_interval(
            (n * (n + torch.randn(60, generator=generator, dtype=torch.float64))).tolist(), n.tolist()
        )
        hits += low <= 14 / 6 <= high
    assert 0.92 <= hits / 400 <= 0.98


def test_unigram(tokenizer):
    one = unigram_perplexity(tokenizer, ["the the the the"], ["the the the"])
    counts = {t: tokenizer("the the the the").input_ids.count(t) for t in tokenizer("the the the").input_ids}
    scored = tokenizer("the the the").input_ids[1:]
    assert one == pytest.approx(
        math.exp(-sum(math.log((counts[t] + 1) / (sum(counts.values()) + 290)) for t in scored) / len(scored)), rel=0.2
    )
    assert one < unigram_perplexity(tokenizer, ["the the the the"], ["rain rain rain"])


def test_speed_counts_real_tokens(model, tokenizer):
    speed = measure_speed(model, tokenizer, TEXTS, repeats=2, batch_size=5)
    assert (
        speed["tokens"] == sum(len(tokenizer(t).input_ids) for t in TEXTS if len(tokenizer(t).input_ids) > 1)
        and speed["repeats"] == 2
    )
    assert speed["latency_ms_per_token"] == 1000 / speed["tokens_per_second"]
    with pytest.raises(ValueError, match="repeats = 0"):
        measure_speed(model, tokenizer, TEXTS, repeats=0)


def test_nothing_stays_on_the_model(model, tokenizer):
    before = {
        n: (len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in vars(m)) for n, m in model.named_modules()
    }
    perplexity(model, tokenizer, TEXTS)
    measure_speed(model, tokenizer, TEXTS, repeats=1)
    assert before == {
        n: (len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in vars(m)) for n, m in model.named_modules()
    }
    assert torch.is_grad_enabled() and all(p.grad is None for p in model.parameters())
