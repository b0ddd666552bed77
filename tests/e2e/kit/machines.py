"""Machines of their own for sidecars: network namespaces on one bridge, between which nothing gets through when cut.

A cut is a neighbour with an address that nobody has: packets leave, never arrive, and nobody is told.
Needs root and iproute2.
"""

from __future__ import annotations

import os
import random
import subprocess
from itertools import count

import pytest

from tests.conftest import TOOL_MISSING, tool

from .processes import PATIENCE_S

_NOBODY = "02:00:00:00:00:99"
_NUMBERS = count()


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=PATIENCE_S)
    if done.returncode != 0:
        raise AssertionError(f"ip {' '.join(words)}: {done.stderr}")


class Machines:
    """So many namespaces, while `with` lasts. The test, the engines and the store have an address each on the bridge.

    Attributes:
        home, engines, store: addresses here, outside all namespaces.
        addresses: of the machines, in order.
    """

    def __init__(self, machines: int) -> None:
        tool("ip", "iproute2")
        if os.geteuid() != 0:
            pytest.skip(f"{TOOL_MISSING}root, to make network namespaces")
        self._name = f"xp{os.getpid() % 100_000}-{next(_NUMBERS)}"  # an interface has at most 15 characters
        net = f"10.213.{random.randrange(256)}"
        self.home, self.engines, self.store = (f"{net}.{host}" for host in (1, 2, 3))
        self.addresses = [f"{net}.{11 + number}" for number in range(machines)]

    def __enter__(self) -> Machines:
        try:
            self._make()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._remove()

    def _make(self) -> None:
        bridge = self._name
        _ip("link", "add", bridge, "type", "bridge")
        for address in (self.home, self.engines, self.store):
            _ip("address", "add", f"{address}/24", "dev", bridge)
        _ip("link", "set", bridge, "up")
        for number, address in enumerate(self.addresses):
            space, plug = self._space(number), f"{bridge}{chr(ord('a') + number)}"
            _ip("netns", "add", space)
            _ip("link", "add", plug, "master", bridge, "type", "veth", "peer", "name", "eth0", "netns", space)
            _ip("link", "set", plug, "up")
            _ip("-n", space, "address", "add", f"{address}/24", "dev", "eth0")
            _ip("-n", space, "link", "set", "eth0", "up")
            _ip("-n", space, "link", "set", "lo", "up")

    def _remove(self) -> None:
        for number in range(len(self.addresses)):
            subprocess.run(["ip", "netns", "del", self._space(number)], capture_output=True, timeout=PATIENCE_S)
        subprocess.run(["ip", "link", "del", self._name], capture_output=True, timeout=PATIENCE_S)

    def _space(self, number: int) -> str:
        return f"{self._name}-{number}"

    def inside(self, number: int) -> list[str]:
        """What to put before a command so that it runs on machine `number`."""
        return ["ip", "netns", "exec", self._space(number)]

    def cut(self, number: int, *addresses: str) -> None:
        """Let nothing of machine `number` reach `addresses`, other machines' or ours."""
        for address in addresses:
            entry = ("lladdr", _NOBODY, "dev", "eth0", "nud", "permanent")
            _ip("-n", self._space(number), "neighbour", "replace", address, *entry)

    def mend(self) -> None:
        """Let all reach all again."""
        for number in range(len(self.addresses)):
            _ip("-n", self._space(number), "neighbour", "flush", "nud", "permanent")
