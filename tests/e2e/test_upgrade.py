"""The life of a release: upgraded, rolled back, uninstalled, installed again; no pod of a model
restarts, and no request fails.

The next version is the same build under another tag, in a chart of another version, with another
image for agents, which is not even there: whoever rolled a pod would be seen at once. Runs last, as
it changes what all other tests share.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.e2e.installation import CHART, RELEASE, helm, install_chart
from tests.e2e.system import Json, System, find_condition
from tests.e2e.workloads import LEAKY, leak_request, workload
from tests.support.project_images import chart_values, project_image

NAME = "lasting"
BUDGET = "keep-lasting"
NEXT = "0.2.0-next"
WAIT = ("--wait", "--timeout", "180s")


def ask_for_deletion(system: System, name: str) -> None:
    pod = {"name": system.pod(NAME)["metadata"]["name"]}
    system.apply(
        {
            "apiVersion": "vram.dev/v1alpha1",
            "kind": "GPUPodRestart",
            "metadata": {"name": name},
            "spec": {"workload": NAME, "pod": pod, "method": "Delete"},
        }
    )


def end_of(system: System, name: str) -> Json:
    def ended() -> Json | None:
        found = system.get("gpr", name)
        return found if found.get("status", {}).get("outcome") else None

    return system.wait(f"the end of {name}", 120, ended)


def what_runs(system: System) -> Json:
    """All that a restart or a rollout of the workload would change."""
    deployment, pod = system.get("deployment", NAME), system.pod(NAME)
    return {
        "generation": deployment["metadata"]["generation"],
        "template": deployment["spec"]["template"],
        "pod": pod["metadata"]["uid"],
        "hash": pod["metadata"]["labels"]["pod-template-hash"],
        "containers": [
            (one["containerID"], one["restartCount"]) for one in pod["status"]["containerStatuses"]
        ],
        "boot": system.report(NAME)["agent"]["bootID"],
    }


def upgrade(system: System, chart: Path) -> None:
    """What ``helm upgrade`` to the next version is, with leave to delete pods."""
    description = chart / "Chart.yaml"
    text = description.read_text()
    assert "version: 0.1.0" in text
    description.write_text(text.replace("ersion: 0.1.0", f"ersion: {NEXT}"))
    image = project_image("operator").reference
    system.cluster.tag_image(image, f"{image.rpartition(':')[0]}:{NEXT}")
    helm(
        system.cluster,
        *("upgrade", RELEASE, str(chart), "--reuse-values", *WAIT),
        f"--set=image.tag={NEXT},agentImage.tag={NEXT},allowDelete=true",
    )


def revision(system: System) -> tuple[str, str]:
    """The chart that is installed, and what the release says of itself."""
    (found,) = json.loads(helm(system.cluster, "list", "--output", "json"))
    return str(found["chart"]), str(found["status"])


@contextmanager
def requested_throughout(system: System) -> Iterator[list[int]]:
    """Ask the workload again and again; yields the status codes so far."""
    codes: list[int] = []
    ended = threading.Event()

    def ask() -> None:
        while not ended.wait(0.2):
            answer = system.request(NAME, "POST", "/v2/models/leaky/infer", leak_request(0))
            codes.append(answer.status)

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        yield codes
    finally:
        ended.set()
        asking.join()


@pytest.fixture(scope="module")
def lasting(system: System) -> System:
    """A workload that an operator of the first version runs, behind a budget that forbids."""
    system.apply(
        workload(NAME, [LEAKY]),
        {
            "apiVersion": "policy/v1",
            "kind": "PodDisruptionBudget",
            "metadata": {"name": BUDGET},
            "spec": {
                "minAvailable": 1,
                "selector": {"matchLabels": {"vram.dev/workload": NAME}},
            },
        },
    )
    system.wait_ready(NAME)
    return system


def test_without_leave_no_pod_is_deleted(lasting: System) -> None:
    before = what_runs(lasting)
    ask_for_deletion(lasting, "not-yet")
    refused = end_of(lasting, "not-yet")
    assert refused["status"]["outcome"] == "Failed", refused
    assert find_condition(refused, "Admitted")["reason"] == "DeleteNotAllowed"
    assert what_runs(lasting) == before


def test_an_upgrade_restarts_and_rolls_nothing(lasting: System, tmp_path: Path) -> None:
    before = what_runs(lasting)
    chart = tmp_path / "vram-operator"
    shutil.copytree(CHART, chart)
    with requested_throughout(lasting) as codes:
        upgrade(lasting, chart)
    assert revision(lasting) == (f"vram-operator-{NEXT}", "deployed")
    assert set(codes) == {200}

    # The next version is at work here: what it is asked for comes about.
    lasting.apply({**workload(NAME, [LEAKY]), "spec": spec_with_queue(7)})
    generation = lasting.get("gmw", NAME)["metadata"]["generation"]
    lasting.wait(
        "the config of the next version in the running agent",
        60,
        lambda: lasting.report(NAME)["configGeneration"] == generation or None,
    )
    assert what_runs(lasting) == before


def spec_with_queue(depth: int) -> Json:
    spec: Json = workload(NAME, [LEAKY])["spec"]
    return {**spec, "queue": {"maxDepth": depth}}


def test_with_leave_a_pod_is_deleted_once_its_budget_allows(lasting: System) -> None:
    before = lasting.pod(NAME)["metadata"]["uid"]
    ask_for_deletion(lasting, "with-leave")

    def blocker() -> str | None:
        found = find_condition(lasting.get("gpr", "with-leave"), "Admitted")
        return found["message"] if found.get("reason") == "PodDisruptionBudget" else None

    assert BUDGET in lasting.wait("the budget to be named", 60, blocker)
    assert lasting.pod(NAME)["metadata"]["uid"] == before
    lasting.kubectl("delete", "pdb", BUDGET)
    done = end_of(lasting, "with-leave")
    assert done["status"]["outcome"] == "Recovered", done
    assert [one["method"] for one in done["status"]["attempts"]] == ["Delete"]
    assert lasting.pod(NAME)["metadata"]["uid"] != before
    # The Deployment is the first version's, and so is the image of the new pod.
    image = lasting.pod(NAME)["spec"]["containers"][0]["image"]
    assert image == project_image("agent").reference


def test_a_workload_serves_on_without_its_operator_and_under_the_next(lasting: System) -> None:
    node, before = lasting.cluster, what_runs(lasting)
    images = chart_values(project_image("operator"), project_image("agent"))
    with requested_throughout(lasting) as codes:
        helm(node, "rollback", RELEASE, "1", *WAIT)
        assert revision(lasting) == ("vram-operator-0.1.0", "deployed")
        helm(node, "uninstall", RELEASE, *WAIT)
        assert NAME in {one["metadata"]["name"] for one in lasting.items("gmw")}
        alone = len(codes)
        lasting.wait("an answer without an operator", 30, lambda: len(codes) > alone + 2 or None)
        install_chart(node, images)
        lasting.apply({**workload(NAME, [LEAKY]), "spec": spec_with_queue(9)})
        generation = lasting.get("gmw", NAME)["metadata"]["generation"]
        lasting.wait(
            "the config of the operator that came anew",
            60,
            lambda: lasting.report(NAME)["configGeneration"] == generation or None,
        )
    assert set(codes) == {200}
    assert what_runs(lasting) == before
