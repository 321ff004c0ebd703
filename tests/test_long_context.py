"""Long text: windows against reading by hand, chance by its law, ends of documents, refusals, a known model."""

import json
import math

import pytest
import torch

from moe_routing.analysis import long_context as long
from moe_routing.core import Routing
from moe_routing.metrics.stability import random_jaccard
from moe_routing.patching.patch import route
from moe_routing.training.loop import Recipe, build_model


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    model, routers = build_model(
        Recipe(router="softk", k=2, num_experts=8, hidden=16, layers=2, heads=2, intermediate=8, length=64), 40
    )
    ids = torch.randint(1, 40, (640,), generator=torch.Generator().manual_seed(1))
    return model.eval(), [r.eval() for r in routers], ids, (torch.arange(640) // 100)


def masks(model, routers, rows):
    "(L, N, S, E) choices of whole rows."
    seen = long.Decisions()
    with torch.no_grad(), route(model, routers, observe=seen.see):
        model(rows, use_cache=False)
    return torch.stack([r.mask.view(*rows.shape, -1) for r in seen.block])


def jaccard(a, b):
    return ((a & b).sum(-1) / (a | b).sum(-1)).double()


@pytest.mark.parametrize("window, context, short", [(64, 32, 16), (64, 16, 32), (128, 64, 128)])
def test_against_reading_by_hand(small, window, context, short):
    model, routers, ids, document = small
    row = long.route_long(model, routers, ids, document, window, context, shorts=(short,))
    same, next_to, count = [], [], 0
    for start in range(0, len(ids) - window + 1, window - context):
        here = masks(model, routers, ids[None, start : start + window])[:, 0]
        for t in range(context, window, short // 2):
            first = start + t - short // 2
            there = masks(model, routers, ids[None, first : first + short])[:, 0, short // 2 :]
            same.append(jaccard(here[:, t : t + short // 2], there))
        t = torch.arange(context - 1, window - 1)
        inside = document[start + t] == document[start + t + 1]
        next_to.append(jaccard(here[:, t], here[:, t + 1])[:, inside])
        count += window - context
    assert row["compared"] == count and row["tokens"] == 640
    assert row["consistency_layers"] == pytest.approx(torch.cat(same, 1).mean(1).tolist()) and row[
        "consistency"
    ] == pytest.approx(float(torch.cat(same, 1).mean()))
    assert row["sequential_layers"] == pytest.approx(torch.cat(next_to, 1).mean(1).tolist())


def test_the_short_loss_is_that_of_short_rows(small):
    model, routers, ids, document = small
    row, total = long.route_long(model, routers, ids, document, 64, shorts=(16,)), 0.0
    with torch.no_grad(), route(model, routers):
        for first in range(32, 640, 8):
            logits = model(ids[None, first - 8 : first + 8], use_cache=False).logits[0, 7:-1]
            total += float(torch.nn.functional.cross_entropy(logits, ids[first : first + 8], reduction="sum"))
    assert row["nll_short"] == pytest.approx(total / row["compared"], rel=1e-5)


class Fixed(torch.nn.Module):
    "A router whose choice is known: a function of position in the sequence, token and layer."

    def __init__(self, choose):
        super().__init__()
        self.choose = choose

    def forward(self, hidden, context, state=None):
        experts = self.choose(context, len(hidden))
        return Routing(torch.zeros(len(hidden), 8), experts, torch.full(experts.shape, 0.5)), state


def test_known_choices(small):
    model, _, ids, document = small
    by_token = Fixed(lambda c, T: torch.stack([c.token_id % 8, (c.token_id + 1) % 8], 1))
    by_place = Fixed(lambda c, T: torch.stack([c.position % 8, (c.position + 1) % 8], 1))
    one = long.route_long(model, [by_token] * 2, ids, document, 64, shorts=(16, 32))
    assert one["consistency"] == one["layer_consistency"] == 1 and [s["consistency"] for s in one["shorts"]] == [1, 1]
    two = long.route_long(model, [by_place] * 2, ids, document, 64, shorts=(16,))
    assert two["sequential"] == pytest.approx(1 / 3)  # one of two experts is shared
    per_layer = Fixed(lambda c, T: torch.tensor([[2 * c.layer, 2 * c.layer + 1]]).expand(T, -1))
    three = long.route_long(model, [per_layer] * 2, ids, document, 64, shorts=(16,))
    assert (
        three["layer_consistency"] == three["layer_consistency_random"] == 0
        and three["sequential"] == three["sequential_random"] == 1
    )  # all tokens alike: the loads explain it


def test_ids_do_not_align_where_every_layer_has_its_router(small):
    model, routers, ids, document = small
    assert long.route_long(model, routers, ids, document, 64, shorts=(16,))["layer_consistency"] is None


def test_random_choices_read_chance(small):
    model, _, _, _ = small
    ids, draw = torch.randint(1, 40, (4096,)), torch.Generator().manual_seed(0)
    free = Fixed(lambda c, T: torch.rand(T, 8, generator=draw).topk(2).indices)
    row = long.route_long(model, [free] * 2, ids, torch.zeros(4096, dtype=torch.long), 256, shorts=(64,))
    chance = random_jaccard(2, 2, 8)
    for name in ("consistency", "layer_consistency", "sequential"):
        assert row[name] == pytest.approx(chance, abs=0.02) and row[f"{name}_random"] == pytest.approx(chance, abs=0.02)


def test_pairs_stop_at_the_end_of_a_document(small):
    model, _, ids, _ = small
    document = torch.arange(640) // 2  # documents of two tokens: every second pair counts
    choose = Fixed(
        lambda c, T: torch.where((c.position % 2 == 0)[:, None], torch.tensor([[0, 1]]), torch.tensor([[0, 2]]))
    )
    seen = long.route_long(model, [choose] * 2, ids, document, 64, shorts=(16,))
    assert seen["sequential"] == pytest.approx(1 / 3)
    alone = long.route_long(model, [choose] * 2, ids, torch.arange(640), 64, shorts=(16,))
    assert alone["sequential"] == 0 and not math.isnan(alone["sequential"])


@pytest.mark.parametrize(
    "given, words",
    [
        (dict(window=1024), "tokens = 640"),
        (dict(window=64, context=0), "context = 0"),
        (dict(window=64, context=64), "context = 64"),
        (dict(window=64, shorts=(17,)), "even number"),
        (dict(window=64, shorts=(24,)), "does not divide"),
        (dict(window=64, context=16, shorts=(64,)), "at most twice the 16 tokens"),
    ],
)
def test_what_does_not_fit_is_refused(small, given, words):
    with pytest.raises(ValueError, match=words):
        long.route_long(*small, **{"shorts": (16,), **given})


def test_text(root):
    class Words:
        eos_token_id = 0

        def __call__(self, text, add_special_tokens):
            return {"input_ids": [1 + ord(c) % 30 for c in text]}

    ids, document = long.long_text(Words(), 131_072)
    assert len(ids) == 131_072 and (document.diff() >= 0).all() and (document.diff() <= 1).all()
    assert (ids[:-1][document.diff() == 1] == 0).all()  # a document ends with the end-of-text token
    with pytest.raises(ValueError, match="10000000 were asked for"):
        long.long_text(Words(), 10_000_000)


def test_memory_beside_8k():
    rows = [
        {"tokens": t, "peak_mb": p, "grown_mb": g}
        for t, p, g in ((2048, 90.0, 9.0), (8192, 100.0, 10.0), (131072, 110.0, 12.0))
    ]
    assert [r["peak_to_8k"] for r in long.beside(rows)] == [0.9, 1, 1.1] and long.beside(rows)[2]["grown_to_8k"] == 1.2
    assert long.beside(rows[:1])[0]["peak_to_8k"] is None
    assert json.dumps(long.beside([{**rows[1], "grown_mb": 0.0}]))


def test_a_failure_in_the_other_process_is_told(tmp_path):
    with pytest.raises(RuntimeError, match="not a trained model of this book"):
        long.read_in_process(tmp_path, tokens=256)
