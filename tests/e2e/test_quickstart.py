"""What the quick start says happens when it is followed; its cluster is that of all tests here."""

from __future__ import annotations

import re

from tests.e2e.quickstart import Walk, section
from tests.e2e.system import System


def test_every_command_of_the_quick_start_does_what_the_page_says(
    walk: Walk, system: System
) -> None:
    del system  # sections 1 and 2 have been followed when it is there
    commands = [*section(3), *section(4), *section(5), *section(6), section(7)[0]]
    done = walk.follow(commands)
    for command in commands:
        assert command.output in done[command.text], command.text
    assert re.search(r"speech .* 0/1 +0 ", done["kubectl get gmw speech"])
    assert re.search(r"by-hand +speech .* Recycle +Recovered", done["kubectl get gmw,gpr"])
