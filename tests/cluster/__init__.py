"""A real local Kubernetes without Docker, for integration tests, end-to-end tests and the demo.

Two levels, both throw-away, any number side by side:

- ``"control-plane"``: etcd, kube-apiserver, controller-manager and scheduler on loopback with free
  ports. No root. Objects behave as in any cluster (Deployments make pods, owners are collected,
  budgets have a status), but pods stay Pending.
- ``"node"``: the same and one real node: containerd, runc, CNI, kubelet, kube-proxy and CoreDNS in
  namespaces and a cgroup of their own. Needs root. The node has ``nvidia.com/gpu: 1``.

Use::

    from tests import cluster

    with cluster.up("node", Path(".cluster")) as running:
        running.load_image(images.build_image(...))       # then imagePullPolicy: Never
        running.kubectl("apply", "-f", "-", stdin=manifest)
        running.run(["curl", "-s", f"http://{pod_ip}:8000/v2"])   # pod and service IPs
        with running.connect(pod_ip, 8001) as sock: ...           # the same as a socket here

``up`` is idempotent: a live cluster of that level in that directory is returned as it is, anything
else there is taken down first. A ``KUBECONFIG`` that the user has set wins: ``up`` then only checks
that it answers, and the cluster's ``managed`` is False and its ``down`` does nothing.

Errors: ``ClusterUnavailable`` where this machine cannot run the level (one line: what is missing,
what to do), ``ClusterError`` for everything else (with the last lines of the log that matters).
"""

from __future__ import annotations

from .cluster import Cluster, down, find, up
from .errors import ClusterError, ClusterUnavailable
from .state import Level

__all__ = ["Cluster", "ClusterError", "ClusterUnavailable", "Level", "down", "find", "up"]
