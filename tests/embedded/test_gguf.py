"""The reader of GGUF headers, on headers written here byte by byte."""

import struct
from pathlib import Path

import pytest

from edge_daemon.embedded.errors import EmbeddedError
from edge_daemon.embedded.gguf import read_header


def text(value: str) -> bytes:
    """A string as GGUF has it."""
    return struct.pack("<Q", len(value.encode())) + value.encode()


HEADER = (
    struct.pack("<4sIQQ", b"GGUF", 3, 2, 5)
    + (text("general.architecture") + struct.pack("<I", 8) + text("tiny"))
    + (text("tokens") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("b"))
    + (text("scores") + struct.pack("<IIQ3f", 9, 6, 3, 1.0, 2.0, 3.0))
    + (text("tiny.context_length") + struct.pack("<II", 4, 2048))
    + (text("tiny.is_small") + struct.pack("<I?", 7, True))  # noqa: FBT003 - the layout, not a flag
    + (text("one") + struct.pack("<IQQIQ", 2, 10, 20, 0, 0))
    + (text("two") + struct.pack("<IQIQ", 1, 7, 0, 800))
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file with a whole header."""
    path = tmp_path / "tiny.gguf"
    path.write_bytes(HEADER)
    return path


def test_values_are_read_and_lists_are_left_out(file: Path) -> None:
    """Every single value is found, behind lists of strings and of numbers too."""
    assert read_header(file).metadata == {
        "general.architecture": "tiny",
        "tiny.context_length": 2048,
        "tiny.is_small": True,
    }


def test_parameters_are_the_product_of_each_tensors_dimensions(file: Path) -> None:
    """The number of parameters is counted from the tensors."""
    assert read_header(file).parameter_count == 10 * 20 + 7


@pytest.mark.parametrize("length", [0, 3, 30, 60, len(HEADER) // 2, len(HEADER) - 1])
def test_a_file_cut_short_is_an_error_that_names_it(file: Path, length: int) -> None:
    """A header that ends too early is reported, wherever it ends."""
    file.write_bytes(HEADER[:length])
    with pytest.raises(EmbeddedError, match=r"tiny\.gguf"):
        read_header(file)


def test_another_kind_of_file_is_an_error(file: Path) -> None:
    """A file that is no GGUF is not read as one."""
    file.write_bytes(b"<html>" + HEADER)
    with pytest.raises(EmbeddedError, match="magic"):
        read_header(file)
