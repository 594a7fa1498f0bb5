"""Faults of the network and the apiserver, drawn with a seed: no restart is lost or done twice."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.integration.operator.storm import Cluster, run_storm
from tests.integration.operator.weather import KINDS

pytestmark = [pytest.mark.control_plane, pytest.mark.timeout(600)]

# Each has a namespace and operators of its own, and mostly waits.
AT_A_TIME = 3


async def test_whatever_fails_on_the_way_no_restart_is_lost_or_done_twice(
    server: str, control_plane_kubeconfig: Path, tmp_path: Path
) -> None:
    turn = asyncio.Semaphore(AT_A_TIME)

    async def attempt(number: int, kind: str) -> None:
        async with turn:
            cluster = Cluster(server, control_plane_kubeconfig, tmp_path / str(number))
            tally = await run_storm(cluster, kind, seed=number)
        print(f"{kind}: {tally}")
        assert (tally.lost, tally.double) == (0, 0), (kind, tally)
        assert tally.faults > 0, f"nothing went wrong: {kind}"

    async with asyncio.TaskGroup() as group:
        for number, kind in enumerate(KINDS):
            group.create_task(attempt(number, kind))
