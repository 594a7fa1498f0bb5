"""What only a process of its own can show: forks, exits, signals, and what is imported."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

HEAD = """
import asyncio, gc, os, signal, sys, threading, time, urllib.request, weakref
import vram_agent

def make():
    return ["any object"]

def manage(**options):
    manager = vram_agent.Manager(device="CPU", vram_headroom="0", **options)
    manager.register("a", make)
    return manager
"""


def run(
    code: str, *arguments: str, prefix: tuple[str, ...] = (), state: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a program with every warning an error, and see that it ends."""
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    if state is not None:
        environment["VRAM_AGENT_STATE_DIR"] = str(state)
    command = [*prefix, sys.executable, "-W", "error", "-c", HEAD + textwrap.dedent(code)]
    return subprocess.run(
        [*command, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=environment,
    )


def ensure_silent(done: subprocess.CompletedProcess[str], output: str = "") -> None:
    assert (done.returncode, done.stdout, done.stderr) == (0, output, "")


def test_threads_tasks_and_a_fork_in_one_program_that_ends_by_itself() -> None:
    done = run("""
        import torch

        def make():
            torch.manual_seed(0)
            return torch.nn.Linear(512, 512)

        manager = manage()
        manager.serve_control("127.0.0.1", 0)
        value = torch.ones(1, 512)
        expected = make()(value)
        answers = []

        def in_thread():
            for _ in range(5):
                with manager.use("a") as model:
                    answers.append(torch.equal(model(value), expected))

        async def in_task():
            for _ in range(5):
                async with manager.ause("a") as model:
                    answers.append(torch.equal(model(value), expected))
                await asyncio.sleep(0)

        async def in_tasks():
            await asyncio.gather(*(in_task() for _ in range(4)))

        threads = [threading.Thread(target=in_thread) for _ in range(4)]
        for thread in threads:
            thread.start()
        asyncio.run(in_tasks())
        for thread in threads:
            thread.join()
        assert answers == [True] * 40, answers

        with manager.use("a") as model:
            sys.stdout.flush()
            child = os.fork()
            if child == 0:
                try:
                    with manager.use("a"):
                        pass
                except RuntimeError as error:
                    print(error)
                manager.close()
                try:
                    manager.report()
                except RuntimeError:
                    print("nor a report")
                # The with block ends here too, and then the child's interpreter.
            else:
                assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
                assert torch.equal(model(value), expected)
        if child:
            with manager.use("a") as model:
                print("the parent goes on", torch.equal(model(value), expected))
    """)
    assert (done.returncode, done.stderr) == (0, "")
    first, second, third = done.stdout.splitlines()
    assert first.startswith("this Manager belongs to process ")
    assert "make a Manager in each process" in first
    assert (second, third) == ("nor a report", "the parent goes on True")


@pytest.mark.parametrize(
    "last_words",
    [
        pytest.param("pass", id="nothing was used"),
        pytest.param("manager.use('a').__enter__()", id="in a use"),
        pytest.param(
            "threading.Thread(target=lambda: manager.use('a').__enter__(), daemon=True).start()",
            id="while a thread waits",
        ),
        pytest.param("manager.register('b', make, eager=True)", id="while a model comes"),
        pytest.param("manager.close()", id="closed"),
        pytest.param("sys.exit(0)", id="asked to"),
    ],
)
def test_an_interpreter_exits_at_once_and_without_a_word(last_words: str) -> None:
    ensure_silent(run(f"manager = manage()\nmanager.serve_control('127.0.0.1', 0)\n{last_words}"))


def test_a_manager_that_nobody_refers_to_takes_its_threads_along() -> None:
    done = run("""
        manager = manage()
        with manager.use("a"):
            pass
        gone = weakref.ref(manager)
        threads = [t for t in threading.enumerate() if t.name.startswith("vram-agent")]
        assert len(threads) == 3, threads
        del manager
        gc.collect()
        assert gone() is None
        for thread in threads:
            thread.join(60)
        print([t.name for t in threads if t.is_alive()])
    """)
    ensure_silent(done, "[]\n")


RESTART = """
    import json
    from vram_agent.embed import ControlOptions

    def call(address, path):
        request = urllib.request.Request(
            f"http://{address}{path}",
            data=json.dumps({"restartID": "r-1", "drainTimeoutSeconds": 60}).encode(),
        )
        with urllib.request.urlopen(request) as answer:
            print(answer.status, flush=True)

    manager = manage()
    address = manager.serve_control("127.0.0.1", 0, ControlOptions(allow_unsigned=True))
"""


def test_a_restart_drains_and_then_sends_the_process_sigterm(tmp_path: Path) -> None:
    handled = """
    told = []
    signal.signal(signal.SIGTERM, lambda number, _: told.append(number))
    with manager.use("a"):
        call(address, "/restart")
        while not manager.report().draining:
            pass
        assert not told
    while not told:
        time.sleep(0.01)
    print(told == [signal.SIGTERM], manager.report().action.state)
    """
    done = run(textwrap.dedent(RESTART) + textwrap.dedent(handled), state=tmp_path)
    ensure_silent(done, "202\nTrue Acting\n")
    journal = (tmp_path / "action.json").read_text(encoding="utf-8")
    assert '"restartID":"r-1"' in journal


def test_without_a_handler_the_signal_ends_the_process(tmp_path: Path) -> None:
    done = run(
        textwrap.dedent(RESTART) + 'call(address, "/restart")\ntime.sleep(60)', state=tmp_path
    )
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "202\n")


def test_as_pid_1_without_a_handler_the_process_ends_all_the_same(tmp_path: Path) -> None:
    namespace = ("unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc")
    if subprocess.run([*namespace, "true"], check=False, capture_output=True).returncode:
        assert os.environ.get("CI") != "true", "CI must be able to make a process namespace"
        pytest.skip("this machine makes no user and process namespaces (unshare --user --pid)")
    code = textwrap.dedent(RESTART) + 'call(address, "/restart")\ntime.sleep(60)'
    done = run(f"assert os.getpid() == 1\n{code}", prefix=namespace, state=tmp_path)
    ensure_silent(done, "202\n")


def test_the_package_alone_imports_neither_the_library_nor_torch() -> None:
    code = (
        "import sys, vram_agent, vram_agent.supervisor; "
        "print([m for m in sys.modules if 'embed' in m or m == 'torch']); "
        "vram_agent.Manager; print('torch' in sys.modules, vram_agent.add_arguments.__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    ensure_silent(done, "[]\nFalse add_arguments\n")
