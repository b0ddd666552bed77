"""What one metrics page says: `Readings`, or one `Reason` why it says nothing."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from extproc.endpoints.telemetry.lines import Series


class Reason(StrEnum):
    """Why a scrape told nothing: the `reason` label of extproc_scrape_errors_total."""

    CONNECT = "connect"  # no connection: refused, unreachable, name unknown, TLS
    TIMEOUT = "timeout"  # not whole within scrape_timeout
    PROTOCOL = "protocol"  # broken HTTP, or cut off
    STATUS = "status"  # neither 200 nor a redirect
    REDIRECT = "redirect"  # to another server, or too many
    CREDENTIALS = "credentials"  # metrics_token_file or metrics_ca_file can't be read
    ENCODING = "encoding"  # compressed, though we ask for plain text
    TOO_BIG = "too_big"  # above MOST_BYTES, or its wanted lines above MOST_WANTED_BYTES
    TOO_MANY_SERIES = "too_many_series"
    NO_METRICS = "no_metrics"  # no metric of the engine: HTML, another engine, binary
    SEVERAL_ENGINES = "several_engines"  # lines of two engines, and nothing says whose the endpoint is: set `engine`
    MALFORMED = "malformed"  # a wanted line is no sample
    ORCA = "orca"  # no page: a load report in an answer's header that can't be read, or tells nothing we know
    INTERNAL = "internal"  # a bug of ours; the log has the traceback


class Counter(NamedTuple):
    """A counter's series and their values; told apart, because one that was reset must not hide behind the others."""

    series: tuple[Series, ...]
    values: list[float]


class Readings(NamedTuple):
    """What one page says. None is unknown; so is a counter that is None."""

    engine: str
    running: float | None = None
    waiting: float | None = None
    kv_usage: float | None = None
    gpu_usage: float | None = None
    kv_capacity_tokens: int | None = None
    tokens_per_s: float | None = None
    max_running: int | None = None
    context_tokens: int | None = None
    asleep: bool | None = None
    adapters: tuple[str, ...] | None = None
    waiting_adapters: tuple[str, ...] | None = None
    adapter_slots: int | None = None
    preemptions: Counter | None = None
    prompt_tokens: Counter | None = None
    cached_tokens: Counter | None = None
    first_tokens: Counter | None = None
    output_tokens: Counter | None = None
    decoded_tokens: Counter | None = None
