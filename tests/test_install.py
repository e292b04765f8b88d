"""The command `edge-llm install-service`: the shipped unit for this very installation, told step by step."""

import grp
import os
import pwd
import subprocess
import sys
from pathlib import Path

import pytest

from edge_daemon import cli, install
from edge_daemon.config import load
from tests.needs import tool

PROJECT = Path(__file__).parent.parent
ME = pwd.getpwuid(os.geteuid()).pw_name
PYTHON = Path("/opt/edge-llm/bin/python")
"""Need not exist: it is only written down."""


@pytest.fixture(autouse=True)
def data(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test may lie anywhere, also where a service would not see it."""
    monkeypatch.setattr(install, "HIDDEN", {"ProtectHome=yes": (Path("/home"),)})
    if PROJECT.is_relative_to("/home"):
        monkeypatch.setattr(install, "PACKAGE", Path(os.path.relpath(install.PACKAGE, Path.cwd())))


def installed(root: Path, python: Path = PYTHON, user: str = ME) -> None:
    """Write the files below a folder."""
    install.install(python=python, prefix=root, user=user if user != "root" else "edge-llm")


def test_what_is_shipped_is_what_the_project_has() -> None:
    """There is one unit and one configuration; the tree has no second copy that could drift."""
    assert install.SHIPPED_UNIT == PROJECT / "systemd" / install.UNIT
    assert install.SHIPPED_CONFIG == PROJECT / "config.yaml"


def test_a_wheel_has_both(tmp_path: Path) -> None:
    """Without the tree, installed by pip: the same unit and configuration."""
    wheels, site = tmp_path / "wheels", tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run(
        [*pip, "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", str(wheels), str(PROJECT)], check=True
    )
    (wheel,) = wheels.iterdir()
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], check=True)
    asked = "from edge_daemon import install; print(install.SHIPPED_UNIT, install.SHIPPED_CONFIG, sep='\\n')"
    said = subprocess.run(
        [sys.executable, "-P", "-c", asked], env={"PYTHONPATH": str(site)}, capture_output=True, text=True, check=True
    )
    unit, config = map(Path, said.stdout.split())
    assert unit.is_relative_to(site)
    assert unit.read_bytes() == (PROJECT / "systemd" / install.UNIT).read_bytes()
    assert config.read_bytes() == (PROJECT / "config.yaml").read_bytes()


def test_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Unit, configuration and folder, each with its mode; the configuration is a good one."""
    installed(tmp_path)
    assert (tmp_path / "var/lib/edge-llm").stat().st_mode & 0o777 == 0o750
    config = tmp_path / "etc/edge-llm/config.yaml"
    assert config.stat().st_mode & 0o777 == 0o640
    load(config)
    unit = tmp_path / "etc/systemd/system/edge-llm.service"
    assert unit.stat().st_mode & 0o777 == 0o644
    lines = unit.read_text(encoding="utf-8").splitlines()
    assert f"ExecStart={PYTHON} -P -m edge_daemon run --config /etc/edge-llm/config.yaml" in lines
    assert capsys.readouterr().out.count("done   ") == 3


def test_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A second time changes nothing, and never a configuration."""
    installed(tmp_path)
    config = tmp_path / "etc/edge-llm/config.yaml"
    config.write_text("node: mine\n", encoding="utf-8")
    capsys.readouterr()
    installed(tmp_path)
    assert config.read_text(encoding="utf-8") == "node: mine\n"
    assert "done" not in capsys.readouterr().out


def test_an_upgrade(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A unit of another version or interpreter is replaced."""
    installed(tmp_path, Path("/opt/old/bin/python"))
    capsys.readouterr()
    installed(tmp_path)
    unit = tmp_path / "etc/systemd/system/edge-llm.service"
    assert str(PYTHON) in unit.read_text(encoding="utf-8")
    assert "/opt/old" not in unit.read_text(encoding="utf-8")
    out = capsys.readouterr().out
    assert out.count("done   ") == 1
    assert "in place of another" in out


def test_the_command_is_linked(tmp_path: Path) -> None:
    """Where pip has made a program, it can be called by its name."""
    program = tmp_path / "venv/bin/edge-llm"
    program.parent.mkdir(parents=True)
    program.touch()
    installed(tmp_path / "root", program.with_name("python"))
    assert (tmp_path / "root/usr/local/bin/edge-llm").readlink() == program


def test_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It tells all and does nothing, without rights too."""
    install.install(python=PYTHON, prefix=tmp_path, dry_run=True)
    out = capsys.readouterr().out
    assert f"to do     the unit {tmp_path}/etc/systemd/system/edge-llm.service\n" in out
    assert "Type=notify" in out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["py thon", "50%", "a$b", "plain"])
def test_systemd_reads_the_path_as_it_is(name: str, tmp_path: Path) -> None:
    """Whatever characters the folder has: systemd's own verifier finds the program."""
    python = tmp_path / name / "python"
    python.parent.mkdir()
    python.touch(mode=0o755)
    unit = tmp_path / install.UNIT
    unit.write_text(install.unit(python, ME, ME), encoding="utf-8")
    program = tool("systemd-analyze", package="systemd")
    verified = subprocess.run([program, "verify", str(unit)], capture_output=True, text=True, check=False)
    assert (verified.returncode, verified.stdout + verified.stderr) == (0, "")


@pytest.mark.parametrize("name", ['q"', "back\\slash", "it's", "line\nExecStartPre=/bin/sh"])
def test_a_path_that_systemd_cannot_take(name: str) -> None:
    """It is refused, before anything is written."""
    with pytest.raises(install.CannotInstall, match="systemd starts nothing"):
        install.unit(Path("/opt", name, "python"), ME, ME)


def test_another_user() -> None:
    """User and group of the unit are the ones asked for."""
    lines = install.unit(PYTHON, "llm", "users").splitlines()
    assert {"User=llm", "Group=users"} <= set(lines)


def test_a_user_whose_group_has_another_name(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The unit names the group that there is; a user that is still to be made gets one of its own name."""
    monkeypatch.setattr(install, "HIDDEN", {})
    monkeypatch.setattr(install, "PACKAGED", ())
    for user, group in (("nobody", grp.getgrgid(pwd.getpwnam("nobody").pw_gid).gr_name), ("nobody-yet", "nobody-yet")):
        install.install(python=PYTHON, user=user, dry_run=True)
        assert f"\nUser={user}\nGroup={group}\n" in capsys.readouterr().out


def test_another_user_than_before(tmp_path: Path) -> None:
    """The configuration is handed to the group of the new one, who could not read it."""
    if os.geteuid() != 0:
        pytest.skip("only root may hand files to others")
    config = tmp_path / install.CONFIG_PATH
    config.parent.mkdir(parents=True)
    config.touch(mode=0o640)
    for done in (False, True):
        steps = {step.what: step for step in install._steps(tmp_path, "unit", "nobody", PYTHON, system=True)}
        (step,) = (step for what, step in steps.items() if what.startswith("the group of "))
        assert step.done == done
        install._take(step, dry_run=False)
    assert config.stat().st_gid == pwd.getpwnam("nobody").pw_gid


@pytest.mark.parametrize("user", ["root", "", "Ünïx", "a b", "a\nExecStart=/bin/sh", "-x"])
def test_a_user_that_cannot_be(user: str, tmp_path: Path) -> None:
    """Nothing is written for one."""
    with pytest.raises(install.CannotInstall, match="--user"):
        install.install(python=PYTHON, prefix=tmp_path, user=user)
    assert list(tmp_path.iterdir()) == []


def test_a_venv_that_the_service_cannot_see(tmp_path: Path) -> None:
    """It is refused with the folder, the setting, and what to do."""
    with pytest.raises(install.CannotInstall, match=r"in /home, .*\(ProtectHome=yes\); .*\n.*/opt/edge-llm"):
        install.install(python=Path("/home/pi/venv/bin/python"), prefix=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_every_hiding_setting_is_in_the_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table of what is hidden is about this unit."""
    monkeypatch.undo()
    unit = (PROJECT / "systemd" / install.UNIT).read_text(encoding="utf-8").splitlines()
    assert set(install.HIDDEN) <= set(unit)


def test_a_machine_where_the_package_did_it(tmp_path: Path) -> None:
    """Two units of one name would hide each other."""
    packaged = tmp_path / install.PACKAGED[0]
    packaged.parent.mkdir(parents=True)
    packaged.touch()
    with pytest.raises(install.CannotInstall, match="already"):
        installed(tmp_path)


def test_without_rights(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One line says with which command it works."""
    monkeypatch.setattr(install, "HIDDEN", {})
    monkeypatch.setattr(install, "PACKAGED", ())
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert cli.main(["install-service"]) == 1
    assert "needs root: sudo" in capsys.readouterr().err


def test_what_is_asked_of_the_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The user first, systemd last, and how to go on."""
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(install, "_run", lambda *command: asked.append(command))
    missing = {step.what: step for step in install._steps(tmp_path, "unit", "nobody-here", PYTHON, system=True)}
    names = [*missing]
    assert names[0] == "the user nobody-here"
    assert names[-1] == "systemd knows the unit"
    install._take(missing[names[0]], dry_run=False)
    install._take(missing[names[-1]], dry_run=False)
    assert [command[0] for command in asked] == ["useradd", "systemctl"]
    assert asked[0][-1] == "nobody-here"
