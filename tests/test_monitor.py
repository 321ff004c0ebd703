"""The routing monitor.

Equal to summarise, invisible to the training, resumable, honest about what it does not know; trends; W&B."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import (
    OlmoeConfig,
    OlmoeForCausalLM,
    PrinterCallback,
    Trainer,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from moe_routing.core import Routing
from moe_routing.metrics.table import LAYERED, METRICS, per_layer, summarise
from moe_routing.training.monitor import (
    RoutingMonitor,
    _packed,
    _unpacked,
    decisions,
    load_log,
    logged_metrics,
    measure,
    open_patch,
    trend_figures,
    trend_grid,
    undisturbed,
)
from moe_routing.patching.patch import route
from moe_routing.routers.zoo import make_router, make_rule

pytestmark = pytest.mark.usefixtures("one_thread")
IDS = torch.randint(1, 60, (96, 24), generator=torch.Generator().manual_seed(0))
EXAMPLES = [{"input_ids": w, "labels": w} for w in IDS[32:]]


def held_out():
    mask = torch.ones_like(IDS[:16])
    mask[3, 9:], mask[5, :4] = 0, 0
    return [{"input_ids": IDS[:16], "attention_mask": mask, "labels": IDS[:16]}, {"input_ids": IDS[16:24]}]


def small():
    torch.manual_seed(0)
    return OlmoeForCausalLM(
        OlmoeConfig(
            vocab_size=60,
            hidden_size=32,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_experts=8,
            num_experts_per_tok=2,
            max_position_embeddings=64,
            attention_dropout=0.2,
            bos_token_id=None,
            eos_token_id=0,
            pad_token_id=0,
        )
    )


def trainer_of(model, folder, **more):
    options = dict(
        per_device_train_batch_size=8,
        max_steps=6,
        learning_rate=1e-2,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        seed=3,
    )
    trainer = Trainer(model, TrainingArguments(str(folder), **options | more), train_dataset=EXAMPLES)
    trainer.remove_callback(PrinterCallback)
    return trainer


def routers_for(name, model):
    if name is None:
        return None
    torch.manual_seed(1)
    if name == "spectra":
        return [make_router("spectra", 32, 8, k=2, num_layers=2, router_dim=8)] * 2
    return [make_router(name, 32, 8, k=2) for _ in range(2)]


def trained(name, folder, monitored):
    """Train in a plain Trainer under an open patch (or the model's own gates).

    Weights, patch report, random state, monitor."""
    model = small()
    routers = routers_for(name, model)
    if routers:
        model.routers = torch.nn.ModuleList(dict.fromkeys(routers))  # so that they are trained
    seen = []

    def run(patch=None):
        trainer = trainer_of(model, folder)
        monitor = (
            RoutingMonitor(patch, held_out(), every=2, shares=(0, 1), folder=folder / "log").attach(trainer)
            if monitored
            else None
        )
        trainer.train()
        return monitor, trainer, patch.report().as_dict() if patch else None

    if name is None:
        monitor, trainer, report = run()
    else:
        with route(model, routers, observe=lambda c, r, h: seen.append(c.forward)) as patch:
            monitor, trainer, report = run(patch)
    return (
        [t.clone() for t in model.state_dict().values()],
        str(report),
        seen,
        torch.get_rng_state(),
        monitor,
        trainer,
        model,
    )


@pytest.mark.parametrize("name", [None, "spectra", "switch_top2", "random"])
def test_the_training_does_not_notice(name, tmp_path):
    plain, watched = trained(name, tmp_path / "a", False), trained(name, tmp_path / "b", True)
    assert (
        all(torch.equal(a, b) for a, b in zip(plain[0], watched[0]))
        and plain[1:3] == watched[1:3]
        and torch.equal(plain[3], watched[3])
    )
    monitor, trainer, model = watched[4:]
    assert all(m.training for m in model.modules()) and open_patch(model) is None
    rows = load_log(tmp_path / "b" / "log")
    assert rows == json.loads(json.dumps(monitor.rows, allow_nan=False)) and [
        r["step"] for r in rows if r["layer"] == 1
    ] == [0, 2, 4, 6]
    assert [r["checkpoint_consistency"] is None for r in rows[::2]] == [True, False, False, False]
    assert (rows[0]["gram_orthogonality"] is not None) and (rows[-1]["share"] == 1)
    logged = [e for e in trainer.state.log_history if "routing/load_cv" in e]
    assert [e["step"] for e in logged] == [0, 2, 4, 6] and logged[-1]["routing/load_cv"] == pytest.approx(
        np.mean([r["load_cv"] for r in rows[-2:]])
    )
    record = json.loads((tmp_path / "b" / "log" / "routing_monitor.json").read_text())
    assert (
        record["every"] == 2
        and record["shares"] == [0, 1]
        and record["steps"] == [0, 2, 4, 6]
        and record["tokens"] == rows[0]["tokens"] == 24 * 24 - 15 - 4
    )


@pytest.mark.parametrize("name", [None, "spectra"])
def test_rows_are_those_of_summarise(name):
    model = small()
    routers = routers_for(name, model)
    rows, sets = measure(model, routers, held_out())
    with route(model, routers, experts="keep" if name is None else "ragged"):
        later, _ = measure(model, None, held_out(), sets)  # the open patch is found
        blocks, contexts, vectors = zip(*decisions(model, None, held_out()))
    again = [_unpacked(s, b) for s, b in zip(sets, blocks)]
    if name:
        assert all((g == r.extras["representation"]).all() for v, b in zip(vectors, blocks) for g, r in zip(v, b))
    else:
        assert all((g == layer.mlp.gate.weight).all() for v in vectors for g, layer in zip(v, model.model.layers))
    direct = summarise(blocks, contexts=contexts, previous=again, representations=None if name else vectors[0])
    for metric in LAYERED:
        if f"{metric}_per_layer" in METRICS:
            assert [r[metric] for r in later] == (direct[f"{metric}_per_layer"] or [None] * 2), metric
        elif later[0][metric] is not None and metric != "expert_utilization":
            assert np.mean([r[metric] for r in later]) == pytest.approx(direct[metric]), metric
    assert later[0]["checkpoint_consistency"] == 1 and rows[0]["checkpoint_consistency"] is None
    assert {k: v for k, v in later[0].items() if "checkpoint" not in k} == {
        k: v for k, v in rows[0].items() if "checkpoint" not in k
    }
    assert per_layer(blocks, contexts=contexts, previous=again, representations=None if name else vectors[0]) == later
    assert rows[0]["demand_cv"] == pytest.approx(rows[0]["load_cv"]) and rows[0]["drop_rate"] == 0


def test_a_rule_and_the_rule_of_training():
    model = small()
    fixed, _ = measure(model, make_rule("topk", k=3), held_out())
    assert fixed[0]["effective_k"] == 3 and measure(model, None, held_out())[0][0]["effective_k"] == 2
    router = routers_for("expert_choice", model)
    assert measure(model, router, held_out(), as_trained=True)[0] != measure(model, router, held_out())[0] and not any(
        r.as_trained for r in router
    )


def test_resume_continues_the_log(tmp_path):
    def run(folder, log, stop=None, resume=None):
        model = (
            OlmoeForCausalLM.from_pretrained(resume) if resume else small()
        )  # the Trainer itself skips the experts of a checkpoint, whose names differ from the model's
        trainer = trainer_of(model, folder, save_strategy="steps", save_steps=2)
        monitor = RoutingMonitor(None, iter(held_out()), every=1, shares=(), folder=log)
        trainer.add_callback(monitor)  # without attach: straight into the history
        if stop:
            trainer.add_callback(
                type(
                    "Stop",
                    (PrinterCallback,),
                    {
                        "on_log": lambda *a, **k: None,
                        "on_step_end": lambda self, args, state, control, **k: (
                            setattr(control, "should_training_stop", state.global_step >= stop) or control
                        ),
                    },
                )()
            )
        trainer.train(resume_from_checkpoint=resume)
        return monitor, trainer

    whole, trainer = run(tmp_path / "a", tmp_path / "one")
    assert sum("routing/load_cv" in e for e in trainer.state.log_history) == 6
    run(tmp_path / "b", tmp_path / "two", stop=3)
    log = tmp_path / "two" / "routing_log.jsonl"
    log.write_text(log.read_text() + '{"step": 3, "lay')  # killed while it wrote
    later, _ = run(tmp_path / "b", tmp_path / "two", resume=str(tmp_path / "b" / "checkpoint-2"))
    rows = load_log(log)
    assert rows == later.rows and [r["step"] for r in rows[::2]] == [1, 2, 3, 4, 5, 6]
    unknown = [r for r in rows if r["step"] == 3]  # the sets that were kept are of step 3, after the checkpoint
    assert all(r["checkpoint_consistency"] is None for r in unknown)
    for a, b in zip(rows, whole.rows):
        assert a["step"] == 3 or a == b
    fresh, _ = run(tmp_path / "c", tmp_path / "two")
    assert load_log(log) == fresh.rows == whole.rows  # a new training starts a new log


def test_only_the_main_process_writes(tmp_path):
    monitor = RoutingMonitor(None, held_out(), shares=(0,), folder=tmp_path / "x")
    state = TrainerState(max_steps=4, is_world_process_zero=False)
    monitor.on_train_begin(SimpleNamespace(), state, TrainerControl(), model=small())
    assert monitor.rows and not (tmp_path / "x" / "routing_log.jsonl").exists() and not state.log_history


def test_modes_return_even_after_an_error():
    model = small()
    model.model.norm.eval()
    before, rng = {n: m.training for n, m in model.named_modules()}, torch.get_rng_state()
    with pytest.raises(ZeroDivisionError):
        with undisturbed([model]):
            assert not any(m.training for m in model.modules()) and not torch.is_grad_enabled()
            torch.rand(3)
            1 / 0
    assert (
        {n: m.training for n, m in model.named_modules()} == before
        and torch.equal(rng, torch.get_rng_state())
        and torch.is_grad_enabled()
    )
    with route(model, make_rule("topk", k=2)) as patch:
        with pytest.raises(IndexError):
            measure(model, patch, [torch.randint(1, 60, (2, 5)), torch.full((2, 5), 999)])
        assert patch.observe is None and patch.forwards == 0 and open_patch(model) is patch
    with pytest.raises(RuntimeError, match="not open"):
        measure(model, patch, held_out())


@pytest.mark.parametrize("E,dtype", [(8, np.uint8), (255, np.uint8), (256, np.uint16), (300, np.uint16)])
def test_sets_are_small_and_exact(E, dtype):
    experts = torch.stack([torch.randperm(E + 1)[:4] for _ in range(50)])
    block = [
        Routing(torch.zeros(50, E), experts, torch.zeros(50, 4)),
        Routing(torch.zeros(50, E), experts[:, :2], torch.zeros(50, 2)),
    ]
    packed = _packed(block)
    assert packed.dtype == dtype and packed.shape == (2, 50, 4)
    assert all(torch.equal(a.mask, b.mask) for a, b in zip(block, _unpacked(packed, block)))


def test_wandb(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("moe_routing.training.monitor.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install wandb"):
        RoutingMonitor(None, held_out(), wandb=True)
    RoutingMonitor(None, held_out())  # nothing asked, nothing missing
    config, curves, started = {}, [], []
    fake = SimpleNamespace(
        run=None,
        init=lambda **k: started.append(k),
        config=SimpleNamespace(update=lambda new, **k: config.update(new)),
        log=curves.append,
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr("moe_routing.training.monitor.find_spec", lambda name: object())
    model = small()
    routers = routers_for("switch_top2", model)
    with route(model, routers) as patch:
        trainer = trainer_of(model, tmp_path, max_steps=2)
        RoutingMonitor(patch, held_out(), shares=(0, 1), parameters={"corpus": "embedded", "k": 2}, wandb=True).attach(
            trainer
        )
        trainer.train()
    assert (
        len(started) == 1
        and config["learning_rate"] == 1e-2
        and config["corpus"] == "embedded"
        and config["routing_steps"] == [0, 2]
        and any(k.startswith("router") for k in config)
    )
    assert (
        len(curves) == 2
        and {"routing_layers/load_cv/0", "routing_layers/load_cv/1", "routing_layers/load_cv_random/1"}
        <= set(curves[0])
        and curves[1]["routing_step"] == 2
    )
    assert all(v is not None for c in curves for v in c.values())


def rows_of(layers, steps=(1, 5, 10), chance=lambda layer: 0.1):
    return [
        {
            "step": s,
            "share": s / 10,
            "layer": l,
            "tokens": 9,
            "load_cv": 0.5 + l / s,
            "load_cv_random": chance(l),
            "load_cv_noise": 0.1,
            "drop_rate": None if s < 5 else 0.1,
            "demand_cv": None,
            "demand_cv_random": None,
            "own": 1,
        }
        for s in steps
        for l in range(layers)
    ]


def test_trends():
    import matplotlib.pyplot as plt

    plt.close("all")  # whatever another test left
    rows = rows_of(3)
    assert logged_metrics(rows) == ["load_cv", "drop_rate", "own"]
    figures = trend_figures(rows)
    assert list(figures) == ["load_cv", "drop_rate", "own"] and all(f.dpi <= 80 for f in figures.values())
    lines = figures["load_cv"].axes[0].lines
    assert (
        [l.get_linestyle() for l in lines].count("--") == 1
        and len(lines) == 4
        and len({l.get_color() for l in lines}) == 4
    )
    first = next(l for l in lines if l.get_label() == "layer 0")
    assert list(first.get_xdata()) == [0.1, 0.5, 1] and list(first.get_ydata()) == [0.5, 0.5, 0.5]
    assert len(figures["drop_rate"].axes[0].lines) == 3 and np.isnan(
        figures["drop_rate"].axes[0].lines[0].get_ydata()[0]
    )  # no baseline, a gap where nothing is known
    each = trend_figures(rows_of(3, chance=lambda l: 0.1 * l), ["load_cv"], x="step")["load_cv"].axes[0].lines
    assert len(each) == 6 and list(each[0].get_xdata()) == [1, 5, 10]
    many = trend_figures(rows_of(40), ["load_cv"])["load_cv"].axes[0]
    assert len(many.lines) == 41 and len(many.get_legend().get_texts()) <= 9
    grid = trend_grid(rows, columns=2)
    assert [ax.get_title(loc="left") for ax in grid.axes if ax.axison] == ["load cv", "drop rate [share]", "own"]
    assert trend_figures(rows_of(1, (5,)))["load_cv"].axes[0].lines
    assert not plt.get_fignums()  # none is left open


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda: RoutingMonitor(None, []), "no held-out batch"),
        (lambda: RoutingMonitor(None, [1], every=0), "every = 0"),
        (lambda: RoutingMonitor(None, [1], shares=(50,)), "share of training = 50"),
        (lambda: trend_figures([]), "empty"),
        (lambda: trend_figures(rows_of(2), ["load"]), "load_cv"),
        (lambda: trend_figures(rows_of(2), x="epoch"), "unknown axis 'epoch'"),
        (lambda: measure(small(), None, []), "nothing to measure"),
        (lambda: measure(small(), None, held_out(), [np.zeros((2, 384, 2), np.uint8)]), "fewer batches"),
        (lambda: measure(small(), None, held_out(), [np.zeros((2, 7, 2), np.uint8)] * 2), "does not match"),
    ],
)
def test_bad_input_gets_one_clear_error(call, message):
    with pytest.raises(ValueError, match=message):
        call()
