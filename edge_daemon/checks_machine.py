"""What ``edge-llm doctor`` looks at on the machine itself: files, board, service. Nothing is changed by it.

A check gives one finding for each thing that it has looked at, good or not. What cannot be seen, for want of rights or
because the machine has no such thing, is no finding.
"""

import os
import pwd
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from edge_daemon.findings import SERVICE, Finding, Fix, Machine, fail, lines_of, megabytes, ok, warn, whole
from edge_daemon.install import HIDDEN
from edge_daemon.telemetry import HOT_C, Board

READ, WRITE, ENTER = 4, 2, 1
NEEDED_FREE_BYTES = 64_000_000
"""With less on the disk, tasks are soon refused."""
YOUNG_S = 600.0
RESTARTS = 3
UNDER_VOLTAGE = "vcgencmd get_throttled   # use the power supply made for this board, and a short cable"
TOO_HOT = "vcgencmd measure_temp   # give it a heat sink, a fan, or air"


# -- files -----------------------------------------------------------------------------------------------------------


def may(user: pwd.struct_passwd, path: Path, wanted: int) -> bool:
    """Whether ``user`` may do that (READ, WRITE, ENTER) with what is at ``path``, as far as mode bits tell."""
    if user.pw_uid == 0:
        return True
    seen = path.stat()
    groups = os.getgrouplist(user.pw_name, user.pw_gid)
    shift = 6 if seen.st_uid == user.pw_uid else 3 if seen.st_gid in groups else 0
    return (seen.st_mode >> shift) & wanted == wanted


def can_read(user: pwd.struct_passwd, path: Path) -> bool:
    """Whether ``user`` may read the file at ``path``, and get there."""
    return all(may(user, parent, ENTER) for parent in path.parents) and may(user, path, READ)


def closed_config(machine: Machine) -> Finding | None:
    """That the service may not read its configuration, which whoever runs this command may."""
    path, user = machine.config_path, machine.user
    if path is None or can_read(user, path.absolute()):
        return None
    return fail("config", f"{user.pw_name} may not read {path}", _give(machine, path))


def _give(machine: Machine, path: Path) -> str:
    return f"sudo chgrp {machine.group} {path} && sudo chmod 640 {path}"


def check_data_dir(machine: Machine) -> Iterator[Finding]:
    """It is there, the service may write to it and to what is in it, and there is room."""
    path, user = machine.config.data_dir, machine.user
    yield from _sandbox(machine)
    if not path.exists():
        yield fail("data_dir", f"{path} is missing", _create(machine, path), _create_fix(path, user))
        return
    if not path.is_dir():
        yield fail("data_dir", f"{path} is no folder", f"{machine.edit}   # data_dir")
        return
    yield from _ownership(path, user)
    yield _room(machine, path)
    yield ok("disk", _medium(machine, path))


def _create_fix(path: Path, user: pwd.struct_passwd) -> Fix:
    def create() -> None:
        path.mkdir(mode=0o750, parents=True)
        if os.geteuid() == 0:
            os.chown(path, user.pw_uid, user.pw_gid)

    return Fix(question=f"Create {path} for {user.pw_name}?", act=create)


def _ownership(path: Path, user: pwd.struct_passwd) -> Iterator[Finding]:
    own = f"sudo chown -R {user.pw_name}: {path} && sudo chmod 750 {path}"
    closed = next((parent for parent in path.parents if not may(user, parent, ENTER)), None)
    if closed:
        yield fail("data_dir", f"{user.pw_name} may not enter {closed}", f"sudo chmod o+x {closed}")
    elif os.statvfs(path).f_flag & os.ST_RDONLY:
        yield fail("data_dir", f"{path} is on a read-only file system", f"sudo mount -o remount,rw {_mount(path)}")
    elif not may(user, path, READ | WRITE | ENTER):
        yield fail("data_dir", f"{user.pw_name} may not write to {path}", own)
    elif locked := [file.name for file in path.iterdir() if file.is_file() and not may(user, file, READ | WRITE)]:
        yield fail("data_dir", f"{user.pw_name} may not write to {', '.join(sorted(locked)[:5])} in {path}", own)
    else:
        yield ok("data_dir", f"{user.pw_name} may write to {path}")


def _mount(path: Path) -> Path:
    return next(place for place in (path, *path.parents) if place.is_mount())


def _sandbox(machine: Machine) -> Iterator[Finding]:
    """The unit hides some folders, and makes all others read-only but those that it names."""
    told = machine.unit
    outside: dict[str, Path] = {}
    for key, path in (("data_dir", machine.config.data_dir), ("csv.path", machine.config.csv_path.parent)):
        if hidden := _hidden(told, path):
            text = f"the service cannot see {path}: the unit hides {hidden}"
            yield fail(key, text, f"{machine.edit}   # {key}: choose another place")
        elif not any(path.is_relative_to(place) for place in _own_folders(told)):
            outside[key] = path
    named = [Path(name.lstrip("-+")) for name in told.get("ReadWritePaths", "").split()]
    closed = {key: path for key, path in outside.items() if not any(path.is_relative_to(place) for place in named)}
    if closed and told.get("ProtectSystem") == "strict":
        text = f"the unit does not let the service write to {', '.join(dict.fromkeys(map(str, closed.values())))}"
        yield fail(", ".join(closed), text, _open(machine, list(dict.fromkeys(outside.values()))))


def _hidden(told: Mapping[str, str], path: Path) -> str | None:
    """The folder above ``path`` that the unit hides, with the setting that does it."""
    for setting, folders in HIDDEN.items():
        name, _, value = setting.partition("=")
        folder = next((folder for folder in folders if path.is_relative_to(folder)), None)
        if folder and told.get(name) == value:
            return f"{folder} ({setting})"
    return None


def _own_folders(told: Mapping[str, str]) -> list[Path]:
    """Those that systemd makes for the service."""
    state = [Path("/var/lib", name) for name in told.get("StateDirectory", "").split()]
    return [*state, *(Path("/var/log", name) for name in told.get("LogsDirectory", "").split())]


def _open(machine: Machine, paths: Sequence[Path]) -> str:
    """The command that opens all ``paths`` to the service: in one drop-in, since a second would replace the first.

    They must be there: the service would not start for want of one.
    """
    make = [_create(machine, path) for path in paths if not path.exists()]
    drop_in = f"/etc/systemd/system/{SERVICE}.service.d/paths.conf"
    lines = rf"printf '[Service]\nReadWritePaths={' '.join(map(str, paths))}\n'"
    write = f"{lines} | sudo install -D -m 644 /dev/stdin {drop_in}"
    return " && ".join((*make, write, f"sudo systemctl daemon-reload && sudo systemctl restart {SERVICE}"))


def _create(machine: Machine, path: Path) -> str:
    return f"sudo install -d -m 750 -o {machine.user.pw_name} -g {machine.group} {path}"


def _room(machine: Machine, path: Path) -> Finding:
    queue, log = machine.config.queue, machine.config.csv
    free = shutil.disk_usage(path).free
    used = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
    limit = queue.max_bytes + queue.retention_bytes + log.rotate_bytes * (log.keep + 1)
    text = f"{megabytes(free)} free; the queue and the log may grow by {megabytes(max(0, limit - used))}"
    if free < NEEDED_FREE_BYTES:
        return fail("disk", text, f"df -h {path}; sudo journalctl --vacuum-size=100M; sudo apt-get clean")
    if free < limit - used:
        return warn("disk", text, f"{machine.edit}   # lower queue.retention_bytes, queue.max_bytes or csv.keep")
    return ok("disk", text)


def _medium(machine: Machine, path: Path) -> str:
    """What kind of disk it is, as the kernel tells."""
    number = path.stat().st_dev
    device = (machine.root / f"sys/dev/block/{os.major(number)}:{os.minor(number)}").resolve()
    disk = device if (device / "queue").exists() else device.parent  # of a partition, the disk
    with suppress(OSError):
        if disk.name.startswith("mmcblk"):
            return f"{disk.name}, an SD card: about 40 MB/s, and every accepted task is a write"
        kind = "a hard disk" if (disk / "queue/rotational").read_text(encoding="ascii").strip() == "1" else "an SSD"
        return f"{disk.name}, {kind}"
    return "of a kind that the kernel does not tell"


def check_files(machine: Machine) -> Iterator[Finding]:
    """What is secret is the daemon's alone, what is named is there, and the log can be read."""
    config = machine.config
    yield from _secret(machine, "mqtt.password_file", config.mqtt.password_file)
    if config.mqtt.tls.enabled:
        yield from _secret(machine, "mqtt.tls.key_file", config.mqtt.tls.key_file)
    if config.http.enabled:
        yield from _secret(machine, "http.tokens_file", config.http.tokens_file)
    log = config.csv_path
    if os.access(log.parent, os.X_OK) and log.exists() and not os.access(log, os.R_OK):
        yield warn("log", f"you may not read {log}", f"sudo adduser $USER {SERVICE}   # then log in again")


def _secret(machine: Machine, key: str, path: Path | None) -> Iterator[Finding]:
    user = machine.user
    if path is None:
        return
    if not path.exists():
        yield fail(
            key, f"{path} is missing", f"sudo install -m 640 -g {machine.group} /dev/stdin {path}   # and type it"
        )
    elif path.stat().st_mode & (stat.S_IROTH | stat.S_IWOTH):
        yield warn(key, f"every user can read {path}", _give(machine, path))
    elif not can_read(user, path):
        yield fail(key, f"{user.pw_name} may not read {path}", _give(machine, path))
    else:
        yield ok(key, f"{user.pw_name} alone may read {path}")


# -- the board -------------------------------------------------------------------------------------------------------


def check_board(machine: Machine) -> Iterator[Finding]:
    """The clock is right, the board neither too hot nor short of power."""
    if machine.clock.synced():
        yield ok("clock", "it was set from outside")
    else:
        yield warn("clock", "nobody has set it since the start: times may be wrong", "sudo timedatectl set-ntp true")
    board = Board(machine.root / "sys")
    throttling = board.throttling() or {"now": [], "since_boot": []}
    for when, words in (("now", "now"), ("since_boot", "since the start of the machine")):
        if flags := throttling[when]:
            remedy = UNDER_VOLTAGE if "under_voltage" in flags else TOO_HOT
            yield warn("board", f"{', '.join(flags).replace('_', ' ')} {words}: it was slower than it can be", remedy)
            break
    temperature_c = board.temperature_c()
    if temperature_c is not None and temperature_c >= HOT_C:
        yield warn("board", f"{temperature_c:.0f} C: a Pi slows down at {HOT_C:.0f}", TOO_HOT)
    elif temperature_c is not None:
        yield ok("board", f"{temperature_c:.0f} C")


# -- the service -----------------------------------------------------------------------------------------------------


def check_service(machine: Machine) -> Iterator[Finding]:
    """It is installed, starts with the machine, and runs without falling over."""
    told = machine.unit
    if not told:
        return
    if told.get("LoadState") != "loaded":
        yield warn("service", f"systemd does not know {SERVICE}", f"sudo {_ourselves()} install-service")
        return
    if told.get("UnitFileState") not in ("enabled", "enabled-runtime"):
        yield warn("service", "it does not start with the machine", f"sudo systemctl enable {SERVICE}", _start_fix())
    yield _activity(machine)


def _ourselves() -> str:
    """This very command, as another user would start it."""
    program = Path(sys.executable).with_name("edge-llm")
    return str(program) if program.exists() else f"{sys.executable} -m edge_daemon"


def _activity(machine: Machine) -> Finding:
    told = machine.unit
    logs = f"journalctl -u {SERVICE} -p warning -n 50"
    restarts, state, status = whole(told.get("NRestarts")), told.get("ActiveState"), told.get("ExecMainStatus")
    holder = _holder(machine)
    if holder and holder != whole(told.get("MainPID")):  # the service then starts again and again, in vain
        text = f"it is {state}; process {holder}, started by hand, uses {machine.config.data_dir}"
        return fail("service", text, f"sudo kill {holder} && sudo systemctl restart {SERVICE}")
    tries_again = told.get("SubState") == "auto-restart" or (state == "activating" and restarts)
    if tries_again or (restarts >= RESTARTS and _active_s(told) < YOUNG_S):
        return fail("service", f"it starts again and again: {restarts} times, last with status {status}", logs)
    if state in ("active", "activating", "reloading"):
        return ok("service", f"it is {state}; restarts: {restarts}")
    if state == "failed":
        return fail("service", f"it has ended with status {status}", f"{logs}; sudo systemctl restart {SERVICE}")
    return fail("service", f"it is {state}", f"sudo systemctl start {SERVICE}", _start_fix())


def _holder(machine: Machine) -> int | None:
    """The process that holds the lock of the data directory."""
    with suppress(OSError):
        lock = (machine.config.data_dir / "lock").stat()
        inode = f"{os.major(lock.st_dev):02x}:{os.minor(lock.st_dev):02x}:{lock.st_ino}"
        for line in lines_of(machine.root / "proc/locks"):
            _, kind, _, _, pid, where, *_ = line.split()
            if (kind, where) == ("FLOCK", inode):
                return int(pid)
    return None


def _start_fix() -> Fix:
    command = ["systemctl", "enable", "--now", SERVICE]
    return Fix(question=f"Enable and start {SERVICE}?", act=lambda: _run(command))


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True)


def _active_s(told: Mapping[str, str]) -> float:
    return time.clock_gettime(time.CLOCK_MONOTONIC) - whole(told.get("ActiveEnterTimestampMonotonic")) / 1e6
