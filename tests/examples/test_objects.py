"""What people apply is taken by a real apiserver, and what the operator makes of it by an agent.

Run as they stand: the pages' ``kubectl create``, ``apply``, ``get``, ``annotate`` and ``delete``.
The other commands need pods, images or a registry: their syntax is parsed, the files that they name
exist, and arguments of ``vram-agent`` are those of its parser. ``curl`` and Python: test_served.py.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
from vram_agent.__main__ import build_parser, main
from vram_operator.api import AGENT_CONTAINER
from vram_operator.core.resources import CONFIG_KEY, make_config_map, make_deployment
from vram_operator.core.snapshot import Workload
from vram_operator.pods import read_workload

from tests.examples.conftest import Shell
from tests.examples.examples import EXAMPLES, FOLDER, HOSTED, INDEX, Example
from tests.support.pages import ROOT, commands, documents

PAGES = sorted({*(ROOT / "docs").rglob("*.md"), *FOLDER.rglob("*.md"), ROOT / "README.md"})
RUN_VERBS = {"create", "apply", "get", "annotate", "delete"}
TRY = "kubectl apply --validate=strict --dry-run=server -f"
AGENT = re.compile(r"(/.*/)?vram-agent")
PROGRAMS = {"kubectl", "docker", "helm", "curl", "vram-agent"}


def by_name(example: Example) -> str:
    return example.name


def page_name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def words_of(text: str) -> list[list[str]]:
    """The simple commands of a line, without what only the shell reads."""
    found: list[list[str]] = [[]]
    for word in shlex.split(text.replace("\\\n", " ")):
        if word in {"&&", "|", "&"}:
            found.append([])
        else:
            found[-1].append(word)
    return [words for words in found if words]


def runs_here(text: str) -> bool:
    """Whether a control plane without pods can do it, and it ends by itself."""
    simple = words_of(text)
    return all(w[0] == "kubectl" and w[1] in RUN_VERBS and "-w" not in w for w in simple)


# --- objects --------------------------------------------------------------------------------------


def kubernetes_objects(page: Path) -> list[dict[str, Any]]:
    return [found for found in documents(page) if found["kind"] != "AgentConfig"]


@pytest.mark.parametrize(
    "page",
    [path for path in (*PAGES, *sorted(FOLDER.rglob("*.yaml"))) if kubernetes_objects(path)],
    ids=page_name,
)
def test_every_object_of_pages_and_examples_is_accepted(page: Path, shell: Shell) -> None:
    items = kubernetes_objects(page)
    for number, item in enumerate(items):  # a page may show one name twice
        item["metadata"]["name"] += f"-{number}"
    document = json.dumps({"apiVersion": "v1", "kind": "List", "items": items})
    done = shell.run(f"{TRY} -", document)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("created (server dry run)") == len(items)


def test_an_object_with_a_misspelt_field_would_not_be_accepted(shell: Shell) -> None:
    text = (FOLDER / "gradio/gradio.yaml").read_text().replace("targetRef:", "targetRev:")
    done = shell.run(f"{TRY} -", text)
    assert done.returncode != 0
    assert "targetRev" in done.stderr


# --- commands -------------------------------------------------------------------------------------


@pytest.mark.parametrize("example", EXAMPLES, ids=by_name)
def test_the_page_s_kubectl_makes_a_workload_whose_pods_have_all_they_need(
    example: Example, shell: Shell, tmp_path: Path
) -> None:
    wanted = example.object("GPUModelWorkload")
    name, spec = wanted["metadata"]["name"], wanted["spec"]
    checked = False
    for command in example.commands:
        if not runs_here(command.text):
            continue
        done = shell.run(command.text)
        assert done.returncode == 0, f"{command.text}\n{done.stderr}"
        if words_of(command.text)[0][1] == "apply" and not checked:
            kept = shell.get("gmw", name)
            assert holds(kept["spec"], spec)
            if example in HOSTED:
                check_pods(read_workload(kept), shell, tmp_path)
            checked = True
    assert checked
    assert shell.run(f"kubectl delete --ignore-not-found -f {example.manifest}").returncode == 0


def holds(kept: Any, wanted: Any) -> bool:
    """Whether an object is what was wanted, defaults apart."""
    if isinstance(wanted, dict):
        return all(key in kept and holds(kept[key], value) for key, value in wanted.items())
    if isinstance(wanted, list):
        return len(kept) == len(wanted) and all(map(holds, kept, wanted))
    return bool(kept == wanted)


def check_pods(workload: Workload, shell: Shell, folder: Path) -> None:
    """Ask an agent about the config that the operator makes, and the apiserver about its pods."""
    config = folder / "config.yaml"
    config.write_text(make_config_map(workload)["data"][CONFIG_KEY])
    assert main(["validate", str(config)]) == 0
    assert workload.spec.template is not None
    image = workload.spec.template.image or "registry.example.com/vram-agent:0.1.0"
    deployment = make_deployment(workload, workload.spec.template, image)
    path = folder / "deployment.json"
    path.write_text(json.dumps(deployment))
    done = shell.run(f"{TRY} {path}")
    assert done.returncode == 0, done.stderr

    pod = deployment["spec"]["template"]["spec"]
    (agent,) = (one for one in pod["containers"] if one["name"] == AGENT_CONTAINER)
    assert agent["resources"]["limits"].keys() == {"memory", "nvidia.com/gpu"}
    mounts = {one["name"]: one["mountPath"] for one in agent["volumeMounts"]}
    assert mounts.keys() == {volume["name"] for volume in pod["volumes"]}
    files: dict[str, str] = {}
    for volume in workload.spec.template.spec["volumes"]:
        match volume:
            case {"configMap": {"name": name}}:
                found = shell.get("configmap", name)
                keys = {**found.get("data", {}), **found.get("binaryData", {})}
                files |= {f"{mounts[volume['name']]}/{key}": key for key in keys}
            case {"persistentVolumeClaim": {"claimName": name}}:
                shell.get("persistentvolumeclaim", name)
            case _:
                raise AssertionError(f"nobody makes {volume}")
    for model in workload.spec.models:
        if model.source.startswith("/"):
            assert model.source in files
        if "path" in model.options:
            assert f"{model.options['path']}/{model.source.partition(':')[0]}.py" in files


@pytest.mark.parametrize("page", [INDEX, *(one.page for one in EXAMPLES)], ids=page_name)
def test_every_command_is_whole_and_names_files_that_exist(page: Path) -> None:
    for command in commands(page):
        parsed = subprocess.run(["bash", "-n", "-c", command.text], check=False)
        assert parsed.returncode == 0, command.text
        for words in words_of(command.text):
            assert words[0] in PROGRAMS
            for word in words:
                name = re.sub(r"^(--from-file=|file=@)", "", word)
                if name.startswith(("examples/", "tests/", "charts/", "Dockerfile")):
                    assert (ROOT / name).exists(), f"{name} of {command.text}"
            agent = next((n for n, word in enumerate(words) if AGENT.fullmatch(word)), None)
            if agent is not None:
                build_parser().parse_args(words[agent + 1 :])  # exits on what it does not know


# --- the index ------------------------------------------------------------------------------------


def test_the_index_names_every_example_and_every_page_has_its_parts() -> None:
    index = INDEX.read_text("utf-8")
    assert EXAMPLES
    for example in EXAMPLES:
        assert f"]({example.name}/README.md)" in index
        text = example.page.read_text("utf-8")
        assert text.startswith("# ")
        parts = re.findall(r"^## (.+)$", text, re.MULTILINE)
        assert parts[:2] == ["Run it", "What you see"]
        assert parts[-1] in {"Your own model", "Your own application"}
