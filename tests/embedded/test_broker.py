"""The embedded broker: a real mosquitto or amqtt, and real MQTT clients."""

import socket
import struct
from pathlib import Path

import psutil
import pytest

from edge_daemon.embedded import BrokerChild, EmbeddedError, PortTaken, start_broker
from edge_daemon.embedded.launch import BrokerKind
from tests import needs
from tests.mqtt_client import V5, V311, MqttClient

KINDS: list[BrokerKind] = ["mosquitto", "amqtt"]


def start(kind: BrokerKind, directory: Path, port: int = 0) -> BrokerChild:
    """A broker of this kind."""
    if kind == "mosquitto":
        needs.tool("mosquitto", package="mosquitto")
    else:
        pytest.importorskip("amqtt")
    return start_broker(port, directory, kind=kind)


@pytest.mark.parametrize("kind", KINDS)
def test_messages_pass_at_qos_1(kind: BrokerKind, tmp_path: Path) -> None:
    """Once started, a broker accepts anonymous clients and delivers what they publish."""
    version = V5 if kind == "mosquitto" else V311
    with start(kind, tmp_path) as broker:
        assert (broker.kind, broker.host) == (kind, "127.0.0.1")
        with MqttClient(broker.host, broker.port, version=version) as client:
            client.subscribe("a/#", qos=1)
            client.publish("a/b", "hello", qos=1)
            assert client.wait_for_topic("a/b").text == "hello"


@pytest.mark.parametrize("kind", KINDS)
def test_a_client_gets_only_what_it_subscribed_to(kind: BrokerKind, tmp_path: Path) -> None:
    """The retained messages of somebody else's subscription do not come to a client that connects later."""
    version = V5 if kind == "mosquitto" else V311
    with start(kind, tmp_path) as broker, MqttClient(broker.host, broker.port, version=version) as daemon:
        daemon.subscribe("availability", qos=1)
        daemon.publish("availability", "online", qos=1, retain=True)
        daemon.publish("answer", "4", qos=1, retain=True)
        with MqttClient(broker.host, broker.port, version=version) as client:
            client.subscribe("answer", qos=1)
            assert client.wait_for_topic("answer").text == "4"
            assert [message.topic for message in client.messages] == ["answer"]


def test_a_client_of_another_protocol_leaves_no_traceback(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """MQTT 5 is refused by amqtt, also when the client has hung up before it could be told."""
    connect = bytes.fromhex("100d00044d5154540502003c00000000")
    with start("amqtt", tmp_path) as broker:
        with socket.create_connection((broker.host, broker.port)) as hasty:
            hasty.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            hasty.sendall(connect)
        with MqttClient(broker.host, broker.port, version=V311) as client:
            client.subscribe("a", qos=1)
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("kind", KINDS)
def test_only_loopback_is_served(kind: BrokerKind, tmp_path: Path) -> None:
    """Nobody outside this machine can reach a broker that lets everybody in."""
    with start(kind, tmp_path) as broker:
        process = psutil.Process(broker.process.pid)
        listening = [it.laddr for it in process.net_connections() if it.status == psutil.CONN_LISTEN]
        assert listening == [("127.0.0.1", broker.port)]


@pytest.mark.parametrize("kind", KINDS)
def test_stopping_leaves_no_process(kind: BrokerKind, tmp_path: Path) -> None:
    """After `stop` the process is gone, the port is free, and stopping again does no harm."""
    broker = start(kind, tmp_path)
    broker.stop()
    broker.stop()
    assert not psutil.pid_exists(broker.process.pid)
    with start(kind, tmp_path, broker.port) as again:
        assert again.port == broker.port


@pytest.mark.parametrize("kind", KINDS)
def test_a_port_in_use_is_named(kind: BrokerKind, tmp_path: Path) -> None:
    """The error says which port is taken, so that a command can name its option."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(PortTaken, match=str(port)) as error:
            start(kind, tmp_path, port)
        assert error.value.port == port


def test_a_port_that_cannot_be_is_an_error(tmp_path: Path) -> None:
    """A number that is no port is refused with a sentence."""
    with pytest.raises(EmbeddedError, match="70000"):
        start("mosquitto", tmp_path, 70_000)


def test_mosquitto_keeps_messages_over_a_restart(tmp_path: Path) -> None:
    """What an absent client's session is owed survives a stop of the broker, in a directory with any name."""
    directory = tmp_path / "a folder"
    with start("mosquitto", directory) as broker:
        port = broker.port
        with MqttClient(broker.host, port, client_id="absent", session_s=3600) as client:
            client.subscribe("a", qos=1)
        with MqttClient(broker.host, port) as client:
            client.publish("a", "kept", qos=1)
    with (
        start("mosquitto", directory, port) as broker,
        MqttClient(broker.host, port, client_id="absent", session_s=3600) as client,
    ):
        assert client.wait_for_topic("a").text == "kept"


def test_without_any_broker_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither mosquitto nor amqtt at hand: one sentence tells how to get one."""
    monkeypatch.setattr("shutil.which", lambda *_args, **_options: None)
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(EmbeddedError, match=r"apt install mosquitto.*\[embedded\]"):
        start_broker(0, tmp_path)
