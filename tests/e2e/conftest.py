"""One node, one installed chart and one namespace for all end-to-end tests of a session."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests import cluster
from tests.cluster import prerequisites
from tests.e2e.installation import QUICKLY, prepare
from tests.e2e.quickstart import Walk, section
from tests.e2e.system import System
from tests.e2e.workloads import LEAKY, workload


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is here, and run it first.

    Later come the schedule, whose clock runs meanwhile, and the upgrade, which all others share.
    """
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.node)
            item.add_marker(pytest.mark.timeout(1200))

    def place(item: pytest.Item) -> int:
        if here not in item.path.parents:
            return 1
        return 2 if item.path.stem in {"test_schedule", "test_upgrade"} else 0

    items.sort(key=place)


@pytest.fixture(scope="session")
def walk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Walk]:
    """The quick start, followed up to its cluster; skipped with its reason where none can run."""
    following = Walk(tmp_path_factory.mktemp("quickstart") / "vram-operator")
    try:
        prerequisites.require_node(following.cluster)
    except cluster.ClusterUnavailable as error:
        if os.environ.get("CI") == "true":
            pytest.fail(str(error))
        pytest.skip(str(error))
    following.copy_checkout()
    try:
        following.follow(section(1))
        yield following
        following.follow(section(7)[1:])
    finally:
        cluster.down(following.cluster)


@pytest.fixture(scope="session")
def node(walk: Walk) -> cluster.Cluster:
    """A real node of this session's own, with the project's images."""
    found = cluster.find(walk.cluster)
    assert found is not None, f"no cluster runs in {walk.cluster}"
    return found


@pytest.fixture(scope="session")
def system(walk: Walk, node: cluster.Cluster) -> System:
    """The chart as the quick start installs it, and a restricted namespace with the models.

    Two flags more than the page has: tests do not wait for a report every ten seconds.
    """
    (command,) = section(2)
    walk.follow([replace(command, text=f"{command.text} '--set=extraArgs={{{QUICKLY}}}'")])
    return prepare(node)


@pytest.fixture(scope="session", autouse=True)
def scheduled(system: System) -> datetime:
    """When the workload ``scheduled``, applied before all other tests, is due: in a minute."""
    at = (datetime.now(UTC) + timedelta(seconds=80)).replace(second=0, microsecond=0)
    restart = {"schedule": f"{at.minute} {at.hour} * * *", "timeZone": "Etc/UTC"}
    system.apply(workload("scheduled", [LEAKY], restart))
    return at
