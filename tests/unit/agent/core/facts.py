"""Factories of facts, so that a test states only what it is about."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from vram_agent.core.ledger import HOST, UNLIMITED_BYTES, Ledger
from vram_agent.core.lifecycle import ABSENT, HOSTED, PINNED, RESIDENT, Residence
from vram_agent.core.pool import GroupFacts, ModelFacts, Pool
from vram_agent.protocol import AfterTask, Residency

GIB = 1 << 30
NOW = 1000.0
KEEP = Residency(after_task=AfterTask.KEEP, idle_timeout_seconds=0)
DEVICE = "GPU-0"


def model(name: str, residence: Residence = ABSENT, **fields: Any) -> ModelFacts:
    fields.setdefault("group", name)
    fields.setdefault("residency", KEEP)
    fields.setdefault("needed_bytes", GIB)
    fields.setdefault("last_used_at", NOW)
    return ModelFacts(name=name, residence=residence, **fields)


def resident(name: str, **fields: Any) -> ModelFacts:
    fields.setdefault("resident_since", 0.0)
    return model(name, RESIDENT, **fields)


def hosted(name: str, **fields: Any) -> ModelFacts:
    return model(name, HOSTED, **fields)


def pinned(name: str, **fields: Any) -> ModelFacts:
    return model(name, PINNED, **fields)


def pool(
    models: Iterable[ModelFacts],
    *,
    budget: int = UNLIMITED_BYTES,
    groups: Mapping[str, GroupFacts] | None = None,
    host_budget: int = UNLIMITED_BYTES,
    devices: Mapping[str, int] | None = None,
    at: Mapping[str, str] | None = None,
    **fields: Any,
) -> Pool:
    """A pool in which resident models hold what they need.

    ``devices``: capacities by name, by default one without limit. ``at``: the devices of resident
    models, by default the first.
    """
    facts = tuple(models)
    capacity = dict(devices or {DEVICE: UNLIMITED_BYTES})
    where = {m.name: next(iter(capacity)) for m in facts} | dict(at or {})
    vram = Ledger(
        budget_bytes=UNLIMITED_BYTES, capacity_bytes=dict.fromkeys(capacity, UNLIMITED_BYTES)
    )
    host = Ledger(budget_bytes=UNLIMITED_BYTES, capacity_bytes={HOST: UNLIMITED_BYTES})
    for m in facts:
        if m.residence.tier != "Disk":
            host = host.reserve(m.name, HOST, m.needed_bytes).commit(m.name, m.needed_bytes, 0)
        if m.residence.tier == "VRAM":
            vram = vram.reserve(m.name, where[m.name], m.needed_bytes).commit(
                m.name, m.needed_bytes, 0
            )
    known = dict(groups or {})
    for m in facts:
        in_process = [
            mate.name
            for mate in facts
            if mate.group == m.group and mate.residence.tier in ("VRAM", "PinnedHost")
        ]
        busy = any(mate.group == m.group and mate.leases for mate in facts)
        known.setdefault(
            m.group,
            GroupFacts(
                is_busy=busy,
                has_gpu_process=bool(in_process),
                device=where[in_process[0]] if in_process else "",
            ),
        )
    return Pool(
        models=facts,
        groups=known,
        vram=vram.with_limits(budget, capacity),
        host=host.with_limits(host_budget, {HOST: UNLIMITED_BYTES}),
        **fields,
    )
