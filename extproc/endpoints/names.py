"""Names for endpoints that a source knows only by address."""

from __future__ import annotations

_PLAIN = str.maketrans("", "", "[]")


def address_of(host: str, port: int) -> str:
    """Return host:port, IPv6 hosts in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def name_of(address: str) -> str:
    """Return `address` as a name: without brackets, and beginning with a letter or digit."""
    plain = address.translate(_PLAIN)
    return f"0{plain}" if plain.startswith(":") else plain
