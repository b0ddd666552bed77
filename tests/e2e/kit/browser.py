"""A real headless Chromium, driven over the Chrome DevTools protocol: a WebSocket, which aiohttp speaks already."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import aiohttp

from .processes import PATIENCE_S, Child, wait_until

if TYPE_CHECKING:
    from pathlib import Path

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-proxy-server"),
    *("--disable-features=Translate,OptimizationHints,MediaRouter", "--hide-scrollbars", "--remote-debugging-port=0"),
)


class Browser:
    """One Chromium with a profile of its own and one tab, while `with` lasts.

    errors      messages of exceptions, of console.error and of the browser's own log (CSP violations, failed requests)
    requests    URLs of everything that the tab asked for
    """

    def __init__(self, binary: str, directory: Path) -> None:
        profile = directory / "chromium"
        argv = [binary, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        self.child = Child(argv, directory / "chromium.log", name="chromium", env={"HOME": str(directory)})
        self.errors: list[str] = []
        self.requests: list[str] = []
        self._number = 0
        self._loop = asyncio.new_event_loop()

    def __enter__(self) -> Browser:
        self.child.start()
        try:
            # The log is read as a whole: Chromium may say a few lines about D-Bus before.
            devtools = self.child.wait_line(r"DevTools listening on ws://(\S+?)/").group(1)
            self._run(self._connect(devtools))
            for domain in ("Page", "Runtime", "Network", "Log"):
                self.send(f"{domain}.enable")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if hasattr(self, "_socket"):
            self._run(self._close())
        self._loop.close()
        self.child.stop()

    async def _connect(self, devtools: str) -> None:
        self._session = aiohttp.ClientSession()
        async with self._session.get(f"http://{devtools}/json/list") as answer:
            tabs = [tab for tab in await answer.json() if tab["type"] == "page"]
        self._socket = await self._session.ws_connect(tabs[0]["webSocketDebuggerUrl"], max_msg_size=0)

    async def _close(self) -> None:
        await self._socket.close()
        await self._session.close()

    def _run(self, work: Any) -> Any:
        return self._loop.run_until_complete(work)

    # ---- the protocol

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method and return its result; events that come before are noted."""
        return dict(self._run(self._send(method, parameters)))

    async def _send(self, method: str, parameters: dict[str, Any]) -> dict[str, Any]:
        self._number += 1
        await self._socket.send_json({"id": self._number, "method": method, "params": parameters})
        async with asyncio.timeout(PATIENCE_S):
            while True:
                message = await self._socket.receive_json()
                if message.get("id") == self._number:
                    if "error" in message:
                        raise AssertionError(f"{method}: {message['error']}")
                    return dict(message["result"])
                self._note(message)

    def _note(self, message: dict[str, Any]) -> None:
        event = message.get("params", {})
        match message.get("method"):
            case "Runtime.exceptionThrown":
                details = event["exceptionDetails"]
                self.errors.append(details.get("exception", {}).get("description") or details["text"])
            case "Runtime.consoleAPICalled" if event["type"] in ("error", "warning", "assert"):
                self.errors.append(str([one.get("value") for one in event["args"]]))
            case "Log.entryAdded" if event["entry"]["level"] in ("error", "warning"):
                self.errors.append(f"{event['entry']['text']} {event['entry'].get('url', '')}")
            case "Network.requestWillBeSent":
                self.requests.append(event["request"]["url"])
            case _:
                pass

    # ---- what tests do

    def size(self, width: int, height: int, *, phone: bool = False) -> None:
        """Give the tab this many CSS pixels."""
        scale = 2 if phone else 1
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=phone
        )

    def dark(self, *, on: bool) -> None:
        """Prefer dark or light colours."""
        value = "dark" if on else "light"
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": value}])

    def open(self, url: str) -> None:
        """Go to `url` and wait until it is loaded."""
        failed = self.send("Page.navigate", url=url).get("errorText")
        assert not failed, f"{url}: {failed}"
        self.wait(f"document.readyState === 'complete' && location.href.startsWith({url!r})")

    def value(self, script: str) -> Any:
        """What a JavaScript expression is, as JSON."""
        result = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            raise AssertionError(f"{script}: {result['exceptionDetails']}")
        return result["result"].get("value")

    def wait(self, script: str, timeout_s: float = PATIENCE_S) -> Any:
        """Wait until a JavaScript expression is true; return what it is."""
        return wait_until(lambda: self.value(script), timeout_s, message=script)

    def text(self, selector: str = "body") -> str:
        """The text that a person sees in the first element that matches; "" without one."""
        return str(self.value(f"document.querySelector({selector!r})?.innerText ?? ''"))
