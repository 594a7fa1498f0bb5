"""``vram-agent run`` as a person runs it: real commands, the CPU device, figures from /proc."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest
from vram_agent.protocol import ActionState, AgentMode, Report, ResidualSource

from tests.integration.agent.conftest import DEADLINE_SECONDS, Agent

APPS = Path(__file__).with_name("apps")
AGENT = str(Path(sys.executable).with_name("vram-agent"))
LEAKY = [sys.executable, str(APPS / "leaky.py")]
MIB = 1 << 20

StartWrapped = Callable[..., Coroutine[Any, Any, Agent]]


def sh(script: str) -> list[str]:
    return ["sh", "-c", script]


def find_free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def anonymous_bytes(pid: int) -> int:
    """The kernel's own sum for a process, which the agent does not read."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon")


def children_of(agent: Agent) -> list[psutil.Process]:
    return psutil.Process(agent.process.pid).children(recursive=True)


def is_done(report: Report) -> bool:
    return report.action is not None and report.action.state is ActionState.DONE


def command_of(agent: Agent) -> int:
    return [int(entry["pid"]) for entry in agent.log if entry["event"] == "started"][-1]


async def until(agent: Agent, is_so: Callable[[], bool]) -> None:
    """Wait for something that another process does."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        while not is_so():
            await asyncio.sleep(0.02)
            assert agent.process.returncode is None, "the agent ended"


async def said(agent: Agent, text: str) -> None:
    await until(agent, lambda: any(e.get("text", "").strip() == text for e in agent.log))


async def is_ready(agent: Agent) -> bool:
    async with agent.session.get(f"{agent.control}/readyz") as answer:
        return answer.status == 200


async def become_ready(agent: Agent) -> None:
    async with asyncio.timeout(DEADLINE_SECONDS):
        while not await is_ready(agent):  # noqa: ASYNC110 - nothing else tells of it
            await asyncio.sleep(0.02)


@pytest.fixture
async def start_wrapped(tmp_path: Path) -> AsyncIterator[StartWrapped]:
    agents: list[Agent] = []
    session = aiohttp.ClientSession()

    async def start(command: list[str], *, until_ready: bool = True, **config: Any) -> Agent:
        path = tmp_path / "config.json"
        document = {
            "device": "CPU",
            "listen": {"control": "127.0.0.1:0"},
            "control": {"allowUnsigned": True},
            **config,
        }
        path.write_text(json.dumps(document))
        process = await asyncio.create_subprocess_exec(
            *(AGENT, "run", "--config", str(path), "--log-format", "json", "--", *command),
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, "VRAM_AGENT_STATE_DIR": str(tmp_path / "state")},
        )
        agent = Agent(process, session)
        agents.append(agent)
        async with asyncio.timeout(DEADLINE_SECONDS):
            await agent.ready.wait()
            if until_ready:
                await become_ready(agent)
        return agent

    yield start
    for agent in agents:
        try:
            await agent.end()
        finally:
            for entry in agent.log:
                print(json.dumps(entry))
    await session.close()


def hooked(*words: str, quiet_seconds: int = 1) -> tuple[list[str], dict[str, Any], str]:
    """The command, its ``run`` policy and its address."""
    url = f"http://127.0.0.1:{(port := find_free_port())}"
    policy = {
        "ready": {"http": f"{url}/ready"},
        "idle": {"http": f"{url}/idle", "quietSeconds": quiet_seconds},
        "drain": {"http": f"{url}/drain"},
    }
    return [sys.executable, str(APPS / "hooked.py"), str(port), *words], policy, url


# --- the leak -------------------------------------------------------------------------------------


async def test_a_leak_is_measured_and_a_recycle_gives_it_back_once_for_each_id(
    start_wrapped: StartWrapped,
) -> None:
    agent = await start_wrapped(LEAKY, run={"idle": {"quietSeconds": 1}})
    fresh = await agent.when(lambda r: r.idle and r.memory.model_bytes > 0)
    assert fresh.agent.mode is AgentMode.RUN
    assert fresh.memory.source is ResidualSource.PROCESS
    assert fresh.models == []
    assert fresh.memory.residual_bytes < 2 * MIB
    first = command_of(agent)
    before_bytes = anonymous_bytes(first)
    for count in (1, 2):
        agent.process.send_signal(signal.SIGUSR1)
        await until(agent, lambda n=count: anonymous_bytes(first) - before_bytes >= n * 64 * MIB)  # type: ignore[misc]
    leaked_bytes = anonymous_bytes(first) - before_bytes
    leaked = await agent.when(lambda r: r.idle and r.memory.residual_bytes >= 128 * MIB)
    assert abs(leaked.memory.residual_bytes - leaked_bytes) < 4 * MIB
    assert leaked.memory.model_bytes == fresh.memory.model_bytes

    for _ in range(3):
        status, _ = await agent.call("/recycle", {"restartID": "r-1", "drainTimeoutSeconds": 30})
        assert status == 202
        cured = await agent.when(is_done)
    assert cured.agent.epoch == 1
    assert cured.agent.boot_id == fresh.agent.boot_id
    assert cured.memory.residual_bytes < 16 * MIB
    assert not psutil.pid_exists(first)
    await said(agent, "up")
    assert anonymous_bytes(command_of(agent)) < before_bytes + 16 * MIB
    assert [child.pid for child in children_of(agent)] == [command_of(agent)]
    async with agent.session.get(f"{agent.control}/metrics") as answer:
        text = await answer.text()
    assert 'vram_agent_worker_restarts_total{model="",reason="Recycle"} 1.0' in text


async def test_workers_and_daemons_count_and_end_with_the_application(
    start_wrapped: StartWrapped,
) -> None:
    daemon = f"import subprocess;subprocess.Popen({LEAKY!r}, start_new_session=True)"
    script = f"{sys.executable} -c '{daemon.replace(chr(39), chr(34))}'; exec sleep 1000"
    agent = await start_wrapped(sh(script))
    await said(agent, "up")
    (daemon_pid,) = (c.pid for c in children_of(agent) if "leaky.py" in " ".join(c.cmdline()))
    held_bytes = anonymous_bytes(daemon_pid)
    await agent.when(lambda r: r.memory.used_bytes > held_bytes // 2)
    assert (await agent.call("/recycle", {"restartID": "r-1"}))[0] == 202
    await agent.when(lambda r: r.agent.epoch == 1)
    assert not psutil.pid_exists(daemon_pid)


async def test_a_gradio_application_leaks_and_is_cured(start_wrapped: StartWrapped) -> None:
    if importlib.util.find_spec("gradio") is None:
        pytest.skip("gradio is not installed: pip install gradio")
    port = find_free_port()
    url = f"http://127.0.0.1:{port}"

    async def press(agent: Agent) -> None:
        call = f"{url}/gradio_api/call/leak"
        async with agent.session.post(call, json={"data": [64]}) as answer:
            event = (await answer.json())["event_id"]
        async with agent.session.get(f"{call}/{event}") as answer:
            assert "kept" in await answer.text()

    agent = await start_wrapped(
        [sys.executable, str(APPS / "gradio_app.py"), str(port)],
        run={"ready": {"http": url}, "idle": {"quietSeconds": 2, "cpuPercent": 20}},
    )
    fresh = await agent.when(lambda r: r.idle and r.memory.model_bytes > 0)
    for _ in range(3):
        await press(agent)
    leaked = await agent.when(lambda r: r.idle and r.memory.residual_bytes >= 192 * MIB)
    assert anonymous_bytes(command_of(agent)) >= fresh.memory.used_bytes
    order = {"restartID": "r-1", "drainTimeoutSeconds": 30}
    assert (await agent.call("/recycle", order))[0] == 202
    cured = await agent.when(is_done)
    await become_ready(agent)
    cured = await agent.when(lambda r: r.idle)
    print(f"residual: {leaked.memory.residual_bytes} before, {cured.memory.residual_bytes} after")
    assert cured.memory.residual_bytes < 64 * MIB
    assert anonymous_bytes(command_of(agent)) < fresh.memory.used_bytes + 64 * MIB
    await press(agent)


# --- PID 1 ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "status", "words"),
    [
        pytest.param(["true"], 0, "", id="a command that finishes"),
        pytest.param(sh("exit 7"), 7, "", id="a command that fails"),
        pytest.param(sh("kill -9 $$"), 137, "", id="a command that is killed"),
        pytest.param(["no-such-program"], 127, "cannot run 'no-such-program'", id="none"),
        pytest.param(["/etc/hostname"], 126, "Permission denied", id="not executable"),
    ],
)
async def test_the_exit_code_is_that_of_a_shell(
    command: list[str], status: int, words: str, tmp_path: Path
) -> None:
    if status == 126:
        path = tmp_path / "program"
        path.write_text("no program")
        command = [str(path)]
    process = await asyncio.create_subprocess_exec(
        *(AGENT, "run", "--device=CPU", "--listen-control=127.0.0.1:0", "--", *command),
        stderr=asyncio.subprocess.PIPE,
    )
    _, error = await process.communicate()
    assert process.returncode == status
    assert words in error.decode()


async def test_a_command_without_dashes_is_refused_with_the_remedy() -> None:
    process = await asyncio.create_subprocess_exec(
        AGENT, "run", "python", "-m", "app", stderr=asyncio.subprocess.PIPE
    )
    _, error = await process.communicate()
    assert process.returncode == 2
    assert "vram-agent run -- python app.py" in error.decode()


@pytest.mark.parametrize("name", ["SIGHUP", "SIGUSR2", "SIGWINCH", "SIGQUIT"])
async def test_a_signal_is_passed_on(start_wrapped: StartWrapped, name: str) -> None:
    agent = await start_wrapped(LEAKY)
    await said(agent, "up")
    agent.process.send_signal(signal.Signals[name])
    await said(agent, f"got {name}")


async def test_sigterm_lets_the_command_end_and_passes_its_exit_code_on(
    start_wrapped: StartWrapped,
) -> None:
    command, policy, _ = hooked()
    agent = await start_wrapped(command, run=policy)
    assert await agent.end() == 5
    texts = [e["text"].strip() for e in agent.log if e["event"] == "text"]
    assert texts == ["told to drain", "told to end"]


async def test_a_command_that_ignores_sigterm_is_killed_when_the_grace_is_over(
    start_wrapped: StartWrapped,
) -> None:
    script = "trap '' TERM; echo up >&2; while :; do sleep 1000; done"
    agent = await start_wrapped(sh(script), drain={"graceSeconds": 1})
    await said(agent, "up")
    assert await agent.end() == 137


async def test_orphans_that_end_are_reaped(start_wrapped: StartWrapped) -> None:
    orphans = "for i in 1 2 3 4 5 6 7 8; do (true &); done; echo up >&2; exec sleep 1000"
    agent = await start_wrapped(sh(orphans))
    await said(agent, "up")
    await until(agent, lambda: [c.pid for c in children_of(agent)] == [command_of(agent)])


async def test_the_command_does_not_outlive_an_agent_that_is_killed(
    start_wrapped: StartWrapped,
) -> None:
    agent = await start_wrapped(LEAKY)
    await said(agent, "up")
    command = psutil.Process(command_of(agent))
    agent.process.kill()
    await agent.process.wait()
    _, alive = await asyncio.to_thread(psutil.wait_procs, [command], 10)
    assert alive == []


# --- crashes --------------------------------------------------------------------------------------


async def test_a_command_that_crashes_is_started_again_after_longer_and_longer_pauses(
    start_wrapped: StartWrapped,
) -> None:
    agent = await start_wrapped(sh("exit 3"), until_ready=False, run={"afterCrash": "Restart"})

    def pauses() -> list[float]:
        return [e["next_start_seconds"] for e in agent.log if e["event"] == "crashed"]

    await until(agent, lambda: len(pauses()) == 3)
    assert pauses() == [1, 2, 4]
    assert not await is_ready(agent)
    assert (await agent.report()).agent.epoch == 0
    assert await agent.end() == 3


# --- drain, recycle, restart ----------------------------------------------------------------------


async def test_a_recycle_drains_by_the_hook_until_idle_and_is_not_ready_meanwhile(
    start_wrapped: StartWrapped,
) -> None:
    command, policy, url = hooked()
    agent = await start_wrapped(command, run=policy)
    await agent.when(lambda r: r.idle)
    (await agent.session.post(f"{url}/busy")).release()
    await agent.when(lambda r: not r.idle)
    order = {"restartID": "r-1", "drainTimeoutSeconds": 100}
    status, action = await agent.call("/recycle", order)
    assert (status, action["state"]) == (202, "Draining")
    await said(agent, "told to drain")
    assert not await is_ready(agent)
    assert (await agent.report()).draining
    (await agent.session.post(f"{url}/free")).release()
    done = await agent.when(is_done)
    assert (done.agent.epoch, done.draining) == (1, False)
    assert done.action is not None
    assert done.action.message == ""
    assert await is_ready(agent)


async def test_a_hook_without_end_is_cut_at_the_deadline(start_wrapped: StartWrapped) -> None:
    command, policy, _ = hooked("hang")
    agent = await start_wrapped(command, run=policy)
    assert (await agent.call("/recycle", {"restartID": "r", "drainTimeoutSeconds": 1}))[0] == 202
    done = await agent.when(is_done)
    assert done.action is not None
    assert done.action.message.startswith("cut after 1 s: the application")
    await said(agent, "told to end")


async def test_sigterm_while_a_recycle_drains_ends_within_the_grace(
    start_wrapped: StartWrapped,
) -> None:
    command, policy, _ = hooked("hang")
    agent = await start_wrapped(command, run=policy, drain={"graceSeconds": 2})
    assert (await agent.call("/recycle", {"restartID": "r-1"}))[0] == 202
    await said(agent, "told to drain")
    assert await agent.end() == 5
    assert len([e for e in agent.log if e["event"] == "started"]) == 1


async def test_a_drain_is_taken_back_by_resume(start_wrapped: StartWrapped) -> None:
    command, policy, _ = hooked()
    agent = await start_wrapped(command, run=policy)
    status, report = await agent.call("/drain")
    assert (status, report["draining"]) == (200, True)
    assert not await is_ready(agent)
    status, report = await agent.call("/resume")
    assert (status, report["draining"]) == (200, False)
    await said(agent, "told to go on")
    await become_ready(agent)


async def test_a_restart_exits_0_and_the_next_boot_says_that_it_is_done(
    start_wrapped: StartWrapped,
) -> None:
    agent = await start_wrapped(LEAKY)
    order = {"restartID": "r-2", "drainTimeoutSeconds": 30}
    assert (await agent.call("/restart", order))[0] == 202
    async with asyncio.timeout(DEADLINE_SECONDS):
        assert await agent.process.wait() == 0
    agent = await start_wrapped(LEAKY)
    status, body = await agent.call("/restart", order)
    assert (status, body["state"], body["step"]) == (202, "Done", "InPlace")
    assert agent.process.returncode is None


async def test_a_recycle_whose_command_has_gone_fails_and_ends_the_agent(
    start_wrapped: StartWrapped, tmp_path: Path
) -> None:
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\nexec sleep 1000\n")
    program.chmod(0o755)
    agent = await start_wrapped([str(program)])
    program.unlink()
    assert (await agent.call("/recycle", {"restartID": "r-1"}))[0] == 202
    async with asyncio.timeout(DEADLINE_SECONDS):
        assert await agent.process.wait() == 127


@pytest.mark.parametrize(
    "path", ["/scrub", "/models/a/load", "/models/a/offload", "/models/a/unload"]
)
async def test_what_a_wrapper_cannot_do_answers_501_with_words(
    start_wrapped: StartWrapped, path: str
) -> None:
    agent = await start_wrapped(["sleep", "1000"])
    status, body = await agent.call(path)
    assert status == 501
    assert "use /recycle or /restart" in json.dumps(body)


async def test_a_config_with_models_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"models": [{"name": "a", "runtime": "ONNX", "source": "/a"}]}))
    process = await asyncio.create_subprocess_exec(
        *(AGENT, "run", "--config", str(path), "--", "true"), stderr=asyncio.subprocess.PIPE
    )
    _, error = await process.communicate()
    assert process.returncode == 2
    assert "models: vram-agent run wraps a command" in error.decode()
