"""Fixtures of the end-to-end tests: a whole stack per test, or one per module where many rows share it."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, Protocol

import pytest

from .kit.stack import Stack

if TYPE_CHECKING:
    from collections.abc import Iterator


class StackFactory(Protocol):
    """Starts a stack that lasts as long as the fixture. Arguments as of `kit.stack.Stack`, without the directory."""

    def __call__(self, **how: Any) -> Stack: ...


@contextlib.contextmanager
def _factory(temporary: pytest.TempPathFactory) -> Iterator[StackFactory]:
    with contextlib.ExitStack() as running:

        def start(**how: Any) -> Stack:
            return running.enter_context(Stack(temporary.mktemp("stack"), **how))

        yield start


@pytest.fixture
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StackFactory]:
    """Start stacks that end with the test: `stack(upstreams=("a", "b"), config={...})`."""
    with _factory(tmp_path_factory) as start:
        yield start


@pytest.fixture(scope="module")
def module_stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StackFactory]:
    """Start stacks that end with the test file."""
    with _factory(tmp_path_factory) as start:
        yield start
