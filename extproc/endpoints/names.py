"""Who an endpoint is: names for those that a source knows only by address, and which addresses may be one."""

from __future__ import annotations

from ipaddress import ip_address, ip_network
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_PLAIN = str.maketrans("", "", "[]")


def address_of(host: str, port: int) -> str:
    """Return host:port, IPv6 hosts in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def name_of(address: str) -> str:
    """Return `address` as a name: without brackets, and beginning with a letter or digit."""
    plain = address.translate(_PLAIN)
    return f"0{plain}" if plain.startswith(":") else plain


def of_family(addresses: Sequence[str], family: Literal["auto", "ipv4", "ipv6", "any"]) -> list[str]:
    """Return those of one IP family; `auto`: IPv4 if there is any, for a name with both is mostly one server."""
    if family == "any":
        return list(addresses)
    fourth = [address for address in addresses if not address.startswith("[")]
    sixth = [address for address in addresses if address.startswith("[")]
    if family == "auto":
        return fourth or sixth
    return fourth if family == "ipv4" else sixth


def may_be_found(address: str, allowed: Iterable[str] | None) -> bool:
    """Tell whether a source may bring an endpoint at `address`, host:port, which must be an IP address.

    `allowed`: networks; None: all but this machine, this link, nobody and many (loopback, link-local, unspecified,
    multicast).
    """
    try:
        host = ip_address(address.rpartition(":")[0].translate(_PLAIN))
    except ValueError:
        return False
    host = getattr(host, "ipv4_mapped", None) or host
    if allowed is None:
        return not (host.is_loopback or host.is_link_local or host.is_unspecified or host.is_multicast)
    return any(host in ip_network(network) for network in allowed)
