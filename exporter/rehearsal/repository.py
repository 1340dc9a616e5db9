"""What a Hub keeps of a repository: commits with their trees, branches, tags and discussions.

Object ids are those that git gives to the same bytes, so a client that computes blob ids itself finds them equal.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone


class Refusal(Exception):
    """A request that the Hub answers with an error: HTTP ``status``, ``X-Error-Code``, further JSON fields, headers."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        *,
        fields: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.fields = fields or {}
        self.headers = headers or {}


@dataclass(frozen=True)
class Blob:
    """One version of a file: its git object id (of the pointer, for a large file), size in bytes, sha256 if large,
    and Xet hash if it came over Xet."""

    oid: str
    size: int
    sha256: str | None = None
    xet_hash: str | None = None

    @classmethod
    def regular(cls, data: bytes) -> Blob:
        return cls(git_oid("blob", data), len(data))

    @classmethod
    def large(cls, sha256: str, size: int, xet_hash: str | None = None) -> Blob:
        return cls(git_oid("blob", lfs_pointer(sha256, size)), size, sha256, xet_hash)

    @property
    def pointer_size(self) -> int:
        """Bytes of what git stores in place of a large file."""
        return len(lfs_pointer(self.sha256 or "", self.size))


@dataclass(frozen=True)
class Commit:
    """A commit; ``tree`` maps every path to its blob, without folders."""

    oid: str
    parent: str | None
    title: str
    message: str
    author: str
    date: datetime
    tree: Mapping[str, Blob]


@dataclass
class Discussion:
    """A discussion or, with a ``base`` branch and the ``head`` commit that it forked from, a pull request."""

    num: int
    title: str
    author: str
    created: datetime
    status: str
    base: str | None = None
    head: str | None = None
    merged: str | None = None
    events: list[dict[str, object]] = field(default_factory=list)

    def add_event(self, kind: str, author: str, **data: object) -> None:
        number = f"{self.num}-{len(self.events)}"
        created = timestamp(datetime.now(timezone.utc))
        self.events.append({"id": number, "type": kind, "createdAt": created, "author": {"name": author}, "data": data})


class Repository:
    """A model repository. Every refused operation raises :class:`Refusal` and changes nothing."""

    def __init__(self, repo_id: str, private: bool, owner: str, tree: Mapping[str, Blob]) -> None:
        self.repo_id = repo_id
        self.private = private
        self.commits: dict[str, Commit] = {}
        self.refs: dict[str, str] = {}
        self.discussions: list[Discussion] = []
        self.created = datetime.now(timezone.utc)
        self.commit("refs/heads/main", tree, "initial commit", "", owner)

    def ref(self, revision: str) -> str | None:
        """The full name of the branch, tag or pull request that ``revision`` names; None for a commit's own id."""
        for name in (revision, f"refs/heads/{revision}", f"refs/tags/{revision}"):
            if name in self.refs:
                return name
        return None

    def resolve(self, revision: str = "main") -> Commit:
        """The commit behind a branch, a tag, ``refs/pr/N`` or a commit id."""
        oid = self.refs.get(self.ref(revision) or "", revision)
        if oid not in self.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[oid]

    def history(self, revision: str = "main") -> list[Commit]:
        """The commits that lead to ``revision``, newest first."""
        return list(self._ancestors(self.resolve(revision)))

    def commit(self, ref: str, tree: Mapping[str, Blob], title: str, message: str, author: str) -> Commit:
        """Put a commit with exactly ``tree`` on top of ``ref``, a full name, which may be new."""
        parent = self.refs.get(ref)
        date = datetime.now(timezone.utc)
        person = f"{author} <{author}@users.noreply> {int(date.timestamp())} +0000"
        lines = [f"tree {tree_oid(tree)}", f"author {person}", f"committer {person}", "", title, "", message]
        lines[1:1] = [f"parent {parent}"] if parent else []
        commit = Commit(git_oid("commit", "\n".join(lines).encode()), parent, title, message, author, date, dict(tree))
        self.commits[commit.oid] = commit
        self.refs[ref] = commit.oid
        if ref.startswith("refs/pr/"):
            request = self.discussion(int(ref.removeprefix("refs/pr/")))
            request.add_event("commit", author, subject=title, oid=commit.oid)
        return commit

    def create_ref(self, ref: str, commit: Commit) -> None:
        if ref in self.refs:
            raise Refusal(409, f"Reference already exists: {ref}")
        self.refs[ref] = commit.oid

    def delete_ref(self, ref: str) -> None:
        if ref not in self.refs:
            raise Refusal(404, f"Reference does not exist: {ref}", "RevisionNotFound")
        del self.refs[ref]

    def open_discussion(self, title: str, text: str, author: str) -> Discussion:
        discussion = Discussion(len(self.discussions) + 1, title, author, datetime.now(timezone.utc), "open")
        discussion.add_event("comment", author, edited=False, hidden=False, latest={"raw": text})
        self.discussions.append(discussion)
        return discussion

    def open_pull_request(self, title: str, text: str, author: str, base: str, status: str = "open") -> Discussion:
        """A pull request against the branch ``base``, whose ``refs/pr/N`` starts at the branch's head."""
        head = self.resolve(base)
        request = self.open_discussion(title, text, author)
        request.base, request.head, request.status = f"refs/heads/{base}", head.oid, status
        self.create_ref(f"refs/pr/{request.num}", head)
        return request

    def discussion(self, num: int) -> Discussion:
        if not 0 < num <= len(self.discussions):
            raise Refusal(404, "This discussion does not exist")
        return self.discussions[num - 1]

    def merge(self, num: int, author: str) -> None:
        """Commit a pull request's files to its base as one commit, if nobody has committed there since."""
        request = self.discussion(num)
        if request.base is None or request.status not in ("open", "draft"):
            raise Refusal(400, "Only an open pull request can be merged")
        if self.refs[request.base] != request.head:
            raise Refusal(409, "This pull request has conflicts with its base branch")
        tree = self.resolve(f"refs/pr/{num}").tree
        request.merged = self.commit(request.base, tree, f"{request.title} (#{num})", "", author).oid
        request.status = "merged"
        request.add_event("status-change", author, status="merged")

    def _ancestors(self, commit: Commit) -> Iterator[Commit]:
        yield commit
        while commit.parent is not None:
            commit = self.commits[commit.parent]
            yield commit


def git_oid(kind: str, data: bytes) -> str:
    """The id that git gives an object: sha1 over ``"<kind> <size>\\0"`` and its bytes."""
    return hashlib.sha1(b"%s %d\0%s" % (kind.encode(), len(data), data), usedforsecurity=False).hexdigest()


def tree_oid(tree: Mapping[str, Blob]) -> str:
    """The git id of the tree with these paths: entries sorted by name, a folder's as if it ended with a slash."""
    entries = [(path, b"100644", blob.oid) for path, blob in tree.items() if "/" not in path]
    entries += [
        (f"{name}/", b"40000", tree_oid(below(tree, name))) for name in {p.split("/")[0] for p in tree if "/" in p}
    ]
    rows = (mode + b" " + name.rstrip("/").encode() + b"\0" + bytes.fromhex(oid) for name, mode, oid in sorted(entries))
    return git_oid("tree", b"".join(rows))


def below(tree: Mapping[str, Blob], folder: str) -> dict[str, Blob]:
    """The part of a tree under ``folder``, with paths relative to it."""
    return {path.removeprefix(f"{folder}/"): blob for path, blob in tree.items() if path.startswith(f"{folder}/")}


def lfs_pointer(sha256: str, size: int) -> bytes:
    """What git stores in place of a large file (the Git LFS specification, version 1)."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def timestamp(date: datetime) -> str:
    return date.strftime("%Y-%m-%dT%H:%M:%S.000Z")
