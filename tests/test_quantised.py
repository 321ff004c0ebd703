"""Quantised experts: every layout and size against a loop over dequantised matrices.

Real families through load_model, the proof by bytes, memory, and every refusal."""

import gc
import logging
import weakref
from dataclasses import replace

import pytest
import torch
from test_experts import LAYOUTS, MIXES, loop, make
from transformers import (
    AutoModelForCausalLM,
    DbrxConfig,
    DogeConfig,
    GptOssConfig,
    Llama4TextConfig,
    LlamaConfig,
    MixtralConfig,
    OlmoeConfig,
    Qwen2MoeConfig,
)

from moe_routing.models import quantised
from moe_routing.models.load import fingerprint, load_model, make_tokenizer, model_size
from moe_routing.patching.patch import route
from moe_routing.patching.probe import moe_layers
from moe_routing.models.quantised import (
    QUANTISATIONS,
    QuantisedExperts,
    check_quantised,
    memory_plan,
    pack_weight,
    prepared,
    quantise_experts,
    quantisation_config,
    stored_tensors,
    unpack_weight,
    weight_groups,
)
from moe_routing.routers.zoo import make_rule
from moe_routing.settings import load_settings
from moe_routing.traces.format import Trace
from moe_routing.traces.recorder import record

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
SHAPE = dict(
    vocab_size=300,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=16,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)
FAMILIES = {
    "olmoe": OlmoeConfig(**SHAPE, intermediate_size=24, num_experts=8, num_experts_per_tok=2, norm_topk_prob=False),
    "qwen2_moe": Qwen2MoeConfig(
        **SHAPE,
        intermediate_size=40,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=40,
        num_experts=6,
        num_experts_per_tok=2,
    ),
    "mixtral": MixtralConfig(**SHAPE, intermediate_size=24, num_local_experts=4),
    "gpt_oss": GptOssConfig(**{**SHAPE, "intermediate_size": 24, "num_local_experts": 4, "num_experts_per_tok": 2}),
}
IDS = torch.randint(0, 300, (2, 9), generator=torch.Generator().manual_seed(0))


def tiny(config):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        for p in model.parameters():
            if p.ndim > 1:
                torch.nn.init.normal_(p, std=0.1)
    model.set_experts_implementation("ragged")
    return model


def experts_of(model):
    return [m for m in model.modules() if hasattr(m, "_is_expert_parallel")]


def stack(module, name):
    "All matrices of a projection, dequantised, in the layout of the module it came from."
    full = torch.stack([module.weight(name, e, torch.float32) for e in range(module.num_experts)])
    return full.transpose(1, 2) if module.is_transposed else full


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer([f"number {i} of the texts, with {i * 17} things in it" for i in range(200)], 300)


@pytest.fixture(scope="module")
def folders(tokenizer, tmp_path_factory):
    made = {}
    for name, config in FAMILIES.items():
        made[name] = tmp_path_factory.mktemp(name)
        tiny(config).save_pretrained(made[name])
        tokenizer.save_pretrained(made[name])
    return made


@pytest.fixture(scope="module")
def settings():
    return replace(load_settings(), hub=False, device="cpu")


@pytest.fixture(scope="module")
def loaded(folders, settings):
    return {
        (f, q): load_model(str(folders[f]), dtype="float32", quantize=q, settings=settings)[0]
        for f in FAMILIES
        for q in QUANTISATIONS
    }


def levels(w):
    "NF4 with full-precision scales, from its published levels."
    table = torch.tensor(
        [
            -1.0,
            -0.6961928009986877,
            -0.5250730514526367,
            -0.39491748809814453,
            -0.28444138169288635,
            -0.18477343022823334,
            -0.09105003625154495,
            0.0,
            0.07958029955625534,
            0.16093020141124725,
            0.24611230194568634,
            0.33791524171829224,
            0.44070982933044434,
            0.5626170039176941,
            0.7229568362236023,
            1.0,
        ]
    )
    out = []
    for block in w.reshape(-1).split(64):
        scale = block.abs().max().clamp(min=1e-38)
        out.append(table[((block / scale)[:, None] - table).abs().argmin(1)] * scale)
    return torch.cat(out).view_as(w)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (1, 64), (7, 9), (8, 64), (33, 31), (64, 96)])
def test_pack_against_the_definition(shape, dtype):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    for quantize, oracle in (
        ("4bit", levels(w.float())),
        (
            "8bit",
            (w.half().float() * (127 / w.half().float().abs().amax(1, keepdim=True))).round()
            * w.float().abs().amax(1, keepdim=True)
            / 127,
        ),
    ):
        parts = pack_weight(w, quantize)
        again = pack_weight(w, quantize)
        assert all(torch.equal(parts[k], again[k]) for k in parts)
        for out in (torch.float32, dtype):
            back = unpack_weight(parts, shape, out)
            # 8-bit scales of blocks move a level by at most a few per cent; a half-way case may go either way
            assert (
                back.dtype == out
                and back.shape == torch.Size(shape)
                and (back.float() - oracle).abs().max() < 0.03 * w.float().abs().max()
            )


def test_rows_of_zeros_stay_zero():
    w = torch.randn(6, 64)
    w[2:4] = 0
    for q in QUANTISATIONS:
        assert unpack_weight(pack_weight(w, q), w.shape, torch.float32)[2:4].abs().max() == 0
    for q in QUANTISATIONS:
        assert unpack_weight(pack_weight(w * 0, q), w.shape, torch.float32).abs().max() == 0


@pytest.mark.parametrize("quantize,bits", [("4bit", 4.14), ("8bit", 8.26)])
def test_bits_a_weight(quantize, bits):
    parts = pack_weight(torch.randn(256, 128), quantize)
    assert 8 * sum(t.nbytes for k, t in parts.items() if k != "code") / (256 * 128) <= bits


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("quantize", QUANTISATIONS)
def test_a_weight_that_is_not_finite(bad, quantize):
    module = make(3).float()
    with torch.no_grad():
        module.down_proj[1, 0, 0] = bad
    with pytest.raises(ValueError, match="down_proj: a weight is not finite"):
        quantise_experts(module, quantize)


def test_too_large_for_eight_bits():
    with pytest.raises(ValueError, match="use 4bit"):
        pack_weight(torch.full((2, 2), 1e6), "8bit")
    assert (
        unpack_weight(pack_weight(torch.full((2, 64), 1e6), "4bit"), (2, 64), torch.float32).sub(1e6).abs().max() < 1e4
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("quantize", QUANTISATIONS)
def test_every_layout_and_mix(layout, quantize, one_thread):
    for mix, (ids, weights, E) in MIXES.items():
        module, full = (make(E, H=7, I=5, **LAYOUTS[layout]).float() for _ in range(2))
        quantise_experts(module.eval(), quantize)
        with torch.no_grad():
            for name in (
                module.matrices
            ):  # expert by expert still itself: half the widest gap between levels is .15 of a block's largest weight
                back, w = stack(module, name), getattr(full, name)
                assert (
                    back.shape == w.shape
                    and (
                        (back - w).abs().flatten(1).amax(1)
                        < (0.17 if quantize == "4bit" else 0.005) * w.abs().flatten(1).amax(1)
                    ).all()
                )
                w.copy_(back)
            hidden = torch.randn(len(ids), 7, generator=torch.Generator().manual_seed(2))
            want = loop(full, hidden, ids, weights.float())
            got = module(hidden, ids, weights.float())
        assert got.shape == want.shape and torch.allclose(
            got, want, atol=1e-4 * (1 + want.abs().max() if len(want) else 1)
        ), (mix, (got - want).abs().max())


@pytest.mark.parametrize("quantize", QUANTISATIONS)
def test_precision_follows_the_input(quantize):
    module, (ids, weights, _) = make(5, H=64, I=32).float(), MIXES["some used"]
    quantise_experts(module.eval(), quantize)
    hidden = torch.randn(len(ids), 64)
    with torch.no_grad():
        exact = module(hidden, ids, weights.float())
        for dtype, far in ((torch.bfloat16, 0.03), (torch.float16, 0.005)):
            low = module(hidden.to(dtype), ids, weights.to(dtype))
            assert low.dtype == dtype and (low.float() - exact).abs().max() < far * exact.abs().max()
        with torch.autocast("cpu", torch.bfloat16):
            cast = module(hidden, ids, weights.float())
    assert cast.dtype == torch.float32 and 0 < (cast - exact).abs().max() < 0.03 * exact.abs().max()


def test_one_matrix_at_a_time(monkeypatch):
    alive, most, unpack = weakref.WeakSet(), [], unpack_weight

    def watched(*args):
        most.append(len(alive))
        out = unpack(*args)
        alive.add(out.untyped_storage())
        return out

    monkeypatch.setattr(quantised, "unpack_weight", watched)
    module, (ids, weights, _) = make(5).float(), MIXES["all used"]
    quantise_experts(module.eval(), "4bit")
    with torch.no_grad():
        module(torch.randn(len(ids), 6), ids, weights.float())
    used = len(ids.unique())
    assert len(most) == 2 * used and max(most) == 0


@pytest.mark.parametrize("quantize", QUANTISATIONS)
def test_loaded_tensor_by_tensor(folders, settings, quantize, monkeypatch):
    "When a fused tensor arrives, none before it is left in full precision."
    alive, most, store = weakref.WeakSet(), [], QuantisedExperts.store

    def watched(self, name, weight):
        most.append(len(alive))
        alive.add(weight.untyped_storage())
        return store(self, name, weight)

    monkeypatch.setattr(QuantisedExperts, "store", watched)
    load_model(str(folders["qwen2_moe"]), dtype="float32", quantize=quantize, settings=settings)
    assert len(most) == 4 and max(most) == 0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("quantize", QUANTISATIONS)
def test_family_against_dequantised_weights(family, quantize, loaded, folders):
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    model = loaded[family, quantize]
    full = AutoModelForCausalLM.from_pretrained(
        folders[family], dtype=torch.float32, experts_implementation="ragged"
    ).eval()
    bare = tiny(FAMILIES[family])(IDS).logits
    assert torch.equal(full(IDS).logits, bare)
    with torch.no_grad():
        got = model(IDS).logits
        for a, b in zip(experts_of(full), experts_of(model), strict=True):
            for name in b.matrices:
                getattr(a, name).copy_(stack(b, name))
        if (
            quantize == "4bit"
        ):  # LLM.int8 rounds the input of linear maps too, so in 8 bits these are taken over as they are
            for name, m in model.named_modules():
                if type(m).__name__ == "Linear4bit":
                    full.get_submodule(name).weight.copy_(dequantize_bnb_weight(m.weight))
        else:
            for name, m in model.named_modules():
                if type(m).__name__ == "Linear8bitLt":
                    full.set_submodule(name, m)
        want = full(IDS).logits
    scale = bare.abs().max()
    assert (got - want).abs().max() < 2e-5 * scale and 1e-3 * scale < (got - bare).abs().max() < scale


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("quantize,bits", [("4bit", 4.3), ("8bit", 9.4)])
def test_bytes_by_group(family, quantize, bits, loaded):
    model = loaded[family, quantize]
    groups, plan = (
        check_quantised(model, quantize),
        memory_plan(FAMILIES[family], quantize, dtype=torch.float32)["groups"],
    )
    assert {g: (v["parameters"], v["bytes"], v["full"]) for g, v in groups.items()} == {
        g: (v["parameters"], v["bytes"], v["full"]) for g, v in plan.items()
    }
    assert sum(v["parameters"] for v in groups.values()) == sum(p.numel() for p in tiny(FAMILIES[family]).parameters())
    # independent of the accounting: all memory that tensors of the experts modules hold
    held = sum(
        {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for m in experts_of(model)
            for t in (*m.parameters(), *m.buffers())
        }.values()
    )
    assert groups["experts"]["bytes"] == held
    apart = sum(
        t.nbytes
        for m in experts_of(model)
        for n, t in (*m.named_parameters(), *m.named_buffers())
        if n.endswith(("bias", "code"))
    )  # the table of a tensor weighs only here
    assert (
        8
        * (held - apart)
        / sum(E * a * b for m in experts_of(model) for E, (a, b) in ((m.num_experts, s) for s in m.matrices.values()))
        < bits
    )
    assert (
        groups["gates"]["stored"] == groups["embeddings"]["stored"] == groups["head"]["stored"] == ["float32"]
        and groups["experts"]["full"] == 0
    )
    if family == "qwen2_moe":
        assert groups["shared expert"]["stored"] == [quantize] and groups["gates"]["parameters"] == 2 * (6 + 1) * 32
    assert groups["attention"]["full"] == 0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("quantize", QUANTISATIONS)
def test_routes_like_any_model(family, quantize, loaded):
    model, config = loaded[family, quantize], FAMILIES[family]
    E = getattr(config, "num_experts", None) or config.num_local_experts
    layers = moe_layers(model)
    assert (
        [l.num_experts for l in layers] == [E, E]
        and not layers.refused
        and {l.weights_from for l in layers} == {l.weights_from for l in moe_layers(tiny(config))}
    )
    with torch.no_grad():
        bare = model(IDS).logits
        for experts in ("ragged", "keep"):
            with route(model, make_rule("topk", k=1), experts=experts, validate=True) as patch:
                one = model(IDS).logits
            report = patch.report()
            assert report.asked == report.received == 1 and not torch.allclose(one, bare)
        with route(model, None) as patch:
            same = model(IDS).logits
    assert torch.equal(same, bare) and torch.equal(model(IDS).logits, bare)


@pytest.mark.parametrize("quantize", QUANTISATIONS)
def test_recorded_and_named(quantize, loaded, folders, settings, tmp_path):
    model = loaded["qwen2_moe", quantize]
    mine = fingerprint(model)
    trace = record(model, [{"input_ids": IDS}], tmp_path / "trace", keep=("logits",))
    assert isinstance(trace, Trace) and trace.tokens == IDS.numel() and fingerprint(model) == mine
    again = load_model(str(folders["qwen2_moe"]), dtype="float32", quantize=quantize, settings=settings)[0]
    assert (
        fingerprint(again)
        == mine
        != fingerprint(load_model(str(folders["qwen2_moe"]), dtype="float32", settings=settings)[0])
    )
    with torch.no_grad():
        experts_of(again)[0].down_proj_scale[0, 0] += 1
    assert fingerprint(again) != mine


def test_name_sees_scales_of_linear_maps(folders, settings):
    for quantize in QUANTISATIONS:
        model = load_model(str(folders["olmoe"]), dtype="float32", quantize=quantize, settings=settings)[0]
        mine, q = fingerprint(model), model.model.layers[0].self_attn.q_proj
        (q.weight.quant_state.absmax if quantize == "4bit" else q.state.SCB)[0] += 1
        assert fingerprint(model) != mine


@pytest.mark.parametrize("quantize", QUANTISATIONS)
def test_no_training(quantize, folders, settings):
    model = load_model(str(folders["mixtral"]), dtype="float32", quantize=quantize, settings=settings)[0]
    loss = model(IDS, labels=IDS).loss  # a forward outside no_grad is fine
    with pytest.raises(RuntimeError, match="quantised, so nothing can be trained"):
        loss.backward()
    with pytest.raises(RuntimeError, match="quantised, so nothing can be trained"):
        model.train()(IDS)
    model.eval()
    with torch.inference_mode():
        assert torch.allclose(model(IDS).logits, model(IDS).logits)
    assert model(IDS, labels=IDS).loss.item() == loss.item()


def test_no_saving_and_no_casting(loaded, tmp_path):
    for model in (loaded["olmoe", "4bit"], loaded["olmoe", "8bit"]):
        with pytest.raises(ValueError, match="not serializable"):
            model.save_pretrained(tmp_path / "out")
        with pytest.raises(ValueError, match="cast"):
            model.to(torch.bfloat16)
        with pytest.raises(ValueError):
            model.half()
    assert not (tmp_path / "out").exists()


REFUSED = {
    "dbrx": DbrxConfig(
        d_model=32,
        n_heads=2,
        n_layers=2,
        vocab_size=300,
        max_seq_len=64,
        ffn_config=dict(ffn_hidden_size=16, moe_num_experts=4, moe_top_k=2),
        attn_config=dict(kv_n_heads=2, clip_qkv=8.0, rope_theta=1e4),
    ),
    "llama4": Llama4TextConfig(
        **SHAPE, intermediate_size=16, intermediate_size_mlp=16, num_local_experts=4, interleave_moe_layer_step=1
    ),
    "doge": DogeConfig(
        **{k: v for k, v in SHAPE.items() if k != "head_dim"}, intermediate_size=16, is_moe=True, num_experts=16
    ),
}


@pytest.mark.parametrize("family", REFUSED)
def test_families_without_fused_experts(family, settings, tokenizer, tmp_path):
    "Refused from the configuration alone: there is not even a weight to load."
    REFUSED[family].save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for quantize in QUANTISATIONS:
        with pytest.raises(ValueError) as e:
            load_model(str(tmp_path), quantize=quantize, settings=settings)
        assert (
            "quantize=None" in str(e.value)
            and str(tmp_path) in str(e.value)
            and ("full precision" in str(e.value) or "declares 16 experts" in str(e.value))
        )


def test_what_plain_bitsandbytes_does_is_caught(folders):
    from transformers import BitsAndBytesConfig

    model = AutoModelForCausalLM.from_pretrained(
        folders["olmoe"], quantization_config=BitsAndBytesConfig(load_in_4bit=True), device_map={"": "cpu"}
    )
    with pytest.raises(ValueError, match="leaves 100% of the experts of OlmoeForCausalLM in full precision"):
        check_quantised(model, "4bit")


def test_one_layer_forgotten(folders, settings):
    model = load_model(str(folders["olmoe"]), dtype="float32", quantize="4bit", settings=settings)[0]
    model.model.layers[1].mlp.experts = tiny(FAMILIES["olmoe"]).model.layers[1].mlp.experts
    with pytest.raises(ValueError, match="in full precision"):
        check_quantised(model, "4bit")
    quantise_experts(model.model.layers[1].mlp.experts, "8bit")
    with pytest.raises(ValueError, match="stored in 8bit, not in 4bit"):
        check_quantised(model, "4bit")


def test_a_dense_model_is_quantised_as_ever(settings, tokenizer, tmp_path):
    tiny_dense = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE, intermediate_size=48)).eval()
    tiny_dense.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, _ = load_model(str(tmp_path), dtype="float32", quantize="4bit", settings=settings)
    groups = weight_groups(model)
    assert "experts" not in groups and "4bit" in groups["attention"]["stored"] and groups["other"]["stored"] == ["4bit"]


@pytest.mark.parametrize(
    "call,words",
    [
        (lambda f, s: load_model(str(f), quantize="3bit", settings=s), ["'3bit'", "4bit, 8bit"]),
        (lambda f, s: quantisation_config("int8"), ["'int8'", "4bit, 8bit"]),
        (lambda f, s: quantise_experts(torch.nn.Linear(2, 2), "4bit"), ["Linear", "fused parameters"]),
        (lambda f, s: quantise_experts(make(2).float(), "5bit"), ["'5bit'"]),
        (lambda f, s: quantise_experts(quantise_experts(make(2).float(), "4bit"), "8bit"), ["already", "4bit"]),
        (lambda f, s: memory_plan(FAMILIES["olmoe"], "4bit", batch=0), ["batch = 0"]),
        (lambda f, s: memory_plan(FAMILIES["olmoe"], "4bit", length=-1), ["length = -1"]),
        (lambda f, s: memory_plan(FAMILIES["olmoe"], "6bit"), ["'6bit'"]),
        (lambda f, s: check_quantised(tiny(FAMILIES["olmoe"]), "nf4"), ["'nf4'"]),
    ],
)
def test_bad_input(call, words, folders, settings):
    with pytest.raises(ValueError) as e:
        call(folders["olmoe"], settings)
    assert all(w in str(e.value) for w in words), str(e.value)


def test_damaged_weights_are_named(settings, tokenizer, tmp_path):
    model = tiny(FAMILIES["mixtral"])
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[0, 0, 0] = float("nan")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="layers.1.mlp.experts.down_proj.*not finite"):
        load_model(str(tmp_path), dtype="float32", quantize="4bit", settings=settings)


def test_a_checkpoint_that_is_quantised_already(settings, tokenizer, tmp_path):
    config = OlmoeConfig(**{**FAMILIES["olmoe"].to_dict(), "quantization_config": {"quant_method": "gptq", "bits": 4}})
    config.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="quantised already .gptq."):
        load_model(str(tmp_path), quantize="4bit", settings=settings)


def test_qwen_fits_the_seeds_card():
    qwen = Qwen2MoeConfig(
        vocab_size=151936,
        hidden_size=2048,
        num_hidden_layers=24,
        num_attention_heads=16,
        num_key_value_heads=16,
        intermediate_size=5632,
        moe_intermediate_size=1408,
        shared_expert_intermediate_size=5632,
        num_experts=60,
        num_experts_per_tok=4,
        norm_topk_prob=False,
        tie_word_embeddings=False,
    )
    plan = memory_plan(qwen, "4bit")
    experts = 24 * 60 * 3 * 2048 * 1408
    assert plan["groups"]["experts"]["parameters"] == experts and 4.12 < plan["groups"]["experts"]["bits"] < 4.14
    assert 14.3e9 < sum(g["parameters"] for g in plan["groups"].values()) < 14.33e9
    assert plan["parts"]["weights"] < 10 * 2**30 and max(plan["forward"], plan["loading"]) < 21e9
    assert plan["parts"]["logits"] == 8 * 256 * 151936 * 6 and plan["parts"]["one matrix"] == 2048 * 5632 * 2
    assert plan["parts"]["trace"] == 2 * 24 * 8 * 256 * 2048 * 2
    eight = model_size(qwen, quantize="8bit")["gigabytes"]
    assert plan["parts"]["weights"] / 1e9 < 0.6 * eight < 0.6 * 16 and model_size(qwen)["gigabytes"] > 28


def test_gates_that_are_linear_maps_stay():
    "Some families make their gates of nn.Linear, which a conversion of all such modules would take."
    from moe_routing.patching.patch import families, tiny_family

    every = families()
    for name in ("zaya", "granitemoe", "jamba"):
        model = prepared(tiny_family(name, every[name]).config, "4bit", torch.float32)
        gates = [
            (n, type(p).__name__)
            for n, p in model.named_parameters()
            if any(w in ("router", "gate") for w in n.split("."))
        ]
        assert gates and all(kind == "Parameter" for _, kind in gates), (name, gates)


def test_latent_experts_without_gating():
    "NemotronH: experts of one projection and an activation, beside Mamba layers."
    from moe_routing.patching.patch import families, tiny_family

    model = tiny_family("nemotron_h", families()["nemotron_h"])
    bare = model(IDS % 96).logits
    for m in experts_of(model):
        quantise_experts(m, "8bit")
    with torch.no_grad():
        got = model(IDS % 96).logits
    assert (
        check_quantised(model, "8bit")["experts"]["full"] == 0 and 0 < (got - bare).abs().max() < 0.2 * bare.abs().max()
    )


def test_nothing_is_kept_of_the_full_weights(folders, settings):
    model = load_model(str(folders["olmoe"]), dtype="float32", quantize="4bit", settings=settings)[0]
    gc.collect()
    mine = {t.untyped_storage().data_ptr() for parts in stored_tensors(model).values() for t in parts}
    E, (a, b) = 8, experts_of(model)[0].matrices["gate_up_proj"]
    for o in gc.get_objects():
        if type(o) is torch.Tensor and o.device.type == "cpu" and tuple(o.shape) == (E, a, b):
            assert o.untyped_storage().data_ptr() in mine


@pytest.mark.parametrize("quantize", QUANTISATIONS)
def test_generates(quantize, loaded):
    model = loaded["qwen2_moe", quantize]
    with torch.no_grad():
        out = model.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0)
        again = IDS
        for _ in range(4):
            again = torch.cat([again, model(again).logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(out, again)


def test_loaded_but_cannot_run(settings, tokenizer, tmp_path):
    "bitsandbytes' 8-bit maps take no input of four dimensions, which latent attention gives them; 4 bit works."
    from transformers import DeepseekV3Config

    config = DeepseekV3Config(
        **{k: v for k, v in SHAPE.items() if k != "head_dim"},
        intermediate_size=16,
        moe_intermediate_size=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        kv_lora_rank=16,
        q_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
    )
    tiny(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, _ = load_model(str(tmp_path), dtype="float32", quantize="4bit", settings=settings)
    assert weight_groups(model)["shared expert"]["full"] == 0 and len(moe_layers(model)) == 1
    with pytest.raises(RuntimeError, match="cannot run.*quantize='4bit'"):
        load_model(str(tmp_path), dtype="float32", quantize="8bit", settings=settings)
