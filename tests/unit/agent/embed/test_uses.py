"""Who gets a model, when, and what each caller is told when it does not."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from vram_agent import Manager
from vram_agent.errors import (
    ModelFailedError,
    NoSuchModelError,
    NoVramError,
    QueueTimeoutError,
)
from vram_agent.protocol import AgentConfig, QueuePolicy, VramPolicy

from tests.unit.agent.embed.conftest import (
    Background,
    Factory,
    MakeManager,
    Model,
    find,
    state,
    when,
    when_idle,
)


class AppError(Exception):
    pass


def test_threads_share_one_object_at_the_same_time(manager: Manager) -> None:
    manager.register("a", Factory())
    together = threading.Barrier(8, timeout=60)

    def use(_: int) -> int:
        with manager.use("a") as model:
            together.wait()
            if together.broken:
                pytest.fail("not all were in at once")
            assert find(manager.report(), "a").in_flight == 8
            together.wait()
            return id(model)

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(use, range(8)))) == 1
    assert find(when_idle(manager), "a").in_flight == 0


def test_the_model_stays_until_the_last_of_them_has_left(
    manager: Manager, in_background: Callable[[str], Background]
) -> None:
    manager.register("a", Factory())
    first, second = in_background("a").wait(), in_background("a").wait()
    first.end()
    report = when(manager, lambda report: find(report, "a").in_flight == 1)
    assert state(report) == "Resident/VRAM"
    assert torch.equal(second.value.ask(), Model().ask())
    second.end()
    assert state(when_idle(manager)) == "Offloaded/PinnedHost"


def test_a_use_inside_of_a_use_gets_the_same_object(manager: Manager) -> None:
    manager.register("a", Factory())
    with manager.use("a") as outer:
        with manager.use("a") as inner:
            assert inner is outer
        assert find(manager.report(), "a").in_flight == 1
        assert torch.equal(outer.ask(), Model().ask())


def test_who_comes_while_another_model_waits_for_the_memory_gets_in_line(
    make_manager: MakeManager,
) -> None:
    manager = make_manager(vram_budget="48Mi")
    manager.register("a", Factory(1), vram="32Mi")
    manager.register("b", Factory(2), vram="32Mi")
    with manager.use("a") as held:
        other = Background(manager, "b")
        when(manager, lambda report: find(report, "b").queued == 1)
        late = Background(manager, "a")
        when(manager, lambda report: find(report, "a").queued == 1)
        # Who has it already need not wait: it would wait for itself.
        with manager.use("a") as again:
            assert again is held
        assert not other.is_in.is_set()
        assert not late.is_in.is_set()
    # Whoever's turn it is: neither is forgotten.
    for one in (late, other):
        one.may_go.set()
    for one in (late, other):
        one.wait().end()
        assert one.error is None


def test_who_waits_joins_once_nobody_else_wants_the_memory(make_manager: MakeManager) -> None:
    manager = make_manager(vram_budget="48Mi")
    manager.register("a", Factory(1), vram="32Mi")
    manager.register("b", Factory(2), vram="32Mi")
    with manager.use("a") as held:
        set_queue_timeout(manager, 1)
        other = Background(manager, "b")
        when(manager, lambda report: find(report, "b").queued == 1)
        late = Background(manager, "a")
        assert isinstance(other.wait().error, QueueTimeoutError)
        # It either joined in time or had waited as long: the second attempt is certain.
        late.wait().end()
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(lambda: _use_once(manager, "a")).result() is held
    other.end()


def _use_once(manager: Manager, name: str) -> object:
    with manager.use(name) as value:
        return value


def set_queue_timeout(manager: Manager, seconds: int) -> None:
    """As the operator does: short only where no load is to be waited for."""
    core = manager._core
    assert core is not None
    config = AgentConfig(
        queue=QueuePolicy(timeout_seconds=seconds), vram=VramPolicy(budget="48Mi", headroom="0")
    )
    core.call(lambda: core._supervisor.apply_config(config))


def test_two_models_that_cannot_fit_together_end_in_words(make_manager: MakeManager) -> None:
    manager = make_manager(vram_budget="48Mi")
    manager.register("a", Factory(1), vram="32Mi")
    manager.register("b", Factory(2), vram="32Mi")
    with manager.use("a"):
        set_queue_timeout(manager, 1)
        with pytest.raises(QueueTimeoutError, match="uses a meanwhile, which cannot make room"):
            _use_once(manager, "b")
        set_queue_timeout(manager, 300)
    with manager.use("b") as model:
        assert torch.equal(model.ask(), Model(2).ask())


def test_an_error_in_a_use_comes_out_and_gives_the_model_back(manager: Manager) -> None:
    manager.register("a", Factory())
    with pytest.raises(AppError, match="mine"), manager.use("a"):
        raise AppError("mine")
    assert state(when_idle(manager)) == "Offloaded/PinnedHost"
    with manager.use("a") as model:
        assert torch.equal(model.ask(), Model().ask())


async def test_tasks_of_an_event_loop_share_and_nest(manager: Manager) -> None:
    manager.register("a", Factory())
    both = asyncio.Barrier(2)

    async def use() -> int:
        async with manager.ause("a") as outer, manager.ause("a") as inner:
            assert inner is outer
            await both.wait()
            return id(outer)

    first, second = await asyncio.gather(use(), use())
    assert first == second


async def test_a_cancelled_wait_gives_its_place_up(make_manager: MakeManager) -> None:
    manager = make_manager(vram_budget="48Mi")
    manager.register("a", Factory(1), vram="32Mi")
    manager.register("b", Factory(2), vram="32Mi")

    async def use_b() -> None:
        async with manager.ause("b"):
            pass

    async with manager.ause("a"):
        waiting = asyncio.create_task(use_b())
        await asyncio.to_thread(when, manager, lambda report: find(report, "b").queued == 1)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await asyncio.to_thread(when, manager, lambda report: find(report, "b").queued == 0)


def test_a_factory_that_raises_is_told_and_left_alone_for_a_while(manager: Manager) -> None:
    is_broken = True
    calls = 0

    def make() -> Model:
        nonlocal calls
        calls += 1
        if is_broken:
            raise AppError("no such checkpoint")
        return Model()

    manager.register("a", make)
    with pytest.raises(ModelFailedError, match=r"AppError: no such checkpoint .*test_uses\.py:\d+"):
        _use_once(manager, "a")
    assert state(when_idle(manager)) == "Failed/Disk"
    with pytest.raises(ModelFailedError, match="no such checkpoint") as caught:
        _use_once(manager, "a")
    assert calls == 1
    assert caught.value.retry_after_seconds is not None
    assert 0 < caught.value.retry_after_seconds <= 1
    is_broken = False

    def is_over() -> bool:
        try:
            _use_once(manager, "a")
        except ModelFailedError:
            return False
        return True

    when(manager, lambda _: is_over())
    assert calls == 2


def test_a_factory_that_returns_nothing_is_told_so(manager: Manager) -> None:
    manager.register("a", lambda: None)
    with pytest.raises(ModelFailedError, match="returned None"):
        _use_once(manager, "a")


def test_a_factory_cannot_wait_for_another_model(manager: Manager) -> None:
    manager.register("a", Factory())
    manager.register("b", lambda: _use_once(manager, "a"))
    with pytest.raises(ModelFailedError, match="a factory cannot use model a"):
        _use_once(manager, "b")


def test_a_model_larger_than_the_budget_is_refused_at_once(make_manager: MakeManager) -> None:
    manager = make_manager(vram_budget="48Mi")
    factory = Factory()
    manager.register("a", factory, vram="64Mi")
    with pytest.raises(NoVramError, match="budget"):
        _use_once(manager, "a")
    assert factory.calls == 0


def test_names_are_checked(manager: Manager) -> None:
    manager.register("a", Factory())
    with pytest.raises(ValueError, match="registered already"):
        manager.register("a", Factory())
    with pytest.raises(ValueError, match="name: 'My Model': not a name"):
        manager.register("My Model", Factory())
    with pytest.raises(ValueError, match="vram: '8 gigs': not a quantity"):
        manager.register("b", Factory(), vram="8 gigs")
    with pytest.raises(TypeError, match="afterTask"):
        manager.register("b", Factory(), afterTask="Keep")  # type: ignore[call-arg]
    with pytest.raises(NoSuchModelError, match="no model 'c'; the config has: a"):
        _use_once(manager, "c")


def test_close_waits_for_uses_refuses_new_ones_and_can_be_repeated(
    manager: Manager, in_background: Callable[[str], Background]
) -> None:
    manager.register("a", Factory())
    use = in_background("a").wait()
    closing = threading.Thread(target=manager.close)
    closing.start()
    when(manager, lambda report: report.draining)
    assert closing.is_alive()
    with pytest.raises(Exception, match="takes no new requests"):
        _use_once(manager, "a")
    assert torch.equal(use.value.ask(), Model().ask())
    use.end()
    closing.join(60)
    assert not closing.is_alive()
    manager.close()
    with pytest.raises(RuntimeError, match="is closed"):
        _use_once(manager, "a")


def test_a_use_that_outlasts_the_grace_keeps_its_object(
    manager: Manager, in_background: Callable[[str], Background]
) -> None:
    manager.register("a", Factory())
    use = in_background("a").wait()
    manager.close(grace_seconds=0)
    assert torch.equal(use.value.ask(), Model().ask())
    use.end()
    assert use.error is None


def test_close_inside_of_a_use_is_refused_instead_of_waiting_for_itself(manager: Manager) -> None:
    manager.register("a", Factory())
    with manager.use("a"), pytest.raises(RuntimeError, match="inside of a use of a"):
        manager.close()
