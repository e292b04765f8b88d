"""A wall clock that is set by years, and one that begins in 1970: it is a label, and nothing else goes by it (F10)."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_daemon.config import Config
from edge_daemon.intake import Intake, IntakeRules
from edge_daemon.logger import CsvLog
from edge_daemon.messages import Accepted, Incoming
from edge_daemon.records import Records
from tests.daemon import ROOT
from tests.fake_ollama import FakeModel, FakeOllama
from tests.faults.bench import Bench
from tests.faults.oracle import read_log
from tests.rig import MB, Rig
from tests.test_intake import check_model
from tests.waiting import wait_until

DAY_S = 86_400.0
YEAR_S = 365 * DAY_S
TTL_S = 600.0
WALL_S = 1_700_000_000.0
"""Where the clock of a test begins."""
STEPS = [YEAR_S, -YEAR_S, -WALL_S]
"""A year forwards, a year back, and to the beginning of 1970."""
INJECTED = Path(__file__).parent / "injected_clock"


class Board(Rig):
    """A worker with a door before it and a log behind it."""

    def start_all(self) -> None:
        """As a start of the daemon."""
        self.start()
        assert self.store is not None
        rules = IntakeRules(
            config=Config(),
            clock=self.clock,
            check_model=lambda _name, fallback: check_model("small", fallback),
            check_reply_to=lambda _src, _topic: None,
            eta_s=lambda tasks: [None for _ in tasks],
        )
        self.intake = Intake(rules, self.store.add_many, self.store.recognise)
        self.log_path = self.path.with_name("llm_metrics.csv")
        log = CsvLog(self.log_path, rotate_bytes=4_000, keep=99, text="full", clock=self.clock)
        self.records = Records(log, self.store, clock=self.clock, resident=tuple)
        self.records.rebuild()

    def ask(self, text: str, *, ttl_s: float = TTL_S) -> str:
        """Have a text without an id accepted; gives the id that it got."""
        (answer,) = self.intake.submit([Incoming(payload=text.encode(), src="dev", ttl_s=ttl_s)])
        assert isinstance(answer, Accepted), answer
        self.wake()
        return answer.address.id

    def keep_records(self) -> None:
        """Write the rows of all that has ended."""
        for finished in self.finished:
            self.records.task(finished)
        self.finished.clear()
        self.records.sync()


@pytest.fixture
def board(tmp_path: Path) -> Iterator[Board]:
    """A board whose model takes a while."""
    model = FakeModel("small", size_bytes=40 * MB, ram_bytes=100 * MB, token_s=0.02, answer="one two three four five")
    with FakeOllama(model) as fake:
        board = Board(tmp_path / "queue.db", fake)
        yield board
        board.stop()


@pytest.mark.parametrize("step_s", STEPS)
def test_steps_while_tasks_wait_and_run(board: Board, step_s: float) -> None:
    """None expires, is lost or gets an id twice, no result is pruned early, and the log stays in its order."""
    board.start_all()
    ids = []
    for number in range(8):
        ids += [board.ask(f"{number} {part}") for part in "ab"]
        board.until_generating(number + 1)
        board.clock.step_wall(step_s if number % 2 == 0 else -step_s)
    results = [board.result(task_id) for task_id in ids]
    board.keep_records()
    assert len(set(ids)) == len(ids) == 16
    assert {str(result.state) for result in results} == {"succeeded"}
    assert all(0 <= figure < 60 for it in results for figure in (it.queued_s or 0, it.run_s or 0, it.total_s or 0))
    log = read_log(board.log_path)
    assert log.problems == []
    assert sorted(row["task_id"] for row in log.tasks) == sorted(ids)
    _are_pruned_in_time(board, ids, step_s)


def _are_pruned_in_time(board: Board, ids: list[str], step_s: float) -> None:
    """Neither sooner nor later than the retention says, however the wall clock is set."""
    assert board.store is not None
    for task_id in ids:
        board.store.mark_sent(board.stored(task_id).seq)
    retention_s = 604_800.0
    board.clock.step_wall(step_s)
    assert board.store.prune() == 0
    board.clock.advance(retention_s - 60)
    assert board.store.prune() == 0
    board.clock.step_wall(-step_s)
    board.clock.advance(120)
    assert board.store.prune() == len(ids) - 1  # the newest stays


@pytest.mark.parametrize("step_s", STEPS)
def test_a_time_to_live_is_neither_longer_nor_shorter(board: Board, step_s: float) -> None:
    """A task that waits expires when its own time is over, not when the clock on the wall says so."""
    board.fake["small"].token_s = 60.0
    board.start_all()
    board.ask("long")
    board.until_generating()
    waiting = board.ask("short")
    assert board.worker is not None
    for _ in range(5):
        board.clock.advance(TTL_S / 6)
        board.clock.step_wall(step_s)
        board.worker.expire()
        assert board.stored(waiting).result is None
    board.clock.step_wall(-5 * step_s)
    board.clock.advance(TTL_S / 6)
    board.worker.expire()
    assert board.result(waiting).state == "expired"


def test_a_boot_in_1970(board: Board) -> None:
    """Until the clock is set, no task of before expires; when it is, those expire whose time was over, and no other."""
    board.start_all()
    board.stop()
    board.start()
    board.submit("seconds", ttl_s=5.0, model="absent")
    board.submit("hours", ttl_s=7_200.0, model="absent")
    board.stop()
    right = board.clock.wall()
    board.clock.reboot()
    board.clock.wall_s, board.clock.is_synced = 12.0, False
    board.fake["small"].token_s = 60.0
    board.start_all()
    new = board.ask("busy")
    board.until_generating()
    assert board.store is not None
    assert [it.task.id for it in board.store.expired(9)] == []
    board.clock.wall_s, board.clock.is_synced = right + 3_600.0, True
    assert [it.task.id for it in board.store.expired(9)] == ["seconds"]
    assert board.stored(new).result is None


@pytest.mark.broker
def test_steps_under_a_whole_daemon(tmp_path: Path) -> None:
    """By years, to and fro, while devices ask, from a start in 1970 on: all is answered, and nothing expires."""
    step = tmp_path / "step"
    path = os.pathsep.join(filter(None, (str(INJECTED), str(ROOT), os.environ.get("PYTHONPATH"))))

    def set_clock(seconds: float) -> None:
        step.with_suffix(".new").write_text(str(seconds), encoding="ascii")
        step.with_suffix(".new").replace(step)

    set_clock(-time.time())
    with Bench(tmp_path, seed=10, env={"PYTHONPATH": path, "EDGE_LLM_TEST_CLOCK": str(step)}) as bench:
        bench.daemon.start()
        for number, seconds in enumerate((-time.time(), YEAR_S, -YEAR_S, 0.0, 10 * YEAR_S, -time.time())):
            set_clock(seconds)
            bench.traffic.send(8, ttl_s=600)
            some = 8 * number + 4  # of them have ended in each year, and some are still open when the next one comes
            wait_until(lambda some=some: bench.recorder.ended() >= some)  # type: ignore[misc]
        assert bench.verdict() == []
        ends = {it.data["state"] for it in bench.recorder.heard if it.kind == "result"}
        assert ends <= {"succeeded", "rejected"}
        assert {row["timestamp"][:4] for row in bench.daemon.rows("task")} > {"1970"}
