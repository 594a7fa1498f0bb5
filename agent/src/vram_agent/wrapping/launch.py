"""Becomes the wrapped application: ``python launch.py PARENT_PID REPORT_FD COMMAND…``.

Why it exists: the kernel is to end the application when the agent ends without a word, and that is
a thing that a process can only ask for itself. It must be asked between fork and exec, where a
process with threads must not run Python; so a process of its own asks and then becomes the command.
Started by ``process.py``. It imports nothing of the agent, since it has neither its path nor time.

The report descriptor closes when the command has begun, and carries errno when it could not.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> None:
    """Ask for the signal and become the command; the exit status is 127 where that fails."""
    parent_pid, report_fd, command = int(arguments[0]), int(arguments[1]), arguments[2:]
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent_pid:
        os._exit(127)
    # What Python ignores for itself is the application's own choice again.
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    os.set_inheritable(report_fd, False)  # noqa: FBT003 - it takes it by position only
    try:
        os.execvp(command[0], command)  # noqa: S606 - a command is what this is given
    except OSError as error:
        os.write(report_fd, str(error.errno).encode())
    os._exit(127)


if __name__ == "__main__":
    main(sys.argv[1:])
