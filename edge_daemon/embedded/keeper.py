"""Keeps a broker or a model server running: one that dies is started again."""

import logging
import threading
from collections.abc import Callable
from typing import Self

from edge_daemon.embedded.errors import EmbeddedError
from edge_daemon.embedded.launch import BrokerChild, OllamaChild

log = logging.getLogger(__name__)

_PAUSE_S = 1.0

Service = BrokerChild | OllamaChild


class Keeper:
    """Within its `with` block `service` is started again with `start` whenever it has died; at the end it is stopped.

    `start` is to give the new one the old one's port: those who were connected come back on their own.
    """

    def __init__(self, name: str, service: Service, start: Callable[[], Service]) -> None:
        self._name = name
        self._service = service
        self._start = start
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._keep, name=f"{name}-keeper", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._service.stop()
        self._thread.join()
        self._service.stop()  # one that was being started meanwhile

    def _keep(self) -> None:
        while not self._stopping.is_set():
            status = self._service.process.wait()
            if not self._stopping.is_set():
                log.warning("the %s has died (status %d): starting it again", self._name, status)
                self._service.stop()
                self._start_again()

    def _start_again(self) -> None:
        while not self._stopping.wait(_PAUSE_S):
            try:
                self._service = self._start()
            except EmbeddedError as error:
                log.error("the %s does not start: %s", self._name, error)  # noqa: TRY400 - the text says it all
            else:
                return
