"""The configuration file, followed: a change of its content, or SIGHUP, reads it again.

Polled, not inotify: it works on every file system, for files replaced by a rename and for the symlinks that Kubernetes
swaps in a ConfigMap. Read in a thread: a file system that hangs must not stop the queue.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING

from extproc.errors import ConfigError
from extproc.files import read_regular, signature_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from extproc.config import Config
    from extproc.files import Signature

log = logging.getLogger("extproc.reload")

POLL_S = 1.0
STILL_S = 0.1
"""A file that was just changed is read once it has not changed for this long: somebody may be writing it."""
STILL_LOOKS = 20


class ConfigFile:
    """Reads a configuration file again when it changes."""

    def __init__(
        self,
        path: Path,
        load: Callable[[], Config],
        adopt: Callable[[Config], Awaitable[None]],
        count: dict[str, int],
    ) -> None:
        """Call `load` after each change and `adopt` with what it returned; count "success" and "failure".

        Both may raise ConfigError; then the old configuration stays.
        """
        self.is_refused = False  # it has mistakes, and an older one is in force
        self._path = path
        self._load = load
        self._adopt = adopt
        self._count = count
        self._poke = asyncio.Event()

    def poke(self) -> None:
        """Read it now, changed or not."""
        self._poke.set()

    async def run(self, current: Config) -> None:
        """Follow the file for ever; `current` is what was read from it last."""
        signature: Signature = None
        content: bytes | None = None
        first = True
        while True:
            asked = self._poke.is_set()
            self._poke.clear()
            seen = await asyncio.to_thread(self._signature)
            if asked or first or seen != signature:
                signature = await self._still(seen)
                fresh_content = await asyncio.to_thread(self._content)
                if asked or fresh_content != content:
                    content = fresh_content
                    await self._read(content, current if first else None)
            first = False
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._poke.wait(), POLL_S)

    async def _read(self, content: bytes | None, known: Config | None) -> None:
        """Load and adopt, if there is `content`; `known` is nothing new."""
        failure = None
        try:
            config = await asyncio.to_thread(self._load_from, content)
            if config == known:
                self.is_refused = False
                return
            await self._adopt(config)
        except ConfigError as error:
            failure = error
        except Exception as error:  # whatever it is, the next change must still be read
            log.exception("a bug of ours: please report it")
            failure = ConfigError(str(self._path), [f"can't be taken over: {error or type(error).__name__}"])
        self.is_refused = failure is not None
        self._count["success" if failure is None else "failure"] += 1
        if failure is not None:
            for problem in failure.problems:
                log.error("%s: %s", failure.source, problem)
            log.error("the configuration stays as it was: %d problem(s)", len(failure.problems))

    def _load_from(self, content: bytes | None) -> Config:
        if content is None:  # loading it could block for ever
            raise ConfigError(str(self._path), ["can't be read, or is no regular file"])
        return self._load()

    async def _still(self, signature: Signature) -> Signature:
        for _ in range(STILL_LOOKS):
            await asyncio.sleep(STILL_S)
            later = await asyncio.to_thread(self._signature)
            if later == signature:
                break
            signature = later
        return signature

    def _signature(self) -> Signature:
        return signature_of(self._path)

    def _content(self) -> bytes | None:
        try:
            return read_regular(self._path)
        except OSError:
            return None
