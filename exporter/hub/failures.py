"""From an error of the Hub's client to what a user is told: one table, in order."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from json import JSONDecodeError
from pathlib import Path
from typing import TYPE_CHECKING

from exporter.errors import (
    CredentialError,
    ExportError,
    HubRefusedError,
    HubUnreachableError,
    OutputError,
    UsageError,
)
from exporter.hub.patience import NOT_ANSWERING, RETRY_LATER

if TYPE_CHECKING:
    from httpx2 import Response

TOKEN_PLACEHOLDER = "<auth_token>"
LOOK_FIRST = "Look at the new commit, then run the same command again to publish on top of it."
_LONGEST_ANSWER = 300
_RETRIABLE_STATUS = frozenset({408, 429, 500, 502, 503, 504})
_CONFLICT_STATUS = frozenset({409, 412})
_XET_STATUS = re.compile(r"HTTP status \w+ error \((\d{3})\b")
"""hf_xet has a client of its own, and says the status of an answer only in the text of its error."""


@dataclass(frozen=True)
class Verdict:
    """The error class for a status, and the next step."""

    kind: type[ExportError]
    hint: str


_QUOTA = Verdict(HubRefusedError, "Free storage, or ask the owner of the namespace for more, then run again.")
_QUOTA_WORDS = ("quota", "storage", "limit", "billing", "payment")

_BY_STATUS = {
    400: Verdict(HubRefusedError, "Correct what the Hub names, then run again."),
    401: Verdict(CredentialError, "Make a token with write access in the Hub's settings and pass it as HF_TOKEN."),
    402: _QUOTA,
    403: Verdict(CredentialError, "Use a token that may write to this repository, or publish to another namespace."),
    404: Verdict(HubRefusedError, "Check the repository's name and the revision, and whether the token may see them."),
    409: Verdict(HubRefusedError, "Somebody else is making the same change: look at the repository, then run again."),
    412: Verdict(HubRefusedError, LOOK_FIRST),
    413: Verdict(HubRefusedError, "Publish fewer or smaller files: see --max_shard_size."),
}
_OTHER_REFUSAL = Verdict(HubRefusedError, "Correct what the Hub names, then run again.")
_UNAVAILABLE = Verdict(HubUnreachableError, RETRY_LATER)


def is_retriable(error: Exception) -> bool:
    """Whether the same request may succeed a moment later: no answer, a cut one, or a Hub that is busy."""
    from huggingface_hub.errors import OfflineModeIsEnabled
    from huggingface_hub.utils import httpx

    status = _status(error)
    if status is not None:
        return status in _RETRIABLE_STATUS
    return not isinstance(error, (OfflineModeIsEnabled, httpx.UnsupportedProtocol)) and isinstance(
        error, (httpx.TransportError, ConnectionError, JSONDecodeError, KeyError)
    )


def may_have_landed(error: Exception) -> bool:
    """Whether the request may have been carried out although it failed, now or at an earlier try."""
    return is_retriable(error) or _status(error) in _CONFLICT_STATUS


def response_of(error: BaseException) -> Response | None:
    """The Hub's answer that led to ``error``, None if there was none."""
    for cause in _causes(error):
        response: Response | None = getattr(cause, "response", None)
        if response is not None:
            return response
    return None


def _status(error: BaseException) -> int | None:
    """The status of the answer that led to ``error``, None if there was none."""
    response = response_of(error)
    if response is not None:
        return response.status_code
    said = (_XET_STATUS.search(str(cause)) for cause in _causes(error))
    return next((int(match[1]) for match in said if match), None)


def translate(error: Exception, action: str, token: str) -> ExportError:
    """What to tell about ``error``, which kept us from ``action`` ("create the repository"). Never holds ``token``, if
    there is one."""
    known = next((cause for cause in _causes(error) if isinstance(cause, ExportError)), None)
    if known is not None:
        return known
    status = _status(error)
    if status is None:
        return _without_answer(_origin(error), action, token)
    verdict = _verdict(status, _answer(error))
    answer = _one_line(_answer(error), token)
    return verdict.kind(f"The Hub did not {action}: status {status}{', ' + answer if answer else ''}", verdict.hint)


def shown_cause(told: ExportError, error: Exception, token: str) -> Exception | None:
    """What a traceback of ``told`` may show as its cause: ``error``, unless its text holds the token."""
    leaks = bool(token) and token in "".join(traceback.format_exception(error))
    return None if leaks or told in _causes(error) else error


def _verdict(status: int, answer: str) -> Verdict:
    if status == 403 and any(word in answer.lower() for word in _QUOTA_WORDS):
        return _QUOTA
    if status in _RETRIABLE_STATUS or status >= 500:
        return _UNAVAILABLE
    return _BY_STATUS.get(status, _OTHER_REFUSAL)


def _without_answer(error: Exception, action: str, token: str) -> ExportError:
    from huggingface_hub.errors import OfflineModeIsEnabled
    from huggingface_hub.utils import httpx

    if isinstance(error, OfflineModeIsEnabled):
        return HubUnreachableError(
            f"The Hub was not asked to {action}: HF_HUB_OFFLINE is set",
            "Unset HF_HUB_OFFLINE, then run the same command again.",
        )
    if isinstance(error, (httpx.UnsupportedProtocol, httpx.InvalidURL)):
        return UsageError("The address of the Hub is not a URL", "Set HF_ENDPOINT to a URL that starts with https://.")
    if isinstance(error, OSError) and error.filename is not None:
        return OutputError(
            f"{Path(error.filename).name} cannot be read: {error.strerror}", "Check the disk, then export again."
        )
    if is_retriable(error) or isinstance(error, OSError):
        cause = next((cause for cause in _causes(error) if isinstance(cause, httpx.TransportError)), error)
        return HubUnreachableError(
            f"No answer from the Hub, which was to {action}: {_one_line(str(cause), token) or type(cause).__name__}",
            NOT_ANSWERING,
        )
    return HubRefusedError(
        f"The Hub's answer makes no sense while trying to {action}: {_one_line(str(error), token)}",
        "Check HF_ENDPOINT: it must name a Hub that huggingface_hub can talk to.",
    )


def _origin(error: Exception) -> Exception:
    """``error`` itself, or what the client hides in a RuntimeError: all that stops a large file on its way over LFS."""
    cause = error.__cause__
    return cause if isinstance(error, RuntimeError) and isinstance(cause, Exception) else error


def _answer(error: BaseException) -> str:
    messages = (getattr(cause, "server_message", None) for cause in _causes(error))
    return next((message for message in messages if message), "")


def _one_line(text: str, token: str) -> str:
    line = " ".join(text.split())
    line = line.replace(token, TOKEN_PLACEHOLDER) if token else line
    return line if len(line) <= _LONGEST_ANSWER else line[:_LONGEST_ANSWER] + "…"


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__
