"""A real agent as a process, and a client that costs next to nothing.

Called by the benchmarks of the serving path. The client writes requests that were made beforehand
and looks at nothing but status and length, so that what it measures is the agent.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

LIMIT_SECONDS = 120.0
_END_OF_HEAD = b"\r\n\r\n"
_LENGTH = b"\r\ncontent-length:"


@dataclass(frozen=True, kw_only=True)
class Served:
    """An agent that listens. Addresses are ``host:port``; seconds are those from exec to ready."""

    serving: str
    control: str
    pid: int
    ready_seconds: float

    def pids(self) -> dict[str, list[int]]:
        """The processes by role: a template's children are GPU processes."""
        templates = psutil.Process(self.pid).children()
        return {
            "supervisor": [self.pid],
            "template": [one.pid for one in templates],
            "gpu": [child.pid for one in templates for child in one.children()],
        }


@contextmanager
def serve(folder: Path, models: Sequence[dict[str, Any]], **config: Any) -> Iterator[Served]:
    """Yield a fresh ``vram-agent serve`` with these models on the CPU; end it afterwards."""
    document = {
        "device": "CPU",
        "listen": {"serving": "127.0.0.1:0", "control": "127.0.0.1:0"},
        "control": {"allowUnsigned": True},
        "models": list(models),
        **config,
    }
    path = folder / "config.json"
    path.write_text(json.dumps(document))
    environment = {**os.environ, "VRAM_AGENT_STATE_DIR": str(folder)}
    command = [sys.executable, "-m", "vram_agent", "serve", "--config", str(path)]
    began = time.monotonic()
    with (
        (folder / "agent.log").open("wb") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, env=environment) as process,
    ):
        try:
            ready = _wait_ready(folder / "agent.log", process)
            yield Served(
                serving=ready["serving"],
                control=ready["control"],
                pid=process.pid,
                ready_seconds=time.monotonic() - began,
            )
        finally:
            process.terminate()
            process.communicate(timeout=LIMIT_SECONDS)


def _wait_ready(log: Path, process: subprocess.Popen[bytes]) -> dict[str, Any]:
    while process.poll() is None:
        for line in log.read_text().splitlines():
            if line.startswith("{") and json.loads(line).get("event") == "ready":
                ready: dict[str, Any] = json.loads(line)
                return ready
        time.sleep(0.005)
    raise RuntimeError(f"the agent ended with {process.returncode}: {log.read_text()}")


def make_post(path: str, body: bytes, headers: dict[str, str] | None = None) -> bytes:
    """Return a request as it travels."""
    given = {"Content-Type": "application/json", **(headers or {}), "Content-Length": len(body)}
    lines = "".join(f"{name}: {value}\r\n" for name, value in given.items())
    return f"POST {path} HTTP/1.1\r\nHost: agent\r\n{lines}\r\n".encode() + body


class Connection:
    """One connection that is kept alive; one request at a time. Use it on one event loop."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self.head = b""
        """Of the last answer, in small letters."""

    @classmethod
    async def open(cls, address: str) -> Connection:
        """Connect to ``host:port``."""
        host, _, port = address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return cls(reader, writer)

    async def ask(self, request: bytes) -> tuple[int, bytes]:
        """Send the request; return status and body of its answer.

        Raises ConnectionError, and asyncio.IncompleteReadError where the answer breaks off.
        """
        self._writer.write(request)
        self.head = (await self._reader.readuntil(_END_OF_HEAD)).lower()
        length = int(self.head.partition(_LENGTH)[2].partition(b"\r\n")[0])
        return int(self.head[9:12]), await self._reader.readexactly(length)

    @property
    def is_closing(self) -> bool:
        """Whether the last answer said that the agent closes the connection."""
        return b"\r\nconnection: close\r\n" in self.head

    async def send(self, part: bytes) -> None:
        """Send a part of a request; the rest goes with ``ask``."""
        self._writer.write(part)
        await self._writer.drain()

    async def close(self) -> None:
        """Close it. Idempotent."""
        self._writer.close()
        with suppress(ConnectionError):
            await self._writer.wait_closed()


def cpu_seconds(pids: Sequence[int]) -> float:
    """Return the time that all threads of the processes have had on a CPU."""
    return sum(
        int(Path(f"/proc/{pid}/task/{thread}/schedstat").read_text().split()[0]) / 1e9
        for pid in pids
        for thread in os.listdir(f"/proc/{pid}/task")  # noqa: PTH208 - names, not paths
    )
