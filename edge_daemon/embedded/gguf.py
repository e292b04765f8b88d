"""The header of a GGUF model file: its metadata, and the number of parameters its tensors hold.

Layout (little-endian): magic, version, counts of tensors and of metadata; the metadata as key, type, value;
the tensors as name, dimensions, type, offset. The weights that follow are not read.
"""

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

from edge_daemon.embedded.errors import EmbeddedError

Scalar = int | float | bool | str

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class Header:
    """`metadata` has every single value by its key (lists, such as the vocabulary, are left out)."""

    metadata: dict[str, Scalar]
    parameter_count: int


def read_header(path: Path) -> Header:
    """Read the header of the file at `path`.

    Raises:
        EmbeddedError: it is no GGUF file of version 2 or 3, or is cut short.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _Reader(content).header()
    except (struct.error, ValueError, OSError) as error:
        raise EmbeddedError(f"{path} is not a readable GGUF file: {error}") from error


class _Reader:
    """Reads one value after another from where the last one ended."""

    def __init__(self, content: mmap.mmap) -> None:
        self._content = content
        self._at = 0

    def header(self) -> Header:
        magic, version = self._take("4sI")
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError(f"invalid file magic or version: {magic!r}, {version!r}")
        tensors, entries = self._count("Q"), self._count("Q")
        metadata = dict(self._entry() for _ in range(entries))
        parameters = sum([self._tensor_parameters() for _ in range(tensors)])
        return Header({key: value for key, value in metadata.items() if value is not None}, parameters)

    def _take(self, layout: str) -> tuple[Scalar | bytes, ...]:
        values = struct.unpack_from("<" + layout, self._content, self._at)
        self._at += struct.calcsize("<" + layout)
        return values

    def _count(self, layout: str) -> int:
        return int(self._take(layout)[0])

    def _string(self) -> str:
        length = self._count("Q")
        start, self._at = self._at, self._at + length
        if self._at > len(self._content):
            raise ValueError("a string goes beyond the end of the file")
        return self._content[start : self._at].decode(errors="replace")

    def _entry(self) -> tuple[str, Scalar | None]:
        key = self._string()
        return key, self._value(self._count("I"))

    def _value(self, kind: int) -> Scalar | None:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            self._skip_array()
            return None
        value = self._take(_SCALARS[kind])[0] if kind in _SCALARS else None
        if value is None or isinstance(value, bytes):
            raise ValueError(f"unknown metadata type {kind}")
        return value

    def _skip_array(self) -> None:
        kind, length = self._count("I"), self._count("Q")
        if kind in _SCALARS:
            self._at += length * struct.calcsize(_SCALARS[kind])
            return
        for _ in range(length):
            self._value(kind)

    def _tensor_parameters(self) -> int:
        self._string()
        dimensions = [int(size) for size in self._take(f"{self._count('I')}Q")]
        self._take("IQ")
        return math.prod(dimensions)
