"""Trusted publishing: a CI job's identity becomes a token that may write to one repository, for a while.

Two servers in one: ``/actions/id-token`` is what a GitHub Actions runner offers to a job with ``id-token: write``, and
``/oauth/token`` is the Hub's exchange of such an identity (RFC 8693), as
https://huggingface.co/docs/hub/trusted-publishers describes it. As on the Hub, the token is good on the routes of its
repository and nowhere else: it has no account, and creates no repository.
"""

from __future__ import annotations

import secrets

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from exporter.rehearsal.access import Token

TOKEN_PREFIX = "hf_jwt_"
_EXCHANGE = "urn:ietf:params:oauth:grant-type:token-exchange"
_ID_TOKEN = "urn:ietf:params:oauth:token-type:id_token"
_LIFETIME_SECONDS = 3600
_ACCOUNT_ROUTES = ("/api/whoami-v2", "/api/repos/create")


class TrustedPublishing:
    """Middleware: answers the two routes, and keeps their tokens from the routes of an account.

    ``publishers`` has the repository of each request token, which GitHub gives to a job and which stands for the job's
    identity here. ``tokens`` gets the tokens that are given out.
    """

    def __init__(self, application: ASGIApp, tokens: dict[str, Token], publishers: dict[str, str]) -> None:
        self.application = application
        self.tokens = tokens
        self.publishers = publishers
        self._identities: dict[str, tuple[str, str]] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = await self._answer(Request(scope, receive)) if scope["type"] == "http" else None
        await (answer or self.application)(scope, receive, send)

    async def _answer(self, request: Request) -> Response | None:
        path = request.url.path
        if path == "/actions/id-token":
            return self._identity(_bearer(request), request.query_params.get("audience", ""))
        if path == "/oauth/token" and request.method == "POST":
            return self._exchange(await request.json(), str(request.base_url).rstrip("/"))
        if path in _ACCOUNT_ROUTES and _bearer(request).startswith(TOKEN_PREFIX):
            return _error(401, "This token is for one repository")
        return None

    def _identity(self, request_token: str, audience: str) -> Response:
        if request_token not in self.publishers:
            return _error(401, "Bad request token")
        identity = f"eyJ{secrets.token_urlsafe(48)}"
        self._identities[identity] = (self.publishers[request_token], audience)
        return JSONResponse({"value": identity, "count": len(identity)})

    def _exchange(self, body: dict[str, str], endpoint: str) -> Response:
        if (body.get("grant_type"), body.get("subject_token_type")) != (_EXCHANGE, _ID_TOKEN):
            return _error(400, "invalid_request")
        repository = body.get("resource", "")
        if self._identities.get(body.get("subject_token", "")) != (repository, endpoint):
            return _error(400, "invalid_grant")
        token = f"{TOKEN_PREFIX}{secrets.token_urlsafe(48)}"
        self.tokens[token] = Token("[OIDC]", "fineGrained", scopes=(repository,))
        return JSONResponse({"access_token": token, "token_type": "bearer", "expires_in": _LIFETIME_SECONDS})


def _bearer(request: Request) -> str:
    return request.headers.get("authorization", "").removeprefix("Bearer ")


def _error(status: int, message: str) -> Response:
    return JSONResponse({"error": message}, status, headers={"X-Error-Message": message})
