"""The story that the demo tells, in order: install, load, give back, come back, leak, restart."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from vram_agent.protocol import ModelState, Report

from demo.console import BytesTable, Step, StepFailedError, Steps, mebibytes
from demo.pod import Forward, Pod, wait_for
from tests import cluster, models
from tests.cluster import build
from tests.cluster.images import Image
from tests.support.project_images import NAMES, chart_values, project_image

DIRECTORY = Path(".cluster")
OPERATOR_NAMESPACE = "vram-system"
NAMESPACE = "speech"
LEAK_MEGABYTES = 128
LEAK_REQUESTS = 6
AGENT_PORTS = (8000, 8001)


class Story:
    """The demo's steps; each leaves behind what the next one needs."""

    def __init__(self, steps: Steps, root: Path) -> None:
        self._steps = steps
        self._root = root
        self._bytes = BytesTable()
        self._cluster: cluster.Cluster
        self._images: list[Image] = []

    def tell(self) -> None:
        """Run every step. Raises StepFailedError at the first that did not happen."""
        self._start_cluster()
        if self._cluster.managed:
            self._build_and_load_images()
        self._install()
        self._apply_example()
        with (
            Forward(self._kubectl(), "speech", AGENT_PORTS[0]) as serving,
            Forward(self._kubectl(), "speech", AGENT_PORTS[1]) as control,
        ):
            pod = Pod(serving.url, control.url)
            self._first_request(pod)
            self._second_request(pod)
            self._idle(pod)
            self._leak(pod)
            self._watch_restart(pod)
            self._third_request(pod)
        print(self._steps.summary())
        self._say_goodbye()

    # --- install ----------------------------------------------------------------------------

    def _start_cluster(self) -> None:
        with self._steps.step(
            "a local Kubernetes (the first time, its programs are built: minutes)"
        ):
            self._cluster = cluster.up("node", DIRECTORY)
            print(self._cluster.kubectl("get", "nodes"), end="")

    def _build_and_load_images(self) -> None:
        for name in NAMES:
            with self._steps.step(f"the {name}'s image, built from Dockerfile.{name}") as step:
                image = project_image(name)
                size = mebibytes(image.archive.stat().st_size)
                step.say(f"{image.reference}: {size} to import into the node")
                self._cluster.load_image(image.archive)
                self._images.append(image)

    def _install(self) -> None:
        with self._steps.step("the chart, installed by helm"):
            values = chart_values(*self._images) if self._images else {}
            self._run(
                str(build.helm()),
                f"--kubeconfig={self._cluster.kubeconfig}",
                *("upgrade", "--install", "vram-operator", "charts/vram-operator"),
                *("--namespace", OPERATOR_NAMESPACE, "--create-namespace"),
                *("--wait", "--timeout", "180s"),
                *(f"--set={key}={value}" for key, value in values.items()),
            )
            print(self._cluster.kubectl("get", "pods", "-n", OPERATOR_NAMESPACE), end="")

    def _apply_example(self) -> None:
        with self._steps.step("kubectl apply -f examples/speech.yaml"):
            self._ensure_namespace()
            self._ensure_models()
            self._kubectl_in("apply", "-f", "examples/speech.yaml")
            self._kubectl_in("wait", "gmw/speech", "--for=condition=Ready", "--timeout=180s")
            print(self._kubectl_in("get", "gmw,pods"), end="")

    def _ensure_namespace(self) -> None:
        manifest = {
            "apiVersion": "v1",
            "kind": "Namespace",
            "metadata": {
                "name": NAMESPACE,
                "labels": {"pod-security.kubernetes.io/enforce": "restricted"},
            },
        }
        self._cluster.kubectl("apply", "-f", "-", stdin=json.dumps(manifest))

    def _ensure_models(self) -> None:
        sources = [models.WHISPER, self._root / "demo/models/leaky.py"]
        manifest = self._kubectl_in(
            *("create", "configmap", "speech-models", "--dry-run=client", "-o", "json"),
            *(f"--from-file={path}" for path in sources),
        )
        self._cluster.kubectl(
            *("-n", NAMESPACE, "apply", "--server-side", "-f", "-"), stdin=manifest
        )

    # --- memory -----------------------------------------------------------------------------

    def _first_request(self, pod: Pod) -> None:
        with self._steps.step("the first request: the model loads when it is asked for") as step:
            before = pod.report()
            _expect(before, "whisper", ModelState.ABSENT)
            self._bytes.add("started, nothing loaded", before)
            self._transcribe(pod, step, 0)
            self._bytes.add("after the first task", self._offloaded(pod))

    def _second_request(self, pod: Pod) -> None:
        with self._steps.step("a second request: the model comes back") as step:
            self._transcribe(pod, step, 1)
            self._bytes.add("after the second task", self._offloaded(pod))

    def _idle(self, pod: Pod) -> None:
        with self._steps.step(
            "idle: the GPU process ends, the weights stay in host memory"
        ) as step:

            def sunk() -> Report | None:
                report = pod.report()
                return report if report.models[0].tier == "Host" else None

            report = wait_for("sinking to the Host tier", 150, sunk)
            if report.memory.used_bytes != 0:
                raise StepFailedError(f"the Host tier still uses {report.memory.used_bytes} bytes")
            self._bytes.add("idle", report)
            self._transcribe(pod, step, 2)
            self._bytes.add("back from Host", self._offloaded(pod))

    def _transcribe(self, pod: Pod, step: Step, index: int) -> None:
        clip = models.clips()[index]
        text, seconds = pod.transcribe("whisper", clip.path)
        step.say(f"{clip.path.name}: heard {text!r} in {seconds:.2f} s")
        if _words(text) != _words(clip.text):
            raise StepFailedError(f"{clip.path.name} says {clip.text!r}, the pod heard {text!r}")

    def _offloaded(self, pod: Pod) -> Report:
        def settled() -> Report | None:
            report = pod.report()
            return report if report.models[0].state == ModelState.OFFLOADED else None

        return wait_for("giving the memory back after the task", 30, settled)

    # --- leak and restart -------------------------------------------------------------------

    def _leak(self, pod: Pod) -> None:
        title = "a model that leaks joins (demo/models/leaky.py); no pod is restarted for it"
        with self._steps.step(title) as step:
            self._kubectl_in("patch", "gmw/speech", "--type=json", "--patch-file=demo/leak.yaml")

            def joined() -> bool | None:
                return any(model.name == "leaky" for model in pod.report().models) or None

            wait_for("the new model in the running pod", 60, joined)
            for _ in range(LEAK_REQUESTS):
                answer = pod.infer(
                    "leaky",
                    {
                        "inputs": [{"name": "x", "shape": [1], "datatype": "FP32", "data": [1.0]}],
                        "parameters": {"megabytes": LEAK_MEGABYTES},
                    },
                )
                _expect_two(answer)
            step.say(f"{LEAK_REQUESTS} requests, {LEAK_MEGABYTES} MiB forgotten by each")
            self._bytes.add("leaked", pod.report())

    def _watch_restart(self, pod: Pod) -> None:
        with self._steps.step("the operator sees the residual and restarts what holds it") as step:

            def finished() -> dict[str, Any] | None:
                for restart in self._restarts():
                    if restart.get("status", {}).get("outcome"):
                        return restart
                return None

            restart = wait_for("a finished GPUPodRestart", 180, finished)
            step.say(f"why: {restart['spec'].get('reason', '')}")
            print(self._kubectl_in("get", "gmw,gpr"), end="")
            status = restart["status"]
            if status["outcome"] != "Recovered":
                raise StepFailedError(f"the restart's outcome is {status['outcome']}: {status}")
            step.say(f"given back: {status['reclaimed']}")
            self._bytes.add("after the restart", pod.report())

    def _third_request(self, pod: Pod) -> None:
        with self._steps.step("and it still hears") as step:
            self._transcribe(pod, step, 3)

    def _restarts(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(self._kubectl_in("get", "gpr", "-o", "json"))[
            "items"
        ]
        return found

    # --- plumbing ---------------------------------------------------------------------------

    def _say_goodbye(self) -> None:
        kubeconfig = self._cluster.kubeconfig.resolve().relative_to(self._root)
        print(
            "\nThe cluster is still up. Look around:\n"
            f"    export KUBECONFIG=$PWD/{kubeconfig}\n"
            f"    kubectl -n {NAMESPACE} get gmw,gpr,pods\n"
            f"    kubectl -n {NAMESPACE} describe gmw speech\n"
            f"    kubectl -n {NAMESPACE} port-forward service/speech 8001 &"
            "  curl -s localhost:8001/report\n"
            "    kubectl explain gmw.spec.models.residency\n"
            "Take it away:\n    make demo-down"
        )

    def _kubectl(self) -> list[str]:
        return [*self._cluster.kubectl_command(), "--namespace", NAMESPACE]

    def _kubectl_in(self, *arguments: str) -> str:
        return self._cluster.kubectl("--namespace", NAMESPACE, *arguments)

    def _run(self, *command: str) -> None:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise StepFailedError(f"{' '.join(command)} failed: {done.stderr.strip()}")


def _expect(report: Report, model: str, state: ModelState) -> None:
    seen = {entry.name: entry.state for entry in report.models}
    if seen.get(model) != state:
        raise StepFailedError(f"{model} should be {state}, the pod reports {seen}")


def _expect_two(answer: dict[str, Any]) -> None:
    if answer["outputs"][0]["data"] != [2.0]:
        raise StepFailedError(f"1 + 1 should be 2, the model says {answer['outputs'][0]}")


def _words(text: str) -> list[str]:
    return "".join(c if c.isalpha() else " " for c in text.lower()).split()
