"""Helm, and what the chart makes of a set of values."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest
import yaml

from tests import cluster
from tests.cluster import build, prerequisites

ROOT = Path(__file__).parents[2]
CHART = ROOT / "charts/vram-operator"
RELEASE = "vram-operator"
NAMESPACE = "vram-system"
# Helm refuses a chart for a version; one that it was built with is not told of a real cluster.
KUBERNETES = "--kube-version=1.34.0"

Values = dict[str, Any]
T = TypeVar("T")


class HelmError(Exception):
    """helm refused; the message is what it said."""


@dataclass(frozen=True)
class Helm:
    """Runs helm on the project's chart."""

    program: Path
    home: Path

    def run(self, *arguments: str, values: Values | None = None) -> str:
        """Return what helm prints; `HelmError` with its complaint if it fails."""
        command = [str(self.program), *arguments]
        if values is not None:
            values_file = self.home / "values.json"
            values_file.write_text(json.dumps(values))
            command.append(f"--values={values_file}")
        # Nothing of the user's helm, and no cluster unless it is named.
        places = ("HOME", "HELM_CONFIG_HOME", "HELM_CACHE_HOME")
        environment = dict.fromkeys(places, str(self.home))
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if done.returncode != 0:
            raise HelmError(f"helm {' '.join(arguments)}: {done.stderr.strip()}")
        return done.stdout

    def lint(self, values: Values | None = None) -> str:
        return self.run("lint", "--strict", str(CHART), values=values)

    def template(self, values: Values | None = None) -> list[dict[str, Any]]:
        """Return the objects that an installation would create."""
        text = self.run(
            *("template", RELEASE, str(CHART), f"--namespace={NAMESPACE}", KUBERNETES),
            values=values,
        )
        return [document for document in yaml.safe_load_all(text) if document]


def only(objects: list[dict[str, Any]], kind: str, name: str = "") -> dict[str, Any]:
    """Return the one object of a kind, or of a kind and name."""
    found = [
        one for one in objects if one["kind"] == kind and name in {"", one["metadata"]["name"]}
    ]
    assert len(found) == 1, f"{len(found)} objects of kind {kind} {name}"
    return found[0]


def kinds(objects: list[dict[str, Any]]) -> set[str]:
    return {one["kind"] for one in objects}


def _available(make: Callable[[], T]) -> T:
    try:
        return make()
    except cluster.ClusterUnavailable as error:
        if os.environ.get("CI") == "true":
            pytest.fail(str(error))
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def helm(tmp_path_factory: pytest.TempPathFactory) -> Helm:
    return Helm(_available(build.helm), tmp_path_factory.mktemp("helm"))


@pytest.fixture(scope="session")
def promtool() -> Path:
    return _available(lambda: build.program("promtool"))


@pytest.fixture(scope="session")
def lua_interpreter() -> None:
    _available(lambda: prerequisites.ensure_programs({"lua5.4": "lua5.4"}))


@pytest.fixture(scope="session")
def control_plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[cluster.Cluster]:
    directory = tmp_path_factory.mktemp("control-plane")
    with _available(lambda: cluster.up("control-plane", directory)) as running:
        yield running
