"""A file of keys as it is now.

Why it exists: keys rotate while the agent runs, and a ConfigMap or Secret is a mounted file. Called
by ``tokens.py`` and ``api_keys.py``, with each call that they check.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Generic, TypeVar

_MAX_BYTES = 64 * 1024

T = TypeVar("T")


class WatchedKeys(Generic[T]):
    """The keys of a file, parsed anew when it changes.

    The file is looked at with each call: a ConfigMap swaps a symbolic link, so inode and times of
    what the path leads to tell that it changed.
    """

    def __init__(self, path: str, parse: Callable[[bytes], tuple[T, ...]]) -> None:
        self.path = path
        self._parse = parse
        self._seen: tuple[int, ...] | None = None
        self._keys: tuple[T, ...] = ()

    def current(self) -> tuple[T, ...]:
        """Return the keys of the file as it is now; none where it cannot be read."""
        try:
            with open(self.path, "rb") as file:  # noqa: PTH123 - fstat and read of one inode
                status = os.fstat(file.fileno())
                seen = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
                if seen != self._seen:
                    self._keys = self._parse(file.read(_MAX_BYTES))
                    self._seen = seen
        except OSError:
            self._keys, self._seen = (), None
        return self._keys
