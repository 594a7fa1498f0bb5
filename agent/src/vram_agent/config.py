"""The agent's configuration: from a file, from flags, from the environment.

Why it exists: every fault that a person can make in a config is found before anything starts, all
at once, each on one line that names the field and the remedy. Called by ``__main__`` and, for
``PUT /config``, by the supervisor. It reads one file and the environment and starts nothing.

Faults are collected by a walk along the spec types, one subtree at a time: msgspec itself stops at
the first one.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec

from vram_agent.protocol import (
    STATE_DIRECTORY,
    AgentConfig,
    DevicePreference,
    DnsLabel,
    Listen,
    ModelSpec,
    OffloadTier,
    PodIdentity,
    Quantity,
    RunPolicy,
    Runtime,
    ServingPolicy,
)

_MAX_PORT: Final = 65_535
_URL: Final = re.compile(r"https?://[^/\s]+\S*\Z")


def _pattern_of(kind: Any) -> str | None:
    info = msgspec.inspect.type_info(kind)
    info = info.type if isinstance(info, msgspec.inspect.Metadata) else info
    return info.pattern if isinstance(info, msgspec.inspect.StrType) else None


_QUANTITY_PATTERN: Final = _pattern_of(Quantity)
_LABEL_PATTERN: Final = _pattern_of(DnsLabel)


class ConfigError(Exception):
    """A config that does not validate; ``faults`` has one line for each thing to mend."""

    def __init__(self, faults: Sequence[str]) -> None:
        super().__init__("\n".join(faults))
        self.faults = list(faults)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the environment says, read once."""

    pod: PodIdentity
    node: str
    state_directory: Path
    api_key_file: str = ""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Settings:
        """Read the downward API's variables and where state is kept."""
        return cls(
            pod=PodIdentity(
                namespace=environment.get("POD_NAMESPACE", ""),
                name=environment.get("POD_NAME", ""),
                uid=environment.get("POD_UID", ""),
            ),
            node=environment.get("NODE_NAME", ""),
            state_directory=Path(environment.get("VRAM_AGENT_STATE_DIR") or STATE_DIRECTORY),
            api_key_file=environment.get("VRAM_AGENT_API_KEY_FILE", ""),
        )

    def complete(self, config: AgentConfig) -> AgentConfig:
        """Return the config with what it leaves to the environment.

        In template mode the operator writes the config, and the pod's author only the environment.
        """
        if config.serving.api_key_file or not self.api_key_file:
            return config
        serving = ServingPolicy(api_key_file=self.api_key_file)
        return msgspec.structs.replace(config, serving=serving)


def load_config(path: Path) -> AgentConfig:
    """Read a YAML or JSON file. Raises ConfigError with every fault."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError([f"{path}: {error.strerror or error}"]) from error
    except UnicodeDecodeError as error:
        raise ConfigError([f"{path}: not a text in UTF-8: {error}"]) from error
    return parse_config(_parse_text(text, str(path)))


def parse_config(document: Any) -> AgentConfig:
    """Turn a decoded document into a config. Raises ConfigError with every fault."""
    faults = list(_find_type_faults(document, AgentConfig, ""))
    if faults:
        raise ConfigError(faults)
    config = msgspec.convert(document, AgentConfig)
    if faults := find_faults(config):
        raise ConfigError(faults)
    return config


def config_from_flags(models: Sequence[str]) -> AgentConfig:
    """Build a config from ``NAME=RUNTIME:SOURCE`` texts. Raises ConfigError."""
    faults: list[str] = []
    documents: list[dict[str, str]] = []
    for text in models:
        name, equals, rest = text.partition("=")
        runtime, colon, source = rest.partition(":")
        if not (name and equals and runtime and colon and source):
            faults.append(f"--model {text}: write NAME=RUNTIME:SOURCE, for example a=ONNX:/m.onnx")
            continue
        known = {word.lower(): word.value for word in Runtime}
        runtime = known.get(runtime.lower(), runtime)
        documents.append({"name": name, "runtime": runtime, "source": source})
    if faults:
        raise ConfigError(faults)
    return parse_config({"models": documents})


def with_overrides(
    config: AgentConfig, device: str | None, serving: str | None, control: str | None
) -> AgentConfig:
    """Let flags win over the file. Raises ConfigError."""
    listen = Listen(
        serving=config.listen.serving if serving is None else serving,
        control=config.listen.control if control is None else control,
    )
    preference = config.device if device is None else DevicePreference(device)
    config = msgspec.structs.replace(config, listen=listen, device=preference)
    if faults := find_faults(config):
        raise ConfigError(faults)
    return config


def find_faults(config: AgentConfig) -> list[str]:
    """Return what the types alone cannot say, one line for each fault; empty where all is well.

    1. Two models of one name. 2. Host tier without a template. 3. Models of one group on two
    devices. 4. Listen addresses. 5. Quantities that must say something. 6. URLs and addresses of a
    wrapped application.
    """
    faults: list[str] = []
    seen: dict[str, int] = {}
    devices: dict[str, int] = {}
    for index, spec in enumerate(config.models):
        # 1
        if spec.name in seen:
            faults.append(
                f"models[{index}].name: {spec.name!r} is models[{seen[spec.name]}]'s name too; "
                "names are unique"
            )
        seen.setdefault(spec.name, index)
        # 2
        faults += _find_tier_faults(spec, f"models[{index}]")
        # 3
        if spec.group and spec.device:
            first = config.models[devices.setdefault(spec.group, index)]
            if first.device != spec.device:
                faults.append(
                    f"models[{index}].device: {spec.device}, but {first.name} of the same group "
                    f"{spec.group} is on {first.device}; a group has one GPU process on one device"
                )
    # 4
    for name in ("serving", "control"):
        fault = _find_address_fault(getattr(config.listen, name))
        if fault:
            faults.append(f"listen.{name}: {fault}")
    # 5
    if not config.limits.request_bytes:
        faults.append("limits.requestBytes: empty; write for example 64Mi")
    # 6
    faults += _find_run_faults(config.run)
    return faults


def _find_run_faults(policy: RunPolicy) -> Iterator[str]:
    for where, url in (
        ("ready", policy.ready.http),
        ("idle", policy.idle.http),
        ("drain", policy.drain.http),
    ):
        if url and not _URL.match(url):
            yield (
                f"run.{where}.http: {url!r} is not a URL; write for example http://127.0.0.1:7860/"
            )
    if policy.ready.tcp and (fault := _find_address_fault(policy.ready.tcp)):
        yield f"run.ready.tcp: {fault}"


def _find_tier_faults(spec: ModelSpec, path: str) -> Iterator[str]:
    if str(spec.options.get("loadsOn", "")).lower() != "cuda":
        return
    for field, tier in (
        ("offloadTier", spec.residency.offload_tier),
        ("idleTier", spec.residency.idle_tier),
    ):
        if tier is OffloadTier.HOST:
            yield (
                f"{path}.residency.{field}: Host is impossible with options.loadsOn: cuda, whose "
                "weights live in the GPU process only; write PinnedHost or Disk"
            )


def _find_address_fault(address: str) -> str:
    host, colon, port = address.rpartition(":")
    is_bracketed = host.startswith("[") and host.endswith("]")
    if not colon or not port.isascii() or not port.isdecimal() or int(port) > _MAX_PORT:
        return f"{address!r} is not host:port; write for example 0.0.0.0:8000"
    if not host or (":" in host and not is_bracketed):
        return f"{address!r} has no host; write for example 0.0.0.0:{port} or [::]:{port}"
    return ""


def _parse_text(text: str, path: str) -> Any:
    if text.lstrip().startswith("{"):
        try:
            return msgspec.json.decode(text)
        except msgspec.DecodeError:
            pass  # YAML's flow style begins with a brace too, and its parser names the line
    # PyYAML takes long enough to import that a start by flags should not pay for it.
    import yaml  # noqa: PLC0415

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f":{mark.line + 1}:{mark.column + 1}"
        problem = getattr(error, "problem", None) or "not a YAML document"
        raise ConfigError([f"{path}{where}: {problem}"]) from error


def _find_type_faults(value: Any, kind: Any, path: str) -> Iterator[str]:
    """Walk a document along a type; yield each fault with its path.

    1. A struct: unknown and missing fields, then each known field.
    2. A list: each element.
    3. Anything else: msgspec's own verdict on that value alone.
    """
    info = msgspec.inspect.type_info(kind)
    yield from _walk(value, info, kind, path)


def _walk(value: Any, info: msgspec.inspect.Type, kind: Any, path: str) -> Iterator[str]:
    if isinstance(info, msgspec.inspect.Metadata):
        inner = info.type
        if isinstance(inner, msgspec.inspect.UnionType) and value is not None:
            # X | None, the only kind of union there is: what is said is an X.
            inner = next(t for t in inner.types if not isinstance(t, msgspec.inspect.NoneType))
        if isinstance(inner, msgspec.inspect.StructType | msgspec.inspect.ListType):
            info = inner
    # 1
    if isinstance(info, msgspec.inspect.StructType):
        yield from _walk_struct(value, info, path)
        return
    # 2
    if isinstance(info, msgspec.inspect.ListType) and isinstance(value, list):
        for index, element in enumerate(value):
            yield from _walk(element, info.item_type, None, f"{path}[{index}]")
        return
    # 3
    if kind is None:
        return
    try:
        msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        yield f"{path or 'config'}: {_explain(error, info, value)}"


def _walk_struct(value: Any, info: msgspec.inspect.StructType, path: str) -> Iterator[str]:
    if not isinstance(value, dict):
        found = "nothing" if value is None else type(value).__name__
        yield f"{path or 'config'}: a mapping is expected, not {found}"
        return
    fields = {field.encode_name: field for field in info.fields}
    hints = msgspec.structs.fields(info.cls)
    kinds = {field.encode_name: field.type for field in hints}
    for name in value:
        if name not in fields:
            yield f"{_join(path, str(name))}: unknown field{_suggest(str(name), fields)}"
    for name, field in fields.items():
        where = _join(path, name)
        if name in value:
            yield from _walk(value[name], field.type, kinds[name], where)
        elif field.required:
            yield f"{where}: missing"


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _suggest(name: str, fields: Mapping[str, Any]) -> str:
    by_lower = {field.lower(): field for field in fields}
    near = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {by_lower[near[0]]}?"
    return f"; the fields here are {', '.join(fields)}"


def _explain(error: msgspec.ValidationError, info: msgspec.inspect.Type, value: Any) -> str:
    """The message of msgspec without its path, with the allowed words of an enum."""
    message = str(error).partition(" - at ")[0]
    if isinstance(info, msgspec.inspect.Metadata):
        info = info.type
    if isinstance(info, msgspec.inspect.LiteralType):
        return f"{value!r} is not {' or '.join(map(str, info.values))}"
    if isinstance(info, msgspec.inspect.EnumType):
        words = [str(member.value) for member in info.cls]
        near = difflib.get_close_matches(str(value), words, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
        return f"{value!r} is not one of {', '.join(words)}{hint}"
    if isinstance(info, msgspec.inspect.StrType):
        return _explain_text(message, info, value)
    return message


def _explain_text(message: str, info: msgspec.inspect.StrType, value: Any) -> str:
    """Say what to write instead of the pattern that the value does not match."""
    if info.pattern == _QUANTITY_PATTERN and not isinstance(value, bool | None):
        if isinstance(value, int) and value >= 0:
            return f'{value}: a number; write it as text, "{value}", or as 10G or 512Mi'
        return f"{value!r}: not a quantity; write for example 10G or 512Mi"
    if not isinstance(value, str):
        return message
    if info.pattern == _LABEL_PATTERN:
        return (
            f"{value!r}: not a name; write 1 to 63 of a-z, 0-9 and -, "
            "with a letter or digit at both ends"
        )
    return f"{value!r}: {message}"
