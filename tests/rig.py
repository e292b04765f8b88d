"""A worker over a real store and real HTTP to a stand-in for Ollama, for the tests of all that it does."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edge_daemon.estimates import Estimates
from edge_daemon.messages import Address, Result, Status, Stored, Submission, Task
from edge_daemon.model_pool import Catalogue, Change, ModelPolicy, ModelPool, PoolLimits
from edge_daemon.ollama import Deadlines, Ollama
from edge_daemon.scheduler import Policy
from edge_daemon.store import Limits, Store
from edge_daemon.telemetry import Board, Runners, TaskMeter
from edge_daemon.worker import Finished, Hooks, RunRules, Worker
from tests.fake_ollama import FakeOllama, Seen
from tests.fakes import FakeClock
from tests.waiting import wait_until

MB = 10**6
IDLE_S = 3_600.0
MAX_ATTEMPTS = 3


class JumpingClock(FakeClock):
    """Time that goes on as ever, and jumps ahead when told."""

    def __init__(self) -> None:
        super().__init__()
        self._began = time.monotonic()

    def monotonic(self) -> float:
        """The time since the start, jumps included."""
        return super().monotonic() + time.monotonic() - self._began


class Rig:
    """A worker with all that it works with, and everything that it tells."""

    def __init__(self, path: Path, fake: FakeOllama) -> None:
        self.path = path
        self.fake = fake
        self.clock = JumpingClock()
        self.taken_bytes = 0
        """Memory that other processes take."""
        self.statuses: list[Status] = []
        self.chunks: list[tuple[Address, dict[str, Any]]] = []
        self.finished: list[Finished] = []
        self.edges: list[bool] = []
        self.events: list[tuple[str, str, dict[str, Any]]] = []
        self.changes: list[Change] = []
        self.on_status: Callable[[Status], None] = lambda _status: None
        self.deadlines = Deadlines(first_token_s=20, token_gap_s=20, total_s=20)
        self.store: Store | None = None
        self.worker: Worker | None = None

    def start(
        self,
        *,
        budget_mb: int = 1_000,
        preload: tuple[str, ...] = (),
        max_result_bytes: int = 1 << 18,
        load_timeout_s: float = 20.0,
        **rules: Any,
    ) -> None:
        """Open the store and start a worker on it, as a daemon that starts."""
        self.store = Store(self.path, clock=self.clock, limits=Limits(urgent_reserve=0))
        self.store._db.execute("PRAGMA synchronous = OFF")
        ollama = Ollama(self.fake.url, connect_timeout_s=5, max_result_bytes=max_result_bytes)
        self.estimates = estimates = Estimates(self.store.learnt(), self.store.learn, self.store.flush)
        pool = ModelPool(
            ollama,
            limits=PoolLimits(
                budget_bytes=budget_mb * MB,
                reserve_bytes=0,
                load_timeout_s=load_timeout_s,
                idle_timeout_s=IDLE_S,
            ),
            policy=lambda _model: ModelPolicy(num_ctx=1_000),
            catalogue=Catalogue(
                ollama, clock=self.clock, estimates=estimates, policy=lambda _: ModelPolicy(num_ctx=1_000)
            ),
            estimates=estimates,
            clock=self.clock,
            available_bytes=lambda: 10_000 * MB - self.taken_bytes - self.fake.used_bytes(),
            on_change=self.changes.append,
            on_loaded=self.wake,
        )
        runners = Runners(Board(), lambda _command: False)
        usual: dict[str, Any] = {"deadlines": self.deadlines, "max_attempts": MAX_ATTEMPTS, "scheduler": Policy()}
        self.worker = Worker(
            store=self.store,
            pool=pool,
            ollama=ollama,
            estimates=estimates,
            rules=RunRules(**usual | rules),
            meter=lambda: TaskMeter(Board(), runners),
            clock=self.clock,
            hooks=Hooks(
                status=self._status,
                stream=lambda address, chunk: self.chunks.append((address, chunk)),
                finished=self.finished.append,
                ollama=self.edges.append,
                event=lambda *event: self.events.append(event),
            ),
            preload=preload,
        )
        self.worker.start()

    def _status(self, _address: Address, status: Status) -> None:
        self.statuses.append(status)
        self.on_status(status)

    def stop(self, drain_s: float = 0.0) -> None:
        """Stop the worker and close the store."""
        if self.worker is not None:
            self.worker.stop(drain_s=drain_s)
            assert not self.worker.is_alive()
        if self.store is not None:
            self.store.close()
        self.worker = self.store = None

    def wake(self) -> None:
        """As the intake does."""
        if self.worker is not None:
            self.worker.wake()

    def submit(self, *ids: str, **fields: Any) -> None:
        """Have tasks accepted, for the model `a` unless told otherwise."""
        assert self.store is not None
        model = f"{fields.pop('model', 'a')}:latest"
        usual: dict[str, Any] = {"src": "dev", "prompt": "why?", "ttl_s": 86_400.0, "max_tokens": 1_000}
        usual |= {"prompt_tokens": 8, "received_at": self.clock.wall(), "model": model}
        self.store.add_many([Submission(task=Task(id=task_id, **usual | fields)) for task_id in ids])
        self.wake()

    def stored(self, task_id: str) -> Stored:
        """What the store has of a task."""
        assert self.store is not None
        (found,) = [it for it in (self.store.find("dev", task_id),) if it]
        return found

    def result(self, task_id: str) -> Result:
        """The result of a task, as soon as it is there."""
        wait_until(lambda: self.stored(task_id).result is not None and self.told(task_id), 20)
        result = self.stored(task_id).result
        assert result is not None
        return result

    def told(self, task_id: str) -> list[Finished]:
        """How often the end of a task was told."""
        return [it for it in list(self.finished) if it.result.id == task_id]

    def result_in_time(self, task_id: str) -> Result:
        """The result of a task, with time made to pass so that no pause keeps it waiting."""

        def ended() -> bool:
            self.clock.advance(0.5)
            self.wake()
            return self.stored(task_id).result is not None and bool(self.told(task_id))

        wait_until(ended, 20)
        return self.result(task_id)

    def chats(self, model: str | None = None) -> list[Seen]:
        """The generations that were asked for."""
        return self.fake.asked("/api/chat", model=model)

    def until_generating(self, count: int = 1) -> None:
        """Wait until the `count`-th generation has been asked for."""
        wait_until(lambda: len(self.chats()) >= count)

    def order(self) -> list[str]:
        """The prompts in the order in which they were run."""
        return [seen.body["messages"][-1]["content"] for seen in self.chats()]

    def seqs(self, task_id: str) -> list[tuple[str, int]]:
        """State and number of every status of a task."""
        return [(str(status.state), status.seq) for status in self.statuses if status.id == task_id]
