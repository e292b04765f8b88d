"""Certificates made with openssl, as docs/security.md tells people to make them."""

import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests import needs


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """A certificate and its key, as PEM files."""

    certificate: Path
    key: Path


class Authority:
    """Issues certificates, whose files lie in `directory`."""

    def __init__(self, directory: Path, name: str = "ca") -> None:
        self._directory = directory
        self._name = name
        directory.mkdir(parents=True, exist_ok=True)
        self.certificate = directory / f"{name}.crt"
        subject = ("-subj", f"/CN={name}", "-days", "30")
        _openssl("req", "-x509", *_new_key(directory / f"{name}.key"), *subject, "-out", self.certificate)

    def issue(self, name: str, *, address: str = "", days: int = 30) -> Certificate:
        """A certificate for the common name `name`; with an `address`, such as `DNS:pi1.lan`, for a server there.

        One for less than no days has expired.
        """
        issued = Certificate(certificate=self._directory / f"{name}.crt", key=self._directory / f"{name}.key")
        request = self._directory / f"{name}.csr"
        extension = ("-addext", f"subjectAltName={address}") if address else ()
        _openssl("req", *_new_key(issued.key), "-subj", f"/CN={name}", *extension, "-out", request)
        signer = ("-CA", self.certificate, "-CAkey", self._directory / f"{self._name}.key", "-CAcreateserial")
        _openssl(
            *("x509", "-req", "-in", request, *signer, "-copy_extensions", "copy"),
            *("-days", str(days), "-out", issued.certificate),
        )
        return issued


def _new_key(path: Path) -> tuple[str | Path, ...]:
    return ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-noenc", "-keyout", path)


def _openssl(*arguments: str | Path) -> None:
    command = [needs.tool("openssl", package="openssl"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, check=False, timeout=20)
    assert done.returncode == 0, done.stderr.decode()
