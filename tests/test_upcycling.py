"Dense to MoE: families, forms that are refused, saving, groups, a text model inside a vision-language one."

from copy import deepcopy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moe_routing.patching.patch import route
from moe_routing.patching.probe import moe_layers
from moe_routing.routers.zoo import make_router
from moe_routing.models.upcycling import (
    UpcycledMLP,
    attention_backend,
    check_tokenizer,
    load_dense,
    load_upcycled,
    parameter_groups,
    save_upcycled,
    text_model,
    tiny_dense,
    upcycle,
)

pytestmark = pytest.mark.usefixtures("one_thread")
SIZE = dict(
    vocab_size=60,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
FAMILIES = {
    "llama": {},
    "llama_bias": dict(mlp_bias=True),
    "qwen2": {},
    "qwen3": dict(head_dim=8),
    "mistral": dict(head_dim=8),
    "smollm3": {},
    "gemma": dict(head_dim=8),
    "gemma2": dict(head_dim=8),
    "gemma3_text": dict(head_dim=8),
    "olmo2": {},
    "granite": {},
}
TOKENS = torch.arange(24).view(2, 12) * 7 % 60


def tiny(family, **more):
    config = AutoConfig.for_model(family.removesuffix("_bias"), **{**SIZE, **FAMILIES.get(family, {}), **more})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for p in model.parameters():
        if p.ndim == 1:
            p.data.add_(torch.randn(p.shape) * 0.1)  # biases and norms that matter
    return model


@torch.no_grad()
def logits(model):
    return model(input_ids=TOKENS, use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_upcycled_computes_what_the_dense_model_did(family, tmp_path):
    tiny(family).save_pretrained(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    dense = logits(model)
    near = dict(rtol=1e-4, atol=1e-5 * float(dense.abs().max()))
    upcycle(model, num_experts=4, k=2, first_k_dense_replace=1)
    assert (
        len(moe_layers(model)) == 2
        and not moe_layers(model).refused
        and sum(isinstance(m, UpcycledMLP) for m in model.modules()) == 2
    )
    for experts in ("ragged", "grouped_mm", "batched_mm", "eager"):
        model.config._experts_implementation = experts
        torch.testing.assert_close(logits(model), dense, **near)
    for routers in ([make_router("softk", 32, 4, k=2) for _ in range(2)], [make_router("random", 32, 4, k=3)] * 2):
        for mode in ("ragged", "keep"):
            with route(model, routers, experts=mode) as patch:
                torch.testing.assert_close(logits(model), dense, **near)
            assert patch.report().asked == patch.report().received == routers[0].k
    own = logits(model)
    for layer in (m for m in model.modules() if isinstance(m, UpcycledMLP)):
        layer.experts.down_proj[0].mul_(3)  # unequal experts: the test can fail
    assert not torch.allclose(logits(model), own, **near)
    again, tokenizer, router = load_upcycled(save_upcycled(model, tmp_path / "moe"), experts="eager")
    assert type(again) is type(model) and tokenizer is router is None and torch.equal(logits(again), logits(model))


def test_implementations_agree_on_unequal_experts_and_in_the_gradient():
    model, grads = upcycle(tiny("llama_bias"), 4, 2), {}
    for p in model.parameters():
        if p.ndim == 3:
            p.data.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    for name in ("eager", "ragged"):
        model.config._experts_implementation = name
        model.zero_grad()
        model(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss.backward()
        grads[name] = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert grads["eager"].keys() == grads["ragged"].keys() and not any("shared_expert" in n for n in grads["eager"])
    assert any(n.endswith("gate.weight") for n in grads["eager"]) and any(
        n.endswith("down_proj_bias") for n in grads["eager"]
    )
    for n, g in grads["eager"].items():
        torch.testing.assert_close(grads["ragged"][n], g, rtol=1e-3, atol=1e-5)


def test_as_shipped_doubles_the_mlp():
    dense = tiny("llama")
    doubled = deepcopy(dense)
    for layer in doubled.model.layers:
        layer.mlp.down_proj.weight.data.mul_(2)
    shipped, routed = (
        upcycle(deepcopy(dense), 4, 2, **o) for o in (dict(combine="sum_as_shipped"), dict(shared_expert=False))
    )
    torch.testing.assert_close(logits(shipped), logits(doubled), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(routed), logits(dense), rtol=1e-4, atol=1e-5)
    assert routed.model.layers[0].mlp.shared_expert is None
    moved = logits(shipped)
    for layer in shipped.model.layers:
        layer.mlp.experts.down_proj.data.mul_(7)
    torch.testing.assert_close(
        logits(shipped), moved, rtol=1e-4, atol=1e-5
    )  # the norm of the routed half is the shared one's
    shipped.train()
    hidden = torch.randn(5, 32, requires_grad=True)
    layer = shipped.model.layers[0].mlp
    layer.experts.down_proj.data.zero_()
    layer(hidden).sum().backward()
    assert not hidden.grad.any()  # nothing flows back through the shared expert


REFUSED = {
    "gpt2": (dict(n_layer=2, n_head=2, n_embd=16, vocab_size=60), "transformer.h.0.mlp", "GPT2MLP with c_fc"),
    "gpt_neox": (SIZE, "gpt_neox.layers.0.mlp", "dense_h_to_4h"),
    "phi3": (SIZE, "model.layers.0.mlp", "gate_up_proj"),
    "olmoe": (
        {**SIZE, "num_experts": 4, "num_experts_per_tok": 2},
        "model.layers.0.mlp",
        "a mixture of experts already",
    ),
    "mixtral": ({**SIZE, "num_local_experts": 4}, "model.layers.0.mlp", "a mixture of experts already"),
    "opt": (dict(SIZE, ffn_dim=32, word_embed_proj_dim=32), "model.decoder.layers.0", "fc1, fc2"),
    "deepseek_v3": (
        dict(
            SIZE,
            first_k_dense_replace=1,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_group=2,
            topk_group=1,
            q_lora_rank=16,
            kv_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=8,
            moe_intermediate_size=16,
        ),
        "model.layers.1.mlp",
        "a mixture of experts already",
    ),
}


@pytest.mark.parametrize("family", REFUSED)
def test_other_forms_are_refused_and_left_alone(family):
    size, where, found = REFUSED[family]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **size))
    before = list(model.state_dict())
    with pytest.raises(ValueError) as e:
        upcycle(model, 4, 2)
    for part in (where, found, "gate_proj, up_proj, down_proj", "act_fn"):
        assert part in str(e.value), (part, str(e.value))
    assert (
        list(model.state_dict()) == before
        and not hasattr(model.config, "upcycling")
        and all(p.requires_grad for p in model.parameters())
    )


def test_right_names_but_another_forward_is_refused():
    model = tiny("llama")
    mlp = model.model.layers[2].mlp
    mlp.forward = lambda x: mlp.down_proj(mlp.act_fn(mlp.up_proj(x)) * mlp.gate_proj(x))  # the other map is gated
    with pytest.raises(ValueError, match="model.layers.2.mlp.*computes something else"):
        upcycle(model, 4, 2)
    assert not any(isinstance(m, UpcycledMLP) for m in model.modules())


@pytest.mark.parametrize(
    "bad, message",
    [
        (dict(num_experts=1), "num_experts = 1"),
        (dict(k=5), "k = 5"),
        (dict(k=0), "k = 0"),
        (dict(first_k_dense_replace=3), r"\[0, 2\]"),
        (dict(combine="sum"), "sum_as_shipped"),
        (dict(combine="sum_as_shipped", shared_expert=False), "needs a shared expert"),
    ],
)
def test_bad_parameters_say_what_is_allowed(bad, message):
    with pytest.raises(ValueError, match=message):
        upcycle(tiny("llama"), **{"num_experts": 4, "k": 2, **bad})


def test_twice_is_refused():
    with pytest.raises(ValueError, match="a mixture of experts already"):
        upcycle(upcycle(tiny("llama"), 4, 2), 4, 2)


@pytest.mark.parametrize("family", ["llama", "olmoe"])
def test_every_parameter_in_one_group(family):
    model = (
        upcycle(tiny("llama"), 4, 2, first_k_dense_replace=1)
        if family == "llama"
        else AutoModelForCausalLM.from_config(
            AutoConfig.for_model("olmoe", **SIZE, num_experts=4, num_experts_per_tok=2)
        )
    )
    names = {p: n for n, p in model.named_parameters()}
    groups = parameter_groups(model, router=5e-5, experts=1e-5, others=2e-5, weight_decay=0.1)
    held = [p for g in groups for p in g["params"]]
    assert len(held) == len(set(held)) and set(held) == {p for p in model.parameters() if p.requires_grad}
    for g in groups:
        for name in (names[p] for p in g["params"]):
            kind = "router" if ".gate." in name else "experts" if ".experts." in name else "others"
            assert g["lr"] == {"router": 5e-5, "experts": 1e-5, "others": 2e-5}[kind] and g["name"].startswith(kind), (
                name
            )
            assert g["weight_decay"] == (0 if "norm" in name or name.endswith("bias") else 0.1), name
    if family == "llama":
        assert (
            {n for p, n in names.items() if p not in set(held)}
            == {n for n in names.values() if "shared_expert" in n}
            != set()
        )


@pytest.fixture(scope="module")
def small():
    return tiny_dense(steps=2, documents=60, vocab_size=400)


def test_saved_with_its_router(small, tmp_path):
    dense, tokenizer = small
    model, made_by = upcycle(deepcopy(dense), 4, 2), {"name": "loss_free", "k": 2, "u": 0.1}
    router = make_router(hidden_size=64, num_experts=4, **made_by)
    router.bias += torch.arange(4.0)
    for kept in (router, [router, make_router(hidden_size=64, num_experts=4, **made_by)]):
        save_upcycled(model, tmp_path, tokenizer, kept, made_by)
        again, spoken, found = load_upcycled(tmp_path)
        assert (
            spoken("a word").input_ids == tokenizer("a word").input_ids
            and again.lm_head.weight is again.model.embed_tokens.weight
        )
        assert isinstance(found, list) == isinstance(kept, list)
        first = found[0] if isinstance(found, list) else found
        assert torch.equal(first.bias, router.bias) and torch.equal(first.weight, router.weight)
        with torch.no_grad(), route(model, kept), route(again, found):
            assert torch.equal(logits(model), logits(again))
    with pytest.raises(ValueError, match="made_by"):
        save_upcycled(model, tmp_path, router=router)
    with pytest.raises(ValueError, match="was not upcycled"):
        save_upcycled(dense, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model.safetensors"):
        load_upcycled(tmp_path)
    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(tmp_path)  # no plain dense model with random layers comes out


@pytest.mark.parametrize("family", ["idefics3", "smolvlm"])
def test_text_model_of_a_vision_language_model(family, small, tmp_path):
    from transformers import AutoModelForImageTextToText

    _, tokenizer = small
    text = {**SIZE, "vocab_size": 400, "model_type": "llama"}
    vision = dict(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = AutoConfig.for_model(
        family, text_config=text, vision_config=vision, scale_factor=2, image_token_id=5, pad_token_id=0
    )
    whole = AutoModelForImageTextToText.from_config(config).eval()
    whole.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = whole(input_ids=TOKENS, use_cache=False).logits
    torch.testing.assert_close(logits(text_model(whole)), expected)
    with pytest.raises(ValueError, match=r"text_model\(model\)"):
        upcycle(whole, 4, 2)
    model, _ = load_dense(str(tmp_path), device="cpu")
    assert (
        type(model).__name__ == "LlamaForCausalLM"
        and not any(p.is_meta for p in model.parameters())
        and not any(b.is_meta for b in model.buffers())
    )
    torch.testing.assert_close(logits(model), expected)
    torch.testing.assert_close(logits(upcycle(model, 4, 2)), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        logits(load_upcycled(save_upcycled(model, tmp_path / "moe"))[0]), expected, rtol=1e-4, atol=1e-5
    )


def test_local_folder_and_foreign_tokenizer(small, tmp_path):
    dense, tokenizer = small
    dense.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, own = load_dense(str(tmp_path), device="cpu")
    assert model.config._attn_implementation == "sdpa" and len(own) == 400 and model.dtype == torch.float32
    own.add_tokens(["<new>"])
    own.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="401 tokens, the model embeds 400"):
        load_dense(str(tmp_path), device="cpu")
    tokenizer = deepcopy(tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="end-of-text"):
        check_tokenizer(model, tokenizer)
    with pytest.raises(FileNotFoundError):
        load_dense("no-such/model", device="cpu")


def test_attention_backend_needs_half_precision_and_a_gpu(monkeypatch):
    import transformers.utils

    monkeypatch.setattr(transformers.utils, "is_flash_attn_2_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    assert attention_backend("cpu", torch.bfloat16) == attention_backend("cuda", torch.float32) == "sdpa"
    assert attention_backend("cuda", torch.bfloat16) == attention_backend("cuda", "bfloat16") == "flash_attention_2"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert attention_backend("cuda", torch.bfloat16) == "sdpa"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(transformers.utils, "is_flash_attn_2_available", lambda: False)
    assert attention_backend("cuda", torch.bfloat16) == "sdpa"
