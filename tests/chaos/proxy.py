"""A TCP proxy before Redis that injects faults: error answers, slow answers, cut connections.

It reads the protocol: an error replaces exactly one answer, and a cut happens exactly before Redis
gets a write, or after Redis has done it and before the client knows.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import Counter
from dataclasses import dataclass
from typing import Literal

Kind = Literal["error", "slow", "cut before", "cut after"]

# In Valkey's words.
ERRORS = {
    "LOADING": b"-LOADING Valkey is loading the dataset in memory\r\n",
    "BUSY": b"-BUSY Valkey is busy running a script. "
    b"You can only call SCRIPT KILL or SHUTDOWN NOSAVE.\r\n",
    "OOM": b"-OOM command not allowed when used memory > 'maxmemory'. "
    b"script: on @user_script:7.\r\n",
    "MISCONF": b"-MISCONF Errors writing to the AOF file: No space left on device\r\n",
}
# A server that is full or cannot write its file still answers reads.
WRITES_ONLY = {"OOM", "MISCONF"}
WRITES = {b"EVALSHA", b"EVAL", b"SET"}
# Commands that a server answers even while it loads or is busy.
ALWAYS = {b"HELLO", b"AUTH", b"SELECT", b"CLIENT", b"MULTI", b"DISCARD"}
ABORTED = b"-EXECABORT Transaction discarded because of previous errors.\r\n"
START_S = 5.0


@dataclass(frozen=True, slots=True)
class ProxyFault:
    """A kind of fault and its end (time.monotonic). code: of an error; delay_s: of an answer."""

    kind: Kind
    until_s: float
    code: str = ""
    delay_s: float = 0.0


@dataclass(slots=True)
class _Reply:
    """The client's answer to one command. instead: replaces the server's answer."""

    from_server: bool = True
    instead: bytes = b""
    delay_s: float = 0.0
    cut: bool = False


class Proxy:
    """Listens on a free port of the loopback interface, in a thread of its own.

    hits: commands that each kind of fault has met so far
    """

    def __init__(self, upstream_port: int) -> None:
        self.hits: Counter[str] = Counter()
        self.port = 0
        self._upstream = upstream_port
        self._proxy_fault: ProxyFault | None = None
        self._loop = asyncio.new_event_loop()
        self._up = threading.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._run, name="redis-proxy", daemon=True)
        self._thread.start()
        if not self._up.wait(START_S):
            raise TimeoutError("the proxy did not start")

    def inject(self, proxy_fault: ProxyFault) -> None:
        """Inject this fault until it ends; it replaces the one before."""
        self._proxy_fault = proxy_fault

    def clear(self) -> None:
        """Inject no more faults."""
        self._proxy_fault = None

    def close(self) -> None:
        """Stop listening and cut every connection."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(START_S)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.port = server.sockets[0].getsockname()[1]
        self._up.set()
        self._loop.run_forever()
        server.close()
        for task in self._tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*self._tasks, return_exceptions=True))
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()

    def _now(self) -> ProxyFault | None:
        proxy_fault = self._proxy_fault
        if proxy_fault is not None and time.monotonic() > proxy_fault.until_s:
            self._proxy_fault = proxy_fault = None
        return proxy_fault

    async def _serve(self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is not None:
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        writers = [to_client]
        try:
            server, to_server = await asyncio.open_connection("127.0.0.1", self._upstream)
            writers.append(to_server)
            replies: asyncio.Queue[_Reply] = asyncio.Queue(100_000)
            ways = {
                asyncio.ensure_future(_Requests(self, client, to_server, replies).run()),
                asyncio.ensure_future(self._answer(server, to_client, replies)),
            }
            try:
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for way in ways:
                    way.cancel()
                await asyncio.gather(*ways, return_exceptions=True)
        except OSError:
            pass  # the server is away: the client finds its connection closed
        finally:
            for writer in writers:
                with contextlib.suppress(Exception):
                    writer.transport.abort()

    async def _answer(
        self,
        server: asyncio.StreamReader,
        client: asyncio.StreamWriter,
        replies: asyncio.Queue[_Reply],
    ) -> None:
        while True:
            reply = await replies.get()
            raw = await _frame(server) if reply.from_server else b""
            if reply.cut:
                return  # Redis has done it, the client will not know
            if reply.delay_s:
                await asyncio.sleep(reply.delay_s)
            client.write(reply.instead or raw)
            if replies.empty():
                await client.drain()


class _Requests:
    """One connection's commands on their way to the server."""

    def __init__(
        self,
        proxy: Proxy,
        client: asyncio.StreamReader,
        server: asyncio.StreamWriter,
        replies: asyncio.Queue[_Reply],
    ) -> None:
        self._proxy = proxy
        self._client = client
        self._server = server
        self._replies = replies
        self._spoilt = False  # a command of the open transaction was answered by an error

    async def run(self) -> None:
        """Forward commands until the client hangs up, or is cut off."""
        while True:
            name, raw = await _command(self._client)
            proxy_fault = self._proxy._now()
            if proxy_fault is not None and proxy_fault.kind == "cut before" and name in WRITES:
                self._proxy.hits["cut before"] += 1
                return
            reply = self._decide(name, proxy_fault)
            if reply.from_server:
                self._server.write(b"*1\r\n$7\r\nDISCARD\r\n" if reply.instead else raw)
                await self._server.drain()
            await self._replies.put(reply)

    def _decide(self, name: bytes, proxy_fault: ProxyFault | None) -> _Reply:
        if name == b"MULTI":
            self._spoilt = False
        if name == b"EXEC" and self._spoilt:
            self._spoilt = False
            return _Reply(instead=ABORTED)
        if proxy_fault is None:
            return _Reply()
        if proxy_fault.kind == "error":
            allowed = name in ALWAYS or (proxy_fault.code in WRITES_ONLY and name not in WRITES)
            if allowed or name == b"EXEC":
                return _Reply()
            self._proxy.hits[f"error {proxy_fault.code}"] += 1
            self._spoilt = True
            return _Reply(from_server=False, instead=ERRORS[proxy_fault.code])
        if proxy_fault.kind == "slow" and name not in ALWAYS:
            self._proxy.hits["slow"] += 1
            return _Reply(delay_s=proxy_fault.delay_s)
        if proxy_fault.kind == "cut after" and name in WRITES:
            self._proxy.hits["cut after"] += 1
            return _Reply(cut=True)
        return _Reply()


async def _line(reader: asyncio.StreamReader) -> bytes:
    line = await reader.readline()
    if not line.endswith(b"\n"):
        raise ConnectionResetError("the other side hung up")
    return line


async def _command(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """(name in capitals, all bytes) of the next command, an array of bulk strings."""
    head = await _line(reader)
    parts, name = [head], b""
    for number in range(int(head[1:])):
        size = await _line(reader)
        body = await reader.readexactly(int(size[1:]) + 2)
        name = body[:-2].upper() if number == 0 else name
        parts += (size, body)
    return name, b"".join(parts)


async def _frame(reader: asyncio.StreamReader) -> bytes:
    """The bytes of one answer, whatever is nested in it."""
    parts, left = [], 1
    while left:
        line = await _line(reader)
        parts.append(line)
        left -= 1
        kind = line[:1]
        if kind in b"$=!" and int(line[1:]) >= 0:
            parts.append(await reader.readexactly(int(line[1:]) + 2))
        elif kind in b"*~>%" and int(line[1:]) > 0:
            left += int(line[1:]) * (2 if kind == b"%" else 1)
    return b"".join(parts)
