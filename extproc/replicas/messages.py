"""What sidecars say to each other, as plain values. Ages travel, never times: no clock is compared with another's."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    from extproc.admission.decision import Crowd
    from extproc.admission.estimate import Learnt
    from extproc.admission.held import HeldBy
    from extproc.admission.load import Load
    from extproc.admission.outcome import Outcome
    from extproc.admission.sessions import Home
    from extproc.admission.values import Answer

VERSION = 3
"""Of the protocol. Sidecars of different versions don't follow each other; each group uses its part alone.

Within a version a sidecar reads a word that it does not know as none (`wire.py`); what must not be needs another one.
"""


class Member(NamedTuple):
    """One sidecar: a name of its own for each life, where others reach it, and when it joined, by the store's count."""

    id: str
    address: str
    joined: int

    def __str__(self) -> str:
        """Return who it is, for people."""
        return f"{self.id} at {self.address}"


LAST = 1 << 62
"""The place in the order of joining of who is about to leave: nobody should follow it."""


class Asked(NamedTuple):
    """A request as its headers said it, `age_s` after Envoy received it."""

    id: str
    age_s: float
    model: str | None = None
    request_class: str = ""
    tenant: str = ""
    session: str | None = None
    home: str | None = None
    budget_s: float | None = None
    prompt_tokens: int = 0
    max_output_tokens: int | None = None
    sequences: int = 1
    kind: str = ""
    allowed: frozenset[str] | None = None


class Purpose(Enum):
    """Why somebody says hello."""

    FOLLOW = 1
    MEET = 2


# ---- both ways


class Hello(NamedTuple):
    """The first word of whoever opens a stream.

    `names`: the endpoints that its Envoy can be sent to; `rules`: marks of its configuration (`rules.py`). `purpose`:
    None for one that we don't know.
    """

    version: int
    pool: str
    member: Member
    purpose: Purpose | None
    followers: int
    epoch: int
    names: frozenset[str]
    rules: frozenset[str] = frozenset()


class Leave(NamedTuple):
    """The stream ends on purpose. A leader names who leads from now on, if it knows."""

    successor: Member | None = None


# ---- the first answer


class Welcome(NamedTuple):
    """Follow me; tell me what you hold."""

    member: Member
    epoch: int


class Redirect(NamedTuple):
    """I follow somebody else: ask there."""

    leader: Member


class Met(NamedTuple):
    """I lead, too."""

    member: Member
    followers: int
    epoch: int


class Refuse(NamedTuple):
    """You can't follow me, and this is why."""

    why: str


# ---- from who follows


class Held(NamedTuple):
    """A request that I dispatched `held_s` ago and that still runs. `begun`: its first token was seen."""

    number: int
    asked: Asked
    endpoint: str
    held_s: float
    begun: bool


class Offer(NamedTuple):
    """A request that waits."""

    number: int
    asked: Asked


class Synced(NamedTuple):
    """That was all I hold."""


class Remember(NamedTuple):
    """A session that I served, or know of, for who leads now, or would lead next."""

    home: Home


class Names(NamedTuple):
    """My endpoints or my rules have changed."""

    names: frozenset[str]
    rules: frozenset[str] = frozenset()


class Beat(NamedTuple):
    """I live. Counts up. `seen`: the last status that I have acted upon, and upon each grant before it."""

    number: int
    seen: int = 0


class Cancel(NamedTuple):
    """The client left."""

    number: int


class Release(NamedTuple):
    """The answer is complete, or broken."""

    number: int
    answer: Answer


class FirstToken(NamedTuple):
    """The answer's first byte came."""

    number: int


class Answered(NamedTuple):
    """The answer began well."""

    number: int


class Moved(NamedTuple):
    """Another endpoint answers than the one granted; empty: one that I don't know."""

    number: int
    endpoint: str


class Report(NamedTuple):
    """What an answer's headers said of its endpoint."""

    number: int
    load: Load


class Ask(NamedTuple):
    """Somebody looks at me: tell what `what` (queues, view) shows at yours, with so many waiting requests."""

    number: int
    what: str
    limit: int


class Return(NamedTuple):
    """I can't send it there; decide again."""

    number: int


# ---- from who leads


class Wait(NamedTuple):
    """What held a request when it came, and the wait that was predicted then; None: it did not wait, or nobody knew."""

    held_by: HeldBy | None = None
    predicted_s: float | None = None


class Grant(NamedTuple):
    """Send it to `endpoint`. Good once, and only while this leader is followed."""

    number: int
    outcome: Outcome
    endpoint: str
    position: int
    home: str | None
    wait: Wait = Wait()


class Turned(NamedTuple):
    """Refuse it. `crowd`: of one whose tenant has all in flight that it may; a sidecar of before does not tell it."""

    number: int
    outcome: Outcome
    retry_after_s: int | None
    position: int
    wait: Wait = Wait()
    crowd: Crowd | None = None


class Status(NamedTuple):
    """The leader lives, and has heard the beat `heard`.

    Attributes:
        members: how many sidecars there are, by what the leader knows.
        group: how many of them are in its group, itself included.
        limits: of endpoints, for who leads next: an adaptive limit need not start over. None: that did not change.
        doubted: endpoints of which an answer that begins well is news.
        number: counts up.
    """

    heard: int
    members: int
    group: int
    limits: tuple[tuple[str, int], ...] = ()
    doubted: frozenset[str] = frozenset()
    number: int = 0


class Told(NamedTuple):
    """What was asked for, as JSON."""

    number: int
    text: str


class Learned(NamedTuple):
    """Something that the leader has learned, for who leads next."""

    learnt: Learnt


Message = (
    Hello
    | Leave
    | Welcome
    | Redirect
    | Met
    | Refuse
    | Held
    | Offer
    | Synced
    | Remember
    | Learned
    | Ask
    | Told
    | Names
    | Beat
    | Cancel
    | Release
    | FirstToken
    | Answered
    | Moved
    | Report
    | Return
    | Grant
    | Turned
    | Status
)


class Link(Protocol):
    """One side of a stream between two sidecars: in order, each message once, or the stream is closed.

    Attributes:
        bounced: is called with a message that can't be sent, at any time after `send` has returned.
    """

    bounced: Callable[[Message], None]

    def send(self, message: Message) -> None:
        """Send, soon. After the stream has ended: no-op."""

    def close(self) -> None:
        """End the stream once what was sent is on its way; nothing is received any more."""


class Network(Protocol):
    """How to reach others. No callback is called before `dial` returns, and none after the link was closed by us."""

    def dial(self, address: str, receive: Callable[[Message], None], closed: Callable[[], None]) -> Link:
        """Open a stream. `closed` is called once if it can't be, or when it ends."""
