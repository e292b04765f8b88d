"""``edge-llm doctor``: what is wrong with this machine, and the command that mends it; silent where all is well."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from edge_daemon.checks_broker import check_broker
from edge_daemon.checks_machine import check_board, check_data_dir, check_files, check_service, closed_config
from edge_daemon.checks_ollama import check_ollama
from edge_daemon.config import load
from edge_daemon.errors import ConfigError, ModelError
from edge_daemon.findings import Finding, Fix, Level, Machine, fail, ok, warn
from edge_daemon.preflight import check_packages
from edge_daemon.systemd import printable

CHECKS = (check_data_dir, check_files, check_broker, check_ollama, check_board, check_service)
"""In the order of the way of a task."""


def run(
    path: Path | None,
    *,
    fix: bool = False,
    assume_yes: bool = False,
    verbose: bool = False,
    as_json: bool = False,
    broker: bool = False,
    root: Path = Path("/"),
) -> int:
    """Examine, print, and with ``fix`` mend what is safe to mend. Returns 0 when nothing is wrong, else 1.

    Args:
        path: the configuration; None is for the defaults.
        fix: ask about each thing that can be mended from here, and mend it.
        assume_yes: mend without asking.
        verbose: tell of what is well, too.
        as_json: print all findings as one line of JSON.
        broker: connect to the broker also where that may end the daemon's connection.
        root: where ``/etc``, ``/proc``, ``/run`` and ``/sys`` are.
    """
    logging.getLogger("edge_daemon").addHandler(logging.NullHandler())  # what is wrong is told here, once
    look = partial(examine, path, root, try_broker=broker)
    findings = _told(look(), verbose=verbose, as_json=as_json)
    mended = [_mend(finding.fix, assume_yes=assume_yes) for finding in findings if fix and finding.fix]
    if any(mended):
        print("Looking again:")
        findings = _told(look(), verbose=verbose, as_json=as_json)
    return 0 if all(finding.level is Level.OK for finding in findings) else 1


def examine(path: Path | None, root: Path, *, try_broker: bool = False) -> Iterator[Finding]:
    """All findings, of one check after the other."""
    try:
        machine = Machine(load(path), path, root, try_broker=try_broker)
    except ConfigError as error:
        unreadable = path is not None and path.exists() and not os.access(path, os.R_OK)
        yield fail(
            "config", str(error).removeprefix("config: "), "sudo edge-llm doctor" if unreadable else f"sudoedit {path}"
        )
        return
    yield _packages(machine) or closed_config(machine) or ok("config", f"{path or 'none: the defaults'}")
    for check in CHECKS:
        try:
            yield from check(machine)
        except PermissionError as error:
            yield warn("rights", f"{error.filename}: only root may look there", "sudo edge-llm doctor")


def _packages(machine: Machine) -> Finding | None:
    try:
        check_packages(machine.config)
    except ConfigError as error:
        text, _, remedy = str(error).partition(". ")
        return fail("config", text, remedy)
    return None


def _told(examined: Iterator[Finding], *, verbose: bool, as_json: bool) -> list[Finding]:
    findings = []
    for finding in examined:
        findings.append(finding)
        if not as_json and (verbose or finding.remedy):
            print("\n".join(_lines(finding)), flush=True)
    print(json.dumps([_plain(finding) for finding in findings]) if as_json else _summary(findings))
    return findings


def _lines(finding: Finding) -> Iterator[str]:
    yield printable(f"{finding.level:<5}{finding.subject}: {finding.text}")
    if finding.remedy:
        yield printable(f"       {finding.remedy}")


def _plain(finding: Finding) -> dict[str, str]:
    return {"level": finding.level, "subject": finding.subject, "text": finding.text, "remedy": finding.remedy}


def _summary(findings: Sequence[Finding]) -> str:
    count = {level: sum(finding.level is level for finding in findings) for level in Level}
    looked = f"{len(findings)} thing{'s' if len(findings) > 1 else ''} looked at"
    if count[Level.OK] == len(findings):
        return f"{looked}, nothing wrong."
    return f"{looked}: {count[Level.FAIL]} wrong, {count[Level.WARN]} that could be better."


def _mend(fix: Fix, *, assume_yes: bool) -> bool:
    """Whether something was changed."""
    if not assume_yes:
        try:
            answer = input(f"{fix.question} [y/N] ")
        except EOFError:  # nobody to ask
            return False
        if answer.strip().lower() not in ("y", "yes"):
            return False
    try:
        fix.act()
    except (OSError, subprocess.CalledProcessError, ModelError) as error:
        print(f"edge-llm: {printable(str(error))}", file=sys.stderr)
        return False
    return True
