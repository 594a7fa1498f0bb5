"""Starting a template process, and the environment it gets.

Called by group.py on the event loop's thread: the kernel ends a template when the thread that
started it ends.
"""

from __future__ import annotations

import math
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from vram_agent.cgroup import read_cpu_quota

_SINGLE_THREADED = {
    # Pools of threads do not survive a fork; the GPU process raises the number again.
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "NUMEXPR_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # torch.cuda.is_available() in a library's constructor asks NVML, and makes no context.
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
    # onnxruntime >= 1.29 starts an uploading thread when it is imported.
    "ORT_DISABLE_TELEMETRY": "1",
    "ORT_TELEMETRY_DISABLED": "1",
}


def count_threads(environment: Mapping[str, str], root: Path = Path("/")) -> int:
    """Return the threads a GPU process may use.

    OMP_NUM_THREADS, else MKL_NUM_THREADS, else the usable CPUs.
    """
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        wanted = environment.get(name, "").partition(",")[0]
        if wanted.isdigit() and int(wanted) > 0:
            return int(wanted)
    cpus = len(os.sched_getaffinity(0))
    quota = read_cpu_quota(root)
    return cpus if quota is None else max(1, min(cpus, math.ceil(quota)))


def build_environment(
    environment: Mapping[str, str], device_defaults: Mapping[str, str]
) -> dict[str, str]:
    """Return a template's environment: the agent's own, the device's defaults, one thread."""
    return {**device_defaults, **environment, **_SINGLE_THREADED}


def spawn_template(
    environment: Mapping[str, str],
) -> tuple[int, socket.socket]:
    """Start a template; return its id and the supervisor's end of its channel.

    The caller reaps it.

    Blocks for the fork alone (milliseconds). Raises OSError.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        fd = theirs.fileno()
        try:
            process = subprocess.Popen(
                # -P: a file named torch.py in the working directory must not become torch.
                [
                    sys.executable,
                    "-P",
                    "-m",
                    "vram_agent.processes.template",
                    str(fd),
                    str(os.getpid()),
                ],
                stdin=subprocess.DEVNULL,
                env=dict(environment),
                pass_fds=(fd,),
                start_new_session=True,
            )
        except BaseException:
            ours.close()
            raise
    # Its caller reaps it through its pidfd; Popen would take it for forgotten otherwise.
    process.returncode = 0
    return process.pid, ours
