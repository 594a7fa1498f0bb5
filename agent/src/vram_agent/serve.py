"""``vram-agent serve``: the composition root of an agent that hosts models.

Why it exists: the one place that knows every part. HTTP listens before the devices are looked at,
since a driver may take seconds and a pod should be ready in less than one; requests that come
before wait in their queues. Called by ``__main__``.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import resource
import signal
import sys

import structlog

from vram_agent import __version__
from vram_agent.backend import Backend
from vram_agent.cgroup import ContainerMemory, read_memory_limit_bytes
from vram_agent.config import (
    ConfigError,
    Settings,
    config_from_flags,
    load_config,
    with_overrides,
)
from vram_agent.errors import AgentError
from vram_agent.logs import configure_logs, default_format
from vram_agent.metrics import AgentMetrics
from vram_agent.processes.linux import bound_malloc
from vram_agent.protocol import AgentConfig, DevicePreference, RunPolicy
from vram_agent.serving.app import ListenError, start_servers
from vram_agent.supervision.journal import FileJournal
from vram_agent.supervision.ports import LoopClock, Surroundings
from vram_agent.supervision.reaper import keep_reaping
from vram_agent.supervision.sizes import FileSizes
from vram_agent.supervisor import Supervisor

_MAX_OPEN_FILES = 65_536
_ROUTED_SECONDS = 1.0
"""How long requests may still be routed to a pod that was told to end: Kubernetes sends SIGTERM and
takes the pod out of its Services at the same time."""
_RUN_IS_FOR_RUN = (
    "run: is for `vram-agent run -- COMMAND`, which wraps an application; `serve` hosts models and "
    "would ignore it: take it out, or start this config by `vram-agent run`"
)
_log = structlog.get_logger("vram_agent.serve")


def serve_command(options: argparse.Namespace) -> int:
    """Serve until told to stop; 0 after a drain, 1 after a fault, 2 for an invalid config."""
    try:
        config = _read_config(options)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    configure_logs(options.log_format or default_format())
    ensure_open_files()
    bound_malloc()
    settings = Settings.from_environment(os.environ)
    return asyncio.run(serve(settings.complete(config), settings))


def ensure_open_files(wanted: int = _MAX_OPEN_FILES) -> int:
    """Let this process open as many files as it may; return how many. Idempotent.

    A connection is a file, and the usual soft limit of 1024 is there for select(2) alone:
    https://0pointer.net/blog/file-descriptor-limits.html
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft == resource.RLIM_INFINITY or soft >= most:
        return soft
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return most


async def serve(config: AgentConfig, settings: Settings) -> int:
    """Serve until a signal or a ``restart`` has drained the agent; return the exit status."""
    stopping = _Stopping()
    metrics = AgentMetrics(__version__)
    supervisor = Supervisor(
        config,
        Surroundings(
            clock=LoopClock(),
            observer=metrics,
            journal=FileJournal(settings.state_directory),
            sizes=FileSizes(settings.state_directory),
            pod=settings.pod,
            version=__version__,
            host=ContainerMemory(),
            host_limit_bytes=read_memory_limit_bytes(),
        ),
    )
    try:
        servers = await start_servers(supervisor, config, settings.pod, metrics)
    except ListenError as error:
        print(error, file=sys.stderr)
        await supervisor.close()
        return 1
    _log.info(
        "ready",
        serving=servers.serving_address,
        control=servers.control_address,
        models=len(config.models),
    )
    reaper = asyncio.create_task(keep_reaping())
    status = 0
    try:
        await _wait_for_end(supervisor, stopping, config.device)
        _log.info("draining", grace_seconds=config.drain.grace_seconds, cause=stopping.cause)
        routed = asyncio.create_task(
            asyncio.sleep(min(_ROUTED_SECONDS, config.drain.grace_seconds))
            if stopping.cause == signal.SIGTERM.name and settings.pod.name
            else asyncio.sleep(0)
        )
        cut = await supervisor.stop(config.drain.grace_seconds)
        if cut:
            _log.warning("cut", requests=cut)
        await routed
    except AgentError as error:
        # No device as asked for: what serves nothing must not look alive.
        _log.error("cannot serve", error=error.message)
        status = 1
    finally:
        reaper.cancel()
        await servers.close()
        await supervisor.close()
    _log.info("stopped", status=status)
    return status


async def connect(preference: DevicePreference) -> Backend:
    """Look at the devices, in a thread since drivers block, and make the process backend."""
    from vram_agent.devices import select_device  # noqa: PLC0415 - see the module docstring
    from vram_agent.processes.group import ProcessBackend  # noqa: PLC0415

    return ProcessBackend(await asyncio.to_thread(select_device, preference))


class _Stopping:
    """SIGTERM and SIGINT as an event."""

    def __init__(self) -> None:
        self.event = asyncio.Event()
        self.cause = "restart"
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._note, number)

    def _note(self, number: signal.Signals) -> None:
        self.cause = number.name
        self.event.set()


async def _wait_for_end(
    supervisor: Supervisor, stopping: _Stopping, preference: DevicePreference
) -> None:
    """Attach the devices, and return at a signal or restart, even while a driver takes its time.

    Raises AgentError where there is no such device.
    """

    async def attach() -> None:
        backend = await connect(preference)
        await supervisor.recall()
        supervisor.attach(backend)

    attaching = asyncio.create_task(attach())
    ends = [
        asyncio.create_task(stopping.event.wait()),
        asyncio.create_task(supervisor.wait_exit()),
    ]
    try:
        await asyncio.wait([attaching, *ends], return_when=asyncio.FIRST_COMPLETED)
        if attaching.done():
            await attaching
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for end in ends:
            end.cancel()


def _read_config(options: argparse.Namespace) -> AgentConfig:
    if options.config is not None and options.model:
        raise ConfigError(["--config and --model: give one of them"])
    if options.config is None and not options.model:
        raise ConfigError(["serve: give --config FILE, or --model NAME=RUNTIME:SOURCE"])
    config = (
        load_config(options.config)
        if options.config is not None
        else config_from_flags(options.model)
    )
    if config.run != RunPolicy():
        raise ConfigError([_RUN_IS_FOR_RUN])
    return with_overrides(config, options.device, options.listen_serving, options.listen_control)
