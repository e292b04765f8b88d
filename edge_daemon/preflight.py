"""What would keep a daemon with some configuration from starting, found before it tries."""

import errno
import fcntl
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from edge_daemon.config import Config, http_tokens, mqtt_password
from edge_daemon.errors import AlreadyRunning, ConfigError, PortInUse, StoreError
from edge_daemon.mqtt_connection import check_tls

QUEUE_FILE = "queue.db"
HTTP_PACKAGES = ("flask", "waitress", "prometheus_client")
"""What the extra ``http`` brings, by the names under which it is imported."""
DISK_FAULTS = (errno.EROFS, errno.EIO, errno.ENOSPC)
"""Where they come in a place that served before, no other configuration mends them, but a repair may."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Secrets:
    """What the configuration only points at."""

    password: str | None
    """The broker's."""
    tokens: Mapping[str, str]
    """Of those who may come in over HTTP."""


def secrets(config: Config) -> Secrets:
    """Read the files that ``config`` names. Raises ConfigError when one of them cannot be used."""
    check_tls(config)
    return Secrets(password=mqtt_password(config), tokens=http_tokens(config))


def check(config: Config, *, held: Config) -> Secrets:
    """Look at everything that a start needs. ``held`` is the configuration whose folder and port are ours already.

    Raises:
        ConfigError: a file, a folder or a package cannot be used.
        StoreError: the disk fails.
        AlreadyRunning: another daemon uses ``data_dir``.
        PortInUse: ``http.port`` is taken.
    """
    found = secrets(config)
    check_packages(config)
    if config.data_dir != held.data_dir:
        os.close(lock(config.data_dir))
    _check_writable("data_dir", config.data_dir / QUEUE_FILE)
    _check_writable("csv.path", config.csv_path)
    new, old = config.http, held.http
    if new.enabled and (not old.enabled or (new.host, new.port) != (old.host, old.port)):
        listen(new.host, new.port).close()
    return found


def check_packages(config: Config) -> None:
    """Raise ConfigError when ``config`` asks for HTTP and a package of the extra is missing."""
    if missing := next((name for name in HTTP_PACKAGES if config.http.enabled and find_spec(name) is None), None):
        raise http_needs(missing)


def lock(data_dir: Path) -> int:
    """One daemon per data directory: two would write one queue, and fight for one client id.

    Returns:
        A file descriptor; the lock lasts until it is closed.

    Raises:
        ConfigError: there can be no such directory, or nothing can be written there.
        StoreError: it could be written once, and cannot be now.
        AlreadyRunning: another daemon has it.
    """
    try:
        data_dir.mkdir(mode=0o750, parents=True, exist_ok=True)
        handle = os.open(data_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
    except OSError as error:
        problem = f"data_dir: {error.filename}: {error.strerror}"
        if error.errno in DISK_FAULTS and (data_dir / "lock").exists():
            raise StoreError(problem) from None
        raise ConfigError(f"{problem}; choose another with --data-dir") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise AlreadyRunning(f"{data_dir} is in use by another edge-llm; give this one its own --data-dir") from None
    return handle


def _check_writable(key: str, path: Path) -> None:
    """Raise ConfigError unless the file can be written, or made; StoreError when that is the disk's fault."""
    try:
        if path.is_dir():
            raise ConfigError(f"{key}: {path} is a folder")
        target = path if path.exists() else path.parent
    except OSError as error:  # such as a folder that we may not enter
        kind = StoreError if error.errno in DISK_FAULTS else ConfigError
        raise kind(f"{key}: {path}: {error.strerror}") from None
    if not os.access(target, os.W_OK):
        raise ConfigError(f"{key}: {target} is missing or cannot be written")


def http_needs(name: str | None) -> ConfigError:
    """The error that the package ``name`` of the extra ``http`` is missing, and how to get all of them."""
    debian = " ".join(f"python3-{package.replace('_', '-')}" for package in HTTP_PACKAGES)
    return ConfigError(
        f"http.enabled: {name} is missing. With the Debian package: sudo apt install {debian}. "
        "With pip, in a clone: pip install '.[http]'"
    )


def listen(host: str, port: int) -> socket.socket:
    """The socket on which HTTP is served. Raises PortInUse when another has the port, or the address is not ours."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        raise PortInUse(f"http.port: {host}:{port}: {error.strerror}; choose another with --http-port") from None
