"""Stand-ins for what a test must control."""

from edge_daemon.clock import Clock


class FakeClock(Clock):
    """Time that moves only when told."""

    def __init__(
        self,
        *,
        monotonic_s: float = 1_000.0,
        wall_s: float = 1_700_000_000.0,
        synced: bool = True,
        boot_id: str = "boot-1",
    ) -> None:
        self.monotonic_s = monotonic_s
        self.wall_s = wall_s
        self.is_synced = synced
        self.boot = boot_id

    def monotonic(self) -> float:
        """As set by `advance` and `reboot`."""
        return self.monotonic_s

    def wall(self) -> float:
        """As set by `advance`, `step_wall` and `reboot`."""
        return self.wall_s

    def synced(self) -> bool:
        """The value of `is_synced`, which a test may set."""
        return self.is_synced

    def boot_id(self) -> str:
        """The name of this boot; `reboot` changes it."""
        return self.boot

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.monotonic_s += seconds
        self.wall_s += seconds

    def step_wall(self, seconds: float) -> None:
        """Set the wall clock forward or back, as a time server does; no time passes."""
        self.wall_s += seconds

    def reboot(self, *, off_s: float = 0.0, boot_id: str = "boot-2") -> None:
        """Start a new boot after `off_s` seconds without power."""
        self.wall_s += off_s
        self.monotonic_s = 0.0
        self.boot = boot_id
