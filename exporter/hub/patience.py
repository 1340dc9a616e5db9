"""How long a request may stay unanswered.

huggingface_hub sends requests without a time limit and repeats most of them six times. The hooks here bound both: a
request waits 30 s for a byte, and one that stayed unanswered three times (a question: twice) and for a minute is not
sent again. So a Hub that falls silent is given up within two minutes, also where it does so in the middle of a commit:
then a question follows, whether the commit landed.
hf_xet has a client of its own, which reads its limits from the environment when its first upload begins.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from exporter.errors import HubUnreachableError

if TYPE_CHECKING:
    from httpx2 import Client, Request, Response

CONNECT_SECONDS = 10.0
READ_SECONDS = 30.0
COMMIT_SECONDS = 40.0
"""A commit of many files takes the Hub longer than any other request."""
LONGEST_REQUESTED_PAUSE = 300.0
"""A Hub's rate limits are counted over five minutes; who asks to wait longer is asked again another time."""

_XET_LIMITS = {"HF_XET_CLIENT_READ_TIMEOUT": "20s", "HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "3"}
_UNANSWERED_SECONDS = 60.0
_UNANSWERED_TRIES = 3
_UNANSWERED_QUESTIONS = 2

RETRY_LATER = "Run the same command again later: what was uploaded is not sent twice."
NOT_ANSWERING = "Check the network and HF_ENDPOINT, then run the same command again."


@dataclass
class Patience:
    """Counts the unanswered tries of each request of the clients that ``factory`` makes."""

    factory: Callable[[], Client]
    _unanswered: dict[tuple[str, str], tuple[float, int]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def client(self) -> Client:
        """A client of ``factory``, with limits."""
        client = self.factory()
        hooks = client.event_hooks
        client.event_hooks = {
            "request": [*hooks["request"], self.before_request],
            "response": [*hooks["response"], self.after_response],
        }
        return client

    def before_request(self, request: Request) -> None:
        """Raises HubUnreachableError if this request was left unanswered often and long enough."""
        key = (request.method, str(request.url))
        with self._lock:
            first, tries = self._unanswered.get(key, (time.monotonic(), 0))
            self._unanswered[key] = (first, tries + 1)
        waited = time.monotonic() - first
        enough = _UNANSWERED_QUESTIONS if request.method == "GET" else _UNANSWERED_TRIES
        if tries >= enough and waited > _UNANSWERED_SECONDS:
            with self._lock:
                del self._unanswered[key]
            raise HubUnreachableError(
                f"{request.url.host} left a request unanswered {tries} times in {waited:.0f} s", NOT_ANSWERING
            )
        request.extensions["timeout"] = _limits(request)

    def after_response(self, response: Response) -> None:
        """Raises HubUnreachableError if the Hub asks for a pause that is too long."""
        with self._lock:
            self._unanswered.pop((response.request.method, str(response.request.url)), None)
        pause = requested_pause(response)
        if pause is not None and pause > LONGEST_REQUESTED_PAUSE:
            raise HubUnreachableError(
                f"{response.request.url.host} asks for a pause of {pause:.0f} s before the next request", RETRY_LATER
            )


def _limits(request: Request) -> dict[str, float]:
    """Set on each request, since the client overrides its own time limit on some, such as a listing of files."""
    is_commit = request.method == "POST" and "/commit/" in request.url.path
    read = COMMIT_SECONDS if is_commit else READ_SECONDS
    return {"connect": CONNECT_SECONDS, "read": read, "write": READ_SECONDS, "pool": READ_SECONDS}


def requested_pause(response: Response) -> float | None:
    """The seconds that an answer 429 or 503 asks to wait (RateLimit or Retry-After header), None if it does not."""
    from huggingface_hub.utils import parse_ratelimit_headers

    if response.status_code not in (429, 503):
        return None
    limit = parse_ratelimit_headers(response.headers)
    if limit is not None and limit.remaining == 0:
        return float(limit.reset_in_seconds)
    after = response.headers.get("Retry-After", "").strip()
    return float(after) if after.isdigit() else None


def limit_xet() -> None:
    """Bounds the requests of hf_xet, where the user's environment does not."""
    for name, value in _XET_LIMITS.items():
        os.environ.setdefault(name, value)
