"""What the pages of the documentation hold: fenced blocks, YAML documents, commands with answers.

Called by the tests that run what the pages tell people to do.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_COMMAND = re.compile(r"^\$ ((?:.*\\\n)*.*)\n", re.MULTILINE)


@dataclass(frozen=True)
class Command:
    """A line after ``$``, without its comment, and the lines that the page shows as its answer."""

    text: str
    answer: str


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language, in the order of the page."""
    return [text for kind, text in _BLOCK.findall(page.read_text("utf-8")) if kind == language]


def documents(page: Path) -> Iterator[Any]:
    """Every YAML document of a page, or of a YAML file."""
    texts = [page.read_text("utf-8")] if page.suffix == ".yaml" else blocks(page, "yaml")
    for text in texts:
        yield from yaml.safe_load_all(text)


def commands(page: Path) -> list[Command]:
    """The commands of all console blocks."""
    found = []
    for block in blocks(page, "console"):
        _, *parts = _COMMAND.split(block)
        for text, answer in zip(parts[::2], parts[1::2], strict=True):
            found.append(Command(re.sub(r"\s+# .*$", "", text), answer.strip()))
    return found
