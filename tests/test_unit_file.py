"""systemd/edge-llm.service, judged by systemd's own tools."""

import re
import subprocess
from pathlib import Path

import pytest

from edge_daemon.checks_ollama import ON_LOOPBACK
from tests import needs

UNIT = Path(__file__).parent.parent / "systemd" / "edge-llm.service"
INSTALLED = "/usr/bin/edge-llm"
WORST_EXPOSURE = 1.2
EXAMPLES = UNIT.parent.parent / "examples"


def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run systemd-analyze; its two outputs together."""
    program = needs.tool("systemd-analyze", package="systemd")
    return subprocess.run(
        [program, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60, check=False
    )


def directives() -> list[str]:
    """The lines that count."""
    lines = UNIT.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


@pytest.fixture
def installed_unit(tmp_path: Path) -> Path:
    """The unit as shipped, but for the program, which is not installed here: it is one that exists."""
    program = tmp_path / "edge-llm"
    program.touch(mode=0o755)
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text(encoding="utf-8").replace(INSTALLED, str(program)), encoding="utf-8")
    return unit


def test_verify_is_silent(installed_unit: Path) -> None:
    """The verifier finds nothing to say about the unit."""
    verified = analyze("verify", str(installed_unit))
    assert (verified.returncode, verified.stdout) == (0, "")


def test_verify_would_speak(installed_unit: Path) -> None:
    """The check above is not blind: a misspelt directive is found by it."""
    text = installed_unit.read_text(encoding="utf-8")
    installed_unit.write_text(text.replace("WatchdogSec", "WatchDogSecs"), encoding="utf-8")
    assert "WatchDogSecs" in analyze("verify", str(installed_unit)).stdout


@pytest.mark.parametrize(
    ("unit", "drop_in"), [("edge-llm", "systemd/clock.conf"), ("ollama", "ollama/zz-edge-llm.conf")]
)
def test_examples_are_understood(installed_unit: Path, unit: str, drop_in: str) -> None:
    """The verifier finds nothing to say about the drop-ins that are offered, beside the unit that they are for."""
    target = installed_unit.with_name(f"{unit}.service")
    if unit == "ollama":
        target.write_text("[Unit]\nDescription=Ollama\n[Service]\nExecStart=/bin/true\n", encoding="utf-8")
    text = (EXAMPLES / drop_in).read_text(encoding="utf-8")
    directory = installed_unit.with_name(f"{target.name}.d")
    directory.mkdir()
    directory.joinpath("example.conf").write_text(text, encoding="utf-8")
    verified = analyze("verify", str(target))
    assert (verified.returncode, verified.stdout) == (0, "")
    directory.joinpath("example.conf").write_text(text.replace("[Service]", "[Service]\nNonsense=1"), encoding="utf-8")
    assert "Nonsense" in analyze("verify", str(target)).stdout


def test_drop_ins_for_ollama_win() -> None:
    """They sort behind what `systemctl edit ollama` writes, as the commands place them."""
    (example,) = (EXAMPLES / "ollama").glob("*.conf")
    placed = [ON_LOOPBACK, example.read_text(encoding="utf-8")]
    names = [name for text in placed for name in re.findall(r"/ollama\.service\.d/(\S+)", text)]
    assert names == sorted(["zz-loopback.conf", example.name], reverse=True)
    assert min(names) > "override.conf"


def test_ollama_is_ended_first() -> None:
    """When memory runs out the kernel prefers Ollama, by the drop-in, to the queue in front of it."""
    score = re.compile(r"^OOMScoreAdjust=(-?\d+)$", re.MULTILINE)
    ours = score.search(UNIT.read_text(encoding="utf-8"))
    theirs = score.search((EXAMPLES / "ollama" / "zz-edge-llm.conf").read_text(encoding="utf-8"))
    assert ours is not None
    assert theirs is not None
    assert int(ours[1]) < 0 < int(theirs[1])


def test_exposure_is_low() -> None:
    """The sandbox leaves an exposure of at most 1.2 of 10."""
    judged = analyze("security", "--offline=true", "--no-pager", str(UNIT)).stdout
    match = re.search(r"Overall exposure level for edge-llm\.service: ([0-9.]+)", judged)
    assert match is not None, judged
    assert float(match[1]) <= WORST_EXPOSURE, judged


@pytest.mark.parametrize(
    "directive",
    [
        f"ExecStart={INSTALLED} run --config /etc/edge-llm/config.yaml",
        "Type=notify",
        "WatchdogSec=60",
        "TimeoutStartSec=5min",
        "Restart=always",
        "StartLimitIntervalSec=0",
        "RestartPreventExitStatus=78",
        "StateDirectory=edge-llm",
        "User=edge-llm",
    ],
)
def test_what_the_daemon_relies_on(directive: str) -> None:
    """The unit does what the daemon counts on: notify, watchdog, restarts for ever but not on a wrong config."""
    assert directive in directives()


@pytest.mark.parametrize("setting", ["LoadCredential", "Requires", "BindsTo", "IPAddressDeny"])
def test_nothing_missing_stops_the_daemon(setting: str) -> None:
    """No absent file, service or network rule can keep the unit as shipped from starting or serving."""
    assert not [line for line in directives() if line.startswith(f"{setting}=")]
