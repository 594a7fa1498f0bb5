"""Draw what the dashboards show: the queries of their panels, asked of a real Prometheus.

``python -m bench.dashboards`` plays the story of the dashboards' test (a real operator, a real
agent, a local control plane) and writes a picture of each dashboard into ``docs/images``.
"""

from __future__ import annotations

import asyncio
import json
import math
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt

from tests import cluster
from tests.cluster import build
from tests.integration.operator.conftest import CRDS, NODE, open_world
from tests.integration.operator.monitored import Monitored, monitored_workload, play
from tests.integration.operator.real_agents import real_agents
from tests.integration.operator.world import NAME
from tests.support.dashboards import FOLDER, Dashboard, Query, dashboards
from tests.support.prometheus import Points, Prometheus, Series

IMAGES = Path(__file__).parents[1] / "docs/images"
COLUMNS = 3
MOST_LINES = 8
LONGEST_STEP_SECONDS = 1.5
MIB = 1024**2


async def draw(server: str, kubeconfig: Path, folder: Path) -> None:
    """Play the story, then draw each dashboard."""
    async with open_world(server, kubeconfig, folder) as world:
        world.kubelet.make_container = real_agents(folder)
        rules = FOLDER.parent / "alerts/vram-operator.yaml"
        prometheus = Prometheus(build.program("prometheus"), folder, rules)
        monitored = Monitored(world, await world.start(), prometheus)
        await world.create(monitored_workload())
        await world.until_ready()
        try:
            await monitored.watch()
            span = await play(monitored)
            values = {"namespace": world.client.namespace, "workload": NAME}
            for dashboard in dashboards():
                await draw_dashboard(dashboard, values, prometheus, span)
        finally:
            await prometheus.stop()


async def draw_dashboard(
    dashboard: Dashboard,
    values: dict[str, str],
    prometheus: Prometheus,
    span: tuple[float, float],
) -> None:
    """One small graph for each panel that is over time and has data."""
    graphs: list[tuple[dict[str, Any], list[tuple[Query, Series]]]] = []
    for panel in dashboard.panels:
        lines = [
            (query, line)
            for query in dashboard.queries(panel, values)
            for line in await prometheus.between(*span, query.expression)
        ]
        if lines and panel["type"] != "stat":
            graphs.append((panel, lines))
    rows = -(-len(graphs) // COLUMNS)
    figure, axes = plt.subplots(rows, COLUMNS, figsize=(15, 2.9 * rows), squeeze=False)
    for axis in axes.flat[len(graphs) :]:
        axis.axis("off")
    for axis, (panel, lines) in zip(axes.flat, graphs, strict=False):
        draw_panel(axis, panel, lines, span[0])
        axis.set_xlim(0, span[1] - span[0])
    figure.suptitle(dashboard.body["title"], x=0.01, ha="left", fontweight="bold")
    figure.tight_layout()
    IMAGES.mkdir(exist_ok=True)
    path = IMAGES / f"{dashboard.path.stem}.png"
    figure.savefig(path, dpi=80)
    print(f"wrote {path}")


def draw_panel(
    axis: Any, panel: dict[str, Any], lines: list[tuple[Query, Series]], began: float
) -> None:
    """Lines by the panel's unit, or states."""
    unit = panel["fieldConfig"]["defaults"]["unit"]
    scale, shown = (MIB, "MiB") if unit == "bytes" else (1, {"none": ""}.get(unit, unit))
    axis.set_title(panel["title"] + (f" [{shown}]" if shown else ""), fontsize=9, loc="left")
    axis.tick_params(labelsize=7)
    axis.grid(alpha=0.3)
    if panel["type"] == "state-timeline":
        draw_states(axis, panel, lines, began)
        return
    for query, line in sorted(lines, key=lambda one: -one[1].points[-1][1])[:MOST_LINES]:
        at, value = unjoined([(moment - began, point / scale) for moment, point in line.points])
        axis.plot(at, value, ".-", label=legend(query, line), linewidth=1.2, markersize=2)
    axis.set_ylim(bottom=0, top=1.15 * axis.dataLim.y1 or 1)
    axis.legend(fontsize=6, loc="best", framealpha=0.6)


def unjoined(points: Points) -> tuple[list[float], list[float]]:
    """Seconds and values, with a gap where there was no sample."""
    at: list[float] = []
    values: list[float] = []
    for moment, value in points:
        if at and moment - at[-1] > LONGEST_STEP_SECONDS:
            at.append(moment)
            values.append(math.nan)
        at.append(moment)
        values.append(value)
    return at, values


def draw_states(
    axis: Any, panel: dict[str, Any], lines: list[tuple[Query, Series]], began: float
) -> None:
    """A row for each line, coloured by what it is at each second."""
    names = panel["fieldConfig"]["defaults"]["mappings"][0]["options"]
    for value, shown in names.items():
        points = [
            (moment - began, row)
            for row, (_, line) in enumerate(lines)
            for moment, point in line.points
            if point == float(value)
        ]
        colour = shown["color"].replace("-", "")
        at, rows = [one[0] for one in points], [one[1] for one in points]
        axis.scatter(at, rows, c=colour, marker="s", s=12, label=shown["text"])
    axis.set_yticks(range(len(lines)), [legend(*one) for one in lines])
    axis.set_ylim(-0.8, len(lines) + 1)
    axis.legend(fontsize=6, loc="upper right", ncols=4, framealpha=0.6)


def legend(query: Query, line: Series) -> str:
    """Fill the legend in, without the names that every line here shares."""
    text = query.legend
    for name, value in line.labels.items():
        short = "" if name in {"namespace", "pod"} else value
        text = text.replace("{{" + name + "}}", short)
    return text.strip(" /") or query.panel


def main() -> None:
    """Start the control plane, play and draw."""
    mpl.use("Agg")
    with (
        tempfile.TemporaryDirectory() as folder,
        cluster.up("control-plane", Path(folder) / "cluster") as running,
    ):
        running.kubectl("apply", "--server-side", "-f", str(CRDS))
        node = {
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {"name": NODE},
            "spec": {"unschedulable": True},
        }
        running.kubectl("apply", "-f", "-", stdin=json.dumps(node))
        command = [*running.kubectl_command(), "proxy", "--port=0"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as proxy:
            assert proxy.stdout is not None
            server = "http://" + proxy.stdout.readline().rsplit(" ", 1)[1].strip()
            try:
                asyncio.run(draw(server, running.kubeconfig, Path(folder)))
            finally:
                proxy.terminate()


if __name__ == "__main__":
    main()
