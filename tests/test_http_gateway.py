"""The gateway on a whole daemon: the prior system's client, every refusal, tokens, kills, and metrics that agree."""

import csv
import json
import re
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families

from edge_daemon.config import parse
from edge_daemon.http_gateway import Backend, HttpGateway
from edge_daemon.intake import Intake, IntakeRules
from edge_daemon.messages import Incoming
from tests import bad_input, needs
from tests.bad_input import CASES, Case
from tests.conftest import NewMosquitto
from tests.daemon import DaemonProcess, Watcher
from tests.embedded.daemon import TIMEOUT_S, Embedded
from tests.embedded.needs_models import SMOLLM2, need_model
from tests.fake_ollama import FakeModel, FakeOllama, Fault
from tests.fakes import FakeClock
from tests.mosquitto import Mosquitto
from tests.mqtt_client import MqttClient
from tests.ports import free_port
from tests.waiting import wait_until

SMALL = 10**6
JSON = {"Content-Type": "application/json"}
PATIENCE_S = 30.0
DOCS = Path(__file__).parent.parent / "docs"


class Api:
    """A client of one gateway."""

    def __init__(self, port: int, *, token: str | None = None) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.port = port
        self._session = requests.Session()
        if token:
            self._session.headers["Authorization"] = f"Bearer {token}"

    def ask(self, method: str, path: str, **options: Any) -> requests.Response:
        """Any request."""
        return self._session.request(method, self.url + path, timeout=PATIENCE_S, **options)

    def is_there(self) -> bool:
        """Whether it serves."""
        try:
            return self.ask("GET", "/healthz").status_code == 200
        except requests.ConnectionError:
            return False

    def post(self, **fields: Any) -> requests.Response:
        """A task of these fields."""
        return self.ask("POST", "/perform_task", json=fields)

    def send(self, **fields: Any) -> str:
        """A task that is accepted; its id."""
        response = self.post(**fields)
        assert response.status_code == 200, response.text
        return str(response.json()["id"])

    def get(self, task_id: str, wait_s: float = 20) -> Any:
        """How a task is, once it has ended."""
        response = self.ask("GET", f"/tasks/{task_id}?wait={wait_s}")
        assert response.status_code == 200, response.text
        return response.json()

    def until(self, task_id: str, state: str) -> None:
        """Return once a task is in this state."""
        wait_until(lambda: self.get(task_id, 0)["state"] == state)

    def figures(self) -> dict[str, dict[tuple[str, ...], float]]:
        """What /metrics says, by name and values of the labels, as Prometheus' own parser reads it."""
        response = self.ask("GET", "/metrics")
        assert response.status_code == 200, response.text
        found: dict[str, dict[tuple[str, ...], float]] = {}
        for family in text_string_to_metric_families(response.text):
            for sample in family.samples:
                found.setdefault(sample.name, {})[tuple(sample.labels.values())] = sample.value
        return found


def refusal(response: requests.Response) -> tuple[int, str, str]:
    """Status, code and message; the error has the form that it has over MQTT."""
    error = response.json()["error"]
    assert error.keys() == {"code", "message", "retryable"}
    assert ("Retry-After" in response.headers) == error["retryable"]
    return response.status_code, error["code"], error["message"]


def model_server() -> FakeOllama:
    """Models that answer at once, slowly, badly, and one that can never fit."""
    words = " ".join(f"word{n}" for n in range(40))
    return FakeOllama(
        *(FakeModel(name, size_bytes=SMALL) for name in ("default", "small", "other")),
        FakeModel("slow", size_bytes=SMALL, token_s=0.05, answer=words),
        FakeModel("slower", size_bytes=SMALL, token_s=0.5, answer=words),
        FakeModel("broken", size_bytes=SMALL, fault=Fault.ERROR_STATUS, error_status=400, error_text="no"),
        FakeModel("huge", size_bytes=10**15),
    )


@dataclass(frozen=True, kw_only=True)
class Lab:
    """A broker, a model server and a daemon with its gateway, that nobody may stop."""

    daemon: DaemonProcess
    broker: Mosquitto
    client: Watcher
    api: Api


MODELS = {"default": "default", "defaults": {"num_ctx": bad_input.NUM_CTX}}


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """One for all tests that only send and ask."""
    directory = tmp_path_factory.mktemp("http")
    broker = Mosquitto(directory)
    port = free_port()
    broker.start()
    try:
        with (
            model_server() as ollama,
            DaemonProcess(
                directory, broker, ollama_url=ollama.url, models=MODELS, http={"enabled": True, "port": port}
            ) as daemon,
            Watcher(broker) as client,
        ):
            yield Lab(daemon=daemon, broker=broker, client=client, api=Api(port))
    finally:
        broker.kill()


@pytest.fixture
def ollama() -> Iterator[FakeOllama]:
    """A model server of one's own."""
    with model_server() as server:
        yield server


NewDaemon = Callable[..., tuple[DaemonProcess, Api]]


@pytest.fixture
def new_daemon(tmp_path: Path, new_mosquitto: NewMosquitto, ollama: FakeOllama) -> Iterator[NewDaemon]:
    """A running daemon of one's own, with its client; takes sections of the configuration."""
    daemons: list[DaemonProcess] = []

    def new(token: str | None = None, **settings: Any) -> tuple[DaemonProcess, Api]:
        port = free_port()
        settings["http"] = {"enabled": True, "port": port, **settings.get("http", {})}
        broker = new_mosquitto(persistence=True)
        daemon = DaemonProcess(tmp_path, broker, ollama_url=ollama.url, **{"models": MODELS, **settings})
        daemons.append(daemon)
        daemon.start()
        return daemon, Api(port, token=token)

    yield new
    for daemon in daemons:
        daemon.kill()
        print(daemon.log())


# -- tasks in, answers out -------------------------------------------------------------------------------------------


@pytest.mark.broker
def test_a_task_is_answered_here_and_over_mqtt(lab: Lab) -> None:
    """The prior system's payload is accepted with its words, its result is the same here, over MQTT and in the log."""
    response = lab.api.post(task_type="arithmetic", model_name="small", prompt="What is 2+2?")
    told = response.json()
    assert response.status_code == 200
    assert (told["message"], told["src"], told["state"], told["duplicate"]) == (
        "Task added to queue.",
        "http",
        "queued",
        False,
    )
    assert response.headers["Location"] == told["links"]["self"] == f"/tasks/{told['id']}"
    ended = lab.api.ask("GET", told["links"]["wait"]).json()
    assert (ended["state"], ended["result"]["text"]) == ("succeeded", "echo: What is 2+2?")
    assert ended["result"] == lab.client.result("http", told["id"])
    wait_until(lambda: [row for row in lab.daemon.rows("task") if row["task_id"] == told["id"]])


@pytest.mark.broker
def test_an_id_is_run_once(lab: Lab) -> None:
    """The same task again is answered from the store; another one of this id is a conflict."""
    task = {"id": "once", "prompt": "hello"}
    lab.api.post(**task)
    first = lab.api.get("once")
    again = lab.api.post(**task)
    assert (again.status_code, again.json()["duplicate"], again.json()["result"]) == (200, True, first["result"])
    assert refusal(lab.api.post(id="once", prompt="something else"))[:2] == (409, "duplicate_conflict")


@pytest.mark.broker
def test_equal_tasks_without_an_id_are_two(lab: Lab) -> None:
    """Whoever gives no id gets one of its own each time."""
    assert lab.api.send(prompt="the same") != lab.api.send(prompt="the same")


@pytest.mark.broker
def test_cancel(lab: Lab) -> None:
    """A running task is stopped and keeps its text, a waiting one never runs; one that has ended is left alone."""
    running = lab.api.send(prompt="x", model="slow")
    lab.api.until(running, "running")
    waiting = lab.api.send(prompt="x", model="other")
    gone = lab.api.ask("DELETE", f"/tasks/{waiting}")
    assert (gone.status_code, gone.json()["state"], gone.json()["attempt"]) == (200, "cancelled", 0)
    assert lab.api.ask("DELETE", f"/tasks/{running}").status_code in (200, 202)
    assert lab.api.get(running)["state"] == "cancelled"
    assert lab.api.ask("DELETE", f"/tasks/{running}").status_code == 200
    done = lab.api.send(prompt="x")
    lab.api.get(done)
    assert refusal(lab.api.ask("DELETE", f"/tasks/{done}"))[:2] == (409, "already_ended")
    assert refusal(lab.api.ask("DELETE", "/tasks/unheard-of"))[:2] == (404, "unknown_task")


@pytest.mark.broker
def test_a_task_type_by_its_data(new_daemon: NewDaemon) -> None:
    """A task of a configured type needs only its values, as over MQTT; a wrong one is named."""
    kind = {"template": "$temperature $unit: too hot?", "model": "small"}
    _, api = new_daemon(task_types={"classify": kind})
    task_id = api.send(task_type="classify", data={"temperature": 91, "unit": "C"})
    assert api.get(task_id)["result"]["text"] == "echo: 91 C: too hot?"
    status, code, message = refusal(api.post(task_type="classify", data={"temperature": 91}))
    assert (status, code, message.partition(":")[0]) == (400, "invalid_field", "data.unit")


@pytest.mark.broker
def test_reload(new_daemon: NewDaemon) -> None:
    """A new port is opened by a reload, those who wait are told, and the running task ends in its new life."""
    daemon, api = new_daemon()
    task_id = api.send(prompt="x", model="slow")
    api.until(task_id, "running")
    port = free_port()
    with ThreadPoolExecutor(1) as pool:
        wait = pool.submit(Api(api.port).get, task_id, 60)
        before = daemon.subscriptions()
        daemon.configure(http={"port": port})
        daemon.signal(signal.SIGHUP)
        assert wait.result(PATIENCE_S)["state"] in ("queued", "running")
        daemon.wait_ready(before)
    moved = Api(port)
    wait_until(moved.is_there)
    assert not api.is_there()
    ended = moved.get(task_id)
    assert (ended["state"], ended["attempt"], ended["result"]["preempted"]) == ("succeeded", 1, 1)


# -- bad input -------------------------------------------------------------------------------------------------------

CARRIED = [case for case in CASES if case.http and not case.beside.keys() - {"content_type"}]
"""What is said in a topic or a property has no place here; text that is no JSON is a payload like any other."""


def expected(case: Case) -> tuple[str | None, str]:
    """Code and word of a case when it is sent as JSON, as all that comes here is."""
    text = case.payload.decode("utf-8", "replace")
    if text.lstrip().startswith("{") or case.code in ("invalid_utf8", "too_large"):
        return case.code, case.says
    try:
        json.loads(text, parse_constant=int)  # NaN is none
    except ValueError:
        return "invalid_json", ""
    return "invalid_field", "prompt: missing"


@pytest.mark.broker
@pytest.mark.parametrize("case", CARRIED, ids=[case.name for case in CARRIED])
def test_bad_input(lab: Lab, case: Case) -> None:
    """Each bad input has its code, the status of its code and the right words; what only looks bad is accepted."""
    response = lab.api.ask("POST", "/perform_task", data=case.payload, headers=JSON)
    code, says = expected(case)
    if code is None:
        assert response.status_code == 200, response.text
        assert says in "".join(response.json()["warnings"][:1])
        return
    status, told, message = refusal(response)
    assert (status, told) == (documented_statuses()[code], code)
    assert says.lower() in message.lower()


@pytest.mark.broker
def test_good_tasks_after_bad_ones(lab: Lab) -> None:
    """After all of that the daemon serves, and its journal has neither a trace nor a forged line."""
    assert lab.api.get(lab.api.send(prompt="good"))["state"] == "succeeded"
    log = lab.daemon.log()
    assert "Traceback" not in log
    assert "\x1b" not in log
    assert not [line for line in log.splitlines() if line.startswith("forged")]


@pytest.mark.broker
@pytest.mark.parametrize(
    ("method", "path", "options", "status", "code"),
    [
        ("GET", "/", {}, 404, "not_found"),
        ("GET", "/tasks/", {}, 404, "not_found"),
        ("GET", "/tasks/a/b", {}, 404, "not_found"),
        ("GET", "/tasks/nobody", {}, 404, "unknown_task"),
        ("GET", "/tasks/%00%ff", {}, 404, "unknown_task"),
        ("GET", "/tasks/" + "x" * 5000, {}, 404, "unknown_task"),
        ("GET", "/perform_task", {}, 405, "method_not_allowed"),
        ("PUT", "/tasks/x", {}, 405, "method_not_allowed"),
        ("OPTIONS", "/perform_task", {}, 405, "method_not_allowed"),
        ("POST", "/metrics", {}, 405, "method_not_allowed"),
        *(
            ("GET", f"/tasks/x?wait={wait}", {}, 400, "invalid_field")
            for wait in ("-1", "61", "nan", "1e1", "", "soon", "9" * 9)
        ),
        ("POST", "/perform_task", {"data": b"hello"}, 415, "unsupported_media_type"),
        ("POST", "/perform_task", {"data": {"prompt": "p"}}, 415, "unsupported_media_type"),
        ("POST", "/perform_task", {"data": b"p", "headers": {"Content-Type": "text/plain"}}, 415, None),
        ("POST", "/perform_task", {"files": {"prompt": b"p"}}, 415, "unsupported_media_type"),
        ("POST", "/perform_task", {"headers": JSON}, 400, "invalid_json"),
        ("GET", "/healthz", {"headers": {"X": "x" * 20_000}}, 431, "too_large"),
    ],
)
def test_bad_requests(  # noqa: PLR0917
    lab: Lab, method: str, path: str, options: dict[str, Any], status: int, code: str | None
) -> None:
    """What is no request for anything that there is has its status and the same form of error."""
    response = lab.api.ask(method, path, **options)
    assert refusal(response)[:2] == (status, code or "unsupported_media_type")
    assert bool(response.headers.get("Allow")) == (status == 405)


@pytest.mark.broker
@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"hello\r\n\r\n", b"400"),
        (b"POST /perform_task HTTP/1.1\r\nContent-Length: x\r\n\r\n", b"400"),
        (b"POST /perform_task HTTP/1.1\r\nTransfer-Encoding: gzip\r\n\r\n", b"501"),
        (b"POST /perform_task HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", b"400"),
        (b"GET / HTTP/1.1\r\nA\r\n\r\n", b"400"),
        (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", b"400"),
    ],
)
def test_what_is_not_http(lab: Lab, data: bytes, status: bytes) -> None:
    """What cannot be read as HTTP is refused in the same form, and the connection ends."""
    with socket.create_connection(("127.0.0.1", lab.api.port), timeout=PATIENCE_S) as wire:
        wire.sendall(data)
        answer = b"".join(iter(lambda: wire.recv(4096), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.split()[1] == status
    assert json.loads(body)["error"]["code"] == "bad_request"


@pytest.mark.broker
@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://localhost:5000"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Host": "evil.example"},
        {"Host": "evil.example:5000"},
        {"Host": "localhost.evil.example"},
        {"Host": "[::1"},
        {"Host": "10.0.0.1"},
    ],
)
def test_web_pages_are_shut_out(lab: Lab, headers: dict[str, str]) -> None:
    """A page in a browser on this machine gets nothing, by whatever name it comes, and never a permission to read."""
    for method, path in (("POST", "/perform_task"), ("GET", "/tasks/x"), ("OPTIONS", "/perform_task")):
        response = lab.api.ask(method, path, json={"prompt": "p"}, headers=headers)
        assert refusal(response)[:2] == (403, "forbidden")
        assert not [name for name in response.headers if name.lower().startswith("access-control")]


@pytest.mark.broker
@pytest.mark.parametrize("host", ["localhost", "localhost:5000", "127.0.0.1:8080", "[::1]:5000", "LOCALHOST"])
def test_names_of_this_machine(lab: Lab, host: str) -> None:
    """Every name of the loopback is served, on any port, as through a tunnel; no cookie is set."""
    response = lab.api.ask("GET", "/healthz", headers={"Host": host, "Sec-Fetch-Site": "none"})
    assert (response.status_code, response.json()) == (200, {"status": "ok"})
    assert "Set-Cookie" not in response.headers


# -- what the documentation says -------------------------------------------------------------------------------------


def documented_statuses() -> dict[str, int]:
    """The status of each code, from the table of docs/http.md."""
    rows = re.findall(r"^\| (\d{3}) \| (.*?) \|", (DOCS / "http.md").read_text(encoding="utf-8"), re.MULTILINE)
    return {code: int(status) for status, codes in rows for code in re.findall(r"`(\w+)`", codes)}


def documented_codes() -> set[str]:
    """The codes of rejected tasks, from docs/mqtt.md."""
    text = (DOCS / "mqtt.md").read_text(encoding="utf-8")
    table = text.split("Codes of `rejected`:")[1].split("Codes of `failed`")[0]
    return set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE))


@pytest.fixture
def gateway() -> Iterator[Callable[..., Api]]:
    """A gateway without a daemon behind it: what the backend says is the test's."""
    started: list[HttpGateway] = []

    def start(submit: Callable[[Any], Any]) -> Api:
        port = free_port()
        backend = Backend(
            submit=submit,
            find=lambda *_: None,
            cancel=lambda *_: False,
            state=lambda: ("ready", ""),
            figures=dict,
        )
        config = parse(f"http: {{enabled: true, port: {port}}}")
        started.append(HttpGateway(config, backend, tokens={}))
        started[-1].start()
        return Api(port)

    yield start
    for one in started:
        one.stop(5)


def test_every_code_has_its_documented_status(gateway: Callable[..., Api]) -> None:
    """All rejection codes of docs/mqtt.md have the status that docs/http.md gives them, whatever their reason."""
    rules = IntakeRules(config=parse(""), clock=FakeClock(), check_model=None, check_reply_to=None)  # type: ignore[arg-type]
    intake = Intake(rules, lambda _: [], lambda _: [])
    retryable = {"queue_full", "rate_limited", "draining", "storage_full"}
    codes = iter(sorted(documented_codes()))

    def submit(batch: list[Incoming]) -> list[Any]:
        code = next(codes)
        return [intake.refuse(batch[0], code, "because", retryable=code in retryable)]

    api = gateway(submit)
    told = [refusal(api.post(prompt="p")) for _ in documented_codes()]
    assert {code: status for status, code, _ in told} == {
        code: documented_statuses()[code] for code in documented_codes()
    }
    assert len(told) >= 14


def test_a_failure_is_told_without_a_secret(gateway: Callable[..., Api]) -> None:
    """What breaks inside is 500 without a word of what broke."""

    def submit(_batch: Any) -> Any:
        raise RuntimeError("secret")

    api = gateway(submit)
    status, code, message = refusal(api.post(prompt="p"))
    assert (status, code) == (500, "internal")
    assert "secret" not in message


def test_the_keys_of_the_migration_page() -> None:
    """Every key that a constant of the prior system became is one of the configuration."""
    keys = re.findall(
        r"^\| [^|]* \| `(\w+)\.(\w+)\b", (DOCS / "migration.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    config = parse("")
    assert len(keys) == 7
    assert [key for section, key in keys if not hasattr(getattr(config, section), key)] == []


# -- limits ----------------------------------------------------------------------------------------------------------


@pytest.mark.broker
def test_a_sender_has_limits(new_daemon: NewDaemon) -> None:
    """Too many waiting tasks of one sender are queue_full, too many a minute rate_limited; what is known is neither."""
    _, api = new_daemon(queue={"per_source_tasks": 2, "per_source_rate": 4})
    for task_id in ("a", "b"):
        api.send(id=task_id, prompt="x", model="slow")
    assert [refusal(api.post(prompt="x"))[:2] for _ in range(2)] == [(503, "queue_full")] * 2
    assert refusal(api.post(prompt="x"))[:2] == (429, "rate_limited")
    assert api.post(id="a", prompt="x", model="slow").json()["duplicate"]
    assert api.figures()["edge_llm_rejected_total"] == {("queue_full",): 2, ("rate_limited",): 1}


@pytest.mark.broker
def test_waiting_is_bounded(new_daemon: NewDaemon) -> None:
    """Beyond max_waiting nobody waits, all else is served meanwhile, and those who wait are answered at the end."""
    _, api = new_daemon(http={"max_waiting": 2})
    task_id = api.send(prompt="x", model="slower")
    path = f"/tasks/{task_id}?wait="

    def wait() -> str:
        mine = Api(api.port)
        while (response := mine.ask("GET", path + "60")).status_code == 503:
            pass  # the test itself was looking
        return str(response.json()["state"])

    with ThreadPoolExecutor(2) as pool:
        waits = [pool.submit(wait) for _ in range(2)]
        wait_until(lambda: all(api.ask("GET", path + "0.1").status_code == 503 for _ in range(3)))
        assert refusal(api.ask("GET", path + "1"))[:2] == (503, "too_many_waiting")
        assert api.get(task_id, 0)["state"] in ("queued", "running")
        assert not any(wait.done() for wait in waits)
        api.ask("DELETE", f"/tasks/{task_id}")
        assert [wait.result(PATIENCE_S) for wait in waits] == ["cancelled"] * 2
    assert api.get(task_id, 1)["state"] == "cancelled"


@pytest.mark.broker
def test_draining(new_daemon: NewDaemon) -> None:
    """A daemon that stops refuses tasks and is not ready, answers all else, and ends well with a client connected."""
    daemon, api = new_daemon()
    assert (api.ask("GET", "/readyz").status_code, api.ask("GET", "/readyz").json()["state"]) == (200, "ready")
    running, waiting = api.send(prompt="x", model="slow"), api.send(prompt="x", model="slow")
    api.until(running, "running")
    with ThreadPoolExecutor(1) as pool:
        waits = pool.submit(Api(api.port).get, waiting, 60)
        daemon.signal(signal.SIGTERM)
        wait_until(lambda: api.ask("GET", "/readyz").status_code == 503)
        assert refusal(api.post(prompt="x"))[:2] == (503, "draining")
        assert api.get(running)["state"] == "succeeded"
        assert daemon.wait() == 0
        assert waits.result(PATIENCE_S)["state"] == "queued"
    with pytest.raises(requests.ConnectionError):
        api.ask("GET", "/healthz")


@pytest.mark.broker
def test_idle_connections_shut_nobody_out(lab: Lab) -> None:
    """Half a request on many connections keeps nobody from being served."""
    wires = [socket.create_connection(("127.0.0.1", lab.api.port)) for _ in range(40)]
    try:
        for wire in wires:
            wire.sendall(b"POST /perform_task HTTP/1.1\r\nContent-Length: 100\r\n\r\n{")
        assert Api(lab.api.port).get(lab.api.send(prompt="x"))["state"] == "succeeded"
    finally:
        for wire in wires:
            wire.close()


# -- tokens ----------------------------------------------------------------------------------------------------------

TOKENS = {"door7": "d" * 32, "kitchen": "k:" * 16, "door7 too": "n" * 32}


@pytest.mark.broker
def test_tokens(new_daemon: NewDaemon, tmp_path: Path) -> None:
    """With tokens the token's name is the sender, strangers see only the two probes, and nobody another's tasks."""
    file = tmp_path / "tokens"
    file.write_text("".join(f"{name.split()[0]}:{token}\n" for name, token in TOKENS.items()), encoding="ascii")
    file.chmod(0o640)
    _, door = new_daemon(token=TOKENS["door7"], http={"host": "0.0.0.0", "tokens_file": str(file)})  # noqa: S104
    stranger, kitchen, new = Api(door.port), Api(door.port, token=TOKENS["kitchen"]), Api(door.port, token="n" * 32)
    told = door.post(prompt="p", id="one").json()
    assert (told["src"], door.get("one")["result"]["src"]) == ("door7", "door7")
    assert new.get("one")["state"] == "succeeded"
    assert refusal(kitchen.ask("GET", "/tasks/one"))[:2] == (404, "unknown_task")
    assert refusal(kitchen.ask("DELETE", "/tasks/one"))[:2] == (404, "unknown_task")
    assert door.ask("GET", "/metrics", headers={"Host": "pi1.example"}).status_code == 200
    assert [stranger.ask("GET", path).status_code for path in ("/healthz", "/readyz")] == [200, 200]
    for given in (None, "Bearer", "Bearer x", "Bearer " + "d" * 31, "Basic " + "d" * 32, "d" * 32, "Bearer \xff"):
        headers = {"Authorization": given} if given else {}
        for method, path in (("POST", "/perform_task"), ("GET", "/tasks/one"), ("GET", "/metrics"), ("GET", "/x")):
            response = stranger.ask(method, path, json={"prompt": "p"}, headers=headers)
            assert refusal(response)[:2] == (401, "unauthorized")
            assert response.headers["WWW-Authenticate"] == "Bearer"


# -- many at once, and a kill ----------------------------------------------------------------------------------------


def send_all(port: int, numbers: list[int], told: dict[int, requests.Response]) -> threading.Thread:
    """Send these tasks at once, each on a connection of its own; what is answered goes into `told`."""

    def send(number: int) -> None:
        with suppress(requests.RequestException):  # then nobody promised anything
            told[number] = Api(port).post(id=f"t{number}", prompt=f"number {number}")

    def run() -> None:
        with ThreadPoolExecutor(len(numbers)) as pool:
            list(pool.map(send, numbers))

    thread = threading.Thread(target=run)
    thread.start()
    return thread


@pytest.mark.broker
def test_two_hundred_at_once_over_a_kill(new_daemon: NewDaemon) -> None:
    """What was accepted before a kill -9 is answered once after it; sent again, all two hundred are accepted."""
    daemon, api = new_daemon()
    told: dict[int, requests.Response] = {}
    sending = send_all(api.port, list(range(200)), told)
    wait_until(lambda: len(told) >= 40, PATIENCE_S)
    daemon.kill()
    sending.join(PATIENCE_S)
    first = dict(told)
    assert {response.status_code for response in first.values()} == {200}
    assert 40 <= len(first) < 200
    with Watcher(daemon.broker) as client:
        daemon.start()
        told.clear()
        send_all(api.port, list(range(200)), told).join(PATIENCE_S)
        assert {number: response.status_code for number, response in told.items()} == dict.fromkeys(range(200), 200)
        assert all(told[number].json()["duplicate"] for number in first)
        for number in range(200):
            result = api.get(f"t{number}")["result"]
            assert (result["state"], result["text"]) == ("succeeded", f"echo: number {number}")
        client.wait_for(lambda _: len({m.json["id"] for m in client.of("http", "result")}) == 200, PATIENCE_S)
    assert daemon.stop() == 0
    every = {f"t{number}": 1 for number in range(200)}
    assert Counter(row["task_id"] for row in daemon.rows("task")) == every
    assert Counter((row.id, row.state) for row in daemon.stored()) == {(name, "succeeded"): 1 for name in every}


# -- metrics ---------------------------------------------------------------------------------------------------------


def summed(rows: list[dict[str, str]], column: str, by: str | None = None) -> dict[tuple[str, ...], float]:
    """The sums of a column by another one, without those of rows where it is empty or 0."""
    sums: Counter[tuple[str, ...]] = Counter()
    for row in rows:
        sums[(row[by],) if by else ()] += int(row[column] or 0)
    return {key: value for key, value in sums.items() if value}


def counted(rows: list[dict[str, str]], column: str) -> dict[tuple[str, ...], float]:
    """How often each value of a column stands there."""
    return dict(Counter((row[column],) for row in rows if row[column]))


@pytest.mark.broker
def test_metrics_agree_with_the_log(new_daemon: NewDaemon) -> None:
    """After tasks of every end, by both ways in, with swaps and refusals, each counter is what the log's rows say."""
    daemon, api = new_daemon(pool={"max_resident": 1}, scheduler={"soft_wait_s": {"normal": 0.1}})
    with MqttClient(daemon.broker.host, daemon.broker.port) as client:
        slow = api.send(prompt="x", model="slow")
        api.until(slow, "running")
        expiring = api.send(prompt="x", model="other", ttl_s=0.01)
        urgent = api.send(prompt="x", model="small", priority="urgent")
        mixed = [api.send(prompt=f"number {n}", model=model) for n, model in enumerate(["small", "other"] * 3)]
        failing = [api.send(prompt="x", model="broken"), api.send(prompt="x", format="json")]
        cancelled = api.send(prompt="x", model="slow")
        api.ask("DELETE", f"/tasks/{cancelled}")
        for payload in ("{bad", '{"prompt": "p", "model": "nope"}', "hello"):
            client.publish("edge-llm/n/task/door", payload)
        for fields in ({"model": "nope"}, {"priority": "asap"}):
            assert api.post(prompt="p", **fields).status_code >= 400
        states = Counter(api.get(name)["state"] for name in [slow, expiring, urgent, *mixed, *failing, cancelled])
    assert states == {"succeeded": 8, "failed": 2, "expired": 1, "cancelled": 1}
    wait_until(lambda: len(daemon.rows("task")) == 13)
    wait_until(lambda: sum(api.figures()["edge_llm_queue_depth"].values()) == api.figures()["edge_llm_outbox"][()] == 0)
    told = api.figures()
    tasks, models = daemon.rows("task"), daemon.rows("model")
    loads = [row for row in models if row["status"] == "loaded"]

    def of(name: str, *, seconds: bool = False) -> dict[tuple[str, ...], float]:
        scale = 1e9 if seconds else 1
        return {key: round(value * scale) for key, value in told.get(f"edge_llm_{name}", {}).items() if value}

    assert of("tasks_total") == counted(tasks, "status")
    assert of("task_errors_total") == counted(tasks, "error_code")
    assert of("queue_wait_seconds_count") == counted(tasks, "priority")
    assert of("queue_wait_seconds_sum", seconds=True) == pytest.approx(summed(tasks, "queue_wait_ns", "priority"))
    assert of("task_seconds_sum", seconds=True) == pytest.approx(summed(tasks, "task_latency_ns"))
    assert of("prompt_tokens_total") == summed(tasks, "prompt_eval_count", "model_name")
    assert of("output_tokens_total") == summed(tasks, "eval_count", "model_name")
    assert of("generation_seconds_total", seconds=True) == pytest.approx(
        summed(tasks, "eval_duration_ns", "model_name")
    )
    assert of("preemptions_total") == summed(tasks, "preemptions")
    assert of("model_loads_total") == counted(loads, "model_name")
    assert of("model_unloads_total") == counted([r for r in models if r["status"] == "unloaded"], "model_name")
    assert of("model_load_seconds_sum", seconds=True) == pytest.approx(summed(loads, "model_switching_time_ns"))
    assert of("swaps_total") == {(): sum(bool(row["evicted_models"]) for row in loads)}
    assert of("evictions_total") == counted(models, "evicted_models")  # one place, so one at a time
    assert of("events_total") == counted(daemon.rows("event"), "task_type")
    assert of("rejected_total") == {("invalid_json",): 1, ("unknown_model",): 2, ("invalid_field",): 1}
    assert of("swaps_total")[()] >= 2
    assert of("preemptions_total")[()] >= 1
    assert (of("broker_up"), of("ollama_up"), of("ready")) == ({(): 1}, {(): 1}, {(): 1})
    assert sum(of("resident_bytes").values()) > 0


def test_every_metric_is_documented(gateway: Callable[..., Api]) -> None:
    """docs/http.md names each metric, and none that there is not."""
    from edge_daemon.metrics import Metrics

    now: dict[str, Any] = {
        "queue": {"waiting": {}, "running": None, "unsent": 0},
        "models": {"models": [], "budget_bytes": 0},
        "broker_up": True,
        "ollama_up": True,
        "state": "ready",
    }
    families = text_string_to_metric_families(Metrics(lambda: now, node="n").text().decode())
    names = {family.name for family in families if not family.name.startswith("edge_llm_process_")}
    text = (DOCS / "http.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"^\| `(edge_llm_\w+?)(?:_total)?(?:\{.*?\})?` \|", text, re.MULTILINE))
    assert documented == names


# -- on and off ------------------------------------------------------------------------------------------------------


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a piece of Python in a process of its own."""
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)


def test_nothing_is_imported_while_it_is_off(tmp_path: Path) -> None:
    """A daemon without the gateway knows nothing of Flask, waitress and Prometheus; with it, it watches its thread."""
    code = """
import sys
from pathlib import Path
from edge_daemon.config import load
from edge_daemon.main import Daemon
http = {"http.enabled": sys.argv[2] == "on", "http.port": int(sys.argv[3])}
daemon = Daemon(load(None, {"data_dir": Path(sys.argv[1]), **http}))
print(*[thread.name for thread in daemon._threads() if thread.name == "http"])
print(*sorted({"flask", "werkzeug", "waitress", "prometheus_client", "edge_daemon.metrics"} & sys.modules.keys()))
"""
    off = run_python(code, str(tmp_path / "off"), "off", str(free_port()))
    assert (off.returncode, off.stdout) == (0, "\n\n"), off.stderr
    on = run_python(code, str(tmp_path / "on"), "on", str(free_port()))
    assert on.stdout == "http\nedge_daemon.metrics flask prometheus_client waitress werkzeug\n", on.stderr


CLI = "import sys; {before}; from edge_daemon import cli; sys.exit(cli.main(sys.argv[1:]))"


def test_a_missing_extra_is_named(tmp_path: Path) -> None:
    """Without the extra the run ends with 78 and says how to get it."""
    code = CLI.format(before="sys.modules['waitress'] = None")
    done = run_python(code, "run", "--http", "--data-dir", str(tmp_path))
    assert done.returncode == 78
    assert done.stderr.splitlines()[-1] == (
        "edge-llm: http.enabled: waitress is missing. With the Debian package: "
        "sudo apt install python3-flask python3-waitress python3-prometheus-client. "
        "With pip, in a clone: pip install '.[http]'"
    )


def test_a_missing_extra_is_found_before_the_start(tmp_path: Path) -> None:
    """`check-config` and the doctor see it too, so that nobody looks for the fault in a configuration that is right."""
    config = tmp_path / "config.yaml"
    config.write_text(f"http: {{enabled: true}}\ndata_dir: {tmp_path}\n", encoding="utf-8")
    code = CLI.format(before="sys.modules['waitress'] = None")
    checked = run_python(code, "check-config", "--config", str(config))
    assert checked.returncode == 78
    assert "http.enabled: waitress is missing. With the Debian package: sudo apt install" in checked.stderr
    doctor = run_python(code, "doctor", "--config", str(config))
    assert doctor.returncode == 1
    assert "config: http.enabled: waitress is missing\n" in doctor.stdout
    assert "python3-waitress" in doctor.stdout


def test_a_taken_port_is_named(tmp_path: Path) -> None:
    """A port that another program has ends the run with 75, and names the key and the option."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        done = run_python(CLI.format(before="pass"), "run", "--http-port", str(port), "--data-dir", str(tmp_path))
    assert done.returncode == 75
    assert f"http.port: 127.0.0.1:{port}: Address already in use" in done.stderr
    assert "--http-port" in done.stderr


# -- the real thing --------------------------------------------------------------------------------------------------


def prior_client(port: int, count: int) -> Iterator[requests.Response]:
    """Tasks as the prior system's own test sends them, without the pauses between them."""
    for number in range(count):
        task = {"task_type": "arithmetic", "model_name": SMOLLM2, "prompt": f"What is {number} + 3?"}
        yield requests.post(f"http://localhost:{port}/perform_task", json=task, timeout=PATIENCE_S)


@pytest.fixture
def embedded(tmp_path: Path) -> Iterator[tuple[Embedded, Api]]:
    """`edge-llm run --embedded --http`, connected to its broker."""
    need_model(SMOLLM2)
    port = free_port()
    config = tmp_path / "config.yaml"
    config.write_text("models: {defaults: {max_tokens: 24}}\n", encoding="utf-8")
    daemon = Embedded(tmp_path, "--http", "--http-port", str(port), config=config)
    try:
        daemon.await_log(": connected, MQTT")
        yield daemon, Api(port)
    finally:
        daemon.process.kill()
        daemon.process.wait()


@pytest.mark.broker
@pytest.mark.models
def test_the_prior_systems_clients(embedded: tuple[Embedded, Api]) -> None:
    """Its curl line and its ten requests are answered by a real model: here, over MQTT and in the log."""
    daemon, api = embedded
    assert f"curl http://127.0.0.1:{api.port}/perform_task" in daemon.log()
    with MqttClient("127.0.0.1", daemon.port) as client:
        client.subscribe("edge-llm/n1/reply/http/+/result")
        curl = [needs.tool("curl", package="curl"), "-sS", "-X", "POST", f"{api.url}/perform_task"]
        task = {"task_type": "arithmetic", "model_name": SMOLLM2, "prompt": "What is 2+2?"}
        curl += ["-H", "Content-Type: application/json", "-d", json.dumps(task)]
        told = [json.loads(subprocess.run(curl, capture_output=True, check=True, timeout=PATIENCE_S).stdout)]
        for response in prior_client(api.port, 10):
            assert response.status_code == 200
            told.append(response.json())
        assert {answer["message"] for answer in told} == {"Task added to queue."}
        results = {answer["id"]: ended(api, answer["id"]) for answer in told}
        assert len(results) == 11
        assert {result["state"] for result in results.values()} == {"succeeded"}
        assert all(result["text"] for result in results.values())
        for task_id, result in results.items():
            assert client.wait_for_topic(f"edge-llm/n1/reply/http/{task_id}/result", TIMEOUT_S).json == result
        assert api.figures()["edge_llm_tasks_total"][("succeeded",)] == 11
    daemon.process.terminate()
    assert daemon.process.wait(TIMEOUT_S) == 0
    rows = logged(daemon.csv_path)
    assert Counter(row["task_id"] for row in rows) == dict.fromkeys(results, 1)
    assert {(row["task_type"], row["model_name"], row["src"]) for row in rows} == {("arithmetic", SMOLLM2, "http")}


def ended(api: Api, task_id: str) -> Mapping[str, Any]:
    """The result of a task, however busy the machine is."""
    wait_until(lambda: api.get(task_id)["result"] is not None, TIMEOUT_S)
    result: Mapping[str, Any] = api.get(task_id)["result"]
    return result


def logged(path: Path) -> list[dict[str, str]]:
    """The rows of tasks in a log."""
    with path.open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if row["record"] == "task"]
