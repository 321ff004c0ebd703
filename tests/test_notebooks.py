"""Every notebook runs from top to bottom, each in a process of its own that was forked from one with torch imported."""

import multiprocessing
import os
import time
import traceback
from pathlib import Path

import pytest

from conftest import ROOT

WARM = ["torch", "transformers", "pandas", "matplotlib.pyplot", "datasets", "nbdev.test", "execnb.shell", "lazy_loader"]
LIMIT = 600  # seconds a notebook may take

# These read findings of studies whose runs on the shipped model are still to come (AWAITING in the Makefile).
AWAITING = {"claims", "report", "week", "prediction", "benchmarks"}

NOTEBOOKS = sorted(
    p
    for p in (ROOT / "nbs").rglob("*.ipynb")
    if ".ipynb_checkpoints" not in p.parts and p.parent.name != "runs" and p.stem not in AWAITING
)  # the templates run in test_golden.py


@pytest.fixture(scope="session")
def warm():
    "A process that has imported what every notebook imports, and forks a child for each: seconds are saved a notebook."
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(WARM)
    return context


def execute(path: Path, answer) -> None:
    "In the child: run a notebook as nbdev-test does, and say how it went."
    os.environ |= {"IN_TEST": "1", "MPLBACKEND": "Agg"}
    os.chdir(path.parent)
    os.setsid()
    try:
        from nbdev.test import test_nb

        good, seconds = test_nb(path, basepath=ROOT)
        answer.put((good, seconds))
    except BaseException:
        answer.put((False, traceback.format_exc()))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs(path, warm, capfd):
    answer = warm.SimpleQueue()
    child = warm.Process(target=execute, args=(path, answer))
    child.start()
    until = time.monotonic() + LIMIT
    while child.is_alive() and time.monotonic() < until:
        child.join(0.2)
    if child.is_alive():
        child.kill()
        pytest.fail(f"{path.name} took more than {LIMIT} s")
    good, said = answer.get() if not answer.empty() else (False, f"the process ended with {child.exitcode}")
    printed = capfd.readouterr()
    assert good, f"{said}\n{printed.out[-3000:]}\n{printed.err[-3000:]}"
