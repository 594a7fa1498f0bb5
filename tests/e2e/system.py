"""The installed system as its tests see it: kubectl for objects, sockets into pods for requests."""

from __future__ import annotations

import http.client
import json
import re
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from vram_agent.protocol import CONTROL_PORT, SERVING_PORT

from tests.cluster import Cluster

Found = TypeVar("Found")
Json = dict[str, Any]
POLL_SECONDS = 0.5
REQUEST_SECONDS = 120.0


@dataclass(frozen=True)
class Answer:
    """An HTTP answer of a pod."""

    status: int
    body: bytes
    headers: Mapping[str, str]

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class System:
    """A cluster with the chart installed, and one namespace to work in."""

    cluster: Cluster
    namespace: str

    def kubectl(self, *arguments: str, stdin: str | None = None) -> str:
        return self.cluster.kubectl("--namespace", self.namespace, *arguments, stdin=stdin)

    def try_kubectl(
        self, *arguments: str, stdin: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run kubectl where a refusal is what the test is about."""
        return subprocess.run(
            [*self.cluster.kubectl_command(), "--namespace", self.namespace, *arguments],
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
        )

    def apply(self, *manifests: Json) -> None:
        for manifest in manifests:
            self.kubectl("apply", "--server-side", "-f", "-", stdin=json.dumps(manifest))

    def get(self, kind: str, name: str) -> Json:
        found: Json = json.loads(self.kubectl("get", kind, name, "-o", "json"))
        return found

    def items(self, kind: str, selector: str = "") -> list[Json]:
        arguments = ("get", kind, "-o", "json", *([f"--selector={selector}"] if selector else []))
        items: list[Json] = json.loads(self.kubectl(*arguments))["items"]
        return items

    def wait(self, what: str, timeout_seconds: float, look: Callable[[], Found | None]) -> Found:
        """Poll until ``look`` returns something; at the deadline fail with the state of things."""
        deadline = time.monotonic() + timeout_seconds
        while True:
            found = look()
            if found is not None:
                return found
            if time.monotonic() >= deadline:
                state = self.kubectl("get", "gmw,gpr,deployments,pods,events")
                raise AssertionError(f"{what} not within {timeout_seconds:.0f} s:\n{state}")
            time.sleep(POLL_SECONDS)

    def wait_ready(self, workload: str, timeout_seconds: float = 180) -> Json:
        """Wait until the workload says Ready and its agents report; return the workload."""

        def ready() -> Json | None:
            found = self.get("gmw", workload)
            good = {"Ready", "AgentsReporting"} <= true_conditions(found)
            return found if good else None

        return self.wait(f"workload {workload} Ready", timeout_seconds, ready)

    def pod(self, workload: str) -> Json:
        """The one pod of a workload that is not on its way out."""
        pods = [
            pod
            for pod in self.items("pods", f"vram.dev/workload={workload}")
            if "deletionTimestamp" not in pod["metadata"]
        ]
        assert len(pods) == 1, [pod["metadata"]["name"] for pod in pods]
        return pods[0]

    def container(self, workload: str) -> Json:
        """The status of the agent's container in the workload's one pod."""
        found: Json = self.pod(workload)["status"]["containerStatuses"][0]
        return found

    def restarts_of(self, workload: str) -> list[Json]:
        return [item for item in self.items("gpr") if item["spec"]["workload"] == workload]

    def finished(self, workload: str) -> Json | None:
        """A restart of the workload that has an outcome."""
        return next(
            (one for one in self.restarts_of(workload) if one.get("status", {}).get("outcome")),
            None,
        )

    def request(self, workload: str, method: str, path: str, body: Json | None = None) -> Answer:
        """Ask the workload's pod; JSON to the serving port, or the control port for /report."""
        payload = None if body is None else json.dumps(body).encode()
        return self._send(workload, method, path, payload, {"Content-Type": "application/json"})

    def transcribe(self, workload: str, clip: Path, fields: Mapping[str, str]) -> Answer:
        """Post a clip as the OpenAI API wants it."""
        boundary = uuid.uuid4().hex
        parts = [
            f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
            for name, value in fields.items()
        ]
        head = (
            f'--{boundary}\r\nContent-Disposition: form-data; name="file"; '
            f'filename="{clip.name}"\r\nContent-Type: audio/wav\r\n\r\n'
        )
        payload = "".join([*parts, head]).encode() + clip.read_bytes()
        payload += f"\r\n--{boundary}--\r\n".encode()
        headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
        return self._send(workload, "POST", "/v1/audio/transcriptions", payload, headers)

    def report(self, workload: str) -> Json:
        answer = self.request(workload, "GET", "/report")
        assert answer.status == 200, answer
        report: Json = answer.json()
        return report

    def ask_port(self, workload: str, port: int, method: str, path: str) -> Answer:
        """Ask what else listens in the workload's pod."""
        with self._connected(workload, port) as connection:
            connection.request(method, path)
            return _answer_of(connection)

    @contextmanager
    def forwarded(self, target: str, port: int) -> Iterator[str]:
        """``kubectl port-forward`` as a person runs it; the host:port here that leads there."""
        command = [*self.cluster.kubectl_command(), "--namespace", self.namespace]
        with subprocess.Popen(
            [*command, "port-forward", target, f":{port}"], stdout=subprocess.PIPE, text=True
        ) as forward:
            try:
                assert forward.stdout is not None
                found = re.search(r"127\.0\.0\.1:\d+", forward.stdout.readline())
                assert found, f"kubectl port-forward {target} ended with {forward.wait()}"
                yield found[0]
            finally:
                forward.terminate()

    def _send(
        self, workload: str, method: str, path: str, body: bytes | None, headers: Mapping[str, str]
    ) -> Answer:
        port = CONTROL_PORT if path == "/report" else SERVING_PORT
        with self._connected(workload, port) as connection:
            connection.request(method, path, body, dict(headers))
            return _answer_of(connection)

    @contextmanager
    def _connected(self, workload: str, port: int) -> Iterator[http.client.HTTPConnection]:
        address = self.pod(workload)["status"]["podIP"]
        connection = http.client.HTTPConnection(address, port, timeout=REQUEST_SECONDS)
        connection.sock = self.cluster.connect(address, port, REQUEST_SECONDS)
        try:
            yield connection
        finally:
            connection.close()


def _answer_of(connection: http.client.HTTPConnection) -> Answer:
    response = connection.getresponse()
    return Answer(response.status, response.read(), dict(response.getheaders()))


def true_conditions(obj: Json) -> set[str]:
    """The types of the conditions that are True."""
    conditions = obj.get("status", {}).get("conditions", [])
    return {condition["type"] for condition in conditions if condition["status"] == "True"}


def find_condition(obj: Json, kind: str) -> Json:
    """One condition of an object; empty while it is not written."""
    conditions = obj.get("status", {}).get("conditions", [])
    return next((condition for condition in conditions if condition["type"] == kind), {})
