"""tools/publish_task.py, run as a user runs it, on a real broker; the test plays the node."""

import ast
import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import needs
from tests.conftest import NewMosquitto
from tests.mosquitto import Mosquitto
from tests.mqtt_client import V311, MqttClient, Received
from tests.ports import free_port
from tests.waiting import wait_until

pytestmark = pytest.mark.broker

TOOL = Path(__file__).parent.parent / "tools" / "publish_task.py"
HOSTNAME = socket.gethostname()
TIMEOUT_S = 20.0
SCHEMA = {"type": "object", "properties": {"answer": {"type": "integer"}}}


class Node:
    """Plays the daemon: it is online, takes tasks and answers as told."""

    def __init__(self, client: MqttClient, name: str) -> None:
        self.client = client
        self.name = name
        client.subscribe(f"edge-llm/{name}/task/#")
        self.available("online")

    def available(self, payload: str) -> None:
        """Publish the retained availability."""
        self.client.publish(f"edge-llm/{self.name}/availability", payload, retain=True)

    def tasks(self) -> list[Received]:
        """All tasks that came so far."""
        return [m for m in self.client.messages if m.topic.startswith(f"edge-llm/{self.name}/task/")]

    def task(self) -> Received:
        """The first task, once it has come."""
        return self.client.wait_for(lambda m: m.topic.startswith(f"edge-llm/{self.name}/task/"), TIMEOUT_S)

    def status(self, seq: int, state: str, **fields: Any) -> None:
        """Publish a status of the first task."""
        self.reply("status", {"seq": seq, "state": state, **fields})

    def chunk(self, seq: int, text: str) -> None:
        """Publish a piece of the answer of the first task."""
        self.reply("stream", {"seq": seq, "text": text})

    def result(self, text: str | None = None, *, state: str = "succeeded", **fields: Any) -> None:
        """Publish the result of the first task."""
        self.reply("result", {"state": state, "text": text, **fields})

    def reply(self, kind: str, body: dict[str, Any]) -> None:
        """Publish on a reply topic of the first task."""
        topic = self.task().topic.replace("/task/", "/reply/")
        self.client.publish(f"{topic}/{kind}", {"id": topic.rpartition("/")[2], **body})


class Tool:
    """One run of the tool."""

    def __init__(self, arguments: list[str], environment: dict[str, str] | None = None) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(TOOL), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | (environment or {}),
        )

    def read_stdout(self, size: int) -> str:
        """Wait for exactly `size` bytes of output."""
        assert self._process.stdout is not None
        return self._process.stdout.read(size).decode()

    def read_stderr_line(self) -> str:
        """Wait for the next line on standard error."""
        assert self._process.stderr is not None
        return self._process.stderr.readline().decode().rstrip("\n")

    def interrupt(self) -> None:
        """Press Ctrl-C."""
        self._process.send_signal(signal.SIGINT)

    def type_in(self, text: str) -> None:
        """Give all of standard input."""
        assert self._process.stdin is not None
        self._process.stdin.write(text.encode())
        self._process.stdin.close()
        self._process.stdin = None

    def end(self) -> tuple[int, str, str]:
        """Wait for the end: exit status, and what is left of output and errors."""
        out, err = self._process.communicate(timeout=TIMEOUT_S)
        return self._process.returncode, out.decode(), err.decode()

    def close(self) -> None:
        """Leave no process behind."""
        self._process.kill()
        self._process.communicate()


Ask = Callable[..., Tool]


@pytest.fixture
def node(mosquitto: Mosquitto, unique_node: str) -> Iterator[Node]:
    """A node on the shared broker."""
    with MqttClient(mosquitto.host, mosquitto.port) as client:
        node = Node(client, unique_node)
        yield node
        node.available("")


@pytest.fixture
def ask(mosquitto: Mosquitto, unique_node: str) -> Iterator[Ask]:
    """Run the tool against a broker (default: the shared one) with this test's node."""
    tools: list[Tool] = []

    def run(*arguments: str, broker: Mosquitto = mosquitto, **environment: str) -> Tool:
        address = ["--host", broker.host, "--port", str(broker.port), "--node", unique_node]
        tools.append(Tool([*address, *arguments], environment))
        return tools[-1]

    yield run
    for tool in tools:
        tool.close()


@pytest.mark.parametrize("version", [[], ["--v311"]])
def test_answer_is_printed_bare(node: Node, ask: Ask, version: list[str]) -> None:
    """A plain run sends the smallest task at QoS 1, unretained, prints the bare answer and exits 0."""
    tool = ask("--prompt", "What is 2+2?", *version)
    task = node.task()
    node.result("4, das heißt vier")
    assert tool.end() == (0, "4, das heißt vier\n", "")
    assert task.json == {"prompt": "What is 2+2?"}
    assert (task.qos, task.retain) == (1, False)
    assert task.topic.split("/")[3] == f"cli-{HOSTNAME}"


def test_flags_become_fields(node: Node, ask: Ask, tmp_path: Path) -> None:
    """Every flag arrives under its field's name, the lifetime also as MQTT 5 message expiry."""
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps(SCHEMA))
    tool = ask(
        *("--prompt", "hi", "--model", "m:1", "--task-type", "sum", "--priority", "high", "--ttl", "90"),
        *("--stream", "--format", str(schema), "--system", "be brief", "--src", "door7", "--id", "evt-42"),
        *("--option", "temperature=0.5", "--option", "stop=END"),
    )
    task = node.task()
    node.result("x")
    assert tool.end()[0] == 0
    assert task.topic == f"edge-llm/{node.name}/task/door7/evt-42"
    assert task.properties["MessageExpiryInterval"] in {89, 90}
    assert task.json == {
        "prompt": "hi",
        "model": "m:1",
        "task_type": "sum",
        "priority": "high",
        "ttl_s": 90,
        "stream": True,
        "format": SCHEMA,
        "system": "be brief",
        "options": {"temperature": 0.5, "stop": "END"},
    }


def test_prompt_from_standard_input(node: Node, ask: Ask) -> None:
    """With --prompt - the prompt is standard input, whole; --format json is passed on."""
    tool = ask("--prompt", "-", "--format", "json")
    tool.type_in("two\nlines ä")
    task = node.task()
    node.result("{}")
    assert tool.end()[:2] == (0, "{}\n")
    assert task.json == {"prompt": "two\nlines ä", "format": "json"}


def test_json_prints_the_whole_result(node: Node, ask: Ask) -> None:
    """With --json the result object is printed, also when the task failed, and the exit status is the same."""
    tool = ask("--prompt", "hi", "--json", "--stream")
    node.chunk(0, "part")
    node.result("part", state="failed", error={"code": "invalid_output", "message": "no JSON"})
    status, out, err = tool.end()
    assert status == 1
    assert json.loads(out)["error"]["code"] == "invalid_output"
    assert json.loads(out)["text"] == "part"
    assert err == "invalid_output: no JSON\n"


@pytest.mark.parametrize(
    ("state", "error", "complaint"),
    [
        ("failed", {"code": "model_error", "message": "it broke"}, "model_error: it broke\n"),
        ("rejected", {"code": "unknown_model", "message": "no model x"}, "unknown_model: no model x\n"),
        ("cancelled", None, "cancelled\n"),
    ],
)
def test_failure_is_told(node: Node, ask: Ask, state: str, error: dict[str, str] | None, complaint: str) -> None:
    """A task without an answer exits 1, says why on standard error and prints nothing else."""
    tool = ask("--prompt", "hi")
    node.result(state=state, error=error)
    assert tool.end() == (1, "", complaint)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"done_reason": "length", "truncated": False, "output_tokens": 512}, "cut at max_tokens (512 tokens)\n"),
        ({"done_reason": "length", "truncated": True, "output_tokens": 3}, "cut at 5 bytes\n"),
        ({"done_reason": "stop", "truncated": True, "output_tokens": 3}, "cut at 5 bytes\n"),
        ({"done_reason": "stop", "truncated": False, "output_tokens": 3}, ""),
    ],
)
def test_a_cut_is_told(node: Node, ask: Ask, fields: dict[str, Any], told: str) -> None:
    """An answer that was cut is printed as it is, and one line on standard error says where it was cut."""
    tool = ask("--prompt", "hi")
    node.result("caf\u00e9", **fields)
    assert tool.end() == (0, "caf\u00e9\n", told)


def test_a_cut_is_not_told_beside_json(node: Node, ask: Ask) -> None:
    """With --json the fields say it."""
    tool = ask("--prompt", "hi", "--json")
    node.result("caf", done_reason="length", truncated=False, output_tokens=512)
    status, out, err = tool.end()
    assert (status, json.loads(out)["done_reason"], err) == (0, "length", "")


def test_stream_prints_as_it_comes(node: Node, ask: Ask) -> None:
    """Chunks are printed before the result exists; repeated chunks and the result add nothing twice."""
    tool = ask("--prompt", "hi", "--stream")
    node.chunk(0, "one ")
    assert tool.read_stdout(4) == "one "
    node.chunk(0, "one ")
    node.chunk(1, "two ")
    node.reply("stream", {"seq": 2, "done": True})
    node.result("one two three")
    assert tool.end() == (0, "two three\n", "")


def test_stream_with_a_gap_is_completed(node: Node, ask: Ask) -> None:
    """After a lost chunk the rest is printed from the result, without a hole."""
    tool = ask("--prompt", "hi", "--stream")
    node.chunk(0, "one ")
    node.chunk(2, "three ")
    node.result("one two three four")
    assert tool.end() == (0, "one two three four\n", "")


def test_stream_that_took_another_way(node: Node, ask: Ask) -> None:
    """When the answer is not what was streamed, as after a second attempt, it is printed whole on a new line."""
    tool = ask("--prompt", "hi", "--stream")
    node.chunk(0, "wrong")
    node.result("right")
    assert tool.end() == (0, "wrong\nright\n", "")


def test_progress_on_demand(node: Node, ask: Ask) -> None:
    """With -v each new status is one line on standard error; late and repeated ones are not shown."""
    tool = ask("--prompt", "hi", "-v")
    node.status(1, "queued", position=3, eta_s=19.6)
    node.status(2, "running", attempt=1, position=None, eta_s=None)
    node.status(2, "running", attempt=1)
    node.status(1, "queued", position=3)
    node.status(4, "running", attempt=2)
    node.result("done")
    assert tool.end() == (0, "done\n", "queued, position 3, about 20 s\nrunning\nrunning, attempt 2\n")


def test_result_may_overtake_the_status(node: Node, ask: Ask) -> None:
    """A result ends the wait whether or not any status came, and garbage before it is passed over."""
    tool = ask("--prompt", "hi")
    topic = node.task().topic.replace("/task/", "/reply/")
    for garbage in [b"\xff", b"[1]", b"{", b"", b"[" * 100_000]:
        node.client.publish(f"{topic}/result", garbage)
    node.reply("status", {"seq": "x", "state": "queued"})
    node.result("first")
    assert tool.end() == (0, "first\n", "")


def test_no_answer_in_time(node: Node, ask: Ask) -> None:
    """When the time to wait is over the exit status is 3 and the last known state is told."""
    tool = ask("--prompt", "hi", "--wait", "1.5")
    node.status(1, "queued", position=9)
    assert tool.end() == (3, "", "no answer within 1.5 s (queued)\n")


def test_no_broker(ask: Ask) -> None:
    """Without a broker the exit status is 3 at once, and its address is told."""
    port = free_port()
    status, out, err = ask("--prompt", "hi", "--port", str(port)).end()
    assert (status, out) == (3, "")
    assert err.startswith(f"no broker at 127.0.0.1:{port}: ")


def test_silent_broker(ask: Ask) -> None:
    """Something that accepts the connection and says nothing is told apart from a slow node."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        tool = ask("--prompt", "hi", "--wait", "0.5", "--port", str(silent.getsockname()[1]))
        assert tool.end() == (3, "", "no answer within 0.5 s (the broker did not answer)\n")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--prompt", "hi", "--id", "a/b"],
        ["--prompt", "hi", "--src", ""],
        ["--prompt", "hi", "--node", "a+"],
        ["--prompt", "hi", "--priority", "highest"],
        ["--prompt", "hi", "--ttl", "1.5"],
        ["--prompt", "hi", "--wait", "0"],
        ["--prompt", "hi", "--wait", "nan"],
        ["--prompt", "hi", "--port", "65536"],
        ["--prompt", "hi", "--host", ""],
        ["--prompt", "hi", "--host", "a..b"],
        ["--prompt", "hi", "--host", "a" * 64],
        ["--prompt", "hi", "--option", "=1"],
        ["--prompt", "hi", "--format", "/nowhere/schema.json"],
        ["--prompt", "hi", "--format", str(TOOL)],
        ["--prompt", "hi", "--password-file", "/nowhere/password"],
        ["--prompt", "hi", "--ca-file", "/nowhere/ca.pem"],
        ["--prompt", "hi", "--ca-file", str(TOOL)],
        ["--prompt", "broken \udcff"],
    ],
    ids=" ".join,
)
def test_wrong_argument(arguments: list[str]) -> None:
    """A wrong argument, or a file that is not what it should be, exits 2 with usage and no traceback."""
    status, out, err = Tool(arguments).end()
    assert (status, out) == (2, "")
    assert err.startswith("usage: ")
    assert "Traceback" not in err


def test_offline_node_is_told(node: Node, ask: Ask) -> None:
    """A node known to be offline is told at once; the answer still comes when it is back."""
    node.available("offline")
    tool = ask("--prompt", "hi")
    assert tool.read_stderr_line() == f"node {node.name} is offline; the task waits for it"
    node.result("back")
    assert tool.end() == (0, "back\n", "")


def test_unknown_node_is_told(ask: Ask, unique_node: str) -> None:
    """When nothing at all is heard from a node, a wrong name is suggested."""
    tool = ask("--prompt", "hi", "--wait", "4")
    assert tool.read_stderr_line() == f"nothing heard from node {unique_node}: is that its name?"
    assert tool.end()[0] == 3


def test_broker_restart_during_the_wait(new_mosquitto: NewMosquitto, unique_node: str, ask: Ask) -> None:
    """After a broker's restart the same task is sent again, and its answer arrives."""
    broker = new_mosquitto(persistence=True)
    # As the daemon's, this node's session is known to the broker that comes back.
    session = MqttClient(broker.host, broker.port, client_id=unique_node, session_s=60)
    with session as client:
        node = Node(client, unique_node)
        broker.save()
        tool = ask("--prompt", "hi", "--wait", "30", broker=broker)
        node.task()
        broker.kill()
        broker.start()
        wait_until(lambda: len(node.tasks()) > 1, TIMEOUT_S)
        node.result("at last")
        assert tool.end() == (0, "at last\n", "")
    assert len({(task.topic, task.payload) for task in node.tasks()}) == 1


@pytest.mark.parametrize("how", ["file", "environment", "wrong", "none"])
def test_password(new_mosquitto: NewMosquitto, unique_node: str, ask: Ask, tmp_path: Path, how: str) -> None:
    """A password from a file or the environment lets in; a wrong or missing one exits 3 and says refused."""
    broker = new_mosquitto(users={"ada": "s3cret", "node": "pw"})
    path = tmp_path / "password"
    path.write_text("s3cret\n")
    arguments, environment = {
        "file": (["--username", "ada", "--password-file", str(path)], {}),
        "environment": (["--username", "ada"], {"EDGE_LLM_PASSWORD": "s3cret"}),
        "wrong": (["--username", "ada"], {"EDGE_LLM_PASSWORD": "guess"}),
        "none": ([], {}),
    }[how]
    with MqttClient(broker.host, broker.port, username="node", password="pw") as client:
        node = Node(client, unique_node)
        tool = ask("--prompt", "hi", *arguments, broker=broker, **environment)
        if how in {"wrong", "none"}:
            assert tool.end() == (3, "", "the broker refused the connection: Not authorized\n")
        else:
            node.result("in")
            assert tool.end() == (0, "in\n", "")


def test_refused_task_is_told(new_mosquitto: NewMosquitto, ask: Ask) -> None:
    """When the broker's rules forbid the task, the tool says so at once instead of waiting."""
    broker = new_mosquitto(acl="topic read edge-llm/#\n")
    tool = ask("--prompt", "hi", broker=broker)
    assert tool.end() == (3, "", "the broker refused the task: Not authorized\n")


def test_falls_back_to_311(unique_node: str, ask: Ask, tmp_path: Path) -> None:
    """On a broker without MQTT 5 the task goes by 3.1.1 without being asked to."""
    pytest.importorskip("amqtt")
    port = free_port()
    with amqtt_broker(port, tmp_path), MqttClient("127.0.0.1", port, version=V311) as client:
        node = Node(client, unique_node)
        tool = ask("--prompt", "hi", "-v", "--port", str(port))
        node.result("old but gold")
        status, out, err = tool.end()
    assert (status, out) == (0, "old but gold\n")
    assert "using 3.1.1" in err


def test_tls(new_mosquitto: NewMosquitto, unique_node: str, ask: Ask, tmp_path: Path) -> None:
    """With its certificate given, a broker on TLS works; without, the connection is refused with exit 3."""
    certificate, key = self_signed(tmp_path)
    port = free_port()
    broker = new_mosquitto(extra=f"listener {port} 127.0.0.1\ncertfile {certificate}\nkeyfile {key}")
    with MqttClient(broker.host, broker.port) as client:
        node = Node(client, unique_node)
        tool = ask("--prompt", "hi", "--port", str(port), "--ca-file", str(certificate), broker=broker)
        node.result("private")
        assert tool.end() == (0, "private\n", "")
        status, _, err = ask("--prompt", "hi", "--port", str(port), "--tls", broker=broker).end()
    assert status == 3
    assert "certificate" in err


@pytest.mark.usefixtures("interruptible")
def test_interrupt(node: Node, ask: Ask) -> None:
    """Ctrl-C ends the wait with the shell's own status and no traceback."""
    tool = ask("--prompt", "hi", "--stream")
    node.chunk(0, "so far")
    assert tool.read_stdout(6) == "so far"
    tool.interrupt()
    assert tool.end() == (130, "\n", "interrupted; the node still has the task\n")


def test_needs_only_paho() -> None:
    """The file works when copied to a machine with nothing but Python and paho-mqtt."""
    imported = set()
    for statement in ast.walk(ast.parse(TOOL.read_text(encoding="utf-8"))):
        if isinstance(statement, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in statement.names}
        elif isinstance(statement, ast.ImportFrom):
            imported.add(str(statement.module).split(".")[0])
    assert imported - sys.stdlib_module_names == {"paho"}


@contextlib.contextmanager
def amqtt_broker(port: int, directory: Path) -> Iterator[None]:
    """A real broker that speaks nothing newer than MQTT 3.1.1."""
    config = directory / "amqtt.yaml"
    config.write_text(
        f"listeners: {{default: {{type: tcp, bind: '127.0.0.1:{port}'}}}}\n"
        "plugins: {amqtt.plugins.authentication.AnonymousAuthPlugin: {allow_anonymous: true}}\n"
    )
    command = [sys.executable, "-m", "amqtt.scripts.broker_script", "-c", str(config)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            wait_until(lambda: process.poll() is not None or accepts(port), TIMEOUT_S)
            yield
        finally:
            process.kill()


def accepts(port: int) -> bool:
    """Whether something listens on this port of loopback."""
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


def self_signed(directory: Path) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 and its key."""
    certificate, key = directory / "certificate.pem", directory / "key.pem"
    openssl = needs.tool("openssl", package="openssl")
    subject = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    files = ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run(
        [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *subject, *files],
        check=True,
        capture_output=True,
    )
    return certificate, key


def test_a_missing_library_is_named(tmp_path: Path) -> None:
    """Without paho-mqtt the tool says how to get it without touching the system's Python, as a usage error."""
    (tmp_path / "paho.py").write_text("raise ImportError\n", encoding="utf-8")
    run = subprocess.run(
        [sys.executable, str(TOOL), "--prompt", "x"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.returncode, run.stdout) == (2, "")
    first, environment, again = run.stderr.splitlines()
    assert first == f"publish_task.py: {sys.executable} has no paho-mqtt 2. An environment that has it:"
    assert "-m venv ~/paho && ~/paho/bin/pip install 'paho-mqtt>=2.1'" in environment
    assert shlex.split(again) == ["~/paho/bin/python", str(TOOL), "..."]
