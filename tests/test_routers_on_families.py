"""route() under every router, on families with different gates, against one token at a time.

The gate's formula, the choice and the experts are written out again."""

import math

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from moe_routing.patching.patch import route
from moe_routing.patching.probe import moe_layers
from moe_routing.routers.pvalue import fit_null
from moe_routing.routers.zoo import ROUTERS, make_rule

E, K = 16, 4
SIZES = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    num_experts_per_tok=K,
    pad_token_id=None,
    bos_token_id=None,
    eos_token_id=None,
)
FAMILIES = {
    "olmoe": lambda: OlmoeForCausalLM(OlmoeConfig(**SIZES, num_experts=E)),
    "qwen2_moe": lambda: Qwen2MoeForCausalLM(
        Qwen2MoeConfig(**SIZES, moe_intermediate_size=16, shared_expert_intermediate_size=16, num_experts=E)
    ),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=E)),
    "gpt_oss": lambda: GptOssForCausalLM(GptOssConfig(**SIZES, head_dim=8, num_local_experts=E)),
    "deepseek_v3": lambda: DeepseekV3ForCausalLM(
        DeepseekV3Config(
            **SIZES,
            moe_intermediate_size=16,
            n_routed_experts=E,
            n_group=4,
            topk_group=2,
            n_shared_experts=1,
            first_k_dense_replace=1,
            q_lora_rank=16,
            kv_lora_rank=16,
            qk_rope_head_dim=8,
            v_head_dim=8,
            qk_nope_head_dim=8,
        )
    ),
}


def build(family, dtype):
    torch.manual_seed(1)
    model = FAMILIES[family]().eval()
    with torch.no_grad():
        for name, p in [*model.named_parameters(), *model.named_buffers()]:
            if p.is_floating_point() and (p.ndim > 1 or name.endswith("bias")):
                p.normal_(0, 0.3)  # correction biases too
    return model.to(dtype)


def gate(family, layer, x):
    "Logits, what the gate ranks by, and its weights for a set, for one token."
    if family == "gpt_oss":
        logits = F.linear(x, layer.gate.weight, layer.gate.bias)
        return logits.float(), logits.float(), lambda ids: logits[ids].softmax(0)
    if family == "deepseek_v3":
        logits = F.linear(x.float(), layer.gate.weight.float())
        scores = logits.sigmoid()
        choice = scores + layer.gate.e_score_correction_bias
        best = choice.view(4, 4).topk(2).values.sum(-1).topk(2).indices
        choice = choice.masked_fill(~torch.isin(torch.arange(E) // 4, best), float("-inf"))
        return (
            logits,
            choice.float(),
            lambda ids: scores[ids] / (scores[ids].sum() + 1e-20) * layer.gate.routed_scaling_factor,
        )
    logits = F.linear(x, layer.gate.weight).float()
    p = logits.softmax(0)
    return logits, p, lambda ids: p[ids] / p[ids].sum() if family == "mixtral" else p[ids]


def expert(family, module, x, e):
    if family == "gpt_oss":
        y = x @ module.gate_up_proj[e] + module.gate_up_proj_bias[e]
        g, u = y[::2].clamp(max=module.limit), y[1::2].clamp(-module.limit, module.limit)
        return ((u + 1) * (g * torch.sigmoid(g * module.alpha))) @ module.down_proj[e] + module.down_proj_bias[e]
    g, u = (module.gate_up_proj[e] @ x).chunk(2)
    return module.down_proj[e] @ (F.silu(g) * u)


def step_up(p, alpha):
    return max((r for r, q in enumerate(sorted(p.tolist()), 1) if q <= alpha * r / len(p)), default=0)


def choose(name, params, logits, choice, null, layer):
    "The set of one token; None where it does not follow from the token's own logits."
    if ROUTERS[name].chooses != "token":
        return None
    allowed = [e for e in range(E) if choice[e] > float("-inf")]
    order = sorted(allowed, key=lambda e: (-float(choice[e]), e))
    total = sum(math.exp(float(logits[e])) for e in allowed)
    p = [math.exp(float(logits[e])) / total for e in order]
    if ROUTERS[name].group != "adaptive":
        n = params.get("k", 1)
    elif name == "top_p":
        n = next((i for i in range(1, len(p)) if sum(p[:i]) >= params["p"]), len(p))
    elif name == "threshold":
        n = max(1, sum(q >= params["threshold"] for q in p))
    elif name == "entropy_bands":
        n = next((k for bar, k in ((0.7, K // 2), (0.5, K), (0.3, 2 * K)) if p[0] > bar), 4 * K)
    else:
        tested = null.p_values(logits[None], layer)[0].masked_fill(choice == float("-inf"), 1.0)
        if name == "hc":
            q = sorted(tested.clamp(1e-10, 1 - 1e-10).tolist())[: int(E * params["beta"])]
            n = max(range(len(q)), key=lambda i: ((i + 1) / E - q[i]) / math.sqrt(q[i] * (1 - q[i]) + 1e-10)) + 1
        else:
            n = step_up(tested, params["alpha"] / (1 if name == "bh" else sum(1 / r for r in range(1, E + 1))))
        n = min(max(n, 1), params["max_k"])
    return set(order[:n])


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_router(family, dtype):
    model, generator = build(family, dtype), torch.Generator().manual_seed(0)
    layers, seen = moe_layers(model), {}
    with route(model, None, observe=lambda c, r, h: seen.__setitem__(c.layer, r.logits)):
        model(torch.randint(3, 64, (6, 40), generator=generator))
    null = fit_null(torch.stack([seen[l] for l in range(len(layers))], 1))
    ids = torch.randint(3, 64, (3, 6), generator=generator)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [1] * 6])
    for name, row in ROUTERS.items():
        rule = make_rule(name, **row.example, weigh="native", **({"null": null} if row.needs_null else {}))
        decided, came = {}, {}
        hooks = [
            layer.experts.register_forward_hook(lambda m, a, o, i=i: came.__setitem__(i, o))
            for i, layer in enumerate(layers)
        ]
        with route(model, rule, validate=True, observe=lambda c, r, h: decided.__setitem__(c.layer, (r, h))):
            model(ids, attention_mask=mask, use_cache=False)
        for hook in hooks:
            hook.remove()
        for l, layer in enumerate(layers):
            routing, hidden = decided[l]
            for t, x in enumerate(hidden):
                logits, choice, weights = gate(family, layer, x)
                found = routing.experts[t][routing.experts[t] < E]
                wanted = choose(name, {**row.defaults, **row.example}, logits, choice, null, l)
                assert wanted is None or set(found.tolist()) == wanted, (name, l, t)
                w, loose = weights(found).float(), 1e-5 if dtype == torch.float32 else 1e-2
                assert torch.allclose(routing.weights[t][: len(found)].float(), w, atol=loose), (name, l, t)
                y = sum(
                    (w[i] * expert(family, layer.experts, x, int(e)).float() for i, e in enumerate(found)),
                    torch.zeros(x.shape),
                )
                assert (came[l].reshape(len(hidden), -1)[t].float() - y).abs().max() <= loose * (1 + y.abs().max()), (
                    name,
                    l,
                    t,
                )
