"""The names that notebooks, studies, users and outside checks import: every line of section 7 of the design."""

import subprocess
import sys

import pytest

LINES = """
from moe_routing.core import Routing
from moe_routing.routers.zoo import ROUTERS, make_rule, make_router
from moe_routing.routers.pvalue import bh_count, by_count, hc_count, fit_null
from moe_routing.capacity import limit, expected_drop_rate, recommend_capacity_factor
from moe_routing.experts import ragged_experts
from moe_routing.metrics.table import METRICS, summarise
from moe_routing.corpora import load_text, load_choices, load_corpus
from moe_routing.models import load_model, tiny_model
from moe_routing.patching import moe_layers, route
from moe_routing.traces import record, Trace
from moe_routing.predictors import PREDICTORS, evaluate_predictors
from moe_routing.prefetch import replay
from moe_routing.quality import perplexity, lambada, multiple_choice
from moe_routing.harness import RoutedLM
from moe_routing.serving import measure_generation, measure_server
from moe_routing.stats import paired_bootstrap, tost, minimum_detectable_effect
from moe_routing.runs import run_template, load_runs
""".strip().splitlines()


@pytest.mark.parametrize("line", LINES)
def test_line_works(line):
    names = {}
    exec(line, names)
    assert {name.strip() for name in line.partition(" import ")[2].split(",")} <= names.keys()


def test_ragged_experts_register_themselves():
    import moe_routing.experts  # noqa: F401
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    assert "ragged" in ALL_EXPERTS_FUNCTIONS.valid_keys()


def test_the_harness_is_a_command():
    done = subprocess.run([sys.executable, "-m", "moe_routing.harness", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "usage" in done.stdout.lower(), done.stderr[-2000:]
