"""The CRDs on a real apiserver, and a client that shows what the apiserver really answers."""

from __future__ import annotations

import json
import secrets
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.cluster import Cluster

CRDS = Path(__file__).parents[3] / "crds"
# A cluster of the user's own may hold what an earlier run left.
NAMESPACE = f"crd-tests-{secrets.token_hex(4)}"


@dataclass(frozen=True)
class Answer:
    """What the apiserver said: the HTTP status and the decoded body."""

    code: int
    body: Any

    def refusal(self) -> str:
        """The message of a refusal; an assertion error if the object was accepted."""
        assert self.code >= 400, f"accepted with {self.code}: {json.dumps(self.body)[:2000]}"
        return str(self.body["message"])

    def accepted(self) -> Any:
        """The object; an assertion error with the message if it was refused."""
        assert self.code < 400, f"refused with {self.code}: {self.body.get('message')}"
        return self.body


@dataclass(frozen=True)
class RawApi:
    """Plain requests through ``kubectl proxy``: any kubeconfig works, and nothing is hidden."""

    server: str

    def send(
        self, method: str, path: str, body: Any = None, content: str = "application/json"
    ) -> Answer:
        headers = {"Content-Type": content}
        return self._request(method, path, None if body is None else json.dumps(body), headers)

    def table(self, path: str) -> Any:
        accept = "application/json;as=Table;g=meta.k8s.io;v=v1"
        return self._request("GET", path, None, {"Accept": accept}).accepted()

    def create(self, plural: str, body: Any, query: str = "") -> Answer:
        """Create with the strict field check that kubectl asks for."""
        return self.send("POST", f"{collection(plural)}?fieldValidation=Strict{query}", body)

    def try_create(self, plural: str, body: Any) -> Answer:
        """What would be answered to a creation; nothing is stored."""
        return self.create(plural, body, "&dryRun=All")

    def merge(self, plural: str, name: str, patch: Any) -> Answer:
        path = f"{collection(plural)}/{name}"
        return self.send("PATCH", path, patch, "application/merge-patch+json")

    def _request(self, method: str, path: str, data: str | None, headers: dict[str, str]) -> Answer:
        request = urllib.request.Request(  # noqa: S310 - the address is kubectl proxy's
            self.server + path,
            data=None if data is None else data.encode(),
            method=method,
            headers=headers,
        )
        try:
            with _OPENER.open(request, timeout=30) as response:
                return Answer(response.status, json.load(response))
        except urllib.error.HTTPError as error:
            with error:
                return Answer(error.code, json.load(error))


_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def collection(plural: str) -> str:
    return f"/apis/vram.dev/v1alpha1/namespaces/{NAMESPACE}/{plural}"


@pytest.fixture(scope="session")
def installed(control_plane: Cluster) -> Iterator[Cluster]:
    """The control plane with the CRDs established and a namespace for these tests."""
    control_plane.kubectl("apply", "--server-side", "--force-conflicts", "-f", str(CRDS))
    control_plane.kubectl(
        "wait",
        "--for=condition=Established",
        "--timeout=60s",
        "crd/gpumodelworkloads.vram.dev",
        "crd/gpupodrestarts.vram.dev",
    )
    namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}}
    control_plane.kubectl("apply", "-f", "-", stdin=json.dumps(namespace))
    yield control_plane
    control_plane.kubectl("delete", "namespace", NAMESPACE, "--wait=false")


@pytest.fixture(scope="session")
def api(installed: Cluster) -> Iterator[RawApi]:
    with subprocess.Popen(
        [*installed.kubectl_command(), "proxy", "--port=0"], stdout=subprocess.PIPE, text=True
    ) as proxy:
        assert proxy.stdout is not None
        address = proxy.stdout.readline().rsplit(" ", 1)[1].strip()
        yield RawApi(f"http://{address}")
        proxy.terminate()
