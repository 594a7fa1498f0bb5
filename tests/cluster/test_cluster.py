"""What the cluster promises: it behaves as Kubernetes does, and it leaves nothing behind.

What is left is looked for with the machine's own means, not with the code that removes it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import cluster
from tests.cluster import Cluster, ClusterError, ClusterUnavailable, images, teardown

ROOT = Path(__file__).parents[2]
# The first run on a machine builds Kubernetes.
pytestmark = pytest.mark.timeout(1800)
WEB = """
apiVersion: v1
kind: Pod
metadata: {name: web, labels: {app: web}}
spec:
  terminationGracePeriodSeconds: 0
  containers:
    - name: web
      image: IMAGE
      imagePullPolicy: Never
      command: [python3, -m, http.server, "8000"]
      resources: {limits: {nvidia.com/gpu: 1}}
      readinessProbe: {httpGet: {path: /, port: 8000}, periodSeconds: 1}
---
apiVersion: v1
kind: Service
metadata: {name: shop}
spec:
  selector: {app: web}
  ports: [{port: 80, targetPort: 8000}]
"""
DOCKERFILE = """
ARG BASE_IMAGE
FROM ${BASE_IMAGE}
COPY greeting /greeting
RUN grep -q cert /etc/pip.conf
USER 65532:65532
ENTRYPOINT ["cat", "/greeting"]
"""
RIVAL = """
apiVersion: v1
kind: Pod
metadata: {name: rival}
spec:
  containers:
    - name: rival
      image: IMAGE
      imagePullPolicy: Never
      command: [sleep, infinity]
      resources: {limits: {nvidia.com/gpu: 1}}
"""


@pytest.fixture(autouse=True)
def _no_cluster_of_the_users_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBECONFIG", raising=False)


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "cluster"
    yield path
    cluster.down(path)


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with (
        pytest.MonkeyPatch.context() as patch,
        up_or_skip("node", tmp_path_factory.mktemp("node") / "cluster", patch) as running,
    ):
        base = images.base_image()
        assert running.load_image(base.archive) == [base.reference]
        running.kubectl("apply", "-f", "-", stdin=WEB.replace("IMAGE", base.reference))
        running.kubectl("wait", "--for=condition=Ready", "pod/web", "--timeout=120s")
        yield running


def up_or_skip(level: cluster.Level, path: Path, patch: pytest.MonkeyPatch) -> Cluster:
    patch.delenv("KUBECONFIG", raising=False)
    try:
        return cluster.up(level, path)
    except ClusterUnavailable as error:
        if os.environ.get("CI") == "true":
            pytest.fail(str(error))
        pytest.skip(str(error))


def eventually(condition: Callable[[], bool], what: str, timeout_seconds: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_seconds:.0f} s: {what}"
        time.sleep(0.05)


def read_state(path: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((path / "state.json").read_text())
    return state


def traces(path: Path, cluster_id: str) -> list[str]:
    """Whatever on this machine still speaks of the cluster."""
    found = [str(path)] if path.exists() else []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().decode(errors="replace")
            mounts = (process / "mountinfo").read_text()
            environment = (process / "environ").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if f"{path}/" in command or cluster_id in environment:
            found.append(f"process {process.name}: {command[:80]}")
        if f"{path}/" in mounts:
            found.append(f"mount in process {process.name}")
    for folder in ("/run/netns", "/sys/class/net", "/run", "/var/lib", "/var/log"):
        found += [str(entry) for entry in Path(folder).glob(f"*{cluster_id}*")]
    found += [str(entry) for entry in Path("/sys/fs/cgroup").glob(f"*{cluster_id}*")]
    found += [str(entry) for entry in Path("/sys/fs/cgroup").glob(f"*/*{cluster_id}*")]
    return found


@pytest.mark.control_plane
def test_deployments_make_pods_and_down_leaves_no_trace(directory: Path) -> None:
    with cluster.up("control-plane", directory) as running:
        cluster_id = read_state(directory)["id"]
        assert traces(directory, cluster_id), "the search for traces must be able to find some"
        running.kubectl("create", "namespace", "shop")
        running.kubectl("-n", "shop", "create", "deployment", "web", "--image=web", "--replicas=2")

        def phases() -> list[str]:
            listed = json.loads(running.kubectl("-n", "shop", "get", "pods", "-o", "json"))
            return [pod["status"]["phase"] for pod in listed["items"]]

        eventually(lambda: phases() == ["Pending", "Pending"], "two pods")
        sets = running.kubectl("-n", "shop", "get", "replicasets", "-o", "name").split()
        assert len(sets) == 1
        running.kubectl("-n", "shop", "delete", "deployment", "web", "--wait=false")
        eventually(lambda: phases() == [], "the pods are collected with their owner")
    assert traces(directory, cluster_id) == []


@pytest.mark.control_plane
def test_two_clusters_side_by_side_do_not_see_each_other(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    with cluster.up("control-plane", first) as one, cluster.up("control-plane", second) as two:
        one.kubectl("create", "namespace", "only-in-one")
        assert "only-in-one" in one.kubectl("get", "namespaces", "-o", "name")
        assert "only-in-one" not in two.kubectl("get", "namespaces", "-o", "name")
        one.down()
        assert "default" in two.kubectl("get", "namespaces", "-o", "name")


@pytest.mark.control_plane
def test_a_second_up_returns_the_running_cluster(directory: Path) -> None:
    first = cluster.up("control-plane", directory)
    before = read_state(directory)
    assert cluster.up("control-plane", directory) == first
    assert read_state(directory) == before
    assert cluster.find(directory) == first


@pytest.mark.control_plane
def test_up_replaces_a_cluster_that_has_lost_a_part(directory: Path) -> None:
    cluster.up("control-plane", directory)
    before = read_state(directory)
    etcd = next(item for item in before["processes"] if item["name"] == "etcd")
    os.kill(etcd["pid"], signal.SIGKILL)
    eventually(lambda: cluster.find(directory) is None, "the cluster counts as ended")
    cluster.up("control-plane", directory)
    assert read_state(directory)["id"] != before["id"]
    # By the id alone: the path is the new cluster's now.
    assert traces(directory / "absent", before["id"]) == []


def kill_up_when(level: str, path: Path, part: str) -> str:
    """Start ``up`` as a process and SIGKILL it once ``part`` is written down."""
    command = [sys.executable, "-m", "tests.cluster", "up", "--level", level, "--dir", str(path)]
    child = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)

    def is_started() -> bool:
        if child.poll() is not None:
            assert child.stderr is not None
            pytest.fail(f"up ended before it could be killed: {child.stderr.read()}")
        state = path / "state.json"
        if not state.exists():
            return False
        return part in [item["name"] for item in json.loads(state.read_text())["processes"]]

    try:
        eventually(is_started, f"{part} is started", timeout_seconds=1500)
    finally:
        child.kill()
        child.wait()
        if child.stderr is not None:
            child.stderr.close()
    state = read_state(path)
    assert not state["ready"]
    return str(state["id"])


@pytest.mark.control_plane
@pytest.mark.parametrize("part", ["etcd", "kube-scheduler"])
def test_down_removes_what_a_killed_control_plane_up_left(directory: Path, part: str) -> None:
    cluster_id = kill_up_when("control-plane", directory, part)
    assert cluster.down(directory)
    assert traces(directory, cluster_id) == []
    assert not cluster.down(directory)


@pytest.mark.control_plane
def test_the_users_kubeconfig_wins_and_is_not_taken_down(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with cluster.up("control-plane", directory) as theirs:
        copy = tmp_path / "kubeconfig-of-mine"
        copy.write_bytes(theirs.kubeconfig.read_bytes())
        monkeypatch.setenv("KUBECONFIG", str(copy))
        with cluster.up("control-plane", tmp_path / "other") as running:
            assert not running.managed
            assert running.kubeconfig == copy
        assert not (tmp_path / "other").exists()
        monkeypatch.setenv("KUBECONFIG", str(theirs.kubeconfig))
        with cluster.up("control-plane", directory) as running:
            assert not running.managed
        monkeypatch.setenv("KUBECONFIG", str(copy))
        assert "default" in theirs.kubectl("get", "namespaces", "-o", "name")
    with pytest.raises(ClusterError, match=r"does not answer.*unset KUBECONFIG"):
        cluster.up("control-plane", tmp_path / "other")


def test_a_kubeconfig_that_is_no_file_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "absent"))
    with pytest.raises(ClusterError, match=r"absent is no file.*unset it"):
        cluster.up("control-plane", tmp_path / "cluster")


def test_a_folder_with_other_files_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ClusterError, match="not empty and holds no cluster"):
        cluster.up("control-plane", tmp_path)
    assert not cluster.down(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_the_node_level_without_root_says_in_one_line_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(ClusterUnavailable, match=r"needs root.*set KUBECONFIG") as caught:
        cluster.up("node", tmp_path / "cluster")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "cluster").exists()


def test_down_never_ends_a_process_that_got_a_recycled_pid(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "60"]) as stranger:
        record = {"name": "etcd", "pid": stranger.pid, "started": 1}
        state = {"id": "0" * 8, "level": "control-plane", "ready": True, "processes": [record]}
        (tmp_path / "state.json").write_text(json.dumps(state))
        assert teardown.remove(tmp_path)
        assert stranger.poll() is None
        stranger.kill()


@pytest.mark.node
def test_a_pod_runs_and_its_address_and_service_answer(node: Cluster) -> None:
    pod_ip = node.kubectl("get", "pod", "web", "-o", "jsonpath={.status.podIP}")
    service_ip = node.kubectl("get", "service", "shop", "-o", "jsonpath={.spec.clusterIP}")
    for address, port in ((pod_ip, 8000), (service_ip, 80)):

        def answers(address: str = address, port: int = port) -> bool:
            try:
                with node.connect(address, port) as sock:
                    sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
                    return sock.recv(15) == b"HTTP/1.0 200 OK"
            except OSError:  # until kube-proxy has heard of the endpoint
                return False

        eventually(answers, f"{address}:{port} answers")
    program = f"import urllib.request; print(urllib.request.urlopen('http://{pod_ip}:8000').status)"
    assert node.run([sys.executable, "-c", program]).stdout == "200\n"


@pytest.mark.node
def test_names_of_services_resolve_in_a_pod_and_others_do_not(node: Cluster) -> None:
    service_ip = node.kubectl("get", "service", "shop", "-o", "jsonpath={.spec.clusterIP}")
    resolve = "import socket, sys; print(socket.gethostbyname(sys.argv[1]))"
    for name in ("shop", "shop.default.svc.cluster.local"):
        found = node.kubectl("exec", "web", "--", "python3", "-c", resolve, name)
        assert found.strip() == service_ip
    with pytest.raises(ClusterError, match="not known"):
        node.kubectl("exec", "web", "--", "python3", "-c", resolve, "example.com")


@pytest.mark.node
def test_the_one_gpu_goes_to_one_pod_at_a_time(node: Cluster) -> None:
    path = r"jsonpath={.status.allocatable.nvidia\.com/gpu}"
    assert node.kubectl("get", "node", "node1", "-o", path) == "1"
    rival = RIVAL.replace("IMAGE", images.base_image().reference)
    node.kubectl("apply", "-f", "-", stdin=rival)
    try:
        node.kubectl("wait", "--for=condition=PodScheduled=False", "pod/rival", "--timeout=60s")
        pod = json.loads(node.kubectl("get", "pod", "rival", "-o", "json"))
        (condition,) = pod["status"]["conditions"]
        assert condition["reason"] == "Unschedulable"
        assert "1 Insufficient nvidia.com/gpu" in condition["message"]
    finally:
        node.kubectl("delete", "pod", "rival", "--grace-period=0", "--force")


@pytest.mark.node
def test_an_image_built_from_a_dockerfile_runs(node: Cluster, tmp_path: Path) -> None:
    (tmp_path / "greeting").write_text("hello from the image")
    (tmp_path / "Dockerfile").write_text(DOCKERFILE)
    recipe = images.Recipe(
        "localhost/vram-greeting", tmp_path / "Dockerfile", tmp_path, [tmp_path / "greeting"]
    )
    built = images.build_image(recipe)
    assert images.build_image(recipe) == built
    assert node.load_image(built.archive) == [built.reference]
    node.kubectl(
        *("run", "greeting", f"--image={built.reference}", "--image-pull-policy=Never"),
        "--restart=Never",
    )
    node.kubectl(
        *("wait", "--for=jsonpath={.status.phase}=Succeeded", "pod/greeting", "--timeout=60s")
    )
    assert node.kubectl("logs", "greeting") == "hello from the image"


@pytest.mark.node
def test_a_second_node_cluster_runs_beside_and_leaves_no_trace(
    node: Cluster, directory: Path
) -> None:
    with cluster.up("node", directory) as second:
        cluster_id = read_state(directory)["id"]
        found = traces(directory, cluster_id)
        assert any(trace.startswith("/run/netns") for trace in found)
        assert any(trace.startswith("/sys/fs/cgroup") for trace in found)
        assert any(trace.startswith("mount in") for trace in found)
        pods = second.kubectl("get", "pods", "--all-namespaces", "-o", "name")
        assert "web" not in pods
        assert "coredns" in pods
    assert traces(directory, cluster_id) == []
    assert node.kubectl("exec", "web", "--", "echo", "still here") == "still here\n"


@pytest.mark.node
@pytest.mark.parametrize("part", ["holder", "containerd", "kubelet"])
def test_down_removes_what_a_killed_node_up_left(node: Cluster, directory: Path, part: str) -> None:
    cluster_id = kill_up_when("node", directory, part)
    assert cluster.down(directory)
    assert traces(directory, cluster_id) == []
