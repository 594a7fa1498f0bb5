"""Drain, recycle, restart, a new config, the end."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import pytest
from vram_agent.backend import Task, TaskKind, TaskResult
from vram_agent.errors import BadInputError, DrainingError, NoSuchModelError, WorkerDiedError
from vram_agent.protocol import (
    ActionReport,
    ActionState,
    ActionStep,
    AfterTask,
    AgentConfig,
    ControlPolicy,
    DevicePreference,
    DrainPolicy,
    Limits,
    Listen,
    LoadPolicy,
    Residency,
    RestartRequest,
    ServingPolicy,
    VramPolicy,
)
from vram_agent.supervision.journal import FileJournal
from vram_agent.supervision.reconfigure import with_own_settings

from tests.unit.agent.supervisor.conftest import MakeRig, Rig, spec

pytestmark = pytest.mark.looptime

KEEP = Residency(after_task=AfterTask.KEEP, idle_timeout_seconds=0)


def order(restart_id: str = "r1", seconds: int = 300) -> RestartRequest:
    return RestartRequest(restart_id=restart_id, drain_timeout_seconds=seconds)


def last_action(rig: Rig) -> ActionReport:
    action = rig.supervisor.report().action
    assert action is not None
    return action


async def test_drain_refuses_new_requests_and_returns_when_all_accepted_are_answered(
    make_rig: MakeRig,
) -> None:
    rig = make_rig(spec("a"))
    accepted = [rig.ask("a", seconds=5.0) for _ in range(3)]
    await rig.settle(1)
    draining = asyncio.ensure_future(rig.supervisor.drain())
    await rig.settle(1)
    assert not rig.supervisor.is_ready()
    with pytest.raises(DrainingError) as caught:
        await rig.ask("a")
    assert caught.value.retry_after_seconds
    report = await draining
    assert all(request.done() for request in accepted)
    assert report.draining
    assert not rig.supervisor.resume().draining
    assert await rig.ask("a")


async def test_recycle_drains_then_ends_the_gpu_processes_and_counts_the_epoch(
    make_rig: MakeRig,
) -> None:
    rig = make_rig(spec("a", residency=KEEP), spec("b"))
    await rig.ask("b")
    running = rig.ask("a", seconds=5.0)
    await rig.settle(1)
    assert rig.supervisor.recycle(order()).state is ActionState.DRAINING
    await rig.settle(1)
    assert rig.supervisor.report().draining
    assert await running
    await rig.settle(0.1)
    report = rig.supervisor.report()
    assert (last_action(rig).state, last_action(rig).step) == ("Done", "Recycle")
    assert report.agent.epoch == 1
    assert [f"{m.state}/{m.tier}" for m in report.models] == ["Offloaded/Host"] * 2
    assert report.memory.used_bytes == 0
    assert not report.draining
    assert ("a", "Recycle") in rig.observer.restarts
    assert await rig.ask("a")


async def test_the_same_restart_id_acts_once_and_answers_the_same(make_rig: MakeRig) -> None:
    rig = make_rig(spec("a", residency=KEEP))
    await rig.ask("a")
    first = rig.supervisor.recycle(order())
    assert rig.supervisor.recycle(order()) == first
    await rig.settle(1)
    done = last_action(rig)
    assert rig.supervisor.recycle(order()) == done
    await rig.settle(1)
    assert rig.supervisor.report().agent.epoch == 1
    assert rig.backend.count("end_gpu") == 1


async def test_another_id_waits_until_the_first_is_done(make_rig: MakeRig) -> None:
    rig = make_rig(spec("a"))
    running = rig.ask("a", seconds=5.0)
    await rig.settle(1)
    rig.supervisor.recycle(order("r1"))
    with pytest.raises(DrainingError, match="r1 is under way"):
        rig.supervisor.restart(order("r2"))
    await running
    await rig.settle(1)
    rig.supervisor.recycle(order("r2"))
    await rig.settle(1)
    assert rig.supervisor.report().agent.epoch == 2


async def test_past_the_drain_deadline_a_recycle_goes_on_and_says_what_it_cut(
    make_rig: MakeRig,
) -> None:
    rig = make_rig(spec("a"))
    running, queued = rig.ask("a", seconds=100.0), rig.ask("a")
    await rig.settle(1)
    rig.supervisor.recycle(order(seconds=10))
    with pytest.raises(WorkerDiedError):
        await running
    with pytest.raises(DrainingError):
        await queued
    await rig.settle(1)
    action = last_action(rig)
    assert action.state is ActionState.DONE
    assert action.message == "cut after 10 s: a: 1 infer running, 1 queued"
    assert await rig.ask("a")


async def test_a_recycle_in_the_middle_of_a_load_leaves_true_states(make_rig: MakeRig) -> None:
    rig = make_rig(spec("a"))
    rig.backend.script.seconds = {"load": 50.0}
    request = rig.ask("a")
    await rig.settle(1)
    rig.supervisor.recycle(order(seconds=5))
    with pytest.raises(DrainingError):
        await request
    await rig.settle(1)
    assert last_action(rig).state is ActionState.DONE
    await rig.settle(60)
    assert rig.state("a") == "Offloaded/Host"


async def test_a_recycle_that_the_backend_refuses_is_failed_and_says_why(
    make_rig: MakeRig,
) -> None:
    rig = make_rig(spec("a", residency=KEEP))
    await rig.ask("a")
    rig.backend.script.fail("end_gpu", "", RuntimeError("stuck in the driver"))
    rig.supervisor.recycle(order())
    await rig.settle(1)
    assert last_action(rig).state is ActionState.FAILED
    assert "stuck in the driver" in last_action(rig).message
    assert rig.supervisor.is_ready()


async def test_eager_kept_models_are_restored_after_a_recycle_others_at_their_request(
    make_rig: MakeRig,
) -> None:
    eager = Residency(load=LoadPolicy.EAGER, after_task=AfterTask.KEEP)
    rig = make_rig(spec("a", residency=eager), spec("b", residency=KEEP))
    await rig.ask("b")
    rig.supervisor.recycle(order())
    await rig.settle(1)
    assert (rig.state("a"), rig.state("b")) == ("Resident/VRAM", "Offloaded/Host")


async def test_restart_drains_lets_pid_1_exit_and_the_next_boot_says_done(
    make_rig: MakeRig,
) -> None:
    rig = make_rig(spec("a"))
    running = rig.ask("a", seconds=5.0)
    await rig.settle(1)
    rig.supervisor.restart(order())
    exiting = asyncio.ensure_future(rig.supervisor.wait_exit())
    await rig.settle(1)
    assert not exiting.done()
    assert await running
    await exiting
    assert last_action(rig).state is ActionState.ACTING
    next_boot = make_rig(spec("a"))
    action = last_action(next_boot)
    assert (action.restart_id, action.step, action.state) == ("r1", "InPlace", "Done")
    assert next_boot.supervisor.restart(order()) == action
    assert next_boot.supervisor.report().agent.boot_id != rig.supervisor.report().agent.boot_id
    assert next_boot.supervisor.is_ready()


async def test_a_full_disk_costs_the_memory_of_the_id_and_nothing_else(make_rig: MakeRig) -> None:
    make_rig.journal.error = OSError(28, "No space left on device")
    rig = make_rig(spec("a", residency=KEEP))
    await rig.ask("a")
    rig.supervisor.recycle(order())
    await rig.settle(1)
    assert last_action(rig).state is ActionState.DONE
    assert "No space left on device" in last_action(rig).message


async def test_the_journal_is_replaced_atomically_and_unreadable_content_is_none(
    tmp_path: Path,
) -> None:
    journal = FileJournal(tmp_path / "state")
    assert journal.read() is None
    action = ActionReport(
        restart_id="x",
        step=ActionStep.IN_PLACE,
        state=ActionState.ACTING,
        at="2026-01-01T00:00:00Z",
    )
    journal.write_now(action)
    assert journal.read() == action
    assert [p.name for p in (tmp_path / "state").iterdir()] == ["action.json"]
    (tmp_path / "state" / "action.json").write_text("{")
    assert journal.read() is None


async def test_a_state_directory_that_cannot_be_made_raises_os_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    journal = FileJournal(tmp_path / "file" / "state")
    with pytest.raises(OSError, match="Not a directory"):
        journal.write_now(
            ActionReport(restart_id="x", step=ActionStep.RECYCLE, state=ActionState.DONE, at="")
        )


async def test_stop_finishes_running_and_queued_requests_within_the_grace(
    make_rig: MakeRig,
) -> None:
    rig = make_rig(spec("a"))
    accepted = [rig.ask("a", seconds=2.0) for _ in range(5)]
    await rig.settle(1)
    assert await rig.supervisor.stop(25) == ""
    assert [r.exception() for r in accepted] == [None] * 5


async def test_stop_says_what_the_grace_cut(make_rig: MakeRig) -> None:
    rig = make_rig(spec("a"))
    running = rig.ask("a", seconds=100.0)
    await rig.settle(1)
    assert await rig.supervisor.stop(5) == "a: 1 infer running"
    with pytest.raises(WorkerDiedError):
        await running


async def test_stop_waits_for_a_request_that_is_still_received_and_serves_it(
    make_rig: MakeRig,
) -> None:
    rig = make_rig(spec("a"))

    async def receive_then_ask() -> TaskResult:
        with rig.supervisor.admit():
            await asyncio.sleep(10)
            result = await rig.supervisor.submit(
                "a", Task(kind=TaskKind.INFER, parameters={"seconds": 2.0}), is_admitted=True
            )
            await asyncio.sleep(3)  # its answer is sent
        return result

    request = asyncio.create_task(receive_then_ask())
    await rig.settle(1)
    began = asyncio.get_running_loop().time()
    assert await rig.supervisor.stop(60) == ""
    assert (await request).values["model"] == "a"
    assert asyncio.get_running_loop().time() - began == pytest.approx(14, abs=0.5)
    with pytest.raises(DrainingError):
        rig.supervisor.admit()


async def test_a_request_that_is_received_too_late_for_the_grace_is_refused(
    make_rig: MakeRig,
) -> None:
    rig = make_rig(spec("a"))
    with rig.supervisor.admit():
        assert await rig.supervisor.stop(5) == "1 still received or answered"
        with pytest.raises(DrainingError):
            await rig.supervisor.submit("a", Task(kind=TaskKind.INFER), is_admitted=True)


async def test_close_ends_every_group(make_rig: MakeRig) -> None:
    rig = make_rig(spec("a", residency=KEEP), spec("b", residency=KEEP))
    await asyncio.gather(rig.ask("a"), rig.ask("b"))
    await rig.supervisor.close()
    assert all(group.is_closed for group in rig.backend.groups.values())
    assert not rig.supervisor.is_live()


def changed(rig: Rig, *specs: object, **fields: object) -> AgentConfig:
    config = rig.supervisor._fleet.config
    return msgspec.structs.replace(config, models=list(specs), **fields)


async def test_a_new_residency_applies_at_once_and_unloads_nothing(make_rig: MakeRig) -> None:
    rig = make_rig(spec("a", residency=KEEP))
    await rig.ask("a")
    await rig.supervisor.apply_config(changed(rig, spec("a", priority=5)))
    await rig.settle(1)
    assert rig.state("a") == "Offloaded/PinnedHost"
    assert rig.backend.count("load") == 1


async def test_a_new_source_is_loaded_in_place_of_the_old_and_loses_no_request(
    make_rig: MakeRig,
) -> None:
    rig = make_rig(spec("a", residency=KEEP))
    running, queued = rig.ask("a", seconds=5.0), rig.ask("a")
    await rig.settle(1)
    new = msgspec.structs.replace(spec("a", residency=KEEP), source="/models/other")
    applying = asyncio.ensure_future(rig.supervisor.apply_config(changed(rig, new)))
    await rig.settle(1)
    assert not applying.done()
    assert await running
    await applying
    assert await queued
    assert rig.supervisor.model("a").spec.source == "/models/other"
    assert rig.backend.count("load") == 2


async def test_a_removed_model_refuses_its_queue_and_leaves_when_its_task_is_done(
    make_rig: MakeRig,
) -> None:
    rig = make_rig(spec("a"), spec("b"))
    running, queued = rig.ask("a", seconds=5.0), rig.ask("a")
    await rig.settle(1)
    applying = asyncio.ensure_future(rig.supervisor.apply_config(changed(rig, spec("b"))))
    with pytest.raises(NoSuchModelError):
        await queued
    with pytest.raises(NoSuchModelError):
        await rig.ask("a")
    assert await running
    report = await applying
    assert [m.name for m in report.models] == ["b"]
    await rig.settle(1)
    assert rig.backend.groups["a"].is_closed


async def test_a_model_may_change_its_group_while_another_stays(make_rig: MakeRig) -> None:
    rig = make_rig(spec("a", group="g"), spec("b", group="g"))
    await rig.ask("a")
    await rig.supervisor.apply_config(changed(rig, spec("a", group="h"), spec("b", group="g")))
    assert await rig.ask("a")
    assert await rig.ask("b")
    assert {"group:g", "group:h"} == set(rig.supervisor._fleet.groups)


async def test_a_failed_model_gets_a_new_chance_with_a_new_config(make_rig: MakeRig) -> None:
    rig = make_rig(spec("a"))
    rig.backend.script.fail("load", "a", OSError("no such file"))
    with pytest.raises(Exception, match="no such file"):
        await rig.ask("a")
    await rig.supervisor.apply_config(changed(rig, spec("a")))
    assert await rig.ask("a")


async def test_a_smaller_budget_evicts_what_is_unused(make_rig: MakeRig) -> None:
    rig = make_rig(spec("a", residency=KEEP), spec("b", residency=KEEP))
    await rig.ask("a")
    await rig.settle(1)
    await rig.ask("b")
    config = changed(
        rig, spec("a", residency=KEEP), spec("b", residency=KEEP), vram=VramPolicy(budget="1Gi")
    )
    await rig.supervisor.apply_config(config)
    await rig.settle(1)
    assert (rig.state("a"), rig.state("b")) == ("Offloaded/PinnedHost", "Resident/VRAM")


async def test_what_only_a_restart_changes_is_refused_and_named(make_rig: MakeRig) -> None:
    rig = make_rig(spec("a"))
    config = changed(rig, spec("a"), listen=Listen(serving="0.0.0.0:1"))
    with pytest.raises(BadInputError, match="listen: cannot be changed"):
        await rig.supervisor.apply_config(config)


async def test_a_config_that_says_nothing_of_the_process_leaves_its_settings(
    make_rig: MakeRig,
) -> None:
    rig = make_rig(spec("a"))
    own = AgentConfig(
        models=[spec("a")],
        listen=Listen(serving="0.0.0.0:9000"),
        control=ControlPolicy(public_key_file="/keys.pem"),
        serving=ServingPolicy(api_key_file="/api-keys"),
        limits=Limits(request_bytes="1Mi"),
        drain=DrainPolicy(grace_seconds=5),
        device=DevicePreference.CPU,
    )
    rig.supervisor._fleet.config = own
    await rig.supervisor.apply_config(AgentConfig(models=[spec("a", priority=5)]))
    now = rig.supervisor._fleet.config
    assert now == msgspec.structs.replace(own, models=[spec("a", priority=5)])
    moved = AgentConfig(models=[spec("a")], drain=DrainPolicy(grace_seconds=7))
    assert with_own_settings(own, moved).drain.grace_seconds == 7


async def test_a_config_with_two_models_of_one_name_is_refused(make_rig: MakeRig) -> None:
    rig = make_rig(spec("a"))
    with pytest.raises(BadInputError, match="unique"):
        await rig.supervisor.apply_config(changed(rig, spec("a"), spec("a")))
