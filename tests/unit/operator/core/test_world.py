"""Restarts in a small model of the cluster, with crashes, repetition, silence and schedules."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from msgspec import structs
from vram_agent.protocol import ActionStep
from vram_operator.api import RestartMethod, RestartOutcome, RestartStatus, RestartTrigger
from vram_operator.core.figures import whole_seconds
from vram_operator.core.phases import is_finished
from vram_operator.core.plan import CreateRestart

from tests.support.factories import make_policy, make_settings, make_template_spec, make_workload
from tests.unit.operator.core.world import World

RECYCLE, IN_PLACE, EVICT = RestartMethod.RECYCLE, RestartMethod.IN_PLACE, RestartMethod.EVICT


def leaking_world(sticky: set[ActionStep], pods: int = 1, **policy: object) -> World:
    """A world whose first pod has leaked for long enough to be restarted."""
    workload = make_workload(spec=make_template_spec(restart=make_policy(**policy)))
    world = World(pods, workload)
    world.settle()
    fake = world.fakes["uid-speech-0"]
    fake.residual_gib, fake.sticky = 9.0, sticky
    world.pass_time(90)
    return world


def methods(world: World) -> list[RestartMethod]:
    (restart,) = world.restarts.values()
    return [attempt.method for attempt in restart.status.attempts]


def test_a_leak_that_a_recycle_gives_back_ends_with_the_recycle() -> None:
    world = leaking_world(set())
    world.run(60)
    (restart,) = world.restarts.values()
    assert restart.status.outcome is RestartOutcome.RECOVERED
    assert methods(world) == [RECYCLE]
    assert restart.status.reclaimed == "8704Mi"  # 9 GiB before, half of one after
    assert restart.status.downtime_seconds == 0
    assert world.workload.status.last_restart is not None
    assert world.workload.status.last_restart.outcome is RestartOutcome.RECOVERED


def test_a_leak_that_outlives_the_recycle_ends_with_the_container() -> None:
    world = leaking_world({ActionStep.RECYCLE})
    world.run(120)
    (restart,) = world.restarts.values()
    assert restart.status.outcome is RestartOutcome.RECOVERED
    assert methods(world) == [RECYCLE, IN_PLACE]
    assert restart.status.downtime_seconds is not None
    assert 0 < restart.status.downtime_seconds <= 15
    assert [one.step for one in world.executions] == ["Recycle", "InPlace"]


def test_a_leak_that_outlives_the_container_ends_with_the_pod() -> None:
    world = leaking_world({ActionStep.RECYCLE, ActionStep.IN_PLACE})
    world.run(900)
    (restart,) = world.restarts.values()
    assert methods(world) == [RECYCLE, IN_PLACE, EVICT]
    assert restart.status.outcome is RestartOutcome.RECOVERED
    assert world.evicted == ["uid-speech-0"]
    assert restart.status.reclaimed == "8Gi"  # 9 GiB before, 1 GiB in the replacement


def test_three_restarts_that_do_not_help_leave_the_workload_alone() -> None:
    world = leaking_world({ActionStep.RECYCLE}, method=RECYCLE, cooldown_seconds=60)
    world.run(2000)
    outcomes = [one.status.outcome for one in world.restarts.values()]
    assert outcomes == [RestartOutcome.NOT_RECOVERED] * 3
    degraded = next(one for one in world.workload.status.conditions if one.type == "Degraded")
    assert (degraded.status, degraded.reason) == ("True", "RestartsDoNotHelp")

    spec = structs.replace(world.workload.spec, restart=make_policy(method=IN_PLACE))
    world.workload = replace(world.workload, spec=spec, generation=4)
    world.run(1000)
    assert len(world.restarts) == 4
    assert methods_of_last(world) == [IN_PLACE]


def methods_of_last(world: World) -> list[RestartMethod]:
    last = max(world.restarts.values(), key=lambda one: one.created)
    return [attempt.method for attempt in last.status.attempts]


def test_a_budget_holds_the_container_step_back_and_it_goes_on_when_the_budget_allows() -> None:
    world = leaking_world({ActionStep.RECYCLE})
    world.budget_allows = False
    world.run(300)
    (restart,) = world.restarts.values()
    admitted = restart.status.conditions[0]
    assert (admitted.status, admitted.reason) == ("False", "PodDisruptionBudget")
    assert "one-at-least" in admitted.message
    assert [one.step for one in world.executions] == ["Recycle"]
    world.budget_allows = True
    world.run(120)
    assert methods(world) == [RECYCLE, IN_PLACE]
    assert restart.status.outcome is None
    assert world.finished()[0].status.outcome is RestartOutcome.RECOVERED


def test_a_dry_run_says_what_it_would_do_and_does_nothing() -> None:
    world = leaking_world(set(), dry_run=True)
    world.run(120)
    (restart,) = world.restarts.values()
    assert restart.status.outcome is RestartOutcome.DRY_RUN
    assert restart.status.conditions[0].message.startswith("would Recycle pod speech-0: residual")
    assert world.executions == []


def test_the_annotation_restarts_every_pod_once_one_after_the_other() -> None:
    world = World(pods=3)
    world.settle()
    world.workload = replace(world.workload, annotations={"vram.dev/restart": "now"})
    most = 0
    for _ in range(60):
        world.run(10)
        world.check()
        most = max(most, len(world.active()))
    assert most == 1
    assert sorted(one.pod for one in world.executions) == ["speech-0", "speech-1", "speech-2"]
    assert {one.step for one in world.executions} == {"InPlace"}
    assert world.workload.annotations["vram.dev/restart-handled"] == "now"

    # ... and neither the removal of the old restarts nor a new pod asks for it again
    world.restarts.clear()
    world.run(2000)
    assert len(world.executions) == 3
    world.workload = replace(
        world.workload, annotations={**world.workload.annotations, "vram.dev/restart": "again"}
    )
    world.run(600)
    assert len(world.executions) == 6


def test_an_annotation_that_a_workload_is_born_with_restarts_nothing() -> None:
    world = World(2, make_workload(annotations={"vram.dev/restart": "from-git"}))
    world.run(1000)
    assert world.restarts == {}
    assert world.workload.annotations["vram.dev/restart-handled"] == "from-git"


def test_a_schedule_restarts_every_pod_once_a_day() -> None:
    policy = make_policy(schedule="0 14 * * *", residual=None)
    world = World(2, make_workload(spec=make_template_spec(restart=policy)))
    world.run(3 * 3600, step=60)  # 12:00 to 15:00
    assert [one.spec.trigger for one in world.restarts.values()] == [RestartTrigger.SCHEDULED] * 2
    assert {one.status.outcome for one in world.restarts.values()} == {RestartOutcome.RECOVERED}
    assert sorted(one.pod for one in world.executions) == ["speech-0", "speech-1"]
    world.run(24 * 3600, step=600)
    assert len(world.executions) == 4


def test_a_scheduled_restart_that_stays_blocked_is_skipped_at_its_deadline() -> None:
    policy = make_policy(schedule="0 14 * * *", residual=None, starting_deadline_seconds=600)
    world = World(1, make_workload(spec=make_template_spec(restart=policy)))
    world.budget_allows = False
    world.run(3 * 3600, step=60)
    (restart,) = world.restarts.values()
    assert restart.status.outcome is RestartOutcome.SKIPPED
    assert restart.status.conditions[0].reason == "DeadlinePassed"
    assert "one-at-least" in restart.status.conditions[0].message
    assert world.executions == []


def test_a_run_that_was_missed_is_made_up_for_once_within_the_deadline() -> None:
    policy = make_policy(schedule="0 * * * *", residual=None, starting_deadline_seconds=1800)
    world = World(1, make_workload(spec=make_template_spec(restart=policy)))
    world.settle()
    world.pass_time(3 * 3600 + 600)  # the operator was away at 13:00, 14:00 and 15:00
    world.run(1200)
    assert [one.spec.scheduled_time for one in world.restarts.values()] == [
        world.now.replace(hour=15, minute=0, second=0)
    ]
    assert len(world.executions) == 1


def test_a_run_that_was_missed_for_longer_than_the_deadline_is_counted_and_given_up() -> None:
    policy = make_policy(schedule="0 13 * * *", residual=None, starting_deadline_seconds=600)
    world = World(1, make_workload(spec=make_template_spec(restart=policy)))
    world.settle()
    world.pass_time(2 * 3600)
    planned = world.plan()
    assert planned.missed_run == world.now.replace(hour=13)
    assert not [one for one in planned.actions if isinstance(one, CreateRestart)]
    world.apply(planned)
    assert world.plan().missed_run is None


def test_a_hand_made_restart_without_a_uid_goes_in_place_and_past_suspend_and_cooldown() -> None:
    world = World(1, make_workload(spec=make_template_spec(restart=make_policy(suspend=True))))
    world.settle()
    world.add_restart("by-hand", "speech-0")
    world.run(60)
    assert world.restarts["by-hand"].status.outcome is RestartOutcome.RECOVERED
    assert [one.step for one in world.executions] == ["InPlace"]


def test_a_hand_made_restart_of_a_pod_that_is_not_there_fails() -> None:
    world = World(1)
    world.add_restart("by-hand", "speech-9")
    world.run(60)
    status = world.restarts["by-hand"].status
    assert status.outcome is RestartOutcome.FAILED
    assert status.conditions[0].reason == "PodNotFound"


def test_an_agent_that_falls_silent_while_it_is_restarted_does_not_hold_it_open_for_ever() -> None:
    world = leaking_world(set())
    world.settle()
    world.fakes["uid-speech-0"].silent = True
    world.run(1000)
    (restart,) = world.restarts.values()
    assert restart.status.outcome is RestartOutcome.FAILED
    assert "does not report" in restart.status.attempts[0].message


def test_finished_restarts_go_after_their_time_but_for_the_last() -> None:
    settings_ = make_settings(restart_ttl_seconds=3600)
    world = World(2, settings=settings_)
    world.settle()
    world.workload = replace(world.workload, annotations={"vram.dev/restart": "now"})
    world.run(600)
    assert len(world.finished()) == 2
    world.run(2 * 3600, step=60)
    (last,) = world.restarts.values()
    assert world.workload.status.last_restart is not None
    assert last.name == world.workload.status.last_restart.name


class Operations(RuleBasedStateMachine):
    """Trouble in any order. What must never happen is asserted after every step."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        self.values = 0

    @initialize(
        pods=st.integers(1, 3),
        max_unavailable=st.integers(1, 2),
        cap=st.sampled_from(["1", "2", "50%"]),
        schedule=st.sampled_from(["", "*/30 * * * *"]),
        volume=st.booleans(),
    )
    def begin(self, pods: int, max_unavailable: int, cap: str, schedule: str, volume: bool) -> None:
        policy = make_policy(max_unavailable=max_unavailable, schedule=schedule)
        self.world = World(
            pods,
            make_workload(spec=make_template_spec(restart=policy)),
            make_settings(max_concurrent_restarts=cap),
        )
        self.world.volume = volume
        self.limit = max_unavailable
        self.cap = max(1, pods // 2) if cap == "50%" else int(cap)

    def a_pod(self, index: int) -> str:
        names = sorted(self.world.pods)
        return names[index % len(names)]

    @rule(seconds=st.sampled_from([1, 5, 30, 90, 700]))
    def time_passes(self, seconds: int) -> None:
        self.world.pass_time(seconds)

    @rule()
    def reconcile(self) -> None:
        self.world.apply(self.world.plan())

    @rule()
    def reconcile_until_nothing_is_left(self) -> None:
        self.world.settle()
        assert self.world.plan().actions == ()

    @rule(after=st.integers(0, 5), times=st.integers(1, 2))
    def crash_in_the_middle(self, after: int, times: int) -> None:
        self.world.apply(self.world.plan(), stop_after=after, times=times)
        self.world.forget()

    @rule()
    def every_action_is_repeated(self) -> None:
        self.world.apply(self.world.plan(), times=2)

    @rule()
    def an_old_plan_is_carried_out_late(self) -> None:
        old = self.world.plan()
        self.world.apply(self.world.plan())
        self.world.apply(old)

    @rule(index=st.integers(0, 2), sticky=st.sets(st.sampled_from(list(ActionStep))))
    def a_pod_leaks(self, index: int, sticky: set[ActionStep]) -> None:
        fake = self.world.fakes[self.world.pods[self.a_pod(index)].uid]
        fake.residual_gib, fake.sticky = 9.0, sticky

    @rule(index=st.integers(0, 2), silent=st.booleans())
    def an_agent_falls_silent_or_speaks(self, index: int, silent: bool) -> None:
        self.world.fakes[self.world.pods[self.a_pod(index)].uid].silent = silent

    @rule(index=st.integers(0, 2), busy=st.integers(0, 1))
    def an_agent_has_work(self, index: int, busy: int) -> None:
        self.world.fakes[self.world.pods[self.a_pod(index)].uid].busy = busy

    @rule(index=st.integers(0, 2))
    def a_container_dies(self, index: int) -> None:
        self.world.exit_container(self.a_pod(index))

    @rule(allows=st.booleans())
    def a_budget_changes(self, allows: bool) -> None:
        self.world.budget_allows = allows

    @precondition(lambda self: len(self.world.restarts) < 20)
    @rule(index=st.integers(0, 2), method=st.sampled_from(list(RestartMethod)))
    def a_person_creates_a_restart(self, index: int, method: RestartMethod) -> None:
        name = f"by-hand-{len(self.world.restarts)}-{self.world.version}"
        self.world.add_restart(name, self.a_pod(index), method=method)

    @precondition(lambda self: self.values < 3)
    @rule()
    def a_person_annotates(self) -> None:
        self.values += 1
        value = {"vram.dev/restart": str(self.values)}
        annotations = {**self.world.workload.annotations, **value}
        self.world.workload = replace(self.world.workload, annotations=annotations)

    @invariant()
    def the_safety_rules_hold(self) -> None:
        self.world.check()
        assert len(self.world.active()) <= min(self.cap, self.limit)

    def teardown(self) -> None:
        """When the trouble is over, nothing that was decided is lost."""
        world = self.world
        world.budget_allows = True
        for fake in world.fakes.values():
            fake.silent, fake.busy = False, 0
            fake.residual_gib, fake.sticky = 1.0, set()
        asked = set(world.restarts)
        value = world.workload.annotations.get("vram.dev/restart")
        world.run(6000, step=120)
        lost = [name for name in asked & set(world.restarts) if not is_finished(_of(world, name))]
        assert not lost
        assert world.workload.annotations.get("vram.dev/restart-handled") == value
        world.check()


def _of(world: World, name: str) -> RestartStatus:
    return world.restarts[name].status


Operations.TestCase.settings = settings(
    max_examples=20,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestOperations = pytest.mark.timeout(300)(Operations.TestCase)


def test_whole_seconds_are_what_the_api_stores() -> None:
    moment = World().now + timedelta(milliseconds=700)
    assert whole_seconds(moment) == World().now
