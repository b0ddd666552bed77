"""Messages to bytes and back. Whatever bytes come, what comes out is messages or a ProtocolError, nothing else.

A sidecar of the same VERSION that is older or newer may use words that we don't know: kinds of messages, outcomes, what
an answer was. These are read as what says least, and end no stream.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from google.protobuf.message import DecodeError

from extproc._pb import replicas_pb2 as pb
from extproc.admission.decision import Crowd
from extproc.admission.estimate import Learnt
from extproc.admission.held import HeldBy
from extproc.admission.load import Load
from extproc.admission.outcome import Outcome
from extproc.admission.sessions import Home
from extproc.admission.values import Answer
from extproc.errors import ProtocolError
from extproc.replicas import messages as m

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

MOST_BYTES = 4 << 20
"""Of a frame. A thousand waiting requests, each with another list of endpoints it may go to, take several."""
BATCH = 1000
LENGTH_BYTES = 4
MOST_NAME = 256
"""Characters of a text that a request brought; sessions cut them to as many."""
MOST_AGE_S = 86_400.0
MOST_SEQUENCES = 1 << 16
MOST_EPOCH = 1 << 62
"""Who said more would have all others say one more still, until it fits in no message."""
_OUTCOMES = {outcome.value: outcome for outcome in Outcome}
_HELD = {held.value: held for held in HeldBy}
_ANSWERS = {answer.value: answer for answer in Answer}
_PURPOSES = {purpose.value: purpose for purpose in m.Purpose}


# ---- out


def _raise(message: m.Message, why: str) -> None:
    raise ProtocolError(f"a {type(message).__name__} can't be sent: {why}")


def frames(batch: Sequence[m.Message], bounce: Callable[[m.Message, str], None] = _raise) -> bytes:
    """Return `batch` as one frame or more; `bounce` is told of each message that fits in none, and why."""
    parts: list[bytes] = []
    for begin in range(0, len(batch), BATCH):
        _frame(batch[begin : begin + BATCH], parts, bounce)
    return b"".join(parts)


class _Lists:
    """The lists of endpoints that requests of one frame may go to, each once."""

    def __init__(self) -> None:
        self.encoded: list[pb.Allowed] = []
        self._places: dict[frozenset[str], int] = {}

    def place(self, names: frozenset[str]) -> int:
        if names not in self._places:
            self.encoded.append(pb.Allowed(names=sorted(names)))
            self._places[names] = len(self.encoded) - 1
        return self._places[names]


def _frame(batch: Sequence[m.Message], parts: list[bytes], bounce: Callable[[m.Message, str], None]) -> None:
    """Add `batch` as a frame, or as several where it is too long for one."""
    lists = _Lists()
    good: list[m.Message] = []
    encoded: list[pb.Message] = []
    for message in batch:
        try:
            encoded.append(_encode(message, lists))
            good.append(message)
        except (ValueError, TypeError) as error:  # half a surrogate pair in a text, or a number beyond its field
            bounce(message, str(error))
    if not good:
        return
    data = pb.Batch(messages=encoded, allowed=lists.encoded).SerializeToString()
    half = len(good) // 2
    if len(data) <= MOST_BYTES:
        parts += [len(data).to_bytes(LENGTH_BYTES), data]
    elif half:
        _frame(good[:half], parts, bounce)
        _frame(good[half:], parts, bounce)
    else:
        bounce(good[0], f"it has {len(data)} bytes; at most {MOST_BYTES} are allowed")


def _encode(message: m.Message, lists: _Lists) -> pb.Message:  # noqa: C901 - a table
    match message:
        case m.Offer(number, asked):
            return pb.Message(offer=pb.Offer(number=number, asked=_asked(asked, lists)))
        case m.Grant(number, outcome, endpoint, position, home, wait):
            grant = pb.Grant(number=number, outcome=outcome.value, endpoint=endpoint, position=position, home=home)
            _write_wait(grant.wait, wait)
            return pb.Message(grant=grant)
        case m.Release(number, answer):
            return pb.Message(release=pb.Release(number=number, answer=answer.value))
        case m.FirstToken(number):
            return pb.Message(first_token=number)
        case m.Cancel(number):
            return pb.Message(cancel=number)
        case m.Turned(number, outcome, retry_after_s, position, wait, crowd):
            turned = pb.Turned(number=number, outcome=outcome.value, retry_after_s=retry_after_s, position=position)
            _write_wait(turned.wait, wait)
            if crowd is not None:
                turned.crowd.CopyFrom(pb.Crowd(**crowd._asdict()))
            return pb.Message(turned=turned)
        case m.Beat(number, seen):
            return pb.Message(beat=pb.Beat(number=number, seen=seen))
        case m.Status(heard, members, group, limits, doubted, number):
            pairs = [pb.Limit(endpoint=name, value=value) for name, value in limits]
            status = pb.Status(heard=heard, members=members, group=group, limits=pairs, doubted=doubted, number=number)
            return pb.Message(status=status)
        case m.Answered(number):
            return pb.Message(answered=number)
        case m.Moved(number, endpoint):
            return pb.Message(moved=pb.Moved(number=number, endpoint=endpoint))
        case m.Report(number, load):
            return pb.Message(report=pb.Report(number=number, load=_load(load)))
        case m.Return(number):
            return pb.Message(return_=number)
        case m.Held(number, asked, endpoint, held_s, begun):
            held = pb.Held(number=number, asked=_asked(asked, lists), endpoint=endpoint, held_s=held_s, begun=begun)
            return pb.Message(held=held)
        case m.Synced():
            return pb.Message(synced=True)
        case m.Remember(known):
            return pb.Message(remember=pb.Home(**known._asdict()))
        case m.Learned(learnt):
            return pb.Message(learned=pb.Learnt(**learnt._asdict()))
        case m.Ask(number, what, limit):
            return pb.Message(ask=pb.Ask(number=number, what=what, limit=limit))
        case m.Told(number, text):
            return pb.Message(told=pb.Told(number=number, text=text))
        case m.Names(names, rules):
            return pb.Message(names=pb.Names(names=names, rules=rules))
        case m.Hello(version, pool, member, purpose, followers, epoch, names, rules):
            hello = pb.Hello(
                version=version,
                pool=pool,
                member=_member(member),
                purpose=None if purpose is None else purpose.value,
                followers=followers,
                epoch=epoch,
                names=names,
                rules=rules,
            )
            return pb.Message(hello=hello)
        case m.Leave(successor):
            return pb.Message(leave=pb.Leave(successor=None if successor is None else _member(successor)))
        case m.Welcome(member, epoch):
            return pb.Message(welcome=pb.Welcome(member=_member(member), epoch=epoch))
        case m.Redirect(leader):
            return pb.Message(redirect=_member(leader))
        case m.Met(member, followers, epoch):
            return pb.Message(met=pb.Met(member=_member(member), followers=followers, epoch=epoch))
        case m.Refuse(why):
            return pb.Message(refuse=why)


def _member(member: m.Member) -> pb.Member:
    return pb.Member(id=member.id, address=member.address, joined=member.joined)


def _asked(asked: m.Asked, lists: _Lists) -> pb.Asked:
    there = pb.Asked(
        id=asked.id,
        age_s=asked.age_s,
        model=asked.model,
        request_class=asked.request_class,
        tenant=asked.tenant,
        session=asked.session,
        home=asked.home,
        budget_s=asked.budget_s,
        prompt_tokens=asked.prompt_tokens,
        max_output_tokens=asked.max_output_tokens,
        sequences=asked.sequences,
        kind=asked.kind,
    )
    if asked.allowed is not None:
        there.allowed = lists.place(asked.allowed)
    return there


def _write_wait(there: pb.Wait, wait: m.Wait) -> None:
    if wait.held_by is not None:
        there.held_by = wait.held_by.value
    if wait.predicted_s is not None:
        there.predicted_s = wait.predicted_s


def _load(load: Load) -> pb.Load:
    return pb.Load(
        running=load.running,
        waiting=load.waiting,
        kv_usage=load.kv_usage,
        gpu_usage=load.gpu_usage,
        tokens_per_s=load.tokens_per_s,
        kv_capacity_tokens=load.kv_capacity_tokens,
    )


# ---- in


def read(frame: bytes) -> list[m.Message]:
    """Return the messages of one frame without its length. Raises ProtocolError."""
    try:
        batch = pb.Batch.FromString(frame)
        lists = [frozenset(name[:MOST_NAME] for name in allowed.names) for allowed in batch.allowed]
        messages = (_decode(message, lists) for message in batch.messages)
        return [message for message in messages if message is not None]
    except (DecodeError, ValueError, IndexError) as error:
        raise ProtocolError(f"no batch of replicas: {type(error).__name__}: {error}") from None


def _decode(message: pb.Message, lists: list[frozenset[str]]) -> m.Message | None:  # noqa: C901 - a table
    """Return a message; None for a kind that we don't know."""
    kind = message.WhichOneof("kind")
    match kind:
        case "offer":
            return m.Offer(message.offer.number, _asked_of(message.offer.asked, lists))
        case "grant":
            grant = message.grant
            home = grant.home if grant.HasField("home") else None
            outcome = _OUTCOMES.get(grant.outcome, Outcome.DISPATCHED)
            return m.Grant(grant.number, outcome, grant.endpoint, grant.position, home, _wait_of(grant.wait))
        case "release":
            return m.Release(message.release.number, _ANSWERS.get(message.release.answer, Answer.UNKNOWN))
        case "first_token":
            return m.FirstToken(message.first_token)
        case "cancel":
            return m.Cancel(message.cancel)
        case "turned":
            turned = message.turned
            retry_after_s = turned.retry_after_s if turned.HasField("retry_after_s") else None
            refusal = _refusal(turned.outcome)
            said = turned.crowd
            crowd = Crowd(said.in_flight, said.most, said.is_shared) if turned.HasField("crowd") else None
            return m.Turned(turned.number, refusal, retry_after_s, turned.position, _wait_of(turned.wait), crowd)
        case "beat":
            return m.Beat(message.beat.number, message.beat.seen)
        case "status":
            status = message.status
            limits = tuple((limit.endpoint, limit.value) for limit in status.limits)
            doubted = frozenset(status.doubted)
            return m.Status(status.heard, status.members, status.group, limits, doubted, status.number)
        case "answered":
            return m.Answered(message.answered)
        case "moved":
            return m.Moved(message.moved.number, message.moved.endpoint[:MOST_NAME])
        case "report":
            return m.Report(message.report.number, _load_of(message.report.load))
        case "return_":
            return m.Return(message.return_)
        case "held":
            held = message.held
            return m.Held(
                held.number, _asked_of(held.asked, lists), held.endpoint, _seconds(held.held_s), begun=held.begun
            )
        case "synced":
            return m.Synced()
        case "remember":
            seen = message.remember
            age_s = _seconds(seen.age_s)
            return m.Remember(Home(seen.session[:MOST_NAME], seen.endpoint[:MOST_NAME], seen.tokens, age_s))
        case "learned":
            return m.Learned(_learnt_of(message.learned))
        case "ask":
            return m.Ask(message.ask.number, message.ask.what[:MOST_NAME], message.ask.limit)
        case "told":
            return m.Told(message.told.number, message.told.text)
        case "names":
            return m.Names(frozenset(message.names.names), frozenset(message.names.rules))
        case "hello":
            hello = message.hello
            return m.Hello(
                hello.version,
                hello.pool,
                _member_of(hello.member),
                _PURPOSES.get(hello.purpose),
                hello.followers,
                min(hello.epoch, MOST_EPOCH),
                frozenset(hello.names),
                frozenset(hello.rules),
            )
        case "leave":
            successor = _member_of(message.leave.successor) if message.leave.HasField("successor") else None
            return m.Leave(successor)
        case "welcome":
            return m.Welcome(_member_of(message.welcome.member), min(message.welcome.epoch, MOST_EPOCH))
        case "redirect":
            return m.Redirect(_member_of(message.redirect))
        case "met":
            met = message.met
            return m.Met(_member_of(met.member), met.followers, min(met.epoch, MOST_EPOCH))
        case "refuse":
            return m.Refuse(message.refuse[:MOST_NAME])
        case _:
            return None


def _refusal(name: str) -> Outcome:
    """Return why a request is refused. It must be, else it would wait for ever: for a reason unknown to us, too."""
    outcome = _OUTCOMES.get(name, Outcome.NO_ENDPOINT)
    if outcome.status is None:
        raise ValueError(f"{name} is no refusal")
    return outcome


def _member_of(member: pb.Member) -> m.Member:
    if not member.id or not member.address:
        raise ValueError("a member without id or address")
    return m.Member(member.id[:MOST_NAME], member.address[:MOST_NAME], member.joined)


def _seconds(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError(f"{value} is no age")
    return min(max(value, 0.0), MOST_AGE_S)


def _asked_of(asked: pb.Asked, lists: list[frozenset[str]]) -> m.Asked:
    has = asked.HasField
    return m.Asked(
        asked.id[:MOST_NAME],
        _seconds(asked.age_s),
        asked.model[:MOST_NAME] if has("model") else None,
        asked.request_class[:MOST_NAME],
        asked.tenant[:MOST_NAME],
        asked.session[:MOST_NAME] if has("session") else None,
        asked.home[:MOST_NAME] if has("home") else None,
        _seconds(asked.budget_s) if has("budget_s") else None,
        asked.prompt_tokens,
        asked.max_output_tokens if has("max_output_tokens") else None,
        min(max(asked.sequences, 1), MOST_SEQUENCES),
        asked.kind[:MOST_NAME],
        lists[asked.allowed] if has("allowed") else None,
    )


def _wait_of(wait: pb.Wait) -> m.Wait:
    held_by = _HELD.get(wait.held_by) if wait.HasField("held_by") else None
    return m.Wait(held_by, _seconds(wait.predicted_s) if wait.HasField("predicted_s") else None)


def _learnt_of(learnt: pb.Learnt) -> Learnt:
    value, weight = learnt.value, learnt.weight
    if not (math.isfinite(value) and math.isfinite(weight)):
        raise ValueError(f"{learnt.what[:MOST_NAME]} is {value}, {weight}")
    model = learnt.model[:MOST_NAME] if learnt.HasField("model") else None
    return Learnt(learnt.what[:MOST_NAME], model, learnt.kind[:MOST_NAME], learnt.bits, value, weight)


def _load_of(load: pb.Load) -> Load:
    def number(name: str) -> float | None:
        if not load.HasField(name):
            return None
        value: float = getattr(load, name)
        if not math.isfinite(value) or value < 0:
            raise ValueError(f"{name} is {value}")
        return value

    return Load(
        running=number("running"),
        waiting=number("waiting"),
        kv_usage=number("kv_usage"),
        gpu_usage=number("gpu_usage"),
        tokens_per_s=number("tokens_per_s"),
        kv_capacity_tokens=load.kv_capacity_tokens if load.HasField("kv_capacity_tokens") else None,
    )
