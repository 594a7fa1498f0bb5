"""One node, one installed chart and one namespace for all end-to-end tests of a session."""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests import cluster
from tests.e2e.installation import install
from tests.e2e.system import System
from tests.e2e.workloads import LEAKY, workload


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is here, and run it first but for the schedule, whose clock runs meanwhile."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.node)
            item.add_marker(pytest.mark.timeout(1200))

    def place(item: pytest.Item) -> int:
        if here not in item.path.parents:
            return 1
        return 2 if item.path.stem == "test_schedule" else 0

    items.sort(key=place)


@pytest.fixture(scope="session")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[cluster.Cluster]:
    """A real node of this session's own; skipped with its reason where none can run."""
    try:
        running = cluster.up("node", tmp_path_factory.mktemp("node"))
    except cluster.ClusterUnavailable as error:
        if os.environ.get("CI") == "true":
            pytest.fail(str(error))
        pytest.skip(str(error))
    with running:
        yield running


@pytest.fixture(scope="session")
def system(node: cluster.Cluster) -> System:
    """The chart installed by helm, and a namespace with restricted pod security and the models."""
    return install(node)


@pytest.fixture(scope="session", autouse=True)
def scheduled(system: System) -> datetime:
    """When the workload ``scheduled``, applied before all other tests, is due: in a minute."""
    at = (datetime.now(UTC) + timedelta(seconds=80)).replace(second=0, microsecond=0)
    restart = {"schedule": f"{at.minute} {at.hour} * * *", "timeZone": "Etc/UTC"}
    system.apply(workload("scheduled", [LEAKY], restart))
    return at
