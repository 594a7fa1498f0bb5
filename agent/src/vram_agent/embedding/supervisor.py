"""The supervisor of models that application code registers.

Why it exists: a few calls mean something else where no process can be ended and where the models
are the application's own. All else is the supervisor's, unchanged. Made by ``core.py``, called by
it and by the control port. It must not know how models move.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from msgspec.structs import replace

from vram_agent.embedding.uses import Uses
from vram_agent.errors import BadInputError, NotSupportedError
from vram_agent.protocol import (
    ActionReport,
    AgentConfig,
    ModelReport,
    ModelSpec,
    ModelState,
    OffloadTier,
    Report,
    Residency,
    RestartRequest,
)
from vram_agent.supervision.ports import Surroundings
from vram_agent.supervisor import Supervisor

_HAS_ITS_MEMORY = frozenset({ModelState.RESIDENT, ModelState.RESTORING, ModelState.LOADING})


class EmbeddedSupervisor(Supervisor):
    """Knows the uses behind its tasks; begins without a model and gains them one by one."""

    def __init__(self, config: AgentConfig, surroundings: Surroundings) -> None:
        super().__init__(config, surroundings)
        self.uses = Uses(self.submit, self._may_join)
        self._config = config
        self._calls = 0

    async def register(self, spec: ModelSpec) -> None:
        """Add a model. Raises ValueError where there is one of that name."""
        if any(one.name == spec.name for one in self._config.models):
            raise ValueError(f"a model named {spec.name!r} is registered already")
        await self._apply(replace(self._config, models=[*self._config.models, spec]))

    async def apply_config(self, config: AgentConfig) -> Report:
        """Take limits and, for models that are registered, when they are in VRAM and their size.

        What a model is and where it comes from is the application's. Raises BadInputError for a
        model that is not registered, and for what only a restart changes.
        """
        registered = {spec.name: spec for spec in self._config.models}
        unknown = [spec.name for spec in config.models if spec.name not in registered]
        if unknown:
            known = ", ".join(registered) or "none"
            raise BadInputError(
                f"models: the application registers its models itself and has no "
                f"{', '.join(unknown)}; it has: {known}",
                param="models",
            )
        wanted = {spec.name: spec for spec in config.models}
        models = [_with_wishes(spec, wanted.get(spec.name)) for spec in self._config.models]
        return await self._apply(replace(config, models=models))

    def recycle(self, request: RestartRequest) -> ActionReport:
        """Raise NotSupportedError: the models' process is the application's."""
        raise NotSupportedError(
            f"recycle {request.restart_id}: the models live in the application's own process, "
            f"which only a restart ends"
        )

    async def load(self, model: str) -> ModelReport:
        """Bring a model into VRAM; it then stays as after keep-alive -1."""
        async with self._alone_in_line():
            return await super().load(model)

    async def offload(self, model: str, tier: OffloadTier | None = None) -> ModelReport:
        """Take a model out of VRAM once nobody uses it; without a template Host means Disk."""
        async with self._alone_in_line():
            return await super().offload(model, tier)

    async def unload(self, model: str) -> ModelReport:
        """Drop a model once nobody uses it; its next use calls the factory."""
        async with self._alone_in_line():
            return await super().unload(model)

    async def scrub(self) -> Report:
        """Empty caches, each model's once nobody uses it."""
        async with self._alone_in_line():
            return await super().scrub()

    def report(self) -> Report:
        """Measure and return the report; in flight is every use, also those that share a lease."""
        report = super().report()
        models = [
            replace(one, in_flight=max(one.in_flight, self.uses.count(one.name)))
            for one in report.models
        ]
        return replace(report, models=models)

    @asynccontextmanager
    async def _alone_in_line(self) -> AsyncIterator[None]:
        """Let nobody join a use while a call waits: the call's turn would never come."""
        self._calls += 1
        try:
            yield
        finally:
            self._calls -= 1
            self.uses.settle()

    async def _apply(self, config: AgentConfig) -> Report:
        # Before it waits: a registration that comes meanwhile must build on this one.
        before, self._config = self._config, config
        try:
            return await super().apply_config(config)
        except BadInputError:
            self._config = before
            raise

    def _may_join(self, name: str) -> bool:
        """Whether a new use may share the lease of those that go on.

        1. The agent drains: no new uses. 2. A call waits for its turn. 3. Another model waits for
        memory, which this one may have to give.
        """
        return (
            # 1
            self.is_ready()
            # 2
            and not self._calls
            # 3
            and not any(
                view.report.queued and view.report.state not in _HAS_ITS_MEMORY
                for view in self.models()
                if view.spec.name != name
            )
        )


def embedded_residency(residency: Residency) -> Residency:
    """Return a residency in the tiers that there are: without a template, Host means Disk."""

    def sunk(tier: OffloadTier) -> OffloadTier:
        return OffloadTier.DISK if tier is OffloadTier.HOST else tier

    return replace(
        residency,
        offload_tier=sunk(residency.offload_tier),
        idle_tier=sunk(residency.idle_tier),
    )


def _with_wishes(spec: ModelSpec, wanted: ModelSpec | None) -> ModelSpec:
    if wanted is None:
        return spec
    return replace(
        spec,
        vram=wanted.vram,
        priority=wanted.priority,
        residency=embedded_residency(wanted.residency),
    )
