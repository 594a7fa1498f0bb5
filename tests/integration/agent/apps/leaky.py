"""A plain process that knows nothing of the agent: each SIGUSR1 makes it keep 64 MiB more."""

from __future__ import annotations

import signal
import sys

kept: list[bytes] = []


def leak(*_: object) -> None:
    kept.append(b"x" * (64 << 20))


def say(number: int, _: object) -> None:
    print(f"got {signal.Signals(number).name}", file=sys.stderr, flush=True)


signal.signal(signal.SIGUSR1, leak)
for name in ("SIGHUP", "SIGUSR2", "SIGWINCH", "SIGQUIT"):
    signal.signal(signal.Signals[name], say)
print("up", file=sys.stderr, flush=True)
while True:
    signal.pause()
