"""Mutual TLS between sidecars: who shows the pool's name by the pool's CA is one of us, and nobody else."""

from __future__ import annotations

import asyncio
import ssl
from typing import TYPE_CHECKING

import pytest
import trustme

from extproc.config import ReplicasTlsConfig
from extproc.errors import ConfigError
from extproc.replicas import messages as m
from extproc.replicas.links import TcpNetwork
from extproc.replicas.tls import MutualTls

from .kit.certificates import Mount, secret, serial
from .kit.processes import PATIENCE_S
from .kit.stack import local

if TYPE_CHECKING:
    from pathlib import Path

NAME = "sidecars.test"
HELLO = m.Hello(1, "pool", m.Member("one", "127.0.0.1:1", 1), m.Purpose.FOLLOW, 0, 1, frozenset())


class Door:
    """Stands where a replica stands."""

    def __init__(self) -> None:
        self.said: list[m.Message] = []

    def accept(self, _link: m.Link) -> Door:
        return self

    def receive(self, message: m.Message) -> None:
        self.said.append(message)

    def closed(self) -> None:
        pass


def mounted(directory: Path, files: dict[str, bytes]) -> Mount:
    mount = Mount(directory)
    mount.put(files)
    return mount


def tls(mount: Mount) -> MutualTls:
    cert, key, ca = (mount.path(name) for name in ("tls.crt", "tls.key", "ca.crt"))
    return MutualTls(ReplicasTlsConfig(cert_file=cert, key_file=key, ca_file=ca, server_name=NAME))


def network(one: MutualTls) -> TcpNetwork:
    loop = asyncio.get_running_loop()
    return TcpNetwork(loop, client_tls=one.client, server_tls=one.server, server_name=one.server_name)


async def exchange(ours: MutualTls, theirs: MutualTls) -> tuple[list[m.Message], int]:
    """What arrives at us of one hello of theirs, and how often they were told of an end."""
    door, ended = Door(), []
    here, there = network(ours), network(theirs)
    address = local()
    await here.listen(address, door)
    there.dial(address, lambda _: None, lambda: ended.append(1)).send(HELLO)
    async with asyncio.timeout(PATIENCE_S):
        while not door.said and not ended:  # noqa: ASYNC110 - one or the other
            await asyncio.sleep(0.002)
    await there.close()
    await here.close()
    return door.said, len(ended)


def test_two_sidecars_of_one_ca_and_name_understand_each_other(tmp_path):
    ca = trustme.CA()
    one = tls(mounted(tmp_path / "one", secret(ca, NAME)))
    two = tls(mounted(tmp_path / "two", secret(ca, NAME)))
    assert asyncio.run(exchange(one, two)) == ([HELLO], 0)


@pytest.mark.parametrize("stranger", ["another name", "another CA", "the server has another name"])
def test_a_stranger_is_not_heard(tmp_path, stranger):
    ca = trustme.CA()
    good = mounted(tmp_path / "good", secret(ca, NAME))
    envoys = mounted(tmp_path / "envoys", secret(ca, "envoy.test"))
    other = mounted(tmp_path / "other", secret(trustme.CA(), NAME, trusted=ca))
    ours, theirs = {
        "another name": (good, envoys),
        "another CA": (good, other),
        "the server has another name": (envoys, good),
    }[stranger]
    said, ended = asyncio.run(exchange(tls(ours), tls(theirs)))
    assert (said, ended) == ([], 1)


def test_a_rotated_certificate_is_shown_from_the_next_connection_on(tmp_path):
    ca = trustme.CA()
    mount = mounted(tmp_path / "one", secret(ca, NAME))
    one = tls(mount)
    fresh = secret(ca, NAME)

    async def shown() -> int:
        here, address = network(one), local()
        await here.listen(address, Door())
        host, _, port = address.rpartition(":")
        _, writer = await asyncio.open_connection(host, int(port), ssl=one.client(), server_hostname=NAME)
        found: ssl.SSLObject = writer.get_extra_info("ssl_object")
        number = int(str((found.getpeercert() or {})["serialNumber"]), 16)
        writer.close()
        await here.close()
        return number

    before = asyncio.run(shown())
    mount.put(fresh)
    assert asyncio.run(shown()) == serial(fresh) != before


def test_files_that_do_not_fit_are_named_by_their_keys_at_the_start(tmp_path):
    ca = trustme.CA()
    mount = mounted(tmp_path / "one", {**secret(ca, NAME), "tls.key": secret(ca, NAME)["tls.key"]})
    with pytest.raises(ConfigError, match=r"replicas\.tls\.key_file: .* is not the key of the certificate"):
        tls(mount)
