"""Looks at the application, again and again: is it ready, is it idle, what does it hold.

Why it exists: a report must not wait for a large process's figures or for an application that does
not answer, so it reads what the last look found. Called by wrapper.py, which owns the loop's tasks.
It decides nothing of its own: core/quiet.py does.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import datetime
from typing import Final

from vram_agent.core.quiet import UNMEASURED, Quiet, compute_tree_report
from vram_agent.core.wrapping import ChildState
from vram_agent.protocol import DeviceReport, MemoryReport, RunPolicy
from vram_agent.supervision.ports import Clock
from vram_agent.wrapping.keeper import Keeper
from vram_agent.wrapping.measuring import Measurement, Meter
from vram_agent.wrapping.probes import Probes

LOOK_SECONDS: Final = 1.0
_STARTING_SECONDS: Final = 0.05
"""How often an application that starts is asked; each is downtime of a recycle."""


class Watch:
    """The last look. ``meter`` is None until the devices are known."""

    def __init__(self, policy: RunPolicy, keeper: Keeper, probes: Probes, clock: Clock) -> None:
        self._policy = policy
        self._keeper = keeper
        self._probes = probes
        self._clock = clock
        self._quiet = Quiet(rule=policy.idle)
        self._measurement: Measurement | None = None
        self._looking = asyncio.Lock()
        self._is_ready = False
        self._idle_changed = asyncio.Event()
        self.meter: Meter | None = None
        self.observed_at: datetime | None = None
        """When the last look was; an agent whose looks hang must not seem to report anew."""
        self.idle_since: datetime | None = None

    @property
    def has_probe(self) -> bool:
        """Whether the application can be asked if it is ready."""
        return bool(self._policy.ready.http or self._policy.ready.tcp)

    @property
    def is_ready(self) -> bool:
        """Whether the application runs and its last answer was that it takes requests."""
        return self._is_ready and self._keeper.state is ChildState.RUNNING

    @property
    def is_idle(self) -> bool:
        """Whether the application has nothing to do, as far as can be seen."""
        return self._quiet.is_idle

    def devices(self) -> list[DeviceReport]:
        """Return the devices as of the last look."""
        return [] if self._measurement is None else self._measurement.devices

    def memory(self) -> MemoryReport:
        """Return the memory as of the last look."""
        memory = UNMEASURED if self._measurement is None else self._measurement.memory
        return compute_tree_report(memory, self._quiet.baseline_bytes)

    def note_start(self) -> None:
        """Take note of a new process: nothing is known of it."""
        self._take(self._quiet.renewed())
        self.note_resumed()

    def note_resumed(self) -> None:
        """Take note that it is to say anew that it is ready; without a probe it is at once."""
        self._is_ready = False
        if not self.has_probe:
            self._is_ready = True
            self._keeper.note_ready()

    async def keep_asking(self) -> None:
        """Ask whether it is ready until cancelled; only where there is a probe."""
        while True:
            pid = self._keeper.pid
            is_ready = bool(pid) and await self._probes.is_ready(self._policy.ready)
            if pid == self._keeper.pid:
                self._is_ready = is_ready
                if is_ready:
                    self._keeper.note_ready()
            is_starting = self._keeper.state is ChildState.STARTING
            await asyncio.sleep(_STARTING_SECONDS if is_starting else LOOK_SECONDS)

    async def keep_looking(self) -> None:
        """Measure and ask whether it is idle until cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(LOOK_SECONDS)

    async def look(self) -> None:
        """Measure once and take note of it."""
        async with self._looking:
            if self.meter is None:
                return
            pid = self._keeper.pid
            url = self._policy.idle.http
            answer = await self._probes.is_idle(url) if url and pid else None
            self._measurement = await asyncio.to_thread(self.meter.measure, self._clock.monotonic())
            self.observed_at = self._clock.now()
            if pid != self._keeper.pid:
                return  # half of the figures are another process's
            match self._keeper.state:
                case ChildState.RUNNING if self._is_ready:
                    self._take(self._quiet.noted(self._measurement.look, answer=answer))
                case ChildState.DRAINING:
                    # A drain is waited for, and teaches nothing: the baseline stays.
                    baseline = self._quiet.baseline_bytes
                    noted = self._quiet.noted(self._measurement.look, answer=answer)
                    has_learned = self._quiet.has_learned
                    self._take(replace(noted, baseline_bytes=baseline, has_learned=has_learned))
                case _:
                    self._take(self._quiet.disturbed())
            self._idle_changed.set()

    async def wait_idle(self) -> None:
        """Return when it is idle, by a look that is yet to come, or has no process."""
        while True:
            self._idle_changed.clear()
            await self._idle_changed.wait()
            if self._quiet.is_idle or not self._keeper.pid:
                return

    def _take(self, quiet: Quiet) -> None:
        self._quiet = quiet
        if not quiet.is_idle:
            self.idle_since = None
        elif self.idle_since is None:
            self.idle_since = self._clock.now()
