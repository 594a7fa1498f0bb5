"""Groups of real processes, and what must be true after every test: nothing is left behind."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from vram_agent.backend import ProcessExit
from vram_agent.devices import select_device
from vram_agent.devices.cuda import CudaDevice, NoCudaDeviceError
from vram_agent.processes.group import ProcessBackend, ProcessGroup
from vram_agent.protocol import DevicePreference

from tests.conformance.cases import CASES, FORMS, Case

PR_SET_CHILD_SUBREAPER = 36


def list_fds() -> set[str]:
    return {
        f"{link.name} {link.readlink()}"
        for link in Path("/proc/self/fd").iterdir()
        if link.exists()
    }


def list_children() -> dict[int, str]:
    """Every child of this process, zombies too, with its state."""
    found: dict[int, str] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == os.getpid():
            found[int(stat.parent.name)] = fields[0]
    return found


@pytest.fixture(scope="package", autouse=True)
def _gives_up_its_adopted_children() -> Iterator[None]:
    """A backend makes its process adopt orphans; later tests end processes that are not ours."""
    yield
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0) == 0


@pytest.fixture(autouse=True)
def _leaves_nothing_behind() -> Iterator[None]:
    gc.collect()
    fds, children = len(list_fds()), set(list_children())
    yield
    gc.collect()
    assert set(list_children()) <= children
    assert len(list_fds()) <= fds, sorted(list_fds())


@pytest.fixture(
    params=[DevicePreference.CPU, pytest.param(DevicePreference.CUDA, marks=pytest.mark.gpu)]
)
def device(request: pytest.FixtureRequest) -> DevicePreference:
    preference: DevicePreference = request.param
    if preference is DevicePreference.CUDA:
        try:
            CudaDevice()
        except NoCudaDeviceError as error:
            pytest.skip(f"no CUDA device: {error}")
    return preference


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]()


@pytest.fixture(params=[*CASES, *FORMS])
def case_of_any_form(request: pytest.FixtureRequest) -> Case:
    return (CASES | FORMS)[request.param]()


@pytest.fixture
def exits() -> asyncio.Queue[ProcessExit]:
    return asyncio.Queue()


@pytest.fixture
async def group(
    device: DevicePreference, exits: asyncio.Queue[ProcessExit]
) -> AsyncIterator[ProcessGroup]:
    opened = ProcessBackend(select_device(device)).open_group("g", exits.put_nowait)
    yield opened
    await opened.close()
    await opened.close()
    assert opened.template_pid is None
    assert opened.gpu_pid is None
    assert opened.memory().host_bytes == 0
