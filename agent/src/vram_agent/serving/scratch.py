"""Temporary files without a name, for what is too large for this process's memory.

Why it exists: an upload, hours of samples or a large tensor lie in an unlinked file, so that none
lives in private memory and nothing is left behind when a client goes away. Called by whatever in
serving/ receives or converts. It knows no formats.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import tempfile
from typing import BinaryIO, cast

from vram_agent.errors import AgentError

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


class ScratchFullError(AgentError):
    """There is no room for a request where temporary files lie."""

    status = 503
    code = "scratch_full"

    def __init__(
        self, message: str | None = None, *, retry_after_seconds: float | None = 5.0
    ) -> None:
        super().__init__(
            message
            or f"no space left in {tempfile.gettempdir()} for the upload; free some, or mount a "
            "larger emptyDir there",
            retry_after_seconds=retry_after_seconds,
        )


def open_scratch() -> BinaryIO:
    """Return an unlinked temporary file; anonymous memory where no folder can be written."""
    try:
        return cast("BinaryIO", tempfile.TemporaryFile(prefix="vram-agent-"))
    except OSError:  # a read-only root filesystem without an emptyDir at /tmp
        return os.fdopen(os.memfd_create("vram-agent-scratch"), "w+b")


def write_scratch(file: BinaryIO, data: bytes | memoryview) -> None:
    """Write through to the file. Blocks. Raises ScratchFullError."""
    try:
        file.write(data)
        file.flush()
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise ScratchFullError from error
        raise


def map_scratch(file: BinaryIO) -> memoryview:
    """Return the content, mapped: the file may be closed, and is gone with the last view."""
    size = os.fstat(file.fileno()).st_size
    if not size:
        return memoryview(b"")
    return memoryview(mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ))


def close_scratch(file: BinaryIO) -> None:
    """Close a file whose content nobody needs any more, whatever could not be written of it."""
    with contextlib.suppress(OSError):
        file.close()
