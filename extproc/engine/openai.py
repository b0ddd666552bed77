"""The OpenAI shapes of the simulated engine: a request body in, answers, chunks and errors out.

No I/O and no engine here. Shapes and messages follow vLLM's server; the text of an answer is made of filler words,
one per token.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar

if TYPE_CHECKING:
    from collections.abc import Mapping

Kind = Literal["chat", "text"]
FinishReason = Literal["length", "stop"]
T = TypeVar("T")

DEFAULT_OUTPUT_TOKENS: Final = 64
MOST_CHOICES: Final = 1024
"""Choices of one request, at most: `n` of each prompt of a list."""
CHARS_PER_TOKEN: Final = 4
_WORDS: Final = ("wait", "your", "turn", "then", "take", "room", "and", "go")
_ERROR_TYPES: Final = {
    400: "BadRequestError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
}


class BadRequest(Exception):  # noqa: N818  # it is the name of the answer, and never leaves this package
    """The request cannot be served: an HTTP status and a message for its sender."""

    def __init__(self, message: str, status: int = 400, param: str | None = None) -> None:
        self.status = status
        self.param = param
        super().__init__(message)


def error_body(status: int, message: str, param: str | None = None) -> dict[str, Any]:
    """The JSON of an error answer."""
    kind = _ERROR_TYPES.get(status, "APIError")
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}


@dataclass(frozen=True, slots=True)
class Ask:
    """What a valid request asks for."""

    kind: Kind
    model: str
    prompt_tokens: int
    output_tokens: int
    finish_reason: FinishReason
    stream: bool
    include_usage: bool
    priority: int
    session: str | None
    shared_tokens: int = 0
    """So many tokens at the start of the prompt are the same in all requests that tell it."""
    n: int = 1
    """How many answers each prompt gets."""
    prompts: tuple[int, ...] = ()
    """Tokens of each prompt, where there are several; `prompt_tokens` is their sum."""
    adapter: str | None = None
    """As at vLLM a name that is served beside the first one is a LoRA adapter's, to an engine that knows any."""

    @property
    def sequences(self) -> tuple[int, ...]:
        """The tokens of each choice's prompt, by its index: as vLLM, `n` of the first prompt, then of the next."""
        return tuple(tokens for tokens in self.prompts or (self.prompt_tokens,) for _ in range(self.n))


def read_ask(
    kind: Kind, body: bytes, headers: Mapping[str, str], models: tuple[str, ...], longest: int, *, any_model: bool
) -> Ask:
    """Check a request. `models` are the served names, the first one the default; raises BadRequest."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the body is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise BadRequest("the body must be a JSON object")
    model = _typed(fields, "model", str, models[0])
    if model not in models and not any_model:
        raise BadRequest(f"The model `{model}` does not exist.", 404, "model")
    n = _typed(fields, "n", int, 1)
    if n < 1:
        raise BadRequest(f"n must be at least 1, got {n}.", param="n")
    chars = [_chat_chars(fields)] if kind == "chat" else _prompt_chars(fields)
    if len(chars) > MOST_CHOICES:
        raise BadRequest(
            f"`prompt` must be a list of at most {MOST_CHOICES} prompts, got {len(chars)}.", param="prompt"
        )
    if n * len(chars) > MOST_CHOICES:
        raise BadRequest(
            f"n must be at most {MOST_CHOICES // len(chars)} for {len(chars)} prompts, got {n}.", param="n"
        )
    told = _told(headers, fields, "x-sim-prompt-tokens")
    prompts = tuple(told or max(1, count // CHARS_PER_TOKEN) for count in chars)
    prompt = max(prompts)
    limit = _max_tokens(fields, kind)
    wanted = _told(headers, fields, "x-sim-output-tokens")
    stops = wanted is not None and (limit is None or wanted < limit)
    output = (wanted if stops else limit) or max(1, min(DEFAULT_OUTPUT_TOKENS, longest - prompt))
    if prompt + output > longest:
        raise BadRequest(
            f"This model's maximum context length is {longest} tokens. However, you requested "
            f"{prompt + output} tokens ({prompt} in the prompt, {output} in the completion). "
            "Please reduce the length of the prompt or the completion."
        )
    stream = _typed(fields, "stream", bool, False)
    options = _typed(fields, "stream_options", dict, {})
    if options and not stream:
        raise BadRequest("Stream options can only be defined when `stream=True`.", param="stream_options")
    return Ask(
        kind=kind,
        model=model,
        prompt_tokens=sum(prompts),
        output_tokens=output,
        finish_reason="stop" if stops else "length",
        stream=stream,
        include_usage=_typed(options, "include_usage", bool, False),
        priority=_typed(fields, "priority", int, 0),
        session=headers.get("x-session-id") or _typed(fields, "user", str, "") or None,
        shared_tokens=_told(headers, fields, "x-sim-shared-prompt-tokens") or 0,
        n=n,
        prompts=prompts if len(prompts) > 1 else (),
        adapter=model if model in models[1:] else None,
    )


def _typed(fields: dict[str, Any], name: str, kind: type[T], default: T) -> T:
    """A field of the right type; absent and null mean the default. A bool is no int here."""
    value = fields.get(name)
    if value is None:
        return default
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise BadRequest(f"`{name}` must be of type {kind.__name__}, got {type(value).__name__}", param=name)
    return value


def _told(headers: Mapping[str, str], fields: dict[str, Any], name: str) -> int | None:
    """A length that the request tells in a header; or, for proxies that drop headers, in vLLM's field for extras."""
    text = headers.get(name)
    if text is None:
        text = _typed(fields, "vllm_xargs", dict, {}).get(name)
    if text is None:
        return None
    text = str(text)
    if not (text.isascii() and text.isdigit() and 0 < len(text) < 10 and int(text) > 0):
        raise BadRequest(f"header {name} must be a whole number of at least 1, got {text!r}")
    return int(text)


def _max_tokens(fields: dict[str, Any], kind: Kind) -> int | None:
    names = ("max_completion_tokens", "max_tokens") if kind == "chat" else ("max_tokens",)
    for name in names:
        if fields.get(name) is not None:
            limit = _typed(fields, name, int, 0)
            if limit < 1:
                raise BadRequest(f"{name} must be at least 1, got {limit}.", param=name)
            return limit
    return None


def _chat_chars(fields: dict[str, Any]) -> int:
    messages = fields.get("messages")
    if not isinstance(messages, list) or not messages:
        raise BadRequest("`messages` must be a non-empty list", param="messages")
    chars = 0
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise BadRequest(f"{where} must be an object with a `role`", param="messages")
        content = message.get("content")
        if isinstance(content, str):
            chars += len(content)
        elif isinstance(content, list) and all(isinstance(part, dict) for part in content):
            chars += sum(len(part["text"]) for part in content if isinstance(part.get("text"), str))
        elif content is not None:
            raise BadRequest(f"{where}.content must be a string or a list of parts", param="messages")
    return chars


def _prompt_chars(fields: dict[str, Any]) -> list[int]:
    """The characters of each prompt: a text, tokens, or a list of either."""
    prompt = fields.get("prompt")
    many = prompt if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else [prompt]
    return [_chars_of(one) for one in many]


def _chars_of(prompt: object) -> int:
    match prompt:
        case str(text):
            return len(text)
        case [int(), *_] as tokens if all(type(token) is int for token in tokens):
            return len(tokens) * CHARS_PER_TOKEN
        case _:
            raise BadRequest("`prompt` must be a string, a list of tokens, or a list of these", param="prompt")


def answer_text(start: int, end: int) -> str:
    """The text of the output tokens from `start` to before `end`."""
    return "".join(_WORDS[number % len(_WORDS)] + " " for number in range(start, end))


class Answer:
    """The bytes of one request's answer, as a whole or as server-sent events."""

    def __init__(self, ask: Ask, request_id: str) -> None:
        chat = ask.kind == "chat"
        self._ask = ask
        self._meta = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{request_id}",
            "object": "chat.completion" if chat else "text_completion",
            "created": int(time.time()),
            "model": ask.model,
        }
        if ask.stream and chat:
            self._meta["object"] = "chat.completion.chunk"
        # Only words vary between the chunks of a choice, and words need no escaping: cut one chunk at its word.
        self._open = len(ask.sequences)  # choices that are not complete
        self._cuts = [self._event(index, self._choice("\0", None)).split(rb"\u0000") for index in range(self._open)]

    def whole(self) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        ask, text = self._ask, answer_text(0, self._ask.output_tokens)
        said = {"message": {"role": "assistant", "content": text}} if ask.kind == "chat" else {"text": text}
        choices = [
            {"index": index, "logprobs": None, "finish_reason": ask.finish_reason, **said}
            for index in range(len(ask.sequences))
        ]
        return self._meta | {"choices": choices, "usage": self._usage()}

    def chunk(self, start: int, end: int, index: int = 0) -> bytes:
        """The events for the output tokens of a choice from `start` to before `end`; the last of all end the stream."""
        ask = self._ask
        first = self._event(index, {"role": "assistant", "content": ""}) if start == 0 and ask.kind == "chat" else b""
        if end < ask.output_tokens:
            head, tail = self._cuts[index]
            return b"".join((first, head, answer_text(start, end).encode(), tail))
        last = self._event(index, self._choice(answer_text(start, end), ask.finish_reason))
        self._open -= 1
        if self._open > 0:
            return first + last
        usage = b""
        if ask.include_usage:
            usage = b"data: " + json.dumps(self._meta | {"choices": [], "usage": self._usage()}).encode() + b"\n\n"
        return b"".join((first, last, usage, b"data: [DONE]\n\n"))

    def _choice(self, text: str, reason: str | None) -> dict[str, Any]:
        if self._ask.kind == "chat":
            return {"content": text, "finish_reason": reason}
        return {"text": text, "finish_reason": reason}

    def _event(self, index: int, parts: dict[str, Any]) -> bytes:
        choice: dict[str, Any] = {"index": index, "logprobs": None, "finish_reason": parts.pop("finish_reason", None)}
        choice |= {"delta": parts} if self._ask.kind == "chat" else parts
        return b"data: " + json.dumps(self._meta | {"choices": [choice]}).encode() + b"\n\n"

    def _usage(self) -> dict[str, int]:
        prompt, output = self._ask.prompt_tokens, self._ask.output_tokens * len(self._ask.sequences)
        return {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output}
