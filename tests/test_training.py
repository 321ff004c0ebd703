"Training: resuming, two processes, faults, tokenizers, precision."

import json
import math
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from moe_routing.routers.zoo import ROUTERS
from moe_routing.runs.run import run_template
from moe_routing.training.loop import (
    Recipe,
    active_share,
    build_model,
    get_tokenizer,
    load_trained,
    main,
    nominal_k,
    prepare,
    train,
    training_text,
    unmount,
)

SMALL = Recipe(hidden=32, heads=2, layers=2, intermediate=16, num_experts=4, length=32, batch=4, steps=6, lr=5e-3)


def few(name: str) -> dict:
    return (
        {"router_dim": 2} if name.startswith("spectra") else {}
    )  # SPECTRA's own arithmetic must leave something for its experts


TRAINED = [name for name, row in ROUTERS.items() if row.group in ("trainable", "control", "as shipped")]


@pytest.fixture(scope="module")
def text():
    return training_text("embedded", "char", length=32, windows=16, characters=60_000)


pytestmark = pytest.mark.usefixtures("one_thread")


def run(recipe, text, folder=None, **options):
    done = train(recipe, text, folder, **{"eval_every": 3, "save_every": 3, "progress": False, "cpu": True} | options)
    done.close()
    return done


def weights(done):
    return done.model.state_dict() | {
        f"router {i} {k}": v for i, r in enumerate(done.routers) for k, v in r.state_dict().items()
    }


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("factor", [None, 1.0])
def test_every_router_trains_and_resumes_to_the_same_bits(name, factor, text, tmp_path):
    recipe = replace(SMALL, router=name, router_params=few(name), capacity_factor=factor)
    whole = run(recipe, text)
    run(recipe, text, tmp_path, stop=4)
    assert [r["step"] for r in map(json.loads, open(tmp_path / "train_log.jsonl"))] == [3]
    parts = run(recipe, text, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(weights(whole).values(), weights(parts).values()))
    assert whole.log[-1]["val_loss"] == parts.log[-1]["val_loss"] < math.log(len(text.tokenizer))
    lines = [json.loads(line) for line in open(tmp_path / "train_log.jsonl")]
    assert [r["step"] for r in lines] == [3, 6] and all(
        math.isfinite(v) for r in lines for v in r.values() if isinstance(v, float)
    )
    if factor and name != "dense":
        assert lines[-1]["served_cv"] <= lines[-1]["load_cv"] + 1e-9


@pytest.mark.parametrize("name", TRAINED)
def test_matched_compute(name):
    recipe = Recipe(router=name, router_params=few(name), capacity_factor=1.25, layers=1)
    assert abs(active_share(recipe) - 1) < 0.02
    wide = active_share(replace(recipe, match="width"))
    more = name.startswith("spectra") and name not in (
        "spectra_no_gru",
        "spectra_all_removed",
    )  # the state costs most, even at two numbers an expert
    assert (wide > 1.02) == (more or nominal_k(recipe) > 2.05) and (wide < 0.98) == (nominal_k(recipe) < 1.95)


def test_same_text_and_start_for_all_routers(text):
    a, b = (build_model(replace(SMALL, router=r), 50)[0] for r in ("softk", "quantile"))
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))
    c = build_model(replace(SMALL, seed=1), 50)[0]
    assert not torch.equal(a.lm_head.weight, c.lm_head.weight)
    one, two = (
        prepare(replace(SMALL, router="switch"), text, cpu=True),
        prepare(replace(SMALL, router="dense"), text, cpu=True),
    )
    assert torch.equal(one.batches, two.batches) and len(one.batches) == SMALL.steps
    for steps in (one, two):
        steps.patch.__exit__(None, None, None)


def test_two_processes_are_one(text, tmp_path):
    """Loss and balancing state of two gloo processes are those of one with the whole batch.

    Both processes train all routers, one after the other."""
    names = ["loss_free", "quantile", "topk_aux", "expert_threshold"]
    arguments = [
        "hidden=32",
        "heads=2",
        "layers=2",
        "intermediate=16",
        "num_experts=4",
        "length=32",
        "batch=4",
        "steps=6",
        "lr=5e-3",
        "windows=16",
        "characters=60000",
        "eval_every=3",
        "save_every=3",
        "progress=False",
        "cpu=True",
    ]
    (tmp_path / "both.py").write_text(f"""import runpy, sys
for name in {names}:
    sys.argv = ["training", f"router={{name}}", f"out={tmp_path}/two/{{name}}", *{arguments}]
    try: runpy.run_module("moe_routing.training.loop", run_name="__main__", alter_sys=True)
    except SystemExit as e: assert not e.code, e.code
""")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    # a port of the system's own choice: any fixed one may be taken by a notebook kernel of another worker
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        str(tmp_path / "both.py"),
    ]
    done = subprocess.run(launch, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for name in names:
        alone = run(replace(SMALL, router=name), text, tmp_path / "one" / name)
        log = [json.loads(line) for line in open(tmp_path / "two" / name / "train_log.jsonl")]
        assert [r["world_size"] for r in log] == [2, 2] and [r["world_size"] for r in alone.log] == [1, 1], name
        for a, b in zip(log, alone.log):
            assert (
                abs(a["val_loss"] - b["val_loss"]) < 2e-3
                and abs(a["train_loss"] - b["train_loss"]) < 2e-3
                and abs(a["load_cv"] - b["load_cv"]) < 0.02
            ), name
        one, two = (load_file(tmp_path / n / name / "best" / "routers.safetensors") for n in ("one", "two"))
        state = [k for k in one if not k.endswith("weight")]
        assert all(torch.allclose(one[k].float(), two[k].float(), atol=2e-3) for k in state) and (
            name == "topk_aux" or state
        ), name


def test_nan_stops_with_the_last_good_checkpoint(text, tmp_path):
    run(SMALL, text, tmp_path, stop=3)
    steps = []
    import moe_routing.training.loop as t

    forward = t._step

    def broken(self, step, rows):
        steps.append(step)
        if step == 4:
            raise FloatingPointError("the loss is nan")
        return forward(self, step, rows)

    t._step = broken
    try:
        with pytest.raises(FloatingPointError, match="step 4.*nan.*checkpoint is .*last, after step 3.*lower lr"):
            run(SMALL, text, tmp_path)
    finally:
        t._step = forward
    assert steps == [3, 4] and run(SMALL, text, tmp_path).log[-1]["step"] == 6


def test_a_loss_that_is_really_nan(text):
    with pytest.raises(FloatingPointError, match="stopped at step"):
        run(replace(SMALL, lr=1e35, steps=6, warmup=0.01), text)


@pytest.mark.parametrize("allowed", [True, False])
def test_out_of_memory(text, allowed):
    "Fails above two sequences; halving leaves the same optimizer steps."
    from transformers import OlmoeForCausalLM

    forward, sizes = OlmoeForCausalLM.forward, []

    def small(self, input_ids=None, **kwargs):
        sizes.append(len(input_ids))
        if len(input_ids) > 2 and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(self, input_ids=input_ids, **kwargs)

    recipe = replace(SMALL, router="softk", steps=3)
    try:
        OlmoeForCausalLM.forward = small
        if allowed:
            halved = run(recipe, text, on_oom="halve")
        else:
            with pytest.raises(
                RuntimeError, match="out of memory at step 0 with micro-batches of 4 x 32 tokens: lower batch"
            ):
                run(recipe, text)
            return
    finally:
        OlmoeForCausalLM.forward = forward
    assert abs(halved.log[-1]["val_loss"] - run(recipe, text).log[-1]["val_loss"]) < 1e-3


@pytest.mark.parametrize("name, size", [("char", None), ("byte", 257), ("bpe:300", 300)])
def test_tokenizers(name, size):
    words = training_text("embedded", name, length=32, windows=8, characters=40_000)
    sample = "one two\nthree"
    assert words.tokenizer.decode(words.tokenizer(sample)["input_ids"]) == sample and (
        size is None or len(words.tokenizer) == size
    )
    assert words.windows.max() < len(words.tokenizer) and 0.5 < words.characters_per_token < 8


def test_bad_text(tmp_path):
    (tmp_path / "a.txt").write_text("short")
    for call, message in (
        (lambda: training_text(str(tmp_path / "a.txt"), length=32), "fewer than one window"),
        (lambda: training_text("embeded"), "did you mean 'embedded'"),
        (lambda: get_tokenizer("bpe:100", ["a"]), "vocab_size = 100"),
        (lambda: get_tokenizer("no/such", ["a"]), "cannot load"),
        (lambda: training_text("embedded", length=1), "length = 1"),
        (lambda: training_text("embedded", length=32, windows=0), "windows = 0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize(
    "name, folder",
    [("tinystories", "TinyStories"), ("tinystories", "tinystories"), ("tiny_shakespeare", "tiny_shakespeare")],
)
def test_local_copies_of_the_standard_corpora(name, folder, tmp_path, monkeypatch):
    "Rows in the hub's columns below data_dir; the last tenth is held out and never trained on."
    (tmp_path / folder).mkdir()
    stories = [f"Story {i}: " + chr(97 + i % 26) * 40 + "\n" for i in range(100)]
    (tmp_path / folder / "train.jsonl").write_text("".join(json.dumps({"text": s}) + "\n" for s in stories))
    monkeypatch.setenv("MOE_ROUTING_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("MOE_ROUTING_HUB", "no")
    text = training_text(name, "char", length=16, windows=4)
    trained = "".join(text.tokenizer.decode(d) for d in text.train)
    assert "Story 85" in trained and "Story 95" not in trained and text.windows.shape == (4, 16)
    with pytest.raises(FileNotFoundError, match="hub = no"):
        training_text("owner/corpus", length=16)


def test_own_text_file(tmp_path):
    (tmp_path / "a.txt").write_text("the quick brown fox jumps over the lazy dog. " * 200)
    text = training_text(str(tmp_path / "a.txt"), length=32, windows=4)
    assert run(SMALL, text).log[-1]["val_loss"] < 3.5
    joined = text.tokenizer.decode(text.train[0])
    assert joined.startswith("the quick") and len(joined) < 0.92 * 9000


def test_wrong_checkpoints(text, tmp_path):
    run(SMALL, text, tmp_path)
    other = training_text("embedded", "char", length=32, windows=8, characters=60_000)
    with pytest.raises(ValueError, match="another text"):
        run(SMALL, other, tmp_path)
    with pytest.raises(ValueError, match="steps = 6 there, 9 asked for"):
        run(replace(SMALL, steps=9), text, tmp_path)
    with pytest.raises(ValueError, match="length = 16"):
        run(replace(SMALL, length=16), text)
    with pytest.raises(ValueError, match="cannot be cut into accumulate = 3"):
        run(replace(SMALL, accumulate=3), text)
    with pytest.raises(FileNotFoundError, match="training.json"):
        load_trained(tmp_path)
    get_tokenizer("byte", []).save_pretrained(tmp_path / "best")
    with pytest.raises(ValueError, match="do not belong together"):
        load_trained(tmp_path / "best")


def test_precision_and_trackers(text, tmp_path):
    low = run(replace(SMALL, mixed_precision="bf16"), text)
    assert abs(low.log[-1]["val_loss"] - run(SMALL, text).log[-1]["val_loss"]) < 0.05 and all(
        p.dtype == torch.float32 for p in low.model.parameters()
    )
    with pytest.raises(ValueError, match="unknown tracker"):
        run(SMALL, text, tmp_path, trackers=("excel",))
    with pytest.raises(ValueError, match="need a folder"):
        run(SMALL, text, trackers=("tensorboard",))


def test_experts_backends_agree(text):
    losses = [
        run(replace(SMALL, experts=e, capacity_factor=1.0), text).log[-1]["val_loss"]
        for e in ("ragged", "eager", "grouped_mm")
    ]
    assert max(losses) - min(losses) < 1e-3


def test_log_is_an_average(text):
    "Statistics of the log are sums over all decisions of the interval, and speed excludes evaluation."
    recipe, seen = replace(SMALL, router="softk", capacity_factor=1.0), []
    steps = prepare(recipe, text, cpu=True)
    inner = steps.patch.observe
    steps.patch.observe = lambda c, r, h: (
        seen.append((r.extras["demand"].sum().item(), r.load.sum().item())),
        inner(c, r, h),
    )
    for i in range(3):
        steps(i)
    stats = steps.meter.take()
    steps.patch.__exit__(None, None, None)
    unmount(steps.bare)
    demanded, served = map(sum, zip(*seen))
    assert (
        stats["drop_rate"] == pytest.approx(1 - served / demanded)
        and stats["demand"].sum() == demanded
        and stats["tokens"] == 3 * 4 * 32
    )


def test_command_line(tmp_path, capsys):
    assert main(["rooter=softk"]) == 1 and "did you mean 'router'" in capsys.readouterr().err
    assert main(["router=soft"]) == 1 and "softk" in capsys.readouterr().err
    assert main(["router=softk", "capacity_factor=0"]) == 1 and "capacity_factor = 0" in capsys.readouterr().err


OWN = """
import torch
from torch import nn
from moe_routing.core import Router
from moe_routing.routers.topk import TopK
from moe_routing.routers.zoo import Row

class Scaled(Router):
    def __init__(self, *args, **more):
        super().__init__(*args, **more)
        self.scale = nn.Parameter(torch.ones(()))
    def score(self, hidden, context, state):
        return self.scale * nn.functional.linear(hidden, self.weight.float()), state

SCALED = Row("scaled", TopK, "logits times a learned scale", "token", defaults={"weigh": "renorm"}, example={"k": 2},
             router=Scaled, losses={"aux": .01})
"""


def test_ones_own_router_in_a_template(tmp_path, monkeypatch):
    """A row in a file of one's own runs through papermill.

    Leaves its record, and its extra parameter is trained and saved."""
    (tmp_path / "own_router.py").write_text(OWN)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, sys.path)]))
    record = run_template(
        "train_router",
        {
            "router": "own_router:SCALED",
            "keep_model": True,
            "windows": 32,
            "steps": 4,
            "eval_every": 2,
            "capacity_factor": 1.0,
        },
        tmp_path / "run",
    )
    assert (
        record["status"] == "finished"
        and record["metrics"]["val_loss"] < 6
        and record["metrics"]["active_share"] == pytest.approx(1)
    )
    assert record["metrics"]["drop_law_error_points"] is not None and (tmp_path / "run" / "loads.json").is_file()
    state = load_file(tmp_path / "run" / "best" / "routers.safetensors")
    assert state["0.scale"] != 1
    monkeypatch.syspath_prepend(str(tmp_path))
    assert load_trained(tmp_path / "run" / "best")[2][0].scale == state["0.scale"]


def test_unknown_router_in_a_template(tmp_path):
    with pytest.raises(RuntimeError, match="did you mean"):
        run_template("train_router", {"router": "softkk"}, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"
