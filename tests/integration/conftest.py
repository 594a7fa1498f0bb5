"""The cluster that every integration test shares."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests import cluster


@pytest.fixture(scope="session")
def control_plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[cluster.Cluster]:
    """A real control plane of this session's own; skipped with its reason where none can run."""
    try:
        running = cluster.up("control-plane", tmp_path_factory.mktemp("control-plane"))
    except cluster.ClusterUnavailable as error:
        if os.environ.get("CI") == "true":
            pytest.fail(str(error))
        pytest.skip(str(error))
    with running:
        yield running
