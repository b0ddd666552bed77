"""What a completion queue has to tell, dealt with one by one. Compiled in compiled wheels: a request has five of it."""

from __future__ import annotations

import logging
from typing import Any, Final

log = logging.getLogger("extproc.completion")

WAKE: Final = object()
"""The tag of an event that says: look at the files."""


class Events:
    """The events of `queue`; each is given to its tag, which is called.

    Attributes:
        until: how long to wait, by the wall clock; 0 is long ago, that is: don't; None: for ever.
    """

    def __init__(self, queue: Any) -> None:
        """Wait on `queue`."""
        self.until: float | None = 0
        self._poll = queue.poll

    def take(self, most: int) -> bool:
        """Deal with so many events at most, and wait for the first ones; tell whether one said to look at the files."""
        for _ in range(most):
            event = self._poll(self.until)
            tag = event.tag
            if tag is None:  # only the event that says "nothing" has none
                return False
            if tag is WAKE:
                return True
            try:
                tag(event)
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException:  # as asyncio has it: one request's bug must not cost the others
                log.exception("an event of a stream could not be dealt with: please report it")
        return False
