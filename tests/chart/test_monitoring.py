"""Alerts and dashboards ask only for metrics that exist."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from vram_operator.metrics import Metrics

from tests.chart.conftest import CHART

NAME = re.compile(r"\bvram_(?:operator|agent)_[a-z_]+")
# As in the documentation; the agent's own tests hold it to these.
AGENT_METRICS = {
    "vram_agent_model_bytes",
    "vram_agent_memory_class_bytes",
    "vram_agent_model_needed_bytes",
    "vram_agent_model_state",
    "vram_agent_device_dirty",
    "vram_agent_host_available_bytes",
    "vram_agent_host_limit_bytes",
    "vram_agent_transition_seconds_bucket",
    "vram_agent_queue_depth",
    "vram_agent_request_seconds_bucket",
    "vram_agent_evictions_total",
    "vram_agent_device_used_bytes",
    "vram_agent_device_total_bytes",
    "vram_agent_transitions_total",
    "vram_agent_worker_restarts_total",
    "vram_agent_queue_seconds_bucket",
    "vram_agent_requests_total",
}
ALERTS = yaml.safe_load((CHART / "files/alerts/vram-operator.yaml").read_text())
RULES = [rule for group in ALERTS["groups"] for rule in group["rules"]]
DASHBOARDS = sorted((CHART / "files/dashboards").glob("*.json"))


def operator_metrics() -> set[str]:
    names: set[str] = set()
    for family in text_string_to_metric_families(Metrics().exposition().decode()):
        suffix = {"counter": "_total", "histogram": "_bucket"}.get(family.type, "")
        names.add(family.name + suffix)
    return names


def expressions() -> Iterator[tuple[str, str]]:
    for rule in RULES:
        yield rule["alert"], rule["expr"]
    for path in DASHBOARDS:
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel.get("targets", []):
                yield f"{path.stem}: {panel['title']}", target["expr"]


@pytest.mark.parametrize(("where", "expression"), list(expressions()))
def test_an_expression_asks_for_metrics_that_exist(where: str, expression: str) -> None:
    asked = set(NAME.findall(expression))
    assert asked, f"{where} asks for nothing of ours"
    assert asked <= operator_metrics() | AGENT_METRICS


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_an_alert_says_what_it_means_and_where_help_is(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in {"warning", "critical"}
    assert set(rule["annotations"]) == {"summary", "description", "runbook_url"}
    assert rule["annotations"]["runbook_url"].endswith(f"/{rule['alert']}.md")


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_panels_of_a_dashboard_do_not_overlap(path: Any) -> None:
    dashboard = json.loads(path.read_text())
    assert dashboard["uid"] == path.stem
    cells = [
        (x, y)
        for panel in dashboard["panels"]
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells))
    assert all(x < 24 for x, _ in cells)
    assert [panel["id"] for panel in dashboard["panels"]] == list(
        range(1, len(dashboard["panels"]) + 1)
    )
