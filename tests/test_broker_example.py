"""The broker's configuration in `examples/mosquitto/` on a real mosquitto, with the whole daemon and devices."""

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from paho.mqtt.enums import MQTTProtocolVersion

from tests import needs
from tests.daemon import NODE, ROOT, DaemonProcess, N
from tests.fake_ollama import FakeModel, FakeOllama
from tests.mosquitto import ExampleMosquitto
from tests.mqtt_client import V5, V311, MqttClient
from tests.waiting import wait_until

pytestmark = pytest.mark.broker

USERS = {"edge-llm": "the daemon's", "door7": "of the door", "spy": "of the spy", "laptop": "secret"}
DAEMON = {"username": "edge-llm", "reply_prefixes": ["reply/<src>/"]}


@dataclass(frozen=True, kw_only=True)
class Site:
    """A broker as the example sets it up, and the daemon on it."""

    broker: ExampleMosquitto
    daemon: DaemonProcess

    @contextmanager
    def device(self, name: str, version: MQTTProtocolVersion = V5, **options: Any) -> Iterator[MqttClient]:
        """A connection with this device's password."""
        host, port, word = self.broker.host, self.broker.port, USERS[name]
        with MqttClient(host, port, version=version, username=name, password=word, **options) as client:
            yield client

    def denied(self, name: str) -> list[str]:
        """The topics that the broker did not let the client of this name write to, in order."""
        return re.findall(rf"Denied PUBLISH from {re.escape(name)} \(.*, '(.*)', \.\.\. ", self.broker.log())


@contextmanager
def a_site(directory: Path, ollama: FakeOllama) -> Iterator[Site]:
    """A broker and a daemon of one's own."""
    broker = ExampleMosquitto(directory, users=USERS)
    broker.start()
    password = directory / "mqtt_password"
    password.touch(mode=0o600)
    password.write_text(USERS["edge-llm"] + "\n", encoding="utf-8")
    mqtt = DAEMON | {"password_file": str(password)}
    try:
        with DaemonProcess(directory, broker, ollama_url=ollama.url, mqtt=mqtt) as daemon:
            yield Site(broker=broker, daemon=daemon)
            print(daemon.log())
    finally:
        broker.kill()


@pytest.fixture(scope="module")
def ollama() -> Iterator[FakeOllama]:
    """A model server that answers at once."""
    with FakeOllama(FakeModel("small", size_bytes=10**6)) as server:
        yield server


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, ollama: FakeOllama) -> Iterator[Site]:
    """One site for tests that stop nothing."""
    with a_site(tmp_path_factory.mktemp("site"), ollama) as site:
        yield site


@pytest.fixture(params=[V5, V311], ids=["5", "3.1.1"])
def version(request: pytest.FixtureRequest) -> MQTTProtocolVersion:
    """Both versions of MQTT."""
    chosen: MQTTProtocolVersion = request.param
    return chosen


def test_a_device_can_do_its_job(site: Site, version: MQTTProtocolVersion) -> None:
    """A device sends tasks, follows and cancels them, gets its answers where it likes, and sees how the board is."""
    with site.device("door7", version) as door:
        door.subscribe(f"{N}/reply/door7/#")
        door.subscribe("reply/door7/#")
        door.subscribe(f"{N}/+")
        door.publish(f"{N}/task/door7/{version}", "plain")
        assert door.wait_for_topic(f"{N}/reply/door7/{version}/text").text == "echo: plain"
        door.publish(f"{N}/task/door7", {"prompt": "JSON", "reply_to": f"reply/door7/{version}"})
        assert door.wait_for_topic(f"reply/door7/{version}").json["text"] == "echo: JSON"
        door.publish(f"{N}/cancel/door7/{version}", "x")
        seen = {m.topic.removeprefix(f"{N}/") for m in door.messages if "reply" not in m.topic}
        assert seen >= {"availability", "state", "info", "models"}
        assert "queue" not in seen
    assert site.denied("door7") == []


def test_the_commands_that_people_type(site: Site) -> None:
    """`mosquitto_pub` and `mosquitto_rr` work under a device's own name, and not on the bare task topic."""
    who = ["-h", site.broker.host, "-p", str(site.broker.port), "-u", "door7", "-P", USERS["door7"], "-q", "1"]
    answer = subprocess.run(
        [
            *(needs.tool("mosquitto_rr", package="mosquitto-clients"), "-V", "5", *who, "-W", "10"),
            *("-t", f"{N}/task/door7", "-e", "reply/door7/rr", "-m", "hello"),
        ],
        capture_output=True,
        timeout=15,
        check=True,
    )
    assert answer.stdout == b"echo: hello\n"
    bare = subprocess.run(
        [needs.tool("mosquitto_pub", package="mosquitto-clients"), "-V", "5", *who, "-t", f"{N}/task", "-m", "hello"],
        capture_output=True,
        timeout=15,
        check=False,
    )
    assert b"Not authorized" in bare.stderr


@pytest.mark.parametrize(("language", "program"), [("sh", ["bash", "-c"]), ("python", [sys.executable, "-c"])])
def test_the_clients_of_the_documents(site: Site, language: str, program: list[str]) -> None:
    """What docs/clients.md has people copy prints an answer, with the names of this site in it."""
    page = (ROOT / "docs" / "clients.md").read_text(encoding="utf-8")
    snippets = re.findall(rf"^```{language}\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    (code,) = (snippet for snippet in snippets if "Is 31 C hot?" in snippet)
    host, port = site.broker.host, str(site.broker.port)
    for name, here in {"pi1.lan": host, "-q 1": f"-q 1 -p {port}", "1883": port, "edge-llm/pi1": N}.items():
        code = code.replace(name, here)
    if language == "sh":
        needs.tool("mosquitto_rr", package="mosquitto-clients")
    said = subprocess.run([*program, code], capture_output=True, text=True, timeout=60, check=True)
    assert said.stdout == "echo: Is 31 C hot?\n"


FORBIDDEN = [
    f"{N}/task",
    f"{N}/task/door7",
    f"{N}/task/door7/1",
    f"{N}/task/_",
    f"{N}/task/spy/1/more",
    f"{N}/cancel",
    f"{N}/cancel/door7/1",
    f"{N}/reply/door7/1/result",
    f"{N}/reply/spy/1/result",
    f"{N}/availability",
    f"{N}/state",
    f"{N}/info",
    f"{N}/models",
    f"{N}/queue",
    f"{N}/telemetry",
    f"{N}/event/poison_result",
    "reply/door7/1",
    "edge-llm/other/task/door7",
    "$CONTROL/dynamic-security/v1",
    "home/lock/set",
    "$SYS/broker/version",  # the last, since mosquitto ends the connection over it
]


def test_a_device_cannot_write_as_another(site: Site, version: MQTTProtocolVersion) -> None:
    """A device can write neither another's tasks nor anybody's answers, nor what only the daemon or an admin may."""
    with site.device("spy", version, client_id=f"writer-{version}") as spy:
        for topic in FORBIDDEN:
            spy.publish(topic, "x")
    assert site.denied(f"writer-{version}") == FORBIDDEN


def test_a_device_cannot_read_what_is_anothers(site: Site, version: MQTTProtocolVersion) -> None:
    """Whatever a device subscribes to, it gets no task and no answer of another, and nothing of the broker's own."""
    with site.device("spy", version) as spy, site.device("door7", version) as door:
        for topic_filter in (
            *("#", "+/+/+/#", f"{N}/reply/door7/#", f"{N}/task/#", f"{N}/cancel/#", f"{N}/queue", f"{N}/event/#"),
            *("reply/#", "reply/door7/#", "$SYS/#", "$CONTROL/#", f"$share/spies/{N}/reply/#"),
        ):
            spy.subscribe(topic_filter)
        door.subscribe(f"{N}/reply/door7/#")
        door.publish(f"{N}/task/door7/s-{version}", {"prompt": "secret", "reply_to": f"reply/door7/s-{version}"})
        door.wait_for_topic(f"{N}/reply/door7/s-{version}/result")
        spy.publish(f"{N}/task/spy/own-{version}", "own")  # answered after it
        spy.wait_for_topic(f"{N}/reply/spy/own-{version}/text")
        seen = {m.topic.removeprefix(f"{N}/") for m in spy.messages}
    allowed = {"availability", "state", "info", "models", "telemetry"}
    assert {topic for topic in seen if not topic.startswith("reply/spy/")} <= allowed
    assert not any(b"secret" in m.payload for m in spy.messages)


def test_an_answer_cannot_be_sent_to_another(site: Site, version: MQTTProtocolVersion) -> None:
    """The daemon, which may write all answers, does not do it for a device that names another's topic."""
    with site.device("spy", version) as spy, site.device("door7", version) as door:
        spy.subscribe(f"{N}/reply/spy/#")
        door.subscribe("reply/door7/#")
        spy.publish(f"{N}/task/spy/f-{version}", {"prompt": "x", "reply_to": "reply/door7/forged"})
        result = spy.wait_for_topic(f"{N}/reply/spy/f-{version}/result").json
        assert door.messages == []
    assert (result["state"], result["error"]["code"]) == ("rejected", "forbidden_reply_topic")


@pytest.mark.parametrize(
    ("username", "password"), [(None, None), ("door7", "wrong"), ("nobody", "x"), ("edge-llm", "")]
)
def test_nobody_without_a_password(site: Site, username: str | None, password: str | None) -> None:
    """Who gives no name, no password or a wrong one is not let in."""
    with (
        pytest.raises(AssertionError, match="no connection"),
        MqttClient(site.broker.host, site.broker.port, username=username, password=password, timeout_s=1),
    ):
        pass


def test_the_daemon_has_the_rights_that_it_needs(tmp_path: Path, ollama: FakeOllama) -> None:
    """From start to stop, with tasks, refusals and a cancel, nothing that the daemon does is forbidden to it."""
    with a_site(tmp_path, ollama) as site, site.device("door7") as door:
        door.subscribe(f"{N}/#")
        door.publish(f"{N}/task/door7/1", {"prompt": "x", "stream": True})
        door.publish(f"{N}/task/door7/2", "{")
        door.publish(f"{N}/cancel/door7/1", "x")
        for number in (1, 2):
            door.wait_for_topic(f"{N}/reply/door7/{number}/result")
        wait_until(
            lambda: site.broker.log().count(f"Received PUBLISH from edge-llm-{NODE} (d0, q0, r0, m0, '{N}/te") > 1
        )
        assert site.daemon.stop() == 0
        door.wait_for(lambda m: (m.topic, m.text) == (f"{N}/availability", "offline"))
        state = [m.json["state"] for m in door.messages if m.topic == f"{N}/state"]
        assert site.denied(f"edge-llm-{NODE}") == []
        assert "Error" not in site.broker.log()
    assert state[-1] == "stopped"
    assert not re.search(r"warning|error", site.daemon.log())


def test_what_the_broker_has_acknowledged_survives_its_kill(tmp_path: Path, ollama: FakeOllama) -> None:
    """Tasks that the broker took while the daemon was away are answered although the broker was killed in between."""
    with a_site(tmp_path, ollama) as site:
        with site.device("door7") as door:
            site.daemon.kill()
            for number in range(50):
                door.publish(f"{N}/task/door7/{number}", "x")
        wait_until(lambda: b"task/door7/49" in (tmp_path / "mosquitto.db").read_bytes())
        site.broker.kill()
        site.broker.start()
        site.daemon.start()
        wait_until(lambda: len(site.daemon.rows("task")) == 50, timeout_s=20)


def test_the_broker_keeps_more_than_its_default(tmp_path: Path) -> None:
    """For the daemon's session, more than the 1000 messages are kept beyond which mosquitto drops by itself."""
    broker = ExampleMosquitto(tmp_path, users=USERS)
    config = tmp_path / "conf.d" / "edge-llm.conf"
    text = config.read_text(encoding="utf-8")  # for speed, the only change
    config.write_text(text.replace("autosave_on_changes true", "autosave_on_changes false"), encoding="utf-8")
    broker.start()
    as_daemon: dict[str, Any] = {
        "client_id": "d",
        "session_s": 60,
        "username": "edge-llm",
        "password": USERS["edge-llm"],
    }
    try:
        with MqttClient(broker.host, broker.port, **as_daemon) as daemon:
            daemon.subscribe(f"{N}/task/#")
        with MqttClient(broker.host, broker.port, username="door7", password=USERS["door7"]) as door:
            for number in range(1100):
                door.publish(f"{N}/task/door7/{number}", "x")
        with MqttClient(broker.host, broker.port, **as_daemon) as daemon:
            daemon.wait_for_topic(f"{N}/task/door7/1099")
        assert len(daemon.messages) == 1100
    finally:
        broker.kill()
