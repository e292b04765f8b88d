"""Faults inside the daemon of a test, without a hook in the product: Python imports this module when it starts.

`EDGE_LLM_TEST_FAULT` is `raise:THREAD`, `hang:THREAD` or `lock:THREAD`: the next time that this thread shows that it
lives, it meets an error, falls silent, or does so with the store's lock in its hand. That strikes once the file
`EDGE_LLM_TEST_TRIGGER` exists; it is gone when the lock is taken. The daemon's patience is cut to a few seconds, and on
SIGUSR2 it says in its log where its threads are.
"""

import faulthandler
import gc
import os
import signal
import threading
from pathlib import Path

from edge_daemon import http_server, main, model_pool, mqtt_bridge, ollama, worker
from edge_daemon.store import Store

HOW, _, WHERE = os.environ["EDGE_LLM_TEST_FAULT"].partition(":")
TRIGGER = Path(os.environ["EDGE_LLM_TEST_TRIGGER"])
SILENCE_S = 8.0
BEAT_S = 0.3


def _beats(thread: threading.Thread) -> int:
    count: int = thread.__dict__.get("beats", 0)
    return count


def _beat(thread: threading.Thread, count: int) -> None:
    thread.__dict__["beats"] = count
    if thread.name == WHERE and thread is threading.current_thread() and TRIGGER.exists():
        _strike()


def _strike() -> None:
    if HOW == "raise":
        raise RuntimeError("injected")
    if HOW == "lock":
        next(it for it in gc.get_objects() if isinstance(it, Store))._lock.acquire()
        TRIGGER.unlink()
    threading.Event().wait()


faulthandler.register(signal.SIGUSR2)
threading.Thread.beats = property(_beats, _beat)  # type: ignore[attr-defined]
main.SILENCE_S = SILENCE_S
main.IDLE_LOOK_S = main.BUSY_LOOK_S
main.GOODBYE_S = 1.0
http_server.BEAT_S = model_pool.BEAT_S = mqtt_bridge.BEAT_S = ollama.BEAT_S = worker.BEAT_S = BEAT_S
