"""The live page in a real headless Chromium, and `extproc top` on a real terminal, before a real sidecar and Envoy."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest

from tests.conftest import tool

from .kit.browser import Browser
from .kit.clients import H1Request, H2Client, complete_many
from .kit.processes import PATIENCE_S, wait_until
from .kit.stack import Sidecar
from .kit.upstream import behave

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .kit.stack import Stack

CLASSES = [
    {"name": "default", "priority": 0, "budget": "60s"},
    {"name": "interactive", "priority": 10, "budget": "60s"},
]
CHECK = {"interval": "50ms", "timeout": "500ms", "unhealthy_threshold": 2}
HOSTILE = "<img src=x onerror=alert(1)>"
SHOWN = "!document.getElementById('main').hidden"


@pytest.fixture(scope="module")
def here(module_stack) -> Stack:
    return module_stack(upstreams=("a", "b"), config={"classes": CLASSES, "health_check": CHECK})


@pytest.fixture(scope="module")
def the_browser(tmp_path_factory) -> Iterator[Browser]:
    with Browser(tool("chromium", "chromium"), tmp_path_factory.mktemp("browser")) as browser:
        yield browser


@pytest.fixture
def page(here, the_browser) -> Iterator[Browser]:
    """The page, just opened; afterwards: the browser had nothing to complain of and asked nobody else."""
    the_browser.errors.clear()
    the_browser.requests.clear()
    the_browser.size(1366, 700)
    the_browser.dark(on=False)
    the_browser.open(f"http://{here.sidecar.admin}/")
    the_browser.wait(SHOWN)
    yield the_browser
    the_browser.value("1")  # takes in the last events
    assert the_browser.errors == []
    assert {urlsplit(url).netloc for url in the_browser.requests} == {here.sidecar.admin}


class Held:
    """Requests that stay where they are until `release`."""

    numbers = itertools.count()

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self._client = H2Client(stack.address)
        self._ids: list[str] = []

    def __enter__(self) -> Held:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.fin()
        self._stack.wait_idle()

    def send(self, count: int, **headers: str) -> None:
        for _ in range(count):
            self._ids.append(f"held-{next(self.numbers)}")
            more = [(name.replace("_", "-"), value) for name, value in headers.items()]
            self._client.request(headers=[("x-test-id", self._ids[-1]), behave(hold="head"), *more])

    def release(self) -> None:
        for upstream in self._stack.upstreams.values():
            for request_id in self._ids:
                upstream.release(request_id)


def test_waiting_requests_appear_class_by_class_and_go(here, page):
    page.wait("document.querySelectorAll('#classes .bars > i').length === 0")
    sent = here.outcomes("dispatched") + here.outcomes("passed")
    with Held(here) as held:
        held.send(2)
        here.wait_in_flight("a", 1)
        held.send(3, x_request_class="interactive")
        held.send(4)
        here.wait_waiting(7)
        page.wait("document.querySelectorAll('#classes .bars > i').length === 7")
        rows = page.value("[...document.querySelectorAll('#classes tbody tr')].map(row => row.innerText)")
        assert [re.sub(r"\s+", " ", row)[:12] for row in rows] == ["interactive ", "default prio"]
        assert page.text("#f-waiting") == "7"
        assert page.text("#f-flight") == "2"
        assert "1 / 1" in page.text("#endpoints")
        assert page.value("document.querySelectorAll('#waiting tbody tr').length") == 7
        held.release()
        page.wait("document.querySelectorAll('#classes .bars > i').length === 0")
        page.wait(f"document.getElementById('f-sent').textContent === '{sent + 9}'")
        assert page.text("#nobody") == "Nobody waits."


def test_what_is_sent_on_without_a_slot_counts_as_sent_and_not_as_refused(here, page):
    page.wait("/^[0-9]/.test(document.getElementById('f-refused').textContent)")
    refused, sent = page.text("#f-refused"), sum(here.outcomes(outcome) for outcome in ("dispatched", "passed"))
    with H1Request(here.address, "/version", method="GET") as lookup:
        lookup.send().read_all()
    page.wait(f"document.getElementById('f-sent').textContent === '{sent + 1}'")
    assert page.text("#f-refused") == refused


def test_an_endpoint_that_is_down_says_so_in_words_and_is_up_again(here, page):
    page.wait("/● up/.test(document.getElementById('endpoints').innerText)")
    here.upstreams["b"].down()
    try:
        page.wait("/✕ down/.test(document.getElementById('endpoints').innerText)")
        page.wait("document.getElementById('f-up').textContent === '1 of 2'")
    finally:
        here.upstreams["b"].up()
    page.wait("document.getElementById('f-up').textContent === '2 of 2'")


def test_what_clients_send_is_shown_as_text_and_is_never_markup(here, page):
    with Held(here) as held:
        held.send(2)
        here.wait_in_flight("b", 1)
        held.send(1, x_tenant_id=HOSTILE, x_model="<script>document.title='owned'</script>", x_request_id=HOSTILE)
        page.wait("document.querySelectorAll('#waiting tbody tr').length === 1")
        shown = page.text("#waiting")
        assert HOSTILE in shown
        assert "<script>document.title='owned'</script>" in shown
        assert page.value("document.querySelectorAll('img, main script').length") == 0
        assert page.value("document.title") == "The waiting room"


def test_nothing_scrolls_sideways_and_the_outcomes_are_seen_without_scrolling(here, page):
    with Held(here) as held:
        held.send(2)
        here.wait_in_flight("a", 1)
        held.send(30, x_tenant_id="t" * 80)
        here.wait_waiting(30)
        page.wait("document.querySelectorAll('#waiting tbody tr').length === 30")
        overflow = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        wide = "[...document.querySelectorAll('section')].filter(one => one.scrollWidth > one.clientWidth)"
        for width, height in ((1366, 700), (1310, 700), (1250, 700), (1120, 768), (1024, 768), (390, 844), (320, 640)):
            page.size(width, height, phone=width < 700)
            assert page.value(overflow) == 0, width
            assert page.value(f"{wide}.map(one => one.id)") == [], width
            if width > 1310:
                assert page.value("document.querySelector('#outcomes').getBoundingClientRect().bottom") <= height
            assert page.value("document.querySelector('#figures').getBoundingClientRect().bottom") <= height


CONTRASTS = """(() => {
  const light = colour => {
    const [r, g, b] = colour.match(/[\\d.]+/g).map(v => v / 255)
      .map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const ground = node => { for (; node; node = node.parentElement) {
    const colour = getComputedStyle(node).backgroundColor;
    if (!/, 0\\)$/.test(colour)) return colour;
  } return "rgb(255, 255, 255)"; };
  const bad = [];
  for (const node of document.querySelectorAll("body *")) {
    if (!node.checkVisibility() || ![...node.childNodes].some(one => one.nodeType === 3 && one.data.trim())) continue;
    const [a, b] = [light(getComputedStyle(node).color), light(ground(node))];
    const contrast = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    if (contrast < 4.5) bad.push(`${node.tagName} ${node.textContent.slice(0, 30)}: ${contrast.toFixed(2)}`);
  }
  return bad;
})()"""


def test_all_text_has_the_contrast_of_wcag_aa_in_light_and_dark(here, page):
    light = page.value("getComputedStyle(document.body).backgroundColor")
    here.upstreams["b"].down()
    try:
        page.wait("/✕ down/.test(document.getElementById('endpoints').innerText)")
        assert page.value(CONTRASTS) == []
        page.dark(on=True)
        assert page.value("getComputedStyle(document.body).backgroundColor") != light
        assert page.value(CONTRASTS) == []
    finally:
        here.upstreams["b"].up()
    page.wait("document.getElementById('f-up').textContent === '2 of 2'")


def test_a_refused_file_and_keys_that_need_a_restart_are_seen(tmp_path, the_browser):
    with Sidecar({"endpoints": []}, tmp_path) as sidecar:
        the_browser.open(f"http://{sidecar.admin}/")
        the_browser.wait(SHOWN)
        assert the_browser.value("document.getElementById('refused').hidden")
        assert the_browser.value("document.getElementById('restart').hidden")
        sidecar.write_config(server_timing=True)
        sidecar.child.signal(signal.SIGHUP)
        the_browser.wait("/a restart: server_timing$/.test(document.getElementById('restart').innerText)")
        sidecar.write_config(max_queued_requests=-1)
        sidecar.child.signal(signal.SIGHUP)
        the_browser.wait("!document.getElementById('refused').hidden")
        assert "The old one is in use" in the_browser.text("#refused")
        assert (sidecar.queues()["config_refused"], sidecar.queues()["restart_needed"]) == (True, ["server_timing"])
        for dark in (False, True):
            the_browser.dark(on=dark)
            assert the_browser.value(CONTRASTS) == []
        the_browser.dark(on=False)
        sidecar.write_config(max_queued_requests=7, server_timing=False)
        sidecar.child.signal(signal.SIGHUP)
        the_browser.wait("['refused', 'restart'].every(id => document.getElementById(id).hidden)")


@pytest.fixture
def forgotten(here, the_browser) -> Iterator[None]:
    """Afterwards the sidecar is another, which knows of no ejection, and no open page has missed it."""
    yield
    the_browser.open("about:blank")
    here.sidecar.child.stop()
    here.sidecar.start()


@pytest.mark.usefixtures("forgotten")  # before the page, so it ends after it
def test_an_ejected_endpoint_says_for_how_long(here, page):

    def says_so() -> bool:  # a machine that stalls while it is ejected sees it the next time, when it is for longer
        complete_many(here.url, 60, lambda _: dict([behave(status=500, at="a")]), gap_s=0.02)
        return bool(
            page.value("/■ ejected, back in [1-9][0-9]? s/.test(document.getElementById('endpoints').innerText)")
        )

    wait_until(says_so, message="ejected, and for how long")


def test_the_page_says_when_it_shows_the_past_and_comes_back_by_itself(here, the_browser):
    the_browser.open(f"http://{here.sidecar.admin}/")
    the_browser.wait(SHOWN)
    assert the_browser.text("#link") == "Live"
    here.sidecar.child.signal(signal.SIGSTOP)  # the connection stays, and nothing comes
    the_browser.wait(
        "/^No connection to the sidecar. What you see is [3-9] s old/.test(document.getElementById('alarm').innerText)"
    )
    assert the_browser.text("#link") == "No connection"
    here.sidecar.child.signal(signal.SIGCONT)
    the_browser.wait("document.getElementById('alarm').hidden")
    here.sidecar.child.stop()
    the_browser.wait("!document.getElementById('alarm').hidden")
    here.sidecar.start()
    the_browser.wait("document.getElementById('alarm').hidden")
    assert the_browser.text("#link") == "Live"


# ---- top


class Terminal:
    """`extproc top` on a terminal of 80x24; `screen` is what came since it was asked last."""

    def __init__(self, admin: str) -> None:
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "extproc", "top", "--admin", admin],
            stdin=subprocess.DEVNULL,
            stdout=theirs,
            stderr=theirs,
            env={**environment, "PYTHONIOENCODING": "utf-8"},
            start_new_session=True,
        )
        os.close(theirs)
        self.written = ""
        self._reading = threading.Thread(target=self._read, daemon=True)
        self._reading.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # its end
            while data := os.read(self._ours, 65536):
                self.written += data.decode(errors="replace")

    def screens(self) -> list[str]:
        """What it drew so far, a text for each time."""
        return [part.replace("\r", "") for part in re.split("\x1b\\[\\d+A\x1b\\[J", self.written)]

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait(PATIENCE_S)
        self._reading.join(PATIENCE_S)
        os.close(self._ours)


def test_top_fits_a_terminal_shows_no_control_codes_of_clients_and_waits_for_a_sidecar_that_went_away(here):
    with Held(here) as held:
        held.send(2)
        here.wait_in_flight("a", 1)
        held.send(40, x_tenant_id="evil\u009b2J\u202e", x_request_class="interactive")
        here.wait_waiting(40)
        with Terminal(here.sidecar.admin) as terminal:
            shown = "40 waiting, 2 in flight, 2 of 2 endpoints up"
            (screen, *_) = wait_until(lambda: [one for one in terminal.screens()[1:-1] if shown in one])
            rows = screen.rstrip("\n").split("\n")
            assert len(rows) <= 23, screen
            assert max(map(len, rows)) <= 80, screen
            assert shown in rows[0]
            assert "evil" in screen
            assert "\x9b" not in terminal.written
            assert "\u202e" not in terminal.written
            here.sidecar.child.stop()
            wait_until(lambda: "NO CONNECTION" in terminal.screens()[-1], message="it says so")
            here.sidecar.start()
            wait_until(lambda: "NO CONNECTION" not in terminal.screens()[-1], message="it comes back")
            os.kill(terminal.process.pid, signal.SIGINT)
            assert terminal.process.wait(PATIENCE_S) == 0
