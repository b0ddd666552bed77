"""How a request was refused, in words for people: the log, `/queues`, the page and `extproc why` say the same."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from extproc.admission.values import Answer

if TYPE_CHECKING:
    from extproc.admission.values import EndpointSpec

_WORDS: Final = {
    Answer.FAILED: "no connection, or cut before an answer began",
    Answer.BROKE_OFF: "cut, or no HTTP, before an answer began",
    Answer.ERROR: "a 5xx of its own",
    Answer.REFUSED: "a 4xx",
    Answer.EMPTY: "success without a byte",
    Answer.SATURATED: "full, or loading, with nothing running",
    Answer.NO_CLUSTER: (
        "Envoy has no cluster {cluster}: add it to Envoy's configuration, or take the endpoint out of ours (`extproc "
        "check FILE --envoy BOOTSTRAP`)"
    ),
    Answer.NO_ADDRESS: (
        "Envoy has no address for cluster {cluster}, or none that it takes for healthy: its name must be one that "
        "Envoy can look up, and Envoy's own checks of it (health_checks, outlier_detection) must go"
    ),
    Answer.BREAKER: (
        "Envoy lets no more through to cluster {cluster}: its circuit breaker (max_requests, max_pending_requests, "
        "max_connections) must be above our limit"
    ),
    Answer.DROPPED: "Envoy drops requests to cluster {cluster}: maintenance_mode and drop_overloads must be off",
    Answer.TIMEOUT: (
        "a timeout of Envoy's ended it before an answer began: the server hangs, or Envoy's timeouts (of the route, a "
        "try, a stream) are shorter than an answer, or its wait with us, may take"
    ),
}
OF_ENVOY: Final = (Answer.NO_CLUSTER, Answer.NO_ADDRESS, Answer.BREAKER, Answer.DROPPED, Answer.TIMEOUT)
"""Those that Envoy's configuration may be to blame for."""


def words_of(answer: Answer, spec: EndpointSpec) -> str:
    """Say what was wrong with an `answer` of this endpoint, and what would be right."""
    return _WORDS[answer].format(cluster=spec.cluster or spec.name)
