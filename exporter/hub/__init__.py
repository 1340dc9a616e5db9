"""The publishing transaction: everything checked first, then one commit, then a look at what arrived.

:func:`connect` asks the Hub all that can be known before a weight is read and changes nothing there. :class:`Push`
sends exactly the given files in exactly one commit on the head that was seen, compares what arrived with what was
sent, and only then sets the release tag.

destination.py   where to publish and how to name it
push.py          what a push adds, replaces, deletes and keeps; no network
failures.py      from the client's errors to ours
patience.py      how long a request may stay unanswered
client.py        huggingface_hub with time limits, retries and our errors
account.py       the token and what it may write
repository.py    the state of the repository on the Hub
connection.py    connect: all questions before a weight is read
upload.py        large files, ahead of the commit; Xet or LFS
arrival.py       whether a revision on the Hub is an export, whole and readable
transaction.py   the push
download.py      a published revision, read back
checkout.py      a repository to export from, downloaded file by file
"""

from __future__ import annotations

from exporter.hub.account import has_token, known_tokens
from exporter.hub.arrival import Proven, prove_published
from exporter.hub.checkout import Checkout, HubAccess, ModelId, check_out, find_in_cache
from exporter.hub.connection import Connection, connect
from exporter.hub.destination import Destination
from exporter.hub.download import download
from exporter.hub.push import Forecast, OutgoingFile, PushPlan, RemoteFile, plan_push
from exporter.hub.transaction import Publication, Push

__all__ = [
    "Checkout",
    "Connection",
    "Destination",
    "Forecast",
    "HubAccess",
    "ModelId",
    "OutgoingFile",
    "Proven",
    "Publication",
    "Push",
    "PushPlan",
    "RemoteFile",
    "check_out",
    "connect",
    "download",
    "find_in_cache",
    "has_token",
    "known_tokens",
    "plan_push",
    "prove_published",
]
