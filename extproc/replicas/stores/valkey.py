"""Valkey or Redis: one script a second per sidecar. Ages go by the server's clock alone, so that nobody's own matters.

A clock that goes back forgets who spoke before it did: who lives is known again after a second, as where it was empty.

Three keys in one hash slot, so that it works in a cluster: who said when that he lives, what he said, and a counter.
They are gone an hour after the last sidecar. A server that was restarted empty knows everybody again after a second;
each brings the place in the order of joining that it had.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any

from extproc.errors import ConfigError, pip_install
from extproc.replicas.messages import LAST, Member
from extproc.replicas.stores import StoreError

try:
    from valkey.asyncio import Valkey
    from valkey.exceptions import ValkeyError
except ImportError as missing:
    problem = f"replicas.valkey: needs a client, which is not here: {pip_install('valkey')} ({missing})"
    raise ConfigError("configuration", [problem]) from None

if TYPE_CHECKING:
    from extproc.config import ValkeyConfig

BEAT_S = 1.0
ALIVE_S = 3.0
TIMEOUT_S = 0.8

_BEAT = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local known = redis.call('HGET', KEYS[2], ARGV[1])
local joined = tonumber(ARGV[3])
if not known or joined > 0 then
  if joined <= 0 then
    joined = redis.call('INCR', KEYS[3])
  elseif joined > tonumber(redis.call('GET', KEYS[3]) or '0') then
    redis.call('SET', KEYS[3], joined)
  end
  redis.call('HSET', KEYS[2], ARGV[1], string.format('%d', joined) .. ' ' .. ARGV[2])
end
redis.call('ZADD', KEYS[1], now, ARGV[1])
local function forget(from, to)
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], from, to)) do
    redis.call('ZREM', KEYS[1], id)
    redis.call('HDEL', KEYS[2], id)
  end
end
forget('-inf', now - tonumber(ARGV[4]))
forget('(' .. now, '+inf')
for _, key in ipairs(KEYS) do redis.call('EXPIRE', key, 3600) end
return redis.call('HGETALL', KEYS[2])
"""
_LEAVE = "return redis.call('HEXISTS', KEYS[2], ARGV[1]) == 1 and redis.call('HSET', KEYS[2], ARGV[1], '0 ') or 0"
"""Without an address: others see it until it is old."""


class ValkeyStore:
    """Members of a pool in Valkey."""

    beat_s = BEAT_S

    def __init__(self, config: ValkeyConfig, pool: str) -> None:
        """Use the server that `config` names; nothing is opened yet. Raises ConfigError."""
        self._password_file = config.password_file
        self._url = config.url.get_secret_value()
        self._keys = [f"{{extproc:{pool}}}:{what}" for what in ("alive", "members", "joined")]
        self._client: Valkey | None = None

    async def beat(self, me: Member) -> list[Member]:
        """Say that we live; return who does."""
        joined = me.joined if me.joined < LAST - 1 else 0
        found = await self._ask(_BEAT, me.id, me.address, str(joined), str(int(ALIVE_S * 1000)))
        try:
            return [_member(name, said) for name, said in zip(found[::2], found[1::2], strict=True)]
        except (ValueError, TypeError, AttributeError) as error:
            raise StoreError(f"no list of members: {error}") from None

    async def leave(self, me: Member) -> None:
        """Say that we go."""
        await self._ask(_LEAVE, me.id)

    async def close(self) -> None:
        """Give up connections."""
        if self._client is not None:
            client, self._client = self._client, None
            await client.aclose()

    async def _ask(self, script: str, *arguments: str) -> list[bytes]:
        try:
            async with asyncio.timeout(TIMEOUT_S):
                if self._client is None:
                    self._client = self._connect()
                # EVAL and not a cached script: one a second, and a server that was restarted knows no script.
                asked: Any = self._client.eval(script, len(self._keys), *self._keys, *arguments)
                answer: list[bytes] = await asked
                return answer
        except (ValkeyError, OSError, TimeoutError, ValueError) as error:
            await self._drop()
            raise StoreError(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__) from None

    def _connect(self) -> Valkey:
        password = Path(self._password_file).read_text(encoding="utf-8").strip() if self._password_file else None
        options: dict[str, Any] = {} if password is None else {"password": password}
        client: Valkey = Valkey.from_url(
            self._url, socket_timeout=TIMEOUT_S, socket_connect_timeout=TIMEOUT_S, max_connections=2, **options
        )
        return client

    async def _drop(self) -> None:
        """Begin anew: what is half said on a connection must not be heard as the answer to something else."""
        client, self._client = self._client, None
        if client is not None:
            try:
                async with asyncio.timeout(TIMEOUT_S):
                    await client.aclose()
            except (ValkeyError, OSError, TimeoutError):
                pass


def _member(name: bytes, said: bytes) -> Member:
    joined, _, address = said.decode().partition(" ")
    return Member(name.decode(), address, int(joined))
