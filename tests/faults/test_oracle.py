"""The oracle itself: it is content with a good run, and sees everything that must not be."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edge_daemon.logger import HEADER
from tests.daemon import N, Row
from tests.faults.bench import Bench
from tests.faults.oracle import Evidence, Heard, Log, Sent, Usage, growth, read_log, told, violations
from tests.waiting import wait_until

KEY = ("dev", "t1")
RESULT: dict[str, Any] = {"id": "t1", "state": "succeeded", "seq": 4, "text": "yes", "attempt": 1, "ts": "2026-01-01"}
ROW = Row(seq=1, src="dev", id="t1", state="succeeded", attempt=1, sent=1, prompt="why?", result=RESULT)
QUEUED = Heard(key=KEY, kind="status", data={"state": "queued"})
REFUSED = Heard(key=KEY, kind="result", data=RESULT | {"state": "rejected"})
ENDED = Heard(key=KEY, kind="result", data=RESULT)
GOOD = Evidence(
    sent=[Sent(src="dev", id="t1", prompt="why?")],
    heard=[QUEUED, ENDED],
    stored=[ROW],
    log=Log(tasks=[{"src": "dev", "task_id": "t1"}]),
)


def test_a_good_run() -> None:
    """What was accepted, stored, told and logged once is as it should be; a repeated result is counted."""
    assert violations(GOOD) == []
    assert GOOD.duplicates() == 0
    assert replace(GOOD, heard=[QUEUED, ENDED, ENDED]).duplicates() == 1
    assert violations(replace(GOOD, heard=[QUEUED, ENDED, ENDED])) == []
    assert violations(replace(GOOD, heard=[REFUSED, QUEUED, ENDED])) == []


def test_what_was_let_go() -> None:
    """A task that has left a small store, or whose row has left a small log, was there in its time."""
    pruned = replace(GOOD, stored=[], store_may_prune=True)
    assert violations(pruned) == []
    assert violations(replace(pruned, heard=[QUEUED])) != []
    assert violations(replace(GOOD, log=Log(since="2026-01-02"))) == []
    assert violations(replace(GOOD, log=Log(since="2025-12-31"))) != []


def test_an_answer_that_was_asked_for_again() -> None:
    """A result that came again because its task was sent again is no duplicate."""
    asked = Heard(key=KEY, kind="status", data={"state": "queued", "duplicate": True})
    assert replace(GOOD, heard=[QUEUED, ENDED, asked, ENDED]).duplicates() == 0


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"stored": []}, "I1: dev/t1 was accepted and is not in the store"),
        ({"heard": [QUEUED]}, "I1: dev/t1 was accepted and its result never came"),
        ({"heard": [REFUSED, QUEUED]}, "I1: dev/t1 was accepted and its result never came"),
        ({"heard": [], "stored": [], "log": Log()}, "I1: dev/t1 'why?' came to nothing"),
        ({"stored": [ROW, ROW]}, "I2: dev/t1 is stored 2 times"),
        ({"stored": [replace(ROW, state="queued", result=None)]}, "I2: dev/t1 is queued"),
        ({"stored": [replace(ROW, state="failed")]}, "I2: dev/t1 is failed"),
        ({"stored": [replace(ROW, result=RESULT | {"attempt": 4})]}, "I2: dev/t1 was attempted 4 times"),
        ({"heard": [QUEUED, ENDED, replace(ENDED, data=RESULT | {"seq": 6})]}, "I2: dev/t1 is stored as"),
        ({"stored": [ROW, replace(ROW, seq=2, id="t2")]}, "I2: dev/t1 'why?' became 2 tasks"),
        ({"integrity": "row 1 missing from index"}, "I3: integrity_check says row 1 missing"),
        ({"log": Log()}, "I4: dev/t1 has ended and has no row"),
        ({"log": Log(tasks=[{"src": "dev", "task_id": "t1"}] * 2)}, "I4: dev/t1 has 2 rows"),
        ({"log": replace(GOOD.log, problems=["its last row is torn"])}, "I4: its last row is torn"),
    ],
)
def test_a_violation_is_seen(changes: dict[str, Any], complaint: str) -> None:
    """Each thing that must not be is complained about."""
    assert any(found.startswith(complaint) for found in violations(replace(GOOD, **changes)))


def test_a_broker_that_lost_its_state() -> None:
    """What the broker lost is counted and not blamed on the daemon; what the daemon had accepted is."""
    lost = replace(GOOD, heard=[], stored=[], log=Log(), broker_may_lose=True)
    assert violations(lost) == []
    assert [it.id for it in lost.lost_by_broker()] == ["t1"]
    assert violations(replace(lost, heard=[QUEUED])) == ["I1: dev/t1 was accepted and is not in the store"]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (HEADER.decode() + "torn", "its last row is torn"),
        ("a,b\n", "its header is"),
        (HEADER.decode() + "1,2\n", "rows have not 41 cells"),
    ],
)
def test_a_broken_log(tmp_path: Path, text: str, complaint: str) -> None:
    """A file that is torn, headless or ragged is no log."""
    path = tmp_path / "llm_metrics.csv"
    path.write_text(text, encoding="utf-8")
    assert any(complaint in problem for problem in read_log(path).problems)


def test_what_has_grown() -> None:
    """Growth beyond a tenth, and an event that did not come, are seen."""
    before = Usage(rss_bytes=100, fds=20, threads=8)
    assert growth(before, Usage(rss_bytes=109, fds=24, threads=10)) == []
    assert len(growth(before, Usage(rss_bytes=111, fds=25, threads=11))) == 3
    assert told(["broker_lost"], "broker_lost", "ollama_down") == ["I7: no event ollama_down"]


@pytest.mark.broker
def test_the_bench(tmp_path: Path) -> None:
    """Tasks in every form, a kill in their middle: all settles, and the oracle finds nothing."""
    with Bench(tmp_path, seed=1) as bench:
        bench.daemon.start()
        bench.traffic.send(40)
        bench.daemon.kill()
        bench.traffic.send(10)
        bench.daemon.start()
        assert bench.verdict() == []
        evidence = bench.evidence()
        assert len(evidence.sent) == 50
        assert len(evidence.log.tasks) == len(evidence.stored)


@pytest.mark.broker
def test_what_was_refused_and_came_again(tmp_path: Path) -> None:
    """A task that a stopping daemon has refused, and that was accepted all the same, is waited for until it has run."""
    with Bench(tmp_path, drain_timeout_s=0.1) as bench:
        bench.traffic.send(20, form="topic", model="slow", priority="low")
        wait_until(bench.traffic.all_confirmed)
        for it in bench.traffic.confirmed():
            bench.recorder.publish(f"{N}/reply/{it.src}/{it.id}/result", RESULT | {"id": it.id, "state": "rejected"})
        bench.daemon.start()
        assert bench.verdict() == []
        assert len(bench.evidence().answered()) == 21
