from __future__ import annotations

import json
import logging
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import msgspec
import pytest
import structlog
from vram_agent import __version__
from vram_agent.__main__ import main, split_wrapped
from vram_agent.logs import configure_logs
from vram_agent.protocol import (
    ActionReport,
    ActionState,
    ActionStep,
    AgentIdentity,
    AgentMode,
    DeviceKind,
    DeviceReport,
    MemoryClasses,
    MemoryReport,
    ModelReport,
    ModelState,
    PodIdentity,
    Report,
    ResidualSource,
    Runtime,
    ScrubReport,
    Tier,
)
from vram_agent.report import format_bytes, format_report
from vram_agent.serve import ensure_open_files
from vram_agent.supervision import reaper

GIB = 1 << 30
REPORT = Report(
    agent=AgentIdentity(
        version="0.1.0",
        mode=AgentMode.SERVE,
        boot_id="0123456789abcdef",
        epoch=2,
        started_at="2026-01-01T00:00:00Z",
        pod=PodIdentity(namespace="speech", name="pod-1", uid="u"),
    ),
    sequence=1,
    observed_at="2026-01-01T00:00:00Z",
    config_generation=0,
    devices=[
        DeviceReport(
            uuid="GPU-1",
            index=0,
            kind=DeviceKind.CUDA,
            total_bytes=48 * GIB,
            used_bytes=GIB,
            exclusive=True,
            baseline_bytes=3 * GIB,
            dirty=True,
        )
    ],
    memory=MemoryReport(
        source=ResidualSource.EXCLUSIVE,
        used_bytes=GIB,
        model_bytes=GIB // 2,
        residual_bytes=GIB // 2,
        host_bytes=0,
        last_scrub=ScrubReport(
            at="2026-01-01T00:00:00Z", before_bytes=700, after_bytes=300, reclaimed_bytes=400
        ),
        classes=MemoryClasses(),
    ),
    models=[
        ModelReport(
            name="whisper",
            runtime=Runtime.WHISPER,
            state=ModelState.FAILED,
            tier=Tier.DISK,
            vram_bytes=0,
            host_bytes=0,
            in_flight=0,
            queued=3,
            error="no such file",
        )
    ],
    idle=True,
    idle_since="2026-01-01T00:00:00Z",
    draining=True,
    action=ActionReport(
        restart_id="r1", step=ActionStep.RECYCLE, state=ActionState.DONE, at="2026-01-01T00:00:00Z"
    ),
)


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"vram-agent {__version__}\n"


def test_validate_answers_0_for_a_good_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("models: [{name: a, runtime: ONNX, source: /m}]")
    assert main(["validate", str(path)]) == 0
    assert capsys.readouterr().out == f"{path}: valid, 1 model\n"


def test_validate_answers_2_with_one_line_for_each_fault(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("models: [{name: A, runtime: ONNX}]\nqeue: {}\n")
    assert main(["validate", str(path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param([], "give --config FILE", id="nothing to serve"),
        pytest.param(["--model", "a"], "write NAME=RUNTIME:SOURCE", id="half a model"),
        pytest.param(["--model", "a=ONNX:/m", "--config", "c"], "give one of them", id="both"),
        pytest.param(
            ["--model", "a=ONNX:/m", "--listen-control", "x"], "listen.control", id="port"
        ),
    ],
)
def test_serve_answers_2_for_what_it_cannot_serve(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_config_for_the_other_command_says_which_one_it_is_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("models: [{name: a, runtime: ONNX, source: /m}]\nrun: {afterCrash: Restart}\n")
    assert main(["serve", "--config", str(path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("run: is for `vram-agent run -- COMMAND`")
    assert "take it out" in said
    assert main(["run", "--config", str(path), "--", "true"]) == 2
    assert capsys.readouterr().err.startswith("models: vram-agent run wraps a command")


def test_a_transition_is_one_line_in_either_format(capsys: pytest.CaptureFixture[str]) -> None:
    line = {"model": "a", "from": "Absent/Disk", "to": "Offloaded/Host", "reason": "Requested"}
    try:
        for log_format in ("json", "console"):
            configure_logs(log_format)
            structlog.get_logger("t").info("transition", **line, bytes=7, seconds=0.5)
            (said,) = capsys.readouterr().err.splitlines()
            if log_format == "json":
                found = json.loads(said)
                assert {name: found[name] for name in line} == line
                assert (found["bytes"], found["seconds"], found["level"]) == (7, 0.5, "info")
            else:
                assert all(f"{name}={value}" in said for name, value in line.items())
                assert "bytes=7" in said
                assert "seconds=0.5" in said
    finally:
        structlog.reset_defaults()
        logging.getLogger().handlers.clear()


def test_a_report_is_a_table_with_everything_a_person_asks_for() -> None:
    text = format_report(REPORT)
    assert "agent 0.1.0 Serve speech/pod-1  boot 01234567 epoch 2" in text
    assert "memory (Exclusive): used 1 GiB, models 512 MiB, residual 512 MiB, host 0 B" in text
    assert "last scrub: 400 B reclaimed at 2026-01-01T00:00:00Z" in text
    device = next(line for line in text.splitlines() if line.startswith("CUDA"))
    assert device.split()[-2:] == ["yes", "yes"]
    assert "draining" in text
    assert "action Recycle r1: Done" in text
    row = next(line for line in text.splitlines() if line.startswith("whisper"))
    assert row.split()[1:4] == ["Whisper", "Failed", "Disk"]
    assert row.endswith("no such file")


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (48 * GIB, "48 GiB")]
)
def test_bytes_are_readable(number: int, text: str) -> None:
    assert format_bytes(number) == text


@pytest.fixture
def report_url() -> Iterator[str]:
    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = msgspec.json.encode(REPORT)
            self.send_response(200 if self.path == "/report" else 404)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_report_prints_what_an_agent_answers(
    report_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", "--url", report_url]) == 0
    assert "whisper" in capsys.readouterr().out
    assert main(["report", "--url", report_url, "-o", "json"]) == 0
    assert msgspec.json.decode(capsys.readouterr().out, type=Report) == REPORT


def test_report_answers_1_where_no_agent_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "--url", "http://127.0.0.1:9"]) == 1
    assert "no report from http://127.0.0.1:9/report" in capsys.readouterr().err


def watching(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "vram_agent", "report", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_watched_report_is_printed_again_until_it_is_interrupted(report_url: str) -> None:
    with watching("--url", report_url, "--watch", "0.1", "-o", "table") as process:
        assert process.stdout is not None
        heads = 0
        while heads < 3:
            heads += process.stdout.readline().startswith("agent 0.1.0 Serve speech/pod-1")
        process.send_signal(signal.SIGINT)
        _, complaints = process.communicate()
    assert (process.returncode, complaints) == (0, "")


def test_a_watch_goes_on_while_no_agent_answers() -> None:
    with watching("--url", "http://127.0.0.1:9", "--watch", "0.1") as process:
        assert process.stderr is not None
        for _ in range(2):
            assert process.stderr.readline().startswith("no report from http://127.0.0.1:9/report")
        process.send_signal(signal.SIGINT)
        process.communicate()
    assert process.returncode == 1


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "soon"])
def test_a_watch_without_a_pause_is_refused(
    seconds: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["report", f"--watch={seconds}"])
    assert caught.value.code == 2
    assert "--watch" in capsys.readouterr().err


def test_the_reaper_takes_an_ended_child_by_its_id_and_no_other() -> None:
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    living = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert living.stdin is not None
    while child.pid not in reaper.list_ended_children():
        pass
    assert living.pid not in reaper.list_ended_children()
    assert reaper.reap([child.pid, living.pid]) == [child.pid]
    assert child.pid not in reaper.list_ended_children()
    child.wait()
    living.stdin.close()
    assert living.wait() == 1


def test_nothing_that_serves_imports_a_model_library() -> None:
    code = (
        "import sys, vram_agent.serve; "
        "print([m for m in ('torch', 'onnxruntime', 'numpy', 'yaml') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        pytest.param((1024, 4096), 4096, id="as many as it may"),
        pytest.param((1024, resource.RLIM_INFINITY), 65_536, id="no more than it needs"),
        pytest.param((100_000, 200_000), 100_000, id="never fewer than it had"),
    ],
)
def test_serve_opens_as_many_files_as_it_may(
    limits: tuple[int, int], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [limits]
    monkeypatch.setattr(resource, "getrlimit", lambda _: now[0])
    monkeypatch.setattr(resource, "setrlimit", lambda _, wanted: now.__setitem__(0, wanted))
    assert ensure_open_files() == expected
    assert now[0] == (expected, limits[1])


@pytest.mark.parametrize(
    ("words", "ours", "wrapped"),
    [
        pytest.param(
            ["run", "--device=CPU", "--", "python", "-m", "app"],
            ["run", "--device=CPU"],
            ["python", "-m", "app"],
            id="the command begins after the dashes",
        ),
        pytest.param(
            ["run", "--", "sh", "--", "x"],
            ["run"],
            ["sh", "--", "x"],
            id="later dashes are the command's own",
        ),
        pytest.param(["report", "--", "x"], ["report", "--", "x"], [], id="only run wraps"),
    ],
)
def test_a_command_line_is_split(words: list[str], ours: list[str], wrapped: list[str]) -> None:
    assert split_wrapped(words) == (ours, wrapped)


@pytest.mark.parametrize("words", [["run"], ["run", "--"], ["run", "python", "app.py"]])
def test_run_without_a_command_says_how_to_write_one(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    assert "vram-agent run -- python app.py" in capsys.readouterr().err
