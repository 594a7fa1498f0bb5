"""Ending the application's process on the operator's word.

Called when a ``restart`` has drained. The application's own handler of SIGTERM says how it ends.
"""

from __future__ import annotations

import os
import signal


def end_process() -> None:
    """Send this process SIGTERM, and see to it that it counts.

    The kernel ignores a signal that PID 1 has no handler for, also its own: such a process, as in a
    container whose command is the application, ends here as the signal's default action would.
    """
    is_deaf = os.getpid() == 1 and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    os.kill(os.getpid(), signal.SIGTERM)
    if is_deaf:
        os._exit(0)
