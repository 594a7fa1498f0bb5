"""Any order of trouble over the real gather, plan and apply: a state machine for Hypothesis.

The rules of `Judge` hold at each write, call and step. When the trouble is over, no restart is left
open. That each of the rules would be missed: `test_broken_rules`.
"""

from __future__ import annotations

import asyncio

from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from vram_operator.kube import PODS, WORKLOADS

from tests.unit.operator.once.apiserver import Crash, Fault
from tests.unit.operator.once.fleet import COOLDOWN_SECONDS, NAMESPACE, Fleet
from tests.unit.operator.once.replica import Replica

FAULTS = st.lists(st.sampled_from([None, *Fault]), min_size=1, max_size=4)
WORKLOAD = st.sampled_from(["speech", "vision"])
POD = st.integers(0, 5)
YIELDS = st.tuples(st.integers(0, 3), st.integers(0, 3))
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
        pods=st.sampled_from([3, 2, 1]),
        cap=st.integers(1, 3),
        max_unavailable=st.integers(1, 2),
        lease_is_ignored=st.booleans(),
    )
    def begin(self, pods: int, cap: int, max_unavailable: int, lease_is_ignored: bool) -> None:
        self.fleet = Fleet(pods, cap, max_unavailable)
        self.at_once = self.fleet.judge.leaders = 2 if lease_is_ignored else 1
        self.leaders = [self.bear() for _ in range(self.at_once)]
        self.settle()

    def bear(self) -> Replica:
        """Start a process of the operator."""
        self.born += 1
        replica = Replica(self.fleet, f"replica-{self.born}", self.loop)
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

    def workload_of(self, index: int) -> str:
        return self.pod_name(index).rsplit("-", 1)[0]

    def all_hear(self) -> None:
        """All leaders see everything and are told by each agent how it is."""
        self.fleet.pass_time(5)
        for replica in self.leaders:
            replica.watch(10_000)
            replica.listen()

    def settle(self) -> None:
        """Let all that is due be done, without any trouble."""
        for _ in range(6):
            self.all_hear()
            for replica in self.leaders:
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
    @rule(name=WORKLOAD, other=WORKLOAD, yields=YIELDS)
    def two_leaders_visit_at_once(self, name: str, other: str, yields: tuple[int, int]) -> None:
        first, second = self.leaders
        first.api.yields, second.api.yields = yields

        async def both() -> None:
            await asyncio.gather(first.visit((NAMESPACE, name)), second.visit((NAMESPACE, other)))

        first.run(both())
        first.api.yields = second.api.yields = 0

    @rule(who=st.integers(0, 1), yields=st.integers(0, 3))
    def one_leader_visits_both_at_once(self, who: int, yields: int) -> None:
        replica = self.leader(who)
        replica.api.yields = yields

        async def both() -> None:
            await asyncio.gather(*(replica.visit((NAMESPACE, name)) for name in self.fleet.names))

        replica.run(both())
        replica.api.yields = 0

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

    @rule(index=POD, sticky=st.booleans())
    def a_pod_leaks(self, index: int, sticky: bool) -> None:
        agent = self.fleet.agent_of(self.pod_name(index))
        agent.residual_gib, agent.is_sticky = 9.0, sticky

    @rule(index=POD, sticky=st.booleans(), faults=FAULTS)
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
                    self.visit(replica, self.workload_of(index))

    def leak_everywhere(self, *, sticky: bool) -> None:
        for index in range(len(self.fleet.pod_names())):
            self.a_pod_leaks(index, sticky)

    @rule(sticky=st.booleans(), yields=st.integers(0, 3))
    def all_pods_leak_at_once(self, sticky: bool, yields: int) -> None:
        """More restarts are asked for than there are places, and most of them have to wait."""
        self.leak_everywhere(sticky=sticky)
        for _ in range(3):
            self.all_hear()
            for who in range(len(self.leaders)):
                self.one_leader_visits_both_at_once(who, yields)

    @rule(index=POD, seconds=st.sampled_from([25, 35, 300]))
    def a_leak_is_heard_of_and_gone_before_anybody_acts(self, index: int, seconds: int) -> None:
        self.a_pod_leaks(index, sticky=False)
        self.all_hear()
        self.a_leak_goes_by_itself(index)
        self.fleet.pass_time(seconds)
        for who in range(len(self.leaders)):
            self.visit(self.leader(who), self.workload_of(index))

    @precondition(lambda self: self.at_once == 2)
    @rule(name=WORKLOAD, count=st.integers(2, 4))
    def one_leader_acts_on_what_was_before_the_other_acted(self, name: str, count: int) -> None:
        first, second = self.leaders
        self.fleet.pass_time(COOLDOWN_SECONDS)
        self.leak_everywhere(sticky=False)
        self.all_hear()
        self.visit(first, name)
        second.watch(10_000)
        for _ in range(count):
            self.visit(first, name)
            self.fleet.pass_time(5)
            first.watch(10_000)
            first.listen()
        self.visit(second, name)

    @rule(index=POD)
    def a_leak_goes_by_itself(self, index: int) -> None:
        agent = self.fleet.agent_of(self.pod_name(index))
        agent.residual_gib, agent.is_sticky = 1.0, False

    @rule(index=POD, silent=st.booleans())
    def an_agent_falls_silent_or_speaks(self, index: int, silent: bool) -> None:
        self.fleet.agent_of(self.pod_name(index)).is_silent = silent

    @rule(index=POD, count=st.integers(1, 3))
    def answers_of_an_agent_are_lost(self, index: int, count: int) -> None:
        self.fleet.agent_of(self.pod_name(index)).lost_answers = count

    @rule(index=POD)
    def a_container_dies(self, index: int) -> None:
        self.fleet.exit_container(self.pod_name(index))

    @rule(index=POD)
    def a_pod_is_deleted_and_made_again_under_its_name(self, index: int) -> None:
        pod = self.fleet.server.find(PODS.path(NAMESPACE), self.pod_name(index))
        assert pod is not None
        self.fleet.replace_pod(pod)

    @rule(allows=st.booleans())
    def a_budget_changes(self, allows: bool) -> None:
        self.fleet.server.budget_allows = allows

    # --- people -----------------------------------------------------------------------------------

    @precondition(lambda self: len(self.fleet.open()) < 6)
    @rule(index=POD, method=st.sampled_from(["Auto", "Recycle", "InPlace", "Evict"]))
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
        assert not self.fleet.judge.violations, self.fleet.judge.violations

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
        self.the_rules_hold()

    def is_handled(self) -> bool:
        for raw in self.fleet.collection(WORKLOADS):
            annotations = raw["metadata"]["annotations"]
            wanted = annotations.get("vram.dev/restart")
            if wanted and annotations.get("vram.dev/restart-handled") != wanted:
                return False
        return True
