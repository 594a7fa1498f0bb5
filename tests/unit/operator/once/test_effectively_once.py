"""Effectively once, model-checked: the real gather, plan and apply over any order of trouble.

After each step the rules of `Fleet.check` hold. When the trouble is over, no restart is left open.
"""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from vram_operator.api import RestartMethod
from vram_operator.kube import PODS, WORKLOADS

from tests.unit.operator.once.apiserver import Crash, Fault
from tests.unit.operator.once.fleet import NAMESPACE, Fleet, Replica

FAULTS = st.lists(st.sampled_from([None, *Fault]), min_size=1, max_size=4)
WORKLOAD = st.sampled_from(["speech", "vision"])
CALM_SECONDS = 7200


class Trouble(RuleBasedStateMachine):
    """Two replicas of the operator, of which the first leads and the second may at the same time.

    A replica that crashes is another process from then on: it lists everything and asks each agent
    before it acts, as `Acting.run` does.
    """

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.fleet = Fleet()
        self.born = 0
        self.values = 0
        self.at_once = 1

    @initialize(
        pods=st.integers(1, 2),
        cap=st.integers(1, 2),
        max_unavailable=st.integers(1, 2),
        lease_is_ignored=st.booleans(),
    )
    def begin(self, pods: int, cap: int, max_unavailable: int, lease_is_ignored: bool) -> None:
        self.fleet = Fleet(pods, str(cap), max_unavailable)
        self.cap, self.max_unavailable = cap, max_unavailable
        self.at_once = 2 if lease_is_ignored else 1
        self.leaders = [self.bear() for _ in range(self.at_once)]
        self.settle()

    def bear(self) -> Replica:
        """Start a process of the operator."""
        self.born += 1
        replica = Replica(self.fleet, f"replica-{self.born}", self.loop)
        self.fleet.replicas.append(replica)
        replica.start()
        return replica

    def leader(self, index: int) -> Replica:
        return self.leaders[index % len(self.leaders)]

    def visit(self, replica: Replica, name: str) -> None:
        """Visit a workload; a crash ends the process, and another one begins."""
        try:
            replica.run(replica.visit((NAMESPACE, name)))
        except Crash:
            self.leaders[self.leaders.index(replica)] = self.bear()
        finally:
            replica.api.faults, replica.crash_at_call = [], ""

    def pod_name(self, index: int) -> str:
        names = self.fleet.pod_names()
        return names[index % len(names)]

    def settle(self) -> None:
        """Let all that is due be done, without any trouble."""
        for _ in range(6):
            self.fleet.pass_time(5)
            for replica in self.leaders:
                replica.watch(10_000)
                replica.listen()
                for name in self.fleet.names:
                    self.visit(replica, name)

    # --- the operator at work ---------------------------------------------------------------------

    @rule(who=st.integers(0, 1), name=WORKLOAD)
    def a_visit(self, who: int, name: str) -> None:
        self.visit(self.leader(who), name)

    @rule(who=st.integers(0, 1), name=WORKLOAD, faults=FAULTS)
    def a_visit_whose_requests_fail(self, who: int, name: str, faults: list[Fault | None]) -> None:
        replica = self.leader(who)
        replica.api.faults = list(faults)
        self.visit(replica, name)

    @rule(who=st.integers(0, 1), name=WORKLOAD, when=st.sampled_from(["before", "after"]))
    def a_crash_at_a_call_to_an_agent(self, who: int, name: str, when: str) -> None:
        replica = self.leader(who)
        replica.crash_at_call = when
        self.visit(replica, name)

    @precondition(lambda self: self.at_once == 2)
    @rule(name=WORKLOAD, other=WORKLOAD, yields=st.tuples(st.integers(0, 3), st.integers(0, 3)))
    def two_leaders_visit_at_once(self, name: str, other: str, yields: tuple[int, int]) -> None:
        first, second = self.leaders
        first.api.yields, second.api.yields = yields

        async def both() -> None:
            await asyncio.gather(first.visit((NAMESPACE, name)), second.visit((NAMESPACE, other)))

        first.run(both())
        first.api.yields = second.api.yields = 0

    @rule(rounds=st.integers(1, 2))
    def a_quiet_time(self, rounds: int) -> None:
        for _ in range(rounds):
            self.settle()

    # --- what is seen of the cluster --------------------------------------------------------------

    @rule(who=st.integers(0, 1), count=st.sampled_from([1, 2, 5, 10_000]))
    def events_come(self, who: int, count: int) -> None:
        self.leader(who).watch(count)

    @rule(who=st.integers(0, 1), start=st.integers(0, 200), count=st.integers(1, 10))
    def old_events_come_again(self, who: int, start: int, count: int) -> None:
        self.leader(who).watch_again(start, count)

    @rule(who=st.integers(0, 1))
    def a_watch_expires_and_all_is_listed(self, who: int) -> None:
        self.leader(who).resync()

    @rule(who=st.integers(0, 1))
    def agents_report(self, who: int) -> None:
        self.leader(who).listen()

    @rule(who=st.integers(0, 1))
    def the_other_replica_takes_over(self, who: int) -> None:
        self.leaders[who % len(self.leaders)] = self.bear()

    # --- the cluster ------------------------------------------------------------------------------

    @rule(seconds=st.sampled_from([5, 10, 40, 130, 1000]))
    def time_passes(self, seconds: int) -> None:
        self.fleet.pass_time(seconds)

    @rule(index=st.integers(0, 3), sticky=st.booleans())
    def a_pod_leaks(self, index: int, sticky: bool) -> None:
        agent = self.fleet.agent_of(self.pod_name(index))
        agent.residual_gib, agent.is_sticky = 9.0, sticky

    @rule(index=st.integers(0, 3), sticky=st.booleans(), faults=FAULTS)
    def all_find_a_leak_before_their_watches_show_what_the_others_did(
        self, index: int, sticky: bool, faults: list[Fault | None]
    ) -> None:
        self.a_pod_leaks(index, sticky)
        self.fleet.pass_time(5)
        for replica in self.leaders:
            replica.listen()
        for replica in list(self.leaders):
            for one_more_fault in (faults, []):
                replica.api.faults = list(one_more_fault)
                if replica in self.leaders:
                    self.visit(replica, self.pod_name(index).rsplit("-", 1)[0])

    @rule(index=st.integers(0, 3))
    def a_leak_goes_by_itself(self, index: int) -> None:
        agent = self.fleet.agent_of(self.pod_name(index))
        agent.residual_gib, agent.is_sticky = 1.0, False

    @rule(index=st.integers(0, 3), silent=st.booleans())
    def an_agent_falls_silent_or_speaks(self, index: int, silent: bool) -> None:
        self.fleet.agent_of(self.pod_name(index)).is_silent = silent

    @rule(index=st.integers(0, 3), count=st.integers(1, 3))
    def answers_of_an_agent_are_lost(self, index: int, count: int) -> None:
        self.fleet.agent_of(self.pod_name(index)).lost_answers = count

    @rule(index=st.integers(0, 3))
    def a_container_dies(self, index: int) -> None:
        self.fleet.exit_container(self.pod_name(index))

    @rule(index=st.integers(0, 3))
    def a_pod_is_deleted_and_made_again_under_its_name(self, index: int) -> None:
        pod = self.fleet.server.find(PODS.path(NAMESPACE), self.pod_name(index))
        assert pod is not None
        self.fleet.replace_pod(pod)

    @rule(allows=st.booleans())
    def a_budget_changes(self, allows: bool) -> None:
        self.fleet.server.budget_allows = allows

    # --- people -----------------------------------------------------------------------------------

    @precondition(lambda self: len(self.fleet.open()) < 6)
    @rule(index=st.integers(0, 3), method=st.sampled_from(["Auto", "Recycle", "InPlace", "Evict"]))
    def a_person_creates_a_restart(self, index: int, method: str) -> None:
        self.values += 1
        self.fleet.add_restart(f"by-hand-{self.values}", self.pod_name(index), method)

    @precondition(lambda self: self.values < 4)
    @rule(name=WORKLOAD)
    def a_person_annotates(self, name: str) -> None:
        self.values += 1
        self.fleet.annotate(name, str(self.values))

    # --- what must hold ---------------------------------------------------------------------------

    @invariant()
    def the_rules_hold(self) -> None:
        if self.born:
            self.fleet.check(self.at_once, self.cap, self.max_unavailable)

    def teardown(self) -> None:
        """When the trouble is over, everything that was asked for has come to an end."""
        if self.born:
            self.come_to_rest()
        self.loop.close()

    def come_to_rest(self) -> None:
        fleet = self.fleet
        self.leaders = [self.bear()]
        fleet.server.budget_allows = True
        for agent in fleet.agents.values():
            agent.is_silent, agent.lost_answers = False, 0
            agent.residual_gib, agent.is_sticky = 1.0, False
        for _ in range(CALM_SECONDS // 60):
            if not fleet.open() and self.is_handled():
                break
            fleet.pass_time(25)
            self.settle()
        assert not fleet.open(), f"lost: {fleet.open()}"
        assert self.is_handled(), "an annotation was forgotten"
        fleet.check(2, self.cap, self.max_unavailable)

    def is_handled(self) -> bool:
        for raw in self.fleet.collection(WORKLOADS):
            annotations = raw["metadata"]["annotations"]
            wanted = annotations.get("vram.dev/restart")
            if wanted and annotations.get("vram.dev/restart-handled") != wanted:
                return False
        return True


Trouble.TestCase.settings = settings(
    max_examples=15,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestTrouble = pytest.mark.timeout(300)(Trouble.TestCase)


def test_the_fleet_restarts_a_leaking_pod_once_when_nothing_goes_wrong() -> None:
    """The machine proves nothing in a world where nothing ever happens."""
    machine = Trouble()
    machine.begin(pods=2, cap=1, max_unavailable=1, lease_is_ignored=False)
    assert machine.fleet.open() == []
    machine.a_pod_leaks(0, sticky=False)
    machine.fleet.add_restart("by-hand", "vision-0", RestartMethod.EVICT)
    for _ in range(10):
        machine.settle()
    assert [str(one.step) for one in machine.fleet.executions] == ["Recycle"]
    assert machine.fleet.agent_of("vision-0").uid not in {"pod-3", "pod-4"}
    machine.teardown()
