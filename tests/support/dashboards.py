"""The dashboards of the chart as Grafana would ask for them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[2] / "charts/vram-operator/files/dashboards"
# What Grafana computes for a scrape each second, and a time range that holds a test.
BUILT_IN = {"__rate_interval": "10s", "__range": "15m"}


@dataclass(frozen=True)
class Query:
    """One query of one panel; ``legend`` has ``{{label}}`` for labels."""

    panel: str
    expression: str
    legend: str


@dataclass(frozen=True)
class Dashboard:
    """One file."""

    path: Path
    body: Mapping[str, Any]

    @property
    def panels(self) -> list[dict[str, Any]]:
        """All but the headings."""
        return [panel for panel in self.body["panels"] if panel["type"] != "row"]

    @property
    def variables(self) -> Mapping[str, str]:
        """The queries of the variables, by name."""
        listed = self.body["templating"]["list"]
        return {one["name"]: one["query"]["query"] for one in listed if one["type"] == "query"}

    def queries(self, panel: Mapping[str, Any], values: Mapping[str, str]) -> Iterator[Query]:
        """Return a panel's queries with the variables put in."""
        for target in panel["targets"]:
            yield Query(panel["title"], replaced(target["expr"], values), target["legendFormat"])


def dashboards() -> list[Dashboard]:
    return [Dashboard(path, json.loads(path.read_text())) for path in sorted(FOLDER.glob("*.json"))]


def replaced(text: str, values: Mapping[str, str]) -> str:
    """Put the variables in; KeyError for one that the dashboard lacks."""
    known = {**BUILT_IN, **values}
    return re.sub(r"\$(\w+)", lambda match: known[match[1]], text)
