"""Waiting for a condition with a deadline: what tests do instead of sleeping."""

import threading
import time
from collections.abc import Callable

POLL_S = 0.01


def wait_until(predicate: Callable[[], object], timeout_s: float = 30.0) -> None:
    """Return as soon as `predicate()` is true; fail the test after `timeout_s` seconds."""
    deadline = time.monotonic() + timeout_s
    pause = threading.Event()
    while not predicate():
        if time.monotonic() > deadline:
            raise AssertionError(f"still not true after {timeout_s} s: {predicate}")
        pause.wait(POLL_S)
