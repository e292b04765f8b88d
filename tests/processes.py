"""Finding processes by a mark in their environment, which children inherit and nobody else has."""

import secrets
from contextlib import suppress
from pathlib import Path

VARIABLE = "EDGE_LLM_TEST_MARK"


def new_mark() -> dict[str, str]:
    """A variable for the environment of a process that is to be found again, with all that it starts."""
    return {VARIABLE: secrets.token_hex(8)}


def marked(mark: dict[str, str], *, command: str = "") -> set[int]:
    """The living processes that carry the mark and have `command` in their command line."""
    wanted = f"{VARIABLE}={mark[VARIABLE]}".encode()
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it ended under our eyes
            if wanted in (process / "environ").read_bytes() and command.encode() in (process / "cmdline").read_bytes():
                found.add(int(process.name))
    return found
