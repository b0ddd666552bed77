"""An address that stands for several servers, of which its page shows one."""

from __future__ import annotations

from collections import deque
from dataclasses import replace

import pytest

from extproc.admission.load import Load
from extproc.admission.servers import MOST, Servers
from extproc.admission.ticket import State, Ticket
from extproc.admission.values import Answer, Request

from .desk import Desk, one

SLOTS = 16
TOOK_S = 4


class Address:
    """`servers` of SLOTS slots each behind the endpoint `a`; each request is the next one's. Seconds are turns.

    `counts`: whether the page has counters, too. `unread`: so many answers that are written are not read yet.
    """

    def __init__(self, desk: Desk, servers: int, *, rate: int, counts: bool = True, unread: int = 0) -> None:
        self.desk = desk
        self.rate = rate
        self.counts = counts
        self.slow_readers = unread
        self.servers: list[deque[tuple[Ticket, int]]] = [deque() for _ in range(servers)]
        self.unread: deque[Ticket] = deque()
        self.waiting: list[Ticket] = []
        self.next = 0

    def turn(self, second: int) -> Load:
        """Let a second pass; return the first server's page."""
        begun = 0
        for server in self.servers:
            while server and server[0][1] <= second:
                self.unread.append(server.popleft()[0])
        while len(self.unread) > self.slow_readers:
            self.desk.release(self.unread.popleft(), Answer.OK)
        self.waiting += [self.desk.ask(f"{second}-{number}") for number in range(self.rate)]
        for ticket in [ticket for ticket in self.waiting if self.desk.where(ticket)]:
            self.waiting.remove(ticket)
            server = self.servers[self.next]
            begun += self.next == 0
            at = max(second, server[-SLOTS][1]) if len(server) >= SLOTS else second
            server.append((ticket, at + TOOK_S))
            self.next = (self.next + 1) % len(self.servers)
        held = len(self.servers[0])
        running = min(held, SLOTS)
        load = Load(running=running, waiting=held - running)
        return replace(load, first_tokens=begun, tokens_per_s=25.0 * running) if self.counts else load

    def run(self, seconds: int) -> None:
        for second in range(seconds):
            load = self.turn(second)
            self.desk.advance(0.9)
            self.desk.observe("a", load)
            self.desk.advance(0.1)


@pytest.mark.parametrize("servers", [1, 2, 5])
def test_several_servers_behind_one_address_are_all_used(servers: int) -> None:
    """On real Envoy, of two with 16 slots each 16 slots were used in all: first tokens came after 30 s for .2 s."""
    desk = Desk(one(limit=None))
    address = Address(desk, servers, rate=servers * SLOTS // TOOK_S - 1)
    address.run(120)
    endpoint = desk.endpoint("a")
    assert endpoint.servers.count == servers
    assert not address.waiting
    assert endpoint.limit.value >= servers * SLOTS * 3 // 4


def test_answers_that_are_written_and_not_read_yet_are_no_other_server() -> None:
    desk = Desk(one(limit=None))
    address = Address(desk, 1, rate=3, unread=SLOTS)
    address.run(60)
    assert len(address.unread) >= SLOTS
    assert desk.endpoint("a").servers.count == 1


def test_a_third_that_a_page_without_counters_does_not_show_is_no_other_server() -> None:
    """Bodies on their way, answers that are read slowly: a quarter made two of one, and then a tenth was enough."""
    desk = Desk(one(limit=None))
    address = Address(desk, 1, rate=6, counts=False, unread=SLOTS // 3)
    address.run(40)
    endpoint = desk.endpoint("a")
    assert len(address.unread) == SLOTS // 3
    assert endpoint.servers.count == 1
    endpoint.servers.count = 2
    address.run(60)
    assert endpoint.servers.count == 1


def test_a_page_of_nobody_while_nothing_is_answered_is_that_of_a_server_that_hangs() -> None:
    """It was taken for ever more servers, and their batch sizes for its own: it got eight more each half minute."""
    desk = Desk(one(limit=None))
    Address(desk, 1, rate=4, counts=False).run(40)
    for _ in range(60):
        desk.observe("a", Load(running=0, waiting=0))
        desk.advance(1.0)
    assert desk.endpoint("a").leases
    assert desk.endpoint("a").servers.count == 1


def test_at_another_address_there_is_one_server_until_its_page_shows_otherwise() -> None:
    """Who names each server, as the log says to, had the first one's page taken for all for a minute."""
    desk = Desk(one(limit=None, address="10.0.0.1:80"))
    address = Address(desk, 2, rate=7)
    address.run(40)
    endpoint = desk.endpoint("a")
    assert endpoint.servers.count == 2
    desk.observe("a", Load(running=SLOTS, waiting=4, kv_capacity_tokens=9000))
    assert endpoint.kv.capacity == 18_000
    desk.put(one(limit=None, address="10.0.0.2:80"))
    assert (endpoint.servers.count, endpoint.kv.capacity) == (1, None)
    desk.observe("a", Load(running=SLOTS, waiting=4))
    assert endpoint.reading.page == Load(running=SLOTS, waiting=4)


def test_the_page_of_an_idle_server_is_not_believed_to_be_that_of_one_at_work() -> None:
    """It says that nobody runs there; a limit that follows it stays where it started for ever."""
    desk = Desk(one(limit=None))
    address = Address(desk, 1, rate=3)
    for second in range(60):
        address.turn(second)
        desk.advance(0.9)
        desk.observe("a", Load(running=0, waiting=0, first_tokens=0, tokens_per_s=0.0, kv_capacity_tokens=9000))
        desk.advance(0.1)
    endpoint = desk.endpoint("a")
    assert endpoint.servers.count == MOST
    assert endpoint.limit.blind
    assert endpoint.kv.capacity is None, "nor is the size of its cache, which held theirs to it"


def test_a_page_that_is_not_believed_takes_the_gpus_use_not_along_which_another_page_tells() -> None:
    """An endpoint with a limit for it was sent whatever came."""
    desk = Desk(one(limit=100), max_gpu_usage=0.9)
    desk.fill(1)
    desk.endpoint("a").servers.count = MOST
    desk.observe("a", Load(running=0, waiting=0, gpu_usage=0.95))
    assert desk.ask().state is State.WAITING
    assert desk.endpoint("a").reading.page == Load(gpu_usage=0.95)


def test_where_no_page_tells_what_runs_none_tells_of_several_servers() -> None:
    """Of an engine without a page only its GPU's is read: 32 servers were seen, and their GPU's use was not."""
    desk = Desk(one(limit=None), max_gpu_usage=0.9)
    address = Address(desk, 1, rate=3)
    for second in range(60):
        address.turn(second)
        desk.advance(0.9)
        desk.observe("a", Load(gpu_usage=0.5))
        desk.advance(0.1)
    assert desk.endpoint("a").servers.count == 1


def test_one_that_is_named_alone_is_found_to_be_one() -> None:
    """The Service became one server's."""
    desk = Desk(one(limit=None))
    Address(desk, 3, rate=9).run(60)
    endpoint = desk.endpoint("a")
    assert endpoint.servers.count == 3
    for ticket in list(endpoint.leases):
        desk.release(ticket, Answer.OK)
    Address(desk, 1, rate=3).run(200)
    assert endpoint.servers.count == 1


def test_whose_requests_are_there_is_seen_on_the_page_as_it_is() -> None:
    """Connections fall unevenly: twice what one of two shows may be more than there is, and is nobody else's."""
    desk = Desk(one(limit=None))
    endpoint = desk.endpoint("a")
    endpoint.servers.count = 2
    desk.fill(4)
    endpoint.meet_again()
    desk.observe("a", Load(running=3, waiting=0))
    assert endpoint.reading.page == Load(running=6, waiting=0)
    assert endpoint.foreign == 0


@pytest.mark.parametrize(
    ("before", "shown", "servers"), [(1, 64, 1), (1, 61, 2), (2, 70, 2), (2, 73, 1), (2, 39, 2), (2, 38, 3)]
)
def test_what_is_shown_must_be_far_off_a_number_of_servers_for_there_to_be_another(before, shown, servers) -> None:
    """Of a hundred of ours; so a number doesn't come and go."""
    found = Servers()
    found.count = before
    leases = [Ticket(Request("", 0.0)) for _ in range(100)]  # long ago
    found.follow(Load(running=shown), leases, 100, 100, 1.0, 0)
    assert found.count == servers
