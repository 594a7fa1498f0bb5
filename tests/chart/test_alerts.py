"""Each alert fires, stays quiet and resolves, as Prometheus' own evaluator sees it."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.chart.conftest import CHART

RULES = CHART / "files/alerts/vram-operator.yaml"
CASES = Path(__file__).parent / "alerts.test.yaml"
ALERTS = [
    rule["alert"]
    for group in yaml.safe_load(RULES.read_text())["groups"]
    for rule in group["rules"]
]
TESTS = yaml.safe_load(CASES.read_text())["tests"]


def test_the_rules_and_their_cases_pass_promtool(promtool: Path) -> None:
    """One process for all: each case names its alert where it fails."""
    for command in (("check", "rules", "--lint-fatal", RULES), ("test", "rules", CASES)):
        done = subprocess.run([promtool, *command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("alert", ALERTS)
def test_an_alert_has_a_case_in_which_it_is_quiet_then_fires_then_resolves(alert: str) -> None:
    moments = [_firing(test, alert) for test in TESTS]
    assert any(
        found[:1] == [False] and True in found and found[-1:] == [False] for found in moments
    )


def _firing(test: dict[str, Any], alert: str) -> list[bool]:
    """Whether the alert is expected to fire, at each moment that a case looks at."""
    looks = [one for one in test["alert_rule_test"] if one["alertname"] == alert]
    return [bool(look["exp_alerts"]) for look in looks]
