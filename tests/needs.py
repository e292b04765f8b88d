"""Programs that a test needs: missing ones skip it at home and fail it in CI."""

import os
import shutil

import pytest


def tool(name: str, *, package: str) -> str:
    """The path of program `name`, which comes with Debian's `package`."""
    path = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if path is not None:
        return path
    reason = f"{name} is missing: apt-get install {package}"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)
