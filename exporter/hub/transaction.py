"""Publish: nothing, or everything and checked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from exporter.errors import HubRefusedError, HubUnreachableError
from exporter.hub.arrival import require_arrived, require_readable
from exporter.hub.client import bounded_and_quiet
from exporter.hub.connection import Connection, Note, silent, taken_tag, with_branch
from exporter.hub.destination import DEFAULT_BRANCH
from exporter.hub.failures import LOOK_FIRST
from exporter.hub.push import OutgoingFile, PushPlan
from exporter.hub.repository import Snapshot
from exporter.hub.upload import Upload
from exporter.shards import Progress, uncounted

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd


@dataclass(frozen=True)
class Publication:
    """A release that is on the Hub and was compared with what was sent.

    ``added`` are the paths that were sent (new or changed), ``uploaded_bytes`` their size. ``transport`` is xet or
    lfs, None if no large file was sent. ``status`` is published, or unchanged if the Hub had the release already.
    """

    endpoint: str
    repo_id: str
    url: str
    commit: str
    revision: str
    pr_url: str | None
    tag: str | None
    transport: str | None
    added: tuple[str, ...]
    deleted: tuple[str, ...]
    unchanged: tuple[str, ...]
    uploaded_bytes: int
    status: str


@dataclass(frozen=True)
class _Commit:
    id: str
    pr_url: str | None


@dataclass
class Push:
    """A release on its way: files may go ahead one by one, and :meth:`commit` makes all of them visible at once.

    ``note`` is called with what the user should know.
    """

    connection: Connection
    note: Note = silent
    _upload: Upload | None = None
    _additions: dict[str, CommitOperationAdd] = field(default_factory=dict)

    def send_ahead(self, file: OutgoingFile) -> bool:
        """Uploads ``file`` while others are still to come; until the commit nobody sees it.

        Returns whether the Hub has its bytes, so that ``file.source`` may go away. Where the release tag is there
        already nothing goes ahead: only the whole release tells whether it is on this one.

        Raises: as :meth:`commit`.
        """
        snapshot = self.connection.snapshot
        there = snapshot.files.get(file.path) if snapshot else None
        if self.connection.tag_commit is not None or (there is not None and there.sha256 is None):
            return False
        with bounded_and_quiet():
            if self.connection.plan([file]).sent:
                self._send([file], uncounted)
                return self._additions[file.path]._upload_mode == "lfs"
        return True

    def commit(self, files: Iterable[OutgoingFile], progress: Progress = uncounted) -> Publication:
        """Sends what did not go ahead, commits exactly ``files``, checks what arrived, and then sets the release tag.

        ``progress`` is called with the bytes of each batch of files that is uploaded. Publishing what the Hub has
        already sends nothing and makes no commit.

        Raises:
            CredentialError: the token may not do this after all.
            HubRefusedError: somebody committed since :func:`connect`, the release tag is on something else, or the Hub
                refuses. The branch is as it was.
            HubUnreachableError: the Hub does not answer. Publishing again completes what was begun.
            OutputError: a file is not what ``files`` says of it.
            VerificationError: the Hub holds other bytes than were sent. There is no release tag.
        """
        outgoing = tuple(files)
        with bounded_and_quiet():
            _require_same_head(self.connection)
            _require_usable_tag(self.connection, outgoing)
            plan = self.connection.plan(outgoing)
            if plan.is_empty and self.connection.head is not None:
                done = _Commit(self.connection.head, _pull_request_url(self.connection))
                return _publication(self.connection, plan, done)
            return self._committed(outgoing, progress)

    def _send(self, files: Sequence[OutgoingFile], progress: Progress) -> None:
        self.connection = _with_repository(self.connection)
        if self._upload is None:
            branch = self.connection.revision if self.connection.has_branch else DEFAULT_BRANCH
            opens = _opens_pull_request(self.connection)
            self._upload = Upload(self.connection.repository, branch, opens, self.note)
        self._additions |= self._upload.send(files, progress)

    def _committed(self, files: tuple[OutgoingFile, ...], progress: Progress) -> Publication:
        self.connection = connection = _with_repository(self.connection)
        plan = connection.plan(files)
        sent = [file for file in files if file.path in plan.sent]
        self._send([file for file in sent if file.path not in self._additions], progress)
        _create_branch(connection)
        commit = _make_commit(connection, files, [self._additions[file.path] for file in sent], plan)
        self._read_back(require_arrived(connection.repository, commit.id, files))
        return replace(
            _publication(connection, plan, commit),
            transport=self._upload.transport if self._upload else None,
            added=plan.sent,
            deleted=plan.deleted,
            uploaded_bytes=sum(file.size for file in sent),
            status="published",
        )

    def _read_back(self, snapshot: Snapshot) -> None:
        """Reads the headers of the weights. The digests have proven every byte: a Hub that does not give them back at
        once is told, and is a failure only where a tag is still to be set."""
        try:
            require_readable(self.connection.repository, snapshot)
        except (HubRefusedError, HubUnreachableError) as error:
            if isinstance(error, HubUnreachableError) and self.connection.destination.release_tag:
                raise
            self.note(f"All digests on the Hub are right; the weights were not read back: {error.message}.")


def _require_usable_tag(connection: Connection, files: tuple[OutgoingFile, ...]) -> None:
    if connection.tag_commit and not connection.repository.snapshot(connection.tag_commit).plan(files).is_empty:
        raise taken_tag(connection)


def _require_same_head(connection: Connection) -> None:
    """Nobody committed since :func:`connect`: told before an upload, though the commit is bound to it too."""
    if not connection.exists or not connection.has_branch:
        return
    if connection.repository.head(connection.revision) != connection.head:
        raise HubRefusedError(
            f"Somebody committed to {connection.revision} of {connection.repository.repo_id} since this run began",
            LOOK_FIRST,
        )


def _with_repository(connection: Connection) -> Connection:
    """``connection`` with its repository, created if it has to be. Its branch is created just before the commit."""
    if connection.exists:
        return connection
    repository, private = connection.repository, connection.destination.private
    repository.client.persist(
        "create the repository",
        lambda: bool(repository.client.api.create_repo(repository.repo_id, private=private)),
        lambda: repository.info() is not None or None,
    )
    return with_branch(replace(connection, exists=True))


def _publication(connection: Connection, plan: PushPlan, commit: _Commit) -> Publication:
    """The release at ``commit``, where it is complete, as one that nothing was sent for; sets the release tag."""
    return Publication(
        endpoint=connection.endpoint,
        repo_id=connection.repository.repo_id,
        url=commit.pr_url or f"{connection.repository.url}/tree/{commit.id}",
        commit=commit.id,
        revision=connection.revision,
        pr_url=commit.pr_url,
        tag=_tagged(connection, commit),
        transport=None,
        added=(),
        deleted=(),
        unchanged=plan.unchanged,
        uploaded_bytes=0,
        status="unchanged",
    )


def _opens_pull_request(connection: Connection) -> bool:
    return connection.destination.create_pr and connection.pull_request is None


def _pull_request_url(connection: Connection) -> str | None:
    request = connection.pull_request
    return f"{connection.repository.url}/discussions/{request.number}" if request else None


def _create_branch(connection: Connection) -> None:
    if connection.has_branch:
        return
    repository, branch, head = connection.repository, connection.revision, connection.head
    repository.client.persist(
        f"create the branch {branch}",
        lambda: repository.client.api.create_branch(repository.repo_id, branch=branch, revision=head) or True,
        lambda: repository.branch_head(branch) == head or None,
    )


def _make_commit(
    connection: Connection, files: tuple[OutgoingFile, ...], additions: list[CommitOperationAdd], plan: PushPlan
) -> _Commit:
    from huggingface_hub import CommitOperationDelete

    api = connection.repository.client.api
    deletions = [CommitOperationDelete(path, is_folder=False) for path in plan.deleted]

    def commit() -> _Commit:
        made = api.create_commit(
            connection.repository.repo_id,
            [*additions, *deletions],
            commit_message=connection.destination.summary,
            commit_description=connection.destination.description,
            revision=connection.revision,
            create_pr=_opens_pull_request(connection),
            parent_commit=connection.head,
        )
        return _Commit(made.oid, made.pr_url or _pull_request_url(connection))

    return connection.repository.client.persist("make the commit", commit, lambda: _landed_commit(connection, files))


def _landed_commit(connection: Connection, files: tuple[OutgoingFile, ...]) -> _Commit | None:
    """The commit whose answer was lost: the first on the head that was seen, which holds exactly what was to be
    committed. Somebody else may have committed on top of it since."""
    repository, base = connection.repository, connection.head
    if _opens_pull_request(connection):
        connection = replace(connection, pull_request=repository.own_pull_request(connection.user))
        if connection.pull_request is None:
            return None
    elif repository.head(connection.revision) in (None, base):
        return None
    found = repository.commit_after(base, connection.revision)
    if found is None or not repository.snapshot(found).plan(files).is_empty:
        return None
    return _Commit(found, _pull_request_url(connection))


def _tagged(connection: Connection, commit: _Commit) -> str | None:
    repository, tag = connection.repository, connection.destination.release_tag
    if tag and connection.tag_commit is None:
        repository.client.persist(
            f"set the tag {tag}",
            lambda: repository.client.api.create_tag(repository.repo_id, tag=tag, revision=commit.id) or True,
            lambda: repository.tag_commit(tag) == commit.id or None,
        )
    return tag
