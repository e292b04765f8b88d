"""The command `edge-llm doctor`: on a good machine it is silent, on others it names what is wrong and what mends it.

Broker, Ollama's protocol, files, users and small disks are real; what the kernel and systemd say is written into a
folder that stands for the root of the machine, and a `systemctl` that reads it from there.
"""

import grp
import json
import os
import pwd
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from edge_daemon import checks_broker, checks_machine, checks_ollama, cli, config, doctor
from edge_daemon.clock import Clock
from edge_daemon.config import load
from edge_daemon.findings import Finding, Level, Machine
from edge_daemon.messages import Event, Status, TaskState
from tests.conftest import NewMosquitto
from tests.daemon import DaemonProcess
from tests.fake_ollama import GB, FakeModel, FakeOllama
from tests.fakes import FakeClock
from tests.mosquitto import Mosquitto
from tests.mqtt_client import MqttClient
from tests.needs import tool
from tests.ports import free_port

PROJECT = Path(__file__).parent.parent
NODE = "pi1"
N = f"edge-llm/{NODE}"
USER = "edge"
SYSTEMCTL = """#!/bin/sh
case "$1" in show) cat "{told}" ;; cat) cat "{unit}" ;; *) echo "$@" >> "{asked}" ;; esac
"""
RUNNING = {
    "LoadState": "loaded",
    "ActiveState": "active",
    "SubState": "running",
    "UnitFileState": "enabled",
    "NRestarts": "0",
    "User": pwd.getpwuid(os.geteuid()).pw_name,
    "ActiveEnterTimestampMonotonic": "1",
}


@dataclass
class Pi:
    """A machine on which all is well, until a test changes it."""

    directory: Path
    broker: Mosquitto | None = None
    ollama: FakeOllama | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def root(self) -> Path:
        """What stands for `/`."""
        return self.directory / "root"

    @property
    def data_dir(self) -> Path:
        """The configured one."""
        return self.directory / "data"

    @property
    def password_file(self) -> Path:
        """The configured one."""
        return self.directory / "password"

    @property
    def told(self) -> Path:
        """What `systemctl show` prints."""
        return self.directory / "told"

    @property
    def unit(self) -> Path:
        """What `systemctl cat` prints: the unit and its drop-ins."""
        return self.directory / "unit"

    @property
    def config_path(self) -> Path:
        """The file, written anew."""
        path = self.directory / "config.yaml"
        path.write_text(json.dumps(self.settings), encoding="utf-8")
        return path

    @property
    def asked(self) -> str:
        """What systemctl was asked to do."""
        path = self.directory / "asked"
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def machine(self, *, synced: bool = True) -> Machine:
        """As the checks see it."""
        path = self.config_path
        return Machine(load(path), path, self.root, FakeClock(synced=synced))

    def write(self, name: str, text: str) -> Path:
        """A file of the machine."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    def systemd(self, **changes: str) -> None:
        """What systemd says of the service."""
        told = RUNNING | changes
        self.told.write_text("".join(f"{k}={v}\n" for k, v in told.items()), encoding="utf-8")

    def doctor(self, **options: Any) -> int:
        """The whole command."""
        return doctor.run(self.config_path, root=self.root, **options)


@pytest.fixture
def pi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pi:
    """All is well but for broker and Ollama, of which there are none."""
    return well(tmp_path, monkeypatch)


@pytest.fixture
def open_pi(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pi]:
    """The same in a folder that every user may enter, as those of pytest are not."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        yield well(Path(directory), monkeypatch)


def well(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Pi:
    """A machine in this folder on which all is well but for broker and Ollama."""
    new = Pi(directory)
    new.data_dir.mkdir(mode=0o750)
    new.password_file.touch(mode=0o600)
    new.password_file.write_text("secret\n", encoding="utf-8")
    new.write("etc/mosquitto/mosquitto.conf", "\n".join(checks_broker.MOSQUITTO_LINES))
    new.write("sys/class/thermal/thermal_zone0/temp", "52000\n")
    new.write("run/systemd/system/x", "")
    (new.root / "proc").symlink_to("/proc")
    program = new.write("bin/systemctl", SYSTEMCTL.format(told=new.told, unit=new.unit, asked=directory / "asked"))
    program.chmod(0o755)
    new.systemd()
    new.unit.write_text((PROJECT / "systemd/edge-llm.service").read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(Clock, "synced", lambda self: True)
    mqtt = {"port": free_port(), "username": USER, "password_file": str(new.password_file)}
    new.settings = {
        "node": NODE,
        "data_dir": str(new.data_dir),
        "mqtt": mqtt,
        "ollama": {"url": f"http://127.0.0.1:{free_port()}"},
        "models": {"default": "small"},
    }
    return new


@pytest.fixture
def good(pi: Pi, new_mosquitto: NewMosquitto, ollama: FakeOllama) -> Pi:
    """A machine on which all is well; the broker's rules allow no more than docs/operations.md says."""
    return with_rules(pi, new_mosquitto, f"topic readwrite {N}/#\ntopic write reply/#")


def with_rules(pi: Pi, new_mosquitto: NewMosquitto, rules: str) -> Pi:
    """A broker that knows our password and has these rules for us."""
    pi.broker = new_mosquitto(users={USER: "secret"}, acl=f"user {USER}\n{rules}\n")
    pi.settings["mqtt"]["port"] = pi.broker.port
    return pi


@pytest.fixture
def ollama(pi: Pi) -> Iterator[FakeOllama]:
    """An Ollama with one small model."""
    with FakeOllama(FakeModel("small", size_bytes=GB // 10)) as fake:
        pi.ollama = fake
        pi.settings["ollama"]["url"] = fake.url
        yield fake


def wrong(check: Callable[[Machine], Iterator[Finding]], machine: Machine) -> list[Finding]:
    """What one check finds that is not well."""
    return [finding for finding in check(machine) if finding.level is not Level.OK]


def the_one(check: Callable[[Machine], Iterator[Finding]], machine: Machine, level: Level, subject: str) -> Finding:
    """The only thing that is wrong."""
    (found,) = wrong(check, machine)
    assert (found.level, found.subject) == (level, subject), found
    assert found.remedy
    return found


# -- the whole -------------------------------------------------------------------------------------------------------


@pytest.mark.broker
def test_silent_on_a_good_machine(good: Pi, capsys: pytest.CaptureFixture[str]) -> None:
    """One line, and 0."""
    assert good.doctor() == 0
    out, err = capsys.readouterr()
    assert out.endswith("things looked at, nothing wrong.\n")
    assert out.count("\n") == 1
    assert err == ""


@pytest.mark.broker
def test_what_is_well_is_told_when_asked(good: Pi, capsys: pytest.CaptureFixture[str]) -> None:
    """--verbose gives a line for each thing looked at."""
    assert good.doctor(verbose=True) == 0
    page = capsys.readouterr().out
    subjects = ("config", "data_dir", "disk", "mqtt.password_file", "broker", "ollama", "memory", "model", "clock")
    for subject in (*subjects, "board", "service"):
        assert f"ok   {subject}: " in page


@pytest.mark.broker
def test_ten_things_at_once(
    pi: Pi, new_mosquitto: NewMosquitto, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each of ten misconfigurations is named, with its remedy, in one go."""
    monkeypatch.setattr(Clock, "synced", lambda self: False)
    with_rules(pi, new_mosquitto, f"topic read {N}/#")
    (pi.root / "etc/mosquitto/mosquitto.conf").write_text("persistence true\n", encoding="utf-8")
    pi.password_file.chmod(0o644)
    pi.data_dir.rmdir()
    pi.systemd(UnitFileState="disabled", ActiveState="inactive")
    pi.write("sys/devices/platform/soc/soc:firmware/get_throttled", "50005\n")
    pi.settings["models"] = {"default": "large", "settings": {"large": {"fallback": ["none"]}}}
    with FakeOllama(FakeModel("large", size_bytes=10**14), host="0.0.0.0") as exposed:  # noqa: S104
        exposed.version = "0.16.3"
        pi.settings["ollama"]["url"] = exposed.url
        assert pi.doctor() == 1
    page = capsys.readouterr().out.splitlines()
    remedies = dict(pairwise(page))
    for sign, remedy in {
        f"fail data_dir: {pi.data_dir} is missing": "sudo install -d -m 750",
        f"warn mqtt.password_file: every user can read {pi.password_file}": "chmod 640",
        f"fail broker: the broker does not let {USER} write {N}/": f"topic readwrite {N}/#",
        "warn mosquitto: it drops messages": "max_queued_messages 1000000' | sudo tee -a /etc/mosquitto/conf.d/",
        "warn ollama: version 0.16.3: anyone who reaches it": "https://ollama.com/install.sh",
        "warn ollama: it listens on 0.0.0.0": "OLLAMA_HOST=127.0.0.1",
        "fail model: large:latest needs 1": "a smaller model",
        "warn model: Ollama does not have none,": "ollama pull none",
        "warn clock: nobody has set it": "sudo timedatectl set-ntp true",
        "warn board: under voltage, throttled now": "power supply",
        "warn service: it does not start with the machine": "sudo systemctl enable edge-llm",
        "fail service: it is inactive": "sudo systemctl start edge-llm",
    }.items():
        (line,) = (line for line in page if line.startswith(sign))
        assert remedy in remedies[line]
    assert page[-1].endswith("4 wrong, 8 that could be better.")


def test_for_a_program(pi: Pi, capsys: pytest.CaptureFixture[str]) -> None:
    """--json is one line with all findings."""
    assert pi.doctor(as_json=True) == 1
    findings = json.loads(capsys.readouterr().out)
    assert {"level": "ok", "subject": "config", "text": str(pi.config_path), "remedy": ""} in findings
    assert [it["subject"] for it in findings if it["level"] == "fail"] == ["broker", "ollama"]


@pytest.mark.broker
def test_it_disturbs_nothing(mosquitto: Mosquitto, tmp_path: Path, pi: Pi) -> None:
    """A running daemon gets no task of it, says nothing of it, and its topics stay as they are."""
    with FakeOllama(FakeModel("small")) as fake, DaemonProcess(tmp_path, mosquitto, ollama_url=fake.url) as daemon:
        root = json.loads((tmp_path / "config.yaml").read_text(encoding="utf-8"))
        pi.settings["mqtt"] = {"port": mosquitto.port}
        pi.settings["node"] = root["node"]
        with MqttClient(mosquitto.host, mosquitto.port) as client:
            client.subscribe(f"edge-llm/{root['node']}/#")
            client.wait_for(lambda message: message.topic.endswith("/state") and b"ready" in message.payload)
            assert wrong(checks_broker.check_broker, pi.machine()) == []
            client.publish(f"edge-llm/{root['node']}/task/after/t1", "Is all well?")
            client.wait_for(lambda message: message.topic.endswith("/reply/after/t1/result"))
            sent = [message for message in client.messages if "/doctor" in message.topic]
            told = {m.topic.rpartition("/")[2]: m.json for m in sent if m.payload}
            assert Status.from_dict(told["status"]).state is TaskState.CANCELLED
            assert Event.from_dict(told["doctor"]).type == "doctor"
            assert not [m for m in sent if m.topic.endswith(("/result", "/text"))]
            assert {m.payload for m in client.messages if m.topic.endswith("/availability")} == {b"online"}
        assert "doctor" not in daemon.log()


# -- mending ---------------------------------------------------------------------------------------------------------


@pytest.mark.broker
def test_fix(good: Pi, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What is safe is mended once it is agreed to; what is not agreed to stays."""
    good.data_dir.rmdir()
    good.systemd(UnitFileState="disabled")
    answers = iter(["y", "n"])
    monkeypatch.setattr("builtins.input", lambda question: next(answers))
    assert good.doctor(fix=True) == 1
    assert good.data_dir.is_dir()
    assert good.asked == ""
    assert capsys.readouterr().out.count("does not start with the machine") == 2


def test_fix_without_asking(pi: Pi, ollama: FakeOllama, capsys: pytest.CaptureFixture[str]) -> None:
    """--yes agrees to all: the folder is made, the service started, the model asked for with its progress."""
    pi.data_dir.rmdir()
    pi.systemd(ActiveState="inactive", SubState="dead")
    pi.settings["models"]["default"] = "absent"
    assert pi.doctor(fix=True, assume_yes=True) == 1
    assert pi.data_dir.stat().st_mode & 0o777 == 0o750
    assert pi.asked == "enable --now edge-llm\n"
    assert [seen.body["model"] for seen in ollama.asked("/api/pull")] == ["absent"]
    assert "Looking again" in capsys.readouterr().out


def test_nobody_to_ask(pi: Pi, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a terminal nothing is mended."""
    pi.data_dir.rmdir()

    def closed(_question: str) -> str:
        raise EOFError

    monkeypatch.setattr("builtins.input", closed)
    assert pi.doctor(fix=True) == 1
    assert not pi.data_dir.exists()


# -- configuration and files -----------------------------------------------------------------------------------------


def test_a_wrong_key(pi: Pi, capsys: pytest.CaptureFixture[str]) -> None:
    """The key is named; what depends on the configuration is not looked at."""
    pi.settings["mqtt"]["prot"] = 1883
    assert pi.doctor() == 1
    out = capsys.readouterr().out
    assert f"fail config: {pi.config_path}: line 1: mqtt.prot" in out
    assert f"sudoedit {pi.config_path}" in out
    assert "1 thing looked at: 1 wrong" in out


@pytest.mark.parametrize("arguments", [["--fix", "--json"], ["--yes"], ["--yes", "--json"]], ids=" ".join)
def test_arguments_that_do_not_go_together(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Questions would spoil the JSON, and --yes alone would do nothing."""
    with pytest.raises(SystemExit) as ended:
        cli.main(["doctor", *arguments])
    assert ended.value.code == 2
    assert "usage: " in capsys.readouterr().err


def test_a_configuration_that_the_service_cannot_read(pi: Pi, capsys: pytest.CaptureFixture[str]) -> None:
    """Root can, the service's user not: it would end with status 78."""
    if os.geteuid() != 0:
        pytest.skip("needs a file of another user")
    pi.systemd(User="nobody")
    assert pi.doctor() == 1
    page = capsys.readouterr().out
    assert f"fail config: nobody may not read {pi.config_path}\n" in page
    group = grp.getgrgid(pwd.getpwnam("nobody").pw_gid).gr_name
    assert f"sudo chgrp {group} {pi.config_path} && sudo chmod 640" in page


def test_the_command(pi: Pi, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The arguments reach it."""
    path = pi.directory / "wrong.yaml"
    path.write_text("nodes: 1\n", encoding="utf-8")
    assert cli.main(["doctor", "--json", "--config", str(path)]) == 1
    (found,) = json.loads(capsys.readouterr().out)
    assert "nodes" in found["text"]


def test_a_data_dir_of_another_user(open_pi: Pi) -> None:
    """The service's user counts, not who runs the doctor."""
    if os.geteuid() != 0:
        pytest.skip("only root has a folder that others may not write to, and may look at it as they do")
    open_pi.systemd(User="nobody")
    found = the_one(checks_machine.check_data_dir, open_pi.machine(), Level.FAIL, "data_dir")
    assert "nobody may not write" in found.text
    assert found.remedy.startswith(f"sudo chown -R nobody: {open_pi.data_dir}")
    os.chown(open_pi.data_dir, pwd.getpwnam("nobody").pw_uid, -1)
    (open_pi.data_dir / "queue.db").touch(mode=0o600)
    found = the_one(checks_machine.check_data_dir, open_pi.machine(), Level.FAIL, "data_dir")
    assert "queue.db" in found.text
    open_pi.directory.chmod(0o700)
    found = the_one(checks_machine.check_data_dir, open_pi.machine(), Level.FAIL, "data_dir")
    assert f"may not enter {open_pi.directory}" in found.text


def test_a_data_dir_that_is_a_file(pi: Pi) -> None:
    """It is told as what it is."""
    pi.data_dir.rmdir()
    pi.data_dir.touch()
    assert "no folder" in the_one(checks_machine.check_data_dir, pi.machine(), Level.FAIL, "data_dir").text


def test_limits_beyond_the_disk(pi: Pi) -> None:
    """What the queue may grow to must fit on the disk."""
    pi.settings["queue"] = {"retention_bytes": 1 << 40}
    found = the_one(checks_machine.check_data_dir, pi.machine(), Level.WARN, "disk")
    assert "1,099" in found.text
    assert "queue.retention_bytes" in found.remedy


@pytest.fixture
def small_disk(pi: Pi) -> Iterator[Path]:
    """A data directory on a disk of 1 MB."""
    mount = tool("mount", package="mount")
    if subprocess.run([mount, "-t", "tmpfs", "-o", "size=1m", "tmpfs", pi.data_dir], check=False).returncode:
        pytest.skip("only root may mount a small disk")
    yield pi.data_dir
    subprocess.run(["umount", pi.data_dir], check=True)


def test_a_full_disk(pi: Pi, small_disk: Path) -> None:
    """It is told before tasks are refused."""
    found = the_one(checks_machine.check_data_dir, pi.machine(), Level.FAIL, "disk")
    assert "1 MB free" in found.text


def test_a_read_only_disk(pi: Pi, small_disk: Path) -> None:
    """As it is after an error of the SD card."""
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    first, *_ = wrong(checks_machine.check_data_dir, pi.machine())
    assert "read-only" in first.text
    assert first.remedy == f"sudo mount -o remount,rw {small_disk}"


@pytest.mark.parametrize(
    ("changes", "finds"), [({}, True), ({"StateDirectory": "x"}, True), ({"ReadWritePaths": "/srv {data}"}, False)]
)
def test_a_data_dir_outside_of_the_sandbox(changes: Mapping[str, str], finds: bool, pi: Pi) -> None:  # noqa: FBT001
    """The unit makes all read-only but what it names; the remedy is a drop-in."""
    named = {key: value.format(data=pi.data_dir) for key, value in changes.items()}
    pi.systemd(ProtectSystem="strict", **named)
    found = wrong(checks_machine.check_data_dir, pi.machine())
    assert bool(found) == finds
    for finding in found:
        assert f"ReadWritePaths={pi.data_dir}" in finding.remedy


def test_two_folders_outside_of_the_sandbox(pi: Pi) -> None:
    """One drop-in opens both, also when one of them is open already; the one that is missing is made first."""
    logs = pi.directory / "logs"
    pi.settings["csv"] = {"path": str(logs / "log.csv")}
    for open_already in ("", str(pi.data_dir), str(logs)):
        pi.systemd(ProtectSystem="strict", ReadWritePaths=open_already)
        (found,) = wrong(checks_machine.check_data_dir, pi.machine())
        assert rf"ReadWritePaths={pi.data_dir} {logs}\n" in found.remedy
        assert found.remedy.startswith("sudo install -d ")
        assert f" {logs} && printf " in found.remedy
    pi.systemd(ProtectSystem="strict", ReadWritePaths=f"{pi.data_dir} {logs}")
    assert wrong(checks_machine.check_data_dir, pi.machine()) == []


def test_a_folder_that_the_unit_hides(pi: Pi, monkeypatch: pytest.MonkeyPatch) -> None:
    """No drop-in that names it would open it: another place is asked for."""
    monkeypatch.setattr(checks_machine, "HIDDEN", {"ProtectHome=yes": (Path("/home"), pi.directory / "home")})
    pi.settings["csv"] = {"path": str(pi.directory / "home/log.csv")}
    pi.systemd(ProtectHome="yes", ProtectSystem="strict", ReadWritePaths=str(pi.data_dir))
    found = the_one(checks_machine.check_data_dir, pi.machine(), Level.FAIL, "csv.path")
    assert f"the unit hides {pi.directory / 'home'} (ProtectHome=yes)" in found.text
    assert "csv.path: choose another place" in found.remedy
    pi.systemd(ProtectHome="no")
    assert wrong(checks_machine.check_data_dir, pi.machine()) == []


def test_a_password_file(pi: Pi) -> None:
    """It must be there, and nobody else's."""
    pi.password_file.chmod(0o604)
    assert "chmod 640" in the_one(checks_machine.check_files, pi.machine(), Level.WARN, "mqtt.password_file").remedy
    pi.password_file.unlink()
    assert "is missing" in the_one(checks_machine.check_files, pi.machine(), Level.FAIL, "mqtt.password_file").text


def test_a_password_that_the_service_cannot_read(pi: Pi) -> None:
    """Root can, the service's user not."""
    if os.geteuid() != 0:
        pytest.skip("needs a file of another user")
    pi.systemd(User="nobody")
    assert (
        "nobody may not read"
        in the_one(checks_machine.check_files, pi.machine(), Level.FAIL, "mqtt.password_file").text
    )


# -- the broker ------------------------------------------------------------------------------------------------------


def test_no_broker(pi: Pi) -> None:
    """It says where it asked."""
    found = the_one(checks_broker.check_broker, pi.machine(), Level.FAIL, "broker")
    assert found.text == f"127.0.0.1:{pi.settings['mqtt']['port']} does not answer: Connection refused"


@pytest.mark.broker
@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        ({"username": "nobody"}, "mosquitto_passwd"),
        ({"username": None, "password_file": None}, "mqtt.username and mqtt.password_file"),
        ({"username": "nobody", "protocol": "3.1.1"}, "mosquitto_passwd"),
    ],
)
def test_wrong_credentials(settings: dict[str, Any], remedy: str, good: Pi) -> None:
    """The broker's own reason, and where they are set."""
    good.settings["mqtt"] |= settings
    found = the_one(checks_broker.check_broker, good.machine(), Level.FAIL, "broker")
    assert "refuses the connection: Not authorized" in found.text
    assert remedy in found.remedy


PASSWORD = "sudo mosquitto_passwd {} edge && sudo systemctl reload mosquitto; or sudoedit"


@pytest.mark.parametrize(
    ("host", "line", "remedy"),
    [
        ("127.0.0.1", "password_file /etc/mosquitto/passwd", f"^{PASSWORD.format('/etc/mosquitto/passwd')}"),
        ("127.0.0.1", "persistence true", "^sudo install .* && echo 'password_file .* && sudo mosquitto_passwd"),
        ("127.0.0.1", "", "^sudoedit .* mqtt.password_file$"),
        ("pi2.lan", "password_file /etc/mosquitto/passwd", "^sudoedit .* mqtt.password_file, as pi2.lan knows them$"),
    ],
)
def test_the_remedy_for_refused_credentials(host: str, line: str, remedy: str, pi: Pi) -> None:
    """The password is set at the broker of this machine, with a reload; another machine's is not ours to change."""
    (pi.root / "etc/mosquitto/mosquitto.conf").write_text(line, encoding="utf-8")
    pi.settings["mqtt"]["host"] = host
    assert re.search(remedy, checks_broker._credentials_remedy(pi.machine()))


@pytest.mark.broker
def test_rights_for_answers_to_each_sender(pi: Pi, new_mosquitto: NewMosquitto) -> None:
    """Where a prefix holds the sender's name, the rule that is asked for is one for all senders."""
    with_rules(pi, new_mosquitto, f"topic readwrite {N}/#")
    pi.settings["mqtt"]["reply_prefixes"] = ["reply/<src>/"]
    found = the_one(checks_broker.check_broker, pi.machine(), Level.FAIL, "broker")
    assert found.remedy.endswith("topic write reply/+/#")


@pytest.mark.broker
def test_the_password_is_a_credential(good: Pi) -> None:
    """It is read from where systemd takes it, by what the drop-ins say, since `systemctl show` does not."""
    secret = good.directory / "of any name"
    secret.write_text("secret", encoding="utf-8")
    good.settings["mqtt"]["password_file"] = None
    good.systemd(LoadCredential="[unprintable]")
    drop_in = f"""
# /etc/systemd/system/edge-llm.service.d/override.conf
[Service]
LoadCredential=mqtt_password:/nowhere
LoadCredential=
LoadCredential = mqtt_password:{secret}
LoadCredential=http_tokens:{good.directory}/http_tokens
"""
    with good.unit.open("a", encoding="utf-8") as file:
        file.write(drop_in)
    assert wrong(checks_broker.check_broker, good.machine()) == []


def test_a_password_that_we_cannot_read(
    pi: Pi, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """That the service can is enough; to see more takes root."""
    monkeypatch.setattr(os, "access", lambda path, mode: path != pi.password_file)
    assert pi.doctor() == 1
    page = capsys.readouterr().out
    assert f"warn rights: {pi.password_file}: only root may look there\n       sudo edge-llm doctor\n" in page
    assert "fail password" not in page


@pytest.mark.broker
@pytest.mark.parametrize(
    ("protocol", "rules", "missing"),
    [
        ("5", "topic write {N}/#", ["read {N}/availability", "read {N}/task/#"]),
        ("5", "topic readwrite {N}/availability\ntopic write {N}/task/#", ["read {N}/task/#", "write {N}/reply/"]),
        ("5", "topic readwrite {N}/#", ["write reply/#"]),
        ("3.1.1", "topic read {N}/#", ["read {N}/availability"]),
        ("3.1.1", "topic write {N}/#", ["read {N}/availability"]),
    ],
)
def test_missing_rights(protocol: str, rules: str, missing: list[str], pi: Pi, new_mosquitto: NewMosquitto) -> None:
    """Also those whose absence mosquitto never tells."""
    with_rules(pi, new_mosquitto, rules.format(N=N))
    pi.settings["mqtt"]["protocol"] = protocol
    found = the_one(checks_broker.check_broker, pi.machine(), Level.FAIL, "broker")
    for right in missing:
        assert right.format(N=N) in found.text
    assert f"topic readwrite {N}/#, topic write reply/#" in found.remedy


@pytest.mark.broker
@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_the_fewest_rights(protocol: str, pi: Pi, new_mosquitto: NewMosquitto) -> None:
    """A broker that lets the daemon do no more than it must is a good one."""
    rules = "\n".join(
        (
            *(f"topic read {N}/{name}/#" for name in ("task", "cancel")),
            *(f"topic write {N}/{name}" for name in ("reply/#", "state", "info", "models", "queue", "telemetry")),
            f"topic write {N}/event/#",
            f"topic readwrite {N}/availability",
            "topic write reply/#",
        )
    )
    with_rules(pi, new_mosquitto, rules)
    pi.settings["mqtt"]["protocol"] = protocol
    assert wrong(checks_broker.check_broker, pi.machine()) == []


@pytest.mark.broker
def test_a_namesake(good: Pi) -> None:
    """Another machine that answers to our name is named."""
    assert good.broker is not None
    with MqttClient(good.broker.host, good.broker.port, username=USER, password="secret") as client:
        client.publish(f"{N}/availability", "online", retain=True)
        client.publish(f"{N}/info", {"host": "kitchen"}, retain=True)
    found = the_one(checks_broker.check_broker, good.machine(), Level.FAIL, "node")
    assert "another machine, kitchen" in found.text


def test_mosquitto_as_it_is_shipped(pi: Pi) -> None:
    """What it lacks is added by the remedy, and by nothing else."""
    (pi.root / "etc/mosquitto/mosquitto.conf").write_text("persistence true # yes\n", encoding="utf-8")
    (found,) = (it for it in wrong(checks_broker.check_broker, pi.machine()) if it.subject == "mosquitto")
    assert "'autosave_on_changes true' 'autosave_interval 1' 'max_queued_messages 1000000'" in found.remedy
    assert "persistence" not in found.remedy


@pytest.mark.parametrize(
    ("limit", "enough"), [("", False), ("1000", False), ("0", False), ("10000", True), ("1000000", True)]
)
def test_how_much_mosquitto_queues(limit: str, enough: bool, pi: Pi) -> None:  # noqa: FBT001
    """Any limit that is high enough will do, but not 0 for none, with which mosquitto ends connections."""
    lines = [line for line in checks_broker.MOSQUITTO_LINES if not line.startswith("max_queued_messages")]
    lines += [f"max_queued_messages {limit}"] if limit else []
    (pi.root / "etc/mosquitto/mosquitto.conf").write_text("\n".join(lines), encoding="utf-8")
    (found,) = checks_broker._mosquitto(pi.machine())
    assert (found.level is Level.OK) == enough
    assert ("in place of 0" in found.text) == (limit == "0")


@pytest.mark.broker
def test_the_shipped_mosquitto_files_are_good(pi: Pi, new_mosquitto: NewMosquitto) -> None:
    """Settings and rights of examples/mosquitto are enough."""
    example = Path(__file__).parent.parent / "examples" / "mosquitto"
    pi.write("etc/mosquitto/mosquitto.conf", "include_dir /etc/mosquitto/conf.d")
    pi.write("etc/mosquitto/conf.d/edge-llm.conf", (example / "edge-llm.conf").read_text(encoding="utf-8"))
    rules = (example / "edge-llm.acl").read_text(encoding="utf-8")
    pi.broker = new_mosquitto(users={"edge-llm": "secret"}, acl=rules)
    pi.settings["mqtt"] |= {"port": pi.broker.port, "username": "edge-llm"}
    assert wrong(checks_broker.check_broker, pi.machine()) == []


@pytest.mark.parametrize(("listener", "tried"), [("", False), ("listener {port}", False), ("listener 1", True)])
def test_one_connection_per_user(listener: str, tried: bool, pi: Pi) -> None:  # noqa: FBT001
    """A broker that would end the daemon's connection for ours is not tried."""
    line = listener.format(port=pi.settings["mqtt"]["port"])
    pi.write("etc/mosquitto/conf.d/tls.conf", f"{line}\nuse_username_as_clientid true\n")
    assert bool(wrong(checks_broker.check_broker, pi.machine())) == tried  # there is no broker to be found


@pytest.mark.broker
def test_a_broker_on_another_machine(good: Pi, monkeypatch: pytest.MonkeyPatch) -> None:
    """A session that the broker there keeps under the user's name survives the doctor, unless it is asked to look."""
    monkeypatch.setattr(checks_broker, "is_here", lambda host: False)
    (said,) = checks_broker.check_broker(good.machine())
    assert (said.level, said.text.partition(" ")[2][:12]) == (Level.OK, "is not tried")
    assert "edge-llm doctor --broker" in said.remedy
    looked = list(checks_broker.check_broker(replace(good.machine(), try_broker=True)))
    assert any("answers, MQTT 5" in finding.text for finding in looked)


def test_a_broker_on_another_machine_without_users(pi: Pi, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the configuration names no user, looking harms nobody."""
    monkeypatch.setattr(checks_broker, "is_here", lambda host: False)
    pi.settings["mqtt"] |= {"username": None, "password_file": None}
    assert "does not answer" in the_one(checks_broker.check_broker, pi.machine(), Level.FAIL, "broker").text


def test_what_was_not_tried_is_told(pi: Pi, ollama: FakeOllama, capsys: pytest.CaptureFixture[str]) -> None:
    """All is well, and still a line says what was left out; --broker reaches it."""
    pi.settings["mqtt"]["host"] = "192.0.2.1"
    assert pi.doctor() == 0
    assert "ok   broker: 192.0.2.1:" in capsys.readouterr().out
    pi.settings["mqtt"] |= {"host": "127.0.0.1"}
    pi.write("etc/mosquitto/conf.d/tls.conf", "use_username_as_clientid true")
    assert pi.doctor(broker=True) == 1


def test_another_machines_mosquitto(pi: Pi) -> None:
    """Its settings cannot be seen from here."""
    (pi.root / "etc/mosquitto/mosquitto.conf").write_text("", encoding="utf-8")
    pi.settings["mqtt"]["host"] = "192.0.2.1"
    assert list(checks_broker._mosquitto(pi.machine())) == []


# -- Ollama ----------------------------------------------------------------------------------------------------------


def test_no_ollama(pi: Pi) -> None:
    """It says where it asked."""
    found = the_one(checks_ollama.check_ollama, pi.machine(), Level.FAIL, "ollama")
    assert pi.settings["ollama"]["url"].removeprefix("http://") in found.text
    assert "Connection refused" in found.text
    assert "Errno" not in found.text


@pytest.mark.parametrize(
    ("version", "faults"),
    [("0.17.1", 0), ("0.17.1-rc0", 0), ("0.0.0", 0), ("1.0.0", 0), ("latest", 0), ("0.17.0", 1), ("0.9.6", 2)],
)
def test_versions(version: str, faults: int, pi: Pi, ollama: FakeOllama) -> None:
    """Those with known faults are named, builds without a number are not."""
    ollama.version = version
    found = wrong(checks_ollama.check_ollama, pi.machine())
    assert len(found) == bool(faults)
    for finding in found:
        assert finding.text.count(";") == faults - 1
        assert "CVE-2026-7482" in finding.text


@pytest.mark.parametrize(
    ("digits", "address"),
    [
        ("0100007F", "127.0.0.1"),
        ("00000000", "0.0.0.0"),  # noqa: S104
        ("0202A8C0", "192.168.2.2"),
        ("00000000000000000000000001000000", "::1"),
        ("00000000000000000000000000000000", "::"),
        ("0000000000000000FFFF00000100007F", "127.0.0.1"),
    ],
)
def test_addresses_of_the_kernel(digits: str, address: str) -> None:
    """As /proc/net/tcp writes them on a machine such as a Pi."""
    assert str(checks_ollama._address(digits)) == address


@pytest.mark.parametrize(
    ("settings", "level", "text", "remedy"),
    [
        ({"default": "none"}, Level.FAIL, "does not have none, the default", "ollama pull none"),
        ({"settings": {"none": {}}}, Level.WARN, "does not have none,", "ollama pull none"),
        ({"settings": {"small": {"fallback": ["none"]}}}, Level.WARN, "have none,", "ollama pull none"),
        ({"default": "huge"}, Level.FAIL, "huge:latest needs 100,000", "a smaller model"),
        ({"settings": {"embed": {}}}, Level.FAIL, "embed:latest only makes embeddings", "another model"),
        ({"defaults": {"num_ctx": 16384}}, Level.WARN, "num_ctx of small:latest is 16384", "num_ctx: 8192"),
    ],
)
def test_models(settings: dict[str, Any], level: Level, text: str, remedy: str, pi: Pi) -> None:
    """Those that tasks may get must be there, able, and small enough."""
    huge = FakeModel("huge", size_bytes=10**14)
    embed = FakeModel("embed", size_bytes=1, capabilities=("embedding",))
    pi.settings["models"] |= settings
    with FakeOllama(FakeModel("small", size_bytes=GB // 10), huge, embed) as fake:
        pi.settings["ollama"]["url"] = fake.url
        found = the_one(checks_ollama.check_ollama, pi.machine(), level, "model")
    assert text in found.text
    assert remedy in found.remedy


def test_a_model_that_may_be_fetched(pi: Pi, ollama: FakeOllama) -> None:
    """With ollama.allow_pull a missing model is no fault."""
    pi.settings["ollama"]["allow_pull"] = True
    pi.settings["models"]["default"] = "none"
    assert wrong(checks_ollama.check_ollama, pi.machine()) == []


def test_a_budget_beyond_the_board(pi: Pi, ollama: FakeOllama) -> None:
    """It is capped, which one should know."""
    pi.settings["pool"] = {"memory_budget_bytes": 1 << 40}
    assert "1,099,512 MB" in the_one(checks_ollama.check_ollama, pi.machine(), Level.WARN, "memory").text


def test_a_budget_on_another_machine(pi: Pi, ollama: FakeOllama, monkeypatch: pytest.MonkeyPatch) -> None:
    """There it holds as it is, however small this board."""
    monkeypatch.setattr(config, "is_here", lambda host: False)
    pi.settings["pool"] = {"memory_budget_bytes": 1 << 40}
    found = list(checks_ollama.check_ollama(pi.machine()))
    assert [it.text for it in found if it.subject == "memory"] == [
        "1,099,512 MB for models on the machine of ollama.url"
    ]


def test_too_much_is_pinned(pi: Pi) -> None:
    """What is pinned leaves no room for the default."""
    pi.settings["pool"] = {"memory_budget_bytes": 400_000_000}
    pi.settings["models"]["settings"] = {"other": {"pinned": True}}
    models = (FakeModel("small", size_bytes=GB // 10), FakeModel("other", size_bytes=GB // 5))
    with FakeOllama(*models) as fake:
        pi.settings["ollama"]["url"] = fake.url
        assert "other:latest pinned" in the_one(checks_ollama.check_ollama, pi.machine(), Level.WARN, "memory").text


# -- board and service -----------------------------------------------------------------------------------------------


def test_the_clock(pi: Pi) -> None:
    """A board without a battery starts in the past."""
    assert "set-ntp" in the_one(checks_machine.check_board, pi.machine(synced=False), Level.WARN, "clock").remedy


@pytest.mark.parametrize(
    ("word", "text", "remedy"),
    [
        ("50000", "under voltage, throttled since the start", "power supply"),
        ("4", "throttled now", "heat sink"),
        ("8", "soft temperature limit now", "heat sink"),
    ],
)
def test_throttling(word: str, text: str, remedy: str, pi: Pi) -> None:
    """What the firmware of a Pi says, now or since the start."""
    pi.write("sys/devices/platform/soc/soc:firmware/get_throttled", word)
    found = the_one(checks_machine.check_board, pi.machine(), Level.WARN, "board")
    assert text in found.text
    assert remedy in found.remedy


def test_heat(pi: Pi) -> None:
    """From 80 C on a Pi slows down."""
    pi.write("sys/class/thermal/thermal_zone0/temp", "81500\n")
    assert "82 C" in the_one(checks_machine.check_board, pi.machine(), Level.WARN, "board").text


@pytest.mark.parametrize(
    ("changes", "level", "text", "remedy"),
    [
        ({"LoadState": "not-found"}, Level.WARN, "does not know", "install-service"),
        ({"UnitFileState": "disabled"}, Level.WARN, "does not start with", "systemctl enable"),
        ({"ActiveState": "inactive"}, Level.FAIL, "it is inactive", "systemctl start"),
        ({"ActiveState": "failed", "ExecMainStatus": "78"}, Level.FAIL, "status 78", "journalctl"),
        (
            {"ActiveState": "activating", "SubState": "auto-restart", "NRestarts": "0"},
            Level.FAIL,
            "again",
            "journalctl",
        ),
        ({"ActiveState": "activating", "SubState": "start", "NRestarts": "1"}, Level.FAIL, "again", "journalctl"),
        ({"NRestarts": "7", "ActiveEnterTimestampMonotonic": str(1 << 60)}, Level.FAIL, "7 times", "journalctl"),
    ],
)
def test_the_service(changes: dict[str, str], level: Level, text: str, remedy: str, pi: Pi) -> None:
    """Installed, enabled, running, and not over and over."""
    pi.systemd(**changes)
    found = the_one(checks_machine.check_service, pi.machine(), level, "service")
    assert text in found.text
    assert remedy in found.remedy


@pytest.mark.parametrize("state", ["failed", "activating"])
def test_a_daemon_that_was_started_by_hand(state: str, pi: Pi) -> None:
    """It holds the data directory, and the service waits for that with status 75 for ever: who it is, is told."""
    pi.systemd(ActiveState=state, SubState="auto-restart", NRestarts="9", ExecMainStatus="75", MainPID="0")
    lock = pi.data_dir / "lock"
    with subprocess.Popen(["flock", lock, "sh", "-c", "echo; exec cat"], stdin=-1, stdout=-1) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        found = the_one(checks_machine.check_service, pi.machine(), Level.FAIL, "service")
        pi.systemd(MainPID=str(holder.pid))
        assert wrong(checks_machine.check_service, pi.machine()) == []
        holder.terminate()
        holder.communicate()
    assert f"process {holder.pid}, started by hand" in found.text


def test_a_machine_without_systemd(pi: Pi) -> None:
    """There is nothing to say of the service."""
    (pi.root / "run/systemd/system/x").unlink()
    (pi.root / "run/systemd/system").rmdir()
    assert list(checks_machine.check_service(pi.machine())) == []


@pytest.mark.parametrize(
    ("disk", "rotational", "text"),
    [("mmcblk0", "0", "an SD card"), ("sda", "0", "an SSD"), ("sda", "1", "a hard disk")],
)
def test_what_kind_of_disk(disk: str, rotational: str, text: str, pi: Pi) -> None:
    """A partition belongs to its disk."""
    number = pi.data_dir.stat().st_dev
    pi.write(f"sys/devices/x/{disk}/queue/rotational", rotational)
    pi.write(f"sys/devices/x/{disk}/{disk}p2/partition", "2")
    link = pi.root / f"sys/dev/block/{os.major(number)}:{os.minor(number)}"
    link.parent.mkdir(parents=True)
    link.symlink_to(pi.root / f"sys/devices/x/{disk}/{disk}p2")
    assert f"{disk}, {text}" in checks_machine._medium(pi.machine(), pi.data_dir)
