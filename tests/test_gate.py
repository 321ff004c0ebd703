"""The gate of day 0: curves from any log are one table, and what is missing is never a pass.

The verdict does what the published counts and chance say it should."""

import base64
import json
import math
import struct
import sys
import zlib
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, OlmoeConfig, OlmoeForCausalLM

from moe_routing.capacity import limit as refuse
from moe_routing.core import Routing, Rule, one_past_last, order_slots
from moe_routing.studies.go_no_go import (
    GATE_TEXTS,
    PUBLISHED_LOADS,
    Check,
    Gate,
    Measurement,
    check_limits,
    check_metrics,
    check_report,
    decide,
    excess_gate,
    gate_texts,
    load_excess,
    measure_model,
    require_go,
    seed_gate,
    seed_load,
    worst_layer,
    write_check,
)
from moe_routing.training.logs import (
    LIMITS,
    Curves,
    auxiliary,
    bias_start,
    curve_table,
    draw_curves,
    quantity_of,
    read_curves,
)
from moe_routing.metrics.load import counts_of, cv, max_violation, noise_floor, random_loads
from moe_routing.models.load import load_model, make_tokenizer
from moe_routing.patching.patch import route
from moe_routing.settings import load_settings

pytestmark = pytest.mark.usefixtures("one_thread")
# a whole .wandb file as wandb 0.31 wrote it offline: three steps, all facts about the machine switched off
REAL = (
    "c-q~SO=uHA7=}BEN#i6<)2S_Xz0}lNZE-WRv$L61yx6076tN=fX0xd&Nwy|wOzRJrV-KZx^dM+&UJ7FCK~QS_2fc~nO+3__sNgSx6I*CkOx=T^xQ"
    "Bt++4q}y-tQfD_o40kUfyiF6t6u!&;&x@b_BvuuELL3IJ2*SJy3@UEK?%m0m3reN?DAPG_jbKu{4{KjK)(cPo>j@TDGO6(~5<HSWaRYUsi6-RYgr"
    "-4MgJ+K4NDkFlFPml5=e`2@bAKq`+v=N!jsM*aCybNwbhn)qwBRnMn{1EzQ@S2V<YE&+NYd;*zf$#Di2OL{9bxmrpnn$z=;;)m>Gt8Jha-)pU`H?"
    "ftIZhCC=2-|*9#P;PK5d!;}(c<uj<c;<aqc0h;&QXlL<D-5W)I94cU^L7mY45Kh)teGF4f4g{3D1y=gfH4HiMKfDS<eXATtTNbz+VYN_Fe}4`T^+"
    "THWy7k}fFH{oZb9w!rJOl#7fS|7<jra&>xe}nYcPsJ=2+EOse|EW)V5rCIOn9yoKY&<qrzK);Wh+~`e90CGcR6s2sWK5m~fqO%s5r;0jvxCnp20x"
    "_Dms~%83fYD6moukP}z;&OH(^&FC)hDEW7pkuL<!4L#XW?`Oz!Kg-w7zIZ4U8>Kq{A~%~~k=LP98`IU%J<=%{_PXghSLrk{h><sHDP=mPuKp+yHo"
    "Np#@Idqc{MpKX#~smC-_d82gIq9$-B-L%YK{R9m;B4%jfHwBBA!FB>3;24UD4uMF@5A>@}p2hrFQ^sbsL35*xgSO?);^1?O0ZR`c#Ac4SYmcX4L("
    "7wUw?PI)&&OqYa`#6`g5VTN@2JHQPD#RnWJh55S}3KQc)~)IZxZ^|?nl5c~1_EUCre2`8UE;bcm#%$^5L-vJKR7<~"
)
ROWS = [
    {
        "step": s,
        "train_loss": 2 + 5 / s,
        "val_loss": 2.1 + 5 / s,
        "load_cv": 0.1 + 1 / s,
        "max_violation": 0.2 + 2 / s,
        "aux_loss": 0.0,
        "lr": 0.1,
    }
    for s in range(10, 310, 10)
]


def varint(n: int) -> bytes:
    out = b""
    while n > 127:
        out, n = out + bytes([n & 127 | 128]), n >> 7
    return out + bytes([n])


def message(number: int, body: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(body)) + body


def wandb_file(rows: list[dict]) -> bytes:
    "A .wandb file: history records among others, pieces that cross blocks of 32 KiB."
    out = b":W&B" + struct.pack("<HB", 0xBEE1, 0)
    for i, row in enumerate(rows):
        items = b"".join(
            message(
                1, b"".join(message(2, part.encode()) for part in name.split(".")) + message(16, json.dumps(x).encode())
            )
            for name, x in row.items()
        )
        for record in (
            message(2, items + message(2, varint(8) + varint(i))),
            varint(8) + varint(i) + message(3, b"\x0a\x00"),
        ):
            first = True
            while first or record:
                left = 32768 - len(out) % 32768
                if left < 7:
                    out += bytes(left)
                    continue
                body, record = record[: left - 7], record[left - 7 :]
                kind = (1 if not record else 2) if first else (4 if not record else 3)
                out, first = (
                    out + struct.pack("<IHB", zlib.crc32(body, zlib.crc32(bytes([kind]))), len(body), kind) + body,
                    False,
                )
    return out


def as_wandb(rows):
    return [
        {
            "_step": i,
            "train/global_step": r["step"],
            **{k: v for k, v in r.items() if k != "step"},
            "_timestamp": 1.0 + i,
        }
        for i, r in enumerate(rows)
    ]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))


def write_board(folder, rows):
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as board:
        for r in rows:
            for name, x in r.items():
                if name != "step":
                    board.add_scalar(name, x, r["step"])


def by_hand(rows):
    return Curves(*curve_table(rows)[:1], "by hand", "rows")


# names ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, expected",
    [
        ("moe/avg_maxvio", ("maxvio", -1)),
        ("MaxVio_global", ("maxvio", -1)),
        ("max_violation", ("maxvio", -1)),
        ("routing_layers/max_violation/0", ("maxvio", 0)),
        ("train/routing/load_cv", ("cv", -1)),
        ("moe/model.layers.11.mlp/expert_cv", ("cv", 11)),
        ("layer_2/cv", ("cv", 2)),
        ("blocks.3.load_cv", ("cv", 3)),
        ("loss", ("loss", -1)),
        ("train/lm_loss", ("loss", -1)),
        ("loss/train", ("loss", -1)),
        ("validation_loss", ("val_loss", -1)),
        ("eval/wikitext_loss", ("val_loss", -1)),
        ("train/balance_loss", ("aux", -1)),
        ("load_balancing_loss", ("aux", -1)),
        ("router_z_loss", ("aux", -1)),
        ("train/aux", ("aux", -1)),
        ("repulsion_penalty", ("aux", -1)),
        ("moe/e_score_correction_bias_abs_max", ("bias", -1)),
        ("layers.4.router/bias", ("bias", 4)),
        ("balancing_bias", ("bias", -1)),
        ("bias_update_rate", ("", -1)),
        ("z_loss_weight", ("", -1)),
        ("max_violation_noise", ("", -1)),
        ("served_cv", (None, -1)),
        ("recv", (None, -1)),
        ("ppl", (None, -1)),
        ("debiased_lr", (None, -1)),
        ("grad_norm", (None, -1)),
        ("tokens/3", (None, 3)),
    ],
)
def test_names(name, expected):
    assert quantity_of(name) == expected


def test_table_odd_values():
    table, unused = curve_table(
        [
            {
                "step": 1,
                "loss": True,
                "note": "x",
                "none": None,
                "cv": float("nan"),
                "aux_loss": "Infinity",
                "hist": {"a": 1},
                "odd": 3,
            },
            {"step": 1, "cv": 0.5},
        ]
    )
    assert table[["name", "value"]].values.tolist() == [["aux_loss", math.inf], ["cv", 0.5]] and unused == ("odd",)
    curves = by_hand(
        [
            {"step": 1, "moe/layers_0/cv": 0.2, "moe/layers_1/cv": 0.4},
            {"step": 2, "moe/layers_0/cv": 0.2, "moe/layers_1/cv": float("nan")},
        ]
    )
    assert (
        curves.curve("cv", "moe/layers_1/cv")[0].tolist() == [1, 2]
        and curves.last("loss") is None
        and curves.names("cv") == ["moe/layers_0/cv", "moe/layers_1/cv"]
    )


# sources --------------------------------------------------------------------------------------------------------------


def test_every_source_gives_the_same_table(tmp_path, monkeypatch):
    from pandas.testing import assert_frame_equal

    for name in ("book", "board", "offline/wandb/offline-run-1"):
        (tmp_path / name).mkdir(parents=True)
    write_lines(tmp_path / "book" / "train_log.jsonl", ROWS)
    write_board(tmp_path / "board", ROWS)
    (tmp_path / "offline/wandb/offline-run-1/run-1.wandb").write_bytes(wandb_file(as_wandb(ROWS)))
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "trainer_state.json").write_text(json.dumps({"log_history": ROWS}))
    monkeypatch.setitem(
        sys.modules,
        "wandb",
        SimpleNamespace(
            Api=lambda: SimpleNamespace(run=lambda path: SimpleNamespace(scan_history=lambda: iter(as_wandb(ROWS))))
        ),
    )
    found = {
        name: read_curves(name if "/" in name and "wandb:" in name else tmp_path / name)
        for name in ("book", "board", "offline", "state")
    } | {"api": read_curves("wandb:me/project/abc"), "short": read_curves("me/project/abc")}
    assert {n: c.kind for n, c in found.items()} == {
        "book": "run log",
        "board": "TensorBoard",
        "offline": "W&B offline run",
        "state": "run log",
        "api": "W&B run",
        "short": "W&B run",
    }
    for name, curves in found.items():
        assert_frame_equal(curves.table, found["book"].table, rtol=1e-6 if name == "board" else 1e-12)
        assert curves.unused == ("lr",)
    assert read_curves(tmp_path / "offline/wandb/offline-run-1/run-1.wandb").last("cv") == ROWS[-1]["load_cv"]


def test_wandb_file_as_wandb_wrote_it(tmp_path):
    data = zlib.decompress(base64.b85decode(REAL))
    path = tmp_path / "run-lv8hv85e.wandb"
    path.write_bytes(data)
    curves = read_curves(path)
    assert (
        curves.curve("loss")[0].tolist() == [10, 20, 30]
        and curves.curve("loss")[1].tolist() == [5, 2.5, 5 / 3]
        and curves.layers("maxvio").keys() == {1}
    )
    assert curves.last("cv") == pytest.approx(0.8 / 3) and auxiliary(curves) == {"aux_loss": 0}
    path.write_bytes(data[:-400])  # killed: what is whole counts
    assert 1 <= len(read_curves(path).curve("loss")[0]) <= 3
    path.write_bytes(data[:100] + bytes([data[100] ^ 255]) + data[101:])
    with pytest.raises(ValueError, match="damaged at byte"):
        read_curves(path)
    path.write_bytes(b"something else")
    with pytest.raises(ValueError, match="not a W&B file"):
        read_curves(path)


def test_wandb_records_across_blocks(tmp_path):
    rows = [
        {"_step": i, "train/loss": 1.0 / (i + 1), "filler": "x" * (i % 9000), "deep.cv": "NaN"} for i in range(60)
    ] + [{"_step": 60, "filler": "y" * 90000, "train/loss": 7}]
    path = tmp_path / "run-1.wandb"
    path.write_bytes(wandb_file(rows))
    assert path.stat().st_size > 3 * 32768
    curves = read_curves(path)
    assert curves.curve("loss")[1].tolist() == [r["train/loss"] for r in rows] and math.isnan(curves.last("cv"))


def test_older_wandb_files(tmp_path):
    (tmp_path / "run-1" / "files").mkdir(parents=True)
    (tmp_path / "run-1" / "files" / "wandb-summary.json").write_text(
        json.dumps({"_step": 7, "train/loss": 3.0, "moe/avg_expert_cv": 0.2})
    )
    assert [x.tolist() for x in read_curves(tmp_path / "run-1").curve("cv")] == [[7], [0.2]]
    write_lines(tmp_path / "run-1" / "files" / "wandb-history.jsonl", as_wandb(ROWS))
    assert len(read_curves(tmp_path / "run-1").curve("cv")[0]) == len(ROWS)


@pytest.mark.parametrize(
    "said, error, words",
    [
        ("No API key configured. Use `wandb login` to log in.", PermissionError, "WANDB_API_KEY"),
        ("api_key not configured (no-tty)", PermissionError, "wandb login"),
        ("Could not find run <Run me/p/x (not found)>", FileNotFoundError, "entity/project/run_id"),
        ("connection refused", ConnectionError, "connect to the network"),
    ],
)
def test_wandb_server_errors(said, error, words, monkeypatch):
    def run(path):
        raise RuntimeError(said)

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(Api=lambda: SimpleNamespace(run=run)))
    with pytest.raises(error, match=words) as e:
        read_curves("wandb:me/p/x")
    assert "me/p/x" in str(e.value) and "offline" in str(e.value)


def test_no_wandb_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match="pip install wandb, or give the run's offline folder"):
        read_curves("wandb:me/p/x")


def test_tensorboard_tensors_runs_and_nothing(tmp_path):
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter
    from tensorboard.util.tensor_util import make_tensor_proto

    writer = EventFileWriter(str(tmp_path / "tensors"))
    for step in (1, 2):
        writer.add_event(
            Event(
                step=step,
                summary=Summary(value=[Summary.Value(tag="train/loss", tensor=make_tensor_proto(np.float32(step)))]),
            )
        )
    writer.close()
    assert read_curves(tmp_path / "tensors").curve("loss")[1].tolist() == [1, 2]
    write_board(tmp_path / "two" / "a", ROWS)
    write_board(tmp_path / "two" / "hparams", [{"step": 0, "hp_metric": 1.0}])
    assert read_curves(tmp_path / "two").last("cv") == pytest.approx(ROWS[-1]["load_cv"])
    write_board(tmp_path / "two" / "b", ROWS)
    with pytest.raises(ValueError, match="events of 2 runs .a, b.*give the folder of one"):
        read_curves(tmp_path / "two")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "events.out.tfevents.1.x").write_bytes(b"")
    with pytest.raises(ValueError, match="is empty: not one number"):
        read_curves(tmp_path / "empty")


def test_own_logs(tmp_path):
    write_lines(tmp_path / "train_log.jsonl", ROWS)
    write_lines(
        tmp_path / "routing_log.jsonl",
        [
            {"step": 300, "layer": l, "load_cv": 0.3 + l, "load_cv_random": 0.01, "max_violation": None, "share": 1.0}
            for l in (0, 1)
        ],
    )
    (tmp_path / "loads.json").write_text(
        json.dumps({"demand": [[10, 6, 4, 0], [5, 5, 5, 5]], "served": [[5, 5, 4, 0]] * 2})
    )
    with open(tmp_path / "train_log.jsonl", "a") as f:
        f.write('{"step": 310, "load_c')  # a kill
    curves = read_curves(tmp_path)
    assert (
        curves.names("cv") == ["load_cv", "held_out/load_cv"]
        and curves.last("cv") == ROWS[-1]["load_cv"]
        and {l: v[1][-1] for l, v in curves.layers("cv").items()} == {0: 0.3, 1: 1.3}
    )
    assert (
        curves.curve("maxvio", "held_out/max_violation")[1].tolist() == [0.5] and "share" in curves.unused
    )  # (10 / 5 - 1 + 0) / 2
    (tmp_path / "train_log.jsonl").write_text("no json\n")
    with pytest.raises(ValueError, match="train_log.jsonl is damaged"):
        read_curves(tmp_path)
    write_lines(tmp_path / "other.jsonl", [{"a": 1}])
    with pytest.raises(ValueError, match="no 'step'"):
        read_curves(tmp_path / "other.jsonl")


def test_what_is_not_a_log(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist: give a W&B run"):
        read_curves(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="holds no log"):
        read_curves(tmp_path)
    write_lines(tmp_path / "train_log.jsonl", [{"step": 1, "lr": 0.1, "speed": 3}])
    with pytest.raises(ValueError, match="holds no CV, MaxVio.*lr, speed"):
        read_curves(tmp_path)
    (tmp_path / "train_log.jsonl").write_text("")
    with pytest.raises(ValueError, match="is empty"):
        read_curves(tmp_path)
    for n in "ab":
        (tmp_path / "runs" / f"offline-run-{n}").mkdir(parents=True)
        (tmp_path / "runs" / f"offline-run-{n}" / f"run-{n}.wandb").write_bytes(wandb_file(as_wandb(ROWS)))
    with pytest.raises(ValueError, match="there are 2 W&B runs"):
        read_curves(tmp_path / "runs")
    (tmp_path / "runs" / "latest-run").symlink_to(tmp_path / "runs" / "offline-run-a")
    assert read_curves(tmp_path / "runs" / "latest-run").last("cv") == ROWS[-1]["load_cv"]


# what the curves are asked --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "terms, said",
    [
        ({"aux_loss": 0.0}, True),
        ({"aux_loss": 0.0, "z_loss": 1e-9}, False),
        ({}, False),
        ({"aux_loss": float("nan")}, False),
        ({"aux_loss": 0.0, "odd_penalty": -1.0}, False),
    ],
)
def test_no_auxiliary_loss(terms, said):
    texts = [
        t.get_text()
        for name in ("loss_curve", "training_dynamics")
        for ax in draw_curves(by_hand([{"step": s, "loss": 1.0, "cv": 0.1, **terms} for s in (1, 2)]))[name].axes
        for t in ax.texts
    ]
    assert texts.count("no auxiliary loss") == 2 * said


def test_start_of_a_bias():
    rows = [{"step": s, "cv": 0.8 if s < 200 else 0.5} for s in range(0, 400, 20)]
    assert bias_start(by_hand(rows))[0] == 200 and bias_start(by_hand(rows))[1].startswith("inferred")
    assert (
        bias_start(by_hand(rows), points=11)[0] is None and bias_start(by_hand(rows), drop=0.31)[0] is None
    )  # not long enough, not deep enough
    short = [r | {"cv": 0.5 if 200 <= r["step"] < 300 else 0.8} for r in rows]
    assert bias_start(by_hand(short))[0] is None
    assert bias_start(by_hand([r | {"router_bias": -0.1 * (r["step"] >= 60)} for r in rows])) == (60, "recorded")
    assert bias_start(by_hand([r | {"router_bias": 0.1} for r in rows])) == (
        0,
        "recorded, not 0 from its first point on",
    )
    assert bias_start(by_hand([r | {"router_bias": 0} for r in rows])) == (None, "the recorded bias stays 0")


def test_figures_without_a_log_and_in_grey():
    assert all(
        "not in the log" in t.get_text()
        for fig in draw_curves(None).values()
        for ax in fig.axes
        for t in ax.texts
        if "limit" not in t.get_text()
    )
    ax = draw_curves(by_hand(ROWS))["loss_curve"].axes[0]
    assert len({(line.get_linestyle(), line.get_marker()) for line in ax.lines}) == len(ax.lines) == 2


# gates ----------------------------------------------------------------------------------------------------------------


def mixtral():
    return np.array(list(PUBLISHED_LOADS["mistralai/Mixtral-8x7B-v0.1"]["loads"].values())).transpose(1, 0, 2)


def olmoe():
    return np.array(list(PUBLISHED_LOADS["allenai/OLMoE-1B-7B-0924"]["loads"].values()))


def test_published_counts():
    ours, theirs = (
        excess_gate(load_excess(mixtral(), mean_k=2), 10.0),
        excess_gate(load_excess(olmoe(), mean_k=8, names=(0, 7, 15)), 10.0),
    )
    assert ours.verdict == "GO" and theirs.verdict == "NO-GO" and len(theirs.reasons) == 2
    assert (
        "excess_cv" in theirs.reasons[0]
        and "worst layer 15" in theirs.reasons[0]
        and "worst layer 7" in theirs.reasons[1]
    )
    assert [c.passed for c in seed_gate(seed_load(mixtral().sum(0)) | {"perplexity": 10.0}).checks] == [
        True,
        False,
        True,
    ]  # MaxVio is never below CV, and its limit is half of CV's
    assert float(max_violation(mixtral().sum(0)).max()) == pytest.approx(0.1828, abs=1e-3) and float(
        cv(olmoe()).max()
    ) == pytest.approx(0.522, abs=1e-3)  # stated with the data


@pytest.mark.parametrize("E, k", [(8, 2), (16, 1), (64, 8), (256, 8)])
@pytest.mark.parametrize("tokens", [512, 2048, 8192, 32768])
def test_uniform_is_go_and_collapsed_is_not(E, k, tokens):
    loads = random_loads(
        counts_of(tokens, E, k), 48, np.random.default_rng(tokens + E)
    )  # 48 layers: the worst of them decides
    assert excess_gate(load_excess(loads, mean_k=k), 10.0).verdict == "GO"
    loads[17] = np.bincount(np.arange(k), minlength=E) * tokens
    gate = excess_gate(load_excess(loads, mean_k=k), 10.0)
    assert gate.verdict == "NO-GO" and all("worst layer 17" in r for r in gate.reasons)


def test_excess_by_hand():
    (row,) = load_excess([[1000, 600, 400, 0]], mean_k=1, draws=50, generator=np.random.default_rng(3))
    floor = noise_floor("max_violation", 2000, 4, 1, draws=50, generator=np.random.default_rng(3))
    assert (
        row["maxvio"] == 1
        and row["cv"] == pytest.approx(0.72111, abs=1e-5)
        and row["maxvio_random"] == floor
        and row["excess_maxvio"] == 1 - floor
        and row["unused"] == 1
        and row["tokens"] == 2000
    )
    assert row["excess_cv_high"] == math.inf and row["cv_beyond_chance"] == pytest.approx(
        (row["cv"] ** 2 - row["cv_random"] ** 2) ** 0.5
    )
    assert seed_load([[10, 6, 4, 0]]) == {
        "cv": pytest.approx(0.832666, abs=1e-6),
        "maxvio": 1.0,
    }  # definitions, section 2.7
    assert seed_load([[1, 1, 1, 1, 1, 1, 1, 0]])["maxvio"] == 1  # a starved expert counts, too
    counts = np.array([[0, 500, 500, 0, 0]])
    (same,) = load_excess([[400, 400, 350, 350]], counts=counts, generator=np.random.default_rng(1))
    assert same["tokens"] == 1000 and same["cv_random"] == pytest.approx(
        float(cv(random_loads(counts[0], 100, np.random.default_rng(1))).mean())
    )


def test_jackknife_is_the_slow_loop_and_covers():
    from scipy.stats import t

    rng, E, N = np.random.default_rng(0), 16, 40
    popularity = np.exp(0.4 * rng.standard_normal(E))

    def documents():
        return np.stack(
            [rng.multinomial(64, p / p.sum()) for p in popularity * np.exp(0.5 * rng.standard_normal((N, E)))]
        )[:, None]

    truth = np.mean([cv(documents().sum(0)) for _ in range(200)])
    hits = []
    for i in range(100):
        parts = documents()
        (row,) = load_excess(parts, mean_k=1, draws=2)
        if i == 0:
            left = np.array([cv(np.delete(parts, j, 0).sum(0))[0] for j in range(N)])
            half = t.ppf(0.975, N - 1) * ((N - 1) / N * ((left - left.mean()) ** 2).sum()) ** 0.5
            assert row["excess_cv_high"] - row["excess_cv"] == pytest.approx(half)
        hits.append(row["excess_cv_low"] + row["cv_random"] <= truth <= row["excess_cv_high"] + row["cv_random"])
    assert np.mean(hits) > 0.85


def test_missing_is_never_a_pass():
    good = {"cv": 0.1, "maxvio": 0.1, "perplexity": 10.0}
    assert seed_gate(good).verdict == "GO" and Gate("x", ()).verdict == "NO-GO"
    for name in good:
        for bad in (None, float("nan"), float("inf"), LIMITS[name]):
            gate = seed_gate(good | {name: bad})
            assert gate.verdict == "NO-GO" and len(gate.reasons) == 1 and name in gate.reasons[0]
    assert (
        "missing" in seed_gate({}).reasons[0]
        and "no load was measured" in excess_gate(None, 10.0).reasons[0]
        and "not measured" in excess_gate(load_excess(mixtral(), mean_k=2), None).reasons[0]
    )
    nothing = decide(None, None)
    assert (
        nothing.verdict == "NO-GO" and len(nothing.gates["seed"].reasons) == len(nothing.gates["excess"].reasons) == 3
    )
    log = decide(by_hand([{"step": 1, "loss": 2.0}]), measured())
    assert (
        "not in the log" in log.gates["seed"].reasons[0] and log.gates["excess"].verdict == "GO"
    )  # not replaced by the measured one
    assert "measured on the model" in decide(None, measured()).gates["seed"].checks[0].where
    for bad in ([[0, 0, 0]], [1, 2, 3], [[[[1]]]]):
        with pytest.raises(ValueError, match="no load at all|give loads"):
            load_excess(bad, mean_k=1)
    assert worst_layer([{"excess_cv": 0.1}, {"excess_cv": float("nan")}], "cv")["excess_cv"] != 0.1


def test_diverged_training_is_no_go():
    rows = [r | {"load_cv": float("nan") if r["step"] == 300 else 0.01, "max_violation": 0.01} for r in ROWS]
    assert "cv = nan" in decide(by_hand(rows), measured()).gates["seed"].reasons[0]


@pytest.mark.parametrize(
    "limits, words",
    [
        ({"cv": 0}, "limit of cv = 0"),
        ({"cv": -1}, "outside"),
        ({"perplexity": 1}, "limit of perplexity"),
        ({"excess_maxvio": float("nan")}, "outside"),
        ({"max_vio": 0.1}, "did you mean 'maxvio'"),
    ],
)
def test_limits(limits, words):
    with pytest.raises(ValueError, match=words):
        check_limits(limits)
    with pytest.raises(ValueError, match=words):
        decide(None, None, limits)


def test_few_tokens_and_close_calls_are_said():
    few = excess_gate(load_excess(random_loads(counts_of(512, 256, 8), 1, np.random.default_rng(0)), mean_k=8), 10.0)
    assert "measure more" in few.checks[1].where and few.verdict == "GO"
    parts = np.array([[[300, 100, 100, 100]], [[120, 110, 90, 100]], [[100, 100, 120, 80]], [[150, 90, 80, 90]]])
    assert "a close call" in str(excess_gate(load_excess(parts, mean_k=1), 10.0).checks[1])


def test_which_rule_decides():
    found = {rule: decide(by_hand(ROWS), measured(), rule=rule) for rule in ("excess", "seed", "both")}
    assert {r: d.verdict for r, d in found.items()} == {
        "excess": "GO",
        "seed": "NO-GO",
        "both": "NO-GO",
    }  # MaxVio .2 in the log
    with pytest.raises(ValueError, match="did you mean 'seed'"):
        decide(None, None, rule="seeds")


# model and texts ------------------------------------------------------------------------------------------------------


def measured() -> Measurement:
    loads = random_loads(counts_of(2048, 8, 2), 6, np.random.default_rng(0)).reshape(3, 2, 8)
    about = {
        "perplexity": 10.0,
        "interval": [9.0, math.inf],
        "tokens": 300,
        "texts": 1,
        "chance": 99,
        "used": "by hand",
    }
    return Measurement(
        {"wikitext": about, "c4": about},
        loads,
        {"wikitext": np.stack([2 * counts_of(2048, 8, 2)] * 2), "c4": np.stack([counts_of(2048, 8, 2)] * 2)},
        ["wikitext", "wikitext", "c4"],
        ["l.0", "l.1"],
    )


def small(cls=OlmoeForCausalLM, config=OlmoeConfig, vocab=300, **more):
    torch.manual_seed(0)
    return cls(
        config(
            vocab_size=vocab,
            hidden_size=32,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=64,
            bos_token_id=None,
            eos_token_id=0,
            pad_token_id=0,
            **more,
        )
    ).eval()


def moe():
    return small(num_experts=8, num_experts_per_tok=2)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(["one two three four five six"], 300)


@dataclass(frozen=True)
class Collapsed(Rule):
    "Every token asks for the same two experts, and few are served."

    def decide(self, view):
        experts = torch.tensor([[0, 1]]).expand(len(view.logits), 2)
        weights = one_past_last(experts, view.logits.softmax(-1))
        return refuse(
            Routing(view.logits, *order_slots(experts, weights, view.num_experts)), 1.0, valid=view.context.valid
        )


def test_measured_loads_are_those_of_the_forwards(tokenizer, tmp_path):
    model, text = moe(), tmp_path / "mine.jsonl"
    write_lines(text, [{"text": "one two three " * n} for n in (1, 5, 3, 8)])
    found = measure_model(model, tokenizer, tmp_path / "t", [str(text)], "local", limit=3, max_length=24, batch_size=2)
    loads = np.zeros((2, 8), int)
    with (
        route(
            model,
            None,
            experts="keep",
            observe=lambda c, r, h: loads.__setitem__(c.layer, loads[c.layer] + r.load.numpy()),
        ),
        torch.no_grad(),
    ):
        for n in (1, 5, 3):
            model(
                input_ids=torch.tensor([tokenizer("one two three " * n).input_ids[:24]])
            )  # one by one, without padding
    assert (
        np.array_equal(found.parts.sum(0), loads)
        and found.parts.shape == (3, 2, 8)
        and found.layers == ["model.layers.0.mlp", "model.layers.1.mlp"]
    )
    about = found.perplexity[str(text)]
    assert (
        about["texts"] == 3
        and about["chance"] == len(tokenizer)
        and not about["stand_in"]
        and found.rows()[0]["tokens"] == loads[0].sum() // 2 == found.rows(str(text))[0]["tokens"]
    )


def test_refusals_do_not_hide_a_collapse(tokenizer, tmp_path):
    write_lines(tmp_path / "mine.jsonl", [{"text": "one two three four " * n} for n in (4, 6, 7, 9)])
    found = measure_model(
        moe(),
        tokenizer,
        tmp_path / "t",
        [str(tmp_path / "mine.jsonl")],
        "local",
        max_length=32,
        batch_size=2,
        rule=Collapsed(),
    )
    tokens = found.rows()[0]["tokens"]
    assert (
        (found.parts.sum(0) == [[tokens, tokens, 0, 0, 0, 0, 0, 0]] * 2).all()
        and found.parts.shape[0] == 2
        and decide(None, found).verdict == "NO-GO"
    )


def test_texts_and_their_stand_ins(tmp_path, monkeypatch):
    monkeypatch.setenv("MOE_ROUTING_HUB", "no")
    monkeypatch.setenv("MOE_ROUTING_DATA_DIR", str(tmp_path))
    settings = load_settings()
    texts, about = gate_texts("pile", "auto", 5, settings)
    assert (
        about["source"] == "embedded" and about["stand_in"] and "Pile" in about["asked"] and len(texts) == 5
    )  # neither here nor on the hub: said
    (tmp_path / "pile_sample").mkdir()
    write_lines(tmp_path / "pile_sample" / "train.jsonl", [{"text": t, "meta": {}} for t in ("a b", "", "c d")])
    texts, about = gate_texts("pile", "auto", 5, settings)
    assert (
        [t["text"] for t in texts] == ["a b", "c d"]
        and about["source"] == "local"
        and about["used"].startswith("pile_sample/train.jsonl")
    )
    for name, error, words in (
        ("c4", FileNotFoundError, "no local stand-in"),
        ("wiki", ValueError, "did you mean 'wikitext'"),
    ):
        with pytest.raises(error, match=words):
            gate_texts(name, "local", 5, settings)
    with pytest.raises(FileNotFoundError, match="hub = no"):
        gate_texts("c4", "hub", 5, settings)
    with pytest.raises(ValueError, match="limit = 0"):
        gate_texts("c4", "embedded", 0, settings)
    with pytest.raises(ValueError, match="unknown source"):
        gate_texts("c4", "disk", 5, settings)
    assert {t.hub.split(":")[0] for t in GATE_TEXTS.values()} == {
        "Salesforce/wikitext",
        "monology/pile-uncopyrighted",
        "allenai/c4",
    }


def test_models_that_cannot_be_measured(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="no MoE layer"):
        measure_model(small(LlamaForCausalLM, LlamaConfig), tokenizer, tmp_path, source="embedded")
    with pytest.raises(ValueError, match="unknown model .*'/no/such/checkpoint'"):
        load_model("/no/such/checkpoint")
    with pytest.raises(FileNotFoundError, match="holds no transformers model"):
        load_model(str(tmp_path))
    with pytest.raises(ValueError, match="no text was given"):
        measure_model(moe(), tokenizer, tmp_path, [])


# what is left behind --------------------------------------------------------------------------------------------------


def test_files(tmp_path, monkeypatch):
    from PIL import Image

    monkeypatch.setenv("MOE_ROUTING_FIGURE_DPI", "60")  # small pictures are quick to write
    for i, (curves, m) in enumerate(
        (
            (by_hand(ROWS), measured()),
            (None, measured()),
            (by_hand([{"step": 1, "loss": float("nan")}]), None),
            (None, None),
        )
    ):
        decision = decide(curves, m)
        files = write_check(tmp_path / str(i), curves, m, decision, "a model")
        assert sorted(p.name for p in (tmp_path / str(i)).iterdir()) == files
        assert {
            "cv_curve.png",
            "maxvio_curve.png",
            "loss_curve.png",
            "training_dynamics.png",
            "metrics.json",
            "perplexity.json",
            "sanity_check_report.txt",
            "decision.json",
        } <= set(files)
        for name in ("metrics", "perplexity", "decision"):
            json.loads((tmp_path / str(i) / f"{name}.json").read_text(), parse_constant=lambda c: pytest.fail(c))
        with Image.open(tmp_path / str(i) / "cv_curve.png") as image:
            assert round(image.info["dpi"][0]) == 60 and image.width == pytest.approx(3.3 * 60, abs=2)
        report = (tmp_path / str(i) / "sanity_check_report.txt").read_text()
        assert f"Decision: {decision.verdict}" in report and report == check_report(curves, m, decision, "a model")
    about = check_metrics(by_hand(ROWS), measured(), decide(by_hand(ROWS), measured()))
    assert (
        about["log"]["share_of_points_below_limit"]["cv"] == np.mean([r["load_cv"] < 0.3 for r in ROWS])
        and about["log"]["auxiliary_terms_largest"] == {"aux_loss": 0}
        and len(about["layers"]) == 2
    )
    assert about["texts"]["c4"]["cv"]["layer"] in ("l.0", "l.1")


def test_later_days_are_stopped(tmp_path, monkeypatch):
    monkeypatch.setenv("MOE_ROUTING_FIGURE_DPI", "60")
    with pytest.raises(FileNotFoundError, match="run day 0 first"):
        require_go(tmp_path)
    write_check(tmp_path / "go", by_hand(ROWS), measured(), decide(by_hand(ROWS), measured()))
    assert require_go(tmp_path / "go")["verdict"] == require_go(tmp_path / "go" / "decision.json")["verdict"] == "GO"
    write_check(tmp_path / "no", None, None, decide(None, None, rule="both"))
    with pytest.raises(RuntimeError, match="NO-GO.*maxvio = missing.*no load was measured"):
        require_go(tmp_path / "no")
    assert require_go(tmp_path / "no", anyway=True)["verdict"] == "NO-GO"
    assert Check("x", 1.0, 1.0).passed is False


def run_cells(root, **given):
    "The template's code cells in one namespace, with parameters as papermill would inject them."
    space = {}
    for cell in json.loads((root / "nbs" / "runs" / "day0_sanity_check.ipynb").read_text())["cells"]:
        if cell["cell_type"] != "code":
            continue
        exec("".join(cell["source"]), space)
        if "parameters" in cell["metadata"].get("tags", []):
            space.update(given)
    return space


def test_template(root, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MOE_ROUTING_FIGURE_DPI", "60")
    write_lines(tmp_path / "train_log.jsonl", ROWS)
    (tmp_path / "day0").mkdir()
    space = run_cells(
        root,
        log=str(tmp_path / "train_log.jsonl"),
        limit=3,
        max_length=48,
        datasets=["wikitext", "c4"],
        out=str(tmp_path / "day0"),
    )
    result = json.loads((tmp_path / "day0" / "result.json").read_text())
    assert (
        result["metrics"]["verdict"] == require_go(tmp_path / "day0", anyway=True)["verdict"]
        and result["metrics"]["seed_maxvio"] == ROWS[-1]["max_violation"]
        and not (tmp_path / "day0" / "traces").exists()
    )
    assert (
        set(json.loads((tmp_path / "day0" / "perplexity.json").read_text())) == {"wikitext", "c4"}
        and len(result["files"]) == len(space["files"])
        and "SANITY CHECK tiny" in capsys.readouterr().out
    )
    for bad, error in (
        (dict(log=str(tmp_path / "gone")), FileNotFoundError),
        (dict(max_cv=-1), ValueError),
        (dict(model="/no/such"), ValueError),
        (dict(decides="me"), ValueError),
        (dict(limit=0), ValueError),
    ):
        with pytest.raises(error):
            run_cells(root, **bad)
