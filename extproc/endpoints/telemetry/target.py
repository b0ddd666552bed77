"""What is scraped for one endpoint."""

from __future__ import annotations

from dataclasses import dataclass

from extproc.endpoints.access import NOTHING, Access


@dataclass(frozen=True, slots=True)
class Target:
    """One endpoint's pages.

    Attributes:
        name: the endpoint's name.
        url: the engine's metrics page.
        engine: a name of the table in engines.py, `auto`, or `none`: the engine's page isn't read.
        gpu_url: page of a DCGM exporter.
        gpu_labels: labels of the series there that belong to this endpoint, such as `gpu` or `Hostname`.
        own: what a line may say to name this endpoint: its address and its models.
        base: where the server itself is, http://ADDRESS; None: it is asked for nothing but its metrics.
        access: what the metrics page needs to be shown.
    """

    name: str
    url: str
    engine: str = "auto"
    gpu_url: str | None = None
    gpu_labels: tuple[tuple[str, str], ...] = ()
    own: frozenset[str] = frozenset()
    base: str | None = None
    access: Access = NOTHING
