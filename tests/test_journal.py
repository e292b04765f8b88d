"""What a person reads with journalctl: kinds of lines, one line for each task, and no flood."""

import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_daemon import systemd
from edge_daemon.journal import EACH, Kind, about
from edge_daemon.messages import Address, Failure, Refused, Result, TaskState
from edge_daemon.mqtt_bridge import REFUSALS, _RefusalLog
from tests.conftest import NewMosquitto
from tests.daemon import DaemonProcess, N, Watcher
from tests.fake_ollama import FakeModel, FakeOllama
from tests.fakes import FakeClock
from tests.waiting import wait_until

PAGE = Path(__file__).parent.parent / "docs" / "journal.md"


def test_kinds_are_told_apart() -> None:
    """Every kind of line has an id of its own, in the journal's form, and stands in the documentation with it."""
    ids = [kind.value for kind in Kind]
    assert len(set(ids)) == len(Kind.__members__)
    assert all(re.fullmatch("[0-9a-f]{32}", message_id) for message_id in ids)
    listed = dict(re.findall(r"^\| (\w+) \| `([0-9a-f]+)` \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE))
    assert listed == {kind.name.lower(): kind.value for kind in Kind}


class Lines:
    """A logger with the flood's filter, on a clock that stands still."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.seen: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: self.seen.append(record.getMessage())  # type: ignore[method-assign]
        self.flood = systemd.Flood(clock=self.clock.monotonic)
        handler.addFilter(self.flood)
        self.log = logging.Logger("edge_daemon.test", logging.DEBUG)  # noqa: LOG001  # not in the tree
        self.log.addHandler(handler)


def test_a_flood_is_summed_up() -> None:
    """Of many like lines the first are written, and how many were left out with the first one after the time."""
    lines = Lines()
    for number in range(1000):
        lines.log.info("refused %s", number)
    assert lines.seen == [f"refused {number}" for number in range(systemd.BURST)]
    lines.log.warning("another kind: 100 %")
    assert lines.seen[-1] == "another kind: 100 %"
    lines.clock.advance(systemd.PERIOD_S)
    lines.log.info("refused %s", "50 %")
    assert lines.seen[-1] == f"refused 50 % (and {1000 - systemd.BURST} more such lines before)"
    lines.log.info("refused %s", 7)
    assert lines.seen[-1] == "refused 7"


def test_kinds_without_end() -> None:
    """Lines whose every text is another one pass, and take no memory for ever."""
    lines = Lines()
    for number in range(3 * systemd.KINDS):
        lines.log.info(f"text {number}")  # noqa: G004  # as some libraries do
    assert len(lines.seen) == 3 * systemd.KINDS
    assert len(lines.flood._since) <= systemd.KINDS


@pytest.mark.parametrize("kind", [Kind.TASK_ENDED, None])
def test_no_flood(kind: Kind | None) -> None:
    """The line in which a task ends is never left out, nor are lines that somebody has asked for."""
    lines = Lines()
    for number in range(100):
        if kind in EACH:
            lines.log.info("task %d", number, extra=about(Kind.TASK_ENDED))
        else:
            lines.log.debug("task %d", number)
    assert len(lines.seen) == 100


def test_a_flood_of_refusals(caplog: pytest.LogCaptureFixture) -> None:
    """However many tasks are refused at once, there are so many lines and no more."""
    caplog.set_level(logging.INFO)
    result = Result(id="a", src="b", seq=1, state=TaskState.REJECTED, error=Failure(code="x", message="y"), ts="")
    refusals = _RefusalLog()
    for _ in range(3 * REFUSALS):
        refusals.note(Refused(address=Address(src="b", id="a"), result=result))
    assert len(caplog.records) == REFUSALS
    assert caplog.records[0].__dict__["fields"]["TASK_ID"] == "a"


@pytest.fixture
def ollama() -> Iterator[FakeOllama]:
    """A model that works, and one that cannot be loaded."""
    broken = FakeModel("broken", size_bytes=1_000_000, load_error=(500, "llama runner process has terminated"))
    with FakeOllama(FakeModel("small", size_bytes=1_000_000), broken) as server:
        yield server


def test_one_line_for_a_task(tmp_path: Path, new_mosquitto: NewMosquitto, ollama: FakeOllama) -> None:
    """A task has one line at level info, a lost broker one when it goes and one when it comes; no secret is in any."""
    broker = new_mosquitto(persistence=True)
    secret = tmp_path / "password"
    secret.write_text("hunter2-secret", encoding="utf-8")
    secret.chmod(0o600)
    mqtt = {"username": "u", "password_file": str(secret)}
    with (
        DaemonProcess(tmp_path, broker, ollama_url=ollama.url, mqtt=mqtt) as daemon,
        Watcher(broker) as client,
    ):
        for number in range(3):
            client.publish(f"{N}/task/door/t{number}", "a prompt of mine")
            client.result("door", f"t{number}")
        broker.stop()
        wait_until(lambda: "broker " in daemon.log().partition("connected, MQTT")[2])
        broker.start()
        daemon.wait_ready()
        wait_until(lambda: daemon.log().count("connected, MQTT") == 2)
        wait_until(lambda: daemon.log().count("task door/t2 ") == 1)
        lines = daemon.log().splitlines()
        assert len([line for line in lines if "door/t1" in line]) == 1
        assert len([line for line in lines if " warning " in line]) == 1
        assert "a prompt of mine" not in daemon.log()
        daemon.configure(log={"level": "debug"})
        daemon.restart()
        client.publish(f"{N}/task/door/again", "a prompt of mine")
        wait_until(lambda: len([line for line in daemon.log().splitlines() if "task door/again " in line]) == 3)
        assert daemon.stop() == 0
        assert "hunter2" not in daemon.log()
        assert "a prompt of mine" not in daemon.log()


def test_a_load_that_fails_is_told_once(tmp_path: Path, new_mosquitto: NewMosquitto, ollama: FakeOllama) -> None:
    """A model that cannot be loaded is tried again for its task, and told of once."""
    broker = new_mosquitto()
    with DaemonProcess(tmp_path, broker, ollama_url=ollama.url) as daemon, Watcher(broker) as client:
        client.publish(f"{N}/task/door/t", {"model": "broken", "prompt": "x"})
        assert client.result("door", "t", timeout_s=30)["state"] == "failed"
        assert daemon.log().count("could not load broken") == 1
