"""What the tests of this package share: where the models are put together."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One directory for all servers, so that models are put together once; aliases need names of their own."""
    return tmp_path_factory.mktemp("embedded")
