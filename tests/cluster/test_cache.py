"""Built things appear whole or not at all, once, and old ones go."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from tests.cluster import cache


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write(folder: Path) -> None:
    (folder / "result").write_text("whole")


def test_a_failed_build_leaves_nothing_and_the_next_one_succeeds() -> None:
    def fail(folder: Path) -> None:
        (folder / "result").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.ensure_entry("kind", "key", fail)
    assert list((cache.cache_dir() / "kind").iterdir()) == []
    assert (cache.ensure_entry("kind", "key", write) / "result").read_text() == "whole"


def test_what_a_killed_build_left_is_removed_by_the_next() -> None:
    leftover = cache.cache_dir() / "kind" / ".tmp-other"
    leftover.mkdir(parents=True)
    cache.ensure_entry("kind", "key", write)
    assert not leftover.exists()


def test_concurrent_callers_build_once() -> None:
    built: list[Path] = []

    def build(folder: Path) -> None:
        built.append(folder)
        write(folder)

    callers = [
        threading.Thread(target=cache.ensure_entry, args=("kind", "key", build)) for _ in range(8)
    ]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(built) == 1


def test_only_the_newest_entries_of_a_kind_stay() -> None:
    for age, key in ((300, "oldest"), (200, "older"), (100, "old")):
        entry = cache.ensure_entry("kind", key, write)
        now = entry.stat().st_mtime
        os.utime(entry, (now - age, now - age))
    cache.ensure_entry("kind", "new", write)
    assert sorted(entry.name for entry in (cache.cache_dir() / "kind").iterdir()) == ["new", "old"]


def test_the_key_follows_content_names_and_facts_but_not_the_place(tmp_path: Path) -> None:
    def folder(place: str, name: str, content: str) -> Path:
        path = tmp_path / place / "source"
        path.mkdir(parents=True)
        (path / name).write_text(content)
        return path

    original = cache.content_key([folder("a", "main.go", "x")], "v1")
    assert cache.content_key([folder("b", "main.go", "x")], "v1") == original
    assert cache.content_key([folder("c", "main.go", "y")], "v1") != original
    assert cache.content_key([folder("d", "other.go", "x")], "v1") != original
    assert cache.content_key([tmp_path / "a" / "source"], "v2") != original
