"""The whole system on a local Kubernetes, step by step, watched live.

Each step says what happens as it happens and fails loudly if it does not; the exit status is that
of the first step that failed. The cluster stays up; ``make demo-down`` takes it away.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import requests

from demo.console import StepFailedError, Steps, complain
from demo.story import DIRECTORY, Story
from tests import cluster


def main() -> int:
    """Run the demo, or take its cluster away with ``--down``; return the exit status."""
    parser = argparse.ArgumentParser(prog="demo", description=__doc__)
    parser.add_argument("--down", action="store_true", help="take the demo's cluster away")
    if parser.parse_args().down:
        found = cluster.find(DIRECTORY)
        if found is not None:
            found.down()
        print("demo: the cluster is gone" if found else "demo: there is no cluster of ours")
        return 0
    steps = Steps()
    try:
        Story(steps, Path.cwd()).tell()
    except (StepFailedError, cluster.ClusterError, requests.RequestException) as error:
        complain(str(error))
        print(steps.summary())
        return 1
    except KeyboardInterrupt:
        complain("interrupted; `make demo-down` takes the cluster away")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
