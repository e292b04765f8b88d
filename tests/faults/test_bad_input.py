"""All of `tests.bad_input` through a real broker, in both MQTTs: everything is answered, nothing is disturbed."""

import csv
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from edge_daemon.logger import COLUMNS
from edge_daemon.mqtt_connection import MAX_INCOMING_BYTES
from tests import bad_input
from tests.bad_input import CASES, Case
from tests.daemon import DaemonProcess, N, Watcher
from tests.fake_ollama import FakeModel, FakeOllama
from tests.mosquitto import Mosquitto

pytestmark = pytest.mark.broker

SMALL = 10**6
NASTY = "=1+1\r\n\"quoted\", 'x'\0\x1b[31m\u202e\n@SUM(A1)"
"""An answer that tries to break out of its cell."""
PROPERTIES = {"content_type": "ContentType", "reply_to": "ResponseTopic", "correlation": "CorrelationData"}


@dataclass(frozen=True, kw_only=True)
class Lab:
    """A broker, a model server and a daemon, which all cases meet in one stream."""

    protocol: str
    daemon: DaemonProcess
    client: Watcher
    results: dict[str, list[Any]]
    """What came on the result topics, by sender."""
    statuses: dict[str, list[Any]]

    @property
    def cases(self) -> dict[str, Case]:
        """Those that this version of MQTT can carry, by sender."""
        carried = ((f"bad-{n}", case) for n, case in enumerate(CASES))
        return {src: case for src, case in carried if (case.mqtt if self.protocol == "5" else case.mqtt_3)}


@pytest.fixture(scope="module", params=["5", "3.1.1"])
def lab(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """Everything has been sent and answered."""
    directory = tmp_path_factory.mktemp("bad")
    broker = Mosquitto(directory, extra="max_queued_messages 0")
    models = [FakeModel(name, size_bytes=SMALL) for name in ("default", "small")]
    models += [FakeModel("huge", size_bytes=10**15), FakeModel("nasty", size_bytes=SMALL, answer=NASTY)]
    settings = {"default": "default", "defaults": {"num_ctx": bad_input.NUM_CTX}}
    broker.start()
    try:
        with (
            FakeOllama(*models) as ollama,
            DaemonProcess(
                directory, broker, ollama_url=ollama.url, mqtt={"protocol": request.param}, models=settings
            ) as daemon,
            Watcher(broker) as client,
        ):
            lab = Lab(
                protocol=request.param,
                daemon=daemon,
                client=client,
                results=defaultdict(list),
                statuses=defaultdict(list),
            )
            _send_all(lab)
            for message in client.messages:
                if message.topic.startswith(f"{N}/reply/"):
                    src, _, kind = message.topic.removeprefix(f"{N}/reply/").split("/")
                    if kind in ("result", "status"):
                        (lab.results if kind == "result" else lab.statuses)[src].append(message.json)
            yield lab
    finally:
        broker.kill()


def _send_all(lab: Lab) -> None:
    """Every case, a good task after each, and a last one that is answered when all are."""
    for count, (src, case) in enumerate(lab.cases.items()):
        levels = [case.beside.get("src", src), *([case.beside["id"]] if "id" in case.beside else [])]
        lab.client.publish("/".join([f"{N}/task", *levels]), case.payload, properties=_properties(case))
        lab.client.publish(f"{N}/task/good/{count}", "a good one")
    lab.client.publish(f"{N}/task/empty/1", b"")
    lab.client.publish(f"{N}/task/giant/1", b"x" * (MAX_INCOMING_BYTES + 1))
    lab.client.publish(f"{N}/task/too/many/levels", "lost")
    lab.client.publish(f"{N}/task/good/nasty", {"prompt": "be nasty", "model": "nasty"})
    lab.client.result("good", "nasty", timeout_s=60)
    lab.client.publish(f"{N}/task/good/last", "a good one")
    lab.client.result("good", "last", timeout_s=60)


def _properties(case: Case) -> dict[str, Any]:
    properties = {PROPERTIES[name]: value for name, value in case.beside.items() if name in PROPERTIES}
    if fields := case.beside.get("fields"):
        properties["UserProperty"] = list(fields.items())
    return properties


def test_everything_is_answered(lab: Lab) -> None:
    """Every refusal has its code and says what is wrong; what only looks bad is served. One result each."""
    told = {}
    for src, case in lab.cases.items():
        if "src" in case.beside:
            continue  # the answer goes to nobody's place
        (result,) = lab.results[src]
        error = result["error"] or {"code": None, "message": ""}
        says = error["message"] if case.code else "".join(lab.statuses[src][0]["warnings"][:1])
        told[case.name] = (result["state"], error["code"], case.says.lower() in says.lower())
    assert told == {
        case.name: ("rejected" if case.code else "succeeded", case.code, True)
        for case in lab.cases.values()
        if "src" not in case.beside
    }


def test_a_sender_without_a_good_name_is_answered(lab: Lab) -> None:
    """The refusal of a name that cannot be a topic goes to nobody's place."""
    nameless = [case for case in lab.cases.values() if "src" in case.beside]
    errors = [result["error"] for result in lab.results["_"]]
    assert [(error["code"], error["message"][:4]) for error in errors] == [("invalid_field", "src:")] * len(nameless)


def test_nobody_else_is_answered(lab: Lab) -> None:
    """Nothing comes for an empty message or an unknown topic, and nothing at a reply topic that was refused."""
    wanted = {src for src, case in lab.cases.items() if "src" not in case.beside} | {"_", "good", "giant"}
    assert lab.results.keys() | {"giant"} == wanted
    elsewhere = {message.topic for message in lab.client.messages if not message.topic.startswith(f"{N}/")}
    assert elsewhere == ({"reply/good"} if lab.protocol == "5" else set())


def test_a_giant_is_kept_from_us(lab: Lab) -> None:
    """A message that would fill the memory of a small board stays with an MQTT 5 broker; with 3.1.1 it is refused."""
    errors = [result["error"]["code"] for result in lab.results["giant"]]
    assert errors == ([] if lab.protocol == "5" else ["too_large"])


def test_good_tasks_between_them_are_served(lab: Lab) -> None:
    """A good task after each bad one is answered, on one connection that never broke, without a trace."""
    assert {result["state"] for result in lab.results["good"]} == {"succeeded"}
    assert len(lab.results["good"]) == len(lab.cases) + 2
    assert lab.daemon.connections() == 1
    assert lab.daemon.is_alive()
    assert "Traceback" not in lab.daemon.log()


def test_the_journal_cannot_be_forged(lab: Lab) -> None:
    """Nothing of what was sent begins a line of the journal or colours it."""
    log = lab.daemon.log()
    assert "\x1b" not in log
    assert "\u202e" not in log
    assert not [line for line in log.splitlines() if line.startswith("forged")]


def test_the_csv_is_whole(lab: Lab) -> None:
    """Every row can be read, has all its cells, and is no formula; each task that was served has one."""
    with lab.daemon.csv_path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert {len(row) for row in rows} == {len(COLUMNS)}
    assert not [cell for row in rows for cell in row if cell[:1] in tuple("=+@\t\r\n") or cell[:1] == "\uff1d"]
    tasks = [dict(zip(COLUMNS, row, strict=True)) for row in rows if row[COLUMNS.index("record")] == "task"]
    served = sum(1 for results in lab.results.values() for result in results if result["state"] == "succeeded")
    assert len(tasks) == served
    (nasty,) = (task for task in tasks if task["task_id"] == "nasty")
    assert nasty["result"] == "'" + NASTY.replace("\0", "")
