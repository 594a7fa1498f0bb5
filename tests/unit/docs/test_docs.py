"""The documents say what the code says: links, alerts, fields, flags, reasons, examples."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from vram_agent import protocol
from vram_agent.config import ConfigError, parse_config
from vram_agent.protocol import AgentConfig
from vram_agent.runtimes.registry import list_runtimes
from vram_operator import api
from vram_operator.api_wire import _pruned, _type_info
from vram_operator.core import breaker, resources, triggers
from vram_operator.settings import FLAGS, Settings, from_texts
from vram_operator.signing import SECRET_NAME

from handbook.__main__ import PAGES as PAGES_MADE

ROOT = Path(__file__).parents[3]
DOCS = ROOT / "docs"
CONFIGURATION = (DOCS / "configuration.md").read_text(encoding="utf-8")
RUNTIMES = (DOCS / "runtimes.md").read_text(encoding="utf-8")
REFERENCE = (DOCS / "reference" / "runtimes.md").read_text(encoding="utf-8")
TROUBLESHOOTING = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
GLOSSARY = (DOCS / "glossary.md").read_text(encoding="utf-8")
PAGES = sorted(
    {
        *DOCS.rglob("*.md"),
        *(ROOT / "examples").rglob("*.md"),
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "CHANGELOG.md",
        ROOT / "SECURITY.md",
    }
)
ALERTS = {
    rule["alert"]: rule
    for group in yaml.safe_load(
        (ROOT / "charts/vram-operator/files/alerts/vram-operator.yaml").read_text(encoding="utf-8")
    )["groups"]
    for rule in group["rules"]
}
_LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
_CODE = re.compile(r"^( *)```.*?^\1```$", re.DOTALL | re.MULTILINE)
_YAML = re.compile(r"^( *)```yaml\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


# --- links ----------------------------------------------------------------------------------------


def links_of(page: Path) -> Iterator[str]:
    for target in _LINK.findall(_CODE.sub("", page.read_text(encoding="utf-8"))):
        if "://" not in target:
            yield target


def anchors_of(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    text = _CODE.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_links_of_a_page_lead_somewhere(page: Path) -> None:
    for link in links_of(page):
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{link} leads to no file"
        if anchor:
            assert anchor in anchors_of(target), f"{link} leads to no heading"


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_a_page_names_no_folder_of_the_machine_it_was_written_on(page: Path) -> None:
    assert str(ROOT) not in page.read_text(encoding="utf-8")


# --- generated pages ------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PAGES_MADE, ids=str)
def test_a_generated_page_is_what_the_code_says_now(path: Path) -> None:
    assert (ROOT / path).read_text(encoding="utf-8") == PAGES_MADE[path](), "run `make generate`"


# --- alerts ---------------------------------------------------------------------------------------


def test_every_alert_has_its_runbook_and_every_runbook_its_alert() -> None:
    assert {page.stem for page in (DOCS / "runbooks").glob("Vram*.md")} == set(ALERTS)


@pytest.mark.parametrize("name", ALERTS)
def test_a_runbook_is_about_the_alert_as_it_is(name: str) -> None:
    text = (DOCS / "runbooks" / f"{name}.md").read_text(encoding="utf-8")
    assert text.startswith(f"# {name}\n")
    assert f"```\n{ALERTS[name]['expr']}\n```" in text
    assert ALERTS[name]["annotations"]["runbook_url"].endswith(f"docs/runbooks/{name}.md")
    headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert headings == ["Look", "Causes and what to do", "When to ignore"]


# --- fields ---------------------------------------------------------------------------------------


def unwrapped(info: msgspec.inspect.Type) -> msgspec.inspect.Type:
    """Without constraints, and without the None of what may be absent."""
    while isinstance(info, msgspec.inspect.Metadata):
        info = info.type
    if isinstance(info, msgspec.inspect.UnionType):
        inner = [one for one in info.types if not isinstance(one, msgspec.inspect.NoneType)]
        return unwrapped(inner[0])
    return info


def default_of(field: msgspec.inspect.Field) -> str:
    if field.required:
        return "required"
    made = field.default is msgspec.NODEFAULT
    value = msgspec.to_builtins(field.default_factory() if made else field.default)
    if value is None:
        return "absent"
    return value if isinstance(value, str) and value else json.dumps(value)


def fields_of(kind: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every field that holds a value, with its default; objects only where they may be absent."""
    info = msgspec.inspect.type_info(kind)
    assert isinstance(info, msgspec.inspect.StructType)
    for field in info.fields:
        name = prefix + field.encode_name
        inner = unwrapped(field.type)
        if isinstance(inner, msgspec.inspect.StructType):
            if not field.required and field.default is None:
                yield name, "absent"
            yield from fields_of(inner.cls, f"{name}.")
            continue
        yield name, default_of(field)
        if isinstance(inner, msgspec.inspect.ListType):
            item = unwrapped(inner.item_type)
            if isinstance(item, msgspec.inspect.StructType):
                yield from fields_of(item.cls, f"{name}[].")


def table_after(text: str, mark: str) -> list[list[str]]:
    """The cells of the rows of the first table after a mark, without its head."""
    lines = text[text.index(mark) + len(mark) :].lstrip().splitlines()
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return rows[2:]


@pytest.mark.parametrize(
    ("kind", "elsewhere"),
    [
        (AgentConfig, ()),
        (api.WorkloadSpec, ("models", "vram", "hostMemory", "queue")),
        (api.RestartSpec, ()),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_documented_fields_and_defaults_are_those_of_the_types(
    kind: Any, elsewhere: tuple[str, ...]
) -> None:
    rows = table_after(CONFIGURATION, f"<!-- fields: {kind.__name__} -->")
    documented = {row[0].strip("`"): row[2].strip("`") for row in rows}
    typed = {
        name: default
        for name, default in fields_of(kind)
        if re.split(r"[.\[]", name)[0] not in elsewhere
    }
    assert documented == typed


def test_documented_flags_and_defaults_are_those_of_the_operator() -> None:
    rows = table_after(CONFIGURATION, "a bad flag or variable.")
    assert [(row[0].strip("`"), row[1].strip("`")) for row in rows] == [
        (f"--{flag.name}", flag.variable) for flag in FLAGS
    ]
    texts = {flag.name: row[2].strip("`") for flag, row in zip(FLAGS, rows, strict=True)}
    written = {name: text for name, text in texts.items() if text not in {"all", '""'}}
    assert from_texts(written, {}) == Settings()


@pytest.mark.parametrize(
    "name",
    [
        protocol.WORKLOAD_LABEL,
        protocol.CONTROL_PORT_ANNOTATION,
        protocol.RESTART_ANNOTATION,
        triggers.HANDLED_ANNOTATION,
        breaker.GENERATION_ANNOTATION,
        resources.CONTENT_HASH_ANNOTATION,
        api.TRUST_CONFIG_MAP,
        api.TRUST_KEY,
        SECRET_NAME,
        protocol.STATE_DIRECTORY,
    ],
)
def test_a_name_on_objects_is_documented(name: str) -> None:
    assert f"`{name}`" in CONFIGURATION


@pytest.mark.parametrize(
    "variable",
    [
        "POD_NAME",
        "POD_NAMESPACE",
        "POD_UID",
        "NODE_NAME",
        "VRAM_AGENT_STATE_DIR",
        "VRAM_AGENT_API_KEY_FILE",
    ],
)
def test_a_variable_that_the_agent_reads_is_documented(variable: str) -> None:
    assert variable in (ROOT / "agent/src/vram_agent/config.py").read_text(encoding="utf-8")
    assert f"`{variable}`" in CONFIGURATION


# --- runtimes -------------------------------------------------------------------------------------


def test_the_runtimes_that_exist_are_documented_and_the_others_named_as_missing() -> None:
    rows = table_after(RUNTIMES, "There are six:")
    implemented = [runtime.value for runtime in list_runtimes()]
    assert [re.findall(r"`(\w+)`", row[0])[0] for row in rows] == implemented
    missing = RUNTIMES[RUNTIMES.index("## What is not there yet") :]
    for runtime in protocol.Runtime:
        assert (
            f"](reference/runtimes.md#{runtime.lower()})" in RUNTIMES or f"`{runtime}`" in missing
        )
    assert set(re.findall(r"^## (\w+)$", REFERENCE, re.MULTILINE)) == set(implemented)


# --- words ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("reason", api.Reason)
def test_a_reason_of_a_condition_is_explained(reason: api.Reason) -> None:
    conditions = TROUBLESHOOTING[TROUBLESHOOTING.index("## Conditions and their reasons") :]
    assert f"`{reason}`" in conditions


@pytest.mark.parametrize(
    "words",
    [
        protocol.Tier,
        protocol.ModelState,
        protocol.ResidualSource,
        api.RestartMethod,
        api.RestartTrigger,
        api.RestartOutcome,
    ],
)
def test_a_word_of_the_api_is_in_the_glossary(words: type[StrEnum]) -> None:
    for word in words:
        assert f"**{word}**" in GLOSSARY


def test_the_classes_of_a_residual_are_explained() -> None:
    section = TROUBLESHOOTING[TROUBLESHOOTING.index("## The residual is high") :]
    for field in msgspec.structs.fields(protocol.MemoryClasses):
        assert f"| `{field.encode_name}` |" in section


# --- examples -------------------------------------------------------------------------------------


def documents() -> Iterator[Any]:
    """Each YAML document of pages and examples, with where it stands."""
    for page in PAGES:
        for number, (indent, block) in enumerate(_YAML.findall(page.read_text(encoding="utf-8"))):
            text = re.sub(f"^{indent}", "", block, flags=re.MULTILINE)
            for document in yaml.safe_load_all(text):
                yield pytest.param(document, id=f"{relative(page)}#{number}")
    for path in sorted((ROOT / "examples").rglob("*.yaml")):
        for document in yaml.safe_load_all(path.read_text(encoding="utf-8")):
            yield pytest.param(document, id=relative(path))


def strictly(value: dict[str, Any], kind: Any) -> Any:
    """Read a spec as the apiserver would with strict field validation."""
    assert _pruned(value, _type_info(kind)) == value, "a field that does not exist"
    return msgspec.convert(value, kind)


@pytest.mark.parametrize("document", list(documents()))
def test_an_example_validates(document: dict[str, Any]) -> None:
    if document["apiVersion"] != api.API_VERSION:
        # Kubernetes' own: an apiserver is asked about them, in tests/examples.
        assert document["apiVersion"] in {"v1", "apps/v1"}
        return
    match document["kind"]:
        case "AgentConfig":
            parse_config(document)
        case api.WORKLOAD_KIND:
            spec = strictly(document["spec"], api.WorkloadSpec)
            assert (spec.target_ref is None) is not (spec.template is None)
            # The rules that the CRD has as CEL, and the agent as faults.
            parse_config({"models": document["spec"].get("models", [])})
        case api.RESTART_KIND:
            strictly(document["spec"], api.RestartSpec)
        case kind:
            pytest.fail(f"no check for the kind {kind}")


def test_a_misspelt_example_would_be_found() -> None:
    with pytest.raises(ConfigError, match="did you mean residency"):
        parse_config(
            {"models": [{"name": "a", "runtime": "ONNX", "source": "/a", "residensy": {}}]}
        )
    with pytest.raises(AssertionError, match="does not exist"):
        strictly({"template": {"replica": 1}}, api.WorkloadSpec)
