"""What would keep a daemon from starting, as the user finds it who is to run it."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from edge_daemon import preflight
from edge_daemon.config import Config, Csv
from edge_daemon.errors import ConfigError

NOBODY = 65534


@contextmanager
def another_user() -> Iterator[None]:
    """Be nobody, where we are root: root may enter every folder."""
    if os.geteuid() != 0:
        yield
        return
    os.setresuid(NOBODY, NOBODY, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


@pytest.fixture
def home() -> Iterator[Path]:
    """A folder that its parent lets nobody see, as ProtectHome does to a service."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        closed = Path(folder, "home")
        closed.mkdir()
        (closed / "pi").mkdir()
        closed.chmod(0)
        yield closed / "pi"
        closed.chmod(0o700)


def test_a_log_in_a_folder_that_we_may_not_enter(home: Path) -> None:
    """The key is named, so that a reload keeps the old configuration and a start ends with 78."""
    config = Config(data_dir=home.parent.parent / "data", csv=Csv(path=home / "log.csv"))
    config.data_dir.mkdir()
    config.data_dir.chmod(0o777)
    with another_user(), pytest.raises(ConfigError, match=r"^csv\.path: .*/log\.csv: Permission denied$"):
        preflight.check(config, held=config)


def test_a_data_dir_that_we_may_not_enter(home: Path) -> None:
    """The key is named."""
    with another_user(), pytest.raises(ConfigError, match=r"^data_dir: .*: Permission denied; "):
        preflight.lock(home / "data")
