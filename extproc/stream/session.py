"""One stream, that is one HTTP request, as a state machine: messages in, replies out by a callback.

No gRPC and no event loop in here: a driver feeds `receive`, sends what `reply` is given, and calls `end` exactly once.

    new ──request headers──▶ held ──dispatch──▶ passing ──response headers──▶ passing … end: the lease goes back
     │                        └──refusal──▶ refused
     └──request headers, the model is in the body──▶ reading ──model──▶ held

Where a gateway buffers a body (BUFFERED) and the model is looked for in it, the headers are answered first, with
nothing, and the pick is the answer to the body.

What a gateway expects differs by its `Dialect`, and how it tells bodies by the stream's `Modes` (dialect.py). Pieces of
bodies that come before the decision are kept, a few of them: `paused` then asks the driver to leave the rest unread.
"""

from __future__ import annotations

from enum import Enum, auto
from typing import TYPE_CHECKING, Final

from extproc.admission.outcome import Outcome
from extproc.admission.values import Answer, Dispatch
from extproc.errors import ProtocolError
from extproc.stream import again, bodies, wire
from extproc.stream.answer import BODILESS, GRPC_STATUS, judge, judge_trailers
from extproc.stream.bodies import Kept
from extproc.stream.dialect import PLAIN
from extproc.stream.replies import decision_details, model_list, named, refusal, whose
from extproc.stream.request import BINARY_REPORT, REPORT, body_bytes
from extproc.stream.routes import Action, Shape
from extproc.stream.wire import Kind

if TYPE_CHECKING:
    from collections.abc import Callable

    from extproc.admission.ticket import Ticket
    from extproc.admission.values import Decision, Request
    from extproc.stream.dialect import Modes
    from extproc.stream.reception import Reception
    from extproc.stream.wire import Incoming


KEPT_BYTES: Final = 16 << 10
"""Of a held request's body: what is taken in; the rest stays where it is, and Envoy buffers it. Most are smaller, and
then the gateway's own end of a stream is seen at once."""
KEPT_UNTOLD_BYTES: Final = 8 << 20
"""The same where a client that leaves is told by the end of its messages alone, which an unread body would hide."""
NOBODY: Final = frozenset[str]()


class _State(Enum):
    NEW = auto()
    READING = auto()
    HELD = auto()
    PASSING = auto()
    REFUSED = auto()
    ENDED = auto()


_NEW: Final = _State.NEW
_READING: Final = _State.READING
_HELD: Final = _State.HELD
_PASSING: Final = _State.PASSING
_REFUSED: Final = _State.REFUSED
_ENDED: Final = _State.ENDED
_REQUEST_HEADERS: Final = Kind.REQUEST_HEADERS
_RESPONSE_HEADERS: Final = Kind.RESPONSE_HEADERS
_QUEUE: Final = Action.QUEUE
_MODELS: Final = Action.MODELS
_OPENAI: Final = Shape.OPENAI
_OK: Final = Answer.OK
_UNKNOWN: Final = Answer.UNKNOWN
_GO_ON: Final = wire.go_on(_RESPONSE_HEADERS)
"""For what every request does: to read a member from its class costs Python 3.11 twenty times what a name costs."""


class Session:
    """One stream. `receive` and `end` come from the driver, `_decided` from the gate, all in one thread."""

    __slots__ = (
        "_action",
        "_answer",
        "_began",
        "_is_asked",
        "_is_half_closed",
        "_is_refused",
        "_is_sent",
        "_kept",
        "_modes",
        "_needs_body",
        "_number",
        "_reception",
        "_refused_by",
        "_reply",
        "_return_key",
        "_shape",
        "_shown",
        "_state",
        "_ticket",
        "_tries",
        "_wait_s",
        "_waited_s",
        "hang_up",
        "over",
        "resets",
    )

    def __init__(self, reception: Reception, reply: Callable[[bytes], None]) -> None:
        """Open a stream whose replies go to `reply`."""
        self._reception = reception
        self._reply = reply
        self._state = _NEW
        self._ticket: Ticket | None = None
        self._answer = _UNKNOWN
        self._action, self._shape = _QUEUE, _OPENAI
        self._needs_body = True  # an answer without one is none
        self._number = 0  # in `running`: the answer's first piece will be shown to us
        self._shown: bool | None = None  # that piece had bytes; it was the empty end of an empty answer; not shown
        self._is_refused = False
        self._modes: Modes = PLAIN
        self._kept: Kept | None = None  # what came of the body before the decision
        self._began: Incoming | None = None  # the headers, while the body is read for the model
        self._is_asked = False  # the headers were answered with nothing: the body's answer is the pick
        self._is_half_closed = False
        self._is_sent = False  # to an endpoint
        self._wait_s: float | None = None  # set once dispatched, if the client is to be told
        self._waited_s = 0.0  # until it was dispatched
        self._tries = 0  # how often this request came back before
        self._return_key = ""  # by which it comes back
        self._refused_by: frozenset[str] = NOBODY  # the endpoints that it came back from, and the one it is sent to
        self.resets = False  # a client that leaves is told by a reset, that is without reading: the driver knows
        self.over = False  # nothing more is wanted: the driver ends the stream
        self.hang_up: Callable[[], object] | None = None  # the driver's: it ends the stream
        reception.silence.began(self)
        reception.streams += 1

    # ---- the walk: a request's headers, our decision, its answer's head, the end

    def receive(self, data: bytes) -> None:
        """Take one message. Raises ProtocolError for what has no place here; the driver then ends the stream."""
        if self._modes.sends_pieces and bodies.has_piece(data):
            self._take_piece(data[0], bodies.piece_of(data))
            return
        incoming = self._reception.reader.read(data)
        state, kind = self._state, incoming.kind
        if incoming.observed:
            self._observe(incoming)
        elif state is _NEW and kind is _REQUEST_HEADERS:
            self._begin(incoming)
        elif kind is _RESPONSE_HEADERS and (state is _PASSING or state is _REFUSED):
            self._take_answer(incoming)
        else:
            self._take_rest(incoming)

    def _begin(self, incoming: Incoming) -> None:
        """Hold the request, let it go at once, or answer it: the table of routes says."""
        reception = self._reception
        reception.silence.spoke(self)
        self._modes = modes = reception.dialect.modes(incoming)
        headers = incoming.headers
        self._needs_body = incoming.has_body and headers.get(":method") not in BODILESS and "upgrade" not in headers
        action, self._shape = reception.kind_of(headers)
        self._action = action
        if action is _MODELS:
            listed = model_list(reception, headers.get(":path", ""), self._shape)
            if listed is not None:
                self._state = _REFUSED
                self._reply(listed)
                return
        if not modes.tells_end and not reception.picks_without_end:
            reception.refuse_gateway()
            self._state = _REFUSED
            self._reply(refusal(reception, self._shape, Outcome.ENDLESS))
            return
        reads = reception.read_model and reception.reads_body(incoming, modes)
        if reads and modes.ask:
            self._is_asked, self._state, self._began = True, _READING, incoming
            self._reply(modes.ask)
            return
        if incoming.has_body and (reads or modes.holds_body):
            most_bytes = KEPT_BYTES if self.resets else KEPT_UNTOLD_BYTES
            coming_bytes = body_bytes(headers)
            self._kept = Kept(KEPT_BYTES, most_bytes, reception.kept, text=reads, coming_bytes=coming_bytes)
        if reads:
            self._state, self._began = _READING, incoming
            reception.reading.began(self)
        else:
            self._offer(incoming)

    def _offer(self, incoming: Incoming) -> None:
        """Have it decided, which may be before this returns."""
        reception = self._reception
        self._state = _HELD
        self._ticket = ticket = reception.ticket_for(incoming, self._decided)
        if wire.AGAIN in incoming.headers:
            self._go_on_with(ticket, incoming)
        if self._tries > again.MOST:
            reception.gate.refuse(ticket, Outcome.NO_ENDPOINT)
        elif self._tries and self._waits_first(ticket.request):
            reception.gate.call_later(again.PAUSE_S, self._ask_again)
        elif self._action is _QUEUE and self._modes.tells_end:
            reception.gate.offer(ticket)
        else:
            reception.gate.send(ticket)

    def _decided(self, decision: Decision) -> None:
        """Answer Envoy. After `end` there is nobody to answer, and the lease is back already."""
        if self._state is not _HELD:
            return
        reception = self._reception
        self._state = _PASSING if isinstance(decision, Dispatch) else _REFUSED
        self.over = self._is_half_closed  # our answer is the last that is said
        details = decision_details(decision)
        wait_s = decision.wait_s if reception.server_timing else None
        if isinstance(decision, Dispatch):
            if reception.is_probed and decision.ticket.endpoint is not None:
                reception.dispatched = self._number = reception.dispatched + 1
                reception.running[self._number] = self
                details += wire.number_metadata(self._number)
            self._wait_s, self._waited_s = wait_s, decision.wait_s
            if reception.again.is_on:
                details += self._expect_back(decision)
            self._is_sent = True
            steer = reception.steer(decision.endpoint, decision.ticket.choices)
            self._reply(wire.in_body(steer) + details if self._is_asked else steer + self._modes.override + details)
            if self._kept is not None:
                self._reply_kept(self._kept)
        elif (overflow := reception.overflow(decision)) is not None:
            self._overflow(decision, *overflow, wait_s)
        else:
            self._drop_body()
            self._is_refused = True
            reception.refused += 1
            ticket = decision.ticket
            about = {"wait_s": round(decision.wait_s, 3), **ticket.why(), **whose(decision), **named(ticket.request.id)}
            refused = refusal(reception, self._shape, decision.outcome, decision.retry_after_s, wait_s, about)
            self._reply(refused + details)

    def _overflow(self, decision: Decision, cluster: str, steer: bytes, wait_s: float | None) -> None:
        """Send a refused request to its class's cluster of last resort: it takes no slot, and no limit counts it."""
        self._state, self._wait_s = _PASSING, wait_s
        name, counts = decision.ticket.request_class.name, self._reception.overflowed
        counts[name] = counts.get(name, 0) + 1
        self._reply(steer + decision_details(decision, cluster))
        if self._kept is not None:
            self._reply_kept(self._kept)

    def _take_answer(self, incoming: Incoming) -> None:
        """Follow what the head of an answer says."""
        reception = self._reception
        self._answer = judge(incoming, needs_body=self._needs_body)
        if self._return_key:
            self._expect_no_more()
        if reception.again.is_on and self._ticket is not None and reception.again.came_back(incoming.attributes):
            self._answer = Answer.FAILED  # another sidecar took the second try; the server that we chose does nothing
            self._close()
        ticket, wait_s = self._ticket, self._wait_s
        if ticket is not None:
            if incoming.served:
                reception.follow(ticket, incoming.served)
            if self._answer is _OK and self._shown is None and not self._number and self._modes is PLAIN:
                reception.gate.answered(ticket)  # as nearly all are: no byte will be shown
            else:
                self._judge_beginning()
                reception.look_at_failure(ticket, self._answer)
            if REPORT in incoming.headers or BINARY_REPORT in incoming.headers:
                reception.take_report(ticket, incoming.headers)
        self._reply(_GO_ON if wait_s is None else wire.go_on_timed(wait_s))
        if not incoming.has_body:
            self._close()

    def end(self) -> None:
        """Note that the stream is over, for whatever reason. The lease goes back; the place in the queue is left."""
        if self._state is not _ENDED:
            reception = self._reception
            if self._state is _NEW:
                reception.silence.ended(self)
            reception.refused -= self._is_refused
            self._state = _ENDED
            reception.streams -= 1
            self._close()
            if self._kept is not None or self._began is not None:
                self._drop_body()

    def _close(self) -> None:
        if self._return_key:
            self._expect_no_more()
        ticket, reception = self._ticket, self._reception
        if ticket is not None:
            if self._shown is None and self._modes.shows_answer and self._answer is _OK:
                self._answer = _UNKNOWN  # a client that left, or a server that died behind its head: both look so
            # Not so with the probe: its stream often comes after this one's end, and then a whole answer looks so, too.
            self._ticket = ticket.deliver = None  # tickets are remembered for their stories: this stream is not
            if self._number:
                self._forget_number()
            if self._answer is not _OK:
                reception.count_bad(ticket, self._answer)
            reception.gate.close(ticket, self._answer)
            if reception.finished is not None and self._is_sent:
                reception.finished(ticket, self._answer)

    # ---- second tries

    def _go_on_with(self, ticket: Ticket, incoming: Incoming) -> None:
        """Go on where the stream was that sent this request off, if one of ours did."""
        reception, request = self._reception, ticket.request
        sent_off_by, self._tries = reception.again.back(incoming.headers)
        if sent_off_by is not None:
            waited_s, self._refused_by = sent_off_by.give_up()
            request.arrived = reception.gate.now() - waited_s
        elif self._tries:
            request.home = None  # no wish: another sidecar wrote it, and who is there took no connection

    def _waits_first(self, request: Request) -> bool:
        """Tell whether one that came back is about to go where it came from, or for the last time, and may wait."""
        gate = self._reception.gate
        elsewhere, controller = self._goes_elsewhere(request), gate.controller
        budget_s = controller.class_of(request).budget_s if request.budget_s is None else request.budget_s
        if not controller.policy.enable_queue or gate.now() + again.PAUSE_S > request.arrived + budget_s:
            return False
        refused = [controller.endpoints[name] for name in self._refused_by if name in controller.endpoints]
        return self._tries == again.MOST or (not elsewhere and any(one.available for one in refused))

    def _goes_elsewhere(self, request: Request) -> bool:
        """Let it go to others than it came back from, if one may be used; tell whether."""
        if not self._refused_by:
            return False
        before = request.allowed
        request.allowed = self._reception.gate.controller.others(request, self._refused_by)
        return request.allowed is not before

    def _ask_again(self) -> None:
        """Have it decided now, if its client is still there."""
        ticket, gate = self._ticket, self._reception.gate
        if ticket is not None:
            self._goes_elsewhere(ticket.request)
            ask = gate.offer if self._action is _QUEUE and self._modes.tells_end else gate.send
            ask(ticket)

    def _expect_back(self, decision: Dispatch) -> bytes:
        """Return what has the request come back, should its server take no connection."""
        self._refused_by |= {decision.endpoint}  # if it comes back
        self._return_key, more = self._reception.again.expect(self, self._tries)
        return more

    def _expect_no_more(self) -> None:
        self._reception.again.forget(self._return_key)
        self._return_key = ""

    def give_up(self) -> tuple[float, frozenset[str]]:
        """Note that the server we chose takes no connection, and that the request is here again.

        Return how long it waited, since what connecting took is not counted against its budget, and who refused it.
        """
        self._return_key, self._answer, self._wait_s = "", Answer.FAILED, None
        self._close()
        return self._waited_s, self._refused_by

    # ---- a request's body, before the decision and after

    @property
    def paused(self) -> bool:
        """The next message shall be left unread until a reply was sent."""
        return self._kept is not None and self._kept.is_full and self._state is _HELD

    def _take_piece(self, kind: int, piece: bytes) -> None:
        """Send a piece of a body on; before the decision, keep what will. The answer's last one is its end."""
        reply = self._modes.answer(kind, piece)
        if self._state is _PASSING:
            self._reply(reply)
            if kind == bodies.RESPONSE:
                self._take_progress(piece)
        elif self._kept is not None and kind == bodies.REQUEST:
            self._kept.add(piece, reply)
            self._look_for_model(self._kept)
        elif self._is_asked and self._state is _READING and kind == bodies.REQUEST:
            self._take_whole(piece)
        elif self._state is not _REFUSED:  # what was on its way when we refused goes nowhere
            raise ProtocolError(f"a body has no place here: the stream is {self._state.name.lower()}")

    def _look_for_model(self, kept: Kept) -> None:
        """Offer a request when its body has told the model, or all it will be asked."""
        if self._began is None:
            return
        model = kept.model()
        if model is not None or kept.is_read:
            self.read_no_more(model)

    def read_no_more(self, model: str | None = None) -> None:
        """Offer a request with what is known of it: its body has told the `model`, or has had its time."""
        began, self._began = self._began, None
        if began is not None:
            if model is not None:
                began.fields["model"] = model
            self._reception.reading.spoke(self)
            if self._kept is not None:
                self._kept.look_no_more()
            self._offer(began)

    def _take_whole(self, piece: bytes) -> None:
        """Offer a request whose body was asked for, and came in one piece."""
        self.read_no_more(bodies.model_in(bodies.text_of(piece, bodies.MODEL_WITHIN)))

    def half_closed(self) -> bool:
        """Note that the client says no more; tell whether it still waits for what we say: else the stream is over."""
        if self._modes.tells_end or self._state not in (_READING, _HELD):
            return False
        self._is_half_closed = True
        if self._kept is not None:
            self._kept.is_whole = True
            self._look_for_model(self._kept)
        return not self.over

    def _keep_trailers(self) -> None:
        if self._is_asked and self._state is _READING:  # the body that was asked for does not come: no way for a pick
            self._drop_body()
            self._state = _REFUSED
            self._reply(refusal(self._reception, self._shape, Outcome.MODEL_MISSING))
            return
        if self._kept is None:
            raise ProtocolError("request_trailers has no place here: the request's headers are not answered")
        self._kept.end(wire.go_on(Kind.REQUEST_TRAILERS))
        self._look_for_model(self._kept)

    def _reply_kept(self, kept: Kept) -> None:
        self._kept = None
        for reply in kept.take():
            self._reply(reply)

    def _drop_body(self) -> None:
        if self._began is not None:
            self._began = None
            self._reception.reading.ended(self)
        if self._kept is not None:
            self._kept.take()
            self._kept = None

    # ---- an answer's body: how it begins, and ends

    def _observe(self, incoming: Incoming) -> None:
        """Take the first piece of an answer's body, which Envoy's first-byte probe shows us, and end the probe."""
        self._reception.has_shown = True
        shown = self._reception.running.get(incoming.number)
        if shown is not None and incoming.kind is Kind.RESPONSE_BODY:
            shown.show(has_bytes=incoming.has_body, is_last=incoming.is_last)
            if not incoming.has_body and not incoming.is_last:
                return  # an empty piece: the first byte is still to come
        self.over = True

    def _take_progress(self, piece: bytes) -> None:
        if self._ticket is not None:
            is_last = bodies.is_last(piece)
            if self._shown is None:
                self.show(has_bytes=bool(bodies.text_of(piece)), is_last=is_last)
            if is_last:
                self._close()

    def show(self, *, has_bytes: bool, is_last: bool) -> None:
        """Take it that an answer's body begins, or that it ends and had not a byte. Once shown, the rest is no news."""
        if has_bytes or is_last:
            self._shown = has_bytes
            self._judge_beginning()
            if self._number:
                self._forget_number()

    def _judge_beginning(self) -> None:
        """Tell the core of an answer that begins well: by its head, or where bodies are shown to us, by its first byte.

        Heads promise: an engine whose server died behind them, or that has nothing to say, answers 200 like any other.
        """
        answer, ticket = self._answer, self._ticket
        is_good = answer is Answer.OK or (answer is Answer.UNKNOWN and self._shape is Shape.GRPC)
        if ticket is None or not is_good:
            return
        if self._shown is False:
            if self._needs_body:
                self._answer = Answer.EMPTY
        elif self._shown and self._reception.is_probed:
            self._reception.gate.first_token(ticket)
        elif self._shown or (answer is Answer.OK and not self._will_be_shown):
            self._reception.gate.answered(ticket)

    @property
    def _will_be_shown(self) -> bool:
        """Whether the first piece of the answer's body comes to us, and has not come yet."""
        if self._shown is not None:
            return False
        return self._modes.shows_answer or (self._number != 0 and self._reception.has_shown)

    def _forget_number(self) -> None:
        del self._reception.running[self._number]
        self._number = 0

    def _take_last(self, trailers: Incoming) -> None:
        """Follow the trailers of an answer: it is over."""
        if GRPC_STATUS in trailers.headers:
            self._answer = judge_trailers(trailers)
        if self._modes.shows_answer and self._shown is None:
            self.show(has_bytes=False, is_last=True)
        self._close()

    # ---- what else comes, or never does

    def _take_rest(self, incoming: Incoming) -> None:
        match self._state, incoming.kind:
            case _State.NEW, _:
                self._take_unasked(incoming)
            case ((_State.READING | _State.HELD), Kind.RESPONSE_HEADERS):  # Envoy answered by itself: nobody waits
                self._close()
                self._drop_body()
                self._state = _State.PASSING
                self._reply(wire.go_on(incoming.kind))
            case ((_State.READING | _State.HELD), Kind.REQUEST_TRAILERS):
                self._keep_trailers()
            case (
                (_State.PASSING | _State.REFUSED),
                Kind.REQUEST_BODY | Kind.RESPONSE_BODY | Kind.REQUEST_TRAILERS | Kind.RESPONSE_TRAILERS,
            ):
                self._reply(wire.go_on(incoming.kind))
                if incoming.kind is Kind.RESPONSE_TRAILERS:
                    self._take_last(incoming)
            case state, kind:
                raise ProtocolError(f"{kind.value} has no place here: the stream is {state.name.lower()}")

    def _take_unasked(self, incoming: Incoming) -> None:
        """Let pass what Envoy answered by itself before it asked us (413), or if request headers are not sent."""
        self._reception.silence.spoke(self)
        if incoming.modes is not None:  # an answer's body follows, and how, the gateway tells
            self._modes, self._state = self._reception.dialect.modes(incoming), _PASSING
        self._reply(wire.go_on(incoming.kind))

    def give_in(self) -> None:
        """Have the driver end a stream on which nothing comes."""
        if self.hang_up is not None:
            self.hang_up()
