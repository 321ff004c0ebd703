"Fine-tuning: conversations, labels, routers in the model, accumulation, checkpointing, resuming, the template."

import json
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from transformers import TrainerCallback

from moe_routing.core import Router
from moe_routing.patching.patch import route
from moe_routing.patching.probe import moe_layers
from moe_routing.routers.zoo import make_router
from moe_routing.runs.run import run_template
from moe_routing.settings import load_settings
from moe_routing.training.sft import (
    SFTRecipe,
    chat_loss,
    chat_renderer,
    collate,
    encode_chat,
    encode_chats,
    load_chat,
    make_routers,
    mounted,
    sft,
    trainer_options,
)
from moe_routing.models.upcycling import load_upcycled, tiny_dense, upcycle

pytestmark = pytest.mark.usefixtures("one_thread")
USER, SAID = (
    {"role": "user", "content": "Who moved the lantern?"},
    {"role": "assistant", "content": "Ada did, in the evening."},
)
CHAT = [
    {"role": "system", "content": "Be short."},
    USER,
    SAID,
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "It was dark."},
]
FAST = dict(
    batch=4,
    max_seq_length=48,
    neftune_noise_alpha=0,
    gradient_checkpointing=False,
    router_lr=1e-2,
    expert_lr=1e-2,
    lr=1e-2,
    warmup=0.0,
    cpu=True,
)


@pytest.fixture(scope="module")
def dense():
    return tiny_dense(steps=3, hidden=32, intermediate=32, heads=2, documents=60, vocab_size=400)


@pytest.fixture(scope="module")
def tokenizer(dense):
    return dense[1]


@pytest.fixture
def model(dense):
    return upcycle(deepcopy(dense[0]), 4, 2)


@pytest.fixture(scope="module")
def chats():
    short = lambda r: {
        **r,
        "messages": [{**m, "content": m["content"][:n].strip()} for m, n in zip(r["messages"], (12, 60))],
    }
    return [short(r) for r in load_chat("embedded", max_samples=24)], [
        short(r) for r in load_chat("embedded", "held", max_samples=6)
    ]


def weights(model, *routers):
    return {
        **model.state_dict(),
        **{f"router {i} {n}": t for i, r in enumerate(routers) for n, t in r.state_dict().items()},
    }


def same(a, b, **near):
    assert a.keys() == b.keys()
    for n in a:
        torch.testing.assert_close(a[n], b[n], msg=lambda m: f"{n}: {m}", **near)


# conversations


def answers(coded, tokenizer):
    return tokenizer.decode([t for t in coded["labels"] if t != -100])


def test_labels_are_what_the_assistant_says(tokenizer):
    coded = encode_chat(CHAT, tokenizer)
    assert (
        answers(coded, tokenizer) == "Ada did, in the evening.<|end|>\nIt was dark.<|end|>\n" and not coded["truncated"]
    )
    assert all(l in (-100, t) for t, l in zip(coded["input_ids"], coded["labels"]))
    every = encode_chat(CHAT, tokenizer, assistant_only=False)
    assert every["labels"] == every["input_ids"] == coded["input_ids"]
    short = encode_chat(CHAT, tokenizer, max_seq_length=30)
    assert len(short["input_ids"]) == len(short["labels"]) == 30 and short["truncated"]


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}{% if "
    "add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PARTS = (
    "{% for m in messages %}{{ m['role'] | capitalize }}:{% for p in m['content'] %}{% if p['type'] == 'text' %} "
    "{{ p['text'] }}{% endif %}{% endfor %}<end>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)


@pytest.mark.parametrize(
    "template, first", [(CHATML, "Ada did, in the evening.<|im_end|>\n"), (PARTS, " Ada did, in the evening.<end>\n")]
)
def test_templates_of_real_models(template, first, tokenizer):
    other = deepcopy(tokenizer)
    other.chat_template = template
    coded = encode_chat(CHAT, other)
    assert answers(coded, other).startswith(first) and other.decode(coded["input_ids"]) == chat_renderer(other)(
        CHAT, False
    )


def test_templates_that_lose_or_rewrite_are_refused(tokenizer):
    other = deepcopy(tokenizer)
    other.chat_template = "{% for m in messages %}{{ m['role'] }}\n{% endfor %}"
    with pytest.raises(ValueError, match="does not render the content"):
        encode_chat(CHAT, other)
    other.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {% if loop.last or m['role'] != 'assistant' %}{{ m['content'] }}{% "
        "else %}...{% endif %}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    with pytest.raises(ValueError, match="does not render the content|when it goes on"):
        encode_chat(CHAT, other)
    assert encode_chat(CHAT, other, assistant_only=False)["labels"]


def test_nothing_to_predict_is_counted_or_refused(tokenizer):
    rows = [{"messages": CHAT}, {"messages": [dict(USER, content="a word " * 60), SAID]}]
    kept, counts = encode_chats(rows, tokenizer, 60)
    assert len(kept) == 1 and (counts["samples"], counts["kept"]) == (2, 1)
    with pytest.raises(ValueError, match="max_seq_length = 10"):
        encode_chats(rows, tokenizer, 10)


def test_real_sample_found_like_other_data(tmp_path):
    settings = replace(load_settings(), data_dir=tmp_path, hub=False)
    with pytest.raises(FileNotFoundError, match="sft_chat"):
        load_chat("sft_chat", settings=settings)
    (tmp_path / "sft_chat").mkdir()
    lines = [
        json.dumps(
            {
                "messages": [dict(USER, content=f"question {i // 2}"), dict(SAID, content=f"answer {i}")],
                "source": "made",
            }
        )
        for i in range(400)
    ]
    (tmp_path / "sft_chat" / "train.jsonl").write_text("\n".join(lines))
    train, held = load_chat("sft_chat", settings=settings), load_chat("sft_chat", "held", settings=settings)
    assert len(train) + len(held) == 400 and 15 < len(held) < 90 and train[0]["domain"] == "made"
    assert not {r["messages"][0]["content"] for r in train} & {
        r["messages"][0]["content"] for r in held
    }  # a question that comes twice stays on one side
    few = load_chat("sft_chat", max_samples=7, seed=1, settings=settings)
    assert len(few) == 7 and few == load_chat(
        str(tmp_path / "sft_chat" / "train.jsonl"), max_samples=7, seed=1, settings=settings
    )


@pytest.mark.parametrize(
    "row, message",
    [
        ({"text": "x"}, "no column 'messages'; columns are text"),
        ({"messages": [USER]}, "role 'assistant'"),
        ({"messages": "hello"}, "must be a list"),
        ({"messages": [{"role": "assistant", "content": [{"type": "image"}]}]}, "must be a list"),
    ],
)
def test_bad_rows_are_named(row, message, tmp_path):
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": [USER, SAID]}) + "\n" + json.dumps(row))
    with pytest.raises(ValueError, match=f"chat.jsonl, row 1.*{message}"):
        load_chat(str(tmp_path / "chat.jsonl"))


def test_unknown_names():
    with pytest.raises(ValueError, match="smoltalk"):
        load_chat("smolltalk")
    with pytest.raises(ValueError, match="part"):
        load_chat(part="test")


def test_loss_by_conversation_is_the_models_own(dense, chats):
    model, tokenizer = dense
    rows, _ = encode_chats(chats[1], tokenizer, 48)
    nll, labels = chat_loss(model, rows, batch=4)
    batch = collate(rows, pad=3)
    with torch.no_grad():
        own = model(**batch).loss
    torch.testing.assert_close(nll.sum() / labels.sum(), own.double(), rtol=1e-5, atol=0)


# routers in the model


def test_mounted_and_taken_out(model):
    before, router = {n for n, _ in model.named_parameters()}, make_router("loss_free", 32, 4, k=2)
    with mounted(model, router):
        inside = {n for n, _ in model.named_parameters()}
        assert inside - before == {"model.layers.0.mlp.gate.router.weight"} and before - inside == {
            f"model.layers.{i}.mlp.gate.weight" for i in range(2)
        }
        assert (
            len(model.state_dict()) == len({t.data_ptr() for t in model.state_dict().values()}) + 1
        )  # tied embeddings; the router once
    assert {n for n, _ in model.named_parameters()} == before and torch.equal(
        model.model.layers[1].mlp.gate.weight, router.weight
    )
    with pytest.raises(RuntimeError):
        with mounted(model, router):
            raise RuntimeError
    assert {n for n, _ in model.named_parameters()} == before and moe_layers(model)


@pytest.mark.parametrize(
    "router, message",
    [
        ([make_router("softk", 32, 4, k=2)] * 3, "3 routers for 2"),
        (make_router("softk", 32, 5, k=2), "5 experts, the layer has 4"),
        ([torch.nn.Linear(2, 2)] * 2, "got Linear"),
    ],
)
def test_routers_that_do_not_fit(router, message, model, tokenizer, chats):
    with pytest.raises(ValueError, match=message):
        sft(model, tokenizer, router, *chats, steps=1)


@pytest.mark.parametrize("name", ["topk_aux", "loss_free", "expert_choice", "token_hash", "spectra"])
@pytest.mark.parametrize("shared", [True, False])
def test_routers_of_the_zoo_are_trained(name, shared, model, tokenizer, chats):
    made, made_by = make_routers(model, name, k=2)
    assert ("num_layers" in made_by) == isinstance(made, Router) == (name == "spectra")
    routers = [made] if name == "spectra" else made
    if name == "spectra" and not shared:
        routers = [make_router(hidden_size=32, num_experts=4, **made_by) for _ in range(2)]
    steered = []
    for r in routers:
        r.steer = lambda gather, r=r, own=r.steer: (steered.append(r), own(gather))
    before, at_first = deepcopy(weights(model)), {n: p.detach().clone() for n, p in routers[0].named_parameters()}
    done = sft(
        model,
        tokenizer,
        routers[0] if shared else routers,
        *chats,
        steps=3,
        accumulate=2,
        **{**FAST, "gradient_checkpointing": True, "neftune_noise_alpha": 5.0},
    )
    assert len(steered) == 3 * (1 if shared else 2)  # once an optimizer step, once a distinct router
    assert any(not torch.equal(p, at_first[n]) for n, p in routers[0].named_parameters()) == (name != "token_hash")
    if name == "spectra":
        assert int(routers[0].steps) == 3
    moved = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert (
        any("experts.down_proj" in n for n in moved)
        and any("embed_tokens" in n for n in moved)
        and not any("shared_expert" in n for n in moved)
    )
    assert len(done.log) == 3 and done.after["routing"]["load_cv"] is not None and len(done.after["layers"]) == 2
    assert (
        not any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
        and model.config.use_cache
        and not model.training
    )


# the training loss


def test_accumulating_is_the_same_as_one_large_batch(dense, tokenizer, chats):
    whole = [r for r in chats[0] if len(encode_chat(r["messages"], tokenizer)["input_ids"]) >= 40][
        :8
    ]  # all cut to one length: the router's means then weigh alike
    assert len(whole) == 8
    ends = []
    for batch, accumulate in ((8, 1), (2, 4)):
        model, router = upcycle(deepcopy(dense[0]), 4, 2), make_router("softk", 32, 4, k=2, losses={"z": 0.5})
        with torch.no_grad():
            router.weight.copy_(torch.randn(4, 32, generator=torch.Generator().manual_seed(0)))
        done = sft(
            model,
            tokenizer,
            router,
            whole,
            chats[1],
            steps=2,
            accumulate=accumulate,
            **{**FAST, "batch": batch, "max_seq_length": 40, "lr": 1e-3, "expert_lr": 1e-3, "router_lr": 1e-3},
        )
        ends.append((weights(model, router), [r["router_z"] for r in done.log]))
    same(ends[0][0], ends[1][0], rtol=1e-2, atol=2e-4)
    assert ends[0][1] == pytest.approx(ends[1][1], rel=1e-3) and ends[0][1][0] > 0


def test_the_routers_losses_reach_it(dense, tokenizer, chats):
    ends = {}
    for c in (0.0, 30.0):
        model, router = upcycle(deepcopy(dense[0]), 4, 2), make_router("topk_aux", 32, 4, k=2, losses={"z": c})
        with torch.no_grad():
            router.weight.copy_(3 * torch.randn(4, 32, generator=torch.Generator().manual_seed(0)))
        sft(model, tokenizer, router, *chats, steps=12, **FAST)
        ends[c] = float(router.weight.detach().norm())
    assert ends[30.0] < ends[0.0] - 0.1  # the z loss makes logits small


@pytest.mark.parametrize(
    "name, params",
    [
        ("topk_aux", dict(losses={"aux": 1.0})),
        ("spectra", dict(num_layers=2, router_dim=8, ortho_loss_coef=1.0, so_warmup_steps=1, router_entropy_coef=0.1)),
    ],
)
def test_checkpointing_changes_nothing(name, params, dense, tokenizer, chats):
    ends = []
    for on in (True, False):
        torch.manual_seed(0)
        model, router = upcycle(deepcopy(dense[0]), 4, 2), make_router(name, 32, 4, k=2, **params)
        sft(model, tokenizer, router, *chats, steps=3, **{**FAST, "gradient_checkpointing": on})
        ends.append(weights(model, router))
    same(*ends, rtol=1e-4, atol=1e-6)


def test_reentrant_checkpointing_is_refused(model):
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": True})
    with mounted(model, make_router("softk", 32, 4, k=2)), pytest.raises(RuntimeError, match="reentrant"):
        model.train()(input_ids=torch.ones(1, 4, dtype=torch.long))
    assert {"use_reentrant": False} in trainer_options(SFTRecipe(), "x").values()


def test_neftune_and_labels_change_training_only(dense, tokenizer, chats):
    starts, losses = set(), []
    for alpha, only in ((0, True), (20.0, True), (0, False)):
        done = sft(
            upcycle(deepcopy(dense[0]), 4, 2),
            tokenizer,
            make_routers(upcycle(deepcopy(dense[0]), 4, 2), "softk", k=2)[0],
            *chats,
            steps=1,
            **{**FAST, "neftune_noise_alpha": alpha, "assistant_only": only},
        )
        losses.append(done.log[0]["loss"])
        if only:
            starts.add(round(done.before["loss"], 5))
    assert len(starts) == 1 and len(set(losses)) == 3


def test_bf16(model, tokenizer, chats):
    done = sft(
        model,
        tokenizer,
        make_routers(model, "topk_aux", k=2)[0],
        *chats,
        steps=2,
        **{**FAST, "bf16": True, "gradient_checkpointing": True},
    )
    assert done.parameters["bf16"] and done.after["loss"] > 0 and model.dtype == torch.float32


@pytest.mark.parametrize("name", ["spectra", "random"])
def test_a_killed_run_goes_on(name, dense, tokenizer, chats, tmp_path):
    class Killed(Exception):
        pass

    class Kill(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 4:
                raise Killed

    ends = []
    for kill in (False, True):
        model = upcycle(deepcopy(dense[0]), 4, 2)
        routers, _ = make_routers(model, name, k=2)
        listed = lambda r: [r] if isinstance(r, Router) else r
        options = dict(
            steps=6, save_every=2, eval_every=2, folder=tmp_path / str(kill), **{**FAST, "neftune_noise_alpha": 5.0}
        )
        if kill:
            with pytest.raises(Killed):
                sft(model, tokenizer, routers, *chats, callbacks=(Kill(),), **options)
            model = upcycle(deepcopy(dense[0]), 4, 2)
            routers, _ = make_routers(model, name, k=2)
        done = sft(model, tokenizer, routers, *chats, **options)
        ends.append((weights(model, *listed(routers)), done.after["loss"], len(done.log)))
    same(ends[0][0], ends[1][0], rtol=0, atol=0)
    assert ends[0][1:] == ends[1][1:]


# parameters


@pytest.mark.parametrize(
    "bad, message",
    [
        (dict(max_seq_len=3), "max_seq_length"),
        (dict(batch=0), "batch = 0"),
        (dict(warmup=1.0), "warmup"),
        (dict(max_grad_norm=0), "max_grad_norm"),
        (dict(max_samples=0), "limit = 0"),
        (dict(epochs=0), "epochs"),
        (dict(experts="eager"), "ragged"),
        (dict(save_every=1), "folder"),
        (dict(deepspeed="none.json"), "no such file"),
    ],
)
def test_bad_parameters(bad, message, model, tokenizer, chats):
    with pytest.raises(ValueError, match=message):
        sft(model, tokenizer, make_router("softk", 32, 4, k=2), *chats, **bad)


def test_foreign_tokenizer(model, tokenizer, chats):
    other = deepcopy(tokenizer)
    other.add_tokens(["<new>"])
    with pytest.raises(ValueError, match="401 tokens, the model embeds 400"):
        sft(model, other, make_router("softk", 32, 4, k=2), *chats, steps=1)


def test_deepspeed_configuration_is_handed_on(tmp_path, monkeypatch):
    import moe_routing.training.sft as chapter

    path = tmp_path / "zero.json"
    path.write_text("{}")
    monkeypatch.setattr(chapter, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="not installed"):
        trainer_options(SFTRecipe(deepspeed=str(path)), tmp_path)
    monkeypatch.setattr(chapter, "find_spec", lambda name: name)
    assert trainer_options(SFTRecipe(deepspeed=str(path)), tmp_path)["deepspeed"] == str(path)


def test_template(tmp_path):
    record = run_template(
        "sft_spectra",
        dict(dense_steps=2, max_samples=12, held_samples=4, steps=2, eval_every=1, keep_model=True),
        tmp_path / "run",
    )
    m = record["metrics"]
    assert (
        record["status"] == "finished"
        and abs(m["loss_upcycled"] - m["loss_dense"]) < 1e-4
        and m["loss_sft"] != m["loss_upcycled"]
    )
    lines = (tmp_path / "run" / "routing_log.jsonl").read_text().splitlines()
    assert len(lines) == 3 * 2
    assert len(record["documents"]["nll"]) == len(record["documents"]["domain"]) > 0
    model, _, router = load_upcycled(tmp_path / "run" / "model")
    with torch.no_grad(), route(model, router):
        assert model(input_ids=torch.ones(1, 5, dtype=torch.long)).logits.isfinite().all()
    assert int(router.steps) == 2


def test_dense_control(dense, tokenizer, chats):
    before = weights(plain := deepcopy(dense[0]))
    before = {n: t.clone() for n, t in before.items()}
    done = sft(plain, tokenizer, None, *chats, steps=2, **{**FAST, "gradient_checkpointing": True})
    assert (
        done.after["routing"] == {}
        and done.after["layers"] == []
        and any(not torch.equal(t, before[n]) for n, t in plain.state_dict().items())
    )
    assert set(done.parameters["learning_rates"]) == {"others", "others, not decayed"}
