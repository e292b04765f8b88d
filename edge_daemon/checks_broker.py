"""What ``edge-llm doctor`` looks at in the broker; neither it nor a running daemon is disturbed."""

import os
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from errno import EACCES
from functools import partial
from json import loads
from pathlib import Path

from edge_daemon.clock import iso
from edge_daemon.config import SENDER, is_here
from edge_daemon.errors import ConfigError
from edge_daemon.findings import Finding, Machine, fail, lines_of, ok, warn, whole
from edge_daemon.messages import Event, Status, TaskState, status_seq
from edge_daemon.mqtt_connection import BrokerRefuses, Device
from edge_daemon.preflight import secrets as read_secrets

BROKER_S = 5.0
ECHO_S = 1.0
KEPT_S = 0.5
"""What a broker keeps of a topic comes at once."""
MOSQUITTO_FILE = "etc/mosquitto/conf.d/edge-llm.conf"
MOSQUITTO_LINES = ("persistence true", "autosave_on_changes true", "autosave_interval 1", "max_queued_messages 1000000")
PASSWORDS = "/etc/mosquitto/edge-llm.passwd"
QUEUED = "max_queued_messages "
FEW_MESSAGES = 10_000
"""So many may wait for a daemon that is away for some hours; mosquitto drops more than 1000 unless it is told."""


def check_broker(machine: Machine) -> Iterator[Finding]:
    """It answers, takes our credentials, and lets us do what the daemon does; nobody else has our name."""
    mqtt = machine.config.mqtt
    place = f"{mqtt.host}:{mqtt.port}"
    yield from _mosquitto(machine)
    if not machine.try_broker and (untried := _untried(machine, place)):
        yield untried
        return
    _check_readable(machine)
    try:
        with Device(machine.config, password=_password(machine), timeout_s=BROKER_S) as device:
            yield ok("broker", f"{place} answers, MQTT {'5' if device.is_v5 else '3.1.1'}")
            yield from _Rights(machine, device).findings()
            yield from _namesake(machine, device)
    except ConfigError as error:
        yield fail("password", str(error), machine.edit)
    except BrokerRefuses as error:
        yield fail("broker", _unnamed(error), _credentials_remedy(machine))
    except OSError as error:
        yield fail("broker", _unnamed(error), _broker_remedy(machine))


def _unnamed(error: OSError) -> str:
    return str(error).removeprefix("broker ")


def _check_readable(machine: Machine) -> None:
    """Raises PermissionError when the service could read a secret, but whoever runs this command cannot."""
    config = machine.config
    named = (config.mqtt.password_file, config.mqtt.tls.key_file, config.http.tokens_file)
    for path in (*machine.credentials.values(), *named):
        if path and path.exists() and not os.access(path, os.R_OK):
            raise PermissionError(EACCES, os.strerror(EACCES), str(path))


def _password(machine: Machine) -> str | None:
    """The broker's. What systemd hands to the service is laid where the service would find it. Raises ConfigError."""
    handed = machine.credentials
    with tempfile.TemporaryDirectory(prefix="edge-llm-doctor-") as folder:
        for name, path in handed.items():
            Path(folder, name).symlink_to(path)
        if handed:
            os.environ["CREDENTIALS_DIRECTORY"] = folder
        try:
            return read_secrets(machine.config).password
        finally:
            if handed:
                del os.environ["CREDENTIALS_DIRECTORY"]


def _broker_remedy(machine: Machine) -> str:
    mqtt = machine.config.mqtt
    if not is_here(mqtt.host):
        return f"ping {mqtt.host}; or {machine.edit}   # mqtt.host, mqtt.port, mqtt.tls"
    if shutil.which("mosquitto", path=f"{os.environ.get('PATH', '')}:/usr/sbin"):
        return f"sudo systemctl enable --now mosquitto; or {machine.edit}   # mqtt.port, mqtt.tls"
    return "sudo apt install mosquitto mosquitto-clients"


def _credentials_remedy(machine: Machine) -> str:
    """A password where the broker looks for it, if it is a mosquitto of this machine whose settings we see."""
    mqtt, lines = machine.config.mqtt, _mosquitto_lines(machine)
    change = f"{machine.edit}   # mqtt.username and mqtt.password_file"
    if mqtt.username is None or not lines:
        return change if is_here(mqtt.host) else f"{change}, as {mqtt.host} knows them"
    named = next((line.split(maxsplit=1)[1] for line in lines if line.startswith("password_file ")), None)
    passwords = named or PASSWORDS
    make = f"sudo install -m 640 -g mosquitto /dev/null {passwords} && " if not named else ""
    name = f"echo 'password_file {passwords}' | sudo tee -a /{MOSQUITTO_FILE} && " if not named else ""
    give = f"sudo mosquitto_passwd {passwords} {mqtt.username} && sudo systemctl reload mosquitto"
    return f"{make}{name}{give}; or {change}"


class _Rights:
    """Whether the broker lets us do what the daemon does.

    A broker with MQTT 5 refuses a message in words. With 3.1.1 it takes what it will not deliver, and mosquitto agrees
    to every subscription in any version: whether something arrives is then seen by sending it to ourselves. Nothing
    that is sent here means anything to a daemon: an empty task is none, and the availability is repeated as it is.
    """

    def __init__(self, machine: Machine, device: Device) -> None:
        self._machine = machine
        self._device = device
        self._root = machine.config.topic_root
        self._token = secrets.token_hex(4)
        self._problems: list[str] = []

    def findings(self) -> Iterator[Finding]:
        """One, with all that is missing."""
        for topics in ("task/#", "cancel/#", "availability"):
            self._try(f"read {self._root}/{topics}", partial(self._device.subscribe, f"{self._root}/{topics}"))
        available = self._kept("availability") or b"offline"
        self._echo("availability", available, must_write=True)
        self._echo(f"task/doctor/{self._token}", b"", must_write=False)
        now = iso(self._machine.clock.wall())
        # Somebody may listen there who counts on what a daemon sends: a task that is over asks nothing of them.
        over = TaskState.CANCELLED
        status = Status(id=self._token, src="doctor", state=over, seq=status_seq(0, over), ts=now).to_json()
        event = Event(type="doctor", ts=now).to_json()
        for name, payload in ((f"reply/doctor/{self._token}/status", status), ("event/doctor", event)):
            topic = f"{self._root}/{name}"
            self._try(f"write {topic}", partial(self._device.publish, topic, payload))
        for prefix in self._machine.config.mqtt.reply_prefixes:
            topic = f"{prefix}doctor/{self._token}"
            self._try(f"write {prefix}#", partial(self._device.publish, topic, status))
        if not self._problems:
            yield ok("broker", f"we may do there what the daemon does under {self._root}")
            return
        who = self._machine.config.mqtt.username or "clients without a name"
        prefixes = [prefix.replace(SENDER, "+") for prefix in self._machine.config.mqtt.reply_prefixes]
        writes = [f"topic write {prefix}#" for prefix in prefixes]
        rules = ", ".join([f"topic readwrite {self._root}/#", *writes])
        text = f"the broker does not let {who} {'; '.join(dict.fromkeys(self._problems))}"
        yield fail("broker", text, f"in the broker's access rules, for {who}: {rules}")

    def _try(self, what: str, act: Callable[[], None]) -> None:
        try:
            act()
        except BrokerRefuses:
            self._problems.append(what)

    def _kept(self, name: str) -> bytes | None:
        """The retained payload of one of our topics."""
        return next((payload for topic, payload in self._heard(KEPT_S) if topic == f"{self._root}/{name}"), None)

    def _echo(self, name: str, payload: bytes, *, must_write: bool) -> None:
        """Send it to ourselves. The daemon need not write to its tasks, so it is no fault when we may not."""
        topic = f"{self._root}/{name}"
        try:
            self._device.publish(topic, payload)
        except BrokerRefuses:
            if must_write:
                self._problems.append(f"write {topic}")
            return
        if not any(heard == topic for heard, _ in self._heard(ECHO_S)) and (must_write or self._device.is_v5):
            self._problems.append(f"read {self._root}/{name.partition('/')[0]}{'/#' if '/' in name else ''}")

    def _heard(self, seconds: float) -> Iterator[tuple[str, bytes]]:
        until = time.monotonic() + seconds
        while message := self._device.get(until - time.monotonic()):
            yield message.topic, message.payload


def _namesake(machine: Machine, device: Device) -> Iterator[Finding]:
    """Two daemons of one name throw each other out of the broker."""
    root = machine.config.topic_root
    told: dict[str, bytes] = {}
    with suppress(BrokerRefuses):
        for name in ("availability", "info"):
            device.subscribe(f"{root}/{name}")
    until = time.monotonic() + KEPT_S
    while len(told) < 2 and (message := device.get(until - time.monotonic())):
        if message.payload:
            told[message.topic.removeprefix(f"{root}/")] = message.payload
    host = _host(told.get("info", b""))
    if told.get("availability") == b"online" and host not in (None, socket.gethostname()):
        yield fail(
            "node", f"{root} is served by another machine, {host}", f"{machine.edit}   # node: a name of its own"
        )


def _host(info: bytes) -> str | None:
    with suppress(ValueError, RecursionError, TypeError, KeyError):
        return str(loads(info)["host"])
    return None


def _mosquitto(machine: Machine) -> Iterator[Finding]:
    """As Debian ships it, it forgets and drops in silence."""
    lines = _mosquitto_lines(machine)
    if not lines:
        return
    missing = [line for line in MOSQUITTO_LINES if line not in lines]
    if _queues_enough(lines):
        missing = [line for line in missing if not line.startswith(QUEUED)]
    if not missing:
        yield ok("mosquitto", "it keeps what it has acknowledged")
        return
    text = f"it drops messages in silence, or forgets them when it is killed; it lacks: {', '.join(missing)}"
    if f"{QUEUED}0" in lines and missing[-1].startswith(QUEUED):
        text += " (in place of 0, with which it ends the connection of whoever may not write)"
    quoted = " ".join(f"'{line}'" for line in missing)
    add = rf"printf '%s\n' {quoted} | sudo tee -a /{MOSQUITTO_FILE} && sudo systemctl restart mosquitto"
    yield warn("mosquitto", text, add)


def _queues_enough(lines: list[str]) -> bool:
    """Whether the limit is high enough; 0, which is none, ends the connections of those whose message is refused."""
    limits = [whole(line.removeprefix(QUEUED)) for line in lines if line.startswith(QUEUED)]
    return bool(limits) and limits[-1] >= FEW_MESSAGES


def _untried(machine: Machine, place: str) -> Finding | None:
    """That we do not look, where it would or might end the connection of the daemon, and its session with it."""
    mqtt = machine.config.mqtt
    if mqtt.username is None and mqtt.tls.cert_file is None:
        return None
    if not is_here(mqtt.host):
        text = f"{place} is not tried: if it allows one connection per user, that would end the daemon's"
        return ok("broker", text, "edge-llm doctor --broker   # if it allows several")
    if _one_connection_per_user(machine):
        return ok("broker", f"{place} is not tried: it allows one connection per user, and the daemon needs that")
    return None


def _one_connection_per_user(machine: Machine) -> bool:
    """Whether the mosquitto of this machine gives a client the name of its user, on our listener."""
    port = ""
    for line in _mosquitto_lines(machine):
        name, *values = line.split() or [""]
        if name == "listener" and values:
            port = values[0]
        if (name, values) == ("use_username_as_clientid", ["true"]) and port in ("", str(machine.config.mqtt.port)):
            return True
    return False


def _mosquitto_lines(machine: Machine) -> list[str]:
    """The settings of a mosquitto on this machine; none when there is none, or when they are not ours to read."""
    folder = machine.root / "etc/mosquitto"
    lines: list[str] = []
    if is_here(machine.config.mqtt.host):
        with suppress(OSError):
            for file in (folder / "mosquitto.conf", *sorted(folder.glob("conf.d/*.conf"))):
                lines += [line.split("#")[0].strip() for line in lines_of(file)]
    return lines
