"""Large files go ahead of the commit: until it is made nobody sees them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING
from urllib.parse import quote

from exporter.errors import HubRefusedError, OutputError
from exporter.hub.connection import Note
from exporter.hub.push import OutgoingFile
from exporter.hub.repository import Repository
from exporter.shards import Progress

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd

_BATCH_BYTES = 256 * 1024 * 1024
_BATCH_FILES = 256
_NOTHING_IGNORED = "#\n"
"""A .gitignore of no pattern, instead of the repository's own. A Hub may take an empty text for none given."""


@dataclass
class Upload:
    """Files on their way to a repository; ``branch`` is there already, ``opens_pull_request`` if the commit does.

    ``transport`` is xet or lfs once a large file was sent.
    """

    repository: Repository
    branch: str
    opens_pull_request: bool
    note: Note
    transport: str | None = None

    @cached_property
    def _available(self) -> str:
        return "xet" if self._has_xet() else "lfs"

    def send(self, files: Iterable[OutgoingFile], progress: Progress) -> dict[str, CommitOperationAdd]:
        """Uploads what the Hub wants ahead of the commit and returns the commit's additions for ``files``, by path.

        Raises OutputError if a file has another size than it should.
        """
        additions: dict[str, CommitOperationAdd] = {}
        for batch in batches(files):
            operations = [addition(file) for file in batch]
            with without_xet() if self._available == "lfs" else nullcontext():
                self.repository.client.once("take the files", partial(self._preupload, operations))
            _require_not_ignored(operations)
            if any(operation._upload_mode == "lfs" for operation in operations):
                self.transport = self._available
            additions |= {operation.path_in_repo: operation for operation in operations}
            progress(sum(file.size for file in batch))
        return additions

    def _has_xet(self) -> bool:
        """Asks first: hf_xet itself reports a Hub without Xet as a broken connection."""
        from huggingface_hub.utils._runtime import is_xet_available

        if not is_xet_available():
            return False
        there = self.repository.client.ask("give access to its Xet storage", self._find_xet)
        if not there:
            self.note("The Hub has no Xet storage: large files are sent over LFS.")
        return there

    def _find_xet(self) -> bool:
        from huggingface_hub.errors import HfHubHTTPError

        revision = "None?create_pr=1" if self.opens_pull_request else quote(self.branch, safe="")
        try:
            self.repository.client.get(f"/api/models/{self.repository.repo_id}/xet-write-token/{revision}")
        except HfHubHTTPError as error:
            if error.response.status_code != 404:
                raise
            return False
        return True

    def _preupload(self, operations: list[CommitOperationAdd]) -> None:
        self.repository.client.api.preupload_lfs_files(
            self.repository.repo_id,
            operations,
            revision=self.branch,
            create_pr=self.opens_pull_request,
            free_memory=False,
            gitignore_content=_NOTHING_IGNORED,
        )


def addition(file: OutgoingFile) -> CommitOperationAdd:
    """The commit operation that adds ``file``, with the digest known, so that the client does not read it for that.

    Raises OutputError if the file is gone or has another size than it should.
    """
    from huggingface_hub import CommitOperationAdd

    size = file.source.stat().st_size if file.source.is_file() else None
    if size != file.size:
        raise OutputError(
            f"{file.path} has {'vanished' if size is None else f'{size} bytes'}, expected {file.size} bytes",
            "Something else writes to the exported folder: export again.",
        )
    operation = CommitOperationAdd(path_in_repo=file.path, path_or_fileobj=file.source)
    operation.upload_info.sha256 = bytes.fromhex(file.sha256)
    return operation


def batches(files: Iterable[OutgoingFile]) -> Iterator[Sequence[OutgoingFile]]:
    """``files`` in order, in groups that a progress bar can count by: large ones alone, small ones together."""
    batch: list[OutgoingFile] = []
    for file in files:
        batch.append(file)
        if len(batch) == _BATCH_FILES or sum(each.size for each in batch) >= _BATCH_BYTES:
            yield batch
            batch = []
    if batch:
        yield batch


def _require_not_ignored(operations: Iterable[CommitOperationAdd]) -> None:
    """The client leaves out of the commit, without a word, what the repository's .gitignore names."""
    ignored = next((operation.path_in_repo for operation in operations if operation._should_ignore), None)
    if ignored is not None:
        raise HubRefusedError(
            f"The repository's .gitignore excludes {ignored}", "Remove that line from its .gitignore on the Hub."
        )


@contextmanager
def without_xet() -> Iterator[None]:
    """The client asks this constant before each upload whether it may use Xet."""
    from huggingface_hub import constants

    before = constants.HF_HUB_DISABLE_XET
    constants.HF_HUB_DISABLE_XET = True
    try:
        yield
    finally:
        constants.HF_HUB_DISABLE_XET = before
