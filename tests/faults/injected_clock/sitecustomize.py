"""A wall clock that a test sets: Python imports this module when it starts.

The file `EDGE_LLM_TEST_CLOCK` says by how many seconds the clock goes wrong, and may change at any time.
"""

import os
import time
from pathlib import Path

STEP = Path(os.environ["EDGE_LLM_TEST_CLOCK"])
_right_time = time.time


def _wrong_time() -> float:
    return _right_time() + float(STEP.read_text(encoding="ascii"))


time.time = _wrong_time
