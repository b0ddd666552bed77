"""Throw-away certificates, and directories that change as Kubernetes secrets do."""

from __future__ import annotations

import datetime as dt
import socket
import ssl
from typing import TYPE_CHECKING

from cryptography.x509 import load_pem_x509_certificate

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import trustme

SIDECAR_NAME = "sidecar.test"
_NOW = dt.datetime.now(dt.UTC)
_DAY = dt.timedelta(days=1)
PAST = {"not_before": _NOW - 2 * _DAY, "not_after": _NOW - _DAY}
FUTURE = {"not_before": _NOW + _DAY, "not_after": _NOW + 2 * _DAY}


class Mount:
    """A directory whose files are links through `..data`: `put` swaps all of them in one moment, as a kubelet does."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._version = 0
        directory.mkdir(parents=True)

    def path(self, name: str) -> str:
        return str(self.directory / name)

    def put(self, files: Mapping[str, bytes]) -> None:
        self._version += 1
        version = self.directory / f"..{self._version}"
        version.mkdir()
        for name, content in files.items():
            (version / name).write_bytes(content)
        fresh = self.directory / "..fresh"
        fresh.symlink_to(version.name)
        fresh.replace(self.directory / "..data")
        for name in files:
            link = self.directory / name
            if not link.is_symlink():
                link.symlink_to(f"..data/{name}")


def secret(ca: trustme.CA, name: str, *, trusted: trustme.CA | None = None, **when: dt.datetime) -> dict[str, bytes]:
    """A certificate of `ca` for `name`, its key, and the CA that the holder trusts, called as cert-manager does."""
    issued = ca.issue_cert(name, **when)
    return {
        "tls.crt": b"".join(blob.bytes() for blob in issued.cert_chain_pems),
        "tls.key": issued.private_key_pem.bytes(),
        "ca.crt": (trusted or ca).cert_pem.bytes(),
    }


def serial(files: Mapping[str, bytes]) -> int:
    """The serial number of the certificate among `files`."""
    return load_pem_x509_certificate(files["tls.crt"]).serial_number


def shown_serial(address: str, mine: Mount) -> int:
    """The serial number of the certificate that a server shows in a new handshake, in which we show `mine`."""
    context = ssl.create_default_context(cafile=mine.path("ca.crt"))
    context.load_cert_chain(mine.path("tls.crt"), mine.path("tls.key"))
    context.set_alpn_protocols(["h2"])
    host, _, port = address.rpartition(":")
    with (
        socket.create_connection((host, int(port)), timeout=5) as raw,
        context.wrap_socket(raw, server_hostname=SIDECAR_NAME) as connection,
    ):
        return int(str((connection.getpeercert() or {})["serialNumber"]), 16)
