"""Forty pods leak at once: the short form of ``python -m bench storm``."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from bench.storm import Shape, storm, storm_world

pytestmark = pytest.mark.control_plane

FORTY = Shape(workloads=3, replicas=13, real=1)


async def test_forty_pods_that_leak_at_once_are_restarted_four_at_a_time(
    server: str, control_plane_kubeconfig: Path, tmp_path: Path
) -> None:
    async with storm_world(server, control_plane_kubeconfig, tmp_path, FORTY) as world:
        found = await storm(world, FORTY, tmp_path)

    assert (found.pods, found.cap) == (40, 4)
    # Four at a time, by the apiserver's word and by that of the agents, and one on each node.
    assert found.observed.most_active == 4
    assert found.most_acting <= 4
    assert found.observed.most_on_one_node == 1
    assert found.outcomes == Counter(Recovered=40)
    assert set(found.restarts_of_pods.values()) == {1}
    # One Event each for begin and end, and one for the wait, whatever is waited for in turn (three,
    # when each turn was told); a machine so busy that reports get stale may add some.
    assert found.events["Restarting"] == found.events["Restarted"] == 40
    assert found.events["RestartBlocked"] < 80
