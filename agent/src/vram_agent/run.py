"""``vram-agent run``: the composition root of an agent that wraps a command.

Why it exists: the one place that knows every part, and PID 1's duties: signals are passed on, ended
processes are reaped, and the exit code is the command's. The devices are looked at before the
command begins, since what they hold until then is not its. Called by ``__main__``.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import Coroutine, Sequence
from typing import Any, Final

import structlog

from vram_agent import __version__
from vram_agent.config import ConfigError, Settings, load_config, with_overrides
from vram_agent.devices import select_device
from vram_agent.errors import AgentError
from vram_agent.logs import configure_logs, default_format
from vram_agent.metrics import AgentMetrics
from vram_agent.processes.linux import adopt_orphans
from vram_agent.protocol import AgentConfig, AgentMode
from vram_agent.serving.app import ListenError, start_control
from vram_agent.supervision.journal import FileJournal
from vram_agent.supervision.ports import LoopClock, Surroundings
from vram_agent.wrapping.process import CannotStartError
from vram_agent.wrapping.wrapper import Wrapper

FORWARDED: Final = (
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGWINCH,
    signal.SIGCONT,
    signal.SIGALRM,
    *range(signal.SIGRTMIN, signal.SIGRTMAX + 1),
)
"""Passed on as they are. SIGTERM and SIGINT drain first; the others concern this process."""
_log = structlog.get_logger("vram_agent.run")


def run_command(options: argparse.Namespace, command: Sequence[str]) -> int:
    """Run the command until it ends; its exit code, 128 and the signal that ended it, 126 or 127
    where it cannot be run, 0 after a ``restart``, 1 after a fault, 2 for an invalid config.
    """
    try:
        config = _read_config(options)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    configure_logs(options.log_format or default_format())
    adopt_orphans()
    return asyncio.run(run(command, config, Settings.from_environment(os.environ)))


async def run(command: Sequence[str], config: AgentConfig, settings: Settings) -> int:
    """Run the command until it or the agent ends; return the exit status."""
    metrics = AgentMetrics(__version__)
    wrapper = Wrapper(
        command,
        config,
        Surroundings(
            clock=LoopClock(),
            observer=metrics,
            journal=FileJournal(settings.state_directory),
            pod=settings.pod,
            version=__version__,
            mode=AgentMode.RUN,
        ),
    )
    stopping = _Signals(wrapper)
    try:
        servers = await start_control(wrapper, config, settings.pod, metrics)
    except ListenError as error:
        print(error, file=sys.stderr)
        await wrapper.close()
        return 1
    _log.info("ready", control=servers.control_address, command=command[0])
    try:
        device = await asyncio.to_thread(select_device, config.device)
        status = await _keep(wrapper, wrapper.keep(device), stopping, config.drain.grace_seconds)
    except CannotStartError as error:
        _log.error("cannot start", error=error.message)
        status = error.exit_code
    except AgentError as error:
        _log.error("cannot run", error=error.message)
        status = 1
    finally:
        await wrapper.close()
        await servers.close()
    _log.info("stopped", status=status)
    return status


async def _keep(
    wrapper: Wrapper,
    life: Coroutine[Any, Any, int],
    stopping: _Signals,
    grace_seconds: float,
) -> int:
    """Return the exit status: the command's, or 0 where a ``restart`` asked for the end.

    1. The command ended. 2. A signal: drain, end it, pass its exit code on. 3. A ``restart``.
    """
    keeping = asyncio.create_task(life)
    told = asyncio.create_task(stopping.event.wait())
    leaving = asyncio.create_task(wrapper.wait_exit())
    try:
        await asyncio.wait([keeping, told, leaving], return_when=asyncio.FIRST_COMPLETED)
        # 1
        if keeping.done():
            return await keeping
        # 2
        if told.done():
            _log.info("draining", grace_seconds=grace_seconds, cause=stopping.number.name)
            await wrapper.stop(stopping.number, grace_seconds)
            return await keeping
        # 3
        await wrapper.leave()
        await keeping
        return 0
    finally:
        for task in (told, leaving):
            task.cancel()


class _Signals:
    """SIGTERM and SIGINT as an event, repeated ones and all others passed on to the command."""

    def __init__(self, wrapper: Wrapper) -> None:
        self.event = asyncio.Event()
        self.number = signal.SIGTERM
        self._wrapper = wrapper
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._end, number)
        for number in FORWARDED:
            loop.add_signal_handler(number, wrapper.forward, number)
        loop.add_signal_handler(signal.SIGCHLD, wrapper.reap_orphans)

    def _end(self, number: signal.Signals) -> None:
        if self.event.is_set():
            self._wrapper.forward(number)
            return
        self.number = number
        self.event.set()


def _read_config(options: argparse.Namespace) -> AgentConfig:
    config = AgentConfig() if options.config is None else load_config(options.config)
    if config.models:
        raise ConfigError(
            ["models: vram-agent run wraps a command and hosts no models; use vram-agent serve"]
        )
    return with_overrides(config, options.device, None, options.listen_control)
