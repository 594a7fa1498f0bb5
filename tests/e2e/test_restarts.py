"""Restarts on a real kubelet: residual, manual, blocked by a budget, and killed half-way."""

from __future__ import annotations

from vram_agent.protocol import parse_quantity

from tests.e2e.system import Json, System, find_condition, true_conditions
from tests.e2e.workloads import LEAKY, leak_request, workload

RESIDUAL: Json = {"residual": {"threshold": "256Mi", "forSeconds": 4, "minSamples": 3}}
LEAKED_MEGABYTES = 512
MEBIBYTE = 1024**2


def leak(system: System, name: str, megabytes: int) -> None:
    answer = system.request(name, "POST", "/v2/models/leaky/infer", leak_request(megabytes))
    assert answer.status == 200, answer
    assert answer.json()["outputs"][0]["data"] == [42.0]


def test_a_residual_is_seen_and_the_pod_is_recycled(system: System) -> None:
    system.apply(workload("leaking", [LEAKY], RESIDUAL))
    system.wait_ready("leaking")
    before = system.container("leaking")
    leak(system, "leaking", LEAKED_MEGABYTES)
    restart = system.wait("a finished restart", 120, lambda: system.finished("leaking"))
    status, spec = restart["status"], restart["spec"]
    assert status["outcome"] == "Recovered", restart
    assert spec["trigger"] == "Residual"
    assert "256Mi" in spec["reason"]
    assert [attempt["method"] for attempt in status["attempts"]] == ["Recycle"]
    assert parse_quantity(status["reclaimed"]) >= (LEAKED_MEGABYTES - 64) * MEBIBYTE
    after = system.container("leaking")
    assert after["containerID"] == before["containerID"]
    assert after["restartCount"] == before["restartCount"]
    assert system.report("leaking")["memory"]["residualBytes"] < 256 * MEBIBYTE
    leak(system, "leaking", 1)
    assert len(system.restarts_of("leaking")) == 1
    last = system.get("gmw", "leaking")["status"]["lastRestart"]
    assert last["name"] == restart["metadata"]["name"]


def test_an_operator_killed_in_the_middle_restarts_once(system: System) -> None:
    system.apply(workload("killed", [LEAKY], {**RESIDUAL, "cooldownSeconds": 660}))
    system.wait_ready("killed")
    leak(system, "killed", LEAKED_MEGABYTES)
    system.wait("an open restart", 60, lambda: system.restarts_of("killed") or None)
    system.cluster.kubectl(
        *("delete", "pods", "--namespace", "vram-system", "--all", "--grace-period=0", "--force")
    )
    restart = system.wait("a finished restart", 180, lambda: system.finished("killed"))
    assert restart["status"]["outcome"] == "Recovered", restart
    assert len(system.restarts_of("killed")) == 1
    assert system.report("killed")["agent"]["epoch"] == 1


def test_a_budget_that_forbids_blocks_by_name_and_a_manual_restart_waits(system: System) -> None:
    system.apply(
        workload("guarded", [LEAKY], {"method": "Evict", "drainTimeoutSeconds": 5}),
        {
            "apiVersion": "policy/v1",
            "kind": "PodDisruptionBudget",
            "metadata": {"name": "keep-guarded"},
            "spec": {
                "minAvailable": 1,
                "selector": {"matchLabels": {"vram.dev/workload": "guarded"}},
            },
        },
    )
    system.wait_ready("guarded")
    uid = system.pod("guarded")["metadata"]["uid"]
    system.kubectl("annotate", "gmw", "guarded", "vram.dev/restart=now")

    def blocked() -> Json | None:
        for restart in system.restarts_of("guarded"):
            condition = find_condition(restart, "Admitted")
            if condition.get("status") == "False" and "keep-guarded" in condition["message"]:
                return restart
        return None

    restart = system.wait("a restart that the budget blocks", 60, blocked)
    assert not restart["status"].get("outcome")
    assert system.pod("guarded")["metadata"]["uid"] == uid
    system.wait(
        "RestartBlocked on the workload",
        30,
        lambda: "RestartBlocked" in true_conditions(system.get("gmw", "guarded")) or None,
    )
    system.kubectl("delete", "pdb", "keep-guarded")
    done = system.wait("the restart once it may", 120, lambda: system.finished("guarded"))
    assert done["status"]["outcome"] == "Recovered", done
    assert system.pod("guarded")["metadata"]["uid"] != uid


def test_deleting_a_workload_leaves_nothing(system: System) -> None:
    system.kubectl("delete", "gmw", "guarded", "leaking", "killed", "--wait")

    def gone() -> bool | None:
        kinds = "deployments,services,configmaps,pods,gpr"
        names = {item["metadata"]["name"] for item in system.items(kinds)}
        left = [n for n in names if n.startswith(("guarded", "leaking", "killed"))]
        return not left or None

    system.wait("what the operator made being collected", 90, gone)
