"""Calls to agents that a visit does not wait for: a new config, and a knock.

Why it exists: an agent answers ``PUT /config`` when the tasks of the models that it replaces have
ended, which may take minutes, and meanwhile its workload and all others are to be looked after.
Called by `apply`. At most one call to a pod is under way; a newer one takes its place.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime

import structlog

from vram_operator.cache import Key
from vram_operator.clock import Clock
from vram_operator.core.plan import Knock, PushConfig
from vram_operator.core.snapshot import PushAnswer
from vram_operator.facts import REFUSING, Facts
from vram_operator.pod_actions import PodActions
from vram_operator.queue import RetryError

_log = structlog.get_logger(__name__)


class SlowCalls:
    """What is under way, by the UID of the pod. ``on_answer`` is told of the workload after it."""

    def __init__(self, pods: PodActions, facts: Facts, clock: Clock) -> None:
        self._pods = pods
        self._facts = facts
        self._clock = clock
        self._running: dict[str, asyncio.Task[None]] = {}
        self.on_answer: Callable[[Key], None] = lambda _: None

    def begin(self, key: Key, action: PushConfig | Knock) -> None:
        """Begin a call for a workload; returns at once."""
        uid, now = action.pod.uid, self._clock.now()
        # It counts as made, so that none is planned until the answer comes.
        if isinstance(action, PushConfig):
            self._facts.record_push(uid, self._pending(action, now))
        else:
            self._facts.record_word(uid, 0, now)
        before = self._running.get(uid)
        if before is not None:
            before.cancel()
        self._running[uid] = asyncio.create_task(self._carry_out(key, action))

    def _pending(self, action: PushConfig, now: datetime) -> PushAnswer:
        """Return what is known of a push under way; why the config was refused stays said."""
        generation = action.config.metadata.generation
        known = self._facts.agent(action.pod.uid).push
        if known is None or known.generation != generation or known.status in REFUSING:
            return PushAnswer(generation=generation, at=now, status=0)
        return replace(known, at=now)

    async def _carry_out(self, key: Key, action: PushConfig | Knock) -> None:
        uid = action.pod.uid
        try:
            await self._pods.carry_out(key[0], action)
        except RetryError as error:
            # It may not act any more, or the pod is another: the plan asks for it again.
            _log.info("call to an agent not made", pod=action.pod.name, error=str(error))
        except Exception:
            # What the agent answers is no exception; this is ours, and nobody waits for it.
            _log.exception("call to an agent failed", namespace=key[0], pod=action.pod.name)
        finally:
            if self._running.get(uid) is asyncio.current_task():
                del self._running[uid]
        self.on_answer(key)
