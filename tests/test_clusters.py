"""The cluster profiles: Snakemake takes them, and what they ask for reaches the jobs.

Stand-ins for SLURM's commands and for Kubernetes' API run the jobs on this machine."""

import base64
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from conftest import ROOT
from test_runs import lab, study  # noqa: F401  (lab is a fixture)

PROFILES = ROOT / "papermill_runs" / "profiles"
BIN = Path(sys.executable).parent


def snakemake(folder, *words, path=None, **environ):
    env = {k: v for k, v in os.environ.items() if not k.startswith("MOE_ROUTING_")} | {
        "PYTHONPATH": str(folder),
        "PATH": f"{path or BIN}:{BIN}:{os.environ['PATH']}",
        **environ,
    }
    return subprocess.run(
        [sys.executable, "-m", "snakemake", "-s", "papermill_runs/Snakefile", *map(str, words)],
        cwd=folder,
        env=env,
        text=True,
        capture_output=True,
        timeout=120,
    )


def tool(folder, name, text):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!{sys.executable}\n{text}")
    (folder / name).chmod(0o755)


@pytest.mark.parametrize("name", ["slurm", "kubernetes"])
def test_a_dry_run_takes_the_profile_and_shows_its_resources(lab, name):  # noqa: F811
    done = snakemake(
        lab,
        "--profile",
        PROFILES / name,
        "-n",
        "--quiet",
        "host",
        "--",
        "demo",
        MOE_ROUTING_RESULTS_DIR="/mnt/moe_routing/papermill_runs",
        MOE_ROUTING_CACHE_DIR="/mnt/moe_routing/cache",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    runs = [line for line in (done.stdout + done.stderr).splitlines() if "resources:" in line]
    asked = yaml.safe_load((PROFILES / name / "config.yaml").read_text())["default-resources"]
    assert len(runs) >= 3 and all(
        f"{key}={asked[key]}" in line for line in runs for key in ("gpu", "mem_mb", "runtime")
    )


def test_every_key_of_a_profile_is_an_option_of_snakemake_and_a_wrong_one_is_refused(lab, tmp_path):  # noqa: F811
    options = set(snakemake(lab, "--help").stdout.replace(",", " ").replace("]", " ").replace("[", " ").split())
    for file in PROFILES.glob("*/config.yaml"):
        wrong = [key for key in yaml.safe_load(file.read_text()) if f"--{key}" not in options]
        assert not wrong, f"{file.parent.name}: {wrong}"
    shutil.copytree(PROFILES / "slurm", tmp_path / "wrong")
    with open(tmp_path / "wrong" / "config.yaml", "a") as file:
        file.write("slurm-partitions: big\n")
    done = snakemake(lab, "--profile", tmp_path / "wrong", "-n", "demo")
    assert done.returncode != 0 and "slurm-partitions" in done.stderr


def test_a_study_on_slurm(lab, tmp_path):  # noqa: F811
    "sbatch writes down what it was asked for and runs the job at once; srun runs its words; sacct says how it ended."
    book, tools = tmp_path / "sbatch.jsonl", tmp_path / "bin"
    tool(
        tools,
        "sbatch",
        f"""
import json, subprocess, sys
words = sys.argv[1:]
wrapped = next(w for w in words if w.startswith("--wrap=")).removeprefix("--wrap=")
done = subprocess.run(wrapped, shell=True, capture_output=True, text=True)
with open({str(book)!r}, "a+") as file:
    file.seek(0)
    print(1 + len(file.readlines()))
    state = "FAILED" if done.returncode else "COMPLETED"
    file.write(json.dumps({{"words": words[:-1], "state": state, "said": done.stdout + done.stderr}}) + chr(10))
""",
    )
    tool(
        tools,
        "srun",
        """
import subprocess, sys
words = sys.argv[1:]
while words and words[0].startswith("-"): words.pop(0)
sys.exit(subprocess.run(words).returncode)
""",
    )
    tool(
        tools,
        "sacct",
        f"""
import json
for i, line in enumerate(open({str(book)!r}), 1): print(f"{{i}}|{{json.loads(line)['state']}}")
""",
    )
    for name in ("sinfo", "squeue", "scancel", "scontrol", "sacctmgr"):
        tool(tools, name, "")
    study(lab, [0.1], seconds=0)
    done = snakemake(
        lab,
        "--profile",
        PROFILES / "slurm",
        "--slurm-init-seconds-before-status-checks",
        1,
        "--seconds-between-status-checks",
        1,
        "--retries",
        0,
        "--slurm-no-account",
        "--",
        "demo",
        path=tools,
    )
    jobs = [json.loads(line) for line in book.read_text().splitlines()] if book.exists() else []
    assert done.returncode == 0, done.stdout + done.stderr + "".join(job["said"] for job in jobs)
    assert len(jobs) == 1 and len(list((lab / "papermill_runs" / "local" / "demo").glob("*/finished"))) == 1
    for job in jobs:
        words = " ".join(job["words"])
        assert "--mem 32000" in words and "-t 240" in words and "gpu" in words, words
    runs = (lab / "papermill_runs" / "local" / "demo").glob("*/run.json")
    assert all(json.loads(p.read_text())["status"] == "finished" for p in runs)


def test_a_study_on_kubernetes(lab, tmp_path):  # noqa: F811
    "The stand-in for the API runs the pod's command in an empty folder, with its environment; both see the volume."
    asked, secrets, ended = [], {}, {}
    workdir, volume = tmp_path / "workdir", tmp_path / "volume"
    workdir.mkdir(), volume.mkdir()

    def run(job):
        box = job["spec"]["template"]["spec"]["containers"][0]
        install, command = box["args"][1].split(" && ", 1)  # the image has what the first command installs
        assert install.startswith("pip install") and install.endswith("snakemake-storage-plugin-fs"), install
        env = {e["name"]: base64.b64decode(secrets[e["valueFrom"]["secretKeyRef"]["key"]]).decode() for e in box["env"]}
        done = subprocess.run(
            command,
            shell=True,
            cwd=workdir,
            text=True,
            capture_output=True,
            env={"PATH": f"{tmp_path / 'bin'}:{BIN}:{os.environ['PATH']}", "HOME": str(workdir), **env},
        )
        asked.append((job, done))
        return {"failed": 1} if done.returncode else {"succeeded": 1}

    class Api(BaseHTTPRequestHandler):
        def answer(self):
            sent = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}")
            kind = self.path.split("?")[0].split("/")
            if self.command == "POST" and kind[-1] == "secrets":
                secrets.update(sent["data"])
            if self.command == "POST" and kind[-1] == "jobs":
                ended[sent["metadata"]["name"]] = run(sent)
            body = (
                {"metadata": {"name": "x"}, "status": ended.get(kind[-2], {})}
                if "jobs" in kind
                else {"items": [], "metadata": {}}
            )
            text = json.dumps(body).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST = do_DELETE = do_PUT = answer

        def log_message(self, *words):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Api)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    where = {
        "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}],
        "users": [{"name": "u", "user": {}}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
        "current-context": "x",
        "apiVersion": "v1",
        "kind": "Config",
    }
    (tmp_path / "kube.yaml").write_text(yaml.safe_dump(where))
    tool(tmp_path / "bin", "rsync", "import shutil, sys\nshutil.copy2(*sys.argv[-2:])\n")
    study(lab, [0.1], seconds=0)
    for words in (["init", "-q"], ["add", "-A"]):
        subprocess.run(["git", *words], cwd=lab, check=True, capture_output=True)  # the pod gets what git knows
    try:
        done = snakemake(
            lab,
            "--profile",
            PROFILES / "kubernetes",
            "--retries",
            0,
            "--default-storage-prefix",
            volume,
            "--seconds-between-status-checks",
            1,
            "--",
            "demo",
            path=tmp_path / "bin",
            KUBECONFIG=str(tmp_path / "kube.yaml"),
            MOE_ROUTING_RESULTS_DIR=str(volume / "papermill_runs"),
            MOE_ROUTING_CACHE_DIR=str(volume / "cache"),
        )
    finally:
        server.shutdown()
    assert done.returncode == 0 and len(asked) == 1, (
        done.stdout + done.stderr + "".join(d.stdout + d.stderr for _, d in asked)
    )
    pod = asked[0][0]["spec"]["template"]["spec"]
    box = pod["containers"][0]
    assert (
        box["resources"]["limits"]["nvidia.com/gpu"] == box["resources"]["requests"]["nvidia.com/gpu"] == "1"
        and box["resources"]["requests"]["memory"] == "32000M"
    )
    assert box["volumeMounts"][-1] == {"name": "moe-routing", "mountPath": "/mnt/moe_routing"}
    records = [json.loads(p.read_text()) for p in (volume / "papermill_runs" / "demo").glob("*/run.json")]
    assert [r["status"] for r in records] == ["finished"] and len(
        list((volume / "papermill_runs" / "demo").glob("*/finished"))
    ) == 1
