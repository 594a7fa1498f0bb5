"""A real apiserver that takes the examples' objects, and real agents that serve their models."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.cluster import Cluster
from tests.integration.agent.conftest import start_agent as start_agent  # noqa: PLC0414
from tests.support.pages import ROOT


@dataclass(frozen=True)
class Shell:
    """Bash in the repository's root, whose ``kubectl`` speaks to a namespace of the tests."""

    namespace: str
    programs: Path

    def run(self, script: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        path = f"{self.programs}:{os.environ['PATH']}"
        return subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            input=stdin,
            cwd=ROOT,
            env={**os.environ, "PATH": path},
            capture_output=True,
            text=True,
            check=False,
        )

    def get(self, kind: str, name: str) -> dict[str, Any]:
        done = self.run(f"kubectl get {kind} {name} -o json")
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found


@pytest.fixture(scope="session")
def shell(control_plane: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    """The control plane with the CRDs, and nothing that acts on them."""
    control_plane.kubectl("apply", "--server-side", "--force-conflicts", "-f", str(ROOT / "crds"))
    control_plane.kubectl(*("wait", "--for=condition=Established", "--timeout=60s", "crd", "--all"))
    # A cluster of the user's own may hold what an earlier run left.
    namespace = f"example-tests-{secrets.token_hex(4)}"
    control_plane.kubectl("create", "namespace", namespace)
    programs = tmp_path_factory.mktemp("programs")
    kubectl = programs / "kubectl"
    words = " ".join([*control_plane.kubectl_command(), f"--namespace={namespace}"])
    kubectl.write_text(f'#!/bin/sh\nexec {words} "$@"\n')
    kubectl.chmod(0o755)
    yield Shell(namespace, programs)
    control_plane.kubectl("delete", "namespace", namespace, "--wait=false")
