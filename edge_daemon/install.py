"""``edge-llm install-service``: the systemd service of an edge-llm that pip has installed.

The unit and the configuration are the ones that the Debian package brings, shipped with the Python package. It may be
run again at any time: what is there already stays, and a configuration is never written over.
"""

import grp
import os
import pwd
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from edge_daemon.errors import EdgeError

UNIT = "edge-llm.service"
PACKAGE = Path(__file__).parent
DATA = PACKAGE / "data"
"""Only where the package was built: in the source tree the files lie at their own places beside it."""
SHIPPED_UNIT = DATA / UNIT if DATA.is_dir() else PACKAGE.parent / "systemd" / UNIT
SHIPPED_CONFIG = DATA / "config.yaml" if DATA.is_dir() else PACKAGE.parent / "config.yaml"
UNIT_PATH = Path("etc/systemd/system", UNIT)
CONFIG_PATH = Path("etc/edge-llm/config.yaml")
DATA_DIR = Path("var/lib/edge-llm")
COMMAND_PATH = Path("usr/local/bin/edge-llm")
PACKAGED = (Path("usr/lib/systemd/system", UNIT), Path("lib/systemd/system", UNIT))
EXEC_START = "ExecStart=/usr/bin/edge-llm run"
USER = "edge-llm"
USER_NAME = r"[a-z_][a-z0-9_-]{0,31}"

# What a setting of the unit hides from the service.
HIDDEN = {
    "ProtectHome=yes": (Path("/home"), Path("/root"), Path("/run/user")),
    "PrivateTmp=yes": (Path("/tmp"), Path("/var/tmp")),  # noqa: S108  # nothing is written there
}
ELSEWHERE = """\
install it where the service can see it, for example:
  sudo /usr/bin/python3 -m venv /opt/edge-llm
  sudo /opt/edge-llm/bin/pip install .  # in a clone of the repository
  sudo /opt/edge-llm/bin/edge-llm install-service"""


class CannotInstall(EdgeError):
    """The service cannot be set up; the message says why, and what to do."""


@dataclass(frozen=True, slots=True)
class Step:
    """Something that is to be there; ``done`` if it is already."""

    what: str
    done: bool
    act: Callable[[], object]


def install(*, user: str = USER, prefix: Path | None = None, dry_run: bool = False, python: Path | None = None) -> None:
    """Set up the service, telling each step.

    Args:
        user: as whom it runs; created unless there is one of that name.
        prefix: put the files below it and change nothing else, for an image of another machine.
        dry_run: only tell.
        python: the interpreter that is to run it; ours.

    Raises:
        CannotInstall: for want of rights, or because the service would not see the interpreter.
    """
    python = python or Path(sys.executable)
    root = prefix or Path("/")
    if not re.fullmatch(USER_NAME, user) or user == "root":
        raise CannotInstall(f"--user {user}: must be a name of small letters, digits, _ and -, and not root")
    text = unit(python, user, _group(user) if prefix is None else user)
    for path in (python, python.resolve(), PACKAGE):
        _check_visible(path, text)
    if packaged := next((root / path for path in PACKAGED if (root / path).exists()), None):
        raise CannotInstall(f"{packaged}: a package has set up the service already")
    if not dry_run and prefix is None and os.geteuid() != 0:
        raise CannotInstall(f"needs root: sudo {python} -m edge_daemon install-service; --dry-run shows what it does")
    try:
        for step in _steps(root, text, user, python, system=prefix is None):
            _take(step, dry_run=dry_run)
    except (OSError, subprocess.CalledProcessError) as error:
        raise CannotInstall(str(error)) from None
    if dry_run:
        print(f"\nNothing was changed. The unit:\n\n{text}", end="")
    elif prefix is None:
        print("\nStart it, now and with the machine:  sudo systemctl enable --now edge-llm")
        print("After an upgrade:                    sudo systemctl restart edge-llm")
        print("Look whether all is well:            sudo edge-llm doctor")


def unit(python: Path, user: str, group: str) -> str:
    """The unit that is shipped, for this interpreter, user and group, without what only the Debian package brings."""
    text = SHIPPED_UNIT.read_text(encoding="utf-8")
    assert EXEC_START in text, f"{UNIT} does not begin with {EXEC_START}"  # noqa: S101
    # -P: nothing is imported from the working directory.
    text = text.replace(EXEC_START, f"ExecStart={_quoted(python)} -P -m edge_daemon run")
    text = re.sub(r"^Documentation=.*\n", "", text, flags=re.MULTILINE)
    text = re.sub(r"^User=.*$", f"User={user}", text, flags=re.MULTILINE)
    return re.sub(r"^Group=.*$", f"Group={group}", text, flags=re.MULTILINE)


def _group(user: str) -> str:
    """The first group of ``user``; where there is no such user yet, the one that is made with it."""
    try:
        number = pwd.getpwnam(user).pw_gid
    except KeyError:
        return user
    try:
        return grp.getgrgid(number).gr_name
    except KeyError:  # it has no name, which systemd does not mind
        return str(number)


def _quoted(path: Path) -> str:
    """As systemd reads a program's path: % stands for something there, and a space parts two words."""
    text = str(path)
    if not text.isprintable() or set(text) & set("\"'\\"):
        raise CannotInstall(f"{text!r}: systemd starts nothing whose path has quotes or backslashes; {ELSEWHERE}")
    text = text.replace("%", "%%")
    return f'"{text}"' if " " in text else text


def _check_visible(path: Path, text: str) -> None:
    for setting, folders in HIDDEN.items():
        folder = next((folder for folder in folders if path.is_relative_to(folder)), None)
        if folder and setting in text.splitlines():
            raise CannotInstall(f"{path} lies in {folder}, which the service may not see ({setting}); {ELSEWHERE}")


def _steps(root: Path, text: str, user: str, python: Path, *, system: bool) -> Iterator[Step]:
    """In their order; each is looked at when those before it are done."""
    unit_path, config, data_dir = root / UNIT_PATH, root / CONFIG_PATH, root / DATA_DIR
    if system:
        yield Step(f"the user {user}", _exists(user), lambda: _create(user))
    yield Step(f"the folder {data_dir}", data_dir.is_dir(), lambda: _make_folder(data_dir, user if system else None))
    shipped = SHIPPED_CONFIG.read_text(encoding="utf-8")
    yield Step(
        f"the configuration {config}", config.exists(), lambda: _write(config, shipped, 0o640, user if system else None)
    )
    if system and config.exists():  # it may have been another user's
        may_read = _exists(user) and config.stat().st_gid == pwd.getpwnam(user).pw_gid
        yield Step(f"the group of {config}, {_group(user)}", may_read, lambda: shutil.chown(config, group=_group(user)))
    same = unit_path.exists() and unit_path.read_text(encoding="utf-8") == text
    replaced = ", in place of another" if unit_path.exists() and not same else ""
    yield Step(f"the unit {unit_path}{replaced}", same, lambda: _write(unit_path, text, 0o644))
    command, program = root / COMMAND_PATH, python.with_name("edge-llm")
    if program.exists() and program != command:
        there = command.is_symlink() or command.exists() or (system and bool(shutil.which("edge-llm")))
        yield Step(f"the command {command}, a link to {program}", there, lambda: _link(command, program))
    if system:
        yield Step("systemd knows the unit", same, lambda: _run("systemctl", "daemon-reload"))


def _take(step: Step, *, dry_run: bool) -> None:
    if step.done:
        print(f"is there  {step.what}")
    elif dry_run:
        print(f"to do     {step.what}")
    else:
        step.act()
        print(f"done      {step.what}")


def _exists(user: str) -> bool:
    try:
        pwd.getpwnam(user)
    except KeyError:
        return False
    return True


def _create(user: str) -> None:
    options = ("--system", "--user-group", "--home-dir", f"/{DATA_DIR}", "--no-create-home")
    _run("useradd", *options, "--shell", "/usr/sbin/nologin", user)


def _make_folder(path: Path, user: str | None) -> None:
    path.mkdir(parents=True, mode=0o750)
    if user:
        shutil.chown(path, user, pwd.getpwnam(user).pw_gid)


def _write(path: Path, text: str, mode: int, reader: str | None = None) -> None:
    """Put the whole file in place at once; ``reader`` is whose group may read it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.new")
    new.touch(mode=mode)
    new.chmod(mode)
    new.write_text(text, encoding="utf-8")
    if reader:
        shutil.chown(new, group=pwd.getpwnam(reader).pw_gid)
    new.replace(path)


def _link(link: Path, target: Path) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(target)


def _run(*command: str) -> None:
    subprocess.run(command, check=True)
