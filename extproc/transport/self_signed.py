"""A certificate made at start, for gateways that want TLS and look at no certificate: `tls: {self_signed: true}`.

It keeps the traffic from those who only listen, and proves nothing to anybody. Envoy AI Gateway, agentgateway and NGINX
Gateway Fabric connect to an endpoint picker so, and llm-d's router serves so.
"""

from __future__ import annotations

import datetime as dt

from extproc.errors import ConfigError, pip_install

YEARS = 10
"""A process does not live so long."""
NAME = "extproc"


def make() -> tuple[bytes, bytes, float, float]:
    """Return a certificate and its key as PEM, and from when until when it is valid, in seconds since 1970.

    Raises ConfigError without the package `cryptography`: the standard library makes none.
    """
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
    except ImportError as error:
        problem = f"tls.self_signed: needs cryptography: {pip_install('picker')} ({error})"
        raise ConfigError("configuration", [problem]) from None
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, NAME)])
    begins = dt.datetime.now(dt.UTC).replace(microsecond=0) - dt.timedelta(days=1)  # clocks differ
    ends = begins + dt.timedelta(days=365 * YEARS)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begins)
        .not_valid_after(ends)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(NAME)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return certificate.public_bytes(serialization.Encoding.PEM), private, begins.timestamp(), ends.timestamp()
