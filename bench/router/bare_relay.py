"""The floor of a router in Python: bytes from one socket to another, without a look at them.

python -m bench.router.bare_relay PORT WORKER_PORT
"""

import asyncio
import sys
from typing import cast

import uvloop


class Side(asyncio.Protocol):
    """One of two connections; what comes is written to the other."""

    other: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        assert self.other is not None
        self.other.write(data)

    def connection_lost(self, error: Exception | None) -> None:
        if self.other is not None:
            self.other.close()


class Client(Side):
    """A client's; the worker's is opened with the first bytes."""

    def data_received(self, data: bytes) -> None:
        if self.other is None:
            self.opening = asyncio.ensure_future(self.open(data))
        else:
            self.other.write(data)

    async def open(self, data: bytes) -> None:
        _, worker = await asyncio.get_running_loop().create_connection(Side, "127.0.0.1", int(sys.argv[2]))
        worker.other, self.other = self.transport, worker.transport
        worker.transport.write(data)


async def main() -> None:
    server = await asyncio.get_running_loop().create_server(Client, "127.0.0.1", int(sys.argv[1]), backlog=4096)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())
