"""What goes wrong on the rehearsal Hub, when it is told to: values that say which request meets what.

A fault strikes the n-th request of a kind, counted from the moment it is planned; every other request is served as
always. What a fault does is its effect: an answer other than the Hub's own, a late, cut or lost one, none at all, or
something that happens on the Hub at that moment.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

ANY = "*"
"""The kind that every request is of."""

WRONG_DIGEST = {40: "0" * 40, 64: "0" * 64}
"""A digest that no file has, by the number of its hexadecimal digits: of a git object, and sha256."""


@dataclass(frozen=True)
class Fault:
    """``effect`` strikes the requests number ``nth`` (from 1) to ``nth + times - 1`` of a ``kind``; with ``times``
    None, all from ``nth`` on.

    ``kind`` is a shell pattern for the method and the path as it was sent: ``POST */commit/*``.
    """

    kind: str
    nth: int
    effect: Effect
    times: int | None = 1

    def strikes(self, number: int) -> bool:
        """Whether the request with this number, among those of its kind, is struck."""
        return number >= self.nth and (self.times is None or number < self.nth + self.times)


class FaultPlan:
    """The faults to come. ``struck`` lists the (method, path) of each request that met one."""

    def __init__(self, faults: Iterable[Fault] = ()) -> None:
        self.faults = tuple(faults)
        self.struck: list[tuple[str, str]] = []
        self._numbers = [0] * len(self.faults)

    def meet(self, method: str, path: str) -> Effect | None:
        """Count a request, and return what it meets: the effect of the first fault that strikes it."""
        met = [fault.effect for index, fault in enumerate(self.faults) if self._strikes(index, f"{method} {path}")]
        if not met:
            return None
        self.struck.append((method, path))
        return met[0]

    def _strikes(self, index: int, request: str) -> bool:
        fault = self.faults[index]
        if not fnmatchcase(request, fault.kind):
            return False
        self._numbers[index] += 1
        return fault.strikes(self._numbers[index])


@dataclass(frozen=True)
class Answer:
    """What the Hub would have said."""

    status: int
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes


@dataclass(frozen=True)
class Exchange:
    """One request on its way to ``application``, in the hands of an effect."""

    application: ASGIApp
    scope: Scope
    receive: Receive
    send: Send

    async def serve(self) -> None:
        """Answer as always."""
        await self.application(self.scope, self.receive, self.send)

    async def carry_out(self) -> Answer:
        """Do what is asked, and keep the answer."""
        messages: list[Message] = []

        async def keep(message: Message) -> None:
            messages.append(message)

        await self.application(self.scope, self.receive, keep)
        start, *parts = messages
        body = b"".join(part.get("body", b"") for part in parts)
        return Answer(start["status"], tuple(start.get("headers", ())), body)

    async def read_request(self) -> bytes:
        """Take the whole body of the request."""
        message = await self.receive()
        parts = [message.get("body", b"")]
        while message.get("more_body"):
            message = await self.receive()
            parts.append(message.get("body", b""))
        return b"".join(parts)

    def again(self, body: bytes) -> Exchange:
        """The exchange with the request's ``body`` still to be read."""

        async def receive() -> Message:
            return {"type": "http.request", "body": body, "more_body": False}

        return replace(self, receive=receive)

    async def respond(self, answer: Answer, sent: int | None = None) -> None:
        """Send an answer; of its body only the first ``sent`` bytes, while its headers promise the whole."""
        length = (b"content-length", b"%d" % len(answer.body))
        headers = [length, *((name, value) for name, value in answer.headers if name != b"content-length")]
        await self.send({"type": "http.response.start", "status": answer.status, "headers": headers})
        await self.send({"type": "http.response.body", "body": answer.body[:sent], "more_body": sent is not None})

    async def wait_for_the_client(self) -> None:
        """Keep silent until the client goes away."""
        while (await self.receive())["type"] != "http.disconnect":
            pass

    async def close(self) -> None:
        """Close the connection after what was sent."""
        self.scope["state"]["transport"].close()
        await self.wait_for_the_client()

    async def abort(self) -> None:
        """Cut the connection."""
        self.scope["state"]["transport"].abort()
        await self.wait_for_the_client()


class Effect(Protocol):
    """What a request meets."""

    async def strike(self, exchange: Exchange) -> None: ...


@dataclass(frozen=True)
class Status:
    """Another answer than the Hub's own: a refusal, or a gateway's complaint about a request that was
    ``carried_out``."""

    code: int
    headers: Mapping[str, str] = field(default_factory=dict)
    carried_out: bool = False

    async def strike(self, exchange: Exchange) -> None:
        await (exchange.carry_out() if self.carried_out else exchange.read_request())
        await exchange.respond(planned_answer(self.code, self.headers))


@dataclass(frozen=True)
class Late:
    """A gateway gives the request up with the status 504, and ``seconds`` later the Hub carries it out all the same."""

    seconds: float

    async def strike(self, exchange: Exchange) -> None:
        body = await exchange.read_request()
        await exchange.respond(planned_answer(504, {}))
        await asyncio.sleep(self.seconds)
        await exchange.again(body).carry_out()


@dataclass(frozen=True)
class Drop:
    """The connection breaks: before the request was understood, or after it was ``carried_out``, its answer lost."""

    carried_out: bool = False

    async def strike(self, exchange: Exchange) -> None:
        if self.carried_out:
            await exchange.carry_out()
        await exchange.abort()


@dataclass(frozen=True)
class Truncate:
    """The request is carried out, and the connection ends in the middle of the answer's body."""

    async def strike(self, exchange: Exchange) -> None:
        answer = await exchange.carry_out()
        promised = answer.body or b" "
        await exchange.respond(Answer(answer.status, answer.headers, promised), sent=len(promised) // 2)
        await exchange.close()


@dataclass(frozen=True)
class Delay:
    """The request is served late."""

    seconds: float

    async def strike(self, exchange: Exchange) -> None:
        await asyncio.sleep(self.seconds)
        await exchange.serve()


@dataclass(frozen=True)
class Silence:
    """The request is taken and never answered."""

    async def strike(self, exchange: Exchange) -> None:
        await exchange.wait_for_the_client()


@dataclass(frozen=True)
class WrongDigest:
    """A listing shows another digest for ``path`` than its bytes have."""

    path: str

    async def strike(self, exchange: Exchange) -> None:
        answer = await exchange.carry_out()
        rows = json.loads(answer.body)
        for row in rows:
            if row["path"] == self.path:
                digests = row.get("lfs", row)
                digests["oid"] = WRONG_DIGEST[len(digests["oid"])]
        await exchange.respond(Answer(answer.status, answer.headers, json.dumps(rows).encode()))


@dataclass(frozen=True)
class Meanwhile:
    """Something else happens, in a thread, while the request is on its way: before it is carried out, or between that
    and its answer."""

    act: Callable[[], object]
    carried_out: bool = False

    async def strike(self, exchange: Exchange) -> None:
        if not self.carried_out:
            await asyncio.to_thread(self.act)
            await exchange.serve()
            return
        answer = await exchange.carry_out()
        await asyncio.to_thread(self.act)
        await exchange.respond(answer)


def planned_answer(status: int, headers: Mapping[str, str]) -> Answer:
    """An error as the Hub spells one."""
    body = json.dumps({"error": f"A planned answer {status}"}).encode()
    given = {"content-type": "application/json", **headers}
    return Answer(status, tuple((name.lower().encode(), value.encode()) for name, value in given.items()), body)


class Disturbed:
    """Middleware: requests that meet a fault of ``plan`` are in its hands, all others pass."""

    def __init__(self, application: ASGIApp, plan: Callable[[], FaultPlan]) -> None:
        self.application = application
        self.plan = plan

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        effect = self.plan().meet(scope["method"], scope["raw_path"].decode())
        exchange = Exchange(self.application, scope, receive, send)
        await (effect.strike(exchange) if effect else exchange.serve())
