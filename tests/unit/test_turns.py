"""No page takes the event loop for long, however many endpoints there are and requests that wait.

Counted in calls of functions, which no other work on the machine changes: a call is some tenth of a microsecond, and
8,000 are one millisecond. `make bench-turns` has the times.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import sys
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp.test_utils import make_mocked_request

from bench.scrape import vllm_page
from extproc.admin.http import Admin
from extproc.admin.shared import Shared
from extproc.admin.text import pieces
from extproc.admission.controller import Controller
from extproc.admission.load import Load
from extproc.admission.ticket import Ticket
from extproc.admission.values import EndpointSpec, Policy, Request, RequestClass
from extproc.app import App
from extproc.config import HealthCheckConfig
from extproc.endpoints.health import HealthChecks
from extproc.endpoints.telemetry.engines import ENGINES
from extproc.endpoints.telemetry.page import Reader
from extproc.endpoints.telemetry.rates import Rates
from extproc.endpoints.telemetry.readings import Readings
from extproc.observe.capacity import Capacity
from extproc.observe.metrics import Metrics
from extproc.stream.gate import Gate
from extproc.tasks import Tasks
from tests.unit.endpoint_lists import config, endpoint

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

    from extproc.config import Config

ENDPOINTS, WAITING, CLIENTS = 300, 6_000, 20
MOST_CALLS = 8_000
MOST_OF_ONE = 37
"""Of each endpoint that a reload changes, in its moment."""
MOST_BYTES = 100_000
"""Of JSON or text made in one turn: a millisecond."""
CLASSES = (RequestClass("default", 0, 600.0), RequestClass("high", 5, 600.0))


class Clock:
    def time(self) -> float:
        return 100.0

    def call_at(self, when: float, callback: object) -> Clock:
        return self

    def cancel(self) -> None:
        pass


@pytest.fixture(scope="module")
def crowd() -> Admin:
    controller = Controller(Policy(classes=CLASSES, max_queued_requests=20_000, shed=False))
    metrics = Metrics(controller, lambda: 0, clock=Clock().time)
    gate = Gate(controller, Clock(), [metrics])
    for number in range(ENDPOINTS):
        gate.put_endpoint(EndpointSpec(f"vllm-{number}", max_running_requests=1))
        gate.set_up(f"vllm-{number}", is_up=True)
        gate.observe(f"vllm-{number}", Load(running=1, waiting=0, kv_usage=0.5))
    for number in range(ENDPOINTS + WAITING):
        gate.offer(Ticket(Request(f"id-{number}", 100.0, request_class=CLASSES[number % 2].name)))
    return Admin("127.0.0.1:0", gate, metrics)


def steps(step: Callable[[], object]) -> Iterator[int]:
    """Take steps until it raises StopIteration; give how many calls each made, hypothesis' at collections apart."""
    over = False
    while not over:
        calls = 0

        def count(_frame: object, event: str, _argument: object) -> None:
            nonlocal calls
            calls += event in ("call", "c_call")

        before = sys.getprofile()
        gc.disable()
        sys.setprofile(count)
        try:
            step()
        except StopIteration:
            over = True
        finally:
            sys.setprofile(before)
            gc.enable()
        yield calls


def test_no_turn_of_the_metrics_page_is_long(crowd):
    pages: list[bytes] = []
    made: list[Iterator[bytes]] = []

    def step() -> None:
        if made:
            pages.append(next(made[0]))
        else:
            made.append(crowd._metrics.pieces())

    assert max(steps(step)) < MOST_CALLS
    assert max(map(len, pages)) < MOST_BYTES
    assert b"".join(pages).count(b"extproc_endpoint_closed{") == 5 * ENDPOINTS


def turns_of(*asked: Coroutine[Any, Any, object]) -> tuple[list[int], list[object]]:
    """Run what is asked for in one moment on a loop; return how many calls each of its turns made, and the results."""
    loop = asyncio.new_event_loop()
    tasks = [loop.create_task(one) for one in asked]

    def turn() -> None:
        loop.call_soon(loop.stop)
        loop.run_forever()
        if all(one.done() for one in tasks):
            raise StopIteration

    try:
        return list(steps(turn)), [one.result() for one in tasks]
    finally:
        loop.close()


def test_no_turn_of_the_queues_is_long(crowd):
    assert max(turns_of(crowd.snapshot(500))[0]) < MOST_CALLS


def test_no_turn_of_the_live_page_is_long(crowd):
    assert max(turns_of(crowd.view())[0]) < MOST_CALLS


def test_pages_that_are_made_at_once_share_the_turns_and_do_not_make_them_longer(crowd):
    """Each had its piece in every turn: with engines' pages and a look for garbage that were 7 ms."""
    makers = crowd._write_metrics, lambda: crowd._write_queues(500), crowd.view
    alone = max(max(turns_of(make())[0]) for make in makers)
    assert max(turns_of(*(make() for make in makers))[0]) < 1.1 * alone


def test_the_history_looks_at_all_endpoints_once_in_a_turn_and_not_for_two_things(crowd):
    controller, clock = crowd.viewer._gate.controller, Clock().time
    alone = Admin("127.0.0.1:0", crowd.viewer._gate, crowd._metrics, capacity=Capacity(controller, clock))
    looks = alone.viewer.samples()
    history, *capacity, paces = steps(lambda: next(looks))
    assert history < ENDPOINTS
    assert max(paces, *capacity) < MOST_CALLS / 2


@pytest.mark.parametrize("path", ["/metrics", "/queues"])
def test_no_turn_is_long_however_many_ask_for_a_page_at_once(crowd, path):
    ask = {"/metrics": crowd._prometheus, "/queues": crowd._queues}[path]
    calls, made = turns_of(*(ask(make_mocked_request("HEAD", path)) for _ in range(CLIENTS)))
    assert max(calls) < MOST_CALLS
    assert len({id(one.body) for one in made}) <= 2, "who asks while a page is made gets the next one"


def test_who_asks_while_a_page_is_made_gets_one_that_was_begun_later_also_if_its_maker_leaves():
    async def play() -> None:
        shared, begun = Shared(), asyncio.Queue[int]()
        may_end = [asyncio.Event() for _ in range(6)]

        async def make() -> bytes:
            number = next(numbers)
            begun.put_nowait(number)
            await may_end[number].wait()
            return b"%d" % number

        numbers = itertools.count()
        first = asyncio.create_task(shared.page(make))
        assert await begun.get() == 0
        second, third = (asyncio.create_task(shared.page(make)) for _ in range(2))
        await asyncio.sleep(0)
        may_end[0].set()
        assert await first == b"0"
        assert await begun.get() == 1
        second.cancel()
        for one in may_end:
            one.set()
        assert await third == b"2"
        assert [await shared.page(make) for _ in range(2)] == [b"3", b"4"]

    asyncio.run(play())


def test_to_check_one_endpoint_more_costs_the_same_however_many_are_checked():
    async def play() -> list[int]:
        how = HealthCheckConfig.model_validate({"interval": "10s"})
        checks, costs = HealthChecks(lambda _name, **_: None, how, Tasks(), lambda _: None), []
        await checks.start()
        for number in range(ENDPOINTS):

            def step(number: int = number) -> None:
                checks.put(f"e{number}", f"10.0.0.1:{number}")
                raise StopIteration

            costs.append(next(steps(step)))
        await checks.stop()
        return costs

    costs = asyncio.run(play())
    assert costs[-1] <= costs[1]


def test_a_page_like_vllms_is_read_and_followed_in_few_calls():
    """With 500 endpoints this is done 500 times a second, whether there are requests or not: it was 395 calls."""
    controller, reader, rates = Controller(Policy()), Reader(ENGINES), Rates(10.0)
    controller.put_endpoints([EndpointSpec("engine")], 0.0)

    def scrape(number: int, page: bytes) -> None:
        with pytest.raises(StopIteration) as end:
            next(reader.read(page))
        assert isinstance(end.value.value, Readings)
        controller.observe("engine", rates.load(end.value.value, float(number)), float(number))

    for number in range(3):
        scrape(number, vllm_page(number))
    page = vllm_page(3)

    def step() -> None:
        scrape(3, page)
        raise StopIteration

    assert next(steps(step)) < 343


def test_json_is_written_in_short_pieces_that_together_are_it(crowd):
    view = asyncio.run(crowd.snapshot(500))
    parts = list(pieces(view))
    assert json.loads(b"".join(parts)) == view
    assert max(map(len, parts)) < MOST_BYTES
    assert [json.loads(b"".join(pieces(one))) for one in ({}, {"a": []}, {"a": [1], "b": {}})] == [
        {},
        {"a": []},
        {"a": [1], "b": {}},
    ]


def listed(*models: str, count: int = ENDPOINTS, **more: object) -> Config:
    keys = {"listen": "127.0.0.1:0", "admin": "127.0.0.1:0", "max_running_requests": 1}
    found = [endpoint(f"e{one}", f"10.0.0.1:{1000 + one}", models=list(models)) for one in range(count)]
    return config(**{**keys, **more}, endpoints=found)


@pytest.mark.parametrize(
    ("before", "after", "most_of_the_longest"),
    [
        pytest.param(listed("sim"), listed("sim", tenant_fairness=False), MOST_CALLS / 2, id="another order"),
        pytest.param(listed("sim"), listed("sim", max_running_requests=2), 5_000, id="other limits"),
        pytest.param(listed("sim", count=3), listed("sim"), 5_000, id="all but three come"),
        pytest.param(listed("sim"), listed("sim", count=3), MOST_OF_ONE * ENDPOINTS, id="all but three go"),
        pytest.param(listed("sim"), listed("sim", "other"), MOST_OF_ONE * ENDPOINTS, id="other models"),
    ],
)
def test_a_reload_of_all_endpoints_has_no_long_turn_but_the_one_in_which_models_change_or_endpoints_go(
    before, after, most_of_the_longest
):
    """Logs, scrapes, health checks and differences follow in turns of their own."""
    loop = asyncio.new_event_loop()
    app = App(before, loop)

    async def start() -> None:
        app.roster.start()

    def turn() -> None:
        loop.call_soon(loop.stop)
        loop.run_forever()
        if not app.roster._untold and not app.roster._pieces:
            raise StopIteration

    try:
        loop.run_until_complete(start())
        loop.call_soon(app.adopt, after)
        *others, longest = sorted(steps(turn))
        assert len(others) > 1
        assert others[-1] < 5_000
        assert longest < most_of_the_longest
        assert {name for name, one in app.gate.controller.endpoints.items() if not one.removed} == {
            one.name for one in after.endpoints
        }
    finally:
        loop.run_until_complete(app.roster.stop())
        loop.close()
