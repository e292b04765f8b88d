"""What the documents name is there."""

import ast
import builtins
import dataclasses
import json
import re
import runpy
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from edge_daemon import cli
from edge_daemon.announcer import birth_certificate
from edge_daemon.clock import Clock
from edge_daemon.config import Config, load
from edge_daemon.logger import CsvLog
from edge_daemon.messages import Result
from edge_daemon.telemetry import Board, OllamaState, Sampler

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "edge_daemon"
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OPERATIONS = ROOT / "docs" / "operations.md"
SIGN = re.compile(r"(doctor|journal|event|result|report) `([^`]+)`")
COMMAND = r"(?:^|sudo |/bin/)edge-llm ([a-z][a-z-]+)([^\n#|;&]*)"
ROWS = 20


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_named_tests_exist(document: Path) -> None:
    """Each test that a document refers to by its name is one."""
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")]
    known = {name for source in sources for name in re.findall(r"^def (test_\w+)", source, re.MULTILINE)}
    named = set(re.findall(r"`(test_\w+)`", document.read_text(encoding="utf-8")))
    assert named <= known


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    """Each link to a file of this repository leads to one."""
    links = re.findall(r"\]\(([^)#\s]+)", document.read_text(encoding="utf-8"))
    inside = [link for link in links if not re.match(r"[a-z]+:", link)]
    assert [link for link in inside if not (document.parent / link).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_settings_are_right(document: Path, tmp_path: Path) -> None:
    """Each snippet of a configuration is one that the daemon takes; a snippet marked `yml` is for another program."""
    for snippet in re.findall(r"^```yaml\n(.*?)^```", document.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
        if not snippet.startswith("scrape_configs:"):  # Prometheus's
            path = tmp_path / "config.yaml"
            path.write_text(snippet, encoding="utf-8")
            load(path)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_named_keys_exist(document: Path) -> None:
    """Each dotted name that begins with a section of the configuration is a key of it, if it is nothing else."""
    sections = "|".join(item.name for item in dataclasses.fields(Config))
    named = set(re.findall(rf"`((?:{sections})\.(?!py`|db`|md`)[a-z_.]+)`", document.read_text(encoding="utf-8")))
    others = {"scheduler.choose", "csv.reader", *_mqtt_fields("telemetry")}
    assert named - set(_keys(Config())) - others == set()


def _keys(part: Any, prefix: str = "") -> Iterator[str]:
    for item in dataclasses.fields(part):
        value = getattr(part, item.name)
        yield prefix + item.name
        if dataclasses.is_dataclass(value):
            yield from _keys(value, f"{prefix}{item.name}.")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_named_commands_exist(document: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each command in code is one, and has the options that are given to it."""
    text = document.read_text(encoding="utf-8")
    code = re.findall(r"^```\w*\n(.*?)^```|`([^`\n]+)`", text, re.DOTALL | re.MULTILINE)
    for name, rest in re.findall(COMMAND, "\n".join(map("".join, code)), re.MULTILINE):
        with pytest.raises(SystemExit) as ended:
            cli.main([name, "--help"])
        assert ended.value.code == 0, name
        assert set(re.findall(r"--[a-z-]+", rest)) <= set(re.findall(r"--[a-z-]+", capsys.readouterr().out))


def _python(document: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", document.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_python_imports_what_it_uses(document: Path) -> None:
    """Each snippet of Python is whole: it names nothing that it does not define or import, and none lacks its fence."""
    assert not re.search(r"^ {4}(?:import|from) ", document.read_text(encoding="utf-8"), re.MULTILINE)
    for snippet in _python(document):
        nodes = [*ast.walk(ast.parse(snippet))]
        names = [node for node in nodes if isinstance(node, ast.Name)]
        imports = [alias for node in nodes if isinstance(node, ast.Import | ast.ImportFrom) for alias in node.names]
        known = {node.id for node in names if isinstance(node.ctx, ast.Store)} | {*vars(builtins)}
        known |= {alias.asname or alias.name.partition(".")[0] for alias in imports}
        known |= {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
        known |= {node.arg for node in nodes if isinstance(node, ast.arg)}
        assert {node.id for node in names} - known == set()


@pytest.mark.parametrize("document", ["csv.md", "migration.md"])
def test_python_reads_the_log(document: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each snippet that reads the log runs as it stands, beside a log that was rotated."""
    log = CsvLog(tmp_path / "llm_metrics.csv", rotate_bytes=65_536, keep=5, text="full", clock=Clock())
    log.append([{"record": "task", "status": "succeeded", "model_name": "m", "result": "x" * 1000}] * 100)
    log.close()
    monkeypatch.chdir(tmp_path)
    snippets = _python(ROOT / "docs" / document)
    assert snippets
    for snippet in snippets:
        (tmp_path / "snippet.py").write_text(snippet, encoding="utf-8")
        runpy.run_path("snippet.py")


def test_signs_exist() -> None:
    """Each row of the table of symptoms has a sign by which it is known, and that is one which the source gives."""
    section = OPERATIONS.read_text(encoding="utf-8").split("\n## When something is wrong\n")[1].split("\n## ")[0]
    rows = [line.split(" | ") for line in section.splitlines() if line.startswith("| ")][2:]
    assert len(rows) >= ROWS
    for symptom, seen, *others in rows:
        assert len(others) == 2, symptom
        signs = SIGN.findall(seen)
        assert signs, symptom
        for kind, text in signs:
            assert _is_given(kind, text), f"{symptom}: {kind} {text}"


def _is_given(kind: str, text: str) -> bool:
    if kind == "doctor":
        subject, _, words = text.partition(": ")
        told = _texts("checks_*.py", "doctor.py", "mqtt_connection.py")
        return subject in told and _are_said(words, told)
    if kind == "journal":
        return _are_said(text, _texts("*.py"))
    return text in _texts("report.py" if kind == "report" else "*.py")


def _are_said(words: str, told: frozenset[str]) -> bool:
    return all(any(part.strip() in it for it in told) for part in words.split("…"))


@cache
def _texts(*patterns: str) -> frozenset[str]:
    """All texts in these files of the source."""
    return frozenset(
        node.value
        for pattern in patterns
        for path in SOURCE.glob(pattern)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )


def _mqtt_fields(topic: str) -> list[str]:
    """The fields that docs/mqtt.md explains in the table of this topic."""
    page = (ROOT / "docs" / "mqtt.md").read_text(encoding="utf-8")
    section = page.split(f"\n## N/{topic} ")[1].split("\n## ")[0]
    return re.findall(r"^\| `([a-z_.]+)` \|", section, re.MULTILINE)


def _fields(data: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in data.items():
        if isinstance(value, dict):
            yield from _fields(value, f"{prefix}{name}.")
        else:
            yield prefix + name


def test_telemetry_is_explained(tmp_path: Path) -> None:
    """docs/mqtt.md has a row for each field of a sample on a Raspberry Pi, in the order of the sample."""
    firmware = tmp_path / "devices/platform/soc/soc:firmware/get_throttled"
    firmware.parent.mkdir(parents=True)
    firmware.write_text("0\n", encoding="ascii")
    sampler = Sampler(data_dir=tmp_path, board=Board(tmp_path))
    ollama = OllamaState(reachable=True)
    sample = sampler.sample(ollama, ts="now", boot="b", clock_synced=True, queue_depth=0, outbox=0)
    assert _mqtt_fields("telemetry") == list(_fields(sample))


def test_result_is_explained() -> None:
    """docs/mqtt.md has a row for each field of a result, in its order, and shows them."""
    fields = [item.name for item in dataclasses.fields(Result)]
    page = (ROOT / "docs" / "mqtt.md").read_text(encoding="utf-8")
    section = page.split("/result (out, QoS 1)\n")[1].split("\n## ")[0]
    (table,) = (block for block in section.split("\n\n") if block.startswith("| field |"))
    assert re.findall(r"^\| `([a-z_]+)` \|", table, re.MULTILINE) == fields
    (shown,) = re.findall(r"```json\n(.*?)```", section, re.DOTALL)
    assert list(json.loads(shown)) == fields


def test_info_is_explained() -> None:
    """docs/mqtt.md has a row for each field of N/info, in its order, and shows them."""
    info = birth_certificate(Config(node="n"), boot="b", mqtt="5", started="now")
    assert _mqtt_fields("info") == list(_fields(info))
    page = (ROOT / "docs" / "mqtt.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"\n## N/info .*?```json\n(.*?)```", page, re.DOTALL)
    assert list(_fields(json.loads(shown))) == list(_fields(info))


def test_events_are_told() -> None:
    """docs/mqtt.md names each event that there is."""
    page = (ROOT / "docs" / "mqtt.md").read_text(encoding="utf-8")
    section = page.split("\n## N/event/")[1].split("\n# ")[0]
    assert set(_events()) - set(re.findall(r"`([a-z_]+)`", section)) == set()


def _events() -> Iterator[str]:
    for path in SOURCE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.Call(func=ast.Attribute(attr="event" | "on_event"), args=[name, *_]):
                    yield from (
                        it.value for it in ast.walk(name) if isinstance(it, ast.Constant) and isinstance(it.value, str)
                    )
