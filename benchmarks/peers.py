"""How others decide, on the same board and the same trace.

Each is the order of work only, at its best: no peer pays for polling, for lost messages or for a crash.
"""

from collections import deque

from benchmarks.simulator import Board, Step
from benchmarks.traces import Job


class Fifo:
    """First in, first out; a model stays in memory until another needs the room."""

    name = "FIFO, model kept"

    def __init__(self) -> None:
        self._waiting: deque[Job] = deque()

    def arrived(self, job: Job) -> None:
        """Last in line."""
        self._waiting.append(job)

    def step(self, board: Board) -> Step | None:
        """The first in line."""
        if not self._waiting:
            return None
        job = self._waiting.popleft()
        return Step(job=job, evict=board.lru_for(job.model.name))

    def done(self, step: Step, *, load_s: float, run_s: float, board: Board) -> None:
        """Nothing to learn."""


class PriorSystem(Fifo):
    """First in, first out, and the model is unloaded after every task. Its sampling of the CPU takes 0.2 s per task."""

    name = "prior system"

    def step(self, board: Board) -> Step | None:
        """The first in line, into empty memory."""
        if not self._waiting:
            return None
        return Step(job=self._waiting.popleft(), evict=tuple(board.resident), overhead_s=0.2)


class LoadedFirst:
    """The oldest task of a loaded model, else the oldest of all; the least recently used model makes room."""

    name = "loaded first, LRU"

    def __init__(self) -> None:
        self._waiting: list[Job] = []

    def arrived(self, job: Job) -> None:
        """Last in line."""
        self._waiting.append(job)

    def step(self, board: Board) -> Step | None:
        """The first whose model is loaded, else the first."""
        if not self._waiting:
            return None
        job = next((j for j in self._waiting if j.model.name in board.resident), self._waiting[0])
        self._waiting.remove(job)
        return Step(job=job, evict=board.lru_for(job.model.name))

    def done(self, step: Step, *, load_s: float, run_s: float, board: Board) -> None:
        """Nothing to learn."""


class Ollama:
    """Ollama's own scheduler, every task sent to it at once.

    A task whose model is loaded is granted at once and keeps that model busy. The others wait in one line; its head
    blocks those behind it until its model is loaded. To make room it takes an idle model, else it settles on one and
    waits until that has no granted task left. Keep-alives are equal, so the tie is broken by the model's path.
    """

    name = "Ollama, fed in parallel"

    def __init__(self) -> None:
        self._fresh: list[Job] = []
        self._granted: deque[Job] = deque()
        self._pending: deque[Job] = deque()
        self._expiring: str | None = None

    def arrived(self, job: Job) -> None:
        """Seen at the next step."""
        self._fresh.append(job)

    def step(self, board: Board) -> Step | None:
        """Load for the head of the line as soon as there is room, else serve what is granted."""
        for job in self._fresh:
            (self._granted if job.model.name in board.resident else self._pending).append(job)
        self._fresh.clear()
        if self._pending:
            evict = self._room(self._pending[0].model.name, board)
            if evict is not None:
                self._expiring = None
                return self._load_head(evict)
        return Step(job=self._granted.popleft()) if self._granted else None

    def done(self, step: Step, *, load_s: float, run_s: float, board: Board) -> None:
        """Nothing to learn."""

    def _load_head(self, evict: tuple[str, ...]) -> Step:
        head = self._pending.popleft()
        # What follows in the line for the same model is granted with it, up to the next model.
        while self._pending and self._pending[0].model.name == head.model.name:
            self._granted.append(self._pending.popleft())
        return Step(job=head, evict=evict)

    def _room(self, model: str, board: Board) -> tuple[str, ...] | None:
        """Whom to unload for ``model``; None while the model that is to go still works."""
        if not board.first_for(model, sorted(board.resident)):
            return ()
        busy = {job.model.name for job in self._granted}
        if self._expiring not in board.resident:
            self._expiring = min(board.resident, key=lambda name: (name in busy, name))
        if self._expiring in busy:
            return None
        return (self._expiring,)
