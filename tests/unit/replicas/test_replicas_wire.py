"""Messages between sidecars: what goes in comes out, and nonsense is one named error."""

from __future__ import annotations

from dataclasses import fields
from random import Random
from typing import Any

import pytest

from extproc._pb import replicas_pb2 as pb
from extproc.admission.decision import Crowd
from extproc.admission.estimate import Learnt
from extproc.admission.held import HeldBy
from extproc.admission.load import Load
from extproc.admission.outcome import Outcome
from extproc.admission.sessions import Home
from extproc.admission.values import Answer, Request
from extproc.errors import ProtocolError
from extproc.replicas import messages as m
from extproc.replicas.forwarded import asked_by, request_of
from extproc.replicas.wire import BATCH, LENGTH_BYTES, MOST_AGE_S, MOST_BYTES, frames, read

MEMBER = m.Member("s1-abc", "10.0.0.7:50060", 7)
ASKED = m.Asked(
    "r-1", 1.5, "llama", "urgent", "tenant", "session", "a", 2.5, 100, 200, 4, "text", frozenset({"a", "b"})
)
BARE = m.Asked("", 0.0)
NOWHERE = m.Asked("r-2", 0.0, allowed=frozenset())
MESSAGES: list[m.Message] = [
    m.Hello(1, "pool", MEMBER, m.Purpose.MEET, 3, 9, frozenset({"a", "b"}), frozenset({"shed=1"})),
    m.Leave(MEMBER),
    m.Leave(None),
    m.Welcome(MEMBER, 9),
    m.Redirect(MEMBER),
    m.Met(MEMBER, 2, 9),
    m.Refuse("another version"),
    m.Held(1, ASKED, "a", 12.5, begun=True),
    m.Offer(2, BARE),
    m.Offer(3, ASKED),
    m.Offer(4, NOWHERE),
    m.Synced(),
    m.Remember(Home("session", "a", 1200, 3.5)),
    m.Learned(Learnt("scale", None, "text", 12, 0.7, 0.01)),
    m.Learned(Learnt("answers", "llama", "urgent", 0, 210.5, 17.0)),
    m.Names(frozenset()),
    m.Names(frozenset({"a"}), frozenset({"classes=01234567"})),
    m.Ask(3, "queues", 200),
    m.Told(3, '{"waiting_total": 0}'),
    m.Beat(17, 16),
    m.Cancel(4),
    *(m.Release(5, answer) for answer in Answer),
    m.FirstToken(6),
    m.Answered(7),
    m.Moved(7, "b"),
    m.Moved(7, ""),
    m.Report(8, Load(running=3.0, kv_usage=0.5, kv_capacity_tokens=1000)),
    m.Report(8, Load()),
    m.Return(9),
    m.Grant(10, Outcome.DISPATCHED, "a", 3, None),
    m.Grant(10, Outcome.REROUTED, "a", 0, "b"),
    m.Grant(10, Outcome.DISPATCHED, "a", 3, None, m.Wait(HeldBy.KV, 1.5)),
    m.Turned(11, Outcome.QUEUE_FULL, 7, 2, m.Wait(HeldBy.LIMIT, None)),
    *(m.Turned(11, outcome, 7, 2) for outcome in Outcome if outcome.status is not None),
    m.Turned(11, Outcome.UNKNOWN_MODEL, None, 0),
    m.Turned(11, Outcome.TENANT_LIMIT, 1, 0, m.Wait(), Crowd(0, 9, is_shared=True)),
    m.Status(17, 3, 2, (("a", 64), ("b", 8)), frozenset({"b"}), 18),
]


def test_all_that_headers_said_travels_but_what_is_only_for_who_watches():
    """Another field of a request must not stay behind: what the leader does not know, it decides wrongly."""
    told = {"arrived": 5.0, "budget_s": 2.5, "prompt_tokens": 100, "max_output_tokens": 200, "sequences": 4}
    told |= {"allowed": frozenset({"a"})}
    asked = Request(
        **{field.name: told.get(field.name, field.name) for field in fields(Request)} | {"trace": "", "operation": ""}
    )
    (message,) = unframed(frames([m.Offer(1, asked_by(asked, 7.0))]))
    assert isinstance(message, m.Offer)
    assert request_of(message.asked, 7.0) == asked


def unframed(data: bytes) -> list[m.Message]:
    found: list[m.Message] = []
    while data:
        end = LENGTH_BYTES + int.from_bytes(data[:LENGTH_BYTES])
        found += read(data[LENGTH_BYTES:end])
        data = data[end:]
    return found


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_every_message_arrives_as_it_was_sent(message):
    assert unframed(frames([message])) == [message]


def test_a_long_batch_goes_in_several_frames_and_keeps_its_order():
    batch: list[m.Message] = [m.Beat(number) for number in range(2 * BATCH + 1)]
    assert unframed(frames(batch)) == batch


def lengths(data: bytes) -> list[int]:
    found: list[int] = []
    while data:
        found.append(int.from_bytes(data[:LENGTH_BYTES]))
        data = data[LENGTH_BYTES + found[-1] :]
    return found


PODS = frozenset(f"vllm-llama-8b-instruct-7d9c5b8f6-{n:05}:8000" for n in range(200))


def test_a_list_of_endpoints_that_many_requests_may_go_to_is_sent_and_kept_once_a_frame():
    batch: list[m.Message] = [m.Offer(number, ASKED._replace(allowed=PODS)) for number in range(BATCH)]
    data = frames(batch)
    assert len(data) < 200_000
    assert unframed(data) == batch
    assert len({id(message.asked.allowed) for message in unframed(data)}) == 1


def test_a_list_that_its_frame_does_not_bring_is_refused():
    data = pb.Batch(messages=[pb.Message(offer=pb.Offer(number=1, asked=pb.Asked(allowed=0)))]).SerializeToString()
    with pytest.raises(ProtocolError, match="IndexError"):
        read(data)


def test_a_thousand_requests_that_may_each_go_to_other_200_pods_go_in_frames_that_are_taken_in():
    batch: list[m.Message] = [
        m.Offer(number, ASKED._replace(allowed=PODS | {f"pod-{number}"})) for number in range(BATCH)
    ]
    data = frames(batch)
    assert len(data) > MOST_BYTES
    assert max(lengths(data)) <= MOST_BYTES
    assert unframed(data) == batch


UNSENDABLE = {
    "half a surrogate pair": m.Offer(2, ASKED._replace(model="llama\ud800")),
    "a number beyond its field": m.Offer(2, ASKED._replace(prompt_tokens=1 << 32)),
    "too long": m.Offer(2, ASKED._replace(allowed=frozenset(f"{n:0250}" for n in range(17_000)))),
}


@pytest.mark.parametrize("message", UNSENDABLE.values(), ids=UNSENDABLE)
def test_a_message_that_cant_be_sent_is_told_alone_and_the_rest_goes(message):
    bounced: list[m.Message] = []
    data = frames([m.Beat(1), message, m.Beat(3)], lambda one, _: bounced.append(one))
    assert unframed(data) == [m.Beat(1), m.Beat(3)]
    assert bounced == [message]


def test_whatever_bytes_come_they_are_messages_or_one_named_error():
    random = Random(7)
    good = frames(MESSAGES)[LENGTH_BYTES:]
    refused = 0
    for _ in range(20_000):
        data = bytearray(good)
        for _ in range(random.choice((1, 3, 30))):
            data[random.randrange(len(data))] = random.randrange(256)
        del data[random.randrange(len(data)) :]
        try:
            read(bytes(data))
        except ProtocolError:
            refused += 1
    assert refused > 1000


@pytest.mark.parametrize("age_s", [float("nan"), float("inf")])
def test_an_age_that_is_no_number_is_refused(age_s):
    with pytest.raises(ProtocolError, match="no age"):
        unframed(frames([m.Offer(1, ASKED._replace(age_s=age_s))]))


def test_an_age_below_nothing_or_beyond_a_day_is_cut():
    ages = [unframed(frames([m.Offer(1, ASKED._replace(age_s=age_s))]))[0].asked.age_s for age_s in (-5.0, 1e12)]
    assert ages == [0.0, MOST_AGE_S]


def test_whatever_epoch_somebody_says_the_next_one_can_be_said():
    """A leader whose epoch fits in no message welcomed nobody, and who had met it neither: each was alone for good."""
    most = (1 << 64) - 1
    hello = m.Hello(1, "pool", MEMBER, m.Purpose.MEET, 3, most, frozenset())
    for said in (hello, m.Welcome(MEMBER, most), m.Met(MEMBER, 2, most)):
        (heard,) = read(frames([said])[LENGTH_BYTES:])
        frames([m.Welcome(MEMBER, heard.epoch + 1)])


def test_a_refusal_by_an_outcome_that_is_none_is_refused():
    with pytest.raises(ProtocolError, match="is no refusal"):
        unframed(frames([m.Turned(1, Outcome.DISPATCHED, None, 0)]))


def framed(*messages: pb.Message) -> bytes:
    return pb.Batch(messages=messages).SerializeToString()


HELLO = pb.Hello(version=m.VERSION, pool="p", member=pb.Member(id="a", address="b:1"), purpose=77)
NEWER = {
    "what became of a request": (
        pb.Message(grant=pb.Grant(number=1, outcome="teleported", endpoint="a")),
        m.Grant(1, Outcome.DISPATCHED, "a", 0, None),
    ),
    "what held it": (
        pb.Message(grant=pb.Grant(number=1, outcome="rerouted", endpoint="a", wait=pb.Wait(held_by="moon"))),
        m.Grant(1, Outcome.REROUTED, "a", 0, None),
    ),
    "why it is refused": (
        pb.Message(turned=pb.Turned(number=1, outcome="too_pink", wait=pb.Wait(held_by="moon", predicted_s=2.0))),
        m.Turned(1, Outcome.NO_ENDPOINT, None, 0, m.Wait(None, 2.0)),
    ),
    "what its answer was": (
        pb.Message(release=pb.Release(number=1, answer="lukewarm")),
        m.Release(1, Answer.UNKNOWN),
    ),
    "why somebody comes": (
        pb.Message(hello=HELLO),
        m.Hello(m.VERSION, "p", m.Member("a", "b:1", 0), None, 0, 0, frozenset()),
    ),
}


@pytest.mark.parametrize(("sent", "read_as"), NEWER.values(), ids=NEWER)
def test_a_word_of_an_older_or_newer_sidecar_that_we_dont_know_is_read_as_what_says_least(sent, read_as):
    assert read(framed(sent)) == [read_as]


def test_a_message_of_a_kind_that_we_dont_know_is_left_out_and_those_around_it_are_read():
    unknown = pb.Message.FromString(b"\xfa\x06\x02hi")  # field 111, of bytes
    more = pb.Message(beat=pb.Beat(number=2))
    more.MergeFromString(b"\xfa\x06\x02hi")  # a field more in a kind that we know
    assert read(framed(pb.Message(beat=pb.Beat(number=1)), unknown, more)) == [m.Beat(1), m.Beat(2)]


def test_no_word_of_any_field_ends_a_stream():
    """Each text and small number of each message, set to what no version has said yet."""
    tried = 0
    for message in MESSAGES:
        batch = pb.Batch.FromString(frames([message])[LENGTH_BYTES:])
        for part, field in texts(batch.messages[0]):
            before = getattr(part, field.name)
            setattr(part, field.name, "word of 2031" if field.type == field.TYPE_STRING else 77)
            read(batch.SerializeToString())
            setattr(part, field.name, before)
            tried += 1
    assert tried > 60


def texts(message: Any) -> list[tuple[Any, Any]]:
    found = []
    for field, value in message.ListFields():
        if field.type == field.TYPE_MESSAGE:
            for part in value if field.is_repeated else [value]:
                found += texts(part)
        elif not field.is_repeated and field.name != "allowed" and field.type in (field.TYPE_STRING, field.TYPE_UINT32):
            found.append((message, field))
    return found
