"""route() in odd cases.

Backends, precision, padding, caches, checkpointing, nesting, copies, faults, and undoing all of it."""

from copy import deepcopy
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, OlmoeConfig, OlmoeForCausalLM

from moe_routing.core import Routing, Rule, order_slots
from moe_routing.patching.patch import route
from moe_routing.patching.probe import MoELayer, moe_layers

SIZES = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=16,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=4,
    num_experts_per_tok=4,
    eos_token_id=None,
    pad_token_id=None,
    bos_token_id=None,
    initializer_range=0.3,
)
TOKENS = torch.randint(0, 64, (3, 9), generator=torch.Generator().manual_seed(0))


def olmoe(seed=0, **changes):
    torch.manual_seed(seed)
    return OlmoeForCausalLM(OlmoeConfig(**{**SIZES, "num_experts": 16, **changes})).eval()


def mixtral(seed=0, **changes):
    torch.manual_seed(seed)
    return MixtralForCausalLM(MixtralConfig(**{**SIZES, "num_local_experts": 16, **changes})).eval()


@dataclass(frozen=True)
class TopK(Rule):
    k: int | None = None
    weigh: str = "native"

    def decide(self, view):
        experts = view.choice.topk(self.k or view.k).indices
        return Routing(view.logits, *order_slots(experts, view.weigh(experts), view.num_experts))


@dataclass(frozen=True)
class Some(Rule):
    "Between 0 and k experts a token, by the token's number."

    k: int = 6
    weigh: str = "native"

    def decide(self, view):
        experts = view.choice.topk(self.k).indices
        count = torch.arange(len(experts)) % (self.k + 1)
        experts = experts.masked_fill(torch.arange(self.k) >= count.unsqueeze(1), view.num_experts)
        return Routing(view.logits, *order_slots(experts, view.weigh(experts), view.num_experts))


def logits(model, *args, **kwargs):
    with torch.no_grad():
        return model(*(args or (() if kwargs.get("inputs_embeds") is not None else (TOKENS,))), **kwargs).logits


def untouched(model):
    return not any("forward" in m.__dict__ or m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("build", [olmoe, mixtral])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["eager", "grouped_mm", "batched_mm"])
def test_identity_changes_no_bit(build, dtype, backend):
    model = build().to(dtype)
    model.set_experts_implementation(backend)
    native = logits(model)
    for rule in (TopK(), None):
        with route(model, rule, experts="keep", validate=True) as patch:
            assert torch.equal(native, logits(model))
        assert patch.report().changed == 0 and patch.report().mass_share == pytest.approx(1)
    with route(model, TopK()):
        ragged = logits(model)
    if dtype == torch.float32:
        assert torch.allclose(native, ragged, atol=1e-5)
    else:
        assert (native - ragged).abs().mean() < 0.02 * native.abs().mean()
    assert (
        torch.equal(native, logits(model)) and untouched(model) and model.get_experts_implementation() == {"": backend}
    )


@pytest.mark.parametrize("build", [olmoe, mixtral])
@pytest.mark.parametrize("k", [1, 3, 8, 16])
def test_another_k_is_what_the_model_configured_with_that_k_does(build, k):
    model, other = build(), build(num_experts_per_tok=k)
    other.load_state_dict(model.state_dict())
    for experts in ("keep", "ragged"):
        with route(model, TopK(k), experts=experts) as patch:
            assert torch.allclose(logits(model), logits(other), atol=1e-5)
        assert patch.report().received == patch.report().asked == k and patch.report().own == 4


@pytest.mark.parametrize("build", [olmoe, mixtral])
@pytest.mark.parametrize("backend", ["eager", "grouped_mm", "batched_mm"])
def test_unused_slots_in_every_backend(build, backend):
    model = build()
    model.set_experts_implementation(backend)
    with route(model, Some(), experts="keep", validate=True) as kept:
        a = logits(model)
    with route(model, Some(), experts="ragged") as ragged:
        b = logits(model)
    assert a.isfinite().all() and torch.allclose(a, b, atol=1e-5)
    assert kept.report().received == ragged.report().received == ragged.report().asked < 4


def test_no_expert_at_all():
    class Nobody(Rule):
        def decide(self, view):
            experts = torch.full((len(view.logits), 2), view.num_experts)
            return Routing(view.logits, experts, torch.zeros(experts.shape))

    model = olmoe()
    with route(model, Nobody()) as patch:
        a = logits(model)
    with route(model, Nobody(), experts="keep"):
        b = logits(model)
    assert torch.equal(a, b) and patch.report().received == 0 and patch.report().mass_share == 0


def test_mixed_counts_get_the_weights_of_their_own_set():
    "Mixtral renormalises over the chosen experts, so a token's weights sum to 1 whatever its count."
    sums = []

    def look(context, routing, hidden):
        sums.append(routing.weights.sum(-1)[routing.counts > 0])

    with route(mixtral(), Some(), observe=look) as patch:
        logits(patch.model)
    assert torch.allclose(torch.cat(sums), torch.ones(()), atol=1e-6)


@pytest.mark.parametrize("how", ["exception", "nan", "keyboard"])
def test_everything_is_restored_after_a_fault(how):
    model = olmoe()
    native, state = logits(model), {k: v.clone() for k, v in model.state_dict().items()}

    class Fault(Rule):
        def decide(self, view):
            if view.context.layer == 1:
                raise {"exception": ValueError, "nan": ValueError, "keyboard": KeyboardInterrupt}[how]("fault")
            return TopK().decide(view)

    with pytest.raises((ValueError, KeyboardInterrupt)):
        with route(model, Fault()):
            logits(model)
    assert (
        untouched(model)
        and torch.equal(native, logits(model))
        and model.get_experts_implementation() == {"": "grouped_mm"}
    )
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_not_a_number_in_the_logits_is_named():
    model = olmoe()
    with torch.no_grad():
        model.model.layers[1].mlp.gate.weight[3, 0] = float("nan")
    with pytest.raises(ValueError, match="layer 1"):
        with route(model, TopK(weigh="x")):
            logits(model)
    assert untouched(model)


def test_the_forward_after_a_fault_is_counted_right():
    model, calls = olmoe(), []

    def look(context, routing, hidden):
        calls.append((context.forward, context.token_id is not None))
        if len(calls) == 2:
            raise ZeroDivisionError

    with route(model, None, observe=look):
        with pytest.raises(ZeroDivisionError):
            logits(model)
        logits(model)
    assert calls[2:] == [(1, True)] * 3


def test_patches_in_a_row_and_on_each_other():
    model = olmoe()
    native = logits(model)
    outs = []
    for rule in (TopK(2), TopK(8), TopK(2)):
        with route(model, rule):
            outs.append(logits(model))
    assert torch.equal(outs[0], outs[2]) and not torch.equal(outs[0], outs[1]) and torch.equal(native, logits(model))
    with route(model, TopK(2)):
        inner = route(model, TopK(8))
        with pytest.raises(RuntimeError, match="already patched"):
            inner.__enter__()
        assert torch.equal(logits(model), outs[0])
    assert untouched(model) and torch.equal(native, logits(model))


def test_one_patch_used_twice_goes_on_counting():
    model = olmoe()
    patch = route(model, TopK())
    for _ in range(2):
        with patch:
            logits(model)
    assert patch.report().tokens == 2 * TOKENS.numel() and patch.report().forwards == 2


def test_copies():
    model = olmoe()
    with route(model, TopK(2)):
        with pytest.raises(RuntimeError, match="copied"):
            deepcopy(model)
    copy = deepcopy(model)
    with route(copy, TopK(2)) as patch:
        a = logits(copy)
    assert untouched(model) and patch.report().received == 2
    with route(model, TopK(2)):
        assert torch.equal(a, logits(model))


def test_a_forward_that_was_replaced_before_is_put_back():
    "accelerate replaces `forward` of instances too."
    model = olmoe()
    gate, calls = model.model.layers[0].mlp.gate, []
    inner = gate.forward

    def outer(*args):
        calls.append(1)
        return inner(*args)

    gate.forward = outer
    with route(model, TopK()):
        logits(model)
    assert gate.forward is outer and calls


def test_state_dict_and_recorders_see_the_same_model():
    model = olmoe()
    keys = list(model.state_dict())
    native = model(TOKENS, labels=TOKENS, output_router_logits=True)
    with route(model, TopK(2)):
        assert list(model.state_dict()) == keys
        patched = model(TOKENS, labels=TOKENS, output_router_logits=True)
    assert (
        len(patched.router_logits) == 3
        and torch.equal(patched.router_logits[0], native.router_logits[0])
        and patched.aux_loss is not None
    )


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("experts", ["keep", "ragged"])
def test_generate_under_padding(side, experts):
    model, prompts = olmoe(), [[5, 6, 7], [8, 9, 10, 11, 12]]
    rows = [[0] * (5 - len(p)) + p if side == "left" else p + [0] * (5 - len(p)) for p in prompts]
    ids = torch.tensor(rows)
    mask = torch.tensor([[int(i < len(p)) for i in range(5)][:: -1 if side == "left" else 1] for p in prompts])
    options = dict(attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0)
    native, seen = model.generate(ids, **options), []

    def look(context, routing, hidden):
        assert len(hidden) == len(routing.experts) == len(context.valid) == len(context.token_id)
        if context.layer == 2:
            seen.append((context.valid.tolist(), context.position.tolist()))

    with route(model, TopK(), experts=experts, observe=look) as patch:
        assert torch.equal(native, model.generate(ids, **options))
    assert patch.report().forwards == 4 and patch.report().tokens == 3 + 5 + 3 * 2
    assert sum(seen[0][0]) == 8 and [s[1] for s in seen[1:]] == [[3, 5], [4, 6], [5, 7]]


def test_generate_on_changed_routing_is_the_same_with_and_without_a_cache():
    model, outs = olmoe(), []
    for cache in (True, False):
        with route(model, TopK(2)):
            outs.append(model.generate(TOKENS, max_new_tokens=5, do_sample=False, use_cache=cache, pad_token_id=0))
    assert torch.equal(*outs)


def test_padding_does_not_enter_the_sums():
    model = olmoe()
    mask = torch.ones_like(TOKENS)
    mask[0, :4] = 0

    class ByValid(Rule):
        def decide(self, view):
            experts = view.choice.topk(view.k).indices
            experts = experts.masked_fill(~view.context.require("valid", "ByValid").unsqueeze(1), view.num_experts)
            return Routing(view.logits, experts, view.weigh(experts))

    with route(model, ByValid()) as patch:
        logits(model, TOKENS, attention_mask=mask)
    assert (
        patch.report().tokens == mask.sum()
        and patch.report().asked == patch.report().received == 4
        and patch.report().changed == 0
    )


def test_context_of_embeddings_positions_and_inner_calls():
    model, seen = olmoe(), []

    class Needs(TopK):
        def decide(self, view):
            view.context.require("token_id", "hash")
            return super().decide(view)

    embeds = model.get_input_embeddings()(TOKENS)
    with route(model, None, observe=lambda c, r, h: seen.append(c)):
        logits(model, inputs_embeds=embeds)
        logits(model, TOKENS, position_ids=torch.arange(5, 14).unsqueeze(0))
        with torch.no_grad():
            model.model(TOKENS)
    assert (
        seen[0].token_id is None
        and seen[0].valid.all()
        and seen[3].position[:2].tolist() == [5, 6]
        and torch.equal(seen[6].token_id, TOKENS.view(-1))
    )
    assert (
        [c.layer for c in seen] == [0, 1, 2] * 3
        and [c.forward for c in seen[::3]] == [0, 1, 2]
        and seen[0].num_layers == 3
    )
    with pytest.raises(ValueError, match="token_id"):
        with route(model, Needs()):
            logits(model, inputs_embeds=embeds)


@pytest.mark.parametrize("experts", ["keep", "ragged"])
@pytest.mark.parametrize("checkpoint", [None, False, True])
def test_gradients(experts, checkpoint):
    """The identity rule gives the native gradient, also when layers run twice.

    Second runs are neither counted nor observed."""

    def gradient(model, **how):
        model.train().zero_grad()
        if how:
            with route(model, TopK(), **how) as patch:
                model(TOKENS, labels=TOKENS).loss.backward()
            assert patch.report().tokens == TOKENS.numel()
        else:
            model(TOKENS, labels=TOKENS).loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    model, observed = olmoe(), []
    native = gradient(model)
    if checkpoint is not None:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": checkpoint})
    ours = gradient(model, experts=experts, observe=lambda c, r, h: observed.append(c.layer))
    if checkpoint:
        ours, native = (torch.cat([g]) for g in (ours, gradient(model)))
    assert torch.allclose(ours, native, atol=1e-6) and observed == [0, 1, 2]


class Remembers(nn.Module):
    def __init__(self, H=32, E=16):
        super().__init__()
        torch.manual_seed(1)
        self.score, self.mix = nn.Linear(H, E), nn.Linear(H, H)

    def forward(self, hidden, context, state):
        assert (state is None) == (context.layer == 0)
        state = hidden if state is None else torch.tanh(self.mix(state)) + hidden
        logits = self.score(state).float()
        return Routing(logits, *logits.softmax(-1).topk(3)[::-1]), state


def test_router_state_under_checkpointing():
    router, grads = Remembers(), []
    for checkpoint in (None, False):
        model = olmoe().train()
        if checkpoint is not None:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": checkpoint})
        router.zero_grad()
        with route(model, router) as patch:
            for _ in range(2):
                model(TOKENS, labels=TOKENS).loss.backward()
        assert patch.report().received == 3 and patch.report().forwards == 2
        grads.append(torch.cat([p.grad.flatten() for p in router.parameters()]))
    assert torch.allclose(*grads, atol=1e-6) and grads[0].abs().sum() > 0


def test_what_checkpointing_cannot_do_is_refused():
    model = olmoe().train()
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(RuntimeError, match="reentrant"):
        with route(model, Remembers()):
            model(TOKENS, labels=TOKENS)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    with pytest.raises(RuntimeError, match="backward after each forward"):
        with route(model, TopK()):
            (model(TOKENS, labels=TOKENS).loss + model(TOKENS, labels=TOKENS).loss).backward()
    assert not any("forward" in m.__dict__ or m._forward_pre_hooks for m in model.modules())


def test_rules_by_layer():
    model = olmoe()
    with route(model, [TopK(1), None, TopK(6)]) as patch:
        logits(model)
    assert [round(l["received"] / l["tokens"]) for l in patch.report().per_layer] == [1, 4, 6] and len(
        patch.report().rule
    ) == 3
    with pytest.raises(ValueError, match="2 rules for 3"):
        route(model, [TopK(), TopK()])
    with pytest.raises(TypeError):
        route(model, "topk")


def test_a_patch_without_effect_is_an_error():
    model = olmoe()
    with route(model, TopK()) as patch:
        pass
    with pytest.raises(RuntimeError, match="no forward"):
        patch.report()
    block = model.model.layers[0].mlp
    with route(model, TopK(2)) as patch:  # something between gate and experts goes its own way

        def stubborn(hidden):
            flat = hidden.view(-1, hidden.shape[-1])
            _, w, e = block.gate(flat)
            return block.experts(flat, e.flip(-1) * 0, w).view(hidden.shape)

        block.forward = stubborn
        logits(model)
        del block.forward
    with pytest.raises(RuntimeError, match="did not arrive"):
        patch.report()
    with route(model, TopK(2)) as patch:
        block.forward = lambda hidden: hidden
        logits(model)
        del block.forward
    with pytest.raises(RuntimeError, match="not called"):
        patch.report()


def test_certificate_is_plain_data():
    import json

    model = olmoe()
    with route(model, TopK(2)) as patch:
        logits(model)
    record = json.loads(json.dumps(patch.report().as_dict()))
    assert (
        record["rule"] == {"rule": "TopK", "k": 2, "weigh": "native"}
        and record["weigh"] == "native"
        and record["layers"] == 3
    )


def test_low_precision_sees_float32_and_gives_back_its_own():
    model, seen = olmoe().bfloat16(), []

    class Look(TopK):
        def decide(self, view):
            assert (
                view.logits.dtype == view.choice.dtype == view.weigh(view.choice.topk(3).indices).dtype == torch.float32
            )
            return super().decide(view)

    with route(model, Look(3), observe=lambda c, r, h: seen.append((r.logits.dtype, r.weights.dtype, h.dtype))):
        logits(model)
    assert set(seen) == {(torch.float32, torch.bfloat16, torch.bfloat16)}


def test_observed_native_decisions_are_the_models_own():
    model, seen = mixtral(), []
    with route(model, None, observe=lambda c, r, h: seen.append((r.validate(), h))):
        logits(model)
    for layer, (routing, hidden) in zip(moe_layers(model), seen):
        with torch.no_grad():
            raw, weights, experts = layer.gate(hidden)
        assert (
            torch.equal(routing.logits, raw)
            and torch.equal(routing.experts, experts)
            and torch.equal(routing.weights, weights)
        )


def test_the_probe_leaves_no_trace():
    for flag in (True, False):
        model = olmoe().train(flag)
        model.config.output_router_logits = True
        state, before = torch.get_rng_state(), {n: set(m.__dict__) for n, m in model.named_modules()}
        layers = moe_layers(model)
        assert (
            torch.equal(state, torch.get_rng_state())
            and untouched(model)
            and all(m.training == flag for m in model.modules())
        )
        assert before == {n: set(m.__dict__) for n, m in model.named_modules()} and all(
            p.grad is None for p in model.parameters()
        )
        assert len(layers) == 3 and isinstance(layers[0], MoELayer) and layers.refused == {}


def test_dense_models_and_bad_values_are_refused():
    dense = LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    )
    with pytest.raises(ValueError, match="no MoE layer"):
        route(dense, TopK())
    with pytest.raises(ValueError, match="ragged"):
        route(olmoe(), TopK(), experts="raggd")


def test_wrong_rows_and_broken_invariants_are_named():
    class Short(Rule):
        def decide(self, view):
            return Routing(
                view.logits[1:],
                torch.zeros(len(view.logits) - 1, 1, dtype=torch.long),
                torch.ones(len(view.logits) - 1, 1),
            )

    class Twice(Rule):
        def decide(self, view):
            return Routing(
                view.logits, torch.zeros(len(view.logits), 2, dtype=torch.long), torch.ones(len(view.logits), 2)
            )

    with pytest.raises(ValueError, match="rows"):
        with route(olmoe(), Short()) as patch:
            logits(patch.model)
    with pytest.raises(ValueError, match="twice"):
        with route(olmoe(), Twice(), validate=True) as patch:
            logits(patch.model)
