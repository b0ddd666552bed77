"""What an endpoint picker costs where bodies come through it, and where they don't; `make bench-transport` runs it too.

    python -m bench.pieces [cpu] [memory] [--held 100] [--only PART]

Envoy as the control planes of Inference Gateways set it up (tests/e2e/kit/gateways.py), the whole sidecar, two scripted
engines. Full duplex: each piece of both bodies is a message to us and one back. Lean: two messages a request. Tokens
come 1 ms apart, so that each is a piece; requests come one after the other.

cpu     CPU of sidecar and Envoy per request, by length of the answer and of the body; and what one piece costs
memory  KiB per held request by size of its body, of sidecar and Envoy
"""

from __future__ import annotations

import argparse
import contextlib
import selectors
import socket
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.transport import cpu_s, row, rss_kib
from tests.e2e.kit.clients import H1Request
from tests.e2e.kit.picking import Picking
from tests.e2e.kit.stack import local
from tests.e2e.kit.upstream import behave

if TYPE_CHECKING:
    from collections.abc import Iterator

GAP_S = 0.001
WARM = 20
WORK = ((1, 1_000, 200), (100, 1_000, 10), (10_000, 1_000, 1), (1, 1_000_000, 20))
"""Tokens, bytes of body, and how many requests."""
BODIES = (1_000, 1_000_000)
STILL_S = 1.0
"""A client that could send nothing for so long has sent what is taken of it."""


@dataclass(frozen=True)
class Way:
    """A kind of gateway, and how it reaches us."""

    name: str
    kind: str
    config: dict[str, Any] = field(default_factory=dict)
    how: dict[str, Any] = field(default_factory=dict)


TLS = {"tls": {"self_signed": True}}
COST = (
    Way("full duplex, unix socket", "istio"),
    Way("full duplex, TCP", "istio", {"listen": ""}),
    Way("full duplex, TCP and TLS", "istio", TLS, {"tls": True}),
    Way("full duplex, unix socket, transport: asyncio", "istio", {"transport": "asyncio"}),
    Way("lean, unix socket", "istio-lean"),
    Way("buffered for `read_model`, unix socket", "istio-reading", {"picker": {"read_model": True}}),
    Way(
        "buffered, then lean (AI Gateway), TCP and TLS",
        "ai-gateway-buffered",
        TLS,
        {"tls": True, "buffer_bytes": 2 << 20},
    ),
)
HOLD = (
    Way("full duplex (Istio)", "istio"),
    Way("full duplex, 32 KiB buffers (AI Gateway, llm-d's chart)", "ai-gateway"),
    Way("lean", "istio-lean"),
    Way("buffered, then lean (AI Gateway, 2 MiB buffers)", "ai-gateway-buffered", {}, {"buffer_bytes": 2 << 20}),
)


@contextlib.contextmanager
def running(way: Way) -> Iterator[tuple[Picking, str]]:
    """A picker with its engines, and where clients of that gateway send."""
    config = {key: value or local() for key, value in way.config.items()}
    budget = {"classes": [{"name": "default", "budget": "5m"}]}
    with tempfile.TemporaryDirectory() as directory, Picking(Path(directory), config={**budget, **config}) as here:
        yield here, here.gateway(way.kind, **way.how)


def cpu(only: str) -> None:
    """Print the table of CPU, of all ways or `only` some."""
    print("\n## CPU µs per request, one after the other; a piece: (10,000 tokens - 1 token) / messages between\n")
    names = [f"{tokens:,} token{'s' * (tokens > 1)}, {size // 1000:,} KB" for tokens, size, _ in WORK]
    row("", *names, "a piece", *(f"Envoy: {name}" for name in names))
    row(*["---"] * (2 + 2 * len(names)))
    for way in [one for one in COST if only in one.name]:
        with running(way) as (here, address):
            envoy = here.envoy(way.kind, **way.how)
            _ask(address, 1, 1_000, WARM)
            ours, theirs, messages = [], [], []
            for tokens, size, count in WORK:
                before = cpu_s(here.sidecar.child), cpu_s(envoy.child), _messages(envoy)
                _ask(address, tokens, size, count)
                after = cpu_s(here.sidecar.child), cpu_s(envoy.child), _messages(envoy)
                spent = [(late - soon) / count for soon, late in zip(before, after, strict=True)]
                ours.append(spent[0] * 1e6)
                theirs.append(spent[1] * 1e6)
                messages.append(spent[2])
        more = messages[2] - messages[0]
        row(way.name, *ours, (ours[2] - ours[0]) / more if more > 100 else None, *theirs)


def _ask(address: str, tokens: int, size: int, count: int) -> None:
    body, headers = bytes(size), [behave("sse", events=tokens, gap_s=GAP_S)]
    for _ in range(count):
        with H1Request(address, headers=headers, body=body, timeout_s=120) as one:
            one.send().read_all()
            assert one.complete


def _messages(envoy: Any) -> int:
    """What Envoy has sent to the picker, in messages."""
    return sum(n for name, n in envoy.stats("http.ingress.ext_proc.").items() if name.endswith("stream_msgs_sent"))


def memory(held: int) -> None:
    """Print the table of memory."""
    print(f"\n## KiB per held request, {held} of them\n")
    row("", *(f"{who}, body {size // 1000:,} KB" for size in BODIES for who in ("sidecar", "Envoy")))
    row(*["---"] * (1 + 2 * len(BODIES)))
    for way in HOLD:
        found: list[float] = []
        for size in BODIES:
            with running(way) as (here, address):
                envoy = here.envoy(way.kind, **way.how)
                _ask(address, 1, 1_000, WARM)
                children = here.sidecar.child, envoy.child
                with contextlib.ExitStack() as open_now:
                    for n in range(2):
                        headers = [("x-test-id", f"first-{n}"), behave("sse", hold="body")]
                        open_now.enter_context(H1Request(address, headers=headers, body=b"{}")).send().read_chunk()
                    before = [rss_kib(child) for child in children]
                    _hold(address, held, size, open_now)
                    here.wait_waiting(held, timeout_s=20)
                    time.sleep(STILL_S)
                    found += [(rss_kib(child) - soon) / held for child, soon in zip(children, before, strict=True)]
        row(way.name, *found)


def _hold(address: str, count: int, size: int, open_now: contextlib.ExitStack) -> None:
    """Send `count` requests at once, as much of each as is taken."""
    host, _, port = address.rpartition(":")
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: bench\r\ncontent-length: {size}\r\n\r\n".encode()
    selector = selectors.DefaultSelector()
    for _ in range(count):
        client = open_now.enter_context(socket.create_connection((host, int(port))))
        client.setblocking(False)
        selector.register(client, selectors.EVENT_WRITE, memoryview(head + bytes(size)))
    while selector.get_map():
        ready = selector.select(STILL_S)
        if not ready:
            break
        for key, _ in ready:
            left = key.data[key.fileobj.send(key.data) :]  # type: ignore[union-attr]
            if left:
                selector.modify(key.fileobj, selectors.EVENT_WRITE, left)
            else:
                selector.unregister(key.fileobj)


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["cpu", "memory"], metavar="cpu|memory")
    parser.add_argument("--held", type=int, default=100)
    parser.add_argument("--only", default="", help="part of the name of a way, for cpu")
    arguments = parser.parse_args()
    parts = {"cpu": lambda: cpu(arguments.only), "memory": lambda: memory(arguments.held)}
    for part in arguments.parts:
        parts[part]()


if __name__ == "__main__":
    main()
