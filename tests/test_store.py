"""The durable queue, on real files: what is promised of it holds through kills, reboots, full disks and garbage."""

import bisect
import contextlib
import itertools
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from edge_daemon.errors import StorageFull, StoreError, StoreTooNew
from edge_daemon.messages import Added, Priority, Result, Stored, Submission, Task, TaskState
from edge_daemon.queue_file import SCHEMA_VERSION, log_bytes
from edge_daemon.store import SLACK, Limits, Store, Waiting, _stored_from_row
from tests.fakes import FakeClock

ROOT = Path(__file__).parent.parent
DAY_S = 86_400.0
YEAR_S = 365 * DAY_S


def a_task(task_id: str = "t1", **fields: Any) -> Task:
    """A small task for model `m`, as the intake makes one."""
    usual: dict[str, Any] = {"prompt": "why?", "model": "m", "ttl_s": DAY_S, "received_at": 1_700_000_000.0}
    return Task(id=task_id, **usual | {"max_tokens": 100, "prompt_tokens": 8} | fields)


def submission(
    task_id: str = "t1", *, own_id: bool = True, redelivered: bool = False, packet_id: int = 7, **fields: Any
) -> Submission:
    """A submission of `a_task`."""
    task = a_task(task_id, **fields)
    return Submission(task=task, own_id=own_id, redelivered=redelivered, packet_id=packet_id)


def a_result(task: Task, text: str = "because", state: TaskState = TaskState.SUCCEEDED, **fields: Any) -> Result:
    """A terminal record of `task`."""
    return Result(id=task.id, src=task.src, seq=4, state=state, text=text, ts="2026-01-01T00:00:00.000Z", **fields)


def outcomes(added: Sequence[Added]) -> list[str]:
    """The outcome of each submission."""
    return [one.outcome for one in added]


def waiting_ids(store: Store) -> list[str]:
    """The ids of all waiting tasks in the order of acceptance, found by claiming each and setting it back."""
    seqs = []
    while heads := store.heads():
        seqs += [head.seq for head in heads if store.claim(head.seq)]
    aside = [stored for seq in sorted(seqs) if (stored := store.put_aside(seq, partial="", partial_tokens=0))]
    return [stored.task.id for stored in aside]


def accept(store: Store, *ids: str, **fields: Any) -> list[Stored]:
    """Add tasks, all new."""
    added = store.add_many([submission(task_id, **fields) for task_id in ids])
    assert set(outcomes(added)) == {"new"}
    return [one.stored for one in added if one.stored]


def finish(store: Store, stored: Stored, text: str = "because") -> Stored:
    """Run a task to its end."""
    assert store.claim(stored.seq) is not None
    assert store.finish(stored.seq, a_result(stored.task, text))
    return stored


def found(store: Store, task_id: str, src: str = "_") -> Stored:
    """The task with this id, which is there."""
    stored = store.find(src, task_id)
    assert stored is not None
    return stored


class Stores:
    """Opens the same file again and again, and closes what is open at the end."""

    def __init__(self, path: Path, clock: FakeClock) -> None:
        self.path = path
        self.clock = clock
        self._open: Store | None = None

    def open(self, **limits: Any) -> Store:
        """The store, opened anew: as a restart of the daemon would."""
        self.close()
        self._open = Store(self.path, clock=self.clock, limits=Limits(**limits))
        self._open._db.execute("PRAGMA synchronous = OFF")  # no power is cut here
        return self._open

    def close(self) -> None:
        """Close what is open."""
        if self._open is not None:
            self._open.close()
        self._open = None


@pytest.fixture
def clock() -> FakeClock:
    """Time that stands still."""
    return FakeClock()


@pytest.fixture
def stores(tmp_path: Path, clock: FakeClock) -> Iterator[Stores]:
    """One file, to open as often as wanted."""
    stores = Stores(tmp_path / "queue.db", clock)
    yield stores
    stores.close()


@pytest.fixture
def store(stores: Stores) -> Store:
    """An empty store."""
    return stores.open()


# -- intake


def test_add_gives_seq_position_and_a_queued_task(store: Store) -> None:
    """A new task gets the next seq, its place in line, and waits."""
    first, second = store.add_many([submission("a"), submission("b")])
    assert first.stored is not None
    assert second.stored is not None
    assert first.stored.seq < second.stored.seq
    assert (first.position, second.position) == (1, 2)
    assert found(store, "a").state is TaskState.QUEUED
    assert found(store, "a") == first.stored


def test_position_counts_those_of_equal_and_higher_priority(store: Store) -> None:
    """The position of a task is how many wait that may go before it, itself included, of any model."""
    accept(store, "n1", "n2", priority=Priority.NORMAL)
    accept(store, "l1", priority=Priority.LOW, model="other")
    (urgent,) = store.add_many([submission("u", priority=Priority.URGENT, model="third")])
    (normal,) = store.add_many([submission("n3")])
    (low,) = store.add_many([submission("l2", priority=Priority.LOW)])
    assert (urgent.position, normal.position, low.position) == (1, 4, 6)


def test_one_batch_has_every_outcome(stores: Stores) -> None:
    """New, known, conflict and full are told apart within one batch, duplicates inside it included."""
    store = stores.open(max_tasks=3, urgent_reserve=0)
    accept(store, "old")
    batch = [
        submission("old"),
        submission("old", prompt="something else"),
        submission("new"),
        submission("new"),
        submission("new", prompt="something else"),
        submission("third"),
        submission("fourth"),
        submission("old", src="someone"),
    ]
    added = store.add_many(batch)
    assert outcomes(added) == ["known", "conflict", "new", "known", "conflict", "new", "full", "full"]
    assert store.open_count() == 3
    assert [one.stored is None for one in added] == [outcome == "full" for outcome in outcomes(added)]


def test_a_task_of_an_earlier_version_is_known(stores: Stores) -> None:
    """A task that was stored without a word on whose its options are is known when it comes again, and no conflict."""
    store = stores.open()
    accept(store, "t", options={"seed": 1, "top_k": 5}, from_type=("options",))
    store._db.execute("UPDATE tasks SET hash = ?", (a_task("t").content_hash(),))  # its options were not in it
    again = submission("t", options={"seed": 1, "top_k": 6}, from_type=("options.top_k",))
    assert outcomes(store.add_many([again])) == ["known"]


def test_an_id_belongs_to_its_sender(store: Store) -> None:
    """Two senders may use the same id for different tasks."""
    added = store.add_many([submission("a", src="one"), submission("a", src="two", prompt="other")])
    assert outcomes(added) == ["new", "new"]


def test_group_commit_is_all_or_nothing(store: Store, stores: Stores) -> None:
    """When one task of a batch cannot be written, none is: neither on the disk nor in memory."""
    before = accept(store, "before")
    unwritable = submission("bad", meta={"half": "\ud800"})
    with pytest.raises(UnicodeEncodeError):
        store.add_many([submission("a"), submission("b"), unwritable])
    assert (store.open_count(), store.depth()[Priority.NORMAL]) == (1, 1)
    assert [head.seq for head in store.heads()] == [before[0].seq]
    assert store.find("_", "a") is None
    assert waiting_ids(stores.open()) == ["before"]


def test_urgent_tasks_have_a_reserve(stores: Stores) -> None:
    """The last places of the queue are for urgent tasks alone."""
    store = stores.open(max_tasks=4, urgent_reserve=2)
    batch = [submission(f"n{i}") for i in range(3)]
    batch += [submission(f"u{i}", priority=Priority.URGENT) for i in range(3)]
    assert outcomes(store.add_many(batch)) == ["new", "new", "full", "new", "new", "full"]


def test_urgent_tasks_have_a_reserve_of_bytes(stores: Stores) -> None:
    """Of the bytes the same share is for urgent tasks alone: large tasks cannot lock them out."""
    store = stores.open(max_tasks=4, urgent_reserve=1, max_bytes=20_000)
    big = "x" * 6_000
    batch = [submission(f"n{i}", prompt=big) for i in range(3)] + [submission("u", priority=Priority.URGENT)]
    assert outcomes(store.add_many(batch)) == ["new", "new", "full_of_bytes", "new"]


def test_bytes_are_limited_and_freed(stores: Stores) -> None:
    """Open tasks take at most `max_bytes`; what has ended no longer counts, also after a restart."""
    store = stores.open(max_bytes=10_000)
    big = "x" * 6_000
    (first,) = accept(store, "a", prompt=big)
    assert outcomes(store.add_many([submission("b", prompt=big)])) == ["full_of_bytes"]
    store = stores.open(max_bytes=10_000)
    assert outcomes(store.add_many([submission("b", prompt=big)])) == ["full_of_bytes"]
    finish(store, first)
    assert outcomes(store.add_many([submission("b", prompt=big)])) == ["new"]


def test_full_frees_up_with_finishing(stores: Stores) -> None:
    """A running task keeps its place in the count; a finished one leaves it."""
    store = stores.open(max_tasks=1, urgent_reserve=0)
    (only,) = accept(store, "a")
    assert store.claim(only.seq)
    assert outcomes(store.add_many([submission("b")])) == ["full"]
    store.finish(only.seq, a_result(only.task))
    assert outcomes(store.add_many([submission("b")])) == ["new"]


def test_a_sender_has_a_quota(stores: Stores) -> None:
    """One sender's open tasks are limited, and those of others are not touched by that, also after a restart."""
    store = stores.open(max_tasks_per_src=2)
    batch = [submission(f"t{i}", src="greedy") for i in range(3)] + [submission("t", src="modest")]
    assert outcomes(store.add_many(batch)) == ["new", "new", "full_for_src", "new"]
    store = stores.open(max_tasks_per_src=2)
    assert outcomes(store.add_many([submission("t2", src="greedy")])) == ["full_for_src"]
    finish(store, found(store, "t0", "greedy"))
    assert outcomes(store.add_many([submission("t2", src="greedy")])) == ["new"]


def test_finished_tasks_make_room_only_when_delivered(stores: Stores) -> None:
    """What is kept is limited in bytes: delivered tasks go, undelivered ones stay and keep new ones out."""
    store = stores.open(retention_bytes=23_000)
    for n in range(6):
        (stored,) = accept(store, f"t{n}")
        finish(store, stored, "y" * 6_000)
        if n < 3:
            continue
        full = store.add_many([submission("one more")])
        assert outcomes(full) == ["no_room"]
        assert store.unsent_count() == 4
        for unsent in store.unsent(1):
            store.mark_sent(unsent.seq)
            store.mark_logged([unsent.seq])
    again = stores.open(retention_bytes=23_000)  # the sum is taken anew
    assert again.find("_", "t0") is None
    assert [stored.task.id for stored in again.unsent(9)] == ["t3", "t4", "t5"]


def test_room_is_made_for_more_than_one(stores: Stores) -> None:
    """Where finished tasks take all they may, a task costs hardly more commits than with an empty store."""
    store = stores.open(retention_bytes=60_000)
    statements: list[str] = []
    count = 100
    for n in range(2 * count):
        if n == count:
            store._db.set_trace_callback(statements.append)
        (stored,) = accept(store, f"t{n}", prompt="x" * 500)
        finish(store, stored)
        store.mark_sent(stored.seq)
        store.mark_logged([stored.seq])
    store._db.set_trace_callback(None)
    assert statements.count("COMMIT") <= 3.5 * count
    assert 40_000 < store._finished_bytes <= 62_000


def test_where_there_is_no_room_to_make_none_is_looked_for(stores: Stores) -> None:
    """While undelivered tasks take all the room, a refusal costs no look at them; a delivery makes it worth one."""
    store = stores.open(retention_bytes=5_000)
    kept = accept(store, *(f"t{n}" for n in range(3)))
    for stored in kept:
        finish(store, stored, "y" * 3_000)
    assert outcomes(store.add_many([submission("a")])) == ["no_room"]
    statements: list[str] = []
    store._db.set_trace_callback(statements.append)
    assert outcomes(store.add_many([submission("a")])) == ["no_room"]
    assert not [text for text in statements if "finished_at" in text]
    for stored in kept[:2]:
        store.mark_sent(stored.seq)
        store.mark_logged([stored.seq])
    assert outcomes(store.add_many([submission("a")])) == ["new"]


def test_a_known_task_tells_its_answer_again(store: Store) -> None:
    """A repeated id is answered from the store: the result is unsent again, and nothing waits to run."""
    (first,) = accept(store, "a")
    finish(store, first, "forty-two")
    store.mark_sent(first.seq)
    assert store.unsent(10) == []
    (again,) = store.add_many([submission("a", ttl_s=5)])
    assert again.outcome == "known"
    assert again.stored is not None
    assert again.stored.result is not None
    assert again.stored.result.text == "forty-two"
    assert [stored.seq for stored in store.unsent(10)] == [first.seq]
    assert store.heads() == ()


def test_asked_again_while_the_answer_is_on_its_way(store: Store) -> None:
    """The confirmation of a copy that was sent before the question came again does not count for the one after."""
    (first,) = accept(store, "a")
    finish(store, first)
    assert [stored.seq for stored in store.unsent(10)] == [first.seq]
    store.add_many([submission("a")])
    store.mark_sent(first.seq)
    assert [stored.seq for stored in store.unsent(10)] == [first.seq]
    store.mark_sent(first.seq)
    assert store.unsent(10) == []


def test_a_known_task_moves_its_reply_to(store: Store, stores: Stores) -> None:
    """A repetition from elsewhere has the answer go where its sender listens now, through a restart too."""
    (first,) = accept(store, "a", reply_to="reply/old", correlation=b"1")
    (moved,) = store.add_many([submission("a", reply_to="reply/new", correlation=b"2")])
    assert moved.stored is not None
    assert (moved.stored.task.reply_to, moved.stored.task.correlation) == ("reply/new", b"2")
    again = stores.open()
    assert found(again, "a").task.address.reply_to == "reply/new"
    assert outcomes(again.add_many([submission("a")])) == ["known"]  # it is still the same task
    finish(again, first)


def test_redelivery_without_own_id_is_not_run_twice(store: Store, stores: Stores) -> None:
    """The broker sends a text again whose PUBACK was lost: it is the same task, also after a restart."""
    (first,) = store.add_many([submission("gen1", own_id=False)])
    (again,) = store.add_many([submission("gen2", own_id=False, redelivered=True)])
    assert (first.outcome, again.outcome) == ("new", "known")
    assert again.stored is not None
    assert again.stored.task.id == "gen1"
    (third,) = stores.open().add_many([submission("gen3", own_id=False, redelivered=True)])
    assert third.outcome == "known"


@pytest.mark.parametrize(
    ("change", "outcome"),
    [
        ({"redelivered": False}, "new"),
        ({"prompt": "other"}, "new"),
        ({"src": "else"}, "new"),
        ({"own_id": True}, "new"),
        ({"packet_id": 8}, "new"),
        ({"reply_to": "reply/elsewhere"}, "new"),
        ({"correlation": b"42"}, "new"),
        ({}, "known"),
    ],
)
def test_only_a_redelivered_twin_is_the_same(store: Store, change: dict[str, Any], outcome: str) -> None:
    """Without an own id, only an equal text with the same packet id and addresses, sent again, is the same task."""
    store.add_many([submission("gen1", own_id=False)])
    options = {"own_id": False, "redelivered": True} | change
    assert outcomes(store.add_many([submission("gen2", **options)])) == [outcome]


def test_equal_texts_are_told_apart(store: Store, stores: Stores) -> None:
    """Of many equal texts, those that were stored before a kill are known again, and the others are run."""
    store.add_many([submission(f"gen{number}", own_id=False, packet_id=number) for number in (1, 2, 3)])
    again = [submission(f"new{number}", own_id=False, packet_id=number, redelivered=True) for number in (2, 3, 4, 5)]
    assert outcomes(stores.open().add_many(again)) == ["known", "known", "new", "new"]


def test_a_packet_id_that_was_freed(store: Store) -> None:
    """A second text under the same packet id shows that the first was acknowledged: the second is the one known."""
    store.add_many([submission(task_id, own_id=False) for task_id in ("gen1", "gen2")])
    (again,) = store.add_many([submission("gen3", own_id=False, redelivered=True)])
    assert again.stored is not None
    assert again.stored.task.id == "gen2"


def test_what_may_come_again(store: Store, stores: Stores) -> None:
    """Only a task that has no id of its sender's, and came under a packet id, may be taken for one sent again."""
    store.add_many([submission("own"), submission("qos 0", own_id=False, packet_id=0)])
    (added,) = store.add_many([submission("gen1", own_id=False)])
    assert added.stored is not None
    assert store.unacked() == stores.open().unacked() == [added.stored.seq]


def test_an_acknowledged_text_may_be_sent_again(store: Store, stores: Stores) -> None:
    """Once its PUBACK is out, an equal text is another task, however it comes."""
    (first,) = store.add_many([submission("gen1", own_id=False)])
    assert first.stored is not None
    store.mark_acked([first.stored.seq])
    store.flush()
    assert outcomes(store.add_many([submission("gen2", own_id=False, redelivered=True)])) == ["new"]
    assert store.open_count() == 2
    assert waiting_ids(stores.open()) == ["gen1", "gen2"]


# -- the worker's side


def test_claim_counts_the_attempt_before_it_starts(store: Store) -> None:
    """A claimed task is running with its attempt counted, waits no longer, and cannot be claimed twice."""
    (stored,) = accept(store, "a")
    claimed = store.claim(stored.seq)
    assert claimed is not None
    assert (claimed.state, claimed.attempt) == (TaskState.RUNNING, 1)
    assert found(store, "a") == claimed
    assert store.heads() == ()
    assert store.claim(stored.seq) is None
    assert store.claim(stored.seq + 1) is None


def test_release_keeps_the_place_and_the_attempt(store: Store) -> None:
    """A task whose attempt failed waits again before those that came after it."""
    first, _ = accept(store, "a", "b")
    store.claim(first.seq)
    released = store.release(first.seq)
    assert released is not None
    assert (released.state, released.attempt) == (TaskState.QUEUED, 1)
    (head,) = store.heads()
    assert (head.seq, head.count) == (first.seq, 2)


def test_what_was_turned_away_has_begun_all_the_same(store: Store) -> None:
    """Its attempt is forgiven and its runs are not, so that the numbers of its statuses go on rising."""
    (stored,) = accept(store, "a")
    for runs in (1, 2):
        store.claim(stored.seq)
        turned_away = store.release(stored.seq, counted=False)
        assert turned_away is not None
        assert (turned_away.attempt, turned_away.preempted, turned_away.runs) == (0, runs, runs)


def test_put_aside_keeps_the_text_and_forgives_the_attempt(store: Store, stores: Stores) -> None:
    """A task that made way for another keeps what it has written, over a restart, and no failed attempt is counted."""
    (stored,) = accept(store, "a")
    store.claim(stored.seq)
    aside = store.put_aside(stored.seq, partial="once upon", partial_tokens=2)
    assert aside is not None
    assert (aside.attempt, aside.preempted, aside.runs) == (0, 1, 1)
    again = stores.open().claim(stored.seq)
    assert again is not None
    assert (again.partial, again.partial_tokens) == ("once upon", 2)
    assert (again.attempt, again.preempted, again.runs) == (1, 1, 2)


@pytest.mark.parametrize("state", ["waiting", "finished", "unknown"])
def test_only_a_running_task_can_be_set_back(store: Store, state: str) -> None:
    """To set back what does not run changes nothing, neither counts nor records."""
    (stored,) = accept(store, "a")
    seq = stored.seq + (state == "unknown")
    if state == "finished":
        finish(store, stored)
    before = (found(store, "a"), store.heads(), store.depth())
    assert store.release(seq) is None
    assert store.put_aside(seq, partial="x", partial_tokens=1) is None
    assert (found(store, "a"), store.heads(), store.depth()) == before


def test_finish_is_once_and_for_all(store: Store) -> None:
    """The first terminal record stays; later ones are refused and change nothing."""
    (stored,) = accept(store, "a")
    store.claim(stored.seq)
    assert store.finish(stored.seq, a_result(stored.task, "first"))
    assert not store.finish(stored.seq, a_result(stored.task, "second"))
    result = found(store, "a").result
    assert result is not None
    assert result.text == "first"
    assert store.open_count() == 0
    assert not store.finish(999, a_result(stored.task))


def test_a_waiting_task_can_end_without_running(store: Store) -> None:
    """Cancelled or expired tasks leave the line at once."""
    first, second = accept(store, "a", "b")
    assert store.finish(first.seq, a_result(first.task, state=TaskState.CANCELLED))
    assert store.claim(first.seq) is None
    assert [head.seq for head in store.heads()] == [second.seq]


def test_exactly_one_of_many_threads_finishes(store: Store) -> None:
    """However many threads race to end a task, one wins, and its record is the one that is kept."""
    stored = accept(store, *(f"t{i}" for i in range(20)))
    start = threading.Barrier(4)
    wins: list[tuple[int, int]] = []

    def race(me: int) -> None:
        start.wait(5)
        wins.extend((one.seq, me) for one in stored if store.finish(one.seq, a_result(one.task, f"by {me}")))

    _run_together([partial(race, me) for me in range(4)])
    assert sorted(seq for seq, _ in wins) == [one.seq for one in stored]
    for seq, me in wins:
        (kept,) = [one for one in store.unsent(99) if one.seq == seq]
        assert kept.result is not None
        assert kept.result.text == f"by {me}"


def test_exactly_one_of_many_threads_claims(store: Store) -> None:
    """A task is claimed once, however many threads try, while others add and look."""
    stored = accept(store, *(f"t{i}" for i in range(20)))
    start = threading.Barrier(4)
    claims: list[int] = []

    def claim() -> None:
        start.wait(5)
        claims.extend(one.seq for one in stored if store.claim(one.seq))

    def add() -> None:
        start.wait(5)
        for i in range(10):
            accept(store, f"late{i}", model="late")
            store.heads(), store.depth(), store.unsent(5)

    _run_together([claim, claim, claim, add])
    assert sorted(claims) == [one.seq for one in stored]
    assert sum(head.count for head in store.heads()) == 10


def test_a_cancel_waits_for_the_claim_that_came_first(store: Store) -> None:
    """While one thread is in the middle of a commit, another waits for it and then sees its outcome."""
    (stored,) = accept(store, "a")
    entered, go_on = threading.Event(), threading.Event()

    def pause(statement: str) -> None:
        if statement.startswith("UPDATE tasks SET state = 'running'"):
            entered.set()
            go_on.wait(5)

    store._db.set_trace_callback(pause)
    claimed: list[Stored | None] = []
    seen: list[Stored | None] = []
    claimer = threading.Thread(target=lambda: claimed.append(store.claim(stored.seq)))
    looker = threading.Thread(target=lambda: seen.append(store.find("_", "a")))
    claimer.start()
    assert entered.wait(5)
    looker.start()
    assert seen == []  # not before the commit
    go_on.set()
    for thread in (claimer, looker):
        thread.join(5)
    assert seen == claimed
    assert claimed[0] is not None
    assert claimed[0].state is TaskState.RUNNING


def _run_together(jobs: Sequence[Callable[[], object]]) -> None:
    """Run all jobs in threads of their own, and raise what any of them raised."""
    errors: list[BaseException] = []

    def guarded(job: Callable[[], object]) -> None:
        try:
            job()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads)
    assert errors == []


# -- looking up


def test_find_open_finds_all_senders_in_order(store: Store) -> None:
    """A cancel by id alone meets every unfinished task of that id, and no finished one."""
    ended, _ = accept(store, "x", "y", src="one")
    second, third = [accept(store, "x", src=src)[0] for src in ("two", "three")]
    finish(store, ended)
    store.claim(third.seq)
    assert [stored.seq for stored in store.find_open("x")] == [second.seq, third.seq]
    assert store.find_open("nothing") == []
    assert store.find("one", "nothing") is None


def test_depth_names_every_priority(store: Store) -> None:
    """The depth has an entry for each priority, and counts only what waits."""
    first, _ = accept(store, "a", "b", priority=Priority.HIGH)
    accept(store, "c", priority=Priority.LOW)
    store.claim(first.seq)
    assert store.depth() == {Priority.URGENT: 0, Priority.HIGH: 1, Priority.NORMAL: 0, Priority.LOW: 1}
    assert store.open_count() == 3


# -- restart


def test_a_restart_keeps_the_order_and_counts_the_attempt(store: Store, stores: Stores) -> None:
    """After a restart all open tasks wait in their old order; what ran has its attempt counted."""
    first, second, third = accept(store, "a", "b", "c")
    store.claim(second.seq)
    finish(store, first)
    again = stores.open()
    assert found(again, "b").state is TaskState.QUEUED
    assert found(again, "b").attempt == 1
    (head,) = again.heads()
    assert (head.seq, head.count) == (second.seq, 2)
    assert waiting_ids(again) == ["b", "c"]
    assert third.seq > second.seq
    assert [stored.seq for stored in again.unsent(10)] == [first.seq]


def _life(path: Path, fact: Callable[[str], None], die: Callable[[str], None]) -> None:
    """Everything that a store is used for, each step told as a fact when it has returned."""
    store = Store(path, clock=FakeClock(), limits=Limits(retention_s=-1))
    store._db.set_trace_callback(die)
    a, b, c = accept(store, "a", "b", "c")
    fact("accepted a b c")
    store.claim(a.seq)
    fact("claimed a 1")
    store.finish(a.seq, a_result(a.task))
    fact("finished a")
    store.mark_sent(a.seq)
    store.mark_logged([a.seq])
    store.claim(b.seq)
    store.release(b.seq)
    store.claim(b.seq)
    fact("claimed b 2")
    store.put_aside(b.seq, partial="so far", partial_tokens=2)
    fact("put_aside b 1")
    store.prune()
    store.finish(c.seq, a_result(c.task, state=TaskState.CANCELLED))
    fact("finished c")
    store.learn("m", {"size_bytes": 1})
    accept(store, "d")
    fact("accepted d")
    store.close()


def _die_at_each_statement(directory: str) -> None:
    """Live the same life again and again in child processes; the n-th ends as if killed at its n-th statement."""
    for n in itertools.count(1):
        base = Path(directory) / f"life-{n}"
        pid = os.fork()
        if pid == 0:
            facts = os.open(f"{base}.facts", os.O_WRONLY | os.O_CREAT)
            left = iter(range(n - 1))

            def die(_statement: str, left: Iterator[int] = left) -> None:
                if next(left, None) is None:
                    os._exit(9)

            def fact(told: str, facts: int = facts) -> None:
                os.write(facts, f"{told}\n".encode())

            _life(Path(f"{base}.db"), fact, die)
            os._exit(0)
        if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0:
            return


def test_a_kill_at_any_statement_loses_nothing(tmp_path: Path) -> None:
    """Wherever the process dies, all that was told by then is there after a restart, and no more than once."""
    script = f"from tests.test_store import _die_at_each_statement as d; d({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT, timeout=60)
    lives = sorted(tmp_path.glob("life-*.facts"))
    assert len(lives) > 20
    for facts in lives:
        _check_life(facts.with_suffix(".db"), facts.read_text(encoding="ascii").splitlines())


def _check_life(path: Path, facts: Sequence[str]) -> None:
    stores = Stores(path, FakeClock())
    store = stores.open()
    finished: set[str] = set()
    for verb, task_id, *more in (fact.split() for fact in facts):
        stored = store.find("_", task_id)
        if stored is None:
            assert task_id == "a"  # it was finished, sent and logged, so that pruning could take it
            assert "put_aside b 1" in facts
            continue
        if verb == "finished":
            finished.add(task_id)
            assert stored.result is not None
        if verb == "claimed" and stored.preempted == 0:
            assert stored.attempt >= int(more[0])
        if verb == "put_aside":
            assert (stored.partial, stored.preempted) == ("so far", 1)
        if verb == "accepted" and stored.result is None:
            assert stored.state is TaskState.QUEUED
    accepted = {task_id for fact in facts for task_id in fact.split()[1:] if fact.startswith("accepted")}
    waiting = waiting_ids(store)
    assert waiting == sorted(set(waiting))
    assert accepted <= {*waiting, *finished, "a", "b", "c"}
    assert {stored.task.id for stored in store.unsent(9)} >= finished - {"a"}
    stores.close()


def test_sigkill_between_commits_loses_no_accepted_task(tmp_path: Path) -> None:
    """A process that is killed while it accepts tasks as fast as it can has lost none of those it told of."""
    script = (
        "from tests.test_store import *\n"
        f"store = Store(Path({str(tmp_path / 'queue.db')!r}), clock=FakeClock())\n"
        "for n in itertools.count():\n"
        "    accept(store, f'a{n}', f'b{n}')\n"
        "    print(n, flush=True)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        for _ in range(50):
            told = int(child.stdout.readline())
        child.send_signal(signal.SIGKILL)
        told = max([told, *(int(line) for line in child.stdout if line.endswith("\n"))])
    store = Store(tmp_path / "queue.db", clock=FakeClock())
    for n in range(told + 1):
        assert store.find("_", f"a{n}")
        assert store.find("_", f"b{n}")
    assert (store.find("_", f"a{told + 1}") is None) == (store.find("_", f"b{told + 1}") is None)
    assert sum(head.count for head in store.heads()) == store.open_count() >= 2 * told + 2
    store.close()


# -- time to live


def expired_ids(store: Store) -> list[str]:
    """The ids of the tasks that are over."""
    return [stored.task.id for stored in store.expired(9)]


def test_a_task_expires_when_its_time_is_over(store: Store, clock: FakeClock) -> None:
    """A waiting task is over exactly when its time to live has passed, and stays so until it is finished."""
    (short, long) = (accept(store, "short", ttl_s=10)[0], accept(store, "long", ttl_s=20)[0])
    assert store.next_expiry() == clock.monotonic() + 10
    clock.advance(9.9)
    assert expired_ids(store) == []
    clock.advance(0.1)
    assert expired_ids(store) == ["short"]
    assert expired_ids(store) == ["short"]
    store.finish(short.seq, a_result(short.task, state=TaskState.EXPIRED))
    assert expired_ids(store) == []
    assert store.next_expiry() == long.accepted_at + 20


def test_expired_tasks_come_in_portions(store: Store, clock: FakeClock) -> None:
    """They come by number and by size: to finish a portion is one commit, and not a large one."""
    accept(store, *(f"t{n}" for n in range(15)), prompt="x" * 600_000, ttl_s=10)
    clock.advance(10)
    assert [len(store.expired(3)), len(store.expired(99))] == [3, 7]
    left = 15
    while due := store.expired(99):
        left -= len(store.finish_many({it.seq: a_result(it.task, state=TaskState.EXPIRED) for it in due}))
    assert (left, store.open_count(), store.unsent_count()) == (0, 0, 15)
    assert store.finish_many({1: a_result(found(store, "t0").task)}) == []


def test_a_running_task_does_not_expire(store: Store, clock: FakeClock) -> None:
    """Time to live is about waiting: a running task is let finish, and one set back is looked at again."""
    (stored,) = accept(store, "a", ttl_s=10)
    store.claim(stored.seq)
    clock.advance(50)
    assert (expired_ids(store), store.next_expiry()) == ([], None)
    store.release(stored.seq)
    assert expired_ids(store) == ["a"]


def test_time_goes_on_through_a_restart_in_one_boot(store: Store, stores: Stores, clock: FakeClock) -> None:
    """The monotonic clock outlives the process, and so does the age of a task."""
    accept(store, "a", ttl_s=10)
    clock.advance(6)
    again = stores.open()
    assert expired_ids(again) == []
    clock.advance(4)
    assert expired_ids(again) == ["a"]


@pytest.mark.parametrize("step_s", [-50 * YEAR_S, 50 * YEAR_S])
def test_a_step_of_the_wall_clock_changes_nothing(
    store: Store, stores: Stores, clock: FakeClock, step_s: float
) -> None:
    """A wall clock that jumps by years neither ends a task nor gives it time, through a restart too."""
    accept(store, "a", ttl_s=10)
    clock.advance(6)
    clock.step_wall(step_s)
    assert expired_ids(store) == []
    again = stores.open()
    assert expired_ids(again) == []
    assert again.next_expiry() == clock.monotonic() + 4


@pytest.mark.parametrize(("off_s", "over"), [(50.0, False), (5_000.0, True)])
def test_time_off_counts_when_the_clock_is_right(
    store: Store, stores: Stores, clock: FakeClock, *, off_s: float, over: bool
) -> None:
    """Over a reboot with a right clock, the time without power counts into the time to live."""
    accept(store, "a", ttl_s=100, received_at=clock.wall())
    clock.reboot(off_s=off_s)
    again = stores.open()
    assert expired_ids(again) == (["a"] if over else [])
    assert again.next_expiry() == clock.monotonic() + 100 - off_s


def test_a_clock_that_was_set_back_gives_no_time(store: Store, stores: Stores, clock: FakeClock) -> None:
    """Over a reboot to an earlier wall time, a task keeps the age that it is known to have."""
    accept(store, "a", ttl_s=100, received_at=clock.wall())
    clock.advance(30)
    accept(store, "witness", ttl_s=1_000, received_at=clock.wall())
    clock.reboot(off_s=-3_600)
    again = stores.open()
    assert expired_ids(again) == []
    assert again.next_expiry() == clock.monotonic() + 70


def test_time_off_does_not_count_before_the_clock_is_right(store: Store, stores: Stores, clock: FakeClock) -> None:
    """Over a reboot without a right clock a task keeps the time it had left, until the clock is set."""
    accept(store, "a", ttl_s=100, received_at=clock.wall())
    clock.advance(30)
    accept(store, "witness", ttl_s=1_000, received_at=clock.wall())  # shows that the machine was on for 30 s
    clock.reboot(off_s=5_000)
    clock.is_synced = False
    clock.step_wall(-50 * YEAR_S)
    again = stores.open()
    assert expired_ids(again) == []
    assert again.next_expiry() == clock.monotonic() + 70
    clock.advance(60)
    assert expired_ids(again) == []
    clock.step_wall(50 * YEAR_S)
    clock.is_synced = True
    assert expired_ids(again) == ["a", "witness"]


def test_time_off_is_not_forgotten_by_a_restart(store: Store, stores: Stores, clock: FakeClock) -> None:
    """A daemon that starts twice before the clock is right still counts the time off once it is."""
    accept(store, "a", ttl_s=100, received_at=clock.wall())
    clock.reboot(off_s=5_000)
    clock.is_synced = False
    stores.open()
    again = stores.open()
    assert expired_ids(again) == []
    clock.is_synced = True
    assert expired_ids(again) == ["a"]


def test_time_off_counts_through_two_reboots(store: Store, stores: Stores, clock: FakeClock) -> None:
    """Several reboots add up, and time that the machine was on counts once."""
    accept(store, "a", ttl_s=1_000, received_at=clock.wall())
    for boot_id in ("boot-2", "boot-3"):
        clock.advance(10)
        clock.reboot(off_s=100, boot_id=boot_id)
        again = stores.open()
        assert expired_ids(again) == []
    assert again.next_expiry() == clock.monotonic() + 1_000 - 220


def test_time_off_is_counted_in_portions(store: Store, stores: Stores, clock: FakeClock) -> None:
    """After a long time off, thousands of tasks are counted and ended by many small commits, none is overlooked."""
    accept(store, *(f"t{n}" for n in range(22)), ttl_s=100, received_at=clock.wall())
    accept(store, "large", prompt="x" * 5_000_000, ttl_s=100, received_at=clock.wall())
    stores.close()
    clock.reboot(off_s=5_000)
    again = stores.open()
    statements: list[str] = []
    again._db.set_trace_callback(lambda statement: statements.append(statement.split(" = ")[0]))
    ended = 0
    while (at := again.next_expiry()) is not None and at <= clock.monotonic():
        due = again.expired(5)
        ended += len(again.finish_many({it.seq: a_result(it.task, state=TaskState.EXPIRED) for it in due}))
    commits = " ".join(statements).split("COMMIT")
    assert max(commit.count("UPDATE tasks SET accepted_at") for commit in commits) == 5
    assert (ended, again.open_count()) == (23, 0)


def test_time_off_that_was_counted_stays_so(store: Store, stores: Stores, clock: FakeClock) -> None:
    """What was counted in one boot is known in the next, before the clock is right again."""
    accept(store, "a", ttl_s=10_000, received_at=clock.wall())
    clock.reboot(off_s=5_000)
    assert expired_ids(stores.open()) == []
    clock.reboot(off_s=100, boot_id="boot-3")
    clock.is_synced = False
    assert stores.open().next_expiry() == clock.monotonic() + 5_000


def test_a_reboot_writes_no_row_anew(stores: Stores, clock: FakeClock) -> None:
    """However much the file holds, a start in a new boot writes a few pages."""
    store = stores.open()
    accept(store, *(f"t{n}" for n in range(50)), prompt="x" * 20_000)
    finish(store, found(store, "t7"))
    for boot_id in ("boot-2", "boot-3"):
        stores.close()
        clock.reboot(boot_id=boot_id)
        assert stores.open().open_count() == 49
        assert log_bytes(stores.path) < 50_000


@pytest.mark.parametrize(
    "damage", ["DELETE FROM boot", "UPDATE boot SET began_at = 'x'", "UPDATE boot SET began_at = 9e999"]
)
@pytest.mark.parametrize("boot_id", ["boot-1", "boot-2"])
def test_a_damaged_boot(store: Store, stores: Stores, clock: FakeClock, damage: str, boot_id: str) -> None:
    """Where it is not known when this boot began, tasks go on from the age at which they were last seen."""
    accept(store, "a", ttl_s=100)
    clock.advance(30)
    accept(store, "witness", ttl_s=1_000)
    store._db.execute(damage)
    stores.close()
    clock.reboot(boot_id=boot_id)
    clock.is_synced = False
    again = stores.open()
    assert again.next_expiry() == clock.monotonic() + 70
    clock.advance(10)
    assert stores.open().next_expiry() == clock.monotonic() + 60


def test_a_task_accepted_at_a_wrong_time_keeps_its_time(store: Store, stores: Stores, clock: FakeClock) -> None:
    """What was accepted while the clock was wrong is not judged by a later right one."""
    clock.is_synced = False
    clock.step_wall(-50 * YEAR_S)
    accept(store, "a", ttl_s=100, received_at=clock.wall())
    clock.reboot(off_s=10)
    clock.step_wall(50 * YEAR_S)
    clock.is_synced = True
    again = stores.open()
    assert expired_ids(again) == []
    assert again.next_expiry() == clock.monotonic() + 100


def test_a_running_task_is_aged_by_time_off_too(store: Store, stores: Stores, clock: FakeClock) -> None:
    """Time off that is counted while the task runs is there when it is set back."""
    (stored,) = accept(store, "a", ttl_s=100, received_at=clock.wall())
    clock.reboot(off_s=5_000)
    clock.is_synced = False
    again = stores.open()
    again.claim(stored.seq)
    clock.is_synced = True
    assert expired_ids(again) == []
    again.release(stored.seq)
    assert expired_ids(again) == ["a"]


# -- outbox, log, learnt


def test_outbox_is_oldest_first_limited_and_skips(store: Store) -> None:
    """Results go out in the order of acceptance, a window at a time, without those on their way."""
    stored = accept(store, "a", "b", "c", "d")
    for one in reversed(stored):
        finish(store, one)
    seqs = [one.seq for one in stored]
    assert [one.seq for one in store.unsent(2)] == seqs[:2]
    assert [one.seq for one in store.unsent(2, skip=seqs[:1])] == seqs[1:3]
    store.mark_sent(seqs[1])
    assert [one.seq for one in store.unsent(9, skip=[seqs[0]])] == seqs[2:]
    assert store.unsent_count() == 3


def test_the_outbox_reads_only_what_it_gives(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many results are marked as sent and not flushed, only those that are given out are read in whole."""
    stored = accept(store, *(f"t{number}" for number in range(50)))
    store.finish_many({one.seq: a_result(one.task) for one in stored})
    for one in stored[:40]:
        store.mark_sent(one.seq)
    read: list[int] = []

    def reading(row: tuple[Any, ...], began_at: float) -> Stored:
        read.append(row[0])
        return _stored_from_row(row, began_at)

    monkeypatch.setattr("edge_daemon.store._stored_from_row", reading)
    assert [one.seq for one in store.unsent(3, skip=[stored[40].seq])] == read == [one.seq for one in stored[41:44]]


def test_unsent_count_is_right_whatever_is_marked(store: Store) -> None:
    """Marks that are repeated, or of tasks that are not there, do not distort the count."""
    first, second = accept(store, "a", "b")
    finish(store, first)
    store.mark_sent(first.seq)
    store.flush()
    for seq in (first.seq, second.seq, 999):
        store.mark_sent(seq)
    assert store.unsent_count() == 0
    store.mark_acked([first.seq])
    finish(store, second)  # its mark was written before it had a result
    assert store.unsent_count() == len(store.unsent(9))


def test_marks_ride_on_the_next_commit(store: Store, stores: Stores) -> None:
    """A mark costs no fsync of its own: it is on the disk with the next commit, whatever that is for."""
    first, second = accept(store, "a", "b")
    finish(store, first)
    changes: list[str] = []
    store._db.set_trace_callback(changes.append)
    store.mark_sent(first.seq)
    store.mark_logged([first.seq])
    store.learn("m", {"load_s": 2.5})
    assert changes == []
    store.claim(second.seq)
    assert [statement for statement in changes if statement == "COMMIT"] == ["COMMIT"]
    assert _on_disk(stores.path, "SELECT sent, logged FROM tasks WHERE id = 'a'") == [(1, 1)]
    assert store.learnt() == {"m": {"load_s": 2.5}}
    store.flush()
    assert changes.count("COMMIT") == 1  # there was nothing left to commit


def _on_disk(path: Path, query: str) -> list[Any]:
    """What the file of an open store holds, as a copy of it tells."""
    copy = path.with_name("copy.db")
    for suffix in ("", "-wal"):
        source = path.with_name(path.name + suffix)
        if source.exists():
            copy.with_name(copy.name + suffix).write_bytes(source.read_bytes())
    db = sqlite3.connect(copy)
    rows = db.execute(query).fetchall()
    db.close()
    for suffix in ("", "-wal", "-shm"):
        copy.with_name(copy.name + suffix).unlink(missing_ok=True)
    return rows


def test_lost_marks_cost_only_a_repetition(store: Store, stores: Stores, tmp_path: Path) -> None:
    """Marks that a kill has eaten have results sent and rows looked for once more, nothing else."""
    (stored,) = accept(store, "a")
    finish(store, stored)
    store.mark_sent(stored.seq)
    store.mark_logged([stored.seq])
    rows = _on_disk(stores.path, "SELECT sent, logged, state FROM tasks")
    assert rows == [(0, 0, "succeeded")]
    assert (store.unsent(9), store.unlogged()) == ([], [])


def test_a_failed_commit_keeps_the_marks(stores: Stores) -> None:
    """Marks that rode on a commit that failed ride on the next one."""
    store = stores.open()
    first, second = accept(store, "a", "b")
    finish(store, first)
    store.mark_sent(first.seq)
    with pytest.raises(UnicodeEncodeError):
        store.add_many([submission("bad", prompt="\ud800")])
    store.claim(second.seq)
    assert stores.open().unsent(9) == []


def test_what_is_set_aside_may_be_offered_again(store: Store, stores: Stores) -> None:
    """A result that cannot be delivered leaves the outbox and is still found; another start may offer it once more."""
    (stored,) = accept(store, "a")
    finish(store, stored)
    store.set_aside(stored.seq)
    assert (store.unsent(9), store.unsent_count()) == ([], 0)
    again = stores.open()
    assert again.unsent(9) == []
    assert found(again, "a").result is not None
    assert (again.offer_again(), again.offer_again()) == (1, 0)
    assert [it.seq for it in again.unsent(9)] == [stored.seq]


def test_a_damaged_row_is_not_offered_again(store: Store) -> None:
    """A row that was taken out because it cannot be read stays out."""
    (stored,) = accept(store, "a")
    finish(store, stored)
    store._db.execute("UPDATE tasks SET result = 'no JSON'")
    assert store.unsent(9) == []
    assert store.offer_again() == 0


def test_unlogged_tells_what_the_log_may_lack(store: Store, stores: Stores) -> None:
    """Finished tasks without a row are told in order until they are marked, also after a restart."""
    first, second, _ = accept(store, "a", "b", "open")
    finish(store, second)
    finish(store, first)
    assert store.unlogged() == [first.seq, second.seq]
    store.mark_logged([first.seq])
    assert store.unlogged() == [second.seq]
    assert stores.open().unlogged() == [second.seq]


def test_learnt_is_replaced_and_kept(store: Store, stores: Stores) -> None:
    """What was learnt of a model last is there after an orderly restart."""
    store.learn("m", {"size_bytes": 1})
    store.learn("m", {"size_bytes": 2, "by_type": {"q": 1.5}})
    store.learn("other", {})
    assert stores.open().learnt() == {"m": {"size_bytes": 2, "by_type": {"q": 1.5}}, "other": {}}


# -- retention


def test_prune_deletes_only_what_is_over(stores: Stores, clock: FakeClock) -> None:
    """Only tasks that are sent or set aside, logged and older than the retention go; the newest row always stays."""
    store = stores.open(retention_s=100)
    ids = ("sent", "aside", "unsent", "unlogged", "open", "young", "newest")
    by_id = {one.task.id: one for one in accept(store, *ids)}
    for task_id in ("sent", "aside", "unsent", "unlogged", "newest"):
        finish(store, by_id[task_id])
    store.set_aside(by_id["aside"].seq)
    for task_id in ("sent", "unlogged", "newest"):
        store.mark_sent(by_id[task_id].seq)
    store.mark_logged(by_id[task_id].seq for task_id in ("sent", "aside", "unsent", "newest"))
    store.flush()
    assert store.prune() == 0
    clock.advance(101)
    finish(store, by_id["young"])
    store.mark_sent(by_id["young"].seq)
    store.mark_logged([by_id["young"].seq])
    store.flush()
    assert store.prune() == 2
    assert [task_id for task_id in ids if store.find("_", task_id) is None] == ["sent", "aside"]
    assert store.prune() == 0


def test_retention_goes_on_over_boots(stores: Stores, clock: FakeClock) -> None:
    """A finished task keeps the age at which it was last seen, in each new boot."""
    for boot_id in ("boot-1", "boot-2", "boot-3"):
        clock.reboot(boot_id=boot_id)
        store = stores.open(retention_s=100)
        if boot_id == "boot-1":
            ended, _ = accept(store, "a", "b")
            finish(store, ended)
            store.mark_sent(ended.seq)
            store.mark_logged([ended.seq])
        clock.advance(30)
        assert store.prune() == 0
        accept(store, f"witness of {boot_id}")
    clock.advance(11)
    assert stores.open(retention_s=100).prune() == 1


def test_a_seq_is_never_given_twice(stores: Stores, clock: FakeClock) -> None:
    """However much is pruned, and over restarts, every new task has a higher seq than all before it."""
    highest = 0
    for round_ in range(4):
        store = stores.open(retention_s=10)
        for stored in accept(store, *(f"{round_}-{i}" for i in range(3))):
            assert stored.seq > highest
            highest = stored.seq
            finish(store, stored)
            store.mark_sent(stored.seq)
            store.mark_logged([stored.seq])
        store.flush()
        clock.advance(100)
        assert store.prune() >= 2
    assert store.prune() == 0


# -- order and counts, against a naive model


@dataclass
class Naive:
    """What the store should hold, kept in the simplest way."""

    tasks: dict[int, Task] = field(default_factory=dict)
    accepted_at: dict[int, float] = field(default_factory=dict)
    state: dict[int, str] = field(default_factory=dict)
    attempts: dict[int, int] = field(default_factory=dict)
    sent: set[int] = field(default_factory=set)

    ended: list[int] = field(default_factory=list)

    def _seqs(self, state: str) -> list[int]:
        return sorted(seq for seq, its in self.state.items() if its == state)

    def _end(self, seq: int) -> None:
        del self.state[seq]
        bisect.insort(self.ended, seq)

    def _classes(self) -> dict[tuple[str, Priority, int], list[int]]:
        grouped: dict[tuple[str, Priority, int], list[int]] = {}
        for seq in self._seqs("queued"):
            task = self.tasks[seq]
            size = (task.prompt_tokens // 8 + task.max_tokens).bit_length()
            grouped.setdefault((task.model, task.priority, size), []).append(seq)
        return grouped


def _head_key(head: Waiting) -> tuple[str, Priority, int]:
    return (head.model, head.priority, (head.prompt_tokens // 8 + head.max_tokens).bit_length())


class Walk:
    """A long random walk over everything that can be done to a store."""

    def __init__(self, stores: Stores, clock: FakeClock, seed: int) -> None:
        self.random = random.Random(seed)  # noqa: S311
        self.stores = stores
        self.clock = clock
        self.naive = Naive()
        self.ids = itertools.count()
        self._reopen()

    def _reopen(self) -> None:
        self.store = self.stores.open(max_tasks=60, urgent_reserve=0)
        for seq in self.naive._seqs("running"):
            self.naive.state[seq] = "queued"

    def _add(self) -> None:
        chance = self.random.choice
        batch = [
            submission(
                f"t{next(self.ids)}",
                model=chance(["m", "n"]),
                priority=chance(list(Priority)),
                prompt_tokens=chance([1, 100, 1_000]),
                max_tokens=chance([10, 500]),
                ttl_s=chance([5.0, 50.0, 5_000.0]),
            )
            for _ in range(self.random.randint(1, 4))
        ]
        for one, added in zip(batch, self.store.add_many(batch), strict=True):
            room = len(self.naive._seqs("queued")) + len(self.naive._seqs("running")) < 60
            assert added.outcome == ("new" if room else "full")
            if added.stored:
                seq = added.stored.seq
                self.naive.tasks[seq], self.naive.state[seq] = one.task, "queued"
                self.naive.accepted_at[seq], self.naive.attempts[seq] = self.clock.monotonic(), 0
                before = [
                    s for s in self.naive._seqs("queued") if self.naive.tasks[s].priority.rank <= one.task.priority.rank
                ]
                assert added.position == len(before)

    def _some(self, state: str) -> int | None:
        seqs = self.naive.ended if state == "ended" else self.naive._seqs(state)
        return self.random.choice(seqs) if seqs else None

    def _claim(self) -> None:
        if (seq := self._some("queued")) is not None:
            claimed = self.store.claim(seq)
            self.naive.state[seq] = "running"
            self.naive.attempts[seq] += 1
            assert claimed is not None
            assert claimed.attempt == self.naive.attempts[seq]

    def _set_back(self) -> None:
        if (seq := self._some("running")) is not None:
            if self.random.random() < 0.5:
                assert self.store.release(seq)
            else:
                assert self.store.put_aside(seq, partial="p", partial_tokens=1)
                self.naive.attempts[seq] -= 1
            self.naive.state[seq] = "queued"

    def _finish(self) -> None:
        seq = self._some(self.random.choice(["running", "running", "queued", "ended"]))
        if seq is not None:
            assert self.store.finish(seq, a_result(self.naive.tasks[seq])) == (seq in self.naive.state)
            if seq in self.naive.state:
                self.naive._end(seq)

    def _send(self) -> None:
        if (seq := self._some("ended")) is not None:
            self.store.mark_sent(seq)
            self.naive.sent.add(seq)

    def _pass_time(self) -> None:
        self.clock.advance(self.random.choice([0.5, 3.0, 20.0]))
        over = [
            seq
            for seq in self.naive._seqs("queued")
            if self.naive.accepted_at[seq] + self.naive.tasks[seq].ttl_s <= self.clock.monotonic()
        ]
        assert [stored.seq for stored in self.store.expired(len(over) + 1)] == over
        for seq in over:
            self.store.finish(seq, a_result(self.naive.tasks[seq], state=TaskState.EXPIRED))
            self.naive._end(seq)

    def _check(self) -> None:
        naive, store = self.naive, self.store
        heads = {_head_key(head): (head.seq, head.count) for head in store.heads()}
        assert heads == {key: (seqs[0], len(seqs)) for key, seqs in naive._classes().items()}
        queued = naive._seqs("queued")
        expiries = [naive.accepted_at[seq] + naive.tasks[seq].ttl_s for seq in queued]
        assert store.next_expiry() == min(expiries, default=None)
        assert sum(store.depth().values()) == len(queued)
        assert store.open_count() == len(queued) + len(naive._seqs("running"))
        unsent = [seq for seq in naive.ended if seq not in naive.sent]
        assert store.unsent_count() == len(unsent)
        assert [stored.seq for stored in store.unsent(3)] == unsent[:3]

    def go(self, steps: int) -> None:
        """Walk, and look at everything after each step."""
        doing = (
            [self._add] * 6
            + [self._claim] * 8
            + [self._set_back] * 3
            + [self._finish] * 4
            + [self._send, self._pass_time]
        )
        for step in range(steps):
            self.random.choice(doing)()
            if step % 97 == 96:
                self._reopen()
            self._check()


def test_any_sequence_keeps_order_and_counts(stores: Stores, clock: FakeClock) -> None:
    """Over 2,500 random steps with restarts, heads, counts, positions, expiry and outbox equal a naive model's."""
    Walk(stores, clock, seed=1).go(2_500)


def test_the_index_in_memory_forgets(store: Store) -> None:
    """What the index remembers of tasks that no longer wait is bounded by those that do."""
    (always,) = accept(store, "always")
    for n in range(5 * SLACK):
        (stored,) = accept(store, f"t{n}")
        store.finish(stored.seq, a_result(stored.task, state=TaskState.CANCELLED))
    index = store._ready
    assert sum(map(len, index._heaps.values())) <= 2 + SLACK + 1
    assert len(index._expiries) <= 2 + SLACK + 1
    assert [head.seq for head in store.heads()] == [always.seq]
    assert store.next_expiry() == always.accepted_at + DAY_S


# -- query plans


def test_no_statement_reads_the_whole_table(store: Store, clock: FakeClock) -> None:
    """Every statement of daily work finds its rows by an index, so that a full queue costs what an empty one does."""
    seen: list[str] = []
    store._db.set_trace_callback(seen.append)
    first, second, third = accept(store, "a", "b", "c")
    store.add_many([submission("d", own_id=False, redelivered=True), submission("a", reply_to="reply/x")])
    store.claim(first.seq)
    store.release(first.seq)
    store.claim(first.seq)
    store.put_aside(first.seq, partial="", partial_tokens=0)
    finish(store, second)
    finish(store, third)
    store.add_many([submission("b")])
    store.mark_sent(second.seq)
    store.mark_logged([second.seq])
    store.mark_acked([second.seq])
    store.set_aside(third.seq)
    store.unsent(10)
    store.unsent_count()
    store.unlogged()
    store.find_open("a")
    store.unacked()
    clock.advance(2 * DAY_S)
    store.expired(9)
    store.prune()
    clock.advance(YEAR_S)
    store.prune()
    store._db.set_trace_callback(None)
    statements = {text for text in seen if text.startswith(("SELECT", "UPDATE", "DELETE")) and "learnt" not in text}
    assert len(statements) >= 20
    plans = ""
    for text in statements:
        steps = [detail for *_, detail in store._db.execute(f"EXPLAIN QUERY PLAN {text}")]
        plans += "\n".join(steps)
        for step in steps:
            partial_index = "SCAN tasks USING" in step and any(
                name in step for name in ("tasks_open", "tasks_unsent", "tasks_unlogged", "tasks_unacked")
            )
            assert partial_index or not step.startswith("SCAN tasks"), (text, step)
            assert "TEMP B-TREE" not in step, (text, step)
    for index in ("tasks_by_key", "tasks_open", "tasks_unsent", "tasks_unlogged", "tasks_unacked", "tasks_finished"):
        assert index in plans


# -- damage


def _some_tasks(stores: Stores) -> None:
    """A file with open, finished and running tasks, closed in good order."""
    store = stores.open()
    stored = accept(store, *(f"t{i}" for i in range(40)), prompt="x" * 400)
    for one in stored[:10]:
        finish(store, one)
    store.claim(stored[20].seq)
    store.learn("m", {"size_bytes": 5})
    stores.close()


def _damage_header(data: bytes) -> bytes:
    return bytes(100) + data[100:]


def _garbage(data: bytes) -> bytes:
    return random.Random(1).randbytes(len(data))  # noqa: S311


def _all_zero(data: bytes) -> bytes:
    return bytes(len(data))


def _cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def _zero_middle(data: bytes) -> bytes:
    third = len(data) // 3
    return data[:third] + bytes(third) + data[2 * third :]


def _text_file(_data: bytes) -> bytes:
    return b"this is no database\n" * 100


@pytest.mark.parametrize("damage", [_damage_header, _garbage, _all_zero, _cut, _zero_middle, _text_file])
def test_a_damaged_file_is_set_aside(
    stores: Stores, caplog: pytest.LogCaptureFixture, damage: Callable[[bytes], bytes]
) -> None:
    """A file that is no sound database is moved away as it is, with a word in the log, and a new one begun."""
    _some_tasks(stores)
    broken = damage(stores.path.read_bytes())
    stores.path.write_bytes(broken)
    store = stores.open()
    aside = stores.path.with_name("queue.db.corrupt-1")
    assert aside.read_bytes() == broken
    assert str(aside) in caplog.text
    assert store.damage is not None
    assert store.damage.saved >= store.open_count()
    accept(store, "a")
    assert waiting_ids(stores.open())[-1] == "a"


def test_each_damaged_file_gets_its_own_name(stores: Stores) -> None:
    """A second damaged file does not overwrite the first."""
    for text in (b"first" * 200, b"second" * 200):
        stores.close()
        stores.path.write_bytes(text)
        stores.open()
    names = sorted(path.name for path in stores.path.parent.glob("*.corrupt-?"))
    assert names == ["queue.db.corrupt-1", "queue.db.corrupt-2"]
    assert stores.path.with_name(names[1]).read_bytes() == b"second" * 200


def test_any_damage_lets_the_store_start(stores: Stores) -> None:
    """Whatever bytes are overwritten, the store opens and takes tasks, with the old ones or without."""
    _some_tasks(stores)
    good = stores.path.read_bytes()
    dice = random.Random(7)  # noqa: S311
    kept = 0
    for _ in range(60):
        stores.close()
        for leftover in stores.path.parent.glob("queue.db*"):
            leftover.unlink()
        broken = bytearray(good)
        for _ in range(dice.randint(1, 4)):
            length = dice.choice([1, 1, 4, 64, 512])
            at = dice.randrange(100, len(broken) - length)
            broken[at : at + length] = dice.choice([dice.randbytes(length), bytes(length)])
        stores.path.write_bytes(broken)
        store = stores.open()
        accept(store, "fresh")
        for stored in (*store.unsent(99), *filter(None, map(store.get, store.unlogged()))):
            assert stored.result is not None
        kept += len(waiting_ids(store)) > 1
        store.find("_", "t3")
    assert kept  # small damage costs what it hit, not everything


@pytest.mark.parametrize("column", ["task", "state", "result"])
@pytest.mark.parametrize("junk", ["'{'", "CAST(x'80ff' AS TEXT)", "'[]'", f"'{'[' * 99_999}{']' * 99_999}'"])
def test_an_unreadable_row_harms_no_other(stores: Stores, column: str, junk: str) -> None:
    """A task that the disk has made unreadable is given up with a word in the log; all others are served."""
    store = stores.open()
    ended, _, _ = accept(store, "a", "b", "c")
    finish(store, ended)
    stores.close()
    victim = "a" if column == "result" else "b"
    db = sqlite3.connect(stores.path)
    db.execute(f"UPDATE tasks SET {column} = {junk} WHERE id = '{victim}'")  # noqa: S608
    db.commit()
    db.close()
    again = stores.open()
    assert [stored.task.id for stored in again.unsent(9)] == ([] if victim == "a" else ["a"])
    assert again.unlogged() == ([] if victim == "a" else [ended.seq])
    assert again.find("_", victim) is None
    assert waiting_ids(again) == (["b", "c"] if victim == "a" else ["c"])
    assert outcomes(again.add_many([submission(victim)])) == ["new"]  # its sender may try again


def test_a_number_that_none_is(stores: Stores) -> None:
    """An infinite number of attempts makes a row unreadable too."""
    store = stores.open()
    accept(store, "a", "b")
    store._db.execute("UPDATE tasks SET attempt = 9e999 WHERE id = 'a'")
    assert waiting_ids(stores.open()) == ["b"]


def test_a_row_that_becomes_unreadable_while_it_waits(store: Store, clock: FakeClock) -> None:
    """It leaves all queues at once: nothing asks for it again and again."""
    accept(store, "a", ttl_s=10)
    store._db.execute("UPDATE tasks SET task = '{'")
    clock.advance(10)
    assert store.expired(9) == []
    assert (store.heads(), store.next_expiry(), store.open_count()) == ((), None, 0)


def test_a_damaged_index_is_made_anew(stores: Stores, caplog: pytest.LogCaptureFixture) -> None:
    """An index that belies its table costs no task: it is derived, and built again."""
    _some_tasks(stores)
    db = sqlite3.connect(stores.path)
    (root,) = db.execute("SELECT rootpage FROM sqlite_master WHERE name = 'tasks_unsent'").fetchone()
    (page_bytes,) = db.execute("PRAGMA page_size").fetchone()
    db.close()
    data = bytearray(stores.path.read_bytes())
    at = root * page_bytes - 1
    data[at] ^= 0xFF  # the seq of the oldest unsent result
    stores.path.write_bytes(data)
    store = stores.open()
    assert [stored.task.id for stored in store.unsent(99)] == [f"t{i}" for i in range(10)]
    assert len(waiting_ids(store)) == 30
    assert list(stores.path.parent.glob("*corrupt*")) == []


@pytest.mark.parametrize("change", ["DROP TABLE learnt", "ALTER TABLE tasks RENAME COLUMN sent TO s3nt"])
def test_a_sound_file_with_other_tables_is_set_aside(stores: Stores, change: str) -> None:
    """A database of our version that lacks what we made is damaged too, and must not stop the daemon."""
    _some_tasks(stores)
    db = sqlite3.connect(stores.path)
    db.execute(change)
    db.close()
    accept(stores.open(), "a")
    assert stores.path.with_name("queue.db.corrupt-1").exists()


def test_what_was_learnt_may_be_damaged(stores: Stores) -> None:
    """Facts that cannot be read are forgotten, since they will be learnt anew."""
    store = stores.open()
    store.learn("m", {"size_bytes": 1})
    store.learn("n", {"size_bytes": 2})
    stores.close()
    db = sqlite3.connect(stores.path)
    db.execute("UPDATE learnt SET facts = '{' WHERE model = 'm'")
    db.commit()
    db.close()
    assert stores.open().learnt() == {"n": {"size_bytes": 2}}


def test_a_later_version_is_left_untouched(stores: Stores) -> None:
    """A file that a later version has written is refused, and not a byte of it changes."""
    _some_tasks(stores)
    db = sqlite3.connect(stores.path)
    db.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    db.close()
    before = stores.path.read_bytes()
    with pytest.raises(StoreTooNew, match="later version"):
        stores.open()
    assert stores.path.read_bytes() == before
    assert list(stores.path.parent.glob("*corrupt*")) == []


def test_a_path_that_cannot_be_opened_is_a_store_error(tmp_path: Path, clock: FakeClock) -> None:
    """A directory that is not there is an error of the store, not of the library beneath it."""
    with pytest.raises(StoreError, match="no-such"):
        Store(tmp_path / "no-such" / "queue.db", clock=clock)


def test_a_closed_store_raises_store_errors(store: Store) -> None:
    """After the end, every call says so in our own words."""
    (stored,) = accept(store, "a")
    store.close()
    for call in (
        lambda: store.claim(stored.seq),
        lambda: store.finish(stored.seq, a_result(stored.task)),
        lambda: store.find("_", "a"),
        lambda: store.unsent(1),
        store.unsent_count,
        store.prune,
        store.learnt,
        lambda: store.add_many([submission("b")]),
    ):
        with pytest.raises(StoreError):
            call()
    store.close()  # once more does no harm


# -- a full disk


def _fill(store: Store) -> None:
    """Let the file grow no further."""
    (pages,) = store._db.execute("PRAGMA page_count").fetchone()
    store._db.execute(f"PRAGMA max_page_count = {pages}")


def test_a_full_disk_changes_nothing_and_passes(store: Store, stores: Stores) -> None:
    """While there is no room, tasks are refused as a whole and all else stays; with room again, it goes on."""
    first, second = accept(store, "a", "b")
    _fill(store)
    big = [submission(f"big{i}", prompt="x" * 20_000) for i in range(3)]
    for _ in range(2):
        with pytest.raises(StorageFull):
            store.add_many([submission("small"), *big])
        assert (store.open_count(), sum(head.count for head in store.heads())) == (2, 2)
        assert store.find("_", "small") is None
    store.claim(first.seq)
    with pytest.raises(StorageFull):
        store.finish(first.seq, a_result(first.task, "y" * 50_000))
    assert found(store, "a").state is TaskState.RUNNING
    assert store.open_count() == 2
    store._db.execute("PRAGMA max_page_count = 1000000")
    assert store.finish(first.seq, a_result(first.task, "y" * 50_000))
    assert outcomes(store.add_many(big)) == ["new"] * 3
    assert waiting_ids(stores.open()) == ["b", "big0", "big1", "big2"]
    assert second.seq > first.seq


def test_a_full_file_system_is_storage_full(tmp_path: Path, clock: FakeClock) -> None:
    """A file system without room is told as such, what was accepted before survives, and with room it goes on."""
    mount = tmp_path / "small"
    mount.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(mount)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system takes root")
    try:
        stores = Stores(mount / "queue.db", clock)
        store = stores.open()
        kept = 0
        with contextlib.suppress(StorageFull):
            while kept < 100:
                accept(store, f"t{kept}", prompt="x" * 8_000)
                kept += 1
        assert 0 < kept < 100
        assert store.open_count() == kept
        subprocess.run(["mount", "-o", "remount,size=4m", str(mount)], check=True)
        accept(store, "more", prompt="x" * 8_000)
        assert waiting_ids(stores.open()) == [*(f"t{i}" for i in range(kept)), "more"]
        stores.close()
    finally:
        subprocess.run(["umount", "-l", str(mount)], check=True)


# -- one owner


def test_a_second_process_cannot_open_the_file(store: Store, stores: Stores) -> None:
    """While one process has the queue, no other can read or write it."""
    accept(store, "a")
    script = (
        "import sqlite3, sys\n"
        f"db = sqlite3.connect({str(stores.path)!r}, timeout=0)\n"
        "try:\n    db.execute('PRAGMA user_version').fetchall()\n"
        "except sqlite3.OperationalError as error:\n    sys.exit(str(error))\n"
    )
    other = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (other.returncode, other.stderr.strip()) == (1, "database is locked")
    accept(store, "b")


def test_the_file_is_in_wal_mode_with_full_sync(tmp_path: Path, clock: FakeClock) -> None:
    """The settings that durability rests on are in force."""
    store = Store(tmp_path / "queue.db", clock=clock)
    names = ("journal_mode", "synchronous", "locking_mode")
    assert [store._db.execute(f"PRAGMA {name}").fetchone()[0] for name in names] == ["wal", 2, "exclusive"]
    store.close()
