"""The project's own images, built from its Dockerfiles, and the chart values that use them.

Called by the end-to-end tests and the demo.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Literal

import yaml

from tests import cluster
from tests.cluster import build, images
from tests.cluster.errors import ClusterError, ClusterUnavailable

NAMES: tuple[Literal["operator", "agent"], ...] = ("operator", "agent")
ROOT = Path(__file__).parents[2]
AGENT_EXTRAS = "whisper,onnx"


def project_image(name: Literal["agent", "operator"], extras: str = AGENT_EXTRAS) -> images.Image:
    """Build ``Dockerfile.<name>``; cached by the content of all that it copies. Needs root.

    ``extras`` are the agent's; without torch its image is a tenth of what it is with it.
    """
    own = "" if extras == AGENT_EXTRAS else f"-{extras.replace(',', '-')}"
    sources = ["agent"] if name == "agent" else ["agent", "operator"]
    inputs = [path for source in sources for path in _tracked_sources(ROOT / source)]
    requirements = sorted((ROOT / "requirements").glob("*.txt"))
    return images.build_image(
        images.Recipe(
            name=f"localhost/vram-{name}{own}",
            dockerfile=ROOT / f"Dockerfile.{name}",
            context=ROOT,
            inputs=[*inputs, *(path for path in requirements if path.name != "dev.txt")],
            build_args={"EXTRAS": extras} if name == "agent" else {},
        )
    )


def chart_values(operator: images.Image, agent: images.Image) -> dict[str, str]:
    """Return the ``--set`` values that make the chart use images loaded into the node."""
    values: dict[str, str] = {}
    for key, image in (("image", operator), ("agentImage", agent)):
        repository, _, tag = image.reference.rpartition(":")
        values |= {
            f"{key}.repository": repository,
            f"{key}.tag": tag,
            f"{key}.pullPolicy": "Never",
        }
    return values


def _tracked_sources(folder: Path) -> list[Path]:
    """Files that an image is made of: no bytecode, nothing a build left behind."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and ".egg-info" not in str(path)
    )


def ready_for_helm(directory: Path) -> Path:
    """Load both images into the node of ``directory``; return a values file that uses them.

    Beside it, ``bin`` has the kubectl and the helm that go with the cluster. Needs root; raises
    ClusterError where no node of ours runs there.
    """
    running = cluster.find(directory)
    if running is None:
        raise ClusterError(f"no cluster runs in {directory}; `make cluster-up` starts one")
    operator, agent = project_image("operator"), project_image("agent")
    for image in (operator, agent):
        running.load_image(image.archive)
    programs = running.directory / "bin"
    programs.mkdir(exist_ok=True)
    for program in (build.component("kubectl"), build.helm()):
        link = programs / program.name
        link.unlink(missing_ok=True)
        link.symlink_to(program)
    values = running.directory / "values.yaml"
    nested: dict[str, dict[str, str]] = {}
    for key, value in chart_values(operator, agent).items():
        section, _, name = key.partition(".")
        nested.setdefault(section, {})[name] = value
    values.write_text(yaml.safe_dump(nested), encoding="utf-8")
    return values


def main() -> int:
    """Build both, so that no test's time limit has to cover it; 3 where this machine cannot."""
    parser = argparse.ArgumentParser(prog="python -m tests.support.project_images")
    parser.add_argument("--load", type=Path, help="also load them into the node of this folder")
    directory: Path | None = parser.parse_args().load
    try:
        for name in NAMES:
            print(project_image(name).reference)
        if directory is not None:
            print(ready_for_helm(directory))
    except ClusterUnavailable as error:
        print(f"images: {error}", file=sys.stderr)
        # A person who asks for a load wants to know that there is none.
        return 3 if directory is not None or os.environ.get("CI") == "true" else 0
    except ClusterError as error:
        print(f"images: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
