"""Every causal language model of the installed transformers that declares experts.

Patched with proof, or refused with a reason."""

import pytest

from moe_routing.core import known
from moe_routing.patching.patch import families, family_table, tiny_family
from moe_routing.patching.probe import moe_layers

FAMILIES = families()
ROWS = {}


def row(name):
    if name not in ROWS:
        ROWS[name] = family_table([name], FAMILIES)[0]
    return ROWS[name]


@pytest.mark.parametrize("name", FAMILIES)
def test_patched_with_proof_or_refused_with_a_reason(name):
    r = row(name)
    if not r["patched"]:
        assert r["reason"] and r["reason"] != "the proof failed", r
        return
    assert r["same_bits"] and r["arrived"] and r["restored"] and r["ragged_error"] < 1e-5 and r["layers"] > 0, r


def test_enough_families_keep_the_seam():
    patched = [n for n in FAMILIES if row(n)["patched"]]
    verified = [n for n in patched if "refused" not in row(n)["weights"]]
    assert len(patched) >= 44 and len(verified) >= 44, (
        len(patched),
        len(verified),
        sorted(set(FAMILIES) - set(patched)),
    )


def test_what_cannot_work_is_refused():
    "Selections that the other outputs of the gate depend on, experts without ids, classes that are no experts."
    for name in {"inkling_text", "llama4_text", "zaya", "jetmoe"} & set(FAMILIES):
        assert not row(name)["patched"], name


def test_a_correction_bias_changes_the_ranking_but_not_the_weights():
    "DeepSeek-V3: `choice` is the biased score of the groups that are left, native weights are unbiased ones."
    import torch
    from moe_routing.core import Rule, Routing
    from moe_routing.patching.patch import route

    model, seen = tiny_family("deepseek_v3", FAMILIES["deepseek_v3"]), []

    class Look(Rule):
        def decide(self, view):
            seen.append(
                (view, view.weigh(torch.arange(3).expand(len(view.logits), -1)))
            )  # any set, excluded groups among it
            experts = view.choice.topk(view.k).indices
            return Routing(view.logits, experts, view.weigh(experts))

    with torch.no_grad(), route(model, Look(), experts="keep"):
        model(torch.arange(3, 15).view(2, 6), use_cache=False)
    (view, got), gate = seen[0], moe_layers(model)[0].gate
    score = view.logits.sigmoid() + gate.e_score_correction_bias
    left = view.choice.isfinite()
    assert (
        (left.sum(-1) == 4).all()
        and torch.allclose(view.choice[left], score[left])
        and not torch.allclose(view.choice[left], view.logits.sigmoid()[left])
    )
    expected = view.logits.sigmoid()[:, :3]
    assert torch.allclose(got, expected / expected.sum(-1, keepdim=True) * gate.routed_scaling_factor, atol=1e-5)


def test_unknown_family_is_named():
    with pytest.raises(ValueError, match="mixtral"):
        known("mixtrall", FAMILIES, "family")
    with pytest.raises(ValueError, match="did you mean"):
        family_table(["mixtrall"])
