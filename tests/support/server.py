"""A ModelServer without models: records what serving/ asks for and answers what a test scripts."""

from __future__ import annotations

import asyncio
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

from vram_agent.backend import LoadedModel, Task, TaskKind, TaskPart, TaskResult, Tensor, TensorSpec
from vram_agent.errors import NoSuchModelError
from vram_agent.parts import Parts
from vram_agent.protocol import (
    ActionReport,
    ActionState,
    ActionStep,
    AgentConfig,
    AgentIdentity,
    AgentMode,
    DeviceKind,
    DeviceReport,
    MemoryClasses,
    MemoryReport,
    ModelReport,
    ModelSpec,
    ModelState,
    OffloadTier,
    PodIdentity,
    Report,
    ResidualSource,
    RestartRequest,
    Runtime,
    Tier,
)
from vram_agent.serving.base import ModelServer, ModelView

EPOCH = "2026-01-01T00:00:00Z"


def speech_view(name: str = "whisper", state: ModelState = ModelState.OFFLOADED) -> ModelView:
    """A model that transcribes and translates, in pinned host memory."""
    return _view(
        name,
        Runtime.WHISPER,
        state,
        LoadedModel(
            name=name,
            weight_bytes=1000,
            tasks=frozenset({TaskKind.TRANSCRIBE, TaskKind.TRANSLATE}),
        ),
    )


def speaking_view(name: str = "tts") -> ModelView:
    """A model that speaks, on the device."""
    loaded = LoadedModel(name=name, weight_bytes=500, tasks=frozenset({TaskKind.SPEECH}))
    return _view(name, Runtime.PYTHON, ModelState.RESIDENT, loaded)


def infer_view(name: str = "adder", state: ModelState = ModelState.RESIDENT) -> ModelView:
    """A model with the inputs a, b and the output sum."""
    shape = (-1,)
    return _view(
        name,
        Runtime.ONNX,
        state,
        LoadedModel(
            name=name,
            weight_bytes=2000,
            tasks=frozenset({TaskKind.INFER}),
            inputs=(
                TensorSpec(name="a", datatype="FP32", shape=shape),
                TensorSpec(name="b", datatype="FP32", shape=shape),
            ),
            outputs=(TensorSpec(name="sum", datatype="FP32", shape=shape),),
        ),
    )


def absent_view(name: str = "lazy", error: str | None = None) -> ModelView:
    """A model that was never loaded; with an error it is Failed."""
    state = ModelState.FAILED if error else ModelState.ABSENT
    return _view(name, Runtime.TORCH, state, None, error)


def _view(
    name: str,
    runtime: Runtime,
    state: ModelState,
    loaded: LoadedModel | None,
    error: str | None = None,
) -> ModelView:
    resident = state is ModelState.RESIDENT
    tiers = {ModelState.RESIDENT: Tier.VRAM, ModelState.OFFLOADED: Tier.PINNED_HOST}
    weight_bytes = loaded.weight_bytes if loaded else 0
    return ModelView(
        spec=ModelSpec(name=name, runtime=runtime, source=f"/models/{name}"),
        report=ModelReport(
            name=name,
            runtime=runtime,
            state=state,
            tier=tiers.get(state, Tier.DISK),
            vram_bytes=weight_bytes if resident else 0,
            host_bytes=weight_bytes,
            in_flight=0,
            queued=3 if resident else 0,
            needed_bytes=weight_bytes + 500 if resident else weight_bytes,
            error=error,
        ),
        loaded=loaded,
    )


@dataclass(frozen=True)
class Submission:
    """One call of ``submit``, its tensors copied."""

    model: str
    task: Task
    keep_alive_seconds: float | None


@dataclass
class FakeModelServer:
    """Answers ``result``, raises ``error`` if set, and waits for ``gate`` where a test closes it.

    ``calls`` are the control calls as (name, arguments). ``submitted`` is set at each ``submit``,
    ``abandoned`` when one was cancelled, ``control_begun`` and ``control_done`` when a model's
    control call reached ``control_gate`` and went through it: a test waits for events, never for
    time.
    """

    views: list[ModelView] = field(
        default_factory=lambda: [speech_view(), infer_view(), absent_view()]
    )
    result: TaskResult = field(default_factory=TaskResult)
    parts: list[TaskPart] = field(default_factory=list)
    """Given at once to whoever wants parts; the result follows when ``gate`` is open."""
    error: Exception | None = None
    live: bool = True
    ready: bool = True
    draining: bool = False
    submissions: list[Submission] = field(default_factory=list)
    calls: list[tuple[object, ...]] = field(default_factory=list)
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    submitted: asyncio.Event = field(default_factory=asyncio.Event)
    abandoned: asyncio.Event = field(default_factory=asyncio.Event)
    control_begun: asyncio.Event = field(default_factory=asyncio.Event)
    control_gate: asyncio.Event = field(default_factory=asyncio.Event)
    control_done: asyncio.Event = field(default_factory=asyncio.Event)
    sequence: int = 0
    action: ActionReport | None = None

    def __post_init__(self) -> None:
        self.gate.set()
        self.control_gate.set()

    def models(self) -> list[ModelView]:
        return list(self.views)

    def model(self, name: str) -> ModelView:
        for view in self.views:
            if view.spec.name == name:
                return view
        known = ", ".join(view.spec.name for view in self.views)
        raise NoSuchModelError(f"there is no model {name}; there are {known}")

    def report(self) -> Report:
        self.sequence += 1
        return Report(
            agent=AgentIdentity(
                version="0.1.0",
                mode=AgentMode.SERVE,
                boot_id="boot-1",
                epoch=2,
                started_at=EPOCH,
                pod=PodIdentity(namespace="speech", name="speech-0", uid="pod-uid"),
            ),
            sequence=self.sequence,
            observed_at=EPOCH,
            config_generation=3,
            devices=[
                DeviceReport(
                    uuid="GPU-1",
                    index=0,
                    kind=DeviceKind.CUDA,
                    total_bytes=80_000,
                    used_bytes=5_000,
                    exclusive=True,
                    baseline_bytes=200,
                    dirty=True,
                )
            ],
            memory=MemoryReport(
                source=ResidualSource.EXCLUSIVE,
                used_bytes=5_000,
                model_bytes=2_000,
                residual_bytes=3_000,
                host_bytes=3_000,
                classes=MemoryClasses(live_tensors=100, context_and_libraries=2_900),
                host_limit_bytes=64_000,
                host_available_bytes=48_000,
            ),
            models=[view.report for view in self.views],
            idle=True,
            idle_since=EPOCH,
            draining=self.draining,
            action=self.action,
        )

    def is_live(self) -> bool:
        return self.live

    def is_ready(self) -> bool:
        return self.ready

    def admit(self) -> AbstractContextManager[None]:
        return nullcontext()

    async def submit(
        self,
        model: str,
        task: Task,
        *,
        keep_alive_seconds: float | None = None,
        is_admitted: bool = False,
        parts: Parts | None = None,
    ) -> TaskResult:
        assert is_admitted  # a drain that began while a body came in refuses nothing
        self.submissions.append(Submission(model, copied(task), keep_alive_seconds))
        self.submitted.set()
        if parts is not None:
            for part in self.parts:
                parts.put(part)
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.abandoned.set()
            raise
        self._raise_scripted()
        return self.result

    async def load(self, model: str) -> ModelReport:
        return await self._model_call("load", model)

    async def offload(self, model: str, tier: OffloadTier | None = None) -> ModelReport:
        return await self._model_call("offload", model, tier)

    async def unload(self, model: str) -> ModelReport:
        return await self._model_call("unload", model)

    async def scrub(self) -> Report:
        return await self._report_call("scrub")

    async def drain(self) -> Report:
        self.draining = True
        return await self._report_call("drain")

    def resume(self) -> Report:
        self.calls.append(("resume",))
        self.draining = False
        return self.report()

    async def apply_config(self, config: AgentConfig) -> Report:
        return await self._report_call("apply_config", config)

    def recycle(self, request: RestartRequest) -> ActionReport:
        return self._act(ActionStep.RECYCLE, request)

    def restart(self, request: RestartRequest) -> ActionReport:
        return self._act(ActionStep.IN_PLACE, request)

    async def _model_call(self, name: str, model: str, *arguments: object) -> ModelReport:
        self.calls.append((name, model, *arguments))
        self.control_begun.set()
        await self.control_gate.wait()
        self.control_done.set()
        self._raise_scripted()
        return self.model(model).report

    async def _report_call(self, *call: object) -> Report:
        self.calls.append(call)
        self._raise_scripted()
        return self.report()

    def _act(self, step: ActionStep, request: RestartRequest) -> ActionReport:
        self.calls.append((step, request))
        self._raise_scripted()
        if self.action is None or self.action.restart_id != request.restart_id:
            self.action = ActionReport(
                restart_id=request.restart_id, step=step, state=ActionState.DRAINING, at=EPOCH
            )
        return self.action

    def _raise_scripted(self) -> None:
        if self.error is not None:
            raise self.error


def copied(task: Task) -> Task:
    """Return the task with tensors that outlive the request."""
    tensors = [
        Tensor(name=t.name, datatype=t.datatype, shape=t.shape, data=bytes(t.data))
        for t in task.tensors
    ]
    return Task(kind=task.kind, parameters=dict(task.parameters), tensors=tensors)


_: type[ModelServer] = FakeModelServer
