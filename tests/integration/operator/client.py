"""A plain client of the apiserver for tests, through ``kubectl proxy``: any kubeconfig works."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import aiohttp

T = TypeVar("T")
Object = dict[str, Any]
MERGE = "application/merge-patch+json"
APPS = "/apis/apps/v1"
CORE = "/api/v1"
VRAM = "/apis/vram.dev/v1alpha1"


class Refused(AssertionError):  # noqa: N818 - it is what a test did wrong
    def __init__(self, status: int, body: Any) -> None:
        super().__init__(f"{status}: {body}")
        self.status = status
        self.body = body


class Client:
    """Requests within one namespace."""

    def __init__(self, session: aiohttp.ClientSession, server: str, namespace: str) -> None:
        self.session = session
        self.server = server
        self.namespace = namespace

    def path(self, prefix: str, plural: str, *rest: str) -> str:
        return "/".join([prefix, "namespaces", self.namespace, plural, *rest])

    async def send(self, method: str, path: str, body: Any = None, content: str = "") -> Any:
        headers = {"Content-Type": content or "application/json"}
        async with self.session.request(
            method, self.server + path, json=body, headers=headers
        ) as response:
            answer = await response.json(content_type=None)
        if response.status >= 400:
            raise Refused(response.status, answer)
        return answer

    async def find(self, prefix: str, plural: str, name: str) -> Any:
        try:
            return await self.send("GET", self.path(prefix, plural, name))
        except Refused as error:
            if error.status == 404:
                return None
            raise

    async def items(self, prefix: str, plural: str) -> list[Any]:
        found: list[Any] = (await self.send("GET", self.path(prefix, plural)))["items"]
        return found

    async def create(self, prefix: str, plural: str, body: Object) -> Any:
        return await self.send("POST", self.path(prefix, plural), body)

    async def merge(self, path: str, body: Object) -> Any:
        return await self.send("PATCH", path, body, MERGE)

    async def delete(self, prefix: str, plural: str, name: str, **options: Any) -> None:
        try:
            await self.send("DELETE", self.path(prefix, plural, name), options)
        except Refused as error:
            if error.status not in {404, 409}:
                raise


async def eventually(
    check: Callable[[], Awaitable[T]], what: str, timeout_seconds: float = 30.0
) -> T:
    """Ask again until the answer is truthy; an assertion error that says what never came."""
    deadline = time.monotonic() + timeout_seconds
    while True:
        answer = await check()
        if answer:
            return answer
        assert time.monotonic() < deadline, f"not within {timeout_seconds} s: {what}"
        await asyncio.sleep(0.1)
