"""A slice of the end-to-end tests again, on the transport that is not the default. All of them, on one of choice:
`EXTPROC_TRANSPORT=completion_queue pytest tests/e2e`.
"""

from __future__ import annotations

import pytest

from extproc.config import Config

from .test_hold import test_1200_requests_held_at_once_all_finish  # noqa: F401
from .test_protocol import *  # noqa: F403  # all of them, and their fixtures

OTHER = {"asyncio": "completion_queue", "completion_queue": "asyncio"}[Config().transport]


@pytest.fixture(scope="module", autouse=True)
def transport():
    """Have every sidecar that this file starts use the other transport: its environment wins over its file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EXTPROC_TRANSPORT", OTHER)
        yield OTHER


def test_it_is_the_other_transport_that_serves(stack, transport):
    here = stack()
    assert ("transport completion_queue: in use" in here.sidecar.child.output()) == (transport == "completion_queue")
