"""What a torture run reports: one line for each thing that was tried, as a Markdown table."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SHOWN = 20
"""Violations that are printed; all are counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What a torture is given: a place on the disk, and how much of it is wanted."""

    directory: Path
    seed: int = 1
    loops: int | None = None
    """How often; None: as often as a full run does."""
    hours: float = 24.0
    """Of the compressed day."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One thing that was tried, and what came of it."""

    fault: str
    """What was done, with its number."""
    result: str
    """Figures."""
    violations: Sequence[str] = ()

    def __str__(self) -> str:
        return f"| {self.fault} | {self.result} | {len(self.violations)} |"


def table(lines: Sequence[Line]) -> str:
    """All lines, and below them what was violated."""
    head = ["| fault | result | violations |", "| --- | --- | ---: |"]
    found = [f"- {text}" for line in lines for text in line.violations]
    more = [f"- and {len(found) - SHOWN} more"] if len(found) > SHOWN else []
    return "\n".join([*head, *map(str, lines), *([""] if found else []), *found[:SHOWN], *more])
