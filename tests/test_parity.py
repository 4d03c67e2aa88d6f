"""Our PPO against numbers that TRL 0.11.4 computed; `make parity` compares afresh, and more (`parity/README.md`)."""

import dataclasses
from pathlib import Path

import pytest

from parity.case import Case, Outcome
from parity.findings import PARAMETERS, compare
from parity.our_step import play_case


RECORDED = Path(__file__).parent / "data" / "parity"
CASES = ("adaptive_kl", "lora")


def recorded(name):
    return Case.read(RECORDED / name), Outcome.read(RECORDED / name, "classic")


def played(case, classic):
    """Our outcome, with the parameters of those steps that were recorded."""
    outcome = play_case(case)
    steps = {name.partition(".")[0] for name in classic.parameters}
    parameters = {name: p for name, p in outcome.parameters.items() if name.partition(".")[0] in steps}
    return dataclasses.replace(outcome, parameters=parameters)


@pytest.mark.parametrize("name", CASES)
def test_statistics_parameters_and_greedy_responses_are_those_of_trl_0_11_4(name):
    case, classic = recorded(name)
    findings = compare(case, classic, played(case, classic))
    compared = [finding for finding in findings if finding.reason is None]
    assert [finding for finding in compared if finding.failed] == []
    assert len(compared) > 20


@pytest.mark.parametrize(
    ("option", "value"), [("vf_coef", 0.12), ("lam", 0.9), ("cliprange", 0.15), ("init_kl_coef", 0.25)]
)
def test_another_value_of_an_option_is_seen_in_the_parameters(option, value):
    case, classic = recorded("adaptive_kl")
    case.options[option] = value
    findings = {finding.quantity: finding for finding in compare(case, classic, played(case, classic))}
    assert findings[PARAMETERS].failed
