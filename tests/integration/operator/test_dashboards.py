"""Every query of every panel, asked of a real Prometheus that watched a real operator and agent."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cluster import build
from tests.integration.operator.monitored import (
    LEAK_MEBIBYTES,
    Monitored,
    monitored_workload,
    play,
)
from tests.integration.operator.real_agents import real_agents
from tests.integration.operator.world import NAME, World
from tests.support.dashboards import FOLDER, Dashboard, dashboards
from tests.support.prometheus import Prometheus, Series

pytestmark = [pytest.mark.control_plane, pytest.mark.timeout(300)]

RULES = FOLDER.parent / "alerts/vram-operator.yaml"
MIB = 1024**2
EMPTY_WITH_REASON = {
    ("Growth of residuals", "{{namespace}}/{{workload}}"): "a trend needs five minutes of reports",
    ("Memory limits of containers, share left", "{{namespace}}/{{workload}}"): (
        "the agent runs in no container here, and has no limit"
    ),
    ("Queue, and visits that failed", "{{error}}"): "no visit fails",
}


@dataclass(frozen=True)
class Watched:
    """Prometheus after the story, and when that was."""

    prometheus: Prometheus
    namespace: str
    began: float
    ended: float

    async def ask(self, expression: str) -> list[Series]:
        return await self.prometheus.between(self.began, self.ended, expression)

    async def most(self, expression: str) -> float:
        """The highest point of all lines."""
        return max(value for line in await self.ask(expression) for _, value in line.points)


@pytest.fixture
async def watched(world: World, tmp_path: Path) -> AsyncIterator[Watched]:
    world.kubelet.make_container = real_agents(tmp_path)
    folder = tmp_path / "prometheus"
    folder.mkdir()
    prometheus = Prometheus(build.program("prometheus"), folder, RULES)
    monitored = Monitored(world, await world.start(), prometheus)
    await world.create(monitored_workload())
    await world.until_ready()
    try:
        await monitored.watch()
        began, ended = await play(monitored)
        yield Watched(prometheus, world.client.namespace, began, ended)
    finally:
        await prometheus.stop()
        for one in world.kubelet.history:
            print(f"--- agent of {one.pod['metadata']['name']}\n{one.container.log}")


async def test_every_panel_shows_what_happened(watched: Watched) -> None:
    """One story for all panels: it takes a minute, and its pieces are asserted one by one."""
    await _every_query_returns_data(watched)
    await _every_variable_has_values(watched)
    await _the_figures_are_those_of_the_story(watched)
    rules = (await watched.prometheus.get("rules"))["groups"]
    assert {rule["health"] for group in rules for rule in group["rules"]} == {"ok"}


async def _every_query_returns_data(watched: Watched) -> None:
    values = {"namespace": watched.namespace, "workload": NAME}
    empty = set()
    for dashboard in dashboards():
        for panel in dashboard.panels:
            for query in dashboard.queries(panel, values):
                if not await watched.ask(query.expression):
                    empty.add((query.panel, query.legend))
    assert empty == EMPTY_WITH_REASON.keys()


async def _every_variable_has_values(watched: Watched) -> None:
    expected = {"namespace": watched.namespace, "workload": NAME}
    for dashboard in dashboards():
        for name, query in dashboard.variables.items():
            selector, label = query.removeprefix("label_values(").removesuffix(")").rsplit(", ", 1)
            selector = selector.replace("$namespace", watched.namespace)
            found = await watched.prometheus.get(f"label/{label}/values", **{"match[]": selector})
            assert found == [expected[name]], query


async def _the_figures_are_those_of_the_story(watched: Watched) -> None:
    fleet, workload = dashboards()
    values = {"namespace": watched.namespace, "workload": NAME}

    def expression(dashboard: Dashboard, title: str) -> str:
        (panel,) = (panel for panel in dashboard.panels if panel["title"] == title)
        return next(dashboard.queries(panel, values)).expression

    saved = "VRAM saved against keeping everything loaded, by workload"
    points = [
        value for line in await watched.ask(expression(fleet, saved)) for _, value in line.points
    ]
    # Both that declare a size are out of VRAM, and one of them is in it.
    assert max(points) >= 2 * 600 * MIB > min(points) >= 600 * MIB
    assert await watched.most(expression(fleet, "Bytes reclaimed")) >= LEAK_MEBIBYTES * MIB * 0.9
    blocked = await watched.ask(expression(fleet, "Restarts that are blocked, and why"))
    assert "Suspended" in {line.labels["reason"] for line in blocked}
    states = await watched.ask(expression(workload, "State of each model"))
    seen = {line.labels["model"]: {value for _, value in line.points} for line in states}
    # 0 Absent, 3 Resident, 5 Offloaded
    assert {0.0, 5.0} <= seen["digits"]
    assert {0.0, 3.0} <= seen["numbers"]
