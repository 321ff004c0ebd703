"The ragged experts against a double loop: every layout, every mix of used and unused slots, every way to run them."

import pytest
import torch
from torch import nn
from transformers import OlmoeConfig
from transformers.activations import ACT2FN
from transformers.integrations.moe import use_experts_implementation

import moe_routing.experts as module
from moe_routing.experts import plan_slots, ragged_experts

LAYOUTS = {
    "olmoe": {},
    "gpt_oss": dict(has_bias=True, is_transposed=True),
    "transposed": dict(is_transposed=True),
    "bias": dict(has_bias=True),
    "no_gate": dict(has_gate=False, act="relu2"),
    "no_gate_bias": dict(has_gate=False, has_bias=True),
    "post_norm": dict(has_post_expert_norm=True),
}


def make(E, H=6, I=4, act="silu", own_gate=False, **declared):
    has = {"has_gate": True, "has_bias": False, "is_transposed": False, "has_post_expert_norm": False, **declared}
    gen = torch.Generator().manual_seed(0)
    param = lambda *shape: nn.Parameter(torch.randn(*shape, generator=gen, dtype=torch.float64))
    stack = lambda out, into: param(E, into, out) if has["is_transposed"] else param(E, out, into)
    wide, up = (2 * I, "gate_up_proj") if has["has_gate"] else (I, "up_proj")

    class Experts(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.num_experts, self.act_fn = E, ACT2FN[act]
            setattr(self, up, stack(wide, H))
            self.down_proj = stack(H, I)
            if has["has_bias"]:
                setattr(self, up + "_bias", param(E, wide))
                self.down_proj_bias = param(E, H)
            if has["has_post_expert_norm"]:
                self.post_expert_norm = nn.RMSNorm(H, dtype=torch.float64)

        if own_gate:

            def _apply_gate(self, x):
                return x[..., ::2].sigmoid() * (x[..., 1::2] + 1)

        def forward(self, hidden, top_k_index, top_k_weights):
            raise NotImplementedError

    return use_experts_implementation(**has)(Experts)(OlmoeConfig(experts_implementation="ragged"))


def loop(m, hidden, ids, weights):
    def linear(name, e, x):
        w = getattr(m, name)[e]
        return (x @ w if m.is_transposed else w @ x) + (getattr(m, name + "_bias")[e] if m.has_bias else 0)

    rows = []
    for x, es, ws in zip(hidden, ids.tolist(), weights):
        row = x * 0
        for e, w in zip(es, ws):
            if e == m.num_experts:
                continue
            y = linear(
                "down_proj",
                e,
                m._apply_gate(linear("gate_up_proj", e, x)) if m.has_gate else m.act_fn(linear("up_proj", e, x)),
            )
            row = row + w * (m.post_expert_norm(y) if m.has_post_expert_norm else y)
        rows.append(row)
    return torch.stack(rows) if rows else hidden * 0


def slots(mix, T=13, E=5, K=3):
    gen = torch.Generator().manual_seed(3)
    weights, ids = torch.rand(T, E, generator=gen, dtype=torch.float64).topk(K)
    if mix == "none used":
        ids = torch.full_like(ids, E)
    if mix == "some used":
        ids = ids.masked_fill(torch.rand(T, K, generator=gen) < 0.6, E)
    if mix == "unused first":
        ids[:, 0] = E
    if mix == "one expert":
        ids = torch.full_like(ids, E)
        ids[:, 0] = 2
    return ids, weights.masked_fill(ids == E, 0), E


MIXES = {m: slots(m) for m in ("all used", "none used", "some used", "unused first", "one expert")}
MIXES["E = 1"] = slots("all used", E=1, K=1)
MIXES["K = E"] = slots("all used", K=5)
MIXES["T = 0"] = slots("all used", T=0)
MIXES["T = 1"] = slots("some used", T=1)
MIXES["long segments"] = slots("some used", T=600)  # one segment at a time without autograd


def gradients(f, m, hidden, ids, weights):
    hidden, weights = hidden.clone().requires_grad_(), weights.clone().requires_grad_()
    out = f(m, hidden, ids, weights)
    (out * torch.linspace(-1, 1, max(out.numel(), 1), dtype=out.dtype)[: out.numel()].view_as(out)).sum().backward()
    got = {
        "out": out.detach(),
        "hidden": hidden.grad,
        "weights": weights.grad,
        **{n: p.grad for n, p in m.named_parameters()},
    }
    m.zero_grad()
    return {k: torch.zeros((), dtype=torch.float64) if v is None else v for k, v in got.items()}


def compare(f, layout, mix, tol=1e-9):
    ids, weights, E = MIXES[mix]
    m = make(E, **LAYOUTS[layout])
    hidden = torch.randn(len(ids), 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    slow, fast = gradients(loop, m, hidden, ids, weights), gradients(f, m, hidden, ids, weights)
    for name in slow:
        assert torch.allclose(*torch.broadcast_tensors(fast[name], slow[name]), atol=tol), (name, layout, mix)
    with torch.no_grad():
        assert torch.allclose(f(m, hidden, ids, weights), slow["out"], atol=tol)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_the_loop(layout, mix):
    compare(ragged_experts, layout, mix)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_segments_in_one_call(layout, monkeypatch):
    "What CUDA runs (grouped_mm instead of one product for each segment), here with the CPU's grouped_mm."
    monkeypatch.setattr(module, "_grouped", lambda x: True)
    for mix in ("all used", "some used", "one expert"):
        ids, weights, E = MIXES[mix]
        hidden = torch.randn(len(ids), 8, generator=torch.Generator().manual_seed(1))
        m = make(E, H=8, I=4, **LAYOUTS[layout]).float()
        slow = gradients(loop, m, hidden, ids, weights.float())
        fast = gradients(ragged_experts, m, hidden, ids, weights.float())
        for name in slow:
            assert torch.allclose(fast[name], slow[name], atol=1e-3, rtol=1e-3), (name, mix)


@pytest.mark.parametrize("layout", ["olmoe", "gpt_oss", "post_norm"])
def test_compiles_whole_and_right(layout):
    torch._dynamo.reset()
    f = torch.compile(ragged_experts, backend="aot_eager", fullgraph=True)
    for mix in ("all used", "some used", "none used"):
        compare(f, layout, mix)


def test_own_gate_function_is_honoured():
    m, (ids, weights, _) = make(5, own_gate=True), MIXES["some used"]
    hidden = torch.randn(len(ids), 6, dtype=torch.float64)
    assert torch.allclose(ragged_experts(m, hidden, ids, weights), loop(m, hidden, ids, weights))


def test_registered_name_reaches_the_forward():
    m, (ids, weights, _) = make(5), MIXES["some used"]
    hidden = torch.randn(len(ids), 6, dtype=torch.float64)
    assert torch.equal(m(hidden, ids, weights), ragged_experts(m, hidden, ids, weights))


def test_registered_operations_are_sound():
    "Schema, fake tensors and autograd registration, by torch's own checker."
    ids, weights, E = MIXES["some used"]
    order, sizes = plan_slots(ids, E)
    rows = torch.randn(len(ids), 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(E, 4, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(E, 3, dtype=torch.float64, requires_grad=True)
    mid = torch.randn(len(order), 4, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(module.plan_op, (ids, E))
    for b in (bias, None):
        torch.library.opcheck(module.dispatch_op, (rows, weight, b, order // 3, sizes))
        torch.library.opcheck(module.combine_op, (mid, weight, b, weights.requires_grad_(), order, sizes))


@pytest.mark.parametrize("grad", [False, True])
def test_low_precision(grad):
    ids, weights, E = MIXES["some used"]
    m, hidden = make(5), torch.randn(len(ids), 6, dtype=torch.float64)
    exact = loop(m, hidden, ids, weights)
    m = m.bfloat16()
    with torch.set_grad_enabled(grad):
        out = ragged_experts(m, hidden.bfloat16(), ids, weights.float())
    assert out.dtype == torch.bfloat16 and ((out - exact).abs() <= 0.05 * exact.abs().max()).all()


@pytest.mark.parametrize("mix", ["all used", "some used"])
def test_autocast_is_followed(mix):
    "Products in autocast's precision, output in that of the input, gradients in that of the parameters."
    ids, weights, E = MIXES[mix]
    m, hidden = make(5).float(), torch.randn(len(ids), 6)
    plain = ragged_experts(m, hidden, ids, weights.float()).detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = ragged_experts(m, hidden, ids, weights.float())
    low.sum().backward()
    assert (
        low.dtype == torch.float32
        and not torch.equal(plain, low)
        and (plain - low).abs().max() <= 0.05 * plain.abs().max()
    )
    assert all(p.grad.dtype == p.dtype == torch.float32 and p.grad.isfinite().all() for p in m.parameters())
