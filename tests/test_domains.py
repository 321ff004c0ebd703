"""Days 3 and 4: what was planted is found, chance is not, and each control is what it says."""

import json
from functools import cache
from itertools import permutations

import numpy as np
import pytest
import torch

from moe_routing.analysis.tokens import Choices, watch
from moe_routing.analysis.domains import (
    _another,
    _predicted,
    coactivation,
    depth_distance,
    document_counts,
    domain_documents,
    draw_depth,
    draw_domains,
    draw_orthogonality,
    independent_information,
    information,
    next_layer_recall,
    orthogonality,
    plain_numbers,
    published_counts,
    published_usage,
    read_domains,
    relabelled_distance,
    report_numbers,
    saturation,
    specialisation_report,
    stratified_jackknife,
    token_batches,
    token_explained,
    usage_test,
    vocabulary_specialisation,
)
from moe_routing.patching.patch import families, tiny_family
from moe_routing.patching.probe import moe_layers
from moe_routing.routers.zoo import make_router, make_rule
from moe_routing.settings import load_settings
from moe_routing.stats import mean_interval
from moe_routing.training.loop import char_tokenizer


def seeded(n=0):
    return torch.Generator().manual_seed(n)


def dice(n=0):
    return np.random.default_rng(n)


@cache
def model():
    return tiny_family("olmoe", families()["olmoe"]).eval()


@cache
def words():
    return char_tokenizer(["red green blue black white"])


def made(experts, token_id=None, length=20):
    "Choices from experts (T, L, K); each `length` tokens are a document."
    T = len(experts)
    at = torch.arange(T)
    return Choices(
        torch.zeros(T, dtype=torch.long) if token_id is None else token_id,
        at % length,
        at // length,
        experts,
        int(experts.max()) + 1,
    )


def noisy(effect=0.0, documents=12, domains=3, experts=6, lengths=(40, 40, 40), seed=0):
    "Counts (D, 1, E) of documents that differ from each other, and of domains that differ by `effect`."
    rng, labels = dice(seed), np.repeat(np.arange(domains), documents)
    rows = []
    for d in labels:
        taste = np.ones(experts) + effect * experts * (np.arange(experts) == d)
        rows.append(rng.multinomial(lengths[d], rng.dirichlet(4 * taste)))
    return np.array(rows)[:, None], labels


# domains and documents


def settings_with(tmp_path, **texts):
    folder = tmp_path / "domains"
    folder.mkdir()
    (tmp_path / "data").mkdir()
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text)
    return load_settings(
        environ={
            "MOE_ROUTING_DATA_DIR": str(tmp_path / "data"),
            "MOE_ROUTING_CACHE_DIR": str(load_settings().cache_dir),
        }
    )


def lines(name, count):
    return "\n".join(f"{name} line {i} with some words of its own" for i in range(count))


def test_local_domains_are_cut_evenly_and_equally_many(tmp_path):
    settings = settings_with(tmp_path, arxiv=lines("a", 400), book=lines("b", 120), SOURCE="where from")
    found = domain_documents("local", 20, 300, settings)
    names = [d["domain"] for d in found]
    assert set(names) == {"arxiv", "book"} and names.count("arxiv") == names.count("book") >= 10
    for name, text in (("arxiv", lines("a", 400)), ("book", lines("b", 120))):
        starts = [text.index(d["text"]) for d in found if d["domain"] == name]
        ends = [s + len(d["text"]) for s, d in zip(starts, (d for d in found if d["domain"] == name))]
        assert (
            all(e <= s for e, s in zip(ends, starts[1:]))
            and all(s == 0 or text[s - 1] == "\n" for s in starts)
            and starts[-1] > len(text) / 3
        )
    assert {d["domain"] for d in domain_documents(["arXiv", "novels"], 5, 300, settings)} == {"arXiv", "novels"}
    assert {d["domain"] for d in domain_documents(["arxiv", "code"], 5, 300, settings)} == {"arxiv", "code"}


@pytest.mark.parametrize(
    "domains, message",
    [
        (["code", "prosa"], "did you mean 'prose'"),
        (["code"], "nothing to compare"),
        ("code", "nothing to compare"),
        (["book", "novels"], "twice"),
        (["code", "github"], "local files are looked for"),
        (["code", "poor"], "has 1 documents, the test needs 5"),
    ],
)
def test_bad_domains(tmp_path, domains, message):
    with pytest.raises(ValueError, match=message):
        domain_documents(domains, 10, 300, settings_with(tmp_path, book=lines("b", 100), poor=lines("p", 8)))


def test_no_local_domains(tmp_path):
    with pytest.raises(FileNotFoundError, match="use domains='embedded'"):
        domain_documents("local", settings=settings_with(tmp_path))


def test_embedded_domains_need_no_files(tmp_path):
    assert len(domain_documents("embedded", 7, settings=settings_with(tmp_path))) == 35


def test_batches_keep_order_and_refuse_empty_texts():
    texts = ["red green", "blue", "red red red red"]
    batches = token_batches(words(), texts, max_length=3, batch=2)
    lengths = [n for b in batches for n in b["attention_mask"].sum(1).tolist()]
    assert lengths == [min(3, len(words()(t)["input_ids"])) for t in texts]
    with pytest.raises(ValueError, match="no token"):
        token_batches(words(), ["red", ""])


def documents(n=6):
    return [dict(domain=d, text=w * (2 + i)) for d, w in (("warm", "red "), ("cold", "blue green ")) for i in range(n)]


def test_reading_counts_every_token_once():
    reading = read_domains(model(), words(), documents(), max_length=24, batch=5)
    counts = document_counts(reading.choices)
    tokens = np.concatenate([b["attention_mask"].sum(1).numpy() for b in reading.batches])
    assert reading.domains == ["warm", "cold"] and reading.labels.tolist() == [0] * 6 + [1] * 6
    assert (counts.sum(-1) == tokens[:, None] * moe_layers(model())[0].k).all()
    alone = watch(model(), reading.batches[1:2])
    rows = reading.choices.sequence - 5
    assert torch.equal(reading.choices.experts[(rows >= 0) & (rows < 5)], alone.experts)


def test_models_that_cannot_be_read():
    from transformers import LlamaConfig, LlamaForCausalLM

    dense = LlamaForCausalLM(
        LlamaConfig(vocab_size=90, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    ).eval()
    with pytest.raises(ValueError, match="no MoE layer"):
        read_domains(dense, words(), documents())
    with pytest.raises(ValueError, match="max_length"):
        read_domains(model(), words(), documents(), max_length=10**7)


# the test over documents


def test_planted_domains_are_found_and_only_they():
    counts, labels = noisy(0.6)
    found = usage_test(counts, labels, draws=199)
    assert found["effect_p"][0] == 1 / 200 and found["effect"][0] > found["effect_95"][0] > found["effect_floor"][0]
    assert (found["p_adjusted"] >= found["p"] - 1e-12).all() and found["p_adjusted"][0, :3].max() < 0.05


@pytest.mark.parametrize("lengths", [(40, 40, 40), (15, 40, 120)])
def test_no_domain_is_found_where_documents_alone_differ(lengths):
    p = np.array([usage_test(*noisy(0, lengths=lengths, seed=s), draws=39)["effect_p"][0] for s in range(120)])
    assert (p <= 0.05).mean() < 0.12 and (p <= 0.5).mean() > 0.3


def test_tokens_permuted_instead_of_documents_would_find_domains_everywhere():
    counts, labels = noisy(0, seed=3)
    floor = usage_test(counts, labels, draws=99)["information_floor"][0]
    assert floor > 2 * independent_information(6, 3, 12 * 40)


def test_units_widen_the_floor():
    rng, labels = dice(1), np.repeat([0, 1], 20)
    books = np.repeat(np.arange(10), 4)  # four pieces a book, and only books differ
    taste = rng.dirichlet(np.ones(6), 10)
    counts = np.array([rng.multinomial(50, taste[b]) for b in books])[:, None]
    one, together = usage_test(counts, labels, 199), usage_test(counts, labels, 199, books)
    assert together["effect_floor"][0] > 1.3 * one["effect_floor"][0] and together["effect_p"][0] > one["effect_p"][0]


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(labels=np.zeros(36, int)), "one domain"),
        (dict(labels=np.repeat([0, 1], [33, 3])), "has 3 documents"),
        (dict(labels=np.zeros(4, int)), "4 labels for 36"),
        (dict(units=np.arange(36) % 5), "every unit"),
        (dict(draws=3), "draws"),
    ],
)
def test_bad_tests(change, message):
    counts, labels = noisy()
    with pytest.raises(ValueError, match=message):
        usage_test(counts, **{"labels": labels, **change})


def test_information_is_mutual_information():
    from sklearn.metrics import mutual_info_score

    table = np.array([[5, 3, 2], [1, 1, 8]])
    assert information(table / 10) == pytest.approx(mutual_info_score(None, None, contingency=table))


# token ids


def test_jackknife_of_a_mean_is_the_t_interval():
    x = dice().normal(size=15)
    found = stratified_jackknife([x[:, None]], np.zeros(15, int), lambda s: s[0] / 15 * 15 / 15)[0]
    whole = stratified_jackknife([np.stack([x, np.ones(15)], 1)], np.zeros(15, int), lambda s: s[0, 0] / s[0, 1])[0]
    assert np.allclose(whole[:3], mean_interval(x)[:3]) and found.n == 15
    with pytest.raises(ValueError, match="2 are needed"):
        stratified_jackknife([x], np.arange(15), lambda s: s.sum())


def test_jackknife_takes_the_bias_from_information():
    both = [
        (
            float(information(np.stack([c[l == d].sum(0)[0] for d in range(3)]) / (12 * 40))),
            stratified_jackknife([c[:, 0]], l, lambda s: information(s / s.sum(-1, keepdims=True)))[0].estimate,
        )
        for c, l in (noisy(0, seed=s) for s in range(40))
    ]
    plug_in, corrected = np.mean(both, 0)
    assert abs(corrected) < 0.2 * plug_in


def test_predicted_use_equals_loops():
    token_id, experts = (
        torch.randint(6, (80,), generator=seeded(1)),
        torch.randint(5, (80, 1, 2), generator=seeded(2)).sort(-1).values,
    )
    choices, part = made(experts, token_id, length=10), np.arange(8) % 3
    E, slow = choices.num_experts, np.zeros((8, choices.num_experts))
    for doc in range(8):
        others = [t for t in range(80) if part[t // 10] != part[doc]]
        every = np.bincount(experts[others].flatten().numpy()[experts[others].flatten().numpy() < E], minlength=E)
        for t in range(10 * doc, 10 * doc + 10):
            same = experts[[o for o in others if token_id[o] == token_id[t]]].flatten().numpy()
            table = np.bincount(same, minlength=E) if len(same) else every
            slow[doc] += 2 * table / table.sum()
    assert np.allclose(_predicted(choices, 0, part), slow)


def test_explained_of_routers_whose_truth_is_known():
    labels, T = np.repeat([0, 1], 12), 24 * 20
    domain = torch.from_numpy(labels).repeat_interleave(20)
    token_id = torch.where(torch.rand(T, generator=seeded()) < 0.7, 4 * domain, 4 - 4 * domain) + torch.randint(
        4, (T,), generator=seeded(1)
    )
    by_id, by_domain = (
        made((token_id % 8)[:, None, None], token_id),
        made(domain[:, None, None], torch.randint(4, (T,), generator=seeded(2))),
    )
    one, other = token_explained(by_id, labels)[0], token_explained(by_domain, labels)[0]
    assert one["explained"].low > 0.9 and one["explained_other_domains"].low > 0.9 and one["shared_ids"] == 1
    assert abs(other["explained"].estimate) < 0.1 and other["explained_other_domains"].estimate == pytest.approx(
        -1, abs=0.1
    )
    assert other["information"].estimate == pytest.approx(np.log(2)) and other["information_token"].estimate < 0.02
    assert token_explained(by_id, labels, [False])[0]["explained"] is None
    with pytest.raises(ValueError, match="folds"):
        token_explained(by_id, labels, folds=13)


# depth


def test_relabelled_distance_is_the_mean_over_all_permutations():
    p, q = (torch.randn(3, 4, generator=seeded(n)).softmax(-1) for n in (0, 1))
    every = torch.stack([(p - q[:, list(o)]).abs().mean(-1) for o in permutations(range(4))]).mean(0)
    assert torch.allclose(relabelled_distance(p, q).float(), every, atol=1e-6)


def test_depth_distance_equals_loops_and_ignores_padding():
    reading = read_domains(model(), words(), documents(3), max_length=24, batch=3)
    rows, kept = depth_distance(model(), reading.batches), []
    from moe_routing.patching.patch import route

    with (
        torch.no_grad(),
        route(model(), None, observe=lambda c, r, h: kept.append((c.layer, r.logits.float().softmax(-1)[c.valid]))),
    ):
        for b in reading.batches:
            model()(**b, use_cache=False)
    for row in rows:
        p, q = (torch.cat([k for l, k in kept if l == row["layer"] + i]) for i in (0, 1))
        assert row["l1"] == pytest.approx(float((p - q).abs().mean()), rel=1e-5) and row["variation"] == pytest.approx(
            float((p - q).abs().sum(-1).mean() / 2), rel=1e-5
        )
    assert row["below_relabelled"].estimate == pytest.approx(row["l1"] - row["relabelled"])


def test_one_router_for_all_layers_is_nearer_than_relabelled():
    H, E, L = model().config.hidden_size, moe_layers(model())[0].num_experts, len(moe_layers(model()))
    torch.manual_seed(0)
    shared = make_router("softk", hidden_size=H, num_experts=E, k=2).eval()
    batches = token_batches(words(), [d["text"] for d in documents()], 16)
    assert all(r["below_relabelled"].high < 0 for r in depth_distance(model(), batches, [shared] * L))
    with pytest.raises(ValueError, match="documents"):
        depth_distance(model(), token_batches(words(), ["red blue"]))


def test_next_set_is_told_by_a_fixed_map_and_by_nothing_else():
    first, moved = torch.randint(6, (400,), generator=seeded()), torch.tensor([3, 4, 5, 0, 1, 2])
    tied, free = (
        made(torch.stack([first, then], 1)[..., None])
        for then in (moved[first], torch.randint(6, (400,), generator=seeded(1)))
    )
    row, null = next_layer_recall(tied)[0], next_layer_recall(free)[0]
    assert row["recall"] == 1 and row["over_marginal"].low > 0.5 and abs(row["shuffled"] - 1 / 6) < 0.06
    assert abs(null["recall"] - null["random"]) < 0.06 and null["random"] == pytest.approx(1 / 6)
    word = made(torch.stack([first, moved[first]], 1)[..., None], first)
    assert next_layer_recall(word)[0]["same_id"] == 1  # the word alone says as much
    with pytest.raises(ValueError, match="layers"):
        next_layer_recall(made(first[:, None, None]))


def test_another_token_of_the_same_id():
    ids = torch.tensor([5, 7, 5, 7, 5, 9])
    order = _another(ids, seeded(), True)
    assert torch.equal(ids[order], ids) and order[5] == 5 and (order[:5] != torch.arange(5)).all()
    assert (_another(ids, seeded(), False) != torch.arange(6)).all()


def test_unused_slots_count_nowhere():
    experts = torch.stack([torch.randint(4, (200, 1), generator=seeded(l)).expand(-1, 2).clone() for l in range(2)], 1)
    experts[..., 1] = 4
    padded, plain_ = (
        Choices(*[getattr(made(experts), n) for n in ("token_id", "position", "sequence", "experts")], 4),
        made(experts[..., :1]),
    )
    assert (document_counts(padded) == document_counts(plain_)).all() and next_layer_recall(padded)[0][
        "recall"
    ] == next_layer_recall(plain_)[0]["recall"]
    assert (
        np.allclose(_predicted(padded, 0, np.arange(10) % 2), _predicted(plain_, 0, np.arange(10) % 2))
        and "no token" in coactivation(padded, 0)["reason"]
    )


# vectors, checkpoints, pairs, words


def test_orthogonality_of_equal_and_of_orthogonal_gates():
    from copy import deepcopy

    changed = deepcopy(model())
    gates = [next(p for p in l.gate.parameters() if p.ndim == 2) for l in moe_layers(changed)]
    with torch.no_grad():
        gates[0].copy_(gates[0][:1].expand_as(gates[0])), torch.nn.init.orthogonal_(gates[1])
    rows = orthogonality(changed, "gate", draws=60)
    assert (
        rows[0]["abs"] == pytest.approx(1, abs=1e-5)
        and rows[0]["gram"] < 0.5
        and rows[1]["abs"] < rows[1]["abs_low"]
        and rows[1]["gram"] > 0.999
    )
    assert rows[0]["abs_random"] == pytest.approx(rows[0]["abs_formula"], rel=0.1)
    with pytest.raises(ValueError, match="kind of vectors"):
        orthogonality(changed, "gates")


def test_saturation_counts_shared_experts():
    early, late = (
        torch.tensor([[[0, 1]], [[2, 3]], [[0, 3]], [[1, 2]]]),
        torch.tensor([[[0, 2]], [[2, 3]], [[1, 2]], [[2, 1]]]),
    )
    found = saturation({"early": made(early, length=2), "late": made(late, length=2)})
    assert [r["agreement"] for r in found["rows"]] == [5 / 8] and found["final"] == "late"
    assert (
        saturation({"late": made(late)})["rows"] == []
        and "one checkpoint" in saturation({"late": made(late)})["reason"]
    )
    with pytest.raises(ValueError, match="same tokens"):
        saturation({"a": made(early, torch.arange(4)), "b": made(late)})


def test_planted_pair_is_found():
    T = 2000
    alone = torch.stack([torch.randperm(8, generator=seeded(t))[:2] for t in range(T)])
    paired = torch.where((torch.arange(T) % 4 == 0)[:, None], torch.tensor([2, 5]), alone)
    one, other = coactivation(made(paired[:, None]), 0), coactivation(made(alone[:, None]), 0)
    assert (
        one["pairs"][0]["experts"] == [2, 5]
        and one["excess"] > 4 * one["excess_floor"]
        and other["excess"] < 1.6 * other["excess_floor"]
    )
    mask = made(paired[:, None]).mask(0)
    assert one["rate"][2, 5] == pytest.approx(float(mask[mask[:, 2], 5].double().mean()))


def test_vocabulary_equals_loops_and_knows_the_side():
    ids, experts = torch.randint(5, (300,), generator=seeded()), torch.randint(4, (300,), generator=seeded(1))
    found = vocabulary_specialisation(made(experts[:, None, None], ids), 0, least=1)
    by_expert = sum(ids[experts == e].bincount().max().item() for e in range(4)) / 300
    by_id = sum(experts[ids == v].bincount().max().item() for v in range(5)) / 300
    assert found["input"]["from_expert"] == pytest.approx(by_expert) and found["input"]["from_id"] == pytest.approx(
        by_id
    )
    following = vocabulary_specialisation(made((ids.roll(-1) % 4)[:, None, None], ids), 0)
    assert (
        following["output"]["from_id"] == 1 > following["input"]["from_id"] and following["output"]["from_id_p"] == 0.05
    )
    with pytest.raises(ValueError, match="least = 8"):
        vocabulary_specialisation(made(experts[:20, None, None], torch.arange(20)), 0)


# published counts, pictures and the report


def counts_file(tmp_path):
    rows = [
        dict(model="m", num_experts=4, top_k=1, layer=0, domain=d, counted="top_k", counts=c)
        for d, c in (("a", [30, 10, 10, 10]), ("b", [10, 10, 10, 30]))
    ]
    path = tmp_path / "expert_counts.json"
    path.write_text(json.dumps({"source": "made up", "rows": rows + [dict(rows[0], layer=1)]}))
    return path


def test_published_counts(tmp_path):
    found = published_usage(published_counts(counts_file(tmp_path)))
    assert (
        len(found) == 1
        and found[0]["effect"] == pytest.approx(1 / 6)
        and found[0]["most"]["times_uniform"] == 2
        and found[0]["information_floor"] == pytest.approx(3 / (4 * 60))
    )
    assert published_counts(tmp_path / "none.json") is None
    with pytest.raises(ValueError, match="counted"):
        published_usage([], "top_2")


def test_report_is_json_and_every_figure_draws(tmp_path):
    import matplotlib.pyplot as plt

    reading = read_domains(model(), words(), documents(), make_rule("topk", k=2), max_length=16)
    test = usage_test(document_counts(reading.choices), reading.labels, draws=39)
    distance, recall, angles = (
        depth_distance(model(), reading.batches),
        next_layer_recall(reading.choices),
        orthogonality(model(), draws=50),
    )
    report = specialisation_report(
        reading, test, distance, recall, angles, saturation({"only": reading.choices}), False
    )
    numbers = report_numbers(json.loads(json.dumps(report, allow_nan=False)))
    assert (
        numbers["saturation"] is None
        and numbers["trajectory_l1"] > 0
        and "not on this machine" in report["published"]["reason"]
    )
    assert report_numbers(report | {"trajectory": {"distance": [], "recall": []}})["trajectory_l1"] is None
    for fig in (
        draw_domains(test, reading.domains),
        draw_depth(distance, recall),
        draw_depth(distance, recall, True),
        draw_orthogonality(angles),
    ):
        fig.savefig(tmp_path / "f.png", dpi=20)
        assert fig.get_figwidth() <= 6.9
        plt.close(fig)


def test_plain_numbers():
    assert plain_numbers({"a": np.float64("nan"), 2: [np.int64(3), mean_interval([1, 3])]}) == {
        "a": None,
        "2": [
            3,
            dict(estimate=2, low=mean_interval([1, 3]).low, high=mean_interval([1, 3]).high, p=None, n=2, method="t"),
        ],
    }
