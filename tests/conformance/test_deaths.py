"""Processes are killed at every moment; the next call repairs what is gone."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from vram_agent.backend import ProcessExit
from vram_agent.errors import ModelFailedError, NotResidentError, WorkerDiedError
from vram_agent.processes.group import ProcessGroup
from vram_agent.processes.linux import adopt_orphans

from tests.conformance.cases import HERE, Case, array_of, infer, python_spec
from tests.conformance.conftest import list_children

X = np.array([1.0, 2.0], dtype=np.float32)
Exits = asyncio.Queue[ProcessExit]


def pid_of(group: ProcessGroup, role: str) -> int:
    pid = group.template_pid if role == "template" else group.gpu_pid
    assert pid is not None
    return pid


async def read_fifo(path: Path) -> bytes:
    """Wait until someone writes; opening a FIFO blocks, so not on the event loop."""
    return await asyncio.to_thread(path.read_bytes)


@pytest.fixture
def fifo(tmp_path: Path) -> Path:
    path = tmp_path / "started"
    os.mkfifo(path)
    return path


@pytest.mark.parametrize("role", ["template", "gpu"])
async def test_a_process_killed_while_idle_is_made_anew(
    group: ProcessGroup, exits: Exits, case: Case, role: str
) -> None:
    await group.load(case.spec)
    await group.restore("m")
    case.check(await group.run("m", case.task))
    pids = {"template": pid_of(group, "template"), "gpu": pid_of(group, "gpu")}
    os.kill(pids[role], signal.SIGKILL)
    # The template takes its GPU process with it.
    expected = {"template", "gpu"} if role == "template" else {"gpu"}
    seen = [await exits.get() for _ in expected]
    assert {one.role for one in seen} == expected
    for one in seen:
        assert (one.group, one.pid, one.signal) == ("g", pids[one.role], 9)
    assert group.gpu_pid is None
    assert not group.is_resident("m")
    assert group.memory().device_bytes == 0
    assert all(state != "Z" for state in list_children().values())
    await group.load(case.spec)
    await group.restore("m")
    case.check(await group.run("m", case.task))
    assert exits.empty()


@pytest.mark.parametrize("role", ["template", "gpu"])
async def test_a_process_killed_during_a_task_fails_that_task_alone(
    group: ProcessGroup, exits: Exits, fifo: Path, role: str
) -> None:
    await group.load(python_spec("make_doubler"))
    await group.load(python_spec("make_doubler", name="other"))
    await group.restore("m")
    await group.restore("other")
    running = asyncio.ensure_future(group.run("m", infer(X, block=str(fifo))))
    waiting = asyncio.ensure_future(group.run("other", infer(X)))
    assert await read_fifo(fifo) == b"running"
    os.kill(pid_of(group, role), signal.SIGKILL)
    with pytest.raises(WorkerDiedError, match="signal 9"):
        await running
    with pytest.raises(NotResidentError):
        await waiting
    assert (await exits.get()).signal == 9
    # No load in between: what the group was told to hold comes back by itself.
    await group.restore("other")
    assert array_of(await group.run("other", infer(X)), "y").tolist() == [2.0, 4.0]


async def test_a_task_that_ends_its_process_is_told_the_exit_code(
    group: ProcessGroup, exits: Exits
) -> None:
    await group.load(python_spec("make_doubler"))
    await group.restore("m")
    with pytest.raises(WorkerDiedError, match="exit code 3"):
        await group.run("m", infer(X, exit=3))
    seen = await exits.get()
    assert (seen.role, seen.exit_code, seen.signal) == ("gpu", 3, 0)


@pytest.mark.parametrize("role", ["template", "gpu"])
async def test_a_process_killed_during_a_restore_is_an_error_that_can_be_retried(
    group: ProcessGroup, case: Case, role: str
) -> None:
    await group.load(case.spec)
    await group.restore("m")
    await group.offload("m")
    # Stopped, it cannot have answered when it is killed.
    os.kill(pid_of(group, "gpu"), signal.SIGSTOP)
    restoring = asyncio.ensure_future(group.restore("m"))
    await asyncio.sleep(0)
    os.kill(pid_of(group, role), signal.SIGKILL)
    with pytest.raises(WorkerDiedError) as caught:
        await restoring
    assert caught.value.retry_after_seconds is not None
    assert not group.is_resident("m")
    await group.restore("m")
    case.check(await group.run("m", case.task))


async def test_a_template_killed_during_a_fork_is_an_error_that_can_be_retried(
    group: ProcessGroup,
) -> None:
    await group.load(python_spec("make_doubler"))
    os.kill(pid_of(group, "template"), signal.SIGSTOP)
    restoring = asyncio.ensure_future(group.restore("m"))
    await asyncio.sleep(0)
    os.kill(pid_of(group, "template"), signal.SIGKILL)
    with pytest.raises(WorkerDiedError):
        await restoring
    await group.restore("m")
    assert array_of(await group.run("m", infer(X)), "y").tolist() == [2.0, 4.0]


async def test_a_process_killed_during_an_offload_is_an_offload(
    group: ProcessGroup, case: Case
) -> None:
    await group.load(case.spec)
    await group.restore("m")
    pid = pid_of(group, "gpu")
    os.kill(pid, signal.SIGSTOP)
    leaving = asyncio.ensure_future(group.offload("m"))
    await asyncio.sleep(0)
    os.kill(pid, signal.SIGKILL)
    moved = await leaving
    assert moved.vram_bytes == 0
    assert "signal 9" in moved.message
    await group.restore("m")
    case.check(await group.run("m", case.task))


async def test_a_template_killed_during_a_load_is_the_models_failure(
    group: ProcessGroup, exits: Exits, fifo: Path
) -> None:
    loading = asyncio.ensure_future(group.load(python_spec("make_blocked", fifo=str(fifo))))
    assert await read_fifo(fifo) == b"loading"
    os.kill(pid_of(group, "template"), signal.SIGKILL)
    with pytest.raises(ModelFailedError, match="died"):
        await loading
    assert (await exits.get()).role == "template"
    assert group.template_pid is None
    await group.load(python_spec("make_doubler"))
    await group.restore("m")


async def test_the_gpu_process_ends_at_once_whatever_runs_in_it(
    group: ProcessGroup, exits: Exits, fifo: Path
) -> None:
    await group.load(python_spec("make_doubler"))
    await group.restore("m")
    running = asyncio.ensure_future(group.run("m", infer(X, block=str(fifo))))
    assert await read_fifo(fifo) == b"running"
    await group.end_gpu()
    assert group.gpu_pid is None
    with pytest.raises(WorkerDiedError):
        await running
    assert exits.empty()


async def test_both_killed_at_once_leave_no_zombie(group: ProcessGroup, exits: Exits) -> None:
    await group.load(python_spec("make_doubler"))
    for first, second in (("template", "gpu"), ("gpu", "template")):
        await group.restore("m")
        pids = [pid_of(group, first), pid_of(group, second)]
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        assert {(await exits.get()).pid for _ in pids} == set(pids)
        assert not set(pids) & set(list_children())


async def test_what_a_models_code_started_ends_with_its_gpu_process(group: ProcessGroup) -> None:
    await group.load(python_spec("make_doubler"))
    await group.restore("m")
    result = await group.run("m", infer(X, spawn=["sleep", "600"]))
    (pid,) = array_of(result, "pid").tolist()
    assert pid not in list_children()
    await group.end_gpu()
    assert pid not in list_children()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_signals_meant_for_the_supervisor_leave_its_processes_alone(
    group: ProcessGroup,
) -> None:
    await group.load(python_spec("make_doubler"))
    await group.restore("m")
    for role in ("template", "gpu"):
        pid = pid_of(group, role)
        assert os.getsid(pid) == pid
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(pid, number)
    assert array_of(await group.run("m", infer(X)), "y").tolist() == [2.0, 4.0]


def test_when_the_supervisor_is_killed_its_processes_end() -> None:
    script = textwrap.dedent(f"""
        import asyncio
        from vram_agent.devices.cpu import CpuDevice
        from vram_agent.processes.group import ProcessBackend
        from vram_agent.protocol import ModelSpec, Runtime

        async def main():
            group = ProcessBackend(CpuDevice()).open_group("g", print)
            await group.load(ModelSpec(name="m", runtime=Runtime.PYTHON,
                source="hosted:make_doubler", options={{"path": {HERE!r}}}))
            await group.restore("m")
            print(group.template_pid, group.gpu_pid, flush=True)
            await asyncio.Event().wait()

        asyncio.run(main())
    """)
    adopt_orphans()
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as supervisor:
        assert supervisor.stdout is not None
        pids = [int(word) for word in supervisor.stdout.readline().split()]
        assert len(pids) == 2
        pidfds = [os.pidfd_open(pid) for pid in pids]
        supervisor.kill()
    for pid, pidfd in zip(pids, pidfds, strict=True):
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        assert poll.poll(20_000), "a process outlived the supervisor"
        os.close(pidfd)
        # This process is a subreaper, so that they are its own now, unless the template was quick
        # enough to reap its GPU process.
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)
