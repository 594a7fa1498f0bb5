"""What the agent asks the application over HTTP and TCP: ready, idle, drain.

Why it exists: an application that is not ours tells about itself by the URLs that it has. Called by
watch.py and wrapper.py. No method raises for what the application answers, or does not answer.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Final

import aiohttp

from vram_agent.protocol import ReadyProbe

_PATIENCE_SECONDS: Final = 2.0


class Probes:
    """One HTTP client. Make it on the event loop; ``close`` it there."""

    def __init__(self) -> None:
        self._session = aiohttp.ClientSession(
            # A fresh connection for each question: the application may be another one by now.
            connector=aiohttp.TCPConnector(force_close=True),
            cookie_jar=aiohttp.DummyCookieJar(),
        )

    async def close(self) -> None:
        """Close the client."""
        await self._session.close()

    async def is_ready(self, probe: ReadyProbe) -> bool:
        """Whether each of the probe's addresses answers."""
        if probe.tcp and not await _takes_connections(probe.tcp):
            return False
        return not probe.http or 200 <= await self._ask("GET", probe.http) < 400

    async def is_idle(self, url: str) -> bool:
        """Whether it answers 200; an application that does not answer is not known to be idle."""
        return await self._ask("GET", url) == 200

    async def begin_drain(self, url: str) -> int:
        """POST the hook and return its status, 0 for none. Waits as long as the answer takes."""
        return await self._ask("POST", url, None)

    async def end_drain(self, url: str) -> int:
        """DELETE the hook and return its status, 0 for none."""
        return await self._ask("DELETE", url)

    async def _ask(
        self, method: str, url: str, patience_seconds: float | None = _PATIENCE_SECONDS
    ) -> int:
        timeout = aiohttp.ClientTimeout(total=patience_seconds)
        try:
            async with self._session.request(
                method, url, timeout=timeout, allow_redirects=False
            ) as answer:
                return answer.status
        except (aiohttp.ClientError, OSError, TimeoutError):
            return 0


async def _takes_connections(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        async with asyncio.timeout(_PATIENCE_SECONDS):
            _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
    except (OSError, TimeoutError):
        return False
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return True
