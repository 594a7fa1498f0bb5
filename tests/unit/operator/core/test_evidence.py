"""Which rows of reports prove a residual, and what is said of those that do not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vram_agent.protocol import ResidualSource
from vram_operator.api import ResidualPolicy
from vram_operator.core.evidence import (
    Evidence,
    EvidenceReason,
    fresh_seconds,
    history_seconds,
    silent_seconds,
    weigh_evidence,
)
from vram_operator.core.snapshot import (
    MAX_SAMPLES,
    Agent,
    ResidualSample,
    extend_history,
    sample_of,
)

from tests.support.factories import GIB, NOW, ago, make_model, make_pod, make_report, make_sample

POLICY = ResidualPolicy(threshold="8Gi", for_seconds=60, min_samples=3)
FRESH = 30.0


def weigh(*samples: ResidualSample, policy: ResidualPolicy = POLICY) -> Evidence:
    history = tuple(sorted(samples, key=lambda sample: sample.received_at))
    return weigh_evidence(Agent(pod_uid="uid", history=history), policy, FRESH, NOW)


ROW = (make_sample(60), make_sample(30), make_sample(0))


@pytest.mark.parametrize(
    ("samples", "reason", "said"),
    [
        pytest.param(
            ROW,
            EvidenceReason.SUFFICIENT,
            "residual 9Gi above 8Gi for 60 s (3 samples, source Exclusive)",
            id="three quiet samples over sixty seconds suffice",
        ),
        pytest.param((), EvidenceReason.NO_REPORT, "no report", id="nothing proves nothing"),
        pytest.param(
            (make_sample(100), make_sample(60), make_sample(31)),
            EvidenceReason.STALE,
            "is 31 s old; up to 30 s counts",
            id="the newest sample is a second too old",
        ),
        pytest.param(
            (*ROW[:2], make_sample(0, source=ResidualSource.UNKNOWN)),
            EvidenceReason.UNKNOWN_SOURCE,
            "residual 9Gi at 2026-11-23T12:00:00Z has the source Unknown",
            id="the newest sample does not know whose memory it is",
        ),
        pytest.param(
            (*ROW[:2], make_sample(0, 8.0)),
            EvidenceReason.BELOW_THRESHOLD,
            "residual 8Gi at 2026-11-23T12:00:00Z is not above 8Gi",
            id="the threshold itself is not above it",
        ),
        pytest.param(
            (*ROW[:2], make_sample(0, context_bytes=8 * GIB)),
            EvidenceReason.THRESHOLD_TOO_LOW,
            "is not above what context and libraries alone hold, 8Gi",
            id="a restart would not get below the threshold",
        ),
        pytest.param(
            (*ROW[:2], make_sample(0, in_flight=2)),
            EvidenceReason.NOT_QUIET,
            "2 requests running or waiting",
            id="a request runs",
        ),
        pytest.param(
            (*ROW[:2], make_sample(0, moving=True)),
            EvidenceReason.NOT_QUIET,
            "a model on its way",
            id="a model loads",
        ),
        pytest.param(
            (*ROW[:2], make_sample(0, idle=False)),
            EvidenceReason.NOT_QUIET,
            "the agent not idle",
            id="the agent does not call itself idle",
        ),
        pytest.param(
            (make_sample(60), make_sample(0)),
            EvidenceReason.TOO_FEW_SAMPLES,
            "in 2 of 3 samples",
            id="two samples are too few",
        ),
        pytest.param(
            (make_sample(59), make_sample(30), make_sample(0)),
            EvidenceReason.TOO_SHORT,
            "for 59 of 60 s",
            id="three samples over 59 seconds are too short",
        ),
        pytest.param(
            (make_sample(90), make_sample(60, 7.0), make_sample(30), make_sample(0)),
            EvidenceReason.TOO_FEW_SAMPLES,
            "in 2 of 3 samples, since the one at 2026-11-23T11:59:00Z was below",
            id="a sample below starts the row anew",
        ),
        pytest.param(
            (make_sample(90), make_sample(60, in_flight=1), make_sample(30), make_sample(0)),
            EvidenceReason.TOO_FEW_SAMPLES,
            "came with 1 requests running or waiting",
            id="a busy sample starts the row anew",
        ),
        pytest.param(
            (make_sample(60, epoch=1), make_sample(30), make_sample(0)),
            EvidenceReason.TOO_FEW_SAMPLES,
            "is of another boot or epoch",
            id="a sample of another epoch starts the row anew",
        ),
        pytest.param(
            (make_sample(60, boot_id="other"), make_sample(30), make_sample(0)),
            EvidenceReason.TOO_FEW_SAMPLES,
            "is of another boot or epoch",
            id="a sample of another boot starts the row anew",
        ),
        pytest.param(
            (make_sample(60, observed_at=ago(20)), make_sample(30, observed_at=ago(10)), ROW[2]),
            EvidenceReason.TOO_SHORT,
            "for 20 of 60 s",
            id="the agent's own clock counts too",
        ),
    ],
)
def test_a_row_of_samples(
    samples: tuple[ResidualSample, ...], reason: EvidenceReason, said: str
) -> None:
    evidence = weigh(*samples)
    assert evidence.reason is reason
    assert said in evidence.message
    assert evidence.is_sufficient == (reason is EvidenceReason.SUFFICIENT)


@pytest.mark.parametrize("source", [one for one in ResidualSource if one != "Unknown"])
def test_every_known_source_counts(source: ResidualSource) -> None:
    assert weigh(*(make_sample(age, source=source) for age in (60, 30, 0))).is_sufficient


def test_a_policy_without_a_span_needs_its_samples_only() -> None:
    policy = ResidualPolicy(threshold="8Gi", for_seconds=0, min_samples=1)
    assert weigh(make_sample(0), policy=policy).is_sufficient


@given(
    st.lists(
        st.builds(
            make_sample,
            st.floats(0, 300),
            st.sampled_from([7.0, 9.0]),
            epoch=st.integers(0, 1),
            in_flight=st.integers(0, 1),
            source=st.sampled_from(list(ResidualSource)),
        ),
        max_size=12,
    )
)
def test_sufficient_means_that_every_rule_holds_for_the_row(samples: list[ResidualSample]) -> None:
    rows = sorted(samples, key=lambda sample: sample.received_at)
    if not weigh(*samples).is_sufficient:
        return
    newest = rows[-1]
    assert (NOW - newest.received_at).total_seconds() <= FRESH
    last = [one for one in rows if (newest.received_at - one.received_at).total_seconds() <= 60]
    for sample in last:
        assert sample.residual_bytes > 8 * GIB
        assert sample.in_flight == 0
        assert sample.source != "Unknown"
        assert sample.epoch == newest.epoch
    assert len(rows) >= 3


def test_an_agent_that_answers_without_measuring_grows_stale() -> None:
    pod = make_pod()
    frozen = make_report(pod, 9.0, ago(120))
    history: tuple[ResidualSample, ...] = ()
    for seconds in range(120, -1, -5):
        history = extend_history(history, sample_of(frozen, ago(seconds)), 600)
    assert [sample.received_at for sample in history] == [ago(120)]
    evidence = weigh_evidence(Agent(pod_uid=pod.uid, history=history), POLICY, FRESH, NOW)
    assert evidence.reason is EvidenceReason.STALE


def test_a_history_keeps_one_boot_and_its_span_and_never_grows_beyond_its_bound() -> None:
    history: tuple[ResidualSample, ...] = ()
    for seconds in range(3000, -1, -1):
        history = extend_history(history, make_sample(seconds), 2500)
        assert len(history) <= MAX_SAMPLES
    # thinned out, and still over the whole span, oldest first
    assert (NOW - history[0].received_at).total_seconds() > 2400
    assert list(history) == sorted(history, key=lambda sample: sample.received_at)
    assert extend_history(history, make_sample(-1, boot_id="next"), 2500) == (
        make_sample(-1, boot_id="next"),
    )


def test_a_report_becomes_a_sample_with_all_that_waits_and_moves() -> None:
    pod = make_pod()
    models = [
        make_model(in_flight=1, queued=2),
        make_model(name="other", state="Restoring", in_flight=1),
    ]
    sample = sample_of(make_report(pod, 9.0, models=models, epoch=4), NOW)
    assert (sample.in_flight, sample.moving, sample.epoch) == (4, True, 4)
    assert sample.residual_bytes == 9 * GIB
    assert not sample.quiet


def test_the_spans_follow_the_poll_interval_and_have_a_floor() -> None:
    assert (fresh_seconds(10), silent_seconds(10)) == (30, 90)
    assert (fresh_seconds(0.1), silent_seconds(0.1)) == (10, 15)
    assert history_seconds(POLICY, 10) == 210
    assert history_seconds(None, 10) == 90
