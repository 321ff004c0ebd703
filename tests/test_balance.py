"""Losses against their definitions and finite differences, steered routers against one process and the whole batch."""

from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from threading import Barrier

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from moe_routing.capacity import Capped, limit
from moe_routing.core import Context, Routing
from moe_routing.routers.balance import (
    LOSSES,
    SCORES,
    Kept,
    LossFreeRouter,
    QuantileRouter,
    ThresholdRouter,
    aux_as_shipped,
    aux_loss,
    demanded,
    gather_rows,
    mean_over_processes,
    quantile_prices,
    router_losses,
    share_cut,
)
from moe_routing.routers.expert_choice import ExpertChoice, ExpertThreshold
from moe_routing.routers.topk import TopK

DIFFERENTIABLE = [n for n in LOSSES if n != "aux_as_shipped"]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def processes(f, parts):
    "Run f(part, gather) for all parts at once, each in a thread that plays a process."
    meet, shelf = Barrier(len(parts)), [None] * len(parts)

    def run(i):
        def gather(x):
            shelf[i] = x
            meet.wait(timeout=20)
            assert len({t.shape for t in shelf}) == 1, "a collective needs one shape in all processes"
            whole = torch.cat(shelf)
            meet.wait(timeout=20)
            return whole

        return f(parts[i], gather)

    with ThreadPoolExecutor(len(parts)) as pool:
        return list(pool.map(run, range(len(parts))))


# losses
@pytest.mark.parametrize("k", [1, 2, 7])
def test_losses_by_hand(k):
    logits = randn(50, 7).double()
    p, routing = logits.softmax(-1), TopK(k)(logits)
    f = torch.stack([(routing.experts == e).double().sum() / (50 * k) for e in range(7)])
    P = p.mean(0)
    want = {
        "aux": 7 * (f * P).sum(),
        "z": logits.exp().sum(-1).log().pow(2).mean(),
        "importance": (p.sum(0).std(correction=0) / p.sum(0).mean()) ** 2,
        "entropy": (P * (P * 7).log()).sum(),
        "aux_as_shipped": ((f - 1 / 7) ** 2).sum(),
    }
    for name, f in LOSSES.items():
        assert abs(float(f(routing)) - float(want[name])) < 1e-5, name
    weighted = router_losses(routing, {"aux": 0.01, "z": 2.0})
    assert (
        abs(float(weighted["aux"]) - 0.01 * float(want["aux"])) < 1e-6
        and abs(float(weighted["z"]) - 2 * float(want["z"])) < 1e-4
    )
    with pytest.raises(ValueError, match="did you mean 'aux'"):
        router_losses(routing, {"auxx": 1.0})


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients(name):
    logits = randn(20, 6).double().requires_grad_()
    experts, valid = TopK(2)(logits.detach().float()).experts, torch.arange(20) % 5 > 0
    f = lambda l: LOSSES[name](Routing(l, experts, torch.zeros(experts.shape)), valid)
    assert torch.autograd.gradcheck(f, (logits,), eps=1e-6, atol=1e-7)
    (grad,) = torch.autograd.grad(f(logits), logits)
    assert grad[valid].abs().max() > 1e-5 and (grad[~valid] == 0).all()


def test_aux_pushes_towards_even():
    logits = (randn(400, 8) + torch.linspace(2, -2, 8)).requires_grad_()
    (grad,) = torch.autograd.grad(aux_loss(TopK(2)(logits)), logits)
    assert grad.sum(0)[0] > 0 > grad.sum(0)[-1]
    shipped = aux_as_shipped(TopK(2)(logits))
    assert not shipped.requires_grad and shipped > 0


def test_aux_sees_demand_behind_a_capacity():
    routing = TopK(2)(randn(100, 8) + torch.tensor([6.0] + [0.0] * 7))
    capped = limit(routing, 1.0)
    assert capped.load[0] < routing.load[0] and torch.equal(demanded(capped), routing.load)
    assert torch.allclose(aux_loss(capped), aux_loss(routing)) and aux_as_shipped(capped) < aux_as_shipped(routing)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("cut", [(100, 100), (1, 199), (0, 200), (60, 70, 70)])
def test_losses_over_processes(name, cut):
    logits, valid = randn(200, 8), randn(200, seed=1) > -0.8

    def run(rows, gather=lambda x: x):
        leaf = logits[rows].clone().requires_grad_()
        loss = LOSSES[name](TopK(2)(leaf), valid[rows], gather)
        return loss.detach(), torch.autograd.grad(loss, leaf)[0] if loss.requires_grad else torch.zeros_like(leaf)

    value, gradient = run(slice(None))
    ends = [sum(cut[: i + 1]) for i in range(len(cut))]
    found = processes(run, [slice(e - n, e) for e, n in zip(ends, cut)])
    assert all(abs(v - value) < 1e-5 for v, _ in found)
    assert torch.allclose(torch.cat([g for _, g in found]) / len(cut), gradient, atol=1e-7)


def test_nothing_valid():
    routing, none = TopK(2)(randn(5, 4).requires_grad_()), torch.zeros(5, dtype=torch.bool)
    for name, f in LOSSES.items():
        assert f(routing, none).isfinite(), name
    assert mean_over_processes(torch.zeros(3), 0).tolist() == [0, 0, 0]


# steered routers
def build(name, **more):
    torch.manual_seed(0)
    return {
        "sign": lambda: LossFreeRouter(TopK(2), 12, 8, **more),
        "magnitude": lambda: LossFreeRouter(TopK(2), 12, 8, form="magnitude", decay=5.0, **more),
        "quantile": lambda: QuantileRouter(TopK(2), 12, 8, **more),
        "raw": lambda: QuantileRouter(TopK(2), 12, 8, horizon=1, iterations=1, score="softmax"),
        "threshold": lambda: ThresholdRouter(ExpertThreshold(2), 12, 8),
        "choice": lambda: ThresholdRouter(ExpertChoice(2), 12, 8),
        "capped": lambda: QuantileRouter(Capped(TopK(2), 1.0), 12, 8),
    }[name]()


NAMES = ["sign", "magnitude", "quantile", "raw", "threshold", "choice", "capped"]


def state(router):
    return {n: b.clone() for n, b in router.named_buffers()}


def equal(a, b):
    return all(torch.equal(a[n], b[n]) for n in a)


def close(a, b):
    "Equal but for the last bits: rows are scored in batches of other shapes."
    return all(torch.allclose(a[n], b[n], rtol=1e-5, atol=1e-6) for n in a)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "choice"])
@pytest.mark.parametrize("cut", [(50, 50), (1, 99), (0, 100), (20, 30, 50)])
def test_processes_and_micro_batches(name, cut):
    "The state is that of one process with one batch, even where a process has other numbers of rows, or none."
    one = build(name)
    many, micro = [deepcopy(one) for _ in cut], deepcopy(one)
    for step in range(4):
        x, valid = randn(100, 12, seed=step) + randn(12, seed=99), randn(100, seed=50 + step) > -1
        one(x, Context(valid=valid))
        one.steer()
        for router, rows, v in zip(many, x.split(cut), valid.split(cut)):
            if len(rows):
                router(rows, Context(valid=v))
        processes(lambda router, gather: router.steer(gather), many)
        for rows, v in zip(x.split(cut), valid.split(cut)):
            micro(rows, Context(valid=v))
        micro.steer()
        assert all(close(state(one), state(r)) for r in (*many, micro)), step
    assert int(one.steps) == 4


@pytest.mark.parametrize("name", NAMES)
def test_state_changes_in_steer_alone(name):
    router = build(name)
    before, x = state(router), randn(64, 12)
    router(x)
    router.eval()(x)
    assert equal(before, state(router)) and len(router.noted) == 1
    router.steer()
    after = state(router)
    assert not equal(before, after) and not router.noted
    router.steer()  # nothing was noted
    router(x)
    router.steer()  # in evaluation
    assert equal(after, state(router))
    fresh = build(name)
    fresh.load_state_dict(router.state_dict())
    assert equal(after, state(fresh)) and torch.equal(fresh.eval()(x)[0].experts, router(x)[0].experts)


@pytest.mark.parametrize("name", NAMES)
def test_padding_is_not_counted(name):
    a, b = build(name), build(name)
    x, valid = randn(60, 12), torch.arange(60) % 3 > 0
    y = x.where(valid[:, None], torch.full_like(x, 7.0))
    for _ in range(2):
        a(x, Context(valid=valid))
        a.steer()
        b(y, Context(valid=valid))
        b.steer()
    assert equal(state(a), state(b))
    a(x, Context(valid=torch.zeros(60, dtype=torch.bool)))
    a.steer()
    assert name in ("sign", "magnitude") or equal(state(a), state(b))  # only padding: nothing to learn
    assert all(equal({k: v}, {k: state(b)[k]}) for k, v in state(a).items() if k != "steps")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_counts_once(name, reentrant):
    router, plain, x = build(name), build(name), randn(64, 12).requires_grad_()
    checkpoint(lambda h: router(h)[0].weights.sum(), x, use_reentrant=reentrant).backward()
    plain(x)
    router.steer()
    plain.steer()
    assert equal(state(router), state(plain))


@pytest.mark.parametrize("name", NAMES)
def test_copies_are_independent(name):
    router = build(name)
    other = deepcopy(router)
    router(randn(64, 12))
    router.steer()
    assert not equal(state(router), state(other))
    if isinstance(router, ThresholdRouter):
        kept = (other.eval_rule or other.rule).thresholds
        assert isinstance(kept, Kept) and kept.router is other
    torch.testing.assert_close(other.eval()(randn(9, 12))[0].weights, build(name).eval()(randn(9, 12))[0].weights)


def test_loss_free_by_hand():
    router, x = build("sign", u=0.25), randn(40, 12)
    load = router(x)[0].load.float()
    router.steer()
    assert torch.equal(router.bias, 0.25 * (load.mean() - load).sign())
    router, bias = build("magnitude", u=0.5), torch.zeros(8)
    for step in range(3):
        load = TopK(2)(torch.nn.functional.linear(x, router.weight).softmax(-1) + bias).load
        bias = bias + 0.5 / (1 + step / 5) * (1 - load / load.float().mean())
        router(x)
        router.steer()
        assert torch.allclose(router.bias, bias, atol=1e-6)


@pytest.mark.parametrize("score", SCORES)
def test_weights_do_not_contain_the_state(score):
    for router in (LossFreeRouter(TopK(2), 12, 8, score=score), QuantileRouter(TopK(2), 12, 8, score=score)):
        offset = getattr(router, "bias", None) if hasattr(router, "bias") else router.beta
        offset.copy_(torch.linspace(-30, 30, 8))
        routing = router(randn(20, 12))[0].validate()
        chosen = {0, 1} if isinstance(router, QuantileRouter) else {6, 7}
        assert set(routing.experts.flatten().tolist()) == chosen
        probability = routing.logits.sigmoid() if score == "sigmoid" else routing.logits.softmax(-1)
        assert torch.allclose(routing.weights, probability.gather(1, routing.experts))


def test_share_cut_lets_through_its_share():
    for N, share in ((100, 0.25), (101, 0.3), (2, 0.5), (7, 1.0), (7, 1e-9)):
        scores = randn(N, 5)
        assert ((scores > share_cut(scores, share)).sum(0) == min(max(round(share * N), 1), N - 1)).all()


@pytest.mark.parametrize("E, k", [(2, 1), (8, 2), (16, 15), (33, 4)])
def test_prices_even_the_load(E, k):
    scores = randn(4000, E) + torch.linspace(-2, 2, E)
    load = TopK(k)(scores - quantile_prices(scores, k, torch.zeros(E), iterations=40)).load
    assert TopK(k)(scores).load.max() > load.max() and load.max() / load.double().mean() < 1.02
    shifted = quantile_prices(scores + 5, k, torch.zeros(E), iterations=40)
    torch.testing.assert_close(shifted, quantile_prices(scores, k, torch.zeros(E), iterations=40), atol=1e-4, rtol=0)


def test_prices_are_the_optimum():
    "With the balanced prices, top-k collects as much score as the best balanced assignment."
    from scipy.optimize import linear_sum_assignment

    scores = randn(64, 8) + torch.linspace(-1, 1, 8)
    beta = quantile_prices(scores, 1, torch.zeros(8), iterations=300)
    load = TopK(1)(scores - beta).load
    rows, places = linear_sum_assignment(scores.repeat_interleave(8, 1).numpy(), maximize=True)
    best = float(scores[torch.as_tensor(rows), torch.as_tensor(places) // 8].sum())
    dual = float((scores - beta).max(1).values.sum() + 8 * beta.sum())  # an upper bound of every balanced assignment
    assert load.max() <= 9 and best <= dual + 1e-3 and dual - best < 1.0


def test_degenerate_sizes():
    every = QuantileRouter(TopK(8), 12, 8)
    every(randn(30, 12))
    every.steer()
    assert (every.beta == 0).all()
    for name in NAMES:
        lone = build(name)
        lone(randn(1, 12), Context(position=torch.zeros(1, dtype=torch.int64)))
        lone.steer()
        assert all(b.isfinite().all() for b in lone.buffers())
    single = QuantileRouter(TopK(1), 12, 1)
    single(randn(5, 12))
    single.steer()
    assert single(randn(5, 12))[0].load.tolist() == [5]


def test_threshold_share_follows_the_budget_and_not_a_cap():
    assert ThresholdRouter(ExpertChoice(2, capacity_factor=1.5), 12, 8).share == 0.375
    assert ThresholdRouter(Capped(ExpertThreshold(2), 1.5), 12, 8).share == 0.25
    assert ThresholdRouter(ExpertChoice(4, capacity_factor=9.0), 12, 8).share == 1.0
    with pytest.raises(ValueError, match="takes no thresholds"):
        ThresholdRouter(TopK(2), 12, 8)


def test_fresh_thresholds_fit_normal_logits():
    router = ThresholdRouter(ExpertThreshold(2), 8, 8).eval()
    router.weight.data = torch.eye(8)
    assert abs(float(router(randn(20000, 8))[0].counts.float().mean()) - 2) < 0.1


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: LossFreeRouter(TopK(2), 8, 4, u=0), "u = 0"),
        (lambda: LossFreeRouter(TopK(2), 8, 4, form="signs"), "did you mean 'sign'"),
        (lambda: LossFreeRouter(TopK(2), 8, 4, decay=0), "decay"),
        (lambda: QuantileRouter(TopK(2), 8, 4, horizon=0.5), "horizon"),
        (lambda: QuantileRouter(TopK(2), 8, 4, score="logit"), "'logits'"),
        (lambda: QuantileRouter(TopK(2), 8, 4, iterations=0), "iterations"),
        (lambda: ThresholdRouter(ExpertThreshold(2), 8, 4, horizon=0), "horizon"),
    ],
)
def test_bad_parameters(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_gather_rows_pads_and_drops():
    parts = [randn(3, 4), randn(0, 4), randn(5, 4, seed=1)]
    for whole in processes(gather_rows, parts):
        assert torch.equal(whole, torch.cat(parts))
