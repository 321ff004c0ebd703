"SPECTRA: gold vectors, the quota, both Sinkhorn roads, the state through depth, and its errors."

from dataclasses import replace

import pytest
import torch

from moe_routing.core import Context
from moe_routing.patching.patch import route
from moe_routing.routers.balance import router_losses
from moe_routing.routers.spectra import (
    ABLATIONS,
    Quota,
    SpectraRouter,
    ablation,
    expert_representation,
    newton_schulz,
    osr_cost,
    osr_plan,
    quota_as_shipped,
    soft_orthogonality,
    speciality,
)
from moe_routing.routers.zoo import ROUTERS, make_router
from moe_routing.training.loop import Recipe, build_model, expert_width, mount

L, H, E = 3, 16, 8


def made(seed=0, **params):
    torch.manual_seed(seed)
    return make_router("spectra", H, E, k=2, num_layers=L, **{"router_dim": 4, **params})


def reference(scores, epsilon, iterations):
    P = ((scores - scores.amax(-1, keepdim=True)).double() / epsilon).exp()
    for _ in range(iterations):
        P = P / P.sum(1, keepdim=True)
        P = P / P.sum(0) * (len(P) / P.shape[1])
    return P / P.sum(1, keepdim=True)


@pytest.mark.parametrize("log_domain", [True, False])
@pytest.mark.parametrize("epsilon", [0.03, 0.1, 1.0])
def test_sinkhorn_against_float64(log_domain, epsilon):
    draw = torch.Generator().manual_seed(1)
    for N, experts in ((1, 1), (2, 5), (40, 3), (100, 32)):
        for iterations in (1, 3, 20):
            scores = torch.rand(N, experts, generator=draw) * 2 - 1
            want = reference(scores, epsilon, iterations)
            error = ((osr_plan(scores, epsilon, iterations, log_domain).exp().double() - want).abs() / want)[
                want > 1e-9
            ]
            assert error.max() < 1e-4


def test_sinkhorn_outside_the_range_is_float64_or_refused():
    scores = torch.rand(50, 8, generator=torch.Generator().manual_seed(2)) * 20
    want = reference(scores, 0.1, 3)
    assert ((osr_plan(scores, 0.1, 3).exp().double() - want).abs() / want)[want > 1e-9].max() < 1e-4
    with pytest.raises(
        ValueError, match="cost range is .* times epsilon.*raise sinkhorn_epsilon or set log_sinkhorn_enabled"
    ):
        osr_plan(scores * 10, 0.1, 3, log_domain=False)


def test_plan_has_a_gradient_and_padding_has_none():
    valid = torch.tensor([True] * 6 + [False] * 3)
    for log_domain in (True, False):
        scores = torch.randn(9, 4, generator=torch.Generator().manual_seed(3)).requires_grad_()
        plan = osr_plan(scores, 0.5, 3, log_domain, valid).exp()
        assert (plan[~valid] == 0).all() and torch.allclose(
            plan[valid], osr_plan(scores[valid], 0.5, 3, log_domain).exp()
        )
        plan.square().sum().backward()
        assert scores.grad.isfinite().all() and (scores.grad[~valid] == 0).all() and scores.grad[valid].abs().max() > 0
        small = torch.randn(4, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64).requires_grad_()
        assert torch.autograd.gradcheck(
            lambda s: osr_plan(s, 0.5, 3, log_domain).exp()[:, :2].double(), small, eps=1e-3, atol=1e-3
        )


def test_gold_cost_and_losses():
    g, s = torch.tensor([[1.0, 0], [0, 1], [0.6, 0.8]]), torch.tensor([[0.5, -0.2, 0.1], [0, 1, 0.3]])
    assert torch.allclose(osr_cost(s, g), torch.tensor([[-0.482, 0.232, 0.054], [0.054, -0.904, 0.02]]), atol=1e-6)
    assert soft_orthogonality(g).item() == pytest.approx(1.7, abs=1e-5)
    e = torch.nn.functional.normalize(torch.randn(20, E, 4), dim=-1)
    assert torch.allclose(expert_representation(e).norm(dim=-1), torch.ones(E)) and speciality(
        e, expert_representation(e)
    ) > speciality(torch.eye(4).expand(5, 4, 4), torch.eye(4))
    for shape in ((5, 9), (9, 5)):
        values = torch.linalg.svdvals(newton_schulz(torch.randn(shape, generator=torch.Generator().manual_seed(0)), 30))
        assert torch.allclose(values, torch.ones(5), atol=1e-4)


def test_quota_never_breaks_and_refuses_nobody_for_nothing():
    draw = torch.Generator().manual_seed(5)
    for _ in range(300):
        T, n = int(torch.randint(2, 60, (), generator=draw)), int(torch.randint(2, 17, (), generator=draw))
        k = int(torch.randint(1, n + 1, (), generator=draw))
        scores = (torch.randn(T, n, generator=draw) * 2).round() + 3 * torch.randn(n, generator=draw)
        view = make_view(
            scores.masked_fill(torch.rand(T, n, generator=draw) < 0.1, float("-inf")),
            scores,
            torch.rand(T, generator=draw) > 0.2,
            k,
        )
        r = Quota(k, weigh="softk")(view).validate()
        if not view.context.valid.any():
            continue
        assert r.load.max() <= r.extras["capacity"] and not r.used[~view.context.valid].any()
        open_ = (r.load < r.extras["capacity"]) & (view.choice > float("-inf")) & ~r.mask
        assert not (r.extras["refused"][:, None] & open_).any()
        assert torch.equal(r.extras["refused"], r.counts < r.extras["demand_counts"])


def make_view(choice, logits, valid, k):
    from moe_routing.core import GateView, softmax_weigh

    return GateView(logits, choice, softmax_weigh(logits), k, Context(valid=valid))


def test_the_shipped_quota_is_none():
    scores = torch.zeros(512, 32).index_fill(1, torch.tensor([3]), 5.0) + 1e-3 * torch.randn(
        512, 32, generator=torch.Generator().manual_seed(0)
    )
    experts, fallback = quota_as_shipped(scores.softmax(-1), 4, 80)
    assert torch.bincount(experts.flatten()).max() == 512 and not fallback.all()
    assert Quota(4)(scores).load.max() == 80
    tight, fallback = quota_as_shipped(scores.softmax(-1), 4, 1)
    assert fallback.all() and (tight.sort(-1).values.diff(dim=-1) > 0).all()


def test_state_runs_through_depth_and_starts_anew():
    router, x = made().eval(), torch.randn(12, H)
    routing, state = router(x, Context(layer=0))
    other, _ = router(x, Context(layer=1), state)
    fresh, _ = router(x, Context(layer=1))
    assert not torch.allclose(other.logits, fresh.logits, atol=1e-3) and torch.equal(
        router(x, Context(layer=0))[0].logits, routing.logits
    )
    without = make_router("spectra_no_gru", H, E, k=2, num_layers=L, router_dim=4).eval()
    assert without(x)[1] is None


def model_and_routers(**params):
    recipe = Recipe(
        router="spectra",
        router_params={"router_dim": 4, **params},
        hidden=H,
        heads=2,
        layers=L,
        intermediate=16,
        num_experts=E,
        length=16,
        batch=4,
        match="width",
    )
    torch.manual_seed(0)
    return build_model(recipe, 40)


def gradients(checkpointing):
    model, routers = model_and_routers()
    assert routers[0] is routers[1] is routers[2]
    ids = torch.randint(1, 40, (4, 16), generator=torch.Generator().manual_seed(1))
    if checkpointing:
        model.activation_checkpointing_enable(
            activation_checkpointing_kwargs={"use_reentrant": checkpointing == "reentrant"}
        )
    losses = []

    def observe(context, routing, hidden):
        losses.extend(router_losses(routing, routers[0].losses).values())

    with route(model.train(), routers, observe=observe):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        (loss + sum(losses)).backward()
    routers[0].steer()
    grads = {
        n: p.grad.clone() for n, p in (*model.named_parameters(), *routers[0].named_parameters()) if p.grad is not None
    }
    return loss.item(), grads, {n: b.clone() for n, b in routers[0].named_buffers()}


def test_gradient_checkpointing_changes_nothing():
    (loss, grads, state), (again, other, state_too) = gradients(""), gradients("non-reentrant")
    assert (
        loss == again and grads.keys() == other.keys() and {"state_weight", "projector", "input_weight"} <= grads.keys()
    )
    assert all(torch.allclose(grads[n], other[n], atol=1e-6) for n in grads) and grads["state_weight"].abs().max() > 0
    assert all(torch.equal(state[n], state_too[n]) for n in state) and int(state["steps"]) == 1
    with pytest.raises(RuntimeError, match="reentrant"):
        gradients("reentrant")


def test_generation_with_a_cache_is_a_forward_of_the_whole():
    model, routers = model_and_routers()
    ids = torch.randint(1, 40, (2, 10), generator=torch.Generator().manual_seed(2))
    with route(model.eval(), [r.eval() for r in routers]):
        made_ = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
        again = ids
        for _ in range(6):
            again = torch.cat([again, model(input_ids=again, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(made_, again[:, : made_.shape[1]])
    routers[0].sinkhorn_inference = True
    with route(model.eval(), routers), pytest.raises(ValueError, match="sinkhorn_inference=False"):
        model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)


def test_steering_counts_optimizer_steps_and_moves_the_bias():
    router = made(bias_rate=0.01, so_warmup_steps=4)
    ramps = []
    for step in range(6):
        for part in range(2):  # two micro-batches of one optimizer step
            state = None
            for layer in range(L):
                routing, state = router(torch.randn(64, H) + 1, Context(layer=layer), state)
                if part == layer == 0:
                    ramps.append(
                        (routing.extras["losses"]["srip"] / soft_orthogonality(routing.extras["representation"])).item()
                    )
        demand = router.noted[..., -3].clone()
        before = router.expert_bias.clone()
        router.steer()
        moved = router.expert_bias - before
        assert (
            moved[demand > demand.mean(-1, keepdim=True)] < moved[demand < demand.mean(-1, keepdim=True)].min() + 1e-9
        ).all()
    assert ramps == pytest.approx([0.05 * min(1, i / 4) for i in range(6)], abs=1e-7) and int(router.steps) == 6
    router(torch.randn(8, H))
    router.forget()
    before = router.mean_expression.clone()
    router.steer()
    assert torch.equal(router.mean_expression, before) and int(router.steps) == 6


def test_bias_acts_where_experts_are_ranked_and_not_in_the_weights():
    router, x = made(enable_sinkhorn=False, bias_rate=0.0).eval(), torch.randn(200, H)
    plain = router(x)[0]
    router.expert_bias[0, 3] = 5.0
    biased = router(x)[0]
    assert biased.load[3] == 200 > plain.load[3] and torch.allclose(biased.extras["plan"], plain.extras["plan"])


def test_settings_do_what_they_say():
    x = torch.randn(300, H) + 1
    load = lambda **p: made(**p)(x)[0]
    assert load(expert_choice_routing=False).load.max() > load().extras["capacity"] >= load().load.max()
    assert load(expert_choice_capacity_factor=2.0).extras["capacity"] > load().extras["capacity"]
    assert torch.allclose(load(log_sinkhorn_enabled=False).extras["plan"], load().extras["plan"], atol=1e-5)
    off = lambda P: (P.sum(0) / P.sum() * E - 1).abs().max()
    assert off(load(sinkhorn_iterations=8).extras["plan"]) < off(load(sinkhorn_iterations=2).extras["plan"])
    assert (
        made(adaptive_loss_scaling=True).epsilon() == pytest.approx(0.2)
        and made(adaptive_loss_scaling=True).eval().epsilon() == 0.1
        and made().epsilon() == 0.1
    )
    shipped = make_router("spectra_as_shipped", H, E, k=2, num_layers=L)
    assert shipped.epsilon() == pytest.approx(0.4) and "srip" not in shipped.losses
    still, moving = made(sinkhorn_inference=False).eval(), made(sinkhorn_inference=True).eval()
    assert torch.allclose(still(x)[0].extras["plan"], still(x)[0].logits.softmax(-1)) and not torch.allclose(
        moving(x)[0].extras["plan"], moving(x)[0].logits.softmax(-1), atol=1e-3
    )
    assert not torch.equal(made(input_jitter_noise=0.1)(x)[0].logits, made()(x)[0].logits) and torch.equal(
        made(input_jitter_noise=0.1).eval()(x)[0].logits, made().eval()(x)[0].logits
    )


def test_compute_is_matched_with_narrower_experts():
    recipe = Recipe(
        router="spectra", router_params={"router_dim": 8}, hidden=128, layers=3, intermediate=96, num_experts=16, k=4
    )
    assert expert_width(recipe, 4) < 96 == expert_width(replace(recipe, match="width"), 4)
    with pytest.raises(ValueError, match="lower router_dim.*match='width'"):
        expert_width(replace(recipe, router_params={"router_dim": 64}), 4)


@pytest.mark.parametrize(
    "params,match",
    [
        ({"sinkhorn_epsilon": 0}, "sinkhorn_epsilon = 0"),
        ({"sinkhorn_epsilon": -0.1}, "sinkhorn_epsilon = -0.1"),
        ({"sinkhorn_iterations": 0}, "sinkhorn_iterations = 0"),
        ({"sinkhorn_iterations": 1.5}, "sinkhorn_iterations = 1.5"),
        ({"expert_choice_capacity_factor": 0}, "expert_choice_capacity_factor = 0"),
        ({"router_dim": 0}, "router_dim = 0"),
        ({"so_warmup_steps": 0}, "so_warmup_steps = 0"),
        ({"osr_repulsion_weigth": 0.5}, "did you mean 'osr_repulsion_weight'"),
        ({"bias_rate": -1}, "bias_rate = -1"),
    ],
)
def test_bad_parameters(params, match):
    with pytest.raises(ValueError, match=match):
        made(**params)


def test_other_bad_input():
    with pytest.raises(ValueError, match="ablation of SPECTRA.*did you mean 'no_gru'"):
        ablation("no_grru")
    with pytest.raises(ValueError, match="at least 1"):
        made(expert_choice_capacity_factor=0.5)(torch.randn(64, H))
    with pytest.raises(ValueError, match="layer 3 of a SpectraRouter made for 3"):
        made()(torch.randn(4, H), Context(layer=3))
    with pytest.raises(ValueError, match="NaN or infinite in layer 1"):
        made()(torch.full((4, H), float("nan")), Context(layer=1))
    assert set(ABLATIONS) == {
        name.removeprefix("spectra_") if name != "spectra" else "full" for name in ROUTERS if name.startswith("spectra")
    }


def test_mounted_once():
    model, routers = model_and_routers()
    with route(model, routers):
        mount(model, routers)
    assert sum(".router." in n for n, _ in model.named_parameters()) == len(list(routers[0].parameters()))
    assert isinstance(routers[0], SpectraRouter)
