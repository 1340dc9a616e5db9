"""A push whose every request meets every fault, seen by the real huggingface_hub client.

After a fault the repository is as before or complete, never in between; the exit code is the documented one; no commit
is made twice; and the same push, run again, completes the release.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile

from exporter.errors import ExportError
from exporter.hub import Destination, OutgoingFile, Publication, connect, publish
from exporter.hub.upload import without_xet
from exporter.rehearsal import RehearsalHub
from exporter.rehearsal.faults import (
    ANY,
    Delay,
    Drop,
    Effect,
    Fault,
    FaultPlan,
    Meanwhile,
    Silence,
    Status,
    Truncate,
    WrongDigest,
)
from tests.test_hub import CARD, export, release

COMMIT = "POST */commit/*"
Contents = dict[str, str]
"""The digest of every file of a revision: sha256 of a large one, git blob id of any other."""


@pytest.fixture(params=["xet", "lfs"])
def hub(request: pytest.FixtureRequest) -> Iterator[RehearsalHub]:
    with RehearsalHub(xet=request.param == "xet", organizations=["org"]) as running:
        yield running


@pytest.fixture
def lfs_hub() -> Iterator[RehearsalHub]:
    with RehearsalHub(xet=False, organizations=["org"]) as running:
        yield running


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Nobody waits longer than a hundredth of a second between tries; what they wanted to wait is listed."""
    real, wanted = time.sleep, []

    def sleep(seconds: float) -> None:
        wanted.append(seconds)
        real(min(seconds, 0.01))

    monkeypatch.setattr("time.sleep", sleep)
    return wanted


# A push, and what anybody sees of it


@dataclass(frozen=True)
class View:
    """All that the Hub shows of a repository: by branch, tag or pull request, the commits (newest first) and the
    files."""

    commits: dict[str, tuple[str, ...]] = field(default_factory=dict)
    contents: dict[str, Contents] = field(default_factory=dict)
    pull_requests: tuple[int, ...] = ()


NOTHING = View()


@dataclass(frozen=True)
class Kind:
    """A kind of push: its options, whether there is an older release, and the name of what is committed to."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    updates: bool = True
    target: str = "main"


KINDS = [
    Kind("first", updates=False),
    Kind("update"),
    Kind("pull-request", {"create_pr": True}, target="refs/pr/1"),
    Kind("branch", {"revision": "dev/x"}, target="dev/x"),
    Kind("tag", {"release_tag": "v1"}),
    Kind("first-to-branch-with-tag", {"revision": "dev", "release_tag": "v1"}, updates=False, target="dev"),
]


@dataclass(frozen=True)
class Push:
    """One release on its way to a repository of its own; no two have a large file in common."""

    hub: RehearsalHub
    kind: Kind
    repo_id: str
    files: list[OutgoingFile]

    @classmethod
    def prepared(cls, hub: RehearsalHub, kind: Kind, folder: Path) -> Push:
        """A push of ``kind`` that is about to begin; an older release and somebody's file are there, if it updates."""
        seed = len(hub.repositories) + 1
        push = cls(hub, kind, f"org/{kind.name}-{seed}", release_files(folder / f"new-{seed}", seed, 2))
        if kind.updates:
            older = replace(push, kind=Kind("older"), files=release_files(folder / f"old-{seed}", seed, 3))
            older.run()
            push.commit_by_somebody_else("LICENSE")
        return push

    @property
    def api(self) -> HfApi:
        return HfApi(endpoint=self.hub.endpoint, token=self.hub.token)

    def run(self, token: str | None = None) -> Publication:
        destination = Destination(self.repo_id, **self.kind.options)
        connection = connect(destination, token=token or self.hub.token, endpoint=self.hub.endpoint, card=CARD)
        return publish(connection, self.files)

    def exit_code(self, token: str | None = None) -> int:
        """The exit code of the push; an error that is not an expected one is not caught."""
        try:
            self.run(token)
        except ExportError as error:
            assert "\n" not in error.message + error.hint
            return error.exit_code
        return 0

    def commit_by_somebody_else(self, path: str) -> None:
        with nullcontext() if self.hub.xet else without_xet():
            self.api.create_commit(self.repo_id, [CommitOperationAdd(path, b"mine")], commit_message="by hand")

    def view(self) -> View:
        try:
            refs = self.api.list_repo_refs(self.repo_id, include_pull_requests=True)
        except RepositoryNotFoundError:
            return NOTHING
        names = [ref.ref if ref in (refs.pull_requests or []) else ref.name for ref in self._all(refs)]
        return View(
            {name: tuple(row.commit_id for row in self.api.list_repo_commits(self.repo_id, revision=name)) for name in names},
            {name: self.contents(name) for name in names},
            tuple(each.num for each in self.api.get_repo_discussions(self.repo_id)),
        )

    def _all(self, refs: Any) -> list[Any]:
        return [*refs.branches, *refs.tags, *(refs.pull_requests or [])]

    def contents(self, revision: str) -> Contents:
        entries = self.api.list_repo_tree(self.repo_id, recursive=True, revision=revision)
        files = [entry for entry in entries if isinstance(entry, RepoFile)]
        return {file.path: file.lfs.sha256 if file.lfs else file.blob_id for file in files}

    def complete(self, before: View) -> Contents:
        """What the release makes of the repository: its files, and those of other people."""
        large = {file.path for file in self.files if file.path.endswith(".safetensors")}
        files = {file.path: file.sha256 if file.path in large else file.git_blob_id() for file in self.files}
        others = before.contents.get("main") or {".gitattributes": self.contents("main")[".gitattributes"]}
        return {path: others[path] for path in (".gitattributes", "LICENSE") if path in others} | files


def release_files(folder: Path, seed: int, shards: int) -> list[OutgoingFile]:
    """A release whose large files have content of their own; three shards are those of an older one."""
    files = release(seed % 256, shards)
    weights = {path: seed.to_bytes(4, "big") + data for path, data in files.items() if path.endswith(".safetensors")}
    older = {"merges.txt": b"a b"} if shards == 3 else {}
    folder.parent.mkdir(exist_ok=True)
    return export(folder, {**files, **older, **weights, "config.json": b'{"seed": %d, "shards": %d}' % (seed, shards)})


def require_as_before_or_complete(push: Push, before: View, after: View) -> bool:
    """Whether the release is complete; fails where it is half, is there twice, or anything else has changed."""
    if after == NOTHING:
        assert before == NOTHING
        return False
    target, complete = push.kind.target, push.complete(before)
    for name in before.commits.keys() - {target}:
        assert (after.commits[name], after.contents[name]) == (before.commits[name], before.contents[name])
    assert after.commits.keys() <= {*before.commits, "main", target, "v1"}
    assert len(after.pull_requests) <= 1
    # A repository that the push creates holds one commit of the Hub itself; a new branch starts where main is.
    base = before.commits.get(target) or before.commits.get("main") or after.commits["main"][-1:]
    found = after.commits.get(target, base)
    if found == base:
        untouched = before.contents.get("main") or {".gitattributes": complete[".gitattributes"]}
        assert after.contents.get(target, untouched) == untouched
        assert "v1" not in after.commits
        return False
    assert found[1:] == base
    assert after.contents[target] == complete
    assert after.commits.get("v1", found) == found
    return "release_tag" not in push.kind.options or "v1" in after.commits


def require_finished_by_another_run(push: Push, before: View, cache: Path) -> None:
    """The same push again completes the release, in one commit in all; a third time there is nothing to do."""
    assert push.run().status in ("published", "unchanged")
    after = push.view()
    assert require_as_before_or_complete(push, before, after)
    folder = Path(push.api.snapshot_download(push.repo_id, revision=push.kind.target, cache_dir=cache))
    assert all((folder / file.path).read_bytes() == file.source.read_bytes() for file in push.files)
    assert push.run().status == "unchanged"
    assert push.view() == after
