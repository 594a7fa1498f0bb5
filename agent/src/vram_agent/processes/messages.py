"""What the supervisor asks of its processes, and what they answer: msgpack over channel.py.

Why it exists: both ends of a channel share one definition of each message. Small tensors travel
in their headers; else the headers do, and the bytes lie one after the other in a sealed memfd.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import Struct

from vram_agent import errors
from vram_agent.backend import LoadedModel, TaskKind, Tensor, TensorSpec
from vram_agent.devices.base import MemoryFigures, Placement
from vram_agent.errors import AgentError
from vram_agent.processes.channel import map_sealed, seal_bytes
from vram_agent.protocol import LoadProgress, ModelSpec

TENSOR_ALIGNMENT_BYTES = 64
MAX_INLINE_TENSOR_BYTES = 32 * 1024
"""Of all tensors of a message: so much is copied sooner than a memfd is made, sealed and mapped."""


class TensorHeader(Struct, frozen=True, kw_only=True):
    """A tensor; without ``data`` its bytes begin at ``offset`` of the memfd beside the message."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    offset: int = 0
    nbytes: int = 0
    data: bytes = b""


class Load(Struct, frozen=True, kw_only=True, tag="load"):
    """To a template: load a model into the arena. Answer: Loaded."""

    spec: ModelSpec


class Unload(Struct, frozen=True, kw_only=True, tag="unload"):
    """To a template: drop a model. Answer: Done."""

    name: str


class Fork(Struct, frozen=True, kw_only=True, tag="fork"):
    """To a template, with the GPU process's end of its channel. Answer: Forked or Refused."""

    placement: Placement
    threads: int


class Become(Struct, frozen=True, kw_only=True, tag="become"):
    """To a template without a fork: be the GPU process yourself, on this channel. Answer: Done."""

    placement: Placement
    threads: int


class Restore(Struct, frozen=True, kw_only=True, tag="restore"):
    """To a GPU process. Answer: MovedTo."""

    name: str


class Offload(Struct, frozen=True, kw_only=True, tag="offload"):
    """To a GPU process. Answer: MovedTo."""

    name: str


class Run(Struct, frozen=True, kw_only=True, tag="run"):
    """To a GPU process, with a memfd when there are large tensors. Answer: Ran."""

    name: str
    kind: TaskKind
    parameters: dict[str, Any]
    tensors: list[TensorHeader]
    stream: int = 0
    """What Taken and Cancel name this task by, and that Partial answers are wanted; 0: none."""


class Taken(Struct, frozen=True, kw_only=True, tag="taken"):
    """To a GPU process: so many parts of a stream have been taken. No answer."""

    stream: int
    parts: int


class Cancel(Struct, frozen=True, kw_only=True, tag="cancel"):
    """To a GPU process: nobody reads the stream any more. No answer of its own."""

    stream: int


class Scrub(Struct, frozen=True, kw_only=True, tag="scrub"):
    """To a GPU process. Answer: Scrubbed."""


Request = Load | Unload | Fork | Become | Restore | Offload | Run | Taken | Cancel | Scrub


class Loaded(Struct, frozen=True, kw_only=True, tag="loaded"):
    """A model lies in the arena, which now takes ``arena_bytes``."""

    weight_bytes: int
    arena_bytes: int
    tasks: list[TaskKind]
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    message: str = ""

    def as_model(self, name: str) -> LoadedModel:
        """Return what the supervisor knows of the model."""
        return LoadedModel(
            name=name,
            weight_bytes=self.weight_bytes,
            tasks=frozenset(self.tasks),
            inputs=tuple(self.inputs),
            outputs=tuple(self.outputs),
            message=self.message,
        )


class Forked(Struct, frozen=True, kw_only=True, tag="forked"):
    """The GPU process runs; its pidfd comes with this."""

    pid: int


class Refused(Struct, frozen=True, kw_only=True, tag="refused"):
    """A fork would not be safe, and why."""

    reason: str


class MovedTo(Struct, frozen=True, kw_only=True, tag="moved"):
    """A model was restored or offloaded; it now holds ``vram_bytes`` on the device.

    ``scrubbed_bytes``: of an offload, the process's device memory before and after the scrub.
    """

    vram_bytes: int
    seconds: float
    figures: MemoryFigures
    message: str = ""
    scrubbed_bytes: tuple[int, int] | None = None


class Ran(Struct, frozen=True, kw_only=True, tag="ran"):
    """A task's result, with a memfd when there are large tensors."""

    values: dict[str, Any]
    tensors: list[TensorHeader]
    figures: MemoryFigures


class ScrubbedTo(Struct, frozen=True, kw_only=True, tag="scrubbed"):
    """What a scrub gave back, in bytes of device memory."""

    before_bytes: int
    after_bytes: int
    figures: MemoryFigures


class Done(Struct, frozen=True, kw_only=True, tag="done"):
    """It is done."""

    arena_bytes: int = 0


class Failure(Struct, frozen=True, kw_only=True, tag="failure"):
    """An error of errors.py by the name of its class."""

    error: str
    message: str
    param: str | None = None
    retry_after_seconds: float | None = None


_ERRORS = {
    name: kind
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, AgentError)
}


def read_failure(failure: Failure) -> AgentError:
    """Return the error that a failure stands for; one of a later version is an AgentError."""
    kind = _ERRORS.get(failure.error, AgentError)
    if kind is errors.BadInputError:
        return errors.BadInputError(failure.message, param=failure.param)
    return kind(failure.message, retry_after_seconds=failure.retry_after_seconds)


class Exited(Struct, frozen=True, kw_only=True, tag="exited"):
    """From a template, unasked (id 0): its GPU process has ended and is reaped."""

    pid: int
    status: int


class Progressed(Struct, frozen=True, kw_only=True, tag="progressed"):
    """How far a load or restore has come; with its call's number, any number before its answer."""

    progress: LoadProgress


class Partial(Struct, frozen=True, kw_only=True, tag="partial"):
    """A part of a task's result, before Ran; with a memfd when there are tensors."""

    values: dict[str, Any]
    tensors: list[TensorHeader]


Reply = (
    Loaded
    | Forked
    | Refused
    | MovedTo
    | Ran
    | ScrubbedTo
    | Done
    | Failure
    | Exited
    | Progressed
    | Partial
)


class Call(Struct, frozen=True):
    """A request with the number that its answer will carry."""

    id: int
    request: Request


class Answer(Struct, frozen=True):
    """An answer to the call of that number; 0 for what nobody asked."""

    id: int
    reply: Reply


_encoder = msgspec.msgpack.Encoder()
_call_decoder = msgspec.msgpack.Decoder(Call)
_answer_decoder = msgspec.msgpack.Decoder(Answer)


def encode(message: Call | Answer) -> bytes:
    """Return a message as bytes. Raises TypeError for values that msgpack cannot carry."""
    return _encoder.encode(message)


def decode_call(body: bytes) -> Call:
    """Return the call in a packet's body. Raises msgspec.DecodeError."""
    return _call_decoder.decode(body)


def decode_answer(body: bytes) -> Answer:
    """Return the answer in a packet's body. Raises msgspec.DecodeError."""
    return _answer_decoder.decode(body)


def pack_tensors(tensors: Sequence[Tensor]) -> tuple[list[TensorHeader], list[int]]:
    """Return the headers, and the sealed memfd with the bytes (no descriptor for small tensors).

    The caller owns the descriptor.
    """
    sizes = [memoryview(tensor.data).nbytes for tensor in tensors]
    if sum(sizes) <= MAX_INLINE_TENSOR_BYTES:
        return [
            TensorHeader(
                name=one.name, datatype=one.datatype, shape=tuple(one.shape), data=bytes(one.data)
            )
            for one in tensors
        ], []
    headers: list[TensorHeader] = []
    parts: list[bytes | memoryview] = []
    offset = 0
    for tensor, nbytes in zip(tensors, sizes, strict=True):
        headers.append(
            TensorHeader(
                name=tensor.name,
                datatype=tensor.datatype,
                shape=tuple(tensor.shape),
                offset=offset,
                nbytes=nbytes,
            )
        )
        padding = -nbytes % TENSOR_ALIGNMENT_BYTES
        parts += [tensor.data, bytes(padding)]
        offset += nbytes + padding
    return headers, [seal_bytes(parts)]


def unpack_tensors(headers: Sequence[TensorHeader], fds: Sequence[int]) -> list[Tensor]:
    """Return the tensors of a message; their data are views that may be written to.

    Closes the descriptors. Raises BrokenPacketError.
    """
    try:
        data = map_sealed(fds[0]) if fds else None
    finally:
        for fd in fds:
            os.close(fd)
    return [
        Tensor(
            name=header.name,
            datatype=header.datatype,
            shape=header.shape,
            data=memoryview(bytearray(header.data))
            if data is None
            else data[header.offset : header.offset + header.nbytes],
        )
        for header in headers
    ]
