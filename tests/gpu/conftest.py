"""What only an NVIDIA device can show. Skipped with a word where there is none.

With ``CI=true`` and ``VRAM_REQUIRE_GPU=1`` a missing device is a failure: a runner that has one
must not pass by skipping.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable

import pytest
from vram_agent.backend import ProcessExit
from vram_agent.devices.cuda import CudaDevice, NoCudaDeviceError, measure_used_bytes
from vram_agent.processes.group import ProcessBackend, ProcessGroup

MIB = 1 << 20
DRIVER_SLACK_BYTES = 16 * MIB
"""The driver rounds to pages of 2 MiB, and keeps a few of its own."""
SETTLING_SECONDS = 10.0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/gpu/" in item.path.as_posix():
            item.add_marker(pytest.mark.gpu)


class Driver:
    """The device as the driver sees it, beyond what was in use when the test began."""

    def __init__(self, uuid: str) -> None:
        self._uuid = uuid
        self._begin_bytes = self._used_bytes()

    def _used_bytes(self) -> int:
        used_bytes = measure_used_bytes(self._uuid)
        assert used_bytes is not None
        return used_bytes

    @property
    def held_bytes(self) -> int:
        return self._used_bytes() - self._begin_bytes

    async def wait_for(self, is_so: Callable[[int], bool]) -> int:
        """The driver counts an ended process's memory a little later, and tells nobody when."""
        deadline = time.monotonic() + SETTLING_SECONDS
        while not is_so(held_bytes := self.held_bytes):
            assert time.monotonic() < deadline, f"{held_bytes} bytes are held on the device"
            await asyncio.sleep(0.05)
        return held_bytes


@pytest.fixture
def cuda() -> CudaDevice:
    try:
        return CudaDevice()
    except NoCudaDeviceError as error:
        words = f"no CUDA device: {error}"
        if os.environ.get("CI") == "true" and os.environ.get("VRAM_REQUIRE_GPU") == "1":
            pytest.fail(words)
        pytest.skip(words)


@pytest.fixture
def driver(cuda: CudaDevice) -> Driver:
    return Driver(cuda.place("").uuid)


@pytest.fixture
async def group(cuda: CudaDevice) -> AsyncIterator[ProcessGroup]:
    ends: asyncio.Queue[ProcessExit] = asyncio.Queue()
    opened = ProcessBackend(cuda).open_group("g", ends.put_nowait)
    yield opened
    await opened.close()
    assert ends.empty()
