"""Contracts over every row of the zoo, every weight convention and odd sizes."""

from dataclasses import replace

import pytest
import torch

from moe_routing.core import Context, GateView, Router, as_view, one_past_last
from moe_routing.routers.adaptive import EntropyBands, Threshold, TopP, calibrate_threshold, calibrate_top_p
from moe_routing.routers.control import PositionHash, Random, TokenHash
from moe_routing.routers.pvalue import fit_null
from moe_routing.routers.topk import WEIGHTS, TopK, chosen, rank_keys, score_keys, weigh
from moe_routing.routers.zoo import (
    CONTRACTS,
    ROUTERS,
    Row,
    check_contracts,
    find_row,
    invariances,
    make_router,
    make_rule,
    zoo_table,
)

INF = float("inf")
CHOOSING = [
    n for n, r in ROUTERS.items() if r.chooses == "token"
]  # a token ranks its experts, and nothing else matters
IGNORES = [n for n, r in ROUTERS.items() if r.chooses == "nobody"]
WHOLE = [n for n, r in ROUTERS.items() if r.chooses in ("expert", "batch")]


def logits_of(T, E, seed=0, scale=1.5):
    return torch.randn(T, E, generator=torch.Generator().manual_seed(seed)) * scale


def context_of(T, **more):
    return Context(
        token_id=torch.arange(T) % 11,
        position=torch.arange(T),
        sequence=torch.zeros(T, dtype=torch.int64),
        valid=torch.ones(T, dtype=torch.bool),
        **more,
    )


def rule_of(row, E, **more):
    cut = {k: min(v, E) if k in ("k", "max_k") else v for k, v in {**row.defaults, **row.example}.items()}
    null = {"null": fit_null(logits_of(200, E, seed=9)[:, None], "conformal")} if row.needs_null else {}
    return make_rule(row.name, **{**cut, **null, **more})


def softmax_gate(logits, dtype=torch.float32):
    return replace(
        as_view(logits, k=min(2, logits.shape[1]), context=context_of(len(logits))),
        weigh=lambda experts: one_past_last(experts, logits.softmax(-1)).to(dtype),
    )


def sigmoid_gate(logits, dtype=torch.float32):
    "Ranks by score + bias, half of the experts excluded in every other token; weighs by the score alone, sums to 2.5."
    scores, E = logits.sigmoid(), logits.shape[1]
    choice = scores + torch.linspace(0.4, 0, E)
    if E > 1:
        choice[::2, E // 2 :] = -INF

    def native(experts):
        w = one_past_last(experts, scores)
        return (2.5 * w / w.sum(-1, keepdim=True).clamp_min(1e-20)).to(dtype)

    return GateView(logits, choice, native, min(2, E), context_of(len(logits)))


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("gate", [softmax_gate, sigmoid_gate])
def test_contract_grid(name, gate):
    row = ROUTERS[name]
    for T, E in ((0, 4), (1, 1), (1, 8), (5, 1), (7, 2), (64, 8), (33, 64)):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for convention in WEIGHTS:
                rule = rule_of(row, E, weigh=convention)
                view = gate(logits_of(T, E), dtype)
                routing = rule(view).validate()
                again = rule(view)
                assert torch.equal(routing.experts, again.experts) and torch.equal(routing.weights, again.weights)
                assert routing.experts.shape[0] == T and routing.logits is view.logits
                if T and name not in ("position_hash", "spectra_as_shipped"):
                    assert not (routing.mask & (view.choice == -INF)).any()
                asked = (
                    routing.extras["demand_counts"] if "refused" in routing.extras else routing.counts
                )  # a quota may refuse all that a token asks for
                if T and name not in ("expert_choice", "expert_threshold"):
                    assert (asked >= 1).all()
                if convention in ("renorm", "softk", "uniform") and T:
                    assert ((routing.weights.float().sum(-1) - 1).abs()[routing.counts > 0] < 2e-2).all()
                if convention in ("native", "mass", "renorm"):
                    assert routing.weights.dtype == dtype


@pytest.mark.parametrize("name", ROUTERS)
def test_permuting_experts(name):
    row = ROUTERS[name]
    logits = logits_of(64, 16)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(3))
    null = {"null": fit_null(logits_of(200, 16, seed=9), "kde")} if row.needs_null else {}
    rule = make_rule(name, **row.example, **null)
    plain, renamed = rule(softmax_gate(logits)), rule(softmax_gate(logits[:, order]))
    assert torch.allclose(renamed.dense(), plain.dense()[:, order], atol=1e-6) == (
        not row.exempt.get("permuting experts permutes the answer")
    )


@pytest.mark.parametrize("name", ROUTERS)
def test_extreme_logits_and_ties(name):
    for logits in (
        torch.zeros(4, 8),
        torch.full((4, 8), -1e30),
        logits_of(4, 8) * 1e30,
        logits_of(4, 8) * 1e-38,
        logits_of(40, 8).round(),
    ):
        routing = rule_of(ROUTERS[name], 8)(softmax_gate(logits)).validate()
        if name in CHOOSING:
            for l, experts in zip(logits.tolist(), routing.experts.tolist()):
                used = [e for e in experts if e < 8]
                assert set(used) == set(sorted(range(8), key=lambda e: (-l[e], e))[: len(used)])


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("bad", [float("nan"), INF, -INF])
def test_bad_logits(name, bad):
    logits = logits_of(5, 8)
    logits[3, 2] = bad
    with pytest.raises(ValueError, match="row 3"):
        rule_of(ROUTERS[name], 8)(as_view(logits, context=context_of(5)))


@pytest.mark.parametrize("name", ROUTERS)
def test_strided_half_and_grad_inputs(name):
    logits, rule = logits_of(20, 8), rule_of(ROUTERS[name], 8)
    want = rule(as_view(logits, context=context_of(20))).experts
    assert torch.equal(rule(as_view(logits.t().contiguous().t(), context=context_of(20))).experts, want)
    leaf = logits.clone().requires_grad_()
    routing = rule(as_view(leaf, context=context_of(20)))
    assert torch.equal(routing.experts, want) and routing.logits.requires_grad
    rule(as_view(logits.bfloat16(), context=context_of(20))).validate()


@pytest.mark.parametrize("convention", WEIGHTS)
def test_gradients_are_finite(convention):
    "Also in tokens with unused slots, with and without temperature."
    for temperature in (1.0, 2.0):
        leaf = logits_of(30, 8).requires_grad_()
        rule = TopP(0.5, weigh=convention, temperature=temperature)
        weights = rule(leaf).weights
        if weights.requires_grad:
            weights.pow(2).sum().backward()
            assert leaf.grad.isfinite().all()


def test_no_expert_left():
    logits = logits_of(3, 4)
    view = replace(as_view(logits, k=2), choice=torch.full((3, 4), -INF))
    for convention in WEIGHTS:
        routing = TopK(2, weigh=convention, temperature=1.5)(view).validate()
        assert routing.counts.tolist() == [0, 0, 0] and (routing.weights == 0).all()


def test_keys_match_stable_sort():
    scores = logits_of(500, 33).mul(3).round().div(3)
    scores[scores == 0] = -0.0
    scores[::3, 5], scores[1::3, 7] = 0.0, -INF
    order = scores.argsort(dim=-1, descending=True, stable=True)
    assert torch.equal(rank_keys(scores) & 0xFFFF, order)
    assert torch.equal(rank_keys(scores), score_keys(scores).sort(-1).values)
    counts = torch.arange(500) % 12
    experts = chosen(rank_keys(scores), 11, counts)
    assert torch.equal((experts < 33).sum(-1), counts)


def test_conventions_by_hand():
    view = sigmoid_gate(logits_of(6, 8))
    experts = torch.tensor([[0, 2, 8]] * 6)
    s = view.logits.sigmoid()[:, [0, 2]]
    native = 2.5 * s / s.sum(-1, keepdim=True)
    own = 2.5
    for name, want in {
        "native": native,
        "renorm": native / 2.5,
        "mass": native / 2.5 * own,
        "softk": view.logits[:, [0, 2]].softmax(-1),
        "uniform": torch.full((6, 2), 0.5),
    }.items():
        got = weigh(view, experts, name)
        assert torch.allclose(got[:, :2], want, atol=1e-6) and (got[:, 2] == 0).all(), name
    tempered = weigh(view, experts, "native", 2.0)
    assert torch.allclose(tempered.sum(-1), native.sum(-1)) and torch.allclose(
        tempered[:, :2] / tempered[:, :1], (native / native[:, :1]).sqrt()
    )


@pytest.mark.parametrize(
    "name, params, message",
    [
        ("nope", {}, "unknown router"),
        ("topk", {"kk": 1}, "did you mean 'k'"),
        ("topk", {"k": 0}, "k = 0"),
        ("topk", {"weigh": "norm"}, "'renorm'"),
        ("topk", {"temperature": 0}, "temperature"),
        ("topk", {"jitter": -1}, "jitter"),
        ("top_p", {}, "needs p"),
        ("top_p", {"p": 1.5}, "p = 1.5"),
        ("top_p", {"p": 0.5, "min_k": 3, "max_k": 2}, "larger than max_k"),
        ("threshold", {"threshold": 1}, "threshold = 1"),
        ("entropy_bands", {"limits": (0.3, 0.5, 0.7)}, "fall"),
        ("entropy_bands", {"ks": (1, 2)}, "bands"),
        ("entropy_bands", {"ks": (0, 1, 2, 3)}, "k of a band"),
        ("bh", {"alpha": 0.3, "max_k": 4}, "needs a null"),
        ("hc", {"beta": 0}, "null|beta"),
        ("random", {"k": -1}, "k = -1"),
        ("topk", {"k": "3"}, "whole number"),
        ("topk", {"temperature": "hot"}, "wrong type"),
    ],
)
def test_bad_parameters(name, params, message):
    with pytest.raises(ValueError, match=message):
        make_rule(name, **params)


@pytest.mark.parametrize(
    "rule",
    [TopK(9), TopP(0.5, max_k=9), Threshold(0.1, min_k=9), EntropyBands(ks=(1, 2, 3, 9)), Random(9), PositionHash(9)],
)
def test_too_many_experts_at_call(rule):
    with pytest.raises(ValueError, match="9"):
        rule(torch.randn(3, 8))


def test_needs_context():
    with pytest.raises(ValueError, match="token_id"):
        TokenHash(2)(torch.randn(3, 8))
    with pytest.raises(ValueError, match="repeats experts"):
        PositionHash(2)(torch.randn(3, 97))


def test_random_is_uniform_over_pairs():
    "Every pair of experts is drawn equally often, and draws differ by seed, forward and layer."
    routing = Random(2)(torch.zeros(12000, 4))
    pairs = torch.bincount(routing.mask.long() @ torch.tensor([1, 2, 4, 8]), minlength=16)
    seen = pairs[pairs > 0].double()
    assert len(seen) == 6 and float(((seen - 2000) ** 2 / 2000).sum()) < 25
    views = [as_view(torch.zeros(50, 8), context=Context(layer=l, forward=f)) for l, f in ((0, 0), (1, 0), (0, 1))]
    masks = {Random(2, seed=s)(v).mask.numpy().tobytes() for v in views for s in (0, 1)}
    assert len(masks) == 6


@pytest.mark.parametrize("calibrate, rule", [(calibrate_top_p, TopP), (calibrate_threshold, Threshold)])
def test_calibration(calibrate, rule):
    logits = logits_of(300 * 3, 16).view(300, 3, 16)
    for min_k, max_k, targets in (
        (1, None, (1, 1.5, 4, 15.9, 16)),
        (1, 4, (1, 2.2, 4)),
        (2, 6, (2, 3.3, 6)),
        (3, 3, (3,)),
    ):
        for target in targets:
            knob = calibrate(logits, target, min_k=min_k, max_k=max_k)
            mean = float(rule(knob, min_k=min_k, max_k=max_k)(logits.flatten(0, 1)).counts.float().mean())
            assert abs(mean - target) < 0.02, (min_k, max_k, target, mean)
        with pytest.raises(ValueError, match="target_k"):
            calibrate(logits, 17, min_k=min_k, max_k=max_k)


def example_of(row, E=8, **more):
    null = {"null": fit_null(logits_of(200, E, seed=9), "conformal")} if row.needs_null else {}
    return {"k": 2, **row.example, **null, **more}


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("capacity_factor", [None, 0.5, 1.25])
def test_router_module(name, capacity_factor):
    row = ROUTERS[name]
    torch.manual_seed(0)
    router = make_router(name, hidden_size=12, num_experts=8, capacity_factor=capacity_factor, **example_of(row))
    deep = row.router.depth_shared  # makes a state of its own, and has other weights
    for T in (0, 1, 9):
        for training in (True, False):
            context = replace(context_of(T), position=torch.zeros(T, dtype=torch.int64)) if T == 1 else context_of(T)
            routing, state = router.train(training)(
                torch.randn(T, 12).bfloat16(), context, state=None if deep else "kept"
            )
            assert (
                len(state) == T if deep and router.use_gru else state == (None if deep else "kept")
            ) and routing.validate().logits.dtype == torch.float32
    router.train()
    assert (
        deep
        or list(router.state_dict())[0] == "weight"
        and (len(router.state_dict()) > 1) == (router.steer.__func__ is not Router.steer)
    )
    routing, _ = router(torch.randn(9, 12), context_of(9))
    if row.trainable:
        routing.weights.pow(2).sum().backward()
        assert next(router.parameters()).grad.abs().sum() > 0
    else:
        assert not routing.weights.requires_grad


@pytest.mark.parametrize("name", ROUTERS)
def test_capacity_means_what_the_row_says(name):
    row, T = ROUTERS[name], 200
    torch.manual_seed(0)
    skew, context = torch.randn(12) * 2, context_of(T)
    for factor in (0.5, 1.0):
        router = make_router(name, 12, 8, capacity_factor=factor, **example_of(row))
        k = router.k
        for training in (True, False):
            routing, _ = router.train(training)(torch.randn(T, 12) + skew, context)
            most = max(1, -(-int(factor * T * k * 1000) // 8000))
            if row.capacity == "never":
                assert routing.load.tolist() == [T] * 8
            elif training or row.capacity != "budget" or row.evaluate:
                assert int(routing.load.max()) <= most, (factor, training)
            if row.capacity in ("limit", "both"):
                assert routing.extras["capacity"] == most
    if row.group != "control":
        assert make_router(name, 12, 8, **example_of(row))(torch.randn(T, 12) + skew, context)[0].load.max() > T // 8


@pytest.mark.parametrize("name", ROUTERS)
def test_contracts(name):
    found = check_contracts(name)
    assert set(found) == set(CONTRACTS)
    assert {c for c, v in found.items() if v.startswith("exempt")} == set(ROUTERS[name].exempt)
    assert not [v for v in found.values() if v.startswith("BROKEN")], found


BATCH_WIDE = {
    "expert_choice": "causal batch",
    "sinkhorn": "causal batch",
    "sbase": "causal batch",
    "expert_choice_as_shipped": "causal batch",
    "random": "batch padding",
    "position_hash": "batch padding",
    **{name: "causal batch" for name in ROUTERS if name.startswith("spectra") and name != "spectra_all_removed"},
    "spectra_as_shipped": "causal batch padding",
}


@pytest.mark.parametrize("name", ROUTERS)
def test_invariances(name):
    trained, evaluated = invariances(name, training=True, draws=3), invariances(name, draws=3)
    depends = set(BATCH_WIDE.get(name, "").split())
    assert {w for w, stays in trained.items() if not stays} == depends
    assert {w for w, stays in evaluated.items() if not stays} == (
        (depends - {"padding"} if name == "spectra_as_shipped" else depends)
        if ROUTERS[name].group in ("control", "as shipped")
        else set()
    )


def test_table():
    table = zoo_table(draws=1)
    assert (
        list(table.index) == list(ROUTERS)
        and table.loc["sinkhorn", "causal"] == "yes (training: no)"
        and table.loc["random", "batch-invariant"] == "no"
    )


def test_losses_are_not_shared():
    a, b = make_router("topk_z", 8, 4, k=2), make_router("topk_z", 8, 4, k=2, losses={"aux": 0.5})
    a.losses["aux"] = 7.0
    assert (
        ROUTERS["topk_z"].losses == {"aux": 0.01, "z": 0.001}
        and b.losses == {"aux": 0.5}
        and make_router("softk", 8, 4, k=2).losses == {}
    )


@pytest.mark.parametrize("name", IGNORES)
def test_controls_learn_nothing_of_the_choice(name):
    router = make_router(name, 12, 8, k=2)
    weights = router(torch.randn(20, 12), context_of(20))[0].weights
    assert not weights.requires_grad and len(weights.unique()) == 1
    if name in ("random", "token_hash"):
        assert make_rule(name, k=2).weigh == "native"  # in a pretrained model: its own weights


@pytest.mark.parametrize(
    "name, params, message",
    [
        ("topk_aux", {"k": 9}, "k of topk_aux with 8 experts = 9"),
        ("switch_top2", {"num_experts": 1}, "k of switch_top2 with 1 experts = 2"),
        ("topk_aux", {"k": 0}, "= 0 is outside"),
        ("topk_aux", {"k": "2"}, "whole number"),
        ("quantile", {"k": 1}, "never train its gate"),
        ("softk", {"k": 1}, "never train its gate"),
        ("topk", {"k": 1, "weigh": "none"}, "unknown weight convention"),
        ("switch", {"capacity_factor": 0}, "capacity_factor"),
        ("expert_choice", {"capacity_factor": -1.0}, "capacity_factor"),
        ("dense", {"capacity_factor": float("nan")}, "capacity_factor"),
        ("switch", {"refuse": "scores"}, "did you mean 'score'"),
        ("loss_free", {"uu": 0.1}, "unknown parameter of loss_free 'uu'"),
        ("topk_aux", {"horizon": 3}, "unknown parameter"),
        ("topk_bux", {}, "did you mean 'topk_aux'"),
        ("bh", {"alpha": 0.1, "max_k": 2}, "null"),
        ("topk", {"hidden_size": 0}, "hidden_size"),
        ("topk", {"num_experts": 0}, "num_experts"),
    ],
)
def test_bad_routers(name, params, message):
    with pytest.raises(ValueError, match=message):
        make_router(name, **{"hidden_size": 12, "num_experts": 8, **params})


def test_one_expert_each_may_be_asked_for_with_the_models_own_weights():
    router = make_router("quantile", 12, 8, k=1, weigh="native")
    router(torch.randn(5, 12))[0].weights.sum().backward()
    assert router.weight.grad.abs().sum() > 0 and router.target_k == 1


def test_needs():
    for name, row in ROUTERS.items():
        router = make_router(name, 12, 8, **example_of(row))
        if not row.needs:
            router(torch.randn(5, 12))
        for need in row.needs:
            with pytest.raises(ValueError, match=need):
                router(torch.randn(5, 12))


def test_expert_choice_does_not_generate():
    router = make_router("expert_choice", 12, 8, k=2)
    with pytest.raises(ValueError, match="whole batch"):
        router(torch.randn(1, 12))
    assert router.eval()(torch.randn(1, 12))[0].experts.shape[0] == 1


def test_own_row(monkeypatch):
    import sys
    from types import ModuleType

    module = ModuleType("somebodys_routers")
    module.MINE = Row(
        "mine", TopK, "", "token", example={"k": 2}, defaults={"weigh": "renorm"}, losses={"entropy": 0.1}
    )
    monkeypatch.setitem(sys.modules, "somebodys_routers", module)
    assert find_row("somebodys_routers:MINE") is module.MINE and find_row(module.MINE) is module.MINE
    assert set(check_contracts("somebodys_routers:MINE").values()) == {"kept"} and all(
        invariances("somebodys_routers:MINE", draws=2).values()
    )
    assert make_router("somebodys_routers:MINE", 12, 8, k=2).losses == {"entropy": 0.1}
    with pytest.raises(ValueError, match="not a Row"):
        find_row("torch:Tensor")
    with pytest.raises(ValueError, match="group of routers"):
        replace(module.MINE, group="mine")
    with pytest.raises(ValueError, match="unknown contract"):
        check_contracts(replace(module.MINE, exempt={"always right": ""}))


def test_perturbation_finds_a_dependence_of_weights_alone():
    "The experts stay, only the weights look at the batch."
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class Peeks(TopK):
        def decide(self, view):
            routing = super().decide(view)
            return replace(routing, weights=routing.weights * view.logits[-1].sigmoid().mean())

    found = invariances(Row("peeks", Peeks, "", "token", example={"k": 2}), draws=2)
    assert not found["batch"] and not found["padding"] and found["causal"]  # the last row belongs to another sequence


def test_describe_is_json():
    import json

    for name, row in ROUTERS.items():
        described = rule_of(row, 8).describe()
        assert json.loads(json.dumps(described)) == described and described["weigh"] in WEIGHTS
