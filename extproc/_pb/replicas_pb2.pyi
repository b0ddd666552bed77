from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Batch(_message.Message):
    __slots__ = ("messages", "allowed")
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    ALLOWED_FIELD_NUMBER: _ClassVar[int]
    messages: _containers.RepeatedCompositeFieldContainer[Message]
    allowed: _containers.RepeatedCompositeFieldContainer[Allowed]
    def __init__(self, messages: _Optional[_Iterable[_Union[Message, _Mapping]]] = ..., allowed: _Optional[_Iterable[_Union[Allowed, _Mapping]]] = ...) -> None: ...

class Message(_message.Message):
    __slots__ = ("hello", "leave", "welcome", "redirect", "met", "refuse", "held", "offer", "synced", "names", "cancel", "release", "first_token", "answered", "report", "return_", "grant", "turned", "status", "remember", "learned", "ask", "told", "moved", "beat")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    LEAVE_FIELD_NUMBER: _ClassVar[int]
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    REDIRECT_FIELD_NUMBER: _ClassVar[int]
    MET_FIELD_NUMBER: _ClassVar[int]
    REFUSE_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    OFFER_FIELD_NUMBER: _ClassVar[int]
    SYNCED_FIELD_NUMBER: _ClassVar[int]
    NAMES_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    ANSWERED_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    RETURN__FIELD_NUMBER: _ClassVar[int]
    GRANT_FIELD_NUMBER: _ClassVar[int]
    TURNED_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    REMEMBER_FIELD_NUMBER: _ClassVar[int]
    LEARNED_FIELD_NUMBER: _ClassVar[int]
    ASK_FIELD_NUMBER: _ClassVar[int]
    TOLD_FIELD_NUMBER: _ClassVar[int]
    MOVED_FIELD_NUMBER: _ClassVar[int]
    BEAT_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    leave: Leave
    welcome: Welcome
    redirect: Member
    met: Met
    refuse: str
    held: Held
    offer: Offer
    synced: bool
    names: Names
    cancel: int
    release: Release
    first_token: int
    answered: int
    report: Report
    return_: int
    grant: Grant
    turned: Turned
    status: Status
    remember: Home
    learned: Learnt
    ask: Ask
    told: Told
    moved: Moved
    beat: Beat
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., leave: _Optional[_Union[Leave, _Mapping]] = ..., welcome: _Optional[_Union[Welcome, _Mapping]] = ..., redirect: _Optional[_Union[Member, _Mapping]] = ..., met: _Optional[_Union[Met, _Mapping]] = ..., refuse: _Optional[str] = ..., held: _Optional[_Union[Held, _Mapping]] = ..., offer: _Optional[_Union[Offer, _Mapping]] = ..., synced: _Optional[bool] = ..., names: _Optional[_Union[Names, _Mapping]] = ..., cancel: _Optional[int] = ..., release: _Optional[_Union[Release, _Mapping]] = ..., first_token: _Optional[int] = ..., answered: _Optional[int] = ..., report: _Optional[_Union[Report, _Mapping]] = ..., return_: _Optional[int] = ..., grant: _Optional[_Union[Grant, _Mapping]] = ..., turned: _Optional[_Union[Turned, _Mapping]] = ..., status: _Optional[_Union[Status, _Mapping]] = ..., remember: _Optional[_Union[Home, _Mapping]] = ..., learned: _Optional[_Union[Learnt, _Mapping]] = ..., ask: _Optional[_Union[Ask, _Mapping]] = ..., told: _Optional[_Union[Told, _Mapping]] = ..., moved: _Optional[_Union[Moved, _Mapping]] = ..., beat: _Optional[_Union[Beat, _Mapping]] = ...) -> None: ...

class Member(_message.Message):
    __slots__ = ("id", "address", "joined")
    ID_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    JOINED_FIELD_NUMBER: _ClassVar[int]
    id: str
    address: str
    joined: int
    def __init__(self, id: _Optional[str] = ..., address: _Optional[str] = ..., joined: _Optional[int] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("version", "pool", "member", "purpose", "followers", "epoch", "names", "rules")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    POOL_FIELD_NUMBER: _ClassVar[int]
    MEMBER_FIELD_NUMBER: _ClassVar[int]
    PURPOSE_FIELD_NUMBER: _ClassVar[int]
    FOLLOWERS_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    NAMES_FIELD_NUMBER: _ClassVar[int]
    RULES_FIELD_NUMBER: _ClassVar[int]
    version: int
    pool: str
    member: Member
    purpose: int
    followers: int
    epoch: int
    names: _containers.RepeatedScalarFieldContainer[str]
    rules: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, version: _Optional[int] = ..., pool: _Optional[str] = ..., member: _Optional[_Union[Member, _Mapping]] = ..., purpose: _Optional[int] = ..., followers: _Optional[int] = ..., epoch: _Optional[int] = ..., names: _Optional[_Iterable[str]] = ..., rules: _Optional[_Iterable[str]] = ...) -> None: ...

class Leave(_message.Message):
    __slots__ = ("successor",)
    SUCCESSOR_FIELD_NUMBER: _ClassVar[int]
    successor: Member
    def __init__(self, successor: _Optional[_Union[Member, _Mapping]] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("member", "epoch")
    MEMBER_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    member: Member
    epoch: int
    def __init__(self, member: _Optional[_Union[Member, _Mapping]] = ..., epoch: _Optional[int] = ...) -> None: ...

class Met(_message.Message):
    __slots__ = ("member", "followers", "epoch")
    MEMBER_FIELD_NUMBER: _ClassVar[int]
    FOLLOWERS_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    member: Member
    followers: int
    epoch: int
    def __init__(self, member: _Optional[_Union[Member, _Mapping]] = ..., followers: _Optional[int] = ..., epoch: _Optional[int] = ...) -> None: ...

class Names(_message.Message):
    __slots__ = ("names", "rules")
    NAMES_FIELD_NUMBER: _ClassVar[int]
    RULES_FIELD_NUMBER: _ClassVar[int]
    names: _containers.RepeatedScalarFieldContainer[str]
    rules: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, names: _Optional[_Iterable[str]] = ..., rules: _Optional[_Iterable[str]] = ...) -> None: ...

class Beat(_message.Message):
    __slots__ = ("number", "seen")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    SEEN_FIELD_NUMBER: _ClassVar[int]
    number: int
    seen: int
    def __init__(self, number: _Optional[int] = ..., seen: _Optional[int] = ...) -> None: ...

class Asked(_message.Message):
    __slots__ = ("id", "age_s", "model", "request_class", "tenant", "session", "home", "budget_s", "prompt_tokens", "max_output_tokens", "sequences", "kind", "allowed")
    ID_FIELD_NUMBER: _ClassVar[int]
    AGE_S_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    REQUEST_CLASS_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    HOME_FIELD_NUMBER: _ClassVar[int]
    BUDGET_S_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    ALLOWED_FIELD_NUMBER: _ClassVar[int]
    id: str
    age_s: float
    model: str
    request_class: str
    tenant: str
    session: str
    home: str
    budget_s: float
    prompt_tokens: int
    max_output_tokens: int
    sequences: int
    kind: str
    allowed: int
    def __init__(self, id: _Optional[str] = ..., age_s: _Optional[float] = ..., model: _Optional[str] = ..., request_class: _Optional[str] = ..., tenant: _Optional[str] = ..., session: _Optional[str] = ..., home: _Optional[str] = ..., budget_s: _Optional[float] = ..., prompt_tokens: _Optional[int] = ..., max_output_tokens: _Optional[int] = ..., sequences: _Optional[int] = ..., kind: _Optional[str] = ..., allowed: _Optional[int] = ...) -> None: ...

class Allowed(_message.Message):
    __slots__ = ("names",)
    NAMES_FIELD_NUMBER: _ClassVar[int]
    names: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, names: _Optional[_Iterable[str]] = ...) -> None: ...

class Held(_message.Message):
    __slots__ = ("number", "asked", "endpoint", "held_s", "begun")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    ASKED_FIELD_NUMBER: _ClassVar[int]
    ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    HELD_S_FIELD_NUMBER: _ClassVar[int]
    BEGUN_FIELD_NUMBER: _ClassVar[int]
    number: int
    asked: Asked
    endpoint: str
    held_s: float
    begun: bool
    def __init__(self, number: _Optional[int] = ..., asked: _Optional[_Union[Asked, _Mapping]] = ..., endpoint: _Optional[str] = ..., held_s: _Optional[float] = ..., begun: _Optional[bool] = ...) -> None: ...

class Offer(_message.Message):
    __slots__ = ("number", "asked")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    ASKED_FIELD_NUMBER: _ClassVar[int]
    number: int
    asked: Asked
    def __init__(self, number: _Optional[int] = ..., asked: _Optional[_Union[Asked, _Mapping]] = ...) -> None: ...

class Release(_message.Message):
    __slots__ = ("number", "answer")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    number: int
    answer: str
    def __init__(self, number: _Optional[int] = ..., answer: _Optional[str] = ...) -> None: ...

class Moved(_message.Message):
    __slots__ = ("number", "endpoint")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    number: int
    endpoint: str
    def __init__(self, number: _Optional[int] = ..., endpoint: _Optional[str] = ...) -> None: ...

class Load(_message.Message):
    __slots__ = ("running", "waiting", "kv_usage", "gpu_usage", "tokens_per_s", "kv_capacity_tokens")
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    KV_USAGE_FIELD_NUMBER: _ClassVar[int]
    GPU_USAGE_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    KV_CAPACITY_TOKENS_FIELD_NUMBER: _ClassVar[int]
    running: float
    waiting: float
    kv_usage: float
    gpu_usage: float
    tokens_per_s: float
    kv_capacity_tokens: int
    def __init__(self, running: _Optional[float] = ..., waiting: _Optional[float] = ..., kv_usage: _Optional[float] = ..., gpu_usage: _Optional[float] = ..., tokens_per_s: _Optional[float] = ..., kv_capacity_tokens: _Optional[int] = ...) -> None: ...

class Report(_message.Message):
    __slots__ = ("number", "load")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    number: int
    load: Load
    def __init__(self, number: _Optional[int] = ..., load: _Optional[_Union[Load, _Mapping]] = ...) -> None: ...

class Grant(_message.Message):
    __slots__ = ("number", "outcome", "endpoint", "position", "home", "wait")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    HOME_FIELD_NUMBER: _ClassVar[int]
    WAIT_FIELD_NUMBER: _ClassVar[int]
    number: int
    outcome: str
    endpoint: str
    position: int
    home: str
    wait: Wait
    def __init__(self, number: _Optional[int] = ..., outcome: _Optional[str] = ..., endpoint: _Optional[str] = ..., position: _Optional[int] = ..., home: _Optional[str] = ..., wait: _Optional[_Union[Wait, _Mapping]] = ...) -> None: ...

class Wait(_message.Message):
    __slots__ = ("held_by", "predicted_s")
    HELD_BY_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_S_FIELD_NUMBER: _ClassVar[int]
    held_by: str
    predicted_s: float
    def __init__(self, held_by: _Optional[str] = ..., predicted_s: _Optional[float] = ...) -> None: ...

class Turned(_message.Message):
    __slots__ = ("number", "outcome", "retry_after_s", "position", "wait", "crowd")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_S_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    WAIT_FIELD_NUMBER: _ClassVar[int]
    CROWD_FIELD_NUMBER: _ClassVar[int]
    number: int
    outcome: str
    retry_after_s: int
    position: int
    wait: Wait
    crowd: Crowd
    def __init__(self, number: _Optional[int] = ..., outcome: _Optional[str] = ..., retry_after_s: _Optional[int] = ..., position: _Optional[int] = ..., wait: _Optional[_Union[Wait, _Mapping]] = ..., crowd: _Optional[_Union[Crowd, _Mapping]] = ...) -> None: ...

class Crowd(_message.Message):
    __slots__ = ("in_flight", "most", "is_shared")
    IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    MOST_FIELD_NUMBER: _ClassVar[int]
    IS_SHARED_FIELD_NUMBER: _ClassVar[int]
    in_flight: int
    most: int
    is_shared: bool
    def __init__(self, in_flight: _Optional[int] = ..., most: _Optional[int] = ..., is_shared: _Optional[bool] = ...) -> None: ...

class Ask(_message.Message):
    __slots__ = ("number", "what", "limit")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    WHAT_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    number: int
    what: str
    limit: int
    def __init__(self, number: _Optional[int] = ..., what: _Optional[str] = ..., limit: _Optional[int] = ...) -> None: ...

class Told(_message.Message):
    __slots__ = ("number", "text")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    number: int
    text: str
    def __init__(self, number: _Optional[int] = ..., text: _Optional[str] = ...) -> None: ...

class Home(_message.Message):
    __slots__ = ("session", "endpoint", "tokens", "age_s")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    AGE_S_FIELD_NUMBER: _ClassVar[int]
    session: str
    endpoint: str
    tokens: int
    age_s: float
    def __init__(self, session: _Optional[str] = ..., endpoint: _Optional[str] = ..., tokens: _Optional[int] = ..., age_s: _Optional[float] = ...) -> None: ...

class Learnt(_message.Message):
    __slots__ = ("what", "model", "kind", "bits", "value", "weight")
    WHAT_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    BITS_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    what: str
    model: str
    kind: str
    bits: int
    value: float
    weight: float
    def __init__(self, what: _Optional[str] = ..., model: _Optional[str] = ..., kind: _Optional[str] = ..., bits: _Optional[int] = ..., value: _Optional[float] = ..., weight: _Optional[float] = ...) -> None: ...

class Limit(_message.Message):
    __slots__ = ("endpoint", "value")
    ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    endpoint: str
    value: int
    def __init__(self, endpoint: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...

class Status(_message.Message):
    __slots__ = ("heard", "members", "group", "limits", "doubted", "number")
    HEARD_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    DOUBTED_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    heard: int
    members: int
    group: int
    limits: _containers.RepeatedCompositeFieldContainer[Limit]
    doubted: _containers.RepeatedScalarFieldContainer[str]
    number: int
    def __init__(self, heard: _Optional[int] = ..., members: _Optional[int] = ..., group: _Optional[int] = ..., limits: _Optional[_Iterable[_Union[Limit, _Mapping]]] = ..., doubted: _Optional[_Iterable[str]] = ..., number: _Optional[int] = ...) -> None: ...
