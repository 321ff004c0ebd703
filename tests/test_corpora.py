"The embedded world and the loaders: determinism, splits that never meet, the hub's columns, and every bad input."

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from moe_routing import world as worlds
from moe_routing.corpora import check_disjoint, load_calibration, load_choices, load_corpus, load_text
from moe_routing.world import DOMAINS, corpus_hash
from moe_routing.settings import load_settings

SETTINGS = load_settings()
SMALL = dict(library=20_000, held_out=8_000, stories=800, problems=400, things=24, facts=70, page=380, pages=60)
GENERATED = {1: "6d78f354d272f3a0"}  # recipe -> hash of what our generators make; a new value needs a new recipe


def lines(split, domains=DOMAINS):
    return {line for r in load_corpus("embedded", split) if r["domain"] in domains for line in r["text"].split("\n")}


def test_generators_are_pinned():
    parts = [
        load_text("lambada", limit=None),
        load_choices("hellaswag", limit=None),
        load_choices("arc_challenge", limit=None),
        sorted(lines("train", ("story", "math", "facts"))),
    ]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
    assert GENERATED == {worlds._RECIPE: digest}, "what is generated changed: raise _RECIPE and pin the new value"


def test_same_world_in_every_process():
    code = (
        "import hashlib, json; from moe_routing.world import make_world; "
        f"print(hashlib.sha256(json.dumps(make_world({SMALL!r})).encode()).hexdigest())"
    )
    seen = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(seen) == 1


@pytest.mark.parametrize("a,b", [("train", "test"), ("train", "calibration"), ("calibration", "test")])
def test_splits_never_meet(a, b):
    generated = ("story", "math", "facts")
    assert not lines(a, generated) & lines(b, generated)
    assert not {t for t in lines(a, ("prose",)) & lines(b, ("prose",)) if len(t) >= 40}
    assert not {r["text"] for r in load_corpus("embedded", a)} & {r["text"] for r in load_corpus("embedded", b)}
    assert check_disjoint(load_corpus("embedded", a), load_corpus("embedded", b)) > 0


def test_last_words():
    stories, trained = load_text("lambada", limit=None), "\n".join(lines("train", ("story",)))
    assert [r["kind"] for r in stories[:4]] == ["association", "copying"] * 2
    for r in stories:
        said = r["context"].replace(".", " ").replace(",", " ").split()
        assert r["text"] == f"{r['context']} {r['word']}" and (r["word"] in said) == (r["kind"] == "copying")
        assert r["text"] not in trained
    words = [r["word"] for r in stories if r["kind"] == "association"]
    assert max(map(words.count, words)) / len(words) < 0.12


def test_facts():
    questions = load_choices("hellaswag", limit=None)
    trained = "\n".join(lines("train") | lines("calibration"))
    assert sorted({q["kind"] for q in questions}) == ["easy", "hard"]
    for q in questions:
        right = q["endings"][q["label"]]
        assert len(set(q["endings"])) == 4 and right not in trained
        name = q["context"].split()[0]
        assert all(name in e for e in q["endings"])
        differ = [len(set(right.split()) ^ set(e.split())) for e in q["endings"] if e != right]
        assert all(d == 2 for d in differ) if q["kind"] == "hard" else all(d > 2 for d in differ)
    labels = [q["label"] for q in questions]
    assert max(map(labels.count, range(4))) / len(labels) < 0.35


def test_sums():
    for q in load_choices("arc_challenge", limit=None):
        truth = [eval(e.split(" = ")[0]) == int(e.split("#### ")[1]) for e in q["endings"]]
        assert truth == [i == q["label"] for i in range(4)]


def test_first_and_random_samples():
    full = load_text("wikitext", limit=None)
    assert load_text("wikitext", limit=50) == full[:50]
    some = load_text("wikitext", limit=50, seed=3)
    assert (
        some == load_text("wikitext", limit=50, seed=3) != load_text("wikitext", limit=50, seed=4)
        and len({r["id"] for r in some}) == 50
    )
    share = {d: sum(r["domain"] == d for r in full[:200]) / 200 for d in DOMAINS}
    assert all(abs(share[d] - worlds._MIX[d]) < 0.03 for d in DOMAINS)


@pytest.fixture
def data(tmp_path):
    "A data folder with samples of our own in the hub's columns."

    def put(path, rows):
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(r) + "\n" for r in rows))

    put(
        "wikitext/wikitext-2-raw-v1/test.jsonl",
        [
            {"text": t}
            for i in range(10)
            for t in ("", f" = Heading {i} = \n", f" Sentence number {i} stands here for evaluation . \n")
        ],
    )
    put(
        "wikitext/wikitext-2-raw-v1/train.jsonl",
        [{"text": f" Sentence number {i} stands here for training . \n"} for i in range(20)],
    )
    put(
        "lambada_openai/test.jsonl",
        [{"text": '"Come," she said.\n\nThen she opened the door'}, {"text": "alone"}, {"text": ""}],
    )
    put(
        "hellaswag/validation.jsonl",
        [{"ctx": "A man [title] sits. he", "endings": ["is [step] up.", "b.", "c.", "d."], "label": "2"}] * 20,
    )
    put(
        "ARC-Challenge/test.jsonl",
        [
            {
                "id": "x",
                "question": "Which?",
                "choices": {"text": ["a", "b", "c"], "label": ["1", "2", "3"]},
                "answerKey": "3",
            }
        ],
    )
    put(
        "winogrande_xl/validation.jsonl",
        [
            {
                "sentence": "The trophy beats the case because _ is big.",
                "option1": "trophy",
                "option2": "case",
                "answer": "1",
            }
        ],
    )
    put("piqa/validation.jsonl", [{"goal": "Open it", "sol1": "pull", "sol2": "sing", "label": 0}])
    put("broken/test.jsonl", [{"text": "fine"}])
    (tmp_path / "broken/test.jsonl").write_text('{"text": "fine"}\n{"text": "cut of')
    put("empty/test.jsonl", [{"text": " "}, {"text": ""}])
    put("nolabel/test.jsonl", [{"ctx": "a", "endings": ["b", "c"], "label": ""}])
    return replace(SETTINGS, data_dir=tmp_path, hub=False)


@pytest.mark.parametrize("source", ["local", "auto"])
def test_local_files_in_the_hubs_columns(data, source):
    texts = load_text("wikitext", source, settings=data)
    assert len(texts) == 20 and texts[0] == {"id": 1, "text": " = Heading 0 = \n", "domain": "wikitext"}
    word = load_text("lambada", source, settings=data)
    assert (
        len(word) == 1
        and word[0]["word"] == "door"
        and word[0]["context"].endswith("opened the")
        and "\n\n" in word[0]["context"]
    )
    hella = load_choices("hellaswag", source, limit=7, settings=data)
    assert len(hella) == 7 and hella[0]["label"] == 2 and "[" not in hella[0]["context"] + "".join(hella[0]["endings"])
    assert load_choices("arc_challenge", source, settings=data)[0]["label"] == 2
    wino = load_choices("winogrande", source, settings=data)[0]
    assert (
        wino["contexts"] == ["The trophy beats the case because trophy", "The trophy beats the case because case"]
        and wino["endings"] == ["is big."] * 2
    )
    assert load_choices("piqa", source, settings=data)[0]["endings"] == ["pull", "sing"]
    calibration = load_calibration(source, settings=data)
    assert "training" in calibration[0]["text"] and check_disjoint(calibration, texts) == 30


def test_a_folder_and_a_file(data):
    folder = data.data_dir / "wikitext/wikitext-2-raw-v1"
    one, other = (
        load_text(str(folder), "local", split="train", settings=data),
        load_text(str(folder / "train.jsonl"), "local", settings=data),
    )
    assert [r["text"] for r in one] == [r["text"] for r in other] and one[0]["domain"] == "wikitext-2-raw-v1"
    with pytest.raises(ValueError, match="unknown split.*'tain'.*did you mean.*'train'"):
        load_text(str(folder), "local", split="tain", settings=data)


def test_overlap_is_found(data):
    texts = load_text("wikitext", "local", settings=data)
    with pytest.raises(ValueError, match="share 10 texts"):
        check_disjoint(texts, texts)
    with pytest.raises(ValueError, match="share 1 texts"):
        check_disjoint([{"text": f"{'other ' * 9}\n{texts[1]['text']}"}], texts)


@pytest.mark.parametrize(
    "call,error,words",
    [
        (lambda s: load_text("wikitex", settings=s), ValueError, ["'wikitex'", "did you mean", "'wikitext'"]),
        (lambda s: load_text("wikitex", "local", settings=s), ValueError, ["'wikitex'", "'wikitext'"]),
        (lambda s: load_text("wikitext", "web", settings=s), ValueError, ["'web'", "embedded, hub, local"]),
        (lambda s: load_text("wikitext", limit=0, settings=s), ValueError, ["limit = 0"]),
        (lambda s: load_text("wikitext", split="tset", settings=s), ValueError, ["'tset'", "'test'"]),
        (lambda s: load_text("hellaswag", "local", settings=s), ValueError, ["load_choices"]),
        (lambda s: load_choices("lambada", settings=s), ValueError, ["load_text"]),
        (lambda s: load_choices("wikitext", "local", settings=s), ValueError, ["load_text"]),
        (lambda s: load_choices("arc_easy", settings=s), ValueError, ["'arc_easy'", "embedded"]),
        (
            lambda s: load_text("wikitext", "local", split="validation", settings=s),
            FileNotFoundError,
            ["'wikitext'", "'validation'", "data_dir", "validation.jsonl"],
        ),
        (
            lambda s: load_text("wikitext", "auto", split="validation", settings=s),
            FileNotFoundError,
            ["Salesforce/wikitext", "hub = no", "embedded"],
        ),
        (
            lambda s: load_text(str(s.data_dir / "broken"), "local", settings=s),
            ValueError,
            ["test.jsonl, line 2", "damaged"],
        ),
        (lambda s: load_text(str(s.data_dir / "empty"), "local", settings=s), ValueError, ["empty"]),
        (
            lambda s: load_text(str(s.data_dir / "nolabel"), "local", settings=s),
            ValueError,
            ["no column 'text'", "ctx"],
        ),
        (lambda s: load_choices(str(s.data_dir / "nolabel"), "local", settings=s), ValueError, ["row 0", "no label"]),
        (
            lambda s: load_choices(str(s.data_dir / "empty"), "local", settings=s),
            ValueError,
            ["no multiple choice", "text"],
        ),
        (lambda s: load_text(str(s.data_dir), "local", settings=s), FileNotFoundError, ["no .jsonl"]),
    ],
)
def test_bad_input(data, call, error, words):
    with pytest.raises(error) as e:
        call(data)
    assert all(w in str(e.value) for w in words), str(e.value)


def test_uncached_hub_id_without_network(data, monkeypatch):
    pytest.importorskip("datasets")
    from datasets import config

    monkeypatch.setattr(config, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="nobody/nothing.*connect to the network once"):
        load_text("nobody/nothing", "hub", settings=replace(data, hub=True))


def test_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch):
    folder, write = tmp_path / "cache" / "embedded-x", worlds.Path.write_text

    def full(path, text, **options):
        if path.name == "hash":
            raise OSError(28, "No space left on device")
        return write(path, text, **options)

    monkeypatch.setattr(worlds.Path, "write_text", full)
    with pytest.raises(OSError, match="No space left.*cache_dir"):
        worlds._write_world(folder, {"test": [{"id": 0}]})
    assert not folder.exists() and not list(folder.parent.iterdir())
    monkeypatch.undo()
    worlds._write_world(folder, {"test": [{"id": 0}]})
    worlds._write_world(folder, {"test": [{"id": 1}]})  # a second writer that came late changes nothing
    assert [p.name for p in folder.parent.iterdir()] == [folder.name] and '"id": 0' in (
        folder / "test.jsonl"
    ).read_text()


def test_hash_is_of_what_is_read():
    folder = worlds.world_folder()
    parts = {p.stem: p.read_text(encoding="utf-8") for p in folder.glob("*.jsonl")}
    assert corpus_hash() == hashlib.sha256("".join(f"{k}\n{parts[k]}" for k in sorted(parts)).encode()).hexdigest()[:12]
