"""Every error of edge-llm, and what its catcher is to do.

EdgeError
├── ConfigError          the configuration is wrong: one line naming the key, exit 78
├── AlreadyRunning       another daemon owns the data directory: exit 75
├── PortInUse            a port that we were to open is taken: exit 75
├── Rejected             a task is refused at the door: answer its sender, never retry
├── StoreError           the queue cannot be read or written
│   ├── StorageFull      no room on the disk: accept nothing, keep what is there
│   └── StoreTooNew      written by a later version: exit 78, touch nothing
└── ModelError           a task cannot be run by its model now; ``retryable`` tells whether trying again may help
    ├── OllamaDown       nobody answers: the task keeps its place
    ├── OllamaBusy       HTTP 503: try again later
    ├── ModelMissing     Ollama does not have it
    ├── ModelTooLarge    it can never fit the memory budget
    ├── NoMemory         there is no memory for it: the kernel killed it while it loaded
    │   └── NoRoom       the budget has no room for it now: nothing was loaded
    ├── ModelBroken      its file is damaged or not understood
    ├── BadRequest       Ollama refuses the request itself
    ├── RunnerDied       the process that ran the model is gone
    │   └── OllamaDied   and Ollama with it, while it loaded the model
    │       └── DaemonDied  and so are we, or the whole board: found at the next start
    ├── Incomplete       the answer ended without being finished
    │   └── Repetitive   it repeated one token for ever: the model is sound, the answer is not
    └── DeadlineExceeded one of the deadlines passed; ``stage`` names it
"""

from typing import Any, ClassVar


class EdgeError(Exception):
    """The root: whoever builds on edge-llm can catch all of it."""


class ConfigError(EdgeError):
    """``config.yaml`` or a command-line value is wrong; the message names the key and the limit."""


class AlreadyRunning(EdgeError):
    """Another daemon holds the lock of the data directory."""


class PortInUse(EdgeError):
    """A port that edge-llm was to listen on is taken."""


class Rejected(EdgeError):
    """A task that is not accepted. ``code`` is one of the stable codes of docs/mqtt.md."""

    def __init__(self, code: str, message: str, *, retryable: bool = False) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.retryable = retryable


def invalid_field(name: str, problem: str) -> Rejected:
    """The refusal of a task for one of its fields; ``problem`` states the limit."""
    return Rejected("invalid_field", f"{name}: {problem}")


def shown(value: Any) -> str:
    """A value from outside for an error message: short, on one line, without control characters."""
    return ascii(value)[:60]


class StoreError(EdgeError):
    """The durable queue failed; what is not committed has not happened."""


class StorageFull(StoreError):
    """The disk, or the store's own limit, is full."""


class StoreTooNew(StoreError):
    """The queue file was written by a later version of edge-llm."""


class ModelError(EdgeError):
    """A model did not do its work. ``code`` goes into the result's ``error``."""

    code: ClassVar[str] = "model_error"
    retryable: ClassVar[bool] = False
    partial: str = ""
    """The text that came before the failure."""


class OllamaDown(ModelError):
    """No connection to Ollama, or it was lost before an answer began."""

    code = "ollama_down"
    retryable = True


class OllamaBusy(ModelError):
    """Ollama's own queue is full (HTTP 503)."""

    code = "ollama_busy"
    retryable = True


class ModelMissing(ModelError):
    """Ollama has no model of this name."""

    code = "model_missing"


class ModelTooLarge(ModelError):
    """The model can never fit into the memory budget of this board."""

    code = "model_too_large"


class NoMemory(ModelError):
    """Ollama found no memory for the model, or the kernel killed its runner while it loaded."""

    code = "no_memory"
    retryable = True


class NoRoom(NoMemory):
    """The memory budget has no room for the model now; nothing was loaded."""


class ModelBroken(ModelError):
    """The model's file is damaged, or this Ollama cannot read it."""

    code = "model_broken"


class BadRequest(ModelError):
    """Ollama refused the request (HTTP 400): trying again gives the same."""

    code = "bad_request"


class RunnerDied(ModelError):
    """The process that ran the model died in the middle of its work."""

    code = "runner_died"
    retryable = True


class OllamaDied(RunnerDied):
    """The connection was lost during a load: it may have been too large, and the kernel have ended Ollama for it."""


class DaemonDied(OllamaDied):
    """The daemon, or the whole board, ended during a load; ``times`` in a row by now. Found at the next start."""

    code = "crash_loop"
    retryable = False

    def __init__(self, times: int) -> None:
        super().__init__("the daemon was killed, or the board went down, during a load of the model")
        self.times = times


class Incomplete(ModelError):
    """The answer stopped without ``done: true``; what came of it is kept."""

    code = "incomplete_output"
    retryable = True


class Repetitive(Incomplete):
    """The model repeated one token for ever, and Ollama broke it off; what came of it is kept."""


class DeadlineExceeded(ModelError):
    """A deadline passed. ``stage`` is load, first_token, token_gap or task."""

    code = "timed_out"

    def __init__(self, stage: str, limit_s: float) -> None:
        super().__init__(f"no {stage.replace('_', ' ')} within {limit_s:g} s")
        self.stage = stage
        self.limit_s = limit_s
