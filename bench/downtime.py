"""For how long a pod does not answer when it is restarted, by method, on a real kubelet.

A client asks through the Service (kube-proxy) all the time. Downtime is from its last good answer
to its first good one afterwards, the way back of the model included, and what failed meanwhile is
counted. Recycle, InPlace and Evict are GPUPodRestarts written by hand; ``kubectl rollout restart``
is what people do without the operator, and what the ratios are to.

An exit in place has to wait until its container has run for 630 s, so each of its runs has a
workload of its own, started before everything else.

Called by ``python -m bench downtime``. Needs root, and minutes for the images the first time.
"""

from __future__ import annotations

import array
import http.client
import json
import os
import statistics
import tempfile
import threading
import time
import wave
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from vram_agent.protocol import SERVING_PORT
from vram_operator.api import MINIMUM_IN_PLACE_COOLDOWN_SECONDS

from bench.record import Record, Row, write
from tests import cluster, models
from tests.e2e.installation import install
from tests.e2e.system import Json, System
from tests.e2e.workloads import DIGITS, workload

REFERENCE = "kubectl rollout restart"
ASKERS = 2
PAUSE_SECONDS = 0.02
ANSWER_SECONDS = 15.0
GOOD_ANSWERS = 10
"""So many good answers in a row before a restart, and after it."""
LIMIT_SECONDS = 240.0
RECOVERED = "Recovered"


@dataclass
class Client:
    """Asks one address again and again, each time over a new connection; keeps what came."""

    system: System
    address: str
    good: list[float] = field(default_factory=list)
    """When good answers came, on the monotonic clock."""
    failed: list[tuple[float, str]] = field(default_factory=list)
    _over: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def asking(self) -> Iterator[None]:
        """Ask from several threads for the time of the block."""
        threads = [threading.Thread(target=self._ask_on) for _ in range(ASKERS)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._over.set()
            for thread in threads:
                thread.join()

    def wait_for_good(self, since: float) -> None:
        """Wait until enough good answers have come after a moment, and none failed after them."""
        deadline = time.monotonic() + LIMIT_SECONDS
        while time.monotonic() < deadline:
            last_failure = max((at for at, _ in self.failed), default=0.0)
            if sum(at > max(since, last_failure) for at in self.good) >= GOOD_ANSWERS:
                return
            time.sleep(0.05)
        raise AssertionError(f"{self.address} does not answer: {self.failed[-3:]}")

    def _ask_on(self) -> None:
        while not self._over.is_set():
            try:
                self._ask()
            except (OSError, http.client.HTTPException) as error:
                self.failed.append((time.monotonic(), type(error).__name__))
            self._over.wait(PAUSE_SECONDS)

    def _ask(self) -> None:
        connection = http.client.HTTPConnection(self.address, SERVING_PORT)
        connection.sock = self.system.cluster.connect(self.address, SERVING_PORT, ANSWER_SECONDS)
        try:
            connection.request("POST", "/v2/models/digits/infer", *QUESTION)
            answer = connection.getresponse()
            body = answer.read()
        finally:
            connection.close()
        if answer.status == 200:
            assert json.loads(body)["outputs"][0]["data"] == [CLIP.digit]
            self.good.append(time.monotonic())
        else:
            self.failed.append((time.monotonic(), str(answer.status)))


@dataclass(frozen=True)
class Run:
    """One restart as its client saw it."""

    seconds: float
    failed: Counter[str]


CLIP = models.digit_clips()[0]


def _question() -> tuple[bytes, dict[str, str]]:
    """Return the body and the headers of an inference, its tensor as bytes."""
    with wave.open(str(CLIP.path)) as file:
        samples = array.array("h", file.readframes(file.getnframes()))
    data = array.array("f", (value / 32768 for value in samples)).tobytes()
    tensor = {
        "name": "audio",
        "shape": [1, len(samples)],
        "datatype": "FP32",
        "parameters": {"binary_data_size": len(data)},
    }
    head = json.dumps({"inputs": [tensor], "outputs": [{"name": "digit"}]}).encode()
    return head + data, {"Inference-Header-Content-Length": str(len(head))}


QUESTION = _question()


def measure(system: System, name: str, restart: Callable[[], None]) -> Run:
    """Restart while a client asks; return how long it had no good answer, and what failed."""
    client = Client(system, system.get("service", name)["spec"]["clusterIP"])
    with client.asking():
        client.wait_for_good(0.0)
        began = time.monotonic()
        restart()
        client.wait_for_good(time.monotonic())
    good = sorted(client.good)
    longest = max(later - earlier for earlier, later in pairwise(good) if later > began)
    return Run(longest, Counter(why for at, why in client.failed if at > began))


def restart_by_hand(system: System, name: str, method: str, number: int) -> None:
    """Write a GPUPodRestart of the workload's first pod, and wait for its outcome."""
    pods = [
        pod["metadata"]["name"]
        for pod in system.items("pods", f"vram.dev/workload={name}")
        if "deletionTimestamp" not in pod["metadata"]
    ]
    restart = f"{name}-{method.lower()}-{number}"
    system.apply(
        {
            "apiVersion": "vram.dev/v1alpha1",
            "kind": "GPUPodRestart",
            "metadata": {"name": restart},
            "spec": {"workload": name, "pod": {"name": min(pods)}, "method": method},
        }
    )

    def ended() -> str | None:
        outcome: str | None = (system.get("gpr", restart).get("status") or {}).get("outcome")
        return outcome

    outcome = system.wait(f"the end of {restart}", LIMIT_SECONDS, ended)
    assert outcome == RECOVERED, system.get("gpr", restart)


def roll_out(system: System, name: str) -> None:
    """What people do without the operator."""
    system.kubectl("rollout", "restart", f"deployment/{name}")
    system.kubectl("rollout", "status", f"deployment/{name}", f"--timeout={LIMIT_SECONDS:.0f}s")


def _workload(name: str, replicas: int) -> Json:
    model = {**DIGITS, "residency": {"afterTask": "Keep", "load": "Eager"}}
    manifest = workload(name, [model], {"drainTimeoutSeconds": 10})
    template = manifest["spec"]["template"]
    template["replicas"] = replicas
    # Two dozen agents have to fit a laptop; the model weighs less than a megabyte.
    template["spec"]["containers"][0]["resources"] = {
        "requests": {"memory": "64Mi", "cpu": "10m"},
        "limits": {"memory": "1Gi"},
    }
    return manifest


Found = dict[tuple[str, int], list[Run]]
"""The runs by method and number of replicas."""


def run(system: System, runs: int, found: Found) -> None:
    """Measure every method; what was measured is in ``found`` even if a later restart fails."""
    aged = [f"aged-{number:02}" for number in range(runs)]
    system.apply(_workload("single", 1), _workload("pair", 2))
    system.wait_ready("single")
    system.wait_ready("pair")
    for name in aged:
        system.apply(_workload(name, 1))
    for name in aged:
        system.wait_ready(name, LIMIT_SECONDS)

    def keep(method: str, replicas: int, one: Run) -> None:
        found.setdefault((method, replicas), []).append(one)
        said = f"{method}, {replicas} replicas: {one.seconds:.2f} s, failed {dict(one.failed)}"
        print(f"{datetime.now(UTC):%H:%M:%S} {said}", flush=True)

    for name, replicas in (("single", 1), ("pair", 2)):
        for number in range(runs):
            keep(REFERENCE, replicas, measure(system, name, partial(roll_out, system, name)))
            for method in ("Recycle", "Evict"):
                act = partial(restart_by_hand, system, name, method, number)
                keep(method, replicas, measure(system, name, act))
    for name in aged:
        _wait_until_old(system, name)
        act = partial(restart_by_hand, system, name, "InPlace", 0)
        keep("InPlace", 1, measure(system, name, act))


def _wait_until_old(system: System, name: str) -> None:
    started = datetime.fromisoformat(system.container(name)["state"]["running"]["startedAt"])
    age = (datetime.now(UTC) - started).total_seconds()
    time.sleep(max(0.0, MINIMUM_IN_PLACE_COOLDOWN_SECONDS + 2 - age))


def main(runs: int, extras: str = "onnx") -> None:
    """Measure on a node of its own, and write downtime.json."""
    record = Record(machine={"loadAverageAtStart": round(os.getloadavg()[0], 2)})
    with tempfile.TemporaryDirectory() as folder:
        try:
            node = cluster.up("node", Path(folder) / "node")
        except cluster.ClusterUnavailable as error:
            print(f"skipped: downtime, {error}")
            return
        found: Found = {}
        with node:
            try:
                run(install(node, extras), runs, found)
            except AssertionError as error:
                record.notes.append(f"ended early: {str(error).splitlines()[0]}")
    record.notes += [
        "through the Service's address by kube-proxy, a new connection for each request",
        "no container exits twice within 600 s, so the kubelet's back-off holds none of them up",
    ]
    for (method, replicas), ones in found.items():
        record.rows.append(
            Row(
                benchmark="downtime",
                variant=f"{method}, {replicas} replica{'s' if replicas > 1 else ''}",
                size_bytes=0,
                samples=[one.seconds for one in ones],
                reference=REFERENCE,
                reference_samples=[one.seconds for one in found[REFERENCE, replicas]],
            )
        )
    record.extra = {"failed": [_failures(key, ones) for key, ones in found.items()]}
    print(f"written to {write('downtime', record)}")


def _failures(key: tuple[str, int], ones: list[Run]) -> dict[str, Any]:
    seconds = sorted(one.seconds for one in ones)
    ninth = statistics.quantiles(seconds, n=10, method="inclusive")[-1]
    requests = sum((one.failed for one in ones), Counter[str]())
    return {
        "method": key[0],
        "replicas": key[1],
        "runs": len(ones),
        "medianSeconds": round(statistics.median(seconds), 3),
        "p90Seconds": round(ninth, 3),
        "longestSeconds": round(seconds[-1], 3),
        "failedRequestsPerRun": round(sum(requests.values()) / len(ones), 1),
        "failedRequests": dict(requests),
    }
