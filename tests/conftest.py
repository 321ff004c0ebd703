"""Tests never ask a hub, and run with the repository's root as their working directory."""

import importlib.util
import os
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).resolve().parent.parent


def pytest_addoption(parser):
    parser.addoption(
        "--shape-noise",
        action="store_true",
        help="multiply each matrix product by 1 + 2e-7 u, where u depends on the shapes: results of another CPU",
    )


def pytest_configure(config):
    if not config.getoption("--shape-noise"):
        return
    folder = ROOT / "tests" / "noise"
    if str(folder) in os.environ.get("PYTHONPATH", ""):
        return  # this process has it already
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    spec = importlib.util.spec_from_file_location("shape_noise", folder / "sitecustomize.py")
    noise = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(noise)
    noise.install()


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture
def root() -> Path:
    return ROOT


@pytest.fixture
def one_thread():
    "Small matrix products on one thread: a second one only waits when tests run side by side."
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
