"""Routed adapters: each variant learns, changes nothing at the start, and leaves the model as it was."""

from types import SimpleNamespace

import pytest
import torch

from moe_routing.metrics.dependence import depends_on
from moe_routing.models.adapters import VARIANTS, adapter_gain, adapter_losses, adapter_parameters


@pytest.mark.parametrize("variant", VARIANTS)
def test_adapters(variant):
    found = adapter_losses(variant)
    assert found["change"] == 0 and found["losses"][-1] < found["losses"][0] - 0.01
    assert found["parameters"] == adapter_parameters(variant, 2, 32, 8)


def test_bad_input():
    with pytest.raises(ValueError, match="variant"):
        adapter_parameters("Q", 1, 1, 1)
    with pytest.raises(ValueError, match="router"):
        depends_on("no_such")


class Letters:
    "A tokenizer of letters."

    def __call__(self, text, max_length, **more):
        return SimpleNamespace(input_ids=torch.tensor([[ord(c) % 64 for c in text[:max_length]]]))


@pytest.mark.parametrize("variant", VARIANTS)
def test_adapters_on_texts_leave_the_model_as_it_was(variant):
    from transformers import OlmoeConfig, OlmoeForCausalLM

    torch.manual_seed(0)
    model = OlmoeForCausalLM(
        OlmoeConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_experts=4,
            num_experts_per_tok=2,
            pad_token_id=0,
            eos_token_id=0,
        )
    ).eval()
    ids = torch.arange(9)[None]
    before = model(ids).logits
    found = adapter_gain(model, Letters(), variant, ["ab" * 6, "ba" * 6], ["ab" * 3, "ba" * 3], steps=8)
    assert (
        (found.after < found.before).all()
        and torch.equal(model(ids).logits, before)
        and all(p.requires_grad for p in model.parameters())
    )
    with pytest.raises(ValueError, match="at least one of each"):
        adapter_gain(model, Letters(), variant, [], ["ab"])
    with pytest.raises(ValueError, match="'a' has fewer than two tokens"):
        adapter_gain(model, Letters(), variant, ["ab"], ["a"])
    with pytest.raises(ValueError, match="variant"):
        adapter_gain(model, Letters(), "Q", ["ab"], ["ab"])
    assert torch.equal(model(ids).logits, before) and all(p.requires_grad for p in model.parameters())
