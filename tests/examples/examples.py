"""The examples that the tests here know: a page and a YAML each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.pages import ROOT, Command, blocks, commands, documents

FOLDER = ROOT / "examples"
INDEX = FOLDER / "README.md"


@dataclass(frozen=True)
class Example:
    """A folder with a page, and its one YAML."""

    name: str

    @property
    def page(self) -> Path:
        return FOLDER / self.name / "README.md"

    @property
    def manifest(self) -> Path:
        """The YAML beside the page; the demo's is in the folder above, where it always was."""
        found = [*(FOLDER / self.name).glob("*.yaml"), *FOLDER.glob(f"{self.name}.yaml")]
        assert len(found) == 1, found
        return found[0]

    @property
    def commands(self) -> list[Command]:
        return commands(self.page)

    @property
    def programs(self) -> list[str]:
        """The Python that the page shows."""
        return blocks(self.page, "python")

    def object(self, kind: str) -> dict[str, Any]:
        """The one object of a kind in the YAML."""
        (found,) = (one for one in documents(self.manifest) if one["kind"] == kind)
        return dict(found)


HOSTED = [Example(name) for name in ("speech", "funasr", "onnx", "transformers", "python-tts")]
"""In template mode: the operator makes their pods."""
WRAPPED = Example("gradio")
EXAMPLES = [*HOSTED, WRAPPED]
