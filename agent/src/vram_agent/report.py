"""``vram-agent report``: a running agent's report, for a person or for a program.

Why it exists: one look at a pod without a JSON tool. Called by ``__main__``. It reads one URL and
changes nothing.
"""

from __future__ import annotations

import http.client
import sys
import time
import urllib.request
from collections.abc import Sequence

import msgspec

from vram_agent.protocol import LoadProgress, ModelReport, Report

_TIMEOUT_SECONDS = 10.0
_CLEAR = "\x1b[H\x1b[2J"  # the cursor to the top, then all below it away
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def report_command(url: str, output: str, watch_seconds: float | None = None) -> int:
    """Print the report of the agent at ``url``; 1 when there is none to be had.

    With ``watch_seconds`` one report after the other, that many seconds apart, until interrupted;
    an agent that does not answer is said so each time, since it may be on its way back.
    """
    address = url.rstrip("/")
    if not address.startswith(("http://", "https://")):
        address = f"http://{address}"
    if not address.endswith("/report"):
        address += "/report"
    if watch_seconds is None:
        return _print_report(address, output, "")
    before = _CLEAR if sys.stdout.isatty() else ""
    status = 1
    try:
        while True:
            status = _print_report(address, output, before)
            time.sleep(watch_seconds)
    except KeyboardInterrupt:
        return status


def _print_report(address: str, output: str, before: str) -> int:
    try:
        with urllib.request.urlopen(address, timeout=_TIMEOUT_SECONDS) as answer:  # noqa: S310
            body = answer.read()
        report = msgspec.json.decode(body, type=Report)
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", error)
        print(f"{before}no report from {address}: {reason}", file=sys.stderr, flush=True)
        return 1
    text = msgspec.json.format(body, indent=2).decode() if output == "json" else None
    print(f"{before}{format_report(report) if text is None else text}", flush=True)
    return 0


def format_report(report: Report) -> str:
    """Return the report as tables."""
    agent, memory = report.agent, report.memory
    where = "/".join(filter(None, (agent.pod.namespace, agent.pod.name)))
    doing = f"idle since {report.idle_since}" if report.idle else "busy"
    draining = "  draining" if report.draining else ""
    head = f"agent {agent.version} {agent.mode} {where}".rstrip()
    lines = [f"{head}  boot {agent.boot_id[:8]} epoch {agent.epoch}  {doing}{draining}"]
    lines.append(
        f"memory ({memory.source}): used {format_bytes(memory.used_bytes)}, "
        f"models {format_bytes(memory.model_bytes)}, "
        f"residual {format_bytes(memory.residual_bytes)}, "
        f"host {format_bytes(memory.host_bytes)}"
    )
    if memory.last_scrub is not None:
        scrub = memory.last_scrub
        lines.append(f"last scrub: {format_bytes(scrub.reclaimed_bytes)} reclaimed at {scrub.at}")
    if report.action is not None:
        action = report.action
        lines.append(
            f"action {action.step} {action.restart_id}: {action.state} {action.message}".rstrip()
        )
    devices = [
        (
            device.kind.value,
            device.uuid,
            format_bytes(device.used_bytes),
            format_bytes(device.total_bytes),
            "yes" if device.exclusive else "no",
            "yes" if device.dirty else "no",
        )
        for device in report.devices
    ]
    is_any_loading = any(model.progress is not None for model in report.models)
    models = [
        (
            model.name,
            model.runtime.value,
            model.state.value,
            model.tier.value,
            format_bytes(model.vram_bytes),
            format_bytes(model.host_bytes),
            str(model.in_flight),
            str(model.queued),
            *_progress_cell(model, shows=is_any_loading),
            model.last_used_at or "-",
            model.error or "",
        )
        for model in report.models
    ]
    lines += ["", *_table(("DEVICE", "UUID", "USED", "TOTAL", "EXCLUSIVE", "DIRTY"), devices)]
    heads = ("MODEL", "RUNTIME", "STATE", "TIER", "VRAM", "HOST", "RUNNING", "QUEUED")
    progress = ("PROGRESS",) if is_any_loading else ()
    lines += ["", *_table((*heads, *progress, "USED AT", "ERROR"), models)]
    return "\n".join(lines)


def _progress_cell(model: ModelReport, *, shows: bool) -> tuple[str, ...]:
    if not shows:
        return ()
    return ("-" if model.progress is None else format_progress(model.progress),)


def format_progress(progress: LoadProgress) -> str:
    """Return the step and its bytes, as far as they are known."""
    if progress.done_bytes is None:
        return progress.step.value
    done = format_bytes(progress.done_bytes)
    if not progress.total_bytes:
        return f"{progress.step} {done}"
    share = 100 * progress.done_bytes // progress.total_bytes
    return f"{progress.step} {done} of {format_bytes(progress.total_bytes)} ({share} %)"


def format_bytes(number_of_bytes: int) -> str:
    """Return bytes with three significant digits and a binary unit."""
    value = float(number_of_bytes)
    for unit in _UNITS:
        if value < 1024 or unit == _UNITS[-1]:
            break
        value /= 1024
    return f"{value:.0f} {unit}" if value >= 100 or unit == "B" else f"{value:.3g} {unit}"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (heads, *rows)
    ]
