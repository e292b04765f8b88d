"""TLS and mutual TLS: the whole daemon on a real mosquitto, with certificates of every kind of badness."""

import json
import re
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from edge_daemon.cli import main
from tests.certificates import Authority, Certificate
from tests.daemon import DaemonProcess, N
from tests.fake_ollama import FakeModel, FakeOllama
from tests.mosquitto import ExampleMosquitto
from tests.mqtt_client import MqttClient
from tests.needs import tool
from tests.waiting import wait_until

pytestmark = pytest.mark.broker

USERS = {"edge-llm": "the daemon's", "door7": "of the door"}
HERE = "IP:127.0.0.1,DNS:localhost"


@dataclass(frozen=True, kw_only=True)
class Site:
    """A broker with TLS, its authority, and what daemons on it need."""

    directory: Path
    broker: ExampleMosquitto
    ca: Authority
    ollama: FakeOllama

    @contextmanager
    def daemon(self, *, ca: Path | None = None, own: Certificate | None = None, **mqtt: Any) -> Iterator[DaemonProcess]:
        """A daemon that reaches the broker by TLS; `own` is its certificate, else it has a password."""
        password = self.directory / "mqtt_password"
        password.touch(mode=0o600)
        password.write_text(USERS["edge-llm"], encoding="utf-8")
        tls = {"enabled": True, "ca_file": str(ca or self.ca.certificate)}
        if own:
            tls |= {"cert_file": str(own.certificate), "key_file": str(own.key)}
        who = {} if own else {"username": "edge-llm", "password_file": str(password)}
        daemon = DaemonProcess(
            self.directory,
            self.broker,
            ollama_url=self.ollama.url,
            port=self.broker.tls_port,
            mqtt={"tls": tls} | who | mqtt,
        )
        try:
            daemon.start(ready=False)
            yield daemon
            print(daemon.log())
        finally:
            daemon.kill()

    def door(self) -> MqttClient:
        """A device on this machine, without TLS."""
        return MqttClient(self.broker.host, self.broker.port, username="door7", password=USERS["door7"])

    def let_in(self) -> list[str]:
        """The connections of the daemon that the broker has accepted."""
        return [line for line in self.broker.log().splitlines() if "New client" in line and "edge-llm" in line]


@contextmanager
def a_site(directory: Path, *, address: str = HERE, days: int = 30, mutual: bool = False) -> Iterator[Site]:
    """A broker whose certificate is for `address` and holds for `days`."""
    broker = ExampleMosquitto(directory, users=USERS, tls=True, mutual=mutual)
    ca = Authority(directory / "certs")
    ca.issue("server", address=address, days=days)
    broker.start()
    try:
        with FakeOllama(FakeModel("small", size_bytes=10**6)) as ollama:
            yield Site(directory=directory, broker=broker, ca=ca, ollama=ollama)
    finally:
        broker.kill()


def serves(site: Site) -> None:
    """Return once a task has been answered."""
    with site.door() as door:
        door.subscribe(f"{N}/+")
        door.subscribe(f"{N}/reply/door7/#")
        door.wait_for(lambda m: (m.topic, m.text) == (f"{N}/availability", "online"))
        door.publish(f"{N}/task/door7/1", "hello")
        assert door.wait_for_topic(f"{N}/reply/door7/1/text").text == "echo: hello"


def is_refused(site: Site, daemon: DaemonProcess, *words: str) -> None:
    """Return once the daemon has said so in these words, and has seen to it that nobody is talked to all the same."""
    wait_until(lambda: all(word in daemon.log() for word in words))
    wait_until(lambda: site.broker.log().count("New connection from") >= 3)  # it tries again
    assert daemon.is_alive()
    assert site.let_in() == []
    assert len([line for line in daemon.log().splitlines() if "warning" in line or "error" in line]) == 1
    assert daemon.stop() == 0


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_the_right_certificate(tmp_path: Path, host: str, protocol: str) -> None:
    """With the authority of the broker's certificate and its right name, the daemon serves, as the example says."""
    with a_site(tmp_path) as site, site.daemon(host=host, protocol=protocol) as daemon:
        serves(site)
        assert daemon.stop() == 0
    assert len(site.let_in()) == 1
    assert "u'edge-llm'" in site.let_in()[0]


@pytest.mark.parametrize(
    ("server", "words"),
    [
        ({"address": "DNS:elsewhere"}, ["certificate verify failed", "not valid for '127.0.0.1'"]),
        ({"address": HERE, "days": -1}, ["certificate verify failed", "has expired"]),
    ],
    ids=["wrong name", "expired"],
)
def test_a_wrong_server_is_not_talked_to(tmp_path: Path, server: Mapping[str, Any], words: list[str]) -> None:
    """A broker whose certificate is for another name, or has expired, is refused, and the daemon says why."""
    with a_site(tmp_path, **server) as site, site.daemon() as daemon:
        is_refused(site, daemon, *words)


def test_a_stranger_is_not_talked_to(tmp_path: Path) -> None:
    """A broker whose certificate is from another authority is refused; so is any when ours are those of the system."""
    other = Authority(tmp_path / "other")
    with a_site(tmp_path) as site, site.daemon(ca=other.certificate) as daemon:
        is_refused(site, daemon, "certificate verify failed", "unable to get local issuer")


def test_a_broker_without_tls_is_not_talked_to(tmp_path: Path) -> None:
    """On a port without TLS nothing is sent in the clear, not even when it is our own broker's."""
    with a_site(tmp_path) as site, site.daemon(port=site.broker.port) as daemon:
        wait_until(lambda: "trying again" in daemon.log())
        wait_until(lambda: site.broker.log().count("New connection from") >= 2)
        assert site.let_in() == []
        assert daemon.stop() == 0


def test_mutual_tls(tmp_path: Path) -> None:
    """A daemon with a certificate of the broker's authority needs no password; its name is the common name in it."""
    with a_site(tmp_path, mutual=True) as site, site.daemon(own=site.ca.issue("edge-llm")) as daemon:
        serves(site)
        assert daemon.stop() == 0
    assert "u'edge-llm'" in site.let_in()[0]


@pytest.mark.parametrize("said", ["certificate required", "unknown ca", "certificate expired"])
def test_mutual_tls_without_a_right_certificate(tmp_path: Path, said: str) -> None:
    """A daemon that the broker does not know by its certificate is not let in, and says what the broker says."""
    with a_site(tmp_path, mutual=True) as site:
        certificates = {
            "certificate required": None,
            "unknown ca": Authority(tmp_path / "other", "stranger").issue("edge-llm"),
            "certificate expired": site.ca.issue("edge-llm", days=-1),
        }
        with site.daemon(own=certificates[said]) as daemon:
            is_refused(site, daemon, said)


def test_a_device_cannot_take_the_daemons_session(tmp_path: Path) -> None:
    """On the listener for devices the client id is the user's name: nobody can pass for the daemon by its id."""
    with a_site(tmp_path) as site, site.daemon() as daemon:
        serves(site)
        command = [tool("mosquitto_pub", package="mosquitto-clients"), "-V", "5", "-q", "1", "-i", "edge-llm"]
        where = ["-h", "127.0.0.1", "-p", str(site.broker.tls_port), "--cafile", str(site.ca.certificate)]
        who = ["-u", "door7", "-P", USERS["door7"]]
        subprocess.run([*command, *where, *who, "-t", f"{N}/task/door7/2", "-m", "x"], check=True, timeout=10)
        wait_until(lambda: len(daemon.rows("task")) == 2)
    assert len(site.let_in()) == 1


def test_a_certificate_that_is_renewed(tmp_path: Path) -> None:
    """New certificates are read at the next connection; while their file is missing, the daemon waits for it."""
    with a_site(tmp_path) as site, site.daemon() as daemon:
        serves(site)
        site.broker.stop()
        (tmp_path / "certs/ca.crt").rename(tmp_path / "old.crt")
        wait_until(lambda: "mqtt.tls.ca_file: " in daemon.log(), timeout_s=20)
        Authority(tmp_path / "certs").issue("server", address=HERE)
        site.broker.start()
        serves(site)
        assert daemon.stop() == 0


def test_files_that_cannot_be_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A certificate or key that is missing, no such thing, of another pair or locked by a phrase is named; exit 78."""
    ca = Authority(tmp_path)
    one, other = ca.issue("one"), ca.issue("other")
    locked, text = tmp_path / "locked.key", tmp_path / "text"
    text.write_text("no certificate", encoding="utf-8")
    subprocess.run(
        [tool("openssl", package="openssl"), "ec", "-aes256", "-passout", "pass:x", "-in", one.key, "-out", locked],
        check=True,
        capture_output=True,
    )
    cases = {
        "ca_file: .*No such file": {"ca_file": tmp_path / "missing"},
        "ca_file: .*not in PEM form": {"ca_file": text},
        "cert_file: .*No such file": {"cert_file": tmp_path / "missing", "key_file": one.key},
        "cert_file: .*not in PEM form": {"cert_file": text, "key_file": one.key},
        "key_file: .*No such file": {"cert_file": one.certificate, "key_file": tmp_path / "missing"},
        "key_file: .*is not the key of cert_file": {"cert_file": one.certificate, "key_file": other.key},
        "key_file: .*locked with a passphrase": {"cert_file": one.certificate, "key_file": locked},
    }
    for said, files in cases.items():
        config = tmp_path / "config.yaml"
        tls = {"enabled": True} | {key: str(path) for key, path in files.items()}
        config.write_text(json.dumps({"mqtt": {"tls": tls}}), encoding="utf-8")
        assert main(["check-config", "--config", str(config)]) == 78
        assert re.search(f"^edge-llm: mqtt.tls.{said}", capsys.readouterr().err), said
