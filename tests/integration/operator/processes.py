"""The operator as a real process, as it runs in its pod."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from pathlib import Path

import aiohttp


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Operator:
    """One replica. Its log is kept for the message of a failing test."""

    def __init__(
        self,
        kubeconfig: Path,
        namespace: str,
        log: Path,
        *flags: str,
        module: str = "vram_operator",
    ) -> None:
        """``namespace`` is its own; which ones it serves is up to the flags."""
        self.port = free_port()
        self._log = log
        self._command = [
            sys.executable,
            "-W",
            "error",
            "-m",
            module,
            "run",
            f"--metrics-port={self.port}",
            "--agent-image=agent:test",
            "--schedule-jitter=0",
            "--log-format=console",
            *flags,
        ]
        self._environment = {
            **os.environ,
            "KUBECONFIG": str(kubeconfig),
            "POD_NAMESPACE": namespace,
            "PYTHONUNBUFFERED": "1",
        }
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        with self._log.open("ab") as output:
            self._process = await asyncio.create_subprocess_exec(
                *self._command, env=self._environment, stdout=output, stderr=output
            )

    @property
    def was_started(self) -> bool:
        return self._process is not None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def name(self) -> str:
        return self._log.stem

    @property
    def is_alive(self) -> bool:
        return self._process is not None and self._process.returncode is None

    @property
    def log(self) -> str:
        return self._log.read_text() if self._log.exists() else ""

    def kill(self) -> None:
        """As when the node dies: at once and without a word."""
        if self.is_alive and self._process is not None:
            # A fault may have ended it since.
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, signal.SIGKILL)

    async def wait(self, timeout_seconds: float = 15.0) -> int:
        assert self._process is not None
        return await asyncio.wait_for(self._process.wait(), timeout_seconds)

    async def terminate(self) -> int:
        """As the kubelet does; returns the exit status."""
        if self.is_alive and self._process is not None:
            self._process.terminate()
        return await self.wait()

    async def probe(self, path: str) -> tuple[int, str]:
        """Ask /readyz, /healthz or /metrics; 0 while nobody listens."""
        try:
            async with (
                aiohttp.ClientSession() as session,
                session.get(f"http://127.0.0.1:{self.port}{path}") as response,
            ):
                return response.status, await response.text()
        except aiohttp.ClientConnectionError as error:
            return 0, str(error)

    async def is_ready(self) -> bool:
        assert self.is_alive, f"the operator ended:\n{self.log}"
        return (await self.probe("/readyz"))[0] == 200

    async def is_leading(self) -> bool:
        return "vram_operator_leader 1.0" in (await self.probe("/metrics"))[1]
