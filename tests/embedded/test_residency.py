"""Loading, sharing, unloading and losing models: what /api/ps and the processes show."""

import json
import socket
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, wait
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest

from edge_daemon.embedded import start_ollama
from tests.embedded.client import LONG_TEXT, TIMEOUT_S, Client, Stream, answer_on, has_ended
from tests.embedded.needs_models import SMOLLM2, need_model
from tests.waiting import wait_until

pytestmark = pytest.mark.models

SMALL = {"num_ctx": 512, "num_thread": 1}  # one thread suffers least from whatever else the machine does
LONG: dict[str, Any] = {**SMALL, "num_predict": 5000, "temperature": 0, "stop": [], "seed": 1}
LONGER = {**LONG, "num_ctx": 2048}
"""For an answer that has to go on while other things are done, on a machine that may be slow."""
ENOUGH_FOR_A_LOAD_S = 1.5
STORY = "Once upon a time"


@pytest.fixture(scope="module")
def shared(data_dir: Path) -> Iterator[Client]:
    """A server that holds two models, of which three are the same; "endless" never finishes loading."""
    need_model(SMOLLM2)
    aliases = [f"{name}={SMOLLM2}" for name in ("one", "two", "three", "endless", "broken")]
    with start_ollama(data_dir, aliases=aliases, max_loaded=2, max_queue=1) as server:
        client = Client(server, data_dir)
        client.make_endless("endless")
        yield client


@pytest.fixture
def ollama(shared: Client) -> Iterator[Client]:
    """The server with nothing loaded, before and after."""
    yield shared
    shared.unload_all()
    assert shared.processes() == []


def seconds_left(entry: dict[str, Any]) -> float:
    """How long an entry of /api/ps has to live."""
    expires_at = datetime.fromisoformat(entry["expires_at"])
    return (expires_at - datetime.now(expires_at.tzinfo)).total_seconds()


def goes_on(stream: Stream, after_s: float) -> bool:
    """Whether there is more of an answer that was written so many seconds after this moment, or later."""
    since = datetime.now(UTC) + timedelta(seconds=after_s)
    return any(datetime.fromisoformat(it["created_at"]) > since and not it["done"] for it in stream.rest())


def test_ps_tells_what_a_loaded_model_really_takes(ollama: Client) -> None:
    """Name, context and expiry are listed; the size is that of the process; nothing is claimed of a GPU."""
    assert ollama.get("/api/ps").json() == {"models": []}
    process = ollama.load("one", options={"num_ctx": 2048})
    entry = ollama.ps()["one:latest"]
    assert entry["model"] == "one:latest"
    assert (entry["context_length"], entry["size_vram"]) == (2048, 0)
    assert entry["size"] == pytest.approx(process.memory_info().rss, rel=0.1)
    assert entry["size"] > ollama.alias_path("one").stat().st_size
    assert 200 < seconds_left(entry) <= 300


def test_unloading_ends_the_process(ollama: Client) -> None:
    """An unload is answered at once; when the model has left the list, its process is gone."""
    process = ollama.load("one", options=SMALL)
    assert ollama.generate("one", keep_alive=0)["done_reason"] == "unload"
    wait_until(lambda: "one:latest" not in ollama.ps())
    assert has_ended(process)


@pytest.mark.parametrize("path", ["/api/generate", "/api/chat"])
def test_unloading_what_is_not_loaded_is_no_error(ollama: Client, path: str) -> None:
    """It is what the client wanted, and it loads nothing."""
    response = ollama.post(path, model="one", keep_alive=0)
    assert (response.status_code, response.json()["done_reason"]) == (200, "unload")
    assert ollama.processes() == []


def test_a_busy_model_is_unloaded_when_its_answer_has_ended(ollama: Client) -> None:
    """An unload does not break off an answer."""
    stream = ollama.stream("/api/generate", model="one", prompt=STORY, options=LONGER, raw=True)
    stream.next()
    assert ollama.generate("one", keep_alive=0)["done_reason"] == "unload"
    assert goes_on(stream, after_s=0.5)
    assert "one:latest" in ollama.ps()
    stream.hang_up()
    wait_until(lambda: not ollama.ps())


def test_keep_alive_zero_with_a_prompt_unloads_afterwards(ollama: Client) -> None:
    """The answer comes first, then the model goes."""
    answer = ollama.generate("one", "Hi", keep_alive=0, options={**SMALL, "num_predict": 2})
    assert answer["eval_count"] == 2
    wait_until(lambda: not ollama.ps())


def test_an_idle_model_goes_when_its_time_is_over(ollama: Client) -> None:
    """Fractions of a second count."""
    process = ollama.load("one", options=SMALL, keep_alive=0.3)
    wait_until(lambda: has_ended(process))
    assert ollama.ps() == {}


def test_keep_alive_is_left_as_it_is_unless_given(ollama: Client) -> None:
    """A request without it restarts the time that an earlier one set; a negative one means never."""
    ollama.generate("one", options=SMALL, keep_alive="1h")
    ollama.generate("one", "Hi", options={**SMALL, "num_predict": 1})
    assert 3500 < seconds_left(ollama.ps()["one:latest"]) <= 3600
    ollama.generate("one", options=SMALL, keep_alive=-1)
    assert seconds_left(ollama.ps()["one:latest"]) > 200 * 365 * 86400
    ollama.generate("one", options=SMALL, keep_alive="2m")
    assert seconds_left(ollama.ps()["one:latest"]) <= 120


def test_the_time_to_live_begins_when_the_last_answer_ends(ollama: Client) -> None:
    """A model does not go while it answers, however short its keep-alive."""
    body = {"model": "one", "prompt": STORY, "raw": True, "options": LONG, "keep_alive": 0.01}
    stream = ollama.stream("/api/generate", **body)
    seen = [stream.next() for _ in range(10)]
    assert not any(it["done"] for it in seen)
    assert "one:latest" in ollama.ps()
    stream.hang_up()
    wait_until(lambda: not ollama.ps())


def test_runner_options_force_a_reload_and_sampling_options_do_not(ollama: Client) -> None:
    """A changed num_ctx means another process; a changed temperature does not."""
    first = ollama.load("one", options=SMALL)
    ollama.generate("one", "Hi", options={**SMALL, "temperature": 0, "num_predict": 1})
    assert ollama.processes() == [first]
    second = ollama.load("one", options={**SMALL, "num_ctx": 1024})
    assert second != first
    assert has_ended(first)
    assert ollama.ps()["one:latest"]["context_length"] == 1024


def test_loading_models_are_invisible_and_hold_nobody_up(ollama: Client) -> None:
    """While one model loads, it is not listed, and a loaded one answers past the queue."""
    ollama.load("one", options=SMALL)
    connection, _ = ollama.start_endless_load("endless")
    with connection:
        assert list(ollama.ps()) == ["one:latest"]
        assert ollama.generate("one", "Hi", options={**SMALL, "num_predict": 2})["eval_count"] == 2


def test_hanging_up_breaks_off_a_load(ollama: Client) -> None:
    """A client that gives up while its model loads leaves no process behind."""
    connection, process = ollama.start_endless_load("endless")
    connection.close()
    wait_until(lambda: has_ended(process))
    assert ollama.ps() == {}


def test_a_broken_off_load_is_answered_499(ollama: Client) -> None:
    """Who only stops sending can still read that its request was given up."""
    connection, _ = ollama.start_endless_load("endless")
    with connection:
        connection.shutdown(socket.SHUT_WR)
        assert answer_on(connection) == (499, {"error": "request canceled"})


def test_loads_wait_for_each_other_in_order(ollama: Client) -> None:
    """A load begins when the one before it has ended, here because it was given up."""
    connection, _ = ollama.start_endless_load("endless")
    later = ollama.later("/api/generate", model="one", options=SMALL)
    assert not wait([later], ENOUGH_FOR_A_LOAD_S).done
    assert len(ollama.processes()) == 1
    connection.close()
    assert later.result(TIMEOUT_S).json()["done_reason"] == "load"


def test_a_full_queue_is_refused_with_503(ollama: Client) -> None:
    """Behind the load in progress one may wait, the next one is told to try again."""
    connection, _ = ollama.start_endless_load("endless")
    waiting = [ollama.later("/api/generate", model="one", options=SMALL) for _ in range(2)]
    done, others = wait(waiting, TIMEOUT_S, FIRST_COMPLETED)
    (refused,) = (future.result() for future in done)
    assert refused.status_code == 503
    assert refused.json() == {"error": "server busy, please try again.  maximum pending requests exceeded"}
    connection.close()
    assert [future.result(TIMEOUT_S).status_code for future in others] == [200]


def test_who_gives_up_waiting_leaves_the_queue(ollama: Client) -> None:
    """A place in the queue is free again when its client hangs up."""
    connection, _ = ollama.start_endless_load("endless")
    with connection:
        with ollama.send_only("/api/generate", model="one", options=SMALL) as waiting:
            waiting.shutdown(socket.SHUT_WR)
            assert answer_on(waiting)[0] == 499
        later = ollama.later("/api/generate", model="two", options=SMALL)
    assert later.result(TIMEOUT_S).status_code == 200
    assert list(ollama.ps()) == ["two:latest"]


def test_room_is_made_by_the_shortest_keep_alive(ollama: Client) -> None:
    """When all places are taken, the idle model with the least time goes, not the one used longest ago."""
    ollama.generate("one", options=SMALL, keep_alive="1h")
    ollama.generate("two", options=SMALL, keep_alive="1m")
    ollama.generate("three", options=SMALL)
    assert set(ollama.ps()) == {"one:latest", "three:latest"}


def test_an_idle_model_makes_room_before_a_busy_one(ollama: Client) -> None:
    """A model that answers stays, even if its keep-alive is the shortest."""
    ollama.generate("one", options=SMALL, keep_alive="1h")
    stream = ollama.stream("/api/generate", model="two", prompt=STORY, raw=True, options=LONG, keep_alive=5)
    stream.next()
    ollama.generate("three", options=SMALL)
    assert set(ollama.ps()) == {"two:latest", "three:latest"}
    assert not stream.next()["done"]
    stream.hang_up()


def test_a_load_waits_for_busy_models(ollama: Client) -> None:
    """With every place busy a load waits until an answer has ended."""
    body: dict[str, Any] = {"prompt": STORY, "raw": True, "options": LONGER}
    first = ollama.stream("/api/generate", model="one", keep_alive="1m", **body)
    second = ollama.send_only("/api/generate", model="two", keep_alive="2m", **body)
    wait_until(lambda: len(ollama.ps()) == 2)
    loads = [ollama.later("/api/generate", model="three", options=SMALL) for _ in range(3)]
    done, waiting = wait(loads, TIMEOUT_S, FIRST_COMPLETED)
    assert [future.result().status_code for future in done] == [503]  # the queue is full: the others are in it
    assert goes_on(first, after_s=ENOUGH_FOR_A_LOAD_S)
    assert not any(future.done() for future in waiting)
    assert set(ollama.ps()) == {"one:latest", "two:latest"}
    first.hang_up()
    assert [future.result(TIMEOUT_S).status_code for future in waiting] == [200, 200]
    assert set(ollama.ps()) == {"two:latest", "three:latest"}
    second.close()


def test_only_one_model_computes_at_a_time(ollama: Client) -> None:
    """Each computes with all cores, so the next answer begins when the one before has ended."""
    processes = [ollama.load(name, options=SMALL) for name in ("one", "two")]
    options = {**LONG, "num_predict": 15}
    later = [
        ollama.later("/api/generate", model=name, prompt=STORY, raw=True, options=options) for name in ("one", "two")
    ]
    while not all(future.done() for future in later):
        first, second, again = (ollama.is_computing(it) for it in (*processes, processes[0]))
        assert second is None or first is None or first != again
    assert [future.result().status_code for future in later] == [200, 200]


@pytest.mark.parametrize("prompt", [STORY, LONG_TEXT], ids=["while writing", "while reading"])
def test_hanging_up_stops_the_computing(ollama: Client, prompt: str) -> None:
    """Nobody computes for a client that has gone, neither text nor a long prompt; the next one has its turn."""
    options = {**LONG, "num_ctx": 2048}
    process = ollama.load("one", options=options)
    connection = ollama.send_only("/api/generate", model="one", prompt=prompt, raw=True, options=options)
    wait_until(lambda: ollama.is_computing(process) is not None)
    connection.close()
    wait_until(lambda: ollama.is_computing(process) is None)
    assert ollama.generate("one", "Hi", options={**options, "num_predict": 1})["eval_count"] == 1


def test_a_runner_killed_while_it_loads_is_an_error_500(ollama: Client) -> None:
    """The text says that a signal ended it, as after the kernel's."""
    connection, process = ollama.start_endless_load("endless", stream=False)
    with connection:
        process.kill()
        assert answer_on(connection) == (500, {"error": "llama-server process has terminated: signal: killed"})
    assert ollama.ps() == {}


def test_a_runner_killed_while_it_answers_ends_the_stream_with_an_error(ollama: Client) -> None:
    """The last line is the error; the model stays listed until the next request finds out and loads it again."""
    process = ollama.load("one", options=SMALL)
    stream = ollama.stream("/api/generate", model="one", prompt=STORY, raw=True, options=LONG)
    stream.next()
    process.kill()
    *_, last = stream.rest()
    assert last == {"error": "an error was encountered while running the model: unexpected EOF"}
    assert "one:latest" in ollama.ps()
    assert ollama.generate("one", "Hi", options={**SMALL, "num_predict": 1})["done"]
    (again,) = ollama.processes()
    assert again != process


def test_a_runner_killed_while_idle_is_replaced(ollama: Client) -> None:
    """It is still listed; the next request loads it anew and says so by its load_duration."""
    process = ollama.load("one", options=SMALL)
    process.kill()
    wait_until(lambda: process.status() == psutil.STATUS_ZOMBIE or has_ended(process))
    assert "one:latest" in ollama.ps()
    answer = ollama.generate("one", "Hi", options={**SMALL, "num_predict": 1})
    assert answer["load_duration"] > 50e6


def test_a_damaged_file_is_an_error_500(ollama: Client) -> None:
    """A model that cannot be loaded says so and leaves nothing behind."""
    path = ollama.alias_path("broken")
    content = path.read_bytes()[: 1 << 20]
    path.unlink()
    path.write_bytes(content)
    response = ollama.post("/api/generate", model="broken", prompt="x")
    assert response.status_code == 500
    assert "unable to load model" in json.loads(response.text)["error"]
    assert ollama.processes() == []
