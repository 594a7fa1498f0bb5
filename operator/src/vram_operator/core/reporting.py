"""Which pods should have an agent that reports, and how each of them answers.

Why it exists: the condition AgentsReporting and the metric ``vram_operator_agents`` say the same.
Called by ``conditions``, ``status`` and the gauges. Pure.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from enum import StrEnum

from vram_operator.core.snapshot import Agent, Pod


class AgentState(StrEnum):
    """How the agent of a pod answers."""

    REPORTING = "Reporting"
    REFUSING = "Refusing"  # it reports, and refuses our signed calls
    SILENT = "Silent"  # it was heard of too long ago, or never
    STARTING = "Starting"  # its first report may still come


def should_report(pod: Pod) -> bool:
    """Is the pod there to stay, and does its agent's container run?"""
    return pod.is_present and pod.agent_running_since is not None


def is_heard(agent: Agent, silent: timedelta, now: datetime) -> bool:
    """Has the agent reported within ``silent``?"""
    return agent.received_at is not None and now - agent.received_at <= silent


def agent_state(pod: Pod, agent: Agent, silent: timedelta, now: datetime) -> AgentState:
    """Say how the agent of a pod that should report answers; silent after ``silent``."""
    if is_heard(agent, silent, now):
        return AgentState.REFUSING if agent.refuses else AgentState.REPORTING
    since = pod.agent_running_since
    young = since is not None and now - since <= silent
    # Where there is somebody to ask, the answer or its absence comes within seconds.
    unasked = agent.received_at is None and not agent.error and pod.ip and pod.control_port
    return AgentState.STARTING if young or unasked else AgentState.SILENT
