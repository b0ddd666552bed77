"""An upstream that streams `/N` as N tokens in server-sent events as fast as it can, `/N/MS` so many ms apart."""

from __future__ import annotations

import asyncio

TOKEN = b'data: {"choices": [{"index": 0, "delta": {"content": " word"}}]}\n\n'
CHUNK = f"{len(TOKEN):x}\r\n".encode() + TOKEN + b"\r\n"
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer the requests of one connection; they have no bodies."""
    while request := await reader.readline():
        while await reader.readline() not in (b"\r\n", b""):
            pass
        count, _, pause_ms = request.split(b" ")[1].strip(b"/").decode().partition("/")
        writer.write(HEAD)
        for _ in range(int(count) if count.isdigit() else 0):
            writer.write(CHUNK)
            await writer.drain()
            if pause_ms.isdigit():
                await asyncio.sleep(int(pause_ms) / 1000)
        writer.write(b"0\r\n\r\n")
    writer.close()


async def main() -> None:
    """Serve until ended."""
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    print(f"listening on {host}:{port}", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
