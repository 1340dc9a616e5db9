"""What the Hub says before a weight is read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from exporter.errors import CredentialError, HubRefusedError
from exporter.hub.account import ask_account, is_publisher, resolve_token
from exporter.hub.client import HubClient, bounded_and_quiet
from exporter.hub.destination import DEFAULT_BRANCH, Destination
from exporter.hub.push import Forecast, OutgoingFile, PushPlan, forecast_push
from exporter.hub.repository import PullRequest, Repository, Snapshot
from exporter.manifest import MANIFEST_NAME

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

Note = Callable[[str], None]
"""Called with a sentence that the user should read."""


def silent(text: str) -> None:
    """Takes no note."""


@dataclass(frozen=True)
class Connection:
    """What the Hub said before anything was written: all that :func:`publish` builds on.

    ``exists`` is false while the repository has to be created, ``has_branch`` while the branch has to be.
    ``snapshot`` is what the new commit will stand on, None where there is no commit at all yet. ``tag_commit`` is where
    the release tag points, if there is one.
    """

    destination: Destination
    repository: Repository
    user: str
    exists: bool = False
    has_branch: bool = True
    snapshot: Snapshot | None = None
    tag_commit: str | None = None
    pull_request: PullRequest | None = None

    @property
    def endpoint(self) -> str:
        return self.repository.client.endpoint

    @property
    def revision(self) -> str:
        """The branch, or the reference of the pull request, that the commit goes to."""
        return self.pull_request.ref if self.pull_request else self.destination.revision

    @property
    def head(self) -> str | None:
        """The commit that was seen on :attr:`revision`."""
        return self.snapshot.commit if self.snapshot else None

    def plan(self, files: Iterable[OutgoingFile]) -> PushPlan:
        """What publishing ``files`` adds, replaces, deletes and keeps. Asks nothing, changes nothing."""
        return (self.snapshot or Snapshot("")).plan(tuple(files))

    def forecast(self, texts: Mapping[str, bytes], sizes: Mapping[str, int]) -> Forecast:
        """What publishing ``texts`` and files of ``sizes`` in bytes, whose content is not known yet, will do."""
        snapshot = self.snapshot or Snapshot("")
        return forecast_push(texts, sizes, snapshot.files, snapshot.owned)


def connect(
    destination: Destination,
    *,
    token: str | None = None,
    endpoint: str | None = None,
    card: str | None = None,
    note: Note = silent,
) -> Connection:
    """Asks the Hub everything that can be known before a weight is read. Changes nothing there.

    ``token`` None means the client's own (OIDC, HF_TOKEN, saved login), ``endpoint`` None means HF_ENDPOINT or the
    public Hub. ``card`` is the text of README.md, if it is known. ``note`` is called with what the user should know.

    Raises:
        CredentialError: no token, a bad one, or one that may not write there.
        HubRefusedError: the card is not accepted, the release tag is taken, the branch cannot be.
        HubUnreachableError: the Hub does not answer.
    """
    from huggingface_hub import constants

    with bounded_and_quiet():
        client = HubClient((endpoint or constants.ENDPOINT).rstrip("/"), resolve_token(token))
        account = ask_account(client, destination)
        if card is not None:
            _require_accepted_card(client, card, note)
        return _look(destination, Repository(client, destination.repo_id), str(account.get("name")), note)


def _require_accepted_card(client: HubClient, card: str, note: Note) -> None:
    body = {"content": card, "repoType": "model"}
    answer = client.ask("accept the front matter of README.md", lambda: client.post("/api/validate-yaml", body).json())
    for warning in answer.get("warnings") or ():
        note(f"The Hub says of README.md: {' '.join(str(warning.get('message')).split())}")


def _look(destination: Destination, repository: Repository, user: str, note: Note) -> Connection:
    connection = Connection(destination, repository, user)
    info = repository.info()
    if info is None and is_publisher(repository.client.token):
        raise CredentialError(
            f"{repository.repo_id} is not there, or not for this token: a trusted publisher cannot create it",
            "Create it on the Hub, name this job there as its trusted publisher, and set HF_OIDC_RESOURCE to its name.",
        )
    if info is None:
        return connection
    _note_visibility(destination, info, note)
    return with_branch(replace(connection, exists=True))


def _note_visibility(destination: Destination, info: ModelInfo, note: Note) -> None:
    if destination.private != bool(info.private):
        note(f"{destination.repo_id} is {'private' if info.private else 'public'} already and stays so.")


def with_branch(connection: Connection) -> Connection:
    """``connection`` with branch, tag, pull request and files as they are on the Hub now."""
    destination, repository = connection.destination, connection.repository
    refs = repository.refs()
    branches = {ref.name: ref.target_commit for ref in refs.branches}
    tags = {ref.name: ref.target_commit for ref in refs.tags}
    if destination.revision in tags:
        raise HubRefusedError(
            f"{destination.revision} is a tag of {destination.repo_id}, and a tag takes no commit",
            "Name a branch with --revision.",
        )
    if destination.release_tag in branches:
        raise HubRefusedError(
            f"{destination.release_tag} is a branch of {destination.repo_id}: a tag of that name would hide it",
            "Use another --release_tag.",
        )
    pull_request = repository.own_pull_request(connection.user) if destination.create_pr and branches else None
    base = branches.get(destination.revision, branches.get(DEFAULT_BRANCH))
    head = pull_request.head if pull_request else base
    found = replace(
        connection,
        has_branch=destination.revision in branches or base is None,
        snapshot=repository.snapshot(head) if head else None,
        tag_commit=tags.get(destination.release_tag or ""),
        pull_request=pull_request,
    )
    _require_export_at_tag(found)
    return found


def _require_export_at_tag(connection: Connection) -> None:
    """A tag on a commit without a manifest is certainly not this release: no need to convert weights to know it."""
    if connection.tag_commit and MANIFEST_NAME not in connection.repository.snapshot(connection.tag_commit).files:
        raise taken_tag(connection)


def taken_tag(connection: Connection) -> HubRefusedError:
    return HubRefusedError(
        f"The tag {connection.destination.release_tag} of {connection.repository.repo_id} is on another release",
        "Use another --release_tag, or delete the old tag on the Hub.",
    )
