"""The state of a model repository on the Hub."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import takewhile
from typing import TYPE_CHECKING
from urllib.parse import quote

from exporter.errors import CredentialError, HubRefusedError
from exporter.hub.client import HubClient
from exporter.hub.destination import DEFAULT_BRANCH
from exporter.hub.push import OutgoingFile, PushPlan, RemoteFile, blob_ids_for, plan_push
from exporter.manifest import MANIFEST_NAME, listed_files

if TYPE_CHECKING:
    from huggingface_hub.hf_api import GitRefs, ModelInfo

_LARGEST_MANIFEST = 64 * 1024 * 1024


@dataclass(frozen=True)
class PullRequest:
    """An open pull request: its number, and its head as a commit id."""

    number: int
    head: str

    @property
    def ref(self) -> str:
        return f"refs/pr/{self.number}"


@dataclass(frozen=True)
class Snapshot:
    """What a repository holds at one commit: its files by path, and (size, sha256) of those that an export wrote."""

    commit: str
    files: Mapping[str, RemoteFile] = field(default_factory=dict)
    owned: Mapping[str, tuple[int, str]] = field(default_factory=dict)

    def plan(self, outgoing: tuple[OutgoingFile, ...]) -> PushPlan:
        """What makes this snapshot hold exactly ``outgoing``, beside the files of other people."""
        blob_ids = blob_ids_for(outgoing, self.files)
        return plan_push(outgoing, self.files, owned=self.owned, blob_ids=blob_ids)


@dataclass(frozen=True)
class Repository:
    """A model repository, which need not be there yet. Every method asks the Hub and raises ExportError only."""

    client: HubClient
    repo_id: str

    @property
    def url(self) -> str:
        return f"{self.client.endpoint}/{self.repo_id}"

    def info(self) -> ModelInfo | None:
        """What the Hub says about the repository, None if it is not there.

        Raises CredentialError if it is gated, HubRefusedError if it lives under another name.
        """
        info = self.client.ask("describe the repository", self._look)
        if info is not None and info.id.casefold() != self.repo_id.casefold():
            raise HubRefusedError(
                f"{self.repo_id} was renamed to {info.id}", f"Export again with --hf_repo_name {info.id}."
            )
        return info

    def _look(self) -> ModelInfo | None:
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

        try:
            return self.client.api.model_info(self.repo_id)
        except GatedRepoError as error:
            raise CredentialError(
                f"{self.repo_id} is gated, and the token has no access", f"Ask for access at {self.url}."
            ) from error
        except RepositoryNotFoundError as error:
            # Under this name the client also raises a 401: the token has expired since it was accepted.
            if error.response.status_code == 401 and self.client.token:
                raise
            return None

    def refs(self) -> GitRefs:
        """Branches and tags, with the commit that each points at."""
        return self.client.ask("list branches and tags", lambda: self.client.api.list_repo_refs(self.repo_id))

    def head(self, revision: str) -> str | None:
        """The commit at the end of a branch or of a pull request's reference, None if there is none."""
        return self.commit(revision) if revision.startswith("refs/") else self.branch_head(revision)

    def branch_head(self, branch: str) -> str | None:
        """The commit that ``branch`` points at, None if there is no such branch."""
        return next((ref.target_commit for ref in self.refs().branches if ref.name == branch), None)

    def commit_after(self, base: str | None, revision: str) -> str | None:
        """The first commit on top of ``base`` (None: the very first) in the history of ``revision``, None if there is
        none."""
        rows = self.client.ask(
            "list the commits", lambda: self.client.api.list_repo_commits(self.repo_id, revision=revision)
        )
        newer = list(takewhile(lambda commit: commit != base, (row.commit_id for row in rows)))
        return newer[-1] if newer else None

    def tag_commit(self, tag: str) -> str | None:
        """The commit that ``tag`` points at, None if there is no such tag."""
        return next((ref.target_commit for ref in self.refs().tags if ref.name == tag), None)

    def snapshot(self, commit: str) -> Snapshot:
        """The files at ``commit``, and those that its export.json says an export wrote."""
        files = self.client.ask("list the files", lambda: {file.path: file for file in self._list(commit)})
        return Snapshot(commit, files, self._owned(commit, files.get(MANIFEST_NAME)))

    def _list(self, revision: str, *, recursive: bool = True) -> Iterator[RemoteFile]:
        from huggingface_hub.hf_api import RepoFile

        for entry in self.client.api.list_repo_tree(self.repo_id, recursive=recursive, revision=revision):
            if isinstance(entry, RepoFile):
                yield RemoteFile(entry.path, entry.size, entry.lfs.sha256 if entry.lfs else None, entry.blob_id)

    def _owned(self, commit: str, manifest: RemoteFile | None) -> dict[str, tuple[int, str]]:
        if manifest is None or manifest.size > _LARGEST_MANIFEST:
            return {}
        return manifest_files(self.read(commit, MANIFEST_NAME))

    def read(self, commit: str, path: str) -> bytes:
        """The content of a small file at ``commit``."""
        return self.client.ask(f"send {path}", lambda: self.client.get(self._address(commit, path)).content)

    def read_start(self, commit: str, path: str, count: int) -> bytes:
        """The first ``count`` bytes of a file at ``commit``."""
        address = self._address(commit, path)
        return self.client.ask(f"send the start of {path}", lambda: self.client.get_start(address, count))

    def _address(self, commit: str, path: str) -> str:
        return f"/{self.repo_id}/resolve/{quote(commit, safe='')}/{quote(path)}"

    def own_pull_request(self, user: str) -> PullRequest | None:
        """The newest open pull request of ``user`` that brings another export than the default branch has."""
        numbers = self.client.ask("list pull requests", lambda: self._pull_request_numbers(user))
        published = self._manifest_id(DEFAULT_BRANCH) if numbers else None
        for number in numbers:
            brought = self._manifest_id(f"refs/pr/{number}")
            if brought not in (None, published) and (head := self.commit(f"refs/pr/{number}")):
                return PullRequest(number, head)
        return None

    def _pull_request_numbers(self, user: str) -> list[int]:
        found = self.client.api.get_repo_discussions(
            self.repo_id, author=user, discussion_type="pull_request", discussion_status="open"
        )
        return sorted((each.num for each in found if each.is_pull_request and each.author == user), reverse=True)

    def _manifest_id(self, revision: str) -> str | None:
        files = self.client.ask("list the files", lambda: list(self._list(revision, recursive=False)))
        return next((file.blob_id for file in files if file.path == MANIFEST_NAME), None)

    def commit(self, revision: str) -> str | None:
        """The commit that a branch, tag, commit id or reference means, None if there is none."""
        from huggingface_hub.errors import RevisionNotFoundError

        def look() -> str | None:
            try:
                return str(self.client.api.model_info(self.repo_id, revision=revision).sha)
            except RevisionNotFoundError:
                return None

        return self.client.ask("name the commit", look)


def manifest_files(content: bytes) -> dict[str, tuple[int, str]]:
    """(size, sha256) by path of the files that an export.json lists; none if it is not one of ours."""
    try:
        return {file.path: (file.size, file.sha256) for file in listed_files(json.loads(content))}
    except (ValueError, RecursionError):
        return {}
