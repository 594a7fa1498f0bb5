"""Installs the chart, with images of this checkout, and the models that workloads mount.

Called by the end-to-end tests, once for a session, and by ``python -m bench downtime``.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from tests import cluster, models
from tests.cluster import build
from tests.e2e.system import System
from tests.support.project_images import AGENT_EXTRAS, chart_values, project_image

ROOT = Path(__file__).parents[2]
CHART = ROOT / "charts/vram-operator"
RELEASE = "vram-operator"
OPERATOR_NAMESPACE = "vram-system"
NAMESPACE = "models"
QUICKLY = "--poll-interval=2,--schedule-jitter=0"
"""Flags of the operator with which nobody waits for a report every ten seconds."""


def install(node: cluster.Cluster, extras: str = AGENT_EXTRAS) -> System:
    """Install the chart with images of this checkout, and `prepare`. Needs root."""
    operator, agent = project_image("operator"), project_image("agent", extras)
    for image in (operator, agent):
        node.load_image(image.archive)
    install_chart(node, chart_values(operator, agent))
    return prepare(node)


def install_chart(node: cluster.Cluster, images: dict[str, str]) -> None:
    """Install the release, and wait until it runs."""
    helm(
        node,
        *("install", RELEASE, str(CHART), "--create-namespace", "--wait", "--timeout", "180s"),
        *(f"--set={key}={value}" for key, value in images.items()),
        f"--set=extraArgs={{{QUICKLY}}}",
    )


def helm(node: cluster.Cluster, *arguments: str) -> str:
    """Run helm in the operator's namespace; fails with its complaint."""
    done = subprocess.run(
        [
            *(str(build.helm()), f"--kubeconfig={node.kubeconfig}"),
            *(f"--namespace={OPERATOR_NAMESPACE}", *arguments),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def prepare(node: cluster.Cluster) -> System:
    """Return a namespace with restricted pod security and the models, beside the operator."""
    installed = System(node, NAMESPACE)
    installed.apply(
        {
            "apiVersion": "v1",
            "kind": "Namespace",
            "metadata": {
                "name": NAMESPACE,
                "labels": {"pod-security.kubernetes.io/enforce": "restricted"},
            },
        }
    )
    _add_models(installed)
    return installed


def _add_models(system: System) -> None:
    files = {
        "speech-models": [models.WHISPER, ROOT / "demo/models/leaky.py"],
        "digit-models": [models.DIGITS],
    }
    for name, paths in files.items():
        manifest = system.kubectl(
            *("create", "configmap", name, "--dry-run=client", "-o", "json"),
            *(f"--from-file={path}" for path in paths),
        )
        system.apply(json.loads(manifest))
