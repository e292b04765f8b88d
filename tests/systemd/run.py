"""Install, run, break, upgrade and remove the Debian package on a real systemd.

    python -m tests.systemd.run            # builds the package and a Debian, boots it in a container, tells each step
    python -m tests.systemd.run --check    # only says whether that can be done here

Needs root, systemd-nspawn and debootstrap. The steps are one story: each begins where the one before has ended. The
machine has no network, so all is installed offline. The exit status is 1 at the first step that fails; the machine's
journal is printed then.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tests.systemd.machine import HOSTNAME, CommandFailed, Machine, impediment, prepared_root
from tests.waiting import wait_until

T = TypeVar("T")
PROJECT = Path(__file__).resolve().parents[2]
BUILD = PROJECT / "packaging/deb/build.py"
CACHE = Path(os.environ.get("EDGE_LLM_TEST_ROOTS", "/var/tmp/edge-llm-test-roots"))  # noqa: S108 - kept on purpose
NODE = f"edge-llm/{HOSTNAME}"
UNIT = "edge-llm.service"
CONFIG = "/etc/edge-llm/config.yaml"
STATE = "/var/lib/edge-llm"
ANSWERS = "/var/log/answers"
WORST_EXPOSURE = 1.2
STOP_TIMEOUT_S = 90
ANSWER_TIMEOUT_S = 90.0

OUR_CONFIG = """\
drain_timeout_s: 2
models: {default: "smollm2:135m"}
"""
SLOW_TEXT = " ".join(f"word{number}" for number in range(1, 41))
SLOW_MODEL = {"name": "slow", "size_bytes": 10_000_000, "token_s": 0.2, "answer": SLOW_TEXT}

# Two of them take the place of Ollama: one with a real small model, one that is slow. The last writes down all results.
SERVICES = {
    "ollama.service": """\
[Unit]
Conflicts=slow-ollama.service
[Service]
Environment=PYTHONPATH=/opt/source:/opt/stand-in
ExecStart=/usr/bin/python3 -B -m edge_daemon.embedded.ollama_server --port 11434 --data-dir /var/lib/ollama
[Install]
WantedBy=multi-user.target
""",
    "slow-ollama.service": f"""\
[Unit]
Conflicts=ollama.service
After=ollama.service
[Service]
Environment=PYTHONPATH=/opt/source
ExecStart=/usr/bin/python3 -B -m tests.fake_ollama --port 11434 --model '{json.dumps(SLOW_MODEL)}'
""",
    "watcher.service": f"""\
[Unit]
After=mosquitto.service
[Service]
ExecStart=/usr/bin/mosquitto_sub -c -i watcher -q 1 -t {NODE}/reply/+/+/result
StandardOutput=append:{ANSWERS}
Restart=always
RestartSec=1
[Install]
WantedBy=multi-user.target
""",
}


@dataclass(frozen=True)
class Board:
    """The machine under test, and the two versions of the package."""

    machine: Machine
    package: Path
    newer: Path

    # -- the service

    def run(self, *command: str) -> str:
        """Run a command; its standard output."""
        return self.machine.run(*command)

    def property(self, name: str) -> str:
        """What `systemctl show` tells."""
        return self.run("systemctl", "show", "--value", f"--property={name}", UNIT).strip()

    def is_active(self) -> bool:
        """Whether the service runs."""
        return self.property("ActiveState") == "active"

    def journal(self, *matches: str) -> list[dict[str, Any]]:
        """The entries of the service's journal that match, such as `TASK_ID=evt-42`."""
        self.run("journalctl", "--sync")
        lines = self.run("journalctl", "--output=json", "--all", f"_SYSTEMD_UNIT={UNIT}", *matches).splitlines()
        return [json.loads(line) for line in lines]

    def said(self, text: str) -> bool:
        """Whether the service or systemd on its behalf has written `text` to the journal."""
        self.run("journalctl", "--sync")
        return text in self.run("journalctl", f"--unit={UNIT}", "--output=cat")

    def configure(self, text: str) -> None:
        """Write the configuration, as an administrator's editor does."""
        self.machine.write(CONFIG, text)

    def drop_in(self, text: str | None) -> None:
        """Have the unit changed by `text`, or by nothing; and the service restarted."""
        path = self.machine.path(f"/etc/systemd/system/{UNIT}.d/test.conf")
        if text is None:
            shutil.rmtree(path.parent)
        else:
            self.machine.write(f"/etc/systemd/system/{UNIT}.d/test.conf", text)
        self.run("systemctl", "daemon-reload")
        self.run("systemctl", "restart", UNIT)

    def doctor(self) -> list[dict[str, str]]:
        """All that `edge-llm doctor` finds, good or not."""
        findings: list[dict[str, str]] = json.loads(self.run("sh", "-c", "edge-llm doctor --json || true"))
        return findings

    # -- models

    def serve(self, service: str, model: str) -> None:
        """Have `service` in the place of Ollama, with `model`; and the daemon know at once what models there are."""
        self.run("systemctl", "start", service)
        wait_until(lambda: f'"{model}' in self._models(), 30)
        self.run("systemctl", "restart", UNIT)

    def _models(self) -> str:
        ask = "import urllib.request; print(urllib.request.urlopen('http://127.0.0.1:11434/api/tags').read().decode())"
        return "" if self.machine.fails("python3", "-c", ask) else self.run("python3", "-c", ask)

    # -- tasks

    def ask(self, id_: str, prompt: str, *, model: str | None = None) -> None:
        """Publish a task of the device `test`."""
        task = {"prompt": prompt} | ({} if model is None else {"model": model})
        self.run("mosquitto_pub", "-q", "1", "-t", f"{NODE}/task/test/{id_}", "-m", json.dumps(task))

    def http(self, path: str, body: str | None = None) -> Any:
        """What the gateway answers to GET, or to POST when there is a body."""
        code = (
            "import sys, urllib.request as web; path, *body = sys.argv[1:]; "
            "data = body[0].encode() if body else None; header = {'Content-Type': 'application/json'}; "
            "request = web.Request('http://127.0.0.1:5000' + path, data, header); "
            "print(web.urlopen(request, timeout=70).read().decode())"
        )
        return json.loads(self.run("python3", "-c", code, path, *([] if body is None else [body])))

    def retained(self, name: str) -> Any:
        """What the node tells about itself on a retained topic."""
        return json.loads(self.run("mosquitto_sub", "-C", "1", "-W", "10", "-t", f"{NODE}/{name}"))

    def results(self, id_: str) -> list[dict[str, Any]]:
        """All results of a task that have arrived, repetitions too."""
        lines = self.machine.path(ANSWERS).read_text(encoding="utf-8").splitlines()
        return [result for result in map(json.loads, lines) if result["id"] == id_]

    def answer(self, id_: str) -> dict[str, Any]:
        """Wait for the result of a task, which has to be a success; repetitions have to be the same."""
        wait_until(lambda: self.results(id_), ANSWER_TIMEOUT_S)
        first, *others = self.results(id_)
        assert first["state"] == "succeeded", first
        assert all(other == first for other in others), (first, others)
        return first

    def waiting(self) -> int:
        """How many tasks wait."""
        return sum(self.retained("queue")["waiting"].values())

    def await_running(self, id_: str) -> None:
        """Wait until the task is being answered."""
        wait_until(lambda: (self.retained("queue")["running"] or {}).get("id") == id_, ANSWER_TIMEOUT_S)


# -- the story


def boot(board: Board) -> None:
    """Debian boots."""
    board.machine.boot()


def install(board: Board) -> None:
    """The package is installed offline, without broker and Ollama; the service runs and says what it lacks."""
    board.run("systemctl", "stop", "mosquitto", "watcher", "ollama")
    install_package(board, board.package)
    assert board.is_active()
    assert board.run("systemctl", "is-enabled", UNIT).strip() == "enabled"
    wait_until(lambda: "no broker, Ollama does not answer" in board.property("StatusText"))
    expected = {CONFIG: "640 root edge-llm", STATE: "750 edge-llm edge-llm"}
    for path, owner in expected.items():
        assert board.run("stat", "--format=%a %U %G", path).strip() == owner, path
    assert board.run("dpkg", "--audit") == ""
    assert board.run("dpkg", "--verify", "edge-llm") == ""


def first_start(board: Board) -> None:
    """With a broker, a model server and three lines of configuration it is ready."""
    board.configure(OUR_CONFIG)
    board.run("systemctl", "start", "mosquitto", "watcher")
    board.serve("ollama", "smollm2")
    wait_until(lambda: board.property("StatusText").startswith("ready"), 30)
    assert board.run("edge-llm", "check-config").splitlines()[0].startswith("ok")
    board.run("edge-llm", "status")


def first_task(board: Board) -> None:
    """A task by mosquitto_pub is answered by a real small model, and so is one by edge-llm-publish."""
    board.ask("first", "What is the capital of France?")
    assert "Paris" in board.answer("first")["text"]
    assert "4" in board.run("edge-llm-publish", "--prompt", "What is 2+2?")


def journal(board: Board) -> None:
    """The journal shows the task's line, finds it by TASK_ID, and holds no complaint."""
    assert board.said("first")
    lines = board.journal("TASK_ID=first")
    assert lines, "nothing found by TASK_ID=first"
    ended = lines[-1]
    assert (ended["SRC"], ended["MODEL"], ended["PRIORITY"]) == ("test", "smollm2:135m", "6"), ended
    errors = board.journal(*(f"PRIORITY={number}" for number in range(4)))
    assert not errors, errors


def http(board: Board) -> None:
    """With one more line of configuration, a task comes over HTTP and its answer goes back, on Debian's own Flask."""
    board.configure(OUR_CONFIG + "http: {enabled: true}\n")
    board.run("systemctl", "restart", UNIT)
    task = {"task_type": "arithmetic", "model_name": "smollm2:135m", "prompt": "What is 2+2?"}
    told = board.http("/perform_task", json.dumps(task))
    assert told["message"] == "Task added to queue.", told
    ended = board.http(told["links"]["wait"])
    assert ended["state"] == "succeeded", ended
    assert "4" in ended["result"]["text"], ended
    board.configure(OUR_CONFIG)
    board.run("systemctl", "restart", UNIT)


def sandbox(board: Board) -> None:
    """systemd-analyze rates the running unit 1.2 or better; the log can be read by members of the group."""
    judged = board.run("systemd-analyze", "security", "--no-pager", UNIT)
    match = re.search(r"Overall exposure level for \S+: ([0-9.]+)", judged)
    assert match is not None, judged
    assert float(match[1]) <= WORST_EXPOSURE, judged
    assert board.property("OOMScoreAdjust") == "-300"
    board.run("useradd", "--groups", "edge-llm", "somebody")
    read = board.run("runuser", "-u", "somebody", "--", "head", "-1", f"{STATE}/llm_metrics.csv")
    assert read.startswith("timestamp,task_type,"), read
    board.run("useradd", "nobody-else")
    assert board.machine.fails("runuser", "-u", "nobody-else", "--", "ls", STATE)


def reload(board: Board) -> None:
    """A reload applies a changed configuration to the same process, and refuses a wrong one."""
    before = board.property("MainPID")
    board.configure(OUR_CONFIG + "queue: {default_ttl_s: 7200}\n")
    board.run("systemctl", "reload", UNIT)
    wait_until(lambda: board.retained("info")["limits"]["ttl_s"] == 7200, 30)
    board.configure(OUR_CONFIG + "no_such_key: 1\n")
    board.run("systemctl", "reload", UNIT)
    wait_until(lambda: board.said("no_such_key"))
    wait_until(board.is_active)
    assert board.retained("info")["limits"]["ttl_s"] == 7200
    board.configure(OUR_CONFIG + "csv: {path: /home/pi/log.csv}\n")
    board.run("systemctl", "reload", UNIT)
    wait_until(lambda: board.said("csv.path: /home/pi/log.csv: Permission denied"))
    wait_until(board.is_active)
    assert (board.property("MainPID"), board.property("NRestarts")) == (before, "0")
    board.configure(OUR_CONFIG)


def credential(board: Board) -> None:
    """With the broker's password as a credential the daemon is ready, and the doctor gets to the broker, too."""
    passwords, ours = "/etc/mosquitto/test.passwd", "/etc/edge-llm/broker"
    board.run("sh", "-c", f"mosquitto_passwd -c -b {passwords} edge-llm secret && chown mosquitto {passwords}")
    board.machine.write("/etc/mosquitto/conf.d/test.conf", f"allow_anonymous true\npassword_file {passwords}\n")
    board.run("systemctl", "restart", "mosquitto")
    board.machine.write(ours, "secret\n")
    board.run("chmod", "600", ours)
    board.configure(OUR_CONFIG + "mqtt: {username: edge-llm}\n")
    board.drop_in(f"[Service]\nLoadCredential=mqtt_password:{ours}\n")
    wait_until(lambda: board.property("StatusText").startswith("ready"), 30)
    found = board.doctor()
    assert [it for it in found if it["level"] == "fail"] == []
    assert any(it["subject"] == "broker" and "answers" in it["text"] for it in found), found
    board.run("rm", ours, passwords, "/etc/mosquitto/conf.d/test.conf")
    board.run("systemctl", "restart", "mosquitto")
    board.configure(OUR_CONFIG)
    board.drop_in(None)


def by_hand(board: Board) -> None:
    """A daemon that was started by hand keeps the service out: the doctor names its process, and nothing else."""
    board.run("systemctl", "stop", UNIT)
    hand = ("--unit=by-hand", "--uid=edge-llm", "--property=Type=notify")
    board.run("systemd-run", *hand, "/usr/bin/edge-llm", "run", "--config", CONFIG)
    holder = board.run("systemctl", "show", "--value", "--property=MainPID", "by-hand").strip()
    board.run("systemctl", "start", "--no-block", UNIT)
    wait_until(lambda: board.property("ExecMainStatus") == "75")
    (wrong,) = (it for it in board.doctor() if it["level"] == "fail")
    assert f"process {holder}, started by hand" in wrong["text"], wrong
    board.run("systemctl", "stop", "by-hand")
    wait_until(board.is_active)


def stop(board: Board) -> None:
    """A stop in mid-generation keeps the text so far, which goes on after the start."""
    board.serve("slow-ollama", "slow")
    board.ask("stopped", "Go on.", model="slow")
    board.await_running("stopped")
    began = time.monotonic()
    board.run("systemctl", "stop", UNIT)
    assert time.monotonic() - began < STOP_TIMEOUT_S
    assert (board.property("Result"), board.property("ExecMainStatus")) == ("success", "0")
    assert board.results("stopped") == []
    board.run("systemctl", "start", UNIT)
    result = board.answer("stopped")
    assert (result["text"], result["attempt"], result["preempted"]) == (SLOW_TEXT, 1, 1), result


def kill(board: Board) -> None:
    """After kill -9 systemd restarts the service, and the task is finished."""
    board.ask("killed", "Go on.", model="slow")
    board.await_running("killed")
    restarts = int(board.property("NRestarts"))
    board.run("systemctl", "kill", "--signal=KILL", "--kill-who=main", UNIT)
    result = board.answer("killed")
    assert (result["text"], result["attempt"]) == (SLOW_TEXT, 2), result
    assert int(board.property("NRestarts")) == restarts + 1


def hung_thread(board: Board) -> None:
    """A worker that hangs is noticed, the service restarted, the task finished."""
    board.drop_in(hanging("worker"))
    board.machine.path(f"{STATE}/hang").touch()
    board.machine.path(STATE).chmod(0o770)
    board.ask("hung", "Go on.", model="slow")
    result = board.answer("hung")
    assert (result["text"], result["attempt"]) == (SLOW_TEXT, 2), result
    assert board.property("NRestarts") == "1"
    assert board.said("thread worker hangs")


def watchdog(board: Board) -> None:
    """A main thread that hangs feeds no watchdog: systemd restarts the service, the task is finished."""
    board.drop_in(hanging("main"))
    board.machine.path(f"{STATE}/hang").touch()
    board.ask("unwatched", "Go on.", model="slow")
    wait_until(lambda: board.property("NRestarts") == "1", 60)
    assert board.said("Watchdog timeout")
    assert board.answer("unwatched")["text"] == SLOW_TEXT
    board.drop_in(None)


def broken_config(board: Board) -> None:
    """A wrong configuration ends the service with status 78 and a line that names the key, once."""
    board.configure(OUR_CONFIG + "no_such_key: 1\n")
    assert board.machine.fails("systemctl", "restart", UNIT)
    # It would be auto-restart if systemd meant to try again.
    assert (board.property("SubState"), board.property("ExecMainStatus")) == ("failed", "78")
    assert board.property("NRestarts") == "0"
    assert board.said("no_such_key")
    board.configure(OUR_CONFIG)
    board.run("systemctl", "restart", UNIT)


def reboot(board: Board) -> None:
    """Tasks that wait when the machine reboots are answered afterwards."""
    board.run("systemctl", "stop", "slow-ollama")
    ids = [f"reboot{number}" for number in range(3)]
    for id_ in ids:
        board.ask(id_, "What is the capital of France?")
    wait_until(lambda: board.waiting() == len(ids))
    board.machine.reboot()
    for id_ in ids:
        assert "Paris" in board.answer(id_)["text"]


def upgrade(board: Board) -> None:
    """An upgrade with tasks in the queue keeps configuration, queue and log, and loses no task."""
    board.serve("slow-ollama", "slow")
    ids = [f"upgrade{number}" for number in range(3)]
    for id_ in ids:
        board.ask(id_, "Go on.", model="slow")
    board.await_running(ids[0])
    before = board.property("MainPID")
    install_package(board, board.newer)
    assert board.property("MainPID") not in (before, "0")
    for id_ in ids:
        assert board.answer(id_)["text"] == SLOW_TEXT
    assert board.machine.path(CONFIG).read_text(encoding="utf-8") == OUR_CONFIG
    assert sorted(path.name for path in board.machine.path("/etc/edge-llm").iterdir()) == ["config.yaml"]
    log = board.machine.path(f"{STATE}/llm_metrics.csv").read_text(encoding="utf-8")
    assert all(f",{id_}," in log for id_ in ["first", "stopped", "killed", "hung", "unwatched", *ids])


def remove(board: Board) -> None:
    """Removal stops the service and keeps queue, log and configuration: installed again, it goes on."""
    board.run("dpkg", "--remove", "edge-llm")
    assert board.machine.fails("systemctl", "is-active", UNIT)
    assert not board.machine.path("/usr/lib/edge-llm").exists()
    assert board.machine.path(f"{STATE}/queue.db").exists()
    assert board.machine.path(CONFIG).exists()
    install_package(board, board.newer)
    seen = len(board.results("first"))
    board.ask("first", "What is the capital of France?")
    wait_until(lambda: len(board.results("first")) > seen)
    board.answer("first")  # the same as before, from the store


def purge(board: Board) -> None:
    """Purging leaves nothing but the user, and of a folder where something is mounted only the folder."""
    board.run("dpkg", "--remove", "edge-llm")
    board.run("mount", "--bind", STATE, STATE)
    board.run("dpkg", "--purge", "edge-llm")
    board.run("umount", STATE)
    board.run("rmdir", STATE)
    left = board.run("find", "/", "-xdev", "-path", "/opt/source", "-prune", "-o", "-name", "*edge-llm*", "-print")
    assert left == "", left
    assert "edge-llm" in board.run("getent", "passwd", "edge-llm")
    assert board.run("systemctl", "list-units", "--failed", "--no-legend").strip() == ""


STORY: tuple[Callable[[Board], None], ...] = (
    *(boot, install, first_start, first_task, journal, http, sandbox, reload),
    *(credential, by_hand, stop, kill),
    *(hung_thread, watchdog, broken_config, reboot, upgrade, remove, purge),
)


def install_package(board: Board, package: Path) -> None:
    """Install what is there as a file; nothing can be fetched, since there is no network."""
    shutil.copyfile(package, board.machine.path("/root/package.deb"))
    board.run("dpkg", "--install", "/root/package.deb")


def hanging(thread: str) -> str:
    """The drop-in with which the named thread hangs once, and is found out sooner than usual."""
    return f"""\
[Service]
ExecStart=
ExecStart=/usr/bin/python3 -I /opt/hang.py {thread} run --config {CONFIG}
WatchdogSec=10
"""


# -- around the story


def main() -> int:
    """Run the story; the exit status."""
    options = arguments()
    if reason := impediment():
        print(f"no test on a real systemd: {reason}")
        return 1
    if options.check:
        return 0
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="edge-llm-systemd-", dir=options.cache.parent) as temporary:
        scratch = Path(temporary)
        packages = step("The package is built in two versions, each time the same", build_packages, scratch)
        prepared = step("There is a Debian to start from", prepared_root, options.suite, options.cache)
        root = step("A machine is laid out", lay_out, prepared, scratch / "root")
        with Machine(root, shared=PROJECT) as machine:
            board = Board(machine, *packages)
            for part in STORY:
                step((part.__doc__ or "").rstrip("."), part, board)
    print(f"all well, {time.monotonic() - began:.0f} s")
    return 0


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="only say whether this can be done here")
    parser.add_argument("--suite", default="bookworm", help="the release of Debian (default: %(default)s)")
    parser.add_argument("--cache", type=Path, default=CACHE, help="where roots are kept (default: %(default)s)")
    return parser.parse_args()


def step(title: str, do: Callable[..., T], *arguments: Any) -> T:
    """Do one step and tell how it went; a failure ends the program with status 1, after the machine's journal."""
    print(f"{title} ...", end=" ", flush=True)
    began = time.monotonic()
    try:
        result = do(*arguments)
    except (AssertionError, CommandFailed, subprocess.SubprocessError) as error:
        line = traceback.extract_tb(error.__traceback__)[1].line
        print(f"FAILED, {time.monotonic() - began:.1f} s\n{line}\n{type(error).__name__}: {error}", flush=True)
        if isinstance(arguments[0], Board):
            print(arguments[0].machine.journal(lines=100))
        raise SystemExit(1) from error
    print(f"ok, {time.monotonic() - began:.1f} s", flush=True)
    return result


def build_packages(folder: Path) -> Sequence[Path]:
    """The package as it is, and the same with a higher version."""

    def build(place: str, *options: str) -> Path:
        output = ["--output", str(folder / place)]
        said = subprocess.run(
            [sys.executable, str(BUILD), *output, *options], stdout=subprocess.PIPE, text=True, check=True
        )
        return Path(said.stdout.strip())

    first, again = build("first"), build("again")
    assert first.read_bytes() == again.read_bytes(), "the same source gave different packages"
    version = first.name.split("_")[1]
    return first, build("newer", "--version", f"{version}+newer")


def lay_out(prepared: Path, root: Path) -> Path:
    """A copy of the prepared root, with our services and a journal that survives a reboot."""
    subprocess.run(["cp", "--archive", "--reflink=auto", str(prepared), str(root)], check=True)
    units = root / "etc/systemd/system"
    for name, text in SERVICES.items():
        (units / name).write_text(text, encoding="utf-8")
    wanted = units / "multi-user.target.wants"
    for name in ("ollama.service", "watcher.service"):
        (wanted / name).symlink_to(f"/etc/systemd/system/{name}")
    (root / "var/log/journal").mkdir(exist_ok=True)
    shutil.copyfile(PROJECT / "tests/systemd/hang.py", root / "opt/hang.py")
    return root


if __name__ == "__main__":
    sys.exit(main())
