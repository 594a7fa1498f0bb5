"""Flags and variables become one object, or one clear line and exit status 2."""

from __future__ import annotations

import pytest
from vram_operator.cli import main, parser
from vram_operator.logs import LogFormat
from vram_operator.settings import FLAGS, Limit, Settings, SettingsError, from_texts, parse_seconds


def test_without_anything_the_documented_defaults_hold() -> None:
    settings = from_texts({}, {})
    assert settings == Settings()
    assert settings.namespaces == ()
    assert settings.poll_interval_seconds == 10
    assert str(settings.max_concurrent_restarts) == "10%"
    assert settings.schedule_jitter_seconds == 30
    assert settings.restart_ttl_seconds == 604_800
    assert settings.metrics_port == 8080
    assert (settings.allow_delete, settings.dry_run) == (False, False)


def test_every_flag_has_a_variable() -> None:
    values = {
        "VRAM_OPERATOR_NAMESPACE": "a, b,a",
        "VRAM_OPERATOR_AGENT_IMAGE": "agent:1",
        "VRAM_OPERATOR_POLL_INTERVAL": "2.5",
        "VRAM_OPERATOR_MAX_CONCURRENT_RESTARTS": "3",
        "VRAM_OPERATOR_SCHEDULE_JITTER": "0",
        "VRAM_OPERATOR_RESTART_TTL": "12h",
        "VRAM_OPERATOR_ALLOW_DELETE": "true",
        "VRAM_OPERATOR_METRICS_PORT": "0",
        "VRAM_OPERATOR_LEASE_NAME": "mine",
        "VRAM_OPERATOR_LOG_FORMAT": "console",
        "VRAM_OPERATOR_DRY_RUN": "1",
    }
    assert {flag.variable for flag in FLAGS} == set(values)
    assert from_texts({}, values) == Settings(
        namespaces=("a", "b"),
        agent_image="agent:1",
        poll_interval_seconds=2.5,
        max_concurrent_restarts=Limit(3, percent=False),
        schedule_jitter_seconds=0,
        restart_ttl_seconds=43_200,
        allow_delete=True,
        metrics_port=0,
        lease_name="mine",
        log_format=LogFormat.CONSOLE,
        dry_run=True,
    )


def test_a_flag_wins_over_its_variable() -> None:
    assert from_texts({"lease-name": "flag"}, {"VRAM_OPERATOR_LEASE_NAME": "variable"}) == Settings(
        lease_name="flag"
    )


def test_switches_take_an_optional_value_and_namespaces_repeat() -> None:
    parsed = parser().parse_args(
        ["run", "--allow-delete", "--dry-run=false", "--namespace", "a", "--namespace", "b"]
    )
    assert (parsed.allow_delete, parsed.dry_run, parsed.namespace) == ("true", "false", ["a", "b"])


@pytest.mark.parametrize(
    ("flag", "text", "complaint"),
    [
        ("poll-interval", "soon", "is no duration"),
        ("poll-interval", "0", "is not between"),
        ("max-concurrent-restarts", "0", "neither a number"),
        ("max-concurrent-restarts", "200%", "neither a number"),
        ("schedule-jitter", "-1", "is no duration"),
        ("restart-ttl", "7w", "is no duration"),
        ("allow-delete", "perhaps", "neither true nor false"),
        ("metrics-port", "65536", "is no port"),
        ("lease-name", "Not_A_Name", "is no name"),
        ("namespace", "UPPER", "is no name"),
        ("log-format", "xml", "neither json nor console"),
    ],
)
def test_a_bad_value_names_the_flag_and_says_what_is_wrong(
    flag: str, text: str, complaint: str
) -> None:
    with pytest.raises(SettingsError, match=f"^--{flag}: '{text}' .*{complaint}"):
        from_texts({flag: text}, {})


def test_a_bad_variable_ends_with_one_line_and_status_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VRAM_OPERATOR_POLL_INTERVAL", "soon")
    assert main(["run"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("vram-operator: VRAM_OPERATOR_POLL_INTERVAL: 'soon' ")
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("90s", 90), ("15m", 900), ("12h", 43_200), ("7d", 604_800)]
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize(
    ("limit", "total", "pods"),
    [
        (Limit(10, percent=True), 0, 1),
        (Limit(10, percent=True), 19, 1),
        (Limit(10, percent=True), 20, 2),
        (Limit(3, percent=False), 1000, 3),
    ],
)
def test_a_limit_is_rounded_down_and_at_least_one(limit: Limit, total: int, pods: int) -> None:
    assert limit.of(total) == pods


def test_the_crds_are_printed_as_yaml(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["crds"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("kind: CustomResourceDefinition") == 2
