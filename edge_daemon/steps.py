"""Named steps on the way of a task, at which a test can have the process end as by `kill -9`.

`EDGE_LLM_CRASH_AT=result_committed` ends it at the first passing of that step, `result_committed:3` at the third. The
hook lives in the product, because no kill from outside can strike between two given lines; a test reads the names from
the source, kills at each of them and has the oracle judge what is left. Unset, it costs one test of a constant.
"""

import os
from itertools import count

CRASH_STATUS = 137
"""What a shell reports of a process that was killed."""

_CRASH_AT, *_TIMES = os.environ.get("EDGE_LLM_CRASH_AT", "").split(":")
_PASSING = int(_TIMES[0]) if _TIMES else 1
_PASSED = count(1)


def reached(step: str) -> None:
    """Note that a step has been reached; each name stands at one place in the code."""
    if _CRASH_AT and step == _CRASH_AT and next(_PASSED) == _PASSING:
        os._exit(CRASH_STATUS)
