"""Every reason that a condition of the custom resources can carry.

Why it exists: a decision has one documented reason, the same in condition, Event, log and metric.
Called by the planning code through ``vram_operator.api``. It knows nothing but the words.
"""

from __future__ import annotations

from enum import StrEnum


class Reason(StrEnum):
    """Reasons of conditions, grouped by the condition that carries them."""

    # any condition
    PENDING = "Pending"  # not looked at yet; status Unknown

    # Accepted
    ACCEPTED = "Accepted"  # the spec is understood and its target found
    MISSING_LABEL = "MissingLabel"  # the target's pod template lacks vram.dev/workload: <name>
    CONFLICTED = "Conflicted"  # another workload, or a foreign object of this name, is in the way
    TARGET_NOT_FOUND = "TargetNotFound"  # no such Deployment or StatefulSet
    INVALID_SPEC = "InvalidSpec"  # a field that the operator cannot read; the message names it
    INVALID_SCHEDULE = "InvalidSchedule"  # a schedule, window or time zone that does not parse
    INVALID_TEMPLATE = "InvalidTemplate"  # the apiserver refused the generated Deployment
    THRESHOLD_TOO_LOW = "ThresholdTooLow"  # residual.threshold is not above the context's own size
    DELETE_NOT_ALLOWED = "DeleteNotAllowed"  # method Delete without --allow-delete

    # Ready
    READY = "Ready"  # every replica is ready
    REPLICAS_NOT_READY = "ReplicasNotReady"
    SCALED_TO_ZERO = "ScaledToZero"
    MODEL_FAILED = "ModelFailed"  # a model is Failed on some agent; the message has its error
    NOT_ACCEPTED = "NotAccepted"  # see the condition Accepted

    # AgentsReporting
    REPORTING = "Reporting"  # every agent's report is fresh
    AGENT_SILENT = "AgentSilent"  # an agent does not answer, or its report is stale
    NO_AGENTS = "NoAgents"  # no running pod carries the label
    NO_CONTROL_PORT = "NoControlPort"  # a pod does not say where its agent listens
    CONTROL_REFUSED = "ControlRefused"  # an agent refuses signed calls: it can only be evicted
    CONFIG_REFUSED = "ConfigRefused"  # an agent does not take the spec's config; see the message

    # ResidualHigh
    BELOW_THRESHOLD = "BelowThreshold"
    ABOVE_THRESHOLD = "AboveThreshold"  # for forSeconds and minSamples, with nothing in flight
    PREDICTED_ABOVE_THRESHOLD = "PredictedAboveThreshold"  # below, and above before the next window
    COLLECTING_EVIDENCE = "CollectingEvidence"  # above, but not for long enough yet
    NO_THRESHOLD = "NoThreshold"  # restart.residual is absent
    NO_EVIDENCE = "NoEvidence"  # no fresh report, or its source is Unknown

    # VRAMHigh
    BELOW_WARNING = "BelowWarning"
    ABOVE_WARNING = "AboveWarning"  # VRAM in use is above vram.warnAbove
    NO_WARNING = "NoWarning"  # vram.warnAbove is empty

    # Restarting
    NOT_RESTARTING = "NotRestarting"
    RESTARTING = "Restarting"  # the message names the GPUPodRestart

    # RestartBlocked, and Admitted=False with the same reason
    NOT_BLOCKED = "NotBlocked"
    POD_DISRUPTION_BUDGET = "PodDisruptionBudget"  # the message names the budget
    MAX_UNAVAILABLE = "MaxUnavailable"  # as many pods are unavailable as the workload allows
    CONCURRENCY_CAP = "ConcurrencyCap"  # --max-concurrent-restarts is reached
    NODE_BUSY = "NodeBusy"  # another restart runs on the node
    ROLLOUT_IN_PROGRESS = "RolloutInProgress"
    COOLDOWN = "Cooldown"  # the pod was restarted less than cooldownSeconds ago
    OUTSIDE_WINDOW = "OutsideWindow"  # residual restarts run inside restart.windows only
    SUSPENDED = "Suspended"  # restart.suspend is true
    TOO_YOUNG = "TooYoung"  # the container runs for less than the kubelet's back-off reset
    NOT_IDLE = "NotIdle"  # a model loads or a request runs: no residual can be told
    EVICTION_REFUSED = "EvictionRefused"  # the apiserver refused for another reason; see message

    # Degraded
    HEALTHY = "Healthy"
    RESTARTS_DO_NOT_HELP = "RestartsDoNotHelp"  # maxConsecutiveFailures restarts did not recover

    # Admitted
    ADMITTED = "Admitted"
    POD_NOT_FOUND = "PodNotFound"
    POD_GONE = "PodGone"  # the pod that was meant no longer exists
    WORKLOAD_NOT_FOUND = "WorkloadNotFound"
    DEADLINE_PASSED = "DeadlinePassed"  # a scheduled restart still blocked at its deadline: Skipped
    DRY_RUN = "DryRun"  # this would be done, and is not

    # Drained
    DRAINING = "Draining"
    DRAINED = "Drained"
    DRAIN_TIMEOUT = "DrainTimeout"  # the deadline passed; the message counts the requests cut
    NOTHING_TO_DRAIN = "NothingToDrain"  # no agent answers, or the step drains by itself

    # Restarted
    RESTART_IN_PROGRESS = "RestartInProgress"
    RESTARTED = "Restarted"
    STEP_FAILED = "StepFailed"  # the last step of the ladder failed; attempts says how

    # Recovered
    MEASURING = "Measuring"  # waiting for a report of the new boot or epoch
    RECOVERED = "Recovered"  # the residual is below the threshold, or the new boot reports
    RESIDUAL_REMAINS = "ResidualRemains"  # still above the threshold after the last step
    NO_REPORT = "NoReport"  # nothing reported after the restart


__all__ = ["Reason"]
