"""Tries again while the apiserver does not answer, and says so once.

Called by `operate` and `acting` for the steps that a replica cannot do without.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import TypeVar

import structlog

from vram_operator.queue import RetryError, retry_seconds

LONGEST_DELAY_SECONDS = 10.0

T = TypeVar("T")
_log = structlog.get_logger(__name__)


async def retried(what: str, attempt: Callable[[], Awaitable[T]]) -> T:
    """Return what ``attempt`` returns in the end; RetryError is waited out with back-off."""
    failures = 0
    while True:
        try:
            result = await attempt()
        except RetryError as error:
            failures += 1
            if failures == 1:
                _log.warning(f"cannot {what}; trying until I can", error=str(error))
            delay = min(LONGEST_DELAY_SECONDS, retry_seconds(failures, random.random()))  # noqa: S311
            await asyncio.sleep(delay)
        else:
            if failures:
                _log.info(f"could {what} after all", attempts=failures + 1)
            return result
