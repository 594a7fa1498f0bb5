"""Speaks to the agents: reads their reports and sends them signed control calls.

Called by `poller` and `apply`. Nothing here retries or decides: an answer, whatever it is, becomes
a fact that the plan weighs. A report is believed only if it is of the protocol that we speak and
names the pod that we asked, since the address of a pod that is gone may belong to another.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import aiohttp
import msgspec
from vram_agent.protocol import REPORT_PROTOCOL, Report

CONNECT_TIMEOUT_SECONDS = 2.0
REPORT_TIMEOUT_SECONDS = 5.0
# A new config answers when it is applied, the others at once.
CONFIG_TIMEOUT_SECONDS = 30.0
CONTROL_TIMEOUT_SECONDS = 10.0
LARGEST_ANSWER_BYTES = 4 * 1024 * 1024

_reports = msgspec.json.Decoder(Report)


class AgentError(Exception):
    """The agent gave no usable report; the message says why, for a condition."""


@dataclass(frozen=True)
class AgentAddress:
    """Where the agent of one pod listens, and which pod that is."""

    ip: str
    port: int
    pod_uid: str

    @property
    def url(self) -> str:
        """The base of its control calls."""
        host = f"[{self.ip}]" if ":" in self.ip else self.ip
        return f"http://{host}:{self.port}"


@dataclass(frozen=True)
class Answer:
    """What came back from a control call. ``status`` 0: the agent could not be reached."""

    status: int
    message: str = ""


class TokenSource(Protocol):
    """Makes the token of one call."""

    def token(self, pod_uid: str, act: str, body: bytes) -> str:
        """Return a token for ``act``, which is method and path, with this body."""
        ...


class AgentClient:
    """One session to all agents. Cheap calls, safe to run side by side.

    ``signer`` is asked for at each call, since the key is known only once this replica leads; what
    it raises when it does not lead any more, `call` raises.
    """

    def __init__(self, session: aiohttp.ClientSession, signer: Callable[[], TokenSource]) -> None:
        self._session = session
        self._signer = signer

    async def report(self, agent: AgentAddress) -> Report:
        """Return what the agent says of itself now. Raises AgentError."""
        timeout = aiohttp.ClientTimeout(
            total=REPORT_TIMEOUT_SECONDS, sock_connect=CONNECT_TIMEOUT_SECONDS
        )
        try:
            async with self._session.get(
                f"{agent.url}/report", timeout=timeout, allow_redirects=False
            ) as response:
                content = await _read(response)
                status = response.status
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise AgentError(f"{agent.url} does not answer: {_name(error)}") from error
        if status != 200:
            raise AgentError(f"{agent.url}/report answered {status}")
        return parse_report(content, f"{agent.url}/report", agent.pod_uid)

    async def call(self, agent: AgentAddress, method: str, path: str, body: Any) -> Answer:
        """Send one signed control call and return what came back. Never raises for the agent."""
        content = json.dumps(body, separators=(",", ":")).encode()
        token = self._signer().token(agent.pod_uid, f"{method} {path}", content)
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        patience = CONFIG_TIMEOUT_SECONDS if method == "PUT" else CONTROL_TIMEOUT_SECONDS
        timeout = aiohttp.ClientTimeout(total=patience, sock_connect=CONNECT_TIMEOUT_SECONDS)
        try:
            async with self._session.request(
                method,
                agent.url + path,
                data=content,
                headers=headers,
                timeout=timeout,
                allow_redirects=False,
            ) as response:
                return Answer(response.status, _message(await _read(response)))
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            return Answer(0, f"{agent.url} does not answer: {_name(error)}")


def parse_report(content: bytes, where: str, pod_uid: str) -> Report:
    """Return a report that may be believed to be of the pod. Raises AgentError."""
    try:
        report = _reports.decode(content)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise AgentError(f"{where} is no report: {error}") from error
    if report.protocol != REPORT_PROTOCOL:
        raise AgentError(f"{where} speaks protocol {report.protocol!r}, not {REPORT_PROTOCOL!r}")
    if report.agent.pod.uid and report.agent.pod.uid != pod_uid:
        raise AgentError(f"{where} is the agent of another pod, {report.agent.pod.name}")
    return report


async def _read(response: aiohttp.ClientResponse) -> bytes:
    content = await response.content.read(LARGEST_ANSWER_BYTES + 1)
    chunks = [content]
    size = len(content)
    while content and size <= LARGEST_ANSWER_BYTES:
        content = await response.content.read(LARGEST_ANSWER_BYTES + 1 - size)
        chunks.append(content)
        size += len(content)
    if size > LARGEST_ANSWER_BYTES:
        raise aiohttp.ClientPayloadError(f"more than {LARGEST_ANSWER_BYTES} bytes")
    return b"".join(chunks)


def _message(content: bytes) -> str:
    """Return the words of an error answer, whatever its shape, shortened for a condition."""
    text = content[:2000].decode(errors="replace").strip()
    try:
        parsed = json.loads(content)
    except ValueError:
        return text[:500]
    if isinstance(parsed, dict):
        error = parsed.get("error", parsed.get("message", ""))
        found = error.get("message", "") if isinstance(error, dict) else error
        return str(found)[:500]
    return text[:500]


def _name(error: BaseException) -> str:
    return str(error) or type(error).__name__
