"""What HTTP asks of the supervisor; serving/ knows nothing else of it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from vram_agent.backend import LoadedModel, Task, TaskResult
from vram_agent.parts import Parts
from vram_agent.protocol import (
    ActionReport,
    AgentConfig,
    ModelReport,
    ModelSpec,
    OffloadTier,
    Report,
    RestartRequest,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelView:
    """A model as a client sees it: its spec, its state, and its signature once it was loaded."""

    spec: ModelSpec
    report: ModelReport
    loaded: LoadedModel | None
    is_loading_eagerly: bool = False
    """It is Eager, and the load that this asks for at the agent's start has not ended."""

    @property
    def is_ready(self) -> bool:
        """A lazy model that can load counts as ready; Failed does not, nor an eager load."""
        return self.report.state != "Failed" and not self.is_loading_eagerly


class ModelServer(Protocol):
    """The supervisor as serving/ sees it. Every method runs on the supervisor's event loop."""

    def models(self) -> list[ModelView]:
        """Return every model of the config, in its order."""
        ...

    def model(self, name: str) -> ModelView:
        """Return one model. Raises NoSuchModelError."""
        ...

    def report(self) -> Report:
        """Measure and return the report; each call counts ``sequence`` up."""
        ...

    def is_live(self) -> bool:
        """Whether the supervisor's own loops run."""
        ...

    def is_ready(self) -> bool:
        """Whether new requests are taken: started, not draining."""
        ...

    def admit(self) -> AbstractContextManager[None]:
        """Hold a request's place in the house, from its head to the end of its answer.

        A drain before the process ends waits for it. Raises DrainingError, at once.
        """
        ...

    async def submit(
        self,
        model: str,
        task: Task,
        *,
        keep_alive_seconds: float | None = None,
        is_admitted: bool = False,
        parts: Parts | None = None,
    ) -> TaskResult:
        """Queue the task, bring the model into VRAM, run it and return its result.

        ``keep_alive_seconds`` overrides afterTask: 0 offload at once, -1 keep, None the spec's.
        ``is_admitted``: within ``admit``, so that a drain that began since refuses nothing.
        ``parts`` get what of the result is ready before the rest, from models that can. Raises the
        types of errors.py. Cancelling gives up the place in the queue, and a task that gives parts.
        """
        ...

    async def load(self, model: str) -> ModelReport:
        """Bring a model into VRAM without a task."""
        ...

    async def offload(self, model: str, tier: OffloadTier | None = None) -> ModelReport:
        """Take a model out of VRAM once no task runs on it; None = the spec's offloadTier."""
        ...

    async def unload(self, model: str) -> ModelReport:
        """Drop a model to the Disk tier once no task runs on it."""
        ...

    async def scrub(self) -> Report:
        """Scrub every GPU process."""
        ...

    async def drain(self) -> Report:
        """Take no new requests; return when all accepted ones have been answered."""
        ...

    def resume(self) -> Report:
        """Take requests again."""
        ...

    async def apply_config(self, config: AgentConfig) -> Report:
        """Take a new config without a restart; models that changed are unloaded first.

        Raises BadInputError where a field cannot be changed live (listen, device, control).
        """
        ...

    def recycle(self, request: RestartRequest) -> ActionReport:
        """Begin to drain and then end and respawn the GPU processes; returns at once.

        The same restart ID again changes nothing and returns the same action.
        """
        ...

    def restart(self, request: RestartRequest) -> ActionReport:
        """Begin to drain, then let PID 1 exit 0; returns at once; the same ID changes nothing."""
        ...
