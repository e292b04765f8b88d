"""What befalls the disk under a whole daemon: full, read-only, slow, damaged; and no descriptors (F5, F7 to F9, F31).

What befalls the store and the log alone is in test_disk.py and test_torn.py.
"""

import os
import random
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from edge_daemon.queue_file import SCHEMA_VERSION
from tests import needs
from tests.daemon import N
from tests.fake_ollama import FakeModel, FakeOllama
from tests.faults.bench import Bench
from tests.faults.oracle import told
from tests.manager import Manager
from tests.waiting import wait_until

pytestmark = pytest.mark.broker

KEY = ("dev", "t")
TASK = f"{N}/task/dev/t"
DELAY_S = 0.5
WATCHDOG_S = 6


def models() -> FakeOllama:
    """One that answers at once, one that says 200 kB in two seconds."""
    return FakeOllama(
        FakeModel("small", size_bytes=10**6),
        FakeModel("long", size_bytes=10**6, token_s=0.1, answer=" ".join(["x" * 10_000] * 20)),
    )


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB, where the daemon will keep its data."""
    mount, place = needs.tool("mount", package="mount"), tmp_path / "data"
    place.mkdir()
    if subprocess.run([mount, "-t", "tmpfs", "-o", "size=2m", "tmpfs", place], check=False).returncode:
        pytest.skip("only root may mount a small disk")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def fill(ballast: Path) -> None:
    """Take all the room that is left."""
    with suppress(OSError), ballast.open("wb", buffering=0) as file:
        while file.write(b"x" * 4096):
            pass


@contextmanager
def injected(pid: int, paths: list[Path], fault: str) -> Iterator[None]:
    """While the block runs, system calls of a process on these paths are made to fail or wait."""
    strace = needs.tool("strace", package="strace")
    log = paths[0].parent / "strace"
    log.touch()
    watched = [word for path in paths for word in ("-P", str(path))]
    calls = fault.split(":", maxsplit=1)[0]
    command = [strace, "-f", "-o", str(log), "-p", str(pid), *watched, "-e", f"trace={calls}", "-e", f"inject={fault}"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as tracer:
        assert tracer.stderr is not None
        assert "attached" in tracer.stderr.readline()
        try:
            yield
        finally:
            tracer.send_signal(signal.SIGINT)
            tracer.communicate(timeout=20)


def refusals(bench: Bench) -> set[str]:
    """The codes of all tasks that were rejected."""
    return {
        it.data["error"]["code"]
        for it in bench.recorder.heard
        if it.data["state"] == "rejected" and it.kind == "result"
    }


def test_a_full_disk(tmp_path: Path, small_disk: Path) -> None:
    """New tasks are refused in words, the one that ran keeps its result, and with room again all goes on (F5)."""
    with models() as fake, Bench(tmp_path, fake=fake) as bench:
        bench.daemon.start()
        bench.recorder.publish(TASK, {"prompt": "x", "model": "long"})
        wait_until(lambda: bench.recorder.has_begun(KEY))
        fill(small_disk / "ballast")
        bench.traffic.send(20, form="topic", meta={"filler": "z" * 3_500})
        wait_until(lambda: "storage_full" in refusals(bench))
        wait_until(lambda: "waiting for room to keep a result" in bench.daemon.log())
        assert bench.recorder.end(KEY) is None
        (small_disk / "ballast").unlink()
        assert bench.verdict() == []
        assert bench.recorder.end(KEY) == "succeeded"
        assert len(fake.asked("/api/chat", model="long")) == 1
        assert told(bench.recorder.events, "storage_full", "storage_ok") == []
        assert bench.daemon.log().count(" starts: node ") == 1


def test_a_task_that_expires_on_a_full_disk(tmp_path: Path, small_disk: Path) -> None:
    """Its end waits for room, and nothing else for it: tasks are refused in words, and a stop is in good order (F5)."""
    with models() as fake, Bench(tmp_path, fake=fake) as bench:
        bench.daemon.start()
        fake.stop()
        bench.recorder.publish(TASK, {"prompt": "x", "ttl_s": 2, "meta": {"filler": "z" * 3_500}})
        wait_until(lambda: KEY in bench.recorder.open())
        expired_at = time.monotonic() + 2
        fill(small_disk / "ballast")
        wait_until(lambda: "no task can be begun" in bench.daemon.log())
        bench.recorder.publish(f"{N}/cancel/dev/t", {})
        bench.traffic.send(5, form="topic", meta={"filler": "z" * 3_500})
        wait_until(lambda: "storage_full" in refusals(bench))
        wait_until(lambda: time.monotonic() > expired_at)
        assert bench.daemon.stop() == 0
        assert bench.recorder.end(KEY) is None
        (small_disk / "ballast").unlink()
        fake.start()
        bench.daemon.start()
        assert bench.verdict() == []
        assert bench.recorder.end(KEY) == "expired"


def test_a_start_on_a_full_disk(tmp_path: Path, small_disk: Path) -> None:
    """Killed while the disk is full, it starts, refuses in words, and keeps what it had accepted (F5)."""
    with models() as fake, Bench(tmp_path, fake=fake) as bench:
        bench.daemon.start()
        bench.recorder.publish(TASK, {"prompt": "x", "model": "long"})
        wait_until(lambda: bench.recorder.has_begun(KEY))
        bench.traffic.send(20, form="topic", model="long", meta={"filler": "z" * 3_500})
        wait_until(lambda: len(bench.recorder.open()) == 21)  # in the log alone: the file would have to grow
        fill(small_disk / "ballast")
        bench.daemon.restart()
        bench.recorder.publish(f"{N}/task/dev/large", {"prompt": "x", "meta": {"filler": "z" * 3_500}})
        wait_until(lambda: refusals(bench) == {"storage_full"})
        assert bench.recorder.end(KEY) is None
        (small_disk / "ballast").unlink()
        fake.models["long:latest"].answer = "short"
        assert bench.verdict() == []
        assert bench.recorder.end(KEY) == "succeeded"


def test_a_disk_that_becomes_read_only(tmp_path: Path, small_disk: Path) -> None:
    """It ends with status 1, which systemd answers with a start, until it can write; then nothing is missing (F8)."""
    with models() as fake, Bench(tmp_path, fake=fake) as bench:
        bench.daemon.start()
        bench.traffic.send(5)
        wait_until(bench.recorder.is_idle)
        paths = [small_disk / name for name in ("queue.db", "queue.db-wal", "llm_metrics.csv")]
        with injected(bench.daemon.pid, paths, "pwrite64,write,ftruncate,fdatasync,fsync:error=EROFS"):
            bench.traffic.send(5)
            assert bench.daemon.wait() == 1
        subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
        bench.daemon.start(ready=False)
        assert bench.daemon.wait() == 1
        assert "Read-only file system" in bench.daemon.log().splitlines()[-1]
        subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
        bench.daemon.start()
        assert bench.verdict() == []


def test_a_log_that_cannot_be_written(tmp_path: Path) -> None:
    """It is told once, tasks go on up to the limit, the refusal names the key, and then no row is missing (F6)."""
    with models() as fake, Bench(tmp_path, fake=fake, queue={"retention_bytes": 1 << 20}) as bench:
        bench.daemon.start()
        bench.probe()
        log = bench.daemon.csv_path
        log.rename(log.with_name("llm_metrics.1.csv"))
        log.mkdir()
        fake.models["long:latest"].token_s = 0.0
        names = {f"t{number}" for number in range(6)}
        bench.traffic.send(len(names), form="topic", model="long")
        wait_until(lambda: {it.data["id"] for it in bench.recorder.heard if it.kind == "result"} >= names)
        bench.recorder.publish(TASK, {"prompt": "x", "model": "small"})
        wait_until(lambda: refusals(bench) == {"storage_full"})
        (refusal,) = [it.data["error"]["message"] for it in bench.recorder.heard if it.key == KEY]
        assert "csv.path cannot be written" in refusal
        assert bench.daemon.log().count("the CSV log (csv.path) cannot be written") == 1
        log.rmdir()
        assert bench.daemon.stop() == 0  # which tries once more, without a pause
        assert "the CSV log can be written again" in bench.daemon.log()
        assert sorted(row["task_id"] for row in bench.daemon.rows("task")) == sorted(names)


def test_a_slow_disk(tmp_path: Path) -> None:
    """With every fsync half a second late, the connection stands, the watchdog is fed, nothing is run twice (F7)."""
    manager = Manager()
    env = {"NOTIFY_SOCKET": manager.address, "WATCHDOG_USEC": str(WATCHDOG_S * 10**6)}
    with models() as fake, Bench(tmp_path, fake=fake, env=env, mqtt={"keepalive_s": 5}) as bench:
        bench.daemon.start()
        data = bench.daemon.data_dir
        paths = [data / name for name in ("queue.db", "queue.db-wal", "llm_metrics.csv")]
        with injected(bench.daemon.pid, paths, f"fdatasync,fsync:delay_enter={int(DELAY_S * 10**6)}"):
            before = manager.times("WATCHDOG=1")
            bench.traffic.send(5, form="topic", model="small")
            bench.settle()
            fed = manager.times("WATCHDOG=1") - before
        assert bench.verdict() == []
        assert len(fake.asked("/api/chat")) == 7
        assert bench.daemon.connections() == 2, "that of the stand-in for an earlier start, and one of the daemon"
        assert fed > 0
    manager.close()


def test_no_file_descriptors(tmp_path: Path) -> None:
    """Without a file to open, tasks wait and the daemon stands; with files again, all of them succeed (F31)."""
    with models() as fake, Bench(tmp_path, fake=fake) as bench:
        bench.daemon.start()
        bench.probe()
        process = psutil.Process(bench.daemon.pid)
        usual = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (3, usual[1]))
        bench.traffic.send(10)
        wait_until(lambda: len(bench.recorder.open()) >= 5)
        wait_until(lambda: "Too many open files); tasks wait until it does" in bench.daemon.log())
        bench.recorder.publish(TASK, {"prompt": "x"})
        wait_until(lambda: KEY in bench.recorder.open())
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, usual)
        assert bench.verdict() == []
        assert bench.daemon.log().count(" starts: node ") == 1


# -- a damaged queue -------------------------------------------------------------------------------------------------


def _zeroed(data: bytes) -> bytes:
    return bytes(len(data))


def _random_pages(data: bytes) -> bytes:
    dice = random.Random(9)  # noqa: S311
    pages = [data[at : at + 4096] for at in range(0, len(data), 4096)]
    return b"".join(page if dice.random() < 0.7 else dice.randbytes(len(page)) for page in pages)


def _wrong_magic(data: bytes) -> bytes:
    return b"SQLite format 9\0" + data[16:]


def _truncated(data: bytes) -> bytes:
    return data[: len(data) // 2 + 100]


@pytest.mark.parametrize("damage", [_zeroed, _random_pages, _wrong_magic, _truncated])
def test_a_damaged_queue(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    """The file is set aside and told of, the daemon starts and serves, and what could be saved ends as ever (F9)."""
    with models() as fake, Bench(tmp_path, fake=fake) as bench:
        bench.daemon.start()
        bench.probe()
        assert bench.daemon.stop() == 0
        path = bench.daemon.data_dir / "queue.db"
        damaged = damage(path.read_bytes())
        path.write_bytes(damaged)
        bench.daemon.start()
        bench.probe()
        assert (path.parent / "queue.db.corrupt-1").read_bytes() == damaged
        assert told(bench.recorder.events, "queue_damaged") == []
        assert bench.daemon.stop() == 0
        assert bench.daemon.integrity() == "ok"


def test_a_damaged_write_ahead_log(tmp_path: Path) -> None:
    """A log that is garbage is set aside; the tasks that stand in the file itself are there (F9)."""
    with models() as fake, Bench(tmp_path, fake=fake) as bench:
        bench.daemon.start()
        bench.probe()
        assert bench.daemon.stop() == 0
        garbage = os.urandom(10_000)
        (bench.daemon.data_dir / "queue.db-wal").write_bytes(garbage)
        bench.daemon.start()
        assert bench.verdict() == []
        assert (bench.daemon.data_dir / "queue.db.corrupt-1-wal").read_bytes() == garbage
        assert told(bench.recorder.events, "queue_damaged") == []


def test_a_queue_of_a_later_version(tmp_path: Path) -> None:
    """A start on it ends with 78 and a word on what to do, and changes no byte (F9, F34)."""
    with models() as fake, Bench(tmp_path, fake=fake) as bench:
        bench.daemon.start()
        bench.probe()
        assert bench.daemon.stop() == 0
        path = bench.daemon.data_dir / "queue.db"
        data = bytearray(path.read_bytes())
        data[60:64] = (SCHEMA_VERSION + 1).to_bytes(4, "big")  # PRAGMA user_version
        path.write_bytes(data)
        bench.daemon.start(ready=False)
        assert bench.daemon.wait() == os.EX_CONFIG
        assert "written by a later version" in bench.daemon.log().splitlines()[-1]
        assert path.read_bytes() == data
        assert [it.name for it in path.parent.glob("queue.db*")] == ["queue.db"]
