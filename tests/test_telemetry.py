"""What the board is doing: the arithmetic on given counters, an imitated /sys, and real processes that work."""

import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from edge_daemon.logger import COLUMNS
from edge_daemon.telemetry import (
    Board,
    Consumption,
    OllamaState,
    Runners,
    Sampler,
    TaskMeter,
    TaskUsage,
    attempt,
    is_ollama_runner,
    memory_available,
    memory_total,
)

CPU_TIMES: Any = type(psutil.cpu_times())
STAMP: dict[str, Any] = {"ts": "2026-01-31T12:00:00.000Z", "boot": "boot-1", "clock_synced": True}
OLLAMA = OllamaState(reachable=True, version="0.12.1", resident_models=("m",), resident_bytes=400)
FIXED_WORK = 3_000_000


def write(root: Path, name: str, text: str) -> None:
    """A file of an imitated /sys."""
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def work() -> int:
    """The same amount of computing every time."""
    return sum(n * n for n in range(FIXED_WORK))


def no_runner(_command: Sequence[str]) -> bool:
    """No process is a runner."""
    return False


def times(**seconds: float) -> Any:
    """Counters of a processor, as psutil gives them."""
    return CPU_TIMES(**{name: seconds.get(name, 0.0) for name in CPU_TIMES._fields})


def counters(monkeypatch: pytest.MonkeyPatch, *readings: Any) -> None:
    """Let psutil read these counters, one after the other."""
    queue = list(readings)
    monkeypatch.setattr(psutil, "cpu_times", lambda percpu=False: queue.pop(0))


@pytest.fixture
def board(tmp_path: Path) -> Board:
    """A board whose /sys is empty."""
    return Board(tmp_path / "sys")


# -- the sensors


def test_hottest_zone_counts(tmp_path: Path) -> None:
    """The temperature is that of the hottest readable zone, in degrees."""
    write(tmp_path, "class/thermal/thermal_zone0/temp", "48312\n")
    write(tmp_path, "class/thermal/thermal_zone1/temp", "51540\n")
    write(tmp_path, "class/thermal/thermal_zone2/temp", "broken\n")
    assert Board(tmp_path).temperature_c() == 51.54


def test_frost_is_a_temperature(tmp_path: Path) -> None:
    """Zero degrees and less are readings like any other."""
    write(tmp_path, "class/thermal/thermal_zone0/temp", "0\n")
    assert Board(tmp_path).temperature_c() == 0.0
    write(tmp_path, "class/thermal/thermal_zone0/temp", "-5000\n")
    assert Board(tmp_path).temperature_c() == -5.0


@pytest.mark.parametrize(
    ("word", "now", "since_boot"),
    [
        ("0", [], []),
        ("50005", ["under_voltage", "throttled"], ["under_voltage", "throttled"]),
        ("0xa0002", ["frequency_capped"], ["frequency_capped", "soft_temperature_limit"]),
        ("8", ["soft_temperature_limit"], []),
    ],
)
def test_throttling_is_decoded(tmp_path: Path, word: str, now: list[str], since_boot: list[str]) -> None:
    """The firmware's word has four flags for now and the same four for since boot."""
    write(tmp_path, "devices/platform/soc/soc:firmware/get_throttled", word + "\n")
    assert Board(tmp_path).throttling() == {"now": now, "since_boot": since_boot}


def test_ollama_service_is_read_from_its_cgroup(tmp_path: Path) -> None:
    """CPU time and memory of the whole service; memory is missing where the kernel does not account it."""
    group = "fs/cgroup/system.slice/ollama.service"
    write(tmp_path, f"{group}/cpu.stat", "usage_usec 7500000\nuser_usec 7000000\nsystem_usec 500000\n")
    assert Board(tmp_path).ollama_service() == Consumption(7.5, None)
    write(tmp_path, f"{group}/memory.current", "4096\n")
    assert Board(tmp_path).ollama_service() == Consumption(7.5, 4096)


def test_missing_sensors_read_as_none(board: Board) -> None:
    """A board without these sensors is no error."""
    assert (board.temperature_c(), board.throttling(), board.ollama_service()) == (None, None, None)


def test_broken_sensors_read_as_none(tmp_path: Path) -> None:
    """Nor is one whose sensors give nonsense."""
    write(tmp_path, "class/thermal/thermal_zone0/temp", "")
    write(tmp_path, "devices/platform/soc/soc:firmware/get_throttled", "what?")
    write(tmp_path, "fs/cgroup/system.slice/ollama.service/cpu.stat", "usage_usec")
    board = Board(tmp_path)
    assert (board.temperature_c(), board.throttling(), board.ollama_service()) == (None, None, None)


def test_memory_is_in_bytes() -> None:
    """Both figures agree with the kernel's own, which are in kB."""
    kernel = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    total = int(kernel["MemTotal"].split()[0]) * 1024
    assert memory_total() == total
    assert 0 < memory_available() < total


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (["/usr/local/bin/ollama", "runner", "--model", "/blobs/sha256-1"], True),
        (["/usr/lib/ollama/llama-server", "--port", "4"], True),
        (["/opt/x/ollama_llama_server"], True),
        (["/usr/local/bin/ollama", "serve"], False),
        (["/usr/local/bin/ollama"], False),
        (["vi", "llama-server"], False),
        ([], False),
    ],
)
def test_runners_are_known_by_their_command(command: list[str], expected: bool) -> None:  # noqa: FBT001
    """Every kind of runner that Ollama has had, and nothing else."""
    assert is_ollama_runner(command) is expected


# -- a task


class Worker:
    """A process that does the fixed work each time it is told to."""

    CODE = (
        "import sys\nfor line in sys.stdin:\n    sum(n * n for n in range(int(line)))\n    print('done', flush=True)\n"
    )

    def __init__(self, mark: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", self.CODE, mark], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.work(1)

    def work(self, amount: int) -> None:
        """Do it, and return when it is done."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(amount, file=self.process.stdin, flush=True)
        assert self.process.stdout.readline() == "done\n"

    def end(self) -> None:
        """End it and wait for its end."""
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def new_worker() -> Iterator[Callable[[str], Worker]]:
    """Start processes that pose as runners."""
    workers: list[Worker] = []

    def new(mark: str) -> Worker:
        workers.append(Worker(mark))
        return workers[-1]

    yield new
    for worker in workers:
        worker.end()


def marked(mark: str) -> Callable[[Sequence[str]], bool]:
    """Whether the last argument of a command is `mark`."""
    return lambda command: [*command][-1:] == [mark]


def test_busy_share_of_the_task(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    """The share is that of the time between start and finish, whatever was before."""
    counters(monkeypatch, times(user=900.0, idle=100.0), times(user=903.0, idle=101.0))
    assert TaskMeter(board, Runners(board, no_runner)).finish().cpu_usage_percent == 75.0


def test_waiting_for_the_disk_is_idle(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    """Time in which the processor waits for the card is not work, and a guest's time is not counted twice."""
    counters(monkeypatch, times(), times(user=2.0, guest=2.0, system=1.0, iowait=3.0, idle=4.0))
    assert TaskMeter(board, Runners(board, no_runner)).finish().cpu_usage_percent == 30.0


def test_no_time_passed_is_not_known(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within one tick of the kernel nothing can be said; counters that run backwards say nothing either."""
    counters(monkeypatch, times(user=5.0), times(user=5.0), times(user=5.0), times(user=4.0))
    runners = Runners(board, no_runner)
    assert TaskMeter(board, runners).finish().cpu_usage_percent is None
    assert TaskMeter(board, runners).finish().cpu_usage_percent is None


def test_real_work_is_seen(board: Board) -> None:
    """What this process computes between start and finish is at least its part of the measured share."""
    meter, began, own_began = TaskMeter(board, Runners(board, no_runner)), time.monotonic(), time.process_time()
    work()
    usage = meter.finish()
    own_share = (time.process_time() - own_began) / (time.monotonic() - began) / (os.cpu_count() or 1)
    assert usage.cpu_usage_percent is not None
    assert usage.cpu_usage_percent > 80 * own_share
    assert usage.memory_usage_percent is not None
    assert usage.memory_available_bytes == pytest.approx(memory_available(), rel=0.5)


def test_the_runner_that_worked_is_measured(board: Board, new_worker: Callable[[str], Worker], tmp_path: Path) -> None:
    """Of several runners it is the one that worked during the task, and only what it worked during the task."""
    mark = str(tmp_path)
    busy, other = new_worker(mark), new_worker(mark)
    other.work(3 * FIXED_WORK)
    runners = Runners(board, marked(mark))
    meter = TaskMeter(board, runners)
    busy.work(FIXED_WORK)
    usage = meter.finish()
    assert usage.runner_cpu_seconds is not None
    assert 0.02 < usage.runner_cpu_seconds < psutil.Process(other.process.pid).cpu_times().user
    assert usage.runner_rss_bytes == psutil.Process(busy.process.pid).memory_info().rss
    idle = TaskMeter(board, runners).finish()
    assert idle.runner_cpu_seconds == 0.0


def test_runners_are_looked_for_when_told(
    board: Board, new_worker: Callable[[str], Worker], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measuring a task never searches the processes; a runner that ended is left out at once."""
    mark = str(tmp_path)
    runners = Runners(board, marked(mark))
    worker = new_worker(mark)
    assert runners.consumption() == {}
    runners.find()
    assert [*runners.consumption()] == [worker.process.pid]
    monkeypatch.setattr(psutil, "process_iter", lambda _attributes: pytest.fail("searched"))
    TaskMeter(board, runners).finish()
    worker.end()
    assert runners.consumption() == {}


def test_hidden_runner_is_measured_by_its_service(tmp_path: Path) -> None:
    """Where processes of others are hidden, the cgroup of Ollama's service tells what the task has used."""
    group = "fs/cgroup/system.slice/ollama.service"
    write(tmp_path, f"{group}/cpu.stat", "usage_usec 7500000\n")
    board = Board(tmp_path)
    meter = TaskMeter(board, Runners(board, no_runner))
    write(tmp_path, f"{group}/cpu.stat", "usage_usec 9750000\n")
    write(tmp_path, f"{group}/memory.current", "4096\n")
    usage = meter.finish()
    assert (usage.runner_cpu_seconds, usage.runner_rss_bytes) == (2.25, 4096)


def test_visible_runner_is_measured_by_itself(tmp_path: Path, new_worker: Callable[[str], Worker]) -> None:
    """The service as a whole is only asked when no runner can be seen."""
    write(tmp_path, "fs/cgroup/system.slice/ollama.service/cpu.stat", "usage_usec 7500000\n")
    worker = new_worker(str(tmp_path))
    assert [*Runners(Board(tmp_path), marked(str(tmp_path))).consumption()] == [worker.process.pid]


def test_usage_is_columns_of_the_log() -> None:
    """The log takes the fields of a usage as they are."""
    assert set(TaskUsage.__dataclass_fields__) <= set(COLUMNS)


# -- a sample


def test_sample_is_plain_json(board: Board, tmp_path: Path) -> None:
    """A sample has all its sections, with what the caller knows in its place, and counts itself."""
    sampler = Sampler(data_dir=tmp_path, board=board)
    sampler.sample(OLLAMA, **STAMP, queue_depth=0, outbox=0)
    sample = json.loads(json.dumps(sampler.sample(OLLAMA, **STAMP, queue_depth=3, outbox=2), allow_nan=False))
    assert sample["seq"] == 2
    assert {name: sample[name] for name in STAMP} == STAMP
    assert sample["memory"]["total_bytes"] == memory_total()
    assert sample["disk"]["total_bytes"] > sample["disk"]["free_bytes"] > 0
    assert len(sample["load"]) == 3
    assert sample["network"].keys() == {"received_bytes", "sent_bytes"}
    assert sample["ollama"]["resident_models"] == ["m"]
    assert (sample["daemon"]["queue_depth"], sample["daemon"]["outbox"]) == (3, 2)
    assert sample["daemon"]["context_switches"] > 0
    assert sample["daemon"]["fds"] == pytest.approx(sum(1 for _ in Path("/proc/self/fd").iterdir()), abs=3)
    assert sample["daemon"]["rss_bytes"] > 1_000_000


def test_sample_shares_are_since_the_one_before(board: Board, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Per core and in total; the first sample counts from the start of the sampler."""
    counters(
        monkeypatch,
        [times(user=1.0, idle=9.0), times(idle=10.0)],
        [times(user=2.0, idle=9.0), times(idle=11.0)],
        [times(user=2.0, idle=10.0), times(user=0.2, idle=11.8)],
    )
    sampler = Sampler(data_dir=tmp_path, board=board)
    first = sampler.sample(OLLAMA, **STAMP, queue_depth=0, outbox=0)
    second = sampler.sample(OLLAMA, **STAMP, queue_depth=0, outbox=0)
    assert first["cpu"] == {"percent": 50.0, "per_core": [100.0, 0.0]}
    assert second["cpu"] == {"percent": 10.0, "per_core": [0.0, 20.0]}


def test_network_leaves_the_loopback_out(board: Board, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The broker and Ollama may talk over the loopback; that is no traffic."""
    cards = {
        "lo": SimpleNamespace(bytes_recv=1 << 40, bytes_sent=1 << 40),
        "eth0": SimpleNamespace(bytes_recv=10, bytes_sent=20),
        "wlan0": SimpleNamespace(bytes_recv=1, bytes_sent=2),
    }
    monkeypatch.setattr(psutil, "net_io_counters", lambda pernic: cards)
    sample = Sampler(data_dir=tmp_path, board=board).sample(OLLAMA, **STAMP, queue_depth=0, outbox=0)
    assert sample["network"] == {"received_bytes": 11, "sent_bytes": 22}


@pytest.mark.parametrize("error", [OSError("gone"), psutil.AccessDenied(1), KeyError("x"), RuntimeError("odd")])
def test_every_sensor_may_fail(board: Board, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """With nothing to be read there is still a sample and a usage, and each section says that it is not known."""
    sampler = Sampler(data_dir=tmp_path, board=board)
    runners = Runners(board, no_runner)

    def fail(*_args: object, **_options: object) -> None:
        raise error

    names = ["cpu_times", "virtual_memory", "swap_memory", "getloadavg", "disk_usage", "net_io_counters"]
    for name in [*names, "process_iter"]:
        monkeypatch.setattr(psutil, name, fail)
    monkeypatch.setattr(psutil.Process, "memory_info", fail)
    runners.find()
    sample = sampler.sample(OLLAMA, **STAMP, queue_depth=1, outbox=0)
    sections = ["cpu", "memory", "load", "temperature_c", "throttling", "disk", "network"]
    assert [sample[name] for name in sections] == [None] * 7
    assert sample["daemon"] == {"queue_depth": 1, "outbox": 0}
    unknown = TaskUsage(cpu_usage_percent=None, memory_usage_percent=None, system_load_avg=None)
    assert TaskMeter(board, runners).finish() == unknown


def test_sampling_never_waits(board: Board, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No sample and no measuring sleeps, which is how psutil measures shares when it is asked to."""
    monkeypatch.setattr(time, "sleep", lambda _seconds: pytest.fail("slept"))
    Sampler(data_dir=tmp_path, board=board).sample(OLLAMA, **STAMP, queue_depth=0, outbox=0)
    TaskMeter(board, Runners(board)).finish()


def test_attempt_lets_the_process_end() -> None:
    """Only errors become None: an interrupt from the keyboard is not the sensor's."""

    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attempt(interrupted)


def test_memory_that_nobody_can_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    """While no file can be opened, no memory is taken for free: nothing is loaded, and no thread ends by it."""

    def no_file() -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(psutil, "virtual_memory", no_file)
    assert memory_available() == 0
