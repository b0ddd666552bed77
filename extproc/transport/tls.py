"""TLS of the ext_proc port: its files, checked, read again when they change, and gRPC credentials made of them.

Nothing here knows a server: whoever opens the port asks for `credentials()` and calls `look()` now and then. Each new
handshake looks at the files too, so a rotated certificate is used from the next connection on. Connections that
are open keep the one they began with.
"""

from __future__ import annotations

import contextlib
import logging
import ssl
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import grpc

from extproc.errors import ConfigError
from extproc.transport import self_signed

if TYPE_CHECKING:
    from collections.abc import Mapping

    from extproc.config import TlsConfig

log = logging.getLogger("extproc.tls")

STEADY_TRIES = 5
LATE = 0.1
"""The last part of a certificate's life; whoever rotates it should have done so by then."""


@dataclass(frozen=True, slots=True)
class Material:
    """What the files held, found to be good. Times are in seconds since 1970."""

    certificate: bytes
    key: bytes
    client_ca: bytes | None
    begins: float
    ends: float

    def for_grpc(self) -> grpc.ServerCertificateConfiguration:
        """Return it in gRPC's words."""
        return grpc.ssl_server_certificate_configuration([(self.key, self.certificate)], self.client_ca)


class ServerTls:
    """The certificate that the ext_proc port shows, and who may connect to it. Safe to use from any thread."""

    def __init__(self, config: TlsConfig) -> None:
        """Read the files. Raises ConfigError with all that is wrong with them."""
        self._config = config
        self._lock = threading.Lock()
        for _ in range(STEADY_TRIES):
            self._seen = _signature(config)
            self.material = read(config)
            if _signature(config) == self._seen:
                break
        self._given = self.material
        self._warned: Material | None = None

    def credentials(self) -> grpc.ServerCredentials:
        """Return credentials that follow the files: gRPC asks before each handshake, in a thread of its own.

        For one server: it is told of each change once. A server on cygrpc finds that layer's object in `_credentials`.
        """
        asks_clients = self._config.client_ca_file is not None
        return grpc.dynamic_ssl_server_credentials(self.material.for_grpc(), self._fetch, asks_clients)

    def look(self) -> None:
        """Take over files that have changed. Bad ones change nothing, and are named in the log once."""
        with self._lock:
            now = _signature(self._config)
            if now != self._seen:
                self._take(now)
            self._warn_of_its_end()

    def _take(self, signature: tuple[object, ...]) -> None:
        problems: list[str] = []
        read_anew = _made if self._config.self_signed else _read
        material = read_anew(self._config, problems)
        if _signature(self._config) != signature:
            return  # they are being written just now; the next look will see them whole
        self._seen = signature
        for problem in problems:
            log.error("%s; the certificate in use stays", problem)
        if material is not None:
            self.material = material
            log.info("tls: the files have changed; new connections use them, valid until %s", _date(material.ends))

    def _warn_of_its_end(self) -> None:
        material = self.material
        if self._warned is not material and time.time() > material.ends - LATE * (material.ends - material.begins):
            self._warned = material
            log.warning("tls.cert_file: valid until %s, and then Envoy refuses it: renew it", _date(material.ends))

    def _fetch(self) -> grpc.ServerCertificateConfiguration | None:
        self.look()
        with self._lock:
            if self._given is self.material:
                return None
            self._given = self.material
            return self.material.for_grpc()


def read(config: TlsConfig) -> Material:
    """Read and check the files. Raises ConfigError with all problems, each with its key path."""
    problems: list[str] = []
    material = _read(config, problems) if not config.self_signed else _made(config, problems)
    if material is None:
        raise ConfigError("configuration", problems)
    return material


def _made(config: TlsConfig, problems: list[str]) -> Material | None:
    certificate, key, begins, ends = self_signed.make()
    client_ca = None
    if config.client_ca_file is not None:
        client_ca = _text("tls.client_ca_file", config.client_ca_file, problems)
        if client_ca:
            problems += _check_ca(client_ca, config.client_ca_file)
    return None if problems else Material(certificate, key, client_ca.encode() if client_ca else None, begins, ends)


def _read(config: TlsConfig, problems: list[str]) -> Material | None:
    certificate = _text("tls.cert_file", config.cert_file or "", problems)
    key = _text("tls.key_file", config.key_file or "", problems)
    client_ca = None
    if config.client_ca_file is not None:
        client_ca = _text("tls.client_ca_file", config.client_ca_file, problems)
        if client_ca:
            problems += _check_ca(client_ca, config.client_ca_file)
    times = _check_pair(certificate, config, problems) if certificate and key else None
    if problems or times is None:
        return None
    return Material(certificate.encode(), key.encode(), client_ca.encode() if client_ca else None, *times)


def _signature(config: TlsConfig) -> tuple[object, ...]:
    """Return something that changes when a file does: in place, by a rename, or by the swap of a link above it."""
    return tuple(_stat(path) for path in (config.cert_file, config.key_file, config.client_ca_file) if path is not None)


def _stat(path: str) -> tuple[int, ...] | None:
    try:
        found = Path(path).stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size


def _text(key: str, path: str, problems: list[str]) -> str:
    """Return a file's text, or "" with a problem noted."""
    try:
        text = Path(path).read_text(encoding="ascii", errors="ignore")  # PEM is ASCII; comments around it need not be
    except OSError as error:
        problems.append(f"{key}: {path} can't be read: {error.strerror}")
        return ""
    if "-----BEGIN " not in text:
        problems.append(f"{key}: {path} holds no PEM block (-----BEGIN ...)")
        return ""
    return text


def _check_ca(text: str, path: str) -> list[str]:
    where = f"tls.client_ca_file: {path}"
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(cadata=text)
    except ssl.SSLError as error:
        return [f"{where} holds no readable certificate{_why(error)}"]
    ends = [ssl.cert_time_to_seconds(str(found["notAfter"])) for found in context.get_ca_certs()]
    if not ends:
        return [f"{where} holds no CA certificate; one that may sign others is needed"]
    if max(ends) < time.time():
        return [f"{where} expired at {_date(max(ends))}: no client could be believed"]
    return []


def _check_pair(certificate: str, config: TlsConfig, problems: list[str]) -> tuple[float, float] | None:
    """Return from when until when the certificate is valid, or None with a problem noted.

    The standard library tells neither dates nor purpose of a certificate that is no CA, but a handshake does: with
    ourselves, in memory, where the client trusts this certificate and nothing else.
    """
    where = f"tls.cert_file: {config.cert_file}"
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        client.load_verify_locations(cadata=certificate)
    except ssl.SSLError as error:
        problems.append(f"{where} holds no readable certificate{_why(error)}")
        return None
    try:
        server.load_cert_chain(str(config.cert_file), config.key_file, password=_no_password)
    except ssl.SSLError as error:
        if error.reason in ("KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH", "NO_CERTIFICATE_ASSIGNED"):
            why = f"is not the key of the certificate in {config.cert_file}; both must come from one issue"
        else:
            why = f"holds no private key that works with {config.cert_file}{_why(error)}"
        problems.append(f"tls.key_file: {config.key_file} {why}")
        return None
    except (OSError, ValueError) as error:
        problems.append(f"tls.key_file: {config.key_file}: {error}")
        return None
    try:
        shown = _handshake(server, client)
    except ssl.SSLCertVerificationError as error:
        problems.append(f"{where}: {error.verify_message}")
        return None
    except ssl.SSLError as error:
        problems.append(f"{where} can't be used{_why(error)}")
        return None
    return ssl.cert_time_to_seconds(str(shown["notBefore"])), ssl.cert_time_to_seconds(str(shown["notAfter"]))


def _why(error: ssl.SSLError) -> str:
    return f" ({error.reason})" if error.reason else ""


def _no_password() -> str:
    raise ValueError("is encrypted; a key without a passphrase is needed")


def _handshake(server: ssl.SSLContext, client: ssl.SSLContext) -> Mapping[str, object]:
    """Return the certificate that `client` was shown. Raises ssl.SSLError."""
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    asking = client.wrap_bio(down, up)
    serving = server.wrap_bio(up, down, server_side=True)
    for side in (asking, serving) * 3:  # hello, hello and certificate, finished
        with contextlib.suppress(ssl.SSLWantReadError):
            side.do_handshake()
    return asking.getpeercert() or {}


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))
