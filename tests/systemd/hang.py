"""edge-llm as it is installed, but one of its threads hangs for ever when the file HANG appears, once.

    hang.py worker|main run --config FILE

It runs in the machine under test instead of /usr/bin/edge-llm.
"""

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, "/usr/lib/edge-llm")

from edge_daemon import cli, main, systemd
from edge_daemon.ollama import Ollama

HANG = Path("/var/lib/edge-llm/hang")
SILENCE_S = 15.0  # instead of 45: the daemon takes a thread that is silent for so long for hung


def hanging(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, but the thread that calls it never comes back when HANG is there."""

    def wrapped(*arguments: Any, **named: Any) -> Any:
        if HANG.exists():
            HANG.unlink()
            threading.Event().wait()
        return function(*arguments, **named)

    return wrapped


if __name__ == "__main__":
    main.SILENCE_S = SILENCE_S
    thread = sys.argv.pop(1)
    if thread == "worker":
        Ollama.generate = hanging(Ollama.generate)  # type: ignore[method-assign]
    else:
        systemd.watchdog = hanging(systemd.watchdog)  # the main thread calls it
    sys.exit(cli.main())
