"""Staleness by behaviour: the smoke results of every template, and of every router row, are what golden.json remembers.

When one differs, either there is a fault to mend, or the change is meant: then raise `protocol` of the template and run
`make golden`. Moving, renaming, rewording and reformatting change nothing here."""

import json

import pytest

from conftest import ROOT
from moe_routing.runs.run import differences, template_path, template_protocol
from moe_routing.runs.study import golden_cases, golden_result

GOLDEN = json.loads((ROOT / "nbs" / "runs" / "golden.json").read_text())
CASES = golden_cases(ROOT)


def test_every_case_is_remembered_and_nothing_else():
    assert list(GOLDEN) == list(CASES), "run `make golden`"


@pytest.mark.parametrize("name", CASES)
def test_smoke_result_is_the_golden_one(name, one_thread):
    template, parameters = CASES[name]
    found = differences(GOLDEN[name], json.loads(json.dumps(golden_result(template, parameters, ROOT))))
    assert not found, (
        f"{template} (protocol {template_protocol(template_path(template, ROOT))}) gives other numbers: {found[:5]}; "
        "mend the fault, or raise its protocol and run `make golden`"
    )


def test_golden_results_can_tell():
    "Every case holds numbers, and few of them are zero: a comparison of nothing would always pass."
    for name, metrics in GOLDEN.items():
        flat = [x for v in metrics.values() for x in (v if isinstance(v, list) else [v]) if isinstance(x, int | float)]
        assert flat or name.startswith("bench_"), name
