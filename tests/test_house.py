"""The house rules of docs/design.md, read from the syntax trees: who may import whom, and what nobody does."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "edge_daemon"
ANY = frozenset({"any"})

# Module -> the modules of our own that it may import. Arrows point one way: nothing imports upward.
MAY_IMPORT: dict[str, frozenset[str]] = {
    "errors": frozenset(),
    "clock": frozenset(),
    "estimates": frozenset({"scheduler"}),
    "breaker": frozenset(),
    "schema": frozenset(),
    "systemd": frozenset(),
    "journal": frozenset(),
    "steps": frozenset(),
    "messages": frozenset({"errors"}),
    "sampling": frozenset({"errors"}),
    "config": frozenset({"sampling", "schema", "errors"}),
    "task_types": frozenset({"config", "messages", "errors"}),
    "scheduler": frozenset({"messages"}),
    "ollama": frozenset({"messages", "errors"}),
    "telemetry": frozenset({"messages", "errors"}),
    "logger": frozenset({"messages", "errors", "clock", "steps"}),
    "intake": frozenset({"task_types", "sampling", "schema", "messages", "errors", "config", "clock", "steps"}),
    "queue_file": frozenset({"errors", "clock", "steps"}),
    "store": frozenset({"queue_file", "scheduler", "messages", "errors", "clock", "steps"}),
    "model_pool": frozenset({"ollama", "estimates", "scheduler", "messages", "errors", "clock", "steps"}),
    "answers": frozenset({"ollama", "schema", "messages"}),
    "worker": frozenset(
        {
            "answers",
            "store",
            "scheduler",
            "model_pool",
            "ollama",
            "estimates",
            "breaker",
            "logger",
            "telemetry",
            "config",
            "steps",
        }
        | {"messages", "journal", "errors", "clock"}
    ),
    "preflight": frozenset({"mqtt_connection", "config", "errors"}),
    "records": frozenset(
        {"logger", "store", "worker", "model_pool", "ollama", "telemetry", "messages", "clock", "steps"}
    ),
    "announcer": frozenset(
        {"systemd", "records", "mqtt_bridge", "store", "worker", "model_pool", "ollama", "telemetry"}
    )
    | frozenset({"config", "messages", "journal", "clock"}),
    "mqtt_connection": frozenset({"config", "errors"}),
    "mqtt_bridge": frozenset({"mqtt_connection", "config", "messages", "journal", "errors", "clock", "steps"}),
    "metrics": frozenset({"messages"}),
    "http_server": frozenset({"preflight", "messages"}),
    "http_gateway": frozenset({"http_server", "metrics", "config", "messages", "journal", "errors"}),
    "embedded": frozenset({"embedded", "errors"}),
    "main": ANY,
    "cli": ANY,
    "demo": frozenset({"mqtt_connection", "ollama", "config", "systemd", "messages", "errors"}),
    "status": frozenset({"mqtt_connection", "config", "systemd", "errors"}),
    "doctor": frozenset(
        {"checks_broker", "checks_machine", "checks_ollama", "findings", "preflight", "config", "systemd", "errors"}
    ),
    "checks_broker": frozenset({"findings", "mqtt_connection", "preflight", "config", "messages", "errors", "clock"}),
    "checks_machine": frozenset({"findings", "install", "telemetry"}),
    "checks_ollama": frozenset(
        {"findings", "model_pool", "ollama", "estimates", "telemetry", "config", "systemd", "errors"}
    ),
    "findings": frozenset({"config", "clock"}),
    "install": frozenset({"errors"}),
    "report": frozenset({"logger", "messages", "systemd", "errors"}),
    "report_page": frozenset({"report"}),
    "plots": frozenset({"report", "telemetry"}),
    "__main__": frozenset({"cli"}),
    "__init__": frozenset(),
}

# Only these may know that this one exists: it runs as processes of its own.
MAY_IMPORT_EMBEDDED = {"embedded", "main", "cli"}

# Outside library -> the one module that may import it. To replace a library is to replace a file.
OWNS = {
    "paho": "mqtt_connection",
    "requests": "ollama",
    "urllib3": "ollama",
    "psutil": "telemetry",
    "yaml": "config",
    "sqlite3": "queue_file",
    "flask": "http_gateway",
    "werkzeug": "http_gateway",
    "waitress": "http_server",
    "prometheus_client": "metrics",
    "matplotlib": "plots",
    "numpy": "plots",
    "amqtt": "embedded",
    "xllamacpp": "embedded",
}

# An import inside a function is for a command's own needs, or for an extra that may not be installed.
# What of our own may be imported so; ANY is anything.
MAY_IMPORT_LATE: dict[str, frozenset[str]] = {"cli": ANY, "embedded": ANY, "main": frozenset({"http_gateway"})}

BANNED_CALLS = {"eval", "exec", "yaml.load", "yaml.unsafe_load", "os.system"}
BANNED_ARGUMENTS = {"shell": True, "verify": False}
BANNED_LIBRARIES = {"pickle", "marshal", "shelve"}
# What threading.Thread keeps to itself in Python 3.11 to 3.14. A class of ours that uses one of these names works with
# the versions that lack it, and breaks with the next one that has it.
NAMES_OF_THREADS = {
    *(
        "_after_fork",
        "_args",
        "_bootstrap",
        "_bootstrap_inner",
        "_context",
        "_daemonic",
        "_delete",
        "_handle",
        "_ident",
    ),
    *("_initialized", "_invoke_excepthook", "_is_stopped", "_kwargs", "_name", "_native_id", "_os_thread_handle"),
    *("_reset_internal_locks", "_set_ident", "_set_native_id", "_set_os_name", "_set_tstate_lock", "_started"),
    *("_stderr", "_stop", "_target", "_tstate_lock", "_wait_for_tstate_lock"),
}
LONGEST_FUNCTION = 40
"""Lines of code: its docstring, comments and empty lines do not count."""
BANNED_NAMES = {"utils", "util", "base", "helpers", "common", "misc"}


def module_of(path: Path) -> str:
    """The name by which the tables know a file: its stem, or `embedded` for all of that package."""
    inside = path.relative_to(ROOT / PACKAGE)
    return inside.parts[0] if len(inside.parts) > 1 else inside.stem


SOURCES = sorted((ROOT / PACKAGE).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_module_keeps_the_rules(path: Path) -> None:
    """Every module imports only what the tables allow it, and does nothing that is banned."""
    module = module_of(path)
    assert module in MAY_IMPORT, f"add {module} to MAY_IMPORT in tests/test_house.py: what may it import?"
    assert not BANNED_NAMES & {path.stem, module}, f"{path.stem} says nothing about what is in it"
    assert list(broken_rules(module, path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize("path", TESTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_tests_wait_for_conditions(path: Path) -> None:
    """No test sleeps: it waits for a condition with a deadline, as `tests/waiting.py` does."""
    assert list(sleeps(ast.parse(path.read_text(encoding="utf-8")))) == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import time\ntime.sleep(1)", 1),
        ("from time import sleep\nsleep(1)", 1),
        ("threading.Event().wait(1.2)", 1),
        ("Event().wait(timeout=pause_s)", 1),
        ("Event().wait()", 0),
        ("assert ended.wait(5)", 0),
    ],
)
def test_a_sleep_is_seen(source: str, found: int) -> None:
    """A sleep is found also where it is a wait for an event that nobody can set; a wait for ever is none."""
    assert len(list(sleeps(ast.parse(source)))) == found


def test_arrows_point_one_way() -> None:
    """The table itself has no circle, and names no module that it does not also describe."""
    below: dict[str, frozenset[str]] = {
        module: frozenset() if allowed is ANY else allowed - {module} for module, allowed in MAY_IMPORT.items()
    }
    while below:
        free = {module for module, allowed in below.items() if not allowed & set(below)}
        assert free, f"a circle among {sorted(below)}"
        below = {module: allowed for module, allowed in below.items() if module not in free}
    assert frozenset().union(*(a for a in MAY_IMPORT.values() if a is not ANY)) <= set(MAY_IMPORT)


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("scheduler", "import requests", "belongs to ollama"),
        ("scheduler", "from requests.adapters import HTTPAdapter", "belongs to ollama"),
        ("messages", "import edge_daemon.store", "may not import store"),
        ("messages", "from edge_daemon.store import Store", "may not import store"),
        ("messages", "from edge_daemon import store", "may not import store"),
        ("worker", "from edge_daemon.embedded import broker", "may not import embedded"),
        ("store", "from . import errors", "relative import"),
        ("store", "def f():\n    import json", "import inside a function"),
        ("main", "def f():\n    from edge_daemon.demo import run_real", "import inside a function"),
        ("main", "from flask import Flask", "flask belongs to http_gateway"),
        ("store", "import pickle", "pickle is banned"),
        ("config", "import yaml\nyaml.load(text)", "yaml.load() is banned"),
        ("store", "eval('1')", "eval() is banned"),
        ("cli", "run(x, shell=True)", "shell=True is banned"),
        ("ollama", "get(url, verify=False)", "verify=False is banned"),
        ("store", "cache = {}", "state at module level: cache"),
        ("store", "cache: dict = {}", "state at module level: cache"),
        ("store", "LIMIT, cache = 3, {}", "state at module level: cache"),
        ("store", "def f():\n    global X\n    X = 1", "global X"),
        ("worker", "class W(threading.Thread):\n    def _handle(self): ...", "_handle belongs to threading.Thread"),
        ("worker", "class W(Thread):\n    def f(self):\n        self._context = 1", "_context belongs to"),
        ("store", "def f():\n" + 40 * "    g()\n", "f is too long: 41 lines"),
    ],
)
def test_a_broken_rule_is_seen(module: str, source: str, complaint: str) -> None:
    """Each rule finds the code that breaks it."""
    assert any(complaint in found for found in broken_rules(module, source))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("queue_file", "import sqlite3\nfrom edge_daemon.errors import StoreError\nlog = getLogger()\nLIMIT = 3"),
        ("store", "from edge_daemon import __version__\n__all__ = ['Store']\nRow = tuple[int, str]"),
        ("store", "FIRST, _SECOND = 1, [n for n in (2,)]"),
        ("cli", "def report():\n    from edge_daemon.logger import CsvLog"),
        ("main", "from edge_daemon.embedded import broker"),
        ("main", "def f():\n    from edge_daemon.http_gateway import HttpGateway"),
        ("ollama", "get(url, verify=True)"),
        ("worker", "class W(Thread):\n    def _run(self):\n        self._lock, x._handle = 1, self._name"),
        ("store", 'def f():\n    """One.\n\n    Two.\n    """\n\n    # three\n' + 39 * "    g()\n"),
    ],
)
def test_good_code_passes(module: str, source: str) -> None:
    """What the rules allow is not complained about."""
    assert list(broken_rules(module, source)) == []


def broken_rules(module: str, source: str) -> Iterator[str]:
    """One sentence for each place where `source`, as the text of `module`, breaks a rule."""
    tree = ast.parse(source)
    for imported in imports(tree):
        yield from broken_import(module, imported)
    yield from (f"{call}() is banned" for call in calls(tree) if call in BANNED_CALLS)
    yield from banned_arguments(tree)
    yield from (f"state at module level: {name}" for name in module_state(tree))
    yield from (f"global {name}" for node in ast.walk(tree) if isinstance(node, ast.Global) for name in node.names)
    yield from (f"{name} belongs to threading.Thread" for name in thread_names(tree))
    yield from ("relative import" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level)
    yield from (f"{name} is too long: {lines} lines" for name, lines in functions(source) if lines > LONGEST_FUNCTION)
    allowed = MAY_IMPORT_LATE.get(module, frozenset())
    if allowed is not ANY and not all(is_late(node, allowed) for node in late_imports(tree)):
        yield "import inside a function"


def functions(source: str) -> Iterator[tuple[str, int]]:
    """Each function and method, with its lines of code."""
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = node.body[0] if ast.get_docstring(node, clean=False) is not None else None
            skipped = range(docstring.lineno - 1, docstring.end_lineno or 0) if docstring else range(0)
            own = [lines[at].strip() for at in range(node.lineno - 1, node.end_lineno or 0) if at not in skipped]
            yield node.name, sum(bool(line) and not line.startswith("#") for line in own)


def broken_import(module: str, imported: str) -> Iterator[str]:
    """What is wrong with `module` importing the dotted name `imported`, if anything."""
    library, _, rest = imported.partition(".")
    if library in BANNED_LIBRARIES:
        yield f"{library} is banned"
    if OWNS.get(library, module) != module:
        yield f"{library} belongs to {OWNS[library]}"
    own = rest.split(".")[0]
    if library == PACKAGE and is_module(own) and not may_import(module, own):
        yield f"{module} may not import {own}"


def may_import(module: str, own: str) -> bool:
    """Whether the table has an arrow from `module` to `own`."""
    if own == "embedded" and module not in MAY_IMPORT_EMBEDDED:
        return False
    return MAY_IMPORT[module] is ANY or own in MAY_IMPORT[module]


def is_module(name: str) -> bool:
    """Whether `name` is one of our modules, not a thing inside the package such as `__version__`."""
    return name in MAY_IMPORT or (ROOT / PACKAGE / f"{name}.py").exists()


def imports(tree: ast.AST) -> Iterator[str]:
    """The dotted name of everything imported, `from a import b` as `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def late_imports(tree: ast.AST) -> Iterator[ast.AST]:
    """Imports that are inside a function."""
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from (node for node in ast.walk(function) if isinstance(node, ast.Import | ast.ImportFrom))


def is_late(node: ast.AST, allowed: frozenset[str]) -> bool:
    """Whether an import takes only modules of our own that are `allowed` inside a function."""
    return isinstance(node, ast.ImportFrom) and node.module in {f"{PACKAGE}.{name}" for name in allowed}


def calls(tree: ast.AST) -> Iterator[str]:
    """What is called, as it is written: `time.sleep`, `eval`."""
    return (ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call))


def sleeps(tree: ast.AST) -> Iterator[str]:
    """The calls that do nothing but let time pass."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            call = ast.unparse(node.func)
            is_timed = bool(node.args or node.keywords)
            if call == "sleep" or call.endswith("time.sleep") or (call.endswith("Event().wait") and is_timed):
                yield call


def banned_arguments(tree: ast.AST) -> Iterator[str]:
    """Arguments that open a hole."""
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and isinstance(node.value, ast.Constant) and node.arg is not None:
            value = node.value.value
            if isinstance(value, bool) and BANNED_ARGUMENTS.get(node.arg) is value:
                yield f"{node.arg}={value} is banned"


def thread_names(tree: ast.AST) -> Iterator[str]:
    """Names of threading.Thread that classes made from it use for something else, as method or attribute."""
    for thread in ast.walk(tree):
        if isinstance(thread, ast.ClassDef) and any(ast.unparse(base).endswith("Thread") for base in thread.bases):
            yield from (name for name in own_names(thread) if name in NAMES_OF_THREADS)


def own_names(class_: ast.ClassDef) -> Iterator[str]:
    """The methods that a class defines, and the attributes that it sets."""
    for node in ast.walk(class_):
        if isinstance(node, ast.FunctionDef):
            yield node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            yield node.attr


def module_state(tree: ast.Module) -> Iterator[str]:
    """Names bound at module level that are neither constants, types, dunders nor the logger."""
    for node in tree.body:
        if isinstance(node, ast.Assign):
            yield from (name for target in node.targets for name in bound(target) if not is_constant(name))
        elif isinstance(node, ast.AnnAssign):
            yield from (name for name in bound(node.target) if not is_constant(name))


def bound(target: ast.expr) -> Iterator[str]:
    """The names that an assignment to `target` binds."""
    return (n.id for n in ast.walk(target) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))


def is_constant(name: str) -> bool:
    """Whether a module may bind this name: a constant or type by its first letter, a dunder, the logger."""
    return name.lstrip("_")[:1].isupper() or name.startswith("__") or name == "log"
