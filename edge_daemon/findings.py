"""What ``edge-llm doctor`` finds, and the machine that it looks at."""

import grp
import os
import pwd
import subprocess
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from pathlib import Path

from edge_daemon.clock import Clock
from edge_daemon.config import Config

SERVICE = "edge-llm"
PROPERTIES = (
    *("LoadState", "ActiveState", "SubState", "UnitFileState", "MainPID", "NRestarts", "ExecMainStatus", "User"),
    *("ProtectSystem", "StateDirectory", "LogsDirectory", "ReadWritePaths", "ActiveEnterTimestampMonotonic"),
    *("ProtectHome", "PrivateTmp"),
)


class Level(StrEnum):
    """How bad it is."""

    OK = "ok"
    WARN = "warn"
    """It works, but not for ever, or not for everybody."""
    FAIL = "fail"
    """Tasks are not answered, or not all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fix:
    """What the doctor may do about it itself, once asked."""

    question: str
    act: Callable[[], None]
    """Raises OSError, CalledProcessError or ModelError."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What was seen of one thing. ``remedy`` is a command, or what to change where."""

    level: Level
    subject: str
    text: str
    remedy: str = ""
    fix: Fix | None = None


@dataclass(frozen=True)
class Machine:
    """The machine that is looked at; a test has one of its own below ``root``."""

    config: Config
    config_path: Path | None
    root: Path = Path("/")
    clock: Clock = field(default_factory=Clock)
    try_broker: bool = False
    """Also where that may end the daemon's connection."""

    @property
    def edit(self) -> str:
        """The command that opens the configuration."""
        return f"sudoedit {self.config_path or '/etc/edge-llm/config.yaml'}"

    @cached_property
    def unit(self) -> Mapping[str, str]:
        """What systemd knows of the service, several values joined by spaces; empty without systemd."""
        if not (self.root / "run/systemd/system").is_dir():
            return {}
        told: dict[str, str] = {}
        for line in _systemctl("show", f"--property={','.join(PROPERTIES)}"):
            key, _, value = line.partition("=")
            told[key] = f"{told[key]} {value}" if key in told else value
        return told

    @cached_property
    def credentials(self) -> Mapping[str, Path]:
        """The files that systemd hands to the service, by their names there.

        From the text of the unit and its drop-ins: as a property systemd does not print them.
        """
        found: dict[str, Path] = {}
        for line in _systemctl("cat") if self.unit else ():
            key, _, value = line.strip().partition("=")
            if key.rstrip() != "LoadCredential":
                continue
            name, _, path = value.strip().partition(":")
            if not name:  # an empty one takes back all before it
                found.clear()
            elif path:
                found[name] = Path(path)
        return found

    @cached_property
    def user(self) -> pwd.struct_passwd:
        """As whom the service runs; who runs this command, where there is none."""
        with suppress(KeyError):
            if self.unit.get("LoadState") == "loaded":
                return pwd.getpwnam(self.unit.get("User") or "root")
        return pwd.getpwuid(os.geteuid())

    @property
    def group(self) -> str:
        """Its first group, by name."""
        with suppress(KeyError):
            return grp.getgrgid(self.user.pw_gid).gr_name
        return str(self.user.pw_gid)


def _systemctl(verb: str, *options: str) -> list[str]:
    """The lines that systemd answers, about the service."""
    command = ["systemctl", verb, SERVICE, "--no-pager", *options]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()


def ok(subject: str, text: str, remedy: str = "") -> Finding:
    """All is well; with a ``remedy`` there is something to say all the same."""
    return Finding(level=Level.OK, subject=subject, text=text, remedy=remedy)


def warn(subject: str, text: str, remedy: str, fix: Fix | None = None) -> Finding:
    """It could be better."""
    return Finding(level=Level.WARN, subject=subject, text=text, remedy=remedy, fix=fix)


def fail(subject: str, text: str, remedy: str, fix: Fix | None = None) -> Finding:
    """It cannot work so."""
    return Finding(level=Level.FAIL, subject=subject, text=text, remedy=remedy, fix=fix)


def lines_of(file: Path) -> list[str]:
    """The lines of a text file, whatever bytes are in it. Raises OSError."""
    return file.read_text(encoding="utf-8", errors="replace").splitlines()


def whole(text: str | None) -> int:
    """The number that a text of digits stands for; 0 for any other."""
    return int(text) if text and text.isdecimal() else 0


def megabytes(size_bytes: float) -> str:
    """A size as people read it."""
    return f"{size_bytes / 1e6:,.0f} MB"
