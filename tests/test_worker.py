"""The loop that runs tasks, over a real store and real HTTP to a stand-in for Ollama."""

import json
import threading
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from typing import Any

import pytest

from edge_daemon.breaker import TRIPS_AFTER
from edge_daemon.errors import StorageFull
from edge_daemon.logger import load_state
from edge_daemon.messages import Message, Priority, Result, Status, TaskState
from edge_daemon.ollama import Deadlines, Ollama
from edge_daemon.store import Store
from edge_daemon.worker import EXPIRE_AT_ONCE, IDLE_LOOK_S, Worker
from tests.fake_ollama import FakeModel, Fault
from tests.rig import IDLE_S, MAX_ATTEMPTS, MB, Rig
from tests.waiting import wait_until

MANY_WORDS = " ".join(f"w{n}" for n in range(400))


# -- one task


def test_a_task_from_end_to_end(rig: Rig) -> None:
    """A task is claimed, its model loaded, its answer generated, stored and told, with all figures."""
    rig.start()
    rig.submit(
        "t",
        prompt="hi there",
        system="be brief",
        task_type="q",
        model_requested="A",
        options={"temperature": 0.5, "num_predict": 99},
        meta={"k": 1},
        max_tokens=50,
    )
    result = rig.result("t")
    assert (result.state, result.text, result.error) == (TaskState.SUCCEEDED, "echo: hi there", None)
    assert (result.id, result.src, result.seq, result.attempt, result.preempted) == ("t", "dev", 4, 1, 0)
    assert (result.model, result.model_requested, result.task_type, result.meta) == ("a:latest", "A", "q", {"k": 1})
    assert (result.done_reason, result.output_tokens, result.truncated, result.swapped) == ("stop", 3, False, False)
    assert result.queued_s is not None
    assert result.load_s is not None
    assert result.run_s is not None
    assert result.total_s == pytest.approx(result.queued_s + result.load_s + result.run_s, abs=0.001)
    assert min(result.load_s, result.run_s) > 0
    assert rig.seqs("t") == [("running", 2)]
    (finished,) = rig.finished
    assert finished.usage is not None
    assert (finished.result, finished.answer and finished.answer.text) == (result, "echo: hi there")
    assert finished.ensured is not None
    assert rig.store is not None
    assert [stored.task.id for stored in rig.store.unsent(9)] == ["t"]


def test_what_ollama_is_asked(rig: Rig) -> None:
    """Runner options as at the load, sampling options of the task, its own limit of tokens, and a finite lease."""
    rig.start()
    rig.submit("t", system="be brief", options={"seed": 7, "num_predict": 99}, max_tokens=50)
    rig.result("t")
    (chat,) = rig.chats()
    assert chat.body["options"] == {"num_ctx": 1_000, "seed": 7, "num_predict": 50}
    assert chat.body["messages"] == [{"role": "system", "content": "be brief"}, {"role": "user", "content": "why?"}]
    assert chat.body["keep_alive"] > IDLE_S
    assert "think" not in chat.body
    (load,) = rig.fake.asked("/api/generate")
    assert load.body["options"] == {"num_ctx": 1_000}


def test_a_conversation_is_sent_as_it_is(rig: Rig) -> None:
    """The messages of a task go to the model in their order."""
    rig.start()
    turns = (
        Message(role="user", content="u"),
        Message(role="assistant", content="a"),
        Message(role="user", content="v"),
    )
    rig.submit("t", prompt=None, messages=turns)
    assert rig.result("t").text == "echo: v"
    assert rig.chats()[0].body["messages"] == [turn.to_dict() for turn in turns]


def test_a_resident_model_is_not_loaded_again(rig: Rig) -> None:
    """The second task of a model waits for no load, and its result says so."""
    rig.start()
    rig.submit("t1")
    first = rig.result("t1")
    rig.submit("t2")
    second = rig.result("t2")
    assert (first.load_s or 0) > 0 == second.load_s
    assert rig.fake.loads == ["a:latest"]


def adds_up(result: Result) -> bool:
    """Whether its times are parts of the whole."""
    parts = (result.queued_s or 0) + (result.load_s or 0) + (result.run_s or 0)
    return result.total_s == pytest.approx(parts, abs=1e-9)


def test_a_load_before_its_time_costs_a_task_nothing(rig: Rig) -> None:
    """A task that comes when its model has been loaded ahead finds it there, however long the load took."""
    rig.fake["a"].load_s = 0.3
    rig.start(preload=("a",))
    wait_until(lambda: rig.changes)
    rig.submit("t")
    result = rig.result("t")
    assert (result.load_s, load_state(result)) == (0, "already_loaded")
    assert adds_up(result)
    (finished,) = rig.told("t")
    assert finished.ensured is not None
    assert finished.ensured.load_s == 0


def test_a_task_has_waited_for_the_rest_of_a_load(rig: Rig) -> None:
    """Of a load that had begun before it came, only the part after that is a part of its time."""
    rig.fake["a"].load_s = 0.5
    rig.start(preload=("a",))
    wait_until(lambda: rig.fake.asked("/api/generate"))
    rig.submit("t")
    result = rig.result("t")
    assert (result.load_s or 0) > 0
    assert load_state(result) == "loaded"
    assert adds_up(result)


def urgent_in_between(rig: Rig) -> Result:
    """The result of an urgent task that came while `long` was being written; with the `rig` not started yet."""
    rig.fake["a"].answer = MANY_WORDS
    rig.fake["a"].token_s = 0.01
    rig.start()
    rig.submit("long", stream=True)
    wait_until(lambda: rig.chunks)
    rig.submit("urgent", priority=Priority.URGENT, max_tokens=3)
    return rig.result("urgent")


def test_a_load_is_not_charged_to_whoever_comes_between(rig: Rig) -> None:
    """The task that has waited for it carries it to its end; an urgent one that interrupts it later does not."""
    rig.fake["a"].load_s = 0.2
    urgent = urgent_in_between(rig)
    rig.fake["a"].token_s = 0.0
    long = rig.result("long")
    assert (urgent.load_s, long.preempted) == (0, 1)
    assert (long.load_s or 0) >= 0.2
    assert adds_up(urgent)
    assert adds_up(long)


def test_what_is_learnt_is_kept(rig: Rig) -> None:
    """Load and generation are measured into the estimates, which the store keeps."""
    rig.fake["a"].token_s = 0.005
    rig.start()
    rig.submit("t", task_type="q", prompt="one two three four")
    rig.result("t")
    rig.stop()
    rig.start()
    assert rig.store is not None
    facts = rig.store.learnt()["a:latest"]
    assert facts["size_bytes"] == 100 * MB
    assert facts["load_s"] > 0
    assert facts["output_tokens_by_type"] == {"q": 5}


# -- order


def test_higher_priorities_go_first(rig: Rig) -> None:
    """Of what waits for one model, the higher priority is run first, and equals in the order of acceptance."""
    rig.fake["a"].first_token_s = 0.3
    rig.start(preempt=False)
    rig.submit("first", prompt="first")
    rig.until_generating()
    for name, priority in (("low", Priority.LOW), ("normal", Priority.NORMAL), ("high", Priority.HIGH)):
        for n in (1, 2):
            rig.submit(f"{name}{n}", prompt=f"{name}{n}", priority=priority)
    rig.submit("urgent", prompt="urgent", priority=Priority.URGENT)
    rig.fake["a"].first_token_s = 0.0
    rig.result("low2")
    assert rig.order() == ["first", "urgent", "high1", "high2", "normal1", "normal2", "low1", "low2"]


def test_a_resident_model_goes_on_first(rig: Rig) -> None:
    """Tasks for the model in memory are run before another is swapped in, though they came later; one swap is all."""
    rig.fake["a"].first_token_s = 0.3
    rig.start(budget_mb=150)
    rig.submit("a1", prompt="a1")
    rig.until_generating()
    rig.submit("b1", "b2", prompt="b", model="b")
    rig.submit("a2", "a3", prompt="a")
    rig.fake["a"].first_token_s = 0.0
    result = rig.result_in_time("b2")
    assert rig.order() == ["a1", "a", "a", "b", "b"]
    assert rig.fake.loads == ["a:latest", "b:latest"]
    assert not result.swapped
    swapped = rig.result("b1")
    assert (swapped.swapped, swapped.model) == (True, "b:latest")
    (finished,) = rig.told("b1")
    assert finished.ensured is not None
    assert finished.ensured.evicted == ("a:latest",)
    assert rig.fake.evictions == []


def test_a_model_that_another_client_has_changed(rig: Rig) -> None:
    """A model that somebody has loaded with another context is loaded anew before the task, and the result says so."""
    rig.start()
    rig.submit("first")
    rig.result("first")
    other = Ollama(rig.fake.url, connect_timeout_s=5)
    other.load("a", options={"num_ctx": 4_096}, keep_alive_s=60, timeout_s=5)
    rig.clock.advance(IDLE_LOOK_S)
    rig.submit("second")
    assert (rig.result("second").load_s or 0) > 0
    assert [(change.reason, change.outcome) for change in rig.changes] == [
        ("plan", "loaded"),
        ("context", "unloaded"),
        ("context", "loaded"),
    ]
    assert rig.fake.loads == ["a:latest"] * 3


def test_a_long_prompt_may_take_long_to_read(rig: Rig) -> None:
    """The deadline of the first token grows with the prompt, by the rate that was measured."""
    rig.deadlines = Deadlines(first_token_s=0.2, token_gap_s=20, total_s=20)
    rig.start()
    rig.estimates.answered(
        "a:latest", task_type=None, prompt_tokens=100, prefill_s=10.0, output_tokens=8, decode_s=1.0, run_s=11.0
    )
    rig.fake["a"].first_token_s = 0.5
    rig.submit("short", prompt_tokens=1)
    rig.submit("long", prompt_tokens=100)
    assert rig.result("long").state is TaskState.SUCCEEDED
    assert rig.result("short").state is TaskState.TIMED_OUT


def test_a_preload_that_hangs_holds_up_nobody(rig: Rig) -> None:
    """A model that is loaded ahead and does not come lets a resident one work meanwhile."""
    rig.start()
    rig.submit("first")
    rig.result("first")
    rig.stop()
    rig.fake["b"].load_s = 60.0
    rig.start(preload=("b",))
    wait_until(lambda: rig.fake.asked("/api/generate", model="b"))
    rig.submit("second")
    assert rig.result("second").state is TaskState.SUCCEEDED
    assert rig.fake.loads == ["a:latest"]


def test_the_next_model_is_loaded_meanwhile(rig: Rig) -> None:
    """While memory allows, the next model comes into memory beside a generation, and its task finds it there."""
    rig.fake["a"].answer = MANY_WORDS
    rig.fake["a"].token_s = 0.02
    rig.start()
    rig.submit("long")
    rig.submit("next", model="b")
    wait_until(lambda: "b:latest" in rig.fake.resident())
    assert rig.stored("long").state is TaskState.RUNNING
    rig.fake["a"].token_s = 0.0
    assert rig.result("next").state is TaskState.SUCCEEDED
    assert [change.reason for change in rig.changes if change.model == "b:latest"] == ["prefetch"]


# -- cancelling


def worker_of(rig: Rig) -> Worker:
    """The worker, which runs."""
    assert rig.worker is not None
    return rig.worker


def test_cancel_a_waiting_task(rig: Rig) -> None:
    """A task that waits is ended at once and never run; what else waits is not touched."""
    rig.fake["a"].first_token_s = 0.3
    rig.start()
    rig.submit("first", prompt="first")
    rig.until_generating()
    rig.submit("doomed", "other", prompt="later")
    assert worker_of(rig).cancel("dev", "doomed")
    result = rig.stored("doomed").result
    assert result is not None
    assert (result.state, result.attempt, result.model, result.text) == (TaskState.CANCELLED, 0, None, None)
    assert result.seq == 2
    assert rig.result("other").state is TaskState.SUCCEEDED
    assert len(rig.chats()) == 2
    assert len(rig.told("doomed")) == 1


def test_cancel_by_id_alone_meets_every_sender(rig: Rig) -> None:
    """Without a sender, all unfinished tasks of that id are ended."""
    rig.fake.stop()
    rig.start()
    rig.submit("x", src="one")
    rig.submit("x", src="two")
    rig.submit("y")
    worker_of(rig).cancel(None, "x")
    assert [finished.result.src for finished in rig.finished] == ["one", "two"]
    assert rig.stored("y").result is None


def test_cancel_what_is_not_there(rig: Rig) -> None:
    """A cancel of an unknown or ended task changes nothing, raises nothing, and says that there was none."""
    rig.start()
    rig.submit("t")
    before = rig.result("t")
    for src, task_id in (("dev", "t"), ("dev", "nothing"), (None, "nothing"), ("stranger", "t")):
        assert not worker_of(rig).cancel(src, task_id)
    assert rig.stored("t").result == before
    assert len(rig.finished) == 1


def test_cancel_while_its_model_loads(rig: Rig) -> None:
    """A task is ended while its model is still on its way; the load goes on, for whoever comes next."""
    rig.fake["a"].load_s = 0.5
    rig.start()
    rig.submit("t")
    wait_until(lambda: rig.fake.asked("/api/generate"))
    worker_of(rig).cancel("dev", "t")
    result = rig.stored("t").result
    assert result is not None
    assert result.state is TaskState.CANCELLED
    assert rig.fake.loads == []  # not waited for
    wait_until(lambda: rig.fake.resident() == ["a:latest"])
    assert rig.chats() == []


def test_cancel_while_decoding(rig: Rig) -> None:
    """A running generation is stopped, Ollama is hung up on, and the text so far is kept."""
    rig.fake["a"].answer = MANY_WORDS
    rig.fake["a"].token_s = 0.02
    rig.start()
    rig.submit("t", stream=True)
    wait_until(lambda: rig.chunks)
    worker_of(rig).cancel("dev", "t")
    result = rig.result("t")
    assert (result.state, result.error, result.attempt) == (TaskState.CANCELLED, None, 1)
    assert result.text
    assert MANY_WORDS.startswith(result.text)
    assert len(result.text) < len(MANY_WORDS)
    wait_until(lambda: rig.chats()[0].aborted)
    assert rig.chunks[-1][1]["done"] is True
    rig.fake["a"].answer = None
    rig.submit("after")
    assert rig.result("after").state is TaskState.SUCCEEDED


def cancel_when_set_back(rig: Rig) -> None:
    """Have the task cancelled at the moment between its last run and its place in the queue."""

    def cancel(status: Status) -> None:
        if status.state is TaskState.QUEUED:
            worker_of(rig).cancel("dev", "t")

    rig.on_status = cancel


def test_a_cancel_is_not_lost_when_the_attempt_fails(rig: Rig) -> None:
    """A cancel that arrives just as a failed task is set back ends it: it is not tried again."""
    rig.fake["a"].fault = Fault.ERROR_STATUS
    cancel_when_set_back(rig)
    rig.start()
    rig.submit("t")
    assert rig.result_in_time("t").state is TaskState.CANCELLED
    assert len(rig.chats()) == 1
    assert len(rig.told("t")) == 1


def test_a_cancel_is_not_lost_when_the_daemon_stops(rig: Rig) -> None:
    """A cancel that arrives after the stop has interrupted the task still ends it."""
    rig.fake["a"].first_token_s = 30
    cancel_when_set_back(rig)
    rig.start()
    rig.submit("t")
    rig.until_generating()
    worker_of(rig).stop(drain_s=0)
    assert rig.result("t").state is TaskState.CANCELLED
    assert len(rig.told("t")) == 1


def test_cancel_and_end_race(rig: Rig) -> None:
    """However close a cancel comes to the end of its task, there is one terminal record, told once."""
    rig.fake["a"].token_s = 0.003
    rig.start()
    ids = [f"t{n}" for n in range(30)]
    rig.submit(*ids)
    for task_id in ids:
        wait_until(lambda task_id=task_id: rig.stored(task_id).state is not TaskState.QUEUED)  # type: ignore[misc]
        worker_of(rig).cancel("dev", task_id)
    for task_id in ids:
        assert rig.result(task_id).state in (TaskState.CANCELLED, TaskState.SUCCEEDED)
    assert sorted(finished.result.id for finished in rig.finished) == sorted(ids)
    for finished in rig.finished:
        assert rig.stored(finished.result.id).result == finished.result


def test_an_end_that_came_first_is_the_only_one(rig: Rig) -> None:
    """When a task has been ended elsewhere while it ran, its own end is neither stored nor told."""
    rig.fake["a"].first_token_s = 0.3
    rig.start()
    rig.submit("t", "next")
    rig.until_generating()
    assert rig.store is not None
    stored = rig.stored("t")
    first = Result(id="t", src="dev", seq=9, state=TaskState.CANCELLED, ts="2026-01-01T00:00:00.000Z")
    assert rig.store.finish(stored.seq, first)
    rig.result("next")
    assert rig.stored("t").result == first
    assert rig.told("t") == []


# -- expiry


def test_a_task_expires_while_it_waits(rig: Rig) -> None:
    """A waiting task whose time is over is ended, also while another one runs, and never run."""
    rig.fake["a"].first_token_s = 0.5
    rig.start()
    rig.submit("long")
    rig.until_generating()
    rig.submit("short", ttl_s=50.0)
    rig.clock.advance(51)
    worker_of(rig).expire()
    result = rig.stored("short").result
    assert result is not None
    assert (result.state, result.attempt, result.error) == (TaskState.EXPIRED, 0, None)
    assert result.queued_s == pytest.approx(51, abs=5)
    assert rig.stored("long").result is None
    assert rig.result("long").state is TaskState.SUCCEEDED
    assert len(rig.chats()) == 1


def test_a_task_expires_while_ollama_is_down(rig: Rig) -> None:
    """Time to live is kept even when nothing can be run."""
    rig.fake.stop()
    rig.start()
    rig.submit("t", ttl_s=50.0)
    wait_until(lambda: rig.edges == [False])
    rig.clock.advance(51)
    rig.wake()
    assert rig.result("t").state is TaskState.EXPIRED


def test_thousands_that_expire_at_once(rig: Rig) -> None:
    """They are ended some at a time, by few commits, and others get their turn in between; each is told once."""
    count = 2 * EXPIRE_AT_ONCE + 50
    rig.fake.stop()
    rig.start()
    rig.submit(*(f"t{n}" for n in range(count)), ttl_s=50.0)
    rig.submit("stays")
    wait_until(lambda: rig.edges == [False])
    assert rig.store is not None
    statements: list[str] = []
    rig.store._db.set_trace_callback(statements.append)
    before = worker_of(rig).beats
    rig.clock.advance(51)
    rig.wake()
    wait_until(lambda: len(rig.finished) == count)
    rig.store._db.set_trace_callback(None)
    assert statements.count("COMMIT") == 3
    assert worker_of(rig).beats >= before + 2
    assert sorted(it.result.id for it in rig.finished) == sorted(f"t{n}" for n in range(count))
    assert {it.result.state for it in rig.finished} == {TaskState.EXPIRED}
    assert rig.store.open_count() == 1


# -- failures


def test_a_task_survives_the_death_of_its_runner(rig: Rig) -> None:
    """When the model's process dies in the middle, the task is tried again with rising numbers, and succeeds."""
    rig.fake["a"].answer = MANY_WORDS
    rig.fake["a"].token_s = 0.02
    rig.start()
    rig.submit("t")
    wait_until(lambda: rig.seqs("t") == [("running", 2)])
    rig.until_generating()
    rig.fake.kill_runner("a")
    wait_until(lambda: len(rig.seqs("t")) == 2)
    rig.fake["a"].token_s = 0.0
    result = rig.result_in_time("t")
    assert (result.state, result.text, result.attempt) == (TaskState.SUCCEEDED, MANY_WORDS, 2)
    assert [*rig.seqs("t"), ("succeeded", result.seq)] == [
        ("running", 2),
        ("queued", 3),
        ("running", 4),
        ("succeeded", 6),
    ]


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (Fault.ERROR_STATUS, "runner_died"),
        (Fault.ERROR_FIRST, "runner_died"),
        (Fault.ERROR_LATER, "runner_died"),
        (Fault.EOF, "incomplete_output"),
        (Fault.RESET, "incomplete_output"),
        (Fault.BROKEN_LINE, "incomplete_output"),
    ],
)
def test_a_poison_task_is_given_up(rig: Rig, fault: Fault, code: str) -> None:
    """A task that fails again and again is attempted so often and no more, and its result says why."""
    rig.fake["a"].fault = fault
    rig.start()
    rig.submit("t")
    result = rig.result_in_time("t")
    assert (result.state, result.attempt) == (TaskState.FAILED, MAX_ATTEMPTS)
    assert result.error is not None
    assert (result.error.code, result.error.retryable) == (code, True)
    assert len(rig.chats()) == MAX_ATTEMPTS
    assert [event[0] for event in rig.events] == ["breaker_opened"]


def test_a_task_that_kills_the_daemon_is_given_up(rig: Rig) -> None:
    """Attempts that ended with the daemon's own death count too: after so many it is ended unrun."""
    rig.fake.stop()
    rig.start()
    rig.submit("t")
    rig.stop()
    for _ in range(MAX_ATTEMPTS):
        store = Store(rig.path, clock=rig.clock)
        assert store.claim(store.heads()[0].seq)
        store.close()  # while it runs
    rig.fake.start()
    rig.start()
    result = rig.result_in_time("t")
    assert result.error is not None
    assert (result.state, result.error.code, result.attempt) == (TaskState.FAILED, "crash_loop", MAX_ATTEMPTS)
    assert rig.chats() == []


def died_loading(rig: Rig, model: str = "a", *, task: int = 0, deaths: int = 0) -> None:
    """Leave the queue file as a daemon does that is killed while it loads a model for a task."""
    with closing(Store(rig.path, clock=rig.clock)) as store:
        store.learn(f"{model}:latest", {"load_for": task, "deaths": deaths})


def waiting_for_a_start(rig: Rig, *ids: str, **fields: Any) -> list[int]:
    """Tasks that an earlier daemon has accepted."""
    rig.fake.stop()
    rig.start()
    rig.submit(*ids, **fields)
    seqs = [rig.stored(task_id).seq for task_id in ids]
    rig.stop()
    rig.fake.start()
    return seqs


def test_a_load_that_killed_the_daemon_counts(rig: Rig) -> None:
    """It was an attempt of its task, and a failure of its model, whose next load has all the memory."""
    rig.fake["a"].load_s = 0.2
    (seq,) = waiting_for_a_start(rig, "t")
    died_loading(rig, task=seq)
    other = Ollama(rig.fake.url, connect_timeout_s=5)
    other.load("b", options={"num_ctx": 1_000}, keep_alive_s=60, timeout_s=5)
    rig.start()
    result = rig.result_in_time("t")
    assert (result.state, result.attempt) == (TaskState.SUCCEEDED, 2)
    assert rig.seqs("t") == [("queued", 3), ("running", 4)]
    assert [(change.model, change.reason) for change in rig.changes] == [
        ("b:latest", "room for a:latest"),
        ("a:latest", "killed"),
    ]
    assert adds_up(result)


def test_a_load_that_kills_the_daemon_each_time_is_given_up(rig: Rig) -> None:
    """After so many starts its task is ended without another load; its model rests before it is tried for others."""
    seq, _ = waiting_for_a_start(rig, "t", "next")
    rig.fake.stop()
    for deaths in range(MAX_ATTEMPTS):
        rig.stop()
        died_loading(rig, task=seq, deaths=deaths)
        rig.start()
        wait_until(lambda deaths=deaths: rig.stored("t").attempt > deaths)  # type: ignore[misc]
    result = rig.result("t")
    assert (result.state, result.attempt, load_state(result)) == (TaskState.FAILED, MAX_ATTEMPTS, "load_failed")
    assert result.error is not None
    assert (result.error.code, result.error.retryable) == ("crash_loop", False)
    assert [*rig.seqs("t"), ("failed", result.seq)] == [("queued", 3), ("queued", 5), ("failed", 8)]
    assert [name for name, *_ in rig.events] == ["breaker_opened"]
    rig.fake.start()
    assert rig.result_in_time("next").attempt == 1
    assert rig.fake.loads == ["a:latest"]


def test_a_fallback_answers_when_loads_have_killed_the_daemon(rig: Rig) -> None:
    """The breaker of such a model opens over several starts, and its task is not given up where another can answer."""
    (seq,) = waiting_for_a_start(rig, "t")
    died_loading(rig, task=seq, deaths=TRIPS_AFTER - 1)
    rig.start(fallbacks=lambda model: ("b:latest",) if model == "a:latest" else ())
    result = rig.result("t")
    assert (result.state, result.model, result.attempt) == (TaskState.SUCCEEDED, "b:latest", 1)


def test_a_preload_that_killed_the_daemon_is_not_tried_again(rig: Rig) -> None:
    """Nor is a task blamed for it; the others are loaded as ever, and so is it as soon as a task needs it."""
    waiting_for_a_start(rig, "t")
    died_loading(rig, "b")
    rig.start(preload=("b", "a"))
    assert rig.result("t").attempt == 1
    assert rig.fake.loads == ["a:latest"]
    rig.submit("late", model="b")
    assert rig.result_in_time("late").attempt == 1


@pytest.mark.parametrize("preload", [(), ("a",)])
def test_a_load_is_noted_before_it_is_asked_for(rig: Rig, preload: tuple[str, ...]) -> None:
    """A power cut during a load finds it in the queue file, with its task; an orderly stop leaves nothing to count."""
    rig.fake.loads_hang = True
    rig.start(preload=preload)
    if not preload:
        rig.submit("t")
    wait_until(lambda: rig.fake.asked("/api/generate"))
    assert rig.store is not None
    assert rig.store.learnt()["a:latest"]["load_for"] == (0 if preload else rig.stored("t").seq)
    rig.stop()
    with closing(Store(rig.path, clock=rig.clock)) as store:
        assert store.learnt()["a:latest"]["load_for"] is None


def test_no_load_without_a_note_of_it(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a full disk none is begun, beside a task or for one; what needs none goes on, and all is done later."""
    monkeypatch.setattr("edge_daemon.worker.FULL_DISK_PAUSE_S", 0.02)
    rig.fake["a"].answer, rig.fake["a"].token_s = MANY_WORDS, 0.001
    rig.start()
    rig.submit("first", max_tokens=1)
    rig.result("first")

    def full() -> None:
        raise StorageFull("no room")

    with monkeypatch.context() as patched:
        patched.setattr(rig.estimates, "_make_last", full)
        rig.submit("long")
        rig.submit("next", model="b")
        assert rig.result("long").state is TaskState.SUCCEEDED
        before = worker_of(rig).beats
        wait_until(lambda: worker_of(rig).beats > before + 5)
        assert rig.fake.loads == ["a:latest"]
    assert (rig.result("next").state, rig.result("next").attempt) == (TaskState.SUCCEEDED, 1)


def test_a_good_answer_after_a_kill(rig: Rig) -> None:
    """A task that was running when the daemon was killed is run again, and its attempt is the second."""
    rig.fake.stop()
    rig.start()
    rig.submit("t")
    rig.stop()
    store = Store(rig.path, clock=rig.clock)
    store.claim(store.heads()[0].seq)
    store.close()
    rig.fake.start()
    rig.start()
    result = rig.result_in_time("t")
    assert (result.state, result.attempt) == (TaskState.SUCCEEDED, 2)


def test_what_cannot_get_better_is_not_tried_again(rig: Rig) -> None:
    """An error that will be the same the next time ends the task at the first."""
    rig.fake["a"].fault = Fault.ERROR_STATUS
    rig.fake["a"].error_status = 400
    rig.start()
    rig.submit("t")
    result = rig.result("t")
    assert result.error is not None
    assert (result.state, result.attempt, result.error.code) == (TaskState.FAILED, 1, "bad_request")
    assert not result.error.retryable


def test_a_failing_model_does_not_keep_others_waiting(rig: Rig) -> None:
    """While one model rests after a failure, the tasks of another are run."""
    rig.fake["a"].load_error = (500, "llama runner process has terminated: exit status 2")
    rig.start()
    rig.submit("bad")
    wait_until(lambda: rig.seqs("bad") == [("queued", 3)])
    rig.submit("good", model="b")
    assert rig.result("good").state is TaskState.SUCCEEDED
    assert rig.stored("bad").result is None
    rig.fake["a"].load_error = None
    assert rig.result_in_time("bad").state is TaskState.SUCCEEDED


def test_a_load_that_fails_counts_as_an_attempt(rig: Rig) -> None:
    """A model that cannot be loaded ends its task after so many tries, with the reason, and no load time is claimed."""
    rig.fake["a"].load_error = (500, "llama runner process has terminated: exit status 2")
    rig.start()
    rig.submit("t")
    result = rig.result_in_time("t")
    assert result.error is not None
    assert (result.state, result.attempt, result.error.code) == (TaskState.FAILED, MAX_ATTEMPTS, "runner_died")
    assert result.load_s is None
    assert rig.chats() == []


def test_a_model_that_is_not_there(rig: Rig) -> None:
    """A task whose model has been deleted meanwhile fails with that reason."""
    rig.start()
    rig.submit("t", model="gone")
    result = rig.result_in_time("t")
    assert result.error is not None
    assert (result.state, result.error.code) == (TaskState.FAILED, "model_missing")


def test_a_fallback_answers(rig: Rig) -> None:
    """When a model is not there, the one that is named for that case answers, and the result says which it was."""
    rig.start(fallbacks=lambda model: ("b:latest",) if model == "gone:latest" else ())
    rig.submit("t", model="gone", model_requested="gone")
    result = rig.result_in_time("t")
    assert (result.state, result.model, result.model_requested) == (TaskState.SUCCEEDED, "b:latest", "gone")


# -- deadlines


@pytest.mark.parametrize(
    ("stage", "fault", "text"),
    [
        ("first_token", Fault.HANG_HEADERS, None),
        ("first_token", Fault.HANG_FIRST, None),
        ("token_gap", Fault.HANG_LATER, "echo:"),
        ("total", Fault.ENDLESS, "echo: why?"),
    ],
)
def test_every_stage_has_a_deadline(rig: Rig, stage: str, fault: Fault, text: str | None) -> None:
    """A generation that hangs at any stage is timed out, hung up on, not tried again, and its text so far kept."""
    rig.fake["a"].fault = fault
    rig.fake["a"].token_s = 0.01
    rig.deadlines = replace(rig.deadlines, **{f"{stage}_s": 0.3})
    rig.start()
    rig.submit("t")
    result = rig.result("t")
    assert result.error is not None
    assert (result.state, result.error.code, result.attempt) == (TaskState.TIMED_OUT, "timed_out", 1)
    named = "task" if stage == "total" else stage.replace("_", " ")
    assert named in result.error.message
    assert (result.text or "").startswith(text or "")
    assert bool(result.text) == bool(text)
    wait_until(lambda: rig.chats()[0].aborted)


def test_a_load_has_a_deadline(rig: Rig) -> None:
    """A load that hangs times its task out."""
    rig.fake.loads_hang = True
    rig.start(load_timeout_s=0.3)
    rig.submit("t")
    result = rig.result_in_time("t")
    assert result.error is not None
    assert (result.state, result.error.message) == (TaskState.TIMED_OUT, "no load within 0.3 s")
    assert rig.chats() == []


# -- answers


def test_a_json_answer_is_parsed(rig: Rig) -> None:
    """With `format`, the answer is there both as text and as JSON."""
    rig.fake["a"].answer = '{"city": "Bern", "n": [1, 2.5]}'
    rig.start()
    wanted = {"type": "object", "required": ["city"], "properties": {"n": {"items": {"type": "number"}}}}
    rig.submit("free", format="json")
    rig.submit("schema", format=wanted)
    for task_id in ("free", "schema"):
        result = rig.result(task_id)
        assert (result.state, result.text) == (TaskState.SUCCEEDED, rig.fake["a"].answer)
        assert result.json == {"city": "Bern", "n": [1, 2.5]}
    assert sorted(str(chat.body["format"]) for chat in rig.chats()) == sorted(["json", str(wanted)])


@pytest.mark.parametrize(
    ("answer", "wanted", "says"),
    [
        ("no JSON at all", "json", "not JSON"),
        ('{"a": NaN}', "json", "NaN"),
        ('{"a": 1e999}', "json", "not JSON"),
        (r'{"a": "\ud800"}', "json", "not JSON"),
        ("[" * 5_000, "json", "not JSON"),
        ("[" * 65 + "]" * 65, "json", "nested deeper than 64 levels"),
        ('{"a":' * 900 + "1" + "}" * 900, "json", "nested deeper than 64 levels"),
        ("[" * 100_000 + "]" * 100_000, "json", "nested deeper than 64 levels"),
        ('{"a": 1}', {"required": ["city"]}, "answer: city is missing"),
        ('"text"', {"type": "object"}, "not of type object"),
        ("", "json", "not JSON"),
    ],
)
@pytest.mark.usefixtures("no_collection")
def test_an_invalid_answer_fails_with_its_text(rig: Rig, answer: str, wanted: Any, says: str) -> None:
    """An answer that is not what was asked for is told as such, and its text is kept."""
    rig.fake["a"].answer = answer
    rig.start()
    rig.submit("t", format=wanted)
    result = rig.result("t")
    assert result.error is not None
    assert (result.state, result.error.code, result.json) == (TaskState.FAILED, "invalid_output", None)
    assert says in result.error.message
    assert result.text == answer


def test_json_that_was_cut_says_so(rig: Rig) -> None:
    """When the limit of tokens cut the JSON, the message says that this is why."""
    rig.fake["a"].answer = '{"a": 1, "b": 2}'
    rig.start()
    rig.submit("t", format="json", max_tokens=2)
    result = rig.result("t")
    assert result.error is not None
    assert result.error.message.endswith("it was cut at max_tokens")
    assert (result.text, result.done_reason, result.output_tokens) == ('{"a": 1,', "length", 2)


def test_deep_json_is_an_answer(rig: Rig) -> None:
    """As deep as is allowed, it is stored, and read again."""
    rig.fake["a"].answer = '{"a": [' * 31 + "[1]" + "]}" * 31
    rig.start()
    rig.submit("t", format="json")
    assert rig.result("t").json == json.loads(rig.fake["a"].answer)


def test_a_number_that_is_an_answer(rig: Rig) -> None:
    """JSON need not be an object: what is asked for decides."""
    rig.fake["a"].answer = "42"
    rig.start()
    rig.submit("t", format={"type": "integer"})
    assert rig.result("t").json == 42


def test_an_endless_answer_is_truncated(rig: Rig) -> None:
    """An answer that will not end is stopped at its limit of bytes, and that is a success that says so."""
    rig.fake["a"].fault = Fault.ENDLESS
    rig.start(max_result_bytes=2_000)
    rig.submit("t")
    result = rig.result("t")
    assert (result.state, result.truncated, result.done_reason) == (TaskState.SUCCEEDED, True, "length")
    assert len(result.text or "") == 2_000


def test_metrics_that_make_no_sense(rig: Rig) -> None:
    """Missing and negative metrics are no reason to fail, and never become figures."""
    rig.start()
    for fault in (Fault.NO_METRICS, Fault.NEGATIVE):
        rig.fake["a"].fault = fault
        rig.submit(str(fault))
        result = rig.result(str(fault))
        assert (result.state, result.tokens_per_s, result.output_tokens) == (TaskState.SUCCEEDED, None, 2)


def test_a_thinking_model_is_told_not_to(rig: Rig) -> None:
    """A model that can think aloud is asked not to, others are not asked; thoughts are never an answer."""
    rig.start(think=lambda model: False if model == "b:latest" else None)
    rig.submit("plain")
    rig.submit("thinker", model="b")
    rig.result("plain")
    rig.result("thinker")
    assert {chat.body["model"]: chat.body.get("think") for chat in rig.chats()} == {"a:latest": None, "b:latest": False}
    rig.fake["b"].fault = Fault.THINKING
    rig.submit("thoughts", model="b")
    result = rig.result("thoughts")
    assert (result.state, result.text, result.done_reason) == (TaskState.FAILED, "", "length")
    assert (result.error and result.error.code, result.attempt) == ("incomplete_output", 1)


def test_two_names_of_a_model_and_another_one(rig: Rig) -> None:
    """Room is made for another model by unloading the one, not its second name, which would win nothing."""
    rig.fake.models["alias:latest"] = FakeModel(
        "alias", size_bytes=40 * MB, ram_bytes=100 * MB, blob=rig.fake["a"].blob
    )
    rig.start(budget_mb=150)
    for number, model in enumerate(("a", "alias", "b", "alias")):
        rig.submit(f"t{number}", model=model)
        assert rig.result(f"t{number}").state is TaskState.SUCCEEDED
    assert rig.fake.resident() == ["alias:latest"]


def test_an_answer_in_a_format_of_a_model_that_could_think(rig: Rig) -> None:
    """It is asked for in the way in which the format is heeded, and may stand between the marks of a code block."""
    rig.fake["b"].answer = '```json\n{"a": 1}\n```\n'
    rig.start(think=lambda _model: False)
    rig.submit("t", model="b", format="json")
    result = rig.result("t")
    assert (result.state, result.json) == (TaskState.SUCCEEDED, {"a": 1})
    assert rig.chats() == []


# -- streams


def test_a_stream_is_the_text(rig: Rig) -> None:
    """The chunks of a stream are numbered from 1, make up the whole text, and end with `done`."""
    rig.fake["a"].answer = " ".join(MANY_WORDS.split()[:40])
    rig.fake["a"].token_s = 0.02
    rig.start()
    rig.submit("t", stream=True)
    rig.submit("quiet")
    result = rig.result("t")
    rig.result("quiet")
    chunks = [chunk for address, chunk in rig.chunks if address.id == "t"]
    assert len(chunks) == len(rig.chunks) >= 4
    assert [chunk["seq"] for chunk in chunks] == list(range(1, len(chunks) + 1))
    assert "".join(chunk.get("text", "") for chunk in chunks) == result.text
    assert [chunk.get("done") for chunk in chunks] == [None] * (len(chunks) - 1) + [True]


def test_a_stream_goes_on_over_a_retry_and_ends(rig: Rig) -> None:
    """Over attempts the numbers go on rising, and whatever the end is, the last chunk says that it is the last."""
    rig.fake["a"].fault = Fault.EOF
    rig.start()
    rig.submit("t", stream=True)
    assert rig.result_in_time("t").state is TaskState.FAILED
    chunks = [chunk for _, chunk in rig.chunks]
    assert [chunk["seq"] for chunk in chunks] == list(range(1, len(chunks) + 1))
    assert [chunk for chunk in chunks if "done" in chunk] == chunks[-1:]
    assert [text.count("echo:") for chunk in chunks if (text := chunk.get("text"))] == [1] * MAX_ATTEMPTS


# -- Ollama goes and comes


def test_a_lack_of_memory_is_told_once(rig: Rig) -> None:
    """While other processes take the memory nothing is loaded, and that is told; the task is run when there is room."""
    rig.taken_bytes = 9_950 * MB
    rig.start()
    rig.submit("t")
    wait_until(lambda: rig.events)
    rig.submit("another")
    assert rig.fake.loads == []
    rig.taken_bytes = 0
    assert rig.result_in_time("t").state is TaskState.SUCCEEDED
    assert [(event, severity) for event, severity, _ in rig.events] == [
        ("memory_short", "warning"),
        ("memory_enough", "info"),
    ]


def test_a_task_that_expires_during_its_load_is_no_lack_of_memory(rig: Rig) -> None:
    """Nothing is loaded for it, and nobody is told that memory is short."""
    rig.fake["a"].size_bytes = 600 * MB  # 15 s to load, as it is guessed
    rig.start()
    rig.submit("t", ttl_s=10.0)
    wait_until(lambda: worker_of(rig).beats >= 2)
    wait_until(lambda: not worker_of(rig)._awake.is_set())
    rig.clock.advance(11.0)
    rig.wake()
    assert rig.result("t").state is TaskState.EXPIRED
    assert (rig.fake.loads, rig.events) == ([], [])


def test_ollama_down_and_up_is_told_once(rig: Rig) -> None:
    """While nobody answers, tasks keep their place and their attempts; each edge is told once."""
    rig.fake.stop()
    rig.start()
    rig.submit("t")
    for looks in range(1, 4):
        wait_until(lambda looks=looks: worker_of(rig)._unanswered >= looks)  # type: ignore[misc]
        rig.wake()
    assert rig.edges == [False]
    assert (rig.stored("t").state, rig.stored("t").attempt) == (TaskState.QUEUED, 0)
    rig.fake.start()
    rig.wake()
    result = rig.result("t")
    assert (result.state, result.attempt) == (TaskState.SUCCEEDED, 1)
    assert rig.edges == [False, True]


def test_ollama_dies_in_the_middle(rig: Rig) -> None:
    """When all of Ollama goes in mid-generation and comes back empty, the model is loaded again and the task done."""
    rig.fake["a"].answer = MANY_WORDS
    rig.fake["a"].token_s = 0.02
    rig.start()
    rig.submit("t")
    rig.until_generating()
    rig.fake.stop()
    wait_until(lambda: rig.edges == [True, False])
    rig.fake["a"].token_s = 0.0
    rig.fake.start()
    result = rig.result_in_time("t")
    assert (result.state, result.text, result.attempt) == (TaskState.SUCCEEDED, MANY_WORDS, 2)
    assert rig.edges == [True, False, True]
    assert rig.fake.loads == ["a:latest", "a:latest"]


# -- start, idle, stop


def test_models_are_preloaded(rig: Rig) -> None:
    """What is to be preloaded is in memory before any task, and one that cannot be is no reason to stop."""
    rig.start(preload=("a", "nowhere", "b"))
    wait_until(lambda: len(rig.changes) == 2)
    assert rig.fake.resident() == ["a:latest", "b:latest"]
    assert [(change.model, change.reason) for change in rig.changes] == [
        ("a:latest", "preload"),
        ("b:latest", "preload"),
    ]
    rig.submit("t")
    assert rig.result("t").state is TaskState.SUCCEEDED


def test_an_idle_model_is_unloaded(rig: Rig) -> None:
    """When nothing has used it for its time, a model leaves memory."""
    rig.start()
    rig.submit("t")
    rig.result("t")
    rig.clock.advance(IDLE_S)
    rig.wake()
    wait_until(lambda: rig.fake.resident() == [])
    wait_until(lambda: [(change.action, change.reason) for change in rig.changes[1:]] == [("unload", "idle")])


def test_stop_lets_the_task_finish(rig: Rig) -> None:
    """An orderly stop waits for the task that runs, begins no other, and what waits stays in the store."""
    rig.fake["a"].first_token_s = 0.4
    rig.start()
    rig.submit("running", "waiting")
    rig.until_generating()
    worker_of(rig).stop(drain_s=10)
    assert rig.stored("running").state is TaskState.SUCCEEDED
    assert (rig.stored("waiting").state, rig.stored("waiting").attempt) == (TaskState.QUEUED, 0)
    assert len(rig.chats()) == 1


def test_stop_sets_back_what_takes_too_long(rig: Rig) -> None:
    """At the end of the time to drain, the task is set back, its attempt not counted, and continued after a restart."""
    rig.fake["a"].answer = MANY_WORDS
    rig.fake["a"].token_s = 0.02
    rig.start()
    rig.submit("t", stream=True)
    wait_until(lambda: len(rig.chunks) >= 2)
    worker_of(rig).stop(drain_s=0)
    stored = rig.stored("t")
    assert (stored.state, stored.attempt, stored.preempted) == (TaskState.QUEUED, 0, 1)
    assert stored.partial
    assert MANY_WORDS.startswith(stored.partial)
    rig.stop()
    rig.fake["a"].token_s = 0.0
    rig.start()
    result = rig.result_in_time("t")
    assert (result.state, result.text, result.attempt) == (TaskState.SUCCEEDED, MANY_WORDS, 1)
    numbers = [seq for _, seq in rig.seqs("t")] + [result.seq]
    assert numbers == sorted(set(numbers))


@pytest.mark.parametrize("preload", [(), ("a",)])
def test_stop_does_not_wait_for_a_load(rig: Rig, preload: tuple[str, ...]) -> None:
    """A load is broken off when the daemon stops, and its task stays where it was."""
    rig.fake["a"].load_s = 60
    rig.start(preload=preload)
    rig.submit("t")
    wait_until(lambda: rig.fake.asked("/api/generate"))
    began = time.monotonic()
    worker_of(rig).stop(drain_s=30)
    assert time.monotonic() - began < 15
    assert (rig.stored("t").state, rig.stored("t").attempt) == (TaskState.QUEUED, 0)
    wait_until(lambda: rig.fake.asked("/api/generate")[0].aborted)


def test_stop_when_there_is_nothing_to_do(rig: Rig) -> None:
    """An idle worker ends at once, and the beat goes on until then."""
    rig.start()
    beats: list[int] = []
    worker_of(rig).stop(drain_s=30, beat=lambda: beats.append(1))
    assert not worker_of(rig).is_alive()
    assert beats


def test_stop_waits_no_longer_than_it_may(rig: Rig) -> None:
    """A worker that cannot end does not keep the stop waiting for ever."""
    freed = threading.Event()

    def hold(_status: Status) -> None:
        freed.wait(20)

    rig.on_status = hold
    rig.start()
    rig.submit("t")
    wait_until(lambda: bool(rig.statuses))
    worker_of(rig).stop(drain_s=0, patience_s=0.1)
    assert worker_of(rig).is_alive()
    freed.set()


def test_what_runs_is_shown(rig: Rig) -> None:
    """The running task is there for whoever asks, and gone when it has ended."""
    rig.fake["a"].first_token_s = 0.3
    rig.start()
    assert worker_of(rig).running() is None
    rig.submit("t")
    rig.until_generating()
    running = worker_of(rig).running()
    assert running is not None
    assert running[0].id == "t"
    rig.result("t")
    assert worker_of(rig).running() is None


# -- urgent tasks


def test_an_urgent_task_goes_in_between(rig: Rig) -> None:
    """An urgent task stops the running one between two tokens; that is continued, and its text is whole."""
    urgent = urgent_in_between(rig)
    assert rig.stored("long").result is None
    rig.fake["a"].token_s = 0.0
    long = rig.result_in_time("long")
    assert (urgent.state, urgent.text) == (TaskState.SUCCEEDED, "w0 w1 w2")
    assert (long.state, long.text) == (TaskState.SUCCEEDED, MANY_WORDS)
    assert (long.attempt, long.preempted) == (1, 1)
    text = "".join(chunk.get("text", "") for address, chunk in rig.chunks if address.id == "long")
    assert text == MANY_WORDS
    numbers = [seq for _, seq in rig.seqs("long")] + [long.seq]
    assert numbers == sorted(set(numbers))


def test_some_tasks_are_not_interrupted(rig: Rig) -> None:
    """A task that says so, or a daemon that is set so, is not preempted by an urgent one."""
    rig.fake["a"].first_token_s = 0.3
    rig.start()
    rig.submit("firm", prompt="firm", preemptible=False)
    rig.until_generating()
    rig.submit("urgent", prompt="urgent", priority=Priority.URGENT)
    rig.fake["a"].first_token_s = 0.0
    rig.result("urgent")
    assert rig.order() == ["firm", "urgent"]
    assert rig.result("firm").preempted == 0


def test_a_full_disk_costs_no_result(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A result that finds no room on the disk waits for it, and what comes after it is run as ever."""
    monkeypatch.setattr("edge_daemon.worker.FULL_DISK_PAUSE_S", 0.02)
    rig.fake["a"].answer = "x" * 60_000
    rig.start()
    assert rig.store is not None
    room: list[int] = []

    def fill(status: Status) -> None:
        if status.state is TaskState.RUNNING and not room and rig.store is not None:
            room.extend(rig.store._db.execute("PRAGMA page_count").fetchone())
            rig.store._db.execute(f"PRAGMA max_page_count = {room[0]}")

    rig.on_status = fill
    rig.submit("first")
    wait_until(lambda: room and rig.fake.asked("/api/chat"))
    wait_until(lambda: rig.worker is not None and rig.worker.beats > 20)
    assert not rig.finished
    rig.store._db.execute("PRAGMA max_page_count = 1000000")
    wait_until(lambda: rig.finished)
    rig.submit("second")
    wait_until(lambda: len(rig.finished) == 2)
    assert [finished.result.state for finished in rig.finished] == [TaskState.SUCCEEDED] * 2
    assert rig.stored("first").attempt == 1


LARGE = {"filler": "x" * 60_000}
"""Comes back in the result, which then finds no room where there is little."""


def fill(rig: Rig) -> None:
    """Let the queue file grow no further."""
    assert rig.store is not None
    (pages,) = rig.store._db.execute("PRAGMA page_count").fetchone()
    rig.store._db.execute(f"PRAGMA max_page_count = {pages}")


def make_room(rig: Rig) -> None:
    """The opposite."""
    assert rig.store is not None
    rig.store._db.execute("PRAGMA max_page_count = 1000000")


def returns(call: Callable[[], object]) -> bool:
    """Whether a call comes back, from another thread."""
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(10)
    return not thread.is_alive()


def test_a_full_disk_and_an_expired_task_hold_up_nobody(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task whose end finds no room waits for it, while others may ask the worker for anything; then it ends."""
    monkeypatch.setattr("edge_daemon.worker.FULL_DISK_PAUSE_S", 0.02)
    rig.fake.stop()
    rig.start()
    rig.submit("t", ttl_s=50.0, meta=LARGE)
    wait_until(lambda: rig.edges == [False])
    fill(rig)
    rig.clock.advance(51)
    before = worker_of(rig).beats
    rig.wake()
    wait_until(lambda: worker_of(rig).beats > before + 5)
    assert returns(lambda: worker_of(rig).cancel("dev", "t"))
    with pytest.raises(StorageFull):
        worker_of(rig).expire()
    assert rig.finished == []
    make_room(rig)
    assert rig.result("t").state is TaskState.EXPIRED
    assert len(rig.told("t")) == 1


def test_a_full_disk_loses_no_cancel(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task cancelled just as it was set back ends so when there is room, is not run again, and holds up nobody."""
    monkeypatch.setattr("edge_daemon.worker.FULL_DISK_PAUSE_S", 0.02)
    rig.fake["a"].fault = Fault.ERROR_STATUS

    def cancel(status: Status) -> None:
        if status.state is TaskState.QUEUED:
            fill(rig)
            worker_of(rig).cancel("dev", "t")

    rig.on_status = cancel
    rig.start()
    rig.submit("t", meta=LARGE)
    wait_until(lambda: rig.seqs("t")[-1:] == [("queued", 3)])
    before = worker_of(rig).beats
    wait_until(lambda: worker_of(rig).beats > before + 5)
    assert returns(lambda: worker_of(rig).cancel("dev", "t"))
    assert not worker_of(rig).expire()
    assert rig.finished == []
    make_room(rig)
    assert rig.result("t").state is TaskState.CANCELLED
    assert len(rig.told("t")) == len(rig.chats()) == 1


def test_a_stream_ends_only_with_its_task(rig: Rig) -> None:
    """A cancel that finds no room changes nothing: the text goes on, and its end is told when it has come."""
    rig.fake["a"].answer = MANY_WORDS
    rig.fake["a"].token_s = 0.02
    rig.start()
    rig.submit("t", stream=True, meta=LARGE)
    wait_until(lambda: rig.chunks)
    rig.submit("urgent", priority=Priority.URGENT)
    rig.until_generating(2)
    fill(rig)
    worker_of(rig).cancel("dev", "t")
    assert [chunk for _, chunk in rig.chunks if "done" in chunk] == []
    make_room(rig)
    rig.fake["a"].token_s = 0.0
    assert rig.result("t").state is TaskState.SUCCEEDED
    chunks = [chunk for _, chunk in rig.chunks]
    assert [chunk for chunk in chunks if "done" in chunk] == chunks[-1:]
    assert "".join(chunk.get("text", "") for chunk in chunks) == rig.result("t").text
