"""The errors of this package."""


class EmbeddedError(Exception):
    """The broker or the model server could not be brought up; the text says what to do about it."""


class PortTaken(EmbeddedError):
    """Another program listens on `port` already."""

    def __init__(self, port: int, host: str) -> None:
        super().__init__(f"port {port} on {host} is in use")
        self.port = port
