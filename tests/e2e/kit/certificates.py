"""Throw-away certificates, and directories that change as Kubernetes secrets do."""

from __future__ import annotations

import datetime as dt
import socket
import ssl
from ipaddress import ip_address
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509 import load_pem_x509_certificate
from cryptography.x509.oid import NameOID

from .processes import PATIENCE_S

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import trustme

SIDECAR_NAME = "sidecar.test"
_NOW = dt.datetime.now(dt.UTC)
_DAY = dt.timedelta(days=1)
PAST = {"not_before": _NOW - 2 * _DAY, "not_after": _NOW - _DAY}


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


def without_key_identifiers(address: str, directory: Path) -> tuple[Path, Path]:
    """A CA's certificate, and a server's certificate with its key, as some clusters have them: no key identifiers.

    RFC 5280 wants a subject key identifier in a CA's and an authority key identifier in all that it signs.
    """
    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    issuer, subject = (x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]) for name in ("old CA", "server"))

    def signed(name: x509.Name, public: ec.EllipticCurvePublicKey, *extensions: x509.ExtensionType) -> bytes:
        made = x509.CertificateBuilder().subject_name(name).issuer_name(issuer).public_key(public)
        made = (
            made.serial_number(x509.random_serial_number()).not_valid_before(_NOW - _DAY).not_valid_after(_NOW + _DAY)
        )
        for extension in extensions:
            made = made.add_extension(extension, critical=isinstance(extension, x509.BasicConstraints | x509.KeyUsage))
        return made.sign(ca_key, hashes.SHA256()).public_bytes(Encoding.PEM)

    may_sign = dict.fromkeys(("digital_signature", "key_cert_sign", "crl_sign"), True)
    may_not = ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "encipher_only")
    usage = x509.KeyUsage(**may_sign, **dict.fromkeys((*may_not, "decipher_only"), False))
    ca, server = directory / "old-ca.crt", directory / "old-server.pem"
    ca.write_bytes(signed(issuer, ca_key.public_key(), x509.BasicConstraints(ca=True, path_length=None), usage))
    names = x509.SubjectAlternativeName([x509.IPAddress(ip_address(address))])
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    server.write_bytes(signed(subject, key.public_key(), names) + private)
    return ca, server


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
        socket.create_connection((host, int(port)), timeout=PATIENCE_S) as raw,
        context.wrap_socket(raw, server_hostname=SIDECAR_NAME) as connection,
    ):
        return int(str((connection.getpeercert() or {})["serialNumber"]), 16)
