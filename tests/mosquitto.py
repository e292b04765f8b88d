"""A real mosquitto, private to a test: started on a free port, stopped, killed, started again."""

import signal
import socket
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tests import needs
from tests.ports import HOST, free_port
from tests.waiting import wait_until


class Mosquitto:
    """One broker on loopback; its port and its directory stay the same over restarts.

    `persistence` keeps sessions, retained and queued messages over a stop; over a kill only what came
    before the last `save`. `users` maps names to passwords and shuts anonymous clients out. `acl` is
    the text of an ACL file, `extra` further lines of configuration. `verbose` logs every packet.
    """

    host = HOST

    def __init__(
        self,
        directory: Path,
        *,
        persistence: bool = False,
        users: Mapping[str, str] | None = None,
        acl: str = "",
        extra: str = "",
        verbose: bool = True,
    ) -> None:
        self.directory = directory
        self.port = free_port()
        self._verbose = verbose
        self._program = needs.tool("mosquitto", package="mosquitto")
        self._process: subprocess.Popen[bytes] | None = None
        lines = [
            f"listener {self.port} {self.host}",
            f"allow_anonymous {'false' if users else 'true'}",
            "user root",  # else a broker started by root gives up root, and with it this directory
            *(["persistence true", f"persistence_location {directory}/"] if persistence else []),
            *(self._password_file(users) if users else []),
            *(self._acl_file(acl) if acl else []),
            extra,
        ]
        self._config.write_text("\n".join(lines) + "\n", encoding="utf-8")

    def start(self) -> None:
        """Start, and return once the broker accepts connections."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [self._program, "-c", str(self._config), *(["-v"] if self._verbose else [])],
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        wait_until(self._accepts)

    def stop(self) -> None:
        """Stop in an orderly way; it may be started again."""
        self._end(kill=False)

    def kill(self) -> None:
        """Stop as a power cut would."""
        self._end(kill=True)

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal, such as SIGSTOP: then its sockets take what they can and nobody answers."""
        assert self._process is not None, "not running"
        self._process.send_signal(number)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Silent, with all its connections open, while the block runs."""
        self.signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.signal(signal.SIGCONT)

    def set_acl(self, text: str) -> None:
        """Change the rights of a broker that was made with some."""
        self._private_file("acl", text)
        before = self.log().count("Reloading config")
        self.signal(signal.SIGHUP)
        wait_until(lambda: self.log().count("Reloading config") > before)

    def save(self) -> None:
        """Have a broker with persistence write everything to its file now."""
        before = self._saved_inode()
        self.signal(signal.SIGUSR1)
        wait_until(lambda: self._saved_inode() != before)

    def log(self) -> str:
        """Everything that the broker has said since it was first started."""
        return self._log.read_text(encoding="utf-8", errors="replace")

    @property
    def _config(self) -> Path:
        return self.directory / "mosquitto.conf"

    @property
    def _log(self) -> Path:
        return self.directory / "mosquitto.log"

    def _saved_inode(self) -> int | None:
        # Each save is a new file under the old name.
        saved = self.directory / "mosquitto.db"
        return saved.stat().st_ino if saved.exists() else None

    def _end(self, *, kill: bool) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        if kill:
            process.kill()
        else:
            process.terminate()
        process.wait(10)

    def _accepts(self) -> bool:
        if self._process is None or self._process.poll() is not None:
            raise AssertionError(f"mosquitto did not start:\n{self.log()}")
        try:
            socket.create_connection((self.host, self.port), 1).close()
        except OSError:
            return False
        return True

    def _password_file(self, users: Mapping[str, str]) -> list[str]:
        path = self._private_file("passwords", "".join(f"{name}:{word}\n" for name, word in users.items()))
        hasher = needs.tool("mosquitto_passwd", package="mosquitto")
        subprocess.run([hasher, "-U", str(path)], check=True, capture_output=True)
        return [f"password_file {path}"]

    def _acl_file(self, text: str) -> list[str]:
        return [f"acl_file {self._private_file('acl', text)}"]

    def _private_file(self, name: str, text: str) -> Path:
        path = self.directory / name
        path.touch(mode=0o600)
        path.write_text(text, encoding="utf-8")
        return path


class ExampleMosquitto(Mosquitto):
    """A broker as `examples/mosquitto/` sets it up in Debian's `/etc/mosquitto`, with other places and ports.

    `users` are given their passwords as the example says. With `tls`, it also listens on `tls_port`; the certificates
    are to lie in `certs` in the directory, under the names that the example uses. `mutual` demands one of clients too.
    """

    def __init__(self, directory: Path, *, users: Mapping[str, str], tls: bool = False, mutual: bool = False) -> None:
        super().__init__(directory)
        self.tls_port = free_port()
        places = {
            "/etc/mosquitto": str(directory),
            "listener 1883 127.0.0.1": f"listener {self.port} 127.0.0.1",
            "listener 8883": f"listener {self.tls_port} 127.0.0.1",
        }
        if mutual:
            places |= {f"#{key}": key for key in ("cafile", "require_certificate", "use_identity_as_username")}
        (directory / "conf.d").mkdir()
        for name in ("edge-llm.conf", "edge-llm-tls.conf")[: 1 + tls]:
            (directory / "conf.d" / name).write_text(_example(name, places), encoding="utf-8")
        self._private_file("edge-llm.acl", _example("edge-llm.acl", {}))
        hasher = needs.tool("mosquitto_passwd", package="mosquitto")
        passwords = self._private_file("edge-llm.passwd", "")
        for name, word in users.items():
            subprocess.run([hasher, "-b", str(passwords), name, word], check=True, capture_output=True)
        # What Debian's own file says, and who we are.
        lines = [
            "user root",
            "persistence true",
            f"persistence_location {directory}/",
            f"include_dir {directory}/conf.d",
        ]
        self._config.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _example(name: str, places: Mapping[str, str]) -> str:
    text = (Path(__file__).parent.parent / "examples" / "mosquitto" / name).read_text(encoding="utf-8")
    for place, here in places.items():
        text = text.replace(place, here)
    return text
