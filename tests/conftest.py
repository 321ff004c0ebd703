"""Tests never ask a hub, and run with the repository's root as their working directory."""

import os
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).resolve().parent.parent


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
