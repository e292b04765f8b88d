"""Which models are in memory, against a stand-in for Ollama whose memory is accounted for."""

import itertools
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest

from edge_daemon import model_pool
from edge_daemon.errors import (
    BadRequest,
    DeadlineExceeded,
    ModelMissing,
    ModelTooLarge,
    NoMemory,
    NoRoom,
    OllamaDown,
    RunnerDied,
)
from edge_daemon.estimates import TRUSTED_LOADS, Estimates
from edge_daemon.model_pool import (
    ALIAS_LOAD_S,
    BUFFERS_BYTES,
    CATALOGUE_PAUSE_S,
    LEASE_MARGIN_S,
    MIB,
    PINNED_LEASE_S,
    RUNNER_BYTES,
    UNLOAD_TIMEOUT_S,
    Catalogue,
    Change,
    Ensured,
    ModelPolicy,
    ModelPool,
    PoolLimits,
    memory_limits,
)
from edge_daemon.ollama import Deadlines, Generation, Interrupt, Interrupted, Ollama
from tests.fake_ollama import GB, KILLED, RUNNER_GONE, FakeModel, FakeOllama
from tests.fakes import FakeClock
from tests.loading import ensure
from tests.waiting import wait_until

IDLE_S = 300.0
FOREVER = float("inf")


class Rig:
    """A pool on a board of its own, with another client of the same Ollama beside it."""

    def __init__(self, fake: FakeOllama, clock: FakeClock, *, pinned: tuple[str, ...] = (), **limits: Any) -> None:
        self.fake = fake
        self.clock = clock
        self.changes: list[Change] = []
        self.kept: dict[str, Any] = {}
        self.others_bytes = 0
        self.hidden_bytes = 0
        self.num_ctx = 1_000
        self.contexts: dict[str, int] = {}
        self.on_beat: Callable[[], None] = lambda: None
        self.on_loaded: Callable[[], None] = lambda: None
        usual: dict[str, Any] = {"budget_bytes": 4 * GB, "reserve_bytes": GB, "load_timeout_s": 20.0}
        self.limits = PoolLimits(**usual | {"idle_timeout_s": IDLE_S} | limits)
        self.client = Ollama(fake.url, connect_timeout_s=5, quick_timeout_s=2)
        self.other = Ollama(fake.url, connect_timeout_s=5)
        self.pinned = {f"{name}:latest" for name in pinned}
        self.new_pool()

    def new_pool(self) -> None:
        """A pool that knows nothing but what was kept, as after a restart."""
        estimates = Estimates(self.kept, lambda model, facts: self.kept.update({model: facts}))
        catalogue = Catalogue(self.client, clock=self.clock, estimates=estimates, policy=self.policy)
        self.pool = ModelPool(
            self.client,
            limits=self.limits,
            policy=self.policy,
            catalogue=catalogue,
            estimates=estimates,
            clock=self.clock,
            available_bytes=self.available_bytes,
            on_change=self.changes.append,
            on_loaded=self._loaded,
            beat=self._beats,
        )

    def _loaded(self) -> None:
        self.on_loaded()

    def _beats(self) -> None:
        self.on_beat()

    def policy(self, model: str) -> ModelPolicy:
        """All models have the same context, if nothing else is said."""
        return ModelPolicy(num_ctx=self.contexts.get(model, self.num_ctx), pinned=model in self.pinned)

    def available_bytes(self) -> int:
        """A board of 6 GB. Each runner may take more than Ollama knows of."""
        return 6 * GB - self.others_bytes - self.fake.used_bytes() - self.hidden_bytes * len(self.fake.resident())

    def load_elsewhere(self, model: str, *, num_ctx: int = 1_000) -> None:
        """Another client loads a model."""
        self.other.load(model, options={"num_ctx": num_ctx}, keep_alive_s=10_000, timeout_s=5)

    def loads_asked(self, model: str) -> int:
        """How often Ollama was asked to load `model`."""
        asked = self.fake.asked("/api/generate", model=model)
        return len([seen for seen in asked if seen.body.get("keep_alive") != 0])

    def residency(self) -> dict[str, str]:
        """What is told of each model."""
        return {state.name.removesuffix(":latest"): state.residency for state in self.pool.states}

    def outcomes(self) -> list[tuple[str, str, str]]:
        """What was told of loads and unloads."""
        return [(change.outcome, change.model.removesuffix(":latest"), change.reason) for change in self.changes]


@pytest.fixture
def clock() -> FakeClock:
    """Time that stands still."""
    return FakeClock()


@pytest.fixture
def fake(clock: FakeClock) -> Iterator[FakeOllama]:
    """Three models of 1 GB and one of 5; leases run by the clock of the test."""
    models = [FakeModel("a"), FakeModel("b"), FakeModel("c"), FakeModel("huge", size_bytes=5 * GB)]
    with FakeOllama(*models, memory_bytes=5 * GB, max_loaded=9, now=clock.monotonic) as server:
        yield server


@pytest.fixture
def rig(fake: FakeOllama, clock: FakeClock) -> Rig:
    """A pool with room for three of the small models."""
    return Rig(fake, clock)


# -- loading


def test_a_load_is_asked_for_and_told(rig: Rig) -> None:
    """A model is loaded with its runner options and a finite lease, and the load is told with its figures."""
    ensured = ensure(rig.pool, "a", reason="plan")
    assert rig.fake.resident() == ["a:latest"]
    assert (ensured.model, ensured.evicted) == ("a:latest", ())
    assert ensured.load_s > 0
    (seen,) = rig.fake.asked("/api/generate", model="a")
    assert seen.body["options"] == {"num_ctx": 1_000}
    assert seen.body["keep_alive"] == IDLE_S + LEASE_MARGIN_S
    (change,) = rig.changes
    assert (change.action, change.model, change.reason, change.outcome) == ("load", "a:latest", "plan", "loaded")
    assert (change.size_bytes, change.error, change.seconds) == (GB, None, ensured.load_s)
    assert change.predicted_bytes > GB
    assert change.predicted_s == ensured.predicted_s
    (state,) = rig.pool.states
    assert (state.name, state.residency, state.size_bytes, state.idle_s) == ("a:latest", "resident", GB, 0.0)


@pytest.mark.parametrize(
    ("accepted_at", "load_s"), [(0.0, 20.0), (80.0, 20.0), (95.0, 5.0), (100.0, 0.0), (200.0, 0.0)]
)
def test_what_a_task_has_waited_for(accepted_at: float, load_s: float) -> None:
    """Of a load from 80 to 100, a task has what lies after its acceptance; or nothing at all of it."""
    ensured = Ensured(model="a", load_s=20.0, predicted_s=9.0, evicted=("b",), ended_at=100.0)
    assert ensured.since(accepted_at) == (replace(ensured, load_s=load_s) if load_s else Ensured(model="a"))


def test_a_resident_model_serves_under_any_spelling(rig: Rig) -> None:
    """Whoever asks for it, in whatever case, with or without its tag, needs no load; nor is Ollama asked."""
    ensure(rig.pool, "a", reason="plan")
    before = len(rig.fake.requests)
    assert all(rig.pool.serves(name) for name in ("a", "A", "a:latest", "A:Latest"))
    assert not rig.pool.serves("b")
    assert len(rig.fake.requests) == before


def test_models_stay_while_they_fit(rig: Rig) -> None:
    """Several models are resident together, up to the budget and not beyond, by what each really takes."""
    for name in "abc":
        ensure(rig.pool, name, reason="plan")
    assert sorted(rig.fake.resident()) == ["a:latest", "b:latest", "c:latest"]
    assert {resident.model: resident.size_bytes for resident in rig.pool.resident()} == {
        "a:latest": GB,
        "b:latest": GB,
        "c:latest": GB,
    }
    assert rig.fake.evictions == []


def test_what_does_not_fit_is_not_loaded(fake: FakeOllama, clock: FakeClock) -> None:
    """A load that would break the budget is never begun: Ollama hears nothing of it."""
    rig = Rig(fake, clock, budget_bytes=2 * GB)
    ensure(rig.pool, "a", reason="plan")
    with pytest.raises(NoMemory, match=r"b:latest needs about \d+ MiB, \d+ MiB are free"):
        ensure(rig.pool, "b", reason="plan")
    assert rig.loads_asked("b") == 0
    assert rig.residency() == {"a": "resident"}
    assert len(rig.changes) == 1


def test_memory_that_others_take_counts(rig: Rig) -> None:
    """When another process has taken the memory, the budget is worth less: the reserve stays free."""
    rig.others_bytes = 4 * GB
    assert rig.pool.room_bytes() == GB
    with pytest.raises(NoMemory):
        ensure(rig.pool, "a", reason="plan")
    assert rig.loads_asked("a") == 0
    rig.others_bytes = 2 * GB
    ensure(rig.pool, "a", reason="plan")
    assert rig.pool.room_bytes() == 3 * GB


def test_what_can_never_fit_or_is_not_there_is_told(rig: Rig) -> None:
    """A model larger than the budget, and one that Ollama does not have, are refused before anything is unloaded."""
    ensure(rig.pool, "a", reason="plan")
    for name, error in (("huge", ModelTooLarge), ("nowhere", ModelMissing)):
        with pytest.raises(error, match=name):
            rig.pool.check(name)
        with pytest.raises(error):
            ensure(rig.pool, name, evict=["a"], reason="plan")
    assert rig.residency() == {"a": "resident"}
    rig.pool.check("a")


def test_sizes_are_learnt(rig: Rig) -> None:
    """The first load shows what a model really takes; from then on that is the prediction, after a restart too."""
    rig.fake["a"].ram_bytes = 2 * GB
    ensure(rig.pool, "a", reason="plan")
    assert rig.changes[0].predicted_bytes < 2 * GB == rig.changes[0].size_bytes
    rig.pool.unload("a", reason="idle")
    rig.new_pool()
    assert rig.pool.cost("a").size_bytes == 2 * GB
    ensure(rig.pool, "a", reason="plan")
    assert rig.changes[-1].predicted_bytes == 2 * GB


def test_a_guess_counts_weights_and_context(rig: Rig) -> None:
    """Before the first load, the size is that of the file, the context's cache and something for the runner."""
    rig.pool.check("a")
    per_token = rig.client.show("a").kv_bytes_per_token
    assert per_token
    assert rig.pool.cost("a").size_bytes == GB + 1_000 * per_token + RUNNER_BYTES + BUFFERS_BYTES


# -- evicting


def test_evicted_models_are_gone_before_the_load(rig: Rig) -> None:
    """The load of the next model is asked for only when the last one has left memory: there is no room for both."""
    rig = Rig(rig.fake, rig.clock, budget_bytes=2 * GB)
    rig.fake.memory_bytes = int(1.5 * GB)
    ensure(rig.pool, "a", reason="plan")
    ensured = ensure(rig.pool, "b", evict=["A"], reason="overdue")
    assert ensured.evicted == ("a:latest",)
    assert rig.fake.resident() == ["b:latest"]
    assert rig.outcomes() == [
        ("loaded", "a", "plan"),
        ("unloaded", "a", "room for b:latest"),
        ("loaded", "b", "overdue"),
    ]
    assert rig.changes[-1].evicted == ("a:latest",)
    assert rig.fake.evictions == []  # Ollama never had to choose


def test_a_slow_unload_is_waited_for(clock: FakeClock) -> None:
    """Ollama unloads when it finds the time; until it has, nothing else is loaded."""
    with FakeOllama(FakeModel("a"), FakeModel("b"), memory_bytes=int(1.5 * GB), now=clock.monotonic) as fake:
        rig = Rig(fake, clock, budget_bytes=2 * GB)
        fake.unload_s = 3.0
        rig.on_beat = lambda: clock.advance(1.0)
        ensure(rig.pool, "a", reason="plan")
        ensure(rig.pool, "b", evict=["a"], reason="plan")
        assert fake.resident() == ["b:latest"]
        unload = rig.changes[1]
        assert (unload.outcome, unload.seconds) == ("unloaded", 3.0)


def test_an_unload_that_never_ends(rig: Rig) -> None:
    """A model that will not go still counts: after its time the pool goes on without the room, and says so."""
    rig = Rig(rig.fake, rig.clock, budget_bytes=2 * GB)
    ensure(rig.pool, "a", reason="plan")
    rig.fake.unload_s = FOREVER
    rig.on_beat = lambda: rig.clock.advance(6.0)
    with pytest.raises(NoMemory):
        ensure(rig.pool, "b", evict=["a"], reason="plan")
    assert rig.loads_asked("b") == 0
    assert rig.outcomes()[-1] == ("unload_failed", "a", "room for b:latest")
    assert rig.changes[-1].seconds == UNLOAD_TIMEOUT_S
    assert (rig.changes[-1].error_code, rig.changes[-1].error) == ("still_resident", "still resident after 30 s")
    assert rig.residency() == {"a": "resident"}
    rig.fake.unload_s = 0.0
    rig.other.unload("a")
    rig.fake._runners.clear()  # it goes after all
    rig.pool.refresh()
    ensure(rig.pool, "b", reason="plan")
    assert rig.residency() == {"b": "resident"}


def test_a_resident_model_that_was_deleted_is_not_waited_for(rig: Rig) -> None:
    """Ollama no longer knows what it has in memory: it stays until its lease ends, and nobody waits for that."""
    ensure(rig.pool, "a", reason="plan")
    model = rig.fake.models.pop("a:latest")
    assert rig.pool.unload("a", reason="idle") is False
    assert rig.outcomes()[-1] == ("unload_failed", "a", "idle")
    assert rig.changes[-1].seconds < 1
    assert rig.residency() == {"a": "resident"}
    rig.fake.models["a:latest"] = model
    assert rig.pool.unload("a", reason="idle")


def test_states_show_what_goes_on(rig: Rig) -> None:
    """While it loads and while it unloads, a model is shown as that."""
    rig.fake["a"].load_s = 0.1
    rig.pool.start_loading("a", reason="plan")
    assert rig.residency() == {"a": "loading"}
    rig.pool.settle(wait=True)
    rig.fake.unload_s = 1.0
    seen: list[dict[str, str]] = []

    def look() -> None:
        seen.append(rig.residency())
        rig.clock.advance(1.0)

    rig.on_beat = look
    assert rig.pool.unload("a", reason="idle")
    assert seen[0] == {"a": "unloading"}
    assert rig.residency() == {}


def test_to_unload_what_is_not_there_is_nothing(rig: Rig) -> None:
    """A model that is not resident needs no unload, and none is told."""
    assert rig.pool.unload("a", reason="idle") is False
    assert rig.changes == []


# -- loads beside a generation


def test_a_load_runs_beside(rig: Rig) -> None:
    """A load that was started goes on by itself: it is shown, its memory is spoken for, and its end is told."""
    rig.fake["a"].load_s = 0.2
    ended = threading.Event()
    rig.on_loaded = ended.set
    rig.pool.start_loading("a", reason="prefetch")
    assert rig.pool.loading == "a:latest"
    assert rig.pool.settle() is None
    (arriving,) = rig.pool.resident()
    assert (arriving.model, arriving.pinned) == ("a:latest", True)
    rig.pool.refresh()
    assert rig.residency() == {"a": "loading"}
    assert ended.wait(5)
    rig.pool.refresh()  # Ollama lists it already
    assert rig.residency() == {"a": "loading"}
    assert len(rig.pool.resident()) == 1
    ensured = rig.pool.settle()
    assert ensured is not None
    assert ensured.load_s >= 0.2
    assert rig.pool.loading is None
    assert rig.pool.settle() is None
    assert rig.outcomes() == [("loaded", "a", "prefetch")]


def test_a_load_can_be_broken_off(rig: Rig) -> None:
    """An interrupted load ends at once, leaves nothing behind, is told, and can be tried again."""
    rig.fake["a"].load_s = 60
    rig.pool.start_loading("a", reason="prefetch")
    wait_until(lambda: rig.loads_asked("a"))
    rig.pool.interrupt_load("urgent")
    with pytest.raises(Interrupted, match="urgent"):
        rig.pool.settle(wait=True)
    wait_until(lambda: rig.fake.asked("/api/generate")[0].aborted)
    assert (rig.pool.loading, rig.residency(), rig.fake.resident()) == (None, {}, [])
    assert rig.outcomes() == [("load_failed", "a", "prefetch")]
    assert rig.changes[-1].error_code == "interrupted"
    rig.fake["a"].load_s = 0
    ensure(rig.pool, "a", reason="plan")
    assert rig.residency() == {"a": "resident"}
    rig.pool.interrupt_load("nothing to break off")


@pytest.mark.parametrize("end", ["good", "failed", "broken off"])
def test_a_load_is_noted_until_it_ends(rig: Rig, end: str) -> None:
    """While it is on its way, the next run would know of it and of its task; however it ends, it did not end us."""
    rig.fake["a"].load_s = 60 if end == "broken off" else 0.1
    rig.fake["a"].load_error = (500, RUNNER_GONE) if end == "failed" else None
    rig.pool.start_loading("a", reason="plan", task=7)
    assert rig.kept["a:latest"]["load_for"] == 7
    if end == "broken off":
        rig.pool.interrupt_load("stopped")
    with suppress(RunnerDied, Interrupted):
        rig.pool.settle(wait=True)
    assert rig.kept["a:latest"]["load_for"] is None


# -- what can go wrong


@pytest.mark.parametrize(
    ("text", "error"), [(KILLED, NoMemory), (RUNNER_GONE, RunnerDied)], ids=["out of memory", "runner died"]
)
def test_a_failed_load_is_told_and_leaves_nothing(rig: Rig, text: str, error: type[Exception]) -> None:
    """A load that fails raises what happened, counts no memory, and the next try may be good."""
    rig.fake["a"].load_error = (500, text)
    with pytest.raises(error):
        ensure(rig.pool, "a", reason="plan")
    (change,) = rig.changes
    assert change.outcome == "load_failed"
    assert change.error_code == error.code  # type: ignore[attr-defined]
    assert str(change.error).startswith(f"{change.error_code}: ")
    assert (rig.residency(), rig.pool.resident()) == ({}, ())
    rig.fake["a"].load_error = None
    ensure(rig.pool, "a", reason="plan")
    assert rig.residency() == {"a": "resident"}


def test_a_load_has_a_deadline(fake: FakeOllama, clock: FakeClock) -> None:
    """A load that takes too long is broken off, and Ollama is told by hanging up."""
    rig = Rig(fake, clock, load_timeout_s=0.2)
    fake["a"].load_s = 60
    with pytest.raises(DeadlineExceeded) as caught:
        ensure(rig.pool, "a", reason="plan")
    assert caught.value.stage == "load"
    wait_until(lambda: fake.asked("/api/generate")[0].aborted)
    assert rig.outcomes() == [("load_failed", "a", "plan")]


def test_ollama_that_is_gone_is_told_at_every_step(rig: Rig) -> None:
    """Looking, loading and unloading each say that nobody answers; afterwards everything works anew."""
    ensure(rig.pool, "a", reason="plan")
    rig.fake.stop()
    with pytest.raises(OllamaDown):
        rig.pool.unload("a", reason="idle")
    with pytest.raises(OllamaDown):
        ensure(rig.pool, "b", reason="plan")
    with pytest.raises(OllamaDown):
        rig.pool.refresh()
    assert (rig.residency(), rig.pool.resident()) == ({}, ())
    rig.pool.unload_all("the daemon stops")  # nothing to unload, nothing raised
    rig.fake.start()
    rig.pool.refresh()
    assert rig.residency() == {}  # it came back empty
    ensure(rig.pool, "a", reason="plan")
    assert rig.residency() == {"a": "resident"}


def test_the_version_is_asked_when_ollama_comes(rig: Rig) -> None:
    """Once at the first look, and once more when Ollama was gone, since it may be another one; never in between."""
    seen = [rig.pool.ollama_version]
    for _ in range(2):
        rig.pool.refresh()
        seen.append(rig.pool.ollama_version)
    rig.fake.stop()
    with pytest.raises(OllamaDown):
        rig.pool.refresh()
    seen.append(rig.pool.ollama_version)
    rig.fake.version = "9.9.9"
    rig.fake.start()
    rig.pool.refresh()
    seen.append(rig.pool.ollama_version)
    assert seen == [None, "0.33.0", "0.33.0", None, "9.9.9"]
    assert len(rig.fake.asked("/api/version")) == 2


def test_unloading_all_stops_where_nobody_answers(rig: Rig) -> None:
    """At the end of the daemon an Ollama that is gone is no error."""
    ensure(rig.pool, "a", reason="plan")
    ensure(rig.pool, "b", reason="plan")
    rig.fake.stop()
    rig.pool.unload_all("the daemon stops")
    assert rig.outcomes()[2:] == []


def test_a_good_load_stays_good_when_ollama_then_hangs(rig: Rig) -> None:
    """A load is recorded though Ollama cannot say right after it what the model takes."""

    def hang() -> None:
        rig.fake.quick_hang = True

    rig.pool.check("a")
    rig.on_loaded = hang
    assert ensure(rig.pool, "a", reason="plan").load_s > 0
    assert rig.outcomes() == [("loaded", "a", "plan")]
    rig.fake.quick_hang = False
    rig.pool.refresh()
    assert rig.residency() == {"a": "resident"}


def test_a_short_silence_changes_nothing(rig: Rig) -> None:
    """A model that is still there after Ollama could not be asked is ours as before, and its idle time goes on."""
    ensure(rig.pool, "a", reason="plan")
    rig.clock.advance(100)
    rig.fake.quick_hang = True
    for _ in range(2):
        with pytest.raises(OllamaDown):
            rig.pool.refresh()
    assert rig.residency() == {}
    rig.fake.quick_hang = False
    rig.pool.refresh()
    assert rig.residency() == {"a": "resident"}
    rig.clock.advance(200)
    assert rig.pool.sweep() is None
    assert rig.outcomes()[-1] == ("unloaded", "a", "idle")


def test_a_model_that_was_killed_is_noticed(rig: Rig) -> None:
    """A model that left memory behind our back is forgotten at the next look, and can be loaded again."""
    ensure(rig.pool, "a", reason="plan")
    rig.other.unload("a")
    rig.pool.refresh()
    assert rig.residency() == {}
    assert ensure(rig.pool, "a", reason="plan").load_s > 0


# -- others


def test_models_of_others_are_noticed_and_left_alone(rig: Rig) -> None:
    """What another client has loaded counts as memory, is shown as external, and is not unloaded for idleness."""
    rig.load_elsewhere("b")
    rig.pool.refresh()
    assert rig.residency() == {"b": "external"}
    assert rig.pool.room_bytes() == 4 * GB
    assert [resident.size_bytes for resident in rig.pool.resident()] == [GB]
    rig.clock.advance(IDLE_S * 10)
    assert rig.pool.sweep() is None
    rig.pool.unload_all("the daemon stops")
    assert rig.fake.resident() == ["b:latest"]
    assert rig.changes == []


def test_a_model_of_others_becomes_ours_by_use(rig: Rig) -> None:
    """An external model can serve a task without a load; from then on it is ours to unload."""
    rig.load_elsewhere("b")
    rig.pool.refresh()
    assert ensure(rig.pool, "b", reason="plan").load_s == 0
    rig.pool.used("b")
    assert rig.pool.sweep() == IDLE_S
    rig.clock.advance(IDLE_S)
    rig.pool.sweep()
    assert rig.fake.resident() == []
    rig.pool.used("b")  # of a model that is gone: nothing
    assert rig.pool.resident() == ()


def test_a_model_of_others_can_be_evicted(rig: Rig) -> None:
    """When its memory is needed, an external model goes like any other."""
    rig = Rig(rig.fake, rig.clock, budget_bytes=2 * GB)
    rig.load_elsewhere("b")
    rig.pool.refresh()
    ensure(rig.pool, "a", evict=["b"], reason="plan")
    assert rig.fake.resident() == ["a:latest"]


# -- time


def test_an_idle_model_goes_at_its_time(rig: Rig) -> None:
    """A model is unloaded exactly when it has not been used for the idle time, not when it was loaded."""
    ensure(rig.pool, "a", reason="plan")
    assert rig.pool.sweep() == IDLE_S
    rig.clock.advance(200)
    rig.other.load("a", options={}, keep_alive_s=rig.pool.lease_s("a"), timeout_s=5)  # as a generation does
    rig.pool.used("a")
    rig.clock.advance(IDLE_S - 1)
    assert rig.pool.sweep() == 1
    assert rig.fake.resident() == ["a:latest"]
    rig.clock.advance(1)
    assert rig.pool.sweep() is None
    assert rig.fake.resident() == []
    assert rig.outcomes()[-1] == ("unloaded", "a", "idle")


def test_an_idle_model_that_another_client_uses_is_left_to_it(rig: Rig) -> None:
    """Its unload waits a second at most and is not tried again, also at the end, until it has been of use to us."""
    ensure(rig.pool, "a", reason="plan")
    rig.clock.advance(IDLE_S)
    rig.fake.unload_s = FOREVER
    rig.on_beat = lambda: rig.clock.advance(0.2)
    assert rig.pool.sweep() == 0
    assert rig.changes[-1].seconds <= 1.2
    assert (rig.outcomes()[-1], rig.residency()) == (("unload_failed", "a", "idle"), {"a": "external"})
    rig.pool.refresh()
    assert rig.pool.sweep() is None
    rig.pool.unload_all("the daemon stops")
    assert len(rig.changes) == 2
    rig.pool.used("a")
    assert rig.pool.sweep() == IDLE_S


def test_a_model_that_does_not_go_holds_up_no_other(rig: Rig) -> None:
    """Who asks to sweep gets a turn between two idle models that stay."""
    for name in "ab":
        ensure(rig.pool, name, reason="plan")
    rig.clock.advance(IDLE_S)
    rig.fake.unload_s = FOREVER
    rig.on_beat = lambda: rig.clock.advance(0.2)
    assert [rig.pool.sweep() for _ in range(3)] == [0, 0, None]
    assert rig.residency() == {"a": "external", "b": "external"}


def test_the_next_sweep_is_for_the_first_that_is_due(rig: Rig) -> None:
    """Of several models the one that has been idle for longest decides when to look again."""
    ensure(rig.pool, "a", reason="plan")
    rig.clock.advance(100)
    ensure(rig.pool, "b", reason="plan")
    assert rig.pool.sweep() == 200
    rig.clock.advance(200)
    assert rig.pool.sweep() == 100
    assert rig.fake.resident() == ["b:latest"]


def test_a_model_with_waiting_tasks_stays(rig: Rig) -> None:
    """A model that is wanted is not unloaded, however long it has been idle."""
    ensure(rig.pool, "a", reason="plan")
    rig.clock.advance(IDLE_S)
    rig.pool.sweep(["A"])
    assert rig.fake.resident() == ["a:latest"]
    rig.pool.sweep(["b:latest"])
    assert rig.fake.resident() == []


def test_ollama_does_not_unload_before_we_do(rig: Rig) -> None:
    """The lease given to Ollama outlasts our own idle time, and ends by itself when we are dead."""
    ensure(rig.pool, "a", reason="plan")
    rig.clock.advance(IDLE_S + LEASE_MARGIN_S - 1)
    assert rig.fake.resident() == ["a:latest"]
    rig.clock.advance(1)
    assert rig.fake.resident() == []


def test_a_pinned_model_stays_for_ever(fake: FakeOllama, clock: FakeClock) -> None:
    """The lease of a pinned model is renewed in time, hour after hour, and it is never idle."""
    rig = Rig(fake, clock, pinned=("a",))
    ensure(rig.pool, "a", reason="preload")
    assert fake.asked("/api/generate")[0].body["keep_alive"] == PINNED_LEASE_S
    for _ in range(10):
        rig.pool.renew()
        due_s = rig.pool.sweep()
        assert due_s is not None
        assert 0 < due_s <= PINNED_LEASE_S / 2
        clock.advance(due_s)
    assert fake.resident() == ["a:latest"]
    assert fake.loads == ["a:latest"]
    assert [resident.pinned for resident in rig.pool.resident()] == [True]
    assert rig.outcomes() == [("loaded", "a", "preload")]


def test_a_pinned_model_is_kept_through_a_restart(fake: FakeOllama, clock: FakeClock) -> None:
    """A pinned model that is found resident is ours, whoever has loaded it: its lease is renewed."""
    rig = Rig(fake, clock, pinned=("a",))
    ensure(rig.pool, "a", reason="preload")
    rig.new_pool()
    rig.pool.refresh()
    assert rig.residency() == {"a": "resident"}
    for _ in range(4):
        rig.pool.renew()
        clock.advance(PINNED_LEASE_S / 2)
    assert fake.resident() == ["a:latest"]


def test_wanted_models_keep_their_lease(rig: Rig) -> None:
    """A model that tasks wait for stays while others work, however long; one that nobody wants does not."""
    ensure(rig.pool, "a", reason="plan")
    ensure(rig.pool, "b", reason="plan")
    for _ in range(20):
        rig.clock.advance(IDLE_S / 2)
        rig.pool.renew(["A"])
    assert rig.fake.resident() == ["a:latest"]
    assert rig.fake.loads == ["a:latest", "b:latest"]


def test_a_pinned_lease_is_the_longest(rig: Rig) -> None:
    """Ollama would evict by the lease: that of a pinned model is longer than any other, whatever is configured."""
    rig = Rig(rig.fake, rig.clock, pinned=("a",), idle_timeout_s=100_000.0)
    assert rig.pool.lease_s("a") > rig.pool.lease_s("b") > 100_000


# -- the context


def test_a_model_with_another_context_is_loaded_anew(rig: Rig) -> None:
    """What another client has loaded with another context would be loaded again in mid-answer: it is done before."""
    rig.load_elsewhere("a", num_ctx=4_096)
    rig.pool.refresh()
    assert not rig.pool.serves("a")
    assert ensure(rig.pool, "a", reason="plan").load_s > 0
    assert [change.reason for change in rig.changes] == ["context", "plan"]
    rig.pool.refresh()
    assert rig.pool.serves("a")
    assert ensure(rig.pool, "a", reason="plan").load_s == 0
    rig.other.generate(
        Generation(model="a", prompt="hi", options={"num_ctx": 512}, keep_alive_s=60),
        deadlines=Deadlines(first_token_s=5, token_gap_s=5, total_s=5),
        on_text=lambda _text: None,
        interrupt=Interrupt(),
    )
    rig.pool.refresh()
    assert not rig.pool.serves("a")


def test_a_context_that_ollama_rounds_is_ours(rig: Rig) -> None:
    """What Ollama tells after our own load is believed to be what we asked for, so that nothing is loaded twice."""
    rig.fake.tells_context = lambda num_ctx: num_ctx + 24
    ensure(rig.pool, "a", reason="plan")
    rig.pool.refresh()
    assert rig.pool.serves("a")
    rig.new_pool()
    rig.pool.refresh()
    for _ in range(3):
        ensure(rig.pool, "a", reason="plan")
        rig.pool.refresh()
    assert rig.fake.loads == ["a:latest", "a:latest"]


def test_a_context_beyond_what_the_model_was_made_for(rig: Rig) -> None:
    """Ollama cuts it to that: no reason to load anew."""
    rig.fake["a"].model_info = {"fake.context_length": 512}
    rig.load_elsewhere("a", num_ctx=512)
    rig.pool.refresh()
    assert rig.pool.serves("a")


def test_a_model_that_another_client_uses_otherwise_is_not_pulled_away(rig: Rig) -> None:
    """While it answers somebody with another context there is no room for it."""
    rig.load_elsewhere("a", num_ctx=4_096)
    rig.fake.unload_s = 60.0
    rig.pool.refresh()
    with pytest.raises(NoRoom, match="in use by another client"):
        rig.pool.start_loading("a", reason="plan", unload_timeout_s=0.0)
    assert rig.pool.loading is None


def test_the_size_is_that_of_the_context(rig: Rig) -> None:
    """A size that was learnt with another context says nothing of this one."""
    rig.fake["a"].ram_bytes = 2 * GB
    ensure(rig.pool, "a", reason="plan")
    assert rig.pool.cost("a").size_bytes == rig.pool.catalogue.size_bytes("a") == 2 * GB
    rig.num_ctx = 50_000
    per_token = rig.client.show("a").kv_bytes_per_token or 0
    assert rig.pool.catalogue.size_bytes("a") == GB + 50_000 * per_token + RUNNER_BYTES + BUFFERS_BYTES


def test_what_a_load_took_outlives_what_ollama_tells(rig: Rig) -> None:
    """When loads have plainly cost more than Ollama says, the next look does not forget it."""
    rig.hidden_bytes = GB
    for _ in range(TRUSTED_LOADS):
        ensure(rig.pool, "a", reason="plan")
        rig.pool.refresh()
        size_bytes = rig.pool.resident()[0].size_bytes
        rig.pool.unload("a", reason="idle")
    assert size_bytes == pytest.approx(2 * GB, rel=0.01)


# -- what Ollama has


def rig_policy(_model: str) -> ModelPolicy:
    """The same for every model."""
    return ModelPolicy(num_ctx=1_000)


def test_a_model_of_the_cloud_is_none(rig: Rig) -> None:
    """Prompts do not leave the board: such a model is not there."""
    rig.fake.models["big:cloud"] = FakeModel("big:cloud", size_bytes=400)
    assert rig.pool.catalogue.has("big:cloud") is False
    assert rig.pool.catalogue.has("a") is True


def test_a_silent_ollama_is_asked_for_details_once_in_a_while(rig: Rig) -> None:
    """Six models of which nothing is known do not cost six times the patience."""
    rig.pool.check("a")
    rig.fake.quick_hang = True
    before = len(rig.fake.asked("/api/show"))
    for name in ("b", "c", "huge"):
        assert rig.pool.catalogue.details(name) is None
    assert len(rig.fake.asked("/api/show")) == before + 1
    rig.fake.quick_hang = False
    rig.clock.advance(CATALOGUE_PAUSE_S)
    assert rig.pool.catalogue.details("b") is not None


# -- the budget, always


def test_the_budget_is_never_exceeded(fake: FakeOllama, clock: FakeClock) -> None:
    """Through 150 random loads, evictions, other clients and other processes, no load of ours breaks the limits."""
    dice = random.Random(3)  # noqa: S311
    for number, name in enumerate("defghi"):
        model = FakeModel(name, size_bytes=(number + 2) * GB // 4)
        fake.models[model.name] = model
    fake.memory_bytes = 100 * GB
    rig = Rig(fake, clock, budget_bytes=3 * GB)
    refused = loaded = 0
    for _ in range(150):
        rig.others_bytes = dice.choice([0, 0, GB, 2 * GB, 3 * GB])
        if dice.random() < 0.1:
            others: list[Callable[[str], object]] = [rig.load_elsewhere, rig.other.unload]
            dice.choice(others)(dice.choice("abcdefghi"))
        rig.pool.refresh()
        resident = [it.model for it in rig.pool.resident()]
        evict = dice.sample(resident, k=dice.randint(0, len(resident)))
        before = len(fake.loads)
        try:
            ensure(rig.pool, dice.choice("abcdefghi"), evict=evict, reason="plan")
        except NoMemory:
            refused += 1
            assert len(fake.loads) == before
        if len(fake.loads) > before:
            loaded += 1
            assert fake.used_bytes() <= 3 * GB
            assert rig.available_bytes() >= rig.limits.reserve_bytes
    assert min(refused, loaded) > 20
    assert fake.evictions == []


# -- the catalogue


def test_the_catalogue_is_asked_seldom(rig: Rig) -> None:
    """However many tasks name unknown models, Ollama is asked for its list now and then only."""
    catalogue = rig.pool.catalogue
    assert [catalogue.has(name) for name in ("a", "A:latest", "nowhere", "nothing")] == [True, True, False, False]
    assert len(rig.fake.asked("/api/tags")) == 1
    rig.fake.models["new:latest"] = FakeModel("new")
    assert catalogue.has("new") is False
    rig.clock.advance(CATALOGUE_PAUSE_S)
    assert catalogue.has("new") is True
    assert catalogue.names() == ("a:latest", "b:latest", "c:latest", "huge:latest", "new:latest")
    catalogue.forget("new")
    assert catalogue.has("new") is False


def test_a_catalogue_that_was_never_read_does_not_know(rig: Rig) -> None:
    """While Ollama has never answered, nothing is called missing; what was read once is still known when it is gone."""
    rig.fake.stop()
    assert rig.pool.catalogue.has("a") is None
    assert rig.pool.catalogue.details("a") is None
    assert rig.pool.catalogue.names() == ()
    rig.pool.check("a")
    with pytest.raises(OllamaDown):
        rig.pool.catalogue.refresh()
    rig.fake.start()
    rig.clock.advance(CATALOGUE_PAUSE_S)
    assert rig.pool.catalogue.has("a") is True
    rig.fake.stop()
    rig.clock.advance(CATALOGUE_PAUSE_S)
    assert rig.pool.catalogue.has("a") is True


def test_nothing_is_loaded_whose_size_is_not_known(rig: Rig) -> None:
    """While the list of models cannot be read, no load is begun, since nobody knows what it would take."""
    rig.fake.quick_hang = True
    with pytest.raises(OllamaDown):
        ensure(rig.pool, "a", reason="plan")
    assert rig.loads_asked("a") == 0


def test_a_list_that_could_not_be_read_is_read_before_a_load(rig: Rig) -> None:
    """An Ollama that is back costs no task an attempt, however short ago it did not answer."""
    rig.fake.stop()
    assert rig.pool.catalogue.has("a") is None
    rig.fake.start()
    assert ensure(rig.pool, "a", reason="plan").load_s > 0


def test_ollama_is_asked_in_its_own_spelling(rig: Rig) -> None:
    """A model whose name has capitals is named to Ollama as Ollama does."""
    rig.fake.models["Mixed:Q4"] = FakeModel("Mixed:Q4")
    ensure(rig.pool, "mixed:q4", reason="plan")
    assert rig.fake.asked("/api/generate")[-1].body["model"] == "Mixed:Q4"
    assert rig.pool.unload("MIXED:q4", reason="idle")
    assert {seen.body["model"] for seen in rig.fake.asked("/api/generate")} == {"Mixed:Q4"}


def test_details_are_asked_once(rig: Rig) -> None:
    """What `/api/show` says of a model does not change while the model is there."""
    rig.fake["a"].capabilities = ("completion", "thinking")
    assert rig.pool.catalogue.has("a")
    for _ in range(3):
        details = rig.pool.catalogue.details("A")
        assert details is not None
        assert "thinking" in details.capabilities
    assert len(rig.fake.asked("/api/show")) == 1


# -- limits


@pytest.mark.parametrize(
    ("total", "budget", "reserve", "wanted"),
    [
        (8 * GB, None, None, (7 * GB, GB)),
        (GB, None, None, (GB - 384 * MIB, 384 * MIB)),
        (8 * GB, 2 * GB, None, (2 * GB, GB)),
        (8 * GB, 20 * GB, None, (7 * GB, GB)),
        (8 * GB, None, 3 * GB, (5 * GB, 3 * GB)),
        (8 * GB, None, 0, (8 * GB, 0)),
        (256 * MIB, None, None, (0, 384 * MIB)),
        (None, 20 * GB, 3 * GB, (20 * GB, 0)),
    ],
)
def test_budget_and_reserve_of_a_board(
    total: int | None, budget: int | None, reserve: int | None, wanted: tuple[int, int]
) -> None:
    """What is left open follows from the board, whose reserve is spared; another machine's budget holds as it is."""
    limits = memory_limits(total_bytes=total, budget_bytes=budget, reserve_bytes=reserve)
    assert (limits["budget_bytes"], limits["reserve_bytes"]) == wanted


def test_outcomes_have_one_word_each() -> None:
    """Every kind of change has its own name in the log."""
    words = {
        Change(action=action, model="m", reason="r", seconds=0, error=error).outcome
        for action, error in itertools.product(["load", "unload"], [None, "why"])
    }
    assert words == {"loaded", "unloaded", "load_failed", "unload_failed"}


# -- several names of one model


@pytest.fixture
def named_twice(fake: FakeOllama, clock: FakeClock) -> Rig:
    """A pool with room for one model, of which there are two names."""
    fake.models["alias:latest"] = FakeModel("alias", blob=fake["a"].blob)
    return Rig(fake, clock, budget_bytes=2 * GB)


def test_another_name_of_a_resident_model(named_twice: Rig) -> None:
    """Ollama runs both names in one process and lists one: the other takes no memory, and is not loaded again."""
    rig = named_twice
    ensure(rig.pool, "a", reason="plan")
    assert (rig.pool.cost("alias").size_bytes, rig.pool.cost("alias").load_s) == (0, ALIAS_LOAD_S)
    ensure(rig.pool, "alias", reason="plan")
    for _ in range(3):
        rig.pool.refresh()
        assert rig.pool.serves("alias")
        assert rig.pool.serves("a")
    assert {it.model: it.size_bytes for it in rig.pool.resident()} == {"a:latest": GB, "alias:latest": 0}
    assert rig.fake.loads == ["a:latest"]
    assert rig.loads_asked("alias") == 1
    assert "alias:latest" not in rig.kept


def test_a_name_goes_alone_and_a_model_with_all_its_names(named_twice: Rig) -> None:
    """To unload what takes no memory asks nothing of Ollama; when the model goes, no name of it stays."""
    rig = named_twice
    ensure(rig.pool, "a", reason="plan")
    ensure(rig.pool, "alias", reason="plan")
    assert rig.pool.unload("alias", reason="idle")
    assert rig.fake.resident() == ["a:latest"]
    ensure(rig.pool, "alias", reason="plan")
    ensure(rig.pool, "b", evict=["a"], reason="plan")
    rig.pool.refresh()
    assert [it.model for it in rig.pool.resident()] == ["b:latest"]
    assert rig.pool.cost("alias").size_bytes > GB


def test_a_name_with_another_context_is_another_model(named_twice: Rig) -> None:
    """Ollama would load it anew, so it counts in full."""
    rig = named_twice
    ensure(rig.pool, "a", reason="plan")
    rig.contexts["alias:latest"] = 2_000
    assert rig.pool.cost("alias").size_bytes > GB


def test_the_use_of_one_name_is_the_use_of_all(named_twice: Rig) -> None:
    """A model that is asked for by its other name is not idle, nor is one whose other name is waited for."""
    rig = named_twice
    ensure(rig.pool, "a", reason="plan")
    ensure(rig.pool, "alias", reason="plan")
    rig.clock.advance(IDLE_S - 1)
    rig.pool.used("alias")
    rig.clock.advance(2)
    rig.pool.sweep()
    assert rig.pool.serves("alias")
    rig.clock.advance(IDLE_S)
    rig.pool.sweep(wanted=["alias"])
    assert [change.action for change in rig.changes] == ["load"]
    rig.pool.sweep()
    assert [change.action for change in rig.changes] == ["load", "unload"]


def test_a_name_that_is_pinned_pins_the_model(fake: FakeOllama, clock: FakeClock) -> None:
    """Loaded by a name that is not pinned, it stays for the one that is, with its lease."""
    fake.models["alias:latest"] = FakeModel("alias", blob=fake["a"].blob)
    rig = Rig(fake, clock, pinned=("alias",))
    ensure(rig.pool, "a", reason="plan")
    ensure(rig.pool, "alias", reason="plan")
    rig.clock.advance(2 * IDLE_S)
    rig.pool.sweep()
    assert rig.fake.resident() == ["a:latest"]
    assert rig.pool.evictable() == ()
    assert all(resident.pinned for resident in rig.pool.resident())
    assert rig.pool.lease_s("a") == rig.pool.lease_s("alias")


def test_a_model_that_makes_no_text(fake: FakeOllama, clock: FakeClock) -> None:
    """It is refused before anything makes way for it."""
    rig = Rig(fake, clock)
    fake["b"].capabilities = ("embedding",)
    with pytest.raises(BadRequest, match="b makes no text: it is for embedding"):
        rig.pool.check("b")
    rig.pool.check("a")


def test_a_silent_ollama_is_asked_once(fake: FakeOllama, clock: FakeClock) -> None:
    """However many models are asked about meanwhile: who waited for its silence waits no second time."""
    fake.quick_hang = True
    client = Ollama(fake.url, connect_timeout_s=5, quick_timeout_s=0.1, beat=lambda: clock.advance(CATALOGUE_PAUSE_S))
    catalogue = Catalogue(client, clock=clock, estimates=Estimates({}, lambda *_: None), policy=rig_policy)
    for name in "abcdefgh":
        assert catalogue.has(name) is None
        assert catalogue.size_bytes(name) > 0
    assert len(fake.requests) == 1
    clock.advance(CATALOGUE_PAUSE_S)
    fake.quick_hang = False
    assert catalogue.has("a")


def test_what_is_known_is_told_while_ollama_is_silent(
    fake: FakeOllama, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One thread waits for it; another asks for what is known, and does not wait; for what is not it waits briefly."""
    monkeypatch.setattr(model_pool, "ASKED_ALREADY_S", 0.01)
    rig = Rig(fake, clock)
    catalogue = rig.pool.catalogue
    rig.pool.check("a")
    clock.advance(CATALOGUE_PAUSE_S)
    fake.quick_hang = True
    waits = threading.Thread(target=lambda: catalogue.has("unknown"))
    waits.start()
    wait_until(catalogue._lock.locked)
    assert catalogue.has("a")
    assert "a:latest" in catalogue.names()
    assert catalogue.spelling("A") == "a:latest"
    assert catalogue.size_bytes("a") > 0
    assert catalogue.has("another") is None
    assert waits.is_alive()
    waits.join()


def test_a_model_that_was_made_anew(fake: FakeOllama, clock: FakeClock) -> None:
    """Its details are asked for again when it is seen with another digest."""
    rig = Rig(fake, clock)
    ensure(rig.pool, "a", reason="plan")
    rig.pool.refresh()
    before = rig.pool.catalogue.details("a")
    assert before is not None
    assert "thinking" not in before.capabilities
    fake["a"].capabilities, fake["a"].edition = ("completion", "thinking"), 1
    clock.advance(CATALOGUE_PAUSE_S)
    rig.pool.refresh()
    after = rig.pool.catalogue.details("a")
    assert after is not None
    assert "thinking" in after.capabilities


def test_a_name_is_fetched_as_it_is_written(fake: FakeOllama, clock: FakeClock) -> None:
    """Names compare in any case, but a registry may tell them apart."""
    rig = Rig(fake, clock)
    catalogue = Catalogue(
        rig.client,
        clock=clock,
        estimates=Estimates({}, lambda *_: None),
        policy=rig_policy,
        written=["hf.co/Org/Model:Q4_K_M", "A"],
    )
    catalogue.refresh()
    assert catalogue.spelling("hf.co/org/model:q4_k_m") == "hf.co/Org/Model:Q4_K_M"
    assert catalogue.spelling("a") == "a:latest"


@pytest.mark.parametrize("told", [4096, 2048])
def test_a_context_after_a_restart(fake: FakeOllama, clock: FakeClock, told: int) -> None:
    """Some versions tell the context that was asked for, some what the model was made for: neither is strange."""
    rig = Rig(fake, clock)
    rig.num_ctx = 4096
    fake["a"].model_info = {"fake.context_length": 2048}
    rig.other.load("a", options={"num_ctx": told}, keep_alive_s=60, timeout_s=5)
    rig.pool.refresh()
    assert rig.pool.serves("a")
