"""The template: loads the models of a group in host memory, and forks GPU processes.

Why it exists: a fork of a process that has its libraries imported and its weights in shared memory
serves its first result in a fraction of a second; a fresh process takes many. Executed by the
supervisor as ``python -m vram_agent.processes.template FD PARENT_PID``; FD is its channel. It keeps
one thread, never initialises CUDA and never makes an ONNX session, since none of these survives a
fork; before each fork it checks that, and refuses if a library broke it. It ends with its parent.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import select
import signal
import socket
import sys
from functools import partial

from vram_agent.engine.arena import Arena
from vram_agent.engine.scrub import drop_tracebacks, trim_malloc
from vram_agent.errors import AgentError, ModelFailedError
from vram_agent.processes.channel import Channel, ChannelClosedError, Packet, close_fds
from vram_agent.processes.gpu import GpuProcess, describe_failure
from vram_agent.processes.linux import (
    die_with_parent,
    list_foreign_threads,
    list_open_devices,
    name_process,
)
from vram_agent.processes.messages import (
    Answer,
    Become,
    Done,
    Exited,
    Failure,
    Fork,
    Forked,
    Load,
    Loaded,
    Progressed,
    Refused,
    Reply,
    Unload,
    decode_call,
    encode,
)
from vram_agent.processes.orphans import name_fork_of
from vram_agent.progress import measuring, step
from vram_agent.protocol import LoadProgress, LoadStep, ModelSpec
from vram_agent.runtimes.base import HostedModel
from vram_agent.runtimes.registry import find_runtime


def explain_unsafe_fork() -> str:
    """Return why a fork of this process could not use its libraries; empty when it could."""
    opened = [name for name in list_open_devices() if name.startswith("/dev/nvidia-uvm")]
    if opened:
        return f"a library initialised CUDA while loading ({opened[0]} is open)"
    if "torch" in sys.modules:
        from vram_agent.engine.cuda import is_cuda_initialized  # noqa: PLC0415 - if torch is there

        if is_cuda_initialized():
            return "a library initialised CUDA while loading (torch has a context)"
    threads = list_foreign_threads()
    if threads:
        return f"a library started threads while loading ({', '.join(threads)})"
    return ""


class Template:
    """Models by name, their arena, and at most one GPU process."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._arena = Arena(str(os.getpid()))
        self._models: dict[str, HostedModel] = {}
        self._gpu: tuple[int, int] | None = None
        self._become: Become | None = None

    def serve(self) -> None:
        """Answer calls until the channel ends, or be the GPU process when told to."""
        with contextlib.suppress(ChannelClosedError):
            while self._become is None:
                self._wait()
            # Only now, so that the template's own frames are off the stack of the GPU process.
            placement, threads = self._become.placement, self._become.threads
            name_process("vram-gpu")
            GpuProcess(self._channel, self._models, placement, threads).serve()

    def _wait(self) -> None:
        poll = select.poll()
        poll.register(self._channel.fileno(), select.POLLIN)
        if self._gpu is not None:
            poll.register(self._gpu[1], select.POLLIN)
        ready = {fd for fd, _ in poll.poll()}
        # The end first: the supervisor's next call may already rest on it.
        if self._gpu is not None and self._gpu[1] in ready:
            self._reap()
        if self._channel.fileno() in ready:
            self._answer(self._channel.receive())

    def _reap(self) -> None:
        assert self._gpu is not None  # noqa: S101 - asked for only while there is one
        pid, pidfd = self._gpu
        self._gpu = None
        os.close(pidfd)
        _, status = os.waitpid(pid, 0)
        self._channel.send(encode(Answer(0, Exited(pid=pid, status=status))))

    def _answer(self, packet: Packet) -> None:
        call = decode_call(packet.body)
        request = call.request
        reply: Reply
        fds: list[int] = []
        try:
            if isinstance(request, Load):
                with measuring(partial(self._tell, call.id)):
                    reply = self._load(request.spec)
            elif isinstance(request, Unload):
                reply = self._unload(request.name)
            elif isinstance(request, Fork):
                reply, fds = self._fork(request, packet.fds[0])
            elif isinstance(request, Become):
                self._become = request
                reply = Done(arena_bytes=self._arena.used_bytes)
            else:
                message = f"a template cannot {type(request).__name__}"
                reply = Failure(error="AgentError", message=message)
        except AgentError as error:
            reply = describe_failure(error)
        finally:
            close_fds(packet.fds)
        self._channel.send(encode(Answer(call.id, reply)), fds)

    def _tell(self, call_id: int, progress: LoadProgress) -> None:
        self._channel.send(encode(Answer(call_id, Progressed(progress=progress))))

    def _load(self, spec: ModelSpec) -> Loaded:
        kept = self._arena.regions()
        try:
            with step(LoadStep.IMPORTING):
                runtime = find_runtime(spec)
            with step(LoadStep.READING):
                model = runtime.load(spec, self._arena)
        except (Exception, SystemExit) as error:  # a loader may raise anything
            for region in self._arena.regions() - kept:
                region.release()
            drop_tracebacks()
            self._collect()
            if isinstance(error, AgentError):
                raise
            raise ModelFailedError(
                f"model {spec.name}: loading {spec.source} with runtime {spec.runtime.value} "
                f"failed: {type(error).__name__}: {error}"
            ) from None
        self._models[spec.name] = model
        self._collect()
        return Loaded(
            weight_bytes=model.weights.weight_bytes,
            arena_bytes=self._arena.used_bytes,
            message=model.weights.notes,
            tasks=sorted(model.tasks),
            inputs=list(model.inputs),
            outputs=list(model.outputs),
        )

    def _unload(self, name: str) -> Done:
        model = self._models.pop(name, None)
        if model is not None:
            model.weights.release()
            del model
            # Frozen objects are never collected, and a dropped model was frozen at the last fork.
            gc.unfreeze()
            self._collect()
        return Done(arena_bytes=self._arena.used_bytes)

    @staticmethod
    def _collect() -> None:
        gc.collect()
        trim_malloc()

    def _fork(self, request: Fork, channel_fd: int) -> tuple[Reply, list[int]]:
        if self._gpu is not None:
            return Refused(reason="the last GPU process has not ended"), []
        reason = explain_unsafe_fork()
        if reason:
            return Refused(reason=reason), []
        # Objects that are never collected keep their pages shared with the child.
        gc.collect()
        gc.freeze()
        parent_pid = os.getpid()
        pid = os.fork()
        if pid == 0:
            self._be_gpu_process(request, channel_fd, parent_pid)
        pidfd = os.pidfd_open(pid)
        self._gpu = (pid, pidfd)
        return Forked(pid=pid), [os.dup(pidfd)]

    def _be_gpu_process(self, request: Fork, channel_fd: int, parent_pid: int) -> None:
        """Be the child: never returns, runs no exit handler of the template's libraries."""
        code = 1
        try:
            name_process(name_fork_of(parent_pid))
            die_with_parent(parent_pid)
            os.setsid()
            self._channel.close()
            channel = Channel(socket.socket(fileno=os.dup(channel_fd)))
            os.close(channel_fd)
            GpuProcess(channel, self._models, request.placement, request.threads).serve()
            code = 0
        except BaseException:  # nothing above this frame may run in the child
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)


def prepare_libraries() -> None:
    """Keep libraries from starting threads of their own while they load."""
    with contextlib.suppress(ImportError):
        # tqdm starts a thread with its first progress bar, such as a download's.
        importlib.import_module("tqdm").tqdm.monitor_interval = 0


def main() -> None:
    """Serve the channel named by the arguments; exit when it, or the parent, ends."""
    channel_fd, parent_pid = int(sys.argv[1]), int(sys.argv[2])
    die_with_parent(parent_pid)
    name_process("vram-template")
    # The supervisor ends its processes itself; a terminal's or kubelet's signal is for it alone.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    prepare_libraries()
    Template(Channel(socket.socket(fileno=channel_fd))).serve()
    # Exit handlers of libraries may hang where their threads or devices are gone.
    os._exit(0)


if __name__ == "__main__":
    main()
