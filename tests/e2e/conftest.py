"""One node, one installed chart and one namespace for all end-to-end tests of a session."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests import cluster, models
from tests.cluster import build
from tests.e2e.system import System
from tests.e2e.workloads import LEAKY, workload
from tests.support.project_images import chart_values, project_image

ROOT = Path(__file__).parents[2]
OPERATOR_NAMESPACE = "vram-system"
NAMESPACE = "models"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is here, and run it first but for the schedule, whose clock runs meanwhile."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.node)
            item.add_marker(pytest.mark.timeout(1200))

    def place(item: pytest.Item) -> int:
        if here not in item.path.parents:
            return 1
        return 2 if item.path.stem == "test_schedule" else 0

    items.sort(key=place)


@pytest.fixture(scope="session")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[cluster.Cluster]:
    """A real node of this session's own; skipped with its reason where none can run."""
    try:
        running = cluster.up("node", tmp_path_factory.mktemp("node"))
    except cluster.ClusterUnavailable as error:
        if os.environ.get("CI") == "true":
            pytest.fail(str(error))
        pytest.skip(str(error))
    with running:
        yield running


@pytest.fixture(scope="session")
def system(node: cluster.Cluster) -> System:
    """The chart installed by helm, and a namespace with restricted pod security and the models."""
    operator, agent = project_image("operator"), project_image("agent")
    for image in (operator, agent):
        node.load_image(image.archive)
    done = subprocess.run(
        [
            str(build.helm()),
            f"--kubeconfig={node.kubeconfig}",
            *("install", "vram-operator", str(ROOT / "charts/vram-operator")),
            *("--namespace", OPERATOR_NAMESPACE, "--create-namespace"),
            *("--wait", "--timeout", "180s"),
            *(f"--set={key}={value}" for key, value in chart_values(operator, agent).items()),
            "--set=extraArgs={--poll-interval=2,--schedule-jitter=0}",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
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


@pytest.fixture(scope="session", autouse=True)
def scheduled(system: System) -> datetime:
    """When the workload ``scheduled``, applied before all other tests, is due: in a minute."""
    at = (datetime.now(UTC) + timedelta(seconds=80)).replace(second=0, microsecond=0)
    restart = {"schedule": f"{at.minute} {at.hour} * * *", "timeZone": "Etc/UTC"}
    system.apply(workload("scheduled", [LEAKY], restart))
    return at


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
