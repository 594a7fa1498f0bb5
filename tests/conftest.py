"""What every test may have: an event loop, and the control plane that a session's tests share.

One event loop for whoever asks for "the current one" outside of an async test: looptime and
pytest-asyncio both do (`get_event_loop`), for every test and also for those that are not async;
Python then makes a loop that nobody closes, and its ResourceWarning fails whichever test the
garbage collector happens to run in.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator

import pytest

from tests import cluster

_loop = pytest.StashKey[asyncio.AbstractEventLoop]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_loop] = asyncio.new_event_loop()
    asyncio.set_event_loop(config.stash[_loop])


def pytest_unconfigure(config: pytest.Config) -> None:
    asyncio.set_event_loop(None)
    config.stash[_loop].close()


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
