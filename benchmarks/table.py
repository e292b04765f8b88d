"""Lines of a report: each a ratio of two things measured in turns, with its aim."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

WIDTH = 52


@dataclass(frozen=True, slots=True, kw_only=True)
class Aim:
    """What the median of the ratios should be: at most, or with ``at_least``, at least ``limit``."""

    limit: float
    at_least: bool = False

    def met_by(self, ratio: float) -> bool:
        """Whether ``ratio`` is as good as that."""
        return ratio >= self.limit if self.at_least else ratio <= self.limit

    def __str__(self) -> str:
        return f"{'>=' if self.at_least else '<='} {self.limit:g}"


def at_most(limit: float) -> Aim:
    """An aim for costs."""
    return Aim(limit=limit)


def at_least(limit: float) -> Aim:
    """An aim for rates."""
    return Aim(limit=limit, at_least=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One comparison. ``ours`` and ``theirs`` hold a figure of every repetition, pair by pair."""

    name: str
    work: str
    """What was done."""
    against: str
    """The peer or the bound that did the same."""
    ours: Sequence[float]
    theirs: Sequence[float]
    show: Callable[[float], str]
    """A figure with its unit."""
    aim: Aim | None = None

    @property
    def ratios(self) -> list[float]:
        """Ours over theirs, lowest first."""
        return sorted(mine / other for mine, other in zip(self.ours, self.theirs, strict=True))

    @property
    def ratio(self) -> float:
        """The median, which the aim is about."""
        return median(self.ratios)

    @property
    def verdict(self) -> str:
        """The aim, and whether it is met."""
        if self.aim is None:
            return "no aim"
        return f"aim {self.aim}: {'met' if self.aim.met_by(self.ratio) else 'MISSED'}"

    def __str__(self) -> str:
        low, *_, high = self.ratios if len(self.ratios) > 1 else self.ratios * 2
        spread = f"({low:.2f} to {high:.2f}, n = {len(self.ratios)})"
        figures = f"{self.show(median(self.ours))} against {self.show(median(self.theirs))}"
        head = f"{self.name:<{WIDTH}} {self.ratio:6.2f}  {spread:<26} {self.verdict}"
        return f"{head}\n    {self.work}\n    over {self.against}: {figures}"


def summary(lines: Sequence[Line]) -> str:
    """How many aims are met, and which are not."""
    aimed = [line for line in lines if line.aim]
    missed = [line.name for line in aimed if line.aim and not line.aim.met_by(line.ratio)]
    text = f"{len(aimed) - len(missed)} of {len(aimed)} aims met"
    return f"{text}; missed: {', '.join(missed)}" if missed else text


def milliseconds(seconds: float) -> str:
    """Seconds, as milliseconds."""
    return f"{seconds * 1e3:.2f} ms"


def megabytes(size_bytes: float) -> str:
    """Bytes, as megabytes."""
    return f"{size_bytes / 1e6:.1f} MB"


def per_second(rate: float) -> str:
    """A rate."""
    return f"{rate:,.0f}/s"
