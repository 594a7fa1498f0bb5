"""The rules that the apiserver checks: CEL expressions with the message that a person reads.

Why it exists: what a schema cannot say is said once, where it can be read in one piece. Called by
the types of ``vram_operator.api``, which carry the rules into the CRDs. Rules cost budget with the
size of what they look at, so strings and lists beside them are bounded.
"""

from __future__ import annotations

from typing import Any

from vram_operator.api_names import MINIMUM_IN_PLACE_COOLDOWN_SECONDS


def _rules(*pairs: tuple[str, str]) -> dict[str, Any]:
    """Return rules, each a pair of expression and message, as an extension of a JSON schema."""
    return {"x-kubernetes-validations": [{"rule": rule, "message": text} for rule, text in pairs]}


WORKLOAD_SPEC_RULES = _rules(
    (
        "has(self.targetRef) != has(self.template)",
        "set exactly one of spec.targetRef and spec.template",
    ),
    (
        "has(self.targetRef) == has(oldSelf.targetRef)",
        "the choice between spec.targetRef and spec.template is immutable; create another workload",
    ),
    (
        "!has(self.template) || (has(self.models) && size(self.models) > 0)",
        "spec.models must name at least one model when spec.template is used",
    ),
)

TARGET_REF_RULES = _rules(
    ("self == oldSelf", "spec.targetRef is immutable; create another workload")
)

MODEL_RULES = _rules(
    (
        (
            "!has(self.options) || !has(self.options.loadsOn) || self.options.loadsOn != 'cuda' "
            "|| (self.residency.offloadTier != 'Host' && self.residency.idleTier != 'Host')"
        ),
        (
            "a model with options.loadsOn cuda keeps no copy in shared host memory: set "
            "residency.offloadTier and residency.idleTier (Host unless set) to PinnedHost or Disk"
        ),
    )
)

# A CRD is refused unless its rules hold for the default {} before its fields are filled in, hence
# the has().
RESTART_POLICY_RULES = _rules(
    (
        (
            f"!has(self.cooldownSeconds) "
            f"|| self.cooldownSeconds >= {MINIMUM_IN_PLACE_COOLDOWN_SECONDS} "
            "|| (has(self.method) && !(self.method in ['Auto', 'InPlace']))"
        ),
        (
            f"cooldownSeconds must be at least {MINIMUM_IN_PLACE_COOLDOWN_SECONDS} with the "
            "methods Auto and InPlace: the kubelet's back-off resets after 600 s of running"
        ),
    )
)

THRESHOLD_RULES = _rules(
    (
        "quantity(self).isGreaterThan(quantity('0'))",
        (
            "residual.threshold must be above zero; leave restart.residual out to have no "
            "residual restarts"
        ),
    )
)

TIME_ZONE_RULES = _rules(
    ("self != 'Local'", "name an IANA time zone such as Asia/Shanghai, or Etc/UTC")
)

RESTART_SPEC_RULES = _rules(
    ("self == oldSelf", "spec is immutable; create another GPUPodRestart"),
    (
        "self.trigger != 'Scheduled' || has(self.scheduledTime)",
        "spec.scheduledTime is required with trigger Scheduled",
    ),
    (
        "self.trigger == 'Scheduled' || !has(self.scheduledTime)",
        "spec.scheduledTime goes with trigger Scheduled only",
    ),
)

# A Service is named by an RFC 1035 label, and a label's value has at most 63 characters.
WORKLOAD_RULES = _rules(
    (
        "size(self.metadata.name) <= 63",
        "metadata.name must have at most 63 characters: it is the value of vram.dev/workload",
    ),
    (
        "!has(self.spec.template) || self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')",
        (
            "metadata.name must be lower-case letters, digits and '-', and begin with a letter, "
            "when spec.template is used: a Service gets this name"
        ),
    ),
)


__all__ = [
    "MODEL_RULES",
    "RESTART_POLICY_RULES",
    "RESTART_SPEC_RULES",
    "TARGET_REF_RULES",
    "THRESHOLD_RULES",
    "TIME_ZONE_RULES",
    "WORKLOAD_RULES",
    "WORKLOAD_SPEC_RULES",
]
