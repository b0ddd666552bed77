"""These tests need a Kubernetes API server, which `make test-kubernetes` builds; a plain pytest leaves them out.

One needs KEDA's operator too: `make test-keda`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from .cluster import Cluster

if TYPE_CHECKING:
    from collections.abc import Iterator

SERVER = os.environ.get("EXTPROC_KUBERNETES", "")
OPERATOR = os.environ.get("EXTPROC_KEDA", "")
ADAPTER = f"{OPERATOR}-adapter"
"""Its server of metrics, built beside it."""
collect_ignore_glob = ["test_keda.py"] if SERVER else ["test_*.py"]
if SERVER and OPERATOR:
    collect_ignore_glob = []


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One API server for all tests; each test has a namespace of its own."""
    with Cluster(Path(SERVER), tmp_path_factory.mktemp("cluster")) as running:
        yield running
