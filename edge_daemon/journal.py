"""The kinds of lines in the journal, and the fields by which they are found again: ``journalctl TASK_ID=evt-42``.

docs/journal.md is the same for people, and a test holds the two together.
"""

from enum import StrEnum
from typing import Any


class Kind(StrEnum):
    """``MESSAGE_ID`` of a line, stable for ever: ``journalctl MESSAGE_ID=...`` gives all lines of the kind."""

    DAEMON_READY = "2a473954e5104169b58ea9e3d4fd5687"
    DAEMON_STOPPED = "a4908975bf2e4e6baed4882193dad1a1"
    DAEMON_FAILED = "18fa8ccc008346279d4075c79d391f1a"
    CONFIG_CHANGED = "dd39409f3b9540fbbf8a937bdf11c698"
    CONFIG_REJECTED = "8d114f7efa5a4c2f8740180158d10c81"
    BROKER_UP = "3726b05f7bc54707af0de9966d58da31"
    BROKER_LOST = "86125f5dd9b547a7a99d61e2558ca4ff"
    OLLAMA_UP = "2c9050907207456bbf766061ac5d047a"
    OLLAMA_DOWN = "b00d2f2a8db04b178b8735be7b9fac06"
    TASK_QUEUED = "9fc5e323143541508f152716ef135da7"
    TASK_BEGUN = "32f54493119047edb15fc5b18945c080"
    TASK_PUT_ASIDE = "71f355e7645c4b91a25319f4379f98de"
    TASK_RETRIED = "a21e6bce82074ba28383c8a5191f3934"
    TASK_ENDED = "5028447b87e04f2b81bc8b29217715be"
    TASK_REFUSED = "bdd9e974f68b4b32aeb50f6a1f862827"
    MODEL_CHANGED = "36fbc3ee4f944a6494093eeb68bfeedf"
    LOAD_REFUSED = "e577fa2de27449c883fa55d77d1b1335"
    MODEL_RESTS = "c7597a13669c458aa1b68559247ea17c"


EACH = frozenset({Kind.TASK_ENDED})
"""Lines of which none is ever left out, however many come."""


def about(
    kind: Kind, *, task_id: str | None = None, src: str | None = None, model: str | None = None
) -> dict[str, Any]:
    """What goes into ``extra`` of a log call: ``log.info("done", extra=about(Kind.TASK_ENDED, task_id="a"))``."""
    fields = {"MESSAGE_ID": kind.value, "TASK_ID": task_id, "SRC": src, "MODEL": model}
    return {"fields": fields, "each": kind in EACH}
