"""A throw-away Hub on this machine, to rehearse a release against the real huggingface_hub client.

api.py           routes and rights of a request; Starlette
answers.py       the shapes of the answers
changes.py       what a commit does to a tree
front_matter.py  the check of a model card
repository.py    commits, branches, tags, pull requests
storage.py       bytes: regular files and large ones
xet.py           the store of hf_xet's local backend
access.py        tokens
oidc.py          trusted publishing: tokens for CI jobs
faults.py        what goes wrong, where it is planned
connection.py    HTTP connections that a fault can cut
"""

from __future__ import annotations

import secrets
import socket
import threading
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from exporter.errors import UsageError
from exporter.rehearsal.access import Token
from exporter.rehearsal.faults import Disturbed, Fault, FaultPlan
from exporter.rehearsal.repository import Repository
from exporter.rehearsal.storage import Storage

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send
    from uvicorn import Config, Server

    from exporter.rehearsal.api import Api
    from exporter.rehearsal.connection import CuttableConnection
    from exporter.rehearsal.oidc import TrustedPublishing


class RehearsalHub:
    """A Hub with nobody on it but us; a context manager, it serves while it is open.

    ``endpoint`` is its address, ``token`` may write as the user ``rehearsal`` into any namespace, and ``requests``
    lists the (method, path) of every request so far. ``folder`` keeps the bytes, a private temporary one if None,
    removed at the end. Without ``xet``, large files go over LFS. The client that asks ``whoami`` is told that the user
    belongs to ``organizations`` and to every namespace that has a repository. What is to go wrong is told to
    :meth:`disturb`.

    Raises UsageError where Starlette or uvicorn is not installed.
    """

    endpoint: str

    def __init__(self, folder: Path | None = None, *, xet: bool = True, organizations: Iterable[str] = ()) -> None:
        self._folder = folder
        self.xet = xet
        self.organizations = set(organizations)
        self.repositories: dict[str, Repository] = {}
        self.requests: list[tuple[str, str]] = []
        self.faults = FaultPlan()
        self._tokens: dict[str, Token] = {}
        self._publishers: dict[str, str] = {}
        self.token = self.add_token()

    def add_token(
        self, user: str = "rehearsal", *, role: str = "write", expired: bool = False, scopes: Iterable[str] = ()
    ) -> str:
        """A new token of ``user``: ``role`` is write, read, or fineGrained to write only to the users, organizations
        and repositories in ``scopes``."""
        token = f"hf_{secrets.token_hex(17)}"
        self._tokens[token] = Token(user, role, expired, tuple(scopes))
        return token

    def trust(self, repo_id: str) -> dict[str, str]:
        """The environment of a GitHub Actions job that is a trusted publisher of ``repo_id``."""
        request_token = secrets.token_hex(17)
        self._publishers[request_token] = repo_id
        return {
            "GITHUB_ACTIONS": "true",
            "ACTIONS_ID_TOKEN_REQUEST_URL": f"{self.endpoint}/actions/id-token?api-version=2.0",
            "ACTIONS_ID_TOKEN_REQUEST_TOKEN": request_token,
            "HF_OIDC_RESOURCE": repo_id,
        }

    def expire(self, token: str) -> None:
        """From now on ``token`` is refused as an expired one."""
        self._tokens[token] = replace(self._tokens[token], expired=True)

    def disturb(self, *faults: Fault) -> FaultPlan:
        """From now on requests meet these faults, counted from here, and no others; none ends all disturbance."""
        self.faults = FaultPlan(faults)
        return self.faults

    def read(self, repo_id: str, path: str, revision: str = "main") -> bytes:
        """The bytes of a file at a revision. Raises KeyError if the repository or the file is not there."""
        return self._storage.path(self.repositories[repo_id].resolve(revision).tree[path]).read_bytes()

    def __enter__(self) -> RehearsalHub:
        Api, Config, Server, Connection, TrustedPublishing = server_classes()
        with ExitStack() as stack:
            folder = self._folder or Path(stack.enter_context(TemporaryDirectory(prefix="rehearsal-hub-")))
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            # Inherited by every connection. asyncio sets it only where the protocol number is given; without it each
            # answer in two segments waits 40 ms for an acknowledgement.
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.endpoint = f"http://127.0.0.1:{listener.getsockname()[1]}"
            self._storage = Storage(folder, xet=self.xet)
            api = Api(self.endpoint, self._storage, self.repositories, self._tokens, self.organizations)
            answering = TrustedPublishing(api.application(), self._tokens, self._publishers)
            application = RequestLog(Disturbed(answering, lambda: self.faults), self.requests)
            config = Config(
                application, http=Connection, log_config=None, lifespan="off", ws="none", timeout_graceful_shutdown=2
            )
            server = Server(config)
            thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
            thread.start()
            stack.callback(thread.join)
            stack.callback(setattr, server, "should_exit", True)
            self._running = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._running.close()


class RequestLog:
    """Middleware that notes the (method, path) of every request; the path as it was sent, without the query."""

    def __init__(self, application: ASGIApp, requests: list[tuple[str, str]]) -> None:
        self.application = application
        self.requests = requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            self.requests.append((scope["method"], scope["raw_path"].decode()))
        await self.application(scope, receive, send)


def server_classes() -> tuple[type[Api], type[Config], type[Server], type[CuttableConnection], type[TrustedPublishing]]:
    """What serves: our routes, uvicorn's configuration and server, our connections, and the routes for CI jobs."""
    try:
        from uvicorn import Config, Server

        from exporter.rehearsal.api import Api
        from exporter.rehearsal.connection import CuttableConnection
        from exporter.rehearsal.oidc import TrustedPublishing
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        if package not in ("starlette", "uvicorn"):
            raise
        raise UsageError(
            f"The rehearsal Hub needs the package {package}, which is not installed",
            "pip install 'export-model[rehearsal]'",
        ) from error
    return Api, Config, Server, CuttableConnection, TrustedPublishing
