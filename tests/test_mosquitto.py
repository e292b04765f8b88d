"""The tests' own broker and client: what the other tests rely on."""

import pytest
from paho.mqtt.enums import MQTTProtocolVersion

from tests.conftest import NewMosquitto
from tests.mosquitto import Mosquitto
from tests.mqtt_client import V5, V311, MqttClient
from tests.waiting import wait_until

pytestmark = pytest.mark.broker


@pytest.mark.parametrize("version", [V5, V311])
def test_a_message_arrives(mosquitto: Mosquitto, unique_node: str, version: MQTTProtocolVersion) -> None:
    """What one client publishes, another receives, in both protocol versions."""
    with MqttClient(mosquitto.host, mosquitto.port, version=version) as client:
        client.subscribe(f"{unique_node}/#")
        client.publish(f"{unique_node}/a", {"n": 1})
        received = client.wait_for_topic(f"{unique_node}/a")
    assert (received.json, received.qos, received.retain) == ({"n": 1}, 1, False)


def test_properties_and_retain_are_seen(mosquitto: Mosquitto, unique_node: str) -> None:
    """On MQTT 5 the client sees the properties and the retain flag as the sender set them."""
    properties = {"ResponseTopic": "reply/me", "CorrelationData": b"\x00\x01", "UserProperty": [("a", "b")]}
    with MqttClient(mosquitto.host, mosquitto.port) as client:
        client.subscribe(f"{unique_node}/#")
        client.publish(f"{unique_node}/a", "x", retain=True, properties=properties)
        received = client.wait_for_topic(f"{unique_node}/a")
        client.publish(f"{unique_node}/a", retain=True)
    assert received.retain
    assert received.properties == properties


def test_waiting_in_vain_fails(mosquitto: Mosquitto, unique_node: str) -> None:
    """A message or a condition that does not come within the time fails the test."""
    with (
        MqttClient(mosquitto.host, mosquitto.port) as client,
        pytest.raises(AssertionError, match="no such message"),
    ):
        client.wait_for_topic(unique_node, timeout_s=0.05)
    with pytest.raises(AssertionError, match="still not true"):
        wait_until(lambda: False, timeout_s=0.05)


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_persistence_survives(new_mosquitto: NewMosquitto, end: str) -> None:
    """With persistence a retained message outlives a stop, and once saved a kill, on the same port."""
    broker = new_mosquitto(persistence=True)
    with MqttClient(broker.host, broker.port) as client:
        client.publish("kept", "still here", retain=True)
    if end == "kill":
        broker.save()
    getattr(broker, end)()
    broker.start()
    with MqttClient(broker.host, broker.port) as client:
        client.subscribe("kept")
        assert client.wait_for_topic("kept").text == "still here"


@pytest.mark.parametrize("version", [V5, V311])
def test_a_session_keeps_messages(mosquitto: Mosquitto, unique_node: str, version: MQTTProtocolVersion) -> None:
    """A client with a session gets what was published while it was away."""
    session = MqttClient(mosquitto.host, mosquitto.port, version=version, client_id=unique_node, session_s=60)
    with session as client:
        client.subscribe(unique_node)
    with MqttClient(mosquitto.host, mosquitto.port) as other:
        other.publish(unique_node, "kept for you")
    again = MqttClient(mosquitto.host, mosquitto.port, version=version, client_id=unique_node, session_s=60)
    with again as client:
        assert client.wait_for_topic(unique_node).text == "kept for you"


def test_without_persistence_nothing_survives(new_mosquitto: NewMosquitto) -> None:
    """Without persistence a restarted broker is empty, and the client comes back to it by itself."""
    broker = new_mosquitto()
    with MqttClient(broker.host, broker.port) as client:
        client.publish("kept", "gone", retain=True)
        client.subscribe("#")
        client.wait_for_topic("kept")
        broker.kill()
        broker.start()
        wait_until(lambda: "SUBSCRIBE" in broker.log().rsplit("starting", 1)[-1])
        client.publish("after", "back")
        assert client.wait_for_topic("after").text == "back"
    assert [message.topic for message in client.messages] == ["kept", "after"]


def test_users_and_acl(new_mosquitto: NewMosquitto) -> None:
    """A broker with users and an ACL lets a known user in and keeps it to its topics."""
    broker = new_mosquitto(users={"ada": "secret"}, acl="user ada\ntopic readwrite mine/#\n")
    with MqttClient(broker.host, broker.port, username="ada", password="secret") as client:
        client.subscribe("#")
        client.publish("other/a", "no")
        client.publish("mine/a", "yes")
        client.wait_for_topic("mine/a")
        assert [message.topic for message in client.messages] == ["mine/a"]


def test_node_names_are_topic_levels(unique_node: str) -> None:
    """A unique node name has no character that means something in a topic."""
    assert unique_node.startswith("node-names-are-topic-levels-")
    assert not set(unique_node) & set("/+#$ ")
