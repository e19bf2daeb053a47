"""A worker for benchmarks of the router: it answers at once, and streams events of one token at a pace.

    python -m bench.router.fake_worker PORT SECONDS

Each stream gets an event of a chat completion every SECONDS (all of them in one turn of the loop, as a step of a model
gives them), and as many as its `max_tokens`. What is not streamed is answered whole. It costs little, so that a machine
of two cores has room for what is measured.
"""

import asyncio
import re
import sys
from typing import ClassVar, cast

import uvloop

EVENT = (
    b'data: {"id":"chatcmpl-21059fdf6d6049d7afd58ac32526acae","created":1796030468,"model":"fake",'
    b'"choices":[{"index":0,"delta":{"content":" word"},"logprobs":null,"finish_reason":null}],"object":'
    b'"chat.completion.chunk"}\n\n'
)
CHUNK = b"%x\r\n%b\r\n" % (len(EVENT), EVENT)
END = b"data: [DONE]\n\n"
LAST = b"%x\r\n%b\r\n0\r\n\r\n" % (len(END), END)
STREAM = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n"
    b"X-Request-Id: chatcmpl-21059fdf6d6049d7afd58ac32526acae\r\n\r\n"
)
WHOLE = b'{"id":"cmpl-1","object":"text_completion","model":"fake","choices":[{"index":0,"text":"x"}]}'
MODELS = b'{"object":"list","data":[{"id":"fake","object":"model"}]}'
TOKENS = re.compile(rb'"max_tokens": ?(\d+)')


class Server(asyncio.Protocol):
    """One connection; a request has come once its body has."""

    streams: ClassVar["dict[Server, int]"] = {}

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.data = b""

    def connection_lost(self, error: Exception | None) -> None:
        self.streams.pop(self, None)

    def data_received(self, data: bytes) -> None:
        self.data += data
        head, found, body = self.data.partition(b"\r\n\r\n")
        length = re.search(rb"(?i)content-length: *(\d+)", head)
        if not found or len(body) < (int(length[1]) if length else 0):
            return
        self.data = b""
        if b'"stream": true' in body:
            tokens = TOKENS.search(body)
            self.streams[self] = int(tokens[1]) if tokens else 16
            self.transport.write(STREAM)
            return
        answer = MODELS if b"/v1/models" in head[:40] else WHOLE
        self.transport.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(answer), answer)
        )


async def step(seconds: float) -> None:
    """An event to each stream, again and again."""
    streams = Server.streams
    while True:
        await asyncio.sleep(seconds)
        for server, left in list(streams.items()):
            if left:
                server.transport.write(CHUNK)
                streams[server] = left - 1
            else:
                server.transport.write(LAST)
                del streams[server]


async def main() -> None:
    port, seconds = int(sys.argv[1]), float(sys.argv[2])
    server = await asyncio.get_running_loop().create_server(Server, "127.0.0.1", port, backlog=4096)
    async with server:
        await step(seconds)


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())
