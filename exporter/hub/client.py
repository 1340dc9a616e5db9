"""huggingface_hub with time limits, retries where the library has none, and our errors."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, NoReturn, TypeVar

from exporter.hub.failures import is_retriable, may_have_landed, response_of, shown_cause, translate
from exporter.hub.patience import Patience, limit_xet, requested_pause

if TYPE_CHECKING:
    from httpx2 import Response
    from huggingface_hub import HfApi

T = TypeVar("T")

_PAUSES = (1.0, 2.0, 4.0, 8.0)
_RETRY_SECONDS = 45.0


@dataclass(frozen=True)
class HubClient:
    """One Hub and one token, "" for none. ``endpoint`` is the Hub's address without a slash at the end."""

    endpoint: str
    token: str = field(repr=False)

    @cached_property
    def api(self) -> HfApi:
        from huggingface_hub import HfApi

        return HfApi(endpoint=self.endpoint, token=self.token or False)

    def ask(self, action: str, call: Callable[[], T]) -> T:
        """What ``call`` returns, tried again while the Hub is busy or does not answer.

        ``action`` completes "The Hub did not ...". Raises an ExportError for whatever the client raises.
        """
        return self.persist(action, call, _nothing)

    def persist(self, action: str, call: Callable[[], T], landed: Callable[[], T | None]) -> T:
        """Like :meth:`ask`, for a call that changes something.

        When the answer is lost, or says that the change collides with one that is there, ``landed`` looks whether the
        change is made and returns what ``call`` would have returned. It looks after the pause, just before the next
        try: a gateway may give up on a change that the Hub is still making. So nothing is done twice.
        """
        give_up = time.monotonic() + _RETRY_SECONDS
        pauses = iter(_PAUSES)
        while True:
            outcome = self._attempt(call)
            if not isinstance(outcome, _Failure):
                return outcome
            error = outcome.error
            pause = next(pauses, None) if is_retriable(error) and time.monotonic() <= give_up else None
            if pause is not None:
                asked = _asked_pause(error)
                time.sleep(max(pause, asked))
                give_up += asked
            if may_have_landed(error) and (done := landed()) is not None:
                return done
            if pause is None:
                self._fail(error, action)

    def once(self, action: str, call: Callable[[], T]) -> T:
        """What ``call`` returns, for a call that the client itself tries again. Raises an ExportError."""
        outcome = self._attempt(call)
        if isinstance(outcome, _Failure):
            self._fail(outcome.error, action)
        return outcome

    def get(self, path: str) -> Response:
        """The answer to a GET of ``path`` at the endpoint. Raises what the client raises."""
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        headers = build_hf_headers(token=self.token or False)
        response: Response = get_session().get(self.endpoint + path, headers=headers, follow_redirects=True)
        hf_raise_for_status(response)
        return response

    def get_start(self, path: str, count: int) -> bytes:
        """The first ``count`` bytes of the answer to a GET of ``path``, also where a Hub would send more.

        Raises what the client raises.
        """
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        headers = {**build_hf_headers(token=self.token or False), "Range": f"bytes=0-{count - 1}"}
        start = b""
        with get_session().stream("GET", self.endpoint + path, headers=headers, follow_redirects=True) as response:
            if response.is_error:
                response.read()
            hf_raise_for_status(response)
            for block in response.iter_bytes():
                start += block
                if len(start) >= count:
                    break
        return start[:count]

    def post(self, path: str, body: object) -> Response:
        """The answer to a POST of ``body`` as JSON. Raises what the client raises."""
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        headers = build_hf_headers(token=self.token or False)
        response: Response = get_session().post(self.endpoint + path, headers=headers, json=body)
        hf_raise_for_status(response)
        return response

    def _attempt(self, call: Callable[[], T]) -> T | _Failure:
        from huggingface_hub.utils import httpx

        try:
            return call()
        except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError, KeyError, RuntimeError) as error:
            return _Failure(error)

    def _fail(self, error: Exception, action: str) -> NoReturn:
        told = translate(error, action, self.token)
        raise told from shown_cause(told, error, self.token)


@dataclass(frozen=True)
class _Failure:
    error: Exception


def _nothing() -> None:
    """A question changes nothing, so nothing can have landed."""


def _asked_pause(error: Exception) -> float:
    response = response_of(error)
    return (requested_pause(response) or 0.0) if response is not None else 0.0


@contextmanager
def bounded_and_quiet(*, bars: bool = False) -> Iterator[None]:
    """Gives all of huggingface_hub our time limits, and takes its warnings, log lines and, if not asked for, its
    progress bars off stderr."""
    from huggingface_hub.utils import _http, logging, set_client_factory

    factory, verbosity = _http._GLOBAL_CLIENT_FACTORY, logging.get_verbosity()
    set_client_factory(Patience(factory).client)
    limit_xet()
    if verbosity == logging.WARNING:
        logging.set_verbosity(logging.ERROR)
    try:
        with warnings.catch_warnings(), nullcontext() if bars else _without_progress_bars():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        set_client_factory(factory)


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    were_disabled = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not were_disabled:
            enable_progress_bars()
