"""The two processes of a group: how they begin, and how their ends are noticed.

Why it exists: a template and its GPU process may be killed in any order at any time; this keeps
what is known of them true, leaves no zombie, and reports the ends that nobody asked for. Called by
group.py. It knows nothing of models.

Who reaps: the template its GPU process, and says so; this process the template, a fresh GPU
process, and a GPU process whose template has ended (the supervisor is PID 1 or a subreaper).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from vram_agent.backend import ProcessExit
from vram_agent.devices.base import Placement
from vram_agent.errors import ModelFailedError
from vram_agent.processes.channel import close_fds, open_socket_pair
from vram_agent.processes.child import Child, decode_wait_status
from vram_agent.processes.messages import Exited, Fork, Forked, Refused, Reply
from vram_agent.processes.orphans import end_orphans
from vram_agent.processes.spawn import spawn_template

TEMPLATE, GPU = "template", "gpu"


class ProcessPair:
    """A template and at most one GPU process. ``on_lost`` is called with the role that ended."""

    def __init__(
        self,
        group: str,
        environment: Mapping[str, str],
        on_exit: Callable[[ProcessExit], None],
        on_lost: Callable[[str], None],
    ) -> None:
        self.template: Child | None = None
        self.gpu: Child | None = None
        self._group = group
        self._environment = environment
        self._on_exit = on_exit
        self._on_lost = on_lost
        self._ending: set[Child] = set()
        self._reports: set[asyncio.Task[None]] = set()
        self._is_closed = False

    def ensure_template(self) -> Child:
        """Return the template, starting one if there is none. Raises ModelFailedError."""
        if self.template is None:
            self.template = self._spawn(TEMPLATE)
        return self.template

    def start_fresh(self) -> Child:
        """Start a process that will load the models itself, as the GPU process."""
        self.gpu = self._spawn(GPU)
        return self.gpu

    async def fork(self, placement: Placement, threads: int) -> str:
        """Have the template fork the GPU process; return why it would not, empty if it did.

        Raises ChildDiedError when the template ends first.
        """
        template = self.ensure_template()
        ours, theirs = open_socket_pair()
        try:
            reply, fds = await template.call(
                Fork(placement=placement, threads=threads), (theirs.detach(),)
            )
        except BaseException:
            ours.close()
            raise
        if isinstance(reply, Forked):
            self.gpu = Child(reply.pid, ours, self._note, self._note_gpu_end, pidfd=fds[0])
            return ""
        ours.close()
        close_fds(fds)
        return reply.reason if isinstance(reply, Refused) else repr(reply)

    def kill_gpu(self) -> None:
        """End the GPU process at once, without waiting."""
        if self.gpu is not None:
            self.gpu.kill()

    async def end_gpu(self) -> None:
        """End the GPU process, if there is one, and wait until it is reaped."""
        if self.gpu is not None:
            await self._end(self.gpu)

    async def end_template(self) -> None:
        """End the template, if there is one, and wait until it is reaped."""
        if self.template is not None:
            await self._end(self.template)

    async def _end(self, child: Child) -> None:
        child.kill()
        await child.wait_reaped()
        await self._end_orphans(child)

    async def _end_orphans(self, child: Child) -> None:
        own = [self.template, self.gpu, *self._ending]
        await end_orphans(child.pid, frozenset(one.pid for one in own if one is not None))

    def close(self) -> None:
        """End both at once, without waiting, and start none again."""
        self._is_closed = True
        for child in (self.template, self.gpu):
            if child is not None:
                child.kill()

    def _spawn(self, role: str) -> Child:
        if self._is_closed:
            raise ModelFailedError(f"group {self._group} is closed")
        try:
            pid, sock = spawn_template(self._environment)
        except OSError as error:
            raise ModelFailedError(
                f"group {self._group}: no process can be started ({error}); raise the container's "
                f"limits of memory and processes"
            ) from error
        on_end = self._note_template_end if role == TEMPLATE else self._note_gpu_end
        return Child(pid, sock, self._note, on_end)

    def _note(self, event: Reply) -> None:
        """Take what a template says unasked: it has reaped its GPU process."""
        if not isinstance(event, Exited):
            return
        for child in [*self._ending, *([self.gpu] if self.gpu else [])]:
            if child.pid == event.pid:
                child.set_status(decode_wait_status(event.status))

    def _note_template_end(self, child: Child) -> None:
        if self.template is child:
            self.template = None
        for orphan in [*self._ending, *([self.gpu] if self.gpu else [])]:
            orphan.is_orphan = True
            orphan.ensure_reaped()
        self._finish(TEMPLATE, child)

    def _note_gpu_end(self, child: Child) -> None:
        if self.gpu is child:
            self.gpu = None
        self._finish(GPU, child)

    def _finish(self, role: str, child: Child) -> None:
        self._ending.add(child)
        self._on_lost(role)
        report = asyncio.ensure_future(self._report(role, child))
        self._reports.add(report)
        report.add_done_callback(self._reports.discard)

    async def _report(self, role: str, child: Child) -> None:
        await child.wait_reaped()
        await self._end_orphans(child)
        self._ending.discard(child)
        status = child.status
        if child.is_expected_to_end or status is None:
            return
        self._on_exit(
            ProcessExit(
                group=self._group,
                role=role,
                pid=child.pid,
                exit_code=status.exit_code,
                signal=status.signal,
            )
        )
