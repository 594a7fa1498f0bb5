"""Where finished things are kept between runs: built by key, once, whole or not at all.

A key is a hash of everything that decides the content, so that an entry never goes stale and needs
no time stamps. Concurrent callers wait for one builder; a builder that dies leaves only a temporary
name that the next one removes. Nothing here knows what is being built.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

KEPT_PER_KIND = 2


def cache_dir() -> Path:
    """``$XDG_CACHE_HOME/vram-operator``, or the same under ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base).absolute() / "vram-operator"


def content_key(paths: Iterable[Path], *facts: str) -> str:
    """Hash ``facts`` and every file at or below ``paths``: names, executable bits and content.

    Names count relative to the given path, so that a checkout elsewhere has the same key.
    """
    digest = hashlib.sha256()
    for fact in facts:
        digest.update(f"fact {len(fact)} {fact}\n".encode())
    for path in paths:
        for file in _files(path):
            name = file.relative_to(path.parent)
            content = file.read_bytes()
            mode = file.stat().st_mode & 0o111
            digest.update(f"file {name} {mode:o} {len(content)}\n".encode())
            digest.update(content)
    return digest.hexdigest()[:20]


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such file or folder; it is an input of a build")
    return sorted(
        file for file in path.rglob("*") if file.is_file() and "__pycache__" not in file.parts
    )


@contextmanager
def locked(name: str) -> Iterator[None]:
    """Hold the machine-wide lock ``name`` of this user. Blocks, and says so when it has to wait.

    The kernel frees it when the holder dies, however it dies.
    """
    path = cache_dir() / "locks" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"cluster: another process holds {path}; waiting for it", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def ensure_entry(kind: str, key: str, build: Callable[[Path], None]) -> Path:
    """Return the folder ``kind/key``, having ``build`` fill it first if it is not there.

    ``build`` gets an empty folder to fill; it becomes visible under its name only when ``build``
    returns. All but the newest entries of a kind are removed after a build.
    """
    entry = cache_dir() / kind / key
    if entry.is_dir():
        os.utime(entry)
        return entry
    with locked(f"build-{kind}"):
        if entry.is_dir():
            return entry
        entry.parent.mkdir(parents=True, exist_ok=True)
        for leftover in entry.parent.glob(".tmp-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        unfinished = entry.parent / f".tmp-{key}"
        unfinished.mkdir()
        try:
            build(unfinished)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
        unfinished.rename(entry)
        _prune(entry.parent, newest=entry)
    return entry


def _prune(folder: Path, newest: Path) -> None:
    """Keep the newest entries; what a cluster still runs from survives being unlinked."""
    os.utime(newest)
    entries = sorted(folder.iterdir(), key=lambda entry: entry.stat().st_mtime, reverse=True)
    for entry in entries[KEPT_PER_KIND:]:
        shutil.rmtree(entry, ignore_errors=True)
