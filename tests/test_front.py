"""The front door: every command and every piece of Python that README and CONTRIBUTING show is run here, as printed or in the form that the table names."""

import datetime
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from conftest import ROOT

BIN = Path(sys.executable).parent
README, CONTRIBUTING = (ROOT / "README.md").read_text(), (ROOT / "CONTRIBUTING.md").read_text()
SNAKEMAKE = "snakemake -s papermill_runs/Snakefile"

# command -> (form in which it is run here, why not as printed). In a form, {make} stands for what make would execute (`make -n`), {checkpoint} for a folder with a small model.
AS_PRINTED = ("{command}", "")
DRY = "a dry run: planning, settings and the graph are those of the command, nothing is executed"
COMMANDS = {
    "make run": ("{make} -n", f"minutes; {DRY}"),
    "make run STUDY=smoke": ("{make} -n", f"a minute; {DRY}; the study itself is run by hand"),
    "make run MODEL=allenai/OLMoE-1B-7B-0924": (
        "{make:MODEL={checkpoint}} -n",
        f"needs a hub and a GPU; with a local checkpoint in place of the hub id, {DRY}",
    ),
    "make run STUDY=routers_gpu": ("{make} -n", f"needs a GPU; {DRY}"),
    "MOE_ROUTING_DEVICE=cuda:0 make run STUDY=smoke": ("MOE_ROUTING_DEVICE=cuda:0 {make} -n", f"needs a GPU; {DRY}"),
    "make test": ("", "it is what runs this test; only what make would execute is looked at"),
    "make notebooks": ("", "runs every notebook; only what make would execute is looked at"),
    "make readme": ("{make}", "what make executes, without setting up .venv"),
    "make status": ("{make}", "what make executes, without setting up .venv"),
    "make lab": ("{make} --version", "a server that does not end; its start is checked by asking for the version"),
    "make book": ("", "tests/test_book.py builds the whole book; only what make would execute is looked at"),
    'pip install -e ".[cluster]"': (
        "",
        "needs a package index; the extra is compared with what is installed (test_the_extra_is_installed)",
    ),
    f"{SNAKEMAKE} --cores 2 bh_sweep": ("{command} -n", DRY),
    f"{SNAKEMAKE} --profile papermill_runs/profiles/slurm bh_sweep": (
        "{command} -n",
        f"needs a cluster; {DRY}; tests/test_clusters.py runs a study on a stand-in",
    ),
    f"{SNAKEMAKE} --profile papermill_runs/profiles/slurm --set-resources bh_sweep_run:mem_mb=64000 -- bh_sweep": (
        f"{SNAKEMAKE} --profile papermill_runs/profiles/slurm --set-resources bh_sweep_run:mem_mb=64000 -n -- bh_sweep",
        f"needs a cluster; {DRY}",
    ),
    "export MOE_ROUTING_RESULTS_DIR=/mnt/moe_routing/papermill_runs MOE_ROUTING_CACHE_DIR=/mnt/moe_routing/cache": (
        "{command}; " + SNAKEMAKE + " --profile papermill_runs/profiles/kubernetes bh_sweep -n",
        "means something only before the next command",
    ),
    f"{SNAKEMAKE} --profile papermill_runs/profiles/kubernetes bh_sweep": (
        "MOE_ROUTING_RESULTS_DIR=/mnt/moe_routing/papermill_runs MOE_ROUTING_CACHE_DIR=/mnt/moe_routing/cache {command} -n",
        f"needs a cluster; {DRY}; tests/test_clusters.py runs a study on a stand-in",
    ),
    "papermill nbs/runs/train_router.ipynb out.ipynb -p router my_routers:GAP": AS_PRINTED,
    "papermill nbs/runs/evaluate_router.ipynb out.ipynb -p router bh -p alpha 0.3 -p max_k 8": AS_PRINTED,
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)


def shown() -> list[str]:
    "Every command of both pages: the lines of shell blocks, and inline code that begins like a command."
    lines = [line.split(" #")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    inline = [
        code
        for text in (README, CONTRIBUTING)
        for code in re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    ]
    return list(
        dict.fromkeys(
            [line for line in lines if line]
            + [
                code
                for code in inline
                if re.match(
                    r"(make|papermill|snakemake|python|pip|accelerate|jupyter|export|MOE_ROUTING_\w+=\S+) +\S", code
                )
            ]
        )
    )


@pytest.fixture
def here(tmp_path):
    "A folder that looks like the repository to a command, where results and files can be written."
    for name in ("Makefile", "settings.ini", "pyproject.toml", "constraints.txt", "moe_routing", "nbs"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "papermill_runs" / "studies").mkdir(parents=True)
    shutil.copy(ROOT / "papermill_runs" / "Snakefile", tmp_path / "papermill_runs")
    (tmp_path / "papermill_runs" / "profiles").symlink_to(ROOT / "papermill_runs" / "profiles")
    for name in ("bh_sweep", "smoke", "routers_gpu"):
        shutil.copy(
            ROOT / "papermill_runs" / "studies" / f"{name}.yaml", tmp_path / "papermill_runs" / "studies"
        )  # the others take time to plan
    (tmp_path / "my_routers.py").write_text(next(b for b in blocks("python") if "GAP = Row" in b))
    return tmp_path


def environment(folder: Path) -> dict:
    made_by_make = (
        "MAKEFLAGS",
        "MFLAGS",
        "MAKELEVEL",
        "MAKEOVERRIDES",
    )  # a make that runs these tests would speak into the one that is asked
    return {
        **{k: v for k, v in os.environ.items() if k not in made_by_make},
        "PYTHONPATH": f"{ROOT}",
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "MOE_ROUTING_RESULTS_DIR": str(folder / "results"),
        "MOE_ROUTING_CACHE_DIR": os.environ.get("MOE_ROUTING_CACHE_DIR", str(ROOT / "cache")),
    }


def made(command: str, folder: Path) -> str:
    "What make would execute for a command, with this Python's environment in place of .venv."
    words = re.search(r"make .*", command).group()
    done = subprocess.run(
        f"{words} -n -o venv VENV={BIN}",
        shell=True,
        cwd=folder,
        text=True,
        capture_output=True,
        env=environment(folder),
    )
    assert done.returncode == 0 and str(BIN) in done.stdout, done.stdout + done.stderr
    return done.stdout.strip().splitlines()[-1]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    "A small OLMoE with a tokenizer, saved as transformers does it."
    from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("checkpoint")
    words = ["<unk>", "<eos>", *"The expert who knows what is asked".split()]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>").save_pretrained(folder)
    OlmoeForCausalLM(
        OlmoeConfig(
            vocab_size=len(words),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_experts=16,
            num_experts_per_tok=8,
            eos_token_id=1,
            pad_token_id=1,
        )
    ).save_pretrained(folder)
    return folder


def test_every_command_has_an_entry_and_every_entry_a_command():
    missing, unused = set(shown()) - set(COMMANDS), set(COMMANDS) - set(shown())
    assert not missing, f"README or CONTRIBUTING shows commands without an entry in COMMANDS: {sorted(missing)}"
    assert not unused, f"COMMANDS has entries that no page shows: {sorted(unused)}"
    assert all(why for form, why in COMMANDS.values() if form != "{command}"), (
        "a form that differs from the command says why"
    )


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: re.sub(r"\W+", "-", c)[:60])
def test_command(command, here, checkpoint):
    form, _ = COMMANDS[command]
    if command.startswith(("make", "MOE_")):
        form = form.replace(
            "{make:MODEL={checkpoint}}", made(re.sub(r"MODEL=\S+", f"MODEL={checkpoint}", command), here)
        ).replace("{make}", made(command, here))
    if not form:
        return
    done = subprocess.run(
        form.replace("{command}", command),
        shell=True,
        executable="/bin/bash",
        cwd=here,
        text=True,
        capture_output=True,
        env=environment(here),
        timeout=300,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    if " -n" in form:
        assert "This was a dry-run" in said, said
    if "MODEL=" in command:
        assert f"/{checkpoint.name}" in form
    if command == "make readme":
        assert (here / "README.md").read_text() == README
    if command == "make status":
        assert re.search(r"bh_sweep +\d+ runs", said)
    if command.startswith("papermill"):
        assert (here / "out.ipynb").exists()


def test_the_extra_is_installed():
    from importlib.metadata import version
    from packaging.requirements import Requirement

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {Requirement(r).name for r in extras["cluster"]} >= {
        "snakemake-executor-plugin-slurm",
        "snakemake-executor-plugin-kubernetes",
    }
    for text in extras["cluster"] + extras["book"]:
        wanted = Requirement(text)
        assert wanted.specifier.contains(version(wanted.name)), text


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_python_runs_as_printed(number, tmp_path, checkpoint):
    "In a fresh process and an empty folder. Only the hub id of the first block is replaced, by a small checkpoint."
    text = blocks("python")[number]
    hub = '"allenai/OLMoE-1B-7B-0924"'
    assert (hub in text) == (number == 0)
    (tmp_path / "block.py").write_text(text.replace(hub, repr(str(checkpoint))))
    done = subprocess.run(
        [sys.executable, "block.py"],
        cwd=tmp_path,
        text=True,
        capture_output=True,
        env=environment(tmp_path),
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout.strip().splitlines()
    assert said and (number == 0 or len(said) == 1), done.stdout
    if "check_contracts" in text:
        assert "BROKEN" not in done.stdout and done.stdout.count("kept") >= 5
    if "top_share" in text:
        assert 1 / 16 < float(said[0]) < 1 / 12  # random logits, 2 of 16 experts: a little over even
    if "perplexity" in text:
        assert float(said[0]) > 1


def test_how_tos_are_short():
    sections = {part.split("\n")[0]: part for part in README.split("\n## ")[1:]}
    for name in ("On a GPU", "On a cluster", "Add a router", "Add a metric", "Add a data set"):
        code = re.findall(r"^```\w+\n(.*?)^```", sections[name], re.M | re.S)
        assert code and all(len(block.splitlines()) < 20 for block in code), name


def test_the_table_says_what_the_reports_say():
    from moe_routing.front import headline, study_rows, study_table

    assert study_table(study_rows(ROOT), up="") in README, (
        "the reports have changed: run nbs/index.ipynb again (make notebooks)"
    )
    assert headline(ROOT) in README


def test_links_of_the_first_page_lead_somewhere():
    for page in (README, CONTRIBUTING):
        for target in re.findall(r"\]\(([^)#\s]+)\)", page):
            assert target.startswith("http") or (ROOT / target).exists(), target


def test_contributing_has_ten_lines():
    assert [int(n) for n in re.findall(r"^(\d+)\. ", CONTRIBUTING, re.M)] == list(range(1, 11))


# Keys of the Citation File Format 1.2.0.
CFF_REQUIRED = {"cff-version", "message", "title", "authors"}
CFF_KNOWN = CFF_REQUIRED | {
    "abstract",
    "commit",
    "contact",
    "date-released",
    "doi",
    "identifiers",
    "keywords",
    "license",
    "license-url",
    "preferred-citation",
    "references",
    "repository",
    "repository-artifact",
    "repository-code",
    "type",
    "url",
    "version",
}
PERSON, ENTITY = (
    {
        "given-names",
        "family-names",
        "name-particle",
        "name-suffix",
        "alias",
        "orcid",
        "affiliation",
        "email",
        "website",
        "address",
        "city",
        "country",
        "fax",
        "post-code",
        "region",
        "tel",
    },
    {
        "name",
        "alias",
        "orcid",
        "email",
        "website",
        "address",
        "city",
        "country",
        "date-end",
        "date-start",
        "fax",
        "location",
        "post-code",
        "region",
        "tel",
    },
)


def faults(cff: dict) -> list[str]:
    found = [f"missing {k}" for k in CFF_REQUIRED - set(cff)] + [f"unknown {k}" for k in set(cff) - CFF_KNOWN]
    if str(cff.get("cff-version")) != "1.2.0":
        found.append("cff-version")
    if cff.get("type") not in ("software", "dataset"):
        found.append("type")
    if not cff.get("authors") or not all(set(a) <= (ENTITY if "name" in a else PERSON) for a in cff["authors"]):
        found.append("authors")
    if not isinstance(cff.get("date-released"), datetime.date):
        found.append("date-released")
    if not (isinstance(cff.get("keywords"), list) and all(isinstance(k, str) for k in cff["keywords"])):
        found.append("keywords")
    return found


def test_citation_is_valid_and_agrees_with_the_package():
    cff = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert not faults(cff)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    import moe_routing

    assert (
        cff["version"] == moe_routing.__version__
        and cff["license"] == project["license"]["text"]
        and cff["authors"] == project["authors"]
        and set(cff["keywords"]) == set(project["keywords"])
    )
    assert (
        "missing title" in faults({k: v for k, v in cff.items() if k != "title"})
        and "unknown titel" in faults({**cff, "titel": "x"})
        and faults({**cff, "authors": []}) == ["authors"]
    )
